/* Experts that pick tokens on a GPU.
 *
 * The choice takes three launches: probs are turned into columns of ranks; one block per expert finds, digit by digit
 * (radix select), the key of the last token that it takes; and every entry compares its own key with that. A key is the
 * rank of p above the token's index counted from the end, so that no two are equal, ties go to the earlier token, and a
 * choice is one comparison:
 *
 *     histogram of the highest digit -> the digit of the C-th largest -> histogram of the next digit among those that
 *     share it -> ... until all who share the digits so far are taken
 *
 * That is two or three sweeps over a column unless many p are equal. Counts are whole numbers, added in any order.
 * Called by the routers of model/ where experts pick.
 */
#include "cuda.cuh"

extern "C" {
#include "expert_choice.h"
}

enum {
    SIDE = 32, /* of the square of tokens and experts that a block transposes */
    TRANSPOSE_THREADS = 256,
    SELECT_THREADS = 1024,
    MARK_THREADS = 256,
    DIGIT_BITS = 8,
    DIGITS = 1 << DIGIT_BITS,
};

/* Orders as p does, NaN below 0: the bit patterns of numbers that are not negative order as their values do. */
__device__ static unsigned rank_of(float p) {
    return p > 0 ? __float_as_uint(p) + 1 : p == 0; /* -0 is 0 */
}

__device__ static float value_of(unsigned rank) {
    return rank > 0 ? __uint_as_float(rank - 1) : NAN;
}

__device__ static uint64_t key_of(unsigned rank, int n) {
    return (uint64_t)rank << 32 | ~(unsigned)n;
}

/* rank (E,N) of probs (N,E). Grid x replaces the loop over tokens and grid y that over experts, SIDE of each; threads
 * are the elements of a tile, a row of it for each warp. */
__global__ static void __launch_bounds__(TRANSPOSE_THREADS)
    rank_kernel(unsigned *rank, const float *probs, int N, int E) {
    __shared__ unsigned tile[SIDE][SIDE + 1];
    const int lane = threadIdx.x % SIDE, warp = threadIdx.x / SIDE, first_n = blockIdx.x * SIDE,
              first_e = blockIdx.y * SIDE;
    for (int i = warp; i < SIDE; i += TRANSPOSE_THREADS / SIDE) {
        if (first_n + i < N && first_e + lane < E) {
            tile[i][lane] = rank_of(probs[(size_t)(first_n + i) * E + first_e + lane]);
        }
    }
    __syncthreads();
    for (int i = warp; i < SIDE; i += TRANSPOSE_THREADS / SIDE) {
        if (first_n + lane < N && first_e + i < E) {
            rank[(size_t)(first_e + i) * N + first_n + lane] = tile[lane][i];
        }
    }
}

typedef struct {
    int digit;
    int wanted; /* how many of those with this digit are among the C */
    int count;  /* how many have it */
} Digit;

/* The digit at which the counts, added from the highest down, reach `wanted`. By one warp; a lane has 8 digits. */
__device__ static Digit find_digit(const int *histogram, int wanted) {
    const int lane = threadIdx.x % 32, each = DIGITS / 32, top = DIGITS - 1 - lane * each;
    int own = 0;
    for (int i = 0; i < each; i++) {
        own += histogram[top - i];
    }
    const int sum = warp_running_sum(own, lane); /* of this lane's digits and all above */
    const int owner = __ffs(__ballot_sync(0xffffffffu, sum >= wanted)) - 1;
    Digit found = {top, wanted - (sum - own), 0};
    if (lane == owner) {
        while (histogram[found.digit] < found.wanted) {
            found.wanted -= histogram[found.digit];
            found.digit--;
        }
        found.count = histogram[found.digit];
    }
    found.digit = __shfl_sync(0xffffffffu, found.digit, owner);
    found.wanted = __shfl_sync(0xffffffffu, found.wanted, owner);
    found.count = __shfl_sync(0xffffffffu, found.count, owner);
    return found;
}

/* A key that C keys of a column reach, and no other: the C-th largest, with the low digits 0 that decide nothing. By a
 * block. */
__device__ static uint64_t select_key(const unsigned *rank, int N, int C) {
    __shared__ int histogram[DIGITS];
    __shared__ Digit found;
    uint64_t prefix = 0;
    int wanted = C;
    for (int shift = 64 - DIGIT_BITS; shift >= 0; shift -= DIGIT_BITS) {
        __syncthreads();
        for (int i = threadIdx.x; i < DIGITS; i += SELECT_THREADS) {
            histogram[i] = 0;
        }
        __syncthreads();
        for (int n = threadIdx.x; n < N; n += SELECT_THREADS) {
            const uint64_t key = key_of(rank[n], n);
            if (key >> shift >> DIGIT_BITS == prefix) { /* two shifts: one of all bits is undefined */
                atomicAdd(&histogram[(key >> shift) % DIGITS], 1);
            }
        }
        __syncthreads();
        if (threadIdx.x < 32) {
            const Digit digit = find_digit(histogram, wanted);
            if (threadIdx.x == 0) {
                found = digit;
            }
        }
        __syncthreads();
        prefix = prefix << DIGIT_BITS | (uint64_t)found.digit;
        wanted = found.wanted;
        if (found.count == wanted) {
            return prefix << shift;
        }
    }
    return prefix;
}

/* The largest x of a block. */
__device__ static unsigned block_largest(unsigned x) {
    __shared__ unsigned part[SELECT_THREADS / 32];
    x = __reduce_max_sync(0xffffffffu, x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        part[threadIdx.x / 32] = x;
    }
    __syncthreads();
    return __reduce_max_sync(0xffffffffu, part[threadIdx.x % 32]);
}

/* Half way between the last value taken and the first one left; where rounding would give the upper, the lower, so that
 * p > cut separates the two. */
__device__ static float half_way(float above, float below) {
    const float middle = below + (above - below) / 2;
    return middle == above ? below : middle;
}

/* The grid replaces the loop over experts, threads that over tokens. key (E): what an entry's key must reach. */
__global__ static void __launch_bounds__(SELECT_THREADS)
    select_kernel(uint64_t *key, float *cut, const unsigned *rank, int N, int C) {
    const unsigned *column = rank + (size_t)blockIdx.x * N;
    const uint64_t last = select_key(column, N, C);
    if (threadIdx.x == 0) {
        key[blockIdx.x] = last;
    }
    if (!cut) {
        return;
    }
    unsigned below = 0, above = 0; /* the largest rank that is left; that of the smallest taken, from the end */
    for (int n = threadIdx.x; n < N; n += SELECT_THREADS) {
        if (key_of(column[n], n) >= last) {
            above = max(above, ~column[n]);
        } else {
            below = max(below, column[n]);
        }
    }
    below = block_largest(below);
    above = ~block_largest(above);
    if (threadIdx.x == 0) {
        cut[blockIdx.x] = half_way(value_of(above), C < N ? value_of(below) : 0);
    }
}

/* When an entry is there: its key reaches key[e], or, without keys, p > tau_e, from step number `first` on. */
typedef struct {
    const uint64_t *key; /* (E) */
    const float *tau;    /* (E) */
    const int64_t *step;
    int64_t first;
} Mark;

/* Grid and threads replace the loops over tokens and experts, a thread has COUNT entries side by side, which never
 * leave a row. */
template <int COUNT>
__global__ static void __launch_bounds__(MARK_THREADS)
    mark_kernel(int *expert, const float *probs, Mark mark, int N, int E) {
    const size_t i = ((size_t)blockIdx.x * MARK_THREADS + threadIdx.x) * COUNT;
    if (i >= (size_t)N * E || (!mark.key && *mark.step < mark.first)) {
        return;
    }
    const int n = (int)(i / E), column = (int)(i % E);
    alignas(16) float p[COUNT];
    alignas(16) int taken[COUNT];
    if (COUNT == 4) {
        *reinterpret_cast<float4 *>(p) = *reinterpret_cast<const float4 *>(probs + i);
    } else {
        p[0] = probs[i];
    }
#pragma unroll
    for (int j = 0; j < COUNT; j++) {
        const int e = column + j;
        taken[j] = (mark.key ? key_of(rank_of(p[j]), n) >= mark.key[e] : p[j] > mark.tau[e]) ? e : -1;
    }
    if (COUNT == 4) {
        *reinterpret_cast<int4 *>(expert + i) = *reinterpret_cast<const int4 *>(taken);
    } else {
        expert[i] = taken[0];
    }
}

static void mark_entries(int *expert, const float *probs, Mark mark, int N, int E, cudaStream_t stream) {
    const size_t count = (size_t)N * E;
    if (packs_fit(probs, E) && packs_fit(expert, E)) {
        mark_kernel<4><<<ceil_div(count, 4 * MARK_THREADS), MARK_THREADS, 0, stream>>>(expert, probs, mark, N, E);
    } else {
        mark_kernel<1><<<ceil_div(count, MARK_THREADS), MARK_THREADS, 0, stream>>>(expert, probs, mark, N, E);
    }
    CUDA_LAUNCHED();
}

void expert_choice_forward(int *expert, acc_t *cut, const acc_t *probs, int N, int E, int C, Stream *stream) {
    uint64_t *key = (uint64_t *)cuda_workspace(E * sizeof *key + (size_t)N * E * sizeof(unsigned));
    unsigned *rank = (unsigned *)(key + E);
    rank_kernel<<<dim3(ceil_div(N, SIDE), ceil_div(E, SIDE)), TRANSPOSE_THREADS, 0, cuda_stream(stream)>>>(rank, probs,
                                                                                                           N, E);
    CUDA_LAUNCHED();
    select_kernel<<<E, SELECT_THREADS, 0, cuda_stream(stream)>>>(key, cut, rank, N, C);
    CUDA_LAUNCHED();
    mark_entries(expert, probs, Mark{key, NULL, NULL, 0}, N, E, cuda_stream(stream));
}

void threshold_forward(int *expert, const acc_t *tau, const acc_t *probs, const int64_t *step, int64_t first, int N,
                       int E, Stream *stream) {
    mark_entries(expert, probs, Mark{NULL, tau, step, first}, N, E, cuda_stream(stream));
}

/* Grid and threads replace the loop over experts. */
__global__ static void __launch_bounds__(MARK_THREADS)
    threshold_kernel(float *tau, const float *cut, int slices, int E, double rate, const AdamState *adam) {
    const int e = blockIdx.x * MARK_THREADS + threadIdx.x;
    if (adam->scale == 0 || e >= E) {
        return;
    }
    const double share = fmax(rate, 1.0 / (double)adam->updates);
    double sum = 0;
    for (int slice = 0; slice < slices; slice++) {
        sum += cut[(size_t)slice * E + e];
    }
    tau[e] = (float)(tau[e] + share * (sum / slices - tau[e]));
}

void threshold_update(acc_t *tau, const acc_t *cut, int slices, int E, double rate, const AdamState *adam,
                      Stream *stream) {
    threshold_kernel<<<ceil_div(E, MARK_THREADS), MARK_THREADS, 0, cuda_stream(stream)>>>(tau, cut, slices, E, rate,
                                                                                          adam);
    CUDA_LAUNCHED();
}
