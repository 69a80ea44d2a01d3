/* Experts whose rows go straight to the ranks that they are for (experts_forward_to, experts_backward_rows_to), of
 * comm_ranks.c: what arrives, against the same rows made by each rank for itself. To the bit: a row has the same bits
 * in any company. */
#ifndef TESTS_COMM_EXPERTS_H
#define TESTS_COMM_EXPERTS_H

#include "../kernels/experts.h"
#include "../kernels/peers.h"
#include "mirror.h"
#include "rank_arrays.h"

enum { HOLDER_EXPERTS = 3, HOLDER_C = 136, HOLDER_H = 72, HOLDER_SLOTS = 12 };

/* What one rank of the group holds: rows by expert, each for a place of some rank, and everything on the device. */
typedef struct {
    ExpertShape shape;
    int *entry; /* host: the place of each row, r * places + i being the i-th of rank r */
    int *device_entry, *device_offset;
    real_t *x, *w1, *w2, *dy, *a, *h, *da, *y, *dx;
    acc_t *row_weight, *drow_weight;
    void *owned[HOLDER_SLOTS];
    size_t bytes[HOLDER_SLOTS];
    int count;
} Holder;

static inline void *holder_array(Holder *holder, size_t bytes) {
    CHECK(holder->count < HOLDER_SLOTS, "raise HOLDER_SLOTS");
    holder->bytes[holder->count] = bytes + (bytes == 0);
    void *array = device_allocate(holder->bytes[holder->count]);
    CHECK(array, "out of memory on the device");
    return holder->owned[holder->count++] = array;
}

/* Numbers in [-1/2, 1/2), a function of rank and array. */
static inline void *holder_numbers(Holder *holder, Number number, size_t count, int rank) {
    Mirror m = {number, count, malloc(count * sizeof(acc_t) + 1), NULL};
    uint64_t key = random_key((uint64_t)rank + 1, RANDOM_TEST, (uint64_t)holder->count);
    CHECK(m.host, "out of memory");
    for (size_t i = 0; i < count; i++) {
        ((acc_t *)m.host)[i] = (acc_t)(random_uniform(key, i) - 0.5);
    }
    m.device = holder_array(holder, count * number_bytes(number));
    mirror_upload(&m);
    free(m.host);
    return m.device;
}

/* Rows of rank `rank` among `places` of each rank: every place has one holder, which leaves out one in 29. */
static inline void choose_rows(Holder *holder, int rank, int places) {
    int ranks = comm_ranks(GROUP_EXPERTS), offset[HOLDER_EXPERTS + 1] = {0}, rows = 0;
    holder->entry = malloc((size_t)ranks * places * sizeof(int));
    CHECK(holder->entry, "out of memory");
    for (int e = 0; e < HOLDER_EXPERTS; e++) {
        for (int i = 0; i < ranks * places; i++) {
            if ((i + i / 7) % ranks == rank && i / 3 % HOLDER_EXPERTS == e) {
                holder->entry[rows++] = i % 29 == 5 ? -1 : i;
            }
        }
        offset[e + 1] = rows;
    }
    holder->shape = (ExpertShape){.E = HOLDER_EXPERTS, .C = HOLDER_C, .H = HOLDER_H, .rows = rows, .act = ACT_SWIGLU};
    holder->device_entry = holder_array(holder, rows * sizeof(int));
    holder->device_offset = holder_array(holder, sizeof offset);
    device_from_host(holder->device_entry, holder->entry, rows * sizeof(int), NULL);
    device_from_host(holder->device_offset, offset, sizeof offset, NULL);
}

static inline Holder holder_open(int rank, int places) {
    Holder holder = {.count = 0};
    choose_rows(&holder, rank, places);
    size_t rows = holder.shape.rows, A = experts_a_width(holder.shape), E = HOLDER_EXPERTS;
    holder.x = holder_numbers(&holder, NUMBER_REAL, rows * HOLDER_C, rank);
    holder.dy = holder_numbers(&holder, NUMBER_REAL, rows * HOLDER_C, rank);
    holder.w1 = holder_numbers(&holder, NUMBER_REAL, E * A * HOLDER_C, rank);
    holder.w2 = holder_numbers(&holder, NUMBER_REAL, E * HOLDER_C * HOLDER_H, rank);
    holder.row_weight = holder_numbers(&holder, NUMBER_ACC, rows, rank);
    holder.drow_weight = holder_array(&holder, rows * sizeof(acc_t));
    holder.a = holder_array(&holder, rows * A * sizeof(real_t));
    holder.h = holder_array(&holder, rows * HOLDER_H * sizeof(real_t));
    holder.da = holder_array(&holder, rows * A * sizeof(real_t));
    holder.y = holder.dx = holder_array(&holder, rows * HOLDER_C * sizeof(real_t));
    return holder;
}

static inline void holder_close(Holder *holder) {
    for (int i = 0; i < holder->count; i++) {
        device_release(holder->owned[i], holder->bytes[i]);
    }
    free(holder->entry);
}

/* y, or dx, of this rank's rows to where each is for: homes (places, C) in open memory. */
static inline void send_rows(Holder *me, char *homes, int places, bool forward) {
    RowTarget to = {peers_homes(homes, places), me->device_entry, comm_ranks(GROUP_EXPERTS), comm_rank(GROUP_EXPERTS)};
    RowSource x = {me->x, NULL, 0}, dy = {me->dy, NULL, 0};
    if (forward) {
        experts_forward_to(to, me->y, me->a, me->h, x, me->w1, me->w2, me->device_offset, me->shape, NULL);
    } else {
        experts_backward_rows_to(to, me->dx, me->drow_weight, me->h, me->da, dy, me->a, me->row_weight, me->w1, me->w2,
                                 me->device_offset, me->shape, NULL);
    }
}

/* What a rank's rows for this one must be, in their places of `expected`. */
static inline void expect_rows(Holder *other, unsigned char *expected, int places, bool forward) {
    RowSource x = {other->x, NULL, 0}, dy = {other->dy, NULL, 0};
    size_t row_bytes = HOLDER_C * sizeof(real_t), bytes = other->shape.rows * row_bytes;
    unsigned char *rows = malloc(bytes + 1);
    CHECK(rows, "out of memory");
    experts_forward(other->y, other->a, other->h, x, other->w1, other->w2, other->device_offset, other->shape, 0, NULL);
    if (!forward) {
        experts_backward_rows(other->dx, other->drow_weight, other->h, other->da, dy, other->a, other->row_weight,
                              other->w1, other->w2, other->device_offset, other->shape, 0, NULL);
    }
    host_from_device(rows, other->dx, bytes, NULL);
    for (int r = 0; r < other->shape.rows; r++) {
        int entry = other->entry[r];
        if (entry >= 0 && entry / places == comm_rank(GROUP_EXPERTS)) {
            memcpy(expected + entry % places * row_bytes, rows + r * row_bytes, row_bytes);
        }
    }
    free(rows);
}

/* `memory` is open, and has room for places rows. */
static inline void check_experts(char *memory, int places) {
    size_t row_bytes = HOLDER_C * sizeof(real_t), bytes = places * row_bytes;
    Holder me = holder_open(comm_rank(GROUP_EXPERTS), places);
    for (int leg = 0; leg < 2; leg++) {
        unsigned char *arrived = guarded(bytes), *expected = guarded(bytes);
        memset(arrived, GUARD_BYTE, bytes);
        memset(expected, GUARD_BYTE, bytes);
        device_from_host(memory, arrived, bytes + GUARD, NULL);
        peers_meet(GROUP_EXPERTS, false, NULL);
        send_rows(&me, memory, places, leg == 0);
        peers_meet(GROUP_EXPERTS, false, NULL);
        host_from_device(arrived, memory, bytes + GUARD, NULL);
        for (int r = 0; r < comm_ranks(GROUP_EXPERTS); r++) {
            Holder other = holder_open(r, places);
            expect_rows(&other, expected, places, leg == 0);
            holder_close(&other);
        }
        for (size_t i = 0; i < bytes; i++) {
            CHECK(arrived[i] == expected[i], "experts, leg %d: byte %zu of place %zu is %d, expected %d", leg,
                  i % row_bytes, i / row_bytes, arrived[i], expected[i]);
        }
        release(arrived, bytes, "experts");
        release(expected, bytes, "experts");
        peers_meet(GROUP_EXPERTS, false, NULL);
    }
    holder_close(&me);
}

#endif
