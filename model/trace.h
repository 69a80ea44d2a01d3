/* A record of which experts every token went to, written by --dump-routing, read by notebooks and by --router forced.
 *
 * The file: 256 little-endian int32 of header, then one record per training step, slice and router in that order:
 *
 *     header    magic 20261121, version 1, N, K, E, routers, slices, first step, zeros
 *     record    N*K uint16: the experts of token n at n*K .. n*K+K-1, 65535 where there is none
 *
 *     np.fromfile(FILE, "<u2", offset=1024).reshape(-1, slices, routers, N, K)
 *
 * N tokens of one slice; K entries per token as in the plan (E where experts choose); routers count chain steps.
 */
#ifndef MODEL_TRACE_H
#define MODEL_TRACE_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

typedef struct {
    int N, K, E, routers, slices;
    int64_t first_step; /* steps done before the first record */
} TraceShape;

typedef struct {
    FILE *file;
    TraceShape shape;
    uint16_t *record; /* (N,K), owned */
    bool failed;      /* a write failed, and stderr was told */
} Trace;

/* Creates FILE (replacing one) and writes the header. Ends the program with one line when it cannot. */
void trace_create(Trace *trace, const char *path, TraceShape shape);

/* Goes on with the trace of a run that is resumed after `step` steps: what FILE holds of later ones is cut off. Without
 * FILE, a trace begins there. Ends the program with one line when FILE is of another shape or ends before `step`. */
void trace_continue(Trace *trace, const char *path, TraceShape shape, int64_t step);

/* Appends one router's choices, expert (N,K) on the host. A failed write (full disk) warns on stderr once and the run
 * goes on without. */
void trace_append(Trace *trace, const int *expert);

/* Opens FILE for trace_read. Ends the program with one line when it is no trace, or one of another shape (the first
 * step is the file's own). */
void trace_open(Trace *trace, const char *path, TraceShape expected);

/* expert (N,K) of a router in a slice of a step; ends the program with one line when the trace does not hold the step,
 * or is damaged: names an expert that does not exist, or one twice for a token. */
void trace_read(Trace *trace, int *expert, int64_t step, int slice, int router);

/* Nothing to do for a trace that is not open. */
void trace_close(Trace *trace);

#endif
