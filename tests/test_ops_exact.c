// build: both
/* Operations against closed forms, slow references in double and themselves: results that are exact must be exact.
 *
 * The gradient test only shows that forward and backward belong together; here the forward is held against its
 * definition in kernels/NAME.h, and the edges are visited: ties, NaN, an expert without rows, a full expert, one
 * class. test_determinism.c has what must not depend on threads or batching.
 * Here are products, norms, loss and optimizer; attention is in test_attention.c, routing and experts are in
 * test_routing_exact.c.
 */
#include "operations.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>

#include <cmocka.h>

#include "../kernels/adamw.h"

/* ---- dense operations */

static void test_embedding(void **state) {
    Case c = {.seed = 1};
    enum { N = 9, C = 19, V = 4 };
    int tokens[N] = {3, 0, 3, 3, 1, 0, 3, 1, 0}; /* 2 never occurs */
    real_t *w = case_normal(&c, V * C), *dx = case_normal(&c, N * C), *x = case_poison(&c, N * C),
           *dw = case_normal(&c, V * C);
    real_t *expected = case_copy(&c, dw, V * C);
    embedding_forward(x, tokens, w, N, C, NULL);
    embedding_backward(dw, dx, tokens, N, C, V, NULL);
    for (int n = 0; n < N; n++) {
        assert_bits(x + n * C, w + tokens[n] * C, C);
        for (int i = 0; i < C; i++) { /* the order of additions is part of the contract */
            expected[tokens[n] * C + i] += dx[n * C + i];
        }
    }
    assert_bits(dw, expected, V * C);
    case_free(&c);
}

static void test_norm(void **state) {
    Case c = {.seed = 2};
    enum { N = 5 };
    for (int C = 1; C <= 70; C += 23) {
        real_t *x = case_normal(&c, N * C), *add = case_normal(&c, N * C), *w = case_normal(&c, C),
               *sum = case_poison(&c, N * C);
        real_t *y = case_poison(&c, N * C), *rstd = case_poison(&c, N), *plain = case_poison(&c, N * C);
        double *reference = case_doubles(&c, N * C);
        norm_forward(sum, y, rstd, x, add, w, N, C, 1e-5, NULL);
        for (int n = 0; n < N; n++) {
            double r = 1 / sqrt(dot_double(sum + n * C, 1, sum + n * C, 1, C) / C + 1e-5);
            assert_near(rstd[n], r);
            for (int i = n * C; i < (n + 1) * C; i++) {
                assert_true(sum[i] == x[i] + add[i]);
                reference[i] = (double)sum[i] * r * (double)w[i - n * C];
            }
        }
        assert_close(y, reference, N * C);
        norm_forward(NULL, plain, rstd, sum, NULL, w, N, C, 1e-5, NULL);
        assert_bits(plain, y, N * C);
    }
    case_free(&c);
}

static void test_norm_of_zeros_is_finite(void **state) {
    enum { N = 2, C = 17 };
    Case c = {.seed = 3};
    real_t *x = case_reals(&c, N * C), *w = case_normal(&c, C), *y = case_poison(&c, N * C), *rstd = case_poison(&c, N);
    real_t *ds = case_reals(&c, N * C), *dw = case_reals(&c, C), *dy = case_normal(&c, N * C);
    norm_forward(NULL, y, rstd, x, NULL, w, N, C, 1e-5, NULL);
    norm_backward(ds, dw, dy, x, rstd, w, N, C, NULL);
    for (int i = 0; i < N * C; i++) {
        assert_true(y[i] == 0);
    }
    assert_true(all_finite(rstd, N) && all_finite(ds, N * C) && all_finite(dw, C));
    assert_true(ds[0] != 0);
    case_free(&c);
}

/* start + sum_i x_i y_i as kernels/matmul.h defines its bits: one chain of fused multiply-adds in order of i */
static real_t fused_chain(real_t start, const real_t *x, size_t x_step, const real_t *y, size_t y_step, int n) {
    for (int i = 0; i < n; i++) {
        start = sizeof start == sizeof(float)
                    ? (real_t)fmaf((float)x[i * x_step], (float)y[i * y_step], (float)start)
                    : (real_t)fma((double)x[i * x_step], (double)y[i * y_step], (double)start);
    }
    return start;
}

/* Against the reference in double, and against the chain in bits where the processor has fused multiply-adds. The error
 * is measured against the norm that such products of standard normal numbers have: one element alone may happen to
 * cancel. */
static void check_product(const real_t *result, const real_t *chain, const double *reference, size_t count, int inner) {
    double difference = 0;
    for (size_t i = 0; i < count; i++) {
        difference += ((double)result[i] - reference[i]) * ((double)result[i] - reference[i]);
    }
    assert_true(sqrt(difference) <= TOLERANCE * sqrt((double)count * inner));
#if (defined(__FMA__) || defined(__aarch64__)) && !defined(__SANITIZE_ADDRESS__)
    assert_bits(result, chain, count);
#endif
}

static void check_matmul(int N, int IN, int OUT) {
    Case c = {.seed = (uint64_t)(N * 1000003 + IN * 1009 + OUT)};
    size_t x_count = (size_t)N * IN, w_count = (size_t)OUT * IN, y_count = (size_t)N * OUT;
    real_t *x = case_normal(&c, x_count), *w = case_normal(&c, w_count), *dy = case_normal(&c, y_count);
    real_t *y = case_poison(&c, y_count), *dx = case_poison(&c, x_count), *dw = case_normal(&c, w_count);
    real_t *y_chain = case_reals(&c, y_count), *dx_chain = case_reals(&c, x_count), *dw_chain = case_reals(&c, w_count);
    double *y_ref = case_doubles(&c, y_count), *dx_ref = case_doubles(&c, x_count), *dw_ref = case_doubles(&c, w_count);
    for (size_t i = 0; i < y_count; i++) {
        y_ref[i] = dot_double(x + i / OUT * IN, 1, w + i % OUT * IN, 1, IN);
        y_chain[i] = fused_chain(0, x + i / OUT * IN, 1, w + i % OUT * IN, 1, IN);
    }
    matmul_forward(y, x, w, N, IN, OUT, NULL);
    check_product(y, y_chain, y_ref, y_count, IN);

    for (size_t i = 0; i < w_count; i++) {
        dw_ref[i] = (double)dw[i] + dot_double(dy + i / IN, OUT, x + i % IN, IN, N);
        dw_chain[i] = fused_chain(dw[i], dy + i / IN, OUT, x + i % IN, IN, N);
    }
    matmul_backward_weight(dw, dy, x, N, IN, OUT, NULL);
    check_product(dw, dw_chain, dw_ref, w_count, N + 1);

    for (int accumulate = 0; accumulate <= 1; accumulate++) {
        if (accumulate) {
            fill_normal(dx, x_count, 0, 1, c.seed, 7);
        }
        for (size_t i = 0; i < x_count; i++) {
            real_t start = accumulate ? dx[i] : 0;
            dx_ref[i] = (double)start + dot_double(dy + i / IN * OUT, 1, w + i % IN, IN, OUT);
            dx_chain[i] = fused_chain(start, dy + i / IN * OUT, 1, w + i % IN, IN, OUT);
        }
        matmul_backward_input(dx, dy, w, N, IN, OUT, accumulate, NULL);
        check_product(dx, dx_chain, dx_ref, x_count, OUT + accumulate);
    }
    case_free(&c);
}

static void test_matmul(void **state) {
    static const int edge[] = {1, 127, 128, 129};
    for (int i = 0; i < 64; i++) {
        check_matmul(edge[i / 16], edge[i / 4 % 4], edge[i % 4]);
    }
    check_matmul(13, 777, 37); /* inner extents that no block holds at once */
    check_matmul(37, 13, 777);
    check_matmul(777, 37, 13);
    for (int size = 1; size <= 70; size++) {
        uint64_t key = random_key((uint64_t)size, RANDOM_TEST, 1);
        int other = 1 + (int)random_below(key, 0, 70), third = 1 + (int)random_below(key, 1, 70);
        check_matmul(size, other, third);
        check_matmul(other, size, third);
        check_matmul(other, third, size);
    }
}

static void test_gate(void **state) {
    static const int sizes[][3] = {{1, 1, 1}, {7, 5, 3}, {9, 64, 8}, {5, 129, 63}, {33, 17, 65}};
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        int N = sizes[s][0], C = sizes[s][1], E = sizes[s][2];
        Case c = {.seed = 4 + s};
        real_t *x = case_normal(&c, (size_t)N * C), *w = case_normal(&c, (size_t)E * C),
               *logits = case_poison(&c, (size_t)N * E);
        double *reference = case_doubles(&c, (size_t)N * E);
        for (int i = 0; i < N * E; i++) {
            reference[i] = dot_double(x + i / E * C, 1, w + i % E * C, 1, C);
        }
        gate_forward(logits, x, w, N, C, E, NULL);
        assert_close(logits, reference, (size_t)N * E);
        case_free(&c);
    }
}

/* ---- loss and optimizer */

static void test_cross_entropy(void **state) {
    enum { N = 4, V = 37 };
    Case c = {.seed = 9};
    int targets[N] = {0, 36, 5, 7};
    real_t *logits = case_reals(&c, N * V), *losses = case_poison(&c, N), *again = case_poison(&c, N),
           *mean = case_poison(&c, 1);
    fill_value(logits, N * V, 3.5);
    cross_entropy_forward(losses, logits, targets, N, V, NULL);
    for (int n = 0; n < N; n++) {
        assert_near(losses[n], log(V));
    }
    fill_normal(logits, N * V, 0, 2, 1, 1);
    fill_value(logits, V, -1e4); /* row 0: one winner far above, and it is the target */
    logits[0] = (real_t)1e4;
    fill_value(logits + V, V, 1e4); /* row 1: the target far below */
    logits[V + 36] = (real_t)-1e4;
    real_t *gradient = case_copy(&c, logits, N * V);
    cross_entropy_forward(losses, logits, targets, N, V, NULL);
    cross_entropy_forward_backward(again, gradient, targets, N, V, 0.25, NULL);
    assert_bits(losses, again, N);
    assert_true(losses[0] == 0);
    assert_near(losses[1], 2e4 + log(V - 1));
    assert_true(all_finite(gradient, N * V));
    for (int n = 0; n < N; n++) {
        double largest = -INFINITY, sum = 0, total = 0;
        for (int v = 0; v < V; v++) {
            largest = fmax(largest, (double)logits[n * V + v]);
        }
        for (int v = 0; v < V; v++) {
            sum += exp((double)logits[n * V + v] - largest);
        }
        assert_near(losses[n], largest + log(sum) - (double)logits[n * V + targets[n]]);
        for (int v = 0; v < V; v++) {
            double p = exp((double)logits[n * V + v] - largest) / sum;
            assert_near(gradient[n * V + v], 0.25 * (p - (v == targets[n])));
            total += (double)gradient[n * V + v];
        }
        assert_true(fabs(total) <= TOLERANCE);
    }
    real_t values[3] = {1, 2, 6};
    mean_forward(mean, values, 3, 3, NULL);
    assert_true(*mean == 3);
    mean_forward(mean, values, 3, 2, NULL); /* one of the three is not predicted */
    assert_true(*mean == 4.5f);
    real_t one[2] = {-7, 7}; /* a vocabulary of one: nothing to learn */
    cross_entropy_forward_backward(again, one, (int[]){0, 0}, 2, 1, 1, NULL);
    assert_true(again[0] == 0 && again[1] == 0 && one[0] == 0 && one[1] == 0);
    case_free(&c);
}

/* Rows without a target, NaN among them, leave nothing behind and change nothing for the others. */
static void test_cross_entropy_of_few_rows(void **state) {
    enum { N = 5, V = 37 };
    Case c = {.seed = 12};
    int all[N] = {3, 1, 4, 1, 5}, few[N] = {-1, 1, -1, -1, 5};
    real_t *logits = case_normal(&c, N * V), *losses = case_poison(&c, N), *gradient = case_copy(&c, logits, N * V);
    real_t *few_losses = case_poison(&c, N), *again = case_poison(&c, N), mean;
    cross_entropy_forward_backward(losses, gradient, all, N, V, 0.5, NULL);
    logits[0] = INFINITY;
    fill_value(logits + 2 * V, V, NAN);
    logits[3 * V + 8] = (real_t)NAN;
    cross_entropy_forward(few_losses, logits, few, N, V, NULL);
    cross_entropy_forward_backward(again, logits, few, N, V, 0.5, NULL);
    assert_bits(few_losses, again, N);
    for (int n = 0; n < N; n++) {
        if (few[n] < 0) {
            fill_value(gradient + n * V, V, 0);
            losses[n] = 0;
        }
    }
    assert_bits(few_losses, losses, N);
    assert_bits(logits, gradient, N * V);
    mean_forward(&mean, few_losses, N, 2, NULL);
    assert_near(mean, ((double)losses[1] + (double)losses[4]) / 2);
    case_free(&c);
}

/* Five steps of two pieces, one with decay and one without, against the formula of adamw.h in double. */
static void check_adamw(double clip, bool shared_weights) {
    enum { FIRST = ADAM_CHUNK + 3, COUNT = FIRST + 3616, PIECES = 2, CHUNKS = 3, STEPS = 5 };
    AdamPiece pieces[PIECES] = {{.count = FIRST, .trained = 1, .decay = 0.1},
                                {.offset = FIRST, .count = COUNT - FIRST, .trained = 1}};
    const int chunks = adamw_number_chunks(pieces, PIECES);
    Case c = {.seed = 10};
    real_t *master = case_normal(&c, COUNT), *m = case_reals(&c, COUNT), *v = case_reals(&c, COUNT);
    real_t *weights = shared_weights ? master : case_poison(&c, COUNT), *grads = case_reals(&c, COUNT), loss = 1;
    double *w_ref = case_doubles(&c, COUNT), *m_ref = case_doubles(&c, COUNT), *v_ref = case_doubles(&c, COUNT),
           sums[PIECES], partial[CHUNKS];
    const double lr = 1e-2;
    AdamState adam = {0};
    AdamOptions options = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .clip = clip};
    assert_int_equal(chunks, CHUNKS);
    for (int i = 0; i < COUNT; i++) {
        w_ref[i] = (double)master[i];
    }
    for (int t = 1; t <= STEPS; t++) {
        double square[PIECES] = {0};
        fill_normal(grads, COUNT, 0, 0.1 * t, (uint64_t)t, 3);
        for (int i = 0; i < COUNT; i++) {
            square[i >= FIRST] += (double)grads[i] * (double)grads[i];
        }
        double norm = sqrt(square[0] + square[1]), scale = clip > 0 && norm > clip ? clip / norm : 1;
        real_t *kept = case_copy(&c, grads, COUNT);
        adamw_square_sums(sums, partial, grads, pieces, PIECES, chunks, NULL);
        assert_near(sums[0], square[0]);
        assert_near(sums[1], square[1]);
        adamw_begin(&adam, sums, PIECES, &loss, &lr, options, NULL);
        assert_near(adam.norm, norm);
        assert_near(adam.scale, scale);
        adamw_update(master, weights, m, v, grads, pieces, PIECES, chunks, &adam, options, NULL);
        for (int i = 0; i < COUNT; i++) {
            assert_true(grads[i] == 0);
            double g = scale * (double)kept[i];
            m_ref[i] = 0.9 * m_ref[i] + (1 - 0.9) * g;
            v_ref[i] = 0.95 * v_ref[i] + (1 - 0.95) * g * g;
            double step = m_ref[i] / (1 - pow(0.9, t)) / (sqrt(v_ref[i] / (1 - pow(0.95, t))) + 1e-8);
            w_ref[i] -= 1e-2 * (step + (i < FIRST ? 0.1 : 0) * w_ref[i]);
        }
        assert_int_equal(adam.updates, t);
        assert_bits(weights, master, COUNT);
    }
    assert_close(master, w_ref, COUNT);
    assert_close(m, m_ref, COUNT);
    assert_close(v, v_ref, COUNT);
    case_free(&c);
}

static void test_adamw(void **state) {
    check_adamw(0, true);
    check_adamw(1, false);
    check_adamw(1e9, true);
}

/* With a gradient of zero only decay moves a weight, and without decay nothing does. Frozen pieces count for nothing,
 * stay, and have their gradients cleared. */
static void test_adamw_decay_and_frozen(void **state) {
    AdamState adam = {0};
    AdamPiece pieces[3] = {{.count = 2, .trained = 1},
                           {.offset = 2, .count = 2, .trained = 1, .decay = 0.5},
                           {.offset = 5, .count = 2, .decay = 0.5}};
    const double lr = 0.5;
    double sums[3], partial[3];
    real_t loss = 1, grads[7] = {[4] = 8, [5] = 7, [6] = (real_t)NAN}, m[7] = {0}, v[7] = {0};
    real_t w[7] = {1, -2, 1, -2, 3, 4, 5};
    AdamOptions options = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .clip = 1};
    assert_int_equal(adamw_number_chunks(pieces, 3), 3);
    adamw_square_sums(sums, partial, grads, pieces, 3, 3, NULL);
    assert_true(sums[0] == 0 && sums[1] == 0 && sums[2] == 0);
    adamw_begin(&adam, sums, 3, &loss, &lr, options, NULL);
    assert_true(adam.norm == 0 && adam.lr == lr);
    adamw_update(w, w, m, v, grads, pieces, 3, 3, &adam, options, NULL);
    assert_true(w[0] == 1 && w[1] == -2 && w[2] == 0.75 && w[3] == -1.5 && w[4] == 3 && w[5] == 4 && w[6] == 5);
    assert_true(grads[4] == 8 && grads[5] == 0 && grads[6] == 0); /* 4 is a gap between two pieces */
}

static void test_adamw_skips_what_is_not_finite(void **state) {
    enum { COUNT = 100 };
    const AdamPiece piece = {.count = COUNT, .trained = 1, .decay = 0.1};
    const double lr = 1;
    Case c = {.seed = 11};
    AdamState adam = {0};
    AdamOptions options = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .clip = 1};
    real_t *w = case_normal(&c, COUNT), *weights = case_normal(&c, COUNT), *m = case_normal(&c, COUNT),
           *v = case_normal(&c, COUNT);
    real_t *before[4] = {case_copy(&c, w, COUNT), case_copy(&c, weights, COUNT), case_copy(&c, m, COUNT),
                         case_copy(&c, v, COUNT)};
    static const double bad_gradient[] = {NAN, INFINITY, -INFINITY, 0, 0}, bad_loss[] = {1, 1, 1, NAN, INFINITY};
    real_t *good = case_normal(&c, COUNT), *zero = case_copy(&c, good, COUNT), loss;
    double sums[1], partial[1];
    fill_value(zero, COUNT, 0);
    for (int i = 0; i < 5; i++) {
        real_t *grads = case_copy(&c, good, COUNT);
        grads[41] = i < 3 ? (real_t)bad_gradient[i] : good[41];
        loss = (real_t)bad_loss[i];
        adamw_square_sums(sums, partial, grads, &piece, 1, 1, NULL);
        adamw_begin(&adam, sums, 1, &loss, &lr, options, NULL);
        adamw_update(w, weights, m, v, grads, &piece, 1, 1, &adam, options, NULL);
        assert_true(adam.scale == 0);
        assert_int_equal(adam.updates, 0);
        assert_int_equal(adam.skipped, i + 1);
        assert_int_equal(adam.skipped_in_row, i + 1);
        assert_bits(w, before[0], COUNT);
        assert_bits(weights, before[1], COUNT);
        assert_bits(m, before[2], COUNT);
        assert_bits(v, before[3], COUNT);
        assert_bits(grads, zero, COUNT);
    }
    loss = 1;
    adamw_begin(&adam, sums, 1, &loss, &lr, options, NULL); /* the sums of the finite gradient */
    assert_int_equal(adam.updates, 1);
    assert_int_equal(adam.skipped, 5);
    assert_int_equal(adam.skipped_in_row, 0);
    assert_near(adam.correction1, 0.1);
    assert_near(adam.correction2, 0.05);
    case_free(&c);
}

/* Whatever a step does with a piece, it leaves a gradient that is to be kept, and clears the others. */
static void test_adamw_keeps_gradients(void **state) {
    AdamPiece pieces[4] = {{.count = 1, .trained = 1, .keep_grad = 1},
                           {.offset = 1, .count = 1, .trained = 1},
                           {.offset = 2, .count = 1, .keep_grad = 1},
                           {.offset = 3, .count = 1}};
    const double lr = 0.5;
    double sums[4], partial[4];
    assert_int_equal(adamw_number_chunks(pieces, 4), 4);
    for (int skip = 0; skip <= 1; skip++) {
        AdamState adam = {0};
        AdamOptions options = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8};
        real_t loss = skip ? (real_t)NAN : 1, grads[4] = {5, 6, 7, 8}, m[4] = {0}, v[4] = {0}, w[4] = {1, 2, 3, 4};
        adamw_square_sums(sums, partial, grads, pieces, 4, 4, NULL);
        adamw_begin(&adam, sums, 4, &loss, &lr, options, NULL);
        adamw_update(w, w, m, v, grads, pieces, 4, 4, &adam, options, NULL);
        assert_true(grads[0] == 5 && grads[1] == 0 && grads[2] == 7 && grads[3] == 0);
        assert_true(skip ? w[0] == 1 && w[1] == 2 : w[0] < 1 && w[1] < 2);
        assert_true(w[2] == 3 && w[3] == 4);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_embedding),
        cmocka_unit_test(test_norm),
        cmocka_unit_test(test_norm_of_zeros_is_finite),
        cmocka_unit_test(test_matmul),
        cmocka_unit_test(test_gate),
        cmocka_unit_test(test_cross_entropy),
        cmocka_unit_test(test_cross_entropy_of_few_rows),
        cmocka_unit_test(test_adamw),
        cmocka_unit_test(test_adamw_decay_and_frozen),
        cmocka_unit_test(test_adamw_skips_what_is_not_finite),
        cmocka_unit_test(test_adamw_keeps_gradients),
    };
    omp_set_num_threads(1); /* thousands of small calls; test_determinism.c shows that threads change no bit */
    return cmocka_run_group_tests_name("operations: exactness and edges", tests, NULL, NULL);
}
