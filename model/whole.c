/* See whole.h. Called by resume.c, export.c and import.c. */
#include "whole.h"

#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"
#include "../kernels/comm.h"

TensorList whole_tensors(const ModelConfig *config) {
    TensorList whole = {0};
    transformer_tensors(&whole, config);
    return whole;
}

void whole_gather(const Transformer *model, const TensorList *whole, acc_t *host, const acc_t *device) {
    const TensorList *list = &model->tensors;
    int rank = comm_rank(GROUP_WORLD);
    acc_t *mine = malloc(list->total * sizeof(acc_t));
    CHECK(mine, "out of memory for a copy of %zu parameters", list->total);
    host_from_device(mine, device, list->total * sizeof(acc_t), NULL);
    for (int t = 0; t < list->count; t++) {
        const Tensor *part = &list->items[t];
        for (int r = 0; r < part->parts; r++) { /* the first group of ranks has every part */
            if (rank == 0 || rank == r) {
                acc_t *to = host + whole->items[t].offset + r * part->count;
                comm_to_first(rank == 0 ? to : NULL, mine + part->offset, part->count * sizeof(acc_t), r);
            }
        }
    }
    free(mine);
}
