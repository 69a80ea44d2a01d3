/* The instructions of Ampere and later that bf16 products are made of, one small function each: copies from memory to
 * shared memory past the registers, from there blocks of 8 x 8 numbers to registers, the product of a warp. Where the
 * numbers lie in shared memory is the caller's affair: mma_tile.cuh, soft_product.cuh and attention_tiles.cuh each have
 * their own layout, gate.cu multiplies what it has read into registers.
 *
 * Of a result of 16 x 8, lane 4 g + t of the warp holds row g + 8 (i / 2), column 2 t + i % 2 in sum[i].
 * Read next: mma_tile.cuh; wgmma.cuh for what Hopper adds.
 */
#ifndef KERNELS_MMA_CUH
#define KERNELS_MMA_CUH

#include "cuda.cuh"

/* How these instructions name a place in shared memory. */
__device__ static inline uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* ---- copies to shared memory, 16 bytes by the calling thread, both ends at multiples of 16 ---- */

__device__ static inline void copy_16(uint32_t to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

/* The first `bytes` of 16, then zeros. */
__device__ static inline void copy_padded(uint32_t to, const void *from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

/* 16 bytes, or 16 zeros where `there` is false (then nothing is read). */
__device__ static inline void copy_16_if(uint32_t to, const void *from, bool there) {
    copy_padded(to, from, there ? 16 : 0);
}

/* Closes a batch of the thread's copies; copies_wait<n>() waits until at most the n latest batches are on their way. */
__device__ static inline void copies_end(void) {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int UNFINISHED>
__device__ static inline void copies_wait(void) {
    asm volatile("cp.async.wait_group %0;" ::"n"(UNFINISHED) : "memory");
}

/* All of the thread's copies, closed or not. */
__device__ static inline void copies_wait_all(void) {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

/* ---- shared memory by its address ---- */

__device__ static inline uint4 load_16(uint32_t from) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(from)
                 : "memory");
    return v;
}

__device__ static inline void store_16(uint32_t to, uint4 v) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ static inline void store_4(uint32_t to, uint32_t v) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(v) : "memory");
}

/* ---- the product of a warp ---- */

/* Four blocks, by all threads of a warp: lane 8 i + j names the address of row j of block i, 16 bytes. Lane 4 g + t is
 * given, in r[i], columns 2 t and 2 t + 1 of row g of block i; TURNED: rows 2 t and 2 t + 1 of column g. */
template <bool TURNED>
__device__ static inline void load_matrices(uint32_t (&r)[4], uint32_t from) {
    if (TURNED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(from)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(from)
                     : "memory");
    }
}

/* sum (16,8) += a (16,16) b (16,8). a: what load_matrices gives of the blocks at row and inner index (0,0), (8,0),
 * (0,8), (8,8). b0, b1: of the blocks at inner indices 0 and 8, TURNED where the inner index runs down the rows. */
__device__ static inline void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif
