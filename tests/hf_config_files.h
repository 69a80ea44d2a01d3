/* config.json files as versions 4 and 5 of Hugging Face transformers write them, and a way to change one key:
 *
 *     char *json = with_key(QWEN_MOE_4, "head_dim", "64");     // NULL: left out; the caller's
 */
#ifndef TESTS_HF_CONFIG_FILES_H
#define TESTS_HF_CONFIG_FILES_H

#include <cjson/cJSON.h>
#include <stdlib.h>

static const char QWEN_MOE_4[] =
    "{\n"
    "  \"architectures\": [\n    \"Qwen3MoeForCausalLM\"\n  ],\n"
    "  \"attention_bias\": false,\n  \"attention_dropout\": 0.0,\n  \"bos_token_id\": 151643,\n"
    "  \"decoder_sparse_step\": 1,\n  \"eos_token_id\": 151645,\n  \"head_dim\": 128,\n  \"hidden_act\": \"silu\",\n"
    "  \"hidden_size\": 2048,\n  \"initializer_range\": 0.02,\n  \"intermediate_size\": 6144,\n"
    "  \"max_position_embeddings\": 40960,\n  \"max_window_layers\": 48,\n  \"mlp_only_layers\": [],\n"
    "  \"model_type\": \"qwen3_moe\",\n  \"moe_intermediate_size\": 768,\n  \"norm_topk_prob\": true,\n"
    "  \"num_attention_heads\": 32,\n  \"num_experts\": 128,\n  \"num_experts_per_tok\": 8,\n"
    "  \"num_hidden_layers\": 48,\n  \"num_key_value_heads\": 4,\n  \"output_router_logits\": false,\n"
    "  \"rms_norm_eps\": 1e-06,\n  \"rope_scaling\": null,\n  \"rope_theta\": 1000000.0,\n"
    "  \"router_aux_loss_coef\": 0.001,\n  \"sliding_window\": null,\n  \"tie_word_embeddings\": false,\n"
    "  \"torch_dtype\": \"bfloat16\",\n  \"transformers_version\": \"4.51.0\",\n  \"use_cache\": true,\n"
    "  \"use_sliding_window\": false,\n  \"vocab_size\": 151936\n"
    "}\n";

static const char QWEN_MOE_5[] =
    "{\n"
    "  \"architectures\": [\n    \"Qwen3MoeForCausalLM\"\n  ],\n"
    "  \"attention_bias\": false,\n  \"attention_dropout\": 0.0,\n  \"bos_token_id\": 151643,\n"
    "  \"decoder_sparse_step\": 1,\n  \"dtype\": \"bfloat16\",\n  \"eos_token_id\": 151645,\n  \"head_dim\": 128,\n"
    "  \"hidden_act\": \"silu\",\n  \"hidden_size\": 2048,\n  \"initializer_range\": 0.02,\n"
    "  \"intermediate_size\": 6144,\n  \"max_position_embeddings\": 40960,\n  \"mlp_only_layers\": [],\n"
    "  \"model_type\": \"qwen3_moe\",\n  \"moe_intermediate_size\": 768,\n  \"norm_topk_prob\": true,\n"
    "  \"num_attention_heads\": 32,\n  \"num_experts_per_tok\": 8,\n  \"num_hidden_layers\": 48,\n"
    "  \"num_key_value_heads\": 4,\n  \"num_local_experts\": 128,\n  \"output_router_logits\": false,\n"
    "  \"pad_token_id\": null,\n  \"rms_norm_eps\": 1e-06,\n"
    "  \"rope_parameters\": {\n    \"rope_theta\": 1000000.0,\n    \"rope_type\": \"default\"\n  },\n"
    "  \"router_aux_loss_coef\": 0.001,\n  \"sliding_window\": null,\n  \"tie_word_embeddings\": false,\n"
    "  \"transformers_version\": \"5.0.0\",\n  \"use_cache\": true,\n  \"use_sliding_window\": false,\n"
    "  \"vocab_size\": 151936\n"
    "}\n";

static const char MIXTRAL_4[] =
    "{\n"
    "  \"architectures\": [\n    \"MixtralForCausalLM\"\n  ],\n"
    "  \"attention_dropout\": 0.0,\n  \"bos_token_id\": 1,\n  \"eos_token_id\": 2,\n  \"hidden_act\": \"silu\",\n"
    "  \"hidden_size\": 4096,\n  \"initializer_range\": 0.02,\n  \"intermediate_size\": 14336,\n"
    "  \"max_position_embeddings\": 32768,\n  \"model_type\": \"mixtral\",\n  \"num_attention_heads\": 32,\n"
    "  \"num_experts_per_tok\": 2,\n  \"num_hidden_layers\": 32,\n  \"num_key_value_heads\": 8,\n"
    "  \"num_local_experts\": 8,\n  \"output_router_logits\": false,\n  \"rms_norm_eps\": 1e-05,\n"
    "  \"rope_theta\": 1000000.0,\n  \"router_aux_loss_coef\": 0.02,\n  \"sliding_window\": null,\n"
    "  \"tie_word_embeddings\": false,\n  \"torch_dtype\": \"bfloat16\",\n"
    "  \"transformers_version\": \"4.36.0.dev0\",\n  \"use_cache\": true,\n  \"vocab_size\": 32000\n"
    "}\n";

static const char QWEN_4[] =
    "{\n"
    "  \"architectures\": [\n    \"Qwen3ForCausalLM\"\n  ],\n"
    "  \"attention_bias\": false,\n  \"attention_dropout\": 0.0,\n  \"bos_token_id\": 151643,\n"
    "  \"eos_token_id\": 151645,\n  \"head_dim\": 128,\n  \"hidden_act\": \"silu\",\n  \"hidden_size\": 1024,\n"
    "  \"initializer_range\": 0.02,\n  \"intermediate_size\": 3072,\n  \"max_position_embeddings\": 40960,\n"
    "  \"max_window_layers\": 28,\n  \"model_type\": \"qwen3\",\n  \"num_attention_heads\": 16,\n"
    "  \"num_hidden_layers\": 28,\n  \"num_key_value_heads\": 8,\n  \"rms_norm_eps\": 1e-06,\n"
    "  \"rope_scaling\": null,\n  \"rope_theta\": 1000000,\n  \"sliding_window\": null,\n"
    "  \"tie_word_embeddings\": true,\n  \"torch_dtype\": \"bfloat16\",\n  \"transformers_version\": \"4.51.0\",\n"
    "  \"use_cache\": true,\n  \"use_sliding_window\": false,\n  \"vocab_size\": 151936\n"
    "}\n";

static const char LLAMA_4[] =
    "{\n"
    "  \"architectures\": [\n    \"LlamaForCausalLM\"\n  ],\n"
    "  \"attention_bias\": false,\n  \"bos_token_id\": 1,\n  \"eos_token_id\": 2,\n  \"hidden_act\": \"silu\",\n"
    "  \"hidden_size\": 2048,\n  \"initializer_range\": 0.02,\n  \"intermediate_size\": 5632,\n"
    "  \"max_position_embeddings\": 2048,\n  \"model_type\": \"llama\",\n  \"num_attention_heads\": 32,\n"
    "  \"num_hidden_layers\": 22,\n  \"num_key_value_heads\": 4,\n  \"pretraining_tp\": 1,\n"
    "  \"rms_norm_eps\": 1e-05,\n  \"rope_scaling\": null,\n  \"rope_theta\": 10000.0,\n"
    "  \"tie_word_embeddings\": false,\n  \"torch_dtype\": \"float32\",\n  \"transformers_version\": \"4.35.0\",\n"
    "  \"use_cache\": true,\n  \"vocab_size\": 32000\n"
    "}\n";

static const char MISTRAL_4[] =
    "{\n"
    "  \"architectures\": [\n    \"MistralForCausalLM\"\n  ],\n"
    "  \"attention_dropout\": 0.0,\n  \"bos_token_id\": 1,\n  \"eos_token_id\": 2,\n  \"hidden_act\": \"silu\",\n"
    "  \"hidden_size\": 4096,\n  \"initializer_range\": 0.02,\n  \"intermediate_size\": 14336,\n"
    "  \"max_position_embeddings\": 32768,\n  \"model_type\": \"mistral\",\n  \"num_attention_heads\": 32,\n"
    "  \"num_hidden_layers\": 32,\n  \"num_key_value_heads\": 8,\n  \"rms_norm_eps\": 1e-05,\n"
    "  \"rope_theta\": 1000000.0,\n  \"sliding_window\": null,\n  \"tie_word_embeddings\": false,\n"
    "  \"torch_dtype\": \"bfloat16\",\n  \"transformers_version\": \"4.42.0.dev0\",\n  \"use_cache\": true,\n"
    "  \"vocab_size\": 32768\n"
    "}\n";

static inline char *with_key(const char *json, const char *key, const char *value) {
    cJSON *object = cJSON_Parse(json);
    cJSON_DeleteItemFromObjectCaseSensitive(object, key);
    if (value) {
        cJSON_AddRawToObject(object, key, value);
    }
    char *text = cJSON_Print(object);
    cJSON_Delete(object);
    return text;
}

#endif
