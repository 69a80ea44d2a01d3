/* --init-from and --upcycle: see import.h.
 *
 * The source's own configuration says which tensors it has; they are read into a buffer laid out like the source, and
 * from there go by name into the buffer of the model at hand. --upcycle is one more rule of that last step: the values
 * of layers.N.mlp.w1 and w2 go to each expert of layers.N.moe.experts.w1 and w2.
 *
 * Called by config.c (what DIR says about itself) and train.c (its weights). Read next: hf_weights.c and checkpoint.c,
 * where the values come from.
 */
#include "import.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../kernels/check.h"
#include "checkpoint.h"
#include "hf_config.h"
#include "hf_weights.h"
#include "moe.h"
#include "transformer.h"
#include "vocabulary.h"
#include "whole.h"

enum { PATH_SIZE = CONFIG_TEXT + 64, LONGEST_CONFIG = 1 << 20 };

/* ---- the configuration */

/* A whole text file, the caller's; NULL with one line in error. */
static char *read_text(const char *path, char *error, size_t error_size) {
    FILE *file = fopen(path, "rb");
    if (!file) {
        snprintf(error, error_size, "cannot read %s (%s)", path, strerror(errno));
        return NULL;
    }
    char *text = malloc(LONGEST_CONFIG + 2);
    CHECK(text, "out of memory for %s", path);
    size_t length = fread(text, 1, LONGEST_CONFIG + 1, file);
    bool whole = !ferror(file) && length <= LONGEST_CONFIG;
    fclose(file);
    text[length] = '\0';
    if (!whole || strlen(text) != length) {
        snprintf(error, error_size, "%s is not a text of at most %d bytes", path, LONGEST_CONFIG);
        free(text);
        return NULL;
    }
    return text;
}

/* Whether tensors of these extents can be listed. A run wrote what config_finish had passed, but its file may have been
 * edited since; each option alone is in its range. */
static bool is_model(const Config *source, const char *path, char *error, size_t error_size) {
    Config derived = *source;
    config_derive(&derived);
    const ModelConfig *model = &derived.model;
    const char *problem = NULL;
    if (!router_find(model->router)) {
        problem = "there is no such router";
    } else if (model->head_dim < 1) {
        problem = "--heads leave nothing of --dim";
    } else if (2.0 * (model->top_k + model->shared_experts) * model->expert_dim * model->chain_steps > INT_MAX) {
        problem = "its dense layers are too wide";
    } else if (model->slots < 0 || (double)model->experts * model->slots > INT_MAX) {
        problem = "it has too many slots";
    }
    if (problem) {
        snprintf(error, error_size, "%s is not a run's configuration: %s", path, problem);
    }
    return !problem;
}

/* What DIR/config.json says, *of_run whether it is ours; architecture is set when it is not. */
static bool read_source(Config *source, bool *of_run, HfArchitecture *architecture, const char *directory, char *error,
                        size_t error_size) {
    char path[PATH_SIZE], reason[512];
    if (snprintf(path, sizeof path, "%s/config.json", directory) >= (int)sizeof path) {
        snprintf(error, error_size, "the path is too long");
        return false;
    }
    char *text = read_text(path, error, error_size);
    if (!text) {
        return false;
    }
    *of_run = !hf_config_is(text);
    bool valid;
    if (*of_run) {
        valid = config_read(source, directory, error, error_size) && is_model(source, path, error, error_size);
    } else {
        config_defaults(source);
        valid = hf_config_read(source, architecture, text, reason, sizeof reason);
        if (!valid) {
            snprintf(error, error_size, "%s: %s", path, reason);
        }
    }
    free(text);
    return valid;
}

bool import_config(Config *source, const char *directory, char *error, size_t error_size) {
    bool of_run;
    HfArchitecture architecture;
    return read_source(source, &of_run, &architecture, directory, error, error_size);
}

void import_tokenizer(char tokenizer[CONFIG_TEXT], const Config *source, const char *directory) {
    char path[PATH_SIZE];
    vocabulary_path(path, sizeof path, directory); /* where a run keeps it is where transformers has it, too */
    if (access(path, F_OK) != 0) {
        memcpy(tokenizer, source->train.tokenizer, CONFIG_TEXT);
        return;
    }
    CHECK(strlen(path) < CONFIG_TEXT, "--init-from %s: the path of its tokenizer.json is too long", directory);
    memcpy(tokenizer, path, strlen(path) + 1);
}

/* ---- the weights */

/* What is read, in a layout of its own. */
typedef struct {
    const char *directory;
    Config config;
    TensorList tensors;
    acc_t *values;
    bool *used; /* of each tensor */
} Source;

static void open_source(Source *source, const char *directory) {
    char error[1024];
    bool of_run;
    HfArchitecture architecture;
    *source = (Source){.directory = directory};
    CHECK(read_source(&source->config, &of_run, &architecture, directory, error, sizeof error), "--init-from %s: %s",
          directory, error);
    config_derive(&source->config);
    transformer_tensors(&source->tensors, &source->config.model);
    source->used = calloc((size_t)source->tensors.count, sizeof(bool));
    source->values = calloc(source->tensors.total, sizeof(acc_t));
    CHECK(source->used && source->values, "out of memory for the %zu weights of %s", source->tensors.total, directory);
    if (of_run) {
        checkpoint_load_weights(directory, &source->tensors, source->values);
    } else {
        hf_weights_read(source->values, &source->tensors, &source->config.model, architecture, directory);
    }
}

static void close_source(Source *source) {
    tensors_free(&source->tensors);
    free(source->values);
    free(source->used);
}

/* "(8, 64)" */
static const char *shape_text(char text[64], const int *shape, int ndim) {
    int length = sprintf(text, "(");
    for (int d = 0; d < ndim; d++) {
        length += sprintf(text + length, "%s%d", d ? ", " : "", shape[d]);
    }
    sprintf(text + length, ")");
    return text;
}

/* The source's tensor of that name, which counts as used; its values. Its shape is to be the one asked for. */
static const acc_t *find_values(Source *source, const char *name, const int *shape, int ndim) {
    char asked[64], there[64];
    int index = tensors_find(&source->tensors, name);
    CHECK(index >= 0,
          "--init-from %s has no tensor %s %s, which the model options given here ask for: drop those that its run or "
          "config.json does not have",
          source->directory, name, shape_text(asked, shape, ndim));
    const Tensor *tensor = &source->tensors.items[index];
    CHECK(tensor->ndim == ndim && memcmp(tensor->shape, shape, (size_t)ndim * sizeof *shape) == 0,
          "--init-from %s: its tensor %s is %s, but the model options given here ask for %s: drop those that change "
          "its extents",
          source->directory, name, shape_text(there, tensor->shape, tensor->ndim), shape_text(asked, shape, ndim));
    source->used[index] = true;
    return source->values + tensor->offset;
}

/* To every expert the MLP of the dense layer in its place. */
static void upcycle_experts(acc_t *experts, const Tensor *tensor, Source *source) {
    char name[64];
    const char *part = strrchr(tensor->name, '.'); /* ".w1" or ".w2" */
    snprintf(name, sizeof name, "layers.%d.mlp%s", tensor->layer, part);
    const acc_t *mlp = find_values(source, name, tensor->shape + 1, 2);
    size_t size = tensor->count / tensor->shape[0];
    for (int e = 0; e < tensor->shape[0]; e++) {
        memcpy(experts + e * size, mlp, size * sizeof(acc_t));
    }
}

/* What no tensor's shape tells apart: heads of other widths, cut from the same rows. */
static void check_heads(const Source *source, const ModelConfig *model) {
    const ModelConfig *there = &source->config.model;
    CHECK(there->heads == model->heads && there->head_dim == model->head_dim,
          "--init-from %s has %d heads of %d, here they are %d of %d: drop --heads and --head-dim", source->directory,
          there->heads, there->head_dim, model->heads, model->head_dim);
}

void import_weights(acc_t *host, const TensorList *tensors, const ModelConfig *model, const char *directory,
                    bool upcycle) {
    Source source;
    open_source(&source, directory);
    const char *router = source.config.model.router;
    CHECK(!upcycle || router_find(router)->plan == PLAN_NONE,
          "--upcycle makes experts of a dense model, but %s has --router %s: drop --upcycle", directory, router);
    check_heads(&source, model);
    for (int t = 0; t < tensors->count; t++) {
        const Tensor *tensor = &tensors->items[t];
        acc_t *values = host + tensor->offset;
        if (upcycle && tensor->kind == TENSOR_EXPERT) {
            upcycle_experts(values, tensor, &source);
        } else if (tensor->adapter && tensors_find(&source.tensors, tensor->name) < 0) {
            continue; /* it begins here */
        } else if (!upcycle || (tensor->kind != TENSOR_ROUTER && tensor->kind != TENSOR_STATE)) {
            const acc_t *there = find_values(&source, tensor->name, tensor->shape, tensor->ndim);
            memcpy(values, there, tensor->count * sizeof(acc_t));
        }
    }
    for (int t = 0; t < source.tensors.count; t++) {
        char text[64];
        const Tensor *extra = &source.tensors.items[t];
        CHECK(source.used[t],
              "--init-from %s has a tensor %s %s that the model options given here leave no place for: drop those that "
              "its run or config.json does not have",
              directory, extra->name, shape_text(text, extra->shape, extra->ndim));
    }
    close_source(&source);
}

void import_part(acc_t *host, const TensorList *tensors, const Config *config) {
    TensorList whole = whole_tensors(&config->model);
    acc_t *all = calloc(whole.total, sizeof(acc_t));
    CHECK(all, "out of memory for %zu weights of --init-from", whole.total);
    for (int t = 0; t < tensors->count; t++) { /* what is not in --init-from stays as it is */
        const Tensor *part = &tensors->items[t];
        memcpy(all + whole.items[t].offset + part->first, host + part->offset, part->count * sizeof(acc_t));
    }
    import_weights(all, &whole, &config->model, config->train.init_from, config->train.upcycle);
    tensors_take_part(tensors, host, &whole, all);
    tensors_free(&whole);
    free(all);
}
