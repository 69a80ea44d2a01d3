// build: both
/* Properties that each router promises in its file, in whole models: what its weights equal, how its loads come out,
 * what of it is state.
 *
 * Routers that do not learn where to send tokens are in test_fixed_routers.c, gradients in test_model_grad.c, causality
 * in test_causality.c, what goes wrong elsewhere in test_bad_routers.c. Read next: router_runs.h, model/router.h.
 */
#define _GNU_SOURCE /* nftw */
#include <ftw.h>
#include <sys/stat.h>

#include "router_runs.h"

#include "../model/balance.h"
#include "../model/resume.h"

/* ---- what the weights are */

/* The K largest of E values, largest first, the lower index among equals. */
static void largest(int *chosen, const acc_t *value, int E, int K) {
    for (int j = 0; j < K; j++) {
        chosen[j] = -1;
        for (int e = 0; e < E; e++) {
            bool taken = false;
            for (int i = 0; i < j; i++) {
                taken |= chosen[i] == e;
            }
            if (!taken && (chosen[j] < 0 || value[e] > value[chosen[j]])) {
                chosen[j] = e;
            }
        }
    }
}

/* Softmax, then the K largest, renormalised = the K largest logits, then softmax over them. */
static void test_renormalised_is_softmax_over_the_chosen(void **state) {
    enum { E = 8, K = 3 };
    Trainer t;
    open_run(&t, "--router topk --experts %d --top-k %d --lr 1e-2", E, K);
    train_to(&t, 20);
    forward(&t, SPLIT_TRAIN, t.step);
    double spread = 0;
    for (int i = 0; i < t.model.moe_count; i++) {
        const MoeLayer *moe = t.model.moes[i];
        for (int n = 0; n < t.model.N; n++) {
            const acc_t *logit = moe->pass.logits + n * E;
            int chosen[K];
            double weight[K], sum = 0;
            largest(chosen, logit, E, K);
            for (int j = 0; j < K; j++) {
                weight[j] = exp((double)logit[chosen[j]] - logit[chosen[0]]);
                sum += weight[j];
            }
            for (int j = 0; j < K; j++) {
                assert_int_equal(moe->plan.expert[n * K + j], chosen[j]);
                assert_near(moe->plan.weight[n * K + j], weight[j] / sum, in_precision(1e-14, 1e-6));
            }
            spread = fmax(spread, (weight[0] - weight[K - 1]) / sum);
        }
    }
    assert_true(spread > 0.02); /* weights that are all 1/K would say little */
    trainer_close(&t);
}

static double relative_error(const acc_t *x, const acc_t *y, size_t count) {
    double wrong = 0, norm = 0;
    for (size_t i = 0; i < count; i++) {
        wrong += ((double)x[i] - y[i]) * ((double)x[i] - y[i]);
        norm += (double)y[i] * y[i];
    }
    return sqrt(wrong / norm);
}

/* With one token in each group and one slot for each expert a slot reads that token whole, and Soft MoE is a softmax
 * over experts: here with logits <x, w>, w_e = scale phi_e / (|phi_e| |x|) and |x| = 4. Its logits do not see the
 * length of x, so that dx differs by a multiple of x and by nothing else. */
static void test_soft_of_single_tokens_is_soft_token(void **state) {
    enum { N = 32, C = 32, E = 4 };
    const double tolerance = in_precision(1e-12, 3e-6), scale = 5;
    Trainer soft, token;
    open_run(&soft, "--router soft-batch --layers 1 --batch 1 --slots 1");
    open_run(&token, "--router soft-token --layers 1 --batch 1 --z-coef 0");
    MoeLayer *a = soft.model.moes[0], *b = token.model.moes[0];
    assert_int_equal(a->plan.group_tokens, 1);
    assert_true(soft.model.N == N && soft.config.model.dim == C && a->plan.E == E);
    real_t x[N * C], dy[N * C], y[2][N * C], dx[2][N * C];
    const uint64_t key = random_key(1, RANDOM_TEST, 0);
    for (int n = 0; n < N; n++) {
        double square = 0;
        for (int i = n * C; i < (n + 1) * C; i++) {
            x[i] = (real_t)random_normal(key, i);
            dy[i] = (real_t)random_normal(key, N * C + i);
            square += (double)x[i] * x[i];
        }
        for (int i = n * C; i < (n + 1) * C; i++) {
            x[i] *= (real_t)(4 / sqrt(square));
        }
    }
    acc_t *phi = a->pass.param[0].w, *w = b->pass.param[0].w;
    *a->pass.param[1].w = (acc_t)scale;
    for (int e = 0; e < E; e++) {
        double square = 0;
        for (int c = 0; c < C; c++) {
            phi[e * C + c] = (acc_t)((e + 1) * random_normal(key, 2 * N * C + e * C + c));
            square += (double)phi[e * C + c] * phi[e * C + c];
        }
        for (int c = 0; c < C; c++) {
            w[e * C + c] = (acc_t)(phi[e * C + c] * scale / (4 * sqrt(square)));
        }
    }
    const size_t w1 = E * 2 * 24 * C, w2 = E * C * 24;
    memcpy((acc_t *)b->w1, a->w1, w1 * sizeof(acc_t));
    memcpy((acc_t *)b->w2, a->w2, w2 * sizeof(acc_t));
    Trainer *runs[] = {&soft, &token};
    for (int r = 0; r < 2; r++) {
        Transformer *m = &runs[r]->model;
        moe_forward(m->moes[0], &m->scratch, y[r], x, m->load, m->demand, NULL, NULL);
        moe_backward(m->moes[0], &m->scratch, dx[r], dy, x, 0, NULL, NULL);
    }
    assert_true(relative_error(a->pass.probs, b->pass.probs, N * E) <= tolerance);
    assert_true(relative_error(y[0], y[1], N * C) <= tolerance);
    assert_true(relative_error(a->dw1, b->dw1, w1) <= tolerance);
    assert_true(relative_error(a->dw2, b->dw2, w2) <= tolerance);
    for (int n = 0; n < N; n++) {
        double along = 0, wrong = 0, norm = 0;
        for (int i = n * C; i < (n + 1) * C; i++) {
            along += ((double)dx[0][i] - dx[1][i]) * x[i] / 16;
            norm += (double)dx[1][i] * dx[1][i];
        }
        for (int i = n * C; i < (n + 1) * C; i++) {
            double d = (double)dx[0][i] - dx[1][i] - along * x[i];
            wrong += d * d;
        }
        assert_true(sqrt(wrong / norm) <= tolerance);
    }
    trainer_close(&soft);
    trainer_close(&token);
}

/* ---- loads */

static void test_expert_choice_is_exact(void **state) {
    static const struct {
        const char *options;
        int share;
    } cases[] = {
        {"--batch 4", 64},
        {"--batch 3 --seq 11 --experts 7 --top-k 3", 15}, /* 99 entries over 7 experts */
        {"--batch 6 --seq 13 --grad-accum 3 --experts 5 --chain-steps 2", 11},
        {"--batch 2 --seq 2 --experts 32 --top-k 1", 1}, /* more experts than tokens */
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Trainer t;
        open_run(&t, "--router expert-choice --allow-leak 1 %s", cases[i].options);
        while (t.step < 3) {
            train_step(&t);
            for (int j = 0; j < t.model.slices * t.model.moe_count * t.config.model.experts; j++) {
                assert_int_equal(t.model.demand[j], cases[i].share);
            }
        }
        trainer_close(&t);
    }
}

/* Largest MaxVio of any router over steps first .. end - 1, whose counts are added up. */
static double train_max_vio(Trainer *t, int first, int end) {
    enum { MOST = 64 };
    int E = t->config.model.experts, places = t->model.moe_count * E;
    double counts[MOST] = {0}, worst = 0;
    assert_true(places <= MOST && t->model.slices == 1);
    train_to(t, first);
    while (t->step < end) {
        train_step(t);
        for (int i = 0; i < places; i++) {
            counts[i] += t->model.demand[i];
        }
    }
    for (int i = 0; i < t->model.moe_count; i++) {
        worst = fmax(worst, load_summary(counts + i * E, E).max_vio);
    }
    return worst;
}

/* Every token prefers expert 0, whose score is lifted by a feature that all tokens have. The bias brings the loads
 * together again, without a loss. */
static void test_sigmoid_bias_balances(void **state) {
    static const char *const rates[] = {"0", "0.02"};
    for (int with_bias = 0; with_bias <= 1; with_bias++) {
        Trainer t;
        open_run(&t, "--router sigmoid --aux-coef 0 --steps 120 --bias-rate %s", rates[with_bias]);
        size_t V = t.config.model.vocab, C = t.config.model.dim;
        for (size_t v = 0; v < V; v++) {
            t.model.master[t.model.tensors.items[0].offset + v * C] = (acc_t)0.1;
        }
        for (int i = 0; i < t.model.moe_count; i++) {
            *router_tensor(&t, i, "w", NULL) = (acc_t)0.5;
        }
        assert_true(train_max_vio(&t, 0, 1) > 0.9); /* all tokens take expert 0: 1 */
        double late = train_max_vio(&t, 80, 120);
        print_message("# bias rate %s: MaxVio %.3f\n", rates[with_bias], late);
        assert_true(with_bias ? late < 0.1 : late > 0.3);
        trainer_close(&t);
    }
}

/* The bias selects and does nothing else: while the choice stays, no bit of outputs or gradients depends on it. */
static void test_sigmoid_bias_only_selects(void **state) {
    Trainer t;
    trainer_open(&t, "--router sigmoid --bias-rate 0.01");
    train_to(&t, 10);
    read_slice(&t, SPLIT_TRAIN, t.step, 0);
    slice_gradient(&t, 0);
    acc_t *gradient = copy_flat(&t, t.model.grads);
    real_t *hidden = copy_hidden(&t);
    int *choices = copy_choices(&t.model);
    static const double lifts[] = {0.25, -3}; /* of all alike */
    for (int i = 0; i < 3; i++) {
        for (int r = 0; r < t.model.moe_count; r++) {
            acc_t *bias = router_tensor(&t, r, "bias", NULL);
            for (int e = 0; e < t.config.model.experts; e++) {
                bias[e] += i < 2 ? (acc_t)lifts[i] : e == r ? 2 : 0;
            }
        }
        device_zero(t.model.grads, flat_bytes(&t), NULL);
        slice_gradient(&t, 0);
        bool same = !memcmp(gradient, t.model.grads, flat_bytes(&t)) && same_hidden(&t, hidden);
        assert_int_equal(same_choices(&t.model, choices), i < 2);
        assert_int_equal(same, i < 2); /* the last one changes the choice, and all with it */
    }
    free(gradient);
    free(hidden);
    free(choices);
    trainer_close(&t);
}

/* A step's slices count together: the bias goes by their sum, the threshold by the mean of their cuts. */
static void test_states_move_by_all_slices(void **state) {
    enum { E = 4, SLICES = 4 };
    Trainer t;
    open_run(&t, "--router sigmoid --bias-rate 0.01 --grad-accum %d", SLICES);
    double bias[2][E] = {{0}};
    while (t.step < 5) {
        train_step(&t);
        for (int i = 0; i < 2; i++) {
            int count[E] = {0}, all = 0;
            for (int j = 0; j < SLICES * E; j++) {
                count[j % E] += t.model.demand[(j / E * 2 + i) * E + j % E];
                all += t.model.demand[(j / E * 2 + i) * E + j % E];
            }
            for (int e = 0; e < E; e++) {
                bias[i][e] += 0.01 * ((E * count[e] < all) - (E * count[e] > all));
                assert_near(router_tensor(&t, i, "bias", NULL)[e], bias[i][e], 1e-6);
            }
        }
    }
    trainer_close(&t);

    open_run(&t, "--router threshold --threshold-rate 0.4 --grad-accum %d", SLICES);
    const int N = t.model.N, share = N * 2 / E;
    double tau[2][E];
    for (; t.step < 4; finish_step(&t)) {
        double cut[2][E] = {{0}}, rate = fmax(0.4, 1.0 / ((double)t.step + 1));
        for (int slice = 0; slice < SLICES; slice++) {
            read_slice(&t, SPLIT_TRAIN, t.step, slice);
            slice_gradient(&t, slice);
            for (int i = 0; i < 2 * E; i++) {
                acc_t column[256];
                int order[256];
                for (int n = 0; n < N; n++) {
                    column[n] = t.model.moes[i / E]->pass.probs[n * E + i % E];
                }
                largest(order, column, N, share + 1);
                cut[i / E][i % E] += ((double)column[order[share - 1]] + column[order[share]]) / 2 / SLICES;
            }
        }
        for (int i = 0; i < 2 * E; i++) {
            double *old = &tau[i / E][i % E], now = cut[i / E][i % E];
            if (t.step > 0) {
                assert_near(router_tensor(&t, i / E, "tau", NULL)[i % E], *old, 1e-6);
            }
            *old = t.step > 0 ? *old + rate * (now - *old) : now;
        }
    }
    trainer_close(&t);
}

/* After training, evaluation by thresholds gives each expert about its share; and a token's experts follow from its own
 * probabilities. */
static void test_threshold_reaches_its_load(void **state) {
    enum { E = 4, K = 2, BATCHES = 16 };
    Trainer t;
    trainer_open(&t, "--router threshold --threshold-warmup 20 --threshold-rate 0.05 --steps 150");
    train_to(&t, 150);
    double counts[2 * E] = {0};
    transformer_set_training(&t.model, false, false);
    for (int b = 0; b < BATCHES; b++) {
        forward(&t, SPLIT_VAL, b);
        for (int i = 0; i < 2 * E; i++) {
            counts[i] += t.model.demand[i];
        }
        for (int i = 0; i < t.model.moe_count; i++) {
            const MoeLayer *moe = t.model.moes[i];
            const acc_t *tau = router_tensor(&t, i, "tau", NULL);
            for (int j = 0; j < t.model.N * E; j++) {
                assert_int_equal(moe->plan.expert[j], moe->pass.probs[j] > tau[j % E] ? j % E : -1);
            }
        }
    }
    for (int i = 0; i < 2 * E; i++) {
        double share = counts[i] / (BATCHES * t.model.N);
        print_message("# threshold, layer %d, expert %d: %.3f of the tokens\n", i / E, i % E, share);
        assert_near(share, (double)K / E, 0.25 * K / E);
    }
    trainer_close(&t);
}

/* ---- states */

static int remove_entry(const char *path, const struct stat *status, int type, struct FTW *place) {
    return remove(path);
}

/* A run that is saved and taken up again ends with the bits of one that was not: states are part of the checkpoint, and
 * what is drawn is a function of the step. A step is skipped on the way. */
static void test_resumed_runs(void **state) {
    static const char *const routers[] = {
        "sigmoid --bias-rate 0.05",
        "threshold --threshold-warmup 4",
        "threshold --threshold-warmup 2",
        "hash",
        "noisy",
        "random",
        "random-step",
        "soft-batch",
        "forced --force zipf:1",
        "sigmoid --chain-steps 2",
    };
    enum { STEPS = 6, SAVED = 3, POISON = 1 };
    char run[] = "/tmp/test_routers_XXXXXX", error[512];
    assert_non_null(mkdtemp(run));
    for (size_t i = 0; i < sizeof routers / sizeof *routers; i++) {
        Trainer whole, half, rest;
        open_run(&whole, "--router %s --steps %d --out %s", routers[i], STEPS, run);
        open_run(&half, "--router %s --steps %d --out %s", routers[i], STEPS, run);
        whole.poison_step = half.poison_step = POISON;
        train_to(&whole, STEPS);
        train_to(&half, SAVED);
        Progress at = {.step = half.step, .skipped = 1};
        if (!training_save(&half.config, &half.model, &half.optimizer, &at, error, sizeof error)) {
            fail_msg("not saved: %s", error);
        }
        open_run(&rest, "--router %s --steps %d --out %s --resume %s", routers[i], STEPS, run, run);
        memset(rest.model.master, 0, flat_bytes(&rest));
        rest.step = training_load(&rest.config, &rest.model, &rest.optimizer).step;
        transformer_set_step(&rest.model, rest.step, NULL);
        assert_memory_equal(rest.model.master, half.model.master, flat_bytes(&rest));
        train_to(&rest, STEPS);
        assert_int_equal(rest.optimizer.state->skipped, 1);
        assert_same_run(&rest, &whole, routers[i]);
        trainer_close(&whole);
        trainer_close(&half);
        trainer_close(&rest);
    }
    assert_int_equal(nftw(run, remove_entry, 8, FTW_DEPTH | FTW_PHYS), 0);
}

/* Bias and threshold move with each step that counts, and with no other. */
static void test_skipped_step_leaves_states(void **state) {
    static const char *const routers[] = {"sigmoid", "threshold"}, *const states[] = {"bias", "tau"};
    for (int r = 0; r < 2; r++) {
        Trainer t;
        open_run(&t, "--router %s", routers[r]);
        t.poison_step = 3;
        while (t.step < 6) {
            size_t count;
            acc_t *now = router_tensor(&t, 1, states[r], &count), before[16];
            memcpy(before, now, count * sizeof *now);
            train_step(&t);
            bool moved = memcmp(before, now, count * sizeof *now) != 0;
            assert_int_equal(moved, t.step - 1 != t.poison_step);
            for (size_t i = 0; i < count; i++) {
                assert_true(isfinite((double)now[i]));
            }
        }
        assert_int_equal(t.optimizer.state->skipped, 1);
        trainer_close(&t);
    }
}

/* --freeze router holds all of a router at its initial values, what it moves without a gradient too. */
static void test_frozen_router_keeps_its_state(void **state) {
    static const char *const routers[] = {"--router sigmoid --bias-rate 0.1",
                                          "--router threshold --threshold-warmup 1"};
    for (int r = 0; r < 2; r++) {
        for (int frozen = 0; frozen <= 1; frozen++) {
            char options[128];
            snprintf(options, sizeof options, "%s --freeze %s", routers[r], frozen ? "router" : "none");
            Trainer t;
            trainer_open(&t, options);
            acc_t *before = copy_flat(&t, t.model.master);
            while (t.step < 3) {
                train_step(&t);
            }
            for (int i = 0; i < t.model.tensors.count; i++) {
                const Tensor *tensor = &t.model.tensors.items[i];
                bool router = tensor->kind == TENSOR_ROUTER || tensor->kind == TENSOR_STATE;
                bool same =
                    !memcmp(before + tensor->offset, t.model.master + tensor->offset, tensor->count * sizeof(acc_t));
                assert_int_equal(same, frozen && router);
            }
            free(before);
            trainer_close(&t);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_renormalised_is_softmax_over_the_chosen),
        cmocka_unit_test(test_soft_of_single_tokens_is_soft_token),
        cmocka_unit_test(test_expert_choice_is_exact),
        cmocka_unit_test(test_sigmoid_bias_balances),
        cmocka_unit_test(test_sigmoid_bias_only_selects),
        cmocka_unit_test(test_states_move_by_all_slices),
        cmocka_unit_test(test_threshold_reaches_its_load),
        cmocka_unit_test(test_resumed_runs),
        cmocka_unit_test(test_skipped_step_leaves_states),
        cmocka_unit_test(test_frozen_router_keeps_its_state),
    };
    omp_set_num_threads(1);
    return cmocka_run_group_tests_name("routers", tests, NULL, NULL);
}
