/* top1: every token goes to its most probable expert, weighted with that probability.
 *
 *     p = softmax(W x)       e* = argmax p (ties to the lower expert)       y = p_e* Expert_e*(x)
 *     dl_i = p_i (1[i = e*] - p_e*) g,   g = dL/dw = <dy, Expert_e*(x)>
 *
 * The weight is the probability itself, not 1: it is the only way by which the loss reaches W. Causal.
 * Switch Transformer, Fedus, Zoph, Shazeer 2021 (arXiv 2101.03961). Read next: router_topk.c, then moe.c.
 */
#include "../kernels/check.h"
#include "../kernels/gate.h"
#include "../kernels/topk.h"
#include "router.h"

enum { GATE };

static void check(const Config *config) {
    CHECK(config->model.renorm != 1,
          "--router top1 with --renorm 1: renormalised over one expert the weight is always 1, so the router would get "
          "no gradient from the loss and never learn; leave --renorm at 0");
}

static void tensors(TensorList *list, const ModelConfig *model, int layer, const char *prefix) {
    tensors_add(list, TENSOR_ROUTER, layer, 0.02, model->experts, model->dim, 0, "%s.w", prefix);
}

static void forward(RouterPass *p, Plan *plan, Stream *stream) {
    gate_forward(p->logits, p->x, p->param[GATE].w, p->N, p->C, p->E, stream);
    topk_forward(p->probs, p->lse, plan->expert, plan->weight, p->logits, p->N, p->E, 1, 0, stream);
}

static void balance(RouterPass *p, const Plan *plan, Stream *stream) {
    balance_forward(p->load, p->mean_prob, p->probs, p->lse, p->demand, p->N, p->E, p->context->ranks, stream);
}

static void backward(RouterPass *p, real_t *dx, const acc_t *dweight, const Plan *plan, Stream *stream) {
    topk_backward(p->dlogits, dweight, p->probs, plan->expert, plan->weight, p->N, p->E, 1, 0, stream);
    gradient_measure(p->load, p->dlogits, (size_t)p->N * p->E, stream);
    balance_backward(p->dlogits, p->load, p->probs, p->lse, p->demand, p->N, p->E, p->context->ranks, p->aux_scale,
                     p->z_scale, stream);
    gate_backward(dx, p->param[GATE].dw, p->dlogits, p->x, p->param[GATE].w, p->N, p->C, p->E, stream);
}

const Router router_top1 = {
    .name = "top1",
    .summary = "its most probable expert, weighted with the probability",
    .paper = "Switch, arXiv 2101.03961",
    .plan = PLAN_TOKENS_CHOOSE,
    .learned = true,
    .fixed_top_k = 1,
    .aux_default = 0.01,
    .z_default = 0.001,
    .has_balance_loss = true,
    .has_z_loss = true,
    .check = check,
    .tensors = tensors,
    .forward = forward,
    .balance = balance,
    .backward = backward,
};
