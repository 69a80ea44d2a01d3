/* See process.h. Called by train.c and by what takes long in a run: sample.c, answer.c. */
#include "process.h"

#include <fcntl.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <unistd.h>

#include "../kernels/comm.h"

static volatile sig_atomic_t signal_number = 0; /* of the first; a handler can be told nothing else */

void process_hold_streams(void) {
    int fd = open("/dev/null", O_RDWR);
    while (fd >= 0 && fd <= STDERR_FILENO) {
        fd = open("/dev/null", O_RDWR);
    }
    close(fd);
}

static void ask_to_end(int number) {
    if (signal_number) {
        _exit(128 + number);
    }
    signal_number = number;
}

void process_catch_signals(void) {
    struct sigaction action = {.sa_handler = ask_to_end};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    signal(SIGXFSZ, SIG_IGN); /* a file that may not grow is then a failed write, as on a full disk */
}

bool process_must_end(void) {
    return comm_any(signal_number != 0);
}

void process_be_quiet(void) {
    if (!freopen("/dev/null", "w", stdout)) {
        fclose(stdout);
    }
}
