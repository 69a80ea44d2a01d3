/* Ranks of one machine that reach into each other's memory: GPUs joined by NVLink or PCIe, or processes on its CPU.
 *
 *     rank 0   | weights | .. | arrived | .. |       what all ranks reserve alike lies at the same place on all,
 *     rank 1   | weights | .. | arrived | .. |       so a rank that knows where another's memory begins
 *                                  ^                 knows where everything lies in it
 *              a store of rank 0 __|
 *
 * Nothing is sent, and nobody receives. So nobody is asked whether a store suits him, and nobody is told of it: a rank
 * may store where the owner has read all that it wants of what was there, and the owner may read what it has been told
 * is there. Both is settled by peers_meet, which all ranks call between stores and reads:
 *
 *     store in others' arrived | peers_meet | read own arrived .. store in others' returned | peers_meet | ..
 *
 * What was read before a meeting may be overwritten after it.
 *
 * Rows go between the ranks of GROUP_EXPERTS. Everything but the questions is collective.
 */
#ifndef KERNELS_PEERS_H
#define KERNELS_PEERS_H

#include <stdbool.h>
#include <stddef.h>

#include "comm.h"
#include "types.h"

enum { PEERS_MOST = 16 };

/* Zeroed device memory that can be opened to others, NULL when there is not as much; for the arena. Not collective. */
void *peers_allocate(size_t bytes);
void peers_release(void *memory, size_t bytes);

/* Opens this memory, from peers_allocate on the CPU, to others, and theirs, as large, to this rank: among all ranks
 * where these are on one machine and no more than PEERS_MOST, otherwise among those of GROUP_EXPERTS. The memory of one
 * arena at a time. Returns whether all of these reach all; the reason why not in `why`, for a line. */
bool peers_open(void *memory, size_t bytes, char *why, size_t size);
void peers_close(void);

/* Whether `mine` is in memory that is open between the ranks of the group; and where the same piece of rank r is. */
bool peers_reach(Group group, const void *mine);
void *peers_at(Group group, int r, const void *mine);

/* Rows for other ranks: row r is the (r % places)-th of this rank's for rank r / places. */
typedef struct {
    char *of[PEERS_MOST]; /* where those for each rank begin, in its memory */
    int places;
} PeerRows;

/* The rows that each rank has from every other: to (ranks, places, row_bytes) in each rank's memory. */
PeerRows peers_rows(const void *to, int places, size_t row_bytes);

/* The same of this rank's own memory: from (ranks, places, row_bytes), of rows that were made for each rank. */
PeerRows peers_own_rows(void *from, int places, size_t row_bytes);

/* Where row r is. */
#ifdef __CUDACC__
__host__ __device__
#endif
    static inline void *
    peers_row(const PeerRows *rows, int r, size_t row_bytes) {
    return rows->of[r / rows->places] + (size_t)(r % rows->places) * row_bytes;
}

/* Rows that have one place in all, whoever stores them: to (places, row_bytes) in each rank's memory. Row r is the
 * (r % places)-th of rank r / places. */
PeerRows peers_homes(const void *to, int places);

/* Where each row of a plan (plan.h) goes, the other end of a RowSource: row r becomes row entry[r] of `rows`; -1: it
 * goes nowhere. An expert's rows come in the order of the ranks that they go to; `rank` is this one. */
typedef struct {
    PeerRows rows;
    const int *entry;
    int ranks, rank;
} RowTarget;

/* Stores rows (ranks*places, row_bytes) of `from`; but for row r only if one of there (.., each), r's, is not -1, where
 * `there` is not NULL. row_bytes: a multiple of 4. */
void peers_put(PeerRows to, const void *from, size_t row_bytes, const int *there, int each, Stream *stream);

/* All places, rows or not, by copies, which leave a GPU's multiprocessors to other work: those for rank r from
 * from + r*step on, where step 0 means that all get the same. */
void peers_copy(PeerRows to, const void *from, size_t step, size_t row_bytes, Stream *stream);

/* all (ranks, bytes): mine (bytes) stored on every rank, this one too. bytes: a multiple of 4. */
void peers_put_all(void *all, const void *mine, size_t bytes, Stream *stream);

/* All that the ranks of the group have stored so far is there, and all that they have read is read. Two ways to wait:
 * work in the stream that can be recorded; or, `beside` other work that fills the device, without taking any of it. */
void peers_meet(Group group, bool beside, Stream *stream);

#endif
