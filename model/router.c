/* The list of routers. */
#include "router.h"

#include <stdio.h>
#include <string.h>

#define ROUTERS(each) each(dense) each(top1) each(topk)

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
#define NAME(name) ", " #name
    return &ROUTERS(NAME)[2]; /* past the first comma */
}
