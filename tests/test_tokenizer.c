/* Text to ids and back: bytes, merges by hand and against a plain reference, added tokens, normal form C, and any
 * number of threads. What a tokenizer.json may hold is tested by test_tokenizer_json.c.
 *
 * Read next: data/tokenizer.h, tokenizer_fixture.h. */
#include "tokenizer_fixture.h"

#include "../data/tokenizer_parts.h"
#include "../kernels/random.h"
#include "threads.h"

#define ADDED(id, content, special) \
    "{\"id\":" #id ",\"content\":\"" content "\",\"normalized\":false,\"special\":" #special "}"

#define ADDED_NORMALIZED(id, content) \
    "{\"id\":" #id ",\"content\":\"" content "\",\"normalized\":true,\"special\":false}"

#define COUNT_OF(array) (sizeof(array) / sizeof *(array))

/* ---- bytes ---- */

static void test_byte_characters(void **state) {
    assert_string_equal(byte_character(0), "\xc4\x80");    /* U+0100 */
    assert_string_equal(byte_character('\n'), "\xc4\x8a"); /* U+010A */
    assert_string_equal(byte_character(' '), "\xc4\xa0");  /* U+0120 */
    assert_string_equal(byte_character('!'), "!");
    assert_string_equal(byte_character('~'), "~");
    assert_string_equal(byte_character(127), "\xc4\xa1");  /* U+0121 */
    assert_string_equal(byte_character(0xa0), "\xc5\x82"); /* U+0142 */
    assert_string_equal(byte_character(0xa1), "\xc2\xa1"); /* itself */
    assert_string_equal(byte_character(0xad), "\xc5\x83"); /* U+0143 */
    assert_string_equal(byte_character(0xff), "\xc3\xbf"); /* itself */
    for (int a = 0; a < 256; a++) {
        for (int b = 0; b < a; b++) {
            assert_string_not_equal(byte_character((unsigned char)a), byte_character((unsigned char)b));
        }
    }
}

static void test_bytes(void **state) {
    char error[512] = "";
    size_t json_bytes, count, length;
    Tokenizer *t = tokenizer_bytes();
    assert_non_null(t);
    assert_true(tokenizer_is_bytes(t));
    assert_int_equal(tokenizer_vocab(t), 256);
    assert_int_equal(tokenizer_merges(t), 0);
    assert_int_equal(tokenizer_end_of_text(t), -1);
    assert_null(tokenizer_token(t, 256, &length));
    assert_null(tokenizer_token(t, -1, &length));
    const char *json = tokenizer_json(t, &json_bytes);
    Tokenizer *read = tokenizer_parse(json, json_bytes, "bytes", error, sizeof error);
    assert_non_null(read);
    assert_true(tokenizer_is_bytes(read)); /* the same, though from a file */
    assert_int_equal(tokenizer_hash(read), tokenizer_hash(t));
    char text[256];
    for (int i = 0; i < 256; i++) {
        text[i] = (char)(255 - i);
        assert_int_equal((unsigned char)*tokenizer_token(t, i, &length), i);
        assert_int_equal(length, 1);
        assert_string_equal(tokenizer_token_text(t, i), byte_character((unsigned char)i));
        assert_false(tokenizer_is_special(t, i) || tokenizer_is_added(t, i));
    }
    const Tokenizer *both[] = {t, read};
    for (int which = 0; which < 2; which++) {
        int *ids = encode(both[which], text, sizeof text, &count);
        assert_int_equal(count, 256);
        for (int i = 0; i < 256; i++) {
            assert_int_equal(ids[i], 255 - i);
        }
        free(ids);
        free(encode(both[which], "", 0, &count));
        assert_int_equal(count, 0);
    }
    tokenizer_close(read);
    tokenizer_close(t);
    tokenizer_close(NULL);
}

/* ---- merges ---- */

static void test_merges_by_hand(void **state) {
    enum { SP = ' ' };
    /* 256 lo, 257 er, 258 low, 259 Ġlow, 260 Ġlower, 261 aa, 262 bc, 263 ab, 264 zz, 265 zzz */
    Tokenizer *t = open_parts(&(JsonParts){
        .merges = {"l o", "e r", "lo w", "\xc4\xa0 low", "\xc4\xa0low er", "a a", "b c", "a b", "z z", "z zz"}});
    assert_ids(t, "low lower lowest", IDS(258, 260, 259, 'e', 's', 't'));
    assert_ids(t, "abc", IDS('a', 262));  /* b c has the lower rank */
    assert_ids(t, "abab", IDS(263, 263)); /* equal ranks: from the left */
    assert_ids(t, "aaa", IDS(261, 'a'));
    assert_ids(t, "aaaaa", IDS(261, 261, 'a'));
    assert_ids(t, "zzz", IDS(264, 'z'));      /* zz z has no merge, z zz comes too late */
    assert_ids(t, "a aa", IDS('a', SP, 261)); /* not across pieces */
    assert_ids(t, "lo\xffw\xc3", IDS(256, 0xff, 'w', 0xc3));
    assert_ids(t, "", IDS(-1));
    assert_int_equal(tokenizer_merges(t), 10);
    assert_string_equal(tokenizer_merge_text(t, 3), "\xc4\xa0 low");
    size_t length;
    assert_memory_equal(tokenizer_token(t, 260, &length), " lower", 6);
    assert_int_equal(length, 6);
    assert_string_equal(tokenizer_token_text(t, 260), "\xc4\xa0lower");
    tokenizer_close(t);
}

/* A reference that looks for the best pair from the beginning before each merge. */
typedef struct {
    int left[MOST_MERGES], right[MOST_MERGES], count; /* the result of merge i is 256 + i */
} PlainMerges;

static size_t merge_plainly(const PlainMerges *merges, int *ids, size_t count) {
    for (int rank = 0; rank < merges->count; rank++) {
        for (size_t i = 0; i + 1 < count; i++) {
            if (ids[i] == merges->left[rank] && ids[i + 1] == merges->right[rank]) {
                ids[i] = 256 + rank;
                count--;
                memmove(ids + i + 1, ids + i + 2, (count - i - 1) * sizeof *ids);
                rank = -1; /* a merge may make a pair of a lower rank */
                break;
            }
        }
    }
    return count;
}

/* Random merges of a and b, in random order of rank: of short and long pieces. */
static void test_random_merges(void **state) {
    uint64_t key = random_key(2, RANDOM_TEST, 0), draw = 0;
    for (int round = 0; round < 40; round++) {
        char texts[MOST_MERGES][256] = {""}, merges[MOST_MERGES][256];
        int left[MOST_MERGES], right[MOST_MERGES], made = 0;
        while (made < 20) { /* tokens 0 and 1 are a and b, 2 + i is the result of merge i */
            int a = (int)random_below(key, draw++, 2 + made), b = (int)random_below(key, draw++, 2 + made);
            const char *text_a = a < 2 ? (a ? "b" : "a") : texts[a - 2],
                       *text_b = b < 2 ? (b ? "b" : "a") : texts[b - 2];
            char whole[512];
            snprintf(whole, sizeof whole, "%s%s", text_a, text_b);
            bool there = strlen(whole) > 100;
            for (int i = 0; i < made && !there; i++) {
                there = strcmp(texts[i], whole) == 0;
            }
            if (!there) {
                strcpy(texts[made], whole);
                snprintf(merges[made], sizeof merges[made], "%s %s", text_a, text_b);
                left[made] = a;
                right[made++] = b;
            }
        }
        int order[MOST_MERGES], place[MOST_MERGES]; /* of rank, and back: a merge may come before those it needs */
        for (int i = 0; i < made; i++) {
            int j = (int)random_below(key, draw++, i + 1);
            order[i] = order[j];
            order[j] = i;
        }
        JsonParts parts = {.pre_tokenizer = BYTES_ONLY, .pairs = round % 2};
        for (int i = 0; i < made; i++) {
            parts.merges[i] = merges[order[i]];
            place[order[i]] = i;
        }
        PlainMerges plain = {.count = made};
        for (int i = 0; i < made; i++) {
            int a = left[order[i]], b = right[order[i]];
            plain.left[i] = a < 2 ? 'a' + a : 256 + place[a - 2];
            plain.right[i] = b < 2 ? 'a' + b : 256 + place[b - 2];
        }
        Tokenizer *t = open_parts(&parts);
        for (int repeat = 0; repeat < 12; repeat++) {
            char text[700];
            int wanted[700];
            size_t bytes = random_below(key, draw++, repeat % 3 ? 60 : sizeof text), count;
            for (size_t i = 0; i < bytes; i++) {
                text[i] = (char)('a' + random_below(key, draw++, 2));
                wanted[i] = text[i];
            }
            int *ids = encode(t, text, bytes, &count);
            assert_int_equal(count, merge_plainly(&plain, wanted, bytes));
            assert_memory_equal(ids, wanted, count * sizeof *ids);
            free(ids);
        }
        tokenizer_close(t);
    }
}

static void test_long_piece(void **state) {
    enum { RUN = 1 << 20 };
    Tokenizer *t = open_parts(&(JsonParts){.merges = {"a a", "aa aa", "aaaa aaaa"}});
    char *text = malloc(RUN + 3);
    assert_non_null(text);
    memset(text, 'a', RUN + 3);
    size_t count;
    int *ids = encode(t, text, RUN + 3, &count);
    assert_int_equal(count, RUN / 8 + 2);
    for (size_t i = 0; i < RUN / 8; i++) {
        assert_int_equal(ids[i], 258);
    }
    assert_int_equal(ids[RUN / 8], 256);
    assert_int_equal(ids[RUN / 8 + 1], 'a');
    free(ids);
    free(text);
    tokenizer_close(t);
}

static void test_ignore_merges(void **state) {
    const char *vocab = ",\"whole\":300,\"\xc4\xa0whole\":301";
    Tokenizer *t = open_parts(&(JsonParts){.merges = {"w h"}, .vocab = vocab, .model = "\"ignore_merges\":true,"});
    assert_ids(t, "whole whole wholes", IDS(300, 301, ' ', 256, 'o', 'l', 'e', 's'));
    tokenizer_close(t);
    t = open_parts(&(JsonParts){.merges = {"w h"}, .vocab = vocab, .model = "\"ignore_merges\":false,"});
    assert_ids(t, "whole", IDS(256, 'o', 'l', 'e'));
    tokenizer_close(t);
}

static void test_byte_without_token(void **state) {
    JsonParts parts = {.no_bytes = true, .vocab = "\"a\":0,\"b\":1,\"\xc3\xa9\":2", .pre_tokenizer = BYTES_ONLY};
    Tokenizer *t = open_parts(&parts);
    char error[512];
    int *ids;
    size_t count;
    assert_ids(t, "ab\xe9", IDS(0, 1, 2));
    assert_false(tokenizer_encode(t, "abc\xff", 4, &ids, &count, error, sizeof error));
    assert_non_null(strstr(error, "0x63"));
    tokenizer_close(t);
}

/* ---- added tokens ---- */

static void test_added_tokens(void **state) {
    Tokenizer *t = open_parts(
        &(JsonParts){.merges = {"x y"},
                     .vocab = ",\"<|endoftext|>\":300",
                     .added = ADDED(300, "<|endoftext|>", true) "," ADDED(400, "<e>", true) "," ADDED(
                         401, "<e><x>", false) "," ADDED(402, "\xe6\x97\xa5 ", false) "," ADDED(403, "yy", false)});
    assert_int_equal(tokenizer_vocab(t), 404);
    assert_ids(t, "<|endoftext|>", IDS(300));
    assert_ids(t, "xy<|endoftext|>xy<|endoftext|",
               IDS(256, 300, 256, '<', '|', 'e', 'n', 'd', 'o', 'f', 't', 'e', 'x', 't', '|'));
    assert_ids(t, "<e><x><e><e", IDS(401, 400, '<', 'e')); /* the longest */
    assert_ids(t, "\xe6\x97\xa5 a", IDS(402, 'a'));
    assert_ids(t, "xyyy", IDS('x', 403, 'y')); /* before merges, and the leftmost */
    assert_ids(t, "\xff<e>\xff", IDS(0xff, 400, 0xff));
    assert_ids(t, "  <e>  x", IDS(' ', ' ', 400, ' ', ' ', 'x'));
    size_t length;
    assert_memory_equal(tokenizer_token(t, 402, &length), "\xe6\x97\xa5 ", 4);
    assert_int_equal(length, 4);
    assert_true(tokenizer_is_special(t, 300) && tokenizer_is_special(t, 400) && !tokenizer_is_special(t, 401));
    assert_true(tokenizer_is_added(t, 300) && tokenizer_is_added(t, 401) && !tokenizer_is_added(t, 256));
    assert_null(tokenizer_token(t, 350, &length));
    assert_null(tokenizer_token_text(t, 350));
    assert_int_equal(tokenizer_end_of_text(t), 300);
    size_t bytes;
    char *text = tokenizer_decode(t, IDS(300, 350, 'a', 9999, -5), 5, &bytes); /* some ids stand for nothing */
    assert_string_equal(text, "<|endoftext|>a");
    assert_int_equal(bytes, 14);
    free(text);
    tokenizer_close(t);
}

/* Tokens that are looked for in the raw text come first, those of the normalised text between them. */
static void test_raw_and_normalized(void **state) {
    /* 302 is b with a dot above, 303 d with a dot above; the dot alone is CC 87 */
    static const char added[] = ADDED(300, "ab", true) "," ADDED_NORMALIZED(301, "xa") "," ADDED_NORMALIZED(
        302, "\xe1\xb8\x83") "," ADDED(303, "\xe1\xb8\x8b", true);
    Tokenizer *t = open_parts(&(JsonParts){.normalizer = "{\"type\":\"NFC\"}", .added = added});
    assert_ids(t, "xab", IDS('x', 300));
    assert_ids(t, "xac\xc3\xbc", IDS(301, 'c', 0xc3, 0xbc));
    assert_ids_and_text(t, "b\xcc\x87\xe1\xb8\x83", IDS(302, 302), "\xe1\xb8\x83\xe1\xb8\x83");
    assert_ids_and_text(t, "d\xcc\x87\xe1\xb8\x8b", IDS(0xe1, 0xb8, 0x8b, 303), /* the first is not in the raw text */
                        "\xe1\xb8\x8b\xe1\xb8\x8b");
    tokenizer_close(t);
    t = open_parts(&(JsonParts){.added = added});
    assert_ids(t, "xab", IDS('x', 300));
    assert_ids(t, "xac", IDS(301, 'c'));
    assert_ids(t, "b\xcc\x87\xe1\xb8\x83\xe1\xb8\x8b", IDS('b', 0xcc, 0x87, 302, 303));
    tokenizer_close(t);
}

static void test_end_of_text(void **state) {
    static const struct {
        const char *added;
        int wanted;
    } cases[] = {{ADDED(256, "</s>", true) "," ADDED(257, "<|endoftext|>", true), 257},
                 {ADDED(256, "<eos>", true) "," ADDED(257, "</s>", true), 257},
                 {ADDED(256, "<|end_of_text|>", true) "," ADDED(257, "<eos>", true), 257},
                 {ADDED(256, "<|end_of_text|>", true), 256},
                 {ADDED(256, "<|endoftext|>", false) "," ADDED(257, "</s>", true), 257},
                 {ADDED(256, "<pad>", true), -1}};
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        Tokenizer *t = open_parts(&(JsonParts){.added = cases[i].added});
        assert_int_equal(tokenizer_end_of_text(t), cases[i].wanted);
        tokenizer_close(t);
    }
}

/* ---- normal form C ---- */

static void test_nfc(void **state) {
    Tokenizer *t = open_parts(&(JsonParts){
        .normalizer = "{\"type\":\"NFC\"}", .pre_tokenizer = BYTES_ONLY, .added = ADDED(300, "e\xcc\x81!", false)});
    static const struct {
        const char *text, *wanted;
    } cases[] = {
        {"plain", "plain"},
        {"e\xcc\x81", "\xc3\xa9"},                                /* composed */
        {"ae\xcc\x81n", "a\xc3\xa9n"},                            /* in the middle of ASCII */
        {"\xe2\x84\xab", "\xc3\x85"},                             /* the angstrom sign is a letter */
        {"a\xcc\x81\xcc\xa3", "\xe1\xba\xa1\xcc\x81"},            /* marks in their order: dot below first */
        {"\xe1\x84\x80\xe1\x85\xa1\xe1\x86\xa8", "\xea\xb0\x81"}, /* Hangul */
        {"\xe0\xa5\x98", "\xe0\xa4\x95\xe0\xa4\xbc"},             /* excluded from composition */
        {"\xff"
         "e\xcc\x81\xcc",
         "\xff\xc3\xa9\xcc"},               /* what is no text stays */
        {"e\xff\xcc\x81", "e\xff\xcc\x81"}, /* and keeps apart */
        {"e\n\xcc\x81"
         "e\xcc\x81\n",
         "e\n\xcc\x81\xc3\xa9\n"},
        {"e\xcc\x81!e\xcc\x81", "e\xcc\x81!\xc3\xa9"}, /* an added token stays as it is */
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        size_t count, bytes;
        int *ids = encode(t, cases[i].text, strlen(cases[i].text), &count);
        char *text = tokenizer_decode(t, ids, count, &bytes);
        assert_string_equal(text, cases[i].wanted);
        assert_int_equal(bytes, strlen(cases[i].wanted));
        assert_int_equal(count, bytes - (strchr(cases[i].text, '!') ? 3 : 0));
        free(text);
        free(ids);
    }
    tokenizer_close(t);
}

/* ---- any text comes back, with any number of threads ---- */

static size_t random_text(uint64_t key, char *text, size_t most) {
    static const char *const parts[] = {
        "a",
        "aaaa",
        "ab",
        " ",
        "    ",
        "\n",
        "\r\n",
        "7",
        "42",
        "'s",
        "!",
        "\xc3\xa9",
        "e\xcc\x81",
        "\xf0\x9f\x98\x80",
        "\xe2\x80\x8d",
        "\xef\xbb\xbf",
        "\xd7\xa9",
        "\xc2\x85",
        "\xe2\x80\xa8",
        "\xe1\xa0\x8e",
        "\xff",
        "\xe6\x97",
        "\x80",
        "\xc0\xaf",
        "\xed\xa0\x80",
        "\xf4\x90\x80\x80",
        "<|e|>",
        "<|e",
        "|>",
        "<|e|><|e|>",
        "\xe6\x97\xa5",
    };
    size_t bytes = 0, wanted = random_below(key, 0, most - 16);
    for (uint64_t draw = 1; bytes < wanted;) {
        const char *part = parts[random_below(key, draw++, COUNT_OF(parts))];
        uint64_t kind = random_below(key, draw++, 64);
        size_t times = kind == 0 ? random_below(key, draw++, 300) : 1; /* now and then a long run */
        for (size_t i = 0; i < times && bytes < wanted; i++) {
            memcpy(text + bytes, part, strlen(part));
            bytes += strlen(part);
        }
        if (kind == 1) {
            text[bytes++] = '\0';
        }
    }
    return bytes;
}

static void assert_same_in_chunks(const Tokenizer *t, const char *text, size_t bytes) {
    char error[512] = "";
    size_t count, other_count, decoded_bytes;
    int *ids, *other;
    omp_set_num_threads(1);
    assert_true(tokenizer_encode_chunked(t, text, bytes, bytes + 1, &ids, &count, error, sizeof error));
    char *decoded = tokenizer_decode(t, ids, count, &decoded_bytes);
    assert_int_equal(decoded_bytes, bytes);
    assert_memory_equal(decoded, text, bytes);
    assert_int_equal(decoded[bytes], 0);
    static const size_t chunks[] = {3, 7, 16, 61, 200, 1000};
    for (size_t i = 0; i < COUNT_OF(chunks); i++) {
        omp_set_num_threads(1 + (int)i % 4);
        assert_true(tokenizer_encode_chunked(t, text, bytes, chunks[i], &other, &other_count, error, sizeof error));
        if (other_count != count || memcmp(ids, other, count * sizeof *ids) != 0) {
            fail_msg("in chunks of %zu bytes the text gave other ids", chunks[i]);
        }
        free(other);
    }
    omp_set_num_threads(1);
    free(decoded);
    free(ids);
}

static const char *const SPLITS[] = {
    BYTE_LEVEL,
    BYTES_ONLY,
    SEQUENCE("{\"type\":\"Digits\",\"individual_digits\":true},{\"type\":\"Split\",\"pattern\":{\"Regex\":\" "
             "?a+|\\\\s+\"},\"behavior\":\"Isolated\"}"),
    SEQUENCE("{\"type\":\"Split\",\"pattern\":{\"Regex\":\"(?<=a)b| +|[^ ]\"},\"behavior\":\"Isolated\"}"),
    SEQUENCE("{\"type\":\"Split\",\"pattern\":{\"Regex\":\"(?:aa)+|x*\"},\"behavior\":\"Isolated\"}"),
    /* a boundary of the second pattern inside a piece of the first: from there on pieces may still differ */
    SEQUENCE("{\"type\":\"Split\",\"pattern\":{\"Regex\":\".{3}\"},\"behavior\":\"Isolated\"},"
             "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"..\"},\"behavior\":\"Isolated\"}"),
};

static void test_threads(void **state) {
    enum { MOST = 1500 };
    char *text = malloc(MOST);
    assert_non_null(text);
    for (size_t split = 0; split < COUNT_OF(SPLITS); split++) {
        Tokenizer *t =
            open_parts(&(JsonParts){.merges = {"a a", "aa aa", "\xc4\xa0 a", "\xc4\xa0 \xc4\xa0", "\xc3\xa9 \xc2\xa9",
                                               "\xc3\x83 \xc2\xa9", "aa b", "\xc4\x8a \xc4\x8a"},
                                    .pre_tokenizer = SPLITS[split],
                                    .added = ADDED(300, "<|e|>", true) "," ADDED(301, "|><|", false)});
        for (uint64_t round = 0; round < 8; round++) {
            assert_same_in_chunks(t, text, random_text(random_key(round, RANDOM_TEST, split), text, MOST));
        }
        memset(text, ' ', MOST);
        assert_same_in_chunks(t, text, MOST);
        memset(text, 'a', MOST);
        assert_same_in_chunks(t, text, MOST);
        for (size_t i = 0; i < MOST; i++) {
            text[i] = "<|e|>"[i % 5];
        }
        assert_same_in_chunks(t, text, MOST);
        tokenizer_close(t);
    }
    free(text);
}

/* A chunk may begin in the middle of a character: bytes that have no token there are no error. */
static void test_chunk_inside_character(void **state) {
    char text[401] = "", error[512] = "";
    for (int i = 0; i < 100; i++) {
        strcat(text, "\xe6\x97\xa5 "); /* the character has a token, its bytes have none */
    }
    int *ids;
    size_t count;
    Tokenizer *t = open_parts(&(JsonParts){
        .no_bytes = true,
        .vocab = "\"\xc3\xa6\xc4\xb9\xc2\xa5\":0,\"\xc4\xa0\":1",
        .model = "\"ignore_merges\":true,",
        .pre_tokenizer = SEQUENCE("{\"type\":\"Split\",\"pattern\":{\"String\":\" \"},\"behavior\":\"Isolated\"}")});
    for (size_t chunk = 2; chunk < 12; chunk++) {
        if (!tokenizer_encode_chunked(t, text, 400, chunk, &ids, &count, error, sizeof error)) {
            fail_msg("in chunks of %zu bytes: %s", chunk, error);
        }
        assert_int_equal(count, 200);
        free(ids);
    }
    tokenizer_close(t);
}

/* A piece of many chunks comes behind a short one, both inside one piece of the first pattern. */
static void test_piece_of_many_chunks(void **state) {
    enum { WORDS = 600, RUN = 70000 };
    Tokenizer *t = open_parts(&(JsonParts){
        .merges = {"a a"},
        .pre_tokenizer = SEQUENCE("{\"type\":\"Split\",\"pattern\":{\"Regex\":\"\\\\S+\"},\"behavior\":\"Isolated\"},"
                                  "{\"type\":\"Split\",\"pattern\":{\"String\":\"x\"},\"behavior\":\"Isolated\"}")});
    char *text = malloc(2 * WORDS + RUN + 3);
    assert_non_null(text);
    for (size_t i = 0; i < 2 * WORDS; i++) {
        text[i] = "b "[i % 2];
    }
    text[2 * WORDS] = 'x';
    memset(text + 2 * WORDS + 1, 'a', RUN);
    memcpy(text + 2 * WORDS + 1 + RUN, " b", 2);
    char error[512] = "";
    size_t count, other_count;
    int *ids, *other;
    size_t bytes = 2 * WORDS + RUN + 3;
    assert_true(tokenizer_encode_chunked(t, text, bytes, bytes, &ids, &count, error, sizeof error));
    assert_true(tokenizer_encode_chunked(t, text, bytes, 1000, &other, &other_count, error, sizeof error));
    assert_int_equal(count, 2 * WORDS + 1 + RUN / 2 + 2);
    assert_int_equal(other_count, count);
    assert_memory_equal(ids, other, count * sizeof *ids);
    free(ids);
    free(other);
    free(text);
    tokenizer_close(t);
}

static void test_random_bytes(void **state) {
    Tokenizer *t = open_parts(&(JsonParts){.merges = {"\xc4\xa0 a", "a b", "\xc3\xa9 \xc2\xa9"}});
    uint64_t key = random_key(3, RANDOM_TEST, 0), draw = 0;
    char text[300];
    for (size_t length = 0; length < sizeof text; length += length < 40 ? 1 : 37) {
        for (int repeat = 0; repeat < 5; repeat++) {
            for (size_t i = 0; i < length; i++) {
                text[i] = (char)random_below(key, draw++, 256);
            }
            assert_same_in_chunks(t, text, length);
        }
    }
    tokenizer_close(t);
}

int main(void) {
    omp_set_num_threads(1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_byte_characters),
        cmocka_unit_test(test_bytes),
        cmocka_unit_test(test_merges_by_hand),
        cmocka_unit_test(test_random_merges),
        cmocka_unit_test(test_long_piece),
        cmocka_unit_test(test_ignore_merges),
        cmocka_unit_test(test_byte_without_token),
        cmocka_unit_test(test_added_tokens),
        cmocka_unit_test(test_raw_and_normalized),
        cmocka_unit_test(test_end_of_text),
        cmocka_unit_test(test_nfc),
        cmocka_unit_test(test_threads),
        cmocka_unit_test(test_chunk_inside_character),
        cmocka_unit_test(test_piece_of_many_chunks),
        cmocka_unit_test(test_random_bytes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
