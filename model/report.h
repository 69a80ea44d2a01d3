/* The report: RUN/report.html, one self-contained page made from RUN/log.jsonl and the template report.html beside this
 * file.
 *
 * The template is a plain HTML page with its own script; report.c puts the log's lines into it as data. To change how a
 * report looks, edit report.html.
 */
#ifndef MODEL_REPORT_H
#define MODEL_REPORT_H

#include <stdbool.h>
#include <stddef.h>

/* Writes RUN/report.html (to a temporary name, then renamed). A last line of the log that was cut off is left out;
 * other lines that are not whole JSON objects are left out and counted in an event {"event":"left_out","lines":n} at
 * the end. False with one line in error on failure. */
bool report_write(const char *run, char *error, size_t error_size);

#endif
