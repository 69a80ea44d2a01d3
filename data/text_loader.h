/* text_loader.h: read text and token files as one stream of tokens. Single header, C11 or C++, POSIX.
 *
 * In one source file:
 *
 *     #define TEXT_LOADER_IMPLEMENTATION
 *     #include "text_loader.h"   // before the system's headers, since it asks them for POSIX
 *
 * and where it is used:
 *
 *     char error[TEXT_LOADER_ERROR_BYTES];
 *     TextLoader *loader = text_loader_open("shards/fineweb_*.bin", NULL, "val", error);
 *     int window[129];
 *     if (!loader || !text_loader_read(loader, 1000, 129, 50257, window, error)) {
 *         fprintf(stderr, "%s\n", error);
 *     }
 *     text_loader_close(loader);
 *
 * What can be opened
 *     FILE        its bytes are the tokens, unless its name ends in .bin: then it is a token shard
 *     DIR         the shards (*.bin) in it
 *     "GLOB"      the files that match; all of them shards, or none
 * Several files are one stream, in the order of their names (strcmp).
 *
 * A token shard is what llm.c and its relatives write: a header of 256 little-endian int32, then the tokens, and no
 * byte more. Shards of both widths may be one stream. The words of the header:
 *     [0] 20240520   [1] 1   [2] tokens     little-endian uint16 each
 *     [0] 20240801   [1] 7   [2] tokens     little-endian uint32 each
 *     [3] 0: that is all; or 0x62616c6d: these follow
 *     [4] vocabulary   [5] hash of the tokenizer, 0: unknown
 *     [6] CRC-32C of the tokens' bytes followed by those of the header with 0 in this place
 *     [7] [8] bytes of text that the tokens stand for, low and high half; 0: unknown
 *
 * The checksum is verified, so that opening a shard reads all of it, where the one source file says before the #include
 * how: uint32_t CRC-32C of what was summed in `crc` (0 to start) followed by `bytes` bytes at `data`.
 *
 *     #define TEXT_LOADER_CRC32C(crc, data, bytes) my_crc32c(crc, data, bytes)
 *
 * Files are mapped, not copied: memory is the page cache's. Sizes and positions have 64 bits. Everything in a file is
 * checked before it is used. A file that is cut short while it is open ends the program (SIGBUS). Several threads may
 * read one loader. Errors are one line in a buffer of the caller, and nothing exits. */
#ifndef TEXT_LOADER_H
#define TEXT_LOADER_H

#ifdef TEXT_LOADER_IMPLEMENTATION /* these have an effect before the first system header only */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1
#endif
#ifndef _FILE_OFFSET_BITS
#define _FILE_OFFSET_BITS 64
#endif
#endif

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { TEXT_LOADER_ERROR_BYTES = 512 };

typedef struct TextLoader TextLoader;

/* Opens and checks every file. Of DIR and GLOB only files are taken whose names (without the folder) contain `with`
 * and do not contain `without`; either may be NULL. Returns NULL, with a line in `error`, on failure. */
TextLoader *text_loader_open(const char *path, const char *with, const char *without, char *error);

void text_loader_close(TextLoader *loader); /* NULL is fine */

/* Length of the stream; at least 1. */
uint64_t text_loader_tokens(const TextLoader *loader);

/* Whether tokens are bytes of text (else: of shards). */
bool text_loader_is_text(const TextLoader *loader);

/* The bytes of a text, to be read until the loader is closed; NULL for shards, and without memory. Those of one file
 * are its map; several files are copied into one piece by the first call, which must not run beside another. */
const unsigned char *text_loader_text(TextLoader *loader, uint64_t *bytes);

/* Largest vocabulary that the shards state; 0 when one of them states none, and for text. */
int text_loader_vocab(const TextLoader *loader);

/* Whether every shard states which tokenizer made it. They never contradict each other: opening fails then. Either way
 * *hash is what those say that state one; 0 when none does, and for text. */
bool text_loader_tokenizer(const TextLoader *loader, uint32_t *hash);

/* Bytes of text that the stream stands for: a text's size; of shards what they state, 0 when one of them does not. */
uint64_t text_loader_bytes(const TextLoader *loader);

/* Copies tokens [position, position + count) of the stream. False, with a line in `error`, when that is not all inside
 * the stream or a token is not below `vocab`. */
bool text_loader_read(const TextLoader *loader, uint64_t position, uint64_t count, int vocab, int *tokens, char *error);

#ifdef __cplusplus
}
#endif

#endif

#ifdef TEXT_LOADER_IMPLEMENTATION
#ifndef TEXT_LOADER_IMPLEMENTED
#define TEXT_LOADER_IMPLEMENTED

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    TEXT_LOADER_UINT16 = 20240520, /* first word of the shard, by the type of its tokens */
    TEXT_LOADER_UINT32 = 20240801,
    TEXT_LOADER_DESCRIBED = 0x62616c6d, /* word [3], when [4] to [8] have a meaning */
    TEXT_LOADER_HEADER_BYTES = 256 * 4,
};

typedef struct {
    char *name;
    const unsigned char *map; /* the whole file */
    uint64_t bytes;
    uint64_t start; /* position of its first token in the stream */
    uint64_t tokens;
    int width; /* bytes of a token */
    bool described;
    int vocab;           /* this and the next two: 0 when it does not say */
    uint32_t tokenizer;  /* hash */
    uint64_t text_bytes; /* that its tokens stand for */
} TextLoaderFile;

struct TextLoader {
    TextLoaderFile *files;
    size_t count;
    uint64_t tokens;
    bool text;
    unsigned char *joined; /* copy of several texts, once it was asked for */
    int vocab;             /* of all files, as are the next three; see the functions of these names */
    uint32_t tokenizer;
    bool tokenizer_known;
    uint64_t text_bytes;
};

/* Writes the line and returns false. */
static bool text_loader_fail(char *error, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error, TEXT_LOADER_ERROR_BYTES, format, arguments);
    va_end(arguments);
    return false;
}

static bool text_loader_ends_in_bin(const char *name) {
    size_t length = strlen(name);
    return length >= 4 && strcmp(name + length - 4, ".bin") == 0;
}

static int32_t text_loader_header_word(const unsigned char *map, int i) {
    const unsigned char *p = map + 4 * i;
    uint32_t bits = (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
    return (int32_t)bits; /* two's complement, as every compiler for POSIX has it */
}

/* Checks a mapped shard's header against the file's size and takes over what it says. */
static bool text_loader_check_shard(TextLoaderFile *file, char *error) {
    unsigned long long bytes = file->bytes;
    if (bytes < TEXT_LOADER_HEADER_BYTES) {
        return text_loader_fail(error, "%s has %llu bytes, but a shard's header takes %d: %s", file->name, bytes,
                                (int)TEXT_LOADER_HEADER_BYTES,
                                "it is truncated, or it is text that must not be named *.bin");
    }
    int magic = text_loader_header_word(file->map, 0);
    int version = text_loader_header_word(file->map, 1);
    int tokens = text_loader_header_word(file->map, 2);
    int mark = text_loader_header_word(file->map, 3);
    if (magic != TEXT_LOADER_UINT16 && magic != TEXT_LOADER_UINT32) {
        return text_loader_fail(error, "%s starts with %d, but a token shard with %d or %d: %s", file->name, magic,
                                (int)TEXT_LOADER_UINT16, (int)TEXT_LOADER_UINT32,
                                "write it again in llm.c's format, or rename it if it is text");
    }
    bool wide = magic == TEXT_LOADER_UINT32;
    if (version != (wide ? 7 : 1)) {
        return text_loader_fail(error, "%s is a shard of version %d: write it again as version %d, with uint%d tokens",
                                file->name, version, wide ? 7 : 1, wide ? 32 : 16);
    }
    if (tokens <= 0) {
        return text_loader_fail(error, "%s has no tokens (its header says %d): write it again or remove it", file->name,
                                tokens);
    }
    file->width = wide ? 4 : 2;
    file->tokens = (uint64_t)tokens;
    /* No overflow: tokens < 2^31. */
    uint64_t expected = TEXT_LOADER_HEADER_BYTES + (uint64_t)file->width * file->tokens;
    if (bytes != expected) {
        return text_loader_fail(
            error, "%s has %llu bytes, but its header's %d tokens take %llu: it is %s, copy it again", file->name,
            bytes, tokens, (unsigned long long)expected, bytes < expected ? "truncated" : "too long");
    }
    /* Any other value may be the mark with a damaged bit; taken for 0, it would hide that there is a checksum. */
    if (mark != 0 && mark != TEXT_LOADER_DESCRIBED) {
        return text_loader_fail(error, "%s has 0x%x in word 3 of its header, which is not a shard's: %s", file->name,
                                (unsigned)mark, "write or copy it again");
    }
    file->described = mark == TEXT_LOADER_DESCRIBED;
    file->text_bytes = 0;
    if (file->described) {
        file->vocab = text_loader_header_word(file->map, 4);
        file->tokenizer = (uint32_t)text_loader_header_word(file->map, 5);
        file->text_bytes = (uint32_t)text_loader_header_word(file->map, 7);
        file->text_bytes |= (uint64_t)(uint32_t)text_loader_header_word(file->map, 8) << 32;
        if (file->vocab <= 0 || (!wide && file->vocab > 65536)) {
            return text_loader_fail(error, "%s states a vocabulary of %d, but its tokens are uint%d: %s", file->name,
                                    file->vocab, wide ? 32 : 16, "write or copy it again");
        }
    }
    return true;
}

/* Maps the file and checks it. The name is set by the caller. */
static bool text_loader_map(TextLoaderFile *file, bool text, char *error) {
    /* O_NONBLOCK: opening a named pipe must fail below, not wait for its writer. */
    int descriptor = open(file->name, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (descriptor < 0) {
        return text_loader_fail(error, "cannot open %s: %s", file->name, strerror(errno));
    }
    struct stat status;
    void *map = MAP_FAILED;
    bool regular = fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode);
    if (regular && status.st_size > 0 && (uint64_t)status.st_size <= SIZE_MAX) {
        map = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_PRIVATE, descriptor, 0);
    }
    int reason = errno;
    close(descriptor);
    if (!regular) {
        return text_loader_fail(error, "%s is not a regular file: give a file, a folder or a glob of them", file->name);
    }
    if (status.st_size == 0) {
        return text_loader_fail(error, "%s is empty: give a file with text or tokens", file->name);
    }
    if (map == MAP_FAILED) {
        return text_loader_fail(error, "cannot map %s: %s", file->name, strerror(reason));
    }
    file->map = (const unsigned char *)map;
    file->bytes = (uint64_t)status.st_size;
    file->tokens = file->bytes;
    file->text_bytes = file->bytes;
    file->width = 1;
    return text || text_loader_check_shard(file, error);
}

static bool text_loader_add(TextLoader *loader, const char *folder, const char *name, char *error) {
    size_t bytes = strlen(folder) + strlen(name) + 2;
    TextLoaderFile *files = (TextLoaderFile *)realloc(loader->files, (loader->count + 1) * sizeof *files);
    char *path = (char *)malloc(bytes);
    if (files) {
        loader->files = files;
    }
    if (!files || !path) {
        free(path);
        return text_loader_fail(error, "out of memory for the names of %zu files", loader->count + 1);
    }
    snprintf(path, bytes, "%s%s%s", folder, *folder ? "/" : "", name);
    memset(&files[loader->count], 0, sizeof *files);
    files[loader->count].name = path;
    loader->count++;
    return true;
}

static bool text_loader_wanted(const char *path, const char *with, const char *without) {
    const char *slash = strrchr(path, '/');
    const char *name = slash ? slash + 1 : path;
    return (!with || strstr(name, with)) && (!without || !strstr(name, without));
}

/* DIR or GLOB left no file: why. `seen` is how many there were before the names were looked at. */
static bool text_loader_none(char *error, const char *path, const char *why, size_t seen, const char *with,
                             const char *without) {
    if (seen == 0) {
        return text_loader_fail(error, "%s %s: give a text file, or a folder or quoted glob of *.bin shards", path,
                                why);
    }
    return text_loader_fail(error, "%s: %s of its %zu files has \"%s\" in its name", path, with ? "none" : "each", seen,
                            with ? with : without);
}

static bool text_loader_list_folder(TextLoader *loader, const char *path, const char *with, const char *without,
                                    char *error) {
    DIR *folder = opendir(path);
    if (!folder) {
        return text_loader_fail(error, "cannot open %s: %s", path, strerror(errno));
    }
    size_t seen = 0;
    bool good = true;
    for (struct dirent *entry; good && (entry = readdir(folder));) {
        if (entry->d_name[0] != '.' && text_loader_ends_in_bin(entry->d_name)) {
            seen++;
            if (text_loader_wanted(entry->d_name, with, without)) {
                good = text_loader_add(loader, path, entry->d_name, error);
            }
        }
    }
    closedir(folder);
    return good && (loader->count > 0 || text_loader_none(error, path, "has no *.bin in it", seen, with, without));
}

static bool text_loader_list_glob(TextLoader *loader, const char *path, const char *with, const char *without,
                                  char *error) {
    glob_t found;
    int code = glob(path, 0, NULL, &found);
    if (code != 0 && code != GLOB_NOMATCH) {
        const char *reason = code == GLOB_NOSPACE ? "out of memory" : strerror(errno);
        return text_loader_fail(error, "cannot list %s: %s", path, reason);
    }
    size_t seen = code == 0 ? (size_t)found.gl_pathc : 0;
    bool good = true;
    for (size_t i = 0; good && i < seen; i++) {
        if (text_loader_wanted(found.gl_pathv[i], with, without)) {
            good = text_loader_add(loader, "", found.gl_pathv[i], error);
        }
    }
    globfree(&found);
    return good && (loader->count > 0 || text_loader_none(error, path, "matches no file", seen, with, without));
}

static int text_loader_compare(const void *a, const void *b) {
    return strcmp(((const TextLoaderFile *)a)->name, ((const TextLoaderFile *)b)->name);
}

/* Sets what is known of all files together, which must not contradict each other. */
static bool text_loader_describe(TextLoader *loader, char *error) {
    const TextLoaderFile *named = NULL; /* the first that states a tokenizer */
    bool all_vocab = true, all_tokenizer = true, all_bytes = true;
    for (size_t i = 0; i < loader->count; i++) {
        const TextLoaderFile *file = &loader->files[i];
        all_vocab = all_vocab && file->vocab;
        all_tokenizer = all_tokenizer && file->tokenizer;
        all_bytes = all_bytes && file->text_bytes;
        if (file->tokenizer && !named) {
            named = file;
        }
        if (file->tokenizer && file->tokenizer != named->tokenizer) {
            return text_loader_fail(error, "%s and %s were made with different tokenizers: %s", named->name, file->name,
                                    "give shards of one of them, or write them again with the same");
        }
        if (file->text_bytes > UINT64_MAX - loader->text_bytes) {
            return text_loader_fail(error, "%s: with it the shards state more bytes of text than 64 bits can count",
                                    file->name);
        }
        loader->text_bytes += file->text_bytes;
        loader->vocab = file->vocab > loader->vocab ? file->vocab : loader->vocab;
    }
    loader->tokenizer = named ? named->tokenizer : 0;
    loader->tokenizer_known = all_tokenizer;
    loader->vocab = all_vocab ? loader->vocab : 0;
    loader->text_bytes = all_bytes ? loader->text_bytes : 0;
    return true;
}

#ifdef TEXT_LOADER_CRC32C

static bool text_loader_is_damaged(const TextLoaderFile *file) {
    unsigned char header[TEXT_LOADER_HEADER_BYTES];
    memcpy(header, file->map, sizeof header);
    memset(header + 4 * 6, 0, 4); /* the checksum's own place */
    uint32_t crc = TEXT_LOADER_CRC32C((uint32_t)0, file->map + sizeof header, (size_t)file->bytes - sizeof header);
    crc = TEXT_LOADER_CRC32C(crc, header, sizeof header);
    return crc != (uint32_t)text_loader_header_word(file->map, 6);
}

/* Several files at a time: one core may not keep up with the disk. */
static bool text_loader_verify(const TextLoader *loader, char *error) {
    size_t damaged = loader->count; /* the first such file */
#ifdef _OPENMP
    size_t described = 0;
    for (size_t i = 0; i < loader->count; i++) {
        described += loader->files[i].described;
    }
#pragma omp parallel for schedule(dynamic) reduction(min : damaged) if (described > 1)
#endif
    for (size_t i = 0; i < loader->count; i++) {
        if (i < damaged && loader->files[i].described && text_loader_is_damaged(&loader->files[i])) {
            damaged = i;
        }
    }
    return damaged == loader->count ||
           text_loader_fail(error, "%s is damaged: its tokens do not match the checksum in its header; %s",
                            loader->files[damaged].name, "write or copy it again");
}

#endif

static bool text_loader_fill(TextLoader *loader, const char *path, const char *with, const char *without, char *error) {
    struct stat status;
    bool good;
    if (stat(path, &status) == 0) {
        good = S_ISDIR(status.st_mode) ? text_loader_list_folder(loader, path, with, without, error)
                                       : text_loader_add(loader, "", path, error);
    } else if (strpbrk(path, "*?[")) {
        good = text_loader_list_glob(loader, path, with, without, error);
    } else {
        good = text_loader_fail(error, "cannot open %s: %s", path, strerror(errno));
    }
    if (!good) {
        return false;
    }
    qsort(loader->files, loader->count, sizeof *loader->files, text_loader_compare);
    loader->text = !text_loader_ends_in_bin(loader->files[0].name);
    for (size_t i = 0; i < loader->count; i++) {
        TextLoaderFile *file = &loader->files[i];
        if (text_loader_ends_in_bin(file->name) == loader->text) {
            return text_loader_fail(error, "%s mixes text (%s) and token shards (%s): give the one or the other", path,
                                    loader->files[loader->text ? 0 : i].name, loader->files[loader->text ? i : 0].name);
        }
        if (!text_loader_map(file, loader->text, error)) {
            return false;
        }
        file->start = loader->tokens;
        if (file->tokens > UINT64_MAX - loader->tokens) {
            return text_loader_fail(error, "%s: more tokens than 64 bits can count", path);
        }
        loader->tokens += file->tokens;
    }
#ifdef TEXT_LOADER_CRC32C
    if (!text_loader_verify(loader, error)) {
        return false;
    }
#endif
    return text_loader_describe(loader, error);
}

TextLoader *text_loader_open(const char *path, const char *with, const char *without, char *error) {
    TextLoader *loader = (TextLoader *)calloc(1, sizeof *loader);
    if (!loader) {
        text_loader_fail(error, "out of memory");
        return NULL;
    }
    if (!text_loader_fill(loader, path, with, without, error)) {
        text_loader_close(loader);
        return NULL;
    }
    return loader;
}

void text_loader_close(TextLoader *loader) {
    if (!loader) {
        return;
    }
    for (size_t i = 0; i < loader->count; i++) {
        TextLoaderFile *file = &loader->files[i];
        if (file->map) {
            munmap((void *)(uintptr_t)file->map, (size_t)file->bytes);
        }
        free(file->name);
    }
    free(loader->files);
    free(loader->joined);
    free(loader);
}

uint64_t text_loader_tokens(const TextLoader *loader) {
    return loader->tokens;
}

bool text_loader_is_text(const TextLoader *loader) {
    return loader->text;
}

const unsigned char *text_loader_text(TextLoader *loader, uint64_t *bytes) {
    *bytes = loader->text ? loader->tokens : 0;
    if (!loader->text || loader->count == 1) {
        return loader->text ? loader->files[0].map : NULL;
    }
    if (!loader->joined && loader->tokens <= SIZE_MAX) {
        loader->joined = (unsigned char *)malloc((size_t)loader->tokens);
        for (size_t i = 0; loader->joined && i < loader->count; i++) {
            const TextLoaderFile *file = &loader->files[i];
            memcpy(loader->joined + file->start, file->map, (size_t)file->bytes);
        }
    }
    return loader->joined;
}

int text_loader_vocab(const TextLoader *loader) {
    return loader->vocab;
}

bool text_loader_tokenizer(const TextLoader *loader, uint32_t *hash) {
    *hash = loader->tokenizer;
    return loader->tokenizer_known;
}

uint64_t text_loader_bytes(const TextLoader *loader) {
    return loader->text_bytes;
}

/* The file that holds the token at `position`, which is inside the stream: binary search over the files' starts. */
static size_t text_loader_file_at(const TextLoader *loader, uint64_t position) {
    size_t low = 0, high = loader->count; /* files[low].start <= position < files[high].start */
    while (high - low > 1) {
        size_t middle = low + (high - low) / 2;
        if (loader->files[middle].start <= position) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

static uint32_t text_loader_token(const TextLoaderFile *file, uint64_t i) {
    if (file->width == 1) {
        return file->map[i];
    }
    const unsigned char *p = file->map + TEXT_LOADER_HEADER_BYTES + (size_t)file->width * (size_t)i;
    uint32_t token = (uint32_t)p[0] | (uint32_t)p[1] << 8;
    return file->width == 2 ? token : token | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

bool text_loader_read(const TextLoader *loader, uint64_t position, uint64_t count, int vocab, int *tokens,
                      char *error) {
    if (position > loader->tokens || count > loader->tokens - position) {
        return text_loader_fail(error, "%llu tokens at %llu are beyond the end of the %llu there are",
                                (unsigned long long)count, (unsigned long long)position,
                                (unsigned long long)loader->tokens);
    }
    for (size_t f = count ? text_loader_file_at(loader, position) : 0; count > 0; f++) {
        const TextLoaderFile *file = &loader->files[f];
        uint64_t from = position - file->start;
        uint64_t here = file->tokens - from < count ? file->tokens - from : count;
        for (uint64_t i = 0; i < here; i++) {
            uint32_t token = text_loader_token(file, from + i);
            if ((int64_t)token >= vocab) { /* a uint32 may be above every int */
                return text_loader_fail(error, "%s: token %llu is %lu, which is not below the vocabulary size %d",
                                        file->name, (unsigned long long)(from + i), (unsigned long)token, vocab);
            }
            tokens[i] = (int)token;
        }
        tokens += here;
        position += here;
        count -= here;
    }
    return true;
}

#endif
#endif
