/* What experiments/bench_times.c says of times: quantiles, and the interval of the repeats' medians, on numbers whose
 * answers are known.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "../experiments/bench_times.c"

static void assert_near(double value, double expected) {
    assert_true(fabs(value - expected) < 1e-9);
}

static void test_repeats(void **state) {
    const double ms[3][3] = {{4, 1, 9}, {2, 6, 3}, {5, 8, 8}}; /* medians 4, 3, 8 */
    Times times = {0};
    for (int r = 0; r < 3; r++) {
        for (int i = 0; i < 3; i++) {
            times_add(&times, ms[r][i]);
        }
        assert_true(r > 0 || isnan(times_half_width(&times)));
        times_end_repeat(&times);
        times_end_repeat(&times); /* without a call since: none */
    }
    assert_int_equal(times.repeats, 3);
    assert_near(times_mean(&times), 5);
    /* Student's t 4.303 x standard deviation sqrt(7) / sqrt(3) */
    assert_near(times_half_width(&times), 4.303 * 2.6457513110645906 / 1.7320508075688772);
    assert_near(times_median(&times), 5);
    times_free(&times);
    assert_true(isnan(times_half_width(&times)));
}

static void test_quantiles(void **state) {
    Times times = {0};
    assert_near(times_median(&times), 0);
    for (int i = 0; i < 100; i++) {
        times_add(&times, (i * 37) % 100); /* 0 .. 99, mixed */
    }
    assert_near(times_median(&times), 50);
    assert_near(times_quantile(&times, 0.95), 94);
    times_free(&times);
    times_add(&times, 3);
    times_add(&times, 7);
    assert_near(times_median(&times), 7); /* of two the larger, for every quantile */
    assert_near(times_quantile(&times, 0.95), 7);
    times_free(&times);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_repeats), cmocka_unit_test(test_quantiles)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
