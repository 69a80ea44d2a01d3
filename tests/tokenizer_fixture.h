/* A tokenizer.json made to order: the 256 bytes with their values as ids, merges, whose results follow from id 256 on,
 * and whatever parts a test puts in place of the usual ones.
 *
 *     char *json = make_json(&(JsonParts){.merges = {"a b", "ab c"}}, &bytes);     // the caller's
 */
#ifndef TESTS_TOKENIZER_FIXTURE_H
#define TESTS_TOKENIZER_FIXTURE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../data/tokenizer.h"

enum { MOST_MERGES = 64 };

#define BYTE_LEVEL "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":true}"
#define BYTES_ONLY "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":false}"
#define SEQUENCE(parts) "{\"type\":\"Sequence\",\"pretokenizers\":[" parts "," BYTES_ONLY "]}"

typedef struct {
    const char *merges[MOST_MERGES]; /* "left right", as tokenizer.json writes tokens; NULL ends them */
    const char *added;               /* entries of added_tokens */
    const char *vocab;               /* more entries of the vocabulary, each with a comma before it */
    const char *model;               /* more members of the model, each with a comma behind it */
    const char *normalizer, *pre_tokenizer, *decoder; /* NULL: none, BYTE_LEVEL, ByteLevel */
    bool pairs;                                       /* merges as ["left","right"] */
    bool no_bytes;                                    /* the vocabulary is `vocab` alone, without the first comma */
} JsonParts;

static inline void put_text(FILE *out, const char *text) {
    for (; *text; text++) {
        fprintf(out, *text == '"' || *text == '\\' ? "\\%c" : "%c", *text);
    }
}

static inline void put_merge(FILE *out, const char *merge, bool pair) {
    const char *blank = strchr(merge, ' ');
    fprintf(out, pair ? "[\"" : "\"");
    for (const char *c = merge; *c; c++) {
        if (c == blank) {
            fputs(pair ? "\",\"" : " ", out);
        } else {
            put_text(out, (const char[]){*c, '\0'});
        }
    }
    fputs(pair ? "\"]" : "\"", out);
}

static inline char *make_json(const JsonParts *parts, size_t *bytes) {
    char *json = NULL;
    FILE *out = open_memstream(&json, bytes);
    assert_non_null(out);
    fprintf(out, "{\"version\":\"1.0\",\"added_tokens\":[%s],\"normalizer\":%s,\"pre_tokenizer\":%s,\"decoder\":%s,",
            parts->added ? parts->added : "", parts->normalizer ? parts->normalizer : "null",
            parts->pre_tokenizer ? parts->pre_tokenizer : BYTE_LEVEL,
            parts->decoder ? parts->decoder : "{\"type\":\"ByteLevel\"}");
    fprintf(out, "\"model\":{\"type\":\"BPE\",%s\"vocab\":{", parts->model ? parts->model : "");
    int id = 0;
    for (; id < 256 && !parts->no_bytes; id++) {
        fprintf(out, id ? ",\"" : "\"");
        put_text(out, byte_character((unsigned char)id));
        fprintf(out, "\":%d", id);
    }
    for (int i = 0; !parts->no_bytes && i < MOST_MERGES && parts->merges[i]; i++, id++) {
        const char *blank = strchr(parts->merges[i], ' ');
        assert_non_null(blank);
        fprintf(out, ",\"");
        for (const char *c = parts->merges[i]; *c; c++) {
            if (c != blank) {
                put_text(out, (const char[]){*c, '\0'});
            }
        }
        fprintf(out, "\":%d", id);
    }
    fprintf(out, "%s},\"merges\":[", parts->vocab ? parts->vocab : "");
    for (int i = 0; i < MOST_MERGES && parts->merges[i]; i++) {
        fprintf(out, i ? "," : "");
        put_merge(out, parts->merges[i], parts->pairs);
    }
    fprintf(out, "]}}\n");
    assert_int_equal(fclose(out), 0);
    return json;
}

static inline Tokenizer *open_parts(const JsonParts *parts) {
    char error[512] = "";
    size_t bytes;
    char *json = make_json(parts, &bytes);
    Tokenizer *tokenizer = tokenizer_parse(json, bytes, "test", error, sizeof error);
    free(json);
    if (!tokenizer) {
        fail_msg("refused: %s", error);
    }
    return tokenizer;
}

/* Ids of a text, ended by -1; the caller's. */
static inline int *encode(const Tokenizer *tokenizer, const char *text, size_t bytes, size_t *count) {
    char error[512] = "";
    int *ids = NULL;
    if (!tokenizer_encode(tokenizer, text, bytes, &ids, count, error, sizeof error)) {
        fail_msg("not encoded: %s", error);
    }
    assert_non_null(ids);
    ids = realloc(ids, (*count + 1) * sizeof *ids);
    assert_non_null(ids);
    ids[*count] = -1;
    return ids;
}

/* The text gives exactly these ids (ended by -1), and they give `decoded`. */
static inline void assert_ids_and_text(const Tokenizer *tokenizer, const char *text, const int *wanted,
                                       const char *decoded) {
    size_t count, length;
    int *ids = encode(tokenizer, text, strlen(text), &count);
    char got[1024] = "", want[1024] = "";
    for (size_t i = 0; i < count; i++) {
        snprintf(got + strlen(got), sizeof got - strlen(got), " %d", ids[i]);
    }
    for (size_t i = 0; wanted[i] >= 0; i++) {
        snprintf(want + strlen(want), sizeof want - strlen(want), " %d", wanted[i]);
    }
    if (strcmp(got, want) != 0) {
        fail_msg("\"%s\" gave%s instead of%s", text, got, want);
    }
    char *back = tokenizer_decode(tokenizer, ids, count, &length);
    assert_non_null(back);
    assert_int_equal(length, strlen(decoded));
    assert_string_equal(back, decoded);
    free(back);
    free(ids);
}

static inline void assert_ids(const Tokenizer *tokenizer, const char *text, const int *wanted) {
    assert_ids_and_text(tokenizer, text, wanted, text);
}

#define IDS(...) ((const int[]){__VA_ARGS__, -1})

#endif
