/* How rows move between two ends, whatever the way: what is between the files of exchange.h, and for no others.
 *
 *     exchange.c         what is reserved, and who may take part
 *     exchange_plan.c    which rows leave and which arrive
 *     exchange_rows.c    the rows themselves, forward and back
 *     exchange_wire.c    this: messages, copies or stores between a rank's tokens and others' experts
 */
#ifndef MODEL_EXCHANGE_WIRE_H
#define MODEL_EXCHANGE_WIRE_H

#include "../kernels/peers.h"
#include "exchange.h"

enum { FORWARD, BACKWARD }; /* legs of Exchange.wire */

/* Whether messages have a size that nobody has to learn. */
static inline bool exchange_fixed_size(int way) {
    return way == EXCHANGE_PADDED || way == EXCHANGE_P2P;
}

/* Whether a token travels once to a rank, however many of its experts are there. */
static inline bool exchange_row_per_rank(int way) {
    return way == EXCHANGE_DEDUP || way == EXCHANGE_P2P;
}

/* Whether dispatch and combine themselves store rows where they are for. */
static inline bool exchange_stores(const Exchange *x, WireType type) {
    return x->way == EXCHANGE_P2P && type == WIRE_SAME;
}

/* Whether what comes back on this leg is a row for each choice. */
static inline bool exchange_by_choice(const Exchange *x, int leg) {
    return x->by_choice && exchange_stores(x, x->wire[leg]);
}

/* Numbers that each rank tells all others: its demand, and unless sizes are fixed its rows of each part for each rank.
 */
static inline int exchange_told(const Exchange *x) {
    return x->E + (exchange_travels(x) && !exchange_fixed_size(x->way) ? x->parts * x->ranks : 0);
}

/* One end of the wire, for one part: where rows are, also as they travel; how many are for, or from, each rank, and
 * where these begin with that rank. For p2p: row r is there if one of there (.., each), r's, is not -1; NULL: all. */
typedef struct {
    real_t *rows;
    char *wire;
    const int *first, *theirs, *there;
    int each;
} End;

/* At home, where tokens are; and far from it, where experts are: rows are those that arrive, or go back, of all parts.
 */
End exchange_home(const Exchange *x, const ExchangePart *part, const ExchangeScratch *s, WireType type);
End exchange_far(const Exchange *x, const ExchangePart *part, const ExchangeScratch *s, real_t *rows, WireType type);

/* The same of what is as long as the notes of each row, `each` bytes a note. */
End exchange_home_notes(const Exchange *x, const ExchangePart *part, void *notes, size_t each);
End exchange_far_notes(const Exchange *x, const ExchangePart *part, void *notes, size_t each);

/* The stream on which rows travel: where they do it beside other work, not the one of that. */
Stream *exchange_stream(const Exchange *x, Stream *stream);

/* What follows moves data between ranks, when all that is queued is done; what: for the line that a rank says which
 * waits in vain. The other waits for what has been queued to travel. */
void exchange_begin_wire(const Exchange *x, const char *what, Profile *profile, Stream *stream);
void exchange_end_wire(const Exchange *x, Profile *profile, Stream *stream);

/* The rows of an end to what travels, and back. */
void exchange_pack(const Exchange *x, End end, WireType type, Stream *stream);
void exchange_unpack(const Exchange *x, End end, WireType type, Stream *stream);

/* What travels, from one end to the other. */
void exchange_move(const Exchange *x, const ExchangePart *part, End to, End from, size_t row_bytes, Stream *stream);

/* With p2p: the places at the end `to` of each rank; and a meeting, after which all that was stored is there. */
PeerRows exchange_places(const ExchangePart *part, End to, size_t row_bytes);
void exchange_settle(const Exchange *x, Stream *stream);

#endif
