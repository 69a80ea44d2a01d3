/* What every level of the ladder needs and none is about: ranks, inputs, what is counted, the check, timing, one JSON
 * line of result.
 *
 * The task of a rank: its T tokens (T,H) go to K different experts each; of the E experts every rank holds E/ranks
 * neighbours. An expert multiplies a row by a number of its own (at level 8: by a matrix). The result (T,H) is the sum
 * of what the token's experts made of it, weighted:
 *
 *     y[t] = sum over j of weight[t][j] expert[t][j](x[t])
 *
 * A level is a program of its own, which says what it does once for a task and what it does every time:
 *
 *     static void prepare(const Task *task) { .. }      memory, graphs; not timed
 *     static void run(const Task *task) { .. }          from x to y; may wait for the device, which is then in its time
 *     int main(int argc, char **argv) { return alltoall_ladder({"3 persistent", prepare, run}, argc, argv); }
 *
 *     mpirun -n 4 build/alltoall/level_3_persistent [shape ..]      a rank to a GPU; without names all shapes
 *
 * Everything is checked before it is timed: on whole numbers, where every sum is exact in half precision and the bits
 * must be right, and on fractions with weights of both signs. A rank that hears nothing for PATIENCE seconds ends all.
 *
 * Read first: alltoall_ladder at the end, then level_0_host_loops.cu.
 */
#ifndef ALLTOALL_CUH
#define ALLTOALL_CUH

#define OMPI_SKIP_MPICXX 1 /* MPI's C interface alone */
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <mpi.h>
#include <nccl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

extern "C" {
#include "../../kernels/check.h"
#include "../../model/commit.h"
}

#define CUDA(call)                                                                                   \
    do {                                                                                             \
        cudaError_t cuda_error = (call);                                                             \
        CHECK(cuda_error == cudaSuccess, "alltoall: %s: %s", #call, cudaGetErrorString(cuda_error)); \
    } while (0)

#define NCCL(call)                                                                                        \
    do {                                                                                                  \
        ncclResult_t nccl_result = (call);                                                                \
        CHECK(nccl_result == ncclSuccess, "alltoall: %s: %s; %s", #call, ncclGetErrorString(nccl_result), \
              ncclGetLastError(NULL));                                                                    \
    } while (0)

typedef __half half;

enum { MOST_RANKS = 16, PATIENCE = 120 /* seconds */ };

/* ---- ranks: one process to a GPU ---- */

static struct {
    int rank, ranks;
    int each[MOST_RANKS + 1]; /* 0, 1, 2 ..: the rows of an exchange of one number with each rank */
    ncclComm_t comm;
    cudaStream_t stream;
} world;

static inline void end_all_ranks(int exit_code) {
    MPI_Abort(MPI_COMM_WORLD, exit_code);
}

/* Of the ranks on this machine, this one's number. */
static inline int local_rank(void) {
    MPI_Comm machine;
    int rank;
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &machine);
    MPI_Comm_rank(machine, &rank);
    MPI_Comm_free(&machine);
    return rank;
}

/* The stream goes before others where the device must choose: what moves data keeps other ranks waiting. */
static inline void world_open(int *argc, char ***argv) {
    ncclUniqueId id;
    int gpus = 0, urgent;
    MPI_Init(argc, argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &world.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &world.ranks);
    check_set_rank(world.rank, end_all_ranks);
    CHECK(world.ranks <= MOST_RANKS, "alltoall: %d ranks, at most %d", world.ranks, MOST_RANKS);
    CUDA(cudaGetDeviceCount(&gpus));
    int gpu = local_rank();
    CHECK(gpu < gpus, "alltoall: rank %d of this machine has no GPU, there are %d: start fewer", gpu, gpus);
    CUDA(cudaSetDevice(gpu));
    CUDA(cudaDeviceGetStreamPriorityRange(NULL, &urgent));
    CUDA(cudaStreamCreateWithPriority(&world.stream, cudaStreamNonBlocking, urgent));
    for (int r = 0; r <= world.ranks; r++) {
        world.each[r] = r;
    }
    setenv("NCCL_NVLS_ENABLE", "0", 1); /* sums in the switch (multicast) have no part in this */
    if (world.rank == 0) {
        NCCL(ncclGetUniqueId(&id));
    }
    MPI_Bcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD);
    NCCL(ncclCommInitRank(&world.comm, world.ranks, id, world.rank));
}

static inline void world_close(void) {
    NCCL(ncclCommDestroy(world.comm));
    CUDA(cudaStreamDestroy(world.stream));
    MPI_Finalize();
}

static char late_line[256];

static inline void end_late(int) {
    ssize_t written = write(STDERR_FILENO, late_line, strlen(late_line));
    _exit(written > 0 ? EXIT_ERROR : EXIT_ERROR + 1);
}

/* From here on this rank has PATIENCE seconds. Others have one more, so that one line is printed, not one for each. */
static inline void expect_end_of(const char *level, const char *shape) {
    snprintf(late_line, sizeof late_line, "moelab: alltoall: level %s, shape %s: rank %d of %d waited %d s in vain\n",
             level, shape, world.rank, world.ranks, PATIENCE);
    signal(SIGALRM, end_late);
    alarm(PATIENCE + (world.rank > 0));
}

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

/* ---- rows are moved in packs of 16 bytes ---- */

enum { PACK = 8 /* numbers */ };

typedef struct __align__(16) {
    half at[PACK];
}
Pack;

/* sum (PACK) += weight pack. */
static __device__ inline void add_pack(float *sum, Pack pack, float weight) {
    for (int i = 0; i < PACK; i++) {
        sum[i] += weight * __half2float(pack.at[i]);
    }
}

static __device__ inline Pack scaled_pack(Pack pack, float scale) {
    for (int i = 0; i < PACK; i++) {
        pack.at[i] = __float2half_rn(scale * __half2float(pack.at[i]));
    }
    return pack;
}

static __device__ inline Pack rounded_pack(const float *sum) {
    Pack pack;
    for (int i = 0; i < PACK; i++) {
        pack.at[i] = __float2half_rn(sum[i]);
    }
    return pack;
}

/* ---- the task ---- */

typedef enum {
    EVEN,   /* all experts are equally likely, all ranks have as many tokens */
    UNEVEN, /* the first rank has no tokens, the others more and more */
    SKEWED  /* all tokens go to the first K experts */
} Routing;

typedef struct {
    const char *name;
    int E, K, H; /* experts of all ranks, experts of a token, columns */
    int tokens;  /* of a rank, at most */
    Routing routing;
} Shape;

typedef struct {
    int E, K, H;
    int T, M;        /* tokens of this rank, and the most that any rank has */
    int rank, ranks; /* .. */
    int experts;     /* of a rank: expert e is rank e / experts's number e % experts */
    bool whole;      /* inputs are whole numbers, weights 1 and -1; else fractions of both signs */
    bool multiplies; /* an expert is a matrix, else a number */
    Routing routing;
    const int *host_expert; /* (T,K) on the host, for counts of what was sent; the rest is on the device */
    const half *x;          /* (T,H) */
    const int *expert;      /* (T,K) different ones of a token, what a router writes */
    const float *weight;    /* (T,K) */
    const half *matrix;     /* (experts,H,H) of this rank's experts, out by in; NULL where they are numbers */
    half *y;                /* (T,H) the result */
} Task;

/* Random numbers are a hash of what they are for, so every rank knows those of all. */
enum { FOR_X = 1, FOR_EXPERT, FOR_WEIGHT, FOR_MATRIX, FOR_SAMPLE };

static __host__ __device__ inline uint32_t hashed(uint32_t what, uint32_t rank, uint64_t index) {
    uint64_t z = (index + 1) * 0x9e3779b97f4a7c15ull + (what * 4096 + rank) * 0xd1342543de82ef95ull;
    z = (z ^ (z >> 32)) * 0xd6e8feb86659fd93ull;
    z = (z ^ (z >> 32)) * 0xd6e8feb86659fd93ull;
    return (uint32_t)(z >> 32);
}

/* -1, 0 or 1; or a multiple of 1/1024 from -1 to 1, which half precision holds exactly. */
static __host__ __device__ inline float number_of(uint32_t hash, bool whole) {
    return whole ? (float)(int)(hash % 3) - 1 : ((int)(hash >> 21) - 1024) / 1024.0f;
}

static __host__ __device__ inline float x_at(const Task &task, int t, int h) {
    return number_of(hashed(FOR_X, task.rank, (uint64_t)t * task.H + h), task.whole);
}

/* Different for every expert, so that a row that went to the wrong one shows. */
static __host__ __device__ inline float scale_at(int e, bool whole) {
    return whole ? 1.0f + e : 1.0f + e / 64.0f;
}

/* A power of two near 1 / sqrt(H), so that a product is about as large as what is multiplied. */
static __host__ __device__ inline float matrix_size(int H) {
    float size = 1;
    while (size * size * H > 2) {
        size /= 2;
    }
    return size;
}

static __host__ __device__ inline float matrix_at(const Task &task, int e, int out, int in) {
    float number = number_of(hashed(FOR_MATRIX, e, (uint64_t)out * task.H + in), task.whole);
    return task.whole ? number : number * matrix_size(task.H);
}

static inline float weight_at(const Task &task, int entry) {
    uint32_t hash = hashed(FOR_WEIGHT, task.rank, entry);
    return task.whole ? (hash % 2 ? 1.0f : -1.0f) : (float)((int)(hash >> 8) - (1 << 23)) / (1 << 23);
}

/* chosen (K): the experts of a token. */
static inline void choose_experts(int *chosen, const Task &task, int t) {
    uint64_t draw = (uint64_t)t << 16;
    for (int j = 0; j < task.K; j++) {
        bool again = true;
        while (again) {
            chosen[j] = task.routing == SKEWED ? (t + j) % task.K : hashed(FOR_EXPERT, task.rank, draw++) % task.E;
            again = false;
            for (int i = 0; i < j; i++) {
                again |= chosen[i] == chosen[j];
            }
        }
    }
}

/* ---- what must come out, from the definition alone ---- */

typedef struct {
    double value, slack; /* as far from value as the result may be */
} Expected;

/* What an expert makes of a token, column h; slack: how large the terms of the sum were. */
static __host__ __device__ inline Expected made_at(const Task &task, int e, int t, int h) {
    if (!task.multiplies) {
        double made = (double)scale_at(e, task.whole) * x_at(task, t, h);
        return {made, fabs(made)};
    }
    double sum = 0, terms = 0;
    for (int c = 0; c < task.H; c++) {
        double term = (double)matrix_at(task, e, h, c) * x_at(task, t, c);
        sum += term;
        terms += fabs(term);
    }
    return {sum, fabs(sum) + terms / 128};
}

/* expert, weight (T,K), wherever the caller is. Halves are rounded three times at most, each time by 2^-11: what an
 * expert makes, what one rank adds up, and the result. */
static __host__ __device__ inline Expected expected_at(const Task &task, const int *expert, const float *weight, int t,
                                                       int h) {
    Expected all = {0, 0};
    for (int j = 0; j < task.K; j++) {
        Expected made = made_at(task, expert[t * task.K + j], t, h);
        all.value += weight[t * task.K + j] * made.value;
        all.slack += fabs(weight[t * task.K + j]) * made.slack;
    }
    all.slack = task.whole ? 0 : all.slack / 512 + 1.0 / (1 << 22);
    return all;
}

/* Grid: a thread to a number of y, or to a sample of them. */
static __global__ void check_kernel(int *wrong, Task task, size_t samples, bool all) {
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x, numbers = (size_t)task.T * task.H;
    if (i < samples) {
        size_t at = all ? i : (((uint64_t)hashed(FOR_SAMPLE, 0, i) << 32) + hashed(FOR_SAMPLE, 1, i)) % numbers;
        Expected right = expected_at(task, task.expert, task.weight, (int)(at / task.H), (int)(at % task.H));
        double off = fabs((double)__half2float(task.y[at]) - right.value);
        if (!(off <= right.slack)) { /* also where y is not a number */
            atomicAdd(wrong, 1);
        }
    }
}

/* How many numbers of y are wrong, on all ranks. Of products, which take H terms each, some are looked at. */
static inline int count_wrong(const Task *task) {
    enum { SAMPLES = 1 << 16, THREADS = 256 };
    size_t numbers = (size_t)task->T * task->H;
    bool all = !task->multiplies || numbers <= SAMPLES;
    size_t samples = all ? numbers : (size_t)SAMPLES;
    int *wrong = fresh_array<int>(1), here = 0, everywhere = 0;
    CUDA(cudaMemsetAsync(wrong, 0, sizeof *wrong, world.stream));
    LAUNCH(check_kernel, (unsigned)((samples + THREADS - 1) / THREADS), THREADS, wrong, *task, samples, all);
    download(&here, wrong, sizeof here);
    give_back(&fresh);
    MPI_Allreduce(&here, &everywhere, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
    return everywhere;
}

/* Of rows that go once to each rank where a token has experts: those this rank sends to others, and gets from them. */
static inline void count_rows(int *out, int *in, const Task *task) {
    int to[MOST_RANKS] = {}, from[MOST_RANKS] = {};
    for (int t = 0; t < task->T; t++) {
        bool goes[MOST_RANKS] = {};
        for (int j = 0; j < task->K; j++) {
            goes[task->host_expert[t * task->K + j] / task->experts] = true;
        }
        for (int r = 0; r < task->ranks; r++) {
            to[r] += goes[r] && r != task->rank;
        }
    }
    MPI_Alltoall(to, 1, MPI_INT, from, 1, MPI_INT, MPI_COMM_WORLD);
    *out = *in = 0;
    for (int r = 0; r < task->ranks; r++) {
        *out += to[r];
        *in += from[r];
    }
}

/* ---- inputs on the device ---- */

/* Grid: a thread to a number. */
static __global__ void x_kernel(half *x, Task task) {
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i < (size_t)task.T * task.H) {
        x[i] = __float2half_rn(x_at(task, (int)(i / task.H), (int)(i % task.H)));
    }
}

/* Grid: a block to a row of a matrix. */
static __global__ void matrix_kernel(half *matrix, Task task) {
    int e = blockIdx.x / task.H, out = blockIdx.x % task.H;
    for (int in = threadIdx.x; in < task.H; in += blockDim.x) {
        float number = matrix_at(task, task.rank * task.experts + e, out, in);
        matrix[(size_t)blockIdx.x * task.H + in] = __float2half_rn(number);
    }
}

static inline void route(Task *task) {
    size_t entries = (size_t)task->T * task->K;
    int *expert = (int *)malloc(entries * sizeof(int) + 1), *on_device = keep_array<int>(entries);
    float *weight = (float *)malloc(entries * sizeof(float) + 1), *weight_on_device = keep_array<float>(entries);
    CHECK(expert && weight, "alltoall: out of memory for the choices of %d tokens", task->T);
    for (int t = 0; t < task->T; t++) {
        choose_experts(expert + (size_t)t * task->K, *task, t);
    }
    for (size_t i = 0; i < entries; i++) {
        weight[i] = weight_at(*task, (int)i);
    }
    CUDA(cudaMemcpy(on_device, expert, entries * sizeof(int), cudaMemcpyDefault));
    CUDA(cudaMemcpy(weight_on_device, weight, entries * sizeof(float), cudaMemcpyDefault));
    free(weight);
    task->host_expert = expert;
    task->expert = on_device;
    task->weight = weight_on_device;
}

static inline Task make_task(const Shape *shape, bool whole, bool multiplies) {
    enum { THREADS = 256 };
    Task task = {};
    task.E = shape->E;
    task.K = shape->K;
    task.H = shape->H;
    task.M = shape->tokens;
    task.rank = world.rank;
    task.ranks = world.ranks;
    task.T = shape->routing == UNEVEN ? shape->tokens * world.rank / world.ranks : shape->tokens;
    task.experts = shape->E / world.ranks;
    task.routing = shape->routing;
    task.whole = whole;
    task.multiplies = multiplies;
    CHECK(task.E % task.ranks == 0, "alltoall: %d experts cannot be shared evenly by %d ranks", task.E, task.ranks);
    CHECK(task.H % PACK == 0, "alltoall: rows of %d numbers are not whole packs of %d", task.H, PACK);
    size_t numbers = (size_t)task.T * task.H;
    half *x = keep_array<half>(numbers), *matrix = NULL;
    LAUNCH(x_kernel, (unsigned)((numbers + THREADS - 1) / THREADS), THREADS, x, task);
    if (multiplies) {
        matrix = keep_array<half>((size_t)task.experts * task.H * task.H);
        LAUNCH(matrix_kernel, task.experts * task.H, THREADS, matrix, task);
    }
    task.x = x;
    task.matrix = matrix;
    task.y = keep_array<half>(numbers);
    route(&task);
    return task;
}

/* ---- a level, its time, its line ---- */

typedef struct {
    const char *name;
    void (*prepare)(const Task *task); /* once for a task, not timed; NULL: nothing */
    void (*run)(const Task *task);     /* the whole exchange, on world.stream */
    void (*release)(void);             /* what prepare made besides keep_array; NULL: nothing */
    bool multiplies;                   /* the experts are matrices */
} Level;

/* Runs twice, the second time over poison: what a first run left behind must not be needed. */
static inline int check_level(const Level *level, const Task *task) {
    size_t numbers = (size_t)task->T * task->H;
    level->run(task);
    CUDA(cudaStreamSynchronize(world.stream));
    CUDA(cudaMemset(task->y, 0xff, numbers * sizeof(half)));
    poison(&kept);
    CUDA(cudaDeviceSynchronize());
    MPI_Barrier(MPI_COMM_WORLD);
    level->run(task);
    CUDA(cudaStreamSynchronize(world.stream));
    return count_wrong(task);
}

enum { MOST_RUNS = 50 };

/* Milliseconds of a run on the device. All ranks begin together: the hosts meet, then the devices, in a sum of one
 * number, behind which the host has time to hand over the run. */
static inline float time_run(const Level *level, const Task *task, int *meeting, cudaEvent_t begin, cudaEvent_t end) {
    float ms;
    CUDA(cudaStreamSynchronize(world.stream));
    MPI_Barrier(MPI_COMM_WORLD);
    NCCL(ncclAllReduce(meeting, meeting, 1, ncclInt32, ncclSum, world.comm, world.stream));
    CUDA(cudaEventRecord(begin, world.stream));
    level->run(task);
    CUDA(cudaEventRecord(end, world.stream));
    CUDA(cudaEventSynchronize(end));
    CUDA(cudaEventElapsedTime(&ms, begin, end));
    return ms;
}

static inline int earlier(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Sorted milliseconds of the slowest rank in each of as many runs as fit into two seconds, 5 to MOST_RUNS. */
static inline int time_level(float *slowest, const Level *level, const Task *task) {
    cudaEvent_t begin, end;
    float ms[MOST_RUNS], first = 0;
    int *meeting = fresh_array<int>(1);
    Memory own = fresh; /* a run gives its own back, not this */
    fresh.count = 0;
    CUDA(cudaMemset(meeting, 0, sizeof *meeting));
    CUDA(cudaEventCreate(&begin));
    CUDA(cudaEventCreate(&end));
    for (int i = 0; i < 3; i++) {
        ms[0] = time_run(level, task, meeting, begin, end);
    }
    MPI_Allreduce(ms, &first, 1, MPI_FLOAT, MPI_MAX, MPI_COMM_WORLD);
    int fit = (int)(2000 / (first + 0.01f)), runs = fit < 5 ? 5 : fit < MOST_RUNS ? fit : MOST_RUNS;
    for (int i = 0; i < runs; i++) {
        ms[i] = time_run(level, task, meeting, begin, end);
    }
    MPI_Allreduce(ms, slowest, runs, MPI_FLOAT, MPI_MAX, MPI_COMM_WORLD);
    qsort(slowest, runs, sizeof *slowest, earlier);
    CUDA(cudaEventDestroy(begin));
    CUDA(cudaEventDestroy(end));
    give_back(&own);
    return runs;
}

/* What one run counts, of the rank that sent the most. */
static inline Counted count_run(const Level *level, const Task *task) {
    counted = {};
    level->run(task);
    CUDA(cudaStreamSynchronize(world.stream));
    Counted one = counted;
    MPI_Allreduce(&counted.bytes, &one.bytes, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
    return one;
}

static inline void print_line(const Level *level, const Shape *shape, const Task *task) {
    cudaDeviceProp device;
    int nccl = 0;
    float us[MOST_RUNS];
    int runs = time_level(us, level, task);
    Counted one = count_run(level, task);
    if (world.rank == 0) {
        CUDA(cudaGetDeviceProperties(&device, 0));
        NCCL(ncclGetVersion(&nccl));
        printf(
            "{\"ladder\":\"alltoall\",\"level\":\"%s\",\"shape\":\"%s\",\"ranks\":%d,\"E\":%d,\"K\":%d,\"H\":%d,"
            "\"T\":%d,",
            level->name, shape->name, task->ranks, task->E, task->K, task->H, task->T);
        printf(
            "\"us\":%.1f,\"us_p95\":%.1f,\"runs\":%d,\"bytes\":%.0f,\"exchanges\":%d,\"host_waits\":%d,"
            "\"launches\":%d,",
            1000 * us[runs / 2], 1000 * us[runs * 95 / 100], runs, one.bytes, one.exchanges, one.host_waits,
            one.launches);
        printf("\"device\":\"%s\",\"nccl\":%d,\"commit\":\"%s\"}\n", device.name, nccl, commit_name());
        fflush(stdout);
    }
}

/* Checks the level on a shape and, if it is one of those to time, times it. Returns whether something was wrong. */
static inline bool try_shape(const Level *level, const Shape *shape, bool timed) {
    int all_wrong = 0;
    for (int whole = 1; whole >= 0; whole--) {
        expect_end_of(level->name, shape->name);
        Task task = make_task(shape, whole, level->multiplies);
        Memory inputs = kept;
        kept.count = 0;
        if (level->prepare) {
            level->prepare(&task);
        }
        int wrong = check_level(level, &task);
        if (wrong > 0 && world.rank == 0) {
            fprintf(stderr, "moelab: alltoall: level %s, shape %s on %d ranks, %s: %d numbers are wrong\n", level->name,
                    shape->name, world.ranks, whole ? "whole numbers" : "fractions", wrong);
        }
        all_wrong += wrong;
        if (timed && !whole && all_wrong == 0) {
            print_line(level, shape, &task);
        }
        CUDA(cudaDeviceSynchronize());
        MPI_Barrier(MPI_COMM_WORLD); /* memory that others store into goes when all are done */
        if (level->release) {
            level->release();
        }
        give_back(&kept);
        give_back(&inputs);
        free((void *)task.host_expert);
    }
    alarm(0);
    return all_wrong > 0;
}

static const Shape checked_shapes[] = {
    {"tiny", 16, 2, 16, 4, EVEN},       {"uneven", 16, 4, 136, 37, UNEVEN},
    {"skewed", 32, 8, 64, 300, SKEWED}, {"several blocks", 32, 5, 72, 700, EVEN},
    {"one token", 16, 1, 16, 1, EVEN},  {"all experts", 16, 16, 24, 20, EVEN},
};

static const Shape timed_shapes[] = {
    {"b1", 8, 2, 6144, 16, EVEN},    {"b2", 64, 6, 2048, 32, EVEN},   {"b3", 128, 4, 2880, 128, EVEN},
    {"b4", 128, 8, 4096, 256, EVEN}, {"b5", 256, 8, 7168, 256, EVEN}, {"t1", 8, 2, 1024, 4096, EVEN},
    {"t2", 64, 8, 2048, 8192, EVEN}, {"t3", 8, 2, 768, 8192, EVEN},
};

static inline bool is_named(const char *name, int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        if (strcmp(name, argv[i]) == 0) {
            return true;
        }
    }
    return argc < 2;
}

/* All of a program whose main has nothing but this: for several levels, as for one and the same with other sizes. */
static inline int alltoall_levels(const Level *levels, int count, int argc, char **argv) {
    bool wrong = false;
    world_open(&argc, &argv);
    for (const Level *level = levels; level < levels + count; level++) {
        for (const Shape &shape : checked_shapes) {
            wrong |= try_shape(level, &shape, false);
        }
        for (const Shape &shape : timed_shapes) {
            if (is_named(shape.name, argc, argv)) {
                wrong |= try_shape(level, &shape, true);
            }
        }
    }
    world_close();
    return wrong ? EXIT_ERROR : EXIT_OK;
}

static inline int alltoall_ladder(Level level, int argc, char **argv) {
    return alltoall_levels(&level, 1, argc, argv);
}

#endif
