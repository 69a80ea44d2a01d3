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
#include "../kernels/topk.h"
#include "softmax_gate.h"

static void check(const Config *config) {
    CHECK(config->model.capacity_factor == 0,
          "--router expert-choice fills every expert exactly: drop --capacity-factor, --top-k sets the share");
    CHECK(config->model.renorm == 0, "--router expert-choice weighs by the probability alone: drop --renorm 1");
}

static void forward(RouterPass *p, Plan *plan, Stream *stream) {
    softmax_gate_scores(p, stream);
    expert_choice_forward(plan->expert, NULL, p->probs, p->N, p->E, plan->capacity, stream);
    choice_weight(plan->weight, plan->expert, p->probs, p->N, p->E, plan->K, 0, stream);
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
    .tensors = softmax_gate_tensors,
    .forward = forward,
    .balance = softmax_gate_balance,
    .backward = softmax_gate_backward,
};
