/* The transformer around the MoE layers: parameters, memory, then forward and backward of each part next to each other.
 * The whole model is transformer_forward_from, transformer_loss and transformer_backward at the end of the file.
 *
 * Called by train.c, generate.c and experiments/bench_train.c. Read next: moe.c.
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
#include "../kernels/comm.h"
#include "../kernels/convert.h"
#include "../kernels/cross_entropy.h"
#include "../kernels/embedding.h"
#include "../kernels/matmul.h"
#include "../kernels/norm.h"
#include "../kernels/random.h"
#include "../kernels/rope.h"
#include "freeze.h"

enum { LEAST_HEAD_ROWS = 256 };

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

/* ---- parameters ---- */

static LoraWidths lora_widths(const ModelConfig *config) {
    return (LoraWidths){.qkv = qkv_width(config), .att = att_width(config)};
}

void transformer_tensors(TensorList *list, const ModelConfig *c) {
    double std = 0.02, out_std = std / sqrt(2.0 * c->layers), ones = -1;
    int C = c->dim, HS = c->head_dim;
    tensors_add(list, TENSOR_DENSE, -1, std, c->vocab, C, 0, "embedding.w");
    for (int l = 0; l < c->layers; l++) {
        tensors_add(list, TENSOR_DENSE, l, ones, C, 0, 0, "layers.%d.attn_norm.w", l);
        tensors_add(list, TENSOR_DENSE, l, std, qkv_width(c), C, 0, "layers.%d.attn.qkv.w", l);
        if (c->qk_norm) {
            tensors_add(list, TENSOR_DENSE, l, ones, HS, 0, 0, "layers.%d.attn.q_norm.w", l);
            tensors_add(list, TENSOR_DENSE, l, ones, HS, 0, 0, "layers.%d.attn.k_norm.w", l);
        }
        tensors_add(list, TENSOR_DENSE, l, out_std, C, att_width(c), 0, "layers.%d.attn.out.w", l);
        lora_tensors(list, c, l, lora_widths(c));
        tensors_add(list, TENSOR_DENSE, l, ones, C, 0, 0, "layers.%d.ffn_norm.w", l);
        chain_tensors(list, c, l);
        perft_tensors(list, c, l);
    }
    tensors_add(list, TENSOR_DENSE, -1, ones, C, 0, 0, "final_norm.w");
    if (!c->tie) {
        tensors_add(list, TENSOR_DENSE, -1, std, c->vocab, C, 0, "head.w");
    }
}

/* Whether the kernels' copy of the weights can be the full-precision one itself. */
static bool weights_are_master(void) {
    return sizeof(real_t) == sizeof(acc_t);
}

/* The parameter of that name, all NULL when the model has none. */
static Weight find_weight(const Transformer *model, const char *format, ...) {
    char name[64];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(name, sizeof name, format, arguments);
    va_end(arguments);
    int index = tensors_find(&model->tensors, name);
    if (index < 0) {
        return (Weight){0};
    }
    const Tensor *tensor = &model->tensors.items[index];
    bool wanted = model->grads && freeze_wants_gradient(tensor);
    return (Weight){model->weights + tensor->offset, model->master + tensor->offset,
                    wanted ? model->grads + tensor->offset : NULL};
}

void transformer_connect(Transformer *model) {
    const ModelConfig *c = model->config;
    if (weights_are_master()) {
        model->weights = (real_t *)model->master;
    }
    model->embedding = find_weight(model, "embedding.w");
    model->final_norm = find_weight(model, "final_norm.w");
    model->head = find_weight(model, c->tie ? "embedding.w" : "head.w");
    for (int l = 0; l < c->layers; l++) {
        Layer *layer = &model->layers[l];
        if (model->recompute) {
            layer->xn = model->layers[0].xn;
            layer->qk_turned = model->layers[0].qk_turned;
            layer->mn = model->layers[0].mn;
        }
        if (model->recompute == RECOMPUTE_EXPERTS) {
            layer->qkv_raw = model->layers[0].qkv_raw;
        }
        layer->attn_norm = find_weight(model, "layers.%d.attn_norm.w", l);
        layer->qkv = find_weight(model, "layers.%d.attn.qkv.w", l);
        layer->q_norm = find_weight(model, "layers.%d.attn.q_norm.w", l);
        layer->k_norm = find_weight(model, "layers.%d.attn.k_norm.w", l);
        layer->attn_out = find_weight(model, "layers.%d.attn.out.w", l);
        layer->ffn_norm = find_weight(model, "layers.%d.ffn_norm.w", l);
        chain_connect(&layer->chain, &model->tensors, l, model->weights, model->master, model->grads);
        perft_connect(&layer->perft, &model->tensors, l, model->weights, model->master, model->grads);
        lora_connect(&layer->lora, &model->tensors, l, model->weights, model->grads);
    }
    model->scratch.din_rows = model->scratch.out_rows;
    rope_table(model->angles, c->seq, c->head_dim, c->rope_base, NULL);
    int all_rows[2] = {0, model->N};
    device_from_host(model->scratch.all_rows, all_rows, sizeof all_rows, NULL);
    transformer_set_step(model, 0, NULL);
}

void transformer_init(const Transformer *model, acc_t *host, uint64_t seed, const double *frequency) {
    tensors_init(&model->tensors, host, seed);
    for (int i = 0; i < model->moe_count; i++) {
        const MoeLayer *moe = model->moes[i];
        acc_t *param[ROUTER_PARAMS] = {NULL};
        for (int p = 0; p < ROUTER_PARAMS && moe->pass.param[p].w; p++) {
            param[p] = host + (moe->pass.param[p].w - model->master);
        }
        if (moe->router->init) {
            moe->router->init(param, model->config, frequency, random_key(seed, RANDOM_INIT, (uint64_t)i));
        }
    }
}

void transformer_load(Transformer *model, const acc_t *host) {
    device_from_host(model->master, host, model->tensors.total * sizeof(acc_t), NULL);
    real_from_acc(model->weights, model->master, model->tensors.total, NULL);
}

void transformer_store(const Transformer *model, acc_t *host) {
    host_from_device(host, model->master, model->tensors.total * sizeof(acc_t), NULL);
}

void transformer_router_name(const Transformer *model, int i, char *name, size_t size) {
    int layer = model->moe_layers[i], first = i;
    while (first > 0 && model->moe_layers[first - 1] == layer) {
        first--;
    }
    if (model->config->chain_steps > 1) {
        snprintf(name, size, "layer %d, step %d", layer, i - first + 1);
    } else {
        snprintf(name, size, "layer %d", layer);
    }
}

/* ---- memory ---- */

static void reserve(Arena *arena, void *slot, size_t count, size_t size, MemoryCategory category) {
    arena_reserve(arena, slot, count * size, category);
}

static void reserve_layer(Transformer *model, int l, int first_site, const Config *config, TransformerUse use,
                          ScratchSize *scratch, Arena *arena) {
    const ModelConfig *c = model->config;
    Layer *layer = &model->layers[l];
    size_t N = model->N, C = c->dim, width = qkv_width(c);
    MemoryCategory kind = MEMORY_ACTIVATIONS;
    reserve(arena, &layer->x, N * C, sizeof(real_t), kind);
    bool keep = l == 0 || !model->recompute; /* layers after the first use its buffers (transformer_connect) */
    if (keep) {
        reserve(arena, &layer->xn, N * C, sizeof(real_t), kind);
        reserve(arena, &layer->qk_turned, N * qk_width(c), sizeof(real_t), kind);
        reserve(arena, &layer->mn, N * C, sizeof(real_t), kind);
    }
    reserve(arena, &layer->x_rstd, N, sizeof(acc_t), kind);
    if (l == 0 || model->recompute != RECOMPUTE_EXPERTS) {
        reserve(arena, &layer->qkv_raw, N * width, sizeof(real_t), kind);
    }
    reserve(arena, &layer->qk_rstd, N * (c->heads + c->kv_heads), sizeof(acc_t), kind);
    reserve(arena, &layer->att, N * att_width(c), sizeof(real_t), kind);
    reserve(arena, &layer->lse, N * c->heads, sizeof(acc_t), kind);
    reserve(arena, &layer->mid, N * C, sizeof(real_t), kind);
    reserve(arena, &layer->mid_rstd, N, sizeof(acc_t), kind);
    if (model->decodes) {
        size_t cache = (size_t)model->B * model->cached * c->kv_heads * c->head_dim;
        reserve(arena, &layer->keys, cache, sizeof(real_t), MEMORY_CACHE);
        reserve(arena, &layer->values, cache, sizeof(real_t), MEMORY_CACHE);
    }
    chain_reserve(&layer->chain, config, l, model->N, &model->context, first_site, scratch, arena);
    perft_reserve(&layer->perft, config, l, model->N, &model->context, first_site, scratch, arena);
    lora_reserve(&layer->lora, c, model->N, lora_widths(c), arena);
    moe_grow_scratch(scratch, layer->lora.qkv.shape); /* the other's rank is the same */
}

/* What there is once: the stream's end, head and losses, what routers tell. */
static void reserve_around_layers(Transformer *model, TransformerUse use, Arena *arena) {
    const ModelConfig *c = model->config;
    size_t N = model->N, C = c->dim, statistics = (size_t)model->slices * model->moe_count;
    MemoryCategory kind = MEMORY_ACTIVATIONS;
    size_t rows = device_logits_at_once() / c->vocab;
    rows = rows > LEAST_HEAD_ROWS ? rows : LEAST_HEAD_ROWS;
    model->head_rows = N < rows ? model->N : (int)rows;
    reserve(arena, &model->angles, (size_t)c->seq * c->head_dim, sizeof(acc_t), kind);
    reserve(arena, &model->final_x, N * C, sizeof(real_t), kind);
    reserve(arena, &model->hidden, N * C, sizeof(real_t), kind);
    reserve(arena, &model->final_rstd, N, sizeof(acc_t), kind);
    reserve(arena, &model->branch, N * C, sizeof(real_t), kind);
    reserve(arena, &model->logits, use == USE_READ ? 0 : (size_t)model->head_rows * c->vocab, sizeof(real_t), kind);
    reserve(arena, &model->losses, N, sizeof(acc_t), kind);
    reserve(arena, &model->slice_loss, model->slices, sizeof(acc_t), kind);
    reserve(arena, &model->step_loss, 1, sizeof(acc_t), kind);
    reserve(arena, &model->load, statistics * LOAD_VALUES * model->context.ranks, sizeof(acc_t), kind);
    reserve(arena, &model->demand, statistics * c->experts, sizeof(int), kind);
    if (c->perft == PERFT_R) {
        reserve(arena, &model->perft_sum, N * C, sizeof(real_t), kind);
        reserve(arena, &model->perft_load, (size_t)model->context.ranks * model->slices * c->layers * LOAD_VALUES,
                sizeof(acc_t), kind);
    }
}

static void reserve_backward(Transformer *model, Arena *arena) {
    const ModelConfig *c = model->config;
    size_t N = model->N, C = c->dim;
    MemoryCategory kind = MEMORY_ACTIVATIONS;
    reserve(arena, &model->grads, model->tensors.total, sizeof(acc_t), MEMORY_GRADIENTS);
    reserve(arena, &model->dx, N * C, sizeof(real_t), kind);
    reserve(arena, &model->dn, N * C, sizeof(real_t), kind);
    reserve(arena, &model->dqkv, N * qkv_width(c), sizeof(real_t), kind);
    reserve(arena, &model->datt, N * att_width(c), sizeof(real_t), kind);
}

void transformer_reserve(Transformer *model, const Config *config, int batch, int slices, TransformerUse use,
                         Transformer *source, Arena *arena) {
    const ModelConfig *c = &config->model;
    *model = (Transformer){.config = c, .B = batch, .T = use == USE_GENERATE ? 1 : c->seq, .slices = slices};
    model->N = model->B * model->T;
    model->predicted = model->N;
    model->decodes = use == USE_GENERATE;
    model->cached = model->decodes ? c->seq : 0;
    model->recompute = model->decodes ? RECOMPUTE_NONE : config->train.recompute;
    model->layers = calloc(c->layers, sizeof(Layer));
    model->moe_layers = calloc(c->layers * c->chain_steps, sizeof(int));
    model->moes = calloc(c->layers * c->chain_steps, sizeof(MoeLayer *));
    CHECK(model->layers && model->moe_layers && model->moes, "out of memory for %d layers: lower --layers", c->layers);
    model->tensors.part = comm_rank(GROUP_EXPERTS);
    model->tensors.expert_parts = comm_ranks(GROUP_EXPERTS);
    transformer_tensors(&model->tensors, c);
    freeze_tensors(&model->tensors, config);
    for (int l = 0; l < c->layers; l++) {
        for (int s = 0; s < chain_routers(c, l); s++) {
            model->moe_layers[model->moe_count++] = l;
        }
    }
    model->context = (RouterContext){.T = model->T,
                                     .slices = slices,
                                     .routers = model->moe_count,
                                     .rank = comm_rank(GROUP_WORLD),
                                     .ranks = comm_ranks(GROUP_WORLD),
                                     .seed = config->train.seed,
                                     .training = use == USE_TRAIN};
    router_context_reserve(&model->context, arena);
    if (!source) {
        reserve(arena, &model->master, model->tensors.total, sizeof(acc_t), MEMORY_WEIGHTS);
        if (!weights_are_master()) {
            reserve(arena, &model->weights, model->tensors.total, sizeof(real_t), MEMORY_WEIGHTS);
        }
    } else {
        model->master = source->master;
        model->weights = source->weights;
    }
    ScratchSize scratch = {0};
    for (int l = 0, site = 0; l < c->layers; l++) {
        reserve_layer(model, l, site, config, use, &scratch, arena);
        for (int s = 0; s < chain_routers(c, l); s++) {
            model->moes[site++] = &model->layers[l].chain.moe[s];
        }
    }
    reserve_around_layers(model, use, arena);
    moe_reserve_scratch(&model->scratch, c, scratch, model->N, use == USE_TRAIN, arena);
    if (use == USE_TRAIN) {
        reserve_backward(model, arena);
        chain_reserve_scratch(&model->chain_scratch, c, model->N, arena);
    }
    if (model->decodes) {
        reserve(arena, &model->logits_acc, (size_t)model->B * c->vocab, sizeof(acc_t), MEMORY_ACTIVATIONS);
    }
}

void transformer_free(Transformer *model) {
    for (int l = 0; l < model->config->layers; l++) {
        chain_free(&model->layers[l].chain);
        perft_free(&model->layers[l].perft);
    }
    free(model->layers);
    free(model->moe_layers);
    free(model->moes);
    router_context_free(&model->context);
    tensors_free(&model->tensors);
    *model = (Transformer){0};
}

/* ---- what the next forwards are ---- */

void transformer_set_step(Transformer *model, int64_t step, Stream *stream) {
    router_context_set_step(&model->context, step, stream);
}

void transformer_set_training(Transformer *model, bool training, bool keep_capacity) {
    model->context.training = training;
    for (int i = 0; i < model->moe_count; i++) {
        moe_set_dropless(model->moes[i], !training && !keep_capacity);
    }
}

void transformer_begin_step(Transformer *model, int64_t step, Stream *stream) {
    transformer_set_step(model, step, stream);
    for (int i = 0; i < model->moe_count; i++) {
        const Router *router = model->moes[i]->router;
        if (router->before_step) {
            router->before_step(&model->moes[i]->pass, stream);
        }
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
                       .HS = c->head_dim,
                       .base = c->rope_base,
                       .eps = c->norm_eps};
}

/* T is the length of the cache in generation. */
static AttentionShape attention_shape(const Transformer *model) {
    const ModelConfig *c = model->config;
    return (AttentionShape){.B = model->B,
                            .T = model->decodes ? model->cached : model->T,
                            .NH = c->heads,
                            .NKV = c->kv_heads,
                            .HS = c->head_dim,
                            .causal = c->objective == OBJECTIVE_LM};
}

/* What --recompute left to be made again: the normalised values, for the backward of what read them. */
static void norm_again(Transformer *model, real_t *y, const real_t *s, acc_t *rstd, Weight w, Stream *stream) {
    const ModelConfig *c = model->config;
    if (model->recompute) {
        profile_stage(model->profile, STAGE_NORM, stream);
        norm_forward(NULL, y, rstd, s, NULL, w.w, model->N, c->dim, c->norm_eps, stream);
    }
}

static void turn(Transformer *model, Layer *layer, int start, Stream *stream) {
    rope_forward(layer->qk_turned, layer->qk_rstd, layer->qkv_raw, layer->q_norm.w, layer->k_norm.w, model->angles,
                 rope_shape(model, start), stream);
}

/* Queries, keys and values, from the normalised stream. */
static void project(Transformer *model, Layer *layer, Stream *stream) {
    const ModelConfig *c = model->config;
    matmul_forward(layer->qkv_raw, layer->xn, layer->qkv.w, model->N, c->dim, qkv_width(c), stream);
    adapter_forward(&layer->lora.qkv, moe_adapter_scratch(&model->scratch), layer->qkv_raw, layer->xn, stream);
}

/* dw += dy^T x, unless the weight is frozen. */
static void weight_backward(Weight w, const real_t *dy, const real_t *x, int N, int IN, int OUT, Stream *stream) {
    if (w.grad) {
        matmul_backward_weight(w.grad, dy, x, N, IN, OUT, stream);
    }
}

/* branch = attention(layer->xn). Rows stand at positions start .. start+T-1; what decodes reads earlier ones from the
 * cache, what reads a prompt leaves them there. */
static void attention_block_forward(Transformer *model, Layer *layer, int start, Stream *stream) {
    const ModelConfig *c = model->config;
    profile_stage(model->profile, STAGE_ATTENTION, stream);
    project(model, layer, stream);
    turn(model, layer, start, stream);
    if (model->decodes) {
        attention_decode(layer->att, layer->keys, layer->values, layer->qk_turned, layer->qkv_raw, start,
                         attention_shape(model), stream);
    } else {
        attention_forward(layer->att, layer->lse, layer->qk_turned, layer->qkv_raw, attention_shape(model), stream);
    }
    if (layer->keys && !model->decodes) {
        attention_keep(layer->keys, layer->values, layer->qk_turned, layer->qkv_raw, model->cached,
                       attention_shape(model), stream);
    }
    matmul_forward(model->branch, layer->att, layer->attn_out.w, model->N, att_width(c), c->dim, stream);
    adapter_forward(&layer->lora.out, moe_adapter_scratch(&model->scratch), model->branch, layer->att, stream);
}

/* dn = gradient of layer->xn, from dx, the gradient of the residual stream after the attention. */
static void attention_block_backward(Transformer *model, Layer *layer, Stream *stream) {
    const ModelConfig *c = model->config;
    int N = model->N, C = c->dim;
    AdapterScratch scratch = moe_adapter_scratch(&model->scratch);
    norm_again(model, layer->xn, layer->x, layer->x_rstd, layer->attn_norm, stream);
    profile_stage(model->profile, STAGE_ATTENTION, stream);
    if (model->recompute == RECOMPUTE_EXPERTS) {
        project(model, layer, stream);
    }
    if (model->recompute) {
        turn(model, layer, 0, stream);
    }
    matmul_backward_input(model->datt, model->dx, layer->attn_out.w, N, att_width(c), C, 0, stream);
    weight_backward(layer->attn_out, model->dx, layer->att, N, att_width(c), C, stream);
    adapter_backward(&layer->lora.out, scratch, model->datt, model->dx, layer->att, stream);
    attention_backward(model->dqkv, model->datt, layer->att, layer->lse, layer->qk_turned, layer->qkv_raw,
                       attention_shape(model), stream);
    rope_backward(model->dqkv, layer->q_norm.grad, layer->k_norm.grad, layer->qk_rstd, layer->qkv_raw, layer->q_norm.w,
                  layer->k_norm.w, model->angles, rope_shape(model, 0), stream);
    matmul_backward_input(model->dn, model->dqkv, layer->qkv.w, N, C, qkv_width(c), 0, stream);
    weight_backward(layer->qkv, model->dqkv, layer->xn, N, C, qkv_width(c), stream);
    adapter_backward(&layer->lora.qkv, scratch, model->dn, model->dqkv, layer->xn, stream);
}

/* Normalises the stream: s = x + branch (or x itself before the first branch), y = norm(s). */
static void norm_block_forward(Transformer *model, real_t *s, real_t *y, acc_t *rstd, const real_t *x, Weight w,
                               Stream *stream) {
    const ModelConfig *c = model->config;
    profile_stage(model->profile, STAGE_NORM, stream);
    norm_forward(s, y, rstd, x, s == x ? NULL : model->branch, w.w, model->N, c->dim, c->norm_eps, stream);
}

/* dx += the gradient that reached the stream through norm(s), dn being the gradient of the normalised values. */
static void norm_block_backward(Transformer *model, const real_t *s, const acc_t *rstd, Weight w, Stream *stream) {
    profile_stage(model->profile, STAGE_NORM, stream);
    norm_backward(model->dx, w.grad, model->dn, s, rstd, w.w, model->N, model->config->dim, stream);
}

/* ---- the whole model ---- */

/* This rank's part of model->load. */
static acc_t *load_of_rank(const Transformer *model) {
    return model->load + (size_t)comm_rank(GROUP_WORLD) * model->slices * model->moe_count * LOAD_VALUES;
}

/* What layer l's router of adapters says of a slice. */
static acc_t *perft_load(const Transformer *model, int slice, int l) {
    size_t place = ((size_t)comm_rank(GROUP_WORLD) * model->slices + slice) * model->config->layers + l;
    return model->perft_load ? model->perft_load + place * LOAD_VALUES : NULL;
}

void transformer_forward_from(Transformer *model, const int *tokens, int start, int slice, Stream *stream) {
    const ModelConfig *c = model->config;
    profile_stage(model->profile, STAGE_EMBED, stream);
    embedding_forward(model->layers[0].x, tokens, model->embedding.w, model->N, c->dim, stream);
    const real_t *x = model->layers[0].x;
    acc_t *load = load_of_rank(model);
    int site = slice * model->moe_count;
    model->context.tokens = tokens;
    model->context.start = start;
    model->context.slice = slice;
    for (int l = 0; l < c->layers; l++) {
        Layer *layer = &model->layers[l];
        norm_block_forward(model, layer->x, layer->xn, layer->x_rstd, x, layer->attn_norm, stream);
        attention_block_forward(model, layer, start, stream);
        norm_block_forward(model, layer->mid, layer->mn, layer->mid_rstd, layer->x, layer->ffn_norm, stream);
        chain_forward(&layer->chain, &model->scratch, model->branch, layer->mn, layer->mid, load + site * LOAD_VALUES,
                      model->demand + site * c->experts, model->profile, stream);
        perft_forward(&layer->perft, &model->scratch, model->branch, model->perft_sum, layer->mn,
                      perft_load(model, slice, l), model->profile, stream);
        site += chain_routers(c, l);
        x = layer->mid;
        if (!layer->chain.outer) { /* the branch takes the stream's place */
            real_t *next = l + 1 < c->layers ? model->layers[l + 1].x : model->final_x;
            device_copy(next, model->branch, (size_t)model->N * c->dim * sizeof(real_t), stream);
            x = next;
        }
    }
    norm_block_forward(model, model->final_x, model->hidden, model->final_rstd, x, model->final_norm, stream);
}

void transformer_forward(Transformer *model, const int *tokens, int slice, Stream *stream) {
    transformer_forward_from(model, tokens, 0, slice, stream);
}

void transformer_loss(Transformer *model, const int *targets, int slice, bool gradient, Stream *stream) {
    const ModelConfig *c = model->config;
    int C = c->dim, V = c->vocab;
    int ranks = model->context.ranks;
    double scale = 1.0 / ((double)model->predicted * model->slices * ranks);
    profile_stage(model->profile, STAGE_HEAD, stream);
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
        weight_backward(model->head, model->logits, hidden, rows, C, V, stream);
    }
    mean_forward(model->slice_loss + slice, model->losses, model->N, model->predicted, stream);
    if (slice == model->slices - 1) {
        mean_forward(model->step_loss, model->slice_loss, model->slices, model->slices * ranks, stream);
    }
}

void transformer_backward(Transformer *model, const int *tokens, int slice, Stream *stream) {
    const ModelConfig *c = model->config;
    profile_stage(model->profile, STAGE_NORM, stream);
    device_zero(model->dx, (size_t)model->N * c->dim * sizeof(real_t), stream);
    norm_block_backward(model, model->final_x, model->final_rstd, model->final_norm, stream);
    for (int l = c->layers - 1; l >= 0; l--) {
        Layer *layer = &model->layers[l];
        norm_again(model, layer->mn, layer->mid, layer->mid_rstd, layer->ffn_norm, stream);
        chain_backward(&layer->chain, &model->chain_scratch, &model->scratch, model->dn, model->dx, layer->mn,
                       slice > 0, model->profile, stream);
        perft_backward(&layer->perft, &model->scratch, model->dn, model->perft_sum, model->dx, layer->mn, slice > 0,
                       model->profile, stream);
        norm_block_backward(model, layer->mid, layer->mid_rstd, layer->ffn_norm, stream);
        attention_block_backward(model, layer, stream);
        norm_block_backward(model, layer->x, layer->x_rstd, layer->attn_norm, stream);
    }
    profile_stage(model->profile, STAGE_EMBED, stream);
    if (model->embedding.grad) {
        embedding_backward(model->embedding.grad, model->dx, tokens, model->N, c->dim, c->vocab, stream);
    }
}

/* Neighbours in the list that the same ranks hold are summed in one go; what is frozen is left out. */
void transformer_sum_ranks(Transformer *model, Stream *stream) {
    const TensorList *list = &model->tensors;
    size_t statistics = (size_t)model->slices * model->moe_count * LOAD_VALUES * sizeof(acc_t);
    profile_stage(model->profile, STAGE_EXCHANGE, stream);
    for (int t = 0, next; t < list->count; t = next) {
        bool spread = list->items[t].parts > 1, frozen = list->items[t].frozen;
        for (next = t + 1;
             next < list->count && (list->items[next].parts > 1) == spread && list->items[next].frozen == frozen;) {
            next++;
        }
        if (frozen) {
            continue;
        }
        size_t first = list->items[t].offset, end = next < list->count ? list->items[next].offset : list->total;
        comm_sum(spread ? GROUP_REPLICAS : GROUP_WORLD, model->grads + first, end - first, stream);
    }
    comm_sum(GROUP_WORLD, model->step_loss, 1, stream);
    comm_gather(GROUP_WORLD, model->load, load_of_rank(model), statistics, stream);
    if (model->perft_load) {
        size_t bytes = (size_t)model->slices * model->config->layers * LOAD_VALUES * sizeof(acc_t);
        comm_gather(GROUP_WORLD, model->perft_load, perft_load(model, 0, 0), bytes, stream);
    }
}

void transformer_update_routers(Transformer *model, const AdamState *adam, Stream *stream) {
    int E = model->config->experts;
    for (int i = 0; i < model->moe_count; i++) {
        MoeLayer *moe = model->moes[i];
        if (moe->router->update && !freeze_holds_routers(moe->pass.config)) {
            moe->router->update(&moe->pass, model->demand + (size_t)i * E, (size_t)model->moe_count * E, adam, stream);
        }
    }
}
