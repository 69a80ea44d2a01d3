/* Runs of rows, one for each (rank, expert), copied as a whole. */
#include "regroup.h"

#include <stdbool.h>
#include <string.h>

void regroup_lengths(int *length, const int *offset, int E, Stream *stream) {
    for (int e = 0; e < E; e++) {
        length[e] = offset[e + 1] - offset[e];
    }
}

void regroup_plan(int *demand, int *offset, const int *told, int world, int first_rank, int ranks, int first_expert,
                  int experts, int E, Stream *stream) {
    for (int e = 0; e < E; e++) {
        demand[e] = 0;
        for (int r = 0; r < world; r++) {
            demand[e] += told[(size_t)r * 2 * E + e];
        }
    }
    offset[0] = 0;
    for (int i = 0; i < experts; i++) {
        offset[i + 1] = offset[i];
        for (int r = first_rank; r < first_rank + ranks; r++) {
            offset[i + 1] += told[((size_t)r * 2 + 1) * E + first_expert + i];
        }
    }
}

/* Copies every run between its place by source, in one of the arrays, and its place by expert, in the other. */
static void copy_runs(char *to, const char *from, Regroup g, size_t row_bytes, bool to_experts) {
    size_t by_source = 0;
    for (int s = 0; s < g.ranks; s++) {
        for (int e = 0; e < g.experts; e++) {
            size_t by_expert = g.offset[e], rows = g.rows[(size_t)s * g.stride + e];
            for (int before = 0; before < s; before++) {
                by_expert += g.rows[(size_t)before * g.stride + e];
            }
            memcpy(to + (to_experts ? by_expert : by_source) * row_bytes,
                   from + (to_experts ? by_source : by_expert) * row_bytes, rows * row_bytes);
            by_source += rows;
        }
    }
}

void regroup_by_expert(void *to, const void *from, Regroup regroup, size_t row_bytes, Stream *stream) {
    copy_runs(to, from, regroup, row_bytes, true);
}

void regroup_by_source(void *to, const void *from, Regroup regroup, size_t row_bytes, Stream *stream) {
    copy_runs(to, from, regroup, row_bytes, false);
}
