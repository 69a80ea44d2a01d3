/* What a grid's point is and what its line says; used by bench_grid.c alone.
 *
 * What a line says (times in milliseconds, each an object as in bench_times.h):
 *
 *   times_ms   route (gate and top-k), permute (plan: places and, in a layer, the load's statistics), dispatch,
 *              experts, combine: call by call with a lap after each stage; forward and forward_backward: the whole, on
 *              a GPU replayed as one recording. "stage_sum" over "forward" says how far the two ways agree.
 *   stages     of each: "ms" (median), "share" of the sum of the medians, "flops", "bytes" and "ai" = flops / bytes.
 *              FLOPs count a multiplication and its addition as two, and rows that hold a token alone; bytes are the
 *              arrays that the stage's kernels read and write, each once: what goes past the caches if nothing stays
 *              in them. ms, flops, bytes and ai of the line itself are those of the whole forward.
 *   gemm       TFLOP/s of the experts' products by the time of that stage alone; "share" of the data sheet's peak
 *   bw         GB/s of dispatch + combine: legacy 2K*C*b*N / t, strict (2+2K)*C*b*N / t, moved: bytes as counted
 *              above; null where dispatch writes no rows (the experts of a GPU fetch them by index) or the plan is soft
 *   waste      computed rows / rows that hold a token; padding: share of the computed rows that hold none
 *   drop       share of the choices without a row; token_drop: share of the tokens without any
 *   load_cv, max_vio   of the choices over the experts (model/balance.h)
 *   memory_mib of the arena, by category
 *   skipped    in place of all this: how much memory the point lacks
 *
 * The pack grid has no experts: its dispatch writes rows out on every device, and its forward_backward is the moves
 * alone, there and back (bench_moves.h). Its bandwidth is that of dispatch and combine queued together, "moves".
 */
#ifndef EXPERIMENTS_BENCH_GRID_LINE_H
#define EXPERIMENTS_BENCH_GRID_LINE_H

#include "bench_grid.h"
#include "bench_moe.h"
#include "bench_times.h"

enum { MOST = 3, VARIANTS = 4, NAME = 32 };

typedef struct {
    const char *name, *scale;
    int sequences[MOST][2]; /* batch, length */
    int dims[MOST], experts[MOST], top_k[MOST];
    int expert_dim; /* 0: four times the dim */
    const char *act, *routers, *layouts;
    double seconds; /* of a point */
} Grid;

typedef struct {
    const Grid *grid;
    const GridOptions *options;
    const char *device;
    int number, measured; /* the point's, from 1; points so far that were wanted */
    int batch, seq, dim, expert_dim, experts, top_k;
    char router[NAME], layout[NAME];
    double capacity_factor;
} Point;

enum { ROUTE, PERMUTE, DISPATCH, EXPERTS, COMBINE, EXCHANGE, OTHER, PARTS };

typedef struct {
    Times stages[STAGE_COUNT];
    Times forward, both, moves; /* moves: dispatch and combine queued together, the pack grid alone */
    double flops[PARTS], bytes[PARTS];
    MoeBenchLoad load;
    const Arena *arena;
} Result;

const Times *part_times(const Result *result, int part);
void free_result(Result *result);

/* Seconds that the point may take. */
double point_seconds(const Point *point);

/* The lines: the point alone, with the bytes that it lacks, with its result. move_ms: of dispatch and combine, 0 where
 * there is no bandwidth to speak of. */
void print_dry(const Point *point);
void print_skipped(const Point *point, size_t bytes);
void print_result(const Point *point, const Result *result, double move_ms);

#endif
