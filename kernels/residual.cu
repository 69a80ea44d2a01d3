/* One sweep over three arrays, 16 bytes of each per thread; memory bandwidth is what it costs. Called by model/chain.c;
 * a layer's own residual is added by norm.cu. */
#include "cuda.cuh"

extern "C" {
#include "residual.h"
}

enum { THREADS = 256 };

/* Grid: the loop over i, a pack per thread; the numbers after the last whole pack go to the first threads. */
__global__ void add(real_t *out, const real_t *a, const real_t *b, size_t packs, size_t count) {
    size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < packs) {
        Pack<real_t> x = load_pack(a + i * Pack<real_t>::COUNT), y = load_pack(b + i * Pack<real_t>::COUNT);
        for (int j = 0; j < Pack<real_t>::COUNT; j++) {
            x.v[j] = to_real<real_t>(to_float(x.v[j]) + to_float(y.v[j]));
        }
        store_pack(out + i * Pack<real_t>::COUNT, x);
    }
    size_t last = packs * Pack<real_t>::COUNT + i;
    if (last < count) {
        out[last] = to_real<real_t>(to_float(a[last]) + to_float(b[last]));
    }
}

void residual_add(real_t *out, const real_t *a, const real_t *b, size_t count, Stream *stream) {
    if (count == 0) {
        return;
    }
    bool aligned = packs_fit(out, 0) && packs_fit(a, 0) && packs_fit(b, 0);
    size_t packs = aligned ? count / Pack<real_t>::COUNT : 0;
    size_t threads = packs > count - packs * Pack<real_t>::COUNT ? packs : count - packs * Pack<real_t>::COUNT;
    add<<<ceil_div((int64_t)threads, THREADS), THREADS, 0, cuda_stream(stream)>>>(out, a, b, packs, count);
    CUDA_LAUNCHED();
}
