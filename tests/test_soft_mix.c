// build: both
/* Soft mixtures against a naive reference in double, and what must hold exactly of them: shares that sum to 1, a group
 * of one token, tokens permuted within a group, groups that know nothing of each other, and the edges (a zero row, a
 * scale of 0 or of 10000, NaN).
 *
 * test_ops_grad.c has the gradients against differences; here they are compared with the formulas of soft_mix.h.
 */
#include "operations_soft.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>

#include <cmocka.h>

/* N C E slots group across */
static const int shapes[][EXTENTS] = {
    {12, 7, 3, 2, 4, 0},    {12, 7, 3, 2, 4, 1},   {12, 7, 3, 2, 12, 0},   {6, 5, 4, 1, 1, 0},
    {6, 5, 4, 1, 3, 1},     {5, 1, 1, 1, 5, 0},    {1, 3, 2, 3, 1, 0},     {40, 33, 7, 5, 20, 1},
    {60, 65, 64, 1, 30, 0}, {4, 300, 2, 40, 2, 0}, {600, 9, 1, 3, 300, 1}, {3, 4, 65, 5, 3, 0},
};
enum { SHAPES = sizeof shapes / sizeof *shapes };

static int group_of(const Plan *p, int n) {
    return p->across ? n % (p->N / p->group_tokens) : n / p->group_tokens;
}

/* The row of slot j in token n's group. */
static int row_of(const Plan *p, int n, int j) {
    return (j / p->slots * (p->N / p->group_tokens) + group_of(p, n)) * p->slots + j % p->slots;
}

/* A layer of soft mixtures around stand-ins for the experts: out = (e + 1) r - r^2 / 4 for a row r of expert e. */
typedef struct {
    Case c;
    int C;
    Plan plan;
    real_t *x, *phi, *scale, *dy;                                   /* in */
    real_t *logits, *x_inverse, *phi_inverse, *rows, *out, *y, *dx; /* out */
    real_t *dweight, *dmix, *dlogits, *dphi, *dscale, *dout, *drows;
} Layer;

static Layer layer_make(const int *extents, uint64_t seed) {
    Layer a = {.c = {.seed = seed}, .C = extents[1]};
    memcpy(a.c.n, extents, sizeof a.c.n);
    a.plan = soft_case_plan(&a.c);
    size_t NC = (size_t)a.plan.N * a.C, NK = (size_t)a.plan.N * a.plan.K, RC = (size_t)a.plan.rows * a.C;
    a.x = case_normal(&a.c, NC);
    a.phi = case_normal(&a.c, (size_t)a.plan.K * a.C);
    a.scale = case_reals(&a.c, 1);
    a.scale[0] = 2.5;
    a.dy = case_normal(&a.c, NC);
    a.plan.mix = case_poison(&a.c, NK);
    a.plan.weight = case_poison(&a.c, NK);
    a.logits = case_poison(&a.c, NK);
    a.x_inverse = case_poison(&a.c, (size_t)a.plan.N);
    a.phi_inverse = case_poison(&a.c, (size_t)a.plan.K);
    a.rows = case_poison(&a.c, RC);
    a.out = case_poison(&a.c, RC);
    a.y = case_poison(&a.c, NC);
    a.dx = case_poison(&a.c, NC);
    a.dweight = case_poison(&a.c, NK);
    a.dmix = case_poison(&a.c, NK);
    a.dlogits = case_poison(&a.c, NK);
    a.dphi = case_reals(&a.c, (size_t)a.plan.K * a.C);
    a.dscale = case_reals(&a.c, 1);
    a.dout = case_poison(&a.c, RC);
    a.drows = case_poison(&a.c, RC);
    return a;
}

static void layer_route(Layer *a) {
    soft_route_forward(a->logits, &a->plan, a->x_inverse, a->phi_inverse, a->x, a->phi, a->scale, a->C, NULL);
}

static void layer_forward(Layer *a) {
    layer_route(a);
    soft_dispatch_forward(a->rows, a->x, &a->plan, a->C, NULL);
    for (int i = 0; i < a->plan.rows * a->C; i++) {
        int expert = i / a->C / (a->plan.rows / a->plan.E);
        a->out[i] = (real_t)(expert + 1) * a->rows[i] - a->rows[i] * a->rows[i] / 4;
    }
    soft_combine_forward(a->y, a->out, &a->plan, a->C, 0, NULL);
}

static void layer_backward(Layer *a) {
    soft_combine_backward(a->dout, a->dweight, a->dy, a->out, &a->plan, a->C, NULL);
    for (int i = 0; i < a->plan.rows * a->C; i++) {
        int expert = i / a->C / (a->plan.rows / a->plan.E);
        a->drows[i] = a->dout[i] * ((real_t)(expert + 1) - a->rows[i] / 2);
    }
    soft_dispatch_backward(a->dx, a->dmix, a->drows, a->x, &a->plan, a->C, 0, NULL);
    soft_logits_backward(a->dlogits, a->dweight, a->dmix, &a->plan, NULL);
    soft_route_backward(a->dx, a->dphi, a->dscale, a->dlogits, a->logits, a->x_inverse, a->phi_inverse, a->x, a->phi,
                        a->scale, &a->plan, a->C, NULL);
}

/* ---- against the formulas */

static void test_route(void **state) {
    for (int i = 0; i < SHAPES; i++) {
        Layer a = layer_make(shapes[i], (uint64_t)i + 1);
        int N = a.plan.N, K = a.plan.K, C = a.C;
        double *l = case_doubles(&a.c, (size_t)N * K), *mix = case_doubles(&a.c, (size_t)N * K),
               *weight = case_doubles(&a.c, (size_t)N * K);
        layer_route(&a);
        for (int n = 0; n < N; n++) {
            const real_t *x = a.x + n * C;
            double x_length = sqrt(dot_double(x, 1, x, 1, C) + 1e-12);
            assert_near(a.x_inverse[n] * x_length, 1);
            for (int j = 0; j < K; j++) {
                const real_t *phi = a.phi + j * C;
                double phi_length = sqrt(dot_double(phi, 1, phi, 1, C) + 1e-12);
                assert_near(a.phi_inverse[j] * phi_length, 1);
                l[n * K + j] = 2.5 * dot_double(x, 1, phi, 1, C) / (x_length * phi_length);
            }
        }
        for (int n = 0; n < N; n++) {
            for (int j = 0; j < K; j++) {
                double over_slots = 0, over_tokens = 0;
                for (int k = 0; k < K; k++) {
                    over_slots += exp(l[n * K + k]);
                }
                for (int m = 0; m < N; m++) {
                    over_tokens += group_of(&a.plan, m) == group_of(&a.plan, n) ? exp(l[m * K + j]) : 0;
                }
                weight[n * K + j] = exp(l[n * K + j]) / over_slots;
                mix[n * K + j] = exp(l[n * K + j]) / over_tokens;
            }
        }
        assert_close(a.logits, l, (size_t)N * K);
        assert_close(a.plan.weight, weight, (size_t)N * K);
        assert_close(a.plan.mix, mix, (size_t)N * K);
        case_free(&a.c);
    }
}

static void test_shares_sum_to_one(void **state) {
    for (int i = 0; i < SHAPES; i++) {
        Layer a = layer_make(shapes[i], (uint64_t)i + 20);
        int N = a.plan.N, K = a.plan.K, E = a.plan.E;
        real_t *probs = case_poison(&a.c, (size_t)N * E);
        layer_route(&a);
        soft_expert_share(probs, &a.plan, NULL);
        for (int n = 0; n < N; n++) {
            double sum = 0, sum_of_shares = 0;
            for (int j = 0; j < K; j++) {
                assert_true(a.plan.weight[n * K + j] > 0 && a.plan.mix[n * K + j] > 0);
                sum += a.plan.weight[n * K + j];
            }
            for (int e = 0; e < E; e++) {
                double share = 0;
                for (int s = 0; s < a.plan.slots; s++) {
                    share += a.plan.weight[n * K + e * a.plan.slots + s];
                }
                assert_near(probs[n * E + e], share);
                sum_of_shares += probs[n * E + e];
            }
            assert_near(sum, 1);
            assert_near(sum_of_shares, 1);
        }
        for (int g = 0; g < N / a.plan.group_tokens; g++) {
            for (int j = 0; j < K; j++) {
                double sum = 0;
                for (int n = 0; n < N; n++) {
                    sum += group_of(&a.plan, n) == g ? a.plan.mix[n * K + j] : 0;
                }
                assert_near(sum, 1);
            }
        }
        case_free(&a.c);
    }
}

static void test_mixtures(void **state) {
    for (int i = 0; i < SHAPES; i++) {
        Layer a = layer_make(shapes[i], (uint64_t)i + 40);
        int N = a.plan.N, K = a.plan.K, C = a.C, R = a.plan.rows;
        double *rows = case_doubles(&a.c, (size_t)R * C), *y = case_doubles(&a.c, (size_t)N * C),
               *dmix = case_doubles(&a.c, (size_t)N * K), *dx = case_doubles(&a.c, (size_t)N * C);
        layer_forward(&a);
        layer_backward(&a);
        for (int n = 0; n < N; n++) {
            for (int j = 0; j < K; j++) {
                int r = row_of(&a.plan, n, j);
                dmix[n * K + j] = dot_double(a.x + n * C, 1, a.drows + r * C, 1, C);
                for (int k = 0; k < C; k++) {
                    rows[r * C + k] += (double)a.plan.mix[n * K + j] * a.x[n * C + k];
                    y[n * C + k] += (double)a.plan.weight[n * K + j] * a.out[r * C + k];
                    dx[n * C + k] += (double)a.plan.mix[n * K + j] * a.drows[r * C + k];
                }
            }
        }
        assert_close(a.rows, rows, (size_t)R * C);
        assert_close(a.y, y, (size_t)N * C);
        assert_close(a.dmix, dmix, (size_t)N * K);
        for (int accumulate = 0; accumulate <= 1; accumulate++) { /* twice the same: what is added to is y, dx */
            real_t factor = (real_t)(accumulate + 1);
            soft_combine_forward(a.y, a.out, &a.plan, C, accumulate, NULL);
            soft_dispatch_backward(a.dx, a.dmix, a.drows, a.x, &a.plan, C, accumulate, NULL);
            for (int k = 0; k < N * C; k++) {
                a.y[k] /= factor;
                a.dx[k] /= factor;
            }
            assert_close(a.y, y, (size_t)N * C);
            assert_close(a.dx, dx, (size_t)N * C);
        }
        double *dout = rows, *dweight = dmix;
        memset(dout, 0, sizeof *dout * (size_t)R * C);
        for (int n = 0; n < N; n++) {
            for (int j = 0; j < K; j++) {
                int r = row_of(&a.plan, n, j);
                dweight[n * K + j] = dot_double(a.dy + n * C, 1, a.out + r * C, 1, C);
                for (int k = 0; k < C; k++) {
                    dout[r * C + k] += (double)a.plan.weight[n * K + j] * a.dy[n * C + k];
                }
            }
        }
        assert_close(a.dout, dout, (size_t)R * C);
        assert_close(a.dweight, dweight, (size_t)N * K);
        case_free(&a.c);
    }
}

/* dl, and from it dx, dphi, dscale, which are added to what is there. The router sees its own dx alone. */
static void check_route_backward(const int *extents, double scale) {
    Layer a = layer_make(extents, 60);
    int N = a.plan.N, K = a.plan.K, C = a.C;
    double *dl = case_doubles(&a.c, (size_t)N * K), *dx = case_doubles(&a.c, (size_t)N * C),
           *dphi = case_doubles(&a.c, (size_t)K * C), dscale = 0.5;
    real_t *dw = case_normal(&a.c, (size_t)N * K), *dm = case_normal(&a.c, (size_t)N * K);
    a.scale[0] = (real_t)scale;
    layer_route(&a);
    for (int n = 0; n < N; n++) {
        double over_slots = dot_double(a.plan.weight + n * K, 1, dw + n * K, 1, K);
        for (int j = 0; j < K; j++) {
            double over_tokens = 0;
            for (int m = 0; m < N; m++) {
                over_tokens +=
                    group_of(&a.plan, m) == group_of(&a.plan, n) ? (double)a.plan.mix[m * K + j] * dm[m * K + j] : 0;
            }
            dl[n * K + j] = a.plan.weight[n * K + j] * (dw[n * K + j] - over_slots) +
                            a.plan.mix[n * K + j] * (dm[n * K + j] - over_tokens);
        }
    }
    soft_logits_backward(a.dlogits, dw, dm, &a.plan, NULL);
    assert_close(a.dlogits, dl, (size_t)N * K);

    for (int i = 0; i < N * C; i++) {
        dx[i] = a.dx[i] = a.dy[i];
    }
    for (int i = 0; i < K * C; i++) {
        dphi[i] = a.dphi[i] = (real_t)(0.01 * i);
    }
    a.dscale[0] = 0.5;
    for (int n = 0; n < N; n++) {
        for (int j = 0; j < K; j++) {
            const real_t *x = a.x + n * C, *phi = a.phi + j * C;
            double x_length = sqrt(dot_double(x, 1, x, 1, C) + 1e-12);
            double phi_length = sqrt(dot_double(phi, 1, phi, 1, C) + 1e-12);
            double cosine = dot_double(x, 1, phi, 1, C) / (x_length * phi_length), d = a.dlogits[n * K + j];
            dscale += d * cosine;
            for (int k = 0; k < C; k++) {
                double x_hat = x[k] / x_length, phi_hat = phi[k] / phi_length;
                dx[n * C + k] += scale * d * (phi_hat - x_hat * cosine) / x_length;
                dphi[j * C + k] += scale * d * (x_hat - phi_hat * cosine) / phi_length;
            }
        }
    }
    soft_route_backward(a.dx, a.dphi, a.dscale, a.dlogits, a.logits, a.x_inverse, a.phi_inverse, a.x, a.phi, a.scale,
                        &a.plan, C, NULL);
    assert_close(a.dx, dx, (size_t)N * C);
    assert_close(a.dphi, dphi, (size_t)K * C);
    assert_near(a.dscale[0], dscale);
    case_free(&a.c);
}

static void test_route_backward(void **state) {
    for (int i = 0; i < SHAPES; i++) {
        if (shapes[i][1] > 1) { /* one feature has a test of its own */
            check_route_backward(shapes[i], 2.5);
        }
    }
    check_route_backward(shapes[0], -1);
    check_route_backward(shapes[1], 0); /* logits are all zero; the scale has a gradient nevertheless */
}

/* ---- what holds exactly */

/* A slot of a group of one reads that token: mix is 1 and the row is a copy, bit for bit. */
static void test_group_of_one(void **state) {
    enum { N = 9, C = 37, E = 3 };
    for (int slots = 1; slots <= 4; slots += 3) {
        for (int across = 0; across <= 1; across++) {
            Layer a = layer_make((int[EXTENTS]){N, C, E, slots, 1, across}, 70);
            layer_forward(&a);
            for (int i = 0; i < N * a.plan.K; i++) {
                assert_true(a.plan.mix[i] == 1);
                assert_bits(a.rows + row_of(&a.plan, i / a.plan.K, i % a.plan.K) * C, a.x + i / a.plan.K * C, C);
            }
            case_free(&a.c);
        }
    }
}

/* One token a group, one slot an expert: the dense mixture y = sum_e softmax(l)_e out_e(x). */
static void test_single_token_is_the_dense_mixture(void **state) {
    enum { N = 11, C = 13, E = 6 };
    Layer a = layer_make((int[EXTENTS]){N, C, E, 1, 1, 0}, 71);
    double y[N * C] = {0};
    layer_forward(&a);
    for (int n = 0; n < N; n++) {
        double sum = 0;
        for (int e = 0; e < E; e++) {
            sum += exp((double)a.logits[n * E + e]);
        }
        for (int e = 0; e < E; e++) {
            for (int k = 0; k < C; k++) {
                double x = a.x[n * C + k];
                y[n * C + k] += exp((double)a.logits[n * E + e]) / sum * ((e + 1) * x - x * x / 4);
            }
        }
    }
    assert_close(a.y, y, N * C);
    case_free(&a.c);
}

/* Token n of the permuted batch is token order[n]: within group 1 reversed, elsewhere the same. */
static void test_permuted_tokens(void **state) {
    enum { N = 24, C = 19, M = 6, GROUPS = N / M };
    for (int across = 0; across <= 1; across++) {
        Layer a = layer_make((int[EXTENTS]){N, C, 3, 2, M, across}, 72);
        Layer b = layer_make((int[EXTENTS]){N, C, 3, 2, M, across}, 72);
        for (int n = 0; n < N; n++) {
            bool moved = group_of(&a.plan, n) == 1;
            int from = !moved ? n : across ? N - GROUPS + 2 - n : 3 * M - 1 - n;
            assert_int_equal(group_of(&a.plan, from), group_of(&a.plan, n));
            memcpy(b.x + n * C, a.x + from * C, sizeof *b.x * C);
            memcpy(b.dy + n * C, a.dy + from * C, sizeof *b.dy * C);
        }
        layer_forward(&a);
        layer_forward(&b);
        layer_backward(&a);
        layer_backward(&b);
        for (int n = 0; n < N; n++) {
            bool moved = group_of(&a.plan, n) == 1;
            int from = !moved ? n : across ? N - GROUPS + 2 - n : 3 * M - 1 - n;
            double y[C], dx[C];
            for (int k = 0; k < C; k++) {
                y[k] = a.y[from * C + k];
                dx[k] = a.dx[from * C + k];
            }
            assert_close(b.y + n * C, y, C);
            assert_close(b.dx + n * C, dx, C);
            if (!moved) {
                assert_bits(b.y + n * C, a.y + n * C, C);
                assert_bits(b.dx + n * C, a.dx + n * C, C);
            }
        }
        case_free(&a.c);
        case_free(&b.c);
    }
}

/* Another token, in turn of each group, changes every output of its own group and no bit of another. NaN too. */
static void test_groups_are_strangers(void **state) {
    enum { C = 19, REPLACEMENTS = 2 };
    static const int batches[][EXTENTS] = {
        {24, C, 3, 2, 6, 0}, {24, C, 3, 2, 6, 1}, {24, C, 5, 1, 6, 1}, {5, C, 4, 1, 1, 0}, {24, C, 3, 14, 12, 0}};
    const real_t replacement[REPLACEMENTS] = {3, NAN};
    for (size_t i = 0; i < REPLACEMENTS * (sizeof batches / sizeof *batches); i++) {
        Layer a = layer_make(batches[i / REPLACEMENTS], 73);
        layer_forward(&a);
        layer_backward(&a);
        for (int changed = 0; changed < a.plan.N; changed += 5) {
            Layer b = layer_make(batches[i / REPLACEMENTS], 73);
            b.x[changed * C + 1] = replacement[i % REPLACEMENTS];
            layer_forward(&b);
            layer_backward(&b);
            for (int n = 0; n < a.plan.N; n++) {
                bool same_y = memcmp(a.y + n * C, b.y + n * C, sizeof *a.y * C) == 0;
                bool same_dx = memcmp(a.dx + n * C, b.dx + n * C, sizeof *a.dx * C) == 0;
                bool same_group = group_of(&a.plan, n) == group_of(&a.plan, changed);
                assert_int_equal(same_y, !same_group);
                assert_int_equal(same_dx, !same_group);
                assert_true(all_finite(b.y + n * C, C) == (!same_group || isfinite(replacement[i % REPLACEMENTS])));
            }
            case_free(&b.c);
        }
        case_free(&a.c);
    }
}

/* ---- edges */

/* No direction: logits 0, uniform weights, and a gradient that is steep (1 / |x| is 1e6) and finite. */
static void test_zero_row(void **state) {
    enum { N = 8, C = 5, E = 3, SLOTS = 2, K = E * SLOTS, ZERO = 2 };
    Layer a = layer_make((int[EXTENTS]){N, C, E, SLOTS, 4, 0}, 74);
    double dx[C] = {0};
    memset(a.x + ZERO * C, 0, sizeof *a.x * C);
    memset(a.phi, 0, sizeof *a.phi * C); /* and a slot without a direction */
    layer_forward(&a);
    layer_backward(&a);
    assert_near(a.x_inverse[ZERO], 1e6);
    for (int j = 0; j < K; j++) {
        assert_true(a.logits[ZERO * K + j] == 0);
        assert_near(a.plan.weight[ZERO * K + j], 1.0 / K);
        double length = sqrt(dot_double(a.phi + j * C, 1, a.phi + j * C, 1, C) + 1e-12);
        for (int k = 0; k < C; k++) {
            dx[k] += (double)a.plan.mix[ZERO * K + j] * a.drows[row_of(&a.plan, ZERO, j) * C + k] +
                     2.5 * a.dlogits[ZERO * K + j] * a.phi[j * C + k] / length * 1e6;
        }
    }
    for (int n = 0; n < N; n++) {
        assert_true(a.logits[n * K] == 0);
    }
    assert_close(a.dx + ZERO * C, dx, C);
    assert_true(all_finite(a.y, N * C) && all_finite(a.dx, N * C) && all_finite(a.dphi, K * C));
    case_free(&a.c);
}

/* With one feature every direction is 1 or -1 and stays so. The gradient's two terms, dxhat and <xhat, dxhat>, cancel
 * but for the 1e-12 under the root, which leaves dxhat * 1e-12 / |x|^3: the rounding allowed is that of the terms. */
static void test_one_feature(void **state) {
    enum { N = 6, E = 3, SLOTS = 2, K = E * SLOTS };
    Layer a = layer_make((int[EXTENTS]){N, 1, E, SLOTS, 3, 0}, 77);
    double x_terms[N] = {0}, phi_terms[K] = {0}, dx[N] = {0}, dphi[K] = {0};
    layer_forward(&a);
    layer_backward(&a);
    memset(a.dx, 0, sizeof *a.dx * N);
    memset(a.dphi, 0, sizeof *a.dphi * K);
    soft_route_backward(a.dx, a.dphi, a.dscale, a.dlogits, a.logits, a.x_inverse, a.phi_inverse, a.x, a.phi, a.scale,
                        &a.plan, 1, NULL);
    for (int i = 0; i < N * K; i++) {
        int n = i / K, j = i % K;
        double x = 1 / (double)a.x_inverse[n], phi = 1 / (double)a.phi_inverse[j], d = 2.5 * a.dlogits[i];
        x_terms[n] += fabs(d) / x;
        phi_terms[j] += fabs(d) / phi;
        dx[n] += d * a.phi[j] / phi * 1e-12 / (x * x * x);
        dphi[j] += d * a.x[n] / x * 1e-12 / (phi * phi * phi);
    }
    for (int n = 0; n < N; n++) {
        assert_true(x_terms[n] > 0.01 && fabs(a.dx[n] - dx[n]) <= TOLERANCE * x_terms[n]);
    }
    for (int j = 0; j < K; j++) {
        assert_true(phi_terms[j] > 0.01 && fabs(a.dphi[j] - dphi[j]) <= TOLERANCE * phi_terms[j]);
    }
    case_free(&a.c);
}

/* So large a scale that exp overflows without the maximum taken off: the nearest slot and token get everything. */
static void test_large_scale(void **state) {
    enum { N = 12, C = 7, E = 3, SLOTS = 2, K = E * SLOTS };
    Layer a = layer_make((int[EXTENTS]){N, C, E, SLOTS, 4, 1}, 75);
    a.scale[0] = 10000;
    layer_forward(&a);
    layer_backward(&a);
    assert_true(all_finite(a.y, N * C) && all_finite(a.dx, N * C) && all_finite(a.dphi, K * C));
    for (int n = 0; n < N; n++) {
        int best = 0;
        for (int j = 1; j < K; j++) {
            best = a.logits[n * K + j] > a.logits[n * K + best] ? j : best;
        }
        assert_near(a.plan.weight[n * K + best], 1);
        for (int j = 0; j < K; j++) {
            int nearest = n;
            for (int m = 0; m < N; m++) {
                bool same = group_of(&a.plan, m) == group_of(&a.plan, n);
                nearest = same && a.logits[m * K + j] > a.logits[nearest * K + j] ? m : nearest;
            }
            assert_near(a.plan.mix[nearest * K + j], 1);
        }
    }
    case_free(&a.c);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_route),           cmocka_unit_test(test_shares_sum_to_one),
        cmocka_unit_test(test_mixtures),        cmocka_unit_test(test_route_backward),
        cmocka_unit_test(test_group_of_one),    cmocka_unit_test(test_single_token_is_the_dense_mixture),
        cmocka_unit_test(test_permuted_tokens), cmocka_unit_test(test_groups_are_strangers),
        cmocka_unit_test(test_zero_row),        cmocka_unit_test(test_one_feature),
        cmocka_unit_test(test_large_scale),
    };
    omp_set_num_threads(1); /* many small calls; test_determinism.c shows that threads change no bit */
    return cmocka_run_group_tests_name("soft mixtures", tests, NULL, NULL);
}
