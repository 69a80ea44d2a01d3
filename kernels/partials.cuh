/* Gradients of weights that all rows share: each block adds its own rows, and the sums of the blocks are added here in
 * their order. Used by norm.cu, rope.cu and gate.cu. */
#ifndef KERNELS_PARTIALS_CUH
#define KERNELS_PARTIALS_CUH

#include "cuda.cuh"

enum { PARTIAL_COLUMNS = 32, PARTIAL_ROWS = 16 };

/* out_c += sum_b partial[b][c], partial (blocks, width); second: the same for another pair. Grid: x columns, y which
 * pair. Block: x a column each, y every PARTIAL_ROWS-th row. */
static __global__ void partials_add_kernel(float *out, float *second, const float *partial, int blocks, int width) {
    __shared__ float sums[PARTIAL_ROWS][PARTIAL_COLUMNS];
    int c = blockIdx.x * PARTIAL_COLUMNS + threadIdx.x;
    const float *from = partial + (size_t)blockIdx.y * blocks * width;
    float sum = 0;
    if (c < width) {
#pragma unroll 8
        for (int b = threadIdx.y; b < blocks; b += PARTIAL_ROWS) {
            sum += from[(size_t)b * width + c];
        }
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < width) {
        for (int y = 1; y < PARTIAL_ROWS; y++) {
            sum += sums[y][threadIdx.x];
        }
        (blockIdx.y ? second : out)[c] += sum;
    }
}

/* out (width) += the sum of partial (blocks, width); second, where there is one, += that of the array after it */
static inline void partials_add(float *out, float *second, const float *partial, int blocks, int width,
                                Stream *stream) {
    dim3 grid(ceil_div(width, PARTIAL_COLUMNS), second ? 2 : 1), block(PARTIAL_COLUMNS, PARTIAL_ROWS);
    partials_add_kernel<<<grid, block, 0, cuda_stream(stream)>>>(out, second, partial, blocks, width);
    CUDA_LAUNCHED();
}

#endif
