/* Between the device and a checkpoint: everything training needs to go on with the same bits. */
#ifndef MODEL_RESUME_H
#define MODEL_RESUME_H

#include <stdbool.h>
#include <stdint.h>

#include "config.h"
#include "optimizer.h"
#include "transformer.h"

/* How far a run has come. */
typedef struct {
    int64_t step;    /* optimizer steps done, skipped ones included */
    int64_t tokens;  /* trained on */
    int64_t skipped; /* steps skipped because something was not finite */
    double seconds;  /* of steps alone: no evaluation, no saving */
} Progress;

/* Collective. Saves model, optimizer and progress of all ranks to RUN/checkpoint, which any number of them can load.
 * False with one line in error when it could not: the checkpoint
 * before stays. */
bool training_save(const Config *config, const Transformer *model, const Optimizer *optimizer, const Progress *progress,
                   char *error, size_t error_size);

/* Takes up the run in --resume; ends the program with one line when it cannot, or when the run is past --steps. */
Progress training_load(const Config *config, Transformer *model, Optimizer *optimizer);

#endif
