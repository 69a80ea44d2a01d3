/* Flash attention in bf16 on the matrix units: the scores live in registers, one tile of 64 x 64 at a time, and only
 * the statistics of a row are kept (Dao 2023, arXiv 2307.08691).
 *
 *     flash_forward       owns query rows, runs over the tiles of keys and values:    out, lse
 *     flash_backward_q    owns query rows, runs over the tiles of keys and values:    dq, and D for the next
 *     flash_backward_kv   owns keys and values, runs over the tiles of queries:       dk, dv
 *
 * Backward makes P twice, so that each gradient has one owner that sums it in ascending order: the same bits each run.
 * What a block runs over comes through stages of shared memory: some are copied while one is multiplied. Tiles above
 * the diagonal are skipped, and only tiles that the diagonal or the end of the sequence crosses are masked. HS is the
 * head size rounded up to 32, 64, 96 or 128; columns from shape.HS on are zeros. Called by attention.cu.
 */
#ifndef KERNELS_ATTENTION_FLASH_CUH
#define KERNELS_ATTENTION_FLASH_CUH

#include "attention_scores.cuh"

/* A block is one warp group: blocks that share a multiprocessor drift apart, so that the products of one run beside the
 * exponentials of another. How many share it follows from the registers that their sums take. */
enum {
    STAGES = 2,
    STATISTICS_BYTES = TILE * sizeof(float2),
    BARRIER_BYTES = 64,
};

template <int HS>
struct FlashBlocks {
    enum {
        FORWARD = HS <= 64 ? 4 : 2,
        QUERY = HS <= 64 ? 4 : 2,
        KEY = HS <= 64 ? 3 : 2,
    };
};

/* Bytes of shared memory: the rows a block owns, then the stages of what it runs over, then barriers */
template <int HS>
static constexpr int forward_bytes(void) {
    return (1 + STAGES * 2) * tile_bytes(HS) + BARRIER_BYTES;
}
template <int HS>
static constexpr int backward_q_bytes(void) {
    return (2 + STAGES * 2) * tile_bytes(HS) + BARRIER_BYTES;
}
template <int HS>
static constexpr int backward_kv_bytes(void) {
    return (2 + STAGES * 2) * tile_bytes(HS) + STAGES * STATISTICS_BYTES + BARRIER_BYTES;
}

/* Statistics lie in rows of whole tiles, so that a tile of them can be copied at once. */
__host__ __device__ static inline int statistics_stride(AttentionShape shape) {
    return (shape.T + TILE - 1) / TILE * TILE;
}

/* A block owns a tile: 64 rows of one head. Blocks of one head stand side by side, so that they share its keys and
 * values in the L2 cache; where attention is causal the longest come first. */
typedef struct {
    int b, head, first;
} Owner;

__device__ static inline Owner flash_owner(AttentionShape shape, int heads, bool last_first) {
    int tiles = (shape.T + TILE - 1) / TILE, head = blockIdx.x / tiles, tile = blockIdx.x % tiles;
    Owner owner = {head / heads, head % heads, (last_first ? tiles - 1 - tile : tile) * TILE};
    return owner;
}

/* Queues tile i into the stage that it takes in turn, and waits for it. */
template <int HS>
__device__ static inline void load_stage(uint32_t stages, HeadRows rows, int i, uint32_t barriers) {
    int stage = i % STAGES;
    expect_bytes(barriers + 8 * stage, tile_bytes(HS));
    load_tile<HS>(stages + stage * tile_bytes(HS), rows, i * TILE, barriers + 8 * stage);
}

__device__ static inline void await_stage(uint32_t barriers, int i) {
    await_tiles(barriers + 8 * (i % STAGES), i / STAGES);
}

/* factor = what the thread's two rows of o are still to be multiplied with, and their lse (B,NH,T), from the largest
 * score and the thread's share of the sum. */
__device__ static inline void finish_softmax(float (&factor)[2], float *lse, const float (&largest)[2], float (&sum)[2],
                                             float scale, Owner own, AttentionShape shape) {
    for (int r = 0; r < 2; r++) {
        sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
        sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
        factor[r] = 1 / sum[r];
        int row = own.first + thread_row(r);
        if (threadIdx.x % 4 == 0 && row < shape.T) {
            lse[((size_t)own.b * shape.NH + own.head) * shape.T + row] = largest[r] * scale / LOG2_E + logf(sum[r]);
        }
    }
}

/* blockIdx.x replaces the loops over sequence, head and tiles of query rows; threads share the rows of a tile as
 * attention_tiles.cuh says. The products of two tiles overlap: while V of tile i is multiplied, the softmax of tile
 * i + 1 runs. */
template <int HS>
__global__ void __launch_bounds__(GROUP_THREADS, FlashBlocks<HS>::FORWARD)
    flash_forward(__nv_bfloat16 *out, float *lse, const __nv_bfloat16 *qk, const __nv_bfloat16 *qkv,
                  AttentionShape shape, const __grid_constant__ CUtensorMap qk_map,
                  const __grid_constant__ CUtensorMap qkv_map) {
    extern __shared__ __align__(1024) unsigned char shared[];
    constexpr int BYTES = tile_bytes(HS);
    int T = shape.T, NH = shape.NH, NKV = shape.NKV;
    Owner own = flash_owner(shape, NH, true);
    HeadRows q = head_rows(&qk_map, qk, NH + NKV, own.head, own.b, shape);
    HeadRows k = head_rows(&qk_map, qk, NH + NKV, NH + own.head / (NH / NKV), own.b, shape);
    HeadRows v = head_rows(&qkv_map, qkv, NH + 2 * NKV, NH + NKV + own.head / (NH / NKV), own.b, shape);
    uint32_t query_tile = shared_address(shared), key_tiles = query_tile + BYTES;
    uint32_t value_tiles = key_tiles + STAGES * BYTES, query_there = value_tiles + STAGES * BYTES;
    uint32_t keys_there = query_there + 8, values_there = keys_there + STAGES * 8;
    float scale = rsqrtf((float)shape.HS) * LOG2_E;
    float o[HS / 8][4] = {}, s[TILE / 8][4], largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, shrink[2];
    uint32_t p[TILE / 16][4];
    int tiles = tiles_seen(shape, own.first + TILE - 1);
    barriers_init(query_there, 1 + 2 * STAGES);
    expect_bytes(query_there, BYTES);
    load_tile<HS>(query_tile, q, own.first, query_there);
    for (int i = 0; i < STAGES && i < tiles; i++) {
        load_stage<HS>(key_tiles, k, i, keys_there);
        if (i < STAGES - 1) {
            load_stage<HS>(value_tiles, v, i, values_there);
        }
    }
    await_tiles(query_there, 0);
    await_tiles(keys_there, 0);
    __syncthreads();
    products_begin();
    multiply_nt<HS>(s, query_tile, key_tiles);
    products_end();
    products_wait<0>();
    settle(s);
    hide_keys(s, shape, own.first, 0);
    softmax_tile(s, largest, sum, shrink, scale);
    pack_left(p, s);
    for (int i = 0; i + 1 < tiles; i++) {
        await_stage(keys_there, i + 1);
        await_stage(values_there, i);
        __syncthreads();
        if (i + STAGES - 1 < tiles) {
            load_stage<HS>(value_tiles, v, i + STAGES - 1, values_there);
        }
        if (i + STAGES < tiles) {
            load_stage<HS>(key_tiles, k, i + STAGES, keys_there);
        }
        products_begin();
        multiply_nt<HS>(s, query_tile, key_tiles + (i + 1) % STAGES * BYTES);
        products_end();
        multiply_nn<HS>(o, p, value_tiles + i % STAGES * BYTES);
        products_end();
        products_wait<1>();
        settle(s);
        hide_keys(s, shape, own.first, i + 1);
        softmax_tile(s, largest, sum, shrink, scale);
        settle(s);
        products_wait<0>();
        settle(o);
        scale_rows(o, shrink);
        pack_left(p, s);
    }
    await_stage(values_there, tiles - 1);
    __syncthreads();
    products_begin();
    multiply_nn<HS>(o, p, value_tiles + (tiles - 1) % STAGES * BYTES);
    products_end();
    products_wait<0>();
    settle(o);
    float factor[2];
    finish_softmax(factor, lse, largest, sum, scale, own, shape);
    __syncthreads();
    size_t out_width = (size_t)NH * shape.HS;
    store_rows<HS>(out + ((size_t)own.b * T + own.first) * out_width + own.head * shape.HS, out_width, o, factor,
                   query_tile, T - own.first, shape.HS);
}

/* The statistics of the thread's two rows, 0 beyond the end: D = dout . out, summed by the four threads of a row. */
__device__ static inline void row_statistics(float2 (&row)[2], const __nv_bfloat16 *dout, const __nv_bfloat16 *out,
                                             const float *lse, int rows, AttentionShape shape) {
    size_t width = (size_t)shape.NH * shape.HS;
    for (int r = 0; r < 2; r++) {
        int t = thread_row(r);
        float d = 0;
        for (int c = threadIdx.x % 4 * 8; t < rows && c < shape.HS; c += 32) {
            Pack<__nv_bfloat16> x = load_pack(dout + t * width + c), y = load_pack(out + t * width + c);
            for (int i = 0; i < 8; i++) {
                d += to_float(x.v[i]) * to_float(y.v[i]);
            }
        }
        d += __shfl_xor_sync(0xffffffffu, d, 1);
        d += __shfl_xor_sync(0xffffffffu, d, 2);
        row[r] = make_float2(t < rows ? lse[t] * LOG2_E : 0, d);
    }
}

/* statistics (B,NH,T in whole tiles) of lse log2 e and D is written for flash_backward_kv. blockIdx.x replaces the
 * loops over sequence, head and tiles of query rows. */
template <int HS>
__global__ void __launch_bounds__(GROUP_THREADS, FlashBlocks<HS>::QUERY)
    flash_backward_q(__nv_bfloat16 *dqkv, float2 *statistics, const __nv_bfloat16 *dout, const __nv_bfloat16 *out,
                     const float *lse, const __nv_bfloat16 *qk, const __nv_bfloat16 *qkv, AttentionShape shape,
                     const __grid_constant__ CUtensorMap qk_map, const __grid_constant__ CUtensorMap qkv_map,
                     const __grid_constant__ CUtensorMap dout_map) {
    extern __shared__ __align__(1024) unsigned char shared[];
    constexpr int BYTES = tile_bytes(HS);
    int T = shape.T, NH = shape.NH, NKV = shape.NKV, width = (NH + 2 * NKV) * shape.HS;
    Owner own = flash_owner(shape, NH, true);
    HeadRows q = head_rows(&qk_map, qk, NH + NKV, own.head, own.b, shape);
    HeadRows k = head_rows(&qk_map, qk, NH + NKV, NH + own.head / (NH / NKV), own.b, shape);
    HeadRows v = head_rows(&qkv_map, qkv, NH + 2 * NKV, NH + NKV + own.head / (NH / NKV), own.b, shape);
    HeadRows dy = head_rows(&dout_map, dout, NH, own.head, own.b, shape);
    int tiles = tiles_seen(shape, own.first + TILE - 1);
    uint32_t query_tile = shared_address(shared), dout_tile = query_tile + BYTES, key_tiles = dout_tile + BYTES;
    uint32_t value_tiles = key_tiles + STAGES * BYTES, owned_there = value_tiles + STAGES * BYTES;
    uint32_t keys_there = owned_there + 8, values_there = keys_there + STAGES * 8;
    barriers_init(owned_there, 1 + 2 * STAGES);
    expect_bytes(owned_there, 2 * BYTES);
    load_tile<HS>(query_tile, q, own.first, owned_there);
    load_tile<HS>(dout_tile, dy, own.first, owned_there);
    for (int i = 0; i < STAGES - 1 && i < tiles; i++) {
        load_stage<HS>(key_tiles, k, i, keys_there);
        load_stage<HS>(value_tiles, v, i, values_there);
    }
    size_t head_row = (size_t)own.b * NH + own.head, out_width = (size_t)NH * shape.HS;
    size_t out_start = ((size_t)own.b * T + own.first) * out_width + own.head * shape.HS;
    float2 row[2];
    row_statistics(row, dout + out_start, out + out_start, lse + head_row * T + own.first, T - own.first, shape);
    for (int r = 0; r < 2; r++) {
        if (threadIdx.x % 4 == 0) {
            statistics[head_row * statistics_stride(shape) + own.first + thread_row(r)] = row[r];
        }
    }
    float scale = rsqrtf((float)shape.HS);
    float dq[HS / 8][4] = {};
    await_tiles(owned_there, 0);
    for (int i = 0; i < tiles; i++) {
        uint32_t key_tile = key_tiles + i % STAGES * BYTES, value_tile = value_tiles + i % STAGES * BYTES;
        await_stage(keys_there, i);
        await_stage(values_there, i);
        __syncthreads();
        if (i + STAGES - 1 < tiles) {
            load_stage<HS>(key_tiles, k, i + STAGES - 1, keys_there);
            load_stage<HS>(value_tiles, v, i + STAGES - 1, values_there);
        }
        float s[TILE / 8][4], ds[TILE / 8][4];
        uint32_t left[TILE / 16][4];
        products_begin();
        multiply_nt<HS>(s, query_tile, key_tile);
        products_end();
        multiply_nt<HS>(ds, dout_tile, value_tile);
        products_end();
        products_wait<1>();
        settle(s);
        hide_keys(s, shape, own.first, i);
        score_probabilities(s, row, scale * LOG2_E);
        settle(s);
        products_wait<0>();
        settle(ds);
        score_gradient(ds, s, row);
        pack_left(left, ds);
        products_begin();
        multiply_nn<HS>(dq, left, key_tile);
        products_end();
        products_wait<0>();
        settle(dq);
    }
    __syncthreads();
    float factor[2] = {scale, scale};
    store_rows<HS>(dqkv + ((size_t)own.b * T + own.first) * width + own.head * shape.HS, width, dq, factor, query_tile,
                   T - own.first, shape.HS);
}

/* Where flash_backward_kv is: a tile of queries of one head. Heads of the group follow each other. */
typedef struct {
    int head, tile;
} QueryTile;

__device__ static inline QueryTile query_tile_after(QueryTile at, int begin, int tiles) {
    QueryTile next = {at.tile + 1 < tiles ? at.head : at.head + 1, at.tile + 1 < tiles ? at.tile + 1 : begin};
    return next;
}

/* Queues the i-th tile of queries, of their dout and of their statistics into the stage that it takes in turn. */
template <int HS>
__device__ static inline void load_queries(uint32_t stages, HeadRows q, HeadRows dy, const float2 *statistics,
                                           QueryTile at, int i, AttentionShape shape) {
    constexpr int BYTES = tile_bytes(HS);
    uint32_t to = stages + i % STAGES * 2 * BYTES, pairs = stages + STAGES * 2 * BYTES;
    uint32_t barrier = pairs + STAGES * STATISTICS_BYTES + 8 * (i % STAGES);
    int row = at.tile * TILE;
    q.head += at.head, q.from += at.head * shape.HS;
    dy.head += at.head, dy.from += at.head * shape.HS;
    expect_bytes(barrier, 2 * BYTES + STATISTICS_BYTES);
    load_tile<HS>(to, q, row, barrier);
    load_tile<HS>(to + BYTES, dy, row, barrier);
    load_pairs(pairs + i % STAGES * STATISTICS_BYTES, statistics + (size_t)at.head * statistics_stride(shape) + row,
               barrier);
}

/* blockIdx.x replaces the loops over sequence, key/value head and tiles of keys. */
template <int HS>
__global__ void __launch_bounds__(GROUP_THREADS, FlashBlocks<HS>::KEY)
    flash_backward_kv(__nv_bfloat16 *dqkv, const float2 *statistics, const __nv_bfloat16 *dout, const __nv_bfloat16 *qk,
                      const __nv_bfloat16 *qkv, AttentionShape shape, const __grid_constant__ CUtensorMap qk_map,
                      const __grid_constant__ CUtensorMap qkv_map, const __grid_constant__ CUtensorMap dout_map) {
    extern __shared__ __align__(1024) unsigned char shared[];
    constexpr int BYTES = tile_bytes(HS);
    int T = shape.T, NH = shape.NH, NKV = shape.NKV, heads = NH / NKV;
    Owner own = flash_owner(shape, NKV, false);
    HeadRows k = head_rows(&qk_map, qk, NH + NKV, NH + own.head, own.b, shape);
    HeadRows v = head_rows(&qkv_map, qkv, NH + 2 * NKV, NH + NKV + own.head, own.b, shape);
    HeadRows q = head_rows(&qk_map, qk, NH + NKV, own.head * heads, own.b, shape);
    HeadRows dy = head_rows(&dout_map, dout, NH, own.head * heads, own.b, shape);
    statistics += ((size_t)own.b * NH + own.head * heads) * statistics_stride(shape);
    uint32_t key_tile = shared_address(shared), value_tile = key_tile + BYTES, stages = value_tile + BYTES;
    uint32_t rows = stages + STAGES * 2 * BYTES;
    uint32_t there = rows + STAGES * STATISTICS_BYTES, owned_there = there + STAGES * 8;
    barriers_init(there, STAGES + 1);
    expect_bytes(owned_there, 2 * BYTES);
    load_tile<HS>(key_tile, k, own.first, owned_there);
    load_tile<HS>(value_tile, v, own.first, owned_there);
    int begin = shape.causal ? own.first / TILE : 0, tiles = (T + TILE - 1) / TILE;
    QueryTile at = {0, begin}, ahead = at;
    for (int i = 0; i < STAGES - 1 && ahead.head < heads; i++, ahead = query_tile_after(ahead, begin, tiles)) {
        load_queries<HS>(stages, q, dy, statistics, ahead, i, shape);
    }
    await_tiles(owned_there, 0);
    float scale = rsqrtf((float)shape.HS);
    float dk[HS / 8][4] = {}, dv[HS / 8][4] = {};
    for (int i = 0; at.head < heads; i++, at = query_tile_after(at, begin, tiles)) {
        uint32_t query_tile = stages + i % STAGES * 2 * BYTES, dout_tile = query_tile + BYTES;
        int later = at.tile * TILE - own.first;
        await_stage(there, i);
        __syncthreads();
        if (ahead.head < heads) {
            load_queries<HS>(stages, q, dy, statistics, ahead, i + STAGES - 1, shape);
            ahead = query_tile_after(ahead, begin, tiles);
        }
        const unsigned char *pairs = shared + (rows - key_tile) + i % STAGES * STATISTICS_BYTES;
        const float2 *query_statistics = reinterpret_cast<const float2 *>(pairs);
        float s[TILE / 8][4], ds[TILE / 8][4];
        uint32_t left[TILE / 16][4], left_ds[TILE / 16][4];
        products_begin();
        multiply_nt<HS>(s, key_tile, query_tile);
        products_end();
        multiply_nt<HS>(ds, value_tile, dout_tile);
        products_end();
        products_wait<1>();
        settle(s);
        if (shape.causal && later < TILE) {
            hide_keys_transposed(s, later);
        }
        probabilities_transposed(s, query_statistics, scale * LOG2_E);
        settle(s);
        products_wait<0>();
        settle(ds);
        gradient_transposed(ds, s, query_statistics);
        pack_left(left, s);
        pack_left(left_ds, ds);
        products_begin();
        multiply_nn<HS>(dv, left, dout_tile);
        multiply_nn<HS>(dk, left_ds, query_tile);
        products_end();
        products_wait<0>();
        settle(dv);
        settle(dk);
    }
    __syncthreads();
    size_t width = (size_t)(NH + 2 * NKV) * shape.HS;
    __nv_bfloat16 *to = dqkv + ((size_t)own.b * T + own.first) * width + (NH + own.head) * shape.HS;
    float factor[2] = {scale, scale}, one[2] = {1, 1};
    store_rows<HS>(to, width, dk, factor, key_tile, T - own.first, shape.HS);
    store_rows<HS>(to + NKV * shape.HS, width, dv, one, value_tile, T - own.first, shape.HS);
}

#endif
