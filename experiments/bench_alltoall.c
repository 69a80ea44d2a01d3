/* Rows to experts that are spread over ranks, and back: how long the exchange of model/exchange.h takes, way by way.
 *
 *     mpirun -n 4 build/bench_alltoall_cuda                  b1 to b5 and the training shapes, a JSON line for each way
 *     mpirun -n 4 build/bench_alltoall_cuda b1 t7 --exchange dedup --wire fp8
 *     mpirun -n 2 build/bench_alltoall --shape 8,2,64,100 --skew zipf:1.2      the same on a CPU
 *     mpirun -n 4 build/bench_alltoall_cuda --sweep experts  ways against batch, seq, experts (of a rank) or k
 *
 *     shapes:  names (SHAPES), and --shape E,k,H,T: experts, choices of a token, numbers of a row, tokens of a rank
 *     options: --exchange flat|bucketed|dedup|padded|padded+graph|p2p|p2p+graph|all
 *              --wire, --wire-back, --peer-memory: as of ./train
 *              --skew none  an expert is as likely as any other
 *                     zipf:S  expert e (from 0) has a popularity of 1 / (e + 1)^S
 *                     one     all tokens choose expert 0, and k - 1 others
 *                     empty   nobody chooses an expert of the last rank
 *              --room N: rows of a padded message, default: the most that a rank has for another, the least that is
 *                enough  --repeats N  --seconds S: at most, for each timing  --seed N: in place of each shape's own
 *              --full-tokens: T tokens a rank, not 1 to T - 1 at random
 *
 * What is timed: the router's choices are there. The plan is built, tokens travel, each expert multiplies its rows by
 * a number of its own, rows travel back, and a token's are summed with the weights; "backward" is the same from the
 * gradient of the sums to those of tokens and weights. First of all each rank works out its own results by itself and
 * compares: a wrong one ends the program. "padded+graph" is recorded once and replayed, on a GPU alone.
 *
 * Rank 0 prints a line for each way, and "empty", where nothing is called: what the timing itself costs. us_p50, us_p95
 * and the parts plan_us (with the counts), dispatch_us, experts_us, combine_us: microseconds on the device, between
 * two events on a GPU, of each repeat the slowest rank's; the cache is cleared (GPU) and the ranks meet on the device
 * just before. wall_us: mean on rank 0's clock, with barriers of the host before and after. plain_us_p50: an all-to-all
 * there and back of as many bytes, in equal parts: the bound. bytes: rows one way, of the rank that has most, however
 * few travel; algbw: twice that over us_p50, GB/s; busbw: the share of it that is for other ranks. Of one call, on the
 * rank that has most: sent_bytes and messages to others, exchanges (calls in which ranks talk), waits (of the host for
 * the device); backward_.. likewise. padded_ratio: rows of messages of `room` rows, to those that hold one.
 *
 * Compared with baselines/torch_alltoall.py, whose lines have the same fields, by alltoall_compare.sh. Tested by
 * tests/test_bench_alltoall.sh. Read next: alltoall_batch.h, alltoall_trip.h, measure.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/comm.h"
#include "../model/commit.h"
#include "alltoall_trip.h"

enum { MOST_SHAPES = 64, WARM_UP = 10, GPU_CACHE = 256 << 20 /* more than any GPU's */ };

static const Shape SHAPES[] = {
    {"b1", 8, 2, 6144, 16, 6635},         {"b2", 64, 6, 2048, 32, 1234},     {"b3", 128, 4, 2880, 128, 51},
    {"b4", 128, 8, 4096, 256, 175},       {"b5", 256, 8, 7168, 256, 4},      {"train-1024", 8, 2, 1024, 4096, 1},
    {"train-2048", 64, 8, 2048, 8192, 1}, {"train-768", 8, 2, 768, 8192, 1}, {"t1", 8, 2, 6144, 4, 1236},
    {"t2", 64, 6, 2048, 4, 1234},         {"t3", 64, 6, 2048, 8, 542},       {"t4", 128, 4, 2880, 16, 347},
    {"t5", 128, 4, 2880, 32, 51},         {"t6", 128, 8, 4096, 64, 175},     {"t7", 128, 8, 4096, 128, 534},
    {"t8", 256, 8, 7168, 64, 897},        {"t9", 256, 8, 7168, 128, 4},
};

enum { SHAPE_COUNT = sizeof SHAPES / sizeof *SHAPES, DEFAULT_SHAPES = 8 /* the first ones */ };

static const Way WAYS[] = {{"flat", "flat", false},     {"bucketed", "bucketed", false},  {"dedup", "dedup", false},
                           {"padded", "padded", false}, {"padded+graph", "padded", true}, {"p2p", "p2p", false},
                           {"p2p+graph", "p2p", true}};

enum { WAY_COUNT = sizeof WAYS / sizeof *WAYS };

/* ---- results ---- */

/* The largest relative error of one rounding. */
static double rounding(WireType wire) {
    double stored = sizeof(real_t) == 2 ? 0x1p-8 : sizeof(real_t) == 4 ? 0x1p-24 : 0x1p-53;
    double on_wire[] = {
        [WIRE_SAME] = stored, [WIRE_FP32] = 0x1p-24, [WIRE_BF16] = 0x1p-8, [WIRE_FP16] = 0x1p-11, [WIRE_FP8] = 0x1p-4};
    return fmax(stored, on_wire[wire]);
}

/* Numbers of a device array, as they are computed with; the caller's. */
static acc_t *on_host(Trip *t, const real_t *x, size_t count) {
    acc_t *host = malloc(count * sizeof *host);
    CHECK(host, "out of memory for %zu numbers", count);
    acc_from_real(t->staging, x, count, NULL);
    host_from_device(host, t->staging, count * sizeof *host, NULL);
    return host;
}

/* A token's row comes back as itself, times the sum over its choices of weight and scale. It is rounded on the way
 * there, by the expert, on the way back and in the end; terms of the sum have one sign. Numbers far below the largest
 * of their row may be lost in a narrow type. */
static void check_rows(Trip *t, const Shape *s, const Batch *b, const real_t *got, const real_t *from, WireType wire,
                       const char *what) {
    size_t H = s->H;
    acc_t *y = on_host(t, got, s->T * H), *x = on_host(t, from, s->T * H);
    double relative = 4 * rounding(wire) + (s->k + 1) * 0x1p-24;
    for (int n = 0; n < s->T; n++) {
        double factor = 0, top = 0;
        for (int j = n * s->k; b->expert[j] >= 0 && j < (n + 1) * s->k; j++) {
            factor += (double)b->weight[j] * scale_of(b->expert[j]);
        }
        for (size_t c = 0; c < H; c++) {
            top = fmax(top, fabs((double)x[n * H + c]));
        }
        for (size_t c = 0; c < H; c++) {
            double expected = factor * x[n * H + c], off = fabs(y[n * H + c] - expected);
            CHECK(off <= relative * fabs(expected) + 1e-5 * factor * top,
                  "wrong result: %s %s of token %d on rank %d is %g at column %zu, not %g", s->name, what, n,
                  comm_rank(GROUP_WORLD), (double)y[n * H + c], c, expected);
        }
    }
    free(y);
    free(x);
}

/* The gradient of a weight is its expert's scale here. */
static void check_weights(const Trip *t, const Shape *s, const Batch *b) {
    size_t entries = (size_t)s->T * s->k;
    acc_t *got = malloc(entries * sizeof *got);
    CHECK(got, "out of memory for %zu weights", entries);
    host_from_device(got, t->dweight, entries * sizeof *got, NULL);
    for (size_t i = 0; i < entries; i++) {
        acc_t expected = b->expert[i] < 0 ? 0 : scale_of(b->expert[i]);
        CHECK(got[i] == expected, "wrong result: %s gradient of weight %zu on rank %d is %g, not %g", s->name, i,
              comm_rank(GROUP_WORLD), (double)got[i], (double)expected);
    }
    free(got);
}

static void check_results(Trip *t, const Shape *s, const Batch *b) {
    check_rows(t, s, b, t->y, t->x, t->exchange.wire[0], "sum");
    check_rows(t, s, b, t->dx, t->dy, t->exchange.wire[1], "gradient");
    check_weights(t, s, b);
}

/* ---- time ---- */

typedef void Call(void *trip, Profile *profile);

static const Stage PARTS[] = {STAGE_PERMUTE, STAGE_DISPATCH, STAGE_EXPERTS, STAGE_COMBINE};

enum { PART_COUNT = sizeof PARTS / sizeof *PARTS, TIMES = 1 + PART_COUNT /* the whole first */ };

typedef struct {
    Arena arena;
    char *cache;
    size_t cache_bytes;
    acc_t *flag;
    Profile profile;
    double *us;      /* (TIMES, most) of the repeats */
    int most, count; /* repeats */
    double limit;    /* seconds */
} Meter;

typedef struct {
    double p50, p95, wall, part[PART_COUNT]; /* microseconds; parts: medians */
    int repeats;
} Times;

static void open_meter(Meter *m, const Options *o) {
    *m = (Meter){.most = o->repeats, .limit = o->seconds, .cache_bytes = device_runs_ahead() ? GPU_CACHE : 1};
    m->us = calloc((size_t)TIMES * m->most, sizeof(double));
    CHECK(m->us, "out of memory for %d times", m->most);
    reserve(&m->arena, &m->cache, m->cache_bytes);
    reserve(&m->arena, &m->flag, sizeof(acc_t));
    arena_commit(&m->arena);
}

static void close_meter(Meter *m) {
    profile_free(&m->profile);
    free(m->us);
    arena_free(&m->arena);
}

static void wall_time(Meter *m, int repeat, Call *call, Trip *t) {
    device_zero(m->cache, m->cache_bytes, NULL);
    device_wait(NULL);
    comm_barrier();
    double begin = seconds_now();
    call(t, NULL);
    device_wait(NULL);
    comm_barrier();
    m->us[repeat] = 1e6 * (seconds_now() - begin);
}

/* The host is not made to wait before the call: it queues while the cache is being cleared. */
static void device_time(Meter *m, int repeat, Call *call, Trip *t) {
    Profile *p = &m->profile;
    memset(p->seconds, 0, sizeof p->seconds);
    device_zero(m->cache, m->cache_bytes, NULL);
    comm_sum(GROUP_WORLD, m->flag, 1, NULL);
    profile_start(p, NULL);
    call(t, p);
    profile_stop(p, NULL);
    profile_finish(p);
    m->us[repeat] = 1e6 * p->seconds[STAGE_OTHER];
    for (int i = 0; i < PART_COUNT; i++) {
        m->us[(1 + i) * m->most + repeat] = 1e6 * p->seconds[PARTS[i]];
        m->us[repeat] += 1e6 * p->seconds[PARTS[i]];
    }
}

/* All ranks stop together, once the clock of one has passed the limit. */
static void repeat(Meter *m, void (*time)(Meter *m, int repeat, Call *call, Trip *t), Call *call, Trip *t) {
    double end = seconds_now() + m->limit;
    bool late = false;
    for (m->count = 0; m->count < m->most && !late; m->count++) {
        time(m, m->count, call, t);
        late = comm_any(seconds_now() > end);
    }
}

static double mean(const double *x, int count) {
    double sum = 0;
    for (int i = 0; i < count; i++) {
        sum += x[i];
    }
    return sum / count;
}

static Times measure(Meter *m, Call *call, Trip *t) {
    Times times;
    for (int i = 0; i < WARM_UP && i <= m->most; i++) { /* twice at least: the second may be recorded */
        call(t, NULL);
    }
    repeat(m, wall_time, call, t);
    times.wall = mean(m->us, m->count);
    repeat(m, device_time, call, t);
    times.repeats = m->count;
    largest_of_ranks(m->us, TIMES * m->most);
    times.p50 = bench_median(m->us, m->count, &times.p95);
    for (int i = 0; i < PART_COUNT; i++) {
        times.part[i] = bench_median(m->us + (1 + i) * m->most, m->count, NULL);
    }
    return times;
}

/* What one call does, on the rank that does most of it. */
typedef struct {
    double bytes, messages, exchanges, waits;
} Traffic;

static Traffic count_traffic(Call *call, bool gradient, Trip *t) {
    CommCount before = comm_count();
    int64_t waits = device_waits();
    call(t, NULL);
    CommCount after = comm_count();
    Traffic traffic = {after.bytes - before.bytes + exchange_stored(&t->exchange, gradient),
                       after.messages - before.messages, after.calls - before.calls, device_waits() - waits};
    largest_of_ranks((double *)&traffic, sizeof traffic / sizeof(double));
    return traffic;
}

/* ---- lines ---- */

/* What the lines of a shape begin with. */
static void print_head(const Shape *s, const Batch *b, const char *version, const Times *times, const Options *o) {
    int ranks = comm_ranks(GROUP_WORLD);
    printf(
        "{\"shape\":\"%s\",\"E\":%d,\"k\":%d,\"H\":%d,\"T\":%d,\"seed\":%d,\"impl\":\"moelab\",\"version\":\"%s\","
        "\"ranks\":%d,\"skew\":\"%s\",\"us_p50\":%.2f,\"us_p95\":%.2f,\"wall_us\":%.2f,\"repeats\":%d,\"tokens\":[",
        s->name, s->E, s->k, s->H, s->T, s->seed, version, ranks, o->skew, times->p50, times->p95, times->wall,
        times->repeats);
    for (int r = 0; r < ranks; r++) {
        printf("%s%.0f", r ? "," : "", b->tokens_of[r]);
    }
    printf("]");
}

static void print_end(bool checked, const char *device) {
    printf(",\"checked\":%s,\"device\":\"%s\",\"commit\":\"%s\"}\n", checked ? "true" : "false", device, commit_name());
    fflush(stdout);
}

static void bench_empty(const Shape *s, const Batch *b, Meter *m, const Options *o, const char *device) {
    Times times = measure(m, nothing, NULL);
    if (comm_rank(GROUP_WORLD) == 0) {
        print_head(s, b, "empty", &times, o);
        printf(",\"bytes\":0,\"algbw\":0");
        print_end(false, device);
    }
}

static void print_traffic(const char *prefix, const Traffic *t) {
    printf(",\"%ssent_bytes\":%.0f,\"%smessages\":%.0f,\"%sexchanges\":%.0f,\"%swaits\":%.0f", prefix, t->bytes, prefix,
           t->messages, prefix, t->exchanges, prefix, t->waits);
}

static void bench_way(const Shape *s, const Batch *b, const Way *way, Meter *m, const Options *o, const char *device) {
    Trip t;
    int ranks = comm_ranks(GROUP_WORLD), room = o->room ? o->room : (int)b->room;
    open_trip(&t, s, b, way, o, room);
    Traffic there = count_traffic(forward, false, &t), back = count_traffic(backward, true, &t);
    check_results(&t, s, b);
    divide_plainly(&t);
    Times bound = measure(m, plain, &t), times = measure(m, way->recorded ? replayed_forward : forward, &t);
    Times gradient = measure(m, way->recorded ? replayed_backward : backward, &t);
    double bytes = b->most * s->k * wire_row_bytes(t.exchange.wire[0], s->H), speed = 2 * bytes / times.p50 / 1e3;
    if (comm_rank(GROUP_WORLD) == 0) {
        print_head(s, b, way->name, &times, o);
        printf(",\"wire\":\"%s\",\"wire_back\":\"%s\",\"bytes\":%.0f,\"algbw\":%.3f,\"busbw\":%.3f", o->wire,
               o->wire_back, bytes, speed, speed * (ranks - 1) / ranks);
        for (int i = 0; i < PART_COUNT && !way->recorded; i++) {
            const char *part[PART_COUNT] = {"plan", "dispatch", "experts", "combine"};
            printf(",\"%s_us\":%.2f", part[i], times.part[i]);
        }
        printf(",\"plain_us_p50\":%.2f,\"backward_us_p50\":%.2f,\"backward_us_p95\":%.2f", bound.p50, gradient.p50,
               gradient.p95);
        print_traffic("", &there);
        print_traffic("backward_", &back);
        printf(",\"room\":%d,\"padded_ratio\":%.3f", room, (double)ranks * ranks * room / b->entries);
        print_end(true, device);
    }
    close_trip(&t);
}

static void bench_shape(Shape s, Meter *m, const Options *o, const char *device) {
    Batch b;
    s.seed = o->seed >= 0 ? o->seed : s.seed;
    CHECK(s.E % comm_ranks(GROUP_WORLD) == 0, "%s: %d experts cannot be shared out evenly among %d ranks", s.name, s.E,
          comm_ranks(GROUP_WORLD));
    check_skew(o->skew, &s);
    draw_batch(&b, &s, o);
    bench_empty(&s, &b, m, o, device);
    for (const Way *way = WAYS; way < WAYS + WAY_COUNT; way++) {
        bool all = strcmp(o->way, "all") == 0 && (!way->recorded || device_runs_ahead());
        if (all || strcmp(o->way, way->name) == 0) {
            bench_way(&s, &b, way, m, o, device);
        }
    }
    free_batch(&b);
}

/* ---- what is asked for ---- */

/* Of one quantity at a time. T is of 8 sequences; where experts are swept E follows from the ranks. */
static int sweep(Shape *shapes, const char *what, const Shape *base) {
    static const struct {
        const char *name;
        int value[6];
    } sweeps[] = {{"batch", {1, 2, 4, 8, 16, 32}},
                  {"seq", {64, 128, 256, 512, 1024, 2048}},
                  {"experts", {1, 2, 4, 8, 16, 32}},
                  {"k", {1, 2, 3, 4, 6, 8}}};
    int which = 0, count = 0, sequence = base->T < 8 ? 1 : base->T / 8;
    while (which < 4 && strcmp(what, sweeps[which].name) != 0) {
        which++;
    }
    CHECK(which < 4, "--sweep %s: choose batch, seq, experts or k", what);
    for (int i = 0; i < 6; i++) {
        int value = sweeps[which].value[i];
        Shape s = *base;
        snprintf(s.name, NAME, "%s=%d", what, value);
        int *changed[] = {&s.T, &s.T, &s.E, &s.k};
        *changed[which] = value * (int[]){sequence, 8, comm_ranks(GROUP_WORLD), 1}[which];
        if (s.k <= s.E) {
            shapes[count++] = s;
        }
    }
    return count;
}

static Shape parse_shape(const char *text) {
    Shape s = {.seed = 1};
    char more;
    CHECK(sscanf(text, "%d,%d,%d,%d%c", &s.E, &s.k, &s.H, &s.T, &more) == 4 && s.k >= 1 && s.k <= s.E && s.H >= 1 &&
              s.T >= 1,
          "--shape %s: give E,k,H,T with 1 <= k <= E, for example 64,8,2048,8192", text);
    snprintf(s.name, NAME, "%s", text);
    return s;
}

static Shape named_shape(const char *name) {
    for (int i = 0; i < SHAPE_COUNT; i++) {
        if (strcmp(SHAPES[i].name, name) == 0) {
            return SHAPES[i];
        }
    }
    die(__FILE__, __LINE__, "%s is no shape: b1 to b5, t1 to t9, train-768, train-1024, train-2048, or --shape E,k,H,T",
        name);
}

/* Fills in the options; returns how many shapes are asked for. */
static int parse(Options *o, Shape *shapes, int argc, char **argv) {
    const char *number[4] = {"100", "-1", "0", "10"};
    struct {
        const char *name, **value;
    } table[] = {{"--exchange", &o->way},  {"--wire", &o->wire},   {"--wire-back", &o->wire_back},
                 {"--skew", &o->skew},     {"--sweep", &o->sweep}, {"--peer-memory", &o->peer_memory},
                 {"--seed", &number[1]},   {"--room", &number[2]}, {"--repeats", &number[0]},
                 {"--seconds", &number[3]}};
    int count = 0;
    for (int i = 1; i < argc; i++) {
        bool found = strcmp(argv[i], "--full-tokens") == 0;
        o->full_tokens |= found;
        CHECK(count < MOST_SHAPES, "more than %d shapes: start the program again for the others", MOST_SHAPES);
        if (argv[i][0] != '-' || (strcmp(argv[i], "--shape") == 0 && i + 1 < argc)) {
            shapes[count++] = argv[i][0] != '-' ? named_shape(argv[i]) : parse_shape(argv[++i]);
            continue;
        }
        for (size_t t = 0; t < sizeof table / sizeof *table && !found && i + 1 < argc; t++) {
            found = strcmp(argv[i], table[t].name) == 0;
            if (found) {
                *table[t].value = argv[++i];
            }
        }
        CHECK(found, "unknown option or no value: %s; see the head of experiments/bench_alltoall.c", argv[i]);
    }
    o->repeats = atoi(number[0]);
    o->seed = atoi(number[1]);
    o->room = atoi(number[2]);
    o->seconds = atof(number[3]);
    return count;
}

static void check_options(const Options *o) {
    bool known = strcmp(o->way, "all") == 0;
    for (int i = 0; i < WAY_COUNT; i++) {
        known |= strcmp(o->way, WAYS[i].name) == 0;
    }
    CHECK(known, "--exchange %s: choose all, flat, bucketed, dedup, padded, p2p, padded+graph or p2p+graph", o->way);
    CHECK(!strstr(o->way, "+graph") || device_runs_ahead(), "--exchange %s needs a GPU: take the same without +graph",
          o->way);
    CHECK(o->repeats >= 1, "--repeats %d: give at least 1", o->repeats);
    CHECK(o->room >= 0, "--room %d: give at least 1 row, or 0 for the least that is enough", o->room);
}

int main(int argc, char **argv) {
    comm_open();
    int ranks = comm_ranks(GROUP_WORLD);
    comm_form_groups(ranks);
    Shape shapes[MOST_SHAPES];
    Options o = {.way = "all", .wire = "same", .wire_back = "same", .peer_memory = "1", .skew = "none"};
    int count = parse(&o, shapes, argc, argv);
    check_options(&o);
    if (o.sweep) {
        Shape base = count > 0 ? shapes[0] : (Shape){.E = 8 * ranks, .k = 2, .H = 1024, .T = 4096, .seed = 1};
        CHECK(count <= 1, "--sweep starts from one shape, and %d are given", count);
        count = sweep(shapes, o.sweep, &base);
    } else if (count == 0) {
        count = DEFAULT_SHAPES;
        memcpy(shapes, SHAPES, DEFAULT_SHAPES * sizeof *shapes);
    }
    char device[128];
    device_open(comm_local_rank(), comm_local_ranks());
    device_describe(device, sizeof device);
    Meter meter;
    open_meter(&meter, &o);
    for (int i = 0; i < count; i++) {
        bench_shape(shapes[i], &meter, &o, device);
    }
    close_meter(&meter);
    comm_close();
    return 0;
}
