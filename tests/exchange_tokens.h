/* What the tokens of a layer choose and hold, as functions of the seed and the rank: each rank knows all ranks' choices
 * without asking. Called by exchange_ranks.c. Read next: exchange_passes.h.
 */
#ifndef TESTS_EXCHANGE_TOKENS_H
#define TESTS_EXCHANGE_TOKENS_H

#include <math.h>
#include <string.h>

#include "exchange_layer.h"

#include "../kernels/random.h"

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

#endif
