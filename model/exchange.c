/* See exchange.h. Read exchange_plan first, then exchange_dispatch and exchange_combine. Called by moe.c; messages are
 * kernels/comm.h's. */
#include "exchange.h"

#include <stdlib.h>

#include "../kernels/check.h"
#include "../kernels/comm.h"
#include "../kernels/dispatch.h"
#include "../kernels/permute.h"
#include "router.h"

enum { FORWARD, BACKWARD }; /* legs of the wire */

/* ---- options ---- */

void exchange_check(const Config *config) {
    const ModelConfig *m = &config->model;
    const TrainConfig *t = &config->train;
    const Router *router = router_find(m->router);
    int ranks = comm_ranks(GROUP_WORLD), slices = t->grad_accum, ep = t->ep;
    CHECK(router->plan == PLAN_NONE || m->experts % ep == 0,
          "--experts %d is not divisible by --ep %d: change one of them", m->experts, ep);
    if (ranks == 1) {
        return;
    }
    CHECK(t->batch % (ranks * slices) == 0, "--batch %d is not divisible by %d ranks x --grad-accum %d: raise it to %d",
          t->batch, ranks, slices, (t->batch / (ranks * slices) + 1) * ranks * slices);
    CHECK(!router->sees_batch && !router->one_rank,
          "--router %s looks at all tokens of a batch, which %d ranks share: start one rank, or take another router",
          m->router, ranks);
    CHECK(m->capacity_factor == 0,
          "--capacity-factor %g with %d ranks: a capacity counts the tokens of all of them; take 0, or start one rank",
          m->capacity_factor, ranks);
    CHECK(!t->dump_routing[0], "--dump-routing writes the tokens of one rank, and %d were started", ranks);
}

bool exchange_recordable(const Config *config) {
    return config->train.ep == 1 || config->train.exchange == EXCHANGE_PADDED;
}

/* ---- memory ---- */

/* A sparse plan's arrays, by its sizes. */
static void reserve_plan(Plan *plan, Arena *arena) {
    int E = plan->E;
    size_t entries = (size_t)plan->N * plan->K, rows = plan->rows;
    arena_reserve(arena, (void **)&plan->expert, entries * sizeof(int), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&plan->weight, entries * sizeof(acc_t), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&plan->row, entries * sizeof(int), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&plan->entry, rows * sizeof(int), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&plan->row_weight, rows * sizeof(acc_t), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&plan->demand, E * sizeof(int), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&plan->count, E * sizeof(int), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&plan->offset, (E + 1) * sizeof(int), MEMORY_ACTIVATIONS);
    if (plan->layout == LAYOUT_BLOCK) {
        size_t tiles = (rows + PLAN_TILE - 1) / PLAN_TILE;
        arena_reserve(arena, (void **)&plan->tile_expert, tiles * sizeof(int), MEMORY_ACTIVATIONS);
    }
}

/* Rows of a message to one rank at most: a token has no more choices than experts there. Where the size is fixed,
 * --exchange-rows if that is less. */
static int rows_per_rank(const Exchange *x, const Config *config) {
    const Plan *plan = x->plan;
    int choices = plan->K < x->experts ? plan->K : x->experts, asked = config->train.exchange_rows;
    int most = plan->N * (x->way == EXCHANGE_DEDUP ? 1 : choices);
    return x->way == EXCHANGE_PADDED && asked > 0 && asked < most ? asked : most;
}

/* Rows that leave a rank at most. Choices of one token may be for the same rank, so it is not plan_rows of the ranks.
 */
static int rows_out(const Exchange *x, const Plan *plan, int per_rank) {
    int per_token = x->way == EXCHANGE_DEDUP && x->ranks < plan->K ? x->ranks : plan->K;
    return x->way == EXCHANGE_PADDED ? x->ranks * per_rank : plan->N * per_token;
}

/* The sizes of the plans on both sides of the wire. */
static void size_plans(Exchange *x, const Config *config) {
    const Plan *plan = x->plan;
    bool fixed = x->way == EXCHANGE_PADDED, once = x->way == EXCHANGE_DEDUP;
    int per_rank = rows_per_rank(x, config);
    x->width = once ? plan->K : 1;
    x->out = (Plan){.N = plan->N, .E = x->ranks, .K = plan->K};
    x->out.layout = fixed ? LAYOUT_PADDED : LAYOUT_COMPACT;
    x->out.capacity = fixed ? per_rank : 0;
    x->out.rows = rows_out(x, plan, per_rank);
    x->in = (Plan){.N = x->ranks * per_rank, .E = x->experts, .K = x->width};
    x->in.layout = config->model.layout == LAYOUT_BLOCK ? LAYOUT_BLOCK : LAYOUT_COMPACT;
    x->in.rows = plan_rows(x->in.N, x->experts, x->width, 0, x->in.layout);
}

static void grow(size_t *size, size_t needed) {
    *size = needed > *size ? needed : *size;
}

int exchange_reserve(Exchange *x, Plan *plan, int plan_rows, const Config *config, int layer, const int64_t *step,
                     ExchangeSize *size, Arena *arena) {
    int world = comm_ranks(GROUP_WORLD), ranks = comm_ranks(GROUP_EXPERTS), E = plan->E;
    *x = (Exchange){.way = config->train.exchange, .ranks = ranks, .E = E, .C = config->model.dim, .layer = layer};
    x->experts = E / ranks;
    x->step = step;
    x->wire[FORWARD] = config->train.wire;
    x->wire[BACKWARD] = config->train.wire_back;
    x->plan = plan;
    if (world > 1) {
        size_t told = (size_t)world * (E + ranks);
        x->host_told = calloc(told, sizeof(int));
        CHECK(x->host_told, "out of memory for the counts of %d ranks", world);
        arena_reserve(arena, (void **)&x->told, told * sizeof(int), MEMORY_ACTIVATIONS);
        arena_reserve(arena, (void **)&x->demand_of_all, E * sizeof(int), MEMORY_ACTIVATIONS);
    }
    if (ranks == 1) {
        return plan_rows;
    }
    x->send = calloc(ranks + 1, sizeof(int));
    x->receive = calloc(ranks + 1, sizeof(int));
    CHECK(x->send && x->receive, "out of memory for the counts of %d ranks", ranks);
    if (plan->slots > 0) {
        x->slots = (Plan){.N = plan_rows, .E = E, .K = 1, .rows = plan_rows};
        reserve_plan(&x->slots, arena);
        x->plan = &x->slots;
    }
    size_plans(x, config);
    reserve_plan(&x->out, arena);
    reserve_plan(&x->in, arena);
    arena_reserve(arena, (void **)&x->kept, (size_t)x->in.N * x->C * sizeof(real_t), MEMORY_ACTIVATIONS);
    size->copies |= x->way == EXCHANGE_BUCKETED;
    for (int leg = 0; leg < 2; leg++) {
        grow(&size->row_bytes, x->wire[leg] == WIRE_SAME ? 0 : wire_row_bytes(x->wire[leg], x->C));
    }
    grow(&size->out_rows, x->out.rows);
    grow(&size->in_rows, x->in.N);
    grow(&size->out_notes, (size_t)x->out.rows * x->width);
    grow(&size->in_notes, (size_t)x->in.N * x->width);
    return x->in.rows;
}

void exchange_free(Exchange *x) {
    free(x->host_told);
    free(x->send);
    free(x->receive);
}

void exchange_reserve_scratch(ExchangeScratch *scratch, ExchangeSize size, int C, Arena *arena) {
    if (comm_ranks(GROUP_EXPERTS) > 1) {
        size_t row = C * sizeof(real_t);
        arena_reserve(arena, (void **)&scratch->home, size.out_rows * row, MEMORY_ACTIVATIONS);
        arena_reserve(arena, (void **)&scratch->arrived, size.in_rows * row, MEMORY_ACTIVATIONS);
        if (size.row_bytes > 0) {
            arena_reserve(arena, &scratch->home_wire, size.out_rows * size.row_bytes, MEMORY_ACTIVATIONS);
            arena_reserve(arena, &scratch->arrived_wire, size.in_rows * size.row_bytes, MEMORY_ACTIVATIONS);
        }
        arena_reserve(arena, (void **)&scratch->home_note, size.out_notes * sizeof(RelayNote), MEMORY_ACTIVATIONS);
        arena_reserve(arena, (void **)&scratch->arrived_note, size.in_notes * sizeof(RelayNote), MEMORY_ACTIVATIONS);
        arena_reserve(arena, (void **)&scratch->home_dweight, size.out_notes * sizeof(acc_t), MEMORY_ACTIVATIONS);
        arena_reserve(arena, (void **)&scratch->arrived_dweight, size.in_notes * sizeof(acc_t), MEMORY_ACTIVATIONS);
    }
}

/* ---- the wire ---- */

bool exchange_travels(const Exchange *x) {
    return x->ranks > 1;
}

/* What follows moves data between ranks; part: for the line that a rank says which waits in vain. */
static void begin(const Exchange *x, const char *part, Profile *profile, Stream *stream) {
    profile_stage(profile, STAGE_EXCHANGE, stream);
    comm_at(*x->step, x->layer, part);
}

/* Rows of `out` to the ranks they are for. */
static void there(const Exchange *x, void *arrived, const void *home, size_t row_bytes, Stream *stream) {
    comm_exchange(GROUP_EXPERTS, arrived, x->receive, home, x->send, row_bytes, stream);
}

/* What was made of them, back. */
static void back(const Exchange *x, void *home, const void *arrived, size_t row_bytes, Stream *stream) {
    comm_exchange(GROUP_EXPERTS, home, x->send, arrived, x->receive, row_bytes, stream);
}

/* Rows there, or back, in the type of that leg. */
static void rows_there(const Exchange *x, ExchangeScratch *s, real_t *arrived, int leg, Stream *stream) {
    WireType type = x->wire[leg];
    size_t bytes = wire_row_bytes(type, x->C);
    if (type == WIRE_SAME) {
        there(x, arrived, s->home, bytes, stream);
        return;
    }
    wire_pack(s->home_wire, s->home, type, x->send[x->ranks], x->C, stream);
    there(x, s->arrived_wire, s->home_wire, bytes, stream);
    wire_unpack(arrived, s->arrived_wire, type, x->receive[x->ranks], x->C, stream);
}

static void rows_back(const Exchange *x, ExchangeScratch *s, int leg, Stream *stream) {
    WireType type = x->wire[leg];
    size_t bytes = wire_row_bytes(type, x->C);
    if (type == WIRE_SAME) {
        back(x, s->home, s->arrived, bytes, stream);
        return;
    }
    wire_pack(s->arrived_wire, s->arrived, type, x->receive[x->ranks], x->C, stream);
    back(x, s->home_wire, s->arrived_wire, bytes, stream);
    wire_unpack(s->home, s->home_wire, type, x->send[x->ranks], x->C, stream);
}

/* ---- the plans ---- */

/* All ranks tell all others how many of their choices each expert has, and how many rows they send to each rank. */
static void tell(Exchange *x, Stream *stream) {
    int world = comm_ranks(GROUP_WORLD), stride = x->E + (exchange_travels(x) ? x->ranks : 0);
    int *mine = x->told + (size_t)comm_rank(GROUP_WORLD) * stride;
    if (exchange_travels(x)) {
        relay_tell(mine, &x->out, x->plan, stream);
    } else {
        device_copy(mine, x->plan->demand, x->E * sizeof(int), stream);
    }
    comm_gather(GROUP_WORLD, x->told, mine, stride * sizeof(int), stream);
    relay_demand(x->demand_of_all, x->told, world, stride, x->E, stream);
    x->demand = x->demand_of_all;
}

/* How many rows go to, and come from, each rank of the group. */
static void count_rows(Exchange *x, Stream *stream) {
    int world = comm_ranks(GROUP_WORLD), me = comm_rank(GROUP_EXPERTS), stride = x->E + x->ranks;
    const int *group = x->host_told + (size_t)(comm_rank(GROUP_WORLD) - me) * stride + x->E;
    bool fixed = x->way == EXCHANGE_PADDED;
    if (!fixed) {
        host_from_device(x->host_told, x->told, (size_t)world * stride * sizeof(int), stream);
    }
    for (int r = 0; r < x->ranks; r++) {
        x->send[r + 1] = x->send[r] + (fixed ? x->out.capacity : group[(size_t)me * stride + r]);
        x->receive[r + 1] = x->receive[r] + (fixed ? x->out.capacity : group[(size_t)r * stride + me]);
    }
    x->in.N = x->receive[x->ranks];
}

void exchange_plan(Exchange *x, ExchangeScratch *scratch, Profile *profile, Stream *stream) {
    x->demand = x->plan->demand;
    if (exchange_travels(x)) {
        profile_stage(profile, STAGE_PERMUTE, stream);
        if (x->plan == &x->slots) {
            relay_slots(&x->slots, stream);
            plan_build(&x->slots, stream);
        }
        x->out.weight = x->plan->weight;
        relay_ranks(&x->out, x->plan, x->experts, x->way == EXCHANGE_DEDUP, stream);
        plan_build(&x->out, stream);
    }
    if (comm_ranks(GROUP_WORLD) > 1) {
        begin(x, "counts", profile, stream);
        tell(x, stream);
    }
    if (exchange_travels(x)) {
        count_rows(x, stream);
        relay_write(scratch->home_note, &x->out, x->plan, x->experts, x->width, stream);
        there(x, scratch->arrived_note, scratch->home_note, x->width * sizeof(RelayNote), stream);
        profile_stage(profile, STAGE_PERMUTE, stream);
        relay_read(&x->in, scratch->arrived_note, stream);
        plan_build(&x->in, stream);
    }
}

const Plan *exchange_experts(const Exchange *x) {
    return exchange_travels(x) ? &x->in : x->plan;
}

const Plan *exchange_measured(const Exchange *x) {
    return exchange_travels(x) ? &x->out : x->plan;
}

/* ---- rows, forward and back ---- */

/* Tokens to rows, in `to` if they are written out. Rows of a soft plan are in their order already. */
static RowSource hand_out(const Exchange *x, const Plan *plan, real_t *to, const real_t *tokens, Stream *stream) {
    if (plan->slots > 0) {
        return (RowSource){tokens, NULL, 0};
    }
    if (x->way == EXCHANGE_BUCKETED && plan == &x->in) {
        dispatch_copy(to, tokens, plan, x->C, stream);
        return (RowSource){to, NULL, 0};
    }
    return dispatch_forward(to, tokens, plan, x->C, stream);
}

RowSource exchange_dispatch(const Exchange *x, ExchangeScratch *scratch, real_t *to, const real_t *tokens, bool keep,
                            Profile *profile, Stream *stream) {
    real_t *arrived = keep ? x->kept : scratch->arrived;
    profile_stage(profile, STAGE_DISPATCH, stream);
    if (exchange_travels(x)) {
        dispatch_copy(scratch->home, tokens, &x->out, x->C, stream);
        begin(x, keep ? "dispatch" : "combine backward", profile, stream);
        rows_there(x, scratch, arrived, keep ? FORWARD : BACKWARD, stream);
        profile_stage(profile, STAGE_DISPATCH, stream);
        tokens = arrived;
    }
    return hand_out(x, exchange_experts(x), to, tokens, stream);
}

RowSource exchange_dispatch_again(const Exchange *x, real_t *to, const real_t *tokens, Profile *profile,
                                  Stream *stream) {
    profile_stage(profile, STAGE_DISPATCH, stream);
    return hand_out(x, exchange_experts(x), to, exchange_travels(x) ? x->kept : tokens, stream);
}

/* What a row carries several choices of comes back as their weighted sum; a single one is weighted at home. */
void exchange_combine(const Exchange *x, ExchangeScratch *scratch, real_t *y, const real_t *rows, Profile *profile,
                      Stream *stream) {
    profile_stage(profile, STAGE_COMBINE, stream);
    if (!exchange_travels(x)) {
        if (x->plan->slots == 0) { /* rows of a soft plan are y themselves */
            combine_forward(y, rows, x->plan, x->C, 0, stream);
        }
        return;
    }
    bool weighted_there = x->way == EXCHANGE_DEDUP;
    if (weighted_there) {
        combine_forward(scratch->arrived, rows, &x->in, x->C, 0, stream);
    } else {
        dispatch_backward(scratch->arrived, rows, &x->in, x->C, 0, stream);
    }
    begin(x, "combine", profile, stream);
    rows_back(x, scratch, FORWARD, stream);
    profile_stage(profile, STAGE_COMBINE, stream);
    if (weighted_there) {
        dispatch_backward(y, scratch->home, &x->out, x->C, 0, stream);
    } else {
        combine_forward(y, scratch->home, &x->out, x->C, 0, stream);
    }
}

void exchange_dispatch_backward(const Exchange *x, ExchangeScratch *scratch, real_t *dx, const real_t *drows,
                                int accumulate, Profile *profile, Stream *stream) {
    profile_stage(profile, STAGE_DISPATCH, stream);
    if (!exchange_travels(x)) {
        if (x->plan->slots == 0) {
            dispatch_backward(dx, drows, x->plan, x->C, accumulate, stream);
        }
        return;
    }
    dispatch_backward(scratch->arrived, drows, &x->in, x->C, 0, stream);
    begin(x, "dispatch backward", profile, stream);
    rows_back(x, scratch, BACKWARD, stream);
    profile_stage(profile, STAGE_DISPATCH, stream);
    dispatch_backward(dx, scratch->home, &x->out, x->C, accumulate, stream);
}

void exchange_weight_backward(const Exchange *x, ExchangeScratch *scratch, acc_t *dweight, const acc_t *drow_weight,
                              Profile *profile, Stream *stream) {
    if (!exchange_travels(x)) {
        profile_stage(profile, STAGE_ROUTE, stream);
        plan_weight_backward(dweight, drow_weight, x->plan, stream);
        return;
    }
    plan_weight_backward(scratch->arrived_dweight, drow_weight, &x->in, stream);
    begin(x, "weights backward", profile, stream);
    back(x, scratch->home_dweight, scratch->arrived_dweight, x->width * sizeof(acc_t), stream);
    profile_stage(profile, STAGE_ROUTE, stream);
    relay_weight_backward(dweight, scratch->home_dweight, &x->out, x->plan, x->experts, x->width, stream);
}
