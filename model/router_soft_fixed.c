/* uniform-uniform and soft-identity: the controls of Soft MoE that learn nothing about where tokens go.
 *
 *   uniform-uniform   every slot reads the mean of its sequence, every token the mean of the slots: experts cannot tell
 *                     tokens apart, so the layer is a constant of the sequence
 *   soft-identity     token i is slot i, of expert i / S: every expert has some positions of its own
 *
 * What soft gains on them is what its mixtures are worth. Soft MoE, Puigcerver et al. 2023 (arXiv 2308.00951), has both
 * in its ablation. The ones that learn one mixture are in router_soft.c. Kernel: soft_mix.h.
 */
#include <string.h>

#include "../kernels/check.h"
#include "../kernels/soft_mix.h"
#include "router.h"

static void check(const Config *config) {
    const ModelConfig *model = &config->model;
    router_find("soft")->check(config);
    CHECK(strcmp(model->router, "soft-identity") != 0 || model->experts * model->slots >= model->seq,
          "--slots %d with --router soft-identity: %d experts have %d slots for the %d tokens of a sequence; raise it",
          model->slots, model->experts, model->experts * model->slots, model->seq);
}

static void fill(RouterPass *p, Plan *plan, Mixture mixture, Stream *stream) {
    soft_fix_mix(plan, mixture, stream);
    soft_fix_weight(plan, mixture, stream);
    soft_expert_share(p->probs, plan, stream);
}

static void uniform_forward(RouterPass *p, Plan *plan, Stream *stream) {
    fill(p, plan, MIXTURE_UNIFORM, stream);
}

static void identity_forward(RouterPass *p, Plan *plan, Stream *stream) {
    fill(p, plan, MIXTURE_IDENTITY, stream);
}

const Router router_uniform_uniform = {
    .name = "uniform-uniform",
    .summary = "slots read all tokens alike, tokens all slots: a control",
    .paper = "Soft MoE 2308.00951, ablation",
    .plan = PLAN_SOFT,
    .sees_future = true,
    .renorm_default = 1,
    .check = check,
    .forward = uniform_forward,
};

const Router router_soft_identity = {
    .name = "soft-identity",
    .summary = "token i of a sequence is slot i, experts by position: a control",
    .paper = "Soft MoE 2308.00951, ablation",
    .plan = PLAN_SOFT,
    .fixed_top_k = 1,
    .renorm_default = 1,
    .check = check,
    .forward = identity_forward,
};
