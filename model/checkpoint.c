/* Checkpoints: see checkpoint.h for the files and the promise.
 *
 * How a save keeps the promise, with C = RUN/checkpoint, T = RUN/checkpoint.tmp, O = RUN/checkpoint.old:
 *
 *     write T, each file synced, the manifest last      C is the checkpoint; T counts as one when its manifest is right
 *     remove O, a leftover                              C and T are both whole
 *     rename C to O                                     T and O are both whole
 *     rename T to C, sync RUN                           C is the checkpoint
 *     remove O, its manifest first                      a half-removed O is not a checkpoint
 *
 * So a reader that takes the first whole one of C, T, O finds the old state or the new one after any of these steps.
 * A whole T found by the next save is put in place before anything else: it may be the only checkpoint there is.
 *
 * Called by resume.c and import.c. Read next: safetensors.c.
 */
#include "checkpoint.h"

#include <assert.h>
#include <cjson/cJSON.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "../kernels/check.h"
#include "../kernels/checksum.h"
#include "safetensors.h"

enum { FILES = 3, MODEL_FILE = 0, OPTIMIZER_FILE, STATE_FILE, PATH_SIZE = 1024, ERROR_SIZE = 1536 };

static const char *const FILE_NAMES[FILES] = {"model.safetensors", "optimizer.safetensors", "state.json"};
static const char *const PREFIXES[FILES] = {"", "m.", "v."}; /* of weights, m, v */

static const SafetensorsDtype DTYPE = sizeof(acc_t) == 8 ? SAFETENSORS_F64 : SAFETENSORS_F32;
static const char *const DTYPE_NAME = sizeof(acc_t) == 8 ? "F64" : "F32";

/* The manifest's whole text: printed with it, scanned with it, then printed again to compare: no byte can differ. */
#define MANIFEST_FORMAT                                           \
    "{\"version\":1,\n"                                           \
    "\"model.safetensors\":{\"bytes\":%lld,\"crc32c\":%u},\n"     \
    "\"optimizer.safetensors\":{\"bytes\":%lld,\"crc32c\":%u},\n" \
    "\"state.json\":{\"bytes\":%lld,\"crc32c\":%u}}\n"

enum { MANIFEST_SIZE = 512 };

typedef struct {
    long long bytes[FILES];
    unsigned crc[FILES];
} Manifest;

static int manifest_print(char text[MANIFEST_SIZE], const Manifest *manifest) {
    const long long *bytes = manifest->bytes;
    const unsigned *crc = manifest->crc;
    return snprintf(text, MANIFEST_SIZE, MANIFEST_FORMAT, bytes[0], crc[0], bytes[1], crc[1], bytes[2], crc[2]);
}

typedef struct {
    char current[PATH_SIZE], tmp[PATH_SIZE], old[PATH_SIZE];
} Places;

static void path_join(char path[PATH_SIZE], const char *directory, const char *name) {
    int length = snprintf(path, PATH_SIZE, "%s/%s", directory, name);
    CHECK(length < PATH_SIZE, "the path %s/%s is too long: choose a shorter --out", directory, name);
}

static Places places_of(const char *run) {
    Places places;
    path_join(places.current, run, "checkpoint");
    path_join(places.tmp, run, "checkpoint.tmp");
    path_join(places.old, run, "checkpoint.old");
    return places;
}

static bool exists(const char *path) {
    struct stat status;
    return lstat(path, &status) == 0;
}

/* Reads a whole file; a zero byte follows. NULL with errno when it cannot be read. */
static char *file_read(const char *path, size_t *bytes) {
    struct stat status;
    int fd = open(path, O_RDONLY);
    if (fd < 0) {
        return NULL;
    }
    char *text = fstat(fd, &status) == 0 ? malloc((size_t)status.st_size + 1) : NULL;
    size_t length = 0;
    ssize_t got = 1;
    while (text && got > 0 && length < (size_t)status.st_size) {
        got = read(fd, text + length, (size_t)status.st_size - length);
        length += got > 0 ? (size_t)got : 0;
    }
    close(fd);
    if (text) {
        text[length] = 0;
        *bytes = length;
    }
    return text;
}

/* The checksum of a whole file; false with errno when it cannot be read. */
static bool file_checksum(const char *path, uint32_t *crc) {
    enum { CHUNK = 1 << 20 };
    int fd = open(path, O_RDONLY);
    char *chunk = malloc(CHUNK);
    ssize_t got = -1;
    *crc = 0;
    while (fd >= 0 && chunk && (got = read(fd, chunk, CHUNK)) > 0) {
        *crc = crc32c(*crc, chunk, (size_t)got);
    }
    int reason = errno;
    free(chunk);
    if (fd >= 0) {
        close(fd);
    }
    errno = reason;
    return got == 0;
}

/* Whether a directory is a checkpoint: a manifest, and every file with the size (and, if asked, the contents) that it
 * states. False with one line in error. */
static bool directory_verify(const char *directory, bool contents, char error[ERROR_SIZE]) {
    char path[PATH_SIZE];
    path_join(path, directory, "manifest.json");
    size_t length;
    char *text = file_read(path, &length);
    if (!text) {
        snprintf(error, ERROR_SIZE, "%s is incomplete: it has no readable manifest.json", directory);
        return false;
    }
    Manifest manifest;
    char canonical[MANIFEST_SIZE];
    long long *bytes = manifest.bytes;
    unsigned *crc = manifest.crc;
    int fields = sscanf(text, MANIFEST_FORMAT, &bytes[0], &crc[0], &bytes[1], &crc[1], &bytes[2], &crc[2]);
    bool intact = fields == 2 * FILES && (int)length == manifest_print(canonical, &manifest) &&
                  memcmp(text, canonical, length) == 0;
    free(text);
    if (!intact) {
        snprintf(error, ERROR_SIZE, "%s is truncated or altered", path);
        return false;
    }
    for (int i = 0; i < FILES; i++) {
        path_join(path, directory, FILE_NAMES[i]);
        struct stat status;
        if (stat(path, &status) != 0) {
            snprintf(error, ERROR_SIZE, "%s is missing", path);
            return false;
        }
        if (status.st_size != bytes[i]) {
            snprintf(error, ERROR_SIZE, "%s is %s: it has %lld bytes, %lld were saved", path,
                     status.st_size < bytes[i] ? "truncated" : "altered", (long long)status.st_size, bytes[i]);
            return false;
        }
        uint32_t found;
        if (contents && !file_checksum(path, &found)) {
            snprintf(error, ERROR_SIZE, "cannot read %s: %s", path, strerror(errno));
            return false;
        }
        if (contents && found != crc[i]) {
            snprintf(error, ERROR_SIZE, "%s is altered: its checksum is %u, %u was saved", path, found, crc[i]);
            return false;
        }
    }
    return true;
}

/* Removes a checkpoint directory, the manifest first: what is left of it at any time is not a checkpoint. */
static bool directory_remove(const char *directory) {
    char path[PATH_SIZE];
    path_join(path, directory, "manifest.json");
    unlink(path);
    DIR *entries = opendir(directory);
    if (!entries) {
        return errno == ENOENT;
    }
    for (struct dirent *entry; (entry = readdir(entries));) {
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0) {
            path_join(path, directory, entry->d_name);
            unlink(path);
        }
    }
    closedir(entries);
    return rmdir(directory) == 0;
}

/* Makes the names in a directory durable. */
static bool directory_sync(const char *directory) {
    int fd = open(directory, O_RDONLY | O_DIRECTORY);
    if (fd < 0) {
        return false;
    }
    bool ok = fsync(fd) == 0;
    int reason = errno;
    close(fd);
    errno = reason;
    return ok;
}

/* Writes a small file and makes it durable, its name too. */
static bool text_write(const char *directory, const char *name, const char *text, size_t length, char *error,
                       size_t error_size) {
    char path[PATH_SIZE];
    path_join(path, directory, name);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    bool ok = fd >= 0;
    for (size_t done = 0; ok && done < length;) {
        ssize_t written = write(fd, text + done, length - done);
        done += written > 0 ? (size_t)written : 0;
        ok = written >= 0 || errno == EINTR;
    }
    ok = ok && fsync(fd) == 0;
    int reason = errno;
    if (fd >= 0 && close(fd) != 0 && ok) {
        ok = false;
        reason = errno;
    }
    if (!ok) {
        snprintf(error, error_size, "cannot write %s: %s", path, strerror(reason));
    } else if (!directory_sync(directory)) {
        snprintf(error, error_size, "cannot sync %s: %s", directory, strerror(errno));
        ok = false;
    }
    return ok;
}

/* One safetensors file of every tensor in each of the buffers, under the prefixed name. */
static bool tensors_write(const char *directory, int file, const TensorList *tensors, const acc_t *const *buffers,
                          const char *const *prefixes, int buffer_count, Manifest *manifest, char *error,
                          size_t error_size) {
    char path[PATH_SIZE];
    path_join(path, directory, FILE_NAMES[file]);
    int count = tensors->count * buffer_count;
    SafetensorsItem *items = calloc((size_t)count + 1, sizeof *items);
    if (!items) {
        snprintf(error, error_size, "out of memory for %d tensors of %s", count, path);
        return false;
    }
    for (int i = 0; i < count; i++) {
        const Tensor *tensor = &tensors->items[i % tensors->count];
        int buffer = i / tensors->count;
        SafetensorsItem *item = &items[i];
        snprintf(item->name, sizeof item->name, "%s%s", prefixes[buffer], tensor->name);
        item->dtype = DTYPE;
        item->ndim = tensor->ndim;
        for (int d = 0; d < tensor->ndim; d++) {
            item->shape[d] = tensor->shape[d];
        }
        item->data = buffers[buffer] + tensor->offset;
        item->bytes = tensor->count * sizeof(acc_t);
    }
    struct stat status;
    bool ok = safetensors_write(path, items, count, &manifest->crc[file], error, error_size);
    if (ok && stat(path, &status) != 0) {
        snprintf(error, error_size, "cannot read %s: %s", path, strerror(errno));
        ok = false;
    }
    manifest->bytes[file] = ok ? (long long)status.st_size : 0;
    free(items);
    return ok;
}

/* Everything but the manifest, then, when that is durable, the manifest. */
static bool directory_write(const char *directory, const CheckpointState *state, const char *config_json, char *error,
                            size_t error_size) {
    Manifest manifest;
    const acc_t *const buffers[] = {state->weights, state->m, state->v};
    if (!tensors_write(directory, MODEL_FILE, state->tensors, buffers, PREFIXES, 1, &manifest, error, error_size) ||
        !tensors_write(directory, OPTIMIZER_FILE, state->tensors, buffers + 1, PREFIXES + 1, 2, &manifest, error,
                       error_size)) {
        return false;
    }
    size_t size = strlen(config_json) + 512;
    char *text = malloc(size);
    if (!text) {
        snprintf(error, error_size, "out of memory for %s/state.json", directory);
        return false;
    }
    int length =
        snprintf(text, size,
                 "{\"version\":1,\"step\":%" PRId64 ",\"adam_step\":%" PRId64 ",\"skipped\":%" PRId64
                 ",\"skipped_in_row\":%" PRId64 ",\"tokens\":%" PRId64 ",\"train_seconds\":%.17g,\n\"config\":%s}\n",
                 state->step, state->adam_step, state->skipped, state->skipped_in_row, state->tokens,
                 state->train_seconds, config_json);
    assert(length > 0 && (size_t)length < size);
    manifest.bytes[STATE_FILE] = length;
    manifest.crc[STATE_FILE] = crc32c(0, text, (size_t)length);
    bool ok = text_write(directory, FILE_NAMES[STATE_FILE], text, (size_t)length, error, error_size);
    free(text);
    char manifest_text[MANIFEST_SIZE];
    length = manifest_print(manifest_text, &manifest);
    return ok && text_write(directory, "manifest.json", manifest_text, (size_t)length, error, error_size);
}

/* Makes a whole RUN/checkpoint.tmp the checkpoint; on failure the one before is again where it was. */
static bool put_in_place(const char *run, const Places *places, char *error, size_t error_size) {
    if (exists(places->current)) {
        if (!directory_remove(places->old) || rename(places->current, places->old) != 0) {
            snprintf(error, error_size, "cannot move %s to %s: %s", places->current, places->old, strerror(errno));
            return false;
        }
    }
    if (rename(places->tmp, places->current) != 0 || !directory_sync(run)) {
        snprintf(error, error_size, "cannot rename %s to %s: %s", places->tmp, places->current, strerror(errno));
        rename(places->current, places->tmp); /* fails harmlessly when it was the rename that failed */
        rename(places->old, places->current);
        return false;
    }
    directory_remove(places->old); /* if this fails, the next save tries again */
    return true;
}

/* Finishes or clears away what an interrupted save left in RUN/checkpoint.tmp. */
static bool settle(const char *run, const Places *places, char *error, size_t error_size) {
    char incomplete[ERROR_SIZE];
    if (!exists(places->tmp)) {
        return true;
    }
    if (directory_verify(places->tmp, true, incomplete)) {
        return put_in_place(run, places, error, error_size);
    }
    if (!directory_remove(places->tmp)) {
        snprintf(error, error_size, "cannot remove %s: %s; remove it by hand", places->tmp, strerror(errno));
        return false;
    }
    return true;
}

/* An upper bound of the bytes that a checkpoint takes on disk. */
static double bytes_needed(const CheckpointState *state, const char *config_json) {
    enum { HEADER_ENTRY = 256, BLOCKS = 64 << 10 };
    return 3.0 * ((double)tensors_parameters(state->tensors) * sizeof(acc_t) + state->tensors->count * HEADER_ENTRY) +
           (double)strlen(config_json) + BLOCKS;
}

/* Free bytes for us on the disk of RUN; infinity when the system does not say. */
static double bytes_free(const char *run) {
    struct statvfs status;
    return statvfs(run, &status) == 0 ? (double)status.f_bavail * (double)status.f_frsize : 1e300;
}

bool checkpoint_save(const char *run, const CheckpointState *state, const char *config_json, char *error,
                     size_t error_size) {
    Places places = places_of(run);
    if (!settle(run, &places, error, error_size)) {
        return false;
    }
    const double MB = 1e6;
    double needed = bytes_needed(state, config_json);
    if (bytes_free(run) < needed) {
        snprintf(error, error_size, "no room for a checkpoint in %s: it takes %.1f MB and %.1f MB are free; make room",
                 run, needed / MB, bytes_free(run) / MB);
        return false;
    }
    if (mkdir(places.tmp, 0777) != 0) {
        snprintf(error, error_size, "cannot create %s: %s", places.tmp, strerror(errno));
        return false;
    }
    char problem[ERROR_SIZE];
    if (!directory_write(places.tmp, state, config_json, problem, sizeof problem)) {
        directory_remove(places.tmp);
        snprintf(error, error_size, "%s; a checkpoint takes %.1f MB, %.1f MB are free", problem, needed / MB,
                 bytes_free(run) / MB);
        return false;
    }
    if (!put_in_place(run, &places, error, error_size)) {
        directory_remove(places.tmp);
        return false;
    }
    return true;
}

/* "(8, 64)" */
static const char *shape_text(char text[128], int ndim, const int64_t *shape) {
    int length = sprintf(text, "(");
    for (int d = 0; d < ndim; d++) {
        length += sprintf(text + length, "%s%" PRId64, d ? ", " : "", shape[d]);
    }
    sprintf(text + length, ")");
    return text;
}

static const char ANOTHER_MODEL[] = "give the model options of the run that wrote it";

/* Reads one tensor into values after checking that the file holds it as this model wants it. */
static void tensor_read(acc_t *values, const char *directory, const SafetensorsFile *file, const Tensor *tensor,
                        const char *prefix) {
    char name[sizeof tensor->name + 8], here[128], there[128];
    snprintf(name, sizeof name, "%s%s", prefix, tensor->name);
    int64_t shape[4] = {tensor->shape[0], tensor->shape[1], tensor->shape[2]};
    shape_text(here, tensor->ndim, shape);
    const SafetensorsItem *item = safetensors_find(file, name);
    CHECK(item, "%s is of another model: it has no tensor '%s' %s: %s", directory, name, here, ANOTHER_MODEL);
    CHECK(item->ndim == tensor->ndim && memcmp(item->shape, shape, (size_t)item->ndim * sizeof *shape) == 0,
          "%s is of another model: its tensor '%s' is %s, here it is %s: %s", directory, name,
          shape_text(there, item->ndim, item->shape), here, ANOTHER_MODEL);
    CHECK(item->dtype == DTYPE,
          "%s: tensor '%s' is not of type %s, in which this program computes: resume with the program that wrote it",
          directory, name, DTYPE_NAME);
    memcpy(values + tensor->offset, item->data, item->bytes);
}

static bool list_has(const TensorList *tensors, const char *prefix, const char *name) {
    size_t length = strlen(prefix);
    for (int t = 0; t < tensors->count; t++) {
        if (strncmp(name, prefix, length) == 0 && strcmp(name + length, tensors->items[t].name) == 0) {
            return true;
        }
    }
    return false;
}

/* Reads one safetensors file: every tensor into each of the buffers, and no tensor more. */
static void tensors_read(const char *directory, int file_index, const TensorList *tensors, acc_t *const *buffers,
                         const char *const *prefixes, int buffer_count) {
    char path[PATH_SIZE], error[ERROR_SIZE], there[128];
    path_join(path, directory, FILE_NAMES[file_index]);
    SafetensorsFile file;
    CHECK(safetensors_open(&file, path, error, sizeof error), "%s", error);
    for (int b = 0; b < buffer_count; b++) {
        for (int t = 0; t < tensors->count; t++) {
            const Tensor *tensor = &tensors->items[t];
            size_t filled = tensor->offset + tensor->count;
            size_t next = t + 1 < tensors->count ? tensors->items[t + 1].offset : tensors->total;
            tensor_read(buffers[b], directory, &file, tensor, prefixes[b]);
            memset(buffers[b] + filled, 0, (next - filled) * sizeof(acc_t));
        }
    }
    for (int i = 0; file.count > tensors->count * buffer_count && i < file.count; i++) {
        const SafetensorsItem *item = &file.items[i];
        bool known = false;
        for (int b = 0; b < buffer_count; b++) {
            known = known || list_has(tensors, prefixes[b], item->name);
        }
        CHECK(known, "%s is of another model: it has a tensor '%s' %s that is not in this one: %s", directory,
              item->name, shape_text(there, item->ndim, item->shape), ANOTHER_MODEL);
    }
    safetensors_close(&file);
}

static double state_number(const cJSON *json, const char *directory, const char *key) {
    const cJSON *number = cJSON_GetObjectItemCaseSensitive(json, key);
    CHECK(cJSON_IsNumber(number) && number->valuedouble >= 0 && number->valuedouble <= 0x1p53,
          "%s/state.json has no usable \"%s\": resume with the program that wrote it", directory, key);
    return number->valuedouble;
}

static void state_read(const char *directory, CheckpointState *state) {
    char path[PATH_SIZE];
    path_join(path, directory, FILE_NAMES[STATE_FILE]);
    size_t length;
    char *text = file_read(path, &length);
    CHECK(text, "cannot read %s: %s", path, strerror(errno));
    cJSON *json = cJSON_Parse(text);
    free(text);
    state->step = (int64_t)state_number(json, directory, "step");
    state->adam_step = (int64_t)state_number(json, directory, "adam_step");
    state->skipped = (int64_t)state_number(json, directory, "skipped");
    state->skipped_in_row = (int64_t)state_number(json, directory, "skipped_in_row");
    state->tokens = (int64_t)state_number(json, directory, "tokens");
    state->train_seconds = state_number(json, directory, "train_seconds");
    cJSON_Delete(json);
}

/* The newest whole checkpoint of RUN, one of *places. Ends the program when there is none; option is what asked. */
static const char *checkpoint_find(const char *run, const Places *places, const char *option) {
    const char *const candidates[] = {places->current, places->tmp, places->old}; /* newest first */
    const char *directory = NULL;
    char problem[ERROR_SIZE] = "", other[ERROR_SIZE];
    for (int i = 0; i < 3 && !directory; i++) {
        if (exists(candidates[i]) && directory_verify(candidates[i], true, i == 0 ? problem : other)) {
            directory = candidates[i];
        }
    }
    CHECK(directory || !problem[0], "%s: restore it from a copy, or train again without %s", problem, option);
    CHECK(directory, "no checkpoint in %s: check the name, or train without %s", run, option);
    if (directory != places->current) {
        fprintf(stderr, "moelab: %s; going on from %s, which an interrupted save left whole\n",
                problem[0] ? problem : "a save was interrupted", directory);
    }
    return directory;
}

void checkpoint_load(const char *run, CheckpointState *state) {
    Places places = places_of(run);
    const char *directory = checkpoint_find(run, &places, "--resume");
    acc_t *const buffers[] = {state->weights, state->m, state->v};
    tensors_read(directory, MODEL_FILE, state->tensors, buffers, PREFIXES, 1);
    tensors_read(directory, OPTIMIZER_FILE, state->tensors, buffers + 1, PREFIXES + 1, 2);
    state_read(directory, state);
}

void checkpoint_load_weights(const char *run, const TensorList *tensors, acc_t *weights) {
    Places places = places_of(run);
    tensors_read(checkpoint_find(run, &places, "--init-from"), MODEL_FILE, tensors, &weights, PREFIXES, 1);
}

bool checkpoint_exists(const char *run) {
    Places places = places_of(run);
    char error[ERROR_SIZE];
    return directory_verify(places.current, false, error) || directory_verify(places.tmp, false, error) ||
           directory_verify(places.old, false, error);
}
