/* Experts whose rows go elsewhere as they are made (experts_forward_to), as a case of case.h: every choice of a token
 * is stored at a home of its own, in the memories of several ranks, which here are pieces of one array.
 *
 *     x (N,C) --plan--> rows by expert --experts--> y (N,K,C), the choices of N / ranks tokens in each rank's piece
 *
 * and back by the same plan: dy (N,K,C) to rows, their dx to homes, the sum of a token's choices. In operations.h.
 */
#ifndef TESTS_OPERATIONS_HOME_H
#define TESTS_OPERATIONS_HOME_H

#include "operations_moe.h"

#include "../kernels/relay.h"

/* N C E K capacity layout drop skew, as dispatch has them; then: */
enum { HOME_H = 8, HOME_ACT, HOME_RANKS };

static inline ExpertShape home_shape(const Case *c) {
    return (ExpertShape){
        .E = c->plan.E, .C = c->n[1], .H = c->n[HOME_H], .rows = c->plan.rows, .act = (Activation)c->n[HOME_ACT]};
}

/* Row i of the choices (N*K, C), a part of them with each of the ranks, of which this one is not the first. */
static inline RowTarget homes_of(const Case *c, void *choices) {
    int ranks = c->n[HOME_RANKS];
    RowTarget to = {.entry = c->plan.entry, .ranks = ranks, .rank = ranks / 2};
    to.rows.places = c->plan.N * c->plan.K / ranks;
    for (int r = 0; r < ranks; r++) {
        to.rows.of[r] = (char *)choices + (size_t)r * to.rows.places * c->n[1] * sizeof(real_t);
    }
    return to;
}

static inline void make_home(Case *c) {
    add_given_plan(c);
    ExpertShape s = home_shape(c);
    size_t rows = (size_t)s.rows, A = (size_t)experts_a_width(s), E = (size_t)s.E, choices = (size_t)c->n[0] * c->n[3];
    add_input(c, "x", ACTIVATION, (size_t)c->n[0] * s.C, OVERWRITTEN);
    add_input(c, "w1", WEIGHT, E * A * s.C, OVERWRITTEN);
    add_input(c, "w2", WEIGHT, E * s.C * s.H, OVERWRITTEN);
    add_output(c, "y", ACTIVATION, choices * s.C);
    add_scratch(c, "dx_choices", ACTIVATION, choices * s.C);
    const char *row_arrays[] = {"rows_x", "rows_y", "rows_dy", "rows_dx"};
    for (int i = 0; i < 4; i++) {
        add_scratch(c, row_arrays[i], ACTIVATION, rows * s.C);
    }
    add_scratch(c, "a", ACTIVATION, rows * A);
    add_scratch(c, "da", ACTIVATION, rows * A);
    add_scratch(c, "h", ACTIVATION, rows * s.H);
    add_index(c, choices); /* row of the plan of what came back */
}

static inline void home_case_forward(Case *c) {
    const Plan *plan = &c->plan;
    ExpertShape s = home_shape(c);
    RowTarget to = homes_of(c, val(c, "y"));
    RowSource rows = dispatch_forward(val(c, "rows_x"), val(c, "x"), plan, s.C, NULL);
    if (!c->stores_bf16) {
        experts_forward_to(to, val(c, "rows_y"), val(c, "a"), val(c, "h"), rows, val(c, "w1"), val(c, "w2"),
                           plan->offset, s, NULL);
        return;
    }
    experts_stored_forward(c, val(c, "rows_y"), val(c, "a"), val(c, "h"), rows, val(c, "w1"), val(c, "w2"),
                           plan->offset, s, 0);
    rows_put(to, val(c, "rows_y"), plan->offset, s.E, s.rows, s.C, NULL);
}

static inline void home_case_backward(Case *c) {
    const Plan *plan = &c->plan;
    ExpertShape s = home_shape(c);
    Plan choices = *plan, back = {.N = plan->N, .K = plan->K, .row = c->index};
    RowTarget to = homes_of(c, val(c, "dx_choices"));
    choices.K = 1;
    choices.N = plan->N * plan->K;
    RowSource dy = dispatch_forward(val(c, "rows_dy"), grad(c, "y"), &choices, s.C, NULL);
    RowSource rows = dispatch_forward(val(c, "rows_x"), val(c, "x"), plan, s.C, NULL);
    if (!c->stores_bf16) {
        experts_backward_rows_to(to, val(c, "rows_dx"), NULL, val(c, "h"), val(c, "da"), dy, val(c, "a"), NULL,
                                 val(c, "w1"), val(c, "w2"), plan->offset, s, NULL);
        experts_backward_weights(grad(c, "w1"), grad(c, "w2"), val(c, "h"), val(c, "da"), dy, rows, plan->offset, s, 0,
                                 NULL);
    } else {
        experts_stored_backward(c, val(c, "rows_dx"), NULL, grad(c, "w1"), grad(c, "w2"), val(c, "h"), val(c, "da"), dy,
                                rows, val(c, "a"), NULL, val(c, "w1"), val(c, "w2"), plan->offset, s, 0, 0);
        rows_put(to, stored(c, val(c, "rows_dx")), plan->offset, s.E, s.rows, s.C, NULL);
    }
    relay_choices(&back, plan, NULL);
    dispatch_backward(grad(c, "x"), val(c, "dx_choices"), &back, s.C, 0, NULL);
}

#endif
