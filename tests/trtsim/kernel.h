/* What stands in front of a CUDA kernel's text when the host's C++ compiler compiles it. SIMULATED.
 *
 * The threads of a block are fibers of one thread of the host: each runs until it reaches a barrier or its end, then
 * the next one does. Their order is reversed at every barrier, and in every other block, so that a barrier that is
 * missing shows. Shared memory holds NaN when a block begins. Blocks run one after the other. An atomic operation is an
 * ordinary one here: nothing interrupts it.
 *
 * Not there: warps and what only they can do, grids of more than one dimension, dynamic shared memory, textures.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#define __global__ __attribute__((visibility("default")))
#define __device__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("simulated_shared")))

struct simulated_index {
    unsigned x;
};
static simulated_index threadIdx, blockIdx, blockDim, gridDim;

extern char __start_simulated_shared[], __stop_simulated_shared[];
static char simulated_nothing __attribute__((section("simulated_shared"), used)); /* or there is no such section */

static const size_t SIMULATED_STACK = 32 << 10;
static ucontext_t simulated_scheduler, *simulated_fiber;
static bool simulated_ended;
static void (*simulated_kernel)(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t);
static const uint64_t *simulated_arguments;

static void __syncthreads()
{
    simulated_ended = false;
    swapcontext(simulated_fiber, &simulated_scheduler);
}

static void simulated_thread()
{
    const uint64_t *a = simulated_arguments;
    simulated_kernel(a[0], a[1], a[2], a[3], a[4], a[5]);
    simulated_ended = true;
    swapcontext(simulated_fiber, &simulated_scheduler); /* for good */
}

static void simulated_run_block(ucontext_t *fibers, char *stacks)
{
    memset(__start_simulated_shared, 0xFF, (size_t)(__stop_simulated_shared - __start_simulated_shared));
    for (unsigned i = 0; i < blockDim.x; i++) {
        getcontext(&fibers[i]);
        fibers[i].uc_stack.ss_sp = stacks + i * SIMULATED_STACK;
        fibers[i].uc_stack.ss_size = SIMULATED_STACK;
        makecontext(&fibers[i], simulated_thread, 0);
    }
    unsigned ended = 0;
    for (bool forward = blockIdx.x % 2 == 0; !ended; forward = !forward)
        for (unsigned i = 0; i < blockDim.x; i++) {
            threadIdx.x = forward ? i : blockDim.x - 1 - i;
            simulated_fiber = &fibers[threadIdx.x];
            swapcontext(&simulated_scheduler, simulated_fiber);
            ended += simulated_ended;
        }
    if (ended != blockDim.x) {
        fprintf(stderr, "SIMULATED: %u of %u threads ended, the others wait at a barrier\n", ended, blockDim.x);
        abort();
    }
}

/* The driver calls it: a launch, with six arguments of 64 bits, of which the kernel takes the first ones. */
extern "C" __attribute__((visibility("default"))) void simulated_launch(
    void *kernel, unsigned blocks, unsigned threads, const uint64_t *arguments)
{
    const size_t size = threads * SIMULATED_STACK;
    void *stacks = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ucontext_t *fibers = (ucontext_t *)calloc(threads, sizeof *fibers);
    memcpy(&simulated_kernel, &kernel, sizeof kernel);
    simulated_arguments = arguments;
    gridDim.x = blocks;
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        simulated_run_block(fibers, (char *)stacks);
    free(fibers);
    munmap(stacks, size);
}

struct uint4 {
    uint32_t x, y, z, w;
};

template <class T> static inline T __ldcs(const T *address)
{
    if ((uintptr_t)address % sizeof(T)) {
        fprintf(stderr, "SIMULATED: a load of %zu bytes from %p\n", sizeof(T), (const void *)address);
        abort();
    }
    return *address;
}

static inline uint32_t __float_as_uint(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float __uint_as_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

template <class T> static inline T atomicAdd(T *address, T value)
{
    T before = *address;
    *address = before + value;
    return before;
}

template <class T> static inline T atomicMax(T *address, T value)
{
    T before = *address;
    *address = value > before ? value : before;
    return before;
}
