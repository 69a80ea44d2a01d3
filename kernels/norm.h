/* RMSNorm with the residual addition before it (Zhang, Sennrich 2019, arXiv 1910.07467).
 *
 *     s = x + add                  r = 1 / sqrt(mean_c s_c^2 + eps)            y_c = s_c r w_c
 *     dw_c += sum_n dy_c s_c r     ds_c += r (dy_c w_c - s_c r^2 mean_j(dy_j w_j s_j))
 */
#ifndef KERNELS_NORM_H
#define KERNELS_NORM_H

#include "types.h"

/* sum (N,C) = x + add, the residual stream after the addition; with add NULL nothing is added and sum is not written
 * (may be NULL). y (N,C), rstd (N), x (N,C), w (C). */
void norm_forward(real_t *sum, real_t *y, acc_t *rstd, const real_t *x, const real_t *add, const real_t *w, int N,
                  int C, double eps, Stream *stream);

/* ds (N,C) accumulates: it already holds the residual stream's own gradient. dw (C) accumulates. dy (N,C); s (N,C) is
 * what was normalised. */
void norm_backward(real_t *ds, acc_t *dw, const real_t *dy, const real_t *s, const acc_t *rstd, const real_t *w, int N,
                   int C, Stream *stream);

#endif
