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

typedef struct {
    int N, NH, NKV, HS;
} Heads;

static inline size_t heads_numbers(Heads h, int times_keys) {
    return (size_t)h.N * (size_t)(h.NH + times_keys * h.NKV) * (size_t)h.HS;
}

/* Rows of q, k and v between their arrays and the heads of one matrix, so that each is checked under its own name. The
 * matrix ends after `parts` of them; one that is NULL is left out. */
static inline void copy_heads(acc_t *matrix, acc_t *q, acc_t *k, acc_t *v, int parts, Heads h, bool pack) {
    acc_t *part[3] = {q, k, v}, *at = matrix;
    int width[3] = {h.NH * h.HS, h.NKV * h.HS, h.NKV * h.HS};
    for (int n = 0; n < h.N; n++) {
        for (int i = 0; i < parts; at += width[i++]) {
            if (part[i]) {
                acc_t *row = part[i] + (size_t)n * width[i];
                memcpy(pack ? at : row, pack ? row : at, (size_t)width[i] * sizeof *at);
            }
        }
    }
}

static inline Heads rope_case_heads(const Case *c) {
    return (Heads){.N = c->n[0], .NH = c->n[3], .NKV = c->n[4], .HS = c->n[5]};
}

static inline void make_rope(Case *c) { /* N T start NH NKV HS norm */
    Heads h = rope_case_heads(c);
    int N = h.N, NH = h.NH, NKV = h.NKV, HS = h.HS;
    add_input(c, "q", ACTIVATION, (size_t)N * NH * HS, OVERWRITTEN);
    add_input(c, "k", ACTIVATION, (size_t)N * NKV * HS, OVERWRITTEN);
    add_scratch(c, "qkv", ACTIVATION, heads_numbers(h, 2));
    add_scratch(c, "dqkv", ACTIVATION, heads_numbers(h, 2));
    add_output(c, "qk", ACTIVATION, heads_numbers(h, 1));
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
    copy_heads(host_val(c, "qkv"), host_val(c, "q"), host_val(c, "k"), NULL, 3, rope_case_heads(c), true);
}

static inline void rope_case_forward(Case *c) {
    RopeShape s = rope_case_shape(c);
    bool norm = c->n[6];
    rope_table(val(c, "table"), s.start + s.T, s.HS, s.base, NULL);
    rope_forward(val(c, "qk"), norm ? val(c, "rstd") : NULL, val(c, "qkv"), norm ? val(c, "q_weight") : NULL,
                 norm ? val(c, "k_weight") : NULL, val(c, "table"), s, NULL);
}

static inline void rope_case_backward(Case *c) {
    Heads h = rope_case_heads(c);
    bool norm = c->n[6];
    size_t qk = heads_numbers(h, 1) / h.N, qkv = heads_numbers(h, 2) / h.N;
    for (int n = 0; n < h.N; n++) {
        device_copy((real_t *)val(c, "dqkv") + n * qkv, (real_t *)grad(c, "qk") + n * qk, qk * sizeof(real_t), NULL);
    }
    rope_backward(val(c, "dqkv"), norm ? grad(c, "q_weight") : NULL, norm ? grad(c, "k_weight") : NULL,
                  norm ? val(c, "rstd") : NULL, val(c, "qkv"), norm ? val(c, "q_weight") : NULL,
                  norm ? val(c, "k_weight") : NULL, val(c, "table"), rope_case_shape(c), NULL);
}

static inline void rope_case_finish(Case *c) {
    copy_heads(host_val(c, "dqkv"), host_grad(c, "q"), host_grad(c, "k"), NULL, 3, rope_case_heads(c), false);
}

static inline Heads attention_case_heads(const Case *c) {
    return (Heads){.N = c->n[0] * c->n[1], .NH = c->n[2], .NKV = c->n[3], .HS = c->n[4]};
}

static inline void make_attention(Case *c) { /* B T NH NKV HS causal */
    int B = c->n[0], T = c->n[1], NH = c->n[2], NKV = c->n[3], HS = c->n[4];
    Heads h = attention_case_heads(c);
    add_input(c, "q", ACTIVATION, (size_t)B * T * NH * HS, OVERWRITTEN);
    add_input(c, "k", ACTIVATION, (size_t)B * T * NKV * HS, OVERWRITTEN);
    add_input(c, "v", ACTIVATION, (size_t)B * T * NKV * HS, OVERWRITTEN);
    add_scratch(c, "qk", ACTIVATION, heads_numbers(h, 1));
    add_scratch(c, "qkv", ACTIVATION, heads_numbers(h, 2));
    add_scratch(c, "dqkv", ACTIVATION, heads_numbers(h, 2));
    add_output(c, "out", ACTIVATION, (size_t)B * T * NH * HS);
    add_saved(c, "lse", PRECISE, (size_t)B * NH * T);
}

static inline AttentionShape attention_case_shape(const Case *c) {
    return (AttentionShape){
        .B = c->n[0], .T = c->n[1], .NH = c->n[2], .NKV = c->n[3], .HS = c->n[4], .causal = c->n[5]};
}

static inline void attention_case_pack(Case *c) {
    Heads h = attention_case_heads(c);
    copy_heads(host_val(c, "qk"), host_val(c, "q"), host_val(c, "k"), NULL, 2, h, true);
    copy_heads(host_val(c, "qkv"), NULL, NULL, host_val(c, "v"), 3, h, true);
}

static inline void attention_case_forward(Case *c) {
    attention_forward(val(c, "out"), val(c, "lse"), val(c, "qk"), val(c, "qkv"), attention_case_shape(c), NULL);
}

static inline void attention_case_backward(Case *c) {
    attention_backward(val(c, "dqkv"), grad(c, "out"), val(c, "out"), val(c, "lse"), val(c, "qk"), val(c, "qkv"),
                       attention_case_shape(c), NULL);
}

static inline void attention_case_finish(Case *c) {
    copy_heads(host_val(c, "dqkv"), host_grad(c, "q"), host_grad(c, "k"), host_grad(c, "v"), 3, attention_case_heads(c),
               false);
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
