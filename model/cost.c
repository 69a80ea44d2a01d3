/* What a token costs: counted from the list of tensors, whatever the router. Called by train.c, console.c, figures.c,
 * experiments/bench_train.c. Read next: tensors.h. */
#include "cost.h"

#include <string.h>

/* Of --perft r: a tensor of several adapters, of which a token meets some. */
static bool is_routed_adapter(const Tensor *t) {
    return t->adapter && t->kind == TENSOR_DENSE && t->ndim == 3;
}

size_t transformer_active_parameters(const Transformer *model) {
    const ModelConfig *c = model->config;
    size_t active = 0, visits = (size_t)c->top_k * c->chain_steps, E = c->experts;
    for (int i = 0; i < model->tensors.count; i++) {
        const Tensor *t = &model->tensors.items[i];
        active += is_routed_adapter(t)       ? t->count / c->perft_count * c->perft_top_k
                  : t->kind == TENSOR_EXPERT ? t->count * t->parts / E * (visits < E ? visits : E)
                  : t->kind == TENSOR_STATE  ? 0
                                             : t->count;
    }
    return active;
}

/* Expert rows that a token is worth on average, in one application of a MoE layer. */
static double rows_per_token(const Transformer *model) {
    const Plan *plan = model->moe_count > 0 ? &model->moes[0]->plan : NULL;
    return plan && plan->slots > 0 ? (double)plan->rows / plan->N : model->config->top_k;
}

double transformer_flops_per_token(const Transformer *model) {
    const ModelConfig *c = model->config;
    double matrices = 0;
    for (int i = 0; i < model->tensors.count; i++) {
        const Tensor *t = &model->tensors.items[i];
        bool only_looked_up = strcmp(t->name, "embedding.w") == 0 && !c->tie;
        bool shared = strstr(t->name, ".moe.shared.") != NULL;
        if (t->ndim >= 2 && !only_looked_up && t->kind != TENSOR_STATE) {
            double visits = t->kind == TENSOR_EXPERT ? rows_per_token(model) / t->shape[0]
                            : is_routed_adapter(t)   ? (double)c->perft_top_k / c->perft_count
                                                     : 1;
            double products = t->frozen ? 2.0 / 3 : 1; /* without that of the weight's gradient */
            matrices +=
                products * visits * (t->kind == TENSOR_EXPERT || shared ? c->chain_steps : 1) * (double)t->count;
        }
    }
    double scores = c->objective == OBJECTIVE_LM ? 0.5 : 1; /* share of the T x T that is computed */
    return 6 * matrices + 12.0 * scores * c->layers * c->seq * c->heads * c->head_dim;
}
