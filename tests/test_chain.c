// build: both
/* A chain of MoE steps (chain.h) against its equations, written out for one token at a time in double; what is left of
 * it where experts or routers say nothing; and the plain layer, which a chain of one step must be, bit for bit.
 *
 * Gradients through chains are in test_model_grad.c, what chains see in test_causality.c. Read next: model/chain.h.
 */
#include "router_runs.h"

#include <cjson/cJSON.h>
#include <unistd.h>

#include "../model/figures.h"

enum { MOST_C = 48, MOST_H = 64 };

/* ---- one step is the plain layer */

static void test_one_step_is_the_plain_layer(void **state) {
    static const char *const routers[] = {"topk",
                                          "top1",
                                          "sigmoid --bias-rate 0.05",
                                          "hash",
                                          "expert-choice --allow-leak 1",
                                          "topk --shared-experts 1 --grad-accum 2",
                                          "topk --moe-every 2 --layers 4"};
    static const char *const chains[] = {"--chain-steps 1 --chain-inner 0 --chain-outer 1",
                                         "--chain-steps 1 --chain-norm 1"};
    for (size_t i = 0; i < sizeof routers / sizeof *routers; i++) {
        for (int c = 0; c < 2; c++) {
            Trainer plain, chain;
            open_run(&plain, "--router %s", routers[i]);
            open_run(&chain, "--router %s %s", routers[i], chains[c]);
            assert_int_equal(plain.model.layers[plain.config.model.layers - 1].chain.inner, 0);
            assert_int_equal(chain.model.layers[chain.config.model.layers - 1].chain.inner, c);
            while (plain.step < 4) {
                train_step(&plain);
                train_step(&chain);
                assert_same_run(&chain, &plain, chains[c]);
            }
            trainer_close(&plain);
            trainer_close(&chain);
        }
    }
}

/* ---- the equations, one token at a time */

/* y (C) += weight * W2 (silu(a_gate) a_up), a = W1 x */
static void add_expert(double *y, double weight, const double *x, const real_t *w1, const real_t *w2, int C, int H) {
    double h[MOST_H];
    assert_true(H <= MOST_H);
    for (int j = 0; j < H; j++) {
        double gate = 0, up = 0;
        for (int c = 0; c < C; c++) {
            gate += w1[j * C + c] * x[c];
            up += w1[(H + j) * C + c] * x[c];
        }
        h[j] = gate / (1 + exp(-gate)) * up;
    }
    for (int c = 0; c < C; c++) {
        for (int j = 0; j < H; j++) {
            y[c] += weight * w2[c * H + j] * h[j];
        }
    }
}

/* y (C) = topk's MoE of x (C), token n: softmax over the logits of the K chosen. The choice is the plan's, after a look
 * whether it may be: with logits as close as rounding, either is right. */
static void naive_moe(double *y, const double *x, const MoeLayer *moe, int n) {
    int C = moe->C, E = moe->plan.E, K = moe->plan.K, H = moe->experts.H;
    const int *chosen = moe->plan.expert + (size_t)n * K;
    double logit[16], least = INFINITY, most = -INFINITY, sum = 0;
    bool taken[16] = {false};
    assert_true(E <= 16);
    for (int e = 0; e < E; e++) {
        logit[e] = 0;
        for (int c = 0; c < C; c++) {
            logit[e] += moe->pass.param[0].w[e * C + c] * x[c];
        }
    }
    for (int j = 0; j < K; j++) {
        taken[chosen[j]] = true;
        least = fmin(least, logit[chosen[j]]);
        sum += exp(logit[chosen[j]]);
    }
    for (int e = 0; e < E; e++) {
        most = taken[e] ? most : fmax(most, logit[e]);
    }
    assert_true(least >= most - in_precision(1e-12, 1e-4));
    memset(y, 0, C * sizeof *y);
    for (int j = 0; j < K; j++) {
        int e = chosen[j];
        add_expert(y, exp(logit[e]) / sum, x, moe->w1 + (size_t)e * 2 * H * C, moe->w2 + (size_t)e * C * H, C, H);
    }
    if (moe->shared.H > 0) {
        add_expert(y, 1, x, moe->shared_w1, moe->shared_w2, C, moe->shared.H);
    }
}

static void naive_norm(double *y, const double *x, const real_t *w, int C, double eps) {
    double square = 0;
    for (int c = 0; c < C; c++) {
        square += x[c] * x[c] / C;
    }
    for (int c = 0; c < C; c++) {
        y[c] = x[c] / sqrt(square + eps) * w[c];
    }
}

/* h (C), the stream after attention, becomes O h + x_C. */
static void naive_layer(double *h, const Layer *layer, const ModelConfig *config, int n) {
    int C = config->dim;
    double x[MOST_C], xn[MOST_C], y[MOST_C];
    assert_true(C <= MOST_C);
    naive_norm(xn, h, layer->ffn_norm.w, C, config->norm_eps);
    memcpy(x, config->chain_norm ? h : xn, C * sizeof *x);
    for (int s = 0; s < config->chain_steps; s++) {
        if (s > 0 && config->chain_norm) {
            naive_norm(xn, x, layer->chain.step[s].norm, C, config->norm_eps);
        } else if (s > 0) {
            memcpy(xn, x, C * sizeof *x);
        }
        naive_moe(y, xn, &layer->chain.moe[s], n);
        for (int c = 0; c < C; c++) {
            x[c] = config->chain_inner * x[c] + y[c];
        }
    }
    for (int c = 0; c < C; c++) {
        h[c] = config->chain_outer * h[c] + x[c];
    }
}

/* Weights of a size at which every part of a layer counts. */
static void draw_weights(Trainer *t) {
    for (int i = 0; i < t->model.tensors.count; i++) {
        const Tensor *tensor = &t->model.tensors.items[i];
        uint64_t key = random_key(5, RANDOM_TEST, i);
        for (size_t j = 0; j < tensor->count; j++) {
            double draw = random_normal(key, j);
            double value = tensor->ndim == 1 ? 1 + 0.3 * draw : 1.3 / sqrt(tensor->shape[tensor->ndim - 1]) * draw;
            t->model.master[tensor->offset + j] = (acc_t)value;
        }
    }
}

/* What layer l makes of the stream, (N,C). */
static const real_t *stream_after(const Transformer *m, int l) {
    return l + 1 < m->config->layers ? m->layers[l + 1].x : m->final_x;
}

static void check_layers(const char *options) {
    Trainer t;
    open_run(&t, "--router topk --batch 2 %s", options);
    draw_weights(&t);
    forward(&t, SPLIT_TRAIN, 0);
    const int C = t.config.model.dim;
    for (int l = 0; l < t.config.model.layers; l++) {
        const Layer *layer = &t.model.layers[l];
        double wrong = 0, norm = 0, moved = 0;
        for (int n = 0; n < t.model.N; n++) {
            double h[MOST_C];
            const real_t *before = layer->mid + (size_t)n * C, *after = stream_after(&t.model, l) + (size_t)n * C;
            for (int c = 0; c < C; c++) {
                h[c] = before[c];
            }
            naive_layer(h, layer, &t.config.model, n);
            for (int c = 0; c < C; c++) {
                wrong += (after[c] - h[c]) * (after[c] - h[c]);
                moved += (after[c] - before[c]) * (double)(after[c] - before[c]);
                norm += h[c] * h[c];
            }
        }
        if (!(sqrt(wrong / norm) <= in_precision(1e-12, 1e-5)) || !(moved > 0.01 * norm)) {
            fail_msg("%s, layer %d: differs by %.3g, moves the stream by %.3g", options, l, sqrt(wrong / norm),
                     sqrt(moved / norm));
        }
    }
    trainer_close(&t);
}

static void test_layers_follow_the_equations(void **state) {
    static const char *const residuals[] = {
        "--chain-inner 1 --chain-outer 1",
        "--chain-inner 1 --chain-outer 0",
        "--chain-inner 0 --chain-outer 1",
        "--chain-norm 1 --chain-inner 1 --chain-outer 0",
        "--chain-norm 1 --chain-inner 0 --chain-outer 1",
    };
    for (int steps = 1; steps <= 3; steps++) {
        for (int shared = 0; shared <= 2; shared++) {
            for (size_t i = 0; i < sizeof residuals / sizeof *residuals; i++) {
                char options[192];
                snprintf(options, sizeof options, "--chain-steps %d --shared-experts %d %s", steps, shared,
                         residuals[i]);
                check_layers(options);
            }
        }
    }
}

/* ---- what is left where a part says nothing */

static void set_tensors(Trainer *t, const char *part, acc_t value) {
    int found = 0;
    for (int i = 0; i < t->model.tensors.count; i++) {
        const Tensor *tensor = &t->model.tensors.items[i];
        if (strstr(tensor->name, part)) {
            for (size_t j = 0; j < tensor->count; j++) {
                t->model.master[tensor->offset + j] = value;
            }
            found++;
        }
    }
    assert_true(found > 0);
}

/* Experts that return 0 leave x_C = I x_0: the layer gives O h + I norm(h), or with norms h; exactly. */
static void test_silent_experts(void **state) {
    static const struct {
        const char *options;
        int stream, normed; /* how often each is in the result */
    } cases[] = {
        {"--chain-steps 2", 1, 1},
        {"--chain-steps 3 --chain-outer 0", 0, 1},
        {"--chain-steps 2 --chain-inner 0", 1, 0},
        {"--chain-steps 2 --chain-norm 1", 1, 0},
        {"--chain-steps 3 --chain-norm 1 --chain-inner 0 --chain-outer 1", 1, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Trainer t;
        open_run(&t, "--router topk --batch 2 %s", cases[i].options);
        draw_weights(&t);
        set_tensors(&t, ".moe.experts.w2", 0);
        forward(&t, SPLIT_TRAIN, 0);
        for (int l = 0; l < t.config.model.layers; l++) {
            const Layer *layer = &t.model.layers[l];
            const real_t *after = stream_after(&t.model, l);
            for (int j = 0; j < t.model.N * t.config.model.dim; j++) {
                real_t expected = (cases[i].stream ? layer->mid[j] : 0) + (cases[i].normed ? layer->mn[j] : 0);
                assert_true(after[j] == expected);
            }
        }
        trainer_close(&t);
    }
}

/* Shared experts work in each step: where the others return 0, x_c = x_{c-1} + shared(x_{c-1}), so that a chain of
 * two is not what a chain of one is. */
static void test_shared_experts_run_in_each_step(void **state) {
    enum { C = 32 };
    real_t *after[2];
    for (int steps = 1; steps <= 2; steps++) {
        Trainer t;
        open_run(&t, "--router topk --layers 1 --batch 2 --shared-experts 1 --chain-inner 1 --chain-steps %d", steps);
        draw_weights(&t);
        set_tensors(&t, ".moe.experts.w2", 0);
        forward(&t, SPLIT_TRAIN, 0);
        const MoeLayer *moe = t.model.moes[0];
        for (int n = 0; n < t.model.N; n++) {
            double x[C];
            for (int c = 0; c < C; c++) {
                x[c] = t.model.layers[0].mn[n * C + c];
            }
            for (int s = 0; s < steps; s++) {
                double input[C];
                memcpy(input, x, sizeof x);
                add_expert(x, 1, input, moe->shared_w1, moe->shared_w2, C, moe->shared.H);
            }
            for (int c = 0; c < C; c++) {
                assert_near(t.model.branch[n * C + c], x[c], in_precision(1e-12, 2e-5) * (1 + fabs(x[c])));
            }
        }
        size_t bytes = (size_t)t.model.N * C * sizeof(real_t);
        after[steps - 1] = malloc(bytes);
        assert_non_null(after[steps - 1]);
        memcpy(after[steps - 1], t.model.branch, bytes);
        if (steps == 2) {
            assert_memory_not_equal(after[0], after[1], bytes);
        }
        trainer_close(&t);
    }
    free(after[0]);
    free(after[1]);
}

/* Each step has a router of its own: one of zeros sends every token to the first K experts, equally, in its step and in
 * no other. */
static void test_each_step_has_its_own_router(void **state) {
    Trainer t;
    trainer_open(&t, "--router coe");
    assert_int_equal(t.model.moe_count, 4);
    draw_weights(&t);
    forward(&t, SPLIT_TRAIN, 0);
    const Plan *first = &t.model.moes[0]->plan, *second = &t.model.moes[1]->plan;
    const size_t entries = (size_t)t.model.N * 2;
    int *before = copy_choices(&t.model);
    assert_memory_not_equal(first->expert, second->expert, entries * sizeof(int));
    set_tensors(&t, "layers.0.moe.chain2.router.w", 0);
    forward(&t, SPLIT_TRAIN, 0);
    assert_memory_equal(first->expert, before, entries * sizeof(int));
    for (size_t i = 0; i < entries; i++) {
        assert_int_equal(second->expert[i], i % 2);
        assert_near(second->weight[i], 0.5, 1e-7);
    }
    free(before);
    trainer_close(&t);
}

/* ---- what is told of it */

/* The object that figures_log writes; the caller deletes it. */
static cJSON *logged_step(const StepFigures *figures, const Config *config) {
    char text[8192];
    FILE *file = tmpfile();
    assert_non_null(file);
    Log log = {.fd = fileno(file)};
    figures_log(figures, &log, config, 1, 1);
    ssize_t length = pread(log.fd, text, sizeof text - 1, 0);
    assert_true(length > 0 && length < (ssize_t)sizeof text - 1);
    text[length] = '\0';
    fclose(file);
    cJSON *object = cJSON_Parse(text);
    assert_non_null(object);
    return object;
}

/* Every step of every chain is a router of its own: in the figures, in the log, by name. */
static void test_steps_are_logged_as_routers(void **state) {
    enum { STEPS = 2, ROUTERS = 2 * STEPS, E = 4, SLICES = 2 }; /* layers 1 and 3 route */
    Trainer t;
    open_run(&t, "--router topk --layers 4 --moe-every 2 --chain-steps %d --grad-accum %d", STEPS, SLICES);
    assert_int_equal(t.model.moe_count, ROUTERS);
    double counts[ROUTERS][E] = {{0}};
    for (int slice = 0; slice < SLICES; slice++) {
        read_slice(&t, SPLIT_TRAIN, 0, slice);
        slice_gradient(&t, slice);
        for (int i = 0; i < ROUTERS * t.model.N * 2; i++) {
            int router = i / (t.model.N * 2);
            counts[router][t.model.moes[router]->plan.expert[i % (t.model.N * 2)]]++;
        }
    }
    finish_step(&t);
    StepFigures f = read_figures(&t);
    assert_int_equal(f.moe_count, ROUTERS);
    cJSON *line = logged_step(&f, &t.config);
    const cJSON *rows = cJSON_GetObjectItem(line, "counts");
    assert_int_equal(cJSON_GetArraySize(rows), ROUTERS);
    assert_int_equal(cJSON_GetArraySize(cJSON_GetObjectItem(line, "layer_main_norm")), ROUTERS);
    for (int i = 0; i < ROUTERS; i++) {
        char name[64], expected[64];
        assert_int_equal(t.model.moe_layers[i], 1 + i / STEPS * 2);
        transformer_router_name(&t.model, i, name, sizeof name);
        snprintf(expected, sizeof expected, "layer %d, step %d", t.model.moe_layers[i], i % STEPS + 1);
        assert_string_equal(name, expected);
        assert_true(f.layer_main_norm[i] > 0);
        const cJSON *row = cJSON_GetArrayItem(rows, i);
        assert_int_equal(cJSON_GetArraySize(row), E);
        for (int e = 0; e < E; e++) {
            assert_true(f.counts[i * E + e] == counts[i][e]);
            assert_true(cJSON_GetArrayItem(row, e)->valuedouble == counts[i][e]);
        }
    }
    cJSON_Delete(line);
    figures_free(&f);
    trainer_close(&t);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one_step_is_the_plain_layer),
        cmocka_unit_test(test_layers_follow_the_equations),
        cmocka_unit_test(test_silent_experts),
        cmocka_unit_test(test_shared_experts_run_in_each_step),
        cmocka_unit_test(test_each_step_has_its_own_router),
        cmocka_unit_test(test_steps_are_logged_as_routers),
    };
    omp_set_num_threads(1);
    return cmocka_run_group_tests_name("chain", tests, NULL, NULL);
}
