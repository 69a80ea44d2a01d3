/* soft-token: every token goes to every expert, weighted with the probabilities.
 *
 *     p = softmax(W x)       y = sum_e p_e Expert_e(x)
 *
 * An upper bound of what choosing could reach, at E/K times the work: no choice, so nothing is lost to it. It is
 * Soft MoE (router_soft.c) with groups of one token and one slot per expert, and topk with K = E. Causal.
 */
#include "../kernels/check.h"
#include "softmax_gate.h"

extern const Router router_topk;

static void check(const Config *config) {
    CHECK(config->model.capacity_factor == 0,
          "--router soft-token sends every token to every expert: drop --capacity-factor");
    CHECK(config->model.experts > 1, "--router soft-token with --experts 1 has a weight that is always 1: add experts");
}

static void forward(RouterPass *p, Plan *plan, Stream *stream) {
    router_topk.forward(p, plan, stream);
}

const Router router_soft_token = {
    .name = "soft-token",
    .summary = "all experts, weighted with their probabilities: an upper bound at E/K times the work",
    .paper = "",
    .plan = PLAN_TOKENS_CHOOSE,
    .learned = true,
    .fixed_top_k = ROUTER_ALL_EXPERTS,
    .z_default = 0.001,
    .has_z_loss = true,
    .check = check,
    .tensors = softmax_gate_tensors,
    .forward = forward,
    .balance = softmax_gate_balance,
    .backward = softmax_gate_backward,
};
