// build: both
/* Noisy top-k and its losses against their definitions in kernels/noisy.h, written out slowly in double.
 *
 * Thresholds are found here by taking an expert out and sorting the rest. test_ops_grad.c has the gradients against
 * differences; here they are held against the sums over all pairs, so that the float build is checked as well.
 */
#include "operations.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>

#include <cmocka.h>

enum { KEY = 12345 };

/* One call with everything around it, owned by the case. */
typedef struct {
    Case c;
    int N, E, K, *expert;
    real_t *clean, *raw, *h, *noise, *weight, *probs, *sums, load[LOAD_VALUES];
} Gate;

static Gate gate_make(int N, int E, int K, uint64_t seed) {
    Gate g = {.c = {.seed = seed}, .N = N, .E = E, .K = K};
    size_t count = (size_t)N * E;
    g.clean = case_normal(&g.c, count);
    g.raw = case_normal(&g.c, count);
    g.h = case_poison(&g.c, count);
    g.noise = case_poison(&g.c, count);
    g.probs = case_poison(&g.c, count);
    g.weight = case_poison(&g.c, (size_t)N * K);
    g.sums = case_poison(&g.c, 2 * (size_t)E);
    g.expert = case_ints(&g.c, (size_t)N * K);
    return g;
}

static void gate_forward_noisy(Gate *g, int noisy) {
    noisy_forward(g->h, g->noise, g->expert, g->weight, g->probs, g->clean, g->raw, &(uint64_t){KEY}, noisy, g->N, g->E,
                  g->K, NULL);
}

static void gate_balance(Gate *g, int noisy) {
    fill_value(g->load, LOAD_VALUES, NAN);
    noisy_balance_forward(g->load, g->sums, g->clean, g->raw, g->h, g->expert, g->weight, noisy, g->N, g->E, g->K,
                          NULL);
}

static double sigma_of(double r) {
    return log(1 + exp(r)) + 0.01;
}

static double logistic(double r) {
    return 1 / (1 + exp(-r));
}

static double normal_below(double z) {
    return 0.5 * erfc(-z / sqrt(2));
}

/* The expert whose h is the K-th largest among all but e. */
static int threshold_expert(const real_t *h, int E, int K, int e) {
    bool taken[64] = {false};
    int best = -1;
    taken[e] = true;
    for (int rank = 1; rank <= K; rank++) {
        best = -1;
        for (int i = 0; i < E; i++) {
            best = !taken[i] && (best < 0 || h[i] > h[best]) ? i : best;
        }
        taken[best] = true;
    }
    return best;
}

static bool is_in(const int *expert, int K, int e) {
    for (int j = 0; j < K; j++) {
        if (expert[j] == e) {
            return true;
        }
    }
    return false;
}

static const int shapes[][3] = {{1, 2, 1},     {1, 9, 8},  {50, 11, 1}, {50, 11, 4},
                                {130, 35, 10}, {67, 3, 2}, {300, 64, 6}};
enum { SHAPES = sizeof shapes / sizeof *shapes };

/* ---- the gate */

static void test_forward(void **state) {
    for (int i = 0; i < SHAPES; i++) {
        Gate g = gate_make(shapes[i][0], shapes[i][1], shapes[i][2], (uint64_t)i);
        gate_forward_noisy(&g, 1);
        for (int n = 0; n < g.N; n++) {
            const real_t *h = g.h + n * g.E;
            const int *expert = g.expert + n * g.K;
            double chosen_sum = 0, sum = 0;
            for (int e = 0; e < g.E; e++) {
                size_t at = (size_t)n * g.E + e;
                assert_near(g.noise[at], random_normal(KEY, at));
                assert_near(h[e], g.clean[at] + random_normal(KEY, at) * sigma_of(g.raw[at]));
                sum += exp((double)g.clean[at]);
            }
            for (int j = 0; j < g.K; j++) {
                assert_false(is_in(expert, j, expert[j]));
                for (int e = 0; e < g.E; e++) { /* nobody who is not before it is larger */
                    assert_true(h[e] <= h[expert[j]] || is_in(expert, j, e));
                }
                chosen_sum += exp((double)h[expert[j]]);
            }
            for (int j = 0; j < g.K; j++) {
                assert_near(g.weight[n * g.K + j], exp((double)h[expert[j]]) / chosen_sum);
            }
            for (int e = 0; e < g.E; e++) {
                assert_near(g.probs[n * g.E + e], exp((double)g.clean[n * g.E + e]) / sum);
            }
        }
        case_free(&g.c);
    }
}

static void test_backward(void **state) {
    for (int i = 0; i < SHAPES; i++) {
        Gate g = gate_make(shapes[i][0], shapes[i][1], shapes[i][2], 10 + (uint64_t)i);
        size_t count = (size_t)g.N * g.E;
        real_t *dweight = case_normal(&g.c, (size_t)g.N * g.K);
        real_t *dclean = case_poison(&g.c, count), *draw = case_poison(&g.c, count);
        double *dclean_ref = case_doubles(&g.c, count), *draw_ref = case_doubles(&g.c, count);
        gate_forward_noisy(&g, 1);
        noisy_backward(dclean, draw, dweight, g.raw, g.noise, g.expert, g.weight, g.N, g.E, g.K, NULL);
        for (int a = 0; a < g.N * g.K; a++) { /* every weight's derivative by every chosen logit of its token */
            for (int b = a / g.K * g.K; b < (a / g.K + 1) * g.K; b++) {
                size_t at = (size_t)(a / g.K) * g.E + g.expert[b];
                double dh = (double)dweight[a] * g.weight[a] * ((a == b) - (double)g.weight[b]);
                dclean_ref[at] += dh;
                draw_ref[at] += dh * g.noise[at] * logistic(g.raw[at]);
            }
        }
        assert_close(dclean, dclean_ref, count);
        assert_close(draw, draw_ref, count);
        case_free(&g.c);
    }
}

/* Without noise it is top-k, renormalised. */
static void test_without_noise_it_is_topk(void **state) {
    for (int i = 0; i < SHAPES; i++) {
        Gate g = gate_make(shapes[i][0], shapes[i][1], shapes[i][2], 20 + (uint64_t)i);
        size_t entries = (size_t)g.N * g.K, count = (size_t)g.N * g.E;
        real_t *probs = case_poison(&g.c, count), *lse = case_poison(&g.c, (size_t)g.N),
               *weight = case_poison(&g.c, entries);
        int *expert = case_ints(&g.c, entries);
        topk_forward(probs, lse, expert, weight, g.clean, g.N, g.E, g.K, 1, NULL);
        gate_forward_noisy(&g, 0);
        assert_bits(g.h, g.clean, count);
        assert_bits(g.expert, expert, entries);
        for (size_t j = 0; j < entries; j++) {
            assert_near(g.weight[j], weight[j]);
        }
        for (size_t j = 0; j < count; j++) {
            assert_true(g.noise[j] == 0);
            assert_near(g.probs[j], probs[j]);
        }
        case_free(&g.c);
    }
}

static void test_ties_go_to_the_lower_expert(void **state) {
    static const real_t clean[2][6] = {{0}, {1, 2, 1, 2, 1, 2}};
    static const int expected[2][4] = {{0, 1, 2, 3}, {1, 3, 5, 0}};
    Gate g = gate_make(2, 6, 4, 1);
    memcpy(g.clean, clean, sizeof clean);
    gate_forward_noisy(&g, 0);
    assert_memory_equal(g.expert, expected, sizeof expected);
    case_free(&g.c);
}

/* K different valid experts whatever the numbers are, NaN stays in its row, and the losses show it. */
static void test_nan(void **state) {
    enum { N = 5, E = 6, K = 3 };
    for (int noisy = 0; noisy <= 1; noisy++) {
        Gate g = gate_make(N, E, K, 2);
        real_t *dclean = case_reals(&g.c, N * E), *draw = case_reals(&g.c, N * E);
        g.clean[1 * E + 2] = NAN;
        g.raw[2 * E + 5] = NAN;
        fill_value(g.clean + 3 * E, E, NAN);
        g.clean[4 * E] = INFINITY;
        gate_forward_noisy(&g, noisy);
        for (int i = 0; i < N * K; i++) {
            assert_in_range(g.expert[i], 0, E - 1);
            assert_false(is_in(g.expert + i / K * K, i % K, g.expert[i]));
        }
        assert_true(all_finite(g.weight, K) && all_finite(g.probs, E) && all_finite(g.weight + K, K));
        assert_false(is_in(g.expert + K, K, 2)); /* NaN is the last that is chosen */
        assert_true(isnan(g.weight[3 * K]) && isnan(g.probs[1 * E]));
        gate_balance(&g, noisy);
        assert_true(isnan(g.load[LOAD_BALANCE]));
        noisy_balance_backward(dclean, draw, g.load, g.sums, g.clean, g.raw, g.noise, g.h, g.expert, g.weight, 1, N, E,
                               K, NULL);
        assert_true(isnan(g.load[LOAD_BALANCE_GRADIENT]));
        case_free(&g.c);
    }
}

/* softplus neither overflows nor falls below its floor. */
static void test_extreme_noise(void **state) {
    Gate g = gate_make(1, 4, 2, 3);
    static const real_t raw[4] = {1000, -1000, 100, -100};
    real_t dclean[4], draw[4], dweight[2] = {1, -1};
    memcpy(g.raw, raw, sizeof raw);
    fill_value(g.clean, 4, 0);
    gate_forward_noisy(&g, 1);
    for (int e = 0; e < 4; e++) {
        assert_near(g.h[e], g.noise[e] * (0.01 + (raw[e] > 0 ? (double)raw[e] : 0)));
    }
    noisy_backward(dclean, draw, dweight, g.raw, g.noise, g.expert, g.weight, 1, 4, 2, NULL);
    gate_balance(&g, 1);
    noisy_balance_backward(dclean, draw, g.load, g.sums, g.clean, g.raw, g.noise, g.h, g.expert, g.weight, 1, 1, 4, 2,
                           NULL);
    assert_true(all_finite(g.load, LOAD_Z + 1) && all_finite(dclean, 4) && all_finite(draw, 4));
    case_free(&g.c);
}

/* ---- the losses */

static double cv_squared_of(const double *x, int E) {
    double mean = 0, square = 0;
    for (int e = 0; e < E; e++) {
        mean += x[e] / E;
        square += x[e] * x[e] / E;
    }
    return (square - mean * mean) / (mean * mean);
}

static double cv_squared_derivative(const double *x, int E, int e) {
    double mean = 0, square = 0;
    for (int i = 0; i < E; i++) {
        mean += x[i] / E;
        square += x[i] * x[i] / E;
    }
    return 2 * x[e] / (E * mean * mean) - 2 * square / (E * mean * mean * mean); /* CV^2 = square / mean^2 - 1 */
}

/* importance, load (E) by their definition */
static void reference_sums(double *importance, double *load, const Gate *g) {
    for (int i = 0; i < g->N * g->K; i++) {
        importance[g->expert[i]] += (double)g->weight[i];
    }
    for (int i = 0; i < g->N * g->E; i++) {
        const real_t *h = g->h + i / g->E * g->E;
        double threshold = (double)h[threshold_expert(h, g->E, g->K, i % g->E)];
        load[i % g->E] += normal_below((g->clean[i] - threshold) / sigma_of(g->raw[i]));
    }
}

static void test_balance(void **state) {
    for (int i = 0; i < SHAPES; i++) {
        Gate g = gate_make(shapes[i][0], shapes[i][1], shapes[i][2], 30 + (uint64_t)i);
        double *importance = case_doubles(&g.c, (size_t)g.E), *load = case_doubles(&g.c, (size_t)g.E);
        gate_forward_noisy(&g, 1);
        reference_sums(importance, load, &g);
        gate_balance(&g, 1);
        assert_close(g.sums, importance, (size_t)g.E);
        assert_close(g.sums + g.E, load, (size_t)g.E);
        assert_near(g.load[LOAD_BALANCE], cv_squared_of(importance, g.E) + cv_squared_of(load, g.E));
        assert_true(g.load[LOAD_Z] == 0);

        gate_forward_noisy(&g, 0); /* evaluation: the importance alone */
        gate_balance(&g, 0);
        memset(importance, 0, (size_t)g.E * sizeof *importance);
        reference_sums(importance, load, &g);
        assert_close(g.sums, importance, (size_t)g.E);
        assert_near(g.load[LOAD_BALANCE], cv_squared_of(importance, g.E));
        for (int e = 0; e < g.E; e++) {
            assert_true(g.sums[g.E + e] == 0);
        }
        case_free(&g.c);
    }
}

/* Both gradients summed over all pairs, and the norm of what the kernel adds. */
static void test_balance_backward(void **state) {
    const double scale = 0.7;
    for (int i = 0; i < SHAPES; i++) {
        Gate g = gate_make(shapes[i][0], shapes[i][1], shapes[i][2], 40 + (uint64_t)i);
        size_t count = (size_t)g.N * g.E;
        double *importance = case_doubles(&g.c, (size_t)g.E), *load = case_doubles(&g.c, (size_t)g.E), square = 0;
        double *dh = case_doubles(&g.c, count), *dclean_ref = case_doubles(&g.c, count),
               *draw_ref = case_doubles(&g.c, count);
        real_t *dclean = case_reals(&g.c, count), *draw = case_reals(&g.c, count);
        gate_forward_noisy(&g, 1);
        reference_sums(importance, load, &g);
        for (int a = 0; a < g.N * g.K; a++) { /* importance: the weight a by the logit of b */
            double slope = scale * cv_squared_derivative(importance, g.E, g.expert[a]);
            for (int b = a / g.K * g.K; b < (a / g.K + 1) * g.K; b++) {
                dh[a / g.K * g.E + g.expert[b]] += slope * g.weight[a] * ((a == b) - (double)g.weight[b]);
            }
        }
        for (size_t at = 0; at < count; at++) {
            int e = (int)at % g.E;
            size_t row = at - e;
            int m = threshold_expert(g.h + row, g.E, g.K, e);
            double sigma = sigma_of(g.raw[at]), z = ((double)g.clean[at] - (double)g.h[row + m]) / sigma;
            double dz = scale * cv_squared_derivative(load, g.E, e) * exp(-z * z / 2) / sqrt(2 * acos(-1));
            dclean_ref[at] += dz / sigma;
            draw_ref[at] -= dz * z / sigma * logistic(g.raw[at]);
            dh[row + m] -= dz / sigma; /* the threshold is a noisy logit */
        }
        for (size_t at = 0; at < count; at++) {
            dclean_ref[at] += dh[at];
            draw_ref[at] += dh[at] * g.noise[at] * logistic(g.raw[at]);
            square += dclean_ref[at] * dclean_ref[at] + draw_ref[at] * draw_ref[at];
        }
        gate_balance(&g, 1);
        noisy_balance_backward(dclean, draw, g.load, g.sums, g.clean, g.raw, g.noise, g.h, g.expert, g.weight, scale,
                               g.N, g.E, g.K, NULL);
        assert_close(dclean, dclean_ref, count);
        assert_close(draw, draw_ref, count);
        assert_near(g.load[LOAD_BALANCE_GRADIENT], sqrt(square));
        case_free(&g.c);
    }
}

static void test_importance_closed_forms(void **state) {
    enum { N = 24, E = 8 };
    for (int K = 1; K <= 2; K++) {
        Gate g = gate_make(N, E, K, 4);
        for (int i = 0; i < N * E; i++) { /* K neighbours in turn: every expert K N / E times */
            g.clean[i] = (i % E - i / E + N) % E < K ? 9 : 0;
        }
        gate_forward_noisy(&g, 0);
        gate_balance(&g, 0);
        assert_near(g.load[LOAD_BALANCE], 0);
        assert_near(g.sums[5], (double)N / E);
        for (int i = 0; i < N * E; i++) { /* K experts take all: mean N/E, K of E hold N/K, so CV^2 = E/K - 1 */
            g.clean[i] = i % E >= E - K ? 9 : 0;
        }
        gate_forward_noisy(&g, 0);
        gate_balance(&g, 0);
        assert_near(g.load[LOAD_BALANCE], (double)E / K - 1);
        case_free(&g.c);
    }
}

/* One token, three experts, K = 1, by hand.
 *
 *     c = (2, 1, 0)     r = 0.52546 gives sigma = 1 for all     eps = (0.5, 0.5, -1)     h = (2.5, 1.5, -1)
 *     S = {0}           without 0 the largest h is 1.5; without 1, and without 2, it is 2.5
 *     z = (2 - 1.5, 1 - 2.5, 0 - 2.5) = (0.5, -1.5, -2.5)
 *     P = Phi(z) = (0.6914625, 0.0668072, 0.0062097)     mean 0.2548264     variance 0.0959375     CV^2 = 1.4774047
 *     w = (1)           I = (1, 0, 0)                    mean 1/3           variance 2/9           CV^2 = 2
 *
 * Thresholds taken from softmax(h) = (0.7153, 0.2631, 0.0216) and held against c would give P = (0.959, 0.612, 0.237),
 * which has three experts nearly at balance: CV^2 = 0.2390.
 */
static void test_example_by_hand(void **state) {
    static const real_t clean[3] = {2, 1, 0}, h[3] = {2.5, 1.5, -1}, noise[3] = {0.5, 0.5, -1}, weight[1] = {1};
    static const int expert[1] = {0};
    real_t raw[3], load[LOAD_VALUES], sums[6], dclean[3] = {0}, draw[3] = {0};
    fill_value(raw, 3, log(exp(0.99) - 1));
    noisy_balance_forward(load, sums, clean, raw, h, expert, weight, 1, 1, 3, 1, NULL);
    const double expected[6] = {1, 0, 0, 0.6914624613, 0.0668072013, 0.0062096653};
    for (int i = 0; i < 6; i++) {
        assert_true(fabs((double)sums[i] - expected[i]) < 1e-6);
    }
    assert_true(fabs((double)load[LOAD_BALANCE] - 3.4774047) < 1e-6);

    /* At the border, expert 0 is the threshold of 1 and of 2, expert 1 that of 0, nobody's is 2. With G_e the slope of
     * CV^2 in the load of e and phi_e = phi(z_e): dc = (G0 phi0 - G1 phi1 - G2 phi2, G1 phi1 - G0 phi0, G2 phi2), whose
     * sum is 0: a shift of all logits changes nothing. */
    noisy_balance_backward(dclean, draw, load, sums, clean, raw, noise, h, expert, weight, 1, 1, 3, 1, NULL);
    assert_true(fabs((double)(dclean[0] + dclean[1] + dclean[2])) < 1e-6);
    assert_true(dclean[0] > 0.1 && dclean[1] < -0.1); /* the favourite's lead is what the loss is about */
}

/* With the others' h fixed an expert's threshold is fixed, so its P rises with its logit through the choice and out of
 * it, and nobody else's does. */
static void test_load_is_monotone(void **state) {
    enum { E = 7, K = 3, e = 4 };
    Gate g = gate_make(1, E, K, 5);
    real_t before[E];
    int chosen = 0;
    fill_value(before, E, NAN);
    for (int step = 0; step <= 60; step++) {
        g.clean[e] = (real_t)(-3 + 0.1 * step);
        gate_forward_noisy(&g, 1);
        gate_balance(&g, 1);
        for (int i = 0; i < E && step > 0; i++) {
            real_t p = g.sums[E + i];
            assert_true(i == e ? p > before[i] : p <= before[i]);
        }
        memcpy(before, g.sums + E, sizeof before);
        chosen += is_in(g.expert, K, e);
    }
    assert_in_range(chosen, 1, 60); /* it crossed the border */
    case_free(&g.c);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_forward),
        cmocka_unit_test(test_backward),
        cmocka_unit_test(test_without_noise_it_is_topk),
        cmocka_unit_test(test_ties_go_to_the_lower_expert),
        cmocka_unit_test(test_nan),
        cmocka_unit_test(test_extreme_noise),
        cmocka_unit_test(test_balance),
        cmocka_unit_test(test_balance_backward),
        cmocka_unit_test(test_importance_closed_forms),
        cmocka_unit_test(test_example_by_hand),
        cmocka_unit_test(test_load_is_monotone),
    };
    omp_set_num_threads(1); /* small calls; test_determinism.c shows that threads change no bit */
    return cmocka_run_group_tests_name("noisy top-k", tests, NULL, NULL);
}
