/* The three products of a linear layer by cuBLAS, each one call: all of op.c's loops are inside it.
 *
 * A dense product of this size is what cuBLAS does best; the products of the experts, whose row counts are known only
 * on the device, are kernels of our own (experts.cu). bf16 operands and float sums. A product that is added to a bf16
 * array is rounded before it is added, for most shapes, and the sum is rounded again. cuBLAS chooses its kernel by the
 * shape, so a row has the same bits whatever stands in the other rows, but not for every N.
 *
 * Called by model/transformer.c, attention_block.c and the routers. Read next: cuda_blas.cuh.
 */
#include "cuda.cuh"

#include "cuda_blas.cuh"

extern "C" {
#include "matmul.h"
}

enum { BLAS_WORKSPACE = 32 << 20 };

cublasHandle_t cuda_blas(Stream *stream) {
    static cublasHandle_t handle;
    static cudaStream_t bound;
    static void *workspace;
    if (!handle) {
        BLAS_CHECK(cublasCreate(&handle));
        CUDA_CHECK(cudaMalloc(&workspace, BLAS_WORKSPACE));
        BLAS_CHECK(cublasSetMathMode(
            handle, (cublasMath_t)(CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)));
    }
    cudaStream_t asked = cuda_stream(stream);
    if (bound != asked) {
        BLAS_CHECK(cublasSetStream(handle, asked)); /* which also forgets the workspace */
        BLAS_CHECK(cublasSetWorkspace(handle, workspace, BLAS_WORKSPACE));
        bound = asked;
    }
    return handle;
}

void matmul_forward(real_t *y, const real_t *x, const real_t *w, int N, int IN, int OUT, Stream *stream) {
    BlasOperand<real_t> a = {x, IN, false}, b = {w, IN, true};
    blas_multiply(y, a, b, N, OUT, IN, 0, stream);
}

void matmul_backward_input(real_t *dx, const real_t *dy, const real_t *w, int N, int IN, int OUT, int accumulate,
                           Stream *stream) {
    BlasOperand<real_t> a = {dy, OUT, false}, b = {w, IN, false};
    blas_multiply(dx, a, b, N, IN, OUT, accumulate, stream);
}

void matmul_backward_weight(acc_t *dw, const real_t *dy, const real_t *x, int N, int IN, int OUT, Stream *stream) {
    BlasOperand<real_t> a = {dy, OUT, true}, b = {x, IN, false};
    blas_multiply(dw, a, b, OUT, IN, N, 1, stream);
}
