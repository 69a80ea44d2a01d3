/* Noisy top-k gating and its balance losses on a GPU: a warp works on one token, lane i on its experts i, i + 32, ...
 *
 * The importance and the load are sums over tokens. A warp adds its tokens to sums of its own in shared memory, a block
 * adds those of its warps, the last block those of all blocks, each time in order and in double; it also makes the loss
 * of them. Where that is done the experts are cut into GROUPs, a block for each, because the sums of 4096 would not
 * fit. The normal noise and a token's part in a load go through log, exp and erfc in double, as on the CPU.
 *
 * Called by model/router_noisy.c. Read next: choose.h, whose order this is; last_block.cuh.
 */
#include "last_block.cuh"

#include <assert.h>

extern "C" {
#include "noisy.h"
#include "random.h"
}

enum {
    THREADS = 256,
    WARPS = THREADS / 32,
    MOST_SHARED = 48 * 1024, /* bytes a block has without asking for more */
    GROUP = 256,             /* experts whose sums lie in shared memory together */
    MOST_CHUNKS = 256,       /* of tokens, each a block's */
};

/* ---- the K largest, in the order of choose.h ----
 *
 *     key[e] = choose_key(value[e])            the lanes write, element e by lane e % 32
 *     first  = warp_take(key, E)               again and again: each call takes the first in order of what is left
 *
 * A key is an unsigned number that orders as the values do, so that one instruction finds a warp's largest. Keys lie in
 * shared memory, where no number of experts is too large, and a lane touches its own alone. Where a token's values fit
 * in registers, token_group.cuh is faster. */

enum { CHOOSE_TAKEN = 0 }; /* below the key of any value */

/* NaN and minus infinity count as the lowest finite number, -0 as 0. */
__device__ static inline unsigned choose_key(float value) {
    float rank = (value > -FLT_MAX ? value : -FLT_MAX) + 0.0f;
    unsigned bits = __float_as_uint(rank);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/* The first in order of those left, which is taken out; all lanes call it and get it. E >= 1, and one is left. */
__device__ static inline int warp_take(unsigned *key, int E) {
    const int lane = threadIdx.x % 32;
    unsigned best = CHOOSE_TAKEN;
    int index = 0;
    for (int e = lane; e < E; e += 32) {
        if (key[e] > best) {
            best = key[e];
            index = e;
        }
    }
    const unsigned largest = __reduce_max_sync(0xffffffffu, best);
    const int first = (int)__reduce_min_sync(0xffffffffu, best == largest ? (unsigned)index : 0xffffffffu);
    if (first % 32 == lane) {
        key[first] = CHOOSE_TAKEN;
    }
    return first;
}

/* ---- the gates ---- */

/* sigma: log(1 + e^r) without overflow, and the floor */
__device__ static double noise_deviation(double r) {
    return (r > 0 ? r + log1p(exp(-r)) : log1p(exp(r))) + 0.01;
}

__device__ static float sigmoid(float x) {
    return 1 / (1 + expf(-x));
}

/* out = softmax of x (count) by a warp; lane i wrote x[i], x[i + 32], ... */
__device__ static void warp_softmax(float *out, const float *x, int count) {
    const int lane = threadIdx.x % 32;
    float largest = -INFINITY, sum = 0;
    for (int i = lane; i < count; i += 32) {
        largest = fmaxf(largest, x[i]);
    }
    largest = warp_max(largest);
    for (int i = lane; i < count; i += 32) {
        sum += out[i] = expf(x[i] - largest);
    }
    sum = warp_sum(sum);
    for (int i = lane; i < count; i += 32) {
        out[i] /= sum;
    }
}

/* Grid and warps replace the loop over tokens, lanes those over experts and over entries. */
__global__ static void __launch_bounds__(THREADS)
    noisy_kernel(float *h, float *noise, int *expert, float *weight, float *probs, const float *clean, const float *raw,
                 const uint64_t *random, int noisy, int N, int E, int K) {
    extern __shared__ unsigned shared[]; /* (warps of the block, E) */
    const int lane = threadIdx.x % 32;
    const size_t n = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / 32, row = n * E;
    if (n >= N) {
        return;
    }
    unsigned *key = shared + threadIdx.x / 32 * E;
    for (int e = lane; e < E; e += 32) {
        const size_t i = row + e;
        const float eps = noisy ? (float)random_normal(*random, i) : 0;
        const float logit = noisy ? (float)(clean[i] + eps * noise_deviation(raw[i])) : clean[i];
        noise[i] = eps;
        h[i] = logit;
        key[e] = choose_key(logit);
    }
    __syncwarp(); /* h is read by other lanes below */
    for (int j = 0; j < K; j++) {
        const int e = warp_take(key, E);
        if (j % 32 == lane) {
            expert[n * K + j] = e;
            weight[n * K + j] = h[row + e];
        }
    }
    warp_softmax(weight + n * K, weight + n * K, K);
    warp_softmax(probs + row, clean + row, E);
}

void noisy_forward(acc_t *h, acc_t *noise, int *expert, acc_t *weight, acc_t *probs, const acc_t *clean,
                   const acc_t *raw, const uint64_t *key, int noisy, int N, int E, int K, Stream *stream) {
    const int token_bytes = E * (int)sizeof(unsigned), warps = min(WARPS, MOST_SHARED / token_bytes);
    assert(warps > 0);
    noisy_kernel<<<ceil_div(N, warps), warps * 32, warps * token_bytes, cuda_stream(stream)>>>(
        h, noise, expert, weight, probs, clean, raw, key, noisy, N, E, K);
    CUDA_LAUNCHED();
}

/* Grid and warps replace the loop over tokens, lanes those over experts and over entries. */
__global__ static void __launch_bounds__(THREADS)
    noisy_backward_kernel(float *dclean, float *draw, const float *dweight, const float *raw, const float *noise,
                          const int *expert, const float *weight, int N, int E, int K) {
    const int lane = threadIdx.x % 32;
    const size_t n = ((size_t)blockIdx.x * THREADS + threadIdx.x) / 32, row = n * E;
    if (n >= N) {
        return;
    }
    const float *w = weight + n * K, *g = dweight + n * K;
    for (int e = lane; e < E; e += 32) {
        dclean[row + e] = 0;
        draw[row + e] = 0;
    }
    float mean = 0;
    for (int j = lane; j < K; j += 32) {
        mean += w[j] * g[j];
    }
    mean = warp_sum(mean);
    __syncwarp(); /* the zeros come first */
    for (int j = lane; j < K; j += 32) {
        const size_t i = row + expert[n * K + j];
        const float dh = w[j] * (g[j] - mean);
        dclean[i] = dh;
        draw[i] = dh * noise[i] * sigmoid(raw[i]);
    }
}

void noisy_backward(acc_t *dclean, acc_t *draw, const acc_t *dweight, const acc_t *raw, const acc_t *noise,
                    const int *expert, const acc_t *weight, int N, int E, int K, Stream *stream) {
    noisy_backward_kernel<<<ceil_div(N, WARPS), THREADS, 0, cuda_stream(stream)>>>(dclean, draw, dweight, raw, noise,
                                                                                   expert, weight, N, E, K);
    CUDA_LAUNCHED();
}

/* ---- the border of a choice ---- */

/* The two experts of a token at the border of the choice. Each is the other side's threshold: without e, the K-th
 * largest is `next` where e is chosen and `last` where it is not. */
typedef struct {
    int last, next; /* the K-th and the (K+1)-th largest */
    float last_h, next_h;
    unsigned last_key;
} Border;

__device__ static bool is_chosen(float h, Border border, int e) {
    const unsigned key = choose_key(h);
    return key > border.last_key || (key == border.last_key && e <= border.last);
}

/* By a warp, from the token's h (E) and its chosen (K). K < E. */
__device__ static Border border_of(const float *h, const int *chosen, int E, int K) {
    Border border = {chosen[K - 1], -1, 0, 0, 0};
    border.last_h = h[border.last];
    border.last_key = choose_key(border.last_h);
    unsigned best = CHOOSE_TAKEN, index = 0xffffffffu;
    for (int e = threadIdx.x % 32; e < E; e += 32) {
        if (!is_chosen(h[e], border, e) && choose_key(h[e]) > best) {
            best = choose_key(h[e]);
            index = e;
        }
    }
    const unsigned largest = __reduce_max_sync(0xffffffffu, best);
    border.next = (int)__reduce_min_sync(0xffffffffu, best == largest ? index : 0xffffffffu);
    border.next_h = h[border.next];
    return border;
}

/* z of P = Phi(z): how far, in its noise, expert e's clean logit lies above the threshold */
__device__ static double border_distance(float h, float clean, double sigma, Border border, int e) {
    return ((double)clean - (is_chosen(h, border, e) ? border.next_h : border.last_h)) / sigma;
}

/* ---- the balance losses ---- */

static __device__ unsigned balance_ticket;

/* The tokens of a block begin here and end where the next block's begin. */
__device__ static size_t chunk_start(int N, int chunk) {
    return (size_t)N * chunk / gridDim.x;
}

static int chunks_of(int N) {
    return min(ceil_div(N, WARPS), (int)MOST_CHUNKS);
}

typedef struct {
    double mean, variance;
} Moments;

/* Of x (E), by a block. */
__device__ static Moments moments_of(const float *x, int E) {
    Moments m = {0, 0};
    for (int e = threadIdx.x; e < E; e += THREADS) {
        m.mean += (double)x[e] / E;
    }
    m.mean = block_sum(m.mean);
    for (int e = threadIdx.x; e < E; e += THREADS) {
        m.variance += (x[e] - m.mean) * (x[e] - m.mean) / E;
    }
    m.variance = block_sum(m.variance);
    return m;
}

/* CV^2 of x (E). The mean is above 0: weights sum to 1 in a token, and the P of a chosen expert is at least
 * Phi(-eps). */
__device__ static double cv_squared(const float *x, int E) {
    const Moments m = moments_of(x, E);
    return m.variance / (m.mean * m.mean);
}

/* d CV^2 / dx_e, where moving x_e moves the mean as well */
__device__ static double cv_squared_slope(Moments m, double x, int E) {
    return 2 / (E * m.mean * m.mean) * (x - m.mean - m.variance / m.mean);
}

/* What a balance loss reads of all tokens. */
typedef struct {
    const float *clean, *raw, *noise, *h; /* (N,E) */
    const int *expert;                    /* (N,K) */
    const float *weight;                  /* (N,K) */
    int N, E, K, noisy;
} Gates;

/* What token n adds to the sums of the experts first .. first + GROUP, by a warp: column (2,GROUP) is its own. */
__device__ static void add_token(double (*column)[GROUP], Gates gates, size_t n, int first) {
    const int E = gates.E, K = gates.K, lane = threadIdx.x % 32, end = min(E, first + GROUP);
    const int *chosen = gates.expert + n * K;
    for (int j = lane; j < K; j += 32) {
        if (chosen[j] >= first && chosen[j] < end) {
            column[0][chosen[j] - first] += gates.weight[n * K + j];
        }
    }
    if (gates.noisy) {
        const float *h = gates.h + n * E;
        const Border border = border_of(h, chosen, E, K);
        for (int e = first + lane; e < end; e += 32) {
            const double sigma = noise_deviation(gates.raw[n * E + e]);
            const double z = border_distance(h[e], gates.clean[n * E + e], sigma, border, e);
            column[1][e - first] += 0.5 * erfc(-z * M_SQRT1_2);
        }
    }
    __syncwarp(); /* the next token's choices are other lanes' */
}

/* Grid x and warps replace the loops over chunks and over their tokens, lanes that over experts, grid y their GROUPs.
 * partial (chunks,2,E). */
__global__ static void __launch_bounds__(THREADS)
    noisy_balance_kernel(float *load, float *sums, double *partial, Gates gates) {
    extern __shared__ double column[][2][GROUP]; /* (WARPS) */
    const int E = gates.E, warp = threadIdx.x / 32, first = blockIdx.y * GROUP;
    for (int i = threadIdx.x; i < WARPS * 2 * GROUP; i += THREADS) {
        column[0][0][i] = 0;
    }
    __syncthreads();
    for (size_t n = chunk_start(gates.N, blockIdx.x) + warp; n < chunk_start(gates.N, blockIdx.x + 1); n += WARPS) {
        add_token(column[warp], gates, n, first);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * GROUP; i += THREADS) {
        double sum = 0;
        for (int w = 0; w < WARPS; w++) {
            sum += column[w][0][i];
        }
        if (first + i % GROUP < E) {
            partial[((size_t)blockIdx.x * 2 + i / GROUP) * E + first + i % GROUP] = sum;
        }
    }
    if (!is_last_block(&balance_ticket)) {
        return;
    }
    for (int i = threadIdx.x; i < 2 * E; i += THREADS) {
        double sum = 0;
        for (unsigned chunk = 0; chunk < gridDim.x; chunk++) {
            sum += partial[(size_t)chunk * 2 * E + i];
        }
        sums[i] = (float)sum;
    }
    __syncthreads();
    const double loss = cv_squared(sums, E) + (gates.noisy ? cv_squared(sums + E, E) : 0);
    if (threadIdx.x == 0) {
        load[LOAD_BALANCE] = (float)loss;
        load[LOAD_Z] = 0;
    }
}

void noisy_balance_forward(acc_t *load, acc_t *sums, const acc_t *clean, const acc_t *raw, const acc_t *h,
                           const int *expert, const acc_t *weight, int noisy, int N, int E, int K, Stream *stream) {
    const Gates gates = {clean, raw, NULL, h, expert, weight, N, E, K, noisy};
    const dim3 grid(chunks_of(N), ceil_div(E, GROUP));
    double *partial = (double *)cuda_workspace((size_t)grid.x * 2 * E * sizeof *partial);
    noisy_balance_kernel<<<grid, THREADS, WARPS * 2 * GROUP * sizeof(double), cuda_stream(stream)>>>(load, sums,
                                                                                                     partial, gates);
    CUDA_LAUNCHED();
}

/* What the gradient needs of the two losses. */
typedef struct {
    const float *importance, *load; /* (E) */
    Moments importance_moments, load_moments;
    double scale;
} Balance;

/* d L / d w of the importance loss, for expert e */
__device__ static double importance_slope(Balance balance, int e, int E) {
    return balance.scale * cv_squared_slope(balance.importance_moments, balance.importance[e], E);
}

/* d L / d c_e through P_e alone, and *dsigma likewise. The threshold's expert gets -1 times the former. i is the place
 * of the token's e. */
__device__ static double own_load_gradient(double *dsigma, Gates gates, Balance balance, Border border, size_t i,
                                           int e) {
    const double sigma = noise_deviation(gates.raw[i]);
    const double z = border_distance(gates.h[i], gates.clean[i], sigma, border, e);
    const double density = exp(-0.5 * z * z) * 0.3989422804014327; /* phi(z), 1 / sqrt(2 pi) */
    const double dc =
        balance.scale * cv_squared_slope(balance.load_moments, balance.load[e], gates.E) * density / sigma;
    *dsigma = -dc * z;
    return dc;
}

/* Adds to one element of both gradients; returns the sum of the squares of what it adds. */
__device__ static double add_gradient(float *dclean, float *draw, double dc, double dsigma, float raw) {
    const double dr = dsigma * sigmoid(raw);
    *dclean += (float)dc;
    *draw += (float)dr;
    return dc * dc + dr * dr;
}

/* Both losses' gradient of token n, by a warp. Most experts have the term of their own P alone. The chosen and the next
 * one wait for the second loop: they also have the importance's, which goes through the softmax to h, or the
 * threshold's, which sums over the experts on the other side of the border. Returns the lane's sum of squares. */
__device__ static double token_balance_backward(float *dclean, float *draw, Gates gates, Balance balance, size_t n) {
    const int E = gates.E, K = gates.K, lane = threadIdx.x % 32;
    const int *chosen = gates.expert + n * K;
    const float *weight = gates.weight + n * K;
    const size_t row = n * E;
    const Border border = border_of(gates.h + row, chosen, E, K);
    double square = 0, mean = 0, chosen_sum = 0, other_sum = 0, dsigma;
    for (int e = lane; e < E; e += 32) {
        const size_t i = row + e;
        const double dc = own_load_gradient(&dsigma, gates, balance, border, i, e);
        if (is_chosen(gates.h[i], border, e)) {
            chosen_sum += dc;
        } else {
            other_sum += dc;
            square += e == border.next ? 0 : add_gradient(&dclean[i], &draw[i], dc, dsigma, gates.raw[i]);
        }
    }
    for (int j = lane; j < K; j += 32) {
        mean += weight[j] * importance_slope(balance, chosen[j], E);
    }
    mean = warp_sum(mean);
    chosen_sum = warp_sum(chosen_sum);
    other_sum = warp_sum(other_sum);
    for (int j = lane; j <= K; j += 32) {
        const int e = j < K ? chosen[j] : border.next;
        const size_t i = row + e;
        const double dc = own_load_gradient(&dsigma, gates, balance, border, i, e);
        double dh = j < K ? weight[j] * (importance_slope(balance, e, E) - mean) : 0;
        dh -= e == border.next ? chosen_sum : e == border.last ? other_sum : 0;
        square += add_gradient(&dclean[i], &draw[i], dc + dh, dsigma + dh * gates.noise[i], gates.raw[i]);
    }
    return square;
}

/* Grid and warps replace the loops over chunks and over their tokens, lanes those over experts and over entries.
 * partial (chunks). */
__global__ static void __launch_bounds__(THREADS)
    noisy_balance_backward_kernel(float *dclean, float *draw, float *load, double *partial, const float *sums,
                                  Gates gates, double scale) {
    const Balance balance = {sums, sums + gates.E, moments_of(sums, gates.E), moments_of(sums + gates.E, gates.E),
                             scale};
    double square = 0;
    for (size_t n = chunk_start(gates.N, blockIdx.x) + threadIdx.x / 32; n < chunk_start(gates.N, blockIdx.x + 1);
         n += WARPS) {
        square += token_balance_backward(dclean, draw, gates, balance, n);
    }
    if (grid_sum(&square, partial, square, &balance_ticket) && threadIdx.x == 0) {
        load[LOAD_BALANCE_GRADIENT] = (float)sqrt(square);
    }
}

void noisy_balance_backward(acc_t *dclean, acc_t *draw, acc_t *load, const acc_t *sums, const acc_t *clean,
                            const acc_t *raw, const acc_t *noise, const acc_t *h, const int *expert,
                            const acc_t *weight, double scale, int N, int E, int K, Stream *stream) {
    const Gates gates = {clean, raw, noise, h, expert, weight, N, E, K, 1};
    const int chunks = chunks_of(N);
    double *partial = (double *)cuda_workspace(chunks * sizeof *partial);
    noisy_balance_backward_kernel<<<chunks, THREADS, 0, cuda_stream(stream)>>>(dclean, draw, load, partial, sums, gates,
                                                                               scale);
    CUDA_LAUNCHED();
}
