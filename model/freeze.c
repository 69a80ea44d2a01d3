/* See freeze.h. Called by transformer.c, which makes the list, and weight.c; read by optimizer.c, console.c and the
 * log. */
#include "freeze.h"

static bool is_frozen(const Tensor *tensor, const Config *config) {
    Freeze freeze = config->train.freeze;
    if (tensor->kind == TENSOR_STATE) {
        return true;
    }
    if (config_has_adapters(&config->model)) {
        return !tensor->adapter;
    }
    return (freeze == FREEZE_EXPERTS && tensor->kind == TENSOR_EXPERT) ||
           (freeze == FREEZE_ROUTER && tensor->kind == TENSOR_ROUTER) ||
           (freeze == FREEZE_ALL_BUT_ROUTER && tensor->kind != TENSOR_ROUTER);
}

void freeze_tensors(TensorList *tensors, const Config *config) {
    for (int t = 0; t < tensors->count; t++) {
        tensors->items[t].frozen = is_frozen(&tensors->items[t], config);
    }
}

bool freeze_holds_routers(const Config *config) {
    return config->train.freeze == FREEZE_ROUTER || config_has_adapters(&config->model);
}

bool freeze_wants_gradient(const Tensor *tensor) {
    return !tensor->frozen || tensor->ndim < 2 || tensor->kind == TENSOR_ROUTER;
}

size_t freeze_trainable(const TensorList *tensors) {
    size_t trainable = 0;
    for (int t = 0; t < tensors->count; t++) {
        const Tensor *tensor = &tensors->items[t];
        trainable += tensor->frozen ? 0 : tensor->count * tensor->parts;
    }
    return trainable;
}
