/* The check that a level passes before it is timed: what must come out, from the definition alone, against what it
 * makes, twice. Called by alltoall.cuh. Read next: timing.cuh. */
#ifndef ALLTOALL_CHECK_CUH
#define ALLTOALL_CHECK_CUH

#include <math.h>

#include "task.cuh"

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

#endif
