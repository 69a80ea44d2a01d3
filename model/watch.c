/* See watch.h. Called by the loop in train.c. Read next: figures.c, alarm.c. */
#include "watch.h"

#include <stdio.h>

void watch_begin(Watch *watch, int64_t step) {
    if (watch->clock == 0) {
        watch->logged = step;
    }
    watch->clock = seconds_now();
}

static void book_time(Watch *watch, Progress *at) {
    double now = seconds_now();
    at->seconds += now - watch->clock;
    watch->since_log += now - watch->clock;
    watch->clock = now;
}

void watch_pause(Watch *watch, Progress *at) {
    device_wait(NULL);
    book_time(watch, at);
}

/* Where the device runs ahead, not every step: only for a line of the log, or when so many could have been skipped that
 * the run must end. */
void watch_ask(Watch *watch, const Config *config, const Transformer *model, const Optimizer *optimizer,
               const Progress *at) {
    const TrainConfig *t = &config->train;
    watch->step = at->step;
    watch->due = !device_runs_ahead() || at->step % t->max_skips == 0 || at->step % t->log_every == 0 ||
                 at->step == 1 || at->step == t->steps;
    if (watch->due) {
        figures_request(&watch->readback, model, optimizer, NULL);
    }
}

/* Says which steps were skipped. */
static void tell_skips(const AdamState *adam, Progress *at, int64_t step, Log *log) {
    if (adam->skipped > at->skipped) {
        at->skipped = adam->skipped;
        printf("%sstep %lld: loss or gradient is not finite; step skipped (%lld in a row)\n", console_line_start(),
               (long long)step, (long long)adam->skipped_in_row);
        log_line(log, "{\"event\":\"skip\",\"step\":%lld,\"in_a_row\":%lld}", (long long)step,
                 (long long)adam->skipped_in_row);
    }
}

int64_t watch_report(Watch *watch, const Config *config, const Transformer *model, const Optimizer *optimizer,
                     Progress *at, Log *log, double val_loss) {
    const TrainConfig *t = &config->train;
    StepFigures figures = figures_read(&watch->readback, model, optimizer);
    int64_t skipped_in_row = figures.adam.skipped_in_row, step = watch->step;
    watch->due = false;
    book_time(watch, at);
    tell_skips(&figures.adam, at, step, log);
    bool goes_on = skipped_in_row < t->max_skips;
    if (goes_on && step == 1) {
        console_first_gradients(&figures);
        figures_log_gradients(&figures, log, step);
    }
    if (goes_on && (step % t->log_every == 0 || step == t->steps)) {
        double mean = watch->since_log / (step - watch->logged);
        Progress then = *at;
        then.step = step;
        figures_log(&figures, log, config, step, mean);
        console_progress(config, &then, &figures, mean, val_loss);
        alarms_check(&watch->alarms, &figures, model, step, log, console_line_start());
        watch->since_log = 0;
        watch->logged = step;
    }
    figures_free(&figures);
    return skipped_in_row;
}

void watch_free(Watch *watch) {
    if (watch->readback.capacity > 0) {
        readback_free(&watch->readback);
    }
    alarms_free(&watch->alarms);
}
