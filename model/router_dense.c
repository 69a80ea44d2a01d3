/* dense: no routing. Every layer is one MLP of the width that a token would meet in its K experts and the shared ones:
 * the control with equal work per token that every comparison needs.
 */
#include "../kernels/check.h"
#include "router.h"

static void check(const Config *config) {
    CHECK(config->model.capacity_factor == 0, "--router dense has no experts to fill: drop --capacity-factor");
}

const Router router_dense = {
    .name = "dense",
    .summary = "one MLP of the active width: the control",
    .paper = "",
    .plan = PLAN_NONE,
    .check = check,
};
