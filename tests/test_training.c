/* Training as a whole: steps that are the same bits for any number of threads, over a resume and in any layout, and
 * almost the same in slices. What a token may see is in test_causality.c.
 *
 * What one step may change, what is reported of it and that the loss falls is in test_steps.c; operations are tested in
 * test_ops_*.c, gradients in test_model_grad.c. Read next: trainer.h, train.c.
 */
#define _GNU_SOURCE /* nftw */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <ftw.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "threads.h"
#include "trainer.h"

#include "../kernels/random.h"
#include "../model/balance.h"
#include "../model/checkpoint.h"

/* ---- the same bits */

/* Weights, both moments and the optimizer's counters. */
static void assert_same_state(const Trainer *a, const Trainer *b) {
    assert_int_equal(a->model.tensors.total, b->model.tensors.total);
    assert_memory_equal(a->model.master, b->model.master, flat_bytes(a));
    assert_memory_equal(a->optimizer.m, b->optimizer.m, flat_bytes(a));
    assert_memory_equal(a->optimizer.v, b->optimizer.v, flat_bytes(a));
    assert_int_equal(a->optimizer.state->updates, b->optimizer.state->updates);
    assert_int_equal(a->optimizer.state->skipped, b->optimizer.state->skipped);
    assert_memory_equal(a->model.step_loss, b->model.step_loss, sizeof *a->model.step_loss);
    assert_int_equal(a->step, b->step);
}

static void test_same_bits_for_any_threads(void **state) {
    static const char *const options[] = {
        "--shared-experts 1 --moe-every 2",
        "--router top1 --tie 1 --act gelu --capacity-factor 0.8 --drop weight --allow-leak 1 --layout padded",
        "--router dense --grad-accum 2",
    };
    enum { STEPS = 20 };
    static const int threads[] = {1, 2, 4};
    for (size_t i = 0; i < sizeof options / sizeof *options; i++) {
        Trainer runs[3];
        double losses[3][STEPS];
        for (int r = 0; r < 3; r++) {
            omp_set_num_threads(threads[r]);
            trainer_open(&runs[r], options[i]);
            for (int s = 0; s < STEPS; s++) {
                losses[r][s] = train_step(&runs[r]);
            }
            assert_memory_equal(losses[r], losses[0], sizeof losses[0]);
            assert_same_state(&runs[r], &runs[0]);
        }
        assert_true(losses[0][STEPS - 1] < losses[0][0]);
        for (int r = 0; r < 3; r++) {
            trainer_close(&runs[r]);
        }
    }
    omp_set_num_threads(1);
}

static int remove_entry(const char *path, const struct stat *status, int type, struct FTW *place) {
    return remove(path);
}

static void save(const Trainer *t, const char *run) {
    char error[512], *json = config_to_json(&t->config);
    CheckpointState state = {.tensors = &t->model.tensors,
                             .weights = copy_flat(t, t->model.master),
                             .m = copy_flat(t, t->optimizer.m),
                             .v = copy_flat(t, t->optimizer.v),
                             .step = t->step,
                             .adam_step = t->optimizer.state->updates,
                             .skipped = t->optimizer.state->skipped};
    if (!checkpoint_save(run, &state, json, error, sizeof error)) {
        fail_msg("not saved: %s", error);
    }
    free(state.weights);
    free(state.m);
    free(state.v);
    free(json);
}

static void load(Trainer *t, const char *run) {
    CheckpointState state = {.tensors = &t->model.tensors,
                             .weights = copy_flat(t, t->model.master),
                             .m = copy_flat(t, t->optimizer.m),
                             .v = copy_flat(t, t->optimizer.v)};
    checkpoint_load(run, &state);
    transformer_load(&t->model, state.weights);
    device_from_host(t->optimizer.m, state.m, flat_bytes(t), NULL);
    device_from_host(t->optimizer.v, state.v, flat_bytes(t), NULL);
    *t->optimizer.state = (AdamState){.updates = state.adam_step, .skipped = state.skipped};
    t->step = state.step;
    free(state.weights);
    free(state.m);
    free(state.v);
}

/* Each tensor's gradient that the first backward of a step overwrites becomes NaN. The others must be zero, those of
 * frozen experts too, which are not made. */
static void spoil_gradients(Trainer *t) {
    int spoiled = 0;
    for (int i = 0; i < t->model.tensors.count; i++) {
        const Tensor *tensor = &t->model.tensors.items[i];
        bool overwritten = tensor->grad_overwritten && !tensor->frozen;
        for (size_t j = tensor->offset; j < tensor->offset + tensor->count; j++) {
            assert_true(overwritten || t->model.grads[j] == 0);
            t->model.grads[j] = overwritten ? (acc_t)NAN : 0;
        }
        spoiled += tensor->grad_overwritten;
    }
    assert_true(spoiled >= 2 * t->config.model.layers);
}

/* A step that overwrites gradients gives the same bits as one that finds zeros everywhere and adds, whatever the step
 * before has left: NaN after a skipped one, say. */
static void test_overwriting_is_adding_to_zeros(void **state) {
    static const char *const options[] = {
        "--router topk --capacity-factor 0.5 --allow-leak 1",
        "--router topk --experts 16 --batch 2 --seq 4 --top-k 1 --renorm 0",
        "--router topk --shared-experts 1 --grad-accum 2 --moe-every 2",
        "--router expert-choice --allow-leak 1",
        "--router coe --chain-steps 2 --grad-accum 2",
        "--router coe --chain-steps 3 --shared-experts 1",
        "--router coe --chain-steps 3 --chain-norm 1",
        "--router soft --allow-leak 1",
        "--router soft-token --grad-accum 2",
        "--router dense --grad-accum 2",
        "--router topk --freeze experts",
        "--perft e --perft-rank 3 --grad-accum 2",
        "--perft r --perft-rank 3 --grad-accum 2",
    };
    enum { STEPS = 4, POISON = 1 };
    for (size_t i = 0; i < sizeof options / sizeof *options; i++) {
        Trainer t, zeros;
        trainer_open(&t, options[i]);
        trainer_open(&zeros, options[i]);
        while (t.step < STEPS) {
            spoil_gradients(&t);
            device_zero(zeros.model.grads, flat_bytes(&zeros), NULL);
            for (int slice = 0; slice < t.model.slices; slice++) {
                read_slice(&t, SPLIT_TRAIN, t.step, slice);
                read_slice(&zeros, SPLIT_TRAIN, t.step, slice);
                slice_gradient(&t, slice);
                transformer_forward(&zeros.model, zeros.tokens, slice, NULL);
                transformer_loss(&zeros.model, zeros.targets, slice, true, NULL);
                transformer_backward(&zeros.model, zeros.tokens, 1, NULL); /* any but the first adds */
            }
            assert_memory_equal(t.model.grads, zeros.model.grads, flat_bytes(&t));
            if (t.step == POISON) {
                poison(t.model.step_loss, 0, NAN);
                poison(zeros.model.step_loss, 0, NAN);
            }
            finish_step(&t);
            finish_step(&zeros);
            assert_same_state(&t, &zeros);
        }
        assert_int_equal(t.optimizer.state->skipped, 1);
        trainer_close(&t);
        trainer_close(&zeros);
    }
}

/* A step is skipped on the way, so that steps and updates are not the same number. */
static void test_resume_is_uninterrupted(void **state) {
    enum { STEPS = 12, POISON = 3 };
    static const int splits[] = {1, 7, STEPS - 1};
    char run[] = "/tmp/test_training_XXXXXX";
    assert_non_null(mkdtemp(run));
    Trainer whole;
    trainer_open(&whole, "--steps 12 --shared-experts 1");
    whole.poison_step = POISON;
    while (whole.step < STEPS) {
        train_step(&whole);
    }
    assert_int_equal(whole.optimizer.state->skipped, 1);
    assert_int_equal(whole.optimizer.state->updates, STEPS - 1);
    for (int i = 0; i < 3; i++) {
        Trainer before, after;
        trainer_open(&before, "--steps 12 --shared-experts 1");
        before.poison_step = POISON;
        while (before.step < splits[i]) {
            train_step(&before);
        }
        save(&before, run);
        trainer_close(&before);
        trainer_open(&after, "--steps 12 --shared-experts 1");
        load(&after, run);
        assert_int_equal(after.step, splits[i]);
        after.poison_step = POISON;
        while (after.step < STEPS) {
            train_step(&after);
        }
        assert_same_state(&after, &whole);
        trainer_close(&after);
    }
    trainer_close(&whole);
    assert_int_equal(nftw(run, remove_entry, 8, FTW_DEPTH | FTW_PHYS), 0);
}

/* Where nobody is dropped, padding changes where rows lie and no result. */
static void test_padded_equals_compact(void **state) {
    static const char *const padded[] = {"--shared-experts 1 --layout padded",
                                         "--shared-experts 1 --layout padded --capacity-factor 2"};
    for (int i = 0; i < 2; i++) {
        Trainer a, b;
        trainer_open(&a, "--shared-experts 1");
        trainer_open(&b, padded[i]);
        while (a.step < 5) {
            train_step(&a);
            train_step(&b);
            for (int l = 0; l < b.model.moe_count; l++) {
                assert_true(b.model.load[l * LOAD_VALUES + LOAD_DROPPED] == 0);
            }
            assert_same_state(&a, &b);
        }
        trainer_close(&a);
        trainer_close(&b);
    }
}

/* ---- slices */

/* |a - b| / |b| over a flat buffer. */
static double relative_difference(const acc_t *a, const acc_t *b, size_t count) {
    double wrong = 0, all = 0;
    for (size_t i = 0; i < count; i++) {
        wrong += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        all += (double)b[i] * b[i];
    }
    return sqrt(wrong / all);
}

static void test_slices_equal_one_batch(void **state) {
    static const char *const routers[] = {"topk", "top1", "dense"};
    for (int i = 0; i < 3; i++) {
        Trainer runs[3];
        for (int r = 0; r < 3; r++) {
            char options[128];
            snprintf(options, sizeof options, "--aux-coef 0 --z-coef 0 --router %s --grad-accum %d", routers[i],
                     1 << r);
            trainer_open(&runs[r], options);
            while (runs[r].step < 3) {
                train_step(&runs[r]);
            }
            double error = relative_difference(runs[r].model.master, runs[0].model.master, runs[0].model.tensors.total);
            if (!(error <= 1e-6)) {
                fail_msg("%s in %d slices: weights differ by %g", routers[i], 1 << r, error);
            }
        }
        for (int r = 0; r < 3; r++) {
            trainer_close(&runs[r]);
        }
    }
}

int main(void) {
    omp_set_num_threads(
        1); /* threads have their own test; for models this small, starting threads would be all the work */
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_same_bits_for_any_threads), cmocka_unit_test(test_overwriting_is_adding_to_zeros),
        cmocka_unit_test(test_resume_is_uninterrupted),   cmocka_unit_test(test_padded_equals_compact),
        cmocka_unit_test(test_slices_equal_one_batch),
    };
    return cmocka_run_group_tests_name("training", tests, NULL, NULL);
}
