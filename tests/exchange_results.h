/* What comes out of a layer against what must come out of it: by formula, by what one rank makes of it, and once more.
 * Called by exchange_ranks.c.
 */
#ifndef TESTS_EXCHANGE_RESULTS_H
#define TESTS_EXCHANGE_RESULTS_H

#include <float.h>
#include <stdlib.h>

#include "exchange_expect.h"
#include "exchange_expected.h"

/* y and dx of every token. Beside the wire, a term is rounded at most twice before it is added to at most K others (and
 * to `before`). Where nothing is rounded at all, nothing may differ. */
static inline void check_closed_form(const Layer *layer) {
    const Shape *s = &layer->shape;
    Column *column = malloc(s->H * sizeof *column);
    double epsilon = (s->K + 3) * REAL_EPSILON;
    bool exact_y = sums_exactly(layer, FORWARD), exact_dx = sums_exactly(layer, BACKWARD);
    CHECK(column, "out of memory");
    for (int n = 0; n < s->N; n++) {
        const real_t *y = layer->y + (size_t)n * s->H, *dx = layer->dx + (size_t)n * s->H;
        closed_form(layer, FORWARD, n, column);
        for (int h = 0; h < s->H; h++) {
            double tolerance = column[h].lost + epsilon * (column[h].size + column[h].lost);
            near("y", n, h, y[h], column[h].sum, exact_y ? 0 : tolerance);
        }
        closed_form(layer, BACKWARD, n, column);
        for (int h = 0; h < s->H; h++) {
            double before = layer->mode.accumulate ? layer->before[(size_t)n * s->H + h] : 0;
            double tolerance = column[h].lost + epsilon * (column[h].size + column[h].lost + fabs(before));
            near("dx", n, h, dx[h], before + column[h].sum, exact_dx ? 0 : tolerance);
        }
    }
    free(column);
}

/* The gradient of every weight: what the expert makes and the gradient are rounded, and two sums of H in double. */
static inline void check_weights_closed_form(const Layer *layer) {
    const Shape *s = &layer->shape;
    double epsilon = 3 * REAL_EPSILON + 2 * s->H * DBL_EPSILON;
    for (int n = 0; n < s->N; n++) {
        for (int j = 0; j < s->K; j++) {
            Column expected = closed_form_of_weight(layer, n, j);
            double lost = arrives_as_it_left(layer, FORWARD) && arrives_as_it_left(layer, BACKWARD) ? 0 : expected.lost;
            near("dweight", n, j, layer->dweight[(size_t)n * s->K + j], expected.sum,
                 lost + epsilon * (expected.size + lost));
        }
    }
}

/* Within the tolerance that the benchmark allows. Where rows are float on the wire, it holds the reference's roundings
 * alone. bf16 moves a number by 2^-8 of it at most on each of its two ways: two times 0.4 of the 1 % that is allowed,
 * and for the small the 5e-3. The 6 % of fp8 are not allowed. check_closed_form is sharper for all of them. */
static inline void check_oracle(const Layer *layer) {
    const Shape *s = &layer->shape;
    float *y = malloc(s->H * sizeof *y);
    CHECK(y, "out of memory");
    for (int n = 0; n < s->N; n++) {
        oracle(layer, n, y);
        for (int h = 0; h < s->H; h++) {
            near("y by the oracle", n, h, layer->y[(size_t)n * s->H + h], y[h], 5e-3 + 1e-2 * fabs(y[h]));
        }
    }
    free(y);
}

/* Whether what comes back on a leg are rows of choices, not sums of them. */
static inline bool choices_return(const Layer *layer, Leg leg) {
    bool by_choice = layer->way->by_choice && wire_on(layer, leg) == WIRE_SAME;
    return !layer->way->row_per_rank || by_choice || !exchange_travels(&layer->exchange);
}

/* The bits of one rank, where they are promised: everywhere with a row for each choice, whose roundings by the wire one
 * rank can do as well; with a row per rank, which is a sum, where nothing is rounded. */
static inline void check_alone(Layers *layers, Layer *layer) {
    const Shape *s = &layer->shape;
    size_t numbers = (size_t)s->N * s->H, entries = (size_t)s->N * s->K;
    layer_alone(layers, layer);
    same_bits("dweight", layer->dweight, layer->alone_dweight, entries);
    if (choices_return(layer, FORWARD) || sums_exactly(layer, FORWARD)) {
        same_bits("y", layer->y, layer->alone_y, numbers);
    }
    if (choices_return(layer, BACKWARD) || sums_exactly(layer, BACKWARD)) {
        same_bits("dx", layer->dx, layer->alone_dx, numbers);
    }
}

static inline void check_results(Layers *layers, Layer *layer) {
    check_alone(layers, layer);
    check_closed_form(layer);
    check_weights_closed_form(layer);
    if (layer->mode.expert == EXPERT_RANK_SCALE && loss_on(layer, FORWARD).part <= losses_of_formats[WIRE_BF16].part) {
        check_oracle(layer);
    }
}

/* Once more gives the same bits; the first ones take the place of one rank's. */
static inline void check_repeats(Layers *layers, Layer *layer) {
    const Shape *s = &layer->shape;
    size_t numbers = (size_t)s->N * s->H, entries = (size_t)s->N * s->K;
    memcpy(layer->alone_y, layer->y, numbers * sizeof(real_t));
    memcpy(layer->alone_dx, layer->dx, numbers * sizeof(real_t));
    memcpy(layer->alone_dweight, layer->dweight, entries * sizeof(acc_t));
    layer_forward(layers, layer);
    layer_backward(layers, layer);
    same_bits("the second time: y", layer->y, layer->alone_y, numbers);
    same_bits("the second time: dx", layer->dx, layer->alone_dx, numbers);
    same_bits("the second time: dweight", layer->dweight, layer->alone_dweight, entries);
}

#endif
