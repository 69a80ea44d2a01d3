/* Speed of whole training steps, and of the matrix product, on a CPU or a GPU: the same source linked to either
 * backend.
 *
 *     build/bench_train                          the models of the CPU, one JSON line each
 *     build/bench_train --model cpu-mid --steps 20
 *     build/bench_train_cuda --model d12         the models of the GPU are d12, d12-fine, d12-dense, tiny, tiny-byte
 *     build/bench_train_cuda --model d12 --router forced --force balanced    without it: the price of uneven experts
 *     build/bench_train --model none             matrix products alone
 *     mpirun -n 4 build/bench_train_cuda --model d12 --ep 4                  four ranks, each with the model's batch
 *     mpirun -n 4 build/bench_train_cuda --model d12 --ep 4 --strong 1       .. that share it
 *
 * --steps is the number of steps that are timed. All other options are those of ./train that the model does not set:
 * --recompute experts for less memory, --graph 0 to queue call by call.
 *
 * Whole steps: forward, loss, backward, clipping, AdamW on tokens drawn from a fixed Zipf-like distribution, copied to
 * the device inside the time; the median of the steps after a warm-up. On a GPU steps are queued in groups, since to
 * wait for each would leave the device idle in between: the median is that of the groups. A last step with stage times
 * is not in the median. FLOPs as in transformer_flops_per_token. The same models in PyTorch: baselines/torch_cpu.py
 * and torch_gpu.py; both in one job: cpu_compare.sh, gpu_compare.sh, and on several ranks scaling_compare.sh.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"
#include "../kernels/comm.h"
#include "../kernels/matmul.h"
#include "../kernels/random.h"
#include "../model/commit.h"
#include "../model/config.h"
#include "../model/cost.h"
#include "../model/exchange.h"
#include "../model/optimizer.h"
#include "../model/process.h"
#include "../model/transformer.h"
#include "bench.h"
#include "bench_models.h"

enum { WARM_UP = 5, GROUP = 5, MOST_WORDS = 256 };

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
    int ranks;
} Bench;

static void queue_step(Bench *b) {
    transformer_forward(&b->model, b->tokens, 0, NULL);
    transformer_loss(&b->model, b->tokens + 1, 0, true, NULL);
    transformer_backward(&b->model, b->tokens, 0, NULL);
    transformer_sum_ranks(&b->model, NULL);
    optimizer_step(&b->optimizer, &b->model, &b->config.train, NULL);
    transformer_update_routers(&b->model, b->optimizer.state, NULL);
}

static void run_step(Bench *b, int s, bool record) {
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

/* The model's options, and behind them those of the command line (count). strong: ranks share the model's batch, else
 * each has as much. */
static void configure(Config *config, const Model *m, bool strong, char **options, int count) {
    char text[512], *words[MOST_WORDS] = {"bench_train", "--steps", "10000", "--tie", m->gpu ? "1" : "0"};
    int used = 5;
    snprintf(text, sizeof text, "%s", m->options);
    for (char *word = strtok(text, " "); word; word = strtok(NULL, " ")) {
        words[used++] = word;
    }
    CHECK(used + count <= MOST_WORDS, "%d words are too many for a command line", count);
    memcpy(words + used, options, count * sizeof(char *));
    config_parse(config, used + count, words);
    config_finish(config);
    config->train.batch *= strong ? 1 : comm_ranks(GROUP_WORLD);
    comm_form_groups(config->train.ep);
    exchange_check(config);
    CHECK(config->train.grad_accum == 1, "--grad-accum %d: steps are timed whole; drop it", config->train.grad_accum);
}

static void open_bench(Bench *b) {
    ModelConfig *c = &b->config.model;
    int batch = b->config.train.batch / b->ranks;
    size_t N = (size_t)batch * c->seq;
    transformer_reserve(&b->model, &b->config, batch, 1, USE_TRAIN, NULL, &b->arena);
    optimizer_reserve(&b->optimizer, &b->model.tensors, &b->arena);
    arena_reserve(&b->arena, (void **)&b->tokens, (N + 1) * sizeof(int), MEMORY_ACTIVATIONS);
    arena_commit(&b->arena);
    exchange_open(&b->config, &b->arena);
    transformer_connect(&b->model);
    optimizer_connect(&b->optimizer, &b->model.tensors, &b->config.train);
    acc_t *host = calloc(b->model.tensors.total, sizeof(acc_t));
    b->host_tokens = calloc(N + 8, sizeof(int)); /* step s reads it from s % 7 on, so that batches differ */
    double *frequency = calloc(c->vocab, sizeof(double));
    CHECK(host && b->host_tokens && frequency, "out of memory for the weights and a batch");
    for (size_t n = 0; n < N + 8; n++) {
        b->host_tokens[n] = zipf_token(comm_rank(GROUP_WORLD), (int)n, c->vocab);
        frequency[b->host_tokens[n]]++;
    }
    transformer_init(&b->model, host, 1, frequency);
    transformer_load(&b->model, host);
    free(frequency);
    free(host);
}

static void close_bench(Bench *b) {
    recording_free(&b->recording);
    free(b->host_tokens);
    transformer_free(&b->model);
    exchange_close();
    arena_free(&b->arena);
}

static void print_result(Bench *b, const Model *m, bool strong, double median, double p95, int steps,
                         const Profile *profile, const double *exchange, const char *device) {
    const TrainConfig *t = &b->config.train;
    double flops = transformer_flops_per_token(&b->model), speed = (double)b->model.N * b->ranks / median;
    double peak = device_peak_flops() * b->ranks;
    acc_t loss;
    host_from_device(&loss, b->model.step_loss, sizeof loss, NULL);
    printf(
        "{\"model\":\"%s\",\"impl\":\"moelab\",\"router\":\"%s\",\"ranks\":%d,\"ep\":%d,\"mode\":\"%s\",\"threads\":%d,"
        "\"ms\":%.4f,\"p95\":%.4f,"
        "\"tok_s\":%.0f,\"gflops\":%.1f,\"mfu\":%.4f,\"steps\":%d,\"graph\":%d,\"recompute\":%d,\"loss\":%.4f,"
        "\"arena_mib\":%.1f,\"peak_mib\":%.1f,\"device\":\"%s\",\"commit\":\"%s\"",
        m->name, b->config.model.router, b->ranks, t->ep, strong ? "strong" : "weak", device_threads(), 1e3 * median,
        1e3 * p95, speed, speed * flops / 1e9, peak > 0 ? speed * flops / peak : 0, steps, t->graph, t->recompute,
        (double)loss, b->arena.bytes / 1048576.0, device_peak_memory() / 1048576.0, device, commit_name());
    bench_print_stages("stages_ms", profile, 1);
    printf(",\"exchange_ms\":[");
    for (int r = 0; r < b->ranks; r++) {
        printf("%s%.4f", r ? "," : "", 1e3 * exchange[r]);
    }
    printf("]}\n");
    fflush(stdout);
}

/* What each rank takes for what moves between ranks, in seconds; the caller's. The rank that the others wait for takes
 * least: that much is exposed, the rest is waiting. */
static double *exchange_of_ranks(const Bench *b, const Profile *profile) {
    double *exchange = calloc(b->ranks, sizeof *exchange);
    CHECK(exchange, "out of memory for the times of %d ranks", b->ranks);
    exchange[comm_rank(GROUP_WORLD)] = profile->seconds[STAGE_EXCHANGE];
    comm_sum_host(exchange, b->ranks);
    return exchange;
}

static void bench_model(const Model *m, int steps, bool strong, char **options, int option_count, const char *device) {
    Bench b = {.ranks = comm_ranks(GROUP_WORLD)};
    configure(&b.config, m, strong, options, option_count);
    open_bench(&b);
    bool graph = b.config.train.graph && exchange_recordable(&b.config);
    int group = device_runs_ahead() ? GROUP : 1, groups = (steps + group - 1) / group, done = 0;
    double *seconds = calloc(groups, sizeof(double)), p95;
    CHECK(seconds, "out of memory for %d times", groups);
    while (done < WARM_UP) {
        run_step(&b, done++, graph);
    }
    device_wait(NULL);
    for (int g = 0; g < groups; g++) {
        double start = seconds_now();
        for (int i = 0; i < group; i++) {
            run_step(&b, done++, graph);
        }
        device_wait(NULL);
        seconds[g] = (seconds_now() - start) / group;
    }
    Profile profile = {0};
    b.model.profile = &profile;
    profile_start(&profile, NULL);
    run_step(&b, done, false);
    profile_stop(&profile, NULL);
    profile_finish(&profile);
    double median = bench_median(seconds, groups, &p95);
    double *exchange = exchange_of_ranks(&b, &profile);
    print_result(&b, m, strong, median, p95, steps, &profile, exchange, device);
    free(exchange);
    profile_free(&profile);
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
    char *options[MOST_WORDS], device[128];
    int steps = 0, count = 0;
    bool strong = false;
    comm_open();
    for (int i = 1; i < argc; i++) {
        bool ours = strcmp(argv[i], "--model") == 0 || strcmp(argv[i], "--steps") == 0;
        ours |= strcmp(argv[i], "--strong") == 0;
        CHECK(!ours || i + 1 < argc, "%s needs a value", argv[i]);
        if (strcmp(argv[i], "--model") == 0) {
            only = argv[++i];
        } else if (strcmp(argv[i], "--steps") == 0) {
            steps = atoi(argv[++i]);
            CHECK(steps > 0, "--steps %s: give at least 1", argv[i]);
        } else if (strcmp(argv[i], "--strong") == 0) {
            strong = atoi(argv[++i]) != 0;
        } else {
            CHECK(count < MOST_WORDS, "%d words are too many for a command line", argc);
            options[count++] = argv[i];
        }
    }
    if (comm_rank(GROUP_WORLD) > 0) {
        process_be_quiet();
    }
    device_open(comm_local_rank(), comm_local_ranks());
    device_describe(device, sizeof device);
    bool known = !only || strcmp(only, "none") == 0, gpu = device_runs_ahead();
    for (int i = 0; i < MODEL_COUNT; i++) {
        const Model *m = &MODELS[i];
        if (only ? strcmp(only, m->name) == 0 : m->gpu == gpu) {
            bench_model(m, steps > 0 ? steps : m->steps, strong, options, count, device);
            known = true;
        }
    }
    CHECK(known, "--model %s is not known: see the table in experiments/bench_models.h", only);
    if (!only || strcmp(only, "none") == 0) {
        bench_matmul(2048, 512, 128, device);
        bench_matmul(2048, 128, 256, device);
        bench_matmul(1024, 1024, 512, device);
    }
    comm_close();
    return 0;
}
