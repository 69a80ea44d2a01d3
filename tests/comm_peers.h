/* Ranks that store in each other's memory (kernels/peers.h), of comm_ranks.c: rounds of rows with a meeting each, what
 * all are told, copies of all places, rows of experts, and sums where they lie. Read next: check_rounds, peers. */
#ifndef TESTS_COMM_PEERS_H
#define TESTS_COMM_PEERS_H

#include "../kernels/peers.h"
#include "comm_experts.h"
#include "rank_arrays.h"

/* An allocation large enough to be one of its own on a GPU; two areas of it take turns. */
enum { OPEN_BYTES = 4 << 20, AREA_BYTES = 1 << 18 };

static inline char *open_peers(void) {
    char why[128];
    char *memory = peers_allocate(OPEN_BYTES);
    CHECK(memory, "out of memory on the device");
    device_wait(NULL);
    CHECK(peers_open(memory, OPEN_BYTES, why, sizeof why), "not open: %s", why);
    for (Group group = 0; group < GROUP_COUNT; group++) { /* all ranks are on this machine */
        CHECK(peers_reach(group, memory) && peers_reach(group, memory + OPEN_BYTES - 1), "out of reach");
        CHECK(peers_at(group, comm_rank(group), memory + 7) == memory + 7, "this rank's own memory is elsewhere");
    }
    CHECK(!peers_reach(GROUP_WORLD, memory + OPEN_BYTES) && !peers_reach(GROUP_WORLD, memory - 1), "not its memory");
    return memory;
}

static inline void close_peers(char *memory) {
    device_wait(NULL);
    peers_close();
    CHECK(!peers_reach(GROUP_EXPERTS, memory), "still open");
    comm_barrier();
    peers_release(memory, OPEN_BYTES);
}

/* Whether a rank has row `place` for another in a round. */
static inline bool has_row(int round, int from, int to, int place) {
    return (round + 3 * from + 5 * to + place) % 3 != 0;
}

static inline unsigned char byte_of_round(int round, int from, int to, size_t i) {
    return (unsigned char)(byte_of(from, to, i) + round);
}

/* What this rank stores in a round: rows for each rank, and notes that say which of them are there, `each` a row. */
static inline void make_rows(unsigned char *rows, int *there, int round, int places, size_t row_bytes, int each) {
    int me = comm_rank(GROUP_WORLD), ranks = comm_ranks(GROUP_EXPERTS);
    for (int r = 0; r < ranks * places; r++) {
        int to = member(GROUP_EXPERTS, r / places);
        for (int j = 0; j < each; j++) {
            there[r * each + j] = has_row(round, me, to, r % places) && j == r % each ? j : -1;
        }
        for (size_t i = 0; i < row_bytes; i++) {
            rows[r * row_bytes + i] = byte_of_round(round, me, to, r % places * row_bytes + i);
        }
    }
}

/* What has arrived in an area that all places were GUARD_BYTE of. */
static inline void check_arrived(const unsigned char *area, int round, int places, size_t row_bytes) {
    int me = comm_rank(GROUP_WORLD), ranks = comm_ranks(GROUP_EXPERTS);
    for (size_t i = 0; i < ranks * places * row_bytes; i++) {
        int r = (int)(i / row_bytes), from = member(GROUP_EXPERTS, r / places);
        unsigned char expected = has_row(round, from, me, r % places)
                                     ? byte_of_round(round, from, me, i - (size_t)(r / places) * places * row_bytes)
                                     : GUARD_BYTE;
        CHECK(area[i] == expected, "round %d: byte %zu of row %d from rank %d is %d, expected %d", round, i % row_bytes,
              r % places, from, area[i], expected);
    }
    for (size_t i = ranks * places * row_bytes; i < AREA_BYTES; i++) {
        CHECK(area[i] == GUARD_BYTE, "round %d: byte %zu behind the rows was overwritten", round, i);
    }
}

/* Rounds of stores, one meeting each. What is read before a meeting may be overwritten after it: so what was read, and
 * cleaned, before the meeting of one round is stored in by the next but one. */
static inline void check_rounds(char *memory, int rounds, int places, size_t row_bytes, int each) {
    int ranks = comm_ranks(GROUP_EXPERTS), rows = ranks * places;
    size_t bytes = rows * row_bytes, flags = (size_t)rows * each * sizeof(int);
    unsigned char *mine = guarded(bytes), *area = guarded(AREA_BYTES), *clean = guarded(AREA_BYTES);
    int *there = malloc(flags), *device_there = device_allocate(flags);
    void *device_mine = device_allocate(bytes);
    CHECK(there && device_there && device_mine && bytes < AREA_BYTES, "out of memory");
    memset(clean, GUARD_BYTE, AREA_BYTES);
    device_from_host(memory, clean, AREA_BYTES, NULL);
    device_from_host(memory + AREA_BYTES, clean, AREA_BYTES, NULL);
    peers_meet(GROUP_EXPERTS, false, NULL);
    for (int round = 0; round < rounds; round++) {
        char *to = memory + (size_t)(round % 2) * AREA_BYTES;
        make_rows(mine, there, round, places, row_bytes, each);
        device_from_host(device_mine, mine, bytes, NULL);
        device_from_host(device_there, there, flags, NULL);
        peers_put(peers_rows(to, places, row_bytes), device_mine, row_bytes, device_there, each, NULL);
        peers_meet(GROUP_EXPERTS, round % 3 == 2, NULL);
        host_from_device(area, to, AREA_BYTES, NULL);
        check_arrived(area, round, places, row_bytes);
        device_from_host(to, clean, AREA_BYTES, NULL);
    }
    release(mine, bytes, "peers");
    release(area, AREA_BYTES, "peers");
    release(clean, AREA_BYTES, "peers");
    free(there);
    device_wait(NULL);
    device_release(device_there, flags);
    device_release(device_mine, bytes);
}

/* All tell all others something, from elsewhere and from its own place. */
static inline void check_put_all(char *memory, size_t bytes, bool in_place) {
    int me = comm_rank(GROUP_WORLD), ranks = comm_ranks(GROUP_EXPERTS);
    size_t place = (size_t)comm_rank(GROUP_EXPERTS) * bytes;
    unsigned char *all = guarded(ranks * bytes), *mine = guarded(bytes);
    fill_bytes(mine, me, 3, bytes);
    device_from_host(memory, all, ranks * bytes + GUARD, NULL);
    peers_meet(GROUP_EXPERTS, false, NULL);
    char *elsewhere = to_device(mine, bytes);
    if (in_place) {
        device_copy(memory + place, elsewhere, bytes, NULL);
    }
    peers_put_all(memory, in_place ? memory + place : elsewhere, bytes, NULL);
    peers_meet(GROUP_EXPERTS, false, NULL);
    host_from_device(all, memory, ranks * bytes + GUARD, NULL);
    for (int r = 0; r < ranks; r++) {
        check_bytes(all + r * bytes, member(GROUP_EXPERTS, r), 3, bytes, "to all");
    }
    from_device(mine, bytes, elsewhere);
    release(all, ranks * bytes, "to all");
    release(mine, bytes, "to all");
    peers_meet(GROUP_EXPERTS, false, NULL);
}

/* Copies of all places: for each rank other rows, or with step 0 the same for all. */
static inline void check_copy(char *memory, int places, size_t row_bytes, bool same) {
    int me = comm_rank(GROUP_WORLD), ranks = comm_ranks(GROUP_EXPERTS);
    size_t of_rank = places * row_bytes, bytes = ranks * of_rank;
    unsigned char *all = guarded(bytes), *mine = guarded(bytes);
    for (int r = 0; r < ranks; r++) {
        fill_bytes(mine + r * of_rank, me, same ? 4 : member(GROUP_EXPERTS, r), of_rank);
    }
    device_from_host(memory, all, bytes + GUARD, NULL);
    peers_meet(GROUP_EXPERTS, false, NULL);
    char *from = to_device(mine, bytes);
    PeerRows own = peers_own_rows(from, places, row_bytes);
    CHECK(peers_row(&own, (ranks - 1) * places, row_bytes) == from + (ranks - 1) * of_rank, "own rows are elsewhere");
    peers_copy(peers_rows(memory, places, row_bytes), from, same ? 0 : of_rank, row_bytes, NULL);
    peers_meet(GROUP_EXPERTS, false, NULL);
    host_from_device(all, memory, bytes + GUARD, NULL);
    for (int r = 0; r < ranks; r++) {
        check_bytes(all + r * of_rank, member(GROUP_EXPERTS, r), same ? 4 : me, of_rank, "copies");
    }
    from_device(mine, bytes, from);
    release(all, bytes, "copies");
    release(mine, bytes, "copies");
    peers_meet(GROUP_EXPERTS, false, NULL);
}

/* Sums of what lies in open memory; `skip` terms from where it begins. */
static inline void check_open_sum(char *memory, Group group, size_t count, size_t skip) {
    size_t bytes = (skip + count) * sizeof(acc_t);
    unsigned char *array = guarded(bytes);
    acc_t *x = (acc_t *)array + skip;
    for (size_t i = 0; i < count; i++) {
        x[i] = term(comm_rank(GROUP_WORLD), i);
    }
    device_from_host(memory, array, bytes + GUARD, NULL);
    comm_sum(group, (acc_t *)memory + skip, count, NULL);
    host_from_device(array, memory, bytes + GUARD, NULL);
    for (size_t i = 0; i < count; i++) {
        acc_t expected = serial_sum(group, i, false);
        CHECK(memcmp(&x[i], &expected, sizeof expected) == 0, "open sum %zu of %zu in group %d is %a, expected %a", i,
              count, group, (double)x[i], (double)expected);
    }
    for (size_t i = 0; i < skip * sizeof(acc_t); i++) {
        CHECK(array[i] == GUARD_BYTE, "open sum: byte %zu before the first term was overwritten", i);
    }
    release(array, bytes, "open sum");
    peers_meet(GROUP_WORLD, false, NULL);
}

static inline void peers(int rounds) {
    static const size_t row_bytes[] = {4, 20, 64, 1028};
    for (int experts = 1; experts <= comm_ranks(GROUP_WORLD); experts++) {
        if (comm_ranks(GROUP_WORLD) % experts != 0) {
            continue;
        }
        form(experts);
        char *memory = open_peers();
        for (int i = 0; i < 4; i++) {
            check_rounds(memory, rounds, 1 + 4 * i, row_bytes[i], 1 + i % 3);
            check_put_all(memory, row_bytes[i], false);
            check_put_all(memory, row_bytes[i], true);
            check_copy(memory, 1 + 4 * i, row_bytes[i], false);
            check_copy(memory, 1 + 4 * i, row_bytes[i], true);
        }
        check_experts(memory, 5);
        check_experts(memory, 700);
        for (Group group = 0; group < GROUP_COUNT; group++) {
            check_open_sum(memory, group, 7, 0);
            check_open_sum(memory, group, 100003, 0);
            check_open_sum(memory, group, 100000, 4);
            check_open_sum(memory, group, 100003, 1);
        }
        close_peers(memory);
    }
    printf("rank %d of %d: all as expected\n", comm_rank(GROUP_WORLD), comm_ranks(GROUP_WORLD));
}

#endif
