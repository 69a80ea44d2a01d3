// build: both
/* --init-from and --upcycle: every weight arrives where it belongs, from exports, from transformers' folders of all
 * types and layouts, and from runs; an upcycled model computes what the dense one did. Read next:
 * test_import_refusals.c.
 */
#include "import_fixture.h"

#include <cjson/cJSON.h>
#include <math.h>

#include "../kernels/matmul.h"

/* ---- back and forth */

static const char *const KINDS[] = {
    "",
    "--tie 1",
    "--kv-heads 1",
    "--kv-heads 4 --head-dim 8",
    "--head-dim 0 --dim 24",
    "--renorm 0",
    "--router top1",
    "--router top1 --tie 1 --kv-heads 1",
    "--experts 5 --top-k 5",
    "--moe-every 2 --layers 3",
    "--moe-every 2 --tie 1",
    "--qk-norm 0",
    "--qk-norm 0 --tie 1 --kv-heads 1 --head-dim 10",
    "--qk-norm 0 --top-k 1 --experts 1 --renorm 1 --router dense", /* runs only */
};

enum { KIND_COUNT = sizeof KINDS / sizeof *KINDS };

static void test_export_and_import(void **unused) {
    for (int i = 0; i < KIND_COUNT - 1; i++) {
        Model m = make_model(KINDS[i]);
        export_model(&m, in_root("there"));
        Model back = import_model(in_root("there"), "");
        assert_same_model(&back, &m);
        assert_int_equal(back.config.model.renorm, m.config.model.renorm);
        assert_string_equal(back.config.model.router, m.config.model.router);
        assert_int_equal(back.config.model.seq, 16);
        free_model(&back);
        free_model(&m);
    }
    remove_tree(in_root("there"));
}

/* States of routers, too, and what no folder of transformers can hold. */
static void test_runs(void **unused) {
    static const char *const more[] = {
        "--router sigmoid",
        "--router noisy",
        "--router hash",
        "--router topk --shared-experts 1 --act gelu",
        "--chain-steps 2 --chain-norm 1",
    };
    for (size_t i = 0; i < KIND_COUNT + sizeof more / sizeof *more; i++) {
        Model m = make_model(i < KIND_COUNT ? KINDS[i] : more[i - KIND_COUNT]);
        write_run(&m, in_root("run"));
        Model back = import_model(in_root("run"), "");
        assert_same_model(&back, &m);
        assert_string_equal(back.config.train.resume, "");
        free_model(&back);
        free_model(&m);
        remove_tree(in_root("run"));
    }
}

static void test_dense_folders(void **unused) {
    static const struct {
        const char *options;
        HfArchitecture architecture;
    } cases[] = {{"--router dense", HF_QWEN3}, {"--router dense --qk-norm 0 --tie 1 --kv-heads 1", HF_LLAMA}};
    for (int i = 0; i < 2; i++) {
        Model m = make_model(cases[i].options);
        write_dense_folder(&m, cases[i].architecture, in_root("dense"));
        Model back = import_model(in_root("dense"), "");
        assert_string_equal(back.config.model.router, "dense");
        assert_same_model(&back, &m);
        free_model(&back);
        free_model(&m);
        remove_tree(in_root("dense"));
    }
}

/* --seq and what belongs to training may differ from DIR's. */
static void test_other_options(void **unused) {
    Model m = make_model("");
    export_model(&m, in_root("there"));
    Model back = import_model(in_root("there"), "--seq 9 --lr 0.5 --aux-coef 0.25");
    assert_same_model(&back, &m);
    assert_int_equal(back.config.model.seq, 9);
    assert_true(back.config.train.lr == 0.5 && back.config.train.aux_coef == 0.25);
    free_model(&back);
    free_model(&m);
    remove_tree(in_root("there"));
}

/* ---- types */

/* What 16 bits stand for, by the definition: fraction times a power of two. */
static double bits_value(unsigned bits, int exponent_bits) {
    int fraction_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
    int exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1);
    int fraction = bits & ((1 << fraction_bits) - 1);
    double value = exponent ? ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits)
                            : ldexp(fraction, 1 - bias - fraction_bits);
    return bits >> 15 ? -value : value;
}

/* The i-th 16 bits whose exponent is not all ones, in a circle. */
static unsigned finite_bits(size_t i, int exponent_bits) {
    unsigned half = (unsigned)((1 << exponent_bits) - 1) << (15 - exponent_bits);
    unsigned at = (unsigned)(i % (2 * half));
    return at < half ? at : 0x8000 | (at - half);
}

/* Element i of a tensor of that type into bytes; returns what it stands for. */
static acc_t make_value(char *bytes, SafetensorsDtype dtype, size_t i) {
    double wide = random_normal(3, i) * pow(10, (double)(i % 40) - 20);
    float single = (float)wide;
    int exponent_bits = dtype == SAFETENSORS_F16 ? 5 : 8;
    uint16_t half = (uint16_t)finite_bits(i, exponent_bits);
    switch (dtype) {
        case SAFETENSORS_F64: memcpy(bytes + 8 * i, &wide, 8); return (acc_t)wide;
        case SAFETENSORS_F32: memcpy(bytes + 4 * i, &single, 4); return single;
        default: memcpy(bytes + 2 * i, &half, 2); return (acc_t)bits_value(half, exponent_bits);
    }
}

static const int WIDTHS[] = {8, 4, 2, 2}; /* bytes of F64, F32, F16, BF16 */

/* All tensors of one type, or of all in turn, where few lie at a multiple of their width. The embedding has more
 * elements than there are finite halves, so every one of them is read. */
static void check_dtype(int dtype) {
    Model m = make_model("--dim 248 --vocab 264 --layers 1 --experts 2 --kv-heads 1 --expert-dim 3 --head-dim 2");
    export_model(&m, in_root("there"));
    Items items;
    open_items(&items, in_root("there"));
    int count;
    HfTensor *list = hf_tensors(&m.tensors, &m.config.model, HF_QWEN3_MOE, &count);
    SafetensorsItem changed[64];
    for (int i = 0; i < count; i++) {
        changed[i] = *find_item(&items, list[i].name);
        changed[i].dtype = (SafetensorsDtype)(dtype < 0 ? (3 - i % 4) : dtype);
        changed[i].bytes = list[i].count * WIDTHS[changed[i].dtype];
        char *bytes = malloc(changed[i].bytes);
        for (size_t e = 0; e < list[i].count; e++) {
            m.weights[list[i].offset + e] = make_value(bytes, changed[i].dtype, e);
        }
        changed[i].data = bytes;
    }
    start_folder(in_root("there"), in_root("typed"));
    save_items(changed, count, in_root("typed"), "model.safetensors");
    Model back = import_model(in_root("typed"), "");
    assert_same_model(&back, &m);
    for (int i = 0; i < count; i++) {
        free((void *)changed[i].data);
    }
    free(list);
    safetensors_close(&items.file);
    free_model(&back);
    free_model(&m);
}

static void test_types(void **unused) {
    assert_true(bits_value(0x3c00, 5) == 1 && bits_value(0x7bff, 5) == 65504 && bits_value(1, 5) == 0x1p-24);
    assert_true(bits_value(0xbf80, 8) == -1 && bits_value(0x0080, 8) == 0x1p-126 && bits_value(1, 8) == 0x1p-133);
    for (int dtype = -1; dtype < SAFETENSORS_DTYPES; dtype++) {
        check_dtype(dtype);
    }
}

/* ---- layouts */

static void test_several_files(void **unused) {
    Model m = make_model("");
    export_model(&m, in_root("there"));
    Items items;
    open_items(&items, in_root("there"));
    start_folder(in_root("there"), in_root("parts"));
    SafetensorsItem parts[3][256];
    int counts[3] = {0};
    cJSON *index = cJSON_CreateObject(), *map = cJSON_AddObjectToObject(index, "weight_map");
    for (int i = 0; i < items.count; i++) {
        char name[64];
        int part = i * 7 % 3;
        snprintf(name, sizeof name, "model-%05d-of-00003.safetensors", part + 1);
        parts[part][counts[part]++] = items.item[i];
        cJSON_AddStringToObject(map, items.item[i].name, name);
    }
    for (int part = 0; part < 3; part++) {
        char name[64];
        snprintf(name, sizeof name, "model-%05d-of-00003.safetensors", part + 1);
        save_items(parts[part], counts[part], in_root("parts"), name);
    }
    char *json = cJSON_Print(index);
    put_file(in_root("parts/model.safetensors.index.json"), json);
    Model back = import_model(in_root("parts"), "");
    assert_same_model(&back, &m);
    free(json);
    cJSON_Delete(index);
    safetensors_close(&items.file);
    free_model(&back);
    free_model(&m);
}

/* Experts as transformers 5 holds them in memory: ours as they lie. */
static void test_fused_experts(void **unused) {
    for (int mixtral = 0; mixtral < 2; mixtral++) {
        Model m = make_model(mixtral ? "--qk-norm 0" : "");
        export_model(&m, in_root("there"));
        Items items;
        open_items(&items, in_root("there"));
        for (int i = 0; i < items.count; i++) {
            if (strstr(items.item[i].name, ".experts.")) {
                items.item[i--] = items.item[--items.count];
            }
        }
        float *fused[4];
        for (int f = 0; f < 4; f++) {
            int layer = f / 2;
            char ours[64];
            snprintf(ours, sizeof ours, "layers.%d.moe.experts.w%d", layer, f % 2 + 1);
            const Tensor *tensor = &m.tensors.items[tensors_find(&m.tensors, ours)];
            fused[f] = malloc(tensor->count * sizeof(float));
            for (size_t e = 0; e < tensor->count; e++) {
                fused[f][e] = value_at(&m, ours, e);
            }
            SafetensorsItem *item = &items.item[items.count++];
            *item = (SafetensorsItem){.dtype = SAFETENSORS_F32,
                                      .ndim = 3,
                                      .shape = {tensor->shape[0], tensor->shape[1], tensor->shape[2]},
                                      .data = fused[f],
                                      .bytes = tensor->count * sizeof(float)};
            snprintf(item->name, sizeof item->name, "model.layers.%d.mlp.experts.%s", layer,
                     f % 2 ? "down_proj" : "gate_up_proj");
            if (mixtral && f % 2 == 0) {
                char gate[64];
                snprintf(gate, sizeof gate, "model.layers.%d.block_sparse_moe.gate.weight", layer);
                snprintf(find_item(&items, gate)->name, 64, "model.layers.%d.mlp.gate.weight", layer);
            }
        }
        save_folder(&items, in_root("there"), in_root("fused"));
        Model back = import_model(in_root("fused"), "");
        assert_same_model(&back, &m);
        for (int f = 0; f < 4; f++) {
            free(fused[f]);
        }
        safetensors_close(&items.file);
        free_model(&back);
        free_model(&m);
    }
}

/* The angles of the rotary embedding, and a tied head that says the same as the embedding. */
static void test_redundant_tensors(void **unused) {
    Model m = make_model("--tie 1");
    export_model(&m, in_root("there"));
    Items items;
    open_items(&items, in_root("there"));
    add_item(&items, "lm_head.weight", "model.embed_tokens.weight");
    add_item(&items, "model.layers.0.self_attn.rotary_emb.inv_freq", "model.norm.weight");
    add_item(&items, "model.rotary_emb.inv_freq", "model.norm.weight");
    save_folder(&items, in_root("there"), in_root("redundant"));
    Model back = import_model(in_root("redundant"), "");
    assert_same_model(&back, &m);
    safetensors_close(&items.file);
    free_model(&back);
    free_model(&m);
}

/* ---- the tokenizer */

static void test_tokenizer(void **unused) {
    char tokenizer[CONFIG_TEXT], error[512], path[CONFIG_TEXT];
    Config source;
    Model m = make_model("");
    export_model(&m, in_root("there"));
    assert_true(import_config(&source, in_root("there"), error, sizeof error));
    import_tokenizer(tokenizer, &source, in_root("there"));
    snprintf(path, sizeof path, "%s", in_root("there/tokenizer.json"));
    assert_string_equal(tokenizer, path);
    unlink(path);
    import_tokenizer(tokenizer, &source, in_root("there"));
    assert_string_equal(tokenizer, "byte");

    write_run(&m, in_root("run"));
    assert_true(import_config(&source, in_root("run"), error, sizeof error));
    import_tokenizer(tokenizer, &source, in_root("run"));
    assert_string_equal(tokenizer, "byte");
    put_file(in_root("run/tokenizer.json"), TOKENIZER_JSON);
    import_tokenizer(tokenizer, &source, in_root("run"));
    assert_string_equal(tokenizer, in_root("run/tokenizer.json"));
    remove_tree(in_root("run"));
    free_model(&m);
}

/* ---- upcycling */

/* Logits (T,V) of a fixed text, the caller's. */
static real_t *logits_of(Model *m, size_t *count) {
    Transformer model;
    Arena arena = {0};
    const ModelConfig *c = &m->config.model;
    int *tokens;
    real_t *logits, *copy;
    *count = (size_t)c->seq * c->vocab;
    transformer_reserve(&model, &m->config, 1, 1, USE_TRAIN, NULL, &arena);
    arena_reserve(&arena, (void **)&tokens, c->seq * sizeof(int), MEMORY_ACTIVATIONS);
    arena_reserve(&arena, (void **)&logits, *count * sizeof(real_t), MEMORY_ACTIVATIONS);
    arena_commit(&arena);
    transformer_connect(&model);
    transformer_load(&model, m->weights);
    for (int t = 0; t < c->seq; t++) {
        tokens[t] = t * 11 % c->vocab;
    }
    transformer_set_training(&model, false, false);
    transformer_forward(&model, tokens, 0, NULL);
    matmul_forward(logits, model.hidden, model.head.w, c->seq, c->dim, c->vocab, NULL);
    copy = malloc(*count * sizeof *copy);
    host_from_device(copy, logits, *count * sizeof *copy, NULL);
    transformer_free(&model);
    arena_free(&arena);
    return copy;
}

/* Relative L2 distance of two models' logits. */
static double distance(Model *a, Model *b) {
    size_t count, same;
    real_t *x = logits_of(a, &count), *y = logits_of(b, &same);
    assert_int_equal(count, same);
    double difference = 0, size = 0;
    for (size_t i = 0; i < count; i++) {
        difference += ((double)x[i] - y[i]) * ((double)x[i] - y[i]);
        size += (double)y[i] * y[i];
    }
    free(x);
    free(y);
    assert_true(size > 0);
    return sqrt(difference / size);
}

static Model make_dense(const char *options) {
    char all[256];
    snprintf(all, sizeof all, "--router dense --top-k 1 --experts 1 --expert-dim 14 %s", options);
    Model dense = make_model(all);
    for (int t = 0; t < dense.tensors.count; t++) { /* small enough for every part of the model to count */
        const Tensor *tensor = &dense.tensors.items[t];
        for (size_t i = 0; tensor->ndim > 1 && i < tensor->count; i++) {
            dense.weights[tensor->offset + i] *= (acc_t)0.25;
        }
    }
    return dense;
}

static void check_upcycled(Model *dense, const char *directory) {
    const double tolerance = sizeof(real_t) == 8 ? 1e-14 : 1e-6;
    Model up = import_model(directory, "--upcycle --experts 5 --top-k 3 --renorm 1");
    Model fresh = up;
    fresh.weights = calloc(up.tensors.total, sizeof *up.weights);
    tensors_init(&fresh.tensors, fresh.weights, 5);
    assert_int_equal(up.config.model.expert_dim, 14);
    for (int t = 0; t < up.tensors.count; t++) {
        const Tensor *tensor = &up.tensors.items[t];
        char name[64];
        bool experts = tensor->kind == TENSOR_EXPERT;
        int copies = experts ? 5 : 1;
        snprintf(name, sizeof name, "%s", tensor->name);
        if (experts) {
            snprintf(name, sizeof name, "layers.%d.mlp%s", tensor->layer, strrchr(tensor->name, '.'));
        }
        const Model *source = tensor->kind == TENSOR_ROUTER ? &fresh : dense;
        for (size_t i = 0; i < tensor->count; i++) {
            float value = value_at(source, name, i % (tensor->count / copies));
            assert_true((float)up.weights[tensor->offset + i] == value);
        }
    }
    double same = distance(&up, dense);
    if (!(same <= tolerance)) {
        fail_msg("the upcycled model's logits are off by %g", same);
    }
    /* experts count: without them the logits are others */
    const Tensor *w2 = &up.tensors.items[tensors_find(&up.tensors, "layers.1.moe.experts.w2")];
    memset(up.weights + w2->offset, 0, w2->count * sizeof *up.weights);
    assert_true(distance(&up, dense) > 0.01);
    free(fresh.weights);
    free_model(&up);
}

static void test_upcycle(void **unused) {
    Model dense = make_dense("");
    write_run(&dense, in_root("run"));
    check_upcycled(&dense, in_root("run"));
    write_dense_folder(&dense, HF_QWEN3, in_root("dense"));
    check_upcycled(&dense, in_root("dense"));
    remove_tree(in_root("run"));
    remove_tree(in_root("dense"));
    free_model(&dense);
}

/* Layers that stay dense keep their MLP; routers with states start fresh. */
static void test_upcycle_partly(void **unused) {
    Model dense = make_dense("--layers 2 --act gelu");
    write_run(&dense, in_root("run"));
    Model up = import_model(in_root("run"), "--upcycle --experts 4 --moe-every 2 --top-k 1 --router sigmoid");
    for (int i = 0; i < 14 * 22; i++) {
        assert_true(value_at(&up, "layers.0.mlp.w1", i) == value_at(&dense, "layers.0.mlp.w1", i));
        assert_true(value_at(&up, "layers.1.moe.experts.w1", 3 * 14 * 22 + i) ==
                    value_at(&dense, "layers.1.mlp.w1", i));
    }
    for (int e = 0; e < 4; e++) {
        assert_true(value_at(&up, "layers.1.moe.router.bias", e) == 0);
    }
    assert_int_equal(tensors_find(&up.tensors, "layers.1.mlp.w1"), -1);
    free_model(&up);
    free_model(&dense);
    remove_tree(in_root("run"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_export_and_import),
        cmocka_unit_test(test_runs),
        cmocka_unit_test(test_dense_folders),
        cmocka_unit_test(test_other_options),
        cmocka_unit_test(test_types),
        cmocka_unit_test(test_several_files),
        cmocka_unit_test(test_fused_experts),
        cmocka_unit_test(test_redundant_tensors),
        cmocka_unit_test(test_tokenizer),
        cmocka_unit_test(test_upcycle),
        cmocka_unit_test(test_upcycle_partly),
    };
    return cmocka_run_group_tests(tests, make_root, remove_root);
}
