/* The balanced table of fixed_choice.h: experts handed out to the tokens of a vocabulary one after the other, each
 * token those that have the least to do so far.
 *
 * Made once per run, in host memory, by the same code whatever device trains: the hash router of model/ calls it for
 * its initial table. What reads the table is table_choice.
 */
#include "fixed_choice.h"

#include <stdlib.h>

#include "check.h"
#include "random.h"

typedef struct {
    double frequency;
    uint64_t order; /* among tokens of equal frequency */
    int token;
} Ranked;

static int compare_ranked(const void *left, const void *right) {
    const Ranked *a = left, *b = right;
    if (a->frequency != b->frequency) {
        return a->frequency > b->frequency ? -1 : 1;
    }
    if (a->order != b->order) {
        return a->order < b->order ? -1 : 1;
    }
    return a->token - b->token;
}

/* Random numbers index .. index+E-1 of `key` decide (Fisher, Yates). */
static void shuffle_experts(int *order, uint64_t key, uint64_t index, int E) {
    for (int i = 0; i < E; i++) {
        int j = (int)random_below(key, index + (uint64_t)i, (uint64_t)i + 1);
        order[i] = order[j];
        order[j] = i;
    }
}

static int is_among(int e, const acc_t *chosen, int count) {
    for (int j = 0; j < count; j++) {
        if (chosen[j] == e) {
            return 1;
        }
    }
    return 0;
}

/* The expert of least load that is not among the `count` chosen, the first such from order[start] on, going round. */
static int least_loaded(const double *load, const int *order, int start, int E, const acc_t *chosen, int count) {
    int best = -1;
    for (int i = 0; i < E; i++) {
        int e = order[start + i < E ? start + i : start + i - E];
        if ((best < 0 || load[e] < load[best]) && !is_among(e, chosen, count)) {
            best = e;
        }
    }
    return best;
}

/* The experts are shuffled for every E tokens, and the i-th of these tokens goes through them from place i on. With
 * equal loads it takes order[i], order[i+1], ... and every column gets each expert once: exact balance for equal
 * frequencies, where an order of each token's own would leave the last tokens experts that they have already. */
void balanced_table(acc_t *table, const double *frequency, uint64_t key, int V, int E, int K) {
    Ranked *ranked = calloc((size_t)V, sizeof *ranked);
    double *load = calloc((size_t)K * E, sizeof *load); /* (K,E) */
    int *order = calloc((size_t)E, sizeof *order);
    CHECK(ranked && load && order, "out of memory for a table of %d tokens: use a smaller vocabulary", V);
    for (int v = 0; v < V; v++) {
        ranked[v] = (Ranked){frequency ? frequency[v] : 1, random_bits(key, (uint64_t)v), v};
    }
    qsort(ranked, (size_t)V, sizeof *ranked, compare_ranked);
    for (int i = 0; i < V; i++) {
        if (i % E == 0) {
            shuffle_experts(order, key, (uint64_t)V + (uint64_t)i, E);
        }
        acc_t *chosen = table + (size_t)ranked[i].token * K;
        for (int j = 0; j < K; j++) {
            double *column = load + (size_t)j * E;
            int e = least_loaded(column, order, i % E, E, chosen, j);
            column[e] += ranked[i].frequency;
            chosen[j] = (acc_t)e;
        }
    }
    free(ranked);
    free(load);
    free(order);
}
