/* What backwards must be, whatever the experts are: adjoints, and the weights' gradient by differences. Called by
 * exchange_ranks.c.
 */
#ifndef TESTS_EXCHANGE_ADJOINT_H
#define TESTS_EXCHANGE_ADJOINT_H

#include <float.h>

#include "exchange_expect.h"
#include "exchange_expected.h"

/* sum_r weight[r] <a[r], b[r]> over the rows of a part that this rank's experts have; without weights: 1. */
static inline double dot_rows(const Layer *layer, int part, RowSource a, const real_t *b, bool weighted) {
    const Plan *plan = exchange_experts(&layer->exchange, part);
    const acc_t *weight = weighted ? plan->row_weight : NULL;
    int H = layer->shape.H;
    double sum = 0;
    for (int r = 0; r < plan->offset[plan->E]; r++) {
        if (plan->entry[r] >= 0) {
            sum += (weight ? weight[r] : 1) * dot(row_at(a, r, H), b + (size_t)r * H, H);
        }
    }
    return sum;
}

/* What is multiplied: numbers in rows, their sum of squares, and the leg on which they pass the wire. */
typedef struct {
    double rows, squares;
    Leg leg;
} Side;

/* <A u, v> and <u, A' v> over all ranks. Where the wire changes nothing, whole numbers give the same on both sides.
 *
 * Else: each row of u belongs to one entry and weights are at most 1, so |A u| is at most sqrt(K) |u|, and |A du| as
 * much of what u changes by. Rounding may change either side by (K + 3) epsilon sqrt(K) |u| |v|, and the sums, which
 * are of double, by their number of terms times its epsilon. On one side the wire rounds u, on the other side v. */
static inline void check_adjoint(const Layer *layer, const char *what, double left, double right, Side u, Side v,
                                 size_t terms) {
    double all[] = {left, right, u.squares, v.squares, u.rows, v.rows, (double)terms};
    comm_sum_host(all, 7);
    int K = layer->shape.K, H = layer->shape.H;
    double norm_u = sqrt(all[2]), norm_v = sqrt(all[3]);
    double rounded = ((K + 3) * REAL_EPSILON + all[6] * DBL_EPSILON) * norm_u * norm_v;
    double lost = loss_of_rows(loss_on(layer, u.leg), norm_u, all[4], H) * norm_v +
                  loss_of_rows(loss_on(layer, v.leg), norm_v, all[5], H) * norm_u;
    double tolerance = layer->mode.values == VALUES_WHOLE ? 0 : sqrt(K) * (rounded + lost);
    EXPECT(fabs(all[0] - all[1]) <= tolerance, "the adjoint of %s: %.17g and %.17g, expected to agree within %.2g",
           what, all[0], all[1], tolerance);
}

/* What the experts of this rank are said to have made of a part's rows. */
static inline const real_t *made_up(Layers *layers, const Layer *layer, int part) {
    uint64_t key = random_key(comm_rank(GROUP_WORLD), RANDOM_TEST, 100 + part);
    fill_rows(layers->made, layer->mode.values, key, layers->rows, layer->shape.H, 1);
    return layers->made;
}

/* u: what the experts made, of all parts; v: dy. */
static inline void check_adjoint_of_combine(Layers *layers, Layer *layer, Side rows, Side tokens, size_t terms) {
    Exchange *x = &layer->exchange;
    ExchangeScratch *wire = &layers->wire;
    double right = 0;
    for (int p = 0; p < x->parts; p++) {
        exchange_combine(x, p, wire, layer->y, made_up(layers, layer, p), NULL, NULL);
    }
    exchange_combine_end(x, wire, layer->y, NULL, NULL);
    exchange_dispatch_begin(x, wire, layer->dy, false, NULL, NULL);
    for (int p = 0; p < x->parts; p++) {
        RowSource back = exchange_dispatch(x, p, wire, layers->dy_in, layer->dy, false, NULL, NULL);
        right += dot_rows(layer, p, back, made_up(layers, layer, p), true);
    }
    double left = dot(layer->y, layer->dy, layer->shape.N * layer->shape.H);
    check_adjoint(layer, "combine", left, right, rows, tokens, terms);
}

/* u: the tokens; v: the gradients that come out of the experts, of all parts. */
static inline void check_adjoint_of_dispatch(Layers *layers, Layer *layer, Side rows, Side tokens, size_t terms) {
    Exchange *x = &layer->exchange;
    ExchangeScratch *wire = &layers->wire;
    double left = 0;
    exchange_dispatch_begin(x, wire, layer->x, true, NULL, NULL);
    for (int p = 0; p < x->parts; p++) {
        RowSource there = exchange_dispatch(x, p, wire, layers->rows_in, layer->x, true, NULL, NULL);
        const real_t *v = made_up(layers, layer, p);
        left += dot_rows(layer, p, there, v, false);
        exchange_backward(x, p, wire, layer->dx, NULL, v, NULL, 0, NULL, NULL);
    }
    exchange_backward_end(x, wire, layer->dx, NULL, 0, NULL, NULL);
    double right = dot(layer->dx, layer->x, layer->shape.N * layer->shape.H);
    check_adjoint(layer, "dispatch", left, right, rows, tokens, terms);
}

static inline void check_adjoints(Layers *layers, Layer *layer) {
    const Shape *s = &layer->shape;
    const Exchange *x = &layer->exchange;
    size_t numbers = (size_t)s->N * s->H, terms = numbers;
    uint64_t mine = comm_rank(GROUP_WORLD);
    ValueKind kind = layer->mode.values;
    Side rows = {(double)s->N * s->K, 0, FORWARD};
    layer_plan(layers, layer);
    fill_rows(layer->dy, kind, random_key(mine, RANDOM_TEST, 90), s->N, s->H, 1);
    fill_rows(layer->x, kind, random_key(mine, RANDOM_TEST, 91), s->N, s->H, 1);
    for (int p = 0; p < x->parts; p++) {
        const Plan *plan = exchange_experts(x, p);
        const real_t *made = made_up(layers, layer, p);
        rows.squares += dot_rows(layer, p, (RowSource){made, NULL, 0}, made, false);
        terms += (size_t)plan->offset[plan->E] * s->H;
    }
    Side tokens = {s->N, dot(layer->dy, layer->dy, (int)numbers), BACKWARD};
    check_adjoint_of_combine(layers, layer, rows, tokens, terms);
    rows.leg = BACKWARD;
    tokens = (Side){s->N, dot(layer->x, layer->x, (int)numbers), FORWARD};
    check_adjoint_of_dispatch(layers, layer, rows, tokens, terms);
}

/* dweight by differences. y is linear in the weights and a token's y in its own alone, so one step of any length gives
 * the j-th choice of all tokens; what is left is the rounding of both y. The first y takes the place of one rank's.
 *
 * And of the wire: what becomes of a row moves by d of its length on each of two ways, by 2 d + d^2 on both. Sizes of
 * weights add up to K at most in the first y and to K + 1 in the other, so together these move by less than
 * 2 scale (K + 1) (2 d + d^2) |x|. dweight, of which each factor passes once, moves by scale (d + d_back + d d_back)
 * |x| |dy|. With d below 1/2 all of it is less than 2 scale (K + 1) (3 d + d_back) |x| |dy|. */
static inline void check_weight_gradient(Layers *layers, Layer *layer) {
    const Shape *s = &layer->shape;
    size_t entries = (size_t)s->N * s->K, numbers = (size_t)s->N * s->H;
    acc_t *mine = layer->weight + comm_rank(GROUP_WORLD) * entries;
    double scale = 1 + s->E / 64.0;
    Loss forward = loss_on(layer, FORWARD), backward = loss_on(layer, BACKWARD);
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
            double norm = sqrt(dot(x, x, s->H)), norm_dy = sqrt(dot(dy, dy, s->H)), size = scale * 2 * (s->K + 1);
            double lost =
                3 * loss_of_rows(forward, norm, 1, s->H) * norm_dy + loss_of_rows(backward, norm_dy, 1, s->H) * norm;
            near("dweight by differences", n, j, layer->dweight[n * s->K + j], change,
                 size * ((s->K + 3) * REAL_EPSILON * norm * norm_dy + lost));
            mine[n * s->K + j] -= 1;
        }
    }
    layer_take_weights(layer);
}

#endif
