/* Rows to their experts and back, forward and backward. Read exchange_dispatch_begin, then send_back and sum_returned:
 * the rest says which leg it is. Called by moe.c. */
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

void exchange_dispatch_begin(const Exchange *x, ExchangeScratch *scratch, const real_t *tokens, bool keep,
                             Profile *profile, Stream *stream) {
    WireType type = x->wire[keep ? FORWARD : BACKWARD];
    real_t *arrived = arrived_rows(x, scratch, keep);
    for (int p = 0; exchange_travels(x) && p < x->parts; p++) {
        const ExchangePart *part = &x->part[p];
        End home = exchange_home(x, part, scratch, type), far = exchange_far(x, part, scratch, arrived, type);
        const real_t *leaving = tokens + (size_t)part->first * x->C;
        size_t row_bytes = wire_row_bytes(type, x->C);
        const char *what = keep ? "dispatch" : "combine backward";
        profile_stage(profile, STAGE_DISPATCH, stream);
        if (exchange_stores(x, type)) {
            exchange_begin_wire(x, what, profile, stream);
            dispatch_put(exchange_places(x, far, row_bytes), leaving, &part->out, x->C, stream);
        } else {
            dispatch_copy(home.rows, leaving, &part->out, x->C, stream);
            exchange_pack(x, home, type, stream);
            exchange_begin_wire(x, what, profile, stream);
            exchange_move(x, far, home, row_bytes, stream);
        }
        exchange_settle(x, stream);
        stream_mark(part->moved, exchange_stream(x, stream));
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

/* Sums of experts' rows (weighted or not) of the rows that came in part p, and these on their way back. */
static void send_back(const Exchange *x, int p, ExchangeScratch *scratch, const real_t *rows, bool weighted, int leg,
                      const char *what, Profile *profile, Stream *stream) {
    const ExchangePart *part = &x->part[p];
    WireType type = x->wire[leg];
    size_t row_bytes = wire_row_bytes(type, x->C);
    End far = exchange_far(x, part, scratch, scratch->arrived, type), home = exchange_home(x, part, scratch, type);
    if (exchange_stores(x, type)) {
        exchange_begin_wire(x, what, profile, stream);
        combine_put(exchange_places(x, home, row_bytes), rows, &part->in, weighted, x->C, stream);
    } else {
        sum_rows(far.rows, rows, &part->in, weighted, 0, x->C, stream);
        exchange_pack(x, far, type, stream);
        exchange_begin_wire(x, what, profile, stream);
        exchange_move(x, home, far, row_bytes, stream);
    }
    exchange_settle(x, stream);
    stream_mark(part->moved, exchange_stream(x, stream));
}

/* to (N,C), of all tokens, = the sums, weighted or not, of the rows that came back, added to it or not. */
static void sum_returned(const Exchange *x, ExchangeScratch *scratch, real_t *to, bool weighted, int accumulate,
                         int leg, Stage stage, Profile *profile, Stream *stream) {
    for (int p = 0; p < x->parts; p++) {
        const ExchangePart *part = &x->part[p];
        real_t *tokens = to + (size_t)part->first * x->C;
        End home = exchange_home(x, part, scratch, x->wire[leg]);
        profile_stage(profile, STAGE_EXCHANGE, stream);
        stream_wait(stream, part->moved);
        profile_stage(profile, stage, stream);
        exchange_unpack(x, home, x->wire[leg], stream);
        sum_rows(tokens, home.rows, &part->out, weighted, accumulate, x->C, stream);
    }
}

/* What a row carries several choices of comes back as their weighted sum; a single one is weighted at home. */
void exchange_combine(const Exchange *x, int p, ExchangeScratch *scratch, real_t *y, const real_t *made,
                      Profile *profile, Stream *stream) {
    profile_stage(profile, STAGE_COMBINE, stream);
    if (exchange_travels(x)) {
        send_back(x, p, scratch, made, exchange_row_per_rank(x->way), FORWARD, "combine", profile, stream);
    } else if (x->plan->slots == 0) { /* rows of a soft plan are y themselves */
        combine_forward(y, made, x->plan, x->C, 0, stream);
    }
}

void exchange_combine_end(const Exchange *x, ExchangeScratch *scratch, real_t *y, Profile *profile, Stream *stream) {
    if (exchange_travels(x)) {
        sum_returned(x, scratch, y, !exchange_row_per_rank(x->way), 0, FORWARD, STAGE_COMBINE, profile, stream);
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
    exchange_move(x, home, far, x->width * sizeof(acc_t), stream);
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
        End home = exchange_home_notes(x, part, scratch->home_dweight, sizeof(acc_t));
        relay_weight_backward(dweight + (size_t)part->first * x->plan->K, (acc_t *)home.wire, &part->out, &part->plan,
                              x->experts, x->width, stream);
    }
}
