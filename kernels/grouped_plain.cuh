/* The five products for any width, either number type, any card: what the fp32 build runs, and the bf16 build where
 * widths or addresses do not suit the tensor cores.
 *
 * A block of 256 threads owns 64 x 64 elements of a result, a thread 4 x 4 of them. Both operands pass through shared
 * memory, 16 deep, as floats. Thread (x, y) owns rows y + 16 i and columns x + 16 j, so that a warp's accesses to
 * either tile touch different banks or the same word.
 *
 * Every operand is a row-major matrix. The summed index runs along its rows (W1 in `up`) or across them (W1 in
 * `input`): that is all that tells the five products apart before their results are stored. */
#ifndef KERNELS_GROUPED_PLAIN_CUH
#define KERNELS_GROUPED_PLAIN_CUH

#include "grouped_tile.cuh"

enum { PLAIN_TILE = 64, PLAIN_HALF = PLAIN_TILE / 2, PLAIN_DEPTH = 16, PLAIN_SIDE = 16, PLAIN_EACH = 4 };

/* A matrix of rows of `width` numbers. The tile takes the 32 indices from first[0] and the 32 from first[1]; those not
 * below end[] count as zero. Two halves, because SwiGLU's tile is columns of the gate beside the same ones of up. */
typedef struct {
    RowSource rows;
    int width;
    int first[2], end[2];
} PlainOperand;

__device__ static inline PlainOperand plain_run(RowSource rows, int width, int first, int end) {
    return {rows, width, {first, first + PLAIN_HALF}, {end, end}};
}

__device__ static inline PlainOperand plain_weights(const real_t *w, int width, int first, int end) {
    return plain_run({w, NULL, 0}, width, first, end);
}

/* Element `outer` of the tile at inner index k. */
template <bool ALONG>
__device__ static inline float plain_at(const PlainOperand &m, int outer, int k, int k_end) {
    bool upper = outer >= PLAIN_HALF;
    int index = outer % PLAIN_HALF + (upper ? m.first[1] : m.first[0]);
    if (index >= (upper ? m.end[1] : m.end[0]) || k >= k_end) {
        return 0;
    }
    int row = source_row(m.rows, ALONG ? index : k);
    return row < 0 ? 0 : to_float(m.rows.x[(size_t)row * m.width + (ALONG ? k : index)]);
}

/* tile[k][outer]; neighbouring threads read neighbouring addresses of a row. */
template <bool ALONG>
__device__ static inline void plain_load(float (*tile)[PLAIN_TILE + 1], const PlainOperand &m, int k, int k_end) {
    for (int i = threadIdx.x; i < PLAIN_TILE * PLAIN_DEPTH; i += blockDim.x) {
        int depth = ALONG ? i % PLAIN_DEPTH : i / PLAIN_TILE, outer = ALONG ? i / PLAIN_DEPTH : i % PLAIN_TILE;
        tile[depth][outer] = plain_at<ALONG>(m, outer, k + depth, k_end);
    }
}

/* sum[i][j] = sum of left * right over k = k_first .. k_end - 1, ascending, for the thread's rows and columns. */
template <bool LEFT_ALONG, bool RIGHT_ALONG>
__device__ static void plain_sum(float (&sum)[PLAIN_EACH][PLAIN_EACH], const PlainOperand &left,
                                 const PlainOperand &right, int k_first, int k_end) {
    __shared__ float left_tile[PLAIN_DEPTH][PLAIN_TILE + 1], right_tile[PLAIN_DEPTH][PLAIN_TILE + 1];
    int x = threadIdx.x % PLAIN_SIDE, y = threadIdx.x / PLAIN_SIDE;
    for (int k = k_first; k < k_end; k += PLAIN_DEPTH) {
        plain_load<LEFT_ALONG>(left_tile, left, k, k_end);
        plain_load<RIGHT_ALONG>(right_tile, right, k, k_end);
        __syncthreads();
#pragma unroll
        for (int depth = 0; depth < PLAIN_DEPTH; depth++) {
#pragma unroll
            for (int i = 0; i < PLAIN_EACH; i++) {
#pragma unroll
                for (int j = 0; j < PLAIN_EACH; j++) {
                    sum[i][j] += left_tile[depth][y + PLAIN_SIDE * i] * right_tile[depth][x + PLAIN_SIDE * j];
                }
            }
        }
        __syncthreads();
    }
}

/* h of an activation with a single a; s is scale. */
__device__ static inline float plain_active(float a, Activation act, float scale) {
    return act == ACT_GELU ? gelu(a) : scale * (act == ACT_SILU ? silu(a) : a);
}

__device__ static inline HiddenBack plain_active_back(float a, float wu, Activation act, float scale) {
    return act == ACT_GELU   ? gelu_back(a, wu)
           : act == ACT_SILU ? silu_back(a, wu, scale)
                             : HiddenBack{scale * a, wu * scale, 0};
}

/* Grid: x the CPU's loop over pieces of rows, y its loop over columns of a (SwiGLU: 32 of the gate and the same 32 of
 * up; others: 64). */
static __global__ void plain_up_kernel(real_t *a, real_t *h, RowSource x, const real_t *w1, float scale,
                                       ExpertShape shape, const int *offset) {
    RowTile rows = find_row_tile(offset, shape.E, PLAIN_TILE, blockIdx.x);
    if (rows.expert < 0) {
        return;
    }
    bool gated = shape.act == ACT_SWIGLU;
    int C = shape.C, H = shape.H, A = gated ? 2 * H : H, hidden = gated ? PLAIN_HALF : PLAIN_TILE;
    int first = blockIdx.y * hidden;
    PlainOperand left = plain_run(x, C, rows.first, rows.end);
    PlainOperand right = plain_weights(w1 + (size_t)rows.expert * A * C, C, first, H);
    if (gated) {
        right.first[1] = H + first;
        right.end[1] = 2 * H;
    }
    float sum[PLAIN_EACH][PLAIN_EACH] = {};
    plain_sum<true, true>(sum, left, right, 0, C);
#pragma unroll
    for (int i = 0; i < PLAIN_EACH; i++) {
        size_t r = rows.first + threadIdx.x / PLAIN_SIDE + PLAIN_SIDE * i;
#pragma unroll
        for (int j = 0; j < PLAIN_EACH; j++) {
            int c = first + threadIdx.x % PLAIN_SIDE + PLAIN_SIDE * j;
            if (r >= rows.end || c >= H || c >= first + hidden) {
                continue;
            }
            real_t gate = to_real<real_t>(sum[i][j]), up = to_real<real_t>(sum[i][(j + 2) % PLAIN_EACH]);
            a[r * A + c] = gate; /* h is made of what was rounded, as the backward makes it again */
            if (!gated) {
                h[r * H + c] = to_real<real_t>(plain_active(to_float(gate), shape.act, scale));
            } else {
                a[r * A + H + c] = up;
                h[r * H + c] = to_real<real_t>(swiglu(to_float(gate), to_float(up)));
            }
        }
    }
}

static void plain_up(real_t *a, real_t *h, RowSource x, const real_t *w1, Grouped g) {
    int hidden = g.shape.act == ACT_SWIGLU ? PLAIN_HALF : PLAIN_TILE;
    dim3 grid(most_row_tiles(g.shape, PLAIN_TILE), ceil_div(g.shape.H, hidden));
    float scale = (float)experts_scale(g.shape);
    plain_up_kernel<<<grid, PLAIN_SIDE * PLAIN_SIDE, 0, g.stream>>>(a, h, x, w1, scale, g.shape, g.offset);
    CUDA_LAUNCHED();
}

/* y (rows,N) = x (rows,inner) W of each expert: W (N,inner) read ALONG its rows, or (inner,N) across them. Grid: x the
 * CPU's loop over pieces of rows, y the columns of y. */
template <bool ALONG>
static __global__ void plain_product_kernel(real_t *y, const real_t *x, const real_t *w, int N, int inner, int add,
                                            ExpertShape shape, const int *offset) {
    RowTile rows = find_row_tile(offset, shape.E, PLAIN_TILE, blockIdx.x);
    if (rows.expert < 0) {
        return;
    }
    int first = blockIdx.y * PLAIN_TILE;
    PlainOperand left = plain_weights(x, inner, rows.first, rows.end);
    PlainOperand right = plain_weights(w + (size_t)rows.expert * N * inner, ALONG ? inner : N, first, N);
    float sum[PLAIN_EACH][PLAIN_EACH] = {};
    plain_sum<true, ALONG>(sum, left, right, 0, inner);
#pragma unroll
    for (int i = 0; i < PLAIN_EACH; i++) {
        size_t r = rows.first + threadIdx.x / PLAIN_SIDE + PLAIN_SIDE * i;
#pragma unroll
        for (int j = 0; j < PLAIN_EACH; j++) {
            int c = first + threadIdx.x % PLAIN_SIDE + PLAIN_SIDE * j;
            if (r < rows.end && c < N) {
                y[r * N + c] = to_real<real_t>(add ? to_float(y[r * N + c]) + sum[i][j] : sum[i][j]);
            }
        }
    }
}

template <bool ALONG>
static void plain_product(real_t *y, const real_t *x, const real_t *w, int N, int inner, int add, Grouped g) {
    dim3 grid(most_row_tiles(g.shape, PLAIN_TILE), ceil_div(N, PLAIN_TILE));
    plain_product_kernel<ALONG>
        <<<grid, PLAIN_SIDE * PLAIN_SIDE, 0, g.stream>>>(y, x, w, N, inner, add, g.shape, g.offset);
    CUDA_LAUNCHED();
}

static void plain_down(real_t *y, const real_t *h, const real_t *w2, int add, Grouped g) {
    plain_product<true>(y, h, w2, experts_y_width(g.shape), g.shape.H, add, g);
}

/* Grid: x the CPU's loop over pieces of rows, y columns of h, 64 to a block. part (blocks in y, shape.rows) takes each
 * block's share of <u, h>. */
static __global__ void plain_hidden_kernel(real_t *h, real_t *da, float *part, RowSource dy, const real_t *a,
                                           const acc_t *row_weight, const real_t *w2, int D, float scale,
                                           ExpertShape shape, const int *offset) {
    RowTile rows = find_row_tile(offset, shape.E, PLAIN_TILE, blockIdx.x);
    if (rows.expert < 0) {
        return;
    }
    bool gated = shape.act == ACT_SWIGLU;
    int H = shape.H, A = gated ? 2 * H : H, first = blockIdx.y * PLAIN_TILE;
    PlainOperand left = plain_run(dy, D, rows.first, rows.end);
    PlainOperand right = plain_weights(w2 + (size_t)rows.expert * D * H, H, first, H);
    float u[PLAIN_EACH][PLAIN_EACH] = {};
    plain_sum<true, false>(u, left, right, 0, D);
#pragma unroll
    for (int i = 0; i < PLAIN_EACH; i++) {
        int r = rows.first + threadIdx.x / PLAIN_SIDE + PLAIN_SIDE * i;
        float w = r < rows.end && row_weight ? row_weight[r] : 1, dot = 0;
#pragma unroll
        for (int j = 0; j < PLAIN_EACH; j++) {
            int c = first + threadIdx.x % PLAIN_SIDE + PLAIN_SIDE * j;
            if (r >= rows.end || c >= H) {
                continue;
            }
            size_t at = (size_t)r * A + c;
            HiddenBack back = gated ? swiglu_back(to_float(a[at]), to_float(a[at + H]), w * u[i][j])
                                    : plain_active_back(to_float(a[at]), w * u[i][j], shape.act, scale);
            da[at] = to_real<real_t>(back.da);
            if (gated) {
                da[at + H] = to_real<real_t>(back.da_up);
            }
            h[(size_t)r * H + c] = to_real<real_t>(w * back.h);
            dot += u[i][j] * back.h;
        }
        for (int lane = PLAIN_SIDE / 2; lane > 0; lane /= 2) { /* the 16 threads of a row are half a warp */
            dot += __shfl_xor_sync(0xffffffffu, dot, lane);
        }
        if (part && r < rows.end && threadIdx.x % PLAIN_SIDE == 0) {
            part[(size_t)blockIdx.y * shape.rows + r] = dot;
        }
    }
}

static void plain_hidden(real_t *h, real_t *da, acc_t *drow_weight, RowSource dy, const real_t *a,
                         const acc_t *row_weight, const real_t *w2, Grouped g) {
    dim3 grid(most_row_tiles(g.shape, PLAIN_TILE), ceil_div(g.shape.H, PLAIN_TILE));
    float *part = drow_weight ? (float *)cuda_workspace((size_t)grid.y * g.shape.rows * sizeof(float)) : NULL;
    plain_hidden_kernel<<<grid, PLAIN_SIDE * PLAIN_SIDE, 0, g.stream>>>(
        h, da, part, dy, a, row_weight, w2, experts_y_width(g.shape), (float)experts_scale(g.shape), g.shape, g.offset);
    CUDA_LAUNCHED();
    sum_parts(drow_weight, part, grid.y, g);
}

static void plain_input(real_t *dx, const real_t *da, const real_t *w1, int add, Grouped g) {
    plain_product<false>(dx, da, w1, g.shape.C, experts_a_width(g.shape), add, g);
}

/* Grid: z experts, y rows of dw, x columns: the CPU's second sweep. The sum runs over the expert's rows. */
static __global__ void plain_weight_kernel(acc_t *dw, RowSource left, RowSource right, int M, int N, int add,
                                           const int *offset) {
    int e = blockIdx.z, begin = offset[e], end = offset[e + 1];
    if (begin == end && add) {
        return;
    }
    int first_m = blockIdx.y * PLAIN_TILE, first_n = blockIdx.x * PLAIN_TILE;
    float sum[PLAIN_EACH][PLAIN_EACH] = {};
    plain_sum<false, false>(sum, plain_run(left, M, first_m, M), plain_run(right, N, first_n, N), begin, end);
#pragma unroll
    for (int i = 0; i < PLAIN_EACH; i++) {
        int m = first_m + threadIdx.x / PLAIN_SIDE + PLAIN_SIDE * i;
#pragma unroll
        for (int j = 0; j < PLAIN_EACH; j++) {
            int n = first_n + threadIdx.x % PLAIN_SIDE + PLAIN_SIDE * j;
            if (m < M && n < N) {
                acc_t *element = dw + ((size_t)e * M + m) * N + n;
                *element = (add ? *element : 0) + sum[i][j];
            }
        }
    }
}

static void plain_weight(acc_t *dw, RowSource left, RowSource right, int M, int N, int add, Grouped g) {
    dim3 grid(ceil_div(N, PLAIN_TILE), ceil_div(M, PLAIN_TILE), g.shape.E);
    plain_weight_kernel<<<grid, PLAIN_SIDE * PLAIN_SIDE, 0, g.stream>>>(dw, left, right, M, N, add, g.offset);
    CUDA_LAUNCHED();
}

#endif
