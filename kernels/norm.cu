/* RMSNorm on the GPU: a row is read once and stays in registers until its result is written.
 *
 * A row belongs to a warp (four or eight rows per block), or to a whole block where it is longer than a warp's
 * registers can hold; PACKS is how many 16-byte packs each thread keeps. Rows that are not made of packs, or are longer
 * still, go through a plain kernel that reads them twice.
 *
 * Bytes per number in bf16: forward reads x and add and writes sum and y, 8; backward reads dy, s, ds and writes ds, 8.
 * The weights' gradient costs nothing beside that: a thread sees the same columns in every row that its block takes, so
 * it adds them in registers, the block adds its rows, and partials.cuh adds the blocks. The number of blocks is fixed,
 * and with it the order of the sum.
 *
 * The rounded sum is what is normalised: backward sees the same numbers. Called by model/transformer.c; norms of single
 * heads are in rope.cu. Read next: forward_rows.
 */
#include "cuda.cuh"

#include "partials.cuh"

extern "C" {
#include "norm.h"
}

enum { WIDTH = Pack<real_t>::COUNT, MOST_PACKS = 8, ROW_THREADS = 256, MULTIPROCESSORS = 132 };

/* How the threads of a block share rows: x threads each, y rows at a time. */
typedef struct {
    int packs; /* kept by each thread; 0: the plain path */
    dim3 block;
} Split;

/* Warps have no barriers to wait at, so a warp takes a row as long as it can hold it in warp_packs packs. */
static Split split_row(int C, bool aligned, int warp_packs, int rows_per_block) {
    int packs = C / WIDTH, threads = packs <= 32 * warp_packs ? 32 : ROW_THREADS;
    if (!aligned || packs > threads * MOST_PACKS) {
        return (Split){0, dim3(ROW_THREADS, 1)};
    }
    int each = 1;
    while (each * threads < packs) {
        each = each == 2 ? 3 : each == 3 ? 4 : each == 4 ? 6 : each == 6 ? 8 : 2 * each;
    }
    return (Split){each, dim3(threads, threads == 32 ? rows_per_block : 1)};
}

/* Over the threads of one row. */
__device__ static float row_sum(float x) {
    return blockDim.x == 32 ? warp_sum(x) : block_sum(x);
}

__device__ static float row_rstd(float squares, int C, float eps) {
    return 1 / sqrtf(squares / C + eps);
}

/* ---- forward ---- */

/* Grid x and block y: the loop over n. Block x: the loops over c, in packs. */
template <int PACKS>
__global__ void forward_rows(real_t *sum, real_t *y, float *rstd, const real_t *x, const real_t *add, const real_t *w,
                             int N, int C, float eps) {
    int n = blockIdx.x * blockDim.y + threadIdx.y;
    if (n >= N) {
        return; /* a whole warp, and only where rows are warps' */
    }
    size_t row = (size_t)n * C;
    Pack<real_t> s[PACKS], more[PACKS];
    float squares = 0;
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
        int c = (i * blockDim.x + threadIdx.x) * WIDTH;
        s[i] = load_pack_if(c < C, x + row + c);
        more[i] = load_pack_if(add && c < C, add + row + c);
    }
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
        int c = (i * blockDim.x + threadIdx.x) * WIDTH;
        if (add && c < C) {
            for (int j = 0; j < WIDTH; j++) {
                s[i].v[j] = to_real<real_t>(float_at(s[i], j) + float_at(more[i], j));
            }
            store_pack(sum + row + c, s[i]);
        }
        for (int j = 0; j < WIDTH; j++) {
            squares += float_at(s[i], j) * float_at(s[i], j);
        }
    }
    float r = row_rstd(row_sum(squares), C, eps);
    if (threadIdx.x == 0) {
        rstd[n] = r;
    }
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
        int c = (i * blockDim.x + threadIdx.x) * WIDTH;
        if (c < C) {
            Pack<real_t> weight = load_pack(w + c);
            for (int j = 0; j < WIDTH; j++) {
                s[i].v[j] = to_real<real_t>(float_at(s[i], j) * r * float_at(weight, j));
            }
            store_pack(y + row + c, s[i]);
        }
    }
}

/* Grid: the loop over n. Block: the loops over c. */
__global__ void forward_plain(real_t *sum, real_t *y, float *rstd, const real_t *x, const real_t *add, const real_t *w,
                              int C, float eps) {
    size_t row = (size_t)blockIdx.x * C;
    const real_t *s = add ? sum + row : x + row;
    float squares = 0;
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        if (add) {
            sum[row + c] = to_real<real_t>(to_float(x[row + c]) + to_float(add[row + c]));
        }
        squares += to_float(s[c]) * to_float(s[c]);
    }
    float r = row_rstd(block_sum(squares), C, eps);
    if (threadIdx.x == 0) {
        rstd[blockIdx.x] = r;
    }
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        y[row + c] = to_real<real_t>(to_float(s[c]) * r * to_float(w[c]));
    }
}

#define FORWARD(PACKS)                                                                                    \
    case PACKS:                                                                                           \
        forward_rows<PACKS>                                                                               \
            <<<blocks, split.block, 0, cuda_stream(stream)>>>(sum, y, rstd, x, add, w, N, C, (float)eps); \
        break

void norm_forward(real_t *sum, real_t *y, acc_t *rstd, const real_t *x, const real_t *add, const real_t *w, int N,
                  int C, double eps, Stream *stream) {
    bool aligned =
        packs_fit(x, C) && packs_fit(y, C) && packs_fit(w, C) && (!add || (packs_fit(add, C) && packs_fit(sum, C)));
    Split split = split_row(C, aligned, MOST_PACKS, 4);
    int blocks = ceil_div(N, split.block.y);
    switch (split.packs) {
        FORWARD(1);
        FORWARD(2);
        FORWARD(3);
        FORWARD(4);
        FORWARD(6);
        FORWARD(8);
        default: forward_plain<<<N, split.block, 0, cuda_stream(stream)>>>(sum, y, rstd, x, add, w, C, (float)eps);
    }
    CUDA_LAUNCHED();
}

/* ---- backward ---- */

/* How many blocks share a multiprocessor: as many as the registers for `packs` packs of three rows allow. Their number
 * is the same on every GPU, for the order of the sums. */
static constexpr int blocks_per_sm(int packs) {
    return packs == 1 ? 4 : packs == 2 ? 3 : packs <= 4 ? 2 : 1;
}

/* partial[block][c] = the block's dw_c: its rows' threads leave theirs in `shared` (rows, C), which are added in order.
 */
template <int PACKS>
__device__ static void write_partial(float *partial, float *shared, float (*dw)[WIDTH], int C) {
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
        int c = (i * blockDim.x + threadIdx.x) * WIDTH;
        for (int j = 0; j < WIDTH && c < C; j++) {
            shared[threadIdx.y * C + c + j] = dw[i][j];
        }
    }
    __syncthreads();
    for (int c = threadIdx.y * blockDim.x + threadIdx.x; c < C; c += blockDim.x * blockDim.y) {
        float sum = 0;
        for (int y = 0; y < (int)blockDim.y; y++) {
            sum += shared[y * C + c];
        }
        partial[(size_t)blockIdx.x * C + c] = sum;
    }
}

/* Grid x and block y: the loop over n, in strides. Block x: the loops over c, in packs. */
template <int PACKS>
__global__ void __launch_bounds__(ROW_THREADS, blocks_per_sm(PACKS))
    backward_rows(real_t *ds, float *partial, const real_t *dy, const real_t *s, const float *rstd, const real_t *w,
                  int N, int C) {
    extern __shared__ float shared[];
    float dw[PACKS][WIDTH] = {};
    Pack<real_t> weight[PACKS];
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
        int c = (i * blockDim.x + threadIdx.x) * WIDTH;
        weight[i] = load_pack_if(c < C, w + c);
    }
    for (int n = blockIdx.x * blockDim.y + threadIdx.y; n < N; n += gridDim.x * blockDim.y) {
        size_t row = (size_t)n * C;
        Pack<real_t> g[PACKS], in[PACKS], out[PACKS];
#pragma unroll
        for (int i = 0; i < PACKS; i++) {
            int c = (i * blockDim.x + threadIdx.x) * WIDTH;
            g[i] = load_pack_if(c < C, dy + row + c);
            in[i] = load_pack_if(c < C, s + row + c);
            out[i] = load_pack_if(c < C, ds + row + c);
        }
        float r = rstd[n], along = 0;
#pragma unroll
        for (int i = 0; i < PACKS; i++) {
            for (int j = 0; j < WIDTH; j++) {
                along += float_at(g[i], j) * float_at(weight[i], j) * float_at(in[i], j);
                dw[i][j] += float_at(g[i], j) * (float_at(in[i], j) * r);
            }
        }
        along = r * r * r * row_sum(along) / C; /* how much of the gradient lies along s */
#pragma unroll
        for (int i = 0; i < PACKS; i++) {
            int c = (i * blockDim.x + threadIdx.x) * WIDTH;
            Pack<real_t> result;
            for (int j = 0; j < WIDTH; j++) {
                float through = r * (float_at(g[i], j) * float_at(weight[i], j));
                result.v[j] = to_real<real_t>(float_at(out[i], j) + (through - along * float_at(in[i], j)));
            }
            if (c < C) {
                store_pack(ds + row + c, result);
            }
        }
    }
    write_partial<PACKS>(partial, shared, dw, C);
}

/* Grid: the loop over n. Block: the loops over c. */
__global__ void backward_plain(real_t *ds, const real_t *dy, const real_t *s, const float *rstd, const real_t *w,
                               int C) {
    size_t row = (size_t)blockIdx.x * C;
    float r = rstd[blockIdx.x], along = 0;
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        along += to_float(dy[row + c]) * to_float(w[c]) * to_float(s[row + c]);
    }
    along = r * r * r * block_sum(along) / C;
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        float through = r * (to_float(dy[row + c]) * to_float(w[c]));
        ds[row + c] = to_real<real_t>(to_float(ds[row + c]) + (through - along * to_float(s[row + c])));
    }
}

/* dw for backward_plain. Grid x: columns. Grid y: every gridDim.y-th row. */
__global__ void weight_plain(float *partial, const real_t *dy, const real_t *s, const float *rstd, int N, int C) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    float sum = 0;
    for (int n = blockIdx.y; n < N && c < C; n += gridDim.y) {
        sum += to_float(dy[(size_t)n * C + c]) * (to_float(s[(size_t)n * C + c]) * rstd[n]);
    }
    if (c < C) {
        partial[(size_t)blockIdx.y * C + c] = sum;
    }
}

#define BACKWARD(PACKS)                                                                                                \
    case PACKS:                                                                                                        \
        backward_rows<PACKS><<<blocks, split.block, shared, cuda_stream(stream)>>>(ds, partial, dy, s, rstd, w, N, C); \
        break

void norm_backward(real_t *ds, acc_t *dw, const real_t *dy, const real_t *s, const acc_t *rstd, const real_t *w, int N,
                   int C, Stream *stream) {
    bool aligned = packs_fit(ds, C) && packs_fit(dy, C) && packs_fit(s, C) && packs_fit(w, C) && C <= 12256;
    Split split = split_row(C, aligned, 4, ROW_THREADS / 32);
    size_t shared = split.block.y * C * sizeof(float); /* with block_sum's 128 bytes at most 48 KiB */
    int rows = ceil_div(N, split.block.y), most = MULTIPROCESSORS * blocks_per_sm(split.packs);
    int blocks = rows < most ? rows : most;
    float *partial = (float *)cuda_workspace((size_t)blocks * C * sizeof(float));
    switch (split.packs) {
        BACKWARD(1);
        BACKWARD(2);
        BACKWARD(3);
        BACKWARD(4);
        BACKWARD(6);
        BACKWARD(8);
        default:
            backward_plain<<<N, split.block, 0, cuda_stream(stream)>>>(ds, dy, s, rstd, w, C);
            CUDA_LAUNCHED();
            weight_plain<<<dim3(ceil_div(C, ROW_THREADS), blocks), ROW_THREADS, 0, cuda_stream(stream)>>>(
                partial, dy, s, rstd, N, C);
    }
    CUDA_LAUNCHED();
    partials_add(dw, NULL, partial, blocks, C, stream);
}
