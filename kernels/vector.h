/* Short vectors for the CPU kernels: the widest the machine has, through GCC's vector extension, no intrinsics.
 *
 * Sums over a row go to LANES partial sums, element i to lane i % LANES, and the lanes are added in a fixed order: the
 * compiler may use any instruction for it and the bits stay the same. exp is a polynomial, because the library's is a
 * call per element.
 *
 * Read by the .c files of this folder; nothing outside kernels/ includes it.
 */
#ifndef KERNELS_VECTOR_H
#define KERNELS_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "types.h"

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16 /* NEON, SSE2 */
#endif

enum { VECTOR_LENGTH = VECTOR_BYTES / sizeof(real_t), LANES = 16 };

typedef real_t Vector __attribute__((vector_size(VECTOR_BYTES)));
typedef real_t VectorUnaligned __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real_t)), may_alias));

static inline Vector vector_load(const real_t *p) {
    return *(const VectorUnaligned *)p;
}

static inline void vector_store(real_t *p, Vector v) {
    *(VectorUnaligned *)p = v;
}

/* The lanes' total, always in the same order. */
static inline acc_t lanes_sum(const acc_t *lane) {
    acc_t half[LANES / 2];
    for (int i = 0; i < LANES / 2; i++) {
        half[i] = lane[i] + lane[i + LANES / 2];
    }
    for (int width = LANES / 4; width > 0; width /= 2) {
        for (int i = 0; i < width; i++) {
            half[i] += half[i + width];
        }
    }
    return half[0];
}

/* sum_i x_i y_i */
static inline acc_t dot(const real_t *x, const real_t *y, int n) {
    acc_t lane[LANES] = {0};
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int j = 0; j < LANES; j++) {
            lane[j] += x[i + j] * y[i + j];
        }
    }
    for (int j = 0; i + j < n; j++) {
        lane[j] += x[i + j] * y[i + j];
    }
    return lanes_sum(lane);
}

/* The largest of n values; NaN loses every comparison. */
static inline real_t largest_of(const real_t *x, int n) {
    real_t lane[LANES];
    for (int j = 0; j < LANES; j++) {
        lane[j] = x[j < n ? j : 0];
    }
    int i = LANES;
    for (; i + LANES <= n; i += LANES) {
        for (int j = 0; j < LANES; j++) {
            lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
        }
    }
    for (int j = 0; i + j < n; j++) {
        lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
    }
    for (int width = LANES / 2; width > 0; width /= 2) {
        for (int j = 0; j < width; j++) {
            lane[j] = lane[j + width] > lane[j] ? lane[j + width] : lane[j];
        }
    }
    return lane[0];
}

/* e^x. In float: x = k ln 2 + r with |r| <= ln 2 / 2 (Cody, Waite), e^r by a polynomial of degree 6, relative error
 * below 3e-7; 0 below -87.3, e^88.3 above 88.3, NaN for NaN. The branches are selects, so loops over it vectorise. */
static inline real_t exp_fast(real_t x) {
#ifdef REAL_DOUBLE
    return exp(x);
#else
    float clamped = x < -87.3f ? -87.3f : x;
    clamped = clamped > 88.3f ? 88.3f : clamped;
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    float rounded = clamped * 1.44269504f + shift;
    float k = rounded - shift;
    float r = clamped - k * 0.693359375f;
    r = r + k * 2.12194440e-4f;
    float p = 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &rounded, sizeof bits);
    bits = (bits + 127u) << 23; /* 2^k: the integer sits in the low bits of `rounded` */
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return x < -87.3f ? 0.0f : p * scale;
#endif
}

static inline real_t sigmoid(real_t x) {
    return 1 / (1 + exp_fast(-x));
}

#endif
