/* A batch on its way from the text to the device: the host's arrays hold one forward, filled by train.c from data/, the
 * device's those of all slices of a step, so that the step finds them there.
 */
#ifndef MODEL_BATCH_H
#define MODEL_BATCH_H

#include "../kernels/device.h"

typedef struct {
    int N;                           /* tokens of one forward */
    int *host_tokens, *host_targets; /* (N) */
    unsigned char *domain;           /* (N) of each target, its floor, its bytes of text: for evaluations */
    double *floor;
    int *bytes;
    int *tokens, *targets; /* (slices,N) device */
} BatchBuffers;

/* Host memory, and device memory that the arena's commit brings. */
void batch_reserve(BatchBuffers *batch, int N, int slices, Arena *arena);

/* Copies tokens and targets to place `slice` on the device. */
void batch_to_device(const BatchBuffers *batch, int slice);

void batch_free(BatchBuffers *batch);

#endif
