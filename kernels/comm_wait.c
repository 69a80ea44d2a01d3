/* How a rank waits for others, and what it says when its patience is over.
 *
 * The rank for which it waits is often not the one that is stopped, but waits itself. So it asks all others for whom
 * they wait, and follows the answers to a rank that gives none:
 *
 *     rank 0 waits for 1 and asks     1 answers "for 3"    2 answers "for 0"    3 is silent: is it stopped or gone?
 *
 * Every rank that waits answers, also while it asks. One that is stopped does not, nor one that computes: either keeps
 * the others waiting. A rank that waits for its GPU does not know for whom that waits; where an answer says so, the
 * first of all that are silent is named. Answers come between two polls, on a busy machine as soon as the rank has a
 * core. A rank that has met an error is silent while it lets lower ranks speak (check.c), but not as long as others
 * wait for answers: it ends all before it is taken for one that is stopped.
 *
 * Questions and answers are empty messages whose tag says all. Who has asked ends the run, so nothing is cleared away.
 * Called by comm_host.c, peers.c and comm.cu. Read next: comm_wait, describe_answers.
 */
#include "comm.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#ifdef USE_MPI
#include <mpi.h>
#endif

#include "check.h"
#include "comm_parts.h"
#include "device.h"

enum {
    POLLS_AWAKE = 1000,      /* ranks often share cores: after the first polls a rank offers its core to others, */
    SLEEP_MICROSECONDS = 50, /* after later ones it sleeps */
    ANSWER_SECONDS = ERROR_PAUSE_MOST + 1,
};

/* So long goes a rank on with what it is at before it listens to questions. */
#define WAIT_SECONDS 0.1

static double patience = 600;
static int64_t at_step = 0;
static int at_layer = -1;
static const char *at_part = "the start";

void comm_at(int64_t step, int layer, const char *part) {
    at_step = step;
    at_layer = layer;
    at_part = part;
}

void comm_set_patience(double seconds) {
    patience = seconds;
}

const char *comm_where(void) {
    static char text[128];
    char layer[32] = "";
    if (at_layer >= 0) {
        snprintf(layer, sizeof layer, ", layer %d", at_layer);
    }
    snprintf(text, sizeof text, "step %lld%s, %s", (long long)at_step, layer, at_part);
    return text;
}

/* ---- questions and answers */

static int *waits_for; /* (ranks) what each has answered; owned, NULL where nothing started the ranks */
enum { SILENT = -2 };  /* in it; ANY_RANK is -1 */

#ifdef USE_MPI

static MPI_Comm notes = MPI_COMM_NULL; /* owned; apart from the calls, whose messages come in the order of calls */

/* Tags: of a question, and of the answer "for rank 0", behind that of "for any". */
enum { QUESTION = 0, ANSWER = 2 };

void comm_wait_open(int ranks) {
    waits_for = malloc((size_t)ranks * sizeof *waits_for);
    CHECK(waits_for, "out of memory for the answers of %d ranks: start fewer", ranks);
    for (int r = 0; r < ranks; r++) {
        waits_for[r] = SILENT;
    }
    MPI_Comm_dup(MPI_COMM_WORLD, &notes);
}

void comm_wait_close(void) {
    MPI_Comm_free(&notes);
    free(waits_for);
    waits_for = NULL;
}

static void send_note(int to, int tag) {
    MPI_Request request;
    MPI_Isend(NULL, 0, MPI_BYTE, to, tag, notes, &request);
    MPI_Request_free(&request);
}

/* Answers what others have asked, and writes down what they have answered. */
static void read_notes(int waiting_for) {
    int came = true;
    MPI_Status note;
    while (MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, notes, &came, &note), came) {
        MPI_Recv(NULL, 0, MPI_BYTE, note.MPI_SOURCE, note.MPI_TAG, notes, MPI_STATUS_IGNORE);
        if (note.MPI_TAG == QUESTION) {
            send_note(note.MPI_SOURCE, ANSWER + waiting_for);
        } else {
            waits_for[note.MPI_SOURCE] = note.MPI_TAG - ANSWER;
        }
    }
}

#else /* one rank, whom nobody asks */

enum { QUESTION };

void comm_wait_open(int ranks) {
}

void comm_wait_close(void) {
}

static void send_note(int to, int tag) {
}

static void read_notes(int waiting_for) {
}

#endif

static void ask_all(int waiting_for) {
    int rank = comm_rank(GROUP_WORLD), ranks = comm_ranks(GROUP_WORLD);
    waits_for[rank] = waiting_for;
    for (int r = 0; r < ranks; r++) {
        if (r != rank) {
            send_note(r, QUESTION);
        }
    }
    for (double asked = seconds_now(); seconds_now() - asked < ANSWER_SECONDS;) {
        read_notes(waiting_for);
        usleep(SLEEP_MICROSECONDS);
    }
}

/* What the answers say, where they lead to a rank that does not know for whom it waits. */
static void describe_silent(char *text, size_t size) {
    int first = 0, silent = 0;
    for (int r = comm_ranks(GROUP_WORLD) - 1; r >= 0; r--) {
        if (waits_for[r] == SILENT) {
            first = r;
            silent++;
        }
    }
    if (silent == 0) {
        snprintf(text, size, "all ranks answer: does a device hang, or have they gone apart?");
    } else if (silent == 1) {
        snprintf(text, size, "rank %d does not answer: is it stopped or gone?", first);
    } else {
        snprintf(text, size, "rank %d and %d more do not answer: is one stopped or gone?", first, silent - 1);
    }
}

/* What the answers say, from one rank to the next. */
static void describe_answers(char *text, size_t size) {
    int r = comm_rank(GROUP_WORLD);
    for (int hops = 0; hops <= comm_ranks(GROUP_WORLD); hops++) {
        if (r == ANY_RANK) {
            describe_silent(text, size);
            return;
        }
        if (waits_for[r] == SILENT) {
            snprintf(text, size, "rank %d does not answer: is it stopped or gone?", r);
            return;
        }
        r = waits_for[r];
    }
    snprintf(text, size, "ranks wait for each other: have they gone apart?");
}

/* ---- waiting */

void comm_wait(int waiting_for, double begin, int polls_in_vain) {
    double waited = seconds_now() - begin;
    if (waited >= WAIT_SECONDS) {
        read_notes(waiting_for);
    }
    if (waited >= patience) {
        char whom[32] = "the other ranks", why[128];
        if (waiting_for != ANY_RANK) {
            snprintf(whom, sizeof whom, "rank %d", waiting_for);
        }
        ask_all(waiting_for);
        describe_answers(why, sizeof why);
        die(__FILE__, __LINE__, "rank %d waited %g s for %s at %s, and %s The last checkpoint is whole",
            comm_rank(GROUP_WORLD), patience, whom, comm_where(), why);
    }
    if (polls_in_vain < POLLS_AWAKE) {
        sched_yield();
    } else {
        usleep(SLEEP_MICROSECONDS);
    }
}
