/* random and random-step: experts by a random projection of the token that is never trained.
 *
 *     S = the K largest of W x       w_j = 1/K       W drawn once (random) or anew in each step (random-step)
 *
 * random shows what sorting tokens by likeness gives without learning to sort them. Its weights are equal, so the loss
 * cannot reach the choice even through x. random-step gives every expert every kind of token: what is left is an
 * ensemble, the lower bound of any routing. Both causal.
 */
#include <stdlib.h>

#include "../kernels/check.h"
#include "../kernels/fixed_choice.h"
#include "../kernels/gate.h"
#include "../kernels/topk.h"
#include "router.h"

enum { GATE };

#define DEVIATION 0.02 /* of W: of no consequence to a choice by size */

static void check(const Config *config) {
    CHECK(config->model.renorm == 1, "--router %s has equal weights that sum to 1: drop --renorm 0",
          config->model.router);
}

static void choose(RouterPass *p, Plan *plan, const acc_t *w, Stream *stream) {
    gate_forward(p->logits, p->x, w, p->N, p->C, p->E, stream);
    topk_forward(p->probs, p->lse, plan->expert, plan->weight, p->logits, p->N, p->E, p->K, 1, stream);
    equal_weight(plan->weight, p->N, p->K, stream);
    choice_probs(p->probs, plan->expert, plan->weight, p->N, p->E, p->K, stream);
}

/* ---- random ---- */

static void tensors(TensorList *list, const ModelConfig *model, int layer, const char *prefix) {
    tensors_add(list, TENSOR_STATE, layer, DEVIATION, model->experts, model->dim, 0, "%s.w", prefix);
}

static void forward(RouterPass *p, Plan *plan, Stream *stream) {
    choose(p, plan, p->param[GATE].w, stream);
}

const Router router_random = {
    .name = "random",
    .summary = "the K largest of a frozen random projection, equal weights: a control",
    .paper = "",
    .plan = PLAN_TOKENS_CHOOSE,
    .renorm_default = 1,
    .check = check,
    .tensors = tensors,
    .forward = forward,
};

/* ---- random-step ---- */

typedef struct {
    acc_t *w; /* (E,C) */
} Own;

static void reserve(RouterPass *p, Arena *arena) {
    Own *own = p->own = calloc(1, sizeof(Own));
    CHECK(own, "out of memory for a router");
    arena_reserve(arena, (void **)&own->w, (size_t)p->E * p->C * sizeof(acc_t), MEMORY_ACTIVATIONS);
}

static void step_forward(RouterPass *p, Plan *plan, Stream *stream) {
    Own *own = p->own;
    random_weights(own->w, DEVIATION, router_key(p), (size_t)p->E * p->C, stream);
    choose(p, plan, own->w, stream);
}

const Router router_random_step = {
    .name = "random-step",
    .summary = "the same, drawn anew in each step: the lower bound of routing",
    .paper = "",
    .plan = PLAN_TOKENS_CHOOSE,
    .renorm_default = 1,
    .check = check,
    .reserve = reserve,
    .forward = step_forward,
};
