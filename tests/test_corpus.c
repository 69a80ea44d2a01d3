/* Batches: which tokens each sequence holds, in order and shuffled, and which data is refused with which line. Masks
 * are in test_masks.c. Read next: corpus_fixture.h, data/corpus.c.
 */
#include "corpus_fixture.h"

/* ---- the builtin corpus ---- */

static void test_batch_does_not_depend_on_shares(void **state) {
    static Arrays whole, parts;
    enum { T = 128, B = 8 };
    Corpus *corpus = open_builtin(T, B);
    memset(&whole, 0, sizeof whole);
    memset(&parts, 0, sizeof parts);
    read_batch(corpus, SPLIT_TRAIN, 7, 0, B, &whole, 0);
    read_batch(corpus, SPLIT_TRAIN, 7, 5, 3, &parts, 5 * T);
    read_batch(corpus, SPLIT_TRAIN, 7, 0, 1, &parts, 0);
    read_batch(corpus, SPLIT_TRAIN, 7, 1, 4, &parts, 1 * T);
    assert_memory_equal(&whole, &parts, sizeof whole);
    /* Sequence 8 of step 6 would be sequence 0 of step 7, and other splits and steps differ. */
    read_batch(corpus, SPLIT_TRAIN, 6, 8, 1, &parts, 0);
    assert_memory_equal(whole.tokens, parts.tokens, T * sizeof(int));
    read_batch(corpus, SPLIT_VAL, 7, 0, B, &parts, 0);
    assert_memory_not_equal(whole.tokens, parts.tokens, T * sizeof(int));
    read_batch(corpus, SPLIT_TRAIN, 8, 0, B, &parts, 0);
    assert_memory_not_equal(whole.tokens, parts.tokens, T * sizeof(int));
    corpus_close(corpus);
}

/* Sequence g is documents g*D, g*D + 1, ... one after another. */
static void check_sequences(int seq, int batch, uint64_t documents) {
    static Arrays a;
    static struct {
        unsigned char bytes[BUILTIN_DOCUMENT_BYTES];
        double nats[BUILTIN_DOCUMENT_BYTES];
        int length, domain;
    } d;
    Corpus *corpus = open_builtin(seq, batch);
    for (int64_t step = 0; step < 3; step++) {
        read_batch(corpus, SPLIT_VAL, step, 0, batch, &a, 0);
        for (int j = 0; j < batch; j++) {
            uint64_t index = ((uint64_t)step * (uint64_t)batch + (uint64_t)j) * documents;
            int at = -1; /* of the next byte among the targets; the first byte is a token only */
            while (at < seq) {
                d.length = builtin_document(random_key(1337, RANDOM_VAL_DATA, 0), index++, builtin_all_domains(),
                                            d.bytes, d.nats, &d.domain);
                for (int t = 0; t < d.length && at < seq; t++, at++) {
                    int k = j * seq + at;
                    if (at >= 0) {
                        assert_int_equal(a.targets[k], d.bytes[t]);
                        assert_int_equal(a.domain[k], d.domain);
                        assert_true(a.floor[k] == d.nats[t]);
                    }
                    if (at + 1 < seq) {
                        assert_int_equal(a.tokens[k + 1], d.bytes[t]);
                    }
                }
            }
        }
    }
    corpus_close(corpus);
}

static void test_sequences_are_their_documents(void **state) {
    check_sequences(128, 8, 64);
    check_sequences(1, 8, 64);
    check_sequences(17, 3, 64);
    check_sequences(3000, 2, 151);
}

static void test_batch_skips_arrays_that_are_not_wanted(void **state) {
    static Arrays whole, alone;
    enum { T = 40, B = 4 };
    Corpus *corpus = open_builtin(T, B);
    read_batch(corpus, SPLIT_TRAIN, 0, 0, B, &whole, 0);
    corpus_batch(corpus, SPLIT_TRAIN, 0, 0, B, &(Batch){.tokens = alone.tokens});
    corpus_batch(corpus, SPLIT_TRAIN, 0, 0, B, &(Batch){.targets = alone.targets});
    corpus_batch(corpus, SPLIT_TRAIN, 0, 0, B, &(Batch){.domain = alone.domain});
    corpus_batch(corpus, SPLIT_TRAIN, 0, 0, B, &(Batch){.floor = alone.floor});
    assert_memory_equal(&whole, &alone, sizeof whole);
    corpus_close(corpus);
}

static void test_corpus_describes_the_builtin_text(void **state) {
    Corpus *corpus = open_builtin(128, 8);
    assert_true(corpus_has_floor(corpus));
    assert_int_equal(corpus_domains(corpus), builtin_domains());
    assert_string_equal(corpus_domain_name(corpus, 3), "recall");
    assert_string_equal(corpus_prompt(corpus, 2), builtin_prompt(2));
    assert_true(corpus_bytes_per_token(corpus) == 1.0);
    assert_int_equal(corpus_tokens(corpus, SPLIT_TRAIN), -1);
    corpus_close(corpus);
}

static Corpus *open_domains(const char *domains, int ranks, int seq, int batch) {
    CorpusOptions options = options_of("builtin", seq, batch, true);
    options.domains = domains;
    options.ranks = ranks;
    return corpus_open(&options);
}

/* The domains that a rank of `ranks` meets in training, when it reads its share of a step in `slices`. */
static DomainSet domains_met(const Corpus *corpus, int slices, int rank, int ranks, int seq, int batch) {
    static Arrays a;
    DomainSet met = 0;
    int count = batch / slices / ranks;
    for (int64_t step = 0; step < 20; step++) {
        for (int slice = 0; slice < slices; slice++) {
            int first = corpus_first(corpus, SPLIT_TRAIN, slice, slices, rank, ranks);
            read_batch(corpus, SPLIT_TRAIN, step, first, count, &a, 0);
            for (int t = 0; t < count * seq; t++) {
                met |= 1U << a.domain[t];
            }
        }
    }
    return met;
}

static void test_training_text_of_some_domains(void **state) {
    static Arrays all, some;
    enum { T = 200, B = 8 };
    Corpus *whole = open_domains("all", 4, T, B), *unsaid = open_domains(NULL, 1, T, B);
    Corpus *two = open_domains("sort,arithmetic", 4, T, B), *dealt = open_domains("by-rank", 4, T, B);
    assert_int_equal(domains_met(whole, 1, 0, 1, T, B), builtin_all_domains());
    assert_int_equal(domains_met(two, 1, 0, 1, T, B), 1U << 1 | 1U << 4);
    Corpus *others[] = {unsaid, two, dealt};
    for (int i = 0; i < 3; i++) {
        read_batch(whole, SPLIT_TRAIN, 3, 0, B, &all, 0);
        read_batch(others[i], SPLIT_TRAIN, 3, 0, B, &some, 0);
        assert_int_equal(memcmp(&all, &some, sizeof all) == 0, others[i] == unsaid);
        read_batch(whole, SPLIT_VAL, 3, 0, B, &all, 0); /* validation text is the same whatever the domains */
        read_batch(others[i], SPLIT_VAL, 3, 0, B, &some, 0);
        assert_memory_equal(&all, &some, sizeof all);
        corpus_close(others[i]);
    }
    corpus_close(whole);
}

/* Each sequence of a step is read once, dealt out or not. */
static void check_shares(const Corpus *corpus, Split split, int slices, int ranks, int batch) {
    bool read[64] = {false};
    int count = batch / slices / ranks;
    for (int slice = 0; slice < slices; slice++) {
        for (int rank = 0; rank < ranks; rank++) {
            int first = corpus_first(corpus, split, slice, slices, rank, ranks);
            for (int i = 0; i < count; i++) {
                assert_true(first + i < batch && !read[first + i]);
                read[first + i] = true;
            }
        }
    }
}

/* Six domains dealt out to 2, 4 and 8 ranks. */
static void test_domains_are_dealt_out_to_ranks(void **state) {
    enum { T = 200, B = 16 };
    const DomainSet of_2[] = {1 | 4 | 16, 2 | 8 | 32}, of_4[] = {1 | 16, 2 | 32, 4, 8},
                    of_8[] = {1, 2, 4, 8, 16, 32, 1, 2}, *of[] = {of_2, of_4, of_8};
    for (int i = 0; i < 3; i++) {
        int ranks = 2 << i;
        Corpus *corpus = open_domains("by-rank", ranks, T, B);
        for (int rank = 0; rank < ranks; rank++) {
            assert_int_equal(domains_met(corpus, 1, rank, ranks, T, B), of[i][rank]);
            assert_int_equal(domains_met(corpus, 2, rank, ranks, T, B), of[i][rank]);
        }
        check_shares(corpus, SPLIT_TRAIN, 2, ranks, B);
        check_shares(corpus, SPLIT_VAL, 2, ranks, B);
        assert_int_equal(corpus_first(corpus, SPLIT_TRAIN, 1, 2, 1, ranks), 3 * (B / 2 / ranks));
        assert_int_equal(corpus_first(corpus, SPLIT_VAL, 1, 2, 1, ranks), B / 2 + B / 2 / ranks);
        corpus_close(corpus);
    }
}

/* ---- text and shards ---- */

/* The batch row of sequence `first` of the step must be the T+1 bytes of text from `start`. */
static void assert_window(const Corpus *corpus, Split split, int64_t step, int first, int T, uint64_t start) {
    int tokens[64], targets[64];
    unsigned char domain[64];
    double floors[64];
    corpus_batch(corpus, split, step, first, 1, &(Batch){tokens, targets, domain, floors, NULL});
    for (int t = 0; t < T; t++) {
        assert_int_equal(tokens[t], text_byte(start + (uint64_t)t));
        assert_int_equal(targets[t], text_byte(start + (uint64_t)t + 1));
        assert_int_equal(domain[t], 0);
        assert_true(isnan(floors[t]));
    }
}

static void test_sequential_windows_follow_the_stream(void **state) {
    enum { N = 1111, T = 10, B = 4, TRAIN = 1000, VAL = 111 };
    write_text("a.txt", N);
    CorpusOptions options = options_of("a.txt", T, B, false);
    Corpus *corpus = corpus_open(&options);
    assert_int_equal(corpus_tokens(corpus, SPLIT_TRAIN), TRAIN);
    assert_int_equal(corpus_tokens(corpus, SPLIT_VAL), VAL);
    uint64_t windows = (TRAIN - 1) / T, val_windows = (VAL - 1) / T;
    for (int64_t step = 0; step < 60; step++) {
        for (int j = 0; j < B; j++) {
            uint64_t g = (uint64_t)(step * B + j);
            assert_window(corpus, SPLIT_TRAIN, step, j, T, g % windows * T);
            assert_window(corpus, SPLIT_VAL, step, j, T, TRAIN + g % val_windows * T);
        }
    }
    assert_false(corpus_has_floor(corpus));
    assert_int_equal(corpus_domains(corpus), 1);
    assert_string_equal(corpus_prompt(corpus, 0), "");
    assert_true(corpus_bytes_per_token(corpus) == 1.0);
    corpus_close(corpus);
}

/* Sequence j of step s starts at (s*B + j)*T, also where that is beyond 32 bits: a sparse file with one byte far out.
 */
static void test_sequences_far_into_a_long_text(void **state) {
    enum { T = 29, B = 2 };
    const int64_t bytes = INT64_C(6) << 30, at = INT64_C(5) << 30;
    int row[T];
    write_file("long.txt", "", 0);
    if (truncate("long.txt", (off_t)bytes) != 0) {
        skip(); /* a file system without sparse files */
    }
    int file = open("long.txt", O_RDWR);
    assert_int_equal(pwrite(file, "x", 1, (off_t)at), 1);
    close(file);
    CorpusOptions options = options_of("long.txt", T, B, false);
    Corpus *corpus = corpus_open(&options);
    assert_int_equal(corpus_tokens(corpus, SPLIT_TRAIN), bytes - bytes / 10);
    int64_t g = at / T;
    corpus_batch(corpus, SPLIT_TRAIN, g / B, (int)(g % B), 1, &(Batch){.tokens = row});
    for (int t = 0; t < T; t++) {
        assert_int_equal(row[t], g * T + t == at ? 'x' : 0);
    }
    corpus_close(corpus);
}

/* Where a shuffled sequence of shards that count up starts: its first token. */
static int first_token(const Corpus *corpus, Split split, uint64_t g, int B, int T) {
    int tokens[64], targets[64];
    Batch batch = {.tokens = tokens, .targets = targets};
    corpus_batch(corpus, split, (int64_t)(g / (uint64_t)B), (int)(g % (uint64_t)B), 1, &batch);
    for (int t = 0; t < T; t++) {
        assert_int_equal(tokens[t], tokens[0] + t);
        assert_int_equal(targets[t], tokens[0] + t + 1);
    }
    return tokens[0];
}

static void check_epochs(int tokens, int T) {
    enum { B = 3, EPOCHS = 5 };
    assert_int_equal(mkdir("d", 0700), 0);
    write_shard("d/a.bin", 0, tokens / 3);
    write_shard("d/b.bin", tokens / 3, tokens - tokens / 3);
    write_shard("d/val.bin", 0, 200);
    CorpusOptions options = options_of("d", T, B, true);
    options.vocab = 65536;
    Corpus *corpus = corpus_open(&options);
    int windows = (tokens - 1) / T;
    int fitting = windows > 1 ? windows - 1 : 1;
    int in_order = 0, phases = 0;
    char *seen = malloc((size_t)fitting);
    assert_non_null(seen);
    for (int epoch = 0; epoch < EPOCHS; epoch++) {
        int phase = -1;
        memset(seen, 0, (size_t)fitting);
        for (int i = 0; i < fitting; i++) {
            int start = first_token(corpus, SPLIT_TRAIN, (uint64_t)epoch * (uint64_t)fitting + (uint64_t)i, B, T);
            phase = i == 0 ? start % T : phase;
            assert_int_equal(start % T, phase);
            assert_true(start + T < tokens);
            assert_in_range(start / T, 0, fitting - 1);
            assert_int_equal(seen[start / T], 0);
            seen[start / T] = 1;
            in_order += start / T == i;
        }
        phases |= 1 << phase;
    }
    if (fitting >= 50) { /* a random permutation leaves one element in place on average */
        assert_true(in_order < 5 * EPOCHS);
    }
    if (windows > 1 && T > 4) {
        assert_true(__builtin_popcount((unsigned)phases) > 1);
    }
    for (uint64_t g = 0; g < 12; g++) { /* validation stays in order */
        assert_int_equal(first_token(corpus, SPLIT_VAL, g, B, T), (int)g % (199 / T) * T);
    }
    free(seen);
    corpus_close(corpus);
    const char *files[] = {"d/a.bin", "d/b.bin", "d/val.bin", "d"};
    for (int i = 0; i < 4; i++) {
        assert_int_equal(remove(files[i]), 0);
    }
}

static void test_an_epoch_visits_each_window_once(void **state) {
    check_epochs(5000, 10);
    check_epochs(5011, 16);
    check_epochs(641, 10); /* 64 windows, 63 of which fit with a phase */
    check_epochs(651, 10); /* 65 and 64: a power of 4 */
    check_epochs(40, 13);  /* 3 and 2 */
    check_epochs(38, 13);  /* 2 and 1 */
    check_epochs(14, 13);  /* 1: no phase */
    check_epochs(26, 13);
    check_epochs(300, 1);
}

static void test_shuffled_order_depends_on_seed_and_epoch_alone(void **state) {
    enum { T = 8, B = 6 };
    int a[B * T], b[B * T];
    write_text("a.txt", 8000);
    CorpusOptions options = options_of("a.txt", T, B, true);
    Corpus *corpus = corpus_open(&options), *again = corpus_open(&options);
    options.seed = 43;
    Corpus *other = corpus_open(&options);
    for (int64_t step = 400; step >= 0; step -= 100) { /* any order of asking, any shares */
        corpus_batch(corpus, SPLIT_TRAIN, step, 0, B, &(Batch){.tokens = a});
        corpus_batch(again, SPLIT_TRAIN, step, 4, 2, &(Batch){.tokens = b + 4 * T});
        corpus_batch(again, SPLIT_TRAIN, step, 0, 4, &(Batch){.tokens = b});
        assert_memory_equal(a, b, sizeof a);
        corpus_batch(other, SPLIT_TRAIN, step, 0, B, &(Batch){.tokens = b});
        assert_memory_not_equal(a, b, sizeof a);
        corpus_batch(corpus, SPLIT_TRAIN, step + 149, 0, B,
                     &(Batch){.tokens = b}); /* 894 sequences on: the next epoch */
        assert_memory_not_equal(a, b, sizeof a);
    }
    corpus_close(corpus);
    corpus_close(again);
    corpus_close(other);
}

static void test_validation_can_be_given(void **state) {
    write_text("train.txt", 500);
    write_text("other.txt", 60);
    CorpusOptions options = options_of("train.txt", 20, 2, false);
    options.val = "other.txt";
    Corpus *corpus = corpus_open(&options);
    assert_int_equal(corpus_tokens(corpus, SPLIT_TRAIN), 500);
    assert_int_equal(corpus_tokens(corpus, SPLIT_VAL), 60);
    assert_window(corpus, SPLIT_VAL, 1, 1, 20, 20); /* 2 windows: the fourth sequence is the second of them */
    corpus_close(corpus);
}

static void test_one_shard_holds_its_last_tenth_out(void **state) {
    write_shard("a.bin", 0, 1000);
    CorpusOptions options = options_of("a.bin", 20, 2, false);
    options.vocab = 1000;
    Corpus *corpus = corpus_open(&options);
    assert_int_equal(corpus_tokens(corpus, SPLIT_TRAIN), 900);
    assert_int_equal(first_token(corpus, SPLIT_VAL, 0, 2, 20), 900);
    assert_true(isnan(corpus_bytes_per_token(corpus)));
    corpus_close(corpus);
}

/* ---- lines that end the program ---- */

static void open_and_read(void *options) {
    int tokens[1024];
    Corpus *corpus = corpus_open(options);
    corpus_batch(corpus, SPLIT_TRAIN, 0, 0, 1, &(Batch){.tokens = tokens});
    corpus_close(corpus);
}

/* To open the corpus and read a batch must end the program with one line that has both parts. */
static void assert_dies(CorpusOptions options, const char *part, const char *part2) {
    static Forked result;
    run_forked(&result, open_and_read, &options);
    assert_refused(&result, "moelab: ");
    assert_refused(&result, part);
    assert_refused(&result, part2);
}

static void test_bad_data_ends_the_program_with_one_line(void **state) {
    assert_dies(options_of("missing.txt", 8, 1, true), "--data: cannot open missing.txt", "No such file");
    write_file("empty.txt", "", 0);
    assert_dies(options_of("empty.txt", 8, 1, true), "empty.txt is empty", "give a file");
    write_text("text.bin", 2000);
    assert_dies(options_of("text.bin", 8, 1, true), "text.bin starts with", "rename it if it is text");
    write_file("one.txt", "x", 1);
    assert_dies(options_of("one.txt", 8, 1, true), "one.txt has 1 tokens for training, but a sequence takes 9",
                "lower --seq");
    write_text("small.txt", 80);
    assert_dies(options_of("small.txt", 8, 1, true), "small.txt has 8 tokens for validation, but a sequence takes 9",
                "--seq 8 and one more");
    assert_int_equal(mkdir("d", 0700), 0);
    assert_dies(options_of("d", 8, 1, true), "d has no *.bin in it", "give a text file");
    write_shard("d/a.bin", 0, 100);
    assert_dies(options_of("d", 8, 1, true), "none of its 1 files has \"val\" in its name", "give some with --val");
    write_shard("d/a_val.bin", 250, 100);
    CorpusOptions options = options_of("d/*val*", 8, 1, true);
    assert_dies(options, "--data: d/*val*: each of its 1 files has \"val\" in its name", "--data");
    write_shard("d/a.bin", 250, 100);
    assert_dies(options_of("d", 8, 1, false), "d/a.bin: token 6 is 256, which is not below the vocabulary size 256",
                "raise --vocab");
    assert_dies(with_masks(options_of("d", 8, 1, false), 0.15), "d/a.bin: token 6 is 256, which is not below",
                "raise --vocab"); /* 256 is the mask */
}

static void test_contradictory_options_end_the_program_with_one_line(void **state) {
    write_text("a.txt", 1000);
    write_shard("b.bin", 0, 100);
    CorpusOptions options = options_of("builtin", 8, 1, true);
    options.vocab = 127;
    assert_dies(options, "--vocab 127 is too small for --data builtin", "at least 128");
    options = options_of("builtin", 8, 1, true);
    options.val = "a.txt";
    assert_dies(options, "--data builtin and --val a.txt do not go together", "leave --val out");
    options = options_of("a.txt", 8, 1, true);
    options.val = "builtin";
    assert_dies(options, "--data a.txt and --val builtin do not go together", "leave --val out");
    options.val = "a.txt";
    assert_dies(options, "--val is the same as --data", "leave --val out");
    options.val = "b.bin";
    assert_dies(options, "one of --data a.txt and --val b.bin is text", "token shards");
    options.val = "missing.txt";
    assert_dies(options, "--val: cannot open missing.txt", "No such file");
    write_text("few.txt", 5);
    options.val = "few.txt";
    assert_dies(options, "few.txt has 5 tokens for validation", "give more data with --val");
}

static void test_domains_that_are_refused(void **state) {
    write_text("a.txt", 1000);
    CorpusOptions options = options_of("a.txt", 8, 1, true);
    options.domains = "sort";
    assert_dies(options, "--domains sort is for the builtin corpus alone", "--data builtin");
    options.train = "builtin";
    options.domains = "sort,story,sorted";
    assert_dies(options, "--domains sort,story,sorted: 'sorted' is no domain, they are story,", "give all, by-rank");
    options.domains = "by-rank";
    options.ranks = 1;
    assert_dies(options, "--domains by-rank deals the domains out to the ranks, and there is one", "--domains all");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_batch_does_not_depend_on_shares),
        cmocka_unit_test(test_sequences_are_their_documents),
        cmocka_unit_test(test_batch_skips_arrays_that_are_not_wanted),
        cmocka_unit_test(test_corpus_describes_the_builtin_text),
        cmocka_unit_test(test_training_text_of_some_domains),
        cmocka_unit_test(test_domains_are_dealt_out_to_ranks),
        IN_FOLDER(test_domains_that_are_refused),
        IN_FOLDER(test_sequential_windows_follow_the_stream),
        IN_FOLDER(test_sequences_far_into_a_long_text),
        IN_FOLDER(test_an_epoch_visits_each_window_once),
        IN_FOLDER(test_shuffled_order_depends_on_seed_and_epoch_alone),
        IN_FOLDER(test_validation_can_be_given),
        IN_FOLDER(test_one_shard_holds_its_last_tenth_out),
        IN_FOLDER(test_bad_data_ends_the_program_with_one_line),
        IN_FOLDER(test_contradictory_options_end_the_program_with_one_line),
    };
    return cmocka_run_group_tests_name("corpus", tests, NULL, NULL);
}
