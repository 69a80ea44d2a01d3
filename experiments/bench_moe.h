/* One MoE layer alone, on random data: opened in any shape, router, layout and load, run forward and backward. Used by
 * bench_layer.c and bench_grid.c.
 *
 *     MoeBench b;
 *     size_t needed = moe_bench_open(&b, &shape, &choice);
 *     if (needed == 0) { moe_bench_forward(&b, NULL);  moe_bench_backward(&b, NULL);  moe_bench_close(&b); }
 *
 * Data and weights are normal random numbers made on the device, so that a layer of gigabytes is open in a moment; a
 * router's own parameters are what it starts training with. The backward overwrites the experts' gradients, as the
 * first one of a step does.
 */
#ifndef EXPERIMENTS_BENCH_MOE_H
#define EXPERIMENTS_BENCH_MOE_H

#include "../model/chain.h"

typedef struct {
    const char *name;
    int tokens, dim, expert_dim, experts, top_k;
    const char *act;
} LayerShape;

typedef struct {
    const char *router, *layout;
    const char *force; /* where the router "forced" sends tokens; NULL: no option */
    double capacity_factor;
    int seq; /* 0: 1024, or all tokens where it does not divide them */
    int seed;
    bool shared_weights; /* all experts get the values of the first: what is left to differ is the routing */
    size_t memory;       /* bytes that may be taken */
} LayerChoice;

typedef struct {
    Config config;
    RouterContext context;
    TensorList tensors;
    Chain chain;
    MoeScratch scratch;
    ChainScratch chain_scratch;
    Arena arena;
    acc_t *master, *grads, *staging, *load;
    real_t *weights, *x, *y, *dx, *dy;
    uint64_t *key; /* on the device: of the random numbers that are being made */
    int *demand, *tokens;
    int N, C;
} MoeBench;

/* 0, or the bytes that it would take where they are more than choice->memory: then nothing is open. */
size_t moe_bench_open(MoeBench *b, const LayerShape *shape, const LayerChoice *choice);
void moe_bench_close(MoeBench *b);

void moe_bench_forward(MoeBench *b, Profile *profile);
void moe_bench_backward(MoeBench *b, Profile *profile);

/* What the last forward did, over all steps of a chain. A layer without a router computes every token. */
typedef struct {
    double entries;    /* choices made, or slots */
    double accepted;   /* .. that got a row: rows that hold a token */
    double computed;   /* rows that the experts compute, padding included */
    double cv;         /* of the choices over the experts: standard deviation / mean */
    double max_vio;    /* (largest - mean) / mean */
    double token_drop; /* share of the tokens without any row */
} MoeBenchLoad;

MoeBenchLoad moe_bench_load(const MoeBench *b);

#endif
