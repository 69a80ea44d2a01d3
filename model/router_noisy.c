/* noisy: top-k of logits with learned noise, balanced by how much weight and how many tokens each expert gets.
 *
 *     h = c + eps softplus(r) (training)       c = W_g x, r = W_n x       S = the K largest of h       w = softmax(h_S)
 *     balance loss = CV(importance)^2 + CV(load)^2, 0 at balance
 *
 * Noise makes experts near the border of the choice take turns, and makes the number of tokens an expert gets a smooth
 * function of the logits, which the load loss differentiates. Both matrices start at zero: at first only noise chooses.
 * Evaluation draws no noise. The equations and gradients stand in kernels/noisy.h. Causal.
 * Shazeer et al. 2017 (arXiv 1701.06538). Read next: router_topk.c.
 */
#include <stdlib.h>

#include "../kernels/check.h"
#include "../kernels/gate.h"
#include "../kernels/noisy.h"
#include "router.h"

enum { GATE, NOISE };

/* All (N,E) but sums (2,E). */
typedef struct {
    acc_t *raw, *eps, *noisy, *draw, *sums;
} Own;

static void check(const Config *config) {
    const ModelConfig *model = &config->model;
    CHECK(
        model->top_k < model->experts,
        "--router noisy with --top-k %d of --experts %d: with every expert chosen there is no border for the noise to "
        "cross; lower --top-k",
        model->top_k, model->experts);
    CHECK(model->top_k > 1,
          "--router noisy --top-k 1: its weights are renormalised, so over one expert always 1, and the router would "
          "get no gradient from the loss; take --top-k 2, or --router top1");
    CHECK(model->renorm == 1, "--router noisy weighs by a softmax over the chosen, which sums to 1: drop --renorm 0");
}

static void tensors(TensorList *list, const ModelConfig *model, int layer, const char *prefix) {
    tensors_add(list, TENSOR_ROUTER, layer, 0, model->experts, model->dim, 0, "%s.w", prefix);
    tensors_add(list, TENSOR_ROUTER, layer, 0, model->experts, model->dim, 0, "%s.noise", prefix);
}

static void reserve(RouterPass *p, Arena *arena) {
    size_t bytes = (size_t)p->N * p->E * sizeof(acc_t);
    Own *own = p->own = calloc(1, sizeof(Own));
    CHECK(own, "out of memory for a router");
    arena_reserve(arena, (void **)&own->raw, bytes, MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&own->eps, bytes, MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&own->noisy, bytes, MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&own->draw, bytes, MEMORY_ACTIVATIONS);
    arena_reserve(arena, (void **)&own->sums, 2 * p->E * sizeof(acc_t), MEMORY_ACTIVATIONS);
}

static void forward(RouterPass *p, Plan *plan, Stream *stream) {
    Own *own = p->own;
    gate_forward(p->logits, p->x, p->param[GATE].w, p->N, p->C, p->E, stream);
    gate_forward(own->raw, p->x, p->param[NOISE].w, p->N, p->C, p->E, stream);
    noisy_forward(own->noisy, own->eps, plan->expert, plan->weight, p->probs, p->logits, own->raw, router_key(p),
                  p->context->training, p->N, p->E, p->K, stream);
}

static void balance(RouterPass *p, const Plan *plan, Stream *stream) {
    Own *own = p->own;
    noisy_balance_forward(p->load, own->sums, p->logits, own->raw, own->noisy, plan->expert, plan->weight,
                          p->context->training, p->N, p->E, p->K, stream);
}

static void backward(RouterPass *p, real_t *dx, const acc_t *dweight, const Plan *plan, Stream *stream) {
    Own *own = p->own;
    noisy_backward(p->dlogits, own->draw, dweight, own->raw, own->eps, plan->expert, plan->weight, p->N, p->E, p->K,
                   stream);
    gradient_measure(p->load, p->dlogits, (size_t)p->N * p->E, stream);
    noisy_balance_backward(p->dlogits, own->draw, p->load, own->sums, p->logits, own->raw, own->eps, own->noisy,
                           plan->expert, plan->weight, p->aux_scale, p->N, p->E, p->K, stream);
    gate_backward(dx, p->param[GATE].dw, p->dlogits, p->x, p->param[GATE].w, p->N, p->C, p->E, stream);
    gate_backward(dx, p->param[NOISE].dw, own->draw, p->x, p->param[NOISE].w, p->N, p->C, p->E, stream);
}

const Router router_noisy = {
    .name = "noisy",
    .summary = "the K largest noisy logits, the noise learned; importance and load losses",
    .paper = "Shazeer et al. 1701.06538",
    .plan = PLAN_TOKENS_CHOOSE,
    .one_rank = true,
    .learned = true,
    .renorm_default = 1,
    .aux_default = 0.01,
    .has_balance_loss = true,
    .check = check,
    .tensors = tensors,
    .reserve = reserve,
    .forward = forward,
    .balance = balance,
    .backward = backward,
};
