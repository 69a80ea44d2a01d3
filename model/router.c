/* The list of routers: to add one, name its table here. Below it, what their random numbers depend on. */
#include "router.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"
#include "../kernels/random.h"

#define ROUTERS(each)                                                                                        \
    each(dense) each(top1) each(topk) each(noisy) each(sigmoid) each(hash) each(position) each(random)       \
        each(random_step) each(expert_choice) each(threshold) each(soft) each(soft_batch) each(soft_uniform) \
            each(uniform_soft) each(uniform_uniform) each(soft_identity) each(soft_token) each(coe) each(forced)

#define DECLARE(name) extern const Router router_##name;
ROUTERS(DECLARE)

#define ADDRESS(name) &router_##name,
static const Router *const routers[] = {ROUTERS(ADDRESS)};

enum { ROUTER_COUNT = sizeof routers / sizeof routers[0] };

const Router *router_at(int i) {
    return i >= 0 && i < ROUTER_COUNT ? routers[i] : NULL;
}

const Router *router_find(const char *name) {
    for (int i = 0; i < ROUTER_COUNT; i++) {
        if (strcmp(routers[i]->name, name) == 0) {
            return routers[i];
        }
    }
    return NULL;
}

const char *router_names(void) {
    static char names[512];
    size_t used = 0;
    for (int i = 0; i < ROUTER_COUNT && used < sizeof names; i++) {
        used += (size_t)snprintf(names + used, sizeof names - used, "%s%s", i > 0 ? ", " : "", routers[i]->name);
    }
    return names;
}

/* ---- the step at hand, and its random numbers */

static size_t step_bytes(const RouterContext *c) {
    return sizeof(RouterStep) + (size_t)c->slices * c->routers * sizeof(uint64_t);
}

void router_context_reserve(RouterContext *context, Arena *arena) {
    context->host_step = calloc(1, step_bytes(context));
    CHECK(context->host_step, "out of memory for the keys of %d slices: lower --grad-accum", context->slices);
    arena_reserve(arena, (void **)&context->step, step_bytes(context), MEMORY_ACTIVATIONS);
}

void router_context_free(RouterContext *context) {
    free(context->host_step);
}

void router_context_set_step(RouterContext *context, int64_t step, Stream *stream) {
    RouterStep *next = context->host_step;
    next->number = step;
    for (int slice = 0; slice < context->slices; slice++) {
        uint64_t forward = (uint64_t)step * (uint64_t)context->slices + (uint64_t)slice;
        for (int site = 0; site < context->routers; site++) {
            next->key[slice * context->routers + site] =
                random_key(context->seed, RANDOM_ROUTER, random_mix(forward) ^ (uint64_t)site);
        }
    }
    device_from_host(context->step, next, step_bytes(context), stream);
}

const uint64_t *router_key(const RouterPass *pass) {
    const RouterContext *c = pass->context;
    return &c->step->key[c->slice * c->routers + pass->site];
}
