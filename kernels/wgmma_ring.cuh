/* What the products on Hopper are made of: the ring of stages, one stage's product, and the way from a thread's sums to
 * rows in memory. How they work together: grouped_wgmma.cuh. */
#ifndef KERNELS_WGMMA_RING_CUH
#define KERNELS_WGMMA_RING_CUH

#include "grouped.cuh"
#include "wgmma.cuh"

enum {
    GROUP = 128, /* threads of a warp group */
    LOADERS = GROUP,
    WGMMA_THREADS = LOADERS + 2 * GROUP,
    WGMMA_ROWS = 128, /* of a tile */
    DEEP = 64,        /* steps of the inner width in a stage: 128 bytes */
    BOX_BYTES = 64 * DEEP * 2,
    BAND = 16, /* row tiles that take turns before the next column tile */
    LOADER_REGISTERS = 56,
    MULTIPLIER_REGISTERS = 224, /* 56 + 2 * 224 <= 65536 / 128 */
};

#define ZERO_ROW 0xffffffffu

/* The ring, at one of its stages. COLUMNS is the width of the tiles, ROWS their height: 128 where both multiplying
 * groups share a tile, 64 where they take turns; KILOBYTES: smaller, to leave room for other buffers. The blocks
 * of a cluster, `blocks` of them (1 or 2), take neighbouring tiles of the same B, of which each loads its share for
 * all. */
template <int COLUMNS, int ROWS = WGMMA_ROWS, int KILOBYTES = 192>
struct Ring {
    enum {
        A_BYTES = ROWS * DEEP * 2,
        B_BYTES = COLUMNS * DEEP * 2,
        STAGE_BYTES = A_BYTES + B_BYTES,
        STAGES = KILOBYTES * 1024 / STAGE_BYTES,
        BYTES = STAGES * STAGE_BYTES + 2 * STAGES * 8,
    };
    uint32_t base; /* a multiple of 1024 */
    int stage;
    uint32_t parity; /* of the ring's lap */
    uint32_t rank, blocks;

    __device__ uint32_t a(void) const {
        return base + stage * STAGE_BYTES;
    }
    __device__ uint32_t b(void) const {
        return a() + A_BYTES;
    }
    __device__ uint32_t full(void) const {
        return base + STAGES * STAGE_BYTES + stage * 8;
    }
    __device__ uint32_t empty(void) const {
        return full() + STAGES * 8;
    }
    __device__ void next(void) {
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        parity ^= stage == 0;
    }
    /* Past the stages of a tile that is the other group's. */
    __device__ void skip(int stages) {
        stage += stages;
        parity ^= stage / STAGES & 1;
        stage %= STAGES;
    }
    /* A box of B, for all blocks of the cluster. */
    __device__ void share_box(uint32_t to, const CUtensorMap *map, int x, int y, int z) const {
        if (blocks == 1) {
            copy_box(to, map, x, y, z, full());
        } else {
            copy_box_to((uint16_t)((1 << blocks) - 1), to, map, x, y, z, full());
        }
    }
    /* Thread t of a multiplying group: the group has read the stage whose empty() this is. Every block that copies into
     * it is told. */
    __device__ void release(uint32_t empty, int t) const {
        if (t == (int)rank) {
            barrier_arrive(empty);
        } else if (t < (int)blocks) {
            barrier_arrive_at(empty, t);
        }
    }
};

/* The block's ring at its first stage, the barriers ready once the cluster has met. */
template <class Ring>
__device__ static inline Ring ring_open(uint32_t shared, int full_arrivals, uint32_t blocks) {
    Ring ring = {(shared + 1023) & ~1023u, 0, 0, cluster_rank(), blocks};
    if (threadIdx.x == 0) {
        for (int i = 0; i < ring.STAGES; i++) {
            barrier_init(ring.full() + i * 8, full_arrivals);
            barrier_init(ring.empty() + i * 8, ring.A_BYTES / BOX_BYTES * (int)blocks);
        }
        barrier_init_fence();
    }
    return ring;
}

/* sum (+)= A B over one stage; a, b: this warp group's tiles. */
template <int ACROSS_A, int ACROSS_B, int COUNT>
__device__ static inline void multiply_stage(float (&sum)[COUNT], uint32_t a, uint32_t b, bool add) {
    uint64_t left = tile_description(a), right = tile_description(b);
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < DEEP / 16; k++) {
        wgmma<ACROSS_A, ACROSS_B>(sum, left + k * (ACROSS_A ? 2048 >> 4 : 32 >> 4),
                                  right + k * (ACROSS_B ? 2048 >> 4 : 32 >> 4), add || k > 0);
    }
    wgmma_commit();
}

/* Where the row of this entry begins in a source of that width, in packs of 16 bytes; ZERO_ROW: it is all zero. */
__device__ static inline uint32_t row_of_entry(int entry, RowSource source, int width) {
    return entry < 0 ? ZERO_ROW : (uint32_t)entry / (uint32_t)source.K * (uint32_t)(width / 8);
}

/* ---- from a thread's sums to rows ----
 *
 * The four threads of a quad hold two columns each of a block of 8 (wgmma.cuh). Over four blocks they trade, so that
 * each gets one block's 8 columns: 16 bytes of bf16, which the quad stores as 64 bytes in a run. */

/* Thread q of a quad gives value i to thread i and gets that thread's value q in its place. */
__device__ static inline void quad_transpose(uint32_t (&v)[4]) {
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2) {
        bool upper = threadIdx.x & bit;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (!(i & bit)) {
                uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? v[i] : v[i + bit], bit);
                v[i] = upper ? got : v[i];
                v[i + bit] = upper ? v[i + bit] : got;
            }
        }
    }
}

/* Columns 8 (block + q) .. + 7 of the thread's row of this half, rounded; q is the thread's place in its quad. */
template <int COUNT>
__device__ static inline Pack<__nv_bfloat16> row_pack(const float (&sum)[COUNT], int block, int half) {
    union {
        uint32_t v[4];
        Pack<__nv_bfloat16> pack;
    } row;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float *pair = sum + 4 * (block + i) + 2 * half;
        __nv_bfloat162 rounded = __floats2bfloat162_rn(pair[0], pair[1]);
        row.v[i] = *reinterpret_cast<uint32_t *>(&rounded);
    }
    quad_transpose(row.v);
    return row.pack;
}

/* The same, not rounded. */
template <int COUNT>
__device__ static inline void row_floats(float (&row)[8], const float (&sum)[COUNT], int block, int half) {
    uint32_t even[4], odd[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        even[i] = __float_as_uint(sum[4 * (block + i) + 2 * half]);
        odd[i] = __float_as_uint(sum[4 * (block + i) + 2 * half + 1]);
    }
    quad_transpose(even);
    quad_transpose(odd);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        row[2 * i] = __uint_as_float(even[i]);
        row[2 * i + 1] = __uint_as_float(odd[i]);
    }
}

/* No branch: the compiler may weave the stores of one group of columns into the trade of the next. */
template <class T>
__device__ static inline void store_pack_if(T *to, const Pack<T> &pack, bool inside) {
    const uint4 &v = reinterpret_cast<const uint4 &>(pack);
    asm volatile(
        "{\n.reg .pred inside;\nsetp.ne.b32 inside, %0, 0;\n"
        "@inside st.global.v4.b32 [%1], {%2, %3, %4, %5};\n}" ::"r"((int)inside),
        "l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
        : "memory");
}

__device__ static inline void store_float_if(float *to, float value, bool inside) {
    asm volatile(
        "{\n.reg .pred inside;\nsetp.ne.b32 inside, %0, 0;\n@inside st.global.f32 [%1], %2;\n}" ::"r"((int)inside),
        "l"(to), "f"(value)
        : "memory");
}

/* ---- the host's side ---- */

/* How the copy engine sees `outer` matrices (rows, inner), one after the other: box_rows rows of 128 bytes at a time */
static CUtensorMap matrix_map(const void *base, int size, int inner, int rows, int outer, int box_rows) {
    int extent[3] = {inner, rows, outer}, box[3] = {128 / size, box_rows, 1};
    return tensor_map(base, size, 3, extent, box, CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
}

/* Whether pairs of row tiles waste little: an expert's last pair may have one tile for two blocks. */
static int cluster_blocks(int64_t tiles, int groups) {
    return tiles >= 10 * (int64_t)groups ? 2 : 1;
}

/* Runs `kernel` in clusters of `blocks`, with `bytes` of shared memory from a multiple of 1024 on; `tiles`: no more
 * blocks. */
template <class... Arguments>
static void launch_wgmma(void (*kernel)(Arguments...), size_t bytes, int64_t tiles, int blocks, cudaStream_t stream,
                         Arguments... arguments) {
    bytes += 1024;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    int most = cuda_multiprocessors() / blocks, clusters = ceil_div(tiles, blocks);
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = blocks;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((clusters < most ? clusters : most) * blocks);
    config.blockDim = dim3(WGMMA_THREADS);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}

#endif
