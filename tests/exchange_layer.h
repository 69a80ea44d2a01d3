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
 *     layers_open(&layers, &shape, 1, ep, "--exchange dedup");  layer = &layers.layer[0];
 *     layer_choose(layer, step);  layer_values(layer, mode);
 *     layer_forward(&layers, layer);  layer_backward(&layers, layer);  ..layer->y, dx, dweight..
 *     layer_alone(&layers, layer);                                     ..layer->alone_y, ..
 *     layers_close(&layers);
 *
 * What all layers take turns in is overwritten with NaN before every forward and every backward. CPU alone. Read next:
 * exchange_ranks.c.
 */
#ifndef TESTS_EXCHANGE_LAYER_H
#define TESTS_EXCHANGE_LAYER_H

#include <math.h>
#include <string.h>

#include "set_options.h"

#include "../kernels/comm.h"
#include "../kernels/dispatch.h"
#include "../kernels/permute.h"
#include "../kernels/random.h"
#include "../model/exchange.h"

enum { LAYERS = 3, MOST_EXPERTS = 256, MOST_RANKS = 64, OVERWRITE_MOST = 1 << 20 };

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
    int count;
    Layer layer[LAYERS];
} Layers;

/* ---- experts */

typedef struct {
    real_t scale;
    int shift;
} Expert;

static inline Expert expert_of(const Layer *layer, int e) {
    switch (layer->mode.expert) {
        case EXPERT_RANK_SCALE: return (Expert){1 + e / layer->exchange.experts, 0};
        case EXPERT_SCALE: return (Expert){1 + e / (real_t)64, 0};
        default: return (Expert){1, e % layer->shape.H};
    }
}

/* f' */
static inline Expert transposed(Expert expert, int H) {
    return (Expert){expert.scale, (H - expert.shift) % H};
}

static inline void apply(real_t *to, Expert expert, const real_t *from, int H) {
    for (int h = 0; h < H; h++) {
        int column = h + expert.shift;
        to[h] = expert.scale * from[column < H ? column : column - H];
    }
}

static inline double dot(const real_t *a, const real_t *b, int H) {
    double sum = 0;
    for (int h = 0; h < H; h++) {
        sum += (double)a[h] * (double)b[h];
    }
    return sum;
}

/* Row r; NULL: one of zeros. */
static inline const real_t *row_at(RowSource rows, int r, int H) {
    if (!rows.entry) {
        return rows.x + (size_t)r * H;
    }
    return rows.entry[r] < 0 ? NULL : rows.x + (size_t)(rows.entry[r] / rows.K) * H;
}

/* What experts first, first + 1 .. make of the plan's rows. Rows of no entry, which nobody may read, stay as they are.
 */
static inline void experts_make(Layers *layers, const Layer *layer, RowSource rows, const Plan *plan, int first) {
    int H = layer->shape.H;
    for (int e = 0; e < plan->E; e++) {
        for (int r = plan->offset[e]; r < plan->offset[e + 1]; r++) {
            if (plan->entry[r] >= 0) {
                apply(layers->made + (size_t)r * H, expert_of(layer, first + e), row_at(rows, r, H), H);
            }
        }
    }
}

/* din = weight * f'(dy), drow_weight = <dy, f(x)>. */
static inline void experts_differentiate(Layers *layers, const Layer *layer, RowSource dy, const Plan *plan,
                                         int first) {
    int H = layer->shape.H;
    for (int e = 0; e < plan->E; e++) {
        for (int r = plan->offset[e]; r < plan->offset[e + 1]; r++) {
            if (plan->entry[r] >= 0) {
                Expert back = transposed(expert_of(layer, first + e), H);
                back.scale *= plan->row_weight[r];
                apply(layers->din + (size_t)r * H, back, row_at(dy, r, H), H);
                layers->drow_weight[r] = dot(row_at(dy, r, H), layers->made + (size_t)r * H, H);
            }
        }
    }
}

/* ---- what is chosen */

/* The experts of token n of a rank: the first of a shuffle of all. */
static inline void choose(int *expert, const Shape *s, uint64_t key, int n) {
    int deck[MOST_EXPERTS], cards = s->choice == CHOICE_SPARE ? s->E - 1 : s->E, first = n * s->E;
    for (int e = 0; e < cards; e++) {
        deck[e] = s->choice == CHOICE_LAST ? s->E - 1 - e : e;
    }
    for (int j = 0; j < s->K; j++) {
        int other = s->choice == CHOICE_LAST ? j : j + (int)random_below(key, first + j, cards - j), e = deck[other];
        deck[other] = deck[j];
        deck[j] = e;
        bool there = s->choice != CHOICE_SOME || random_uniform(key, first + j + ((uint64_t)1 << 32)) < 0.5;
        expert[j] = there ? e : -1;
    }
}

/* How many of the N tokens of a rank choose at all. */
static inline int tokens_of(const Shape *s, uint64_t key, int rank) {
    switch (s->choice) {
        case CHOICE_FEWER: return 1 + (int)random_below(key, (uint64_t)1 << 33, s->N);
        case CHOICE_FIRST: return rank == 0 ? s->N : 0;
        case CHOICE_NONE: return 0;
        default: return s->N;
    }
}

/* expert = chosen, but for what does not fit into messages of --exchange-rows: earlier entries have the place. */
static inline void drop(Layer *layer, int rank) {
    const Exchange *x = &layer->exchange;
    int entries = layer->shape.N * layer->shape.K, places = layer->config.train.exchange_rows, sent[MOST_RANKS] = {0};
    bool fixed = layer->config.train.exchange == EXCHANGE_PADDED && places > 0 && x->ranks > 1;
    for (int i = rank * entries; i < (rank + 1) * entries; i++) {
        int e = layer->chosen[i];
        bool fits = e >= 0 && (!fixed || sent[e / x->experts]++ < places);
        layer->expert[i] = fits ? e : -1;
    }
}

/* All ranks' choices, new ones in every step. */
static inline void layer_choose(Layer *layer, int64_t step) {
    const Shape *s = &layer->shape;
    int entries = s->N * s->K, me = comm_rank(GROUP_WORLD);
    layer->step = step;
    for (int rank = 0; rank < comm_ranks(GROUP_WORLD); rank++) {
        uint64_t key = random_key(s->seed + rank, RANDOM_ROUTER, step);
        int tokens = tokens_of(s, key, rank), *chosen = layer->chosen + rank * entries;
        memset(chosen, -1, entries * sizeof *chosen);
        for (int n = 0; n < tokens; n++) {
            choose(chosen + n * s->K, s, key, n);
        }
        drop(layer, rank);
    }
    memcpy(layer->plan.expert, layer->chosen + me * entries, entries * sizeof(int));
    memcpy(layer->alone.expert, layer->expert + me * entries, entries * sizeof(int));
}

/* ---- numbers */

/* The nearest number of half precision. */
static inline float half_rounded(double x) {
    if (x == 0) {
        return 0;
    }
    int exponent = ilogb(x);
    double unit = ldexp(1, (exponent < -14 ? -14 : exponent) - 10);
    return (float)(rint(x / unit) * unit);
}

static inline real_t value(ValueKind kind, uint64_t key, size_t i) {
    switch (kind) {
        case VALUES_HALF: return half_rounded(random_normal(key, i));
        case VALUES_SIGNED: return 2 * random_uniform(key, i) - 1;
        default: return (real_t)random_below(key, i, 17) - 8;
    }
}

static inline acc_t weight_value(ValueKind kind, uint64_t key, size_t i) {
    switch (kind) {
        case VALUES_HALF: return (float)random_uniform(key, i);
        case VALUES_SIGNED: return 2 * random_uniform(key, i) - 1;
        default: return (acc_t)random_below(key, i, 5) - 2;
    }
}

/* Both plans of this rank take its weights. */
static inline void layer_take_weights(Layer *layer) {
    size_t entries = (size_t)layer->shape.N * layer->shape.K;
    const acc_t *mine = layer->weight + comm_rank(GROUP_WORLD) * entries;
    memcpy(layer->plan.weight, mine, entries * sizeof *mine);
    memcpy(layer->alone.weight, mine, entries * sizeof *mine);
}

static inline void layer_values(Layer *layer, Mode mode) {
    const Shape *s = &layer->shape;
    size_t entries = (size_t)s->N * s->K, numbers = (size_t)s->N * s->H;
    uint64_t mine = s->seed + comm_rank(GROUP_WORLD);
    layer->mode = mode;
    for (int rank = 0; rank < comm_ranks(GROUP_WORLD); rank++) {
        uint64_t key = random_key(s->seed + rank, RANDOM_TEST, 0);
        for (size_t i = 0; i < entries; i++) {
            layer->weight[rank * entries + i] = weight_value(mode.values, key, i);
        }
    }
    for (size_t i = 0; i < numbers; i++) {
        layer->x[i] = value(mode.values, random_key(mine, RANDOM_TEST, 1), i);
        layer->dy[i] = value(VALUES_WHOLE, random_key(mine, RANDOM_TEST, 2), i);
        layer->before[i] = value(VALUES_WHOLE, random_key(mine, RANDOM_TEST, 3), i);
    }
    layer_take_weights(layer);
}

/* ---- forward and backward */

static inline int first_expert(const Layer *layer) {
    return comm_rank(GROUP_EXPERTS) * layer->exchange.experts;
}

/* All of a small array, the beginning of a large one: what is used of it is there. */
static inline void overwrite(void *array, int byte, size_t bytes) {
    if (array) {
        memset(array, byte, bytes < OVERWRITE_MOST ? bytes : OVERWRITE_MOST);
    }
}

/* NaN wherever layers take turns; notes of experts that nobody has. */
static inline void poison(Layers *layers) {
    const ExchangeSize *size = &layers->size;
    ExchangeScratch *wire = &layers->wire;
    size_t row = layers->H * sizeof(real_t);
    real_t *of_rows[] = {layers->rows_in, layers->made, layers->dy_in, layers->din};
    for (size_t i = 0; i < sizeof of_rows / sizeof *of_rows; i++) {
        overwrite(of_rows[i], 0xff, layers->rows * row);
    }
    overwrite(layers->drow_weight, 0xff, layers->rows * sizeof(acc_t));
    overwrite(wire->home, 0xff, size->out_rows * row);
    overwrite(wire->arrived, 0xff, size->in_rows * row);
    overwrite(wire->home_note, 0x7f, size->out_notes * sizeof(RelayNote));
    overwrite(wire->arrived_note, 0x7f, size->in_notes * sizeof(RelayNote));
    overwrite(wire->home_dweight, 0xff, size->out_notes * sizeof(acc_t));
    overwrite(wire->arrived_dweight, 0xff, size->in_notes * sizeof(acc_t));
}

static inline void layer_plan(Layers *layers, Layer *layer) {
    poison(layers);
    plan_build(&layer->plan, NULL);
    exchange_plan(&layer->exchange, &layers->wire, NULL, NULL);
}

/* y of a plan that is made. */
static inline void layer_run(Layers *layers, Layer *layer) {
    Exchange *x = &layer->exchange;
    RowSource rows = exchange_dispatch(x, &layers->wire, layers->rows_in, layer->x, true, NULL, NULL);
    memset(layer->y, 0xff, (size_t)layer->shape.N * layer->shape.H * sizeof(real_t));
    experts_make(layers, layer, rows, exchange_experts(x), first_expert(layer));
    exchange_combine(x, &layers->wire, layer->y, layers->made, NULL, NULL);
}

static inline void layer_forward(Layers *layers, Layer *layer) {
    layer_plan(layers, layer);
    layer_run(layers, layer);
}

static inline void layer_backward(Layers *layers, Layer *layer) {
    Exchange *x = &layer->exchange;
    ExchangeScratch *wire = &layers->wire;
    const Plan *plan = exchange_experts(x);
    size_t numbers = (size_t)layer->shape.N * layer->shape.H;
    poison(layers);
    RowSource dy = exchange_dispatch(x, wire, layers->dy_in, layer->dy, false, NULL, NULL);
    RowSource rows = exchange_dispatch_again(x, layers->rows_in, layer->x, NULL, NULL);
    experts_make(layers, layer, rows, plan, first_expert(layer));
    experts_differentiate(layers, layer, dy, plan, first_expert(layer));
    memcpy(layer->dx, layer->before, numbers * sizeof(real_t));
    exchange_dispatch_backward(x, wire, layer->dx, layers->din, layer->mode.accumulate, NULL, NULL);
    exchange_weight_backward(x, wire, layer->dweight, layers->drow_weight, NULL, NULL);
}

/* The same on one rank that has all experts. */
static inline void layer_alone(Layers *layers, Layer *layer) {
    Plan *plan = &layer->alone;
    int H = layer->shape.H;
    size_t numbers = (size_t)layer->shape.N * H;
    poison(layers);
    plan_build(plan, NULL);
    dispatch_copy(layers->rows_in, layer->x, plan, H, NULL);
    dispatch_copy(layers->dy_in, layer->dy, plan, H, NULL);
    experts_make(layers, layer, (RowSource){layers->rows_in, NULL, 0}, plan, 0);
    experts_differentiate(layers, layer, (RowSource){layers->dy_in, NULL, 0}, plan, 0);
    combine_forward(layer->alone_y, layers->made, plan, H, 0, NULL);
    memcpy(layer->alone_dx, layer->before, numbers * sizeof(real_t));
    dispatch_backward(layer->alone_dx, layers->din, plan, H, layer->mode.accumulate, NULL);
    plan_weight_backward(layer->alone_dweight, layers->drow_weight, plan, NULL);
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

static inline void layer_reserve(Layers *layers, Layer *layer, const Shape *s, int ep, const char *options) {
    Arena *arena = &layers->arena;
    size_t numbers = (size_t)s->N * s->H, entries = (size_t)s->N * s->K, world = comm_ranks(GROUP_WORLD);
    *layer = (Layer){.shape = *s};
    config_defaults(&layer->config);
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

/* Layers of these shapes, which have one H; options: of the exchange. After comm_form_groups(ep). */
static inline void layers_open(Layers *layers, const Shape *shapes, int count, int ep, const char *options) {
    *layers = (Layers){.count = count};
    for (int l = 0; l < count; l++) {
        layer_reserve(layers, &layers->layer[l], &shapes[l], ep, options);
    }
    real_t **of_rows[] = {&layers->rows_in, &layers->made, &layers->dy_in, &layers->din};
    for (size_t i = 0; i < sizeof of_rows / sizeof *of_rows; i++) {
        reserve(&layers->arena, of_rows[i], (size_t)layers->rows * layers->H, sizeof(real_t));
    }
    reserve(&layers->arena, &layers->drow_weight, layers->rows, sizeof(acc_t));
    exchange_reserve_scratch(&layers->wire, layers->size, layers->H, &layers->arena);
    arena_commit(&layers->arena);
}

static inline void layers_close(Layers *layers) {
    for (int l = 0; l < layers->count; l++) {
        exchange_free(&layers->layer[l].exchange);
    }
    arena_free(&layers->arena);
}

#endif
