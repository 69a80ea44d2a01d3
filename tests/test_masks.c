/* Masked prediction: which tokens of a batch are hidden, what is to be predicted there, and that both follow from the
 * seed and the sequence alone. Read next: corpus_fixture.h, data/corpus.c.
 */
#include "corpus_fixture.h"

/* So many tokens of each sequence are hidden and are the targets; all else is what next-token prediction reads. */
static void check_masks(CorpusOptions options, double share, int hidden_tokens) {
    static Arrays plain, masked;
    int T = options.seq, B = options.batch, mask = options.vocab;
    CorpusOptions hiding_options = with_masks(options, share);
    Corpus *corpus = corpus_open(&options), *hiding = corpus_open(&hiding_options);
    assert_int_equal(corpus_masked_tokens(corpus), T);
    assert_int_equal(corpus_masked_tokens(hiding), hidden_tokens);
    assert_false(corpus_has_floor(hiding));
    for (int i = 0; i < 2 * 3 * B; i++) {
        Split split = i % 2 ? SPLIT_TRAIN : SPLIT_VAL;
        read_batch(corpus, split, i / 2 / B, i / 2 % B, 1, &plain, 0);
        read_batch(hiding, split, i / 2 / B, i / 2 % B, 1, &masked, 0);
        int count = 0;
        for (int t = 0; t < T; t++) {
            bool hidden = masked.tokens[t] == mask;
            assert_int_equal(masked.tokens[t], hidden ? mask : plain.tokens[t]);
            assert_int_equal(masked.targets[t], hidden ? plain.tokens[t] : -1);
            assert_int_equal(masked.domain[t], plain.domain[t > 0 ? t - 1 : 0]); /* no document is one token */
            assert_true(isnan(masked.floor[t]));
            count += hidden;
        }
        assert_int_equal(count, hidden_tokens);
    }
    corpus_close(corpus);
    corpus_close(hiding);
}

static void test_masks_hide_what_is_predicted(void **state) {
    static const double shares[] = {1e-9, 0.15, 0.16, 0.165, 0.5, 0.98, 0.99, 1};
    static const int hidden[] = {1, 6, 6, 7, 20, 39, 40, 40};
    write_text("a.txt", 1000);
    for (int i = 0; i < 8; i++) {
        check_masks(options_of("builtin", 40, 3, true), shares[i], hidden[i]);
        check_masks(options_of("a.txt", 40, 3, false), shares[i], hidden[i]);
        check_masks(options_of("a.txt", 40, 3, true), shares[i], hidden[i]);
    }
    check_masks(options_of("builtin", 1, 3, true), 0.15, 1);
    check_masks(options_of("a.txt", 1, 3, true), 1, 1);
    check_masks(options_of("builtin", 3000, 2, false), 0.15, 450);
}

/* Whoever asks, in any order and at once, for any of the arrays, gets the same masks. */
static void test_masks_do_not_depend_on_shares(void **state) {
    enum { T = 40, B = 8, FIRST = 5000, STEPS = 4 };
    static const char *names[] = {"builtin", "a.txt"};
    int tokens[B * T], targets[B * T], part_tokens[STEPS * B * T], part_targets[STEPS * B * T];
    write_text("a.txt", 4000);
    omp_set_num_threads(4);
    for (int kind = 0; kind < 4; kind++) {
        CorpusOptions options = with_masks(options_of(names[kind / 2], T, B, kind % 2), 0.15);
        Corpus *corpus = corpus_open(&options), *again = corpus_open(&options);
#pragma omp parallel for schedule(dynamic, 1)
        for (int i = STEPS * B - 1; i >= 0; i--) {
            int64_t step = FIRST + i / B;
            corpus_batch(again, SPLIT_TRAIN, step, i % B, 1, &(Batch){.targets = part_targets + i * T});
            corpus_batch(again, SPLIT_TRAIN, step, i % B, 1, &(Batch){.tokens = part_tokens + i * T});
        }
        for (int step = 0; step < STEPS; step++) {
            corpus_batch(corpus, SPLIT_TRAIN, FIRST + step, 0, B, &(Batch){.tokens = tokens, .targets = targets});
            assert_memory_equal(tokens, part_tokens + step * B * T, sizeof tokens);
            assert_memory_equal(targets, part_targets + step * B * T, sizeof targets);
        }
        corpus_close(corpus);
        corpus_close(again);
    }
}

/* The hidden places of the first 64 tokens of a sequence, as bits. */
static uint64_t hidden_places(const Corpus *corpus, Split split, int64_t step, int T) {
    int targets[64];
    uint64_t places = 0;
    corpus_batch(corpus, split, step, 0, 1, &(Batch){.targets = targets});
    for (int t = 0; t < T; t++) {
        places |= (uint64_t)(targets[t] >= 0) << t;
    }
    return places;
}

static void test_masks_come_from_seed_split_and_step(void **state) {
    enum { T = 64 };
    write_text("a.txt", 10 * (T + 1)); /* one validation window, nine of training */
    CorpusOptions options = with_masks(options_of("a.txt", T, 1, false), 0.15);
    Corpus *corpus = corpus_open(&options), *again = corpus_open(&options);
    options.seed++;
    Corpus *other = corpus_open(&options);
    for (int64_t step = 0; step < 20; step++) {
        uint64_t train = hidden_places(corpus, SPLIT_TRAIN, step, T), val = hidden_places(corpus, SPLIT_VAL, step, T);
        assert_true(train != val);
        assert_true(train != hidden_places(corpus, SPLIT_TRAIN, step + 1, T));
        assert_true(train != hidden_places(corpus, SPLIT_TRAIN, step + 9, T)); /* the same text, another time */
        assert_true(train == hidden_places(again, SPLIT_TRAIN, step, T));
        assert_true(val == hidden_places(again, SPLIT_VAL, step, T));
        assert_true(train != hidden_places(other, SPLIT_TRAIN, step, T));
        assert_true(val != hidden_places(other, SPLIT_VAL, step, T));
    }
    corpus_close(corpus);
    corpus_close(again);
    corpus_close(other);
}

/* Two of eight places: each of the 28 pairs as often as any other, by chi-squared with 27 degrees of freedom; and the
 * next sequence's choice is its own. */
static void test_masks_prefer_no_place(void **state) {
    enum { T = 8, PAIRS = 28, DRAWS = PAIRS * 100 };
    int count[1 << T] = {0};
    CorpusOptions options = with_masks(options_of("builtin", T, 1, true), 0.25);
    Corpus *corpus = corpus_open(&options);
    double chi = 0;
    int follow = 0; /* how often a place is hidden and then the place before it in the next sequence: 7/16 a draw */
    for (int64_t step = 0; step < DRAWS; step++) {
        uint64_t places = hidden_places(corpus, SPLIT_TRAIN, step, T);
        follow += __builtin_popcountll(places >> 1 & hidden_places(corpus, SPLIT_TRAIN, step + 1, T));
        count[places]++;
    }
    for (int places = 0; places < 1 << T; places++) {
        if (__builtin_popcount((unsigned)places) == 2) {
            chi += (count[places] - 100) * (count[places] - 100) / 100.0;
        } else {
            assert_int_equal(count[places], 0);
        }
    }
    assert_true(chi > 9 && chi < 56); /* 0.1% on either side */
    assert_in_range(follow, DRAWS * 7 / 16 - 100, DRAWS * 7 / 16 + 100);
    corpus_close(corpus);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        IN_FOLDER(test_masks_hide_what_is_predicted),
        IN_FOLDER(test_masks_come_from_seed_split_and_step),
        cmocka_unit_test(test_masks_prefer_no_place),
        IN_FOLDER(test_masks_do_not_depend_on_shares),
    };
    return cmocka_run_group_tests_name("masks", tests, NULL, NULL);
}
