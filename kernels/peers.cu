/* GPUs of one machine: each process has the others' memory mapped (CUDA IPC), so kernels store in it, and copies go
 * there, over NVLink where there is one. Called by arena.c, comm.cu and model/exchange_wire.c. Read next: peers_open,
 * meet_kernel. */
#include "cuda.cuh"

#include <assert.h>
#include <cudaTypedefs.h>
#include <unistd.h>

extern "C" {
#include "comm_parts.h"
#include "peers.h"
}

enum { THREADS = 256, FLAG_BYTES = 2 << 20 /* an allocation of its own */ };

/* Numbers of meetings, of each kind: those in the stream, and those beside other work, on each stream. */
enum { IN_STREAM, BESIDE, BESIDE_ON_SECOND, KINDS };

/* In each rank's memory: the meetings that it, or rank r as that one tells it, has come to. */
typedef struct {
    unsigned came[GROUP_COUNT][KINDS][PEERS_MOST], meetings[GROUP_COUNT];
} Flags;

static struct {
    char *memory; /* where the open memory begins; NULL: none is open */
    size_t bytes;
    Group group;                           /* between whose ranks it is open */
    char *of[PEERS_MOST];                  /* of each of them, as this process sees it */
    Flags *flags[PEERS_MOST];              /* likewise; this rank's is owned */
    unsigned meetings[GROUP_COUNT][KINDS]; /* those that the host has queued */
} open_memory;

/* The number of a group's rank among those between whom memory is open. */
static int place_of(Group group, int r) {
    return open_memory.group == GROUP_WORLD ? comm_in_world(group, r) : r;
}

void *peers_allocate(size_t bytes) {
    return device_allocate(bytes);
}

void peers_release(void *memory, size_t bytes) {
    device_release(memory, bytes);
}

/* What a rank says of its memory. */
typedef struct {
    char machine[64];
    cudaIpcMemHandle_t memory, flags;
    size_t bytes;
} Address;

static bool map_memory(const cudaIpcMemHandle_t *handle, void **at) {
    cudaError_t error = cudaIpcOpenMemHandle(at, *handle, cudaIpcMemLazyEnablePeerAccess);
    cudaGetLastError();
    return error == cudaSuccess;
}

/* Of other ranks than this one's. */
static bool map_rank(const Address *address, int r) {
    return map_memory(&address->memory, (void **)&open_memory.of[r]) &&
           map_memory(&address->flags, (void **)&open_memory.flags[r]);
}

bool peers_open(void *memory, size_t bytes, char *why, size_t size) {
    const int world = comm_ranks(GROUP_WORLD);
    const Group group = world == comm_local_ranks() && world <= PEERS_MOST ? GROUP_WORLD : GROUP_EXPERTS;
    const int rank = comm_rank(group), ranks = comm_ranks(group);
    snprintf(why, size, "at most %d ranks can, on GPUs that can share memory", PEERS_MOST);
    if (ranks > PEERS_MOST) {
        return false;
    }
    Address *all = (Address *)calloc(ranks, sizeof *all), *mine = &all[rank];
    CHECK(all, "out of memory for the addresses of %d ranks", ranks);
    memset(&open_memory, 0, sizeof open_memory);
    void *flags = device_allocate(FLAG_BYTES);
    CHECK(flags, "out of memory for the meetings of %d ranks", ranks);
    device_wait(NULL); /* they are zero */
    mine->bytes = bytes;
    gethostname(mine->machine, sizeof mine->machine - 1);
    bool reached = cudaIpcGetMemHandle(&mine->memory, memory) == cudaSuccess &&
                   cudaIpcGetMemHandle(&mine->flags, flags) == cudaSuccess;
    cudaGetLastError();
    comm_gather_host(group, all, sizeof *all);
    for (int r = 0; r < ranks && reached; r++) {
        reached =
            strcmp(all[r].machine, mine->machine) == 0 && all[r].bytes == bytes && (r == rank || map_rank(&all[r], r));
        if (!reached) {
            snprintf(why, size, "the memory of rank %d cannot be reached: is it on another machine?", r);
        }
    }
    free(all);
    open_memory.group = group;
    open_memory.of[rank] = (char *)memory;
    open_memory.flags[rank] = (Flags *)flags;
    open_memory.bytes = bytes;
    open_memory.memory = comm_any(!reached) ? NULL : (char *)memory;
    return open_memory.memory != NULL;
}

/* Nobody leaves before all have come here: the others still store in its memory. */
void peers_close(void) {
    const int rank = comm_rank(open_memory.group);
    if (!open_memory.bytes) {
        return;
    }
    device_wait(NULL);
    device_wait(device_second_stream());
    comm_barrier();
    for (int r = 0; r < comm_ranks(open_memory.group); r++) {
        if (r != rank && open_memory.of[r]) {
            CUDA_CHECK(cudaIpcCloseMemHandle(open_memory.of[r]));
        }
        if (r != rank && open_memory.flags[r]) {
            CUDA_CHECK(cudaIpcCloseMemHandle(open_memory.flags[r]));
        }
    }
    comm_barrier();
    device_release(open_memory.flags[rank], FLAG_BYTES);
    memset(&open_memory, 0, sizeof open_memory);
}

bool peers_reach(Group group, const void *mine) {
    bool member = open_memory.group == GROUP_WORLD || open_memory.group == group;
    const char *at = (const char *)mine;
    return member && open_memory.memory && at >= open_memory.memory && at < open_memory.memory + open_memory.bytes;
}

void *peers_at(Group group, int r, const void *mine) {
    assert(peers_reach(group, mine));
    return open_memory.of[place_of(group, r)] + ((const char *)mine - open_memory.memory);
}

PeerRows peers_rows(const void *to, int places, size_t row_bytes) {
    PeerRows rows = {};
    rows.places = places;
    for (int r = 0; r < comm_ranks(GROUP_EXPERTS); r++) {
        rows.of[r] = (char *)peers_at(GROUP_EXPERTS, r, to) + (size_t)comm_rank(GROUP_EXPERTS) * places * row_bytes;
    }
    return rows;
}

PeerRows peers_own_rows(void *from, int places, size_t row_bytes) {
    PeerRows rows = {};
    rows.places = places;
    for (int r = 0; r < comm_ranks(GROUP_EXPERTS); r++) {
        rows.of[r] = (char *)from + (size_t)r * (size_t)places * row_bytes;
    }
    return rows;
}

PeerRows peers_homes(const void *to, int places) {
    PeerRows rows = {};
    rows.places = places;
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

/* A warp for each row, its lanes the row's words of type T. step: from row to row of `from`. */
template <class T>
__global__ static void put_kernel(PeerRows to, const char *from, size_t step, size_t row_bytes, const int *there,
                                  int each, int rows) {
    const int r = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (r >= rows) {
        return;
    }
    bool goes = !there;
    for (int j = lane; j < each && !goes; j += 32) {
        goes = there[(size_t)r * each + j] >= 0;
    }
    if (__any_sync(0xffffffffu, goes)) {
        T *target = (T *)peers_row(&to, r, row_bytes);
        const T *source = (const T *)(from + r * step);
        for (size_t i = lane; i < row_bytes / sizeof(T); i += 32) {
            target[i] = source[i];
        }
    }
}

static bool whole_packs(PeerRows to, const void *from, size_t row_bytes) {
    bool whole = row_bytes % sizeof(int4) == 0 && (size_t)from % sizeof(int4) == 0;
    for (int r = 0; r < comm_ranks(GROUP_EXPERTS); r++) {
        whole &= (size_t)to.of[r] % sizeof(int4) == 0;
    }
    return whole;
}

static void put(PeerRows to, const void *from, size_t step, size_t row_bytes, const int *there, int each,
                cudaStream_t stream) {
    const int rows = comm_ranks(GROUP_EXPERTS) * to.places, blocks = ceil_div(rows, THREADS / 32);
    if (whole_packs(to, from, row_bytes)) {
        put_kernel<int4><<<blocks, THREADS, 0, stream>>>(to, (const char *)from, step, row_bytes, there, each, rows);
    } else {
        put_kernel<int><<<blocks, THREADS, 0, stream>>>(to, (const char *)from, step, row_bytes, there, each, rows);
    }
    CUDA_LAUNCHED();
}

void peers_put(PeerRows to, const void *from, size_t row_bytes, const int *there, int each, Stream *stream) {
    put(to, from, row_bytes, row_bytes, there, each, cuda_stream(stream));
}

void peers_put_all(void *all, const void *mine, size_t bytes, Stream *stream) {
    put(peers_rows(all, 1, bytes), mine, 0, bytes, NULL, 0, cuda_stream(stream));
}

/* ---- meetings ---- */

typedef struct {
    Flags *of[PEERS_MOST];
} FlagsOfAll;

/* A thread for each rank: tells it that this rank has come, and waits for it. What kernels before this one have stored
 * is seen by whoever sees the flag (release, at the system's scope), and what others stored before theirs is seen here
 * and behind (acquire). Numbers of meetings only grow, so nobody resets them, and a recorded step can be repeated. */
__global__ static void meet_kernel(FlagsOfAll flags, Group group, int rank, int ranks) {
    __shared__ unsigned meeting;
    const int r = threadIdx.x;
    Flags *mine = flags.of[rank];
    if (r == 0) {
        meeting = ++mine->meetings[group];
    }
    __syncthreads();
    if (r < ranks) {
        unsigned came;
        asm volatile("st.release.sys.global.u32 [%0], %1;"
                     :
                     : "l"(&flags.of[r]->came[group][IN_STREAM][rank]), "r"(meeting)
                     : "memory");
        do {
            asm volatile("ld.acquire.sys.global.u32 %0, [%1];"
                         : "=r"(came)
                         : "l"(&mine->came[group][IN_STREAM][r])
                         : "memory");
        } while ((int)(came - meeting) < 0);
    }
}

/* The driver's entry, found when the program runs: no library of the driver is linked. */
static PFN_cuStreamBatchMemOp_v11070 batch_of_words(void) {
    static void *entry = NULL;
    if (!entry) {
        cudaDriverEntryPointQueryResult found;
        CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuStreamBatchMemOp", &entry, 11070, cudaEnableDefault, &found));
        CHECK(found == cudaDriverEntryPointSuccess,
              "the NVIDIA driver cannot wait in streams: update it, or take "
              "--peer-memory 0");
    }
    return (PFN_cuStreamBatchMemOp_v11070)entry;
}

/* The same by words that the stream itself writes and waits for, which needs no multiprocessor. */
static void meet_beside(Group group, int kind, cudaStream_t stream) {
    const int rank = comm_rank(group), ranks = comm_ranks(group);
    const unsigned meeting = ++open_memory.meetings[group][kind];
    CUstreamBatchMemOpParams word[2 * PEERS_MOST] = {};
    int words = 0;
    for (int r = 0; r < ranks; r++) {
        if (r != rank) {
            word[words].writeValue.operation = CU_STREAM_MEM_OP_WRITE_VALUE_32;
            word[words].writeValue.address =
                (CUdeviceptr)&open_memory.flags[place_of(group, r)]->came[group][kind][rank];
            word[words++].writeValue.value = meeting;
        }
    }
    for (int r = 0; r < ranks; r++) {
        if (r != rank) {
            word[words].waitValue.operation = CU_STREAM_MEM_OP_WAIT_VALUE_32;
            word[words].waitValue.address =
                (CUdeviceptr)&open_memory.flags[place_of(group, rank)]->came[group][kind][r];
            word[words].waitValue.value = meeting;
            word[words++].waitValue.flags = CU_STREAM_WAIT_VALUE_GEQ;
        }
    }
    CUresult result = batch_of_words()((CUstream)stream, words, word, 0);
    CHECK(result == CUDA_SUCCESS, "waiting in a stream failed (CUDA driver error %d): take --peer-memory 0", result);
}

void peers_meet(Group group, bool beside, Stream *stream) {
    if (beside) {
        meet_beside(group, stream == device_second_stream() ? BESIDE_ON_SECOND : BESIDE, cuda_stream(stream));
        return;
    }
    FlagsOfAll flags = {};
    for (int r = 0; r < comm_ranks(group); r++) {
        flags.of[r] = open_memory.flags[place_of(group, r)];
    }
    meet_kernel<<<1, PEERS_MOST, 0, cuda_stream(stream)>>>(flags, group, comm_rank(group), comm_ranks(group));
    CUDA_LAUNCHED();
}
