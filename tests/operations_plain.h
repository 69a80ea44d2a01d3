/* Operations without a gradient as cases of case.h: fixed and inverted choices, updates of biases and thresholds, the
 * optimizer, one token of generation, sums and conversions.
 *
 * Their arrays are all given or saved: nothing is an input or an output of an objective. Their shapes are in the table
 * of operations.h.
 */
#ifndef TESTS_OPERATIONS_PLAIN_H
#define TESTS_OPERATIONS_PLAIN_H

#include "operations_moe.h"

#include "../kernels/adamw.h"
#include "../kernels/attention.h"
#include "../kernels/convert.h"
#include "../kernels/expert_choice.h"
#include "../kernels/fixed_choice.h"
#include "../kernels/residual.h"
#include "../kernels/sigmoid_topk.h"

static inline void make_residual(Case *c) { /* N C */
    size_t NC = (size_t)c->n[0] * c->n[1];
    add_given(c, "a", ACTIVATION, NC);
    add_given(c, "b", ACTIVATION, NC);
    add_saved(c, "sum", ACTIVATION, NC);
}

static inline void residual_case_forward(Case *c) {
    residual_add(val(c, "sum"), val(c, "a"), val(c, "b"), array_named(c, "sum")->count, NULL);
    residual_add(val(c, "a"), val(c, "a"), val(c, "b"), array_named(c, "sum")->count, NULL);
}

static inline void make_convert(Case *c) { /* count */
    add_given(c, "in", PRECISE, (size_t)c->n[0]);
    add_saved(c, "stored", ACTIVATION, (size_t)c->n[0]);
    add_saved(c, "out", PRECISE, (size_t)c->n[0]);
}

static inline void convert_case_forward(Case *c) {
    real_from_acc(val(c, "stored"), val(c, "in"), (size_t)c->n[0], NULL);
    acc_from_real(val(c, "out"), val(c, "stored"), (size_t)c->n[0], NULL);
}

/* Every token of B sequences in turn, from an empty cache. */
static inline void make_decode(Case *c) { /* B T NH NKV HS */
    int B = c->n[0], T = c->n[1], NH = c->n[2], NKV = c->n[3], HS = c->n[4];
    add_given(c, "qk", ACTIVATION, (size_t)T * B * (NH + NKV) * HS);
    add_given(c, "qkv", ACTIVATION, (size_t)T * B * (NH + 2 * NKV) * HS);
    add_saved(c, "out", ACTIVATION, (size_t)T * B * NH * HS);
    add_saved(c, "keys", ACTIVATION, (size_t)B * T * NKV * HS);
    add_saved(c, "values", ACTIVATION, (size_t)B * T * NKV * HS);
}

static inline void decode_case_forward(Case *c) {
    AttentionShape s = {.B = c->n[0], .T = c->n[1], .NH = c->n[2], .NKV = c->n[3], .HS = c->n[4], .causal = 1};
    for (int t = 0; t < s.T; t++) {
        const real_t *qk = (const real_t *)val(c, "qk") + (size_t)t * s.B * (s.NH + s.NKV) * s.HS;
        const real_t *qkv = (const real_t *)val(c, "qkv") + (size_t)t * s.B * (s.NH + 2 * s.NKV) * s.HS;
        real_t *out = (real_t *)val(c, "out") + (size_t)t * s.B * s.NH * s.HS;
        attention_decode(out, val(c, "keys"), val(c, "values"), qk, qkv, t, s, NULL);
    }
}

/* A prompt of T tokens into a cache of more: what lies behind it stays. */
static inline void make_keep(Case *c) { /* B T NH NKV HS length */
    int B = c->n[0], T = c->n[1], NH = c->n[2], NKV = c->n[3], HS = c->n[4], length = c->n[5];
    add_given(c, "qk", ACTIVATION, (size_t)B * T * (NH + NKV) * HS);
    add_given(c, "qkv", ACTIVATION, (size_t)B * T * (NH + 2 * NKV) * HS);
    add_given(c, "keys", ACTIVATION, (size_t)B * length * NKV * HS);
    add_given(c, "values", ACTIVATION, (size_t)B * length * NKV * HS);
}

static inline void keep_case_forward(Case *c) {
    AttentionShape s = {.B = c->n[0], .T = c->n[1], .NH = c->n[2], .NKV = c->n[3], .HS = c->n[4], .causal = 1};
    attention_keep(val(c, "keys"), val(c, "values"), val(c, "qk"), val(c, "qkv"), c->n[5], s, NULL);
}

/* ---- choices */

enum { CHOICE_POSITION, CHOICE_BALANCED, CHOICE_ZIPF, CHOICE_ONE, CHOICE_TABLE };

static inline void make_fixed_choice(Case *c) { /* N E K T choice */
    enum { V = 10 };
    int N = c->n[0], E = c->n[1], K = c->n[2];
    add_plan(c, N, E, K, 0, LAYOUT_COMPACT, DROP_TOKEN);
    add_saved(c, "probs", PRECISE, (size_t)N * E);
    add_saved(c, "random", PRECISE, (size_t)N * E);
    add_index(c, (size_t)N); /* tokens */
    for (int n = 0; n < N; n++) {
        c->host_index[n] = (int)random_below(random_key(c->seed, RANDOM_TEST, 7), (uint64_t)n, V);
    }
    balanced_table(add_given(c, "table", PRECISE, (size_t)V * K), NULL, c->seed, V, E, K);
    const uint64_t keys[2] = {random_key(c->seed, RANDOM_TEST, 8), random_key(c->seed, RANDOM_TEST, 9)};
    c->structs[0] = case_struct(c, keys, sizeof keys);
}

static inline void fixed_choice_case_forward(Case *c) {
    int N = c->n[0], E = c->n[1], K = c->n[2], *expert = c->plan.expert;
    const uint64_t *keys = c->structs[0].device;
    switch (c->n[4]) {
        case CHOICE_POSITION: position_choice(expert, 3, N, c->n[3], E, K, NULL); break;
        case CHOICE_BALANCED: balanced_choice(expert, 0, N, E, K, NULL); break;
        case CHOICE_ZIPF: zipf_choice(expert, 1.1, &keys[0], 0, N, E, K, NULL); break;
        case CHOICE_ONE: one_choice(expert, 0, N, E, K, NULL); break;
        default: table_choice(expert, c->index, val(c, "table"), N, K, NULL); break;
    }
    equal_weight(c->plan.weight, N, K, NULL);
    plan_build(&c->plan, NULL);
    choice_probs(val(c, "probs"), expert, c->plan.weight, N, E, K, NULL);
    random_weights(val(c, "random"), 0.02, &keys[1], (size_t)N * E, NULL);
}

/* As router_threshold.c chooses in its warm-up: thresholds that no probability passes have no say yet. */
static inline void make_expert_choice(Case *c) { /* N E C */
    int N = c->n[0], E = c->n[1];
    add_plan(c, N, E, E, c->n[2], LAYOUT_COMPACT, DROP_TOKEN);
    fill_positive(add_given(c, "probs", PRECISE, (size_t)N * E), (size_t)N * E, c->seed, 902);
    add_saved(c, "cut", PRECISE, (size_t)E);
    fill_value(add_given(c, "tau", PRECISE, (size_t)E), (size_t)E, 2);
    add_warm_up(c);
}

static inline void expert_choice_case_forward(Case *c) {
    int N = c->n[0], E = c->n[1];
    expert_choice_forward(c->plan.expert, val(c, "cut"), val(c, "probs"), N, E, c->n[2], NULL);
    threshold_forward(c->plan.expert, val(c, "tau"), val(c, "probs"), c->structs[0].device, WARM_UP, N, E, NULL);
    choice_weight(c->plan.weight, c->plan.expert, val(c, "probs"), N, E, E, 0, NULL);
    plan_build(&c->plan, NULL);
}

/* ---- after a step: the optimizer, and what follows it */

enum { ADAMW_PIECES, ADAMW_STATE, ADAMW_SUMS, ADAMW_PARTIAL, ADAMW_RATE };

/* The state of a run under way. */
static const AdamState adamw_before = {.updates = 3, .scale = 1};

/* Two pieces, one with decay, one that keeps its gradient, and a frozen third. */
static inline void make_adamw(Case *c) { /* the counts of the three, thousandths of clip, the loss is not finite */
    AdamPiece pieces[3] = {{.trained = 1, .decay = 0.1}, {.trained = 1, .keep_grad = 1}, {.decay = 0.1}};
    const double zeros[3] = {0}, rate = 0.01;
    size_t count = 0;
    for (int i = 0; i < 3; i++) {
        pieces[i].offset = count;
        pieces[i].count = (size_t)c->n[i];
        count += pieces[i].count;
    }
    const char *names[] = {"master", "m", "v", "grads"};
    for (int i = 0; i < 4; i++) {
        add_given(c, names[i], PRECISE, count);
    }
    fill_positive(array_named(c, "v")->before, count, c->seed, 903);
    *add_given(c, "loss", PRECISE, 1) = c->n[4] ? (acc_t)NAN : 3;
    add_given(c, "weights", ACTIVATION, count); /* a skipped step leaves them */
    add_saved(c, "state", PRECISE, 4);
    size_t chunks = (size_t)adamw_number_chunks(pieces, 3);
    c->structs[ADAMW_PIECES] = case_struct(c, pieces, sizeof pieces);
    c->structs[ADAMW_STATE] = case_struct(c, &adamw_before, sizeof adamw_before);
    c->structs[ADAMW_SUMS] = case_struct(c, zeros, sizeof zeros);
    c->structs[ADAMW_PARTIAL] = case_mirror(c, NUMBER_INT, chunks * sizeof(double) / sizeof(int));
    c->structs[ADAMW_RATE] = case_struct(c, &rate, sizeof rate);
}

static inline void adamw_case_pack(Case *c) {
    memcpy(c->structs[ADAMW_STATE].host, &adamw_before, sizeof adamw_before);
}

static inline void adamw_case_forward(Case *c) {
    const AdamOptions options = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .clip = 1e-3 * c->n[3]};
    const AdamPiece *pieces = c->structs[ADAMW_PIECES].device;
    AdamState *state = c->structs[ADAMW_STATE].device;
    double *sums = c->structs[ADAMW_SUMS].device;
    int chunks = (int)(c->structs[ADAMW_PARTIAL].count * sizeof(int) / sizeof(double));
    adamw_square_sums(sums, c->structs[ADAMW_PARTIAL].device, val(c, "grads"), pieces, 3, chunks, NULL);
    adamw_begin(state, sums, 3, val(c, "loss"), c->structs[ADAMW_RATE].device, options, NULL);
    adamw_update(val(c, "master"), val(c, "weights"), val(c, "m"), val(c, "v"), val(c, "grads"), pieces, 3, chunks,
                 state, options, NULL);
}

static inline void adamw_case_settle(Case *c) {
    const AdamState *state = c->structs[ADAMW_STATE].host;
    const double values[4] = {(double)state->updates, (double)state->skipped, state->norm, state->scale};
    for (int i = 0; i < 4; i++) {
        host_val(c, "state")[i] = (acc_t)values[i];
    }
}

/* The router's own updates: the selection bias of sigmoid gates, the thresholds of experts that choose. */
static inline void make_router_updates(Case *c) { /* E slices skipped */
    const AdamState state = {.updates = 3, .scale = c->n[2] ? 0 : 1, .skipped_in_row = c->n[2]};
    int E = c->n[0], slices = c->n[1];
    add_given(c, "bias", PRECISE, (size_t)E);
    add_given(c, "threshold", PRECISE, (size_t)E);
    add_given(c, "cut", PRECISE, (size_t)slices * E);
    add_index(c, (size_t)slices * (E + 1)); /* counts, with a stride of E + 1 */
    for (int i = 0; i < slices * (E + 1); i++) {
        c->host_index[i] = (int)random_below(random_key(c->seed, RANDOM_TEST, 10), (uint64_t)i, 100);
    }
    c->structs[0] = case_struct(c, &state, sizeof state);
}

static inline void router_updates_case_forward(Case *c) {
    int E = c->n[0], slices = c->n[1];
    const AdamState *adam = c->structs[0].device;
    selection_bias_update(val(c, "bias"), c->index, slices, (size_t)E + 1, E, 0.001, adam, NULL);
    threshold_update(val(c, "threshold"), val(c, "cut"), slices, E, 0.05, adam, NULL);
}

#endif
