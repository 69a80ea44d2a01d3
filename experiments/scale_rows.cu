/* A block takes a row, then one as many rows further on as there are blocks: how many rows came only the device knows.
 * Blocks replace the loops over experts and rows of scale_rows.c, threads that over columns. */
#include "../kernels/cuda.cuh"

extern "C" {
#include "scale_rows.h"
}

enum { THREADS = 256, BLOCKS_PER_SM = 8 };

/* The expert of row r: the first that ends behind it. */
__device__ static int expert_of(int r, const int *offset, int experts) {
    int first = 0, last = experts - 1;
    while (first < last) {
        int middle = (first + last) / 2;
        if (offset[middle + 1] > r) {
            last = middle;
        } else {
            first = middle + 1;
        }
    }
    return first;
}

/* packed: whether rows can be moved in packs. */
__global__ static void __launch_bounds__(THREADS)
    scale_kernel(real_t *out, float *used, RowSource rows, const float *weight, const float *scale, const int *offset,
                 int experts, int C, bool packed) {
    enum { WIDTH = Pack<real_t>::COUNT };
    for (int r = blockIdx.x; r < offset[experts]; r += gridDim.x) {
        const int e = expert_of(r, offset, experts);
        const float factor = scale[e] * (weight ? weight[r] : 1);
        const real_t *from = rows.x + (size_t)(rows.entry ? rows.entry[r] / rows.K : r) * C;
        real_t *to = out + (size_t)r * C;
        for (int c = threadIdx.x * WIDTH; packed && c < C; c += THREADS * WIDTH) {
            Pack<real_t> pack = load_pack(from + c);
            for (int i = 0; i < WIDTH; i++) {
                pack.v[i] = to_real<real_t>(factor * float_at(pack, i));
            }
            store_pack(to + c, pack);
        }
        for (int c = threadIdx.x; !packed && c < C; c += THREADS) {
            to[c] = to_real<real_t>(factor * to_float(from[c]));
        }
        if (used && threadIdx.x == 0) {
            used[r] = scale[e];
        }
    }
}

void scale_rows(real_t *out, acc_t *used, RowSource rows, const acc_t *weight, const acc_t *scale, const int *offset,
                int experts, int C, Stream *stream) {
    scale_kernel<<<BLOCKS_PER_SM * cuda_multiprocessors(), THREADS, 0, cuda_stream(stream)>>>(
        out, used, rows, weight, scale, offset, experts, C, packs_fit(out, C) && packs_fit(rows.x, C));
    CUDA_LAUNCHED();
}
