/* The MoE layer, stage by stage. Read moe_forward, then moe_backward: each stage is one kernel call, in the order the
 * data takes, and the backward names the stage whose gradient it makes. What comes before them lists tensors and
 * reserves memory.
 *
 * To change what a stage computes, open its kernel; to change who chooses, a router_*.c. Called by chain.c.
 */
#include "moe.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"
#include "../kernels/comm.h"
#include "../kernels/dispatch.h"
#include "../kernels/permute.h"
#include "../kernels/soft_mix.h"

bool moe_is_routed(const ModelConfig *config, int layer) {
    return router_find(config->router)->plan != PLAN_NONE && (layer + 1) % config->moe_every == 0;
}

static ExpertShape expert_shape(const ModelConfig *config, int E, int H, int rows) {
    return (ExpertShape){.E = E, .C = config->dim, .H = H, .rows = rows, .gelu = config->act == ACT_GELU};
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

static void grow(size_t *size, size_t needed) {
    *size = needed > *size ? needed : *size;
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

void moe_reserve(MoeLayer *moe, const Config *config, int layer, int N, const RouterContext *context, int site,
                 ScratchSize *size, Arena *arena) {
    const ModelConfig *c = &config->model;
    moe->N = N;
    moe->C = c->dim;
    moe->layer = layer;
    moe->router = moe_is_routed(c, layer) ? router_find(c->router) : NULL;
    if (!moe->router) {
        moe->experts = expert_shape(c, 1, config_dense_width(c), N);
    } else {
        moe->asked = moe->plan = plan_of(moe->router, c, N, context->T);
        moe_set_dropless(moe, true); /* evaluation takes every entry */
        int most_rows = moe->plan.rows > moe->asked.rows ? moe->plan.rows : moe->asked.rows;
        moe_set_dropless(moe, false);
        double share = 1.0 / ((double)context->routers * context->slices * context->ranks);
        size_t rows = exchange_rows(most_rows);
        moe->pass = (RouterPass){.N = N,
                                 .C = c->dim,
                                 .E = c->experts,
                                 .K = c->top_k,
                                 .renorm = c->renorm,
                                 .site = site,
                                 .config = config,
                                 .context = context,
                                 .aux_scale = config->train.aux_coef * share,
                                 .z_scale = config->train.z_coef * share};
        exchange_reserve(&moe->exchange, &moe->plan, rows, arena);
        moe->experts = expert_shape(c, moe->exchange.experts, c->expert_dim, (int)rows);
        size_t entries = (size_t)N * moe->plan.K;
        reserve_plan(&moe->plan, most_rows, arena);
        reserve_pass(&moe->pass, moe->plan.slots > 0 ? entries : (size_t)N * c->experts, arena);
        if (moe->router->reserve) {
            moe->router->reserve(&moe->pass, arena);
        }
        size_t row_bytes = c->dim * sizeof(real_t);
        if (moe->plan.slots > 0) {
            arena_reserve(arena, (void **)&moe->out_rows, rows * row_bytes, MEMORY_ACTIVATIONS);
        }
        if (exchange_travels(&moe->exchange)) {
            arena_reserve(arena, (void **)&moe->in_rows, rows * row_bytes, MEMORY_ACTIVATIONS);
        }
        grow(&size->rows, rows);
        grow(&size->plan_rows, most_rows);
        grow(&size->entries, entries);
        size->soft |= moe->plan.slots > 0;
    }
    size_t rows = moe->experts.rows, width = experts_a_width(moe->experts);
    bool keep = config->train.recompute != RECOMPUTE_EXPERTS;
    if (keep) {
        arena_reserve(arena, (void **)&moe->a, rows * width * sizeof(real_t), MEMORY_ACTIVATIONS);
    }
    size->a_again |= !keep;
    grow(&size->h, rows * moe->experts.H);
    grow(&size->a, rows * width);
    if (moe->router && c->shared_experts > 0) {
        moe->shared = expert_shape(c, 1, c->shared_experts * c->expert_dim, N);
        size_t shared_width = experts_a_width(moe->shared);
        if (keep) {
            arena_reserve(arena, (void **)&moe->shared_a, N * shared_width * sizeof(real_t), MEMORY_ACTIVATIONS);
        }
        grow(&size->h, (size_t)N * moe->shared.H);
        grow(&size->a, N * shared_width);
    }
}

void moe_free(MoeLayer *moe) {
    if (moe->router && moe->router->release) {
        moe->router->release(&moe->pass);
    }
    free(moe->pass.own);
    exchange_free(&moe->exchange);
}

void moe_reserve_scratch(MoeScratch *scratch, const ModelConfig *config, ScratchSize size, int N, bool backward,
                         Arena *arena) {
    size_t row_bytes = size.rows * config->dim * sizeof(real_t);
    bool copies = dispatch_copies() || size.soft || size.plan_rows < size.rows;
    exchange_reserve_scratch(&scratch->exchange, size.plan_rows, size.rows, config->dim, arena);
    if (copies) {
        arena_reserve(arena, (void **)&scratch->in_rows, row_bytes, MEMORY_ACTIVATIONS);
    }
    arena_reserve(arena, (void **)&scratch->out_rows, row_bytes, MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&scratch->mean_prob, config->experts * sizeof(acc_t), MEMORY_ACTIVATIONS);
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

/* Where a tensor of the list lies in a flat buffer; NULL without the tensor or the buffer. */
static const real_t *weight_of(const TensorList *tensors, const real_t *weights, int layer, const char *part) {
    char name[64];
    snprintf(name, sizeof name, "layers.%d.%s", layer, part);
    int t = tensors_find(tensors, name);
    return t < 0 ? NULL : weights + tensors->items[t].offset;
}

static acc_t *gradient_of(const TensorList *tensors, acc_t *grads, int layer, const char *part) {
    char name[64];
    snprintf(name, sizeof name, "layers.%d.%s", layer, part);
    int t = tensors_find(tensors, name);
    return t < 0 || !grads ? NULL : grads + tensors->items[t].offset;
}

void moe_connect(MoeLayer *moe, const TensorList *tensors, int layer, const char *router_prefix, const real_t *weights,
                 acc_t *master, acc_t *grads) {
    const char *w1 = moe->router ? "moe.experts.w1" : "mlp.w1", *w2 = moe->router ? "moe.experts.w2" : "mlp.w2";
    moe->w1 = weight_of(tensors, weights, layer, w1), moe->dw1 = gradient_of(tensors, grads, layer, w1);
    moe->w2 = weight_of(tensors, weights, layer, w2), moe->dw2 = gradient_of(tensors, grads, layer, w2);
    moe->shared_w1 = weight_of(tensors, weights, layer, "moe.shared.w1");
    moe->shared_w2 = weight_of(tensors, weights, layer, "moe.shared.w2");
    moe->dshared_w1 = gradient_of(tensors, grads, layer, "moe.shared.w1");
    moe->dshared_w2 = gradient_of(tensors, grads, layer, "moe.shared.w2");
    for (int t = 0, i = 0; t < tensors->count && i < ROUTER_PARAMS; t++) {
        const Tensor *tensor = &tensors->items[t];
        if (strncmp(tensor->name, router_prefix, strlen(router_prefix)) == 0) {
            bool trained = grads && tensor->kind != TENSOR_STATE;
            moe->pass.param[i++] = (RouterParam){master + tensor->offset, trained ? grads + tensor->offset : NULL};
        }
    }
}

/* ---- the layer ---- */

/* What follows moves rows between ranks; part: for the line that a rank says which waits in vain. */
static void begin_exchange(const MoeLayer *moe, const char *part, Profile *profile, Stream *stream) {
    profile_stage(profile, STAGE_EXCHANGE, stream);
    comm_at(moe->pass.context->host_step->number, moe->layer, part);
}

/* The router's losses and the statistics of what it did. */
static void measure(MoeLayer *moe, acc_t *load, int *demand, Stream *stream) {
    RouterPass *pass = &moe->pass;
    const Plan *plan = &moe->plan;
    device_zero(load, LOAD_VALUES * sizeof(acc_t), stream);
    pass->demand = moe->exchange.demand;
    if (moe->router->balance) {
        moe->router->balance(pass, plan, stream);
    }
    probs_measure(load, pass->mean_prob, pass->probs, plan->N, plan->E, pass->K, stream);
    plan_measure(load, plan, stream);
    device_copy(demand, pass->demand, plan->E * sizeof(int), stream);
}

/* Rows that lie in x as they are. */
static RowSource rows_of(const real_t *x) {
    return (RowSource){x, NULL, 0};
}

/* Rows of x (N,C) in the order of the plan: written out, to `to`, unless the experts fetch them by index. */
static RowSource dispatch(const MoeLayer *moe, MoeScratch *scratch, real_t *to, const real_t *x, Stream *stream) {
    const Plan *plan = &moe->plan;
    to = exchange_outbox(&scratch->exchange, to);
    if (plan->slots > 0) {
        soft_dispatch_forward(to, x, plan, moe->C, stream);
    } else if (exchange_travels(&moe->exchange)) {
        dispatch_copy(to, x, plan, moe->C, stream);
    } else {
        return dispatch_forward(to, x, plan, moe->C, stream);
    }
    return rows_of(to);
}

/* Keeps rows that were made elsewhere. */
static void keep(real_t *kept, const real_t *rows, size_t count, Stream *stream) {
    if (kept != rows) {
        device_copy(kept, rows, count * sizeof(real_t), stream);
    }
}

/* Where a forward puts its pre-activations: where they are kept, or where all layers put theirs. */
static real_t *a_of(real_t *kept, MoeScratch *scratch) {
    return kept ? kept : scratch->a;
}

/* The forward's pre-activations, made again where they were not kept. */
static const real_t *a_again(const real_t *kept, MoeScratch *scratch, RowSource x, const real_t *w1, const int *offset,
                             ExpertShape shape, Stream *stream) {
    if (!kept) {
        experts_forward_again(scratch->a, scratch->h, x, w1, offset, shape, stream);
        return scratch->a;
    }
    return kept;
}

void moe_forward(MoeLayer *moe, MoeScratch *scratch, real_t *y, const real_t *x, acc_t *load, int *demand,
                 Profile *profile, Stream *stream) {
    if (!moe->router) {
        profile_stage(profile, STAGE_EXPERTS, stream);
        experts_forward(y, a_of(moe->a, scratch), scratch->h, rows_of(x), moe->w1, moe->w2, scratch->all_rows,
                        moe->experts, 0, stream);
        return;
    }
    Plan *plan = &moe->plan;
    const Exchange *exchange = &moe->exchange;
    bool soft = plan->slots > 0;
    real_t *in_rows = moe->in_rows ? moe->in_rows : scratch->in_rows;
    real_t *out_rows = soft ? moe->out_rows : scratch->out_rows;
    moe->pass.x = x;
    moe->pass.load = load;
    moe->pass.mean_prob = scratch->mean_prob;
    profile_stage(profile, STAGE_ROUTE, stream);
    moe->router->forward(&moe->pass, plan, stream);
    profile_stage(profile, STAGE_PERMUTE, stream);
    plan_build(plan, stream);
    begin_exchange(moe, "counts", profile, stream);
    exchange_plan(&moe->exchange, plan, stream);
    profile_stage(profile, STAGE_PERMUTE, stream);
    measure(moe, load, demand, stream);
    profile_stage(profile, STAGE_DISPATCH, stream);
    RowSource rows = dispatch(moe, scratch, in_rows, x, stream);
    begin_exchange(moe, "dispatch", profile, stream);
    rows = exchange_there(exchange, &scratch->exchange, in_rows, rows, stream);
    profile_stage(profile, STAGE_EXPERTS, stream);
    experts_forward(out_rows, a_of(moe->a, scratch), scratch->h, rows, moe->w1, moe->w2, exchange->offset, moe->experts,
                    0, stream);
    begin_exchange(moe, "combine", profile, stream);
    real_t *home = exchange_back(exchange, &scratch->exchange, out_rows, stream);
    profile_stage(profile, STAGE_COMBINE, stream);
    if (soft) {
        keep(moe->out_rows, home, (size_t)plan->rows * moe->C, stream);
        soft_combine_forward(y, home, plan, moe->C, 0, stream);
    } else {
        combine_forward(y, home, plan, moe->C, 0, stream);
    }
    if (moe->shared.H > 0) {
        profile_stage(profile, STAGE_EXPERTS, stream);
        experts_forward(y, a_of(moe->shared_a, scratch), scratch->h, rows_of(x), moe->shared_w1, moe->shared_w2,
                        scratch->all_rows, moe->shared, 1, stream);
    }
}

/* The experts' input again, where it was not kept: cheaper than keeping it for every layer. */
static RowSource dispatch_again(const MoeLayer *moe, MoeScratch *scratch, const real_t *x, Profile *profile,
                                Stream *stream) {
    if (moe->in_rows) {
        return rows_of(moe->in_rows);
    }
    profile_stage(profile, STAGE_DISPATCH, stream);
    return dispatch(moe, scratch, scratch->in_rows, x, stream);
}

/* From dy to dx (added to where the shared experts have written) and dweight, by way of a soft plan. */
static void soft_backward(MoeLayer *moe, MoeScratch *scratch, real_t *dx, const real_t *dy, const real_t *x, int add_dw,
                          Profile *profile, Stream *stream) {
    const Plan *plan = &moe->plan;
    const Exchange *exchange = &moe->exchange;
    profile_stage(profile, STAGE_COMBINE, stream);
    real_t *outbox = exchange_outbox(&scratch->exchange, scratch->dy_rows);
    soft_combine_backward(outbox, scratch->dweight, dy, moe->out_rows, plan, moe->C, stream);
    begin_exchange(moe, "combine backward", profile, stream);
    RowSource dy_rows = exchange_there(exchange, &scratch->exchange, scratch->dy_rows, rows_of(outbox), stream);
    RowSource rows = dispatch_again(moe, scratch, x, profile, stream);
    profile_stage(profile, STAGE_EXPERTS, stream);
    const real_t *a = a_again(moe->a, scratch, rows, moe->w1, exchange->offset, moe->experts, stream);
    experts_backward(scratch->din_rows, NULL, moe->dw1, moe->dw2, scratch->h, scratch->da, dy_rows, rows, a, NULL,
                     moe->w1, moe->w2, exchange->offset, moe->experts, 0, add_dw, stream);
    begin_exchange(moe, "dispatch backward", profile, stream);
    const real_t *home = exchange_back(exchange, &scratch->exchange, scratch->din_rows, stream);
    profile_stage(profile, STAGE_DISPATCH, stream);
    soft_dispatch_backward(dx, scratch->dmix, home, x, plan, moe->C, moe->shared.H > 0, stream);
}

/* The same by way of a sparse plan. */
static void sparse_backward(MoeLayer *moe, MoeScratch *scratch, real_t *dx, const real_t *dy, const real_t *x,
                            int add_dw, Profile *profile, Stream *stream) {
    const Plan *plan = &moe->plan;
    const Exchange *exchange = &moe->exchange;
    profile_stage(profile, STAGE_COMBINE, stream);
    RowSource dy_rows = dispatch(moe, scratch, scratch->dy_rows, dy, stream); /* the backward of combine */
    begin_exchange(moe, "combine backward", profile, stream);
    dy_rows = exchange_there(exchange, &scratch->exchange, scratch->dy_rows, dy_rows, stream);
    const acc_t *weights = exchange_weights_there(exchange, &scratch->exchange, plan, stream);
    RowSource rows = dispatch_again(moe, scratch, x, profile, stream);
    profile_stage(profile, STAGE_EXPERTS, stream);
    const real_t *a = a_again(moe->a, scratch, rows, moe->w1, exchange->offset, moe->experts, stream);
    experts_backward(scratch->din_rows, scratch->drow_weight, moe->dw1, moe->dw2, scratch->h, scratch->da, dy_rows,
                     rows, a, weights, moe->w1, moe->w2, exchange->offset, moe->experts, 0, add_dw, stream);
    begin_exchange(moe, "dispatch backward", profile, stream);
    const real_t *home = exchange_back(exchange, &scratch->exchange, scratch->din_rows, stream);
    const acc_t *dweights = exchange_weights_back(exchange, &scratch->exchange, scratch->drow_weight, stream);
    profile_stage(profile, STAGE_DISPATCH, stream);
    dispatch_backward(dx, home, plan, moe->C, moe->shared.H > 0, stream);
    profile_stage(profile, STAGE_ROUTE, stream);
    plan_weight_backward(scratch->dweight, dweights, plan, stream);
}

void moe_backward(MoeLayer *moe, MoeScratch *scratch, real_t *dx, const real_t *dy, const real_t *x, int add_dw,
                  Profile *profile, Stream *stream) {
    if (!moe->router) {
        profile_stage(profile, STAGE_EXPERTS, stream);
        const real_t *a = a_again(moe->a, scratch, rows_of(x), moe->w1, scratch->all_rows, moe->experts, stream);
        experts_backward(dx, NULL, moe->dw1, moe->dw2, scratch->h, scratch->da, rows_of(dy), rows_of(x), a, NULL,
                         moe->w1, moe->w2, scratch->all_rows, moe->experts, 0, add_dw, stream);
        return;
    }
    if (moe->shared.H > 0) {
        profile_stage(profile, STAGE_EXPERTS, stream);
        const real_t *a =
            a_again(moe->shared_a, scratch, rows_of(x), moe->shared_w1, scratch->all_rows, moe->shared, stream);
        experts_backward(dx, NULL, moe->dshared_w1, moe->dshared_w2, scratch->h, scratch->da, rows_of(dy), rows_of(x),
                         a, NULL, moe->shared_w1, moe->shared_w2, scratch->all_rows, moe->shared, 0, add_dw, stream);
    }
    if (moe->plan.slots > 0) {
        moe->pass.dmix = scratch->dmix;
        soft_backward(moe, scratch, dx, dy, x, add_dw, profile, stream);
    } else {
        sparse_backward(moe, scratch, dx, dy, x, add_dw, profile, stream);
    }
    if (moe->router->backward) {
        profile_stage(profile, STAGE_ROUTE, stream);
        moe->router->backward(&moe->pass, dx, scratch->dweight, &moe->plan, stream);
    }
}
