/* What the tests of --export-gguf share: small random models, vocabularies, exporting to `path`, and reading the file
 * back with gguf_reader.py.
 *
 *     Model m = make_model(SMALL "--tie 1");
 *     Vocabulary vocabulary = letters();
 *     export_model(&m, &vocabulary);
 *     read_sound(output);
 *     expect_line(output, "key qwen3moe.block_count = 2 (uint32)");
 */
#ifndef TESTS_GGUF_FIXTURE_H
#define TESTS_GGUF_FIXTURE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../kernels/random.h"
#include "../model/gguf.h"
#include "../model/transformer.h"
#include "set_options.h"

/* No two extents are alike, and most tensors end between two multiples of 32 bytes. */
#define SMALL                                                                                                         \
    "--layers 2 --dim 22 --heads 4 --kv-heads 2 --head-dim 6 --seq 16 --vocab 70 --experts 3 --top-k 2 --expert-dim " \
    "10 --norm-eps 0.0009765625 --rope-base 5000 "

enum { MOST_OUTPUT = 1 << 16 };

static char folder[] = "/tmp/test_gguf_XXXXXX";
static char path[64];

static inline int make_folder(void **unused) {
    if (!mkdtemp(folder)) {
        return -1;
    }
    snprintf(path, sizeof path, "%s/tiny.gguf", folder);
    return 0;
}

static inline int remove_folder(void **unused) {
    unlink(path);
    return rmdir(folder); /* fails when an export left anything else behind */
}

/* ---- a random model */

typedef struct {
    Config config;
    TensorList tensors;
    acc_t *weights;
} Model;

static inline Model make_model(const char *options) {
    Model m = {0};
    config_defaults(&m.config);
    set_options(&m.config, options);
    config_finish(&m.config);
    transformer_tensors(&m.tensors, &m.config.model);
    m.weights = malloc(m.tensors.total * sizeof *m.weights);
    for (size_t i = 0; i < m.tensors.total; i++) { /* norms too, and the gaps, which must not be written */
        m.weights[i] = (acc_t)random_normal(1, i);
    }
    return m;
}

static inline void free_model(Model *m) {
    free(m->weights);
    tensors_free(&m->tensors);
}

/* Element i of a tensor, as float32. */
static inline float at(const Model *m, const char *name, size_t i) {
    int index = tensors_find(&m->tensors, name);
    assert_true(index >= 0 && i < m->tensors.items[index].count);
    return (float)m->weights[m->tensors.items[index].offset + i];
}

/* ---- vocabularies */

struct Tokenizer { /* stands in for that of data/: model/ knows it as a name only */
    const char *const *texts;
    const char *kinds; /* of each id: s special, a added, else normal */
    const char *const *merges;
};

static inline const char *text_of(const struct Tokenizer *t, int id) {
    return t->texts[id];
}

static inline bool is_special(const struct Tokenizer *t, int id) {
    return t->kinds[id] == 's';
}

static inline bool is_added(const struct Tokenizer *t, int id) {
    return t->kinds[id] == 's' || t->kinds[id] == 'a';
}

static inline const char *merge_of(const struct Tokenizer *t, int rank) {
    return t->merges[rank];
}

static inline Vocabulary vocabulary_of(const struct Tokenizer *tokenizer, int size) {
    return (Vocabulary){.tokenizer = tokenizer,
                        .size = size,
                        .end_of_text = -1,
                        .pattern = "gpt-2",
                        .text = text_of,
                        .is_special = is_special,
                        .is_added = is_added,
                        .merge = merge_of};
}

static inline Vocabulary letters(void) {
    static const char *const texts[] = {"a", "b", "c", "d", "ab"}, *const merges[] = {"a b"};
    static const struct Tokenizer tokenizer = {.texts = texts, .kinds = "nnnnn", .merges = merges};
    Vocabulary vocabulary = vocabulary_of(&tokenizer, 5);
    vocabulary.merges = 1;
    return vocabulary;
}

/* ---- exporting and reading back */

static inline void export_model(const Model *m, const Vocabulary *vocabulary) {
    char error[512] = "";
    if (!gguf_export(path, &m->config.model, &m->tensors, m->weights, vocabulary, error, sizeof error)) {
        fail_msg("%s", error);
    }
}

/* What the reader prints about the file, after an empty line; its exit status. */
static inline int run_reader(char output[MOST_OUTPUT]) {
    char command[256];
    snprintf(command, sizeof command, "python3 tests/gguf_reader.py --all %s 2>&1", path);
    FILE *pipe = popen(command, "r");
    assert_non_null(pipe);
    output[0] = '\n';
    size_t length = 1 + fread(output + 1, 1, MOST_OUTPUT - 2, pipe);
    output[length] = '\0';
    int status = pclose(pipe);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

static inline void read_sound(char output[MOST_OUTPUT]) {
    int status = run_reader(output);
    if (status != 0) {
        fail_msg("the reader ends with %d: %s", status, output);
    }
}

static inline void expect_line(const char *output, const char *line) {
    char whole[4096];
    assert_true(snprintf(whole, sizeof whole, "\n%s\n", line) < (int)sizeof whole);
    if (!strstr(output, whole)) {
        fail_msg("no line '%s' in:%s", line, output);
    }
}

static inline int count_lines(const char *output, const char *start) {
    char mark[64];
    snprintf(mark, sizeof mark, "\n%s", start);
    int lines = 0;
    for (const char *p = output; (p = strstr(p, mark)) != NULL; p++) {
        lines++;
    }
    return lines;
}

/* CRC-32 of zlib: the polynomial of IEEE 802.3, bits reversed. */
static inline uint32_t crc32_of(const void *data, size_t bytes) {
    const unsigned char *p = data;
    uint32_t crc = 0xffffffffu;
    for (size_t i = 0; i < bytes; i++) {
        crc ^= p[i];
        for (int bit = 0; bit < 8; bit++) {
            crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
        }
    }
    return ~crc;
}

#endif
