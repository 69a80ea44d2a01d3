/* The wire's small formats: every value against the compiler's own conversions where it has them, else against the list
 * of all values of the format; rows with scales; what is not finite. */
#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "../kernels/random.h"
#include "../kernels/wire.h"

enum { ROWS = 64, C = 37 };

/* There and back. */
static void travel(real_t *back, const real_t *x, WireType type, int rows, int columns) {
    unsigned char *packed = malloc(rows * wire_row_bytes(type, columns));
    wire_pack(packed, x, type, rows, columns, NULL);
    wire_unpack(back, packed, type, rows, columns, NULL);
    free(packed);
}

static real_t travelled(double value, WireType type) {
    real_t x = value, back;
    travel(&back, &x, type, 1, 1);
    return back;
}

static void test_row_bytes(void **state) {
    assert_int_equal(wire_row_bytes(WIRE_SAME, 37), 37 * sizeof(real_t));
    assert_int_equal(wire_row_bytes(WIRE_FP32, 37), 160);
    assert_int_equal(wire_row_bytes(WIRE_BF16, 64), 128);
    assert_int_equal(wire_row_bytes(WIRE_FP16, 37), 80);
    assert_int_equal(wire_row_bytes(WIRE_FP8, 64), 80);
    assert_int_equal(wire_row_bytes(WIRE_FP8, 12), 16);
}

/* The nearest value that sign, exponent and fraction can make, by trying all of them: ties to the even fraction. */
static double nearest(double x, int exponent, int fraction, double largest) {
    int bias = (1 << (exponent - 1)) - 1;
    double best = 0, distance = INFINITY;
    for (unsigned bits = 0; bits < 1u << (exponent + fraction); bits++) {
        int e = (int)(bits >> fraction), m = (int)(bits & ((1u << fraction) - 1));
        double value = e ? ldexp(1 + ldexp(m, -fraction), e - bias) : ldexp(m, 1 - bias - fraction);
        double away = fabs(fabs(x) - value);
        if (value <= largest && (away < distance || (away == distance && m % 2 == 0))) {
            best = value;
            distance = away;
        }
    }
    return copysign(best, x);
}

static void check_format(WireType type, int exponent, int fraction, double largest, double scale) {
    uint64_t key = random_key(7, RANDOM_INIT, type);
    for (int i = 0; i < 200; i++) {
        double x = scale * random_normal(key, i) * pow(2, i % 30 - 20);
        float single = (float)x;
        if (fabsf(single) < largest) {
            assert_float_equal(travelled(single, type), nearest(single, exponent, fraction, largest), 0);
        }
    }
}

static void test_fp16_is_the_nearest(void **state) {
    check_format(WIRE_FP16, 5, 10, 65504, 30);
    assert_float_equal(travelled(65504, WIRE_FP16), 65504, 0);
    assert_float_equal(travelled(1 + ldexp(1, -11), WIRE_FP16), 1, 0);
    assert_float_equal(travelled(1 + 3 * ldexp(1, -11), WIRE_FP16), 1 + ldexp(1, -9), 0);
    assert_float_equal(travelled(ldexp(1, -24), WIRE_FP16), ldexp(1, -24), 0);
    assert_true(isinf((double)travelled(65520, WIRE_FP16)));
}

/* bf16 is the upper half of a float, rounded. */
static void test_bf16_is_the_nearest(void **state) {
    uint64_t key = random_key(8, RANDOM_INIT, 0);
    for (int i = 0; i < 1000; i++) {
        float x = (float)(random_normal(key, i) * pow(2, i % 60 - 30));
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
        memcpy(&x, &bits, sizeof bits);
        assert_float_equal(travelled((float)(random_normal(key, i) * pow(2, i % 60 - 30)), WIRE_BF16), x, 0);
    }
}

/* A row whose largest is 448 has the scale 1: then the numbers are those of E4M3. */
static void test_fp8_is_the_nearest(void **state) {
    uint64_t key = random_key(9, RANDOM_INIT, 0);
    for (int i = 0; i < 300; i++) {
        real_t x[2] = {448, (float)(random_normal(key, i) * pow(2, i % 16 - 8))}, back[2];
        travel(back, x, WIRE_FP8, 1, 2);
        assert_float_equal(back[0], 448, 0);
        assert_float_equal(back[1], nearest(x[1], 4, 3, 448), 0);
    }
}

/* What each format may lose at most of a row's largest number. */
static void test_rows_are_close(void **state) {
    static const double allowed[] = {
        [WIRE_FP32] = 6e-8, [WIRE_BF16] = 1.0 / 256, [WIRE_FP16] = 1.0 / 2048, [WIRE_FP8] = 1.0 / 16};
    static real_t x[ROWS * C], back[ROWS * C];
    uint64_t key = random_key(10, RANDOM_INIT, 0);
    for (int i = 0; i < ROWS * C; i++) {
        x[i] = random_normal(key, i) * pow(10, i / C % 9 - 4);
    }
    for (WireType type = WIRE_FP32; type <= WIRE_FP8; type++) {
        travel(back, x, type, ROWS, C);
        for (int r = 0; r < ROWS; r++) {
            double largest = 0, worst = 0;
            for (int c = 0; c < C; c++) {
                largest = fmax(largest, fabs((double)x[r * C + c]));
                worst = fmax(worst, fabs((double)x[r * C + c] - (double)back[r * C + c]));
            }
            assert_true(worst <= allowed[type] * largest);
            assert_true(worst > 0 || type == WIRE_FP32); /* it does round */
        }
    }
}

static void test_zeros_and_what_is_not_finite(void **state) {
    for (WireType type = WIRE_FP32; type <= WIRE_FP8; type++) {
        real_t x[4] = {0, -0.0, 1, -2}, back[4];
        travel(back, x, type, 1, 2);
        assert_float_equal(back[0], 0, 0);
        assert_true(signbit((double)back[1]));
        x[1] = NAN;
        travel(back, x, type, 1, 4);
        assert_true(isnan((double)back[1]));
        x[1] = -INFINITY;
        travel(back, x, type, 1, 4);
        assert_true(type == WIRE_FP8 ? isnan((double)back[1]) : isinf((double)back[1]) && back[1] < 0);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_row_bytes),           cmocka_unit_test(test_fp16_is_the_nearest),
        cmocka_unit_test(test_bf16_is_the_nearest), cmocka_unit_test(test_fp8_is_the_nearest),
        cmocka_unit_test(test_rows_are_close),      cmocka_unit_test(test_zeros_and_what_is_not_finite),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
