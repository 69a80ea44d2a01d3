/* hash: a token's id decides, by a table made before training.
 *
 *     S = table[token]       w_j = 1/K
 *
 * A control: capacity without learned routing. Nothing is learned and nothing has to be balanced; the table is as even
 * as the frequencies of the tokens in the training text allow. It looks at the token itself, so it is causal.
 * Hash layers, Roller et al. 2021 (arXiv 2106.04426). Read next: router_position.c, a weaker control.
 */
#include "../kernels/check.h"
#include "../kernels/fixed_choice.h"
#include "router.h"

enum { TABLE };

static void check(const Config *config) {
    CHECK(config->model.renorm == 1, "--router hash has equal weights that sum to 1: drop --renorm 0");
}

static void tensors(TensorList *list, const ModelConfig *model, int layer, const char *prefix) {
    tensors_add(list, TENSOR_STATE, layer, 0, model->vocab, model->top_k, 0, "%s.table", prefix);
}

static void init(acc_t *const *param, const ModelConfig *model, const double *frequency, uint64_t key) {
    balanced_table(param[TABLE], frequency, key, model->vocab, model->experts, model->top_k);
}

static void forward(RouterPass *p, Plan *plan, Stream *stream) {
    table_choice(plan->expert, p->context->tokens, p->param[TABLE].w, p->N, p->K, stream);
    equal_weight(plan->weight, p->N, p->K, stream);
    choice_probs(p->probs, plan->expert, plan->weight, p->N, p->E, p->K, stream);
}

const Router router_hash = {
    .name = "hash",
    .summary = "experts by a balanced table of token ids, equal weights: a control",
    .paper = "Hash layers 2106.04426",
    .plan = PLAN_TOKENS_CHOOSE,
    .renorm_default = 1,
    .check = check,
    .tensors = tensors,
    .init = init,
    .forward = forward,
};
