/* LoRA of the attention (--lora attention; Hu et al. 2021, arXiv 2106.09685): adapters beside its projections, the
 * control that knows nothing of experts in comparisons of fine-tuning. One adapter stands beside the matrix of queries,
 * keys and values, as they are projected by one, and one beside what attention puts out. Called by attention_block.c.
 */
#ifndef MODEL_LORA_H
#define MODEL_LORA_H

#include "adapter.h"
#include "config.h"
#include "tensors.h"

typedef struct {
    Adapter qkv, out; /* without --lora of rank 0: none */
} Lora;

/* Widths of what is projected and of what attention puts out. */
typedef struct {
    int qkv, att;
} LoraWidths;

/* Lists the adapters' tensors, where there are any. */
void lora_tensors(TensorList *tensors, const ModelConfig *config, int layer, LoraWidths widths);

/* Reserves what they keep for N rows. */
void lora_reserve(Lora *lora, const ModelConfig *config, int N, LoraWidths widths, Arena *arena);
void lora_connect(Lora *lora, const TensorList *tensors, int layer, const real_t *weights, acc_t *grads);

#endif
