/* What must come out of a layer, by formula. */
#ifndef TESTS_EXCHANGE_EXPECTED_H
#define TESTS_EXCHANGE_EXPECTED_H

#include "exchange_passes.h"
#include "exchange_tokens.h"

/* sum (H) = sum_j weight[n,j] f(row of token n), or with f' for gradients; size (H) = the sum of the terms' sizes. */
static inline void closed_form(const Layer *layer, const real_t *rows, bool back, int n, double *sum, double *size) {
    const Shape *s = &layer->shape;
    int H = s->H, entries = s->N * s->K;
    memset(sum, 0, H * sizeof *sum);
    memset(size, 0, H * sizeof *size);
    for (int i = comm_rank(GROUP_WORLD) * entries + n * s->K, end = i + s->K; i < end; i++) {
        if (layer->expert[i] >= 0) {
            Expert f = expert_of(layer, layer->expert[i]), g = back ? transposed(f, H) : f;
            double factor = (double)layer->weight[i] * g.scale;
            for (int h = 0; h < H; h++) {
                double term = factor * rows[(size_t)n * H + (h + g.shift < H ? h + g.shift : h + g.shift - H)];
                sum[h] += term;
                size[h] += fabs(term);
            }
        }
    }
}

/* y of one token as the benchmark's reference computes it: experts in ascending order, every result of half precision.
 */
static inline void oracle(const Layer *layer, int n, float *y) {
    const Shape *s = &layer->shape;
    const int *expert = layer->expert + ((size_t)comm_rank(GROUP_WORLD) * s->N + n) * s->K;
    const acc_t *weight = layer->plan.weight + (size_t)n * s->K;
    memset(y, 0, s->H * sizeof *y);
    for (int e = 0; e < s->E; e++) {
        for (int j = 0; j < s->K; j++) {
            for (int h = 0; expert[j] == e && h < s->H; h++) {
                float made = half_rounded((float)layer->x[(size_t)n * s->H + h] * (1 + e / layer->exchange.experts));
                float term = made * (float)weight[j];
                y[h] = half_rounded(y[h] + term);
            }
        }
    }
}

#endif
