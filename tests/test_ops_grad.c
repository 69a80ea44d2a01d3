// build: double
/* The backward of every operation against central differences of its forward: every input and parameter, each under its
 * own name.
 *
 *     | analytic - numeric | / (|analytic| + |numeric|) <= 1e-6
 *     numeric_i = (J(x + h e_i) - J(x - h e_i)) / 2h,   h = 1e-5
 *
 * The operations and their shapes are the table of operations.h; this file runs it. It needs the build in which all
 * numbers are double (-DREAL_DOUBLE): in float the differences have no digits left.
 */
#include "operations.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>

#include <cmocka.h>

#ifndef REAL_DOUBLE
#error "build this test with -DREAL_DOUBLE"
#endif

static void test_gradients(void **state) {
    const Operation *op = *state;
    int wrong = 0, shapes = 0;
    omp_set_num_threads(2);
    for (int i = 0; op->shapes[i][0] > 0; i++, shapes++) {
        Case c;
        case_make(&c, op, op->shapes[i], (uint64_t)i + 1);
        wrong += gradients_wrong(op, &c, op->zero[i]);
        case_free(&c);
    }
    assert_true(shapes > 0);
    assert_int_equal(wrong, 0);
}

/* A check that cannot fail proves nothing: one element of one gradient off by 1e-4 of its size must be found. */
static void spoiled_backward(Case *c) {
    moe_case_backward(c);
    Array *gate = array_named(c, "gate");
    gate->gradient[3] += 1e-4 * (gate->gradient[3] - gate->before[3]);
}

static void test_finds_a_wrong_gradient(void **state) {
    Operation op = *operation_named("moe_layer");
    op.backward = spoiled_backward;
    op.name = "moe_layer, spoiled on purpose";
    Case c;
    case_make(&c, &op, op.shapes[0], 1);
    assert_int_equal(gradients_wrong(&op, &c, NULL), 1);
    case_free(&c);
}

int main(void) {
    struct CMUnitTest tests[64] = {cmocka_unit_test(test_finds_a_wrong_gradient)};
    size_t count = 1;
    for (size_t i = 0; operation_at(i); i++) {
        const Operation *op = operation_at(i);
        if (!op->backward) {
            continue;
        }
        tests[count++] = (struct CMUnitTest){op->name, test_gradients, NULL, NULL, (void *)(uintptr_t)op};
    }
    CHECK(count < sizeof tests / sizeof *tests, "raise the size of tests[]");
    return _cmocka_run_group_tests("operations: gradients", tests, count, NULL, NULL);
}
