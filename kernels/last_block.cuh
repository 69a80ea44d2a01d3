/* The end of a sum over blocks in one launch: each block writes its part, and the one that comes last adds them up.
 *
 *     static __device__ unsigned ticket;                  one for each kernel, or for kernels that never overlap
 *     partial[blockIdx.x] = ...;
 *     if (is_last_block(&ticket)) { ... reads all of partial, in an order of its own }
 *
 * Which block comes last changes from run to run, what it does must not. grid_sum is the whole of it where a block's
 * part is one number.
 */
#ifndef KERNELS_LAST_BLOCK_CUH
#define KERNELS_LAST_BLOCK_CUH

#include "cuda.cuh"

/* True in every thread of the block that comes here last of the whole grid: it may read what the others wrote before.
 * *ticket is 0 and ends as 0, so that a recorded launch can be repeated. All threads call it, once. */
__device__ static inline bool is_last_block(unsigned *ticket) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        const unsigned blocks = gridDim.x * gridDim.y;
        last = atomicInc(ticket, blocks - 1) == blocks - 1;
    }
    __syncthreads();
    __threadfence();
    return last;
}

/* *sum = x of all threads of a grid of one dimension, in the block that comes here last; false in the others. partial
 * (gridDim.x) takes the blocks' sums, which are added in an order that a block's size and their number decide. All
 * threads call it, once. */
__device__ static inline bool grid_sum(double *sum, double *partial, double x, unsigned *ticket) {
    x = block_sum(x);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = x;
    }
    if (!is_last_block(ticket)) {
        return false;
    }
    x = 0;
    for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) {
        x += partial[i];
    }
    *sum = block_sum(x);
    return true;
}

#endif
