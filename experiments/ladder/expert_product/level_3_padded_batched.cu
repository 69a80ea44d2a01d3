/* Level 3: make all products the same size. Each expert gets a place for `capacity` rows, so one strided batched
 * product does them all, at the full speed of a dense one, and nothing has to be known on the host.
 *
 *     rows (E, capacity, C)   y (E, capacity, N)   y_e = rows_e W_e^T
 *
 * One idea more than level 2: trade work for regularity. The price is the padding, which is multiplied like the rest,
 * and a choice: a capacity of 1.25 times the mean, as here, costs a fifth of the time and drops tokens as soon as one
 * expert is wanted more than that; one that never drops is N rows for every expert.
 *
 * Expect: no wait, the dense rate times 1 / 1.25, less the gather, which writes the padding too. For wide rows and
 * narrow experts (C 1536, N 512) that alone takes as long as the product. */
#include "../ladder.cuh"

/* Row i of expert e is x[entry[offset[e] + i] / K], zeros past the expert's last. Grid: x a row of an expert's place, y
 * experts; threads take 16 bytes each. */
static __global__ void gather_kernel(int4 *rows, const int4 *x, const int *entry, const int *offset, int K, int packs) {
    int e = blockIdx.y, r = offset[e] + blockIdx.x;
    const int4 *from = r < offset[e + 1] ? x + (size_t)(entry[r] / K) * packs : NULL;
    int4 *to = rows + ((size_t)e * gridDim.x + blockIdx.x) * packs;
    for (int i = threadIdx.x; i < packs; i += blockDim.x) {
        to[i] = from ? from[i] : int4{0, 0, 0, 0};
    }
}

static ProductResult multiply(const ProductInputs *in) {
    const LadderTokens *t = &in->tokens;
    int C = t->C, N = in->N, E = t->E, capacity = (t->rows + t->rows / 4 + E - 1) / E;
    bf16 *rows = (bf16 *)ladder_memory(0, (size_t)E * capacity * C * sizeof(bf16));
    bf16 *y = (bf16 *)ladder_memory(1, (size_t)E * capacity * N * sizeof(bf16));
    gather_kernel<<<dim3(capacity, E), 128>>>((int4 *)rows, (const int4 *)t->x, t->entry, t->offset, t->K, C / 8);
    const float one = 1, zero = 0;
    BLAS(cublasGemmStridedBatchedEx(ladder_blas(), CUBLAS_OP_T, CUBLAS_OP_N, N, capacity, C, &one, in->w, CUDA_R_16BF,
                                    C, (long long)N * C, rows, CUDA_R_16BF, C, (long long)capacity * C, &zero, y,
                                    CUDA_R_16BF, N, (long long)capacity * N, E, CUBLAS_COMPUTE_32F,
                                    CUBLAS_GEMM_DEFAULT));
    return {y, capacity};
}

int main(void) {
    return product_ladder("3 padded batched", multiply);
}
