/* What a run does not train: the states of routers, which move by themselves; what --freeze names; and with --perft or
 * --lora everything but the adapters. A frozen tensor keeps its bits. The gradients of frozen matrices outside routers
 * are not computed; those of norms and routers come with what their inputs need and are thrown away.
 */
#ifndef MODEL_FREEZE_H
#define MODEL_FREEZE_H

#include "config.h"
#include "tensors.h"

/* Marks the list's frozen tensors. */
void freeze_tensors(TensorList *tensors, const Config *config);

/* Whether the routers of the MoE layers stay as they are, states included. */
bool freeze_holds_routers(const Config *config);

/* Whether the tensor's gradient is wanted: NULL is given for it elsewhere. */
bool freeze_wants_gradient(const Tensor *tensor);

/* Elements of all parameters that are trained, all parts counted. */
size_t freeze_trainable(const TensorList *tensors);

#endif
