// build: both
/* Routing against its definition, slowly and in double: top-k, its two halves, the experts.
 *
 * The edges are visited: ties, NaN, K = E, entries that are not there, an expert without rows. test_plan.c has the plan
 * and what follows it, test_balance_loss.c the losses and statistics, test_ops_exact.c the dense operations.
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

/* The two halves around another's choice give the bits of the whole, and take any choice: here each expert's own. */
static void test_halves_of_topk(void **state) {
    enum { N = 50 };
    for (int i = 0; i < 6; i++) {
        int E = (int[]){1, 7, 40}[i / 2], K = E < 4 ? E : 4, renorm = i % 2;
        size_t scores = (size_t)N * E, entries = (size_t)N * K;
        Case c = {.seed = (uint64_t)i};
        real_t *logits = case_normal(&c, scores), *probs = case_poison(&c, scores), *lse = case_poison(&c, N);
        real_t *weight = case_poison(&c, entries), *half_probs = case_poison(&c, scores);
        real_t *half_lse = case_poison(&c, N), *half_weight = case_poison(&c, entries);
        int *expert = case_ints(&c, entries);
        topk_forward(probs, lse, expert, weight, logits, N, E, K, renorm, NULL);
        softmax_forward(half_probs, half_lse, logits, N, E, NULL);
        choice_weight(half_weight, expert, probs, N, E, K, renorm, NULL);
        assert_bits(probs, half_probs, scores);
        assert_bits(lse, half_lse, N);
        assert_bits(weight, half_weight, entries);

        int *picked = case_ints(&c, scores);
        real_t *picked_weight = case_poison(&c, scores), *dlogits = case_poison(&c, scores);
        real_t *g = case_normal(&c, scores);
        for (int j = 0; j < N * E; j++) {
            picked[j] = random_below(5, (uint64_t)j, 3) > 0 ? -1 : j % E; /* a token may have none */
            g[j] = picked[j] < 0 ? 0 : g[j];
        }
        choice_weight(picked_weight, picked, probs, N, E, E, renorm, NULL);
        topk_backward(dlogits, g, probs, picked, picked_weight, N, E, E, renorm, NULL);
        for (int n = 0; n < N; n++) {
            double total = 0, mean = 0;
            for (int e = 0; e < E; e++) {
                total += picked[n * E + e] < 0 ? 0 : (double)probs[n * E + e];
            }
            for (int e = 0; e < E; e++) {
                int j = n * E + e;
                assert_near(picked_weight[j], picked[j] < 0 ? 0 : (double)probs[j] / (renorm ? total : 1));
                mean += (double)picked_weight[j] * (double)g[j];
            }
            for (int e = 0; e < E; e++) {
                int j = n * E + e;
                double share = renorm ? (double)picked_weight[j] : (double)probs[j];
                assert_near(dlogits[j], share * ((double)g[j] - mean));
            }
        }
        case_free(&c);
    }
}

/* The weight of a renormalised top-1 is the constant 1: its router learns nothing from the main loss. Plain top-1 does.
 */
static void test_renormalised_top1_has_no_gradient(void **state) {
    const Operation *op = operation_named("moe_layer");
    for (int renorm = 0; renorm <= 1; renorm++) {
        Case c;
        case_make(&c, op, (int[EXTENTS]){33, 8, 6, 4, 1, renorm}, 13);
        host_grad(&c, "load")[LOAD_BALANCE] = host_grad(&c, "load")[LOAD_Z] = 0;
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

/* ---- experts */

static double expert_hidden(const double *a, int h, int H, bool gelu) {
    if (gelu) {
        return 0.5 * a[h] * (1 + tanh(sqrt(2 / acos(-1.0)) * (a[h] + 0.044715 * a[h] * a[h] * a[h])));
    }
    return a[h] / (1 + exp(-a[h])) * a[H + h];
}

static void check_experts(int rows, int C, int H, int gelu, const int *offset, int E) {
    Case c = {.seed = (uint64_t)(rows + 7 * C + gelu)};
    ExpertShape shape = {.E = E, .C = C, .H = H, .rows = rows, .act = gelu};
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
    experts_forward(y, a, h, (RowSource){x, NULL, 0}, w1, w2, offset, shape, 0, NULL);
    experts_forward(y_sum, a, h, (RowSource){x, NULL, 0}, w1, w2, offset, shape, 1, NULL);
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
        ExpertShape shape = {.E = E, .C = C, .H = H, .rows = ROWS, .act = gelu};
        size_t A = (size_t)experts_a_width(shape), one[2] = {A * C, (size_t)C * H};
        real_t *x = case_normal(&c, ROWS * C), *w1 = case_normal(&c, E * A * C), *w2 = case_normal(&c, E * C * H);
        real_t *y = case_poison(&c, ROWS * C), *a = case_poison(&c, ROWS * A), *h = case_poison(&c, ROWS * H);
        real_t *da = case_poison(&c, ROWS * A), *dx = case_poison(&c, ROWS * C), *dy = case_normal(&c, ROWS * C);
        real_t *weight = case_normal(&c, ROWS), *dweight = case_poison(&c, ROWS);
        real_t *dw[2] = {case_normal(&c, E * A * C), case_normal(&c, E * C * H)};
        fill_value(dw[0], one[0], -0.0); /* adding even a zero would change these bits */
        fill_value(dw[1], one[1], -0.0);
        real_t *before[2] = {case_copy(&c, dw[0], E * A * C), case_copy(&c, dw[1], E * C * H)};
        experts_forward(y, a, h, (RowSource){x, NULL, 0}, w1, w2, offset, shape, 0, NULL);
        experts_backward(dx, dweight, dw[0], dw[1], h, da, (RowSource){dy, NULL, 0}, (RowSource){x, NULL, 0}, a, weight,
                         w1, w2, offset, shape, 0, 1, NULL);
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

/* Overwriting weight gradients that hold NaN gives the bits of adding to zeros, and zeros where an expert has no rows;
 * whether dx is added to is another matter. */
static void check_overwritten_gradients(int gelu, const int *offset, int E, int C, int H) {
    Case c = {.seed = 16};
    size_t rows = (size_t)offset[E];
    ExpertShape shape = {.E = E, .C = C, .H = H, .rows = offset[E], .act = gelu};
    size_t A = (size_t)experts_a_width(shape), count[2] = {E * A * C, (size_t)E * C * H};
    real_t *x = case_normal(&c, rows * C), *w1 = case_normal(&c, count[0]), *w2 = case_normal(&c, count[1]);
    real_t *a = case_normal(&c, rows * A), *h = case_poison(&c, rows * H), *da = case_poison(&c, rows * A);
    real_t *dy = case_normal(&c, rows * C), *weight = case_normal(&c, rows), *dweight = case_poison(&c, rows);
    real_t *dx_before = case_normal(&c, rows * C), *dw[2][2], *dx[2][2];
    for (int add_dx = 0; add_dx <= 1; add_dx++) {
        for (int add_dw = 0; add_dw <= 1; add_dw++) {
            for (int i = 0; i < 2; i++) {
                dw[add_dw][i] = add_dw ? case_reals(&c, count[i]) : case_poison(&c, count[i]);
            }
            dx[add_dx][add_dw] = add_dx ? case_copy(&c, dx_before, rows * C) : case_poison(&c, rows * C);
            experts_backward(dx[add_dx][add_dw], dweight, dw[add_dw][0], dw[add_dw][1], h, da, (RowSource){dy, NULL, 0},
                             (RowSource){x, NULL, 0}, a, weight, w1, w2, offset, shape, add_dx, add_dw, NULL);
        }
        assert_bits(dw[0][0], dw[1][0], count[0]);
        assert_bits(dw[0][1], dw[1][1], count[1]);
        assert_bits(dx[add_dx][0], dx[add_dx][1], rows * C);
    }
    for (int e = 0; e < E; e++) {
        for (int i = 0; i < 2; i++) {
            double largest = 0;
            for (size_t j = count[i] / E * e; j < count[i] / E * (e + 1); j++) {
                largest = fmax(largest, fabs((double)dw[0][i][j]));
            }
            assert_int_equal(largest == 0, offset[e] == offset[e + 1]);
        }
    }
    case_free(&c);
}

static void test_overwritten_gradients(void **state) {
    for (int gelu = 0; gelu <= 1; gelu++) {
        check_overwritten_gradients(gelu, (int[]){0, 0, 25, 25, 40, 40}, 5, 17, 9);
        check_overwritten_gradients(gelu, (int[]){0, 300, 300, 301}, 3, 64, 160); /* longer than TILE_DEPTH */
        check_overwritten_gradients(gelu, (int[]){0, 0, 0}, 2, 33, 5);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_topk),
        cmocka_unit_test(test_topk_ties_go_to_the_lower_expert),
        cmocka_unit_test(test_topk_of_nan),
        cmocka_unit_test(test_halves_of_topk),
        cmocka_unit_test(test_renormalised_top1_has_no_gradient),
        cmocka_unit_test(test_experts),
        cmocka_unit_test(test_idle_expert_keeps_its_gradient),
        cmocka_unit_test(test_overwritten_gradients),
    };
    omp_set_num_threads(1); /* thousands of small calls; test_determinism.c shows that threads change no bit */
    return cmocka_run_group_tests_name("routing: exactness and edges", tests, NULL, NULL);
}
