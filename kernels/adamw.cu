/* AdamW on the GPU: four launches for a whole model. Two make the squared norm of every tensor's gradient, chunk by
 * chunk in double; one thread block decides what the step does; one sweep updates everything and clears those gradients
 * that the next step adds to.
 *
 * Bytes per parameter in bf16: the norm reads 4, the sweep reads 16 (gradient, both moments, master) and writes 14, and
 * 4 more where it clears. The host knows nothing of the step: its rate and its decision lie in device memory. Called by
 * model/optimizer.c. Read next: update_chunk.
 */
#include "cuda.cuh"

extern "C" {
#include "adamw.h"
}

enum { THREADS = 256, WIDTH = 4, IN_FLIGHT = 4 };
static_assert(THREADS * WIDTH * IN_FLIGHT == ADAM_CHUNK, "a block reads its whole chunk before it writes");

/* Where the block's chunk is in the flat buffers, and whose. */
typedef struct {
    int piece;
    size_t begin;
    int count;
} Chunk;

/* The last piece that does not start after the chunk: all threads look at once. */
__device__ static Chunk find_chunk(const AdamPiece *pieces, int count, int chunk) {
    int starts = 0;
    for (int i = 0; i < count; i += THREADS) {
        int piece = i + threadIdx.x;
        starts += __syncthreads_count(piece < count && pieces[piece].first_chunk <= chunk);
    }
    const AdamPiece *piece = pieces + starts - 1;
    size_t done = (size_t)(chunk - piece->first_chunk) * ADAM_CHUNK, rest = piece->count - done;
    return Chunk{starts - 1, piece->offset + done, rest < ADAM_CHUNK ? (int)rest : (int)ADAM_CHUNK};
}

/* Whether the chunk's numbers can be moved four at a time: then so can those of the other flat buffers. */
__device__ static bool is_aligned(const float *first) {
    return reinterpret_cast<uintptr_t>(first) % 16 == 0;
}

/* ---- the norm ---- */

/* Grid: the loop over chunks. Block: the loop over a chunk's elements. */
__global__ void __launch_bounds__(THREADS)
    square_chunks(double *partial, const float *grads, const AdamPiece *pieces, int count) {
    Chunk chunk = find_chunk(pieces, count, blockIdx.x);
    const float *g = grads + chunk.begin;
    double sum = 0;
    if (pieces[chunk.piece].trained) {
        int packs = is_aligned(g) ? chunk.count / WIDTH : 0;
#pragma unroll 4
        for (int i = threadIdx.x; i < packs; i += THREADS) {
            Pack<float> pack = load_pack(g + i * WIDTH);
            for (int j = 0; j < WIDTH; j++) {
                sum += (double)pack.v[j] * pack.v[j];
            }
        }
        for (int i = packs * WIDTH + threadIdx.x; i < chunk.count; i += THREADS) {
            sum += (double)g[i] * g[i];
        }
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
    }
}

/* Grid: the loop over pieces. Block: the loop over a piece's chunks. */
__global__ void sum_pieces(double *sums, const double *partial, const AdamPiece *pieces, int count, int chunks) {
    int piece = blockIdx.x, end = piece + 1 < count ? pieces[piece + 1].first_chunk : chunks;
    double sum = 0;
    for (int i = pieces[piece].first_chunk + threadIdx.x; i < end; i += THREADS) {
        sum += partial[i];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        sums[piece] = sum;
    }
}

void adamw_square_sums(double *sums, double *partial, const acc_t *grads, const AdamPiece *pieces, int count,
                       int chunks, Stream *stream) {
    cudaStream_t s = cuda_stream(stream);
    if (chunks > 0) {
        square_chunks<<<chunks, THREADS, 0, s>>>(partial, grads, pieces, count);
        CUDA_LAUNCHED();
    }
    if (count > 0) {
        sum_pieces<<<count, THREADS, 0, s>>>(sums, partial, pieces, count, chunks);
        CUDA_LAUNCHED();
    }
}

/* ---- the decision ---- */

/* One block. Block: the loop over pieces; thread 0 does the rest. */
__global__ void decide(AdamState *state, const double *sums, int count, const float *loss, const double *lr,
                       AdamOptions options) {
    __shared__ double correction[2];
    double sum = 0;
    for (int i = threadIdx.x; i < count; i += THREADS) {
        sum += sums[i];
    }
    if (threadIdx.x % 32 == 0 && threadIdx.x < 64) { /* two warps, while the others read */
        double beta = threadIdx.x ? options.beta2 : options.beta1;
        correction[threadIdx.x / 32] = 1 - pow(beta, (double)(state->updates + 1));
    }
    sum = block_sum(sum); /* and a barrier */
    if (threadIdx.x != 0) {
        return;
    }
    state->norm = sqrt(sum);
    state->lr = *lr;
    if (!isfinite(state->norm) || !isfinite(*loss)) {
        state->skipped++;
        state->skipped_in_row++;
        state->scale = 0;
        return;
    }
    state->updates++;
    state->skipped_in_row = 0;
    state->scale = options.clip > 0 && state->norm > options.clip ? options.clip / state->norm : 1;
    state->correction1 = correction[0];
    state->correction2 = correction[1];
}

void adamw_begin(AdamState *state, const double *sums, int count, const acc_t *loss, const double *lr,
                 AdamOptions options, Stream *stream) {
    decide<<<1, THREADS, 0, cuda_stream(stream)>>>(state, sums, count, loss, lr, options);
    CUDA_LAUNCHED();
}

/* A thread for each piece. */
__global__ static void add_sums(double *sums, const double *all, const AdamPiece *pieces, int count, int ranks) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count && pieces[i].spread) {
        double sum = 0;
        for (int r = 0; r < ranks; r++) {
            sum += all[(size_t)r * count + i];
        }
        sums[i] = sum;
    }
}

void adamw_add_sums(double *sums, const double *all, const AdamPiece *pieces, int count, int ranks, Stream *stream) {
    add_sums<<<ceil_div(count, THREADS), THREADS, 0, cuda_stream(stream)>>>(sums, all, pieces, count, ranks);
    CUDA_LAUNCHED();
}

/* ---- the update ---- */

/* The factors of adamw.h for one piece. */
typedef struct {
    float scale, beta1, rest1, beta2, rest2, step, inverse2, eps, shrink;
} Factors;

__device__ static Factors piece_factors(const AdamState *state, const AdamOptions *o, double decay) {
    return Factors{(float)state->scale,
                   (float)o->beta1,
                   (float)(1 - o->beta1),
                   (float)o->beta2,
                   (float)(1 - o->beta2),
                   (float)(state->lr / state->correction1),
                   (float)(1 / state->correction2),
                   (float)o->eps,
                   (float)(state->lr * decay)};
}

__device__ static void update(float *w, float *m, float *v, float gradient, const Factors &f) {
    float g = f.scale * gradient;
    *m = f.beta1 * *m + f.rest1 * g;
    *v = f.beta2 * *v + f.rest2 * (g * g);
    *w -= f.step * *m / (sqrtf(*v * f.inverse2) + f.eps) + f.shrink * *w;
}

/* The compute copy of four weights, by one instruction. */
template <class T>
__device__ static void store_four(T *to, const float *from) {
    struct alignas(WIDTH * sizeof(T)) Copies {
        T v[WIDTH];
    } copies;
    for (int k = 0; k < WIDTH; k++) {
        copies.v[k] = to_real<T>(from[k]);
    }
    *reinterpret_cast<Copies *>(to) = copies;
}

/* Zeros for the gradient of a chunk, unless its piece keeps it. */
__device__ static void clear(float *grads, int packs, int count, const AdamPiece &piece) {
    if (piece.keep_grad) {
        return;
    }
    for (int i = threadIdx.x; i < packs; i += THREADS) {
        store_pack(grads + i * WIDTH, Pack<float>{});
    }
    for (int i = packs * WIDTH + threadIdx.x; i < count; i += THREADS) {
        grads[i] = 0;
    }
}

/* Four parameters, and all that belongs to them. */
typedef struct {
    Pack<float> g, m, v, w;
} Four;

/* Grid: the loop over chunks. Block: the loop over a chunk's elements, with IN_FLIGHT times four numbers of each array
 * read before the first is written. weights NULL: they are master. */
__global__ void __launch_bounds__(THREADS)
    update_chunk(float *master, real_t *weights, float *m, float *v, float *grads, const AdamPiece *pieces, int count,
                 const AdamState *state, AdamOptions options) {
    Chunk chunk = find_chunk(pieces, count, blockIdx.x);
    const AdamPiece &piece = pieces[chunk.piece];
    size_t at = chunk.begin;
    int packs = is_aligned(grads + at) ? chunk.count / WIDTH : 0;
    if (!piece.trained || state->scale == 0) { /* only a skipped step has scale 0 */
        clear(grads + at, packs, chunk.count, piece);
        return;
    }
    Factors f = piece_factors(state, &options, piece.decay);
    for (int begin = threadIdx.x; begin < packs; begin += IN_FLIGHT * THREADS) {
        Four four[IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; i++) {
            size_t j = at + (begin + i * THREADS) * WIDTH;
            if (begin + i * THREADS < packs) {
                four[i] = Four{load_pack(grads + j), load_pack(m + j), load_pack(v + j), load_pack(master + j)};
            }
        }
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; i++) {
            size_t j = at + (begin + i * THREADS) * WIDTH;
            if (begin + i * THREADS < packs) {
                for (int k = 0; k < WIDTH; k++) {
                    update(&four[i].w.v[k], &four[i].m.v[k], &four[i].v.v[k], four[i].g.v[k], f);
                }
                store_pack(m + j, four[i].m);
                store_pack(v + j, four[i].v);
                store_pack(master + j, four[i].w);
                if (weights) {
                    store_four(weights + j, four[i].w.v);
                }
            }
        }
    }
    for (int i = packs * WIDTH + threadIdx.x; i < chunk.count; i += THREADS) {
        size_t j = at + i;
        update(master + j, m + j, v + j, grads[j], f);
        if (weights) {
            weights[j] = to_real<real_t>(master[j]);
        }
    }
    clear(grads + at, packs, chunk.count, piece); /* what a thread clears it has read itself */
}

void adamw_update(acc_t *master, real_t *weights, acc_t *m, acc_t *v, acc_t *grads, const AdamPiece *pieces, int count,
                  int chunks, const AdamState *state, AdamOptions options, Stream *stream) {
    if (chunks > 0) {
        real_t *copy = (void *)weights == (void *)master ? NULL : weights;
        update_chunk<<<chunks, THREADS, 0, cuda_stream(stream)>>>(master, copy, m, v, grads, pieces, count, state,
                                                                  options);
        CUDA_LAUNCHED();
    }
}
