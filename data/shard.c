/* Writes a token shard: see shard.h.
 *
 * The file grows as PATH.tmp behind an empty header: tokens gather in a buffer and go out, through the checksum, when
 * it is full. Only the end knows the header, so it is written last; then the file is synced and renamed to PATH, and
 * the folder synced. Whatever stops this on the way, PATH is a whole shard or not there (or what it was before).
 *
 * Called by the program that tokenizes. Read next: data/text_loader.h, which reads what this writes. */
#include "shard.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../kernels/checksum.h"

enum { HEADER_WORDS = 256, HEADER_BYTES = 4 * HEADER_WORDS, BUFFER_BYTES = 1 << 18, MARK = 0x62616c6d };

struct ShardWriter {
    char *path, *temporary;
    int fd; /* of temporary; -1: closed */
    int vocab;
    int width; /* bytes of a token */
    uint32_t tokenizer_hash;
    uint32_t crc; /* of the tokens that have left the buffer */
    uint64_t text_bytes;
    size_t tokens;
    bool failed;
    size_t used; /* bytes in the buffer */
    unsigned char buffer[BUFFER_BYTES];
};

/* Writes the line and returns false. */
__attribute__((format(printf, 3, 4))) static bool fail(char *error, size_t error_size, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error, error_size, format, arguments);
    va_end(arguments);
    return false;
}

/* A system call on the temporary file failed: errno says why. */
static bool fail_write(const ShardWriter *writer, char *error, size_t error_size) {
    return fail(error, error_size, "cannot write %s: %s", writer->temporary, strerror(errno));
}

static void put_little_endian(unsigned char *p, uint32_t value, int bytes) {
    for (int i = 0; i < bytes; i++) {
        p[i] = (unsigned char)(value >> (8 * i));
    }
}

static bool write_all(int fd, const unsigned char *data, size_t bytes) {
    while (bytes > 0) {
        ssize_t written = write(fd, data, bytes);
        if (written < 0 && errno != EINTR) {
            return false;
        }
        size_t done = written > 0 ? (size_t)written : 0;
        data += done;
        bytes -= done;
    }
    return true;
}

/* The folder's entry for the file is on the disk after this, not only the file. */
static bool sync_folder_of(const char *path) {
    char *folder = strdup(path);
    if (!folder) {
        return false;
    }
    char *slash = strrchr(folder, '/');
    if (slash) {
        slash[slash == folder] = '\0'; /* "/x.bin" is in "/" */
    }
    int fd = open(slash ? folder : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool good = fd >= 0 && fsync(fd) == 0;
    int reason = errno;
    free(folder);
    if (fd >= 0) {
        close(fd);
    }
    errno = reason;
    return good;
}

void shard_abandon(ShardWriter *writer) {
    if (!writer) {
        return;
    }
    if (writer->fd >= 0) {
        close(writer->fd);
        unlink(writer->temporary);
    }
    free(writer->path);
    free(writer->temporary);
    free(writer);
}

ShardWriter *shard_create(const char *path, int vocab, uint32_t tokenizer_hash, char *error, size_t error_size) {
    assert(vocab >= 1);
    size_t length = strlen(path);
    struct stat status;
    if (length < 4 || strcmp(path + length - 4, ".bin") != 0) {
        fail(error, error_size, "%s: a shard's name must end in .bin, or it would be read as text: rename it", path);
        return NULL;
    }
    if (stat(path, &status) == 0 && !S_ISREG(status.st_mode)) { /* learned at once, not when all is written */
        fail(error, error_size, "%s is there and no regular file: choose another name for the shard", path);
        return NULL;
    }
    ShardWriter *writer = calloc(1, sizeof *writer);
    if (!writer || !(writer->path = strdup(path)) || !(writer->temporary = malloc(length + sizeof ".tmp"))) {
        fail(error, error_size, "%s: out of memory for a buffer of %d bytes", path, (int)BUFFER_BYTES);
        if (writer) {
            writer->fd = -1;
        }
        shard_abandon(writer);
        return NULL;
    }
    snprintf(writer->temporary, length + sizeof ".tmp", "%s.tmp", path);
    writer->vocab = vocab;
    writer->width = vocab > 65536 ? 4 : 2;
    writer->tokenizer_hash = tokenizer_hash;
    writer->fd = open(writer->temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (writer->fd < 0) {
        fail(error, error_size, "cannot create %s: %s", writer->temporary, strerror(errno));
        shard_abandon(writer);
        return NULL;
    }
    if (!write_all(writer->fd, writer->buffer, HEADER_BYTES)) { /* zeros, as long as there is nothing to state */
        fail_write(writer, error, error_size);
        shard_abandon(writer);
        return NULL;
    }
    return writer;
}

static bool flush_buffer(ShardWriter *writer, char *error, size_t error_size) {
    writer->crc = crc32c(writer->crc, writer->buffer, writer->used);
    if (!write_all(writer->fd, writer->buffer, writer->used)) {
        writer->failed = true;
        return fail_write(writer, error, error_size);
    }
    writer->used = 0;
    return true;
}

bool shard_append(ShardWriter *writer, const int *ids, size_t count, uint64_t text_bytes, char *error,
                  size_t error_size) {
    assert(!writer->failed);
    if (count > INT32_MAX - writer->tokens) {
        writer->failed = true;
        return fail(error, error_size, "%s: a shard holds at most %d tokens: put the rest into another one",
                    writer->path, (int)INT32_MAX);
    }
    for (size_t i = 0; i < count; i++) {
        if (ids[i] < 0 || ids[i] >= writer->vocab) {
            writer->failed = true;
            return fail(error, error_size, "%s: token %zu is %d, which is not in the vocabulary of %d tokens",
                        writer->path, writer->tokens + i, ids[i], writer->vocab);
        }
        if (writer->used == BUFFER_BYTES && !flush_buffer(writer, error, error_size)) {
            return false;
        }
        put_little_endian(writer->buffer + writer->used, (uint32_t)ids[i], writer->width);
        writer->used += (size_t)writer->width;
    }
    writer->tokens += count;
    writer->text_bytes += text_bytes;
    return true;
}

/* The header over the zeros at the start of the file. */
static bool write_header(const ShardWriter *writer) {
    const uint32_t words[9] = {
        [0] = writer->width == 4 ? 20240801 : 20240520,
        [1] = writer->width == 4 ? 7 : 1,
        [2] = (uint32_t)writer->tokens,
        [3] = MARK,
        [4] = (uint32_t)writer->vocab,
        [5] = writer->tokenizer_hash,
        [7] = (uint32_t)writer->text_bytes,
        [8] = (uint32_t)(writer->text_bytes >> 32),
    };
    unsigned char header[HEADER_BYTES] = {0};
    for (int i = 0; i < 9; i++) {
        put_little_endian(header + 4 * i, words[i], 4);
    }
    put_little_endian(header + 4 * 6, crc32c(writer->crc, header, sizeof header), 4);
    return lseek(writer->fd, 0, SEEK_SET) == 0 && write_all(writer->fd, header, sizeof header);
}

bool shard_finish(ShardWriter *writer, char *error, size_t error_size) {
    assert(!writer->failed);
    bool good = writer->tokens > 0;
    if (!good) {
        fail(error, error_size, "%s: there are no tokens to write: give text that is not empty", writer->path);
    }
    good = good && flush_buffer(writer, error, error_size);
    if (good && !(write_header(writer) && fsync(writer->fd) == 0)) {
        good = fail_write(writer, error, error_size);
    }
    if (good) {
        int code = close(writer->fd); /* network file systems report a full disk here */
        writer->fd = -1;
        if (code != 0) {
            good = fail_write(writer, error, error_size);
        } else if (rename(writer->temporary, writer->path) != 0) {
            good =
                fail(error, error_size, "cannot rename %s to %s: %s", writer->temporary, writer->path, strerror(errno));
        } else if (!sync_folder_of(writer->path)) {
            good = fail(error, error_size, "cannot sync the folder of %s: %s", writer->path, strerror(errno));
        }
        if (!good) {
            unlink(writer->temporary); /* not there, and no harm, when only the folder failed */
        }
    }
    shard_abandon(writer);
    return good;
}
