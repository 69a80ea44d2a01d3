/* Completes a plan (see plan.h): a stable counting sort of the entries by expert.
 *
 *     demand  histogram of expert[]        count = min(demand, capacity), places given by the drop policy
 *     offset  exclusive prefix sum         row   = offset[e] + rank of the entry within e, in token order
 *
 * Entries with the expert -1 are not there: they are in no demand and get no row.
 */
#ifndef KERNELS_PERMUTE_H
#define KERNELS_PERMUTE_H

#include "plan.h"

/* Rows that a sparse plan of this shape needs at most (capacity 0 counts as N: every token may choose e): compact N*K,
 * or E*capacity where that is less; padded E*capacity; block whole tiles, as many as the least lucky choice needs,
 * about N*K + E*PLAN_TILE. */
int plan_rows(int N, int E, int K, int capacity, Layout layout);

/* Reads plan->expert, plan->weight; writes row, entry, row_weight, demand, count, offset, and tile_expert in the block
 * layout. Of a soft plan it writes demand, count and offset alone, reads nothing of the router's. */
void plan_build(Plan *plan, Stream *stream);

/* The gradient of the weights, back from rows to entries: dweight (N,K) = drow_weight[row], 0 where dropped.
 * drow_weight (rows). */
void plan_weight_backward(acc_t *dweight, const acc_t *drow_weight, const Plan *plan, Stream *stream);

#endif
