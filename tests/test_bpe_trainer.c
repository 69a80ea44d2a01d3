/* The trainer of byte-pair tokenizers, against one that counts all pairs again before each merge, and the
 * tokenizer.json that it writes.
 *
 * The reference cuts text with no regular expression: a piece starts at each '_' and at each end-of-text content, as
 * the pattern CUT has it. Read next: data/bpe_trainer.h.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <cjson/cJSON.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../data/bpe_trainer.h"
#include "../data/pretokenizer.h"
#include "../data/tokenizer.h"
#include "../kernels/random.h"
#include "threads.h"

enum { MOST_BYTES = 4096, MOST_TOKENS = 512 };

static const char *const CUT = "_[^_]*|[^_]+";
static const char *const END = "<|endoftext|>";

/* ---- the reference ---- */

typedef struct {
    int tokens; /* without the end-of-text token */
    int merges;
    int left[MOST_TOKENS], right[MOST_TOKENS]; /* by merge */
    char *texts[MOST_TOKENS];                  /* by token, as tokenizer.json writes it */
    int symbols;                               /* of the text, after the last merge */
    int ids[MOST_BYTES], piece[MOST_BYTES];
} Reference;

static char *join(const char *left, const char *right) {
    size_t bytes = strlen(left) + strlen(right) + 1;
    char *text = malloc(bytes);
    assert_non_null(text);
    snprintf(text, bytes, "%s%s", left, right);
    return text;
}

static void reference_cut(Reference *reference, const char *text, size_t bytes) {
    int piece = 0;
    for (size_t i = 0; i < bytes; i++) {
        if (bytes - i >= strlen(END) && memcmp(text + i, END, strlen(END)) == 0) {
            i += strlen(END) - 1;
            piece++;
            continue;
        }
        piece += text[i] == '_';
        reference->ids[reference->symbols] = (unsigned char)text[i];
        reference->piece[reference->symbols++] = piece;
    }
}

/* The most frequent pair of neighbours, then the lowest; how often it comes. */
static int reference_best(const Reference *reference, int *a, int *b) {
    static int count[MOST_TOKENS][MOST_TOKENS];
    memset(count, 0, sizeof count);
    int best = 0;
    for (int i = 0; i + 1 < reference->symbols; i++) {
        if (reference->piece[i] == reference->piece[i + 1]) {
            int n = ++count[reference->ids[i]][reference->ids[i + 1]];
            best = n > best ? n : best;
        }
    }
    for (*a = 0; best > 0 && *a < MOST_TOKENS; (*a)++) {
        for (*b = 0; *b < MOST_TOKENS; (*b)++) {
            if (count[*a][*b] == best) {
                return best;
            }
        }
    }
    return 0;
}

static void reference_merge(Reference *reference, int a, int b, int made) {
    int kept = 0;
    for (int i = 0; i < reference->symbols; i++, kept++) {
        bool pair = i + 1 < reference->symbols && reference->piece[i] == reference->piece[i + 1] &&
                    reference->ids[i] == a && reference->ids[i + 1] == b;
        reference->ids[kept] = pair ? made : reference->ids[i];
        reference->piece[kept] = reference->piece[i];
        i += pair;
    }
    reference->symbols = kept;
}

/* A pair whose bytes are a token's already maps to that token, as Hugging Face's trainer has it; none should. */
static Reference *reference_train(const char *text, size_t bytes, int vocab) {
    Reference *reference = calloc(1, sizeof *reference);
    assert_non_null(reference);
    assert_true(bytes <= MOST_BYTES && vocab <= MOST_TOKENS);
    for (; reference->tokens < 256; reference->tokens++) {
        reference->texts[reference->tokens] = join(byte_character((unsigned char)reference->tokens), "");
    }
    reference_cut(reference, text, bytes);
    int a, b;
    while (reference->tokens < vocab - 1 && reference_best(reference, &a, &b) >= 2) {
        char *made = join(reference->texts[a], reference->texts[b]);
        for (int id = 0; id < reference->tokens; id++) {
            if (strcmp(reference->texts[id], made) == 0) {
                fail_msg("two merges make '%s': %s and %s are the second", made, reference->texts[a],
                         reference->texts[b]);
            }
        }
        reference->left[reference->merges] = a;
        reference->right[reference->merges++] = b;
        reference->texts[reference->tokens] = made;
        reference_merge(reference, a, b, reference->tokens++);
    }
    return reference;
}

static void reference_free(Reference *reference) {
    for (int i = 0; i < reference->tokens; i++) {
        free(reference->texts[i]);
    }
    free(reference);
}

/* ---- what was trained ---- */

static char *train_json(const char *text, size_t bytes, const BpeOptions *options, size_t *json_bytes) {
    char error[512] = "";
    char *json = bpe_train(text, bytes, options, json_bytes, error, sizeof error);
    if (!json) {
        fail_msg("not trained: %s", error);
    }
    assert_int_equal(strlen(json), *json_bytes);
    return json;
}

/* The tokenizer.json as a tree, the caller's. */
static cJSON *train_tree(const char *text, size_t bytes, const BpeOptions *options) {
    size_t json_bytes;
    char *json = train_json(text, bytes, options, &json_bytes);
    cJSON *tree = cJSON_Parse(json);
    assert_non_null(tree);
    free(json);
    return tree;
}

static const cJSON *at(const cJSON *tree, const char *first, const char *second) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(tree, first);
    item = second ? cJSON_GetObjectItemCaseSensitive(item, second) : item;
    if (!item) {
        fail_msg("tokenizer.json lacks %s %s", first, second ? second : "");
    }
    return item;
}

static const char *merge_side(const cJSON *tree, int rank, int side) {
    const cJSON *merge = cJSON_GetArrayItem(at(tree, "model", "merges"), rank);
    assert_int_equal(cJSON_GetArraySize(merge), 2);
    return cJSON_GetStringValue(cJSON_GetArrayItem(merge, side));
}

static int merges_of(const cJSON *tree) {
    return cJSON_GetArraySize(at(tree, "model", "merges"));
}

static void assert_merge(const cJSON *tree, int rank, const char *left, const char *right) {
    assert_string_equal(merge_side(tree, rank, 0), left);
    assert_string_equal(merge_side(tree, rank, 1), right);
}

static cJSON *train_words(const char *text, int vocab, const char *pattern) {
    return train_tree(text, strlen(text), &(BpeOptions){.vocab = vocab, .pattern = pattern});
}

/* ---- against the reference ---- */

static size_t random_text(uint64_t trial, const char *alphabet, int letters, char *text) {
    uint64_t key = random_key(7, RANDOM_TEST, trial);
    size_t bytes = (size_t)random_below(key, 0, 400);
    for (size_t i = 0; i < bytes; i++) {
        text[i] = alphabet[random_below(key, i + 1, (uint64_t)letters)];
    }
    if (trial % 3 == 0 && bytes > 60) { /* the content itself, and one that is cut short */
        memcpy(text + bytes / 2, END, strlen(END));
        memcpy(text + bytes / 3, END, strlen(END) - 1);
    }
    return bytes;
}

/* Merges in their order, and the ids that the trained tokenizer gives the same text: the reference's last symbols. */
static void assert_as_reference(const char *text, size_t bytes, int vocab) {
    Reference *reference = reference_train(text, bytes, vocab);
    size_t json_bytes;
    char error[512];
    char *json = train_json(text, bytes, &(BpeOptions){.vocab = vocab, .pattern = CUT}, &json_bytes);
    cJSON *tree = cJSON_Parse(json);
    assert_int_equal(merges_of(tree), reference->merges);
    assert_int_equal(cJSON_GetArraySize(at(tree, "model", "vocab")), reference->tokens + 1);
    for (int i = 0; i < reference->merges; i++) {
        assert_merge(tree, i, reference->texts[reference->left[i]], reference->texts[reference->right[i]]);
    }

    Tokenizer *tokenizer = tokenizer_parse(json, json_bytes, "trained", error, sizeof error);
    if (!tokenizer) {
        fail_msg("not read back: %s", error);
    }
    int *ids = NULL, kept = 0;
    size_t count = 0;
    assert_true(tokenizer_encode(tokenizer, text, bytes, &ids, &count, error, sizeof error));
    for (size_t i = 0; i < count; i++) {
        if (ids[i] != reference->tokens) { /* the end-of-text token, which the reference leaves out */
            assert_true(kept < reference->symbols);
            assert_int_equal(ids[i], reference->ids[kept++]);
        }
    }
    assert_int_equal(kept, reference->symbols);
    free(ids);
    tokenizer_close(tokenizer);
    cJSON_Delete(tree);
    free(json);
    reference_free(reference);
}

static void test_merges_are_those_of_counting_again(void **state) {
    static const char *const alphabets[] = {"a", "ab", "ab_", "abc_", "aab_", "abcdefgh_", "\n\"\\\x7f\x01\t_"};
    char text[MOST_BYTES];
    for (uint64_t trial = 0; trial < 70; trial++) {
        const char *alphabet = alphabets[trial % 7];
        size_t bytes = random_text(trial, alphabet, (int)strlen(alphabet), text);
        assert_as_reference(text, bytes, 257 + (int)random_below(trial, 0, 60));
    }
}

/* Many pieces that are alike: counts are those of the pieces' counts. */
static void test_words_that_come_often(void **state) {
    static const char *const words[] = {"_low", "_lower", "_newest", "_widest", "_new", "_aaaaa", "_abab"};
    char text[MOST_BYTES];
    for (uint64_t trial = 0; trial < 12; trial++) {
        size_t bytes = 0;
        for (uint64_t i = 0; i < 300; i++) {
            const char *word = words[random_below(random_key(8, RANDOM_TEST, trial), i, 7)];
            memcpy(text + bytes, word, strlen(word));
            bytes += strlen(word);
        }
        assert_as_reference(text, bytes, 290);
    }
}

/* ---- by hand ---- */

static void test_a_run_of_one_letter(void **state) {
    cJSON *tree = train_words("aaaaa", 300, "a+"); /* aa aa a: neither (aa, aa) nor (aa, a) comes twice */
    assert_int_equal(merges_of(tree), 1);
    assert_merge(tree, 0, "a", "a");
    cJSON_Delete(tree);
    tree = train_words("aaa xy xy", 258, "[a-z]+"); /* (a, a) comes twice in "aaa", at its two places */
    assert_merge(tree, 0, "a", "a");
    cJSON_Delete(tree);
    tree = train_words("aaa xy xy xy", 258, "[a-z]+");
    assert_merge(tree, 0, "x", "y");
    cJSON_Delete(tree);
}

static void test_ties_go_to_the_lower_ids(void **state) {
    cJSON *tree = train_words("zb zb az az ay ay", 300, "[a-z]+");
    assert_int_equal(merges_of(tree), 3);
    assert_merge(tree, 0, "a", "y");
    assert_merge(tree, 1, "a", "z");
    assert_merge(tree, 2, "z", "b");
    cJSON_Delete(tree);
}

static void test_a_pair_that_comes_once_is_left(void **state) {
    cJSON *tree = train_words("the cat", 1000, NULL);
    assert_int_equal(merges_of(tree), 0);
    cJSON_Delete(tree);
    tree = train_words("abab", 1000, "[a-z]+"); /* ab ab, and (ab, ab) comes once */
    assert_int_equal(merges_of(tree), 1);
    assert_int_equal(cJSON_GetArraySize(at(tree, "model", "vocab")), 258);
    cJSON_Delete(tree);
}

static void test_pieces_are_not_joined(void **state) {
    cJSON *tree = train_words("a b a b a b a b", 1000, NULL); /* "a", " b", " a": GPT-2's pattern */
    assert_int_equal(merges_of(tree), 2);
    assert_merge(tree, 0, "Ġ", "b");
    assert_merge(tree, 1, "Ġ", "a");
    cJSON_Delete(tree);
}

static void test_nothing_is_learned_from_the_end_of_text(void **state) {
    cJSON *tree = train_words("x<|endoftext|>x<|endoftext|>x<|endoftext|>x", 1000, NULL);
    assert_int_equal(merges_of(tree), 0);
    cJSON_Delete(tree);
    tree = train_tree("x<s>x<s>x<|e|><|e|>", 19, &(BpeOptions){.vocab = 258, .end_of_text = "<s>"});
    assert_merge(tree, 0, "<", "|");
    cJSON_Delete(tree);
}

static void test_empty_text(void **state) {
    cJSON *tree = train_words("", 1000, NULL);
    assert_int_equal(cJSON_GetArraySize(at(tree, "model", "vocab")), 257);
    assert_int_equal(merges_of(tree), 0);
    cJSON_Delete(tree);
}

/* ---- tokenizer.json ---- */

static void assert_same_json(const cJSON *item, const char *expected) {
    cJSON *tree = cJSON_Parse(expected);
    assert_non_null(tree);
    if (!cJSON_Compare(item, tree, true)) {
        char *is = cJSON_PrintUnformatted(item);
        fail_msg("is %s, expected %s", is, expected);
    }
    cJSON_Delete(tree);
}

static void test_vocabulary_is_bytes_then_merges_then_the_end(void **state) {
    cJSON *tree = train_words("low lower lowest low low slow slow", 262, NULL);
    const cJSON *vocab = at(tree, "model", "vocab");
    assert_int_equal(cJSON_GetArraySize(vocab), 262);
    int id = 0;
    for (const cJSON *token = vocab->child; token; token = token->next, id++) {
        assert_int_equal(token->valueint, id);
        if (id < 256) {
            assert_string_equal(token->string, byte_character((unsigned char)id));
        } else if (id < 261) {
            char *made = join(merge_side(tree, id - 256, 0), merge_side(tree, id - 256, 1));
            assert_string_equal(token->string, made);
            free(made);
        } else {
            assert_string_equal(token->string, END);
        }
        for (const cJSON *other = token->next; other; other = other->next) {
            assert_string_not_equal(token->string, other->string);
        }
    }
    assert_same_json(at(tree, "added_tokens", NULL),
                     "[{\"id\":261,\"content\":\"<|endoftext|>\",\"single_word\":false,\"lstrip\":false,"
                     "\"rstrip\":false,\"normalized\":false,\"special\":true}]");
    cJSON_Delete(tree);
}

static void test_all_fields(void **state) {
    cJSON *tree = train_words("low low", 258, NULL);
    cJSON_DeleteItemFromObject(cJSON_GetObjectItem(tree, "model"), "vocab");
    cJSON_DeleteItemFromObject(tree, "added_tokens");
    assert_same_json(
        tree,
        "{\"version\":\"1.0\",\"truncation\":null,\"padding\":null,\"normalizer\":null,\"pre_tokenizer\":{"
        "\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":true},"
        "\"post_processor\":null,\"decoder\":{\"type\":\"ByteLevel\",\"add_prefix_space\":true,\"trim_offsets\":true,"
        "\"use_regex\":true},\"model\":{\"type\":\"BPE\",\"dropout\":null,\"unk_token\":null,"
        "\"continuing_subword_prefix\":null,\"end_of_word_suffix\":null,\"fuse_unk\":false,\"byte_fallback\":false,"
        "\"ignore_merges\":false,\"merges\":[[\"l\",\"o\"]]}}");
    cJSON_Delete(tree);
}

static void test_other_patterns_are_split_from_bytes(void **state) {
    cJSON *tree = train_words("low low", 258, PATTERN_QWEN2);
    const cJSON *split = cJSON_GetArrayItem(at(tree, "pre_tokenizer", "pretokenizers"), 0);
    assert_string_equal(cJSON_GetStringValue(at(split, "pattern", "Regex")), PATTERN_QWEN2);
    cJSON_Delete(tree);
    tree = train_words("low low", 258, "\\\"|\t|[a-z]+");
    assert_same_json(at(tree, "pre_tokenizer", NULL),
                     "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":"
                     "\"\\\\\\\"|\\t|[a-z]+\"},\"behavior\":\"Isolated\",\"invert\":false},{\"type\":\"ByteLevel\","
                     "\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":false}]}");
    cJSON_Delete(tree);
}

/* Words of two to five syllables. */
static char *make_text(size_t bytes) {
    static const char *const syllables[] = {"ka", "lo", "mi", "ne", "tu", "é", "'s", "12", ".\n", " "};
    char *text = malloc(bytes + 8);
    assert_non_null(text);
    uint64_t key = random_key(9, RANDOM_TEST, 0), i = 0;
    for (size_t at = 0; at < bytes;) {
        for (uint64_t left = 2 + random_below(key, i++, 4); left > 0 && at < bytes; left--) {
            const char *syllable = syllables[random_below(key, i++, left == 1 ? 10 : 8)];
            memcpy(text + at, syllable, strlen(syllable));
            at += strlen(syllable);
        }
    }
    return text;
}

static void test_same_for_any_number_of_threads(void **state) {
    size_t bytes = 60000, first_bytes, again_bytes;
    char *text = make_text(bytes);
    int threads = omp_get_max_threads();
    omp_set_num_threads(1);
    char *first = train_json(text, bytes, &(BpeOptions){.vocab = 600}, &first_bytes);
    for (int n = 1; n <= 4; n *= 2) {
        omp_set_num_threads(n);
        char *again = train_json(text, bytes, &(BpeOptions){.vocab = 600}, &again_bytes);
        assert_int_equal(again_bytes, first_bytes);
        assert_memory_equal(again, first, first_bytes);
        free(again);
    }
    omp_set_num_threads(threads);
    free(first);
    free(text);
}

/* Text that was not trained on, all bytes among it, comes back. */
static void test_encoding_and_decoding_is_the_identity(void **state) {
    char error[512], *text = make_text(20000);
    unsigned char other[4000];
    for (int i = 0; i < 4000; i++) {
        other[i] = (unsigned char)(i < 2000 ? text[i] : (int)random_below(random_key(10, RANDOM_TEST, 0), i, 256));
    }
    for (int i = 0; i < 3; i++) {
        size_t json_bytes, count, bytes;
        const char *pattern = i == 0 ? NULL : i == 1 ? PATTERN_QWEN2 : "[a-z]+|\\s";
        char *json = train_json(text, 20000, &(BpeOptions){.vocab = 400, .pattern = pattern}, &json_bytes);
        Tokenizer *tokenizer = tokenizer_parse(json, json_bytes, "trained", error, sizeof error);
        assert_non_null(tokenizer);
        assert_int_equal(tokenizer_vocab(tokenizer), 400);
        assert_int_equal(tokenizer_end_of_text(tokenizer), 399);
        int *ids;
        assert_true(tokenizer_encode(tokenizer, (char *)other, sizeof other, &ids, &count, error, sizeof error));
        assert_true(count < sizeof other);
        char *back = tokenizer_decode(tokenizer, ids, count, &bytes);
        assert_int_equal(bytes, sizeof other);
        assert_memory_equal(back, other, sizeof other);
        free(back);
        free(ids);
        tokenizer_close(tokenizer);
        free(json);
    }
    free(text);
}

/* ---- refusals and progress ---- */

static void assert_refused(const BpeOptions *options, const char *words) {
    char error[512] = "";
    size_t bytes;
    char *json = bpe_train("low low ow", 10, options, &bytes, error, sizeof error);
    if (json || !strstr(error, words) || strchr(error, '\n')) {
        fail_msg("expected one line with '%s', but got '%s'%s", words, error, json ? " and a tokenizer" : "");
    }
}

static void test_refusals(void **state) {
    assert_refused(&(BpeOptions){.vocab = 256}, "vocabulary of 256 is too small");
    assert_refused(&(BpeOptions){.vocab = -1}, "too small");
    assert_refused(&(BpeOptions){.vocab = 300, .pattern = "a("}, "pattern");
    assert_refused(&(BpeOptions){.vocab = 300, .end_of_text = ""}, "end-of-text token is empty");
    assert_refused(&(BpeOptions){.vocab = 300, .end_of_text = "<\xff>"}, "end-of-text token is not UTF-8");
    assert_refused(&(BpeOptions){.vocab = 300, .end_of_text = "x"}, "'x' is token 120 of the text");
    assert_refused(&(BpeOptions){.vocab = 300, .end_of_text = "Ġ"}, "'Ġ' is token 32 of the text");
}

typedef struct {
    int calls, last;
} Progress;

static void note_progress(int tokens, int vocab, void *user) {
    Progress *progress = user;
    assert_true(tokens >= progress->last && tokens <= vocab);
    progress->calls++;
    progress->last = tokens;
}

static void test_progress(void **state) {
    Progress progress = {0};
    size_t bytes;
    char *text = make_text(20000);
    free(train_json(text, 20000, &(BpeOptions){.vocab = 500, .progress = note_progress, .user = &progress}, &bytes));
    assert_int_equal(progress.last, 500);
    assert_true(progress.calls >= 3);
    free(text);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_merges_are_those_of_counting_again),
        cmocka_unit_test(test_words_that_come_often),
        cmocka_unit_test(test_a_run_of_one_letter),
        cmocka_unit_test(test_ties_go_to_the_lower_ids),
        cmocka_unit_test(test_a_pair_that_comes_once_is_left),
        cmocka_unit_test(test_pieces_are_not_joined),
        cmocka_unit_test(test_nothing_is_learned_from_the_end_of_text),
        cmocka_unit_test(test_empty_text),
        cmocka_unit_test(test_vocabulary_is_bytes_then_merges_then_the_end),
        cmocka_unit_test(test_all_fields),
        cmocka_unit_test(test_other_patterns_are_split_from_bytes),
        cmocka_unit_test(test_same_for_any_number_of_threads),
        cmocka_unit_test(test_encoding_and_decoding_is_the_identity),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_progress),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
