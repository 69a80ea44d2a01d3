/* Speed of whole training steps and of the matrix product on this machine's CPU.
 *
 *     build/bench_cpu                    the three models of the README's table, one JSON line each, then a table
 *     build/bench_cpu --model cpu-mid --steps 20
 *
 * Whole steps: forward, loss, backward, clipping, AdamW on tokens drawn from a fixed Zipf-like distribution, so that no
 * data path is in the time; the median of the steps after a warm-up. FLOPs as in transformer_flops_per_token. The same
 * models in PyTorch: baselines/torch_cpu.py; both in one job: cpu_compare.sh.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"
#include "../kernels/matmul.h"
#include "../kernels/random.h"
#include "../model/config.h"
#include "../model/optimizer.h"
#include "../model/transformer.h"

typedef struct {
    const char *name;
    int layers, dim, heads, seq, expert_dim, experts, top_k, batch, steps;
} Model;

static const Model MODELS[] = {
    {"cpu-default", 4, 128, 4, 128, 256, 8, 2, 16, 40},
    {"cpu-mid", 4, 256, 4, 256, 512, 8, 2, 8, 16},
    {"cpu-c512", 6, 512, 8, 512, 1024, 8, 2, 2, 8},
};

enum { MODEL_COUNT = sizeof MODELS / sizeof MODELS[0], WARM_UP = 3, VOCAB = 256 };

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Token n of step s, more often small than large. */
static int zipf_token(int step, int n) {
    double u = random_uniform(random_key(1, RANDOM_TEST, step), n);
    int token = (int)exp(u * log(VOCAB + 1.0)) - 1;
    return token < VOCAB ? token : VOCAB - 1;
}

static void bench_model(const Model *m, int steps, const char *device) {
    Config config;
    config_defaults(&config);
    config.model.layers = m->layers;
    config.model.dim = m->dim;
    config.model.heads = m->heads;
    config.model.seq = m->seq;
    config.model.expert_dim = m->expert_dim;
    config.model.experts = m->experts;
    config.model.top_k = m->top_k;
    config.train.batch = m->batch;
    config_finish(&config);

    Transformer model;
    Optimizer optimizer;
    Arena arena = {0};
    int *tokens = NULL, N = m->batch * m->seq;
    transformer_reserve(&model, &config, m->batch, 1, USE_TRAIN, NULL, &arena);
    optimizer_reserve(&optimizer, &model.tensors, FREEZE_NONE, &arena);
    arena_reserve(&arena, (void **)&tokens, (N + 1) * sizeof(int), MEMORY_ACTIVATIONS);
    arena_commit(&arena);
    transformer_connect(&model);
    acc_t *host = calloc(model.tensors.total, sizeof(acc_t));
    int *host_tokens = calloc(N + 1, sizeof(int));
    double *seconds = calloc(steps, sizeof(double));
    CHECK(host && host_tokens && seconds, "out of memory for model %s", m->name);
    tensors_init(&model.tensors, host, 1);
    transformer_load(&model, host);

    Profile profile = {0};
    for (int s = 0; s < WARM_UP + steps; s++) {
        for (int n = 0; n <= N; n++) {
            host_tokens[n] = zipf_token(s, n);
        }
        device_from_host(tokens, host_tokens, (N + 1) * sizeof(int), NULL);
        if (s == WARM_UP) {
            model.profile = &profile;
        }
        profile_start(model.profile, NULL);
        double start = seconds_now();
        transformer_forward(&model, tokens, 0, NULL);
        transformer_loss(&model, tokens + 1, 0, true, NULL);
        transformer_backward(&model, tokens, NULL);
        optimizer_step(&optimizer, &model, &config.train, s, NULL);
        if (s >= WARM_UP) {
            seconds[s - WARM_UP] = seconds_now() - start;
        }
    }
    qsort(seconds, steps, sizeof(double), compare);
    double median = seconds[steps / 2], flops = transformer_flops_per_token(&model);
    printf(
        "{\"model\":\"%s\",\"impl\":\"moelab\",\"threads\":%d,\"ms\":%.3f,\"tok_s\":%.0f,\"gflops\":%.1f,\"steps\":%d,"
        "\"arena_mib\":%.1f,\"device\":\"%s\",\"stages_ms\":{",
        m->name, device_threads(), 1e3 * median, N / median, N / median * flops / 1e9, steps, arena.bytes / 1048576.0,
        device);
    for (int i = 0, printed = 0; i < STAGE_COUNT; i++) {
        if (profile.seconds[i] > 0) {
            printf("%s\"%s\":%.2f", printed++ ? "," : "", stage_name(i), 1e3 * profile.seconds[i] / steps);
        }
    }
    printf("}}\n");
    fflush(stdout);
    free(host);
    free(host_tokens);
    free(seconds);
    transformer_free(&model);
    optimizer_free(&optimizer);
    arena_free(&arena);
}

/* The three products of one linear layer, best of some. */
static void bench_matmul(int N, int OUT, int IN, const char *device) {
    real_t *x, *w, *y;
    Arena arena = {0};
    arena_reserve(&arena, (void **)&x, (size_t)N * IN * sizeof(real_t), MEMORY_ACTIVATIONS);
    arena_reserve(&arena, (void **)&w, (size_t)OUT * IN * sizeof(real_t), MEMORY_ACTIVATIONS);
    arena_reserve(&arena, (void **)&y, (size_t)N * OUT * sizeof(real_t), MEMORY_ACTIVATIONS);
    arena_commit(&arena);
    double best[3] = {1e9, 1e9, 1e9}, flops = 2.0 * N * OUT * IN;
    for (int repeat = 0; repeat < 10; repeat++) {
        double t0 = seconds_now();
        matmul_forward(y, x, w, N, IN, OUT, NULL);
        double t1 = seconds_now();
        matmul_backward_input(x, y, w, N, IN, OUT, 0, NULL);
        double t2 = seconds_now();
        matmul_backward_weight(w, y, x, N, IN, OUT, NULL);
        double t3 = seconds_now();
        best[0] = fmin(best[0], t1 - t0);
        best[1] = fmin(best[1], t2 - t1);
        best[2] = fmin(best[2], t3 - t2);
    }
    printf(
        "{\"matmul\":[%d,%d,%d],\"threads\":%d,\"forward_gflops\":%.0f,\"input_gflops\":%.0f,\"weight_gflops\":%.0f,"
        "\"device\":\"%s\"}\n",
        N, OUT, IN, device_threads(), flops / best[0] / 1e9, flops / best[1] / 1e9, flops / best[2] / 1e9, device);
    arena_free(&arena);
}

int main(int argc, char **argv) {
    const char *only = NULL;
    int steps = 0;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--model") == 0) {
            only = argv[i + 1];
        } else if (strcmp(argv[i], "--steps") == 0) {
            steps = atoi(argv[i + 1]);
        } else {
            die(__FILE__, __LINE__, "unknown option %s: there are --model NAME and --steps N", argv[i]);
        }
    }
    char device[128];
    device_describe(device, sizeof device);
    for (int i = 0; i < MODEL_COUNT; i++) {
        if (!only || strcmp(only, MODELS[i].name) == 0) {
            bench_model(&MODELS[i], steps > 0 ? steps : MODELS[i].steps, device);
        }
    }
    if (!only || strcmp(only, "none") == 0) {
        bench_matmul(2048, 512, 128, device);
        bench_matmul(2048, 128, 256, device);
        bench_matmul(1024, 1024, 512, device);
    }
    return 0;
}
