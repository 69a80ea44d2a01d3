/* One conversion for all small floating-point formats, told apart by their bits of exponent and fraction. Called by
 * model/exchange_wire.c. */
#include "wire.h"

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum { ROW_ALIGNMENT = 16, FLOAT_EXPONENT = 8, FLOAT_FRACTION = 23, FLOAT_BIAS = 127 };

/* A format without more than 16 bits: sign, exponent, fraction. */
typedef struct {
    int exponent, fraction; /* bits */
    int infinite;           /* whether the largest exponent means infinite and NaN; else only all ones is NaN */
} Format;

static const Format formats[] = {[WIRE_BF16] = {8, 7, 1}, [WIRE_FP16] = {5, 10, 1}, [WIRE_FP8] = {4, 3, 0}};

#define LARGEST_FP8 448.0f

static size_t number_bytes(WireType type) {
    return type == WIRE_SAME ? sizeof(real_t) : type == WIRE_FP32 ? sizeof(float) : type == WIRE_FP8 ? 1 : 2;
}

size_t wire_row_bytes(WireType type, int C) {
    size_t bytes = C * number_bytes(type) + (type == WIRE_FP8 ? sizeof(float) : 0);
    return type == WIRE_SAME ? bytes : (bytes + ROW_ALIGNMENT - 1) / ROW_ALIGNMENT * ROW_ALIGNMENT;
}

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* 2^n, n of an exponent that float has */
static inline float power_of_two(int n) {
    return float_of((uint32_t)(n + FLOAT_BIAS) << FLOAT_FRACTION);
}

static inline int bias(Format f) {
    return (1 << (f.exponent - 1)) - 1;
}

/* The bits of a float are cut off behind the fraction, half a unit added before, less a little where the last bit that
 * stays is even; a carry goes into the exponent by itself. Below the least exponent numbers are multiples of one unit,
 * which an addition rounds to; bf16 has the exponents of float, so there the first way does it all. */
static inline unsigned encode(float x, Format f) {
    unsigned sign = bits_of(x) >> 31 << (f.exponent + f.fraction), infinite = ((1u << f.exponent) - 1) << f.fraction;
    int least = 1 - bias(f), cut = FLOAT_FRACTION - f.fraction;
    float a = fabsf(x);
    if (!(a < INFINITY)) {
        bool nan = a != a || !f.infinite;
        return sign | infinite | (nan ? (1u << f.fraction) - 1 : 0);
    }
    if (f.exponent < FLOAT_EXPONENT && a < power_of_two(least)) {
        return sign | (bits_of(a * power_of_two(f.fraction - least) + power_of_two(FLOAT_FRACTION)) & 0xffff);
    }
    uint32_t bits = bits_of(a);
    bits = (bits + (1u << (cut - 1)) - 1 + (bits >> cut & 1)) >> cut;
    bits -= (uint32_t)(FLOAT_BIAS - bias(f)) << f.fraction;
    return sign | (f.infinite && bits > infinite ? infinite : bits);
}

static inline float decode(unsigned bits, Format f) {
    unsigned m = bits & ((1u << f.fraction) - 1), ones = (1u << f.exponent) - 1, e = bits >> f.fraction & ones;
    uint32_t sign = bits >> (f.exponent + f.fraction) << 31;
    if (e == ones && (f.infinite || m == (1u << f.fraction) - 1)) {
        return m ? NAN : float_of(sign | bits_of(INFINITY));
    }
    uint32_t fraction = m << (FLOAT_FRACTION - f.fraction);
    if (f.exponent == FLOAT_EXPONENT) {
        return float_of(sign | e << FLOAT_FRACTION | fraction);
    }
    float value = e ? float_of((e + FLOAT_BIAS - bias(f)) << FLOAT_FRACTION | fraction)
                    : (float)m * power_of_two(1 - bias(f) - f.fraction);
    return float_of(sign | bits_of(value));
}

/* Of a row in fp8; 1 where all is zero. NaN where a number is. */
static float row_scale(const real_t *x, int C) {
    float largest = 0;
    for (int c = 0; c < C; c++) {
        float a = fabsf((float)x[c]);
        largest = a > largest || isnan(a) ? a : largest;
    }
    return largest == 0 ? 1 : largest / LARGEST_FP8;
}

/* A loop for each format: with its bits known, the compiler makes vectors of it. */
static void pack_row(unsigned char *to, const real_t *x, WireType type, size_t bytes, int C) {
    float scale = type == WIRE_FP8 ? row_scale(x, C) : 1;
    for (int c = 0; c < C && type == WIRE_FP32; c++) {
        ((float *)to)[c] = (float)x[c];
    }
    for (int c = 0; c < C && type == WIRE_BF16; c++) {
        ((uint16_t *)to)[c] = (uint16_t)encode((float)x[c], formats[WIRE_BF16]);
    }
    for (int c = 0; c < C && type == WIRE_FP16; c++) {
        ((uint16_t *)to)[c] = (uint16_t)encode((float)x[c], formats[WIRE_FP16]);
    }
    for (int c = 0; c < C && type == WIRE_FP8; c++) {
        to[c] = (unsigned char)encode((float)x[c] / scale, formats[WIRE_FP8]);
    }
    if (type == WIRE_FP8) {
        memcpy(to + bytes - sizeof scale, &scale, sizeof scale);
    }
}

static void unpack_row(real_t *x, const unsigned char *from, WireType type, size_t bytes, int C) {
    float scale = 1;
    if (type == WIRE_FP8) {
        memcpy(&scale, from + bytes - sizeof scale, sizeof scale);
    }
    for (int c = 0; c < C && type == WIRE_FP32; c++) {
        x[c] = ((const float *)from)[c];
    }
    for (int c = 0; c < C && type == WIRE_BF16; c++) {
        x[c] = decode(((const uint16_t *)from)[c], formats[WIRE_BF16]);
    }
    for (int c = 0; c < C && type == WIRE_FP16; c++) {
        x[c] = decode(((const uint16_t *)from)[c], formats[WIRE_FP16]);
    }
    for (int c = 0; c < C && type == WIRE_FP8; c++) {
        x[c] = decode(from[c], formats[WIRE_FP8]) * scale;
    }
}

void wire_pack(void *packed, const real_t *x, WireType type, int rows, int C, Stream *stream) {
    size_t bytes = wire_row_bytes(type, C);
#pragma omp parallel for
    for (int r = 0; r < rows; r++) {
        unsigned char *to = (unsigned char *)packed + r * bytes;
        memset(to, 0, bytes);
        pack_row(to, x + (size_t)r * C, type, bytes, C);
    }
}

void wire_unpack(real_t *x, const void *packed, WireType type, int rows, int C, Stream *stream) {
    size_t bytes = wire_row_bytes(type, C);
#pragma omp parallel for
    for (int r = 0; r < rows; r++) {
        unpack_row(x + (size_t)r * C, (const unsigned char *)packed + r * bytes, type, bytes, C);
    }
}
