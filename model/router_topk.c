/* topk: every token goes to its K most probable experts.
 *
 *     p = softmax(W x)       S = the K largest       y = sum_S w_j Expert_j(x)
 *     w_j = p_j / sum_S p (--renorm 1)       w_j = p_j (--renorm 0)
 *
 * Renormalised: Mixtral (arXiv 2401.04088), Qwen3-MoE. Not renormalised: OLMoE (arXiv 2409.02060). The gradients stand
 * in kernels/topk.h. Causal without a capacity.
 */
#include "../kernels/balance_loss.h"
#include "../kernels/check.h"
#include "../kernels/gate.h"
#include "../kernels/topk.h"
#include "router.h"

static void check(const ModelConfig *model) {
    CHECK(model->top_k > 1 || model->renorm != 1,
          "--router topk --top-k 1 with --renorm 1: renormalised over one expert the weight is always 1, so the router "
          "would get no "
          "gradient from the loss and never learn; take --renorm 0 or --top-k 2");
}

static void forward(RouterPass *p, Plan *plan, Stream *stream) {
    gate_forward(p->logits, p->x, p->w, p->N, p->C, p->E, stream);
    topk_forward(p->probs, p->lse, plan->expert, plan->weight, p->logits, p->N, p->E, p->K, p->renorm, stream);
}

static void backward(RouterPass *p, real_t *dx, const acc_t *dweight, const Plan *plan, Stream *stream) {
    topk_backward(p->dlogits, dweight, p->probs, plan->expert, plan->weight, p->N, p->E, p->K, p->renorm, stream);
    balance_measure(p->load, p->dlogits, p->N, p->E, stream);
    balance_backward(p->dlogits, p->probs, p->lse, plan->demand, p->N, p->E, p->K, p->aux_scale, p->z_scale, stream);
    gate_backward(dx, p->dw, p->dlogits, p->x, p->w, p->N, p->C, p->E, stream);
}

const Router router_topk = {
    .name = "topk",
    .summary = "the K most probable experts, weights renormalised or not (Mixtral, Qwen3-MoE, OLMoE)",
    .causal = true,
    .learned = true,
    .renorm_default = 1,
    .check = check,
    .forward = forward,
    .backward = backward,
};
