/* Expert parallelism: rows travel to the rank that holds their expert, and back.
 *
 * Of the E experts of a layer each rank of a group holds E/ranks neighbours. 2 ranks, 4 experts, one row per choice:
 *
 *     rank 0: tokens a b c                           rank 1: tokens d e
 *       a -> e0 e2   b -> e1 e3   c -> e0 e3           d -> e0 e2   e -> e1 e2
 *
 *     out   sorted by rank                           out
 *       a0 b1 c0 | a2 b3 c3                            d0 e1 | d2 e2
 *         stay      to rank 1                          to rank 0  stay
 *     ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ exchange ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
 *     in    as they arrive: by source                in
 *       a0 b1 c0 | d0 e1                               a2 b3 c3 | d2 e2
 *     experts read them sorted by expert
 *       e0: a c d   e1: b e                            e2: a d e   e3: b c
 *
 * Each side has a plan of its own, `out` and `in` (kernels/relay.h): on both the rows are moved by the same dispatch
 * and combine as on one rank. Within an expert rows keep the order of the ranks, which is that of the tokens in the
 * whole batch, so the experts see what they would see on one rank.
 *
 * Ways to do it (--exchange):
 *     flat       a row per choice, in order of arrival; the experts' product finds its rows by index where it can
 *     bucketed   the same, and the receiver writes them out expert by expert first
 *     dedup      a row per token and rank; the receiver hands it to its experts, adds up what they make of it,
 *                weighted, and returns one row
 *     padded     as flat, in messages of a fixed size: nobody has to wait for the counts. What does not fit is dropped
 *                and counted (--exchange-rows; --exchange-margin takes the first batch for a measure)
 *     p2p        as dedup, but nothing is sent: the dispatch and the combine themselves store each row in the memory of
 *                the rank that it is for (kernels/peers.h), where every token of every rank has a place. Nobody counts.
 *                Beside the experts' work all places are copied, whether there is a row in them or not. Back comes
 *                such a sum, or a row for each choice (--exchange-return), which is weighted and added up at home, as
 *                on one rank: more rows, but as the experts make them, so on Hopper their product itself stores each
 *                of its rows at home, while it multiplies others
 *
 * What is said about the rows travels once, in the forward (relay.h); the way back and the backward need nothing. By
 * linearity the backward of the way there is the way back, and the other way round; the gate's gradient comes back as
 * one number per choice.
 *
 * On the wire rows may have fewer bits than where they are computed with (--wire, --wire-back; kernels/wire.h).
 *
 * Tokens may go in parts (--exchange-chunks): while the experts work on one, the rows of the next are on their way, on
 * a stream of their own (--overlap 0: on the same one, with the same bits). dW1 and dW2 are added up part by part, so
 * another number of parts gives other roundings.
 *
 *     wire       there 0 | there 1                   | back 0               | back 1
 *     experts              rows of 0                 | rows of 1            |          sums
 *
 * A group of one rank moves and copies nothing: `in` is the router's plan.
 */
#ifndef MODEL_EXCHANGE_H
#define MODEL_EXCHANGE_H

#include "../kernels/device.h"
#include "../kernels/plan.h"
#include "../kernels/relay.h"
#include "../kernels/wire.h"
#include "config.h"

/* Some of a layer's tokens, which travel together. */
typedef struct {
    int first;              /* of the layer's tokens; plan.N follow */
    Plan plan;              /* what the router chose for them, in its arrays */
    Plan out, in;           /* of the rows that leave, of those that have arrived */
    Plan back;              /* of those that come back, one for each choice: row and weight alone */
    size_t out_row, in_row; /* the part's first one of the rows that leave, and of those that arrive, of all parts */
    /* (ranks+1) host, owned: the part's first row for, and from, each rank of the group; and that rank's first row
     * from, and for, this one */
    int *send, *receive, *their_receive, *their_send;
    StreamMark *moved; /* when its rows were last where they travelled to; NULL where they travel in turn */
} ExchangePart;

/* One layer's; saved by the forward for its backward. */
typedef struct {
    int way;             /* ExchangeWay */
    int ranks, E, C;     /* ranks of the group */
    int experts;         /* of this rank */
    int width;           /* notes with each row (relay.h) */
    double margin;       /* of padded messages: --exchange-margin until their size is found, then 0 */
    bool beside;         /* whether rows travel beside the work on others, not in turn with it */
    bool by_choice;      /* with p2p: whether a row comes back for each choice, not for each rank */
    WireType wire[2];    /* of rows in the forward, and in the backward */
    int layer;           /* this and the step: for the line of a rank that waits in vain */
    const int64_t *step; /* optimizer steps done */
    Plan *plan;          /* what is exchanged: the router's plan, or slots where that is a soft one */
    Plan slots;          /* a soft plan's rows as tokens, each with its one expert */
    int parts;
    ExchangePart part[EXCHANGE_MOST_PARTS];
    real_t *kept;   /* (in rows of all parts, C) as they arrived, for the backward; NULL with one rank */
    int *told;      /* (world, E + parts*ranks) device: each rank's demand, then of each part its rows for each rank */
    int *host_told; /* the same on the host, owned */
    const int *demand;  /* (E) device: entries of all ranks that chose each expert */
    int *demand_of_all; /* what it points to where there are several ranks */
} Exchange;

/* Buffers that all layers take turns in; NULL with one rank. */
typedef struct {
    real_t *home, *arrived;                /* (out rows, or those that come back, C), (in rows, C) */
    real_t *made;                          /* (in rows, C) what is made of those that arrived, to go back */
    void *home_wire, *arrived_wire;        /* the same, packed; NULL where rows travel as they are */
    RelayNote *home_note, *arrived_note;   /* (out rows, width), (in rows, width) */
    acc_t *home_dweight, *arrived_dweight; /* likewise */
} ExchangeScratch;

/* What the layers need of those. */
typedef struct {
    size_t home_rows, in_rows, out_notes, in_notes;
    size_t row_bytes; /* on the wire, the most; 0: as they are */
    bool copies;      /* whether some way writes out the experts' rows, on every device */
} ExchangeSize;

/* Opens the arena, committed, to other ranks where these can and may store in it (--peer-memory), and closes it. With
 * `p2p` a line says why they cannot. Collective. */
void exchange_open(const Config *config, const Arena *arena);
void exchange_close(void);

/* Refuses what cannot be spread over these ranks: one line for each. After comm_form_groups. */
void exchange_check(const Config *config);

/* Whether a step's calls are the same in every step, so that it can be recorded: no sizes that the host must learn. */
bool exchange_recordable(const Config *config);

/* Reserves for a layer, whose plan has its sizes, at most plan_rows rows, the same on all ranks; step must outlive it.
 * Returns how many rows this rank's experts can get at most of one part; of all, `parts` times as many. */
int exchange_reserve(Exchange *exchange, Plan *plan, int plan_rows, const Config *config, int layer,
                     const int64_t *step, ExchangeSize *size, Arena *arena);
void exchange_free(Exchange *exchange);
void exchange_reserve_scratch(ExchangeScratch *scratch, ExchangeSize size, int C, Arena *arena);

/* Whether rows leave this rank. Where they do not, there is one part. */
bool exchange_travels(const Exchange *exchange);

/* After plan_build of the layer's plan: all ranks tell each other their counts; fills demand, out and in. But for
 * `padded` and `p2p` the host waits for the counts here, and nowhere else. */
void exchange_plan(Exchange *exchange, ExchangeScratch *scratch, Profile *profile, Stream *stream);

/* The plan of a part's rows that this rank's experts work on: their offsets and weights. */
const Plan *exchange_experts(const Exchange *exchange, int part);

/* The plan that says what was dropped on the way, for plan_measure. */
const Plan *exchange_measured(const Exchange *exchange);

/* Forward, of tokens (N,C) to y (N,C):
 *
 *     exchange_dispatch_begin(x, s, tokens, true, ..);
 *     for each part p:  rows = exchange_dispatch(x, p, s, to, tokens, true, ..);   the experts: rows to made
 *                       exchange_combine(x, p, s, y, made, ..);
 *     exchange_combine_end(x, s, y, ..);
 *
 * Rows are found where exchange_dispatch says, in `to` (rows, C) if they are written out; made (rows, C) may be
 * overwritten by the next part. keep: for exchange_dispatch_again, which does without the wire. y is the weighted sum
 * of what the experts made of each token.
 *
 * Where exchange_target says so, the experts may store what they make of a part's rows where it tells them to, after
 * exchange_dispatch of the same direction; `made`, or drows below, is then NULL. */
void exchange_dispatch_begin(const Exchange *exchange, ExchangeScratch *scratch, const real_t *tokens, bool keep,
                             Profile *profile, Stream *stream);
RowSource exchange_dispatch(const Exchange *exchange, int part, ExchangeScratch *scratch, real_t *to,
                            const real_t *tokens, bool keep, Profile *profile, Stream *stream);
bool exchange_target(RowTarget *to, const Exchange *exchange, int part, const ExchangeScratch *scratch, bool forward);
RowSource exchange_dispatch_again(const Exchange *exchange, int part, real_t *to, const real_t *tokens,
                                  Profile *profile, Stream *stream);
void exchange_combine(const Exchange *exchange, int part, ExchangeScratch *scratch, real_t *y, const real_t *made,
                      Profile *profile, Stream *stream);
void exchange_combine_end(const Exchange *exchange, ExchangeScratch *scratch, real_t *y, Profile *profile,
                          Stream *stream);

/* Backward, from dy (N,C) to dx (N,C) and dweight (N,K):
 *
 *     exchange_dispatch_begin(x, s, dy, false, ..);
 *     for each part p:  dy_rows = exchange_dispatch(x, p, s, .., dy, false, ..);   the experts: to drows, drow_weight
 *                       exchange_backward(x, p, s, drows, drow_weight, ..);                  .. and the experts' dW
 *     exchange_backward_end(x, s, dx, dweight, ..);
 *
 * dx is the sum of drows (rows, C) of each token, added to dx when accumulate is 1; dweight comes from drow_weight
 * (rows); both NULL where there are no weights. */
void exchange_backward(const Exchange *exchange, int part, ExchangeScratch *scratch, real_t *dx, acc_t *dweight,
                       const real_t *drows, const acc_t *drow_weight, int accumulate, Profile *profile, Stream *stream);
void exchange_backward_end(const Exchange *exchange, ExchangeScratch *scratch, real_t *dx, acc_t *dweight,
                           int accumulate, Profile *profile, Stream *stream);

/* Bytes that this rank stores in the memory of others with p2p, which sends no messages that could be counted: in the
 * forward of the last call's tokens, or in its backward. Rows and what is said of them. Waits for the device. */
double exchange_stored(const Exchange *exchange, bool backward);

#endif
