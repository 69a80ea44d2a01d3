// build: both
/* The weights' names in transformers, and the model.safetensors of --export-hf as a program that knows only the public
 * format finds it.
 *
 * Names and shapes of tiny models are written out by hand. Small random models are exported and read back by
 * safetensors_reader.py, which checks the file by itself and prints the CRC-32 of each tensor's bytes; what those must
 * be is spelled out here with loops over experts, rows and columns. Needs python3. Read next: test_hf_export.c.
 */
#include "hf_folder.h"

#include <sys/wait.h>

#include "../model/hf_tensors.h"

/* ---- names and shapes */

static void expect_list(const char *options, HfArchitecture architecture, const char *const *expected) {
    Model m = make_model(options);
    int count;
    HfTensor *list = hf_tensors(&m.tensors, &m.config.model, architecture, &count);
    for (int i = 0; i < count && expected[i]; i++) {
        char line[256];
        int length = snprintf(line, sizeof line, "%s %d", list[i].name, (int)list[i].shape[0]);
        if (list[i].ndim == 2) {
            snprintf(line + length, sizeof line - length, "x%d", (int)list[i].shape[1]);
        }
        assert_string_equal(line, expected[i]);
    }
    int lines = 0;
    while (expected[lines]) {
        lines++;
    }
    assert_int_equal(count, lines);
    free(list);
    free_model(&m);
}

#define TINY "--layers 1 --dim 6 --heads 2 --kv-heads 1 --head-dim 4 --vocab 11 --experts 2 --top-k 2 --expert-dim 5 "

static void test_names_qwen3_moe(void **unused) {
    static const char *const expected[] = {
        "model.embed_tokens.weight 11x6",
        "model.layers.0.input_layernorm.weight 6",
        "model.layers.0.self_attn.q_proj.weight 8x6",
        "model.layers.0.self_attn.k_proj.weight 4x6",
        "model.layers.0.self_attn.v_proj.weight 4x6",
        "model.layers.0.self_attn.q_norm.weight 4",
        "model.layers.0.self_attn.k_norm.weight 4",
        "model.layers.0.self_attn.o_proj.weight 6x8",
        "model.layers.0.post_attention_layernorm.weight 6",
        "model.layers.0.mlp.experts.0.gate_proj.weight 5x6",
        "model.layers.0.mlp.experts.0.up_proj.weight 5x6",
        "model.layers.0.mlp.experts.1.gate_proj.weight 5x6",
        "model.layers.0.mlp.experts.1.up_proj.weight 5x6",
        "model.layers.0.mlp.experts.0.down_proj.weight 6x5",
        "model.layers.0.mlp.experts.1.down_proj.weight 6x5",
        "model.layers.0.mlp.gate.weight 2x6",
        "model.norm.weight 6",
        "lm_head.weight 11x6",
        NULL,
    };
    expect_list(TINY, HF_QWEN3_MOE, expected);
}

static void test_names_mixtral(void **unused) {
    static const char *const expected[] = {
        "model.embed_tokens.weight 11x6",
        "model.layers.0.input_layernorm.weight 6",
        "model.layers.0.self_attn.q_proj.weight 8x6",
        "model.layers.0.self_attn.k_proj.weight 4x6",
        "model.layers.0.self_attn.v_proj.weight 4x6",
        "model.layers.0.self_attn.o_proj.weight 6x8",
        "model.layers.0.post_attention_layernorm.weight 6",
        "model.layers.0.block_sparse_moe.experts.0.w1.weight 5x6",
        "model.layers.0.block_sparse_moe.experts.0.w3.weight 5x6",
        "model.layers.0.block_sparse_moe.experts.1.w1.weight 5x6",
        "model.layers.0.block_sparse_moe.experts.1.w3.weight 5x6",
        "model.layers.0.block_sparse_moe.experts.0.w2.weight 6x5",
        "model.layers.0.block_sparse_moe.experts.1.w2.weight 6x5",
        "model.layers.0.block_sparse_moe.gate.weight 2x6",
        "model.norm.weight 6",
        NULL,
    };
    expect_list(TINY "--qk-norm 0 --tie 1", HF_MIXTRAL, expected);
}

/* Every second layer of Qwen3-MoE dense, as wide as two experts. */
static void test_names_dense(void **unused) {
    static const char *const expected[] = {
        "model.embed_tokens.weight 11x6",
        "model.layers.0.input_layernorm.weight 6",
        "model.layers.0.self_attn.q_proj.weight 8x6",
        "model.layers.0.self_attn.k_proj.weight 4x6",
        "model.layers.0.self_attn.v_proj.weight 4x6",
        "model.layers.0.self_attn.o_proj.weight 6x8",
        "model.layers.0.post_attention_layernorm.weight 6",
        "model.layers.0.mlp.gate_proj.weight 10x6",
        "model.layers.0.mlp.up_proj.weight 10x6",
        "model.layers.0.mlp.down_proj.weight 6x10",
        "model.norm.weight 6",
        NULL,
    };
    expect_list(TINY "--router dense --qk-norm 0 --tie 1", HF_LLAMA, expected);
    expect_list(TINY "--router dense --qk-norm 0 --tie 1", HF_QWEN3, expected);
    Model m = make_model("--moe-every 2");
    int count;
    HfTensor *list = hf_tensors(&m.tensors, &m.config.model, HF_QWEN3_MOE, &count);
    int dense = 0, experts = 0;
    for (int i = 0; i < count; i++) {
        dense += !strncmp(list[i].name, "model.layers.0.mlp.", 19) && !strstr(list[i].name, "expert");
        experts += !strncmp(list[i].name, "model.layers.1.mlp.experts.", 27);
    }
    assert_int_equal(dense, 3);
    assert_int_equal(experts, 3 * 3);
    free(list);
    free_model(&m);
}

/* Each element of each tensor is in exactly one part, and the parts follow each other. */
static void test_cover(void **unused) {
    static const struct {
        const char *options;
        HfArchitecture architecture;
    } cases[] = {{"", HF_QWEN3_MOE},
                 {"--kv-heads 1 --tie 1 --moe-every 2", HF_QWEN3_MOE},
                 {"--qk-norm 0 --kv-heads 4", HF_MIXTRAL},
                 {"--router dense", HF_QWEN3},
                 {"--router dense --qk-norm 0", HF_LLAMA}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Model m = make_model(cases[i].options);
        int count;
        HfTensor *list = hf_tensors(&m.tensors, &m.config.model, cases[i].architecture, &count);
        unsigned char *seen = calloc(m.tensors.total, 1);
        for (int p = 0; p < count; p++) {
            assert_true(p == 0 || list[p - 1].offset + list[p - 1].count <= list[p].offset);
            assert_int_equal(list[p].count, list[p].shape[0] * (list[p].ndim == 2 ? list[p].shape[1] : 1));
            for (size_t e = 0; e < list[p].count; e++) {
                seen[list[p].offset + e]++;
            }
        }
        size_t elements = 0;
        for (size_t e = 0; e < m.tensors.total; e++) {
            elements += seen[e];
        }
        for (int t = 0; t < m.tensors.count; t++) {
            for (size_t e = 0; e < m.tensors.items[t].count; e++) {
                assert_int_equal(seen[m.tensors.items[t].offset + e], 1);
            }
            elements -= m.tensors.items[t].count;
        }
        assert_int_equal(elements, 0);
        free(seen);
        free(list);
        free_model(&m);
    }
}

/* ---- the file, read by another program */

enum { MOST_OUTPUT = 1 << 14 };

/* What the reader prints, after an empty line; its exit status. */
static int run_reader(char output[MOST_OUTPUT], const char *path) {
    char command[512];
    snprintf(command, sizeof command, "python3 tests/safetensors_reader.py '%s' 2>&1", path);
    FILE *pipe = popen(command, "r");
    assert_non_null(pipe);
    output[0] = '\n';
    size_t length = 1 + fread(output + 1, 1, MOST_OUTPUT - 2, pipe);
    output[length] = '\0';
    int status = pclose(pipe);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
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

/* The lines that are expected, and how many have been. */
typedef struct {
    const Model *model;
    const char *output;
    int lines;
} Reading;

/* rows x columns values of our tensor, from row `first` on, stand in the file as `name`; rows 0: a vector. */
static void expect_rows(Reading *r, int first, int rows, int columns, int layer, const char *ours, const char *format,
                        ...) {
    float values[4096];
    char our_name[64], name[128], line[256], shape[32];
    size_t count = 0;
    snprintf(our_name, sizeof our_name, layer < 0 ? "%.0d%s" : "layers.%d.%s", layer < 0 ? 0 : layer, ours);
    for (int row = first; row < first + (rows ? rows : 1); row++) {
        for (int column = 0; column < columns; column++) {
            assert_true(count < sizeof values / sizeof *values);
            values[count++] = value_at(r->model, our_name, (size_t)row * columns + column);
        }
    }
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(name, sizeof name, format, arguments);
    va_end(arguments);
    snprintf(shape, sizeof shape, rows ? "%dx%d" : "%.0d%d", rows, columns);
    snprintf(line, sizeof line, "\n%s.weight F32 %s %08x\n", name, shape, crc32_of(values, count * sizeof *values));
    if (!strstr(r->output, line)) {
        fail_msg("no line '%s' in:%s", line + 1, r->output);
    }
    r->lines++;
}

static void expect_attention(Reading *r, int l) {
    const ModelConfig *c = &r->model->config.model;
    int C = c->dim, HS = c->head_dim, queries = c->heads * HS, keys = c->kv_heads * HS;
    expect_rows(r, 0, 0, C, l, "attn_norm.w", "model.layers.%d.input_layernorm", l);
    expect_rows(r, 0, queries, C, l, "attn.qkv.w", "model.layers.%d.self_attn.q_proj", l);
    expect_rows(r, queries, keys, C, l, "attn.qkv.w", "model.layers.%d.self_attn.k_proj", l);
    expect_rows(r, queries + keys, keys, C, l, "attn.qkv.w", "model.layers.%d.self_attn.v_proj", l);
    expect_rows(r, 0, C, queries, l, "attn.out.w", "model.layers.%d.self_attn.o_proj", l);
    expect_rows(r, 0, 0, C, l, "ffn_norm.w", "model.layers.%d.post_attention_layernorm", l);
    if (c->qk_norm) {
        expect_rows(r, 0, 0, HS, l, "attn.q_norm.w", "model.layers.%d.self_attn.q_norm", l);
        expect_rows(r, 0, 0, HS, l, "attn.k_norm.w", "model.layers.%d.self_attn.k_norm", l);
    }
}

static void expect_moe(Reading *r, int l) {
    const ModelConfig *c = &r->model->config.model;
    int C = c->dim, H = c->expert_dim, E = c->experts;
    const char *block = c->qk_norm ? "mlp" : "block_sparse_moe";
    expect_rows(r, 0, E, C, l, "moe.router.w", "model.layers.%d.%s.gate", l, block);
    for (int e = 0; e < E; e++) {
        const char *const names[] = {c->qk_norm ? "gate_proj" : "w1", c->qk_norm ? "up_proj" : "w3",
                                     c->qk_norm ? "down_proj" : "w2"};
        expect_rows(r, e * 2 * H, H, C, l, "moe.experts.w1", "model.layers.%d.%s.experts.%d.%s", l, block, e, names[0]);
        expect_rows(r, e * 2 * H + H, H, C, l, "moe.experts.w1", "model.layers.%d.%s.experts.%d.%s", l, block, e,
                    names[1]);
        expect_rows(r, e * C, C, H, l, "moe.experts.w2", "model.layers.%d.%s.experts.%d.%s", l, block, e, names[2]);
    }
}

static void expect_dense(Reading *r, int l) {
    const ModelConfig *c = &r->model->config.model;
    int C = c->dim, H = c->top_k * c->expert_dim;
    expect_rows(r, 0, H, C, l, "mlp.w1", "model.layers.%d.mlp.gate_proj", l);
    expect_rows(r, H, H, C, l, "mlp.w1", "model.layers.%d.mlp.up_proj", l);
    expect_rows(r, 0, C, H, l, "mlp.w2", "model.layers.%d.mlp.down_proj", l);
}

static void expect_file(const char *options) {
    char output[MOST_OUTPUT], path[300];
    Model m = make_model(options);
    const ModelConfig *c = &m.config.model;
    const char *folder = in_root("read");
    export_model(&m, folder);
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    int status = run_reader(output, path);
    if (status != 0) {
        fail_msg("the reader ends with %d: %s", status, output);
    }
    Reading r = {&m, output, 0};
    expect_rows(&r, 0, c->vocab, c->dim, -1, "embedding.w", "model.embed_tokens");
    for (int l = 0; l < c->layers; l++) {
        expect_attention(&r, l);
        if ((l + 1) % c->moe_every == 0) {
            expect_moe(&r, l);
        } else {
            expect_dense(&r, l);
        }
    }
    expect_rows(&r, 0, 0, c->dim, -1, "final_norm.w", "model.norm");
    if (!c->tie) {
        expect_rows(&r, 0, c->vocab, c->dim, -1, "head.w", "lm_head");
    }
    int lines = -1; /* the first newline stands in front */
    for (const char *p = output; *p; p++) {
        lines += *p == '\n';
    }
    assert_int_equal(lines, r.lines);
    free_model(&m);
}

static void test_file_qwen3_moe(void **unused) {
    expect_file("");
}

static void test_file_dense_layers(void **unused) {
    expect_file("--moe-every 2 --layers 3 --kv-heads 1 --tie 1");
}

static void test_file_mixtral(void **unused) {
    expect_file("--qk-norm 0 --kv-heads 4 --head-dim 8");
}

/* The reader itself refuses what is not the format. */
static void test_reader_refuses(void **unused) {
    static const struct {
        const char *header, *values, *words;
    } cases[] = {
        {"{\"__metadata__\":{\"format\":\"pt\"},\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}",
         "1234", NULL},
        {"{\"__metadata__\":{\"format\":\"pt\"},\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}",
         "1234", "4 bytes for [2]"},
        {"{\"__metadata__\":{\"format\":\"pt\"},\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}",
         "12345678", "behind the last"},
        {"{\"__metadata__\":{\"format\":\"pt\"},\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}",
         "12345678", "begins at 4"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", "1234", "format pt"},
        {"[1]", "", "does not begin with {"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char output[MOST_OUTPUT];
        const char *path = in_root("made.safetensors");
        uint64_t length = strlen(cases[i].header);
        FILE *file = fopen(path, "wb");
        assert_non_null(file);
        fwrite(&length, 8, 1, file);
        fputs(cases[i].header, file);
        fputs(cases[i].values, file);
        assert_int_equal(fclose(file), 0);
        int status = run_reader(output, path);
        assert_int_equal(status, cases[i].words ? 1 : 0);
        if (!strstr(output, cases[i].words ? cases[i].words : "\na F32 1 9be3e0a3\n")) {
            fail_msg("'%s' is not in:%s", cases[i].words, output);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_names_qwen3_moe), cmocka_unit_test(test_names_mixtral),
        cmocka_unit_test(test_names_dense),     cmocka_unit_test(test_cover),
        cmocka_unit_test(test_file_qwen3_moe),  cmocka_unit_test(test_file_dense_layers),
        cmocka_unit_test(test_file_mixtral),    cmocka_unit_test(test_reader_refuses),
    };
    return cmocka_run_group_tests(tests, make_root, remove_root);
}
