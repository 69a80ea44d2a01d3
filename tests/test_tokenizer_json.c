/* What a tokenizer.json may hold, what is refused by which name, and that nothing in a damaged one does harm.
 *
 * Read next: data/tokenizer.h, tokenizer_fixture.h; test_tokenizer.c has what is then done with text. */
#define _GNU_SOURCE /* memmem */
#include "tokenizer_fixture.h"

#include <unistd.h>

#include "../data/pretokenizer.h"

#define SPLIT(pattern, behavior, invert) \
    "{\"type\":\"Split\",\"pattern\":" pattern ",\"behavior\":\"" behavior "\",\"invert\":" invert "}"
#define QWEN2_JSON                                                                                \
    "{\"Regex\":\"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?\\\\p{L}+|\\\\p{N}|" \
    " ?[^\\\\s\\\\p{L}\\\\p{N}]+[\\\\r\\\\n]*|\\\\s*[\\\\r\\\\n]+|\\\\s+(?!\\\\S)|\\\\s+\"}"
#define GPT2_JSON                                                    \
    "{\"Regex\":\"'s|'t|'re|'ve|'m|'ll|'d| ?\\\\p{L}+| ?\\\\p{N}+| " \
    "?[^\\\\s\\\\p{L}\\\\p{N}]+|\\\\s+(?!\\\\S)|\\\\s+\"}"
#define ADDED(id, content, flags) "{\"id\":" #id ",\"content\":\"" content "\"" flags "}"

#define COUNT_OF(array) (sizeof(array) / sizeof *(array))

/* ---- pre_tokenizer: where merges may reach ---- */

/* 256 12, 257 123, 258 1a, 259 Ġ1, 260 a1, 261 ĠĠ, 262 a. */
static const JsonParts REACH = {.merges = {"1 2", "12 3", "1 a", "\xc4\xa0 1", "a 1", "\xc4\xa0 \xc4\xa0", "a ."}};

static void test_pre_tokenizers(void **state) {
    static const struct {
        const char *pre_tokenizer, *text;
        int wanted[8];
    } cases[] = {
        {BYTE_LEVEL, "a1 21", {'a', '1', ' ', '2', '1', -1}},
        {BYTE_LEVEL, "a1 1a", {'a', '1', 259, 'a', -1}},
        {BYTES_ONLY, "a.1a", {262, 258, -1}},
        {SEQUENCE("{\"type\":\"Digits\",\"individual_digits\":true}"), "a123a", {'a', '1', '2', '3', 'a', -1}},
        {SEQUENCE("{\"type\":\"Digits\",\"individual_digits\":false}"), "a123a", {'a', 257, 'a', -1}},
        {SEQUENCE("{\"type\":\"Digits\"}"), " 123", {' ', 257, -1}},
        {SEQUENCE(SPLIT("{\"Regex\":\"a|1\"}", "Isolated", "false")), "a1a123", {'a', '1', 'a', '1', '2', '3', -1}},
        {SEQUENCE(SPLIT("{\"Regex\":\"a\"}", "Isolated", "true")), "a123", {'a', 257, -1}},
        {SEQUENCE(SPLIT("{\"Regex\":\"[^a]+|a\"}", "Removed", "true")), "a123", {'a', 257, -1}},
        {SEQUENCE(SPLIT("{\"String\":\"a.\"}", "Isolated", "false")), "a.a1", {262, 260, -1}}, /* no regex: */
        {SEQUENCE(SPLIT("{\"String\":\".\"}", "Isolated", "false")), "a.a1", {'a', '.', 260, -1}},
        {SEQUENCE(
             SPLIT("{\"String\":\"2\"}", "Isolated", "false") "," SPLIT("{\"String\":\"a\"}", "Isolated", "false")),
         "123a1",
         {'1', '2', '3', 'a', '1', -1}},
        {"{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Digits\",\"individual_digits\":true}," BYTE_LEVEL "]}",
         "  12",
         {261, '1', '2', -1}},
        {SEQUENCE(SPLIT(QWEN2_JSON, "Isolated", "false")), "a1  12", {'a', '1', ' ', ' ', '1', '2', -1}},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        JsonParts parts = REACH;
        parts.pre_tokenizer = cases[i].pre_tokenizer;
        Tokenizer *t = open_parts(&parts);
        assert_ids(t, cases[i].text, cases[i].wanted);
        tokenizer_close(t);
    }
}

static void test_pattern_names(void **state) {
    static const struct {
        const char *pre_tokenizer, *wanted;
    } cases[] = {
        {BYTE_LEVEL, "gpt-2"},
        {SEQUENCE(SPLIT(GPT2_JSON, "Isolated", "false")), "gpt-2"},
        {SEQUENCE(SPLIT(GPT2_JSON, "Removed", "true")), "gpt-2"},
        {SEQUENCE(SPLIT(QWEN2_JSON, "Isolated", "false")), "qwen2"},
        {SEQUENCE(SPLIT("{\"Regex\":\"\\\\s+\"}", "Isolated", "false")), NULL},
        {"{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Digits\",\"individual_digits\":true}," BYTE_LEVEL "]}",
         NULL},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        JsonParts parts = REACH;
        parts.pre_tokenizer = cases[i].pre_tokenizer;
        Tokenizer *t = open_parts(&parts);
        const char *name = tokenizer_pattern_name(t);
        if (!name != !cases[i].wanted || (name && strcmp(name, cases[i].wanted) != 0)) {
            fail_msg("%s has the name %s", cases[i].pre_tokenizer, name);
        }
        tokenizer_close(t);
    }
}

/* Forms that give the same ids as the plain one. */
static void test_harmless_forms(void **state) {
    static const JsonParts forms[] = {
        {.merges = {"a b"},
         .model = "\"dropout\":null,\"unk_token\":null,\"continuing_subword_prefix\":\"\","
                  "\"end_of_word_suffix\":null,\"fuse_unk\":true,\"byte_fallback\":false,"},
        {.merges = {"a b"}, .model = "\"dropout\":0.0,"},
        {.merges = {"a b"}, .pairs = true},
        {.merges = {"a b"}, .decoder = "{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"ByteLevel\"}]}"},
        {.merges = {"a b"}, .decoder = "{\"type\":\"ByteLevel\",\"add_prefix_space\":true,\"use_regex\":false}"},
        {.merges = {"a b"}, .pre_tokenizer = "{\"type\":\"ByteLevel\",\"add_prefix_space\":false}"},
        {.merges = {"a b"}, .pre_tokenizer = SEQUENCE(SPLIT(GPT2_JSON, "Isolated", "false"))},
    };
    Tokenizer *plain = open_parts(&(JsonParts){.merges = {"a b"}});
    for (size_t i = 0; i < COUNT_OF(forms); i++) {
        Tokenizer *t = open_parts(&forms[i]);
        assert_ids(t, "ab a", IDS(256, ' ', 'a'));
        assert_int_equal(tokenizer_hash(t), tokenizer_hash(plain));
        tokenizer_close(t);
    }
    tokenizer_close(plain);
}

/* ---- the hash ---- */

static void test_hash(void **state) {
    static const JsonParts others[] = {
        {.merges = {"a b", "b c"}},
        {.merges = {"a b", "b c", "ab c"}},
        {.merges = {"b c", "a b"}},
        {.merges = {"a b", "b c"}, .pre_tokenizer = BYTES_ONLY},
        {.merges = {"a b", "b c"}, .pre_tokenizer = SEQUENCE(SPLIT("{\"Regex\":\"b\"}", "Isolated", "false"))},
        {.merges = {"a b", "b c"}, .normalizer = "{\"type\":\"NFC\"}"},
        {.merges = {"a b", "b c"}, .model = "\"ignore_merges\":true,"},
        {.merges = {"a b", "b c"}, .vocab = ",\"xyz\":300"},
        {.merges = {"a b", "b c"}, .vocab = ",\"xyz\":301"},
        {.merges = {"a b", "b c"}, .added = ADDED(300, "xyz", "")},
        {.added = ADDED(300, "xyz", ",\"normalized\":true"), .merges = {"b c"}},
    };
    uint32_t hashes[COUNT_OF(others)];
    for (size_t i = 0; i < COUNT_OF(others); i++) {
        Tokenizer *t = open_parts(&others[i]);
        hashes[i] = tokenizer_hash(t);
        assert_int_not_equal(hashes[i], 0);
        tokenizer_close(t);
        for (size_t j = 0; j < i; j++) {
            if (hashes[i] == hashes[j]) {
                fail_msg("tokenizers %zu and %zu have the same hash", j, i);
            }
        }
    }
    static const char spread[] =
        "{ \"model\" : {\"merges\":[\"a \\u0062\"], \"vocab\":{\"ab\":2,\n\"b\":1.0, \"\\u0061\":0}, \"type\":\"BPE\"},"
        "\"decoder\":{\"type\":\"ByteLevel\"}, \"pre_tokenizer\":" BYTE_LEVEL "}\n\n";
    static const char tight[] = "{\"added_tokens\":[],\"pre_tokenizer\":" BYTE_LEVEL
                                ",\"decoder\":{\"type\":\"ByteLevel\"},"
                                "\"model\":{\"vocab\":{\"a\":0,\"b\":1,\"ab\":2},\"merges\":[[\"a\",\"b\"]]}}";
    char error[512] = "";
    Tokenizer *a = tokenizer_parse(spread, sizeof spread - 1, "spread", error, sizeof error);
    Tokenizer *b = tokenizer_parse(tight, sizeof tight - 1, "tight", error, sizeof error);
    if (!a || !b) {
        fail_msg("%s", error);
    }
    assert_int_equal(tokenizer_hash(a), tokenizer_hash(b));
    size_t bytes;
    assert_memory_equal(tokenizer_json(a, &bytes), spread, sizeof spread - 1); /* the file's own bytes */
    assert_int_equal(bytes, sizeof spread - 1);
    tokenizer_close(a);
    tokenizer_close(b);
}

/* ---- refusals ---- */

static void assert_json_refused(const char *json, size_t bytes, const char *word) {
    char error[512] = "";
    Tokenizer *t = tokenizer_parse(json, bytes, "some.json", error, sizeof error);
    tokenizer_close(t);
    if (t || !strstr(error, word) || !strstr(error, "some.json") || strchr(error, '\n')) {
        fail_msg("expected a line with '%s', but %s '%s': %.300s", word, t ? "taken" : "got", error, json);
    }
}

static void test_refused_parts(void **state) {
    static const struct {
        JsonParts parts;
        const char *word;
    } cases[] = {
        {{.model = "\"dropout\":0.1,"}, "dropout"},
        {{.model = "\"unk_token\":\"<unk>\","}, "unk_token"},
        {{.model = "\"byte_fallback\":true,"}, "byte_fallback"},
        {{.model = "\"continuing_subword_prefix\":\"##\","}, "continuing_subword_prefix"},
        {{.model = "\"end_of_word_suffix\":\"</w>\","}, "end_of_word_suffix"},
        {{.normalizer = "{\"type\":\"NFKC\"}"}, "NFKC"},
        {{.normalizer = "{\"type\":\"Lowercase\"}"}, "Lowercase"},
        {{.normalizer = "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFC\"},{\"type\":\"Strip\"}]}"},
         "normalizer"},
        {{.pre_tokenizer = "null"}, "ByteLevel"},
        {{.pre_tokenizer = "{\"type\":\"Whitespace\"}"}, "Whitespace"},
        {{.pre_tokenizer = "{\"type\":\"Metaspace\"}"}, "Metaspace"},
        {{.pre_tokenizer = "{\"type\":\"Digits\"}"}, "ByteLevel"},
        {{.pre_tokenizer = "{\"type\":\"ByteLevel\",\"add_prefix_space\":true}"}, "add_prefix_space"},
        {{.pre_tokenizer = "{\"type\":\"Sequence\",\"pretokenizers\":[" BYTE_LEVEL ",{\"type\":\"Digits\"}]}"},
         "after ByteLevel"},
        {{.pre_tokenizer = SEQUENCE(SPLIT("{\"Regex\":\"a\"}", "MergedWithNext", "false"))}, "MergedWithNext"},
        {{.pre_tokenizer = SEQUENCE(SPLIT("{\"Regex\":\"a\"}", "Removed", "false"))}, "Removed"},
        {{.pre_tokenizer = SEQUENCE(SPLIT("{\"Glob\":\"a\"}", "Isolated", "false"))}, "Regex"},
        {{.pre_tokenizer = SEQUENCE(SPLIT("{\"Regex\":\"(a\"}", "Isolated", "false"))}, "(a"},
        {{.decoder = "{\"type\":\"WordPiece\"}"}, "WordPiece"},
        {{.decoder = "null"}, "decoder"},
        {{.added = ADDED(300, "<x>", ",\"lstrip\":true")}, "lstrip"},
        {{.added = ADDED(300, "<x>", ",\"rstrip\":true")}, "rstrip"},
        {{.added = ADDED(300, "<x>", ",\"single_word\":true")}, "single_word"},
        {{.added = ADDED(300, "", "")}, "added token"},
        {{.added = ADDED(97, "<x>", "")}, "<x>"}, /* the id of a */
        {{.added = ADDED(300, "a", "")}, "a"},    /* a has an id */
        {{.added = ADDED(300, "<x>", "") "," ADDED(300, "<y>", "")}, "<y>"},
        {{.added = ADDED(300, "<x>", "") "," ADDED(301, "<x>", "")}, "<x>"},
        {{.added = ADDED(1048576, "<x>", "")}, "2^20"},
        {{.added = "{\"id\":300}"}, "content"},
        {{.added = "{\"content\":\"<x>\"}"}, "id"},
        {{.merges = {"\xc4\xa0 a"},
          .added = ADDED(256,
                         "\xc4\xa0"
                         "a",
                         "")},
         "merge 0"}, /* " a" by the merge */
        {{.normalizer = "{\"type\":\"NFC\"}", .added = ADDED(300, "b\xcc\x87", ",\"normalized\":true")},
         "normal form C"},
        {{.vocab = ",\"zz\":97"}, "zz"},
        {{.vocab = ",\"a\":300"}, "a"},
        {{.vocab = ",\"zz\":1048576"}, "2^20"},
        {{.vocab = ",\"zz\":-1"}, "zz"},
        {{.vocab = ",\"zz\":300.5"}, "zz"},
        {{.vocab = ",\"zz\":1e300"}, "zz"},
        {{.vocab = ",\"zz\":\"300\""}, "zz"},
        {{.vocab = ",\"\":300"}, "text"},
        {{.vocab = ",\"z z\":300"}, "z z"}, /* a blank stands for no byte */
        {{.vocab = ",\"\xe6\x97\xa5\":300"}, "\xe6\x97\xa5"},
        {{.merges = {"a b"}, .no_bytes = true, .vocab = "\"a\":0,\"ab\":1"}, "merge 0"},
        {{.merges = {"a b"}, .no_bytes = true, .vocab = "\"a\":0,\"b\":1"}, "merge 0"},
        {{.no_bytes = true, .vocab = ""}, "token"},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        size_t bytes;
        char *json = make_json(&cases[i].parts, &bytes);
        assert_json_refused(json, bytes, cases[i].word);
        free(json);
    }
}

#define SMALL(vocab, merges) \
    "{\"added_tokens\":[{\"id\":4,\"content\":\"<e>\",\"special\":true}],\"normalizer\":{\"type\":\"NFC\"}," \
    "\"pre_tokenizer\":" SEQUENCE(SPLIT("{\"Regex\":\"a|\\\\s+\"}", "Isolated", "false")) ","               \
    "\"decoder\":{\"type\":\"ByteLevel\"},\"model\":{\"type\":\"BPE\",\"vocab\":{" vocab "},\"merges\":" merges "}}"

static void test_refused_files(void **state) {
    static const struct {
        const char *json, *word;
    } cases[] = {
        {"", ""},
        {"[]", ""},
        {"{}", ""},
        {"{\"model\":{\"type\":\"Unigram\",\"vocab\":[]}}", "Unigram"},
        {"{\"model\":{\"type\":\"WordPiece\",\"vocab\":{}}}", "WordPiece"},
        {SMALL("\"a\":0", "[]") "x", ""},
        {SMALL("\"a\":0", "null"), "merges"},
        {SMALL("\"a\":0", "[\"a\"]"), "merge 0"},
        {SMALL("\"a\":0,\"aa\":1", "[\"a a \"]"), "merge 0"},
        {SMALL("\"a\":0,\"aa\":1", "[[\"a\",\"a\",\"a\"]]"), "merge 0"},
        {SMALL("\"a\":0,\"aa\":1", "[[\"a\"]]"), "merge 0"},
        {SMALL("\"a\":0,\"aa\":1", "[\"a a\",7]"), "merge 1"},
        {SMALL("\"a\\u0000b\":0,\"c\":1", "[]"), "u0000"}, /* a text would end there */
        {SMALL("\"\xff\":0", "[]"), "UTF-8"},
        {"{\"added_tokens\":[{\"id\":0,\"content\":\"\xff\"}],\"pre_tokenizer\":" BYTE_LEVEL
         ",\"decoder\":{\"type\":\"ByteLevel\"},\"model\":{\"vocab\":{\"a\":1},\"merges\":[]}}",
         "UTF-8"},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        assert_json_refused(cases[i].json, strlen(cases[i].json), cases[i].word);
    }
}

/* ---- damaged files ---- */

static const char WHOLE[] = SMALL("\"a\":0,\"b\":1,\"ab\":2,\"\xc4\xa0\":3", "[\"a b\",[\"a\",\"b\"]]");

/* Whatever is taken gives ids of its own, and they the text. */
static void try_file(const char *json, size_t bytes) {
    char error[512] = "";
    char *copy = malloc(bytes ? bytes : 1); /* so that reading on is found out */
    assert_non_null(copy);
    memcpy(copy, json, bytes);
    Tokenizer *t = tokenizer_parse(copy, bytes, "damaged", error, sizeof error);
    free(copy);
    if (!t) {
        assert_true(error[0] && !strchr(error, '\n'));
        return;
    }
    int *ids;
    size_t count, length;
    if (tokenizer_encode(t, "ab <e>aab", 9, &ids, &count, error, sizeof error)) {
        char *text = tokenizer_decode(t, ids, count, &length);
        assert_string_equal(text, "ab <e>aab");
        free(text);
        free(ids);
    }
    tokenizer_close(t);
}

static void test_truncated(void **state) {
    char error[512] = "";
    Tokenizer *t = tokenizer_parse(WHOLE, sizeof WHOLE - 1, "whole", error, sizeof error);
    if (!t) {
        fail_msg("%s", error);
    }
    tokenizer_close(t);
    for (size_t bytes = 0; bytes < sizeof WHOLE - 1; bytes++) {
        char *copy = malloc(bytes + 1);
        assert_non_null(copy);
        memcpy(copy, WHOLE, bytes);
        assert_null(tokenizer_parse(copy, bytes, "truncated", error, sizeof error));
        assert_true(error[0] && !strchr(error, '\n'));
        free(copy);
    }
}

static void test_changed_bytes(void **state) {
    static const char values[] = "\"\\{}[],:0-9a \xff";
    char json[sizeof WHOLE];
    for (size_t at = 0; at < sizeof WHOLE - 1; at++) {
        for (size_t v = 0; v < sizeof values; v++) { /* NUL, too */
            memcpy(json, WHOLE, sizeof WHOLE);
            json[at] = values[v];
            try_file(json, sizeof WHOLE - 1);
        }
    }
}

/* ---- files ---- */

static void test_open(void **state) {
    char folder[] = "/tmp/moelab-tokenizer-XXXXXX", path[64], error[512] = "";
    assert_non_null(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/tokenizer.json", folder);
    assert_null(tokenizer_open(path, error, sizeof error));
    assert_non_null(strstr(error, path));
    assert_null(tokenizer_open(folder, error, sizeof error));
    assert_non_null(strstr(error, folder));
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(WHOLE, 1, sizeof WHOLE - 1, file), sizeof WHOLE - 1);
    assert_int_equal(fclose(file), 0);
    Tokenizer *t = tokenizer_open(path, error, sizeof error);
    assert_non_null(t);
    size_t bytes;
    assert_memory_equal(tokenizer_json(t, &bytes), WHOLE, sizeof WHOLE - 1);
    assert_int_equal(bytes, sizeof WHOLE - 1);
    assert_ids(t, "ab <e>", IDS(0, 1, 3, 4)); /* the pattern keeps a and b apart */
    tokenizer_close(t);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(rmdir(folder), 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pre_tokenizers), cmocka_unit_test(test_pattern_names),
        cmocka_unit_test(test_harmless_forms), cmocka_unit_test(test_hash),
        cmocka_unit_test(test_refused_parts),  cmocka_unit_test(test_refused_files),
        cmocka_unit_test(test_truncated),      cmocka_unit_test(test_changed_bytes),
        cmocka_unit_test(test_open),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
