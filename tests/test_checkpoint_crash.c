/* Saving a checkpoint through crashes, full disks and failing calls.
 *
 * The system calls that change the disk are interposed: in a forked child the n-th of them ends the process, or fails,
 * for every n until a save completes. What then lies on the disk must load as the old state or the new one, whole.
 */
// sanitize: no (hundreds of forks; test_checkpoint.c runs the same code sanitized)
// link: -Wl,--wrap=write,--wrap=fsync,--wrap=rename,--wrap=mkdir,--wrap=unlink,--wrap=rmdir,--wrap=statvfs
#include "checkpoint_fixture.h"

#include <errno.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

typedef enum {
    CALL_WRITE = 1,
    CALL_FSYNC = 2,
    CALL_RENAME = 4,
    CALL_MKDIR = 8,
    CALL_UNLINK = 16,
    CALL_RMDIR = 32,
    ALL_CALLS = 63
} Call;

typedef enum { PASS, CRASH, CRASH_HALF_WRITTEN, FAIL_ONCE, FAIL_FROM_THERE_ON, SHORT_WRITES } Mode;

/* What the interposed calls do. */
static struct {
    Mode mode;
    int calls;      /* which are counted */
    int countdown;  /* it happens at the call that brings this to 0 */
    int reason;     /* errno of a failure */
    bool disk_full; /* statvfs says so */
    char order[64]; /* what was called, a letter each, runs of writes and of unlinks as one */
} trap;

static void trap_set(Mode mode, int calls, int n, int reason) {
    trap.mode = mode;
    trap.calls = calls;
    trap.countdown = n;
    trap.reason = reason;
}

static void note(char letter) {
    size_t length = strlen(trap.order);
    bool repeated = length > 0 && trap.order[length - 1] == letter && strchr("wu", letter);
    if (!repeated && length + 1 < sizeof trap.order) {
        trap.order[length] = letter;
        trap.order[length + 1] = 0;
    }
}

/* Whether this call is to fail; in the crash modes the process ends here. */
static bool trapped(Call call) {
    note(call == CALL_WRITE    ? 'w'
         : call == CALL_FSYNC  ? 's'
         : call == CALL_RENAME ? 'r'
         : call == CALL_MKDIR  ? 'm'
         : call == CALL_UNLINK ? 'u'
                               : 'd');
    if (trap.mode == PASS || trap.mode == SHORT_WRITES || !(trap.calls & call)) {
        return false;
    }
    int left = --trap.countdown;
    if (left == 0 && (trap.mode == CRASH || trap.mode == CRASH_HALF_WRITTEN)) {
        _exit(42);
    }
    bool fails = left == 0 || (left < 0 && trap.mode == FAIL_FROM_THERE_ON);
    errno = fails ? trap.reason : errno;
    return fails;
}

ssize_t __real_write(int fd, const void *data, size_t bytes);
int __real_rename(const char *from, const char *to);
int __real_mkdir(const char *path, mode_t mode);
int __real_unlink(const char *path);
int __real_rmdir(const char *path);
int __real_statvfs(const char *path, struct statvfs *status);

ssize_t __wrap_write(int fd, const void *data, size_t bytes) {
    if (trap.mode == CRASH_HALF_WRITTEN && trap.countdown == 1) {
        __real_write(fd, data, bytes / 2);
    }
    if (trap.mode == SHORT_WRITES && bytes > 1) {
        bytes /= 2;
    }
    return trapped(CALL_WRITE) ? -1 : __real_write(fd, data, bytes);
}

int __wrap_fsync(int fd) {
    return trapped(CALL_FSYNC) ? -1 : 0; /* the disk itself is not under test, and this is much faster */
}

int __wrap_rename(const char *from, const char *to) {
    return trapped(CALL_RENAME) ? -1 : __real_rename(from, to);
}

int __wrap_mkdir(const char *path, mode_t mode) {
    return trapped(CALL_MKDIR) ? -1 : __real_mkdir(path, mode);
}

int __wrap_unlink(const char *path) {
    return trapped(CALL_UNLINK) ? -1 : __real_unlink(path);
}

int __wrap_rmdir(const char *path) {
    return trapped(CALL_RMDIR) ? -1 : __real_rmdir(path);
}

int __wrap_statvfs(const char *path, struct statvfs *status) {
    int result = __real_statvfs(path, status);
    if (trap.disk_full) {
        status->f_bavail = 1;
        status->f_frsize = 4096;
    }
    return result;
}

static void test_short_and_interrupted_writes(void **unused) {
    clear_run();
    trap_set(SHORT_WRITES, 0, 0, 0);
    assert_saves(1);
    trap_set(PASS, 0, 0, 0);
    assert_int_equal(load(), STATE + 1);
    for (int n = 1; n <= 20; n++) {
        trap_set(FAIL_ONCE, CALL_WRITE, n, EINTR);
        assert_saves(n % 2);
        trap_set(PASS, 0, 0, 0);
        assert_int_equal(load(), STATE + n % 2);
    }
}

/* What a power cut leaves depends on what was synced when. */
static void test_order_of_syncs(void **unused) {
    clear_run();
    assert_saves(0);
    trap.order[0] = 0;
    assert_saves(1);
    /* mkdir; three files, each written and synced; the directory; the manifest; the directory; nothing to remove from
     * checkpoint.old; the two renames; RUN; and only then the old checkpoint goes */
    assert_string_equal(trap.order,
                        "m"
                        "ws"
                        "ws"
                        "ws"
                        "s"
                        "ws"
                        "s"
                        "u"
                        "rr"
                        "s"
                        "ud");
}

typedef struct {
    int which;
    Mode mode;
    int calls, n, reason;
} SaveOrder;

/* SAVED: before the n-th call came. */
static void save_body(const void *argument) {
    const SaveOrder *order = argument;
    char error[512] = "";
    trap_set(order->mode, order->calls, order->n, order->reason);
    bool ok = save(order->which, error, sizeof error);
    bool untouched = trap.countdown > 0;
    trap_set(PASS, 0, 0, 0);
    fprintf(stderr, "%s", error);
    _exit(!ok ? NOT_SAVED : untouched ? SAVED : SAVED_ALL_THE_SAME);
}

/* One round: state 1 saved over state 0 (if there is one) with a crash at the n-th call, then 2 with a crash at the
 * k-th, then 3 without. Returns in *first and *second whether the saves crashed. */
static void crash_twice(Mode mode, bool had_one, int n, int k, int *first, int *second) {
    clear_run();
    if (had_one) {
        assert_saves(0);
    }
    const SaveOrder one = {1, mode, ALL_CALLS, n, 0}, two = {2, mode, ALL_CALLS, k, 0};
    *first = run_child(save_body, &one);
    assert_true(*first == CRASHED || *first == SAVED);
    int before = load();
    assert_true(before == STATE + 1 || (*first == CRASHED && before == (had_one ? STATE + 0 : REFUSED)));
    *second = run_child(save_body, &two);
    assert_true(*second == CRASHED || *second == SAVED);
    int after = load();
    assert_true(after == STATE + 2 ||
                (*second == CRASHED && (after == before || (*first == CRASHED && after == STATE + 1))));
    assert_saves(3);
    assert_int_equal(load(), STATE + 3);
}

/* Every n; of k every stride-th, so that rounds of neighbouring n try different ones. */
static void crash_everywhere(Mode mode, bool had_one, int stride) {
    int n = 0, first, second;
    do {
        n++;
        int k = n % stride;
        do {
            k++;
            crash_twice(mode, had_one, n, k, &first, &second);
            k += stride - 1;
        } while (second == CRASHED);
        assert_true(k > 20); /* the traps are armed: a save makes more calls than this */
    } while (first == CRASHED);
    assert_true(n > 20);
}

static void test_crash_at_every_call(void **unused) {
    crash_everywhere(CRASH, true, 5);
}

static void test_crash_in_the_middle_of_every_write(void **unused) {
    crash_everywhere(CRASH_HALF_WRITTEN, true, 9);
}

static void test_crash_in_the_first_save(void **unused) {
    crash_everywhere(CRASH, false, 9);
}

/* The n-th of these calls fails, alone or with all later ones, for every n: a save that says no has changed nothing. */
static void fail_everywhere(int calls, int reason, bool cleans_up, int at_least) {
    for (Mode mode = FAIL_ONCE; mode <= FAIL_FROM_THERE_ON; mode++) {
        int n = 0, result, refusals = 0;
        do {
            n++;
            clear_run();
            assert_saves(0);
            const SaveOrder order = {1, mode, calls, n, reason};
            result = run_child(save_body, &order);
            if (result == NOT_SAVED) {
                refusals++;
                assert_non_null(strstr(said, strerror(reason)));
                assert_null(strchr(said, '\n'));
                assert_int_equal(load(), STATE + 0);
                /* in its own place, unless the rename back failed too */
                assert_true(said[0] == 0 || (calls == CALL_RENAME && mode == FAIL_FROM_THERE_ON));
            } else {
                assert_true(result == SAVED || result == SAVED_ALL_THE_SAME);
                assert_int_equal(load(), STATE + 1);
            }
            assert_false(cleans_up && present("checkpoint.tmp"));
            assert_saves(2);
            assert_int_equal(load(), STATE + 2);
        } while (result != SAVED);
        assert_true(n > 1 && refusals >= at_least);
    }
}

static void test_full_disk_at_every_write(void **unused) {
    fail_everywhere(CALL_WRITE, ENOSPC, true, 10);
}

static void test_full_disk_says_how_much(void **unused) {
    clear_run();
    assert_saves(0);
    const SaveOrder order = {1, FAIL_FROM_THERE_ON, CALL_WRITE, 2, ENOSPC};
    assert_int_equal(run_child(save_body, &order), NOT_SAVED);
    assert_non_null(strstr(said, "a checkpoint takes 0.1 MB"));
    assert_non_null(strstr(said, "MB are free"));
}

static void test_failing_sync(void **unused) {
    fail_everywhere(CALL_FSYNC, EIO, true, 5);
}

static void test_failing_rename(void **unused) {
    fail_everywhere(CALL_RENAME, EIO, true, 2);
}

static void test_failing_mkdir(void **unused) {
    fail_everywhere(CALL_MKDIR, EACCES, true, 1);
}

static void test_failing_removal(void **unused) {
    fail_everywhere(CALL_UNLINK | CALL_RMDIR, EACCES, true, 0); /* nothing but leftovers to remove: the save stands */
}

static void test_no_room(void **unused) {
    clear_run();
    assert_saves(0);
    char error[512] = "";
    trap.disk_full = true;
    bool ok = save(1, error, sizeof error);
    trap.disk_full = false;
    assert_false(ok);
    assert_non_null(strstr(error, "it takes 0.1 MB and 0.0 MB are free"));
    assert_false(present("checkpoint.tmp"));
    assert_int_equal(load(), STATE + 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_short_and_interrupted_writes),
        cmocka_unit_test(test_order_of_syncs),
        cmocka_unit_test(test_crash_at_every_call),
        cmocka_unit_test(test_crash_in_the_middle_of_every_write),
        cmocka_unit_test(test_crash_in_the_first_save),
        cmocka_unit_test(test_full_disk_at_every_write),
        cmocka_unit_test(test_full_disk_says_how_much),
        cmocka_unit_test(test_failing_sync),
        cmocka_unit_test(test_failing_rename),
        cmocka_unit_test(test_failing_mkdir),
        cmocka_unit_test(test_failing_removal),
        cmocka_unit_test(test_no_room),
    };
    return cmocka_run_group_tests(tests, make_run, remove_run);
}
