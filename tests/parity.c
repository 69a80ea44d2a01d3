/* The operations of operations.h on one device against another's results, against themselves, and against the clock.
 *
 * The program is linked with the kernels of one device. The CPU's writes its results to standard output; another's
 * reads them, makes the same inputs (they are functions of a seed), runs the same operations and compares every
 * gradient, output, saved array and plan:
 *
 *     parity_cpu write                | parity_cuda_fp32 compare      relative L2 distance <= 1e-5, integers equal
 *     parity_cpu write --round bf16   | parity_cuda compare           <= 4e-3
 *     parity_cuda bits                ten runs, recorded ones too: the same bits; rows keep theirs in other company
 *     parity_cuda time                median time of forward and backward at the large shapes
 *
 * One rounding to bf16 changes a number by at most 2^-8 = 3.9e-3 of it, so 4e-3 leaves room for the last one alone.
 * With --round bf16 the CPU therefore rounds all that a bf16 device stores before (case.h). Two more roundings happen
 * on the matrix units, between what is stored: of P and dS in attention, of a product that is then added to an array.
 * The shapes that are multiplied there give arrays of hundreds of numbers or more, whose errors average: a rounding is
 * off by 1.7e-3 in L2, two of them by 2.3e-3.
 *
 * --path mma|plain has the device take no faster kernels than these (device_use_path), --small keeps to the small
 * shapes, further words to operations of these names. All modes but `write` end with "N passed, N failed", and the exit
 * status is 0 where none failed. Device memory is poisoned before each run.
 * Read next: parity_bits.h; cuda.sh, which runs it all.
 */
#define DEVICE_MEMORY
#include "operations.h"
#include "parity_bits.h"
#include "parity_time.h"

#include "../kernels/checksum.h"

static const double tolerance_float = 1e-5, tolerance_bf16 = 4e-3;

typedef struct {
    char operation[32];
    int n[EXTENTS];
    uint64_t seed;
    uint64_t bytes;  /* of the results that follow */
    uint32_t inputs; /* checksum */
    int bf16;
} Record;

/* ---- write */

static uint32_t inputs_checksum(const Case *c) {
    uint32_t crc = 0;
    for (int i = 0; i < c->array_count; i++) {
        const Array *a = &c->arrays[i];
        size_t bytes = a->count * sizeof(acc_t);
        crc = crc32c(crc, a->before, bytes);
        if (a->role == ROLE_INPUT) {
            crc = crc32c(crc, a->value, bytes);
        } else if (a->role == ROLE_OUTPUT) {
            crc = crc32c(crc, a->gradient, bytes);
        }
    }
    return crc;
}

static void write_case(const Operation *op, const int *extents, uint64_t seed, bool bf16) {
    Case c;
    case_make_rounded(&c, op, extents, seed, bf16);
    case_forward(op, &c);
    case_backward(op, &c);
    Record record = {.seed = c.seed, .bytes = case_snapshot(&c, NULL), .inputs = inputs_checksum(&c), .bf16 = bf16};
    snprintf(record.operation, sizeof record.operation, "%s", op->name);
    memcpy(record.n, extents, sizeof record.n);
    char *results = case_memory(&c, record.bytes, 1);
    case_snapshot(&c, results);
    bool written =
        fwrite(&record, sizeof record, 1, stdout) == 1 && fwrite(results, 1, record.bytes, stdout) == record.bytes;
    CHECK(written && fflush(stdout) == 0, "results cannot be written: is the reader still there?");
    case_free(&c);
}

static void write_results(const Selection *selection, bool bf16) {
    for (int i = 0; selected_operation(selection, i); i++) {
        const Operation *op = selected_operation(selection, i);
        const int *extents;
        for (int shape = 0; (extents = selected_shape(selection, op, shape)); shape++) {
            write_case(op, extents, (uint64_t)shape + 1, bf16);
        }
    }
}

/* ---- compare */

typedef struct {
    double error;  /* relative L2 distance; infinite where a number is missing or an integer differs */
    size_t at;     /* the element that differs most */
    size_t differ; /* how many integers do */
    double got, expected;
} Difference;

static Difference compare_ints(const int *x, const int *expected, size_t count) {
    Difference d = {0};
    for (size_t i = 0; i < count; i++) {
        if (x[i] != expected[i]) {
            if (d.differ++ == 0) {
                d = (Difference){INFINITY, i, 1, x[i], expected[i]};
            }
        }
    }
    return d;
}

/* Where the gradient is known to be zero, rounding is all there is, and `zero` compares it with 1. What neither side
 * wrote is NaN on both. */
static Difference compare_numbers(const acc_t *x, const acc_t *expected, size_t count, bool zero) {
    double difference = 0, norm = 0, worst = -1;
    Difference d = {0};
    for (size_t i = 0; i < count; i++) {
        double got = (double)x[i], want = (double)expected[i], gap = fabs(got - want);
        if (isnan(got) && isnan(want)) {
            continue;
        }
        gap = got == want ? 0 : isfinite(gap) ? gap : INFINITY;
        if (gap > worst) {
            worst = gap;
            d.at = i;
            d.got = got;
            d.expected = want;
        }
        difference += gap * gap;
        norm += isfinite(want) ? want * want : 0;
    }
    norm = zero ? (double)count : norm;
    d.error = norm > 0 ? sqrt(difference / norm) : sqrt(difference);
    return d;
}

static Difference compare_result(const Result *r, const void *expected, const char *zero) {
    return r->number == NUMBER_INT ? compare_ints(r->host, expected, r->count)
                                   : compare_numbers(r->host, expected, r->count, word_in(r->name, zero));
}

/* In bf16 only what has such a number among its arrays may be as far off as bf16 is. */
static double case_tolerance(const Case *c) {
    for (int i = 0; i < c->array_count && sizeof(real_t) == 2; i++) {
        if (c->arrays[i].storage != PRECISE) {
            return tolerance_bf16;
        }
    }
    return tolerance_float;
}

/* A choice that differs is a near tie or a fault: the two probabilities tell which. */
static void print_choice(Case *c, const Difference *d) {
    for (int i = 0; i < c->array_count; i++) {
        const Array *a = &c->arrays[i];
        bool scores = strcmp(a->name, "probs") == 0 || strcmp(a->name, "h") == 0;
        if (scores && d->got >= 0 && d->expected >= 0 && d->got < c->plan.E && d->expected < c->plan.E) {
            const acc_t *row = a->value + d->at / (size_t)c->plan.K * (size_t)c->plan.E;
            printf("      %s of the two experts: %.9g and %.9g\n", a->name, (double)row[(int)d->got],
                   (double)row[(int)d->expected]);
        }
    }
}

static void print_difference(const Operation *op, Case *c, const Result *r, const Difference *d) {
    printf("FAIL  %s (", op->name);
    for (int i = 0; i < EXTENTS; i++) {
        printf(i == 0 ? "%d" : " %d", c->n[i]);
    }
    printf(" = %s), %s[%zu]: ", op->extents, r->name, r->count);
    if (r->number == NUMBER_INT) {
        printf("%zu differ, first [%zu] is %.0f, not %.0f\n", d->differ, d->at, d->got, d->expected);
    } else {
        printf("relative error %.1e, worst [%zu] is %.9g, not %.9g\n", d->error, d->at, d->got, d->expected);
    }
    if (strcmp(r->name, "plan.expert") == 0) {
        print_choice(c, d);
    }
}

/* A comparison that cannot fail proves nothing: one element of each result in turn, off by 20 tolerances of the norm,
 * must be found. Returns how many are not. */
static int missed_faults(Case *c, const Result *results, int count, const char *expected, const char *zero) {
    char *spoiled = case_memory(c, case_snapshot(c, NULL), 1);
    int missed = 0;
    size_t at = 0;
    for (int i = 0; i < count; at += result_bytes(&results[i++])) {
        Result r = results[i];
        double tolerance = case_tolerance(c);
        if (r.count == 0) {
            continue;
        }
        memcpy(spoiled + at, expected + at, result_bytes(&r));
        r.host = spoiled + at;
        if (r.number == NUMBER_INT) {
            ((int *)(spoiled + at))[r.count / 2] ^= 1;
        } else {
            acc_t *x = (acc_t *)(spoiled + at), *one = &x[r.count / 2];
            double norm = 0;
            for (size_t j = 0; j < r.count; j++) {
                norm += isfinite(x[j]) ? (double)x[j] * (double)x[j] : 0;
            }
            norm = word_in(r.name, zero) || norm == 0 ? (double)r.count : norm;
            *one = isfinite(*one) ? (acc_t)((double)*one + 20 * tolerance * sqrt(norm)) : 0;
        }
        if (compare_result(&r, expected + at, zero).error <= tolerance) {
            printf("FAIL  the comparison would not find a wrong %s\n", r.name);
            missed++;
        }
    }
    return missed;
}

/* The inputs whose gradient is exactly zero, where the shape has some. */
static const char *known_zeros(const Operation *op, const int *extents) {
    for (int i = 0; op->shapes[i][0] > 0; i++) {
        if (memcmp(op->shapes[i], extents, sizeof op->shapes[i]) == 0) {
            return op->zero[i];
        }
    }
    return NULL;
}

typedef struct {
    const Operation *op;
    int cases;
    double worst;
} Line;

/* One case: whether it agrees, and its largest error. */
static bool compare_case(const Operation *op, const Record *record, const char *expected, Line *line) {
    Case c;
    Result results[CASE_RESULTS];
    case_draw(&c, op, record->n, record->seed, record->bf16);
    CHECK(inputs_checksum(&c) == record->inputs && case_snapshot(&c, NULL) == record->bytes,
          "%s: the writer had other inputs; build both programs from the same sources", op->name);
    case_forward(op, &c);
    case_backward(op, &c);
    int count = case_results(&c, results), wrong = 0;
    const char *zero = known_zeros(op, record->n);
    size_t at = 0;
    for (int i = 0; i < count; at += result_bytes(&results[i++])) {
        Difference d = compare_result(&results[i], expected + at, zero);
        line->worst = fmax(line->worst, d.error);
        if (!(d.error <= case_tolerance(&c))) {
            print_difference(op, &c, &results[i], &d);
            wrong++;
        }
    }
    if (line->cases++ == 0) {
        wrong += missed_faults(&c, results, count, expected, zero);
    }
    case_free(&c);
    return wrong == 0;
}

static Count compare_results(void) {
    enum { LINES = 64 };
    Line lines[LINES] = {0};
    Count total = {0};
    Record record;
    while (fread(&record, sizeof record, 1, stdin) == 1) {
        const Operation *op = operation_named(record.operation);
        char *expected = malloc(record.bytes + 1);
        CHECK(expected && fread(expected, 1, record.bytes, stdin) == record.bytes, "the writer ended early");
        CHECK(record.bf16 == (sizeof(real_t) == 2), "write --round bf16 is for the build with bf16, and for it alone");
        int i = 0;
        while (lines[i].op && lines[i].op != op) {
            CHECK(++i < LINES, "raise LINES");
        }
        lines[i].op = op;
        count_case(&total, compare_case(op, &record, expected, &lines[i]));
        free(expected);
    }
    printf("%-18s %5s  worst relative error (" REAL_NAME ")\n", "operation", "cases");
    for (int i = 0; lines[i].op; i++) {
        printf("%-18s %5d  %.1e\n", lines[i].op->name, lines[i].cases, lines[i].worst);
    }
    return total;
}

static void use_path(const char *name) {
    bool mma = strcmp(name, "mma") == 0;
    CHECK(mma || strcmp(name, "plain") == 0, "--path %s: choose mma or plain", name);
    CHECK(device_use_path(mma ? PATH_MMA : PATH_PLAIN), "--path %s: a build with " REAL_NAME " has no such kernels",
          name);
}

int main(int argc, char **argv) {
    Selection selection = {0};
    bool bf16 = false;
    const char *mode = argc > 1 ? argv[1] : "";
    for (int i = 2; i < argc; i++) {
        if (strcmp(argv[i], "--round") == 0 && i + 1 < argc && strcmp(argv[i + 1], "bf16") == 0) {
            bf16 = true;
            i++;
        } else if (strcmp(argv[i], "--path") == 0 && i + 1 < argc) {
            use_path(argv[++i]);
        } else if (strcmp(argv[i], "--small") == 0) {
            selection.small = true;
        } else {
            CHECK(operation_named(argv[i]) && selection.name_count < NAMES, "too many names: leave some out");
            selection.names[selection.name_count++] = argv[i];
        }
    }
    Count count = {0};
    if (strcmp(mode, "write") == 0) {
        CHECK(!bf16 || !device_runs_ahead(), "write --round bf16 is for the CPU, which stands in for a bf16 device");
        write_results(&selection, bf16);
        return EXIT_OK;
    } else if (strcmp(mode, "compare") == 0) {
        count = compare_results();
    } else if (strcmp(mode, "bits") == 0) {
        count = check_bits(&selection);
    } else if (strcmp(mode, "time") == 0) {
        selection.large = !selection.small;
        count = time_operations(&selection);
    } else {
        die(__FILE__, __LINE__,
            "usage: parity write|compare|bits|time [--round bf16] [--path mma|plain] [--small] "
            "[OPERATION ...]");
    }
    printf("%d passed, %d failed\n", count.passed, count.failed);
    return count.failed == 0 && count.passed > 0 ? EXIT_OK : EXIT_ERROR;
}
