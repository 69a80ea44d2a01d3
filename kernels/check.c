/* The two static variables are an exception to "no globals": an error must find its rank from anywhere. */
#include "check.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static int rank_shown = 0;
static void (*end_ranks)(int exit_code) = NULL;

void check_set_rank(int rank, void (*end_all_ranks)(int exit_code)) {
    rank_shown = rank;
    end_ranks = end_all_ranks;
}

/* What goes wrong on all ranks is said once: rank 0 says it and ends the others, which come to that end here. Where
 * rank 0 is well, the lowest of those that are not is heard instead. A signal is a polite form of that end. */
static void let_lower_ranks_speak(void) {
    struct timespec pause = {.tv_sec = 1 + rank_shown % 32 / 8, .tv_nsec = rank_shown % 8 * 125000000L};
    if (rank_shown > 0 && nanosleep(&pause, NULL) != 0) {
        _exit(EXIT_ERROR);
    }
}

void die(const char *file, int line, const char *format, ...) {
    char message[1024];
    char host[64] = "localhost";
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    for (char *c = message; *c; c++) { /* a file name or an argument may hold anything; the message stays one line */
        *c = (unsigned char)*c < ' ' ? '?' : *c;
    }
    gethostname(host, sizeof host - 1);
    fflush(stdout);
    let_lower_ranks_speak();
    fprintf(stderr, "moelab: %s [%s:%d, rank %d on %s]\n", message, file, line, rank_shown, host);
    if (end_ranks) {
        end_ranks(EXIT_ERROR);
    }
    exit(EXIT_ERROR);
}
