/* coe: Chain-of-Experts. Not a way to choose but a way to apply: the layer runs --chain-steps times (2 here) over its
 * own output, with the same experts and another router each time, so that experts can pass work on to each other.
 *
 * The chain is chain.c and goes with any sparse router; this table is topk with two steps as its default.
 * Wang et al. 2025 (arXiv 2506.18945). Causal, as its router.
 */
#include "../kernels/check.h"
#include "softmax_gate.h"

extern const Router router_topk;

static void check(const Config *config) {
    CHECK(config->model.chain_steps > 1,
          "--router coe --chain-steps 1 is a plain layer: take --router topk, or --chain-steps 2");
    router_topk.check(config);
}

static void forward(RouterPass *p, Plan *plan, Stream *stream) {
    router_topk.forward(p, plan, stream);
}

const Router router_coe = {
    .name = "coe",
    .summary = "its K most probable experts, then again with another router: topk with `--chain-steps 2`",
    .paper = "Chain-of-Experts 2506.18945",
    .plan = PLAN_TOKENS_CHOOSE,
    .learned = true,
    .renorm_default = 1,
    .chain_default = 2,
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
