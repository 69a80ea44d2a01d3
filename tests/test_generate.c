/* Generation: the cache of keys and values gives the same bits as reading the whole text again, and the draw is the one
 * that its options describe.
 *
 * Each text is checked against an oracle without a cache: the training model's forward over the whole context.
 * Read next: model/generate.c.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "set_options.h"
#include "threads.h"

#include "../kernels/check.h"
#include "../kernels/random.h"
#include "../model/config.h"
#include "../model/generate.h"
#include "../model/transformer.h"

static const char BASE[] =
    "--layers 2 --dim 24 --heads 4 --kv-heads 2 --seq 19 --vocab 37 --experts 5 --top-k 2 --expert-dim 12 --batch 1";

/* Sizes around the kernels' tiles and blocks, every router, every kind of head. */
static const char *const variants[] = {
    "",
    "--router top1",
    "--router dense",
    "--renorm 0 --top-k 5",
    "--shared-experts 2",
    "--router top1 --shared-experts 1 --tie 1",
    "--capacity-factor 0.5 --drop slot --allow-leak 1",
    "--layout padded --capacity-factor 1",
    "--kv-heads 1",
    "--kv-heads 4 --qk-norm 0",
    "--act gelu --moe-every 2",
    "--perft r --perft-rank 3 --perft-act silu --moe-every 2",
    "--perft e --perft-rank 3 --lora attention",
    "--dim 6 --heads 3 --kv-heads 1 --expert-dim 1 --experts 1 --top-k 1 --seq 5 --vocab 2",
    "--dim 2 --heads 1 --kv-heads 1 --seq 2",
    "--dim 62 --heads 1 --kv-heads 1 --expert-dim 33 --vocab 129 --seq 33",
    "--dim 66 --heads 3 --kv-heads 3 --seq 67 --layers 1",
    "--dim 64 --heads 2 --kv-heads 1 --seq 140 --layers 1",
};

enum { VARIANTS = sizeof variants / sizeof *variants };

typedef struct {
    Config config;
    Arena arena;
    Transformer model; /* reads a whole context of T tokens: the oracle, and the source of the generator's weights */
    Generator generator;
    int *tokens, *targets; /* (T) */
} Subject;

/* A model with weights large enough that the next token depends on all before it. */
static void subject_open(Subject *s, const char *options) {
    *s = (Subject){0};
    config_defaults(&s->config);
    set_options(&s->config, BASE);
    set_options(&s->config, options);
    config_finish(&s->config);
    size_t bytes = (size_t)s->config.model.seq * sizeof(int);
    transformer_reserve(&s->model, &s->config, 1, 1, USE_TRAIN, NULL, &s->arena);
    arena_reserve(&s->arena, (void **)&s->tokens, bytes, MEMORY_ACTIVATIONS);
    arena_reserve(&s->arena, (void **)&s->targets, bytes, MEMORY_ACTIVATIONS);
    arena_commit(&s->arena);
    transformer_connect(&s->model);
    transformer_set_training(&s->model, false, false);
    for (int i = 0; i < s->model.tensors.count; i++) {
        const Tensor *t = &s->model.tensors.items[i];
        uint64_t key = random_key(5, RANDOM_TEST, (uint64_t)i);
        for (size_t j = 0; j < t->count; j++) {
            double mean = t->ndim == 1 ? 1 : 0, deviation = 0.3;
            s->model.master[t->offset + j] = (acc_t)(mean + deviation * random_normal(key, j));
        }
    }
    for (int i = 0; i < s->config.model.seq; i++) {
        s->tokens[i] = (int)random_below(random_key(6, RANDOM_TEST, 0), (uint64_t)i, (uint64_t)s->config.model.vocab);
    }
    generator_open(&s->generator, &s->config, &s->model);
}

static void subject_close(Subject *s) {
    generator_close(&s->generator);
    transformer_free(&s->model);
    arena_free(&s->arena);
}

/* Logits (T,V) of the whole context. */
static const real_t *whole_logits(Subject *s, const int *tokens) {
    transformer_forward(&s->model, tokens, 0, NULL);
    transformer_loss(&s->model, s->targets, 0, false, NULL);
    assert_int_equal(s->model.head_rows, s->model.N);
    return s->model.logits;
}

static int largest(const real_t *logits, int V) {
    int best = 0;
    for (int v = 1; v < V; v++) {
        best = logits[v] > logits[best] ? v : best;
    }
    return best;
}

/* ---- the cache */

static void test_decode_equals_forward(void **state) {
    for (int i = 0; i < VARIANTS; i++) {
        Subject s;
        subject_open(&s, variants[i]);
        size_t V = (size_t)s.config.model.vocab;
        const real_t *whole = whole_logits(&s, s.tokens);
        for (int again = 0; again < 2; again++) { /* what an earlier text left in the cache is not seen */
            for (int t = 0; t < s.config.model.seq; t++) {
                transformer_decode(&s.generator.model, &s.tokens[t], t, NULL);
                if (memcmp(s.generator.model.logits, whole + (size_t)t * V, V * sizeof(real_t)) != 0) {
                    fail_msg("'%s': logits at position %d differ", variants[i], t);
                }
            }
        }
        subject_close(&s);
    }
}

/* What generate does, without a cache: a whole forward for every token. */
static void generate_slowly(Subject *s, int *out, int length, const int *prompt, int count, SampleOptions options) {
    int T = s->config.model.seq, V = s->config.model.vocab, held = count <= T ? count : T / 2;
    int *context = calloc((size_t)T, sizeof(int));
    acc_t *work = malloc(2 * (size_t)V * sizeof(acc_t));
    assert_true(context && work);
    memcpy(context, prompt + count - held, (size_t)held * sizeof(int));
    for (int i = 0; i < length; i++) {
        const real_t *logits = whole_logits(s, context) + (size_t)(held - 1) * (size_t)V;
        double uniform = random_uniform(random_key(options.seed, RANDOM_SAMPLE, 0), (uint64_t)i);
        out[i] = options.temperature > 0 ? sample_token(logits, V, options, uniform, work) : largest(logits, V);
        if (held == T) {
            memmove(context, context + T - T / 2, (size_t)(T / 2) * sizeof(int));
            held = T / 2;
        }
        context[held++] = out[i];
    }
    free(context);
    free(work);
}

/* Greedy and drawn, from prompts of one token, of some, of a full context and of more, to far past the context. */
static void test_generation_equals_whole_forwards(void **state) {
    static const SampleOptions greedy = {.temperature = 0, .top_p = 1}, drawn = {.temperature = 1, .top_p = 1};
    for (int i = 0; i < VARIANTS; i++) {
        Subject s;
        subject_open(&s, variants[i]);
        int T = s.config.model.seq, length = T > 40 ? T + 9 : 3 * T + 1, V = s.config.model.vocab;
        int counts[] = {1, T / 2 + 1, T, 2 * T + 1};
        int *prompt = malloc((size_t)(2 * T + 1) * sizeof(int)), *out = malloc((size_t)length * sizeof(int)),
            *expected = malloc((size_t)length * sizeof(int));
        assert_true(prompt && out && expected);
        for (int k = 0; k < 2 * T + 1; k++) {
            prompt[k] = (int)random_below(random_key(8, RANDOM_TEST, 0), (uint64_t)k, (uint64_t)V);
        }
        for (int k = 0; k < 8; k++) {
            SampleOptions options = k % 2 ? drawn : greedy;
            options.seed = (uint64_t)k;
            int count = counts[k / 2];
            generate_slowly(&s, expected, length, prompt, count, options);
            assert_int_equal(generate(&s.generator, out, length, prompt, count, options, NULL, NULL), length);
            if (memcmp(out, expected, (size_t)length * sizeof(int)) != 0) {
                fail_msg("'%s': another text after %d tokens, temperature %g", variants[i], count, options.temperature);
            }
        }
        free(prompt);
        free(out);
        free(expected);
        subject_close(&s);
    }
}

static bool stop_after_five(int token, void *user) {
    int *seen = user;
    seen[++seen[0]] = token;
    return seen[0] < 5;
}

static void test_seed_decides_the_text(void **state) {
    enum { LENGTH = 60 };
    Subject s;
    subject_open(&s, "");
    int first[LENGTH], again[LENGTH], other[LENGTH], some[LENGTH] = {0}, seen[8] = {0};
    SampleOptions options = {.temperature = 0.9, .top_p = 0.95, .top_k = 20, .seed = 3};
    assert_int_equal(generate(&s.generator, first, LENGTH, s.tokens, 2, options, NULL, NULL), LENGTH);
    assert_int_equal(generate(&s.generator, again, LENGTH, s.tokens, 2, options, NULL, NULL), LENGTH);
    assert_memory_equal(first, again, sizeof first);
    assert_int_equal(generate(&s.generator, some, LENGTH, s.tokens, 2, options, stop_after_five, seen), 5);
    assert_int_equal(seen[0], 5);
    assert_memory_equal(seen + 1, first, 5 * sizeof(int));
    assert_memory_equal(some, first, 5 * sizeof(int));
    assert_int_equal(some[5], 0);
    options.seed = 4;
    assert_int_equal(generate(&s.generator, other, LENGTH, s.tokens, 2, options, NULL, NULL), LENGTH);
    assert_memory_not_equal(first, other, sizeof first);
    assert_int_equal(generate(&s.generator, other, 0, s.tokens, 2, options, NULL, NULL), 0);
    for (int i = 0; i < LENGTH; i++) {
        assert_true(first[i] >= 0 && first[i] < s.config.model.vocab);
    }
    subject_close(&s);
}

/* Sequences side by side get the texts that each gets alone, prompts read at once or token by token, of one token, of
 * some and of more than a context, to where the context is read again. */
static void check_batch(const char *options) {
    enum { B = 3, LENGTH = 24 };
    Subject s;
    subject_open(&s, options);
    int T = s.config.model.seq, V = s.config.model.vocab, counts[] = {1, T / 2 + 1, T + 2};
    int *prompts = malloc(B * (size_t)(T + 2) * sizeof(int));
    assert_true(prompts);
    for (int k = 0; k < 6; k++) {
        int count = counts[k / 2], out[B * LENGTH], alone[LENGTH], once = k % 2 ? count < T ? count : T / 2 : 0;
        SampleOptions drawn = {.temperature = 1, .top_p = 0.95, .seed = (uint64_t)k};
        for (int i = 0; i < B * count; i++) {
            prompts[i] = (int)random_below(random_key(9, RANDOM_TEST, k), (uint64_t)i, (uint64_t)V);
        }
        Generator batch;
        generator_open_batch(&batch, &s.config, &s.model, B, once);
        assert_int_equal(generator_reads_at_once(&batch, once), once > 0);
        assert_int_equal(generate_batch(&batch, out, LENGTH, prompts, count, drawn, NULL, NULL), LENGTH);
        for (int b = 0; b < B; b++) {
            drawn.seed = (uint64_t)(k + b);
            assert_int_equal(generate(&s.generator, alone, LENGTH, prompts + b * count, count, drawn, NULL, NULL),
                             LENGTH);
            if (memcmp(alone, out + b * LENGTH, sizeof alone) != 0) {
                fail_msg("'%s': sequence %d has another text after %d tokens, %d at once", options, b, count, once);
            }
        }
        generator_close(&batch);
    }
    free(prompts);
    subject_close(&s);
}

static void test_batch_equals_single(void **state) {
    static const char *const more[] = {"--router hash", "--router sigmoid", "--router coe", "--router noisy",
                                       "--router threshold --allow-leak 1"};
    int step = getenv("MOELAB_FAST_TESTS") ? 5 : 2;
    for (int i = 0; i < VARIANTS; i += step) {
        check_batch(variants[i]);
    }
    for (size_t i = 0; i < sizeof more / sizeof *more; i += step - 1) {
        check_batch(more[i]);
    }
}

/* A router that sees later tokens would make another text of a prompt that is read at once. */
static void test_prompts_of_routers_that_see_the_future(void **state) {
    Subject s;
    Generator batch;
    subject_open(&s, "--router soft --allow-leak 1");
    generator_open_batch(&batch, &s.config, &s.model, 2, 5);
    assert_false(generator_reads_at_once(&batch, 5));
    int prompts[10] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, out[2 * 7], alone[7];
    SampleOptions greedy = {.temperature = 0, .top_p = 1};
    assert_int_equal(generate_batch(&batch, out, 7, prompts, 5, greedy, NULL, NULL), 7);
    for (int b = 0; b < 2; b++) {
        assert_int_equal(generate(&s.generator, alone, 7, prompts + 5 * b, 5, greedy, NULL, NULL), 7);
        assert_memory_equal(alone, out + 7 * b, sizeof alone);
    }
    generator_close(&batch);
    subject_close(&s);
}

/* The generator reads the weights of its source, also after they change. */
static void test_weights_are_shared(void **state) {
    Subject s;
    subject_open(&s, "");
    transformer_decode(&s.generator.model, s.tokens, 0, NULL);
    real_t before[37];
    memcpy(before, s.generator.model.logits, sizeof before);
    for (size_t i = 0; i < s.model.tensors.total; i++) {
        s.model.master[i] *= (acc_t)0.5;
    }
    transformer_decode(&s.generator.model, s.tokens, 0, NULL);
    assert_memory_not_equal(before, s.generator.model.logits, sizeof before);
    assert_memory_equal(whole_logits(&s, s.tokens), s.generator.model.logits, sizeof before);
    subject_close(&s);
}

/* ---- the draw */

enum { V = 12 };

static const SampleOptions everything = {.temperature = 1, .top_p = 1};

/* Logits of given probabilities. */
static void logits_of(real_t *logits, const double *probs) {
    for (int v = 0; v < V; v++) {
        logits[v] = (real_t)log(probs[v]) + 3;
    }
}

/* How often each token is drawn in `draws` draws with options. */
static void count_draws(int *counts, int draws, const real_t *logits, SampleOptions options) {
    acc_t work[2 * V];
    memset(counts, 0, V * sizeof *counts);
    for (int i = 0; i < draws; i++) {
        double uniform = random_uniform(random_key(11, RANDOM_TEST, 0), (uint64_t)i);
        int token = sample_token(logits, V, options, uniform, work);
        assert_in_range(token, 0, V - 1);
        counts[token]++;
    }
}

/* Counts of `draws` draws against probabilities that need not sum to 1, within 4 standard deviations. */
static void assert_frequencies(const real_t *logits, SampleOptions options, const double *probs) {
    enum { DRAWS = 100000 };
    int counts[V];
    double sum = 0;
    count_draws(counts, DRAWS, logits, options);
    for (int v = 0; v < V; v++) {
        sum += probs[v];
    }
    for (int v = 0; v < V; v++) {
        double p = probs[v] / sum, deviation = sqrt(DRAWS * p * (1 - p));
        if (!(fabs(counts[v] - DRAWS * p) <= 4 * deviation)) { /* exactly 0 where p is */
            fail_msg("token %d drawn %d times, expected %.1f +- %.1f", v, counts[v], DRAWS * p, deviation);
        }
    }
}

/* 12 different probabilities; the largest is token 7, then 2, then 10. */
static const double PROBS[V] = {.02, .05, .17, .03, .06, .08, .01, .3, .04, .07, .15, .02};

static void test_frequencies(void **state) {
    real_t logits[V];
    double hot[V], cold[V];
    logits_of(logits, PROBS);
    for (int v = 0; v < V; v++) {
        hot[v] = sqrt(PROBS[v]);
        cold[v] = PROBS[v] * PROBS[v];
    }
    assert_frequencies(logits, everything, PROBS);
    assert_frequencies(logits, (SampleOptions){.temperature = 2, .top_p = 1}, hot);
    assert_frequencies(logits, (SampleOptions){.temperature = 0.5, .top_p = 1}, cold);
    assert_frequencies(logits, (SampleOptions){.temperature = 1, .top_p = 1, .top_k = V}, PROBS);
    assert_frequencies(logits, (SampleOptions){.temperature = 1, .top_p = 1, .top_k = 100}, PROBS);
}

static void test_argmax(void **state) {
    static const SampleOptions options[] = {
        {.temperature = 0, .top_p = 1}, {.temperature = 1, .top_p = 1, .top_k = 1},   {.temperature = 1, .top_p = 1e-6},
        {.temperature = 1, .top_p = 0}, {.temperature = 5, .top_p = 0.9, .top_k = 1}, {.temperature = 1e-4, .top_p = 1},
    };
    real_t logits[V];
    int counts[V];
    logits_of(logits, PROBS);
    for (size_t i = 0; i < sizeof options / sizeof *options; i++) {
        count_draws(counts, 1000, logits, options[i]);
        assert_int_equal(counts[7], 1000);
    }
    for (int v = 0; v < V; v++) { /* equal logits: greedy takes the lowest token */
        logits[v] = 1;
    }
    count_draws(counts, 10, logits, options[0]);
    assert_int_equal(counts[0], 10);
}

static void test_top_k(void **state) {
    real_t logits[V];
    double kept[V] = {0};
    logits_of(logits, PROBS);
    kept[7] = PROBS[7], kept[2] = PROBS[2], kept[10] = PROBS[10];
    assert_frequencies(logits, (SampleOptions){.temperature = 1, .top_p = 1, .top_k = 3}, kept);
}

/* The fewest that reach top_p: .3 + .17 + .15 reach .5 (and .62 less a hair), .3 + .17 do not. */
static void test_top_p(void **state) {
    real_t logits[V];
    double kept[V] = {0};
    logits_of(logits, PROBS);
    kept[7] = PROBS[7], kept[2] = PROBS[2], kept[10] = PROBS[10];
    assert_frequencies(logits, (SampleOptions){.temperature = 1, .top_p = 0.5}, kept);
    assert_frequencies(logits, (SampleOptions){.temperature = 1, .top_p = 0.619}, kept);
    kept[5] = PROBS[5];
    assert_frequencies(logits, (SampleOptions){.temperature = 1, .top_p = 0.621}, kept);
    kept[5] = kept[10] = 0;
    assert_frequencies(logits, (SampleOptions){.temperature = 1, .top_p = 0.469}, kept);
    assert_frequencies(logits, (SampleOptions){.temperature = 1, .top_p = 0.9, .top_k = 2},
                       kept); /* top_k cuts first */
}

/* Tokens as probable as the last one kept are kept too, so that the cut does not depend on their order. */
static void test_ties_at_the_cut(void **state) {
    static const double probs[V] = {.1, .1, .1, .1, .3, .02, .02, .02, .02, .02, .1, .1};
    real_t logits[V];
    double kept[V] = {.1, .1, .1, .1, .3, 0, 0, 0, 0, 0, .1, .1};
    logits_of(logits, probs);
    assert_frequencies(logits, (SampleOptions){.temperature = 1, .top_p = 1, .top_k = 3}, kept);
    assert_frequencies(logits, (SampleOptions){.temperature = 1, .top_p = 0.35}, kept);
}

/* The last number below 1 draws a token that is kept, whatever rounding leaves over; so does the first, 0. */
static void test_ends_of_the_unit_interval(void **state) {
    static const double ends[] = {0, 0x1p-60, 1 - 0x1p-30, 1 - 0x1p-53};
    uint64_t key = random_key(12, RANDOM_TEST, 0);
    for (int draw = 0; draw < 2000; draw++) {
        real_t logits[V], sorted[V];
        acc_t work[2 * V];
        for (int v = 0; v < V; v++) {
            logits[v] = (real_t)(4 * random_normal(key, (uint64_t)(draw * V + v)));
        }
        memcpy(sorted, logits, sizeof sorted);
        for (int i = 0; i < 3; i++) { /* the three largest first */
            int best = i + largest(sorted + i, V - i);
            real_t swap = sorted[i];
            sorted[i] = sorted[best];
            sorted[best] = swap;
        }
        for (int i = 0; i < 4; i++) {
            int token = sample_token(logits, V, everything, ends[i], work);
            assert_in_range(token, 0, V - 1);
            token = sample_token(logits, V, (SampleOptions){.temperature = 1, .top_p = 1, .top_k = 3}, ends[i], work);
            assert_in_range(token, 0, V - 1);
            assert_true(logits[token] >= sorted[2]);
        }
    }
}

/* Logits far apart neither overflow nor lose the most probable token. */
static void test_extreme_logits(void **state) {
    static const double extremes[] = {1e4, -1e4, 3e38};
    acc_t work[2 * V];
    for (int i = 0; i < 3; i++) {
        real_t logits[V];
        for (int v = 0; v < V; v++) {
            logits[v] = (real_t)(v == 4 ? extremes[i] : extremes[i] - fabs(extremes[i]) / 2);
        }
        for (int k = 0; k < 10; k++) {
            assert_int_equal(sample_token(logits, V, everything, k / 10.0, work), 4);
        }
    }
}

int main(void) {
    omp_set_num_threads(1); /* for a token at a time, starting threads would be all the work */
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_decode_equals_forward),
        cmocka_unit_test(test_generation_equals_whole_forwards),
        cmocka_unit_test(test_seed_decides_the_text),
        cmocka_unit_test(test_batch_equals_single),
        cmocka_unit_test(test_prompts_of_routers_that_see_the_future),
        cmocka_unit_test(test_weights_are_shared),
        cmocka_unit_test(test_frequencies),
        cmocka_unit_test(test_argmax),
        cmocka_unit_test(test_top_k),
        cmocka_unit_test(test_top_p),
        cmocka_unit_test(test_ties_at_the_cut),
        cmocka_unit_test(test_ends_of_the_unit_interval),
        cmocka_unit_test(test_extreme_logits),
    };
    return cmocka_run_group_tests_name("generation", tests, NULL, NULL);
}
