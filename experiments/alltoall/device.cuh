/* The device as the host sees it: its memory, and what is handed to it, all of which is counted: kernels, copies,
 * exchanges between ranks, and how often the host waits. Called by the levels and alltoall.cuh. Read next: task.cuh. */
#ifndef ALLTOALL_DEVICE_CUH
#define ALLTOALL_DEVICE_CUH

#include "ranks.cuh"

/* ---- memory ---- */

typedef struct {
    void *at[64];
    size_t bytes[64];
    int count;
} Memory;

static Memory kept, fresh; /* for a task; for one run */

static inline void *take(Memory *memory, size_t bytes) {
    int i = memory->count++;
    CHECK(i < (int)(sizeof memory->at / sizeof *memory->at), "alltoall: more arrays than there are places");
    memory->bytes[i] = bytes + 16;
    CUDA(cudaMalloc(&memory->at[i], memory->bytes[i]));
    return memory->at[i];
}

/* Device memory that stays until the task is done. */
template <class T>
static T *keep_array(size_t count) {
    return (T *)take(&kept, count * sizeof(T));
}

/* Device memory for one run, which ends with give_back(&fresh). */
template <class T>
static T *fresh_array(size_t count) {
    return (T *)take(&fresh, count * sizeof(T));
}

static inline void give_back(Memory *memory) {
    while (memory->count > 0) {
        CUDA(cudaFree(memory->at[--memory->count]));
    }
}

/* NaN in all of it, so that what a run leaves out is found. */
static inline void poison(const Memory *memory) {
    for (int i = 0; i < memory->count; i++) {
        CUDA(cudaMemset(memory->at[i], 0xff, memory->bytes[i]));
    }
}

/* ---- what the host hands to the device, and how often it waits for it: all of it is counted ---- */

typedef struct {
    double bytes;   /* sent to other ranks */
    int exchanges;  /* between all ranks */
    int host_waits; /* for the device */
    int launches;   /* kernels, copies and exchanges handed to the device; a graph of them is one */
} Counted;

static Counted counted;

#define LAUNCH_ON(stream, kernel, blocks, threads, ...)                \
    do {                                                               \
        if ((blocks) > 0) {                                            \
            kernel<<<(blocks), (threads), 0, (stream)>>>(__VA_ARGS__); \
            CUDA(cudaGetLastError());                                  \
            counted.launches++;                                        \
        }                                                              \
    } while (0)

#define LAUNCH(kernel, blocks, threads, ...) LAUNCH_ON(world.stream, kernel, blocks, threads, __VA_ARGS__)

static inline void copy(void *to, const void *from, size_t bytes) {
    if (bytes > 0) {
        CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, world.stream));
        counted.launches++;
    }
}

/* To the host, which waits for it. */
static inline void download(void *to, const void *from, size_t bytes) {
    copy(to, from, bytes);
    CUDA(cudaStreamSynchronize(world.stream));
    counted.host_waits++;
}

/* Rows from_first[r] .. from_first[r+1] of `from` go to rank r, and rows to_first[r] .. of `to` come from it; to_first,
 * from_first (ranks + 1) on the host. */
static inline void exchange(void *to, const int *to_first, const void *from, const int *from_first, size_t row_bytes) {
    NCCL(ncclGroupStart());
    for (int r = 0; r < world.ranks; r++) {
        size_t out = (from_first[r + 1] - from_first[r]) * row_bytes;
        size_t in = (to_first[r + 1] - to_first[r]) * row_bytes;
        if (out > 0) {
            const char *rows = (const char *)from + from_first[r] * row_bytes;
            NCCL(ncclSend(rows, out, ncclInt8, r, world.comm, world.stream));
        }
        if (in > 0) {
            char *rows = (char *)to + to_first[r] * row_bytes;
            NCCL(ncclRecv(rows, in, ncclInt8, r, world.comm, world.stream));
        }
        counted.bytes += r == world.rank ? 0 : out;
    }
    NCCL(ncclGroupEnd());
    counted.exchanges++;
    counted.launches++;
}

/* first (ranks + 1) = where each rank's rows begin, of count (ranks). Returns how many there are. */
static inline int rows_first(int *first, const int *count) {
    first[0] = 0;
    for (int r = 0; r < world.ranks; r++) {
        first[r + 1] = first[r] + count[r];
    }
    return first[world.ranks];
}

#endif
