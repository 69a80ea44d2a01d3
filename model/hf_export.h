/* --export-hf DIR: the model as a folder that Hugging Face transformers loads unchanged.
 *
 *     config.json  generation_config.json  model.safetensors  tokenizer.json  tokenizer_config.json
 *
 * Written to DIR.tmp, synced and renamed: DIR is there whole or not at all. An earlier export of that name is replaced;
 * a DIR that holds anything else is refused.
 */
#ifndef MODEL_HF_EXPORT_H
#define MODEL_HF_EXPORT_H

#include <stdbool.h>
#include <stddef.h>

#include "hf_config.h"
#include "tensors.h"
#include "vocabulary.h"

/* Ends the program with one line when the export cannot succeed: a model that no architecture expresses, or a DIR that
 * must not be replaced or cannot be made. Called before training starts. */
void hf_export_check(const char *directory, const ModelConfig *model);

/* Writes the folder from weights (tensors->total values on the host). False with one line in error, nothing left behind
 * and an earlier export untouched. */
bool hf_export(const char *directory, const ModelConfig *model, const TensorList *tensors, const acc_t *weights,
               const Vocabulary *vocabulary, char *error, size_t error_size);

#endif
