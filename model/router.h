/* What a router is.
 *
 * A router looks at a token x (C) and decides which of E experts work on it and with which weights. That decision is a
 * Plan (kernels/plan.h); the rest of the layer (moe.c) only reads the plan, so routers can be swapped without touching
 * anything else. There are two kinds of plan:
 *
 *   sparse  a list of (token, expert, weight). Tokens may choose experts (top1, topk, noisy, sigmoid), experts may
 *           choose tokens (expert-choice, threshold), or nobody chooses (hash, position, random, forced).
 *   soft    two matrices of weights: every expert has slots, a slot reads a mixture of tokens, a token reads a mixture
 *           of slots (soft, soft-batch). Nothing is chosen, so everything has a gradient.
 *
 * Choosing is not differentiable, weighting is: y = sum_j w_j Expert_j(x). So everything a sparse router learns from
 * the loss reaches it through one number per chosen expert, dL/dw_j = <dL/dy, Expert_j(x)>: how much the loss would
 * grow with that expert's weight. experts.h computes it, the router's `backward` turns it into the gradient of its own
 * parameters. A router whose weights do not depend on its parameters (the renormalised top-1, w = 1) gets nothing from
 * the loss and stays as it was born, or follows the balance loss alone: the log has the norms of both gradients at the
 * router's logits, and training raises an alarm where the first is 0.
 *
 * What a router may look at decides what its loss means. A language model predicts the next token, so a router that
 * looks at later tokens (sees_future) has read the answer: such a run needs --allow-leak and is marked. One that looks
 * at other sequences (sees_batch) gives a text another probability in other company. tests/test_causality.c holds every
 * router to what it declares here, both ways.
 *
 * To add a router: one file router_NAME.c with a table `const Router router_NAME` at its bottom, and one line in
 * router.c. Read router_top1.c first.
 */
#ifndef MODEL_ROUTER_H
#define MODEL_ROUTER_H

#include <stdbool.h>

#include "../kernels/adamw.h"
#include "../kernels/balance_loss.h"
#include "../kernels/device.h"
#include "../kernels/plan.h"
#include "config.h"
#include "tensors.h"

enum { ROUTER_PARAMS = 3, ROUTER_ALL_EXPERTS = -1 };

/* What differs from step to step. Kernels read it on the device, so that the calls of a step are the same in all of
 * them and one recording serves for all (device.h). */
typedef struct {
    int64_t number; /* optimizer steps done before this one */
    uint64_t key[]; /* (slices,routers): of the random numbers that a router draws in a forward (random.h) */
} RouterStep;

/* What all routers of a model know of the forward at hand. Row n is the token at position start + n % T of sequence
 * n / T. */
typedef struct {
    const int *tokens; /* (N), on the device */
    int T, start;
    int slice, slices; /* which of the step's forwards this is */
    int routers;       /* of the whole model */
    int rank, ranks;   /* which share the tokens of a batch equally: the rank-th N of ranks * N */
    uint64_t seed;
    bool training;         /* evaluation and generation draw no noise and leave running values alone */
    RouterStep *step;      /* on the device */
    RouterStep *host_step; /* the same on the host, owned */
} RouterContext;

typedef struct {
    acc_t *w;  /* a trained parameter, or a state that `update` moves */
    acc_t *dw; /* accumulates; NULL for a state, and where nothing is trained */
} RouterParam;

/* What one layer's router works with. Arrays are on the device. */
typedef struct {
    int N, C, E, K;       /* K as the user asked: experts per token */
    int renorm;           /* whether a token's weights are to sum to 1 */
    int site;             /* which of the model's routers this is: 0, 1, .. */
    const Config *config; /* for what only one router asks for */
    const RouterContext *context;
    double aux_scale, z_scale;        /* what this layer's losses weigh: coefficient / routers / slices / ranks */
    const real_t *x;                  /* (N,C) the layer's normalised input; set by moe_forward */
    RouterParam param[ROUTER_PARAMS]; /* in the order in which the router's `tensors` lists them */
    /* saved by forward for backward */
    acc_t *logits, *probs; /* (N,E); soft: logits (N,E*S). probs: scores as shares that sum to 1, for statistics too */
    acc_t *lse;            /* (N) */
    acc_t *load;           /* (LOAD_VALUES) losses and statistics of this forward and backward */
    const int *demand;     /* (E) entries of all ranks that chose each expert; set before `balance` */
    /* scratch */
    acc_t *dlogits;   /* as logits */
    acc_t *mean_prob; /* (E) */
    acc_t *dmix;      /* (N,E*S) soft: the gradient of plan->mix, for backward */
    void *own;        /* host memory of this router alone: whatever its `reserve` put there; freed with the layer */
} RouterPass;

typedef enum { PLAN_NONE, PLAN_TOKENS_CHOOSE, PLAN_EXPERTS_CHOOSE, PLAN_SOFT } PlanKind;

typedef struct Router {
    const char *name;
    const char *summary; /* one line for the README's table */
    const char *paper;   /* "" when there is none */
    PlanKind plan;       /* PLAN_NONE: no routing at all, one MLP of the active width */
    bool sees_future;    /* a token's output may depend on later tokens of its sequence */
    bool sees_batch;     /* .. on other sequences of the batch */
    bool across;         /* soft: groups are tokens of equal position, not sequences */
    bool one_rank;       /* its choice or its loss asks for all tokens of a batch at once, or for their numbers in it */
    bool exact_share;    /* experts choose: each takes exactly ceil(N K / E) tokens */
    bool learned;        /* has parameters that the main loss trains */
    int renorm_default;
    int fixed_top_k; /* 0: --top-k decides; ROUTER_ALL_EXPERTS: E */
    int chain_default;
    double aux_default, z_default;     /* coefficients where the user gives none; 0: there is no such loss ... */
    bool has_balance_loss, has_z_loss; /* ... unless it is only off */
    bool has_logit_scale;              /* whether --soft-scale means anything to it */

    /* Refuses options that make no sense with it, one line each (NULL: any). */
    void (*check)(const Config *config);

    /* Lists its parameters, "PREFIX.name", TENSOR_ROUTER the trained ones, TENSOR_STATE others (NULL: none). */
    void (*tensors)(TensorList *tensors, const ModelConfig *model, int layer, const char *prefix);

    /* Values on the host that are not drawn like weights (NULL: none): frequency (V) of tokens in the training text or
     * NULL, `key` for what is random. */
    void (*init)(acc_t *const *param, const ModelConfig *model, const double *frequency, uint64_t key);

    /* Reserves what it keeps beside RouterPass's own arrays, in pass->own (NULL: nothing). */
    void (*reserve)(RouterPass *pass, Arena *arena);

    /* Before a training step, outside of what is recorded: brings to the device what the host alone knows of all its
     * slices (NULL: nothing). */
    void (*before_step)(RouterPass *pass, Stream *stream);

    /* Fills plan->expert and plan->weight (soft: mix and weight) and pass->probs from pass->x; saves what backward
     * needs. Its arguments to kernels are the same in every training step. */
    void (*forward)(RouterPass *pass, Plan *plan, Stream *stream);

    /* After plan_build: its balance losses, load[LOAD_BALANCE] and load[LOAD_Z] (NULL: both 0). */
    void (*balance)(RouterPass *pass, const Plan *plan, Stream *stream);

    /* From dweight (N,plan->K), the gradient of plan->weight, and for a soft plan pass->dmix: adds to the parameters'
     * gradients and to dx (N,C); adds the balance losses' gradients too. NULL: nothing is learned and x has no part in
     * the weights. */
    void (*backward)(RouterPass *pass, real_t *dx, const acc_t *dweight, const Plan *plan, Stream *stream);

    /* After the optimizer: moves its state by what the whole step counted (NULL: no state). counts: demand of each
     * slice, E of them every `stride` values. Nothing may change when adam says that the step was skipped. */
    void (*update)(RouterPass *pass, const int *counts, size_t stride, const AdamState *adam, Stream *stream);

    /* Before pass->own is freed (NULL: it owns nothing else). */
    void (*release)(RouterPass *pass);
} Router;

/* NULL when there is no such router. */
const Router *router_find(const char *name);

/* The i-th router, NULL past the last. */
const Router *router_at(int i);

/* "dense, top1, topk, ..." */
const char *router_names(void);

/* Reserves the context's step; `slices` and `routers` are set, all else of it may be set later. */
void router_context_reserve(RouterContext *context, Arena *arena);
void router_context_free(RouterContext *context);

/* After arena_commit: the next forwards belong to the step that comes after `step` others. */
void router_context_set_step(RouterContext *context, int64_t step, Stream *stream);

/* The key of the random numbers that this router draws in this forward, and in no other; on the device. */
const uint64_t *router_key(const RouterPass *pass);

#endif
