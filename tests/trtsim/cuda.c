/* A SIMULATED CUDA driver, libcuda.so.1, for tests without a GPU. There is no GPU here, and no figure from here is one.
 *
 * It is stricter than a GPU where that shows mistakes:
 * - A device address is a reserved range without access rights, so that host code which touches it dies.
 * - Fresh device memory holds NaN, so that what was never copied is seen.
 * - Work on a stream runs as late as possible: at the synchronisation that needs it.
 * - Memory, streams and events belong to a context, contexts are current per thread.
 * - An illegal access is sticky: every later call fails with it.
 * - A kernel is a shared object made by the simulated NVRTC; device memory can be touched while it runs, and only then.
 *
 * Streams are used by one thread at a time here. Prototypes are written by hand; no NVIDIA header is needed.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))

typedef int Result;
typedef uint64_t Address;

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    NOT_SUPPORTED = 801
};

static const struct {
    Result code;
    const char *name, *text;
} ERRORS[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
};

static Result name_error(Result code, const char **out, int text)
{
    for (size_t i = 0; i < sizeof ERRORS / sizeof *ERRORS; i++)
        if (ERRORS[i].code == code) {
            *out = text ? ERRORS[i].text : ERRORS[i].name;
            return SUCCESS;
        }
    *out = NULL;
    return INVALID_VALUE;
}

API Result cuGetErrorName(Result code, const char **out) { return name_error(code, out, 0); }
API Result cuGetErrorString(Result code, const char **out) { return name_error(code, out, 1); }

/* ---------------------------------------------------------------------------------------------- contexts */

typedef struct Context {
    int alive;
} Context;

static int initialized;
static Result sticky; /* an illegal access; nothing works after it */
static Context primary = {1};
static __thread Context *stack[16];
static __thread int depth;

static Context *current(void) { return depth ? stack[depth - 1] : NULL; }

static Result ready(void)
{
    if (!initialized)
        return NOT_INITIALIZED;
    return current() ? sticky : INVALID_CONTEXT;
}

#define REQUIRE_CONTEXT                  \
    do {                                 \
        Result problem = ready();        \
        if (problem)                     \
            return problem;              \
    } while (0)

static Result push(Context *context)
{
    if (!context || !context->alive)
        return INVALID_CONTEXT;
    if (depth == sizeof stack / sizeof *stack)
        return INVALID_VALUE;
    stack[depth++] = context;
    return SUCCESS;
}

API Result cuInit(unsigned flags)
{
    (void)flags;
    initialized = !getenv("TRTSIM_NO_GPU");
    return initialized ? SUCCESS : NO_DEVICE;
}

API Result cuDevicePrimaryCtxRetain(void **out, int device)
{
    if (!initialized)
        return NOT_INITIALIZED;
    *out = &primary;
    return device ? INVALID_DEVICE : SUCCESS;
}

API Result cuDevicePrimaryCtxRelease_v2(int device) { return device ? INVALID_DEVICE : SUCCESS; }

static Result create_context(void **out, int device)
{
    if (!initialized || device)
        return initialized ? INVALID_DEVICE : NOT_INITIALIZED;
    Context *context = calloc(1, sizeof *context);
    context->alive = 1;
    *out = context;
    return push(context);
}

API Result cuCtxCreate_v2(void **out, unsigned flags, int device) { return (void)flags, create_context(out, device); }

API Result cuCtxCreate_v4(void **out, void *parameters, unsigned flags, int device)
{
    (void)parameters, (void)flags;
    return create_context(out, device);
}

API Result cuCtxPushCurrent_v2(void *context) { return push(context); }

API Result cuCtxPopCurrent_v2(void **out)
{
    if (!depth)
        return INVALID_CONTEXT;
    Context *context = stack[--depth];
    if (out)
        *out = context;
    return SUCCESS;
}

API Result cuCtxDetach(void *context) { return current() == context ? cuCtxPopCurrent_v2(NULL) : SUCCESS; }

API Result cuCtxSetCurrent(void *context)
{
    if (depth)
        depth--;
    return context ? push(context) : SUCCESS;
}

API Result cuCtxGetCurrent(void **out)
{
    *out = current();
    return SUCCESS;
}

API Result cuCtxGetDevice(int *out)
{
    *out = 0;
    return current() ? SUCCESS : INVALID_CONTEXT;
}

/* ------------------------------------------------------------------------------------------------ device */

API Result cuDriverGetVersion(int *out)
{
    const char *version = getenv("TRTSIM_CUDA_VERSION");
    *out = version ? atoi(version) : 13000;
    return SUCCESS;
}

API Result cuDeviceGetCount(int *out)
{
    *out = 1;
    return initialized ? SUCCESS : NOT_INITIALIZED;
}

API Result cuDeviceGet(int *out, int ordinal)
{
    *out = 0;
    return ordinal ? INVALID_DEVICE : initialized ? SUCCESS : NOT_INITIALIZED;
}

API Result cuDeviceGetName(char *out, int size, int device)
{
    snprintf(out, (size_t)size, "SIMULATED");
    return device ? INVALID_DEVICE : SUCCESS;
}

API Result cuDeviceGetUuid_v2(void *out, int device)
{
    memcpy(out, "SIMULATED-DEVICE", 16);
    return device ? INVALID_DEVICE : SUCCESS;
}

API Result cuDeviceComputeCapability(int *major, int *minor, int device)
{
    *major = 9;
    *minor = 0;
    return device ? INVALID_DEVICE : SUCCESS;
}

API Result cuDeviceGetPCIBusId(char *out, int size, int device)
{
    snprintf(out, (size_t)size, "0000:51:4D.0");
    return device ? INVALID_DEVICE : SUCCESS;
}

API Result cuDeviceGetAttribute(int *out, int attribute, int device)
{
    switch (attribute) {
    case 10: *out = 32; break;            /* warp size */
    case 16: *out = 1; break;             /* multiprocessors */
    case 75: *out = 9; break;             /* compute capability, major */
    default: *out = 0;                    /* 76: compute capability, minor */
    }
    return device ? INVALID_DEVICE : SUCCESS;
}

static size_t device_memory(void)
{
    const char *megabytes = getenv("TRTSIM_DEVICE_MEMORY_MB");
    return (megabytes ? strtoull(megabytes, NULL, 10) : 16384) << 20;
}

API Result cuDeviceTotalMem_v2(size_t *out, int device)
{
    *out = device_memory();
    return device ? INVALID_DEVICE : SUCCESS;
}

/* ------------------------------------------------------------------------------------------------ memory */

enum { DEVICE_MEMORY, PINNED_MEMORY };

typedef struct Allocation {
    struct Allocation *next;
    Address address; /* what the caller was given */
    char *storage;   /* where the bytes are: for pinned memory at the same address, else mapped a second time */
    size_t size;
    int kind;
    Context *context;
} Allocation;

static Allocation *allocations;
static size_t used;

static Allocation *find(Address address)
{
    Allocation *a = allocations;
    while (a && !(address >= a->address && address - a->address < a->size))
        a = a->next;
    return a;
}

/* The bytes behind [address, address + size), or NULL where that is not inside one allocation. */
static char *bytes_at(Address address, size_t size, int *kind)
{
    Allocation *a = find(address);
    if (!a || address - a->address + size > a->size)
        return NULL;
    if (kind)
        *kind = a->kind;
    return a->storage + (address - a->address);
}

static void add(Address address, char *storage, size_t size, int kind)
{
    Allocation *a = malloc(sizeof *a);
    *a = (Allocation){allocations, address, storage, size, kind, current()};
    allocations = a;
}

static void run_everything(void);

static Result discard(Address address, int kind)
{
    REQUIRE_CONTEXT;
    if (!address)
        return SUCCESS;
    run_everything(); /* freeing waits for the device */
    for (Allocation **link = &allocations; *link; link = &(*link)->next) {
        Allocation *a = *link;
        if (a->address == address && a->kind == kind) {
            if (kind == DEVICE_MEMORY) {
                munmap((void *)(uintptr_t)a->address, a->size);
                munmap(a->storage, a->size);
                used -= a->size;
            } else
                free(a->storage);
            *link = a->next;
            free(a);
            return SUCCESS;
        }
    }
    return INVALID_VALUE;
}

API Result cuMemAlloc_v2(Address *out, size_t size)
{
    REQUIRE_CONTEXT;
    if (!size)
        return INVALID_VALUE;
    if (used + size > device_memory())
        return OUT_OF_MEMORY;
    size_t pages = (size + 4095) & ~(size_t)4095;
    int file = memfd_create("SIMULATED device memory", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, (off_t)pages))
        return OUT_OF_MEMORY;
    void *range = mmap(NULL, pages, PROT_NONE, MAP_SHARED, file, 0);
    char *storage = mmap(NULL, pages, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (range == MAP_FAILED || storage == MAP_FAILED)
        return OUT_OF_MEMORY;
    memset(storage, 0xFF, pages); /* a NaN in every floating format */
    used += size;
    add((Address)(uintptr_t)range, storage, size, DEVICE_MEMORY);
    *out = (Address)(uintptr_t)range;
    return SUCCESS;
}

API Result cuMemFree_v2(Address address) { return discard(address, DEVICE_MEMORY); }

API Result cuMemHostAlloc(void **out, size_t size, unsigned flags)
{
    (void)flags;
    REQUIRE_CONTEXT;
    if (!size)
        return INVALID_VALUE;
    char *storage = aligned_alloc(4096, (size + 4095) & ~(size_t)4095);
    if (!storage)
        return OUT_OF_MEMORY;
    add((Address)(uintptr_t)storage, storage, size, PINNED_MEMORY);
    *out = storage;
    return SUCCESS;
}

API Result cuMemAllocHost_v2(void **out, size_t size) { return cuMemHostAlloc(out, size, 0); }
API Result cuMemFreeHost(void *p) { return discard((Address)(uintptr_t)p, PINNED_MEMORY); }

API Result cuMemGetInfo_v2(size_t *available, size_t *total)
{
    REQUIRE_CONTEXT;
    *total = device_memory();
    *available = *total - used;
    return SUCCESS;
}

/* ------------------------------------------------------------------------------------- streams and events */

typedef struct Event {
    Context *context;
    unsigned flags;
    int recorded, done; /* how often */
    double milliseconds;
    struct Stream *stream;
} Event;

typedef struct Operation {
    struct Operation *next;
    void (*call)(void *); /* else a copy, else an event to record or to wait for */
    void *argument;
    char *target, *source;
    size_t size;
    char *staged; /* the copy of a pageable source */
    Event *record, *wait;
    int count;
} Operation;

typedef struct Stream {
    struct Stream *next;
    Context *context;
    Operation *first, **last;
    Operation *captured, **captured_last; /* while a graph is captured */
} Stream;

typedef struct Graph {
    Operation *first;
} Graph;

static Stream *streams;
static Stream default_stream;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

static void run_until(Stream *stream, Event *event, int count);

static void perform(Operation *o)
{
    if (o->call)
        o->call(o->argument);
    else if (o->record) {
        o->record->milliseconds = now();
        o->record->done = o->count;
    } else if (o->wait) {
        if (o->wait->stream)
            run_until(o->wait->stream, o->wait, o->count);
    } else
        memmove(o->target, o->staged ? o->staged : o->source, o->size);
}

/* Run a stream's work until it is empty, or until `event` was recorded for the count-th time. */
static void run_until(Stream *stream, Event *event, int count)
{
    while (stream->first && !(event && event->done >= count)) {
        Operation *o = stream->first;
        stream->first = o->next;
        if (!stream->first)
            stream->last = &stream->first;
        perform(o);
        free(o->staged);
        free(o);
    }
}

static void run_everything(void)
{
    run_until(&default_stream, NULL, 0);
    for (Stream *s = streams; s; s = s->next)
        run_until(s, NULL, 0);
}

static Stream *stream_of(void *handle)
{
    if ((uintptr_t)handle <= 2) { /* the default streams */
        if (!default_stream.last)
            default_stream.last = &default_stream.first;
        return &default_stream;
    }
    for (Stream *s = streams; s; s = s->next)
        if (s == handle)
            return s->context == current() ? s : NULL;
    return NULL;
}

static void submit(Stream *stream, Operation operation)
{
    Operation *o = malloc(sizeof *o);
    *o = operation;
    o->next = NULL;
    Operation ***last = stream->captured_last ? &stream->captured_last : &stream->last;
    **last = o;
    *last = &o->next;
}

API Result cuStreamCreate(void **out, unsigned flags)
{
    (void)flags;
    REQUIRE_CONTEXT;
    Stream *s = calloc(1, sizeof *s);
    s->context = current();
    s->last = &s->first;
    s->next = streams;
    streams = s;
    *out = s;
    return SUCCESS;
}

API Result cuStreamCreateWithPriority(void **out, unsigned flags, int priority)
{
    (void)priority;
    return cuStreamCreate(out, flags);
}

API Result cuStreamDestroy_v2(void *handle)
{
    for (Stream **link = &streams; *link; link = &(*link)->next)
        if (*link == handle) {
            run_until(*link, NULL, 0);
            *link = (*link)->next;
            free(handle);
            return SUCCESS;
        }
    return INVALID_HANDLE;
}

API Result cuStreamSynchronize(void *handle)
{
    REQUIRE_CONTEXT;
    Stream *s = stream_of(handle);
    if (!s || s->captured_last)
        return INVALID_HANDLE;
    if (s == &default_stream)
        run_everything();
    else
        run_until(s, NULL, 0);
    return sticky;
}

API Result cuStreamQuery(void *handle)
{
    REQUIRE_CONTEXT;
    Stream *s = stream_of(handle);
    if (!s)
        return INVALID_HANDLE;
    if (!s->first)
        return SUCCESS;
    run_until(s, NULL, 0); /* the next query finds it done */
    return NOT_READY;
}

API Result cuCtxSynchronize(void)
{
    REQUIRE_CONTEXT;
    run_everything();
    return sticky;
}

API Result cuEventCreate(void **out, unsigned flags)
{
    REQUIRE_CONTEXT;
    Event *e = calloc(1, sizeof *e);
    e->context = current();
    e->flags = flags;
    *out = e;
    return SUCCESS;
}

API Result cuEventDestroy_v2(void *handle)
{
    run_everything();
    free(handle);
    return SUCCESS;
}

API Result cuEventRecord(void *handle, void *stream)
{
    REQUIRE_CONTEXT;
    Event *e = handle;
    Stream *s = stream_of(stream);
    if (!e || !s || e->context != current())
        return INVALID_HANDLE;
    e->stream = s;
    submit(s, (Operation){.record = e, .count = ++e->recorded});
    return SUCCESS;
}

API Result cuStreamWaitEvent(void *stream, void *handle, unsigned flags)
{
    (void)flags;
    REQUIRE_CONTEXT;
    Event *e = handle;
    Stream *s = stream_of(stream);
    if (!e || !s)
        return INVALID_HANDLE;
    submit(s, (Operation){.wait = e, .count = e->recorded});
    return SUCCESS;
}

API Result cuEventSynchronize(void *handle)
{
    REQUIRE_CONTEXT;
    Event *e = handle;
    if (!e)
        return INVALID_HANDLE;
    if (e->stream)
        run_until(e->stream, e, e->recorded);
    return sticky;
}

API Result cuEventQuery(void *handle)
{
    Event *e = handle;
    return e->done >= e->recorded ? sticky : NOT_READY;
}

API Result cuEventElapsedTime_v2(float *milliseconds, void *start, void *end)
{
    Event *a = start, *b = end;
    if (!a || !b || !a->recorded || !b->recorded || (a->flags | b->flags) & 2) /* never recorded, or without timing */
        return INVALID_HANDLE;
    if (a->done < a->recorded || b->done < b->recorded)
        return NOT_READY;
    *milliseconds = (float)(b->milliseconds - a->milliseconds); /* of the CPU's clock: no GPU's time */
    return SUCCESS;
}

API Result cuEventElapsedTime(float *milliseconds, void *start, void *end)
{
    return cuEventElapsedTime_v2(milliseconds, start, end);
}

/* ------------------------------------------------------------------------------------------------- copies */

/* `to_device`, `from_device`: which side must be the device's. A NULL `stream` waits for the copy. */
static Result copy(Address target, Address source, size_t size, int to_device, int from_device, void **stream)
{
    REQUIRE_CONTEXT;
    int target_kind = -1, source_kind = -1;
    char *to = bytes_at(target, size, &target_kind), *from = bytes_at(source, size, &source_kind);
    if ((to_device && target_kind != DEVICE_MEMORY) || (from_device && source_kind != DEVICE_MEMORY))
        return INVALID_VALUE;
    if (!to)
        to = (char *)(uintptr_t)target; /* pageable memory of the host */
    if (!from)
        from = (char *)(uintptr_t)source;
    if (!stream) {
        run_everything();
        memmove(to, from, size);
        return sticky;
    }
    Stream *s = stream_of(*stream);
    if (!s)
        return INVALID_HANDLE;
    Operation o = {.target = to, .source = from, .size = size};
    if (source_kind < 0) { /* read at the call, as the driver does */
        o.staged = malloc(size);
        memcpy(o.staged, from, size);
    }
    submit(s, o);
    if (target_kind < 0) /* pageable: not asynchronous */
        run_until(s, NULL, 0);
    return sticky;
}

#define HOST(p) ((Address)(uintptr_t)(p))
API Result cuMemcpyHtoD_v2(Address to, const void *from, size_t n) { return copy(to, HOST(from), n, 1, 0, NULL); }
API Result cuMemcpyDtoH_v2(void *to, Address from, size_t n) { return copy(HOST(to), from, n, 0, 1, NULL); }
API Result cuMemcpyDtoD_v2(Address to, Address from, size_t n) { return copy(to, from, n, 1, 1, NULL); }
API Result cuMemcpyHtoDAsync_v2(Address to, const void *from, size_t n, void *s)
{
    return copy(to, HOST(from), n, 1, 0, &s);
}
API Result cuMemcpyDtoHAsync_v2(void *to, Address from, size_t n, void *s) { return copy(HOST(to), from, n, 0, 1, &s); }
API Result cuMemcpyDtoDAsync_v2(Address to, Address from, size_t n, void *s) { return copy(to, from, n, 1, 1, &s); }

API Result cuMemsetD8_v2(Address to, unsigned char value, size_t n)
{
    REQUIRE_CONTEXT;
    char *target = bytes_at(to, n, NULL);
    if (!target)
        return INVALID_VALUE;
    run_everything();
    memset(target, value, n);
    return SUCCESS;
}

API Result cuMemsetD8Async(Address to, unsigned char value, size_t n, void *stream)
{
    REQUIRE_CONTEXT;
    char *target = bytes_at(to, n, NULL);
    Stream *s = stream_of(stream);
    if (!target || !s)
        return target ? INVALID_HANDLE : INVALID_VALUE;
    Operation o = {.target = target, .size = n};
    o.staged = malloc(n ? n : 1);
    memset(o.staged, value, n);
    submit(s, o);
    return SUCCESS;
}

/* ------------------------------------------------------------------------------------------------ kernels */

typedef struct Function {
    void *code;
    void (*launch)(void *code, unsigned blocks, unsigned threads, const uint64_t *arguments);
} Function;

typedef struct Launch {
    Function *function;
    unsigned blocks, threads;
    uint64_t arguments[6];
} Launch;

API Result cuModuleLoadDataEx(void **out, const void *image, unsigned count, void *options, void *values)
{
    (void)count, (void)options, (void)values;
    REQUIRE_CONTEXT;
    const unsigned char *header = image;
    if (memcmp(header, "\177ELF", 4) || header[18] != 62) /* what is for another machine than this one is NVIDIA's */
        return INVALID_IMAGE;
    uint64_t sections;
    uint16_t number, size;
    memcpy(&sections, header + 40, 8), memcpy(&size, header + 58, 2), memcpy(&number, header + 60, 2);
    char path[64];
    int file = memfd_create("SIMULATED module", MFD_CLOEXEC);
    ssize_t length = (ssize_t)(sections + (uint64_t)size * number); /* the table of sections ends the file */
    snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    void *library = file >= 0 && write(file, image, (size_t)length) == length ? dlopen(path, RTLD_NOW) : NULL;
    if (file >= 0)
        close(file);
    *out = library;
    return library ? SUCCESS : INVALID_IMAGE;
}

API Result cuModuleLoadData(void **out, const void *image) { return cuModuleLoadDataEx(out, image, 0, NULL, NULL); }
API Result cuModuleUnload(void *module) { return (void)module, SUCCESS; } /* a graph may still hold a launch */

API Result cuModuleGetFunction(void **out, void *module, const char *name)
{
    REQUIRE_CONTEXT;
    Function *function = calloc(1, sizeof *function);
    *function = (Function){dlsym(module, name), NULL};
    *(void **)&function->launch = dlsym(module, "simulated_launch");
    *out = function;
    return function->code ? SUCCESS : NOT_FOUND;
}

API Result cuFuncSetBlockShape(void *f, int x, int y, int z) { return (void)f, (void)x, (void)y, (void)z, SUCCESS; }

static void protect_device_memory(int protection)
{
    for (Allocation *a = allocations; a; a = a->next)
        if (a->kind == DEVICE_MEMORY && a->context == current())
            mprotect((void *)(uintptr_t)a->address, a->size, protection);
}

static void launch(void *argument)
{
    Launch *l = argument;
    protect_device_memory(PROT_READ | PROT_WRITE);
    l->function->launch(l->function->code, l->blocks, l->threads, l->arguments);
    protect_device_memory(PROT_NONE);
} /* it stays for the life of the process, as a graph may launch it again */

/* The arguments are read at the call, as the driver does. They come as a buffer and its size, and each has 64 bits: of
 * an array of pointers to them nothing here would tell the length. */
API Result cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
    unsigned threads_z, unsigned shared, void *stream, void **arguments, void **extra)
{
    REQUIRE_CONTEXT;
    Stream *s = stream_of(stream);
    if (!s)
        return INVALID_HANDLE;
    if (!x || y != 1 || z != 1 || !threads || threads > 1024 || threads_y != 1 || threads_z != 1 || shared)
        return INVALID_VALUE;
    if (arguments || !extra || extra[0] != (void *)1 || extra[2] != (void *)2)
        return NOT_SUPPORTED;
    size_t size = *(size_t *)extra[3];
    Launch *l = calloc(1, sizeof *l);
    if (size > sizeof l->arguments)
        return INVALID_VALUE;
    *l = (Launch){.function = function, .blocks = x, .threads = threads};
    memcpy(l->arguments, extra[1], size);
    submit(s, (Operation){.call = launch, .argument = l});
    return SUCCESS;
}

/* ------------------------------------------------------------------------------------------------- graphs */

API Result cuStreamBeginCapture_v2(void *handle, int mode)
{
    (void)mode;
    REQUIRE_CONTEXT;
    Stream *s = stream_of(handle);
    if (!s || s == &default_stream || s->captured_last)
        return INVALID_HANDLE;
    if (getenv("TRTSIM_NO_GRAPHS"))
        return NOT_SUPPORTED;
    s->captured_last = &s->captured;
    return SUCCESS;
}

API Result cuStreamEndCapture(void *handle, void **out)
{
    REQUIRE_CONTEXT;
    Stream *s = stream_of(handle);
    if (!s || !s->captured_last)
        return INVALID_HANDLE;
    Graph *g = calloc(1, sizeof *g);
    g->first = s->captured;
    s->captured = NULL;
    s->captured_last = NULL;
    *out = g;
    return SUCCESS;
}

API Result cuStreamIsCapturing(void *handle, int *out)
{
    Stream *s = stream_of(handle);
    *out = s && s->captured_last;
    return s ? SUCCESS : INVALID_HANDLE;
}

API Result cuGraphInstantiateWithFlags(void **out, void *graph, unsigned long long flags)
{
    (void)flags;
    Graph *g = calloc(1, sizeof *g);
    *g = *(Graph *)graph; /* operations stay for the life of the process */
    *out = g;
    return SUCCESS;
}

API Result cuGraphLaunch(void *executable, void *handle)
{
    REQUIRE_CONTEXT;
    Stream *s = stream_of(handle);
    if (!s)
        return INVALID_HANDLE;
    for (Operation *o = ((Graph *)executable)->first; o; o = o->next) {
        Operation again = *o;
        if (o->staged) {
            again.staged = malloc(o->size);
            memcpy(again.staged, o->staged, o->size);
        }
        submit(s, again);
    }
    return SUCCESS;
}

API Result cuGraphDestroy(void *graph) { return free(graph), SUCCESS; }
API Result cuGraphExecDestroy(void *executable) { return free(executable), SUCCESS; }

/* --------------------------------------------------------------------------- for the simulated TensorRT */

/* As CUDA's runtime does, which TensorRT works with: without a current context take the primary one. */
API void *trtsim_context(void)
{
    initialized = 1;
    if (!current())
        push(&primary);
    return current();
}

/* The bytes behind a device address of the current context, and how many are left from there; NULL otherwise. */
API void *trtsim_bytes(Address address, size_t *left)
{
    Allocation *a = find(address);
    if (!a || (a->kind == DEVICE_MEMORY && a->context != trtsim_context()))
        return NULL;
    *left = a->size - (address - a->address);
    return a->storage + (address - a->address);
}

API Result trtsim_enqueue(void *stream, void (*call)(void *), void *argument)
{
    REQUIRE_CONTEXT;
    Stream *s = stream_of(stream);
    if (!s)
        return INVALID_HANDLE;
    submit(s, (Operation){.call = call, .argument = argument});
    return SUCCESS;
}

API void trtsim_illegal_access(void) { sticky = ILLEGAL_ADDRESS; }
API Result trtsim_sticky(void) { return sticky; }

/* ------------------------------------------------------------------------------------------- not simulated */

/* pycuda links against these, and no engine needs them. */
#define UNSUPPORTED(X) \
    X(cuArray3DCreate_v2) X(cuArray3DGetDescriptor_v2) X(cuArrayCreate_v2) X(cuArrayDestroy) \
    X(cuArrayGetDescriptor_v2) X(cuCtxAttach) X(cuCtxDisablePeerAccess) X(cuCtxEnablePeerAccess) \
    X(cuCtxGetApiVersion) X(cuCtxGetCacheConfig) X(cuCtxGetLimit) X(cuCtxGetSharedMemConfig) X(cuCtxSetCacheConfig) \
    X(cuCtxSetLimit) X(cuCtxSetSharedMemConfig) X(cuDeviceCanAccessPeer) X(cuDeviceGetByPCIBusId) \
    X(cuFuncGetAttribute) X(cuFuncSetAttribute) X(cuFuncSetCacheConfig) \
    X(cuFuncSetSharedSize) X(cuIpcCloseMemHandle) X(cuIpcGetEventHandle) X(cuIpcGetMemHandle) \
    X(cuIpcOpenEventHandle) X(cuIpcOpenMemHandle_v2) X(cuLaunch) X(cuLaunchGrid) X(cuLaunchGridAsync) \
    X(cuLinkAddData_v2) X(cuLinkAddFile_v2) X(cuLinkComplete) X(cuLinkCreate_v2) X(cuLinkDestroy) \
    X(cuMemAllocManaged) X(cuMemAllocPitch_v2) X(cuMemGetAddressRange_v2) X(cuMemHostGetDevicePointer_v2) \
    X(cuMemHostGetFlags) X(cuMemHostRegister_v2) X(cuMemHostUnregister) X(cuMemcpy2DAsync_v2) \
    X(cuMemcpy2DUnaligned_v2) X(cuMemcpy2D_v2) X(cuMemcpy3DAsync_v2) X(cuMemcpy3DPeer) X(cuMemcpy3DPeerAsync) \
    X(cuMemcpy3D_v2) X(cuMemcpyAtoA_v2) X(cuMemcpyAtoD_v2) X(cuMemcpyAtoH_v2) X(cuMemcpyDtoA_v2) X(cuMemcpyHtoA_v2) \
    X(cuMemcpyPeer) X(cuMemcpyPeerAsync) X(cuMemsetD16Async) X(cuMemsetD16_v2) X(cuMemsetD2D16Async) \
    X(cuMemsetD2D16_v2) X(cuMemsetD2D32Async) X(cuMemsetD2D32_v2) X(cuMemsetD2D8Async) X(cuMemsetD2D8_v2) \
    X(cuMemsetD32Async) X(cuMemsetD32_v2) X(cuModuleGetGlobal_v2) \
    X(cuModuleGetSurfRef) X(cuModuleGetTexRef) X(cuModuleLoad) \
    X(cuParamSetSize) X(cuParamSetTexRef) X(cuParamSetf) X(cuParamSeti) X(cuParamSetv) \
    X(cuProfilerInitialize) X(cuProfilerStart) X(cuProfilerStop) X(cuStreamAttachMemAsync) X(cuSurfRefGetArray) \
    X(cuSurfRefSetArray) X(cuTexRefCreate) X(cuTexRefDestroy) X(cuTexRefGetAddressMode) X(cuTexRefGetAddress_v2) \
    X(cuTexRefGetArray) X(cuTexRefGetFilterMode) X(cuTexRefGetFlags) X(cuTexRefGetFormat) X(cuTexRefSetAddress2D_v3) \
    X(cuTexRefSetAddressMode) X(cuTexRefSetAddress_v2) X(cuTexRefSetArray) X(cuTexRefSetFilterMode) \
    X(cuTexRefSetFlags) X(cuTexRefSetFormat)
#define REFUSE(name) \
    API Result name(void) { return NOT_SUPPORTED; }
UNSUPPORTED(REFUSE)

/* ---------------------------------------------------------------------------------------------- addresses */

API Result cuGetProcAddress_v2(const char *name, void **out, int version, uint64_t flags, int *status)
{
    static const char *SUFFIXES[] = {"_v4", "_v2", ""};
    static void *self;
    (void)version, (void)flags;
    if (!self)
        self = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    *out = NULL;
    for (size_t i = 0; i < sizeof SUFFIXES / sizeof *SUFFIXES && !*out; i++) {
        char symbol[128];
        snprintf(symbol, sizeof symbol, "%s%s", name, SUFFIXES[i]);
        *out = dlsym(self, symbol);
    }
    if (status)
        *status = *out ? 0 : 1;
    return *out ? SUCCESS : NOT_FOUND;
}

API Result cuGetProcAddress(const char *name, void **out, int version, uint64_t flags)
{
    return cuGetProcAddress_v2(name, out, version, flags, NULL);
}
