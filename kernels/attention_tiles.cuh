/* Tiles of flash attention: 64 rows of one head of bf16 in shared memory, and the two matrix products that run on them.
 *
 *     multiply_nt    S (64,64) = A B^T      A, B tiles of 64 rows
 *     multiply_nn    O (64,HS) += P B       P in registers, B a tile
 *
 * A warp group (4 warps) owns the 64 rows of S and O, a warp 16 of them, in the layout that all matrix instructions
 * share: with g = lane / 4, t = lane % 4, element [j][e] of a thread is row 16 * warp + g + 8 * (e / 2), column
 * 8 * j + 2 * t + e % 2. Two neighbours in j are, rounded and packed, the left operand of the next product: that is why
 * the softmax between two products never leaves the registers.
 *
 * A tile lies in panels of 64 columns; a row of a panel is 128 bytes, eight chunks of 16, and chunk c of row r is found
 * at c ^ (r % 8), so that eight rows of one column touch all banks. This is the 128-byte swizzle of the Hopper matrix
 * unit, which reads the tiles in place (WGMMA, built for sm_90a); other targets read them by ldmatrix (mma.sync).
 *
 * Tiles are loaded by the tensor copy engine (TMA) for sm_90a, which one thread asks for and a barrier in shared memory
 * reports, and elsewhere by all threads with cp.async: await_tiles stands for either, and a __syncthreads() follows.
 * Products are queued: registers that they read or write are left alone from multiply_ to products_wait.
 * Read next: attention_scores.cuh.
 */
#ifndef KERNELS_ATTENTION_TILES_CUH
#define KERNELS_ATTENTION_TILES_CUH

#include "cuda.cuh"

#include <cuda.h>
#include <cudaTypedefs.h>

extern "C" {
#include "attention.h"
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define ATTENTION_WGMMA 1
#else
#define ATTENTION_WGMMA 0
#endif

enum {
    TILE = 64, /* rows of a tile, and columns of a panel */
    PANEL_BYTES = TILE * 64 * 2,
    GROUP_THREADS = 128, /* a warp group */
};

__host__ __device__ constexpr int tile_bytes(int HS) {
    return (HS + 63) / 64 * PANEL_BYTES;
}

/* ---- moving tiles ---- */

__device__ static inline uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* The address of 8 numbers from column `col`, a multiple of 8, on. */
__device__ static inline uint32_t tile_address(uint32_t tile, int row, int col) {
    return tile + col / 64 * PANEL_BYTES + row * 128 + ((col % 64 / 8) ^ (row % 8)) * 16;
}

/* The rows of one head of one sequence in a matrix (B*T, heads*HS) */
typedef struct {
    const CUtensorMap *map;
    const __nv_bfloat16 *from;
    size_t stride;
    int head, b, T, HS;
} HeadRows;

__device__ static inline HeadRows head_rows(const CUtensorMap *map, const __nv_bfloat16 *matrix, int heads, int head,
                                            int b, AttentionShape shape) {
    HeadRows rows = {
        map,     matrix + ((size_t)b * shape.T * heads + head) * shape.HS, (size_t)heads * shape.HS, head, b, shape.T,
        shape.HS};
    return rows;
}

#if ATTENTION_WGMMA

__device__ static inline void barriers_init(uint32_t barriers, int count) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < count; i++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barriers + 8 * i));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
}

/* Announces what the loads that follow will bring; a phase of the barrier ends with the last byte. */
__device__ static inline void expect_bytes(uint32_t barrier, int bytes) {
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    }
}

/* The use-th wait on this barrier */
__device__ static inline void await_tiles(uint32_t barrier, int use) {
    uint32_t done;
    do {
        asm volatile(
            "{\n.reg .pred done;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
            "selp.u32 %0, 1, 0, done;\n}\n"
            : "=r"(done)
            : "r"(barrier), "r"(use & 1)
            : "memory");
    } while (!done);
}

/* Queues the load of 64 rows from `row` on; rows past the end and columns past the head arrive as zeros. */
template <int HS>
__device__ static inline void load_tile(uint32_t tile, HeadRows rows, int row, uint32_t barrier) {
    if (threadIdx.x == 0) {
        for (int col = 0; col < HS; col += 64) {
            asm volatile(
                "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(tile + col / 64 * PANEL_BYTES),
                "l"(rows.map), "r"(col), "r"(rows.head), "r"(row), "r"(rows.b), "r"(barrier)
                : "memory");
        }
    }
}

/* 64 pairs of numbers, 512 bytes */
__device__ static inline void load_pairs(uint32_t to, const float2 *from, uint32_t barrier) {
    if (threadIdx.x == 0) {
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
            "[%0], [%1], %2, [%3];" ::"r"(to),
            "l"(from), "n"(TILE * 8), "r"(barrier)
            : "memory");
    }
}

#else

__device__ static inline void barriers_init(uint32_t barriers, int count) {
}

__device__ static inline void expect_bytes(uint32_t barrier, int bytes) {
}

__device__ static inline void await_tiles(uint32_t barrier, int use) {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

__device__ static inline void copy_16(uint32_t to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

template <int HS>
__device__ static inline void load_tile(uint32_t tile, HeadRows rows, int first, uint32_t barrier) {
    constexpr int CHUNKS = HS / 8;
    for (int i = threadIdx.x; i < TILE * CHUNKS; i += GROUP_THREADS) {
        int row = i / CHUNKS, col = i % CHUNKS * 8;
        bool there = first + row < rows.T && col < rows.HS;
        const __nv_bfloat16 *from = rows.from + (first + row) * rows.stride + col;
        copy_16(tile_address(tile, row, col), there ? from : rows.from, there);
    }
}

__device__ static inline void load_pairs(uint32_t to, const float2 *from, uint32_t barrier) {
    if (threadIdx.x < TILE / 2) {
        copy_16(to + threadIdx.x * 16, from + threadIdx.x * 2, true);
    }
}

#endif

/* How the copy engine sees a matrix (B*T, heads*HS): 64 columns of one head in 64 rows of one sequence at a time */
static CUtensorMap head_map(const __nv_bfloat16 *matrix, int heads, AttentionShape shape) {
    CUtensorMap map = {};
    if (cuda_capability() < 90) {
        return map;
    }
    void *entry = NULL;
    cudaDriverEntryPointQueryResult found;
    CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found));
    CHECK(found == cudaDriverEntryPointSuccess, "the NVIDIA driver has no tensor maps: update it");
    cuuint64_t row = (cuuint64_t)heads * shape.HS * 2;
    cuuint64_t extent[4] = {(cuuint64_t)shape.HS, (cuuint64_t)heads, (cuuint64_t)shape.T, (cuuint64_t)shape.B};
    cuuint64_t pitch[3] = {(cuuint64_t)shape.HS * 2, row, row * shape.T};
    cuuint32_t box[4] = {64, 1, TILE, 1}, step[4] = {1, 1, 1, 1};
    CUresult result = ((PFN_cuTensorMapEncodeTiled_v12000)entry)(
        &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, (void *)matrix, extent, pitch, box, step,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    CHECK(result == CUDA_SUCCESS, "no tensor map for %d heads of %d: error %d", heads, shape.HS, (int)result);
    return map;
}

__device__ static inline uint32_t pack_pair(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&pair);
}

/* Writes factor[r] * o, r = 0, 1 for the thread's two rows, to rows of `to`: through the warp's rows of a tile that
 * nobody reads any more, so that memory sees whole rows. */
template <int HS>
__device__ static inline void store_rows(__nv_bfloat16 *to, size_t stride, const float (&o)[HS / 8][4],
                                         const float (&factor)[2], uint32_t tile, int rows, int HS_real) {
    constexpr int CHUNKS = HS / 8;
    int lane = threadIdx.x % 32, first = threadIdx.x / 32 % 4 * 16;
#pragma unroll
    for (int j = 0; j < CHUNKS; j++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            uint32_t pair = pack_pair(o[j][2 * r] * factor[r], o[j][2 * r + 1] * factor[r]);
            uint32_t at = tile_address(tile, first + lane / 4 + 8 * r, 8 * j) + lane % 4 * 4;
            asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(pair) : "memory");
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < 16 * CHUNKS; i += 32) {
        int row = first + i / CHUNKS, col = i % CHUNKS * 8;
        int4 chunk;
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(chunk.x), "=r"(chunk.y), "=r"(chunk.z), "=r"(chunk.w)
                     : "r"(tile_address(tile, row, col))
                     : "memory");
        if (row < rows && col < HS_real) {
            *reinterpret_cast<int4 *>(to + row * stride + col) = chunk;
        }
    }
    __syncwarp();
}

/* S as the left operand of multiply_nn */
__device__ static inline void pack_left(uint32_t (&p)[TILE / 16][4], const float (&s)[TILE / 8][4]) {
#pragma unroll
    for (int k = 0; k < TILE / 16; k++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            p[k][i] = pack_pair(s[2 * k + i / 2][i % 2 * 2], s[2 * k + i / 2][i % 2 * 2 + 1]);
        }
    }
}

/* ---- products ---- */

#if ATTENTION_WGMMA

/* Where the matrix unit finds what starts `at` bytes into a tile: address, leading offset (from panel to panel), stride
 * offset (8 rows of 128 bytes), all in units of 16 bytes, and the code of the 128-byte swizzle. */
__device__ static inline uint64_t tile_descriptor(uint32_t tile, uint32_t at) {
    uint32_t low = (tile >> 4) + ((PANEL_BYTES >> 4 << 16) + (at >> 4)), high = 1024 >> 4 | 1u << 30;
    return (uint64_t)high << 32 | low;
}

__device__ static inline void products_begin(void) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ static inline void products_end(void) {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Until at most PENDING groups of products are on their way */
template <int PENDING>
__device__ static inline void products_wait(void) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

/* Tells the compiler that the registers change here: it must not move their use across a wait. */
template <int N>
__device__ static inline void settle(float (&x)[N][4]) {
#pragma unroll
    for (int j = 0; j < N; j++) {
        asm volatile("" : "+f"(x[j][0]), "+f"(x[j][1]), "+f"(x[j][2]), "+f"(x[j][3])::"memory");
    }
}

#define ACCUMULATORS_4(d, j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define ACCUMULATORS_16(d, j) \
    ACCUMULATORS_4(d, j), ACCUMULATORS_4(d, j + 1), ACCUMULATORS_4(d, j + 2), ACCUMULATORS_4(d, j + 3)
#define NAMES_0_15 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_16_31 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_32_47 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_48_63 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

/* 16 columns of A and B; add = 0 starts the sum. */
__device__ static inline void wgmma_nt(float (&d)[8][4], uint64_t a, uint64_t b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES_0_15 NAMES_16_31
        "}, %32, %33, p, 1, 1, 0, 0;\n}\n"
        : ACCUMULATORS_16(d, 0), ACCUMULATORS_16(d, 4)
        : "l"(a), "l"(b), "r"(add));
}

/* The same with A in registers */
__device__ static inline void wgmma_nt(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES_0_15 NAMES_16_31
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}\n"
        : ACCUMULATORS_16(d, 0), ACCUMULATORS_16(d, 4)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

/* 16 rows of B, which is read along its rows: one definition for each HS */
#define LEFT(a) "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])

__device__ static inline void wgmma_nn(float (&d)[4][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" NAMES_0_15
        "}, {%16, %17, %18, %19}, %20, p, 1, 1, 1;\n}\n"
        : ACCUMULATORS_16(d, 0)
        : LEFT(a), "l"(b));
}

__device__ static inline void wgmma_nn(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES_0_15 NAMES_16_31
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}\n"
        : ACCUMULATORS_16(d, 0), ACCUMULATORS_16(d, 4)
        : LEFT(a), "l"(b));
}

__device__ static inline void wgmma_nn(float (&d)[12][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {" NAMES_0_15 NAMES_16_31 NAMES_32_47
        "}, {%48, %49, %50, %51}, %52, p, 1, 1, 1;\n}\n"
        : ACCUMULATORS_16(d, 0), ACCUMULATORS_16(d, 4), ACCUMULATORS_16(d, 8)
        : LEFT(a), "l"(b));
}

__device__ static inline void wgmma_nn(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES_0_15 NAMES_16_31 NAMES_32_47 NAMES_48_63
        "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}\n"
        : ACCUMULATORS_16(d, 0), ACCUMULATORS_16(d, 4), ACCUMULATORS_16(d, 8), ACCUMULATORS_16(d, 12)
        : LEFT(a), "l"(b));
}

template <int HS>
__device__ static inline void multiply_nt(float (&s)[TILE / 8][4], uint32_t a, uint32_t b) {
#pragma unroll
    for (int k = 0; k < HS / 16; k++) {
        int at = k / 4 * PANEL_BYTES + k % 4 * 32;
        wgmma_nt(s, tile_descriptor(a, at), tile_descriptor(b, at), k > 0);
    }
}

template <int HS>
__device__ static inline void multiply_nn(float (&o)[HS / 8][4], const uint32_t (&p)[TILE / 16][4], uint32_t b) {
#pragma unroll
    for (int k = 0; k < TILE / 16; k++) {
        wgmma_nn(o, p[k], tile_descriptor(b, k * 16 * 128));
    }
}

#else

__device__ static inline void products_begin(void) {
}
__device__ static inline void products_end(void) {
}
template <int PENDING>
__device__ static inline void products_wait(void) {
}
template <int N>
__device__ static inline void settle(float (&x)[N][4]) {
}

/* Four matrices of 8 x 8; lane 8 * i + r names row r of the i-th. */
template <bool TRANSPOSED>
__device__ static inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
    if (TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    }
}

__device__ static inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <int HS>
__device__ static inline void multiply_nt(float (&s)[TILE / 8][4], uint32_t a, uint32_t b) {
    int lane = threadIdx.x % 32, first = threadIdx.x / 32 % 4 * 16;
#pragma unroll
    for (int j = 0; j < TILE / 8; j++) {
        s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0;
    }
#pragma unroll
    for (int k = 0; k < HS / 16; k++) {
        uint32_t left[4], right[4];
        load_matrices<false>(left, tile_address(a, first + lane % 16, k * 16 + lane / 16 * 8));
#pragma unroll
        for (int j = 0; j < TILE / 8; j += 2) {
            int row = j * 8 + lane % 8 + lane / 16 * 8;
            load_matrices<false>(right, tile_address(b, row, k * 16 + lane / 8 % 2 * 8));
            mma(s[j], left, right[0], right[1]);
            mma(s[j + 1], left, right[2], right[3]);
        }
    }
}

template <int HS>
__device__ static inline void multiply_nn(float (&o)[HS / 8][4], const uint32_t (&p)[TILE / 16][4], uint32_t b) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < TILE / 16; k++) {
#pragma unroll
        for (int j = 0; j < HS / 8; j += 2) {
            uint32_t right[4];
            load_matrices<true>(right, tile_address(b, k * 16 + lane % 16, j * 8 + lane / 16 * 8));
            mma(o[j], p[k], right[0], right[1]);
            mma(o[j + 1], p[k], right[2], right[3]);
        }
    }
}

#endif

#endif
