// build: double
/* The gradient of the whole model against central differences, tensor by tensor, in many configurations.
 *
 *     loss = cross-entropy + aux-coef * mean balance loss + z-coef * mean z-loss
 *     dL/dw = (L(w + d) - L(w - d)) / 2d + O(d^2)
 *
 * Choosing experts is not differentiable, so each configuration draws weights until no choice is close to another:
 * what is tested is the gradient where it exists. Operations have their own tests (test_ops_grad.c); here their order,
 * scales and sums are at stake: what reaches the stream twice, the slices, the tied head. Read next:
 * model/transformer.c.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "set_options.h"
#include "threads.h"

#include "../kernels/check.h"
#include "../kernels/random.h"
#include "../model/config.h"
#include "../model/transformer.h"

typedef struct {
    const char *name, *options;
    int head_rows; /* rows the head takes at a time; 0: all */
    bool drops;    /* entries must be dropped */
} Variant;

static const char BASE[] =
    "--layers 2 --dim 12 --heads 3 --kv-heads 1 --seq 7 --vocab 11 --experts 4 --top-k 2 --expert-dim 5 --batch 3 "
    "--aux-coef 0.3 --z-coef 0.2";

static const Variant variants[] = {
    {"topk, renormalised", "--renorm 1", 0, false},
    {"topk, plain", "--renorm 0", 0, false},
    {"top1", "--router top1", 0, false},
    {"topk of one", "--router topk --top-k 1", 0, false},
    {"dense", "--router dense", 0, false},
    {"no balance losses", "--aux-coef 0 --z-coef 0", 0, false},
    {"one shared expert", "--shared-experts 1", 0, false},
    {"two shared experts, top1", "--shared-experts 2 --router top1", 0, false},
    {"gelu", "--act gelu", 0, false},
    {"gelu, shared, tied", "--act gelu --shared-experts 1 --tie 1", 0, false},
    {"gelu, dense", "--act gelu --router dense", 0, false},
    {"tied head", "--tie 1", 0, false},
    {"tied head in pieces", "--tie 1", 5, false},
    {"head in pieces", "", 8, false},
    {"no QK-norm", "--qk-norm 0", 0, false},
    {"as many KV heads as heads", "--kv-heads 3", 0, false},
    {"no QK-norm, all KV heads", "--qk-norm 0 --kv-heads 3", 0, false},
    {"every second layer", "--moe-every 2", 0, false},
    {"every second layer, shared", "--moe-every 2 --layers 3 --shared-experts 1", 0, false},
    {"drops by token", "--capacity-factor 0.6 --drop token", 0, true},
    {"drops by slot", "--capacity-factor 0.6 --drop slot --allow-leak 1", 0, true},
    {"drops by weight", "--capacity-factor 0.6 --drop weight --allow-leak 1", 0, true},
    {"drops, plain weights", "--capacity-factor 0.6 --renorm 0", 0, true},
    {"drops, top1", "--capacity-factor 0.6 --router top1", 0, true},
    {"drops, padded, shared", "--capacity-factor 0.6 --layout padded --shared-experts 1", 0, true},
    {"padded, dropless", "--layout padded", 0, false},
    {"every expert", "--top-k 4", 0, false},
    {"every expert, plain", "--top-k 4 --renorm 0", 0, false},
    {"one expert, plain", "--experts 1 --top-k 1", 0, false},
    {"two tokens", "--seq 2 --batch 1", 0, false},
    {"two tokens, top1", "--seq 2 --batch 1 --router top1 --experts 9", 0, false},
    {"two slices", "--batch 4 --grad-accum 2", 0, false},
    {"three slices, drops", "--grad-accum 3 --capacity-factor 0.6", 0, true},
    {"one layer, wide heads", "--layers 1 --heads 1 --dim 22", 0, false},
};

/* ---- a model with random weights and text */

typedef struct {
    Config config;
    Arena arena;
    Transformer model;
    int slices, slice_tokens;
    int *tokens, *targets; /* (slices * N) */
} Subject;

static void subject_open(Subject *s, const char *options, int head_rows) {
    *s = (Subject){0};
    config_defaults(&s->config);
    set_options(&s->config, BASE);
    set_options(&s->config, options);
    config_finish(&s->config);
    s->slices = s->config.train.grad_accum;
    int batch = s->config.train.batch / s->slices;
    s->slice_tokens = batch * s->config.model.seq;
    size_t bytes = (size_t)s->slices * s->slice_tokens * sizeof(int);
    transformer_reserve(&s->model, &s->config, batch, s->slices, USE_TRAIN, NULL, &s->arena);
    arena_reserve(&s->arena, (void **)&s->tokens, bytes, MEMORY_ACTIVATIONS);
    arena_reserve(&s->arena, (void **)&s->targets, bytes, MEMORY_ACTIVATIONS);
    arena_commit(&s->arena);
    transformer_connect(&s->model);
    s->model.head_rows = head_rows ? head_rows : s->model.head_rows;
}

static void subject_close(Subject *s) {
    transformer_free(&s->model);
    arena_free(&s->arena);
}

/* Random text, and weights large enough that routing and attention are far from uniform. */
static void subject_draw(Subject *s, uint64_t seed) {
    uint64_t key = random_key(seed, RANDOM_TEST, 0);
    for (int i = 0; i < s->slices * s->slice_tokens; i++) {
        s->tokens[i] = (int)random_below(key, 2 * (uint64_t)i, (uint64_t)s->config.model.vocab);
        s->targets[i] = (int)random_below(key, 2 * (uint64_t)i + 1, (uint64_t)s->config.model.vocab);
    }
    for (int i = 0; i < s->model.tensors.count; i++) {
        const Tensor *t = &s->model.tensors.items[i];
        double mean = t->ndim == 1 ? 1 : 0, deviation = t->ndim == 1 ? 0.2 : 0.4;
        key = random_key(seed, RANDOM_TEST, (uint64_t)i + 1);
        for (size_t j = 0; j < t->count; j++) {
            s->model.master[t->offset + j] = (acc_t)(mean + deviation * random_normal(key, j));
        }
    }
}

static void slice_forward(Subject *s, int slice, bool gradient) {
    size_t at = (size_t)slice * s->slice_tokens;
    transformer_forward(&s->model, s->tokens + at, slice, NULL);
    transformer_loss(&s->model, s->targets + at, slice, gradient, NULL);
}

/* What is minimised. */
static double objective_value(Subject *s) {
    const Transformer *m = &s->model;
    const TrainConfig *t = &s->config.train;
    int places = s->slices * m->moe_count;
    double loss = 0;
    for (int slice = 0; slice < s->slices; slice++) {
        slice_forward(s, slice, false);
        loss += m->slice_loss[slice] / s->slices;
    }
    for (int i = 0; i < places; i++) {
        const acc_t *load = m->load + (size_t)i * LOAD_VALUES;
        loss += (t->aux_coef * load[LOAD_BALANCE] + t->z_coef * load[LOAD_Z]) / places;
    }
    return loss;
}

/* The gradient of the objective in model.grads; without the main loss, of the balance losses alone. */
static void objective_gradient(Subject *s, bool main_loss) {
    Transformer *m = &s->model;
    memset(m->grads, 0, m->tensors.total * sizeof *m->grads);
    for (int slice = 0; slice < s->slices; slice++) {
        slice_forward(s, slice, main_loss);
        if (!main_loss) {
            memset(m->dn, 0, (size_t)m->N * s->config.model.dim * sizeof *m->dn);
        }
        transformer_backward(m, s->tokens + (size_t)slice * s->slice_tokens, NULL);
    }
}

/* Whether no change of a weight by about 1e-5 changes a choice: a token's K-th and next expert are apart, so are the
 * chosen ones among themselves, and, where the heavier keeps its place, so are all weights. */
static bool choices_are_apart(const RouterPass *pass, const Plan *plan) {
    int E = plan->E, K = plan->K;
    for (int n = 0; n < plan->N; n++) {
        const acc_t *p = pass->probs + (size_t)n * E;
        const int *chosen = plan->expert + (size_t)n * K;
        for (int j = 0; j < K; j++) {
            for (int e = 0; e < E; e++) {
                bool earlier = false;
                for (int i = 0; i <= j; i++) {
                    earlier |= chosen[i] == e;
                }
                if (!earlier && p[chosen[j]] - p[e] <= 1e-3) {
                    return false;
                }
            }
        }
    }
    for (int i = 0; plan->drop == DROP_WEIGHT && i < plan->N * K; i++) {
        for (int j = 0; j < i; j++) {
            if (plan->expert[i] == plan->expert[j] && fabs((double)(plan->weight[i] - plan->weight[j])) <= 1e-3) {
                return false;
            }
        }
    }
    return true;
}

/* Whether no choice of any slice and layer is close, and entries are dropped where they should be. */
static bool subject_suits(Subject *s, bool drops) {
    double dropped = 0;
    for (int slice = 0; slice < s->slices; slice++) {
        slice_forward(s, slice, false);
        for (int i = 0; i < s->model.moe_count; i++) {
            const MoeLayer *moe = &s->model.layers[s->model.moe_layers[i]].moe;
            if (!choices_are_apart(&moe->pass, &moe->plan)) {
                return false;
            }
            dropped += s->model.load[((size_t)slice * s->model.moe_count + i) * LOAD_VALUES + LOAD_DROPPED];
        }
    }
    return (dropped > 0) == drops;
}

static void subject_draw_suited(Subject *s, bool drops) {
    for (uint64_t seed = 1; seed < 500; seed++) {
        subject_draw(s, seed);
        if (subject_suits(s, drops)) {
            return;
        }
    }
    fail_msg("no seed gives routing without close choices");
}

static double tensor_norm(const Subject *s, const Tensor *t) {
    double sum = 0;
    for (size_t i = 0; i < t->count; i++) {
        double g = (double)s->model.grads[t->offset + i];
        sum += g * g;
    }
    return sqrt(sum);
}

/* ---- tests */

/* Relative error of a tensor's gradient, in norm, over all elements or `sample` random ones where there are more. */
static double tensor_error(Subject *s, int index, size_t sample, double *norm) {
    const double step = 1e-5;
    const Tensor *t = &s->model.tensors.items[index];
    size_t elements = sample < t->count ? sample : t->count;
    uint64_t key = random_key(9, RANDOM_TEST, (uint64_t)index);
    double wrong = 0, differences = 0, gradients = 0;
    for (size_t i = 0; i < elements; i++) {
        size_t at = t->offset + (elements < t->count ? random_below(key, i, t->count) : i);
        acc_t *w = &s->model.master[at], before = *w;
        *w = before + step;
        double above = objective_value(s);
        *w = before - step;
        double below = objective_value(s);
        *w = before;
        double difference = (above - below) / (2 * step), gradient = (double)s->model.grads[at];
        wrong += (difference - gradient) * (difference - gradient);
        differences += difference * difference;
        gradients += gradient * gradient;
    }
    *norm = sqrt(gradients);
    return sqrt(wrong / fmax(differences, gradients));
}

static void test_gradient(void **state) {
    const Variant *variant = *state;
    const char *fast = getenv("MOELAB_FAST_TESTS");
    size_t sample = fast && *fast ? 40 : 150;
    Subject s;
    omp_set_num_threads(1); /* starting threads would be all the work */
    subject_open(&s, variant->options, variant->head_rows);
    subject_draw_suited(&s, variant->drops);
    objective_gradient(&s, true);
    int wrong = 0;
    for (int i = 0; i < s.model.tensors.count; i++) {
        double norm, error = tensor_error(&s, i, sample, &norm);
        if (!(error <= 1e-6) || !(norm > 1e-6)) {
            print_error("%s: relative error %.3g, norm %.3g\n", s.model.tensors.items[i].name, error, norm);
            wrong++;
        }
    }
    assert_int_equal(wrong, 0);
    subject_close(&s);
}

/* No tensor is left out by the cross-entropy alone; a router in particular learns from it. */
static void test_main_loss_reaches_every_tensor(void **state) {
    static const char *const options[] = {"--renorm 1", "--renorm 0", "--router top1", "--router dense",
                                          "--shared-experts 1 --tie 1"};
    for (size_t i = 0; i < sizeof options / sizeof *options; i++) {
        Subject s;
        char text[128];
        snprintf(text, sizeof text, "--aux-coef 0 --z-coef 0 %s", options[i]);
        subject_open(&s, text, 0);
        subject_draw(&s, 1);
        objective_gradient(&s, true);
        for (int t = 0; t < s.model.tensors.count; t++) {
            const Tensor *tensor = &s.model.tensors.items[t];
            if (!(tensor_norm(&s, tensor) > 1e-6)) {
                fail_msg("%s: the gradient of %s has norm %g", options[i], tensor->name, tensor_norm(&s, tensor));
            }
        }
        subject_close(&s);
    }
}

/* The balance loss alone, and the z-loss alone, move every router, and with neither nothing has a gradient. */
static void test_balance_losses_alone(void **state) {
    static const char *const losses[] = {"--aux-coef 0.3 --z-coef 0", "--aux-coef 0 --z-coef 0.2",
                                         "--aux-coef 0 --z-coef 0"};
    static const char *const routers[] = {"--router topk --renorm 1", "--router topk --renorm 0", "--router top1"};
    for (int i = 0; i < 9; i++) {
        char options[128];
        snprintf(options, sizeof options, "%s %s", losses[i / 3], routers[i % 3]);
        Subject s;
        subject_open(&s, options, 0);
        subject_draw(&s, 2);
        objective_gradient(&s, false);
        for (int t = 0; t < s.model.tensors.count; t++) {
            const Tensor *tensor = &s.model.tensors.items[t];
            double norm = tensor_norm(&s, tensor);
            bool reached = i / 3 < 2 && tensor->kind == TENSOR_ROUTER;
            bool after_last_router = tensor->kind == TENSOR_EXPERT
                                         ? tensor->layer == s.config.model.layers - 1
                                         : !strcmp(tensor->name, "head.w") || !strcmp(tensor->name, "final_norm.w");
            if ((reached && !(norm > 1e-6)) || ((i / 3 == 2 || after_last_router) && norm != 0)) {
                fail_msg("%s: the gradient of %s has norm %g", options, tensor->name, norm);
            }
        }
        subject_close(&s);
    }
}

int main(void) {
    enum { VARIANTS = sizeof variants / sizeof *variants };
    struct CMUnitTest tests[VARIANTS + 2] = {
        cmocka_unit_test(test_main_loss_reaches_every_tensor),
        cmocka_unit_test(test_balance_losses_alone),
    };
    for (size_t i = 0; i < VARIANTS; i++) {
        const Variant *v = &variants[i];
        tests[i + 2] = (struct CMUnitTest){v->name, test_gradient, NULL, NULL, (void *)(uintptr_t)v};
    }
    return _cmocka_run_group_tests("model: gradients", tests, VARIANTS + 2, NULL, NULL);
}
