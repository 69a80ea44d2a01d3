/* Token shards: llm.c's files, written; text_loader.h reads them.
 *
 *     256 little-endian int32, then the tokens. Words of the header:
 *       [0] 20240520   [1] 1     [2] tokens     uint16 each: vocabularies up to 65,536
 *       [0] 20240801   [1] 7     [2] tokens     uint32 each: larger ones
 *       [3] 0x62616c6d ("mlab")  the words up to here are all that others know; these follow:
 *       [4] vocabulary   [5] hash of the tokenizer (tokenizer.h), 0: unknown
 *       [6] CRC-32C of the tokens' bytes followed by those of the header with 0 in this place
 *       [7] [8] bytes of text the tokens stand for: low and high half, 0: unknown
 *       the rest 0
 *
 * The checksum covers the whole file. Without the mark in [3] it would not be looked at, so readers take no other value
 * there than the mark and 0, which differ in more than one bit.
 *
 *     ShardWriter *writer = shard_create("train_0.bin", vocab, tokenizer_hash(t), error, sizeof error);
 *     bool good = writer && shard_append(writer, ids, count, bytes, error, sizeof error);   // any number of times
 *     if (good) {
 *         good = shard_finish(writer, error, sizeof error);
 *     } else {
 *         shard_abandon(writer);
 *     }
 */
#ifndef DATA_SHARD_H
#define DATA_SHARD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct ShardWriter ShardWriter;

/* Starts PATH (as PATH.tmp until it is finished), which must end in .bin: by that readers tell it from text. NULL with
 * one line in error. */
ShardWriter *shard_create(const char *path, int vocab, uint32_t tokenizer_hash, char *error, size_t error_size);

/* Adds tokens, each in [0, vocab), and the bytes of text that they stand for. On failure (a full disk, a token outside
 * the vocabulary, more than 2^31 - 1 tokens) false with one line in error; shard_abandon is then all that is left to
 * call. */
bool shard_append(ShardWriter *writer, const int *ids, size_t count, uint64_t text_bytes, char *error,
                  size_t error_size);

/* Writes the header, syncs, puts the file in its place and frees the writer, also when it returns false. A shard
 * without tokens is refused. */
bool shard_finish(ShardWriter *writer, char *error, size_t error_size);

/* Removes what was written and frees the writer; NULL is fine. */
void shard_abandon(ShardWriter *writer);

#endif
