/* What tokens are as text. model/ computes with ids and knows no tokenizer; where it shows or writes down text
 * (samples, exports) it asks the functions in this table, which train.c fills from data/tokenizer.h.
 */
#ifndef MODEL_VOCABULARY_H
#define MODEL_VOCABULARY_H

#include <stdbool.h>
#include <stddef.h>

struct Tokenizer;

typedef struct {
    const struct Tokenizer *tokenizer; /* first argument of the functions */
    int size;                          /* ids are below it; the model's --vocab may be larger */
    int end_of_text;                   /* id of the token that ends a document, -1: none */
    const char *pattern;               /* llama.cpp's name of the way text is cut; NULL: it has none */
    int merges;

    /* Ids of the text; *ids is the caller's (free). False with one line in error. */
    bool (*encode)(const struct Tokenizer *, const char *text, size_t bytes, int **ids, size_t *count, char *error,
                   size_t error_size);
    /* The bytes of a token, not zero-terminated; NULL for an id without one. */
    const char *(*bytes)(const struct Tokenizer *, int id, size_t *length);
    /* The token as tokenizer.json writes it, zero-terminated; NULL for an id without one. */
    const char *(*text)(const struct Tokenizer *, int id);
    bool (*is_special)(const struct Tokenizer *, int id);
    bool (*is_added)(const struct Tokenizer *, int id); /* taken whole out of a text before it is cut; NULL: none is */
    const char *(*merge)(const struct Tokenizer *, int rank);      /* "left right" */
    const char *(*json)(const struct Tokenizer *, size_t *length); /* the whole tokenizer.json */
} Vocabulary;

/* RUN/tokenizer.json: a run keeps the tokenizer it was given, so that it can be resumed and exported wherever it is. */
void vocabulary_path(char *path, size_t size, const char *run);

/* Writes it. Ends the program with one line when it cannot. */
void vocabulary_keep(const Vocabulary *vocabulary, const char *run);

#endif
