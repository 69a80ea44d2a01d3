/* See adapter.h. The gradients of a dense adapter's matrices are products over all rows, for which matmul.h is better
 * than the experts' kernels: on a GPU these give a block to so many rows of a matrix, and the matrices are small.
 * Called by attention_block.c and perft.c. */
#include "adapter.h"

#include <math.h>
#include <stdio.h>

#include "../kernels/matmul.h"

ExpertShape adapter_shape(const ModelConfig *config, int E, int C, int H, int D, int rows) {
    return (ExpertShape){.E = E,
                         .C = C,
                         .H = H,
                         .D = D,
                         .rows = rows,
                         .act = config->perft_act,
                         .scale = config->perft_scale / config->perft_rank};
}

static void add_tensor(TensorList *tensors, TensorKind kind, int layer, double std, int E, int rows, int columns,
                       bool overwritten, const char *prefix, const char *part) {
    int t = E > 0 ? tensors_add(tensors, kind, layer, std, E, rows, columns, "%s.%s", prefix, part)
                  : tensors_add(tensors, kind, layer, std, rows, columns, 0, "%s.%s", prefix, part);
    tensors->items[t].adapter = true;
    tensors->items[t].grad_overwritten = overwritten;
}

void adapter_tensors(TensorList *tensors, const ModelConfig *config, TensorKind kind, int layer, ExpertShape shape,
                     const char *prefix) {
    int E = shape.E, D = experts_y_width(shape);
    add_tensor(tensors, kind, layer, sqrt(2.0 / config->perft_rank), E, shape.H, shape.C, E > 0, prefix, "a");
    add_tensor(tensors, kind, layer, 0, E, D, shape.H, E > 0, prefix, "b");
}

void adapter_reserve(Adapter *adapter, ExpertShape shape, size_t rows, Arena *arena) {
    adapter->shape = shape;
    arena_reserve(arena, (void **)&adapter->kept, rows * shape.H * sizeof(real_t), MEMORY_ACTIVATIONS);
}

void adapter_connect(Adapter *adapter, const TensorList *tensors, const char *prefix, const real_t *weights,
                     acc_t *grads) {
    char name[64];
    snprintf(name, sizeof name, "%s.a", prefix);
    int a = tensors_find(tensors, name);
    snprintf(name, sizeof name, "%s.b", prefix);
    int b = tensors_find(tensors, name);
    if (a < 0 || b < 0) {
        return;
    }
    size_t at_a = tensors->items[a].offset, at_b = tensors->items[b].offset;
    adapter->a = weights + at_a, adapter->da = grads ? grads + at_a : NULL;
    adapter->b = weights + at_b, adapter->db = grads ? grads + at_b : NULL;
}

void adapter_forward(const Adapter *adapter, AdapterScratch scratch, real_t *y, const real_t *x, Stream *stream) {
    RowSource rows = {x, NULL, 0};
    if (adapter->shape.H > 0) {
        experts_forward(y, adapter->kept, scratch.h, rows, adapter->a, adapter->b, scratch.all_rows, adapter->shape, 1,
                        stream);
    }
}

void adapter_backward(const Adapter *adapter, AdapterScratch scratch, real_t *dx, const real_t *dy, const real_t *x,
                      Stream *stream) {
    ExpertShape s = adapter->shape;
    RowSource dy_rows = {dy, NULL, 0};
    if (s.H > 0) {
        experts_backward_rows(dx, NULL, scratch.h, scratch.da, dy_rows, adapter->kept, NULL, adapter->a, adapter->b,
                              scratch.all_rows, s, 1, stream);
        matmul_backward_weight(adapter->db, dy, scratch.h, s.rows, s.H, experts_y_width(s), stream);
        matmul_backward_weight(adapter->da, scratch.da, x, s.rows, s.C, s.H, stream);
    }
}
