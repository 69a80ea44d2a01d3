/* What a MoE layer does around its experts, alone: choose, sort, move rows to the experts and back. Used by
 * bench_layer.c (--dispatch) and bench_grid.c (the pack grid).
 *
 *     route     logits = x W^T (gate), the K largest and their weights (top-k)
 *     permute   plan_build: where each row goes
 *     dispatch  rows[r] = x[entry[r] / K], written out on every device, also where a layer would only hand over indices
 *     combine   y[n] = sum_j weight[n,j] rows[row[n,j]]: with the identity for experts
 *
 * Backward, of the moves alone: drows = dispatch of dy, dx = sum of a token's drows. Logits are about normal(0, 1):
 * x is, and W is normal with 1 / sqrt(C).
 */
#ifndef EXPERIMENTS_BENCH_MOVES_H
#define EXPERIMENTS_BENCH_MOVES_H

#include <stdint.h>

#include "../kernels/device.h"
#include "../kernels/plan.h"

typedef enum { LOAD_OF_ROUTER, LOAD_UNIFORM, LOAD_ZIPF } LoadKind;

typedef struct {
    int N, C, E, K;
    Layout layout;
    double capacity_factor; /* 0: none */
    LoadKind load;
    double zipf;
    int seed;
} MoveShape;

typedef struct {
    MoveShape shape;
    Arena arena;
    Plan plan;
    acc_t *w, *logits, *probs, *lse, *staging;
    real_t *x, *rows, *y;
    uint64_t *key;
} Moves;

/* 0, or the bytes that it would take where they are more than `memory`: then nothing is open. */
size_t moves_open(Moves *m, MoveShape shape, size_t memory);
void moves_close(Moves *m);

/* The stages, one by one; each reads what the ones before it have made. */
void moves_gate(Moves *m);
void moves_choose(Moves *m);
void moves_plan(Moves *m);
void moves_dispatch(Moves *m);
void moves_combine(Moves *m);
void moves_backward(Moves *m);

/* Bytes that dispatch and combine move: what the kernels of this device read and write, indices and weights included.
 * accepted, computed: rows that hold a token, all rows. */
double moves_dispatch_bytes(const Plan *plan, int C, double accepted, double computed);
double moves_combine_bytes(const Plan *plan, int C, double accepted);

/* Bandwidth in GB/s of dispatch + combine in `ms`, in the two conventions that benchmarks print (bench_layer.c). */
double moves_bw_legacy(double N, double C, double K, double number_bytes, double ms);
double moves_bw_strict(double N, double C, double K, double number_bytes, double ms);

#endif
