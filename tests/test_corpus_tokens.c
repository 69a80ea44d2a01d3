/* Text that a corpus reads through a tokenizer, shards that say what made them, and the bytes of targets. */
#include "corpus_fixture.h"

#include "../data/bpe_trainer.h"
#include "../data/shard.h"

static const char LINE[] = "It's the na\xc3\xafve line of a story \xe2\x80\x94 about 1234 words.\n";

/* The line many times, a document's end after every tenth; *bytes is its length. The caller frees. */
static char *make_text(int lines, size_t *bytes) {
    char *text = malloc((size_t)lines * (sizeof LINE + 13) + 1), *out = text;
    for (int i = 0; i < lines; i++) {
        out += sprintf(out, "%s%s", LINE, i % 10 == 9 ? "<|endoftext|>" : "");
    }
    *bytes = (size_t)(out - text);
    return text;
}

/* A tokenizer of some tokens, the last of which is <|endoftext|>. */
static Tokenizer *make_tokenizer(int vocab) {
    char error[256];
    size_t bytes, json_bytes;
    char *text = make_text(20, &bytes);
    BpeOptions options = {.vocab = vocab};
    char *json = bpe_train(text, bytes, &options, &json_bytes, error, sizeof error);
    assert_non_null(json);
    Tokenizer *tokenizer = tokenizer_parse(json, json_bytes, "test", error, sizeof error);
    assert_non_null(tokenizer);
    free(json);
    free(text);
    return tokenizer;
}

static CorpusOptions through(const Tokenizer *tokenizer, const char *train, int seq) {
    CorpusOptions options = options_of(train, seq, 1, false);
    options.tokenizer = tokenizer;
    options.vocab = tokenizer_vocab(tokenizer);
    return options;
}

/* All of a split, decoded, must be this text. */
static void assert_split(const CorpusOptions *options, Split split, const char *text, size_t bytes) {
    Corpus *corpus = corpus_open(options);
    size_t count = (size_t)corpus_tokens(corpus, split), windows = (count - 1) / (size_t)options->seq;
    int *tokens = calloc(count, sizeof(int)), row[64], targets[64];
    for (size_t w = 0; w < windows; w++) {
        corpus_batch(corpus, split, (int64_t)w, 0, 1, &(Batch){.tokens = row, .targets = targets});
        for (int t = 0; t < options->seq; t++) {
            tokens[w * (size_t)options->seq + (size_t)t] = row[t];
            assert_true(t == 0 || targets[t - 1] == row[t]);
        }
        tokens[(w + 1) * (size_t)options->seq] = targets[options->seq - 1];
    }
    size_t seen = windows * (size_t)options->seq + 1, decoded_bytes;
    char *decoded = tokenizer_decode(options->tokenizer, tokens, seen, &decoded_bytes);
    assert_true(decoded_bytes <= bytes && decoded_bytes > bytes * 9 / 10);
    assert_memory_equal(decoded, text, decoded_bytes);
    free(decoded);
    free(tokens);
    corpus_close(corpus);
}

/* The last tenth of the bytes is held out, whatever the tokenizer. */
static void test_text_through_a_tokenizer(void **state) {
    size_t bytes;
    char *text = make_text(200, &bytes);
    write_file("a.txt", text, bytes);
    Tokenizer *tokenizer = make_tokenizer(280);
    CorpusOptions options = through(tokenizer, "a.txt", 16);
    size_t held_out = bytes / 10;
    assert_split(&options, SPLIT_TRAIN, text, bytes - held_out);
    assert_split(&options, SPLIT_VAL, text + bytes - held_out, held_out);
    write_file("b.txt", text, bytes / 2);
    options.val = "b.txt";
    assert_split(&options, SPLIT_TRAIN, text, bytes);
    assert_split(&options, SPLIT_VAL, text, bytes / 2);
    tokenizer_close(tokenizer);
    free(text);
}

/* Bytes of the targets of a whole split against the bytes of their tokens; special tokens are none. */
static void assert_bytes(const CorpusOptions *options, bool known) {
    Corpus *corpus = corpus_open(options);
    int targets[64], bytes[64], specials = 0;
    int64_t windows = (corpus_tokens(corpus, SPLIT_TRAIN) - 1) / options->seq;
    for (int64_t w = 0; w < windows; w++) {
        corpus_batch(corpus, SPLIT_TRAIN, w, 0, 1, &(Batch){.targets = targets, .bytes = bytes});
        for (int t = 0; t < options->seq; t++) {
            size_t length = 1;
            bool special = options->tokenizer && tokenizer_is_special(options->tokenizer, targets[t]);
            if (options->tokenizer) {
                tokenizer_token(options->tokenizer, targets[t], &length);
            }
            assert_int_equal(bytes[t], !known ? -1 : special ? 0 : (int)length);
            specials += special;
        }
    }
    assert_true(!options->tokenizer || tokenizer_is_bytes(options->tokenizer) || specials > 5);
    corpus_close(corpus);
}

static void write_our_shard(const char *path, const Tokenizer *tokenizer, uint32_t hash) {
    char error[512];
    size_t bytes, count;
    int *ids;
    char *text = make_text(200, &bytes);
    assert_true(tokenizer_encode(tokenizer, text, bytes, &ids, &count, error, sizeof error));
    ShardWriter *writer = shard_create(path, tokenizer_vocab(tokenizer), hash, error, sizeof error);
    assert_non_null(writer);
    assert_true(shard_append(writer, ids, count, bytes, error, sizeof error));
    assert_true(shard_finish(writer, error, sizeof error));
    free(ids);
    free(text);
}

static void test_bytes_of_targets(void **state) {
    size_t size;
    char *text = make_text(200, &size);
    write_file("a.txt", text, size);
    Tokenizer *tokenizer = make_tokenizer(280), *bytes = tokenizer_bytes();
    CorpusOptions options = through(tokenizer, "a.txt", 16), plain = options_of("a.txt", 16, 1, false);
    assert_bytes(&options, true);
    assert_bytes(&plain, true);
    plain.tokenizer = bytes;
    assert_bytes(&plain, true);
    write_our_shard("ours.bin", tokenizer, tokenizer_hash(tokenizer));
    options.train = "ours.bin";
    assert_bytes(&options, true);
    Corpus *corpus = corpus_open(&options);
    int64_t tokens = corpus_tokens(corpus, SPLIT_VAL) + corpus_tokens(corpus, SPLIT_TRAIN);
    assert_true(fabs(corpus_bytes_per_token(corpus) - (double)size / (double)tokens) < 1e-12);
    corpus_close(corpus);
    write_our_shard("foreign.bin", tokenizer, 0); /* does not say what made it: the one given is believed */
    options.train = "foreign.bin";
    assert_bytes(&options, true);
    write_shard("other.bin", 0, 1000);
    plain.train = "other.bin";
    plain.vocab = 1000;
    assert_bytes(&plain, false);
    tokenizer_close(tokenizer);
    tokenizer_close(bytes);
    free(text);
}

static void test_masked_targets_have_no_bytes_where_nothing_is_hidden(void **state) {
    CorpusOptions options = with_masks(options_of("builtin", 32, 1, true), 0.25);
    Corpus *corpus = corpus_open(&options);
    int targets[32], bytes[32];
    corpus_batch(corpus, SPLIT_TRAIN, 3, 0, 1, &(Batch){.targets = targets, .bytes = bytes});
    for (int t = 0; t < 32; t++) {
        assert_int_equal(bytes[t], targets[t] < 0 ? -1 : 1);
    }
    corpus_close(corpus);
}

/* ---- lines that end the program ---- */

static void open_only(void *options) {
    corpus_close(corpus_open(options));
}

static void assert_dies(CorpusOptions options, const char *part) {
    static Forked result;
    run_forked(&result, open_only, &options);
    assert_refused(&result, part);
}

static void test_what_does_not_fit_is_refused(void **state) {
    Tokenizer *tokenizer = make_tokenizer(280), *other = make_tokenizer(270), *bytes = tokenizer_bytes();
    write_our_shard("ours.bin", tokenizer, tokenizer_hash(tokenizer));
    CorpusOptions options = through(other, "ours.bin", 16);
    options.vocab = 280;
    assert_dies(options, "ours.bin was made with another tokenizer");
    options.tokenizer = bytes;
    assert_dies(options, "ours.bin was made with another tokenizer than bytes");
    options = through(tokenizer, "ours.bin", 16);
    options.vocab = 279;
    assert_dies(options, "--vocab 279 is too small for the shards in ours.bin");
    options = through(tokenizer, "builtin", 16);
    assert_dies(options, "--data builtin is made of bytes");
    write_text("a.txt", 2000);
    options = through(tokenizer, "a.txt", 16);
    options.vocab = 200;
    assert_dies(options, "--vocab 200 is too small for token");
    FILE *file = fopen("ours.bin", "r+b");
    assert_true(file && fseek(file, 1500, SEEK_SET) == 0);
    int old = fgetc(file);
    assert_true(fseek(file, 1500, SEEK_SET) == 0 && fputc(old ^ 4, file) != EOF && fclose(file) == 0);
    assert_dies(through(tokenizer, "ours.bin", 16), "ours.bin is damaged");
    tokenizer_close(tokenizer);
    tokenizer_close(other);
    tokenizer_close(bytes);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        IN_FOLDER(test_text_through_a_tokenizer),
        IN_FOLDER(test_bytes_of_targets),
        cmocka_unit_test(test_masked_targets_have_no_bytes_where_nothing_is_hidden),
        IN_FOLDER(test_what_does_not_fit_is_refused),
    };
    return cmocka_run_group_tests_name("corpus through a tokenizer", tests, NULL, NULL);
}
