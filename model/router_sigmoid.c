/* sigmoid: scores that do not compete, and a bias per expert that balances the choice without a loss.
 *
 *     s = sigmoid(W x)       S = the K largest of s + b       w_j = rho s_j / sum_S s (--renorm 1) or rho s_j (0)
 *     after each step:  b_e += --bias-rate * sign(mean count - count_e)
 *
 * The bias only selects: it has no gradient, and no weight contains it. It moves after the step, by what the whole step
 * counted, so the choice of a batch never depends on that batch; it is part of the checkpoint. --router-groups and
 * --router-kept-groups limit a token to the experts of its best groups. A small balance loss per sequence keeps single
 * texts from crowding (coefficient --aux-coef). Causal.
 * DeepSeek-V3 (arXiv 2412.19437); the bias: Wang et al. 2024 (arXiv 2408.15664). Equations: kernels/sigmoid_topk.h.
 */
#include <stdlib.h>

#include "../kernels/check.h"
#include "../kernels/gate.h"
#include "../kernels/sigmoid_topk.h"
#include "router.h"

enum { GATE, BIAS };

typedef struct {
    acc_t *scores; /* (N,E) */
} Own;

static void check(const Config *config) {
    const ModelConfig *model = &config->model;
    int groups = model->router_groups, kept = model->router_kept_groups;
    CHECK(
        model->top_k > 1 || model->renorm != 1,
        "--router sigmoid --top-k 1 with --renorm 1: the weight is always 1, so the router would get no gradient from "
        "the loss; take --renorm 0 or --top-k 2");
    CHECK(model->experts % groups == 0, "--router-groups %d does not divide --experts %d: change one of them", groups,
          model->experts);
    CHECK(kept <= groups, "--router-kept-groups %d is above --router-groups %d: lower it", kept, groups);
    CHECK(model->top_k <= kept * (model->experts / groups),
          "--top-k %d needs more experts than the %d of --router-kept-groups %d: raise it", model->top_k,
          kept * (model->experts / groups), kept);
}

static void tensors(TensorList *list, const ModelConfig *model, int layer, const char *prefix) {
    tensors_add(list, TENSOR_ROUTER, layer, 0.02, model->experts, model->dim, 0, "%s.w", prefix);
    tensors_add(list, TENSOR_STATE, layer, 0, model->experts, 0, 0, "%s.bias", prefix);
}

static void reserve(RouterPass *p, Arena *arena) {
    Own *own = p->own = calloc(1, sizeof(Own));
    CHECK(own, "out of memory for a router");
    arena_reserve(arena, (void **)&own->scores, (size_t)p->N * p->E * sizeof(acc_t), MEMORY_ACTIVATIONS);
}

static SigmoidShape shape_of(const RouterPass *p) {
    const ModelConfig *model = &p->config->model;
    return (SigmoidShape){.N = p->N,
                          .E = p->E,
                          .K = p->K,
                          .T = p->context->T,
                          .groups = model->router_groups,
                          .kept = model->router_kept_groups,
                          .renorm = p->renorm,
                          .scale = model->router_scale};
}

static void forward(RouterPass *p, Plan *plan, Stream *stream) {
    Own *own = p->own;
    gate_forward(p->logits, p->x, p->param[GATE].w, p->N, p->C, p->E, stream);
    sigmoid_topk_forward(own->scores, p->probs, plan->expert, plan->weight, p->logits, p->param[BIAS].w, shape_of(p),
                         stream);
}

static void balance(RouterPass *p, const Plan *plan, Stream *stream) {
    sequence_balance_forward(p->load, p->probs, plan->expert, shape_of(p), stream);
}

static void backward(RouterPass *p, real_t *dx, const acc_t *dweight, const Plan *plan, Stream *stream) {
    Own *own = p->own;
    sigmoid_topk_backward(p->dlogits, dweight, own->scores, plan->expert, plan->weight, shape_of(p), stream);
    gradient_measure(p->load, p->dlogits, (size_t)p->N * p->E, stream);
    sequence_balance_backward(p->dlogits, p->load, own->scores, p->probs, plan->expert, p->aux_scale, shape_of(p),
                              stream);
    gate_backward(dx, p->param[GATE].dw, p->dlogits, p->x, p->param[GATE].w, p->N, p->C, p->E, stream);
}

static void update(RouterPass *p, const int *counts, size_t stride, const AdamState *adam, Stream *stream) {
    selection_bias_update(p->param[BIAS].w, counts, p->context->slices, stride, p->E, p->config->train.bias_rate, adam,
                          stream);
}

const Router router_sigmoid = {
    .name = "sigmoid",
    .summary = "the K largest sigmoid scores plus a bias that balances without a loss",
    .paper = "DeepSeek-V3 2412.19437, 2408.15664",
    .plan = PLAN_TOKENS_CHOOSE,
    .learned = true,
    .renorm_default = 1,
    .aux_default = 1e-4,
    .has_balance_loss = true,
    .check = check,
    .tensors = tensors,
    .reserve = reserve,
    .forward = forward,
    .balance = balance,
    .backward = backward,
    .update = update,
};
