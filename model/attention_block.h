/* The attention of a layer, with the projections around it (grouped key/value heads and QK-norm as in Qwen3):
 *
 *     xn -> project -> turn -> attention -> project -> branch          and back
 *
 *     q, k, v = xn Wqkv                        one product; --lora adds its adapter's (lora.h)
 *     q, k    = rope(norm(q)), rope(norm(k))   per head; without the norms with --qk-norm 0
 *     branch  = attention(q, k, v) Wo          likewise
 *
 * It reads the normalised stream and makes what is added to the stream: norms and sums are transformer.c's.
 *
 *     attention_shared_reserve(&shared, ..); attention_block_reserve(&block, &shared, ..); arena_commit(..);
 *     attention_shared_connect(&shared); attention_block_connect(&block, ..);
 *     attention_block_forward(&block, &shared, ..);    attention_block_backward(&block, &shared, ..);
 *
 * Called by transformer.c; calls lora.c.
 */
#ifndef MODEL_ATTENTION_BLOCK_H
#define MODEL_ATTENTION_BLOCK_H

#include <stdbool.h>

#include "../kernels/device.h"
#include "config.h"
#include "lora.h"
#include "tensors.h"
#include "weight.h"

/* One layer's parameters and what its forward keeps for its backward. */
typedef struct {
    Weight qkv, q_norm, k_norm, out;
    real_t *qkv_raw;       /* (N, (NH+2*NKV)*HS) as projected */
    real_t *qk_turned;     /* (N, (NH+NKV)*HS), queries and keys after QK-norm and RoPE */
    acc_t *qk_rstd;        /* (N, NH+NKV) */
    real_t *att;           /* (N, NH*HS) */
    acc_t *lse;            /* (B,NH,T) */
    real_t *keys, *values; /* (B,cached,NKV,HS) generation only; of a model that reads prompts, another's */
    Lora lora;             /* adapters beside the two projections */
} AttentionBlock;

/* What the blocks of a model have in common. */
typedef struct {
    const ModelConfig *config; /* must outlive it */
    int B, T, N;               /* sequences, time, rows of one forward */
    bool decodes;              /* one token at a time, with a cache of what came before */
    int cached;                /* length of the cache that blocks read or fill, where they have one */
    Recompute recompute;       /* what the backward makes again (--recompute) */
    acc_t *angles;             /* (seq,HS) table of RoPE */
    real_t *dqkv, *datt;       /* (N, (NH+2*NKV)*HS), (N, NH*HS) blocks take turns in them; NULL without a backward */
} AttentionShared;

/* Describes layer `layer`'s tensors, adapters included. */
void attention_block_tensors(TensorList *tensors, const ModelConfig *config, int layer);

/* Reserves what the layer saves. With --recompute, layers after the first use what the first has reserved. */
void attention_block_reserve(AttentionBlock *block, const AttentionShared *shared, int layer, Arena *arena);

/* Connects it to its parameters in the flat buffers of the list, gradients NULL: none, and to the buffers of `first`,
 * the first layer's block, which is connected before the others. */
void attention_block_connect(AttentionBlock *block, const AttentionShared *shared, const AttentionBlock *first,
                             const TensorList *tensors, int layer, const real_t *weights, acc_t *grads);

/* All of `shared` but the buffers is set before. attention_shared_connect fills the table. */
void attention_shared_reserve(AttentionShared *shared, bool backward, Arena *arena);
void attention_shared_connect(AttentionShared *shared);

/* branch (N,C) from xn (N,C). Rows stand at positions start .. start+T-1; what decodes reads earlier ones from the
 * cache, what has a cache and does not decode leaves them there. */
void attention_block_forward(AttentionBlock *block, const AttentionShared *shared, AdapterScratch scratch,
                             real_t *branch, const real_t *xn, int start, Profile *profile, Stream *stream);

/* After attention_block_forward of whole sequences with the same xn: dxn (N,C) is overwritten with its gradient, from
 * dbranch (N,C); the gradients of the weights accumulate. */
void attention_block_backward(AttentionBlock *block, const AttentionShared *shared, AdapterScratch scratch, real_t *dxn,
                              const real_t *dbranch, const real_t *xn, Profile *profile, Stream *stream);

#endif
