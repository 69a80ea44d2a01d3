/* Softmax and cross-entropy of next-token prediction in one pass over the logits.
 *
 *     loss_n = lse(l_n) - l_n[target]          dl_nv = scale (softmax(l_n)_v - 1[v = target])
 */
#ifndef KERNELS_CROSS_ENTROPY_H
#define KERNELS_CROSS_ENTROPY_H

#include "types.h"

/* losses (N), nats; logits (N,V) */
void cross_entropy_forward(acc_t *losses, const real_t *logits, const int *targets, int N, int V, Stream *stream);

/* The same, and logits become their own gradient. */
void cross_entropy_forward_backward(acc_t *losses, real_t *logits, const int *targets, int N, int V, double scale,
                                    Stream *stream);

/* *mean = sum of values (N) / N, added in a fixed order */
void mean_forward(acc_t *mean, const acc_t *values, int N, Stream *stream);

#endif
