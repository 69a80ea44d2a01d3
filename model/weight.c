/* See weight.h. Called by transformer.c, attention_block.c and moe_memory.c when buffers have their addresses. */
#include "weight.h"

#include <stdarg.h>
#include <stdio.h>

#include "../kernels/matmul.h"
#include "freeze.h"

Weight weight_find(const TensorList *list, const real_t *weights, acc_t *grads, const char *name_format, ...) {
    char name[64];
    va_list arguments;
    va_start(arguments, name_format);
    vsnprintf(name, sizeof name, name_format, arguments);
    va_end(arguments);
    int index = tensors_find(list, name);
    if (index < 0) {
        return (Weight){0};
    }
    const Tensor *tensor = &list->items[index];
    bool wanted = grads && freeze_wants_gradient(tensor);
    return (Weight){weights + tensor->offset, wanted ? grads + tensor->offset : NULL};
}

void weight_backward(Weight w, const real_t *dy, const real_t *x, int N, int IN, int OUT, Stream *stream) {
    if (w.grad) {
        matmul_backward_weight(w.grad, dy, x, N, IN, OUT, stream);
    }
}
