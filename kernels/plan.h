/* The plan: which token goes to which expert, where its row lies, and with which weight. There are two kinds.
 *
 * A sparse plan is a list of choices. A router writes them (expert, weight); permute.h completes the plan; dispatch,
 * experts, combine only read it.
 *
 *     entry  n*K + j       the j-th choice of token n; K is how many a token may have at most
 *     row    0 .. rows-1   a place in the dispatched buffer (rows, C), sorted by (expert, token)
 *
 *     token n --expert[n*K+j]--> expert e:   row[n*K+j] = r,   entry[r] = n*K+j,
 *                                            offset[e] <= r < offset[e] + count[e]
 *
 * Where tokens choose, each has K entries, all with different experts (a plan of relay.h, whose experts are ranks, may
 * name one several times). Where experts choose (expert choice, thresholds), a token has none to E:
 * then K = E, and an entry that is not there has the expert -1, the weight 0 and the row -1.
 *
 * Invariants:  sum_e demand[e] = entries that are there;  count[e] <= demand[e] (equal without a capacity);
 *              sum_e count[e] = number of entries with row >= 0;  within an expert rows are in token order.
 *
 * The layouts differ in offset alone:
 *   compact  offset[e+1] - offset[e] = count[e]                      no padding, the default
 *   padded   offset[e+1] - offset[e] = capacity for every e (N       a batched product can run it
 *            without a capacity)
 *   block    offset[e+1] - offset[e] = count[e], rounded up to       a product of whole tiles can run it: tile t, rows
 *            whole tiles of PLAN_TILE rows                           t*PLAN_TILE on, is expert tile_expert[t]'s alone
 *            (MegaBlocks, Gale et al. 2022, arXiv 2211.15841)
 * Every row in offset[e] .. offset[e+1] is computed; one without an entry holds zeros.
 *
 * A soft plan chooses nothing: each expert has S slots for every group of tokens (a sequence, or the tokens of equal
 * position in the batch), a slot reads a mixture of the group's tokens, and a token reads a mixture of its group's
 * slots. Rows are constant, offset[e] = e*G*S for G groups, so only the two mixtures are to be known:
 *
 *     rows[(e*G + g)*S + s] = sum_{n in g} mix[n, e*S+s] x_n        y_n = sum_j weight[n,j] rows of slot j in n's group
 *
 * There K = E*S, `slots` is S, and expert, row, entry, row_weight are not used.
 */
#ifndef KERNELS_PLAN_H
#define KERNELS_PLAN_H

#include "types.h"

typedef enum { LAYOUT_COMPACT, LAYOUT_PADDED, LAYOUT_BLOCK } Layout;

enum { PLAN_TILE = 64 };

/* Who keeps a place when an expert is full: earlier tokens (all their choices before the next token's), earlier choices
 * (every token's first choice before any second: couples a token to later ones), or heavier weights (likewise). */
typedef enum { DROP_TOKEN, DROP_SLOT, DROP_WEIGHT } DropPolicy;

typedef struct {
    int N, E, K;
    int rows;     /* length of the row arrays: N*K compact, E*capacity padded, whole tiles in block; E*G*S soft */
    int capacity; /* most rows an expert takes; 0: no limit (dropless) */
    Layout layout;
    DropPolicy drop;
    /* written by the router */
    int *expert;   /* (N,K) chosen experts, best first; -1: no entry */
    acc_t *weight; /* (N,K) combine weights, not negative */
    /* written by plan_build */
    int *row;          /* (N,K) row of the entry, -1 where there is none or it was dropped */
    int *entry;        /* (rows) entry of the row, -1 where the row is padding */
    acc_t *row_weight; /* (rows) weight of the row's entry, 0 for padding */
    int *demand;       /* (E) entries that chose e */
    int *count;        /* (E) entries that e accepted */
    int *offset;       /* (E+1) first row of e */
    int *tile_expert;  /* (rows / PLAN_TILE) block only, else NULL: the tile's expert, -1 past the last one's rows */
    /* a soft plan alone */
    int slots;        /* S, 0: the plan is sparse */
    int group_tokens; /* tokens of a group, which divide N: G = N / group_tokens */
    int across;       /* 0: group g is the run of tokens from g*group_tokens; 1: it is the tokens n with n % G = g */
    acc_t *mix;       /* (N,K) share of the token in what the slot reads; written by the router, as weight */
} Plan;

/* Where the rows of a dispatched buffer are found: row r is row entry[r] / K of x (N,C), all zero where entry[r] is -1.
 * With entry NULL, x (rows,C) is the buffer itself. */
typedef struct {
    const real_t *x;
    const int *entry;
    int K;
} RowSource;

#endif
