/* See exchange.h. Read exchange_plan first, then exchange_dispatch_begin, send_back and sum_returned. Called by moe.c;
 * messages are kernels/comm.h's. */
#include "exchange.h"

#include <stdlib.h>

#include "../kernels/check.h"
#include "../kernels/comm.h"
#include "../kernels/dispatch.h"
#include "../kernels/peers.h"
#include "../kernels/permute.h"
#include "router.h"

enum { FORWARD, BACKWARD }; /* legs of the wire */

/* ---- options ---- */

/* Whether messages have a size that nobody has to learn. */
static bool of_fixed_size(int way) {
    return way == EXCHANGE_PADDED || way == EXCHANGE_P2P;
}

/* Whether a token travels once to a rank, however many of its experts are there. */
static bool one_row_per_rank(int way) {
    return way == EXCHANGE_DEDUP || way == EXCHANGE_P2P;
}

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
    CHECK(t->exchange_chunks == 1 || !of_fixed_size(t->exchange),
          "--exchange-chunks %d with --exchange %s: its rows have places for a whole batch; take 1, or dedup",
          t->exchange_chunks, t->exchange == EXCHANGE_P2P ? "p2p" : "padded");
    CHECK(!t->dump_routing[0], "--dump-routing writes the tokens of one rank, and %d were started", ranks);
}

bool exchange_recordable(const Config *config) {
    return config->train.ep == 1 || of_fixed_size(config->train.exchange);
}

void exchange_open(const Config *config, const Arena *arena) {
    char why[128];
    if (comm_ranks(GROUP_EXPERTS) > 1 && arena->shared) {
        bool open = peers_open(arena->base, arena->bytes, why, sizeof why);
        CHECK(open || config->train.exchange != EXCHANGE_P2P, "--exchange p2p: %s; take another way, such as dedup",
              why);
    }
}

void exchange_close(void) {
    peers_close();
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
static int rows_per_rank(const Exchange *x, const Plan *plan, const Config *config) {
    int choices = plan->K < x->experts ? plan->K : x->experts, asked = config->train.exchange_rows;
    int most = plan->N * (one_row_per_rank(x->way) ? 1 : choices);
    return x->way == EXCHANGE_PADDED && asked > 0 && asked < most ? asked : most;
}

/* Rows that leave a rank at most. Choices of one token may be for the same rank, so it is not rows_per_rank of the
 * ranks. */
static int rows_out(const Exchange *x, const Plan *plan, int per_rank) {
    int per_token = one_row_per_rank(x->way) && x->ranks < plan->K ? x->ranks : plan->K;
    return of_fixed_size(x->way) ? x->ranks * per_rank : plan->N * per_token;
}

/* The sizes of the plans on both sides of the wire. */
static void size_plans(const Exchange *x, ExchangePart *part, const Config *config) {
    const Plan *plan = &part->plan;
    bool fixed = of_fixed_size(x->way);
    int per_rank = rows_per_rank(x, plan, config);
    part->out = (Plan){.N = plan->N, .E = x->ranks, .K = plan->K};
    part->out.layout = fixed ? LAYOUT_PADDED : LAYOUT_COMPACT;
    part->out.capacity = fixed ? per_rank : 0;
    part->out.rows = rows_out(x, plan, per_rank);
    part->in = (Plan){.N = x->ranks * per_rank, .E = x->experts, .K = x->width};
    part->in.layout = config->model.layout == LAYOUT_BLOCK ? LAYOUT_BLOCK : LAYOUT_COMPACT;
    part->in.rows = plan_rows(part->in.N, x->experts, x->width, 0, part->in.layout);
}

/* The caller's. */
static int *counts_of(int count) {
    int *counts = calloc(count, sizeof(int));
    CHECK(counts, "out of memory for %d counts of rows", count);
    return counts;
}

/* Part p of the layer's tokens, whose rows come after those of the parts before it. */
static void reserve_part(Exchange *x, int p, const Config *config, Arena *arena) {
    ExchangePart *part = &x->part[p];
    const ExchangePart *before = p > 0 ? part - 1 : NULL;
    int64_t tokens = x->plan->N;
    *part = (ExchangePart){.first = (int)(tokens * p / x->parts), .plan = *x->plan};
    part->plan.N = (int)(tokens * (p + 1) / x->parts) - part->first;
    part->out_row = before ? before->out_row + before->out.rows : 0;
    part->in_row = before ? before->in_row + before->in.N : 0;
    part->send = counts_of(x->ranks + 1);
    part->receive = counts_of(x->ranks + 1);
    part->their_send = counts_of(x->ranks + 1);
    part->their_receive = counts_of(x->ranks + 1);
    part->moved = x->beside ? stream_mark_open() : NULL;
    size_plans(x, part, config);
    reserve_plan(&part->out, arena);
    reserve_plan(&part->in, arena);
}

static void grow(size_t *size, size_t needed) {
    *size = needed > *size ? needed : *size;
}

/* What the parts need together. Returns the most rows that the experts get of one. */
static int reserve_parts(Exchange *x, const Config *config, ExchangeSize *size, Arena *arena) {
    size_t out_rows = 0, in_rows = 0, most = 0;
    x->width = one_row_per_rank(x->way) ? x->plan->K : 1;
    for (int p = 0; p < x->parts; p++) {
        reserve_part(x, p, config, arena);
        out_rows += x->part[p].out.rows;
        in_rows += x->part[p].in.N;
        grow(&most, x->part[p].in.rows);
    }
    arena_reserve(arena, (void **)&x->kept, in_rows * x->C * sizeof(real_t), MEMORY_ACTIVATIONS);
    size->copies |= x->way == EXCHANGE_BUCKETED;
    for (int leg = 0; leg < 2; leg++) {
        grow(&size->row_bytes, x->wire[leg] == WIRE_SAME ? 0 : wire_row_bytes(x->wire[leg], x->C));
    }
    grow(&size->out_rows, out_rows);
    grow(&size->in_rows, in_rows);
    grow(&size->out_notes, out_rows * x->width);
    grow(&size->in_notes, in_rows * x->width);
    return (int)most;
}

/* Numbers that each rank tells all others. */
static int told_stride(const Exchange *x) {
    return x->E + (exchange_travels(x) && !of_fixed_size(x->way) ? x->parts * x->ranks : 0);
}

int exchange_reserve(Exchange *x, Plan *plan, int plan_rows, const Config *config, int layer, const int64_t *step,
                     ExchangeSize *size, Arena *arena) {
    const TrainConfig *t = &config->train;
    int world = comm_ranks(GROUP_WORLD), ranks = comm_ranks(GROUP_EXPERTS), E = plan->E;
    *x = (Exchange){.way = t->exchange, .ranks = ranks, .E = E, .C = config->model.dim, .layer = layer, .parts = 1};
    x->experts = E / ranks;
    x->step = step;
    x->wire[FORWARD] = t->wire;
    x->wire[BACKWARD] = t->wire_back;
    x->plan = plan;
    if (ranks > 1 && plan->slots == 0) { /* slots are in the order of their experts: a part would be for few ranks */
        x->parts = t->exchange_chunks < plan->N ? t->exchange_chunks : plan->N;
    }
    x->beside = x->parts > 1 && t->overlap;
    if (world > 1) {
        int told = world * told_stride(x);
        x->host_told = counts_of(told);
        arena_reserve(arena, (void **)&x->told, told * sizeof(int), MEMORY_ACTIVATIONS);
        arena_reserve(arena, (void **)&x->demand_of_all, E * sizeof(int), MEMORY_ACTIVATIONS);
    }
    if (ranks == 1) {
        return plan_rows;
    }
    arena->shared |= x->way == EXCHANGE_P2P || (t->peer_memory && device_runs_ahead());
    if (plan->slots > 0) {
        x->slots = (Plan){.N = plan_rows, .E = E, .K = 1, .rows = plan_rows};
        reserve_plan(&x->slots, arena);
        x->plan = &x->slots;
    }
    return reserve_parts(x, config, size, arena);
}

void exchange_free(Exchange *x) {
    free(x->host_told);
    for (int p = 0; p < x->parts; p++) {
        free(x->part[p].send);
        free(x->part[p].receive);
        free(x->part[p].their_send);
        free(x->part[p].their_receive);
        stream_mark_close(x->part[p].moved);
    }
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

/* The stream on which rows travel. */
static Stream *wire_stream(const Exchange *x, Stream *stream) {
    return x->beside ? device_second_stream() : stream;
}

/* What follows moves data between ranks, when all that is queued is done; what: for the line that a rank says which
 * waits in vain. */
static void begin_wire(const Exchange *x, const char *what, Profile *profile, Stream *stream) {
    profile_stage(profile, STAGE_EXCHANGE, stream);
    comm_at(*x->step, x->layer, what);
    stream_follow(wire_stream(x, stream), stream);
}

/* Waits for what has been queued to travel. */
static void end_wire(const Exchange *x, Profile *profile, Stream *stream) {
    profile_stage(profile, STAGE_EXCHANGE, stream);
    stream_follow(stream, wire_stream(x, stream));
}

/* One end of the wire, for one part: where rows are, also as they travel; how many are for, or from, each rank, and
 * where these begin with that rank. For p2p: row r is there if one of there (.., each), r's, is not -1; NULL: all. */
typedef struct {
    real_t *rows;
    char *wire;
    const int *first, *theirs, *there;
    int each;
} End;

static End home_end(const Exchange *x, const ExchangePart *part, const ExchangeScratch *s, WireType type) {
    real_t *rows = s->home + part->out_row * x->C;
    char *packed = (char *)s->home_wire + part->out_row * wire_row_bytes(type, x->C);
    char *wire = type == WIRE_SAME ? (char *)rows : packed;
    return (End){rows, wire, part->send, part->their_receive, part->out.entry, 1};
}

/* arrived: where the rows of all parts arrive, or are sent back from. */
static End far_end(const Exchange *x, const ExchangePart *part, const ExchangeScratch *s, real_t *arrived,
                   WireType type) {
    real_t *rows = arrived + part->in_row * x->C;
    char *packed = (char *)s->arrived_wire + part->in_row * wire_row_bytes(type, x->C);
    char *wire = type == WIRE_SAME ? (char *)rows : packed;
    return (End){rows, wire, part->receive, part->their_send, part->in.row, x->width};
}

/* What is as long as the notes of each row, `each` bytes a note. */
static End home_notes(const Exchange *x, const ExchangePart *part, void *notes, size_t each) {
    return (End){NULL, (char *)notes + part->out_row * x->width * each, part->send, part->their_receive, NULL, 0};
}

static End far_notes(const Exchange *x, const ExchangePart *part, void *notes, size_t each) {
    char *wire = (char *)notes + part->in_row * x->width * each;
    return (End){NULL, wire, part->receive, part->their_send, part->in.row, x->width};
}

static void pack(const Exchange *x, End end, WireType type, Stream *stream) {
    if (type != WIRE_SAME) {
        wire_pack(end.wire, end.rows, type, end.first[x->ranks], x->C, stream);
    }
}

static void unpack(const Exchange *x, End end, WireType type, Stream *stream) {
    if (type != WIRE_SAME) {
        wire_unpack(end.rows, end.wire, type, end.first[x->ranks], x->C, stream);
    }
}

static PeerRows places_of(const Exchange *x, End to, size_t row_bytes) {
    return peers_rows(to.wire, x->part[0].out.capacity, row_bytes);
}

/* Rows of one end to the other. */
static void move(const Exchange *x, End to, End from, size_t row_bytes, Stream *stream) {
    if (x->way == EXCHANGE_P2P) {
        peers_put(places_of(x, to, row_bytes), from.wire, row_bytes, from.there, from.each, stream);
    } else {
        comm_exchange(GROUP_EXPERTS, to.wire, to.first, from.wire, from.first, from.theirs, row_bytes,
                      wire_stream(x, stream));
    }
}

/* All that was moved since the last time is where it is for. */
static void settle(const Exchange *x, Stream *stream) {
    if (x->way == EXCHANGE_P2P) {
        peers_meet(false, stream);
    }
}

/* Whether dispatch and combine store rows where they are for. */
static bool stores_itself(const Exchange *x, WireType type) {
    return x->way == EXCHANGE_P2P && type == WIRE_SAME;
}

/* ---- the plans ---- */

/* All ranks tell all others how many of their choices each expert has, and how many rows they send to each rank. */
static void tell(Exchange *x, Stream *stream) {
    int stride = told_stride(x), world = comm_ranks(GROUP_WORLD);
    const int *mine = x->plan->demand;
    if (stride > x->E) {
        int *told = x->told + (size_t)comm_rank(GROUP_WORLD) * stride;
        device_copy(told, mine, x->E * sizeof(int), stream);
        for (int p = 0; p < x->parts; p++) {
            relay_tell(told + x->E + p * x->ranks, &x->part[p].out, stream);
        }
        mine = told;
    }
    if (x->way == EXCHANGE_P2P && world == x->ranks) {
        peers_put_all(x->told, mine, stride * sizeof(int), stream);
    } else {
        comm_gather(GROUP_WORLD, x->told, mine, stride * sizeof(int), stream);
    }
}

/* Rows that rank s of the group sends to rank r. */
static int rows_between(const Exchange *x, int p, int s, int r) {
    int first = comm_rank(GROUP_WORLD) - comm_rank(GROUP_EXPERTS);
    return of_fixed_size(x->way) ? x->part[p].out.capacity
                                 : x->host_told[(size_t)(first + s) * told_stride(x) + x->E + p * x->ranks + r];
}

/* Who sends how many rows to whom. */
static void count_rows(Exchange *x, int p) {
    ExchangePart *part = &x->part[p];
    int me = comm_rank(GROUP_EXPERTS);
    for (int r = 0; r < x->ranks; r++) {
        part->send[r + 1] = part->send[r] + rows_between(x, p, me, r);
        part->receive[r + 1] = part->receive[r] + rows_between(x, p, r, me);
        part->their_send[r] = part->their_receive[r] = 0;
        for (int before = 0; before < me; before++) {
            part->their_send[r] += rows_between(x, p, r, before);
            part->their_receive[r] += rows_between(x, p, before, r);
        }
    }
    part->in.N = part->receive[x->ranks];
}

/* Which rows leave, from what the router chose. */
static void plan_leaving(Exchange *x, ExchangeScratch *scratch, Stream *stream) {
    if (x->plan == &x->slots) {
        relay_slots(&x->slots, stream);
        plan_build(&x->slots, stream);
    }
    for (int p = 0; p < x->parts; p++) {
        ExchangePart *part = &x->part[p];
        size_t first = (size_t)part->first * x->plan->K;
        part->plan.expert = x->plan->expert + first;
        part->plan.weight = part->out.weight = x->plan->weight + first;
        part->plan.row = x->plan->row + first;
        if (x->way == EXCHANGE_P2P) {
            PeerRows notes = peers_rows(scratch->arrived_note, part->plan.N, x->width * sizeof(RelayNote));
            relay_places(&part->out, notes, &part->plan, x->experts, stream);
        } else {
            relay_ranks(&part->out, &part->plan, x->experts, one_row_per_rank(x->way), stream);
            plan_build(&part->out, stream);
        }
    }
}

/* The notes of a part to where its rows will be. */
static void move_notes(const Exchange *x, const ExchangePart *part, ExchangeScratch *scratch, Stream *stream) {
    End home = home_notes(x, part, scratch->home_note, sizeof(RelayNote));
    End far = far_notes(x, part, scratch->arrived_note, sizeof(RelayNote));
    relay_write((RelayNote *)home.wire, &part->out, &part->plan, x->experts, x->width, stream);
    stream_follow(wire_stream(x, stream), stream);
    move(x, far, home, x->width * sizeof(RelayNote), stream);
}

/* Which rows arrive, from the notes that say so. */
static void plan_arriving(Exchange *x, ExchangeScratch *scratch, Profile *profile, Stream *stream) {
    begin_wire(x, "notes", profile, stream);
    for (int p = 0; x->way != EXCHANGE_P2P && p < x->parts; p++) {
        move_notes(x, &x->part[p], scratch, stream);
    }
    settle(x, stream);
    end_wire(x, profile, stream);
    profile_stage(profile, STAGE_PERMUTE, stream);
    for (int p = 0; p < x->parts; p++) {
        ExchangePart *part = &x->part[p];
        relay_read(&part->in, (RelayNote *)far_notes(x, part, scratch->arrived_note, sizeof(RelayNote)).wire, stream);
        plan_build(&part->in, stream);
    }
}

/* How many rows go from whom to whom: learned, or known. */
static void count_all(Exchange *x, Stream *stream) {
    if (!of_fixed_size(x->way)) {
        size_t told = (size_t)comm_ranks(GROUP_WORLD) * told_stride(x);
        host_from_device(x->host_told, x->told, told * sizeof(int), stream);
    }
    for (int p = 0; p < x->parts; p++) {
        count_rows(x, p);
    }
}

void exchange_plan(Exchange *x, ExchangeScratch *scratch, Profile *profile, Stream *stream) {
    int world = comm_ranks(GROUP_WORLD);
    x->demand = x->plan->demand;
    if (world == 1) {
        return;
    }
    if (exchange_travels(x)) {
        profile_stage(profile, STAGE_PERMUTE, stream);
        plan_leaving(x, scratch, stream);
    }
    profile_stage(profile, STAGE_EXCHANGE, stream);
    comm_at(*x->step, x->layer, "counts");
    tell(x, stream);
    if (exchange_travels(x)) {
        count_all(x, stream);
        plan_arriving(x, scratch, profile, stream);
    }
    relay_demand(x->demand_of_all, x->told, world, told_stride(x), x->E, stream);
    x->demand = x->demand_of_all;
}

const Plan *exchange_experts(const Exchange *x, int p) {
    return exchange_travels(x) ? &x->part[p].in : x->plan;
}

const Plan *exchange_measured(const Exchange *x) {
    return exchange_travels(x) && x->way == EXCHANGE_PADDED ? &x->part[0].out : x->plan;
}

/* ---- rows, forward and back ---- */

/* Tokens to rows, in `to` if they are written out. Rows of a soft plan are in their order already. */
static RowSource hand_out(const Exchange *x, const Plan *plan, real_t *to, const real_t *tokens, Stream *stream) {
    if (plan->slots > 0) {
        return (RowSource){tokens, NULL, 0};
    }
    if (x->way == EXCHANGE_BUCKETED && exchange_travels(x)) {
        dispatch_copy(to, tokens, plan, x->C, stream);
        return (RowSource){to, NULL, 0};
    }
    return dispatch_forward(to, tokens, plan, x->C, stream);
}

/* Where the rows of all parts arrive. */
static real_t *arrived_rows(const Exchange *x, const ExchangeScratch *scratch, bool keep) {
    return keep ? x->kept : scratch->arrived;
}

void exchange_dispatch_begin(const Exchange *x, ExchangeScratch *scratch, const real_t *tokens, bool keep,
                             Profile *profile, Stream *stream) {
    WireType type = x->wire[keep ? FORWARD : BACKWARD];
    real_t *arrived = arrived_rows(x, scratch, keep);
    for (int p = 0; exchange_travels(x) && p < x->parts; p++) {
        const ExchangePart *part = &x->part[p];
        End home = home_end(x, part, scratch, type), far = far_end(x, part, scratch, arrived, type);
        const real_t *leaving = tokens + (size_t)part->first * x->C;
        size_t row_bytes = wire_row_bytes(type, x->C);
        const char *what = keep ? "dispatch" : "combine backward";
        profile_stage(profile, STAGE_DISPATCH, stream);
        if (stores_itself(x, type)) {
            begin_wire(x, what, profile, stream);
            dispatch_put(places_of(x, far, row_bytes), leaving, &part->out, x->C, stream);
        } else {
            dispatch_copy(home.rows, leaving, &part->out, x->C, stream);
            pack(x, home, type, stream);
            begin_wire(x, what, profile, stream);
            move(x, far, home, row_bytes, stream);
        }
        settle(x, stream);
        stream_mark(part->moved, wire_stream(x, stream));
    }
}

RowSource exchange_dispatch(const Exchange *x, int p, ExchangeScratch *scratch, real_t *to, const real_t *tokens,
                            bool keep, Profile *profile, Stream *stream) {
    const ExchangePart *part = &x->part[p];
    if (exchange_travels(x)) {
        WireType type = x->wire[keep ? FORWARD : BACKWARD];
        End far = far_end(x, part, scratch, arrived_rows(x, scratch, keep), type);
        profile_stage(profile, STAGE_EXCHANGE, stream);
        stream_wait(stream, part->moved);
        profile_stage(profile, STAGE_DISPATCH, stream);
        unpack(x, far, type, stream);
        tokens = far.rows;
    }
    profile_stage(profile, STAGE_DISPATCH, stream);
    return hand_out(x, exchange_experts(x, p), to, tokens, stream);
}

RowSource exchange_dispatch_again(const Exchange *x, int p, real_t *to, const real_t *tokens, Profile *profile,
                                  Stream *stream) {
    bool travels = exchange_travels(x);
    profile_stage(profile, STAGE_DISPATCH, stream);
    return hand_out(x, exchange_experts(x, p), to, travels ? x->kept + x->part[p].in_row * x->C : tokens, stream);
}

static void sum_rows(real_t *to, const real_t *rows, const Plan *plan, bool weighted, int accumulate, int C,
                     Stream *stream) {
    if (weighted) {
        combine_forward(to, rows, plan, C, accumulate, stream);
    } else {
        dispatch_backward(to, rows, plan, C, accumulate, stream);
    }
}

/* Sums of experts' rows (weighted or not) of the rows that came in part p, and these on their way back. */
static void send_back(const Exchange *x, int p, ExchangeScratch *scratch, const real_t *rows, bool weighted, int leg,
                      const char *what, Profile *profile, Stream *stream) {
    const ExchangePart *part = &x->part[p];
    WireType type = x->wire[leg];
    size_t row_bytes = wire_row_bytes(type, x->C);
    End far = far_end(x, part, scratch, scratch->arrived, type), home = home_end(x, part, scratch, type);
    if (stores_itself(x, type)) {
        begin_wire(x, what, profile, stream);
        combine_put(places_of(x, home, row_bytes), rows, &part->in, weighted, x->C, stream);
    } else {
        sum_rows(far.rows, rows, &part->in, weighted, 0, x->C, stream);
        pack(x, far, type, stream);
        begin_wire(x, what, profile, stream);
        move(x, home, far, row_bytes, stream);
    }
    settle(x, stream);
    stream_mark(part->moved, wire_stream(x, stream));
}

/* to (N,C), of all tokens, = the sums, weighted or not, of the rows that came back, added to it or not. */
static void sum_returned(const Exchange *x, ExchangeScratch *scratch, real_t *to, bool weighted, int accumulate,
                         int leg, Stage stage, Profile *profile, Stream *stream) {
    for (int p = 0; p < x->parts; p++) {
        const ExchangePart *part = &x->part[p];
        real_t *tokens = to + (size_t)part->first * x->C;
        End home = home_end(x, part, scratch, x->wire[leg]);
        profile_stage(profile, STAGE_EXCHANGE, stream);
        stream_wait(stream, part->moved);
        profile_stage(profile, stage, stream);
        unpack(x, home, x->wire[leg], stream);
        sum_rows(tokens, home.rows, &part->out, weighted, accumulate, x->C, stream);
    }
}

/* What a row carries several choices of comes back as their weighted sum; a single one is weighted at home. */
void exchange_combine(const Exchange *x, int p, ExchangeScratch *scratch, real_t *y, const real_t *made,
                      Profile *profile, Stream *stream) {
    profile_stage(profile, STAGE_COMBINE, stream);
    if (exchange_travels(x)) {
        send_back(x, p, scratch, made, one_row_per_rank(x->way), FORWARD, "combine", profile, stream);
    } else if (x->plan->slots == 0) { /* rows of a soft plan are y themselves */
        combine_forward(y, made, x->plan, x->C, 0, stream);
    }
}

void exchange_combine_end(const Exchange *x, ExchangeScratch *scratch, real_t *y, Profile *profile, Stream *stream) {
    if (exchange_travels(x)) {
        sum_returned(x, scratch, y, !one_row_per_rank(x->way), 0, FORWARD, STAGE_COMBINE, profile, stream);
    }
}

/* The weights' gradients of the rows that came in part p, on their way back. */
static void send_weights_back(const Exchange *x, int p, ExchangeScratch *scratch, const acc_t *drow_weight,
                              Profile *profile, Stream *stream) {
    const ExchangePart *part = &x->part[p];
    End home = home_notes(x, part, scratch->home_dweight, sizeof(acc_t));
    End far = far_notes(x, part, scratch->arrived_dweight, sizeof(acc_t));
    plan_weight_backward((acc_t *)far.wire, drow_weight, &part->in, stream);
    begin_wire(x, "weights backward", profile, stream);
    move(x, home, far, x->width * sizeof(acc_t), stream);
}

void exchange_backward(const Exchange *x, int p, ExchangeScratch *scratch, real_t *dx, acc_t *dweight,
                       const real_t *drows, const acc_t *drow_weight, int accumulate, Profile *profile,
                       Stream *stream) {
    profile_stage(profile, STAGE_DISPATCH, stream);
    if (exchange_travels(x)) {
        if (dweight) {
            send_weights_back(x, p, scratch, drow_weight, profile, stream);
            profile_stage(profile, STAGE_DISPATCH, stream);
        }
        send_back(x, p, scratch, drows, false, BACKWARD, "dispatch backward", profile, stream);
        return;
    }
    if (x->plan->slots == 0) {
        dispatch_backward(dx, drows, x->plan, x->C, accumulate, stream);
    }
    if (dweight) {
        profile_stage(profile, STAGE_ROUTE, stream);
        plan_weight_backward(dweight, drow_weight, x->plan, stream);
    }
}

void exchange_backward_end(const Exchange *x, ExchangeScratch *scratch, real_t *dx, acc_t *dweight, int accumulate,
                           Profile *profile, Stream *stream) {
    if (!exchange_travels(x)) {
        return;
    }
    sum_returned(x, scratch, dx, false, accumulate, BACKWARD, STAGE_DISPATCH, profile, stream);
    profile_stage(profile, STAGE_ROUTE, stream);
    for (int p = 0; dweight && p < x->parts; p++) {
        const ExchangePart *part = &x->part[p];
        End home = home_notes(x, part, scratch->home_dweight, sizeof(acc_t));
        relay_weight_backward(dweight + (size_t)part->first * x->plan->K, (acc_t *)home.wire, &part->out, &part->plan,
                              x->experts, x->width, stream);
    }
}
