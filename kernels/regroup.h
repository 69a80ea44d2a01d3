/* Rows that came from several ranks, between two orders:
 *
 *     by source   rank, then expert, then as they were sent        as they arrive
 *     by expert   expert, then rank, then as they were sent        as the experts read them
 *
 *     ranks s, experts e, n(s,e) rows each:
 *     row i of (s,e) is number  sum_{s'<s, e'} n(s',e') + sum_{e'<e} n(s,e') + i   by source
 *                       and     offset[e] + sum_{s'<s} n(s',e) + i                 by expert
 *
 * Both directions only copy: bytes, whatever the numbers are.
 */
#ifndef KERNELS_REGROUP_H
#define KERNELS_REGROUP_H

#include "types.h"

typedef struct {
    int ranks, experts;
    int stride;        /* between two ranks' numbers in rows */
    const int *rows;   /* (ranks, stride) n(s,e), the first `experts` of each, on the device */
    const int *offset; /* (experts+1) on the device */
} Regroup;

/* length[e] = offset[e+1] - offset[e], e < E */
void regroup_lengths(int *length, const int *offset, int E, Stream *stream);

/* From what all ranks told, told (world, 2, E): their demand and rows for each expert.
 * demand (E) = the sum over the world; offset (experts+1) = where the rows of experts first_expert .. begin that ranks
 * first_rank .. first_rank + ranks - 1 have for them. */
void regroup_plan(int *demand, int *offset, const int *told, int world, int first_rank, int ranks, int first_expert,
                  int experts, int E, Stream *stream);

/* to, from: rows of row_bytes; they do not overlap. */
void regroup_by_expert(void *to, const void *from, Regroup regroup, size_t row_bytes, Stream *stream);
void regroup_by_source(void *to, const void *from, Regroup regroup, size_t row_bytes, Stream *stream);

#endif
