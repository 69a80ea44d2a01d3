/* What tests of batches share: a corpus to open, arrays for a batch, files in a temporary folder, which is the current
 * folder while a test marked IN_FOLDER runs. Used by test_corpus.c and test_masks.c.
 */
#ifndef TESTS_CORPUS_FIXTURE_H
#define TESTS_CORPUS_FIXTURE_H

#define _GNU_SOURCE /* nftw */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <fcntl.h>
#include <ftw.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../data/builtin.h"
#include "../data/corpus.h"
#include "../kernels/random.h"
#include "forked.h"
#include "threads.h"

enum { MOST = 8 * 3000 };

typedef struct {
    int tokens[MOST], targets[MOST];
    unsigned char domain[MOST];
    double floor[MOST];
} Arrays;

static inline Corpus *open_builtin(int seq, int batch) {
    return corpus_open(&(CorpusOptions){
        .train = "builtin", .val = "", .seq = seq, .batch = batch, .vocab = 256, .shuffle = true, .seed = 1337});
}

static inline void read_batch(const Corpus *corpus, Split split, int64_t step, int first, int count, Arrays *arrays,
                              int at) {
    Batch batch = {arrays->tokens + at, arrays->targets + at, arrays->domain + at, arrays->floor + at, NULL};
    corpus_batch(corpus, split, step, first, count, &batch);
}

static inline CorpusOptions options_of(const char *train, int seq, int batch, bool shuffle) {
    return (CorpusOptions){
        .train = train, .val = "", .seq = seq, .batch = batch, .vocab = 256, .shuffle = shuffle, .seed = 42};
}

static inline CorpusOptions with_masks(CorpusOptions options, double share) {
    options.mask_share = share;
    options.mask_token = options.vocab;
    return options;
}

/* ---- files ---- */

static inline void write_file(const char *name, const void *bytes, size_t count) {
    FILE *file = fopen(name, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, count, file), count);
    assert_int_equal(fclose(file), 0);
}

static inline void put_u32(unsigned char *p, uint32_t value) {
    for (int i = 0; i < 4; i++) {
        p[i] = (unsigned char)(value >> 8 * i);
    }
}

/* A shard of tokens first, first + 1, ... */
static inline void write_shard(const char *name, int first, int count) {
    size_t bytes = 1024 + 2 * (size_t)count;
    unsigned char *buffer = calloc(1, bytes);
    assert_non_null(buffer);
    put_u32(buffer, 20240520);
    put_u32(buffer + 4, 1);
    put_u32(buffer + 8, (uint32_t)count);
    for (int i = 0; i < count; i++) {
        buffer[1024 + 2 * i] = (unsigned char)((first + i) & 255);
        buffer[1024 + 2 * i + 1] = (unsigned char)((first + i) >> 8);
    }
    write_file(name, buffer, bytes);
    free(buffer);
}

/* Text whose byte at i is text_byte(i): neighbourhoods of more than a few bytes differ. */
static inline int text_byte(uint64_t i) {
    return (int)((i * 7 + i / 251 * 13) % 251);
}

static inline void write_text(const char *name, int count) {
    unsigned char *buffer = malloc((size_t)count + 1);
    assert_non_null(buffer);
    for (int i = 0; i < count; i++) {
        buffer[i] = (unsigned char)text_byte((uint64_t)i);
    }
    write_file(name, buffer, (size_t)count);
    free(buffer);
}

static inline int remove_entry(const char *path, const struct stat *status, int kind, struct FTW *walk) {
    return remove(path);
}

static char folder[64];

/* Each test starts in an empty folder. */
static inline int enter_folder(void **state) {
    strcpy(folder, "/tmp/moelab-loader-XXXXXX");
    return mkdtemp(folder) && chdir(folder) == 0 ? 0 : -1;
}

static inline int leave_folder(void **state) {
    return chdir("/") == 0 ? nftw(folder, remove_entry, 8, FTW_DEPTH | FTW_PHYS) : -1;
}

#define IN_FOLDER(test) cmocka_unit_test_setup_teardown(test, enter_folder, leave_folder)

#endif
