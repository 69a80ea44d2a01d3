/* Soft mixtures on a GPU. As on the CPU three products serve the four mixtures (soft_product.cuh has their loops):
 *
 *     slots_from_tokens    dispatch forward,   drows of combine
 *     tokens_from_slots    combine forward,    dx of dispatch
 *     mixture_gradient     dmix of dispatch,   dweight of combine
 *
 * and the router's own three, logits, dx and dphi, are of the same three forms. With bf16 the products round mixtures
 * and dlogits to bf16; phi, which decides every mixture, is the sum of two bf16 numbers there, which keeps 16 bits of
 * it. The softmax over slots has a warp for each token; the one over tokens runs down columns, COLUMNS of them
 * side by side in a block so that it reads along rows. Called by the soft routers of model/ and by model/moe.c.
 */
#include "soft_product.cuh"

#include "last_block.cuh"

extern "C" {
#include "soft_mix.h"
}

enum {
    THREADS = 256,
    WARPS = THREADS / 32,
    COLUMNS = 32,       /* slots whose softmax over tokens runs together, */
    TOKEN_LANES = 16,   /* by so many threads each */
    MOST_BLOCKS = 1024, /* of tokens, for the gradient of the scale */
    FEW_TOKENS = 256,   /* least of a part of dphi's sum */
    PART_TILES = 512,   /* about so many tiles keep the device busy, all parts' together */
};

static int groups_of(const Plan *plan) {
    return plan->N / plan->group_tokens;
}

static RowMap dense_rows(size_t group) {
    return {INT_MAX, group, 0, 1};
}

static RowMap token_rows(const Plan *plan) {
    const size_t groups = groups_of(plan), tokens = plan->group_tokens;
    return plan->across ? RowMap{INT_MAX, 1, 0, groups} : dense_rows(tokens);
}

/* The row of group g's slot e*S + s is (e*G + g)*S + s. */
static RowMap slot_rows(const Plan *plan) {
    const size_t slots = plan->slots;
    return {plan->slots, slots, groups_of(plan) * slots, 1};
}

/* Room for `count` numbers of T behind what *bytes says is taken; the offset is returned. */
template <class T>
static size_t reserve(size_t *bytes, size_t count) {
    const size_t offset = *bytes;
    *bytes += (count * sizeof(T) + 255) / 256 * 256;
    return offset;
}

/* phi as the products read it: itself, or what was copied for them. */
static const real_t *phi_operand(const acc_t *phi, const real_t *copy) {
    return copy ? copy : reinterpret_cast<const real_t *>(phi);
}

enum {
    PHI_COPIES = sizeof(real_t) < sizeof(acc_t) ? 2 : 0, /* bf16: the rounded one and what rounding took */
    PHI_PLANES = PHI_COPIES ? PHI_COPIES : 1,
};

/* Number i of phi (plane numbers) into its copies. */
__device__ static void copy_phi(real_t *copy, const float *phi, size_t i, size_t plane) {
    const real_t rounded_phi = to_real<real_t>(phi[i]);
    copy[i] = rounded_phi;
    copy[plane + i] = to_real<real_t>(phi[i] - to_float(rounded_phi));
}

/* ---- the router ---- */

/* 1 / |v| of a row, by a warp */
template <class T>
__device__ static float inverse_length(const T *v, int C) {
    float sum = 0;
    for (int c = threadIdx.x % 32; c < C; c += 32) {
        sum += to_float(v[c]) * to_float(v[c]);
    }
    return (float)(1 / sqrt((double)warp_sum(sum) + 1e-12));
}

/* Grid and warps replace the loops over the rows of x and of phi, lanes that over features. copy (PHI_COPIES,K,C) or
 * NULL. */
__global__ static void __launch_bounds__(THREADS)
    lengths_kernel(float *x_inverse, float *phi_inverse, real_t *copy, const real_t *x, const float *phi, int N, int K,
                   int C) {
    const int lane = threadIdx.x % 32;
    const int64_t n = ((int64_t)blockIdx.x * THREADS + threadIdx.x) / 32, j = n - N;
    if (n < N) {
        const float inverse = inverse_length(x + n * C, C);
        if (lane == 0) {
            x_inverse[n] = inverse;
        }
    } else if (j < K) {
        const float inverse = inverse_length(phi + j * C, C);
        if (lane == 0) {
            phi_inverse[j] = inverse;
        }
        for (int c = lane; copy && c < C; c += 32) {
            copy_phi(copy, phi, j * C + c, (size_t)K * C);
        }
    }
}

/* weight (N,K) = softmax over the slots. Grid and warps replace the loop over tokens, lanes those over slots. */
__global__ static void __launch_bounds__(THREADS)
    slot_softmax_kernel(float *weight, const float *logits, int N, int K) {
    const int lane = threadIdx.x % 32;
    const size_t n = ((size_t)blockIdx.x * THREADS + threadIdx.x) / 32;
    if (n >= N) {
        return;
    }
    const float *l = logits + n * K;
    float *w = weight + n * K;
    float largest = -INFINITY, sum = 0;
    for (int j = lane; j < K; j += 32) {
        largest = fmaxf(largest, l[j]);
    }
    largest = warp_max(largest);
    for (int j = lane; j < K; j += 32) {
        sum += w[j] = expf(l[j] - largest);
    }
    const float inverse = 1 / warp_sum(sum);
    for (int j = lane; j < K; j += 32) {
        w[j] *= inverse;
    }
}

/* A block of (COLUMNS, TOKEN_LANES) threads has COLUMNS slots of one group; a thread has every TOKEN_LANES-th token of
 * its slot. */
typedef struct {
    size_t first, step; /* of the thread's elements in (N,K) */
    int count;          /* of them; 0 past the last slot */
} ColumnPart;

__device__ static ColumnPart column_part(RowMap tokens, int group_tokens, int K) {
    const int across = (K + COLUMNS - 1) / COLUMNS, group = blockIdx.x / across;
    const int slot = blockIdx.x % across * COLUMNS + threadIdx.x, y = threadIdx.y;
    const int count = slot < K && y < group_tokens ? (group_tokens - y + TOKEN_LANES - 1) / TOKEN_LANES : 0;
    return {row_at(tokens, group, y) * K + slot, tokens.step * TOKEN_LANES * K, count};
}

static int column_blocks(const Plan *plan) {
    return groups_of(plan) * ceil_div(plan->K, COLUMNS);
}

/* The sum of a slot's TOKEN_LANES threads, in order; or their largest. All threads of the block call it. */
__device__ static double column_sum(double x) {
    __shared__ double part[TOKEN_LANES][COLUMNS];
    part[threadIdx.y][threadIdx.x] = x;
    __syncthreads();
    x = 0;
    for (int y = 0; y < TOKEN_LANES; y++) {
        x += part[y][threadIdx.x];
    }
    return x;
}

__device__ static float column_max(float x) {
    __shared__ float part[TOKEN_LANES][COLUMNS];
    part[threadIdx.y][threadIdx.x] = x;
    __syncthreads();
    for (int y = 0; y < TOKEN_LANES; y++) {
        x = fmaxf(x, part[y][threadIdx.x]);
    }
    return x;
}

/* mix (N,K) = softmax over the tokens of a group. The grid replaces the loops over groups and blocks of slots. */
__global__ static void __launch_bounds__(COLUMNS *TOKEN_LANES)
    token_softmax_kernel(float *mix, const float *logits, RowMap tokens, int group_tokens, int K) {
    const ColumnPart own = column_part(tokens, group_tokens, K);
    float largest = -INFINITY;
    double sum = 0;
#pragma unroll 4
    for (int i = 0; i < own.count; i++) {
        largest = fmaxf(largest, logits[own.first + i * own.step]);
    }
    largest = column_max(largest);
#pragma unroll 4
    for (int i = 0; i < own.count; i++) {
        sum += expf(logits[own.first + i * own.step] - largest);
    }
    const float inverse = (float)(1 / column_sum(sum));
#pragma unroll 4
    for (int i = 0; i < own.count; i++) {
        mix[own.first + i * own.step] = expf(logits[own.first + i * own.step] - largest) * inverse;
    }
}

void soft_route_forward(acc_t *logits, Plan *plan, acc_t *x_inverse, acc_t *phi_inverse, const real_t *x,
                        const acc_t *phi, const acc_t *scale, int C, Stream *stream) {
    const int N = plan->N, K = plan->K;
    const size_t plane = (size_t)K * C;
    cudaStream_t queue = cuda_stream(stream);
    real_t *copy = PHI_COPIES ? (real_t *)cuda_workspace(PHI_COPIES * plane * sizeof *copy) : NULL;
    lengths_kernel<<<ceil_div((int64_t)N + K, WARPS), THREADS, 0, queue>>>(x_inverse, phi_inverse, copy, x, phi, N, K,
                                                                           C);
    CUDA_LAUNCHED();
    const Result<acc_t> out = {.p = logits,
                               .width = K,
                               .rows = dense_rows(0),
                               .scale = scale,
                               .row_factor = x_inverse,
                               .col_factor = phi_inverse};
    const ProductShape shape = {.M = N, .N = K, .depth = C, .groups = 1, .planes = PHI_PLANES, .plane = plane};
    product_run<false, true>(out, Operand<real_t>{x, C, dense_rows(0)},
                             Operand<real_t>{phi_operand(phi, copy), C, dense_rows(0)}, shape, queue);
    slot_softmax_kernel<<<ceil_div(N, WARPS), THREADS, 0, queue>>>(plan->weight, logits, N, K);
    CUDA_LAUNCHED();
    token_softmax_kernel<<<column_blocks(plan), dim3(COLUMNS, TOKEN_LANES), 0, queue>>>(
        plan->mix, logits, token_rows(plan), plan->group_tokens, K);
    CUDA_LAUNCHED();
}

/* The grid replaces the loops over tokens and slots. */
__global__ static void __launch_bounds__(THREADS) fix_kernel(float *matrix, bool identity, float share, size_t count,
                                                             int K, int group_tokens, int groups, bool across) {
    const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < count) {
        const size_t n = i / K, place = across ? n / groups : n % group_tokens;
        matrix[i] = identity ? i % K == place : share;
    }
}

static void fix(float *matrix, const Plan *plan, Mixture mixture, int shares, Stream *stream) {
    const size_t count = (size_t)plan->N * plan->K;
    fix_kernel<<<ceil_div(count, THREADS), THREADS, 0, cuda_stream(stream)>>>(
        matrix, mixture == MIXTURE_IDENTITY, 1.0f / shares, count, plan->K, plan->group_tokens, groups_of(plan),
        plan->across);
    CUDA_LAUNCHED();
}

void soft_fix_mix(Plan *plan, Mixture mixture, Stream *stream) {
    if (mixture != MIXTURE_LEARNED) {
        fix(plan->mix, plan, mixture, plan->group_tokens, stream);
    }
}

void soft_fix_weight(Plan *plan, Mixture mixture, Stream *stream) {
    if (mixture != MIXTURE_LEARNED) {
        fix(plan->weight, plan, mixture, plan->K, stream);
    }
}

/* dlogits = that of the softmax over slots. Grid and warps replace the loop over tokens, lanes those over slots. */
__global__ static void __launch_bounds__(THREADS)
    slot_softmax_backward_kernel(float *dlogits, const float *dweight, const float *weight, int N, int K) {
    const int lane = threadIdx.x % 32;
    const size_t n = ((size_t)blockIdx.x * THREADS + threadIdx.x) / 32;
    if (n >= N) {
        return;
    }
    const float *w = weight + n * K, *dw = dweight + n * K;
    float mean = 0;
    for (int j = lane; j < K; j += 32) {
        mean += w[j] * dw[j];
    }
    mean = warp_sum(mean);
    for (int j = lane; j < K; j += 32) {
        dlogits[n * K + j] = w[j] * (dw[j] - mean);
    }
}

/* dlogits += that of the softmax over tokens. The grid as in token_softmax_kernel. */
__global__ static void __launch_bounds__(COLUMNS *TOKEN_LANES)
    token_softmax_backward_kernel(float *dlogits, const float *dmix, const float *mix, RowMap tokens, int group_tokens,
                                  int K) {
    const ColumnPart own = column_part(tokens, group_tokens, K);
    double sum = 0;
#pragma unroll 4
    for (int i = 0; i < own.count; i++) {
        const size_t at = own.first + i * own.step;
        sum += (double)mix[at] * dmix[at];
    }
    const float mean = (float)column_sum(sum);
#pragma unroll 4
    for (int i = 0; i < own.count; i++) {
        const size_t at = own.first + i * own.step;
        dlogits[at] += mix[at] * (dmix[at] - mean);
    }
}

void soft_logits_backward(acc_t *dlogits, const acc_t *dweight, const acc_t *dmix, const Plan *plan, Stream *stream) {
    const int N = plan->N, K = plan->K;
    if (dweight) {
        slot_softmax_backward_kernel<<<ceil_div(N, WARPS), THREADS, 0, cuda_stream(stream)>>>(dlogits, dweight,
                                                                                              plan->weight, N, K);
        CUDA_LAUNCHED();
    } else {
        CUDA_CHECK(cudaMemsetAsync(dlogits, 0, (size_t)N * K * sizeof *dlogits, cuda_stream(stream)));
    }
    if (dmix) {
        token_softmax_backward_kernel<<<column_blocks(plan), dim3(COLUMNS, TOKEN_LANES), 0, cuda_stream(stream)>>>(
            dlogits, dmix, plan->mix, token_rows(plan), plan->group_tokens, K);
        CUDA_LAUNCHED();
    }
}

/* ---- the router's way back ----
 *
 * Both directions' gradients are products with the same matrix, a_nj = scale dl_nj / (|x_n| |phi_j|):
 *
 *     v = a phi      dx_n   += v_n - x_n <x_n, v_n> / |x_n|^2              <x_n, v_n> = sum_j dl_nj l_nj
 *     u = a^T x      dphi_j += u_j - phi_j <phi_j, u_j> / |phi_j|^2
 */

static __device__ unsigned scale_ticket;

/* What the router's gradient is made of. */
typedef struct {
    const float *dlogits, *logits, *x_inverse, *phi_inverse; /* (N,K), (N,K), (N), (K) */
    const real_t *x;                                         /* (N,C) */
    const float *phi, *scale;                                /* (K,C), (1) */
    int N, K, C;
} RouteInput;

/* What its products read, and their parts of dphi. */
typedef struct {
    real_t *a;       /* (N,K) */
    real_t *phi;     /* (PHI_COPIES,K,C), or NULL */
    float *along;    /* (N) what of x_n is taken off its gradient */
    float *parts;    /* (part,K,C) */
    double *partial; /* (MOST_BLOCKS) */
} RouteScratch;

static RouteScratch route_scratch(int N, int K, int C, int parts) {
    size_t bytes = 0, phi = (size_t)K * C;
    const size_t a = reserve<real_t>(&bytes, (size_t)N * K), copy = reserve<real_t>(&bytes, PHI_COPIES * phi),
                 along = reserve<float>(&bytes, N), part = reserve<float>(&bytes, parts * phi),
                 partial = reserve<double>(&bytes, MOST_BLOCKS);
    char *base = (char *)cuda_workspace(bytes);
    return {(real_t *)(base + a), PHI_COPIES ? (real_t *)(base + copy) : NULL, (float *)(base + along),
            (float *)(base + part), (double *)(base + partial)};
}

/* sum_j dl_nj <xhat_n, phihat_j> of a token by a warp, where a scale of 0 has wiped the cosines out of the logits */
__device__ static double cosine_sum(RouteInput in, size_t n) {
    double sum = 0;
    for (int j = 0; j < in.K; j++) {
        float cosine = 0;
        for (int c = threadIdx.x % 32; c < in.C; c += 32) {
            cosine += to_float(in.x[n * in.C + c]) * in.phi[(size_t)j * in.C + c];
        }
        sum += (double)in.dlogits[n * in.K + j] * in.x_inverse[n] * in.phi_inverse[j] * warp_sum(cosine);
    }
    return sum;
}

/* Makes the scratch but for the parts, and dscale. Grid and warps replace the loop over tokens, lanes those over slots;
 * phi is rounded by all threads in turn. */
__global__ static void __launch_bounds__(THREADS) route_matrix_kernel(RouteScratch out, float *dscale, RouteInput in) {
    const int lane = threadIdx.x % 32, K = in.K;
    const size_t thread = (size_t)blockIdx.x * THREADS + threadIdx.x, threads = (size_t)gridDim.x * THREADS;
    const float scale = *in.scale;
    double total = 0;
    for (size_t n = thread / 32; n < in.N; n += threads / 32) {
        const float inverse = in.x_inverse[n];
        double along = 0;
        for (int j = lane; j < K; j += 32) {
            const float dl = in.dlogits[n * K + j];
            along += (double)dl * in.logits[n * K + j];
            out.a[n * K + j] = to_real<real_t>(scale * inverse * in.phi_inverse[j] * dl);
        }
        along = warp_sum(along);
        total += scale != 0 ? along / scale : cosine_sum(in, n);
        if (lane == 0) {
            out.along[n] = (float)along * inverse * inverse;
        }
    }
    const size_t plane = (size_t)K * in.C;
    for (size_t i = thread; out.phi && i < plane; i += threads) {
        copy_phi(out.phi, in.phi, i, plane);
    }
    total = lane == 0 ? total : 0;
    if (grid_sum(&total, out.partial, total, &scale_ticket) && threadIdx.x == 0) {
        *dscale += (float)total;
    }
}

/* dphi from the parts of u, which are added in order. The grid replaces the loop over slots, threads that over
 * features. */
__global__ static void __launch_bounds__(THREADS)
    route_phi_kernel(float *dphi, float *parts, int count, const float *phi, const float *phi_inverse, int K, int C) {
    const size_t row = (size_t)blockIdx.x * C;
    float along = 0;
    for (int c = threadIdx.x; c < C; c += THREADS) {
        float u = 0;
        for (int part = 0; part < count; part++) {
            u += parts[(size_t)part * K * C + row + c];
        }
        parts[row + c] = u; /* read again by this thread alone */
        along += phi[row + c] * u;
    }
    along = block_sum(along) * phi_inverse[blockIdx.x] * phi_inverse[blockIdx.x];
    for (int c = threadIdx.x; c < C; c += THREADS) {
        dphi[row + c] += parts[row + c] - phi[row + c] * along;
    }
}

void soft_route_backward(real_t *dx, acc_t *dphi, acc_t *dscale, const acc_t *dlogits, const acc_t *logits,
                         const acc_t *x_inverse, const acc_t *phi_inverse, const real_t *x, const acc_t *phi,
                         const acc_t *scale, const Plan *plan, int C, Stream *stream) {
    const int N = plan->N, K = plan->K, tiles = tile_count(ProductShape{K, C, N, 1}, MMA_TILE, MMA_TILE);
    const int chunk = max((int)FEW_TOKENS, ceil_div(N, ceil_div(PART_TILES, tiles))), parts = ceil_div(N, chunk);
    const RouteInput in = {dlogits, logits, x_inverse, phi_inverse, x, phi, scale, N, K, C};
    const RouteScratch scratch = route_scratch(N, K, C, parts);
    cudaStream_t queue = cuda_stream(stream);
    route_matrix_kernel<<<min((int)MOST_BLOCKS, ceil_div(N, WARPS)), THREADS, 0, queue>>>(scratch, dscale, in);
    CUDA_LAUNCHED();
    const Result<real_t> x_out = {
        .p = dx, .width = C, .rows = dense_rows(0), .accumulate = 1, .self = x, .self_factor = scratch.along};
    product_run<false, false>(
        x_out, Operand<real_t>{scratch.a, K, dense_rows(0)},
        Operand<real_t>{phi_operand(phi, scratch.phi), C, dense_rows(0)},
        ProductShape{.M = N, .N = C, .depth = K, .groups = 1, .planes = PHI_PLANES, .plane = (size_t)K * C}, queue);
    const Result<acc_t> phi_out = {.p = scratch.parts, .width = C, .rows = dense_rows(K)};
    product_run<true, false>(phi_out, Operand<real_t>{scratch.a, K, dense_rows(chunk)},
                             Operand<real_t>{x, C, dense_rows(chunk)},
                             ProductShape{.M = K, .N = C, .depth = chunk, .groups = parts, .total = N}, queue);
    route_phi_kernel<<<K, THREADS, 0, queue>>>(dphi, scratch.parts, parts, phi, phi_inverse, K, C);
    CUDA_LAUNCHED();
}

/* ---- the mixtures ---- */

/* rows (K,C) of each group = mixture (m,K)^T x (m,C) for its m tokens */
static void slots_from_tokens(real_t *rows, const acc_t *mixture, const real_t *x, const Plan *plan, int C,
                              Stream *stream) {
    const int m = plan->group_tokens, K = plan->K;
    product_run<true, false>(Result<real_t>{.p = rows, .width = C, .rows = slot_rows(plan)},
                             Operand<acc_t>{mixture, K, token_rows(plan)}, Operand<real_t>{x, C, token_rows(plan)},
                             ProductShape{.M = K, .N = C, .depth = m, .groups = groups_of(plan)}, cuda_stream(stream));
}

/* x (m,C) of each group = or += mixture (m,K) rows (K,C) */
static void tokens_from_slots(real_t *x, const acc_t *mixture, const real_t *rows, const Plan *plan, int C,
                              int accumulate, Stream *stream) {
    const int m = plan->group_tokens, K = plan->K;
    product_run<false, false>(Result<real_t>{.p = x, .width = C, .rows = token_rows(plan), .accumulate = accumulate},
                              Operand<acc_t>{mixture, K, token_rows(plan)}, Operand<real_t>{rows, C, slot_rows(plan)},
                              ProductShape{.M = m, .N = C, .depth = K, .groups = groups_of(plan)}, cuda_stream(stream));
}

/* dmixture (m,K) of each group = x (m,C) rows (K,C)^T */
static void mixture_gradient(acc_t *dmixture, const real_t *x, const real_t *rows, const Plan *plan, int C,
                             Stream *stream) {
    const int m = plan->group_tokens, K = plan->K;
    product_run<false, true>(Result<acc_t>{.p = dmixture, .width = K, .rows = token_rows(plan)},
                             Operand<real_t>{x, C, token_rows(plan)}, Operand<real_t>{rows, C, slot_rows(plan)},
                             ProductShape{.M = m, .N = K, .depth = C, .groups = groups_of(plan)}, cuda_stream(stream));
}

void soft_dispatch_forward(real_t *rows, const real_t *x, const Plan *plan, int C, Stream *stream) {
    slots_from_tokens(rows, plan->mix, x, plan, C, stream);
}

void soft_dispatch_backward(real_t *dx, acc_t *dmix, const real_t *drows, const real_t *x, const Plan *plan, int C,
                            int accumulate, Stream *stream) {
    tokens_from_slots(dx, plan->mix, drows, plan, C, accumulate, stream);
    mixture_gradient(dmix, x, drows, plan, C, stream);
}

void soft_combine_forward(real_t *y, const real_t *rows, const Plan *plan, int C, int accumulate, Stream *stream) {
    tokens_from_slots(y, plan->weight, rows, plan, C, accumulate, stream);
}

void soft_combine_backward(real_t *drows, acc_t *dweight, const real_t *dy, const real_t *rows, const Plan *plan, int C,
                           Stream *stream) {
    slots_from_tokens(drows, plan->weight, dy, plan, C, stream);
    mixture_gradient(dweight, dy, rows, plan, C, stream);
}

/* Grid and threads replace the loops over tokens and experts. */
__global__ static void __launch_bounds__(THREADS)
    expert_share_kernel(float *probs, const float *weight, size_t count, int S) {
    const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < count) {
        float sum = 0;
        for (int s = 0; s < S; s++) {
            sum += weight[i * S + s];
        }
        probs[i] = sum;
    }
}

void soft_expert_share(acc_t *probs, const Plan *plan, Stream *stream) {
    const size_t count = (size_t)plan->N * plan->E;
    expert_share_kernel<<<ceil_div(count, THREADS), THREADS, 0, cuda_stream(stream)>>>(probs, plan->weight, count,
                                                                                       plan->slots);
    CUDA_LAUNCHED();
}
