/* See batch.h. Called by train.c and answer.c. */
#include "batch.h"

#include <stdlib.h>

#include "../kernels/check.h"

void batch_reserve(BatchBuffers *batch, int N, int slices, Arena *arena) {
    size_t bytes = (size_t)slices * N * sizeof(int);
    batch->N = N;
    batch->host_tokens = calloc(N, sizeof(int));
    batch->host_targets = calloc(N, sizeof(int));
    batch->domain = calloc(N, 1);
    batch->floor = calloc(N, sizeof(double));
    batch->bytes = calloc(N, sizeof(int));
    CHECK(batch->host_tokens && batch->host_targets && batch->domain && batch->floor && batch->bytes,
          "out of memory for a batch of %d tokens", N);
    arena_reserve(arena, (void **)&batch->tokens, bytes, MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&batch->targets, bytes, MEMORY_ACTIVATIONS);
}

void batch_to_device(const BatchBuffers *batch, int slice) {
    size_t first = (size_t)slice * batch->N, bytes = batch->N * sizeof(int);
    device_from_host(batch->tokens + first, batch->host_tokens, bytes, NULL);
    device_from_host(batch->targets + first, batch->host_targets, bytes, NULL);
}

void batch_free(BatchBuffers *batch) {
    free(batch->host_tokens);
    free(batch->host_targets);
    free(batch->domain);
    free(batch->floor);
    free(batch->bytes);
}
