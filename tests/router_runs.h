/* Runs of a small model for tests of routers: what two runs are compared by, where tokens went, states by name.
 *
 * Used by test_routers.c, test_fixed_routers.c, test_router_bits.c and test_chain.c. Read next: trainer.h.
 */
#ifndef TESTS_ROUTER_RUNS_H
#define TESTS_ROUTER_RUNS_H

#include <stdio.h>
#include <string.h>

#include "threads.h"
#include "trainer.h"

#include "../kernels/random.h"

/* |value - expected| <= tolerance. */
#define assert_near(value, expected, tolerance)                                 \
    do {                                                                        \
        double value_ = (value), expected_ = (expected);                        \
        if (!(fabs(value_ - expected_) <= (tolerance))) {                       \
            fail_msg("%s is %.17g, expected %.17g", #value, value_, expected_); \
        }                                                                       \
    } while (0)

/* What rounding may make of a few operations on numbers near 1. */
#define in_precision(of_double, of_float) (sizeof(acc_t) == sizeof(double) ? (of_double) : (of_float))

/* A Trainer with options put together as printf does. */
__attribute__((format(printf, 2, 3))) static inline void open_run(Trainer *t, const char *format, ...) {
    char options[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(options, sizeof options, format, arguments);
    va_end(arguments);
    trainer_open(t, options);
}

static inline void train_to(Trainer *t, int64_t step) {
    while (t->step < step) {
        train_step(t);
    }
}

/* Weights, states, both moments, counters and the last loss. */
static inline void assert_same_run(const Trainer *a, const Trainer *b, const char *what) {
    assert_int_equal(a->model.tensors.total, b->model.tensors.total);
    assert_int_equal(a->step, b->step);
    if (memcmp(a->model.master, b->model.master, flat_bytes(a)) ||
        memcmp(a->optimizer.m, b->optimizer.m, flat_bytes(a)) ||
        memcmp(a->optimizer.v, b->optimizer.v, flat_bytes(a)) ||
        memcmp(a->model.step_loss, b->model.step_loss, sizeof *a->model.step_loss) ||
        a->optimizer.state->updates != b->optimizer.state->updates ||
        a->optimizer.state->skipped != b->optimizer.state->skipped) {
        fail_msg("%s: the runs differ at step %lld, losses %.9g and %.9g", what, (long long)a->step,
                 (double)*a->model.step_loss, (double)*b->model.step_loss);
    }
}

/* The tensor of router i whose name ends like this: "w", "bias", "tau", "table". */
static inline acc_t *router_tensor(const Trainer *t, int i, const char *part, size_t *count) {
    char name[64];
    snprintf(name, sizeof name, "layers.%d.moe.router.%s", t->model.moe_layers[i], part);
    int index = tensors_find(&t->model.tensors, name);
    if (index < 0) {
        fail_msg("there is no tensor %s", name);
    }
    if (count) {
        *count = t->model.tensors.items[index].count;
    }
    return t->model.master + t->model.tensors.items[index].offset;
}

static inline size_t choices_count(const Transformer *model) {
    size_t count = 0;
    for (int i = 0; i < model->moe_count; i++) {
        count += (size_t)model->N * model->moes[i]->plan.K;
    }
    return count;
}

/* The experts of every entry of the last forward, router after router; the caller frees. */
static inline int *copy_choices(const Transformer *model) {
    int *copy = malloc((choices_count(model) + 1) * sizeof(int));
    assert_non_null(copy);
    for (int i = 0, *to = copy; i < model->moe_count; i++) {
        size_t count = (size_t)model->N * model->moes[i]->plan.K;
        memcpy(to, model->moes[i]->plan.expert, count * sizeof(int));
        to += count;
    }
    return copy;
}

static inline bool same_choices(const Transformer *model, const int *choices) {
    int *now = copy_choices(model);
    bool same = !memcmp(now, choices, choices_count(model) * sizeof(int));
    free(now);
    return same;
}

static inline void forward(Trainer *t, Split split, int64_t step) {
    read_slice(t, split, step, 0);
    transformer_forward(&t->model, t->tokens, 0, NULL);
    transformer_loss(&t->model, t->targets, 0, false, NULL);
}

static inline real_t *copy_hidden(const Trainer *t) {
    size_t bytes = (size_t)t->model.N * t->config.model.dim * sizeof(real_t);
    real_t *copy = malloc(bytes);
    assert_non_null(copy);
    host_from_device(copy, t->model.hidden, bytes, NULL);
    return copy;
}

static inline bool same_hidden(const Trainer *t, const real_t *hidden) {
    return !memcmp(t->model.hidden, hidden, (size_t)t->model.N * t->config.model.dim * sizeof(real_t));
}

#endif
