/* Level 7: a kernel stores rows straight into the memory of the rank they are for. No message, no NCCL in the way: two
 * kernels are the whole exchange.
 *
 *     window of a rank, of which every other knows where it lies (NCCL's symmetric memory, over NVLink):
 *         rows       (ranks, M, H)   from each rank, a place for each of its tokens
 *         notes      (ranks, M, K)   which of this rank's experts a token is for, with which weight; or none
 *         back       (ranks, M, H)   from each rank, what its experts made of this one's tokens
 *         arrived, returned (ranks)  flags: all rows of that rank are here; all of what it made is back
 *
 *     dispatch   each token: its row to the ranks of its experts, its notes to all; then the flag `arrived` on all
 *     combine    wait for each rank's flag; its experts' weighted sums to its `back`; then the flag `returned` on all;
 *                wait for all of those; y[t] = sum of what came back
 *
 * One idea more than level 6: what has a place is not sent, it is put there. Token t of rank s has place (s, t) on all
 * ranks, so nothing is counted or sorted, and a place without a row costs memory, not time.
 *
 * A flag holds the number of the call, which only grows, so nobody resets it. Stores come before the flag that tells of
 * them: every thread fences, the last block to finish sets the flags (release), and who waits reads them (acquire). A
 * rank can begin the next call only when all others have returned, and so have read, what it sent in this one.
 *
 * In combine blocks wait for others of the same grid, on all ranks: all blocks must be on the device at once, which a
 * cooperative launch makes sure of. Waiting ends after some ten seconds, with an error of the device.
 *
 * Expect: two kernels and two trips over the link, 10 us where rows are few; the link's rate where they are many. */
#include "alltoall.cuh"

#include <cuda/atomic>
#include <nccl_device.h>

enum { THREADS = 256 };

typedef struct __align__(8) {
    int expert; /* number among the receiver's; -1: not one of them */
    float weight;
}
Note;

typedef struct {
    unsigned call;     /* number of the last one */
    unsigned finished; /* blocks of the kernel that runs */
} State;

/* The window, and where in it everything begins. */
typedef struct {
    ncclWindow_t window;
    void *memory; /* this rank's part of it; a single rank has no window, for NCCL makes none, and this alone */
    size_t rows, notes, back, arrived, returned, state, bytes;
    int rank, ranks, experts, M, K, packs;
} Wire;

/* Byte `begin` of the window of rank `on`. */
static __device__ char *window_at(const Wire &w, size_t begin, int on) {
    return w.ranks == 1 ? (char *)w.memory + begin : (char *)ncclGetLsaPointer(w.window, begin, on);
}

/* Place (source, t) in the window of rank `on`. */
static __device__ Pack *row_at(const Wire &w, size_t begin, int on, int source, int t) {
    return (Pack *)window_at(w, begin, on) + ((size_t)source * w.M + t) * w.packs;
}

static __device__ Note *notes_at(const Wire &w, int on, int source, int t) {
    return (Note *)window_at(w, w.notes, on) + ((size_t)source * w.M + t) * w.K;
}

static __device__ unsigned *flag_at(const Wire &w, size_t begin, int on, int source) {
    return (unsigned *)window_at(w, begin, on) + source;
}

static __device__ State *state_of(const Wire &w) {
    return (State *)window_at(w, w.state, w.rank);
}

typedef cuda::atomic_ref<unsigned, cuda::thread_scope_system> Flag;

/* All threads of a block come here once their stores are done; of the last block of the grid, one tells all ranks. */
static __device__ void tell_all(const Wire &w, size_t flags, unsigned call) {
    State *state = state_of(w);
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0 && atomicAdd(&state->finished, 1u) == gridDim.x - 1) {
        __threadfence_system();
        state->finished = 0;
        state->call = call;
        for (int r = 0; r < w.ranks; r++) {
            Flag(*flag_at(w, flags, r, w.rank)).store(call, cuda::memory_order_release);
        }
    }
}

/* All threads of a block wait until rank `source` has told this one. */
static __device__ void wait_for(const Wire &w, size_t flags, int source, unsigned call) {
    const long long limit = 20000000000; /* cycles */
    if (threadIdx.x == 0) {
        Flag flag(*flag_at(w, flags, w.rank, source));
        long long begin = clock64();
        while (flag.load(cuda::memory_order_acquire) < call) {
            if (clock64() - begin > limit) {
                __trap();
            }
        }
    }
    __syncthreads();
}

/* Bit r: an expert that the token chose is on rank r. */
static __device__ unsigned ranks_of(const int *chosen, int K, int experts) {
    unsigned ranks = 0;
    for (int j = 0; j < K; j++) {
        ranks |= 1u << chosen[j] / experts;
    }
    return ranks;
}

/* x (T, packs), expert, weight (T,K). Grid: blocks take turns at places, of which those beyond T get notes too. */
static __global__ void dispatch_kernel(Wire w, const Pack *x, const int *expert, const float *weight, int T) {
    unsigned call = state_of(w)->call + 1;
    for (int t = blockIdx.x; t < w.M; t += gridDim.x) {
        const int *chosen = expert + (size_t)t * w.K;
        for (int i = threadIdx.x; i < w.ranks * w.K; i += THREADS) {
            int r = i / w.K, j = i % w.K;
            bool there = t < T && chosen[j] / w.experts == r;
            notes_at(w, r, w.rank, t)[j] = there ? Note{chosen[j] % w.experts, weight[t * w.K + j]} : Note{-1, 0};
        }
        unsigned to = t < T ? ranks_of(chosen, w.K, w.experts) : 0;
        for (int p = threadIdx.x; p < w.packs && to; p += THREADS) {
            Pack pack = x[(size_t)t * w.packs + p];
            for (int r = 0; r < w.ranks; r++) {
                if (to >> r & 1) {
                    row_at(w, w.rows, r, w.rank, t)[p] = pack;
                }
            }
        }
    }
    tell_all(w, w.arrived, call);
}

/* Place (source, t): the weighted sum of what this rank's experts make of the row, to the rank it came from. */
static __device__ void send_back(const Wire &w, int source, int t, bool whole) {
    const Note *note = notes_at(w, w.rank, source, t);
    const Pack *row = row_at(w, w.rows, w.rank, source, t);
    Pack *back = row_at(w, w.back, source, w.rank, t);
    bool any = false;
    for (int j = 0; j < w.K; j++) {
        any |= note[j].expert >= 0;
    }
    for (int p = threadIdx.x; p < w.packs && any; p += THREADS) {
        Pack pack = row[p];
        float sum[PACK] = {};
        for (int j = 0; j < w.K; j++) {
            if (note[j].expert >= 0) {
                float scale = scale_at(w.rank * w.experts + note[j].expert, whole);
                add_pack(sum, scaled_pack(pack, scale), note[j].weight);
            }
        }
        back[p] = rounded_pack(sum);
    }
}

/* y (T, packs). Grid: blocks take turns at places, then at tokens; all of them are on the device at once. */
static __global__ void combine_kernel(Wire w, Pack *y, const int *expert, int T, bool whole) {
    unsigned call = state_of(w)->call;
    for (int i = blockIdx.x, waited = -1; i < w.ranks * w.M; i += gridDim.x) {
        int source = (w.rank + i / w.M) % w.ranks; /* the own rows first: they are here already */
        if (source != waited) {
            wait_for(w, w.arrived, source, call);
            waited = source;
        }
        send_back(w, source, i % w.M, whole);
    }
    tell_all(w, w.returned, call);
    for (int r = 0; r < w.ranks; r++) {
        wait_for(w, w.returned, r, call);
    }
    for (int t = blockIdx.x; t < T; t += gridDim.x) {
        unsigned from = ranks_of(expert + (size_t)t * w.K, w.K, w.experts);
        for (int p = threadIdx.x; p < w.packs; p += THREADS) {
            float sum[PACK] = {};
            for (int r = 0; r < w.ranks; r++) {
                if (from >> r & 1) {
                    add_pack(sum, row_at(w, w.back, w.rank, r, t)[p], 1);
                }
            }
            y[(size_t)t * w.packs + p] = rounded_pack(sum);
        }
    }
}

static struct {
    Wire wire;
    int blocks;   /* that are on the device at once */
    double bytes; /* stored into other ranks' memory by a call */
} own;

/* The next `bytes` of the window, on a boundary of 128. */
static size_t part_of(Wire *w, size_t bytes) {
    size_t begin = w->bytes;
    w->bytes += (bytes + 127) / 128 * 128;
    return begin;
}

static void open_window(const Task *task) {
    Wire *w = &own.wire;
    size_t places = (size_t)task->ranks * task->M;
    *w = {};
    w->rank = task->rank;
    w->ranks = task->ranks;
    w->experts = task->experts;
    w->M = task->M;
    w->K = task->K;
    w->packs = task->H / PACK;
    w->rows = part_of(w, places * w->packs * sizeof(Pack));
    w->notes = part_of(w, places * w->K * sizeof(Note));
    w->back = part_of(w, places * w->packs * sizeof(Pack));
    w->arrived = part_of(w, task->ranks * sizeof(unsigned));
    w->returned = part_of(w, task->ranks * sizeof(unsigned));
    w->state = part_of(w, sizeof(State));
    NCCL(ncclMemAlloc(&w->memory, w->bytes));
    CUDA(cudaMemset(w->memory, 0xff, w->bytes));
    CUDA(cudaMemset((char *)w->memory + w->arrived, 0, w->bytes - w->arrived));
    CUDA(cudaDeviceSynchronize());
    if (w->ranks > 1) {
        CHECK(ncclTeamLsa(world.comm).nRanks == task->ranks,
              "alltoall: not all ranks reach each other's memory: level 7 needs GPUs joined by NVLink");
        NCCL(ncclCommWindowRegister(world.comm, w->memory, w->bytes, &w->window, NCCL_WIN_COLL_SYMMETRIC));
        CHECK(w->window, "alltoall: NCCL has no symmetric memory here: it needs GPUs that reach each other");
    }
    MPI_Barrier(MPI_COMM_WORLD);
}

static void prepare(const Task *task) {
    int gpu, processors, at_once, out, in;
    open_window(task);
    CUDA(cudaGetDevice(&gpu));
    CUDA(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, gpu));
    CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&at_once, combine_kernel, THREADS, 0));
    own.blocks = processors * at_once;
    count_rows(&out, &in, task);
    own.bytes = (double)(out + in) * task->H * sizeof(half) + (task->ranks - 1.0) * task->M * task->K * sizeof(Note);
}

static void run(const Task *task) {
    cudaLaunchAttribute together = {};
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(min(own.blocks, task->ranks * task->M));
    config.blockDim = dim3(THREADS);
    config.stream = world.stream;
    config.attrs = &together;
    config.numAttrs = 1;
    LAUNCH(dispatch_kernel, min(own.blocks, task->M), THREADS, own.wire, (const Pack *)task->x, task->expert,
           task->weight, task->T);
    CUDA(cudaLaunchKernelEx(&config, combine_kernel, own.wire, (Pack *)task->y, task->expert, task->T, task->whole));
    counted.launches++;
    counted.bytes += own.bytes;
}

static void release(void) {
    if (own.wire.window) {
        NCCL(ncclCommWindowDeregister(world.comm, own.wire.window));
    }
    NCCL(ncclMemFree(own.wire.memory));
}

int main(int argc, char **argv) {
    return alltoall_ladder({"7 stores", prepare, run, release}, argc, argv);
}
