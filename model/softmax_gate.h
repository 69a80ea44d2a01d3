/* What routers with a softmax over the experts have in common, whoever chooses: the matrix, its losses, its gradient.
 *
 *     p = softmax(W x)       w_j = p_j, or p_j / sum_S p with pass->renorm
 *
 * Such a router's first parameter is W (E,C), it fills pass->logits, probs and lse, and its weights are those of
 * kernels/topk.h. router_top1.c spells the same out; read it first.
 */
#ifndef MODEL_SOFTMAX_GATE_H
#define MODEL_SOFTMAX_GATE_H

#include "router.h"

enum { SOFTMAX_GATE = 0 }; /* index of W among the parameters */

/* Functions for a router's table, see router.h. */
void softmax_gate_tensors(TensorList *tensors, const ModelConfig *model, int layer, const char *prefix);
void softmax_gate_balance(RouterPass *pass, const Plan *plan, Stream *stream);
void softmax_gate_backward(RouterPass *pass, real_t *dx, const acc_t *dweight, const Plan *plan, Stream *stream);

/* pass->logits, probs and lse, for a router that goes on to choose by itself. */
void softmax_gate_scores(RouterPass *pass, Stream *stream);

#endif
