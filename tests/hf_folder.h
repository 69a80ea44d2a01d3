/* What the tests of --export-hf and --init-from share: a temporary directory, small models with random weights, and a
 * stand-in for the tokenizer.
 *
 *     Model m = make_model("--qk-norm 0");     // on top of SMALL
 *     export_model(&m, in_root("there"));
 *
 * Used by test_hf_tensors.c, test_hf_export.c and the test_import files.
 */
#ifndef TESTS_HF_FOLDER_H
#define TESTS_HF_FOLDER_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../kernels/random.h"
#include "../model/hf_export.h"
#include "../model/transformer.h"
#include "set_options.h"
#include "threads.h"

/* No two extents are alike, so that a wrong cut or order shows; heads are not --dim / --heads wide. */
#define SMALL                                                                                                         \
    "--layers 2 --dim 22 --heads 4 --kv-heads 2 --head-dim 6 --seq 16 --vocab 70 --experts 3 --top-k 2 --expert-dim " \
    "10 "                                                                                                             \
    "--batch 1 "

/* ---- files */

static char root[] = "/tmp/test_hf_XXXXXX";

static inline int make_root(void **unused) {
    omp_set_num_threads(1); /* little is computed, and forked children must not wait for threads they do not have */
    return mkdtemp(root) ? 0 : -1;
}

/* Removes a file, or a directory with all that is in it. */
static inline void remove_tree(const char *path) {
    DIR *entries = opendir(path);
    for (struct dirent *entry; entries && (entry = readdir(entries));) {
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0) {
            char *inside = malloc(strlen(path) + strlen(entry->d_name) + 2);
            sprintf(inside, "%s/%s", path, entry->d_name);
            remove_tree(inside);
            free(inside);
        }
    }
    if (entries) {
        closedir(entries);
    }
    remove(path);
}

static inline int remove_root(void **unused) {
    remove_tree(root);
    return 0;
}

/* A path in the temporary directory; valid for the next seven calls. */
static inline const char *in_root(const char *name) {
    static char path[8][256];
    static int next;
    char *out = path[next = (next + 1) % 8];
    assert_true(snprintf(out, sizeof path[0], "%s/%s", root, name) < (int)sizeof path[0]);
    return out;
}

/* A whole file, zero-terminated, the caller's. */
static inline char *file_text(const char *path, size_t *bytes) {
    FILE *file = fopen(path, "rb");
    if (!file) {
        fail_msg("cannot open %s", path);
    }
    fseek(file, 0, SEEK_END);
    size_t size = (size_t)ftell(file);
    rewind(file);
    char *text = malloc(size + 1);
    assert_int_equal(fread(text, 1, size, file), size);
    text[size] = '\0';
    fclose(file);
    if (bytes) {
        *bytes = size;
    }
    return text;
}

static inline void put_file(const char *path, const char *text) {
    FILE *file = fopen(path, "wb");
    if (!file) {
        fail_msg("cannot write %s", path);
    }
    fputs(text, file);
    assert_int_equal(fclose(file), 0);
}

/* ---- models */

typedef struct {
    Config config;
    TensorList tensors;
    acc_t *weights;
} Model;

/* `seed` models have no value in common. */
static inline Model make_model_of(const char *options, uint64_t seed) {
    Model m = {0};
    config_defaults(&m.config);
    set_options(&m.config, SMALL);
    set_options(&m.config, options);
    config_finish(&m.config);
    transformer_tensors(&m.tensors, &m.config.model);
    m.weights = calloc(m.tensors.total, sizeof *m.weights);
    for (int t = 0; t < m.tensors.count; t++) { /* floats, so that the double build's exports lose nothing */
        const Tensor *tensor = &m.tensors.items[t];
        for (size_t i = tensor->offset; i < tensor->offset + tensor->count; i++) {
            m.weights[i] = (float)random_normal(seed, i);
        }
    }
    return m;
}

static inline Model make_model(const char *options) {
    return make_model_of(options, 1);
}

static inline void free_model(Model *m) {
    free(m->weights);
    tensors_free(&m->tensors);
}

/* Element i of a tensor, as float32. */
static inline float value_at(const Model *m, const char *name, size_t i) {
    int index = tensors_find(&m->tensors, name);
    assert_true(index >= 0 && i < m->tensors.items[index].count);
    return (float)m->weights[m->tensors.items[index].offset + i];
}

/* ---- the tokenizer */

static const char TOKENIZER_JSON[] = "{\"a tokenizer\": [1, 2]}\n";

static inline const char *stand_in_json(const struct Tokenizer *unused, size_t *length) {
    *length = strlen(TOKENIZER_JSON);
    return TOKENIZER_JSON;
}

static inline const char *stand_in_text(const struct Tokenizer *unused, int id) {
    return id == 7 ? "<|end \"of\" text|>" : NULL;
}

/* end_of_text: 7 or -1. */
static inline Vocabulary stand_in(int end_of_text) {
    return (Vocabulary){.size = 8, .end_of_text = end_of_text, .text = stand_in_text, .json = stand_in_json};
}

static inline bool try_export(const Model *m, const char *directory, char *error, size_t error_size) {
    Vocabulary vocabulary = stand_in(-1);
    return hf_export(directory, &m->config.model, &m->tensors, m->weights, &vocabulary, error, error_size);
}

static inline void export_model(const Model *m, const char *directory) {
    char error[512] = "";
    if (!try_export(m, directory, error, sizeof error)) {
        fail_msg("%s", error);
    }
}

#endif
