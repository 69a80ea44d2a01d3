/* Checkpoints: everything a run needs to go on bit for bit, in RUN/checkpoint/.
 *
 *     model.safetensors       every tensor of the list under its name
 *     optimizer.safetensors   the two AdamW moments: "m.<name>", "v.<name>"
 *     state.json              step, counters, the configuration
 *     manifest.json           size and CRC-32C of the three; written last: a directory without it, or one that
 *                             contradicts it, is not a checkpoint
 *
 * A save writes RUN/checkpoint.tmp, syncs it, and puts it in place with renames, the old checkpoint standing aside as
 * RUN/checkpoint.old; that goes only after the new one stands. At every moment, power loss included, RUN holds the old
 * checkpoint or the new one whole.
 */
#ifndef MODEL_CHECKPOINT_H
#define MODEL_CHECKPOINT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tensors.h"

typedef struct {
    const TensorList *tensors;
    acc_t *weights, *m, *v; /* host buffers of tensors->total elements, the caller's */
    int64_t step;           /* optimizer steps done, skipped ones included */
    int64_t adam_step;      /* updates applied: the power in the bias correction */
    int64_t skipped;        /* steps skipped for a non-finite gradient, in all */
    int64_t skipped_in_row; /* the last ones of them, without an update since */
    int64_t tokens;         /* trained so far */
    double train_seconds;
} CheckpointState;

/* Saves; false (and one line in error: what failed and what to do, e.g. the disk is full and how much is needed) when
 * it could not, in which case the previous checkpoint is untouched and the temporary directory is gone. RUN must exist.
 */
bool checkpoint_save(const char *run, const CheckpointState *state, const char *config_json, char *error,
                     size_t error_size);

/* Reads RUN/checkpoint/ into *state (the caller's buffers, gaps set to zero) after checking manifest, sizes, checksums,
 * names, shapes and types against state->tensors. Falls back to the checkpoint that an interrupted save left behind,
 * saying so on stderr. Ends the program with one line when there is none, or when it is truncated, altered or of
 * another model. */
void checkpoint_load(const char *run, CheckpointState *state);

/* The same for the weights alone (tensors->total values), to start another run from them. */
void checkpoint_load_weights(const char *run, const TensorList *tensors, acc_t *weights);

/* Whether RUN holds a complete checkpoint: every file there with its size; checkpoint_load checks the contents. */
bool checkpoint_exists(const char *run);

#endif
