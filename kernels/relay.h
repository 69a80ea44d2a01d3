/* What leaves a rank, and what is said of it on the way.
 *
 * Experts are spread over R ranks, E/R neighbours on each. A row on its way between ranks belongs to two plans
 * (plan.h):
 *
 *     out    the sender's: tokens of this rank to ranks. Its "experts" are the R ranks, its rows are sorted by rank
 *     in     the receiver's: rows that arrived to this rank's E/R experts. Its "tokens" are those rows
 *
 *     token --out--> row in rank order ~~~ wire ~~~> row in order of arrival --in--> row of an expert
 *
 * So dispatch, combine and their backwards are the same kernels twice, once on each side of the wire. With each row
 * goes a list of `width` notes: which of the receiver's experts it is for, and with which weight. Two ways to fill it:
 *
 *     a row for each (token, expert)   width 1      a token with two experts on one rank travels twice
 *     a row for each (token, rank)     width K      .. travels once, and is handed out there
 *
 * An entry of the router's plan without a row takes no part.
 */
#ifndef KERNELS_RELAY_H
#define KERNELS_RELAY_H

#include "peers.h"
#include "plan.h"

typedef struct {
    int expert; /* number among the receiver's experts; -1: none */
    acc_t weight;
} RelayNote;

/* out->expert (N,K) = the rank of each entry's expert; with `once`, -1 where an earlier entry of the token has the same
 * rank. plan: the router's, built; experts: of each rank. */
void relay_ranks(Plan *out, const Plan *plan, int experts, int once, Stream *stream);

/* In place of relay_ranks, plan_build and relay_write, where every token has a place for every rank and nothing is
 * sorted: writes row (N,K) = rank*N + n for the first entry of token n with that rank, -1 for its others; entry (R*N),
 * offset (R+1) and expert; and the notes (N places of K notes) of all places, straight into the memory of their rank.
 * out: padded, with a capacity of N. */
void relay_places(Plan *out, PeerRows notes, const Plan *plan, int experts, Stream *stream);

/* back->row (N,K) of rows that come back one for each choice: entry i's is row i; -1 where it takes no part. */
void relay_choices(Plan *back, const Plan *plan, Stream *stream);

/* note (out->rows, width): of each row of `out`, built from relay_ranks. */
void relay_write(RelayNote *note, const Plan *out, const Plan *plan, int experts, int width, Stream *stream);

/* in->expert, in->weight (in->N, width = in->K) from the notes that arrived. */
void relay_read(Plan *in, const RelayNote *note, Stream *stream);

/* dweight (N,K), the gradient of plan->weight, from what came back with the rows of `out`: back (out->rows, width). 0
 * for an entry that took no part. */
void relay_weight_backward(acc_t *dweight, const acc_t *back, const Plan *out, const Plan *plan, int experts, int width,
                           Stream *stream);

/* told (R) = rows of `out` for each rank. */
void relay_tell(int *told, const Plan *out, Stream *stream);

/* demand (E) = the sum over `world` ranks' told (world, stride), which begin with their demand. */
void relay_demand(int *demand, const int *told, int world, int stride, int E, Stream *stream);

/* Of a soft plan, whose rows are sorted by expert already: a sparse plan in which each row is a token with that one
 * expert. expert, weight (rows) = r / rows of an expert, 1. */
void relay_slots(Plan *slots, Stream *stream);

#endif
