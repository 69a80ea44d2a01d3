/* What must come out of a layer, by formula, and what the wire may change of it.
 *
 * Two formulas: sums of every choice's term (closed_form), and the benchmark's own order and roundings (oracle). With
 * each sum comes a bound of how far the wire's roundings may move it, derived from the formats (losses_of_formats)
 * and not from what is seen. Called by exchange_results.h, exchange_adjoint.h.
 */
#ifndef TESTS_EXCHANGE_EXPECTED_H
#define TESTS_EXCHANGE_EXPECTED_H

#include "exchange_passes.h"
#include "exchange_tokens.h"

/* ---- what the wire may change */

/* A number x of a row on the wire arrives as x', |x' - x| <= part |x| + of_largest max|row| + least.
 *
 * part: to the nearest of p significant bits x moves by half a unit of the last one, that is by 2^-p / (1 + 2^-p) |x|
 * at most. 2^-p is above that by nearly 2^-2p, which leaves room for what float rounds on the way, 2^-24 a time: to
 * float from double, and for fp8 the quotient by the scale and the product with it.
 *
 * of_largest, least: below the format's least exponent numbers are whole multiples of one unit, and x moves by half of
 * it. For fp16 the unit is 2^-24. For fp8 it is 2^-9 of the scale, which is max|row| / 448, in float not above
 * max|row| / 447. For bf16 and fp32 it is far below all numbers here. */
typedef struct {
    double part, of_largest, least;
} Loss;

static const Loss losses_of_formats[] = {
    [WIRE_SAME] = {0, 0, 0},
    [WIRE_FP32] = {0x1p-24, 0, 0},
    [WIRE_BF16] = {0x1p-8, 0, 0},
    [WIRE_FP16] = {0x1p-11, 0, 0x1p-25},
    [WIRE_FP8] = {0x1p-4, 0x1p-10 / 447, 0},
};

static inline Loss loss_on(const Layer *layer, Leg leg) {
    WireType type = wire_on(layer, leg);
    bool as_it_is = type == WIRE_FP32 && sizeof(real_t) == sizeof(float);
    return losses_of_formats[as_it_is ? WIRE_SAME : type];
}

/* Of a number x in a row whose largest is `largest`. */
static inline double loss_of(Loss loss, double x, double largest) {
    return loss.part * x + loss.of_largest * largest + loss.least;
}

/* A bound of the length of what a row's numbers change by, all rows together: of `rows` rows of H numbers and of
 * length `norm`. max|row| is at most the row's own length. */
static inline double loss_of_rows(Loss loss, double norm, double rows, int H) {
    return (loss.part + loss.of_largest * sqrt(H)) * norm + loss.least * sqrt(rows * H);
}

/* Whether rows of this leg arrive as they left, so that what comes out is known to the bit.
 *
 * Whole numbers of at most 7 in size and their products with weights of at most 2, K of them added up: bf16 has 8
 * significant bits, fp16 has 11, so both hold 14 K <= 256. What an expert's scale is multiplied with is not such a
 * number. In fp8 a row is exact if it is a multiple of one of whole numbers whose largest is 7 = 448 / 64: then the
 * quotients by the scale are whole multiples of 64 up to 7 * 64, which have 3 significant bits. That is what an expert
 * makes, and what several make that do not turn the row. */
static inline bool arrives_as_it_left(const Layer *layer, Leg leg) {
    bool whole = layer->mode.values == VALUES_WHOLE, turned = layer->mode.expert == EXPERT_ROTATION;
    if (loss_on(layer, leg).part == 0) {
        return true;
    }
    switch (wire_on(layer, leg)) {
        case WIRE_FP32: return whole;
        case WIRE_FP8: return whole && !(turned && layer->way->row_per_rank);
        default: return whole && turned && LARGEST_WHOLE * LARGEST_WEIGHT * layer->shape.K <= 256;
    }
}

/* Whether sums are the same in any order, too. */
static inline bool sums_exactly(const Layer *layer, Leg leg) {
    return layer->mode.values == VALUES_WHOLE && arrives_as_it_left(layer, leg);
}

/* ---- sums of terms */

/* One column: what comes out, the sum of its terms' sizes, and how far the wire may have moved it. */
typedef struct {
    double sum, size, lost;
} Column;

static inline double largest_of(const real_t *row, int H) {
    double largest = 0;
    for (int h = 0; h < H; h++) {
        double size = fabs((double)row[h]);
        largest = size > largest ? size : largest;
    }
    return largest;
}

/* column (H): sum_j weight[n,j] f(row), row that of token n in x; on the leg BACKWARD with f', and in dy.
 *
 * A term passes the wire twice: the row, and times the scale what is made of it. Of that the second loss is one of a
 * row that the first has moved already. Where terms of one rank travel as their sum, the loss of the sum is at most
 * the sum of theirs, but `least`, which then does not shrink with the weight: it counts once more. */
static inline void closed_form(const Layer *layer, Leg leg, int n, Column *column) {
    const Shape *s = &layer->shape;
    int H = s->H, entries = s->N * s->K;
    const real_t *row = (leg == FORWARD ? layer->x : layer->dy) + (size_t)n * H;
    Loss loss = loss_on(layer, leg);
    double least = loss.least, largest = largest_of(row, H), arrived = largest + loss_of(loss, largest, largest);
    memset(column, 0, H * sizeof *column);
    for (int i = comm_rank(GROUP_WORLD) * entries + n * s->K, end = i + s->K; i < end; i++) {
        if (layer->expert[i] < 0) {
            continue;
        }
        Expert f = expert_of(layer, layer->expert[i]), g = leg == FORWARD ? f : transposed(f, H);
        double weight = fabs((double)layer->weight[i]), factor = (double)layer->weight[i] * g.scale;
        for (int h = 0; h < H; h++) {
            double x = row[h + g.shift < H ? h + g.shift : h + g.shift - H];
            double first = loss_of(loss, fabs(x), largest), second = loss_of(loss, fabs(x) + first, arrived) - least;
            column[h].sum += factor * x;
            column[h].size += fabs(factor * x);
            column[h].lost += fabs(factor) * (first + second) + (1 + weight) * least;
        }
    }
}

/* The gradient of an entry's weight, <dy, f(x)>: each of the two rows has been on the wire once. */
static inline Column closed_form_of_weight(const Layer *layer, int n, int j) {
    const Shape *s = &layer->shape;
    int H = s->H, e = layer->expert[((size_t)comm_rank(GROUP_WORLD) * s->N + n) * s->K + j];
    const real_t *row = layer->x + (size_t)n * H, *dy = layer->dy + (size_t)n * H;
    Loss forward = loss_on(layer, FORWARD), backward = loss_on(layer, BACKWARD);
    double largest = largest_of(row, H), largest_dy = largest_of(dy, H);
    Expert f = e < 0 ? (Expert){0, 0} : expert_of(layer, e);
    Column all = {0, 0, 0};
    for (int h = 0; h < H; h++) {
        double x = row[h + f.shift < H ? h + f.shift : h + f.shift - H], term = f.scale * x * dy[h];
        double of_x = loss_of(forward, fabs(x), largest), of_dy = loss_of(backward, fabs((double)dy[h]), largest_dy);
        all.sum += term;
        all.size += fabs(term);
        all.lost += f.scale * (fabs((double)dy[h]) * of_x + of_dy * (fabs(x) + of_x));
    }
    return all;
}

/* ---- the benchmark's reference */

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
