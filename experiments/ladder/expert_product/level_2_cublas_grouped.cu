/* Level 2: one launch for all experts. cublasGemmGroupedBatchedEx takes a list of products of different sizes.
 *
 * One idea more than level 1: tiles of all experts fill the device together, so that small experts no longer leave it
 * idle. What stays is the wait: sizes are host arrays, addresses device arrays that the host has to write.
 *
 * Expect: many small experts gain. Few large ones lose half: on Hopper this routine uses the older warp-wide tensor
 * instruction (mma), not the warp-group-wide one (wgmma) that cuBLAS takes for a single product. */
#include "../ladder.cuh"

enum { MOST_EXPERTS = 1024 };

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

    int offset[MOST_EXPERTS + 1];
    CUDA(cudaMemcpy(offset, t->offset, (t->E + 1) * sizeof(int), cudaMemcpyDeviceToHost));
    static cublasOperation_t turned[MOST_EXPERTS], as_is[MOST_EXPERTS];
    static int count[MOST_EXPERTS], width_n[MOST_EXPERTS], width_c[MOST_EXPERTS], each[MOST_EXPERTS];
    static float one[MOST_EXPERTS], zero[MOST_EXPERTS];
    static const void *address[3][MOST_EXPERTS]; /* W, rows, y */
    int groups = 0;
    for (int e = 0; e < t->E; e++) {
        if (offset[e + 1] == offset[e]) {
            continue;
        }
        turned[groups] = CUBLAS_OP_T;
        as_is[groups] = CUBLAS_OP_N;
        count[groups] = offset[e + 1] - offset[e];
        width_n[groups] = N;
        width_c[groups] = C;
        each[groups] = 1;
        one[groups] = 1;
        zero[groups] = 0;
        address[0][groups] = in->w + (size_t)e * N * C;
        address[1][groups] = rows + (size_t)offset[e] * C;
        address[2][groups] = y + (size_t)offset[e] * N;
        groups++;
    }
    const void **on_device = (const void **)ladder_memory(2, sizeof address);
    CUDA(cudaMemcpyAsync(on_device, address, sizeof address, cudaMemcpyHostToDevice));
    BLAS(cublasGemmGroupedBatchedEx(ladder_blas(), turned, as_is, width_n, count, width_c, one, on_device, CUDA_R_16BF,
                                    width_c, on_device + MOST_EXPERTS, CUDA_R_16BF, width_c, zero,
                                    (void **)(on_device + 2 * MOST_EXPERTS), CUDA_R_16BF, width_n, groups, each,
                                    CUBLAS_COMPUTE_32F));
    return {y, 0};
}

int main(void) {
    return product_ladder("2 cublas grouped", multiply);
}
