/* What the checkpoint tests share: a directory RUN, a small model, states to save, and loading in a forked child,
 * because checkpoint_load ends the program on bad input.
 */
#ifndef TESTS_CHECKPOINT_FIXTURE_H
#define TESTS_CHECKPOINT_FIXTURE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../kernels/random.h"
#include "../model/checkpoint.h"

static char run[] = "/tmp/test_checkpoint_XXXXXX";
static TensorList model;

static const char CONFIG[] = "{\"layers\":2,\"out\":\"a \\\"b\\\"\"}";

static inline const char *in_run(const char *name) {
    static char path[2][128];
    static int next;
    char *out = path[next = !next];
    snprintf(out, sizeof path[0], "%s/%s", run, name);
    return out;
}

static inline bool present(const char *name) {
    return access(in_run(name), F_OK) == 0;
}

/* Empties RUN, which holds nothing but directories of plain files. */
static inline void clear_run(void) {
    DIR *top = opendir(run);
    assert_non_null(top);
    for (struct dirent *outer; (outer = readdir(top));) {
        if (outer->d_name[0] != '.') {
            char path[600];
            snprintf(path, sizeof path, "%s/%s", run, outer->d_name);
            DIR *inside = opendir(path);
            assert_non_null(inside);
            for (struct dirent *inner; (inner = readdir(inside));) {
                unlinkat(dirfd(inside), inner->d_name, 0);
            }
            closedir(inside);
            assert_int_equal(rmdir(path), 0);
        }
    }
    closedir(top);
}

static inline void make_model(TensorList *list) {
    *list = (TensorList){0};
    tensors_add(list, TENSOR_DENSE, -1, 0.1, 5, 7, 0, "embedding");
    tensors_add(list, TENSOR_ROUTER, 0, 0.1, 3, 0, 0, "layers.0.moe.router");
    tensors_add(list, TENSOR_EXPERT, 0, 0.1, 2, 3, 4, "layers.0.moe.experts.w1");
}

static inline int make_run(void **unused) {
    make_model(&model);
    return mkdtemp(run) ? 0 : -1;
}

static inline int remove_run(void **unused) {
    clear_run();
    tensors_free(&model);
    return rmdir(run);
}

/* State number `which`: every bit of every value random, NaNs with payloads among them; gaps zero. */
static inline CheckpointState make_state(const TensorList *tensors, int which) {
    CheckpointState state = {.tensors = tensors};
    acc_t **buffers[] = {&state.weights, &state.m, &state.v};
    for (int b = 0; b < 3; b++) {
        uint64_t key = random_key((uint64_t)which, RANDOM_TEST, (uint64_t)b);
        acc_t *values = calloc(tensors->total + 1, sizeof *values);
        for (int t = 0; t < tensors->count; t++) {
            for (size_t i = tensors->items[t].offset; i < tensors->items[t].offset + tensors->items[t].count; i++) {
                uint64_t bits = random_bits(key, i);
                bits |= i % 5 == 0 ? (sizeof *values == 8 ? 0x7ff0000000000001u : 0x7f800001u) : 0;
                memcpy(&values[i], &bits, sizeof *values);
            }
        }
        *buffers[b] = values;
    }
    state.step = 1000 + which;
    state.adam_step = 990 + which;
    state.skipped = which;
    state.tokens = 123456789012345 + which;
    state.train_seconds = 12.1 * which + 1.0 / 3;
    return state;
}

static inline void free_state(CheckpointState *state) {
    free(state->weights), free(state->m), free(state->v);
}

static inline bool same_state(const CheckpointState *a, const CheckpointState *b) {
    size_t bytes = a->tensors->total * sizeof(acc_t);
    return memcmp(a->weights, b->weights, bytes) == 0 && memcmp(a->m, b->m, bytes) == 0 &&
           memcmp(a->v, b->v, bytes) == 0 && a->step == b->step && a->adam_step == b->adam_step &&
           a->skipped == b->skipped && a->tokens == b->tokens && a->train_seconds == b->train_seconds;
}

static inline bool save(int which, char *error, size_t error_size) {
    CheckpointState state = make_state(&model, which);
    bool ok = checkpoint_save(run, &state, CONFIG, error, error_size);
    free_state(&state);
    return ok;
}

static inline void assert_saves(int which) {
    char error[512] = "";
    if (!save(which, error, sizeof error)) {
        fail_msg("save %d failed: %s", which, error);
    }
    assert_false(present("checkpoint.tmp"));
    assert_false(present("checkpoint.old"));
}

/* Results of a child. A load gives STATE + the number of the state it found. */
enum { REFUSED = 1, SAVED = 10, SAVED_ALL_THE_SAME, NOT_SAVED, CRASHED = 42, STATE = 20, GARBAGE = 30, KILLED = 99 };

static char said[4096]; /* what the last child wrote to stderr */

static inline int run_child(void (*body)(const void *argument), const void *argument) {
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    fflush(NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        close(ends[0]), close(ends[1]);
        body(argument);
        _exit(KILLED);
    }
    close(ends[1]);
    size_t length = 0;
    for (ssize_t got; (got = read(ends[0], said + length, sizeof said - 1 - length)) > 0;) {
        length += (size_t)got;
    }
    said[length] = 0;
    close(ends[0]);
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : KILLED;
}

static inline void load_body(const void *tensors) {
    CheckpointState found = make_state(tensors, 9);
    acc_t *const buffers[] = {found.weights, found.m, found.v};
    for (int b = 0; b < 3; b++) {
        memset(buffers[b], 0xff, found.tensors->total * sizeof(acc_t));
    }
    checkpoint_load(run, &found);
    for (int which = 0; which < 5; which++) {
        CheckpointState expected = make_state(tensors, which);
        if (same_state(&found, &expected)) {
            _exit(STATE + which);
        }
    }
    _exit(GARBAGE);
}

static inline int load(void) {
    return run_child(load_body, &model);
}

/* Refused with exit code 1 and one line that holds this text. */
static inline void assert_refused_saying(int result, const char *text) {
    if (result != REFUSED) {
        fail_msg("exit code %d instead of 1; expected '%s'; stderr: %s", result, text, said);
    }
    char *newline = strchr(said, '\n');
    assert_true(newline && newline[1] == 0);
    if (!strstr(said, text)) {
        fail_msg("'%s' does not say '%s'", said, text);
    }
}

#endif
