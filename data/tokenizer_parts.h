/* What a Tokenizer is made of: for tokenizer.c (its functions), tokenizer_json.c (which reads one) and
 * tokenizer_encode.c (which applies it). Everyone else includes tokenizer.h. */
#ifndef DATA_TOKENIZER_PARTS_H
#define DATA_TOKENIZER_PARTS_H

#include "bpe.h"
#include "pretokenizer.h"
#include "tokenizer.h"

enum { TOKENIZER_MOST_IDS = 1 << 20 };

typedef struct {
    char *text;    /* as tokenizer.json writes it; NULL: no token has this id. Owned */
    char *bytes;   /* what it stands for, zero-terminated. Owned */
    size_t length; /* of bytes */
    bool added, special;
    bool normalized; /* an added token that is looked for in normalised text, not before */
} Token;

struct Tokenizer {
    bool is_bytes;
    bool nfc;           /* text is normalised to form C first */
    bool ignore_merges; /* a piece that is a token as a whole is that token */
    int vocab;
    Token *tokens;    /* (vocab) */
    int byte_id[256]; /* of the token of one byte, -1: there is none */
    int end_of_text;

    int added_count;
    int *added;            /* (added_count) ids of the added tokens, longest first */
    bool added_first[256]; /* an added token begins with this byte */

    Merges merges;
    char **merge_texts; /* (merges.count) owned */
    Pretokenizer *pretokenizer;

    int *by_bytes; /* (by_bytes_slots) hash table of the tokens that are not added: ids, -1: free */
    size_t by_bytes_slots;

    char *json; /* owned */
    size_t json_bytes;
    uint32_t hash;
};

/* A hash of some bytes for tables. */
uint64_t bytes_hash(const char *bytes, size_t length);

/* Id of the token, not an added one, that stands for these bytes; -1: none. */
int tokenizer_find(const Tokenizer *tokenizer, const char *bytes, size_t length);

/* tokenizer_encode in chunks of this many bytes, which make no difference. */
bool tokenizer_encode_chunked(const Tokenizer *tokenizer, const char *text, size_t bytes, size_t chunk_bytes, int **ids,
                              size_t *count, char *error, size_t error_size);

#endif
