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
} AdamState;

typedef struct {
    double lr, beta1, beta2, eps, decay, clip; /* clip 0: off */
} AdamOptions;

/* sums[i] = sum of squares of grads[offset[i] .. offset[i] + count[i]) in a fixed order; sums (pieces) on the device,
 * offset and count (pieces) on the host */
void adamw_square_sums(double *sums, const acc_t *grads, const size_t *offset, const size_t *count, int pieces,
                       Stream *stream);

/* state from the sums and the loss (skips as well when *loss is not finite); state, sums, loss on the device */
void adamw_begin(AdamState *state, const double *sums, int pieces, const acc_t *loss, AdamOptions options,
                 Stream *stream);

/* One piece of `count` parameters: master, m, v updated; weights (the compute copy) written from master unless it is
 * the same array. */
void adamw_update(acc_t *master, real_t *weights, acc_t *m, acc_t *v, const acc_t *grads, size_t count,
                  const AdamState *state, AdamOptions options, Stream *stream);

#endif
