// build: both
/* Balance loss, z-loss and the statistics of a batch against closed forms and counting.
 *
 * The edges are visited: one token, K = E, ties, NaN, no entries, every token dropped.
 */
#include "operations.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>

#include <cmocka.h>

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
    int expert[N * K], demand[E];
    fill_choices(expert, NULL, N, K, demand, E);
    fill_value(probs, N * E, 1.0 / E);
    fill_value(lse, N, 3);
    balance_forward(load, mean_prob, probs, lse, demand, N, E, K, NULL);
    probs_measure(load, mean_prob, probs, N, E, K, NULL);
    assert_near(load[LOAD_BALANCE], 1);
    assert_near(load[LOAD_Z], 9);
    assert_near(load[LOAD_ENTROPY], log(E));
    assert_near(load[LOAD_MEAN_ENTROPY], log(E));
    assert_true(load[LOAD_MARGIN] == 0);
    assert_near(mean_prob[3], 1.0 / E);

    balance_backward(dlogits, load, probs, lse, demand, N, E, K, 1, 0,
                     NULL); /* balanced and uniform: nothing to gain */
    assert_true((double)load[LOAD_BALANCE_GRADIENT] <= 1e-8);
    for (int i = 0; i < N * E; i++) {
        assert_true(fabs((double)dlogits[i]) <= 1e-9);
    }
    memset(demand, 0,
           sizeof demand); /* uniform probabilities, one favourite: B is 1 and its gradient pushes the favourite down */
    demand[5] = N * K;
    balance_forward(load, mean_prob, probs, lse, demand, N, E, K, NULL);
    balance_backward(dlogits, load, probs, lse, demand, N, E, K, 1, 0, NULL);
    assert_near(load[LOAD_BALANCE], 1);
    double down = (1 - 1.0 / E) / N, up = 1.0 / E / N;
    assert_near(dlogits[5], down);
    assert_near(dlogits[4], -up);
    assert_near(load[LOAD_BALANCE_GRADIENT], sqrt(N * (down * down + (E - 1) * up * up)));

    memset(probs, 0, N * E * sizeof *probs); /* every token sure of the same expert, K = 1 */
    memset(demand, 0, sizeof demand);
    demand[2] = N;
    for (int n = 0; n < N; n++) {
        probs[n * E + 2] = 1;
    }
    balance_forward(load, mean_prob, probs, lse, demand, N, E, 1, NULL);
    probs_measure(load, mean_prob, probs, N, E, 1, NULL);
    assert_near(load[LOAD_BALANCE], E);
    assert_true(load[LOAD_ENTROPY] == 0 && load[LOAD_MEAN_ENTROPY] == 0 && load[LOAD_MARGIN] == 1);

    for (int n = 0; n < N; n++) { /* each token sure of its own: entropy 0, mean entropy ln E */
        fill_value(probs + n * E, E, 0);
        probs[n * E + n % E] = 1;
    }
    fill_choices(expert, NULL, N, 1, demand, E);
    balance_forward(load, mean_prob, probs, lse, demand, N, E, 1, NULL);
    probs_measure(load, mean_prob, probs, N, E, 1, NULL);
    assert_near(load[LOAD_BALANCE], 1);
    assert_true(load[LOAD_ENTROPY] == 0);
    assert_near(load[LOAD_MEAN_ENTROPY], log(E));
    case_free(&c);
}

/* The norm is that of the balance loss's part of what is added, whatever was there before. */
static void test_gradient_norms(void **state) {
    static const int tokens[] = {1, 5, 64, 999};
    for (int i = 0; i < 4; i++) {
        int N = tokens[i], E = 7, K = 2, demand[7];
        Case c = {.seed = (uint64_t)i};
        real_t *logits = case_normal(&c, (size_t)N * E), *probs = case_reals(&c, (size_t)N * E);
        real_t *lse = case_reals(&c, (size_t)N), *dlogits = case_normal(&c, (size_t)N * E), load[LOAD_VALUES];
        real_t *before = case_copy(&c, dlogits, (size_t)N * E);
        softmax_forward(probs, lse, logits, N, E, NULL);
        fill_choices(case_ints(&c, (size_t)N * K), NULL, N, K, demand, 3); /* four experts idle */
        memset(demand + 3, 0, 4 * sizeof *demand);
        gradient_measure(load, dlogits, (size_t)N * E, NULL);
        assert_near(load[LOAD_MAIN_GRADIENT], sqrt(dot_double(before, 1, before, 1, N * E)));
        balance_backward(dlogits, load, probs, lse, demand, N, E, K, 0, 0, NULL);
        assert_true(load[LOAD_BALANCE_GRADIENT] == 0);
        assert_bits(dlogits, before, (size_t)N * E);
        balance_backward(dlogits, load, probs, lse, demand, N, E, K, 0.7, 0.3, NULL);
        double square = 0;
        for (int j = 0; j < N * E; j++) {
            const real_t *p = probs + j / E * E;
            double mean = 0;
            for (int e = 0; e < E; e++) {
                mean += demand[e] / ((double)K * N) * (double)p[e];
            }
            double balance = (double)E / N * (double)p[j % E] * (demand[j % E] / ((double)K * N) - mean);
            double added = 0.7 * balance + 0.3 * 2 * (double)lse[j / E] / N * (double)p[j % E];
            assert_near(dlogits[j], (double)before[j] + added);
            square += 0.7 * balance * 0.7 * balance;
        }
        assert_near(load[LOAD_BALANCE_GRADIENT], sqrt(square));
        case_free(&c);
    }
}

/* ---- statistics */

static int falling(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x < y) - (x > y);
}

static void test_probs_measure(void **state) {
    static const int sizes[][2] = {{1, 1}, {1, 6}, {50, 6}, {64, 33}, {65, 100}, {999, 8}};
    for (int i = 0; i < 6 * 2; i++) {
        int N = sizes[i / 2][0], E = sizes[i / 2][1];
        Case c = {.seed = (uint64_t)i};
        real_t *probs = case_normal(&c, (size_t)N * E), *lse = case_reals(&c, (size_t)N), load[LOAD_VALUES];
        real_t *mean_prob = case_poison(&c, (size_t)E);
        for (int j = 0; j < N * E && i % 2; j++) {
            probs[j] = (real_t)round(2 * (double)probs[j]); /* ties */
        }
        real_t *logits = case_copy(&c, probs, (size_t)N * E);
        double *sorted = case_doubles(&c, (size_t)E), *mean = case_doubles(&c, (size_t)E);
        softmax_forward(probs, lse, logits, N, E, NULL);
        for (int K = 1; K <= E; K += 1 + K / 2) {
            double entropy = 0, margin = 0, mean_entropy = 0;
            memset(mean, 0, (size_t)E * sizeof *mean);
            for (int n = 0; n < N; n++) {
                for (int e = 0; e < E; e++) {
                    sorted[e] = (double)probs[n * E + e];
                    mean[e] += sorted[e] / N;
                    entropy -= sorted[e] * log(sorted[e]) / N;
                }
                qsort(sorted, (size_t)E, sizeof *sorted, falling);
                margin += K < E ? (sorted[K - 1] - sorted[K]) / N : 0;
            }
            for (int e = 0; e < E; e++) {
                mean_entropy -= mean[e] * log(mean[e]);
            }
            probs_measure(load, mean_prob, probs, N, E, K, NULL);
            assert_near(load[LOAD_ENTROPY], entropy);
            assert_near(load[LOAD_MEAN_ENTROPY], mean_entropy);
            assert_near(load[LOAD_MARGIN], margin);
            assert_close(mean_prob, mean, (size_t)E);
        }
        case_free(&c);
    }
    real_t probs[3] = {0.5, NAN, 0.5}, load[LOAD_VALUES], mean_prob[3];
    for (int K = 1; K <= 3; K++) { /* ends, and does not hide the NaN */
        probs_measure(load, mean_prob, probs, 1, 3, K, NULL);
        assert_true(isnan(load[LOAD_ENTROPY]) && isnan(load[LOAD_MEAN_ENTROPY]) && isnan(mean_prob[1]));
        assert_true(K == 2 ? isnan(load[LOAD_MARGIN]) : load[LOAD_MARGIN] == 0);
    }
    probs[2] = NAN; /* fewer numbers than choices */
    probs_measure(load, mean_prob, probs, 1, 3, 2, NULL);
    assert_true(isnan(load[LOAD_MARGIN]));
}

static void test_plan_measure(void **state) {
    int seen = 0;
    for (int i = 0; i < 3 * 4 * 3 * 2; i++) {
        int N = i % 2 ? 70 : 1, E = 5, skew = i / 6 % 4, K = skew == SKEW_PICKED ? E : 2;
        Case c = {.seed = (uint64_t)i};
        acc_t load[LOAD_VALUES];
        add_plan(&c, N, E, K, (int[]){0, 1, 11}[i / 24], (Layout)(i / 2 % 3), DROP_SLOT);
        Plan *plan = &c.plan;
        choose_experts(plan, (Skew)skew, c.seed);
        plan_build(plan, NULL);
        int there = 0, dropped = 0, empty = 0, rowless = 0;
        for (int n = 0; n < N; n++) {
            int rows = 0;
            for (int j = n * K; j < (n + 1) * K; j++) {
                there += plan->expert[j] >= 0;
                dropped += plan->expert[j] >= 0 && plan->row[j] < 0;
                rows += plan->row[j] >= 0;
            }
            rowless += rows == 0;
        }
        for (int r = 0; r < plan->offset[E]; r++) {
            empty += plan->entry[r] < 0;
        }
        plan_measure(load, plan, NULL);
        assert_near(load[LOAD_DROPPED], there ? (double)dropped / there : 0);
        assert_near(load[LOAD_TOKENS_DROPPED], (double)rowless / N);
        assert_near(load[LOAD_PADDING], plan->offset[E] ? (double)empty / plan->offset[E] : 0);
        seen |= (dropped > 0) | (rowless > 0) << 1 | (empty > 0) << 2 | (there == 0) << 3;
        case_free(&c);
    }
    assert_int_equal(seen, 15); /* drops, tokens without a row, padding, and a plan without entries came up */
}

/* Every token dropped, which no capacity does; and a soft plan, which drops and pads nothing. */
static void test_plan_measure_extremes(void **state) {
    int row[6] = {-1, -1, -1, -1, -1, -1}, demand[2] = {4, 2}, count[2] = {0}, offset[3] = {0};
    acc_t load[LOAD_VALUES];
    Plan plan = {.N = 3, .E = 2, .K = 2, .row = row, .demand = demand, .count = count, .offset = offset};
    plan_measure(load, &plan, NULL);
    assert_true(load[LOAD_DROPPED] == 1 && load[LOAD_TOKENS_DROPPED] == 1 && load[LOAD_PADDING] == 0);
    Plan soft = {
        .N = 4, .E = 2, .K = 2, .slots = 1, .group_tokens = 2, .demand = demand, .count = count, .offset = offset};
    plan_build(&soft, NULL);
    fill_value(load, LOAD_VALUES, NAN);
    plan_measure(load, &soft, NULL);
    assert_true(load[LOAD_DROPPED] == 0 && load[LOAD_TOKENS_DROPPED] == 0 && load[LOAD_PADDING] == 0);
}

/* Random logits: an expert's demand is binomial, and with mean mu, deviation sigma and the capacity CF mu the share
 * that finds no place is about (sigma / mu) (phi(z) - z (1 - Phi(z))), z = (CF - 1) mu / sigma. Allowed are four
 * standard errors, and what the binomial's skewness adds to the normal form, z phi(z) / (6 mu). */
static void test_drop_rate_of_random_logits(void **state) {
    enum { N = 1024, E = 32, K = 2, RUNS = 160, MU = N * K / E };
    static const int capacities[] = {MU, MU + MU / 16, MU + MU / 8};
    const double sigma = sqrt(MU * (1 - (double)K / E));
    double dropped[3] = {0};
    Case c = {.seed = 1};
    real_t *probs = case_reals(&c, N * E), *lse = case_reals(&c, N), *logits = case_reals(&c, N * E);
    add_plan(&c, N, E, K, 0, LAYOUT_COMPACT, DROP_TOKEN);
    for (int run = 0; run < RUNS; run++) {
        fill_normal(logits, N * E, 0, 1, (uint64_t)run, 5);
        topk_forward(probs, lse, c.plan.expert, c.plan.weight, logits, N, E, K, 1, NULL);
        for (int i = 0; i < 3; i++) {
            acc_t load[LOAD_VALUES];
            c.plan.capacity = capacities[i];
            plan_build(&c.plan, NULL);
            plan_measure(load, &c.plan, NULL);
            dropped[i] += (double)load[LOAD_DROPPED] / RUNS;
        }
    }
    for (int i = 0; i < 3; i++) {
        double z = (capacities[i] - MU) / sigma;
        double density = exp(-z * z / 2) / sqrt(2 * acos(-1.0)), above = erfc(z / sqrt(2.0)) / 2;
        double mean = density - z * above, variance = (1 + z * z) * above - z * density - mean * mean;
        double allowed = 4 * sigma / MU * sqrt(variance / (E * RUNS)) + z * density / (6 * MU);
        assert_true(fabs(dropped[i] - sigma / MU * mean) <= allowed);
        assert_true(allowed < 0.25 * dropped[i]); /* or the test would say nothing */
    }
    case_free(&c);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_balance_closed_forms),  cmocka_unit_test(test_gradient_norms),
        cmocka_unit_test(test_probs_measure),         cmocka_unit_test(test_plan_measure),
        cmocka_unit_test(test_plan_measure_extremes), cmocka_unit_test(test_drop_rate_of_random_logits),
    };
    omp_set_num_threads(1); /* many small calls; test_determinism.c shows that threads change no bit */
    return cmocka_run_group_tests_name("balance losses and statistics", tests, NULL, NULL);
}
