/* See lora.h. Read next: adapter.c. */
#include "lora.h"

#include <stdio.h>

enum { PREFIX_TEXT = 64 };

static void prefix_of(char prefix[PREFIX_TEXT], int layer, const char *projection) {
    snprintf(prefix, PREFIX_TEXT, "layers.%d.attn.%s.lora", layer, projection);
}

static ExpertShape qkv_shape(const ModelConfig *c, int E, LoraWidths widths, int rows) {
    return adapter_shape(c, E, c->dim, c->perft_rank, widths.qkv, rows);
}

static ExpertShape out_shape(const ModelConfig *c, int E, LoraWidths widths, int rows) {
    return adapter_shape(c, E, widths.att, c->perft_rank, c->dim, rows);
}

void lora_tensors(TensorList *tensors, const ModelConfig *config, int layer, LoraWidths widths) {
    char prefix[PREFIX_TEXT];
    if (config->lora == LORA_ATTENTION) {
        prefix_of(prefix, layer, "qkv");
        adapter_tensors(tensors, config, TENSOR_DENSE, layer, qkv_shape(config, 0, widths, 0), prefix);
        prefix_of(prefix, layer, "out");
        adapter_tensors(tensors, config, TENSOR_DENSE, layer, out_shape(config, 0, widths, 0), prefix);
    }
}

void lora_reserve(Lora *lora, const ModelConfig *config, int N, LoraWidths widths, Arena *arena) {
    if (config->lora == LORA_ATTENTION) {
        adapter_reserve(&lora->qkv, qkv_shape(config, 1, widths, N), N, arena);
        adapter_reserve(&lora->out, out_shape(config, 1, widths, N), N, arena);
    }
}

void lora_connect(Lora *lora, const TensorList *tensors, int layer, const real_t *weights, acc_t *grads) {
    char prefix[PREFIX_TEXT];
    prefix_of(prefix, layer, "qkv");
    adapter_connect(&lora->qkv, tensors, prefix, weights, grads);
    prefix_of(prefix, layer, "out");
    adapter_connect(&lora->out, tensors, prefix, weights, grads);
}
