/* The task of a rank: its tokens, what they choose, the experts' numbers or matrices; and a level, which does it.
 *
 * All inputs are a hash of what they are for, the rank and the index, so every rank knows those of all without asking.
 * Called by the levels and alltoall.cuh. Read next: check.cuh. */
#ifndef ALLTOALL_TASK_CUH
#define ALLTOALL_TASK_CUH

#include <stdint.h>

#include "device.cuh"
#include "packs.cuh"

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

/* ---- inputs as functions of their place ---- */

/* What a random number is for. */
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

/* ---- what travels at least ---- */

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

/* ---- who does it ---- */

typedef struct {
    const char *name;
    void (*prepare)(const Task *task); /* once for a task, not timed; NULL: nothing */
    void (*run)(const Task *task);     /* the whole exchange, on world.stream */
    void (*release)(void);             /* what prepare made besides keep_array; NULL: nothing */
    bool multiplies;                   /* the experts are matrices */
} Level;

#endif
