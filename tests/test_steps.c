// link: -Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc,--wrap=aligned_alloc,--wrap=posix_memalign
/* The steps of a run: what one may change and what it may not, the learning rate, what is reported, the alarms; that
 * the loss falls, and never below what is possible.
 *
 * That a run is the same bits however it is computed is in test_training.c. Read next: trainer.h, model/optimizer.c,
 * model/figures.c, model/evaluate.c.
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

#include "threads.h"
#include "trainer.h"

#include "../model/evaluate.h"
#include "../model/figures.h"

/* |value - expected| <= tolerance. */
#define assert_near(value, expected, tolerance)                                 \
    do {                                                                        \
        double value_ = (value), expected_ = (expected);                        \
        if (!(fabs(value_ - expected_) <= (tolerance))) {                       \
            fail_msg("%s is %.17g, expected %.17g", #value, value_, expected_); \
        }                                                                       \
    } while (0)

/* ---- allocations are counted: the linker sends every call of the program here */

static int allocations;

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *old, size_t size);
void *__real_aligned_alloc(size_t alignment, size_t size);
int __real_posix_memalign(void **out, size_t alignment, size_t size);

void *__wrap_malloc(size_t size) {
    allocations++;
    return __real_malloc(size);
}

void *__wrap_calloc(size_t count, size_t size) {
    allocations++;
    return __real_calloc(count, size);
}

void *__wrap_realloc(void *old, size_t size) {
    allocations++;
    return __real_realloc(old, size);
}

void *__wrap_aligned_alloc(size_t alignment, size_t size) {
    allocations++;
    return __real_aligned_alloc(alignment, size);
}

int __wrap_posix_memalign(void **out, size_t alignment, size_t size) {
    allocations++;
    return __real_posix_memalign(out, alignment, size);
}

/* ---- what a step may change */

static const Tensor *tensor_named(const Trainer *t, const char *name) {
    for (int i = 0; i < t->model.tensors.count; i++) {
        if (!strcmp(t->model.tensors.items[i].name, name)) {
            return &t->model.tensors.items[i];
        }
    }
    fail_msg("there is no tensor %s", name);
    return NULL;
}

/* A step whose gradients, loss or weights are not finite leaves everything as it was but the count of skipped steps. */
static void test_step_that_is_not_finite(void **state) {
    static const double bad[] = {NAN, INFINITY, -INFINITY};
    for (int where = 0; where < 3; where++) { /* gradient, loss, weight */
        Trainer t;
        trainer_open(&t, "--steps 100");
        for (int i = 0; i < 3; i++) {
            train_step(&t);
        }
        const Tensor *w = tensor_named(&t, "layers.1.moe.experts.w2");
        for (int i = 0; i < 3; i++) {
            acc_t *before = copy_flat(&t, t.model.master), *m = copy_flat(&t, t.optimizer.m),
                  *v = copy_flat(&t, t.optimizer.v);
            if (where == 2) {
                poison(t.model.master, w->offset + 5, bad[i]);
                poison(before, w->offset + 5, bad[i]);
            }
            read_slice(&t, SPLIT_TRAIN, t.step, 0);
            slice_gradient(&t, 0);
            if (where == 0) {
                poison(t.model.grads, w->offset + 5, bad[i]);
            } else if (where == 1) {
                poison(t.model.step_loss, 0, bad[i]);
            }
            finish_step(&t);
            assert_memory_equal(t.model.master, before, flat_bytes(&t));
            assert_memory_equal(t.optimizer.m, m, flat_bytes(&t));
            assert_memory_equal(t.optimizer.v, v, flat_bytes(&t));
            assert_int_equal(t.optimizer.state->skipped, i + 1);
            assert_int_equal(t.optimizer.state->skipped_in_row, i + 1);
            assert_int_equal(t.optimizer.state->updates, 3);
            poison(t.model.master, w->offset + 5, 0.01); /* repaired; for the other cases a small change */
            free(before);
            free(m);
            free(v);
        }
        acc_t *before = copy_flat(&t, t.model.master);
        assert_true(isfinite(train_step(&t)));
        assert_memory_not_equal(t.model.master, before, flat_bytes(&t));
        assert_int_equal(t.optimizer.state->updates, 4);
        assert_int_equal(t.optimizer.state->skipped, 3);
        assert_int_equal(t.optimizer.state->skipped_in_row, 0);
        for (size_t i = 0; i < t.model.tensors.total; i++) {
            assert_true(isfinite(t.model.master[i]) && isfinite(t.model.grads[i]));
        }
        free(before);
        trainer_close(&t);
    }
}

static void test_frozen_tensors_stay(void **state) {
    static const char *const options[] = {"--freeze experts", "--freeze router", "--freeze none"};
    static const TensorKind frozen[] = {TENSOR_EXPERT, TENSOR_ROUTER, (TensorKind)-1};
    for (int i = 0; i < 3; i++) {
        Trainer t;
        trainer_open(&t, options[i]);
        acc_t *before = copy_flat(&t, t.model.master);
        while (t.step < 3) {
            train_step(&t);
        }
        for (int k = 0; k < t.model.tensors.count; k++) {
            const Tensor *tensor = &t.model.tensors.items[k];
            size_t bytes = tensor->count * sizeof(acc_t);
            bool same = !memcmp(t.model.master + tensor->offset, before + tensor->offset, bytes);
            if (same != (tensor->kind == frozen[i])) {
                fail_msg("%s: %s %s", options[i], tensor->name, same ? "stayed" : "moved");
            }
        }
        free(before);
        trainer_close(&t);
    }
}

/* Without gradients a step is decay alone: matrices shrink by lr * decay, vectors keep their bits. */
static void test_decay_is_for_matrices(void **state) {
    Trainer t;
    trainer_open(&t, "--warmup 0 --lr 0.1 --weight-decay 0.5");
    acc_t *before = copy_flat(&t, t.model.master);
    finish_step(&t);
    int matrices = 0, vectors = 0;
    for (int k = 0; k < t.model.tensors.count; k++) {
        const Tensor *tensor = &t.model.tensors.items[k];
        const acc_t *w = t.model.master + tensor->offset, *old = before + tensor->offset;
        if (tensor->ndim == 1) {
            assert_memory_equal(w, old, tensor->count * sizeof(acc_t));
            vectors++;
            continue;
        }
        for (size_t i = 0; i < tensor->count; i++) {
            assert_true(fabs(w[i] - old[i] * (1 - 0.1 * 0.5)) <= 2e-7 * fabs(old[i]));
        }
        matrices++;
    }
    assert_true(matrices >= 10 && vectors >= 9);
    free(before);
    trainer_close(&t);
}

static void test_no_allocation_in_a_step(void **state) {
    static const char *const options[] = {"--shared-experts 1 --grad-accum 2", "--router top1 --capacity-factor 1",
                                          "--router dense"};
    for (int i = 0; i < 3; i++) {
        Trainer t;
        trainer_open(&t, options[i]);
        train_step(&t);
        read_slice(&t, SPLIT_TRAIN, t.step, 0);
        int before = allocations;
        for (int step = 0; step < 2; step++) {
            for (int slice = 0; slice < t.model.slices; slice++) {
                slice_gradient(&t, slice);
            }
            finish_step(&t);
        }
        assert_int_equal(allocations, before);
        free(copy_flat(&t, t.model.master)); /* the count does count */
        assert_true(allocations > before);
        trainer_close(&t);
    }
}

/* ---- schedules */

static double rate(int schedule, int warmup, int steps, int step) {
    TrainConfig train = {.lr = 0.5, .min_lr = 0.1, .warmup = warmup, .steps = steps, .schedule = schedule};
    return learning_rate(&train, step);
}

/* What is made again in the backward is what was there, and takes less memory. */
static void test_recompute_gives_the_same_bits(void **state) {
    static const char *const models[] = {"--steps 100",
                                         "--router dense --act gelu",
                                         "--shared-experts 1 --tie 1",
                                         "--router soft --slots 2 --allow-leak 1",
                                         "--router coe --layers 3",
                                         "--perft e --perft-rank 3 --lora attention",
                                         "--perft r --perft-rank 5"};
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        Trainer kept, again;
        size_t bytes = 0;
        for (int level = RECOMPUTE_NORMS; level <= RECOMPUTE_EXPERTS; level++) {
            char options[128];
            snprintf(options, sizeof options, "%s --recompute %s", models[i],
                     level == RECOMPUTE_NORMS ? "norms" : "experts");
            trainer_open(&kept, models[i]);
            trainer_open(&again, options);
            bytes = bytes ? bytes : kept.arena.bytes;
            assert_true(again.arena.bytes < bytes);
            bytes = again.arena.bytes;
            for (int step = 0; step < 4; step++) {
                assert_true(train_step(&kept) == train_step(&again));
            }
            assert_memory_equal(kept.model.master, again.model.master, flat_bytes(&kept));
            trainer_close(&kept);
            trainer_close(&again);
        }
    }
}

static void test_schedules(void **state) {
    enum { WARMUP = 10, STEPS = 110 };
    static const int schedules[] = {SCHEDULE_COSINE, SCHEDULE_CONSTANT, SCHEDULE_WSD};
    for (int i = 0; i < 3; i++) {
        int schedule = schedules[i];
        assert_near(rate(schedule, WARMUP, STEPS, 0), 0.5 / WARMUP, 1e-15);
        assert_near(rate(schedule, WARMUP, STEPS, 4), 0.5 * 5 / WARMUP, 1e-15);
        assert_near(rate(schedule, WARMUP, STEPS, WARMUP - 1), 0.5, 1e-15);
        assert_near(rate(schedule, WARMUP, STEPS, WARMUP), 0.5, 1e-15);
        assert_near(rate(schedule, 0, STEPS, 0), 0.5, 1e-15);
        assert_near(rate(schedule, STEPS, STEPS, STEPS - 1), 0.5, 1e-15); /* warm-up alone */
        for (int step = WARMUP; step < STEPS; step++) {
            double here = rate(schedule, WARMUP, STEPS, step), next = rate(schedule, WARMUP, STEPS, step + 1);
            assert_true(here >= next && next >= 0.05 - 1e-15);
        }
    }
    assert_near(rate(SCHEDULE_CONSTANT, WARMUP, STEPS, 60), 0.5, 1e-15);
    assert_near(rate(SCHEDULE_CONSTANT, WARMUP, STEPS, STEPS - 1), 0.5, 1e-15);

    assert_near(rate(SCHEDULE_COSINE, WARMUP, STEPS, 60), 0.05 + 0.45 * 0.5, 1e-15);
    assert_near(rate(SCHEDULE_COSINE, WARMUP, STEPS, 35), 0.05 + 0.45 * 0.5 * (1 + sqrt(0.5)), 1e-15);
    assert_near(rate(SCHEDULE_COSINE, WARMUP, STEPS, STEPS - 1), 0.05 + 0.45 * 0.5 * (1 + cos(M_PI * 0.99)), 1e-15);
    assert_near(rate(SCHEDULE_COSINE, WARMUP, STEPS, STEPS), 0.05, 1e-15);

    assert_near(rate(SCHEDULE_WSD, WARMUP, STEPS, 60), 0.5, 1e-15);
    assert_near(rate(SCHEDULE_WSD, WARMUP, STEPS, 88), 0.5, 1e-14);
    assert_near(rate(SCHEDULE_WSD, WARMUP, STEPS, 99), 0.05 + 0.45 * 0.5, 1e-14);
    assert_near(rate(SCHEDULE_WSD, WARMUP, STEPS, STEPS - 1), 0.05 + 0.45 / 22, 1e-14);
    assert_near(rate(SCHEDULE_WSD, WARMUP, STEPS, STEPS), 0.05, 1e-15);
}

/* ---- what training and evaluation report */

static void assert_load(LoadSummary s, double cv, double kl, double max_vio, int dead) {
    assert_near(s.cv, cv, 1e-14);
    assert_near(s.kl, kl, 1e-14);
    assert_near(s.max_vio, max_vio, 1e-14);
    assert_int_equal(s.dead, dead);
}

static void test_load_summary(void **state) {
    assert_load(load_summary((double[]){7, 7, 7, 7}, 4), 0, 0, 0, 0);
    assert_load(load_summary((double[]){0, 0, 12, 0}, 4), sqrt(3), log(4), 3, 3);
    assert_load(load_summary((double[]){3, 1}, 2), 0.5, 0.75 * log(1.5) + 0.25 * log(0.5), 0.5, 0);
    assert_load(load_summary((double[]){5, 5, 0, 0}, 4), 1, log(2), 1, 2);
    assert_load(load_summary((double[]){9}, 1), 0, 0, 0, 0);
    assert_load(load_summary((double[]){0, 0, 0}, 3), 0, 0, 0, 3);
}

static void test_mutual_information(void **state) {
    const double independent[] = {1, 2, 3, 10, 20, 30}, diagonal[] = {5, 0, 0, 0, 5, 0, 0, 0, 5};
    const double mixed[] = {1, 0, 1, 2}, swapped[] = {1, 1, 0, 2}, uneven[] = {3, 0, 0, 1}, none[4] = {0};
    double expected = 0.25 * log(2) + 0.25 * log(2.0 / 3) + 0.5 * log(4.0 / 3);
    assert_near(mutual_information(independent, 2, 3), 0, 1e-14);
    assert_near(mutual_information(diagonal, 3, 3), log(3), 1e-14);
    assert_near(mutual_information(mixed, 2, 2), expected, 1e-14);
    assert_near(mutual_information(swapped, 2, 2), expected, 1e-14);
    assert_near(mutual_information(uneven, 2, 2), -0.75 * log(0.75) - 0.25 * log(0.25), 1e-14);
    assert_near(mutual_information(none, 2, 2), 0, 0);
}

/* Evaluates `batches` validation batches; *mean_loss gets the mean of their losses, added another way. */
static Evaluation evaluate(Trainer *t, int batches, double *mean_loss) {
    Choices choices = {0};
    Evaluation e = evaluation_start(&t->model, corpus_domains(t->corpus), &choices);
    *mean_loss = 0;
    for (int i = 0; i < batches; i++) {
        read_slice(t, SPLIT_VAL, i, 0);
        transformer_forward(&t->model, t->tokens, 0, NULL);
        transformer_loss(&t->model, t->targets, 0, false, NULL);
        evaluation_add(&e, &t->model, t->targets, t->domain, t->floor, t->bytes, NULL);
        *mean_loss += (double)t->model.slice_loss[0] / batches;
    }
    evaluation_finish(&e, corpus_bytes_per_token(t->corpus));
    choices_free(&choices);
    return e;
}

static void test_evaluation_sums(void **state) {
    enum { BATCHES = 3 };
    Trainer t;
    trainer_open(&t, "");
    while (t.step < 5) {
        train_step(&t);
    }
    double mean_loss, loss = 0, floor = 0;
    Evaluation e = evaluate(&t, BATCHES, &mean_loss);
    int64_t tokens = 0;
    for (int d = 0; d < e.domains; d++) {
        if (e.domain_tokens[d] > 0) {
            tokens += e.domain_tokens[d];
            loss += e.domain_loss[d] * (double)e.domain_tokens[d];
            floor += e.domain_floor[d] * (double)e.domain_tokens[d];
        }
        for (int l = 0; l < e.moe_count; l++) {
            double choices = 0;
            for (int i = 0; i < e.E; i++) {
                choices += e.domain_expert[(l * e.domains + d) * e.E + i];
            }
            assert_true(choices == 2.0 * (double)e.domain_tokens[d]);
        }
    }
    assert_int_equal(tokens, BATCHES * t.model.N);
    assert_near(e.loss, loss / (double)tokens, 1e-12);
    assert_near(e.floor, floor / (double)tokens, 1e-12);
    assert_near(e.loss, mean_loss, 1e-5);
    assert_near(e.bits_per_byte, e.loss / log(2), 1e-12); /* a token is a byte */
    assert_true(e.floor > 0.1 && e.floor < e.loss);
    for (int l = 0; l < e.moe_count; l++) {
        assert_true(e.information[l] >= 0 && e.information[l] <= log(e.E));
    }
    evaluation_free(&e);

    const Tensor *head = tensor_named(&t, "head.w"); /* equal logits: every token has probability 1/V */
    memset(t.model.master + head->offset, 0, head->count * sizeof(acc_t));
    e = evaluate(&t, 1, &mean_loss);
    assert_near(e.loss, log(128), 1e-5);
    assert_near(e.bits_per_byte, 7, 1e-5);
    evaluation_free(&e);
    trainer_close(&t);
}

/* The reported norms are those of the gradient before clipping; a router that gets no gradient is reported with 0. */
static void test_gradient_norms(void **state) {
    for (int renormalised = 0; renormalised <= 1; renormalised++) {
        Trainer t;
        trainer_open(&t, "--top-k 1 --renorm 0 --aux-coef 0 --z-coef 0 --clip 1e-3");
        for (int l = 0; l < t.model.moe_count; l++) { /* as an option it is refused */
            t.model.moes[l]->pass.renorm = renormalised;
        }
        read_slice(&t, SPLIT_TRAIN, 0, 0);
        slice_gradient(&t, 0);
        double total = 0, router = 0;
        for (int k = 0; k < t.model.tensors.count; k++) {
            const Tensor *tensor = &t.model.tensors.items[k];
            for (size_t i = 0; i < tensor->count; i++) {
                double g = (double)t.model.grads[tensor->offset + i];
                total += g * g;
                router += tensor->kind == TENSOR_ROUTER ? g * g : 0;
            }
        }
        finish_step(&t);
        StepFigures f = read_figures(&t);
        assert_near(f.norms.total, sqrt(total), 1e-9 * sqrt(total));
        assert_near(f.adam.norm, sqrt(total), 1e-9 * sqrt(total));
        assert_near(f.adam.scale, 1e-3 / sqrt(total), 1e-9);
        assert_near(f.norms.router, sqrt(router), 1e-9 * sqrt(router));
        assert_true(renormalised ? f.norms.router == 0 : f.norms.router > 0);
        assert_true(f.norms.total > f.norms.router);
        figures_free(&f);
        trainer_close(&t);
    }
}

/* With the balance losses on, the norm of a router that the main loss does not reach is not 0; the alarm must ring all
 * the same. */
static void test_alarm_hears_through_the_balance_losses(void **state) {
    for (int renormalised = 0; renormalised <= 1; renormalised++) {
        Trainer t;
        trainer_open(&t, "--top-k 1 --renorm 0 --aux-coef 0.01 --z-coef 0.001");
        for (int l = 0; l < t.model.moe_count; l++) { /* as an option it is refused */
            t.model.moes[l]->pass.renorm = renormalised;
        }
        read_slice(&t, SPLIT_TRAIN, 0, 0);
        slice_gradient(&t, 0);
        finish_step(&t);
        StepFigures f = read_figures(&t);
        assert_true(f.norms.router > 0);
        assert_true(renormalised ? f.main_gradient == 0 : f.main_gradient > 0);
        assert_true((f.layer_main_norm[0] == 0) == renormalised && (f.layer_main_norm[1] == 0) == renormalised);
        figures_free(&f);
        trainer_close(&t);
    }
}

/* ---- learning */

static void test_overfits_one_batch(void **state) {
    static const char *const routers[] = {"topk", "top1", "dense"};
    for (int i = 0; i < 3; i++) {
        char options[160];
        snprintf(
            options, sizeof options,
            "--router %s --batch 2 --seq 24 --steps 400 --schedule constant --warmup 10 --lr 1e-2 --weight-decay 0",
            routers[i]);
        Trainer t;
        trainer_open(&t, options);
        read_slice(&t, SPLIT_TRAIN, 0, 0);
        double loss = INFINITY;
        while (t.step < 200 && !(loss < 0.05)) {
            slice_gradient(&t, 0);
            finish_step(&t);
            loss = (double)*t.model.step_loss;
        }
        if (!(loss < 0.05)) {
            fail_msg("%s: the loss is %g after %lld steps", routers[i], loss, (long long)t.step);
        }
        trainer_close(&t);
    }
}

/* Sixty steps learn more than how often each byte occurs, and nothing gets below the true entropy. */
static void test_loss_between_floor_and_unigram(void **state) {
    enum { STEPS = 60 };
    Trainer t;
    trainer_open(&t, "--batch 16 --seq 48 --steps 60 --warmup 5 --lr 1e-2");
    double counts[128] = {0}, tokens = 0, entropy = 0, last = 0;
    while (t.step < STEPS) {
        double loss = train_step(&t), floor = 0;
        for (int n = 0; n < t.model.N; n++) {
            counts[t.targets[n]]++;
            tokens++;
            floor += t.floor[n] / t.model.N;
        }
        assert_true(loss > floor);
        last += t.step > STEPS - 10 ? loss / 10 : 0;
    }
    for (int v = 0; v < 128; v++) {
        entropy -= counts[v] > 0 ? counts[v] / tokens * log(counts[v] / tokens) : 0;
    }
    if (!(last < entropy - 0.3)) {
        fail_msg("loss %g after %d steps; the unigram entropy is %g", last, STEPS, entropy);
    }
    double mean_loss;
    Evaluation e = evaluate(&t, 4, &mean_loss);
    assert_true(e.loss > e.floor && e.loss < entropy - 0.3);
    for (int d = 0; d < e.domains; d++) {
        assert_true(!(e.domain_loss[d] <= e.domain_floor[d])); /* NAN where a domain did not occur */
    }
    evaluation_free(&e);
    trainer_close(&t);
}

int main(void) {
    omp_set_num_threads(1); /* for models this small, starting threads would be all the work */
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_step_that_is_not_finite),
        cmocka_unit_test(test_frozen_tensors_stay),
        cmocka_unit_test(test_decay_is_for_matrices),
        cmocka_unit_test(test_no_allocation_in_a_step),
        cmocka_unit_test(test_recompute_gives_the_same_bits),
        cmocka_unit_test(test_schedules),
        cmocka_unit_test(test_load_summary),
        cmocka_unit_test(test_mutual_information),
        cmocka_unit_test(test_evaluation_sums),
        cmocka_unit_test(test_gradient_norms),
        cmocka_unit_test(test_alarm_hears_through_the_balance_losses),
        cmocka_unit_test(test_overfits_one_batch),
        cmocka_unit_test(test_loss_between_floor_and_unigram),
    };
    return cmocka_run_group_tests_name("steps", tests, NULL, NULL);
}
