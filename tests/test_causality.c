/* Every router sees what it declares in router.h and no more: later tokens (sees_future), other texts of the batch
 * (sees_batch).
 *
 * Tokens are exchanged and outputs compared bit by bit. Whatever may not act must leave every bit alone; whatever is
 * declared to act must be caught acting, or the declaration is wrong. The same is asked of capacities, chains and
 * thresholds, in training and in evaluation. Each router prints how much the exchange moves: the share of watched
 * tokens whose experts changed in any layer, or, where nothing is chosen, whose output did.
 *
 * Read next: model/router.h; config_is_leaky() and the refusals in model/config.c.
 */
// sanitize: no (test_routers.c and test_model_grad.c run every router sanitized)
#include "command_line.h"
#include "set_options.h"
#include "threads.h"

#include "../kernels/random.h"
#include "../model/trace.h"
#include "../model/transformer.h"

enum { B = 3, T = 16, N = B * T, C = 32, V = 64, E = 4, K = 2, LAYERS = 3, CHAIN = 2, WARM_UP = 4 };

static const char BASE[] =
    "--layers 3 --dim 32 --heads 4 --kv-heads 2 --seq 16 --vocab 64 --experts 4 --top-k 2 --expert-dim 24 --batch 3 "
    "--threshold-warmup 4 --bias-rate 0.05 --allow-leak 1";

static const int last_kept[] = {0, 7, T - 2}; /* tokens after this position are exchanged */

typedef enum { TRAINING, EVALUATION, MODES } Mode;

/* What is exchanged. OWN_TOKENS watches the exchanged tokens themselves. */
typedef enum { LATER_TOKENS, OTHER_TEXTS, EARLIER_TEXTS, LATER_TEXTS, OWN_TOKENS, CAUSES } Cause;

static const char *const mode_names[] = {"training", "evaluation"};
static const char *const cause_names[] = {"later tokens", "other texts", "earlier texts", "later texts", "own tokens"};

typedef struct {
    int tokens;  /* watched, over all trials */
    int experts; /* of them, those whose experts changed in any layer */
    int outputs; /* .. those whose output changed in any bit */
} Flips;

typedef struct {
    Flips flips[MODES][CAUSES];
} Measured;

/* What a forward gives each token. */
typedef struct {
    real_t hidden[N][C];
    unsigned experts[LAYERS * CHAIN][N]; /* bit e: expert e worked on the token */
} Outcome;

typedef struct {
    Config config;
    Arena arena;
    Transformer model;
    int *tokens;
} Subject;

typedef struct {
    int first, end;
} Span;

static const Span nothing = {0, 0};

/* ---- a model to look at */

static void subject_open(Subject *s, const char *options, int batch) {
    *s = (Subject){0};
    config_defaults(&s->config);
    set_options(&s->config, BASE);
    set_options(&s->config, options);
    config_finish(&s->config);
    transformer_reserve(&s->model, &s->config, batch, 1, USE_TRAIN, NULL, &s->arena);
    arena_reserve(&s->arena, (void **)&s->tokens, s->model.N * sizeof(int), MEMORY_ACTIVATIONS);
    arena_commit(&s->arena);
    transformer_connect(&s->model);
    assert_true(s->model.moe_count <= LAYERS * CHAIN);
}

static void subject_close(Subject *s) {
    transformer_free(&s->model);
    arena_free(&s->arena);
}

static void draw_tokens(int *tokens, uint64_t seed) {
    for (int n = 0; n < N; n++) {
        tokens[n] = (int)random_below(random_key(seed, RANDOM_TEST, 0), n, V);
    }
}

/* Weights large enough that hardly a token is undecided; states as they are born. */
static void draw_weights(Subject *s, uint64_t seed) {
    const TensorList *list = &s->model.tensors;
    acc_t *host = calloc(list->total, sizeof(acc_t));
    assert_non_null(host);
    transformer_init(&s->model, host, seed, NULL);
    for (int i = 0; i < list->count; i++) {
        const Tensor *t = &list->items[i];
        uint64_t key = random_key(seed, RANDOM_TEST, i + 1);
        double gain = t->kind == TENSOR_ROUTER ? 3 : 1.5;
        for (size_t j = 0; j < t->count && t->kind != TENSOR_STATE; j++) {
            if (t->ndim >= 2) {
                host[t->offset + j] = (acc_t)(gain / sqrt(t->shape[t->ndim - 1]) * random_normal(key, j));
            } else if (t->kind == TENSOR_ROUTER) {
                host[t->offset + j] *= 8; /* the scale of a soft router's logits */
            }
        }
    }
    transformer_load(&s->model, host);
    free(host);
}

static void forward(Subject *s, const int *tokens, Mode mode) {
    transformer_set_training(&s->model, mode == TRAINING, true);
    device_from_host(s->tokens, tokens, s->model.N * sizeof(int), NULL);
    transformer_forward(&s->model, s->tokens, 0, NULL);
}

/* New weights, and states (biases, thresholds) as after some steps; the step is the first after the warm-up. */
static void prepare(Subject *s, uint64_t seed) {
    const AdamState taken = {.updates = 1, .scale = 1};
    int tokens[N];
    draw_weights(s, seed);
    for (int step = 0; step < WARM_UP; step++) {
        transformer_begin_step(&s->model, step, NULL);
        draw_tokens(tokens, random_mix(seed) + step);
        forward(s, tokens, TRAINING);
        transformer_update_routers(&s->model, &taken, NULL);
    }
    transformer_begin_step(&s->model, WARM_UP, NULL);
}

static void observe(Outcome *outcome, Subject *s, const int *tokens, Mode mode) {
    *outcome = (Outcome){0};
    forward(s, tokens, mode);
    host_from_device(outcome->hidden, s->model.hidden, (size_t)s->model.N * C * sizeof(real_t), NULL);
    for (int i = 0; i < s->model.moe_count; i++) {
        const Plan *plan = &s->model.moes[i]->plan;
        for (int entry = 0; plan->slots == 0 && entry < plan->N * plan->K; entry++) {
            if (plan->row[entry] >= 0) {
                outcome->experts[i][entry / plan->K] |= 1u << plan->expert[entry];
            }
        }
    }
}

/* Outputs are numbers, and the router has opinions: a token's largest share of experts is far from 1/E on average (but
 * for controls whose tokens read all slots alike). */
static void assert_decided(const Subject *s, const Outcome *outcome) {
    for (int n = 0; n < s->model.N; n++) {
        for (int c = 0; c < C; c++) {
            assert_true(isfinite((double)outcome->hidden[n][c]));
        }
    }
    for (int i = 0; i < s->model.moe_count; i++) {
        const acc_t *probs = s->model.moes[i]->pass.probs;
        double sum = 0;
        for (int n = 0; n < s->model.N; n++) {
            double most = 0;
            for (int e = 0; e < E; e++) {
                most = fmax(most, (double)probs[n * E + e]);
            }
            sum += most / s->model.N;
        }
        const char *router = s->config.model.router;
        bool alike = strcmp(router, "soft-uniform") == 0 || strcmp(router, "uniform-uniform") == 0;
        if (!alike && !(sum > 1.4 / E)) {
            fail_msg("--router %s, router %d: the largest share is %.3f on average, too near 1/%d to tell anything",
                     s->config.model.router, i, sum, E);
        }
    }
}

/* ---- trials */

static void count_flips(Flips *flips, const Outcome *a, const Outcome *b, Span watched) {
    for (int n = watched.first; n < watched.end; n++) {
        bool other_experts = false;
        for (int i = 0; i < LAYERS * CHAIN; i++) {
            other_experts |= a->experts[i][n] != b->experts[i][n];
        }
        flips->tokens++;
        flips->experts += other_experts;
        flips->outputs += memcmp(a->hidden[n], b->hidden[n], sizeof a->hidden[n]) != 0;
    }
}

/* Every token of the span becomes another one. */
static void exchange(int *tokens, Span span, uint64_t key) {
    for (int n = span.first; n < span.end; n++) {
        tokens[n] = (tokens[n] + 1 + (int)random_below(key, n, V - 1)) % V;
    }
}

static void try_exchange(Flips *flips, Subject *s, Mode mode, const int *tokens, const Outcome *before, Cause cause,
                         Span changed, Span changed_too, Span watched) {
    int other[N];
    Outcome after;
    if (changed.first == changed.end && changed_too.first == changed_too.end) {
        return; /* the first text has none before it */
    }
    memcpy(other, tokens, sizeof other);
    uint64_t key = random_key(watched.end, RANDOM_TEST, cause);
    exchange(other, changed, key);
    exchange(other, changed_too, key);
    observe(&after, s, other, mode);
    count_flips(&flips[cause], before, &after, watched);
    count_flips(&flips[OWN_TOKENS], before, &after, changed);
    count_flips(&flips[OWN_TOKENS], before, &after, changed_too);
}

static void measure_mode(Flips *flips, Subject *s, Mode mode, uint64_t seed) {
    int tokens[N];
    Outcome before;
    draw_tokens(tokens, seed);
    observe(&before, s, tokens, mode);
    assert_decided(s, &before);
    for (int b = 0; b < B; b++) {
        Span text = {b * T, (b + 1) * T}, earlier = {0, text.first}, later = {text.end, N};
        for (size_t i = 0; i < sizeof last_kept / sizeof *last_kept; i++) {
            Span kept = {text.first, text.first + last_kept[i] + 1}, rest = {kept.end, text.end};
            try_exchange(flips, s, mode, tokens, &before, LATER_TOKENS, rest, nothing, kept);
        }
        try_exchange(flips, s, mode, tokens, &before, OTHER_TEXTS, earlier, later, text);
        try_exchange(flips, s, mode, tokens, &before, EARLIER_TEXTS, earlier, nothing, text);
        try_exchange(flips, s, mode, tokens, &before, LATER_TEXTS, later, nothing, text);
    }
}

/* All trials with a model of these options. */
static Measured measure(const char *options) {
    Measured m = {0};
    Subject s;
    subject_open(&s, options, B);
    uint64_t seeds = getenv("MOELAB_FAST_TESTS") ? 1 : 3;
    for (uint64_t seed = 1; seed <= seeds; seed++) {
        prepare(&s, seed);
        measure_mode(m.flips[TRAINING], &s, TRAINING, seed);
        measure_mode(m.flips[EVALUATION], &s, EVALUATION, seed);
    }
    subject_close(&s);
    for (int mode = 0; mode < MODES; mode++) { /* else equal outputs would mean nothing */
        assert_int_equal(m.flips[mode][OWN_TOKENS].outputs, m.flips[mode][OWN_TOKENS].tokens);
    }
    return m;
}

/* Expected: in one mode at least the cause acts on some output. Not expected: in both modes on nothing. */
static void assert_acts(bool expected, const char *options, const Measured *m, Cause cause) {
    int outputs = 0;
    for (int mode = 0; mode < MODES; mode++) {
        const Flips *f = &m->flips[mode][cause];
        if (f->tokens == 0 || (!expected && f->experts + f->outputs > 0)) {
            fail_msg("%s, %s: of %d tokens %d change their experts and %d their output with %s, where none may",
                     options, mode_names[mode], f->tokens, f->experts, f->outputs, cause_names[cause]);
        }
        outputs += f->outputs;
    }
    if (expected && outputs == 0) {
        fail_msg("%s: no output changes with %s, where some should", options, cause_names[cause]);
    }
}

static double percent(const Flips *f, bool experts) {
    return 100.0 * (experts ? f->experts : f->outputs) / f->tokens;
}

static void print_rates(const char *name, const Measured *m, Cause cause, Cause cause_too, bool experts) {
    const Flips *t = m->flips[TRAINING], *e = m->flips[EVALUATION];
    print_message("# %-28s%s flip %5.1f%% of the %s (evaluation %5.1f%%), %s %5.1f%% (%5.1f%%)\n", name,
                  cause_names[cause], percent(&t[cause], experts), experts ? "choices" : "outputs",
                  percent(&e[cause], experts), cause_names[cause_too], percent(&t[cause_too], experts),
                  percent(&e[cause_too], experts));
}

static bool is_sparse(const Router *router) {
    return router->plan == PLAN_TOKENS_CHOOSE || router->plan == PLAN_EXPERTS_CHOOSE;
}

static void check_declaration(const Router *router, const char *more, const char *label) {
    char options[512];
    snprintf(options, sizeof options, "--router %s%s", router->name, more);
    Measured m = measure(options);
    print_rates(label, &m, LATER_TOKENS, OTHER_TEXTS, is_sparse(router));
    assert_acts(router->sees_future, options, &m, LATER_TOKENS);
    assert_acts(router->sees_batch, options, &m, OTHER_TEXTS);
}

/* A refusal would end this program, with the line that says why. */
static void assert_accepted(const char *command) {
    char copy[512];
    snprintf(copy, sizeof copy, "%s", command);
    parse_and_finish(copy);
}

/* A leaky configuration is refused with these words, but for --allow-leak or masked prediction. */
static void check_permission(const char *options, bool leaky, const char *words) {
    static const char *const ways_out[] = {"--allow-leak 1", "--objective mlm"};
    char command[256];
    Config config;
    config_defaults(&config);
    set_options(&config, options);
    assert_int_equal(config_is_leaky(&config.model), leaky);
    set_options(&config, "--objective mlm");
    assert_false(config_is_leaky(&config.model));
    if (leaky) {
        assert_command_refused(options, words);
    } else {
        assert_accepted(options);
    }
    for (int i = 0; i < 2; i++) {
        snprintf(command, sizeof command, "%s %s", options, ways_out[i]);
        assert_accepted(command);
    }
}

static bool takes_capacity(const Router *router) {
    char command[128];
    Forked result;
    snprintf(command, sizeof command, "--router %s --capacity-factor 0.5 --allow-leak", router->name);
    run_forked(&result, parse_and_finish, command);
    return result.exit_code == 0;
}

/* ---- tests */

static void test_routers_see_what_they_declare(void **state) {
    for (int i = 0; router_at(i); i++) {
        check_declaration(router_at(i), "", router_at(i)->name);
    }
}

/* A trace of arbitrary choices, for the steps that `measure` takes. */
static void write_trace(const char *path) {
    Trace trace;
    int expert[N * K];
    trace_create(&trace, path, (TraceShape){.N = N, .K = K, .E = E, .routers = LAYERS, .slices = 1});
    for (int record = 0; record < (WARM_UP + 1) * LAYERS; record++) {
        for (int n = 0; n < N; n++) {
            int first = (int)random_below(random_key(1, RANDOM_TEST, record), n, E);
            expert[n * K] = first;
            expert[n * K + 1] = (first + 1 + n % (E - 1)) % E;
        }
        trace_append(&trace, expert);
    }
    trace_close(&trace);
}

static void test_forced_choices(void **state) {
    const Router *forced = router_find("forced");
    check_declaration(forced, " --force zipf:1.2", "forced, zipf:1.2");
    check_declaration(forced, " --force one", "forced, one");
    char folder[] = "/tmp/moelab_causality_XXXXXX", path[64], options[128];
    assert_non_null(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/routing", folder);
    snprintf(options, sizeof options, " --force %s", path);
    write_trace(path);
    check_declaration(forced, options, "forced, a trace");
    unlink(path);
    rmdir(folder);
}

/* A chain sees what its router sees. */
static void test_chains(void **state) {
    static const char *const chains[] = {" --chain-steps 2", " --chain-steps 2 --chain-norm 1"};
    for (int i = 0; router_at(i); i++) {
        for (size_t j = 0; j < sizeof chains / sizeof *chains; j++) {
            const Router *router = router_at(i);
            char command[256], label[64];
            snprintf(command, sizeof command, "--allow-leak --router %s%s", router->name, chains[j]);
            if (is_sparse(router)) {
                assert_accepted(command);
                snprintf(label, sizeof label, "%s, chain%s", router->name, j ? ", norms" : "");
                check_declaration(router, chains[j], label);
            } else {
                assert_command_refused(command, "a chain is made of sparse layers");
            }
        }
    }
}

/* During the warm-up `threshold` trains as expert choice does, which its declaration leaves out; evaluation goes by the
 * thresholds at any step. */
static void test_threshold_during_warm_up(void **state) {
    static const int steps[] = {0, WARM_UP - 1, WARM_UP, 100};
    Measured m;
    Subject s;
    char name[64];
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        m = (Measured){0};
        subject_open(&s, "--router threshold", B);
        prepare(&s, 1);
        transformer_set_step(&s.model, steps[i], NULL);
        measure_mode(m.flips[TRAINING], &s, TRAINING, 1);
        measure_mode(m.flips[EVALUATION], &s, EVALUATION, 1);
        subject_close(&s);
        snprintf(name, sizeof name, "threshold, step %d of %d", steps[i], WARM_UP);
        print_rates(name, &m, LATER_TOKENS, OTHER_TEXTS, true);
        if (steps[i] < WARM_UP) {
            assert_true(m.flips[TRAINING][LATER_TOKENS].outputs > 0);
            assert_true(m.flips[TRAINING][OTHER_TEXTS].outputs > 0);
            memcpy(m.flips[TRAINING], m.flips[EVALUATION], sizeof m.flips[EVALUATION]); /* leaves evaluation to check */
        }
        assert_acts(false, name, &m, LATER_TOKENS);
        assert_acts(false, name, &m, OTHER_TEXTS);
    }
}

/* A full expert takes earlier tokens first (token): then what comes later in the batch never acts. Given by choice
 * (slot) or by weight, places couple a token to later ones, wherever there is a second choice, or a weight, that the
 * later token can better. config_is_leaky() does not go into that and says so of all. */
static void test_capacity(void **state) {
    static const char *const drops[] = {"token", "slot", "weight"};
    int routers = 0;
    for (int i = 0; router_at(i); i++) {
        const Router *router = router_at(i);
        char options[128], label[64], words[64];
        snprintf(options, sizeof options, "--router %s", router->name);
        if (!takes_capacity(router)) {
            continue;
        }
        Measured unlimited = measure(options);
        bool by_content = unlimited.flips[EVALUATION][OWN_TOKENS].experts > 0;
        bool second_choice = router->plan == PLAN_TOKENS_CHOOSE && router->fixed_top_k != 1;
        bool couples[] = {false, by_content && second_choice, router->learned};
        for (int d = DROP_TOKEN; d <= DROP_WEIGHT; d++) {
            snprintf(options, sizeof options, "--router %s --capacity-factor 0.5 --drop %s", router->name, drops[d]);
            Measured m = measure(options);
            snprintf(label, sizeof label, "%s, %s", router->name, drops[d]);
            print_rates(label, &m, LATER_TOKENS, EARLIER_TEXTS, true);
            assert_acts(couples[d], options, &m, LATER_TOKENS);
            assert_acts(couples[d], options, &m, LATER_TEXTS);
            assert_acts(by_content || couples[d], options, &m, EARLIER_TEXTS);

            snprintf(words, sizeof words, "--drop %s lets a later token", drops[d]);
            check_permission(options, d != DROP_TOKEN, words);
        }
        routers++;
    }
    assert_true(routers > 0);
}

/* Attention itself looks both ways there, so every output changes with later tokens. */
static void test_masked_prediction_sees_both_sides(void **state) {
    for (int i = 0; router_at(i); i++) {
        char options[128];
        snprintf(options, sizeof options, "--router %s --objective mlm", router_at(i)->name);
        Measured m = measure(options);
        for (int mode = 0; mode < MODES; mode++) {
            assert_true(m.flips[mode][LATER_TOKENS].tokens > 0);
            assert_int_equal(m.flips[mode][LATER_TOKENS].outputs, m.flips[mode][LATER_TOKENS].tokens);
        }
        assert_acts(router_at(i)->sees_batch, options, &m, OTHER_TEXTS);
    }
}

static void test_leaks_need_permission(void **state) {
    for (int i = 0; router_at(i); i++) {
        char options[64], words[64];
        snprintf(options, sizeof options, "--router %s", router_at(i)->name);
        snprintf(words, sizeof words, "--router %s looks at later tokens", router_at(i)->name);
        check_permission(options, router_at(i)->sees_future, words);
    }
}

/* The same bits for a text alone and in a batch, with every router that does not declare sees_batch. The first text of
 * a batch always; the others in evaluation, which draws nothing, unless places in the batch decide (forced). */
static void test_texts_alone_and_in_company(void **state) {
    for (int i = 0; router_at(i); i++) {
        const Router *router = router_at(i);
        char options[128];
        Subject company, alone;
        Outcome all, one;
        int tokens[N], differences = 0;
        snprintf(options, sizeof options, "--router %s", router->name);
        subject_open(&company, options, B);
        subject_open(&alone, options, 1);
        prepare(&company, 1);
        transformer_load(&alone.model, company.model.master);
        transformer_set_step(&alone.model, WARM_UP, NULL);
        draw_tokens(tokens, 1);
        for (Mode mode = TRAINING; mode < MODES; mode++) {
            observe(&all, &company, tokens, mode);
            bool by_place = router == router_find("forced") || (mode == TRAINING && router != router_find("topk"));
            for (int b = 0; b < (by_place ? 1 : B); b++) {
                observe(&one, &alone, tokens + b * T, mode);
                differences += memcmp(all.hidden[b * T], one.hidden, T * sizeof all.hidden[0]) != 0;
            }
        }
        subject_close(&alone);
        subject_close(&company);
        if ((differences > 0) != router->sees_batch) {
            fail_msg("%s: %d texts differ alone and in company", options, differences);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_routers_see_what_they_declare),
        cmocka_unit_test(test_forced_choices),
        cmocka_unit_test(test_chains),
        cmocka_unit_test(test_threshold_during_warm_up),
        cmocka_unit_test(test_capacity),
        cmocka_unit_test(test_masked_prediction_sees_both_sides),
        cmocka_unit_test(test_leaks_need_permission),
        cmocka_unit_test(test_texts_alone_and_in_company),
    };
    omp_set_num_threads(1);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
