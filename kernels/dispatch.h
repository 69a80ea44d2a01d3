/* Tokens to expert rows and back. Both directions, forward and backward, are gathers: every output element has one
 * owner that adds in a fixed order.
 *
 *     dispatch   rows[r] = x[entry[r] / K], r < offset[E]         padding rows are zero
 *     combine    y[n]    = sum_j weight[n,j] rows[row[n,j]]      entries without a row add nothing
 *
 * Backward by linearity: the gradient of combine is a dispatch of dy (the weight is applied inside the expert's
 * backward, experts.h), the gradient of dispatch is a combine without weights. Both for sparse plans; a soft one is
 * mixed by soft_mix.h.
 *
 * An expert product that can fetch each row from x by its index needs no rows written out: on such a device
 * dispatch_forward copies nothing and hands over the index.
 */
#ifndef KERNELS_DISPATCH_H
#define KERNELS_DISPATCH_H

#include <stdbool.h>

#include "peers.h"
#include "plan.h"

/* Whether dispatch_forward and combine_backward write rows; where they do not, they take NULL for them. */
bool dispatch_copies(void);

/* The experts' input; rows (plan->rows, C); x (N,C) must stay as it is while the result is used. */
RowSource dispatch_forward(real_t *rows, const real_t *x, const Plan *plan, int C, Stream *stream);

/* dx (N,C) = sum_j drows[row[n,j]], added to dx when accumulate is 1 */
void dispatch_backward(real_t *dx, const real_t *drows, const Plan *plan, int C, int accumulate, Stream *stream);

/* y (N,C) = sum_j weight[n,j] rows[row[n,j]], added to y when accumulate is 1 */
void combine_forward(real_t *y, const real_t *rows, const Plan *plan, int C, int accumulate, Stream *stream);

/* drows[r] = dy[entry[r] / K], still without the weight; as dispatch_forward; drows (plan->rows, C), dy (N,C) */
RowSource combine_backward(real_t *drows, const real_t *dy, const Plan *plan, int C, Stream *stream);

/* Writes rows (plan->rows, C) out on every device: for who sends them elsewhere. Those past offset[E] are not touched.
 */
void dispatch_copy(real_t *rows, const real_t *x, const Plan *plan, int C, Stream *stream);

/* The same two where others want the results, stored straight into their memory. Rows of x (N,C) with a row for rank
 * r / places, plan->row; and for each token n of the plan with a row, to n, their sum, weighted or not. */
void dispatch_put(PeerRows to, const real_t *x, const Plan *plan, int C, Stream *stream);
void combine_put(PeerRows to, const real_t *rows, const Plan *plan, bool weighted, int C, Stream *stream);

/* Each of rows (rows,C) from offset[0] to offset[E], which is `most` at most, to a place of its own, if it has one. */
void rows_put(RowTarget to, const real_t *rows, const int *offset, int E, int most, int C, Stream *stream);

#endif
