/* Who may exchange rows, and the memory for it: exchange.h. Called by moe.c, moe_memory.c and train.c. Read next:
 * exchange_plan.c, exchange_rows.c. */
#include "exchange.h"

#include <stdlib.h>

#include "../kernels/check.h"
#include "../kernels/comm.h"
#include "../kernels/permute.h"
#include "exchange_wire.h"
#include "router.h"

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
    CHECK(t->exchange_chunks == 1 || t->exchange != EXCHANGE_PADDED,
          "--exchange-chunks %d with --exchange padded: its messages are of one size for a whole batch; take 1",
          t->exchange_chunks);
    CHECK(t->exchange_margin == 0 || t->exchange_margin >= 1,
          "--exchange-margin %g: messages smaller than those of the first batch would drop rows of it; take 1 or more",
          t->exchange_margin);
    CHECK(!t->dump_routing[0], "--dump-routing writes the tokens of one rank, and %d were started", ranks);
}

bool exchange_travels(const Exchange *x) {
    return x->ranks > 1;
}

bool exchange_recordable(const Config *config) {
    return config->train.ep == 1 || exchange_fixed_size(config->train.exchange);
}

void exchange_open(const Config *config, const Arena *arena) {
    char why[128];
    bool gpus = device_runs_ahead() && config->train.peer_memory;
    if (comm_ranks(GROUP_WORLD) > 1 && (arena->shared || gpus)) {
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
    int most = plan->N * (exchange_row_per_rank(x->way) ? 1 : choices);
    return x->way == EXCHANGE_PADDED && asked > 0 && asked < most ? asked : most;
}

/* Rows that leave a rank at most. Choices of one token may be for the same rank, so it is not rows_per_rank of the
 * ranks. */
static int rows_out(const Exchange *x, const Plan *plan, int per_rank) {
    int per_token = exchange_row_per_rank(x->way) && x->ranks < plan->K ? x->ranks : plan->K;
    return exchange_fixed_size(x->way) ? x->ranks * per_rank : plan->N * per_token;
}

/* Whether rows come back one for each choice. Where it is not asked for, it has to be cheaper: no more rows than ranks
 * can return for a token, stored by the experts' product itself, with nothing left to do to them. */
static bool returns_choices(const Plan *plan, const Config *config, int ranks) {
    const ModelConfig *m = &config->model;
    ExpertShape shape = {.E = m->experts / ranks, .C = m->dim, .H = m->expert_dim, .act = m->act};
    bool cheaper = plan->K <= ranks && plan->slots == 0 && m->perft != PERFT_E && experts_store_rows(shape);
    int asked = config->train.exchange_return;
    return config->train.exchange == EXCHANGE_P2P && (asked == RETURN_CHOICE || (asked == RETURN_AUTO && cheaper));
}

/* Rows of a part that there is room for at home. */
static size_t rows_at_home(const Exchange *x, const ExchangePart *part) {
    size_t out = part->out.rows, choices = (size_t)part->plan.N * part->plan.K;
    return x->by_choice && choices > out ? choices : out;
}

/* The sizes of the plans on both sides of the wire. */
static void size_plans(const Exchange *x, ExchangePart *part, const Config *config) {
    const Plan *plan = &part->plan;
    bool fixed = exchange_fixed_size(x->way);
    int per_rank = rows_per_rank(x, plan, config);
    part->out = (Plan){.N = plan->N, .E = x->ranks, .K = plan->K};
    part->out.layout = fixed ? LAYOUT_PADDED : LAYOUT_COMPACT;
    part->out.capacity = fixed ? per_rank : 0;
    part->out.rows = rows_out(x, plan, per_rank);
    part->in = (Plan){.N = x->ranks * per_rank, .E = x->experts, .K = x->width};
    part->in.layout = config->model.layout == LAYOUT_BLOCK ? LAYOUT_BLOCK : LAYOUT_COMPACT;
    part->in.rows = plan_rows(part->in.N, x->experts, x->width, 0, part->in.layout);
    part->back = (Plan){.N = plan->N, .K = plan->K};
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
    part->out_row = before ? before->out_row + rows_at_home(x, before) : 0;
    part->in_row = before ? before->in_row + before->in.N : 0;
    part->send = counts_of(x->ranks + 1);
    part->receive = counts_of(x->ranks + 1);
    part->their_send = counts_of(x->ranks + 1);
    part->their_receive = counts_of(x->ranks + 1);
    part->moved = x->beside ? stream_mark_open() : NULL;
    size_plans(x, part, config);
    reserve_plan(&part->out, arena);
    reserve_plan(&part->in, arena);
    if (x->by_choice) {
        size_t choices = (size_t)part->plan.N * part->plan.K;
        arena_reserve(arena, (void **)&part->back.row, choices * sizeof(int), MEMORY_ACTIVATIONS);
    }
}

static void grow(size_t *size, size_t needed) {
    *size = needed > *size ? needed : *size;
}

/* What the parts need together. Returns the most rows that the experts get of one. */
static int reserve_parts(Exchange *x, const Config *config, ExchangeSize *size, Arena *arena) {
    size_t home_rows = 0, in_rows = 0, most = 0;
    x->width = exchange_row_per_rank(x->way) ? x->plan->K : 1;
    for (int p = 0; p < x->parts; p++) {
        reserve_part(x, p, config, arena);
        home_rows += rows_at_home(x, &x->part[p]);
        in_rows += x->part[p].in.N;
        grow(&most, x->part[p].in.rows);
    }
    arena_reserve(arena, (void **)&x->kept, in_rows * x->C * sizeof(real_t), MEMORY_ACTIVATIONS);
    size->copies |= x->way == EXCHANGE_BUCKETED;
    for (int leg = 0; leg < 2; leg++) {
        grow(&size->row_bytes, x->wire[leg] == WIRE_SAME ? 0 : wire_row_bytes(x->wire[leg], x->C));
    }
    grow(&size->home_rows, home_rows);
    grow(&size->in_rows, in_rows);
    grow(&size->out_notes, home_rows * x->width);
    grow(&size->in_notes, in_rows * x->width);
    return (int)most;
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
    x->margin = t->exchange == EXCHANGE_PADDED ? t->exchange_margin : 0;
    x->beside = ranks > 1 && (x->parts > 1 || x->way == EXCHANGE_P2P) && t->overlap;
    if (world > 1) {
        int told = world * exchange_told(x);
        x->host_told = counts_of(told);
        arena_reserve(arena, (void **)&x->told, told * sizeof(int), MEMORY_ACTIVATIONS);
        arena_reserve(arena, (void **)&x->demand_of_all, E * sizeof(int), MEMORY_ACTIVATIONS);
    }
    if (ranks == 1) {
        return plan_rows;
    }
    arena->shared |= x->way == EXCHANGE_P2P;
    x->by_choice = returns_choices(plan, config, ranks);
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
        arena_reserve(arena, (void **)&scratch->home, size.home_rows * row, MEMORY_ACTIVATIONS);
        arena_reserve(arena, (void **)&scratch->arrived, size.in_rows * row, MEMORY_ACTIVATIONS);
        arena_reserve(arena, (void **)&scratch->made, size.in_rows * row, MEMORY_ACTIVATIONS);
        if (size.row_bytes > 0) {
            arena_reserve(arena, &scratch->home_wire, size.home_rows * size.row_bytes, MEMORY_ACTIVATIONS);
            arena_reserve(arena, &scratch->arrived_wire, size.in_rows * size.row_bytes, MEMORY_ACTIVATIONS);
        }
        arena_reserve(arena, (void **)&scratch->home_note, size.out_notes * sizeof(RelayNote), MEMORY_ACTIVATIONS);
        arena_reserve(arena, (void **)&scratch->arrived_note, size.in_notes * sizeof(RelayNote), MEMORY_ACTIVATIONS);
        arena_reserve(arena, (void **)&scratch->home_dweight, size.out_notes * sizeof(acc_t), MEMORY_ACTIVATIONS);
        arena_reserve(arena, (void **)&scratch->arrived_dweight, size.in_notes * sizeof(acc_t), MEMORY_ACTIVATIONS);
    }
}
