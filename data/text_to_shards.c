/* See text_to_shards.h. From the bottom up: where a text may be cut, shards that fill up, blocks, texts.
 *
 * Called by tokenize.c. Read next: tokenizer.h (encode), shard.h (the files).
 */
#define _GNU_SOURCE /* memmem */
#include "text_to_shards.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "shard.h"

enum { PATH_BYTES = 4096 };

/* The shards of one part of the texts, one after the other. */
typedef struct {
    const char *suffix;
    ShardWriter *writer; /* NULL: the next token starts a shard */
    uint64_t in_shard;   /* its tokens */
    int finished;        /* shards; the number of the next one */
    uint64_t tokens;     /* of all shards */
} Series;

typedef struct {
    const ShardOptions *options;
    const char *mark; /* a text may be cut behind it; NULL: at no mark */
    size_t mark_bytes;
    Series train, val;
    uint64_t bytes; /* of text that are done */
    char *error;
    size_t error_size;
} Encoding;

/* ---- where a text may be cut ---- */

/* Whether a copy of `a`, and `shift` bytes behind its start (or before it) one of `b`, can share bytes of one text. */
static bool overlap_at(const char *a, size_t a_bytes, const char *b, size_t b_bytes, ptrdiff_t shift) {
    for (ptrdiff_t i = shift > 0 ? shift : 0; i < (ptrdiff_t)a_bytes && i - shift < (ptrdiff_t)b_bytes; i++) {
        if (a[i] != b[i - shift]) {
            return false;
        }
    }
    return true;
}

static bool overlap(const char *a, size_t a_bytes, const char *b, size_t b_bytes, bool same) {
    for (ptrdiff_t shift = 1 - (ptrdiff_t)b_bytes; shift < (ptrdiff_t)a_bytes; shift++) {
        if (!(same && shift == 0) && overlap_at(a, a_bytes, b, b_bytes, shift)) {
            return true;
        }
    }
    return false;
}

/* The content of the end-of-text token, when each copy of it in a text is that token and ASCII. */
static void find_mark(Encoding *encoding) {
    const Tokenizer *tokenizer = encoding->options->tokenizer;
    int end = tokenizer_end_of_text(tokenizer);
    size_t bytes = 0, other_bytes;
    const char *mark = end < 0 ? NULL : tokenizer_token(tokenizer, end, &bytes);
    for (size_t i = 0; i < bytes; i++) {
        if ((unsigned char)mark[i] >= 128) {
            return;
        }
    }
    for (int id = 0; mark && id < tokenizer_vocab(tokenizer); id++) {
        const char *other = tokenizer_is_added(tokenizer, id) ? tokenizer_token(tokenizer, id, &other_bytes) : NULL;
        if (other && overlap(mark, bytes, other, other_bytes, id == end)) {
            return;
        }
    }
    encoding->mark = bytes > 0 ? mark : NULL;
    encoding->mark_bytes = bytes;
}

static bool is_cut(const Encoding *encoding, const char *text, size_t at) {
    return at >= encoding->mark_bytes && (unsigned char)text[at] < 128 &&
           memcmp(text + at - encoding->mark_bytes, encoding->mark, encoding->mark_bytes) == 0;
}

/* Bytes of the first block of a text: up to the last cut in block_bytes, else the first one beyond, else all. */
static size_t first_block(const Encoding *encoding, const char *text, size_t bytes) {
    size_t most = encoding->options->block_bytes, mark_bytes = encoding->mark_bytes;
    if (bytes <= most || tokenizer_is_bytes(encoding->options->tokenizer)) {
        return bytes < most ? bytes : most;
    }
    for (size_t at = most; encoding->mark && at > 0; at--) {
        if (is_cut(encoding, text, at)) {
            return at;
        }
    }
    const char *found = text + (most > mark_bytes ? most - mark_bytes : 0), *end = text + bytes;
    while (encoding->mark && (found = memmem(found, (size_t)(end - found), encoding->mark, mark_bytes))) {
        found += mark_bytes;
        if (found < end && is_cut(encoding, text, (size_t)(found - text))) {
            return (size_t)(found - text);
        }
    }
    return bytes;
}

/* ---- shards ---- */

static bool shard_path(const Encoding *encoding, const Series *series, int shard, char path[PATH_BYTES]) {
    const ShardOptions *options = encoding->options;
    int length = snprintf(path, PATH_BYTES, "%s/%s_%s_%06d.bin", options->folder, options->name, series->suffix, shard);
    if (length >= PATH_BYTES) {
        snprintf(encoding->error, encoding->error_size, "the shards' names have %d characters, at most %d: %s", length,
                 PATH_BYTES - 1, "choose a shorter name or folder");
    }
    return length < PATH_BYTES;
}

static bool start_shard(const Encoding *encoding, Series *series) {
    const Tokenizer *tokenizer = encoding->options->tokenizer;
    char path[PATH_BYTES];
    if (shard_path(encoding, series, series->finished, path)) {
        series->writer = shard_create(path, tokenizer_vocab(tokenizer), tokenizer_hash(tokenizer), encoding->error,
                                      encoding->error_size);
    }
    series->in_shard = 0;
    return series->writer != NULL;
}

static bool finish_shard(const Encoding *encoding, Series *series) {
    ShardWriter *writer = series->writer;
    series->writer = NULL;
    if (writer && !shard_finish(writer, encoding->error, encoding->error_size)) {
        return false;
    }
    series->finished += writer != NULL;
    return true;
}

static bool write_ids(const Encoding *encoding, Series *series, const int *ids, size_t count) {
    const ShardOptions *options = encoding->options;
    while (count > 0) {
        if (!series->writer && !start_shard(encoding, series)) {
            return false;
        }
        uint64_t room = options->shard_tokens - series->in_shard, text_bytes = 0;
        size_t taken = count < room ? count : (size_t)room;
        for (size_t i = 0; i < taken; i++) {
            size_t bytes = 0;
            tokenizer_token(options->tokenizer, ids[i], &bytes);
            text_bytes += bytes;
        }
        if (!shard_append(series->writer, ids, taken, text_bytes, encoding->error, encoding->error_size)) {
            return false;
        }
        series->in_shard += taken;
        series->tokens += taken;
        ids += taken;
        count -= taken;
        if (series->in_shard == options->shard_tokens && !finish_shard(encoding, series)) {
            return false;
        }
    }
    return true;
}

static void remove_shards(const Encoding *encoding, Series *series) {
    char path[PATH_BYTES];
    shard_abandon(series->writer);
    for (int shard = 0; shard < series->finished; shard++) {
        if (shard_path(encoding, series, shard, path)) {
            unlink(path);
        }
    }
}

/* ---- texts ---- */

static bool encode_part(Encoding *encoding, Series *series, const char *text, size_t bytes) {
    const ShardOptions *options = encoding->options;
    while (bytes > 0) {
        size_t block = first_block(encoding, text, bytes), count;
        int *ids;
        if (!tokenizer_encode(options->tokenizer, text, block, &ids, &count, encoding->error, encoding->error_size)) {
            return false;
        }
        bool written = write_ids(encoding, series, ids, count);
        free(ids);
        if (!written) {
            return false;
        }
        encoding->bytes += block;
        text += block;
        bytes -= block;
        uint64_t tokens = encoding->train.tokens + encoding->val.tokens;
        if (options->progress && !options->progress(encoding->bytes, tokens, options->user)) {
            snprintf(encoding->error, encoding->error_size, "stopped before the end: no shard was kept");
            return false;
        }
    }
    return true;
}

static bool encode_texts(Encoding *encoding, const Text *texts, int count) {
    for (int i = 0; i < count; i++) {
        size_t val = (size_t)((double)texts[i].size * encoding->options->val_share), train = texts[i].size - val;
        if (!encode_part(encoding, &encoding->train, texts[i].bytes, train) ||
            !encode_part(encoding, &encoding->val, texts[i].bytes + train, val)) {
            return false;
        }
    }
    return finish_shard(encoding, &encoding->train) && finish_shard(encoding, &encoding->val);
}

bool text_to_shards(const Text *texts, int count, const ShardOptions *options, ShardCounts *counts, char *error,
                    size_t error_size) {
    Encoding encoding = {
        .options = options, .train.suffix = "train", .val.suffix = "val", .error = error, .error_size = error_size};
    find_mark(&encoding);
    if (!encode_texts(&encoding, texts, count)) {
        char scratch[256];
        encoding.error = scratch; /* the caller is told of the first failure */
        encoding.error_size = sizeof scratch;
        remove_shards(&encoding, &encoding.train);
        remove_shards(&encoding, &encoding.val);
        return false;
    }
    *counts = (ShardCounts){.train_shards = encoding.train.finished,
                            .val_shards = encoding.val.finished,
                            .train_tokens = encoding.train.tokens,
                            .val_tokens = encoding.val.tokens};
    return true;
}

char *shard_of_name(const char *folder, const char *name) {
    char *found = NULL;
    DIR *entries = opendir(folder);
    for (struct dirent *entry; entries && !found && (entry = readdir(entries));) {
        size_t length = strlen(entry->d_name), start = strlen(name);
        const char *rest = entry->d_name + (start < length ? start : length);
        bool series = strncmp(rest, "_train_", 7) == 0 || strncmp(rest, "_val_", 5) == 0;
        if (series && strncmp(entry->d_name, name, start) == 0 && strcmp(entry->d_name + length - 4, ".bin") == 0) {
            found = strdup(entry->d_name);
        }
    }
    if (entries) {
        closedir(entries);
    }
    return found;
}
