/* What backwards must be, whatever the experts are: adjoints, and the weights' gradient by differences. */
#ifndef TESTS_EXCHANGE_ADJOINT_H
#define TESTS_EXCHANGE_ADJOINT_H

#include <float.h>

#include "exchange_expect.h"
#include "exchange_passes.h"
#include "exchange_tokens.h"

/* Random numbers of [-1,1). */
static inline void fill_random(real_t *x, size_t count, uint64_t stream) {
    uint64_t key = random_key(comm_rank(GROUP_WORLD), RANDOM_TEST, 100 + stream);
    for (size_t i = 0; i < count; i++) {
        x[i] = value(VALUES_SIGNED, key, i);
    }
}

/* sum_r weight[r] <a[r], b[r]> over the rows of this rank's experts; weight NULL: 1. */
static inline double dot_rows(const Layer *layer, RowSource a, const real_t *b, const acc_t *weight) {
    const Plan *plan = exchange_experts(&layer->exchange);
    int H = layer->shape.H;
    double sum = 0;
    for (int r = 0; r < plan->offset[plan->E]; r++) {
        if (plan->entry[r] >= 0) {
            sum += (weight ? weight[r] : 1) * dot(row_at(a, r, H), b + (size_t)r * H, H);
        }
    }
    return sum;
}

/* <A u, v> and <u, A' v> over all ranks. Each row belongs to one entry and weights are at most 1, so |A u| is at most
 * sqrt(K) |u|: rounding may change either side by (K + 2) epsilon sqrt(K) |u| |v|, and the sums, which are of double,
 * by their number of terms times its epsilon. */
static inline void check_adjoint(const Layer *layer, const char *what, double left, double right, double u, double v,
                                 size_t terms) {
    double all[] = {left, right, u, v, (double)terms};
    comm_sum_host(all, 5);
    double size = sqrt(layer->shape.K * all[2] * all[3]);
    double tolerance = ((layer->shape.K + 2) * REAL_EPSILON + all[4] * DBL_EPSILON) * size;
    EXPECT(fabs(all[0] - all[1]) <= tolerance, "the adjoint of %s: %.17g and %.17g, expected to agree within %.2g",
           what, all[0], all[1], tolerance);
}

static inline void check_adjoints(Layers *layers, Layer *layer) {
    Exchange *x = &layer->exchange;
    ExchangeScratch *wire = &layers->wire;
    const acc_t *weight = exchange_experts(x)->row_weight;
    size_t rows = (size_t)layers->rows * layers->H, numbers = (size_t)layer->shape.N * layer->shape.H;
    real_t *u = layers->made, *v = layer->dy;
    layer_plan(layers, layer);
    fill_random(u, rows, 0);
    fill_random(v, numbers, 1);
    fill_random(layer->x, numbers, 2);
    double u_u = dot_rows(layer, (RowSource){u, NULL, 0}, u, NULL), v_v = dot(v, v, (int)numbers);

    exchange_combine(x, wire, layer->y, u, NULL, NULL);
    RowSource back = exchange_dispatch(x, wire, layers->dy_in, v, false, NULL, NULL);
    check_adjoint(layer, "combine", dot(layer->y, v, (int)numbers), dot_rows(layer, back, u, weight), u_u, v_v,
                  rows + numbers);

    RowSource there = exchange_dispatch(x, wire, layers->rows_in, layer->x, true, NULL, NULL);
    exchange_dispatch_backward(x, wire, layer->dx, u, 0, NULL, NULL);
    check_adjoint(layer, "dispatch", dot_rows(layer, there, u, NULL), dot(layer->dx, layer->x, (int)numbers), u_u,
                  dot(layer->x, layer->x, (int)numbers), rows + numbers);
}

/* dweight by differences. y is linear in the weights and a token's y in its own alone, so one step of any length gives
 * the j-th choice of all tokens; what is left is the rounding of both y. The first y takes the place of one rank's. */
static inline void check_weight_gradient(Layers *layers, Layer *layer) {
    const Shape *s = &layer->shape;
    size_t entries = (size_t)s->N * s->K, numbers = (size_t)s->N * s->H;
    acc_t *mine = layer->weight + comm_rank(GROUP_WORLD) * entries;
    double scale = 1 + s->E / 64.0;
    memcpy(layer->alone_y, layer->y, numbers * sizeof(real_t));
    for (int j = 0; j < s->K; j++) {
        for (int n = 0; n < s->N; n++) {
            mine[n * s->K + j] += 1;
        }
        layer_take_weights(layer);
        layer_forward(layers, layer);
        for (int n = 0; n < s->N; n++) {
            size_t token = (size_t)n * s->H;
            const real_t *x = layer->x + token, *dy = layer->dy + token;
            double change = dot(layer->y + token, dy, s->H) - dot(layer->alone_y + token, dy, s->H);
            double size = scale * 2 * (s->K + 1) * sqrt(dot(x, x, s->H) * dot(dy, dy, s->H));
            near("dweight by differences", n, j, layer->dweight[n * s->K + j], change,
                 (s->K + 3) * REAL_EPSILON * size);
            mine[n * s->K + j] -= 1;
        }
    }
    layer_take_weights(layer);
}

#endif
