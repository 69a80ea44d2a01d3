/* One thread per number, four numbers in flight: used where a model is loaded or a token sampled, not in a step. */
#include "cuda.cuh"

extern "C" {
#include "convert.h"
}

/* Grid: the numbers, in strides. */
template <class Out, class In>
__global__ void convert(Out *out, const In *in, size_t count) {
    size_t stride = (size_t)gridDim.x * blockDim.x;
#pragma unroll 4
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
        out[i] = to_real<Out>(to_float(in[i]));
    }
}

template <class Out, class In>
static void queue(Out *out, const In *in, size_t count, Stream *stream) {
    if (count == 0 || (const void *)out == (const void *)in) {
        return;
    }
    const int threads = 256, most = 2048, needed = ceil_div((int64_t)count, threads);
    int blocks = needed < most ? needed : most;
    convert<<<blocks, threads, 0, cuda_stream(stream)>>>(out, in, count);
    CUDA_LAUNCHED();
}

void real_from_acc(real_t *out, const acc_t *in, size_t count, Stream *stream) {
    queue(out, in, count, stream);
}

void acc_from_real(acc_t *out, const real_t *in, size_t count, Stream *stream) {
    queue(out, in, count, stream);
}
