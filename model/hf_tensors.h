/* The weights' names in Hugging Face transformers, and where each lies in ours.
 *
 * Every tensor there is a contiguous part of one here (kernels/matmul.h has rows of (out, in) as nn.Linear does):
 *
 *     layers.0.attn.qkv.w  ((NH + 2 NKV) HS, C)    q_proj, k_proj, v_proj, one below the other
 *     layers.0.moe.experts.w1  (E, 2H, C)          of each expert gate_proj, then up_proj
 *     layers.0.moe.experts.w2  (E, C, H)           of each expert down_proj
 *
 * so one list serves writing and reading, and no value is moved or rounded on the way out.
 */
#ifndef MODEL_HF_TENSORS_H
#define MODEL_HF_TENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "hf_config.h"
#include "tensors.h"

typedef struct {
    char name[128]; /* "model.layers.0.mlp.experts.3.gate_proj.weight" */
    int ndim;
    int64_t shape[2];
    size_t offset; /* first element in the flat buffers of the list */
    size_t count;  /* elements */
} HfTensor;

/* The list for all tensors of a model of that architecture, the caller's (free); *count its length. Together they cover
 * every tensor of the list once. */
HfTensor *hf_tensors(const TensorList *tensors, const ModelConfig *model, HfArchitecture architecture, int *count);

#endif
