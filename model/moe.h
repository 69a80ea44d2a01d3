/* The mixture-of-experts layer:
 *
 *     x -> router -> plan -> dispatch -> exchange -> experts -> exchange -> combine -> y          and back
 *
 * The stages are separate kernels, called one after the other in moe.c and timed apart. A soft plan (plan.h) mixes
 * where a sparse one copies; the experts are the same. With the router "dense", or in a layer that --moe-every skips,
 * the layer is one MLP of the active width. chain.c applies it, once or several times. Its tensors and memory are
 * in moe_memory.c.
 */
#ifndef MODEL_MOE_H
#define MODEL_MOE_H

#include "../kernels/balance_loss.h"
#include "../kernels/device.h"
#include "../kernels/experts.h"
#include "../kernels/plan.h"
#include "adapter.h"
#include "config.h"
#include "exchange.h"
#include "router.h"

typedef struct {
    int N, C;
    const Router *router; /* NULL: a dense layer, no plan, no pass */
    RouterPass pass;
    Plan plan;
    Exchange exchange;
    ExpertShape experts; /* this rank's routed experts, or the one MLP of a dense layer */
    ExpertShape shared;  /* the shared experts as one MLP; H 0: none */
    Adapter adapters;    /* of --perft e, one in each of `experts`; H 0: none */
    Plan asked;          /* its sizes as the options ask, for moe_set_dropless */
    const real_t *w1, *w2, *shared_w1, *shared_w2;
    acc_t *dw1, *dw2, *dshared_w1, *dshared_w2; /* NULL: frozen */
    /* saved by forward */
    real_t *a;        /* (rows, 2H or H) of the experts before the activation; NULL: made again in scratch->a */
    real_t *shared_a; /* (N, ..) of the shared ones; likewise */
    real_t *out_rows; /* (rows,C) what the experts made; kept with a soft plan alone */
} MoeLayer;

/* Buffers that all layers take turns in. */
typedef struct {
    real_t *slot_rows;  /* (rows of the plan, C) a soft plan's where the experts are on other ranks; else NULL */
    real_t *in_rows;    /* (rows,C) what the experts read; NULL where they fetch it by index (dispatch.h) */
    real_t *out_rows;   /* (rows,C) forward: what the experts made of it */
    real_t *din_rows;   /* (rows,C) backward: the gradient of in_rows; the same memory as out_rows */
    real_t *dy_rows;    /* (rows,C) the gradient of the layer's output, in row order; NULL likewise */
    real_t *h, *da;     /* (rows,H), (rows, 2H or H) */
    real_t *a;          /* (rows, 2H or H) with --recompute experts: all layers take turns in it */
    acc_t *drow_weight; /* (rows) */
    acc_t *dweight;     /* (N,K of the plan) */
    acc_t *dmix;        /* (N,K of the plan), soft */
    acc_t *mean_prob;   /* (E of the most) mean probabilities, for the statistics */
    int *all_rows;      /* {0, N}: the offsets of a single expert that takes every token */
    ExchangeScratch exchange;
} MoeScratch;

/* What the layers need of those: rows of experts, of soft plans that travel, elements of h and da, entries of plans. */
typedef struct {
    size_t rows, slot_rows, h, a, entries, experts;
    ExchangeSize exchange;
    bool soft, a_again;
} ScratchSize;

/* ---- what the layer has (moe_memory.c) ---- */

/* Describes layer `layer`'s experts, whose gradients are overwritten; appends them to the list. (Routers are listed by
 * chain.c, one for each step.) */
void moe_tensors(TensorList *tensors, const ModelConfig *config, int layer);

/* Whether layer `layer` routes at all. */
bool moe_is_routed(const ModelConfig *config, int layer);

/* Reserves what the layer saves for N tokens; `size` grows to what it needs of the shared buffers. context: of the
 * whole model, must outlive the layer; site: which of the model's routers this one is. */
void moe_reserve(MoeLayer *moe, const Config *config, int layer, int N, const RouterContext *context, int site,
                 ScratchSize *size, Arena *arena);
void moe_free(MoeLayer *moe);

/* Makes `size` large enough for experts, or adapters, of this shape. */
void moe_grow_scratch(ScratchSize *size, ExpertShape shape);

/* Connects it to its parameters in the flat buffers of the list; gradients NULL: none. The router's are those whose
 * names begin with `router_prefix`. */
void moe_connect(MoeLayer *moe, const TensorList *tensors, int layer, const char *router_prefix, const real_t *weights,
                 acc_t *master, acc_t *grads);

/* The router alone. */
void moe_connect_router(MoeLayer *moe, const TensorList *tensors, const char *prefix, acc_t *master, acc_t *grads);

/* Reserves the shared buffers, those of backward only where there is one. */
void moe_reserve_scratch(MoeScratch *scratch, const ModelConfig *config, ScratchSize size, bool backward, Arena *arena);

/* What adapters that see all N tokens may use between two layers. */
AdapterScratch moe_adapter_scratch(const MoeScratch *scratch);

/* Takes every choice (no capacity, compact rows), or works as configured again. Experts that choose exactly their share
 * and soft plans have nothing to drop. */
void moe_set_dropless(MoeLayer *moe, bool dropless);

/* ---- what it computes (moe.c) ---- */

/* y (N,C) from x (N,C); load (LOAD_VALUES) receives the losses and statistics, demand (E) the choices. Both unused in a
 * dense layer. */
void moe_forward(MoeLayer *moe, MoeScratch *scratch, real_t *y, const real_t *x, acc_t *load, int *demand,
                 Profile *profile, Stream *stream);

/* After moe_forward of the same layer with the same x, whose plan and activations it reads: another forward in between
 * (an evaluation) ruins them. dx (N,C) is overwritten; the gradients of the experts' weights, shared and dense ones as
 * well, and of the adapters in them are overwritten, or added to when add_dw is 1; the router's accumulate. */
void moe_backward(MoeLayer *moe, MoeScratch *scratch, real_t *dx, const real_t *dy, const real_t *x, int add_dw,
                  Profile *profile, Stream *stream);

#endif
