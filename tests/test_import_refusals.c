/* --init-from: what is refused, each in one line that names the tensor or file: hostile and damaged folders of
 * transformers, runs that do not fit, options that leave a weight without a place. Read next: model/hf_weights.c.
 */
#include "import_fixture.h"

#include <math.h>

/* ---- tensors of a folder */

static const char UP[] = "model.layers.1.mlp.experts.2.up_proj.weight";

/* Exports a model and opens what it holds. */
static void start(Items *items, const char *options) {
    Model m = make_model(options);
    export_model(&m, in_root("there"));
    open_items(items, in_root("there"));
    free_model(&m);
}

/* The changed folder is refused with these words. */
static void refuse_items(Items *items, const char *words) {
    save_folder(items, in_root("there"), in_root("changed"));
    refuse_import(in_root("changed"), "", words);
    safetensors_close(&items->file);
}

static void test_missing_and_extra(void **unused) {
    Items items;
    start(&items, "");
    remove_item(&items, UP);
    refuse_items(&items,
                 "has no tensor model.layers.1.mlp.experts.2.up_proj.weight (10, 22), which its config.json asks");
    start(&items, "");
    remove_item(&items, "lm_head.weight");
    refuse_items(&items, "has no tensor lm_head.weight (70, 22)");
    start(&items, "");
    add_item(&items, "model.layers.2.mlp.gate.weight", UP);
    refuse_items(&items, "has a tensor model.layers.2.mlp.gate.weight (10, 22) that its config.json does not explain");
    start(&items, "");
    add_item(&items, "model.layers.0.self_attn.q_proj.bias", "model.norm.weight");
    refuse_items(&items, "q_proj.bias (22) that its config.json does not explain");
    start(&items, "");
    snprintf(find_item(&items, "model.norm.weight")->name, 64, "norm.weight");
    refuse_items(&items, "has no tensor model.norm.weight (22)");
    start(&items, ""); /* one expert's matrix beside the fused ones */
    SafetensorsItem *fused = add_item(&items, "model.layers.1.mlp.experts.down_proj", UP);
    float values[3 * 22 * 10] = {0};
    *fused = (SafetensorsItem){.dtype = SAFETENSORS_F32, .ndim = 3, .shape = {3, 22, 10}, .data = values};
    fused->bytes = sizeof values;
    strcpy(fused->name, "model.layers.1.mlp.experts.down_proj");
    refuse_items(&items, "has a tensor model.layers.1.mlp.experts.0.down_proj.weight");
}

static void test_shapes(void **unused) {
    Items items;
    start(&items, "");
    SafetensorsItem *item = find_item(&items, UP);
    item->shape[0] = 22;
    item->shape[1] = 10;
    refuse_items(&items,
                 "tensor model.layers.1.mlp.experts.2.up_proj.weight is (22, 10), but config.json asks for "
                 "(10, 22)");
    start(&items, "");
    item = find_item(&items, UP);
    item->ndim = 1;
    item->shape[0] = 220;
    refuse_items(&items, "is (220), but config.json asks for (10, 22)");
    start(&items, "");
    item = find_item(&items, "model.norm.weight");
    item->ndim = 2;
    item->shape[1] = 1;
    refuse_items(&items, "is (22, 1), but config.json asks for (22)");
    start(&items, "");
    item = add_item(&items, "model.layers.0.mlp.experts.gate_up_proj", UP);
    refuse_items(&items, "is (10, 22), but config.json asks for (3, 20, 22)");
}

/* Of every type; a double that no float holds is as bad where this program computes in float. */
static void test_not_finite(void **unused) {
    static const uint16_t halves[] = {0x7c00, 0xfc01, 0x7f80, 0xffc1}; /* inf and NaN; two of each type of 16 bits */
    const float singles[] = {INFINITY, NAN};
    const double doubles[] = {-INFINITY, 1e300};
    for (int i = 0; i < 8; i++) {
        Items items;
        double bytes[22] = {0};
        start(&items, "");
        SafetensorsItem *item = find_item(&items, "model.layers.1.input_layernorm.weight");
        item->dtype = i < 2 ? SAFETENSORS_F64 : i < 4 ? SAFETENSORS_F32 : i < 6 ? SAFETENSORS_F16 : SAFETENSORS_BF16;
        size_t width = i < 2 ? 8 : i < 4 ? 4 : 2;
        const void *bad = i < 2   ? (const void *)&doubles[i]
                          : i < 4 ? (const void *)&singles[i - 2]
                                  : (const void *)&halves[i - 4];
        memcpy((char *)bytes + 21 * width, bad, width);
        item->data = bytes;
        item->bytes = 22 * width;
        refuse_items(&items, "tensor model.layers.1.input_layernorm.weight has 1 values that are not finite float");
    }
}

static void test_tied_head(void **unused) {
    Items items;
    float other[70 * 22] = {0};
    start(&items, "--tie 1");
    add_item(&items, "lm_head.weight", "model.embed_tokens.weight")->data = other;
    refuse_items(&items, "lm_head.weight differs from model.embed_tokens.weight");
    start(&items, "--tie 1");
    add_item(&items, "lm_head.weight", "model.norm.weight");
    refuse_items(&items, "lm_head.weight differs from model.embed_tokens.weight");
}

/* ---- files of a folder */

static void test_files(void **unused) {
    Items items;
    start(&items, "");
    safetensors_close(&items.file);
    refuse_import(in_root("nowhere"), "", "nowhere/config.json (No such file");
    start_folder(in_root("there"), in_root("empty"));
    refuse_import(in_root("empty"), "", "neither model.safetensors nor model.safetensors.index.json");
    put_file(in_root("empty/model.safetensors"), "not a model");
    refuse_import(in_root("empty"), "", "not a safetensors file, or truncated");
    put_file(in_root("empty/config.json"), "{\"model_type\": \"gpt2\"}");
    refuse_import(in_root("empty"), "", "\"gpt2\"");
    put_file(in_root("empty/config.json"), "[]");
    refuse_import(in_root("empty"), "", "is not a run's configuration");
    put_file(in_root("empty/config.json"), "");
    refuse_import(in_root("empty"), "", "name a run's directory, or a folder of Hugging Face transformers");
    FILE *hidden = fopen(in_root("empty/config.json"), "wb"); /* what follows a zero byte must not go unseen */
    assert_non_null(hidden);
    assert_int_equal(fwrite("{}\0{}", 1, 5, hidden), 5);
    assert_int_equal(fclose(hidden), 0);
    refuse_import(in_root("empty"), "", "not a text of at most");
    char *long_text = malloc((1 << 20) + 2);
    memset(long_text, ' ', (1 << 20) + 1);
    long_text[(1 << 20) + 1] = '\0';
    put_file(in_root("empty/config.json"), long_text);
    refuse_import(in_root("empty"), "", "not a text of at most");
    free(long_text);
    char deep[300];
    memset(deep, 'd', sizeof deep - 1);
    deep[sizeof deep - 1] = '\0';
    char error[512];
    Config source;
    assert_false(import_config(&source, in_root("empty/config.json"), error, sizeof error)); /* a file */
    assert_false(import_config(&source, deep, error, sizeof error));
    assert_null(strchr(error, '\n'));
}

/* Indices beside one whole file that is called model-a.safetensors. */
static void test_index(void **unused) {
    static const struct {
        const char *index, *words;
    } cases[] = {
        {"{", "is not a JSON object with a weight_map"},
        {"[]", "is not a JSON object with a weight_map"},
        {"{\"weight_map\": []}", "is not a JSON object with a weight_map"},
        {"{\"weight_map\": {}}", "has no tensor model.embed_tokens.weight"},
        {"{\"weight_map\": {\"a\": 1}}", "the file of tensor 'a' is not the plain name"},
        {"{\"weight_map\": {\"a\": \"../there/model.safetensors\"}}", "the file of tensor 'a' is not the plain name"},
        {"{\"weight_map\": {\"a\": \"/etc/passwd\"}}", "the file of tensor 'a' is not the plain name"},
        {"{\"weight_map\": {\"a\": \".safetensors\"}}", "the file of tensor 'a' is not the plain name"},
        {"{\"weight_map\": {\"a\": \"b.bin\"}}", "the file of tensor 'a' is not the plain name"},
        {"{\"weight_map\": {\"a\": \"b.safetensors\"}}", "b.safetensors"},
        {"{\"weight_map\": {\"a\\nb\": \"model-a.safetensors\"}}", "tensor 'a?b', but it does not"},
        {"{\"weight_map\": {\"model.norm.weight\": \"model-a.safetensors\"}}",
         "model-a.safetensors has a tensor lm_head"},
        {"{\"weight_map\": {\"model.norm.weight\": \"model-a.safetensors\", \"model.norm.weight\": "
         "\"model-a.safetensors\"}}",
         "lists tensor model.norm.weight twice"},
    };
    Items items;
    start(&items, "");
    start_folder(in_root("there"), in_root("parts"));
    save_items(items.item, items.count, in_root("parts"), "model-a.safetensors");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        put_file(in_root("parts/model.safetensors.index.json"), cases[i].index);
        refuse_import(in_root("parts"), "", cases[i].words);
    }
    safetensors_close(&items.file);
}

/* ---- models that do not fit */

static void test_other_models(void **unused) {
    static const struct {
        const char *options, *words;
    } cases[] = {
        {"--layers 3", "has no tensor layers.2.attn_norm.w (22)"},
        {"--layers 1", "has a tensor layers.1.attn_norm.w (22) that"},
        {"--vocab 71", "its tensor embedding.w is (70, 22), but the model options given here ask for (71, 22)"},
        {"--tie 1", "has a tensor head.w (70, 22) that"},
        {"--experts 4", "its tensor layers.0.moe.experts.w1 is (3, 20, 22)"},
        {"--moe-every 2", "has no tensor layers.0.mlp.w1 (40, 22)"},
        {"--router sigmoid", "has no tensor layers.0.moe.router.bias (3)"},
        {"--router hash", "has no tensor layers.0.moe.router.table (70, 2)"},
        {"--shared-experts 1", "has no tensor layers.0.moe.shared.w1 (20, 22)"},
        {"--qk-norm 0 --heads 2 --kv-heads 1 --head-dim 12", "has 4 heads of 6, here they are 2 of 12"},
        {"--heads 8", "has 4 heads of 6, here they are 8 of 6"},
        {"--upcycle", "--upcycle makes experts of a dense model"},
    };
    Model m = make_model("");
    export_model(&m, in_root("there"));
    write_run(&m, in_root("run"));
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        refuse_import(in_root("there"), cases[i].options, cases[i].words);
        refuse_import(in_root("run"), cases[i].options, cases[i].words);
    }
    remove_tree(in_root("run"));
    free_model(&m);
}

static void test_upcycling(void **unused) {
    Model m = make_model("--router dense --top-k 1 --experts 1 --expert-dim 14");
    write_run(&m, in_root("run"));
    refuse_import(in_root("run"), "--upcycle --expert-dim 7", "its tensor layers.0.mlp.w1 is (28, 22)");
    refuse_import(in_root("run"), "--upcycle --moe-every 2 --top-k 2", "ask for (56, 22)");
    refuse_import(in_root("run"), "--upcycle --shared-experts 1", "has no tensor layers.0.moe.shared.w1");
    refuse_import(in_root("run"), "--upcycle --tie 1", "has a tensor head.w");
    refuse_import(in_root("run"), "--upcycle --act gelu", "its tensor layers.0.mlp.w1 is (28, 22)");
    refuse_import(in_root("run"), "--router topk --experts 2 --top-k 1", "has no tensor layers.0.moe.experts.w1");
    remove_tree(in_root("run"));
    free_model(&m);
}

/* ---- runs */

static void change_byte(const char *path, long at) {
    FILE *file = fopen(path, "r+b");
    assert_non_null(file);
    fseek(file, at, at < 0 ? SEEK_END : SEEK_SET);
    int byte = fgetc(file);
    fseek(file, -1, SEEK_CUR);
    fputc(byte ^ 1, file);
    assert_int_equal(fclose(file), 0);
}

static void test_damaged_runs(void **unused) {
    Model m = make_model("");
    write_run(&m, in_root("run"));
    change_byte(in_root("run/checkpoint/model.safetensors"), -1);
    refuse_import(in_root("run"), "", "model.safetensors is altered: its checksum is");
    change_byte(in_root("run/checkpoint/model.safetensors"), -1);
    unlink(in_root("run/checkpoint/manifest.json"));
    refuse_import(in_root("run"), "",
                  "it has no readable manifest.json: restore it from a copy, or train again without "
                  "--init-from");
    remove_tree(in_root("run/checkpoint"));
    refuse_import(in_root("run"), "", "no checkpoint in");
    remove_tree(in_root("run"));
    free_model(&m);
}

/* A run's config.json that was edited: other extents than the checkpoint's, or none that work. */
static void test_edited_runs(void **unused) {
    static const struct {
        const char *from, *to, *words;
    } cases[] = {
        {"\"experts\":\t3", "\"experts\":\t4",
         "its tensor 'layers.0.moe.experts.w1' is (3, 20, 22), here it is (4, 20, 22)"},
        {"\"router\":\t\"topk\"", "\"router\":\t\"none\"", "there is no such router"},
        {"\"head_dim\":\t6", "\"head_dim\":\t0,\"dim\":2", "stands twice"},
        {"\"top_k\":\t2", "\"top_k\":\t4096", "--top-k 4096 is above --experts 3"},
        {"\"layers\":\t2", "\"layers\":\t2000", "layers"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Model m = make_model("");
        write_run(&m, in_root("run"));
        char changed[16384];
        char *text = file_text(in_root("run/config.json"), NULL), *at = strstr(text, cases[i].from);
        assert_non_null(at);
        snprintf(changed, sizeof changed, "%.*s%s%s", (int)(at - text), text, cases[i].to, at + strlen(cases[i].from));
        put_file(in_root("run/config.json"), changed);
        refuse_import(in_root("run"), "", cases[i].words);
        free(text);
        free_model(&m);
        remove_tree(in_root("run"));
    }
}

/* Options that are each in range and together make no model; import_config itself refuses them. */
static void test_hostile_configurations(void **unused) {
    static const struct {
        const char *json, *words;
    } cases[] = {
        {"{\"dim\": 2, \"heads\": 4}", "--heads leave nothing of --dim"},
        {"{\"router\": \"dense\", \"top_k\": 4096, \"expert_dim\": 65536, \"chain_steps\": 16}", "too wide"},
        {"{\"router\": \"soft-batch\", \"experts\": 3, \"top_k\": 4096, \"batch\": 1048576}", "too many slots"},
        {"{\"router\": \"nobody\"}", "no such router"},
    };
    assert_int_equal(mkdir(in_root("hostile"), 0777), 0);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char error[1024] = "";
        Config source;
        put_file(in_root("hostile/config.json"), cases[i].json);
        assert_false(import_config(&source, in_root("hostile"), error, sizeof error));
        if (!strstr(error, cases[i].words) || strchr(error, '\n')) {
            fail_msg("'%s' does not say '%s'", error, cases[i].words);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_missing_and_extra),
        cmocka_unit_test(test_shapes),
        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_tied_head),
        cmocka_unit_test(test_files),
        cmocka_unit_test(test_index),
        cmocka_unit_test(test_other_models),
        cmocka_unit_test(test_upcycling),
        cmocka_unit_test(test_damaged_runs),
        cmocka_unit_test(test_edited_runs),
        cmocka_unit_test(test_hostile_configurations),
    };
    return cmocka_run_group_tests(tests, make_root, remove_root);
}
