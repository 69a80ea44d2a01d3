/* The batch that bench_alltoall.c sends round: which experts each rank's tokens choose, as --skew asks for. Every rank
 * draws its own from the seed; the counts of all are known to all. */
#ifndef EXPERIMENTS_ALLTOALL_BATCH_H
#define EXPERIMENTS_ALLTOALL_BATCH_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"
#include "../kernels/comm.h"
#include "../kernels/random.h"
#include "../kernels/types.h"

enum { NAME = 48 };

typedef struct {
    char name[NAME];
    int E, k, H, T, seed;
} Shape;

typedef struct {
    const char *way, *wire, *wire_back, *peer_memory, *skew, *sweep;
    int repeats, seed, room; /* seed -1: the shape's own; room 0: the least that is enough */
    double seconds;
    bool full_tokens;
} Options;

/* ---- what the ranks tell each other on the host ---- */

/* values (count) = the largest that any rank has. */
static inline void largest_of_ranks(double *values, int count) {
    int ranks = comm_ranks(GROUP_WORLD);
    double *all = calloc((size_t)ranks * count, sizeof *all);
    CHECK(all, "out of memory for %d numbers of %d ranks", count, ranks);
    memcpy(all + (size_t)comm_rank(GROUP_WORLD) * count, values, count * sizeof *all);
    comm_sum_host(all, (size_t)ranks * count);
    for (int i = 0; i < ranks * count; i++) {
        values[i % count] = all[i] > values[i % count] ? all[i] : values[i % count];
    }
    free(all);
}

static inline double largest(double value) {
    largest_of_ranks(&value, 1);
    return value;
}

/* ---- choices ---- */

/* One rank's tokens; places from `tokens` on have none. */
typedef struct {
    int tokens;
    int *expert;       /* (T,k) -1: no token */
    acc_t *weight;     /* (T,k) */
    double *tokens_of; /* (ranks) */
    double most;       /* of tokens_of */
    double entries;    /* of all ranks */
    double room;       /* the most entries that a rank has for another, or for itself */
} Batch;

/* How popular an expert is: the logarithm of its weight. */
static inline double popularity(const char *skew, int e, int E) {
    if (strcmp(skew, "one") == 0 && e == 0) {
        return INFINITY;
    }
    if (strcmp(skew, "empty") == 0 && e >= E - E / comm_ranks(GROUP_WORLD)) {
        return -INFINITY;
    }
    return strncmp(skew, "zipf:", 5) == 0 ? -atof(skew + 5) * log(e + 1.0) : 0;
}

static inline void check_skew(const char *skew, const Shape *s) {
    char *end = NULL;
    bool zipf = strncmp(skew, "zipf:", 5) == 0 && strtod(skew + 5, &end) >= 0 && end > skew + 5 && !*end;
    CHECK(zipf || strcmp(skew, "none") == 0 || strcmp(skew, "one") == 0 || strcmp(skew, "empty") == 0,
          "--skew %s: choose none, zipf:S with S >= 0, one or empty", skew);
    int left = s->E - s->E / comm_ranks(GROUP_WORLD);
    CHECK(strcmp(skew, "empty") != 0 || s->k <= left,
          "--skew empty: %d of %d experts are left for the %d choices of a token: take more ranks or a smaller k", left,
          s->E, s->k);
}

/* k different experts for a token: those with the largest popularity + Gumbel noise, which is to draw them one by one,
 * each as likely as it is popular (Kool et al. 2019). liking (E) is scratch. */
static inline void choose(int *expert, double *liking, const Shape *s, const char *skew, uint64_t key, int token) {
    for (int e = 0; e < s->E; e++) {
        double u = 1 - random_uniform(key, (uint64_t)token * s->E + e);
        liking[e] = popularity(skew, e, s->E) - log(-log(u));
    }
    for (int j = 0; j < s->k; j++) {
        int best = 0;
        for (int e = 1; e < s->E; e++) {
            best = liking[e] > liking[best] ? e : best;
        }
        expert[j] = best;
        liking[best] = -INFINITY;
    }
}

/* What follows from the choices of all ranks: tokens_of, most, entries, room. */
static inline void count_entries(Batch *b, const Shape *s) {
    int ranks = comm_ranks(GROUP_WORLD), me = comm_rank(GROUP_WORLD);
    double *between = calloc((size_t)ranks * ranks, sizeof *between);
    b->tokens_of = calloc(ranks, sizeof *b->tokens_of);
    CHECK(between && b->tokens_of, "out of memory for the counts of %d ranks", ranks);
    b->tokens_of[me] = b->tokens;
    for (int i = 0; i < b->tokens * s->k; i++) {
        between[me * ranks + b->expert[i] / (s->E / ranks)]++;
    }
    comm_sum_host(b->tokens_of, ranks);
    comm_sum_host(between, (size_t)ranks * ranks);
    for (int r = 0; r < ranks; r++) {
        b->most = fmax(b->most, b->tokens_of[r]);
        b->entries += b->tokens_of[r] * s->k;
    }
    for (int i = 0; i < ranks * ranks; i++) {
        b->room = fmax(b->room, between[i]);
    }
    free(between);
}

static inline void draw_batch(Batch *b, const Shape *s, const Options *o) {
    uint64_t stream = 4 * (uint64_t)comm_rank(GROUP_WORLD), seed = s->seed;
    uint64_t count_key = random_key(seed, RANDOM_TEST, stream), expert_key = random_key(seed, RANDOM_TEST, stream + 1);
    uint64_t weight_key = random_key(seed, RANDOM_TEST, stream + 2);
    size_t entries = (size_t)s->T * s->k;
    double *liking = malloc(s->E * sizeof *liking);
    *b = (Batch){.tokens = o->full_tokens || s->T == 1 ? s->T : 1 + (int)random_below(count_key, 0, s->T - 1),
                 .expert = malloc(entries * sizeof(int)),
                 .weight = calloc(entries, sizeof(acc_t))};
    CHECK(liking && b->expert && b->weight, "out of memory for %zu choices", entries);
    for (int n = 0; n < b->tokens; n++) {
        choose(b->expert + (size_t)n * s->k, liking, s, o->skew, expert_key, n);
    }
    for (size_t i = 0; i < entries; i++) {
        bool there = i < (size_t)b->tokens * s->k;
        b->expert[i] = there ? b->expert[i] : -1;
        b->weight[i] = there ? random_uniform(weight_key, i) : 0;
    }
    free(liking);
    count_entries(b, s);
}

static inline void free_batch(Batch *b) {
    free(b->expert);
    free(b->weight);
    free(b->tokens_of);
}

#endif
