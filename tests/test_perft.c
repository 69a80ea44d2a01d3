/* Fine-tuning: --perft, --lora and what --freeze leaves. Gradients against differences are in test_model_grad.c; here
 * is what a run must keep: the function it starts from, the frozen bits, the adapters in a checkpoint, its refusals.
 */
#include "trainer.h"

#include "../model/checkpoint.h"
#include "../model/freeze.h"
#include "../model/import.h"
#include "../model/log.h"
#include "../model/resume.h"
#include "../model/whole.h"
#include "command_line.h"
#include "threads.h"

static char root[] = "/tmp/test_perft_XXXXXX";

static const char *in_root(const char *name) {
    static char path[4][128];
    static int next;
    char *out = path[next++ % 4];
    snprintf(out, sizeof path[0], "%s/%s", root, name);
    return out;
}

static const char *const kinds[] = {
    "--perft r --perft-rank 5 --perft-count 3", "--perft e --perft-rank 3",
    "--perft d --perft-rank 3 --perft-count 2", "--perft s --perft-rank 6",
    "--lora attention --perft-rank 3",          "--perft r --perft-act silu --lora attention --perft-rank 4",
};
enum { KINDS = sizeof kinds / sizeof *kinds };

/* ---- where it starts */

/* What the model makes of the first batch: hidden (N,C), the caller's. */
static real_t *hidden_of(Trainer *t) {
    size_t bytes = (size_t)t->model.N * t->config.model.dim * sizeof(real_t);
    real_t *hidden = malloc(bytes);
    assert_non_null(hidden);
    transformer_begin_step(&t->model, 0, NULL);
    read_slice(t, SPLIT_TRAIN, 0, 0);
    transformer_forward(&t->model, t->tokens, 0, NULL);
    transformer_loss(&t->model, t->targets, 0, false, NULL);
    memcpy(hidden, t->model.hidden, bytes);
    return hidden;
}

/* Fresh adapters change nothing, to the bit; adapters that were drawn change what they stand beside. */
static void test_fresh_adapters_change_nothing(void **state) {
    Trainer base;
    trainer_open(&base, "");
    real_t *expected = hidden_of(&base);
    size_t bytes = (size_t)base.model.N * base.config.model.dim * sizeof(real_t);
    for (int k = 0; k < KINDS; k++) {
        Trainer t;
        trainer_open(&t, kinds[k]);
        real_t *found = hidden_of(&t);
        assert_memory_equal(found, expected, bytes);
        assert_true(*t.model.step_loss == *base.model.step_loss);
        free(found);
        for (int i = 0; i < t.model.tensors.count; i++) {
            const Tensor *tensor = &t.model.tensors.items[i];
            for (size_t j = 0; tensor->adapter && j < tensor->count; j++) {
                t.model.master[tensor->offset + j] += (acc_t)0.1;
            }
        }
        found = hidden_of(&t);
        assert_memory_not_equal(found, expected, bytes);
        free(found);
        trainer_close(&t);
    }
    free(expected);
    trainer_close(&base);
}

/* ---- what moves */

/* After some steps frozen tensors have their bits, every other tensor has not, and no frozen matrix but a router's got
 * a gradient. */
static void check_what_moves(const char *options) {
    Trainer t;
    trainer_open(&t, options);
    acc_t *before = copy_flat(&t, t.model.master);
    for (int i = 0; i < t.model.tensors.count; i++) {
        const Tensor *tensor = &t.model.tensors.items[i];
        if (!freeze_wants_gradient(tensor) && tensor->kind != TENSOR_STATE) {
            poison(t.model.grads, tensor->offset, NAN);
        }
    }
    while (t.step < 4) {
        assert_true(isfinite(train_step(&t)));
        if (t.step == 1) { /* cleared by the optimizer, or left alone: never read */
            for (int i = 0; i < t.model.tensors.count; i++) {
                const Tensor *tensor = &t.model.tensors.items[i];
                bool idle = !freeze_wants_gradient(tensor) && tensor->kind != TENSOR_STATE;
                if (idle && tensor->grad_overwritten != isnan(t.model.grads[tensor->offset])) {
                    fail_msg("%s: %s got a gradient", options, tensor->name);
                }
            }
        }
    }
    assert_int_equal(t.optimizer.state->skipped, 0);
    for (int i = 0; i < t.model.tensors.count; i++) {
        const Tensor *tensor = &t.model.tensors.items[i];
        size_t bytes = tensor->count * sizeof(acc_t);
        bool same = !memcmp(t.model.master + tensor->offset, before + tensor->offset, bytes);
        if (same != tensor->frozen) {
            fail_msg("%s: %s %s", options, tensor->name, same ? "stayed" : "moved");
        }
        if (config_has_adapters(&t.config.model) && tensor->frozen == tensor->adapter) {
            fail_msg("%s: %s is %s", options, tensor->name, tensor->frozen ? "frozen" : "trained");
        }
    }
    free(before);
    trainer_close(&t);
}

static void test_frozen_bits_stay(void **state) {
    for (int k = 0; k < KINDS; k++) {
        check_what_moves(kinds[k]);
    }
    check_what_moves("--perft e --perft-rank 3 --router sigmoid --shared-experts 1 --batch 8 --grad-accum 2");
    check_what_moves("--perft s --perft-rank 3 --moe-every 2 --tie 1 --router threshold");
    check_what_moves("--freeze all-but-router --renorm 0");
    check_what_moves("--freeze all-but-router --router top1 --shared-experts 1 --moe-every 2");
}

/* The adapters' router learns from the loss itself, not from the balance loss alone, as soon as B is no longer zero:
 * its weights are its own probabilities. */
static void test_router_of_adapters_learns_from_the_loss(void **state) {
    Trainer t;
    trainer_open(&t, "--perft r --perft-rank 4 --perft-aux-coef 0 --warmup 0 --weight-decay 0");
    const acc_t *load = t.model.perft_load;
    acc_t *before = copy_flat(&t, t.model.master);
    train_step(&t);
    train_step(&t);
    StepFigures figures = read_figures(&t);
    assert_true(figures.perft && figures.perft_main_gradient > 0 && figures.perft_balance_gradient == 0);
    assert_true(figures.norms.router > 0); /* the model's are frozen */
    assert_true(figures.perft_aux >= 1 - 1e-6 && figures.perft_entropy > 0);
    figures_free(&figures);
    for (int l = 0; l < t.config.model.layers; l++) {
        char name[64];
        snprintf(name, sizeof name, "layers.%d.perft.router.w", l);
        const Tensor *router = &t.model.tensors.items[tensors_find(&t.model.tensors, name)];
        assert_true(load[l * LOAD_VALUES + LOAD_MAIN_GRADIENT] > 0);
        assert_true(load[l * LOAD_VALUES + LOAD_BALANCE_GRADIENT] == 0);
        assert_memory_not_equal(t.model.master + router->offset, before + router->offset,
                                router->count * sizeof(acc_t));
    }
    free(before);
    trainer_close(&t);
}

/* ---- how much is trained */

static size_t trainable(const char *options) {
    Config config;
    config_defaults(&config);
    set_options(&config, BASE); /* C 32, 4 heads of 8, 2 of keys and values, 4 experts, 2 layers */
    set_options(&config, options);
    config_finish(&config);
    TensorList list = whole_tensors(&config.model);
    freeze_tensors(&list, &config);
    size_t count = freeze_trainable(&list);
    tensors_free(&list);
    return count;
}

/* The arithmetic of perft.h, and settings of equal size. */
static void test_trainable_parameters(void **state) {
    size_t L = 2, C = 32, E = 4, R = 4, M = 3;
    assert_int_equal(trainable("--perft r --perft-rank 4 --perft-count 3"), L * M * (2 * C * R + C));
    assert_int_equal(trainable("--perft e --perft-rank 4"), L * E * 2 * C * R);
    assert_int_equal(trainable("--perft d --perft-rank 4 --perft-count 3"), L * M * 2 * C * R);
    assert_int_equal(trainable("--perft s --perft-rank 4"), L * 2 * C * R);
    assert_int_equal(trainable("--lora attention --perft-rank 4"), L * ((C + 64) * R + (C + C) * R));
    assert_int_equal(trainable("--freeze all-but-router"), L * E * C);
    assert_int_equal(trainable("--perft s --perft-rank 16"), trainable("--perft d --perft-rank 4 --perft-count 4"));
    assert_int_equal(trainable("--perft s --perft-rank 16"), trainable("--perft e --perft-rank 4"));
    Config plain;
    config_defaults(&plain);
    set_options(&plain, BASE);
    config_finish(&plain);
    TensorList list = whole_tensors(&plain.model);
    assert_int_equal(trainable(""), tensors_parameters(&list));
    tensors_free(&list);
}

/* ---- checkpoints */

static void keep_run(Trainer *t, const char *name) {
    char error[512];
    Log log;
    LogHeader header = {.device = "test"};
    Progress at = {.step = t->step};
    snprintf(t->config.train.out, CONFIG_TEXT, "%s", in_root(name));
    log_open(&log, &t->config, &header, -1);
    log_close(&log);
    bool saved = training_save(&t->config, &t->model, &t->optimizer, &at, error, sizeof error);
    if (!saved) {
        fail_msg("%s", error);
    }
}

/* Weights of a run without adapters, then some steps; saved half-way and gone on with, the same bits come out, moments
 * too. What is imported is the run's, and fresh adapters are what they are without it. */
static void test_tuning_a_run(void **state) {
    Trainer base;
    trainer_open(&base, "");
    train_step(&base);
    train_step(&base);
    keep_run(&base, "base");
    for (int k = 0; k < KINDS; k++) {
        Trainer whole, half, rest;
        char name[32];
        snprintf(name, sizeof name, "tuned%d", k);
        trainer_open(&whole, kinds[k]);
        acc_t *fresh = copy_flat(&whole, whole.model.master);
        snprintf(whole.config.train.init_from, CONFIG_TEXT, "%s", in_root("base"));
        import_part(whole.model.master, &whole.model.tensors, &whole.config);
        for (int i = 0; i < whole.model.tensors.count; i++) {
            const Tensor *tensor = &whole.model.tensors.items[i];
            int there = tensors_find(&base.model.tensors, tensor->name);
            assert_int_equal(there < 0, tensor->adapter);
            const acc_t *expected =
                there < 0 ? fresh + tensor->offset : base.model.master + base.model.tensors.items[there].offset;
            assert_memory_equal(whole.model.master + tensor->offset, expected, tensor->count * sizeof(acc_t));
        }
        trainer_open(&half, kinds[k]);
        memcpy(half.model.master, whole.model.master, flat_bytes(&whole));
        while (whole.step < 4) {
            train_step(&whole);
        }
        train_step(&half);
        train_step(&half);
        keep_run(&half, name);
        trainer_open(&rest, kinds[k]);
        snprintf(rest.config.train.resume, CONFIG_TEXT, "%s", in_root(name));
        rest.step = training_load(&rest.config, &rest.model, &rest.optimizer).step;
        assert_int_equal(rest.step, 2);
        transformer_set_step(&rest.model, rest.step, NULL);
        while (rest.step < 4) {
            train_step(&rest);
        }
        assert_memory_equal(rest.model.master, whole.model.master, flat_bytes(&whole));
        assert_memory_equal(rest.optimizer.m, whole.optimizer.m, flat_bytes(&whole));
        assert_memory_equal(rest.optimizer.v, whole.optimizer.v, flat_bytes(&whole));
        free(fresh);
        trainer_close(&whole);
        trainer_close(&half);
        trainer_close(&rest);
    }
    trainer_close(&base);
}

/* ---- refusals */

static void test_refusals(void **state) {
    static const char *const refused[][2] = {
        {"--perft x", "one of none|r|e|d|s"},
        {"--lora experts", "one of none|attention"},
        {"--perft r --perft-top-k 5", "--perft-top-k 5 is above --perft-count 4: lower the one or raise the other"},
        {"--perft s --perft-count 2", "--perft-count is for --perft r and d, not s: drop it"},
        {"--perft d --perft-top-k 2", "are for --perft r, not d: drop them"},
        {"--perft-rank 8", "add --perft r or --lora attention, or drop"},
        {"--perft e --router dense", "--perft e adapts experts, but --router dense has none: use --lora attention"},
        {"--perft s --router coe", "not a chain: use --lora attention"},
        {"--lora attention --freeze experts", "freeze everything but their adapters: drop --freeze"},
        {"--perft r --ep 2", "--perft r with --ep 2: its adapters are not spread over ranks; take --ep 1"},
        {"--perft r --perft-rank 0", "--perft-rank 0 is out of range"},
        {"--freeze all", "one of none|experts|router|all-but-router"},
    };
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        assert_command_refused(refused[i][0], refused[i][1]);
    }
    char command[256];
    Trainer base;
    trainer_open(&base, "--router dense");
    keep_run(&base, "dense");
    trainer_close(&base);
    snprintf(command, sizeof command, "--init-from %s --upcycle --perft s", in_root("dense"));
    assert_command_refused(command, "--upcycle makes a router that has to be trained");
}

static int make_root(void **state) {
    return mkdtemp(root) ? 0 : -1;
}

static int remove_root(void **state) {
    char command[160];
    snprintf(command, sizeof command, "rm -r %s", root);
    return system(command);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_fresh_adapters_change_nothing),
        cmocka_unit_test(test_frozen_bits_stay),
        cmocka_unit_test(test_router_of_adapters_learns_from_the_loss),
        cmocka_unit_test(test_trainable_parameters),
        cmocka_unit_test(test_tuning_a_run),
        cmocka_unit_test(test_refusals),
    };
    omp_set_num_threads(1);
    return cmocka_run_group_tests_name("fine-tuning", tests, make_root, remove_root);
}
