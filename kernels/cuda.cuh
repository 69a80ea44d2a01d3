/* What every .cu of this folder starts from: checked calls, the stream, scratch memory, packs of numbers, sums in a
 * fixed order.
 *
 *     #include "cuda.cuh"                 first: the C++ headers must not be seen inside extern "C"
 *     extern "C" {
 *     #include "op.h"                     the contract, shared with op.c
 *     }
 *
 * A launch is followed by CUDA_LAUNCHED(). Nothing here waits for the device, allocates while a step runs, or copies to
 * the host. Only .cu and .cuh files of kernels/, tests/ and experiments/ include it.
 */
#ifndef KERNELS_CUDA_CUH
#define KERNELS_CUDA_CUH

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern "C" {
#include "check.h"
#include "device.h"
#include "types.h"
}

/* ---- calls ---- */

#define CUDA_CHECK(call)                                                                   \
    do {                                                                                   \
        cudaError_t cuda_error = (call);                                                   \
        CHECK(cuda_error == cudaSuccess, "%s: %s", #call, cudaGetErrorString(cuda_error)); \
    } while (0)

#define CUDA_LAUNCHED() CUDA_CHECK(cudaGetLastError())

/* The CUDA stream behind a Stream; NULL stands for the program's one stream, which is not the legacy default stream, so
 * that a graph can be captured from it. */
cudaStream_t cuda_stream(Stream *stream);

/* At least `bytes` of device memory, 256-byte aligned, for the call that asks: the next operation that is queued may
 * overwrite it. Grows when more is asked for than ever before (a step that ran once never makes it grow again); what it
 * grew out of stays allocated, because a recorded step may hold its address. */
void *cuda_workspace(size_t bytes);

int cuda_multiprocessors(void);
size_t cuda_shared_memory(void); /* bytes of one multiprocessor */
int cuda_capability(void);       /* 90 for Hopper, 80 for Ampere */

KernelPath cuda_fastest_path(void); /* that an operation may take: device_use_path */

static inline int ceil_div(int64_t a, int64_t b) {
    return (int)((a + b - 1) / b);
}

/* ---- numbers: stored as real_t, computed in float ---- */

__host__ __device__ static inline float to_float(float x) {
    return x;
}
__host__ __device__ static inline float to_float(__nv_bfloat16 x) {
    return __bfloat162float(x);
}

/* to_real<real_t>(x): rounds to nearest even */
template <class T>
__host__ __device__ static inline T to_real(float x);
template <>
__host__ __device__ inline float to_real<float>(float x) {
    return x;
}
template <>
__host__ __device__ inline __nv_bfloat16 to_real<__nv_bfloat16>(float x) {
    return __float2bfloat16(x);
}

/* 2^x in one instruction, 0 for results below the smallest normal float; exp2f takes four for the sake of those. */
__device__ static inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 16 bytes of numbers, moved by one instruction: 8 of bf16, 4 of float. The address must be a multiple of 16. */
template <class T>
struct alignas(16) Pack {
    enum { COUNT = 16 / sizeof(T) };
    T v[COUNT];
};

template <class T>
__device__ static inline Pack<T> load_pack(const T *from) {
    Pack<T> pack;
    *reinterpret_cast<int4 *>(&pack) = *reinterpret_cast<const int4 *>(from);
    return pack;
}

/* The same, or zeros. Several in a row are on their way at once; in branches around load_pack each would wait for the
 * one before, for the compiler takes a pack apart where it was loaded. */
template <class T>
__device__ static inline Pack<T> load_pack_if(bool there, const T *from) {
    const int4 bits = there ? *reinterpret_cast<const int4 *>(from) : make_int4(0, 0, 0, 0);
    Pack<T> pack;
    *reinterpret_cast<int4 *>(&pack) = bits;
    return pack;
}

template <class T>
__device__ static inline void store_pack(T *to, const Pack<T> &pack) {
    *reinterpret_cast<int4 *>(to) = *reinterpret_cast<const int4 *>(&pack);
}

/* Number j of a pack. Of bf16 by bits, a bf16 being the upper half of a float: the compiler would first move each odd
 * one into a register of its own. */
__device__ static inline float float_at(const Pack<float> &pack, int j) {
    return pack.v[j];
}
__device__ static inline float float_at(const Pack<__nv_bfloat16> &pack, int j) {
    const uint32_t two = reinterpret_cast<const uint32_t *>(&pack)[j / 2];
    return __uint_as_float(j % 2 ? two & 0xffff0000u : two << 16);
}

/* Whether rows of `width` numbers can be moved in packs: then every row starts at a multiple of 16 bytes. */
template <class T>
static inline bool packs_fit(const T *p, int width) {
    return width % Pack<T>::COUNT == 0 && reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

/* ---- reductions: butterflies and trees of fixed shape, so that the same numbers give the same bits ---- */

__device__ static inline float warp_sum(float x) {
    for (int lane = 16; lane > 0; lane /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, lane);
    }
    return x;
}

__device__ static inline double warp_sum(double x) {
    for (int lane = 16; lane > 0; lane /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, lane);
    }
    return x;
}

__device__ static inline float warp_max(float x) {
    for (int lane = 16; lane > 0; lane /= 2) {
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
    }
    return x;
}

/* The sum of x over the lanes up to this one, which is `lane`. */
__device__ static inline int warp_running_sum(int x, int lane) {
    for (int step = 1; step < 32; step *= 2) {
        const int below = __shfl_up_sync(0xffffffffu, x, step);
        x += lane >= step ? below : 0;
    }
    return x;
}

/* The sum over a block of whole warps, at most 1024 threads, in every thread. All threads call it; two calls in a row
 * are safe. */
template <class T>
__device__ static inline T block_sum(T x) {
    __shared__ T part[32];
    int warp = threadIdx.x / 32, warps = (blockDim.x + 31) / 32;
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        part[warp] = x;
    }
    __syncthreads();
    return warp_sum((int)(threadIdx.x % 32) < warps ? part[threadIdx.x % 32] : (T)0);
}

__device__ static inline float block_max(float x) {
    __shared__ float part[32];
    int warp = threadIdx.x / 32, warps = (blockDim.x + 31) / 32;
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        part[warp] = x;
    }
    __syncthreads();
    return warp_max((int)(threadIdx.x % 32) < warps ? part[threadIdx.x % 32] : -INFINITY);
}

#endif
