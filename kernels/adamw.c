/* AdamW on the CPU: one sweep for the norm of the gradient, one for the update; memory bandwidth is what both cost.
 *
 * A thread takes whole chunks. Squares are added in double, the sums of a piece's chunks in order: the norm, and with
 * it every clipped step, has the same bits for any number of threads. Called by model/optimizer.c.
 */
#include "adamw.h"

#include <stdbool.h>
#include <string.h>
#include <tgmath.h> /* sqrt of acc_t */

#include "vector.h"

/* The part of a piece that one chunk is. */
typedef struct {
    const AdamPiece *piece;
    size_t begin, count; /* in the flat buffers */
} Chunk;

/* The chunk's piece is the last one that does not start after it. */
static Chunk find_chunk(const AdamPiece *pieces, int count, int chunk) {
    int low = 0, high = count;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (pieces[middle].first_chunk <= chunk) {
            low = middle;
        } else {
            high = middle;
        }
    }
    const AdamPiece *piece = pieces + low;
    size_t done = (size_t)(chunk - piece->first_chunk) * ADAM_CHUNK, rest = piece->count - done;
    return (Chunk){piece, piece->offset + done, rest < ADAM_CHUNK ? rest : ADAM_CHUNK};
}

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

void adamw_square_sums(double *sums, double *partial, const acc_t *grads, const AdamPiece *pieces, int count,
                       int chunks, Stream *stream) {
#pragma omp parallel for schedule(static) if (chunks > 1)
    for (int i = 0; i < chunks; i++) {
        Chunk chunk = find_chunk(pieces, count, i);
        partial[i] = chunk.piece->trained ? square_sum(grads + chunk.begin, chunk.count) : 0;
    }
    for (int i = 0; i < count; i++) {
        int end = i + 1 < count ? pieces[i + 1].first_chunk : chunks;
        sums[i] = 0;
        for (int chunk = pieces[i].first_chunk; chunk < end; chunk++) {
            sums[i] += partial[chunk];
        }
    }
}

void adamw_add_sums(double *sums, const double *all, const AdamPiece *pieces, int count, int ranks, Stream *stream) {
    for (int i = 0; i < count; i++) {
        double sum = 0;
        for (int r = 0; r < ranks; r++) {
            sum += all[(size_t)r * count + i];
        }
        sums[i] = pieces[i].spread ? sum : sums[i];
    }
}

void adamw_begin(AdamState *state, const double *sums, int count, const acc_t *loss, const double *lr,
                 AdamOptions options, Stream *stream) {
    double sum = 0;
    for (int i = 0; i < count; i++) {
        sum += sums[i];
    }
    state->norm = sqrt(sum);
    state->lr = *lr;
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

/* The formula of adamw.h for one chunk; its factors are the same for every element of a piece. */
static void update_chunk(acc_t *restrict master, acc_t *restrict m, acc_t *restrict v, const acc_t *restrict grads,
                         size_t count, double decay, const AdamState *state, AdamOptions options) {
    const acc_t scale = (acc_t)state->scale;
    const acc_t beta1 = (acc_t)options.beta1, rest1 = (acc_t)(1 - options.beta1);
    const acc_t beta2 = (acc_t)options.beta2, rest2 = (acc_t)(1 - options.beta2);
    const acc_t step = (acc_t)(state->lr / state->correction1);
    const acc_t inverse2 = (acc_t)(1 / state->correction2);
    const acc_t eps = (acc_t)options.eps;
    const acc_t shrink = (acc_t)(state->lr * decay);
    for (size_t i = 0; i < count; i++) {
        acc_t g = scale * grads[i];
        acc_t first = beta1 * m[i] + rest1 * g;
        acc_t second = beta2 * v[i] + rest2 * (g * g);
        m[i] = first;
        v[i] = second;
        master[i] -= step * first / (sqrt(second * inverse2) + eps) + shrink * master[i];
    }
}

void adamw_update(acc_t *master, real_t *weights, acc_t *m, acc_t *v, acc_t *grads, const AdamPiece *pieces, int count,
                  int chunks, const AdamState *state, AdamOptions options, Stream *stream) {
    bool skipped = state->scale == 0; /* only then: a clip is a positive number over a finite norm */
#pragma omp parallel for schedule(static) if (chunks > 1)
    for (int i = 0; i < chunks; i++) {
        Chunk chunk = find_chunk(pieces, count, i);
        size_t at = chunk.begin;
        if (chunk.piece->trained && !skipped) {
            update_chunk(master + at, m + at, v + at, grads + at, chunk.count, chunk.piece->decay, state, options);
            for (size_t j = at; j < at + chunk.count && (void *)weights != (void *)master; j++) {
                weights[j] = (real_t)master[j];
            }
        }
        if (!chunk.piece->keep_grad) {
            memset(grads + at, 0, chunk.count * sizeof *grads);
        }
    }
}
