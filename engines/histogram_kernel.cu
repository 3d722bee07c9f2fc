/* Counts the magnitudes of a batch's activations on the GPU: one launch for all tensors, each value read once.
 *
 * The bins are those of calibrators.histogram, the top bits of the float's own pattern, so that the counts are those of
 * the CPU's kernel. BINS, SHIFT, THREADS, VECTORS and WINDOW are defined in front of this text.
 *
 * - The tensors are cut into tiles of equal size, and each block takes a share of all tiles, one after the other. So the
 *   blocks have the same amount of work whatever the sizes of the tensors, and a block changes its tensor seldom.
 * - A block counts in a window of shared memory, the octaves below the largest of some values that it looks at first,
 *   from all over its share. A value that is not in the window is counted in global memory: its place does not matter
 *   for the sums. At the end of its share of a tensor the block adds the window to the tensor's counters.
 * - An increment of shared memory whose result nobody reads is one instruction, and neighbouring values are spread over
 *   all banks, since the bin's last bits are those of the mantissa. Zeros, half of all values behind a ReLU, would all
 *   meet at one address: each thread counts them in a register.
 * - The window is just under 32 KiB, and a block has 512 threads: so two blocks fit a multiprocessor of 64 KiB and 1024
 *   threads (7.5), and three one of 100 KiB and 1536 (8.6, 8.9, 12.0): all of its threads are used. On those of 164 KiB
 *   and 2048 (8.0, 9.0, 10.0) it is three as well, since for four the compiler would have to spill registers. A window
 *   of 48 KiB, the most that every GPU gives to a block, would leave a third to half of the threads idle.
 * - Each thread has VECTORS loads of 16 bytes on their way at a time.
 *
 * All state begins with zeros; the sums are integers and the extremes are exact, so neither the number of blocks nor
 * their order shows in the result. No header is included: NVRTC would have to find it.
 */

typedef unsigned int u32;
typedef unsigned long long u64;

#define INFINITE 0x7F800000u
#define MANTISSA_BITS (23 - SHIFT)
#define TILE_BYTES (THREADS * VECTORS * 16u)
#define SAMPLES 4u /* values that each thread looks at to place the window */

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define BLOCKS_AT_A_TIME 2
#else
#define BLOCKS_AT_A_TIME 3
#endif

/* A tensor of the batch. The table ends with an entry that holds only the number of all tiles. */
struct Tensor {
    u64 values;     /* address of the first one */
    u64 size;       /* number of values */
    u64 first_tile; /* number of tiles of all tensors before */
    u64 half;       /* 1 for FP16, 0 for FP32 */
};

/* What is known of a tensor beside its counters. Extremes are kept as keys that ascend with the value; 0 is none. */
struct Totals {
    u64 zeros;
    u64 nonfinite;
    u32 highest; /* key of the largest finite value */
    u32 lowest;  /* complement of the key of the smallest one, so that it grows, too */
};

/* What one thread has seen. */
struct Seen {
    u32 zeros;
    u32 nonfinite;
    float highest; /* of the values that are finite and not zero */
    float lowest;
};

__device__ __forceinline__ u32 key_of(float value)
{
    u32 bits = __float_as_uint(value);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/* The pattern of an FP16 value as FP32, exact. Shifted, its exponent is too small by 112; so are those of subnormal
 * numbers, which the multiplication makes normal. */
__device__ __forceinline__ u32 widened(u32 half)
{
    u32 magnitude = half & 0x7FFFu;
    u32 bits = __float_as_uint(__uint_as_float(magnitude << 13) * __uint_as_float((112u + 127u) << 23));
    bits = magnitude < 0x7C00u ? bits : INFINITE | magnitude << 13;
    return bits | (half & 0x8000u) << 16;
}

__device__ __forceinline__ u32 pattern_at(const Tensor &tensor, u64 index)
{
    return tensor.half ? widened(((const unsigned short *)tensor.values)[index])
                       : ((const u32 *)tensor.values)[index];
}

__device__ __forceinline__ void see(Seen &seen, u32 bits)
{
    float value = __uint_as_float(bits);
    seen.highest = fmaxf(seen.highest, value);
    seen.lowest = fminf(seen.lowest, value);
}

__device__ __forceinline__ void count(u32 bits, u32 first, u32 *window, u64 *counters, Seen &seen)
{
    u32 magnitude = bits & 0x7FFFFFFFu;
    u32 place = (magnitude >> SHIFT) - first; /* of a lower bin it wraps around to a large number */
    seen.zeros += magnitude == 0;
    if (place < WINDOW) {
        atomicAdd(&window[place], 1u);
        see(seen, bits);
    } else if (magnitude >= INFINITE) {
        seen.nonfinite += 1;
    } else if (magnitude != 0) {
        atomicAdd(&counters[magnitude >> SHIFT], 1ull);
        see(seen, bits);
    }
}

template <bool HALF>
__device__ __forceinline__ void count_word(u32 word, u32 first, u32 *window, u64 *counters, Seen &seen)
{
    if (HALF) {
        count(widened(word & 0xFFFFu), first, window, counters, seen);
        count(widened(word >> 16), first, window, counters, seen);
    } else {
        count(word, first, window, counters, seen);
    }
}

/* Count tiles [tile, end) of a tensor. */
template <bool HALF>
__device__ __forceinline__ void count_tiles(
    const Tensor &tensor, u64 tile, u64 end, u32 first, u32 *window, u64 *counters, Seen &seen)
{
    const u64 values_per_tile = TILE_BYTES / (HALF ? 2 : 4);
    const bool aligned = tensor.values % 16 == 0;
    for (; tile < end; ++tile) {
        u64 stop = (tile + 1) * values_per_tile;
        if (aligned && stop <= tensor.size) {
            const uint4 *source = (const uint4 *)(tensor.values + tile * TILE_BYTES) + threadIdx.x;
            uint4 loaded[VECTORS];
#pragma unroll
            for (u32 i = 0; i < VECTORS; ++i)
                loaded[i] = __ldcs(source + i * THREADS); /* read once: it need not stay in the cache */
#pragma unroll
            for (u32 i = 0; i < VECTORS; ++i) {
                count_word<HALF>(loaded[i].x, first, window, counters, seen);
                count_word<HALF>(loaded[i].y, first, window, counters, seen);
                count_word<HALF>(loaded[i].z, first, window, counters, seen);
                count_word<HALF>(loaded[i].w, first, window, counters, seen);
            }
        } else {
            stop = stop < tensor.size ? stop : tensor.size;
            for (u64 i = tile * values_per_tile + threadIdx.x; i < stop; i += THREADS)
                count(pattern_at(tensor, i), first, window, counters, seen);
        }
    }
}

/* The largest finite magnitude among a few values of [begin, stop), at this thread's place in it. */
__device__ __forceinline__ u32 sampled_magnitude(const Tensor &tensor, u64 begin, u64 stop)
{
    u32 largest = 0;
    u64 at = begin + (stop - begin) * threadIdx.x / THREADS;
    for (u64 i = at; i < at + SAMPLES && i < stop; ++i) {
        u32 magnitude = pattern_at(tensor, i) & 0x7FFFFFFFu;
        if (magnitude < INFINITE && magnitude > largest)
            largest = magnitude;
    }
    return largest;
}

/* The first bin of the window whose last one ends the octave of a magnitude. Never bin 0, which holds the zeros. */
__device__ __forceinline__ u32 first_bin(u32 magnitude)
{
    u32 stop = ((magnitude >> 23) + 1) << MANTISSA_BITS;
    return stop > WINDOW ? stop - WINDOW : 1;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_AT_A_TIME)
    count_magnitudes(const Tensor *tensors, u64 number, Totals *totals, u64 *counters)
{
    __shared__ u32 window[WINDOW];
    __shared__ u32 top, zeros, nonfinite, highest, lowest;

    const u64 tiles = tensors[number].first_tile;
    u64 tile = tiles * blockIdx.x / gridDim.x;
    const u64 last = tiles * (blockIdx.x + 1) / gridDim.x;

    for (u32 i = threadIdx.x; i < WINDOW; i += THREADS)
        window[i] = 0;
    if (threadIdx.x == 0)
        top = zeros = nonfinite = highest = lowest = 0;
    __syncthreads();

    while (tile < last) {
        /* The last tensor that does not begin behind this tile; those before it that begin here, too, are empty. */
        u64 index = 0;
        for (u64 behind = number; index + 1 < behind;) {
            u64 middle = (index + behind) / 2;
            if (tensors[middle].first_tile <= tile)
                index = middle;
            else
                behind = middle;
        }
        const Tensor tensor = tensors[index];
        const u64 end = tensors[index + 1].first_tile < last ? tensors[index + 1].first_tile : last;
        u64 *bins = counters + index * BINS;

        const u64 values_per_tile = TILE_BYTES / (tensor.half ? 2 : 4);
        const u64 begin = (tile - tensor.first_tile) * values_per_tile;
        const u64 stop = (end - tensor.first_tile) * values_per_tile;
        atomicMax(&top, sampled_magnitude(tensor, begin, stop < tensor.size ? stop : tensor.size));
        __syncthreads(); /* `top` is complete, and the window is clear */

        const u32 first = first_bin(top);
        Seen seen = {0, 0, -__uint_as_float(INFINITE), __uint_as_float(INFINITE)};
        if (tensor.half)
            count_tiles<true>(tensor, tile - tensor.first_tile, end - tensor.first_tile, first, window, bins, seen);
        else
            count_tiles<false>(tensor, tile - tensor.first_tile, end - tensor.first_tile, first, window, bins, seen);
        if (seen.zeros)
            see(seen, 0);
        if (seen.lowest <= seen.highest) {
            atomicMax(&highest, key_of(seen.highest));
            atomicMax(&lowest, ~key_of(seen.lowest));
        }
        atomicAdd(&zeros, seen.zeros);
        atomicAdd(&nonfinite, seen.nonfinite);
        __syncthreads(); /* the block has counted all */

        for (u32 i = threadIdx.x; i < WINDOW; i += THREADS) {
            if (window[i]) {
                atomicAdd(&bins[first + i], (u64)window[i]);
                window[i] = 0;
            }
        }
        if (threadIdx.x == 0) {
            atomicAdd(&totals[index].zeros, (u64)zeros);
            atomicAdd(&totals[index].nonfinite, (u64)nonfinite);
            atomicMax(&totals[index].highest, highest);
            atomicMax(&totals[index].lowest, lowest);
            top = zeros = nonfinite = highest = lowest = 0;
        }
        __syncthreads(); /* window and sums are clear, before anybody raises `top` again */
        tile = end;
    }
}
