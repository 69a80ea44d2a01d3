/* The list of routers: to add one, name its table here. */
#include "router.h"

#include <stdio.h>
#include <string.h>

#include "../kernels/random.h"

#define ROUTERS(each)                                                                                                \
    each(dense) each(top1) each(topk) each(noisy) each(sigmoid) each(hash) each(position) each(random)               \
        each(random_step) each(expert_choice) each(threshold) each(soft) each(soft_batch) each(soft_token) each(coe) \
            each(forced)

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

uint64_t router_key(const RouterPass *pass) {
    const RouterContext *c = pass->context;
    uint64_t forward = (uint64_t)c->step * (uint64_t)c->slices + (uint64_t)c->slice;
    return random_key(c->seed, RANDOM_ROUTER, random_mix(forward) ^ (uint64_t)pass->site);
}
