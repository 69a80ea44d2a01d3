/* Makes RUN/report.html: the template with the run's log as data.
 *
 * The template, report.html beside this file, is put into the program by the assembler's .incbin, so that a built
 * program needs no other file. Its path counts from the directory the compiler runs in (the repository's root) or from
 * an include path (-I).
 * The log's lines go into <script type="application/json">. A browser ends such an element at the first "</script", and
 * reads it differently after "<!--", wherever they stand; in JSON a '<' can only be inside a string, so each one is
 * written as \u003c and the text stays the same.
 *
 * Called by train.c at the end of a run and after evaluations. Read next: report.html.
 */
#include "report.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifndef REPORT_TEMPLATE
#define REPORT_TEMPLATE "model/report.html"
#endif
#define INCLUDE_TEMPLATE ".incbin \"" REPORT_TEMPLATE "\"\n"

/* Hidden, not static: with link-time optimisation the C code and this block may end up in different objects. */
__asm__(
    ".pushsection .rodata\n"
    ".global report_template, report_template_end\n"
    ".hidden report_template, report_template_end\n"
    "report_template:\n" INCLUDE_TEMPLATE
    "report_template_end:\n"
    ".byte 0\n"
    ".popsection\n");

extern const char report_template[], report_template_end[];

static const char MARKER[] = "/*LOG*/";

/* One JSON text with every '<' escaped. */
static void write_escaped(FILE *out, const char *json) {
    for (const char *less; (less = strchr(json, '<')) != NULL; json = less + 1) {
        fwrite(json, 1, (size_t)(less - json), out);
        fputs("\\u003c", out);
    }
    fputs(json, out);
}

/* Writes one line of the log as an element of the array; false when it is not a whole JSON object. The line is parsed
 * and printed again rather than copied: cJSON accepts a little more than a browser does (leading zeros, raw control
 * characters), and what it prints every browser reads. */
static bool write_line(FILE *out, const char *line, size_t length, bool first) {
    const char *end = NULL;
    cJSON *object = cJSON_ParseWithLengthOpts(line, length, &end, false);
    bool whole = cJSON_IsObject(object) && end != NULL && strspn(end, " \t\r\n") == (size_t)(line + length - end);
    char *json = whole ? cJSON_PrintUnformatted(object) : NULL;
    cJSON_Delete(object);
    if (json == NULL) {
        return false;
    }
    fputs(first ? "\n" : ",\n", out);
    write_escaped(out, json);
    cJSON_free(json);
    return true;
}

/* The array of all whole lines; returns their number. A last line without its newline was cut while it was written,
 * which is no fault; other unreadable lines are counted in a closing event: the page says that something is missing. */
static int write_log(FILE *out, FILE *log) {
    char *line = NULL;
    size_t capacity = 0;
    int lines = 0, left_out = 0;
    fputc('[', out);
    for (ssize_t length; (length = getline(&line, &capacity, log)) >= 0;) {
        bool blank = strspn(line, " \t\r\n") == (size_t)length;
        if (blank) {
            continue;
        }
        if (write_line(out, line, (size_t)length, lines == 0)) {
            lines++;
        } else if (line[length - 1] == '\n') {
            left_out++;
        }
    }
    free(line);
    if (left_out > 0) {
        fprintf(out, "%s{\"event\":\"left_out\",\"message\":\"lines of log.jsonl that are not JSON\",\"lines\":%d}",
                lines > 0 ? ",\n" : "\n", left_out);
    }
    fputs("\n]", out);
    return lines;
}

/* The whole page into a stream; returns the number of log lines in it. */
static int write_page(FILE *out, FILE *log) {
    const char *marker = strstr(report_template, MARKER);
    if (marker == NULL) {
        return 0;
    }
    const char *rest = marker + strlen(MARKER);
    fwrite(report_template, 1, (size_t)(marker - report_template), out);
    int lines = write_log(out, log);
    fwrite(rest, 1, (size_t)(report_template_end - rest), out);
    return lines;
}

/* Fills `temporary` and makes it `final` in one step: a reader sees the old report or the whole new one. */
static bool write_replacing(const char *temporary, const char *final, FILE *log, const char *log_path, char *error,
                            size_t error_size) {
    FILE *out = fopen(temporary, "w");
    if (out == NULL) {
        snprintf(error, error_size, "cannot write %s: %s; make the run's directory writable", temporary,
                 strerror(errno));
        return false;
    }
    int lines = write_page(out, log);
    bool read = !ferror(log);
    bool written = !ferror(out) && fflush(out) == 0 && fsync(fileno(out)) == 0;
    int cause = errno;
    if (fclose(out) != 0 && written) {
        written = false;
        cause = errno;
    }
    if (written && read && lines > 0) {
        if (rename(temporary, final) == 0) {
            return true;
        }
        written = false;
        cause = errno;
    }
    unlink(temporary);
    if (!written) {
        snprintf(error, error_size, "cannot write %s: %s; free some space or check the directory", final,
                 strerror(cause));
    } else if (!read) {
        snprintf(error, error_size, "cannot read %s to its end; check the disk", log_path);
    } else {
        snprintf(error, error_size, "%s holds no whole line: there is nothing to report before a run has started",
                 log_path);
    }
    return false;
}

bool report_write(const char *run, char *error, size_t error_size) {
    char log_path[PATH_MAX], final[PATH_MAX], temporary[PATH_MAX];
    snprintf(log_path, sizeof log_path, "%s/log.jsonl", run);
    snprintf(final, sizeof final, "%s/report.html", run);
    if (snprintf(temporary, sizeof temporary, "%s/report.html.tmp", run) >= (int)sizeof temporary) {
        snprintf(error, error_size, "the path of the run is too long for a report: choose a shorter --out");
        return false;
    }
    FILE *log = fopen(log_path, "r");
    if (log == NULL) {
        snprintf(error, error_size, "no report without a log: cannot open %s: %s", log_path, strerror(errno));
        return false;
    }
    bool done = write_replacing(temporary, final, log, log_path, error, error_size);
    fclose(log);
    return done;
}
