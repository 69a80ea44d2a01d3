/* Per-head RMSNorm and rotary embedding on the GPU, one pass over the rows.
 *
 * A head is shared by `lanes` neighbouring threads of a warp, lanes a power of two. A thread holds WIDTH numbers of the
 * lower half, a pack, and the WIDTH numbers of the upper half that they are paired with: it turns its numbers alone,
 * and only the norm's sums cross threads. Heads whose halves are not made of packs take the same kernels with WIDTH 1,
 * a warp per head and up to TURNS numbers per thread.
 *
 * Backward adds the weights' gradients in registers over all heads a thread meets, the queries' first and then the
 * keys'; partials.cuh adds the blocks in order. Called by model/transformer.c before and after attention. Read next:
 * turn_heads, and turn_heads_back for its backward.
 */
#include "cuda.cuh"

#include "partials.cuh"

extern "C" {
#include "rope.h"
}

enum {
    THREADS = 256,
    WARPS = THREADS / 32,
    BLOCKS_PER_SM = 3,
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
template <int WIDTH, int TURNS>
struct Part {
    alignas(16) float low[WIDTH * TURNS], high[WIDTH * TURNS];
};

template <int WIDTH, class T>
__device__ static void load_numbers(float *to, const T *from) {
    if constexpr (WIDTH == 1) {
        *to = to_float(*from);
    } else {
        for (int j = 0; j < WIDTH; j += Pack<T>::COUNT) {
            Pack<T> pack = load_pack(from + j);
            for (int k = 0; k < Pack<T>::COUNT; k++) {
                to[j + k] = to_float(pack.v[k]);
            }
        }
    }
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

/* Zeros where the head has no such numbers, or where it is not `live`. */
template <int WIDTH, int TURNS, class T>
__device__ static Part<WIDTH, TURNS> load_part(const T *head, int lane, int lanes, int half, bool live) {
    Part<WIDTH, TURNS> part = {};
#pragma unroll
    for (int t = 0; t < TURNS; t++) {
        int i = (t * lanes + lane) * WIDTH;
        if (live && i < half) {
            load_numbers<WIDTH>(part.low + t * WIDTH, head + i);
            load_numbers<WIDTH>(part.high + t * WIDTH, head + half + i);
        }
    }
    return part;
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

/* Grid and block: the loops over n and over head, values included, `lanes` threads each. */
template <int WIDTH, int TURNS>
__global__ void __launch_bounds__(THREADS)
    turn_heads(real_t *out, float *rstd, const real_t *qkv, const real_t *q_weight, const real_t *k_weight,
               const float *table, Heads h) {
    unsigned job = (blockIdx.x * THREADS + threadIdx.x) >> h.lane_bits, all = h.NH + 2 * h.NKV;
    int lanes = 1 << h.lane_bits, lane = threadIdx.x & (lanes - 1), half = h.HS / 2, rotated = h.NH + h.NKV;
    int n = job / all, head = job % all;
    bool live = n < h.N;
    size_t at = (size_t)job * h.HS;
    Part<WIDTH, TURNS> q = load_part<WIDTH, TURNS>(qkv + at, lane, lanes, half, live);
    const real_t *w = head < h.NH ? q_weight : k_weight;
    if (q_weight) { /* the values' heads only keep their warp company */
        float squares = 0;
        for (int k = 0; k < WIDTH * TURNS; k++) {
            squares += q.low[k] * q.low[k] + q.high[k] * q.high[k];
        }
        float r = 1 / sqrtf(head_sum(squares, lanes) / h.HS + h.eps);
        if (live && head < rotated) {
            Part<WIDTH, TURNS> weight = load_part<WIDTH, TURNS>(w, lane, lanes, half, true);
            for (int k = 0; k < WIDTH * TURNS; k++) {
                q.low[k] *= r * weight.low[k];
                q.high[k] *= r * weight.high[k];
            }
            if (lane == 0) {
                rstd[(size_t)n * rotated + head] = r;
            }
        }
    }
    if (live && head < rotated) {
        const float *row = table + (size_t)(h.start + n % h.T) * h.HS;
        Part<WIDTH, TURNS> turn = load_part<WIDTH, TURNS>(row, lane, lanes, half, true); /* cosines, sines */
        for (int k = 0; k < WIDTH * TURNS; k++) {
            float a = q.low[k], b = q.high[k];
            q.low[k] = a * turn.low[k] - b * turn.high[k];
            q.high[k] = b * turn.low[k] + a * turn.high[k];
        }
    }
    if (live) {
        store_part<WIDTH, TURNS>(out + at, q, lane, lanes, half);
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

void rope_forward(real_t *out, acc_t *rstd, const real_t *qkv, const real_t *q_weight, const real_t *k_weight,
                  const acc_t *table, RopeShape shape, Stream *stream) {
    bool packs = halves_are_packs(out, qkv, q_weight, k_weight, table, shape.HS);
    Heads h = describe(shape, packs);
    int blocks = ceil_div(((int64_t)h.N * (h.NH + 2 * h.NKV)) << h.lane_bits, THREADS);
    auto kernel = packs ? turn_heads<PACK_WIDTH, 1> : turn_heads<1, PLAIN_TURNS>;
    kernel<<<blocks, THREADS, 0, cuda_stream(stream)>>>(out, rstd, qkv, q_weight, k_weight, table, h);
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
    for (int i = threadIdx.x; i < HS; i += THREADS) {
        float sum = 0;
        for (int warp = 0; warp < WARPS; warp++) {
            sum += sums[warp][i];
        }
        partial[i] = sum;
    }
}

/* One head: turned back by the angle, then through the norm as in norm.cu (w NULL: no norm). dw += du q r. All threads
 * of a warp call it, each with a head of its own or, not live, with none. */
template <int WIDTH, int TURNS>
__device__ static void head_back(real_t *dq, Part<WIDTH, TURNS> *dw, const real_t *dout, const float *rstd,
                                 const real_t *q, const real_t *w, const float *angles, int lane, int lanes, int half,
                                 bool live) {
    Part<WIDTH, TURNS> du = load_part<WIDTH, TURNS>(dout, lane, lanes, half, live), in = {};
    if (w) {
        in = load_part<WIDTH, TURNS>(q, lane, lanes, half, live);
    }
    Part<WIDTH, TURNS> turn = load_part<WIDTH, TURNS>(angles, lane, lanes, half, live);
    for (int k = 0; k < WIDTH * TURNS; k++) {
        float a = du.low[k], b = du.high[k];
        du.low[k] = a * turn.low[k] + b * turn.high[k];
        du.high[k] = b * turn.low[k] - a * turn.high[k];
    }
    if (w) {
        Part<WIDTH, TURNS> weight = load_part<WIDTH, TURNS>(w, lane, lanes, half, true);
        float r = live ? *rstd : 0, along = 0;
        for (int k = 0; k < WIDTH * TURNS; k++) {
            dw->low[k] += du.low[k] * (in.low[k] * r);
            dw->high[k] += du.high[k] * (in.high[k] * r);
            du.low[k] *= weight.low[k];
            du.high[k] *= weight.high[k];
            along += du.low[k] * in.low[k] + du.high[k] * in.high[k];
        }
        along = r * r * r * head_sum(along, lanes) / (2 * half); /* how much of the gradient lies along q */
        for (int k = 0; k < WIDTH * TURNS; k++) {
            du.low[k] = r * du.low[k] - along * in.low[k];
            du.high[k] = r * du.high[k] - along * in.high[k];
        }
    }
    if (live) {
        store_part<WIDTH, TURNS>(dq, du, lane, lanes, half);
    }
}

/* Grid and block: the loops over n and over head, in strides of all groups of `lanes` threads; first the queries'
 * heads, then the keys', then the values'. */
template <int WIDTH, int TURNS>
__global__ void __launch_bounds__(THREADS, TURNS == 1 ? BLOCKS_PER_SM : 1)
    turn_heads_back(real_t *dqkv, float *partial, const real_t *dout, const float *rstd, const real_t *qkv,
                    const real_t *q_weight, const real_t *k_weight, const float *table, Heads h) {
    int lanes = 1 << h.lane_bits, lane = threadIdx.x & (lanes - 1), half = h.HS / 2, rotated = h.NH + h.NKV;
    unsigned group = (blockIdx.x * THREADS + threadIdx.x) >> h.lane_bits, groups = gridDim.x * THREADS >> h.lane_bits;
    size_t width = (size_t)(rotated + h.NKV) * h.HS;
    for (int keys = 0; keys < 2; keys++) {
        unsigned heads = keys ? h.NKV : h.NH, first = keys ? h.NH : 0, jobs = h.N * heads;
        Part<WIDTH, TURNS> dw = {};
        for (unsigned start = 0; start < jobs; start += groups) { /* the same turns for all threads of a warp */
            unsigned job = start + group, n = job / heads, head = first + job % heads;
            size_t at = n * width + (size_t)head * h.HS;
            head_back<WIDTH, TURNS>(dqkv + at, &dw, dout + at, rstd + (size_t)n * rotated + head, qkv + at,
                                    keys ? k_weight : q_weight, table + (size_t)(h.start + n % h.T) * h.HS, lane, lanes,
                                    half, job < jobs);
        }
        if (q_weight) {
            write_partial<WIDTH, TURNS>(partial + (size_t)(keys * gridDim.x + blockIdx.x) * h.HS, dw, lane, lanes,
                                        h.HS);
        }
    }
    for (unsigned job = group; job < (unsigned)(h.N * h.NKV) && dqkv != dout; job += groups) {
        size_t at = job / h.NKV * width + (size_t)(rotated + job % h.NKV) * h.HS;
        Part<WIDTH, TURNS> dv = load_part<WIDTH, TURNS>(dout + at, lane, lanes, half, true);
        store_part<WIDTH, TURNS>(dqkv + at, dv, lane, lanes, half);
    }
}

void rope_backward(real_t *dqkv, acc_t *dq_weight, acc_t *dk_weight, const real_t *dout, const acc_t *rstd,
                   const real_t *qkv, const real_t *q_weight, const real_t *k_weight, const acc_t *table,
                   RopeShape shape, Stream *stream) {
    bool packs = halves_are_packs(dqkv, dout, q_weight, k_weight, table, shape.HS) && packs_fit(qkv, shape.HS / 2);
    Heads h = describe(shape, packs);
    int needed = ceil_div(((int64_t)h.N * (h.NH > h.NKV ? h.NH : h.NKV)) << h.lane_bits, THREADS);
    int blocks = needed < PARTIAL_BLOCKS ? needed : PARTIAL_BLOCKS;
    float *partial = q_weight ? (float *)cuda_workspace((size_t)2 * blocks * h.HS * sizeof(float)) : NULL;
    auto kernel = packs ? turn_heads_back<PACK_WIDTH, 1> : turn_heads_back<1, PLAIN_TURNS>;
    kernel<<<blocks, THREADS, 0, cuda_stream(stream)>>>(dqkv, partial, dout, rstd, qkv, q_weight, k_weight, table, h);
    CUDA_LAUNCHED();
    if (q_weight) {
        partials_add(dq_weight, dk_weight, partial, blocks, h.HS, stream);
    }
}
