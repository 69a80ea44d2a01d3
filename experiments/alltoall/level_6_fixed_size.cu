/* Level 6: messages of a fixed size. Nobody asks how many rows will come, so the host never waits, and the whole
 * exchange becomes one graph that is launched again and again.
 *
 *     message to a rank     `most` rows, those there are first; the rest say "no token" in their notes
 *     there, back           an exchange of rows, equal for all pairs of ranks
 *
 * One idea more than level 5: send what need not be sent, so that sizes are known before the router has spoken. The
 * counts and their exchange go, and the wait for them, and with it all launches but one. `most` is the mean and six
 * deviations of a binomial count, which does not happen to be passed; T is never passed, a token being at most one row.
 * What does not fit is left out (a trainer has to count that; here the check would find it), so skewed choices get T.
 *
 *     E 8, K 2, 4 ranks     4096 tokens: 1902 + 192 rows, 10 % for nothing     16 tokens: 16 rows for 7.4
 *
 * Expect: the time of two small exchanges in a graph, 10 us each, where level 5 takes hundreds for the host's sake. At
 * the large shapes level 5's time, and the padding. */
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

/* Rows of a message: of M tokens those that go to one rank, each with the chance that not all K choices miss it. */
static int rows_at_most(const Task *task) {
    double misses = 1;
    for (int j = 0; j < task->K; j++) {
        misses *= (double)(task->E - task->experts - j) / (task->E - j);
    }
    double mean = task->M * (1 - misses), most = ceil(mean + 6 * sqrt(mean * misses));
    return task->routing == EVEN && most < task->M ? (int)most : task->M;
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

/* Of rank r's rows, those of earlier blocks: a warp asks. */
static __device__ int earlier_rows(const int *count, int r, int ranks) {
    int before = 0;
    for (int b = threadIdx.x % 32; b < blockIdx.x; b += 32) {
        before += count[b * ranks + r];
    }
    return __reduce_add_sync(0xffffffffu, before);
}

/* entry (ranks, most), -1 before; row (T,K) its inverse, -1 where there is none. Grid: a thread to an entry; warp r of
 * a block begins with rank r. */
static __global__ void place_kernel(int *entry, int *row, const int *count, const int *expert, int entries, int K,
                                    int experts, int ranks, int most) {
    __shared__ int next[WARPS][MOST_RANKS]; /* rows of a warp, then where they begin in the message */
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
        int first = earlier_rows(count, warp, ranks);
        if (lane == 0) {
            for (int w = 0; w < WARPS; w++) {
                int own = next[w][warp];
                next[w][warp] = first;
                first += own;
            }
        }
    }
    __syncthreads();
    bool fits = r >= 0 && next[warp][r] + before < most;
    if (i < entries) {
        row[i] = fits ? r * most + next[warp][r] + before : -1;
    }
    if (fits) {
        entry[row[i]] = i;
    }
}

/* rows (ranks, most, packs + note_packs). Grid: a block to a row. */
static __global__ void pack_kernel(Pack *rows, const Pack *x, const int *entry, const int *expert, const float *weight,
                                   int K, int experts, int packs) {
    int i = entry[blockIdx.x], token = i / K, rank = i < 0 ? -1 : expert[i] / experts;
    Pack *row = rows + (size_t)blockIdx.x * (packs + note_packs(K));
    Note *note = (Note *)(row + packs);
    for (int p = threadIdx.x; p < packs && i >= 0; p += THREADS) {
        row[p] = x[(size_t)token * packs + p];
    }
    for (int j = threadIdx.x; j < K; j += THREADS) {
        int e = i < 0 ? -1 : expert[token * K + j];
        note[j] = e >= 0 && e / experts == rank ? Note{e % experts, weight[token * K + j]} : Note{-1, 0};
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
    int most; /* rows of a message */
    int first[MOST_RANKS + 1];
    int *count, *entry, *row;
    Pack *home, *away; /* (ranks, most, packs + note_packs) */
    Pack *made;        /* (ranks, most, packs) */
    cudaGraphExec_t graph;
    Counted counted; /* what the graph does */
} own;

/* Hands everything to the device, without a wait. */
static void issue(const Task *task) {
    int T = task->T, K = task->K, entries = T * K, blocks = entries / SORT_THREADS + 1, packs = task->H / PACK;
    int ranks = task->ranks, experts = task->experts, rows = ranks * own.most;
    CUDA(cudaMemsetAsync(own.entry, 0xff, rows * sizeof(int), world.stream));
    LAUNCH(count_kernel, blocks, SORT_THREADS, own.count, task->expert, entries, K, experts, ranks);
    LAUNCH(place_kernel, blocks, SORT_THREADS, own.entry, own.row, own.count, task->expert, entries, K, experts, ranks,
           own.most);
    LAUNCH(pack_kernel, rows, THREADS, own.home, (const Pack *)task->x, own.entry, task->expert, task->weight, K,
           experts, packs);
    exchange(own.away, own.first, own.home, own.first, (packs + note_packs(K)) * sizeof(Pack));
    LAUNCH(expert_kernel, rows, THREADS, own.made, own.away, task->rank * experts, task->whole, K, packs);

    exchange(own.home, own.first, own.made, own.first, packs * sizeof(Pack));
    LAUNCH(combine_kernel, T, THREADS, (Pack *)task->y, own.home, own.row, K, packs);
}

/* The graph. Once without it first: what NCCL and the device set up at first use is no part of it. */
static void record(const Task *task) {
    cudaGraph_t graph;
    issue(task);
    CUDA(cudaStreamSynchronize(world.stream));
    counted = {};
    CUDA(cudaStreamBeginCapture(world.stream, cudaStreamCaptureModeThreadLocal));
    issue(task);
    CUDA(cudaStreamEndCapture(world.stream, &graph));
    CUDA(cudaGraphInstantiate(&own.graph, graph, 0));
    CUDA(cudaGraphDestroy(graph));
    own.counted = counted;
    own.counted.launches = 1;
}

static void prepare(const Task *task) {
    size_t entries = (size_t)task->T * task->K, blocks = entries / SORT_THREADS + 1, packs = task->H / PACK;
    own.most = rows_at_most(task);
    size_t rows = (size_t)task->ranks * own.most, row_packs = packs + note_packs(task->K);
    for (int r = 0; r <= task->ranks; r++) {
        own.first[r] = r * own.most;
    }
    own.count = keep_array<int>(blocks * task->ranks);
    own.entry = keep_array<int>(rows);
    own.row = keep_array<int>(entries);
    own.home = keep_array<Pack>(rows * row_packs);
    own.away = keep_array<Pack>(rows * row_packs);
    own.made = keep_array<Pack>(rows * packs);
    record(task);
}

static void run(const Task *task) {
    CUDA(cudaGraphLaunch(own.graph, world.stream));
    counted = own.counted;
}

static void release(void) {
    CUDA(cudaGraphExecDestroy(own.graph));
}

int main(int argc, char **argv) {
    return alltoall_ladder({"6 fixed size", prepare, run, release}, argc, argv);
}
