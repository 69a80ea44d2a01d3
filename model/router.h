/* What a router is.
 *
 * A router looks at a token x (C) and decides which K of E experts work on it and with which weights. That choice is a
 * Plan (kernels/plan.h); the rest of the layer (moe.c) only reads the plan, so routers can be swapped without touching
 * anything else.
 *
 * Choosing is not differentiable, weighting is: y = sum_j w_j Expert_j(x). So everything a router learns from the loss
 * reaches it through one number per chosen expert, dL/dw_j = <dL/dy, Expert_j(x)>: how much the loss would grow with
 * that expert's weight. experts.h computes it, the router's `backward` turns it into the gradient of its own
 * parameters. A router whose weights do not depend on its parameters (the renormalised top-1, w = 1) gets nothing from
 * the loss and stays as it was born; training prints the norm of the router's gradient for that reason.
 *
 * To add a router: one file router_NAME.c with a table `const Router router_NAME` at its bottom, and one line in
 * router.c. Read router_top1.c first.
 */
#ifndef MODEL_ROUTER_H
#define MODEL_ROUTER_H

#include <stdbool.h>

#include "../kernels/device.h"
#include "../kernels/plan.h"
#include "config.h"
#include "tensors.h"

/* What one layer's router works with. All arrays are on the device. */
typedef struct {
    int N, C, E, K;
    int renorm;
    double aux_scale, z_scale; /* what this layer's losses weigh: coefficient / MoE layers / slices */
    const real_t *x;           /* (N,C) the layer's normalised input; set by moe_forward */
    /* parameters, and their gradients */
    const acc_t *w; /* (E,C) */
    acc_t *dw;      /* (E,C) accumulates */
    /* saved by forward for backward */
    acc_t *logits, *probs; /* (N,E) */
    acc_t *lse;            /* (N) */
    acc_t *load;           /* (LOAD_VALUES) statistics of this forward and backward */
    /* scratch of backward */
    acc_t *dlogits; /* (N,E) */
} RouterPass;

typedef struct Router {
    const char *name;
    const char *summary; /* one line for --help and the README's table */
    bool causal;         /* a token's routing depends on no later token */
    bool learned;        /* has parameters that the main loss trains */
    bool dense;          /* no routing at all: one MLP of the active width */
    int renorm_default;
    int fixed_top_k; /* 0: --top-k decides */
    /* Refuses options that make no sense with it, one line each (NULL: any). */
    void (*check)(const ModelConfig *model);
    /* Fills plan->expert and plan->weight from pass->x; saves what backward needs. */
    void (*forward)(RouterPass *pass, Plan *plan, Stream *stream);
    /* From dweight (N,K), the gradient of plan->weight: adds to pass->dw and to dx (N,C); adds the balance losses'
     * gradients too. */
    void (*backward)(RouterPass *pass, real_t *dx, const acc_t *dweight, const Plan *plan, Stream *stream);
} Router;

/* NULL when there is no such router. */
const Router *router_find(const char *name);

/* The i-th router, NULL past the last. */
const Router *router_at(int i);

/* "dense, top1, topk" */
const char *router_names(void);

#endif
