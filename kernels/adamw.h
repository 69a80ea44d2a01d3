/* AdamW (Loshchilov, Hutter 2017, arXiv 1711.05101) with clipping by the global gradient norm, without a host decision:
 * what a step does is decided by a small state beside the parameters.
 *
 *     norm = sqrt(sum g^2)             not finite: the step is skipped, the moments and weights stay
 *     c    = min(1, clip / norm)       m = b1 m + (1-b1) c g        v = b2 v + (1-b2) (c g)^2
 *     w   -= lr (m / (1-b1^t) / (sqrt(v / (1-b2^t)) + eps) + decay w)
 */
#ifndef KERNELS_ADAMW_H
#define KERNELS_ADAMW_H

#include <stddef.h>
#include <stdint.h>

#include "types.h"

typedef struct {
    int64_t updates; /* t: steps applied */
    int64_t skipped; /* steps skipped, in all */
    int64_t skipped_in_row;
    double norm;                     /* of this step's gradient, before clipping */
    double scale;                    /* c; 0 when this step is skipped */
    double correction1, correction2; /* 1 - b1^t, 1 - b2^t */
    double lr;                       /* of this step */
} AdamState;

typedef struct {
    double beta1, beta2, eps, clip; /* clip 0: off */
} AdamOptions;

/* A tensor's run of the flat buffers. A piece is worked on in chunks of ADAM_CHUNK elements, the last one shorter; the
 * chunks of all pieces are numbered through. */
typedef struct {
    size_t offset, count; /* elements */
    int first_chunk;
    int trained;   /* 0: frozen, nothing but its gradient changes */
    int keep_grad; /* 1: its gradient is left as it is, because the next step's overwrites it; 0: it is cleared */
    int spread;    /* 1: the piece is a part of a tensor, other ranks have the others; 0: all of it */
    double decay;
} AdamPiece;

enum { ADAM_CHUNK = 4096 }; /* on a GPU, what a block of threads reads at once */

/* Numbers the chunks of pieces whose count is set, and returns how many there are. pieces (count) on the host; what
 * follows takes them on the device. */
static inline int adamw_number_chunks(AdamPiece *pieces, int count) {
    int chunks = 0;
    for (int i = 0; i < count; i++) {
        pieces[i].first_chunk = chunks;
        chunks += (int)((pieces[i].count + ADAM_CHUNK - 1) / ADAM_CHUNK);
    }
    return chunks;
}

/* sums[i] = sum of squares of the gradient of piece i in a fixed order, 0 where the piece is frozen; sums (count),
 * partial (chunks) scratch */
void adamw_square_sums(double *sums, double *partial, const acc_t *grads, const AdamPiece *pieces, int count,
                       int chunks, Stream *stream);

/* sums[i] = the sum over `ranks` of all[r,i] in their order, for spread pieces; others keep theirs. sums (count), all
 * (ranks,count) */
void adamw_add_sums(double *sums, const double *all, const AdamPiece *pieces, int count, int ranks, Stream *stream);

/* state from the sums (count), the loss (skips as well when *loss is not finite) and the learning rate *lr, all on the
 * device: a recorded step can be repeated with another rate */
void adamw_begin(AdamState *state, const double *sums, int count, const acc_t *loss, const double *lr,
                 AdamOptions options, Stream *stream);

/* All pieces of the flat buffers: master, m, v updated; weights (the compute copy) written from master unless it is the
 * same array; grads read, and cleared unless keep_grad, those of frozen pieces and of a skipped step too. */
void adamw_update(acc_t *master, real_t *weights, acc_t *m, acc_t *v, acc_t *grads, const AdamPiece *pieces, int count,
                  int chunks, const AdamState *state, AdamOptions options, Stream *stream);

#endif
