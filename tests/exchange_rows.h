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

/* Row r is that of the entry, with its weight, as far as the wire is wide enough for tags. */
static inline void check_row(const Layer *layer, const Plan *plan, const real_t *row, int r, int rank, int entry) {
    const Shape *s = &layer->shape;
    acc_t weight = layer->weight[(size_t)rank * s->N * s->K + entry];
    EXPECT(plan->entry[r] >= 0, "row %d is padding, expected token %d of rank %d", r, entry / s->K, rank);
    EXPECT(plan->row_weight[r] == weight, "row %d has weight %g, expected %g", r, (double)plan->row_weight[r],
           (double)weight);
    bool whole = wire_on(layer, FORWARD) <= WIRE_FP32;
    for (int h = 0; h < s->H && whole; h++) {
        EXPECT(row[h] == tag(s, rank, entry / s->K, h), "row %d, column %d has %g, expected token %d of rank %d", r, h,
               (double)row[h], entry / s->K, rank);
    }
}

/* Where the tokens of a part begin: as many in each, but for one. All of them where nothing travels. */
static inline int first_token(const Layer *layer, int part) {
    return layer->shape.N * part / layer->exchange.parts;
}

/* Expert e's rows of a part, here its i-th: the entries of all ranks that chose it, by rank and token, then zeros. */
static inline void check_rows_of_expert(const Layer *layer, int part, RowSource rows, int i, int e) {
    const Plan *plan = exchange_experts(&layer->exchange, part);
    int K = layer->shape.K, entries = layer->shape.N * K, H = layer->shape.H, r = plan->offset[i];
    int first = comm_rank(GROUP_WORLD) - comm_rank(GROUP_EXPERTS), ranks = layer->exchange.ranks;
    for (int rank = first; rank < first + ranks; rank++) {
        for (int entry = first_token(layer, part) * K; entry < first_token(layer, part + 1) * K; entry++) {
            if (layer->expert[rank * entries + entry] == e) {
                EXPECT(r < plan->offset[i + 1], "expert %d has too few rows", e);
                check_row(layer, plan, row_at(rows, r, H), r, rank, entry);
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

/* What leaves a rank for another in one part. */
static inline void check_sent_rows(const Layer *layer, int p, int to) {
    const Plan *out = &layer->exchange.part[p].out;
    int expected = rows_of_tokens(layer, comm_rank(GROUP_WORLD), to, first_token(layer, p), first_token(layer, p + 1));
    int rows = 0;
    for (int r = out->offset[to]; r < out->offset[to + 1]; r++) {
        rows += out->entry[r] >= 0;
    }
    EXPECT(rows == expected, "part %d has %d rows for rank %d, expected %d", p, rows, to, expected);
}

/* What this rank sends, and what it has to drop: rows. */
static inline void check_sent(const Layer *layer) {
    const Exchange *x = &layer->exchange;
    const Plan *measured = exchange_measured(x);
    int entries = layer->shape.N * layer->shape.K, me = comm_rank(GROUP_WORLD), dropped = 0, counted = 0;
    for (int i = me * entries; i < (me + 1) * entries; i++) {
        dropped += layer->chosen[i] != layer->expert[i] && leader(layer, i) == i;
    }
    for (int e = 0; e < measured->E; e++) {
        counted += measured->demand[e] - measured->count[e];
    }
    EXPECT(counted == dropped, "%d rows are counted as dropped, expected %d", counted, dropped);
    for (int p = 0; exchange_travels(x) && p < x->parts; p++) {
        for (int rank = 0; rank < x->ranks; rank++) {
            check_sent_rows(layer, p, rank);
        }
    }
}

/* ---- how much travels */

/* Of a row on the wire. */
static inline size_t bytes_of_row(const Layer *layer, Leg leg) {
    static const size_t number[] = {sizeof(real_t), 4, 2, 2, 1};
    WireType type = wire_on(layer, leg);
    size_t bytes = number[type] * layer->shape.H + (type == WIRE_FP8 ? sizeof(float) : 0);
    return type == WIRE_SAME ? bytes : (bytes + 15) / 16 * 16;
}

/* Since `before` rows went to the other ranks' experts, or back to where they came from, in so many calls for each
 * part. */
static inline void check_traffic(const Layer *layer, const char *what, CommCount before, bool back, size_t row_bytes,
                                 int calls) {
    CommCount now = comm_count();
    int ranks = layer->exchange.ranks, me = comm_rank(GROUP_EXPERTS), first = comm_rank(GROUP_WORLD) - me, rows = 0;
    for (int rank = 0; rank < ranks; rank++) {
        int there = layer->way->fixed ? message_places(layer)
                    : back            ? rows_between(layer, first + rank, me)
                                      : rows_between(layer, first + me, rank);
        rows += rank == me ? 0 : there;
    }
    bool sends = ranks > 1 && layer->way->messages;
    long long bytes = sends ? (long long)(rows * row_bytes) : 0, sent = now.bytes - before.bytes;
    calls *= sends ? layer->exchange.parts : 0;
    EXPECT(now.calls - before.calls == calls, "%s takes %d calls, expected %d", what, (int)(now.calls - before.calls),
           calls);
    EXPECT(sent == bytes, "%s sends %lld bytes, expected %lld", what, sent, bytes);
}

/* Forward and backward move rows, and the gate's gradient, and nothing else. */
static inline void check_transfers(Layers *layers, Layer *layer) {
    Exchange *x = &layer->exchange;
    ExchangeScratch *wire = &layers->wire;
    size_t forward = bytes_of_row(layer, FORWARD), backward = bytes_of_row(layer, BACKWARD);
    size_t of_weights = (layer->way->row_per_rank ? layer->shape.K : 1) * sizeof(acc_t);
    CommCount before = comm_count();
    exchange_dispatch_begin(x, wire, layer->x, true, NULL, NULL);
    check_traffic(layer, "dispatch", before, false, forward, 1);
    before = comm_count();
    for (int p = 0; p < x->parts; p++) {
        RowSource rows = exchange_dispatch(x, p, wire, layers->rows_in, layer->x, true, NULL, NULL);
        experts_make(layers, layer, rows, exchange_experts(x, p), first_expert(layer));
        exchange_combine(x, p, wire, layer->y, layers->made, NULL, NULL);
    }
    exchange_combine_end(x, wire, layer->y, NULL, NULL);
    check_traffic(layer, "combine", before, true, forward, 1);
    before = comm_count();
    exchange_dispatch_begin(x, wire, layer->dy, false, NULL, NULL);
    check_traffic(layer, "combine's backward", before, false, backward, 1);
    before = comm_count();
    for (int p = 0; p < x->parts; p++) {
        RowSource dy = exchange_dispatch(x, p, wire, layers->dy_in, layer->dy, false, NULL, NULL);
        experts_make(layers, layer, dy, exchange_experts(x, p), first_expert(layer));
        experts_differentiate(layers, layer, dy, exchange_experts(x, p), first_expert(layer));
        exchange_backward(x, p, wire, layer->dx, layer->dweight, layers->din, layers->drow_weight, 0, NULL, NULL);
    }
    exchange_backward_end(x, wire, layer->dx, layer->dweight, 0, NULL, NULL);
    check_traffic(layer, "dispatch's backward", before, true, backward + of_weights, 2);
}

/* What is said about the rows takes one call for the counts, and with messages one for each part. */
static inline void check_planning(Layers *layers, Layer *layer) {
    const Exchange *x = &layer->exchange;
    int world = comm_ranks(GROUP_WORLD);
    poison(layers, layer);
    plan_build(&layer->plan, NULL);
    CommCount before = comm_count();
    exchange_plan(&layer->exchange, &layers->wire, NULL, NULL);
    int calls = (int)(comm_count().calls - before.calls), expected = world > 1;
    if (layer->way->messages) {
        expected += exchange_travels(x) ? x->parts : 0;
    } else if (world == x->ranks) {
        expected = 0;
    }
    EXPECT(calls == expected, "the plan takes %d calls, expected %d", calls, expected);
}

static inline void check_dispatch(Layers *layers, Layer *layer, Mode mode) {
    Exchange *x = &layer->exchange;
    layer_values(layer, mode);
    fill_tags(layer);
    check_planning(layers, layer);
    exchange_dispatch_begin(x, &layers->wire, layer->x, true, NULL, NULL);
    for (int p = 0; p < x->parts; p++) {
        RowSource rows = exchange_dispatch(x, p, &layers->wire, layers->rows_in, layer->x, true, NULL, NULL);
        for (int i = 0; i < x->experts; i++) {
            check_rows_of_expert(layer, p, rows, i, first_expert(layer) + i);
        }
        EXPECT(exchange_experts(x, p)->E == layer->shape.E / x->ranks, "%d experts are here, expected %d",
               exchange_experts(x, p)->E, layer->shape.E / x->ranks);
    }
    check_demand(layer);
    check_sent(layer);
    check_transfers(layers, layer);
}

#endif
