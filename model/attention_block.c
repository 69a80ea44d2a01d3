/* See attention_block.h: parameters and memory first, then forward and backward of the parts in the order the data
 * takes, then of the whole block. Called by transformer.c. Read next: moe.c.
 */
#include "attention_block.h"

#include <math.h>

#include "../kernels/attention.h"
#include "../kernels/matmul.h"
#include "../kernels/rope.h"

static int qkv_width(const ModelConfig *config) {
    return (config->heads + 2 * config->kv_heads) * config->head_dim;
}

static int qk_width(const ModelConfig *config) {
    return (config->heads + config->kv_heads) * config->head_dim;
}

/* Columns of what attention puts out: all query heads side by side; C unless --head-dim says otherwise. */
static int att_width(const ModelConfig *config) {
    return config->heads * config->head_dim;
}

/* ---- parameters and memory ---- */

static LoraWidths lora_widths(const ModelConfig *config) {
    return (LoraWidths){.qkv = qkv_width(config), .att = att_width(config)};
}

void attention_block_tensors(TensorList *tensors, const ModelConfig *c, int layer) {
    double std = 0.02, out_std = std / sqrt(2.0 * c->layers), ones = -1;
    int C = c->dim, HS = c->head_dim;
    tensors_add(tensors, TENSOR_DENSE, layer, std, qkv_width(c), C, 0, "layers.%d.attn.qkv.w", layer);
    if (c->qk_norm) {
        tensors_add(tensors, TENSOR_DENSE, layer, ones, HS, 0, 0, "layers.%d.attn.q_norm.w", layer);
        tensors_add(tensors, TENSOR_DENSE, layer, ones, HS, 0, 0, "layers.%d.attn.k_norm.w", layer);
    }
    tensors_add(tensors, TENSOR_DENSE, layer, out_std, C, att_width(c), 0, "layers.%d.attn.out.w", layer);
    lora_tensors(tensors, c, layer, lora_widths(c));
}

static void reserve(Arena *arena, void *slot, size_t count, size_t size, MemoryCategory category) {
    arena_reserve(arena, slot, count * size, category);
}

void attention_block_reserve(AttentionBlock *block, const AttentionShared *shared, int layer, Arena *arena) {
    const ModelConfig *c = shared->config;
    size_t N = shared->N;
    MemoryCategory kind = MEMORY_ACTIVATIONS;
    if (layer == 0 || !shared->recompute) {
        reserve(arena, &block->qk_turned, N * qk_width(c), sizeof(real_t), kind);
    }
    if (layer == 0 || shared->recompute != RECOMPUTE_EXPERTS) {
        reserve(arena, &block->qkv_raw, N * qkv_width(c), sizeof(real_t), kind);
    }
    reserve(arena, &block->qk_rstd, N * (c->heads + c->kv_heads), sizeof(acc_t), kind);
    reserve(arena, &block->att, N * att_width(c), sizeof(real_t), kind);
    reserve(arena, &block->lse, N * c->heads, sizeof(acc_t), kind);
    if (shared->decodes) {
        size_t cache = (size_t)shared->B * shared->cached * c->kv_heads * c->head_dim;
        reserve(arena, &block->keys, cache, sizeof(real_t), MEMORY_CACHE);
        reserve(arena, &block->values, cache, sizeof(real_t), MEMORY_CACHE);
    }
    lora_reserve(&block->lora, c, shared->N, lora_widths(c), arena);
}

void attention_block_connect(AttentionBlock *block, const AttentionShared *shared, const AttentionBlock *first,
                             const TensorList *tensors, int layer, const real_t *weights, acc_t *grads) {
    if (shared->recompute) {
        block->qk_turned = first->qk_turned;
    }
    if (shared->recompute == RECOMPUTE_EXPERTS) {
        block->qkv_raw = first->qkv_raw;
    }
    block->qkv = weight_find(tensors, weights, grads, "layers.%d.attn.qkv.w", layer);
    block->q_norm = weight_find(tensors, weights, grads, "layers.%d.attn.q_norm.w", layer);
    block->k_norm = weight_find(tensors, weights, grads, "layers.%d.attn.k_norm.w", layer);
    block->out = weight_find(tensors, weights, grads, "layers.%d.attn.out.w", layer);
    lora_connect(&block->lora, tensors, layer, weights, grads);
}

void attention_shared_reserve(AttentionShared *shared, bool backward, Arena *arena) {
    const ModelConfig *c = shared->config;
    size_t N = shared->N;
    reserve(arena, &shared->angles, (size_t)c->seq * c->head_dim, sizeof(acc_t), MEMORY_ACTIVATIONS);
    if (backward) {
        reserve(arena, &shared->dqkv, N * qkv_width(c), sizeof(real_t), MEMORY_ACTIVATIONS);
        reserve(arena, &shared->datt, N * att_width(c), sizeof(real_t), MEMORY_ACTIVATIONS);
    }
}

void attention_shared_connect(AttentionShared *shared) {
    const ModelConfig *c = shared->config;
    rope_table(shared->angles, c->seq, c->head_dim, c->rope_base, NULL);
}

/* ---- forward and backward ---- */

static RopeShape rope_shape(const AttentionShared *shared, int start) {
    const ModelConfig *c = shared->config;
    return (RopeShape){.N = shared->N,
                       .T = shared->T,
                       .start = start,
                       .NH = c->heads,
                       .NKV = c->kv_heads,
                       .HS = c->head_dim,
                       .base = c->rope_base,
                       .eps = c->norm_eps};
}

/* T is the length of the cache in generation. */
static AttentionShape attention_shape(const AttentionShared *shared) {
    const ModelConfig *c = shared->config;
    return (AttentionShape){.B = shared->B,
                            .T = shared->decodes ? shared->cached : shared->T,
                            .NH = c->heads,
                            .NKV = c->kv_heads,
                            .HS = c->head_dim,
                            .causal = c->objective == OBJECTIVE_LM};
}

/* Queries, keys and values, from the normalised stream. */
static void project(AttentionBlock *block, const AttentionShared *shared, AdapterScratch scratch, const real_t *xn,
                    Stream *stream) {
    const ModelConfig *c = shared->config;
    matmul_forward(block->qkv_raw, xn, block->qkv.w, shared->N, c->dim, qkv_width(c), stream);
    adapter_forward(&block->lora.qkv, scratch, block->qkv_raw, xn, stream);
}

static void turn(AttentionBlock *block, const AttentionShared *shared, int start, Stream *stream) {
    rope_forward(block->qk_turned, block->qk_rstd, block->qkv_raw, block->q_norm.w, block->k_norm.w, shared->angles,
                 rope_shape(shared, start), stream);
}

void attention_block_forward(AttentionBlock *block, const AttentionShared *shared, AdapterScratch scratch,
                             real_t *branch, const real_t *xn, int start, Profile *profile, Stream *stream) {
    const ModelConfig *c = shared->config;
    AttentionShape shape = attention_shape(shared);
    profile_stage(profile, STAGE_ATTENTION, stream);
    project(block, shared, scratch, xn, stream);
    turn(block, shared, start, stream);
    if (shared->decodes) {
        attention_decode(block->att, block->keys, block->values, block->qk_turned, block->qkv_raw, start, shape,
                         stream);
    } else {
        attention_forward(block->att, block->lse, block->qk_turned, block->qkv_raw, shape, stream);
    }
    if (block->keys && !shared->decodes) {
        attention_keep(block->keys, block->values, block->qk_turned, block->qkv_raw, shared->cached, shape, stream);
    }
    matmul_forward(branch, block->att, block->out.w, shared->N, att_width(c), c->dim, stream);
    adapter_forward(&block->lora.out, scratch, branch, block->att, stream);
}

void attention_block_backward(AttentionBlock *block, const AttentionShared *shared, AdapterScratch scratch, real_t *dxn,
                              const real_t *dbranch, const real_t *xn, Profile *profile, Stream *stream) {
    const ModelConfig *c = shared->config;
    int N = shared->N, C = c->dim;
    real_t *dqkv = shared->dqkv, *datt = shared->datt;
    profile_stage(profile, STAGE_ATTENTION, stream);
    if (shared->recompute == RECOMPUTE_EXPERTS) {
        project(block, shared, scratch, xn, stream);
    }
    if (shared->recompute) {
        turn(block, shared, 0, stream);
    }
    matmul_backward_input(datt, dbranch, block->out.w, N, att_width(c), C, 0, stream);
    weight_backward(block->out, dbranch, block->att, N, att_width(c), C, stream);
    adapter_backward(&block->lora.out, scratch, datt, dbranch, block->att, stream);
    attention_backward(dqkv, datt, block->att, block->lse, block->qk_turned, block->qkv_raw, attention_shape(shared),
                       stream);
    rope_backward(dqkv, block->q_norm.grad, block->k_norm.grad, block->qk_rstd, block->qkv_raw, block->q_norm.w,
                  block->k_norm.w, shared->angles, rope_shape(shared, 0), stream);
    matmul_backward_input(dxn, dqkv, block->qkv.w, N, C, qkv_width(c), 0, stream);
    weight_backward(block->qkv, dqkv, xn, N, C, qkv_width(c), stream);
    adapter_backward(&block->lora.qkv, scratch, dxn, dqkv, xn, stream);
}
