/* Level 5: Hopper's own way. The copy engine (TMA) brings boxes of both operands, a warp group multiplies straight from
 * shared memory (wgmma), and the two work at the same time.
 *
 * One idea more than level 4: threads get different jobs. One block of three warp groups stays on each multiprocessor
 * and takes tiles of 128 x 256 of y, one after the other; a ring of four stages in shared memory joins the groups:
 *
 *     group 0, one thread     loads       wait(empty[s])   tell TMA to fill stage s    -> full[s]     s + 1, ...
 *     groups 1 and 2          multiply    wait(full[s])    64 rows each: sum += A B    -> empty[s]    s + 1, ...
 *                                         end of the tile: store; the next tile's stages fill meanwhile
 *
 *     stage    | A: 128 rows of 64 numbers, 16 KB | B: 256 rows of 64 numbers, 32 KB |
 *
 * full and empty are barriers in shared memory. A phase of full[s] ends when its one arrival and all bytes announced by
 * it are there, one of empty[s] when both multiplying groups have arrived. Which phase is meant is its number modulo 2:
 * nobody can be two phases ahead. A box past an expert's last row brings rows of the next one: they make rows of the
 * result that are not stored.
 *
 * In shared memory, the 16-byte piece c of row r of a tile lies at place c ^ (r % 8) of the row's 128 bytes. TMA writes
 * and wgmma reads this order by themselves; it spreads pieces of the same c in 8 rows over all banks.
 *
 * Expect: above level 4, as no thread spends instructions on moving operands or holds them in registers, and wgmma has
 * the tensor cores' full rate. What is missing to the dense product: the stores, 4 bytes a thread, during which a block
 * multiplies nothing (the shorter C, the more), and the gather, which alone is about a third of the time at the second
 * shape (C 1536, N 512). On an H100: 59 % and 46 % of dense, level 4 has 49 % and 35 %. With few large experts a loop
 * of cuBLAS, whose stores are better hidden, is still ahead (82 %).
 *
 * Read next: level 6, or kernels/wgmma.cuh and kernels/wgmma_ring.cuh for the same pieces in production. */
#include "../ladder.cuh"

#include <cuda.h>
#include <cudaTypedefs.h>

/* These instructions exist in the build for Hopper alone: for other cards the kernel is empty, and never launched. */
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER_CODE
#endif

enum {
    ROWS = 128, /* of y to a tile */
    COLUMNS = 256,
    DEPTH = 64,  /* inner width of a stage: 128 bytes */
    STAGES = 4,  /* of the ring */
    GROUP = 128, /* threads of a warp group */
    THREADS = 3 * GROUP,
    A_BYTES = ROWS * DEPTH * 2,
    STAGE_BYTES = A_BYTES + COLUMNS * DEPTH * 2,
    BARRIERS = STAGES * STAGE_BYTES,                 /* where they begin: all full, then all empty */
    SHARED_BYTES = BARRIERS + 2 * STAGES * 8 + 1024, /* stages begin at a multiple of 1024 */
};

/* rows[r] = x[entry[r] / K]. Grid: a block to a row; its threads take 16 bytes each. */
static __global__ void gather_kernel(int4 *rows, const int4 *x, const int *entry, int K, int packs) {
    const int4 *from = x + (size_t)(entry[blockIdx.x] / K) * packs;
    for (int i = threadIdx.x; i < packs; i += blockDim.x) {
        rows[(size_t)blockIdx.x * packs + i] = from[i];
    }
}

#ifdef HOPPER_CODE

/* ---- barriers: 8 bytes that count arrivals and bytes ---- */

__device__ static inline void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

/* Makes initialised barriers visible to the copy engine. */
__device__ static inline void barrier_init_fence(void) {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ static inline void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/* Arrives, and the phase does not end before the copy engine has written `bytes`. */
__device__ static inline void barrier_arrive_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

/* Waits for the end of the phase of this parity: 0 for the first, 1 for the second, ... One that was just initialised
 * counts as past the end of a phase of parity 1. */
__device__ static inline void barrier_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile(
            "{\n.reg .pred done;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
            "selp.u32 %0, 1, 0, done;\n}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!done);
}

/* ---- the ring: step counts all stages ever filled, so that it is in lap step / STAGES ---- */

__device__ static inline uint32_t stage_of(uint32_t ring, int step) {
    return ring + step % STAGES * STAGE_BYTES;
}

__device__ static inline uint32_t full_of(uint32_t ring, int step) {
    return ring + BARRIERS + step % STAGES * 8;
}

__device__ static inline uint32_t empty_of(uint32_t ring, int step) {
    return full_of(ring, step) + STAGES * 8;
}

__device__ static inline uint32_t parity_of(int step) {
    return step / STAGES % 2;
}

/* ---- copy and product ---- */

/* One box of a tensor, at coordinates x (innermost), y, z. What lies outside of the tensor arrives as zeros. */
__device__ static inline void copy_box(uint32_t to, const CUtensorMap *map, int x, int y, int z, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier)
        : "memory");
}

/* How wgmma is told of a tile: address, distance of 8 rows, both in units of 16 bytes; the top bit but one names the
 * order within the rows. */
__device__ static inline uint64_t tile_description(uint32_t address) {
    return (uint64_t)1 << 62 | (uint64_t)(1024 >> 4) << 32 | (address & 0x3ffff) >> 4;
}

#define SUMS_4(sum, i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])
#define SUMS_16(sum, i) SUMS_4(sum, i), SUMS_4(sum, i + 4), SUMS_4(sum, i + 8), SUMS_4(sum, i + 12)

/* sum (64,256) = or += A (64,16) B (256,16)^T. Thread t of the warp group holds, for each 8 columns j and half = 0, 1,
 *     row 16 (t/32) + 8 half + t%32 / 4,   columns 8j + 2 (t%4) and + 1   in   sum[4j + 2 half] and + 1 */
__device__ static inline void wgmma(float (&sum)[128], uint64_t a, uint64_t b, int add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
        "%128, %129, add, 1, 1, 0, 0;\n}"
        : SUMS_16(sum, 0), SUMS_16(sum, 16), SUMS_16(sum, 32), SUMS_16(sum, 48), SUMS_16(sum, 64), SUMS_16(sum, 80),
          SUMS_16(sum, 96), SUMS_16(sum, 112)
        : "l"(a), "l"(b), "r"(add));
}

/* Queues sum (+)= A B^T of one stage; a, b: where the warp group's tiles begin. 16 numbers further is 32 bytes. */
__device__ static inline void multiply_stage(float (&sum)[128], uint32_t a, uint32_t b, bool add) {
    uint64_t left = tile_description(a), right = tile_description(b);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int i = 0; i < DEPTH / 16; i++) {
        wgmma(sum, left + i * (32 >> 4), right + i * (32 >> 4), add || i > 0);
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Waits until at most the latest UNFINISHED stages are still in work. */
template <int UNFINISHED>
__device__ static inline void multiply_wait(void) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(UNFINISHED) : "memory");
}

/* Keeps the compiler from reading sums before the wait above this. */
__device__ static inline void multiply_settle(float (&sum)[128]) {
#pragma unroll
    for (int i = 0; i < 128; i++) {
        asm volatile("" : "+f"(sum[i])::"memory");
    }
}

/* ---- the kernel ---- */

/* Rows row .. row + 127 (fewer, where `end` cuts) of y, all of one expert, columns from `column` on. */
typedef struct {
    int expert, before; /* row tiles of the experts before this one */
    int row, end, column;
} Tile;

/* Tile number `id`, for ids that grow from call to call; false past the last. Tiles of the same rows follow each other:
 * blocks that run together share these rows and their expert's weights in the L2 cache. */
__device__ static inline bool find_tile(Tile *tile, int id, const int *offset, int E, int N) {
    int across = N / COLUMNS;
    for (; tile->expert < E; tile->expert++) {
        int begin = offset[tile->expert], end = offset[tile->expert + 1], down = (end - begin + ROWS - 1) / ROWS;
        if (id < (tile->before + down) * across) {
            tile->row = begin + (id / across - tile->before) * ROWS;
            tile->end = end;
            tile->column = id % across * COLUMNS;
            return true;
        }
        tile->before += down;
    }
    return false;
}

/* The loading group: one thread, as TMA does the work. */
__device__ static inline void load_tiles(uint32_t ring, const CUtensorMap *rows, const CUtensorMap *w,
                                         const int *offset, int E, int C, int N) {
    Tile tile = {};
    int step = 0;
    for (int id = blockIdx.x; find_tile(&tile, id, offset, E, N); id += gridDim.x) {
        for (int k = 0; k < C; k += DEPTH, step++) {
            uint32_t a = stage_of(ring, step), full = full_of(ring, step);
            barrier_wait(empty_of(ring, step), parity_of(step) ^ 1);
            barrier_arrive_expect(full, STAGE_BYTES);
            copy_box(a, rows, k, tile.row, 0, full);
            copy_box(a + A_BYTES, w, k, tile.column, tile.expert, full);
        }
    }
}

/* The warp group's 64 rows of a tile, from its sums; t: thread of the group. */
__device__ static inline void store_tile(bf16 *y, const float (&sum)[128], const Tile &tile, int group, int t, int N) {
    int row = tile.row + 64 * group + t / 32 * 16 + t % 32 / 4, column = tile.column + t % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; half++, row += 8) {
        bf16 *to = y + (size_t)row * N + column;
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j++) {
            if (row < tile.end) {
                *(__nv_bfloat162 *)(to + 8 * j) =
                    __floats2bfloat162_rn(sum[4 * j + 2 * half], sum[4 * j + 2 * half + 1]);
            }
        }
    }
}

/* A multiplying group. A stage is handed back when the next one's product is queued and its own is finished: the tensor
 * cores always have work ahead. */
__device__ static inline void multiply_tiles(bf16 *y, uint32_t ring, const int *offset, int E, int C, int N) {
    int group = threadIdx.x / GROUP - 1, t = threadIdx.x % GROUP, step = 0;
    float sum[128];
    Tile tile = {};
    for (int id = blockIdx.x; find_tile(&tile, id, offset, E, N); id += gridDim.x) {
        for (int k = 0; k < C; k += DEPTH, step++) {
            uint32_t a = stage_of(ring, step);
            barrier_wait(full_of(ring, step), parity_of(step));
            multiply_stage(sum, a + group * (A_BYTES / 2), a + A_BYTES, k > 0);
            multiply_wait<1>();
            if (t == 0 && k > 0) {
                barrier_arrive(empty_of(ring, step - 1));
            }
        }
        multiply_wait<0>();
        multiply_settle(sum);
        if (t == 0) {
            barrier_arrive(empty_of(ring, step - 1));
        }
        store_tile(y, sum, tile, group, t, N);
    }
}

#endif

/* Grid: a block to a multiprocessor; it takes every gridDim.x-th tile. Maps: rows (1,rows,C), w (E,N,C). */
static __global__ void __launch_bounds__(THREADS, 1)
    product_kernel(bf16 *y, const __grid_constant__ CUtensorMap rows, const __grid_constant__ CUtensorMap w,
                   const int *offset, int E, int C, int N) {
#ifdef HOPPER_CODE
    extern __shared__ char shared[];
    uint32_t ring = ((uint32_t)__cvta_generic_to_shared(shared) + 1023) & ~1023u;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full_of(ring, i), 1);
            barrier_init(empty_of(ring, i), 2);
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x >= GROUP) {
        multiply_tiles(y, ring, offset, E, C, N);
    } else if (threadIdx.x == 0) {
        load_tiles(ring, &rows, &w, offset, E, C, N);
    }
#endif
}

/* ---- the host's side ---- */

/* A tensor (outer, rows, inner) of bf16, fetched in boxes of 64 x box_rows x 1 in the order that wgmma reads. The
 * driver's function is asked for by name, so that nothing links with it. */
static CUtensorMap tensor_map(const void *base, int inner, int rows, int outer, int box_rows) {
    static PFN_cuTensorMapEncodeTiled_v12000 encode = NULL;
    if (!encode) {
        cudaDriverEntryPointQueryResult found;
        const char *name = "cuTensorMapEncodeTiled";
        CUDA(cudaGetDriverEntryPointByVersion(name, (void **)&encode, 12000, cudaEnableDefault, &found));
    }
    CUtensorMap map;
    cuuint64_t extent[3] = {(cuuint64_t)inner, (cuuint64_t)rows, (cuuint64_t)outer};
    cuuint64_t pitch[2] = {extent[0] * sizeof(bf16), extent[0] * extent[1] * sizeof(bf16)};
    cuuint32_t box[3] = {DEPTH, (cuuint32_t)box_rows, 1}, apart[3] = {1, 1, 1};
    if (!encode || encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void *)base, extent, pitch, box, apart,
                          CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS) {
        fprintf(stderr, "no tensor map for (%d, %d, %d)\n", outer, rows, inner);
        exit(1);
    }
    return map;
}

static ProductResult multiply(const ProductInputs *in) {
    const LadderTokens *t = &in->tokens;
    int C = t->C, N = in->N, multiprocessors;
    if (C % DEPTH != 0 || N % COLUMNS != 0) {
        fprintf(stderr, "C must be a multiple of %d and N of %d, not %d and %d\n", DEPTH, COLUMNS, C, N);
        exit(1);
    }
    bf16 *rows = (bf16 *)ladder_memory(0, (size_t)t->rows * C * sizeof(bf16));
    bf16 *y = (bf16 *)ladder_memory(1, (size_t)t->rows * N * sizeof(bf16));
    gather_kernel<<<t->rows, 128>>>((int4 *)rows, (const int4 *)t->x, t->entry, t->K, C / 8);
    CUDA(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
    CUDA(cudaFuncSetAttribute(product_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES));
    product_kernel<<<multiprocessors, THREADS, SHARED_BYTES>>>(
        y, tensor_map(rows, C, t->rows, 1, ROWS), tensor_map(in->w, C, N, t->E, COLUMNS), t->offset, t->E, C, N);
    return {y, 0};
}

int main(void) {
    int major = 0;
    CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    if (major != 9) {
        fprintf(stderr, "level 5 is left out: it needs a Hopper GPU (compute capability 9.0)\n");
        return 0;
    }
    return product_ladder("5 wgmma persistent", multiply);
}
