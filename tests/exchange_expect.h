/* Comparisons that end all ranks at the first difference with a line that says where it is. */
#ifndef TESTS_EXCHANGE_EXPECT_H
#define TESTS_EXCHANGE_EXPECT_H

#include <math.h>
#include <string.h>

#include "../kernels/check.h"
#include "../kernels/types.h"

#ifdef REAL_DOUBLE
#define REAL_EPSILON DBL_EPSILON
#else
#define REAL_EPSILON FLT_EPSILON
#endif

static char where[256]; /* what is looked at, for the line of a difference */

#define EXPECT(condition, format, ...) CHECK(condition, "%s: " format, where, __VA_ARGS__)

static inline void same_bits(const char *what, const void *got, const void *expected, size_t count) {
    const real_t *a = got, *b = expected;
    for (size_t i = 0; i < count; i++) {
        EXPECT(memcmp(&a[i], &b[i], sizeof *a) == 0, "%s %zu of %zu is %a, expected %a", what, i, count, (double)a[i],
               (double)b[i]);
    }
}

static inline void near(const char *what, int n, int h, double got, double expected, double tolerance) {
    EXPECT(fabs(got - expected) <= tolerance, "%s of token %d, column %d is %.9g, expected %.9g within %.2g", what, n,
           h, got, expected, tolerance);
}

#endif
