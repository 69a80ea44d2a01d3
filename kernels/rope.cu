/* Per-head RMSNorm and rotary embedding on the GPU, one pass over the rows.
 *
 * A head is shared by `lanes` neighbouring threads of a warp, lanes a power of two. A thread holds WIDTH numbers of the
 * lower half, a pack, and the WIDTH numbers of the upper half that they are paired with: it turns its numbers alone,
 * and only the norm's sums cross threads. Heads whose halves are not made of packs take the same kernels with WIDTH 1,
 * a warp per head and up to TURNS numbers per thread.
 *
 * Backward adds the weights' gradients in registers over all heads a thread meets, the queries' first and then the
 * keys'; partials.cuh adds the blocks in order. Called by model/attention_block.c before and after attention. Read
 * next: turn_heads, and turn_heads_back for its backward.
 */
#include "cuda.cuh"

#include "partials.cuh"

extern "C" {
#include "rope.h"
}

enum {
    THREADS = 256,
    BACK_THREADS = 128,
    WARPS = BACK_THREADS / 32,
    BLOCKS_PER_SM = 5, /* of backward: each thread has the registers to load all of its part of a head at once */
    PARTIAL_BLOCKS = 132 * BLOCKS_PER_SM,
    PACK_WIDTH = Pack<real_t>::COUNT,
    PLAIN_TURNS = ROPE_MOST_HEAD / 2 / 32
};

/* Grid: the loop over i. Block: the loop over positions, in strides. */
__global__ void fill_table(float *table, int positions, int HS, double base) {
    int i = blockIdx.x, half = HS / 2;
    double frequency = pow(base, -2.0 * i / HS);
    for (int position = threadIdx.x; position < positions; position += blockDim.x) {
        table[(size_t)position * HS + i] = (float)cos(position * frequency);
        table[(size_t)position * HS + half + i] = (float)sin(position * frequency);
    }
}

void rope_table(acc_t *table, int positions, int HS, double base, Stream *stream) {
    if (HS >= 2 && positions > 0) {
        fill_table<<<HS / 2, THREADS, 0, cuda_stream(stream)>>>(table, positions, HS, base);
        CUDA_LAUNCHED();
    }
}

/* ---- a thread's part of one head ---- */

/* Numbers of both halves: low[k] is paired with high[k]. */
template <int WIDTH, int TURNS, class T = float>
struct Part {
    alignas(16) T low[WIDTH * TURNS], high[WIDTH * TURNS];
};

template <int WIDTH, class T>
__device__ static void copy_numbers(T *to, const T *from) {
    if constexpr (WIDTH == 1) {
        *to = *from;
    } else {
        for (int j = 0; j < WIDTH; j += Pack<T>::COUNT) {
            store_pack(to + j, load_pack(from + j));
        }
    }
}

/* As it is stored; zeros where the head has no such numbers, or where it is not `live`. */
template <int WIDTH, int TURNS, class T>
__device__ static Part<WIDTH, TURNS, T> load_part(const T *head, int lane, int lanes, int half, bool live) {
    Part<WIDTH, TURNS, T> part = {};
#pragma unroll
    for (int t = 0; t < TURNS; t++) {
        int i = (t * lanes + lane) * WIDTH;
        if (live && i < half) {
            copy_numbers<WIDTH>(part.low + t * WIDTH, head + i);
            copy_numbers<WIDTH>(part.high + t * WIDTH, head + half + i);
        }
    }
    return part;
}

template <int WIDTH, int TURNS, class T>
__device__ static Part<WIDTH, TURNS> to_float(const Part<WIDTH, TURNS, T> &stored) {
    Part<WIDTH, TURNS> part;
    for (int k = 0; k < WIDTH * TURNS; k++) {
        part.low[k] = to_float(stored.low[k]);
        part.high[k] = to_float(stored.high[k]);
    }
    return part;
}

template <int WIDTH>
__device__ static void store_numbers(real_t *to, const float *from) {
    if constexpr (WIDTH == 1) {
        *to = to_real<real_t>(*from);
    } else {
        Pack<real_t> pack;
        for (int j = 0; j < WIDTH; j++) {
            pack.v[j] = to_real<real_t>(from[j]);
        }
        store_pack(to, pack);
    }
}

template <int WIDTH, int TURNS>
__device__ static void store_part(real_t *head, const Part<WIDTH, TURNS> &part, int lane, int lanes, int half) {
#pragma unroll
    for (int t = 0; t < TURNS; t++) {
        int i = (t * lanes + lane) * WIDTH;
        if (i < half) {
            store_numbers<WIDTH>(head + i, part.low + t * WIDTH);
            store_numbers<WIDTH>(head + half + i, part.high + t * WIDTH);
        }
    }
}

/* Over the threads of one head. All threads of the warp call it. */
__device__ static float head_sum(float x, int lanes) {
    for (int lane = lanes / 2; lane > 0; lane /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, lane);
    }
    return x;
}

/* What the host tells the kernels about a head. */
typedef struct {
    int N, T, start, NH, NKV, HS;
    int lane_bits; /* lanes = 1 << lane_bits */
    float eps;
} Heads;

/* ---- forward ---- */

/* Grid and block: the loops over n and over the heads of queries and keys, `lanes` threads each. */
template <int WIDTH, int TURNS>
__global__ void __launch_bounds__(THREADS)
    turn_heads(real_t *qk, float *rstd, const real_t *qkv, const real_t *q_weight, const real_t *k_weight,
               const float *table, Heads h) {
    unsigned job = (blockIdx.x * THREADS + threadIdx.x) >> h.lane_bits, rotated = h.NH + h.NKV;
    int lanes = 1 << h.lane_bits, lane = threadIdx.x & (lanes - 1), half = h.HS / 2;
    int n = job / rotated, head = job % rotated;
    bool live = n < h.N;
    const real_t *from = qkv + ((size_t)n * (rotated + h.NKV) + head) * h.HS;
    Part<WIDTH, TURNS> q = to_float(load_part<WIDTH, TURNS>(from, lane, lanes, half, live));
    const real_t *w = head < h.NH ? q_weight : k_weight;
    if (q_weight) {
        float squares = 0;
        for (int k = 0; k < WIDTH * TURNS; k++) {
            squares += q.low[k] * q.low[k] + q.high[k] * q.high[k];
        }
        float r = 1 / sqrtf(head_sum(squares, lanes) / h.HS + h.eps);
        if (live) {
            Part<WIDTH, TURNS> weight = to_float(load_part<WIDTH, TURNS>(w, lane, lanes, half, true));
            for (int k = 0; k < WIDTH * TURNS; k++) {
                q.low[k] *= r * weight.low[k];
                q.high[k] *= r * weight.high[k];
            }
            if (lane == 0) {
                rstd[job] = r;
            }
        }
    }
    if (live) {
        const float *row = table + (size_t)(h.start + n % h.T) * h.HS;
        Part<WIDTH, TURNS> turn = load_part<WIDTH, TURNS>(row, lane, lanes, half, true); /* cosines, sines */
        for (int k = 0; k < WIDTH * TURNS; k++) {
            float a = q.low[k], b = q.high[k];
            q.low[k] = a * turn.low[k] - b * turn.high[k];
            q.high[k] = b * turn.low[k] + a * turn.high[k];
        }
        store_part<WIDTH, TURNS>(qk + (size_t)job * h.HS, q, lane, lanes, half);
    }
}

/* The kernels' view of a shape; lanes for packs, or 32 for the plain path. */
static Heads describe(RopeShape s, bool packs) {
    CHECK(s.HS <= ROPE_MOST_HEAD, "a head size of %d is above %d: raise --heads or lower --dim", s.HS, ROPE_MOST_HEAD);
    Heads h = {s.N, s.T, s.start, s.NH, s.NKV, s.HS, packs ? 0 : 5, (float)s.eps};
    while (packs && (PACK_WIDTH << h.lane_bits) < s.HS / 2) {
        h.lane_bits++;
    }
    return h;
}

static bool halves_are_packs(const real_t *a, const real_t *b, const real_t *q_weight, const real_t *k_weight,
                             const float *table, int HS) {
    bool weights = !q_weight || (packs_fit(q_weight, HS / 2) && packs_fit(k_weight, HS / 2));
    return HS % 2 == 0 && HS / 2 <= 32 * PACK_WIDTH && packs_fit(a, HS / 2) && packs_fit(b, HS / 2) && weights &&
           packs_fit(table, HS / 2);
}

void rope_forward(real_t *qk, acc_t *rstd, const real_t *qkv, const real_t *q_weight, const real_t *k_weight,
                  const acc_t *table, RopeShape shape, Stream *stream) {
    bool packs = halves_are_packs(qk, qkv, q_weight, k_weight, table, shape.HS);
    Heads h = describe(shape, packs);
    int blocks = ceil_div(((int64_t)h.N * (h.NH + h.NKV)) << h.lane_bits, THREADS);
    auto kernel = packs ? turn_heads<PACK_WIDTH, 1> : turn_heads<1, PLAIN_TURNS>;
    kernel<<<blocks, THREADS, 0, cuda_stream(stream)>>>(qk, rstd, qkv, q_weight, k_weight, table, h);
    CUDA_LAUNCHED();
}

/* ---- backward ---- */

/* partial (HS) = the sum of dw over the heads of a block: first over those of a warp, then over the warps. */
template <int WIDTH, int TURNS>
__device__ static void write_partial(float *partial, Part<WIDTH, TURNS> dw, int lane, int lanes, int HS) {
    __shared__ float sums[WARPS][ROPE_MOST_HEAD];
    float *row = sums[threadIdx.x / 32];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < WIDTH * TURNS; k++) {
        int i = (k / WIDTH * lanes + lane) * WIDTH + k % WIDTH;
        for (int other = lanes; other < 32; other *= 2) {
            dw.low[k] += __shfl_xor_sync(0xffffffffu, dw.low[k], other);
            dw.high[k] += __shfl_xor_sync(0xffffffffu, dw.high[k], other);
        }
        if ((int)threadIdx.x % 32 < lanes && i < HS / 2) {
            row[i] = dw.low[k];
            row[HS / 2 + i] = dw.high[k];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < HS; i += BACK_THREADS) {
        float sum = 0;
        for (int warp = 0; warp < WARPS; warp++) {
            sum += sums[warp][i];
        }
        partial[i] = sum;
    }
}

/* The gradient of one head, turned back by the angle, then taken through the norm as in norm.cu (norm false: there is
 * none). dw += du q r. All loads come first, as stored, so that they are one wait and not three. All threads of a warp
 * call it, each with a head of its own or, not live, with none. */
template <int WIDTH, int TURNS>
__device__ static Part<WIDTH, TURNS> head_back(Part<WIDTH, TURNS> *dw, const real_t *dout, const float *rstd,
                                               const real_t *q, const Part<WIDTH, TURNS, real_t> &w, bool norm,
                                               const float *angles, int lane, int lanes, int half, bool live) {
    Part<WIDTH, TURNS, real_t> gradient = load_part<WIDTH, TURNS>(dout, lane, lanes, half, live);
    Part<WIDTH, TURNS, real_t> input = load_part<WIDTH, TURNS>(q, lane, lanes, half, live && norm);
    Part<WIDTH, TURNS> turn = load_part<WIDTH, TURNS>(angles, lane, lanes, half, live);
    float r = live && norm ? *rstd : 0, along = 0;
    Part<WIDTH, TURNS> du;
    for (int k = 0; k < WIDTH * TURNS; k++) {
        float a = to_float(gradient.low[k]), b = to_float(gradient.high[k]);
        du.low[k] = a * turn.low[k] + b * turn.high[k];
        du.high[k] = b * turn.low[k] - a * turn.high[k];
    }
    if (norm) {
        Part<WIDTH, TURNS> in = to_float(input), weight = to_float(w);
        for (int k = 0; k < WIDTH * TURNS; k++) {
            dw->low[k] += du.low[k] * (in.low[k] * r);
            dw->high[k] += du.high[k] * (in.high[k] * r);
            du.low[k] *= weight.low[k];
            du.high[k] *= weight.high[k];
            along += du.low[k] * in.low[k] + du.high[k] * in.high[k];
        }
        along = r * r * r * head_sum(along, lanes) * (1 / (2.0f * half)); /* how much of the gradient lies along q */
        for (int k = 0; k < WIDTH * TURNS; k++) {
            du.low[k] = r * du.low[k] - along * in.low[k];
            du.high[k] = r * du.high[k] - along * in.high[k];
        }
    }
    return du;
}

/* Grid and block: the loops over n and over head; a group of `lanes` threads keeps its head and takes every step-th
 * token, first for the queries' heads, then for the keys'. */
template <int WIDTH, int TURNS>
__global__ void __launch_bounds__(BACK_THREADS, TURNS == 1 ? BLOCKS_PER_SM : 1)
    turn_heads_back(real_t *dqkv, float *partial, const float *rstd, const real_t *qkv, const real_t *q_weight,
                    const real_t *k_weight, const float *table, Heads h) {
    int lanes = 1 << h.lane_bits, lane = threadIdx.x & (lanes - 1), half = h.HS / 2, rotated = h.NH + h.NKV;
    unsigned group = (blockIdx.x * BACK_THREADS + threadIdx.x) >> h.lane_bits;
    unsigned groups = gridDim.x * BACK_THREADS >> h.lane_bits;
    size_t width = (size_t)(rotated + h.NKV) * h.HS;
    bool norm = q_weight != NULL;
    for (int keys = 0; keys < 2; keys++) {
        int heads = keys ? h.NKV : h.NH, head = (keys ? h.NH : 0) + group % heads, step = groups / heads;
        int token = group / heads, position = token % h.T, advance = step % h.T;
        size_t at = token * width + (size_t)head * h.HS;
        Part<WIDTH, TURNS> dw = {};
        Part<WIDTH, TURNS, real_t> w = load_part<WIDTH, TURNS>(keys ? k_weight : q_weight, lane, lanes, half, norm);
        for (int start = 0; start < h.N; start += step) { /* the same turns for all threads of a warp */
            int n = start + token;
            bool live = n < h.N && token < step;
            Part<WIDTH, TURNS> dq =
                head_back<WIDTH, TURNS>(&dw, dqkv + at, rstd + (size_t)n * rotated + head, qkv + at, w, norm,
                                        table + (size_t)(h.start + position) * h.HS, lane, lanes, half, live);
            if (live) {
                store_part<WIDTH, TURNS>(dqkv + at, dq, lane, lanes, half);
            }
            at += step * width;
            position += advance < h.T - position ? advance : advance - h.T;
        }
        if (norm) {
            write_partial<WIDTH, TURNS>(partial + (size_t)(keys * gridDim.x + blockIdx.x) * h.HS, dw, lane, lanes,
                                        h.HS);
        }
    }
}

void rope_backward(real_t *dqkv, acc_t *dq_weight, acc_t *dk_weight, const acc_t *rstd, const real_t *qkv,
                   const real_t *q_weight, const real_t *k_weight, const acc_t *table, RopeShape shape,
                   Stream *stream) {
    bool packs = halves_are_packs(dqkv, qkv, q_weight, k_weight, table, shape.HS);
    Heads h = describe(shape, packs);
    int64_t heads = h.NH > h.NKV ? h.NH : h.NKV;
    int least = ceil_div(heads << h.lane_bits, BACK_THREADS); /* for a token's heads at a time */
    int needed = ceil_div((h.N * heads) << h.lane_bits, BACK_THREADS);
    int most = least > PARTIAL_BLOCKS ? least : PARTIAL_BLOCKS, blocks = needed < most ? needed : most;
    float *partial = q_weight ? (float *)cuda_workspace((size_t)2 * blocks * h.HS * sizeof(float)) : NULL;
    auto kernel = packs ? turn_heads_back<PACK_WIDTH, 1> : turn_heads_back<1, PLAIN_TURNS>;
    kernel<<<blocks, BACK_THREADS, 0, cuda_stream(stream)>>>(dqkv, partial, rstd, qkv, q_weight, k_weight, table, h);
    CUDA_LAUNCHED();
    if (q_weight) {
        partials_add(dq_weight, dk_weight, partial, blocks, h.HS, stream);
    }
}
