/* config.json of Hugging Face transformers, read into the model's options. The contract is hf_config.h.
 *
 * hf_config_read, at the bottom, asks the parsed object for one key after the other; `find` is the only function that
 * looks at keys, set_text the only one that sets a number, through the option's own range. A key that changes what the
 * model computes is understood or refused. All others are passed over: transformers writes dozens that only its trainer
 * or its generator reads. An absent key is what transformers takes it for, or refused where its versions differ.
 *
 * Called by import.c. Read next: hf_config.c, the way out; hf_tensors.c, for the weights.
 */
#include "hf_config.h"

#include <assert.h>
#include <cjson/cJSON.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "options.h"

enum { LONGEST_JSON = 1 << 20 };

typedef struct {
    const char *model_type;
    HfArchitecture architecture;
    bool mixture, qk_norm;
    /* what transformers takes where the key is absent; 0: head_dim follows from others, there is no window */
    double rope_theta;
    int head_dim, sliding_window;
} Family;

static const Family FAMILIES[] = {
    {"qwen3_moe", HF_QWEN3_MOE, .mixture = true, .qk_norm = true, .rope_theta = 1e4},
    {"mixtral", HF_MIXTRAL, .mixture = true, .rope_theta = 1e6},
    {"qwen3", HF_QWEN3, .qk_norm = true, .rope_theta = 1e4, .head_dim = 128},
    {"llama", HF_LLAMA, .rope_theta = 1e4},
    {"mistral", HF_LLAMA, .rope_theta = 1e4, .sliding_window = 4096},
};

enum { FAMILY_COUNT = sizeof FAMILIES / sizeof *FAMILIES };

/* A config.json being read: where keys come from, where values go, and who hears of what is wrong. */
typedef struct {
    const cJSON *object;
    const Family *family;
    Config *config;
    char *error;
    size_t error_size;
} Source;

/* One line, whatever the text of the file that stands in it; false, to be returned. */
__attribute__((format(printf, 2, 3))) static bool refuse(Source *source, const char *format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(source->error, source->error_size, format, values);
    va_end(values);
    for (char *c = source->error; source->error_size > 0 && *c; c++) {
        *c = (unsigned char)*c < ' ' || *c == 0x7f ? '?' : *c;
    }
    return false;
}

enum { BOOLEAN = cJSON_True | cJSON_False, ANYTHING = 0xff };

/* The value of a key, NULL where it is absent or null. types: those of cJSON that it may have. False when it stands
 * twice (readers differ in which one they take) or has another type. */
static bool find(Source *source, const cJSON *object, const char *key, int types, const cJSON **value) {
    const cJSON *found = NULL;
    *value = NULL;
    for (const cJSON *item = object->child; item; item = item->next) {
        if (!strcmp(item->string, key)) {
            if (found) {
                return refuse(source, "\"%s\" stands twice", key);
            }
            found = item;
        }
    }
    if (!found || cJSON_IsNull(found)) {
        return true;
    }
    if (!(found->type & types)) {
        return refuse(source, "\"%s\" must be %s", key,
                      types == BOOLEAN        ? "true or false"
                      : types == cJSON_Number ? "a number"
                      : types == cJSON_String ? "a string"
                      : types == cJSON_Array  ? "an array"
                                              : "an object");
    }
    *value = found;
    return true;
}

static bool need(Source *source, const char *key, int types, const cJSON **value) {
    if (!find(source, source->object, key, types, value)) {
        return false;
    }
    return *value || refuse(source, "\"%s\" is missing", key);
}

/* A flag; false where it is absent, which is the default of all that are asked for here. */
static bool find_flag(Source *source, const char *key, bool *flag) {
    const cJSON *value;
    bool valid = find(source, source->object, key, BOOLEAN, &value);
    *flag = valid && cJSON_IsTrue(value);
    return valid;
}

/* A whole number above 0; 0 where it is absent. */
static bool find_whole(Source *source, const char *key, int *whole) {
    const cJSON *value;
    *whole = 0;
    if (!find(source, source->object, key, cJSON_Number, &value)) {
        return false;
    }
    if (value) {
        double number = value->valuedouble;
        if (!(number >= 1 && number <= INT_MAX && number == floor(number))) {
            return refuse(source, "\"%s\" is %g: it must be a whole number from 1 to %d", key, number, INT_MAX);
        }
        *whole = (int)number;
    }
    return true;
}

static bool need_whole(Source *source, const char *key, int *whole) {
    if (!find_whole(source, key, whole)) {
        return false;
    }
    return *whole > 0 || refuse(source, "\"%s\" is missing", key);
}

/* Through the option's own range, with the key in front of what the table says. */
static bool set_text(Source *source, const char *key, const char *option, const char *text) {
    char reason[512];
    int index = option_find(option);
    assert(index >= 0);
    return option_set(source->config, &option_table[index], text, reason, sizeof reason) ||
           refuse(source, "\"%s\": %s", key, reason);
}

static bool set_whole(Source *source, const char *key, const char *option, int value) {
    char text[16];
    snprintf(text, sizeof text, "%d", value);
    return set_text(source, key, option, text);
}

static bool set_real(Source *source, const char *key, const char *option, double value) {
    char text[40];
    if (!isfinite(value)) {
        return refuse(source, "\"%s\" is too large", key);
    }
    snprintf(text, sizeof text, "%.17g", value);
    return set_text(source, key, option, text);
}

static bool read_whole(Source *source, const char *key, const char *option) {
    int whole;
    return need_whole(source, key, &whole) && set_whole(source, key, option, whole);
}

static bool read_shape(Source *source) {
    if (!read_whole(source, "vocab_size", "vocab") || !read_whole(source, "hidden_size", "dim") ||
        !read_whole(source, "num_hidden_layers", "layers") || !read_whole(source, "num_attention_heads", "heads")) {
        return false;
    }
    const ModelConfig *model = &source->config->model;
    int kv_heads, head_dim, positions;
    bool tie;
    if (!find_whole(source, "num_key_value_heads", &kv_heads) || !find_whole(source, "head_dim", &head_dim) ||
        !need_whole(source, "max_position_embeddings", &positions) || !find_flag(source, "tie_word_embeddings", &tie)) {
        return false;
    }
    if (!kv_heads && strcmp(source->family->model_type, "llama") != 0) {
        return refuse(source, "\"num_key_value_heads\" is missing");
    }
    if (!head_dim) {
        head_dim = source->family->head_dim ? source->family->head_dim : model->dim / model->heads;
    }
    if (!head_dim) {
        return refuse(source, "\"hidden_size\" %d leaves nothing for each of \"num_attention_heads\" %d", model->dim,
                      model->heads);
    }
    /* No weight depends on the longest sequence, so a model made for longer ones loads all the same. */
    int longest = (int)option_table[option_find("seq")].max;
    source->config->model.tie = tie;
    source->config->model.qk_norm = source->family->qk_norm;
    return set_whole(source, "num_key_value_heads", "kv-heads", kv_heads ? kv_heads : model->heads) &&
           set_whole(source, "head_dim", "head-dim", head_dim) &&
           set_whole(source, "max_position_embeddings", "seq", positions < longest ? positions : longest);
}

/* The base in one of the three places where it may stand; *theta is what was found before, 0: nothing. */
static bool find_theta(Source *source, const cJSON *object, double *theta) {
    const cJSON *value;
    if (!find(source, object, "rope_theta", cJSON_Number, &value)) {
        return false;
    }
    if (value && *theta != 0 && value->valuedouble != *theta) {
        return refuse(source, "\"rope_theta\" is both %.17g and %.17g", *theta, value->valuedouble);
    }
    if (value) {
        *theta = value->valuedouble;
        return set_real(source, "rope_theta", "rope-base", *theta);
    }
    return true;
}

static bool find_whole_rotation(Source *source, const cJSON *object) {
    const cJSON *share;
    if (!find(source, object, "partial_rotary_factor", cJSON_Number, &share)) {
        return false;
    }
    return !share || share->valuedouble == 1 ||
           refuse(source, "\"partial_rotary_factor\" is %g: heads are rotated whole here", share->valuedouble);
}

/* An object that may hold the base and asks for no scaling. An unknown key is refused: it may be a kind of scaling, or
 * the name of a kind of layer with a base of its own. */
static bool read_rope_object(Source *source, const char *key, double *theta) {
    static const char *const known[] = {"rope_type", "type", "rope_theta", "partial_rotary_factor"};
    const cJSON *rope, *type;
    if (!find(source, source->object, key, cJSON_Object, &rope)) {
        return false;
    }
    if (!rope) {
        return true;
    }
    for (int i = 0; i < 2; i++) {
        if (!find(source, rope, known[i], cJSON_String, &type)) {
            return false;
        }
        if (type && strcmp(type->valuestring, "default") != 0) {
            return refuse(source,
                          "\"%s\" has \"%s\" \"%.60s\": only the unscaled rotary embedding, \"default\", is here", key,
                          known[i], type->valuestring);
        }
    }
    for (const cJSON *item = rope->child; item; item = item->next) {
        bool is_known = false;
        for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
            is_known = is_known || !strcmp(item->string, known[i]);
        }
        if (!is_known) {
            return refuse(source, "\"%s\" has \"%.60s\": only the unscaled rotary embedding is here", key,
                          item->string);
        }
    }
    return find_whole_rotation(source, rope) && find_theta(source, rope, theta);
}

static bool read_norm_and_rope(Source *source) {
    const cJSON *eps;
    double theta = 0;
    if (!need(source, "rms_norm_eps", cJSON_Number, &eps)) {
        return false;
    }
    return set_real(source, "rms_norm_eps", "norm-eps", eps->valuedouble) &&
           find_whole_rotation(source, source->object) && find_theta(source, source->object, &theta) &&
           read_rope_object(source, "rope_parameters", &theta) && read_rope_object(source, "rope_scaling", &theta) &&
           (theta != 0 || set_real(source, "rope_theta", "rope-base", source->family->rope_theta));
}

/* Mistral and Mixtral use the window when there is one, Qwen when use_sliding_window says so. A window that no sequence
 * outgrows is none. */
static bool has_full_attention(Source *source) {
    int window, positions;
    const cJSON *kinds;
    if (!find_whole(source, "sliding_window", &window) || !need_whole(source, "max_position_embeddings", &positions) ||
        !find(source, source->object, "layer_types", cJSON_Array, &kinds)) {
        return false;
    }
    if (!cJSON_GetObjectItemCaseSensitive(source->object, "sliding_window")) {
        window = source->family->sliding_window;
    }
    if (!source->family->qk_norm && window && window < positions) {
        return refuse(source,
                      "\"sliding_window\" %d below \"max_position_embeddings\" %d: attention here is over all "
                      "earlier tokens",
                      window, positions);
    }
    for (const cJSON *kind = kinds ? kinds->child : NULL; kind; kind = kind->next) {
        if (!cJSON_IsString(kind) || strcmp(kind->valuestring, "full_attention") != 0) {
            return refuse(source, "\"layer_types\" has \"%.60s\": attention here is over all earlier tokens",
                          cJSON_IsString(kind) ? kind->valuestring : "something else");
        }
    }
    return true;
}

/* Refuses what the families may have and this program does not compute. */
static bool is_computed_here(Source *source) {
    static const struct {
        const char *key;
        bool value; /* the one that is refused */
        const char *why;
    } FLAGS[] = {{"attention_bias", true, "there are no biases here"},
                 {"mlp_bias", true, "there are no biases here"},
                 {"use_sliding_window", true, "attention here is over all earlier tokens"},
                 {"is_causal", false, "a token here sees no later ones"}};
    const cJSON *value;
    for (size_t i = 0; i < sizeof FLAGS / sizeof *FLAGS; i++) {
        if (!find(source, source->object, FLAGS[i].key, BOOLEAN, &value)) {
            return false;
        }
        if (value && cJSON_IsTrue(value) == FLAGS[i].value) {
            return refuse(source, "\"%s\" is %s: %s", FLAGS[i].key, FLAGS[i].value ? "true" : "false", FLAGS[i].why);
        }
    }
    if (!find(source, source->object, "quantization_config", ANYTHING, &value)) {
        return false;
    }
    if (value) {
        return refuse(source, "\"quantization_config\": weights must be plain floating-point numbers");
    }
    if (!need(source, "hidden_act", cJSON_String, &value)) {
        return false;
    }
    if (strcmp(value->valuestring, "silu") != 0) {
        return refuse(source, "\"hidden_act\" is \"%.60s\": an MLP here is SwiGLU, \"silu\"", value->valuestring);
    }
    return has_full_attention(source);
}

/* Which layers of Qwen3-MoE are dense. One here is as wide as the experts that a token meets. */
static bool read_dense_layers(Source *source) {
    ModelConfig *model = &source->config->model;
    const cJSON *dense;
    int step, width;
    if (!find_whole(source, "decoder_sparse_step", &step) ||
        !find(source, source->object, "mlp_only_layers", cJSON_Array, &dense) ||
        !set_whole(source, "decoder_sparse_step", "moe-every", step ? step : 1)) {
        return false;
    }
    if (cJSON_GetArraySize(dense) > 0) {
        return refuse(source,
                      "\"mlp_only_layers\" has %d entries: which layers are dense follows from "
                      "\"decoder_sparse_step\" alone here",
                      cJSON_GetArraySize(dense));
    }
    if (model->moe_every == 1) {
        return true;
    }
    if (!need_whole(source, "intermediate_size", &width)) {
        return false;
    }
    return width == config_dense_width(model) ||
           refuse(source,
                  "\"intermediate_size\" is %d: a dense layer here has the width of a token's experts, "
                  "num_experts_per_tok * moe_intermediate_size = %d",
                  width, config_dense_width(model));
}

static bool read_experts(Source *source) {
    ModelConfig *model = &source->config->model;
    bool mixtral = source->family->architecture == HF_MIXTRAL, renorm;
    int experts, local;
    if (!find_whole(source, "num_experts", &experts) || !find_whole(source, "num_local_experts", &local) ||
        !find_flag(source, "norm_topk_prob", &renorm)) {
        return false;
    }
    if (!experts && !local) {
        return refuse(source, "both \"num_experts\" and \"num_local_experts\" are missing");
    }
    if (experts && local && experts != local) {
        return refuse(source, "\"num_experts\" is %d, but \"num_local_experts\" %d", experts, local);
    }
    if (!set_whole(source, "num_experts", "experts", experts ? experts : local) ||
        !read_whole(source, "num_experts_per_tok", "top-k") ||
        !read_whole(source, mixtral ? "intermediate_size" : "moe_intermediate_size", "expert-dim")) {
        return false;
    }
    model->renorm = mixtral || renorm;
    bool top1 = model->top_k == 1 && !model->renorm;
    return set_text(source, "num_experts_per_tok", "router", top1 ? "top1" : "topk") &&
           (mixtral || read_dense_layers(source));
}

/* One expert that every token meets. */
static bool read_mlp(Source *source) {
    source->config->model.experts = source->config->model.top_k = 1;
    return set_text(source, "model_type", "router", "dense") && read_whole(source, "intermediate_size", "expert-dim");
}

static bool read_model(Source *source) {
    const cJSON *model_type;
    if (!need(source, "model_type", cJSON_String, &model_type)) {
        return false;
    }
    for (int i = 0; i < FAMILY_COUNT; i++) {
        if (!strcmp(model_type->valuestring, FAMILIES[i].model_type)) {
            source->family = &FAMILIES[i];
        }
    }
    if (!source->family) {
        return refuse(source, "\"model_type\" is \"%.60s\": known are qwen3_moe, mixtral, qwen3, llama and mistral",
                      model_type->valuestring);
    }
    ModelConfig *model = &source->config->model;
    model->objective = OBJECTIVE_LM;
    model->act = ACT_SWIGLU;
    model->shared_experts = 0;
    model->capacity_factor = 0;
    model->moe_every = model->chain_steps = model->chain_outer = 1;
    model->chain_inner = model->chain_norm = 0;
    return is_computed_here(source) && read_shape(source) && read_norm_and_rope(source) &&
           (source->family->mixture ? read_experts(source) : read_mlp(source));
}

/* The whole text as one object, the caller's; NULL when it is none. */
static cJSON *parse(const char *json) {
    cJSON *object = strnlen(json, LONGEST_JSON + 1) <= LONGEST_JSON ? cJSON_ParseWithOpts(json, NULL, true) : NULL;
    if (!cJSON_IsObject(object)) {
        cJSON_Delete(object);
        return NULL;
    }
    return object;
}

bool hf_config_is(const char *json) {
    cJSON *object = parse(json);
    bool is = cJSON_GetObjectItemCaseSensitive(object, "model_type") != NULL;
    cJSON_Delete(object);
    return is;
}

bool hf_config_read(Config *config, HfArchitecture *architecture, const char *json, char *error, size_t error_size) {
    cJSON *object = parse(json);
    Config read = *config;
    Source source = {.object = object, .config = &read, .error = error, .error_size = error_size};
    bool valid = object ? read_model(&source)
                        : refuse(&source, "it is not one whole JSON object of at most %d bytes", LONGEST_JSON);
    if (valid) {
        *config = read;
        *architecture = source.family->architecture;
    }
    cJSON_Delete(object);
    return valid;
}
