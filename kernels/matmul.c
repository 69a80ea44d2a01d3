/* The three products are one routine with other strides: see tile.h. */
#include "matmul.h"

#include "tile.h"

void matmul_forward(real_t *y, const real_t *x, const real_t *w, int N, int IN, int OUT, Stream *stream) {
    parallel_multiply(y, x, IN, 1, w, 1, IN, N, OUT, IN, 0);
}

void matmul_backward_input(real_t *dx, const real_t *dy, const real_t *w, int N, int IN, int OUT, int accumulate,
                           Stream *stream) {
    parallel_multiply(dx, dy, OUT, 1, w, IN, 1, N, IN, OUT, accumulate);
}

void matmul_backward_weight(acc_t *dw, const real_t *dy, const real_t *x, int N, int IN, int OUT, Stream *stream) {
    parallel_multiply(dw, dy, 1, OUT, x, IN, 1, OUT, IN, N, 1);
}
