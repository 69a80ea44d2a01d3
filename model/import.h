/* --init-from DIR: weights of another model to start from, a run of ours or a folder of Hugging Face transformers; and
 * --upcycle: a mixture of experts from a dense model, each expert a copy of its MLP, the router fresh (sparse
 * upcycling, Komatsuzaki et al. 2022, arXiv 2212.05055). With --renorm 1 the upcycled model computes at first what the
 * dense one did.
 */
#ifndef MODEL_IMPORT_H
#define MODEL_IMPORT_H

#include <stdbool.h>
#include <stddef.h>

#include "config.h"
#include "tensors.h"

/* What DIR says about itself: a run's config.json or one of transformers. `source` receives defaults, then the model's
 * options (of a run: all of its options). False with one line in error when there is no DIR/config.json or it is
 * neither. */
bool import_config(Config *source, const char *directory, char *error, size_t error_size);

/* The value of --tokenizer that goes with DIR's model: "byte", or the tokenizer.json that lies there. */
void import_tokenizer(char tokenizer[CONFIG_TEXT], const Config *source, const char *directory);

/* Overwrites in host (tensors->total values, initial ones before) the weights that DIR has. Types F64, F32, F16 and
 * BF16 are read. Ends the program with one line when a tensor is missing, is one too many, or has another shape or type
 * than DIR's config.json and this model ask for; adapters (adapter.h) that DIR has not stay as they are. upcycle: DIR's
 * dense MLPs become the experts. */
void import_weights(acc_t *host, const TensorList *tensors, const ModelConfig *model, const char *directory,
                    bool upcycle);

/* The same for a rank that has a part of the tensors: what it has of the weights of --init-from. */
void import_part(acc_t *host, const TensorList *tensors, const Config *config);

#endif
