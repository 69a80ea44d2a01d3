/* A small model whose gradient is checked against central differences, tensor by tensor.
 *
 *     loss = cross-entropy + aux-coef * mean balance loss + z-coef * mean z-loss
 *            + perft-aux-coef * mean balance loss of the adapters' routers
 *     dL/dw = (8 (L(w + d) - L(w - d)) - (L(w + 2d) - L(w - 2d))) / 12d + O(d^4)
 *
 * The fourth order is for chains without a stream beside them, where a norm may get a short vector and bend sharply.
 * Choosing experts is not differentiable, so what is tested is the gradient where it exists: weights suit when every
 * entry of every plan stays in its row under random changes of all weights at once, larger than those of the
 * differences, and no difference may be taken across a changed plan.
 *
 *     subject_open(&s, options, 0); subject_draw_suited(&s, false); objective_gradient(&s, true); tensor_error(&s, ..)
 *
 * Included by test_model_grad.c, which holds the table of models. Read next: model/transformer.c.
 */
#ifndef TESTS_MODEL_GRAD_H
#define TESTS_MODEL_GRAD_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "set_options.h"

#include "../kernels/check.h"
#include "../kernels/random.h"
#include "../model/config.h"
#include "../model/router.h"
#include "../model/transformer.h"

/* Routers that draw anew in each step draw the numbers of this one; it is past the threshold's warm-up. */
enum { SUBJECT_STEP = 5 };

static const char SUBJECT_OPTIONS[] =
    "--layers 2 --dim 12 --heads 3 --kv-heads 1 --seq 7 --vocab 11 --experts 4 --top-k 2 --expert-dim 5 --batch 3 "
    "--allow-leak 1 --threshold-warmup 2";

static const acc_t UNTOUCHED = 7; /* in the gradient of what has none */

typedef struct {
    Config config;
    Arena arena;
    Transformer model;
    int slices, slice_tokens;
    int *tokens, *targets; /* (slices * N) */
    int *choices;          /* (slices, sum over routers of 2 * N * plan.K): each plan's expert and row */
    bool keep_choices;     /* the next forwards' plans are those to hold to */
    bool choices_changed;  /* a later forward made another plan */
} Subject;

/* The i-th routed layer: those of the model, then those of adapters. NULL past the last. */
static inline const MoeLayer *routed_layer(const Transformer *model, int i) {
    if (i < model->moe_count) {
        return model->moes[i];
    }
    for (int l = 0, j = model->moe_count; l < model->config->layers; l++) {
        if (perft_is_routed(model->config, l) && j++ == i) {
            return &model->layers[l].perft.moe;
        }
    }
    return NULL;
}

static inline size_t slice_choices(const Transformer *model) {
    size_t count = 0;
    for (int i = 0; routed_layer(model, i); i++) {
        count += 2 * (size_t)model->N * routed_layer(model, i)->plan.K;
    }
    return count;
}

/* A model of SUBJECT_OPTIONS, changed by `options`. Losses that the router has and the options leave alone weigh
 * enough to be seen. */
static inline void subject_open(Subject *s, const char *options, int head_rows) {
    *s = (Subject){0};
    Config *config = &s->config;
    config_defaults(config);
    set_options(config, SUBJECT_OPTIONS);
    set_options(config, options);
    const Router *router = router_find(config->model.router);
    if (config->train.aux_coef == OPTION_AUTO) {
        config->train.aux_coef = router->has_balance_loss ? 0.3 : 0;
    }
    if (config->train.z_coef == OPTION_AUTO) {
        config->train.z_coef = router->has_z_loss ? 0.2 : 0;
    }
    config_finish(config);
    s->slices = config->train.grad_accum;
    int batch = config->train.batch / s->slices;
    s->slice_tokens = batch * config->model.seq;
    size_t bytes = (size_t)s->slices * s->slice_tokens * sizeof(int);
    transformer_reserve(&s->model, config, batch, s->slices, USE_TRAIN, NULL, &s->arena);
    arena_reserve(&s->arena, (void **)&s->tokens, bytes, MEMORY_ACTIVATIONS);
    arena_reserve(&s->arena, (void **)&s->targets, bytes, MEMORY_ACTIVATIONS);
    arena_commit(&s->arena);
    transformer_connect(&s->model);
    transformer_set_step(&s->model, SUBJECT_STEP, NULL);
    s->model.head_rows = head_rows ? head_rows : s->model.head_rows;
    s->choices = calloc(s->slices * slice_choices(&s->model) + 1, sizeof(int));
    CHECK(s->choices, "out of memory: close other programs");
}

static inline void subject_close(Subject *s) {
    free(s->choices);
    transformer_free(&s->model);
    arena_free(&s->arena);
}

/* Random text; with masked prediction two tokens of three are given and not predicted. */
static inline void subject_draw_text(Subject *s, uint64_t seed) {
    const ModelConfig *c = &s->config.model;
    uint64_t key = random_key(seed, RANDOM_TEST, 0);
    int predicted = 0;
    for (int i = 0; i < s->slices * s->slice_tokens; i++) {
        s->tokens[i] = (int)random_below(key, 2 * (uint64_t)i, (uint64_t)c->vocab);
        s->targets[i] = (int)random_below(key, 2 * (uint64_t)i + 1, (uint64_t)c->vocab);
        if (c->objective == OBJECTIVE_MLM) {
            bool masked = i % s->slice_tokens % 3 == 1;
            s->tokens[i] = masked ? c->vocab - 1 : s->tokens[i];
            s->targets[i] = masked ? s->targets[i] : -1;
        }
        predicted += s->targets[i] >= 0;
    }
    s->model.predicted = predicted / s->slices;
}

static inline bool name_ends(const char *name, const char *end) {
    size_t length = strlen(name), tail = strlen(end);
    return length >= tail && !strcmp(name + length - tail, end);
}

/* Weights large enough that routing and attention are far from uniform, none of them zero. States are what the router
 * makes of them, but a bias or a threshold is drawn so that it matters. */
static inline void subject_draw(Subject *s, uint64_t seed) {
    subject_draw_text(s, seed);
    transformer_init(&s->model, s->model.master, seed, NULL);
    for (int i = 0; i < s->model.tensors.count; i++) {
        const Tensor *t = &s->model.tensors.items[i];
        double mean = t->ndim == 1 ? 1 : 0, deviation = t->ndim == 1 ? 0.2 : 0.4;
        if (name_ends(t->name, ".scale")) {
            mean = 4; /* of cosines, which are small */
        } else if (name_ends(t->name, ".bias")) {
            mean = 0;
        } else if (name_ends(t->name, ".tau")) {
            mean = 1.0 / s->config.model.experts;
            deviation = 0.1;
        } else if (t->kind == TENSOR_STATE) {
            continue;
        }
        uint64_t key = random_key(seed, RANDOM_TEST, (uint64_t)i + 1);
        for (size_t j = 0; j < t->count; j++) {
            s->model.master[t->offset + j] = (acc_t)(mean + deviation * random_normal(key, j));
        }
    }
}

/* Keeps the plans of the forward just done, or compares them with those kept. */
static inline void look_at_choices(Subject *s, int slice) {
    int *kept = s->choices + slice * slice_choices(&s->model);
    for (int i = 0; routed_layer(&s->model, i); i++) {
        const Plan *plan = &routed_layer(&s->model, i)->plan;
        size_t entries = (size_t)plan->N * plan->K, bytes = entries * sizeof(int);
        if (plan->slots > 0) { /* nothing is chosen */
            continue;
        }
        if (s->keep_choices) {
            memcpy(kept, plan->expert, bytes);
            memcpy(kept + entries, plan->row, bytes);
        }
        s->choices_changed |= memcmp(kept, plan->expert, bytes) || memcmp(kept + entries, plan->row, bytes);
        kept += 2 * entries;
    }
}

static inline void slice_forward(Subject *s, int slice, bool gradient) {
    size_t at = (size_t)slice * s->slice_tokens;
    transformer_forward(&s->model, s->tokens + at, slice, NULL);
    transformer_loss(&s->model, s->targets + at, slice, gradient, NULL);
    look_at_choices(s, slice);
}

/* What is minimised. */
static inline double objective_value(Subject *s) {
    const Transformer *m = &s->model;
    const TrainConfig *t = &s->config.train;
    int places = s->slices * m->moe_count;
    double loss = 0;
    for (int slice = 0; slice < s->slices; slice++) {
        slice_forward(s, slice, false);
        loss += m->slice_loss[slice] / s->slices;
    }
    for (int i = 0; i < places; i++) {
        const acc_t *load = m->load + (size_t)i * LOAD_VALUES;
        loss += (t->aux_coef * load[LOAD_BALANCE] + t->z_coef * load[LOAD_Z]) / places;
    }
    for (int i = 0; m->perft_load && i < s->slices * m->config->layers; i++) {
        bool routed = perft_is_routed(m->config, i % m->config->layers);
        const acc_t *load = m->perft_load + (size_t)i * LOAD_VALUES;
        loss += routed ? t->perft_aux_coef * load[LOAD_BALANCE] / places : 0;
    }
    return loss;
}

static inline void fill(acc_t *x, size_t count, acc_t value) {
    for (size_t i = 0; i < count; i++) {
        x[i] = value;
    }
}

/* The gradient of the objective in model.grads; without the main loss, of the balance losses alone. What the first
 * slice must overwrite is NaN before. */
static inline void objective_gradient(Subject *s, bool main_loss) {
    Transformer *m = &s->model;
    fill(m->grads, m->tensors.total, UNTOUCHED);
    for (int i = 0; i < m->tensors.count; i++) {
        const Tensor *t = &m->tensors.items[i];
        if (t->kind != TENSOR_STATE) {
            fill(m->grads + t->offset, t->count, t->grad_overwritten ? (acc_t)NAN : 0);
        }
    }
    for (int slice = 0; slice < s->slices; slice++) {
        slice_forward(s, slice, main_loss);
        if (!main_loss) {
            memset(m->dn, 0, (size_t)m->N * s->config.model.dim * sizeof *m->dn);
        }
        transformer_backward(m, s->tokens + (size_t)slice * s->slice_tokens, slice, NULL);
    }
}

/* How many values outside the parameters' gradients, those of states and the gaps between tensors, were written. */
static inline size_t strays(const Subject *s) {
    const TensorList *list = &s->model.tensors;
    size_t count = 0, at = 0;
    for (int i = 0; i <= list->count; i++) {
        const Tensor *t = &list->items[i];
        size_t end = i < list->count ? t->offset : list->total;
        for (; at < end; at++) {
            count += s->model.grads[at] != UNTOUCHED;
        }
        at += i < list->count && t->kind != TENSOR_STATE ? t->count : 0;
    }
    return count;
}

/* Whether no plan changes when all weights change a little, and entries are dropped where they should be. */
static inline bool subject_suits(Subject *s, bool drops) {
    enum { CHANGES = 4 };
    const double size = 3e-5;
    Transformer *m = &s->model;
    double dropped = 0;
    s->keep_choices = true;
    objective_value(s);
    s->keep_choices = s->choices_changed = false;
    for (int i = 0; i < s->slices * m->moe_count; i++) {
        dropped += m->load[(size_t)i * LOAD_VALUES + LOAD_DROPPED];
    }
    if ((dropped > 0) != drops) {
        return false;
    }
    acc_t *drawn = malloc(m->tensors.total * sizeof *drawn);
    CHECK(drawn, "out of memory: close other programs");
    transformer_store(m, drawn);
    for (int change = 0; change < CHANGES && !s->choices_changed; change++) {
        for (int i = 0; i < m->tensors.count; i++) {
            const Tensor *t = &m->tensors.items[i];
            uint64_t key = random_key((uint64_t)change, RANDOM_TEST, 1000 + (uint64_t)i);
            for (size_t j = 0; j < t->count && t->kind != TENSOR_STATE; j++) {
                m->master[t->offset + j] = drawn[t->offset + j] + (acc_t)(size * random_normal(key, j));
            }
        }
        objective_value(s);
    }
    transformer_load(m, drawn);
    free(drawn);
    return !s->choices_changed;
}

/* False when no draw of many suits. */
static inline bool subject_draw_suited(Subject *s, bool drops) {
    for (uint64_t seed = 1; seed < 500; seed++) {
        subject_draw(s, seed);
        if (subject_suits(s, drops)) {
            return true;
        }
    }
    return false;
}

static inline double tensor_norm(const Subject *s, const Tensor *t) {
    double sum = 0;
    for (size_t i = 0; i < t->count; i++) {
        double g = (double)s->model.grads[t->offset + i];
        sum += g * g;
    }
    return sqrt(sum);
}

/* The objective with *w changed by d. */
static inline double objective_beside(Subject *s, acc_t *w, double d) {
    acc_t before = *w;
    *w = before + (acc_t)d;
    double value = objective_value(s);
    *w = before;
    return value;
}

static inline double central_difference(Subject *s, acc_t *w) {
    const double d = 1e-5;
    double near = objective_beside(s, w, d) - objective_beside(s, w, -d);
    double far = objective_beside(s, w, 2 * d) - objective_beside(s, w, -2 * d);
    return (8 * near - far) / (12 * d);
}

/* Relative error of a tensor's gradient, in norm, over all elements or `sample` random ones where there are more:
 * against their own norm, or what would be their share of the tensor's. *norm: of the whole. s->choices_changed tells
 * whether a difference crossed a change of plan. */
static inline double tensor_error(Subject *s, const Tensor *t, size_t sample, double *norm) {
    size_t elements = sample < t->count ? sample : t->count;
    uint64_t key = random_key(9, RANDOM_TEST, t->offset);
    double wrong = 0, differences = 0, gradients = 0;
    for (size_t i = 0; i < elements; i++) {
        size_t at = t->offset + (elements < t->count ? random_below(key, i, t->count) : i);
        double difference = central_difference(s, &s->model.master[at]), gradient = (double)s->model.grads[at];
        wrong += (difference - gradient) * (difference - gradient);
        differences += difference * difference;
        gradients += gradient * gradient;
    }
    *norm = tensor_norm(s, t);
    double share = *norm * *norm * (double)elements / (double)t->count;
    return sqrt(wrong / fmax(share, fmax(differences, gradients)));
}

#endif
