/* A warp for each row, its lanes every 32nd number; for fp8 they find the largest together. Called by
 * model/exchange_wire.c. */
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "cuda.cuh"

extern "C" {
#include "wire.h"
}

enum { THREADS = 256, ROW_ALIGNMENT = 16 };

#define LARGEST_FP8 448.0f

static size_t number_bytes(WireType type) {
    return type == WIRE_SAME ? sizeof(real_t) : type == WIRE_FP32 ? sizeof(float) : type == WIRE_FP8 ? 1 : 2;
}

size_t wire_row_bytes(WireType type, int C) {
    size_t bytes = C * number_bytes(type) + (type == WIRE_FP8 ? sizeof(float) : 0);
    return type == WIRE_SAME ? bytes : (bytes + ROW_ALIGNMENT - 1) / ROW_ALIGNMENT * ROW_ALIGNMENT;
}

/* A number of the format T, from and to float. */
__device__ static inline void put(float *to, float x) {
    *to = x;
}
__device__ static inline void put(__nv_bfloat16 *to, float x) {
    *to = __float2bfloat16_rn(x);
}
__device__ static inline void put(__half *to, float x) {
    *to = __float2half_rn(x);
}
__device__ static inline void put(__nv_fp8_e4m3 *to, float x) {
    to->__x = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
}
__device__ static inline float get(float x) {
    return x;
}
__device__ static inline float get(__nv_bfloat16 x) {
    return __bfloat162float(x);
}
__device__ static inline float get(__half x) {
    return __half2float(x);
}
__device__ static inline float get(__nv_fp8_e4m3 x) {
    return float(x);
}

/* Of a row in fp8, by its warp; 1 where all is zero, NaN where a number is. fmaxf passes NaN over, hence the sum. */
__device__ static float row_scale(const real_t *x, int C) {
    float largest = 0, strange = 0;
    for (int c = threadIdx.x % 32; c < C; c += 32) {
        float a = fabsf(to_float(x[c]));
        largest = fmaxf(largest, a);
        strange += a - a; /* NaN or infinite: NaN */
    }
    for (int step = 16; step > 0; step /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
        strange += __shfl_xor_sync(0xffffffffu, strange, step);
    }
    return (largest == 0 ? 1 : largest / LARGEST_FP8) + strange;
}

template <class T, bool SCALED>
__global__ static void pack_rows(char *packed, const real_t *x, size_t bytes, int rows, int C) {
    int r = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (r >= rows) {
        return;
    }
    T *to = reinterpret_cast<T *>(packed + r * bytes);
    x += (size_t)r * C;
    float scale = SCALED ? row_scale(x, C) : 1;
    for (int c = lane; c < C; c += 32) {
        put(to + c, SCALED ? to_float(x[c]) / scale : to_float(x[c]));
    }
    if (SCALED && lane == 0) {
        reinterpret_cast<float *>(packed + (r + 1) * bytes)[-1] = scale;
    }
}

template <class T, bool SCALED>
__global__ static void unpack_rows(real_t *x, const char *packed, size_t bytes, int rows, int C) {
    int r = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (r >= rows) {
        return;
    }
    const T *from = reinterpret_cast<const T *>(packed + r * bytes);
    float scale = SCALED ? reinterpret_cast<const float *>(packed + (r + 1) * bytes)[-1] : 1;
    for (int c = threadIdx.x % 32; c < C; c += 32) {
        x[(size_t)r * C + c] = to_real<real_t>(get(from[c]) * scale);
    }
}

template <class T, bool SCALED = false>
static void pack(void *packed, const real_t *x, size_t bytes, int rows, int C, cudaStream_t stream) {
    pack_rows<T, SCALED><<<ceil_div(rows, THREADS / 32), THREADS, 0, stream>>>((char *)packed, x, bytes, rows, C);
    CUDA_LAUNCHED();
}

template <class T, bool SCALED = false>
static void unpack(real_t *x, const void *packed, size_t bytes, int rows, int C, cudaStream_t stream) {
    unpack_rows<T, SCALED>
        <<<ceil_div(rows, THREADS / 32), THREADS, 0, stream>>>(x, (const char *)packed, bytes, rows, C);
    CUDA_LAUNCHED();
}

void wire_pack(void *packed, const real_t *x, WireType type, int rows, int C, Stream *stream) {
    size_t bytes = wire_row_bytes(type, C);
    cudaStream_t queue = cuda_stream(stream);
    if (rows == 0) {
        return;
    }
    switch (type) {
        case WIRE_BF16: pack<__nv_bfloat16>(packed, x, bytes, rows, C, queue); break;
        case WIRE_FP16: pack<__half>(packed, x, bytes, rows, C, queue); break;
        case WIRE_FP8: pack<__nv_fp8_e4m3, true>(packed, x, bytes, rows, C, queue); break;
        default: pack<float>(packed, x, bytes, rows, C, queue);
    }
}

void wire_unpack(real_t *x, const void *packed, WireType type, int rows, int C, Stream *stream) {
    size_t bytes = wire_row_bytes(type, C);
    cudaStream_t queue = cuda_stream(stream);
    if (rows == 0) {
        return;
    }
    switch (type) {
        case WIRE_BF16: unpack<__nv_bfloat16>(x, packed, bytes, rows, C, queue); break;
        case WIRE_FP16: unpack<__half>(x, packed, bytes, rows, C, queue); break;
        case WIRE_FP8: unpack<__nv_fp8_e4m3, true>(x, packed, bytes, rows, C, queue); break;
        default: unpack<float>(x, packed, bytes, rows, C, queue);
    }
}
