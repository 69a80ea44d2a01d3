/* Does every way of exchange do what one rank would do by itself? test_exchange.sh starts this, as one process and as
 * several of mpirun's.
 *
 *     mpirun -n 4 build/exchange_ranks shapes 64,6,2048,4,1234 ..     E, K, H, tokens, seed of each; see `shapes`
 *     mpirun -n 4 build/exchange_ranks edges                          small shapes of every odd kind; see `modes`
 *     build/exchange_ranks_double adjoint                             the same in double
 *
 * What is expected is computed without the exchange: by a formula (closed_form, oracle), or by the plain dispatch and
 * combine of one rank, to the bit. `dedup` adds in another order, so its bits are compared where sums are exact. Each
 * rank ends with the line "rank 2 of 4: all as expected"; the first difference ends all of them with one that says
 * where it is. Read next: exchange_layer.h.
 */
#include <float.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "exchange_layer.h"

#include "../kernels/check.h"

#ifdef REAL_DOUBLE
#define REAL_EPSILON DBL_EPSILON
#else
#define REAL_EPSILON FLT_EPSILON
#endif

static char where[256]; /* what is looked at, for the line of a difference */

#define EXPECT(condition, format, ...) CHECK(condition, "%s: " format, where, __VA_ARGS__)

static const char *const ways[] = {"--exchange flat", "--exchange bucketed", "--exchange dedup", "--exchange padded"};

enum { WAYS = sizeof ways / sizeof *ways };

static const Mode modes_of_values[] = {
    {"the benchmark's experts", EXPERT_RANK_SCALE, VALUES_HALF, 0},
    {"scale per expert", EXPERT_SCALE, VALUES_SIGNED, 1},
    {"rotation per expert", EXPERT_ROTATION, VALUES_SIGNED, 0},
    {"whole numbers", EXPERT_SCALE, VALUES_WHOLE, 1},
};

enum { MODES = sizeof modes_of_values / sizeof *modes_of_values, SIGNED_SCALE = 1 };

/* ---- comparisons */

static void same_bits(const char *what, const void *got, const void *expected, size_t count) {
    const real_t *a = got, *b = expected;
    for (size_t i = 0; i < count; i++) {
        EXPECT(memcmp(&a[i], &b[i], sizeof *a) == 0, "%s %zu of %zu is %a, expected %a", what, i, count, (double)a[i],
               (double)b[i]);
    }
}

static void near(const char *what, int n, int h, double got, double expected, double tolerance) {
    EXPECT(fabs(got - expected) <= tolerance, "%s of token %d, column %d is %.9g, expected %.9g within %.2g", what, n,
           h, got, expected, tolerance);
}

/* ---- where rows are */

/* A number for every element that any rank dispatches, in float exact. */
static real_t tag(const Shape *s, int rank, int n, int h) {
    return ((size_t)rank * s->N + n) * s->H + h + 1;
}

static void fill_tags(Layer *layer) {
    const Shape *s = &layer->shape;
    for (int i = 0; i < s->N * s->H; i++) {
        layer->x[i] = tag(s, comm_rank(GROUP_WORLD), i / s->H, i % s->H);
    }
}

/* Row r is that of the entry, with its weight. */
static void check_row(const Layer *layer, const real_t *row, int r, int rank, int entry) {
    const Shape *s = &layer->shape;
    const Plan *plan = exchange_experts(&layer->exchange);
    acc_t weight = layer->weight[(size_t)rank * s->N * s->K + entry];
    EXPECT(plan->entry[r] >= 0, "row %d is padding, expected token %d of rank %d", r, entry / s->K, rank);
    EXPECT(plan->row_weight[r] == weight, "row %d has weight %g, expected %g", r, (double)plan->row_weight[r],
           (double)weight);
    for (int h = 0; h < s->H; h++) {
        EXPECT(row[h] == tag(s, rank, entry / s->K, h), "row %d, column %d has %g, expected token %d of rank %d", r, h,
               (double)row[h], entry / s->K, rank);
    }
}

/* Expert e's rows, here its i-th: the entries of all ranks that chose it, by rank and token, then zeros. */
static void check_rows_of_expert(const Layer *layer, RowSource rows, int i, int e) {
    const Plan *plan = exchange_experts(&layer->exchange);
    int entries = layer->shape.N * layer->shape.K, H = layer->shape.H, r = plan->offset[i];
    int first = comm_rank(GROUP_WORLD) - comm_rank(GROUP_EXPERTS), ranks = layer->exchange.ranks;
    for (int rank = first; rank < first + ranks; rank++) {
        for (int entry = 0; entry < entries; entry++) {
            if (layer->expert[rank * entries + entry] == e) {
                EXPECT(r < plan->offset[i + 1], "expert %d has too few rows", e);
                check_row(layer, row_at(rows, r, H), r, rank, entry);
                r++;
            }
        }
    }
    EXPECT(plan->count[i] == r - plan->offset[i], "expert %d counts %d entries, expected %d", e, plan->count[i],
           r - plan->offset[i]);
    for (; r < plan->offset[i + 1]; r++) {
        const real_t *row = row_at(rows, r, H);
        EXPECT(plan->entry[r] < 0 && plan->row_weight[r] == 0, "row %d of expert %d is not padding", r, e);
        EXPECT(!row || dot(row, row, H) == 0, "padding row %d of expert %d is not zero", r, e);
    }
}

/* demand: all ranks' entries, also those that were dropped. */
static void check_demand(const Layer *layer) {
    const Shape *s = &layer->shape;
    int all = comm_ranks(GROUP_WORLD) * s->N * s->K;
    for (int e = 0; e < s->E; e++) {
        int demand = 0;
        for (int i = 0; i < all; i++) {
            demand += layer->chosen[i] == e;
        }
        EXPECT(layer->exchange.demand[e] == demand, "demand of expert %d is %d, expected %d", e,
               layer->exchange.demand[e], demand);
    }
}

/* Rows that this rank sends to a rank of the group: one for an entry, or for a token. */
static int rows_for(const Layer *layer, int rank) {
    const Shape *s = &layer->shape;
    const int *expert = layer->expert + (size_t)comm_rank(GROUP_WORLD) * s->N * s->K;
    int rows = 0;
    for (int n = 0; n < s->N; n++) {
        int entries = 0;
        for (int j = 0; j < s->K; j++) {
            int e = expert[n * s->K + j];
            entries += e >= 0 && e / layer->exchange.experts == rank;
        }
        rows += layer->exchange.way == EXCHANGE_DEDUP ? entries > 0 : entries;
    }
    return rows;
}

/* What this rank sends, and what it has to drop. */
static void check_sent(const Layer *layer) {
    const Exchange *x = &layer->exchange;
    const Plan *measured = exchange_measured(x);
    int entries = layer->shape.N * layer->shape.K, me = comm_rank(GROUP_WORLD), dropped = 0, counted = 0;
    for (int i = me * entries; i < (me + 1) * entries; i++) {
        dropped += layer->chosen[i] != layer->expert[i];
    }
    for (int e = 0; e < measured->E; e++) {
        counted += measured->demand[e] - measured->count[e];
    }
    EXPECT(counted == dropped, "%d entries are counted as dropped, expected %d", counted, dropped);
    for (int rank = 0; exchange_travels(x) && rank < x->ranks; rank++) {
        EXPECT(x->out.count[rank] == rows_for(layer, rank), "%d rows for rank %d, expected %d", x->out.count[rank],
               rank, rows_for(layer, rank));
    }
}

/* Rows that went to other ranks since `before`, in one call. */
static void check_traffic(const Layer *layer, const char *what, CommCount before, const int *first) {
    CommCount now = comm_count();
    int ranks = layer->exchange.ranks, me = comm_rank(GROUP_EXPERTS), rows = 0;
    for (int rank = 0; ranks > 1 && rank < ranks; rank++) {
        rows += rank == me ? 0 : first[rank + 1] - first[rank];
    }
    long long bytes = (long long)rows * layer->shape.H * sizeof(real_t), sent = now.bytes - before.bytes;
    EXPECT(now.calls - before.calls == (ranks > 1), "%s takes %d calls", what, (int)(now.calls - before.calls));
    EXPECT(sent == bytes, "%s sends %lld bytes, expected %lld", what, sent, bytes);
}

/* A dispatch and a combine move rows and nothing else. */
static void check_transfers(Layers *layers, Layer *layer) {
    Exchange *x = &layer->exchange;
    CommCount before = comm_count();
    RowSource rows = exchange_dispatch(x, &layers->wire, layers->rows_in, layer->x, true, NULL, NULL);
    check_traffic(layer, "dispatch", before, x->send);
    experts_make(layers, layer, rows, exchange_experts(x), first_expert(layer));
    before = comm_count();
    exchange_combine(x, &layers->wire, layer->y, layers->made, NULL, NULL);
    check_traffic(layer, "combine", before, x->receive);
}

static void check_dispatch(Layers *layers, Layer *layer) {
    layer_values(layer, modes_of_values[SIGNED_SCALE]);
    fill_tags(layer);
    layer_plan(layers, layer);
    Exchange *x = &layer->exchange;
    RowSource rows = exchange_dispatch(x, &layers->wire, layers->rows_in, layer->x, true, NULL, NULL);
    for (int i = 0; i < x->experts; i++) {
        check_rows_of_expert(layer, rows, i, first_expert(layer) + i);
    }
    EXPECT(exchange_experts(x)->E == layer->shape.E / x->ranks, "%d experts are here, expected %d",
           exchange_experts(x)->E, layer->shape.E / x->ranks);
    check_demand(layer);
    check_sent(layer);
    check_transfers(layers, layer);
}

/* ---- what comes out */

/* sum (H) = sum_j weight[n,j] f(row of token n), or with f' for gradients; size (H) = the sum of the terms' sizes. */
static void closed_form(const Layer *layer, const real_t *rows, bool back, int n, double *sum, double *size) {
    const Shape *s = &layer->shape;
    int H = s->H, entries = s->N * s->K;
    memset(sum, 0, H * sizeof *sum);
    memset(size, 0, H * sizeof *size);
    for (int i = comm_rank(GROUP_WORLD) * entries + n * s->K, end = i + s->K; i < end; i++) {
        if (layer->expert[i] >= 0) {
            Expert f = expert_of(layer, layer->expert[i]), g = back ? transposed(f, H) : f;
            double factor = (double)layer->weight[i] * g.scale;
            for (int h = 0; h < H; h++) {
                double term = factor * rows[(size_t)n * H + (h + g.shift < H ? h + g.shift : h + g.shift - H)];
                sum[h] += term;
                size[h] += fabs(term);
            }
        }
    }
}

/* y and dx of every token. A term is rounded at most twice before it is added to at most K others (and to `before`). */
static void check_closed_form(const Layer *layer) {
    const Shape *s = &layer->shape;
    double *sum = malloc(s->H * sizeof *sum), *size = malloc(s->H * sizeof *size);
    double epsilon = (s->K + 3) * REAL_EPSILON;
    CHECK(sum && size, "out of memory");
    for (int n = 0; n < s->N; n++) {
        const real_t *y = layer->y + (size_t)n * s->H, *dx = layer->dx + (size_t)n * s->H;
        closed_form(layer, layer->x, false, n, sum, size);
        for (int h = 0; h < s->H; h++) {
            near("y", n, h, y[h], sum[h], epsilon * size[h]);
        }
        closed_form(layer, layer->dy, true, n, sum, size);
        for (int h = 0; h < s->H; h++) {
            double before = layer->mode.accumulate ? layer->before[(size_t)n * s->H + h] : 0;
            near("dx", n, h, dx[h], before + sum[h], epsilon * (size[h] + fabs(before)));
        }
    }
    free(sum);
    free(size);
}

/* y of one token as the benchmark's reference computes it: experts in ascending order, every result of half precision.
 */
static void oracle(const Layer *layer, int n, float *y) {
    const Shape *s = &layer->shape;
    const int *expert = layer->expert + ((size_t)comm_rank(GROUP_WORLD) * s->N + n) * s->K;
    const acc_t *weight = layer->plan.weight + (size_t)n * s->K;
    memset(y, 0, s->H * sizeof *y);
    for (int e = 0; e < s->E; e++) {
        for (int j = 0; j < s->K; j++) {
            for (int h = 0; expert[j] == e && h < s->H; h++) {
                float made = half_rounded((float)layer->x[(size_t)n * s->H + h] * (1 + e / layer->exchange.experts));
                float term = made * (float)weight[j];
                y[h] = half_rounded(y[h] + term);
            }
        }
    }
}

/* Within the tolerance that the benchmark allows. Rows here are float, the reference's are half: the tolerance has to
 * hold the reference's roundings alone, so this check is no sharper than the benchmark's. check_closed_form is. */
static void check_oracle(const Layer *layer) {
    const Shape *s = &layer->shape;
    float *y = malloc(s->H * sizeof *y);
    CHECK(y, "out of memory");
    for (int n = 0; n < s->N; n++) {
        oracle(layer, n, y);
        for (int h = 0; h < s->H; h++) {
            near("y by the oracle", n, h, layer->y[(size_t)n * s->H + h], y[h], 5e-3 + 1e-2 * fabs(y[h]));
        }
    }
    free(y);
}

/* The bits of one rank, where they are promised. */
static void check_alone(Layers *layers, Layer *layer) {
    const Shape *s = &layer->shape;
    size_t numbers = (size_t)s->N * s->H, entries = (size_t)s->N * s->K;
    bool same_order = layer->exchange.way != EXCHANGE_DEDUP || layer->mode.values == VALUES_WHOLE;
    layer_alone(layers, layer);
    same_bits("dweight", layer->dweight, layer->alone_dweight, entries);
    if (same_order) {
        same_bits("y", layer->y, layer->alone_y, numbers);
        same_bits("dx", layer->dx, layer->alone_dx, numbers);
    }
}

static void check_results(Layers *layers, Layer *layer) {
    check_alone(layers, layer);
    check_closed_form(layer);
    if (layer->mode.expert == EXPERT_RANK_SCALE) {
        check_oracle(layer);
    }
}

/* Once more gives the same bits; the first ones take the place of one rank's. */
static void check_repeats(Layers *layers, Layer *layer) {
    const Shape *s = &layer->shape;
    size_t numbers = (size_t)s->N * s->H, entries = (size_t)s->N * s->K;
    memcpy(layer->alone_y, layer->y, numbers * sizeof(real_t));
    memcpy(layer->alone_dx, layer->dx, numbers * sizeof(real_t));
    memcpy(layer->alone_dweight, layer->dweight, entries * sizeof(acc_t));
    layer_forward(layers, layer);
    layer_backward(layers, layer);
    same_bits("the second time: y", layer->y, layer->alone_y, numbers);
    same_bits("the second time: dx", layer->dx, layer->alone_dx, numbers);
    same_bits("the second time: dweight", layer->dweight, layer->alone_dweight, entries);
}

/* ---- what backwards must be */

/* Random numbers of [-1,1). */
static void fill_random(real_t *x, size_t count, uint64_t stream) {
    uint64_t key = random_key(comm_rank(GROUP_WORLD), RANDOM_TEST, 100 + stream);
    for (size_t i = 0; i < count; i++) {
        x[i] = value(VALUES_SIGNED, key, i);
    }
}

/* sum_r weight[r] <a[r], b[r]> over the rows of this rank's experts; weight NULL: 1. */
static double dot_rows(const Layer *layer, RowSource a, const real_t *b, const acc_t *weight) {
    const Plan *plan = exchange_experts(&layer->exchange);
    int H = layer->shape.H;
    double sum = 0;
    for (int r = 0; r < plan->offset[plan->E]; r++) {
        if (plan->entry[r] >= 0) {
            sum += (weight ? weight[r] : 1) * dot(row_at(a, r, H), b + (size_t)r * H, H);
        }
    }
    return sum;
}

/* <A u, v> and <u, A' v> over all ranks. Each row belongs to one entry and weights are at most 1, so |A u| is at most
 * sqrt(K) |u|: rounding may change either side by (K + 2) epsilon sqrt(K) |u| |v|, and the sums, which are of double,
 * by their number of terms times its epsilon. */
static void check_adjoint(const Layer *layer, const char *what, double left, double right, double u, double v,
                          size_t terms) {
    double all[] = {left, right, u, v, (double)terms};
    comm_sum_host(all, 5);
    double size = sqrt(layer->shape.K * all[2] * all[3]);
    double tolerance = ((layer->shape.K + 2) * REAL_EPSILON + all[4] * DBL_EPSILON) * size;
    EXPECT(fabs(all[0] - all[1]) <= tolerance, "the adjoint of %s: %.17g and %.17g, expected to agree within %.2g",
           what, all[0], all[1], tolerance);
}

static void check_adjoints(Layers *layers, Layer *layer) {
    Exchange *x = &layer->exchange;
    ExchangeScratch *wire = &layers->wire;
    const acc_t *weight = exchange_experts(x)->row_weight;
    size_t rows = (size_t)layers->rows * layers->H, numbers = (size_t)layer->shape.N * layer->shape.H;
    real_t *u = layers->made, *v = layer->dy;
    layer_plan(layers, layer);
    fill_random(u, rows, 0);
    fill_random(v, numbers, 1);
    fill_random(layer->x, numbers, 2);
    double u_u = dot_rows(layer, (RowSource){u, NULL, 0}, u, NULL), v_v = dot(v, v, (int)numbers);

    exchange_combine(x, wire, layer->y, u, NULL, NULL);
    RowSource back = exchange_dispatch(x, wire, layers->dy_in, v, false, NULL, NULL);
    check_adjoint(layer, "combine", dot(layer->y, v, (int)numbers), dot_rows(layer, back, u, weight), u_u, v_v,
                  rows + numbers);

    RowSource there = exchange_dispatch(x, wire, layers->rows_in, layer->x, true, NULL, NULL);
    exchange_dispatch_backward(x, wire, layer->dx, u, 0, NULL, NULL);
    check_adjoint(layer, "dispatch", dot_rows(layer, there, u, NULL), dot(layer->dx, layer->x, (int)numbers), u_u,
                  dot(layer->x, layer->x, (int)numbers), rows + numbers);
}

/* dweight by differences. y is linear in the weights and a token's y in its own alone, so one step of any length gives
 * the j-th choice of all tokens; what is left is the rounding of both y. The first y takes the place of one rank's. */
static void check_weight_gradient(Layers *layers, Layer *layer) {
    const Shape *s = &layer->shape;
    size_t entries = (size_t)s->N * s->K, numbers = (size_t)s->N * s->H;
    acc_t *mine = layer->weight + comm_rank(GROUP_WORLD) * entries;
    double scale = 1 + s->E / 64.0;
    memcpy(layer->alone_y, layer->y, numbers * sizeof(real_t));
    for (int j = 0; j < s->K; j++) {
        for (int n = 0; n < s->N; n++) {
            mine[n * s->K + j] += 1;
        }
        layer_take_weights(layer);
        layer_forward(layers, layer);
        for (int n = 0; n < s->N; n++) {
            size_t token = (size_t)n * s->H;
            const real_t *x = layer->x + token, *dy = layer->dy + token;
            double change = dot(layer->y + token, dy, s->H) - dot(layer->alone_y + token, dy, s->H);
            double size = scale * 2 * (s->K + 1) * sqrt(dot(x, x, s->H) * dot(dy, dy, s->H));
            near("dweight by differences", n, j, layer->dweight[n * s->K + j], change,
                 (s->K + 3) * REAL_EPSILON * size);
            mine[n * s->K + j] -= 1;
        }
    }
    layer_take_weights(layer);
}

/* ---- one shape in one way */

static void say_where(const char *name, const Shape *s, int ep, const char *options, const char *mode) {
    snprintf(where, sizeof where, "%s, %d experts on %d ranks, %d of them to each of %d tokens of %d, %s, %s", name,
             s->E, ep, s->K, s->N, s->H, options, mode);
}

/* adjoint: what backwards must be, instead of what comes out. */
static void check_mode(Layers *layers, Layer *layer, Mode mode, bool adjoint) {
    layer_values(layer, mode);
    layer_forward(layers, layer);
    layer_backward(layers, layer);
    if (adjoint) {
        check_weight_gradient(layers, layer);
        check_adjoints(layers, layer);
    } else {
        check_results(layers, layer);
        check_repeats(layers, layer);
    }
}

static void check_shape(const char *name, Shape s, int ep, const char *options, bool adjoint) {
    Layers layers;
    Layer *layer = &layers.layer[0];
    layers_open(&layers, &s, 1, ep, options);
    say_where(name, &s, ep, options, "where rows are");
    layer_choose(layer, 0);
    check_dispatch(&layers, layer);
    for (int m = 0; m < MODES; m++) {
        if (!adjoint || m == SIGNED_SCALE) {
            say_where(name, &s, ep, options, modes_of_values[m].name);
            check_mode(&layers, layer, modes_of_values[m], adjoint);
        }
    }
    layers_close(&layers);
}

/* Shapes of the command line, experts spread over all ranks. As in the benchmark, a rank has 1 to `tokens` - 1 tokens.
 */
static void shapes(int count, char **arguments) {
    int ep = comm_ranks(GROUP_WORLD);
    comm_form_groups(ep);
    for (int i = 0; i < count; i++) {
        Shape s = {.choice = CHOICE_FEWER};
        int tokens, seed;
        CHECK(sscanf(arguments[i], "%d,%d,%d,%d,%d", &s.E, &s.K, &s.H, &tokens, &seed) == 5 && tokens > 1,
              "%s is not E,K,H,TOKENS,SEED with 2 tokens or more", arguments[i]);
        s.N = tokens - 1;
        s.seed = (uint64_t)seed;
        for (int way = 0; way < WAYS; way++) {
            check_shape(arguments[i], s, ep, ways[way], false);
        }
    }
}

/* ---- small shapes of every odd kind */

/* E 0: as many as ranks; K 0: as many as experts of one rank. */
static const struct {
    const char *name;
    Shape shape;
    const char *options;
} odd[] = {
    {"few tokens", {8, 2, 16, 5, 1, CHOICE_FEWER}, ""},
    {"one token", {8, 2, 16, 1, 2, CHOICE_ALL}, ""},
    {"one choice", {8, 1, 16, 9, 3, CHOICE_ALL}, ""},
    {"every expert", {8, 8, 16, 9, 4, CHOICE_ALL}, ""},
    {"experts choose", {8, 8, 16, 9, 5, CHOICE_SOME}, ""},
    {"one expert for all", {8, 1, 16, 9, 6, CHOICE_LAST}, ""},
    {"one rank for all", {8, 0, 16, 9, 7, CHOICE_LAST}, ""},
    {"one expert on a rank", {0, 1, 16, 9, 8, CHOICE_ALL}, ""},
    {"an expert without tokens", {8, 3, 16, 9, 9, CHOICE_SPARE}, ""},
    {"tokens on one rank", {8, 2, 16, 9, 10, CHOICE_FIRST}, ""},
    {"no entries", {8, 2, 16, 9, 11, CHOICE_NONE}, ""},
    {"odd rows", {8, 2, 33, 9, 12, CHOICE_ALL}, ""},
    {"rows of one number", {8, 2, 1, 9, 13, CHOICE_ALL}, ""},
    {"whole tiles", {4, 2, 16, 150, 14, CHOICE_FEWER}, "--layout block"},
    {"whole tiles, no entries", {4, 2, 16, 9, 15, CHOICE_NONE}, "--layout block"},
    {"messages of one row", {8, 2, 16, 9, 16, CHOICE_ALL}, "--exchange-rows 1"},
    {"messages of five rows", {8, 3, 16, 9, 17, CHOICE_SPARE}, "--exchange-rows 5"},
    {"messages of five rows to one rank", {8, 0, 16, 9, 18, CHOICE_LAST}, "--exchange-rows 5"},
    {"messages of more rows than there are", {8, 2, 16, 9, 19, CHOICE_ALL}, "--exchange-rows 1000"},
};

/* In groups of every size. */
static void check_odd(bool adjoint) {
    for (int ep = 1; ep <= comm_ranks(GROUP_WORLD); ep++) {
        if (comm_ranks(GROUP_WORLD) % ep != 0) {
            continue;
        }
        comm_form_groups(ep);
        for (size_t i = 0; i < sizeof odd / sizeof *odd; i++) {
            Shape s = odd[i].shape;
            s.E = s.E > 0 ? s.E : ep;
            s.K = s.K > 0 ? s.K : s.E / ep;
            for (int way = 0; way < WAYS; way++) {
                char options[128];
                snprintf(options, sizeof options, "%s %s", ways[way], odd[i].options);
                check_shape(odd[i].name, s, ep, options, adjoint);
            }
        }
    }
}

static void edges(int count, char **arguments) {
    check_odd(false);
}

static void adjoint(int count, char **arguments) {
    check_odd(true);
}

/* ---- several layers, several steps */

/* All forwards, then all backwards, as in training; steps with many tokens and with few follow each other. */
static void check_step(Layers *layers, int64_t step) {
    for (int l = 0; l < layers->count; l++) {
        Layer *layer = &layers->layer[l];
        layer->shape.choice = step % 3 == 1 ? CHOICE_ALL : CHOICE_FEWER;
        layer_choose(layer, step);
        layer_values(layer, modes_of_values[step % MODES]);
        layer_forward(layers, layer);
    }
    for (int l = layers->count - 1; l >= 0; l--) {
        layer_backward(layers, &layers->layer[l]);
    }
    for (int l = 0; l < layers->count; l++) {
        Layer *layer = &layers->layer[l];
        snprintf(where, sizeof where, "step %d, layer %d, way %d", (int)step, l, layer->exchange.way);
        check_demand(layer);
        check_sent(layer);
        check_results(layers, layer);
    }
}

static void steps(int count, char **arguments) {
    static const Shape shape_of[LAYERS] = {{8, 2, 16, 5, 1, 0}, {16, 5, 16, 90, 2, 0}, {8, 8, 16, 3, 3, 0}};
    int ep = comm_ranks(GROUP_WORLD);
    comm_form_groups(ep);
    for (int way = 0; way < WAYS; way++) {
        Layers layers;
        layers_open(&layers, shape_of, LAYERS, ep, ways[way]);
        for (int64_t step = 0; step < 12; step++) {
            check_step(&layers, step);
        }
        layers_close(&layers);
    }
}

/* ---- an example in numbers */

enum { EXAMPLE_RANKS = 8, EXAMPLE_EXPERTS = 32, EXAMPLE_K = 8 };

/* Eight choices of one token among 256 experts on 8 ranks: 8 rows if each choice has one, 4 if each rank has one. */
static void check_example(bool once, const int *rows_expected) {
    static const int expert[EXAMPLE_K] = {79, 81, 108, 120, 161, 179, 3, 30}, rank[] = {2, 2, 3, 3, 5, 5, 0, 0};
    Layers memory = {.count = 0};
    Plan plan, out;
    Shape of_experts = {.E = EXAMPLE_RANKS * EXAMPLE_EXPERTS, .K = EXAMPLE_K, .N = 1}, of_ranks = of_experts;
    of_ranks.E = EXAMPLE_RANKS;
    plan_reserve(&plan, &of_experts, &memory.arena);
    plan_reserve(&out, &of_ranks, &memory.arena);
    arena_commit(&memory.arena);
    memcpy(plan.expert, expert, sizeof expert);
    plan_build(&plan, NULL);
    relay_ranks(&out, &plan, EXAMPLE_EXPERTS, once, NULL);
    plan_build(&out, NULL);
    for (int r = 0; r < EXAMPLE_RANKS; r++) {
        EXPECT(out.count[r] == rows_expected[r], "%d rows for rank %d, expected %d", out.count[r], r, rows_expected[r]);
    }

    RelayNote note[EXAMPLE_K * EXAMPLE_K];
    int width = once ? EXAMPLE_K : 1;
    relay_write(note, &out, &plan, EXAMPLE_EXPERTS, width, NULL);
    for (int r = 0; r < out.offset[EXAMPLE_RANKS]; r++) {
        for (int j = 0; j < width; j++) {
            int i = once ? j : out.entry[r];
            int expected = rank[i] == rank[out.entry[r]] ? expert[i] - rank[i] * EXAMPLE_EXPERTS : -1;
            EXPECT(note[r * width + j].expert == expected, "note %d of row %d is for expert %d, expected %d", j, r,
                   note[r * width + j].expert, expected);
        }
    }
    layers_close(&memory);
}

static void example(int count, char **arguments) {
    static const int of_choices[EXAMPLE_RANKS] = {2, 0, 2, 2, 0, 2}, of_tokens[EXAMPLE_RANKS] = {1, 0, 1, 1, 0, 1};
    snprintf(where, sizeof where, "a row for each choice");
    check_example(false, of_choices);
    snprintf(where, sizeof where, "a row for each rank");
    check_example(true, of_tokens);
}

static const struct {
    const char *name;
    void (*run)(int count, char **arguments);
} modes[] = {{"shapes", shapes}, {"edges", edges}, {"adjoint", adjoint}, {"steps", steps}, {"example", example}};

int main(int argc, char **argv) {
    comm_open();
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++) {
        if (argc > 1 && strcmp(argv[1], modes[i].name) == 0) {
            modes[i].run(argc - 2, argv + 2);
            printf("rank %d of %d: all as expected\n", comm_rank(GROUP_WORLD), comm_ranks(GROUP_WORLD));
            comm_close();
            return EXIT_OK;
        }
    }
    die(__FILE__, __LINE__, "no such test: see the end of tests/exchange_ranks.c");
}
