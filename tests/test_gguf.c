// build: both
/* --export-gguf: what a program that knows only the public format finds in the file.
 *
 * Small random models are exported and read back by gguf_reader.py, which checks the file by itself and prints the
 * CRC-32 of each tensor's bytes. What those must be is spelled out here value by value, with loops over experts, rows
 * and columns, so that a wrong cut or order of gate, up, queries, keys or values shows. The rest is keys and the
 * vocabulary. Needs python3. Read next: test_gguf_refusals.c.
 */
#include "gguf_fixture.h"

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
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
