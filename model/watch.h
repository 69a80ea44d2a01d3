/* What a run tells while it goes on: it asks for a step's figures, reads them when they are there, books the time,
 * writes the line of the log and of the terminal, rings the alarms. A device that runs ahead of the host is never
 * waited for in between: the figures of a step are asked for behind it and read when the next one is under way.
 *
 *     watch_begin(&w, step);
 *     loop: queue a step;  if (w.due) watch_report(&w, ..);  watch_ask(&w, ..);
 *     watch_pause(&w, &at);  evaluate, save;  watch_begin(&w, step);          what is between is no training time
 */
#ifndef MODEL_WATCH_H
#define MODEL_WATCH_H

#include "alarm.h"
#include "resume.h"
#include "config.h"
#include "console.h"
#include "figures.h"
#include "log.h"

typedef struct {
    bool due;     /* figures were asked for and not read yet */
    int64_t step; /* of this step */
    Readback readback;
    double clock;     /* until when training time is booked, seconds_now */
    double since_log; /* training seconds since the last line of the log */
    int64_t logged;   /* step of that line */
    Alarms alarms;
} Watch;

/* Training begins, or goes on after a pause, at this step. */
void watch_begin(Watch *watch, int64_t step);

/* Waits for the device; training time ends here. */
void watch_pause(Watch *watch, Progress *at);

/* Asks for the figures of the step just queued, at->step, if somebody wants to see them. */
void watch_ask(Watch *watch, const Config *config, const Transformer *model, const Optimizer *optimizer,
               const Progress *at);

/* Reads the figures that were asked for and says what they tell; at->seconds and at->skipped are brought up to date.
 * Returns how many steps in a row were skipped because something was not finite. */
int64_t watch_report(Watch *watch, const Config *config, const Transformer *model, const Optimizer *optimizer,
                     Progress *at, Log *log, double val_loss);

void watch_free(Watch *watch);

#endif
