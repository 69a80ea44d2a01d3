// build: both
/* What ranks store in each other's memory (kernels/peers.h), in one process: the places of rows and their notes, and
 * what dispatch and combine store there, for several ranks whose memories are arrays of this process, each against the
 * way that keeps it at home; then memory that is opened by one rank to itself. test_comm.sh has several ranks.
 *
 * Memories end with bytes that nothing may change, and so does whatever is not to be stored.
 */
#include "operations.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "../kernels/peers.h"
#include "../kernels/relay.h"
#include "forked.h"

enum { GUARD = 64, UNTOUCHED = 0xa5, MOST_BYTES = 1 << 16 };

/* ---- ranks whose memories are arrays */

typedef struct {
    int ranks, places;
    size_t row_bytes;
    unsigned char *of[PEERS_MOST]; /* (places rows), guarded */
} Memories;

static Memories memories_of(Case *c, int ranks, int places, size_t row_bytes) {
    Memories m = {.ranks = ranks, .places = places, .row_bytes = row_bytes};
    for (int r = 0; r < ranks; r++) {
        m.of[r] = case_memory(c, places * row_bytes + GUARD, 1);
        memset(m.of[r], UNTOUCHED, places * row_bytes + GUARD);
    }
    return m;
}

static PeerRows rows_of(const Memories *m) {
    PeerRows rows = {.places = m->places};
    for (int r = 0; r < m->ranks; r++) {
        rows.of[r] = (char *)m->of[r];
    }
    return rows;
}

static void assert_untouched(const unsigned char *bytes, size_t count) {
    for (size_t i = 0; i < count; i++) {
        assert_int_equal(bytes[i], UNTOUCHED);
    }
}

/* Row r is that one, or, with NULL, as it was. */
static void assert_row(const Memories *m, int r, const void *expected) {
    const unsigned char *row = m->of[r / m->places] + (size_t)(r % m->places) * m->row_bytes;
    if (expected) {
        assert_memory_equal(row, expected, m->row_bytes);
    } else {
        assert_untouched(row, m->row_bytes);
    }
}

static void assert_guards(const Memories *m) {
    for (int r = 0; r < m->ranks; r++) {
        assert_untouched(m->of[r] + m->places * m->row_bytes, GUARD);
    }
}

/* ---- shapes: ranks, experts of a rank, tokens, choices of a token */

typedef struct {
    int ranks, experts, N, K;
    Skew skew;
} Shape;

static const Shape shapes[] = {{1, 4, 5, 2, SKEW_NONE},    {2, 4, 9, 2, SKEW_NONE},  {4, 2, 9, 3, SKEW_NONE},
                               {4, 1, 7, 4, SKEW_NONE},    {2, 4, 1, 2, SKEW_NONE},  {3, 3, 8, 1, SKEW_ONE},
                               {2, 3, 11, 6, SKEW_PICKED}, {4, 2, 6, 2, SKEW_EMPTY}, {16, 1, 3, 16, SKEW_NONE},
                               {16, 4, 20, 8, SKEW_ONE}};

enum { SHAPES = sizeof shapes / sizeof *shapes };

/* A router's plan with weights of a rank's tokens; with `few` some experts are full, so entries are dropped. */
static Plan *router_plan(Case *c, const Shape *s, bool few) {
    add_plan(c, s->N, s->ranks * s->experts, s->K, few ? 1 + s->N / 4 : 0, LAYOUT_COMPACT, DROP_TOKEN);
    choose_experts(&c->plan, s->skew, c->seed);
    for (int i = 0; i < s->N * s->K; i++) {
        uint64_t key = random_key(c->seed, RANDOM_TEST, 3);
        c->plan.weight[i] = c->plan.expert[i] < 0 ? 0 : (acc_t)random_uniform(key, (uint64_t)i);
    }
    plan_build(&c->plan, NULL);
    return &c->plan;
}

/* For relay_places to fill; what it does not say it fills is not there. */
static Plan plan_of_places(Case *c, const Shape *s) {
    Plan out = {.N = s->N, .E = s->ranks, .K = s->K, .rows = s->ranks * s->N, .layout = LAYOUT_PADDED};
    out.capacity = s->N;
    out.expert = case_ints(c, (size_t)s->N * s->K);
    out.row = case_ints(c, (size_t)s->N * s->K);
    out.entry = case_ints(c, (size_t)out.rows);
    out.offset = case_ints(c, (size_t)s->ranks + 1);
    return out;
}

/* ---- places and notes */

/* The first entry of token n that is for this rank and has a row there; -1: none. */
static int carrier_of(const Plan *plan, int n, int rank, int experts) {
    for (int i = n * plan->K; i < (n + 1) * plan->K; i++) {
        if (plan->row[i] >= 0 && plan->expert[i] / experts == rank) {
            return i;
        }
    }
    return -1;
}

static void check_places(const Shape *s, const Plan *plan, const Plan *out) {
    for (int i = 0; i < s->N * s->K; i++) {
        int n = i / s->K, rank = plan->row[i] < 0 ? -1 : plan->expert[i] / s->experts;
        bool carries = rank >= 0 && carrier_of(plan, n, rank, s->experts) == i;
        assert_int_equal(out->row[i], carries ? rank * s->N + n : -1);
    }
    for (int place = 0; place < s->ranks * s->N; place++) {
        assert_int_equal(out->entry[place], carrier_of(plan, place % s->N, place / s->N, s->experts));
    }
    for (int r = 0; r <= s->ranks; r++) {
        assert_int_equal(out->offset[r], r * s->N);
    }
}

/* By definition, and as relay_ranks and relay_write say it. */
static void test_places(void **state) {
    int dropped = 0, shared = 0;
    for (int i = 0; i < 2 * SHAPES; i++) {
        const Shape *s = &shapes[i / 2];
        Case c = {.seed = (uint64_t)i};
        const Plan *plan = router_plan(&c, s, i % 2);
        size_t entries = (size_t)s->N * s->K;
        Plan out = plan_of_places(&c, s), ranks = plan_of_places(&c, s);
        Memories notes = memories_of(&c, s->ranks, s->N, s->K * sizeof(RelayNote));
        RelayNote *expected = case_memory(&c, entries * s->ranks, sizeof *expected);
        poison_ints(out.expert, entries);
        poison_ints(out.row, entries);
        poison_ints(out.entry, (size_t)out.rows);
        relay_places(&out, rows_of(&notes), plan, s->experts, NULL);
        relay_ranks(&ranks, plan, s->experts, 1, NULL);
        relay_write(expected, &out, plan, s->experts, s->K, NULL);
        assert_memory_equal(out.expert, ranks.expert, entries * sizeof(int));
        check_places(s, plan, &out);
        for (int j = 0; j < out.rows * s->K; j++) {
            const RelayNote *note = (RelayNote *)notes.of[j / s->K / s->N] + j % (s->N * s->K);
            assert_int_equal(note->expert, expected[j].expert);
            assert_true(note->weight == expected[j].weight);
        }
        assert_guards(&notes);
        for (size_t j = 0; j < entries; j++) {
            dropped += plan->expert[j] >= 0 && plan->row[j] < 0;
            shared += plan->row[j] >= 0 && out.row[j] < 0;
        }
        case_free(&c);
    }
    assert_true(dropped > 20 && shared > 20);
}

/* Two ranks with two experts each: token 0 wants e3 and e2, token 1 e0 and e3. */
static void test_places_by_hand(void **state) {
    static const int row[4] = {2, -1, 1, 3}, entry[4] = {-1, 2, 0, 3}, expert[2][4] = {{-1, -1, 0, -1}, {1, 0, -1, 1}};
    const Shape s = {2, 2, 2, 2, SKEW_NONE};
    Case c = {.seed = 1};
    add_plan(&c, s.N, 4, s.K, 0, LAYOUT_COMPACT, DROP_TOKEN);
    memcpy(c.plan.expert, (int[]){3, 2, 0, 3}, 4 * sizeof(int));
    memcpy(c.plan.weight, (acc_t[]){0.5, 0.25, 0.75, 2}, 4 * sizeof(acc_t));
    plan_build(&c.plan, NULL);
    Plan out = plan_of_places(&c, &s);
    Memories notes = memories_of(&c, 2, 2, 2 * sizeof(RelayNote));
    relay_places(&out, rows_of(&notes), &c.plan, s.experts, NULL);
    assert_memory_equal(out.row, row, sizeof row);
    assert_memory_equal(out.entry, entry, sizeof entry);
    for (int i = 0; i < 8; i++) {
        RelayNote note = ((RelayNote *)notes.of[i / 4])[i % 4];
        assert_int_equal(note.expert, expert[i / 4][i % 4]);
        assert_true(note.weight == (note.expert < 0 ? 0 : c.plan.weight[i % 4]));
    }
    case_free(&c);
}

/* ---- dispatch and combine */

/* A row that dispatch_copy writes at home arrives at its place, and nothing else does. */
static void test_dispatch_put(void **state) {
    static const int widths[] = {1, 16, 37};
    for (int i = 0; i < 3 * SHAPES; i++) {
        const Shape *s = &shapes[i / 3];
        int C = widths[i % 3];
        Case c = {.seed = (uint64_t)i};
        const Plan *plan = router_plan(&c, s, true);
        Plan out = plan_of_places(&c, s);
        Memories notes = memories_of(&c, s->ranks, s->N, s->K * sizeof(RelayNote));
        Memories rows = memories_of(&c, s->ranks, s->N, C * sizeof(real_t));
        real_t *x = case_normal(&c, (size_t)s->N * C), *expected = case_poison(&c, (size_t)out.rows * C);
        relay_places(&out, rows_of(&notes), plan, s->experts, NULL);
        dispatch_copy(expected, x, &out, C, NULL);
        dispatch_put(rows_of(&rows), x, &out, C, NULL);
        for (int r = 0; r < out.rows; r++) {
            assert_row(&rows, r, out.entry[r] < 0 ? NULL : expected + (size_t)r * C);
        }
        assert_guards(&rows);
        case_free(&c);
    }
}

/* The sums, weighted or not, of tokens that have a row; that of an arrived row goes to where it came from. */
static void test_combine_put(void **state) {
    static const int widths[] = {1, 16, 37};
    int without = 0;
    for (int i = 0; i < 3 * 2 * SHAPES; i++) {
        Shape s = shapes[i / 6];
        int C = widths[i / 2 % 3], places = s.N;
        bool weighted = i % 2;
        s.N *= s.ranks; /* here a token is a row that has arrived from some rank */
        Case c = {.seed = (uint64_t)i};
        const Plan *in = router_plan(&c, &s, true);
        Memories sums = memories_of(&c, s.ranks, places, C * sizeof(real_t));
        real_t *rows = case_normal(&c, (size_t)in->rows * C), *expected = case_poison(&c, (size_t)s.N * C);
        if (weighted) {
            combine_forward(expected, rows, in, C, 0, NULL);
        } else {
            dispatch_backward(expected, rows, in, C, 0, NULL);
        }
        combine_put(rows_of(&sums), rows, in, weighted, C, NULL);
        for (int n = 0; n < s.N; n++) {
            bool there = false;
            for (int j = 0; j < s.K; j++) {
                there |= in->row[n * s.K + j] >= 0;
            }
            without += !there;
            assert_row(&sums, n, there ? expected + (size_t)n * C : NULL);
        }
        assert_guards(&sums);
        case_free(&c);
    }
    assert_true(without > 20);
}

/* Rows of experts go back one by one, each to its choice at the rank that it came from; what no choice has stays. */
static void test_rows_put(void **state) {
    static const int widths[] = {1, 16, 37};
    int padding = 0, without = 0;
    for (int i = 0; i < 3 * SHAPES; i++) {
        Shape s = shapes[i / 3];
        int C = widths[i % 3], places = s.N * s.K;
        s.N *= s.ranks; /* here a token is a row that has arrived from some rank */
        Case c = {.seed = (uint64_t)i};
        const Plan *in = router_plan(&c, &s, true);
        Memories homes = memories_of(&c, s.ranks, places, C * sizeof(real_t));
        real_t *rows = case_normal(&c, (size_t)in->rows * C);
        RowTarget to = {rows_of(&homes), in->entry, s.ranks, 0};
        rows_put(to, rows, in->offset, in->E, in->rows, C, NULL);
        for (int entry = 0; entry < s.N * s.K; entry++) {
            assert_row(&homes, entry, in->row[entry] < 0 ? NULL : rows + (size_t)in->row[entry] * C);
            without += in->row[entry] < 0;
        }
        memset(homes.of[0], UNTOUCHED, places * homes.row_bytes); /* once more, but for a row that is padding */
        int first = in->offset[0] < in->offset[in->E] ? in->entry[0] : -1;
        if (first >= 0 && first < places) {
            in->entry[0] = -1;
            rows_put(to, rows, in->offset, in->E, in->rows, C, NULL);
            assert_row(&homes, first, NULL);
            padding++;
        }
        assert_guards(&homes);
        case_free(&c);
    }
    assert_true(without > 20 && padding > 5);
}

/* A row for each choice that takes part, in the order of the choices. */
static void test_choices(void **state) {
    for (int i = 0; i < 2 * SHAPES; i++) {
        const Shape *s = &shapes[i / 2];
        Case c = {.seed = (uint64_t)i};
        const Plan *plan = router_plan(&c, s, i % 2);
        Plan back = {.N = s->N, .K = s->K, .row = case_ints(&c, (size_t)s->N * s->K)};
        relay_choices(&back, plan, NULL);
        for (int j = 0; j < s->N * s->K; j++) {
            assert_int_equal(back.row[j], plan->row[j] < 0 ? -1 : j);
        }
        case_free(&c);
    }
}

/* ---- one rank that opens its memory to itself */

static char *open_alone(void) {
    char why[128];
    char *memory = peers_allocate(MOST_BYTES);
    assert_non_null(memory);
    for (int i = 0; i < MOST_BYTES; i++) {
        assert_int_equal(memory[i], 0);
    }
    assert_true(peers_open(memory, MOST_BYTES, why, sizeof why));
    memset(memory, UNTOUCHED, MOST_BYTES);
    return memory;
}

static void close_alone(char *memory) {
    peers_close();
    assert_false(peers_reach(GROUP_EXPERTS, memory));
    peers_release(memory, MOST_BYTES);
}

static void test_reach(void **state) {
    char elsewhere, *memory = open_alone();
    assert_true(peers_reach(GROUP_EXPERTS, memory) && peers_reach(GROUP_EXPERTS, memory + MOST_BYTES - 1));
    assert_false(peers_reach(GROUP_EXPERTS, memory + MOST_BYTES) || peers_reach(GROUP_EXPERTS, memory - 1) ||
                 peers_reach(GROUP_EXPERTS, &elsewhere));
    assert_ptr_equal(peers_at(GROUP_EXPERTS, 0, memory + 100), memory + 100);
    PeerRows rows = peers_rows(memory + 64, 5, 24);
    assert_int_equal(rows.places, 5);
    assert_ptr_equal(peers_row(&rows, 3, 24), memory + 64 + 3 * 24);
    rows = peers_homes(memory + 64, 5);
    assert_int_equal(rows.places, 5);
    assert_ptr_equal(peers_row(&rows, 4, 24), memory + 64 + 4 * 24);
    peers_meet(GROUP_EXPERTS, false, NULL);
    close_alone(memory);
}

/* Of `rows` rows those that have one of `each` that is not -1; without `there` all of them. */
static void check_put(char *memory, int rows, size_t row_bytes, const int *there, int each) {
    unsigned char from[32 * 1028], *to = (unsigned char *)memory + 12; /* a multiple of 4, of nothing more */
    assert_true(rows * row_bytes <= sizeof from);
    memset(memory, UNTOUCHED, MOST_BYTES);
    for (size_t i = 0; i < rows * row_bytes; i++) {
        from[i] = (unsigned char)random_bits(random_key(1, RANDOM_TEST, row_bytes), i);
    }
    peers_put(peers_rows(to, rows, row_bytes), from, row_bytes, there, each, NULL);
    assert_untouched((unsigned char *)memory, 12);
    for (int r = 0; r < rows; r++) {
        bool goes = !there;
        for (int j = 0; j < each; j++) {
            goes |= there && there[r * each + j] != -1;
        }
        if (goes) {
            assert_memory_equal(to + r * row_bytes, from + r * row_bytes, row_bytes);
        } else {
            assert_untouched(to + r * row_bytes, row_bytes);
        }
    }
    assert_untouched(to + rows * row_bytes, MOST_BYTES - 12 - rows * row_bytes);
}

static void test_put(void **state) {
    static const size_t row_bytes[] = {4, 12, 16, 20, 64, 1028};
    static const int rows[] = {0, 1, 7, 32};
    char *memory = open_alone();
    for (int i = 0; i < 6 * 4; i++) {
        int there[32 * 3], count = rows[i % 4];
        check_put(memory, count, row_bytes[i / 4], NULL, 0);
        for (int each = 1; each <= 3; each++) {
            for (int j = 0; j < count * each; j++) {
                int number = (int)random_below(random_key((uint64_t)each, RANDOM_TEST, 2), (uint64_t)j, 2 * each);
                there[j] = number > 0 ? -1 : number; /* 0 is there */
            }
            check_put(memory, count, row_bytes[i / 4], there, each);
        }
    }
    close_alone(memory);
}

/* All places, whether there are rows in them or not. With one rank the step to those for the next does not matter. */
static void test_copy(void **state) {
    char *memory = open_alone(), from[7 * 20];
    for (size_t i = 0; i < sizeof from; i++) {
        from[i] = (char)random_bits(random_key(3, RANDOM_TEST, 0), i);
    }
    for (size_t step = 0; step <= sizeof from; step += sizeof from) {
        memset(memory, UNTOUCHED, MOST_BYTES);
        peers_copy(peers_rows(memory + 12, 7, 20), from, step, 20, NULL);
        assert_untouched((unsigned char *)memory, 12);
        assert_memory_equal(memory + 12, from, sizeof from);
        assert_untouched((unsigned char *)memory + 12 + sizeof from, MOST_BYTES - 12 - sizeof from);
    }
    PeerRows own = peers_own_rows(from, 7, 20);
    assert_int_equal(own.places, 7);
    assert_ptr_equal(peers_row(&own, 4, 20), from + 4 * 20);
    close_alone(memory);
}

/* From elsewhere, and from the place itself. */
static void test_put_all(void **state) {
    char *memory = open_alone(), mine[1000];
    for (size_t bytes = 4; bytes <= sizeof mine; bytes *= 5) {
        for (size_t i = 0; i < bytes; i++) {
            mine[i] = (char)random_bits(random_key(2, RANDOM_TEST, bytes), i);
        }
        memset(memory, UNTOUCHED, MOST_BYTES);
        peers_put_all(memory + 20, mine, bytes, NULL);
        peers_put_all(memory + 20, memory + 20, bytes, NULL);
        assert_memory_equal(memory + 20, mine, bytes);
        assert_untouched((unsigned char *)memory, 20);
        assert_untouched((unsigned char *)memory + 20 + bytes, MOST_BYTES - 20 - bytes);
    }
    close_alone(memory);
}

static void allocate_twice(void *unused) {
    peers_allocate(100);
    peers_allocate(100);
}

static void test_one_at_a_time(void **state) {
    Forked result;
    run_forked(&result, allocate_twice, NULL);
    assert_refused(&result, "only one arena at a time can be open to other ranks");
    for (int i = 0; i < 3; i++) { /* one after the other they can */
        close_alone(open_alone());
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one_at_a_time), /* first: a process forks best before it has threads */
        cmocka_unit_test(test_places),        cmocka_unit_test(test_places_by_hand),
        cmocka_unit_test(test_dispatch_put),  cmocka_unit_test(test_combine_put),
        cmocka_unit_test(test_rows_put),      cmocka_unit_test(test_choices),
        cmocka_unit_test(test_reach),         cmocka_unit_test(test_put),
        cmocka_unit_test(test_put_all),       cmocka_unit_test(test_copy),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
