/* A SIMULATED CUDA runtime, libcudart, over the simulated driver: what Polygraphy calls. */
#include <stdint.h>
#include <stddef.h>

#define API __attribute__((visibility("default")))

typedef int Result; /* the codes of the runtime are the driver's, for the errors that occur here */
typedef uint64_t Address;

void *trtsim_context(void);
Result cuGetErrorString(Result, const char **);
Result cuMemAlloc_v2(Address *, size_t);
Result cuMemFree_v2(Address);
Result cuMemcpyHtoD_v2(Address, const void *, size_t);
Result cuMemcpyDtoH_v2(void *, Address, size_t);
Result cuMemcpyDtoD_v2(Address, Address, size_t);
Result cuMemcpyHtoDAsync_v2(Address, const void *, size_t, void *);
Result cuMemcpyDtoHAsync_v2(void *, Address, size_t, void *);
Result cuMemcpyDtoDAsync_v2(Address, Address, size_t, void *);
Result cuStreamCreate(void **, unsigned);
Result cuStreamDestroy_v2(void *);
Result cuStreamSynchronize(void *);

enum { HOST_TO_DEVICE = 1, DEVICE_TO_HOST = 2, DEVICE_TO_DEVICE = 3, INVALID_DIRECTION = 21 };
#define DEVICE(pointer) ((Address)(uintptr_t)(pointer))

API Result cudaMalloc(void **out, size_t size)
{
    trtsim_context();
    Address address = 0;
    Result result = size ? cuMemAlloc_v2(&address, size) : 0;
    *out = (void *)(uintptr_t)address;
    return result;
}

API Result cudaMallocAsync(void **out, size_t size, void *stream) { return (void)stream, cudaMalloc(out, size); }
API Result cudaFree(void *pointer) { return trtsim_context(), cuMemFree_v2(DEVICE(pointer)); }
API Result cudaFreeAsync(void *pointer, void *stream) { return (void)stream, cudaFree(pointer); }

API Result cudaMemcpy(void *to, const void *from, size_t size, int direction)
{
    trtsim_context();
    switch (direction) {
    case HOST_TO_DEVICE: return cuMemcpyHtoD_v2(DEVICE(to), from, size);
    case DEVICE_TO_HOST: return cuMemcpyDtoH_v2(to, DEVICE(from), size);
    case DEVICE_TO_DEVICE: return cuMemcpyDtoD_v2(DEVICE(to), DEVICE(from), size);
    }
    return INVALID_DIRECTION;
}

API Result cudaMemcpyAsync(void *to, const void *from, size_t size, int direction, void *stream)
{
    trtsim_context();
    switch (direction) {
    case HOST_TO_DEVICE: return cuMemcpyHtoDAsync_v2(DEVICE(to), from, size, stream);
    case DEVICE_TO_HOST: return cuMemcpyDtoHAsync_v2(to, DEVICE(from), size, stream);
    case DEVICE_TO_DEVICE: return cuMemcpyDtoDAsync_v2(DEVICE(to), DEVICE(from), size, stream);
    }
    return INVALID_DIRECTION;
}

API Result cudaStreamCreate(void **out) { return trtsim_context(), cuStreamCreate(out, 0); }
API Result cudaStreamDestroy(void *stream) { return cuStreamDestroy_v2(stream); }
API Result cudaStreamSynchronize(void *stream) { return trtsim_context(), cuStreamSynchronize(stream); }

API const char *cudaGetErrorString(Result code)
{
    const char *text = NULL;
    cuGetErrorString(code, &text);
    return text ? text : "unknown error";
}
