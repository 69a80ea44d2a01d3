/* What the two halves of reading a tokenizer.json share: tokenizer_json.c (tokens and merges) and tokenizer_cuts.c (how
 * a text is prepared and cut). */
#ifndef DATA_TOKENIZER_READER_H
#define DATA_TOKENIZER_READER_H

#include <cjson/cJSON.h>

#include "tokenizer_parts.h"

/* What is at hand while a file is read. */
typedef struct {
    Tokenizer *t;
    const char *name;
    char *error;
    size_t error_size;
    int *by_text; /* (slots) hash table of the vocabulary: ids, -1: free */
    size_t slots;
    char *patterns[PRETOKENIZER_MOST_PATTERNS]; /* owned */
    int pattern_count;
} Reader;

/* Writes the line, in front of it the file's name, and returns false. */
__attribute__((format(printf, 2, 3))) bool reader_fail(Reader *r, const char *format, ...);
bool reader_no_memory(Reader *r);

/* The member, NULL where it is absent or null; its "type", "" without one; whether it is true. */
const cJSON *member(const cJSON *object, const char *key);
const char *type_of(const cJSON *object);
bool is_true(const cJSON *object, const char *key);

/* Takes over normalizer, pre_tokenizer and decoder. False with one line in the reader's error. */
bool read_cuts(Reader *r, const cJSON *root);

#endif
