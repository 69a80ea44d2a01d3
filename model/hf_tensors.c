/* The weights' names in Hugging Face transformers: see hf_tensors.h.
 *
 * Most tensors have one name here and one there: the table RENAMED. The three that hold several of theirs are cut into
 * runs of rows, front to back: attn.qkv.w, and w1 and w2 of the MLPs.
 *
 * Called by hf_export.c and hf_weights.c. Read next: hf_export.c.
 */
#include "hf_tensors.h"

#include <assert.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"

/* Here without "layers.N.", there without "model.layers.N."; outside the layers whole names. */
static const char *const RENAMED[][2] = {
    {"embedding.w", "model.embed_tokens.weight"},
    {"final_norm.w", "model.norm.weight"},
    {"head.w", "lm_head.weight"},
    {"attn_norm.w", "input_layernorm.weight"},
    {"ffn_norm.w", "post_attention_layernorm.weight"},
    {"attn.q_norm.w", "self_attn.q_norm.weight"},
    {"attn.k_norm.w", "self_attn.k_norm.weight"},
    {"attn.out.w", "self_attn.o_proj.weight"},
};

enum { GATE, UP, DOWN };
static const char *const PROJECTIONS[] = {"gate_proj", "up_proj", "down_proj"};
static const char *const MIXTRAL_PROJECTIONS[] = {"w1", "w3", "w2"};

typedef struct {
    HfTensor *items;
    int count, capacity;
    size_t offset; /* where the next one begins */
} Parts;

/* Appends what follows in the flat buffer: (d0,d1), or (d0) with d1 0. */
__attribute__((format(printf, 4, 5))) static void add_part(Parts *parts, int64_t d0, int64_t d1, const char *format,
                                                           ...) {
    if (parts->count == parts->capacity) {
        parts->capacity = parts->capacity ? 2 * parts->capacity : 64;
        parts->items = realloc(parts->items, (size_t)parts->capacity * sizeof *parts->items);
        CHECK(parts->items, "out of memory for a list of %d tensors: make the model smaller", parts->capacity);
    }
    HfTensor *part = &parts->items[parts->count++];
    *part = (HfTensor){.ndim = d1 ? 2 : 1, .shape = {d0, d1}, .offset = parts->offset};
    part->count = (size_t)d0 * (size_t)(d1 ? d1 : 1);
    parts->offset += part->count;
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(part->name, sizeof part->name, format, arguments);
    va_end(arguments);
    assert(length > 0 && (size_t)length < sizeof part->name);
    (void)length; /* read by assert alone */
}

static void add_attention(Parts *parts, const ModelConfig *model, int layer) {
    static const char *const names[] = {"q_proj", "k_proj", "v_proj"};
    for (int i = 0; i < 3; i++) {
        int heads = i == 0 ? model->heads : model->kv_heads;
        add_part(parts, (int64_t)heads * model->head_dim, model->dim, "model.layers.%d.self_attn.%s.weight", layer,
                 names[i]);
    }
}

/* w1 (2H,C) or w2 (C,H) of one MLP. prefix: "model.layers.0.mlp". */
static void add_mlp(Parts *parts, const int *shape, bool is_w1, const char *prefix, const char *const *projections) {
    if (is_w1) {
        add_part(parts, shape[0] / 2, shape[1], "%s.%s.weight", prefix, projections[GATE]);
        add_part(parts, shape[0] / 2, shape[1], "%s.%s.weight", prefix, projections[UP]);
    } else {
        add_part(parts, shape[0], shape[1], "%s.%s.weight", prefix, projections[DOWN]);
    }
}

static void add_experts(Parts *parts, const Tensor *tensor, bool is_w1, bool mixtral) {
    char prefix[96];
    for (int e = 0; e < tensor->shape[0]; e++) {
        snprintf(prefix, sizeof prefix, "model.layers.%d.%s.experts.%d", tensor->layer,
                 mixtral ? "block_sparse_moe" : "mlp", e);
        add_mlp(parts, tensor->shape + 1, is_w1, prefix, mixtral ? MIXTRAL_PROJECTIONS : PROJECTIONS);
    }
}

static void add_renamed(Parts *parts, const Tensor *tensor, const char *name) {
    size_t i = 0;
    while (i < sizeof RENAMED / sizeof *RENAMED && strcmp(RENAMED[i][0], name) != 0) {
        i++;
    }
    assert(i < sizeof RENAMED / sizeof *RENAMED && tensor->ndim <= 2);
    if (tensor->layer < 0) {
        add_part(parts, tensor->shape[0], tensor->shape[1], "%s", RENAMED[i][1]);
    } else {
        add_part(parts, tensor->shape[0], tensor->shape[1], "model.layers.%d.%s", tensor->layer, RENAMED[i][1]);
    }
}

HfTensor *hf_tensors(const TensorList *tensors, const ModelConfig *model, HfArchitecture architecture, int *count) {
    Parts parts = {0};
    bool mixtral = architecture == HF_MIXTRAL;
    for (int t = 0; t < tensors->count; t++) {
        const Tensor *tensor = &tensors->items[t];
        char prefix[64];
        int length = tensor->layer < 0 ? 0 : snprintf(prefix, sizeof prefix, "layers.%d.", tensor->layer);
        const char *name = tensor->name + length;
        parts.offset = tensor->offset;
        if (!strcmp(name, "attn.qkv.w")) {
            add_attention(&parts, model, tensor->layer);
        } else if (!strcmp(name, "moe.router.w")) {
            add_part(&parts, tensor->shape[0], tensor->shape[1], "model.layers.%d.%s.gate.weight", tensor->layer,
                     mixtral ? "block_sparse_moe" : "mlp");
        } else if (!strncmp(name, "moe.experts.", strlen("moe.experts."))) {
            add_experts(&parts, tensor, !strcmp(name, "moe.experts.w1"), mixtral);
        } else if (!strncmp(name, "mlp.", strlen("mlp."))) {
            snprintf(prefix, sizeof prefix, "model.layers.%d.mlp", tensor->layer);
            add_mlp(&parts, tensor->shape, !strcmp(name, "mlp.w1"), prefix, PROJECTIONS);
        } else {
            add_renamed(&parts, tensor, name);
        }
        assert(parts.offset == tensor->offset + tensor->count);
    }
    *count = parts.count;
    return parts.items;
}
