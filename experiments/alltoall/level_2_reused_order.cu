/* Level 2: who sent a row knows where it went. Rows come back in the order in which they were sent, so the place that
 * the sort gave an entry on the way out is where its row is on the way back.
 *
 *     there   counts, rows, records
 *     back    rows
 *
 * One idea more than level 1: the permutation is kept, by entry (`row`) beside by row (`entry`), and serves twice. That
 * saves the two smallest exchanges of the way back, a wait and a kernel. They are small in bytes alone: at these sizes
 * an exchange takes as long whether it moves a kilobyte or a hundred.
 *
 * Expect: a third less than level 1 where rows are few, nothing where they are many. */
#include "alltoall.cuh"

enum { SORT_THREADS = 1024, WARPS = SORT_THREADS / 32, THREADS = 128 };

typedef struct {
    int expert, rank, token, choice;
} Record;

/* count (blocks, ranks). Grid: a thread to an entry. */
static __global__ void count_kernel(int *count, const int *expert, int entries, int experts, int ranks) {
    __shared__ int counted_here[MOST_RANKS];
    int i = blockIdx.x * SORT_THREADS + threadIdx.x;
    if (threadIdx.x < ranks) {
        counted_here[threadIdx.x] = 0;
    }
    __syncthreads();
    if (i < entries) {
        atomicAdd(&counted_here[expert[i] / experts], 1);
    }
    __syncthreads();
    if (threadIdx.x < ranks) {
        count[blockIdx.x * ranks + threadIdx.x] = counted_here[threadIdx.x];
    }
}

/* Of rank r's rows, where this block's begin, and how many there are of all blocks: a warp asks. */
static __device__ int block_first(int *all, const int *count, int r, int ranks) {
    int before = 0, total = 0;
    for (int b = threadIdx.x % 32; b < gridDim.x; b += 32) {
        for (int lower = 0; lower < r; lower++) {
            before += count[b * ranks + lower];
        }
        before += b < blockIdx.x ? count[b * ranks + r] : 0;
        total += count[b * ranks + r];
    }
    *all = __reduce_add_sync(0xffffffffu, total);
    return __reduce_add_sync(0xffffffffu, before);
}

/* entry (rows), row (T,K) its inverse, send (ranks) = rows for each rank. Grid: a thread to an entry; warp r of a block
 * begins with rank r. */
static __global__ void place_kernel(int *entry, int *row, int *send, const int *count, const int *expert, int entries,
                                    int experts, int ranks) {
    __shared__ int next[WARPS][MOST_RANKS]; /* rows of a warp, then where they begin */
    int i = blockIdx.x * SORT_THREADS + threadIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int r = i < entries ? expert[i] / experts : -1;
    unsigned same = __match_any_sync(0xffffffffu, r);
    int before = __popc(same & ((1u << lane) - 1));
    if (lane < ranks) {
        next[warp][lane] = 0;
    }
    __syncwarp();
    if (r >= 0 && before == 0) {
        next[warp][r] = __popc(same);
    }
    __syncthreads();
    if (warp < ranks) {
        int all, first = block_first(&all, count, warp, ranks);
        if (lane == 0) {
            for (int w = 0; w < WARPS; w++) {
                int own = next[w][warp];
                next[w][warp] = first;
                first += own;
            }
            if (blockIdx.x == 0) {
                send[warp] = all;
            }
        }
    }
    __syncthreads();
    if (r >= 0) {
        row[i] = next[warp][r] + before;
        entry[row[i]] = i;
    }
}

/* Grid: a block to a row. */
static __global__ void pack_kernel(Pack *rows, Record *record, const Pack *x, const int *entry, const int *expert,
                                   int rank, int K, int packs) {
    int row = blockIdx.x, i = entry[row], token = i / K;
    if (threadIdx.x == 0) {
        record[row] = {expert[i], rank, token, i % K};
    }
    for (int p = threadIdx.x; p < packs; p += THREADS) {
        rows[(size_t)row * packs + p] = x[(size_t)token * packs + p];
    }
}

/* The experts. Grid: a block to a row. */
static __global__ void scale_kernel(Pack *rows, const Record *record, bool whole, int packs) {
    float scale = scale_at(record[blockIdx.x].expert, whole);
    for (int p = threadIdx.x; p < packs; p += THREADS) {
        Pack *pack = &rows[(size_t)blockIdx.x * packs + p];
        *pack = scaled_pack(*pack, scale);
    }
}

/* Grid: a block to a token. */
static __global__ void combine_kernel(Pack *y, const Pack *rows, const int *row, const float *weight, int K,
                                      int packs) {
    int t = blockIdx.x;
    for (int p = threadIdx.x; p < packs; p += THREADS) {
        float sum[PACK] = {};
        for (int j = 0; j < K; j++) {
            add_pack(sum, rows[(size_t)row[t * K + j] * packs + p], weight[t * K + j]);
        }
        y[(size_t)t * packs + p] = rounded_pack(sum);
    }
}

static void run(const Task *task) {
    int entries = task->T * task->K, blocks = entries / SORT_THREADS + 1, packs = task->H / PACK;
    int ranks = task->ranks, experts = task->experts;
    size_t row_bytes = task->H * sizeof(half);
    int *count = fresh_array<int>(blocks * ranks), *entry = fresh_array<int>(entries), *row = fresh_array<int>(entries);
    int *send = fresh_array<int>(ranks), *receive = fresh_array<int>(ranks);
    int host_send[MOST_RANKS], host_receive[MOST_RANKS], home_first[MOST_RANKS + 1], away_first[MOST_RANKS + 1];
    LAUNCH(count_kernel, blocks, SORT_THREADS, count, task->expert, entries, experts, ranks);
    LAUNCH(place_kernel, blocks, SORT_THREADS, entry, row, send, count, task->expert, entries, experts, ranks);
    download(host_send, send, ranks * sizeof(int));
    exchange(receive, world.each, send, world.each, sizeof(int));
    download(host_receive, receive, ranks * sizeof(int));
    int out = rows_first(home_first, host_send), in = rows_first(away_first, host_receive);

    Pack *home = fresh_array<Pack>((size_t)out * packs), *away = fresh_array<Pack>((size_t)in * packs);
    Record *home_record = fresh_array<Record>(out), *away_record = fresh_array<Record>(in);
    LAUNCH(pack_kernel, out, THREADS, home, home_record, (const Pack *)task->x, entry, task->expert, task->rank,
           task->K, packs);
    exchange(away, away_first, home, home_first, row_bytes);
    exchange(away_record, away_first, home_record, home_first, sizeof(Record));
    LAUNCH(scale_kernel, in, THREADS, away, away_record, task->whole, packs);

    exchange(home, home_first, away, away_first, row_bytes);
    LAUNCH(combine_kernel, task->T, THREADS, (Pack *)task->y, home, row, task->weight, task->K, packs);
    give_back(&fresh);
}

int main(int argc, char **argv) {
    return alltoall_ladder({"2 reused order", NULL, run}, argc, argv);
}
