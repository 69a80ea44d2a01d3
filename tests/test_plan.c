// build: both
/* The plan against its definition in plan.h, by counting: every layout, drop policy and kind of choice; then what must
 * not depend on the layout. Dispatch and combine follow their plan.
 *
 * The edges are visited: one token, experts without rows, full experts, entries that are not there, no entries at all,
 * NaN weights. test_routing_exact.c has the choice itself.
 */
#include "operations.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>

#include <cmocka.h>

static void fill_ints(int *x, int count, int value) {
    for (int i = 0; i < count; i++) {
        x[i] = value;
    }
}

/* Whether entry a takes a place before entry b. */
static bool goes_first(const Plan *p, int a, int b) {
    if (p->drop == DROP_SLOT && a % p->K != b % p->K) {
        return a % p->K < b % p->K;
    }
    if (p->drop == DROP_WEIGHT && p->weight[a] != p->weight[b]) {
        return p->weight[a] > p->weight[b];
    }
    return a < b;
}

static int tiles_of(int rows) {
    return rows / PLAN_TILE + (rows % PLAN_TILE > 0);
}

/* The entries of expert e: who has a row and which. Returns how many chose it. */
static int check_expert(const Plan *p, int e) {
    int demand = 0, rank = 0;
    for (int i = 0; i < p->N * p->K; i++) {
        if (p->expert[i] != e) {
            continue;
        }
        demand++;
        int earlier = 0;
        for (int other = 0; other < p->N * p->K; other++) {
            earlier += p->expert[other] == e && goes_first(p, other, i);
        }
        if (p->capacity > 0 && earlier >= p->capacity) {
            assert_int_equal(p->row[i], -1);
            continue;
        }
        int r = p->offset[e] + rank++; /* rows of an expert in token order, whoever was dropped */
        assert_int_equal(p->row[i], r);
        assert_int_equal(p->entry[r], i);
        assert_true(p->row_weight[r] == p->weight[i]);
    }
    assert_int_equal(p->demand[e], demand);
    assert_int_equal(p->count[e], rank);
    int length = p->layout == LAYOUT_PADDED  ? p->rows / p->E
                 : p->layout == LAYOUT_BLOCK ? tiles_of(rank) * PLAN_TILE
                                             : rank;
    assert_int_equal(p->offset[e + 1] - p->offset[e], length);
    for (int r = p->offset[e] + rank; r < p->offset[e + 1]; r++) {
        assert_int_equal(p->entry[r], -1);
        assert_true(p->row_weight[r] == 0);
    }
    return demand;
}

static void check_plan(const Plan *p) {
    int there = 0, chosen = 0;
    for (int i = 0; i < p->N * p->K; i++) {
        there += p->expert[i] >= 0;
        assert_true(p->expert[i] >= 0 || p->row[i] == -1);
    }
    assert_int_equal(p->offset[0], 0);
    for (int e = 0; e < p->E; e++) {
        chosen += check_expert(p, e);
    }
    assert_int_equal(chosen, there);
    assert_true(p->offset[p->E] <= p->rows);
    for (int r = p->offset[p->E]; r < p->rows; r++) {
        assert_int_equal(p->entry[r], -1);
        assert_true(p->row_weight[r] == 0);
    }
    for (int tile = 0; p->layout == LAYOUT_BLOCK && tile < p->rows / PLAN_TILE; tile++) {
        int owner = -1; /* the expert that all rows of the tile belong to */
        for (int e = 0; e < p->E; e++) {
            owner = p->offset[e] <= tile * PLAN_TILE && (tile + 1) * PLAN_TILE <= p->offset[e + 1] ? e : owner;
        }
        assert_int_equal(p->tile_expert[tile], owner);
        assert_true((owner < 0) == (tile * PLAN_TILE >= p->offset[p->E]));
    }
}

/* A plan with random weights, few different ones: many ties. */
static Case random_plan(int N, int E, int K, int capacity, Layout layout, DropPolicy drop, Skew skew, uint64_t seed) {
    Case c = {.seed = seed};
    add_plan(&c, N, E, K, capacity, layout, drop);
    choose_experts(&c.plan, skew, seed);
    for (int i = 0; i < N * K; i++) {
        c.plan.weight[i] =
            c.plan.expert[i] < 0 ? 0 : (real_t)(1 + random_below(random_key(seed, RANDOM_TEST, 3), (uint64_t)i, 4)) / 4;
    }
    return c;
}

static void test_plan_invariants(void **state) {
    static const int sizes[][3] = {{1, 1, 1},  {1, 5, 2},   {7, 3, 2},   {40, 8, 2}, {33, 4, 4},
                                   {64, 2, 1}, {20, 17, 3}, {150, 3, 3}, {1, 4, 4}};
    int dropped = 0, absent = 0;
    for (int i = 0; i < 9 * 4 * 3 * 3 * 4; i++) {
        const int *size = sizes[i / 144];
        int N = size[0], E = size[1], K = size[2], skew = i / 36 % 4, tight = i % 4;
        if ((skew == SKEW_EMPTY && K == E) || (skew == SKEW_PICKED && K < E)) {
            continue;
        }
        int capacity = (int[]){0, 1, (N * K + E - 1) / E, N}[tight];
        Case c = random_plan(N, E, K, capacity, (Layout)(i / 12 % 3), (DropPolicy)(i / 4 % 3), (Skew)skew, (uint64_t)i);
        fill_ints(c.plan.row, N * K, 12345); /* whatever was there before */
        fill_ints(c.plan.offset, E + 1, 12345);
        plan_build(&c.plan, NULL);
        check_plan(&c.plan);
        real_t *drow = case_normal(&c, (size_t)c.plan.rows), *dweight = case_poison(&c, (size_t)N * K);
        plan_weight_backward(dweight, drow, &c.plan, NULL);
        for (int j = 0; j < N * K; j++) {
            absent += c.plan.expert[j] < 0;
            dropped += c.plan.expert[j] >= 0 && c.plan.row[j] < 0;
            assert_true(dweight[j] == (c.plan.row[j] < 0 ? 0 : drow[c.plan.row[j]]));
        }
        case_free(&c);
    }
    assert_true(dropped > 1000 && absent > 1000); /* the policies had something to decide */
}

/* 65, 0, 64, 1 and 2 entries: two tiles, none, one, one, one; the map ends before the room does. */
static void test_tiles_by_hand(void **state) {
    static const int counts[5] = {65, 0, 64, 1, 2}, offsets[6] = {0, 128, 128, 192, 256, 320};
    static const int owners[6] = {0, 0, 2, 3, 4, -1};
    Case c = {.seed = 1};
    add_plan(&c, 132, 5, 1, 0, LAYOUT_BLOCK, DROP_TOKEN);
    for (int e = 0, n = 0; e < 5; e++) {
        for (int i = 0; i < counts[e]; i++) {
            c.plan.expert[n++] = e;
        }
    }
    plan_build(&c.plan, NULL);
    assert_int_equal(c.plan.rows, 6 * PLAN_TILE);
    assert_memory_equal(c.plan.count, counts, sizeof counts);
    assert_memory_equal(c.plan.offset, offsets, sizeof offsets);
    assert_memory_equal(c.plan.tile_expert, owners, sizeof owners);
    case_free(&c);
}

/* The most tiles that any loads make: best[m] for m entries and the experts so far, tried out. */
static int most_tiles(int N, int E, int K, int capacity) {
    enum { MOST = 1000 };
    int best[MOST + 1] = {0}, entries = N * K, room = capacity > 0 && capacity < N ? capacity : N;
    assert_true(entries <= MOST);
    for (int e = 0; e < E; e++) {
        for (int m = entries; m >= 0; m--) {
            for (int load = 0; load <= room && load <= m; load++) {
                int tiles = best[m - load] + tiles_of(load);
                best[m] = tiles > best[m] ? tiles : best[m];
            }
        }
    }
    return best[entries];
}

/* The room that a plan asks for is what the worst choice needs, no tile more. */
static void test_rows(void **state) {
    static const int tokens[] = {1, 2, 63, 64, 65, 100, 129, 200};
    for (int i = 0; i < 8; i++) {
        for (int E = 1; E <= 5; E++) {
            for (int K = 1; K <= E; K++) {
                int N = tokens[i];
                for (int capacity = 0; capacity <= N + 1; capacity += 1 + N / 5) {
                    assert_int_equal(plan_rows(N, E, K, capacity, LAYOUT_BLOCK),
                                     PLAN_TILE * most_tiles(N, E, K, capacity));
                    int places = E * (capacity ? capacity : N);
                    assert_int_equal(plan_rows(N, E, K, capacity, LAYOUT_COMPACT), places < N * K ? places : N * K);
                    assert_int_equal(plan_rows(N, E, K, capacity, LAYOUT_PADDED), E * (capacity ? capacity : N));
                }
            }
        }
    }
    assert_int_equal(plan_rows(4096, 64, 2, 0, LAYOUT_BLOCK), 8192 + 63 * 64);
}

/* A soft plan has the same rows whatever the router did, and nothing else is touched: it has no memory for it. */
static void test_soft_plan(void **state) {
    for (int across = 0; across <= 1; across++) {
        int demand[3], count[3], offset[4];
        Plan plan = {.N = 12,
                     .E = 3,
                     .K = 15,
                     .rows = 60,
                     .slots = 5,
                     .group_tokens = 3,
                     .across = across,
                     .demand = demand,
                     .count = count,
                     .offset = offset};
        plan_build(&plan, NULL);
        for (int e = 0; e <= 3; e++) {
            assert_int_equal(offset[e], 20 * e);
            assert_true(e == 3 || (demand[e] == 20 && count[e] == 20));
        }
    }
}

/* Three tokens, two choices each, one place per expert: who stays under each policy, by hand. */
static void test_drop_policies(void **state) {
    static const int expert[6] = {0, 1, 1, 0, 1, 2};
    static const real_t weight[6] = {0.5, 0.4, 0.4, 0.6, 0.3, 0.2};
    static const int stays[3][6] = {
        [DROP_TOKEN] = {1, 1, 0, 0, 0, 1},  /* token 0 takes both experts */
        [DROP_SLOT] = {1, 0, 1, 0, 0, 1},   /* the first choice of token 1 goes before the second of token 0 */
        [DROP_WEIGHT] = {0, 1, 0, 1, 0, 1}, /* 0.6 before 0.5; the tie at 0.4 goes to the earlier entry */
    };
    for (int drop = DROP_TOKEN; drop <= DROP_WEIGHT; drop++) {
        Case c = {.seed = 1};
        add_plan(&c, 3, 3, 2, 1, LAYOUT_COMPACT, (DropPolicy)drop);
        memcpy(c.plan.expert, expert, sizeof expert);
        memcpy(c.plan.weight, weight, sizeof weight);
        plan_build(&c.plan, NULL);
        for (int i = 0; i < 6; i++) {
            assert_int_equal(c.plan.row[i] >= 0, stays[drop][i]);
        }
        case_free(&c);
    }
}

/* NaN weights of a diverged run must not break capacity or the maps. */
static void test_plan_with_nan_weights(void **state) {
    Case c = {.seed = 1};
    add_plan(&c, 9, 3, 2, 4, LAYOUT_PADDED, DROP_WEIGHT);
    choose_experts(&c.plan, SKEW_ONE, 1);
    for (int i = 0; i < 18; i++) {
        c.plan.weight[i] = i % 3 == 0 ? (real_t)NAN : i % 3 == 1 ? -(real_t)NAN : (real_t)0.5;
    }
    plan_build(&c.plan, NULL);
    int kept = 0;
    for (int i = 0; i < 18; i++) {
        int r = c.plan.row[i], e = c.plan.expert[i];
        assert_in_range(r + 1, 0, c.plan.rows);
        if (r >= 0) {
            kept++;
            assert_int_equal(c.plan.entry[r], i);
            assert_in_range(r, c.plan.offset[e], c.plan.offset[e] + c.plan.count[e] - 1);
        }
    }
    assert_int_equal(c.plan.count[2], 4);
    assert_int_equal(kept, c.plan.count[0] + c.plan.count[1] + c.plan.count[2]);
    case_free(&c);
}

/* ---- dispatch and combine */

/* With experts that do nothing, combine after dispatch is the weighted identity; small integers and powers of two make
 * it exact. */
static void test_dispatch_then_combine(void **state) {
    enum { N = 23, C = 19, E = 5 };
    for (int i = 0; i < 3 * 3 * 4; i++) {
        int skew = i % 4, K = skew == SKEW_PICKED ? E : 3;
        Case c = random_plan(N, E, K, (int[]){0, 4, N}[i / 4 % 3], (Layout)(i / 12), (DropPolicy)(i % 3), (Skew)skew,
                             (uint64_t)i);
        Plan *plan = &c.plan;
        real_t *x = case_reals(&c, N * C), *start = case_reals(&c, N * C);
        real_t *rows = case_poison(&c, (size_t)plan->rows * C), *back = case_poison(&c, (size_t)plan->rows * C);
        real_t *y = case_poison(&c, N * C), *dx = case_poison(&c, N * C);
        for (int j = 0; j < N * C; j++) {
            x[j] = (real_t)random_below(1, (uint64_t)j, 129) - 64;
            start[j] = (real_t)random_below(2, (uint64_t)j, 129) - 64;
        }
        real_t *y_sum = case_copy(&c, start, N * C), *dx_sum = case_copy(&c, start, N * C);
        plan_build(plan, NULL);
        dispatch_forward(rows, x, plan, C, NULL);
        combine_backward(back, x, plan, C, NULL);
        for (int r = 0; r < plan->offset[E]; r++) {
            for (int j = 0; j < C; j++) {
                assert_true(rows[r * C + j] == (plan->entry[r] < 0 ? 0 : x[plan->entry[r] / K * C + j]));
                assert_true(back[r * C + j] == rows[r * C + j]);
            }
        }
        combine_forward(y, rows, plan, C, 0, NULL);
        combine_forward(y_sum, rows, plan, C, 1, NULL);
        dispatch_backward(dx, rows, plan, C, 0, NULL);
        dispatch_backward(dx_sum, rows, plan, C, 1, NULL);
        for (int j = 0; j < N * C; j++) {
            real_t weight = 0, places = 0;
            for (int entry = j / C * K; entry < (j / C + 1) * K; entry++) {
                weight += plan->row[entry] < 0 ? 0 : plan->weight[entry];
                places += plan->row[entry] >= 0;
            }
            assert_true(y[j] == weight * x[j] && y_sum[j] == start[j] + weight * x[j]);
            assert_true(dx[j] == places * x[j] && dx_sum[j] == start[j] + places * x[j]);
        }
        case_free(&c);
    }
}

/* ---- the whole layer */

/* All results of two runs of the layer, bit for bit, but the share of rows that are padding. */
static void assert_same_layer(Case *a, Case *b) {
    host_val(a, "load")[LOAD_PADDING] = host_val(b, "load")[LOAD_PADDING] = 0;
    for (int i = 0; i < a->array_count; i++) {
        const Array *x = &a->arrays[i], *y = &b->arrays[i];
        if (x->role == ROLE_INPUT) {
            assert_bits(x->gradient, y->gradient, x->count);
        } else if (x->role != ROLE_SCRATCH) {
            assert_bits(x->value, y->value, x->count);
        }
    }
}

static void run_layer(Case *c, const int *extents, Layout layout, int capacity, uint64_t seed) {
    const Operation *op = operation_named("moe_layer");
    int own[EXTENTS];
    memcpy(own, extents, sizeof own);
    own[MOE_LAYOUT] = layout;
    own[MOE_CAPACITY] = capacity;
    case_make(c, op, own, seed);
    case_forward(op, c);
    case_backward(op, c);
}

/* Every layout computes the same bits, all gradients included: a row of zeros adds 0 to a weight's gradient, at the end
 * of the expert's sum. (Only a gradient of exactly -0.0 would show it, by becoming 0.0.) 300 tokens make sums longer
 * than the depth at which a product is cut. */
static void test_layouts_agree(void **state) {
    int padding = 0;
    for (int i = 0; i < 2 * 3 * 3 * 4; i++) {
        int N = i % 2 ? 65 : 300, drop = i / 2 % 3, picked = i / 18 % 2, E = 6;
        int skew = picked && i / 36 ? SKEW_NONE : i / 6 % 3;
        int extents[EXTENTS] = {N, 24, 20, E, picked ? E : 2, i / 36, i / 18 % 2, 0, 0, drop, skew, picked};
        int capacity = drop == DROP_TOKEN ? 0 : N / 4;
        Case compact, padded, block;
        run_layer(&compact, extents, LAYOUT_COMPACT, capacity, (uint64_t)i);
        run_layer(&padded, extents, LAYOUT_PADDED, capacity, (uint64_t)i);
        run_layer(&block, extents, LAYOUT_BLOCK, capacity, (uint64_t)i);
        padding += block.plan.offset[E] - compact.plan.offset[E];
        assert_same_layer(&compact, &padded);
        assert_same_layer(&compact, &block);
        case_free(&compact);
        case_free(&padded);
        case_free(&block);
    }
    assert_true(padding > 1000);
}

/* In the block layout an expert without rows has no tile, and keeps the bits of its gradients as in the compact one,
 * where gradients are added to. */
static void test_idle_expert_has_no_tile(void **state) {
    const Operation *op = operation_named("moe_layer");
    Case c;
    run_layer(&c, (int[EXTENTS]){65, 24, 20, 6, 2, 1, [MOE_SKEW] = SKEW_EMPTY, [MOE_ADD_DW] = 1}, LAYOUT_BLOCK, 0, 3);
    for (int i = 0; i < 2; i++) {
        Array *w = array_named(&c, i ? "w2" : "w1");
        fill_value(w->before, w->count, -0.0); /* adding even a zero would change these bits */
    }
    case_forward(op, &c);
    case_backward(op, &c);
    for (int i = 0; i < 2; i++) {
        Array *w = array_named(&c, i ? "w2" : "w1");
        size_t one = w->count / 6;
        for (size_t e = 0; e < 6; e++) {
            bool same = memcmp(w->gradient + e * one, w->before + e * one, one * sizeof(real_t)) == 0;
            assert_int_equal(same, e == 5);
        }
    }
    case_free(&c);
}

/* Experts that want nobody: the layer adds nothing, the experts' gradients are as they were, or zero where they are
 * overwritten, and its router still has its z-loss. */
static void test_no_entries_at_all(void **state) {
    const Operation *op = operation_named("moe_layer");
    for (int i = 0; i < 3 * 2 * 2 * 2; i++) {
        int N = i / 3 % 2 ? 65 : 1, drop = i / 6 % 2 ? DROP_WEIGHT : DROP_TOKEN, capacity = i / 6 % 2 ? 2 : 0;
        int add_dw = i / 12;
        Case c;
        run_layer(&c, (int[EXTENTS]){N, 8, 6, 4, 4, 0, [MOE_DROP] = drop, [MOE_PICKED] = 1, [MOE_ADD_DW] = add_dw},
                  (Layout)(i % 3), capacity, 3);
        fill_value(val(&c, "gate"), 4 * 8, 0); /* every p is 1/E, which is not above 1/E */
        case_forward(op, &c);
        case_backward(op, &c);
        for (int j = 0; j < N * 4; j++) {
            assert_true(c.plan.expert[j] == -1 && c.plan.row[j] == -1 && c.plan.weight[j] == 0);
        }
        for (int j = 0; j < N * 8; j++) {
            assert_true(host_val(&c, "y")[j] == 0 && host_grad(&c, "x")[j] == 0);
        }
        for (int j = 0; j < 2; j++) {
            const Array *w = array_named(&c, j ? "w2" : "w1");
            if (!add_dw) {
                fill_value(w->before, w->count, 0);
            }
            assert_bits(w->gradient, w->before, w->count);
        }
        assert_true(all_finite(grad(&c, "gate"), 4 * 8));
        const acc_t *load = val(&c, "load");
        assert_true(load[LOAD_DROPPED] == 0 && load[LOAD_TOKENS_DROPPED] == 1 && load[LOAD_MAIN_GRADIENT] == 0);
        assert_true(load[LOAD_PADDING] == (c.plan.layout == LAYOUT_PADDED));
        assert_true(load[LOAD_BALANCE_GRADIENT] == 0);
        case_free(&c);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_plan_invariants),
        cmocka_unit_test(test_tiles_by_hand),
        cmocka_unit_test(test_rows),
        cmocka_unit_test(test_soft_plan),
        cmocka_unit_test(test_drop_policies),
        cmocka_unit_test(test_plan_with_nan_weights),
        cmocka_unit_test(test_dispatch_then_combine),
        cmocka_unit_test(test_layouts_agree),
        cmocka_unit_test(test_idle_expert_has_no_tile),
        cmocka_unit_test(test_no_entries_at_all),
    };
    omp_set_num_threads(1); /* thousands of small calls; test_determinism.c shows that threads change no bit */
    return cmocka_run_group_tests_name("the plan and its layouts", tests, NULL, NULL);
}
