/* The operations of a dense transformer as cases of gradcheck.h: how to make inputs, forward, backward.
 *
 * In data-flow order: embedding (and the tied head), norm, matmul, rope, attention, cross-entropy. The comment behind
 * make_NAME() names its extents. Their shapes are in the table of operations.h.
 */
#ifndef TESTS_OPERATIONS_DENSE_H
#define TESTS_OPERATIONS_DENSE_H

#include "gradcheck.h"

#include "../kernels/attention.h"
#include "../kernels/cross_entropy.h"
#include "../kernels/embedding.h"
#include "../kernels/matmul.h"
#include "../kernels/norm.h"
#include "../kernels/random.h"
#include "../kernels/rope.h"

static inline bool make_embedding(Case *c) { /* N C V */
    int N = c->n[0], C = c->n[1], V = c->n[2];
    add_input(c, "w", (size_t)V * C, ACCUMULATED);
    add_output(c, "x", (size_t)N * C);
    c->index = case_ints(c, (size_t)N);
    for (int n = 0; n < N; n++) {
        c->index[n] = (int)random_below(random_key(c->seed, RANDOM_TEST, 5), (uint64_t)n, (uint64_t)V);
    }
    return true;
}

static inline void embedding_case_forward(Case *c) {
    embedding_forward(val(c, "x"), c->index, val(c, "w"), c->n[0], c->n[1], NULL);
}

static inline void embedding_case_backward(Case *c) {
    embedding_backward(grad(c, "w"), grad(c, "x"), c->index, c->n[0], c->n[1], c->n[2], NULL);
}

/* The head is the embedding: w is used twice and its gradient has two terms. */
static inline bool make_tied(Case *c) { /* N C V */
    int N = c->n[0], C = c->n[1], V = c->n[2];
    make_embedding(c);
    add_output(c, "logits", (size_t)N * V);
    add_scratch(c, "dx", (size_t)N * C);
    return true;
}

static inline void tied_case_forward(Case *c) {
    embedding_case_forward(c);
    matmul_forward(val(c, "logits"), val(c, "x"), val(c, "w"), c->n[0], c->n[1], c->n[2], NULL);
}

static inline void tied_case_backward(Case *c) {
    int N = c->n[0], C = c->n[1], V = c->n[2];
    memcpy(val(c, "dx"), grad(c, "x"), (size_t)N * C * sizeof(real_t));
    matmul_backward_weight(grad(c, "w"), grad(c, "logits"), val(c, "x"), N, C, V, NULL);
    matmul_backward_input(val(c, "dx"), grad(c, "logits"), val(c, "w"), N, C, V, 1, NULL);
    embedding_backward(grad(c, "w"), val(c, "dx"), c->index, N, C, V, NULL);
}

static inline bool make_norm(Case *c) { /* N C add */
    size_t NC = (size_t)c->n[0] * c->n[1];
    add_input(c, "x", NC, c->n[2] ? OVERWRITTEN : ACCUMULATED);
    add_input(c, "w", (size_t)c->n[1], ACCUMULATED);
    add_output(c, "y", NC);
    add_saved(c, "rstd", (size_t)c->n[0]);
    if (c->n[2]) {
        add_input(c, "add", NC, OVERWRITTEN);
        add_output(c, "sum", NC);
    }
    return true;
}

static inline void norm_case_forward(Case *c) {
    int N = c->n[0], C = c->n[1], add = c->n[2];
    norm_forward(add ? val(c, "sum") : NULL, val(c, "y"), val(c, "rstd"), val(c, "x"), add ? val(c, "add") : NULL,
                 val(c, "w"), N, C, 1e-5, NULL);
}

static inline void norm_case_backward(Case *c) {
    int N = c->n[0], C = c->n[1], add = c->n[2];
    real_t *ds = grad(c, "x");
    if (add) { /* ds starts as the residual stream's own gradient */
        memcpy(ds, grad(c, "sum"), (size_t)N * C * sizeof *ds);
    }
    norm_backward(ds, grad(c, "w"), grad(c, "y"), add ? val(c, "sum") : val(c, "x"), val(c, "rstd"), val(c, "w"), N, C,
                  NULL);
    if (add) {
        memcpy(grad(c, "add"), ds, (size_t)N * C * sizeof *ds);
    }
}

static inline bool make_matmul(Case *c) { /* N IN OUT accumulate */
    add_input(c, "x", (size_t)c->n[0] * c->n[1], c->n[3] ? ACCUMULATED : OVERWRITTEN);
    add_input(c, "w", (size_t)c->n[2] * c->n[1], ACCUMULATED);
    add_output(c, "y", (size_t)c->n[0] * c->n[2]);
    return true;
}

static inline void matmul_case_forward(Case *c) {
    matmul_forward(val(c, "y"), val(c, "x"), val(c, "w"), c->n[0], c->n[1], c->n[2], NULL);
}

static inline void matmul_case_backward(Case *c) {
    matmul_backward_input(grad(c, "x"), grad(c, "y"), val(c, "w"), c->n[0], c->n[1], c->n[2], c->n[3], NULL);
    matmul_backward_weight(grad(c, "w"), grad(c, "y"), val(c, "x"), c->n[0], c->n[1], c->n[2], NULL);
}

/* Rows of q, k and v between three arrays and the heads of one, so that each is checked under its own name. */
static inline void copy_heads(real_t *qkv, real_t *part[3], int N, int NH, int NKV, int HS, bool pack) {
    int width[3] = {NH * HS, NKV * HS, NKV * HS};
    real_t *at = qkv;
    for (int n = 0; n < N; n++) {
        for (int i = 0; i < 3; at += width[i++]) {
            real_t *row = part[i] + (size_t)n * width[i];
            memcpy(pack ? at : row, pack ? row : at, (size_t)width[i] * sizeof *at);
        }
    }
}

static inline void add_heads(Case *c, int N, int NH, int NKV, int HS) {
    add_input(c, "q", (size_t)N * NH * HS, OVERWRITTEN);
    add_input(c, "k", (size_t)N * NKV * HS, OVERWRITTEN);
    add_input(c, "v", (size_t)N * NKV * HS, OVERWRITTEN);
    add_scratch(c, "qkv", (size_t)N * (NH + 2 * NKV) * HS);
}

static inline bool make_rope(Case *c) { /* N T start NH NKV HS norm inplace */
    int N = c->n[0], NH = c->n[3], NKV = c->n[4], HS = c->n[5];
    add_heads(c, N, NH, NKV, HS);
    add_output(c, "out", (size_t)N * (NH + 2 * NKV) * HS);
    if (c->n[6]) {
        add_input(c, "q_weight", (size_t)HS, ACCUMULATED);
        add_input(c, "k_weight", (size_t)HS, ACCUMULATED);
        add_saved(c, "rstd", (size_t)N * (NH + NKV));
    }
    add_scratch(c, "table", (size_t)(c->n[2] + c->n[1]) * HS);
    return true;
}

static inline RopeShape rope_case_shape(const Case *c) {
    return (RopeShape){.N = c->n[0],
                       .T = c->n[1],
                       .start = c->n[2],
                       .NH = c->n[3],
                       .NKV = c->n[4],
                       .HS = c->n[5],
                       .base = 10000,
                       .eps = 1e-6};
}

static inline void rope_case_forward(Case *c) {
    RopeShape s = rope_case_shape(c);
    bool norm = c->n[6];
    copy_heads(val(c, "qkv"), (real_t *[3]){val(c, "q"), val(c, "k"), val(c, "v")}, s.N, s.NH, s.NKV, s.HS, true);
    rope_table(val(c, "table"), s.start + s.T, s.HS, s.base, NULL);
    rope_forward(val(c, "out"), norm ? val(c, "rstd") : NULL, val(c, "qkv"), norm ? val(c, "q_weight") : NULL,
                 norm ? val(c, "k_weight") : NULL, val(c, "table"), s, NULL);
}

static inline void rope_case_backward(Case *c) {
    RopeShape s = rope_case_shape(c);
    bool norm = c->n[6], inplace = c->n[7];
    Array *out = array_named(c, "out"); /* its value is not needed any more: the place where dqkv may be dout */
    if (inplace) {
        memcpy(out->value, out->gradient, out->count * sizeof(real_t));
    }
    real_t *dqkv = out->value;
    rope_backward(dqkv, norm ? grad(c, "q_weight") : NULL, norm ? grad(c, "k_weight") : NULL,
                  inplace ? out->value : out->gradient, norm ? val(c, "rstd") : NULL, val(c, "qkv"),
                  norm ? val(c, "q_weight") : NULL, norm ? val(c, "k_weight") : NULL, val(c, "table"), s, NULL);
    copy_heads(dqkv, (real_t *[3]){grad(c, "q"), grad(c, "k"), grad(c, "v")}, s.N, s.NH, s.NKV, s.HS, false);
}

static inline bool make_attention(Case *c) { /* B T NH NKV HS causal */
    int B = c->n[0], T = c->n[1], NH = c->n[2], NKV = c->n[3], HS = c->n[4];
    add_heads(c, B * T, NH, NKV, HS);
    add_output(c, "out", (size_t)B * T * NH * HS);
    add_saved(c, "lse", (size_t)B * NH * T);
    add_scratch(c, "dqkv", (size_t)B * T * (NH + 2 * NKV) * HS);
    return true;
}

static inline AttentionShape attention_case_shape(const Case *c) {
    return (AttentionShape){
        .B = c->n[0], .T = c->n[1], .NH = c->n[2], .NKV = c->n[3], .HS = c->n[4], .causal = c->n[5]};
}

static inline void attention_case_forward(Case *c) {
    AttentionShape s = attention_case_shape(c);
    copy_heads(val(c, "qkv"), (real_t *[3]){val(c, "q"), val(c, "k"), val(c, "v")}, s.B * s.T, s.NH, s.NKV, s.HS, true);
    attention_forward(val(c, "out"), val(c, "lse"), val(c, "qkv"), s, NULL);
}

static inline void attention_case_backward(Case *c) {
    AttentionShape s = attention_case_shape(c);
    real_t *dqkv = val(c, "dqkv");
    fill_value(dqkv, array_named(c, "dqkv")->count, NAN);
    attention_backward(dqkv, grad(c, "out"), val(c, "out"), val(c, "lse"), val(c, "qkv"), s, NULL);
    copy_heads(dqkv, (real_t *[3]){grad(c, "q"), grad(c, "k"), grad(c, "v")}, s.B * s.T, s.NH, s.NKV, s.HS, false);
}

/* Rows 0, every, 2 every, ... are predicted. */
static inline bool make_cross_entropy(Case *c) { /* N V every */
    int N = c->n[0], V = c->n[1];
    add_input(c, "logits", (size_t)N * V, OVERWRITTEN);
    add_output(c, "mean", 1);
    add_saved(c, "losses", (size_t)N);
    c->index = case_ints(c, (size_t)N);
    for (int n = 0; n < N; n++) {
        int target = (int)random_below(random_key(c->seed, RANDOM_TEST, 6), (uint64_t)n, (uint64_t)V);
        c->index[n] = n % c->n[2] == 0 ? target : -1;
    }
    return true;
}

static inline int cross_entropy_case_count(const Case *c) {
    return (c->n[0] + c->n[2] - 1) / c->n[2];
}

static inline void cross_entropy_case_forward(Case *c) {
    cross_entropy_forward(val(c, "losses"), val(c, "logits"), c->index, c->n[0], c->n[1], NULL);
    mean_forward(val(c, "mean"), val(c, "losses"), c->n[0], cross_entropy_case_count(c), NULL);
}

static inline void cross_entropy_case_backward(Case *c) {
    Array *logits = array_named(c, "logits");
    memcpy(logits->gradient, logits->value, logits->count * sizeof(real_t));
    cross_entropy_forward_backward(val(c, "losses"), logits->gradient, c->index, c->n[0], c->n[1],
                                   (double)grad(c, "mean")[0] / cross_entropy_case_count(c), NULL);
}

#endif
