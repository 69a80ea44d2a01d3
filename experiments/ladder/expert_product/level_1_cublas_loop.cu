/* Level 1: the program everyone writes first. Rows are gathered into expert order, then cuBLAS multiplies one expert
 * after the other.
 *
 *     y[offset[e] .. offset[e+1]] = rows[offset[e] .. offset[e+1]] W_e^T        E calls
 *
 * The host passes the number of rows to cuBLAS, so it must know it: the offsets are copied back, and the host waits for
 * everything before them. Then E launches follow, each of which has to fill the device by itself.
 *
 * Expect: with 8 experts of 8192 rows, near the dense product, less the wait and the gather. With 128 experts of 1536
 * rows each product is 12 x 4 tiles of 128 x 128 for 132 multiprocessors: about a third of them work. And a step that
 * waits for the device cannot be recorded as a CUDA graph. */
#include "../ladder.cuh"

/* rows[r] = x[entry[r] / K]. Grid: a block to a row; its threads take 16 bytes each. */
static __global__ void gather_kernel(int4 *rows, const int4 *x, const int *entry, int K, int packs) {
    const int4 *from = x + (size_t)(entry[blockIdx.x] / K) * packs;
    for (int i = threadIdx.x; i < packs; i += blockDim.x) {
        rows[(size_t)blockIdx.x * packs + i] = from[i];
    }
}

static ProductResult multiply(const ProductInputs *in) {
    const LadderTokens *t = &in->tokens;
    int C = t->C, N = in->N;
    bf16 *rows = (bf16 *)ladder_memory(0, (size_t)t->rows * C * sizeof(bf16));
    bf16 *y = (bf16 *)ladder_memory(1, (size_t)t->rows * N * sizeof(bf16));
    gather_kernel<<<t->rows, 128>>>((int4 *)rows, (const int4 *)t->x, t->entry, t->K, C / 8);

    int offset[1025];
    CUDA(cudaMemcpy(offset, t->offset, (t->E + 1) * sizeof(int), cudaMemcpyDeviceToHost));
    const float one = 1, zero = 0;
    for (int e = 0; e < t->E; e++) {
        int count = offset[e + 1] - offset[e];
        if (count == 0) {
            continue;
        }
        /* row-major (count,C) is column-major (C,count): cuBLAS computes y^T = W rows^T */
        BLAS(cublasGemmEx(ladder_blas(), CUBLAS_OP_T, CUBLAS_OP_N, N, count, C, &one, in->w + (size_t)e * N * C,
                          CUDA_R_16BF, C, rows + (size_t)offset[e] * C, CUDA_R_16BF, C, &zero,
                          y + (size_t)offset[e] * N, CUDA_R_16BF, N, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
    }
    return {y, 0};
}

int main(void) {
    return product_ladder("1 cublas loop", multiply);
}
