/* Which rows leave a rank and which arrive there: exchange_plan of exchange.h, read it first. Called by moe.c. */
#include <math.h>
#include <stdlib.h>

#include "../kernels/check.h"
#include "../kernels/comm.h"
#include "../kernels/permute.h"
#include "exchange_wire.h"

/* All ranks tell all others how many of their choices each expert has, and how many rows they send to each rank. */
static void tell(Exchange *x, Stream *stream) {
    int stride = exchange_told(x), world = comm_ranks(GROUP_WORLD);
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
    return exchange_fixed_size(x->way) ? x->part[p].out.capacity
                                       : x->host_told[(size_t)(first + s) * exchange_told(x) + x->E + p * x->ranks + r];
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
        part->plan.weight = part->out.weight = part->back.weight = x->plan->weight + first;
        part->plan.row = x->plan->row + first;
        if (x->way == EXCHANGE_P2P) {
            End far = exchange_far_notes(x, part, scratch->arrived_note, sizeof(RelayNote));
            PeerRows notes = exchange_places(part, far, x->width * sizeof(RelayNote));
            relay_places(&part->out, notes, &part->plan, x->experts, stream);
            if (x->by_choice) {
                relay_choices(&part->back, &part->plan, stream);
            }
        } else {
            relay_ranks(&part->out, &part->plan, x->experts, exchange_row_per_rank(x->way), stream);
            plan_build(&part->out, stream);
        }
    }
}

/* The size of padded messages from now on: `margin` times the fullest one of this batch, of all ranks. The host waits,
 * this once. */
static void calibrate(Exchange *x, Stream *stream) {
    Plan *out = &x->part[0].out;
    int world = comm_ranks(GROUP_WORLD), *count = calloc(x->ranks, sizeof *count);
    double *most = calloc(world, sizeof *most), fullest = 1;
    CHECK(count && most, "out of memory for the counts of %d ranks", world);
    host_from_device(count, out->count, x->ranks * sizeof *count, stream);
    for (int r = 0; r < x->ranks; r++) {
        most[comm_rank(GROUP_WORLD)] = fmax(most[comm_rank(GROUP_WORLD)], count[r]);
    }
    comm_sum_host(most, world);
    for (int r = 0; r < world; r++) {
        fullest = fmax(fullest, most[r]);
    }
    out->capacity = (int)fmin(ceil(fullest * x->margin), out->capacity);
    out->rows = x->ranks * out->capacity;
    x->margin = 0;
    free(count);
    free(most);
    plan_build(out, stream);
}

/* The notes of a part to where its rows will be. */
static void move_notes(const Exchange *x, const ExchangePart *part, ExchangeScratch *scratch, Stream *stream) {
    End home = exchange_home_notes(x, part, scratch->home_note, sizeof(RelayNote));
    End far = exchange_far_notes(x, part, scratch->arrived_note, sizeof(RelayNote));
    relay_write((RelayNote *)home.wire, &part->out, &part->plan, x->experts, x->width, stream);
    stream_follow(exchange_stream(x, stream), stream);
    exchange_move(x, part, far, home, x->width * sizeof(RelayNote), stream);
}

/* Which rows arrive, from the notes that say so. */
static void plan_arriving(Exchange *x, ExchangeScratch *scratch, Profile *profile, Stream *stream) {
    exchange_begin_wire(x, "notes", profile, stream);
    for (int p = 0; x->way != EXCHANGE_P2P && p < x->parts; p++) {
        move_notes(x, &x->part[p], scratch, stream);
    }
    exchange_settle(x, stream);
    exchange_end_wire(x, profile, stream);
    profile_stage(profile, STAGE_PERMUTE, stream);
    for (int p = 0; p < x->parts; p++) {
        ExchangePart *part = &x->part[p];
        relay_read(&part->in, (RelayNote *)exchange_far_notes(x, part, scratch->arrived_note, sizeof(RelayNote)).wire,
                   stream);
        plan_build(&part->in, stream);
    }
}

/* How many rows go from whom to whom: learned, or known. */
static void count_all(Exchange *x, Stream *stream) {
    if (!exchange_fixed_size(x->way)) {
        size_t told = (size_t)comm_ranks(GROUP_WORLD) * exchange_told(x);
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
        if (x->margin > 0) {
            calibrate(x, stream);
        }
    }
    profile_stage(profile, STAGE_EXCHANGE, stream);
    comm_at(*x->step, x->layer, "counts");
    tell(x, stream);
    if (exchange_travels(x)) {
        count_all(x, stream);
        plan_arriving(x, scratch, profile, stream);
    }
    relay_demand(x->demand_of_all, x->told, world, exchange_told(x), x->E, stream);
    x->demand = x->demand_of_all;
}

const Plan *exchange_experts(const Exchange *x, int p) {
    return exchange_travels(x) ? &x->part[p].in : x->plan;
}

const Plan *exchange_measured(const Exchange *x) {
    return exchange_travels(x) && x->way == EXCHANGE_PADDED ? &x->part[0].out : x->plan;
}
