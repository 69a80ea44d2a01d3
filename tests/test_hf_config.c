/* config.json of Hugging Face transformers: the exact text that is written, that what was written reads back as the
 * same model, files as transformers itself writes them, and which options keep a model from being written. What is
 * refused when reading is in test_hf_config_refusals.c.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <cjson/cJSON.h>
#include <stdlib.h>

#include "../model/hf_config.h"
#include "hf_config_files.h"
#include "set_options.h"

/* The configuration of a command line, as config_finish leaves it. */
static void make(Config *config, const char *options) {
    config_defaults(config);
    set_options(config, options);
    config_finish(config);
}

/* A configuration in which nearly every option that a file decides has another value than any file here. */
static void make_other(Config *config) {
    config_defaults(config);
    set_options(config,
                "--objective mlm --layers 3 --dim 22 --heads 11 --kv-heads 11 --head-dim 46 --qk-norm 0 --seq 77 "
                "--vocab 78 --tie 1 --norm-eps 0.5 --rope-base 3 --router soft --experts 79 --top-k 17 --expert-dim 13 "
                "--shared-experts 3 --renorm auto --act gelu --moe-every 5 --chain-steps 2 --chain-inner 1 "
                "--chain-outer 0 --chain-norm 1 --capacity-factor 1.25 --layout padded --drop weight --slots 9");
}

static void assert_same_model(const Config *a, const Config *b, const char *what) {
    char value_a[OPTION_TEXT], value_b[OPTION_TEXT];
    for (int i = 0; i < option_count; i++) {
        if (option_in_model(&option_table[i]) && !option_equal(a, b, &option_table[i])) {
            option_print(a, &option_table[i], value_a, sizeof value_a);
            option_print(b, &option_table[i], value_b, sizeof value_b);
            fail_msg("%s: --%s is %s, expected %s", what, option_table[i].name, value_a, value_b);
        }
    }
}

/* ---- writing ---- */

static const char QWEN_WRITTEN[] =
    "{\n"
    "  \"architectures\": [\n"
    "    \"Qwen3MoeForCausalLM\"\n"
    "  ],\n"
    "  \"model_type\": \"qwen3_moe\",\n"
    "  \"vocab_size\": 257,\n"
    "  \"hidden_size\": 96,\n"
    "  \"num_hidden_layers\": 6,\n"
    "  \"num_attention_heads\": 4,\n"
    "  \"num_key_value_heads\": 2,\n"
    "  \"head_dim\": 32,\n"
    "  \"num_experts_per_tok\": 3,\n"
    "  \"num_local_experts\": 16,\n"
    "  \"num_experts\": 16,\n"
    "  \"moe_intermediate_size\": 40,\n"
    "  \"intermediate_size\": 120,\n"
    "  \"decoder_sparse_step\": 2,\n"
    "  \"mlp_only_layers\": [],\n"
    "  \"norm_topk_prob\": true,\n"
    "  \"output_router_logits\": false,\n"
    "  \"router_aux_loss_coef\": 0.001,\n"
    "  \"hidden_act\": \"silu\",\n"
    "  \"rms_norm_eps\": 1e-06,\n"
    "  \"max_position_embeddings\": 64,\n"
    "  \"rope_theta\": 10000.0,\n"
    "  \"rope_parameters\": {\n"
    "    \"rope_theta\": 10000.0,\n"
    "    \"rope_type\": \"default\"\n"
    "  },\n"
    "  \"rope_scaling\": null,\n"
    "  \"attention_bias\": false,\n"
    "  \"use_sliding_window\": false,\n"
    "  \"sliding_window\": null,\n"
    "  \"attention_dropout\": 0.0,\n"
    "  \"initializer_range\": 0.02,\n"
    "  \"tie_word_embeddings\": true,\n"
    "  \"use_cache\": true,\n"
    "  \"bos_token_id\": null,\n"
    "  \"eos_token_id\": 256,\n"
    "  \"pad_token_id\": null,\n"
    "  \"dtype\": \"float32\",\n"
    "  \"torch_dtype\": \"float32\"\n"
    "}\n";

static const char MIXTRAL_WRITTEN[] =
    "{\n"
    "  \"architectures\": [\n"
    "    \"MixtralForCausalLM\"\n"
    "  ],\n"
    "  \"model_type\": \"mixtral\",\n"
    "  \"vocab_size\": 256,\n"
    "  \"hidden_size\": 128,\n"
    "  \"num_hidden_layers\": 4,\n"
    "  \"num_attention_heads\": 4,\n"
    "  \"num_key_value_heads\": 4,\n"
    "  \"head_dim\": 32,\n"
    "  \"num_experts_per_tok\": 2,\n"
    "  \"num_local_experts\": 8,\n"
    "  \"intermediate_size\": 256,\n"
    "  \"router_jitter_noise\": 0.0,\n"
    "  \"output_router_logits\": false,\n"
    "  \"router_aux_loss_coef\": 0.001,\n"
    "  \"hidden_act\": \"silu\",\n"
    "  \"rms_norm_eps\": 1.5e-05,\n"
    "  \"max_position_embeddings\": 128,\n"
    "  \"rope_theta\": 1000000.0,\n"
    "  \"rope_parameters\": {\n"
    "    \"rope_theta\": 1000000.0,\n"
    "    \"rope_type\": \"default\"\n"
    "  },\n"
    "  \"rope_scaling\": null,\n"
    "  \"sliding_window\": null,\n"
    "  \"attention_dropout\": 0.0,\n"
    "  \"initializer_range\": 0.02,\n"
    "  \"tie_word_embeddings\": false,\n"
    "  \"use_cache\": true,\n"
    "  \"bos_token_id\": null,\n"
    "  \"eos_token_id\": null,\n"
    "  \"pad_token_id\": null,\n"
    "  \"dtype\": \"float32\",\n"
    "  \"torch_dtype\": \"float32\"\n"
    "}\n";

static void assert_written(const char *options, HfArchitecture expected, int end_of_text, const char *text) {
    Config config;
    char error[512];
    HfArchitecture architecture;
    make(&config, options);
    assert_true(hf_architecture(&config.model, &architecture, error, sizeof error));
    assert_int_equal(architecture, expected);
    char *json = hf_config_write(&config.model, architecture, end_of_text);
    assert_string_equal(json, text);
    free(json);
}

static void test_written_text(void **unused) {
    assert_written(
        "--vocab 257 --dim 96 --layers 6 --kv-heads 2 --head-dim 32 --top-k 3 --experts 16 --expert-dim 40 "
        "--moe-every 2 --seq 64 --tie 1",
        HF_QWEN3_MOE, 256, QWEN_WRITTEN);
    assert_written("--qk-norm 0 --rope-base 1000000 --norm-eps 1.5e-5", HF_MIXTRAL, -1, MIXTRAL_WRITTEN);
}

static void test_generation_config(void **unused) {
    char *with = hf_generation_config_write(50256), *without = hf_generation_config_write(-1);
    assert_string_equal(with,
                        "{\n  \"_from_model_config\": true,\n  \"do_sample\": false,\n  \"eos_token_id\": 50256\n}\n");
    assert_string_equal(without, "{\n  \"_from_model_config\": true,\n  \"do_sample\": false\n}\n");
    free(with);
    free(without);
    Config config;
    make(&config, "");
    char *first = hf_generation_config_write(0), *model = hf_config_write(&config.model, HF_QWEN3_MOE, 0);
    assert_non_null(strstr(first, "\"eos_token_id\": 0\n")); /* an id like any other */
    assert_non_null(strstr(model, "\"eos_token_id\": 0,\n"));
    free(first);
    free(model);
}

/* The text of a key's value, up to the comma; a static buffer. */
static const char *value_of(const char *json, const char *key) {
    static char value[64];
    char start[64];
    snprintf(start, sizeof start, "  \"%s\": ", key);
    const char *at = strstr(json, start);
    assert_non_null(at);
    snprintf(value, sizeof value, "%.*s", (int)strcspn(at + strlen(start), ",\n"), at + strlen(start));
    return value;
}

/* As Python's repr: a point or an exponent, the fewest digits that give back the bits. */
static void test_reals(void **unused) {
    static const struct {
        const char *eps, *eps_text, *base, *base_text;
    } CASES[] = {
        {"1e-6", "1e-06", "10000", "10000.0"},
        {"1e-5", "1e-05", "1000000", "1000000.0"},
        {"0.0001", "0.0001", "500000", "500000.0"},
        {"1e-12", "1e-12", "1e9", "1000000000.0"},
        {"1", "1.0", "1", "1.0"},
        {"0.1", "0.1", "10000.5", "10000.5"},
        {"0.30000000000000004", "0.30000000000000004", "123456789", "123456789.0"},
        {"2.5e-7", "2.5e-07", "3.3333333333333335", "3.3333333333333335"},
        {"1.2345678901234568e-10", "1.2345678901234568e-10", "99999.999999999985", "99999.99999999999"},
    };
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        Config config;
        char options[128];
        snprintf(options, sizeof options, "--norm-eps %s --rope-base %s", CASES[i].eps, CASES[i].base);
        make(&config, options);
        char *json = hf_config_write(&config.model, HF_QWEN3_MOE, -1);
        assert_string_equal(value_of(json, "rms_norm_eps"), CASES[i].eps_text);
        assert_string_equal(value_of(json, "rope_theta"), CASES[i].base_text);
        free(json);
    }
}

/* ---- there and back ---- */

static const char *const EXPRESSIBLE[] = {
    "",
    "--router topk --renorm 0",
    "--router top1",
    "--router top1 --experts 1",
    "--experts 64 --top-k 64 --expert-dim 1",
    "--experts 4096 --top-k 4096 --expert-dim 3",
    "--tie 1 --norm-eps 1e-5 --rope-base 500000",
    "--norm-eps 3.0000000000000004e-7 --rope-base 12345.678901234567",
    "--heads 8 --kv-heads 2 --head-dim 64",
    "--heads 3 --dim 96 --head-dim 6 --kv-heads 1",
    "--layers 6 --moe-every 3 --expert-dim 48",
    "--layers 4 --moe-every 4 --router top1 --expert-dim 512",
    "--moe-every 2 --top-k 3 --renorm 0",
    "--seq 32768 --batch 1 --grad-accum 1 --vocab 151936",
    "--seq 2 --vocab 2 --layers 1 --dim 2 --heads 1 --experts 2 --expert-dim 1",
    "--layout padded --drop slot --capacity-factor 0",
    "--qk-norm 0",
    "--qk-norm 0 --renorm 1 --experts 3 --top-k 3",
    "--qk-norm 0 --tie 1 --kv-heads 1 --rope-base 1000000 --norm-eps 1e-5",
    "--qk-norm 0 --dim 64 --heads 2 --head-dim 128 --layout block",
};

static void test_round_trip(void **unused) {
    for (size_t i = 0; i < sizeof EXPRESSIBLE / sizeof *EXPRESSIBLE; i++) {
        Config written, read;
        char error[512] = "";
        HfArchitecture architecture, again;
        make(&written, EXPRESSIBLE[i]);
        if (!hf_architecture(&written.model, &architecture, error, sizeof error)) {
            fail_msg("%s: %s", EXPRESSIBLE[i], error);
        }
        assert_int_equal(architecture, written.model.qk_norm ? HF_QWEN3_MOE : HF_MIXTRAL);
        char *json = hf_config_write(&written.model, architecture, 7);
        assert_true(hf_config_is(json));
        make_other(&read);
        int layout = read.model.layout, drop = read.model.drop, slots = read.model.slots;
        if (!hf_config_read(&read, &again, json, error, sizeof error)) {
            fail_msg("%s: %s", EXPRESSIBLE[i], error);
        }
        free(json);
        assert_int_equal(again, architecture);
        /* how it is computed is not the file's to say */
        assert_int_equal(read.model.layout, layout);
        assert_int_equal(read.model.drop, drop);
        assert_int_equal(read.model.slots, slots);
        read.model.layout = written.model.layout;
        read.model.drop = written.model.drop;
        read.model.slots = written.model.slots;
        assert_same_model(&read, &written, EXPRESSIBLE[i]);
        assert_true(hf_architecture(&read.model, &again, error, sizeof error));
        assert_int_equal(again, architecture);
    }
}

/* Without weights that sum to 1, one expert per token is top1, whatever it was called. */
static void test_topk_of_one(void **unused) {
    Config config;
    char error[512];
    HfArchitecture architecture;
    make(&config, "--router topk --top-k 1");
    assert_true(hf_architecture(&config.model, &architecture, error, sizeof error));
    char *json = hf_config_write(&config.model, architecture, -1);
    assert_string_equal(value_of(json, "norm_topk_prob"), "false");
    assert_true(hf_config_read(&config, &architecture, json, error, sizeof error));
    free(json);
    assert_string_equal(config.model.router, "top1");
    assert_int_equal(config.model.top_k, 1);
    assert_int_equal(config.model.renorm, 0);
}

/* ---- files of transformers ---- */

#define PLAIN "--chain-steps 1 --chain-inner 0 --chain-outer 1 "

static const struct {
    const char *what, *json;
    HfArchitecture architecture;
    const char *options;
} FILES[] = {
    {"Qwen3-30B-A3B, version 4", QWEN_MOE_4, HF_QWEN3_MOE,
     PLAIN "--layers 48 --dim 2048 --heads 32 --kv-heads 4 --head-dim 128 --qk-norm 1 --seq 32768 --vocab 151936 "
           "--norm-eps 1e-6 --rope-base 1000000 --router topk --experts 128 --top-k 8 --expert-dim 768 --renorm 1"},
    {"Qwen3-30B-A3B, version 5", QWEN_MOE_5, HF_QWEN3_MOE,
     PLAIN "--layers 48 --dim 2048 --heads 32 --kv-heads 4 --head-dim 128 --qk-norm 1 --seq 32768 --vocab 151936 "
           "--norm-eps 1e-6 --rope-base 1000000 --router topk --experts 128 --top-k 8 --expert-dim 768 --renorm 1"},
    {"Mixtral-8x7B, version 4", MIXTRAL_4, HF_MIXTRAL,
     PLAIN "--layers 32 --dim 4096 --heads 32 --kv-heads 8 --head-dim 128 --qk-norm 0 --seq 32768 --vocab 32000 "
           "--norm-eps 1e-5 --rope-base 1000000 --router topk --experts 8 --top-k 2 --expert-dim 14336 --renorm 1"},
    {"Qwen3-0.6B", QWEN_4, HF_QWEN3,
     PLAIN "--layers 28 --dim 1024 --heads 16 --kv-heads 8 --head-dim 128 --qk-norm 1 --seq 32768 --vocab 151936 "
           "--tie 1 --norm-eps 1e-6 --rope-base 1000000 --router dense --experts 1 --top-k 1 --expert-dim 3072"},
    {"TinyLlama-1.1B", LLAMA_4, HF_LLAMA,
     PLAIN "--layers 22 --dim 2048 --heads 32 --kv-heads 4 --head-dim 64 --qk-norm 0 --seq 2048 --vocab 32000 "
           "--norm-eps 1e-5 --rope-base 10000 --router dense --experts 1 --top-k 1 --expert-dim 5632"},
    {"Mistral-7B-v0.3", MISTRAL_4, HF_LLAMA,
     PLAIN "--layers 32 --dim 4096 --heads 32 --kv-heads 8 --head-dim 128 --qk-norm 0 --seq 32768 --vocab 32768 "
           "--norm-eps 1e-5 --rope-base 1000000 --router dense --experts 1 --top-k 1 --expert-dim 14336"},
};

static void assert_read(const char *what, const char *json, HfArchitecture architecture, const char *options) {
    Config read, expected;
    char error[512] = "";
    HfArchitecture found;
    config_defaults(&read);
    config_defaults(&expected);
    set_options(&expected, options);
    assert_true(hf_config_is(json));
    if (!hf_config_read(&read, &found, json, error, sizeof error)) {
        fail_msg("%s: %s", what, error);
    }
    assert_int_equal(found, architecture);
    assert_same_model(&read, &expected, what);
    assert_memory_equal(&read.train, &expected.train, sizeof read.train);
    config_finish(&read); /* nothing stands in the way of training it */
}

static void test_files_of_transformers(void **unused) {
    for (size_t i = 0; i < sizeof FILES / sizeof *FILES; i++) {
        assert_read(FILES[i].what, FILES[i].json, FILES[i].architecture, FILES[i].options);
    }
}

/* A file with one key changed (value NULL: left out), and the options that it then reads as beside the file's own. */
static const struct {
    int file;
    const char *key, *value, *options;
} VARIANTS[] = {
    /* absent or null: what transformers takes */
    {0, "rope_theta", NULL, "--rope-base 10000"},
    {1, "rope_parameters", NULL, "--rope-base 10000"},
    {1, "rope_parameters", "{}", "--rope-base 10000"},
    {1, "rope_parameters", "{\"rope_type\": \"default\"}", "--rope-base 10000"},
    {2, "rope_theta", NULL, "--rope-base 1000000"},
    {3, "rope_theta", NULL, "--rope-base 10000"},
    {4, "rope_theta", NULL, ""},
    {5, "rope_theta", NULL, "--rope-base 10000"},
    {0, "norm_topk_prob", NULL, "--renorm 0"},
    {0, "tie_word_embeddings", NULL, ""},
    {3, "tie_word_embeddings", NULL, "--tie 0"},
    {0, "head_dim", NULL, "--head-dim 64"},
    {2, "head_dim", "null", ""},
    {3, "head_dim", NULL, "--head-dim 128"}, /* of this class a constant */
    {4, "num_key_value_heads", NULL, "--kv-heads 32"},
    {4, "num_key_value_heads", "null", "--kv-heads 32"},
    {0, "decoder_sparse_step", NULL, ""},
    {0, "mlp_only_layers", "null", ""},
    {0, "mlp_only_layers", NULL, ""},
    {0, "intermediate_size", NULL, ""}, /* of dense layers, which there are none */
    {2, "sliding_window", NULL, ""},
    {0, "sliding_window", "4096", ""}, /* not in use */
    /* the rotary base in other places */
    {0, "rope_parameters", "{\"rope_theta\": 1000000.0, \"rope_type\": \"default\"}", ""},
    {0, "rope_scaling", "{\"type\": \"default\"}", ""},
    {0, "rope_scaling", "{\"rope_type\": \"default\", \"rope_theta\": 1e6, \"partial_rotary_factor\": 1.0}", ""},
    {1, "rope_parameters", "{\"rope_theta\": 5e5}", "--rope-base 500000"},
    {1, "rope_theta", "1000000", ""},
    {0, "partial_rotary_factor", "1", ""},
    /* the rest */
    {0, "num_local_experts", "128", ""},
    {2, "num_experts", "8", ""},
    {0, "num_experts_per_tok", "1", "--top-k 1"}, /* renormalised: not top1 */
    {2, "num_experts_per_tok", "1", "--top-k 1"},
    {0, "decoder_sparse_step", "2", "--moe-every 2"},
    {0, "intermediate_size", "6145", ""},
    {0, "layer_types", "[\"full_attention\", \"full_attention\"]", ""},
    {0, "quantization_config", "null", ""},
    {0, "is_causal", "true", ""},
    {2, "sliding_window", "32768", ""}, /* no sequence outgrows it */
    {5, "sliding_window", "40000", ""},
    {0, "max_position_embeddings", "262144", ""},
    {0, "max_position_embeddings", "2", "--seq 2"},
    {0, "vocab_size", "1048576", "--vocab 1048576"},
    {0, "rms_norm_eps", "1e-12", "--norm-eps 1e-12"},
    {0, "something_else", "{\"a\": [1, {\"b\": null}]}", ""},
};

static void test_variants_of_files(void **unused) {
    for (size_t i = 0; i < sizeof VARIANTS / sizeof *VARIANTS; i++) {
        char options[512], what[128];
        Config read, expected;
        char error[512] = "";
        HfArchitecture found;
        snprintf(options, sizeof options, "%s %s", FILES[VARIANTS[i].file].options, VARIANTS[i].options);
        snprintf(what, sizeof what, "%s with \"%s\" %s", FILES[VARIANTS[i].file].what, VARIANTS[i].key,
                 VARIANTS[i].value ? VARIANTS[i].value : "left out");
        char *json = with_key(FILES[VARIANTS[i].file].json, VARIANTS[i].key, VARIANTS[i].value);
        config_defaults(&read);
        config_defaults(&expected);
        set_options(&expected, options);
        if (!hf_config_read(&read, &found, json, error, sizeof error)) {
            fail_msg("%s: %s", what, error);
        }
        assert_same_model(&read, &expected, what);
        free(json);
    }
}

static void test_which_json_it_is(void **unused) {
    Config config;
    make(&config, "");
    char *run = config_to_json(&config);
    assert_false(hf_config_is(run));
    free(run);
    const char *const others[] = {"",
                                  "{",
                                  "[]",
                                  "\"model_type\"",
                                  "{}",
                                  "{\"model\": 1}",
                                  "{\"MODEL_TYPE\": \"llama\"}",
                                  "null",
                                  "{\"model_type\": 1"};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        assert_false(hf_config_is(others[i]));
    }
    assert_true(hf_config_is("{\"model_type\": \"gpt2\"}"));
}

/* ---- models that cannot be written ---- */

static const struct {
    const char *options, *words;
} INEXPRESSIBLE[] = {
    {"--objective mlm", "--objective mlm: Qwen3-MoE and Mixtral predict the next token; use --objective lm"},
    {"--router dense", "--router dense: only mixtures of experts can be written for transformers; use --router topk"},
    {"--router sigmoid", "--router sigmoid: Qwen3-MoE and Mixtral choose the top-k of a softmax; use --router topk"},
    {"--router noisy", "--router noisy:"},
    {"--router hash", "--router hash:"},
    {"--router random", "--router random:"},
    {"--router position", "--router position:"},
    {"--router forced", "--router forced:"},
    {"--router threshold", "--router threshold:"},
    {"--router expert-choice --allow-leak 1", "--router expert-choice:"},
    {"--router soft --objective mlm", "--objective mlm"},
    {"--router soft-batch --allow-leak 1", "--router soft-batch:"},
    {"--router coe", "--router coe:"},
    {"--act gelu", "--act gelu: experts of Qwen3-MoE and Mixtral are SwiGLU; use --act swiglu"},
    {"--perft e", "--perft and --lora: Qwen3-MoE and Mixtral have no adapters; export the run they were tuned from"},
    {"--lora attention", "--perft and --lora: "},
    {"--shared-experts 1", "--shared-experts 1: Qwen3-MoE and Mixtral have no shared experts; use --shared-experts 0"},
    {"--shared-experts 2 --qk-norm 0", "--shared-experts 2"},
    {"--capacity-factor 1.25",
     "--capacity-factor 1.25 drops tokens, which no architecture of transformers does: start a "
     "run of it without one, with --init-from and --capacity-factor 0"},
    {"--chain-steps 2",
     "--chain-steps 2: Qwen3-MoE and Mixtral run a MoE layer once and add its result; use "
     "--chain-steps 1"},
    {"--chain-norm 1", "--chain-norm 1:"},
    {"--chain-inner 1", "--chain-inner 1:"},
    {"--chain-inner 1 --chain-outer 0", "--chain-inner 1:"},
    {"--qk-norm 0 --renorm 0",
     "--renorm 0 with --qk-norm 0: the architecture without QK-norm is Mixtral, where the "
     "weights of a token always sum to 1; use --renorm 1, or --qk-norm 1"},
    {"--qk-norm 0 --router top1", "--router top1 with --qk-norm 0:"},
    {"--qk-norm 0 --moe-every 2",
     "--moe-every 2 with --qk-norm 0: the architecture without QK-norm is Mixtral, where "
     "every layer is MoE; use --moe-every 1, or --qk-norm 1"},
};

static void assert_not_written(const Config *config, const char *what, const char *words) {
    char error[512] = "";
    HfArchitecture architecture = (HfArchitecture)99;
    assert_false(hf_architecture(&config->model, &architecture, error, sizeof error));
    assert_int_equal(architecture, 99);
    if (strncmp(error, words, strlen(words)) != 0 || strchr(error, '\n')) {
        fail_msg("%s: expected a line that begins with \"%s\", got \"%s\"", what, words, error);
    }
}

static void test_what_cannot_be_written(void **unused) {
    Config config;
    for (size_t i = 0; i < sizeof INEXPRESSIBLE / sizeof *INEXPRESSIBLE; i++) {
        make(&config, INEXPRESSIBLE[i].options);
        assert_not_written(&config, INEXPRESSIBLE[i].options, INEXPRESSIBLE[i].words);
    }
    make(&config, ""); /* config_finish refuses it, as long as it refuses both links cut */
    config.model.chain_outer = 0;
    assert_not_written(&config, "chain_outer 0", "--chain-outer 0:");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_written_text),
        cmocka_unit_test(test_generation_config),
        cmocka_unit_test(test_reals),
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_topk_of_one),
        cmocka_unit_test(test_files_of_transformers),
        cmocka_unit_test(test_variants_of_files),
        cmocka_unit_test(test_which_json_it_is),
        cmocka_unit_test(test_what_cannot_be_written),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
