/* Does every way of exchange do what one rank would do by itself? test_exchange.sh starts this, as one process and as
 * several of mpirun's.
 *
 *     mpirun -n 4 build/exchange_ranks shapes 64,6,2048,4,1234 ..     E, K, H, tokens, seed of each; see `shapes`
 *     mpirun -n 4 build/exchange_ranks wires 64,6,2048,4,1234 ..      the same with rows of fewer bits on the wire
 *     mpirun -n 4 build/exchange_ranks edges                          small shapes of every odd kind; see `modes`
 *     build/exchange_ranks_double adjoint                             the same in double
 *
 * What is expected is computed without the exchange: by a formula (closed_form, oracle), or by the plain dispatch and
 * combine of one rank, to the bit. With a row per rank sums have another order, so bits are compared where they are
 * exact. What the wire rounds is allowed for by bounds that follow from its formats. Each rank ends with the line
 * "rank 2 of 4: all as expected"; the first difference ends all of them with one that says where it is.
 *
 *     exchange_layer.h      a layer with experts that are simple enough to know what must come out
 *     exchange_tokens.h     what its tokens choose and hold
 *     exchange_passes.h     its forward and backward, and the same on one rank
 *     exchange_expected.h   what must come out, by formula
 *     exchange_rows.h       checks: where rows are, how many travel
 *     exchange_results.h    checks: what comes out
 *     exchange_adjoint.h    checks: what backwards must be
 *     exchange_expect.h     how numbers are compared
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "exchange_adjoint.h"
#include "exchange_results.h"
#include "exchange_rows.h"

/* A line here gets all tests, one in parts some of them; see `takes_turn`. */
static const Way ways[] = {
    {"--exchange flat", .row_per_rank = false, .fixed = false, .messages = true},
    {"--exchange bucketed", .row_per_rank = false, .fixed = false, .messages = true},
    {"--exchange dedup", .row_per_rank = true, .fixed = false, .messages = true},
    {"--exchange padded", .row_per_rank = false, .fixed = true, .messages = true},
    {"--exchange p2p", .row_per_rank = true, .fixed = false, .messages = false},
    {"--exchange p2p --exchange-return choice", .row_per_rank = true, .by_choice = true},
    {"--exchange flat --exchange-chunks 2", .messages = true, .parts = 2},
    {"--exchange flat --exchange-chunks 3", .messages = true, .parts = 3},
    {"--exchange bucketed --exchange-chunks 2", .messages = true, .parts = 2},
    {"--exchange bucketed --exchange-chunks 3 --overlap 0", .messages = true, .parts = 3},
    {"--exchange dedup --exchange-chunks 2", .row_per_rank = true, .messages = true, .parts = 2},
    {"--exchange dedup --exchange-chunks 3", .row_per_rank = true, .messages = true, .parts = 3},
    {"--exchange p2p --exchange-chunks 2", .row_per_rank = true, .parts = 2},
    {"--exchange p2p --exchange-chunks 3", .row_per_rank = true, .parts = 3},
    {"--exchange p2p --exchange-chunks 3 --overlap 0", .row_per_rank = true, .parts = 3},
    {"--exchange p2p --exchange-return choice --exchange-chunks 3", .row_per_rank = true, .by_choice = true,
     .parts = 3},
};

/* Every type on either leg, and never the same on both, so that one taken for the other is found. Ranks that hold all
 * experts have no wire: for them the first. */
static const char *const wires[] = {
    "",
    "--wire fp32 --wire-back bf16",
    "--wire bf16 --wire-back fp16",
    "--wire fp16 --wire-back fp8",
    "--wire fp8",
    "--wire-back fp32",
};

enum { WAYS = sizeof ways / sizeof *ways, WIRES = sizeof wires / sizeof *wires };

static int wires_of(int ep) {
    return ep > 1 ? WIRES : 1;
}

/* Whether a shape is for this way and this wire. The ways in parts are many, and take turns: a shape gets each of them
 * with one wire, so where there are fewer wires than here it gets some of them. */
static bool takes_turn(int way, int shape, int wire) {
    return ways[way].parts == 0 || (way + shape) % WIRES == wire;
}

static const Mode modes_of_values[] = {
    {"the benchmark's experts", EXPERT_RANK_SCALE, VALUES_HALF, 0},
    {"scale per expert", EXPERT_SCALE, VALUES_SIGNED, 1},
    {"rotation per expert", EXPERT_ROTATION, VALUES_SIGNED, 0},
    {"whole numbers, scale per expert", EXPERT_SCALE, VALUES_WHOLE, 1},
    {"whole numbers, rotation per expert", EXPERT_ROTATION, VALUES_WHOLE, 0},
};

enum { MODES = sizeof modes_of_values / sizeof *modes_of_values, SIGNED_SCALE = 1, WHOLE_ROTATION = 4 };

/* ---- one shape in one way */

static void say_where(const char *name, const Layer *layer, const char *options, const char *mode) {
    const Shape *s = &layer->shape;
    snprintf(where, sizeof where, "%s, %d experts on %d ranks, %d of them to each of %d tokens of %d, %s %s, %s", name,
             s->E, layer->exchange.ranks, s->K, s->N, s->H, layer->way->options, options, mode);
}

static void check_mode(Layers *layers, Layer *layer, int mode) {
    layer_values(layer, modes_of_values[mode]);
    layer_forward(layers, layer);
    layer_backward(layers, layer);
    check_results(layers, layer);
    if (mode == SIGNED_SCALE) {
        check_repeats(layers, layer);
    }
}

/* What backwards must be, instead of what comes out: of random numbers, and of whole ones where they stay whole. */
static void check_mode_backwards(Layers *layers, Layer *layer, int mode) {
    layer_values(layer, modes_of_values[mode]);
    if (mode == SIGNED_SCALE) {
        layer_forward(layers, layer);
        layer_backward(layers, layer);
        check_weight_gradient(layers, layer);
        check_adjoints(layers, layer);
    } else if (mode == WHOLE_ROTATION && sums_exactly(layer, FORWARD) && sums_exactly(layer, BACKWARD)) {
        check_adjoints(layers, layer);
    }
}

/* What came out of a layer, to be kept when its memory is gone. */
typedef struct {
    real_t *y, *dx;
    acc_t *dweight;
} Results;

static void *copied(const void *from, size_t bytes) {
    void *copy = malloc(bytes);
    CHECK(copy, "out of memory");
    return memcpy(copy, from, bytes);
}

static void run_once(Layers *layers, Layer *layer, int parts, int mode) {
    int N = layer->shape.N;
    layer_choose(layer, 0);
    layer_values(layer, modes_of_values[mode]);
    layer_forward(layers, layer);
    layer_backward(layers, layer);
    parts = !exchange_travels(&layer->exchange) ? 1 : parts < N ? parts : N;
    EXPECT(layer->exchange.parts == parts, "%d parts, expected %d", layer->exchange.parts, parts);
}

/* Rows are moved, weighted and added up as they are in one part. Closes the layers and opens them with one part: not
 * all can be open at the same time. */
static void check_as_in_one_part(Layers *layers, Layer *layer, int ep, const char *options, int mode) {
    const Way *way = layer->way;
    Shape s = layer->shape;
    size_t row_bytes = (size_t)s.N * s.H * sizeof(real_t), weight_bytes = (size_t)s.N * s.K * sizeof(acc_t);
    char in_one[192];
    const char *options_of_one = in_one;
    run_once(layers, layer, way->parts, mode);
    Results in_parts = {copied(layer->y, row_bytes), copied(layer->dx, row_bytes),
                        copied(layer->dweight, weight_bytes)};
    layers_close(layers);
    snprintf(in_one, sizeof in_one, "%s --exchange-chunks 1", options);
    layers_open(layers, &s, &options_of_one, 1, ep, way);
    run_once(layers, layer, 1, mode);
    same_bits("in parts: y", in_parts.y, layer->y, (size_t)s.N * s.H);
    same_bits("in parts: dx", in_parts.dx, layer->dx, (size_t)s.N * s.H);
    same_bits("in parts: dweight", in_parts.dweight, layer->dweight, (size_t)s.N * s.K);
    free(in_parts.y);
    free(in_parts.dx);
    free(in_parts.dweight);
}

static void check_shape(const char *name, Shape s, int ep, const Way *way, const char *options, bool backwards) {
    Layers layers;
    Layer *layer = &layers.layer[0];
    layers_open(&layers, &s, &options, 1, ep, way);
    say_where(name, layer, options, "where rows are");
    layer_choose(layer, 0);
    check_dispatch(&layers, layer, modes_of_values[SIGNED_SCALE]);
    for (int m = 0; m < MODES; m++) {
        say_where(name, layer, options, modes_of_values[m].name);
        (backwards ? check_mode_backwards : check_mode)(&layers, layer, m);
    }
    if (way->parts > 0 && !backwards) {
        say_where(name, layer, options, "as in one part");
        check_as_in_one_part(&layers, layer, ep, options, SIGNED_SCALE);
    }
    layers_close(&layers);
}

/* Shapes of the command line with some of the wires, experts spread over all ranks. As in the benchmark, a rank has 1
 * to `tokens` - 1 tokens. */
static void check_shapes(int count, char **arguments, int first_wire, int end_wire) {
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
            for (int wire = first_wire; wire < end_wire; wire++) {
                if (takes_turn(way, i, wire - first_wire)) {
                    check_shape(arguments[i], s, ep, &ways[way], wires[wire], false);
                }
            }
        }
    }
}

static void shapes(int count, char **arguments) {
    check_shapes(count, arguments, 0, 1);
}

static void in_all_wires(int count, char **arguments) {
    check_shapes(count, arguments, 1, wires_of(comm_ranks(GROUP_WORLD)));
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
    {"two tokens", {8, 2, 16, 2, 20, CHOICE_ALL}, ""},
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

static void check_odd_shape(size_t i, int ep, bool backwards) {
    Shape s = odd[i].shape;
    s.E = s.E > 0 ? s.E : ep;
    s.K = s.K > 0 ? s.K : s.E / ep;
    for (int way = 0; way < WAYS; way++) {
        for (int wire = 0; wire < wires_of(ep); wire++) {
            char options[128];
            snprintf(options, sizeof options, "%s %s", odd[i].options, wires[wire]);
            if (takes_turn(way, (int)i, wire)) {
                check_shape(odd[i].name, s, ep, &ways[way], options, backwards);
            }
        }
    }
}

/* In groups of every size. */
static void check_odd(bool backwards) {
    for (int ep = 1; ep <= comm_ranks(GROUP_WORLD); ep++) {
        if (comm_ranks(GROUP_WORLD) % ep != 0) {
            continue;
        }
        comm_form_groups(ep);
        for (size_t i = 0; i < sizeof odd / sizeof *odd; i++) {
            check_odd_shape(i, ep, backwards);
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

/* All forwards, then all backwards, as in training; steps with many tokens and with few follow each other. In every
 * other one ranks run ahead of others as far as the exchange lets them. */
static void check_step(Layers *layers, int64_t step) {
    layers->as_left = step % 2 == 1;
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
        snprintf(where, sizeof where, "step %d, layer %d, %s, wire types %d and %d", (int)step, l, layer->way->options,
                 wire_on(layer, FORWARD), wire_on(layer, BACKWARD));
        check_demand(layer);
        check_sent(layer);
        check_results(layers, layer);
    }
}

static void steps_of(const Way *way, const char *const *options, int ep) {
    static const Shape shape_of[LAYERS] = {{8, 2, 16, 5, 1, 0}, {16, 5, 16, 90, 2, 0}, {8, 8, 16, 3, 3, 0}};
    Layers layers;
    layers_open(&layers, shape_of, options, LAYERS, ep, way);
    for (int64_t step = 0; step < 12; step++) {
        check_step(&layers, step);
    }
    layers_close(&layers);
}

/* The layers of a model have one wire; here each has another, so that what they share is large enough for all. */
static void steps(int count, char **arguments) {
    int ep = comm_ranks(GROUP_WORLD);
    comm_form_groups(ep);
    for (int way = 0; way < WAYS; way++) {
        for (int wire = 0; wire < wires_of(ep); wire++) {
            const char *options[LAYERS];
            for (int l = 0; l < LAYERS; l++) {
                options[l] = wires[(wire + l) % WIRES];
            }
            if (takes_turn(way, 0, wire)) {
                steps_of(&ways[way], options, ep);
            }
        }
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
} modes[] = {{"shapes", shapes},   {"wires", in_all_wires}, {"edges", edges},
             {"adjoint", adjoint}, {"steps", steps},        {"example", example}};

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
