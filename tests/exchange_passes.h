/* A layer's experts, its forward and its backward: by way of the exchange, and on one rank alone. Called by
 * exchange_ranks.c. Read next: exchange_expected.h.
 */
#ifndef TESTS_EXCHANGE_PASSES_H
#define TESTS_EXCHANGE_PASSES_H

#include <string.h>

#include "exchange_layer.h"

#include "../kernels/dispatch.h"
#include "../kernels/permute.h"

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

/* ---- forward and backward */

static inline int first_expert(const Layer *layer) {
    return comm_rank(GROUP_EXPERTS) * layer->exchange.experts;
}

enum { OVERWRITE_MOST = 1 << 16 };

/* All of a small array, the beginning of a large one: what is used of it is there. */
static inline void overwrite(void *array, int byte, size_t bytes) {
    if (array) {
        memset(array, byte, bytes < OVERWRITE_MOST ? bytes : OVERWRITE_MOST);
    }
}

/* NaN where the rows of parts take turns. */
static inline void poison_experts(Layers *layers) {
    real_t *of_rows[] = {layers->rows_in, layers->made, layers->dy_in, layers->din};
    for (size_t i = 0; i < sizeof of_rows / sizeof *of_rows; i++) {
        overwrite(of_rows[i], 0xff, (size_t)layers->rows * layers->H * sizeof(real_t));
    }
    overwrite(layers->drow_weight, 0xff, layers->rows * sizeof(acc_t));
}

/* NaN wherever layers take turns; notes of experts that nobody has. Before the first of the others stores anything
 * there, all have done so. */
static inline void poison_scratch(Layers *layers) {
    const ExchangeSize *size = &layers->size;
    ExchangeScratch *wire = &layers->wire;
    size_t row = layers->H * sizeof(real_t);
    poison_experts(layers);
    overwrite(wire->home, 0xff, size->home_rows * row);
    overwrite(wire->arrived, 0xff, size->in_rows * row);
    overwrite(wire->made, 0xff, size->in_rows * row);
    overwrite(wire->home_wire, 0xff, size->home_rows * size->row_bytes);
    overwrite(wire->arrived_wire, 0xff, size->in_rows * size->row_bytes);
    overwrite(wire->home_note, 0x7f, size->out_notes * sizeof(RelayNote));
    overwrite(wire->arrived_note, 0x7f, size->in_notes * sizeof(RelayNote));
    overwrite(wire->home_dweight, 0xff, size->out_notes * sizeof(acc_t));
    overwrite(wire->arrived_dweight, 0xff, size->in_notes * sizeof(acc_t));
    comm_barrier();
}

/* The same before a forward, which also replaces what it kept for its backward. */
static inline void poison(Layers *layers, Layer *layer) {
    const Exchange *x = &layer->exchange;
    const ExchangePart *last = &x->part[x->parts - 1];
    overwrite(x->kept, 0xff, (last->in_row + last->in.N) * x->C * sizeof(real_t));
    poison_scratch(layers);
}

static inline void layer_plan(Layers *layers, Layer *layer) {
    if (!layers->as_left) {
        poison(layers, layer);
    }
    plan_build(&layer->plan, NULL);
    exchange_plan(&layer->exchange, &layers->wire, NULL, NULL);
}

/* y of a plan that is made. */
static inline void layer_run(Layers *layers, Layer *layer) {
    Exchange *x = &layer->exchange;
    ExchangeScratch *wire = &layers->wire;
    memset(layer->y, 0xff, (size_t)layer->shape.N * layer->shape.H * sizeof(real_t));
    exchange_dispatch_begin(x, wire, layer->x, true, NULL, NULL);
    for (int p = 0; p < x->parts; p++) {
        RowSource rows = exchange_dispatch(x, p, wire, layers->rows_in, layer->x, true, NULL, NULL);
        experts_make(layers, layer, rows, exchange_experts(x, p), first_expert(layer));
        exchange_combine(x, p, wire, layer->y, layers->made, NULL, NULL);
        poison_experts(layers);
    }
    exchange_combine_end(x, wire, layer->y, NULL, NULL);
}

static inline void layer_forward(Layers *layers, Layer *layer) {
    layer_plan(layers, layer);
    layer_run(layers, layer);
}

static inline void layer_backward(Layers *layers, Layer *layer) {
    Exchange *x = &layer->exchange;
    ExchangeScratch *wire = &layers->wire;
    int accumulate = layer->mode.accumulate, first = first_expert(layer);
    if (!layers->as_left) {
        poison_scratch(layers);
    }
    memcpy(layer->dx, layer->before, (size_t)layer->shape.N * layer->shape.H * sizeof(real_t));
    memset(layer->dweight, 0xff, (size_t)layer->shape.N * layer->shape.K * sizeof(acc_t));
    exchange_dispatch_begin(x, wire, layer->dy, false, NULL, NULL);
    for (int p = 0; p < x->parts; p++) {
        RowSource dy = exchange_dispatch(x, p, wire, layers->dy_in, layer->dy, false, NULL, NULL);
        RowSource rows = exchange_dispatch_again(x, p, layers->rows_in, layer->x, NULL, NULL);
        experts_make(layers, layer, rows, exchange_experts(x, p), first);
        experts_differentiate(layers, layer, dy, exchange_experts(x, p), first);
        exchange_backward(x, p, wire, layer->dx, layer->dweight, layers->din, layers->drow_weight, accumulate, NULL,
                          NULL);
        poison_experts(layers);
    }
    exchange_backward_end(x, wire, layer->dx, layer->dweight, accumulate, NULL, NULL);
}

/* What the wire makes of the rows of one rank, where they would travel. */
static inline void travel(Layers *layers, const Layer *layer, real_t *rows, Leg leg) {
    WireType type = wire_on(layer, leg);
    if (type != WIRE_SAME) {
        int count = layer->alone.offset[layer->alone.E], H = layer->shape.H;
        wire_pack(layers->packed, rows, type, count, H, NULL);
        wire_unpack(rows, layers->packed, type, count, H, NULL);
    }
}

/* The same on one rank that has all experts, but for the wire. A row for each choice. */
static inline void layer_alone(Layers *layers, Layer *layer) {
    Plan *plan = &layer->alone;
    int H = layer->shape.H;
    size_t numbers = (size_t)layer->shape.N * H;
    poison_experts(layers);
    plan_build(plan, NULL);
    dispatch_copy(layers->rows_in, layer->x, plan, H, NULL);
    dispatch_copy(layers->dy_in, layer->dy, plan, H, NULL);
    travel(layers, layer, layers->rows_in, FORWARD);
    travel(layers, layer, layers->dy_in, BACKWARD);
    experts_make(layers, layer, (RowSource){layers->rows_in, NULL, 0}, plan, 0);
    experts_differentiate(layers, layer, (RowSource){layers->dy_in, NULL, 0}, plan, 0);
    travel(layers, layer, layers->made, FORWARD);
    travel(layers, layer, layers->din, BACKWARD);
    combine_forward(layer->alone_y, layers->made, plan, H, 0, NULL);
    memcpy(layer->alone_dx, layer->before, numbers * sizeof(real_t));
    dispatch_backward(layer->alone_dx, layers->din, plan, H, layer->mode.accumulate, NULL);
    plan_weight_backward(layer->alone_dweight, layers->drow_weight, plan, NULL);
}

#endif
