/* Processes of one machine: the arena is a file in memory (memfd) that the others map too. Called by arena.c and
 * model/exchange.c, exchange_wire.c. Read next: peers_open. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* memfd_create */
#endif
#include "peers.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "comm.h"
#include "comm_parts.h"
#include "device.h"

/* Before what was asked for, a page with the meetings that each rank has come to, told by itself. */
enum { PAGE = 4096 };

static struct {
    char *memory; /* of the last peers_allocate; owned */
    size_t bytes; /* without the page */
    int file;
} own = {.file = -1};

static struct {
    char *memory; /* where the open memory begins; NULL: none is open */
    size_t bytes;
    Group group;          /* between whose ranks it is open */
    char *of[PEERS_MOST]; /* of each of them; mapped, owned but for this rank's */
    unsigned meetings[GROUP_COUNT];
} open_memory;

/* The number of a group's rank among those between whom memory is open. */
static int place_of(Group group, int r) {
    return open_memory.group == GROUP_WORLD ? comm_in_world(group, r) : r;
}

void *peers_allocate(size_t bytes) {
    CHECK(own.file < 0, "only one arena at a time can be open to other ranks");
    int file = bytes < device_memory_free() ? memfd_create("moelab", MFD_CLOEXEC) : -1;
    if (file < 0 || ftruncate(file, (off_t)(bytes + PAGE)) != 0) {
        return NULL;
    }
    char *page = mmap(NULL, bytes + PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (page == MAP_FAILED) {
        close(file);
        return NULL;
    }
    own.file = file;
    own.memory = page + PAGE;
    own.bytes = bytes;
    return own.memory;
}

void peers_release(void *memory, size_t bytes) {
    if (memory) {
        munmap((char *)memory - PAGE, bytes + PAGE);
        close(own.file);
        own.file = -1;
    }
}

/* What a rank says of its memory. */
typedef struct {
    char machine[64];
    long process, file;
    size_t bytes;
} Address;

/* Maps the memory of a rank; NULL: cannot. */
static char *map_memory(const Address *address) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%ld/fd/%ld", address->process, address->file);
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0) {
        return NULL;
    }
    char *page = mmap(NULL, address->bytes + PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    return page == MAP_FAILED ? NULL : page + PAGE;
}

bool peers_open(void *memory, size_t bytes, char *why, size_t size) {
    int world = comm_ranks(GROUP_WORLD);
    open_memory.group = world == comm_local_ranks() && world <= PEERS_MOST ? GROUP_WORLD : GROUP_EXPERTS;
    int rank = comm_rank(open_memory.group), ranks = comm_ranks(open_memory.group);
    Address *all = calloc((size_t)ranks, sizeof *all), *mine = &all[rank];
    CHECK(all, "out of memory for the addresses of %d ranks", ranks);
    *mine = (Address){.process = getpid(), .file = own.file, .bytes = bytes};
    gethostname(mine->machine, sizeof mine->machine - 1);
    comm_gather_host(open_memory.group, all, sizeof *all);
    bool reached = ranks <= PEERS_MOST && memory == own.memory;
    snprintf(why, size, "at most %d ranks can", PEERS_MOST);
    for (int r = 0; r < ranks && reached; r++) {
        reached = strcmp(all[r].machine, mine->machine) == 0 && all[r].bytes == bytes;
        if (reached && !(open_memory.of[r] = r == rank ? memory : map_memory(&all[r]))) {
            reached = false;
            snprintf(why, size, "the memory of rank %d cannot be mapped: %s", r, strerror(errno));
        } else if (!reached) {
            snprintf(why, size, "rank %d is on another machine, or needs memory of another size", r);
        }
    }
    free(all);
    open_memory.bytes = bytes;
    open_memory.memory = comm_any(!reached) ? NULL : memory;
    return open_memory.memory != NULL;
}

void peers_close(void) {
    for (int r = 0; r < comm_ranks(open_memory.group) && open_memory.memory; r++) {
        if (r != comm_rank(open_memory.group)) {
            munmap(open_memory.of[r] - PAGE, open_memory.bytes + PAGE);
        }
    }
    memset(&open_memory, 0, sizeof open_memory);
}

bool peers_reach(Group group, const void *mine) {
    bool member = open_memory.group == GROUP_WORLD || open_memory.group == group;
    const char *at = mine;
    return member && open_memory.memory && at >= open_memory.memory && at < open_memory.memory + open_memory.bytes;
}

void *peers_at(Group group, int r, const void *mine) {
    assert(peers_reach(group, mine));
    return open_memory.of[place_of(group, r)] + ((const char *)mine - open_memory.memory);
}

PeerRows peers_rows(const void *to, int places, size_t row_bytes) {
    PeerRows rows = {.places = places};
    for (int r = 0; r < comm_ranks(GROUP_EXPERTS); r++) {
        rows.of[r] =
            (char *)peers_at(GROUP_EXPERTS, r, to) + (size_t)comm_rank(GROUP_EXPERTS) * (size_t)places * row_bytes;
    }
    return rows;
}

PeerRows peers_own_rows(void *from, int places, size_t row_bytes) {
    PeerRows rows = {.places = places};
    for (int r = 0; r < comm_ranks(GROUP_EXPERTS); r++) {
        rows.of[r] = (char *)from + (size_t)r * (size_t)places * row_bytes;
    }
    return rows;
}

PeerRows peers_homes(const void *to, int places) {
    PeerRows rows = {.places = places};
    for (int r = 0; r < comm_ranks(GROUP_EXPERTS); r++) {
        rows.of[r] = (char *)peers_at(GROUP_EXPERTS, r, to);
    }
    return rows;
}

/* Each rank begins with another, so that none gets all at once. */
void peers_copy(PeerRows to, const void *from, size_t step, size_t row_bytes, Stream *stream) {
    int rank = comm_rank(GROUP_EXPERTS), ranks = comm_ranks(GROUP_EXPERTS);
    for (int i = 1; i <= ranks; i++) {
        int r = (rank + i) % ranks;
        device_copy(to.of[r], (const char *)from + (size_t)r * step, (size_t)to.places * row_bytes, stream);
    }
}

void peers_put(PeerRows to, const void *from, size_t row_bytes, const int *there, int each, Stream *stream) {
    int count = comm_ranks(GROUP_EXPERTS) * to.places;
    for (int r = 0; r < count; r++) {
        bool goes = !there;
        for (int j = 0; j < each && !goes; j++) {
            goes = there[(size_t)r * each + j] >= 0;
        }
        if (goes) {
            memcpy(peers_row(&to, r, row_bytes), (const char *)from + (size_t)r * row_bytes, row_bytes);
        }
    }
}

void peers_put_all(void *all, const void *mine, size_t bytes, Stream *stream) {
    PeerRows to = peers_rows(all, 1, bytes);
    for (int r = 0; r < comm_ranks(GROUP_EXPERTS); r++) {
        memmove(to.of[r], mine, bytes);
    }
}

/* The number of the group's meetings that its rank r has come to, as it tells rank `of` in that one's memory. */
static _Atomic unsigned *came_to(Group group, int of, int r) {
    char *page = open_memory.of[place_of(group, of)] - PAGE;
    return (_Atomic unsigned *)page + group * PEERS_MOST + r;
}

void peers_meet(Group group, bool beside, Stream *stream) {
    int rank = comm_rank(group);
    unsigned meeting = ++open_memory.meetings[group];
    double begin = seconds_now();
    for (int r = 0; r < comm_ranks(group); r++) {
        atomic_store_explicit(came_to(group, r, rank), meeting, memory_order_release);
    }
    for (int r = 0, polls = 0; r < comm_ranks(group); r++) {
        while ((int)(atomic_load_explicit(came_to(group, rank, r), memory_order_acquire) - meeting) < 0) {
            comm_wait(comm_in_world(group, r), begin, polls++);
        }
    }
}
