/* The plan: which token goes to which expert, where its row lies, and with which weight.
 *
 * A router writes the choice (expert, weight); permute.h completes the plan; dispatch, experts, combine only read it.
 *
 *     entry  n*K + j       the j-th choice of token n
 *     row    0 .. rows-1   a place in the dispatched buffer (rows, C), sorted by (expert, token)
 *
 *     token n --expert[n*K+j]--> expert e:   row[n*K+j] = r,   entry[r] = n*K+j,
 *                                            offset[e] <= r < offset[e] + count[e]
 *
 * Invariants:  sum_e demand[e] = N*K;  count[e] <= demand[e] (equal without a capacity);
 *              sum_e count[e] = number of entries with row >= 0;  within an expert rows are in token order.
 *
 * The two layouts differ in offset alone:
 *   compact  offset[e+1] - offset[e] = count[e]                      no padding, the default
 *   padded   offset[e+1] - offset[e] = capacity for every e (N       a batched product can run it
 *            without a capacity)
 * Every row in offset[e] .. offset[e+1] is computed; one without an entry holds zeros.
 */
#ifndef KERNELS_PLAN_H
#define KERNELS_PLAN_H

#include "types.h"

typedef enum { LAYOUT_COMPACT, LAYOUT_PADDED } Layout;

/* Who keeps a place when an expert is full: earlier tokens (all their choices before the next token's), earlier choices
 * (every token's first choice before any second: couples a token to later ones), or heavier weights (likewise). */
typedef enum { DROP_TOKEN, DROP_SLOT, DROP_WEIGHT } DropPolicy;

typedef struct {
    int N, E, K;
    int rows;     /* length of the row arrays: N*K compact, E*capacity padded */
    int capacity; /* most rows an expert takes; 0: no limit (dropless) */
    Layout layout;
    DropPolicy drop;
    /* written by the router */
    int *expert;   /* (N,K) chosen experts, best first, all different within a token */
    acc_t *weight; /* (N,K) combine weights, not negative */
    /* written by plan_build */
    int *row;          /* (N,K) row of the entry, -1 where it was dropped */
    int *entry;        /* (rows) entry of the row, -1 where the row is padding */
    acc_t *row_weight; /* (rows) weight of the row's entry, 0 for padding */
    int *demand;       /* (E) entries that chose e */
    int *count;        /* (E) entries that e accepted */
    int *offset;       /* (E+1) first row of e */
} Plan;

#endif
