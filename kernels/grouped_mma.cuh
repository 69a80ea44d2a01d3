/* The five products on the tensor cores of Ampere and later: tiles of mma_tile.cuh, which fetches, multiplies and sums,
 * between the choice of a block's operands and what becomes of its sums. bf16, widths multiples of 8.
 *
 * Every kernel has a block to 128 rows and 256 columns of a result. Blocks of neighbouring numbers share their rows and
 * run at the same time, so that operands come from memory once and then from L2.
 *
 * Called by experts.cu. Read first: grouped_plain.cuh, the same products with loops. Faster where Hopper is at hand:
 * grouped_wgmma.cuh. */
#ifndef KERNELS_GROUPED_MMA_CUH
#define KERNELS_GROUPED_MMA_CUH

#include "mma_tile.cuh"

static dim3 mma_grid(int columns, int tile, Grouped g) {
    return dim3(most_row_tiles(g.shape, MMA_ROWS), ceil_div(columns, tile));
}

template <class Kernel>
static void mma_allow_shared(Kernel *kernel) {
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, MMA_SHARED_BYTES));
}

/* SwiGLU takes 128 columns of the gate and the same of up, 8 of one beside 8 of the other: then a thread holds both of
 * an element, in sum[i][2 f] and sum[i][2 f + 1]. Row v of the tile of W1 is row mma_w1_row(v) of the expert's. */
__device__ static inline int mma_w1_row(int v, int first, int H) {
    return v / 8 % 2 * H + min(first + v / 16 * 8 + v % 8, H - 1);
}

/* Stages 128 columns: SwiGLU's all (gate, up, h), or half `half` of GELU's 256 (a, h). */
template <bool GELU>
__device__ static inline void mma_stage_up(real_t *shared, const MmaSum &sum, int half) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
#pragma unroll
        for (int f = 0; f < 4; f++) {
            const float *a = &sum[i / 2][GELU ? 4 * half + f : 2 * f][i % 2 * 2];
            const float *up = &sum[i / 2][2 * f + 1][i % 2 * 2];
            __nv_bfloat162 gates = __floats2bfloat162_rn(a[0], a[1]), ups = __floats2bfloat162_rn(up[0], up[1]);
            float2 g = __bfloat1622float2(gates), u = __bfloat1622float2(ups); /* h is made of what was rounded */
            *mma_staged(shared, i, f) = gates;
            *mma_staged(shared + MMA_STAGED, i, f) = GELU ? __floats2bfloat162_rn(gelu(g.x), gelu(g.y))
                                                          : __floats2bfloat162_rn(swiglu(g.x, u.x), swiglu(g.y, u.y));
            if (!GELU) {
                *mma_staged(shared + 2 * MMA_STAGED, i, f) = ups;
            }
        }
    }
}

/* Grid: x the CPU's loop over pieces of rows, y its loop over columns of a (SwiGLU: 128 of the gate and the same of up;
 * GELU: 256). */
template <bool GELU>
static __global__ void __launch_bounds__(MMA_THREADS, 1)
    mma_up_kernel(real_t *a, real_t *h, RowSource x, const real_t *w1, ExpertShape shape, const int *offset) {
    extern __shared__ __align__(128) real_t shared[];
    RowTile rows = find_row_tile(offset, shape.E, MMA_ROWS, blockIdx.x);
    if (rows.expert < 0) {
        return;
    }
    int C = shape.C, H = shape.H, A = GELU ? H : 2 * H, first = blockIdx.y * (GELU ? MMA_COLUMNS : MMA_HALF);
    RowSource w = {w1 + (size_t)rows.expert * A * C, NULL, 0};
    auto left = mma_operand<MMA_ROWS, true>(x, C, rows.first, rows.end, 0, C, mma_warp_down());
    auto right = mma_operand<MMA_COLUMNS, true>(w, C, first, H, 0, C, mma_warp_across());
    if (!GELU) {
#pragma unroll
        for (int i = 0; i < right.EACH; i++) {
            mma_set_row(right, i, mma_w1_row(mma_row<decltype(right)>(i), first, H));
        }
    }
    MmaSum sum = {};
    mma_sum(sum, shared, left, right);
#pragma unroll
    for (int half = 0; half < (GELU ? 2 : 1); half++) {
        mma_stage_up<GELU>(shared, sum, half);
        __syncthreads();
        int which = GELU ? half : -1;
        mma_store(a, shared, rows, {A, first, H, which}, 0);
        mma_store(h, shared + MMA_STAGED, rows, {H, first, H, which}, 0);
        if (!GELU) {
            mma_store(a + H, shared + 2 * MMA_STAGED, rows, {A, first, H, which}, 0);
        }
        __syncthreads();
    }
}

template <bool GELU>
static void mma_launch_up(real_t *a, real_t *h, RowSource x, const real_t *w1, Grouped g) {
    mma_allow_shared(mma_up_kernel<GELU>);
    dim3 grid = mma_grid(g.shape.H, GELU ? MMA_COLUMNS : MMA_HALF, g);
    mma_up_kernel<GELU><<<grid, MMA_THREADS, MMA_SHARED_BYTES, g.stream>>>(a, h, x, w1, g.shape, g.offset);
    CUDA_LAUNCHED();
}

static void mma_up(real_t *a, real_t *h, RowSource x, const real_t *w1, Grouped g) {
    g.shape.act == ACT_GELU ? mma_launch_up<true>(a, h, x, w1, g) : mma_launch_up<false>(a, h, x, w1, g);
}

/* y (rows,N) = x (rows,inner) W of each expert: W (N,inner) read ALONG its rows, or (inner,N) across them. Grid: x the
 * CPU's loop over pieces of rows, y the columns of y. */
template <bool ALONG>
static __global__ void __launch_bounds__(MMA_THREADS, 1)
    mma_product_kernel(real_t *y, const real_t *x, const real_t *w, int N, int inner, int add, ExpertShape shape,
                       const int *offset) {
    extern __shared__ __align__(128) real_t shared[];
    RowTile rows = find_row_tile(offset, shape.E, MMA_ROWS, blockIdx.x);
    if (rows.expert < 0) {
        return;
    }
    int first = blockIdx.y * MMA_COLUMNS;
    RowSource weights = {w + (size_t)rows.expert * N * inner, NULL, 0};
    auto left = mma_operand<MMA_ROWS, true>({x, NULL, 0}, inner, rows.first, rows.end, 0, inner, mma_warp_down());
    auto right = mma_operand<MMA_COLUMNS, ALONG>(weights, ALONG ? inner : N, first, N, 0, inner, mma_warp_across());
    MmaSum sum = {};
    mma_sum(sum, shared, left, right);
#pragma unroll
    for (int i = 0; i < 8; i++) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float *pair = &sum[i / 2][j][i % 2 * 2];
            *mma_staged(shared + j / 4 * MMA_STAGED, i, j % 4) = __floats2bfloat162_rn(pair[0], pair[1]);
        }
    }
    __syncthreads();
    mma_store(y, shared, rows, {N, first, N, 0}, add);
    mma_store(y, shared + MMA_STAGED, rows, {N, first, N, 1}, add);
}

template <bool ALONG>
static void mma_product(real_t *y, const real_t *x, const real_t *w, int N, int inner, int add, Grouped g) {
    mma_allow_shared(mma_product_kernel<ALONG>);
    mma_product_kernel<ALONG><<<mma_grid(N, MMA_COLUMNS, g), MMA_THREADS, MMA_SHARED_BYTES, g.stream>>>(
        y, x, w, N, inner, add, g.shape, g.offset);
    CUDA_LAUNCHED();
}

static void mma_down(real_t *y, const real_t *h, const real_t *w2, int add, Grouped g) {
    mma_product<true>(y, h, w2, g.shape.C, g.shape.H, add, g);
}

/* Half `half` of the tile: a (and up) are staged, become da in place, w h goes beside them. dot takes the thread's
 * share of <u, h> of its rows. */
template <bool GELU>
__device__ static inline void mma_stage_back(real_t *shared, const MmaSum &sum, int half, float (&dot)[8],
                                             const float (&weight)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
#pragma unroll
        for (int f = 0; f < 4; f++) {
            const float *u = &sum[i / 2][4 * half + f][i % 2 * 2];
            __nv_bfloat162 *da = mma_staged(shared, i, f);
            __nv_bfloat162 *da_up = mma_staged(shared + 2 * MMA_STAGED, i, f);
            float2 a = __bfloat1622float2(*da), up = GELU ? float2{0, 0} : __bfloat1622float2(*da_up);
            float w = weight[i];
            HiddenBack b0 = GELU ? gelu_back(a.x, w * u[0]) : swiglu_back(a.x, up.x, w * u[0]);
            HiddenBack b1 = GELU ? gelu_back(a.y, w * u[1]) : swiglu_back(a.y, up.y, w * u[1]);
            *da = __floats2bfloat162_rn(b0.da, b1.da);
            *mma_staged(shared + MMA_STAGED, i, f) = __floats2bfloat162_rn(w * b0.h, w * b1.h);
            if (!GELU) {
                *da_up = __floats2bfloat162_rn(b0.da_up, b1.da_up);
            }
            dot[i] += u[0] * b0.h + u[1] * b1.h;
        }
    }
}

/* The block's part of <u, h> of each row: four threads of a warp, then the warps across, in that order. */
__device__ static inline void mma_store_part(float *part, real_t *shared, RowTile rows, float (&dot)[8]) {
    float *sums = reinterpret_cast<float *>(shared); /* (MMA_WARPS_ACROSS, MMA_ROWS) */
    for (int i = 0; i < 8; i++) {
        dot[i] += __shfl_xor_sync(0xffffffffu, dot[i], 1);
        dot[i] += __shfl_xor_sync(0xffffffffu, dot[i], 2);
        if (threadIdx.x % 4 == 0) {
            sums[threadIdx.x / 32 % MMA_WARPS_ACROSS * MMA_ROWS + mma_thread_row() + 8 * i] = dot[i];
        }
    }
    __syncthreads();
    if (threadIdx.x < MMA_ROWS && rows.first + (int)threadIdx.x < rows.end) {
        float total = 0;
        for (int w = 0; w < MMA_WARPS_ACROSS; w++) {
            total += sums[w * MMA_ROWS + threadIdx.x];
        }
        part[rows.first + threadIdx.x] = total;
    }
}

/* Grid: x the CPU's loop over pieces of rows, y columns of h, 256 to a block. part (blocks in y, shape.rows) takes each
 * block's share of <u, h>. */
template <bool GELU>
static __global__ void __launch_bounds__(MMA_THREADS, 1)
    mma_hidden_kernel(real_t *h, real_t *da, float *part, RowSource dy, const real_t *a, const acc_t *row_weight,
                      const real_t *w2, ExpertShape shape, const int *offset) {
    extern __shared__ __align__(128) real_t shared[];
    RowTile rows = find_row_tile(offset, shape.E, MMA_ROWS, blockIdx.x);
    if (rows.expert < 0) {
        return;
    }
    int C = shape.C, H = shape.H, A = GELU ? H : 2 * H, first = blockIdx.y * MMA_COLUMNS;
    RowSource w = {w2 + (size_t)rows.expert * C * H, NULL, 0};
    auto left = mma_operand<MMA_ROWS, true>(dy, C, rows.first, rows.end, 0, C, mma_warp_down());
    auto right = mma_operand<MMA_COLUMNS, false>(w, H, first, H, 0, C, mma_warp_across());
    MmaSum u = {};
    mma_sum(u, shared, left, right);
    float weight[8], dot[8] = {};
    for (int i = 0; i < 8; i++) {
        int row = rows.first + mma_thread_row() + 8 * i;
        weight[i] = row_weight && row < rows.end ? row_weight[row] : 1;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        MmaColumns of_a = {A, first, H, half}, of_h = {H, first, H, half};
        mma_load(shared, a, rows, of_a);
        if (!GELU) {
            mma_load(shared + 2 * MMA_STAGED, a + H, rows, of_a);
        }
        copies_wait<0>();
        __syncthreads();
        mma_stage_back<GELU>(shared, u, half, dot, weight);
        __syncthreads();
        mma_store(da, shared, rows, of_a, 0);
        mma_store(h, shared + MMA_STAGED, rows, of_h, 0);
        if (!GELU) {
            mma_store(da + H, shared + 2 * MMA_STAGED, rows, of_a, 0);
        }
        __syncthreads();
    }
    if (part) {
        mma_store_part(part + (size_t)blockIdx.y * shape.rows, shared, rows, dot);
    }
}

template <bool GELU>
static void mma_launch_hidden(real_t *h, real_t *da, acc_t *drow_weight, RowSource dy, const real_t *a,
                              const acc_t *row_weight, const real_t *w2, Grouped g) {
    mma_allow_shared(mma_hidden_kernel<GELU>);
    dim3 grid = mma_grid(g.shape.H, MMA_COLUMNS, g);
    float *part = drow_weight ? (float *)cuda_workspace((size_t)grid.y * g.shape.rows * sizeof(float)) : NULL;
    mma_hidden_kernel<GELU>
        <<<grid, MMA_THREADS, MMA_SHARED_BYTES, g.stream>>>(h, da, part, dy, a, row_weight, w2, g.shape, g.offset);
    CUDA_LAUNCHED();
    sum_parts(drow_weight, part, grid.y, g);
}

static void mma_hidden(real_t *h, real_t *da, acc_t *drow_weight, RowSource dy, const real_t *a,
                       const acc_t *row_weight, const real_t *w2, Grouped g) {
    g.shape.act == ACT_GELU ? mma_launch_hidden<true>(h, da, drow_weight, dy, a, row_weight, w2, g)
                            : mma_launch_hidden<false>(h, da, drow_weight, dy, a, row_weight, w2, g);
}

static void mma_input(real_t *dx, const real_t *da, const real_t *w1, int add, Grouped g) {
    mma_product<false>(dx, da, w1, g.shape.C, experts_a_width(g.shape), add, g);
}

/* Grid: z experts, y rows of dw, x columns: the CPU's second sweep. The sum runs over the expert's rows. */
static __global__ void __launch_bounds__(MMA_THREADS, 1)
    mma_weight_kernel(acc_t *dw, RowSource left, RowSource right, int M, int N, int add, const int *offset) {
    extern __shared__ __align__(128) real_t shared[];
    int e = blockIdx.z, begin = offset[e], end = offset[e + 1];
    if (begin == end && add) {
        return;
    }
    int first_m = blockIdx.y * MMA_ROWS, first_n = blockIdx.x * MMA_COLUMNS;
    auto of_left = mma_operand<MMA_ROWS, false>(left, M, first_m, M, begin, end, mma_warp_down());
    auto of_right = mma_operand<MMA_COLUMNS, false>(right, N, first_n, N, begin, end, mma_warp_across());
    MmaSum sum = {};
    mma_sum(sum, shared, of_left, of_right);
    int across = mma_warp_across() + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int m = first_m + mma_thread_row() + 8 * i;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            int n = first_n + across + 8 * j;
            if (m < M && n < N) {
                float2 *element = reinterpret_cast<float2 *>(dw + ((size_t)e * M + m) * N + n);
                float2 old = add ? *element : float2{0, 0};
                *element = {old.x + sum[i / 2][j][i % 2 * 2], old.y + sum[i / 2][j][i % 2 * 2 + 1]};
            }
        }
    }
}

static void mma_weight(acc_t *dw, RowSource left, RowSource right, int M, int N, int add, Grouped g) {
    mma_allow_shared(mma_weight_kernel);
    dim3 grid(ceil_div(N, MMA_COLUMNS), ceil_div(M, MMA_ROWS), g.shape.E);
    mma_weight_kernel<<<grid, MMA_THREADS, MMA_SHARED_BYTES, g.stream>>>(dw, left, right, M, N, add, g.offset);
    CUDA_LAUNCHED();
}

#endif
