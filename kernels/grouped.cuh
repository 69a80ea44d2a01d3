/* The five grouped products behind experts.h, as each path provides them. Rows of expert e are offset[e] ..
 * offset[e+1]; a row's inner width is C towards the tokens, A = 2H (SwiGLU) or H before the activation, H after
 * it.
 *
 *     up       a = x W1^T        h = act(a)                              x (rows,C) by index, W1 (E,A,C)
 *     down     y = h W2^T                                                W2 (E,C,H)
 *     hidden   u = dy W2         dw = <u, h>   h <- w h   da = act'(a) (w u)      dy (rows,C) by index
 *     input    dx = da W1
 *     weight   dW = left^T right, one sum over the rows of each expert: dW1 = da^T x, dW2 = dy^T (w h)
 *
 * Three paths, chosen once per call in experts.cu:
 *
 *     grouped_wgmma.cuh    Hopper: TMA, WGMMA, a persistent grid; bf16; widths multiples of 8, best of 64
 *     grouped_mma.cuh      Ampere and later: cp.async, mma.sync; bf16; widths multiples of 8
 *     grouped_plain.cuh    any width, any number type, any card: 4 x 4 elements to a thread
 *
 * All of them: no size but `shape` is known to the host, so a launch covers the most tiles that shape.rows rows in
 * shape.E experts can have and finds (expert, tile) from offset on the device. Rows of no expert keep their bits. Each
 * element of a result is summed by one thread or warp group over the inner width in ascending order, in steps that do
 * not depend on the number of rows: a row has the same bits in any company.
 */
#ifndef KERNELS_GROUPED_CUH
#define KERNELS_GROUPED_CUH

#include "cuda.cuh"
extern "C" {
#include "experts.h"
#include "plan.h"
}

/* What all five read. */
typedef struct {
    ExpertShape shape;
    const int *offset; /* (E+1) on the device */
    cudaStream_t stream;
    int add_parts; /* whether `hidden` adds to drow_weight */
} Grouped;

/* wgmma_down and wgmma_input also come as wgmma_down_to and wgmma_input_to, which store each row at its target.
 *
 * For PATH = wgmma, mma, plain (plain takes real_t of either type, the others bf16):
 *
 * a (rows,A), h (rows,H) overwritten
 *     void PATH_up(real_t *a, real_t *h, RowSource x, const real_t *w1, Grouped g);
 * y (rows,C) overwritten, or added to
 *     void PATH_down(real_t *y, const real_t *h, const real_t *w2, int add, Grouped g);
 * h (rows,H), da (rows,A), drow_weight (rows; may be NULL) overwritten, the last added to with add_parts; a (rows,A);
 * row_weight (rows), NULL: all 1. h is made again from a, not read.
 *     void PATH_hidden(real_t *h, real_t *da, acc_t *drow_weight, RowSource dy, const real_t *a,
 *                      const acc_t *row_weight, const real_t *w2, Grouped g);
 * dx (rows,C) overwritten, or added to
 *     void PATH_input(real_t *dx, const real_t *da, const real_t *w1, int add, Grouped g);
 * dw (E,M,N) = left (rows,M)^T right (rows,N), zeros for an expert without rows, or that is added to it, and those of
 * such an expert keep their bits; one of left and right may be by index
 *     void PATH_weight(acc_t *dw, RowSource left, RowSource right, int M, int N, int add, Grouped g);
 */

#endif
