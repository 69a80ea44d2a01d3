// build: double
/* The gradient of the whole model against central differences, tensor by tensor, in many configurations.
 *
 * Operations have their own tests (test_ops_grad.c); here their order, scales and sums are at stake: what reaches the
 * stream twice, the slices, the chain, the tied head, a router's way into the loss. The model, its weights and the
 * differences are model_grad.h, the configurations a table here. After them: which losses reach what, and whether the
 * check itself finds an error. Read next: model/transformer.c.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "model_grad.h"
#include "threads.h"

typedef struct {
    const char *name, *options;
    int head_rows; /* rows the head takes at a time; 0: all */
    bool drops;    /* entries must be dropped */
} Variant;

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
    {"wide heads", "--head-dim 10", 0, false},
    {"narrow heads, no QK-norm", "--head-dim 2 --qk-norm 0", 0, false},
    {"every second layer", "--moe-every 2", 0, false},
    {"every second layer, shared", "--moe-every 2 --layers 3 --shared-experts 1", 0, false},
    {"drops by token", "--capacity-factor 0.6 --drop token", 0, true},
    {"drops by slot", "--capacity-factor 0.6 --drop slot", 0, true},
    {"drops by weight", "--capacity-factor 0.6 --drop weight", 0, true},
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

    {"block", "--layout block", 0, false},
    {"block, several tiles of an expert", "--layout block --layers 1 --experts 2 --batch 6 --seq 11", 0, false},
    {"block, drops, shared", "--layout block --capacity-factor 0.6 --shared-experts 1", 0, true},
    {"block, gelu, experts choose", "--layout block --act gelu --router expert-choice", 0, false},
    {"block, two slices, chain", "--layout block --batch 2 --grad-accum 2 --router coe", 0, false},

    {"noisy", "--router noisy", 0, false},
    {"noisy, no balance losses", "--router noisy --aux-coef 0", 0, false},
    {"noisy, three of six", "--router noisy --experts 6 --top-k 3", 0, false},
    {"noisy, drops", "--router noisy --capacity-factor 0.6 --drop weight", 0, true},
    {"noisy, two slices, shared", "--router noisy --batch 4 --grad-accum 2 --shared-experts 1", 0, false},
    {"noisy, every second layer", "--router noisy --moe-every 2", 0, false},

    {"sigmoid, renormalised", "--router sigmoid --renorm 1", 0, false},
    {"sigmoid, plain", "--router sigmoid --renorm 0", 0, false},
    {"sigmoid, scaled", "--router sigmoid --router-scale 2.5", 0, false},
    {"sigmoid, scaled, plain", "--router sigmoid --router-scale 2.5 --renorm 0", 0, false},
    {"sigmoid, no balance loss", "--router sigmoid --aux-coef 0", 0, false},
    {"sigmoid, two of four groups",
     "--router sigmoid --experts 8 --top-k 3 --router-groups 4 --router-kept-groups 2 --router-scale 2.5", 0, false},
    {"sigmoid, groups of one, plain", "--router sigmoid --router-groups 4 --router-kept-groups 3 --renorm 0", 0, false},
    {"sigmoid, one expert of four", "--router sigmoid --top-k 1", 0, false},
    {"sigmoid, every expert", "--router sigmoid --top-k 4", 0, false},
    {"sigmoid, drops, shared", "--router sigmoid --capacity-factor 0.6 --shared-experts 1", 0, true},
    {"sigmoid, two slices", "--router sigmoid --batch 4 --grad-accum 2", 0, false},

    {"hash", "--router hash", 0, false},
    {"hash, one expert", "--router hash --top-k 1", 0, false},
    {"hash, drops, shared", "--router hash --capacity-factor 0.6 --shared-experts 1", 0, true},
    {"position", "--router position", 0, false},
    {"position, one expert, two slices", "--router position --top-k 1 --batch 4 --grad-accum 2", 0, false},
    {"random", "--router random", 0, false},
    {"random, one expert", "--router random --top-k 1", 0, false},
    {"random, drops by weight", "--router random --capacity-factor 0.6 --drop weight", 0, true},
    {"random-step", "--router random-step", 0, false},
    {"random-step, two slices", "--router random-step --batch 4 --grad-accum 2", 0, false},

    {"expert-choice", "--router expert-choice", 0, false},
    {"expert-choice, a share of one", "--router expert-choice --top-k 1", 0, false},
    {"expert-choice, every expert", "--router expert-choice --top-k 4", 0, false},
    {"expert-choice, no z-loss, shared", "--router expert-choice --z-coef 0 --shared-experts 1", 0, false},
    {"expert-choice, padded, two slices", "--router expert-choice --layout padded --batch 4 --grad-accum 2", 0, false},
    {"threshold", "--router threshold", 0, false},
    {"threshold, warming up", "--router threshold --threshold-warmup 9", 0, false},
    {"threshold, no z-loss, shared", "--router threshold --z-coef 0 --shared-experts 1", 0, false},
    {"threshold, drops", "--router threshold --capacity-factor 0.6", 0, true},
    {"threshold, two slices, block", "--router threshold --batch 2 --grad-accum 2 --layout block", 0, false},

    {"soft", "--router soft", 0, false},
    {"soft, one slot", "--router soft --slots 1", 0, false},
    {"soft, steep mixtures", "--router soft --slots 2 --soft-scale 6", 0, false},
    {"soft, three slots, gelu, shared", "--router soft --slots 3 --act gelu --shared-experts 1", 0, false},
    {"soft, two slices, tied", "--router soft --slots 2 --batch 4 --grad-accum 2 --tie 1", 0, false},
    {"soft, every second layer", "--router soft --slots 2 --moe-every 2", 0, false},
    {"soft-batch", "--router soft-batch", 0, false},
    {"soft-batch, three slots, shared", "--router soft-batch --slots 3 --shared-experts 1", 0, false},
    {"soft-batch, two slices", "--router soft-batch --batch 4 --grad-accum 2", 0, false},
    {"soft slots, uniform tokens", "--router soft-uniform --slots 2", 0, false},
    {"uniform slots, soft tokens", "--router uniform-soft --slots 2", 0, false},
    {"soft-token", "--router soft-token", 0, false},
    {"soft-token, plain, no z-loss", "--router soft-token --renorm 0 --z-coef 0", 0, false},

    {"coe", "--router coe", 0, false},
    {"coe, inner, no outer", "--router coe --chain-inner 1 --chain-outer 0", 0, false},
    {"coe, no inner", "--router coe --chain-inner 0 --chain-outer 1", 0, false},
    {"coe, norms, inner", "--router coe --chain-norm 1", 0, false},
    {"coe, norms, no inner", "--router coe --chain-norm 1 --chain-inner 0 --chain-outer 1", 0, false},
    {"coe of three", "--router coe --chain-steps 3", 0, false},
    {"coe of three, inner, no outer", "--router coe --chain-steps 3 --chain-outer 0", 0, false},
    {"coe of three, no inner", "--router coe --chain-steps 3 --chain-inner 0", 0, false},
    {"coe of three, norms, inner", "--router coe --chain-steps 3 --chain-norm 1", 0, false},
    {"coe of three, norms, no inner", "--router coe --chain-steps 3 --chain-norm 1 --chain-inner 0 --chain-outer 1", 0,
     false},
    {"coe, shared", "--router coe --shared-experts 1", 0, false},
    {"coe, shared, norms, two slices",
     "--router coe --shared-experts 1 --chain-norm 1 --batch 2 --grad-accum 2 --renorm 0", 0, false},
    {"coe, every second layer", "--router coe --moe-every 2 --layers 3", 0, false},
    {"coe, every second layer, shared, no outer",
     "--router coe --moe-every 2 --layers 4 --shared-experts 1 --chain-outer 0", 0, false},
    {"coe, drops", "--router coe --capacity-factor 0.6", 0, true},
    {"one step, no outer", "--chain-inner 1 --chain-outer 0", 0, false},
    {"one step, inner and outer", "--chain-inner 1", 0, false},
    {"one step, norms, inner", "--chain-norm 1", 0, false},
    {"one step, norms, no inner", "--chain-norm 1 --chain-inner 0 --chain-outer 1", 0, false},
    {"chain of top1, shared", "--router top1 --chain-steps 2 --shared-experts 1", 0, false},
    {"chain of noisy", "--router noisy --chain-steps 2", 0, false},
    {"chain of sigmoid, norms", "--router sigmoid --chain-steps 2 --chain-norm 1", 0, false},
    {"chain of hash", "--router hash --chain-steps 2 --chain-outer 0", 0, false},
    {"chain of position", "--router position --chain-steps 2 --chain-inner 0", 0, false},
    {"chain of random, norms", "--router random --chain-steps 2 --chain-norm 1", 0, false},
    {"chain of random-step", "--router random-step --chain-steps 2", 0, false},
    {"chain of expert-choice", "--router expert-choice --chain-steps 2", 0, false},
    {"chain of threshold", "--router threshold --chain-steps 2 --chain-outer 0", 0, false},
    {"chain of soft-token", "--router soft-token --chain-steps 2 --chain-norm 1", 0, false},
    {"chain of forced", "--router forced --chain-steps 3 --chain-outer 0", 0, false},

    {"forced, balanced", "--router forced --force balanced", 0, false},
    {"forced, balanced, plain, shared", "--router forced --renorm 0 --shared-experts 1", 0, false},
    {"forced, zipf", "--router forced --force zipf:1.2", 0, false},
    {"forced, zipf, drops", "--router forced --force zipf:1.2 --capacity-factor 0.6 --drop weight", 0, true},
    {"forced, zipf, two slices", "--router forced --force zipf:0.5 --renorm 0 --batch 4 --grad-accum 2", 0, false},
    {"forced, one", "--router forced --force one", 0, false},
    {"forced, one of one", "--router forced --force one --top-k 1", 0, false},
    {"forced, one, drops, padded", "--router forced --force one --capacity-factor 0.8 --layout padded", 0, true},

    {"perft r", "--perft r --perft-rank 3 --perft-count 3 --perft-aux-coef 0.3", 0, false},
    {"perft r, silu, two slices",
     "--perft r --perft-act silu --perft-rank 2 --perft-top-k 1 --perft-aux-coef 0.3 --batch 4 --grad-accum 2", 0,
     false},
    {"perft r, every second layer, lora",
     "--perft r --perft-rank 3 --perft-aux-coef 0.3 --lora attention --moe-every 2 --router top1", 0, false},
    {"perft e", "--perft e --perft-rank 3 --perft-scale 5", 0, false},
    {"perft e, silu, two slices", "--perft e --perft-rank 3 --perft-act silu --batch 4 --grad-accum 2", 0, false},
    {"perft e, wider than the experts, shared, padded",
     "--perft e --perft-rank 9 --shared-experts 1 --layout padded --capacity-factor 2 --recompute experts", 0, false},
    {"perft e, soft", "--perft e --perft-rank 3 --router soft --slots 2", 0, false},
    {"perft e, experts choose", "--perft e --perft-rank 3 --perft-act silu --router expert-choice", 0, false},
    {"perft d", "--perft d --perft-rank 3 --perft-count 3 --perft-scale 2", 0, false},
    {"perft d, silu, two slices", "--perft d --perft-rank 2 --perft-act silu --batch 4 --grad-accum 2", 0, false},
    {"perft s", "--perft s --perft-rank 3 --tie 1", 0, false},
    {"perft s, silu, sigmoid", "--perft s --perft-rank 3 --perft-act silu --router sigmoid", 0, false},
    {"lora", "--lora attention --perft-rank 3", 0, false},
    {"lora, silu, two slices", "--lora attention --perft-rank 3 --perft-act silu --batch 4 --grad-accum 2", 0, false},
    {"lora, wide heads, made again", "--lora attention --perft-rank 2 --head-dim 6 --recompute experts", 0, false},
    {"lora, chain", "--lora attention --perft-rank 2 --router coe", 0, false},
    {"all but routers frozen", "--freeze all-but-router --renorm 0", 0, false},
    {"experts frozen", "--freeze experts --shared-experts 1", 0, false},

    {"masked", "--objective mlm", 0, false},
    {"masked, head in pieces, tied", "--objective mlm --tie 1", 4, false},
    {"masked, two slices, drops by slot", "--objective mlm --batch 4 --grad-accum 2 --capacity-factor 0.6 --drop slot",
     0, true},
    {"masked, dense", "--objective mlm --router dense", 0, false},
    {"masked, expert-choice", "--objective mlm --router expert-choice --allow-leak 0", 0, false},
    {"masked, soft", "--objective mlm --router soft --allow-leak 0", 0, false},
    {"masked, soft-batch, two slices", "--objective mlm --router soft-batch --batch 4 --grad-accum 2", 0, false},
    {"masked, coe", "--objective mlm --router coe --chain-norm 1", 0, false},
};

static void draw_suited(Subject *s, bool drops) {
    if (!subject_draw_suited(s, drops)) {
        fail_msg("no weights of many make plans that stay as they are");
    }
}

/* ---- tests */

static void test_gradient(void **state) {
    const Variant *variant = *state;
    const char *fast = getenv("MOELAB_FAST_TESTS");
    bool few = fast && *fast; /* with sanitizers: each variant once through, for a number of each tensor */
    Subject s;
    subject_open(&s, variant->options, variant->head_rows);
    draw_suited(&s, variant->drops);
    size_t bytes = s.model.tensors.total * sizeof(acc_t);
    acc_t *drawn = malloc(bytes);
    assert_non_null(drawn);
    transformer_store(&s.model, drawn);
    objective_gradient(&s, true);
    int wrong = 0;
    for (int i = 0; i < s.model.tensors.count; i++) {
        const Tensor *tensor = &s.model.tensors.items[i];
        if (tensor->frozen) { /* states too */
            continue;
        }
        size_t sample = few ? 1 : tensor->kind == TENSOR_ROUTER ? tensor->count : 40;
        double norm, error = tensor_error(&s, tensor, sample, &norm);
        if (!(error <= 1e-6) || !(norm > 1e-6)) {
            print_error("%s: relative error %.3g, norm %.3g\n", tensor->name, error, norm);
            wrong++;
        }
    }
    assert_int_equal(wrong, 0);
    assert_int_equal(strays(&s), 0);
    assert_false(s.choices_changed);
    assert_memory_equal(drawn, s.model.master, bytes); /* states too: only an update moves them */
    free(drawn);
    subject_close(&s);
}

/* A gradient that is wrong by a thousandth in one element of a router does not pass. */
static void test_wrong_gradient_is_found(void **state) {
    for (int r = 0; router_at(r); r++) {
        Subject s;
        char options[64];
        snprintf(options, sizeof options, "--router %s", router_at(r)->name);
        subject_open(&s, options, 0);
        draw_suited(&s, false);
        objective_gradient(&s, true);
        for (int t = 0; t < s.model.tensors.count; t++) {
            const Tensor *tensor = &s.model.tensors.items[t];
            if (tensor->kind != TENSOR_ROUTER) {
                continue;
            }
            acc_t *grad = s.model.grads + tensor->offset, *largest = grad;
            for (size_t i = 0; i < tensor->count; i++) {
                largest = fabs((double)grad[i]) > fabs((double)*largest) ? grad + i : largest;
            }
            acc_t right = *largest;
            double norm;
            assert_true(tensor_error(&s, tensor, tensor->count, &norm) <= 1e-6);
            *largest = right * (acc_t)1.001;
            assert_true(tensor_error(&s, tensor, tensor->count, &norm) > 1e-6);
            *largest = right;
        }
        subject_close(&s);
    }
}

/* No tensor is left out by the cross-entropy alone, whatever the router; one that learns does so from the first step
 * on, also where it starts at zero. */
static void test_main_loss_reaches_every_tensor(void **state) {
    static const char *const extra[] = {"", "--renorm 0", "--shared-experts 1 --tie 1"};
    for (int i = 0; router_at(i / 3); i++) {
        const Router *router = router_at(i / 3);
        bool plain = i % 3 == 1;
        if (plain && strcmp(router->name, "topk") != 0 && strcmp(router->name, "sigmoid") != 0) {
            continue; /* the others are plain or cannot be */
        }
        Subject s;
        char options[128];
        snprintf(options, sizeof options, "--aux-coef 0 --z-coef 0 --router %s %s", router->name, extra[i % 3]);
        subject_open(&s, options, 0);
        for (int drawn = 1; drawn >= 0; drawn--) {
            subject_draw(&s, 1);
            if (!drawn) {
                transformer_init(&s.model, s.model.master, 1, NULL);
            }
            objective_gradient(&s, true);
            int routers = 0;
            for (int t = 0; t < s.model.tensors.count; t++) {
                const Tensor *tensor = &s.model.tensors.items[t];
                double norm = tensor_norm(&s, tensor), least = drawn ? 1e-6 : 1e-10;
                routers += tensor->kind == TENSOR_ROUTER;
                if (tensor->kind != TENSOR_STATE && !(norm > least)) {
                    fail_msg("%s, %s weights: the gradient of %s has norm %g", options, drawn ? "drawn" : "initial",
                             tensor->name, norm);
                }
            }
            assert_int_equal(routers > 0, router->learned);
            for (int m = 0; m < s.model.moe_count; m++) { /* what training's alarm goes by */
                assert_int_equal(s.model.load[m * LOAD_VALUES + LOAD_MAIN_GRADIENT] > 0, router->learned);
            }
        }
        subject_close(&s);
    }
}

/* Norms of the gradients that one of the balance losses, or none, gives on its own. */
static void check_balance_loss(const Router *router, const char *loss, bool any) {
    Subject s;
    char options[128];
    snprintf(options, sizeof options, "--router %s %s", router->name, loss);
    subject_open(&s, options, 0);
    subject_draw(&s, 2);
    objective_gradient(&s, false);
    for (int t = 0; t < s.model.tensors.count; t++) {
        const Tensor *tensor = &s.model.tensors.items[t];
        double norm = tensor_norm(&s, tensor);
        bool reached = any && tensor->kind == TENSOR_ROUTER;
        bool after_last_router = tensor->kind == TENSOR_EXPERT /* a chain's experts feed the next step's router */
                                     ? tensor->layer == s.config.model.layers - 1 && s.config.model.chain_steps == 1
                                     : !strcmp(tensor->name, "head.w") || !strcmp(tensor->name, "final_norm.w");
        if (tensor->kind != TENSOR_STATE &&
            ((reached && !(norm > 1e-6)) || ((!any || after_last_router) && norm != 0))) {
            fail_msg("%s: the gradient of %s has norm %g", options, tensor->name, norm);
        }
    }
    for (int m = 0; m < s.model.moe_count; m++) {
        const acc_t *load = s.model.load + m * LOAD_VALUES;
        assert_int_equal(load[LOAD_BALANCE_GRADIENT] > 0, s.config.train.aux_coef > 0);
        bool later_router = any && m < s.model.moe_count - 1; /* whose balance reaches this one's weights */
        assert_int_equal(load[LOAD_MAIN_GRADIENT] > 0, later_router);
    }
    subject_close(&s);
}

/* The balance loss alone, and the z-loss alone, move every router that has it, and with neither nothing has a
 * gradient. */
static void test_balance_losses_alone(void **state) {
    int balanced = 0, limited = 0;
    for (int i = 0; router_at(i); i++) {
        const Router *router = router_at(i);
        check_balance_loss(router, "--aux-coef 0 --z-coef 0", false);
        if (router->has_balance_loss) {
            check_balance_loss(router, "--aux-coef 0.3 --z-coef 0", true);
            balanced++;
        }
        if (router->has_z_loss) {
            check_balance_loss(router, "--aux-coef 0 --z-coef 0.2", true);
            limited++;
        }
    }
    check_balance_loss(router_find("topk"), "--aux-coef 0.3 --z-coef 0 --renorm 0", true);
    check_balance_loss(router_find("topk"), "--aux-coef 0 --z-coef 0.2 --renorm 0", true);
    assert_true(balanced >= 6 && limited >= 7);
}

int main(void) {
    enum { VARIANTS = sizeof variants / sizeof *variants };
    struct CMUnitTest tests[VARIANTS + 3] = {
        cmocka_unit_test(test_main_loss_reaches_every_tensor),
        cmocka_unit_test(test_balance_losses_alone),
        cmocka_unit_test(test_wrong_gradient_is_found),
    };
    for (size_t i = 0; i < VARIANTS; i++) {
        const Variant *v = &variants[i];
        tests[i + 3] = (struct CMUnitTest){v->name, test_gradient, NULL, NULL, (void *)(uintptr_t)v};
    }
    omp_set_num_threads(1); /* starting threads would be all the work */
    return _cmocka_run_group_tests("model: gradients", tests, VARIANTS + 3, NULL, NULL);
}
