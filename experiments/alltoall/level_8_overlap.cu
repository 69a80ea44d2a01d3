/* Level 8: experts that really multiply, and rows that travel meanwhile. Tokens go in chunks: while the experts work on
 * one, the rows of the next come and the results of the one before leave.
 *
 *     wire       dispatch 0 | dispatch 1 | ..         | return 0              | return 1 | combine
 *     experts                 hand out 0, product 0   | hand out 1, product 1 | ..
 *
 *     hand out   rows that arrived to the places (experts, most) of this rank's experts
 *     product    made_e = rows_e W_e^T, a matrix (H,H) for each expert, all as one batch of equal products
 *     return     each row's weighted sum over its experts, to the rank it came from; combine sums those, as before
 *
 * One idea more than level 7: a link and a multiplier that wait for each other are both used half. Each chunk has flags
 * of its own; on two streams an event says when a chunk is sent, and when it is multiplied. The wire's stream goes
 * first where the device must choose, for other ranks wait for it.
 *
 * An expert has `most` places in a chunk, the mean and six deviations, so the product's size is known without asking
 * (level 3 of the ladder of products). Who takes which place is left to chance: a row's product does not depend on it.
 *
 * The program runs itself with 1, 2 and 4 chunks. Expect of chunks: less than with one where both sides take long, at
 * best the longer of the two; more where rows are few, for a small product reads the same matrices as a large one. */
#include "alltoall.cuh"

#include <cublas_v2.h>
#include <cuda/atomic>
#include <nccl_device.h>

#define BLAS(call)                                                                                                  \
    do {                                                                                                            \
        cublasStatus_t blas_status = (call);                                                                        \
        CHECK(blas_status == CUBLAS_STATUS_SUCCESS, "alltoall: %s: %s", #call, cublasGetStatusString(blas_status)); \
    } while (0)

enum { THREADS = 256, MOST_CHOICES = 16, MOST_CHUNKS = 4 };

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
    int chunk; /* tokens of one */
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

/* A chunk's; there is one from each rank. */
static __device__ unsigned *flag_at(const Wire &w, size_t begin, int chunk, int on, int source) {
    return (unsigned *)window_at(w, begin, on) + chunk * w.ranks + source;
}

static __device__ State *state_of(const Wire &w) {
    return (State *)window_at(w, w.state, w.rank);
}

typedef cuda::atomic_ref<unsigned, cuda::thread_scope_system> Flag;

/* All threads of a block come here when they are done. Returns whether this thread is to speak for the whole grid: one
 * of the last block. */
static __device__ bool is_last(const Wire &w) {
    State *state = state_of(w);
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x != 0 || atomicAdd(&state->finished, 1u) != gridDim.x - 1) {
        return false;
    }
    __threadfence_system();
    state->finished = 0;
    return true;
}

static __device__ void tell_all(const Wire &w, size_t flags, int chunk, unsigned call) {
    for (int r = 0; r < w.ranks; r++) {
        Flag(*flag_at(w, flags, chunk, r, w.rank)).store(call, cuda::memory_order_release);
    }
}

/* All threads of a block wait until rank `source` has told this one. */
static __device__ void wait_for(const Wire &w, size_t flags, int chunk, int source, unsigned call) {
    const long long limit = 20000000000; /* cycles */
    if (threadIdx.x == 0) {
        Flag flag(*flag_at(w, flags, chunk, w.rank, source));
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

/* Tokens of a chunk: from the first to before the end. */
static __host__ __device__ int chunk_end(const Wire &w, int chunk) {
    int end = (chunk + 1) * w.chunk;
    return end < w.M ? end : w.M;
}

/* Place i of a chunk, by rank. */
static __device__ void find_place(const Wire &w, int chunk, int i, int *source, int *t) {
    int first = chunk * w.chunk, tokens = chunk_end(w, chunk) - first;
    *source = i / tokens;
    *t = first + i % tokens;
}

/* x (T, packs), expert, weight (T,K). Grid: blocks take turns at the chunk's tokens; those beyond T get notes too. */
static __global__ void dispatch_kernel(Wire w, int chunk, const Pack *x, const int *expert, const float *weight,
                                       int T) {
    unsigned call = state_of(w)->call + 1;
    for (int t = chunk * w.chunk + blockIdx.x; t < chunk_end(w, chunk); t += gridDim.x) {
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
    if (is_last(w)) {
        tell_all(w, w.arrived, chunk, call);
    }
}

/* What the experts work on and what they make of it: the same place in both. */
typedef struct {
    Pack *rows; /* (experts, most, packs) */
    Pack *made; /* (experts, most, packs) of the chunk */
    int *taken; /* (experts) places */
    int *place; /* (ranks, M, K) of each note; -1: none was left */
    int most;
} Desk;

/* Grid: a block to a place of the chunk. */
static __global__ void hand_out_kernel(Wire w, Desk desk, int chunk) {
    __shared__ int place[MOST_CHOICES];
    int source, t, j = threadIdx.x;
    find_place(w, chunk, blockIdx.x, &source, &t);
    wait_for(w, w.arrived, chunk, source, state_of(w)->call + 1);
    const Note *note = notes_at(w, w.rank, source, t);
    if (j < w.K) {
        int e = note[j].expert, row = e >= 0 ? atomicAdd(&desk.taken[e], 1) : desk.most;
        place[j] = row < desk.most ? e * desk.most + row : -1;
        desk.place[((size_t)source * w.M + t) * w.K + j] = place[j];
    }
    __syncthreads();
    const Pack *row = row_at(w, w.rows, w.rank, source, t);
    for (int k = 0; k < w.K; k++) {
        for (int p = threadIdx.x; p < w.packs && place[k] >= 0; p += THREADS) {
            desk.rows[(size_t)place[k] * w.packs + p] = row[p];
        }
    }
}

/* Grid: blocks take turns at the chunk's places. */
static __global__ void return_kernel(Wire w, Desk desk, int chunk) {
    unsigned call = state_of(w)->call + 1;
    int places = w.ranks * (chunk_end(w, chunk) - chunk * w.chunk);
    for (int i = blockIdx.x; i < places; i += gridDim.x) {
        int source, t;
        find_place(w, chunk, i, &source, &t);
        const Note *note = notes_at(w, w.rank, source, t);
        const int *place = desk.place + ((size_t)source * w.M + t) * w.K;
        bool any = false;
        for (int j = 0; j < w.K; j++) {
            any |= place[j] >= 0;
        }
        for (int p = threadIdx.x; p < w.packs && any; p += THREADS) {
            float sum[PACK] = {};
            for (int j = 0; j < w.K; j++) {
                if (place[j] >= 0) {
                    add_pack(sum, desk.made[(size_t)place[j] * w.packs + p], note[j].weight);
                }
            }
            row_at(w, w.back, source, w.rank, t)[p] = rounded_pack(sum);
        }
    }
    if (is_last(w)) {
        tell_all(w, w.returned, chunk, call);
    }
}

/* y (T, packs). Grid: blocks take turns at tokens. */
static __global__ void combine_kernel(Wire w, Pack *y, const int *expert, int T, int chunks) {
    unsigned call = state_of(w)->call + 1;
    for (int i = 0; i < chunks * w.ranks; i++) {
        wait_for(w, w.returned, i / w.ranks, i % w.ranks, call);
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
    if (is_last(w)) {
        state_of(w)->call = call;
    }
}

static struct {
    Wire wire;
    Desk desk;
    int chunks;
    double bytes; /* stored into other ranks' memory by a call */
    cudaStream_t experts;
    cudaEvent_t sent[MOST_CHUNKS], made[MOST_CHUNKS];
    cublasHandle_t blas;
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
    w->chunk = (task->M + own.chunks - 1) / own.chunks;
    w->rows = part_of(w, places * w->packs * sizeof(Pack));
    w->notes = part_of(w, places * w->K * sizeof(Note));
    w->back = part_of(w, places * w->packs * sizeof(Pack));
    w->arrived = part_of(w, own.chunks * task->ranks * sizeof(unsigned));
    w->returned = part_of(w, own.chunks * task->ranks * sizeof(unsigned));
    w->state = part_of(w, sizeof(State));
    NCCL(ncclMemAlloc(&w->memory, w->bytes));
    CUDA(cudaMemset(w->memory, 0xff, w->bytes));
    CUDA(cudaMemset((char *)w->memory + w->arrived, 0, w->bytes - w->arrived));
    CUDA(cudaDeviceSynchronize());
    if (w->ranks > 1) {
        CHECK(ncclTeamLsa(world.comm).nRanks == task->ranks,
              "alltoall: not all ranks reach each other's memory: level 8 needs GPUs joined by NVLink");
        NCCL(ncclCommWindowRegister(world.comm, w->memory, w->bytes, &w->window, NCCL_WIN_COLL_SYMMETRIC));
        CHECK(w->window, "alltoall: NCCL has no symmetric memory here: it needs GPUs that reach each other");
    }
    MPI_Barrier(MPI_COMM_WORLD);
}

/* Places of an expert in a chunk: each of the ranks' tokens wants it with the chance K / E. */
static int places_at_most(const Task *task, int chunk) {
    double tokens = (double)task->ranks * chunk, chance = (double)task->K / task->E;
    double most = ceil(tokens * chance + 6 * sqrt(tokens * chance * (1 - chance)));
    return task->routing == EVEN && most < tokens ? (int)most : (int)tokens;
}

template <int chunks>
static void prepare(const Task *task) {
    int out, in, least;
    CHECK(task->K <= MOST_CHOICES, "alltoall: %d experts of a token, at most %d", task->K, MOST_CHOICES);
    own.chunks = chunks;
    open_window(task);
    Wire *w = &own.wire;
    own.desk.most = places_at_most(task, w->chunk);
    size_t desk_packs = (size_t)task->experts * own.desk.most * w->packs;
    own.desk.rows = keep_array<Pack>(desk_packs);
    own.desk.made = keep_array<Pack>(chunks * desk_packs);
    own.desk.taken = keep_array<int>(task->experts);
    own.desk.place = keep_array<int>((size_t)task->ranks * task->M * task->K);
    CUDA(cudaDeviceGetStreamPriorityRange(&least, NULL));
    CUDA(cudaStreamCreateWithPriority(&own.experts, cudaStreamNonBlocking, least));
    for (int c = 0; c < chunks; c++) {
        CUDA(cudaEventCreateWithFlags(&own.sent[c], cudaEventDisableTiming));
        CUDA(cudaEventCreateWithFlags(&own.made[c], cudaEventDisableTiming));
    }
    BLAS(cublasCreate(&own.blas));
    BLAS(cublasSetStream(own.blas, own.experts));
    count_rows(&out, &in, task);
    own.bytes = (double)(out + in) * task->H * sizeof(half) + (task->ranks - 1.0) * task->M * task->K * sizeof(Note);
}

/* A chunk's places, with what they make in its own part of desk.made. */
static Desk desk_of(int chunk, const Task *task) {
    Desk desk = own.desk;
    desk.made += (size_t)chunk * task->experts * desk.most * own.wire.packs;
    return desk;
}

/* made_e (most, H) = rows_e (most, H) W_e^T for all experts of this rank; cuBLAS sees all matrices transposed. */
static void multiply(const Desk *desk, const Task *task) {
    const float one = 1, zero = 0;
    int H = task->H;
    long long matrix = (long long)H * H, rows = (long long)desk->most * H;
    BLAS(cublasGemmStridedBatchedEx(own.blas, CUBLAS_OP_T, CUBLAS_OP_N, H, desk->most, H, &one, task->matrix,
                                    CUDA_R_16F, H, matrix, desk->rows, CUDA_R_16F, H, rows, &zero, desk->made,
                                    CUDA_R_16F, H, rows, task->experts, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
    counted.launches++;
}

static void run_experts(int chunk, const Desk *desk, const Task *task) {
    const Wire *w = &own.wire;
    int places = w->ranks * (chunk_end(*w, chunk) - chunk * w->chunk);
    CUDA(cudaStreamWaitEvent(own.experts, own.sent[chunk], 0));
    CUDA(cudaMemsetAsync(desk->taken, 0, task->experts * sizeof(int), own.experts));
    LAUNCH_ON(own.experts, hand_out_kernel, places, THREADS, *w, *desk, chunk);
    multiply(desk, task);
    CUDA(cudaEventRecord(own.made[chunk], own.experts));
}

static void run(const Task *task) {
    enum { BLOCKS = 256 }; /* of a kernel that moves rows: enough for the link, without filling the device */
    const Wire *w = &own.wire;
    for (int c = 0; c < own.chunks; c++) {
        LAUNCH(dispatch_kernel, BLOCKS, THREADS, *w, c, (const Pack *)task->x, task->expert, task->weight, task->T);
        CUDA(cudaEventRecord(own.sent[c], world.stream));
    }
    for (int c = 0; c < own.chunks; c++) {
        Desk desk = desk_of(c, task);
        run_experts(c, &desk, task);
        CUDA(cudaStreamWaitEvent(world.stream, own.made[c], 0));
        LAUNCH(return_kernel, BLOCKS, THREADS, *w, desk, c);
    }
    LAUNCH(combine_kernel, BLOCKS, THREADS, *w, (Pack *)task->y, task->expert, task->T, own.chunks);
    counted.bytes += own.bytes;
}

static void release(void) {
    for (int c = 0; c < own.chunks; c++) {
        CUDA(cudaEventDestroy(own.sent[c]));
        CUDA(cudaEventDestroy(own.made[c]));
    }
    BLAS(cublasDestroy(own.blas));
    CUDA(cudaStreamDestroy(own.experts));
    if (own.wire.window) {
        NCCL(ncclCommWindowDeregister(world.comm, own.wire.window));
    }
    NCCL(ncclMemFree(own.wire.memory));
}

int main(int argc, char **argv) {
    const Level levels[] = {{"8 product, 1 chunk", prepare<1>, run, release, true},
                            {"8 product, 2 chunks", prepare<2>, run, release, true},
                            {"8 product, 4 chunks", prepare<4>, run, release, true}};
    return alltoall_levels(levels, 3, argc, argv);
}
