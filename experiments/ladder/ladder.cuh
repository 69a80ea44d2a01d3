/* What every rung of the ladders needs and none is about: inputs, memory, timing, the check, one JSON line of result.
 *
 * A rung is a program of its own. It defines one function that does the whole operation, from what a router leaves on
 * the device to the result, and hands it to product_ladder or dispatch_ladder:
 *
 *     int main(void) { return product_ladder("1 cublas loop", multiply); }
 *
 * The function may wait for the device; that is then part of its time. Memory it gets from ladder_memory, which
 * allocates on the first, untimed call. A time is the median of 20 runs after 3 untimed ones.
 *
 * Build one:  nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a FILE model/commit.c -lcublas   (80, sm_80 for
 * Ampere). Build and run all:  experiments/ladder/run.sh
 */
#ifndef LADDER_CUH
#define LADDER_CUH

#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern "C" {
#include "../../model/commit.h"
}

#define CUDA(call)                                                                                         \
    do {                                                                                                   \
        cudaError_t cuda_error = (call);                                                                   \
        if (cuda_error != cudaSuccess) {                                                                   \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(cuda_error)); \
            exit(1);                                                                                       \
        }                                                                                                  \
    } while (0)

#define BLAS(call)                                                                                             \
    do {                                                                                                       \
        cublasStatus_t blas_status = (call);                                                                   \
        if (blas_status != CUBLAS_STATUS_SUCCESS) {                                                            \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cublasGetStatusString(blas_status)); \
            exit(1);                                                                                           \
        }                                                                                                      \
    } while (0)

typedef __nv_bfloat16 bf16;

/* ---- memory ---- */

enum { LADDER_SLOTS = 16 };

static struct {
    void *p;
    size_t bytes;
} ladder_slots[LADDER_SLOTS];

/* At least `bytes` of device memory, the same for the same slot until more is asked for. */
static inline void *ladder_memory(int slot, size_t bytes) {
    if (ladder_slots[slot].bytes < bytes) {
        CUDA(cudaFree(ladder_slots[slot].p));
        CUDA(cudaMalloc(&ladder_slots[slot].p, bytes));
        ladder_slots[slot].bytes = bytes;
    }
    return ladder_slots[slot].p;
}

/* NaN in all of it, so that what a run leaves out is found. */
static inline void ladder_poison(void) {
    for (int i = 0; i < LADDER_SLOTS; i++) {
        CUDA(cudaMemset(ladder_slots[i].p, 0xff, ladder_slots[i].bytes));
    }
}

static inline void *ladder_upload(const void *from, size_t bytes) {
    void *to = NULL;
    CUDA(cudaMalloc(&to, bytes));
    CUDA(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice));
    return to;
}

static inline void *ladder_download(const void *from, size_t bytes) {
    void *to = malloc(bytes);
    CUDA(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost));
    return to;
}

/* Ends a line of results with where it comes from. */
static inline void ladder_end_line(void) {
    cudaDeviceProp device;
    CUDA(cudaGetDeviceProperties(&device, 0));
    printf(",\"device\":\"%s\",\"commit\":\"%s\"}\n", device.name, commit_name());
    fflush(stdout);
}

/* ---- random numbers: a hash of (seed, index), so that order does not matter ---- */

__host__ __device__ static inline uint32_t ladder_hash(uint32_t seed, uint64_t index) {
    uint64_t z = (index + 1) * 0x9e3779b97f4a7c15ull + seed * 0xd1342543de82ef95ull;
    z = (z ^ (z >> 32)) * 0xd6e8feb86659fd93ull;
    z = (z ^ (z >> 32)) * 0xd6e8feb86659fd93ull;
    return (uint32_t)(z >> 32);
}

/* Grid: a thread to a number, normal with the given deviation. */
static __global__ void ladder_normal_kernel(bf16 *x, size_t count, uint32_t seed, float deviation) {
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i < count) {
        float radius = sqrtf(-2 * logf((ladder_hash(seed, 2 * i) + 1.0f) / 4294967808.0f));
        x[i] = __float2bfloat16(deviation * radius * cospif(ladder_hash(seed, 2 * i + 1) / 2147483648.0f));
    }
}

static inline bf16 *ladder_normal(size_t count, uint32_t seed, float deviation) {
    bf16 *x = NULL;
    CUDA(cudaMalloc(&x, count * sizeof *x));
    ladder_normal_kernel<<<(unsigned)((count + 255) / 256), 256>>>(x, count, seed, deviation);
    CUDA(cudaGetLastError());
    return x;
}

/* ---- routing: each of T tokens goes to K different experts, all equally likely ---- */

typedef struct {
    int T, K, E, C;
    int rows;          /* T K */
    const bf16 *x;     /* (T,C) */
    const int *expert; /* (T,K), what a router writes */
    const int *entry;  /* (rows): row r is choice entry[r] % K of token entry[r] / K; by (expert, token) */
    const int *offset; /* (E+1): rows of expert e are offset[e] .. offset[e+1] - 1 */
    int *host_expert, *host_entry, *host_offset; /* the same on the host, for checks */
} LadderTokens;

static inline LadderTokens ladder_tokens(int T, int K, int E, int C) {
    LadderTokens in = {};
    in.T = T;
    in.K = K;
    in.E = E;
    in.C = C;
    in.rows = T * K;
    in.host_expert = (int *)malloc(in.rows * sizeof(int));
    in.host_entry = (int *)malloc(in.rows * sizeof(int));
    in.host_offset = (int *)calloc(E + 2, sizeof(int));
    for (int i = 0; i < in.rows; i++) {
        uint64_t draw = (uint64_t)i << 16;
        int again;
        do {
            in.host_expert[i] = ladder_hash(1, draw++) % E;
            again = 0;
            for (int j = i / K * K; j < i; j++) {
                again |= in.host_expert[j] == in.host_expert[i];
            }
        } while (again);
        in.host_offset[in.host_expert[i] + 2]++;
    }
    for (int e = 0; e < E; e++) {
        in.host_offset[e + 2] += in.host_offset[e + 1];
    }
    for (int i = 0; i < in.rows; i++) {
        in.host_entry[in.host_offset[in.host_expert[i] + 1]++] = i;
    }
    in.expert = (const int *)ladder_upload(in.host_expert, in.rows * sizeof(int));
    in.entry = (const int *)ladder_upload(in.host_entry, in.rows * sizeof(int));
    in.offset = (const int *)ladder_upload(in.host_offset, (E + 1) * sizeof(int));
    in.x = ladder_normal((size_t)T * C, 2, 1);
    return in;
}

/* ---- time ---- */

static inline int ladder_earlier(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Median milliseconds of run(in). */
template <class Run>
static inline float ladder_time(Run run) {
    enum { UNTIMED = 3, TIMED = 20 };
    cudaEvent_t begin, end;
    float ms[TIMED];
    CUDA(cudaEventCreate(&begin));
    CUDA(cudaEventCreate(&end));
    for (int i = -UNTIMED; i < TIMED; i++) {
        CUDA(cudaEventRecord(begin));
        run();
        CUDA(cudaEventRecord(end));
        CUDA(cudaEventSynchronize(end));
        CUDA(cudaEventElapsedTime(&ms[i < 0 ? 0 : i], begin, end));
    }
    CUDA(cudaGetLastError());
    qsort(ms, TIMED, sizeof *ms, ladder_earlier);
    return ms[TIMED / 2];
}

/* ---- the expert product: y = gather(x) W^T, a matrix for each expert ---- */

typedef struct {
    LadderTokens tokens;
    int N;         /* columns of y */
    const bf16 *w; /* (E,N,C) */
} ProductInputs;

/* Row r of expert e is row offset[e] + r of y (rows,N), or e * capacity + r where a capacity is given. */
typedef struct {
    const bf16 *y;
    int capacity;
} ProductResult;

static cublasHandle_t ladder_blas(void) {
    static cublasHandle_t handle;
    if (!handle) {
        BLAS(cublasCreate(&handle));
    }
    return handle;
}

/* One product of the same size, were all experts one: what the rungs are measured by. */
static inline double ladder_dense_tflops(const ProductInputs *in) {
    const LadderTokens *t = &in->tokens;
    const float one = 1, zero = 0;
    bf16 *x = ladder_normal((size_t)t->rows * t->C, 4, 1), *y = NULL;
    CUDA(cudaMalloc(&y, (size_t)t->rows * in->N * sizeof *y));
    float ms = ladder_time([&] {
        BLAS(cublasGemmEx(ladder_blas(), CUBLAS_OP_T, CUBLAS_OP_N, in->N, t->rows, t->C, &one, in->w, CUDA_R_16BF, t->C,
                          x, CUDA_R_16BF, t->C, &zero, y, CUDA_R_16BF, in->N, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
    });
    CUDA(cudaFree(x));
    CUDA(cudaFree(y));
    return 2.0 * t->rows * t->C * in->N / ms / 1e9;
}

/* Relative L2 error of one element of every row, against sums in double. */
static inline double product_error(const ProductInputs *in, ProductResult out) {
    const LadderTokens *t = &in->tokens;
    size_t C = t->C, N = in->N;
    size_t y_rows = out.capacity ? (size_t)t->E * out.capacity : t->rows;
    bf16 *x = (bf16 *)ladder_download(t->x, t->T * C * sizeof(bf16));
    bf16 *w = (bf16 *)ladder_download(in->w, t->E * N * C * sizeof(bf16));
    bf16 *y = (bf16 *)ladder_download(out.y, y_rows * N * sizeof(bf16));
    double off = 0, size = 0;
    for (int e = 0; e < t->E; e++) {
        for (int r = t->host_offset[e]; r < t->host_offset[e + 1]; r++) {
            size_t n = ladder_hash(5, r) % N;
            const bf16 *a = x + t->host_entry[r] / t->K * C, *b = w + (e * N + n) * C;
            double sum = 0;
            for (size_t c = 0; c < C; c++) {
                sum += (double)__bfloat162float(a[c]) * __bfloat162float(b[c]);
            }
            size_t row = out.capacity ? (size_t)e * out.capacity + r - t->host_offset[e] : r;
            double got = __bfloat162float(y[row * N + n]);
            off += (got - sum) * (got - sum);
            size += sum * sum;
        }
    }
    free(x);
    free(w);
    free(y);
    return sqrt(off / size);
}

/* Runs the rung at both shapes. Returns 1 if a result is wrong. */
template <class Multiply>
static int product_ladder(const char *level, Multiply multiply) {
    const struct { int T, K, E, C, N; } shapes[] = {{32768, 2, 8, 768, 4096}, {24576, 8, 128, 1536, 512}};
    int wrong = 0;
    for (auto shape : shapes) {
        ProductInputs in = {ladder_tokens(shape.T, shape.K, shape.E, shape.C), shape.N, NULL};
        in.w = ladder_normal((size_t)shape.E * shape.N * shape.C, 3, 1 / sqrtf((float)shape.C));
        multiply(&in);
        ladder_poison();
        ProductResult out = multiply(&in);
        CUDA(cudaDeviceSynchronize());
        double error = product_error(&in, out), dense = ladder_dense_tflops(&in);
        float ms = ladder_time([&] { multiply(&in); });
        double tflops = 2.0 * in.tokens.rows * shape.C * shape.N / ms / 1e9;
        printf(
            "{\"ladder\":\"expert_product\",\"level\":\"%s\",\"T\":%d,\"K\":%d,\"E\":%d,\"C\":%d,\"N\":%d,"
            "\"ms\":%.4f,\"tflops\":%.1f,\"dense_tflops\":%.1f,\"share\":%.3f,\"error\":%.2e",
            level, shape.T, shape.K, shape.E, shape.C, shape.N, ms, tflops, dense, tflops / dense, error);
        ladder_end_line();
        wrong |= !(error < 4e-3);
    }
    return wrong;
}

/* ---- dispatch: from the router's choices to rows sorted by expert ---- */

/* rows[r] = x[entry[r] / K] for all rows; rows NULL: nothing was copied. Any order within an expert is right. */
typedef struct {
    const bf16 *rows;
    const int *entry, *offset;
} DispatchResult;

/* Counts what is wrong: each entry must be there once, among the rows of its expert, with its token's numbers. */
static inline int dispatch_errors(const LadderTokens *t, DispatchResult out) {
    int *entry = (int *)ladder_download(out.entry, t->rows * sizeof(int));
    int *offset = (int *)ladder_download(out.offset, (t->E + 1) * sizeof(int));
    int *seen = (int *)calloc(t->rows, sizeof(int));
    size_t row_bytes = t->C * sizeof(bf16);
    char *x = out.rows ? (char *)ladder_download(t->x, t->T * row_bytes) : NULL;
    char *rows = out.rows ? (char *)ladder_download(out.rows, t->rows * row_bytes) : NULL;
    int errors = memcmp(offset, t->host_offset, (t->E + 1) * sizeof(int)) != 0;
    for (int e = 0; e < t->E && !errors; e++) {
        for (int r = offset[e]; r < offset[e + 1]; r++) {
            int i = entry[r];
            if (i < 0 || i >= t->rows || seen[i]++ || t->host_expert[i] != e) {
                errors++;
            } else if (rows && memcmp(rows + r * row_bytes, x + i / t->K * row_bytes, row_bytes) != 0) {
                errors++;
            }
        }
    }
    free(entry);
    free(offset);
    free(seen);
    free(x);
    free(rows);
    return errors;
}

/* Whether rows of an expert are in the order of their tokens: then the same input gives the same bits on every run. */
static inline int dispatch_in_order(const LadderTokens *t, DispatchResult out) {
    int *entry = (int *)ladder_download(out.entry, t->rows * sizeof(int));
    int same = memcmp(entry, t->host_entry, t->rows * sizeof(int)) == 0;
    free(entry);
    return same;
}

/* Runs the rung at both shapes. Returns 1 if a result is wrong. Bytes are those no copy can do without: x once, rows
 * once; `copy_gb_s` is what a copy within the device reaches on as many. A rung that moves none has no rate. */
template <class Dispatch>
static int dispatch_ladder(const char *level, Dispatch dispatch) {
    const struct { int T, K, E, C; } shapes[] = {{16384, 2, 128, 4096}, {32768, 8, 64, 2048}};
    int wrong = 0;
    for (auto shape : shapes) {
        LadderTokens in = ladder_tokens(shape.T, shape.K, shape.E, shape.C);
        dispatch(&in);
        ladder_poison();
        DispatchResult out = dispatch(&in);
        CUDA(cudaDeviceSynchronize());
        int errors = dispatch_errors(&in, out), in_order = dispatch_in_order(&in, out);
        float ms = ladder_time([&] { dispatch(&in); });
        size_t bytes = ((size_t)in.T + in.rows) * in.C * sizeof(bf16);
        char *from = (char *)ladder_normal(bytes / 2, 6, 1);
        float copy_ms =
            ladder_time([&] { CUDA(cudaMemcpyAsync(from, from + bytes / 2, bytes / 2, cudaMemcpyDefault)); });
        CUDA(cudaFree(from));
        printf("{\"ladder\":\"dispatch\",\"level\":\"%s\",\"T\":%d,\"K\":%d,\"E\":%d,\"C\":%d,\"ms\":%.4f,", level,
               shape.T, shape.K, shape.E, shape.C, ms);
        if (out.rows) {
            printf("\"gb_s\":%.0f,\"copy_gb_s\":%.0f,\"share\":%.3f,", bytes / ms / 1e6, bytes / copy_ms / 1e6,
                   copy_ms / ms);
        }
        printf("\"in_order\":%s,\"errors\":%d", in_order ? "true" : "false", errors);
        ladder_end_line();
        wrong |= errors != 0;
    }
    return wrong;
}

#endif
