/* What both backends of permute.h share: how many rows a plan takes, which the host works out, and what its entries say
 * before their rows are known.
 *
 * Read by permute.c and permute.cu; nothing outside kernels/ includes it.
 */
#ifndef KERNELS_PLAN_ROWS_H
#define KERNELS_PLAN_ROWS_H

#include <stdint.h>

#include "plan.h"

/* plan->row of an entry that is dropped or not there; that of one that is to have a row. */
enum { NO_ROW = -1, ACCEPTED = 0 };

static inline int least(int a, int b) {
    return a < b ? a : b;
}

static inline int whole_tiles(int rows) {
    return (rows + PLAN_TILE - 1) / PLAN_TILE * PLAN_TILE;
}

/* plan_rows of permute.h */
static inline int most_rows(int N, int E, int K, int capacity, Layout layout) {
    int entries = N * K;
    if (layout == LAYOUT_PADDED) {
        return E * (capacity > 0 ? capacity : N);
    }
    if (layout == LAYOUT_COMPACT) {
        int64_t places = (int64_t)E * (capacity > 0 ? capacity : N);
        return places < entries ? (int)places : entries;
    }
    /* An expert's first row takes a tile of its own, its next PLAN_TILE - 1 rows are free: the most tiles come from as
     * many experts as can have a row. What one expert may hold is the other limit. */
    int used = least(E, entries);
    int most = capacity > 0 ? least(capacity, N) : N;
    return least((entries + used * (PLAN_TILE - 1)) / PLAN_TILE * PLAN_TILE, E * whole_tiles(most));
}

#endif
