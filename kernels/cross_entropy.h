/* Softmax and cross-entropy of token prediction in one pass over the logits.
 *
 *     loss_n = lse(l_n) - l_n[target]          dl_nv = scale (softmax(l_n)_v - 1[v = target])
 *
 * A target of -1 is not predicted (masked-token prediction predicts few of its positions): its loss is 0 and its row of
 * the gradient is 0, whatever its logits are, NaN too.
 */
#ifndef KERNELS_CROSS_ENTROPY_H
#define KERNELS_CROSS_ENTROPY_H

#include "types.h"

/* losses (N), nats; logits (N,V) */
void cross_entropy_forward(acc_t *losses, const real_t *logits, const int *targets, int N, int V, Stream *stream);

/* The same, and logits become their own gradient. */
void cross_entropy_forward_backward(acc_t *losses, real_t *logits, const int *targets, int N, int V, double scale,
                                    Stream *stream);

/* *mean = sum of values (N) / count, added in a fixed order; count >= 1 is how many of them are predicted */
void mean_forward(acc_t *mean, const acc_t *values, int N, int count, Stream *stream);

#endif
