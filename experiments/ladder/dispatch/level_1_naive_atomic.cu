/* Level 1: dispatch as one first thinks of it. Every choice takes the next free row of its expert by an atomic
 * addition, then a thread per number copies.
 *
 *     count      atomicAdd(count[expert], 1)                        a thread to a choice
 *     offset     exclusive sum over experts                         one thread
 *     position   r = offset[expert] + atomicAdd(taken[expert], 1)   a thread to a choice
 *     copy       rows[r][c] = x[entry[r] / K][c]                    a thread to a number
 *
 * Expect two troubles. The order of an expert's rows is whatever the scheduler made of it, so a sum over rows differs
 * from run to run in its last bits. And the copy is far from the memory's rate: each thread moves 2 bytes, and before
 * it can, it divides its number and reads an index. */
#include "../ladder.cuh"

/* Grid: a thread to a choice. */
static __global__ void count_kernel(int *count, const int *expert, int choices) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < choices) {
        atomicAdd(&count[expert[i]], 1);
    }
}

/* One thread. */
static __global__ void offset_kernel(int *offset, const int *count, int E) {
    offset[0] = 0;
    for (int e = 0; e < E; e++) {
        offset[e + 1] = offset[e] + count[e];
    }
}

/* Grid: a thread to a choice. */
static __global__ void position_kernel(int *entry, int *taken, const int *offset, const int *expert, int choices) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < choices) {
        entry[offset[expert[i]] + atomicAdd(&taken[expert[i]], 1)] = i;
    }
}

/* Grid: a thread to a number. */
static __global__ void copy_kernel(bf16 *rows, const bf16 *x, const int *entry, int K, int C, size_t numbers) {
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i < numbers) {
        rows[i] = x[(size_t)(entry[i / C] / K) * C + i % C];
    }
}

static DispatchResult dispatch(const LadderTokens *in) {
    int choices = in->rows, E = in->E, blocks = (choices + 255) / 256;
    size_t numbers = (size_t)choices * in->C;
    bf16 *rows = (bf16 *)ladder_memory(0, numbers * sizeof(bf16));
    int *entry = (int *)ladder_memory(1, choices * sizeof(int));
    int *offset = (int *)ladder_memory(2, (E + 1) * sizeof(int));
    int *count = (int *)ladder_memory(3, 2 * E * sizeof(int)), *taken = count + E;
    CUDA(cudaMemsetAsync(count, 0, 2 * E * sizeof(int)));
    count_kernel<<<blocks, 256>>>(count, in->expert, choices);
    offset_kernel<<<1, 1>>>(offset, count, E);
    position_kernel<<<blocks, 256>>>(entry, taken, offset, in->expert, choices);
    copy_kernel<<<(unsigned)((numbers + 255) / 256), 256>>>(rows, in->x, entry, in->K, in->C, numbers);
    return {rows, entry, offset};
}

int main(void) {
    return dispatch_ladder("1 naive atomic", dispatch);
}
