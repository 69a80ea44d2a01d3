/* The safetensors format, written and read: see safetensors.h.
 *
 *     offset 0     u64, little-endian: N, the bytes of the header
 *            8     N bytes of JSON, padded with spaces so that the tensors start at a multiple of 64:
 *                  {"__metadata__":{"format":"pt"},"name":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}, ...}
 *            8+N   the tensors' bytes; the offsets count from here and leave no gap
 *
 * A file may come from anyone, so the reader believes nothing: every number is bounded before it is used and every
 * tensor is shown to lie inside the file before a pointer to it exists.
 *
 * Called by checkpoint.c. Read next: checkpoint.c.
 */
#include "safetensors.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../kernels/checksum.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the format is little-endian and so is this code");

enum {
    DATA_ALIGNMENT = 64,
    LENGTH_BYTES = 8,                 /* the u64 in front */
    HEADER_LIMIT = 100 * 1000 * 1000, /* the format's own bound */
    MAX_DIMENSIONS = 4,
    CHUNK = 1 << 20, /* checksummed, then written, while it is in the cache */
};

static const char *const DTYPE_NAMES[SAFETENSORS_DTYPES] = {"F64", "F32", "F16", "BF16"};
static const size_t DTYPE_BYTES[SAFETENSORS_DTYPES] = {8, 4, 2, 2};

/* Puts the message into error as one line, whatever bytes a hostile name brought in, and returns false. */
__attribute__((format(printf, 3, 4))) static bool fail(char *error, size_t error_size, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error, error_size, format, arguments);
    va_end(arguments);
    for (char *c = error; error_size && *c; c++) {
        if ((unsigned char)*c < ' ' || *c == 127) {
            *c = '?';
        }
    }
    return false;
}

/* Bytes of a tensor of this shape; false when the shape is not one, or the product does not fit. */
static bool shape_bytes(uint64_t *bytes, SafetensorsDtype dtype, int ndim, const int64_t *shape) {
    *bytes = DTYPE_BYTES[dtype];
    for (int i = 0; i < ndim; i++) {
        if (shape[i] < 0 || __builtin_mul_overflow(*bytes, (uint64_t)shape[i], bytes)) {
            return false;
        }
    }
    return true;
}

static char *append_quoted(char *out, const char *name) {
    *out++ = '"';
    for (; *name; name++) {
        if (*name == '"' || *name == '\\') {
            *out++ = '\\';
        }
        *out++ = *name;
    }
    *out++ = '"';
    return out;
}

/* The length field and the header of a file of these items, in one buffer of *size bytes (free it); NULL when memory
 * ran out. */
static char *header_make(const SafetensorsItem *items, int count, size_t *size) {
    /* an item: its name with every character escaped, four extents and two offsets of at most 20 digits, the words */
    char *buffer = malloc((size_t)count * (2 * sizeof items->name + 256) + 256);
    if (!buffer) {
        return NULL;
    }
    char *out = buffer + LENGTH_BYTES;
    out += sprintf(out, "{\"__metadata__\":{\"format\":\"pt\"}");
    uint64_t offset = 0;
    for (int i = 0; i < count; i++) {
        *out++ = ',';
        out = append_quoted(out, items[i].name);
        out += sprintf(out, ":{\"dtype\":\"%s\",\"shape\":[", DTYPE_NAMES[items[i].dtype]);
        for (int d = 0; d < items[i].ndim; d++) {
            out += sprintf(out, "%s%lld", d ? "," : "", (long long)items[i].shape[d]);
        }
        unsigned long long begin = offset, end = offset + items[i].bytes;
        out += sprintf(out, "],\"data_offsets\":[%llu,%llu]}", begin, end);
        offset = end;
    }
    *out++ = '}';
    while ((out - buffer) % DATA_ALIGNMENT) {
        *out++ = ' ';
    }
    *size = (size_t)(out - buffer);
    uint64_t length = *size - LENGTH_BYTES;
    memcpy(buffer, &length, LENGTH_BYTES);
    return buffer;
}

static bool name_valid(const char *name) {
    size_t length = strnlen(name, sizeof((SafetensorsItem *)0)->name);
    for (size_t i = 0; i < length; i++) {
        if ((unsigned char)name[i] < ' ' || name[i] == 127) {
            return false;
        }
    }
    return length > 0 && length < sizeof((SafetensorsItem *)0)->name && strcmp(name, "__metadata__") != 0;
}

/* Writes all of data and continues the checksum; on failure errno says why. */
static bool write_all(int fd, const void *data, size_t bytes, uint32_t *crc) {
    const char *p = data;
    while (bytes > 0) {
        size_t chunk = bytes < CHUNK ? bytes : CHUNK;
        *crc = crc32c(*crc, p, chunk);
        for (size_t done = 0; done < chunk;) {
            ssize_t written = write(fd, p + done, chunk - done);
            if (written < 0 && errno != EINTR) {
                return false;
            }
            done += written > 0 ? (size_t)written : 0;
        }
        p += chunk;
        bytes -= chunk;
    }
    return true;
}

bool safetensors_write(const char *path, const SafetensorsItem *items, int count, uint32_t *crc32c, char *error,
                       size_t error_size) {
    for (int i = 0; i < count; i++) {
        uint64_t bytes;
        if (!name_valid(items[i].name) || items[i].ndim < 0 || items[i].ndim > MAX_DIMENSIONS ||
            !shape_bytes(&bytes, items[i].dtype, items[i].ndim, items[i].shape) || bytes != items[i].bytes) {
            return fail(error, error_size, "%s: tensor %d, '%.100s', has a name or shape that the format cannot hold",
                        path, i, items[i].name);
        }
    }
    size_t header_size;
    char *header = header_make(items, count, &header_size);
    if (!header) {
        return fail(error, error_size, "%s: out of memory for a header of %d tensors", path, count);
    }
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    if (fd < 0) {
        free(header);
        return fail(error, error_size, "cannot create %s: %s", path, strerror(errno));
    }
    uint32_t crc = 0;
    bool ok = write_all(fd, header, header_size, &crc);
    for (int i = 0; ok && i < count; i++) {
        ok = write_all(fd, items[i].data, items[i].bytes, &crc);
    }
    ok = ok && fsync(fd) == 0;
    int reason = errno;
    if (close(fd) != 0 && ok) { /* network file systems report a full disk here */
        ok = false;
        reason = errno;
    }
    free(header);
    if (!ok) {
        unlink(path);
        return fail(error, error_size, "cannot write %s: %s", path, strerror(reason));
    }
    if (crc32c) {
        *crc32c = crc;
    }
    return true;
}

/* A JSON number that is a whole number a double holds exactly. */
static bool json_integer(const cJSON *json, int64_t *value) {
    if (!cJSON_IsNumber(json) || !(json->valuedouble >= 0 && json->valuedouble <= 0x1p53)) {
        return false;
    }
    *value = (int64_t)json->valuedouble;
    return (double)*value == json->valuedouble;
}

static bool json_dtype(const cJSON *json, SafetensorsDtype *dtype) {
    for (int i = 0; cJSON_IsString(json) && i < SAFETENSORS_DTYPES; i++) {
        if (strcmp(json->valuestring, DTYPE_NAMES[i]) == 0) {
            *dtype = (SafetensorsDtype)i;
            return true;
        }
    }
    return false;
}

/* One entry of the header into *item; its data lies in buffer[0, buffer_bytes). Returns NULL, or what is wrong. */
static const char *item_read(SafetensorsItem *item, const cJSON *json, const char *buffer, size_t buffer_bytes) {
    const cJSON *dtype = cJSON_GetObjectItemCaseSensitive(json, "dtype");
    const cJSON *shape = cJSON_GetObjectItemCaseSensitive(json, "shape");
    const cJSON *offsets = cJSON_GetObjectItemCaseSensitive(json, "data_offsets");
    /* exactly three members, all three there: none is a duplicate or unknown */
    if (!cJSON_IsObject(json) || cJSON_GetArraySize(json) != 3 || !dtype || !shape || !offsets) {
        return "is not an object of dtype, shape and data_offsets";
    }
    if (!name_valid(json->string)) {
        return "has a name that is empty, too long or with control characters";
    }
    strcpy(item->name, json->string);
    if (!json_dtype(dtype, &item->dtype)) {
        return "has a dtype other than F64, F32, F16, BF16";
    }
    item->ndim = 0;
    const cJSON *extent;
    if (!cJSON_IsArray(shape)) {
        return "has a shape that is not an array";
    }
    cJSON_ArrayForEach(extent, shape) {
        if (item->ndim == MAX_DIMENSIONS) {
            return "has more than four dimensions";
        }
        if (!json_integer(extent, &item->shape[item->ndim++])) {
            return "has an extent that is not a whole number from 0 to 2^53";
        }
    }
    int64_t begin, end;
    if (!cJSON_IsArray(offsets) || cJSON_GetArraySize(offsets) != 2 ||
        !json_integer(cJSON_GetArrayItem(offsets, 0), &begin) || !json_integer(cJSON_GetArrayItem(offsets, 1), &end)) {
        return "has data_offsets that are not two whole numbers";
    }
    if (begin > end || (uint64_t)end > buffer_bytes) {
        return "lies outside the file: it is truncated or damaged";
    }
    uint64_t bytes;
    if (!shape_bytes(&bytes, item->dtype, item->ndim, item->shape) || bytes != (uint64_t)(end - begin)) {
        return "has a shape that does not match its number of bytes";
    }
    item->data = buffer + begin;
    item->bytes = (size_t)bytes;
    return NULL;
}

static int by_position(const void *a, const void *b) {
    const SafetensorsItem *x = a, *y = b;
    const char *p = x->data, *q = y->data;
    return p != q ? (p > q) - (p < q) : (x->bytes > y->bytes) - (x->bytes < y->bytes); /* empty ones first */
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const SafetensorsItem *)a)->name, ((const SafetensorsItem *)b)->name);
}

static bool metadata_valid(const cJSON *json) {
    const cJSON *entry;
    cJSON_ArrayForEach(entry, json) {
        if (!cJSON_IsString(entry)) {
            return false;
        }
    }
    return cJSON_IsObject(json);
}

/* Fills file->items from the parsed header and checks them against each other. */
static bool items_read(SafetensorsFile *file, const cJSON *header, const char *buffer, size_t buffer_bytes,
                       const char *path, char *error, size_t error_size) {
    int entries = cJSON_GetArraySize(header);
    file->items = calloc((size_t)entries + 1, sizeof *file->items); /* + 1: calloc(0) may be NULL */
    if (!file->items) {
        return fail(error, error_size, "%s: out of memory for %d tensors", path, entries);
    }
    bool metadata = false;
    const cJSON *json;
    cJSON_ArrayForEach(json, header) {
        if (strcmp(json->string, "__metadata__") == 0) {
            if (metadata || !metadata_valid(json)) {
                return fail(error, error_size, "%s: __metadata__ stands twice or is not an object of strings", path);
            }
            metadata = true;
            continue;
        }
        const char *problem = item_read(&file->items[file->count], json, buffer, buffer_bytes);
        if (problem) {
            return fail(error, error_size, "%s: tensor '%.100s' %s", path, json->string, problem);
        }
        file->count++;
    }
    qsort(file->items, (size_t)file->count, sizeof *file->items, by_position);
    const char *expected = buffer;
    for (int i = 0; i < file->count; i++) {
        if ((const char *)file->items[i].data != expected) {
            return fail(error, error_size, "%s: tensor '%s' overlaps the one before it or leaves a gap", path,
                        file->items[i].name);
        }
        expected += file->items[i].bytes;
    }
    if (expected != buffer + buffer_bytes) {
        return fail(error, error_size, "%s: %zu bytes at the end belong to no tensor", path,
                    (size_t)(buffer + buffer_bytes - expected));
    }
    qsort(file->items, (size_t)file->count, sizeof *file->items, by_name);
    for (int i = 1; i < file->count; i++) {
        if (by_name(&file->items[i - 1], &file->items[i]) == 0) {
            return fail(error, error_size, "%s: two tensors are named '%s'", path, file->items[i].name);
        }
    }
    return true;
}

/* The JSON of the header, or NULL. cJSON bounds the nesting (1000 levels), so the stack is safe. */
static cJSON *header_parse(const char *header, size_t length) {
    char *text = malloc(length + 1);
    if (!text) {
        return NULL;
    }
    memcpy(text, header, length);
    text[length] = 0;
    cJSON *json = NULL;
    /* a zero byte, raw or escaped, would end a name early and hide the rest of it */
    if (length > 0 && text[0] == '{' && strlen(text) == length && !strstr(text, "\\u0000")) {
        const char *end;
        json = cJSON_ParseWithOpts(text, &end, false);
        if (json && end[strspn(end, " ")] != 0) {
            cJSON_Delete(json);
            json = NULL;
        }
    }
    free(text);
    return json;
}

bool safetensors_parse(SafetensorsFile *file, const char *name, const void *bytes, size_t size, char *error,
                       size_t error_size) {
    *file = (SafetensorsFile){0};
    if (size < LENGTH_BYTES) {
        return fail(error, error_size, "%s: %zu bytes are too few for a safetensors file", name, size);
    }
    uint64_t length;
    memcpy(&length, bytes, LENGTH_BYTES);
    size_t after_length = size - LENGTH_BYTES;
    if (length > HEADER_LIMIT || length > after_length) {
        return fail(error, error_size, "%s: a header of %llu bytes does not fit: not a safetensors file, or truncated",
                    name, (unsigned long long)length);
    }
    const char *header = (const char *)bytes + LENGTH_BYTES;
    cJSON *json = header_parse(header, (size_t)length);
    if (!json) {
        return fail(error, error_size, "%s: the header is not a JSON object", name);
    }
    bool ok = items_read(file, json, header + length, after_length - (size_t)length, name, error, error_size);
    cJSON_Delete(json);
    if (!ok) {
        safetensors_close(file);
    }
    return ok;
}

/* Maps the file at path; of an empty one, which cannot be mapped, *map is NULL. */
static bool map_file(void **map, size_t *size, const char *path, char *error, size_t error_size) {
    int fd = open(path, O_RDONLY);
    if (fd < 0) {
        return fail(error, error_size, "cannot open %s: %s", path, strerror(errno));
    }
    struct stat status;
    if (fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) {
        close(fd);
        return fail(error, error_size, "%s is not a file", path);
    }
    *size = (size_t)status.st_size;
    *map = *size ? mmap(NULL, *size, PROT_READ, MAP_PRIVATE, fd, 0) : NULL;
    int reason = errno;
    close(fd);
    return *map != MAP_FAILED || fail(error, error_size, "cannot map %s: %s", path, strerror(reason));
}

bool safetensors_open(SafetensorsFile *file, const char *path, char *error, size_t error_size) {
    *file = (SafetensorsFile){0};
    void *map;
    size_t size;
    if (!map_file(&map, &size, path, error, error_size)) {
        return false;
    }
    if (!safetensors_parse(file, path, map, size, error, error_size)) {
        if (map) {
            munmap(map, size);
        }
        return false;
    }
    file->map = map;
    file->map_bytes = size;
    return true;
}

const SafetensorsItem *safetensors_find(const SafetensorsFile *file, const char *name) {
    SafetensorsItem key;
    if (strlen(name) >= sizeof key.name) {
        return NULL;
    }
    strcpy(key.name, name);
    return bsearch(&key, file->items, (size_t)file->count, sizeof key, by_name);
}

void safetensors_close(SafetensorsFile *file) {
    free(file->items);
    if (file->map) {
        munmap(file->map, file->map_bytes);
    }
    *file = (SafetensorsFile){0};
}
