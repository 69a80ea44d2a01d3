/* config.json of Hugging Face transformers: which architecture, and the file. The contract is hf_config.h.
 *
 * hf_architecture finds the first option that no architecture there has, with the way out. hf_config_write prints keys
 * in a fixed order and relies on no default of transformers where its versions or its classes differ: both versions'
 * names of a thing are written, and null where absence would mean something.
 *
 * Called by hf_export.c. Read next: hf_config_read.c, the way back; hf_tensors.c, for the weights.
 */
#include "hf_config.h"

#include <assert.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"

/* ---- which architecture ---- */

__attribute__((format(printf, 3, 4))) static bool refuse(char *error, size_t size, const char *format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(error, size, format, values);
    va_end(values);
    return false;
}

/* What neither Qwen3-MoE nor Mixtral has. */
static bool is_plain_mixture(const ModelConfig *model, char *error, size_t size) {
    if (model->objective != OBJECTIVE_LM) {
        return refuse(error, size, "--objective mlm: Qwen3-MoE and Mixtral predict the next token; use --objective lm");
    }
    if (!strcmp(model->router, "dense")) {
        return refuse(error, size,
                      "--router dense: only mixtures of experts can be written for transformers; use --router topk "
                      "(--upcycle makes one of a dense model)");
    }
    if (strcmp(model->router, "topk") != 0 && strcmp(model->router, "top1") != 0) {
        return refuse(error, size,
                      "--router %s: Qwen3-MoE and Mixtral choose the top-k of a softmax; use --router topk or top1",
                      model->router);
    }
    if (config_has_adapters(model)) {
        return refuse(
            error, size,
            "--perft and --lora: Qwen3-MoE and Mixtral have no adapters; export the run they were tuned from");
    }
    if (model->act != ACT_SWIGLU) {
        return refuse(error, size, "--act gelu: experts of Qwen3-MoE and Mixtral are SwiGLU; use --act swiglu");
    }
    if (model->shared_experts > 0) {
        return refuse(error, size,
                      "--shared-experts %d: Qwen3-MoE and Mixtral have no shared experts; use --shared-experts 0",
                      model->shared_experts);
    }
    if (model->capacity_factor > 0) {
        return refuse(error, size,
                      "--capacity-factor %g drops tokens, which no architecture of transformers does: start a run of "
                      "it without one, with --init-from and --capacity-factor 0",
                      model->capacity_factor);
    }
    const struct {
        const char *name;
        int value, plain;
    } chain[] = {{"chain-steps", model->chain_steps, 1},
                 {"chain-norm", model->chain_norm, 0},
                 {"chain-inner", model->chain_inner, 0},
                 {"chain-outer", model->chain_outer, 1}};
    for (size_t i = 0; i < sizeof chain / sizeof *chain; i++) {
        if (chain[i].value != chain[i].plain) {
            return refuse(error, size,
                          "--%s %d: Qwen3-MoE and Mixtral run a MoE layer once and add its result; use --%s %d",
                          chain[i].name, chain[i].value, chain[i].name, chain[i].plain);
        }
    }
    return true;
}

bool hf_architecture(const ModelConfig *model, HfArchitecture *architecture, char *error, size_t error_size) {
    if (!is_plain_mixture(model, error, error_size)) {
        return false;
    }
    if (!model->qk_norm) {
        const char *only = "with --qk-norm 0: the architecture without QK-norm is Mixtral, where";
        if (!strcmp(model->router, "top1")) {
            return refuse(error, error_size,
                          "--router top1 %s the weights of a token always sum to 1; use --router topk, or --qk-norm 1",
                          only);
        }
        if (!model->renorm) {
            return refuse(error, error_size,
                          "--renorm 0 %s the weights of a token always sum to 1; use --renorm 1, or --qk-norm 1", only);
        }
        if (model->moe_every > 1) {
            return refuse(error, error_size, "--moe-every %d %s every layer is MoE; use --moe-every 1, or --qk-norm 1",
                          model->moe_every, only);
        }
    }
    *architecture = model->qk_norm ? HF_QWEN3_MOE : HF_MIXTRAL;
    return true;
}

/* ---- writing ---- */

/* A JSON object that grows by a key at a time, laid out as transformers does. */
typedef struct {
    FILE *stream;
    char *text;
    size_t size;
    bool has_keys;
} Writer;

static void writer_open(Writer *writer) {
    *writer = (Writer){0};
    writer->stream = open_memstream(&writer->text, &writer->size);
    CHECK(writer->stream, "out of memory while writing config.json");
    fputc('{', writer->stream);
}

__attribute__((format(printf, 3, 4))) static void put(Writer *writer, const char *key, const char *format, ...) {
    fprintf(writer->stream, "%s\n  \"%s\": ", writer->has_keys ? "," : "", key);
    va_list values;
    va_start(values, format);
    vfprintf(writer->stream, format, values);
    va_end(values);
    writer->has_keys = true;
}

static char *writer_close(Writer *writer) {
    fputs("\n}\n", writer->stream);
    CHECK(fclose(writer->stream) == 0, "out of memory while writing config.json");
    return writer->text;
}

/* The fewest digits that give back the same bits, with a point or an exponent: transformers checks that a real number
 * was not written as a whole one. As Python prints it, so that its files and these can be compared as text. */
static void real_text(char *text, size_t size, double value) {
    int digits = 1;
    do {
        snprintf(text, size, "%.*e", digits - 1, value);
    } while (strtod(text, NULL) != value && ++digits <= 17);
    int exponent = atoi(strchr(text, 'e') + 1);
    if (exponent >= -4 && exponent < 16) {
        int decimals = digits - 1 - exponent;
        snprintf(text, size, "%.*f", decimals > 1 ? decimals : 1, value);
    }
}

static void put_real(Writer *writer, const char *key, double value) {
    char text[40];
    real_text(text, sizeof text, value);
    put(writer, key, "%s", text);
}

static void put_bool(Writer *writer, const char *key, bool value) {
    put(writer, key, "%s", value ? "true" : "false");
}

static void put_token(Writer *writer, const char *key, int id) {
    if (id < 0) {
        put(writer, key, "null"); /* absent would be the class's default: Mixtral's is 2 */
    } else {
        put(writer, key, "%d", id);
    }
}

static void put_experts(Writer *writer, const ModelConfig *model, HfArchitecture architecture) {
    put(writer, "num_experts_per_tok", "%d", model->top_k);
    put(writer, "num_local_experts", "%d", model->experts);
    if (architecture == HF_MIXTRAL) {
        put(writer, "intermediate_size", "%d", model->expert_dim);
        put_real(writer, "router_jitter_noise", 0);
    } else {
        put(writer, "num_experts", "%d", model->experts); /* version 4's name of num_local_experts */
        put(writer, "moe_intermediate_size", "%d", model->expert_dim);
        put(writer, "intermediate_size", "%d", config_dense_width(model));
        put(writer, "decoder_sparse_step", "%d", model->moe_every);
        put(writer, "mlp_only_layers", "[]");
        put_bool(writer, "norm_topk_prob", model->renorm);
    }
    put_bool(writer, "output_router_logits", false);
    put_real(writer, "router_aux_loss_coef", 0.001); /* of a later training there: its own default */
}

char *hf_config_write(const ModelConfig *model, HfArchitecture architecture, int end_of_text) {
    assert(architecture == HF_QWEN3_MOE || architecture == HF_MIXTRAL);
    bool mixtral = architecture == HF_MIXTRAL;
    char base[40];
    real_text(base, sizeof base, model->rope_base);
    Writer writer;
    writer_open(&writer);
    put(&writer, "architectures", "[\n    \"%s\"\n  ]", mixtral ? "MixtralForCausalLM" : "Qwen3MoeForCausalLM");
    put(&writer, "model_type", "\"%s\"", mixtral ? "mixtral" : "qwen3_moe");
    put(&writer, "vocab_size", "%d", model->vocab);
    put(&writer, "hidden_size", "%d", model->dim);
    put(&writer, "num_hidden_layers", "%d", model->layers);
    put(&writer, "num_attention_heads", "%d", model->heads);
    put(&writer, "num_key_value_heads", "%d", model->kv_heads);
    put(&writer, "head_dim", "%d", model->head_dim);
    put_experts(&writer, model, architecture);
    put(&writer, "hidden_act", "\"silu\"");
    put_real(&writer, "rms_norm_eps", model->norm_eps);
    put(&writer, "max_position_embeddings", "%d", model->seq);
    /* Version 4 reads the first and the third, version 5 the second. */
    put(&writer, "rope_theta", "%s", base);
    put(&writer, "rope_parameters", "{\n    \"rope_theta\": %s,\n    \"rope_type\": \"default\"\n  }", base);
    put(&writer, "rope_scaling", "null");
    if (!mixtral) {
        put_bool(&writer, "attention_bias", false);
        put_bool(&writer, "use_sliding_window", false);
    }
    put(&writer, "sliding_window", "null");
    put_real(&writer, "attention_dropout", 0);
    put_real(&writer, "initializer_range", 0.02);
    put_bool(&writer, "tie_word_embeddings", model->tie);
    put_bool(&writer, "use_cache", true);
    put_token(&writer, "bos_token_id", -1);
    put_token(&writer, "eos_token_id", end_of_text);
    put_token(&writer, "pad_token_id", -1);
    put(&writer, "dtype", "\"float32\"");
    put(&writer, "torch_dtype", "\"float32\""); /* version 4's name of dtype */
    return writer_close(&writer);
}

char *hf_generation_config_write(int end_of_text) {
    Writer writer;
    writer_open(&writer);
    put_bool(&writer, "_from_model_config", true);
    put_bool(&writer, "do_sample", false);
    if (end_of_text >= 0) {
        put_token(&writer, "eos_token_id", end_of_text);
    }
    return writer_close(&writer);
}
