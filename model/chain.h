/* The feed-forward half of a transformer layer: the MoE layer, applied --chain-steps times (Chain-of-Experts, Wang et
 * al. 2025, arXiv 2506.18945).
 *
 *     x_0 = norm(h)                    (--chain-norm 0)          x_0 = h                                  (1)
 *     x_c = I x_{c-1} + MoE_c(x_{c-1})                           x_c = I x_{c-1} + MoE_c(norm_c(x_{c-1}))
 *     h' = O h + x_C                   h is the residual stream, I is --chain-inner, O is --chain-outer
 *
 * All steps share the experts; each has a router of its own. One step with I = 0 and O = 1 is the plain layer,
 * h + MoE(norm(h)), and so is one step with --chain-norm 1, I = 1 and O = 0. The paper's layer is I = 1, O = 0 without
 * norms. With norms, C steps are C layers that share their experts (and skip attention).
 *
 *     backward, from g_C = dh':    g_{c-1} = I g_c + (norm_c)' MoE_c'(g_c)          dh = O dh' + norm'(g_0)  or  + g_0
 *
 * Called by transformer.c; calls moe.c.
 */
#ifndef MODEL_CHAIN_H
#define MODEL_CHAIN_H

#include "../kernels/device.h"
#include "config.h"
#include "moe.h"
#include "tensors.h"

/* What step c > 0 keeps for its backward. */
typedef struct {
    real_t *x;    /* (N,C) x_c, the step's input */
    real_t *xn;   /* (N,C) normalised; x itself without --chain-norm */
    acc_t *rstd;  /* (N) */
    real_t *norm; /* (C) parameter; NULL without --chain-norm */
    acc_t *dnorm;
} ChainStep;

typedef struct {
    int N, C, steps;
    bool inner, outer, norm;
    double eps;
    MoeLayer *moe;   /* (steps) host */
    ChainStep *step; /* (steps) host, the first unused */
} Chain;

/* Buffers that all chains take turns in; NULL where no chain has more than one step. */
typedef struct {
    real_t *g, *du; /* (N,C) gradients of x_c and of a step's input */
} ChainScratch;

/* Describes layer `layer`'s tensors: experts, each step's router and norm. */
void chain_tensors(TensorList *tensors, const ModelConfig *config, int layer);

/* How often the layer routes: its steps, 0 for a dense one. */
int chain_routers(const ModelConfig *config, int layer);

/* Reserves what the layer saves for N tokens. first_site: how many routers come before its own. */
void chain_reserve(Chain *chain, const Config *config, int layer, int N, const RouterContext *context, int first_site,
                   ScratchSize *size, Arena *arena);
void chain_reserve_scratch(ChainScratch *scratch, const ModelConfig *config, int N, Arena *arena);
void chain_free(Chain *chain);

/* Connects it to its parameters: weights and gradients are the flat buffers of the list, gradients may be NULL. */
void chain_connect(Chain *chain, const TensorList *tensors, int layer, real_t *weights, acc_t *master, acc_t *grads);

/* branch (N,C) = x_C, from xn = norm(h) and h (N,C). load (steps, LOAD_VALUES), demand (steps, E): see moe.h. */
void chain_forward(Chain *chain, MoeScratch *moe_scratch, real_t *branch, const real_t *xn, const real_t *h,
                   acc_t *load, int *demand, Profile *profile, Stream *stream);

/* dh (N,C): on entry the gradient of h', on return what of it reaches h past the norm. dxn (N,C), the gradient of xn,
 * is overwritten. add_dw: as in moe_backward, for the experts that all steps share; other gradients accumulate. */
void chain_backward(Chain *chain, ChainScratch *scratch, MoeScratch *moe_scratch, real_t *dxn, real_t *dh,
                    const real_t *xn, int add_dw, Profile *profile, Stream *stream);

#endif
