/* Token embedding on the GPU.
 *
 * Backward sums rows of dx that share a token, and texts are uneven: one token may stand at a tenth of all positions,
 * thousands at one each. So positions are sorted by token (stably: equal tokens stay in order of n), and a block adds
 * CHUNK of the sorted positions, whatever tokens these are:
 *
 *     tokens, sorted   | 3 3 3 7 7 9 9 9 | 9 9 9 9 9 9 9 9 | 9 9 12 12 20 20 31 40 |
 *     chunk 0 ends two runs itself and leaves the start of 9's in tail[0]; chunk 1 leaves its part of 9's in head[1],
 *     chunk 2 in head[2]; then the owner of the run, where it starts, adds tail[0] + head[1] + head[2].
 *
 * Each row of dw has one writer and one order of additions. Called by model/transformer.c. Read next: add_chunks.
 */
#include "cuda.cuh"

#include <cub/device/device_radix_sort.cuh>

extern "C" {
#include "embedding.h"
}

enum { THREADS = 256, CHUNK = 32, IN_FLIGHT = 8, MOST_COLUMN_THREADS = 128 };

/* WIDTH numbers at once: a pack, or one where rows are not made of packs. */
template <class T, int WIDTH>
struct Columns {
    T v[WIDTH];
};

template <class T, int WIDTH>
__device__ static Columns<T, WIDTH> load_columns(const T *from) {
    Columns<T, WIDTH> to;
    if constexpr (WIDTH == 1) {
        to.v[0] = *from;
    } else {
        for (int j = 0; j < WIDTH; j += Pack<T>::COUNT) {
            Pack<T> pack = load_pack(from + j);
            for (int k = 0; k < Pack<T>::COUNT; k++) {
                to.v[j + k] = pack.v[k];
            }
        }
    }
    return to;
}

template <int WIDTH>
__device__ static void store_columns(float *to, const Columns<float, WIDTH> &from) {
    if constexpr (WIDTH == 1) {
        *to = from.v[0];
    } else {
        for (int j = 0; j < WIDTH; j += 4) {
            store_pack(to + j, Pack<float>{{from.v[j], from.v[j + 1], from.v[j + 2], from.v[j + 3]}});
        }
    }
}

template <int WIDTH>
__device__ static void add_to(float *to, const Columns<float, WIDTH> &sum) {
    Columns<float, WIDTH> whole = load_columns<float, WIDTH>(to);
    for (int j = 0; j < WIDTH; j++) {
        whole.v[j] += sum.v[j];
    }
    store_columns(to, whole);
}

/* ---- forward ---- */

/* Grid and block: the loop over n and the copy of its row, WIDTH numbers per thread. */
template <int WIDTH>
__global__ void gather(real_t *x, const int *tokens, const real_t *w, size_t count, int C) {
    size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x, per_row = C / WIDTH;
    if (i < count) {
        const real_t *from = w + tokens[i / per_row] * (size_t)C + i % per_row * WIDTH;
        if constexpr (WIDTH == 1) {
            x[i] = *from;
        } else {
            store_pack(x + i * WIDTH, load_pack(from));
        }
    }
}

void embedding_forward(real_t *x, const int *tokens, const real_t *w, int N, int C, Stream *stream) {
    bool packs = packs_fit(x, C) && packs_fit(w, C);
    size_t count = (size_t)N * C / (packs ? Pack<real_t>::COUNT : 1);
    auto kernel = packs ? gather<Pack<real_t>::COUNT> : gather<1>;
    kernel<<<ceil_div((int64_t)count, THREADS), THREADS, 0, cuda_stream(stream)>>>(x, tokens, w, count, C);
    CUDA_LAUNCHED();
}

/* ---- backward ---- */

/* Grid: the loop over n. */
__global__ void count_up(int *position, int N) {
    int n = blockIdx.x * THREADS + threadIdx.x;
    if (n < N) {
        position[n] = n;
    }
}

/* Grid x: chunks of the sorted positions. Grid y and block: columns. tail, head (chunks, C): parts of runs that go on
 * after the chunk in which they start, and of runs that started before theirs. */
template <int WIDTH>
__global__ void __launch_bounds__(MOST_COLUMN_THREADS) add_chunks(float *dw, float *tail, float *head, const real_t *dx,
                                                                  const int *token, const int *position, int N, int C) {
    __shared__ int tokens[CHUNK + 2], rows[CHUNK]; /* tokens: with a neighbour on either side, -1 beyond the ends */
    int first = blockIdx.x * CHUNK, count = min(CHUNK, N - first);
    for (int i = threadIdx.x; i < count + 2; i += blockDim.x) {
        int at = first + i - 1;
        tokens[i] = at < 0 || at >= N ? -1 : token[at];
        if (i < count) {
            rows[i] = position[first + i];
        }
    }
    __syncthreads();
    int c = (blockIdx.y * blockDim.x + threadIdx.x) * WIDTH;
    if (c >= C) {
        return;
    }
    bool started_before = tokens[0] == tokens[1];
    Columns<float, WIDTH> sum = {};
    for (int begin = 0; begin < count; begin += IN_FLIGHT) {
        Columns<real_t, WIDTH> in[IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; i++) {
            if (begin + i < count) {
                in[i] = load_columns<real_t, WIDTH>(dx + (size_t)rows[begin + i] * C + c);
            }
        }
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; i++) {
            int at = begin + i;
            if (at >= count) {
                break;
            }
            for (int j = 0; j < WIDTH; j++) {
                sum.v[j] += to_float(in[i].v[j]);
            }
            bool ends = tokens[at + 1] != tokens[at + 2];
            if (!ends && at + 1 < count) {
                continue;
            }
            if (started_before) {
                store_columns(head + (size_t)blockIdx.x * C + c, sum);
            } else if (!ends) {
                store_columns(tail + (size_t)blockIdx.x * C + c, sum);
            } else {
                add_to(dw + (size_t)tokens[at + 1] * C + c, sum);
            }
            started_before = false;
            sum = {};
        }
    }
}

/* The runs that chunks share, each by the block of the chunk in which it starts. Grid and block as above. */
template <int WIDTH>
__global__ void __launch_bounds__(MOST_COLUMN_THREADS)
    add_long_runs(float *dw, const float *tail, const float *head, const int *token, int N, int C) {
    int first = blockIdx.x * CHUNK, next = first + CHUNK;
    int c = (blockIdx.y * blockDim.x + threadIdx.x) * WIDTH;
    if (c >= C || next >= N || token[next] != token[next - 1] || (first > 0 && token[first - 1] == token[next])) {
        return; /* no run goes on after this chunk, or it started before */
    }
    int low = next, high = N; /* the run's last position is in low .. high - 1 */
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (token[middle] == token[next]) {
            low = middle;
        } else {
            high = middle;
        }
    }
    Columns<float, WIDTH> sum = load_columns<float, WIDTH>(tail + (size_t)blockIdx.x * C + c);
#pragma unroll 4
    for (int chunk = blockIdx.x + 1; chunk <= low / CHUNK; chunk++) {
        Columns<float, WIDTH> part = load_columns<float, WIDTH>(head + (size_t)chunk * C + c);
        for (int j = 0; j < WIDTH; j++) {
            sum.v[j] += part.v[j];
        }
    }
    add_to(dw + (size_t)token[next] * C + c, sum);
}

/* Scratch memory, one allocation cut up: an array starts where this returns, the next one after it. */
static size_t take(size_t *used, size_t bytes) {
    size_t at = *used;
    *used += (bytes + 255) / 256 * 256;
    return at;
}

void embedding_backward(acc_t *dw, const real_t *dx, const int *tokens, int N, int C, int V, Stream *stream) {
    cudaStream_t s = cuda_stream(stream);
    int chunks = ceil_div(N, CHUNK), bits = 1;
    while (bits < 31 && V > 1 << bits) {
        bits++;
    }
    size_t sort_bytes = 0, used = 0;
    int *none = NULL;
    CUDA_CHECK(cub::DeviceRadixSort::SortPairs(NULL, sort_bytes, tokens, none, none, none, N, 0, bits, s));
    size_t sort_at = take(&used, sort_bytes), token_at = take(&used, N * sizeof(int));
    size_t unsorted_at = take(&used, N * sizeof(int)), position_at = take(&used, N * sizeof(int));
    size_t tail_at = take(&used, (size_t)chunks * C * sizeof(float));
    size_t head_at = take(&used, (size_t)chunks * C * sizeof(float));
    char *scratch = (char *)cuda_workspace(used);
    int *token = (int *)(scratch + token_at), *unsorted = (int *)(scratch + unsorted_at);
    int *position = (int *)(scratch + position_at);
    float *tail = (float *)(scratch + tail_at), *head = (float *)(scratch + head_at);

    count_up<<<ceil_div(N, THREADS), THREADS, 0, s>>>(unsorted, N);
    CUDA_LAUNCHED();
    CUDA_CHECK(cub::DeviceRadixSort::SortPairs(scratch + sort_at, sort_bytes, tokens, token, unsorted, position, N, 0,
                                               bits, s));
    bool packs = packs_fit(dx, C) && packs_fit(dw, C);
    int columns = packs ? C / Pack<real_t>::COUNT : C;
    int threads = columns < MOST_COLUMN_THREADS ? (columns + 31) / 32 * 32 : MOST_COLUMN_THREADS;
    dim3 grid(chunks, ceil_div(columns, threads));
    auto add = packs ? add_chunks<Pack<real_t>::COUNT> : add_chunks<1>;
    add<<<grid, threads, 0, s>>>(dw, tail, head, dx, token, position, N, C);
    CUDA_LAUNCHED();
    auto add_long = packs ? add_long_runs<Pack<real_t>::COUNT> : add_long_runs<1>;
    add_long<<<grid, threads, 0, s>>>(dw, tail, head, token, N, C);
    CUDA_LAUNCHED();
}
