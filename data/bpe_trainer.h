/* Learns the merges of a byte-level BPE tokenizer from text.
 *
 *     start with the 256 bytes; while the vocabulary is too small:
 *         (a, b) = the pair of neighbours that is most frequent inside the pieces of the text     ties: lower (a, b)
 *         ab becomes a token, and every a b in the pieces one symbol
 *
 * Sennrich et al. 2016 (arXiv 1508.07909). Bytes keep their values as ids, merges follow in their order, the
 * end-of-text token is last: ids of a byte-level model and of GPT-2's layout. The result depends on the text and the
 * options alone.
 */
#ifndef DATA_BPE_TRAINER_H
#define DATA_BPE_TRAINER_H

#include <stddef.h>

typedef struct {
    int vocab;               /* tokens in all, 257 at least */
    const char *pattern;     /* how text is cut; NULL: PATTERN_GPT2 */
    const char *end_of_text; /* content of the last token; NULL: "<|endoftext|>". Text is cut there and it is no word */
    void (*progress)(int tokens, int vocab, void *user); /* called now and then; may be NULL */
    void *user;
} BpeOptions;

/* A tokenizer.json (the caller's, free) that tokenizer_parse and Hugging Face's tokenizers read; NULL with one line in
 * error. With little text the vocabulary is smaller than asked: no pair is merged that occurs once only. */
char *bpe_train(const char *text, size_t bytes, const BpeOptions *options, size_t *json_bytes, char *error,
                size_t error_size);

#endif
