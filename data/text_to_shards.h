/* Texts to token shards: of each text the beginning is for training, its end for validation.
 *
 *     FOLDER/NAME_train_000000.bin, FOLDER/NAME_train_000001.bin ...     FOLDER/NAME_val_000000.bin ...
 *
 * A text is cut at byte size - floor(size * val_share), as corpus.c cuts a text that it holds a tenth of out. Each part
 * is encoded on its own and follows the same part of the text before it; nothing is put between them.
 *
 * Memory is bounded though a text may be long: it is encoded in blocks, to the same ids as in one piece. A block ends
 * behind an end-of-text token, where nothing reaches across. For that its content must be ASCII, no other added token
 * may overlap with it anywhere, and the next character must be ASCII, since normalization never joins that to what is
 * before it. A text without such a place is encoded whole; where bytes are tokens every place will do.
 */
#ifndef DATA_TEXT_TO_SHARDS_H
#define DATA_TEXT_TO_SHARDS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tokenizer.h"

typedef struct {
    const char *bytes;
    size_t size;
} Text;

typedef struct {
    const Tokenizer *tokenizer;
    const char *folder; /* is there already */
    const char *name;
    double val_share;      /* in [0, 1) */
    uint64_t shard_tokens; /* most tokens of a shard, 1 to 2^31 - 1 */
    size_t block_bytes;    /* text encoded at once, but for what was said above */

    /* After each block: bytes of text that are done and their tokens. False: stop. May be NULL. */
    bool (*progress)(uint64_t bytes, uint64_t tokens, void *user);
    void *user;
} ShardOptions;

typedef struct {
    int train_shards, val_shards;
    uint64_t train_tokens, val_tokens;
} ShardCounts;

/* All or nothing: after a failure (false, one line in error) or a stop the shards made so far are removed. */
bool text_to_shards(const Text *texts, int count, const ShardOptions *options, ShardCounts *counts, char *error,
                    size_t error_size);

/* NULL, or the name (the caller's) of a file in the folder that would be read together with shards called `name`. */
char *shard_of_name(const char *folder, const char *name);

#endif
