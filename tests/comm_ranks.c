/* What ranks say to each other, each function of kernels/comm.h against what one process computes by itself, and how
 * ranks end when something goes wrong. test_comm.sh starts it, with and without mpirun, and looks at what comes out.
 *
 *     mpirun -n 4 build/comm_ranks results       each rank ends with the line "rank 2 of 4: all as expected"
 *     mpirun -n 4 build/comm_ranks peers 100     stores in each other's memory (kernels/peers.h), so many rounds
 *     mpirun -n 4 build/comm_ranks asleep 3      see the end of this file for all of these
 *     mpirun -n 2 build/comm_ranks huge          a message above 2^31 bytes; 10 GiB of memory
 *     mpirun -n 2 build/comm_ranks_cuda results  the same on two GPUs
 *
 * Every byte that is sent is a function of who sent it, to whom, and its place, so the receiver can tell what it should
 * have got. All arrays end with bytes that nothing may change. They are filled and looked at on the host and travel
 * between copies on the device. Read next: rank_arrays.h, comm_peers.h.
 */
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../kernels/comm_parts.h"
#include "comm_peers.h"

/* ---- gather */

static void check_gather(Group group, size_t bytes, bool in_place) {
    int me = comm_rank(GROUP_WORLD), ranks = comm_ranks(group);
    size_t total = (size_t)ranks * bytes;
    unsigned char *all = guarded(total), *mine = guarded(bytes);
    unsigned char *from = in_place ? all + (size_t)comm_rank(group) * bytes : mine;
    fill_bytes(from, me, 0, bytes);
    char *device_all = to_device(all, total), *device_mine = to_device(mine, bytes);
    comm_gather(group, device_all, in_place ? device_all + (size_t)comm_rank(group) * bytes : device_mine, bytes, NULL);
    from_device(all, total, device_all);
    from_device(mine, bytes, device_mine);
    for (int r = 0; r < ranks; r++) {
        check_bytes(all + (size_t)r * bytes, member(group, r), 0, bytes, "gather");
    }
    release(all, total, "gather");
    release(mine, bytes, "gather");
}

/* ---- sum */

/* Terms that each rank keeps at another distance from a multiple of 16 bytes. From the second run on the call is
 * recorded, where the device can record (device.h). */
static void check_sum(Group group, size_t count, int runs) {
    size_t skip = (size_t)comm_rank(GROUP_WORLD) % 4, bytes = (skip + count) * sizeof(acc_t), turned = 0;
    unsigned char *array = guarded(bytes);
    acc_t *x = (acc_t *)array + skip, *device_array = to_device(array, bytes);
    Recording recording = {0};
    for (int run = 0; run < runs; run++) {
        for (size_t i = 0; i < count; i++) {
            x[i] = term(comm_rank(GROUP_WORLD), i);
        }
        device_from_host(device_array, array, bytes, NULL);
        if (!recording_replay(&recording, NULL)) {
            recording_begin(&recording, NULL);
            comm_sum(group, device_array + skip, count, NULL);
            recording_end(&recording, NULL);
        }
        host_from_device(array, device_array, bytes + GUARD, NULL);
        for (size_t i = 0; i < count; i++) {
            acc_t expected = serial_sum(group, i, false), backward = serial_sum(group, i, true);
            CHECK(memcmp(&x[i], &expected, sizeof expected) == 0,
                  "run %d: sum %zu of %zu in group %d is %a, expected %a", run, i, count, group, (double)x[i],
                  (double)expected);
            turned += memcmp(&x[i], &backward, sizeof backward) != 0;
        }
    }
    CHECK(count < 100 || comm_ranks(group) < 3 || turned > 0, "these terms do not show the order of a sum");
    for (size_t i = 0; i < skip * sizeof(acc_t); i++) {
        CHECK(array[i] == GUARD_BYTE, "sum: byte %zu before the first term was overwritten", i);
    }
    recording_free(&recording);
    device_release(device_array, bytes + GUARD);
    release(array, bytes, "sum");
}

/* ---- exchange */

typedef enum { ROWS_NONE, ROWS_TO_LAST, ROWS_UNEVEN, ROWS_ONE, ROWS_KINDS } Rows;

/* How many rows one rank of the group has for another. */
static int rows_between(Rows rows, int from, int to, int ranks) {
    int of[ROWS_KINDS] = {0, to == ranks - 1 ? 5 + from : 0, (3 * from + 5 * to) % 4, 1};
    return of[rows];
}

static void check_exchange(Group group, Rows rows, size_t row_bytes) {
    int me = comm_rank(group), ranks = comm_ranks(group), from_first[MAX_RANKS + 1] = {0},
        to_first[MAX_RANKS + 1] = {0};
    CommCount expected = comm_count();
    for (int r = 0; r < ranks; r++) {
        int out = rows_between(rows, me, r, ranks);
        from_first[r + 1] = from_first[r] + out;
        to_first[r + 1] = to_first[r] + rows_between(rows, r, me, ranks);
        expected.messages += r != me && out > 0;
        expected.bytes += r != me ? out * (int64_t)row_bytes : 0;
    }
    expected.calls += ranks > 1;
    size_t out = (size_t)from_first[ranks] * row_bytes, in = (size_t)to_first[ranks] * row_bytes;
    unsigned char *from = guarded(out), *to = guarded(in);
    for (int r = 0; r < ranks; r++) {
        size_t bytes = (size_t)(from_first[r + 1] - from_first[r]) * row_bytes;
        fill_bytes(from + (size_t)from_first[r] * row_bytes, member(group, me), member(group, r), bytes);
    }
    void *device_from = to_device(from, out), *device_to = to_device(to, in);
    comm_exchange(group, device_to, to_first, device_from, from_first, NULL, row_bytes, NULL);
    from_device(from, out, device_from);
    from_device(to, in, device_to);
    for (int r = 0; r < ranks; r++) {
        size_t bytes = (size_t)(to_first[r + 1] - to_first[r]) * row_bytes;
        check_bytes(to + (size_t)to_first[r] * row_bytes, member(group, r), member(group, me), bytes, "exchange");
    }
    CommCount counted = comm_count();
    CHECK(memcmp(&counted, &expected, sizeof counted) == 0,
          "counted %lld messages of %lld bytes in all, expected %lld of %lld", (long long)counted.messages,
          (long long)counted.bytes, (long long)expected.messages, (long long)expected.bytes);
    release(from, out, "exchange");
    release(to, in, "exchange");
}

/* ---- on the host */

static void check_any(void) {
    int me = comm_rank(GROUP_WORLD), ranks = comm_ranks(GROUP_WORLD);
    CHECK(!comm_any(false), "nobody said so");
    for (int r = 0; r < ranks; r++) {
        CHECK(comm_any(me == r), "rank %d said so", r);
        CHECK(comm_any(me != r) == (ranks > 1), "all but rank %d said so", r);
    }
}

static void check_to_first(size_t bytes) {
    int me = comm_rank(GROUP_WORLD), ranks = comm_ranks(GROUP_WORLD);
    unsigned char *mine = guarded(bytes), *to = guarded(bytes);
    fill_bytes(mine, me, 1, bytes);
    for (int r = 0; r < ranks; r++) {
        if (me == 0) {
            comm_to_first(to, mine, bytes, r);
            check_bytes(to, r, 1, bytes, "to the first");
        } else if (me == r) {
            comm_to_first(NULL, mine, bytes, r);
        }
    }
    release(mine, bytes, "to the first");
    release(to, bytes, "to the first");
}

/* ---- everything that goes well */

static void check_group(Group group) {
    static const size_t sizes[] = {0, 1, 7, 1000, 100003};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        check_gather(group, sizes[i], false);
        check_gather(group, sizes[i], true);
        check_sum(group, sizes[i], 3);
    }
    static const size_t row_sizes[] = {1, 6, 513, 20000};
    for (size_t i = 0; i < sizeof row_sizes / sizeof *row_sizes; i++) {
        for (Rows rows = 0; rows < ROWS_KINDS; rows++) {
            check_exchange(group, rows, row_sizes[i]);
        }
    }
}

static void results(int unused) {
    int ranks = comm_ranks(GROUP_WORLD);
    CHECK(comm_ranks(GROUP_EXPERTS) == 1 && comm_ranks(GROUP_REPLICAS) == 1, "groups before they are formed");
    for (int experts = 1; experts <= ranks; experts++) {
        if (ranks % experts == 0) {
            form(experts);
            for (Group group = 0; group < GROUP_COUNT; group++) {
                check_group(group);
            }
        }
    }
    check_sum(GROUP_WORLD, ((size_t)1 << (device_runs_ahead() ? 24 : 20)) + 1003, 1); /* more than is summed at once */
    check_any();
    comm_barrier();
    comm_check_same("--lr 1", "configuration");
    check_to_first(0);
    check_to_first(100003);
    printf("rank %d of %d: all as expected\n", comm_rank(GROUP_WORLD), ranks);
}

/* More calls than tags have numbers for. */
static void many(int calls) {
    for (int i = 0; i < calls; i++) {
        CHECK(comm_any(i % 3 == comm_rank(GROUP_WORLD)) == (i % 3 < comm_ranks(GROUP_WORLD)), "call %d", i);
    }
}

/* Rows of 1 MiB from rank 0 to rank 1, 2^31 bytes and one row more. */
static void huge(int unused) {
    const size_t row_bytes = 1 << 20;
    const int rows = 2049, me = comm_rank(GROUP_WORLD);
    int none[] = {0, 0, 0}, to_other[] = {0, 0, rows}, from_other[] = {0, rows, rows};
    size_t bytes = (size_t)rows * row_bytes;
    unsigned char *array = guarded(bytes);
    if (me == 0) {
        fill_bytes(array, 0, 1, bytes);
    }
    void *device = to_device(array, bytes);
    if (me == 0) {
        comm_exchange(GROUP_WORLD, NULL, none, device, to_other, NULL, row_bytes, NULL);
    } else {
        comm_exchange(GROUP_WORLD, device, from_other, NULL, none, NULL, row_bytes, NULL);
    }
    from_device(array, bytes, device);
    check_bytes(array, 0, 1, bytes, "huge");
    release(array, bytes, "huge");
}

/* ---- everything that does not */

/* In the second sum, for GPUs are connected in the first. */
static void asleep(int sleeper) {
    const size_t count = 100000;
    acc_t *x = device_allocate(count * sizeof *x);
    CHECK(x, "out of memory on the device");
    comm_sum(GROUP_WORLD, x, count, NULL);
    comm_set_patience(2);
    comm_at(12, 2, "dispatch");
    if (comm_rank(GROUP_WORLD) == sleeper) {
        sleep(60);
    }
    comm_sum(GROUP_WORLD, x, count, NULL);
    device_wait(NULL);
}

/* The same in a meeting. */
static void asleep_at_meeting(int sleeper) {
    form(comm_ranks(GROUP_WORLD));
    open_peers();
    peers_meet(GROUP_EXPERTS, false, NULL);
    device_wait(NULL);
    comm_barrier();
    comm_set_patience(2);
    comm_at(12, 2, "dispatch");
    if (comm_rank(GROUP_WORLD) == sleeper) {
        sleep(60);
    }
    peers_meet(GROUP_EXPERTS, false, NULL);
    device_wait(NULL);
}

/* The last `sleepers` ranks are asleep; the others wait as ranks with a GPU do, which do not know for whom. */
static void asleep_for_any(int sleepers) {
    comm_set_patience(2);
    comm_at(12, 2, "dispatch");
    if (comm_rank(GROUP_WORLD) >= comm_ranks(GROUP_WORLD) - sleepers) {
        sleep(60);
    }
    for (double begin = seconds_now();;) {
        comm_wait(ANY_RANK, begin, 0);
    }
}

/* Ranks wait in a chain, each in a group of two: 0 from the start for 1, which comes late, and 1 for 3, which is
 * stopped. The first whose patience ends is rank 0. */
static void chain(int at_meeting) {
    const size_t count = 100;
    acc_t *x = device_allocate(count * sizeof *x);
    CHECK(x, "out of memory on the device");
    form(2);
    open_peers();
    for (int late = 0; late < 2; late++) { /* in the second round, for GPUs are connected in the first */
        if (late) {
            comm_barrier();
            comm_set_patience(2);
            comm_at(12, 2, "dispatch");
            if (comm_rank(GROUP_WORLD) == 3) {
                raise(SIGSTOP);
            }
            sleep(comm_rank(GROUP_WORLD) == 1);
        }
        for (Group group = GROUP_REPLICAS; group >= GROUP_EXPERTS; group--) {
            if (late && group == GROUP_REPLICAS && comm_rank(GROUP_EXPERTS) == 0) {
                continue;
            }
            if (at_meeting) {
                peers_meet(group, false, NULL);
            } else {
                comm_sum(group, x, count, NULL);
            }
            device_wait(NULL);
        }
    }
}

/* Ranks 0 and 1 each expect a row of the other, and none is sent. */
static void each_for_other(int unused) {
    char *from = device_allocate(64), *to = device_allocate(64);
    int none[] = {0, 0, 0}, of_other[] = {0, comm_rank(GROUP_WORLD), 1}, one_each[] = {0, 1, 2};
    comm_exchange(GROUP_WORLD, to, one_each, from, one_each, NULL, 8, NULL); /* connects GPUs */
    device_wait(NULL);
    comm_barrier();
    comm_set_patience(1);
    comm_at(7, -1, "combine");
    comm_exchange(GROUP_WORLD, to, of_other, from, none, NULL, 8, NULL);
    device_wait(NULL);
}

/* Rank 1 sends `sent` rows of 8 bytes to rank 0, which expects 2. */
static void two_expected(int sent) {
    char *from = device_allocate(64), *to = device_allocate(64);
    int ranks = comm_ranks(GROUP_WORLD), me = comm_rank(GROUP_WORLD);
    int from_first[MAX_RANKS + 1] = {0}, to_first[MAX_RANKS + 1] = {0};
    for (int r = 0; r < ranks; r++) {
        from_first[r + 1] = from_first[r] + (me == 1 && r == 0 ? sent : 0);
        to_first[r + 1] = to_first[r] + (me == 0 && r == 1 ? 2 : 0);
    }
    comm_barrier();
    comm_set_patience(2);
    comm_at(7, -1, "combine");
    comm_exchange(GROUP_WORLD, to, to_first, from, from_first, NULL, 8, NULL);
    comm_barrier();
}

/* Rank 1 sends rows of one byte, as the barrier that follows does, to rank 0, which expects none. */
static void none_expected(int sent) {
    char *from = device_allocate(64), *to = device_allocate(64);
    int none[MAX_RANKS + 1] = {0}, all_to_0[MAX_RANKS + 1];
    for (int r = 0; r <= MAX_RANKS; r++) {
        all_to_0[r] = r > 0 ? sent : 0;
    }
    comm_exchange(GROUP_WORLD, to, none, from, comm_rank(GROUP_WORLD) == 1 ? all_to_0 : none, NULL, 1, NULL);
    comm_barrier();
}

static void differ(int other) {
    comm_check_same(comm_rank(GROUP_WORLD) == other ? "--lr 2" : "--lr 1", "configuration");
}

static void uneven_groups(int experts) {
    comm_form_groups(experts);
}

static void all_wrong(int unused) {
    CHECK(false, "--top-k 9 is wrong everywhere");
}

static void one_wrong(int rank) {
    CHECK(comm_rank(GROUP_WORLD) != rank, "wrong on rank %d alone", rank);
    comm_barrier();
}

static void killed(int rank) {
    if (comm_rank(GROUP_WORLD) == rank) {
        raise(SIGKILL);
    }
    comm_barrier();
}

static const struct {
    const char *name;
    void (*run)(int argument);
} modes[] = {
    {"results", results},
    {"many", many},
    {"huge", huge},
    {"peers", peers},
    {"asleep", asleep},
    {"asleep_at_meeting", asleep_at_meeting},
    {"asleep_for_any", asleep_for_any},
    {"chain", chain},
    {"each_for_other", each_for_other},
    {"two_expected", two_expected},
    {"none_expected", none_expected},
    {"differ", differ},
    {"all_wrong", all_wrong},
    {"one_wrong", one_wrong},
    {"killed", killed},
    {"uneven_groups", uneven_groups},
};

int main(int argc, char **argv) {
    comm_open();
    device_open(comm_local_rank(), comm_local_ranks());
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++) {
        if (argc > 1 && strcmp(argv[1], modes[i].name) == 0) {
            modes[i].run(argc > 2 ? atoi(argv[2]) : 0);
            comm_close();
            return EXIT_OK;
        }
    }
    die(__FILE__, __LINE__, "no such test: see the end of tests/comm_ranks.c");
}
