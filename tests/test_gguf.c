// build: both
/* --export-gguf: what a program that knows only the public format finds in the file.
 *
 * Small random models are exported and read back by gguf_reader.py, which checks the file by itself and prints the
 * CRC-32 of each tensor's bytes. What those must be is spelled out here value by value, with loops over experts, rows
 * and columns, so that a wrong cut or order of gate, up, queries, keys or values shows. The rest is the vocabulary,
 * refusals, and what a failed write leaves behind. Needs python3. Read next: model/gguf.c.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../kernels/random.h"
#include "../model/gguf.h"
#include "../model/transformer.h"
#include "set_options.h"

/* No two extents are alike, and most tensors end between two multiples of 32 bytes. */
#define SMALL                                                                                                         \
    "--layers 2 --dim 22 --heads 4 --kv-heads 2 --head-dim 6 --seq 16 --vocab 70 --experts 3 --top-k 2 --expert-dim " \
    "10 --norm-eps 0.0009765625 --rope-base 5000 "

enum { MOST_OUTPUT = 1 << 16 };

static char folder[] = "/tmp/test_gguf_XXXXXX";
static char path[64];

static int make_folder(void **unused) {
    if (!mkdtemp(folder)) {
        return -1;
    }
    snprintf(path, sizeof path, "%s/tiny.gguf", folder);
    return 0;
}

static int remove_folder(void **unused) {
    unlink(path);
    return rmdir(folder); /* fails when an export left anything else behind */
}

/* ---- a random model */

typedef struct {
    Config config;
    TensorList tensors;
    acc_t *weights;
} Model;

static Model make_model(const char *options) {
    Model m = {0};
    config_defaults(&m.config);
    set_options(&m.config, options);
    config_finish(&m.config);
    transformer_tensors(&m.tensors, &m.config.model);
    m.weights = malloc(m.tensors.total * sizeof *m.weights);
    for (size_t i = 0; i < m.tensors.total; i++) { /* norms too, and the gaps, which must not be written */
        m.weights[i] = (acc_t)random_normal(1, i);
    }
    return m;
}

static void free_model(Model *m) {
    free(m->weights);
    tensors_free(&m->tensors);
}

/* Element i of a tensor, as float32. */
static float at(const Model *m, const char *name, size_t i) {
    int index = tensors_find(&m->tensors, name);
    assert_true(index >= 0 && i < m->tensors.items[index].count);
    return (float)m->weights[m->tensors.items[index].offset + i];
}

/* ---- vocabularies */

struct Tokenizer { /* stands in for that of data/: model/ knows it as a name only */
    const char *const *texts;
    const char *kinds; /* of each id: s special, a added, else normal */
    const char *const *merges;
};

static const char *text_of(const struct Tokenizer *t, int id) {
    return t->texts[id];
}

static bool is_special(const struct Tokenizer *t, int id) {
    return t->kinds[id] == 's';
}

static bool is_added(const struct Tokenizer *t, int id) {
    return t->kinds[id] == 's' || t->kinds[id] == 'a';
}

static const char *merge_of(const struct Tokenizer *t, int rank) {
    return t->merges[rank];
}

static Vocabulary vocabulary_of(const struct Tokenizer *tokenizer, int size) {
    return (Vocabulary){.tokenizer = tokenizer,
                        .size = size,
                        .end_of_text = -1,
                        .pattern = "gpt-2",
                        .text = text_of,
                        .is_special = is_special,
                        .is_added = is_added,
                        .merge = merge_of};
}

static Vocabulary letters(void) {
    static const char *const texts[] = {"a", "b", "c", "d", "ab"}, *const merges[] = {"a b"};
    static const struct Tokenizer tokenizer = {.texts = texts, .kinds = "nnnnn", .merges = merges};
    Vocabulary vocabulary = vocabulary_of(&tokenizer, 5);
    vocabulary.merges = 1;
    return vocabulary;
}

/* ---- exporting and reading back */

static void export_model(const Model *m, const Vocabulary *vocabulary) {
    char error[512] = "";
    if (!gguf_export(path, &m->config.model, &m->tensors, m->weights, vocabulary, error, sizeof error)) {
        fail_msg("%s", error);
    }
}

/* What the reader prints about the file, after an empty line; its exit status. */
static int run_reader(char output[MOST_OUTPUT]) {
    char command[256];
    snprintf(command, sizeof command, "python3 tests/gguf_reader.py --all %s 2>&1", path);
    FILE *pipe = popen(command, "r");
    assert_non_null(pipe);
    output[0] = '\n';
    size_t length = 1 + fread(output + 1, 1, MOST_OUTPUT - 2, pipe);
    output[length] = '\0';
    int status = pclose(pipe);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

static void read_sound(char output[MOST_OUTPUT]) {
    int status = run_reader(output);
    if (status != 0) {
        fail_msg("the reader ends with %d: %s", status, output);
    }
}

static void expect_line(const char *output, const char *line) {
    char whole[4096];
    assert_true(snprintf(whole, sizeof whole, "\n%s\n", line) < (int)sizeof whole);
    if (!strstr(output, whole)) {
        fail_msg("no line '%s' in:%s", line, output);
    }
}

static int count_lines(const char *output, const char *start) {
    char mark[64];
    snprintf(mark, sizeof mark, "\n%s", start);
    int lines = 0;
    for (const char *p = output; (p = strstr(p, mark)) != NULL; p++) {
        lines++;
    }
    return lines;
}

/* ---- tensors */

/* The values expected of a tensor, in the order of the file. */
typedef struct {
    float values[32768];
    size_t count;
} Expected;

static void push(Expected *e, float value) {
    assert_true(e->count < sizeof e->values / sizeof *e->values);
    e->values[e->count++] = value;
}

/* CRC-32 of zlib: the polynomial of IEEE 802.3, bits reversed. */
static uint32_t crc32_of(const void *data, size_t bytes) {
    const unsigned char *p = data;
    uint32_t crc = 0xffffffffu;
    for (size_t i = 0; i < bytes; i++) {
        crc ^= p[i];
        for (int bit = 0; bit < 8; bit++) {
            crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
        }
    }
    return ~crc;
}

/* The tensor of that name and shape holds the values, which are emptied for the next. */
static void expect_tensor(const char *output, Expected *e, const char *shape, const char *format, int layer) {
    char name[64], line[256];
    snprintf(name, sizeof name, format, layer);
    snprintf(line, sizeof line, "tensor %s.weight %s F32 crc32 %08x", name, shape,
             crc32_of(e->values, e->count * sizeof *e->values));
    expect_line(output, line);
    e->count = 0;
}

/* A tensor that is one of ours unchanged, rows x columns of it (rows 0: a vector). */
static void expect_same(const char *output, Expected *e, const Model *m, int rows, int columns, const char *ours,
                        const char *theirs, int layer) {
    char name[64], shape[64];
    snprintf(name, sizeof name, ours, layer);
    for (size_t i = 0; i < (size_t)(rows ? rows : 1) * columns; i++) {
        push(e, at(m, name, i));
    }
    snprintf(shape, sizeof shape, rows ? "%dx%d" : "%.0d%d", rows, columns);
    expect_tensor(output, e, shape, theirs, layer);
}

static void expect_attention(const char *output, Expected *e, const Model *m, int layer) {
    const ModelConfig *c = &m->config.model;
    int C = c->dim, HS = c->head_dim, queries = c->heads * HS, keys = c->kv_heads * HS;
    const char *const names[] = {"blk.%d.attn_q", "blk.%d.attn_k", "blk.%d.attn_v"};
    int begin[] = {0, queries, queries + keys, queries + 2 * keys};
    char name[64], shape[64];
    snprintf(name, sizeof name, "layers.%d.attn.qkv.w", layer);
    for (int part = 0; part < 3; part++) {
        for (int row = begin[part]; row < begin[part + 1]; row++) {
            for (int column = 0; column < C; column++) {
                push(e, at(m, name, (size_t)row * C + column));
            }
        }
        snprintf(shape, sizeof shape, "%dx%d", begin[part + 1] - begin[part], C);
        expect_tensor(output, e, shape, names[part], layer);
    }
    expect_same(output, e, m, 0, HS, "layers.%d.attn.q_norm.w", "blk.%d.attn_q_norm", layer);
    expect_same(output, e, m, 0, HS, "layers.%d.attn.k_norm.w", "blk.%d.attn_k_norm", layer);
    expect_same(output, e, m, C, queries, "layers.%d.attn.out.w", "blk.%d.attn_output", layer);
}

static void expect_experts(const char *output, Expected *e, const Model *m, int layer) {
    const ModelConfig *c = &m->config.model;
    int E = c->experts, H = c->expert_dim, C = c->dim;
    const char *const names[] = {"blk.%d.ffn_gate_exps", "blk.%d.ffn_up_exps"};
    char name[64], shape[64];
    for (int up = 0; up < 2; up++) {
        snprintf(name, sizeof name, "layers.%d.moe.experts.w1", layer);
        for (int expert = 0; expert < E; expert++) {
            for (int h = 0; h < H; h++) {
                for (int column = 0; column < C; column++) {
                    push(e, at(m, name, ((size_t)expert * 2 * H + up * H + h) * C + column));
                }
            }
        }
        snprintf(shape, sizeof shape, "%dx%dx%d", E, H, C);
        expect_tensor(output, e, shape, names[up], layer);
    }
    snprintf(name, sizeof name, "layers.%d.moe.experts.w2", layer);
    for (size_t i = 0; i < (size_t)E * C * H; i++) {
        push(e, at(m, name, i));
    }
    snprintf(shape, sizeof shape, "%dx%dx%d", E, C, H);
    expect_tensor(output, e, shape, "blk.%d.ffn_down_exps", layer);
}

static void check_weights(const char *options) {
    static char output[MOST_OUTPUT];
    static Expected e;
    Model m = make_model(options);
    const ModelConfig *c = &m.config.model;
    Vocabulary vocabulary = letters();
    export_model(&m, &vocabulary);
    read_sound(output);
    expect_same(output, &e, &m, c->vocab, c->dim, "embedding.w", "token_embd", 0);
    for (int l = 0; l < c->layers; l++) {
        expect_same(output, &e, &m, 0, c->dim, "layers.%d.attn_norm.w", "blk.%d.attn_norm", l);
        expect_attention(output, &e, &m, l);
        expect_same(output, &e, &m, 0, c->dim, "layers.%d.ffn_norm.w", "blk.%d.ffn_norm", l);
        expect_same(output, &e, &m, c->experts, c->dim, "layers.%d.moe.router.w", "blk.%d.ffn_gate_inp", l);
        expect_experts(output, &e, &m, l);
    }
    expect_same(output, &e, &m, 0, c->dim, "final_norm.w", "output_norm", 0);
    if (!c->tie) {
        expect_same(output, &e, &m, c->vocab, c->dim, "head.w", "output", 0);
    }
    assert_int_equal(count_lines(output, "tensor "), 2 + !c->tie + 12 * c->layers);
    free_model(&m);
}

static void test_weights(void **unused) {
    check_weights(SMALL);
}

static void test_weights_tied(void **unused) {
    check_weights(SMALL "--tie 1");
}

/* Matrices of more values than are converted at a time. */
static void test_weights_large(void **unused) {
    check_weights(SMALL "--layers 1 --dim 64 --head-dim 16 --expert-dim 90");
}

static void test_weights_one_expert(void **unused) {
    check_weights(SMALL "--layers 1 --kv-heads 4 --head-dim 2 --experts 2 --expert-dim 1");
}

/* ---- keys */

static void test_keys(void **unused) {
    static char output[MOST_OUTPUT];
    Model m = make_model(SMALL);
    Vocabulary vocabulary = letters();
    export_model(&m, &vocabulary);
    read_sound(output);
    static const char *const LINES[] = {
        "general.architecture = \"qwen3moe\" (string)",
        "general.name = \"tiny\" (string)",
        "general.file_type = 0 (uint32)",
        "general.alignment = 32 (uint32)",
        "qwen3moe.block_count = 2 (uint32)",
        "qwen3moe.context_length = 16 (uint32)",
        "qwen3moe.embedding_length = 22 (uint32)",
        "qwen3moe.feed_forward_length = 20 (uint32)",
        "qwen3moe.attention.head_count = 4 (uint32)",
        "qwen3moe.attention.head_count_kv = 2 (uint32)",
        "qwen3moe.attention.key_length = 6 (uint32)",
        "qwen3moe.attention.value_length = 6 (uint32)",
        "qwen3moe.attention.layer_norm_rms_epsilon = 0.0009765625 (float32)",
        "qwen3moe.rope.dimension_count = 6 (uint32)",
        "qwen3moe.rope.freq_base = 5000.0 (float32)",
        "qwen3moe.expert_count = 3 (uint32)",
        "qwen3moe.expert_used_count = 2 (uint32)",
        "qwen3moe.expert_feed_forward_length = 10 (uint32)",
        "tokenizer.ggml.model = \"gpt2\" (string)",
        "tokenizer.ggml.pre = \"gpt-2\" (string)",
        "tokenizer.ggml.merges = [\"a b\"] (array of string[1])",
        "tokenizer.ggml.bos_token_id = 0 (uint32)",
        "tokenizer.ggml.eos_token_id = 0 (uint32)",
        "tokenizer.ggml.add_bos_token = false (bool)",
    };
    enum { COUNT = sizeof LINES / sizeof *LINES, ARRAYS_OF_VOCAB = 2 };
    for (int i = 0; i < COUNT; i++) {
        char line[256];
        snprintf(line, sizeof line, "key %s", LINES[i]);
        expect_line(output, line);
    }
    assert_int_equal(count_lines(output, "key "), COUNT + ARRAYS_OF_VOCAB);
    free_model(&m);
}

/* ---- the vocabulary */

/* A model of as many tokens as asked for, its vocabulary as the reader prints it. */
static void read_vocabulary(char output[MOST_OUTPUT], const Vocabulary *vocabulary, const char *vocab) {
    char options[512];
    snprintf(options, sizeof options, SMALL "--layers 1 --vocab %s", vocab);
    Model m = make_model(options);
    export_model(&m, vocabulary);
    read_sound(output);
    free_model(&m);
}

static void test_token_types(void **unused) {
    static char output[MOST_OUTPUT];
    const char *const texts[] = {"a", "<|endoftext|>", NULL, "<think>", "\xc4\xa0\"b"};
    struct Tokenizer tokenizer = {.texts = texts, .kinds = "nssan"};
    Vocabulary vocabulary = vocabulary_of(&tokenizer, 5);
    vocabulary.pattern = "qwen2";
    vocabulary.end_of_text = 1;
    read_vocabulary(output, &vocabulary, "7");
    expect_line(output,
                "key tokenizer.ggml.tokens = [\"a\", \"<|endoftext|>\", \"[unused 2]\", \"<think>\", "
                "\"\\u0120\\\"b\", \"[unused 5]\", \"[unused 6]\"] (array of string[7])");
    expect_line(output, "key tokenizer.ggml.token_type = [1, 3, 5, 4, 1, 5, 5] (array of int32[7])");
    expect_line(output, "key tokenizer.ggml.merges = [] (array of string[0])");
    expect_line(output, "key tokenizer.ggml.pre = \"qwen2\" (string)");
    expect_line(output, "key tokenizer.ggml.eos_token_id = 1 (uint32)");
    expect_line(output, "key tokenizer.ggml.bos_token_id = 1 (uint32)");

    vocabulary.is_added = NULL;
    read_vocabulary(output, &vocabulary, "5");
    expect_line(output, "key tokenizer.ggml.token_type = [1, 3, 5, 1, 1] (array of int32[5])");
}

/* Texts that ids without a token would have are taken. */
static void test_unused_are_unique(void **unused) {
    static char output[MOST_OUTPUT];
    const char *const texts[] = {"[unused 3]", "[[[", "[[unused 4]"};
    struct Tokenizer tokenizer = {.texts = texts, .kinds = "nnn"};
    Vocabulary vocabulary = vocabulary_of(&tokenizer, 3);
    read_vocabulary(output, &vocabulary, "5");
    expect_line(output,
                "key tokenizer.ggml.tokens = [\"[unused 3]\", \"[[[\", \"[[unused 4]\", \"[[[unused 3]\", "
                "\"[[[unused 4]\"] (array of string[5])");
}

/* Without an end-of-text token generation stops at the byte NUL, wherever it is. */
static void test_stop_at_nul(void **unused) {
    static char output[MOST_OUTPUT];
    const char *const texts[] = {"a", NULL, "\xc4\x80", "b"};
    struct Tokenizer tokenizer = {.texts = texts, .kinds = "nnnn"};
    Vocabulary vocabulary = vocabulary_of(&tokenizer, 4);
    read_vocabulary(output, &vocabulary, "4");
    expect_line(output, "key tokenizer.ggml.eos_token_id = 2 (uint32)");
    expect_line(output, "key tokenizer.ggml.bos_token_id = 2 (uint32)");
}

/* ---- refusals and failures */

static void assert_one_line(const char *error, const char *words) {
    if (!strstr(error, words) || strchr(error, '\n')) {
        fail_msg("'%s' should be one line that says '%s'", error, words);
    }
}

static int entries_of_folder(void) {
    DIR *entries = opendir(folder);
    assert_non_null(entries);
    int count = -2; /* . and .. */
    while (readdir(entries)) {
        count++;
    }
    closedir(entries);
    return count;
}

static void test_models_refused(void **unused) {
    static const char *const CASES[][2] = {
        {"--router topk --renorm 1", NULL},
        {"--tie 1 --top-k 3", NULL},
        {"--renorm 0", "llama.cpp renormalises"},
        {"--router top1", "than --router top1 --renorm 0"},
        {"--moe-every 2", "qwen3moe has no dense layers as of --moe-every 2"},
        {"--qk-norm 0", "with --qk-norm 0 llama.cpp rotates neighbouring values"},
        {"--qk-norm 0 --renorm 0", "--renorm"},
        {"--router sigmoid", "--router"},
        {"--shared-experts 1", "--shared-experts"},
        {"--act gelu", "--act"},
        {"--capacity-factor 1.25", "--capacity-factor"},
        {"--objective mlm", "--objective"},
    };
    unlink(path);
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        char options[512], error[512] = "";
        snprintf(options, sizeof options, SMALL "%s", CASES[i][0]);
        Vocabulary vocabulary = letters();
        Config config;
        config_defaults(&config);
        set_options(&config, options);
        config_finish(&config);
        bool expressed = gguf_expresses(&config.model, &vocabulary, error, sizeof error);
        if (expressed != !CASES[i][1]) {
            fail_msg("%s: %s", CASES[i][0], expressed ? "accepted" : error);
        }
        if (!expressed) {
            assert_one_line(error, CASES[i][1]);
            Model m = make_model(options);
            error[0] = '\0';
            assert_false(gguf_export(path, &m.config.model, &m.tensors, m.weights, &vocabulary, error, sizeof error));
            assert_one_line(error, CASES[i][1]);
            free_model(&m);
        }
    }
    assert_int_equal(entries_of_folder(), 0);
}

static void assert_not_written(const Model *m, const Vocabulary *vocabulary, const char *where, const char *words) {
    char error[512] = "";
    assert_false(gguf_export(where, &m->config.model, &m->tensors, m->weights, vocabulary, error, sizeof error));
    assert_one_line(error, words);
}

static void test_vocabularies_refused(void **unused) {
    Model m = make_model(SMALL "--vocab 5");
    Vocabulary vocabulary = letters();
    export_model(&m, &vocabulary);
    unlink(path);
    vocabulary.pattern = NULL;
    assert_not_written(&m, &vocabulary, path, "cuts text into words");
    vocabulary = letters();
    vocabulary.size = 6;
    assert_not_written(&m, &vocabulary, path, "the tokenizer has 6 tokens, but --vocab is 5");
    assert_int_equal(entries_of_folder(), 0);
    free_model(&m);
}

static void test_places_refused(void **unused) {
    Model m = make_model(SMALL);
    Vocabulary vocabulary = letters();
    char place[128];
    snprintf(place, sizeof place, "%s/none/x.gguf", folder);
    assert_not_written(&m, &vocabulary, place, "none/x.gguf (No such file or directory)");
    snprintf(place, sizeof place, "%s/taken", folder);
    assert_int_equal(mkdir(place, 0700), 0);
    assert_not_written(&m, &vocabulary, place, "taken (Is a directory)");
    assert_int_equal(entries_of_folder(), 1); /* no taken.tmp */
    rmdir(place);
    free_model(&m);
}

static uint32_t file_crc(off_t *size) {
    FILE *file = fopen(path, "rb");
    assert_non_null(file);
    static char bytes[1 << 18];
    size_t length = fread(bytes, 1, sizeof bytes, file);
    assert_true(feof(file));
    fclose(file);
    *size = (off_t)length;
    return crc32_of(bytes, length);
}

/* A disk that is full after so many bytes: the export fails, and an earlier file stays as it was. */
static void test_full_disk(void **unused) {
    Model m = make_model(SMALL);
    Vocabulary vocabulary = letters();
    export_model(&m, &vocabulary);
    off_t size, size_after;
    uint32_t before = file_crc(&size);
    m.weights[0] += 1;
    struct rlimit whole, limit;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &whole), 0);
    signal(SIGXFSZ, SIG_IGN); /* write() then fails with EFBIG */
    off_t full_at[] = {0, 100, 5000, size / 2, size - 40, size - 1};
    for (size_t i = 0; i < sizeof full_at / sizeof *full_at; i++) {
        limit = whole;
        limit.rlim_cur = (rlim_t)full_at[i];
        char error[512] = "";
        setrlimit(RLIMIT_FSIZE, &limit);
        bool written = gguf_export(path, &m.config.model, &m.tensors, m.weights, &vocabulary, error, sizeof error);
        setrlimit(RLIMIT_FSIZE, &whole);
        assert_false(written);
        assert_one_line(error, strerror(EFBIG));
        assert_int_equal(file_crc(&size_after), before);
        assert_int_equal(entries_of_folder(), 1);
    }
    signal(SIGXFSZ, SIG_DFL);
    export_model(&m, &vocabulary);
    assert_true(file_crc(&size_after) != before);
    assert_true(size_after == size);
    free_model(&m);
}

/* ---- the reader itself: it would notice */

/* Where the bytes of `text` are in the file. */
static long find_in_file(const char *text) {
    FILE *file = fopen(path, "rb");
    assert_non_null(file);
    static char bytes[1 << 18];
    size_t length = fread(bytes, 1, sizeof bytes, file), n = strlen(text);
    fclose(file);
    for (size_t i = 0; i + n <= length; i++) {
        if (memcmp(bytes + i, text, n) == 0) {
            return (long)i;
        }
    }
    fail_msg("'%s' is not in the file", text);
    return -1;
}

static void overwrite(long position, const void *bytes, size_t count) {
    FILE *file = fopen(path, "r+b");
    assert_non_null(file);
    assert_int_equal(fseek(file, position, SEEK_SET), 0);
    assert_int_equal(fwrite(bytes, 1, count, file), count);
    assert_int_equal(fclose(file), 0);
}

static void test_reader_refuses(void **unused) {
    static char output[MOST_OUTPUT];
    enum { NAME_TO_EXTENT = 4, NAME_TO_OFFSET = 4 + 8 + 4 }; /* of a vector: after name, dimensions, extent, type */
    const struct {
        const char *near;
        long from_end;
        const char *bytes;
        size_t count;
        const char *says;
    } CASES[] = {
        {"GGUF", -4, "GGUV", 4, "does not begin with GGUF"},
        {"GGUF", 0, "\2", 1, "has version 2"},
        {"qwen3moe.block_count", 4, "\3", 1, "tensor blk.2.attn_norm.weight is missing"},
        {"qwen3moe.expert_count", 4, "\4", 1, "blk.0.ffn_gate_inp.weight is [22, 3], expected [22, 4]"},
        {"qwen3moe.rope.dimension_count", 4, "\4", 1, "rotation must take all of a head"},
        {"qwen3moe.attention.head_count", -1, "x", 1, "key qwen3moe.attention.head_count is missing"},
        {"general.alignment", 4, "\60", 1, "alignment 48"},
        {"tokenizer.ggml.tokens", 4 + 4 + 8 + 8, "b", 1, "a token is empty or there twice"},
        {"output_norm.weight", NAME_TO_EXTENT, "\27", 1, "output_norm.weight is [23], expected [22]"},
        {"output_norm.weight", NAME_TO_EXTENT + 1, "\1", 1, "tensor output.weight lies at"},
        {"output_norm.weight", NAME_TO_OFFSET, "\1", 1, "no multiple of 32"},
        {"blk.0.attn_norm.weight", -22, "blk.1", 5, "tensor 'blk.1.attn_norm.weight' is there twice"},
    };
    Model m = make_model(SMALL);
    Vocabulary vocabulary = letters();
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        export_model(&m, &vocabulary);
        overwrite(find_in_file(CASES[i].near) + (long)strlen(CASES[i].near) + CASES[i].from_end, CASES[i].bytes,
                  CASES[i].count);
        int status = run_reader(output);
        if (status != 1 || !strstr(output, CASES[i].says)) {
            fail_msg("case %zu ends with %d, not saying '%s': %s", i, status, CASES[i].says, output);
        }
    }
    export_model(&m, &vocabulary);
    off_t size;
    file_crc(&size);
    assert_int_equal(truncate(path, size - 64), 0);
    assert_int_equal(run_reader(output), 1);
    assert_non_null(strstr(output, "ends inside a value"));
    free_model(&m);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_weights),
        cmocka_unit_test(test_weights_tied),
        cmocka_unit_test(test_weights_large),
        cmocka_unit_test(test_weights_one_expert),
        cmocka_unit_test(test_keys),
        cmocka_unit_test(test_token_types),
        cmocka_unit_test(test_unused_are_unique),
        cmocka_unit_test(test_stop_at_nul),
        cmocka_unit_test(test_models_refused),
        cmocka_unit_test(test_vocabularies_refused),
        cmocka_unit_test(test_places_refused),
        cmocka_unit_test(test_full_disk),
        cmocka_unit_test(test_reader_refuses),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
