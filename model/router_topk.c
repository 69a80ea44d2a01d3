/* topk: every token goes to its K most probable experts.
 *
 *     p = softmax(W x)       S = the K largest       y = sum_S w_j Expert_j(x)
 *     w_j = p_j / sum_S p (--renorm 1)       w_j = p_j (--renorm 0)
 *
 * Renormalised: Mixtral (arXiv 2401.04088), Qwen3-MoE; it equals a softmax over the K chosen logits alone. Not
 * renormalised: OLMoE (arXiv 2409.02060). The gradients stand in kernels/topk.h, the
 * calls that make them in softmax_gate.c. Causal without a capacity.
 */
#include "../kernels/check.h"
#include "../kernels/gate.h"
#include "../kernels/topk.h"
#include "softmax_gate.h"

static void check(const Config *config) {
    CHECK(config->model.top_k > 1 || config->model.renorm != 1,
          "--router %s --top-k 1 with --renorm 1: renormalised over one expert the weight is always 1, so the router "
          "would get no gradient from the loss and never learn; take --renorm 0 or --top-k 2",
          config->model.router);
}

static void forward(RouterPass *p, Plan *plan, Stream *stream) {
    gate_forward(p->logits, p->x, p->param[SOFTMAX_GATE].w, p->N, p->C, p->E, stream);
    topk_forward(p->probs, p->lse, plan->expert, plan->weight, p->logits, p->N, p->E, p->K, p->renorm, stream);
}

const Router router_topk = {
    .name = "topk",
    .summary = "its K most probable experts, weights renormalised (`--renorm 1`) or not (`0`)",
    .paper = "Mixtral 2401.04088, OLMoE 2409.02060",
    .plan = PLAN_TOKENS_CHOOSE,
    .learned = true,
    .renorm_default = 1,
    .aux_default = 0.01,
    .z_default = 0.001,
    .has_balance_loss = true,
    .has_z_loss = true,
    .check = check,
    .tensors = softmax_gate_tensors,
    .forward = forward,
    .balance = softmax_gate_balance,
    .backward = softmax_gate_backward,
};
