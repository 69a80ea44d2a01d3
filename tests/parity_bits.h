/* Same bits whatever a device does at the same time: ten runs of each operation, recorded runs, and rows in other
 * company.
 *
 * Upstream gradients are random: with all ones, sums of any order agree by accident. Routing is also tried with every
 * token on one expert, the longest sums there are. What test_determinism.c asks of the CPU's threads is asked here of
 * any device, through host values alone.
 *
 * A row's result is its own affair, so it keeps its bits when (a) the batch is split, (b) other experts get other rows,
 * (c) the row comes alone, (d) the rows are permuted.
 */
#ifndef TESTS_PARITY_BITS_H
#define TESTS_PARITY_BITS_H

#include "parity_select.h"

enum { BITS_RUNS = 10, BITS_RECORDED_RUNS = 3 };

/* ---- the same run again */

/* The operation whose calls are recorded, and the recordings: a case has no place for them. */
static struct {
    const Operation *op;
    Recording forward, backward;
} recorded;

static inline void run_recorded(Recording *recording, void (*call)(Case *c), Case *c) {
    if (!recording_replay(recording, NULL)) {
        recording_begin(recording, NULL);
        call(c);
        recording_end(recording, NULL);
    }
}

static inline void recorded_forward(Case *c) {
    run_recorded(&recorded.forward, recorded.op->forward, c);
}

static inline void recorded_backward(Case *c) {
    run_recorded(&recorded.backward, recorded.op->backward, c);
}

static inline bool same_bits(const Operation *op, const int *extents, uint64_t seed) {
    Case c;
    bool same = true;
    Operation recording = *op;
    recording.forward = recorded_forward;
    recording.backward = op->backward ? recorded_backward : NULL;
    recorded.op = op;
    case_draw(&c, op, extents, seed, true);
    size_t bytes = case_snapshot(&c, NULL);
    char *first = case_memory(&c, bytes, 1), *again = case_memory(&c, bytes, 1);
    for (int run = 0; run < BITS_RUNS + BITS_RECORDED_RUNS && same; run++) {
        const Operation *runs = run < BITS_RUNS ? op : &recording;
        case_forward(runs, &c);
        case_backward(runs, &c);
        case_snapshot(&c, run == 0 ? first : again);
        if (run > 0 && memcmp(first, again, bytes) != 0) {
            printf("FAIL  %s: ", op->name);
            for (int i = 0; i < EXTENTS; i++) {
                printf("%d ", extents[i]);
            }
            printf("= %s: %s run %d differs from the first\n", op->extents, run < BITS_RUNS ? "plain" : "recorded",
                   run);
            same = false;
        }
    }
    recording_free(&recorded.forward);
    recording_free(&recorded.backward);
    case_free(&c);
    return same;
}

/* ---- rows in other company */

/* What belongs to one row (or token) of a case: inputs and upstreams to be taken along, results to be compared. */
typedef struct {
    const char *inputs[4], *upstreams[2]; /* by name, NULL past the last */
    const char *values[4], *gradients[4];
} RowArrays;

static const RowArrays expert_rows = {
    .inputs = {"x", "row_weight"}, .upstreams = {"weighted_y"}, .values = {"y", "a"}, .gradients = {"x", "row_weight"}};
static const RowArrays layer_rows = {
    .inputs = {"x"}, .upstreams = {"y"}, .values = {"logits", "probs", "y"}, .gradients = {"x"}};

static inline void copy_row(acc_t *to, size_t row, const acc_t *from, size_t from_row, size_t width) {
    memcpy(to + row * width, from + from_row * width, width * sizeof *to);
}

/* Row r of `to` is what row from_r of `from` is. */
static inline void take_row(const RowArrays *arrays, Case *to, int r, Case *from, int from_r) {
    for (int i = 0; arrays->inputs[i]; i++) {
        size_t width = array_named(to, arrays->inputs[i])->count / (size_t)to->n[0];
        copy_row(host_val(to, arrays->inputs[i]), (size_t)r, host_val(from, arrays->inputs[i]), (size_t)from_r, width);
    }
    for (int i = 0; arrays->upstreams[i]; i++) {
        size_t width = array_named(to, arrays->upstreams[i])->count / (size_t)to->n[0];
        copy_row(host_grad(to, arrays->upstreams[i]), (size_t)r, host_grad(from, arrays->upstreams[i]), (size_t)from_r,
                 width);
    }
}

/* The names of what differs, each once. */
typedef struct {
    char names[128];
} Differing;

static inline void add_name(Differing *differing, const char *name, const char *suffix) {
    char word[64];
    snprintf(word, sizeof word, "%s%s", name, suffix);
    size_t used = strlen(differing->names);
    if (!word_in(word, differing->names)) {
        snprintf(differing->names + used, sizeof differing->names - used, " %s", word);
    }
}

/* How many arrays differ in that row. */
static inline int row_differs(const RowArrays *arrays, Case *c, int r, Case *all, int all_r, Differing *differing) {
    int differ = 0;
    for (int i = 0; i < 4; i++) {
        for (int gradient = 0; gradient < 2; gradient++) {
            const char *name = gradient ? arrays->gradients[i] : arrays->values[i];
            if (name) {
                const Array *x = array_named(c, name), *y = array_named(all, name);
                size_t width = x->count / (size_t)c->n[0];
                const acc_t *a = (gradient ? x->gradient : x->value) + (size_t)r * width;
                const acc_t *b = (gradient ? y->gradient : y->value) + (size_t)all_r * width;
                if (memcmp(a, b, width * sizeof *a) != 0) {
                    add_name(differing, name, gradient ? "'" : "");
                    differ++;
                }
            }
        }
    }
    return differ;
}

/* A permutation of n. */
static inline void shuffle_rows(int *order, int n, uint64_t seed) {
    for (int i = 0; i < n; i++) {
        order[i] = i;
    }
    for (int i = n - 1; i > 0; i--) {
        int j = (int)random_below(random_key(seed, RANDOM_TEST, 1), (uint64_t)i, (uint64_t)i + 1), swap = order[i];
        order[i] = order[j];
        order[j] = swap;
    }
}

/* A batch, and what became of its rows in other company. */
typedef struct {
    const Operation *op;
    const RowArrays *arrays;
    bool experts; /* the rows are expert 1's of three, and strangers its neighbours' */
    Case all;
    Differing differing;
} Batch;

static inline void set_company(const Batch *batch, Case *c, int before, int count, int after) {
    if (batch->experts) {
        memcpy(c->host_index, (int[]){0, before, before + count, before + count + after}, 4 * sizeof(int));
    } else {
        fill_value(host_grad(c, "load"), LOAD_VALUES, 0); /* the balance losses couple tokens */
    }
}

/* How many arrays of rows differ when rows order[0 .. count) of the batch run with strangers before and after them. */
static inline int run_company(Batch *batch, const int *order, int count, int before, int after) {
    Case c;
    int extents[EXTENTS], differ = 0;
    memcpy(extents, batch->all.n, sizeof extents);
    extents[0] = before + count + after;
    case_draw(&c, batch->op, extents, batch->all.seed, true);
    for (int r = 0; r < count; r++) {
        take_row(batch->arrays, &c, before + r, &batch->all, order[r]);
    }
    set_company(batch, &c, before, count, after);
    case_forward(batch->op, &c);
    case_backward(batch->op, &c);
    for (int r = 0; r < count; r++) {
        differ += row_differs(batch->arrays, &c, before + r, &batch->all, order[r], &batch->differing);
    }
    case_free(&c);
    return differ;
}

/* (a) to (d) for `rows` rows from `first` on of a batch. */
static inline bool rows_keep_bits(const char *name, const int *extents, int first, int rows) {
    enum { MOST = 512 };
    static const int neighbours[][2] = {{0, 0}, {1, 0}, {0, 200}, {13, 64}};
    bool experts = strcmp(name, "experts") == 0;
    Batch batch = {.op = operation_named(name), .arrays = experts ? &expert_rows : &layer_rows, .experts = experts};
    int order[MOST], split = 0, company = 0, alone = 0, permuted = 0;
    CHECK(rows <= MOST, "raise MOST");
    case_draw(&batch.all, batch.op, extents, 40, true);
    set_company(&batch, &batch.all, first, rows, extents[0] - first - rows);
    case_forward(batch.op, &batch.all);
    case_backward(batch.op, &batch.all);
    for (int r = 0; r < rows; r++) {
        order[r] = first + r;
    }
    for (int at = 1; at < rows; at += 23) {
        split += run_company(&batch, order, at, 0, 0);
        split += run_company(&batch, order + at, rows - at, 0, 0);
    }
    for (int i = 0; i < 4; i++) {
        company += run_company(&batch, order, rows, neighbours[i][0], neighbours[i][1]);
    }
    for (int r = 0; r < rows; r += 5) {
        alone += run_company(&batch, order + r, 1, 0, 0);
    }
    shuffle_rows(order, rows, 51);
    for (int r = 0; r < rows; r++) {
        order[r] += first;
    }
    permuted = run_company(&batch, order, rows, 0, 0);
    case_free(&batch.all);
    if (split + company + alone + permuted == 0) {
        return true;
    }
    printf("FAIL  %s, rows in other company:", name);
    for (int i = 0; i < EXTENTS; i++) {
        printf(" %d", extents[i]);
    }
    printf(" = %s: arrays of rows that differ: split %d, others' counts %d, alone %d, permuted %d; in%s (' gradient)\n",
           batch.op->extents, split, company, alone, permuted, batch.differing.names);
    return false;
}

/* Whether the logits of a layer {N, C, H, E, ..} come from this project's own product; a library may sum in another
 * order for another N, which gate.h says. */
static inline bool gate_is_own(const int *layer) {
    return !device_runs_ahead() || (sizeof(real_t) == 2 && layer[3] <= 16 && layer[1] % 8 == 0);
}

static inline Count check_rows(const Selection *selection) {
    static const int experts[][EXTENTS] = {{103, 65, 49, 3, 0, SKEW_NONE, 1},   {103, 7, 300, 3, 1, SKEW_NONE, 1},
                                           {103, 64, 128, 3, 0, SKEW_NONE, 1},  {103, 64, 64, 3, 1, SKEW_NONE, 1},
                                           {303, 128, 256, 3, 0, SKEW_NONE, 1}, {303, 256, 64, 3, 1, SKEW_NONE, 1}};
    static const int layers[][EXTENTS] = {
        {96, 65, 49, 8, 2, 1},       {96, 64, 128, 8, 2, 1},
        {200, 128, 64, 64, 8, 1, 1}, {200, 128, 128, 64, 8, 0, 0, 0, LAYOUT_BLOCK},
        {96, 64, 64, 8, 8, 1},       {96, 64, 64, 8, 2, 1, 0, 0, LAYOUT_COMPACT, DROP_TOKEN, SKEW_ONE}};
    Count count = {0};
    for (size_t i = 0; i < sizeof experts / sizeof *experts && is_selected(selection, "experts"); i++) {
        count_case(&count, rows_keep_bits("experts", experts[i], 37, experts[i][0] - 42));
    }
    for (size_t i = 0; i < sizeof layers / sizeof *layers && is_selected(selection, "moe_layer"); i++) {
        if (gate_is_own(layers[i])) {
            count_case(&count, rows_keep_bits("moe_layer", layers[i], 0, layers[i][0]));
        }
    }
    return count;
}

static inline Count check_bits(const Selection *selection) {
    Count count = {0};
    for (int i = 0; selected_operation(selection, i); i++) {
        const Operation *op = selected_operation(selection, i);
        const int *extents;
        for (int shape = 0; (extents = selected_shape(selection, op, shape)); shape++) {
            count_case(&count, same_bits(op, extents, (uint64_t)shape + 1));
        }
    }
    Count rows = check_rows(selection);
    count.passed += rows.passed;
    count.failed += rows.failed;
    return count;
}

#endif
