/* soft and soft-batch: no choice at all. Every slot of every expert reads a mixture of tokens, every token a mixture of
 * slots.
 *
 *     l = s <x / |x|, phi / |phi|>        rows = softmax over tokens of l, times x      y = softmax over slots of l,
 *                                                                                           times the experts' outputs
 *
 * Everything has a gradient and every expert works equally much; nothing is dropped and nothing has to be balanced.
 *
 * The products of unit vectors in C dimensions are about 1/sqrt(C), so with the paper's first s = 1 both mixtures begin
 * all but uniform, and s grows by a learning rate a step: a short run needs a larger --soft-scale, such as sqrt(C).
 *
 *   soft         tokens mix within their sequence: y depends on later tokens, so a language model with it reads the
 *                answer (--allow-leak). Valid with --objective mlm.
 *   soft-batch   tokens mix with those at the same position of the other sequences (Mixture of Tokens): causal within a
 *                text, but a text's probability depends on the batch it is in. A token that is generated alone mixes
 *                with none.
 *
 *   soft-uniform, uniform-soft   controls for soft that learn one of the two mixtures alone: tokens read all slots
 *                alike, or slots all tokens. Those that learn none are in router_soft_fixed.c.
 *
 * Soft MoE, Puigcerver et al. 2023 (arXiv 2308.00951); Mixture of Tokens, Antoniak et al. 2023 (arXiv 2310.15961).
 * Kernel: soft_mix.h.
 */
#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"
#include "../kernels/soft_mix.h"
#include "router.h"

enum { PHI, SCALE };

typedef struct {
    Mixture mix, weight;
    acc_t *x_inverse;   /* (N) 1 / |x| */
    acc_t *phi_inverse; /* (E*S) */
} Own;

static void check(const Config *config) {
    const ModelConfig *model = &config->model;
    CHECK(model->capacity_factor == 0, "--router %s drops nothing: drop --capacity-factor, --slots sets its rows",
          model->router);
    CHECK(model->layout == LAYOUT_COMPACT, "--router %s has as many rows for each expert: drop --layout",
          model->router);
    CHECK(model->renorm == 1, "--router %s has weights that sum to 1: drop --renorm 0", model->router);
    CHECK(!config->train.dump_routing[0], "--dump-routing with --router %s: every token goes everywhere; drop it",
          model->router);
}

static void tensors(TensorList *list, const ModelConfig *model, int layer, const char *prefix) {
    tensors_add(list, TENSOR_ROUTER, layer, 0.02, model->experts * model->slots, model->dim, 0, "%s.phi", prefix);
    tensors_add(list, TENSOR_ROUTER, layer, -model->soft_scale, 1, 0, 0, "%s.scale", prefix);
}

static void reserve(RouterPass *p, Arena *arena) {
    Own *own = p->own = calloc(1, sizeof(Own));
    size_t slots = (size_t)p->E * p->config->model.slots;
    CHECK(own, "out of memory for a router");
    own->mix = strcmp(p->config->model.router, "uniform-soft") == 0 ? MIXTURE_UNIFORM : MIXTURE_LEARNED;
    own->weight = strcmp(p->config->model.router, "soft-uniform") == 0 ? MIXTURE_UNIFORM : MIXTURE_LEARNED;
    arena_reserve(arena, (void **)&own->x_inverse, p->N * sizeof(acc_t), MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&own->phi_inverse, slots * sizeof(acc_t), MEMORY_ACTIVATIONS);
}

static void forward(RouterPass *p, Plan *plan, Stream *stream) {
    Own *own = p->own;
    soft_route_forward(p->logits, plan, own->x_inverse, own->phi_inverse, p->x, p->param[PHI].w, p->param[SCALE].w,
                       p->C, stream);
    soft_fix_mix(plan, own->mix, stream);
    soft_fix_weight(plan, own->weight, stream);
    soft_expert_share(p->probs, plan, stream);
}

static void backward(RouterPass *p, real_t *dx, const acc_t *dweight, const Plan *plan, Stream *stream) {
    Own *own = p->own;
    soft_logits_backward(p->dlogits, own->weight == MIXTURE_LEARNED ? dweight : NULL,
                         own->mix == MIXTURE_LEARNED ? p->dmix : NULL, plan, stream);
    gradient_measure(p->load, p->dlogits, (size_t)p->N * plan->K, stream);
    soft_route_backward(dx, p->param[PHI].dw, p->param[SCALE].dw, p->dlogits, p->logits, own->x_inverse,
                        own->phi_inverse, p->x, p->param[PHI].w, p->param[SCALE].w, plan, p->C, stream);
}

const Router router_soft = {
    .name = "soft",
    .summary = "all slots, each a mixture of the tokens of its sequence",
    .paper = "Soft MoE 2308.00951",
    .plan = PLAN_SOFT,
    .sees_future = true,
    .learned = true,
    .has_logit_scale = true,
    .renorm_default = 1,
    .check = check,
    .tensors = tensors,
    .reserve = reserve,
    .forward = forward,
    .backward = backward,
};

const Router router_soft_batch = {
    .name = "soft-batch",
    .summary = "all slots, each a mixture of the tokens at its position in the batch",
    .paper = "Mixture of Tokens 2310.15961",
    .plan = PLAN_SOFT,
    .sees_batch = true,
    .across = true,
    .learned = true,
    .has_logit_scale = true,
    .renorm_default = 1,
    .check = check,
    .tensors = tensors,
    .reserve = reserve,
    .forward = forward,
    .backward = backward,
};

const Router router_soft_uniform = {
    .name = "soft-uniform",
    .summary = "as soft, but a token reads all slots alike",
    .paper = "Soft MoE 2308.00951, ablation",
    .plan = PLAN_SOFT,
    .sees_future = true,
    .learned = true,
    .has_logit_scale = true,
    .renorm_default = 1,
    .check = check,
    .tensors = tensors,
    .reserve = reserve,
    .forward = forward,
    .backward = backward,
};

const Router router_uniform_soft = {
    .name = "uniform-soft",
    .summary = "as soft, but a slot reads all tokens alike",
    .paper = "Soft MoE 2308.00951, ablation",
    .plan = PLAN_SOFT,
    .sees_future = true,
    .learned = true,
    .has_logit_scale = true,
    .renorm_default = 1,
    .check = check,
    .tensors = tensors,
    .reserve = reserve,
    .forward = forward,
    .backward = backward,
};
