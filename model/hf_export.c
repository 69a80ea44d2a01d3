/* The folder for Hugging Face transformers: see hf_export.h.
 *
 * How DIR is replaced, with D = DIR, T = DIR.tmp, O = DIR.old:
 *
 *     restore O as D when D is gone, remove what else an interrupted export left
 *     write T, each file synced                   D is the earlier export, or there is none
 *     rename D to O, T to D, sync the parent      D is the export
 *     remove O
 *
 * Nothing is ever removed but files of the five names in directories of these three names.
 *
 * Called by export.c. Read next: hf_tensors.c and hf_config.c, which say what stands in the files.
 */
#include "hf_export.h"

#include <cjson/cJSON.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../kernels/check.h"
#include "hf_tensors.h"
#include "safetensors.h"

enum { PATH_SIZE = 1024, ERROR_SIZE = 1536, FILES = 5, MODEL_FILE = 2 };

static const char *const FILE_NAMES[FILES] = {"config.json", "generation_config.json", "model.safetensors",
                                              "tokenizer.json", "tokenizer_config.json"};

/* Puts the message into error and returns false. */
__attribute__((format(printf, 3, 4))) static bool fail(char *error, size_t error_size, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error, error_size, format, arguments);
    va_end(arguments);
    return false;
}

/* ---- directories */

typedef struct {
    char parent[PATH_SIZE], current[PATH_SIZE], tmp[PATH_SIZE + 8], old[PATH_SIZE + 8];
} Places;

/* DIR without slashes at its end, and what lies beside it. */
static bool find_places(Places *places, const char *directory, char *error, size_t error_size) {
    size_t length = strlen(directory);
    while (length > 0 && directory[length - 1] == '/') {
        length--;
    }
    if (length >= PATH_SIZE - 64) {
        return fail(error, error_size, "the path %.100s.. is too long: choose a shorter one", directory);
    }
    snprintf(places->current, PATH_SIZE, "%.*s", (int)length, directory);
    const char *slash = strrchr(places->current, '/');
    const char *name = slash ? slash + 1 : places->current;
    if (!name[0] || !strcmp(name, ".") || !strcmp(name, "..")) {
        return fail(error, error_size, "'%s' has no name of its own to write beside and rename: name a folder in it",
                    directory);
    }
    snprintf(places->parent, PATH_SIZE, "%.*s", slash ? (int)(slash - places->current) + 1 : 1,
             slash ? places->current : ".");
    snprintf(places->tmp, sizeof places->tmp, "%s.tmp", places->current);
    snprintf(places->old, sizeof places->old, "%s.old", places->current);
    return true;
}

static bool exists(const char *path) {
    struct stat status;
    return lstat(path, &status) == 0;
}

static bool is_ours(const char *name) {
    for (int i = 0; i < FILES; i++) {
        if (!strcmp(FILE_NAMES[i], name)) {
            return true;
        }
    }
    return false;
}

/* Whether there is nothing at path, or a directory of no other files than an export's. */
static bool is_replaceable(const char *path, char *error, size_t error_size) {
    struct stat status;
    if (lstat(path, &status) != 0 && errno == ENOENT) {
        return true;
    }
    DIR *entries = lstat(path, &status) == 0 && !S_ISLNK(status.st_mode) ? opendir(path) : NULL;
    if (!entries) {
        return fail(error, error_size, "%s is not a directory that can be replaced: choose another one, or remove it",
                    path);
    }
    char other[256] = "";
    for (struct dirent *entry; (entry = readdir(entries));) {
        bool itself = !strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..");
        bool plain = fstatat(dirfd(entries), entry->d_name, &status, AT_SYMLINK_NOFOLLOW) == 0 &&
                     S_ISREG(status.st_mode) && is_ours(entry->d_name);
        if (!itself && !plain) {
            snprintf(other, sizeof other, "%s", entry->d_name);
        }
    }
    closedir(entries);
    return !other[0] ||
           fail(error, error_size, "%s holds '%s', which no export writes: choose another directory, or remove it",
                path, other);
}

/* Removes a directory of an export's files; true when it is gone. */
static bool remove_export(const char *path) {
    char file[PATH_SIZE + 64];
    for (int i = 0; i < FILES; i++) {
        snprintf(file, sizeof file, "%s/%s", path, FILE_NAMES[i]);
        unlink(file);
    }
    return rmdir(path) == 0 || errno == ENOENT;
}

/* Undoes or clears away what an interrupted export left, after a look at whether all of it is an export's. */
static bool settle(const Places *places, char *error, size_t error_size) {
    if (!is_replaceable(places->current, error, error_size) || !is_replaceable(places->tmp, error, error_size) ||
        !is_replaceable(places->old, error, error_size)) {
        return false;
    }
    if (!exists(places->current) && exists(places->old) && rename(places->old, places->current) != 0) {
        return fail(error, error_size, "cannot rename %s to %s: %s", places->old, places->current, strerror(errno));
    }
    if (!remove_export(places->tmp) || !remove_export(places->old)) {
        return fail(error, error_size, "cannot remove %s or %s of an interrupted export: %s; remove them by hand",
                    places->tmp, places->old, strerror(errno));
    }
    return true;
}

static bool make_tmp(const Places *places, char *error, size_t error_size) {
    return mkdir(places->tmp, 0777) == 0 ||
           fail(error, error_size, "cannot create %s: %s; choose another directory", places->tmp, strerror(errno));
}

/* Makes the names in a directory durable. */
static bool directory_sync(const char *directory) {
    int fd = open(directory, O_RDONLY | O_DIRECTORY);
    bool ok = fd >= 0 && fsync(fd) == 0;
    int reason = errno;
    if (fd >= 0) {
        close(fd);
    }
    errno = reason;
    return ok;
}

/* Makes DIR.tmp DIR; on failure the earlier export is again where it was. */
static bool put_in_place(const Places *places, char *error, size_t error_size) {
    bool earlier = exists(places->current);
    if (earlier && rename(places->current, places->old) != 0) {
        return fail(error, error_size, "cannot rename %s to %s: %s", places->current, places->old, strerror(errno));
    }
    if (rename(places->tmp, places->current) != 0 || !directory_sync(places->parent)) {
        fail(error, error_size, "cannot rename %s to %s: %s", places->tmp, places->current, strerror(errno));
        rename(places->current, places->tmp); /* fails harmlessly when it was the rename that failed */
        if (earlier) {
            rename(places->old, places->current);
        }
        return false;
    }
    remove_export(places->old); /* if this fails, the next export tries again */
    return true;
}

void hf_export_check(const char *directory, const ModelConfig *model) {
    HfArchitecture architecture;
    Places places;
    char error[ERROR_SIZE];
    CHECK(hf_architecture(model, &architecture, error, sizeof error), "--export-hf %s: %s", directory, error);
    CHECK(find_places(&places, directory, error, sizeof error), "--export-hf %s: %s", directory, error);
    for (char *slash = strchr(places.current + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        mkdir(places.current, 0777); /* what fails here fails make_tmp too */
        *slash = '/';
    }
    CHECK(settle(&places, error, sizeof error) && make_tmp(&places, error, sizeof error), "--export-hf %s: %s",
          directory, error);
    rmdir(places.tmp);
}

/* ---- files */

static bool write_text(const char *directory, int file, const char *text, size_t bytes, char *error,
                       size_t error_size) {
    char path[PATH_SIZE + 64];
    snprintf(path, sizeof path, "%s/%s", directory, FILE_NAMES[file]);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    bool ok = fd >= 0;
    for (size_t done = 0; ok && done < bytes;) {
        ssize_t written = write(fd, text + done, bytes - done);
        done += written > 0 ? (size_t)written : 0;
        ok = written >= 0 || errno == EINTR;
    }
    ok = ok && fsync(fd) == 0;
    int reason = errno;
    if (fd >= 0 && close(fd) != 0 && ok) { /* network file systems report a full disk here */
        ok = false;
        reason = errno;
    }
    return ok || fail(error, error_size, "cannot write %s: %s", path, strerror(reason));
}

/* The same values as float: weights themselves, or a copy for the caller to free where acc_t is double. */
static const float *as_float(const acc_t *weights, size_t total, float **copy) {
    *copy = NULL;
    if (sizeof(acc_t) == sizeof(float)) {
        return (const void *)weights;
    }
    *copy = malloc(total * sizeof **copy);
    for (size_t i = 0; *copy && i < total; i++) {
        (*copy)[i] = (float)weights[i];
    }
    return *copy;
}

static bool write_weights(const char *directory, const ModelConfig *model, HfArchitecture architecture,
                          const TensorList *tensors, const acc_t *weights, char *error, size_t error_size) {
    char path[PATH_SIZE + 64];
    snprintf(path, sizeof path, "%s/%s", directory, FILE_NAMES[MODEL_FILE]);
    int count;
    float *copy;
    HfTensor *list = hf_tensors(tensors, model, architecture, &count);
    SafetensorsItem *items = calloc((size_t)count, sizeof *items);
    const float *values = as_float(weights, tensors->total, &copy);
    bool ok = items && values;
    if (!ok) {
        fail(error, error_size, "out of memory for the %d tensors of %s", count, path);
    }
    for (int i = 0; ok && i < count; i++) {
        SafetensorsItem *item = &items[i];
        _Static_assert(sizeof item->name == sizeof list->name, "names fit");
        memcpy(item->name, list[i].name, sizeof item->name);
        item->dtype = SAFETENSORS_F32;
        item->ndim = list[i].ndim;
        memcpy(item->shape, list[i].shape, sizeof list[i].shape);
        item->data = values + list[i].offset;
        item->bytes = list[i].count * sizeof(float);
    }
    ok = ok && safetensors_write(path, items, count, NULL, error, error_size);
    free(copy);
    free(items);
    free(list);
    return ok;
}

/* tokenizer_config.json, the caller's (free). transformers warns where clean_up_tokenization_spaces is absent, and text
 * must come out of a decoder as it went in. */
static char *tokenizer_config(const ModelConfig *model, const Vocabulary *vocabulary) {
    cJSON *object = cJSON_CreateObject();
    cJSON_AddStringToObject(object, "tokenizer_class", "PreTrainedTokenizerFast");
    cJSON_AddNumberToObject(object, "model_max_length", model->seq);
    cJSON_AddFalseToObject(object, "clean_up_tokenization_spaces");
    const char *end =
        vocabulary->end_of_text < 0 ? NULL : vocabulary->text(vocabulary->tokenizer, vocabulary->end_of_text);
    if (end) {
        cJSON_AddStringToObject(object, "eos_token", end);
    }
    char *json = cJSON_Print(object);
    cJSON_Delete(object);
    CHECK(json, "out of memory while writing tokenizer_config.json");
    return json;
}

static bool write_files(const char *directory, const ModelConfig *model, HfArchitecture architecture,
                        const TensorList *tensors, const acc_t *weights, const Vocabulary *vocabulary, char *error,
                        size_t error_size) {
    char *config = hf_config_write(model, architecture, vocabulary->end_of_text);
    char *generation = hf_generation_config_write(vocabulary->end_of_text);
    char *about_tokens = tokenizer_config(model, vocabulary);
    size_t bytes;
    const char *tokens = vocabulary->json(vocabulary->tokenizer, &bytes);
    bool ok = write_text(directory, 0, config, strlen(config), error, error_size) &&
              write_text(directory, 1, generation, strlen(generation), error, error_size) &&
              write_weights(directory, model, architecture, tensors, weights, error, error_size) &&
              write_text(directory, 3, tokens, bytes, error, error_size) &&
              write_text(directory, 4, about_tokens, strlen(about_tokens), error, error_size);
    free(config);
    free(generation);
    free(about_tokens);
    return ok &&
           (directory_sync(directory) || fail(error, error_size, "cannot sync %s: %s", directory, strerror(errno)));
}

bool hf_export(const char *directory, const ModelConfig *model, const TensorList *tensors, const acc_t *weights,
               const Vocabulary *vocabulary, char *error, size_t error_size) {
    HfArchitecture architecture;
    Places places;
    if (!hf_architecture(model, &architecture, error, error_size) ||
        !find_places(&places, directory, error, error_size) || !settle(&places, error, error_size) ||
        !make_tmp(&places, error, error_size)) {
        return false;
    }
    if (!write_files(places.tmp, model, architecture, tensors, weights, vocabulary, error, error_size) ||
        !put_in_place(&places, error, error_size)) {
        remove_export(places.tmp);
        return false;
    }
    return true;
}
