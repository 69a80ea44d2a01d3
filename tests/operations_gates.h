/* The gates with a balance of their own as cases of case.h: noisy top-k with its importance and load losses,
 * sigmoid top-k with the loss per sequence.
 *
 * Choices, thresholds and kept groups jump, so a case is made anew until no two values that are compared lie close.
 * Their shapes are in the table of operations.h; test_noisy.c and test_sigmoid_topk.c have the values.
 */
#ifndef TESTS_OPERATIONS_GATES_H
#define TESTS_OPERATIONS_GATES_H

#include "operations_moe.h"

#include "../kernels/noisy.h"
#include "../kernels/sigmoid_topk.h"

/* Whether no two values of a row are so close that a perturbation of 1e-5 could change their order. */
static inline bool rows_are_clear(const acc_t *x, int N, int E) {
    for (int n = 0; n < N; n++) {
        for (int a = 0; a < E; a++) {
            for (int b = 0; b < a; b++) {
                if (fabs((double)x[n * E + a] - (double)x[n * E + b]) <= 1e-3) {
                    return false;
                }
            }
        }
    }
    return true;
}

/* ---- noisy */

static inline void noisy_case_forward(Case *c) { /* N E K */
    noisy_forward(val(c, "h"), val(c, "noise"), c->plan.expert, val(c, "weight"), val(c, "probs"), val(c, "clean"),
                  val(c, "raw"), c->structs[0].device, 1, c->n[0], c->n[1], c->n[2], NULL);
}

static inline bool noisy_suits(Case *c) {
    return c->n[0] > 64 || rows_are_clear(host_val(c, "h"), c->n[0], c->n[1]); /* large shapes are not perturbed */
}

static inline void make_noisy_arrays(Case *c, Mode mode) {
    int N = c->n[0], E = c->n[1], K = c->n[2];
    const uint64_t key = random_key(c->seed, RANDOM_TEST, 5);
    c->structs[0] = case_struct(c, &key, sizeof key);
    add_input(c, "clean", PRECISE, (size_t)N * E, mode);
    add_input(c, "raw", PRECISE, (size_t)N * E, mode);
    add_output(c, "weight", PRECISE, (size_t)N * K);
    add_saved(c, "probs", PRECISE, (size_t)N * E);
    add_saved(c, "noise", PRECISE, (size_t)N * E);
    add_saved(c, "h", PRECISE, (size_t)N * E);
    add_plan(c, N, E, K, 0, LAYOUT_COMPACT, DROP_TOKEN);
}

static inline void make_noisy(Case *c) {
    make_noisy_arrays(c, OVERWRITTEN);
}

static inline void noisy_case_backward(Case *c) {
    noisy_backward(grad(c, "clean"), grad(c, "raw"), grad(c, "weight"), val(c, "raw"), val(c, "noise"), c->plan.expert,
                   val(c, "weight"), c->n[0], c->n[1], c->n[2], NULL);
}

static inline void make_noisy_balance(Case *c) { /* N E K */
    make_noisy_arrays(c, ACCUMULATED);
    array_named(c, "weight")->role = ROLE_SAVED; /* the losses alone are the objective */
    add_load(c);
    add_saved(c, "sums", PRECISE, 2 * (size_t)c->n[1]);
}

static inline void noisy_balance_case_forward(Case *c) {
    noisy_case_forward(c);
    device_zero(val(c, "load"), LOAD_VALUES * sizeof(acc_t), NULL);
    noisy_balance_forward(val(c, "load"), val(c, "sums"), val(c, "clean"), val(c, "raw"), val(c, "h"), c->plan.expert,
                          val(c, "weight"), 1, c->n[0], c->n[1], c->n[2], NULL);
}

static inline void noisy_balance_case_backward(Case *c) {
    noisy_balance_backward(grad(c, "clean"), grad(c, "raw"), val(c, "load"), val(c, "sums"), val(c, "clean"),
                           val(c, "raw"), val(c, "noise"), val(c, "h"), c->plan.expert, val(c, "weight"),
                           balance_upstream[LOAD_BALANCE], c->n[0], c->n[1], c->n[2], NULL);
}

/* ---- sigmoid */

static inline SigmoidShape sigmoid_case_shape(const Case *c) { /* N E K T groups kept renorm tenths of scale */
    return (SigmoidShape){.N = c->n[0],
                          .E = c->n[1],
                          .K = c->n[2],
                          .T = c->n[3],
                          .groups = c->n[4],
                          .kept = c->n[5],
                          .renorm = c->n[6],
                          .scale = 0.1 * c->n[7]};
}

static inline void sigmoid_case_forward(Case *c) {
    sigmoid_topk_forward(val(c, "scores"), val(c, "probs"), c->plan.expert, val(c, "weight"), val(c, "logits"),
                         val(c, "bias"), sigmoid_case_shape(c), NULL);
}

/* Whether neither the order of s + b nor that of the groups' scores is in danger. */
static inline bool sigmoid_suits(Case *c) {
    SigmoidShape shape = sigmoid_case_shape(c);
    const acc_t *scores = host_val(c, "scores"), *bias = host_val(c, "bias");
    int size = shape.E / shape.groups;
    Case scratch = {0};
    acc_t *biased = case_reals(&scratch, (size_t)shape.E), *group = case_reals(&scratch, (size_t)shape.groups);
    bool clear = true;
    for (int n = 0; n < shape.N && shape.N <= 64 && clear; n++) {
        for (int e = 0; e < shape.E; e++) {
            biased[e] = scores[n * shape.E + e] + bias[e];
        }
        for (int g = 0; g < shape.groups; g++) {
            double first = -INFINITY, second = -INFINITY;
            for (int e = g * size; e < (g + 1) * size; e++) {
                second = fmax(second, fmin(first, (double)biased[e]));
                first = fmax(first, (double)biased[e]);
            }
            group[g] = (acc_t)(first + (size > 1 ? second : 0));
        }
        clear = rows_are_clear(biased, 1, shape.E) && rows_are_clear(group, 1, shape.groups);
    }
    case_free(&scratch);
    return clear;
}

static inline void make_sigmoid_arrays(Case *c, Mode mode) {
    int N = c->n[0], E = c->n[1], K = c->n[2];
    add_input(c, "logits", PRECISE, (size_t)N * E, mode);
    add_output(c, "weight", PRECISE, (size_t)N * K);
    add_saved(c, "scores", PRECISE, (size_t)N * E);
    add_saved(c, "probs", PRECISE, (size_t)N * E);
    fill_normal(add_given(c, "bias", PRECISE, (size_t)E), (size_t)E, 0, 0.3, c->seed, 6);
    add_plan(c, N, E, K, 0, LAYOUT_COMPACT, DROP_TOKEN);
}

static inline void make_sigmoid(Case *c) {
    make_sigmoid_arrays(c, OVERWRITTEN);
}

static inline void sigmoid_case_backward(Case *c) {
    sigmoid_topk_backward(grad(c, "logits"), grad(c, "weight"), val(c, "scores"), c->plan.expert, val(c, "weight"),
                          sigmoid_case_shape(c), NULL);
}

static inline void make_sequence_balance(Case *c) {
    make_sigmoid_arrays(c, ACCUMULATED);
    array_named(c, "weight")->role = ROLE_SAVED;
    add_load(c);
}

static inline void sequence_balance_case_forward(Case *c) {
    sigmoid_case_forward(c);
    device_zero(val(c, "load"), LOAD_VALUES * sizeof(acc_t), NULL);
    sequence_balance_forward(val(c, "load"), val(c, "probs"), c->plan.expert, sigmoid_case_shape(c), NULL);
}

static inline void sequence_balance_case_backward(Case *c) {
    sequence_balance_backward(grad(c, "logits"), val(c, "load"), val(c, "scores"), val(c, "probs"), c->plan.expert,
                              balance_upstream[LOAD_BALANCE], sigmoid_case_shape(c), NULL);
}

#endif
