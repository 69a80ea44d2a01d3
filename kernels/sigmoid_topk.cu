/* Sigmoid scores with a selection bias on a GPU: a group of lanes holds a token's row in registers for the choice, a
 * warp has a token on the way back; the loss of a sequence is worked on by pieces of TOKENS tokens.
 *
 * Logits are read once and every output is written once. Where experts are in groups, a token's s + b go to shared
 * memory as well, because a group's experts lie in many lanes. The balance loss has two launches: the first counts the
 * choices of each piece, the second adds up the counts of a sequence's pieces in every block that needs them, which is
 * less work than another launch would be. Sums over tokens are taken in double, piece by piece in order, by the block
 * that ends last.
 *
 * Called by model/router_sigmoid.c. Read token_group.cuh first.
 */
#include "last_block.cuh"
#include "token_group.cuh"

#include <assert.h>

extern "C" {
#include "sigmoid_topk.h"
}

enum {
    THREADS = 256,
    MOST_EXPERTS = 4096,     /* as the option --experts has it */
    MOST_SHARED = 48 * 1024, /* bytes a block has without asking for more */
    BALANCE_THREADS = 512,
    TOKENS = 128, /* of a piece of a sequence */
};

__device__ static const float smallest_total = 1e-20f;

/* The two best of `size` values, added; the one where there is one. Starting at another place in each group, lanes read
 * from different banks. */
__device__ static float group_score(const float *biased, int size, int start) {
    float best = -INFINITY, second = -INFINITY;
    for (int i = 0, at = start % size; i < size; i++, at = at + 1 < size ? at + 1 : 0) {
        const float other = fminf(best, biased[at]);
        best = fmaxf(best, biased[at]);
        second = fmaxf(second, other);
    }
    return size > 1 ? best + second : best;
}

/* Ranks below all others for the experts of the groups that are not kept. shared (E + groups) is the token's own.
 * A group is kept when fewer than `kept` come before it. */
template <int LANES, int PER>
__device__ static void mask_groups(float (&rank)[PER], float *shared, SigmoidShape shape, int lane, unsigned lanes) {
    const int E = shape.E, groups = shape.groups, size = E / groups;
    float *score = shared + E;
    store_experts<LANES>(shared, rank, E, lane, false);
    __syncwarp(lanes);
    for (int g = lane; g < groups; g += LANES) {
        score[g] = choose_rank(group_score(shared + g * size, size, g));
    }
    __syncwarp(lanes);
    for (int g = lane; g < groups; g += LANES) {
        int before = 0;
        for (int other = 0; other < groups; other++) {
            before += comes_before(Choice{score[other], other}, Choice{score[g], g});
        }
        shared[g] = before < shape.kept; /* in the place of values that are in registers as well */
    }
    __syncwarp(lanes);
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const int e = expert_of<LANES>(lane, i);
        if (e < E && shared[e / size] == 0) {
            rank[i] = -FLT_MAX;
        }
    }
}

/* Grid and groups of LANES threads replace the loop over tokens, lanes those over experts, PER of them each, and over
 * entries. packed: rows of E can be moved in packs. */
template <int LANES, int PER>
__global__ static void __launch_bounds__(THREADS)
    sigmoid_topk_kernel(float *scores, float *probs, int *expert, float *weight, const float *logits, const float *bias,
                        SigmoidShape shape, bool packed) {
    extern __shared__ float shared[]; /* with groups: (tokens of the block, E + groups) */
    const int E = shape.E, K = shape.K, lane = threadIdx.x % LANES;
    const size_t n = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / LANES;
    const unsigned lanes = __ballot_sync(0xffffffffu, n < shape.N);
    if (n >= shape.N) {
        return;
    }
    float x[PER], sum = 0; /* logits, then scores, then ranks */
    load_experts<LANES>(x, logits + n * E, E, lane, packed, -INFINITY);
#pragma unroll
    for (int i = 0; i < PER; i++) {
        x[i] = __fdividef(1, 1 + expf(-x[i]));
        sum += x[i];
    }
    const float inverse = 1 / group_sum<LANES>(sum, lanes);
    store_experts<LANES>(scores + n * E, x, E, lane, packed);
    float other[PER];
#pragma unroll
    for (int i = 0; i < PER; i++) {
        other[i] = x[i] * inverse;
    }
    store_experts<LANES>(probs + n * E, other, E, lane, packed);
    load_experts<LANES>(other, bias, E, lane, packed, 0);
#pragma unroll
    for (int i = 0; i < PER; i++) { /* NaN comes last, but before a group that is not kept */
        const float value = x[i] + other[i];
        x[i] = expert_of<LANES>(lane, i) >= E ? -INFINITY : value == value ? choose_rank(value) : -1e30f;
    }
    if (shape.groups > 1) {
        mask_groups<LANES>(x, shared + (size_t)(threadIdx.x / LANES) * (E + shape.groups), shape, lane, lanes);
    }
    int *chosen = expert + n * K;
    for (int j = 0; j < K; j++) {
        const Choice first = take_first<LANES>(x, lane, lanes);
        if (j % LANES == lane) {
            chosen[j] = first.expert; /* by the lane that reads it below */
        }
    }
    __syncwarp(lanes); /* scores are read that other lanes wrote */
    float total = 0;
    for (int j = lane; j < K; j += LANES) {
        weight[n * K + j] = scores[n * E + chosen[j]];
        total += weight[n * K + j];
    }
    total = group_sum<LANES>(total, lanes) + smallest_total;
    const float factor = (float)shape.scale / (shape.renorm ? total : 1);
    for (int j = lane; j < K; j += LANES) {
        weight[n * K + j] *= factor;
    }
}

template <int LANES, int PER>
static void launch_sigmoid_topk(float *scores, float *probs, int *expert, float *weight, const float *logits,
                                const float *bias, SigmoidShape shape, cudaStream_t stream) {
    const bool packed = packs_fit(scores, shape.E) && packs_fit(probs, shape.E) && packs_fit(logits, shape.E) &&
                        packs_fit(bias, shape.E);
    const int token_bytes = shape.groups > 1 ? (shape.E + shape.groups) * (int)sizeof(float) : 0;
    int threads = THREADS; /* of whole warps */
    while (threads / LANES * token_bytes > MOST_SHARED) {
        threads -= 32;
    }
    sigmoid_topk_kernel<LANES, PER>
        <<<ceil_div(shape.N, threads / LANES), threads, threads / LANES * token_bytes, stream>>>(
            scores, probs, expert, weight, logits, bias, shape, packed);
    CUDA_LAUNCHED();
}

void sigmoid_topk_forward(acc_t *scores, acc_t *probs, int *expert, acc_t *weight, const acc_t *logits,
                          const acc_t *bias, SigmoidShape shape, Stream *stream) {
    assert(shape.E <= MOST_EXPERTS && shape.groups <= shape.E);
    cudaStream_t queue = cuda_stream(stream);
    if (shape.E <= MOST_IN_REGISTERS) {
        WITH_LANES(shape.E, 16,
                   launch_sigmoid_topk<LANES, PER>(scores, probs, expert, weight, logits, bias, shape, queue));
    } else {
        launch_sigmoid_topk<32, MOST_EXPERTS / 32>(scores, probs, expert, weight, logits, bias, shape, queue);
    }
}

/* Grid and warps replace the loop over tokens, lanes those over experts and over entries. */
__global__ static void __launch_bounds__(THREADS)
    sigmoid_topk_backward_kernel(float *dlogits, const float *dweight, const float *scores, const int *expert,
                                 const float *weight, SigmoidShape shape) {
    const int E = shape.E, K = shape.K, lane = threadIdx.x % 32;
    const size_t n = ((size_t)blockIdx.x * THREADS + threadIdx.x) / 32;
    if (n >= shape.N) {
        return;
    }
    const float *s = scores + n * E, *w = weight + n * K, *g = dweight + n * K;
    const int *chosen = expert + n * K;
    float *dl = dlogits + n * E;
    for (int e = lane; e < E; e += 32) {
        dl[e] = 0;
    }
    float total = 0, mean = 0;
    for (int j = lane; j < K; j += 32) {
        total += s[chosen[j]];
        mean += w[j] * g[j];
    }
    total = warp_sum(total) + smallest_total;
    mean = warp_sum(mean) / (float)shape.scale; /* of g, by weights that sum to 1 */
    const float factor = (float)shape.scale / (shape.renorm ? total : 1);
    __syncwarp(); /* the zeros come first */
    for (int j = lane; j < K; j += 32) {
        const float score = s[chosen[j]];
        dl[chosen[j]] = factor * (shape.renorm ? g[j] - mean : g[j]) * score * (1 - score);
    }
}

void sigmoid_topk_backward(acc_t *dlogits, const acc_t *dweight, const acc_t *scores, const int *expert,
                           const acc_t *weight, SigmoidShape shape, Stream *stream) {
    sigmoid_topk_backward_kernel<<<ceil_div(shape.N, THREADS / 32), THREADS, 0, cuda_stream(stream)>>>(
        dlogits, dweight, scores, expert, weight, shape);
    CUDA_LAUNCHED();
}

/* ---- the balance loss of sequences ---- */

static __device__ unsigned balance_ticket;

/* Piece i of the batch: `pieces` of them in each sequence of T tokens. */
typedef struct {
    size_t first; /* token */
    int tokens, sequence;
} Piece;

__device__ static Piece piece_at(int i, int pieces, int T) {
    const int sequence = i / pieces, start = i % pieces * TOKENS;
    return {(size_t)sequence * T + start, min(TOKENS, T - start), sequence};
}

/* counts (sequences,pieces,E): how often each expert was chosen. A block replaces a part of the loop over a sequence's
 * entries; threads take entries and add in whole numbers, in any order. */
__global__ static void __launch_bounds__(BALANCE_THREADS)
    count_choices_kernel(int *counts, const int *expert, SigmoidShape shape, int pieces) {
    extern __shared__ int count[]; /* (E) */
    const int E = shape.E, K = shape.K;
    const Piece piece = piece_at(blockIdx.x, pieces, shape.T);
    for (int e = threadIdx.x; e < E; e += BALANCE_THREADS) {
        count[e] = 0;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < piece.tokens * K; i += BALANCE_THREADS) {
        atomicAdd(&count[expert[piece.first * K + i]], 1);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < E; e += BALANCE_THREADS) {
        counts[(size_t)blockIdx.x * E + e] = count[e];
    }
}

/* count (E) of a whole sequence */
__device__ static void add_counts(int *count, const int *counts, int sequence, int pieces, int E) {
    for (int e = threadIdx.x; e < E; e += BALANCE_THREADS) {
        int sum = 0;
        for (int i = 0; i < pieces; i++) {
            sum += counts[((size_t)sequence * pieces + i) * E + e];
        }
        count[e] = sum;
    }
    __syncthreads();
}

/* sum_e count_e s'_e of one token, by a warp */
__device__ static double crowding(const int *count, const float *share, int E) {
    double sum = 0;
    for (int e = threadIdx.x % 32; e < E; e += 32) {
        sum += (double)count[e] * share[e];
    }
    return warp_sum(sum);
}

/* Blocks replace the loop over sequences, each for a piece of one; warps that over tokens, lanes that over experts. */
__global__ static void __launch_bounds__(BALANCE_THREADS)
    sequence_balance_kernel(float *load, double *partial, const int *counts, const float *probs, SigmoidShape shape,
                            int pieces) {
    extern __shared__ int count[]; /* (E) */
    const Piece piece = piece_at(blockIdx.x, pieces, shape.T);
    add_counts(count, counts, piece.sequence, pieces, shape.E);
    double sum = 0;
    for (int i = threadIdx.x / 32; i < piece.tokens; i += BALANCE_THREADS / 32) {
        sum += crowding(count, probs + (piece.first + i) * shape.E, shape.E);
    }
    sum = threadIdx.x % 32 == 0 ? sum : 0;
    if (grid_sum(&sum, partial, sum, &balance_ticket) && threadIdx.x == 0) {
        load[LOAD_BALANCE] = (float)(sum * shape.E / ((double)shape.K * shape.T) / shape.N);
        load[LOAD_Z] = 0;
    }
}

/* The scratch of both directions, with the counts made. */
typedef struct {
    int *counts;     /* (blocks,E) */
    double *partial; /* (blocks) */
    int pieces, blocks;
    size_t shared; /* bytes of a sequence's counts */
} BalanceScratch;

static BalanceScratch count_choices(const int *expert, SigmoidShape shape, cudaStream_t stream) {
    BalanceScratch scratch = {NULL, NULL, 0, 0, shape.E * sizeof(int)};
    scratch.pieces = ceil_div(shape.T, TOKENS);
    scratch.blocks = shape.N / shape.T * scratch.pieces;
    assert(shape.E <= MOST_EXPERTS);
    const size_t blocks = scratch.blocks;
    scratch.partial = (double *)cuda_workspace(blocks * (sizeof(double) + scratch.shared));
    scratch.counts = (int *)(scratch.partial + blocks);
    count_choices_kernel<<<scratch.blocks, BALANCE_THREADS, scratch.shared, stream>>>(scratch.counts, expert, shape,
                                                                                      scratch.pieces);
    CUDA_LAUNCHED();
    return scratch;
}

void sequence_balance_forward(acc_t *load, const acc_t *probs, const int *expert, SigmoidShape shape, Stream *stream) {
    const BalanceScratch scratch = count_choices(expert, shape, cuda_stream(stream));
    sequence_balance_kernel<<<scratch.blocks, BALANCE_THREADS, scratch.shared, cuda_stream(stream)>>>(
        load, scratch.partial, scratch.counts, probs, shape, scratch.pieces);
    CUDA_LAUNCHED();
}

/* As the forward's; `unit` is what a count in f, of a token in the mean, is worth. */
__global__ static void __launch_bounds__(BALANCE_THREADS)
    sequence_balance_backward_kernel(float *dlogits, float *load, double *partial, const int *counts,
                                     const float *scores, const float *probs, double unit, SigmoidShape shape,
                                     int pieces) {
    extern __shared__ int count[]; /* (E) */
    const Piece piece = piece_at(blockIdx.x, pieces, shape.T);
    const int E = shape.E;
    add_counts(count, counts, piece.sequence, pieces, E);
    double square = 0;
    for (int i = threadIdx.x / 32; i < piece.tokens; i += BALANCE_THREADS / 32) {
        const size_t row = (piece.first + i) * E;
        const double mean = crowding(count, probs + row, E);
        for (int e = threadIdx.x % 32; e < E; e += 32) { /* s / sum s = s' */
            const float added = (float)(unit * (count[e] - mean) * probs[row + e] * (1 - scores[row + e]));
            dlogits[row + e] += added;
            square += (double)added * added;
        }
    }
    if (grid_sum(&square, partial, square, &balance_ticket) && threadIdx.x == 0) {
        load[LOAD_BALANCE_GRADIENT] = (float)sqrt(square);
    }
}

void sequence_balance_backward(acc_t *dlogits, acc_t *load, const acc_t *scores, const acc_t *probs, const int *expert,
                               double scale, SigmoidShape shape, Stream *stream) {
    const BalanceScratch scratch = count_choices(expert, shape, cuda_stream(stream));
    const double unit = scale * shape.E / ((double)shape.K * shape.T) / shape.N;
    sequence_balance_backward_kernel<<<scratch.blocks, BALANCE_THREADS, scratch.shared, cuda_stream(stream)>>>(
        dlogits, load, scratch.partial, scratch.counts, scores, probs, unit, shape, scratch.pieces);
    CUDA_LAUNCHED();
}

/* ---- the bias ---- */

__device__ static int64_t count_of(const int *counts, int slices, size_t stride, int e) {
    int64_t sum = 0;
    for (int i = 0; i < slices; i++) {
        sum += counts[i * stride + e];
    }
    return sum;
}

/* One block, whose threads replace both loops over experts. */
__global__ static void __launch_bounds__(THREADS)
    selection_bias_kernel(float *bias, const int *counts, int slices, size_t stride, int E, float rate,
                          const AdamState *adam) {
    if (adam->scale == 0) {
        return;
    }
    double sum = 0; /* of whole numbers far below 2^53: exact */
    for (int e = threadIdx.x; e < E; e += THREADS) {
        sum += (double)count_of(counts, slices, stride, e);
    }
    const int64_t total = (int64_t)block_sum(sum);
    for (int e = threadIdx.x; e < E; e += THREADS) { /* compared times E: exactly at the mean nothing moves */
        const int64_t missing = total - E * count_of(counts, slices, stride, e);
        bias[e] += rate * ((missing > 0) - (missing < 0));
    }
}

void selection_bias_update(acc_t *bias, const int *counts, int slices, size_t stride, int E, double rate,
                           const AdamState *adam, Stream *stream) {
    selection_bias_kernel<<<1, THREADS, 0, cuda_stream(stream)>>>(bias, counts, slices, stride, E, (float)rate, adam);
    CUDA_LAUNCHED();
}
