/* See exchange.h. Called by moe.c. Messages are kernels/comm.h's, moving rows within a rank is kernels/regroup.h's. */
#include "exchange.h"

#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"
#include "../kernels/comm.h"
#include "../kernels/regroup.h"
#include "router.h"

enum { TOLD = 2 }; /* numbers per expert: its demand, its rows */

/* ---- options ---- */

void exchange_check(const Config *config) {
    const ModelConfig *m = &config->model;
    const Router *router = router_find(m->router);
    int ranks = comm_ranks(GROUP_WORLD), slices = config->train.grad_accum, ep = config->train.ep;
    CHECK(router->plan == PLAN_NONE || m->experts % ep == 0,
          "--experts %d is not divisible by --ep %d: change one of them", m->experts, ep);
    if (ranks == 1) {
        return;
    }
    CHECK(config->train.batch % (ranks * slices) == 0,
          "--batch %d is not divisible by %d ranks x --grad-accum %d: raise it to %d", config->train.batch, ranks,
          slices, (config->train.batch / (ranks * slices) + 1) * ranks * slices);
    CHECK(!router->sees_batch && !router->one_rank,
          "--router %s looks at all tokens of a batch, which %d ranks share: start one rank, or take another router",
          m->router, ranks);
    CHECK(m->capacity_factor == 0,
          "--capacity-factor %g with %d ranks: a capacity counts the tokens of all of them; take 0, or start one rank",
          m->capacity_factor, ranks);
    CHECK(!config->train.dump_routing[0], "--dump-routing writes the tokens of one rank, and %d were started", ranks);
}

/* ---- memory ---- */

size_t exchange_rows(size_t plan_rows) {
    return plan_rows * comm_ranks(GROUP_EXPERTS);
}

void exchange_reserve(Exchange *x, const Plan *plan, size_t rows, Arena *arena) {
    int world = comm_ranks(GROUP_WORLD), E = plan->E;
    *x = (Exchange){.ranks = comm_ranks(GROUP_EXPERTS), .E = E, .experts = E / comm_ranks(GROUP_EXPERTS)};
    if (world == 1) {
        return;
    }
    size_t told = (size_t)world * TOLD * E;
    x->host_told = calloc(told, sizeof(int));
    x->send = calloc(x->ranks + 1, sizeof(int));
    x->receive = calloc(x->ranks + 1, sizeof(int));
    CHECK(x->host_told && x->send && x->receive, "out of memory for the counts of %d ranks", world);
    arena_reserve(arena, (void **)&x->told, told * sizeof(int), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&x->demand, E * sizeof(int), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&x->offset, (x->experts + 1) * sizeof(int), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&x->row_weight, rows * sizeof(acc_t), MEMORY_ACTIVATIONS);
}

void exchange_free(Exchange *x) {
    free(x->host_told);
    free(x->send);
    free(x->receive);
}

void exchange_reserve_scratch(ExchangeScratch *scratch, size_t plan_rows, size_t rows, int C, Arena *arena) {
    *scratch = (ExchangeScratch){.C = C};
    if (comm_ranks(GROUP_EXPERTS) > 1) {
        arena_reserve(arena, (void **)&scratch->home, plan_rows * C * sizeof(real_t), MEMORY_ACTIVATIONS);
        arena_reserve(arena, (void **)&scratch->arrived, rows * C * sizeof(real_t), MEMORY_ACTIVATIONS);
        arena_reserve(arena, (void **)&scratch->home_weight, plan_rows * sizeof(acc_t), MEMORY_ACTIVATIONS);
        arena_reserve(arena, (void **)&scratch->arrived_weight, rows * sizeof(acc_t), MEMORY_ACTIVATIONS);
    }
}

/* ---- what goes where ---- */

/* Rows that rank `rank` of this rank's group has for the model's expert e. */
static int rows_of(const Exchange *x, int rank, int e) {
    int first = comm_rank(GROUP_WORLD) - comm_rank(GROUP_EXPERTS);
    return x->host_told[((size_t)(first + rank) * TOLD + 1) * x->E + e];
}

void exchange_plan(Exchange *x, Plan *plan, Stream *stream) {
    if (comm_ranks(GROUP_WORLD) == 1) {
        x->demand = plan->demand;
        x->offset = plan->offset;
        return;
    }
    int world = comm_ranks(GROUP_WORLD), me = comm_rank(GROUP_EXPERTS), E = x->E;
    int *mine = x->told + (size_t)comm_rank(GROUP_WORLD) * TOLD * E;
    device_copy(mine, plan->demand, E * sizeof(int), stream);
    regroup_lengths(mine + E, plan->offset, E, stream);
    comm_gather(GROUP_WORLD, x->told, mine, TOLD * E * sizeof(int), stream);
    regroup_plan(x->demand, x->offset, x->told, world, comm_rank(GROUP_WORLD) - me, x->ranks, me * x->experts,
                 x->experts, E, stream);
    host_from_device(x->host_told, x->told, (size_t)world * TOLD * E * sizeof(int), stream);
    for (int r = 0; r < x->ranks; r++) {
        x->send[r + 1] = x->send[r];
        x->receive[r + 1] = x->receive[r];
        for (int i = 0; i < x->experts; i++) {
            x->send[r + 1] += rows_of(x, me, r * x->experts + i);
            x->receive[r + 1] += rows_of(x, r, me * x->experts + i);
        }
    }
}

/* ---- rows ---- */

bool exchange_travels(const Exchange *x) {
    return x->ranks > 1;
}

real_t *exchange_outbox(ExchangeScratch *scratch, real_t *otherwise) {
    return scratch->home ? scratch->home : otherwise;
}

/* What regroup.h is to know: how many rows each rank has for each of this rank's experts. */
static Regroup regroup_of(const Exchange *x) {
    int first = comm_rank(GROUP_WORLD) - comm_rank(GROUP_EXPERTS), me = comm_rank(GROUP_EXPERTS);
    return (Regroup){.ranks = x->ranks,
                     .experts = x->experts,
                     .stride = TOLD * x->E,
                     .rows = x->told + ((size_t)first * TOLD + 1) * x->E + me * x->experts,
                     .offset = x->offset};
}

RowSource exchange_there(const Exchange *x, ExchangeScratch *scratch, real_t *to, RowSource rows, Stream *stream) {
    if (x->ranks == 1) {
        return rows;
    }
    size_t row = scratch->C * sizeof(real_t);
    comm_exchange(GROUP_EXPERTS, scratch->arrived, x->receive, rows.x, x->send, row, stream);
    regroup_by_expert(to, scratch->arrived, regroup_of(x), row, stream);
    return (RowSource){to, NULL, 0};
}

real_t *exchange_back(const Exchange *x, ExchangeScratch *scratch, real_t *rows, Stream *stream) {
    if (x->ranks == 1) {
        return rows;
    }
    size_t row = scratch->C * sizeof(real_t);
    regroup_by_source(scratch->arrived, rows, regroup_of(x), row, stream);
    comm_exchange(GROUP_EXPERTS, scratch->home, x->send, scratch->arrived, x->receive, row, stream);
    return scratch->home;
}

const acc_t *exchange_weights_there(const Exchange *x, ExchangeScratch *scratch, const Plan *plan, Stream *stream) {
    if (x->ranks == 1) {
        return plan->row_weight;
    }
    comm_exchange(GROUP_EXPERTS, scratch->arrived_weight, x->receive, plan->row_weight, x->send, sizeof(acc_t), stream);
    regroup_by_expert(x->row_weight, scratch->arrived_weight, regroup_of(x), sizeof(acc_t), stream);
    return x->row_weight;
}

const acc_t *exchange_weights_back(const Exchange *x, ExchangeScratch *scratch, const acc_t *weights, Stream *stream) {
    if (x->ranks == 1) {
        return weights;
    }
    regroup_by_source(scratch->arrived_weight, weights, regroup_of(x), sizeof(acc_t), stream);
    comm_exchange(GROUP_EXPERTS, scratch->home_weight, x->send, scratch->arrived_weight, x->receive, sizeof(acc_t),
                  stream);
    return scratch->home_weight;
}
