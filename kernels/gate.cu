/* The router's linear map on the GPU: float accuracy from bf16 activations and float weights, x read once.
 *
 * A float is the sum of three bf16 numbers, exactly: hi = bf16(w), mid = bf16(w - hi), lo = w - hi - mid. Products of
 * bf16 numbers are exact in the float sums of the matrix units, so x w^T is the sum of three bf16 products.
 *
 *   up to 16 experts, what counts is to read x once, and to launch little:
 *       forward    a warp takes 16 tokens and all experts, the parts of w are in shared memory
 *       backward   plain float arithmetic; a thread owns some columns of w and of dw and walks over the tokens
 *   more experts: the parts are stacked and cuBLAS multiplies (dx leaves out what is below 2^-16, bf16 being coarser):
 *
 *       (N,3E)     = x [hi; mid; lo](w)^T, then the three are added, the smallest first
 *       dx (N,C)  += [hi | mid | hi](dlogits) [hi; hi; mid](w)
 *       dw (E,C)  += the three blocks of [lo | hi | mid](dlogits)^T x
 *
 * Where real_t is float all are plain products. Called by the routers. Read next: logits_of_tokens, cuda_blas.cuh.
 */
#include "cuda.cuh"

#include "cuda_blas.cuh"
#include "mma.cuh"
#include "partials.cuh"

extern "C" {
#include "gate.h"
}

#ifdef REAL_BF16

enum { THREADS = 256 };

/* x = hi + mid + lo */
typedef struct {
    real_t hi, mid, lo;
} Parts;

__device__ static Parts split(float x) {
    Parts p;
    p.hi = to_real<real_t>(x);
    p.mid = to_real<real_t>(x - to_float(p.hi));
    p.lo = to_real<real_t>(x - to_float(p.hi) - to_float(p.mid));
    return p;
}

/* ---- forward, up to 16 experts ---- */

enum { WARPS = 4, WARP_TOKENS = 16, STEP = 128, FILL = 6, PAD = 32, PART_BYTES = 48 << 10 };

/* STEP columns of two tokens, 16 bytes per thread and token for every 32 columns. The order of the inner index is free
 * as long as x and w agree: a thread feeds its 8 neighbouring numbers to two steps of the matrix unit. */
typedef struct {
    uint4 token[STEP / 32][2];
} Strip;

__device__ static Strip load_strip(const real_t *x, const bool *there, int column, int C) {
    Strip s;
#pragma unroll
    for (int i = 0; i < STEP / 32; i++) {
        int c = column + i * 32 + threadIdx.x % 4 * 8;
        for (int t = 0; t < 2; t++) {
            s.token[i][t] = make_uint4(0, 0, 0, 0);
            if (there[t] && c < C) {
                s.token[i][t] = *reinterpret_cast<const uint4 *>(x + (size_t)t * 8 * C + c);
            }
        }
    }
    return s;
}

/* Four neighbouring weights, split and stored 8 bytes at a time. */
__device__ static void store_parts(real_t *lo, real_t *mid, real_t *hi, const Pack<float> &four) {
    struct alignas(8) Quad {
        real_t v[4];
    } parts[3];
    for (int j = 0; j < 4; j++) {
        Parts p = split(four.v[j]);
        parts[0].v[j] = p.lo;
        parts[1].v[j] = p.mid;
        parts[2].v[j] = p.hi;
    }
    *reinterpret_cast<Quad *>(lo) = parts[0];
    *reinterpret_cast<Quad *>(mid) = parts[1];
    *reinterpret_cast<Quad *>(hi) = parts[2];
}

/* parts[part][expert][column], experts padded with zeros to whole tiles: lo, mid, hi of w's columns from `first`. FILL
 * reads are on their way at once. */
__device__ static void fill_parts(real_t *parts, const float *w, int experts, int columns, int first, int C, int E) {
    int stride = columns + PAD, per_row = columns / 4, all = experts * per_row;
    for (int begin = threadIdx.x; begin < all; begin += FILL * 32 * WARPS) {
        Pack<float> four[FILL];
#pragma unroll
        for (int k = 0; k < FILL; k++) {
            int i = begin + k * 32 * WARPS, e = i / per_row, c = first + i % per_row * 4;
            four[k] = e < E && c < C ? load_pack(w + (size_t)e * C + c) : Pack<float>{};
        }
#pragma unroll
        for (int k = 0; k < FILL; k++) {
            int i = begin + k * 32 * WARPS, e = i / per_row, c = i % per_row * 4;
            if (i < all) {
                store_parts(parts + e * stride + c, parts + (experts + e) * stride + c,
                            parts + (2 * experts + e) * stride + c, four[k]);
            }
        }
    }
}

/* Grid and warps: the loop over n, WARP_TOKENS at a time. TILES: the loop over e, 8 at a time. The loop over c is in
 * rounds of `columns`, whose part of w is in shared memory, and in those in strips, whose sums are added up in float:
 * the matrix unit rounds its own sums towards zero. */
template <int TILES>
__global__ void __launch_bounds__(32 * WARPS)
    logits_of_tokens(float *logits, const real_t *x, const float *w, int N, int C, int E, int columns) {
    extern __shared__ int4 shared[];
    real_t *parts = reinterpret_cast<real_t *>(shared);
    int lane = threadIdx.x % 32, stride = columns + PAD;
    int n = (blockIdx.x * WARPS + threadIdx.x / 32) * WARP_TOKENS + lane / 4; /* and the token 8 after it */
    const bool there[2] = {n < N, n + 8 < N};
    const real_t *row = x + (size_t)n * C;
    float total[TILES][4] = {};
    Strip next = load_strip(row, there, 0, C);
    for (int first = 0; first < C; first += columns) {
        __syncthreads();
        fill_parts(parts, w, TILES * 8, columns, first, C, E);
        __syncthreads();
        for (int c = 0; c < columns && first + c < C; c += STEP) {
            Strip strip = next;
            next = load_strip(row, there, first + c + STEP, C);
            float sum[TILES][4] = {};
#pragma unroll
            for (int i = 0; i < STEP / 32; i++) {
                uint4 x0 = strip.token[i][0], x1 = strip.token[i][1];
                const uint32_t low[4] = {x0.x, x1.x, x0.y, x1.y}, high[4] = {x0.z, x1.z, x0.w, x1.w};
                const real_t *from = parts + lane / 4 * stride + c + i * 32 + lane % 4 * 8;
#pragma unroll
                for (int part = 0; part < 3; part++) {
#pragma unroll
                    for (int t = 0; t < TILES; t++) {
                        uint4 e = *reinterpret_cast<const uint4 *>(from + (part * TILES + t) * 8 * stride);
                        mma(sum[t], low, e.x, e.y);
                        mma(sum[t], high, e.z, e.w);
                    }
                }
            }
            for (int i = 0; i < TILES * 4; i++) {
                total[i / 4][i % 4] += sum[i / 4][i % 4];
            }
        }
    }
    for (int i = 0; i < TILES * 4; i++) {
        int e = i / 4 * 8 + lane % 4 * 2 + i % 2, token = n + i % 4 / 2 * 8;
        if (token < N && e < E) {
            logits[(size_t)token * E + e] = total[i / 4][i % 4];
        }
    }
}

static void forward_by_warps(float *logits, const real_t *x, const float *w, int N, int C, int E, cudaStream_t s) {
    int tiles = E <= 8 ? 1 : 2;
    int column_bytes = 3 * tiles * 8 * (int)sizeof(real_t), all = (C + STEP - 1) / STEP * STEP;
    int columns = (PART_BYTES / column_bytes - PAD) / STEP * STEP;
    columns = columns < all ? columns : all;
    auto kernel = tiles == 1 ? logits_of_tokens<1> : logits_of_tokens<2>;
    kernel<<<ceil_div(N, WARPS * WARP_TOKENS), 32 * WARPS, (columns + PAD) * column_bytes, s>>>(logits, x, w, N, C, E,
                                                                                                columns);
    CUDA_LAUNCHED();
}

/* ---- backward, up to 16 experts ---- */

/* A block for each multiprocessor, of few threads: the weights and their gradients fill the registers. A thread moves
 * BACK_COLUMNS numbers of a row by one instruction and has the rows of x and dx of several tokens on the way at once,
 * those of BACK_GRADIENTS logits, two for each lane of a warp. */
enum { BACK_BLOCKS = 132, BACK_THREADS = 384, BACK_COLUMNS = 4, BACK_GRADIENTS = 64 };

__device__ static uint2 load_columns(const real_t *from) {
    return *reinterpret_cast<const uint2 *>(from);
}

/* Four of them by bits, as float_at of cuda.cuh takes one of a pack. */
__device__ static Pack<float> floats_of(uint2 columns) {
    return {__uint_as_float(columns.x << 16), __uint_as_float(columns.x & 0xffff0000u),
            __uint_as_float(columns.y << 16), __uint_as_float(columns.y & 0xffff0000u)};
}

__device__ static void store_columns(real_t *to, const float *from) {
    const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(from[0], from[1]), __floats2bfloat162_rn(from[2], from[3])};
    *reinterpret_cast<uint2 *>(to) = *reinterpret_cast<const uint2 *>(pairs);
}

/* The gradients of the logits of a warp's tokens, dealt out to its lanes. */
typedef struct {
    float mine[BACK_GRADIENTS / 32];
} Gradients;

/* Those of the tokens from n on; zeros beyond N and E. */
template <int EXPERTS>
__device__ static Gradients load_gradients(const float *dlogits, int n, int N, int E) {
    Gradients g;
#pragma unroll
    for (int k = 0; k < BACK_GRADIENTS / 32; k++) {
        int i = k * 32 + threadIdx.x % 32, token = n + i / EXPERTS, e = i % EXPERTS;
        g.mine[k] = token < N && e < E ? dlogits[(size_t)token * E + e] : 0;
    }
    return g;
}

/* The i-th of them, from the lane that has it. All threads of the warp call it. */
__device__ static float gradient_of(Gradients g, int i) {
    return __shfl_sync(0xffffffffu, g.mine[i / 32], i % 32);
}

/* partial (E,C) = the block's dw: its rows of threads hand over theirs one after the other, in `shared` (EXPERTS, x).
 * All threads of the block call it. */
template <int EXPERTS>
__device__ static void write_partial(float *partial, Pack<float> *shared, Pack<float> *dw, int c, int C, int E) {
    for (int y = 1; y < (int)blockDim.y; y++) {
        __syncthreads();
        for (int e = 0; e < EXPERTS && (int)threadIdx.y == y; e++) {
            shared[e * blockDim.x + threadIdx.x] = dw[e];
        }
        __syncthreads();
        for (int i = 0; i < EXPERTS * BACK_COLUMNS && threadIdx.y == 0; i++) {
            int e = i / BACK_COLUMNS, j = i % BACK_COLUMNS;
            dw[e].v[j] += shared[e * blockDim.x + threadIdx.x].v[j];
        }
    }
    for (int e = 0; e < EXPERTS && threadIdx.y == 0; e++) {
        if (e < E && c < C) {
            store_pack(partial + (size_t)e * C + c, dw[e]);
        }
    }
}

/* Grid x and block x: the loop over c, BACK_COLUMNS per thread. Grid y and block y: the loop over n, TOKENS at a time,
 * in strides. EXPERTS: the loop over e. partial (grid y, E, C). */
template <int EXPERTS>
__global__ void __launch_bounds__(BACK_THREADS)
    gradients_of_columns(real_t *dx, float *partial, const float *dlogits, const real_t *x, const float *w, int N,
                         int C, int E) {
    enum { TOKENS = BACK_GRADIENTS / EXPERTS };
    extern __shared__ int4 shared[];
    int c = (blockIdx.x * blockDim.x + threadIdx.x) * BACK_COLUMNS;
    bool there = c < C; /* threads beyond the row still hand gradients on */
    Pack<float> weight[EXPERTS], dw[EXPERTS] = {};
    for (int e = 0; e < EXPERTS; e++) {
        weight[e] = there && e < E ? load_pack(w + (size_t)e * C + c) : Pack<float>{};
    }
    int first = (blockIdx.y * blockDim.y + threadIdx.y) * TOKENS, stride = gridDim.y * blockDim.y * TOKENS;
    for (int n = first; n < N; n += stride) {
        const real_t *from = x + (size_t)n * C + c;
        real_t *to = dx + (size_t)n * C + c;
        uint2 in[TOKENS], out[TOKENS];
        Gradients gradients = load_gradients<EXPERTS>(dlogits, n, N, E);
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            bool live = there && n + t < N;
            in[t] = live ? load_columns(from + t * C) : make_uint2(0, 0);
            out[t] = live ? load_columns(to + t * C) : make_uint2(0, 0);
        }
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            Pack<float> value = floats_of(in[t]), total = floats_of(out[t]);
            float sum[BACK_COLUMNS] = {};
            for (int e = 0; e < EXPERTS; e++) {
                float g = gradient_of(gradients, t * EXPERTS + e);
                for (int j = 0; j < BACK_COLUMNS; j++) {
                    sum[j] += g * weight[e].v[j];
                    dw[e].v[j] += g * value.v[j];
                }
            }
            for (int j = 0; j < BACK_COLUMNS; j++) {
                sum[j] += total.v[j];
            }
            if (there && n + t < N) {
                store_columns(to + t * C, sum);
            }
        }
    }
    write_partial<EXPERTS>(partial + (size_t)blockIdx.y * E * C, reinterpret_cast<Pack<float> *>(shared), dw, c, C, E);
}

/* A block takes as many whole rows of threads as fit, or an even part of a row that is longer. */
template <int EXPERTS>
static void backward_by_columns(real_t *dx, float *dw, const float *dlogits, const real_t *x, const float *w, int N,
                                int C, int E, Stream *stream) {
    int columns = C / BACK_COLUMNS, slabs = ceil_div(columns, BACK_THREADS);
    int x_threads = ceil_div(ceil_div(columns, slabs), 32) * 32;
    dim3 block(x_threads, BACK_THREADS / x_threads);
    int needed = ceil_div(N, block.y * (BACK_GRADIENTS / EXPERTS)), fit = slabs < BACK_BLOCKS ? BACK_BLOCKS / slabs : 1;
    int blocks = needed < fit ? needed : fit;
    float *partial = (float *)cuda_workspace((size_t)blocks * E * C * sizeof(float));
    size_t shared = block.y == 1 ? 0 : EXPERTS * x_threads * sizeof(Pack<float>); /* at most 48 KiB */
    gradients_of_columns<EXPERTS>
        <<<dim3(slabs, blocks), block, shared, cuda_stream(stream)>>>(dx, partial, dlogits, x, w, N, C, E);
    CUDA_LAUNCHED();
    partials_add(dw, NULL, partial, blocks, E * C, stream);
}

/* ---- any number of experts ---- */

/* Grid: the elements of w, `count` = E C. stacked (3E,C): the parts of w below each other; for dx they are [hi; hi;
 * mid]. */
__global__ void stack_weights(real_t *stacked, const float *w, int count, int for_dx) {
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i < count) {
        Parts p = split(w[i]);
        stacked[i] = p.hi;
        stacked[count + i] = for_dx ? p.hi : p.mid;
        stacked[2 * (size_t)count + i] = for_dx ? p.mid : p.lo;
    }
}

/* Grid: the elements of dlogits. beside (N,4E): [lo | hi | mid | hi], so that either three neighbours can be used. */
__global__ void split_beside(real_t *beside, const float *dlogits, size_t count, int E) {
    size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < count) {
        Parts p = split(dlogits[i]);
        real_t *row = beside + i / E * 4 * E + i % E;
        row[0] = p.lo;
        row[E] = p.hi;
        row[2 * E] = p.mid;
        row[3 * E] = p.hi;
    }
}

/* Grid: the elements of logits. parts (N,3E): hi | mid | lo. */
__global__ void add_logits(float *logits, const float *parts, size_t count, int E) {
    size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < count) {
        const float *p = parts + i / E * 3 * E + i % E;
        logits[i] = p[2 * E] + p[E] + p[0];
    }
}

/* Grid: the elements of dw. parts (3E,C): lo, hi, mid. */
__global__ void add_weights(float *dw, const float *parts, size_t count) {
    size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < count) {
        dw[i] += parts[i] + parts[2 * count + i] + parts[count + i];
    }
}

static size_t whole(size_t bytes) {
    return (bytes + 255) / 256 * 256;
}

static void forward_by_blas(float *logits, const real_t *x, const float *w, int N, int C, int E, Stream *stream) {
    cudaStream_t s = cuda_stream(stream);
    size_t weights_bytes = whole((size_t)3 * E * C * sizeof(real_t)), count = (size_t)N * E;
    char *scratch = (char *)cuda_workspace(weights_bytes + 3 * count * sizeof(float));
    real_t *stacked = (real_t *)scratch;
    float *parts = (float *)(scratch + weights_bytes);
    stack_weights<<<ceil_div((int64_t)E * C, THREADS), THREADS, 0, s>>>(stacked, w, E * C, 0);
    CUDA_LAUNCHED();
    BlasOperand<real_t> a = {x, C, false}, b = {stacked, C, true};
    blas_multiply(parts, a, b, N, 3 * E, C, 0, stream);
    add_logits<<<ceil_div((int64_t)count, THREADS), THREADS, 0, s>>>(logits, parts, count, E);
    CUDA_LAUNCHED();
}

static void backward_by_blas(real_t *dx, float *dw, const float *dlogits, const real_t *x, const float *w, int N, int C,
                             int E, Stream *stream) {
    cudaStream_t s = cuda_stream(stream);
    size_t stacked_bytes = whole((size_t)3 * E * C * sizeof(real_t)), count = (size_t)E * C;
    size_t beside_bytes = whole((size_t)N * 4 * E * sizeof(real_t));
    char *scratch = (char *)cuda_workspace(stacked_bytes + beside_bytes + 3 * count * sizeof(float));
    real_t *stacked = (real_t *)scratch, *beside = (real_t *)(scratch + stacked_bytes);
    float *parts = (float *)(scratch + stacked_bytes + beside_bytes);
    stack_weights<<<ceil_div((int64_t)count, THREADS), THREADS, 0, s>>>(stacked, w, E * C, 1);
    CUDA_LAUNCHED();
    split_beside<<<ceil_div((int64_t)N * E, THREADS), THREADS, 0, s>>>(beside, dlogits, (size_t)N * E, E);
    CUDA_LAUNCHED();
    BlasOperand<real_t> for_dx = {beside + E, 4 * E, false}, weights = {stacked, C, false};
    blas_multiply(dx, for_dx, weights, N, C, 3 * E, 1, stream);
    BlasOperand<real_t> for_dw = {beside, 4 * E, true}, input = {x, C, false};
    blas_multiply(parts, for_dw, input, 3 * E, C, N, 0, stream);
    add_weights<<<ceil_div((int64_t)count, THREADS), THREADS, 0, s>>>(dw, parts, count);
    CUDA_LAUNCHED();
}

/* ---- the operation ---- */

void gate_forward(acc_t *logits, const real_t *x, const acc_t *w, int N, int C, int E, Stream *stream) {
    if (E <= 16 && packs_fit(x, C) && packs_fit(w, C)) {
        forward_by_warps(logits, x, w, N, C, E, cuda_stream(stream));
    } else {
        forward_by_blas(logits, x, w, N, C, E, stream);
    }
}

void gate_backward(real_t *dx, acc_t *dw, const acc_t *dlogits, const real_t *x, const acc_t *w, int N, int C, int E,
                   Stream *stream) {
    bool packs = packs_fit(dx, C) && packs_fit(x, C) && packs_fit(w, C);
    if (E <= 8 && packs) {
        backward_by_columns<8>(dx, dw, dlogits, x, w, N, C, E, stream);
    } else if (E <= 16 && packs) {
        backward_by_columns<16>(dx, dw, dlogits, x, w, N, C, E, stream);
    } else {
        backward_by_blas(dx, dw, dlogits, x, w, N, C, E, stream);
    }
}

#else

void gate_forward(acc_t *logits, const real_t *x, const acc_t *w, int N, int C, int E, Stream *stream) {
    BlasOperand<float> a = {x, C, false}, b = {w, C, true};
    blas_multiply(logits, a, b, N, E, C, 0, stream);
}

void gate_backward(real_t *dx, acc_t *dw, const acc_t *dlogits, const real_t *x, const acc_t *w, int N, int C, int E,
                   Stream *stream) {
    BlasOperand<float> gradient = {dlogits, E, false}, turned = {dlogits, E, true}, weights = {w, C, false},
                       input = {x, C, false};
    blas_multiply(dx, gradient, weights, N, C, E, 1, stream);
    blas_multiply(dw, turned, input, E, C, N, 1, stream);
}

#endif
