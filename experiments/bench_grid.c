/* The grids, point by point: shapes, routers and layouts in turn, each opened, measured and closed. How to run them:
 * the head of bench_layer.c. What a line says: bench_grid_line.h. */
#include "bench_grid.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"
#include "../kernels/dispatch.h"
#include "../model/balance.h"
#include "bench_grid_line.h"
#include "bench_moves.h"

static const Grid GRIDS[] = {
    {"course",
     "full",
     {{32, 128}, {64, 256}, {128, 512}},
     {1024, 2048},
     {4, 8, 16},
     {2},
     0,
     "gelu",
     "topk,top1,soft",
     "compact,padded,block",
     0.2},
    {"course",
     "small",
     {{4, 32}, {8, 32}, {8, 64}},
     {64, 128},
     {4, 8, 16},
     {2},
     0,
     "gelu",
     "topk,top1,soft",
     "compact,padded,block",
     0.25},
    {"large",
     "full",
     {{8, 1024}, {16, 1024}, {32, 1024}},
     {4096},
     {64, 128, 256},
     {2},
     1024,
     "swiglu",
     "topk",
     "compact,padded,block",
     0.7},
    {"large",
     "small",
     {{4, 64}, {8, 64}, {16, 64}},
     {128},
     {16, 32, 64},
     {2},
     32,
     "swiglu",
     "topk",
     "compact,padded,block",
     0.3},
    {"pack",
     "full",
     {{8, 1024}, {16, 1024}, {32, 1024}},
     {2048, 4096},
     {32, 64, 128},
     {1, 2, 4},
     0,
     "none",
     "topk",
     "compact",
     0.5},
    {"pack",
     "small",
     {{4, 64}, {8, 64}, {16, 64}},
     {64, 128},
     {8, 16, 32},
     {1, 2, 4},
     0,
     "none",
     "topk",
     "compact",
     0.3},
};

/* Bytes that a point may take: some are left for what kernels need beside their arrays. */
static size_t memory_of(const Point *p) {
    if (p->options->memory > 0) {
        return (size_t)(p->options->memory * 1073741824.0);
    }
    size_t free_bytes = device_memory_free(), kept = free_bytes / 16;
    return free_bytes - kept;
}

/* The things that are measured in a repeat, `parts` of them, share its time equally. */
static Effort effort_of(const Point *p, int parts) {
    const GridOptions *o = p->options;
    return (Effort){o->warm_up, o->iterations, point_seconds(p) / o->repeats / parts};
}

/* ---- a whole layer */

static void layer_forward(void *bench) {
    moe_bench_forward(bench, NULL);
}

static void layer_both(void *bench) {
    moe_bench_forward(bench, NULL);
    moe_bench_backward(bench, NULL);
}

static void layer_stages(void *bench, Profile *profile) {
    moe_bench_forward(bench, profile);
}

/* FLOPs and bytes of each stage of the forward, from the rows that the last one had. */
static void count_layer(Result *r, const MoeBench *b) {
    const MoeLayer *moe = &b->chain.moe[0];
    const MoeBenchLoad *l = &r->load;
    double real = sizeof(real_t), acc = sizeof(acc_t), steps = b->chain.steps, N = b->N, C = b->C;
    double H = moe->experts.H, width = experts_a_width(moe->experts), held = moe->experts.E;
    double weights = held * (width + H) * C;
    r->flops[EXPERTS] = 2 * l->accepted * C * (width + H);
    /* x and W1 in, a and h out; h and W2 in, y out; each step of a chain anew */
    r->bytes[EXPERTS] = (steps * weights + l->computed * (2 * C + width + 2 * H)) * real;
    if (!moe->router) {
        return;
    }
    const Plan *plan = &moe->plan;
    double E = plan->E, K = plan->K, rows = l->computed / steps, accepted = l->accepted / steps;
    if (plan->slots > 0) { /* logits and both softmaxes (N,K); the two mixtures are products over a group's tokens */
        r->flops[ROUTE] = steps * 2 * N * C * K;
        r->bytes[ROUTE] = steps * (N * C * real + K * C * acc + 5 * N * K * acc);
        r->flops[DISPATCH] = r->flops[COMBINE] = steps * 2 * N * K * C;
        r->bytes[DISPATCH] = r->bytes[COMBINE] = steps * ((N + rows) * C * real + N * K * acc);
        return;
    }
    r->flops[ROUTE] = steps * 2 * N * C * E;
    r->bytes[ROUTE] = steps * (N * C * real + E * C * acc + 3 * N * E * acc + N * K * (sizeof(int) + acc));
    r->bytes[PERMUTE] = steps * (N * K * (2 * sizeof(int) + acc) + rows * (sizeof(int) + acc) + N * E * acc);
    r->bytes[DISPATCH] = dispatch_copies() ? steps * moves_dispatch_bytes(plan, b->C, accepted, rows) : 0;
    r->bytes[COMBINE] = steps * moves_combine_bytes(plan, b->C, accepted);
    r->flops[COMBINE] = 2 * l->accepted * C;
}

static void run_layer(const Point *p) {
    const GridOptions *o = p->options;
    bool slots = strcmp(p->layout, "slots") == 0, forced = strcmp(o->load, "router") != 0;
    LayerShape shape = {.name = p->grid->name,
                        .tokens = p->batch * p->seq,
                        .dim = p->dim,
                        .expert_dim = p->expert_dim,
                        .experts = p->experts,
                        .top_k = p->top_k,
                        .act = p->grid->act};
    LayerChoice choice = {.router = p->router,
                          .layout = slots ? "compact" : p->layout,
                          .force = !forced                       ? NULL
                                   : !strcmp(o->load, "uniform") ? "balanced"
                                                                 : o->load,
                          .capacity_factor = p->capacity_factor,
                          .seq = p->seq,
                          .seed = o->seed,
                          .shared_weights = o->shared_weights,
                          .memory = memory_of(p)};
    MoeBench b;
    size_t needed = moe_bench_open(&b, &shape, &choice);
    if (needed > 0) {
        print_skipped(p, needed);
        return;
    }
    Result r = {.arena = &b.arena};
    Recording forward = {0}, both = {0};
    for (int i = 0; i < o->repeats; i++) {
        times_measure(&r.forward, &forward, layer_forward, &b, effort_of(p, 3));
        times_measure(&r.both, &both, layer_both, &b, effort_of(p, 3));
        times_stages(r.stages, layer_stages, &b, effort_of(p, 3));
    }
    r.load = moe_bench_load(&b);
    count_layer(&r, &b);
    bool moves = !slots && dispatch_copies() && b.chain.moe[0].router;
    print_result(p, &r, moves ? times_median(part_times(&r, DISPATCH)) + times_median(part_times(&r, COMBINE)) : 0);
    recording_free(&forward);
    recording_free(&both);
    free_result(&r);
    moe_bench_close(&b);
}

/* ---- moves without experts */

static void pack_stages(void *moves, Profile *profile) {
    profile_stage(profile, STAGE_ROUTE, NULL);
    moves_gate(moves);
    moves_choose(moves);
    profile_stage(profile, STAGE_PERMUTE, NULL);
    moves_plan(moves);
    profile_stage(profile, STAGE_DISPATCH, NULL);
    moves_dispatch(moves);
    profile_stage(profile, STAGE_COMBINE, NULL);
    moves_combine(moves);
}

static void pack_forward(void *moves) {
    pack_stages(moves, NULL);
}

static void pack_both(void *moves) {
    pack_stages(moves, NULL);
    moves_backward(moves);
}

static void pack_moves(void *moves) {
    moves_dispatch(moves);
    moves_combine(moves);
}

static void count_pack(Result *r, const Moves *m) {
    const Plan *plan = &m->plan;
    int E = plan->E, *numbers = calloc(2 * (size_t)E, sizeof(int)), rows;
    double *demand = calloc(E, sizeof(double)), acc = sizeof(acc_t), N = plan->N, K = plan->K, C = m->shape.C;
    CHECK(numbers && demand, "out of memory for %d counts", E);
    host_from_device(numbers, plan->demand, E * sizeof(int), NULL);
    host_from_device(numbers + E, plan->count, E * sizeof(int), NULL);
    host_from_device(&rows, plan->offset + E, sizeof(int), NULL);
    r->load.computed = rows;
    for (int e = 0; e < E; e++) {
        demand[e] = numbers[e];
        r->load.entries += numbers[e];
        r->load.accepted += numbers[E + e];
    }
    LoadSummary summary = load_summary(demand, E);
    r->load.cv = summary.cv;
    r->load.max_vio = summary.max_vio;
    r->flops[ROUTE] = 2 * N * C * E;
    r->bytes[ROUTE] = N * C * sizeof(real_t) + E * C * acc + 3 * N * E * acc + N * K * (sizeof(int) + acc);
    r->bytes[PERMUTE] = N * K * (2 * sizeof(int) + acc) + rows * (sizeof(int) + acc);
    r->bytes[DISPATCH] = moves_dispatch_bytes(plan, m->shape.C, r->load.accepted, rows);
    r->bytes[COMBINE] = moves_combine_bytes(plan, m->shape.C, r->load.accepted);
    r->flops[COMBINE] = 2 * r->load.accepted * C;
    int *row = malloc((size_t)N * K * sizeof(int));
    CHECK(row, "out of memory for the rows of %.0f tokens", N);
    host_from_device(row, plan->row, (size_t)N * K * sizeof(int), NULL);
    double dropped = 0;
    for (int n = 0; n < plan->N; n++) {
        int kept = 0;
        for (int j = 0; j < plan->K; j++) {
            kept += row[n * plan->K + j] >= 0;
        }
        dropped += kept == 0;
    }
    r->load.token_drop = dropped / N;
    free(row);
    free(demand);
    free(numbers);
}

static void run_pack(const Point *p) {
    const GridOptions *o = p->options;
    bool zipf = strncmp(o->load, "zipf:", 5) == 0;
    MoveShape shape = {.N = p->batch * p->seq,
                       .C = p->dim,
                       .E = p->experts,
                       .K = p->top_k,
                       .layout = !strcmp(p->layout, "padded")  ? LAYOUT_PADDED
                                 : !strcmp(p->layout, "block") ? LAYOUT_BLOCK
                                                               : LAYOUT_COMPACT,
                       .capacity_factor = p->capacity_factor,
                       .load = zipf                          ? LOAD_ZIPF
                               : !strcmp(o->load, "uniform") ? LOAD_UNIFORM
                                                             : LOAD_OF_ROUTER,
                       .zipf = zipf ? atof(o->load + 5) : 0,
                       .seed = o->seed};
    Moves m;
    size_t needed = moves_open(&m, shape, memory_of(p));
    if (needed > 0) {
        print_skipped(p, needed);
        return;
    }
    Result r = {.arena = &m.arena};
    Recording forward = {0}, both = {0}, moves = {0};
    pack_forward(&m); /* a plan for the moves */
    for (int i = 0; i < o->repeats; i++) {
        times_measure(&r.moves, &moves, pack_moves, &m, effort_of(p, 4));
        times_measure(&r.forward, &forward, pack_forward, &m, effort_of(p, 4));
        times_measure(&r.both, &both, pack_both, &m, effort_of(p, 4));
        times_stages(r.stages, pack_stages, &m, effort_of(p, 4));
    }
    count_pack(&r, &m);
    print_result(p, &r, times_median(&r.moves));
    recording_free(&forward);
    recording_free(&both);
    recording_free(&moves);
    free_result(&r);
    moves_close(&m);
}

/* ---- the points of a grid */

/* Whether --points names it. */
static bool wanted(const Point *p) {
    int first = 1, last = INT_MAX;
    const char *points = p->options->points;
    if (points && sscanf(points, "%d-%d", &first, &last) == 1) {
        last = first;
    }
    return p->number >= first && p->number <= last;
}

static void run_point(Point *p) {
    p->number++;
    if (!wanted(p)) {
        return;
    }
    p->measured++;
    if (p->options->dry_run) {
        print_dry(p);
    } else if (strcmp(p->grid->name, "pack") == 0) {
        run_pack(p);
    } else {
        run_layer(p);
    }
}

/* The next name of a comma-separated list, into `name`; false at its end. */
static bool next_name(const char **list, char name[NAME]) {
    size_t length = strcspn(*list, ",");
    if (length == 0) {
        return false;
    }
    CHECK(length < NAME, "%s: no such name", *list);
    memcpy(name, *list, length);
    name[length] = '\0';
    *list += length + ((*list)[length] == ',');
    return true;
}

/* One router of one shape, in every layout that it has. */
static void run_layouts(Point *p) {
    const GridOptions *o = p->options;
    const Router *router = router_find(p->router);
    CHECK(router, "--router %s is not known: choose from %s", p->router, router_names());
    if (router->fixed_top_k != 0) {
        p->top_k = router->fixed_top_k == ROUTER_ALL_EXPERTS ? p->experts : router->fixed_top_k;
    }
    if (router->plan == PLAN_SOFT || router->plan == PLAN_NONE) {
        snprintf(p->layout, NAME, router->plan == PLAN_SOFT ? "slots" : "compact");
        p->capacity_factor = 0;
        run_point(p);
        return;
    }
    const char *layouts = o->layouts ? o->layouts : p->grid->layouts;
    while (next_name(&layouts, p->layout)) {
        bool padded = strcmp(p->layout, "padded") == 0;
        double factors[2] = {padded ? 1 : 0, padded ? 1.25 : 0};
        CHECK(padded || !strcmp(p->layout, "compact") || !strcmp(p->layout, "block"),
              "--layout %s is not known: choose from compact, padded, block", p->layout);
        for (int f = 0; f < (padded && o->capacity_factor == 0 ? 2 : 1); f++) {
            p->capacity_factor = padded && o->capacity_factor > 0 ? o->capacity_factor : factors[f];
            run_point(p);
        }
    }
}

static const Grid *find_grid(const GridOptions *o) {
    for (size_t g = 0; g < sizeof GRIDS / sizeof *GRIDS; g++) {
        if (!strcmp(GRIDS[g].name, o->grid) && !strcmp(GRIDS[g].scale, o->scale)) {
            return &GRIDS[g];
        }
    }
    die(__FILE__, __LINE__, "--grid %s --scale %s is not known: --grid course, large or pack; --scale full or small",
        o->grid, o->scale);
}

static void check(const GridOptions *o) {
    int first = 0, last = 0, end_one = -1, end_two = -1;
    if (o->points) {
        sscanf(o->points, "%d%n-%d%n", &first, &end_one, &last, &end_two);
        bool one = end_one >= 0 && !o->points[end_one], two = end_two >= 0 && !o->points[end_two] && last >= first;
        CHECK((one || two) && first >= 1, "--points %s: give A or A-B, counted from 1; --dry-run 1 lists them",
              o->points);
    }
    bool zipf = strncmp(o->load, "zipf:", 5) == 0;
    char *end = NULL;
    double s = zipf ? strtod(o->load + 5, &end) : 0;
    CHECK(!strcmp(o->load, "router") || !strcmp(o->load, "uniform") ||
              (zipf && end > o->load + 5 && !*end && s >= 0 && s <= 100),
          "--load %s is not known: choose router, uniform, or zipf:S with S from 0 to 100", o->load);
    CHECK(o->repeats >= 1 && o->repeats <= TIMES_REPEATS, "--repeats-of-all %d: give 1 to %d", o->repeats,
          TIMES_REPEATS);
    CHECK(o->iterations >= TIMES_LEAST, "--iterations %d: give at least %d", o->iterations, TIMES_LEAST);
    CHECK(o->warm_up >= 1, "--warm-up %d: give at least 1", o->warm_up);
    CHECK(o->capacity_factor >= 0, "--capacity-factor %g: give 0 (1 and 1.25) or more", o->capacity_factor);
    CHECK(!strcmp(o->load, "router") || !o->routers || !strcmp(o->routers, "forced"),
          "--load %s takes the place of a router's choice: drop --router, or --load", o->load);
    CHECK(strcmp(o->grid, "pack") != 0 || !o->routers || !strcmp(o->routers, "topk"),
          "--grid pack measures the moves, with the choices of topk: drop --router, --load sets others");
    CHECK(strcmp(o->grid, "pack") != 0 || !o->shared_weights,
          "--grid pack has no weights to share: drop "
          "--shared-weights");
}

void bench_grid(const GridOptions *o, const char *device) {
    const Grid *grid = find_grid(o);
    check(o);
    bool forced = strcmp(o->load, "router") != 0 && strcmp(o->grid, "pack") != 0;
    Point p = {.grid = grid, .options = o, .device = device};
    for (int n = 0; n < MOST && grid->sequences[n][0]; n++) {
        for (int d = 0; d < MOST && grid->dims[d]; d++) {
            for (int e = 0; e < MOST && grid->experts[e]; e++) {
                for (int k = 0; k < MOST && grid->top_k[k]; k++) {
                    const char *routers = forced ? "forced" : o->routers ? o->routers : grid->routers;
                    while (next_name(&routers, p.router)) {
                        p.batch = grid->sequences[n][0];
                        p.seq = grid->sequences[n][1];
                        p.dim = grid->dims[d];
                        p.experts = grid->experts[e];
                        p.top_k = grid->top_k[k];
                        p.expert_dim = !strcmp(grid->name, "pack") ? 0
                                       : grid->expert_dim          ? grid->expert_dim
                                                                   : 4 * p.dim;
                        run_layouts(&p);
                    }
                }
            }
        }
    }
    CHECK(p.measured > 0, "--points %s: the grid has %d points", o->points, p.number);
}
