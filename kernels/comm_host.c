/* Ranks that find each other and talk on the host, through MPI, or one rank alone. A message is never awaited in MPI
 * itself, which would wait forever, but polled for (comm_wait.c).
 *
 * Every call is cut into transfers, at most one for each other rank and direction:
 *
 *     comm_queue_receive(3, to, bytes);  comm_queue_send(3, from, bytes);  ..  comm_finish_transfers(tag);
 *
 *     a transfer of 2.5 GiB    | 1 GiB | 1 GiB | 0.5 GiB |       one message at a time: MPI counts bytes in an int
 *
 * Messages from one rank to another arrive in the order they were sent, and a tag says to which call each belongs. So a
 * rank looks at the next message of a sender before it receives it: one of another call or another size than expected
 * means that the ranks have gone apart, and ends them all before any array is overrun.
 *
 * The static variables are like MPI's own: a process is one rank. Read next: advance, comm_finish_transfers; comm.c.
 */
#include "comm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef USE_MPI
#include <mpi.h>
#endif

#include "check.h"
#include "checksum.h"
#include "comm_parts.h"
#include "device.h"

typedef struct {
    int rank, ranks;   /* this rank's number in the group, and how many the group has */
    int first, stride; /* rank r of the group is rank first + r*stride of the world */
    int calls;         /* so far */
} Members;

static Members groups[GROUP_COUNT] = {{.ranks = 1}, {.ranks = 1}, {.ranks = 1}};

/* MPI promises tags up to 32767: 4 kinds of calls times 3 groups times 2048 numbers of calls stay below. */
enum { TAG_CALLS = 2048 };

/* What a rank says of a text, in place of the text. */
typedef struct {
    size_t length;
    uint32_t checksum;
} Digest;
static Digest *answers; /* (ranks) one of each rank; owned, NULL where nothing started the ranks */

static int local_rank = 0, local_ranks = 1; /* of the ranks on this machine */

static CommCount counted;

/* ---- transfers */

#ifdef USE_MPI

enum { MESSAGE_BYTES = 1 << 30 };

typedef struct {
    int rank; /* of the world: from whom, or to whom */
    bool receives;
    char *at; /* what is left to move; what is sent is not written */
    size_t bytes;
    bool under_way; /* a message of it */
    MPI_Request request;
} Transfer;

static Transfer *transfers; /* owned; NULL before comm_open and after comm_close, or where nothing started the ranks */
static int transfer_count;

static void queue(int rank, bool receives, void *at, size_t bytes) {
    if (bytes > 0) {
        transfers[transfer_count++] = (Transfer){.rank = rank, .receives = receives, .at = at, .bytes = bytes};
    }
}

void comm_queue_receive(int rank, void *to, size_t bytes) {
    queue(rank, true, to, bytes);
}

void comm_queue_send(int rank, const void *from, size_t bytes) {
    queue(rank, false, (void *)from, bytes);
}

static int next_message_bytes(const Transfer *t) {
    return t->bytes < MESSAGE_BYTES ? (int)t->bytes : MESSAGE_BYTES;
}

static void send_message(Transfer *t, int tag) {
    int bytes = next_message_bytes(t);
    MPI_Isend(t->at, bytes, MPI_BYTE, t->rank, tag, MPI_COMM_WORLD, &t->request);
    comm_count_message((size_t)bytes);
    t->under_way = true;
}

/* Receives the sender's next message when there is one. */
static void receive_message(Transfer *t, int tag) {
    int found, came, expected = next_message_bytes(t);
    MPI_Message message;
    MPI_Status status;
    MPI_Improbe(t->rank, MPI_ANY_TAG, MPI_COMM_WORLD, &found, &message, &status);
    if (found) {
        MPI_Get_count(&status, MPI_BYTE, &came);
        CHECK(status.MPI_TAG == tag && came == expected,
              "rank %d expected %d bytes of rank %d at %s, but %d bytes%s came: the ranks have gone apart; start all "
              "with the same program and options",
              groups[GROUP_WORLD].rank, expected, t->rank, comm_where(), came,
              status.MPI_TAG == tag ? "" : " of another call");
        MPI_Imrecv(t->at, came, MPI_BYTE, &message, &t->request);
        t->under_way = true;
    }
}

/* Begins or ends a message of the transfer. Returns whether it could. */
static bool advance(Transfer *t, int tag) {
    if (!t->under_way) {
        if (t->receives) {
            receive_message(t, tag);
        } else {
            send_message(t, tag);
        }
        return t->under_way;
    }
    int done;
    MPI_Test(&t->request, &done, MPI_STATUS_IGNORE);
    if (done) {
        size_t moved = (size_t)next_message_bytes(t);
        t->at += moved;
        t->bytes -= moved;
        t->under_way = false;
    }
    return done;
}

static Transfer *first_unfinished(void) {
    for (int i = 0; i < transfer_count; i++) {
        if (transfers[i].bytes > 0) {
            return &transfers[i];
        }
    }
    return NULL;
}

/* Moves everything queued, receives queued before sends, so that the rank named is one from which something is missing
 * wherever there is one. */
void comm_finish_transfers(int tag) {
    double begin = seconds_now();
    int polls_in_vain = 0;
    for (Transfer *waiting; (waiting = first_unfinished());) {
        bool moved = false;
        for (Transfer *t = waiting; t < transfers + transfer_count; t++) {
            moved |= t->bytes > 0 && advance(t, tag);
        }
        polls_in_vain = moved ? 0 : polls_in_vain + 1;
        if (!moved) {
            comm_wait(waiting->rank, begin, polls_in_vain);
        }
    }
    transfer_count = 0;
}

static void end_all_ranks(int exit_code) {
    MPI_Abort(MPI_COMM_WORLD, exit_code);
}

static void leave_others(void) {
    if (transfers) {
        comm_wait_close();
        MPI_Finalize();
        free(transfers);
        transfers = NULL;
    }
}

/* Ranks that could share memory are on one machine. */
static void count_neighbours(void) {
    MPI_Comm machine;
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &machine);
    MPI_Comm_rank(machine, &local_rank);
    MPI_Comm_size(machine, &local_ranks);
    MPI_Comm_free(&machine);
}

/* started: as many ranks as mpirun or srun says it started, -1 where that is not known. */
static void join_others(int started) {
    int threads, rank, ranks;
    MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &threads);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    CHECK(started < 0 || started == ranks,
          "%d ranks were started, but each finds %d: take the mpirun of the MPI that this program was built with",
          started, ranks);
    check_set_rank(rank, end_all_ranks);
    CHECK(threads >= MPI_THREAD_FUNNELED, "this MPI cannot be used with threads: build with OPENMP=0");
    comm_arrays_check(ranks);
    atexit(leave_others); /* of a program that ends without comm_close, as after --help */
    groups[GROUP_WORLD] = (Members){.rank = rank, .ranks = ranks, .first = 0, .stride = 1};
    count_neighbours();
    transfers = malloc(2 * (size_t)ranks * sizeof *transfers);
    answers = calloc((size_t)ranks, sizeof *answers);
    CHECK(transfers && answers, "out of memory for the messages of %d ranks: start fewer", ranks);
    comm_wait_open(ranks);
}

#else /* one rank, which has nobody to send to */

void comm_queue_receive(int rank, void *to, size_t bytes) {
}

void comm_queue_send(int rank, const void *from, size_t bytes) {
}

void comm_finish_transfers(int tag) {
}

static void join_others(int started) {
    CHECK(started <= 1,
          "%d ranks were started, but this program was built without MPI: apt-get install libopenmpi-dev openmpi-bin, "
          "then make again",
          started);
}

static void leave_others(void) {
}

#endif

/* ---- the ranks and their groups */

/* What a process that was started as one of several is told, by Open MPI, by MPICH's and Intel's mpirun, and by srun.
 * srun sets names of its own in every process, but only PMI's show that the processes can find each other. */
static const char *const rank_names[] = {"OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", NULL};
static const char *const ranks_names[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", NULL};

/* The number in the first of these variables that is set, or -1. */
static int number_of_launcher(const char *const *names) {
    for (; *names; names++) {
        const char *value = getenv(*names);
        if (value) {
            return atoi(value);
        }
    }
    return -1;
}

/* Alone, MPI is not even initialised: that takes time and starts processes. */
void comm_open(void) {
    int rank = number_of_launcher(rank_names);
    if (rank >= 0) {
        check_set_rank(rank, NULL);
        join_others(number_of_launcher(ranks_names));
    }
}

void comm_form_groups(int ep) {
    int rank = groups[GROUP_WORLD].rank, ranks = groups[GROUP_WORLD].ranks;
    CHECK(ep >= 1 && ranks % ep == 0, "--ep %d does not divide the %d ranks: choose one that does", ep, ranks);
    comm_arrays_close();
    groups[GROUP_EXPERTS] = (Members){.rank = rank % ep, .ranks = ep, .first = rank - rank % ep, .stride = 1};
    groups[GROUP_REPLICAS] = (Members){.rank = rank / ep, .ranks = ranks / ep, .first = rank % ep, .stride = ep};
}

/* Nobody leaves before all have come here: to those who still talk to it, a rank that left would be gone. */
void comm_close(void) {
    comm_arrays_close();
    comm_barrier();
    check_set_rank(groups[GROUP_WORLD].rank, NULL);
    leave_others();
    free(answers);
    answers = NULL;
}

int comm_rank(Group group) {
    return groups[group].rank;
}

int comm_ranks(Group group) {
    return groups[group].ranks;
}

int comm_local_rank(void) {
    return local_rank;
}

int comm_local_ranks(void) {
    return local_ranks;
}

CommCount comm_count(void) {
    return counted;
}

void comm_count_message(size_t bytes) {
    counted.messages++;
    counted.bytes += (int64_t)bytes;
}

int comm_in_world(Group group, int r) {
    return groups[group].first + r * groups[group].stride;
}

int comm_begin_call(Call call, Group group) {
    counted.calls += comm_ranks(group) > 1;
    int number = groups[group].calls++ % TAG_CALLS;
    return (int)(call * GROUP_COUNT + group) * TAG_CALLS + number;
}

/* ---- calls on the host */

void comm_gather_host(Group group, void *all, size_t bytes) {
    char *place = all;
    int rank = comm_rank(group), ranks = comm_ranks(group);
    int tag = comm_begin_call(CALL_GATHER, group);
    for (int r = 0; r < ranks; r++) {
        if (r != rank) {
            comm_queue_receive(comm_in_world(group, r), place + (size_t)r * bytes, bytes);
        }
    }
    for (int r = 0; r < ranks; r++) {
        if (r != rank) {
            comm_queue_send(comm_in_world(group, r), place + (size_t)rank * bytes, bytes);
        }
    }
    comm_finish_transfers(tag);
}

bool comm_any(bool mine) {
    int ranks = comm_ranks(GROUP_WORLD);
    if (ranks == 1) {
        return mine;
    }
    char *all = (char *)answers;
    all[comm_rank(GROUP_WORLD)] = mine;
    comm_gather_host(GROUP_WORLD, all, 1);
    return memchr(all, true, (size_t)ranks) != NULL;
}

void comm_sum_host(double *x, size_t count) {
    int rank = comm_rank(GROUP_WORLD), ranks = comm_ranks(GROUP_WORLD);
    if (ranks == 1) {
        return;
    }
    double *all = malloc(ranks * count * sizeof(double) + 1);
    CHECK(all, "out of memory for %zu numbers of %d ranks", count, ranks);
    memcpy(all + rank * count, x, count * sizeof(double));
    comm_gather_host(GROUP_WORLD, all, count * sizeof(double));
    for (size_t i = 0; i < count; i++) {
        x[i] = 0;
        for (int r = 0; r < ranks; r++) {
            x[i] += all[r * count + i];
        }
    }
    free(all);
}

void comm_barrier(void) {
    comm_any(false);
}

void comm_check_same(const char *text, const char *what) {
    int ranks = comm_ranks(GROUP_WORLD);
    if (ranks == 1) {
        return;
    }
    Digest *all = answers;
    size_t length = strlen(text);
    all[comm_rank(GROUP_WORLD)] = (Digest){length, crc32c(0, text, length)};
    comm_gather_host(GROUP_WORLD, all, sizeof *all);
    for (int r = 1; r < ranks; r++) {
        CHECK(all[r].length == all[0].length && all[r].checksum == all[0].checksum,
              "rank %d has another %s than rank 0: start all ranks with the same program, options and files", r, what);
    }
}

void comm_to_first(void *to, const void *mine, size_t bytes, int from) {
    if (from == 0) {
        memcpy(to, mine, bytes);
        return;
    }
    if (comm_rank(GROUP_WORLD) == 0) {
        comm_queue_receive(from, to, bytes);
    } else {
        comm_queue_send(0, mine, bytes);
    }
    comm_finish_transfers(CALL_TO_FIRST * GROUP_COUNT * TAG_CALLS); /* not numbered: not all ranks take part */
    counted.calls++;
}
