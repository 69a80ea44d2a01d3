/* position: where a token stands decides, whatever it is.
 *
 *     S = {(t K + j) mod E}       w_j = 1/K
 *
 * The weakest control: perfect balance without any knowledge of the token. It has been published under the name of
 * hashing; router_hash.c looks at the token and is another thing. Causal.
 */
#include "../kernels/check.h"
#include "../kernels/fixed_choice.h"
#include "router.h"

static void check(const Config *config) {
    CHECK(config->model.renorm == 1, "--router position has equal weights that sum to 1: drop --renorm 0");
}

static void forward(RouterPass *p, Plan *plan, Stream *stream) {
    position_choice(plan->expert, p->context->start, p->N, p->context->T, p->E, p->K, stream);
    equal_weight(plan->weight, p->N, p->K, stream);
    choice_probs(p->probs, plan->expert, plan->weight, p->N, p->E, p->K, stream);
}

const Router router_position = {
    .name = "position",
    .summary = "experts by the position in the sequence, equal weights: a control",
    .paper = "",
    .plan = PLAN_TOKENS_CHOOSE,
    .renorm_default = 1,
    .check = check,
    .forward = forward,
};
