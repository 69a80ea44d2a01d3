/* How long a level takes, what it hands over and sends meanwhile, and the JSON line that says so. Called by
 * alltoall.cuh. */
#ifndef ALLTOALL_TIMING_CUH
#define ALLTOALL_TIMING_CUH

#include "task.cuh"

extern "C" {
#include "../../model/commit.h"
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

#endif
