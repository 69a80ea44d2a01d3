/* The transformer around the MoE layers: parameters, memory, then forward and backward of each part next to each other.
 * The whole model is forward_from, transformer_loss and transformer_backward at the end of the file.
 *
 * Called by train.c, generate.c and experiments/bench_cpu.c. Read next: moe.c.
 */
#include "transformer.h"

#include <assert.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/attention.h"
#include "../kernels/check.h"
#include "../kernels/cross_entropy.h"
#include "../kernels/embedding.h"
#include "../kernels/matmul.h"
#include "../kernels/norm.h"
#include "../kernels/rope.h"

enum { MOST_LOGITS = 1 << 22, LEAST_HEAD_ROWS = 256 };

static int head_size(const ModelConfig *config) {
    return config->dim / config->heads;
}

static int qkv_width(const ModelConfig *config) {
    return (config->heads + 2 * config->kv_heads) * head_size(config);
}

/* ---- parameters ---- */

static void list_tensors(TensorList *list, const ModelConfig *c) {
    double std = 0.02, out_std = std / sqrt(2.0 * c->layers), ones = -1;
    int C = c->dim, HS = head_size(c);
    tensors_add(list, TENSOR_DENSE, -1, std, c->vocab, C, 0, "embedding.w");
    for (int l = 0; l < c->layers; l++) {
        tensors_add(list, TENSOR_DENSE, l, ones, C, 0, 0, "layers.%d.attn_norm.w", l);
        tensors_add(list, TENSOR_DENSE, l, std, qkv_width(c), C, 0, "layers.%d.attn.qkv.w", l);
        if (c->qk_norm) {
            tensors_add(list, TENSOR_DENSE, l, ones, HS, 0, 0, "layers.%d.attn.q_norm.w", l);
            tensors_add(list, TENSOR_DENSE, l, ones, HS, 0, 0, "layers.%d.attn.k_norm.w", l);
        }
        tensors_add(list, TENSOR_DENSE, l, out_std, C, C, 0, "layers.%d.attn.out.w", l);
        tensors_add(list, TENSOR_DENSE, l, ones, C, 0, 0, "layers.%d.ffn_norm.w", l);
        moe_tensors(list, c, l);
    }
    tensors_add(list, TENSOR_DENSE, -1, ones, C, 0, 0, "final_norm.w");
    if (!c->tie) {
        tensors_add(list, TENSOR_DENSE, -1, std, c->vocab, C, 0, "head.w");
    }
}

/* The parameter of that name, all NULL when the model has none. */
static Weight find_weight(const Transformer *model, const char *format, ...) {
    char name[64];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(name, sizeof name, format, arguments);
    va_end(arguments);
    for (int i = 0; i < model->tensors.count; i++) {
        const Tensor *t = &model->tensors.items[i];
        if (strcmp(t->name, name) == 0) {
            return (Weight){model->weights + t->offset, model->master + t->offset,
                            model->grads ? model->grads + t->offset : NULL};
        }
    }
    return (Weight){0};
}

static void connect_moe(Transformer *model, int l) {
    MoeLayer *moe = &model->layers[l].moe;
    bool routed = moe->router != NULL;
    Weight w1 = find_weight(model, routed ? "layers.%d.moe.experts.w1" : "layers.%d.mlp.w1", l);
    Weight w2 = find_weight(model, routed ? "layers.%d.moe.experts.w2" : "layers.%d.mlp.w2", l);
    Weight shared1 = find_weight(model, "layers.%d.moe.shared.w1", l);
    Weight shared2 = find_weight(model, "layers.%d.moe.shared.w2", l);
    Weight router = find_weight(model, "layers.%d.moe.router.w", l);
    moe->w1 = w1.w, moe->dw1 = w1.grad;
    moe->w2 = w2.w, moe->dw2 = w2.grad;
    moe->shared_w1 = shared1.w, moe->dshared_w1 = shared1.grad;
    moe->shared_w2 = shared2.w, moe->dshared_w2 = shared2.grad;
    moe->pass.w = router.master, moe->pass.dw = router.grad;
}

void transformer_connect(Transformer *model) {
    const ModelConfig *c = model->config;
    model->weights = model->master; /* real_t is acc_t here, so the compute copy is the master itself */
    model->embedding = find_weight(model, "embedding.w");
    model->final_norm = find_weight(model, "final_norm.w");
    model->head = find_weight(model, c->tie ? "embedding.w" : "head.w");
    for (int l = 0; l < c->layers; l++) {
        Layer *layer = &model->layers[l];
        layer->attn_norm = find_weight(model, "layers.%d.attn_norm.w", l);
        layer->qkv = find_weight(model, "layers.%d.attn.qkv.w", l);
        layer->q_norm = find_weight(model, "layers.%d.attn.q_norm.w", l);
        layer->k_norm = find_weight(model, "layers.%d.attn.k_norm.w", l);
        layer->attn_out = find_weight(model, "layers.%d.attn.out.w", l);
        layer->ffn_norm = find_weight(model, "layers.%d.ffn_norm.w", l);
        connect_moe(model, l);
    }
    model->scratch.din_rows = model->scratch.out_rows;
    rope_table(model->angles, c->seq, head_size(c), c->rope_base, NULL);
    int all_rows[2] = {0, model->N};
    device_from_host(model->scratch.all_rows, all_rows, sizeof all_rows, NULL);
}

void transformer_load(Transformer *model, const acc_t *host) {
    device_from_host(model->master, host, model->tensors.total * sizeof(acc_t), NULL);
}

void transformer_store(const Transformer *model, acc_t *host) {
    host_from_device(host, model->master, model->tensors.total * sizeof(acc_t), NULL);
}

size_t transformer_active_parameters(const Transformer *model) {
    size_t active = 0;
    for (int i = 0; i < model->tensors.count; i++) {
        const Tensor *t = &model->tensors.items[i];
        active += t->kind == TENSOR_EXPERT ? t->count / t->shape[0] * model->config->top_k : t->count;
    }
    return active;
}

double transformer_flops_per_token(const Transformer *model) {
    const ModelConfig *c = model->config;
    double matrices = 0;
    for (int i = 0; i < model->tensors.count; i++) {
        const Tensor *t = &model->tensors.items[i];
        bool only_looked_up = strcmp(t->name, "embedding.w") == 0 && !c->tie;
        if (t->ndim >= 2 && !only_looked_up) {
            matrices += t->kind == TENSOR_EXPERT ? (double)t->count / t->shape[0] * c->top_k : (double)t->count;
        }
    }
    return 6 * matrices + 6.0 * c->layers * c->seq * c->dim;
}

/* ---- memory ---- */

static void reserve(Arena *arena, void *slot, size_t count, size_t size, MemoryCategory category) {
    arena_reserve(arena, slot, count * size, category);
}

static void reserve_layer(Transformer *model, int l, const Config *config, TransformerUse use, ScratchSize *scratch,
                          Arena *arena) {
    const ModelConfig *c = model->config;
    Layer *layer = &model->layers[l];
    size_t N = model->N, C = c->dim, width = qkv_width(c);
    MemoryCategory kind = MEMORY_ACTIVATIONS;
    reserve(arena, &layer->x, N * C, sizeof(real_t), kind);
    reserve(arena, &layer->xn, N * C, sizeof(real_t), kind);
    reserve(arena, &layer->x_rstd, N, sizeof(acc_t), kind);
    reserve(arena, &layer->qkv_raw, N * width, sizeof(real_t), kind);
    reserve(arena, &layer->qkv_turned, N * width, sizeof(real_t), kind);
    reserve(arena, &layer->qk_rstd, N * (c->heads + c->kv_heads), sizeof(acc_t), kind);
    reserve(arena, &layer->att, N * C, sizeof(real_t), kind);
    reserve(arena, &layer->lse, N * c->heads, sizeof(acc_t), kind);
    reserve(arena, &layer->mid, N * C, sizeof(real_t), kind);
    reserve(arena, &layer->mn, N * C, sizeof(real_t), kind);
    reserve(arena, &layer->mid_rstd, N, sizeof(acc_t), kind);
    if (use == USE_GENERATE) {
        size_t cache = (size_t)model->B * c->seq * c->kv_heads * head_size(c);
        reserve(arena, &layer->keys, cache, sizeof(real_t), MEMORY_CACHE);
        reserve(arena, &layer->values, cache, sizeof(real_t), MEMORY_CACHE);
    }
    moe_reserve(&layer->moe, config, l, model->N, model->slices, model->moe_count, scratch, arena);
}

static void reserve_backward(Transformer *model, Arena *arena) {
    const ModelConfig *c = model->config;
    size_t N = model->N, C = c->dim;
    MemoryCategory kind = MEMORY_ACTIVATIONS;
    reserve(arena, &model->grads, model->tensors.total, sizeof(acc_t), MEMORY_GRADIENTS);
    reserve(arena, &model->dx, N * C, sizeof(real_t), kind);
    reserve(arena, &model->dn, N * C, sizeof(real_t), kind);
    reserve(arena, &model->dqkv, N * qkv_width(c), sizeof(real_t), kind);
    reserve(arena, &model->datt, N * C, sizeof(real_t), kind);
}

void transformer_reserve(Transformer *model, const Config *config, int batch, int slices, TransformerUse use,
                         Transformer *source, Arena *arena) {
    const ModelConfig *c = &config->model;
    *model = (Transformer){.config = c, .B = batch, .T = use == USE_GENERATE ? 1 : c->seq, .slices = slices};
    model->N = model->B * model->T;
    model->layers = calloc(c->layers, sizeof(Layer));
    model->moe_layers = calloc(c->layers, sizeof(int));
    CHECK(model->layers && model->moe_layers, "out of memory for %d layers: lower --layers", c->layers);
    list_tensors(&model->tensors, c);
    for (int l = 0; l < c->layers; l++) {
        if (moe_is_routed(c, l)) {
            model->moe_layers[model->moe_count++] = l;
        }
    }
    if (use == USE_TRAIN) {
        reserve(arena, &model->master, model->tensors.total, sizeof(acc_t), MEMORY_WEIGHTS);
    }
    ScratchSize scratch = {0};
    for (int l = 0; l < c->layers; l++) {
        reserve_layer(model, l, config, use, &scratch, arena);
    }
    size_t N = model->N, C = c->dim, statistics = (size_t)slices * model->moe_count;
    MemoryCategory kind = MEMORY_ACTIVATIONS;
    int rows = MOST_LOGITS / c->vocab > LEAST_HEAD_ROWS ? MOST_LOGITS / c->vocab : LEAST_HEAD_ROWS;
    model->head_rows = model->N < rows ? model->N : rows;
    reserve(arena, &model->angles, (size_t)c->seq * head_size(c), sizeof(acc_t), kind);
    reserve(arena, &model->final_x, N * C, sizeof(real_t), kind);
    reserve(arena, &model->hidden, N * C, sizeof(real_t), kind);
    reserve(arena, &model->final_rstd, N, sizeof(acc_t), kind);
    reserve(arena, &model->branch, N * C, sizeof(real_t), kind);
    reserve(arena, &model->logits, (size_t)model->head_rows * c->vocab, sizeof(real_t), kind);
    reserve(arena, &model->losses, N, sizeof(acc_t), kind);
    reserve(arena, &model->slice_loss, slices, sizeof(acc_t), kind);
    reserve(arena, &model->step_loss, 1, sizeof(acc_t), kind);
    reserve(arena, &model->load, statistics * LOAD_VALUES, sizeof(acc_t), kind);
    reserve(arena, &model->demand, statistics * c->experts, sizeof(int), kind);
    moe_reserve_scratch(&model->scratch, c, scratch, model->N, use == USE_TRAIN, arena);
    if (use == USE_TRAIN) {
        reserve_backward(model, arena);
    } else {
        model->master = source->master;
    }
}

void transformer_free(Transformer *model) {
    free(model->layers);
    free(model->moe_layers);
    tensors_free(&model->tensors);
    *model = (Transformer){0};
}

void transformer_set_dropless(Transformer *model, bool dropless) {
    for (int i = 0; i < model->moe_count; i++) {
        moe_set_dropless(&model->layers[model->moe_layers[i]].moe, dropless);
    }
}

/* ---- one layer, forward and backward ---- */

static RopeShape rope_shape(const Transformer *model, int start) {
    const ModelConfig *c = model->config;
    return (RopeShape){.N = model->N,
                       .T = model->T,
                       .start = start,
                       .NH = c->heads,
                       .NKV = c->kv_heads,
                       .HS = head_size(c),
                       .base = c->rope_base,
                       .eps = c->norm_eps};
}

/* branch = attention(layer->xn). Rows stand at positions start .. start+T-1; with a cache, earlier ones are read from
 * it. */
static void attention_block_forward(Transformer *model, Layer *layer, int start, Stream *stream) {
    const ModelConfig *c = model->config;
    int N = model->N, C = c->dim, HS = head_size(c);
    matmul_forward(layer->qkv_raw, layer->xn, layer->qkv.w, N, C, qkv_width(c), stream);
    rope_forward(layer->qkv_turned, layer->qk_rstd, layer->qkv_raw, layer->q_norm.w, layer->k_norm.w, model->angles,
                 rope_shape(model, start), stream);
    if (layer->keys) {
        attention_decode(layer->att, layer->keys, layer->values, layer->qkv_turned, start, model->B, c->seq, c->heads,
                         c->kv_heads, HS, stream);
    } else {
        attention_forward(layer->att, layer->lse, layer->qkv_turned, model->B, model->T, c->heads, c->kv_heads, HS,
                          stream);
    }
    matmul_forward(model->branch, layer->att, layer->attn_out.w, N, C, C, stream);
    profile_lap(model->profile, STAGE_ATTENTION, stream);
}

/* dn = gradient of layer->xn, from dx, the gradient of the residual stream after the attention. */
static void attention_block_backward(Transformer *model, Layer *layer, Stream *stream) {
    const ModelConfig *c = model->config;
    int N = model->N, C = c->dim, HS = head_size(c);
    matmul_backward_input(model->datt, model->dx, layer->attn_out.w, N, C, C, 0, stream);
    matmul_backward_weight(layer->attn_out.grad, model->dx, layer->att, N, C, C, stream);
    attention_backward(model->dqkv, model->datt, layer->att, layer->lse, layer->qkv_turned, model->B, model->T,
                       c->heads, c->kv_heads, HS, stream);
    rope_backward(model->dqkv, layer->q_norm.grad, layer->k_norm.grad, model->dqkv, layer->qk_rstd, layer->qkv_raw,
                  layer->q_norm.w, layer->k_norm.w, model->angles, rope_shape(model, 0), stream);
    matmul_backward_input(model->dn, model->dqkv, layer->qkv.w, N, C, qkv_width(c), 0, stream);
    matmul_backward_weight(layer->qkv.grad, model->dqkv, layer->xn, N, C, qkv_width(c), stream);
    profile_lap(model->profile, STAGE_ATTENTION, stream);
}

/* Normalises the stream: s = x + branch (or x itself before the first branch), y = norm(s). */
static void norm_block_forward(Transformer *model, real_t *s, real_t *y, acc_t *rstd, const real_t *x, Weight w,
                               Stream *stream) {
    const ModelConfig *c = model->config;
    norm_forward(s, y, rstd, x, s == x ? NULL : model->branch, w.w, model->N, c->dim, c->norm_eps, stream);
    profile_lap(model->profile, STAGE_NORM, stream);
}

/* dx += the gradient that reached the stream through norm(s), dn being the gradient of the normalised values. */
static void norm_block_backward(Transformer *model, const real_t *s, const acc_t *rstd, Weight w, Stream *stream) {
    norm_backward(model->dx, w.grad, model->dn, s, rstd, w.w, model->N, model->config->dim, stream);
    profile_lap(model->profile, STAGE_NORM, stream);
}

/* ---- the whole model ---- */

static void forward_from(Transformer *model, const int *tokens, int start, int slice, Stream *stream) {
    const ModelConfig *c = model->config;
    embedding_forward(model->layers[0].x, tokens, model->embedding.w, model->N, c->dim, stream);
    profile_lap(model->profile, STAGE_EMBED, stream);
    const real_t *x = model->layers[0].x;
    int moe_index = slice * model->moe_count;
    for (int l = 0; l < c->layers; l++) {
        Layer *layer = &model->layers[l];
        norm_block_forward(model, layer->x, layer->xn, layer->x_rstd, x, layer->attn_norm, stream);
        attention_block_forward(model, layer, start, stream);
        norm_block_forward(model, layer->mid, layer->mn, layer->mid_rstd, layer->x, layer->ffn_norm, stream);
        moe_forward(&layer->moe, &model->scratch, model->branch, layer->mn, model->load + moe_index * LOAD_VALUES,
                    model->demand + moe_index * c->experts, model->profile, stream);
        moe_index += layer->moe.router != NULL;
        x = layer->mid;
    }
    norm_block_forward(model, model->final_x, model->hidden, model->final_rstd, x, model->final_norm, stream);
}

void transformer_forward(Transformer *model, const int *tokens, int slice, Stream *stream) {
    forward_from(model, tokens, 0, slice, stream);
}

void transformer_loss(Transformer *model, const int *targets, int slice, bool gradient, Stream *stream) {
    const ModelConfig *c = model->config;
    int C = c->dim, V = c->vocab;
    double scale = 1.0 / ((double)model->N * model->slices);
    for (int first = 0; first < model->N; first += model->head_rows) {
        int rows = model->N - first < model->head_rows ? model->N - first : model->head_rows;
        const real_t *hidden = model->hidden + (size_t)first * C;
        matmul_forward(model->logits, hidden, model->head.w, rows, C, V, stream);
        if (!gradient) {
            cross_entropy_forward(model->losses + first, model->logits, targets + first, rows, V, stream);
            continue;
        }
        cross_entropy_forward_backward(model->losses + first, model->logits, targets + first, rows, V, scale, stream);
        matmul_backward_input(model->dn + (size_t)first * C, model->logits, model->head.w, rows, C, V, 0, stream);
        matmul_backward_weight(model->head.grad, model->logits, hidden, rows, C, V, stream);
    }
    mean_forward(model->slice_loss + slice, model->losses, model->N, stream);
    if (slice == model->slices - 1) {
        mean_forward(model->step_loss, model->slice_loss, model->slices, stream);
    }
    profile_lap(model->profile, STAGE_HEAD, stream);
}

void transformer_backward(Transformer *model, const int *tokens, Stream *stream) {
    const ModelConfig *c = model->config;
    device_zero(model->dx, (size_t)model->N * c->dim * sizeof(real_t), stream);
    norm_block_backward(model, model->final_x, model->final_rstd, model->final_norm, stream);
    for (int l = c->layers - 1; l >= 0; l--) {
        Layer *layer = &model->layers[l];
        moe_backward(&layer->moe, &model->scratch, model->dn, model->dx, layer->mn, model->profile, stream);
        norm_block_backward(model, layer->mid, layer->mid_rstd, layer->ffn_norm, stream);
        attention_block_backward(model, layer, stream);
        norm_block_backward(model, layer->x, layer->x_rstd, layer->attn_norm, stream);
    }
    embedding_backward(model->embedding.grad, model->dx, tokens, model->N, c->dim, c->vocab, stream);
    profile_lap(model->profile, STAGE_EMBED, stream);
}

void transformer_decode(Transformer *model, const int *tokens, int position, Stream *stream) {
    const ModelConfig *c = model->config;
    assert(model->T == 1 && position < c->seq);
    forward_from(model, tokens, position, 0, stream);
    matmul_forward(model->logits, model->hidden, model->head.w, model->N, c->dim, c->vocab, stream);
}
