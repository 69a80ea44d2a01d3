/* The operations of a soft plan as cases of case.h: the router, and the mixtures before and after the experts.
 *
 * Nothing is chosen, so every random input suits. Their shapes are in the table of operations.h; test_soft_mix.c has
 * the values.
 */
#ifndef TESTS_OPERATIONS_SOFT_H
#define TESTS_OPERATIONS_SOFT_H

#include "gradcheck.h"

#include "../kernels/soft_mix.h"

/* The plan of the extents "N C E slots group across". */
static inline Plan soft_case_plan(const Case *c) {
    int N = c->n[0], E = c->n[2], slots = c->n[3], group = c->n[4];
    return (Plan){.N = N,
                  .E = E,
                  .K = E * slots,
                  .rows = E * (N / group) * slots,
                  .slots = slots,
                  .group_tokens = group,
                  .across = c->n[5]};
}

/* The seventh extent of soft_route: what mix is (Mixture), and three times what weight is. */
static inline Mixture soft_case_mix(const Case *c) {
    return (Mixture)(c->n[6] % 3);
}

static inline Mixture soft_case_weight(const Case *c) {
    return (Mixture)(c->n[6] / 3);
}

static inline void make_soft_route(Case *c) { /* N C E slots group across fixed */
    Plan plan = soft_case_plan(c);
    size_t N = (size_t)plan.N, K = (size_t)plan.K, C = (size_t)c->n[1];
    add_input(c, "x", ACTIVATION, N * C, ACCUMULATED);
    add_input(c, "phi", PRECISE, K * C, ACCUMULATED);
    add_input(c, "scale", PRECISE, 1, ACCUMULATED);
    fill_value(host_val(c, "scale"), 1, 2.5); /* cosines are small: without it both softmaxes would be nearly uniform */
    add_output(c, "mix", PRECISE, N * K);
    add_output(c, "weight", PRECISE, N * K);
    add_saved(c, "logits", PRECISE, N * K);
    add_saved(c, "x_inverse", PRECISE, N);
    add_saved(c, "phi_inverse", PRECISE, K);
    add_saved(c, "share", PRECISE, N * plan.E);
    add_scratch(c, "dlogits", PRECISE, N * K);
    c->plan = plan;
    c->plan.mix = val(c, "mix");
    c->plan.weight = val(c, "weight");
}

static inline void soft_route_case_forward(Case *c) {
    soft_route_forward(val(c, "logits"), &c->plan, val(c, "x_inverse"), val(c, "phi_inverse"), val(c, "x"),
                       val(c, "phi"), val(c, "scale"), c->n[1], NULL);
    soft_fix_mix(&c->plan, soft_case_mix(c), NULL);
    soft_fix_weight(&c->plan, soft_case_weight(c), NULL);
    soft_expert_share(val(c, "share"), &c->plan, NULL);
}

static inline void soft_route_case_backward(Case *c) {
    soft_logits_backward(val(c, "dlogits"), soft_case_weight(c) == MIXTURE_LEARNED ? grad(c, "weight") : NULL,
                         soft_case_mix(c) == MIXTURE_LEARNED ? grad(c, "mix") : NULL, &c->plan, NULL);
    soft_route_backward(grad(c, "x"), grad(c, "phi"), grad(c, "scale"), val(c, "dlogits"), val(c, "logits"),
                        val(c, "x_inverse"), val(c, "phi_inverse"), val(c, "x"), val(c, "phi"), val(c, "scale"),
                        &c->plan, c->n[1], NULL);
}

static inline void make_soft_dispatch(Case *c) { /* N C E slots group across accumulate */
    Plan plan = soft_case_plan(c);
    add_input(c, "x", ACTIVATION, (size_t)plan.N * c->n[1], c->n[6] ? ACCUMULATED : OVERWRITTEN);
    add_input(c, "mix", PRECISE, (size_t)plan.N * plan.K, OVERWRITTEN);
    add_output(c, "rows", ACTIVATION, (size_t)plan.rows * c->n[1]);
    c->plan = plan;
    c->plan.mix = val(c, "mix");
}

static inline void soft_dispatch_case_forward(Case *c) {
    soft_dispatch_forward(val(c, "rows"), val(c, "x"), &c->plan, c->n[1], NULL);
}

static inline void soft_dispatch_case_backward(Case *c) {
    soft_dispatch_backward(grad(c, "x"), grad(c, "mix"), grad(c, "rows"), val(c, "x"), &c->plan, c->n[1], c->n[6],
                           NULL);
}

static inline void make_soft_combine(Case *c) { /* as dispatch; accumulate is of y */
    Plan plan = soft_case_plan(c);
    add_input(c, "rows", ACTIVATION, (size_t)plan.rows * c->n[1], OVERWRITTEN);
    add_input(c, "weight", PRECISE, (size_t)plan.N * plan.K, OVERWRITTEN);
    add_output(c, "y", ACTIVATION, (size_t)plan.N * c->n[1]);
    array_named(c, "y")->mode = c->n[6] ? ACCUMULATED : OVERWRITTEN;
    c->plan = plan;
    c->plan.weight = val(c, "weight");
}

static inline void soft_combine_case_forward(Case *c) {
    soft_combine_forward(val(c, "y"), val(c, "rows"), &c->plan, c->n[1], c->n[6], NULL);
}

static inline void soft_combine_case_backward(Case *c) {
    soft_combine_backward(grad(c, "rows"), grad(c, "weight"), grad(c, "y"), val(c, "rows"), &c->plan, c->n[1], NULL);
}

#endif
