/* The transformer around attention and MoE layers: parameters, memory, then the norms between them, forward and
 * backward next to each other. The whole model is at the end of the file: transformer_forward_from, transformer_loss
 * and transformer_backward.
 *
 * Called by train.c, generate.c and experiments/bench_train.c. Read next: attention_block.c, then moe.c.
 */
#include "transformer.h"

#include <stdio.h>
#include <stdlib.h>

#include "../kernels/check.h"
#include "../kernels/comm.h"
#include "../kernels/convert.h"
#include "../kernels/cross_entropy.h"
#include "../kernels/embedding.h"
#include "../kernels/matmul.h"
#include "../kernels/norm.h"
#include "../kernels/random.h"
#include "freeze.h"

enum { LEAST_HEAD_ROWS = 256 };

/* ---- parameters ---- */

void transformer_tensors(TensorList *list, const ModelConfig *c) {
    double std = 0.02, ones = -1;
    int C = c->dim;
    tensors_add(list, TENSOR_DENSE, -1, std, c->vocab, C, 0, "embedding.w");
    for (int l = 0; l < c->layers; l++) {
        tensors_add(list, TENSOR_DENSE, l, ones, C, 0, 0, "layers.%d.attn_norm.w", l);
        attention_block_tensors(list, c, l);
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

void transformer_connect(Transformer *model) {
    const ModelConfig *c = model->config;
    if (weights_are_master()) {
        model->weights = (real_t *)model->master;
    }
    const TensorList *list = &model->tensors;
    real_t *weights = model->weights;
    acc_t *master = model->master, *grads = model->grads;
    model->embedding = weight_find(list, weights, grads, "embedding.w");
    model->final_norm = weight_find(list, weights, grads, "final_norm.w");
    model->head = weight_find(list, weights, grads, c->tie ? "embedding.w" : "head.w");
    for (int l = 0; l < c->layers; l++) {
        Layer *layer = &model->layers[l];
        if (model->recompute) {
            layer->xn = model->layers[0].xn;
            layer->mn = model->layers[0].mn;
        }
        layer->attn_norm = weight_find(list, weights, grads, "layers.%d.attn_norm.w", l);
        layer->ffn_norm = weight_find(list, weights, grads, "layers.%d.ffn_norm.w", l);
        attention_block_connect(&layer->attention, &model->attention, &model->layers[0].attention, list, l, weights,
                                grads);
        chain_connect(&layer->chain, list, l, weights, master, grads);
        perft_connect(&layer->perft, list, l, weights, master, grads);
    }
    attention_shared_connect(&model->attention);
    model->scratch.din_rows = model->scratch.out_rows;
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

static void reserve_layer(Transformer *model, int l, int first_site, const Config *config, ScratchSize *scratch,
                          Arena *arena) {
    Layer *layer = &model->layers[l];
    size_t N = model->N, C = model->config->dim;
    MemoryCategory kind = MEMORY_ACTIVATIONS;
    reserve(arena, &layer->x, N * C, sizeof(real_t), kind);
    if (l == 0 || !model->recompute) { /* layers after the first use its buffers (transformer_connect) */
        reserve(arena, &layer->xn, N * C, sizeof(real_t), kind);
        reserve(arena, &layer->mn, N * C, sizeof(real_t), kind);
    }
    reserve(arena, &layer->x_rstd, N, sizeof(acc_t), kind);
    reserve(arena, &layer->mid, N * C, sizeof(real_t), kind);
    reserve(arena, &layer->mid_rstd, N, sizeof(acc_t), kind);
    attention_block_reserve(&layer->attention, &model->attention, l, arena);
    moe_grow_scratch(scratch, layer->attention.lora.qkv.shape); /* the other's rank is the same */
    chain_reserve(&layer->chain, config, l, model->N, &model->context, first_site, scratch, arena);
    perft_reserve(&layer->perft, config, l, model->N, &model->context, first_site, scratch, arena);
}

/* What there is once: the stream's end, head and losses, what routers tell. */
static void reserve_around_layers(Transformer *model, TransformerUse use, Arena *arena) {
    const ModelConfig *c = model->config;
    size_t N = model->N, C = c->dim, statistics = (size_t)model->slices * model->moe_count;
    MemoryCategory kind = MEMORY_ACTIVATIONS;
    size_t rows = device_logits_at_once() / c->vocab;
    rows = rows > LEAST_HEAD_ROWS ? rows : LEAST_HEAD_ROWS;
    model->head_rows = N < rows ? model->N : (int)rows;
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
    size_t N = model->N, C = model->config->dim;
    reserve(arena, &model->grads, model->tensors.total, sizeof(acc_t), MEMORY_GRADIENTS);
    reserve(arena, &model->dx, N * C, sizeof(real_t), MEMORY_ACTIVATIONS);
    reserve(arena, &model->dn, N * C, sizeof(real_t), MEMORY_ACTIVATIONS);
}

void transformer_reserve(Transformer *model, const Config *config, int batch, int slices, TransformerUse use,
                         Transformer *source, Arena *arena) {
    const ModelConfig *c = &config->model;
    *model = (Transformer){.config = c, .B = batch, .T = use == USE_GENERATE ? 1 : c->seq, .slices = slices};
    model->N = model->B * model->T;
    model->predicted = model->N;
    model->recompute = use == USE_GENERATE ? RECOMPUTE_NONE : config->train.recompute;
    model->attention = (AttentionShared){.config = c,
                                         .B = model->B,
                                         .T = model->T,
                                         .N = model->N,
                                         .decodes = use == USE_GENERATE,
                                         .cached = use == USE_GENERATE ? c->seq : 0,
                                         .recompute = model->recompute};
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
        reserve_layer(model, l, site, config, &scratch, arena);
        for (int s = 0; s < chain_routers(c, l); s++) {
            model->moes[site++] = &model->layers[l].chain.moe[s];
        }
    }
    reserve_around_layers(model, use, arena);
    attention_shared_reserve(&model->attention, use == USE_TRAIN, arena);
    moe_reserve_scratch(&model->scratch, c, scratch, use == USE_TRAIN, arena);
    if (use == USE_TRAIN) {
        reserve_backward(model, arena);
        chain_reserve_scratch(&model->chain_scratch, c, model->N, arena);
    }
    if (use == USE_GENERATE) {
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

/* ---- the norms before and after the parts of a layer ---- */

/* Normalises the stream: s = x + branch (or x itself before the first branch), y = norm(s). */
static void norm_block_forward(Transformer *model, real_t *s, real_t *y, acc_t *rstd, const real_t *x, Weight w,
                               Stream *stream) {
    const ModelConfig *c = model->config;
    profile_stage(model->profile, STAGE_NORM, stream);
    norm_forward(s, y, rstd, x, s == x ? NULL : model->branch, w.w, model->N, c->dim, c->norm_eps, stream);
}

/* What --recompute left to be made again: the normalised values, for the backward of what read them. */
static void norm_again(Transformer *model, real_t *y, const real_t *s, acc_t *rstd, Weight w, Stream *stream) {
    const ModelConfig *c = model->config;
    if (model->recompute) {
        profile_stage(model->profile, STAGE_NORM, stream);
        norm_forward(NULL, y, rstd, s, NULL, w.w, model->N, c->dim, c->norm_eps, stream);
    }
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
        attention_block_forward(&layer->attention, &model->attention, moe_adapter_scratch(&model->scratch),
                                model->branch, layer->xn, start, model->profile, stream);
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
        norm_again(model, layer->xn, layer->x, layer->x_rstd, layer->attn_norm, stream);
        attention_block_backward(&layer->attention, &model->attention, moe_adapter_scratch(&model->scratch), model->dn,
                                 model->dx, layer->xn, model->profile, stream);
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
