/* One MoE layer, forward and backward: how long it takes, stage by stage, for any router, layout and size.
 *
 *     build/bench_layer_cuda                         the six configurations of LAYERS, a JSON line each
 *     build/bench_layer_cuda --config fine --router sigmoid --layout block
 *     build/bench_layer_cuda --tokens 8192 --dim 1024 --expert-dim 512 --experts 32 --top-k 4 --act swiglu
 *     build/bench_layer_cuda --dispatch 16384,4096,128,2      dispatch + combine alone, and plan: tokens, width, E, K
 *     build/bench_layer                              the same on a CPU
 *
 * Data is normal and random; the backward overwrites the experts' gradients, as the first one of a step does. "ms" and
 * "p95" are median and 95th percentile over repeats of forward + backward, on a GPU of the replayed recording, between
 * two events; "forward_ms" is the median of the forward alone. "forward_stages_ms" and "backward_stages_ms" are means
 * over as many passes, call by call with a lap after each stage, so that their sum is above "ms" where launches cost
 * more than work. FLOPs count 2*m*n*k once: 6*M*C*H forward for SwiGLU (4 for GELU), twice that backward; M counts rows
 * that hold a token. "commit" is what the program was built from.
 *
 * Bytes of dispatch + combine (--dispatch) in two conventions: strict is what must move, (2 + 2K) * T*C numbers;
 * legacy, which some benchmarks print, counts 2*K*T*C. The peer: baselines/torch_gpu.py; both in one job:
 * gpu_compare.sh.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"
#include "../kernels/convert.h"
#include "../kernels/dispatch.h"
#include "../kernels/permute.h"
#include "../kernels/random.h"
#include "../kernels/topk.h"
#include "../model/chain.h"
#include "../model/commit.h"
#include "../model/config.h"
#include "bench.h"

typedef struct {
    const char *name;
    int tokens, dim, expert_dim, experts, top_k;
    const char *act;
} Layer;

static const Layer LAYERS[] = {
    {"course-mid", 16384, 1024, 4096, 8, 2, "gelu"},  {"course-big", 65536, 2048, 8192, 16, 2, "gelu"},
    {"course-top1", 16384, 1024, 4096, 4, 1, "gelu"}, {"olmoe", 32768, 2048, 1024, 64, 8, "swiglu"},
    {"fine", 24576, 1536, 256, 128, 8, "swiglu"},     {"tiny", 16384, 512, 1408, 8, 2, "swiglu"},
};

enum { LAYER_COUNT = sizeof LAYERS / sizeof LAYERS[0], WARM_UP = 5 };

typedef struct {
    const char *router, *layout;
    double capacity_factor;
    int repeats;
} Options;

/* Median, and 95th percentile where it is asked for, in milliseconds, of calls that are the same each time. */
static double measure(void (*call)(void *subject), void *subject, int repeats, double *p95) {
    Recording recording = {0};
    double *ms = calloc(repeats, sizeof(double));
    CHECK(ms, "out of memory for %d times", repeats);
    for (int i = -WARM_UP; i < repeats; i++) {
        Profile profile = {0};
        profile_start(&profile, NULL);
        if (!recording_replay(&recording, NULL)) {
            recording_begin(&recording, NULL);
            call(subject);
            recording_end(&recording, NULL);
        }
        profile_stop(&profile, NULL);
        profile_finish(&profile);
        if (i >= 0) {
            ms[i] = 1e3 * profile.seconds[STAGE_OTHER];
        }
        profile_free(&profile);
    }
    recording_free(&recording);
    double median = bench_median(ms, repeats, p95);
    free(ms);
    return median;
}

/* ---- one layer ---- */

typedef struct {
    Config config;
    RouterContext context;
    TensorList tensors;
    Chain chain;
    MoeScratch scratch;
    ChainScratch chain_scratch;
    Arena arena;
    acc_t *master, *grads, *staging, *load;
    real_t *weights, *x, *y, *dx, *dy;
    int *demand, *tokens;
    int N, C;
} Bench;

static void configure(Config *config, const Layer *l, const Options *o) {
    char number[8][16]; /* the attention that config_finish asks about is not run */
    snprintf(number[0], 16, "%d", l->dim);
    snprintf(number[1], 16, "%d", l->expert_dim);
    snprintf(number[2], 16, "%d", l->experts);
    snprintf(number[3], 16, "%d", l->top_k);
    int seq = l->tokens % 1024 == 0 ? 1024 : l->tokens;
    snprintf(number[4], 16, "%d", seq);
    snprintf(number[5], 16, "%d", l->tokens / seq);
    snprintf(number[6], 16, "%g", o->capacity_factor);
    snprintf(number[7], 16, "%d", l->dim % 64 == 0 ? l->dim / 64 : 1);
    char *arguments[] = {"bench_layer",  "--layers",        "1",
                         "--heads",      number[7],         "--dim",
                         number[0],      "--expert-dim",    number[1],
                         "--experts",    number[2],         "--top-k",
                         number[3],      "--seq",           number[4],
                         "--batch",      number[5],         "--capacity-factor",
                         number[6],      "--router",        (char *)o->router,
                         "--layout",     (char *)o->layout, "--act",
                         (char *)l->act, "--allow-leak"};
    config_parse(config, sizeof arguments / sizeof *arguments, arguments);
    config_finish(config);
}

static void open_bench(Bench *b, const Layer *l, const Options *o) {
    *b = (Bench){.N = l->tokens, .C = l->dim};
    configure(&b->config, l, o);
    size_t NC = (size_t)b->N * b->C;
    b->context = (RouterContext){.T = b->config.model.seq,
                                 .slices = 1,
                                 .routers = chain_routers(&b->config.model, 0),
                                 .ranks = 1,
                                 .seed = 1,
                                 .training = true};
    router_context_reserve(&b->context, &b->arena);
    chain_tensors(&b->tensors, &b->config.model, 0);
    size_t total = b->tensors.total;
    arena_reserve(&b->arena, (void **)&b->master, total * sizeof(acc_t), MEMORY_WEIGHTS);
    arena_reserve(&b->arena, (void **)&b->weights, total * sizeof(real_t), MEMORY_WEIGHTS);
    arena_reserve(&b->arena, (void **)&b->grads, total * sizeof(acc_t), MEMORY_GRADIENTS);
    arena_reserve(&b->arena, (void **)&b->staging, NC * sizeof(acc_t), MEMORY_ACTIVATIONS);
    real_t **rows[] = {&b->x, &b->y, &b->dx, &b->dy};
    for (int i = 0; i < 4; i++) {
        arena_reserve(&b->arena, (void **)rows[i], NC * sizeof(real_t), MEMORY_ACTIVATIONS);
    }
    arena_reserve(&b->arena, (void **)&b->load, 8 * LOAD_VALUES * sizeof(acc_t), MEMORY_ACTIVATIONS);
    arena_reserve(&b->arena, (void **)&b->demand, 8 * (size_t)l->experts * sizeof(int), MEMORY_ACTIVATIONS);
    arena_reserve(&b->arena, (void **)&b->tokens, b->N * sizeof(int), MEMORY_ACTIVATIONS);
    ScratchSize size = {0};
    chain_reserve(&b->chain, &b->config, 0, b->N, &b->context, 0, &size, &b->arena);
    chain_reserve_scratch(&b->chain_scratch, &b->config.model, b->N, &b->arena);
    moe_reserve_scratch(&b->scratch, &b->config.model, size, b->N, true, &b->arena);
    arena_commit(&b->arena);
    b->scratch.din_rows = b->scratch.out_rows;
    b->context.tokens = b->tokens;
    router_context_set_step(&b->context, 0, NULL);
    int all_rows[2] = {0, b->N};
    device_from_host(b->scratch.all_rows, all_rows, sizeof all_rows, NULL);
    chain_connect(&b->chain, &b->tensors, 0, b->weights, b->master, b->grads);
    acc_t *host = calloc(total, sizeof(acc_t));
    CHECK(host, "out of memory for %zu weights", total);
    tensors_init(&b->tensors, host, 1);
    device_from_host(b->master, host, total * sizeof(acc_t), NULL);
    real_from_acc(b->weights, b->master, total, NULL);
    free(host);
    bench_fill(b->x, b->staging, NC, 1, 1);
    bench_fill(b->dy, b->staging, NC, 1, 2);
}

static void close_bench(Bench *b) {
    chain_free(&b->chain);
    router_context_free(&b->context);
    tensors_free(&b->tensors);
    arena_free(&b->arena);
}

static void forward(Bench *b, Profile *profile) {
    chain_forward(&b->chain, &b->scratch, b->y, b->x, b->x, b->load, b->demand, profile, NULL);
}

static void backward(Bench *b, Profile *profile) {
    chain_backward(&b->chain, &b->chain_scratch, &b->scratch, b->dx, b->dy, b->x, 0, profile, NULL);
}

static void run_forward(void *bench) {
    forward(bench, NULL);
}

static void run_both(void *bench) {
    forward(bench, NULL);
    backward(bench, NULL);
}

/* Entries that the experts accepted in the last forward, or rows of a layer that has no plan or a soft one. */
static double rows_with_a_token(const Bench *b) {
    const MoeLayer *moe = &b->chain.moe[0];
    if (!moe->router) {
        return b->N;
    }
    int *count = calloc(moe->plan.E, sizeof(int));
    CHECK(count, "out of memory for %d counts", moe->plan.E);
    host_from_device(count, moe->plan.count, moe->plan.E * sizeof(int), NULL);
    double rows = 0;
    for (int e = 0; e < moe->plan.E; e++) {
        rows += count[e];
    }
    free(count);
    return rows;
}

static void bench_layer(const Layer *l, const Options *o, const char *device) {
    Bench b;
    open_bench(&b, l, o);
    double p95, ms = measure(run_both, &b, o->repeats, &p95), forward_ms = measure(run_forward, &b, o->repeats, NULL);
    Profile stages[2];
    memset(stages, 0, sizeof stages);
    for (int i = 0; i < o->repeats; i++) {
        profile_start(&stages[0], NULL);
        forward(&b, &stages[0]);
        profile_stop(&stages[0], NULL);
        profile_start(&stages[1], NULL);
        backward(&b, &stages[1]);
        profile_stop(&stages[1], NULL);
    }
    profile_finish(&stages[0]);
    profile_finish(&stages[1]);
    double M = rows_with_a_token(&b);
    double flops = 3.0 * (strcmp(l->act, "gelu") == 0 ? 4 : 6) * M * l->dim * l->expert_dim;
    printf(
        "{\"layer\":\"%s\",\"impl\":\"moelab\",\"router\":\"%s\",\"layout\":\"%s\",\"tokens\":%d,\"dim\":%d,"
        "\"expert_dim\":%d,\"experts\":%d,\"top_k\":%d,\"act\":\"%s\",\"rows\":%.0f,\"ms\":%.4f,\"p95\":%.4f,"
        "\"forward_ms\":%.4f,\"tflops\":%.1f,\"repeats\":%d,"
        "\"peak_mib\":%.0f,\"device\":\"%s\",\"commit\":\"%s\"",
        l->name, o->router, o->layout, l->tokens, l->dim, l->expert_dim, l->experts, l->top_k, l->act, M, ms, p95,
        forward_ms, flops / ms / 1e9, o->repeats, b.arena.bytes / 1048576.0, device, commit_name());
    bench_print_stages("forward_stages_ms", &stages[0], o->repeats);
    bench_print_stages("backward_stages_ms", &stages[1], o->repeats);
    printf("}\n");
    fflush(stdout);
    profile_free(&stages[0]);
    profile_free(&stages[1]);
    close_bench(&b);
}

/* ---- dispatch + combine alone ---- */

typedef struct {
    Arena arena;
    Plan plan;
    acc_t *logits, *probs, *lse, *staging;
    real_t *x, *rows, *y;
    int C;
} Moves;

static void open_moves(Moves *m, int N, int C, int E, int K) {
    *m = (Moves){.C = C};
    Plan *p = &m->plan;
    *p = (Plan){.N = N, .E = E, .K = K, .rows = plan_rows(N, E, K, 0, LAYOUT_COMPACT)};
    size_t NK = (size_t)N * K, NC = (size_t)N * C;
    struct {
        void *slot;
        size_t bytes;
    } arrays[] = {{&p->expert, NK * sizeof(int)},
                  {&p->weight, NK * sizeof(acc_t)},
                  {&p->row, NK * sizeof(int)},
                  {&p->entry, NK * sizeof(int)},
                  {&p->row_weight, NK * sizeof(acc_t)},
                  {&p->demand, E * sizeof(int)},
                  {&p->count, E * sizeof(int)},
                  {&p->offset, (E + 1) * sizeof(int)},
                  {&m->logits, (size_t)N * E * sizeof(acc_t)},
                  {&m->probs, (size_t)N * E * sizeof(acc_t)},
                  {&m->lse, N * sizeof(acc_t)},
                  {&m->staging, NC * sizeof(acc_t)},
                  {&m->x, NC * sizeof(real_t)},
                  {&m->y, NC * sizeof(real_t)},
                  {&m->rows, NK * C * sizeof(real_t)}};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) {
        arena_reserve(&m->arena, arrays[i].slot, arrays[i].bytes, MEMORY_ACTIVATIONS);
    }
    arena_commit(&m->arena);
    bench_fill(m->x, m->staging, NC, 1, 1);
    acc_t *host = malloc((size_t)N * E * sizeof(acc_t));
    CHECK(host, "out of memory for %d x %d logits", N, E);
    for (size_t i = 0; i < (size_t)N * E; i++) {
        host[i] = random_normal(random_key(1, RANDOM_TEST, 3), i);
    }
    device_from_host(m->logits, host, (size_t)N * E * sizeof(acc_t), NULL);
    device_wait(NULL);
    free(host);
}

static void make_plan(void *moves) {
    Moves *m = moves;
    Plan *p = &m->plan;
    topk_forward(m->probs, m->lse, p->expert, p->weight, m->logits, p->N, p->E, p->K, 1, NULL);
    plan_build(p, NULL);
}

static void move(void *moves) {
    Moves *m = moves;
    dispatch_copy(m->rows, m->x, &m->plan, m->C, NULL);
    combine_forward(m->y, m->rows, &m->plan, m->C, 0, NULL);
}

static void copy(void *moves) {
    Moves *m = moves;
    size_t half = (size_t)m->plan.rows * m->C * sizeof(real_t) / 2;
    device_copy(m->rows, (char *)m->rows + half, half, NULL);
}

static void bench_dispatch(const char *shape, int repeats, const char *device) {
    int N, C, E, K;
    CHECK(sscanf(shape, "%d,%d,%d,%d", &N, &C, &E, &K) == 4 && N > 0 && C > 0 && E > 0 && K > 0 && K <= E,
          "--dispatch %s: give tokens,width,experts,k, for example 16384,4096,128,2", shape);
    Moves m;
    open_moves(&m, N, C, E, K);
    double plan_ms = measure(make_plan, &m, repeats, NULL), ms = measure(move, &m, repeats, NULL);
    double copy_ms = measure(copy, &m, repeats, NULL), number = sizeof(real_t) * (double)N * C;
    double strict = (2 + 2 * K) * number / ms / 1e6, copied = K * number / copy_ms / 1e6;
    printf(
        "{\"dispatch\":\"%s\",\"impl\":\"moelab\",\"ms\":%.4f,\"gb_s\":%.0f,\"gb_s_legacy\":%.0f,\"copy_gb_s\":%.0f,"
        "\"share_of_copy\":%.3f,\"plan_ms\":%.4f,\"repeats\":%d,\"device\":\"%s\","
        "\"commit\":\"%s\"}\n",
        shape, ms, strict, 2 * K * number / ms / 1e6, copied, strict / copied, plan_ms, repeats, device, commit_name());
    fflush(stdout);
    arena_free(&m.arena);
}

int main(int argc, char **argv) {
    Layer own = {
        .name = NULL, .tokens = 16384, .dim = 512, .expert_dim = 1408, .experts = 8, .top_k = 2, .act = "swiglu"};
    Options o = {.router = "topk", .layout = "compact", .repeats = 50};
    const char *only = NULL, *dispatch = NULL;
    for (int i = 1; i < argc; i += 2) {
        struct {
            const char *name;
            int *number;
            const char **text;
        } table[] = {
            {"--tokens", &own.tokens, NULL},   {"--dim", &own.dim, NULL},      {"--expert-dim", &own.expert_dim, NULL},
            {"--experts", &own.experts, NULL}, {"--top-k", &own.top_k, NULL},  {"--act", NULL, &own.act},
            {"--repeats", &o.repeats, NULL},   {"--router", NULL, &o.router},  {"--layout", NULL, &o.layout},
            {"--config", NULL, &only},         {"--dispatch", NULL, &dispatch}};
        bool found = strcmp(argv[i], "--capacity-factor") == 0 && i + 1 < argc;
        if (found) {
            o.capacity_factor = atof(argv[i + 1]);
        }
        for (size_t t = 0; t < sizeof table / sizeof *table && i + 1 < argc; t++) {
            if (strcmp(argv[i], table[t].name) == 0) {
                found = true;
                if (table[t].number) {
                    *table[t].number = atoi(argv[i + 1]);
                    own.name = t < 5 ? "own" : own.name;
                } else {
                    *table[t].text = argv[i + 1];
                }
            }
        }
        CHECK(found, "unknown option or no value: %s; see the head of experiments/bench_layer.c", argv[i]);
    }
    CHECK(o.repeats > 0, "--repeats %d: give at least 1", o.repeats);
    char device[128];
    device_open(0, 1);
    device_describe(device, sizeof device);
    if (dispatch) {
        bench_dispatch(dispatch, o.repeats, device);
    } else if (own.name) {
        bench_layer(&own, &o, device);
    } else {
        bool known = !only;
        for (int i = 0; i < LAYER_COUNT; i++) {
            if (!only || strcmp(only, LAYERS[i].name) == 0) {
                bench_layer(&LAYERS[i], &o, device);
                known = true;
            }
        }
        CHECK(known, "--config %s is not known: course-mid, course-big, course-top1, olmoe, fine or tiny", only);
    }
    return 0;
}
