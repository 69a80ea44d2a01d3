/* Experts that only scale, for what measures the way to experts and back: each multiplies its rows by a number of its
 * own. Called by bench_alltoall.c. */
#ifndef EXPERIMENTS_SCALE_ROWS_H
#define EXPERIMENTS_SCALE_ROWS_H

#include "../kernels/plan.h"

/* out[r] = scale[e] * weight[r] * row r, for rows offset[e] .. offset[e+1] of expert e; all have an entry. weight
 * (rows), NULL: 1. used[r] = scale[e], unless used is NULL. scale (experts), offset (experts+1). */
void scale_rows(real_t *out, acc_t *used, RowSource rows, const acc_t *weight, const acc_t *scale, const int *offset,
                int experts, int C, Stream *stream);

#endif
