// build: both
/* Routing against closed forms and counting: top-k, balance losses, the plan under every drop policy, dispatch and
 * combine, the experts.
 *
 * The edges are visited: ties, NaN, K = E, an expert without rows, a full expert, every token on one expert.
 * test_ops_exact.c has the dense operations.
 */
#include "operations.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>

#include <cmocka.h>

/* ---- routing */

static void test_topk(void **state) {
    enum { N = 50, E = 11 };
    Case c = {.seed = 12};
    real_t *logits = case_normal(&c, N * E), *probs = case_poison(&c, N * E), *lse = case_poison(&c, N);
    for (int K = 1; K <= E; K++) {
        for (int renorm = 0; renorm <= 1; renorm++) {
            int *expert = case_ints(&c, N * K);
            real_t *weight = case_poison(&c, N * K);
            topk_forward(probs, lse, expert, weight, logits, N, E, K, renorm, NULL);
            for (int n = 0; n < N; n++) {
                const real_t *l = logits + n * E;
                double sum = 0, chosen_sum = 0;
                bool taken[E] = {false};
                for (int e = 0; e < E; e++) {
                    sum += exp((double)l[e]);
                }
                assert_near(lse[n], log(sum));
                for (int j = 0; j < K; j++) {
                    int best = -1;
                    for (int e = 0; e < E; e++) {
                        best = !taken[e] && (best < 0 || l[e] > l[best]) ? e : best;
                    }
                    taken[best] = true;
                    assert_int_equal(expert[n * K + j], best);
                    chosen_sum += exp((double)l[best]);
                }
                for (int j = 0; j < K; j++) { /* renormalised: the softmax over the chosen logits */
                    assert_near(weight[n * K + j], exp((double)l[expert[n * K + j]]) / (renorm ? chosen_sum : sum));
                }
                for (int e = 0; e < E; e++) {
                    assert_near(probs[n * E + e], exp((double)l[e]) / sum);
                }
            }
        }
        case_free(&c);
        c.seed = 12 + (uint64_t)K;
        logits = case_normal(&c, N * E), probs = case_poison(&c, N * E), lse = case_poison(&c, N);
    }
    case_free(&c);
}

static void test_topk_ties_go_to_the_lower_expert(void **state) {
    enum { E = 8, K = 5 };
    const real_t logits[3][E] = {{0}, {1, 2, 1, 2, 1, 2, 1, 2}, {-5, 3, 3, -5, 0, 0, 3, -5}};
    const int expected[3][K] = {{0, 1, 2, 3, 4}, {1, 3, 5, 7, 0}, {1, 2, 6, 4, 5}};
    real_t probs[3][E], lse[3], weight[3][K];
    int expert[3][K];
    topk_forward(probs[0], lse, expert[0], weight[0], logits[0], 3, E, K, 0, NULL);
    assert_memory_equal(expert, expected, sizeof expected);
}

/* Some K different valid experts, whatever the numbers are, and NaN shows in the row it came from and in no other. */
static void test_topk_of_nan(void **state) {
    enum { N = 7, E = 6, K = 3 };
    for (int renorm = 0; renorm <= 1; renorm++) {
        real_t logits[N][E] = {{0}}, probs[N][E], lse[N], weight[N][K], dweight[N][K] = {{0}}, dlogits[N][E];
        int expert[N][K];
        logits[1][0] = NAN;
        logits[2][5] = NAN;
        logits[3][2] = INFINITY;
        fill_value(logits[4], E, -INFINITY);
        fill_value(logits[5], E, NAN);
        topk_forward(probs[0], lse, expert[0], weight[0], logits[0], N, E, K, renorm, NULL);
        topk_backward(dlogits[0], dweight[0], probs[0], expert[0], weight[0], N, E, K, renorm, NULL);
        for (int n = 0; n < N; n++) {
            for (int j = 0; j < K; j++) {
                assert_in_range(expert[n][j], 0, E - 1);
                for (int i = 0; i < j; i++) {
                    assert_int_not_equal(expert[n][i], expert[n][j]);
                }
            }
        }
        assert_true(all_finite(probs[0], E) && all_finite(probs[6], E) && all_finite(weight[0], K) &&
                    all_finite(weight[6], K));
        for (int n = 1; n <= 2; n++) {
            assert_true(isnan(probs[n][0]) && isnan(probs[n][5]) && isnan(lse[n]));
        }
        assert_true(isnan(probs[5][0]) && isnan(lse[5]));
    }
}

/* The weight of a renormalised top-1 is the constant 1: its router learns nothing from the main loss. Plain top-1 does.
 */
static void test_renormalised_top1_has_no_gradient(void **state) {
    const Operation *op = operation_named("moe_layer");
    for (int renorm = 0; renorm <= 1; renorm++) {
        Case c;
        case_make(&c, op, (int[EXTENTS]){33, 8, 6, 4, 1, renorm}, 13);
        grad(&c, "load")[LOAD_BALANCE] = grad(&c, "load")[LOAD_Z] = 0;
        case_forward(op, &c);
        case_backward(op, &c);
        Array *gate = array_named(&c, "gate");
        assert_int_equal(memcmp(gate->gradient, gate->before, gate->count * sizeof(real_t)) == 0, renorm);
        for (int n = 0; n < 33 && renorm; n++) {
            assert_true(c.plan.weight[n] == 1);
        }
        case_free(&c);
    }
}

static void fill_choices(int *expert, const int *choice, int N, int K, int *demand, int E) {
    memset(demand, 0, (size_t)E * sizeof *demand);
    for (int i = 0; i < N * K; i++) {
        expert[i] = choice ? choice[i] : i % E;
        demand[expert[i]]++;
    }
}

static void test_balance_closed_forms(void **state) {
    enum { N = 16, E = 8, K = 2 };
    Case c = {.seed = 14};
    real_t *probs = case_reals(&c, N * E), *lse = case_reals(&c, N), load[LOAD_VALUES], mean_prob[E],
           *dlogits = case_reals(&c, N * E);
    int expert[N * K], demand[E], count[E] = {4, 4, 4, 4, 4, 4, 0, 0}; /* 8 of 32 entries dropped */
    fill_choices(expert, NULL, N, K, demand, E);
    fill_value(probs, N * E, 1.0 / E);
    fill_value(lse, N, 3);
    balance_forward(load, mean_prob, probs, lse, demand, count, N, E, K, NULL);
    assert_near(load[LOAD_BALANCE], 1);
    assert_near(load[LOAD_Z], 9);
    assert_near(load[LOAD_ENTROPY], log(E));
    assert_near(load[LOAD_MEAN_ENTROPY], log(E));
    assert_near(load[LOAD_DROPPED], 0.25);
    assert_near(mean_prob[3], 1.0 / E);

    balance_backward(dlogits, probs, lse, demand, N, E, K, 1, 0, NULL); /* balanced and uniform: nothing to gain */
    for (int i = 0; i < N * E; i++) {
        assert_true(fabs((double)dlogits[i]) <= 1e-9);
    }
    memset(demand, 0,
           sizeof demand); /* uniform probabilities, one favourite: B is 1 and its gradient pushes the favourite down */
    demand[5] = N * K;
    balance_forward(load, mean_prob, probs, lse, demand, demand, N, E, K, NULL);
    balance_backward(dlogits, probs, lse, demand, N, E, K, 1, 0, NULL);
    assert_near(load[LOAD_BALANCE], 1);
    assert_near(load[LOAD_DROPPED], 0);
    assert_near(dlogits[5], (double)E / N / E * (1 - 1.0 / E));
    assert_near(dlogits[4], -(double)E / N / E / E);

    memset(probs, 0, N * E * sizeof *probs); /* every token sure of the same expert, K = 1 */
    memset(demand, 0, sizeof demand);
    demand[2] = N;
    for (int n = 0; n < N; n++) {
        probs[n * E + 2] = 1;
    }
    balance_forward(load, mean_prob, probs, lse, demand, demand, N, E, 1, NULL);
    assert_near(load[LOAD_BALANCE], E);
    assert_true(load[LOAD_ENTROPY] == 0 && load[LOAD_MEAN_ENTROPY] == 0);

    for (int n = 0; n < N; n++) { /* each token sure of its own: entropy 0, mean entropy ln E */
        fill_value(probs + n * E, E, 0);
        probs[n * E + n % E] = 1;
    }
    fill_choices(expert, NULL, N, 1, demand, E);
    balance_forward(load, mean_prob, probs, lse, demand, demand, N, E, 1, NULL);
    assert_near(load[LOAD_BALANCE], 1);
    assert_true(load[LOAD_ENTROPY] == 0);
    assert_near(load[LOAD_MEAN_ENTROPY], log(E));
    case_free(&c);
}

/* ---- plan */

/* Whether entry a takes a place before entry b. */
static bool goes_first(const Plan *p, int a, int b) {
    if (p->drop == DROP_SLOT && a % p->K != b % p->K) {
        return a % p->K < b % p->K;
    }
    if (p->drop == DROP_WEIGHT && p->weight[a] != p->weight[b]) {
        return p->weight[a] > p->weight[b];
    }
    return a < b;
}

/* Every array of the plan against its definition in plan.h, by counting. */
static void check_plan(const Plan *p) {
    int entries = p->N * p->K, used = 0, padded = p->E > 0 ? p->rows / p->E : 0;
    assert_int_equal(p->offset[0], 0);
    for (int e = 0; e < p->E; e++) {
        int demand = 0, rank = 0;
        for (int i = 0; i < entries; i++) {
            if (p->expert[i] != e) {
                continue;
            }
            demand++;
            int earlier = 0;
            for (int other = 0; other < entries; other++) {
                earlier += p->expert[other] == e && goes_first(p, other, i);
            }
            if (p->capacity > 0 && earlier >= p->capacity) {
                assert_int_equal(p->row[i], -1);
                continue;
            }
            int r = p->offset[e] + rank++; /* rows of an expert in token order, whoever was dropped */
            assert_int_equal(p->row[i], r);
            assert_int_equal(p->entry[r], i);
            assert_true(p->row_weight[r] == p->weight[i]);
        }
        assert_int_equal(p->demand[e], demand);
        assert_int_equal(p->count[e], rank);
        assert_int_equal(p->offset[e + 1] - p->offset[e], p->layout == LAYOUT_PADDED ? padded : rank);
        for (int r = p->offset[e] + rank; r < p->offset[e + 1]; r++) {
            assert_int_equal(p->entry[r], -1);
            assert_true(p->row_weight[r] == 0);
        }
        used += demand;
    }
    assert_int_equal(used, entries);
    assert_true(p->offset[p->E] <= p->rows);
    for (int r = p->offset[p->E]; r < p->rows; r++) {
        assert_int_equal(p->entry[r], -1);
        assert_true(p->row_weight[r] == 0);
    }
}

static void test_plan_invariants(void **state) {
    static const int sizes[][3] = {{1, 1, 1}, {1, 5, 2}, {7, 3, 2}, {40, 8, 2}, {33, 4, 4}, {64, 2, 1}, {20, 17, 3}};
    int dropped = 0;
    for (int i = 0; i < 7 * 3 * 2 * 3 * 4; i++) {
        const int *size = sizes[i / 72];
        int N = size[0], E = size[1], K = size[2], skew = i / 24 % 3, tight = i % 4;
        if (skew == SKEW_EMPTY && K == E) {
            continue;
        }
        int capacity = (int[]){0, 1, (N * K + E - 1) / E, N}[tight];
        Case c = {.seed = (uint64_t)i};
        add_plan(&c, N, E, K, capacity, i / 12 % 2 ? LAYOUT_PADDED : LAYOUT_COMPACT, (DropPolicy)(i / 4 % 3));
        choose_experts(&c.plan, (Skew)skew, c.seed);
        for (int j = 0; j < N * K; j++) { /* few different weights: many ties */
            c.plan.weight[j] = (real_t)(1 + random_below(c.seed, (uint64_t)j, 4)) / 4;
        }
        assert_int_equal(c.plan.rows, c.plan.layout == LAYOUT_PADDED ? E * (capacity ? capacity : N) : N * K);
        plan_build(&c.plan, NULL);
        check_plan(&c.plan);
        real_t *drow = case_normal(&c, (size_t)c.plan.rows), *dweight = case_poison(&c, (size_t)N * K);
        plan_weight_backward(dweight, drow, &c.plan, NULL);
        for (int j = 0; j < N * K; j++) {
            dropped += c.plan.row[j] < 0;
            assert_true(dweight[j] == (c.plan.row[j] < 0 ? 0 : drow[c.plan.row[j]]));
        }
        case_free(&c);
    }
    assert_true(dropped > 1000); /* the policies had something to decide */
}

/* Three tokens, two choices each, one place per expert: who stays under each policy, by hand. */
static void test_drop_policies(void **state) {
    static const int expert[6] = {0, 1, 1, 0, 1, 2};
    static const real_t weight[6] = {0.5, 0.4, 0.4, 0.6, 0.3, 0.2};
    static const int stays[3][6] = {
        [DROP_TOKEN] = {1, 1, 0, 0, 0, 1},  /* token 0 takes both experts */
        [DROP_SLOT] = {1, 0, 1, 0, 0, 1},   /* the first choice of token 1 goes before the second of token 0 */
        [DROP_WEIGHT] = {0, 1, 0, 1, 0, 1}, /* 0.6 before 0.5; the tie at 0.4 goes to the earlier entry */
    };
    for (int drop = DROP_TOKEN; drop <= DROP_WEIGHT; drop++) {
        Case c = {.seed = 1};
        add_plan(&c, 3, 3, 2, 1, LAYOUT_COMPACT, (DropPolicy)drop);
        memcpy(c.plan.expert, expert, sizeof expert);
        memcpy(c.plan.weight, weight, sizeof weight);
        plan_build(&c.plan, NULL);
        for (int i = 0; i < 6; i++) {
            assert_int_equal(c.plan.row[i] >= 0, stays[drop][i]);
        }
        case_free(&c);
    }
}

/* NaN weights of a diverged run must not break capacity or the maps. */
static void test_plan_with_nan_weights(void **state) {
    Case c = {.seed = 1};
    add_plan(&c, 9, 3, 2, 4, LAYOUT_PADDED, DROP_WEIGHT);
    choose_experts(&c.plan, SKEW_ONE, 1);
    for (int i = 0; i < 18; i++) {
        c.plan.weight[i] = i % 3 == 0 ? (real_t)NAN : i % 3 == 1 ? -(real_t)NAN : (real_t)0.5;
    }
    plan_build(&c.plan, NULL);
    int kept = 0;
    for (int i = 0; i < 18; i++) {
        int r = c.plan.row[i], e = c.plan.expert[i];
        assert_in_range(r + 1, 0, c.plan.rows);
        if (r >= 0) {
            kept++;
            assert_int_equal(c.plan.entry[r], i);
            assert_in_range(r, c.plan.offset[e], c.plan.offset[e] + c.plan.count[e] - 1);
        }
    }
    assert_int_equal(c.plan.count[2], 4);
    assert_int_equal(kept, c.plan.count[0] + c.plan.count[1] + c.plan.count[2]);
    case_free(&c);
}

/* ---- dispatch, combine, experts */

/* With experts that do nothing, combine after dispatch is the weighted identity; small integers and powers of two make
 * it exact. */
static void test_dispatch_then_combine(void **state) {
    enum { N = 23, C = 19, E = 5, K = 3 };
    for (int i = 0; i < 2 * 3 * 3; i++) {
        Case c = {.seed = (uint64_t)i};
        add_plan(&c, N, E, K, (int[]){0, 4, N}[i % 3], i / 9 ? LAYOUT_PADDED : LAYOUT_COMPACT, (DropPolicy)(i / 3 % 3));
        Plan *plan = &c.plan;
        choose_experts(plan, (Skew)(i % 3), c.seed);
        real_t *x = case_reals(&c, N * C), *start = case_reals(&c, N * C),
               *rows = case_poison(&c, (size_t)plan->rows * C);
        real_t *y = case_poison(&c, N * C), *dx = case_poison(&c, N * C);
        for (int j = 0; j < N * C; j++) {
            x[j] = (real_t)random_below(1, (uint64_t)j, 129) - 64;
            start[j] = (real_t)random_below(2, (uint64_t)j, 129) - 64;
        }
        for (int j = 0; j < N * K; j++) {
            plan->weight[j] = (real_t)ldexp(1, -(int)random_below(3, (uint64_t)j, 4));
        }
        real_t *y_sum = case_copy(&c, start, N * C), *dx_sum = case_copy(&c, start, N * C);
        plan_build(plan, NULL);
        dispatch_forward(rows, x, plan, C, NULL);
        for (int r = 0; r < plan->offset[E]; r++) {
            for (int j = 0; j < C; j++) {
                assert_true(rows[r * C + j] == (plan->entry[r] < 0 ? 0 : x[plan->entry[r] / K * C + j]));
            }
        }
        combine_forward(y, rows, plan, C, 0, NULL);
        combine_forward(y_sum, rows, plan, C, 1, NULL);
        dispatch_backward(dx, rows, plan, C, 0, NULL);
        dispatch_backward(dx_sum, rows, plan, C, 1, NULL);
        for (int j = 0; j < N * C; j++) {
            real_t weight = 0, places = 0;
            for (int entry = j / C * K; entry < (j / C + 1) * K; entry++) {
                weight += plan->row[entry] < 0 ? 0 : plan->weight[entry];
                places += plan->row[entry] >= 0;
            }
            assert_true(y[j] == weight * x[j] && y_sum[j] == start[j] + weight * x[j]);
            assert_true(dx[j] == places * x[j] && dx_sum[j] == start[j] + places * x[j]);
        }
        case_free(&c);
    }
}

static double expert_hidden(const double *a, int h, int H, bool gelu) {
    if (gelu) {
        return 0.5 * a[h] * (1 + tanh(sqrt(2 / acos(-1.0)) * (a[h] + 0.044715 * a[h] * a[h] * a[h])));
    }
    return a[h] / (1 + exp(-a[h])) * a[H + h];
}

static void check_experts(int rows, int C, int H, int gelu, const int *offset, int E) {
    Case c = {.seed = (uint64_t)(rows + 7 * C + gelu)};
    ExpertShape shape = {.E = E, .C = C, .H = H, .rows = rows, .gelu = gelu};
    int A = experts_a_width(shape);
    assert_int_equal(A, gelu ? H : 2 * H);
    real_t *x = case_normal(&c, (size_t)rows * C), *w1 = case_normal(&c, (size_t)E * A * C),
           *w2 = case_normal(&c, (size_t)E * C * H);
    real_t *y = case_poison(&c, (size_t)rows * C), *a = case_poison(&c, (size_t)rows * A),
           *h = case_poison(&c, (size_t)rows * H);
    real_t *y_sum = case_normal(&c, (size_t)rows * C);
    double *reference = case_doubles(&c, (size_t)rows * C), *sum = case_doubles(&c, (size_t)rows * C),
           *ha = case_doubles(&c, A);
    for (int e = 0; e < E; e++) {
        for (int r = offset[e]; r < offset[e + 1]; r++) {
            for (int i = 0; i < A; i++) {
                ha[i] = dot_double(x + r * C, 1, w1 + ((size_t)e * A + i) * C, 1, C);
            }
            for (int i = 0; i < C; i++) {
                for (int k = 0; k < H; k++) {
                    reference[r * C + i] += expert_hidden(ha, k, H, gelu) * (double)w2[((size_t)e * C + i) * H + k];
                }
                sum[r * C + i] = (double)y_sum[r * C + i] + reference[r * C + i];
            }
        }
    }
    experts_forward(y, a, h, x, w1, w2, offset, shape, 0, NULL);
    experts_forward(y_sum, a, h, x, w1, w2, offset, shape, 1, NULL);
    assert_close(y, reference, (size_t)rows * C);
    assert_close(y_sum, sum, (size_t)rows * C);
    case_free(&c);
}

static void test_experts(void **state) {
    for (int gelu = 0; gelu <= 1; gelu++) {
        check_experts(7, 5, 3, gelu, (int[]){0, 4, 4, 7}, 3);
        check_experts(1, 1, 1, gelu, (int[]){0, 1}, 1);
        check_experts(70, 33, 47, gelu, (int[]){0, 0, 17, 69, 70, 70}, 5);
        check_experts(130, 64, 96, gelu, (int[]){0, 65, 130}, 2);
    }
}

/* An expert without rows keeps the bits of its weight gradients; those of the others change. */
static void test_idle_expert_keeps_its_gradient(void **state) {
    enum { E = 4, ROWS = 40, C = 17, H = 9 };
    static const int offset[E + 1] = {0, 0, 25, 25, 40};
    for (int gelu = 0; gelu <= 1; gelu++) {
        Case c = {.seed = 15};
        ExpertShape shape = {.E = E, .C = C, .H = H, .rows = ROWS, .gelu = gelu};
        size_t A = (size_t)experts_a_width(shape), one[2] = {A * C, (size_t)C * H};
        real_t *x = case_normal(&c, ROWS * C), *w1 = case_normal(&c, E * A * C), *w2 = case_normal(&c, E * C * H);
        real_t *y = case_poison(&c, ROWS * C), *a = case_poison(&c, ROWS * A), *h = case_poison(&c, ROWS * H);
        real_t *da = case_poison(&c, ROWS * A), *dx = case_poison(&c, ROWS * C), *dy = case_normal(&c, ROWS * C);
        real_t *weight = case_normal(&c, ROWS), *dweight = case_poison(&c, ROWS);
        real_t *dw[2] = {case_normal(&c, E * A * C), case_normal(&c, E * C * H)};
        fill_value(dw[0], one[0], -0.0); /* adding even a zero would change these bits */
        fill_value(dw[1], one[1], -0.0);
        real_t *before[2] = {case_copy(&c, dw[0], E * A * C), case_copy(&c, dw[1], E * C * H)};
        experts_forward(y, a, h, x, w1, w2, offset, shape, 0, NULL);
        experts_backward(dx, dweight, dw[0], dw[1], h, da, dy, x, a, weight, w1, w2, offset, shape, 0, NULL);
        for (int e = 0; e < E; e++) {
            for (int i = 0; i < 2; i++) {
                bool same = memcmp(dw[i] + e * one[i], before[i] + e * one[i], one[i] * sizeof(real_t)) == 0;
                assert_int_equal(same, offset[e] == offset[e + 1]);
            }
        }
        for (int r = 0; r < ROWS; r++) { /* the gate's gradient is <dy, y> */
            double product = dot_double(dy + r * C, 1, y + r * C, 1, C);
            assert_true(fabs((double)dweight[r] - product) <= 100 * TOLERANCE * (1 + fabs(product)));
        }
        case_free(&c);
    }
}

/* Where the padded layout has room for all, both layouts compute the same bits, all gradients included. */
static void test_compact_equals_padded(void **state) {
    const Operation *op = operation_named("moe_layer");
    for (int i = 0; i < 3 * 2 * 2; i++) {
        int extents[EXTENTS] = {65, 24, 20, 6, 2, i % 2, i / 2 % 2, 0, LAYOUT_COMPACT, DROP_TOKEN, i / 4};
        Case compact, padded;
        case_make(&compact, op, extents, (uint64_t)i);
        extents[MOE_LAYOUT] = LAYOUT_PADDED;
        extents[MOE_CAPACITY] = i % 2 ? 65 : 0; /* 0 is room for every token too */
        case_make(&padded, op, extents, (uint64_t)i);
        case_forward(op, &compact);
        case_backward(op, &compact);
        case_forward(op, &padded);
        case_backward(op, &padded);
        for (int j = 0; j < compact.array_count; j++) {
            const Array *a = &compact.arrays[j], *b = &padded.arrays[j];
            if (a->role == ROLE_INPUT) {
                assert_bits(a->gradient, b->gradient, a->count);
            } else if (a->role != ROLE_SCRATCH) {
                assert_bits(a->value, b->value, a->count);
            }
        }
        case_free(&compact);
        case_free(&padded);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_topk),
        cmocka_unit_test(test_topk_ties_go_to_the_lower_expert),
        cmocka_unit_test(test_topk_of_nan),
        cmocka_unit_test(test_renormalised_top1_has_no_gradient),
        cmocka_unit_test(test_balance_closed_forms),
        cmocka_unit_test(test_plan_invariants),
        cmocka_unit_test(test_drop_policies),
        cmocka_unit_test(test_plan_with_nan_weights),
        cmocka_unit_test(test_dispatch_then_combine),
        cmocka_unit_test(test_experts),
        cmocka_unit_test(test_idle_expert_keeps_its_gradient),
        cmocka_unit_test(test_compact_equals_padded),
    };
    omp_set_num_threads(1); /* thousands of small calls; test_determinism.c shows that threads change no bit */
    return cmocka_run_group_tests_name("routing: exactness and edges", tests, NULL, NULL);
}
