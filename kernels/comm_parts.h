/* What is between the files of comm.h, and for no others:
 *
 *     comm_host.c    opens the ranks, and everything they say on the host
 *     comm_wait.c    how they wait for each other
 *     comm.c         the calls on arrays (comm_gather, comm_sum, comm_exchange) where these lie in host memory
 *     comm.cu        the same on GPUs, instead of comm.c
 */
#ifndef KERNELS_COMM_PARTS_H
#define KERNELS_COMM_PARTS_H

#include <stddef.h>

#include "comm.h"

/* ---- of comm_wait.c ---- */

/* Between comm_open and comm_close; collective. */
void comm_wait_open(int ranks);
void comm_wait_close(void);

/* "step 12, layer 2, dispatch". */
const char *comm_where(void);

/* What a rank does after each poll in vain for a rank of the world, or for its device, which waits for any: answers
 * ranks that ask, lets others work, and ends all ranks with one line when the wait since `begin` (seconds_now) has
 * outlasted the patience. */
enum { ANY_RANK = -1 };
void comm_wait(int waiting_for, double begin, int polls_in_vain);

/* ---- of comm_host.c ---- */

/* Of the group's rank r, the number in the world. */
int comm_in_world(Group group, int r);

typedef enum { CALL_GATHER, CALL_SUM, CALL_EXCHANGE, CALL_TO_FIRST } Call;

/* Begins a call and counts it, where the group has several ranks. Returns the tag of its transfers, the same on all
 * ranks of the group. */
int comm_begin_call(Call call, Group group);

/* A message to another rank, which did not go by a transfer. */
void comm_count_message(size_t bytes);

/* Transfers between arrays on the host, with ranks of the world: all that were queued are moved by the last call. */
void comm_queue_receive(int rank, void *to, size_t bytes);
void comm_queue_send(int rank, const void *from, size_t bytes);
void comm_finish_transfers(int tag);

/* all (ranks, bytes) on the host, where this rank's is in its place already. */
void comm_gather_host(Group group, void *all, size_t bytes);

/* ---- of comm.c and of comm.cu ---- */

/* Ends the program with one line when arrays cannot travel between so many ranks. */
void comm_arrays_check(int ranks);

/* Ends what the calls on arrays have opened for the groups; collective. */
void comm_arrays_close(void);

/* Rows that the rank r sends or gets. */
static inline size_t comm_row_count(const int *first, int r) {
    return (size_t)(first[r + 1] - first[r]);
}

/* ---- of comm.cu alone ---- */

/* What device.cu calls again and again while it waits for the device, whose work may wait for other ranks: ends all
 * ranks with one line when a rank is lost, or when the wait since `begin` (seconds_now) has outlasted the patience. */
void comm_check_waiting(double begin);

#endif
