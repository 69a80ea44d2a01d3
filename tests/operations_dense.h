/* The operations of a dense transformer as cases of case.h: how to make inputs, forward, backward.
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

static inline void make_embedding(Case *c) { /* N C V */
    int N = c->n[0], C = c->n[1], V = c->n[2];
    add_input(c, "w", WEIGHT, (size_t)V * C, ACCUMULATED);
    add_output(c, "x", ACTIVATION, (size_t)N * C);
    add_index(c, (size_t)N);
    for (int n = 0; n < N; n++) {
        c->host_index[n] = (int)random_below(random_key(c->seed, RANDOM_TEST, 5), (uint64_t)n, (uint64_t)V);
    }
}

static inline void embedding_case_forward(Case *c) {
    embedding_forward(val(c, "x"), c->index, val(c, "w"), c->n[0], c->n[1], NULL);
}

static inline void embedding_case_backward(Case *c) {
    embedding_backward(grad(c, "w"), grad(c, "x"), c->index, c->n[0], c->n[1], c->n[2], NULL);
}

/* The head is the embedding: w is used twice and its gradient has two terms. */
static inline void make_tied(Case *c) { /* N C V */
    int N = c->n[0], C = c->n[1], V = c->n[2];
    make_embedding(c);
    add_output(c, "logits", ACTIVATION, (size_t)N * V);
    add_scratch(c, "dx", ACTIVATION, (size_t)N * C);
}

static inline void tied_case_forward(Case *c) {
    embedding_case_forward(c);
    matmul_forward(val(c, "logits"), val(c, "x"), val(c, "w"), c->n[0], c->n[1], c->n[2], NULL);
}

static inline void tied_case_backward(Case *c) {
    int N = c->n[0], C = c->n[1], V = c->n[2];
    device_copy(val(c, "dx"), grad(c, "x"), (size_t)N * C * sizeof(real_t), NULL);
    matmul_backward_weight(grad(c, "w"), grad(c, "logits"), val(c, "x"), N, C, V, NULL);
    matmul_backward_input(val(c, "dx"), grad(c, "logits"), val(c, "w"), N, C, V, 1, NULL);
    embedding_backward(grad(c, "w"), stored(c, val(c, "dx")), c->index, N, C, V, NULL);
}

static inline void make_norm(Case *c) { /* N C add */
    size_t NC = (size_t)c->n[0] * c->n[1];
    add_input(c, "x", ACTIVATION, NC, c->n[2] ? OVERWRITTEN : ACCUMULATED);
    add_input(c, "w", WEIGHT, (size_t)c->n[1], ACCUMULATED);
    add_output(c, "y", ACTIVATION, NC);
    add_saved(c, "rstd", PRECISE, (size_t)c->n[0]);
    if (c->n[2]) {
        add_input(c, "add", ACTIVATION, NC, OVERWRITTEN);
        add_output(c, "sum", ACTIVATION, NC);
    }
}

static inline void norm_case_forward(Case *c) {
    int N = c->n[0], C = c->n[1], add = c->n[2];
    norm_forward(add ? val(c, "sum") : NULL, val(c, "y"), val(c, "rstd"), val(c, "x"), add ? val(c, "add") : NULL,
                 val(c, "w"), N, C, 1e-5, NULL);
    if (add && c->stores_bf16) { /* what is normalised is the sum as it was stored */
        norm_forward(NULL, val(c, "y"), val(c, "rstd"), stored(c, val(c, "sum")), NULL, val(c, "w"), N, C, 1e-5, NULL);
    }
}

static inline void norm_case_backward(Case *c) {
    int N = c->n[0], C = c->n[1], add = c->n[2];
    real_t *ds = grad(c, "x");
    if (add) { /* ds starts as the residual stream's own gradient */
        device_copy(ds, grad(c, "sum"), (size_t)N * C * sizeof *ds, NULL);
    }
    norm_backward(ds, grad(c, "w"), grad(c, "y"), add ? val(c, "sum") : val(c, "x"), val(c, "rstd"), val(c, "w"), N, C,
                  NULL);
    if (add) {
        device_copy(grad(c, "add"), ds, (size_t)N * C * sizeof *ds, NULL);
    }
}

static inline void make_matmul(Case *c) { /* N IN OUT accumulate */
    add_input(c, "x", ACTIVATION, (size_t)c->n[0] * c->n[1], c->n[3] ? ACCUMULATED : OVERWRITTEN);
    add_input(c, "w", WEIGHT, (size_t)c->n[2] * c->n[1], ACCUMULATED);
    add_output(c, "y", ACTIVATION, (size_t)c->n[0] * c->n[2]);
}

static inline void matmul_case_forward(Case *c) {
    matmul_forward(val(c, "y"), val(c, "x"), val(c, "w"), c->n[0], c->n[1], c->n[2], NULL);
}

static inline void matmul_case_backward(Case *c) {
    matmul_backward_input(grad(c, "x"), grad(c, "y"), val(c, "w"), c->n[0], c->n[1], c->n[2], c->n[3], NULL);
    matmul_backward_weight(grad(c, "w"), grad(c, "y"), val(c, "x"), c->n[0], c->n[1], c->n[2], NULL);
}

/* Rows of q, k and v between three arrays and the heads of one, so that each is checked under its own name. */
static inline void copy_heads(acc_t *qkv, acc_t *part[3], int N, int NH, int NKV, int HS, bool pack) {
    int width[3] = {NH * HS, NKV * HS, NKV * HS};
    acc_t *at = qkv;
    for (int n = 0; n < N; n++) {
        for (int i = 0; i < 3; at += width[i++]) {
            acc_t *row = part[i] + (size_t)n * width[i];
            memcpy(pack ? at : row, pack ? row : at, (size_t)width[i] * sizeof *at);
        }
    }
}

static inline void add_heads(Case *c, int N, int NH, int NKV, int HS) {
    add_input(c, "q", ACTIVATION, (size_t)N * NH * HS, OVERWRITTEN);
    add_input(c, "k", ACTIVATION, (size_t)N * NKV * HS, OVERWRITTEN);
    add_input(c, "v", ACTIVATION, (size_t)N * NKV * HS, OVERWRITTEN);
    add_scratch(c, "qkv", ACTIVATION, (size_t)N * (NH + 2 * NKV) * HS);
    add_scratch(c, "dqkv", ACTIVATION, (size_t)N * (NH + 2 * NKV) * HS);
}

static inline void pack_heads(Case *c, int N, int NH, int NKV, int HS) {
    acc_t *part[3] = {host_val(c, "q"), host_val(c, "k"), host_val(c, "v")};
    copy_heads(host_val(c, "qkv"), part, N, NH, NKV, HS, true);
}

static inline void unpack_heads(Case *c, int N, int NH, int NKV, int HS) {
    acc_t *part[3] = {host_grad(c, "q"), host_grad(c, "k"), host_grad(c, "v")};
    copy_heads(host_val(c, "dqkv"), part, N, NH, NKV, HS, false);
}

static inline void make_rope(Case *c) { /* N T start NH NKV HS norm inplace */
    int N = c->n[0], NH = c->n[3], NKV = c->n[4], HS = c->n[5];
    add_heads(c, N, NH, NKV, HS);
    add_output(c, "out", ACTIVATION, (size_t)N * (NH + 2 * NKV) * HS);
    if (c->n[6]) {
        add_input(c, "q_weight", WEIGHT, (size_t)HS, ACCUMULATED);
        add_input(c, "k_weight", WEIGHT, (size_t)HS, ACCUMULATED);
        add_saved(c, "rstd", PRECISE, (size_t)N * (NH + NKV));
    }
    add_saved(c, "table", PRECISE, (size_t)(c->n[2] + c->n[1]) * HS);
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

static inline void rope_case_pack(Case *c) {
    pack_heads(c, c->n[0], c->n[3], c->n[4], c->n[5]);
}

static inline void rope_case_forward(Case *c) {
    RopeShape s = rope_case_shape(c);
    bool norm = c->n[6];
    rope_table(val(c, "table"), s.start + s.T, s.HS, s.base, NULL);
    rope_forward(val(c, "out"), norm ? val(c, "rstd") : NULL, val(c, "qkv"), norm ? val(c, "q_weight") : NULL,
                 norm ? val(c, "k_weight") : NULL, val(c, "table"), s, NULL);
}

static inline void rope_case_backward(Case *c) {
    bool norm = c->n[6], inplace = c->n[7];
    if (inplace) {
        device_copy(val(c, "dqkv"), grad(c, "out"), array_named(c, "out")->count * sizeof(real_t), NULL);
    }
    rope_backward(val(c, "dqkv"), norm ? grad(c, "q_weight") : NULL, norm ? grad(c, "k_weight") : NULL,
                  inplace ? val(c, "dqkv") : grad(c, "out"), norm ? val(c, "rstd") : NULL, val(c, "qkv"),
                  norm ? val(c, "q_weight") : NULL, norm ? val(c, "k_weight") : NULL, val(c, "table"),
                  rope_case_shape(c), NULL);
}

static inline void rope_case_finish(Case *c) {
    unpack_heads(c, c->n[0], c->n[3], c->n[4], c->n[5]);
}

static inline void make_attention(Case *c) { /* B T NH NKV HS causal */
    int B = c->n[0], T = c->n[1], NH = c->n[2], NKV = c->n[3], HS = c->n[4];
    add_heads(c, B * T, NH, NKV, HS);
    add_output(c, "out", ACTIVATION, (size_t)B * T * NH * HS);
    add_saved(c, "lse", PRECISE, (size_t)B * NH * T);
}

static inline AttentionShape attention_case_shape(const Case *c) {
    return (AttentionShape){
        .B = c->n[0], .T = c->n[1], .NH = c->n[2], .NKV = c->n[3], .HS = c->n[4], .causal = c->n[5]};
}

static inline void attention_case_pack(Case *c) {
    pack_heads(c, c->n[0] * c->n[1], c->n[2], c->n[3], c->n[4]);
}

static inline void attention_case_forward(Case *c) {
    attention_forward(val(c, "out"), val(c, "lse"), val(c, "qkv"), attention_case_shape(c), NULL);
}

static inline void attention_case_backward(Case *c) {
    attention_backward(val(c, "dqkv"), grad(c, "out"), val(c, "out"), val(c, "lse"), val(c, "qkv"),
                       attention_case_shape(c), NULL);
}

static inline void attention_case_finish(Case *c) {
    unpack_heads(c, c->n[0] * c->n[1], c->n[2], c->n[3], c->n[4]);
}

/* Rows 0, every, 2 every, ... are predicted. */
static inline void make_cross_entropy(Case *c) { /* N V every */
    int N = c->n[0], V = c->n[1];
    add_input(c, "logits", ACTIVATION, (size_t)N * V, OVERWRITTEN);
    add_output(c, "mean", PRECISE, 1);
    add_saved(c, "losses", PRECISE, (size_t)N);
    add_index(c, (size_t)N);
    for (int n = 0; n < N; n++) {
        int target = (int)random_below(random_key(c->seed, RANDOM_TEST, 6), (uint64_t)n, (uint64_t)V);
        c->host_index[n] = n % c->n[2] == 0 ? target : -1;
    }
}

static inline int cross_entropy_case_count(const Case *c) {
    return (c->n[0] + c->n[2] - 1) / c->n[2];
}

static inline void cross_entropy_case_forward(Case *c) {
    cross_entropy_forward(val(c, "losses"), val(c, "logits"), c->index, c->n[0], c->n[1], NULL);
    mean_forward(val(c, "mean"), val(c, "losses"), c->n[0], cross_entropy_case_count(c), NULL);
}

static inline void cross_entropy_case_backward(Case *c) {
    double scale = (double)host_grad(c, "mean")[0] / cross_entropy_case_count(c);
    device_copy(grad(c, "logits"), val(c, "logits"), array_named(c, "logits")->count * sizeof(real_t), NULL);
    cross_entropy_forward_backward(val(c, "losses"), grad(c, "logits"), c->index, c->n[0], c->n[1], scale, NULL);
}

#endif
