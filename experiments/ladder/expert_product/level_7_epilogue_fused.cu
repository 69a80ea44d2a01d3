/* Level 7: the activation while the sums are still in registers. The first product of a SwiGLU expert is followed by
 *
 *     a = gather(x) W1^T  (rows,2H)      h = silu(gate) up  (rows,H)      gate = a[:, :H], up = a[:, H:]
 *
 * where training keeps a for the backward pass, and the second product reads h.
 *
 * One idea more than level 6: let a tile have the columns that belong together. Its 256 columns are 128 of the gate and
 * the same 128 of up, brought by two boxes of W1, one H rows below the other. A thread then holds gate and up of the
 * same element, 64 sums apart, and has h without a further read. It takes both as they were rounded for a, so that the
 * backward pass, which reads a, means the same h.
 *
 * The same product followed by a kernel for h is timed first ("6, then activation").
 *
 * Expect: that kernel reads 2H and writes H numbers a row at the speed of memory, 0.33 ms at the first shape beside the
 * product's 0.85 ms. Fused, only the writing of h is left. Measured on an H100 the opposite: 1.32 ms against 1.17 ms,
 * and at the second shape 0.69 against 0.68. No block multiplies while it stores, and these stores are 4 bytes a
 * thread: half as many more of them cost more than the kernel that is saved. Fusing pays once the stores are wide: the
 * production kernel, which stores 16 bytes a thread, does all of this in 0.73 ms at the first shape.
 *
 * Read next: kernels/grouped_wgmma.cuh. What production adds for any shape: tiles of 128 columns, widths that are no
 * multiples of the tile's, bands of tiles for weights larger than L2. For speed: stores of 16 bytes, after the four
 * threads of a row have traded their columns, and registers moved from the loading group to the others. For training:
 * the other four products: down, and those of the backward pass. */
#include "../ladder.cuh"

#include <cuda.h>
#include <cudaTypedefs.h>

/* These instructions exist in the build for Hopper alone: for other cards the kernel is empty, and never launched. */
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER_CODE
#endif

enum {
    ROWS = 128,    /* of a to a tile */
    COLUMNS = 256, /* a half from gate, a half from up */
    HALF = COLUMNS / 2,
    DEPTH = 64,  /* inner width of a stage: 128 bytes */
    STAGES = 4,  /* of the ring */
    GROUP = 128, /* threads of a warp group */
    THREADS = 3 * GROUP,
    ROWS_AT_ONCE = GROUP / 8, /* a thread to 16 of the 128 bytes */
    A_BYTES = ROWS * DEPTH * 2,
    STAGE_BYTES = A_BYTES + COLUMNS * DEPTH * 2,
    BARRIERS = STAGES * STAGE_BYTES,                 /* where they begin: all full, then all empty */
    SHARED_BYTES = BARRIERS + 2 * STAGES * 8 + 1024, /* stages begin at a multiple of 1024 */
};

/* ---- silu(gate) up, two elements; silu(x) = x / (1 + exp(-x)) ---- */

__device__ static inline float silu(float x) {
    return __fdividef(x, 1 + __expf(-x));
}

__device__ static inline __nv_bfloat162 swiglu(__nv_bfloat162 gate, __nv_bfloat162 up) {
    float2 g = __bfloat1622float2(gate), u = __bfloat1622float2(up);
    return __floats2bfloat162_rn(silu(g.x) * u.x, silu(g.y) * u.y);
}

/* h from a. Grid: a thread to 8 elements of h, in memory's order; packs = H / 8. */
static __global__ void activation_kernel(int4 *h, const int4 *a, int rows, int packs) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < rows * packs) {
        const int4 *row = a + (size_t)(i / packs) * 2 * packs;
        int4 gate = row[i % packs], up = row[packs + i % packs], out;
        for (int j = 0; j < 4; j++) {
            ((__nv_bfloat162 *)&out)[j] = swiglu(((__nv_bfloat162 *)&gate)[j], ((__nv_bfloat162 *)&up)[j]);
        }
        h[i] = out;
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

/* Arrives when all copy_16 of the calling thread so far have arrived. */
__device__ static inline void barrier_arrive_copied(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
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

/* 16 bytes, by the calling thread. */
__device__ static inline void copy_16(uint32_t to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

/* Before wgmma reads what threads have copied. */
__device__ static inline void fence_async(void) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
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

/* Rows row .. row + 127 (fewer, where `end` cuts), all of one expert, 128 columns of h from `column` on. */
typedef struct {
    int expert, before; /* row tiles of the experts before this one */
    int row, end, column;
} Tile;

/* Tile number `id`, for ids that grow from call to call; false past the last. Tiles of the same rows follow each other:
 * blocks that run together share these rows and their expert's weights in the L2 cache. */
__device__ static inline bool find_tile(Tile *tile, int id, const int *offset, int E, int H) {
    int across = H / HALF;
    for (; tile->expert < E; tile->expert++) {
        int begin = offset[tile->expert], end = offset[tile->expert + 1], down = (end - begin + ROWS - 1) / ROWS;
        if (id < (tile->before + down) * across) {
            tile->row = begin + (id / across - tile->before) * ROWS;
            tile->end = end;
            tile->column = id % across * HALF;
            return true;
        }
        tile->before += down;
    }
    return false;
}

/* The loading group. Rows past an expert's last are fetched from the last: what comes of them is not stored. */
__device__ static inline void load_tiles(uint32_t ring, const bf16 *x, const int *entry, int K, const CUtensorMap *w,
                                         const int *offset, int E, int C, int H) {
    int first = threadIdx.x / 8, piece = threadIdx.x % 8, place = first * 128 + (piece ^ first % 8) * 16;
    int step = 0;
    Tile tile = {};
    for (int id = blockIdx.x; find_tile(&tile, id, offset, E, H); id += gridDim.x) {
        const bf16 *from[ROWS / ROWS_AT_ONCE];
#pragma unroll
        for (int i = 0; i < ROWS / ROWS_AT_ONCE; i++) {
            int row = min(tile.row + first + ROWS_AT_ONCE * i, tile.end - 1);
            from[i] = x + (size_t)(entry[row] / K) * C + piece * 8;
        }
        for (int k = 0; k < C; k += DEPTH, step++) {
            uint32_t a = stage_of(ring, step), full = full_of(ring, step);
            barrier_wait(empty_of(ring, step), parity_of(step) ^ 1);
            if (threadIdx.x == 0) {
                barrier_arrive_expect(full, STAGE_BYTES - A_BYTES);
                copy_box(a + A_BYTES, w, k, tile.column, tile.expert, full);
                copy_box(a + A_BYTES + HALF * DEPTH * 2, w, k, H + tile.column, tile.expert, full);
            }
#pragma unroll
            for (int i = 0; i < ROWS / ROWS_AT_ONCE; i++) { /* row % 8 is the same for all i */
                copy_16(a + place + ROWS_AT_ONCE * 128 * i, from[i] + k);
            }
            barrier_arrive_copied(full);
        }
    }
}

/* The warp group's 64 rows of a tile, from its sums; t: thread of the group. */
template <bool ACTIVATE>
__device__ static inline void store_tile(bf16 *a, bf16 *h, const float (&sum)[128], const Tile &tile, int group, int t,
                                         int H) {
    int row = tile.row + 64 * group + t / 32 * 16 + t % 32 / 4, column = tile.column + t % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; half++, row += 8) {
        bf16 *a_row = a + (size_t)row * 2 * H + column, *h_row = h + (size_t)row * H + column;
#pragma unroll
        for (int j = 0; j < HALF / 8; j++) {
            const float *g = &sum[4 * j + 2 * half], *u = g + HALF / 2;
            __nv_bfloat162 gate = __floats2bfloat162_rn(g[0], g[1]), up = __floats2bfloat162_rn(u[0], u[1]);
            if (row < tile.end) {
                *(__nv_bfloat162 *)(a_row + 8 * j) = gate;
                *(__nv_bfloat162 *)(a_row + H + 8 * j) = up;
                if (ACTIVATE) {
                    *(__nv_bfloat162 *)(h_row + 8 * j) = swiglu(gate, up);
                }
            }
        }
    }
}

/* A multiplying group. A stage is handed back when the next one's product is queued and its own is finished: the tensor
 * cores always have work ahead. */
template <bool ACTIVATE>
__device__ static inline void multiply_tiles(bf16 *a, bf16 *h, uint32_t ring, const int *offset, int E, int C, int H) {
    int group = threadIdx.x / GROUP - 1, t = threadIdx.x % GROUP, step = 0;
    float sum[128];
    Tile tile = {};
    for (int id = blockIdx.x; find_tile(&tile, id, offset, E, H); id += gridDim.x) {
        for (int k = 0; k < C; k += DEPTH, step++) {
            uint32_t stage = stage_of(ring, step);
            barrier_wait(full_of(ring, step), parity_of(step));
            fence_async();
            multiply_stage(sum, stage + group * (A_BYTES / 2), stage + A_BYTES, k > 0);
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
        store_tile<ACTIVATE>(a, h, sum, tile, group, t, H);
    }
}

#endif

/* Grid: a block to a multiprocessor; it takes every gridDim.x-th tile. Map: w (E,2H,C). */
template <bool ACTIVATE>
static __global__ void __launch_bounds__(THREADS, 1)
    product_kernel(bf16 *a, bf16 *h, const bf16 *x, const int *entry, int K, const __grid_constant__ CUtensorMap w,
                   const int *offset, int E, int C, int H) {
#ifdef HOPPER_CODE
    extern __shared__ char shared[];
    uint32_t ring = ((uint32_t)__cvta_generic_to_shared(shared) + 1023) & ~1023u;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full_of(ring, i), 1 + GROUP);
            barrier_init(empty_of(ring, i), 2);
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < GROUP) {
        load_tiles(ring, x, entry, K, &w, offset, E, C, H);
    } else {
        multiply_tiles<ACTIVATE>(a, h, ring, offset, E, C, H);
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

enum { SLOT_A, SLOT_H };

/* a and, where asked for, h. */
template <bool ACTIVATE>
static ProductResult multiply(const ProductInputs *in) {
    const LadderTokens *t = &in->tokens;
    int C = t->C, H = in->N / 2, multiprocessors;
    if (C % DEPTH != 0 || in->N % COLUMNS != 0) {
        fprintf(stderr, "C must be a multiple of %d and 2H of %d, not %d and %d\n", DEPTH, COLUMNS, C, in->N);
        exit(1);
    }
    bf16 *a = (bf16 *)ladder_memory(SLOT_A, (size_t)t->rows * 2 * H * sizeof(bf16));
    bf16 *h = (bf16 *)ladder_memory(SLOT_H, (size_t)t->rows * H * sizeof(bf16));
    CUDA(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
    CUDA(cudaFuncSetAttribute(product_kernel<ACTIVATE>, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES));
    product_kernel<ACTIVATE><<<multiprocessors, THREADS, SHARED_BYTES>>>(
        a, h, t->x, t->entry, t->K, tensor_map(in->w, C, 2 * H, t->E, HALF), t->offset, t->E, C, H);
    return {a, 0};
}

static ProductResult multiply_then_activate(const ProductInputs *in) {
    ProductResult out = multiply<false>(in);
    int rows = in->tokens.rows, packs = in->N / 16;
    activation_kernel<<<(rows * packs + 255) / 256, 256>>>(
        (int4 *)ladder_memory(SLOT_H, (size_t)rows * packs * sizeof(int4)), (const int4 *)out.y, rows, packs);
    return out;
}

/* Relative L2 error of one element of every row of h, against the activation in double of what a holds. */
static double hidden_error(const ProductInputs *in) {
    size_t rows = in->tokens.rows, H = in->N / 2;
    bf16 *a = (bf16 *)ladder_download(ladder_memory(SLOT_A, 0), rows * 2 * H * sizeof(bf16));
    bf16 *h = (bf16 *)ladder_download(ladder_memory(SLOT_H, 0), rows * H * sizeof(bf16));
    double off = 0, size = 0;
    for (size_t r = 0; r < rows; r++) {
        size_t c = ladder_hash(7, r) % H;
        double gate = __bfloat162float(a[r * 2 * H + c]), up = __bfloat162float(a[r * 2 * H + H + c]);
        double want = gate / (1 + exp(-gate)) * up, got = __bfloat162float(h[r * H + c]);
        off += (got - want) * (got - want);
        size += want * want;
    }
    free(a);
    free(h);
    return sqrt(off / size);
}

/* The ladder checks a. The first call at a shape, which is not timed, checks h as well. */
template <class Multiply>
static int activation_ladder(const char *level, Multiply multiply) {
    const bf16 *checked = NULL;
    int h_wrong = 0;
    int a_wrong = product_ladder(level, [&](const ProductInputs *in) {
        if (in->w != checked) {
            checked = in->w;
            multiply(in);
            ladder_poison();
            multiply(in);
            double error = hidden_error(in);
            if (!(error < 4e-3)) {
                fprintf(stderr, "%s: h is wrong, error %.2e\n", level, error);
                h_wrong = 1;
            }
        }
        return multiply(in);
    });
    return a_wrong | h_wrong;
}

int main(void) {
    int major = 0;
    CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    if (major != 9) {
        fprintf(stderr, "level 7 is left out: it needs a Hopper GPU (compute capability 9.0)\n");
        return 0;
    }
    int wrong = activation_ladder("6, then activation", multiply_then_activate);
    return activation_ladder("7 epilogue fused", multiply<true>) | wrong;
}
