/* Choices by table, position, dice or decree on a GPU: a thread per entry, or a warp per token where the entries of a
 * token depend on each other.
 *
 * Products of a token's index are taken in 64 bits. Called by the routers of model/ that learn no choice. The table
 * itself is made on the host: balanced_table.c.
 */
#include "cuda.cuh"

#include <assert.h>

extern "C" {
#include "fixed_choice.h"
#include "random.h"
}

enum { THREADS = 256, WARPS = THREADS / 32, MOST_SHARED = 48 * 1024 /* bytes a block has without asking for more */ };

/* The entry of this thread. */
__device__ static size_t entry_index(void) {
    return (size_t)blockIdx.x * THREADS + threadIdx.x;
}

static int entry_blocks(size_t entries) {
    return ceil_div(entries, THREADS);
}

/* Grid and threads replace both loops, a thread for each entry (n, j). */
__global__ static void __launch_bounds__(THREADS)
    table_kernel(int *expert, const int *tokens, const float *table, int N, int K) {
    const size_t i = entry_index();
    if (i < (size_t)N * K) {
        expert[i] = (int)table[(size_t)tokens[i / K] * K + i % K];
    }
}

void table_choice(int *expert, const int *tokens, const acc_t *table, int N, int K, Stream *stream) {
    table_kernel<<<entry_blocks((size_t)N * K), THREADS, 0, cuda_stream(stream)>>>(expert, tokens, table, N, K);
    CUDA_LAUNCHED();
}

/* Grid and threads replace both loops, a thread for each entry (n, j). With T = N the balanced choice is this one. */
__global__ static void __launch_bounds__(THREADS) position_kernel(int *expert, int start, int N, int T, int E, int K) {
    const size_t i = entry_index();
    if (i < (size_t)N * K) {
        const int64_t position = (int64_t)start + (int)(i / K) % T;
        expert[i] = (int)((position * K + (int)(i % K)) % E);
    }
}

void position_choice(int *expert, int start, int N, int T, int E, int K, Stream *stream) {
    position_kernel<<<entry_blocks((size_t)N * K), THREADS, 0, cuda_stream(stream)>>>(expert, start, N, T, E, K);
    CUDA_LAUNCHED();
}

void balanced_choice(int *expert, int start, int N, int E, int K, Stream *stream) {
    position_choice(expert, start, N, N, E, K, stream);
}

/* -s ln(e+1) + Gumbel noise, the noise -ln(-ln u) with u in (0, 1]: never NaN, and +infinity at u = 1. */
__device__ static double zipf_score(double s, uint64_t key, size_t n, int E, int e) {
    const double u = 1 - random_uniform(key, (uint64_t)n * (uint64_t)E + (uint64_t)e);
    return -s * log(e + 1.0) - log(-log(u));
}

/* Grid and warps replace the loop over tokens, lanes that over experts, whose scores wait in shared memory; taken ones
 * are NaN, which is above nothing. */
__global__ static void __launch_bounds__(THREADS)
    zipf_kernel(int *expert, double s, const uint64_t *key, int start, int N, int E, int K) {
    extern __shared__ double shared[]; /* (warps of the block, E) */
    const int lane = threadIdx.x % 32;
    const size_t n = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (n >= N) {
        return;
    }
    double *score = shared + (size_t)(threadIdx.x / 32) * E;
    for (int e = lane; e < E; e += 32) {
        score[e] = zipf_score(s, *key, start + n, E, e);
    }
    for (int j = 0; j < K; j++) {
        double best = -INFINITY;
        int first = E; /* the lowest where scores are equal */
        for (int e = lane; e < E; e += 32) {
            if (score[e] > best || (score[e] == best && e < first)) {
                best = score[e];
                first = e;
            }
        }
        for (int step = 16; step > 0; step /= 2) {
            const double other = __shfl_xor_sync(0xffffffffu, best, step);
            const int other_first = __shfl_xor_sync(0xffffffffu, first, step);
            if (other > best || (other == best && other_first < first)) {
                best = other;
                first = other_first;
            }
        }
        if (first % 32 == lane) {
            score[first] = NAN;
            expert[n * K + j] = first;
        }
    }
}

void zipf_choice(int *expert, double s, const uint64_t *key, int start, int N, int E, int K, Stream *stream) {
    const int token_bytes = E * (int)sizeof(double), warps = min((int)WARPS, MOST_SHARED / token_bytes);
    assert(warps > 0);
    zipf_kernel<<<ceil_div(N, warps), warps * 32, warps * token_bytes, cuda_stream(stream)>>>(expert, s, key, start, N,
                                                                                              E, K);
    CUDA_LAUNCHED();
}

/* Grid and threads replace both loops, a thread for each entry (n, j). */
__global__ static void __launch_bounds__(THREADS) one_kernel(int *expert, int start, int N, int E, int K) {
    const size_t i = entry_index();
    if (i < (size_t)N * K) {
        const int64_t n = start + (int64_t)(i / K);
        const int j = (int)(i % K);
        expert[i] = j == 0 ? 0 : 1 + (int)((n * (K - 1) + j - 1) % (E - 1));
    }
}

void one_choice(int *expert, int start, int N, int E, int K, Stream *stream) {
    one_kernel<<<entry_blocks((size_t)N * K), THREADS, 0, cuda_stream(stream)>>>(expert, start, N, E, K);
    CUDA_LAUNCHED();
}

/* ---- weights, shares, projections ---- */

/* Grid and threads replace both loops. */
__global__ static void __launch_bounds__(THREADS) fill_kernel(float *out, float value, size_t count) {
    const size_t i = entry_index();
    if (i < count) {
        out[i] = value;
    }
}

void equal_weight(acc_t *weight, int N, int K, Stream *stream) {
    const size_t entries = (size_t)N * K;
    fill_kernel<<<entry_blocks(entries), THREADS, 0, cuda_stream(stream)>>>(weight, 1.0f / K, entries);
    CUDA_LAUNCHED();
}

/* Grid and warps replace the loop over tokens, lanes those over experts and over entries. */
__global__ static void __launch_bounds__(THREADS)
    choice_probs_kernel(float *probs, const int *expert, const float *weight, int N, int E, int K) {
    const int lane = threadIdx.x % 32;
    const size_t n = entry_index() / 32;
    if (n >= N) {
        return;
    }
    for (int e = lane; e < E; e += 32) {
        probs[n * E + e] = 0;
    }
    __syncwarp(); /* the zeros come first */
    for (int j = lane; j < K; j += 32) {
        const int e = expert[n * K + j];
        if (e >= 0) {
            probs[n * E + e] = weight[n * K + j];
        }
    }
}

void choice_probs(acc_t *probs, const int *expert, const acc_t *weight, int N, int E, int K, Stream *stream) {
    choice_probs_kernel<<<ceil_div(N, WARPS), THREADS, 0, cuda_stream(stream)>>>(probs, expert, weight, N, E, K);
    CUDA_LAUNCHED();
}

/* Grid and threads replace the loop over weights. */
__global__ static void __launch_bounds__(THREADS)
    random_weights_kernel(float *w, double std, const uint64_t *key, size_t count) {
    const size_t i = entry_index();
    if (i < count) {
        w[i] = (float)(std * random_normal(*key, i));
    }
}

void random_weights(acc_t *w, double std, const uint64_t *key, size_t count, Stream *stream) {
    random_weights_kernel<<<entry_blocks(count), THREADS, 0, cuda_stream(stream)>>>(w, std, key, count);
    CUDA_LAUNCHED();
}
