/* The calls on arrays between ranks that have a GPU each, by NCCL. All of it is queued in the stream and nothing is
 * waited for. On the device NCCL's kernels wait for those of the other ranks, forever if one is gone; so where the host
 * waits for the device it keeps asking, and loses patience (comm_check_waiting).
 *
 * A sum of the numbers a of rank 0 and b of rank 1, each rank adding up one share of them:
 *
 *                                      rank 0                rank 1
 *     has                              a0      a1            b0      b1
 *     receives its share of others'    a0 b0                         a1 b1
 *     adds in the order of the ranks   a0+b0                         a1+b1
 *     gathers                          a0+b0   a1+b1         a0+b0   a1+b1
 *
 * These are the bits of comm.c. NCCL's own reductions add in an order that depends on size and wiring. Where the ranks'
 * memory is open to each other (peers.h), nothing is received: each rank adds up its share where it lies, and stores
 * the sum on all (sum_in_place); and rows of an exchange are copied to where they are for (copy_rows).
 *
 * One rank calls nothing of NCCL, and without NCCL (no USE_NCCL) there is only one. Called by model/exchange_wire.c,
 * exchange_plan.c, transformer.c, optimizer.c and device.cu. Read next: open_communicator, sum_part, sum_in_place.
 */
#include "cuda.cuh"

#include <assert.h>

#ifdef USE_NCCL
#include <nccl.h>
#endif

extern "C" {
#include "comm_parts.h"
#include "peers.h"
}

enum { THREADS = 256, WIDTH = Pack<acc_t>::COUNT };

/* Numbers that a rank holds of others while it adds; and up to how many it is quicker to send all to all. */
static const size_t SUM_PART = 1 << 24, SUM_FEW = 1 << 16;

/* ---- messages, by NCCL ---- */

#ifdef USE_NCCL

#define NCCL_CHECK(call)                                                                                              \
    do {                                                                                                              \
        ncclResult_t nccl_result = (call);                                                                            \
        CHECK(nccl_result == ncclSuccess,                                                                             \
              "%s at %s: %s (%s): is a rank gone, or the network between ranks? With NCCL_DEBUG=INFO NCCL says more", \
              #call, comm_where(), ncclGetErrorString(nccl_result), ncclGetLastError(NULL));                          \
    } while (0)

static ncclComm_t communicators[GROUP_COUNT]; /* NULL: the group has not talked yet, or is the world by another name */

void comm_arrays_check(int ranks) {
}

/* Messages queued between open_messages and close_messages travel at the same time. */
static void open_messages(void) {
    NCCL_CHECK(ncclGroupStart());
}

static void close_messages(void) {
    NCCL_CHECK(ncclGroupEnd());
}

/* From rank r of the group, and to it. */
static void receive_from(Group group, int r, void *to, size_t bytes, cudaStream_t stream) {
    if (bytes > 0) {
        NCCL_CHECK(ncclRecv(to, bytes, ncclInt8, r, communicators[group], stream));
    }
}

static void send_to(Group group, int r, const void *from, size_t bytes, cudaStream_t stream) {
    if (bytes > 0) {
        NCCL_CHECK(ncclSend(from, bytes, ncclInt8, r, communicators[group], stream));
        comm_count_message(bytes);
    }
}

/* all (ranks, bytes): mine of each rank. */
static void gather(Group group, void *all, const void *mine, size_t bytes, cudaStream_t stream) {
    if (bytes > 0) {
        NCCL_CHECK(ncclAllGather(mine, all, bytes, ncclInt8, communicators[group], stream));
        for (int r = 1; r < comm_ranks(group); r++) {
            comm_count_message(bytes);
        }
    }
}

/* NCCL connects ranks when they first talk, which takes memory and keeps the host waiting. So all of them talk when all
 * have just come, not when a step is under way. */
static void talk_once(Group group) {
    int rank = comm_rank(group), ranks = comm_ranks(group);
    cudaStream_t stream = cuda_stream(NULL);
    char *bytes = (char *)cuda_workspace(2 * (size_t)ranks), *mine = bytes + ranks;
    open_messages();
    for (int r = 0; r < ranks; r++) {
        if (r != rank) {
            receive_from(group, r, bytes + r, 1, stream);
            send_to(group, r, mine, 1, stream);
        }
    }
    close_messages();
    gather(group, bytes, mine, 1, stream);
}

/* NCCL would wait forever for a rank that does not come here, so the ranks first meet on the host. What they gather
 * there is an identifier, of which the first rank's counts. */
static void open_communicator(Group group) {
    int rank = comm_rank(group), ranks = comm_ranks(group);
    ncclUniqueId *ids = (ncclUniqueId *)calloc(ranks, sizeof *ids);
    CHECK(ids, "out of memory for the identifiers of %d ranks", ranks);
    if (rank == 0) {
        NCCL_CHECK(ncclGetUniqueId(ids));
    }
    comm_gather_host(group, ids, sizeof *ids);
    NCCL_CHECK(ncclCommInitRank(&communicators[group], ranks, ids[0], rank));
    free(ids);
    talk_once(group);
}

/* Begins a call of a group with several ranks. Returns the group whose communicator it takes: a group of all ranks is
 * the world, in the same order. */
static Group begin_call(Call call, Group group) {
    comm_begin_call(call, group);
    Group talking = comm_ranks(group) == comm_ranks(GROUP_WORLD) ? GROUP_WORLD : group;
    if (!communicators[talking]) {
        open_communicator(talking);
    }
    return talking;
}

static bool have_talked(void) {
    return communicators[GROUP_WORLD] || communicators[GROUP_EXPERTS] || communicators[GROUP_REPLICAS];
}

/* Nobody leaves before all have come here: its part in what the others have queued must be done. */
void comm_arrays_close(void) {
    if (!have_talked()) {
        return;
    }
    device_wait(NULL);
    comm_barrier();
    for (ncclComm_t &communicator : communicators) {
        if (communicator) {
            NCCL_CHECK(ncclCommDestroy(communicator));
            communicator = NULL;
        }
    }
}

static void check_connections(void) {
    for (ncclComm_t communicator : communicators) {
        if (communicator) {
            ncclResult_t state = ncclSuccess;
            NCCL_CHECK(ncclCommGetAsyncError(communicator, &state));
            NCCL_CHECK(state);
        }
    }
}

#else /* one rank, which has nobody to talk to */

void comm_arrays_check(int ranks) {
    CHECK(ranks == 1,
          "%d ranks were started, but this program was built without NCCL, through which GPUs talk: apt-get install "
          "libnccl2 libnccl-dev, then make again, or start one rank",
          ranks);
}

static void open_messages(void) {
}

static void close_messages(void) {
}

static void receive_from(Group group, int r, void *to, size_t bytes, cudaStream_t stream) {
}

static void send_to(Group group, int r, const void *from, size_t bytes, cudaStream_t stream) {
}

static void gather(Group group, void *all, const void *mine, size_t bytes, cudaStream_t stream) {
}

static Group begin_call(Call call, Group group) {
    return group;
}

void comm_arrays_close(void) {
}

static void check_connections(void) {
}

#endif

void comm_check_waiting(double begin) {
    check_connections();
    comm_wait(ANY_RANK, begin, 0);
}

/* ---- calls on arrays ---- */

void comm_gather(Group group, void *all, const void *mine, size_t bytes, Stream *stream) {
    char *place = (char *)all + comm_rank(group) * bytes;
    if (comm_ranks(group) > 1) {
        gather(begin_call(CALL_GATHER, group), all, mine, bytes, cuda_stream(stream));
    } else if (place != mine) {
        device_copy(place, mine, bytes, stream);
    }
}

/* What rank r brought of the numbers from x on: this rank's are in x. */
__device__ static const acc_t *term_of(int r, int rank, const acc_t *x, const acc_t *terms, size_t stride) {
    return r == rank ? x : terms + r * stride;
}

/* A thread for each pack of x, and for each number before the packs (`lead` of them) and behind. */
__global__ static void __launch_bounds__(THREADS) add_terms(acc_t *x, const acc_t *terms, size_t stride, int rank,
                                                            int ranks, size_t lead, size_t packs, size_t count) {
    const size_t thread = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (thread < packs) {
        const size_t i = lead + thread * WIDTH;
        Pack<acc_t> sum = load_pack(term_of(0, rank, x, terms, stride) + i);
#pragma unroll 4
        for (int r = 1; r < ranks; r++) {
            const Pack<acc_t> term = load_pack(term_of(r, rank, x, terms, stride) + i);
            for (int j = 0; j < WIDTH; j++) {
                sum.v[j] += term.v[j];
            }
        }
        store_pack(x + i, sum);
    } else if (thread - packs < count - packs * WIDTH) {
        const size_t single = thread - packs, i = single < lead ? single : single + packs * WIDTH;
        acc_t sum = term_of(0, rank, x, terms, stride)[i];
        for (int r = 1; r < ranks; r++) {
            sum += term_of(r, rank, x, terms, stride)[i];
        }
        x[i] = sum;
    }
}

/* Numbers between the last multiple of 16 bytes and x. */
static size_t past_pack(const acc_t *x) {
    return reinterpret_cast<uintptr_t>(x) / sizeof *x % WIDTH;
}

/* x (count) = the sum, in the order of the ranks, of x and what the others brought: rank r's lies at terms + r*stride.
 * Packs where all lie alike. */
static void add_in_order(Group group, acc_t *x, const acc_t *terms, size_t stride, size_t count, cudaStream_t stream) {
    const bool alike = stride % WIDTH == 0 && past_pack(x) == past_pack(terms);
    const size_t before_packs = (WIDTH - past_pack(x)) % WIDTH;
    const size_t lead = alike && before_packs < count ? before_packs : count;
    const size_t packs = (count - lead) / WIDTH, threads = count - packs * (WIDTH - 1);
    add_terms<<<ceil_div(threads, THREADS), THREADS, 0, stream>>>(x, terms, stride, comm_rank(group), comm_ranks(group),
                                                                  lead, packs, count);
    CUDA_LAUNCHED();
}

/* Each rank adds up everything by itself: one round of messages. */
static void sum_few(Group group, acc_t *x, size_t count, cudaStream_t stream) {
    acc_t *terms = (acc_t *)cuda_workspace(comm_ranks(group) * count * sizeof *x);
    gather(group, terms, x, count * sizeof *x, stream);
    add_in_order(group, x, terms, count, count, stream);
}

/* Each rank adds up its share and sends it to all. x (ranks, share), shares of whole packs. */
static void sum_part(Group group, acc_t *x, size_t share, cudaStream_t stream) {
    int rank = comm_rank(group), ranks = comm_ranks(group);
    acc_t *mine = x + rank * share;
    acc_t *terms = (acc_t *)cuda_workspace((ranks * share + WIDTH) * sizeof *x) + past_pack(mine);
    open_messages();
    for (int r = 0; r < ranks; r++) {
        if (r != rank) {
            receive_from(group, r, terms + r * share, share * sizeof *x, stream);
            send_to(group, r, x + r * share, share * sizeof *x, stream);
        }
    }
    close_messages();
    add_in_order(group, mine, terms, share, share, stream);
    gather(group, x, mine, share * sizeof *x, stream);
}

/* x of each rank, in its memory. */
typedef struct {
    acc_t *of[PEERS_MOST];
} NumbersOfAll;

/* A thread for two packs, one in either half of the share, so that as many loads as there are packs of ranks twice over
 * are under way: they come from far. Adds in the order of the ranks and stores the sum on all. */
__global__ static void __launch_bounds__(THREADS) sum_on_all(NumbersOfAll x, int ranks, size_t packs) {
    const size_t thread = (size_t)blockIdx.x * THREADS + threadIdx.x, half = (packs + 1) / 2;
    if (thread >= half) {
        return;
    }
    const bool both = thread + half < packs;
    const size_t i = thread * WIDTH, j = both ? i + half * WIDTH : i;
    Pack<acc_t> first = load_pack(x.of[0] + i), second = load_pack(x.of[0] + j);
#pragma unroll 4
    for (int r = 1; r < ranks; r++) {
        const Pack<acc_t> a = load_pack(x.of[r] + i), b = load_pack(x.of[r] + j);
        for (int k = 0; k < WIDTH; k++) {
            first.v[k] += a.v[k];
            second.v[k] += b.v[k];
        }
    }
    for (int r = 0; r < ranks; r++) {
        store_pack(x.of[r] + i, first);
        if (both) {
            store_pack(x.of[r] + j, second);
        }
    }
}

/* Where the others' memory is open: each rank adds up its share of x (ranks, share) where it lies, and stores the sum
 * there too. Nothing is sent, and no memory is needed. */
static void sum_in_place(Group group, acc_t *x, size_t share, Stream *stream) {
    const int rank = comm_rank(group), ranks = comm_ranks(group);
    const size_t packs = share / WIDTH;
    NumbersOfAll all = {};
    for (int r = 0; r < ranks; r++) {
        all.of[r] = (acc_t *)peers_at(group, r, x) + rank * share;
    }
    comm_begin_call(CALL_SUM, group);
    peers_meet(group, false, stream);
    sum_on_all<<<ceil_div((packs + 1) / 2, THREADS), THREADS, 0, cuda_stream(stream)>>>(all, ranks, packs);
    CUDA_LAUNCHED();
    peers_meet(group, false, stream);
    for (int r = 1; r < ranks; r++) {
        comm_count_message(share * sizeof *x);
    }
}

/* What cannot be shared out in whole packs, fewer than WIDTH numbers for each rank, is summed as few numbers are. */
void comm_sum(Group group, acc_t *x, size_t count, Stream *stream) {
    const size_t ranks = comm_ranks(group);
    if (ranks == 1) {
        return;
    }
    cudaStream_t s = cuda_stream(stream);
    const size_t unit = ranks * WIDTH, part = SUM_PART - SUM_PART % unit;
    size_t shared = count * ranks <= SUM_FEW ? 0 : count - count % unit;
    if (shared > 0 && peers_reach(group, x) && past_pack(x) == 0) {
        sum_in_place(group, x, shared / ranks, stream);
        x += shared;
        count -= shared;
        shared = 0;
        if (count == 0) {
            return;
        }
    }
    const Group talking = begin_call(CALL_SUM, group);
    for (size_t first = 0; first < shared; first += part) {
        sum_part(talking, x + first, (shared - first < part ? shared - first : part) / ranks, s);
    }
    if (shared < count) {
        sum_few(talking, x + shared, count - shared, s);
    }
}

/* Where the others' memory is open, rows are copied there: copy engines do it, the multiprocessors go on with other
 * work. Not in a recorded step, where nothing may count its meetings on the host. */
static bool can_copy(Group group, const void *to, cudaStream_t stream) {
    cudaStreamCaptureStatus recorded;
    CUDA_CHECK(cudaStreamIsCapturing(stream, &recorded));
    return group == GROUP_EXPERTS && peers_reach(group, to) && recorded == cudaStreamCaptureStatusNone;
}

static void copy_rows(char *to, const int *theirs, const char *from, const int *from_first, size_t row_bytes,
                      Stream *stream) {
    const int rank = comm_rank(GROUP_EXPERTS), ranks = comm_ranks(GROUP_EXPERTS);
    comm_begin_call(CALL_EXCHANGE, GROUP_EXPERTS);
    for (int i = 1; i < ranks; i++) { /* each rank begins with another, so that none has all at once */
        const int r = (rank + i) % ranks;
        const size_t bytes = comm_row_count(from_first, r) * row_bytes;
        if (bytes > 0) {
            device_copy((char *)peers_at(GROUP_EXPERTS, r, to) + theirs[r] * row_bytes,
                        from + from_first[r] * row_bytes, bytes, stream);
            comm_count_message(bytes);
        }
    }
    peers_meet(GROUP_EXPERTS, true, stream);
}

void comm_exchange(Group group, void *to, const int *to_first, const void *from, const int *from_first,
                   const int *theirs, size_t row_bytes, Stream *stream) {
    const int rank = comm_rank(group), ranks = comm_ranks(group);
    char *to_rows = (char *)to;
    const char *from_rows = (const char *)from;
    assert(comm_row_count(to_first, rank) == comm_row_count(from_first, rank));
    if (comm_row_count(to_first, rank) > 0) {
        device_copy(to_rows + to_first[rank] * row_bytes, from_rows + from_first[rank] * row_bytes,
                    comm_row_count(to_first, rank) * row_bytes, stream);
    }
    if (ranks == 1) {
        return;
    }
    if (theirs && can_copy(group, to, cuda_stream(stream))) {
        copy_rows(to_rows, theirs, from_rows, from_first, row_bytes, stream);
        return;
    }
    const Group talking = begin_call(CALL_EXCHANGE, group);
    open_messages();
    for (int r = 0; r < ranks; r++) {
        if (r != rank) {
            receive_from(talking, r, to_rows + to_first[r] * row_bytes, comm_row_count(to_first, r) * row_bytes,
                         cuda_stream(stream));
            send_to(talking, r, from_rows + from_first[r] * row_bytes, comm_row_count(from_first, r) * row_bytes,
                    cuda_stream(stream));
        }
    }
    close_messages();
}

void comm_exchanged(Group group, const void *to, Stream *stream) {
    if (can_copy(group, to, cuda_stream(stream))) {
        peers_meet(group, true, stream);
    }
}
