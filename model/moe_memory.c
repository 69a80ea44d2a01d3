/* What a MoE layer has: the tensors it lists, the memory it reserves, where it finds both once they have addresses. The
 * sizes of its plan are decided here, and with them how many rows its experts may get. What it computes is in moe.c.
 * See moe.h. Called by chain.c and perft.c.
 */
#include "moe.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/dispatch.h"
#include "../kernels/permute.h"
#include "weight.h"

bool moe_is_routed(const ModelConfig *config, int layer) {
    return router_find(config->router)->plan != PLAN_NONE && (layer + 1) % config->moe_every == 0;
}

static ExpertShape expert_shape(const ModelConfig *config, int E, int H, int rows) {
    return (ExpertShape){.E = E, .C = config->dim, .H = H, .rows = rows, .act = config->act};
}

static void add_experts(TensorList *tensors, const ModelConfig *config, int layer) {
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
    tensors_add(tensors, TENSOR_EXPERT, layer, std, experts.E, experts_a_width(experts), C, "layers.%d.moe.experts.w1",
                layer);
    tensors_add(tensors, TENSOR_EXPERT, layer, out_std, experts.E, C, experts.H, "layers.%d.moe.experts.w2", layer);
    if (config->shared_experts > 0) {
        ExpertShape shared = expert_shape(config, 1, config->shared_experts * config->expert_dim, 0);
        tensors_add(tensors, TENSOR_DENSE, layer, std, experts_a_width(shared), C, 0, "layers.%d.moe.shared.w1", layer);
        tensors_add(tensors, TENSOR_DENSE, layer, out_std, C, shared.H, 0, "layers.%d.moe.shared.w2", layer);
    }
}

void moe_tensors(TensorList *tensors, const ModelConfig *config, int layer) {
    int first = tensors->count;
    add_experts(tensors, config, layer);
    for (int t = first; t < tensors->count; t++) {
        tensors->items[t].grad_overwritten = true; /* by experts_backward, see moe_backward */
    }
}

/* ---- sizes ---- */

/* The plan's sizes as the options ask for them. */
static Plan plan_of(const Router *router, const ModelConfig *c, int N, int T) {
    Plan plan = {.N = N, .E = c->experts, .K = c->top_k, .layout = c->layout, .drop = c->drop};
    if (router->plan == PLAN_SOFT) {
        plan.slots = c->slots;
        plan.K = c->experts * c->slots;
        plan.across = router->across;
        plan.group_tokens = router->across ? N / T : T;
        plan.rows = N / plan.group_tokens * plan.K;
        return plan;
    }
    plan.K = router->plan == PLAN_EXPERTS_CHOOSE ? c->experts : c->top_k;
    plan.capacity = router->exact_share ? config_share(c, N) : config_capacity(c, N);
    plan.rows = plan_rows(N, plan.E, plan.K, plan.capacity, plan.layout);
    return plan;
}

void moe_set_dropless(MoeLayer *moe, bool dropless) {
    Plan *plan = &moe->plan;
    if (plan->slots > 0 || moe->router->exact_share) {
        return;
    }
    plan->capacity = dropless ? 0 : moe->asked.capacity;
    plan->layout = dropless ? LAYOUT_COMPACT : moe->asked.layout;
    plan->rows = dropless ? plan_rows(plan->N, plan->E, plan->K, 0, LAYOUT_COMPACT) : moe->asked.rows;
}

static void grow(size_t *size, size_t needed) {
    *size = needed > *size ? needed : *size;
}

void moe_grow_scratch(ScratchSize *size, ExpertShape shape) {
    grow(&size->h, (size_t)shape.rows * shape.H);
    grow(&size->a, (size_t)shape.rows * experts_a_width(shape));
}

/* ---- memory ---- */

static void reserve_plan(Plan *plan, size_t rows, Arena *arena) {
    int E = plan->E;
    size_t entries = (size_t)plan->N * plan->K;
    arena_reserve(arena, (void **)&plan->weight, entries * sizeof(acc_t), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&plan->count, E * sizeof(int), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&plan->demand, E * sizeof(int), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&plan->offset, (E + 1) * sizeof(int), MEMORY_ACTIVATIONS);
    if (plan->slots > 0) {
        arena_reserve(arena, (void **)&plan->mix, entries * sizeof(acc_t), MEMORY_ACTIVATIONS);
        return;
    }
    arena_reserve(arena, (void **)&plan->expert, entries * sizeof(int), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&plan->row, entries * sizeof(int), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&plan->entry, rows * sizeof(int), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&plan->row_weight, rows * sizeof(acc_t), MEMORY_ACTIVATIONS);
    if (plan->layout == LAYOUT_BLOCK) {
        size_t tiles = (rows + PLAN_TILE - 1) / PLAN_TILE;
        arena_reserve(arena, (void **)&plan->tile_expert, tiles * sizeof(int), MEMORY_ACTIVATIONS);
    }
}

static void reserve_pass(RouterPass *pass, size_t scores, Arena *arena) {
    size_t probs = (size_t)pass->N * pass->E;
    arena_reserve(arena, (void **)&pass->logits, scores * sizeof(acc_t), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&pass->dlogits, scores * sizeof(acc_t), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&pass->probs, probs * sizeof(acc_t), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&pass->lse, pass->N * sizeof(acc_t), MEMORY_ACTIVATIONS);
}

/* What a routed layer has beside its experts: plan, router, exchange. Returns the most rows its experts get. */
static int reserve_routing(MoeLayer *moe, const Config *config, int layer, const RouterContext *context, int site,
                           ScratchSize *size, Arena *arena) {
    const ModelConfig *c = &config->model;
    double share = 1.0 / ((double)context->routers * context->slices * context->ranks);
    moe->asked = moe->plan = plan_of(moe->router, c, moe->N, context->T);
    moe_set_dropless(moe, true); /* evaluation takes every entry */
    int plan_rows = moe->plan.rows > moe->asked.rows ? moe->plan.rows : moe->asked.rows;
    moe_set_dropless(moe, false);
    moe->pass = (RouterPass){.N = moe->N,
                             .C = c->dim,
                             .E = c->experts,
                             .K = c->top_k,
                             .renorm = c->renorm,
                             .site = site,
                             .config = config,
                             .context = context,
                             .aux_scale = config->train.aux_coef * share,
                             .z_scale = config->train.z_coef * share};
    size_t entries = (size_t)moe->N * moe->plan.K, row_bytes = c->dim * sizeof(real_t);
    bool soft = moe->plan.slots > 0;
    reserve_plan(&moe->plan, plan_rows, arena);
    reserve_pass(&moe->pass, soft ? entries : (size_t)moe->N * c->experts, arena);
    if (moe->router->reserve) {
        moe->router->reserve(&moe->pass, arena);
    }
    if (soft) {
        arena_reserve(arena, (void **)&moe->out_rows, plan_rows * row_bytes, MEMORY_ACTIVATIONS);
    }
    const int64_t *step = &context->host_step->number;
    int rows = exchange_reserve(&moe->exchange, &moe->plan, plan_rows, config, layer, step, &size->exchange, arena);
    grow(&size->rows, rows);
    grow(&size->slot_rows, soft && exchange_travels(&moe->exchange) ? plan_rows : 0);
    grow(&size->entries, entries);
    grow(&size->experts, c->experts);
    size->soft |= soft;
    return rows;
}

void moe_reserve(MoeLayer *moe, const Config *config, int layer, int N, const RouterContext *context, int site,
                 ScratchSize *size, Arena *arena) {
    const ModelConfig *c = &config->model;
    moe->N = N;
    moe->C = c->dim;
    moe->router = moe_is_routed(c, layer) ? router_find(c->router) : NULL;
    if (!moe->router) {
        moe->experts = expert_shape(c, 1, config_dense_width(c), N);
    } else {
        int most = reserve_routing(moe, config, layer, context, site, size, arena);
        moe->experts = expert_shape(c, moe->exchange.experts, c->expert_dim, most);
    }
    size_t rows = moe->experts.rows, width = experts_a_width(moe->experts);
    size_t parts = moe->router ? moe->exchange.parts : 1;
    bool keep = config->train.recompute != RECOMPUTE_EXPERTS;
    if (keep) {
        arena_reserve(arena, (void **)&moe->a, parts * rows * width * sizeof(real_t), MEMORY_ACTIVATIONS);
    }
    size->a_again |= !keep;
    moe_grow_scratch(size, moe->experts);
    if (moe->router && c->perft == PERFT_E) {
        ExpertShape shape = adapter_shape(c, moe->experts.E, c->dim, c->perft_rank, 0, moe->experts.rows);
        adapter_reserve(&moe->adapters, shape, parts * rows, arena);
        moe_grow_scratch(size, shape);
    }
    if (moe->router && c->shared_experts > 0) {
        moe->shared = expert_shape(c, 1, c->shared_experts * c->expert_dim, N);
        size_t shared_width = experts_a_width(moe->shared);
        if (keep) {
            arena_reserve(arena, (void **)&moe->shared_a, N * shared_width * sizeof(real_t), MEMORY_ACTIVATIONS);
        }
        moe_grow_scratch(size, moe->shared);
    }
}

void moe_reserve_scratch(MoeScratch *scratch, const ModelConfig *config, ScratchSize size, bool backward,
                         Arena *arena) {
    size_t row_bytes = size.rows * config->dim * sizeof(real_t);
    bool copies = dispatch_copies() || size.soft || size.exchange.copies;
    exchange_reserve_scratch(&scratch->exchange, size.exchange, config->dim, arena);
    if (size.slot_rows > 0) {
        arena_reserve(arena, (void **)&scratch->slot_rows, size.slot_rows * config->dim * sizeof(real_t),
                      MEMORY_ACTIVATIONS);
    }
    if (copies) {
        arena_reserve(arena, (void **)&scratch->in_rows, row_bytes, MEMORY_ACTIVATIONS);
    }
    arena_reserve(arena, (void **)&scratch->out_rows, row_bytes, MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&scratch->mean_prob, size.experts * sizeof(acc_t), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&scratch->h, size.h * sizeof(real_t), MEMORY_ACTIVATIONS);
    if (size.a_again) {
        arena_reserve(arena, (void **)&scratch->a, size.a * sizeof(real_t), MEMORY_ACTIVATIONS);
    }
    arena_reserve(arena, (void **)&scratch->all_rows, 2 * sizeof(int), MEMORY_ACTIVATIONS);
    if (backward) {
        if (copies) {
            arena_reserve(arena, (void **)&scratch->dy_rows, row_bytes, MEMORY_ACTIVATIONS);
        }
        arena_reserve(arena, (void **)&scratch->da, size.a * sizeof(real_t), MEMORY_ACTIVATIONS);
        arena_reserve(arena, (void **)&scratch->drow_weight, size.rows * sizeof(acc_t), MEMORY_ACTIVATIONS);
        arena_reserve(arena, (void **)&scratch->dweight, size.entries * sizeof(acc_t), MEMORY_ACTIVATIONS);
        if (size.soft) {
            arena_reserve(arena, (void **)&scratch->dmix, size.entries * sizeof(acc_t), MEMORY_ACTIVATIONS);
        }
    }
}

/* ---- addresses ---- */

void moe_connect_router(MoeLayer *moe, const TensorList *tensors, const char *prefix, acc_t *master, acc_t *grads) {
    for (int t = 0, i = 0; t < tensors->count && i < ROUTER_PARAMS; t++) {
        const Tensor *tensor = &tensors->items[t];
        if (strncmp(tensor->name, prefix, strlen(prefix)) == 0) {
            bool trained = grads && tensor->kind != TENSOR_STATE;
            moe->pass.param[i++] = (RouterParam){master + tensor->offset, trained ? grads + tensor->offset : NULL};
        }
    }
}

void moe_connect(MoeLayer *moe, const TensorList *tensors, int layer, const char *router_prefix, const real_t *weights,
                 acc_t *master, acc_t *grads) {
    const char *experts = moe->router ? "moe.experts" : "mlp";
    Weight w1 = weight_find(tensors, weights, grads, "layers.%d.%s.w1", layer, experts);
    Weight w2 = weight_find(tensors, weights, grads, "layers.%d.%s.w2", layer, experts);
    Weight shared_w1 = weight_find(tensors, weights, grads, "layers.%d.moe.shared.w1", layer);
    Weight shared_w2 = weight_find(tensors, weights, grads, "layers.%d.moe.shared.w2", layer);
    moe->w1 = w1.w, moe->dw1 = w1.grad;
    moe->w2 = w2.w, moe->dw2 = w2.grad;
    moe->shared_w1 = shared_w1.w, moe->dshared_w1 = shared_w1.grad;
    moe->shared_w2 = shared_w2.w, moe->dshared_w2 = shared_w2.grad;
    if (moe->adapters.shape.H > 0) {
        char name[64];
        snprintf(name, sizeof name, "layers.%d.perft", layer);
        adapter_connect(&moe->adapters, tensors, name, weights, grads);
    }
    moe_connect_router(moe, tensors, router_prefix, master, grads);
}

AdapterScratch moe_adapter_scratch(const MoeScratch *scratch) {
    return (AdapterScratch){scratch->h, scratch->da, scratch->all_rows};
}

void moe_free(MoeLayer *moe) {
    if (moe->router && moe->router->release) {
        moe->router->release(&moe->pass);
    }
    free(moe->pass.own);
    exchange_free(&moe->exchange);
}
