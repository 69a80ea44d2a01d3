/* The list of routers. */
#include "router.h"

#include <string.h>

extern const Router router_dense, router_top1, router_topk;

static const Router *const ROUTERS[] = {&router_dense, &router_top1, &router_topk};

enum { ROUTER_COUNT = sizeof ROUTERS / sizeof ROUTERS[0] };

const Router *router_at(int i) {
    return i >= 0 && i < ROUTER_COUNT ? ROUTERS[i] : NULL;
}

const Router *router_find(const char *name) {
    for (int i = 0; i < ROUTER_COUNT; i++) {
        if (strcmp(ROUTERS[i]->name, name) == 0) {
            return ROUTERS[i];
        }
    }
    return NULL;
}

const char *router_names(void) {
    return "dense, top1, topk";
}
