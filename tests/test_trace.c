/* The file of --dump-routing: what is written is read back, the bytes are what trace.h says to readers in other
 * languages, a file of another run, cut short or damaged ends the program in one line, and a full disk does not.
 */
#include "forked.h"

#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "../model/trace.h"

enum { N = 5, K = 2, E = 7, ROUTERS = 3, SLICES = 2, STEPS = 4, FIRST = 10, HEADER_BYTES = 1024 };
enum { RECORD_BYTES = N * K * 2, RECORDS = STEPS * SLICES * ROUTERS };

static const TraceShape shape = {N, K, E, ROUTERS, SLICES, FIRST};
static char directory[] = "/tmp/moelab-trace-XXXXXX";
static char path[64];

/* Entry i of a record, every record another; some are empty. */
static int entry(int64_t step, int slice, int router, int i) {
    int value = (int)(step * 5 + slice * 3 + router * 2 + i) % (E + 1);
    return value == E ? -1 : value;
}

static void write_trace(void) {
    Trace trace;
    trace_create(&trace, path, shape);
    for (int64_t step = FIRST; step < FIRST + STEPS; step++) {
        for (int slice = 0; slice < SLICES; slice++) {
            for (int router = 0; router < ROUTERS; router++) {
                int expert[N * K];
                for (int i = 0; i < N * K; i++) {
                    expert[i] = entry(step, slice, router, i);
                }
                trace_append(&trace, expert);
            }
        }
    }
    trace_close(&trace);
    assert_null(trace.file);
}

static long file_size(void) {
    struct stat status;
    assert_int_equal(stat(path, &status), 0);
    return (long)status.st_size;
}

/* Overwrites the two bytes at `offset`. */
static void damage(long offset, uint16_t value) {
    FILE *file = fopen(path, "r+b");
    assert_non_null(file);
    assert_int_equal(fseek(file, offset, SEEK_SET), 0);
    fputc(value & 255, file);
    fputc(value >> 8, file);
    assert_int_equal(fclose(file), 0);
}

static void check_record(Trace *trace, int64_t step, int slice, int router) {
    int expert[N * K + 1] = {[N * K] = 12345};
    trace_read(trace, expert, step, slice, router);
    for (int i = 0; i < N * K; i++) {
        assert_int_equal(expert[i], entry(step, slice, router, i));
    }
    assert_int_equal(expert[N * K], 12345);
}

/* --- what is written is read --- */

static void test_round_trip(void **state) {
    Trace trace;
    write_trace();
    trace_open(&trace, path, shape);
    for (int64_t step = FIRST; step < FIRST + STEPS; step++) {
        for (int slice = 0; slice < SLICES; slice++) {
            for (int router = 0; router < ROUTERS; router++) {
                check_record(&trace, step, slice, router);
            }
        }
    }
    check_record(&trace, FIRST, 0, 0); /* in any order */
    check_record(&trace, FIRST + STEPS - 1, SLICES - 1, ROUTERS - 1);
    trace_close(&trace);
    trace_close(&trace); /* one that is not open */
}

static void test_first_step_is_the_files(void **state) {
    Trace trace;
    TraceShape expected = shape;
    expected.first_step = 0;
    write_trace();
    trace_open(&trace, path, expected);
    assert_int_equal(trace.shape.first_step, FIRST);
    check_record(&trace, FIRST + 1, 1, 2);
    trace_close(&trace);
}

static int64_t little_endian(const unsigned char *bytes, int count) {
    int64_t value = 0;
    for (int i = 0; i < count; i++) {
        value |= (int64_t)bytes[i] << 8 * i;
    }
    return value;
}

static void test_bytes(void **state) {
    static const int header[] = {20261121, 1, N, K, E, ROUTERS, SLICES, FIRST};
    enum { BYTES = HEADER_BYTES + RECORDS * RECORD_BYTES };
    unsigned char bytes[BYTES];
    write_trace();
    assert_int_equal(file_size(), BYTES);
    FILE *file = fopen(path, "rb");
    assert_non_null(file);
    assert_int_equal(fread(bytes, 1, BYTES, file), BYTES);
    fclose(file);
    for (int i = 0; i < HEADER_BYTES / 4; i++) {
        int expected = i < (int)(sizeof header / sizeof *header) ? header[i] : 0;
        assert_int_equal(little_endian(bytes + 4 * i, 4), expected);
    }
    int absent = 0;
    for (int record = 0; record < RECORDS; record++) { /* steps, in each slices, in each routers */
        for (int i = 0; i < N * K; i++) {
            const unsigned char *at = bytes + HEADER_BYTES + record * RECORD_BYTES + 2 * i;
            int expert = entry(FIRST + record / (SLICES * ROUTERS), record / ROUTERS % SLICES, record % ROUTERS, i);
            assert_int_equal(little_endian(at, 2), expert < 0 ? 65535 : expert);
            absent += expert < 0;
        }
    }
    assert_true(absent > 0);
}

static void test_replaces_an_earlier_file(void **state) {
    Trace trace;
    write_trace();
    trace_create(&trace, path, shape);
    trace_close(&trace);
    assert_int_equal(file_size(), HEADER_BYTES);
}

/* --- files that cannot be replayed --- */

static void open_as(void *expected) {
    Trace trace;
    trace_open(&trace, path, *(TraceShape *)expected);
    trace_close(&trace);
}

static void assert_open_refused(TraceShape expected, const char *words) {
    Forked result;
    run_forked(&result, open_as, &expected);
    assert_refused(&result, words);
}

/* A resumed run goes on where its checkpoint stands: later records go, earlier ones stay. */
static void test_continues_after_a_step(void **state) {
    write_trace();
    Trace trace;
    TraceShape fresh = shape;
    fresh.first_step = 0; /* of no consequence: the file's own holds */
    trace_continue(&trace, path, fresh, FIRST + 2);
    assert_int_equal(trace.shape.first_step, FIRST);
    int expert[N * K];
    for (int i = 0; i < N * K; i++) {
        expert[i] = entry(99, 0, 0, i);
    }
    trace_append(&trace, expert);
    trace_close(&trace);
    assert_int_equal(file_size(), HEADER_BYTES + (2 * SLICES * ROUTERS + 1) * RECORD_BYTES);
    trace_open(&trace, path, shape);
    check_record(&trace, FIRST + 1, SLICES - 1, ROUTERS - 1);
    int read[N * K];
    trace_read(&trace, read, FIRST + 2, 0, 0);
    assert_memory_equal(read, expert, sizeof read);
    trace_close(&trace);

    assert_int_equal(unlink(path), 0);
    trace_continue(&trace, path, shape, 7);
    assert_int_equal(trace.shape.first_step, 7);
    trace_close(&trace);
}

static void continue_after(void *step) {
    Trace trace;
    trace_continue(&trace, path, shape, *(int64_t *)step);
}

static void test_does_not_continue_over_a_gap(void **state) {
    static const int64_t steps[] = {FIRST + STEPS + 1, FIRST - 1};
    static const char *const words[] = {"does not hold the steps before 16", "does not hold the steps before 10"};
    write_trace();
    for (int i = 0; i < 2; i++) {
        Forked result;
        int64_t step = steps[i];
        run_forked(&result, continue_after, &step);
        assert_refused(&result, words[i]);
    }
    assert_int_equal(file_size(), HEADER_BYTES + RECORDS * RECORD_BYTES);
}

static void test_another_shape_is_refused(void **state) {
    write_trace();
    for (int field = 0; field < 5; field++) {
        TraceShape other = shape;
        int *fields[] = {&other.N, &other.K, &other.E, &other.routers, &other.slices};
        *fields[field] += 1;
        assert_open_refused(other, "records 5 tokens x 2 of 7 experts, 3 routers, 2 slices; this run has");
    }
    TraceShape wide = shape;
    wide.N = 6;
    assert_open_refused(wide, "this run has 6 x 2 of 7, 3, 2: use the options of the recorded run");
}

static void test_what_is_no_trace_is_refused(void **state) {
    write_trace();
    damage(0, 0);
    assert_open_refused(shape, "is no routing trace: name a file that --dump-routing wrote");
    write_trace();
    damage(4, 2); /* another version */
    assert_open_refused(shape, "is no routing trace");
    write_trace();
    assert_int_equal(truncate(path, HEADER_BYTES - 1), 0);
    assert_open_refused(shape, "is no routing trace");
    assert_int_equal(unlink(path), 0);
    assert_open_refused(shape, "cannot read the routing trace");
    assert_int_equal(mkdir(path, 0777), 0);
    assert_open_refused(shape, "is no routing trace");
    assert_int_equal(rmdir(path), 0);
}

static void read_step(void *step) {
    Trace trace;
    int expert[N * K];
    trace_open(&trace, path, shape);
    trace_read(&trace, expert, *(int64_t *)step, SLICES - 1, ROUTERS - 1);
    trace_close(&trace);
}

static void assert_read_refused(int64_t step, const char *words) {
    Forked result;
    run_forked(&result, read_step, &step);
    assert_refused(&result, words);
}

static void test_steps_that_are_not_there_are_refused(void **state) {
    write_trace();
    assert_read_refused(FIRST + STEPS, "does not hold step 15");
    assert_read_refused(FIRST - 1, "begins with step 11: a run cannot replay it from step 10");
    assert_read_refused(INT64_C(1) << 40, "does not hold step");
    assert_int_equal(truncate(path, file_size() - 1), 0); /* the last record is cut short, the one before is whole */
    assert_read_refused(FIRST + STEPS - 1, "does not hold step 14");
    Trace trace;
    trace_open(&trace, path, shape);
    check_record(&trace, FIRST + STEPS - 1, SLICES - 1, ROUTERS - 2);
    trace_close(&trace);
}

static void test_experts_that_do_not_exist_are_refused(void **state) {
    const long last = HEADER_BYTES + RECORDS * RECORD_BYTES - 2;
    write_trace();
    damage(last, E);
    assert_read_refused(FIRST + STEPS - 1, "the routing trace names expert 7 of 7: it is damaged");
    damage(last, 65534);
    assert_read_refused(FIRST + STEPS - 1, "names expert 65534 of 7");
    damage(last, entry(FIRST + STEPS - 1, SLICES - 1, ROUTERS - 1, N * K - 2));
    assert_read_refused(FIRST + STEPS - 1, "names an expert twice for a token");
    damage(last, E - 1);
    Trace trace;
    int expert[N * K];
    trace_open(&trace, path, shape);
    trace_read(&trace, expert, FIRST + STEPS - 1, SLICES - 1, ROUTERS - 1);
    assert_int_equal(expert[N * K - 1], E - 1);
    trace_close(&trace);
}

/* --- files that cannot be written --- */

static void create_at(void *where) {
    Trace trace;
    trace_create(&trace, where, shape);
}

static void test_unwritable_paths_are_refused(void **state) {
    Forked result;
    run_forked(&result, create_at, "/nowhere/trace");
    assert_refused(&result, "cannot write --dump-routing /nowhere/trace (No such file or directory): choose another");
    run_forked(&result, create_at, directory);
    assert_refused(&result, "choose another file");
    run_forked(&result, create_at, "/dev/full");
    assert_refused(&result, "cannot write --dump-routing /dev/full (No space left on device): free some space");
}

/* The header fits, then no more, played by a limit on the size of files. *records: how many are appended. */
static void append_on_a_full_disk(void *records) {
    static const struct rlimit limit = {HEADER_BYTES + RECORD_BYTES, RLIM_INFINITY};
    Trace trace;
    int expert[N * K] = {0};
    signal(SIGXFSZ, SIG_IGN);
    trace_create(&trace, path, shape);
    setrlimit(RLIMIT_FSIZE, &limit);
    for (int i = 0; i < *(int *)records; i++) {
        trace_append(&trace, expert);
    }
    trace_close(&trace);
    printf("went on\n");
}

static void test_a_full_disk_is_told_once(void **state) {
    static const struct {
        int records;
        const char *words;
    } cases[] = {
        {1, ""},                                    /* fits */
        {2, "the end of the routing trace is not"}, /* still in memory when the trace is closed */
        {5000, "training goes on without it"},      /* found while training */
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int records = cases[i].records;
        Forked result;
        run_forked(&result, append_on_a_full_disk, &records);
        assert_int_equal(result.exit_code, 0);
        assert_string_equal(result.out, "went on\n");
        assert_non_null(strstr(result.err, cases[i].words));
        assert_ptr_equal(strchr(result.err, '\n'), strrchr(result.err, '\n'));
        assert_true((result.err[0] != '\0') == (i > 0));
    }
}

static int set_up(void **state) {
    if (!mkdtemp(directory)) {
        return -1;
    }
    snprintf(path, sizeof path, "%s/trace.bin", directory);
    return 0;
}

static int tear_down(void **state) {
    unlink(path);
    return rmdir(directory);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_first_step_is_the_files),
        cmocka_unit_test(test_bytes),
        cmocka_unit_test(test_replaces_an_earlier_file),
        cmocka_unit_test(test_continues_after_a_step),
        cmocka_unit_test(test_does_not_continue_over_a_gap),
        cmocka_unit_test(test_another_shape_is_refused),
        cmocka_unit_test(test_what_is_no_trace_is_refused),
        cmocka_unit_test(test_steps_that_are_not_there_are_refused),
        cmocka_unit_test(test_experts_that_do_not_exist_are_refused),
        cmocka_unit_test(test_unwritable_paths_are_refused),
        cmocka_unit_test(test_a_full_disk_is_told_once),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
