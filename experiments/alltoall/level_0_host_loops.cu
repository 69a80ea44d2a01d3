/* Level 0: the exchange as one first writes it down, with lists on the host. What it does is what all levels do.
 *
 *     for each token, for each choice       append (token's row, record) to the list of the expert's rank
 *     counts, rows, records                 three exchanges
 *     for each row that arrived             append it to the list of its expert; the expert works on its list
 *     for each expert, for each row         append it to the list of the rank it came from
 *     counts, rows, records                 three exchanges again
 *     for each row that came back           y[token] += weight row
 *
 * A record says which expert the row is for and whose it is. "Append" is one copy of one row on the device, started by
 * the host, which also reads every record that comes.
 *
 * Expect: microseconds for every row, whatever its size: some four copies and an addition, 3 us each. */
#include "alltoall.cuh"

#include <vector>

enum { THREADS = 128 };

typedef struct {
    int expert, rank, token, choice;
} Record;

typedef struct {
    Record record;
    const half *row; /* (H) */
} Entry;

typedef std::vector<Entry> List;

/* Grid: a thread to a number. */
static __global__ void scale_kernel(half *rows, float scale, size_t numbers) {
    size_t i = blockIdx.x * (size_t)THREADS + threadIdx.x;
    if (i < numbers) {
        rows[i] = __float2half_rn(scale * __half2float(rows[i]));
    }
}

/* Grid: a thread to a number of the row. */
static __global__ void add_kernel(float *sum, const half *row, float weight, int H) {
    int h = blockIdx.x * THREADS + threadIdx.x;
    if (h < H) {
        sum[h] += weight * __half2float(row[h]);
    }
}

/* Grid: a thread to a number. */
static __global__ void round_kernel(half *y, const float *sum, size_t numbers) {
    size_t i = blockIdx.x * (size_t)THREADS + threadIdx.x;
    if (i < numbers) {
        y[i] = __float2half_rn(sum[i]);
    }
}

static int blocks_for(size_t numbers) {
    return (int)((numbers + THREADS - 1) / THREADS);
}

/* receive (ranks) = what the others say to this rank. */
static void exchange_counts(int *receive, const int *send) {
    size_t bytes = world.ranks * sizeof(int);
    int *device_send = fresh_array<int>(world.ranks), *device_receive = fresh_array<int>(world.ranks);
    copy(device_send, send, bytes);
    exchange(device_receive, world.each, device_send, world.each, sizeof(int));
    download(receive, device_receive, bytes);
}

static std::vector<Record> exchange_records(const int *to_first, const std::vector<Record> &records,
                                            const int *from_first) {
    std::vector<Record> arrived(to_first[world.ranks]);
    Record *send = fresh_array<Record>(records.size()), *receive = fresh_array<Record>(arrived.size());
    copy(send, records.data(), records.size() * sizeof(Record));
    exchange(receive, to_first, send, from_first, sizeof(Record));
    download(arrived.data(), receive, arrived.size() * sizeof(Record));
    return arrived;
}

/* lists (ranks): what goes to each. Returns what comes, by rank. */
static List exchange_lists(const std::vector<List> &lists, int H) {
    int send[MOST_RANKS], receive[MOST_RANKS], from_first[MOST_RANKS + 1], to_first[MOST_RANKS + 1];
    for (int r = 0; r < world.ranks; r++) {
        send[r] = (int)lists[r].size();
    }
    exchange_counts(receive, send);
    int out = rows_first(from_first, send), in = rows_first(to_first, receive);

    half *rows = fresh_array<half>((size_t)out * H), *arrived = fresh_array<half>((size_t)in * H), *next = rows;
    std::vector<Record> records;
    for (const List &list : lists) {
        for (const Entry &entry : list) {
            copy(next, entry.row, H * sizeof(half));
            next += H;
            records.push_back(entry.record);
        }
    }
    exchange(arrived, to_first, rows, from_first, H * sizeof(half));

    List came;
    for (const Record &record : exchange_records(to_first, records, from_first)) {
        came.push_back({record, arrived + came.size() * H});
    }
    return came;
}

/* A list for each rank: the choices of this rank's tokens. */
static std::vector<List> choices(const Task *task) {
    std::vector<List> lists(task->ranks);
    std::vector<int> expert((size_t)task->T * task->K);
    download(expert.data(), task->expert, expert.size() * sizeof(int));
    for (int t = 0; t < task->T; t++) {
        for (int j = 0; j < task->K; j++) {
            int e = expert[t * task->K + j];
            lists[e / task->experts].push_back({{e, task->rank, t, j}, task->x + (size_t)t * task->H});
        }
    }
    return lists;
}

/* Every expert works on its rows. Returns a list for each rank: the rows that go back. */
static std::vector<List> run_experts(const Task *task, const List &arrived) {
    std::vector<List> of_expert(task->experts), back(task->ranks);
    half *rows = fresh_array<half>(arrived.size() * task->H);
    for (const Entry &entry : arrived) {
        of_expert[entry.record.expert % task->experts].push_back(entry);
    }
    for (const List &list : of_expert) {
        for (size_t i = 0; i < list.size(); i++) {
            half *row = rows + i * task->H;
            copy(row, list[i].row, task->H * sizeof(half));
            back[list[i].record.rank].push_back({list[i].record, row});
        }
        if (!list.empty()) {
            float scale = scale_at(list[0].record.expert, task->whole);
            size_t numbers = list.size() * task->H;
            LAUNCH(scale_kernel, blocks_for(numbers), THREADS, rows, scale, numbers);
        }
        rows += list.size() * task->H;
    }
    return back;
}

static void add_up(const Task *task, const List &returned) {
    size_t numbers = (size_t)task->T * task->H;
    float *sum = fresh_array<float>(numbers);
    std::vector<float> weight((size_t)task->T * task->K);
    download(weight.data(), task->weight, weight.size() * sizeof(float));
    CUDA(cudaMemsetAsync(sum, 0, numbers * sizeof(float), world.stream));
    for (const Entry &entry : returned) {
        int token = entry.record.token;
        LAUNCH(add_kernel, blocks_for(task->H), THREADS, sum + (size_t)token * task->H, entry.row,
               weight[token * task->K + entry.record.choice], task->H);
    }
    LAUNCH(round_kernel, blocks_for(numbers), THREADS, task->y, sum, numbers);
}

static void run(const Task *task) {
    List arrived = exchange_lists(choices(task), task->H);
    List returned = exchange_lists(run_experts(task, arrived), task->H);
    add_up(task, returned);
    give_back(&fresh);
}

int main(int argc, char **argv) {
    return alltoall_ladder({"0 host loops", NULL, run}, argc, argv);
}
