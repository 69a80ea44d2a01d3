/* The tensor list: layout of the flat buffers and initial values. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../model/tensors.h"

static void test_layout(void **unused) {
    TensorList list = {0};
    assert_int_equal(tensors_add(&list, TENSOR_DENSE, -1, -1, 5, 0, 0, "norm"), 0);
    assert_int_equal(tensors_add(&list, TENSOR_ROUTER, 3, 0.02, 4, 8, 0, "layers.%d.router", 3), 1);
    assert_int_equal(tensors_add(&list, TENSOR_EXPERT, 3, 0.02, 2, 3, 7, "layers.%d.w%d", 3, 1), 2);
    const Tensor *t = list.items;
    assert_string_equal(t[1].name, "layers.3.router");
    assert_string_equal(t[2].name, "layers.3.w1");
    assert_int_equal(t[0].ndim, 1);
    assert_int_equal(t[1].ndim, 2);
    assert_int_equal(t[2].ndim, 3);
    assert_false(t[0].decay);
    assert_true(t[1].decay && t[2].decay);
    assert_int_equal(t[2].kind, TENSOR_EXPERT);
    assert_int_equal(t[2].layer, 3);
    assert_int_equal(t[0].count, 5);
    assert_int_equal(t[1].count, 32);
    assert_int_equal(t[2].count, 42);
    assert_int_equal(t[0].offset, 0);
    assert_int_equal(t[1].offset, 16);
    assert_int_equal(t[2].offset, 48);
    assert_int_equal(list.total, 96);
    assert_int_equal(tensors_parameters(&list), 79);
    tensors_free(&list);
    assert_int_equal(list.count, 0);
}

static void test_list_grows(void **unused) {
    TensorList list = {0};
    for (int i = 0; i < 1000; i++) {
        assert_int_equal(tensors_add(&list, TENSOR_DENSE, i, 0, i + 1, 0, 0, "t%d", i), i);
    }
    for (int i = 0; i < 1000; i++) {
        size_t end = i + 1 < 1000 ? list.items[i + 1].offset : list.total;
        assert_int_equal(list.items[i].offset % 16, 0);
        assert_true(end >= list.items[i].offset + list.items[i].count);
        assert_true(end < list.items[i].offset + list.items[i].count + 16);
    }
    tensors_free(&list);
}

static acc_t *init(const TensorList *list, uint64_t seed) {
    acc_t *values = malloc(list->total * sizeof *values);
    memset(values, 0xff, list->total * sizeof *values);
    tensors_init(list, values, seed);
    return values;
}

static void test_zeros_ones_and_gaps(void **unused) {
    TensorList list = {0};
    tensors_add(&list, TENSOR_DENSE, -1, 0, 3, 0, 0, "zeros");
    tensors_add(&list, TENSOR_DENSE, -1, -1, 3, 0, 0, "ones");
    acc_t *values = init(&list, 1);
    for (int i = 0; i < 32; i++) {
        assert_true(values[i] == (i >= 16 && i < 19 ? 1 : 0));
    }
    free(values);
    tensors_free(&list);
}

static void test_values_depend_on_name_and_seed_alone(void **unused) {
    TensorList one = {0}, two = {0};
    tensors_add(&one, TENSOR_DENSE, 0, 0.5, 100, 0, 0, "a");
    tensors_add(&two, TENSOR_DENSE, 0, 0.1, 33, 0, 0, "before");
    tensors_add(&two, TENSOR_ROUTER, 7, 0.5, 10, 10, 0, "a"); /* another place, shape and kind */
    tensors_add(&two, TENSOR_DENSE, 0, 0.5, 100, 0, 0, "b");
    acc_t *x = init(&one, 1), *y = init(&two, 1), *z = init(&one, 2);
    size_t bytes = 100 * sizeof *x;
    assert_memory_equal(x, y + two.items[1].offset, bytes);
    assert_memory_not_equal(x, y + two.items[2].offset, bytes);
    assert_memory_not_equal(x, z, bytes);
    free(x), free(y), free(z);
    tensors_free(&one), tensors_free(&two);
}

static void test_values_are_normal(void **unused) {
    TensorList list = {0};
    const int n = 1 << 20;
    const double std = 0.02;
    tensors_add(&list, TENSOR_DENSE, 0, std, n, 0, 0, "w");
    acc_t *values = init(&list, 3);
    double moment[5] = {0};
    for (int i = 0; i < n; i++) {
        double power = 1;
        for (int k = 1; k <= 4; k++) {
            power *= values[i] / std;
            moment[k] += power / n;
        }
    }
    /* moments of the standard normal are 0, 1, 0, 3; six standard deviations of their estimates */
    const double sigma = 6 / sqrt(n);
    assert_true(fabs(moment[1]) < sigma * 1);
    assert_true(fabs(moment[2] - 1) < sigma * sqrt(2));
    assert_true(fabs(moment[3]) < sigma * sqrt(15));
    assert_true(fabs(moment[4] - 3) < sigma * sqrt(96));
    free(values);
    tensors_free(&list);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_layout),
        cmocka_unit_test(test_list_grows),
        cmocka_unit_test(test_zeros_ones_and_gaps),
        cmocka_unit_test(test_values_depend_on_name_and_seed_alone),
        cmocka_unit_test(test_values_are_normal),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
