/* What the benchmarks share: random data, the order of times, and stage times as JSON. Included by bench_*.c. */
#ifndef EXPERIMENTS_BENCH_H
#define EXPERIMENTS_BENCH_H

#include <stdio.h>
#include <stdlib.h>

#include "../kernels/check.h"
#include "../kernels/convert.h"
#include "../kernels/device.h"
#include "../kernels/fixed_choice.h"
#include "../kernels/random.h"

/* std * normal numbers into a device array, by way of `staging` (count) on the device. */
static inline void bench_fill(real_t *x, acc_t *staging, size_t count, double std, int stream) {
    acc_t *host = malloc(count * sizeof(acc_t));
    CHECK(host, "out of memory for %zu random numbers", count);
    uint64_t key = random_key(1, RANDOM_TEST, stream);
#pragma omp parallel for
    for (size_t i = 0; i < count; i++) {
        host[i] = std * random_normal(key, i);
    }
    device_from_host(staging, host, count * sizeof(acc_t), NULL);
    real_from_acc(x, staging, count, NULL);
    device_wait(NULL);
    free(host);
}

/* std * normal numbers made on the device itself, for data of gigabytes: to (count); key: room for a number there. Each
 * `stream` of a seed has numbers of its own. */
static inline void bench_normal(acc_t *to, uint64_t *key, int seed, int stream, double std, size_t count) {
    uint64_t number = random_key((uint64_t)seed, RANDOM_TEST, (uint64_t)stream);
    device_from_host(key, &number, sizeof number, NULL);
    random_weights(to, std, key, count, NULL);
}

static inline int bench_compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Sorts the times; returns their median and sets the 95th percentile where it is asked for. */
static inline double bench_median(double *times, int count, double *p95) {
    qsort(times, count, sizeof(double), bench_compare);
    if (p95) {
        *p95 = times[(int)(0.95 * (count - 1))];
    }
    return times[count / 2];
}

/* ,"name":{"route":1.25,..}: milliseconds of each stage that took time, mean over the passes that were added up. */
static inline void bench_print_stages(const char *name, const Profile *profile, int passes) {
    printf(",\"%s\":{", name);
    for (int i = 0, printed = 0; i < STAGE_COUNT; i++) {
        if (profile->seconds[i] > 0) {
            printf("%s\"%s\":%.4f", printed++ ? "," : "", stage_name(i), 1e3 * profile->seconds[i] / passes);
        }
    }
    printf("}");
}

#endif
