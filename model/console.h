/* What a run says on the terminal: at its start, while it trains, at its end. The log (log.h) says more. */
#ifndef MODEL_CONSOLE_H
#define MODEL_CONSOLE_H

#include "evaluate.h"
#include "figures.h"
#include "resume.h"
#include "transformer.h"

/* The model, what is particular about its routing, the data, the machine, the memory. */
void console_start(const Config *config, const Transformer *model, const Arena *arena);

/* What takes standard output to the start of a line: on a terminal it rubs out the progress line. */
const char *console_line_start(void);

/* A line per logged step, or on a terminal one line that is written over. seconds: of one step; val_loss: of the last
 * evaluation, NAN before the first. */
void console_progress(const Config *config, const Progress *at, const StepFigures *figures, double seconds,
                      double val_loss);

/* After the first step: whether each router hears from the main loss and from the balance losses. */
void console_first_gradients(const StepFigures *figures);

/* names (domains) of the evaluation's domains */
void console_evaluation(const Evaluation *evaluation, const char *const *names, int64_t step);

/* Stage times when there are any, totals, memory, where the report is. */
void console_end(const Config *config, const Transformer *model, const Arena *arena, const Profile *profile,
                 const Progress *at);

/* A run that a signal stopped: how to go on. program: argv[0]. */
void console_stopped(const Config *config, const Progress *at, const char *program);

#endif
