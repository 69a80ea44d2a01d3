/* One (sequence, head) at a time and in it some query rows at a time, whose scores against all keys that they see stand
 * in a buffer on the stack: two matrix products with a softmax between them. The keys go up to the last row's own, or
 * to the end where attention is bidirectional. Forward runs over (sequence, query head), backward over (sequence,
 * key/value head), so that the gradients of a key and a value have one owner. */
#include "attention.h"

#include <assert.h>

#include "check.h"
#include "tile.h"

enum {
    QUERY_ROWS = 96, /* whole tiles and whole panels on every machine (tile.h) */
    MOST_SCORES = 48 * 1024,
};

/* Scores stand in rows of whole LANES, so that the loops over a row need no remainder. */
static int score_stride(int keys) {
    return (keys + LANES - 1) / LANES * LANES;
}

/* Query rows taken at once, fewer when their scores against T keys would not fit. */
static int query_rows(int T) {
    CHECK(T <= MOST_SCORES - LANES, "attention over %d tokens: the CPU kernel takes at most %d; lower --seq", T,
          MOST_SCORES - LANES);
    int stride = score_stride(T);
    return QUERY_ROWS * stride <= MOST_SCORES ? QUERY_ROWS : MOST_SCORES / stride;
}

/* Hides what a row of raw scores may not see: minus infinity up to whole LANES, whose exponential is 0, and 0 beyond.
 * Returns where that is. */
static int hide_later(real_t *s, int visible, int stride) {
    int whole = score_stride(visible);
    for (int j = visible; j < whole; j++) {
        s[j] = -INFINITY;
    }
    memset(s + whole, 0, sizeof(real_t) * (stride - whole));
    return whole;
}

/* Softmax of one row of raw scores: the first `visible` become probabilities, the rest 0. Returns the log-sum-exp. */
static acc_t softmax_row(real_t *s, int visible, int stride, real_t scale) {
    int whole = hide_later(s, visible, stride);
    real_t largest = largest_of(s, visible);
    acc_t lane[LANES] = {0};
    for (int j = 0; j < whole; j += LANES) {
        for (int i = 0; i < LANES; i++) {
            s[j + i] = exp_fast((s[j + i] - largest) * scale);
            lane[i] += s[j + i];
        }
    }
    acc_t sum = lanes_sum(lane);
    real_t inverse = 1 / sum;
    for (int j = 0; j < whole; j++) {
        s[j] *= inverse;
    }
    return largest * scale + (acc_t)log(sum);
}

/* How many keys, from the first on, the query at position t sees. */
static int visible_keys(AttentionShape shape, int t) {
    return shape.causal ? t + 1 : shape.T;
}

/* out (rows, HS) of the queries at positions first .. first+rows-1; lse (rows) may be NULL. */
static void attend(real_t *out, size_t out_row, acc_t *lse, const real_t *q, size_t q_row, const real_t *k,
                   size_t k_row, const real_t *v, size_t v_row, int first, int rows, AttentionShape shape) {
    real_t scores[MOST_SCORES] __attribute__((aligned(64)));
    int HS = shape.HS, keys = visible_keys(shape, first + rows - 1), stride = score_stride(keys);
    block_multiply(scores, stride, q, q_row, 1, k, 1, k_row, rows, keys, HS, 0);
    for (int t = 0; t < rows; t++) {
        int visible = visible_keys(shape, first + t);
        acc_t row_lse = softmax_row(scores + (size_t)t * stride, visible, stride, 1 / (real_t)sqrt(HS));
        if (lse) {
            lse[t] = row_lse;
        }
    }
    block_multiply(out, out_row, scores, stride, 1, v, v_row, 1, rows, HS, keys, 0);
}

void attention_forward(real_t *out, acc_t *lse, const real_t *qk, const real_t *qkv, AttentionShape shape,
                       Stream *stream) {
    int B = shape.B, T = shape.T, NH = shape.NH, NKV = shape.NKV, HS = shape.HS;
    size_t qk_width = (size_t)(NH + NKV) * HS, width = qk_width + (size_t)NKV * HS;
    int size = query_rows(T), blocks = (T + size - 1) / size;
#pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < B * NH * blocks; i++) {
        int b = i / blocks / NH, head = i / blocks % NH, first = i % blocks * size;
        int rows = T - first < size ? T - first : size;
        int kv_head = head / (NH / NKV);
        const real_t *k = qk + (size_t)b * T * qk_width + (NH + kv_head) * HS;
        const real_t *v = qkv + (size_t)b * T * width + qk_width + kv_head * HS;
        size_t row = (size_t)b * T + first;
        attend(out + (row * NH + head) * HS, (size_t)NH * HS, lse + ((size_t)b * NH + head) * T + first,
               qk + row * qk_width + head * HS, qk_width, k, qk_width, v, width, first, rows, shape);
    }
}

/* From raw scores p and dp to p = exp(score - lse) and ds = p (dp - d) / sqrt(HS), which takes the place of dp. */
static void softmax_row_backward(real_t *restrict p, real_t *restrict dp, int visible, int stride, acc_t lse, real_t d,
                                 real_t scale) {
    int whole = hide_later(p, visible, stride);
    memset(dp + visible, 0, sizeof(real_t) * (stride - visible));
    for (int j = 0; j < whole; j++) {
        p[j] = exp_fast(p[j] * scale - lse);
        dp[j] = p[j] * (dp[j] - d) * scale;
    }
}

void attention_backward(real_t *dqkv, const real_t *dout, const real_t *out, const acc_t *lse, const real_t *qk,
                        const real_t *qkv, AttentionShape shape, Stream *stream) {
    int B = shape.B, T = shape.T, NH = shape.NH, NKV = shape.NKV, HS = shape.HS;
    size_t qk_width = (size_t)(NH + NKV) * HS, width = qk_width + (size_t)NKV * HS, out_width = (size_t)NH * HS;
    int size = query_rows(T), group = NH / NKV;
    real_t scale = 1 / (real_t)sqrt(HS);
#pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < B * NKV; i++) {
        real_t p[MOST_SCORES] __attribute__((aligned(64)));
        real_t ds[MOST_SCORES] __attribute__((aligned(64)));
        int b = i / NKV, kv_head = i % NKV;
        size_t start = (size_t)b * T;
        const real_t *k = qk + start * qk_width + (NH + kv_head) * HS;
        const real_t *v = qkv + start * width + qk_width + kv_head * HS;
        real_t *dk = dqkv + start * width + (NH + kv_head) * HS, *dv = dk + NKV * HS;
        for (int t = 0; t < T; t++) {
            memset(dk + t * width, 0, sizeof(real_t) * HS);
            memset(dv + t * width, 0, sizeof(real_t) * HS);
        }
        for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
            for (int first = 0; first < T; first += size) {
                int rows = T - first < size ? T - first : size;
                int keys = visible_keys(shape, first + rows - 1), stride = score_stride(keys);
                const real_t *q = qk + (start + first) * qk_width + head * HS;
                const real_t *o = out + (start + first) * out_width + head * HS;
                const real_t *d_o = dout + (start + first) * out_width + head * HS;
                const acc_t *row_lse = lse + ((size_t)b * NH + head) * T + first;
                block_multiply(p, stride, q, qk_width, 1, k, 1, qk_width, rows, keys, HS, 0);
                block_multiply(ds, stride, d_o, out_width, 1, v, 1, width, rows, keys, HS, 0);
                for (int t = 0; t < rows; t++) {
                    real_t d = dot(d_o + t * out_width, o + t * out_width, HS);
                    softmax_row_backward(p + (size_t)t * stride, ds + (size_t)t * stride,
                                         visible_keys(shape, first + t), stride, row_lse[t], d, scale);
                }
                block_multiply(dv, width, p, 1, stride, d_o, out_width, 1, keys, HS, rows, 1);
                block_multiply(dk, width, ds, 1, stride, q, qk_width, 1, keys, HS, rows, 1);
                block_multiply(dqkv + (start + first) * width + head * HS, width, ds, stride, 1, k, qk_width, 1, rows,
                               HS, keys, 0);
            }
        }
    }
}

void attention_decode(real_t *out, real_t *keys, real_t *values, const real_t *qk, const real_t *qkv, int position,
                      AttentionShape shape, Stream *stream) {
    assert(shape.causal);
    int B = shape.B, T = shape.T, NH = shape.NH, NKV = shape.NKV, HS = shape.HS;
    size_t kv_width = (size_t)NKV * HS, qk_width = (size_t)NH * HS + kv_width;
#pragma omp parallel for
    for (int i = 0; i < B * NKV; i++) {
        int b = i / NKV, kv_head = i % NKV;
        const real_t *row = qk + b * qk_width, *value = qkv + b * (qk_width + kv_width) + qk_width + kv_head * HS;
        real_t *k = keys + (size_t)b * T * kv_width + kv_head * HS,
               *v = values + (size_t)b * T * kv_width + kv_head * HS;
        memcpy(k + position * kv_width, row + (NH + kv_head) * HS, sizeof(real_t) * HS);
        memcpy(v + position * kv_width, value, sizeof(real_t) * HS);
        for (int head = kv_head * (NH / NKV); head < (kv_head + 1) * (NH / NKV); head++) {
            attend(out + ((size_t)b * NH + head) * HS, HS, NULL, row + head * HS, qk_width, k, kv_width, v, kv_width,
                   position, 1, shape);
        }
    }
}

void attention_keep(real_t *keys, real_t *values, const real_t *qk, const real_t *qkv, int length, AttentionShape shape,
                    Stream *stream) {
    int T = shape.T, NH = shape.NH, HS = shape.HS;
    size_t kv_width = (size_t)shape.NKV * HS, qk_width = (size_t)NH * HS + kv_width;
#pragma omp parallel for
    for (int row = 0; row < shape.B * T; row++) {
        size_t place = ((size_t)(row / T) * length + row % T) * kv_width;
        memcpy(keys + place, qk + row * qk_width + (size_t)NH * HS, sizeof(real_t) * kv_width);
        memcpy(values + place, qkv + row * (qk_width + kv_width) + qk_width, sizeof(real_t) * kv_width);
    }
}
