/* The toy mixture of experiments/specialise_toy.h: its gradient by central differences, its floor by the two properties
 * that make it one, its figures on models whose answers are known.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "../experiments/specialise_toy.h"

static ToyData data;
static ToyModel model, gradient;

static void check_derivative(double *weight, double derivative, double explore, double balance_coef) {
    const double h = 1e-5;
    double kept = *weight;
    *weight = kept + h;
    double above = toy_objective(NULL, &model, &data, explore, balance_coef);
    *weight = kept - h;
    double below = toy_objective(NULL, &model, &data, explore, balance_coef);
    *weight = kept;
    double numeric = (above - below) / (2 * h);
    if (!(fabs(numeric - derivative) < 1e-7 * (1 + fabs(numeric)))) {
        fail_msg("explore %g, balance %g: %.12g, by differences %.12g", explore, balance_coef, derivative, numeric);
    }
}

static void test_gradient(void **state) {
    const double cases[][2] = {{0, 0}, {1, 0}, {0.3, 0}, {0, 2}, {0.6, 0.5}};
    toy_data(&data, 5);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        toy_init(&model, 6 + i, 0.7, 0.4);
        toy_objective(&gradient, &model, &data, cases[i][0], cases[i][1]);
        double largest = 0;
        for (int k = 0; k < EXPERTS * IN * OUT; k++) {
            check_derivative(&model.expert[0][0][0] + k, (&gradient.expert[0][0][0])[k], cases[i][0], cases[i][1]);
        }
        for (int k = 0; k < IN * EXPERTS; k++) {
            double derivative = (&gradient.gate[0][0])[k];
            check_derivative(&model.gate[0][0] + k, derivative, cases[i][0], cases[i][1]);
            largest = fmax(largest, fabs(derivative));
        }
        assert_true(cases[i][0] == 1 ? largest == 0 : largest > 1e-3); /* chance has nothing to learn */
    }
}

/* Samples of task `task` alone, in place of all. */
static void only_task(ToyData *part, int task) {
    for (int n = 0; n < N; n++) {
        int from = n / TASKS * TASKS + task;
        memcpy(part->x[n], data.x[from], sizeof part->x[n]);
        memcpy(part->y[n], data.y[from], sizeof part->y[n]);
    }
}

/* Alike experts of any weights are above the floor, whatever the gate; descent under chance comes down to it. */
static void test_floor_is_that_of_alike_experts(void **state) {
    for (uint64_t seed = 1; seed <= 2; seed++) {
        toy_data(&data, seed);
        double floor = toy_floor(&data);
        toy_init(&model, seed, 0.1, 1);
        for (int e = 1; e < EXPERTS; e++) {
            memcpy(model.expert[e], model.expert[0], sizeof model.expert[0]);
        }
        for (int step = 0; step < 2000; step++) {
            double loss = toy_objective(&gradient, &model, &data, 1, 0);
            assert_true(loss > floor * (1 - 1e-12));
            for (int k = 0; k < EXPERTS * IN * OUT; k++) {
                (&model.expert[0][0][0])[k] -= 0.1 * (&gradient.expert[0][0][0])[k];
            }
        }
        ToyFigures f = toy_measure(&model, &data);
        assert_true(floor > 1 && fabs(f.loss - floor) < 1e-9 * floor && fabs(f.oracle - floor) < 1e-9 * floor);
        static ToyData part; /* a single task has no floor: one expert can do it */
        only_task(&part, 2);
        assert_true(fabs(toy_floor(&part)) < 1e-20);
    }
}

/* The mixture that specialise_toy.h says to exist: an expert for each task, and a gate that finds them. */
static void test_each_task_its_expert(void **state) {
    toy_data(&data, 3);
    toy_init(&model, 3, 0, 0);
    uint64_t tasks = random_key(3, RANDOM_TRAIN_DATA, 0);
    const int owner[TASKS] = {2, 0, 3, 1};
    for (int s = 0; s < TASKS; s++) {
        model.gate[s][owner[s]] = 50;
        for (int k = 0; k < IN * OUT; k++) {
            (&model.expert[owner[s]][0][0])[k] = random_normal(tasks, (uint64_t)(s * IN * OUT + k));
        }
    }
    ToyFigures f = toy_measure(&model, &data);
    assert_true(f.loss < 1e-24 && f.oracle < 1e-24 && fabs(f.nmi - 1) < 1e-12 && f.entropy < 1e-9);
    assert_true(toy_objective(NULL, &model, &data, 0, 0) < 1e-12);
    assert_true(fabs(toy_objective(NULL, &model, &data, 0, 1) - 1) < 1e-9); /* experts are used alike */
}

static void test_one_expert_for_all(void **state) {
    toy_data(&data, 3);
    toy_init(&model, 3, 1, 0);
    ToyFigures f = toy_measure(&model, &data);
    assert_true(fabs(f.entropy - log(EXPERTS)) < 1e-12);
    for (int s = 0; s < TASKS; s++) {
        model.gate[s][1] = 50;
    }
    f = toy_measure(&model, &data);
    assert_true(fabs(f.nmi) < 1e-12 && f.loss > f.oracle);
    model.gate[2][1] = 0; /* task 2 to another: H(task | expert) = 3/4 ln 3 */
    model.gate[2][3] = 50;
    f = toy_measure(&model, &data);
    double shared = log(4) - 0.75 * log(3);
    assert_true(fabs(f.nmi - 2 * shared / (log(4) + shared)) < 1e-12);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gradient),
        cmocka_unit_test(test_floor_is_that_of_alike_experts),
        cmocka_unit_test(test_each_task_its_expert),
        cmocka_unit_test(test_one_expert_for_all),
    };
    return cmocka_run_group_tests_name("specialise_toy", tests, NULL, NULL);
}
