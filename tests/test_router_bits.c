/* Every router gives the same bits in every layout of the rows, for every number of threads, and every time.
 *
 * The same of single operations is in test_determinism.c. Read next: router_runs.h, kernels/plan.h.
 */
#include "router_runs.h"

#include "../model/router.h"

/* Layouts differ in where rows lie, and in no bit of what is computed from them. */
static void test_layouts_give_the_same_bits(void **state) {
    static const char *const routers[] = {"topk", "sigmoid", "threshold --threshold-warmup 2",
                                          "topk --shared-experts 1 --chain-steps 2 --grad-accum 2"};
    static const char *const layouts[] = {"compact", "padded", "block"};
    for (size_t i = 0; i < sizeof routers / sizeof *routers; i++) {
        Trainer runs[3];
        for (int l = 0; l < 3; l++) {
            open_run(&runs[l], "--batch 6 --router %s --layout %s", routers[i], layouts[l]);
        }
        while (runs[0].step < 5) {
            for (int l = 0; l < 3; l++) {
                train_step(&runs[l]);
                assert_same_run(&runs[l], &runs[0], routers[i]);
                assert_int_equal(runs[l].model.load[LOAD_PADDING] > 0, l > 0);
            }
        }
        for (int l = 0; l < 3; l++) {
            trainer_close(&runs[l]);
        }
    }
}

/* What a forward and backward leave behind: gradients, hidden states, losses and statistics, choices. */
typedef struct {
    acc_t *gradient, *load;
    real_t *hidden;
    int *demand;
} Bits;

static Bits bits_of(Trainer *t) {
    size_t places = (size_t)t->model.slices * t->model.moe_count;
    device_zero(t->model.grads, flat_bytes(t), NULL);
    slice_gradient(t, 0);
    Bits bits = {.gradient = copy_flat(t, t->model.grads),
                 .hidden = copy_hidden(t),
                 .load = malloc(places * LOAD_VALUES * sizeof(acc_t) + 1),
                 .demand = malloc(places * t->config.model.experts * sizeof(int) + 1)};
    assert_true(bits.load && bits.demand);
    memcpy(bits.load, t->model.load, places * LOAD_VALUES * sizeof(acc_t));
    memcpy(bits.demand, t->model.demand, places * t->config.model.experts * sizeof(int));
    return bits;
}

static void free_bits(Bits bits) {
    free(bits.gradient);
    free(bits.load);
    free(bits.hidden);
    free(bits.demand);
}

static bool same_bits(const Trainer *t, Bits a, Bits b) {
    size_t places = (size_t)t->model.slices * t->model.moe_count;
    return !memcmp(a.gradient, b.gradient, flat_bytes(t)) && same_hidden(t, a.hidden) &&
           !memcmp(a.load, b.load, places * LOAD_VALUES * sizeof(acc_t)) &&
           !memcmp(a.demand, b.demand, places * t->config.model.experts * sizeof(int));
}

/* Ten times forward and backward, with one thread and with two; targets are random, so that the gradient that comes
 * from above has no pattern. all_to_one: a feature that all tokens share sends them to expert 0. */
static void check_repeats(const char *router, bool all_to_one) {
    const int repeats = getenv("MOELAB_FAST_TESTS") ? 3 : 10;
    Trainer t;
    open_run(&t, "--allow-leak 1 --shared-experts 1 --router %s", router);
    const int V = t.config.model.vocab, C = t.config.model.dim, N = t.model.N;
    train_to(&t, 2); /* away from gates that are zero, into a step of its own */
    read_slice(&t, SPLIT_TRAIN, t.step, 0);
    for (int n = 0; n < N; n++) {
        t.targets[n] = (int)random_below(random_key(3, RANDOM_TEST, 0), n, V);
    }
    if (all_to_one) {
        for (int v = 0; v < V; v++) {
            t.model.master[t.model.tensors.items[0].offset + (size_t)v * C] = 10;
        }
        for (int i = 0; i < t.model.moe_count; i++) {
            *router_tensor(&t, i, "w", NULL) = 10;
        }
    }
    omp_set_num_threads(1);
    Bits first = bits_of(&t);
    for (int i = 0; i < t.model.moe_count && (all_to_one || strstr(router, "--force one")); i++) {
        assert_int_equal(first.demand[i * t.config.model.experts], N);
    }
    for (int repeat = 1; repeat < repeats; repeat++) {
        omp_set_num_threads(1 + repeat % 2);
        Bits again = bits_of(&t);
        if (!same_bits(&t, first, again)) {
            fail_msg("%s: repeat %d, with %d threads, differs from the first, with 1", router, repeat, 1 + repeat % 2);
        }
        free_bits(again);
    }
    omp_set_num_threads(1);
    free_bits(first);
    trainer_close(&t);
}

static void test_repeats_give_the_same_bits(void **state) {
    static const char *const all_to_one[] = {"top1",
                                             "topk",
                                             "noisy",
                                             "sigmoid",
                                             "topk --layout block",
                                             "topk --chain-steps 2",
                                             "topk --capacity-factor 0.6 --drop weight"};
    for (int i = 0; router_at(i); i++) {
        check_repeats(router_at(i)->name, false);
    }
    check_repeats("forced --force one", false);
    check_repeats("forced --force one --top-k 1", false);
    check_repeats("forced --force zipf:1.2", false);
    for (size_t i = 0; i < sizeof all_to_one / sizeof *all_to_one; i++) {
        check_repeats(all_to_one[i], true);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_layouts_give_the_same_bits),
        cmocka_unit_test(test_repeats_give_the_same_bits),
    };
    omp_set_num_threads(1);
    return cmocka_run_group_tests_name("router bits", tests, NULL, NULL);
}
