/* The time of each operation at its large shapes: the median over samples of a few calls in a row, queued as one
 * recording where the device can record, so that what is measured is the device and not its queue. */
#ifndef TESTS_PARITY_TIME_H
#define TESTS_PARITY_TIME_H

#include "parity_select.h"

enum { TIME_SAMPLES = 11, TIME_CALLS = 10 };

static inline int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static inline double median_seconds(void (*call)(Case *c), Case *c) {
    double samples[TIME_SAMPLES];
    Recording recording = {0};
    for (int i = -3; i < TIME_SAMPLES; i++) { /* the first ones set up and record */
        device_wait(NULL);
        double start = seconds_now();
        if (!recording_replay(&recording, NULL)) {
            recording_begin(&recording, NULL);
            for (int j = 0; j < TIME_CALLS; j++) {
                call(c);
            }
            recording_end(&recording, NULL);
        }
        device_wait(NULL);
        if (i >= 0) {
            samples[i] = (seconds_now() - start) / TIME_CALLS;
        }
    }
    recording_free(&recording);
    qsort(samples, TIME_SAMPLES, sizeof *samples, compare_doubles);
    return samples[TIME_SAMPLES / 2];
}

static inline Count time_operations(const Selection *selection) {
    Count count = {0};
    printf("%-18s %12s %12s  shape\n", "operation", "forward us", "backward us");
    for (int i = 0; selected_operation(selection, i); i++) {
        const Operation *op = selected_operation(selection, i);
        const int *extents;
        for (int shape = 0; (extents = selected_shape(selection, op, shape)); shape++) {
            Case c;
            case_draw(&c, op, extents, (uint64_t)shape + 1, sizeof(real_t) == 2);
            case_forward(op, &c);
            case_backward(op, &c);
            double forward = median_seconds(op->forward, &c), backward = 0;
            if (op->backward) {
                backward = median_seconds(op->backward, &c);
            }
            printf("%-18s %12.2f %12.2f ", op->name, 1e6 * forward, 1e6 * backward);
            for (int j = 0; j < EXTENTS; j++) {
                printf(" %d", extents[j]);
            }
            printf(" = %s\n", op->extents);
            count_case(&count, true);
            case_free(&c);
        }
    }
    return count;
}

#endif
