/* Attention for any head size and number type: the tiles of flash attention with 32 rows and ordinary arithmetic.
 *
 *     plain_forward       owns query rows, runs over the tiles of keys and values:    out, lse
 *     plain_backward_q    the same:                                                   dq, and D for the next
 *     plain_backward_kv   owns keys and values, runs over the tiles of queries:       dk, dv
 *
 * A block of 16 x 16 threads owns 32 rows and 64 columns of its result; scores are summed over all columns, 64 at a
 * time, so that no head is too wide for shared memory. With x = thread % 16 and y = thread / 16, a thread keeps 2 x 2
 * scores, rows y + 16 * i and columns x + 16 * j, and 2 x 4 sums, columns x + 16 * j of the 64. Called by attention.cu.
 */
#ifndef KERNELS_ATTENTION_PLAIN_CUH
#define KERNELS_ATTENTION_PLAIN_CUH

#include "cuda.cuh"
extern "C" {
#include "attention.h"
}

enum {
    PLAIN_ROWS = 32,
    PLAIN_COLS = 64,
    PLAIN_THREADS = 256,
};

/* One place more than a row: neighbours down a column are in different banks. */
typedef float PlainTile[PLAIN_ROWS][PLAIN_COLS + 1];
typedef float PlainScores[PLAIN_ROWS][PLAIN_ROWS + 1];

/* Rows first .. first+31 of a matrix with `rows` rows, columns col .. col+63 of `cols`; zeros outside. */
__device__ static inline void plain_load(PlainTile tile, const real_t *from, size_t stride, int first, int rows,
                                         int col, int cols) {
    __syncthreads();
    for (int i = threadIdx.x; i < PLAIN_ROWS * PLAIN_COLS; i += PLAIN_THREADS) {
        int r = i / PLAIN_COLS, c = i % PLAIN_COLS;
        bool there = first + r < rows && col + c < cols;
        tile[r][c] = there ? to_float(from[(first + r) * stride + col + c]) : 0;
    }
    __syncthreads();
}

/* s = a b^T over all columns, of 32 rows from a_first and b_first on */
__device__ static inline void plain_scores(float (&s)[2][2], PlainTile left, PlainTile right, const real_t *a,
                                           size_t a_stride, int a_first, const real_t *b, size_t b_stride, int b_first,
                                           int T, int HS) {
    int x = threadIdx.x % 16, y = threadIdx.x / 16;
    s[0][0] = s[0][1] = s[1][0] = s[1][1] = 0;
    for (int col = 0; col < HS; col += PLAIN_COLS) {
        plain_load(left, a, a_stride, a_first, T, col, HS);
        plain_load(right, b, b_stride, b_first, T, col, HS);
        int cols = HS - col < PLAIN_COLS ? HS - col : PLAIN_COLS;
        for (int c = 0; c < cols; c++) {
            for (int i = 0; i < 2; i++) {
                for (int j = 0; j < 2; j++) {
                    s[i][j] += left[y + 16 * i][c] * right[x + 16 * j][c];
                }
            }
        }
    }
}

/* Scores into shared memory, where the product with the next tile reads them by rows */
__device__ static inline void plain_keep(PlainScores scores, const float (&s)[2][2]) {
    int x = threadIdx.x % 16, y = threadIdx.x / 16;
    __syncthreads();
    for (int i = 0; i < 2; i++) {
        for (int j = 0; j < 2; j++) {
            scores[y + 16 * i][x + 16 * j] = s[i][j];
        }
    }
}

/* o += scores b, b a tile of 32 rows; plain_load of b stood between, so that all scores are there. */
__device__ static inline void plain_multiply(float (&o)[2][4], PlainScores scores, PlainTile b) {
    int x = threadIdx.x % 16, y = threadIdx.x / 16;
    for (int k = 0; k < PLAIN_ROWS; k++) {
        for (int i = 0; i < 2; i++) {
            for (int j = 0; j < 4; j++) {
                o[i][j] += scores[y + 16 * i][k] * b[k][x + 16 * j];
            }
        }
    }
}

/* Rows of o, times factor[i], to rows first .. of `to`, columns col .. */
__device__ static inline void plain_store(real_t *to, size_t stride, const float (&o)[2][4], const float (&factor)[2],
                                          int first, int T, int col, int HS) {
    int x = threadIdx.x % 16, y = threadIdx.x / 16;
    for (int i = 0; i < 2; i++) {
        for (int j = 0; j < 4; j++) {
            int row = first + y + 16 * i, c = col + x + 16 * j;
            if (row < T && c < HS) {
                to[row * stride + c] = to_real<real_t>(o[i][j] * factor[i]);
            }
        }
    }
}

/* Over the 16 threads of a row */
__device__ static inline float row_max(float x) {
    for (int lane = 8; lane > 0; lane /= 2) {
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
    }
    return x;
}

__device__ static inline float row_sum(float x) {
    for (int lane = 8; lane > 0; lane /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, lane);
    }
    return x;
}

__device__ static inline bool plain_sees(AttentionShape shape, int query, int key) {
    return key < shape.T && (!shape.causal || key <= query);
}

/* What a block owns: rows from `first` and columns from `col` on of one of `heads` heads of sequence b */
typedef struct {
    int b, head, first, col;
} PlainOwner;

static int plain_blocks(AttentionShape shape, int heads) {
    return shape.B * heads * ceil_div(shape.T, PLAIN_ROWS) * ceil_div(shape.HS, PLAIN_COLS);
}

__device__ static inline PlainOwner plain_owner(AttentionShape shape, int heads) {
    int cols = (shape.HS + PLAIN_COLS - 1) / PLAIN_COLS, rows = (shape.T + PLAIN_ROWS - 1) / PLAIN_ROWS;
    int tile = blockIdx.x / cols, head = tile / rows;
    PlainOwner own = {head / heads, head % heads, tile % rows * PLAIN_ROWS, (int)blockIdx.x % cols * PLAIN_COLS};
    return own;
}

/* Past the last key that a row of the tile from `first` on sees */
__device__ static inline int plain_keys(AttentionShape shape, int first) {
    return shape.causal && first + PLAIN_ROWS < shape.T ? first + PLAIN_ROWS : shape.T;
}

/* One row of two scores joins the softmax, as in flash attention: s becomes exp(scale s - largest). Returns by how much
 * earlier sums shrink. Every tile is entered by a row that sees at least its first key or has seen one before. */
__device__ static inline float plain_softmax(float (&s)[2], float *largest, float *sum, float scale) {
    float most = fmaxf(*largest, row_max(fmaxf(s[0], s[1])));
    float shrink = expf((*largest - most) * scale);
    s[0] = expf((s[0] - most) * scale);
    s[1] = expf((s[1] - most) * scale);
    *sum = *sum * shrink + row_sum(s[0] + s[1]);
    *largest = most;
    return shrink;
}

/* blockIdx.x replaces the loops over sequence, head, tiles of query rows and 64 columns of out. */
__global__ static void __launch_bounds__(PLAIN_THREADS)
    plain_forward(real_t *out, acc_t *lse, const real_t *qk, const real_t *qkv, AttentionShape shape) {
    __shared__ PlainTile left, right;
    __shared__ PlainScores scores;
    int T = shape.T, NH = shape.NH, NKV = shape.NKV, HS = shape.HS, x = threadIdx.x % 16, y = threadIdx.x / 16;
    size_t qk_width = (size_t)(NH + NKV) * HS, width = qk_width + (size_t)NKV * HS;
    PlainOwner own = plain_owner(shape, NH);
    const real_t *sequence = qk + own.b * T * qk_width, *q = sequence + own.head * HS;
    int kv_head = own.head / (NH / NKV);
    const real_t *k = sequence + (NH + kv_head) * HS, *v = qkv + own.b * T * width + qk_width + kv_head * HS;
    float scale = 1 / sqrtf((float)HS), s[2][2], o[2][4] = {}, largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    for (int key = 0; key < plain_keys(shape, own.first); key += PLAIN_ROWS) {
        plain_scores(s, left, right, q, qk_width, own.first, k, qk_width, key, T, HS);
        for (int i = 0; i < 2; i++) {
            for (int j = 0; j < 2; j++) {
                bool sees = plain_sees(shape, own.first + y + 16 * i, key + x + 16 * j);
                s[i][j] = sees ? s[i][j] : -INFINITY;
            }
            float shrink = plain_softmax(s[i], &largest[i], &sum[i], scale);
            for (int j = 0; j < 4; j++) {
                o[i][j] *= shrink;
            }
        }
        plain_keep(scores, s);
        plain_load(right, v, width, key, T, own.col, HS);
        plain_multiply(o, scores, right);
    }
    float factor[2] = {1 / sum[0], 1 / sum[1]};
    plain_store(out + ((size_t)own.b * T * NH + own.head) * HS, (size_t)NH * HS, o, factor, own.first, T, own.col, HS);
    for (int i = 0; i < 2; i++) {
        int row = own.first + y + 16 * i;
        if (own.col == 0 && x == 0 && row < T) {
            lse[((size_t)own.b * NH + own.head) * T + row] = largest[i] * scale + logf(sum[i]);
        }
    }
}

/* d (B,NH,T) = dout . out is written for plain_backward_kv. blockIdx.x replaces the loops over sequence, head, tiles of
 * query rows and 64 columns of dq. */
__global__ static void __launch_bounds__(PLAIN_THREADS)
    plain_backward_q(real_t *dqkv, float *d, const real_t *dout, const real_t *out, const acc_t *lse, const real_t *qk,
                     const real_t *qkv, AttentionShape shape) {
    __shared__ PlainTile left, right;
    __shared__ PlainScores scores;
    int T = shape.T, NH = shape.NH, NKV = shape.NKV, HS = shape.HS, x = threadIdx.x % 16, y = threadIdx.x / 16;
    size_t qk_width = (size_t)(NH + NKV) * HS, width = qk_width + (size_t)NKV * HS, out_width = (size_t)NH * HS;
    PlainOwner own = plain_owner(shape, NH);
    const real_t *sequence = qk + own.b * T * qk_width, *q = sequence + own.head * HS;
    int kv_head = own.head / (NH / NKV);
    const real_t *k = sequence + (NH + kv_head) * HS, *v = qkv + own.b * T * width + qk_width + kv_head * HS;
    size_t start = (size_t)own.b * T * out_width + own.head * HS, row_start = ((size_t)own.b * NH + own.head) * T;
    float scale = 1 / sqrtf((float)HS), s[2][2], dp[2][2], dq[2][4] = {}, row_lse[2], row_d[2];
    for (int i = 0; i < 2; i++) {
        int row = own.first + y + 16 * i;
        float part = 0;
        for (int c = x; row < T && c < HS; c += 16) {
            part += to_float(dout[start + row * out_width + c]) * to_float(out[start + row * out_width + c]);
        }
        row_d[i] = row_sum(part);
        row_lse[i] = row < T ? lse[row_start + row] : 0;
        if (own.col == 0 && x == 0 && row < T) {
            d[row_start + row] = row_d[i];
        }
    }
    for (int key = 0; key < plain_keys(shape, own.first); key += PLAIN_ROWS) {
        plain_scores(s, left, right, q, qk_width, own.first, k, qk_width, key, T, HS);
        plain_scores(dp, left, right, dout + start, out_width, own.first, v, width, key, T, HS);
        for (int i = 0; i < 2; i++) {
            for (int j = 0; j < 2; j++) {
                bool sees = plain_sees(shape, own.first + y + 16 * i, key + x + 16 * j);
                s[i][j] = sees ? expf(s[i][j] * scale - row_lse[i]) * (dp[i][j] - row_d[i]) : 0;
            }
        }
        plain_keep(scores, s);
        plain_load(right, k, qk_width, key, T, own.col, HS);
        plain_multiply(dq, scores, right);
    }
    float factor[2] = {scale, scale};
    plain_store(dqkv + own.b * T * width + own.head * HS, width, dq, factor, own.first, T, own.col, HS);
}

/* Rows of the scores are keys here. blockIdx.x replaces the loops over sequence, key/value head, tiles of keys and 64
 * columns of dk and dv. */
__global__ static void __launch_bounds__(PLAIN_THREADS)
    plain_backward_kv(real_t *dqkv, const float *d, const real_t *dout, const acc_t *lse, const real_t *qk,
                      const real_t *qkv, AttentionShape shape) {
    __shared__ PlainTile left, right;
    __shared__ PlainScores scores;
    int T = shape.T, NH = shape.NH, NKV = shape.NKV, HS = shape.HS, x = threadIdx.x % 16, y = threadIdx.x / 16;
    size_t qk_width = (size_t)(NH + NKV) * HS, width = qk_width + (size_t)NKV * HS, out_width = (size_t)NH * HS;
    PlainOwner own = plain_owner(shape, NKV);
    const real_t *sequence = qk + own.b * T * qk_width;
    const real_t *k = sequence + (NH + own.head) * HS, *v = qkv + own.b * T * width + qk_width + own.head * HS;
    float scale = 1 / sqrtf((float)HS), s[2][2], dp[2][2], dk[2][4] = {}, dv[2][4] = {};
    for (int head = own.head * (NH / NKV); head < (own.head + 1) * (NH / NKV); head++) {
        const real_t *q = sequence + head * HS, *dy = dout + own.b * T * out_width + head * HS;
        size_t row_start = ((size_t)own.b * NH + head) * T;
        for (int t = shape.causal ? own.first : 0; t < T; t += PLAIN_ROWS) {
            plain_scores(s, left, right, k, qk_width, own.first, q, qk_width, t, T, HS);
            plain_scores(dp, left, right, v, width, own.first, dy, out_width, t, T, HS);
            for (int i = 0; i < 2; i++) {
                for (int j = 0; j < 2; j++) {
                    int query = t + x + 16 * j;
                    bool sees = query < T && plain_sees(shape, query, own.first + y + 16 * i);
                    s[i][j] = sees ? expf(s[i][j] * scale - lse[row_start + query]) : 0;
                    dp[i][j] = sees ? s[i][j] * (dp[i][j] - d[row_start + query]) : 0;
                }
            }
            plain_keep(scores, s);
            plain_load(right, dy, out_width, t, T, own.col, HS);
            plain_multiply(dv, scores, right);
            plain_keep(scores, dp);
            plain_load(right, q, qk_width, t, T, own.col, HS);
            plain_multiply(dk, scores, right);
        }
    }
    float scaled[2] = {scale, scale}, one[2] = {1, 1};
    real_t *to = dqkv + own.b * T * width + (NH + own.head) * HS;
    plain_store(to, width, dk, scaled, own.first, T, own.col, HS);
    plain_store(to + NKV * HS, width, dv, one, own.first, T, own.col, HS);
}

#endif
