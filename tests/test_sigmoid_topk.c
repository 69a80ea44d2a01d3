// build: both
/* Sigmoid top-k against its definition in kernels/sigmoid_topk.h, written out slowly in double: scores, groups, the
 * choice, weights, the loss per sequence, and the bias that balances without a loss.
 *
 * test_ops_grad.c has the gradients against differences; here they are held against the full derivative, so that the
 * float build is checked as well.
 */
#include "operations.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>

#include <cmocka.h>

/* One call with everything around it, owned by the case. */
typedef struct {
    Case c;
    SigmoidShape s;
    int *expert;
    real_t *logits, *bias, *scores, *probs, *weight, load[LOAD_VALUES];
} Gate;

static Gate gate_make(SigmoidShape shape, uint64_t seed) {
    Gate g = {.c = {.seed = seed}, .s = shape};
    size_t count = (size_t)shape.N * shape.E, entries = (size_t)shape.N * shape.K;
    g.logits = case_normal(&g.c, count);
    g.bias = case_reals(&g.c, (size_t)shape.E);
    g.scores = case_poison(&g.c, count);
    g.probs = case_poison(&g.c, count);
    g.weight = case_poison(&g.c, entries);
    g.expert = case_ints(&g.c, entries);
    return g;
}

static void gate_choose(Gate *g) {
    sigmoid_topk_forward(g->scores, g->probs, g->expert, g->weight, g->logits, g->bias, g->s, NULL);
}

static bool is_in(const int *expert, int K, int e) {
    for (int j = 0; j < K; j++) {
        if (expert[j] == e) {
            return true;
        }
    }
    return false;
}

static const SigmoidShape shapes[] = {
    {1, 1, 1, 1, 1, 1, 0, 1},        {60, 11, 1, 60, 1, 1, 0, 2.5}, {60, 11, 4, 20, 1, 1, 1, 2.5},
    {33, 5, 5, 11, 1, 1, 1, 1},      {60, 12, 3, 5, 4, 2, 1, 2.5},  {60, 12, 4, 60, 6, 2, 0, 1},
    {60, 8, 2, 1, 8, 3, 1, 1},       {60, 8, 2, 30, 2, 2, 1, 1},    {200, 64, 8, 100, 8, 4, 1, 2.5},
    {200, 64, 8, 100, 8, 1, 1, 2.5},
};
enum { SHAPES = sizeof shapes / sizeof *shapes };

/* ---- the choice */

/* Which of `count` values are the `most` largest, ties to the lower index. */
static void mark_largest(bool *marked, const double *value, int count, int most) {
    memset(marked, 0, (size_t)count * sizeof *marked);
    for (int i = 0; i < most; i++) {
        int best = -1;
        for (int k = 0; k < count; k++) {
            best = !marked[k] && (best < 0 || value[k] > value[best]) ? k : best;
        }
        marked[best] = true;
    }
}

/* The experts of the kept groups of one token, from its s + b as the kernel rounds it. */
static void mark_allowed(bool *allowed, const real_t *scores, const real_t *bias, SigmoidShape shape) {
    int size = shape.E / shape.groups;
    double score[64];
    bool kept[64];
    for (int g = 0; g < shape.groups; g++) {
        real_t first = -INFINITY, second = -INFINITY;
        for (int e = g * size; e < (g + 1) * size; e++) {
            real_t value = scores[e] + bias[e];
            second = value > first ? first : value > second ? value : second;
            first = value > first ? value : first;
        }
        score[g] = (double)(real_t)(first + (size > 1 ? second : 0));
    }
    mark_largest(kept, score, shape.groups, shape.kept);
    for (int e = 0; e < shape.E; e++) {
        allowed[e] = kept[e / size];
    }
}

/* Everything the forward writes, of every token. */
static void check_forward(const Gate *g) {
    const SigmoidShape shape = g->s;
    for (int n = 0; n < shape.N; n++) {
        const real_t *s = g->scores + n * shape.E, *w = g->weight + n * shape.K;
        const int *expert = g->expert + n * shape.K;
        bool allowed[64];
        double sum = 0, total = 1e-20;
        for (int e = 0; e < shape.E; e++) {
            assert_near(s[e], 1 / (1 + exp(-(double)g->logits[n * shape.E + e])));
            sum += (double)s[e];
        }
        mark_allowed(allowed, s, g->bias, shape);
        for (int j = 0; j < shape.K; j++) {
            real_t value = s[expert[j]] + g->bias[expert[j]];
            assert_true(allowed[expert[j]] && !is_in(expert, j, expert[j]));
            for (int e = 0; e < shape.E; e++) { /* nobody allowed who is not before it is better */
                real_t other = s[e] + g->bias[e];
                bool worse = other < value || (other == value && e >= expert[j]);
                assert_true(worse || !allowed[e] || is_in(expert, j, e));
            }
            total += (double)s[expert[j]];
        }
        for (int j = 0; j < shape.K; j++) {
            assert_near(w[j], shape.scale * (double)s[expert[j]] / (shape.renorm ? total : 1));
        }
        for (int e = 0; e < shape.E; e++) {
            assert_near(g->probs[n * shape.E + e], (double)s[e] / sum);
        }
    }
}

static void test_forward(void **state) {
    for (int i = 0; i < SHAPES; i++) {
        Gate g = gate_make(shapes[i], (uint64_t)i);
        gate_choose(&g);
        check_forward(&g);
        fill_normal(g.bias, (size_t)g.s.E, 0, 0.3, (uint64_t)i, 1);
        gate_choose(&g);
        check_forward(&g);
        fill_normal(g.bias, (size_t)g.s.E, -2, 0.3, (uint64_t)i, 1); /* every s + b below 0 */
        gate_choose(&g);
        check_forward(&g);
        for (int j = 0; j < g.s.N * g.s.E; j++) { /* few different scores: many ties */
            g.logits[j] = (real_t)random_below((uint64_t)i, (uint64_t)j, 3);
        }
        fill_value(g.bias, (size_t)g.s.E, 0);
        gate_choose(&g);
        check_forward(&g);
        case_free(&g.c);
    }
}

/* Without bias, scale and renormalisation the weight is the score, best first. */
static void test_plain_chooses_by_score(void **state) {
    Gate g = gate_make((SigmoidShape){40, 10, 3, 40, 1, 1, 0, 1}, 1);
    gate_choose(&g);
    for (int n = 0; n < g.s.N; n++) {
        const real_t *w = g.weight + n * 3, *s = g.scores + n * 10;
        int above = 0;
        for (int e = 0; e < 10; e++) {
            above += s[e] > w[2];
        }
        assert_int_equal(above, 2);
        for (int j = 0; j < 3; j++) {
            assert_true(w[j] == s[g.expert[n * 3 + j]] && (j == 0 || w[j - 1] >= w[j]));
        }
    }
    case_free(&g.c);
}

/* An expert raised by its bias is chosen by every token; scores, shares and its weight are as without. */
static void test_bias_selects_and_does_no_more(void **state) {
    enum { N = 40, E = 10, FAVOURITE = 7 };
    Gate g = gate_make((SigmoidShape){N, E, 2, N, 1, 1, 0, 1}, 2);
    gate_choose(&g);
    real_t *scores = case_copy(&g.c, g.scores, N * E), *probs = case_copy(&g.c, g.probs, N * E);
    int before = 0;
    for (int n = 0; n < N; n++) {
        before += is_in(g.expert + 2 * n, 2, FAVOURITE);
    }
    assert_in_range(before, 0, N / 2);
    g.bias[FAVOURITE] = 1;
    gate_choose(&g);
    assert_bits(g.scores, scores, N * E);
    assert_bits(g.probs, probs, N * E);
    for (int n = 0; n < N; n++) {
        assert_int_equal(g.expert[2 * n], FAVOURITE);
        assert_true(g.weight[2 * n] == scores[n * E + FAVOURITE]);
    }
    case_free(&g.c);
}

/* Two groups of two, one kept, all s + b negative: the pairs are (-1.1, -1.9) and (-1.4, -1.5), so the second group has
 * the higher sum although the first has the best expert. An expert outside it that counted as 0 would be chosen. */
static void test_masked_experts_never_win(void **state) {
    static const double biased[4] = {-1.1, -1.9, -1.4, -1.5};
    Gate g = gate_make((SigmoidShape){1, 4, 2, 1, 2, 1, 1, 1}, 3);
    for (int e = 0; e < 4; e++) {
        g.bias[e] = -2;
        g.logits[e] = (real_t)log((2 + biased[e]) / (-1 - biased[e])); /* the logit of biased + 2 */
    }
    gate_choose(&g);
    assert_int_equal(g.expert[0], 2);
    assert_int_equal(g.expert[1], 3);
    case_free(&g.c);
}

static void test_ties_go_to_the_lower_expert(void **state) {
    static const int expected[4] = {0, 1, 2, 3};
    Gate g = gate_make((SigmoidShape){1, 8, 4, 1, 4, 2, 1, 1}, 4);
    fill_value(g.logits, 8, 0.3);
    gate_choose(&g);
    assert_memory_equal(g.expert, expected, sizeof expected);
    g.logits[7] = 2; /* the last group has the best expert, the first stays by the tie */
    gate_choose(&g);
    assert_memory_equal(g.expert, ((int[]){7, 0, 1, 6}), sizeof expected);
    case_free(&g.c);
}

/* K different valid experts whatever the numbers are, NaN stays in its row, is chosen last, and opens no closed group.
 */
static void test_nan(void **state) {
    enum { N = 7, E = 8, K = 4 };
    for (int groups = 1; groups <= 4; groups *= 2) {
        int kept = groups == 1 ? 1 : groups / 2, size = E / groups;
        Gate g = gate_make((SigmoidShape){N, E, K, N, groups, kept, 1, 1}, 5);
        real_t *dweight = case_normal(&g.c, N * K), *dlogits = case_poison(&g.c, N * E);
        g.logits[1 * E + 2] = NAN;
        fill_value(g.logits + 2 * E, E, NAN);
        fill_value(g.logits + 3 * E, E / 2, NAN);
        g.logits[4 * E + 1] = INFINITY;
        g.logits[4 * E + 6] = -INFINITY;
        fill_value(g.logits + 6 * E + 4, 4, 3); /* the later half is kept, NaN and all */
        g.logits[6 * E + 7] = NAN;
        gate_choose(&g);
        sigmoid_topk_backward(dlogits, dweight, g.scores, g.expert, g.weight, g.s, NULL);
        for (int n = 0; n < N; n++) {
            bool used[E] = {false};
            int used_groups = 0;
            for (int j = 0; j < K; j++) {
                int e = g.expert[n * K + j];
                assert_in_range(e, 0, E - 1);
                assert_false(is_in(g.expert + n * K, j, e));
                used_groups += !used[e / size];
                used[e / size] = true;
            }
            assert_true(used_groups <= kept || groups == 1);
        }
        assert_false(is_in(g.expert + K, K - 1, 2));
        assert_true(all_finite(g.weight, K) && all_finite(g.probs, E) && all_finite(dlogits, E));
        assert_true(all_finite(g.weight + 5 * K, K) && all_finite(dlogits + 5 * E, E));
        assert_true(isnan(g.weight[2 * K]) && isnan(g.probs[2 * E]));
        assert_true(g.scores[4 * E + 1] == 1 && g.scores[4 * E + 6] < 1e-30);
        sequence_balance_forward(g.load, g.probs, g.expert, g.s, NULL);
        sequence_balance_backward(dlogits, g.load, g.scores, g.probs, g.expert, 1, g.s, NULL);
        assert_true(isnan(g.load[LOAD_BALANCE]) && isnan(g.load[LOAD_BALANCE_GRADIENT]));
        case_free(&g.c);
    }
}

/* A token whose scores are all nearly 0 gets weights of nearly 0, not a division by it. */
static void test_tiny_scores(void **state) {
    Gate g = gate_make((SigmoidShape){1, 4, 2, 1, 1, 1, 1, 1}, 6);
    real_t dweight[2] = {1, -1}, dlogits[4];
    fill_value(g.logits, 4, -60);
    gate_choose(&g);
    sigmoid_topk_backward(dlogits, dweight, g.scores, g.expert, g.weight, g.s, NULL);
    assert_true(fabs((double)g.weight[0] - exp(-60) / 1e-20) < 1e-3 * exp(-60) / 1e-20);
    assert_near(g.probs[3], 0.25);
    assert_true(all_finite(dlogits, 4));
    case_free(&g.c);
}

/* ---- backward */

static void test_backward(void **state) {
    for (int i = 0; i < SHAPES; i++) {
        Gate g = gate_make(shapes[i], 10 + (uint64_t)i);
        const int N = g.s.N, E = g.s.E, K = g.s.K;
        fill_normal(g.bias, (size_t)E, 0, 0.3, (uint64_t)i, 1);
        gate_choose(&g);
        real_t *dweight = case_normal(&g.c, (size_t)N * K), *dlogits = case_poison(&g.c, (size_t)N * E);
        double *reference = case_doubles(&g.c, (size_t)N * E);
        sigmoid_topk_backward(dlogits, dweight, g.scores, g.expert, g.weight, g.s, NULL);
        for (int a = 0; a < N * K; a++) { /* weight a by the score of b: (t 1[a = b] - s_a) / t^2, or 1[a = b] */
            int n = a / K;
            double total = 1e-20, score = (double)g.scores[n * E + g.expert[a]];
            for (int b = n * K; b < (n + 1) * K; b++) {
                total += (double)g.scores[n * E + g.expert[b]];
            }
            for (int b = n * K; b < (n + 1) * K; b++) {
                double s = (double)g.scores[n * E + g.expert[b]];
                double dw = g.s.renorm ? ((a == b) * total - score) / (total * total) : a == b;
                reference[n * E + g.expert[b]] += (double)dweight[a] * g.s.scale * dw * s * (1 - s);
            }
        }
        assert_close(dlogits, reference, (size_t)N * E);
        case_free(&g.c);
    }
}

/* ---- the loss per sequence */

static void test_sequence_balance(void **state) {
    const double scale = 0.7;
    for (int i = 0; i < SHAPES; i++) {
        Gate g = gate_make(shapes[i], 20 + (uint64_t)i);
        const int N = g.s.N, E = g.s.E, K = g.s.K, T = g.s.T, sequences = N / T;
        real_t *dlogits = case_reals(&g.c, (size_t)N * E);
        double *reference = case_doubles(&g.c, (size_t)N * E), balance = 0, square = 0;
        fill_normal(g.bias, (size_t)E, 0, 0.3, (uint64_t)i, 1);
        gate_choose(&g);
        for (int b = 0; b < sequences; b++) {
            double f[64] = {0}, P[64] = {0};
            for (int a = b * T * K; a < (b + 1) * T * K; a++) {
                f[g.expert[a]] += (double)E / (K * T);
            }
            for (int n = b * T; n < (b + 1) * T; n++) {
                const real_t *s = g.scores + n * E;
                double sum = 0, mean = 0;
                for (int e = 0; e < E; e++) {
                    sum += (double)s[e];
                }
                for (int e = 0; e < E; e++) {
                    P[e] += s[e] / sum / T;
                    mean += f[e] * s[e] / sum;
                }
                for (int e = 0; e < E; e++) {
                    reference[n * E + e] = scale / sequences / T * (f[e] - mean) / sum * s[e] * (1 - (double)s[e]);
                    square += reference[n * E + e] * reference[n * E + e];
                }
            }
            for (int e = 0; e < E; e++) {
                balance += f[e] * P[e] / sequences;
            }
        }
        sequence_balance_forward(g.load, g.probs, g.expert, g.s, NULL);
        sequence_balance_backward(dlogits, g.load, g.scores, g.probs, g.expert, scale, g.s, NULL);
        assert_near(g.load[LOAD_BALANCE], balance);
        assert_true(g.load[LOAD_Z] == 0);
        assert_near(g.load[LOAD_BALANCE_GRADIENT], sqrt(square));
        for (int j = 0; j < N * E; j++) { /* absolute: with K = E the gradient is 0 */
            assert_true(fabs((double)dlogits[j] - reference[j]) <= TOLERANCE);
        }
        case_free(&g.c);
    }
}

/* 1 at balance; E where a sequence crowds on one expert, even if others crowd elsewhere and the batch is balanced. */
static void test_sequence_balance_closed_forms(void **state) {
    enum { N = 32, E = 4, T = 8 };
    Gate g = gate_make((SigmoidShape){N, E, 1, T, 1, 1, 1, 1}, 7);
    fill_value(g.probs, N * E, 1.0 / E);
    for (int n = 0; n < N; n++) {
        g.expert[n] = n % E;
    }
    sequence_balance_forward(g.load, g.probs, g.expert, g.s, NULL);
    assert_near(g.load[LOAD_BALANCE], 1);
    fill_value(g.probs, N * E, 0);
    for (int n = 0; n < N; n++) { /* sequence b is all expert b's */
        g.expert[n] = n / T;
        g.probs[n * E + n / T] = 1;
    }
    sequence_balance_forward(g.load, g.probs, g.expert, g.s, NULL);
    assert_near(g.load[LOAD_BALANCE], E);
    g.s.T = N; /* as one sequence the same tokens are balanced */
    sequence_balance_forward(g.load, g.probs, g.expert, g.s, NULL);
    assert_near(g.load[LOAD_BALANCE], 1);
    case_free(&g.c);
}

/* ---- the bias */

/* Two slices, rows longer than E: sums 8, 2, 5, 5 with mean 5. */
static void test_bias_update(void **state) {
    enum { E = 4, STRIDE = 6 };
    static const int counts[2][STRIDE] = {{7, 0, 5, 2, 999, 999}, {1, 2, 0, 3, 999, 999}};
    AdamState adam = {.scale = 0};
    real_t bias[E] = {0.5, 0.5, -0.5, 0.25};
    selection_bias_update(bias, counts[0], 2, STRIDE, E, 0.125, &adam, NULL); /* a skipped step */
    assert_true(bias[0] == 0.5 && bias[1] == 0.5 && bias[2] == -0.5 && bias[3] == 0.25);
    adam.scale = 0.3; /* clipping does not shorten it */
    selection_bias_update(bias, counts[0], 2, STRIDE, E, 0.125, &adam, NULL);
    assert_true(bias[0] == 0.375 && bias[1] == 0.625 && bias[2] == -0.5 && bias[3] == 0.25);
    selection_bias_update(bias, counts[0], 1, STRIDE, 3, 0.125, &adam, NULL); /* 7, 0, 5 with mean 4 */
    assert_true(bias[0] == 0.25 && bias[1] == 0.75 && bias[2] == -0.625 && bias[3] == 0.25);
    selection_bias_update(bias, counts[1], 1, STRIDE, 3, 0, &adam, NULL); /* rate 0: frozen */
    assert_true(bias[0] == 0.25 && bias[1] == 0.75 && bias[2] == -0.625);
}

/* Largest load over the mean load, less 1, of one batch. */
static double max_violation(int *count, const Gate *g) {
    int largest = 0;
    memset(count, 0, (size_t)g->s.E * sizeof *count);
    for (int i = 0; i < g->s.N * g->s.K; i++) {
        int load = ++count[g->expert[i]];
        largest = load > largest ? load : largest;
    }
    return (double)largest * g->s.E / ((double)g->s.N * g->s.K) - 1;
}

/* A router that favours one expert and never learns, fresh tokens each step: the bias alone spreads them. */
static void test_bias_balances_a_skewed_stream(void **state) {
    enum { N = 4096, E = 8, K = 2, STEPS = 150, FAVOURITE = 3 };
    const AdamState adam = {.scale = 1};
    Gate g = gate_make((SigmoidShape){N, E, K, N, 1, 1, 1, 2.5}, 8);
    int count[E];
    double rate = 0.01, at_first = 0;
    for (int step = 0; step < STEPS; step++) {
        fill_normal(g.logits, N * E, 0, 1, (uint64_t)step, 2);
        for (int n = 0; n < N; n++) {
            g.logits[n * E + FAVOURITE] += 3;
        }
        gate_choose(&g);
        double violation = max_violation(count, &g);
        at_first = step == 0 ? violation : at_first;
        assert_true(step < STEPS - 20 || violation < 0.1); /* and it stays there */
        selection_bias_update(g.bias, count, 1, E, E, rate, &adam, NULL);
        rate *= step < 60 ? 1 : 0.95;
    }
    assert_true(at_first > 2); /* K = 2 of 8: at most 3 */
    for (int e = 0; e < E; e++) {
        assert_true(e == FAVOURITE ? g.bias[e] < -0.1 : g.bias[e] > g.bias[FAVOURITE] + 0.2);
    }
    gate_choose(&g);
    check_forward(&g); /* scores and weights still know nothing of the bias */
    case_free(&g.c);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_forward),
        cmocka_unit_test(test_plain_chooses_by_score),
        cmocka_unit_test(test_bias_selects_and_does_no_more),
        cmocka_unit_test(test_masked_experts_never_win),
        cmocka_unit_test(test_ties_go_to_the_lower_expert),
        cmocka_unit_test(test_nan),
        cmocka_unit_test(test_tiny_scores),
        cmocka_unit_test(test_backward),
        cmocka_unit_test(test_sequence_balance),
        cmocka_unit_test(test_sequence_balance_closed_forms),
        cmocka_unit_test(test_bias_update),
        cmocka_unit_test(test_bias_balances_a_skewed_stream),
    };
    omp_set_num_threads(1); /* small calls; test_determinism.c shows that threads change no bit */
    return cmocka_run_group_tests_name("sigmoid top-k", tests, NULL, NULL);
}
