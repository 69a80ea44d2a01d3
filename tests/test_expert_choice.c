// build: both
/* Experts that pick tokens, and the running threshold: against a plain sort, with ties, NaN and every edge of C; what
 * a cut lets through; what a threshold may depend on; where the running one settles.
 */
#include "gradcheck.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>

#include <cmocka.h>

#include "../kernels/expert_choice.h"

static const AdamState skipped = {.scale = 0};
static const int64_t step = 7;

/* ---- expert choice */

enum { IN_FLOAT = sizeof(acc_t) == sizeof(float) };

typedef enum { DISTINCT, FEW_VALUES, ALL_EQUAL, TINY, NEIGHBOURS, KINDS } Kind;

/* (N,E) probabilities: multiples of 2^-20, all different; of 1/4, zeros of both signs among them; one value; different
 * ones next to each other at the bottom of the range, and from 1/2 on. */
static acc_t *make_probs(Case *c, int N, int E, Kind kind, uint64_t seed) {
    acc_t *p = case_reals(c, (size_t)N * E);
    uint64_t key = random_key(seed, RANDOM_TEST, kind);
    for (int i = 0; i < N * E; i++) {
        int j = (int)random_below(key, (uint64_t)i, (uint64_t)i + 1); /* the shuffle of the numbers 1 .. N*E */
        p[i] = p[j];
        p[j] = (acc_t)(i + 1);
    }
    for (int i = 0; i < N * E; i++) {
        switch (kind) {
            case DISTINCT: p[i] = (acc_t)ldexp(p[i], -20); break;
            case FEW_VALUES:
                p[i] = (acc_t)random_below(key, (uint64_t)i, 5) / 4;
                p[i] = p[i] == 0 && i % 2 ? -p[i] : p[i];
                break;
            case ALL_EQUAL: p[i] = (acc_t)0.125; break;
            case TINY: p[i] *= IN_FLOAT ? (acc_t)0x1p-149 : (acc_t)0x1p-1074; break;
            default: p[i] = (acc_t)0.5 + p[i] * (IN_FLOAT ? (acc_t)0x1p-24 : (acc_t)0x1p-53); break;
        }
    }
    return p;
}

typedef struct {
    double p;
    int n;
} Token;

/* Falling p, NaN last, equal ones by token. */
static int compare_tokens(const void *left, const void *right) {
    const Token *a = left, *b = right;
    double pa = isnan(a->p) ? -1 : a->p, pb = isnan(b->p) ? -1 : b->p;
    return pa != pb ? (pa > pb ? -1 : 1) : a->n - b->n;
}

static Token *sorted_column(Case *c, const acc_t *probs, int N, int E, int e) {
    Token *tokens = case_memory(c, (size_t)N, sizeof *tokens);
    for (int n = 0; n < N; n++) {
        tokens[n] = (Token){probs[n * E + e], n};
    }
    qsort(tokens, (size_t)N, sizeof *tokens, compare_tokens);
    return tokens;
}

/* The choice and the cut of every expert are those of the sorted column, and C tokens exactly are taken. */
static void check_choice(Case *c, const acc_t *probs, int N, int E, int C) {
    int *expert = case_ints(c, (size_t)N * E), *without_cut = case_ints(c, (size_t)N * E);
    acc_t *cut = case_poison(c, (size_t)E);
    memset(expert, 77, (size_t)N * E * sizeof *expert);
    expert_choice_forward(expert, cut, probs, N, E, C, NULL);
    expert_choice_forward(without_cut, NULL, probs, N, E, C, NULL);
    assert_bits(without_cut, expert, (size_t)N * E);
    for (int e = 0; e < E; e++) {
        Token *tokens = sorted_column(c, probs, N, E, e);
        for (int i = 0; i < N; i++) {
            assert_int_equal(expert[tokens[i].n * E + e], i < C ? e : -1);
        }
        double above = tokens[C - 1].p, below = C < N ? tokens[C].p : 0;
        if (isnan(above) || isnan(below)) {
            assert_true(isnan(cut[e]));
        } else {
            assert_true(cut[e] >= below && cut[e] <= above);
            assert_true(fabs(cut[e] - (above + below) / 2) <= TOLERANCE * above + 0x1p-149); /* a step at the bottom */
        }
    }
}

static void test_choice_equals_a_sort(void **state) {
    static const int shapes[][2] = {{1, 1}, {1, 5}, {2, 3}, {17, 1}, {40, 7}, {300, 8}, {65, 33}};
    for (int i = 0; i < 7 * KINDS; i++) {
        int N = shapes[i / KINDS][0], E = shapes[i / KINDS][1];
        const int sizes[] = {1, (N + 3) / 4, (N + 1) / 2, N > 1 ? N - 1 : 1, N};
        for (int j = 0; j < 5; j++) {
            Case c = {.seed = (uint64_t)i};
            check_choice(&c, make_probs(&c, N, E, (Kind)(i % KINDS), c.seed), N, E, sizes[j]);
            case_free(&c);
        }
    }
}

static void test_equal_probabilities_go_to_the_earliest(void **state) {
    enum { N = 9, E = 4, C = 5 };
    acc_t probs[N * E], cut[E];
    int expert[N * E];
    fill_value(probs, N * E, 0.25);
    expert_choice_forward(expert, cut, probs, N, E, C, NULL);
    for (int i = 0; i < N * E; i++) {
        assert_int_equal(expert[i], i / E < C ? i % E : -1);
        assert_true(cut[i % E] == 0.25);
    }
}

/* NaN counts less than 0, is taken only to make up the number, and leaves the other columns alone. */
static void test_choice_with_nan(void **state) {
    enum { N = 12, E = 3 };
    for (int C = 1; C <= N; C++) {
        Case c = {.seed = 3};
        acc_t *probs = make_probs(&c, N, E, FEW_VALUES, 3);
        for (int n = 0; n < N; n++) {
            probs[n * E + 1] = n % 3 == 0 ? (acc_t)NAN : n % 3 == 1 ? -(acc_t)NAN : probs[n * E + 1];
            probs[n * E + 2] = (acc_t)NAN;
        }
        check_choice(&c, probs, N, E, C);
        case_free(&c);
    }
}

static void test_choice_with_any_number_of_threads(void **state) {
    enum { N = 1001, E = 19 };
    static const int threads[] = {1, 2, 3, 8};
    for (int kind = 0; kind < KINDS; kind++) {
        Case c = {.seed = 5};
        acc_t *probs = make_probs(&c, N, E, (Kind)kind, 5), *tau = case_reals(&c, E);
        size_t entries = (size_t)N * E;
        int *expert[2] = {case_ints(&c, 2 * entries), case_ints(&c, 2 * entries)};
        acc_t *cut[2] = {case_poison(&c, E), case_poison(&c, E)};
        fill_value(tau, E, probs[7]);
        for (int run = 0; run < 4; run++) {
            omp_set_num_threads(threads[run]);
            expert_choice_forward(expert[run > 0], cut[run > 0], probs, N, E, 130, NULL);
            threshold_forward(expert[run > 0] + entries, tau, probs, &step, 0, N, E, NULL);
            assert_bits(expert[run > 0], expert[0], 2 * entries);
            assert_bits(cut[run > 0], cut[0], E);
        }
        case_free(&c);
    }
    omp_set_num_threads(1);
}

/* ---- thresholds */

/* Neighbours in a column of their own have no number between them: the cut can only be the lower one. */
static void test_cut_lets_exactly_c_through(void **state) {
    enum { N = 50 };
    static const Kind kinds[] = {DISTINCT, TINY, NEIGHBOURS};
    for (int i = 0; i < 3 * 2 * N; i++) {
        int E = i / 3 % 2 ? 6 : 1;
        Case c = {.seed = (uint64_t)i};
        acc_t *probs = make_probs(&c, N, E, kinds[i % 3], c.seed), *cut = case_poison(&c, (size_t)E);
        int *chosen = case_ints(&c, (size_t)N * E), *passed = case_ints(&c, (size_t)N * E);
        expert_choice_forward(chosen, cut, probs, N, E, 1 + i / 6, NULL);
        threshold_forward(passed, cut, probs, &step, 0, N, E, NULL);
        assert_bits(passed, chosen, (size_t)N * E);
        case_free(&c);
    }
}

static void test_threshold_is_strict(void **state) {
    const acc_t tau[3] = {0.25, 0, (acc_t)NAN};
    const acc_t probs[3 * 3] = {0.25, 0, 1, (acc_t)0.2500001, (acc_t)1e-30, 1, (acc_t)NAN, (acc_t)NAN, (acc_t)NAN};
    const int expected[3 * 3] = {-1, -1, -1, 0, 1, -1, -1, -1, -1};
    int expert[3 * 3];
    threshold_forward(expert, tau, probs, &step, 0, 3, 3, NULL);
    assert_memory_equal(expert, expected, sizeof expected);
}

/* The first step that goes by thresholds does, the one before it leaves what was chosen. */
static void test_threshold_waits_for_its_step(void **state) {
    const acc_t tau[2] = {0.5, 0.5}, probs[2] = {1, 0};
    const int passed[2] = {0, -1};
    int expert[2] = {-1, 1}, chosen[2] = {-1, 1};
    threshold_forward(expert, tau, probs, &step, step + 1, 1, 2, NULL);
    assert_memory_equal(expert, chosen, sizeof chosen);
    threshold_forward(expert, tau, probs, &step, step, 1, 2, NULL);
    assert_memory_equal(expert, passed, sizeof passed);
}

/* A token keeps its experts whatever all the others become; with expert choice it does not. */
static void test_threshold_looks_at_one_token(void **state) {
    enum { N = 40, E = 5, C = 10 };
    int moved = 0;
    for (int n = 0; n < N; n++) {
        Case c = {.seed = 1};
        acc_t *probs = make_probs(&c, N, E, DISTINCT, 1), *other = make_probs(&c, N, E, DISTINCT, 2);
        acc_t *cut = case_reals(&c, E);
        int *chosen = case_ints(&c, N * E), *before = case_ints(&c, N * E), *after = case_ints(&c, N * E);
        expert_choice_forward(chosen, cut, probs, N, E, C, NULL);
        threshold_forward(before, cut, probs, &step, 0, N, E, NULL);
        memcpy(other + n * E, probs + n * E, E * sizeof *other);
        threshold_forward(after, cut, other, &step, 0, N, E, NULL);
        assert_bits(after + n * E, before + n * E, E);
        expert_choice_forward(after, NULL, other, N, E, C, NULL);
        moved += memcmp(after + n * E, chosen + n * E, E * sizeof *after) != 0;
        case_free(&c);
    }
    assert_true(moved > 0);
}

/* The mean of all cuts while 1 / updates is above the rate, whatever tau was before; then it forgets at the rate. */
static void test_threshold_update(void **state) {
    enum { E = 3, SLICES = 2, STEPS = 12 };
    const double rate = 0.2;
    AdamState applied = {.scale = 0.5};
    acc_t tau[E] = {0.5, 0.25, -7}, cut[SLICES * E];
    double expected[E] = {0}, sum[E] = {0};
    for (int step = 0; step < STEPS; step++) {
        fill_positive(cut, SLICES * E, 4, (uint64_t)step);
        applied.updates = step + 1;
        threshold_update(tau, cut, SLICES, E, rate, &applied, NULL);
        for (int e = 0; e < E; e++) {
            double mean = ((double)cut[e] + (double)cut[E + e]) / 2;
            sum[e] += mean;
            expected[e] = step < 5 ? sum[e] / (step + 1) : expected[e] * (1 - rate) + rate * mean;
            assert_near(tau[e], expected[e]);
        }
        acc_t kept[E];
        memcpy(kept, tau, sizeof tau);
        fill_value(cut, SLICES * E, step % 2 ? NAN : 1e9); /* what a skipped step may have measured */
        threshold_update(tau, cut, SLICES, E, rate, &skipped, NULL);
        assert_bits(tau, kept, E);
    }
}

/* N tokens of softmax(bias_e + normal): a stream whose statistics stay, of experts that differ in size. No two calls
 * share numbers. */
static void draw_stream(acc_t *probs, int N, int E, uint64_t batch) {
    uint64_t key = random_key(6, RANDOM_TEST, batch);
    for (int n = 0; n < N; n++) {
        double sum = 0, l[16];
        for (int e = 0; e < E; e++) {
            l[e] = exp(0.3 * e + random_normal(key, (uint64_t)(n * E + e)));
            sum += l[e];
        }
        for (int e = 0; e < E; e++) {
            probs[n * E + e] = (acc_t)(l[e] / sum);
        }
    }
}

/* The largest |load_e / target - 1| over fresh tokens. */
static double worst_load(Case *c, const acc_t *tau, int batches, int N, int E, int C) {
    acc_t *probs = case_reals(c, (size_t)N * E);
    int *expert = case_ints(c, (size_t)N * E), load[16] = {0};
    for (int batch = 0; batch < batches; batch++) {
        draw_stream(probs, N, E, 1000000 + (uint64_t)batch);
        threshold_forward(expert, tau, probs, &step, 0, N, E, NULL);
        for (int i = 0; i < N * E; i++) {
            load[i % E] += expert[i] >= 0;
        }
    }
    double worst = 0;
    for (int e = 0; e < E; e++) {
        worst = fmax(worst, fabs(load[e] / ((double)batches * C) - 1));
    }
    return worst;
}

/* A share q = C/N = 1/4 of the tokens is to pass. The load that the cut of one batch gives has a relative standard
 * deviation of sqrt((1-q) / C) = 7.7%, the exponential mean of rate r that of sqrt(r / (2-r)) times that, 0.5%; the
 * measurement over 160 N tokens sqrt((1-q) / (160 C)) = 0.6%. Together 0.8%; 5 of them for the worst of 8 experts. */
static void test_running_threshold_finds_the_load(void **state) {
    enum { N = 512, E = 8, C = N / 4, STEPS = 600 };
    Case c = {.seed = 6};
    acc_t *probs = case_reals(&c, N * E), *tau = case_reals(&c, E), cut[E];
    int *expert = case_ints(&c, N * E);
    fill_value(tau, E, 1.0 / E);
    assert_true(worst_load(&c, tau, 10, N, E, C) > 0.3); /* where it starts the load is wrong */
    AdamState applied = {.scale = 0.5};
    for (int step = 0; step < STEPS; step++) {
        draw_stream(probs, N, E, (uint64_t)step);
        expert_choice_forward(expert, cut, probs, N, E, C, NULL);
        applied.updates += step % 10 != 9;
        threshold_update(tau, cut, 1, E, 0.01, step % 10 == 9 ? &skipped : &applied, NULL);
    }
    assert_true(worst_load(&c, tau, 160, N, E, C) < 0.04);
    case_free(&c);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_choice_equals_a_sort),
        cmocka_unit_test(test_equal_probabilities_go_to_the_earliest),
        cmocka_unit_test(test_choice_with_nan),
        cmocka_unit_test(test_choice_with_any_number_of_threads),
        cmocka_unit_test(test_cut_lets_exactly_c_through),
        cmocka_unit_test(test_threshold_is_strict),
        cmocka_unit_test(test_threshold_waits_for_its_step),
        cmocka_unit_test(test_threshold_looks_at_one_token),
        cmocka_unit_test(test_threshold_update),
        cmocka_unit_test(test_running_threshold_finds_the_load),
    };
    omp_set_num_threads(1); /* small calls; one test sets the number itself */
    return cmocka_run_group_tests_name("experts that pick tokens", tests, NULL, NULL);
}
