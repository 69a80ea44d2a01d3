/* The calls on arrays that lie in host memory: each is cut into transfers of comm_host.c. Read next: sum_part. */
#include "comm.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "comm_parts.h"
#include "device.h"

/* Numbers that a rank holds of others while it adds; and up to how many it is quicker to send all to all. */
enum { SUM_PART = 1 << 20, SUM_FEW = 1 << 16 };
static acc_t *terms; /* SUM_PART numbers and one for each rank; owned, NULL until a sum needs them */

void comm_arrays_check(int ranks) {
}

void comm_arrays_close(void) {
    free(terms);
    terms = NULL;
}

void comm_gather(Group group, void *all, const void *mine, size_t bytes, Stream *stream) {
    char *place = (char *)all + (size_t)comm_rank(group) * bytes;
    if (place != mine) {
        device_copy(place, mine, bytes, stream);
    }
    if (comm_ranks(group) > 1) {
        comm_gather_host(group, all, bytes);
    }
}

/* Where the share of a rank begins when `count` numbers are shared among `ranks`. */
static size_t share_first(size_t count, int ranks, int rank) {
    return count * (size_t)rank / (size_t)ranks;
}

/* sum (count) = the sum of terms (ranks, count), what each rank brought. */
static void add_in_order(acc_t *sum, int ranks, size_t count) {
    memcpy(sum, terms, count * sizeof *sum);
    for (int r = 1; r < ranks; r++) {
        const acc_t *term = terms + (size_t)r * count;
        for (size_t i = 0; i < count; i++) {
            sum[i] += term[i];
        }
    }
}

/* Each rank adds up everything by itself: one round of messages, in which each waits for all others. */
static void sum_few(Group group, acc_t *x, size_t count) {
    memcpy(terms + (size_t)comm_rank(group) * count, x, count * sizeof *x);
    comm_gather_host(group, terms, count * sizeof *x);
    add_in_order(x, comm_ranks(group), count);
}

/* Reduce-scatter: each rank receives its share of x from all and adds it up. Then all-gather: it sends the sum to all.
 * x (count), count at most SUM_PART. */
static void sum_part(Group group, acc_t *x, size_t count) {
    int rank = comm_rank(group), ranks = comm_ranks(group);
    int tag = comm_begin_call(CALL_SUM, group);
    size_t first = share_first(count, ranks, rank), share = share_first(count, ranks, rank + 1) - first;
    acc_t *mine = x + first;
    memcpy(terms + (size_t)rank * share, mine, share * sizeof *x);
    for (int r = 0; r < ranks; r++) {
        if (r != rank) {
            comm_queue_receive(comm_in_world(group, r), terms + (size_t)r * share, share * sizeof *x);
        }
    }
    for (int r = 0; r < ranks; r++) {
        if (r != rank) {
            size_t from = share_first(count, ranks, r), to = share_first(count, ranks, r + 1);
            comm_queue_send(comm_in_world(group, r), x + from, (to - from) * sizeof *x);
        }
    }
    comm_finish_transfers(tag);

    add_in_order(mine, ranks, share);
    for (int r = 0; r < ranks; r++) {
        if (r != rank) {
            size_t from = share_first(count, ranks, r), to = share_first(count, ranks, r + 1);
            comm_queue_receive(comm_in_world(group, r), x + from, (to - from) * sizeof *x);
        }
    }
    for (int r = 0; r < ranks; r++) {
        if (r != rank) {
            comm_queue_send(comm_in_world(group, r), mine, share * sizeof *x);
        }
    }
    comm_finish_transfers(tag);
}

void comm_sum(Group group, acc_t *x, size_t count, Stream *stream) {
    size_t ranks = (size_t)comm_ranks(group);
    if (ranks == 1) {
        return;
    }
    if (!terms) {
        terms = malloc((SUM_PART + ranks) * sizeof *terms);
        CHECK(terms, "out of memory for the sums of %zu ranks: start fewer", ranks);
    }
    if (count * ranks <= SUM_FEW) {
        sum_few(group, x, count);
        return;
    }
    for (size_t first = 0; first < count; first += SUM_PART) {
        sum_part(group, x + first, count - first < SUM_PART ? count - first : SUM_PART);
    }
}

void comm_exchange(Group group, void *to, const int *to_first, const void *from, const int *from_first,
                   const int *theirs, size_t row_bytes, Stream *stream) {
    int rank = comm_rank(group), ranks = comm_ranks(group);
    int tag = comm_begin_call(CALL_EXCHANGE, group);
    for (int r = 0; r < ranks; r++) {
        if (r != rank) {
            char *rows = (char *)to + (size_t)to_first[r] * row_bytes;
            comm_queue_receive(comm_in_world(group, r), rows, comm_row_count(to_first, r) * row_bytes);
        }
    }
    for (int r = 0; r < ranks; r++) {
        if (r != rank) {
            const char *rows = (const char *)from + (size_t)from_first[r] * row_bytes;
            comm_queue_send(comm_in_world(group, r), rows, comm_row_count(from_first, r) * row_bytes);
        }
    }
    assert(comm_row_count(to_first, rank) == comm_row_count(from_first, rank));
    device_copy((char *)to + (size_t)to_first[rank] * row_bytes,
                (const char *)from + (size_t)from_first[rank] * row_bytes, comm_row_count(to_first, rank) * row_bytes,
                stream);
    comm_finish_transfers(tag);
}

void comm_exchanged(Group group, const void *to, Stream *stream) {
}
