/* --dump-routing: records which experts every token of every training step went to, in a trace (trace.h). */
#ifndef MODEL_RECORDER_H
#define MODEL_RECORDER_H

#include "config.h"
#include "trace.h"
#include "transformer.h"

/* Opens the trace where it is asked for: a new one, or with --resume the one that was written up to `step`. */
void recorder_open(Trace *trace, const Config *config, const Transformer *model, int64_t step);

/* Appends the choices of the forward just done; nothing to do for a trace that is not open. */
void recorder_add(Trace *trace, const Transformer *model);

#endif
