/* Softmax and cross-entropy on the GPU: a row of logits belongs to a block, a short one to a warp.
 *
 * A thread walks over its packs of the row with a running maximum and a running sum of exponentials, corrected when the
 * maximum grows; the row joins those of its threads. The gradient needs the row again: what fits is kept in shared
 * memory, for two rows per multiprocessor (so there is one read and one write of memory), and the rest is read again
 * from the second-level cache. A thread reads back only what it wrote itself, so the row needs no barrier.
 *
 * A row may start at any address: the few logits before the first and after the last whole pack are `edge`s, one per
 * thread at most. Called by model/transformer.c. Read next: softmax_rows.
 */
#include "cuda.cuh"

extern "C" {
#include "cross_entropy.h"
}

enum { WIDTH = Pack<real_t>::COUNT, MOST_THREADS = 512, WARP_ROWS = 8, IN_FLIGHT = 4 };

/* exp(x) as a power of two; the argument is a difference, so that its error is small where its result is large. */
__device__ static float exp_below(float x) {
    return exp2_fast(x * 1.44269504088896341f);
}

/* max of some logits, and the sum of exp(l - max) over them. A NaN goes into the sum. */
typedef struct {
    float max, sum;
} Running;

template <int COUNT>
__device__ static void running_add(Running *r, const float *l) {
    float max = r->max;
    for (int j = 0; j < COUNT; j++) {
        max = fmaxf(max, l[j]);
    }
    if (max > r->max) {
        r->sum *= exp_below(r->max - max);
        r->max = max;
    }
    for (int j = 0; j < COUNT; j++) {
        r->sum += exp_below(l[j] - max);
    }
}

/* Where a thread's part of a row is. */
typedef struct {
    int head, packs; /* logits before the first pack, packs */
    int edge;        /* the thread's logit outside the packs, -1: none */
} RowPart;

__device__ static RowPart row_part(const real_t *l, int V) {
    RowPart part;
    part.head = min(V, (int)((16 - (reinterpret_cast<uintptr_t>(l) & 15)) % 16 / sizeof(real_t)));
    part.packs = (V - part.head) / WIDTH;
    int t = threadIdx.x, edge = t < part.head ? t : t + part.packs * WIDTH;
    part.edge = edge < V && t < 2 * WIDTH ? edge : -1;
    return part;
}

/* Whether logit v is in the thread's part. */
__device__ static bool part_has(RowPart part, int v) {
    int pack = (v - part.head) / WIDTH;
    bool in_packs = v >= part.head && pack < part.packs;
    return in_packs ? pack % blockDim.x == threadIdx.x : v == part.edge;
}

/* A row of zeros. */
__device__ static void clear_row(real_t *l, RowPart part) {
    for (int i = threadIdx.x; i < part.packs; i += blockDim.x) {
        store_pack(l + part.head + (size_t)i * WIDTH, Pack<real_t>{});
    }
    if (part.edge >= 0) {
        l[part.edge] = to_real<real_t>(0);
    }
}

/* The thread's share of the row; its first packs, those below `keep`, are left in `kept` too. */
__device__ static Running read_row(Pack<real_t> *kept, int keep, const real_t *l, RowPart part) {
    Running r = {-1e30f, 0};
    const real_t *packs = l + part.head;
    for (int begin = threadIdx.x; begin < part.packs; begin += IN_FLIGHT * blockDim.x) {
        Pack<real_t> in[IN_FLIGHT];
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; k++) {
            int i = begin + k * blockDim.x;
            in[k] = load_pack_if(i < part.packs, packs + (size_t)i * WIDTH);
        }
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; k++) {
            int i = begin + k * blockDim.x;
            if (i < keep) {
                kept[i] = in[k];
            }
            if (i < part.packs) {
                float logits[WIDTH];
                for (int j = 0; j < WIDTH; j++) {
                    logits[j] = float_at(in[k], j);
                }
                running_add<WIDTH>(&r, logits);
            }
        }
    }
    if (part.edge >= 0) {
        float logit = to_float(l[part.edge]);
        running_add<1>(&r, &logit);
    }
    return r;
}

/* Grid, and block y: the loop over n. Block x: the loops over v. keep: packs of a row that shared memory holds. */
template <bool GRADIENT>
__global__ void __launch_bounds__(MOST_THREADS, 2)
    softmax_rows(float *losses, real_t *logits, const int *targets, int N, int V, float scale, int keep) {
    extern __shared__ int4 kept_bytes[];
    int n = blockIdx.x * blockDim.y + threadIdx.y;
    if (n >= N) {
        return; /* a whole warp, and only where rows are warps' */
    }
    Pack<real_t> *kept = reinterpret_cast<Pack<real_t> *>(kept_bytes) + threadIdx.y * keep;
    real_t *l = logits + (size_t)n * V;
    int target = targets[n];
    RowPart part = row_part(l, V);
    if (target < 0) { /* not predicted: not read */
        if (GRADIENT) {
            clear_row(l, part);
        }
        if (threadIdx.x == 0) {
            losses[n] = 0;
        }
        return;
    }
    float target_logit = to_float(l[target]); /* before the row becomes its gradient: the sums lie between */
    Running r = read_row(kept, keep, l, part);
    bool warp = blockDim.x == 32;
    float max = warp ? warp_max(r.max) : block_max(r.max);
    r.sum *= exp_below(r.max - max);
    float sum = warp ? warp_sum(r.sum) : block_sum(r.sum);
    if (threadIdx.x == 0) {
        losses[n] = logf(sum) + (max - target_logit);
    }
    if (!GRADIENT) {
        return;
    }
    float factor = scale / sum;
    for (int i = threadIdx.x; i < part.packs; i += blockDim.x) {
        real_t *to = l + part.head + (size_t)i * WIDTH;
        Pack<real_t> in = i < keep ? kept[i] : load_pack(to), out;
        for (int j = 0; j < WIDTH; j++) {
            out.v[j] = to_real<real_t>(factor * exp_below(float_at(in, j) - max));
        }
        store_pack(to, out);
    }
    if (part.edge >= 0) {
        l[part.edge] = to_real<real_t>(factor * exp_below(to_float(l[part.edge]) - max));
    }
    if (part_has(part, target)) { /* written once more, by the same thread */
        l[target] = to_real<real_t>(factor * exp_below(target_logit - max) - scale);
    }
}

/* About four packs per thread; rows that a warp can do that way are taken by warps, several to a block. */
static dim3 block_for(int V) {
    int threads = (V / (WIDTH * 4) + 31) / 32 * 32;
    return threads <= 32 ? dim3(32, WARP_ROWS) : dim3(threads < MOST_THREADS ? threads : MOST_THREADS);
}

void cross_entropy_forward(acc_t *losses, const real_t *logits, const int *targets, int N, int V, Stream *stream) {
    dim3 block = block_for(V);
    softmax_rows<false>
        <<<ceil_div(N, block.y), block, 0, cuda_stream(stream)>>>(losses, (real_t *)logits, targets, N, V, 0, 0);
    CUDA_LAUNCHED();
}

void cross_entropy_forward_backward(acc_t *losses, real_t *logits, const int *targets, int N, int V, double scale,
                                    Stream *stream) {
    dim3 block = block_for(V);
    int most = (int)(cuda_shared_memory() / 2) - (2 << 10), row = V / WIDTH * (int)sizeof(Pack<real_t>);
    int bytes = row * (int)block.y < most ? row * (int)block.y : most;
    CUDA_CHECK(cudaFuncSetAttribute(softmax_rows<true>, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
    softmax_rows<true><<<ceil_div(N, block.y), block, bytes, cuda_stream(stream)>>>(
        losses, logits, targets, N, V, (float)scale, bytes / (int)sizeof(Pack<real_t>) / (int)block.y);
    CUDA_LAUNCHED();
}

/* One block. Block: the loop over n, in strides. */
__global__ void __launch_bounds__(1024) mean_of(float *mean, const float *values, int N, int count) {
    double sum = 0;
#pragma unroll 16
    for (int n = threadIdx.x; n < N; n += 1024) {
        sum += values[n];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        *mean = (float)(sum / count);
    }
}

void mean_forward(acc_t *mean, const acc_t *values, int N, int count, Stream *stream) {
    mean_of<<<1, 1024, 0, cuda_stream(stream)>>>(mean, values, N, count);
    CUDA_LAUNCHED();
}
