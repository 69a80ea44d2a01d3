/* The experts: E two-layer networks, each over its own rows offset[e] .. offset[e+1].
 *
 *     SwiGLU   a = x W1^T, W1 (2H,C): gate rows first, then up     h = silu(a_gate) * a_up      y = h W2^T, W2 (C,H)
 *     GELU     a = x W1^T, W1 (H,C)                                h = gelu(a) (tanh form)      y = h W2^T
 *     SiLU     likewise                                            h = s silu(a), s a constant
 *     identity likewise: a product of low rank (LoRA)              h = s a
 *
 * The last two are for adapters, whose H is small (model/adapter.h): a GPU computes them without tensor cores.
 *
 * Backward, with dy the gradient of the combined output in row order (not yet weighted) and w the row's combine weight:
 *
 *     u   = dy W2                     the gradient of h, were the weight 1
 *     dw  = <u, h>                    the gate's gradient: it equals <dy, y> and needs no stored y
 *     dW2 = dy^T (w h)                da = act'(a) (w u)          dW1 = da^T x           dx = da W1
 */
#ifndef KERNELS_EXPERTS_H
#define KERNELS_EXPERTS_H

#include <stdbool.h>

#include "peers.h"
#include "plan.h"

typedef enum { ACT_SWIGLU, ACT_GELU, ACT_IDENTITY, ACT_SILU } Activation;

typedef struct {
    int E, C, H;
    int rows; /* length of the row arrays */
    Activation act;
    /* of ACT_SILU and ACT_IDENTITY alone */
    int D;        /* columns of y and dy, rows of W2; 0: C */
    double scale; /* s; 0: 1 */
} ExpertShape;

/* Columns of a: 2H for SwiGLU, H for the others. */
static inline int experts_a_width(ExpertShape shape) {
    return shape.act == ACT_SWIGLU ? 2 * shape.H : shape.H;
}

/* Columns of y. */
static inline int experts_y_width(ExpertShape shape) {
    return shape.D > 0 ? shape.D : shape.C;
}

static inline double experts_scale(ExpertShape shape) {
    return shape.scale != 0 ? shape.scale : 1;
}

/* y (rows,C) = the experts' outputs, unweighted, added to y when add_y is 1; a (rows, 2H or H) is saved for the
 * backward; h (rows,H) is scratch; x: rows (rows,C), by index only where dispatch_forward gives such (dispatch.h);
 * w1 (E, 2H or H, C); w2 (E, C or D, H); offset (E+1), on the device. */
void experts_forward(real_t *y, real_t *a, real_t *h, RowSource x, const real_t *w1, const real_t *w2,
                     const int *offset, ExpertShape shape, int add_y, Stream *stream);

/* a again, the same bits as experts_forward's, where it was not kept; h (rows,H) is scratch. */
void experts_forward_again(real_t *a, real_t *h, RowSource x, const real_t *w1, const int *offset, ExpertShape shape,
                           Stream *stream);

/* Backward in two halves, so that dx can leave before the weights' gradients are made:
 *
 * rows: dx (rows,C) and drow_weight (rows) overwritten, or added to when add_dx is 1; drow_weight NULL with row_weight
 * NULL (all weights 1); h (rows,H) and da (rows, 2H or H) are made for the other half; dy: rows (rows,C), as x;
 * row_weight (rows); a, w1, w2, offset as in the forward.
 * weights: dw1, dw2 overwritten, or added to when add_dw is 1: for an expert without rows the one means zeros, the
 * other that they keep their bits; h, da from the first half; dy as there, x as in the forward. */
void experts_backward_rows(real_t *dx, acc_t *drow_weight, real_t *h, real_t *da, RowSource dy, const real_t *a,
                           const acc_t *row_weight, const real_t *w1, const real_t *w2, const int *offset,
                           ExpertShape shape, int add_dx, Stream *stream);
void experts_backward_weights(acc_t *dw1, acc_t *dw2, const real_t *h, const real_t *da, RowSource dy, RowSource x,
                              const int *offset, ExpertShape shape, int add_dw, Stream *stream);

/* The same where the rows of y, or dx, are wanted elsewhere, such as in the memory of other ranks: each goes to its
 * place of `to`, overwritten; y, or dx, (rows,C) is scratch. */
void experts_forward_to(RowTarget to, real_t *y, real_t *a, real_t *h, RowSource x, const real_t *w1, const real_t *w2,
                        const int *offset, ExpertShape shape, Stream *stream);
void experts_backward_rows_to(RowTarget to, real_t *dx, acc_t *drow_weight, real_t *h, real_t *da, RowSource dy,
                              const real_t *a, const acc_t *row_weight, const real_t *w1, const real_t *w2,
                              const int *offset, ExpertShape shape, Stream *stream);

/* Whether their products store the rows where they go, beside their other work. Otherwise they are made here first. */
bool experts_store_rows(ExpertShape shape);

/* Both. */
static inline void experts_backward(real_t *dx, acc_t *drow_weight, acc_t *dw1, acc_t *dw2, real_t *h, real_t *da,
                                    RowSource dy, RowSource x, const real_t *a, const acc_t *row_weight,
                                    const real_t *w1, const real_t *w2, const int *offset, ExpertShape shape,
                                    int add_dx, int add_dw, Stream *stream) {
    experts_backward_rows(dx, drow_weight, h, da, dy, a, row_weight, w1, w2, offset, shape, add_dx, stream);
    experts_backward_weights(dw1, dw2, h, da, dy, x, offset, shape, add_dw, stream);
}

#endif
