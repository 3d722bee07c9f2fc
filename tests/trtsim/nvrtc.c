/* A SIMULATED NVRTC: the host's C++ compiler, with kernel.h in front of the program. What it calls CUBIN is a shared
 * object for the simulated driver. The double of libcuda links against this library, so that a process which has the one
 * never finds an NVRTC of NVIDIA's.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))

enum { SUCCESS, OUT_OF_MEMORY, CREATION_FAILURE, INVALID_INPUT, INVALID_PROGRAM, INVALID_OPTION, COMPILATION };

typedef struct Program {
    char *source, *log, *binary;
    size_t log_size, binary_size;
} Program;

static char *read_all(const char *path, size_t *size)
{
    FILE *file = fopen(path, "rb");
    char *content = NULL;
    *size = 0;
    if (file) {
        fseek(file, 0, SEEK_END);
        *size = (size_t)ftell(file);
        rewind(file);
        content = calloc(1, *size + 1);
        *size = fread(content, 1, *size, file);
        fclose(file);
    }
    return content;
}

API int nvrtcVersion(int *major, int *minor)
{
    *major = 13;
    *minor = 0;
    return SUCCESS;
}

API const char *nvrtcGetErrorString(int code)
{
    return code == COMPILATION ? "NVRTC_ERROR_COMPILATION" : code ? "NVRTC_ERROR_SIMULATED" : "NVRTC_SUCCESS";
}

static const int ARCHITECTURES[] = {75, 80, 86, 89, 90, 100};

API int nvrtcGetNumSupportedArchs(int *number)
{
    *number = sizeof ARCHITECTURES / sizeof *ARCHITECTURES;
    return SUCCESS;
}

API int nvrtcGetSupportedArchs(int *architectures)
{
    memcpy(architectures, ARCHITECTURES, sizeof ARCHITECTURES);
    return SUCCESS;
}

API int nvrtcCreateProgram(Program **out, const char *source, const char *name, int headers, const char **h, const char **n)
{
    (void)name, (void)headers, (void)h, (void)n;
    *out = calloc(1, sizeof **out);
    (*out)->source = strdup(source);
    return SUCCESS;
}

API int nvrtcCompileProgram(Program *program, int count, const char **options)
{
    for (int i = 0; i < count; i++) /* of all others none matters here */
        if (strncmp(options[i], "--gpu-architecture=", 19) && strncmp(options[i], "--ftz=", 6))
            return INVALID_OPTION;
    char folder[] = "/tmp/simulated-nvrtc-XXXXXX", source[64], binary[64], log[64], command[1024];
    if (!mkdtemp(folder))
        return OUT_OF_MEMORY;
    snprintf(source, sizeof source, "%s/kernel.cpp", folder);
    snprintf(binary, sizeof binary, "%s/kernel.so", folder);
    snprintf(log, sizeof log, "%s/log", folder);
    FILE *file = fopen(source, "w");
    fputs(program->source, file);
    fclose(file);
    snprintf(command, sizeof command, "%s %s -o %s %s >%s 2>&1", COMPILER, KERNEL_FLAGS, binary, source, log);
    int failed = system(command);
    program->log = read_all(log, &program->log_size);
    program->binary = failed ? NULL : read_all(binary, &program->binary_size);
    unlink(source), unlink(binary), unlink(log), rmdir(folder);
    return failed ? COMPILATION : SUCCESS;
}

API int nvrtcGetProgramLogSize(Program *program, size_t *size)
{
    *size = program->log_size + 1;
    return SUCCESS;
}

API int nvrtcGetProgramLog(Program *program, char *log)
{
    memcpy(log, program->log, program->log_size + 1);
    return SUCCESS;
}

API int nvrtcGetCUBINSize(Program *program, size_t *size)
{
    *size = program->binary_size;
    return program->binary ? SUCCESS : INVALID_PROGRAM;
}

API int nvrtcGetCUBIN(Program *program, char *binary)
{
    memcpy(binary, program->binary, program->binary_size);
    return SUCCESS;
}

API int nvrtcGetPTXSize(Program *program, size_t *size) { return nvrtcGetCUBINSize(program, size); }
API int nvrtcGetPTX(Program *program, char *ptx) { return nvrtcGetCUBIN(program, ptx); }

API int nvrtcDestroyProgram(Program **program)
{
    free((*program)->source), free((*program)->log), free((*program)->binary), free(*program);
    *program = NULL;
    return SUCCESS;
}
