/* Runs a function in a child process and keeps what it printed and how it ended, to test what ends the program.
 *
 *     run_forked(&result, work, argument);
 *     assert_refused(&result, "--top-k 9");     // exit code 1, nothing on stdout, one line on stderr with these words
 */
#ifndef TESTS_FORKED_H
#define TESTS_FORKED_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

typedef struct {
    int exit_code; /* -1: ended by a signal */
    char out[16384], err[4096];
} Forked;

static inline void read_back(FILE *file, char *text, size_t size) {
    rewind(file);
    text[fread(text, 1, size - 1, file)] = '\0';
    fclose(file);
}

static inline void run_forked(Forked *result, void (*work)(void *argument), void *argument) {
    FILE *out = tmpfile(), *err = tmpfile();
    assert_non_null(out);
    assert_non_null(err);
    fflush(stdout);
    fflush(stderr);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        dup2(fileno(out), STDOUT_FILENO);
        dup2(fileno(err), STDERR_FILENO);
        work(argument);
        exit(0);
    }
    int status = 0;
    assert_int_equal(waitpid(child, &status, 0), child);
    result->exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    read_back(out, result->out, sizeof result->out);
    read_back(err, result->err, sizeof result->err);
}

static inline void assert_refused(const Forked *result, const char *words) {
    const char *newline = strchr(result->err, '\n');
    bool one_line = newline && newline[1] == '\0' && newline > result->err;
    if (result->exit_code != 1 || !one_line || result->out[0] || !strstr(result->err, words)) {
        fail_msg("expected one line with \"%s\" and exit code 1, but got exit code %d, stdout \"%s\", stderr \"%s\"",
                 words, result->exit_code, result->out, result->err);
    }
}

#endif
