/* Level 5: a token travels once to a rank, however many of its experts are there.
 *
 *     there   one row for each (token, rank), with K notes: which expert, which weight; none: not this rank's
 *     back    one row: the rank has added up, weighted, what its experts made of the token
 *
 * One idea more than level 4: the wire sees ranks, not experts. Of E experts on W ranks, K choices fall on
 * u = W (1 - C(E - E/W, K) / C(E, K)) ranks on average, so K / u times fewer rows cross, both ways:
 *
 *     E 128, K 8     8 ranks: 8 rows become 5.3     4 ranks: 3.6     2 ranks: 2.0
 *
 * What is summed on the way is rounded once more than before, so the last bit of a result may differ.
 *
 * Expect: K / u of level 4 where rows are many, nothing where they are few. */
#include "alltoall.cuh"

enum { SORT_THREADS = 1024, WARPS = SORT_THREADS / 32, THREADS = 128 };

/* After a row's numbers, one for each choice. */
typedef struct __align__(8) {
    int expert; /* number among the receiver's; -1: not one of them */
    float weight;
}
Note;

enum { NOTES = sizeof(Pack) / sizeof(Note) }; /* in a pack */

static __host__ __device__ int note_packs(int K) {
    return (K + NOTES - 1) / NOTES;
}

/* The rank of an entry's expert; -1 where an earlier choice of the token goes to the same rank. */
static __device__ int rank_once(const int *expert, int entry, int K, int experts) {
    int r = expert[entry] / experts;
    for (int i = entry / K * K; i < entry; i++) {
        r = expert[i] / experts == r ? -1 : r;
    }
    return r;
}

/* count (blocks, ranks). Grid: a thread to an entry. */
static __global__ void count_kernel(int *count, const int *expert, int entries, int K, int experts, int ranks) {
    __shared__ int counted_here[MOST_RANKS];
    int i = blockIdx.x * SORT_THREADS + threadIdx.x;
    int r = i < entries ? rank_once(expert, i, K, experts) : -1;
    if (threadIdx.x < ranks) {
        counted_here[threadIdx.x] = 0;
    }
    __syncthreads();
    if (r >= 0) {
        atomicAdd(&counted_here[r], 1);
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

/* entry (rows), row (T,K) its inverse, -1 where there is none, send (ranks) = rows for each rank. Grid: a thread to an
 * entry; warp r of a block begins with rank r. */
static __global__ void place_kernel(int *entry, int *row, int *send, const int *count, const int *expert, int entries,
                                    int K, int experts, int ranks) {
    __shared__ int next[WARPS][MOST_RANKS]; /* rows of a warp, then where they begin */
    int i = blockIdx.x * SORT_THREADS + threadIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int r = i < entries ? rank_once(expert, i, K, experts) : -1;
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
    if (i < entries) {
        row[i] = r >= 0 ? next[warp][r] + before : -1;
    }
    if (r >= 0) {
        entry[row[i]] = i;
    }
}

/* rows (rows, packs + note_packs). Grid: a block to a row. */
static __global__ void pack_kernel(Pack *rows, const Pack *x, const int *entry, const int *expert, const float *weight,
                                   int K, int experts, int packs) {
    int i = entry[blockIdx.x], token = i / K, rank = expert[i] / experts;
    Pack *row = rows + (size_t)blockIdx.x * (packs + note_packs(K));
    Note *note = (Note *)(row + packs);
    for (int p = threadIdx.x; p < packs; p += THREADS) {
        row[p] = x[(size_t)token * packs + p];
    }
    for (int j = threadIdx.x; j < K; j += THREADS) {
        int e = expert[token * K + j];
        note[j] = {e / experts == rank ? e % experts : -1, weight[token * K + j]};
    }
}

/* The experts: made (rows, packs) = the weighted sum of what this rank's make of each of rows (rows, packs +
 * note_packs). first: number of the first of them. Grid: a block to a row. */
static __global__ void expert_kernel(Pack *made, const Pack *rows, int first, bool whole, int K, int packs) {
    const Pack *row = rows + (size_t)blockIdx.x * (packs + note_packs(K));
    const Note *note = (const Note *)(row + packs);
    for (int p = threadIdx.x; p < packs; p += THREADS) {
        float sum[PACK] = {};
        for (int j = 0; j < K; j++) {
            if (note[j].expert >= 0) {
                add_pack(sum, scaled_pack(row[p], scale_at(first + note[j].expert, whole)), note[j].weight);
            }
        }
        made[(size_t)blockIdx.x * packs + p] = rounded_pack(sum);
    }
}

/* y (T, packs) = the sum of the rows (rows, packs) that came back of each token. Grid: a block to a token. */
static __global__ void combine_kernel(Pack *y, const Pack *rows, const int *row, int K, int packs) {
    int t = blockIdx.x;
    for (int p = threadIdx.x; p < packs; p += THREADS) {
        float sum[PACK] = {};
        for (int j = 0; j < K; j++) {
            if (row[t * K + j] >= 0) {
                add_pack(sum, rows[(size_t)row[t * K + j] * packs + p], 1);
            }
        }
        y[(size_t)t * packs + p] = rounded_pack(sum);
    }
}

static struct {
    int *count, *entry, *row;
    int *counts, *host_counts; /* (2,ranks) rows to each rank, rows from each */
    Pack *home, *away;         /* (rows, packs + note_packs): at most one for each (token, rank) */
    Pack *made;                /* (rows, packs) */
} own;

static void prepare(const Task *task) {
    size_t entries = (size_t)task->T * task->K, most = (size_t)task->ranks * task->M;
    size_t blocks = entries / SORT_THREADS + 1, packs = task->H / PACK, row_packs = packs + note_packs(task->K);
    own.count = keep_array<int>(blocks * task->ranks);
    own.entry = keep_array<int>(entries);
    own.row = keep_array<int>(entries);
    own.counts = keep_array<int>(2 * task->ranks);
    own.home = keep_array<Pack>((size_t)task->ranks * task->T * row_packs);
    own.away = keep_array<Pack>(most * row_packs);
    own.made = keep_array<Pack>(most * packs);
    CUDA(cudaMallocHost(&own.host_counts, 2 * task->ranks * sizeof(int)));
}

static void release(void) {
    CUDA(cudaFreeHost(own.host_counts));
}

static void run(const Task *task) {
    int T = task->T, K = task->K, entries = T * K, blocks = entries / SORT_THREADS + 1, packs = task->H / PACK;
    int ranks = task->ranks, experts = task->experts, *send = own.counts, *receive = own.counts + ranks;
    int home_first[MOST_RANKS + 1], away_first[MOST_RANKS + 1];
    LAUNCH(count_kernel, blocks, SORT_THREADS, own.count, task->expert, entries, K, experts, ranks);
    LAUNCH(place_kernel, blocks, SORT_THREADS, own.entry, own.row, send, own.count, task->expert, entries, K, experts,
           ranks);
    exchange(receive, world.each, send, world.each, sizeof(int));
    download(own.host_counts, own.counts, 2 * ranks * sizeof(int));
    int out = rows_first(home_first, own.host_counts), in = rows_first(away_first, own.host_counts + ranks);

    LAUNCH(pack_kernel, out, THREADS, own.home, (const Pack *)task->x, own.entry, task->expert, task->weight, K,
           experts, packs);
    exchange(own.away, away_first, own.home, home_first, (packs + note_packs(K)) * sizeof(Pack));
    LAUNCH(expert_kernel, in, THREADS, own.made, own.away, task->rank * experts, task->whole, K, packs);

    exchange(own.home, home_first, own.made, away_first, packs * sizeof(Pack));
    LAUNCH(combine_kernel, T, THREADS, (Pack *)task->y, own.home, own.row, K, packs);
}

int main(int argc, char **argv) {
    return alltoall_ladder({"5 row per rank", prepare, run, release}, argc, argv);
}
