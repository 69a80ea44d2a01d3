/* A parameter as a layer sees it: where a tensor of the list (tensors.h) lies in the flat buffers.
 *
 *     Weight w = weight_find(&list, weights, grads, "layers.%d.attn.qkv.w", l);
 *     matmul_forward(y, x, w.w, N, C, D, stream);    weight_backward(w, dy, x, N, C, D, stream);
 */
#ifndef MODEL_WEIGHT_H
#define MODEL_WEIGHT_H

#include "../kernels/device.h"
#include "tensors.h"

typedef struct {
    const real_t *w; /* NULL: the model has no such tensor */
    acc_t *grad;     /* NULL as well where nothing is trained, or this not */
} Weight;

/* The tensor of that name in the flat buffers of the list; grads may be NULL. */
Weight weight_find(const TensorList *list, const real_t *weights, acc_t *grads, const char *name_format, ...);

/* dw (OUT,IN) += dy^T x, dy (N,OUT), x (N,IN); nothing where the weight is frozen. */
void weight_backward(Weight w, const real_t *dy, const real_t *x, int N, int IN, int OUT, Stream *stream);

#endif
