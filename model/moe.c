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
#include "../kernels/dispatch.h"
#include "../kernels/permute.h"
#include "../kernels/soft_mix.h"

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

void moe_grow_scratch(ScratchSize *size, ExpertShape shape) {
    grow(&size->h, (size_t)shape.rows * shape.H);
    grow(&size->a, (size_t)shape.rows * experts_a_width(shape));
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
    return t < 0 || !grads || tensors->items[t].frozen ? NULL : grads + tensors->items[t].offset;
}

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
    const char *w1 = moe->router ? "moe.experts.w1" : "mlp.w1", *w2 = moe->router ? "moe.experts.w2" : "mlp.w2";
    moe->w1 = weight_of(tensors, weights, layer, w1), moe->dw1 = gradient_of(tensors, grads, layer, w1);
    moe->w2 = weight_of(tensors, weights, layer, w2), moe->dw2 = gradient_of(tensors, grads, layer, w2);
    moe->shared_w1 = weight_of(tensors, weights, layer, "moe.shared.w1");
    moe->shared_w2 = weight_of(tensors, weights, layer, "moe.shared.w2");
    moe->dshared_w1 = gradient_of(tensors, grads, layer, "moe.shared.w1");
    moe->dshared_w2 = gradient_of(tensors, grads, layer, "moe.shared.w2");
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

/* ---- the layer ---- */

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
    plan_measure(load, exchange_measured(&moe->exchange), stream);
    device_copy(demand, pass->demand, plan->E * sizeof(int), stream);
}

/* Rows that lie in x as they are. */
static RowSource rows_of(const real_t *x) {
    return (RowSource){x, NULL, 0};
}

/* Where a forward puts its pre-activations: where they are kept, or where all layers put theirs. */
static real_t *a_of(real_t *kept, MoeScratch *scratch) {
    return kept ? kept : scratch->a;
}

/* Where those of a part of the tokens are kept (exchange.h); NULL where none are. */
static real_t *kept_a(const MoeLayer *moe, int part) {
    return moe->a ? moe->a + (size_t)part * moe->experts.rows * experts_a_width(moe->experts) : NULL;
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

/* Where the adapters of a part keep theirs. */
static real_t *kept_by_adapters(const MoeLayer *moe, int part) {
    return moe->adapters.kept + (size_t)part * moe->adapters.shape.rows * moe->adapters.shape.H;
}

/* What the experts, and the adapters in them, make of a part's rows. */
static void rows_forward(MoeLayer *moe, int part, MoeScratch *scratch, real_t *made, RowSource rows, Profile *profile,
                         Stream *stream) {
    const Adapter *adapters = &moe->adapters;
    const int *offset = exchange_experts(&moe->exchange, part)->offset;
    profile_stage(profile, STAGE_EXPERTS, stream);
    experts_forward(made, a_of(kept_a(moe, part), scratch), scratch->h, rows, moe->w1, moe->w2, offset, moe->experts, 0,
                    stream);
    if (adapters->shape.H > 0) {
        experts_forward(made, kept_by_adapters(moe, part), scratch->h, rows, adapters->a, adapters->b, offset,
                        adapters->shape, 1, stream);
    }
}

/* y from x by way of a sparse plan. */
static void sparse_forward(MoeLayer *moe, MoeScratch *scratch, real_t *y, const real_t *x, Profile *profile,
                           Stream *stream) {
    const Exchange *exchange = &moe->exchange;
    ExchangeScratch *wire = &scratch->exchange;
    exchange_dispatch_begin(exchange, wire, x, true, profile, stream);
    for (int p = 0; p < exchange->parts; p++) {
        RowSource rows = exchange_dispatch(exchange, p, wire, scratch->in_rows, x, true, profile, stream);
        rows_forward(moe, p, scratch, scratch->out_rows, rows, profile, stream);
        exchange_combine(exchange, p, wire, y, scratch->out_rows, profile, stream);
    }
    exchange_combine_end(exchange, wire, y, profile, stream);
}

/* Where a soft plan's rows stand: where experts have theirs, unless experts are on other ranks. */
static real_t *slots_in(const MoeScratch *scratch, real_t *rows_of_experts) {
    return scratch->slot_rows ? scratch->slot_rows : rows_of_experts;
}

/* The same by way of a soft plan: its slots, in one part, are what the exchange takes for tokens. */
static void soft_forward(MoeLayer *moe, MoeScratch *scratch, real_t *y, const real_t *x, Profile *profile,
                         Stream *stream) {
    const Exchange *exchange = &moe->exchange;
    ExchangeScratch *wire = &scratch->exchange;
    real_t *slots = slots_in(scratch, scratch->in_rows);
    real_t *made = exchange_travels(exchange) ? scratch->out_rows : moe->out_rows;
    profile_stage(profile, STAGE_DISPATCH, stream);
    soft_dispatch_forward(slots, x, &moe->plan, moe->C, stream);
    exchange_dispatch_begin(exchange, wire, slots, true, profile, stream);
    RowSource rows = exchange_dispatch(exchange, 0, wire, scratch->in_rows, slots, true, profile, stream);
    rows_forward(moe, 0, scratch, made, rows, profile, stream);
    exchange_combine(exchange, 0, wire, moe->out_rows, made, profile, stream);
    exchange_combine_end(exchange, wire, moe->out_rows, profile, stream);
    soft_combine_forward(y, moe->out_rows, &moe->plan, moe->C, 0, stream);
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
    moe->pass.x = x;
    moe->pass.load = load;
    moe->pass.mean_prob = scratch->mean_prob;
    profile_stage(profile, STAGE_ROUTE, stream);
    moe->router->forward(&moe->pass, plan, stream);
    profile_stage(profile, STAGE_PERMUTE, stream);
    plan_build(plan, stream);
    exchange_plan(&moe->exchange, &scratch->exchange, profile, stream);
    profile_stage(profile, STAGE_PERMUTE, stream);
    measure(moe, load, demand, stream);
    if (plan->slots > 0) {
        soft_forward(moe, scratch, y, x, profile, stream);
    } else {
        sparse_forward(moe, scratch, y, x, profile, stream);
    }
    if (moe->shared.H > 0) {
        profile_stage(profile, STAGE_EXPERTS, stream);
        experts_forward(y, a_of(moe->shared_a, scratch), scratch->h, rows_of(x), moe->shared_w1, moe->shared_w2,
                        scratch->all_rows, moe->shared, 1, stream);
    }
}

/* The gradients inside the experts, of one part's rows: first scratch->din_rows, and drow_weight where there are
 * weights; then dw1 and dw2, which the parts add up. rows: what the experts read. */
static void rows_backward(MoeLayer *moe, int part, MoeScratch *scratch, RowSource dy_rows, RowSource rows,
                          const acc_t *row_weight, Profile *profile, Stream *stream) {
    const int *offset = exchange_experts(&moe->exchange, part)->offset;
    profile_stage(profile, STAGE_EXPERTS, stream);
    const real_t *a = a_again(kept_a(moe, part), scratch, rows, moe->w1, offset, moe->experts, stream);
    experts_backward_rows(scratch->din_rows, row_weight ? scratch->drow_weight : NULL, scratch->h, scratch->da, dy_rows,
                          a, row_weight, moe->w1, moe->w2, offset, moe->experts, 0, stream);
    const Adapter *adapters = &moe->adapters;
    if (adapters->shape.H > 0) { /* their experts are frozen and need h and da no more */
        experts_backward_rows(scratch->din_rows, row_weight ? scratch->drow_weight : NULL, scratch->h, scratch->da,
                              dy_rows, kept_by_adapters(moe, part), row_weight, adapters->a, adapters->b, offset,
                              adapters->shape, 1, stream);
    }
}

static void weights_backward(MoeLayer *moe, int part, MoeScratch *scratch, RowSource dy_rows, RowSource rows,
                             int add_dw, Profile *profile, Stream *stream) {
    const Adapter *adapters = &moe->adapters;
    const int *offset = exchange_experts(&moe->exchange, part)->offset;
    int add = add_dw || part > 0;
    profile_stage(profile, STAGE_EXPERTS, stream);
    if (adapters->shape.H > 0) {
        experts_backward_weights(adapters->da, adapters->db, scratch->h, scratch->da, dy_rows, rows, offset,
                                 adapters->shape, add, stream);
    } else if (moe->dw1) {
        experts_backward_weights(moe->dw1, moe->dw2, scratch->h, scratch->da, dy_rows, rows, offset, moe->experts, add,
                                 stream);
    }
}

/* From dy to dx (added to where the shared experts have written) and dweight, by way of a soft plan. */
static void soft_backward(MoeLayer *moe, MoeScratch *scratch, real_t *dx, const real_t *dy, const real_t *x, int add_dw,
                          Profile *profile, Stream *stream) {
    const Plan *plan = &moe->plan;
    const Exchange *exchange = &moe->exchange;
    ExchangeScratch *wire = &scratch->exchange;
    real_t *dmade = slots_in(scratch, scratch->dy_rows), *dslots = slots_in(scratch, scratch->din_rows);
    profile_stage(profile, STAGE_COMBINE, stream);
    soft_combine_backward(dmade, scratch->dweight, dy, moe->out_rows, plan, moe->C, stream);
    exchange_dispatch_begin(exchange, wire, dmade, false, profile, stream);
    RowSource dy_rows = exchange_dispatch(exchange, 0, wire, scratch->dy_rows, dmade, false, profile, stream);
    profile_stage(profile, STAGE_DISPATCH, stream);
    real_t *slots = slots_in(scratch, scratch->in_rows);
    soft_dispatch_forward(slots, x, plan, moe->C, stream); /* again: cheaper than keeping it for every layer */
    RowSource rows = exchange_dispatch_again(exchange, 0, scratch->in_rows, slots, profile, stream);
    rows_backward(moe, 0, scratch, dy_rows, rows, NULL, profile, stream);
    exchange_backward(exchange, 0, wire, dslots, NULL, scratch->din_rows, NULL, 0, profile, stream);
    weights_backward(moe, 0, scratch, dy_rows, rows, add_dw, profile, stream);
    exchange_backward_end(exchange, wire, dslots, NULL, 0, profile, stream);
    soft_dispatch_backward(dx, scratch->dmix, dslots, x, plan, moe->C, moe->shared.H > 0, stream);
}

/* The same by way of a sparse plan. */
static void sparse_backward(MoeLayer *moe, MoeScratch *scratch, real_t *dx, const real_t *dy, const real_t *x,
                            int add_dw, Profile *profile, Stream *stream) {
    const Exchange *exchange = &moe->exchange;
    ExchangeScratch *wire = &scratch->exchange;
    int add_dx = moe->shared.H > 0;
    /* The backward of combine is a dispatch of dy; the experts' input again is cheaper than kept for every layer. */
    exchange_dispatch_begin(exchange, wire, dy, false, profile, stream);
    for (int p = 0; p < exchange->parts; p++) {
        RowSource dy_rows = exchange_dispatch(exchange, p, wire, scratch->dy_rows, dy, false, profile, stream);
        RowSource rows = exchange_dispatch_again(exchange, p, scratch->in_rows, x, profile, stream);
        rows_backward(moe, p, scratch, dy_rows, rows, exchange_experts(exchange, p)->row_weight, profile, stream);
        exchange_backward(exchange, p, wire, dx, scratch->dweight, scratch->din_rows, scratch->drow_weight, add_dx,
                          profile, stream);
        weights_backward(moe, p, scratch, dy_rows, rows, add_dw, profile, stream);
    }
    exchange_backward_end(exchange, wire, dx, scratch->dweight, add_dx, profile, stream);
}

/* Of the one expert that takes every token. */
static void mlp_backward(MoeScratch *scratch, real_t *dx, acc_t *dw1, acc_t *dw2, const real_t *dy, const real_t *x,
                         const real_t *a, const real_t *w1, const real_t *w2, ExpertShape shape, int add_dw,
                         Stream *stream) {
    const int *all = scratch->all_rows;
    experts_backward_rows(dx, NULL, scratch->h, scratch->da, rows_of(dy), a, NULL, w1, w2, all, shape, 0, stream);
    if (dw1) {
        experts_backward_weights(dw1, dw2, scratch->h, scratch->da, rows_of(dy), rows_of(x), all, shape, add_dw,
                                 stream);
    }
}

void moe_backward(MoeLayer *moe, MoeScratch *scratch, real_t *dx, const real_t *dy, const real_t *x, int add_dw,
                  Profile *profile, Stream *stream) {
    if (!moe->router) {
        profile_stage(profile, STAGE_EXPERTS, stream);
        const real_t *a = a_again(moe->a, scratch, rows_of(x), moe->w1, scratch->all_rows, moe->experts, stream);
        mlp_backward(scratch, dx, moe->dw1, moe->dw2, dy, x, a, moe->w1, moe->w2, moe->experts, add_dw, stream);
        return;
    }
    if (moe->shared.H > 0) {
        profile_stage(profile, STAGE_EXPERTS, stream);
        const real_t *a =
            a_again(moe->shared_a, scratch, rows_of(x), moe->shared_w1, scratch->all_rows, moe->shared, stream);
        mlp_backward(scratch, dx, moe->dshared_w1, moe->dshared_w2, dy, x, a, moe->shared_w1, moe->shared_w2,
                     moe->shared, add_dw, stream);
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
