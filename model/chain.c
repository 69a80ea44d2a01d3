/* One loop over the steps, forward and back; with a single step it is the MoE layer itself. The equations are in
 * chain.h. */
#include "chain.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"
#include "../kernels/norm.h"
#include "../kernels/residual.h"

static void step_name(char *name, size_t size, int layer, int step, const char *part) {
    if (step == 0) {
        snprintf(name, size, "layers.%d.moe.%s", layer, part);
    } else {
        snprintf(name, size, "layers.%d.moe.chain%d.%s", layer, step + 1, part);
    }
}

int chain_routers(const ModelConfig *config, int layer) {
    return moe_is_routed(config, layer) ? config->chain_steps : 0;
}

void chain_tensors(TensorList *tensors, const ModelConfig *config, int layer) {
    moe_tensors(tensors, config, layer);
    for (int c = 0; c < chain_routers(config, layer); c++) {
        char name[64];
        const Router *router = router_find(config->router);
        step_name(name, sizeof name, layer, c, "router");
        if (router->tensors) {
            router->tensors(tensors, config, layer, name);
        }
        if (c > 0 && config->chain_norm) {
            step_name(name, sizeof name, layer, c, "norm.w");
            tensors_add(tensors, TENSOR_DENSE, layer, -1, config->dim, 0, 0, "%s", name);
        }
    }
}

void chain_reserve(Chain *chain, const Config *config, int layer, int N, const RouterContext *context, int first_site,
                   ScratchSize *size, Arena *arena) {
    const ModelConfig *c = &config->model;
    int routers = chain_routers(c, layer);
    *chain = (Chain){.N = N, .C = c->dim, .steps = routers > 0 ? routers : 1, .eps = c->norm_eps};
    chain->inner = routers > 0 && c->chain_inner;
    chain->outer = routers == 0 || c->chain_outer;
    chain->norm = routers > 0 && c->chain_norm;
    chain->moe = calloc(chain->steps, sizeof(MoeLayer));
    chain->step = calloc(chain->steps, sizeof(ChainStep));
    CHECK(chain->moe && chain->step, "out of memory for a chain of %d steps", chain->steps);
    for (int s = 0; s < chain->steps; s++) {
        moe_reserve(&chain->moe[s], config, layer, N, context, first_site + s, size, arena);
        size_t bytes = (size_t)N * c->dim * sizeof(real_t);
        if (s > 0) {
            arena_reserve(arena, (void **)&chain->step[s].x, bytes, MEMORY_ACTIVATIONS);
        }
        if (s > 0 && chain->norm) {
            arena_reserve(arena, (void **)&chain->step[s].xn, bytes, MEMORY_ACTIVATIONS);
            arena_reserve(arena, (void **)&chain->step[s].rstd, N * sizeof(acc_t), MEMORY_ACTIVATIONS);
        }
    }
}

void chain_reserve_scratch(ChainScratch *scratch, const ModelConfig *config, int N, Arena *arena) {
    size_t bytes = (size_t)N * config->dim * sizeof(real_t);
    if (config->chain_steps > 1) {
        arena_reserve(arena, (void **)&scratch->g, bytes, MEMORY_ACTIVATIONS);
        arena_reserve(arena, (void **)&scratch->du, bytes, MEMORY_ACTIVATIONS);
    }
}

void chain_free(Chain *chain) {
    for (int s = 0; s < chain->steps; s++) {
        moe_free(&chain->moe[s]);
    }
    free(chain->moe);
    free(chain->step);
}

void chain_connect(Chain *chain, const TensorList *tensors, int layer, real_t *weights, acc_t *master, acc_t *grads) {
    for (int s = 0; s < chain->steps; s++) {
        char name[64];
        step_name(name, sizeof name, layer, s, "router.");
        moe_connect(&chain->moe[s], tensors, layer, name, weights, master, grads);
        step_name(name, sizeof name, layer, s, "norm.w");
        int norm = s > 0 ? tensors_find(tensors, name) : -1;
        if (norm >= 0) {
            chain->step[s].norm = weights + tensors->items[norm].offset;
            chain->step[s].dnorm = grads ? grads + tensors->items[norm].offset : NULL;
        } else {
            chain->step[s].xn = chain->step[s].x;
        }
    }
}

void chain_forward(Chain *chain, MoeScratch *moe_scratch, real_t *branch, const real_t *xn, const real_t *h,
                   acc_t *load, int *demand, Profile *profile, Stream *stream) {
    size_t count = (size_t)chain->N * chain->C;
    const real_t *x = chain->norm ? h : xn; /* x_0, then x_1, ... */
    for (int s = 0; s < chain->steps; s++) {
        ChainStep *next = s + 1 < chain->steps ? &chain->step[s + 1] : NULL;
        real_t *out = next ? next->x : branch;
        moe_forward(&chain->moe[s], moe_scratch, out, s == 0 ? xn : chain->step[s].xn, load + s * LOAD_VALUES,
                    demand + s * chain->moe[s].plan.E, profile, stream);
        if (chain->inner) {
            residual_add(out, out, x, count, stream);
        }
        if (next && chain->norm) {
            norm_forward(NULL, next->xn, next->rstd, next->x, NULL, next->norm, chain->N, chain->C, chain->eps, stream);
        }
        x = out;
    }
}

void chain_backward(Chain *chain, ChainScratch *scratch, MoeScratch *moe_scratch, real_t *dxn, real_t *dh,
                    const real_t *xn, int add_dw, Profile *profile, Stream *stream) {
    size_t count = (size_t)chain->N * chain->C, bytes = count * sizeof(real_t);
    const real_t *g = dh; /* the gradient of x_c */
    for (int s = chain->steps - 1; s > 0; s--) {
        ChainStep *step = &chain->step[s];
        moe_backward(&chain->moe[s], moe_scratch, scratch->du, g, step->xn, add_dw, profile, stream);
        /* The steps before this one share its experts. */
        add_dw = 1;
        if (!chain->norm) { /* g = I g + du */
            if (chain->inner) {
                residual_add(scratch->g, g, scratch->du, count, stream);
            } else {
                device_copy(scratch->g, scratch->du, bytes, stream);
            }
        } else { /* g = I g + norm'(du) */
            if (!chain->inner) {
                device_zero(scratch->g, bytes, stream);
            } else if (g != scratch->g) {
                device_copy(scratch->g, g, bytes, stream);
            }
            norm_backward(scratch->g, step->dnorm, scratch->du, step->x, step->rstd, step->norm, chain->N, chain->C,
                          stream);
        }
        g = scratch->g;
    }
    moe_backward(&chain->moe[0], moe_scratch, dxn, g, xn, add_dw, profile, stream);
    if (chain->inner && !chain->norm) { /* x_0 is xn */
        residual_add(dxn, dxn, g, count, stream);
    }
    bool direct = chain->inner && chain->norm; /* x_0 is h */
    if (!chain->outer && direct && g != dh) {
        device_copy(dh, g, bytes, stream);
    } else if (!chain->outer && !direct) {
        device_zero(dh, bytes, stream);
    } else if (chain->outer && direct) {
        residual_add(dh, dh, g, count, stream);
    }
}
