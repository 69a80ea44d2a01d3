/* The model: a decoder-only transformer whose feed-forward layers are mixtures of experts (the block of Qwen3-MoE).
 *
 *     x = embedding[tokens]
 *     L times:   x += attention(rope(norm(x) Wqkv)) Wo          x += moe(norm(x))      (chain.h: or several times)
 *     loss = cross_entropy(norm(x) Whead)
 *
 * Use:  transformer_reserve(&model, ...); arena_commit(&arena); transformer_connect(&model); transformer_load(..);
 *       transformer_forward(&model, tokens, slice, s); transformer_loss(&model, targets, slice, true, s);
 *       transformer_backward(&model, tokens, slice, s);
 *
 * Read transformer.c from the top, then the two halves of a layer in the order of the data: attention_block.c, moe.c.
 * Forward and backward of each part stand next to each other.
 */
#ifndef MODEL_TRANSFORMER_H
#define MODEL_TRANSFORMER_H

#include <stdbool.h>

#include "../kernels/device.h"
#include "attention_block.h"
#include "chain.h"
#include "config.h"
#include "moe.h"
#include "perft.h"
#include "tensors.h"
#include "weight.h"

/* One layer's norms and parts, and what its forward keeps for its backward. */
typedef struct {
    Weight attn_norm, ffn_norm;
    real_t *x;       /* (N,C) residual stream at the layer's start */
    real_t *xn;      /* (N,C) normalised */
    acc_t *x_rstd;   /* (N) */
    real_t *mid;     /* (N,C) residual stream after attention */
    real_t *mn;      /* (N,C) normalised */
    acc_t *mid_rstd; /* (N) */
    AttentionBlock attention;
    Chain chain; /* the MoE layer, applied once or several times */
    Perft perft; /* adapters beside it */
} Layer;

typedef struct {
    const ModelConfig *config;
    int B, T, N;           /* sequences, time, rows of one forward */
    int slices;            /* forwards per optimizer step */
    Recompute recompute;   /* what the backward makes again (--recompute) */
    int predicted;         /* targets of one forward that count: N, or fewer where only masked tokens are predicted */
    RouterContext context; /* what the routers know of the forward at hand */
    TensorList tensors;
    Weight embedding, final_norm, head;
    Layer *layers;   /* (L), host */
    int *moe_layers; /* (moe_count) the layer of each router, host: with a chain several have the same */
    MoeLayer **moes; /* (moe_count) host: each routed application of experts, in the order of the forward */
    int moe_count;

    acc_t *master, *grads; /* flat (tensors.total) */
    real_t *weights;       /* flat; what the kernels compute with: master itself where real_t is acc_t, else rounded */

    real_t *final_x, *hidden; /* (N,C) */
    acc_t *final_rstd;        /* (N) */
    real_t *branch;           /* (N,C) what attention or the experts add to the stream */
    real_t *logits;           /* (head_rows, V): the head works on some rows at a time */
    int head_rows;
    acc_t *logits_acc; /* (B,V) generation only: the logits as the host reads them */
    acc_t *losses;     /* (N) nats */
    acc_t *slice_loss; /* (slices) mean of losses */
    acc_t *step_loss;  /* mean of slice_loss over slices and, after transformer_sum_ranks, ranks */
    acc_t *load;       /* (ranks, slices, moe_count, LOAD_VALUES); other ranks' after transformer_sum_ranks */
    acc_t *perft_load; /* (ranks, slices, L, LOAD_VALUES) as load, of the adapters' routers; NULL without */
    int *demand;       /* (slices, moe_count, E) entries of all ranks that chose each expert */

    real_t *perft_sum; /* (N,C) what a layer of adapters makes, and its gradient; NULL without */
    real_t *dx;        /* (N,C) gradient of the residual stream */
    real_t *dn;        /* (N,C) gradient of a normalised input */
    AttentionShared attention;
    MoeScratch scratch;
    ChainScratch chain_scratch;
    Profile *profile; /* NULL: no stage times */
} Transformer;

/* Trains; reads whole sequences, up to what comes before the head; reads and writes one token at a time. */
typedef enum { USE_TRAIN, USE_READ, USE_GENERATE } TransformerUse;

/* Appends every tensor of a model, in the order of the forward. */
void transformer_tensors(TensorList *list, const ModelConfig *config);

/* Reserves all device memory of a model that works on `batch` sequences at once, in `slices` forwards per step.
 * The other two reserve neither gradients nor backward buffers, and share the weights of `source`; USE_READ without one
 * has its own. USE_GENERATE has a cache of keys and values and reads one token per sequence and forward. `config` must
 * outlive the model. */
void transformer_reserve(Transformer *model, const Config *config, int batch, int slices, TransformerUse use,
                         Transformer *source, Arena *arena);

/* After arena_commit: connects the parts to their weights and fills the tables. */
void transformer_connect(Transformer *model);
void transformer_free(Transformer *model);

/* Initial parameters and router states into a host buffer of tensors.total values: a function of the seed alone, and,
 * where a router asks for it, of the frequency (V) of tokens in the training text (NULL: not known). */
void transformer_init(const Transformer *model, acc_t *host, uint64_t seed, const double *frequency);

/* Parameters from and to a host buffer of tensors.total values. */
void transformer_load(Transformer *model, const acc_t *host);
void transformer_store(const Transformer *model, acc_t *host);

/* "layer 2", or "layer 2, step 1" where a layer routes more than once: the i-th router. */
void transformer_router_name(const Transformer *model, int i, char *name, size_t size);

/* Says which step the next forwards belong to, and whether they train: evaluation draws no noise and takes every token
 * (capacity 0) unless the user wants training's drops. */
void transformer_set_step(Transformer *model, int64_t step, Stream *stream);
void transformer_set_training(Transformer *model, bool training, bool keep_capacity);

/* Before the forwards of a training step: the same as transformer_set_step, and routers bring to the device what they
 * need of the step. What follows is the same calls with the same arguments in every step, so that one step can be
 * recorded for all; this is not part of it. */
void transformer_begin_step(Transformer *model, int64_t step, Stream *stream);

/* tokens (N) on the device -> model->hidden. Books routing statistics under `slice`. */
void transformer_forward(Transformer *model, const int *tokens, int slice, Stream *stream);

/* The same for tokens that stand at `start` and behind, of a model that decodes: what stood before is in its cache. */
void transformer_forward_from(Transformer *model, const int *tokens, int start, int slice, Stream *stream);

/* targets (N), -1 where nothing is predicted -> model->losses, model->slice_loss[slice], their mean over
 * model->predicted. With gradient, also the gradients of the head and of hidden; each target weighs
 * 1 / (predicted * slices * ranks), so that gradients of ranks and slices are added, never averaged. */
void transformer_loss(Transformer *model, const int *targets, int slice, bool gradient, Stream *stream);

/* After transformer_loss with gradient: adds to model->grads; slice 0, where a tensor is grad_overwritten, overwrites
 * what the step before has left. */
void transformer_backward(Transformer *model, const int *tokens, int slice, Stream *stream);

/* After the step's last backward: gradients, loss and statistics of all ranks together. What several ranks have the
 * same copy of is summed over them, an expert over those that hold it: it has seen the tokens of its whole group. */
void transformer_sum_ranks(Transformer *model, Stream *stream);

/* After the optimizer's step, whose state is `adam`: routers that learn without a gradient move what they
 * keep, unless --freeze router holds them. */
void transformer_update_routers(Transformer *model, const AdamState *adam, Stream *stream);

#endif
