// build: both
/* Operations against closed forms, slow references in double and themselves: results that are exact must be exact.
 *
 * The gradient test only shows that forward and backward belong together; here the forward is held against its
 * definition in kernels/NAME.h, and the edges are visited: ties, NaN, an expert without rows, a full expert, one
 * position, one class. test_determinism.c has what must not depend on threads or batching.
 */
#include "gradcheck.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>

#include <cmocka.h>

#include "../kernels/adamw.h"

/* relative L2 distance that is allowed against a reference in double */
static const double tolerance = sizeof(real_t) == sizeof(float) ? 1e-6 : 1e-14;

static double relative_error(const real_t *x, const double *reference, size_t count) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < count; i++) {
        difference += (x[i] - reference[i]) * (x[i] - reference[i]);
        norm += reference[i] * reference[i];
    }
    return norm > 0 ? sqrt(difference / norm) : sqrt(difference);
}

#define assert_close(x, reference, count) assert_true(relative_error(x, reference, count) <= tolerance)
#define assert_near(x, y) assert_true(fabs((double)(x) - (double)(y)) <= 10 * tolerance * (1 + fabs((double)(y))))
#define assert_bits(x, y, count) assert_memory_equal(x, y, (count) * sizeof *(x))

static double *case_doubles(Case *c, size_t count) {
    return case_memory(c, count, sizeof(double));
}

static real_t *case_copy(Case *c, const real_t *x, size_t count) {
    return memcpy(case_reals(c, count), x, count * sizeof *x);
}

static real_t *case_poison(Case *c, size_t count) {
    real_t *x = case_reals(c, count);
    fill_value(x, count, NAN);
    return x;
}

static bool all_finite(const real_t *x, size_t count) {
    for (size_t i = 0; i < count; i++) {
        if (!isfinite(x[i])) {
            return false;
        }
    }
    return true;
}

static double dot_double(const real_t *x, size_t x_step, const real_t *y, size_t y_step, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) {
        sum += (double)x[i * x_step] * (double)y[i * y_step];
    }
    return sum;
}

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
    assert_true(sqrt(difference) <= tolerance * sqrt((double)count * inner));
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

/* ---- rotary embedding */

static void test_rope(void **state) {
    enum { N = 6, T = 3, START = 4, NH = 2, NKV = 1, HS = 8, W = (NH + 2 * NKV) * HS, HALF = HS / 2 };
    RopeShape shape = {.N = N, .T = T, .start = START, .NH = NH, .NKV = NKV, .HS = HS, .base = 100, .eps = 1e-6};
    Case c = {.seed = 5};
    real_t *qkv = case_normal(&c, N * W), *weight[2] = {case_normal(&c, HS), case_normal(&c, HS)};
    real_t *table = case_poison(&c, (START + T) * HS), *out = case_poison(&c, N * W),
           *rstd = case_poison(&c, N * (NH + NKV));
    double *reference = case_doubles(&c, N * W);
    rope_table(table, START + T, HS, shape.base, NULL);
    for (int norm = 0; norm <= 1; norm++) {
        for (int i = 0; i < N * W; i++) {
            int position = START + i / W % T, head = i % W / HS, at = i % HS, pair = at % HALF;
            const real_t *x = qkv + i - at;
            double r = norm ? 1 / sqrt(dot_double(x, 1, x, 1, HS) / HS + shape.eps) : 1;
            const real_t *w = weight[head >= NH];
            double low = (double)x[pair] * r * (norm ? (double)w[pair] : 1);
            double high = (double)x[pair + HALF] * r * (norm ? (double)w[pair + HALF] : 1);
            double angle = position * pow(shape.base, -2.0 * pair / HS);
            reference[i] = head >= NH + NKV ? (double)qkv[i]
                           : at < HALF      ? low * cos(angle) - high * sin(angle)
                                            : high * cos(angle) + low * sin(angle);
        }
        rope_forward(out, norm ? rstd : NULL, qkv, norm ? weight[0] : NULL, norm ? weight[1] : NULL, table, shape,
                     NULL);
        assert_close(out, reference, N * W);
        for (int n = 0; n < N; n++) {
            assert_bits(out + n * W + (NH + NKV) * HS, qkv + n * W + (NH + NKV) * HS, NKV * HS);
        }
    }
    case_free(&c);
}

/* Position 0 is the identity, lengths stay, and q.k depends on the distance of the positions alone. */
static void test_rope_is_relative(void **state) {
    enum { T = 40, HS = 16, W = 3 * HS };
    RopeShape shape = {.N = T, .T = T, .NH = 1, .NKV = 1, .HS = HS, .base = 10000};
    Case c = {.seed = 6};
    real_t *qkv = case_normal(&c, T * W), *out = case_poison(&c, T * W), *table = case_poison(&c, T * HS);
    for (int t = 1; t < T; t++) { /* the same query and key everywhere */
        memcpy(qkv + t * W, qkv, W * sizeof *qkv);
    }
    rope_table(table, T, HS, shape.base, NULL);
    rope_forward(out, NULL, qkv, NULL, NULL, table, shape, NULL);
    assert_bits(out, qkv, W);
    double length = dot_double(qkv, 1, qkv, 1, HS);
    for (int t = 0; t < T; t++) {
        assert_near(dot_double(out + t * W, 1, out + t * W, 1, HS), length);
        if (t >= 7) {
            double at_7 = dot_double(out + 7 * W, 1, out + HS, 1, HS);
            assert_near(dot_double(out + t * W, 1, out + (t - 7) * W + HS, 1, HS), at_7);
        }
    }
    assert_true(fabs(dot_double(out + 7 * W, 1, out + HS, 1, HS) - dot_double(out + 8 * W, 1, out + HS, 1, HS)) > 1e-4);
    case_free(&c);
}

/* ---- attention */

static void attention_reference(double *out, double *lse, const real_t *qkv, int B, int T, int NH, int NKV, int HS) {
    int W = (NH + 2 * NKV) * HS;
    double *s = malloc((size_t)T * sizeof *s);
    for (int i = 0; i < B * T * NH; i++) {
        int b = i / (T * NH), t = i / NH % T, head = i % NH, group = head / (NH / NKV);
        const real_t *rows = qkv + (size_t)b * T * W;
        double largest = -INFINITY, sum = 0;
        for (int j = 0; j <= t; j++) {
            s[j] = dot_double(rows + t * W + head * HS, 1, rows + j * W + (NH + group) * HS, 1, HS) / sqrt(HS);
            largest = fmax(largest, s[j]);
        }
        for (int j = 0; j <= t; j++) {
            s[j] = exp(s[j] - largest);
            sum += s[j];
        }
        lse[((size_t)b * NH + head) * T + t] = largest + log(sum);
        for (int k = 0; k < HS; k++) {
            out[(size_t)i * HS + k] = 0;
            for (int j = 0; j <= t; j++) {
                out[(size_t)i * HS + k] += s[j] / sum * (double)rows[j * W + (NH + NKV + group) * HS + k];
            }
        }
    }
    free(s);
}

static void check_attention(int B, int T, int NH, int NKV, int HS) {
    Case c = {.seed = (uint64_t)(T * 100 + NH * 10 + HS)};
    size_t W = (size_t)(NH + 2 * NKV) * HS, count = (size_t)B * T * NH * HS, cache = (size_t)B * T * NKV * HS;
    real_t *qkv = case_normal(&c, (size_t)B * T * W), *out = case_poison(&c, count),
           *lse = case_poison(&c, (size_t)B * NH * T);
    double *out_ref = case_doubles(&c, count), *lse_ref = case_doubles(&c, (size_t)B * NH * T);
    attention_reference(out_ref, lse_ref, qkv, B, T, NH, NKV, HS);
    attention_forward(out, lse, qkv, B, T, NH, NKV, HS, NULL);
    assert_close(out, out_ref, count);
    assert_close(lse, lse_ref, (size_t)B * NH * T);

    real_t *keys = case_poison(&c, cache),
           *values = case_poison(&c, cache); /* what lies after the position is not read */
    real_t *row = case_reals(&c, (size_t)B * W), *decoded = case_poison(&c, (size_t)B * NH * HS);
    for (int t = 0; t < T; t++) {
        for (int b = 0; b < B; b++) {
            memcpy(row + b * W, qkv + ((size_t)b * T + t) * W, W * sizeof *row);
        }
        attention_decode(decoded, keys, values, row, t, B, T, NH, NKV, HS, NULL);
        for (int b = 0; b < B; b++) {
            assert_bits(decoded + (size_t)b * NH * HS, out + ((size_t)b * T + t) * NH * HS, (size_t)NH * HS);
        }
    }
    case_free(&c);
}

static void test_attention_and_decode(void **state) {
    static const int times[] = {1, 2, 17, 64, 65, 130}, heads[][2] = {{4, 4}, {4, 2}, {3, 1}},
                     sizes[] = {2, 16, 32, 34};
    for (int i = 0; i < 6 * 3 * 4; i++) {
        check_attention(2, times[i / 12], heads[i / 4 % 3][0], heads[i / 4 % 3][1], sizes[i % 4]);
    }
}

/* Later tokens change nothing before them, and in the backward nothing flows from an output to later tokens. */
static void test_attention_is_causal(void **state) {
    enum { T = 130, NH = 4, NKV = 2, HS = 16, W = (NH + 2 * NKV) * HS, O = NH * HS };
    static const int cuts[] = {1, 2, 63, 64, 65, 66, 127, 129};
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
        Case c = {.seed = 8 + i};
        size_t before = (size_t)cuts[i], after = T - before;
        real_t *qkv = case_normal(&c, T * W), *out = case_poison(&c, T * O), *lse = case_poison(&c, NH * T);
        real_t *dout = case_normal(&c, T * O), *dqkv = case_poison(&c, T * W), *other = case_poison(&c, T * O);
        attention_forward(out, lse, qkv, 1, T, NH, NKV, HS, NULL);
        memset(dout + before * O, 0, after * O * sizeof *dout);
        attention_backward(dqkv, dout, out, lse, qkv, 1, T, NH, NKV, HS, NULL);
        for (size_t j = before * W; j < T * W; j++) {
            assert_true(dqkv[j] == 0);
        }
        fill_normal(qkv + before * W, after * W, 0, 100, c.seed, 9);
        attention_forward(other, lse, qkv, 1, T, NH, NKV, HS, NULL);
        assert_bits(other, out, before * O);
        assert_true(memcmp(other + before * O, out + before * O, O * sizeof *out) != 0);
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
        assert_true(fabs(total) <= tolerance);
    }
    real_t values[3] = {1, 2, 6};
    mean_forward(mean, values, 3, NULL);
    assert_true(*mean == 3);
    real_t one[2] = {-7, 7}; /* a vocabulary of one: nothing to learn */
    cross_entropy_forward_backward(again, one, (int[]){0, 0}, 2, 1, 1, NULL);
    assert_true(again[0] == 0 && again[1] == 0 && one[0] == 0 && one[1] == 0);
    case_free(&c);
}

/* Five steps of two pieces, one with decay and one without, against the formula of adamw.h in double. */
static void check_adamw(double clip, bool shared_weights) {
    enum { COUNT = 5003, FIRST = 4097, PIECES = 2, STEPS = 5 };
    const size_t offset[PIECES] = {0, FIRST}, count[PIECES] = {FIRST, COUNT - FIRST};
    Case c = {.seed = 10};
    real_t *master = case_normal(&c, COUNT), *m = case_reals(&c, COUNT), *v = case_reals(&c, COUNT);
    real_t *weights = shared_weights ? master : case_poison(&c, COUNT), *grads = case_reals(&c, COUNT), loss = 1;
    double *w_ref = case_doubles(&c, COUNT), *m_ref = case_doubles(&c, COUNT), *v_ref = case_doubles(&c, COUNT),
           sums[PIECES];
    AdamState adam = {0};
    AdamOptions options = {.lr = 1e-2, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .decay = 0.1, .clip = clip};
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
        adamw_square_sums(sums, grads, offset, count, PIECES, NULL);
        assert_near(sums[0], square[0]);
        assert_near(sums[1], square[1]);
        adamw_begin(&adam, sums, PIECES, &loss, options, NULL);
        assert_near(adam.norm, norm);
        assert_near(adam.scale, scale);
        for (int piece = 0; piece < PIECES; piece++) {
            options.decay = piece == 0 ? 0.1 : 0;
            size_t at = offset[piece];
            adamw_update(master + at, weights + at, m + at, v + at, grads + at, count[piece], &adam, options, NULL);
        }
        for (int i = 0; i < COUNT; i++) {
            double g = scale * (double)grads[i];
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

/* With a gradient of zero only decay moves a weight, and without decay nothing does. */
static void test_adamw_decay_alone(void **state) {
    AdamState adam = {0};
    double sums[1] = {0};
    real_t loss = 1, zero[2] = {0}, w[2] = {1, -2}, m[2] = {0}, v[2] = {0};
    AdamOptions options = {.lr = 0.5, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .clip = 1};
    adamw_begin(&adam, sums, 1, &loss, options, NULL);
    adamw_update(w, w, m, v, zero, 2, &adam, options, NULL);
    assert_true(w[0] == 1 && w[1] == -2);
    options.decay = 0.5;
    adamw_update(w, w, m, v, zero, 2, &adam, options, NULL);
    assert_true(w[0] == 0.75 && w[1] == -1.5);
}

static void test_adamw_skips_what_is_not_finite(void **state) {
    enum { COUNT = 100 };
    const size_t offset[1] = {0}, count[1] = {COUNT};
    Case c = {.seed = 11};
    AdamState adam = {0};
    AdamOptions options = {.lr = 1, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .decay = 0.1, .clip = 1};
    real_t *w = case_normal(&c, COUNT), *weights = case_normal(&c, COUNT), *m = case_normal(&c, COUNT),
           *v = case_normal(&c, COUNT);
    real_t *before[4] = {case_copy(&c, w, COUNT), case_copy(&c, weights, COUNT), case_copy(&c, m, COUNT),
                         case_copy(&c, v, COUNT)};
    static const double bad_gradient[] = {NAN, INFINITY, -INFINITY, 0, 0}, bad_loss[] = {1, 1, 1, NAN, INFINITY};
    real_t *grads = case_normal(&c, COUNT), loss, good = grads[41];
    double sums[1];
    for (int i = 0; i < 5; i++) {
        grads[41] = i < 3 ? (real_t)bad_gradient[i] : good;
        loss = (real_t)bad_loss[i];
        adamw_square_sums(sums, grads, offset, count, 1, NULL);
        adamw_begin(&adam, sums, 1, &loss, options, NULL);
        adamw_update(w, weights, m, v, grads, COUNT, &adam, options, NULL);
        assert_true(adam.scale == 0);
        assert_int_equal(adam.updates, 0);
        assert_int_equal(adam.skipped, i + 1);
        assert_int_equal(adam.skipped_in_row, i + 1);
        assert_bits(w, before[0], COUNT);
        assert_bits(weights, before[1], COUNT);
        assert_bits(m, before[2], COUNT);
        assert_bits(v, before[3], COUNT);
    }
    loss = 1;
    adamw_begin(&adam, sums, 1, &loss, options, NULL); /* the sums of the finite gradient */
    assert_int_equal(adam.updates, 1);
    assert_int_equal(adam.skipped, 5);
    assert_int_equal(adam.skipped_in_row, 0);
    assert_near(adam.correction1, 0.1);
    assert_near(adam.correction2, 0.05);
    case_free(&c);
}

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
            assert_true(fabs((double)dweight[r] - product) <= 100 * tolerance * (1 + fabs(product)));
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
        cmocka_unit_test(test_embedding),
        cmocka_unit_test(test_norm),
        cmocka_unit_test(test_norm_of_zeros_is_finite),
        cmocka_unit_test(test_matmul),
        cmocka_unit_test(test_gate),
        cmocka_unit_test(test_rope),
        cmocka_unit_test(test_rope_is_relative),
        cmocka_unit_test(test_attention_and_decode),
        cmocka_unit_test(test_attention_is_causal),
        cmocka_unit_test(test_cross_entropy),
        cmocka_unit_test(test_adamw),
        cmocka_unit_test(test_adamw_decay_alone),
        cmocka_unit_test(test_adamw_skips_what_is_not_finite),
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
    return cmocka_run_group_tests_name("operations: exactness and edges", tests, NULL, NULL);
}
