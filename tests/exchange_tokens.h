/* What the tokens of a layer choose and hold, as functions of the seed and the rank: each rank knows all ranks' choices
 * without asking. Called by exchange_ranks.c. Read next: exchange_passes.h.
 */
#ifndef TESTS_EXCHANGE_TOKENS_H
#define TESTS_EXCHANGE_TOKENS_H

#include <math.h>
#include <string.h>

#include "exchange_layer.h"

#include "../kernels/random.h"

enum { LARGEST_WHOLE = 7, LARGEST_WEIGHT = 2, SIZES = 4 }; /* of whole numbers; see fill_rows */

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

/* The first entry of i's token that is for the same rank, where a row carries all of them; else i. */
static inline int leader(const Layer *layer, int i) {
    int first = i / layer->shape.K * layer->shape.K, experts = layer->exchange.experts;
    const int *chosen = layer->chosen;
    while (layer->way->row_per_rank && first < i &&
           (chosen[first] < 0 || chosen[first] / experts != chosen[i] / experts)) {
        first++;
    }
    return layer->way->row_per_rank ? first : i;
}

/* Rows of a message to one rank at most: --exchange-rows, or as many as a rank's tokens may want of it. */
static inline int message_places(const Layer *layer) {
    const Shape *s = &layer->shape;
    int asked = layer->config.train.exchange_rows, experts = layer->exchange.experts;
    int most = s->N * (layer->way->row_per_rank ? 1 : s->K < experts ? s->K : experts);
    return layer->way->fixed && asked > 0 && asked < most ? asked : most;
}

/* expert = chosen, but for what has no place in a message: earlier rows have it. */
static inline void drop(Layer *layer, int rank) {
    const Exchange *x = &layer->exchange;
    int entries = layer->shape.N * layer->shape.K, places = message_places(layer), sent[MOST_RANKS] = {0};
    for (int i = rank * entries; i < (rank + 1) * entries; i++) {
        int e = layer->chosen[i], lead = leader(layer, i);
        bool fits = e >= 0;
        if (fits && x->ranks > 1) {
            fits = lead < i ? layer->expert[lead] >= 0 : sent[e / x->experts]++ < places;
        }
        layer->expert[i] = fits ? e : -1;
    }
}

/* Rows of the tokens first .. end-1 that one rank of the world has for one of its group. */
static inline int rows_of_tokens(const Layer *layer, int from, int to, int first, int end) {
    int K = layer->shape.K, token = from * layer->shape.N, rows = 0;
    for (int i = (token + first) * K; i < (token + end) * K; i++) {
        rows += layer->expert[i] >= 0 && layer->expert[i] / layer->exchange.experts == to && leader(layer, i) == i;
    }
    return rows;
}

static inline int rows_between(const Layer *layer, int from, int to) {
    return rows_of_tokens(layer, from, to, 0, layer->shape.N);
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
        default: return (real_t)random_below(key, i, 2 * LARGEST_WHOLE + 1) - LARGEST_WHOLE;
    }
}

static inline acc_t weight_value(ValueKind kind, uint64_t key, size_t i) {
    switch (kind) {
        case VALUES_HALF: return (float)random_uniform(key, i);
        case VALUES_SIGNED: return 2 * random_uniform(key, i) - 1;
        default: return (acc_t)random_below(key, i, 2 * LARGEST_WEIGHT + 1) - LARGEST_WEIGHT;
    }
}

/* Rows of numbers, but for the benchmark's in `sizes` sizes, powers of two, so that a row's scale is not another's. In
 * each row of whole numbers one is the largest there can be: then the scale of fp8, that / 448, is a power of two. */
static inline void fill_rows(real_t *rows, ValueKind kind, uint64_t key, int count, int H, int sizes) {
    for (int r = 0; r < count; r++) {
        real_t *row = rows + (size_t)r * H, size = 1 << (r + comm_rank(GROUP_WORLD)) % sizes;
        for (int h = 0; h < H; h++) {
            row[h] = value(kind, key, (size_t)r * H + h);
        }
        if (kind == VALUES_WHOLE) {
            row[r % H] = row[r % H] < 0 ? -LARGEST_WHOLE : LARGEST_WHOLE;
        }
        for (int h = 0; h < H && kind != VALUES_HALF; h++) {
            row[h] *= size;
        }
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
    size_t entries = (size_t)s->N * s->K;
    uint64_t mine = s->seed + comm_rank(GROUP_WORLD);
    ValueKind gradients = mode.values == VALUES_WHOLE ? VALUES_WHOLE : VALUES_SIGNED;
    layer->mode = mode;
    for (int rank = 0; rank < comm_ranks(GROUP_WORLD); rank++) {
        uint64_t key = random_key(s->seed + rank, RANDOM_TEST, 0);
        for (size_t i = 0; i < entries; i++) {
            layer->weight[rank * entries + i] = weight_value(mode.values, key, i);
        }
    }
    fill_rows(layer->x, mode.values, random_key(mine, RANDOM_TEST, 1), s->N, s->H, SIZES);
    fill_rows(layer->dy, gradients, random_key(mine, RANDOM_TEST, 2), s->N, s->H, SIZES);
    fill_rows(layer->before, VALUES_WHOLE, random_key(mine, RANDOM_TEST, 3), s->N, s->H, 1);
    layer_take_weights(layer);
}

#endif
