/* cuBLAS for row-major arrays: one handle, checked calls, and the one product that the dense layers are made of.
 *
 * cuBLAS thinks in columns. A row-major (M,N) array is a column-major (N,M) one, so out = a b becomes out^T = b^T a^T:
 * the operands trade places and nothing is moved. Sums are float: no TF32, no partial sums in bf16. With one stream and
 * a workspace of its own cuBLAS repeats its bits from run to run.
 */
#ifndef KERNELS_CUDA_BLAS_CUH
#define KERNELS_CUDA_BLAS_CUH

#include <cublas_v2.h>

#include "cuda.cuh"

#define BLAS_CHECK(call)                                                                                  \
    do {                                                                                                  \
        cublasStatus_t blas_status = (call);                                                              \
        CHECK(blas_status == CUBLAS_STATUS_SUCCESS, "%s: %s", #call, cublasGetStatusString(blas_status)); \
    } while (0)

/* The handle, bound to the stream. The first call allocates, so it must not be inside a recorded step. */
cublasHandle_t cuda_blas(Stream *stream);

static inline cudaDataType_t blas_type(const float *) {
    return CUDA_R_32F;
}
static inline cudaDataType_t blas_type(const __nv_bfloat16 *) {
    return CUDA_R_16BF;
}

/* An operand: rows of `width` numbers from one row to the next, turned where its transpose takes part. */
template <class T>
struct BlasOperand {
    const T *p;
    int width;
    bool turned;
};

/* out (M,N) = a (M,K) b (K,N), added to out when accumulate is 1 */
template <class T, class Out>
static inline void blas_multiply(Out *out, BlasOperand<T> a, BlasOperand<T> b, int M, int N, int K, int accumulate,
                                 Stream *stream) {
    const float one = 1, beta = accumulate ? 1 : 0;
    BLAS_CHECK(cublasGemmEx(cuda_blas(stream), b.turned ? CUBLAS_OP_T : CUBLAS_OP_N,
                            a.turned ? CUBLAS_OP_T : CUBLAS_OP_N, N, M, K, &one, b.p, blas_type(b.p), b.width, a.p,
                            blas_type(a.p), a.width, &beta, out, blas_type(out), N, CUBLAS_COMPUTE_32F,
                            CUBLAS_GEMM_DEFAULT));
}

#endif
