/* Attention on the GPU: flash attention on the matrix units for bf16 where rows can be moved in packs of 16 bytes and a
 * head is at most 128 wide, the plain path for the rest and for tests that ask for it (device_use_path). Forward is one
 * launch; backward is two, the second of which reads what the first keeps of each query row in the workspace. Decode is
 * one launch, a block for a query head; keep, a copy into the cache, is one.
 *
 * Called by model/attention_block.c. Read next: attention_plain.cuh, which has the three kernels in the simplest form;
 * then attention_tiles.cuh, attention_scores.cuh and attention_flash.cuh, which build the fast ones.
 */
#include "cuda.cuh"

extern "C" {
#include "attention.h"
}

#include "attention_plain.cuh"

#ifdef REAL_BF16

#include "attention_flash.cuh"

static bool flash_fits(const real_t *qk, const real_t *qkv, const real_t *out, AttentionShape shape) {
    return cuda_fastest_path() != PATH_PLAIN && shape.HS <= 128 && packs_fit(qk, shape.HS) &&
           packs_fit(qkv, shape.HS) && packs_fit(out, shape.HS);
}

/* More than 48 KB of shared memory must be asked for. */
template <class Kernel>
static void flash_shared_memory(Kernel kernel, int bytes) {
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

template <int HS>
static void forward_on_tiles(real_t *out, acc_t *lse, const real_t *qk, const real_t *qkv, AttentionShape shape,
                             cudaStream_t stream) {
    constexpr int BYTES = forward_bytes<HS>();
    int blocks = shape.B * shape.NH * ceil_div(shape.T, TILE);
    flash_shared_memory(flash_forward<HS>, BYTES);
    flash_forward<HS><<<blocks, GROUP_THREADS, BYTES, stream>>>(out, lse, qk, qkv, shape,
                                                                head_map(qk, shape.NH + shape.NKV, shape),
                                                                head_map(qkv, shape.NH + 2 * shape.NKV, shape));
    CUDA_LAUNCHED();
}

template <int HS>
static void backward_on_tiles(real_t *dqkv, const real_t *dout, const real_t *out, const acc_t *lse, const real_t *qk,
                              const real_t *qkv, AttentionShape shape, cudaStream_t stream) {
    constexpr int Q_BYTES = backward_q_bytes<HS>(), KV_BYTES = backward_kv_bytes<HS>();
    float2 *statistics = (float2 *)cuda_workspace(sizeof(float2) * shape.B * shape.NH * statistics_stride(shape));
    CUtensorMap qk_map = head_map(qk, shape.NH + shape.NKV, shape), dout_map = head_map(dout, shape.NH, shape);
    CUtensorMap qkv_map = head_map(qkv, shape.NH + 2 * shape.NKV, shape);
    int q_blocks = shape.B * shape.NH * ceil_div(shape.T, TILE);
    int kv_blocks = shape.B * shape.NKV * ceil_div(shape.T, TILE);
    flash_shared_memory(flash_backward_q<HS>, Q_BYTES);
    flash_backward_q<HS><<<q_blocks, GROUP_THREADS, Q_BYTES, stream>>>(dqkv, statistics, dout, out, lse, qk, qkv, shape,
                                                                       qk_map, qkv_map, dout_map);
    CUDA_LAUNCHED();
    flash_shared_memory(flash_backward_kv<HS>, KV_BYTES);
    flash_backward_kv<HS><<<kv_blocks, GROUP_THREADS, KV_BYTES, stream>>>(dqkv, statistics, dout, qk, qkv, shape,
                                                                          qk_map, qkv_map, dout_map);
    CUDA_LAUNCHED();
}

/* Whether the matrix units could take it; then it is queued. */
static bool flash_attention_forward(real_t *out, acc_t *lse, const real_t *qk, const real_t *qkv, AttentionShape shape,
                                    cudaStream_t stream) {
    if (!flash_fits(qk, qkv, out, shape)) {
        return false;
    }
    switch (ceil_div(shape.HS, 32)) {
        case 1: forward_on_tiles<32>(out, lse, qk, qkv, shape, stream); return true;
        case 2: forward_on_tiles<64>(out, lse, qk, qkv, shape, stream); return true;
        case 3: forward_on_tiles<96>(out, lse, qk, qkv, shape, stream); return true;
        default: forward_on_tiles<128>(out, lse, qk, qkv, shape, stream); return true;
    }
}

static bool flash_attention_backward(real_t *dqkv, const real_t *dout, const real_t *out, const acc_t *lse,
                                     const real_t *qk, const real_t *qkv, AttentionShape shape, cudaStream_t stream) {
    if (!flash_fits(qk, qkv, out, shape) || !flash_fits(dqkv, dqkv, dout, shape)) {
        return false;
    }
    switch (ceil_div(shape.HS, 32)) {
        case 1: backward_on_tiles<32>(dqkv, dout, out, lse, qk, qkv, shape, stream); return true;
        case 2: backward_on_tiles<64>(dqkv, dout, out, lse, qk, qkv, shape, stream); return true;
        case 3: backward_on_tiles<96>(dqkv, dout, out, lse, qk, qkv, shape, stream); return true;
        default: backward_on_tiles<128>(dqkv, dout, out, lse, qk, qkv, shape, stream); return true;
    }
}

#else

static bool flash_attention_forward(real_t *out, acc_t *lse, const real_t *qk, const real_t *qkv, AttentionShape shape,
                                    cudaStream_t stream) {
    return false;
}

static bool flash_attention_backward(real_t *dqkv, const real_t *dout, const real_t *out, const acc_t *lse,
                                     const real_t *qk, const real_t *qkv, AttentionShape shape, cudaStream_t stream) {
    return false;
}

#endif

void attention_forward(real_t *out, acc_t *lse, const real_t *qk, const real_t *qkv, AttentionShape shape,
                       Stream *stream) {
    if (flash_attention_forward(out, lse, qk, qkv, shape, cuda_stream(stream))) {
        return;
    }
    plain_forward<<<plain_blocks(shape, shape.NH), PLAIN_THREADS, 0, cuda_stream(stream)>>>(out, lse, qk, qkv, shape);
    CUDA_LAUNCHED();
}

void attention_backward(real_t *dqkv, const real_t *dout, const real_t *out, const acc_t *lse, const real_t *qk,
                        const real_t *qkv, AttentionShape shape, Stream *stream) {
    if (flash_attention_backward(dqkv, dout, out, lse, qk, qkv, shape, cuda_stream(stream))) {
        return;
    }
    float *d = (float *)cuda_workspace(sizeof(float) * shape.B * shape.NH * shape.T);
    plain_backward_q<<<plain_blocks(shape, shape.NH), PLAIN_THREADS, 0, cuda_stream(stream)>>>(dqkv, d, dout, out, lse,
                                                                                               qk, qkv, shape);
    CUDA_LAUNCHED();
    plain_backward_kv<<<plain_blocks(shape, shape.NKV), PLAIN_THREADS, 0, cuda_stream(stream)>>>(dqkv, d, dout, lse, qk,
                                                                                                 qkv, shape);
    CUDA_LAUNCHED();
}

enum { DECODE_WARPS = 16 };

/* q . k of one key row by one thread, in packs where they fit: 32 threads read 32 rows, each line of the cache whole */
__device__ static inline float decode_score(const float *q, const real_t *k, int HS, bool packs) {
    float sum = 0;
    if (packs) {
        for (int c = 0; c < HS; c += Pack<real_t>::COUNT) {
            Pack<real_t> pack = load_pack(k + c);
            for (int i = 0; i < Pack<real_t>::COUNT; i++) {
                sum += q[c + i] * to_float(pack.v[i]);
            }
        }
        return sum;
    }
    for (int c = 0; c < HS; c++) {
        sum += q[c] * to_float(k[c]);
    }
    return sum;
}

/* The parts of DECODE_WARPS warps, each exp-weighted by its own maximum, become one row of out. */
__device__ static inline void decode_join(real_t *out, const float *part, const float *largest, const float *sum,
                                          float scale, int HS) {
    float most = -INFINITY, total = 0;
    for (int w = 0; w < DECODE_WARPS; w++) {
        most = fmaxf(most, largest[w]);
    }
    for (int w = 0; w < DECODE_WARPS; w++) {
        total += sum[w] * expf((largest[w] - most) * scale);
    }
    for (int c = threadIdx.x; c < HS; c += DECODE_WARPS * 32) {
        float o = 0;
        for (int w = 0; w < DECODE_WARPS; w++) {
            o += part[w * HS + c] * expf((largest[w] - most) * scale);
        }
        out[c] = to_real<real_t>(o / total);
    }
}

/* blockIdx.x replaces the loops over sequence and query head. A warp takes 32 keys of every 32 * DECODE_WARPS, a thread
 * one key for the score and the columns lane, lane + 32, .. for the sum. The first head of a group writes the token's
 * key and value into the cache; every head reads them from qk and qkv, not from there. Shared memory: q (HS), part
 * (warps,HS).
 */
__global__ static void __launch_bounds__(DECODE_WARPS * 32)
    decode_kernel(real_t *out, real_t *keys, real_t *values, const real_t *qk, const real_t *qkv, int position,
                  AttentionShape shape, bool packs) {
    extern __shared__ float decode_shared[];
    __shared__ float probability[DECODE_WARPS][32], warp_largest[DECODE_WARPS], warp_total[DECODE_WARPS];
    int NH = shape.NH, NKV = shape.NKV, HS = shape.HS, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int b = blockIdx.x / NH, head = blockIdx.x % NH, kv_head = head / (NH / NKV);
    size_t kv_width = (size_t)NKV * HS, start = (size_t)b * shape.T * kv_width + kv_head * HS;
    const real_t *row = qk + (size_t)b * (NH + NKV) * HS, *new_key = row + (NH + kv_head) * HS;
    const real_t *new_value = qkv + ((size_t)b * (NH + 2 * NKV) + NH + NKV + kv_head) * HS;
    float *q = decode_shared, *part = q + HS + warp * HS, scale = 1 / sqrtf((float)HS);
    for (int c = threadIdx.x; c < HS; c += DECODE_WARPS * 32) {
        q[c] = to_float(row[head * HS + c]);
        if (head % (NH / NKV) == 0) {
            keys[start + position * kv_width + c] = new_key[c];
            values[start + position * kv_width + c] = new_value[c];
        }
    }
    for (int c = lane; c < HS; c += 32) {
        part[c] = 0;
    }
    __syncthreads();
    float largest = -INFINITY, total = 0;
    for (int first = warp * 32; first <= position; first += DECODE_WARPS * 32) {
        int key = first + lane, count = position + 1 - first < 32 ? position + 1 - first : 32;
        const real_t *k = key == position ? new_key : keys + start + key * kv_width;
        float s = key <= position ? decode_score(q, k, HS, packs) : -INFINITY;
        float most = fmaxf(largest, warp_max(s)), shrink = expf((largest - most) * scale);
        float p = expf((s - most) * scale);
        largest = most;
        total = total * shrink + warp_sum(p);
        __syncwarp();
        probability[warp][lane] = p;
        __syncwarp();
        for (int c = lane; c < HS; c += 32) {
            float o = part[c] * shrink;
#pragma unroll 8
            for (int j = 0; j < count; j++) {
                const real_t *v = first + j == position ? new_value : values + start + (first + j) * kv_width;
                o += probability[warp][j] * to_float(v[c]);
            }
            part[c] = o;
        }
    }
    if (lane == 0) {
        warp_largest[warp] = largest;
        warp_total[warp] = total;
    }
    __syncthreads();
    decode_join(out + ((size_t)b * NH + head) * HS, q + HS, warp_largest, warp_total, scale, HS);
}

void attention_decode(real_t *out, real_t *keys, real_t *values, const real_t *qk, const real_t *qkv, int position,
                      AttentionShape shape, Stream *stream) {
    size_t bytes = sizeof(float) * (1 + DECODE_WARPS) * shape.HS;
    CHECK(bytes <= 160 * 1024, "a head of %d: generation on the GPU takes at most 2400", shape.HS);
    CUDA_CHECK(cudaFuncSetAttribute(decode_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    bool packs = packs_fit(qk, shape.HS) && packs_fit(keys, shape.HS);
    decode_kernel<<<shape.B * shape.NH, DECODE_WARPS * 32, bytes, cuda_stream(stream)>>>(out, keys, values, qk, qkv,
                                                                                         position, shape, packs);
    CUDA_LAUNCHED();
}

enum { KEEP_THREADS = 128 };

/* blockIdx.x replaces the loop over rows, threads go over a row's numbers. */
__global__ static void __launch_bounds__(KEEP_THREADS)
    keep_kernel(real_t *keys, real_t *values, const real_t *qk, const real_t *qkv, int length, AttentionShape shape) {
    int row = blockIdx.x, kv_width = shape.NKV * shape.HS, q_width = shape.NH * shape.HS;
    size_t place = ((size_t)(row / shape.T) * length + row % shape.T) * kv_width;
    const real_t *k = qk + (size_t)row * (q_width + kv_width) + q_width;
    const real_t *v = qkv + (size_t)row * (q_width + 2 * kv_width) + q_width + kv_width;
    for (int c = threadIdx.x; c < kv_width; c += KEEP_THREADS) {
        keys[place + c] = k[c];
        values[place + c] = v[c];
    }
}

void attention_keep(real_t *keys, real_t *values, const real_t *qk, const real_t *qkv, int length, AttentionShape shape,
                    Stream *stream) {
    keep_kernel<<<shape.B * shape.T, KEEP_THREADS, 0, cuda_stream(stream)>>>(keys, values, qk, qkv, length, shape);
    CUDA_LAUNCHED();
}
