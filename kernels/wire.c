/* One conversion for all small floating-point formats, told apart by their bits of exponent and fraction. Called by
 * model/exchange.c. */
#include "wire.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { ROW_ALIGNMENT = 16 };

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

static int bias(Format f) {
    return (1 << (f.exponent - 1)) - 1;
}

/* x = m 2^(e - fraction) with m below 2^(fraction+1); numbers below the least exponent have fewer bits. */
static unsigned encode(float x, Format f) {
    unsigned sign = signbit(x) ? 1u << (f.exponent + f.fraction) : 0, ones = (1u << f.exponent) - 1;
    unsigned infinite = ones << f.fraction;
    if (isnan(x) || (isinf(x) && !f.infinite)) {
        return sign | infinite | ((1u << f.fraction) - 1);
    }
    if (isinf(x) || x == 0) {
        return sign | (x == 0 ? 0 : infinite);
    }
    int e, least = 1 - bias(f);
    frexpf(x, &e);
    e = e - 1 > least ? e - 1 : least;
    unsigned m = (unsigned)lrintf(ldexpf(fabsf(x), f.fraction - e));
    /* A full m carries into the exponent by itself; one below 2^fraction has the exponent 0. */
    unsigned bits = ((unsigned)(e - least) << f.fraction) + m;
    return sign | (f.infinite && bits > infinite ? infinite : bits);
}

static float decode(unsigned bits, Format f) {
    unsigned m = bits & ((1u << f.fraction) - 1), ones = (1u << f.exponent) - 1, e = bits >> f.fraction & ones;
    float sign = bits >> (f.exponent + f.fraction) ? -1 : 1;
    if (e == ones && (f.infinite || m == (1u << f.fraction) - 1)) {
        return m ? NAN : sign * INFINITY;
    }
    float value = e ? ldexpf((float)(m | 1u << f.fraction), (int)e - bias(f) - f.fraction)
                    : ldexpf((float)m, 1 - bias(f) - f.fraction);
    return sign * value;
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

static void pack_row(unsigned char *to, const real_t *x, WireType type, size_t bytes, int C) {
    float scale = 1;
    if (type == WIRE_FP8) {
        scale = row_scale(x, C);
        memcpy(to + bytes - sizeof scale, &scale, sizeof scale);
    }
    for (int c = 0; c < C; c++) {
        float value = (float)x[c] / scale;
        uint16_t bits = type == WIRE_FP32 ? 0 : (uint16_t)encode(value, formats[type]);
        size_t size = number_bytes(type);
        memcpy(to + c * size, type == WIRE_FP32 ? (void *)&value : &bits, size); /* low byte first */
    }
}

static void unpack_row(real_t *x, const unsigned char *from, WireType type, size_t bytes, int C) {
    float scale = 1;
    if (type == WIRE_FP8) {
        memcpy(&scale, from + bytes - sizeof scale, sizeof scale);
    }
    for (int c = 0; c < C; c++) {
        float value = 0;
        uint16_t bits = 0;
        size_t size = number_bytes(type);
        memcpy(type == WIRE_FP32 ? (void *)&value : &bits, from + c * size, size);
        x[c] = type == WIRE_FP32 ? value : decode(bits, formats[type]) * scale;
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
