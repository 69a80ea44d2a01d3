/* The MoE layer, stage by stage. Read moe_forward, then moe_backward: each stage is one kernel call, in the order the
 * data takes, and the backward names the stage whose gradient it makes. What comes before them lists tensors and
 * reserves memory.
 *
 * To change what a stage computes, open its kernel; to change who chooses, a router_*.c. Called by transformer.c.
 */
#include "moe.h"

#include <math.h>

#include "../kernels/dispatch.h"
#include "../kernels/permute.h"

bool moe_is_routed(const ModelConfig *config, int layer) {
    return !router_find(config->router)->dense && (layer + 1) % config->moe_every == 0;
}

static ExpertShape expert_shape(const ModelConfig *config, int E, int H, int rows) {
    return (ExpertShape){.E = E, .C = config->dim, .H = H, .rows = rows, .gelu = config->act == ACT_GELU};
}

void moe_tensors(TensorList *tensors, const ModelConfig *config, int layer) {
    int C = config->dim;
    double std = 0.02;
    double out_std = std / sqrt(2.0 * config->layers); /* what adds to the stream starts smaller: GPT-2's rule */
    if (!moe_is_routed(config, layer)) {
        ExpertShape mlp = expert_shape(config, 1, config_dense_width(config), 0);
        tensors_add(tensors, TENSOR_DENSE, layer, std, experts_a_width(mlp), C, 0, "layers.%d.mlp.w1", layer);
        tensors_add(tensors, TENSOR_DENSE, layer, out_std, C, mlp.H, 0, "layers.%d.mlp.w2", layer);
        return;
    }
    ExpertShape experts = expert_shape(config, config->experts, config->expert_dim, 0);
    tensors_add(tensors, TENSOR_ROUTER, layer, std, experts.E, C, 0, "layers.%d.moe.router.w", layer);
    tensors_add(tensors, TENSOR_EXPERT, layer, std, experts.E, experts_a_width(experts), C, "layers.%d.moe.experts.w1",
                layer);
    tensors_add(tensors, TENSOR_EXPERT, layer, out_std, experts.E, C, experts.H, "layers.%d.moe.experts.w2", layer);
    if (config->shared_experts > 0) {
        ExpertShape shared = expert_shape(config, 1, config->shared_experts * config->expert_dim, 0);
        tensors_add(tensors, TENSOR_DENSE, layer, std, experts_a_width(shared), C, 0, "layers.%d.moe.shared.w1", layer);
        tensors_add(tensors, TENSOR_DENSE, layer, out_std, C, shared.H, 0, "layers.%d.moe.shared.w2", layer);
    }
}

static void grow(size_t *size, size_t needed) {
    *size = needed > *size ? needed : *size;
}

static void reserve_plan(Plan *plan, size_t entries, size_t rows, Arena *arena) {
    int E = plan->E;
    arena_reserve(arena, (void **)&plan->expert, entries * sizeof(int), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&plan->weight, entries * sizeof(acc_t), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&plan->row, entries * sizeof(int), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&plan->entry, rows * sizeof(int), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&plan->row_weight, rows * sizeof(acc_t), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&plan->count, E * sizeof(int), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&plan->demand, E * sizeof(int), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&plan->offset, (E + 1) * sizeof(int), MEMORY_ACTIVATIONS);
}

static void reserve_pass(RouterPass *pass, Arena *arena) {
    size_t scores = (size_t)pass->N * pass->E;
    arena_reserve(arena, (void **)&pass->logits, scores * sizeof(acc_t), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&pass->probs, scores * sizeof(acc_t), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&pass->dlogits, scores * sizeof(acc_t), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&pass->lse, pass->N * sizeof(acc_t), MEMORY_ACTIVATIONS);
}

void moe_reserve(MoeLayer *moe, const Config *config, int layer, int N, int slices, int moe_count, ScratchSize *size,
                 Arena *arena) {
    const ModelConfig *c = &config->model;
    moe->N = N;
    moe->C = c->dim;
    moe->router = moe_is_routed(c, layer) ? router_find(c->router) : NULL;
    if (!moe->router) {
        moe->experts = expert_shape(c, 1, config_dense_width(c), N);
    } else {
        int E = c->experts, K = c->top_k, capacity = config_capacity(c, N);
        int rows = plan_rows(N, E, K, capacity, c->layout);
        int most_rows = rows > N * K ? rows : N * K; /* a dropless evaluation takes every entry */
        moe->plan =
            (Plan){.N = N, .E = E, .K = K, .rows = rows, .capacity = capacity, .layout = c->layout, .drop = c->drop};
        moe->rows = rows, moe->capacity = capacity, moe->layout = c->layout;
        moe->pass = (RouterPass){.N = N, .C = c->dim, .E = E, .K = K, .renorm = c->renorm};
        moe->pass.aux_scale = config->train.aux_coef / (moe_count * slices);
        moe->pass.z_scale = config->train.z_coef / (moe_count * slices);
        moe->experts = expert_shape(c, E, c->expert_dim, most_rows);
        reserve_plan(&moe->plan, (size_t)N * K, most_rows, arena);
        reserve_pass(&moe->pass, arena);
        grow(&size->rows, most_rows);
    }
    size_t rows = moe->experts.rows, width = experts_a_width(moe->experts);
    arena_reserve(arena, (void **)&moe->a, rows * width * sizeof(real_t), MEMORY_ACTIVATIONS);
    grow(&size->h, rows * moe->experts.H);
    grow(&size->a, rows * width);
    if (moe->router && c->shared_experts > 0) {
        moe->shared = expert_shape(c, 1, c->shared_experts * c->expert_dim, N);
        size_t shared_width = experts_a_width(moe->shared);
        arena_reserve(arena, (void **)&moe->shared_a, N * shared_width * sizeof(real_t), MEMORY_ACTIVATIONS);
        grow(&size->h, (size_t)N * moe->shared.H);
        grow(&size->a, N * shared_width);
    }
}

void moe_reserve_scratch(MoeScratch *scratch, const ModelConfig *config, ScratchSize size, int N, bool backward,
                         Arena *arena) {
    size_t row_bytes = size.rows * config->dim * sizeof(real_t);
    arena_reserve(arena, (void **)&scratch->in_rows, row_bytes, MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&scratch->out_rows, row_bytes, MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&scratch->mean_prob, config->experts * sizeof(acc_t), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&scratch->h, size.h * sizeof(real_t), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&scratch->all_rows, 2 * sizeof(int), MEMORY_ACTIVATIONS);
    if (backward) {
        arena_reserve(arena, (void **)&scratch->dy_rows, row_bytes, MEMORY_ACTIVATIONS);
        arena_reserve(arena, (void **)&scratch->da, size.a * sizeof(real_t), MEMORY_ACTIVATIONS);
        arena_reserve(arena, (void **)&scratch->drow_weight, size.rows * sizeof(acc_t), MEMORY_ACTIVATIONS);
        arena_reserve(arena, (void **)&scratch->dweight, (size_t)N * config->top_k * sizeof(acc_t), MEMORY_ACTIVATIONS);
    }
}

void moe_set_dropless(MoeLayer *moe, bool dropless) {
    Plan *plan = &moe->plan;
    plan->capacity = dropless ? 0 : moe->capacity;
    plan->layout = dropless ? LAYOUT_COMPACT : moe->layout;
    plan->rows = dropless ? plan->N * plan->K : moe->rows;
}

void moe_forward(MoeLayer *moe, MoeScratch *scratch, real_t *y, const real_t *x, acc_t *load, int *demand,
                 Profile *profile, Stream *stream) {
    if (!moe->router) {
        experts_forward(y, moe->a, scratch->h, x, moe->w1, moe->w2, scratch->all_rows, moe->experts, 0, stream);
        profile_lap(profile, STAGE_EXPERTS, stream);
        return;
    }
    Plan *plan = &moe->plan;
    moe->pass.x = x;
    moe->pass.load = load;
    moe->router->forward(&moe->pass, plan, stream);
    profile_lap(profile, STAGE_ROUTE, stream);
    plan_build(plan, stream);
    balance_forward(load, scratch->mean_prob, moe->pass.probs, moe->pass.lse, plan->demand, plan->count, plan->N,
                    plan->E, plan->K, stream);
    device_copy(demand, plan->demand, plan->E * sizeof(int), stream);
    profile_lap(profile, STAGE_PERMUTE, stream);
    dispatch_forward(scratch->in_rows, x, plan, moe->C, stream);
    profile_lap(profile, STAGE_DISPATCH, stream);
    experts_forward(scratch->out_rows, moe->a, scratch->h, scratch->in_rows, moe->w1, moe->w2, plan->offset,
                    moe->experts, 0, stream);
    profile_lap(profile, STAGE_EXPERTS, stream);
    combine_forward(y, scratch->out_rows, plan, moe->C, 0, stream);
    profile_lap(profile, STAGE_COMBINE, stream);
    if (moe->shared.H > 0) {
        experts_forward(y, moe->shared_a, scratch->h, x, moe->shared_w1, moe->shared_w2, scratch->all_rows, moe->shared,
                        1, stream);
        profile_lap(profile, STAGE_EXPERTS, stream);
    }
}

void moe_backward(MoeLayer *moe, MoeScratch *scratch, real_t *dx, const real_t *dy, const real_t *x, Profile *profile,
                  Stream *stream) {
    if (!moe->router) {
        experts_backward(dx, NULL, moe->dw1, moe->dw2, scratch->h, scratch->da, dy, x, moe->a, NULL, moe->w1, moe->w2,
                         scratch->all_rows, moe->experts, 0, stream);
        profile_lap(profile, STAGE_EXPERTS, stream);
        return;
    }
    const Plan *plan = &moe->plan;
    int has_shared = moe->shared.H > 0;
    if (has_shared) {
        experts_backward(dx, NULL, moe->dshared_w1, moe->dshared_w2, scratch->h, scratch->da, dy, x, moe->shared_a,
                         NULL, moe->shared_w1, moe->shared_w2, scratch->all_rows, moe->shared, 0, stream);
        profile_lap(profile, STAGE_EXPERTS, stream);
    }
    dispatch_forward(scratch->dy_rows, dy, plan, moe->C, stream); /* the backward of combine */
    profile_lap(profile, STAGE_COMBINE, stream);
    dispatch_forward(scratch->in_rows, x, plan, moe->C,
                     stream); /* made again: cheaper than keeping it for every layer */
    profile_lap(profile, STAGE_DISPATCH, stream);
    experts_backward(scratch->din_rows, scratch->drow_weight, moe->dw1, moe->dw2, scratch->h, scratch->da,
                     scratch->dy_rows, scratch->in_rows, moe->a, plan->row_weight, moe->w1, moe->w2, plan->offset,
                     moe->experts, 0, stream);
    profile_lap(profile, STAGE_EXPERTS, stream);
    dispatch_backward(dx, scratch->din_rows, plan, moe->C, has_shared, stream);
    profile_lap(profile, STAGE_DISPATCH, stream);
    plan_weight_backward(scratch->dweight, scratch->drow_weight, plan, stream);
    moe->router->backward(&moe->pass, dx, scratch->dweight, plan, stream);
    profile_lap(profile, STAGE_ROUTE, stream);
}
