/* What the tests of --init-from share: folders of transformers changed tensor by tensor, runs of ours, and importing as
 * the program does it.
 *
 *     Items items;
 *     open_items(&items, in_root("there"));               // of an export
 *     items.item[3].shape[0]++;
 *     save_folder(&items, in_root("there"), in_root("changed"));
 *     Model m = import_model(in_root("changed"), "--tie 0");
 */
#ifndef TESTS_IMPORT_FIXTURE_H
#define TESTS_IMPORT_FIXTURE_H

#include "hf_folder.h"

#include <sys/stat.h>

#include "../model/checkpoint.h"
#include "../model/hf_tensors.h"
#include "../model/import.h"
#include "../model/safetensors.h"
#include "forked.h"

/* ---- importing */

/* The model that `--init-from directory` and the options make. What is not imported has initial values. */
static inline Model import_model(const char *directory, const char *options) {
    char text[512], *rest = NULL, *arguments[64] = {"train", "--init-from", (char *)directory, "--batch", "1"};
    int count = 5;
    snprintf(text, sizeof text, "%s", options);
    for (char *word = strtok_r(text, " ", &rest); word; word = strtok_r(NULL, " ", &rest)) {
        arguments[count++] = word;
    }
    Model m = {0};
    config_parse(&m.config, count, arguments);
    config_finish(&m.config);
    transformer_tensors(&m.tensors, &m.config.model);
    m.weights = calloc(m.tensors.total, sizeof *m.weights);
    tensors_init(&m.tensors, m.weights, 5);
    import_weights(m.weights, &m.tensors, &m.config.model, directory, m.config.train.upcycle);
    return m;
}

/* Bit by bit, names and shapes too. */
static inline void assert_same_model(const Model *found, const Model *expected) {
    assert_int_equal(found->tensors.count, expected->tensors.count);
    for (int t = 0; t < found->tensors.count; t++) {
        const Tensor *a = &found->tensors.items[t], *b = &expected->tensors.items[t];
        assert_string_equal(a->name, b->name);
        assert_memory_equal(a->shape, b->shape, sizeof a->shape);
        if (memcmp(found->weights + a->offset, expected->weights + b->offset, a->count * sizeof(acc_t)) != 0) {
            fail_msg("%s has other values", a->name);
        }
    }
}

typedef struct {
    const char *directory, *options;
} Import;

static inline void import_work(void *argument) {
    const Import *import = argument;
    Model m = import_model(import->directory, import->options);
    free_model(&m);
}

static inline void refuse_import(const char *directory, const char *options, const char *words) {
    Forked result;
    Import import = {directory, options};
    run_forked(&result, import_work, &import);
    assert_refused(&result, words);
}

/* ---- folders of transformers */

typedef struct {
    SafetensorsItem item[256];
    int count;
    SafetensorsFile file;
} Items;

static inline void open_items(Items *items, const char *directory) {
    char path[300], error[512];
    snprintf(path, sizeof path, "%s/model.safetensors", directory);
    if (!safetensors_open(&items->file, path, error, sizeof error)) {
        fail_msg("%s", error);
    }
    items->count = items->file.count;
    assert_true(items->count < 250);
    memcpy(items->item, items->file.items, items->count * sizeof *items->item);
}

static inline SafetensorsItem *find_item(Items *items, const char *name) {
    for (int i = 0; i < items->count; i++) {
        if (!strcmp(items->item[i].name, name)) {
            return &items->item[i];
        }
    }
    fail_msg("no item %s", name);
    return NULL;
}

static inline void remove_item(Items *items, const char *name) {
    *find_item(items, name) = items->item[--items->count];
}

/* A copy under another name, of ours to change. */
static inline SafetensorsItem *add_item(Items *items, const char *name, const char *like) {
    SafetensorsItem *item = &items->item[items->count++];
    *item = *find_item(items, like);
    snprintf(item->name, sizeof item->name, "%s", name);
    return item;
}

static inline void save_items(const SafetensorsItem *items, int count, const char *directory, const char *name) {
    char path[300], error[512];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    if (!safetensors_write(path, items, count, NULL, error, sizeof error)) {
        fail_msg("%s", error);
    }
}

/* An empty folder with the config.json of another. */
static inline void start_folder(const char *from, const char *to) {
    char path[300];
    snprintf(path, sizeof path, "%s/config.json", from);
    char *config = file_text(path, NULL);
    remove_tree(to);
    assert_int_equal(mkdir(to, 0777), 0);
    snprintf(path, sizeof path, "%s/config.json", to);
    put_file(path, config);
    free(config);
}

static inline void save_folder(const Items *items, const char *from, const char *to) {
    start_folder(from, to);
    save_items(items->item, items->count, to, "model.safetensors");
}

/* A dense model as transformers has it; none is exported. */
static inline void write_dense_folder(const Model *m, HfArchitecture architecture, const char *directory) {
    const ModelConfig *c = &m->config.model;
    char path[300], text[1024];
    snprintf(text, sizeof text,
             "{\"model_type\": \"%s\", \"hidden_act\": \"silu\", \"vocab_size\": %d, \"hidden_size\": %d,\n"
             "\"num_hidden_layers\": %d, \"num_attention_heads\": %d, \"num_key_value_heads\": %d, \"head_dim\": %d,\n"
             "\"intermediate_size\": %d, \"max_position_embeddings\": %d, \"rms_norm_eps\": %.9g,\n"
             "\"rope_theta\": %.9g, \"tie_word_embeddings\": %s}\n",
             architecture == HF_LLAMA ? "llama" : "qwen3", c->vocab, c->dim, c->layers, c->heads, c->kv_heads,
             c->head_dim, config_dense_width(c), c->seq, c->norm_eps, c->rope_base, c->tie ? "true" : "false");
    assert_int_equal(mkdir(directory, 0777), 0);
    snprintf(path, sizeof path, "%s/config.json", directory);
    put_file(path, text);
    int count;
    HfTensor *list = hf_tensors(&m->tensors, c, architecture, &count);
    SafetensorsItem *items = calloc(count, sizeof *items);
    for (int i = 0; i < count; i++) {
        SafetensorsItem *item = &items[i];
        memcpy(item->name, list[i].name, sizeof item->name);
        item->dtype = sizeof(acc_t) == 8 ? SAFETENSORS_F64 : SAFETENSORS_F32;
        item->ndim = list[i].ndim;
        memcpy(item->shape, list[i].shape, sizeof list[i].shape);
        item->data = m->weights + list[i].offset;
        item->bytes = list[i].count * sizeof(acc_t);
    }
    save_items(items, count, directory, "model.safetensors");
    free(items);
    free(list);
}

/* ---- runs */

/* A run's directory with a checkpoint of that model. */
static inline void write_run(const Model *m, const char *directory) {
    char path[300], error[1024];
    assert_int_equal(mkdir(directory, 0777), 0);
    snprintf(path, sizeof path, "%s/config.json", directory);
    char *json = config_to_json(&m->config);
    put_file(path, json);
    acc_t *moments = calloc(m->tensors.total, sizeof *moments);
    CheckpointState state = {.tensors = &m->tensors, .weights = m->weights, .m = moments, .v = moments, .step = 3};
    if (!checkpoint_save(directory, &state, json, error, sizeof error)) {
        fail_msg("%s", error);
    }
    free(moments);
    free(json);
}

#endif
