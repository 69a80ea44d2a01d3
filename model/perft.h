/* Routed parameter-efficient fine-tuning (PERFT, Liu et al. 2024, arXiv 2411.08212): small adapters A_j (adapter.h) are
 * trained beside the experts of a model whose own weights, routers included, are frozen. x is the MoE layer's input, y
 * what it computes:
 *
 *     r  routed     y += sum of p'_j A_j(x) over the K' most probable of M adapters      p' = softmax(W' x)
 *     e  embedded   y  = sum of w_i (E_i(x) + A_i(x)) over the chosen experts            the model's own router
 *     d  dense      y += sum of A_j(x) over all M
 *     s  single     y += A(x)
 *
 * The weights of r are those of its own router, not renormalised, so that it learns from the loss (and from a balance
 * loss of its own, --perft-aux-coef); with the weights of the model's router it would stay as it was born. e stands
 * inside the experts, in moe.c. r is a second MoE layer with adapters for experts. M adapters that see every token are
 * one of rank M R, so d and s are one dense adapter.
 *
 * Trained parameters of a layer: r M(2CR + C), e 2ECR, d 2MCR, s 2CR. Called by transformer.c; calls moe.c, adapter.c.
 */
#ifndef MODEL_PERFT_H
#define MODEL_PERFT_H

#include "adapter.h"
#include "config.h"
#include "moe.h"
#include "tensors.h"

/* What a layer has beside its MoE layer: nothing, a dense adapter, or a layer of them. */
typedef struct {
    int N, C;
    Adapter dense;
    Config *config; /* of the layer of adapters, owned; NULL: there is none */
    MoeLayer moe;
    int *demand; /* (M) */
} Perft;

/* Which layers have a layer of adapters, whose losses and statistics it books. */
bool perft_is_routed(const ModelConfig *config, int layer);

/* Lists layer `layer`'s adapters, whichever kind, and their router. */
void perft_tensors(TensorList *tensors, const ModelConfig *config, int layer);

/* Reserves what the layer saves for N tokens; `size` grows to what it needs of the shared buffers. site: as in moe.h */
void perft_reserve(Perft *perft, const Config *config, int layer, int N, const RouterContext *context, int site,
                   ScratchSize *size, Arena *arena);
void perft_connect(Perft *perft, const TensorList *tensors, int layer, const real_t *weights, acc_t *master,
                   acc_t *grads);
void perft_free(Perft *perft);

/* branch (N,C) += the adapters' results of x (N,C); load (LOAD_VALUES): see moe.h, r alone. sum (N,C) is scratch. */
void perft_forward(Perft *perft, MoeScratch *scratch, real_t *branch, real_t *sum, const real_t *x, acc_t *load,
                   Profile *profile, Stream *stream);

/* After perft_forward with the same x: dx (N,C) +=; dy (N,C) is the gradient of the branch. add_dw: see moe.h; sum
 * (N,C) is scratch. */
void perft_backward(Perft *perft, MoeScratch *scratch, real_t *dx, real_t *sum, const real_t *dy, const real_t *x,
                    int add_dw, Profile *profile, Stream *stream);

#endif
