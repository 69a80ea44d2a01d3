/* Between ModelConfig and the config.json of Hugging Face transformers: which architecture there computes the same
 * function as a model here, and what it is called.
 *
 *     here                                               there
 *     --router topk or top1, --qk-norm 1                 qwen3_moe: norm_topk_prob is --renorm
 *     --router topk, --qk-norm 0, --renorm 1             mixtral
 *     --router dense (only read)                         qwen3 (QK-norm), llama and mistral (none)
 *
 * Everything else is refused with the option that stands in the way. Read next: hf_tensors.h, for the names of weights.
 */
#ifndef MODEL_HF_CONFIG_H
#define MODEL_HF_CONFIG_H

#include <stdbool.h>
#include <stddef.h>

#include "config.h"

typedef enum { HF_QWEN3_MOE, HF_MIXTRAL, HF_QWEN3, HF_LLAMA } HfArchitecture;

/* The architecture that expresses a finished configuration's model. False with one line in error that names the option
 * in the way and, where there is one, the way out: for dense and every router but topk and top1, shared experts,
 * chains, GELU, masked prediction, capacities, and what one of the two lacks (mixtral: --renorm 0, --moe-every above
 * 1). */
bool hf_architecture(const ModelConfig *model, HfArchitecture *architecture, char *error, size_t error_size);

/* config.json and generation_config.json for a model that hf_architecture accepted; the caller's (free). end_of_text:
 * id of the token that ends a document, -1: none. Weights are float32. */
char *hf_config_write(const ModelConfig *model, HfArchitecture architecture, int end_of_text);
char *hf_generation_config_write(int end_of_text);

/* Whether the text is such a config.json (it has a "model_type") and not a run's. */
bool hf_config_is(const char *json);

/* Reads one into config->model (options that it does not speak of keep their values) and architecture, as version 4 or
 * 5 of transformers write it. seq becomes max_position_embeddings, at most what --seq allows; a dense model becomes
 * --router dense of one expert of its width. False with one line in error: not JSON, a key missing or of another type,
 * an architecture or a feature that this program does not compute (attention biases, sliding windows in use, scaled
 * rotary embeddings, another activation, dense layers of another width ..), values out of the options' range. Hostile
 * input must not crash it. */
bool hf_config_read(Config *config, HfArchitecture *architecture, const char *json, char *error, size_t error_size);

#endif
