/* Which config.json of Hugging Face transformers are refused: what this program does not compute, keys that are
 * missing, doubled or of another type, values out of range, and text that is cut, nested, changed or no JSON at all.
 * Each with one line that names the key, and nothing changed. What is read is in test_hf_config.c.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <cjson/cJSON.h>
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/random.h"
#include "../model/hf_config.h"
#include "hf_config_files.h"

static void assert_refused(const char *what, const char *json, const char *words) {
    Config config, before;
    HfArchitecture architecture = (HfArchitecture)99;
    char error[512] = "";
    config_defaults(&config);
    before = config;
    if (hf_config_read(&config, &architecture, json, error, sizeof error)) {
        fail_msg("%s: accepted", what);
    }
    if (!strstr(error, words) || !error[0]) {
        fail_msg("%s: expected \"%s\" in \"%s\"", what, words, error);
    }
    for (const char *c = error; *c; c++) {
        assert_false(iscntrl((unsigned char)*c));
    }
    assert_memory_equal(&config, &before, sizeof config);
    assert_int_equal(architecture, 99);
}

static void assert_key_refused(const char *file, const char *key, const char *value, const char *words) {
    char what[256];
    snprintf(what, sizeof what, "\"%s\" %.150s", key, value ? value : "left out");
    char *json = with_key(file, key, value);
    assert_refused(what, json, words);
    free(json);
}

static const struct {
    const char *file, *key, *value, *words;
} REFUSALS[] = {
    /* features */
    {QWEN_MOE_4, "attention_bias", "true", "\"attention_bias\" is true: there are no biases here"},
    {LLAMA_4, "mlp_bias", "true", "\"mlp_bias\" is true: there are no biases here"},
    {QWEN_MOE_4, "use_sliding_window", "true", "\"use_sliding_window\" is true"},
    {QWEN_4, "use_sliding_window", "true", "\"use_sliding_window\" is true"},
    {QWEN_4, "is_causal", "false", "\"is_causal\" is false"},
    {MISTRAL_4, "sliding_window", "4096", "\"sliding_window\" 4096 below \"max_position_embeddings\" 32768"},
    {MISTRAL_4, "sliding_window", "32767", "\"sliding_window\" 32767"},
    {MISTRAL_4, "sliding_window", NULL, "\"sliding_window\" 4096"}, /* what transformers takes */
    {MIXTRAL_4, "sliding_window", "4096", "\"sliding_window\" 4096"},
    {QWEN_4, "layer_types", "[\"full_attention\", \"sliding_attention\"]", "\"layer_types\" has \"sliding_attention\""},
    {QWEN_4, "layer_types", "[1]", "\"layer_types\""},
    {LLAMA_4, "hidden_act", "\"gelu\"", "\"hidden_act\" is \"gelu\""},
    {QWEN_MOE_5, "quantization_config", "{\"quant_method\": \"fp8\"}", "\"quantization_config\""},
    {QWEN_MOE_5, "quantization_config", "\"fp8\"", "\"quantization_config\""},
    {LLAMA_4, "partial_rotary_factor", "0.5", "\"partial_rotary_factor\" is 0.5"},
    {QWEN_MOE_4, "mlp_only_layers", "[0]", "\"mlp_only_layers\" has 1 entries"},
    {QWEN_MOE_4, "mlp_only_layers", "[0, 3, 5]", "\"mlp_only_layers\" has 3 entries"},
    /* the rotary embedding */
    {LLAMA_4, "rope_scaling", "{\"type\": \"linear\", \"factor\": 2.0}", "\"rope_scaling\" has \"type\" \"linear\""},
    {LLAMA_4, "rope_scaling", "{\"rope_type\": \"llama3\", \"factor\": 8.0}", "\"rope_type\" \"llama3\""},
    {QWEN_4, "rope_scaling", "{\"rope_type\": \"default\", \"type\": \"yarn\"}", "\"type\" \"yarn\""},
    {LLAMA_4, "rope_scaling", "{\"factor\": 2.0}", "\"rope_scaling\" has \"factor\""},
    {QWEN_MOE_5, "rope_parameters", "{\"rope_theta\": 1e6, \"rope_type\": \"yarn\"}", "\"rope_parameters\" has"},
    {QWEN_MOE_5, "rope_parameters", "{\"full_attention\": {\"rope_theta\": 1e6}}", "\"full_attention\""},
    {QWEN_MOE_5, "rope_parameters", "{\"partial_rotary_factor\": 0.25}", "\"partial_rotary_factor\" is 0.25"},
    {QWEN_MOE_5, "rope_parameters", "{\"rope_type\": 1}", "\"rope_type\" must be a string"},
    {QWEN_MOE_5, "rope_parameters", "{\"rope_theta\": \"1e6\"}", "\"rope_theta\" must be a number"},
    {QWEN_MOE_5, "rope_parameters", "{\"rope_theta\": 1e6, \"rope_theta\": 1e6}", "\"rope_theta\" stands twice"},
    {QWEN_MOE_5, "rope_parameters", "{\"rope_type\": \"default\", \"rope_type\": \"yarn\"}",
     "\"rope_type\" stands twice"},
    {QWEN_MOE_5, "rope_theta", "10000.0", "\"rope_theta\" is both 10000 and 1000000"},
    {QWEN_MOE_4, "rope_scaling", "{\"rope_theta\": 5e5}", "\"rope_theta\" is both 1000000 and 500000"},
    {QWEN_MOE_4, "rope_scaling", "[]", "\"rope_scaling\" must be an object"},
    {QWEN_MOE_4, "rope_parameters", "\"default\"", "\"rope_parameters\" must be an object"},
    /* experts */
    {QWEN_MOE_4, "num_local_experts", "64", "\"num_experts\" is 128, but \"num_local_experts\" 64"},
    {QWEN_MOE_4, "num_experts", NULL, "both \"num_experts\" and \"num_local_experts\" are missing"},
    {MIXTRAL_4, "num_local_experts", NULL, "both \"num_experts\" and \"num_local_experts\" are missing"},
    {MIXTRAL_4, "num_local_experts", "4097", "\"num_experts\": --experts 4097 is out of range: it goes from 1 to 4096"},
    /* which model */
    {QWEN_4, "model_type", "\"qwen2_moe\"",
     "\"model_type\" is \"qwen2_moe\": known are qwen3_moe, mixtral, qwen3, llama and mistral"},
    {QWEN_4, "model_type", "\"Qwen3\"", "\"model_type\" is \"Qwen3\""},
    {QWEN_4, "model_type", "\"\"", "\"model_type\" is \"\""},
    {QWEN_4, "model_type", "\"a\\nb\\u001bc\\u007f\"", "\"model_type\" is \"a?b?c?\""},
    /* ranges */
    {QWEN_4, "num_hidden_layers", "1025",
     "\"num_hidden_layers\": --layers 1025 is out of range: it goes from 1 to 1024"},
    {QWEN_4, "hidden_size", "1", "\"hidden_size\": --dim 1 is out of range"},
    {QWEN_4, "hidden_size", "65537", "\"hidden_size\": --dim 65537 is out of range"},
    {QWEN_4, "head_dim", "513", "\"head_dim\": --head-dim 513 is out of range"},
    {QWEN_4, "max_position_embeddings", "1", "\"max_position_embeddings\": --seq 1 is out of range"},
    {QWEN_4, "vocab_size", "1048577", "\"vocab_size\": --vocab 1048577 is out of range"},
    {QWEN_4, "intermediate_size", "65537", "\"intermediate_size\": --expert-dim 65537 is out of range"},
    {QWEN_MOE_4, "decoder_sparse_step", "1025", "\"decoder_sparse_step\": --moe-every 1025 is out of range"},
    {QWEN_4, "rope_theta", "0", "\"rope_theta\": --rope-base 0 is out of range"},
    {QWEN_4, "rope_theta", "1e10", "\"rope_theta\": --rope-base 10000000000 is out of range"},
    {QWEN_4, "rope_theta", "1e999", "\"rope_theta\" is too large"},
    {QWEN_4, "rope_theta", "-10000", "\"rope_theta\": --rope-base -10000 is out of range"},
    {QWEN_4, "rms_norm_eps", "0", "\"rms_norm_eps\": --norm-eps 0 is out of range"},
    {QWEN_4, "rms_norm_eps", "-1e-6", "\"rms_norm_eps\": --norm-eps"},
    {QWEN_4, "rms_norm_eps", "2", "\"rms_norm_eps\": --norm-eps 2 is out of range"},
};

static void test_each_refusal(void **unused) {
    for (size_t i = 0; i < sizeof REFUSALS / sizeof *REFUSALS; i++) {
        assert_key_refused(REFUSALS[i].file, REFUSALS[i].key, REFUSALS[i].value, REFUSALS[i].words);
    }
}

/* Dense layers are read only where they are as wide as the experts that a token meets. */
static void test_width_of_dense_layers(void **unused) {
    char *sparse = with_key(QWEN_MOE_4, "decoder_sparse_step", "2");
    assert_key_refused(sparse, "intermediate_size", "6000",
                       "\"intermediate_size\" is 6000: a dense layer here has the width of a token's experts, "
                       "num_experts_per_tok * moe_intermediate_size = 6144");
    assert_key_refused(sparse, "intermediate_size", NULL, "\"intermediate_size\" is missing");
    free(sparse);
}

static void test_heads_of_nothing(void **unused) {
    char *narrow = with_key(LLAMA_4, "hidden_size", "16");
    assert_refused("hidden_size 16", narrow,
                   "\"hidden_size\" 16 leaves nothing for each of \"num_attention_heads\" 32");
    free(narrow);
}

/* ---- every key ---- */

static const struct {
    const char *key;
    int types;     /* what it may be, of cJSON */
    bool required; /* in QWEN_MOE_4 */
} KEYS[] = {
    {"model_type", cJSON_String, true},
    {"hidden_act", cJSON_String, true},
    {"vocab_size", cJSON_Number, true},
    {"hidden_size", cJSON_Number, true},
    {"num_hidden_layers", cJSON_Number, true},
    {"num_attention_heads", cJSON_Number, true},
    {"num_key_value_heads", cJSON_Number, true},
    {"head_dim", cJSON_Number, false},
    {"max_position_embeddings", cJSON_Number, true},
    {"rms_norm_eps", cJSON_Number, true},
    {"rope_theta", cJSON_Number, false},
    {"rope_scaling", cJSON_Object, false},
    {"rope_parameters", cJSON_Object, false},
    {"partial_rotary_factor", cJSON_Number, false},
    {"tie_word_embeddings", cJSON_True, false},
    {"attention_bias", cJSON_True, false},
    {"mlp_bias", cJSON_True, false},
    {"is_causal", cJSON_True, false},
    {"use_sliding_window", cJSON_True, false},
    {"sliding_window", cJSON_Number, false},
    {"layer_types", cJSON_Array, false},
    {"num_experts", cJSON_Number, true},
    {"num_local_experts", cJSON_Number, false},
    {"num_experts_per_tok", cJSON_Number, true},
    {"moe_intermediate_size", cJSON_Number, true},
    {"decoder_sparse_step", cJSON_Number, false},
    {"mlp_only_layers", cJSON_Array, false},
    {"norm_topk_prob", cJSON_True, false},
};

enum { KEY_COUNT = sizeof KEYS / sizeof *KEYS };

static void test_missing_keys(void **unused) {
    for (int i = 0; i < KEY_COUNT; i++) {
        if (KEYS[i].required) {
            char *without = with_key(QWEN_MOE_4, KEYS[i].key, NULL), *null = with_key(QWEN_MOE_4, KEYS[i].key, "null");
            char words[80];
            snprintf(words, sizeof words, "\"%s\"", KEYS[i].key);
            assert_refused(KEYS[i].key, without, words);
            assert_refused(KEYS[i].key, without, "missing");
            assert_refused(KEYS[i].key, null, "missing");
            free(without);
            free(null);
        }
    }
    const char *const mixtral[] = {"intermediate_size", "num_key_value_heads", "num_experts_per_tok"};
    for (int i = 0; i < 3; i++) {
        assert_key_refused(MIXTRAL_4, mixtral[i], NULL, "missing");
    }
    assert_key_refused(LLAMA_4, "intermediate_size", NULL, "\"intermediate_size\" is missing");
}

static void test_wrong_types(void **unused) {
    static const struct {
        const char *value;
        int type;
    } values[] = {{"\"5\"", cJSON_String}, {"true", cJSON_True}, {"[]", cJSON_Array},
                  {"{}", cJSON_Object},    {"7", cJSON_Number},  {"\"silu\"", cJSON_String}};
    for (int i = 0; i < KEY_COUNT; i++) {
        for (size_t j = 0; j < sizeof values / sizeof *values; j++) {
            if (values[j].type != KEYS[i].types) {
                char words[80];
                snprintf(words, sizeof words, "\"%s\" must be", KEYS[i].key);
                assert_key_refused(QWEN_MOE_4, KEYS[i].key, values[j].value, words);
            }
        }
    }
}

static void test_numbers_that_count_nothing(void **unused) {
    static const char *const whole[] = {
        "vocab_size",          "hidden_size",       "num_hidden_layers",       "num_attention_heads",
        "num_key_value_heads", "head_dim",          "max_position_embeddings", "sliding_window",
        "num_experts",         "num_local_experts", "num_experts_per_tok",     "moe_intermediate_size",
        "decoder_sparse_step"};
    static const char *const values[] = {
        "0",    "-0",    "-1",    "0.5",   "2.5",    "7.0000000001",        "1e-300", "2147483648", "4294967297",
        "1e18", "-1e18", "1e300", "1e999", "-1e999", "18446744073709551617"};
    for (size_t i = 0; i < sizeof whole / sizeof *whole; i++) {
        for (size_t j = 0; j < sizeof values / sizeof *values; j++) {
            char words[80];
            snprintf(words, sizeof words, "\"%s\" is ", whole[i]);
            assert_key_refused(QWEN_MOE_4, whole[i], values[j], words);
        }
    }
}

/* Readers of JSON differ in which of two they take. */
static void test_doubled_keys(void **unused) {
    for (int i = 0; i < KEY_COUNT; i++) {
        cJSON *object = cJSON_Parse(QWEN_MOE_4);
        const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, KEYS[i].key);
        char *value = item ? cJSON_PrintUnformatted(item) : NULL;
        cJSON_AddRawToObject(object, KEYS[i].key, item ? value : "null");
        if (!item) {
            cJSON_AddRawToObject(object, KEYS[i].key, "null");
        }
        char *json = cJSON_Print(object), words[80];
        snprintf(words, sizeof words, "\"%s\" stands twice", KEYS[i].key);
        assert_refused(KEYS[i].key, json, words);
        free(json);
        free(value);
        cJSON_Delete(object);
    }
    assert_refused("escaped", "{\"model_type\": \"llama\", \"model\\u005ftype\": \"qwen3\"}",
                   "\"model_type\" stands twice");
}

/* ---- text ---- */

static void test_not_json(void **unused) {
    static const char *const texts[] = {"",
                                        " ",
                                        "null",
                                        "1",
                                        "\"model_type\"",
                                        "[]",
                                        "[{\"model_type\": \"llama\"}]",
                                        "{",
                                        "}",
                                        "{}{}",
                                        "{} x",
                                        "{\"model_type\"}",
                                        "{'model_type': 'llama'}",
                                        "\xff\xfe{",
                                        "{\"a\"",
                                        "{\"a\": NaN}",
                                        "{\"a\": 1,}x"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        assert_refused(texts[i], texts[i], "it is not one whole JSON object");
    }
    assert_refused("{}", "{}", "\"model_type\" is missing");
}

static void test_every_truncation(void **unused) {
    static const char *const files[] = {QWEN_MOE_4, QWEN_MOE_5, MIXTRAL_4, QWEN_4, LLAMA_4, MISTRAL_4};
    for (int f = 0; f < 6; f++) {
        size_t length = strrchr(files[f], '}') - files[f];
        for (size_t cut = 0; cut <= length; cut++) {
            char *text = strndup(files[f], cut); /* of just this size, so that a sanitizer sees one byte too far */
            assert_refused("truncated", text, "it is not one whole JSON object");
            assert_false(hf_config_is(text));
            free(text);
        }
    }
}

/* Any byte may be any other: what comes back is a model within the options' ranges, or one line. */
static void test_changed_bytes(void **unused) {
    char text[sizeof QWEN_MOE_5];
    int accepted = 0, refused = 0;
    for (size_t i = 0; i + 1 < sizeof text; i++) {
        for (int k = 0; k < 4; k++) {
            memcpy(text, QWEN_MOE_5, sizeof text);
            text[i] = "\"9 "[k % 3];
            if (k == 3) {
                text[i] = (char)(1 + random_bits(17, i) % 255);
            }
            Config config;
            HfArchitecture architecture;
            char error[512] = "";
            config_defaults(&config);
            if (hf_config_read(&config, &architecture, text, error, sizeof error)) {
                char *json = config_to_json(&config);
                assert_true(config_from_json(&config, json, error, sizeof error)); /* checks the ranges */
                free(json);
                accepted++;
            } else {
                assert_true(error[0] && !strchr(error, '\n'));
                refused++;
            }
        }
    }
    assert_true(accepted > 100 && refused > 1000);
}

static char *repeated(const char *begin, const char *middle, size_t times, const char *end) {
    size_t first = strlen(begin), each = strlen(middle);
    char *text = malloc(first + times * each + strlen(end) + 1);
    memcpy(text, begin, first);
    for (size_t i = 0; i < times; i++) {
        memcpy(text + first + i * each, middle, each);
    }
    strcpy(text + first + times * each, end);
    return text;
}

static void test_deep_nesting(void **unused) {
    static const char *const middles[] = {"[", "{\"a\":", "[{\"model_type\":"};
    for (int i = 0; i < 3; i++) {
        char *text = repeated("{\"model_type\": \"llama\", \"a\": ", middles[i], 60000, "");
        assert_refused("deep", text, "it is not one whole JSON object");
        assert_false(hf_config_is(text));
        free(text);
    }
}

static void test_size(void **unused) {
    const size_t limit = 1 << 20, length = strlen(QWEN_MOE_4);
    char *text = repeated(QWEN_MOE_4, " ", limit - length, "");
    Config config;
    HfArchitecture architecture;
    char error[512];
    config_defaults(&config);
    assert_true(hf_config_read(&config, &architecture, text, error, sizeof error));
    assert_true(hf_config_is(text));
    free(text);
    text = repeated(QWEN_MOE_4, " ", limit - length + 1, "");
    assert_refused("1 MiB and a byte", text, "it is not one whole JSON object of at most 1048576 bytes");
    assert_false(hf_config_is(text));
    free(text);
    text = repeated("{\"model_type\": \"", "x", limit - 100, "\"}");
    assert_refused("long model_type", text, "\"model_type\" is \"xxxx");
    free(text);
}

static void test_short_error_buffers(void **unused) {
    for (size_t size = 1; size <= 64; size++) {
        Config config;
        HfArchitecture architecture;
        char *error = malloc(size);
        config_defaults(&config);
        assert_false(hf_config_read(&config, &architecture, "{\"model_type\": \"gpt2\"}", error, size));
        assert_true(strlen(error) < size);
        free(error);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_each_refusal),        cmocka_unit_test(test_width_of_dense_layers),
        cmocka_unit_test(test_heads_of_nothing),    cmocka_unit_test(test_missing_keys),
        cmocka_unit_test(test_wrong_types),         cmocka_unit_test(test_numbers_that_count_nothing),
        cmocka_unit_test(test_doubled_keys),        cmocka_unit_test(test_not_json),
        cmocka_unit_test(test_every_truncation),    cmocka_unit_test(test_changed_bytes),
        cmocka_unit_test(test_deep_nesting),        cmocka_unit_test(test_size),
        cmocka_unit_test(test_short_error_buffers),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
