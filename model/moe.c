/* The MoE layer, stage by stage. Read moe_forward, then moe_backward: each stage is one kernel call, in the order the
 * data takes, and the backward names the stage whose gradient it makes. Which tensors and buffers the layer has is in
 * moe_memory.c.
 *
 * To change what a stage computes, open its kernel; to change who chooses, a router_*.c. Called by chain.c.
 */
#include "moe.h"

#include "../kernels/permute.h"
#include "../kernels/soft_mix.h"

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

/* What the experts, and the adapters in them, make of a part's rows: `made`, or NULL where it is with those who wait
 * for it. */
static const real_t *rows_forward(MoeLayer *moe, int part, MoeScratch *scratch, real_t *made, RowSource rows,
                                  Profile *profile, Stream *stream) {
    const Adapter *adapters = &moe->adapters;
    const int *offset = exchange_experts(&moe->exchange, part)->offset;
    RowTarget to;
    profile_stage(profile, STAGE_EXPERTS, stream);
    if (adapters->shape.H == 0 && exchange_target(&to, &moe->exchange, part, &scratch->exchange, true)) {
        experts_forward_to(to, made, a_of(kept_a(moe, part), scratch), scratch->h, rows, moe->w1, moe->w2, offset,
                           moe->experts, stream);
        return NULL;
    }
    experts_forward(made, a_of(kept_a(moe, part), scratch), scratch->h, rows, moe->w1, moe->w2, offset, moe->experts, 0,
                    stream);
    if (adapters->shape.H > 0) {
        experts_forward(made, kept_by_adapters(moe, part), scratch->h, rows, adapters->a, adapters->b, offset,
                        adapters->shape, 1, stream);
    }
    return made;
}

/* y from x by way of a sparse plan. */
static void sparse_forward(MoeLayer *moe, MoeScratch *scratch, real_t *y, const real_t *x, Profile *profile,
                           Stream *stream) {
    const Exchange *exchange = &moe->exchange;
    ExchangeScratch *wire = &scratch->exchange;
    exchange_dispatch_begin(exchange, wire, x, true, profile, stream);
    for (int p = 0; p < exchange->parts; p++) {
        RowSource rows = exchange_dispatch(exchange, p, wire, scratch->in_rows, x, true, profile, stream);
        const real_t *made = rows_forward(moe, p, scratch, scratch->out_rows, rows, profile, stream);
        exchange_combine(exchange, p, wire, y, made, profile, stream);
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
    const real_t *here = rows_forward(moe, 0, scratch, made, rows, profile, stream);
    exchange_combine(exchange, 0, wire, moe->out_rows, here, profile, stream);
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
 * weights; then dw1 and dw2, which the parts add up. rows: what the experts read. Returns as rows_forward. */
static const real_t *rows_backward(MoeLayer *moe, int part, MoeScratch *scratch, RowSource dy_rows, RowSource rows,
                                   const acc_t *row_weight, Profile *profile, Stream *stream) {
    const int *offset = exchange_experts(&moe->exchange, part)->offset;
    profile_stage(profile, STAGE_EXPERTS, stream);
    const real_t *a = a_again(kept_a(moe, part), scratch, rows, moe->w1, offset, moe->experts, stream);
    const Adapter *adapters = &moe->adapters;
    acc_t *drow_weight = row_weight ? scratch->drow_weight : NULL;
    RowTarget to;
    if (adapters->shape.H == 0 && exchange_target(&to, &moe->exchange, part, &scratch->exchange, false)) {
        experts_backward_rows_to(to, scratch->din_rows, drow_weight, scratch->h, scratch->da, dy_rows, a, row_weight,
                                 moe->w1, moe->w2, offset, moe->experts, stream);
        return NULL;
    }
    experts_backward_rows(scratch->din_rows, drow_weight, scratch->h, scratch->da, dy_rows, a, row_weight, moe->w1,
                          moe->w2, offset, moe->experts, 0, stream);
    if (adapters->shape.H > 0) { /* their experts are frozen and need h and da no more */
        experts_backward_rows(scratch->din_rows, drow_weight, scratch->h, scratch->da, dy_rows,
                              kept_by_adapters(moe, part), row_weight, adapters->a, adapters->b, offset,
                              adapters->shape, 1, stream);
    }
    return scratch->din_rows;
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
    const real_t *din = rows_backward(moe, 0, scratch, dy_rows, rows, NULL, profile, stream);
    exchange_backward(exchange, 0, wire, dslots, NULL, din, NULL, 0, profile, stream);
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
        const acc_t *row_weight = exchange_experts(exchange, p)->row_weight;
        const real_t *din = rows_backward(moe, p, scratch, dy_rows, rows, row_weight, profile, stream);
        exchange_backward(exchange, p, wire, dx, scratch->dweight, din, scratch->drow_weight, add_dx, profile, stream);
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
