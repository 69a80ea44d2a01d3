/* The whole model on the host of the first rank, where ranks hold the experts between them: what checkpoints and
 * exports are written from, so that they do not depend on how many ranks there were. With one rank it is a copy.
 */
#ifndef MODEL_WHOLE_H
#define MODEL_WHOLE_H

#include "transformer.h"

/* The tensors of the whole model, for tensors_free. */
TensorList whole_tensors(const ModelConfig *config);

/* Collective: host (whole->total, rank 0 alone reads it) = the values that stand in `device` (model->tensors.total) of
 * all ranks. */
void whole_gather(const Transformer *model, const TensorList *whole, acc_t *host, const acc_t *device);

#endif
