/* What can be asked of an operation: the right gradient, and the same bits again.
 *
 * A case is an operation with a shape: named arrays with random contents, a forward and a backward. The objective is
 * the sum over all outputs of output * upstream with a fixed random upstream (all ones would hide wrong orders of
 * summation and transposed gradients), so that the backward yields its gradient. Overwritten arrays are poisoned with
 * NaN before each run; accumulated ones hold known random numbers that must survive.
 *
 *     gradients_wrong()   backward against central differences, every input by name (double build)
 *     case_snapshot()     every result as bytes, to compare runs bit for bit
 *
 * The operations themselves are the table of operations.h. Read test_ops_grad.c next.
 */
#ifndef TESTS_GRADCHECK_H
#define TESTS_GRADCHECK_H

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "threads.h"

#include "../kernels/check.h"
#include "../kernels/random.h"
#include "../kernels/plan.h"

enum { EXTENTS = 12, CASE_ARRAYS = 32, CASE_PIECES = 128 };

typedef enum {
    ROLE_INPUT,   /* differentiable: value is given, gradient is what backward computes */
    ROLE_OUTPUT,  /* part of the objective: value is what forward computes, gradient is the upstream */
    ROLE_SAVED,   /* forward computes it, the objective leaves it out */
    ROLE_SCRATCH, /* contents after a run mean nothing */
} Role;

typedef enum { OVERWRITTEN, ACCUMULATED } Mode;

typedef struct {
    const char *name;
    Role role;
    Mode mode; /* of an input's gradient, of an output's value */
    size_t count;
    real_t *value, *gradient;
    real_t *before; /* what an accumulated array holds at first */
} Array;

typedef struct {
    int n[EXTENTS];
    uint64_t seed;
    Array arrays[CASE_ARRAYS];
    int array_count;
    int *index; /* tokens or targets */
    bool routed;
    Plan plan;
    void *pieces[CASE_PIECES];
    int piece_count;
} Case;

typedef struct {
    const char *name, *extents;
    bool (*make)(Case *c); /* false: these random numbers do not suit, draw others */
    void (*forward)(Case *c);
    void (*backward)(Case *c);
    int shapes[20][EXTENTS]; /* small and odd, for differences; ends with a row of zeros */
    const char *zero[20];    /* the inputs whose gradient is exactly zero at that shape; NULL: none */
    int large[4][EXTENTS];   /* enough work for every thread */
} Operation;

/* Memory of a case, exactly as long as asked so that AddressSanitizer sees an overrun of one element; owned by the
 * case. */
static inline void *case_memory(Case *c, size_t count, size_t size) {
    void *memory = NULL;
    CHECK(c->piece_count < CASE_PIECES, "raise CASE_PIECES");
    CHECK(posix_memalign(&memory, 64, count * size + (count == 0)) == 0, "out of memory: close other programs");
    memset(memory, 0, count * size);
    c->pieces[c->piece_count++] = memory;
    return memory;
}

static inline real_t *case_reals(Case *c, size_t count) {
    return case_memory(c, count, sizeof(real_t));
}

static inline int *case_ints(Case *c, size_t count) {
    return case_memory(c, count, sizeof(int));
}

static inline void case_free(Case *c) {
    for (int i = 0; i < c->piece_count; i++) {
        free(c->pieces[i]);
    }
    memset(c, 0, sizeof *c);
}

/* x_i = mean + deviation * normal, a function of seed, stream and i */
static inline void fill_normal(real_t *x, size_t count, double mean, double deviation, uint64_t seed, uint64_t stream) {
    uint64_t key = random_key(seed, RANDOM_TEST, stream);
    for (size_t i = 0; i < count; i++) {
        x[i] = (real_t)(mean + deviation * random_normal(key, i));
    }
}

/* Uniform in (0, 1], as combine weights are. */
static inline void fill_positive(real_t *x, size_t count, uint64_t seed, uint64_t stream) {
    uint64_t key = random_key(seed, RANDOM_TEST, stream);
    for (size_t i = 0; i < count; i++) {
        x[i] = (real_t)(1 - 0.999 * random_uniform(key, i));
    }
}

static inline void fill_value(real_t *x, size_t count, double value) {
    for (size_t i = 0; i < count; i++) {
        x[i] = (real_t)value;
    }
}

/* A case's memory filled with standard normal numbers that no other piece of the case shares. */
static inline real_t *case_normal(Case *c, size_t count) {
    real_t *x = case_reals(c, count);
    fill_normal(x, count, 0, 1, c->seed, 1000 + (uint64_t)c->piece_count);
    return x;
}

static inline void case_add(Case *c, const char *name, Role role, Mode mode, size_t count, double mean,
                            double deviation) {
    CHECK(c->array_count < CASE_ARRAYS, "raise CASE_ARRAYS");
    uint64_t stream = 4 * (uint64_t)c->array_count;
    Array *a = &c->arrays[c->array_count++];
    *a = (Array){.name = name, .role = role, .mode = mode, .count = count, .value = case_reals(c, count)};
    a->gradient = case_reals(c, count);
    a->before = case_reals(c, count);
    fill_normal(a->before, count, 0, 1, c->seed, stream);
    if (role == ROLE_INPUT) {
        fill_normal(a->value, count, mean, deviation, c->seed, stream + 1);
    } else {
        fill_normal(a->gradient, count, 0, 1, c->seed, stream + 2);
    }
}

static inline void add_input(Case *c, const char *name, size_t count, Mode gradient) {
    case_add(c, name, ROLE_INPUT, gradient, count, 0, 1);
}

static inline void add_output(Case *c, const char *name, size_t count) {
    case_add(c, name, ROLE_OUTPUT, OVERWRITTEN, count, 0, 0);
}

static inline void add_saved(Case *c, const char *name, size_t count) {
    case_add(c, name, ROLE_SAVED, OVERWRITTEN, count, 0, 0);
}

static inline void add_scratch(Case *c, const char *name, size_t count) {
    case_add(c, name, ROLE_SCRATCH, OVERWRITTEN, count, 0, 0);
}

static inline Array *array_named(Case *c, const char *name) {
    for (int i = 0; i < c->array_count; i++) {
        if (strcmp(c->arrays[i].name, name) == 0) {
            return &c->arrays[i];
        }
    }
    die(__FILE__, __LINE__, "no array '%s' in this case: add it in make", name);
}

static inline real_t *val(Case *c, const char *name) {
    return array_named(c, name)->value;
}

static inline real_t *grad(Case *c, const char *name) {
    return array_named(c, name)->gradient;
}

/* ---- running a case */

static inline void reset_array(real_t *x, const Array *a) {
    if (a->mode == ACCUMULATED) {
        memcpy(x, a->before, a->count * sizeof *x);
    } else {
        fill_value(x, a->count, NAN);
    }
}

static inline void case_forward(const Operation *op, Case *c) {
    for (int i = 0; i < c->array_count; i++) {
        if (c->arrays[i].role != ROLE_INPUT) {
            reset_array(c->arrays[i].value, &c->arrays[i]);
        }
    }
    op->forward(c);
}

static inline void case_backward(const Operation *op, Case *c) {
    for (int i = 0; i < c->array_count; i++) {
        if (c->arrays[i].role == ROLE_INPUT) {
            reset_array(c->arrays[i].gradient, &c->arrays[i]);
        }
    }
    op->backward(c);
}

/* Draws random numbers until they suit the operation. */
static inline void case_make(Case *c, const Operation *op, const int *extents, uint64_t seed) {
    for (int attempt = 0; attempt < 200; attempt++) {
        *c = (Case){.seed = seed + 1000 * (uint64_t)attempt};
        memcpy(c->n, extents, sizeof c->n);
        if (op->make(c)) {
            return;
        }
        case_free(c);
    }
    die(__FILE__, __LINE__, "%s: no suitable inputs in 200 draws, choose another shape", op->name);
}

static inline size_t copy_bytes(char *out, size_t at, const void *in, size_t bytes) {
    if (out) {
        memcpy(out + at, in, bytes);
    }
    return at + bytes;
}

/* Bytes of all results, written to out unless it is NULL. */
static inline size_t case_snapshot(const Case *c, char *out) {
    size_t at = 0;
    for (int i = 0; i < c->array_count; i++) {
        const Array *a = &c->arrays[i];
        if (a->role != ROLE_SCRATCH) {
            at = copy_bytes(out, at, a->role == ROLE_INPUT ? a->gradient : a->value, a->count * sizeof(real_t));
        }
    }
    if (c->routed) {
        const Plan *p = &c->plan;
        size_t entries = (size_t)p->N * p->K;
        at = copy_bytes(out, at, p->expert, entries * sizeof(int));
        at = copy_bytes(out, at, p->row, entries * sizeof(int));
        at = copy_bytes(out, at, p->entry, (size_t)p->rows * sizeof(int));
        at = copy_bytes(out, at, p->offset, ((size_t)p->E + 1) * sizeof(int));
    }
    return at;
}

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

static inline int unwritten(const Operation *op, const Case *c, const Array *a, const real_t *x) {
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
        real_t saved = a->value[i];
        a->value[i] = (real_t)((double)saved + h);
        double up = objective(op, c);
        a->value[i] = (real_t)((double)saved - h);
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
#define TOLERANCE (sizeof(real_t) == sizeof(float) ? 1e-6 : 1e-14)

static inline double relative_error(const real_t *x, const double *reference, size_t count) {
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

static inline real_t *case_copy(Case *c, const real_t *x, size_t count) {
    return memcpy(case_reals(c, count), x, count * sizeof *x);
}

static inline real_t *case_poison(Case *c, size_t count) {
    real_t *x = case_reals(c, count);
    fill_value(x, count, NAN);
    return x;
}

static inline bool all_finite(const real_t *x, size_t count) {
    for (size_t i = 0; i < count; i++) {
        if (!isfinite(x[i])) {
            return false;
        }
    }
    return true;
}

static inline double dot_double(const real_t *x, size_t x_step, const real_t *y, size_t y_step, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) {
        sum += (double)x[i * x_step] * (double)y[i * y_step];
    }
    return sum;
}

#endif
