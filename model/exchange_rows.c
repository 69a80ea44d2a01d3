/* Rows to their experts and back, forward and backward. Read exchange_dispatch_begin, then send_back and sum_returned:
 * the rest says which leg it is. Called by moe.c. */
#include <stdlib.h>

#include "../kernels/check.h"
#include "../kernels/comm.h"
#include "../kernels/dispatch.h"
#include "../kernels/permute.h"
#include "exchange_wire.h"

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

/* How rows of a part travel in one direction. */
typedef enum {
    BY_WIRE,   /* packed, then messages, copies or stores of what was packed */
    BY_STORES, /* stored by the kernel that makes them; in turn with other work */
    BY_COPIES, /* all places as they are, beside other work */
} Carrier;

/* alone: whether there is nothing that they could travel beside. Of few rows the copies take longer to begin than the
 * stores to end, on a device that runs ahead. */
static Carrier carrier_of(const Exchange *x, const ExchangePart *part, WireType type, bool alone) {
    const size_t few = device_runs_ahead() ? 1 << 20 : 0; /* bytes */
    bool copies = x->beside && !alone && part->out.capacity * wire_row_bytes(type, x->C) >= few;
    return !exchange_stores(x, type) ? BY_WIRE : copies ? BY_COPIES : BY_STORES;
}

/* Tokens of a part to where their experts are. */
static void send_tokens(const Exchange *x, const ExchangePart *part, End home, End far, const real_t *tokens,
                        WireType type, const char *what, Profile *profile, Stream *stream) {
    size_t row_bytes = wire_row_bytes(type, x->C);
    Carrier carrier =
        carrier_of(x, part, type, part == x->part); /* of the first part nothing is there to be worked on */
    if (carrier == BY_WIRE) {
        profile_stage(profile, STAGE_DISPATCH, stream);
        dispatch_copy(home.rows, tokens, &part->out, x->C, stream);
        exchange_pack(x, home, type, stream);
    }
    exchange_begin_wire(x, what, profile, stream);
    switch (carrier) {
        case BY_WIRE: exchange_move(x, part, far, home, row_bytes, stream); break;
        case BY_STORES: dispatch_put(exchange_places(part, far, row_bytes), tokens, &part->out, x->C, stream); break;
        case BY_COPIES:
            peers_copy(exchange_places(part, far, row_bytes), tokens, 0, row_bytes, exchange_stream(x, stream));
            break;
    }
    stream_mark(part->moved, exchange_stream(x, stream));
}

void exchange_dispatch_begin(const Exchange *x, ExchangeScratch *scratch, const real_t *tokens, bool keep,
                             Profile *profile, Stream *stream) {
    WireType type = x->wire[keep ? FORWARD : BACKWARD];
    real_t *arrived = arrived_rows(x, scratch, keep);
    for (int p = 0; exchange_travels(x) && p < x->parts; p++) {
        const ExchangePart *part = &x->part[p];
        End home = exchange_home(x, part, scratch, type), far = exchange_far(x, part, scratch, arrived, type);
        send_tokens(x, part, home, far, tokens + (size_t)part->first * x->C, type,
                    keep ? "dispatch" : "combine backward", profile, stream);
    }
}

RowSource exchange_dispatch(const Exchange *x, int p, ExchangeScratch *scratch, real_t *to, const real_t *tokens,
                            bool keep, Profile *profile, Stream *stream) {
    const ExchangePart *part = &x->part[p];
    if (exchange_travels(x)) {
        WireType type = x->wire[keep ? FORWARD : BACKWARD];
        End far = exchange_far(x, part, scratch, arrived_rows(x, scratch, keep), type);
        profile_stage(profile, STAGE_EXCHANGE, stream);
        stream_wait(stream, part->moved);
        exchange_settle(x, stream);
        profile_stage(profile, STAGE_DISPATCH, stream);
        exchange_unpack(x, far, type, stream);
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

bool exchange_target(RowTarget *to, const Exchange *x, int p, const ExchangeScratch *scratch, bool forward) {
    int leg = forward ? FORWARD : BACKWARD;
    if (!exchange_travels(x) || !exchange_by_choice(x, leg)) {
        return false;
    }
    const ExchangePart *part = &x->part[p];
    End home = exchange_home(x, part, scratch, x->wire[leg]);
    to->rows = peers_homes(home.rows, part->plan.N * part->plan.K);
    to->entry = part->in.entry; /* of what arrived: (source, token), choice */
    to->ranks = x->ranks;
    to->rank = comm_rank(GROUP_EXPERTS);
    return true;
}

/* The experts' rows of a part, each to where its choice is; NULL: they are there. In turn with other work, so there is
 * no mark to wait for. */
static void send_choices_back(const Exchange *x, int p, ExchangeScratch *scratch, const real_t *rows, int leg,
                              const char *what, Profile *profile, Stream *stream) {
    const Plan *in = &x->part[p].in;
    RowTarget to;
    profile_stage(profile, STAGE_EXCHANGE, stream);
    comm_at(*x->step, x->layer, what);
    if (rows && exchange_target(&to, x, p, scratch, leg == FORWARD)) {
        rows_put(to, rows, in->offset, in->E, in->rows, x->C, stream);
    }
}

/* Sums of experts' rows (weighted or not) of the rows that came in part p, and these on their way back. alone: whether
 * nothing is left to do beside that. */
static void send_back(const Exchange *x, int p, ExchangeScratch *scratch, const real_t *rows, bool weighted, bool alone,
                      int leg, const char *what, Profile *profile, Stream *stream) {
    if (exchange_by_choice(x, leg)) {
        send_choices_back(x, p, scratch, rows, leg, what, profile, stream);
        return;
    }
    const ExchangePart *part = &x->part[p];
    WireType type = x->wire[leg];
    size_t row_bytes = wire_row_bytes(type, x->C), of_rank = part->out.capacity * row_bytes;
    End far = exchange_far(x, part, scratch, scratch->made, type), home = exchange_home(x, part, scratch, type);
    Carrier carrier = carrier_of(x, part, type, alone);
    if (carrier == BY_WIRE) {
        sum_rows(far.rows, rows, &part->in, weighted, 0, x->C, stream);
        exchange_pack(x, far, type, stream);
    } else if (carrier == BY_COPIES) {
        PeerRows made = peers_own_rows(far.rows, part->out.capacity, row_bytes);
        combine_put(made, rows, &part->in, weighted, x->C, stream);
    }
    exchange_begin_wire(x, what, profile, stream);
    switch (carrier) {
        case BY_WIRE: exchange_move(x, part, home, far, row_bytes, stream); break;
        case BY_STORES:
            combine_put(exchange_places(part, home, row_bytes), rows, &part->in, weighted, x->C, stream);
            break;
        case BY_COPIES:
            peers_copy(exchange_places(part, home, row_bytes), far.rows, of_rank, row_bytes,
                       exchange_stream(x, stream));
            break;
    }
    stream_mark(part->moved, exchange_stream(x, stream));
}

/* to (N,C), of all tokens, = the sums of the rows that came back, added to it or not. In the forward what is a row for
 * each choice is weighted here. */
static void sum_returned(const Exchange *x, ExchangeScratch *scratch, real_t *to, int accumulate, int leg, Stage stage,
                         Profile *profile, Stream *stream) {
    bool by_choice = exchange_by_choice(x, leg);
    bool weighted = leg == FORWARD && (by_choice || !exchange_row_per_rank(x->way));
    profile_stage(profile, STAGE_EXCHANGE, stream);
    for (int p = 0; x->way == EXCHANGE_P2P && p < x->parts; p++) {
        stream_wait(stream, x->part[p].moved);
    }
    exchange_settle(x, stream);
    for (int p = 0; p < x->parts; p++) {
        const ExchangePart *part = &x->part[p];
        real_t *tokens = to + (size_t)part->first * x->C;
        End home = exchange_home(x, part, scratch, x->wire[leg]);
        profile_stage(profile, STAGE_EXCHANGE, stream);
        stream_wait(stream, part->moved);
        profile_stage(profile, stage, stream);
        exchange_unpack(x, home, x->wire[leg], stream);
        sum_rows(tokens, home.rows, by_choice ? &part->back : &part->out, weighted, accumulate, x->C, stream);
    }
}

/* What a row carries several choices of comes back as their weighted sum; a single one is weighted at home. */
void exchange_combine(const Exchange *x, int p, ExchangeScratch *scratch, real_t *y, const real_t *made,
                      Profile *profile, Stream *stream) {
    profile_stage(profile, STAGE_COMBINE, stream);
    if (exchange_travels(x)) {
        send_back(x, p, scratch, made, exchange_row_per_rank(x->way), p == x->parts - 1, FORWARD, "combine", profile,
                  stream);
    } else if (x->plan->slots == 0) { /* rows of a soft plan are y themselves */
        combine_forward(y, made, x->plan, x->C, 0, stream);
    }
}

void exchange_combine_end(const Exchange *x, ExchangeScratch *scratch, real_t *y, Profile *profile, Stream *stream) {
    if (exchange_travels(x)) {
        sum_returned(x, scratch, y, 0, FORWARD, STAGE_COMBINE, profile, stream);
    }
}

/* The weights' gradients of the rows that came in part p, on their way back. */
static void send_weights_back(const Exchange *x, int p, ExchangeScratch *scratch, const acc_t *drow_weight,
                              Profile *profile, Stream *stream) {
    const ExchangePart *part = &x->part[p];
    End home = exchange_home_notes(x, part, scratch->home_dweight, sizeof(acc_t));
    End far = exchange_far_notes(x, part, scratch->arrived_dweight, sizeof(acc_t));
    plan_weight_backward((acc_t *)far.wire, drow_weight, &part->in, stream);
    exchange_begin_wire(x, "weights backward", profile, stream);
    exchange_move(x, part, home, far, x->width * sizeof(acc_t), stream);
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
        send_back(x, p, scratch, drows, false, false, BACKWARD, "dispatch backward", profile, stream);
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
    sum_returned(x, scratch, dx, accumulate, BACKWARD, STAGE_DISPATCH, profile, stream);
    if (x->way != EXCHANGE_P2P) {                                /* which has met */
        comm_exchanged(GROUP_EXPERTS, scratch->arrived, stream); /* dW1 and dW2 have read it since the rows went back */
    }
    profile_stage(profile, STAGE_ROUTE, stream);
    for (int p = 0; dweight && p < x->parts; p++) {
        const ExchangePart *part = &x->part[p];
        End home = exchange_home_notes(x, part, scratch->home_dweight, sizeof(acc_t));
        relay_weight_backward(dweight + (size_t)part->first * x->plan->K, (acc_t *)home.wire, &part->out, &part->plan,
                              x->experts, x->width, stream);
    }
}

/* ---- what p2p stores */

/* Rows (ranks, places) of other ranks in which one of the `each` numbers is not -1; or, one by one, those numbers. */
static double rows_of_others(const Exchange *x, const int *there, int each, int places, bool one_by_one) {
    int me = comm_rank(GROUP_EXPERTS);
    size_t count = (size_t)x->ranks * places * each;
    int *host = malloc(count * sizeof *host);
    double rows = 0;
    CHECK(host, "out of memory for %zu places", count);
    host_from_device(host, there, count * sizeof *host, NULL);
    for (int r = 0; r < x->ranks * places; r++) {
        int found = 0;
        for (int j = 0; j < each; j++) {
            found += host[(size_t)r * each + j] >= 0;
        }
        rows += r / places == me ? 0 : one_by_one ? found : found > 0;
    }
    free(host);
    return rows;
}

double exchange_stored(const Exchange *x, bool backward) {
    int leg = backward ? BACKWARD : FORWARD, others = x->ranks - 1;
    WireType type = x->wire[leg];
    bool tells = !backward && comm_ranks(GROUP_WORLD) == x->ranks; /* the demand, which else goes by messages */
    double bytes = tells ? (double)others * x->E * sizeof(int) : 0;
    if (x->way != EXCHANGE_P2P || !exchange_travels(x)) {
        return 0;
    }
    for (int p = 0; p < x->parts; p++) {
        const ExchangePart *part = &x->part[p];
        bool alone = !backward && p == x->parts - 1;
        int places = part->out.capacity;
        double all = (double)others * places, leave = rows_of_others(x, part->out.entry, 1, places, false),
               held = rows_of_others(x, part->in.row, x->width, places, false),
               choices = rows_of_others(x, part->in.row, x->width, places, true);
        double there = carrier_of(x, part, type, p == 0) == BY_COPIES ? all : leave;
        double back = exchange_by_choice(x, leg) ? choices : carrier_of(x, part, type, alone) == BY_COPIES ? all : held;
        double notes = backward ? held * sizeof(acc_t) : all * sizeof(RelayNote);
        bytes += (there + back) * wire_row_bytes(type, x->C) + notes * x->width;
    }
    return bytes;
}
