/* An adapter: what fine-tuning learns beside a frozen product, a pair of matrices of low rank.
 *
 *     y += (alpha / R) B act(A x)        A (R,C), B (D,R); act: identity (LoRA, Hu et al. 2021, arXiv 2106.09685) or
 *                                        SiLU (parallel adapter, He et al. 2021, arXiv 2110.04366)
 *
 * It is an expert of two matrices (kernels/experts.h) whose hidden width is the rank, and the same kernels compute it.
 * A starts from normal(0, sqrt(2 / R)); B starts from zero, not from something small, so that a model with fresh
 * adapters computes what it did without them, to the bit. With B zero A gets no gradient in the first step, but B does.
 *
 * Here: one adapter for all rows, which the attention's projections have (--lora) and perft.c where nothing chooses.
 * Those of --perft e and r are in moe.c, each over its own rows.
 *
 *     adapter_tensors(list, ..); adapter_reserve(&a, ..); arena_commit(..); adapter_connect(&a, ..);
 *     adapter_forward(&a, scratch, y, x, stream);    adapter_backward(&a, scratch, dx, dy, x, stream);
 */
#ifndef MODEL_ADAPTER_H
#define MODEL_ADAPTER_H

#include "../kernels/device.h"
#include "../kernels/experts.h"
#include "config.h"
#include "tensors.h"

typedef struct {
    ExpertShape shape;   /* H 0: there is none */
    const real_t *a, *b; /* (E,H,C), (E,D,H) */
    acc_t *da, *db;
    real_t *kept; /* (rows,H) A x, from forward for backward */
} Adapter;

/* Scratch that adapters and experts share. */
typedef struct {
    real_t *h, *da;      /* (rows,H) */
    const int *all_rows; /* {0, rows} on the device */
} AdapterScratch;

/* Of E adapters of rank H, all of --perft-rank's scale; D 0: C. */
ExpertShape adapter_shape(const ModelConfig *config, int E, int C, int H, int D, int rows);

/* Lists "PREFIX.a" and "PREFIX.b" of that shape; with E 0 one adapter's, (H,C) and (D,H), whose gradients are added to.
 * Those of the others are overwritten by the first backward of a step. */
void adapter_tensors(TensorList *tensors, const ModelConfig *config, TensorKind kind, int layer, ExpertShape shape,
                     const char *prefix);

/* Reserves what it keeps for `rows` rows. */
void adapter_reserve(Adapter *adapter, ExpertShape shape, size_t rows, Arena *arena);

/* Finds "PREFIX.a" and "PREFIX.b" in the flat buffers; without such tensors there is no adapter. grads may be NULL. */
void adapter_connect(Adapter *adapter, const TensorList *tensors, const char *prefix, const real_t *weights,
                     acc_t *grads);

/* y (rows,D) += the adapter's result of x (rows,C). Nothing where there is no adapter. */
void adapter_forward(const Adapter *adapter, AdapterScratch scratch, real_t *y, const real_t *x, Stream *stream);

/* After adapter_forward with the same x: dx (rows,C) += ; the gradients of A and B accumulate. dy (rows,D) */
void adapter_backward(const Adapter *adapter, AdapterScratch scratch, real_t *dx, const real_t *dy, const real_t *x,
                      Stream *stream);

#endif
