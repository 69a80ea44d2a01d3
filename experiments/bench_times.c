/* Taking times and summing them up; see bench_times.h. */
#include "bench_times.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"
#include "bench.h"

void times_add(Times *times, double ms) {
    if (times->count == times->capacity) {
        times->capacity = times->capacity ? 2 * times->capacity : 128;
        times->ms = realloc(times->ms, (size_t)times->capacity * sizeof(double));
        CHECK(times->ms, "out of memory for %d times", times->capacity);
    }
    times->ms[times->count++] = ms;
}

/* The q-th quantile (0.5 and above) of `count` times, by the rule of bench_median: an element, not a value between two.
 */
static double quantile(const double *ms, int count, double q) {
    if (count == 0) {
        return 0;
    }
    double *sorted = malloc((size_t)count * sizeof(double));
    CHECK(sorted, "out of memory for %d times", count);
    memcpy(sorted, ms, (size_t)count * sizeof(double));
    qsort(sorted, (size_t)count, sizeof(double), bench_compare);
    int middle = count / 2, place = (int)(q * (count - 1));
    double value = sorted[q == 0.5 || place < middle ? middle : place]; /* of two times the larger is every quantile */
    free(sorted);
    return value;
}

double times_quantile(const Times *times, double q) {
    return quantile(times->ms, times->count, q);
}

double times_median(const Times *times) {
    return times_quantile(times, 0.5);
}

void times_end_repeat(Times *times) {
    int count = times->count - times->begun;
    if (count > 0) {
        CHECK(times->repeats < TIMES_REPEATS, "at most %d repeats", TIMES_REPEATS);
        times->medians[times->repeats++] = quantile(times->ms + times->begun, count, 0.5);
        times->begun = times->count;
    }
}

static double mean_of(const double *x, int count) {
    double sum = 0;
    for (int i = 0; i < count; i++) {
        sum += x[i];
    }
    return count > 0 ? sum / count : NAN;
}

/* Standard deviation of a sample (divided by count - 1). */
static double deviation_of(const double *x, int count) {
    double mean = mean_of(x, count), sum = 0;
    for (int i = 0; i < count; i++) {
        sum += (x[i] - mean) * (x[i] - mean);
    }
    return count > 1 ? sqrt(sum / (count - 1)) : 0;
}

/* 97.5 % quantile of Student's t; degrees 1 .. 29. */
static double student_t(int degrees) {
    static const double table[TIMES_REPEATS] = {0,     12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262,
                                                2.228, 2.201,  2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093,
                                                2.086, 2.080,  2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045};
    return table[degrees];
}

double times_mean(const Times *times) {
    return mean_of(times->medians, times->repeats);
}

double times_half_width(const Times *times) {
    int n = times->repeats;
    return n > 1 ? student_t(n - 1) * deviation_of(times->medians, n) / sqrt(n) : NAN;
}

void times_print(const char *name, const Times *times) {
    printf(",\"%s\":{\"avg\":%.6g,\"std\":%.6g,\"p50\":%.6g,\"p95\":%.6g,\"count\":%d", name,
           times->count ? mean_of(times->ms, times->count) : 0, deviation_of(times->ms, times->count),
           times_median(times), times_quantile(times, 0.95), times->count);
    if (times->repeats > 0) {
        printf(",\"mean\":%.6g", times_mean(times));
    }
    if (times->repeats > 1) {
        printf(",\"half_width\":%.6g}", times_half_width(times));
    } else {
        printf(",\"half_width\":null}");
    }
}

void times_free(Times *times) {
    free(times->ms);
    *times = (Times){0};
}

static bool over(double begin, double seconds) {
    return seconds > 0 && seconds_now() - begin > seconds;
}

void times_measure(Times *times, Recording *recording, void (*call)(void *subject), void *subject, Effort effort) {
    /* A recording is made in its second run: three runs before the first timed one leave it made and replayed once. */
    int least = recording->graph || !device_runs_ahead() ? 1 : 3;
    int warm_up = effort.warm_up > least ? effort.warm_up : least;
    double begin = seconds_now();
    for (int i = -warm_up; i < effort.iterations; i++) {
        if (i < 0 && over(begin, effort.seconds / 4) && i + warm_up >= least) {
            i = 0;
        }
        if (i >= TIMES_LEAST && over(begin, effort.seconds)) {
            break;
        }
        Profile profile = {0};
        profile_start(&profile, NULL);
        if (!recording_replay(recording, NULL)) {
            recording_begin(recording, NULL);
            call(subject);
            recording_end(recording, NULL);
        }
        profile_stop(&profile, NULL);
        profile_finish(&profile);
        if (i >= 0) {
            times_add(times, 1e3 * profile.seconds[STAGE_OTHER]);
        }
        profile_free(&profile);
    }
    times_end_repeat(times);
}

void times_stages(Times *stages, void (*call)(void *subject, Profile *profile), void *subject, Effort effort) {
    enum { GROUP = 4 };
    int group = device_runs_ahead() ? GROUP : 1;
    Profile profiles[GROUP];
    memset(profiles, 0, sizeof profiles);
    double begin = seconds_now();
    for (int done = -group; done < effort.iterations; done += group) { /* the first group is the warm-up */
        if (done >= TIMES_LEAST && over(begin, effort.seconds)) {
            break;
        }
        for (int i = 0; i < group; i++) {
            profile_start(&profiles[i], NULL);
            call(subject, &profiles[i]);
            profile_stop(&profiles[i], NULL);
        }
        for (int i = 0; i < group; i++) {
            profile_finish(&profiles[i]);
            for (int s = 0; s < STAGE_COUNT && done >= 0; s++) {
                times_add(&stages[s], 1e3 * profiles[i].seconds[s]);
            }
            memset(profiles[i].seconds, 0, sizeof profiles[i].seconds);
        }
    }
    for (int i = 0; i < group; i++) {
        profile_free(&profiles[i]);
    }
    for (int s = 0; s < STAGE_COUNT; s++) {
        times_end_repeat(&stages[s]);
    }
}
