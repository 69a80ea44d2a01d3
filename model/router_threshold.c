/* threshold: expert choice made causal. An expert takes a token whose probability is above a running threshold.
 *
 *     p = softmax(W x) over the experts       e takes x when p_e > tau_e       w = p_e
 *     after each step:  tau_e moves towards the p_e at which exactly N K / E tokens of that step would have passed
 *
 * The thresholds come from earlier steps, so a token's experts depend on the token alone; the load is right on average,
 * not in each batch, and rows are reserved for the worst case (all tokens to all experts) unless --capacity-factor
 * limits it. For the first --threshold-warmup steps there is no threshold worth the name and training chooses as
 * expert-choice does; evaluation always goes by the thresholds, which start at 1/E. They are part of the checkpoint.
 * Causal after the warm-up. Expert Threshold routing (arXiv 2603.11535). Kernel: expert_choice.h.
 */
#include <stdlib.h>

#include "../kernels/check.h"
#include "../kernels/expert_choice.h"
#include "../kernels/topk.h"
#include "softmax_gate.h"

enum { TAU = SOFTMAX_GATE + 1 };

typedef struct {
    acc_t *cut; /* (slices,E) thresholds that would have been exact */
} Own;

static void check(const Config *config) {
    CHECK(config->train.threshold_warmup > 0,
          "--threshold-warmup 0: before the first step there is no threshold; give it at least 1 step of expert choice "
          "to start from (50 is the default)");
    CHECK(config->model.renorm == 0, "--router threshold weighs by the probability alone: drop --renorm 1");
}

static void tensors(TensorList *list, const ModelConfig *model, int layer, const char *prefix) {
    softmax_gate_tensors(list, model, layer, prefix);
    tensors_add(list, TENSOR_STATE, layer, 0, model->experts, 0, 0, "%s.tau", prefix);
}

static void init(acc_t *const *param, const ModelConfig *model, const double *frequency, uint64_t key) {
    for (int e = 0; e < model->experts; e++) {
        param[TAU][e] = (acc_t)(1.0 / model->experts);
    }
}

static void reserve(RouterPass *p, Arena *arena) {
    Own *own = p->own = calloc(1, sizeof(Own));
    CHECK(own, "out of memory for a router");
    arena_reserve(arena, (void **)&own->cut, (size_t)p->context->slices * p->E * sizeof(acc_t), MEMORY_ACTIVATIONS);
}

static void forward(RouterPass *p, Plan *plan, Stream *stream) {
    Own *own = p->own;
    const RouterContext *context = p->context;
    softmax_gate_scores(p, stream);
    if (context->training) {
        int share = (int)(((int64_t)p->N * p->K + p->E - 1) / p->E);
        acc_t *cut = own->cut + (size_t)context->slice * p->E;
        expert_choice_forward(plan->expert, cut, p->probs, p->N, p->E, share, stream);
    }
    int first = context->training ? p->config->train.threshold_warmup : 0;
    threshold_forward(plan->expert, p->param[TAU].w, p->probs, &context->step->number, first, p->N, p->E, stream);
    choice_weight(plan->weight, plan->expert, p->probs, p->N, p->E, plan->K, 0, stream);
}

static void update(RouterPass *p, const int *counts, size_t stride, const AdamState *adam, Stream *stream) {
    Own *own = p->own;
    threshold_update(p->param[TAU].w, own->cut, p->context->slices, p->E, p->config->train.threshold_rate, adam,
                     stream);
}

const Router router_threshold = {
    .name = "threshold",
    .summary = "the experts whose running threshold its probability passes: expert choice, causal",
    .paper = "Expert Threshold 2603.11535",
    .plan = PLAN_EXPERTS_CHOOSE,
    .one_rank = true,
    .learned = true,
    .z_default = 0.001,
    .has_z_loss = true,
    .check = check,
    .tensors = tensors,
    .init = init,
    .reserve = reserve,
    .forward = forward,
    .balance = softmax_gate_balance,
    .backward = softmax_gate_backward,
    .update = update,
};
