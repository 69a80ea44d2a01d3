/* The safetensors format: u64 little-endian header length, a JSON header, then the tensors' bytes without gaps.
 * https://github.com/huggingface/safetensors
 */
#ifndef MODEL_SAFETENSORS_H
#define MODEL_SAFETENSORS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum {
    SAFETENSORS_F64,
    SAFETENSORS_F32,
    SAFETENSORS_F16,
    SAFETENSORS_BF16,
    SAFETENSORS_DTYPES
} SafetensorsDtype;

typedef struct {
    char name[128];
    SafetensorsDtype dtype;
    int ndim;
    int64_t shape[4];
    const void *data; /* writing: the caller's bytes. Reading: inside the mapped file */
    size_t bytes;
} SafetensorsItem;

/* Writes a file in the items' order, synced to disk; each write is checked. False with one line in error on failure
 * (the partial file is removed). *crc32c (may be NULL) receives the checksum of the whole file. */
bool safetensors_write(const char *path, const SafetensorsItem *items, int count, uint32_t *crc32c, char *error,
                       size_t error_size);

typedef struct {
    SafetensorsItem *items; /* sorted by name; data may be unaligned in files of other writers: read it with memcpy */
    int count;
    void *map; /* of safetensors_open; NULL: the bytes are the caller's */
    size_t map_bytes;
} SafetensorsFile;

/* Maps a file and checks everything in it (header length, JSON, known dtypes, shapes against bytes, offsets that tile
 * the buffer, duplicate names). False with one line in error. Hostile input must not crash it. */
bool safetensors_open(SafetensorsFile *file, const char *path, char *error, size_t error_size);

/* The same for a file's bytes in memory, which outlives *file; `name` stands in errors. */
bool safetensors_parse(SafetensorsFile *file, const char *name, const void *bytes, size_t size, char *error,
                       size_t error_size);

const SafetensorsItem *safetensors_find(const SafetensorsFile *file, const char *name);
void safetensors_close(SafetensorsFile *file);

#endif
