/* The experts as a bf16 device computes them, for a CPU that stands in for one (case.h): h and da have been rounded
 * when the next product reads them. Inside the CPU's experts_forward and experts_backward they never leave float.
 *
 * The kernels run as they are for what comes before that rounding: a, h, da and the gradient of the row weights. Their
 * other results are thrown away and made again, an expert at a time, with the products of a linear layer. On a device
 * each is one call of the kernel that experts.h names. Called by operations_moe.h.
 */
#ifndef TESTS_OPERATIONS_STORED_H
#define TESTS_OPERATIONS_STORED_H

#include "case.h"

#include "../kernels/experts.h"
#include "../kernels/matmul.h"

/* h = act(a), of the a that was stored: the backward makes the same h again (experts.h). */
static inline void activate_stored(acc_t *h, const acc_t *a, const int *offset, ExpertShape shape) {
    size_t H = (size_t)shape.H, A = (size_t)experts_a_width(shape);
    for (size_t r = (size_t)offset[0]; r < (size_t)offset[shape.E]; r++) {
        for (size_t i = 0; i < H; i++) {
            double x = (double)a[r * A + i];
            double value = x;
            if (shape.act == ACT_GELU) {
                value = 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
            } else if (shape.act != ACT_IDENTITY) {
                value = x / (1 + exp(-x));
            }
            bool gated = shape.act == ACT_SWIGLU;
            h[r * H + i] = (acc_t)(value * (gated ? (double)a[r * A + H + i] : experts_scale(shape)));
        }
    }
}

static inline void experts_stored_forward(Case *c, real_t *y, real_t *a, real_t *h, RowSource x, const real_t *w1,
                                          const real_t *w2, const int *offset, ExpertShape shape, int add_y) {
    if (!c->stores_bf16) {
        experts_forward(y, a, h, x, w1, w2, offset, shape, add_y, NULL);
        return;
    }
    size_t D = (size_t)experts_y_width(shape), H = (size_t)shape.H;
    acc_t *product = case_reals(c, (size_t)shape.rows * D), *sum = (acc_t *)y;
    experts_forward((real_t *)product, a, h, x, w1, w2, offset, shape, 0, NULL);
    stored(c, a);
    activate_stored((acc_t *)h, (const acc_t *)a, offset, shape);
    stored(c, h);
    for (int e = 0; e < shape.E; e++) {
        size_t first = (size_t)offset[e];
        matmul_forward((real_t *)(product + first * D), h + first * H, w2 + e * D * H, offset[e + 1] - offset[e],
                       shape.H, (int)D, NULL);
    }
    for (size_t i = (size_t)offset[0] * D; i < (size_t)offset[shape.E] * D; i++) {
        sum[i] = product[i] + (add_y ? sum[i] : 0);
    }
}

static inline void experts_stored_backward(Case *c, real_t *dx, acc_t *drow_weight, acc_t *dw1, acc_t *dw2, real_t *h,
                                           real_t *da, RowSource dy, RowSource x, const real_t *a,
                                           const acc_t *row_weight, const real_t *w1, const real_t *w2,
                                           const int *offset, ExpertShape shape, int add_dx, int add_dw) {
    if (!c->stores_bf16) {
        experts_backward(dx, drow_weight, dw1, dw2, h, da, dy, x, a, row_weight, w1, w2, offset, shape, add_dx, add_dw,
                         NULL);
        return;
    }
    size_t C = (size_t)shape.C, H = (size_t)shape.H, A = (size_t)experts_a_width(shape), E = (size_t)shape.E;
    size_t D = (size_t)experts_y_width(shape);
    acc_t *unused = case_reals(c, (size_t)shape.rows * C + E * A * C + E * D * H);
    acc_t *unused_dw1 = unused + (size_t)shape.rows * C, *unused_dw2 = unused_dw1 + E * A * C;
    experts_backward((real_t *)unused, drow_weight, unused_dw1, unused_dw2, h, da, dy, x, a, row_weight, w1, w2, offset,
                     shape, add_dx, 0, NULL);
    stored(c, h);
    stored(c, da);
    if (!add_dw) {
        memset(dw1, 0, E * A * C * sizeof *dw1);
        memset(dw2, 0, E * D * H * sizeof *dw2);
    }
    for (int e = 0; e < shape.E; e++) {
        size_t first = (size_t)offset[e];
        int rows = offset[e + 1] - offset[e];
        matmul_backward_input(dx + first * C, da + first * A, w1 + e * A * C, rows, shape.C, (int)A, add_dx, NULL);
        matmul_backward_weight(dw1 + e * A * C, da + first * A, x.x + first * C, rows, shape.C, (int)A, NULL);
        matmul_backward_weight(dw2 + e * D * H, dy.x + first * D, h + first * H, rows, shape.H, (int)D, NULL);
    }
}

#endif
