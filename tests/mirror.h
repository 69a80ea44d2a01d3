/* An array as a test sees it and as a kernel sees it: acc_t (int for indices) in host memory, real_t or acc_t in device
 * memory, and the copies between the two. bf16 is converted here by hand, so that no kernel is trusted for it.
 */
#ifndef TESTS_MIRROR_H
#define TESTS_MIRROR_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"
#include "../kernels/device.h"

enum { PARALLEL = 10000 }; /* numbers that are worth several threads */

/* What a kernel stores a number as. */
typedef enum { NUMBER_REAL, NUMBER_ACC, NUMBER_INT } Number;

typedef struct {
    Number number;
    size_t count;
    void *host;   /* acc_t or int */
    void *device; /* real_t, acc_t or int */
} Mirror;

static inline size_t number_bytes(Number number) {
    return number == NUMBER_REAL ? sizeof(real_t) : number == NUMBER_ACC ? sizeof(acc_t) : sizeof(int);
}

/* bf16 is the upper half of a float, rounded to the nearest, ties to even; NaN keeps a bit that says so. */
static inline uint16_t bf16_from_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) {
        return (uint16_t)(bits >> 16 | 0x40);
    }
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float float_from_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline acc_t bf16_rounded(acc_t x) {
    return (acc_t)float_from_bf16(bf16_from_float((float)x));
}

/* Whether the two sides differ in their type. */
static inline bool mirror_converts(const Mirror *m) {
    return m->number == NUMBER_REAL && sizeof(real_t) == sizeof(uint16_t);
}

static inline uint16_t *mirror_halves(const Mirror *m) {
    uint16_t *half = malloc(m->count * sizeof *half + 1);
    CHECK(half, "out of memory: close other programs");
    return half;
}

static inline void mirror_upload(const Mirror *m) {
    if (!mirror_converts(m)) {
        device_from_host(m->device, m->host, m->count * number_bytes(m->number), NULL);
        return;
    }
    const acc_t *x = m->host;
    uint16_t *half = mirror_halves(m);
#pragma omp parallel for if (m->count > PARALLEL)
    for (size_t i = 0; i < m->count; i++) {
        half[i] = bf16_from_float((float)x[i]);
    }
    device_from_host(m->device, half, m->count * sizeof *half, NULL);
    free(half);
}

static inline void mirror_download(const Mirror *m) {
    if (!mirror_converts(m)) {
        host_from_device(m->host, m->device, m->count * number_bytes(m->number), NULL);
        return;
    }
    acc_t *x = m->host;
    uint16_t *half = mirror_halves(m);
    host_from_device(half, m->device, m->count * sizeof *half, NULL);
#pragma omp parallel for if (m->count > PARALLEL)
    for (size_t i = 0; i < m->count; i++) {
        x[i] = (acc_t)float_from_bf16(half[i]);
    }
    free(half);
}

#endif
