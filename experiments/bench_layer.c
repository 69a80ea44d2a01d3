/* One MoE layer, forward and backward: how long it takes, stage by stage, for any router, layout and size; and grids of
 * such measurements.
 *
 *     build/bench_layer_cuda                         the six configurations of LAYERS, a JSON line each
 *     build/bench_layer_cuda --config fine --router sigmoid --layout block
 *     build/bench_layer_cuda --tokens 8192 --dim 1024 --expert-dim 512 --experts 32 --top-k 4 --act swiglu
 *     build/bench_layer_cuda --dispatch 16384,4096,128,2      dispatch + combine alone, and plan: tokens, width, E, K
 *     build/bench_layer                              the same on a CPU
 *
 *     build/bench_layer_cuda --grid course     batch x length {32x128, 64x256, 128x512}, dim {1024, 2048}, experts {4,
 *                                              8, 16}: topk (K=2) and top1 in the layouts compact, padded with capacity
 *                                              factors 1 and 1.25, block; soft: 162 points
 *     build/bench_layer_cuda --grid large      tokens {8192, 16384, 32768}, dim 4096, experts {64, 128, 256}, K=2,
 *                                              SwiGLU of 1024: topk in the four layouts: 36 points
 *     build/bench_layer_cuda --grid pack       dispatch and combine without experts: tokens as large, dim {2048, 4096},
 *                                              experts {32, 64, 128}, K {1, 2, 4}: 54 points
 *     build/bench_layer --grid pack --scale small    a twin of a few hundred tokens, minutes on a laptop
 *
 * Options of grids (what a line says: bench_grid.c; run, keep and tabulate: grids.sh):
 *
 *     --router A,B  --layout A,B       instead of the grid's own      --capacity-factor X   of padded, instead of both
 *     --load router|uniform|zipf:S     who chooses: the router; equal loads; expert e with probability ~ (e+1)^-S. The
 *                                      latter two take the router "forced"
 *     --shared-weights 1               all experts get the first one's weights: what differs is the routing (labelled)
 *     --points A-B                     these points alone, counted from 1 as the lines and a dry run do
 *     --seed 17  --warm-up 10  --iterations 100  --repeats-of-all 3
 *     --seconds S                      of a point, shared by its repeats: after them fewer iterations are done, but 3
 *     --memory GIB                     a point that needs more is skipped, with a line that says so; default: what is
 *                                      free
 *     --dry-run 1                      the points alone; nothing is measured and no device is opened
 *
 * Data is normal and random; the backward overwrites the experts' gradients, as the first one of a step does. "ms" and
 * "p95" are median and 95th percentile over repeats of forward + backward, on a GPU of the replayed recording, between
 * two events; "forward_ms" is the median of the forward alone. "forward_stages_ms" and "backward_stages_ms" are means
 * over as many passes, call by call with a lap after each stage, so that their sum is above "ms" where launches cost
 * more than work. FLOPs count 2*m*n*k once: 6*M*C*H forward for SwiGLU (4 for GELU), twice that backward; M counts rows
 * that hold a token. "commit" is what the program was built from.
 *
 * Bytes of dispatch + combine (--dispatch, --grid) in two conventions: strict is what must move, (2 + 2K) * T*C
 * numbers; legacy, which some benchmarks print, counts 2*K*T*C. The peer: baselines/torch_gpu.py; both in one job:
 * gpu_compare.sh.
 */
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"
#include "../kernels/device.h"
#include "../model/commit.h"
#include "bench.h"
#include "bench_grid.h"
#include "bench_moe.h"
#include "bench_moves.h"
#include "bench_times.h"

static const LayerShape LAYERS[] = {
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
    Times times = {0};
    Recording recording = {0};
    times_measure(&times, &recording, call, subject, (Effort){WARM_UP, repeats, 0});
    double median = times_median(&times);
    if (p95) {
        *p95 = times_quantile(&times, 0.95);
    }
    recording_free(&recording);
    times_free(&times);
    return median;
}

/* ---- one layer ---- */

static void run_forward(void *bench) {
    moe_bench_forward(bench, NULL);
}

static void run_both(void *bench) {
    moe_bench_forward(bench, NULL);
    moe_bench_backward(bench, NULL);
}

static void bench_layer(const LayerShape *l, const Options *o, const char *device) {
    LayerChoice choice = {
        .router = o->router, .layout = o->layout, .capacity_factor = o->capacity_factor, .seed = 1, .memory = SIZE_MAX};
    MoeBench b;
    moe_bench_open(&b, l, &choice);
    double p95, ms = measure(run_both, &b, o->repeats, &p95), forward_ms = measure(run_forward, &b, o->repeats, NULL);
    Profile stages[2];
    memset(stages, 0, sizeof stages);
    for (int i = 0; i < o->repeats; i++) {
        profile_start(&stages[0], NULL);
        moe_bench_forward(&b, &stages[0]);
        profile_stop(&stages[0], NULL);
        profile_start(&stages[1], NULL);
        moe_bench_backward(&b, &stages[1]);
        profile_stop(&stages[1], NULL);
    }
    profile_finish(&stages[0]);
    profile_finish(&stages[1]);
    double M = moe_bench_load(&b).accepted / b.chain.steps;
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
    moe_bench_close(&b);
}

/* ---- dispatch + combine alone ---- */

static void make_plan(void *moves) {
    moves_choose(moves);
    moves_plan(moves);
}

static void move(void *moves) {
    moves_dispatch(moves);
    moves_combine(moves);
}

static void copy(void *moves) {
    Moves *m = moves;
    size_t half = (size_t)m->plan.rows * m->shape.C * sizeof(real_t) / 2;
    device_copy(m->rows, (char *)m->rows + half, half, NULL);
}

static void bench_dispatch(const char *shape, int repeats, const char *device) {
    int N, C, E, K;
    CHECK(sscanf(shape, "%d,%d,%d,%d", &N, &C, &E, &K) == 4 && N > 0 && C > 0 && E > 0 && K > 0 && K <= E,
          "--dispatch %s: give tokens,width,experts,k, for example 16384,4096,128,2", shape);
    Moves m;
    moves_open(&m, (MoveShape){.N = N, .C = C, .E = E, .K = K, .seed = 1}, SIZE_MAX);
    double plan_ms = measure(make_plan, &m, repeats, NULL), ms = measure(move, &m, repeats, NULL);
    double copy_ms = measure(copy, &m, repeats, NULL), number = sizeof(real_t) * (double)N * C;
    double strict = moves_bw_strict(N, C, K, sizeof(real_t), ms), copied = K * number / copy_ms / 1e6;
    printf(
        "{\"dispatch\":\"%s\",\"impl\":\"moelab\",\"ms\":%.4f,\"gb_s\":%.0f,\"gb_s_legacy\":%.0f,\"copy_gb_s\":%.0f,"
        "\"share_of_copy\":%.3f,\"plan_ms\":%.4f,\"repeats\":%d,\"device\":\"%s\","
        "\"commit\":\"%s\"}\n",
        shape, ms, strict, moves_bw_legacy(N, C, K, sizeof(real_t), ms), copied, strict / copied, plan_ms, repeats,
        device, commit_name());
    fflush(stdout);
    moves_close(&m);
}

/* An option and where its value goes: one of the three. */
typedef struct {
    const char *name;
    int *number;
    const char **text;
    double *real;
} Flag;

static void read_flags(const Flag *flags, int count, int argc, char **argv, LayerShape *own) {
    for (int i = 1; i < argc; i += 2) {
        const Flag *flag = NULL;
        for (int f = 0; f < count && i + 1 < argc; f++) {
            flag = strcmp(argv[i], flags[f].name) == 0 ? &flags[f] : flag;
        }
        CHECK(flag, "unknown option or no value: %s; see the head of experiments/bench_layer.c", argv[i]);
        char *end = argv[i + 1];
        if (flag->text) {
            *flag->text = argv[i + 1];
            continue;
        }
        double value = strtod(argv[i + 1], &end);
        CHECK(end > argv[i + 1] && !*end, "%s %s: give a number", argv[i], argv[i + 1]);
        if (flag->real) {
            *flag->real = value;
        } else {
            CHECK(value >= INT_MIN && value <= INT_MAX && value == (int)value, "%s %s: give a whole number", argv[i],
                  argv[i + 1]);
            *flag->number = (int)value;
            own->name = flag->number >= &own->tokens && flag->number <= &own->top_k ? "own" : own->name;
        }
    }
}

static void bench_layers(const LayerShape *own, const char *only, const Options *o, const char *device) {
    bool known = !only || own->name;
    if (own->name) {
        bench_layer(own, o, device);
    }
    for (int i = 0; i < LAYER_COUNT && !own->name; i++) {
        if (!only || strcmp(only, LAYERS[i].name) == 0) {
            bench_layer(&LAYERS[i], o, device);
            known = true;
        }
    }
    CHECK(known, "--config %s is not known: course-mid, course-big, course-top1, olmoe, fine or tiny", only);
}

int main(int argc, char **argv) {
    LayerShape own = {
        .name = NULL, .tokens = 16384, .dim = 512, .expert_dim = 1408, .experts = 8, .top_k = 2, .act = "swiglu"};
    Options o = {.repeats = 50};
    GridOptions grid = {
        .scale = "full", .load = "router", .repeats = 3, .warm_up = 10, .iterations = 100, .seed = 17, .seconds = -1};
    const char *only = NULL, *dispatch = NULL;
    const Flag flags[] = {{"--tokens", .number = &own.tokens},
                          {"--dim", .number = &own.dim},
                          {"--expert-dim", .number = &own.expert_dim},
                          {"--experts", .number = &own.experts},
                          {"--top-k", .number = &own.top_k},
                          {"--act", .text = &own.act},
                          {"--repeats", .number = &o.repeats},
                          {"--router", .text = &o.router},
                          {"--layout", .text = &o.layout},
                          {"--capacity-factor", .real = &o.capacity_factor},
                          {"--config", .text = &only},
                          {"--dispatch", .text = &dispatch},
                          {"--grid", .text = &grid.grid},
                          {"--scale", .text = &grid.scale},
                          {"--load", .text = &grid.load},
                          {"--points", .text = &grid.points},
                          {"--shared-weights", .number = &grid.shared_weights},
                          {"--repeats-of-all", .number = &grid.repeats},
                          {"--warm-up", .number = &grid.warm_up},
                          {"--iterations", .number = &grid.iterations},
                          {"--seed", .number = &grid.seed},
                          {"--seconds", .real = &grid.seconds},
                          {"--memory", .real = &grid.memory},
                          {"--dry-run", .number = &grid.dry_run}};
    char device[128];
    read_flags(flags, sizeof flags / sizeof *flags, argc, argv, &own);
    CHECK(o.repeats > 0, "--repeats %d: give at least 1", o.repeats);
    if (grid.grid && grid.dry_run) {
        grid.routers = o.router, grid.layouts = o.layout, grid.capacity_factor = o.capacity_factor;
        bench_grid(&grid, NULL);
        return 0;
    }
    device_open(0, 1);
    device_describe(device, sizeof device);
    if (grid.grid) {
        grid.routers = o.router, grid.layouts = o.layout, grid.capacity_factor = o.capacity_factor;
        bench_grid(&grid, device);
        return 0;
    }
    o.router = o.router ? o.router : "topk";
    o.layout = o.layout ? o.layout : "compact";
    if (dispatch) {
        bench_dispatch(dispatch, o.repeats, device);
    } else {
        bench_layers(&own, only, &o, device);
    }
    return 0;
}
