/* What can be asked of an operation: the right gradient, and agreement with a reference in double.
 *
 *     gradients_wrong()   backward against central differences, every input by name (double build)
 *     assert_close() ...  against a reference, for tests that call kernels themselves
 *
 * The case that is asked is case.h's, the operations are the table of operations.h. Read test_ops_grad.c next.
 */
#ifndef TESTS_GRADCHECK_H
#define TESTS_GRADCHECK_H

#include "case.h"
#include "threads.h"

/* ---- gradients */

static inline double objective(const Operation *op, Case *c) {
    case_forward(op, c);
    double sum = 0;
    for (int i = 0; i < c->array_count; i++) {
        const Array *a = &c->arrays[i];
        for (size_t j = 0; a->role == ROLE_OUTPUT && j < a->count; j++) {
            sum += (double)a->value[j] * (double)a->gradient[j];
        }
    }
    return sum;
}

static inline int report_wrong(const Operation *op, const Case *c, const char *array, const char *what) {
    fprintf(stderr, "%s (", op->name);
    for (int i = 0; i < EXTENTS; i++) {
        fprintf(stderr, i == 0 ? "%d" : " %d", c->n[i]);
    }
    fprintf(stderr, " = %s), %s: %s\n", op->extents, array, what);
    return 1;
}

static inline bool word_in(const char *word, const char *words) {
    size_t length = strlen(word);
    for (const char *at = words; at && *at; at += strcspn(at, " "), at += *at == ' ') {
        if (strncmp(at, word, length) == 0 && (at[length] == ' ' || at[length] == 0)) {
            return true;
        }
    }
    return false;
}

static inline int unwritten(const Operation *op, const Case *c, const Array *a, const acc_t *x) {
    for (size_t i = 0; i < a->count; i++) {
        if (!isfinite(x[i])) {
            char text[96];
            snprintf(text, sizeof text, "element %zu is not written or not finite", i);
            return report_wrong(op, c, a->name, text);
        }
    }
    return 0;
}

/* ||analytic - numeric|| / (||analytic|| + ||numeric||) <= 1e-6 for one input; where the gradient is known to be zero,
 * both must be. */
static inline int gradient_wrong(const Operation *op, Case *c, Array *a, bool zero) {
    const double h = 1e-5;
    double difference = 0, analytic = 0, numeric = 0, worst = -1, worst_a = 0, worst_n = 0;
    size_t worst_at = 0;
    for (size_t i = 0; i < a->count; i++) {
        acc_t saved = a->value[i];
        a->value[i] = (acc_t)((double)saved + h);
        double up = objective(op, c);
        a->value[i] = (acc_t)((double)saved - h);
        double down = objective(op, c);
        a->value[i] = saved;
        double n = (up - down) / (2 * h);
        double g = (double)a->gradient[i] - (a->mode == ACCUMULATED ? (double)a->before[i] : 0);
        difference += (g - n) * (g - n);
        analytic += g * g;
        numeric += n * n;
        if (fabs(g - n) > worst) {
            worst = fabs(g - n);
            worst_at = i;
            worst_a = g;
            worst_n = n;
        }
    }
    char text[160];
    double relative = sqrt(difference) / (sqrt(analytic) + sqrt(numeric));
    snprintf(text, sizeof text, "relative error %.1e, worst element %zu: analytic %.12g, numeric %.12g", relative,
             worst_at, worst_a, worst_n);
    if (zero) { /* adding to `before` rounds: a few units in its last place */
        return sqrt(analytic) <= 1e-13 * sqrt((double)a->count) && sqrt(numeric) <= 1e-8
                   ? 0
                   : report_wrong(op, c, a->name, text);
    }
    if (sqrt(analytic) <= 1e-8) {
        return report_wrong(op, c, a->name, "the analytic gradient is zero");
    }
    return relative <= 1e-6 ? 0 : report_wrong(op, c, a->name, text);
}

/* How many inputs of this case have a wrong gradient. */
static inline int gradients_wrong(const Operation *op, Case *c, const char *zero) {
    int wrong = 0;
    case_forward(op, c);
    case_backward(op, c);
    for (int i = 0; i < c->array_count; i++) {
        Array *a = &c->arrays[i];
        if (a->role != ROLE_SCRATCH) {
            wrong += unwritten(op, c, a, a->role == ROLE_INPUT ? a->gradient : a->value);
        }
    }
    int threads = omp_get_max_threads();
    omp_set_num_threads(1); /* for a few hundred numbers, starting threads is all the work */
    for (int i = 0; i < c->array_count; i++) {
        if (c->arrays[i].role == ROLE_INPUT) {
            wrong += gradient_wrong(op, c, &c->arrays[i], word_in(c->arrays[i].name, zero));
        }
    }
    omp_set_num_threads(threads);
    return wrong;
}

/* ---- comparing with a reference (the assertions need cmocka.h) */

/* relative L2 distance that is allowed against a reference in double */
#define TOLERANCE (sizeof(acc_t) == sizeof(float) ? 1e-6 : 1e-14)

static inline double relative_error(const acc_t *x, const double *reference, size_t count) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < count; i++) {
        difference += (x[i] - reference[i]) * (x[i] - reference[i]);
        norm += reference[i] * reference[i];
    }
    return norm > 0 ? sqrt(difference / norm) : sqrt(difference);
}

#define assert_close(x, reference, count) assert_true(relative_error(x, reference, count) <= TOLERANCE)
#define assert_near(x, y) assert_true(fabs((double)(x) - (double)(y)) <= 10 * TOLERANCE * (1 + fabs((double)(y))))
#define assert_bits(x, y, count) assert_memory_equal(x, y, (count) * sizeof *(x))

static inline double *case_doubles(Case *c, size_t count) {
    return case_memory(c, count, sizeof(double));
}

static inline acc_t *case_copy(Case *c, const acc_t *x, size_t count) {
    return memcpy(case_reals(c, count), x, count * sizeof *x);
}

static inline acc_t *case_poison(Case *c, size_t count) {
    acc_t *x = case_reals(c, count);
    fill_value(x, count, NAN);
    return x;
}

static inline bool all_finite(const acc_t *x, size_t count) {
    for (size_t i = 0; i < count; i++) {
        if (!isfinite(x[i])) {
            return false;
        }
    }
    return true;
}

static inline double dot_double(const acc_t *x, size_t x_step, const acc_t *y, size_t y_step, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) {
        sum += (double)x[i * x_step] * (double)y[i * y_step];
    }
    return sum;
}

#endif
