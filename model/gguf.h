/* --export-gguf FILE: the model as one file for llama.cpp, GGUF version 3, all weights float32.
 *
 *     "GGUF"  u32 version  u64 tensors  u64 keys
 *     keys      string name, u32 type, value
 *     tensors   string name, u32 dimensions, u64 extents (the fastest first), u32 type, u64 offset
 *     padding to 32, then the tensors' values, each at a multiple of 32
 *
 * https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. llama.cpp's "qwen3moe" renormalises the weights of the
 * chosen experts whatever the file says, and has no dense layers: models that differ are refused. Ids without a token
 * are listed as unused.
 */
#ifndef MODEL_GGUF_H
#define MODEL_GGUF_H

#include <stdbool.h>
#include <stddef.h>

#include "config.h"
#include "tensors.h"
#include "vocabulary.h"

/* False with one line in error: what is in the way and, where there is one, the way out. */
bool gguf_expresses(const ModelConfig *model, const Vocabulary *vocabulary, char *error, size_t error_size);

/* Writes FILE (as FILE.tmp, synced, renamed). False with one line in error and nothing left behind. */
bool gguf_export(const char *path, const ModelConfig *model, const TensorList *tensors, const acc_t *weights,
                 const Vocabulary *vocabulary, char *error, size_t error_size);

#endif
