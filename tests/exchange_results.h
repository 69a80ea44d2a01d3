/* What comes out of a layer against what must come out of it. */
#ifndef TESTS_EXCHANGE_RESULTS_H
#define TESTS_EXCHANGE_RESULTS_H

#include <float.h>
#include <stdlib.h>

#include "exchange_expect.h"
#include "exchange_expected.h"

/* y and dx of every token. A term is rounded at most twice before it is added to at most K others (and to `before`). */
static inline void check_closed_form(const Layer *layer) {
    const Shape *s = &layer->shape;
    double *sum = malloc(s->H * sizeof *sum), *size = malloc(s->H * sizeof *size);
    double epsilon = (s->K + 3) * REAL_EPSILON;
    CHECK(sum && size, "out of memory");
    for (int n = 0; n < s->N; n++) {
        const real_t *y = layer->y + (size_t)n * s->H, *dx = layer->dx + (size_t)n * s->H;
        closed_form(layer, layer->x, false, n, sum, size);
        for (int h = 0; h < s->H; h++) {
            near("y", n, h, y[h], sum[h], epsilon * size[h]);
        }
        closed_form(layer, layer->dy, true, n, sum, size);
        for (int h = 0; h < s->H; h++) {
            double before = layer->mode.accumulate ? layer->before[(size_t)n * s->H + h] : 0;
            near("dx", n, h, dx[h], before + sum[h], epsilon * (size[h] + fabs(before)));
        }
    }
    free(sum);
    free(size);
}

/* Within the tolerance that the benchmark allows. Rows here are float, the reference's are half: the tolerance has to
 * hold the reference's roundings alone, so this check is no sharper than the benchmark's. check_closed_form is. */
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

/* The bits of one rank, where they are promised. */
static inline void check_alone(Layers *layers, Layer *layer) {
    const Shape *s = &layer->shape;
    size_t numbers = (size_t)s->N * s->H, entries = (size_t)s->N * s->K;
    bool same_order = layer->exchange.way != EXCHANGE_DEDUP || layer->mode.values == VALUES_WHOLE;
    layer_alone(layers, layer);
    same_bits("dweight", layer->dweight, layer->alone_dweight, entries);
    if (same_order) {
        same_bits("y", layer->y, layer->alone_y, numbers);
        same_bits("dx", layer->dx, layer->alone_dx, numbers);
    }
}

static inline void check_results(Layers *layers, Layer *layer) {
    check_alone(layers, layer);
    check_closed_form(layer);
    if (layer->mode.expert == EXPERT_RANK_SCALE) {
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
