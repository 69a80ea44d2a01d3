// build: both
/* Routers that do not learn where tokens go: a table, dice, a decree, a recording. How even their loads are, what they
 * depend on and what not, and that a recorded run can be repeated bit for bit.
 *
 * Their kernels are in test_fixed_choice.c. Read next: router_runs.h, model/router_forced.c, model/trace.h.
 */
#include "forked.h"
#include "router_runs.h"

#include "../model/balance.h"
#include "../model/trace.h"

/* ---- hash */

enum { COUNTED = 6, VOCAB = 128 };

/* How often each token occurs in the first steps of training. */
static void count_tokens(Trainer *t, double *frequency) {
    memset(frequency, 0, VOCAB * sizeof *frequency);
    for (int step = 0; step < COUNTED; step++) {
        read_slice(t, SPLIT_TRAIN, step, 0);
        for (int n = 0; n < t->model.N; n++) {
            frequency[t->tokens[n]]++;
        }
    }
}

/* On the text it was made for, a table of one expert per token is as even as tokens of these frequencies can be dealt
 * out one by one: no expert is ahead of another by more than the rarest token it has. */
static void test_hash_is_even(void **state) {
    for (int K = 1; K <= 2; K++) {
        Trainer t;
        double frequency[VOCAB], load[2][4] = {{0}}, weighted[2] = {0}, unweighted = 0;
        open_run(&t, "--router hash --top-k %d", K);
        const int E = t.config.model.experts;
        count_tokens(&t, frequency);
        for (int with_frequency = 0; with_frequency <= 1; with_frequency++) {
            transformer_init(&t.model, t.model.master, 1, with_frequency ? frequency : NULL);
            memset(load, 0, sizeof load);
            for (int step = 0; step < COUNTED; step++) {
                forward(&t, SPLIT_TRAIN, step);
                for (int i = 0; i < 2 * E; i++) {
                    load[i / E][i % E] += t.model.demand[i];
                }
            }
            for (int i = 0; i < 2; i++) {
                double cv = load_summary(load[i], E).cv;
                weighted[i] = cv;
                unweighted += with_frequency ? 0 : cv / 2;
            }
        }
        print_message("# hash, K %d: CV %.4f and %.4f, %.4f without frequencies\n", K, weighted[0], weighted[1],
                      unweighted);
        for (int i = 0; i < 2; i++) {
            const acc_t *table = router_tensor(&t, i, "table", NULL);
            assert_true(weighted[i] < unweighted);
            for (int v = 0; v < VOCAB; v++) {
                assert_true(K == 1 || table[v * K] != table[v * K + 1]);
                for (int e = 0; e < E && K == 1 && frequency[v] > 0; e++) {
                    assert_true(load[i][(int)table[v]] - load[i][e] <= frequency[v]);
                }
            }
        }
        trainer_close(&t);
    }
}

/* The table is a function of seed, frequencies and its place, and training leaves it alone. */
static void test_hash_depends_on_seed_and_frequency(void **state) {
    static const char *const others[] = {"--dim 48 --expert-dim 16 --shared-experts 1", "--layers 3", "--seed 2", ""};
    double frequency[VOCAB], reversed[VOCAB];
    Trainer t;
    trainer_open(&t, "--router hash");
    const size_t bytes = VOCAB * 2 * sizeof(acc_t);
    count_tokens(&t, frequency);
    for (int v = 0; v < VOCAB; v++) {
        reversed[v] = frequency[VOCAB - 1 - v];
    }
    transformer_init(&t.model, t.model.master, (uint64_t)t.config.train.seed, frequency);
    acc_t tables[2][VOCAB * 2];
    for (int i = 0; i < 2; i++) {
        memcpy(tables[i], router_tensor(&t, i, "table", NULL), bytes);
    }
    assert_memory_not_equal(tables[0], tables[1], bytes);
    for (int o = 0; o < 4; o++) {
        Trainer other;
        open_run(&other, "--router hash %s", others[o]);
        transformer_init(&other.model, other.model.master, (uint64_t)other.config.train.seed,
                         o < 3 ? frequency : reversed);
        for (int i = 0; i < 2; i++) {
            bool same = !memcmp(tables[i], router_tensor(&other, i, "table", NULL), bytes);
            assert_int_equal(same, o < 2);
        }
        trainer_close(&other);
    }
    train_to(&t, 4);
    for (int i = 0; i < 2; i++) {
        assert_memory_equal(tables[i], router_tensor(&t, i, "table", NULL), bytes);
    }
    trainer_close(&t);
}

/* ---- dice */

/* The routing of one batch in two steps that nothing happens in between, and again in the first. */
static void check_draws(const char *router, bool training, bool differ) {
    Trainer t;
    open_run(&t, "--router %s", router);
    train_to(&t, 3);
    transformer_set_training(&t.model, training, false);
    transformer_set_step(&t.model, 10, NULL);
    forward(&t, SPLIT_VAL, 0);
    int *choices = copy_choices(&t.model);
    real_t *hidden = copy_hidden(&t);
    forward(&t, SPLIT_VAL, 0);
    assert_true(same_choices(&t.model, choices) && same_hidden(&t, hidden));
    transformer_set_step(&t.model, 11, NULL);
    forward(&t, SPLIT_VAL, 0);
    if (same_choices(&t.model, choices) == differ || same_hidden(&t, hidden) == differ) {
        fail_msg("%s: %s in step 11 %s that in step 10", router, training ? "training" : "evaluation",
                 differ ? "is" : "differs from");
    }
    transformer_set_step(&t.model, 10, NULL);
    forward(&t, SPLIT_VAL, 0);
    assert_true(same_choices(&t.model, choices) && same_hidden(&t, hidden));
    free(choices);
    free(hidden);
    trainer_close(&t);
}

static void test_who_draws_in_a_step(void **state) {
    check_draws("noisy", true, true);
    check_draws("noisy", false, false); /* evaluation draws no noise */
    check_draws("random-step", true, true);
    check_draws("random-step", false, true);
    check_draws("forced --force zipf:1", true, true);
    check_draws("random", true, false);
    check_draws("hash", true, false);
    check_draws("position", true, false);
    check_draws("forced --force balanced", true, false);
    check_draws("topk", true, false);
    check_draws("sigmoid", true, false);
}

/* The slices of a step draw each their own numbers, and so do the routers of a model. */
static void test_slices_and_layers_draw_apart(void **state) {
    static const char *const routers[] = {"noisy", "random-step", "forced --force zipf:1"};
    for (int r = 0; r < 3; r++) {
        Trainer t;
        open_run(&t, "--router %s --grad-accum 2", routers[r]); /* noisy begins with gates of zeros: noise alone */
        const Plan *first = &t.model.moes[0]->plan, *second = &t.model.moes[1]->plan;
        forward(&t, SPLIT_TRAIN, 0);
        int *choices = copy_choices(&t.model);
        assert_memory_not_equal(first->expert, second->expert, (size_t)t.model.N * 2 * sizeof(int));
        transformer_forward(&t.model, t.tokens, 1, NULL);
        assert_false(same_choices(&t.model, choices));
        assert_memory_not_equal(first->expert, choices, (size_t)t.model.N * 2 * sizeof(int));
        transformer_forward(&t.model, t.tokens, 0, NULL);
        assert_true(same_choices(&t.model, choices));
        free(choices);
        trainer_close(&t);
    }
}

/* Noise is what evaluation leaves out: the choice is that of the clean logits. */
static void test_noisy_evaluation_is_clean(void **state) {
    Trainer t;
    trainer_open(&t, "--router noisy --top-k 2");
    train_to(&t, 8);
    for (int training = 0; training <= 1; training++) {
        int clean = 0, all = 0;
        transformer_set_training(&t.model, training, false);
        forward(&t, SPLIT_VAL, 0);
        for (int i = 0; i < t.model.moe_count; i++) {
            const MoeLayer *moe = t.model.moes[i];
            for (int n = 0; n < t.model.N; n++, all++) {
                const acc_t *logit = moe->pass.logits + n * 4;
                int better = 0;
                for (int e = 0; e < 4; e++) {
                    better += logit[e] > logit[moe->plan.expert[n * 2]];
                }
                clean += better == 0;
            }
        }
        assert_int_equal(clean == all, !training);
    }
    trainer_close(&t);
}

/* ---- decrees */

/* Standard deviation over mean of the loads of `steps` steps, of each layer's counts. */
static void load_cvs(const char *options, int steps, double *cv) {
    Trainer t;
    open_run(&t, "--layers 2 --router forced %s", options);
    const int E = t.config.model.experts;
    double counts[2 * 64] = {0};
    for (int step = 0; step < steps; step++) {
        transformer_set_step(&t.model, step, NULL);
        forward(&t, SPLIT_TRAIN, step);
        for (int i = 0; i < 2 * E; i++) {
            counts[i] += t.model.demand[i];
        }
    }
    for (int i = 0; i < 2; i++) {
        cv[i] = load_summary(counts + i * E, E).cv;
    }
    trainer_close(&t);
}

/* With one expert per token zipf:S has p_e ~ (e+1)^-S and CV = sqrt(E sum p^2 - 1). */
static void test_forced_loads(void **state) {
    double cv[2];
    load_cvs("--force balanced", 3, cv);
    assert_true(cv[0] == 0 && cv[1] == 0);
    load_cvs("--force balanced --experts 8 --top-k 3", 1, cv);
    assert_true(cv[0] == 0 && cv[1] == 0);
    load_cvs("--force one --top-k 1", 1, cv);
    assert_near(cv[0], sqrt(3), 1e-12);
    assert_near(cv[1], sqrt(3), 1e-12);
    static const double exponents[] = {0, 0.5, 1, 2};
    for (int i = 0; i < 4; i++) {
        enum { E = 8, STEPS = 40 };
        double all = 0, square = 0;
        char options[96];
        for (int e = 0; e < E; e++) {
            all += pow(e + 1, -exponents[i]);
            square += pow(e + 1, -2 * exponents[i]);
        }
        double expected = sqrt(E * square / (all * all) - 1);
        snprintf(options, sizeof options, "--force zipf:%g --experts 8 --top-k 1 --renorm 0", exponents[i]);
        load_cvs(options, STEPS, cv);
        print_message("# zipf:%g: CV %.4f and %.4f, closed form %.4f\n", exponents[i], cv[0], cv[1], expected);
        for (int l = 0; l < 2; l++) { /* chance alone makes sqrt(7 / 10240) = 0.026 */
            assert_near(cv[l], expected, 0.05);
        }
    }
}

/* ---- a recording */

static TraceShape shape_of(const Transformer *m, int64_t first_step) {
    const Plan *plan = &m->moes[0]->plan;
    return (TraceShape){plan->N, plan->K, plan->E, m->moe_count, m->slices, first_step};
}

/* A training step, its routing appended to the trace as train.c does. */
static void record_step(Trainer *t, Trace *trace) {
    for (int slice = 0; slice < t->model.slices; slice++) {
        read_slice(t, SPLIT_TRAIN, t->step, slice);
        slice_gradient(t, slice);
        for (int i = 0; i < t->model.moe_count; i++) {
            trace_append(trace, t->model.moes[i]->plan.expert);
        }
    }
    finish_step(t);
}

/* A trace in a directory of its own. */
static void make_place(char *path, size_t size) {
    char folder[] = "/tmp/test_fixed_routers_XXXXXX";
    assert_non_null(mkdtemp(folder));
    snprintf(path, size, "%s/trace", folder);
}

static void remove_place(char *path) {
    unlink(path);
    *strrchr(path, '/') = '\0';
    assert_int_equal(rmdir(path), 0);
}

static void test_replay_repeats_a_run(void **state) {
    static const char *const options[] = {
        "",
        "--grad-accum 4",
        "--chain-steps 2 --grad-accum 2",
        "--top-k 1 --renorm 0",
        "--renorm 0 --top-k 3",
        "--capacity-factor 0.7 --shared-experts 1",
    };
    enum { STEPS = 5 };
    char path[64];
    make_place(path, sizeof path);
    for (size_t i = 0; i < sizeof options / sizeof *options; i++) {
        Trainer recorded, replayed;
        Trace trace;
        acc_t loss[STEPS];
        open_run(&recorded, "--router topk %s", options[i]);
        trace_create(&trace, path, shape_of(&recorded.model, 0));
        while (recorded.step < STEPS) {
            record_step(&recorded, &trace);
            loss[recorded.step - 1] = *recorded.model.step_loss;
        }
        trace_close(&trace);
        open_run(&replayed, "--router forced --force %s %s", path, options[i]);
        while (replayed.step < STEPS) {
            train_step(&replayed);
            assert_memory_equal(replayed.model.step_loss, &loss[replayed.step - 1], sizeof *loss);
        }
        assert_same_run(&replayed, &recorded, options[i]);
        Trainer *both[] = {&recorded, &replayed};
        real_t *hidden = NULL;
        for (int r = 0; r < 2; r++) { /* evaluation chooses by itself */
            transformer_set_training(&both[r]->model, false, false);
            forward(both[r], SPLIT_VAL, 0);
            hidden = r == 0 ? copy_hidden(both[r]) : hidden;
        }
        assert_true(same_hidden(&replayed, hidden));
        free(hidden);
        trainer_close(&recorded);
        trainer_close(&replayed);
    }
    remove_place(path);
}

/* It is the recording that decides: one of other choices makes another run. Records begin at the step that the header
 * names. */
static void test_replay_follows_the_recording(void **state) {
    enum { FIRST = 3, STEPS = 6 };
    char path[64];
    make_place(path, sizeof path);
    Trainer drawn, replayed;
    Trace trace;
    trainer_open(&drawn, "--router forced --force zipf:1");
    trace_create(&trace, path, shape_of(&drawn.model, FIRST));
    train_to(&drawn, FIRST);
    int *choices = NULL;
    open_run(&replayed, "--router forced --force %s", path);
    transformer_load(&replayed.model, drawn.model.master);
    memcpy(replayed.optimizer.m, drawn.optimizer.m, flat_bytes(&drawn));
    memcpy(replayed.optimizer.v, drawn.optimizer.v, flat_bytes(&drawn));
    *replayed.optimizer.state = *drawn.optimizer.state;
    replayed.step = drawn.step;
    transformer_set_step(&replayed.model, replayed.step, NULL);
    while (drawn.step < STEPS) {
        record_step(&drawn, &trace);
    }
    choices = copy_choices(&drawn.model);
    trace_close(&trace);
    train_to(&replayed, STEPS);
    assert_same_run(&replayed, &drawn, "zipf, from a recording");
    assert_true(same_choices(&replayed.model, choices));
    free(choices);
    trainer_close(&drawn);
    trainer_close(&replayed);
    remove_place(path);
}

/* Replays a file for two steps. */
static void replay(void *options) {
    Trainer t;
    open_run(&t, "--router forced %s", (const char *)options);
    train_to(&t, 2);
    trainer_close(&t);
}

static void assert_replay_refused(const char *path, const char *options, const char *words) {
    char command[256];
    Forked result;
    snprintf(command, sizeof command, "--force %s %s", path, options);
    run_forked(&result, replay, command);
    assert_refused(&result, words);
}

/* The bytes of a recording of `steps` steps, cut to `bytes`, with 16 bits changed at `at`. */
static void write_trace(const char *path, int steps, long bytes, long at, uint16_t value) {
    Trainer t;
    Trace trace;
    trainer_open(&t, "--router topk");
    trace_create(&trace, path, shape_of(&t.model, 0));
    while (t.step < steps) {
        record_step(&t, &trace);
    }
    trace_close(&trace);
    if (bytes >= 0) {
        assert_int_equal(truncate(path, bytes), 0);
    }
    if (at >= 0) {
        FILE *file = fopen(path, "r+b");
        assert_non_null(file);
        assert_int_equal(fseek(file, at, SEEK_SET), 0);
        assert_int_equal(fwrite(&value, sizeof value, 1, file), 1);
        fclose(file);
    }
    trainer_close(&t);
}

static void test_bad_recordings_are_refused(void **state) {
    const long header = 1024, record = 256 * 2 * 2, step = 2 * record; /* N K uint16; two routers */
    char path[64];
    Forked result;
    make_place(path, sizeof path);
    write_trace(path, 2, -1, -1, 0);
    char command[128];
    snprintf(command, sizeof command, "--force %s", path);
    run_forked(&result, replay, command);
    assert_int_equal(result.exit_code, 0); /* whole, it is taken */
    assert_int_equal(strlen(result.err), 0);

    static const char *const shapes[] = {"--batch 4",  "--top-k 3",      "--experts 6",
                                         "--layers 3", "--grad-accum 2", "--chain-steps 2"};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        assert_replay_refused(path, shapes[i], "use the options of the recorded run");
    }
    write_trace(path, 1, -1, -1, 0);
    assert_replay_refused(path, "", "does not hold step 2");
    write_trace(path, 2, header + 2 * step - 1, -1, 0);
    assert_replay_refused(path, "", "does not hold step 2");
    write_trace(path, 2, header + step - record, -1, 0);
    assert_replay_refused(path, "", "does not hold step 1");
    write_trace(path, 2, header - 1, -1, 0);
    assert_replay_refused(path, "", "is no routing trace");
    write_trace(path, 2, 0, -1, 0);
    assert_replay_refused(path, "", "is no routing trace");
    write_trace(path, 2, -1, 0, 7);
    assert_replay_refused(path, "", "is no routing trace");
    write_trace(path, 2, -1, header + record + 10, 4);
    assert_replay_refused(path, "", "names expert 4 of 4");
    unlink(path);
    assert_replay_refused(path, "", "there is no such file to read");
    remove_place(path);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_hash_is_even),
        cmocka_unit_test(test_hash_depends_on_seed_and_frequency),
        cmocka_unit_test(test_who_draws_in_a_step),
        cmocka_unit_test(test_slices_and_layers_draw_apart),
        cmocka_unit_test(test_noisy_evaluation_is_clean),
        cmocka_unit_test(test_forced_loads),
        cmocka_unit_test(test_replay_repeats_a_run),
        cmocka_unit_test(test_replay_follows_the_recording),
        cmocka_unit_test(test_bad_recordings_are_refused),
    };
    omp_set_num_threads(1);
    return cmocka_run_group_tests_name("fixed routers", tests, NULL, NULL);
}
