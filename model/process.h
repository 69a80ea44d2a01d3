/* The run as a process of its machine: its standard streams, and the signals that ask it to end.
 *
 *     process_hold_streams();  ..parse options..  process_catch_signals();
 *     while (step < steps && !process_must_end()) { .. }  save
 */
#ifndef MODEL_PROCESS_H
#define MODEL_PROCESS_H

#include <stdbool.h>

/* Before any file is opened: where standard input, output or error is closed, the next file opened would take its
 * number and its text. */
void process_hold_streams(void);

/* From here on the first SIGINT or SIGTERM asks the run to save and stop, a second ends it at once. */
void process_catch_signals(void);

/* Collective: whether any rank was asked to. */
bool process_must_end(void);

/* For ranks that have nothing to say: standard output goes nowhere. */
void process_be_quiet(void);

#endif
