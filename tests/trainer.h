/* A Trainer: train.c's loop without its files, for tests of training as a whole.
 *
 *     Trainer t;
 *     trainer_open(&t, "--router top1");     // corpus, model and optimizer; what is not given is in BASE
 *     double loss = train_step(&t);          // all slices of one batch, then the optimizer
 *     trainer_close(&t);
 *
 * Tests that take a step apart call read_slice(), slice_gradient() and finish_step(). Used by test_training.c and
 * test_steps.c. Read next: train.c, model/optimizer.c.
 */
#ifndef TESTS_TRAINER_H
#define TESTS_TRAINER_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdlib.h>

#include "set_options.h"

#include "../data/corpus.h"
#include "../kernels/device.h"
#include "../model/figures.h"
#include "../model/optimizer.h"
#include "../model/transformer.h"

static const char BASE[] =
    "--layers 2 --dim 32 --heads 4 --kv-heads 2 --seq 32 --vocab 128 --experts 4 --top-k 2 --expert-dim 24 --batch 8 "
    "--steps 20 --warmup 4 --lr 3e-3";

typedef struct {
    Config config;
    Corpus *corpus;
    Arena arena;
    Transformer model;
    Optimizer optimizer;
    int *tokens, *targets; /* (N) of one slice */
    unsigned char *domain;
    double *floor;
    int *bytes;
    int64_t poison_step; /* the step in which a gradient becomes NaN; -1: none */
    int64_t step;
} Trainer;

static inline void trainer_open(Trainer *t, const char *options) {
    *t = (Trainer){.poison_step = -1};
    config_defaults(&t->config);
    set_options(&t->config, BASE);
    set_options(&t->config, options);
    config_finish(&t->config);
    const Config *c = &t->config;
    CorpusOptions corpus = {.train = c->train.data,
                            .val = c->train.val,
                            .seq = c->model.seq,
                            .batch = c->train.batch,
                            .vocab = c->model.vocab,
                            .shuffle = c->train.shuffle,
                            .seed = (uint64_t)c->train.seed};
    t->corpus = corpus_open(&corpus);
    int slices = c->train.grad_accum, batch = c->train.batch / slices;
    size_t N = (size_t)batch * c->model.seq;
    transformer_reserve(&t->model, c, batch, slices, USE_TRAIN, NULL, &t->arena);
    optimizer_reserve(&t->optimizer, &t->model.tensors, &t->arena);
    arena_reserve(&t->arena, (void **)&t->tokens, N * sizeof(int), MEMORY_ACTIVATIONS);
    arena_reserve(&t->arena, (void **)&t->targets, N * sizeof(int), MEMORY_ACTIVATIONS);
    arena_reserve(&t->arena, (void **)&t->domain, N, MEMORY_ACTIVATIONS);
    arena_reserve(&t->arena, (void **)&t->floor, N * sizeof(double), MEMORY_ACTIVATIONS);
    arena_reserve(&t->arena, (void **)&t->bytes, N * sizeof(int), MEMORY_ACTIVATIONS);
    arena_commit(&t->arena);
    transformer_connect(&t->model);
    optimizer_connect(&t->optimizer, &t->model.tensors, &c->train);
    transformer_init(&t->model, t->model.master, (uint64_t)c->train.seed, NULL);
}

static inline void trainer_close(Trainer *t) {
    corpus_close(t->corpus);
    transformer_free(&t->model);
    arena_free(&t->arena);
}

static inline void read_slice(Trainer *t, Split split, int64_t step, int slice) {
    Batch batch = {t->tokens, t->targets, t->domain, t->floor, t->bytes};
    corpus_batch(t->corpus, split, step, slice * t->model.B, t->model.B, &batch);
}

/* Forward, loss and backward of what has been read. */
static inline void slice_gradient(Trainer *t, int slice) {
    transformer_forward(&t->model, t->tokens, slice, NULL);
    transformer_loss(&t->model, t->targets, slice, true, NULL);
    transformer_backward(&t->model, t->tokens, slice, NULL);
}

/* One value of a gradient, loss or weight becomes `value`. */
static inline void poison(acc_t *values, size_t at, double value) {
    acc_t bad = (acc_t)value;
    device_from_host(values + at, &bad, sizeof bad, NULL);
}

static inline void finish_step(Trainer *t) {
    optimizer_set_rate(&t->optimizer, &t->config.train, (int)t->step, NULL);
    optimizer_step(&t->optimizer, &t->model, &t->config.train, NULL);
    transformer_update_routers(&t->model, t->optimizer.state, NULL);
    t->step++;
    transformer_set_step(&t->model, t->step, NULL);
}

static inline double train_step(Trainer *t) {
    transformer_begin_step(&t->model, t->step, NULL);
    for (int slice = 0; slice < t->model.slices; slice++) {
        read_slice(t, SPLIT_TRAIN, t->step, slice);
        slice_gradient(t, slice);
    }
    if (t->step == t->poison_step) {
        poison(t->model.grads, t->model.tensors.items[3].offset + 1, NAN);
    }
    finish_step(t);
    return (double)*t->model.step_loss;
}

/* The figures of the last step; the caller frees them. */
static inline StepFigures read_figures(const Trainer *t) {
    Readback readback = {0};
    figures_request(&readback, &t->model, &t->optimizer, NULL);
    StepFigures figures = figures_read(&readback, &t->model, &t->optimizer);
    readback_free(&readback);
    return figures;
}

/* ---- flat buffers: weights, gradients and moments in the order of the tensors */

static inline size_t flat_bytes(const Trainer *t) {
    return t->model.tensors.total * sizeof(acc_t);
}

/* A copy that the caller frees. */
static inline acc_t *copy_flat(const Trainer *t, const acc_t *values) {
    acc_t *copy = malloc(flat_bytes(t));
    assert_non_null(copy);
    host_from_device(copy, values, flat_bytes(t), NULL);
    return copy;
}

#endif
