/* A case: one operation of the table in operations.h at one shape, with random inputs.
 *
 *     make ──> upload ──> prepare ──>  [ pack, upload ]  forward  [ download, settle ]
 *                                      [       upload ]  backward [ download, finish ]
 *
 * The brackets are the copies between what the test sees and what kernels see (mirror.h). On the CPU both are the same
 * memory, unless DEVICE_MEMORY is defined before this file is included, as parity.c does to compare devices. make,
 * pack, settle and finish work on host values; prepare, forward and backward hand device pointers to kernels.
 *
 * The objective is the sum over all outputs of output * upstream with a fixed random upstream (all ones would hide
 * wrong orders of summation and transposed gradients), so that the backward yields its gradient. Overwritten arrays are
 * poisoned before each run; accumulated ones hold known random numbers that must survive.
 *
 * A CPU that stands in for a bf16 device (stores_bf16) rounds where such a device stores: every real_t array that is
 * uploaded, and with stored() what passes from one kernel of a case to the next. What it computes last stays as it is:
 * the other side's one rounding is then all that the two may differ by.
 *
 * Read next: gradcheck.h, parity.c.
 */
#ifndef TESTS_CASE_H
#define TESTS_CASE_H

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mirror.h"

#include "../kernels/check.h"
#include "../kernels/device.h"
#include "../kernels/plan.h"
#include "../kernels/random.h"

enum { EXTENTS = 13, CASE_ARRAYS = 32, CASE_PIECES = 128, CASE_RESULTS = CASE_ARRAYS + 9, POISON_INT = -77777 };

typedef enum {
    ROLE_INPUT,   /* differentiable: value is given, gradient is what backward computes */
    ROLE_OUTPUT,  /* part of the objective: value is what forward computes, gradient is the upstream */
    ROLE_SAVED,   /* forward computes it, the objective leaves it out */
    ROLE_SCRATCH, /* contents after a run mean nothing */
} Role;

typedef enum { OVERWRITTEN, ACCUMULATED } Mode;

/* What an array's value and gradient are stored as. */
typedef enum {
    ACTIVATION, /* real_t, real_t */
    WEIGHT,     /* real_t, acc_t */
    PRECISE,    /* acc_t, acc_t */
} Storage;

typedef struct {
    const char *name;
    Role role;
    Mode mode; /* of an input's gradient, of an output's value */
    Storage storage;
    size_t count;
    acc_t *value, *gradient;
    acc_t *before; /* what an accumulated array holds at first */
    void *device_value, *device_gradient;
} Array;

/* When a plan's arrays are written: a given one once, by prepare, others by every forward. */
typedef enum { NO_PLAN, PLAN_MADE, PLAN_GIVEN } Planned;

typedef struct {
    int n[EXTENTS];
    uint64_t seed;
    bool stores_bf16; /* float on the CPU stands for bf16 on a device */
    Array arrays[CASE_ARRAYS];
    int array_count;
    int *index, *host_index; /* tokens, targets or offsets */
    Planned planned;
    Plan plan, host_plan;
    Mirror structs[5]; /* of the few operations that take some: an array of int to the case */
    Mirror mirrors[CASE_PIECES];
    int mirror_count;
    void *pieces[CASE_PIECES];
    int piece_count;
} Case;

typedef struct {
    const char *name, *extents;
    void (*make)(Case *c); /* the arrays and their values */
    void (*forward)(Case *c);
    void (*backward)(Case *c); /* NULL: nothing is differentiated */
    void (*prepare)(Case *c);  /* what a kernel computes once, before the first forward; these four may be NULL */
    void (*pack)(Case *c);
    void (*settle)(Case *c);
    void (*finish)(Case *c);
    bool (*suits)(Case *c);  /* after a forward; false: these random numbers do not, draw others */
    int shapes[20][EXTENTS]; /* small and odd, for differences; ends with a row of zeros */
    const char *zero[20];    /* the inputs whose gradient is exactly zero at that shape; NULL: none */
    int large[6][EXTENTS];   /* enough work for every thread */
    int fast[20][EXTENTS];   /* whole tiles and their edges: what the kernels of a GPU treat apart */
} Operation;

/* ---- memory */

/* Host memory of a case, exactly as long as asked so that AddressSanitizer sees an overrun of one element; owned by the
 * case. */
static inline void *case_memory(Case *c, size_t count, size_t size) {
    void *memory = NULL;
    CHECK(c->piece_count < CASE_PIECES, "raise CASE_PIECES");
    CHECK(posix_memalign(&memory, 64, count * size + (count == 0)) == 0, "out of memory: close other programs");
    memset(memory, 0, count * size);
    c->pieces[c->piece_count++] = memory;
    return memory;
}

static inline acc_t *case_reals(Case *c, size_t count) {
    return case_memory(c, count, sizeof(acc_t));
}

static inline int *case_ints(Case *c, size_t count) {
    return case_memory(c, count, sizeof(int));
}

static inline Mirror case_mirror(Case *c, Number number, size_t count) {
    Mirror m = {number, count, case_memory(c, count, number == NUMBER_INT ? sizeof(int) : sizeof(acc_t)), NULL};
    m.device = m.host;
#ifdef DEVICE_MEMORY
    m.device = device_allocate(count * number_bytes(number) + (count == 0));
    CHECK(m.device, "out of device memory: end other programs that use it");
    CHECK(c->mirror_count < CASE_PIECES, "raise CASE_PIECES");
    c->mirrors[c->mirror_count++] = m;
#endif
    return m;
}

static inline void case_free(Case *c) {
    for (int i = 0; i < c->mirror_count; i++) {
        Mirror *m = &c->mirrors[i];
        device_release(m->device, m->count * number_bytes(m->number) + (m->count == 0));
    }
    for (int i = 0; i < c->piece_count; i++) {
        free(c->pieces[i]);
    }
    memset(c, 0, sizeof *c);
}

/* Rounds what kernels see of one array to the numbers that a bf16 device would have stored. */
static inline void mirror_store(const Mirror *m) {
    acc_t *x = m->device;
#pragma omp parallel for if (m->count > PARALLEL)
    for (size_t i = 0; i < m->count; i++) {
        x[i] = bf16_rounded(x[i]);
    }
}

static inline void case_upload(const Case *c) {
    for (int i = 0; i < c->mirror_count; i++) {
        mirror_upload(&c->mirrors[i]);
        if (c->stores_bf16 && c->mirrors[i].number == NUMBER_REAL) {
            mirror_store(&c->mirrors[i]);
        }
    }
}

/* A result of one kernel on its way to the next one of the same case: on a bf16 device it has been rounded. */
static inline void *stored(const Case *c, void *device) {
    for (int i = 0; i < c->mirror_count && c->stores_bf16; i++) {
        if (c->mirrors[i].device == device) {
            mirror_store(&c->mirrors[i]);
        }
    }
    return device;
}

/* Takes over what kernels wrote. What they only read has been rounded on its way to them; the test keeps it as it was
 * computed. */
static inline void mirror_take_written(const Mirror *m) {
    acc_t *x = m->host;
    const acc_t *read = m->device;
#pragma omp parallel for if (m->count > PARALLEL)
    for (size_t i = 0; i < m->count; i++) {
        x[i] = read[i] == bf16_rounded(x[i]) ? x[i] : read[i];
    }
}

static inline void case_download(const Case *c) {
    for (int i = 0; i < c->mirror_count; i++) {
        if (c->stores_bf16 && c->mirrors[i].number == NUMBER_REAL) {
            mirror_take_written(&c->mirrors[i]);
        } else {
            mirror_download(&c->mirrors[i]);
        }
    }
}

/* ---- values */

/* x_i = mean + deviation * normal, a function of seed, stream and i */
static inline void fill_normal(acc_t *x, size_t count, double mean, double deviation, uint64_t seed, uint64_t stream) {
    uint64_t key = random_key(seed, RANDOM_TEST, stream);
#pragma omp parallel for if (count > PARALLEL)
    for (size_t i = 0; i < count; i++) {
        x[i] = (acc_t)(mean + deviation * random_normal(key, i));
    }
}

/* Uniform in (0, 1], as combine weights are. */
static inline void fill_positive(acc_t *x, size_t count, uint64_t seed, uint64_t stream) {
    uint64_t key = random_key(seed, RANDOM_TEST, stream);
    for (size_t i = 0; i < count; i++) {
        x[i] = (acc_t)(1 - 0.999 * random_uniform(key, i));
    }
}

static inline void fill_value(acc_t *x, size_t count, double value) {
    for (size_t i = 0; i < count; i++) {
        x[i] = (acc_t)value;
    }
}

/* A case's memory filled with standard normal numbers that no other piece of the case shares. */
static inline acc_t *case_normal(Case *c, size_t count) {
    acc_t *x = case_reals(c, count);
    fill_normal(x, count, 0, 1, c->seed, 1000 + (uint64_t)c->piece_count);
    return x;
}

/* ---- arrays */

static inline Number value_number(const Array *a) {
    return a->storage == PRECISE ? NUMBER_ACC : NUMBER_REAL;
}

static inline Number gradient_number(const Array *a) {
    return a->storage == ACTIVATION ? NUMBER_REAL : NUMBER_ACC;
}

static inline void case_add(Case *c, const char *name, Storage storage, Role role, Mode mode, size_t count) {
    CHECK(c->array_count < CASE_ARRAYS, "raise CASE_ARRAYS");
    uint64_t stream = 4 * (uint64_t)c->array_count;
    Array *a = &c->arrays[c->array_count++];
    *a = (Array){.name = name, .role = role, .mode = mode, .storage = storage, .count = count};
    Mirror value = case_mirror(c, value_number(a), count), gradient = case_mirror(c, gradient_number(a), count);
    a->value = value.host;
    a->gradient = gradient.host;
    a->device_value = value.device;
    a->device_gradient = gradient.device;
    a->before = case_reals(c, count);
    fill_normal(a->before, count, 0, 1, c->seed, stream);
    if (role == ROLE_INPUT) {
        fill_normal(a->value, count, 0, 1, c->seed, stream + 1);
    } else {
        fill_normal(a->gradient, count, 0, 1, c->seed, stream + 2);
    }
}

static inline void add_input(Case *c, const char *name, Storage storage, size_t count, Mode gradient) {
    case_add(c, name, storage, ROLE_INPUT, gradient, count);
}

static inline void add_output(Case *c, const char *name, Storage storage, size_t count) {
    case_add(c, name, storage, ROLE_OUTPUT, OVERWRITTEN, count);
}

static inline void add_saved(Case *c, const char *name, Storage storage, size_t count) {
    case_add(c, name, storage, ROLE_SAVED, OVERWRITTEN, count);
}

static inline void add_scratch(Case *c, const char *name, Storage storage, size_t count) {
    case_add(c, name, storage, ROLE_SCRATCH, OVERWRITTEN, count);
}

static inline Array *array_named(Case *c, const char *name) {
    for (int i = 0; i < c->array_count; i++) {
        if (strcmp(c->arrays[i].name, name) == 0) {
            return &c->arrays[i];
        }
    }
    die(__FILE__, __LINE__, "no array '%s' in this case: add it in make", name);
}

/* An array that is given and that nothing differentiates. It starts every run as `before`, which the caller fills. */
static inline acc_t *add_given(Case *c, const char *name, Storage storage, size_t count) {
    add_saved(c, name, storage, count);
    Array *a = array_named(c, name);
    a->mode = ACCUMULATED;
    return a->before;
}

static inline void add_index(Case *c, size_t count) {
    Mirror m = case_mirror(c, NUMBER_INT, count);
    c->index = m.device;
    c->host_index = m.host;
}

/* A struct, or anything else made of int, that the case holds as it is. */
static inline Mirror case_struct(Case *c, const void *content, size_t bytes) {
    Mirror m = case_mirror(c, NUMBER_INT, bytes / sizeof(int));
    memcpy(m.host, content, bytes);
    return m;
}

/* What kernels are given. */
static inline void *val(Case *c, const char *name) {
    return array_named(c, name)->device_value;
}

static inline void *grad(Case *c, const char *name) {
    return array_named(c, name)->device_gradient;
}

/* What the test sees of it. */
static inline acc_t *host_val(Case *c, const char *name) {
    return array_named(c, name)->value;
}

static inline acc_t *host_grad(Case *c, const char *name) {
    return array_named(c, name)->gradient;
}

/* ---- running a case */

static inline void reset_array(acc_t *x, const Array *a) {
    if (a->mode == ACCUMULATED) {
        memcpy(x, a->before, a->count * sizeof *x);
    } else {
        fill_value(x, a->count, NAN);
    }
}

static inline void poison_ints(int *x, size_t count) {
    for (size_t i = 0; x && i < count; i++) {
        x[i] = POISON_INT;
    }
}

static inline void poison_plan(Plan *p) {
    size_t entries = (size_t)p->N * p->K, rows = (size_t)p->rows;
    poison_ints(p->expert, entries);
    poison_ints(p->row, entries);
    poison_ints(p->entry, rows);
    poison_ints(p->demand, (size_t)p->E);
    poison_ints(p->count, (size_t)p->E);
    poison_ints(p->offset, (size_t)p->E + 1);
    poison_ints(p->tile_expert, rows / PLAN_TILE);
    fill_value(p->weight, entries, NAN);
    fill_value(p->row_weight, rows, NAN);
}

static inline void case_forward(const Operation *op, Case *c) {
    for (int i = 0; i < c->array_count; i++) {
        if (c->arrays[i].role != ROLE_INPUT) {
            reset_array(c->arrays[i].value, &c->arrays[i]);
        }
    }
    if (c->planned == PLAN_MADE) {
        poison_plan(&c->host_plan);
    }
    if (op->pack) {
        op->pack(c);
    }
    case_upload(c);
    op->forward(c);
    case_download(c);
    if (op->settle) {
        op->settle(c);
    }
}

static inline void case_backward(const Operation *op, Case *c) {
    for (int i = 0; i < c->array_count; i++) {
        if (c->arrays[i].role == ROLE_INPUT) {
            reset_array(c->arrays[i].gradient, &c->arrays[i]);
        }
    }
    if (!op->backward) {
        return;
    }
    case_upload(c);
    op->backward(c);
    case_download(c);
    if (op->finish) {
        op->finish(c);
    }
}

/* Rounds what a bf16 device would round, so that both sides of a comparison start from the same numbers. */
static inline void case_round(Case *c) {
    for (int i = 0; i < c->array_count; i++) {
        Array *a = &c->arrays[i];
        bool value = value_number(a) == NUMBER_REAL, gradient = gradient_number(a) == NUMBER_REAL;
#pragma omp parallel for if (a->count > PARALLEL)
        for (size_t j = 0; j < a->count; j++) {
            bool before = a->role == ROLE_INPUT ? gradient : value;
            a->value[j] = value ? bf16_rounded(a->value[j]) : a->value[j];
            a->gradient[j] = gradient ? bf16_rounded(a->gradient[j]) : a->gradient[j];
            a->before[j] = before ? bf16_rounded(a->before[j]) : a->before[j];
        }
    }
}

/* One draw of random numbers, whatever they are; bf16: rounded as a device of such numbers has them. */
static inline void case_draw(Case *c, const Operation *op, const int *extents, uint64_t seed, bool bf16) {
    *c = (Case){.seed = seed};
    memcpy(c->n, extents, sizeof c->n);
    op->make(c);
    if (bf16) {
        case_round(c);
    }
    if (op->prepare) {
        case_upload(c);
        op->prepare(c);
        case_download(c);
    }
}

/* Draws random numbers until they suit the operation; bf16: as a device of such numbers would compute with them. */
static inline void case_make_rounded(Case *c, const Operation *op, const int *extents, uint64_t seed, bool bf16) {
    for (int attempt = 0; attempt < 200; attempt++) {
        case_draw(c, op, extents, seed + 1000 * (uint64_t)attempt, bf16);
        c->stores_bf16 = bf16;
        if (!op->suits) {
            return;
        }
        case_forward(op, c);
        if (op->suits(c)) {
            return;
        }
        case_free(c);
    }
    die(__FILE__, __LINE__, "%s: no suitable inputs in 200 draws, choose another shape", op->name);
}

static inline void case_make(Case *c, const Operation *op, const int *extents, uint64_t seed) {
    case_make_rounded(c, op, extents, seed, false);
}

/* ---- results */

typedef struct {
    const char *name;
    Number number;
    size_t count;
    const void *host;
} Result;

static inline size_t result_bytes(const Result *r) {
    return r->count * (r->number == NUMBER_INT ? sizeof(int) : sizeof(acc_t));
}

/* Everything that forward and backward computed: gradients of inputs, values of outputs and of what is saved, the plan.
 * Returns how many there are. */
static inline int case_results(const Case *c, Result results[CASE_RESULTS]) {
    int count = 0;
    for (int i = 0; i < c->array_count; i++) {
        const Array *a = &c->arrays[i];
        if (a->role != ROLE_SCRATCH) {
            bool input = a->role == ROLE_INPUT;
            results[count++] = (Result){a->name, input ? gradient_number(a) : value_number(a), a->count,
                                        input ? a->gradient : a->value};
        }
    }
    if (c->planned == NO_PLAN) {
        return count;
    }
    const Plan *p = &c->host_plan;
    size_t entries = (size_t)p->N * p->K, rows = (size_t)p->rows, E = (size_t)p->E;
    const Result plan[] = {{"plan.expert", NUMBER_INT, entries, p->expert},
                           {"plan.weight", NUMBER_ACC, entries, p->weight},
                           {"plan.row", NUMBER_INT, entries, p->row},
                           {"plan.entry", NUMBER_INT, rows, p->entry},
                           {"plan.row_weight", NUMBER_ACC, rows, p->row_weight},
                           {"plan.demand", NUMBER_INT, E, p->demand},
                           {"plan.count", NUMBER_INT, E, p->count},
                           {"plan.offset", NUMBER_INT, E + 1, p->offset},
                           {"plan.tile_expert", NUMBER_INT, p->tile_expert ? rows / PLAN_TILE : 0, p->tile_expert}};
    memcpy(results + count, plan, sizeof plan);
    return count + (int)(sizeof plan / sizeof *plan);
}

/* Bytes of all results, written to out unless it is NULL. */
static inline size_t case_snapshot(const Case *c, char *out) {
    Result results[CASE_RESULTS];
    int count = case_results(c, results);
    size_t at = 0;
    for (int i = 0; i < count; i++) {
        size_t bytes = result_bytes(&results[i]);
        if (out && bytes > 0) {
            memcpy(out + at, results[i].host, bytes);
        }
        at += bytes;
    }
    return at;
}

#endif
