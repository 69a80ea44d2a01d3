/* Speed of whole training steps, and of the matrix product, on a CPU or a GPU: the same source linked to either
 * backend.
 *
 *     build/bench_train                          the models of the CPU, one JSON line each
 *     build/bench_train --model cpu-mid --steps 20
 *     build/bench_train_cuda --model d12         the models of the GPU are d12, d12-fine, d12-dense, tiny, tiny-byte
 *     build/bench_train_cuda --model d12 --router forced --force balanced    without it: the price of uneven experts
 *
 * Whole steps: forward, loss, backward, clipping, AdamW on tokens drawn from a fixed Zipf-like distribution, copied to
 * the device inside the time; the median of the steps after a warm-up. On a GPU steps are queued in groups, since to
 * wait for each would leave the device idle in between: the median is that of the groups. --graph 0 queues call by
 * call, --recompute norms|experts takes less memory. A last step with stage times is not in the median. FLOPs as in
 * transformer_flops_per_token. The same models in PyTorch: baselines/torch_cpu.py and torch_gpu.py; both in one job:
 * cpu_compare.sh, gpu_compare.sh.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"
#include "../kernels/matmul.h"
#include "../kernels/random.h"
#include "../model/commit.h"
#include "../model/config.h"
#include "../model/optimizer.h"
#include "../model/transformer.h"

typedef struct {
    const char *name;
    bool gpu;
    int layers, dim, heads, seq, expert_dim, experts, top_k, vocab, batch, steps;
} Model;

static const Model MODELS[] = {
    {"cpu-default", false, 4, 128, 4, 128, 256, 8, 2, 256, 16, 40},
    {"cpu-mid", false, 4, 256, 4, 256, 512, 8, 2, 256, 8, 16},
    {"cpu-c512", false, 6, 512, 8, 512, 1024, 8, 2, 256, 2, 8},
    {"d12", true, 12, 768, 12, 1024, 2048, 8, 2, 50304, 32, 40},
    {"d12-fine", true, 12, 768, 12, 1024, 512, 64, 8, 50304, 32, 40},
    {"d12-dense", true, 12, 768, 12, 1024, 4096, 0, 1, 50304, 32, 40},
    {"tiny", true, 6, 512, 8, 512, 1024, 8, 2, 8192, 64, 100},
    {"tiny-byte", true, 4, 256, 4, 256, 512, 8, 2, 256, 64, 200},
};

enum { MODEL_COUNT = sizeof MODELS / sizeof MODELS[0], WARM_UP = 5, GROUP = 5 };

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Token n of step s, more often small than large. */
static int zipf_token(int step, int n, int V) {
    double u = random_uniform(random_key(1, RANDOM_TEST, step), n);
    int token = (int)exp(u * log(V + 1.0)) - 1;
    return token < V ? token : V - 1;
}

/* What one model's steps need. */
typedef struct {
    Config config;
    Transformer model;
    Optimizer optimizer;
    Arena arena;
    Recording recording;
    int *tokens, *host_tokens; /* (N+1) device, host */
} Bench;

static void queue_step(Bench *b) {
    transformer_forward(&b->model, b->tokens, 0, NULL);
    transformer_loss(&b->model, b->tokens + 1, 0, true, NULL);
    transformer_backward(&b->model, b->tokens, 0, NULL);
    optimizer_step(&b->optimizer, &b->model, &b->config.train, NULL);
}

static void step(Bench *b, int s, bool record) {
    device_from_host(b->tokens, b->host_tokens + s % 7, (b->model.N + 1) * sizeof(int), NULL);
    optimizer_set_rate(&b->optimizer, &b->config.train, s, NULL);
    transformer_begin_step(&b->model, s, NULL);
    if (!record) {
        queue_step(b);
    } else if (!recording_replay(&b->recording, NULL)) {
        recording_begin(&b->recording, NULL);
        queue_step(b);
        recording_end(&b->recording, NULL);
    }
}

/* NULL: as the model has it. */
typedef struct {
    const char *router, *force;
} Routing;

static void open_bench(Bench *b, const Model *m, Routing routing, Recompute recompute) {
    *b = (Bench){0};
    config_defaults(&b->config);
    ModelConfig *c = &b->config.model;
    c->layers = m->layers;
    c->dim = m->dim;
    c->heads = m->heads;
    c->seq = m->seq;
    c->vocab = m->vocab;
    c->tie = m->gpu;
    c->expert_dim = m->expert_dim;
    c->experts = m->experts > 0 ? m->experts : 1;
    c->top_k = m->top_k;
    if (m->experts == 0) {
        snprintf(c->router, sizeof c->router, "dense");
    } else if (routing.router) {
        snprintf(c->router, sizeof c->router, "%s", routing.router);
    }
    if (routing.force) {
        snprintf(c->force, sizeof c->force, "%s", routing.force);
    }
    b->config.train.batch = m->batch;
    b->config.train.steps = 10000;
    b->config.train.recompute = recompute;
    config_finish(&b->config);
    size_t N = (size_t)m->batch * m->seq;
    transformer_reserve(&b->model, &b->config, m->batch, 1, USE_TRAIN, NULL, &b->arena);
    optimizer_reserve(&b->optimizer, &b->model.tensors, &b->arena);
    arena_reserve(&b->arena, (void **)&b->tokens, (N + 1) * sizeof(int), MEMORY_ACTIVATIONS);
    arena_commit(&b->arena);
    transformer_connect(&b->model);
    optimizer_connect(&b->optimizer, &b->model.tensors, &b->config.train);
    acc_t *host = calloc(b->model.tensors.total, sizeof(acc_t));
    b->host_tokens = calloc(N + 8, sizeof(int)); /* step s reads it from s % 7 on, so that batches differ */
    CHECK(host && b->host_tokens, "out of memory for model %s", m->name);
    for (size_t n = 0; n < N + 8; n++) {
        b->host_tokens[n] = zipf_token(0, (int)n, m->vocab);
    }
    tensors_init(&b->model.tensors, host, 1);
    transformer_load(&b->model, host);
    free(host);
}

static void close_bench(Bench *b) {
    recording_free(&b->recording);
    free(b->host_tokens);
    transformer_free(&b->model);
    arena_free(&b->arena);
}

static void bench_model(const Model *m, Routing routing, int steps, bool graph, Recompute recompute,
                        const char *device) {
    Bench b;
    open_bench(&b, m, routing, recompute);
    int group = device_runs_ahead() ? GROUP : 1, groups = (steps + group - 1) / group, done = 0;
    double *seconds = calloc(groups, sizeof(double));
    CHECK(seconds, "out of memory for %d times", groups);
    while (done < WARM_UP) {
        step(&b, done++, graph);
    }
    device_wait(NULL);
    for (int g = 0; g < groups; g++) {
        double start = seconds_now();
        for (int i = 0; i < group; i++) {
            step(&b, done++, graph);
        }
        device_wait(NULL);
        seconds[g] = (seconds_now() - start) / group;
    }
    Profile profile = {0};
    b.model.profile = &profile;
    profile_start(&profile, NULL);
    step(&b, done, false);
    profile_stop(&profile, NULL);
    profile_finish(&profile);
    qsort(seconds, groups, sizeof(double), compare);
    double median = seconds[groups / 2], flops = transformer_flops_per_token(&b.model), N = b.model.N;
    acc_t loss;
    host_from_device(&loss, b.model.step_loss, sizeof loss, NULL);
    printf(
        "{\"model\":\"%s\",\"impl\":\"moelab\",\"threads\":%d,\"ms\":%.4f,\"p95\":%.4f,\"tok_s\":%.0f,"
        "\"gflops\":%.1f,\"mfu\":%.4f,\"steps\":%d,\"graph\":%d,\"recompute\":%d,\"loss\":%.4f,\"arena_mib\":%.1f,"
        "\"peak_mib\":%.1f,\"device\":\"%s\",\"commit\":\"%s\",\"stages_ms\":{",
        m->name, device_threads(), 1e3 * median, 1e3 * seconds[(int)(0.95 * (groups - 1))], N / median,
        N / median * flops / 1e9, device_peak_flops() > 0 ? N / median * flops / device_peak_flops() : 0, steps, graph,
        recompute, (double)loss, b.arena.bytes / 1048576.0, device_peak_memory() / 1048576.0, device, commit_name());
    for (int i = 0, printed = 0; i < STAGE_COUNT; i++) {
        if (profile.seconds[i] > 0) {
            printf("%s\"%s\":%.3f", printed++ ? "," : "", stage_name(i), 1e3 * profile.seconds[i]);
        }
    }
    printf("}}\n");
    fflush(stdout);
    free(seconds);
    close_bench(&b);
}

/* The three products of one linear layer, best of some. */
static void bench_matmul(int N, int OUT, int IN, const char *device) {
    real_t *x, *w, *y;
    acc_t *dw;
    Arena arena = {0};
    arena_reserve(&arena, (void **)&x, (size_t)N * IN * sizeof(real_t), MEMORY_ACTIVATIONS);
    arena_reserve(&arena, (void **)&w, (size_t)OUT * IN * sizeof(real_t), MEMORY_ACTIVATIONS);
    arena_reserve(&arena, (void **)&dw, (size_t)OUT * IN * sizeof(acc_t), MEMORY_ACTIVATIONS);
    arena_reserve(&arena, (void **)&y, (size_t)N * OUT * sizeof(real_t), MEMORY_ACTIVATIONS);
    arena_commit(&arena);
    double best[3] = {1e9, 1e9, 1e9}, flops = 2.0 * N * OUT * IN;
    for (int repeat = 0; repeat < 10; repeat++) {
        double t0 = seconds_now();
        matmul_forward(y, x, w, N, IN, OUT, NULL);
        device_wait(NULL);
        double t1 = seconds_now();
        matmul_backward_input(x, y, w, N, IN, OUT, 0, NULL);
        device_wait(NULL);
        double t2 = seconds_now();
        matmul_backward_weight(dw, y, x, N, IN, OUT, NULL);
        device_wait(NULL);
        double t3 = seconds_now();
        best[0] = fmin(best[0], t1 - t0);
        best[1] = fmin(best[1], t2 - t1);
        best[2] = fmin(best[2], t3 - t2);
    }
    printf(
        "{\"matmul\":[%d,%d,%d],\"threads\":%d,\"forward_gflops\":%.0f,\"input_gflops\":%.0f,\"weight_gflops\":%.0f,"
        "\"device\":\"%s\",\"commit\":\"%s\"}\n",
        N, OUT, IN, device_threads(), flops / best[0] / 1e9, flops / best[1] / 1e9, flops / best[2] / 1e9, device,
        commit_name());
    arena_free(&arena);
}

int main(int argc, char **argv) {
    const char *only = NULL;
    Routing routing = {NULL, NULL};
    int steps = 0, graph = 1, recompute = RECOMPUTE_NONE;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--model") == 0) {
            only = argv[i + 1];
        } else if (strcmp(argv[i], "--steps") == 0) {
            steps = atoi(argv[i + 1]);
        } else if (strcmp(argv[i], "--graph") == 0) {
            graph = atoi(argv[i + 1]);
        } else if (strcmp(argv[i], "--router") == 0) {
            routing.router = argv[i + 1];
        } else if (strcmp(argv[i], "--force") == 0) {
            routing.force = argv[i + 1];
        } else if (strcmp(argv[i], "--recompute") == 0) {
            recompute = strcmp(argv[i + 1], "norms") == 0     ? RECOMPUTE_NORMS
                        : strcmp(argv[i + 1], "experts") == 0 ? RECOMPUTE_EXPERTS
                                                              : RECOMPUTE_NONE;
        } else {
            die(__FILE__, __LINE__, "unknown option %s: see the head of experiments/bench_train.c", argv[i]);
        }
    }
    char device[128];
    device_open(0);
    device_describe(device, sizeof device);
    bool gpu = device_runs_ahead();
    for (int i = 0; i < MODEL_COUNT; i++) {
        if (only ? strcmp(only, MODELS[i].name) == 0 : MODELS[i].gpu == gpu) {
            bench_model(&MODELS[i], routing, steps > 0 ? steps : MODELS[i].steps, graph, (Recompute)recompute, device);
        }
    }
    if (!only || strcmp(only, "none") == 0) {
        bench_matmul(2048, 512, 128, device);
        bench_matmul(2048, 128, 256, device);
        bench_matmul(1024, 1024, 512, device);
    }
    return 0;
}
