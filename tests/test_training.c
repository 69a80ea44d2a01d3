// link: -Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc,--wrap=aligned_alloc,--wrap=posix_memalign
/* Training as a whole: steps that are the same bits for any number of threads, over a resume and in any layout; what a
 * step may change and what it may not; what a token may see; that the loss falls, and never below what is possible.
 *
 * A Trainer here is train.c's loop without its files: corpus, model, optimizer and one step. Operations are tested in
 * test_ops_*.c, gradients in test_model_grad.c. Read next: train.c, model/optimizer.c.
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

#ifdef _OPENMP
#include <omp.h>
#else
static void omp_set_num_threads(int threads) {
}
#endif

#include "../data/corpus.h"
#include "../kernels/check.h"
#include "../kernels/cross_entropy.h"
#include "../kernels/random.h"
#include "../model/balance.h"
#include "../model/checkpoint.h"
#include "../model/config.h"
#include "../model/evaluate.h"
#include "../model/figures.h"
#include "../model/optimizer.h"
#include "../model/options.h"
#include "../model/transformer.h"

static const char BASE[] =
    "--layers 2 --dim 32 --heads 4 --kv-heads 2 --seq 32 --vocab 128 --experts 4 --top-k 2 --expert-dim 24 --batch 8 "
    "--steps 20 --warmup 4 --lr 3e-3";

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

/* ---- a run without files */

typedef struct {
    Config config;
    Corpus *corpus;
    Arena arena;
    Transformer model;
    Optimizer optimizer;
    int *tokens, *targets; /* (N) of one slice */
    unsigned char *domain;
    double *floor;
    int64_t poison_step; /* the step in which a gradient becomes NaN; -1: none */
    int64_t step;
} Trainer;

/* Sets "--name value" pairs. */
static void set_options(Config *config, const char *options) {
    char copy[512], error[256], *rest = NULL;
    snprintf(copy, sizeof copy, "%s", options);
    for (char *name = strtok_r(copy, " ", &rest); name; name = strtok_r(NULL, " ", &rest)) {
        const char *value = strtok_r(NULL, " ", &rest);
        CHECK(value && option_find(name + 2) >= 0, "a test's option %s is wrong", name);
        CHECK(option_set(config, &option_table[option_find(name + 2)], value, error, sizeof error), "%s", error);
    }
}

static void trainer_open(Trainer *t, const char *options) {
    *t = (Trainer){.poison_step = -1};
    config_defaults(&t->config);
    set_options(&t->config, BASE);
    set_options(&t->config, options);
    config_finish(&t->config);
    const Config *c = &t->config;
    CorpusOptions corpus = {.train = c->train.data,
                            .val = c->train.val,
                            .seq = c->model.seq,
                            .batch = c->train.batch,
                            .vocab = c->model.vocab,
                            .shuffle = c->train.shuffle,
                            .seed = (uint64_t)c->train.seed};
    t->corpus = corpus_open(&corpus);
    int slices = c->train.grad_accum, batch = c->train.batch / slices;
    size_t N = (size_t)batch * c->model.seq;
    transformer_reserve(&t->model, c, batch, slices, USE_TRAIN, NULL, &t->arena);
    optimizer_reserve(&t->optimizer, &t->model.tensors, (Freeze)c->train.freeze, &t->arena);
    arena_reserve(&t->arena, (void **)&t->tokens, N * sizeof(int), MEMORY_ACTIVATIONS);
    arena_reserve(&t->arena, (void **)&t->targets, N * sizeof(int), MEMORY_ACTIVATIONS);
    arena_reserve(&t->arena, (void **)&t->domain, N, MEMORY_ACTIVATIONS);
    arena_reserve(&t->arena, (void **)&t->floor, N * sizeof(double), MEMORY_ACTIVATIONS);
    arena_commit(&t->arena);
    transformer_connect(&t->model);
    tensors_init(&t->model.tensors, t->model.master, (uint64_t)c->train.seed);
}

static void trainer_close(Trainer *t) {
    corpus_close(t->corpus);
    transformer_free(&t->model);
    optimizer_free(&t->optimizer);
    arena_free(&t->arena);
}

static void read_slice(Trainer *t, Split split, int64_t step, int slice) {
    Batch batch = {t->tokens, t->targets, t->domain, t->floor};
    corpus_batch(t->corpus, split, step, slice * t->model.B, t->model.B, &batch);
}

/* Forward, loss and backward of what has been read. */
static void slice_gradient(Trainer *t, int slice) {
    transformer_forward(&t->model, t->tokens, slice, NULL);
    transformer_loss(&t->model, t->targets, slice, true, NULL);
    transformer_backward(&t->model, t->tokens, NULL);
}

static void poison(acc_t *values, size_t at, double value) {
    acc_t bad = (acc_t)value;
    device_from_host(values + at, &bad, sizeof bad, NULL);
}

static void finish_step(Trainer *t) {
    optimizer_step(&t->optimizer, &t->model, &t->config.train, (int)t->step, NULL);
    t->step++;
}

static double train_step(Trainer *t) {
    for (int slice = 0; slice < t->model.slices; slice++) {
        read_slice(t, SPLIT_TRAIN, t->step, slice);
        slice_gradient(t, slice);
    }
    if (t->step == t->poison_step) {
        poison(t->model.grads, t->model.tensors.items[3].offset + 1, NAN);
    }
    finish_step(t);
    return (double)*t->model.step_loss;
}

static size_t flat_bytes(const Trainer *t) {
    return t->model.tensors.total * sizeof(acc_t);
}

static acc_t *copy_flat(const Trainer *t, const acc_t *values) {
    acc_t *copy = malloc(flat_bytes(t));
    assert_non_null(copy);
    host_from_device(copy, values, flat_bytes(t), NULL);
    return copy;
}

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

static const Tensor *tensor_named(const Trainer *t, const char *name) {
    for (int i = 0; i < t->model.tensors.count; i++) {
        if (!strcmp(t->model.tensors.items[i].name, name)) {
            return &t->model.tensors.items[i];
        }
    }
    fail_msg("there is no tensor %s", name);
    return NULL;
}

/* ---- the same bits */

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

/* ---- what a token may see */

/* changed[n]: whether row n of the final hidden state or of the logits differs between the two texts. */
static void compare_texts(Trainer *t, bool *changed, const int *one, const int *other) {
    Transformer *m = &t->model;
    size_t C = (size_t)t->config.model.dim, V = (size_t)t->config.model.vocab, N = (size_t)m->N;
    real_t *hidden = malloc(N * C * sizeof(real_t)), *logits = malloc(N * V * sizeof(real_t));
    assert_true(hidden && logits && m->head_rows == m->N);
    for (int pass = 0; pass < 2; pass++) {
        transformer_forward(m, pass ? other : one, 0, NULL);
        transformer_loss(m, t->targets, 0, false, NULL);
        if (pass == 0) {
            memcpy(hidden, m->hidden, N * C * sizeof(real_t));
            memcpy(logits, m->logits, N * V * sizeof(real_t));
        }
    }
    for (size_t n = 0; n < N; n++) {
        changed[n] = memcmp(hidden + n * C, m->hidden + n * C, C * sizeof(real_t)) != 0 ||
                     memcmp(logits + n * V, m->logits + n * V, V * sizeof(real_t)) != 0;
    }
    free(hidden);
    free(logits);
}

/* Changes all tokens of sequence b after position t. The first row before that which changed, -1 when there is none;
 * *touched: whether a row after it changed. */
static int first_leak(Trainer *trainer, int b, int t, uint64_t seed, bool *touched) {
    int N = trainer->model.N, T = trainer->model.T, V = trainer->config.model.vocab;
    int *other = malloc((size_t)N * sizeof(int));
    bool *changed = malloc((size_t)N * sizeof(bool));
    assert_true(other && changed);
    memcpy(other, trainer->tokens, (size_t)N * sizeof(int));
    for (int i = b * T + t + 1; i < (b + 1) * T; i++) {
        int shift = 1 + (int)random_below(random_key(seed, RANDOM_TEST, 0), (uint64_t)i, (uint64_t)V - 1);
        other[i] = (other[i] + shift) % V;
    }
    compare_texts(trainer, changed, trainer->tokens, other);
    int leak = -1;
    *touched = false;
    for (int n = N - 1; n >= 0; n--) {
        bool later = n > b * T + t && n < (b + 1) * T;
        *touched |= later && changed[n];
        leak = changed[n] && !later ? n : leak;
    }
    free(other);
    free(changed);
    return leak;
}

static void test_no_router_sees_later_tokens(void **state) {
    for (int r = 0; router_at(r); r++) {
        if (!router_at(r)->causal) {
            continue;
        }
        char options[128];
        snprintf(options, sizeof options, "--router %s --batch 3 --seq 21 --lr 1e-2", router_at(r)->name);
        Trainer t;
        trainer_open(&t, options);
        for (int i = 0; i < 10; i++) { /* away from the initial weights, whose attention is nearly uniform */
            train_step(&t);
        }
        for (int i = 0; i < 3 * 20; i++) {
            bool touched;
            int leak = first_leak(&t, i % 3, i / 3, (uint64_t)i, &touched);
            if (leak >= 0 || !touched) {
                fail_msg("%s: tokens after %d of sequence %d change row %d", router_at(r)->name, i / 3, i % 3, leak);
            }
        }
        trainer_close(&t);
    }
}

/* With a capacity, who keeps a place decides whether later tokens are seen: never when earlier tokens come first, but
 * by slot a later token's first choice takes the place of an earlier one's second, and by weight a heavier later one
 * pushes an earlier one out. */
static void test_drop_policies_and_later_tokens(void **state) {
    static const struct {
        const char *drop;
        bool leaks;
    } policies[] = {{"token", false}, {"slot", true}, {"weight", true}};
    for (int p = 0; p < 3; p++) {
        char options[128];
        snprintf(options, sizeof options, "--batch 1 --capacity-factor 0.7 --allow-leak 1 --drop %s", policies[p].drop);
        Trainer t;
        trainer_open(&t, options);
        read_slice(&t, SPLIT_TRAIN, 0, 0);
        int leaks = 0;
        for (int i = 0; i < 4 * (t.model.T - 1); i++) {
            bool touched;
            leaks += first_leak(&t, 0, i / 4, (uint64_t)i, &touched) >= 0;
            assert_true(touched);
        }
        assert_true(t.model.load[LOAD_DROPPED] > 0);
        assert_int_equal(leaks > 0, policies[p].leaks);
        trainer_close(&t);
    }
}

/* ---- what a step may change */

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
            assert_true(isfinite(t.model.master[i]) && t.model.grads[i] == 0);
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
    Evaluation e = evaluation_start(&t->model, corpus_domains(t->corpus));
    *mean_loss = 0;
    for (int i = 0; i < batches; i++) {
        read_slice(t, SPLIT_VAL, i, 0);
        transformer_forward(&t->model, t->tokens, 0, NULL);
        transformer_loss(&t->model, t->targets, 0, false, NULL);
        evaluation_add(&e, &t->model, t->domain, t->floor, NULL);
        *mean_loss += (double)t->model.slice_loss[0] / batches;
    }
    evaluation_finish(&e, corpus_bytes_per_token(t->corpus));
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
            t.model.layers[t.model.moe_layers[l]].moe.pass.renorm = renormalised;
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
        StepFigures f = figures_read(&t.model, &t.optimizer, NULL);
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
            t.model.layers[t.model.moe_layers[l]].moe.pass.renorm = renormalised;
        }
        read_slice(&t, SPLIT_TRAIN, 0, 0);
        slice_gradient(&t, 0);
        finish_step(&t);
        StepFigures f = figures_read(&t.model, &t.optimizer, NULL);
        assert_true(f.norms.router > 0);
        assert_true(renormalised ? f.main_gradient == 0 : f.main_gradient > 0);
        assert_true(renormalised ? f.silent_layer >= 0 : f.silent_layer < 0);
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
    omp_set_num_threads(
        1); /* threads have their own test; for models this small, starting them would be all the work */
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_same_bits_for_any_threads),
        cmocka_unit_test(test_resume_is_uninterrupted),
        cmocka_unit_test(test_padded_equals_compact),
        cmocka_unit_test(test_slices_equal_one_batch),
        cmocka_unit_test(test_no_router_sees_later_tokens),
        cmocka_unit_test(test_drop_policies_and_later_tokens),
        cmocka_unit_test(test_step_that_is_not_finite),
        cmocka_unit_test(test_frozen_tensors_stay),
        cmocka_unit_test(test_decay_is_for_matrices),
        cmocka_unit_test(test_no_allocation_in_a_step),
        cmocka_unit_test(test_schedules),
        cmocka_unit_test(test_load_summary),
        cmocka_unit_test(test_mutual_information),
        cmocka_unit_test(test_evaluation_sums),
        cmocka_unit_test(test_gradient_norms),
        cmocka_unit_test(test_alarm_hears_through_the_balance_losses),
        cmocka_unit_test(test_overfits_one_batch),
        cmocka_unit_test(test_loss_between_floor_and_unigram),
    };
    return cmocka_run_group_tests_name("training", tests, NULL, NULL);
}
