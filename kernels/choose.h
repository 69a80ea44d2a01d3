/* The K largest of E values, by sweeps: no scratch, any K, and a total order whatever the numbers are.
 *
 *     a comes before b:   value_a > value_b, or equal and a < b
 *
 * NaN and minus infinity count as the lowest finite number, so that a sweep can begin below everything.
 *
 * Read by the .c files of this folder that choose experts; nothing outside kernels/ includes it.
 */
#ifndef KERNELS_CHOOSE_H
#define KERNELS_CHOOSE_H

#include <float.h>
#include <math.h>
#include <stdbool.h>

#include "types.h"

static inline acc_t choose_rank(acc_t value) {
    const acc_t lowest = sizeof(acc_t) == sizeof(float) ? (acc_t)-FLT_MAX : (acc_t)-DBL_MAX;
    return value > lowest ? value : lowest;
}

static inline bool comes_before(const acc_t *value, int a, int b) {
    acc_t rank_a = choose_rank(value[a]), rank_b = choose_rank(value[b]);
    return rank_a > rank_b || (rank_a == rank_b && a < b);
}

/* The first of those that come after `last`; last -1: the first of all; -1: none is left. */
static inline int choose_next(const acc_t *value, int E, int last) {
    acc_t last_rank = last < 0 ? (acc_t)INFINITY : choose_rank(value[last]), best_rank = -(acc_t)INFINITY;
    int best = -1;
    for (int e = 0; e < E; e++) {
        acc_t rank = choose_rank(value[e]);
        bool left = rank < last_rank || (rank == last_rank && e > last);
        if (left && rank > best_rank) {
            best = e;
            best_rank = rank;
        }
    }
    return best;
}

/* chosen (K) of value (E), first in order first; K <= E */
static inline void choose_largest(int *chosen, const acc_t *value, int E, int K) {
    for (int j = 0; j < K; j++) {
        chosen[j] = choose_next(value, E, j == 0 ? -1 : chosen[j - 1]);
    }
}

#endif
