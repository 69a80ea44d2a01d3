/* Hopper's own instructions, one small function each: asynchronous copies, the barriers they report to, the product of
 * a warp group. Meanings and limits are in the PTX manual under the instruction's name; here stands what is used.
 *
 * Swizzled tiles. A tile in shared memory is made of rows of 128 bytes, 64 numbers. The 16-byte piece c of row r lies
 * at place c ^ (r % 8) of the row: 8 rows that are read at the same c then meet all 32 banks. The tensor copy engine
 * (TMA) writes this order, wgmma reads it, and swizzled() is for threads that write or read it themselves. Tiles start
 * at multiples of 1024 bytes.
 *
 *     operand A, 64 rows of the result, or B, 64 to 256 columns, k numbers deep; a tile row holds
 *     "deep"     64 consecutive k of one row of the result:    8 rows are 1024 bytes; 16 k further is 32 bytes further
 *     "across"   64 consecutive rows (columns) at one k:       8 k are 1024 bytes; 16 k further is 2048 bytes further;
 *                                                              the next 64 columns follow after 64 k, 8192 bytes
 *
 * Two worlds of shared memory. TMA and wgmma see it through their own path (the async proxy). What ordinary stores or
 * cp.async wrote must pass fence_async() after it is known to have arrived and before wgmma reads it. What ordinary
 * loads read must pass it before TMA is told that it may write there again: loads wait in line behind stores, and a
 * barrier alone does not wait for them.
 */
#ifndef KERNELS_WGMMA_CUH
#define KERNELS_WGMMA_CUH

#include "mma.cuh"

#include <cuda.h>
#include <cudaTypedefs.h>

/* Whether these instructions exist where this is compiled. The host's pass sees the same functions as Hopper's; for
 * other cards the kernels are empty, and never launched, or made of what mma.cuh has. */
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER_CODE
#endif

/* ---- barriers: 8 bytes of shared memory that count arrivals and bytes; a phase ends when both are complete ---- */

__device__ static inline void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

/* Makes initialised barriers visible to the copy engine and to the other blocks of the cluster. */
__device__ static inline void barrier_init_fence(void) {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ static inline void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/* Arrives at the barrier at the same place in the shared memory of block `rank` of the cluster. What is ordered before
 * it is what the thread did in its own block: a release for the whole cluster would wait for memory. */
__device__ static inline void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

/* Arrives, and the phase does not end before the copy engine has written `bytes`. */
__device__ static inline void barrier_arrive_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

/* Arrives when all copy_16 of the calling thread so far have arrived. */
__device__ static inline void barrier_arrive_copied(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

/* Waits for the end of the phase of this parity: 0 for the first, 1 for the second, 0 for the third, ... */
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

/* ---- copies to shared memory ---- */

/* One box of a tensor map, at coordinates x (innermost), y, z. What lies outside of the tensor arrives as zeros. */
__device__ static inline void copy_box(uint32_t to, const CUtensorMap *map, int x, int y, int z, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier)
        : "memory");
}

/* One box to the same place in each block of the cluster whose bit is set; each block's own barrier is told. */
__device__ static inline void copy_box_to(uint16_t blocks, uint32_t to, const CUtensorMap *map, int x, int y, int z,
                                          uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier), "h"(blocks)
        : "memory");
}

/* copy_box of a tensor of four dimensions. */
__device__ static inline void copy_box(uint32_t to, const CUtensorMap *map, int x, int y, int z, int w,
                                       uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier)
        : "memory");
}

/* `bytes` in a run, a multiple of 16, from and to multiples of 16. */
__device__ static inline void copy_run(uint32_t to, const void *from, int bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

/* The same from shared memory, which must have passed fence_async(), to any memory that this card reaches; a thread's
 * copies since the last commit are a group. */
__device__ static inline void store_run(void *to, uint32_t from, int bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
                 : "memory");
}

__device__ static inline void store_commit(void) {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/* Until what the thread's groups store has been read; until it is there. */
__device__ static inline void store_wait_read(void) {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

__device__ static inline void store_wait(void) {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

/* Where 16-byte piece `piece` of row `row` lies in the swizzled tile at `tile`. */
__device__ static inline uint32_t swizzled(uint32_t tile, int row, int piece) {
    return tile + row * 128 + (piece ^ row % 8) * 16;
}

__device__ static inline void fence_async(void) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* The 128 threads of one warp group meet; `id` 1 to 15 names the barrier. */
__device__ static inline void group_sync(int id) {
    asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory");
}

/* ---- clusters: blocks that run side by side and see each other's shared memory ---- */

__device__ static inline uint32_t cluster_rank(void) {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/* All threads of all blocks of the cluster meet, warp by warp. Nothing that they wrote is promised to the others but
 * barriers before barrier_init_fence: a release for the whole cluster would wait for memory. */
__device__ static inline void cluster_sync(void) {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/* The end of a kernel: no block of the cluster goes before all that they told each other's barriers has arrived. What a
 * block tells another just before it ends may be lost. */
__device__ static inline void cluster_end(void) {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/* Writes a number into the shared memory of block `rank`, whose barrier counts its 4 bytes. */
__device__ static inline void post_to(uint32_t rank, uint32_t to, int value, uint32_t barrier) {
    asm volatile(
        "{\n.reg .b32 slot, there;\nmapa.shared::cluster.u32 slot, %0, %3;\n"
        "mapa.shared::cluster.u32 there, %2, %3;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [slot], %1, [there];\n}" ::"r"(to),
        "r"(value), "r"(barrier), "r"(rank)
        : "memory");
}

/* ---- registers: a warp group hands back or takes some of the multiprocessor's 64K ---- */

template <int COUNT>
__device__ static inline void registers_release(void) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ static inline void registers_claim(void) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

/* ---- the product of a warp group ---- */

/* How a swizzled tile is described to wgmma: address, distance of blocks of 64 ("across" alone), distance of 8 rows,
 * all in units of 16 bytes; the top bits name the swizzle. A distance of x bytes within the tile adds x >> 4. */
__device__ static inline uint64_t tile_description(uint32_t address) {
    return (uint64_t)1 << 62 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)(8192 >> 4) << 16 | (address & 0x3ffff) >> 4;
}

/* The same of what lies `at` bytes into a tile, for addresses below 256 KB; one addition in 32 bits where `at` is a
 * constant. */
__device__ static inline uint64_t tile_description(uint32_t tile, uint32_t at) {
    uint32_t low = (tile >> 4) + ((8192 >> 4 << 16) + (at >> 4)), high = 1024 >> 4 | 1u << 30;
    return (uint64_t)high << 32 | low;
}

/* Before the first wgmma that uses registers or shared memory which this warp group has touched. */
__device__ static inline void wgmma_begin(void) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

/* Closes a batch of wgmma; wgmma_wait<n>() waits until at most the n latest batches are unfinished. */
__device__ static inline void wgmma_commit(void) {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int UNFINISHED>
__device__ static inline void wgmma_wait(void) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(UNFINISHED) : "memory");
}

#define SUMS_4(sum, i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])

/* Keeps the compiler from reading sums before the wait above this. */
template <int COUNT>
__device__ static inline void wgmma_settle(float (&sum)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
        asm volatile("" : SUMS_4(sum, i)::"memory");
    }
}

#define SUMS_16(sum, i) SUMS_4(sum, i), SUMS_4(sum, i + 4), SUMS_4(sum, i + 8), SUMS_4(sum, i + 12)
#define NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_32 NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_48 NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_64 NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

/* sum (64 x N) = or += A (64 x 16) B (16 x N), bf16 to float; a, b: tile_description. ACROSS_A, ACROSS_B: 1 for tiles
 * that lie "across", 0 "deep". Thread t of the warp group holds, for every block j of 8 columns and half = 0, 1,
 *     row 16 (t/32) + 8 half + t%32 / 4,   columns 8j + 2 (t%4) and + 1   in   sum[4j + 2 half] and + 1 */
template <int ACROSS_A, int ACROSS_B>
__device__ static inline void wgmma(float (&sum)[128], uint64_t a, uint64_t b, int add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" NAMES_64
        ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
        "%128, %129, add, 1, 1, %131, %132;\n}"
        : SUMS_16(sum, 0), SUMS_16(sum, 16), SUMS_16(sum, 32), SUMS_16(sum, 48), SUMS_16(sum, 64), SUMS_16(sum, 80),
          SUMS_16(sum, 96), SUMS_16(sum, 112)
        : "l"(a), "l"(b), "r"(add), "n"(ACROSS_A), "n"(ACROSS_B));
}

template <int ACROSS_A, int ACROSS_B>
__device__ static inline void wgmma(float (&sum)[64], uint64_t a, uint64_t b, int add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES_64 "}, %64, %65, add, 1, 1, %67, %68;\n}"
        : SUMS_16(sum, 0), SUMS_16(sum, 16), SUMS_16(sum, 32), SUMS_16(sum, 48)
        : "l"(a), "l"(b), "r"(add), "n"(ACROSS_A), "n"(ACROSS_B));
}

template <int ACROSS_A, int ACROSS_B>
__device__ static inline void wgmma(float (&sum)[32], uint64_t a, uint64_t b, int add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES_32 "}, %32, %33, add, 1, 1, %35, %36;\n}"
        : SUMS_16(sum, 0), SUMS_16(sum, 16)
        : "l"(a), "l"(b), "r"(add), "n"(ACROSS_A), "n"(ACROSS_B));
}

/* sum += A B with A in registers, each warp's 16 rows as mma() takes them. */
#define WORDS_4(a) "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])

template <int ACROSS_B>
__device__ static inline void wgmma(float (&sum)[64], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES_64
        "}, {%64, %65, %66, %67}, %68, add, 1, 1, %69;\n}"
        : SUMS_16(sum, 0), SUMS_16(sum, 16), SUMS_16(sum, 32), SUMS_16(sum, 48)
        : WORDS_4(a), "l"(b), "n"(ACROSS_B));
}

template <int ACROSS_B>
__device__ static inline void wgmma(float (&sum)[48], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {" NAMES_48
        "}, {%48, %49, %50, %51}, %52, add, 1, 1, %53;\n}"
        : SUMS_16(sum, 0), SUMS_16(sum, 16), SUMS_16(sum, 32)
        : WORDS_4(a), "l"(b), "n"(ACROSS_B));
}

template <int ACROSS_B>
__device__ static inline void wgmma(float (&sum)[32], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES_32
        "}, {%32, %33, %34, %35}, %36, add, 1, 1, %37;\n}"
        : SUMS_16(sum, 0), SUMS_16(sum, 16)
        : WORDS_4(a), "l"(b), "n"(ACROSS_B));
}

template <int ACROSS_B>
__device__ static inline void wgmma(float (&sum)[16], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" NAMES_16
        "}, {%16, %17, %18, %19}, %20, add, 1, 1, %21;\n}"
        : SUMS_16(sum, 0)
        : WORDS_4(a), "l"(b), "n"(ACROSS_B));
}

/* ---- the host's side ---- */

/* A contiguous tensor of bf16 or float (`size` 2 or 4 bytes), extent[0] innermost, fetched in boxes that are 128 bytes
 * wide, swizzled; `fetch`: how much of memory a miss brings into L2. Base and row length must be multiples of 16 bytes.
 * The driver's function is asked for by name, so that nothing links with it. */
static CUtensorMap tensor_map(const void *base, int size, int rank, const int *extent, const int *box,
                              CUtensorMapL2promotion fetch) {
    static PFN_cuTensorMapEncodeTiled_v12000 encode = NULL;
    if (!encode) {
        cudaDriverEntryPointQueryResult found;
        CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void **)&encode, 12000,
                                                    cudaEnableDefault, &found));
        CHECK(found == cudaDriverEntryPointSuccess, "the NVIDIA driver has no tensor maps: update it");
    }
    CUtensorMap map;
    cuuint64_t extents[5], pitch[5], bytes = size; /* pitch[i]: from one to the next in dimension i + 1 */
    cuuint32_t boxes[5], step[5] = {1, 1, 1, 1, 1};
    for (int i = 0; i < rank; i++) {
        extents[i] = extent[i];
        boxes[i] = box[i];
        pitch[i] = bytes *= extent[i];
    }
    CUtensorMapDataType type = size == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    CUresult result = encode(&map, type, rank, (void *)base, extents, pitch, boxes, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                             CU_TENSOR_MAP_SWIZZLE_128B, fetch, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    CHECK(result == CUDA_SUCCESS, "no tensor map for %d x %d numbers of %d bytes (rank %d): error %d", extent[1],
          extent[0], size, rank, (int)result);
    return map;
}

#endif
