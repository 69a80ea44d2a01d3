/* A layer whose experts are simple enough to know what must come out, for tests of model/exchange.h.
 *
 * An expert turns a row round by `shift` columns and multiplies it by `scale`. So what it makes of a row tells which
 * expert it was, and both its output and its gradients are known in closed form:
 *
 *     (f_e x)[h] = scale_e x[(h + shift_e) mod H]          (f_e' g)[h] = scale_e g[(h - shift_e) mod H]
 *
 * What every rank's tokens choose is a function of the seed and the rank, so each rank knows all ranks' choices without
 * asking. Two things are computed of a layer, by the same functions: what the exchange makes of it, and what one rank
 * makes of it by itself with plain dispatch and combine (`alone`), on a plan that lacks what a fixed size of messages
 * drops.
 *
 *     layers_open(&layers, &shape, &options, 1, ep, &way);  layer = &layers.layer[0];
 *     layer_choose(layer, step);  layer_values(layer, mode);
 *     layer_forward(&layers, layer);  layer_backward(&layers, layer);  ..layer->y, dx, dweight..
 *     layer_alone(&layers, layer);                                     ..layer->alone_y, ..
 *     layers_close(&layers);
 *
 * What all layers take turns in is overwritten with NaN before every forward and every backward, unless `as_left`: then
 * nobody waits for the others but in the exchange. CPU alone. Read next: exchange_tokens.h, exchange_passes.h.
 */
#ifndef TESTS_EXCHANGE_LAYER_H
#define TESTS_EXCHANGE_LAYER_H

#include "set_options.h"

#include "../kernels/comm.h"
#include "../kernels/permute.h"
#include "../model/exchange.h"

enum { LAYERS = 3, MOST_EXPERTS = 256, MOST_RANKS = 64 };

/* Legs of the wire: rows of the forward both ways, rows of the backward both ways. */
typedef enum { FORWARD, BACKWARD } Leg;

/* A way of exchange: what of it decides what must come out and how much travels. */
typedef struct {
    const char *options;
    bool row_per_rank; /* a row carries all that a token wants of a rank; else each choice has a row */
    bool fixed;        /* messages are of one size, --exchange-rows if given: what does not fit is dropped */
    bool messages;     /* rows are sent; else stored where they are for, which nobody counts */
    int parts;         /* --exchange-chunks; 0: not in parts */
    bool by_choice;    /* what comes back as it is stored is a row for each choice all the same */
} Way;

/* Which experts a token may choose, and which tokens choose. */
typedef enum {
    CHOICE_FEWER, /* any; 1 to N tokens of each rank, the rest is without entries */
    CHOICE_ALL,   /* any, all tokens */
    CHOICE_LAST,  /* the last K experts: with K = 1 one expert, with K = E / ranks one rank */
    CHOICE_SPARE, /* any but the last expert */
    CHOICE_SOME,  /* any of E = K with probability 1/2: as where experts choose */
    CHOICE_FIRST, /* any; tokens of rank 0 alone */
    CHOICE_NONE,
} Choice;

typedef struct {
    int E, K, H, N; /* N: tokens of a rank */
    uint64_t seed;
    Choice choice;
} Shape;

typedef enum { EXPERT_RANK_SCALE, EXPERT_SCALE, EXPERT_ROTATION } ExpertKind;
typedef enum {
    VALUES_HALF,   /* as the benchmark has them: rows N(0,1) of half precision, weights uniform in [0,1) */
    VALUES_SIGNED, /* rows and weights uniform in [-1,1): terms cancel */
    VALUES_WHOLE,  /* whole numbers: sums are exact in any order */
} ValueKind;

typedef struct {
    const char *name;
    ExpertKind expert;
    ValueKind values;
    int accumulate; /* of dx */
} Mode;

typedef struct {
    Shape shape;
    Config config;
    const Way *way;
    Mode mode;
    int64_t step;
    int *chosen;   /* (world, N, K) expert of every rank's entries, -1: none */
    int *expert;   /* likewise, -1 also where a message was full */
    acc_t *weight; /* likewise */
    Plan plan, alone;
    Exchange exchange;
    real_t *x, *dy, *y, *dx, *before; /* (N,H); before: what dx holds where it is added to */
    acc_t *dweight;                   /* (N,K) */
    real_t *alone_y, *alone_dx;
    acc_t *alone_dweight;
} Layer;

typedef struct {
    Arena arena;
    ExchangeScratch wire;
    ExchangeSize size;
    int rows, H;                          /* of the arrays below */
    real_t *rows_in, *made, *dy_in, *din; /* (rows, H) what experts read, made, read of dy, and their dx */
    acc_t *drow_weight;                   /* (rows) */
    void *packed;                         /* (rows) as the wire packs them, for `alone` */
    bool as_left;                         /* whether buffers stay as the layer before left them */
    int count;
    Layer layer[LAYERS];
} Layers;

/* What rows are on the wire: what was asked for, and not what model/exchange.h keeps. */
static inline WireType wire_on(const Layer *layer, Leg leg) {
    const TrainConfig *asked = &layer->config.train;
    return comm_ranks(GROUP_EXPERTS) == 1 ? WIRE_SAME : leg == FORWARD ? asked->wire : asked->wire_back;
}

/* ---- memory */

static inline void reserve(Arena *arena, void *slot, size_t count, size_t size) {
    arena_reserve(arena, slot, count * size, MEMORY_ACTIVATIONS);
}

static inline void plan_reserve(Plan *plan, const Shape *s, Arena *arena) {
    int entries = s->N * s->K;
    *plan = (Plan){.N = s->N, .E = s->E, .K = s->K, .rows = plan_rows(s->N, s->E, s->K, 0, LAYOUT_COMPACT)};
    reserve(arena, &plan->expert, entries, sizeof(int));
    reserve(arena, &plan->weight, entries, sizeof(acc_t));
    reserve(arena, &plan->row, entries, sizeof(int));
    reserve(arena, &plan->entry, plan->rows, sizeof(int));
    reserve(arena, &plan->row_weight, plan->rows, sizeof(acc_t));
    reserve(arena, &plan->demand, s->E, sizeof(int));
    reserve(arena, &plan->count, s->E, sizeof(int));
    reserve(arena, &plan->offset, s->E + 1, sizeof(int));
}

static inline void layer_reserve(Layers *layers, Layer *layer, const Shape *s, const char *options, int ep,
                                 const Way *way) {
    Arena *arena = &layers->arena;
    size_t numbers = (size_t)s->N * s->H, entries = (size_t)s->N * s->K, world = comm_ranks(GROUP_WORLD);
    *layer = (Layer){.shape = *s, .way = way};
    config_defaults(&layer->config);
    set_options(&layer->config, way->options);
    set_options(&layer->config, options);
    layer->config.model.dim = s->H;
    layer->config.model.experts = s->E;
    layer->config.model.top_k = s->K;
    layer->config.train.ep = ep;
    plan_reserve(&layer->plan, s, arena);
    plan_reserve(&layer->alone, s, arena);
    int rows = exchange_reserve(&layer->exchange, &layer->plan, layer->plan.rows, &layer->config,
                                (int)(layer - layers->layer), &layer->step, &layers->size, arena);
    layers->rows = rows > layers->rows ? rows : layers->rows;
    layers->rows = layer->alone.rows > layers->rows ? layer->alone.rows : layers->rows;
    layers->H = s->H;
    reserve(arena, &layer->chosen, world * entries, sizeof(int));
    reserve(arena, &layer->expert, world * entries, sizeof(int));
    reserve(arena, &layer->weight, world * entries, sizeof(acc_t));
    real_t **of_tokens[] = {&layer->x,  &layer->dy,      &layer->y,       &layer->before,
                            &layer->dx, &layer->alone_y, &layer->alone_dx};
    for (size_t i = 0; i < sizeof of_tokens / sizeof *of_tokens; i++) {
        reserve(arena, of_tokens[i], numbers, sizeof(real_t));
    }
    reserve(arena, &layer->dweight, entries, sizeof(acc_t));
    reserve(arena, &layer->alone_dweight, entries, sizeof(acc_t));
}

/* Layers of these shapes, which have one H, with more options for each. After comm_form_groups(ep). */
static inline void layers_open(Layers *layers, const Shape *shapes, const char *const *options, int count, int ep,
                               const Way *way) {
    *layers = (Layers){.count = count};
    for (int l = 0; l < count; l++) {
        layer_reserve(layers, &layers->layer[l], &shapes[l], options[l], ep, way);
    }
    real_t **of_rows[] = {&layers->rows_in, &layers->made, &layers->dy_in, &layers->din};
    for (size_t i = 0; i < sizeof of_rows / sizeof *of_rows; i++) {
        reserve(&layers->arena, of_rows[i], (size_t)layers->rows * layers->H, sizeof(real_t));
    }
    reserve(&layers->arena, &layers->drow_weight, layers->rows, sizeof(acc_t));
    reserve(&layers->arena, &layers->packed, layers->rows, wire_row_bytes(WIRE_FP32, layers->H));
    exchange_reserve_scratch(&layers->wire, layers->size, layers->H, &layers->arena);
    arena_commit(&layers->arena);
    exchange_open(&layers->layer[0].config, &layers->arena);
}

static inline void layers_close(Layers *layers) {
    exchange_close();
    for (int l = 0; l < layers->count; l++) {
        exchange_free(&layers->layer[l].exchange);
    }
    arena_free(&layers->arena);
}

#endif
