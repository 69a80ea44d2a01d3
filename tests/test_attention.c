// build: both
/* Rotary embedding and attention, causal and both ways, against their definitions in double: what each row sees, that
 * positions count relatively, and that decoding gives the bits of the whole. Read next: kernels/attention.h.
 */
#include "operations.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>

#include <cmocka.h>

/* ---- rotary embedding */

static void test_rope(void **state) {
    enum { N = 6, T = 3, START = 4, NH = 2, NKV = 1, HS = 8, HALF = HS / 2 };
    enum { QK = (NH + NKV) * HS, W = QK + NKV * HS };
    RopeShape shape = {.N = N, .T = T, .start = START, .NH = NH, .NKV = NKV, .HS = HS, .base = 100, .eps = 1e-6};
    Case c = {.seed = 5};
    real_t *qkv = case_normal(&c, N * W), *weight[2] = {case_normal(&c, HS), case_normal(&c, HS)};
    real_t *table = case_poison(&c, (START + T) * HS), *qk = case_poison(&c, N * QK),
           *rstd = case_poison(&c, N * (NH + NKV));
    double *reference = case_doubles(&c, N * QK);
    rope_table(table, START + T, HS, shape.base, NULL);
    for (int norm = 0; norm <= 1; norm++) {
        for (int i = 0; i < N * QK; i++) {
            int position = START + i / QK % T, head = i % QK / HS, at = i % HS, pair = at % HALF;
            const real_t *x = qkv + i / QK * W + head * HS;
            double r = norm ? 1 / sqrt(dot_double(x, 1, x, 1, HS) / HS + shape.eps) : 1;
            const real_t *w = weight[head >= NH];
            double low = (double)x[pair] * r * (norm ? (double)w[pair] : 1);
            double high = (double)x[pair + HALF] * r * (norm ? (double)w[pair + HALF] : 1);
            double angle = position * pow(shape.base, -2.0 * pair / HS);
            reference[i] = at < HALF ? low * cos(angle) - high * sin(angle) : high * cos(angle) + low * sin(angle);
        }
        rope_forward(qk, norm ? rstd : NULL, qkv, norm ? weight[0] : NULL, norm ? weight[1] : NULL, table, shape, NULL);
        assert_close(qk, reference, N * QK);
    }
    case_free(&c);
}

/* Position 0 is the identity, lengths stay, and q.k depends on the distance of the positions alone. */
static void test_rope_is_relative(void **state) {
    enum { T = 40, HS = 16, QK = 2 * HS, W = 3 * HS };
    RopeShape shape = {.N = T, .T = T, .NH = 1, .NKV = 1, .HS = HS, .base = 10000};
    Case c = {.seed = 6};
    real_t *qkv = case_normal(&c, T * W), *qk = case_poison(&c, T * QK), *table = case_poison(&c, T * HS);
    for (int t = 1; t < T; t++) { /* the same query and key everywhere */
        memcpy(qkv + t * W, qkv, W * sizeof *qkv);
    }
    rope_table(table, T, HS, shape.base, NULL);
    rope_forward(qk, NULL, qkv, NULL, NULL, table, shape, NULL);
    assert_bits(qk, qkv, QK);
    double length = dot_double(qkv, 1, qkv, 1, HS);
    for (int t = 0; t < T; t++) {
        assert_near(dot_double(qk + t * QK, 1, qk + t * QK, 1, HS), length);
        if (t >= 7) {
            double at_7 = dot_double(qk + 7 * QK, 1, qk + HS, 1, HS);
            assert_near(dot_double(qk + t * QK, 1, qk + (t - 7) * QK + HS, 1, HS), at_7);
        }
    }
    assert_true(fabs(dot_double(qk + 7 * QK, 1, qk + HS, 1, HS) - dot_double(qk + 8 * QK, 1, qk + HS, 1, HS)) > 1e-4);
    case_free(&c);
}

/* ---- attention */

/* Values in rows of qkv whose other places hold what may not be read */
static real_t *random_values(Case *c, size_t rows, int NH, int NKV, int HS) {
    size_t QK = (size_t)(NH + NKV) * HS, V = (size_t)NKV * HS;
    real_t *qkv = case_poison(c, rows * (QK + V)), *values = case_normal(c, rows * V);
    for (size_t row = 0; row < rows; row++) {
        memcpy(qkv + row * (QK + V) + QK, values + row * V, V * sizeof *values);
    }
    return qkv;
}

static void attention_reference(double *out, double *lse, const real_t *qk, const real_t *qkv, AttentionShape shape) {
    int B = shape.B, T = shape.T, NH = shape.NH, NKV = shape.NKV, HS = shape.HS;
    int QK = (NH + NKV) * HS, W = QK + NKV * HS;
    double *s = malloc((size_t)T * sizeof *s);
    for (int i = 0; i < B * T * NH; i++) {
        int b = i / (T * NH), t = i / NH % T, head = i % NH, group = head / (NH / NKV);
        int last = shape.causal ? t : T - 1;
        const real_t *rows = qk + (size_t)b * T * QK, *values = qkv + (size_t)b * T * W + QK + group * HS;
        double largest = -INFINITY, sum = 0;
        for (int j = 0; j <= last; j++) {
            s[j] = dot_double(rows + t * QK + head * HS, 1, rows + j * QK + (NH + group) * HS, 1, HS) / sqrt(HS);
            largest = fmax(largest, s[j]);
        }
        for (int j = 0; j <= last; j++) {
            s[j] = exp(s[j] - largest);
            sum += s[j];
        }
        lse[((size_t)b * NH + head) * T + t] = largest + log(sum);
        for (int k = 0; k < HS; k++) {
            out[(size_t)i * HS + k] = 0;
            for (int j = 0; j <= last; j++) {
                out[(size_t)i * HS + k] += s[j] / sum * (double)values[j * W + k];
            }
        }
    }
    free(s);
}

static void check_attention(AttentionShape shape) {
    int B = shape.B, T = shape.T, NH = shape.NH, NKV = shape.NKV, HS = shape.HS;
    Case c = {.seed = (uint64_t)(T * 100 + NH * 10 + HS)};
    size_t QK = (size_t)(NH + NKV) * HS, W = QK + (size_t)NKV * HS, count = (size_t)B * T * NH * HS,
           cache = (size_t)B * T * NKV * HS;
    real_t *qk = case_normal(&c, (size_t)B * T * QK), *qkv = random_values(&c, (size_t)B * T, NH, NKV, HS);
    real_t *out = case_poison(&c, count), *lse = case_poison(&c, (size_t)B * NH * T);
    double *out_ref = case_doubles(&c, count), *lse_ref = case_doubles(&c, (size_t)B * NH * T);
    attention_reference(out_ref, lse_ref, qk, qkv, shape);
    attention_forward(out, lse, qk, qkv, shape, NULL);
    assert_close(out, out_ref, count);
    assert_close(lse, lse_ref, (size_t)B * NH * T);

    real_t *keys = case_poison(&c, cache),
           *values = case_poison(&c, cache); /* what lies after the position is not read */
    real_t *row = case_reals(&c, (size_t)B * W), *qk_row = case_reals(&c, (size_t)B * QK);
    real_t *decoded = case_poison(&c, (size_t)B * NH * HS);
    for (int t = 0; t < T && shape.causal; t++) {
        for (int b = 0; b < B; b++) {
            memcpy(row + b * W, qkv + ((size_t)b * T + t) * W, W * sizeof *row);
            memcpy(qk_row + b * QK, qk + ((size_t)b * T + t) * QK, QK * sizeof *row);
        }
        attention_decode(decoded, keys, values, qk_row, row, t, shape, NULL);
        for (int b = 0; b < B; b++) {
            assert_bits(decoded + (size_t)b * NH * HS, out + ((size_t)b * T + t) * NH * HS, (size_t)NH * HS);
        }
    }
    size_t row_width = (size_t)NKV * HS; /* the same rows, kept from a whole prompt in a longer cache */
    real_t *kept_keys = case_poison(&c, cache + 2 * B * row_width),
           *kept_values = case_poison(&c, cache + 2 * B * row_width);
    attention_keep(kept_keys, kept_values, qk, qkv, T + 2, shape, NULL);
    for (int b = 0; b < B && shape.causal; b++) {
        size_t place = (size_t)b * (T + 2) * row_width;
        assert_bits(kept_keys + place, keys + b * T * row_width, T * row_width);
        assert_bits(kept_values + place, values + b * T * row_width, T * row_width);
        assert_true(isnan(kept_keys[place + T * row_width]) && isnan(kept_values[place + T * row_width]));
    }
    case_free(&c);
}

static void test_attention_and_decode(void **state) {
    static const int times[] = {1, 2, 17, 64, 65, 130}, heads[][2] = {{4, 4}, {4, 2}, {3, 1}},
                     sizes[] = {2, 16, 32, 34};
    for (int i = 0; i < 2 * 72; i++) { /* 72 = 6 * 3 * 4, causal and bidirectional */
        const int *head = heads[i / 4 % 3];
        check_attention((AttentionShape){2, times[i / 12 % 6], head[0], head[1], sizes[i % 4], .causal = i < 72});
    }
}

/* Later tokens change nothing before them, and in the backward nothing flows from an output to later tokens. */
static void test_attention_is_causal(void **state) {
    enum { T = 130, NH = 4, NKV = 2, HS = 16, QK = (NH + NKV) * HS, W = QK + NKV * HS, O = NH * HS };
    static const int cuts[] = {1, 2, 63, 64, 65, 66, 127, 129};
    const AttentionShape shape = {1, T, NH, NKV, HS, .causal = 1};
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
        Case c = {.seed = 8 + i};
        size_t before = (size_t)cuts[i], after = T - before;
        real_t *qk = case_normal(&c, T * QK), *qkv = random_values(&c, T, NH, NKV, HS);
        real_t *out = case_poison(&c, T * O), *lse = case_poison(&c, NH * T);
        real_t *dout = case_normal(&c, T * O), *dqkv = case_poison(&c, T * W), *other = case_poison(&c, T * O);
        attention_forward(out, lse, qk, qkv, shape, NULL);
        memset(dout + before * O, 0, after * O * sizeof *dout);
        attention_backward(dqkv, dout, out, lse, qk, qkv, shape, NULL);
        for (size_t j = before * W; j < T * W; j++) {
            assert_true(dqkv[j] == 0);
        }
        fill_normal(qk + before * QK, after * QK, 0, 100, c.seed, 9);
        fill_normal(qkv + before * W, after * W, 0, 100, c.seed, 10);
        attention_forward(other, lse, qk, qkv, shape, NULL);
        assert_bits(other, out, before * O);
        assert_true(memcmp(other + before * O, out + before * O, O * sizeof *out) != 0);
        case_free(&c);
    }
}

/* Bidirectional: the first output hears of the last token and sends gradient to it; the last output, which sees all
 * tokens either way, has the bits of causal attention. */
static void test_attention_both_ways(void **state) {
    enum { T = 130, NH = 4, NKV = 2, HS = 16, QK = (NH + NKV) * HS, W = QK + NKV * HS, O = NH * HS, LAST = T - 1 };
    const AttentionShape causal = {1, T, NH, NKV, HS, .causal = 1}, both = {1, T, NH, NKV, HS, .causal = 0};
    Case c = {.seed = 7};
    real_t *qk = case_normal(&c, T * QK), *qkv = random_values(&c, T, NH, NKV, HS);
    real_t *out = case_poison(&c, T * O), *lse = case_poison(&c, NH * T);
    real_t *dout = case_reals(&c, T * O), *dqkv = case_poison(&c, T * W), *other = case_poison(&c, T * O);
    attention_forward(other, lse, qk, qkv, causal, NULL);
    attention_forward(out, lse, qk, qkv, both, NULL);
    assert_bits(out + LAST * O, other + LAST * O, O);
    fill_normal(dout, O, 0, 1, c.seed, 9); /* into the first output alone */
    attention_backward(dqkv, dout, out, lse, qk, qkv, both, NULL);
    for (int i = 0; i < T * W; i++) {
        assert_true((dqkv[i] == 0) == (i >= W && i % W < O)); /* all but the other queries */
    }
    fill_normal(qk + LAST * QK, QK, 0, 1, c.seed, 10);
    fill_normal(qkv + LAST * W, W, 0, 1, c.seed, 11);
    attention_forward(other, lse, qk, qkv, both, NULL);
    for (int i = 0; i < T * NH; i++) { /* every head of every token sees it */
        assert_true(memcmp(other + i * HS, out + i * HS, HS * sizeof *out) != 0);
    }
    case_free(&c);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rope),
        cmocka_unit_test(test_rope_is_relative),
        cmocka_unit_test(test_attention_and_decode),
        cmocka_unit_test(test_attention_is_causal),
        cmocka_unit_test(test_attention_both_ways),
    };
    omp_set_num_threads(1); /* thousands of small calls; test_determinism.c shows that threads change no bit */
    return cmocka_run_group_tests_name("attention: exactness and edges", tests, NULL, NULL);
}
