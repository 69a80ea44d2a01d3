/* Softmax, choice and weights of a token by a group of lanes that holds its row in registers (token_group.cuh): each
 * logit is read once, each probability written once.
 *
 * topk_forward and softmax_forward are one kernel, with and without the choice, hence the same bits. Weights are added
 * up lane by lane, entry j on lane j % LANES, in choice_weight as in topk_forward. LANES depends on E alone.
 *
 * Called by the routers of model/. Read token_group.cuh first; next permute.cu, which sorts what is chosen here.
 */
#include "cuda.cuh"

#include "token_group.cuh"
extern "C" {
#include "topk.h"
}

enum { THREADS = 256 };

/* e^x for x <= 0, and 0 from the same bound on as on the CPU: what is too unlikely ties with its like. */
__device__ static inline float exp_below(float x) {
    return x < -87.3f ? 0.0f : expf(x);
}

/* Divides the weights that this lane wrote by the sum of all the token's. own: the sum of this lane's. */
template <int LANES>
__device__ static inline void renormalize(float *weight, const int *expert, float own, int K, int lane,
                                          unsigned lanes) {
    float total = group_sum<LANES>(own, lanes);
    for (int j = lane; j < K; j += LANES) {
        weight[j] = expert[j] < 0 ? 0.0f : weight[j] / total;
    }
}

/* x becomes softmax(x), returns the log-sum-exp. */
template <int LANES, int PER>
__device__ static inline float softmax(float (&x)[PER], unsigned lanes) {
    float largest = x[0], sum = 0;
#pragma unroll
    for (int i = 1; i < PER; i++) {
        largest = fmaxf(largest, x[i]);
    }
    largest = group_max<LANES>(largest, lanes);
#pragma unroll
    for (int i = 0; i < PER; i++) {
        x[i] = exp_below(x[i] - largest);
        sum += x[i];
    }
    sum = group_sum<LANES>(sum, lanes);
    float share = 1 / sum;
#pragma unroll
    for (int i = 0; i < PER; i++) {
        x[i] *= share;
    }
    return largest + logf(sum);
}

/* The loop over tokens: LANES neighbouring threads each. expert NULL: no choice. */
template <int LANES, int PER>
__global__ static void __launch_bounds__(THREADS)
    topk_kernel(float *probs, float *lse, int *expert, float *weight, const float *logits, int N, int E, int K,
                int renorm, bool packed) {
    size_t n = ((size_t)blockIdx.x * THREADS + threadIdx.x) / LANES;
    int lane = threadIdx.x % LANES;
    unsigned lanes = __ballot_sync(0xffffffffu, n < N);
    if (n >= N) {
        return;
    }
    float p[PER];
    load_experts<LANES>(p, logits + n * E, E, lane, packed, -INFINITY);
    float token_lse = softmax<LANES>(p, lanes);
    store_experts<LANES>(probs + n * E, p, E, lane, packed);
    if (lane == 0) {
        lse[n] = token_lse;
    }
    if (!expert) {
        return;
    }
#pragma unroll
    for (int i = 0; i < PER; i++) {
        p[i] = expert_of<LANES>(lane, i) < E ? choose_rank(p[i]) : -INFINITY;
    }
    expert += n * K;
    weight += n * K;
    float own = 0;
    for (int j = 0; j < K; j++) {
        Choice first = take_first<LANES>(p, lane, lanes);
        if (j % LANES == lane) {
            expert[j] = first.expert;
            weight[j] = first.rank > -FLT_MAX ? first.rank : NAN; /* no probability is that low */
            own += weight[j];
        }
    }
    if (renorm) {
        renormalize<LANES>(weight, expert, own, K, lane, lanes);
    }
}

/* The loop over tokens, a warp each, for any number of experts: the row stays in memory, K sweeps find the choice. A
 * lane reads again only what it wrote itself, but for the sweeps. */
__global__ static void __launch_bounds__(THREADS)
    topk_sweep_kernel(float *probs, float *lse, int *expert, float *weight, const float *logits, int N, int E, int K,
                      int renorm) {
    size_t n = ((size_t)blockIdx.x * THREADS + threadIdx.x) / 32;
    int lane = threadIdx.x % 32;
    if (n >= N) {
        return;
    }
    const float *l = logits + n * E;
    float *p = probs + n * E;
    float largest = -INFINITY, sum = 0;
    for (int e = lane; e < E; e += 32) {
        largest = fmaxf(largest, l[e]);
    }
    largest = warp_max(largest);
    for (int e = lane; e < E; e += 32) {
        p[e] = exp_below(l[e] - largest);
        sum += p[e];
    }
    sum = warp_sum(sum);
    float share = 1 / sum;
    for (int e = lane; e < E; e += 32) {
        p[e] *= share;
    }
    if (lane == 0) {
        lse[n] = largest + logf(sum);
    }
    if (!expert) {
        return;
    }
    expert += n * K;
    weight += n * K;
    float own = 0;
    Choice last = {INFINITY, -1};
    for (int j = 0; j < K; j++) {
        last = next_first(p, E, last);
        if (j % 32 == lane) {
            expert[j] = last.expert;
            weight[j] = last.rank > -FLT_MAX ? last.rank : NAN;
            own += weight[j];
        }
    }
    if (renorm) {
        renormalize<32>(weight, expert, own, K, lane, 0xffffffffu);
    }
}

void topk_forward(acc_t *probs, acc_t *lse, int *expert, acc_t *weight, const acc_t *logits, int N, int E, int K,
                  int renorm, Stream *stream) {
    bool packed = packs_fit(logits, E) && packs_fit(probs, E);
    if (E > MOST_IN_REGISTERS) {
        topk_sweep_kernel<<<ceil_div(N, THREADS / 32), THREADS, 0, cuda_stream(stream)>>>(probs, lse, expert, weight,
                                                                                          logits, N, E, K, renorm);
    } else {
        WITH_LANES(E, 16,
                   topk_kernel<LANES, PER><<<ceil_div(N, THREADS / LANES), THREADS, 0, cuda_stream(stream)>>>(
                       probs, lse, expert, weight, logits, N, E, K, renorm, packed));
    }
    CUDA_LAUNCHED();
}

void softmax_forward(acc_t *probs, acc_t *lse, const acc_t *logits, int N, int E, Stream *stream) {
    topk_forward(probs, lse, NULL, NULL, logits, N, E, 0, 0, stream);
}

/* The loop over tokens: LANES neighbouring threads each, as where they were chosen. */
template <int LANES>
__global__ static void __launch_bounds__(THREADS)
    weight_kernel(float *weight, const int *expert, const float *probs, int N, int E, int K, int renorm) {
    size_t n = ((size_t)blockIdx.x * THREADS + threadIdx.x) / LANES;
    int lane = threadIdx.x % LANES;
    unsigned lanes = __ballot_sync(0xffffffffu, n < N);
    if (n >= N) {
        return;
    }
    expert += n * K;
    weight += n * K;
    float own = 0;
    for (int j = lane; j < K; j += LANES) {
        weight[j] = expert[j] < 0 ? 0.0f : probs[n * E + expert[j]];
        own += weight[j];
    }
    if (renorm) {
        renormalize<LANES>(weight, expert, own, K, lane, lanes);
    }
}

void choice_weight(acc_t *weight, const int *expert, const acc_t *probs, int N, int E, int K, int renorm,
                   Stream *stream) {
    WITH_LANES(E, 16,
               weight_kernel<LANES><<<ceil_div(N, THREADS / LANES), THREADS, 0, cuda_stream(stream)>>>(
                   weight, expert, probs, N, E, K, renorm));
    CUDA_LAUNCHED();
}

/* The loop over tokens: LANES neighbouring threads each, many, for there is little to agree on. They write what every
 * expert gets, then over it what the chosen ones get. */
template <int LANES>
__global__ static void __launch_bounds__(THREADS)
    topk_backward_kernel(float *dlogits, const float *dweight, const float *probs, const int *expert,
                         const float *weight, int N, int E, int K, int renorm, bool packed) {
    size_t n = ((size_t)blockIdx.x * THREADS + threadIdx.x) / LANES;
    int lane = threadIdx.x % LANES;
    unsigned lanes = __ballot_sync(0xffffffffu, n < N);
    if (n >= N) {
        return;
    }
    const float *p = probs + n * E, *w = weight + n * K, *g = dweight + n * K;
    const int *chosen = expert + n * K;
    float *dl = dlogits + n * E;
    float mean = 0; /* sum_S w g */
    for (int j = lane; j < K; j += LANES) {
        mean += w[j] * g[j];
    }
    mean = group_sum<LANES>(mean, lanes);
    for (int e = 4 * lane; e < E; e += 4 * LANES) {
        float four[1][4] = {};
        if (!renorm) {
            load_experts<LANES>(four[0], p + e - 4 * lane, E - e + 4 * lane, lane, packed, 0.0f);
        }
        for (int k = 0; k < 4; k++) {
            four[0][k] *= -mean;
        }
        store_experts<LANES>(dl + e - 4 * lane, four[0], E - e + 4 * lane, lane, packed);
    }
    __syncwarp(lanes);
    for (int j = lane; j < K; j += LANES) {
        if (chosen[j] >= 0) {
            dl[chosen[j]] = (renorm ? w[j] : p[chosen[j]]) * (g[j] - mean);
        }
    }
}

void topk_backward(acc_t *dlogits, const acc_t *dweight, const acc_t *probs, const int *expert, const acc_t *weight,
                   int N, int E, int K, int renorm, Stream *stream) {
    bool packed = packs_fit(probs, E) && packs_fit(dlogits, E);
    WITH_LANES(E, 4,
               topk_backward_kernel<LANES><<<ceil_div(N, THREADS / LANES), THREADS, 0, cuda_stream(stream)>>>(
                   dlogits, dweight, probs, expert, weight, N, E, K, renorm, packed));
    CUDA_LAUNCHED();
}
