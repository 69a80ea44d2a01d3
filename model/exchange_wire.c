/* The equations are exchange_wire.h's. Called by the other files of exchange.h; under it messages and copies
 * (kernels/comm.h) and stores (kernels/peers.h). */
#include "exchange_wire.h"

#include "../kernels/comm.h"

Stream *exchange_stream(const Exchange *x, Stream *stream) {
    return x->beside ? device_second_stream() : stream;
}

void exchange_begin_wire(const Exchange *x, const char *what, Profile *profile, Stream *stream) {
    profile_stage(profile, STAGE_EXCHANGE, stream);
    comm_at(*x->step, x->layer, what);
    stream_follow(exchange_stream(x, stream), stream);
}

void exchange_end_wire(const Exchange *x, Profile *profile, Stream *stream) {
    profile_stage(profile, STAGE_EXCHANGE, stream);
    stream_follow(stream, exchange_stream(x, stream));
}

End exchange_home(const Exchange *x, const ExchangePart *part, const ExchangeScratch *s, WireType type) {
    real_t *rows = s->home + part->out_row * x->C;
    char *packed = (char *)s->home_wire + part->out_row * wire_row_bytes(type, x->C);
    char *wire = type == WIRE_SAME ? (char *)rows : packed;
    return (End){rows, wire, part->send, part->their_receive, part->out.entry, 1};
}

End exchange_far(const Exchange *x, const ExchangePart *part, const ExchangeScratch *s, real_t *rows, WireType type) {
    rows += part->in_row * x->C;
    char *packed = (char *)s->arrived_wire + part->in_row * wire_row_bytes(type, x->C);
    char *wire = type == WIRE_SAME ? (char *)rows : packed;
    return (End){rows, wire, part->receive, part->their_send, part->in.row, x->width};
}

End exchange_home_notes(const Exchange *x, const ExchangePart *part, void *notes, size_t each) {
    return (End){NULL, (char *)notes + part->out_row * x->width * each, part->send, part->their_receive, NULL, 0};
}

End exchange_far_notes(const Exchange *x, const ExchangePart *part, void *notes, size_t each) {
    char *wire = (char *)notes + part->in_row * x->width * each;
    return (End){NULL, wire, part->receive, part->their_send, part->in.row, x->width};
}

void exchange_pack(const Exchange *x, End end, WireType type, Stream *stream) {
    if (type != WIRE_SAME) {
        wire_pack(end.wire, end.rows, type, end.first[x->ranks], x->C, stream);
    }
}

void exchange_unpack(const Exchange *x, End end, WireType type, Stream *stream) {
    if (type != WIRE_SAME) {
        wire_unpack(end.rows, end.wire, type, end.first[x->ranks], x->C, stream);
    }
}

PeerRows exchange_places(const ExchangePart *part, End to, size_t row_bytes) {
    return peers_rows(to.wire, part->out.capacity, row_bytes);
}

void exchange_move(const Exchange *x, const ExchangePart *part, End to, End from, size_t row_bytes, Stream *stream) {
    if (x->way == EXCHANGE_P2P) {
        peers_put(exchange_places(part, to, row_bytes), from.wire, row_bytes, from.there, from.each, stream);
    } else {
        comm_exchange(GROUP_EXPERTS, to.wire, to.first, from.wire, from.first, from.theirs, row_bytes,
                      exchange_stream(x, stream));
    }
}

void exchange_settle(const Exchange *x, Stream *stream) {
    if (x->way == EXCHANGE_P2P) {
        peers_meet(GROUP_EXPERTS, false, stream);
    }
}
