/* Grids of microbenchmarks: MoE layers, or the moves of rows around them, over sizes, routers, layouts and loads. One
 * JSON line per point; bench_layer.c has the options, bench_grid.c the grids and what a line says. */
#ifndef EXPERIMENTS_BENCH_GRID_H
#define EXPERIMENTS_BENCH_GRID_H

#include <stdbool.h>

typedef struct {
    const char *grid;       /* course, large, pack */
    const char *scale;      /* full, small */
    const char *routers;    /* comma-separated; NULL: the grid's own */
    const char *layouts;    /* likewise */
    const char *load;       /* router, uniform, zipf:S */
    const char *points;     /* A-B or A: these alone, counted from 1; NULL: all */
    double capacity_factor; /* of the padded layout; 0: 1 and 1.25 */
    int shared_weights, dry_run;
    int repeats, warm_up, iterations, seed;
    double seconds; /* a point may take; < 0: the grid's own */
    double memory;  /* GiB that a point may take; 0: what is free */
} GridOptions;

/* Runs the grid and prints its lines. Ends the program with one line where the options make no sense. device: its
 * description, NULL with dry_run, where nothing is measured and each line is the point alone. */
void bench_grid(const GridOptions *options, const char *device);

#endif
