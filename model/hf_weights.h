/* The weights of a folder of Hugging Face transformers: model.safetensors, or model.safetensors.index.json and the
 * several files it names. Types F64, F32, F16 and BF16; F64 is rounded where this program computes in float, the others
 * keep every bit.
 */
#ifndef MODEL_HF_WEIGHTS_H
#define MODEL_HF_WEIGHTS_H

#include "hf_config.h"
#include "tensors.h"

/* Reads them all into values (tensors->total). Ends the program with one line when one is missing, is not what
 * config.json explains, has another shape or type, or is not finite. Experts may be one matrix each, or fused into
 * "experts.gate_up_proj" and "experts.down_proj" as transformers 5 has them in memory. A folder may come from anyone:
 * nothing in it is believed. */
void hf_weights_read(acc_t *values, const TensorList *tensors, const ModelConfig *model, HfArchitecture architecture,
                     const char *directory);

#endif
