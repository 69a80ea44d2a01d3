/* The weights of a folder of Hugging Face transformers: see hf_weights.h.
 *
 * The files are opened and checked against the index, then hf_tensors.h says which names are wanted: each is taken out
 * of its file once, and at the end nothing may be left that was not taken.
 *
 * Called by import.c. Read next: safetensors.c.
 */
#include "hf_weights.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../kernels/check.h"
#include "hf_tensors.h"
#include "safetensors.h"

enum { PATH_SIZE = 1024, ERROR_SIZE = 1024, SHAPE_TEXT = 128, LONGEST_INDEX = 64 << 20 };

/* ---- numbers */

/* 1 sign, 5 exponent and 10 mantissa bits. Moved to their places in a float they are 2^112 too small, subnormals
 * included; the largest exponent means infinity and NaN in both. */
static float half_value(uint16_t half) {
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13, sign = (uint32_t)(half & 0x8000) << 16;
    float value;
    if ((half & 0x7c00) == 0x7c00) {
        bits |= 0x7f800000;
    } else {
        memcpy(&value, &bits, sizeof value);
        value *= 0x1p112f;
        memcpy(&bits, &value, sizeof bits);
    }
    bits |= sign;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The upper half of a float. */
static float bfloat_value(uint16_t bfloat) {
    uint32_t bits = (uint32_t)bfloat << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Element i; the file's bytes may be unaligned. */
static acc_t item_value(const SafetensorsItem *item, size_t i) {
    const char *data = item->data;
    uint16_t half;
    float single;
    double value;
    switch (item->dtype) {
        case SAFETENSORS_F64: memcpy(&value, data + i * sizeof value, sizeof value); return (acc_t)value;
        case SAFETENSORS_F32: memcpy(&single, data + i * sizeof single, sizeof single); return single;
        default:
            memcpy(&half, data + i * sizeof half, sizeof half);
            return item->dtype == SAFETENSORS_F16 ? half_value(half) : bfloat_value(half);
    }
}

static void read_values(acc_t *values, const SafetensorsItem *item, size_t count, const char *directory) {
    size_t bad = 0;
#pragma omp parallel for reduction(+ : bad)
    for (size_t i = 0; i < count; i++) {
        values[i] = item_value(item, i);
        bad += !isfinite(values[i]);
    }
    CHECK(bad == 0, "%s: tensor %s has %zu values that are not finite %s numbers: nothing can be trained from it",
          directory, item->name, bad, REAL_NAME);
}

/* ---- files */

/* One file; flags are of its items. */
typedef struct {
    char name[256];
    SafetensorsFile file;
    bool *listed; /* the index has it */
    bool *taken;
} Part;

typedef struct {
    const char *directory;
    Part *parts;
    int count;
} Folder;

static void join(char path[PATH_SIZE], const char *directory, const char *name) {
    int length = snprintf(path, PATH_SIZE, "%s/%s", directory, name);
    CHECK(length < PATH_SIZE, "the path %s/%s is too long: move the model to a shorter one", directory, name);
}

static Part *open_part(Folder *folder, const char *name) {
    char path[PATH_SIZE], error[ERROR_SIZE];
    join(path, folder->directory, name);
    folder->parts = realloc(folder->parts, (size_t)(folder->count + 1) * sizeof *folder->parts);
    CHECK(folder->parts, "out of memory for %d files of %s", folder->count + 1, folder->directory);
    Part *part = &folder->parts[folder->count++];
    snprintf(part->name, sizeof part->name, "%s", name);
    CHECK(safetensors_open(&part->file, path, error, sizeof error), "%s", error);
    part->listed = calloc((size_t)part->file.count + 1, sizeof(bool));
    part->taken = calloc((size_t)part->file.count + 1, sizeof(bool));
    CHECK(part->listed && part->taken, "out of memory for the %d tensors of %s", part->file.count, path);
    return part;
}

/* A file's name that leads nowhere else: "model-00001-of-00002.safetensors". */
static bool is_plain_name(const char *name) {
    static const char suffix[] = ".safetensors";
    size_t length = strlen(name), most = sizeof((Part *)0)->name;
    return length > strlen(suffix) && length < most && !strchr(name, '/') &&
           !strcmp(name + length - strlen(suffix), suffix);
}

/* One entry of the index: the tensor is in that file, and stands in the index once. */
static void list_tensor(Folder *folder, const cJSON *entry, const char *index) {
    CHECK(cJSON_IsString(entry) && is_plain_name(entry->valuestring),
          "%s: the file of tensor '%.100s' is not the plain name of a .safetensors file beside it", index,
          entry->string);
    Part *part = NULL;
    for (int p = 0; p < folder->count && !part; p++) {
        part = strcmp(folder->parts[p].name, entry->valuestring) == 0 ? &folder->parts[p] : NULL;
    }
    part = part ? part : open_part(folder, entry->valuestring);
    const SafetensorsItem *item = safetensors_find(&part->file, entry->string);
    CHECK(item, "%s says that %s holds tensor '%.100s', but it does not: copy the whole model again", index, part->name,
          entry->string);
    CHECK(!part->listed[item - part->file.items], "%s lists tensor %s twice", index, item->name);
    part->listed[item - part->file.items] = true;
}

/* The index's text as JSON, the caller's. */
static cJSON *read_index(const char *path) {
    FILE *file = fopen(path, "rb");
    CHECK(file, "cannot read %s: %s", path, strerror(errno));
    char *text = malloc(LONGEST_INDEX + 1);
    CHECK(text, "out of memory for %s", path);
    size_t length = fread(text, 1, LONGEST_INDEX + 1, file);
    fclose(file);
    cJSON *json = NULL;
    if (length <= LONGEST_INDEX) {
        text[length] = '\0';
        json = strlen(text) == length ? cJSON_ParseWithOpts(text, NULL, true) : NULL;
    }
    free(text);
    return json;
}

/* Opens the files of the index, which together hold the tensors it lists and no other. */
static void open_index(Folder *folder, const char *path) {
    cJSON *index = read_index(path);
    const cJSON *map = cJSON_GetObjectItemCaseSensitive(index, "weight_map"), *entry;
    CHECK(cJSON_IsObject(map), "%s is not a JSON object with a weight_map: copy the whole model again", path);
    cJSON_ArrayForEach(entry, map) {
        list_tensor(folder, entry, path);
    }
    for (int p = 0; p < folder->count; p++) {
        const Part *part = &folder->parts[p];
        for (int i = 0; i < part->file.count; i++) {
            CHECK(part->listed[i], "%s: %s has a tensor %s that %s does not list: copy the whole model again",
                  folder->directory, part->name, part->file.items[i].name, path);
        }
    }
    cJSON_Delete(index);
}

static void open_folder(Folder *folder, const char *directory) {
    char single[PATH_SIZE], index[PATH_SIZE];
    *folder = (Folder){.directory = directory};
    join(single, directory, "model.safetensors");
    join(index, directory, "model.safetensors.index.json");
    if (access(single, F_OK) == 0) { /* as transformers prefers it, too */
        open_part(folder, "model.safetensors");
        return;
    }
    CHECK(access(index, F_OK) == 0,
          "%s has a config.json but neither model.safetensors nor model.safetensors.index.json: save the model with "
          "save_pretrained of a transformers that writes safetensors",
          directory);
    open_index(folder, index);
}

static void close_folder(Folder *folder) {
    for (int p = 0; p < folder->count; p++) {
        safetensors_close(&folder->parts[p].file);
        free(folder->parts[p].listed);
        free(folder->parts[p].taken);
    }
    free(folder->parts);
}

/* ---- tensors */

/* The tensor of that name, which counts as taken; NULL when there is none. */
static const SafetensorsItem *take(Folder *folder, const char *name) {
    for (int p = 0; p < folder->count; p++) {
        Part *part = &folder->parts[p];
        const SafetensorsItem *item = safetensors_find(&part->file, name);
        if (item) {
            part->taken[item - part->file.items] = true;
            return item;
        }
    }
    return NULL;
}

/* "(8, 64)" */
static const char *shape_text(char text[SHAPE_TEXT], int ndim, const int64_t *shape) {
    int length = sprintf(text, "(");
    for (int d = 0; d < ndim; d++) {
        length += sprintf(text + length, "%s%" PRId64, d ? ", " : "", shape[d]);
    }
    sprintf(text + length, ")");
    return text;
}

static void check_shape(const SafetensorsItem *item, int ndim, const int64_t *shape, const char *directory) {
    char there[SHAPE_TEXT], asked[SHAPE_TEXT];
    CHECK(item->ndim == ndim && memcmp(item->shape, shape, (size_t)ndim * sizeof *shape) == 0,
          "%s: tensor %s is %s, but config.json asks for %s: the two are of different models", directory, item->name,
          shape_text(there, item->ndim, item->shape), shape_text(asked, ndim, shape));
}

/* Experts fused into one tensor: values lie there as they do in ours. False when there is none. */
static bool read_fused(acc_t *values, Folder *folder, const Tensor *tensor) {
    char name[sizeof((SafetensorsItem *)0)->name];
    bool is_w1 = strstr(tensor->name, ".w1") != NULL;
    snprintf(name, sizeof name, "model.layers.%d.mlp.experts.%s", tensor->layer, is_w1 ? "gate_up_proj" : "down_proj");
    const SafetensorsItem *item = take(folder, name);
    if (item) {
        const int64_t shape[] = {tensor->shape[0], tensor->shape[1], tensor->shape[2]};
        check_shape(item, 3, shape, folder->directory);
        read_values(values + tensor->offset, item, tensor->count, folder->directory);
    }
    return item != NULL;
}

static void read_part(acc_t *values, Folder *folder, const HfTensor *part, const Tensor *tensor) {
    char text[SHAPE_TEXT], name[sizeof((SafetensorsItem *)0)->name];
    const SafetensorsItem *item = take(folder, part->name);
    if (!item && tensor->kind == TENSOR_ROUTER) { /* beside fused experts Mixtral's router has Qwen's name */
        snprintf(name, sizeof name, "model.layers.%d.mlp.gate.weight", tensor->layer);
        item = take(folder, name);
    }
    CHECK(item, "%s has no tensor %s %s, which its config.json asks for: copy the whole model again", folder->directory,
          part->name, shape_text(text, part->ndim, part->shape));
    check_shape(item, part->ndim, part->shape, folder->directory);
    read_values(values + part->offset, item, part->count, folder->directory);
}

/* What carries nothing: the angles of the rotary embedding, which old versions saved, and a tied head. */
static bool is_redundant(Folder *folder, const SafetensorsItem *item, const ModelConfig *model) {
    static const char angles[] = ".rotary_emb.inv_freq";
    size_t length = strlen(item->name);
    if (length > strlen(angles) && !strcmp(item->name + length - strlen(angles), angles)) {
        return true;
    }
    if (strcmp(item->name, "lm_head.weight") != 0 || !model->tie) {
        return false;
    }
    const SafetensorsItem *embedding = take(folder, "model.embed_tokens.weight");
    CHECK(item->dtype == embedding->dtype && item->bytes == embedding->bytes &&
              memcmp(item->data, embedding->data, item->bytes) == 0,
          "%s: lm_head.weight differs from model.embed_tokens.weight, but config.json has tie_word_embeddings true: "
          "set it to false there if the head is meant to be its own",
          folder->directory);
    return true;
}

static void check_leftovers(Folder *folder, const ModelConfig *model) {
    for (int p = 0; p < folder->count; p++) {
        const Part *part = &folder->parts[p];
        for (int i = 0; i < part->file.count; i++) {
            char text[SHAPE_TEXT];
            const SafetensorsItem *item = &part->file.items[i];
            CHECK(part->taken[i] || is_redundant(folder, item, model),
                  "%s has a tensor %s %s that its config.json does not explain: this program would leave it out of the "
                  "model",
                  folder->directory, item->name, shape_text(text, item->ndim, item->shape));
        }
    }
}

void hf_weights_read(acc_t *values, const TensorList *tensors, const ModelConfig *model, HfArchitecture architecture,
                     const char *directory) {
    Folder folder;
    int count, next = 0;
    open_folder(&folder, directory);
    HfTensor *list = hf_tensors(tensors, model, architecture, &count);
    for (int t = 0; t < tensors->count; t++) { /* the list is in the order of the tensors */
        const Tensor *tensor = &tensors->items[t];
        size_t end = tensor->offset + tensor->count;
        bool fused = tensor->kind == TENSOR_EXPERT && read_fused(values, &folder, tensor);
        for (; next < count && list[next].offset < end; next++) {
            if (!fused) {
                read_part(values, &folder, &list[next], tensor);
            }
        }
    }
    check_leftovers(&folder, model);
    free(list);
    close_folder(&folder);
}
