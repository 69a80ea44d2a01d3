/* Token embedding: x[n] = w[tokens[n]].  Backward: dw[v] += sum over the n with tokens[n] = v of dx[n], in order of n.
 */
#ifndef KERNELS_EMBEDDING_H
#define KERNELS_EMBEDDING_H

#include "types.h"

/* x (N,C); tokens (N), each below V; w (V,C). */
void embedding_forward(real_t *x, const int *tokens, const real_t *w, int N, int C, Stream *stream);

/* dw (V,C) accumulates; dx (N,C). */
void embedding_backward(acc_t *dw, const real_t *dx, const int *tokens, int N, int C, int V, Stream *stream);

#endif
