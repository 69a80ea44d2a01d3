/* The router's linear map in full precision: logits = x w^T. (Switch Transformer, arXiv 2101.03961, "selective
 * precision".)
 *
 * On the CPU, and on a GPU for bf16 activations, C a multiple of 8 and up to 16 experts, a token's logits have the same
 * bits in any company. Elsewhere a library multiplies, which may sum in another order for another N. */
#ifndef KERNELS_GATE_H
#define KERNELS_GATE_H

#include "types.h"

/* logits (N,E) = x (N,C) w (E,C)^T */
void gate_forward(acc_t *logits, const real_t *x, const acc_t *w, int N, int C, int E, Stream *stream);

/* dx (N,C) += dlogits w;  dw (E,C) += dlogits^T x */
void gate_backward(real_t *dx, acc_t *dw, const acc_t *dlogits, const real_t *x, const acc_t *w, int N, int C, int E,
                   Stream *stream);

#endif
