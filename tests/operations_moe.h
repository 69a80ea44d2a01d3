/* The operations of the mixture of experts as cases of case.h: how to make inputs, forward, backward.
 *
 * In data-flow order: gate, top-k, balance losses, plan, dispatch, combine, experts, then the whole layer. Choosing
 * experts is not differentiable, so a case is made anew until no choice is close to another (NAME_suits). The comment
 * behind make_NAME() names its extents. Their shapes are in the table of operations.h.
 */
#ifndef TESTS_OPERATIONS_MOE_H
#define TESTS_OPERATIONS_MOE_H

#include "gradcheck.h"
#include "operations_stored.h"

#include "../kernels/balance_loss.h"
#include "../kernels/dispatch.h"
#include "../kernels/expert_choice.h"
#include "../kernels/experts.h"
#include "../kernels/gate.h"
#include "../kernels/permute.h"
#include "../kernels/random.h"
#include "../kernels/topk.h"

/* ---- plans */

static inline int *plan_ints(Case *c, int **host, size_t count) {
    Mirror m = case_mirror(c, NUMBER_INT, count);
    *host = m.host;
    return m.device;
}

static inline acc_t *plan_weights(Case *c, acc_t **host, size_t count) {
    Mirror m = case_mirror(c, NUMBER_ACC, count);
    *host = m.host;
    return m.device;
}

static inline void add_plan(Case *c, int N, int E, int K, int capacity, Layout layout, DropPolicy drop) {
    size_t entries = (size_t)N * K, rows = (size_t)plan_rows(N, E, K, capacity, layout);
    Plan *p = &c->plan, *host = &c->host_plan;
    *p = (Plan){.N = N, .E = E, .K = K, .rows = (int)rows, .capacity = capacity, .layout = layout, .drop = drop};
    *host = *p;
    c->planned = PLAN_MADE;
    p->expert = plan_ints(c, &host->expert, entries);
    p->weight = plan_weights(c, &host->weight, entries);
    p->row = plan_ints(c, &host->row, entries);
    p->entry = plan_ints(c, &host->entry, rows);
    p->row_weight = plan_weights(c, &host->row_weight, rows);
    p->demand = plan_ints(c, &host->demand, (size_t)E);
    p->count = plan_ints(c, &host->count, (size_t)E);
    p->offset = plan_ints(c, &host->offset, (size_t)E + 1);
    if (layout == LAYOUT_BLOCK) {
        p->tile_expert = plan_ints(c, &host->tile_expert, rows / PLAN_TILE);
    }
}

/* The last expert gets its share, nothing, every token; SKEW_PICKED: any part of the tokens goes to any expert. */
typedef enum { SKEW_NONE, SKEW_EMPTY, SKEW_ONE, SKEW_PICKED } Skew;

/* K different experts for each token. SKEW_EMPTY needs K < E, SKEW_PICKED, with entries that are not there, K = E. */
static inline void choose_experts(Plan *plan, Skew skew, uint64_t seed) {
    uint64_t key = random_key(seed, RANDOM_TEST, 77);
    for (int n = 0; n < plan->N; n++) {
        int *expert = plan->expert + (size_t)n * plan->K;
        int shift =
            (int)random_below(key, (uint64_t)n, (uint64_t)(skew == SKEW_NONE ? plan->E : plan->E - 1 + (plan->E == 1)));
        for (int j = 0; j < plan->K; j++) {
            if (skew == SKEW_PICKED) {
                expert[j] = random_below(key, (uint64_t)plan->N + n * plan->K + j, 5) < 2 ? j : -1;
            } else if (skew == SKEW_NONE) {
                expert[j] = (shift + j) % plan->E;
            } else if (skew == SKEW_ONE && j == 0) {
                expert[j] = plan->E - 1;
            } else {
                expert[j] = (shift + j) % (plan->E - 1);
            }
        }
    }
}

/* Whether no perturbation of about 1e-5 changes which experts are a token's K best, or their order. */
static inline bool choices_are_clear(const acc_t *probs, const Plan *plan) {
    for (int n = 0; n < plan->N; n++) {
        double above = 2;
        bool taken[64] = {false};
        for (int j = 0; j <= plan->K && j < plan->E; j++) {
            int best = -1;
            for (int e = 0; e < plan->E; e++) {
                if (!taken[e] && (best < 0 || probs[n * plan->E + e] > probs[n * plan->E + best])) {
                    best = e;
                }
            }
            taken[best] = true;
            double p = (double)probs[n * plan->E + best];
            if (above - p <= 1e-3) {
                return false;
            }
            above = p;
        }
    }
    return true;
}

/* Whether, where weights decide who is dropped, no perturbation changes who is. */
static inline bool drops_are_clear(const Plan *plan) {
    for (int i = 0; plan->drop == DROP_WEIGHT && i < plan->N * plan->K; i++) {
        for (int j = 0; j < i; j++) {
            bool rivals = plan->expert[i] >= 0 && plan->expert[j] == plan->expert[i];
            if (rivals && fabs((double)(plan->weight[i] - plan->weight[j])) <= 1e-4) {
                return false;
            }
        }
    }
    return true;
}

/* Large shapes are not perturbed, so every draw suits them. */
static inline bool routing_suits(Case *c) {
    bool small = c->host_plan.N <= 64;
    return !small || (choices_are_clear(host_val(c, "probs"), &c->host_plan) && drops_are_clear(&c->host_plan));
}

/* ---- the operations */

static inline void make_gate(Case *c) { /* N C E */
    add_input(c, "x", ACTIVATION, (size_t)c->n[0] * c->n[1], ACCUMULATED);
    add_input(c, "w", PRECISE, (size_t)c->n[2] * c->n[1], ACCUMULATED);
    add_output(c, "logits", PRECISE, (size_t)c->n[0] * c->n[2]);
}

static inline void gate_case_forward(Case *c) {
    gate_forward(val(c, "logits"), val(c, "x"), val(c, "w"), c->n[0], c->n[1], c->n[2], NULL);
}

static inline void gate_case_backward(Case *c) {
    gate_backward(grad(c, "x"), grad(c, "w"), grad(c, "logits"), val(c, "x"), val(c, "w"), c->n[0], c->n[1], c->n[2],
                  NULL);
}

static inline void make_topk(Case *c) { /* N E K renorm */
    int N = c->n[0], E = c->n[1], K = c->n[2];
    add_input(c, "logits", PRECISE, (size_t)N * E, OVERWRITTEN);
    add_output(c, "weight", PRECISE, (size_t)N * K);
    add_saved(c, "probs", PRECISE, (size_t)N * E);
    add_saved(c, "lse", PRECISE, (size_t)N);
    add_plan(c, N, E, K, 0, LAYOUT_COMPACT, DROP_TOKEN);
}

static inline void topk_case_forward(Case *c) {
    topk_forward(val(c, "probs"), val(c, "lse"), c->plan.expert, val(c, "weight"), val(c, "logits"), c->n[0], c->n[1],
                 c->n[2], c->n[3], NULL);
}

static inline void topk_case_backward(Case *c) {
    topk_backward(grad(c, "logits"), grad(c, "weight"), val(c, "probs"), c->plan.expert, val(c, "weight"), c->n[0],
                  c->n[1], c->n[2], c->n[3], NULL);
}

/* The weights of balance and z-loss in an objective: their upstream gradients. */
static const double balance_upstream[LOAD_VALUES] = {[LOAD_BALANCE] = 0.7, [LOAD_Z] = 0.3};

static inline void add_load(Case *c) {
    add_output(c, "load", PRECISE, LOAD_VALUES);
    for (int i = 0; i < LOAD_VALUES; i++) {
        host_grad(c, "load")[i] = (acc_t)balance_upstream[i];
    }
}

static inline void add_balance(Case *c, int E) {
    add_load(c);
    add_saved(c, "mean_prob", PRECISE, (size_t)E);
}

/* All of "load" but the two norms, which the backward measures. */
static inline void balance_and_measure(Case *c) {
    acc_t *load = val(c, "load");
    const Plan *plan = &c->plan;
    device_zero(load, LOAD_VALUES * sizeof *load, NULL);
    balance_forward(load, val(c, "mean_prob"), val(c, "probs"), val(c, "lse"), plan->demand, plan->N, plan->E, plan->K,
                    NULL);
    probs_measure(load, val(c, "mean_prob"), val(c, "probs"), plan->N, plan->E, plan->K, NULL);
    plan_measure(load, plan, NULL);
}

static inline void make_balance(Case *c) { /* N E K */
    int N = c->n[0], E = c->n[1], K = c->n[2];
    add_input(c, "logits", PRECISE, (size_t)N * E, ACCUMULATED);
    add_balance(c, E);
    add_saved(c, "probs", PRECISE, (size_t)N * E);
    add_saved(c, "lse", PRECISE, (size_t)N);
    add_plan(c, N, E, K, 0, LAYOUT_COMPACT, DROP_TOKEN);
}

static inline void balance_case_forward(Case *c) {
    int N = c->n[0], E = c->n[1], K = c->n[2];
    topk_forward(val(c, "probs"), val(c, "lse"), c->plan.expert, c->plan.weight, val(c, "logits"), N, E, K, 1, NULL);
    plan_build(&c->plan, NULL);
    balance_and_measure(c);
}

static inline void balance_case_backward(Case *c) {
    gradient_measure(val(c, "load"), grad(c, "logits"), array_named(c, "logits")->count, NULL);
    balance_backward(grad(c, "logits"), val(c, "load"), val(c, "probs"), val(c, "lse"), c->plan.demand, c->n[0],
                     c->n[1], c->n[2], balance_upstream[LOAD_BALANCE], balance_upstream[LOAD_Z], NULL);
}

/* ---- the plan: weights to rows and back; the choices are given */

static inline void make_plan(Case *c) { /* N E K capacity layout drop skew */
    int N = c->n[0], E = c->n[1], K = c->n[2];
    size_t entries = (size_t)N * K;
    add_plan(c, N, E, K, c->n[3], (Layout)c->n[4], (DropPolicy)c->n[5]);
    add_index(c, entries);
    choose_experts(&(Plan){.N = N, .E = E, .K = K, .expert = c->host_index}, (Skew)c->n[6], c->seed);
    add_input(c, "weight", PRECISE, entries, OVERWRITTEN);
    fill_positive(host_val(c, "weight"), entries, c->seed, 900);
    add_output(c, "row_weight", PRECISE, (size_t)c->plan.rows);
}

static inline bool plan_suits(Case *c) {
    return c->n[0] > 64 || drops_are_clear(&c->host_plan);
}

static inline void plan_case_forward(Case *c) {
    size_t entries = (size_t)c->plan.N * c->plan.K;
    device_copy(c->plan.expert, c->index, entries * sizeof(int), NULL);
    device_copy(c->plan.weight, val(c, "weight"), entries * sizeof(acc_t), NULL);
    plan_build(&c->plan, NULL);
    device_copy(val(c, "row_weight"), c->plan.row_weight, (size_t)c->plan.rows * sizeof(acc_t), NULL);
}

static inline void plan_case_backward(Case *c) {
    plan_weight_backward(grad(c, "weight"), grad(c, "row_weight"), &c->plan, NULL);
}

/* ---- dispatch and combine: the plan is given */

static inline void add_given_plan(Case *c) { /* N C E K capacity layout drop skew */
    int N = c->n[0], K = c->n[3];
    add_plan(c, N, c->n[2], K, c->n[4], (Layout)c->n[5], (DropPolicy)c->n[6]);
    c->planned = PLAN_GIVEN;
    choose_experts(&c->host_plan, (Skew)c->n[7], c->seed);
    fill_positive(c->host_plan.weight, (size_t)N * K, c->seed, 900);
}

static inline void given_plan_prepare(Case *c) {
    plan_build(&c->plan, NULL);
}

static inline void make_dispatch(Case *c) { /* N C E K capacity layout drop skew accumulate */
    add_given_plan(c);
    add_input(c, "x", ACTIVATION, (size_t)c->n[0] * c->n[1], c->n[8] ? ACCUMULATED : OVERWRITTEN);
    add_output(c, "rows", ACTIVATION, (size_t)c->plan.rows * c->n[1]);
}

static inline void dispatch_case_forward(Case *c) {
    dispatch_copy(val(c, "rows"), val(c, "x"), &c->plan, c->n[1], NULL);
}

/* Rows past the last expert's are nobody's and are left out of the objective. */
static inline void clear_unused(acc_t *rows, const Case *c) {
    size_t C = (size_t)c->n[1], used = (size_t)c->host_plan.offset[c->plan.E] * C;
    fill_value(rows + used, (size_t)c->plan.rows * C - used, 0);
}

static inline void dispatch_case_settle(Case *c) {
    clear_unused(host_val(c, "rows"), c);
}

static inline void dispatch_case_backward(Case *c) {
    dispatch_backward(grad(c, "x"), grad(c, "rows"), &c->plan, c->n[1], c->n[8], NULL);
}

static inline void make_combine(Case *c) { /* as dispatch */
    add_given_plan(c);
    add_input(c, "rows", ACTIVATION, (size_t)c->plan.rows * c->n[1], OVERWRITTEN);
    add_input(c, "weight", PRECISE, (size_t)c->n[0] * c->n[3], OVERWRITTEN);
    add_output(c, "y", ACTIVATION, (size_t)c->n[0] * c->n[1]);
    array_named(c, "y")->mode = c->n[8] ? ACCUMULATED : OVERWRITTEN;
}

static inline void combine_case_forward(Case *c) {
    device_copy(c->plan.weight, val(c, "weight"), array_named(c, "weight")->count * sizeof(acc_t), NULL);
    combine_forward(val(c, "y"), val(c, "rows"), &c->plan, c->n[1], c->n[8], NULL);
}

static inline void combine_case_backward(Case *c) {
    dispatch_copy(grad(c, "rows"), grad(c, "y"), &c->plan, c->n[1], NULL);
}

/* What the experts' backward does with a row's weight is done here: it scales the row's gradient, and its own gradient
 * is <dy, row>. */
static inline void combine_case_finish(Case *c) {
    size_t C = (size_t)c->n[1];
    const Plan *plan = &c->host_plan;
    acc_t *drows = host_grad(c, "rows"), *dweight = host_grad(c, "weight");
    clear_unused(drows, c);
    for (int i = 0; i < plan->N * plan->K; i++) {
        double dot = 0;
        for (size_t at = (size_t)plan->row[i] * C; plan->row[i] >= 0 && at < ((size_t)plan->row[i] + 1) * C; at++) {
            dot += (double)drows[at] * (double)host_val(c, "rows")[at];
            drows[at] *= plan->weight[i];
        }
        dweight[i] = (acc_t)dot;
    }
}

/* ---- experts */

static inline ExpertShape experts_case_shape(const Case *c) {
    bool adapters = c->n[4] == ACT_IDENTITY || c->n[4] == ACT_SILU;
    return (ExpertShape){.rows = c->n[0],
                         .C = c->n[1],
                         .H = c->n[2],
                         .E = c->n[3],
                         .act = c->n[4],
                         .D = c->n[9],
                         .scale = adapters ? 1.5 : 0};
}

/* The first rows as the skew says, the rest evenly; the last expert ends at `rows`. */
static inline void make_experts(Case *c) { /* rows C H E act skew weighted accumulate add_dw D */
    ExpertShape s = experts_case_shape(c);
    size_t rows = (size_t)s.rows, A = (size_t)experts_a_width(s), D = (size_t)experts_y_width(s), E = (size_t)s.E;
    add_input(c, "x", ACTIVATION, rows * s.C, c->n[7] ? ACCUMULATED : OVERWRITTEN);
    add_input(c, "w1", WEIGHT, E * A * s.C, c->n[8] ? ACCUMULATED : OVERWRITTEN);
    add_input(c, "w2", WEIGHT, E * D * s.H, c->n[8] ? ACCUMULATED : OVERWRITTEN);
    add_saved(c, "y", ACTIVATION, rows * D);
    array_named(c, "y")->mode = c->n[7] ? ACCUMULATED : OVERWRITTEN;
    add_output(c, "weighted_y", ACTIVATION, rows * D);
    if (c->n[6]) {
        add_input(c, "row_weight", PRECISE, rows, c->n[7] ? ACCUMULATED : OVERWRITTEN);
    }
    add_saved(c, "a", ACTIVATION, rows * A);
    add_scratch(c, "h", ACTIVATION, rows * s.H);
    add_scratch(c, "da", ACTIVATION, rows * A);
    add_index(c, E + 1); /* offset */
    for (int e = 1; e <= s.E; e++) {
        c->host_index[e] = c->n[5] == SKEW_NONE  ? (int)((int64_t)s.rows * e / s.E)
                           : c->n[5] == SKEW_ONE ? (e == s.E) * s.rows
                           : e >= s.E - 1        ? s.rows
                                                 : (int)((int64_t)s.rows * e / (s.E - 1));
    }
}

static inline void experts_case_forward(Case *c) {
    RowSource x = {val(c, "x"), NULL, 0};
    experts_stored_forward(c, val(c, "y"), val(c, "a"), val(c, "h"), x, val(c, "w1"), val(c, "w2"), c->index,
                           experts_case_shape(c), c->n[7]);
}

/* The objective is of the weighted outputs, as after combine. What a bf16 device has added is told by the sum that it
 * stored, whose rounding may be larger than what was added. */
static inline void experts_case_settle(Case *c) {
    const Array *y = array_named(c, "y");
    size_t D = (size_t)experts_y_width(experts_case_shape(c));
    const acc_t *row_weight = c->n[6] ? host_val(c, "row_weight") : NULL;
    for (size_t i = 0; i < y->count; i++) {
        acc_t sum = c->stores_bf16 && c->n[7] ? bf16_rounded(y->value[i]) : y->value[i];
        acc_t added = sum - (c->n[7] ? y->before[i] : 0);
        host_val(c, "weighted_y")[i] = (row_weight ? row_weight[i / D] : 1) * added;
    }
}

static inline void experts_case_backward(Case *c) {
    bool weighted = c->n[6];
    RowSource dy = {grad(c, "weighted_y"), NULL, 0}, x = {val(c, "x"), NULL, 0};
    experts_stored_backward(c, grad(c, "x"), weighted ? grad(c, "row_weight") : NULL, grad(c, "w1"), grad(c, "w2"),
                            val(c, "h"), val(c, "da"), dy, x, val(c, "a"), weighted ? val(c, "row_weight") : NULL,
                            val(c, "w1"), val(c, "w2"), c->index, experts_case_shape(c), c->n[7], c->n[8]);
}

/* The whole layer: gate, choice, plan, dispatch, experts, combine, with the balance and z-loss in the objective. */
enum {
    MOE_N,
    MOE_C,
    MOE_H,
    MOE_E,
    MOE_K,
    MOE_RENORM,
    MOE_GELU,
    MOE_CAPACITY,
    MOE_LAYOUT,
    MOE_DROP,
    MOE_SKEW,
    MOE_PICKED,
    MOE_ADD_DW
};

static inline ExpertShape moe_shape(const Case *c) {
    return (ExpertShape){
        .E = c->n[MOE_E], .C = c->n[MOE_C], .H = c->n[MOE_H], .rows = c->plan.rows, .act = c->n[MOE_GELU]};
}

/* The step at hand is the last of a warm-up of so many, counted from 0. */
enum { WARM_UP = 3 };

static inline void add_warm_up(Case *c) {
    const int64_t step = WARM_UP - 1;
    c->structs[0] = case_struct(c, &step, sizeof step);
}

/* Tokens choose their K best, or, with MOE_PICKED and K = E, each expert picks the tokens with p above 1/E. */
static inline void moe_case_choose(Case *c) {
    int N = c->n[MOE_N], E = c->n[MOE_E], K = c->n[MOE_K], renorm = c->n[MOE_RENORM];
    Plan *plan = &c->plan;
    acc_t *probs = val(c, "probs");
    if (!c->n[MOE_PICKED]) {
        topk_forward(probs, val(c, "lse"), plan->expert, plan->weight, val(c, "logits"), N, E, K, renorm, NULL);
        return;
    }
    softmax_forward(probs, val(c, "lse"), val(c, "logits"), N, E, NULL);
    threshold_forward(plan->expert, val(c, "threshold"), probs, c->structs[0].device, WARM_UP - 1, N, E, NULL);
    choice_weight(plan->weight, plan->expert, probs, N, E, K, renorm, NULL);
}

static inline void moe_case_forward(Case *c) {
    int N = c->n[MOE_N], C = c->n[MOE_C], E = c->n[MOE_E];
    Plan *plan = &c->plan;
    gate_forward(val(c, "logits"), val(c, "x"), val(c, "gate"), N, C, E, NULL);
    moe_case_choose(c);
    plan_build(plan, NULL);
    RowSource rows = dispatch_forward(val(c, "rows_x"), val(c, "x"), plan, C, NULL);
    experts_stored_forward(c, val(c, "rows_y"), val(c, "a"), val(c, "h"), rows, val(c, "w1"), val(c, "w2"),
                           plan->offset, moe_shape(c), 0);
    combine_forward(val(c, "y"), stored(c, val(c, "rows_y")), plan, C, 0, NULL);
    balance_and_measure(c);
}

static inline void moe_case_backward(Case *c) {
    int N = c->n[MOE_N], C = c->n[MOE_C], E = c->n[MOE_E], K = c->n[MOE_K];
    const Plan *plan = &c->plan;
    RowSource rows_dy = combine_backward(val(c, "rows_dy"), grad(c, "y"), plan, C, NULL);
    RowSource rows = dispatch_forward(val(c, "rows_x"), val(c, "x"), plan, C, NULL);
    experts_stored_backward(c, val(c, "rows_dx"), val(c, "drow_weight"), grad(c, "w1"), grad(c, "w2"), val(c, "h"),
                            val(c, "da"), rows_dy, rows, val(c, "a"), plan->row_weight, val(c, "w1"), val(c, "w2"),
                            plan->offset, moe_shape(c), 0, c->n[MOE_ADD_DW]);
    plan_weight_backward(val(c, "dweight"), val(c, "drow_weight"), plan, NULL);
    topk_backward(val(c, "dlogits"), val(c, "dweight"), val(c, "probs"), plan->expert, plan->weight, N, E, K,
                  c->n[MOE_RENORM], NULL);
    gradient_measure(val(c, "load"), val(c, "dlogits"), (size_t)N * E, NULL);
    balance_backward(val(c, "dlogits"), val(c, "load"), val(c, "probs"), val(c, "lse"), plan->demand, N, E, K,
                     (double)host_grad(c, "load")[LOAD_BALANCE], (double)host_grad(c, "load")[LOAD_Z], NULL);
    dispatch_backward(grad(c, "x"), stored(c, val(c, "rows_dx")), plan, C, 0, NULL);
    gate_backward(stored(c, grad(c, "x")), grad(c, "gate"), val(c, "dlogits"), val(c, "x"), val(c, "gate"), N, C, E,
                  NULL);
}

static inline void make_moe(Case *c) {
    int N = c->n[MOE_N], C = c->n[MOE_C], H = c->n[MOE_H], E = c->n[MOE_E], K = c->n[MOE_K];
    add_plan(c, N, E, K, c->n[MOE_CAPACITY], (Layout)c->n[MOE_LAYOUT], (DropPolicy)c->n[MOE_DROP]);
    size_t rows = (size_t)c->plan.rows;
    size_t A = (size_t)experts_a_width(moe_shape(c));
    add_input(c, "x", ACTIVATION, (size_t)N * C, OVERWRITTEN);
    add_input(c, "gate", PRECISE, (size_t)E * C, ACCUMULATED);
    add_input(c, "w1", WEIGHT, (size_t)E * A * C, c->n[MOE_ADD_DW] ? ACCUMULATED : OVERWRITTEN);
    add_input(c, "w2", WEIGHT, (size_t)E * C * H, c->n[MOE_ADD_DW] ? ACCUMULATED : OVERWRITTEN);
    add_output(c, "y", ACTIVATION, (size_t)N * C);
    add_balance(c, E);
    add_saved(c, "logits", PRECISE, (size_t)N * E);
    add_saved(c, "probs", PRECISE, (size_t)N * E);
    add_saved(c, "lse", PRECISE, (size_t)N);
    fill_value(add_given(c, "threshold", PRECISE, (size_t)E), (size_t)E, 1.0 / E);
    add_warm_up(c);
    const char *row_arrays[] = {"rows_x", "rows_y", "rows_dy", "rows_dx"};
    for (int i = 0; i < 4; i++) {
        add_scratch(c, row_arrays[i], ACTIVATION, rows * C);
    }
    add_scratch(c, "a", ACTIVATION, rows * A);
    add_scratch(c, "da", ACTIVATION, rows * A);
    add_scratch(c, "h", ACTIVATION, rows * H);
    add_scratch(c, "drow_weight", PRECISE, rows);
    add_scratch(c, "dweight", PRECISE, (size_t)N * K);
    add_scratch(c, "dlogits", PRECISE, (size_t)N * E);
    if (c->n[MOE_SKEW] != SKEW_NONE) { /* the first feature is always on and decides about the last expert */
        acc_t *x = host_val(c, "x"), *gate = host_val(c, "gate");
        for (int n = 0; n < N; n++) {
            x[(size_t)n * C] = (acc_t)(1 + 0.1 * tanh((double)x[(size_t)n * C]));
        }
        fill_normal(gate, (size_t)E * C, 0, 0.3, c->seed, 901);
        gate[(size_t)(E - 1) * C] = (c->n[MOE_SKEW] == SKEW_ONE ? 1 : -1) * (acc_t)(C < 8 ? 4 : C);
    }
}

static inline bool moe_suits(Case *c) {
    int N = c->n[MOE_N], E = c->n[MOE_E], last = c->host_plan.demand[E - 1];
    if ((c->n[MOE_SKEW] == SKEW_ONE && last != N) || (c->n[MOE_SKEW] == SKEW_EMPTY && last != 0)) {
        return false;
    }
    for (int i = 0; c->n[MOE_PICKED] && N <= 64 && i < N * E; i++) {
        if (fabs((double)host_val(c, "probs")[i] - 1.0 / E) <= 1e-3) {
            return false;
        }
    }
    return routing_suits(c);
}

#endif
