/* The operations of the mixture of experts as cases of gradcheck.h: how to make inputs, forward, backward.
 *
 * In data-flow order: gate, top-k, balance losses, dispatch, experts, combine, then the whole layer. Choosing experts
 * is not differentiable, so a case is made anew until no choice is close to another. The comment behind make_NAME()
 * names its extents. Their shapes are in the table of operations.h.
 */
#ifndef TESTS_OPERATIONS_MOE_H
#define TESTS_OPERATIONS_MOE_H

#include "gradcheck.h"

#include "../kernels/balance_loss.h"
#include "../kernels/dispatch.h"
#include "../kernels/experts.h"
#include "../kernels/gate.h"
#include "../kernels/permute.h"
#include "../kernels/random.h"
#include "../kernels/topk.h"

/* ---- plans */

static inline void add_plan(Case *c, int N, int E, int K, int capacity, Layout layout, DropPolicy drop) {
    int rows = plan_rows(N, E, K, capacity, layout);
    size_t entries = (size_t)N * K;
    c->routed = true;
    c->plan = (Plan){.N = N, .E = E, .K = K, .rows = rows, .capacity = capacity, .layout = layout, .drop = drop};
    c->plan.expert = case_ints(c, entries);
    c->plan.weight = case_reals(c, entries);
    c->plan.row = case_ints(c, entries);
    c->plan.entry = case_ints(c, (size_t)rows);
    c->plan.row_weight = case_reals(c, (size_t)rows);
    c->plan.demand = case_ints(c, (size_t)E);
    c->plan.count = case_ints(c, (size_t)E);
    c->plan.offset = case_ints(c, (size_t)E + 1);
    c->plan.tile_expert = layout == LAYOUT_BLOCK ? case_ints(c, (size_t)rows / PLAN_TILE) : NULL;
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

/* Whether no perturbation of about 1e-5 changes a choice, its order or, where weights decide who is dropped, a drop. */
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

/* ---- the operations */

static inline bool make_gate(Case *c) { /* N C E */
    add_input(c, "x", (size_t)c->n[0] * c->n[1], ACCUMULATED);
    add_input(c, "w", (size_t)c->n[2] * c->n[1], ACCUMULATED);
    add_output(c, "logits", (size_t)c->n[0] * c->n[2]);
    return true;
}

static inline void gate_case_forward(Case *c) {
    gate_forward(val(c, "logits"), val(c, "x"), val(c, "w"), c->n[0], c->n[1], c->n[2], NULL);
}

static inline void gate_case_backward(Case *c) {
    gate_backward(grad(c, "x"), grad(c, "w"), grad(c, "logits"), val(c, "x"), val(c, "w"), c->n[0], c->n[1], c->n[2],
                  NULL);
}

static inline void topk_case_forward(Case *c) { /* N E K renorm */
    topk_forward(val(c, "probs"), val(c, "lse"), c->plan.expert, val(c, "weight"), val(c, "logits"), c->n[0], c->n[1],
                 c->n[2], c->n[3], NULL);
}

static inline bool make_topk(Case *c) {
    int N = c->n[0], E = c->n[1], K = c->n[2];
    add_input(c, "logits", (size_t)N * E, OVERWRITTEN);
    add_output(c, "weight", (size_t)N * K);
    add_saved(c, "probs", (size_t)N * E);
    add_saved(c, "lse", (size_t)N);
    add_plan(c, N, E, K, 0, LAYOUT_COMPACT, DROP_TOKEN);
    topk_case_forward(c);
    return N > 64 || choices_are_clear(val(c, "probs"), &c->plan); /* large shapes are not perturbed */
}

static inline void topk_case_backward(Case *c) {
    topk_backward(grad(c, "logits"), grad(c, "weight"), val(c, "probs"), c->plan.expert, val(c, "weight"), c->n[0],
                  c->n[1], c->n[2], c->n[3], NULL);
}

/* The weights of balance and z-loss in an objective: their upstream gradients. */
static const double balance_upstream[LOAD_VALUES] = {[LOAD_BALANCE] = 0.7, [LOAD_Z] = 0.3};

/* All of "load" but the two norms, which the backward measures. */
static inline void balance_and_measure(Case *c) {
    acc_t *load = val(c, "load");
    const Plan *plan = &c->plan;
    fill_value(load, LOAD_VALUES, 0);
    balance_forward(load, val(c, "mean_prob"), val(c, "probs"), val(c, "lse"), plan->demand, plan->N, plan->E, plan->K,
                    NULL);
    probs_measure(load, val(c, "mean_prob"), val(c, "probs"), plan->N, plan->E, plan->K, NULL);
    plan_measure(load, plan, NULL);
}

static inline void add_balance(Case *c, int E) {
    add_output(c, "load", LOAD_VALUES);
    for (int i = 0; i < LOAD_VALUES; i++) {
        grad(c, "load")[i] = (real_t)balance_upstream[i];
    }
    add_saved(c, "mean_prob", (size_t)E);
}

static inline bool make_balance(Case *c) { /* N E K */
    int N = c->n[0], E = c->n[1], K = c->n[2];
    add_input(c, "logits", (size_t)N * E, ACCUMULATED);
    add_balance(c, E);
    add_saved(c, "probs", (size_t)N * E);
    add_saved(c, "lse", (size_t)N);
    add_plan(c, N, E, K, 0, LAYOUT_COMPACT, DROP_TOKEN);
    topk_forward(val(c, "probs"), val(c, "lse"), c->plan.expert, c->plan.weight, val(c, "logits"), N, E, K, 1, NULL);
    return N > 64 || choices_are_clear(val(c, "probs"), &c->plan);
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

static inline bool make_dispatch(Case *c) { /* N C E K capacity layout drop skew accumulate */
    int N = c->n[0], C = c->n[1];
    add_plan(c, N, c->n[2], c->n[3], c->n[4], (Layout)c->n[5], (DropPolicy)c->n[6]);
    choose_experts(&c->plan, (Skew)c->n[7], c->seed);
    fill_positive(c->plan.weight, (size_t)N * c->n[3], c->seed, 900);
    plan_build(&c->plan, NULL);
    add_input(c, "x", (size_t)N * C, c->n[8] ? ACCUMULATED : OVERWRITTEN);
    add_output(c, "rows", (size_t)c->plan.rows * C);
    return true;
}

/* Rows past the last expert's are nobody's and are left out of the objective. */
static inline void clear_unused(real_t *rows, const Plan *plan, int C) {
    size_t used = (size_t)plan->offset[plan->E] * C;
    fill_value(rows + used, (size_t)plan->rows * C - used, 0);
}

static inline void dispatch_case_forward(Case *c) {
    dispatch_forward(val(c, "rows"), val(c, "x"), &c->plan, c->n[1], NULL);
    clear_unused(val(c, "rows"), &c->plan, c->n[1]);
}

static inline void dispatch_case_backward(Case *c) {
    dispatch_backward(grad(c, "x"), grad(c, "rows"), &c->plan, c->n[1], c->n[8], NULL);
}

static inline bool make_combine(Case *c) { /* as dispatch */
    make_dispatch(c);
    c->array_count = 0; /* its plan, other arrays */
    add_input(c, "rows", (size_t)c->plan.rows * c->n[1], OVERWRITTEN);
    add_input(c, "weight", (size_t)c->n[0] * c->n[3], OVERWRITTEN);
    add_output(c, "y", (size_t)c->n[0] * c->n[1]);
    array_named(c, "y")->mode = c->n[8] ? ACCUMULATED : OVERWRITTEN;
    add_scratch(c, "drow_weight", (size_t)c->plan.rows);
    return true;
}

static inline void combine_case_forward(Case *c) {
    memcpy(c->plan.weight, val(c, "weight"), array_named(c, "weight")->count * sizeof(real_t));
    combine_forward(val(c, "y"), val(c, "rows"), &c->plan, c->n[1], c->n[8], NULL);
}

/* What the experts' backward does with a row's weight is done here: it scales the row's gradient, and its own gradient
 * is <dy, row>. */
static inline void combine_case_backward(Case *c) {
    int C = c->n[1];
    const Plan *plan = &c->plan;
    real_t *drows = grad(c, "rows");
    combine_backward(drows, grad(c, "y"), plan, C, NULL);
    clear_unused(drows, plan, C);
    for (int r = 0; r < plan->rows; r++) {
        double dot = 0;
        for (int i = 0; i < C; i++) {
            dot += (double)drows[(size_t)r * C + i] * (double)val(c, "rows")[(size_t)r * C + i];
            drows[(size_t)r * C + i] *= plan->entry[r] < 0 ? 0 : plan->weight[plan->entry[r]];
        }
        val(c, "drow_weight")[r] = (real_t)dot;
    }
    plan_weight_backward(grad(c, "weight"), val(c, "drow_weight"), plan, NULL);
}

static inline ExpertShape experts_case_shape(const Case *c) {
    return (ExpertShape){.rows = c->n[0], .C = c->n[1], .H = c->n[2], .E = c->n[3], .gelu = c->n[4]};
}

/* The first rows as the skew says, the rest evenly; the last expert ends at `rows`. */
static inline bool make_experts(Case *c) { /* rows C H E gelu skew weighted accumulate */
    ExpertShape s = experts_case_shape(c);
    int A = experts_a_width(s);
    add_input(c, "x", (size_t)s.rows * s.C, c->n[7] ? ACCUMULATED : OVERWRITTEN);
    add_input(c, "w1", (size_t)s.E * A * s.C, ACCUMULATED);
    add_input(c, "w2", (size_t)s.E * s.C * s.H, ACCUMULATED);
    add_scratch(c, "y", (size_t)s.rows * s.C);
    array_named(c, "y")->mode = c->n[7] ? ACCUMULATED : OVERWRITTEN;
    add_output(c, "weighted_y", (size_t)s.rows * s.C);
    if (c->n[6]) {
        add_input(c, "row_weight", (size_t)s.rows, OVERWRITTEN);
    }
    add_saved(c, "a", (size_t)s.rows * A);
    add_scratch(c, "h", (size_t)s.rows * s.H);
    add_scratch(c, "da", (size_t)s.rows * A);
    c->index = case_ints(c, (size_t)s.E + 1); /* offset */
    for (int e = 1; e <= s.E; e++) {
        c->index[e] = c->n[5] == SKEW_NONE  ? (int)((int64_t)s.rows * e / s.E)
                      : c->n[5] == SKEW_ONE ? (e == s.E) * s.rows
                      : e >= s.E - 1        ? s.rows
                                            : (int)((int64_t)s.rows * e / (s.E - 1));
    }
    return true;
}

static inline void experts_case_forward(Case *c) {
    ExpertShape s = experts_case_shape(c);
    Array *y = array_named(c, "y");
    experts_forward(y->value, val(c, "a"), val(c, "h"), val(c, "x"), val(c, "w1"), val(c, "w2"), c->index, s, c->n[7],
                    NULL);
    for (size_t i = 0; i < y->count; i++) {
        real_t added = y->value[i] - (c->n[7] ? y->before[i] : 0);
        val(c, "weighted_y")[i] = (c->n[6] ? val(c, "row_weight")[i / (size_t)s.C] : 1) * added;
    }
}

static inline void experts_case_backward(Case *c) {
    bool weighted = c->n[6];
    experts_backward(grad(c, "x"), weighted ? grad(c, "row_weight") : NULL, grad(c, "w1"), grad(c, "w2"), val(c, "h"),
                     val(c, "da"), grad(c, "weighted_y"), val(c, "x"), val(c, "a"),
                     weighted ? val(c, "row_weight") : NULL, val(c, "w1"), val(c, "w2"), c->index,
                     experts_case_shape(c), c->n[7], NULL);
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
    MOE_PICKED
};

static inline ExpertShape moe_shape(const Case *c) {
    return (ExpertShape){
        .E = c->n[MOE_E], .C = c->n[MOE_C], .H = c->n[MOE_H], .rows = c->plan.rows, .gelu = c->n[MOE_GELU]};
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
    for (int i = 0; i < N * E; i++) {
        plan->expert[i] = probs[i] > (acc_t)1 / E ? i % E : -1;
    }
    choice_weight(plan->weight, plan->expert, probs, N, E, K, renorm, NULL);
}

static inline void moe_case_forward(Case *c) {
    int N = c->n[MOE_N], C = c->n[MOE_C], E = c->n[MOE_E];
    Plan *plan = &c->plan;
    gate_forward(val(c, "logits"), val(c, "x"), val(c, "gate"), N, C, E, NULL);
    moe_case_choose(c);
    plan_build(plan, NULL);
    dispatch_forward(val(c, "rows_x"), val(c, "x"), plan, C, NULL);
    experts_forward(val(c, "rows_y"), val(c, "a"), val(c, "h"), val(c, "rows_x"), val(c, "w1"), val(c, "w2"),
                    plan->offset, moe_shape(c), 0, NULL);
    combine_forward(val(c, "y"), val(c, "rows_y"), plan, C, 0, NULL);
    balance_and_measure(c);
}

static inline void moe_case_backward(Case *c) {
    int N = c->n[MOE_N], C = c->n[MOE_C], E = c->n[MOE_E], K = c->n[MOE_K];
    const Plan *plan = &c->plan;
    combine_backward(val(c, "rows_dy"), grad(c, "y"), plan, C, NULL);
    experts_backward(val(c, "rows_dx"), val(c, "drow_weight"), grad(c, "w1"), grad(c, "w2"), val(c, "h"), val(c, "da"),
                     val(c, "rows_dy"), val(c, "rows_x"), val(c, "a"), plan->row_weight, val(c, "w1"), val(c, "w2"),
                     plan->offset, moe_shape(c), 0, NULL);
    plan_weight_backward(val(c, "dweight"), val(c, "drow_weight"), plan, NULL);
    topk_backward(val(c, "dlogits"), val(c, "dweight"), val(c, "probs"), plan->expert, plan->weight, N, E, K,
                  c->n[MOE_RENORM], NULL);
    gradient_measure(val(c, "load"), val(c, "dlogits"), (size_t)N * E, NULL);
    balance_backward(val(c, "dlogits"), val(c, "load"), val(c, "probs"), val(c, "lse"), plan->demand, N, E, K,
                     (double)grad(c, "load")[LOAD_BALANCE], (double)grad(c, "load")[LOAD_Z], NULL);
    dispatch_backward(grad(c, "x"), val(c, "rows_dx"), plan, C, 0, NULL);
    gate_backward(grad(c, "x"), grad(c, "gate"), val(c, "dlogits"), val(c, "x"), val(c, "gate"), N, C, E, NULL);
}

static inline bool make_moe(Case *c) {
    int N = c->n[MOE_N], C = c->n[MOE_C], H = c->n[MOE_H], E = c->n[MOE_E], K = c->n[MOE_K];
    add_plan(c, N, E, K, c->n[MOE_CAPACITY], (Layout)c->n[MOE_LAYOUT], (DropPolicy)c->n[MOE_DROP]);
    size_t rows = (size_t)c->plan.rows;
    size_t A = (size_t)experts_a_width(moe_shape(c));
    add_input(c, "x", (size_t)N * C, OVERWRITTEN);
    add_input(c, "gate", (size_t)E * C, ACCUMULATED);
    add_input(c, "w1", (size_t)E * A * C, ACCUMULATED);
    add_input(c, "w2", (size_t)E * C * H, ACCUMULATED);
    add_output(c, "y", (size_t)N * C);
    add_balance(c, E);
    add_saved(c, "logits", (size_t)N * E);
    add_saved(c, "probs", (size_t)N * E);
    add_saved(c, "lse", (size_t)N);
    const char *row_arrays[] = {"rows_x", "rows_y", "rows_dy", "rows_dx"};
    for (int i = 0; i < 4; i++) {
        add_scratch(c, row_arrays[i], rows * C);
    }
    add_scratch(c, "a", rows * A);
    add_scratch(c, "da", rows * A);
    add_scratch(c, "h", rows * H);
    add_scratch(c, "drow_weight", rows);
    add_scratch(c, "dweight", (size_t)N * K);
    add_scratch(c, "dlogits", (size_t)N * E);
    if (c->n[MOE_SKEW] != SKEW_NONE) { /* the first feature is always on and decides about the last expert */
        for (int n = 0; n < N; n++) {
            val(c, "x")[(size_t)n * C] = (real_t)(1 + 0.1 * tanh((double)val(c, "x")[(size_t)n * C]));
        }
        fill_normal(val(c, "gate"), (size_t)E * C, 0, 0.3, c->seed, 901);
        val(c, "gate")[(size_t)(E - 1) * C] = (c->n[MOE_SKEW] == SKEW_ONE ? 1 : -1) * (real_t)(C < 8 ? 4 : C);
    }
    moe_case_forward(c);
    int last = c->plan.demand[E - 1];
    if ((c->n[MOE_SKEW] == SKEW_ONE && last != N) || (c->n[MOE_SKEW] == SKEW_EMPTY && last != 0)) {
        return false;
    }
    for (int i = 0; c->n[MOE_PICKED] && N <= 64 && i < N * E; i++) {
        if (fabs((double)val(c, "probs")[i] - 1.0 / E) <= 1e-3) {
            return false;
        }
    }
    return N > 64 || choices_are_clear(val(c, "probs"), &c->plan); /* large shapes are not perturbed */
}

#endif
