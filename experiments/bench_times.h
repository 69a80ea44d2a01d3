/* Times of calls that are the same each time: how they are taken and what is said of them. Used by bench_layer.c,
 * bench_grid.c and bench_generate.c.
 *
 *     Times forward = {0};  Recording recording = {0};
 *     for (int r = 0; r < 3; r++) { times_measure(&forward, &recording, run_forward, &layer, effort); }
 *     times_print("forward", &forward);      ,"forward":{"avg":..,"std":..,"p50":..,"p95":..,"count":..,"mean":..,..}
 *     times_free(&forward);  recording_free(&recording);
 *
 * All times in milliseconds. On a GPU each call is timed by two events in the stream, so the host's own time is not in
 * it. avg, std, p50 and p95 are of all calls of all repeats; "mean" is the mean of the repeats' medians, "half_width"
 * the half of its 95 % interval by Student's t with repeats - 1 degrees of freedom (null for a single repeat): how far
 * the medians of other repeats on this machine, in this state, would be expected to lie.
 */
#ifndef EXPERIMENTS_BENCH_TIMES_H
#define EXPERIMENTS_BENCH_TIMES_H

#include "../kernels/device.h"

enum { TIMES_REPEATS = 30 };

typedef struct {
    double *ms; /* (count) owned */
    int count, capacity;
    int begun; /* calls before the repeat at hand */
    double medians[TIMES_REPEATS];
    int repeats;
} Times;

/* How much is done for one repeat: calls before the first timed one, timed calls, and seconds after which no further
 * call is begun (0: no limit), but for the first of the warm-up, in which libraries set themselves up and work is
 * recorded, and the first TIMES_LEAST timed ones. */
typedef struct {
    int warm_up, iterations;
    double seconds;
} Effort;

enum { TIMES_LEAST = 3 };

void times_add(Times *times, double ms);

/* Ends a repeat, whose median is kept. Without a call since the last one it is none. */
void times_end_repeat(Times *times);

/* Of all calls; 0 without any. */
double times_median(const Times *times);
double times_quantile(const Times *times, double q);

/* Of the repeats' medians; the half width is NAN for fewer than two. */
double times_mean(const Times *times);
double times_half_width(const Times *times);

/* Prints the object as above, with a comma before it. */
void times_print(const char *name, const Times *times);
void times_free(Times *times);

/* One repeat of a call that works on `subject`. What it queues is recorded where that can be, and replayed; the
 * recording serves for all repeats. */
void times_measure(Times *times, Recording *recording, void (*call)(void *subject), void *subject, Effort effort);

/* One repeat of a call that books its stages in a profile: stages (STAGE_COUNT) get the time of each. The calls are
 * queued some at once, so that on a GPU they follow one another without a gap. */
void times_stages(Times *stages, void (*call)(void *subject, Profile *profile), void *subject, Effort effort);

#endif
