/* The one error path: a single line that says what the user can do, then every rank ends.
 *
 *     CHECK(top_k <= experts, "--top-k %d is above --experts %d: lower the one or raise the other", top_k, experts);
 *
 * prints "moelab: <message> [file:line, rank r on host]" to stderr and exits with EXIT_ERROR.
 * For invariants of the program itself use assert, never CHECK.
 */
#ifndef KERNELS_CHECK_H
#define KERNELS_CHECK_H

enum {
    EXIT_OK = 0,
    EXIT_ERROR = 1,      /* bad input, or a resource that ran out; the message says what to do */
    EXIT_PREEMPTED = 75, /* a signal ended the run after its state was saved: start again with --resume */
};

/* Called where ranks exist: the rank to print, and what ends the other ranks (NULL: nothing to end). An error on ranks
 * other than 0 waits a second or more, in which rank 0 ends them if it has the same to say. */
enum { ERROR_PAUSE_MOST = 5 }; /* seconds */
void check_set_rank(int rank, void (*end_all_ranks)(int exit_code));

#if defined(__GNUC__)
__attribute__((noreturn, format(printf, 3, 4)))
#endif
void die(const char *file, int line, const char *format, ...);

#define CHECK(condition, ...)                     \
    do {                                          \
        if (!(condition)) {                       \
            die(__FILE__, __LINE__, __VA_ARGS__); \
        }                                         \
    } while (0)

#endif
