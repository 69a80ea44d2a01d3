/* There and back, as bench_alltoall.c times it: a layer's exchange with experts that multiply by a number. Read next:
 * forward, backward. */
#ifndef EXPERIMENTS_ALLTOALL_TRIP_H
#define EXPERIMENTS_ALLTOALL_TRIP_H

#include "../kernels/dispatch.h"
#include "../kernels/permute.h"
#include "../model/config.h"
#include "../model/exchange.h"
#include "alltoall_batch.h"
#include "bench.h"
#include "scale_rows.h"

typedef struct {
    const char *name, *exchange; /* .. of the program's options */
    bool recorded;
} Way;

/* What an expert multiplies by: different for each of 256, far apart for neighbours, exact in every type. */
static inline acc_t scale_of(int expert) {
    return 1 + expert * 101 % 256 / (acc_t)64;
}

typedef struct {
    Arena arena;
    Config config;
    Plan plan;
    Exchange exchange;
    ExchangeScratch scratch;
    int64_t step;
    acc_t *scale;                 /* (experts of this rank) */
    real_t *x, *y, *dy, *dx;      /* (T,H) */
    real_t *in_rows, *out_rows;   /* (rows, H) what experts read, where it is written out, and make */
    acc_t *drow_weight, *dweight; /* (rows), (T,k) */
    acc_t *staging;               /* (T,H) */
    char *plain_from, *plain_to;  /* of the plain all-to-all */
    int *plain_first;             /* (ranks+1) host, owned: its first row for each rank */
    Recording recorded_forward, recorded_backward;
} Trip;

/* The options that ./train has too are read as ./train reads them. */
static inline void configure(Config *config, const Shape *s, const Way *way, const Options *o, int room) {
    char rows[16];
    snprintf(rows, sizeof rows, "%d", room);
    char *arguments[] = {"bench_alltoall",
                         "--exchange",
                         (char *)way->exchange,
                         "--exchange-rows",
                         rows,
                         "--wire",
                         (char *)o->wire,
                         "--wire-back",
                         (char *)o->wire_back,
                         "--peer-memory",
                         (char *)o->peer_memory,
                         "--overlap", /* there is nothing to travel beside */
                         "0"};
    config_parse(config, sizeof arguments / sizeof *arguments, arguments);
    config->model.dim = s->H;
}

static inline void reserve(Arena *arena, void *slot, size_t bytes) {
    arena_reserve(arena, slot, bytes, MEMORY_ACTIVATIONS);
}

static inline void reserve_plan(Plan *p, Arena *arena) {
    size_t entries = (size_t)p->N * p->K;
    reserve(arena, &p->expert, entries * sizeof(int));
    reserve(arena, &p->weight, entries * sizeof(acc_t));
    reserve(arena, &p->row, entries * sizeof(int));
    reserve(arena, &p->entry, p->rows * sizeof(int));
    reserve(arena, &p->row_weight, p->rows * sizeof(acc_t));
    reserve(arena, &p->demand, p->E * sizeof(int));
    reserve(arena, &p->count, p->E * sizeof(int));
    reserve(arena, &p->offset, (p->E + 1) * sizeof(int));
}

/* Everything but the exchange's own; rows: the most that this rank's experts get. */
static inline void reserve_arrays(Trip *t, const Shape *s, int rows, bool copies) {
    int ranks = comm_ranks(GROUP_WORLD);
    size_t TH = (size_t)s->T * s->H;
    size_t leaving = exchange_travels(&t->exchange) ? t->exchange.part[0].out.rows : t->plan.rows;
    size_t plain = (leaving + ranks) * wire_row_bytes(t->exchange.wire[0], s->H);
    real_t **of_tokens[] = {&t->x, &t->y, &t->dy, &t->dx};
    for (int i = 0; i < 4; i++) {
        reserve(&t->arena, of_tokens[i], TH * sizeof(real_t));
    }
    reserve(&t->arena, &t->staging, TH * sizeof(acc_t));
    if (copies) {
        reserve(&t->arena, &t->in_rows, (size_t)rows * s->H * sizeof(real_t));
    }
    reserve(&t->arena, &t->out_rows, (size_t)rows * s->H * sizeof(real_t));
    reserve(&t->arena, &t->drow_weight, rows * sizeof(acc_t));
    reserve(&t->arena, &t->dweight, (size_t)s->T * s->k * sizeof(acc_t));
    reserve(&t->arena, &t->scale, s->E / ranks * sizeof(acc_t));
    reserve(&t->arena, &t->plain_from, plain);
    reserve(&t->arena, &t->plain_to, plain);
}

static inline void fill_arrays(Trip *t, const Shape *s, const Batch *b) {
    int ranks = comm_ranks(GROUP_WORLD), me = comm_rank(GROUP_WORLD), local = s->E / ranks;
    size_t TH = (size_t)s->T * s->H, entries = (size_t)s->T * s->k;
    acc_t *scale = malloc(local * sizeof *scale);
    CHECK(scale, "out of memory for %d experts", local);
    for (int e = 0; e < local; e++) {
        scale[e] = scale_of(me * local + e);
    }
    device_from_host(t->scale, scale, local * sizeof *scale, NULL);
    free(scale);
    device_from_host(t->plan.expert, b->expert, entries * sizeof(int), NULL);
    device_from_host(t->plan.weight, b->weight, entries * sizeof(acc_t), NULL);
    bench_fill(t->x, t->staging, TH, 1, 2 * me);
    bench_fill(t->dy, t->staging, TH, 1, 2 * me + 1);
}

static inline void open_trip(Trip *t, const Shape *s, const Batch *b, const Way *way, const Options *o, int room) {
    *t = (Trip){.plan = {.N = s->T, .E = s->E, .K = s->k, .rows = plan_rows(s->T, s->E, s->k, 0, LAYOUT_COMPACT)}};
    ExchangeSize size = {0};
    configure(&t->config, s, way, o, room);
    t->config.train.exchange_return = RETURN_RANK; /* no product is here that could store choices */
    reserve_plan(&t->plan, &t->arena);
    int rows = exchange_reserve(&t->exchange, &t->plan, t->plan.rows, &t->config, -1, &t->step, &size, &t->arena);
    exchange_reserve_scratch(&t->scratch, size, s->H, &t->arena);
    reserve_arrays(t, s, rows, dispatch_copies() || size.copies);
    t->plain_first = calloc(comm_ranks(GROUP_WORLD) + 1, sizeof(int));
    CHECK(t->plain_first, "out of memory for the counts of %d ranks", comm_ranks(GROUP_WORLD));
    arena_commit(&t->arena);
    exchange_open(&t->config, &t->arena);
    fill_arrays(t, s, b);
}

static inline void close_trip(Trip *t) {
    recording_free(&t->recorded_forward);
    recording_free(&t->recorded_backward);
    exchange_free(&t->exchange);
    free(t->plain_first);
    exchange_close();
    arena_free(&t->arena);
}

static inline void forward(void *trip, Profile *profile) {
    Trip *t = trip;
    const Exchange *x = &t->exchange;
    profile_stage(profile, STAGE_PERMUTE, NULL);
    plan_build(&t->plan, NULL);
    exchange_plan(&t->exchange, &t->scratch, NULL, NULL);
    profile_stage(profile, STAGE_DISPATCH, NULL);
    exchange_dispatch_begin(x, &t->scratch, t->x, true, NULL, NULL);
    RowSource rows = exchange_dispatch(x, 0, &t->scratch, t->in_rows, t->x, true, NULL, NULL);
    profile_stage(profile, STAGE_EXPERTS, NULL);
    scale_rows(t->out_rows, NULL, rows, NULL, t->scale, exchange_experts(x, 0)->offset, x->experts, x->C, NULL);
    profile_stage(profile, STAGE_COMBINE, NULL);
    exchange_combine(x, 0, &t->scratch, t->y, t->out_rows, NULL, NULL);
    exchange_combine_end(x, &t->scratch, t->y, NULL, NULL);
}

static inline void backward(void *trip, Profile *profile) {
    Trip *t = trip;
    const Exchange *x = &t->exchange;
    const Plan *experts = exchange_experts(x, 0);
    exchange_dispatch_begin(x, &t->scratch, t->dy, false, NULL, NULL);
    RowSource rows = exchange_dispatch(x, 0, &t->scratch, t->in_rows, t->dy, false, NULL, NULL);
    scale_rows(t->out_rows, t->drow_weight, rows, experts->row_weight, t->scale, experts->offset, x->experts, x->C,
               NULL);
    exchange_backward(x, 0, &t->scratch, t->dx, t->dweight, t->out_rows, t->drow_weight, 0, NULL, NULL);
    exchange_backward_end(x, &t->scratch, t->dx, t->dweight, 0, NULL, NULL);
}

static inline void replay(Recording *recording, Trip *t, void (*call)(void *trip, Profile *profile)) {
    if (!recording_replay(recording, NULL)) {
        recording_begin(recording, NULL);
        call(t, NULL);
        recording_end(recording, NULL);
    }
}

static inline void replayed_forward(void *trip, Profile *profile) {
    replay(&((Trip *)trip)->recorded_forward, trip, forward);
}

static inline void replayed_backward(void *trip, Profile *profile) {
    replay(&((Trip *)trip)->recorded_backward, trip, backward);
}

static inline void nothing(void *trip, Profile *profile) {
}

/* As many rows as the rank sends that sends most, in equal parts. */
static inline void divide_plainly(Trip *t) {
    int ranks = comm_ranks(GROUP_WORLD);
    double rows = exchange_travels(&t->exchange) ? t->exchange.part[0].send[ranks] : t->plan.rows;
    int part = ((int)largest(rows) + ranks - 1) / ranks;
    for (int r = 0; r <= ranks; r++) {
        t->plain_first[r] = r * part;
    }
}

static inline void plain(void *trip, Profile *profile) {
    Trip *t = trip;
    size_t row_bytes = wire_row_bytes(t->exchange.wire[0], t->exchange.C);
    comm_exchange(GROUP_WORLD, t->plain_to, t->plain_first, t->plain_from, t->plain_first, NULL, row_bytes, NULL);
    comm_exchange(GROUP_WORLD, t->plain_from, t->plain_first, t->plain_to, t->plain_first, NULL, row_bytes, NULL);
}

#endif
