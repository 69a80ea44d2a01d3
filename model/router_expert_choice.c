/* expert-choice: every expert picks the tokens that want it most, as many as its share.
 *
 *     p = softmax(W x) over the experts       expert e takes the N K / E tokens of largest p_e       w = p
 *
 * Loads are equal by construction, so nothing has to be balanced and nothing is dropped; a token gets 0 to E experts.
 * But whether it is picked depends on all others: later tokens of its text, and other texts. A language model trained
 * with it reads the future (and cannot generate as it was trained), so it needs --allow-leak there; with
 * --objective mlm it is as valid as any. Read next: router_threshold.c, its causal form.
 * Zhou et al. 2022 (arXiv 2202.09368). Kernel: expert_choice.h.
 */
#include "../kernels/check.h"
#include "../kernels/expert_choice.h"
#include "../kernels/gate.h"
#include "../kernels/topk.h"
#include "router.h"

enum { GATE };

static void check(const Config *config) {
    CHECK(config->model.capacity_factor == 0,
          "--router expert-choice fills every expert exactly: drop --capacity-factor, --top-k sets the share");
    CHECK(config->model.renorm == 0, "--router expert-choice weighs by the probability alone: drop --renorm 1");
}

static void tensors(TensorList *list, const ModelConfig *model, int layer, const char *prefix) {
    tensors_add(list, TENSOR_ROUTER, layer, 0.02, model->experts, model->dim, 0, "%s.w", prefix);
}

static void forward(RouterPass *p, Plan *plan, Stream *stream) {
    gate_forward(p->logits, p->x, p->param[GATE].w, p->N, p->C, p->E, stream);
    softmax_forward(p->probs, p->lse, p->logits, p->N, p->E, stream);
    expert_choice_forward(plan->expert, NULL, p->probs, p->N, p->E, plan->capacity, stream);
    choice_weight(plan->weight, plan->expert, p->probs, p->N, p->E, plan->K, 0, stream);
}

static void balance(RouterPass *p, const Plan *plan, Stream *stream) {
    balance_forward(p->load, p->mean_prob, p->probs, p->lse, plan->demand, p->N, p->E, p->K, stream);
}

static void backward(RouterPass *p, real_t *dx, const acc_t *dweight, const Plan *plan, Stream *stream) {
    topk_backward(p->dlogits, dweight, p->probs, plan->expert, plan->weight, p->N, p->E, plan->K, 0, stream);
    gradient_measure(p->load, p->dlogits, (size_t)p->N * p->E, stream);
    balance_backward(p->dlogits, p->load, p->probs, p->lse, plan->demand, p->N, p->E, p->K, p->aux_scale, p->z_scale,
                     stream);
    gate_backward(dx, p->param[GATE].dw, p->dlogits, p->x, p->param[GATE].w, p->N, p->C, p->E, stream);
}

const Router router_expert_choice = {
    .name = "expert-choice",
    .summary = "the experts that pick it; each picks its N K / E likeliest tokens",
    .paper = "Zhou et al. 2202.09368",
    .plan = PLAN_EXPERTS_CHOOSE,
    .sees_future = true,
    .sees_batch = true,
    .exact_share = true,
    .learned = true,
    .z_default = 0.001,
    .has_z_loss = true,
    .check = check,
    .tensors = tensors,
    .forward = forward,
    .balance = balance,
    .backward = backward,
};
