/* --export-gguf: the model in llama.cpp's file format, see gguf.h.
 *
 * A file is written front to back in one go: the list of tensors is made first, since each one's name, extents and
 * place stand in front of the first value. Two tensors here are several there, but each of those is made of whole rows:
 *
 *     layers.0.attn.qkv.w      ((NH + 2 NKV) HS, C)   rows of attn_q, then attn_k, then attn_v
 *     layers.0.moe.experts.w1  (E, 2H, C)             of every expert H rows of ffn_gate_exps, then H of ffn_up_exps
 *
 * In llama.cpp's sources, gguf-py/gguf/constants.py lists the keys and src/models/qwen3moe.cpp asks for the tensors.
 *
 * Called by export.c. Read next: hf_export.c, which writes the same weights for Hugging Face transformers.
 */
#include "gguf.h"

#include <assert.h>
#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "hf_config.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the format is little-endian and so is this code");

#define ARCHITECTURE "qwen3moe"

/* Numbers of the format. */
enum { GGUF_VERSION = 3, GGUF_ALIGNMENT = 32, GGUF_TENSOR_F32 = 0, GGUF_FILE_ALL_F32 = 0 };
enum { GGUF_UINT32 = 4, GGUF_INT32 = 5, GGUF_FLOAT32 = 6, GGUF_BOOL = 7, GGUF_STRING = 8, GGUF_ARRAY = 9 };
enum { GGUF_TOKEN_NORMAL = 1, GGUF_TOKEN_CONTROL = 3, GGUF_TOKEN_ADDED = 4, GGUF_TOKEN_UNUSED = 5 };

enum {
    KEYS = 26,           /* that write_keys writes */
    TENSORS_OUTSIDE = 3, /* the embedding, the last norm, the head */
    TENSORS_OF_LAYER = 12,
    CHUNK = 4096, /* values converted at a time */
};

/* Puts the message into error and returns false. */
__attribute__((format(printf, 3, 4))) static bool fail(char *error, size_t error_size, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error, error_size, format, arguments);
    va_end(arguments);
    return false;
}

bool gguf_expresses(const ModelConfig *model, const Vocabulary *vocabulary, char *error, size_t error_size) {
    HfArchitecture architecture;
    if (!hf_architecture(model, &architecture, error, error_size)) {
        return false;
    }
    if (architecture != HF_QWEN3_MOE) {
        return fail(
            error, error_size,
            "with --qk-norm 0 llama.cpp rotates neighbouring values of a head, not its halves as here: train with "
            "--qk-norm 1, or use --export-hf");
    }
    if (!model->renorm) {
        return fail(
            error, error_size,
            "llama.cpp renormalises the weights of the chosen experts whatever the file says, and would compute "
            "another function than --router %s --renorm 0: train with --router topk --renorm 1, or use --export-hf",
            model->router);
    }
    if (model->moe_every > 1) {
        return fail(error, error_size,
                    "llama.cpp's " ARCHITECTURE
                    " has no dense layers as of --moe-every %d: train with --moe-every 1, or "
                    "use --export-hf",
                    model->moe_every);
    }
    if (!vocabulary->pattern) {
        return fail(
            error, error_size,
            "llama.cpp has no name for the way in which this --tokenizer cuts text into words: use one that cuts "
            "like GPT-2 or Qwen2, or --export-hf");
    }
    if (vocabulary->size > model->vocab) {
        return fail(error, error_size, "the tokenizer has %d tokens, but --vocab is %d: raise --vocab",
                    vocabulary->size, model->vocab);
    }
    return true;
}

/* ---- which tensors the file holds ---- */

/* A tensor of the file as part of one here: `rows` rows of each of its matrices. */
typedef struct {
    char name[64]; /* llama.cpp takes at most 63 characters */
    int ndim;
    uint64_t extent[3];                  /* the fastest first */
    size_t first, run, stride, matrices; /* `matrices` runs of values, from `first` on, `stride` apart */
    uint64_t bytes;
} Part;

typedef struct {
    const TensorList *tensors;
    Part *parts; /* owned */
    int count;
} Parts;

static uint64_t round_up(uint64_t bytes) {
    return (bytes + GGUF_ALIGNMENT - 1) / GGUF_ALIGNMENT * GGUF_ALIGNMENT;
}

/* Appends rows [from, from + rows) of each matrix of a tensor, a vector being one row; rows 0: all of it. layer -1:
 * outside the layers. */
static void add_rows(Parts *list, int layer, const char *name, const char *source, int from, int rows) {
    char full[64];
    if (layer < 0) {
        snprintf(full, sizeof full, "%s", source);
    } else {
        snprintf(full, sizeof full, "layers.%d.%s", layer, source);
    }
    int index = tensors_find(list->tensors, full);
    assert(index >= 0);
    const Tensor *tensor = &list->tensors->items[index];
    const int *shape = tensor->shape;
    int ndim = tensor->ndim, columns = shape[ndim - 1], all = ndim > 1 ? shape[ndim - 2] : 1;
    rows = rows ? rows : all;
    assert(from + rows <= all);

    Part *part = &list->parts[list->count++];
    *part = (Part){.ndim = ndim, .extent = {(uint64_t)columns, (uint64_t)rows, (uint64_t)(ndim == 3 ? shape[0] : 1)}};
    part->matrices = part->extent[2];
    part->stride = (size_t)all * columns;
    part->run = (size_t)rows * columns;
    part->first = tensor->offset + (size_t)from * columns;
    part->bytes = part->matrices * part->run * sizeof(float);
    if (layer < 0) {
        snprintf(part->name, sizeof part->name, "%s.weight", name);
    } else {
        snprintf(part->name, sizeof part->name, "blk.%d.%s.weight", layer, name);
    }
}

static void add_whole(Parts *list, int layer, const char *name, const char *source) {
    add_rows(list, layer, name, source, 0, 0);
}

static void list_parts(Parts *list, const ModelConfig *model) {
    int queries = model->heads * model->head_dim, keys = model->kv_heads * model->head_dim, H = model->expert_dim;
    add_whole(list, -1, "token_embd", "embedding.w");
    for (int l = 0; l < model->layers; l++) {
        add_whole(list, l, "attn_norm", "attn_norm.w");
        add_rows(list, l, "attn_q", "attn.qkv.w", 0, queries);
        add_rows(list, l, "attn_k", "attn.qkv.w", queries, keys);
        add_rows(list, l, "attn_v", "attn.qkv.w", queries + keys, keys);
        add_whole(list, l, "attn_q_norm", "attn.q_norm.w");
        add_whole(list, l, "attn_k_norm", "attn.k_norm.w");
        add_whole(list, l, "attn_output", "attn.out.w");
        add_whole(list, l, "ffn_norm", "ffn_norm.w");
        add_whole(list, l, "ffn_gate_inp", "moe.router.w");
        add_rows(list, l, "ffn_gate_exps", "moe.experts.w1", 0, H);
        add_rows(list, l, "ffn_up_exps", "moe.experts.w1", H, H);
        add_whole(list, l, "ffn_down_exps", "moe.experts.w2");
    }
    add_whole(list, -1, "output_norm", "final_norm.w");
    if (!model->tie) {
        add_whole(list, -1, "output", "head.w"); /* without it llama.cpp takes token_embd */
    }
}

/* ---- writing ---- */

typedef struct {
    FILE *file;
    uint64_t position;
    int keys;   /* written so far */
    int reason; /* errno of the first write that failed; 0: none did */
} Writer;

static void put(Writer *w, const void *data, size_t bytes) {
    if (!w->reason && bytes && fwrite(data, 1, bytes, w->file) != bytes) {
        w->reason = errno ? errno : EIO;
    }
    w->position += bytes;
}

static void put_u32(Writer *w, uint32_t value) {
    put(w, &value, sizeof value);
}

static void put_u64(Writer *w, uint64_t value) {
    put(w, &value, sizeof value);
}

static void put_string(Writer *w, const char *text) {
    put_u64(w, strlen(text));
    put(w, text, strlen(text));
}

static void pad(Writer *w) {
    static const char zeros[GGUF_ALIGNMENT];
    put(w, zeros, round_up(w->position) - w->position);
}

/* Name and type in front of a value; key "." followed by something: one of the architecture's. */
static void put_key(Writer *w, const char *key, uint32_t type) {
    char full[96];
    snprintf(full, sizeof full, "%s%s", key[0] == '.' ? ARCHITECTURE : "", key);
    put_string(w, full);
    put_u32(w, type);
    w->keys++;
}

static void key_u32(Writer *w, const char *key, int value) {
    put_key(w, key, GGUF_UINT32);
    put_u32(w, (uint32_t)value);
}

static void key_f32(Writer *w, const char *key, double value) {
    float single = (float)value;
    put_key(w, key, GGUF_FLOAT32);
    put(w, &single, sizeof single);
}

static void key_bool(Writer *w, const char *key, bool value) {
    unsigned char byte = value;
    put_key(w, key, GGUF_BOOL);
    put(w, &byte, 1);
}

static void key_string(Writer *w, const char *key, const char *value) {
    put_key(w, key, GGUF_STRING);
    put_string(w, value);
}

/* `count` values of that type follow. */
static void key_array(Writer *w, const char *key, uint32_t type, int count) {
    put_key(w, key, GGUF_ARRAY);
    put_u32(w, type);
    put_u64(w, (uint64_t)count);
}

/* ---- the vocabulary ---- */

/* Id i's token, NULL when it has none: embeddings may be more than the tokenizer's tokens. */
static const char *token_text(const Vocabulary *v, int i) {
    return i < v->size ? v->text(v->tokenizer, i) : NULL;
}

/* llama.cpp refuses a vocabulary in which two ids have the same text: "[unused 5]" gets as many more brackets in front
 * as it takes for no token to begin like it. */
static int unused_brackets(const Vocabulary *v) {
    int most = 0;
    for (int i = 0; i < v->size; i++) {
        const char *text = token_text(v, i);
        int brackets = text ? (int)strspn(text, "[") : 0;
        if (brackets > most && strncmp(text + brackets, "unused ", 7) == 0) {
            most = brackets;
        }
    }
    return most + 1;
}

static void put_unused(Writer *w, int id, int brackets) {
    char text[32];
    int length = snprintf(text, sizeof text, "unused %d]", id);
    put_u64(w, (uint64_t)(brackets + length));
    for (int i = 0; i < brackets; i++) {
        put(w, "[", 1);
    }
    put(w, text, (size_t)length);
}

static uint32_t token_type(const Vocabulary *v, int id) {
    if (!token_text(v, id)) {
        return GGUF_TOKEN_UNUSED;
    }
    if (v->is_special(v->tokenizer, id)) {
        return GGUF_TOKEN_CONTROL;
    }
    return v->is_added && v->is_added(v->tokenizer, id) ? GGUF_TOKEN_ADDED : GGUF_TOKEN_NORMAL;
}

/* The id at which llama.cpp stops. Left out it would be 11, an ordinary token; without an end-of-text token it is the
 * byte NUL (written U+0100 in a byte-level vocabulary, and id 0 where ids are bytes), which no text holds. */
static int stop_token(const Vocabulary *v) {
    if (v->end_of_text >= 0) {
        return v->end_of_text;
    }
    for (int i = 0; i < v->size; i++) {
        const char *text = token_text(v, i);
        if (text && strcmp(text, "\xc4\x80") == 0) {
            return i;
        }
    }
    return 0;
}

static void write_vocabulary(Writer *w, const Vocabulary *v, int vocab) {
    int brackets = unused_brackets(v), stop = stop_token(v);
    key_string(w, "tokenizer.ggml.model", "gpt2"); /* byte-level BPE; .pre tells how text is cut before */
    key_string(w, "tokenizer.ggml.pre", v->pattern);
    key_array(w, "tokenizer.ggml.tokens", GGUF_STRING, vocab);
    for (int i = 0; i < vocab; i++) {
        const char *text = token_text(v, i);
        if (text) {
            put_string(w, text);
        } else {
            put_unused(w, i, brackets);
        }
    }
    key_array(w, "tokenizer.ggml.token_type", GGUF_INT32, vocab);
    for (int i = 0; i < vocab; i++) {
        put_u32(w, token_type(v, i));
    }
    key_array(w, "tokenizer.ggml.merges", GGUF_STRING, v->merges); /* must be there, even if empty */
    for (int i = 0; i < v->merges; i++) {
        put_string(w, v->merge(v->tokenizer, i));
    }
    key_u32(w, "tokenizer.ggml.bos_token_id", stop);
    key_u32(w, "tokenizer.ggml.eos_token_id", stop);
    key_bool(w, "tokenizer.ggml.add_bos_token", false); /* training texts begin without one */
}

/* ---- the file ---- */

/* The name of the file alone, without ".gguf". */
static void write_name(Writer *w, const char *path) {
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    size_t length = strlen(name);
    if (length > 5 && strcmp(name + length - 5, ".gguf") == 0) {
        length -= 5;
    }
    put_key(w, "general.name", GGUF_STRING);
    put_u64(w, length);
    put(w, name, length);
}

static void write_keys(Writer *w, const char *path, const ModelConfig *model, const Vocabulary *vocabulary) {
    key_string(w, "general.architecture", ARCHITECTURE);
    write_name(w, path);
    key_u32(w, "general.file_type", GGUF_FILE_ALL_F32);
    key_u32(w, "general.alignment", GGUF_ALIGNMENT);
    key_u32(w, ".block_count", model->layers);
    key_u32(w, ".context_length", model->seq);
    key_u32(w, ".embedding_length", model->dim);
    key_u32(w, ".feed_forward_length", config_dense_width(model));
    key_u32(w, ".attention.head_count", model->heads);
    key_u32(w, ".attention.head_count_kv", model->kv_heads);
    key_u32(w, ".attention.key_length", model->head_dim);
    key_u32(w, ".attention.value_length", model->head_dim);
    key_f32(w, ".attention.layer_norm_rms_epsilon", model->norm_eps);
    key_u32(w, ".rope.dimension_count", model->head_dim);
    key_f32(w, ".rope.freq_base", model->rope_base);
    key_u32(w, ".expert_count", model->experts);
    key_u32(w, ".expert_used_count", model->top_k);
    key_u32(w, ".expert_feed_forward_length", model->expert_dim);
    write_vocabulary(w, vocabulary, model->vocab);
    assert(w->keys == KEYS);
}

/* Values of one run as float32, whatever acc_t is. */
static void put_values(Writer *w, const acc_t *values, size_t count) {
    float chunk[CHUNK];
    while (count > 0) {
        size_t n = count < CHUNK ? count : CHUNK;
        for (size_t i = 0; i < n; i++) {
            chunk[i] = (float)values[i];
        }
        put(w, chunk, n * sizeof *chunk);
        values += n;
        count -= n;
    }
}

static void write_file(Writer *w, const char *path, const ModelConfig *model, const Parts *list, const acc_t *weights,
                       const Vocabulary *vocabulary) {
    put(w, "GGUF", 4);
    put_u32(w, GGUF_VERSION);
    put_u64(w, (uint64_t)list->count);
    put_u64(w, KEYS);
    write_keys(w, path, model, vocabulary);
    uint64_t offset = 0; /* from the first tensor's values on */
    for (int i = 0; i < list->count; i++) {
        const Part *part = &list->parts[i];
        put_string(w, part->name);
        put_u32(w, (uint32_t)part->ndim);
        for (int d = 0; d < part->ndim; d++) {
            put_u64(w, part->extent[d]);
        }
        put_u32(w, GGUF_TENSOR_F32);
        put_u64(w, offset);
        offset += round_up(part->bytes);
    }
    pad(w);
    for (int i = 0; i < list->count && !w->reason; i++) {
        const Part *part = &list->parts[i];
        for (size_t m = 0; m < part->matrices; m++) {
            put_values(w, weights + part->first + m * part->stride, part->run);
        }
        pad(w);
    }
}

/* Everything of a file into `temporary`, on the disk when it returns 0; else errno's reason. */
static int write_temporary(const char *temporary, const char *path, const ModelConfig *model, const Parts *list,
                           const acc_t *weights, const Vocabulary *vocabulary) {
    Writer writer = {.file = fopen(temporary, "wb")};
    if (!writer.file) {
        return errno;
    }
    write_file(&writer, path, model, list, weights, vocabulary);
    if (!writer.reason && (fflush(writer.file) != 0 || fsync(fileno(writer.file)) != 0)) {
        writer.reason = errno;
    }
    if (fclose(writer.file) != 0 && !writer.reason) { /* network file systems report a full disk here */
        writer.reason = errno;
    }
    if (writer.reason) {
        unlink(temporary);
    }
    return writer.reason;
}

bool gguf_export(const char *path, const ModelConfig *model, const TensorList *tensors, const acc_t *weights,
                 const Vocabulary *vocabulary, char *error, size_t error_size) {
    if (!gguf_expresses(model, vocabulary, error, error_size)) {
        return false;
    }
    Parts list = {.tensors = tensors};
    list.parts = malloc((TENSORS_OUTSIDE + (size_t)TENSORS_OF_LAYER * model->layers) * sizeof *list.parts);
    char *temporary = malloc(strlen(path) + sizeof ".tmp");
    bool memory = list.parts && temporary;
    int reason = ENOMEM;
    if (memory) {
        sprintf(temporary, "%s.tmp", path);
        list_parts(&list, model);
        reason = write_temporary(temporary, path, model, &list, weights, vocabulary);
    }
    if (!reason && rename(temporary, path) != 0) {
        reason = errno;
        unlink(temporary);
    }
    free(temporary);
    free(list.parts);
    if (reason) {
        return fail(error, error_size, "cannot write %s (%s): free some space or choose another --export-gguf", path,
                    strerror(reason));
    }
    return true;
}
