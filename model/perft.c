/* See perft.h. The layer of adapters is an ordinary MoeLayer with a configuration of its own, made here. Called by
 * transformer.c. */
#include "perft.h"

#include <stdio.h>
#include <stdlib.h>

#include "../kernels/check.h"
#include "../kernels/residual.h"

bool perft_is_routed(const ModelConfig *config, int layer) {
    return config->perft == PERFT_R && moe_is_routed(config, layer);
}

/* Rank of the one dense adapter that all adapters of the kind are; 0: they are none. */
static int dense_rank(const ModelConfig *config, int layer) {
    int count = config->perft == PERFT_D ? config->perft_count : config->perft == PERFT_S ? 1 : 0;
    return moe_is_routed(config, layer) ? count * config->perft_rank : 0;
}

/* The layer of adapters as a MoE layer. */
static void routed_config(ModelConfig *config) {
    snprintf(config->router, sizeof config->router, "topk");
    config->experts = config->perft_count;
    config->top_k = config->perft_top_k;
    config->expert_dim = config->perft_rank;
    config->act = config->perft_act;
    config->shared_experts = 0;
    config->renorm = 0;
    config->moe_every = 1;
    config->capacity_factor = 0;
    config->layout = LAYOUT_COMPACT;
    config->perft = PERFT_NONE;
}

void perft_tensors(TensorList *tensors, const ModelConfig *config, int layer) {
    int C = config->dim, R = config->perft_rank, rank = dense_rank(config, layer);
    char prefix[64];
    snprintf(prefix, sizeof prefix, "layers.%d.perft", layer);
    if (rank > 0) {
        adapter_tensors(tensors, config, TENSOR_DENSE, layer, adapter_shape(config, 0, C, rank, 0, 0), prefix);
    } else if (config->perft == PERFT_E && moe_is_routed(config, layer)) {
        ExpertShape shape = adapter_shape(config, config->experts, C, R, 0, 0);
        adapter_tensors(tensors, config, TENSOR_EXPERT, layer, shape, prefix);
    } else if (perft_is_routed(config, layer)) {
        ModelConfig routed = *config;
        routed_config(&routed);
        ExpertShape shape = adapter_shape(config, routed.experts, C, R, 0, 0);
        adapter_tensors(tensors, config, TENSOR_DENSE, layer, shape, prefix);
        snprintf(prefix, sizeof prefix, "layers.%d.perft.router", layer);
        int first = tensors->count;
        router_find(routed.router)->tensors(tensors, &routed, layer, prefix);
        for (int t = first; t < tensors->count; t++) {
            tensors->items[t].adapter = true;
        }
    }
}

void perft_reserve(Perft *perft, const Config *config, int layer, int N, const RouterContext *context, int site,
                   ScratchSize *size, Arena *arena) {
    const ModelConfig *c = &config->model;
    int rank = dense_rank(c, layer);
    *perft = (Perft){.N = N, .C = c->dim};
    if (rank > 0) {
        adapter_reserve(&perft->dense, adapter_shape(c, 1, c->dim, rank, 0, N), N, arena);
        moe_grow_scratch(size, perft->dense.shape);
    } else if (perft_is_routed(c, layer)) {
        perft->config = malloc(sizeof *perft->config);
        CHECK(perft->config, "out of memory for the adapters of layer %d", layer);
        *perft->config = *config;
        routed_config(&perft->config->model);
        perft->config->train.aux_coef = config->train.perft_aux_coef;
        perft->config->train.z_coef = 0;
        moe_reserve(&perft->moe, perft->config, layer, N, context, site, size, arena);
        int rows = perft->moe.experts.rows;
        perft->moe.experts = adapter_shape(c, c->perft_count, c->dim, c->perft_rank, 0, rows);
        arena_reserve(arena, (void **)&perft->demand, c->perft_count * sizeof(int), MEMORY_ACTIVATIONS);
    }
}

void perft_connect(Perft *perft, const TensorList *tensors, int layer, const real_t *weights, acc_t *master,
                   acc_t *grads) {
    char name[64];
    snprintf(name, sizeof name, "layers.%d.perft", layer);
    adapter_connect(&perft->dense, tensors, name, weights, grads);
    if (perft->config) { /* the same names, of the layer's experts */
        MoeLayer *moe = &perft->moe;
        moe->w1 = perft->dense.a, moe->dw1 = perft->dense.da;
        moe->w2 = perft->dense.b, moe->dw2 = perft->dense.db;
        snprintf(name, sizeof name, "layers.%d.perft.router.", layer);
        moe_connect_router(moe, tensors, name, master, grads);
    }
}

void perft_free(Perft *perft) {
    if (perft->config) {
        moe_free(&perft->moe);
        free(perft->config);
    }
}

void perft_forward(Perft *perft, MoeScratch *scratch, real_t *branch, real_t *sum, const real_t *x, acc_t *load,
                   Profile *profile, Stream *stream) {
    if (perft->config) {
        moe_forward(&perft->moe, scratch, sum, x, load, perft->demand, profile, stream);
        residual_add(branch, branch, sum, (size_t)perft->N * perft->C, stream);
    } else {
        profile_stage(profile, STAGE_EXPERTS, stream);
        adapter_forward(&perft->dense, moe_adapter_scratch(scratch), branch, x, stream);
    }
}

void perft_backward(Perft *perft, MoeScratch *scratch, real_t *dx, real_t *sum, const real_t *dy, const real_t *x,
                    int add_dw, Profile *profile, Stream *stream) {
    if (perft->config) {
        moe_backward(&perft->moe, scratch, sum, dy, x, add_dw, profile, stream);
        residual_add(dx, dx, sum, (size_t)perft->N * perft->C, stream);
    } else {
        profile_stage(profile, STAGE_EXPERTS, stream);
        adapter_backward(&perft->dense, moe_adapter_scratch(scratch), dx, dy, x, stream);
    }
}
