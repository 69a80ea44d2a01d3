/* AdamW on the CPU: one sweep for the norm of the gradient, one for the update; memory bandwidth is what both cost.
 *
 * Squares are added in double, in at most CHUNKS ranges per tensor whose borders follow from its size alone, and the
 * ranges are added in order: the norm, and with it every clipped step, has the same bits for any number of threads.
 * Called by model/optimizer.c.
 */
#include "adamw.h"

#include <tgmath.h> /* sqrt of acc_t */

#include "vector.h"

enum { CHUNKS = 256, CHUNK_MIN = 4096, UPDATE_BLOCK = 4096 };

/* sum g^2; float squares are exact in double */
static double square_sum(const acc_t *g, size_t count) {
    double lane[LANES] = {0};
    size_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        for (int j = 0; j < LANES; j++) {
            lane[j] += (double)g[i + j] * g[i + j];
        }
    }
    for (int j = 0; i + j < count; j++) {
        lane[j] += (double)g[i + j] * g[i + j];
    }
    double sum = 0;
    for (int j = 0; j < LANES; j++) {
        sum += lane[j];
    }
    return sum;
}

void adamw_square_sums(double *sums, const acc_t *grads, const size_t *offset, const size_t *count, int pieces,
                       Stream *stream) {
    for (int piece = 0; piece < pieces; piece++) {
        const acc_t *g = grads + offset[piece];
        size_t size = (count[piece] + CHUNKS - 1) / CHUNKS;
        size = size < CHUNK_MIN ? CHUNK_MIN : size;
        int chunks = (int)((count[piece] + size - 1) / size);
        double partial[CHUNKS];
#pragma omp parallel for schedule(static) if (chunks > 1)
        for (int chunk = 0; chunk < chunks; chunk++) {
            size_t begin = chunk * size;
            partial[chunk] = square_sum(g + begin, count[piece] - begin < size ? count[piece] - begin : size);
        }
        double sum = 0;
        for (int chunk = 0; chunk < chunks; chunk++) {
            sum += partial[chunk];
        }
        sums[piece] = sum;
    }
}

void adamw_begin(AdamState *state, const double *sums, int pieces, const acc_t *loss, AdamOptions options,
                 Stream *stream) {
    double sum = 0;
    for (int piece = 0; piece < pieces; piece++) {
        sum += sums[piece];
    }
    state->norm = sqrt(sum);
    if (!isfinite(state->norm) || !isfinite(*loss)) {
        state->skipped++;
        state->skipped_in_row++;
        state->scale = 0;
        return;
    }
    state->updates++;
    state->skipped_in_row = 0;
    state->scale = options.clip > 0 && state->norm > options.clip ? options.clip / state->norm : 1;
    state->correction1 = 1 - pow(options.beta1, (double)state->updates);
    state->correction2 = 1 - pow(options.beta2, (double)state->updates);
}

/* The formula of adamw.h for one block; its factors are the same for every element of a piece. */
static void update_block(acc_t *restrict master, acc_t *restrict m, acc_t *restrict v, const acc_t *restrict grads,
                         size_t count, const AdamState *state, AdamOptions options) {
    const acc_t scale = (acc_t)state->scale;
    const acc_t beta1 = (acc_t)options.beta1, rest1 = (acc_t)(1 - options.beta1);
    const acc_t beta2 = (acc_t)options.beta2, rest2 = (acc_t)(1 - options.beta2);
    const acc_t step = (acc_t)(options.lr / state->correction1);
    const acc_t inverse2 = (acc_t)(1 / state->correction2);
    const acc_t eps = (acc_t)options.eps;
    const acc_t shrink = (acc_t)(options.lr * options.decay);
    for (size_t i = 0; i < count; i++) {
        acc_t g = scale * grads[i];
        acc_t first = beta1 * m[i] + rest1 * g;
        acc_t second = beta2 * v[i] + rest2 * (g * g);
        m[i] = first;
        v[i] = second;
        master[i] -= step * first / (sqrt(second * inverse2) + eps) + shrink * master[i];
    }
}

void adamw_update(acc_t *master, real_t *weights, acc_t *m, acc_t *v, const acc_t *grads, size_t count,
                  const AdamState *state, AdamOptions options, Stream *stream) {
    if (state->scale == 0) {
        return; /* only a skipped step: a clip is a positive number over a finite norm */
    }
#pragma omp parallel for schedule(static) if (count > UPDATE_BLOCK)
    for (size_t begin = 0; begin < count; begin += UPDATE_BLOCK) {
        size_t size = count - begin < UPDATE_BLOCK ? count - begin : UPDATE_BLOCK;
        update_block(master + begin, m + begin, v + begin, grads + begin, size, state, options);
        if ((void *)weights != (void *)master) {
            for (size_t i = begin; i < begin + size; i++) {
                weights[i] = (real_t)master[i];
            }
        }
    }
}
