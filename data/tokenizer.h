/* Text to token ids and back: bytes, or a byte-level BPE tokenizer as Hugging Face's tokenizer.json describes it.
 *
 *     Tokenizer *t = tokenizer_open("tokenizer.json", error, sizeof error);     // or tokenizer_bytes()
 *     tokenizer_encode(t, text, bytes, &ids, &count, error, sizeof error);      // ids are the caller's (free)
 *     const char *piece = tokenizer_token(t, ids[0], &length);                  // its bytes
 *
 * What is read: model BPE (vocab, merges as "a b" or ["a","b"], ignore_merges), pre_tokenizer ByteLevel or a Sequence
 * of Split, Digits and ByteLevel, normalizer none or NFC, decoder ByteLevel, added tokens (special or not). Whatever
 * would give other ids than Hugging Face's tokenizers, and is not known here, is refused by name (dropout, unk_token,
 * byte_fallback, prefixes and suffixes, add_prefix_space, lstrip, rstrip, single_word). encode() is encode(text,
 * add_special_tokens=False) there; bytes that are not UTF-8, which it cannot take, are tokens of single bytes or
 * merges of them, so that decoding gives back the same bytes.
 *
 * Sennrich et al. 2016 (arXiv 1508.07909); byte-level: Radford et al. 2019 (GPT-2). A file may come from anyone:
 * nothing in it is believed.
 */
#ifndef DATA_TOKENIZER_H
#define DATA_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct Tokenizer Tokenizer;

/* Every byte is a token, its value the id; 256 tokens. */
Tokenizer *tokenizer_bytes(void);

/* Reads a tokenizer.json; NULL with one line in error (what is wrong, what to do). */
Tokenizer *tokenizer_open(const char *path, char *error, size_t error_size);

/* The same from memory (bytes long); `name` stands in errors. */
Tokenizer *tokenizer_parse(const char *json, size_t bytes, const char *name, char *error, size_t error_size);
void tokenizer_close(Tokenizer *tokenizer); /* NULL is fine */

bool tokenizer_is_bytes(const Tokenizer *tokenizer); /* the same as tokenizer_bytes(), from a file or not */
int tokenizer_vocab(const Tokenizer *tokenizer);     /* the largest id and one */

/* Equal for tokenizers that encode alike, however their files are laid out: CRC-32C over tokens, merges, patterns and
 * flags; never 0. */
uint32_t tokenizer_hash(const Tokenizer *tokenizer);

/* Id of the special token that ends a document: <|endoftext|>, else </s>, <eos>, <|end_of_text|>; -1: there is none. */
int tokenizer_end_of_text(const Tokenizer *tokenizer);

/* Ids of the text, special tokens in it included; *ids is the caller's (free), never NULL on success. Runs on all
 * cores; the same for any number of them. False with one line in error: no memory, or a byte for which the vocabulary
 * has no token. Thread-safe. */
bool tokenizer_encode(const Tokenizer *tokenizer, const char *text, size_t bytes, int **ids, size_t *count, char *error,
                      size_t error_size);

/* The bytes a token stands for (not zero-terminated; an added token: its content); NULL for an id without a token. */
const char *tokenizer_token(const Tokenizer *tokenizer, int id, size_t *bytes);
bool tokenizer_is_special(const Tokenizer *tokenizer, int id);

/* The bytes of `count` ids, zero-terminated, the caller's; *bytes (may be NULL) their number. Ids without a token stand
 * for nothing. NULL without memory. */
char *tokenizer_decode(const Tokenizer *tokenizer, const int *ids, size_t count, size_t *bytes);

/* ---- for files that carry the tokenizer along */

/* The tokenizer.json: of tokenizer_open the file's own bytes, of tokenizer_bytes() one that gives the same ids. */
const char *tokenizer_json(const Tokenizer *tokenizer, size_t *bytes);

/* The token as tokenizer.json writes it (each byte a printable character), zero-terminated; NULL without a token. */
const char *tokenizer_token_text(const Tokenizer *tokenizer, int id);
bool tokenizer_is_added(const Tokenizer *tokenizer, int id);

/* Merges in the order of their rank: "left right", zero-terminated. */
int tokenizer_merges(const Tokenizer *tokenizer);
const char *tokenizer_merge_text(const Tokenizer *tokenizer, int rank);

/* llama.cpp's name of the way text is cut: "gpt-2", "qwen2"; NULL: another one. */
const char *tokenizer_pattern_name(const Tokenizer *tokenizer);

/* The printable character, as UTF-8, that stands for a byte in tokenizer.json (GPT-2's table). */
const char *byte_character(unsigned char byte);

#endif
