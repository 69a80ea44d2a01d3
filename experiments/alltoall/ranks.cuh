/* Ranks, one process to a GPU: MPI starts them and NCCL connects them. How they end when a call fails, and when one of
 * them waits for others in vain. Called by alltoall.cuh. Read next: device.cuh. */
#ifndef ALLTOALL_RANKS_CUH
#define ALLTOALL_RANKS_CUH

#define OMPI_SKIP_MPICXX 1 /* MPI's C interface alone */
#include <cuda_runtime.h>
#include <mpi.h>
#include <nccl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

extern "C" {
#include "../../kernels/check.h"
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

enum { MOST_RANKS = 16, PATIENCE = 120 /* seconds */ };

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

#endif
