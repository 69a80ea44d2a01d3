/* What tests of ranks have in common: arrays with a guard behind them, groups, bytes that say who sent them, and
 * numbers whose sum one process can work out by itself. Included by comm_ranks.c and comm_peers.h. */
#ifndef TESTS_RANK_ARRAYS_H
#define TESTS_RANK_ARRAYS_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"
#include "../kernels/comm.h"
#include "../kernels/device.h"
#include "../kernels/random.h"

enum { MAX_RANKS = 16, GUARD = 64, GUARD_BYTE = 0xa5 };

static int ep; /* of the groups as they are formed now */

/* Of the group's rank r, the number in the world. */
static inline int member(Group group, int r) {
    int me = comm_rank(GROUP_WORLD);
    int of[GROUP_COUNT] = {r, me / ep * ep + r, me % ep + r * ep};
    return of[group];
}

static inline unsigned char *guarded(size_t bytes) {
    unsigned char *array = malloc(bytes + GUARD);
    CHECK(array, "out of memory");
    memset(array, GUARD_BYTE, bytes + GUARD);
    return array;
}

/* Frees the array, whose end must be as it was. */
static inline void release(unsigned char *array, size_t bytes, const char *what) {
    for (int i = 0; i < GUARD; i++) {
        CHECK(array[bytes + i] == GUARD_BYTE, "%s: byte %d behind the end was overwritten", what, i);
    }
    free(array);
}

/* A copy on the device of an array with its guard. */
static inline void *to_device(const unsigned char *array, size_t bytes) {
    void *device = device_allocate(bytes + GUARD);
    CHECK(device, "out of memory on the device");
    device_from_host(device, array, bytes + GUARD, NULL);
    return device;
}

/* And back; the copy is gone. */
static inline void from_device(unsigned char *array, size_t bytes, void *device) {
    host_from_device(array, device, bytes + GUARD, NULL);
    device_release(device, bytes + GUARD);
}

/* ---- groups */

static inline void form(int experts) {
    ep = experts;
    comm_form_groups(ep);
    int me = comm_rank(GROUP_WORLD), ranks = comm_ranks(GROUP_WORLD);
    CHECK(comm_ranks(GROUP_EXPERTS) == ep && comm_ranks(GROUP_REPLICAS) == ranks / ep, "sizes of groups, ep %d", ep);
    for (Group group = 0; group < GROUP_COUNT; group++) {
        CHECK(member(group, comm_rank(group)) == me, "this rank is %d of group %d", comm_rank(group), group);
    }
}

/* Byte i of what rank `from` sends to rank `to`. */
static inline unsigned char byte_of(int from, int to, size_t i) {
    return (unsigned char)random_bits(random_key(1, RANDOM_TEST, (uint64_t)(from * MAX_RANKS + to)), i);
}

static inline void check_bytes(const unsigned char *got, int from, int to, size_t bytes, const char *what) {
    for (size_t i = 0; i < bytes; i++) {
        CHECK(got[i] == byte_of(from, to, i), "%s: byte %zu of %zu from rank %d is wrong", what, i, bytes, from);
    }
}

static inline void fill_bytes(unsigned char *bytes, int from, int to, size_t count) {
    for (size_t i = 0; i < count; i++) {
        bytes[i] = byte_of(from, to, i);
    }
}

/* Of both signs and of sizes between 2^-20 and 2^20, so that another order gives other bits. */
static inline acc_t term(int rank, size_t i) {
    uint64_t key = random_key(2, RANDOM_TEST, (uint64_t)rank);
    return (acc_t)ldexp(random_uniform(key, 2 * i) - 0.5, (int)random_below(key, 2 * i + 1, 41) - 20);
}

static inline acc_t serial_sum(Group group, size_t i, bool backward) {
    int ranks = comm_ranks(group);
    acc_t sum = term(member(group, backward ? ranks - 1 : 0), i);
    for (int r = 1; r < ranks; r++) {
        sum += term(member(group, backward ? ranks - 1 - r : r), i);
    }
    return sum;
}

#endif
