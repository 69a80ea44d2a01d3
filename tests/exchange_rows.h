/* Where rows are after a dispatch, how many travel, and how many bytes. */
#ifndef TESTS_EXCHANGE_ROWS_H
#define TESTS_EXCHANGE_ROWS_H

#include "exchange_expect.h"
#include "exchange_passes.h"
#include "exchange_tokens.h"

/* A number for every element that any rank dispatches, in float exact. */
static inline real_t tag(const Shape *s, int rank, int n, int h) {
    return ((size_t)rank * s->N + n) * s->H + h + 1;
}

static inline void fill_tags(Layer *layer) {
    const Shape *s = &layer->shape;
    for (int i = 0; i < s->N * s->H; i++) {
        layer->x[i] = tag(s, comm_rank(GROUP_WORLD), i / s->H, i % s->H);
    }
}

/* Row r is that of the entry, with its weight. */
static inline void check_row(const Layer *layer, const real_t *row, int r, int rank, int entry) {
    const Shape *s = &layer->shape;
    const Plan *plan = exchange_experts(&layer->exchange);
    acc_t weight = layer->weight[(size_t)rank * s->N * s->K + entry];
    EXPECT(plan->entry[r] >= 0, "row %d is padding, expected token %d of rank %d", r, entry / s->K, rank);
    EXPECT(plan->row_weight[r] == weight, "row %d has weight %g, expected %g", r, (double)plan->row_weight[r],
           (double)weight);
    for (int h = 0; h < s->H; h++) {
        EXPECT(row[h] == tag(s, rank, entry / s->K, h), "row %d, column %d has %g, expected token %d of rank %d", r, h,
               (double)row[h], entry / s->K, rank);
    }
}

/* Expert e's rows, here its i-th: the entries of all ranks that chose it, by rank and token, then zeros. */
static inline void check_rows_of_expert(const Layer *layer, RowSource rows, int i, int e) {
    const Plan *plan = exchange_experts(&layer->exchange);
    int entries = layer->shape.N * layer->shape.K, H = layer->shape.H, r = plan->offset[i];
    int first = comm_rank(GROUP_WORLD) - comm_rank(GROUP_EXPERTS), ranks = layer->exchange.ranks;
    for (int rank = first; rank < first + ranks; rank++) {
        for (int entry = 0; entry < entries; entry++) {
            if (layer->expert[rank * entries + entry] == e) {
                EXPECT(r < plan->offset[i + 1], "expert %d has too few rows", e);
                check_row(layer, row_at(rows, r, H), r, rank, entry);
                r++;
            }
        }
    }
    EXPECT(plan->count[i] == r - plan->offset[i], "expert %d counts %d entries, expected %d", e, plan->count[i],
           r - plan->offset[i]);
    for (; r < plan->offset[i + 1]; r++) {
        const real_t *row = row_at(rows, r, H);
        EXPECT(plan->entry[r] < 0 && plan->row_weight[r] == 0, "row %d of expert %d is not padding", r, e);
        EXPECT(!row || dot(row, row, H) == 0, "padding row %d of expert %d is not zero", r, e);
    }
}

/* demand: all ranks' entries, also those that were dropped. */
static inline void check_demand(const Layer *layer) {
    const Shape *s = &layer->shape;
    int all = comm_ranks(GROUP_WORLD) * s->N * s->K;
    for (int e = 0; e < s->E; e++) {
        int demand = 0;
        for (int i = 0; i < all; i++) {
            demand += layer->chosen[i] == e;
        }
        EXPECT(layer->exchange.demand[e] == demand, "demand of expert %d is %d, expected %d", e,
               layer->exchange.demand[e], demand);
    }
}

/* Rows that this rank sends to a rank of the group: one for an entry, or for a token. */
static inline int rows_for(const Layer *layer, int rank) {
    const Shape *s = &layer->shape;
    const int *expert = layer->expert + (size_t)comm_rank(GROUP_WORLD) * s->N * s->K;
    int rows = 0;
    for (int n = 0; n < s->N; n++) {
        int entries = 0;
        for (int j = 0; j < s->K; j++) {
            int e = expert[n * s->K + j];
            entries += e >= 0 && e / layer->exchange.experts == rank;
        }
        rows += layer->exchange.way == EXCHANGE_DEDUP ? entries > 0 : entries;
    }
    return rows;
}

/* What this rank sends, and what it has to drop. */
static inline void check_sent(const Layer *layer) {
    const Exchange *x = &layer->exchange;
    const Plan *measured = exchange_measured(x);
    int entries = layer->shape.N * layer->shape.K, me = comm_rank(GROUP_WORLD), dropped = 0, counted = 0;
    for (int i = me * entries; i < (me + 1) * entries; i++) {
        dropped += layer->chosen[i] != layer->expert[i];
    }
    for (int e = 0; e < measured->E; e++) {
        counted += measured->demand[e] - measured->count[e];
    }
    EXPECT(counted == dropped, "%d entries are counted as dropped, expected %d", counted, dropped);
    for (int rank = 0; exchange_travels(x) && rank < x->ranks; rank++) {
        EXPECT(x->out.count[rank] == rows_for(layer, rank), "%d rows for rank %d, expected %d", x->out.count[rank],
               rank, rows_for(layer, rank));
    }
}

/* Rows that went to other ranks since `before`, in one call. */
static inline void check_traffic(const Layer *layer, const char *what, CommCount before, const int *first) {
    CommCount now = comm_count();
    int ranks = layer->exchange.ranks, me = comm_rank(GROUP_EXPERTS), rows = 0;
    for (int rank = 0; ranks > 1 && rank < ranks; rank++) {
        rows += rank == me ? 0 : first[rank + 1] - first[rank];
    }
    long long bytes = (long long)rows * layer->shape.H * sizeof(real_t), sent = now.bytes - before.bytes;
    EXPECT(now.calls - before.calls == (ranks > 1), "%s takes %d calls", what, (int)(now.calls - before.calls));
    EXPECT(sent == bytes, "%s sends %lld bytes, expected %lld", what, sent, bytes);
}

/* A dispatch and a combine move rows and nothing else. */
static inline void check_transfers(Layers *layers, Layer *layer) {
    Exchange *x = &layer->exchange;
    CommCount before = comm_count();
    RowSource rows = exchange_dispatch(x, &layers->wire, layers->rows_in, layer->x, true, NULL, NULL);
    check_traffic(layer, "dispatch", before, x->send);
    experts_make(layers, layer, rows, exchange_experts(x), first_expert(layer));
    before = comm_count();
    exchange_combine(x, &layers->wire, layer->y, layers->made, NULL, NULL);
    check_traffic(layer, "combine", before, x->receive);
}

static inline void check_dispatch(Layers *layers, Layer *layer, Mode mode) {
    layer_values(layer, mode);
    fill_tags(layer);
    layer_plan(layers, layer);
    Exchange *x = &layer->exchange;
    RowSource rows = exchange_dispatch(x, &layers->wire, layers->rows_in, layer->x, true, NULL, NULL);
    for (int i = 0; i < x->experts; i++) {
        check_rows_of_expert(layer, rows, i, first_expert(layer) + i);
    }
    EXPECT(exchange_experts(x)->E == layer->shape.E / x->ranks, "%d experts are here, expected %d",
           exchange_experts(x)->E, layer->shape.E / x->ranks);
    check_demand(layer);
    check_sent(layer);
    check_transfers(layers, layer);
}

#endif
