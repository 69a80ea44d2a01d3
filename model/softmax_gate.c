/* Kernel calls in order; the mathematics is in kernels/topk.h and balance_loss.h. Called through the tables of topk,
 * coe, soft-token, expert-choice, threshold and forced. */
#include "softmax_gate.h"

#include "../kernels/gate.h"
#include "../kernels/topk.h"

void softmax_gate_tensors(TensorList *tensors, const ModelConfig *model, int layer, const char *prefix) {
    tensors_add(tensors, TENSOR_ROUTER, layer, 0.02, model->experts, model->dim, 0, "%s.w", prefix);
}

void softmax_gate_scores(RouterPass *p, Stream *stream) {
    gate_forward(p->logits, p->x, p->param[SOFTMAX_GATE].w, p->N, p->C, p->E, stream);
    softmax_forward(p->probs, p->lse, p->logits, p->N, p->E, stream);
}

void softmax_gate_balance(RouterPass *p, const Plan *plan, Stream *stream) {
    balance_forward(p->load, p->mean_prob, p->probs, p->lse, p->demand, p->N, p->E, p->K * p->context->ranks, stream);
}

void softmax_gate_backward(RouterPass *p, real_t *dx, const acc_t *dweight, const Plan *plan, Stream *stream) {
    const RouterParam *gate = &p->param[SOFTMAX_GATE];
    topk_backward(p->dlogits, dweight, p->probs, plan->expert, plan->weight, p->N, p->E, plan->K, p->renorm, stream);
    gradient_measure(p->load, p->dlogits, (size_t)p->N * p->E, stream);
    balance_backward(p->dlogits, p->load, p->probs, p->lse, p->demand, p->N, p->E, p->K * p->context->ranks,
                     p->aux_scale, p->z_scale, stream);
    gate_backward(dx, gate->dw, p->dlogits, p->x, gate->w, p->N, p->C, p->E, stream);
}
