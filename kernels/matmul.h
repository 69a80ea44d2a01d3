/* The dense product of a linear layer without bias; weights are stored (OUT,IN) as in torch.nn.Linear.
 *
 *     y = x w^T          dx = dy w          dw += dy^T x
 *
 * On the CPU each element of a result is one chain of fused multiply-adds in order of the inner index, whatever the
 * number of threads and however rows are batched: the same row gives the same bits alone or among others. On a GPU
 * cuBLAS multiplies: the same sizes give the same bits.
 */
#ifndef KERNELS_MATMUL_H
#define KERNELS_MATMUL_H

#include "types.h"

/* y (N,OUT) = x (N,IN) w (OUT,IN)^T */
void matmul_forward(real_t *y, const real_t *x, const real_t *w, int N, int IN, int OUT, Stream *stream);

/* dx (N,IN) = dy (N,OUT) w (OUT,IN); added to dx when accumulate is 1 */
void matmul_backward_input(real_t *dx, const real_t *dy, const real_t *w, int N, int IN, int OUT, int accumulate,
                           Stream *stream);

/* dw (OUT,IN) += dy (N,OUT)^T x (N,IN) */
void matmul_backward_weight(acc_t *dw, const real_t *dy, const real_t *x, int N, int IN, int OUT, Stream *stream);

#endif
