/* On the CPU acc_t is real_t, so the router's product is the ordinary one. */
#include "gate.h"

#include "tile.h"

void gate_forward(acc_t *logits, const real_t *x, const acc_t *w, int N, int C, int E, Stream *stream) {
    parallel_multiply(logits, x, C, 1, w, 1, C, N, E, C, 0);
}

void gate_backward(real_t *dx, acc_t *dw, const acc_t *dlogits, const real_t *x, const acc_t *w, int N, int C, int E,
                   Stream *stream) {
    parallel_multiply(dx, dlogits, E, 1, w, C, 1, N, C, E, 1);
    parallel_multiply(dw, dlogits, 1, E, x, C, 1, E, C, N, 1);
}
