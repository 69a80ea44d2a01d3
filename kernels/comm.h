/* Ranks: processes that train one model together, and what they say to each other.
 *
 *     mpirun -n 4 ./train --ep 2          four ranks; without mpirun there is one, to whom all of this is the identity
 *     mpirun -n 4 ./train_cuda --ep 2     four ranks with a GPU each
 *
 *                 rank    0   1   2   3
 *     experts            (0   1) (2   3)     ep neighbours hold all experts between them, each 1/ep of them
 *     replicas           (0      2)          those that hold the same experts
 *                            (1      3)
 *     world              (0   1   2   3)     all have the same copy of everything else
 *
 * Every function but the questions is collective: all ranks of the group call it, in the same order, with the same
 * sizes where nothing else is said. Sums are taken in the order of the ranks, so all ranks get the same bits, and a run
 * repeats them. Arrays are on the device, unless a name says host.
 *
 * A rank that waits longer than comm_set_patience for others ends all of them with one line: for whom it waited, which
 * rank keeps all waiting and, from comm_at, in which step, layer and part. It takes 6 s to find that rank, and others
 * than rank 0 let lower ones speak first: all end at most 11 s after the patience of the first. A rank with a GPU
 * queues these calls as it queues kernels, and notices when it waits for its device.
 *
 *     comm_open();  comm_form_groups(ep);  ..  comm_close();
 */
#ifndef KERNELS_COMM_H
#define KERNELS_COMM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "types.h"

typedef enum { GROUP_WORLD, GROUP_EXPERTS, GROUP_REPLICAS, GROUP_COUNT } Group;

/* Before anything else of the program: finds out whether mpirun started it, and joins the others. Errors end all ranks
 * from here on (check.h); what goes wrong on all of them is said by rank 0 alone. */
void comm_open(void);

/* Groups of `ep` neighbours. Ends the program with one line when ep does not divide the number of ranks. */
void comm_form_groups(int ep);

void comm_close(void);

/* Of the ranks on this machine: this one's number, and how many there are. */
int comm_local_rank(void);
int comm_local_ranks(void);

/* This rank's number in the group, and how many the group has. Before comm_form_groups the others than the world have
 * one rank. */
int comm_rank(Group group);
int comm_ranks(Group group);

/* Where the run is, for the line that names who is waited for: step, layer (-1: none), and a part such as "dispatch",
 * which must stay where it is. Not collective. */
void comm_at(int64_t step, int layer, const char *part);
void comm_set_patience(double seconds);

/* all (ranks, bytes): what each rank of the group brought, in their order; mine (bytes) may lie in all at its place. */
void comm_gather(Group group, void *all, const void *mine, size_t bytes, Stream *stream);

/* x (count) = the sum over the ranks' x, in the order of the ranks, the same bits on all. */
void comm_sum(Group group, acc_t *x, size_t count, Stream *stream);

/* Rows to every rank of the group and from every rank: rows from_first[r] .. from_first[r+1] of `from` go to rank r,
 * and arrive at its rows to_first[this rank] on. to_first, from_first (ranks + 1): on the host; what one rank sends to
 * another and what that expects must agree. theirs (ranks): at which row of its `to` rank r expects this rank's, for
 * those who can put them there themselves: with GPUs whose memory is open to each other (peers.h) the call is a
 * meeting. NULL where that is not known. row_bytes of a row; from and to do not overlap. */
void comm_exchange(Group group, void *to, const int *to_first, const void *from, const int *from_first,
                   const int *theirs, size_t row_bytes, Stream *stream);

/* After an exchange to `to`: this rank has read what came, and all others have. Messages see to it by themselves; where
 * rows are copied, it must be so before the next exchange to the same place, and some other meeting in between does. */
void comm_exchanged(Group group, const void *to, Stream *stream);

/* x (count) on the host = the sum over all ranks' x, in their order. */
void comm_sum_host(double *x, size_t count);

/* On the host: whether any rank says so; and that all have come here. */
bool comm_any(bool mine);
void comm_barrier(void);

/* On the host: ends all ranks with one line unless this text is the same on all; what: what it is, for the line. */
void comm_check_same(const char *text, const char *what);

/* On the host: to (rank 0 alone, NULL elsewhere) = what rank `from` of the world holds in `bytes` of mine; called by
 * rank 0 and `from`. With `from` 0 a copy. */
void comm_to_first(void *to, const void *mine, size_t bytes, int from);

/* What this rank has sent to others so far, and the calls in which ranks sent anything to each other. Of recorded work
 * (device.h) only the recording counts. */
typedef struct {
    int64_t calls, messages, bytes;
} CommCount;
CommCount comm_count(void);

#endif
