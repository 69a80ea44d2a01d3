/* The run directory and its log: who may write there, what stays of an earlier log, and lines that are whole or absent.
 *
 * A line is one write(2) on a descriptor opened with O_APPEND. When the disk takes only a part of it, the part is cut
 * off again, so readers (report.c, notebooks) never see half a line unless the machine itself went down in between;
 * they skip such a line, and so does a resume.
 *
 * Called by train.c. Read next: report.c, which reads the log back.
 */
#include "log.h"

#include <assert.h>
#include <cjson/cJSON.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "../kernels/check.h"
#include "../kernels/types.h"
#include "commit.h"

#ifndef _OPENMP
#define _OPENMP 0
#endif

enum { PATH_TEXT = CONFIG_TEXT + 32 };

/* --- the run directory --- */

static bool file_exists(const char *run, const char *name) {
    char path[PATH_TEXT];
    struct stat status;
    snprintf(path, sizeof path, "%s/%s", run, name);
    return stat(path, &status) == 0;
}

static void make_directory(const char *run) {
    char path[CONFIG_TEXT];
    snprintf(path, sizeof path, "%s", run);
    for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        mkdir(path, 0777); /* what fails here fails the last mkdir too */
        *slash = '/';
    }
    struct stat status;
    CHECK(mkdir(path, 0777) == 0 || errno == EEXIST, "cannot make --out %s (%s): choose another directory", run,
          strerror(errno));
    CHECK(stat(path, &status) == 0 && S_ISDIR(status.st_mode), "--out %s is a file: choose another directory", run);
    CHECK(access(path, W_OK | X_OK) == 0, "cannot write into --out %s (%s): choose another directory", run,
          strerror(errno));
}

static void remove_file(const char *run, const char *name) {
    char path[PATH_TEXT];
    snprintf(path, sizeof path, "%s/%s", run, name);
    CHECK(unlink(path) == 0 || errno == ENOENT, "cannot remove %s of the earlier run (%s): choose another --out", path,
          strerror(errno));
}

/* Makes way for a run from the start, if the directory holds nothing else than an earlier start of the same. */
static void clear_run(const Config *config) {
    const char *run = config->train.out;
    if (!file_exists(run, "config.json")) {
        CHECK(!file_exists(run, "log.jsonl") && !file_exists(run, "checkpoint"),
              "--out %s holds a log or a checkpoint but no config.json: choose another --out, or remove it", run);
        return;
    }
    char message[1024];
    Config earlier;
    CHECK(config_read(&earlier, run, message, sizeof message), "--out %s: %s: choose another --out, or remove it", run,
          message);
    config_difference(&earlier, config, message, sizeof message);
    CHECK(!message[0], "--out %s holds a run with another %s: choose another --out, or remove it", run, message);
    remove_file(run, "log.jsonl");
    remove_file(run, "report.html");
}

/* Closes a file written under a temporary name and gives it its own; the program ends if any byte failed. */
static void finish_file(FILE *file, const char *temporary, const char *path) {
    bool written = !ferror(file) && fflush(file) == 0 && fsync(fileno(file)) == 0;
    written = fclose(file) == 0 && written;
    if (!written || rename(temporary, path) != 0) {
        int reason = errno;
        unlink(temporary);
        CHECK(false, "cannot write %s (%s): free some space or choose another --out", path, strerror(reason));
    }
}

static FILE *start_file(const char *path, char *temporary, size_t size) {
    snprintf(temporary, size, "%s.tmp", path);
    FILE *file = fopen(temporary, "w");
    CHECK(file, "cannot write %s (%s): choose another --out", temporary, strerror(errno));
    return file;
}

static void write_config(const Config *config) {
    char path[PATH_TEXT], temporary[PATH_TEXT + 8];
    snprintf(path, sizeof path, "%s/config.json", config->train.out);
    char *json = config_to_json(config);
    FILE *file = start_file(path, temporary, sizeof temporary);
    fprintf(file, "%s\n", json);
    free(json);
    finish_file(file, temporary, path);
}

/* --- the log --- */

/* Whether a whole line of an earlier log stays when the run goes on after resume_step. Lines without a step of their
 * own belong to the line before them: *past says whether that one went. *evaluated becomes true at the evaluation of
 * resume_step. */
static bool line_stays(const char *line, int64_t resume_step, bool *past, bool *evaluated) {
    cJSON *object = cJSON_ParseWithOpts(line, NULL, true);
    bool whole = cJSON_IsObject(object);
    const cJSON *step = cJSON_GetObjectItemCaseSensitive(object, "step");
    if (cJSON_IsNumber(step)) {
        *past = step->valuedouble > (double)resume_step;
        bool same = step->valuedouble == (double)resume_step;
        *evaluated = *evaluated || (same && cJSON_HasObjectItem(object, "val_loss"));
    }
    cJSON_Delete(object);
    return whole && !*past;
}

/* Rewrites the log without what came after resume_step, and without lines that are not whole. Returns how many lines
 * are left; 0 also when there is no log. *evaluated: whether the evaluation of resume_step is among them. */
static int64_t cut_log(const char *path, int64_t resume_step, bool *evaluated) {
    *evaluated = false;
    FILE *earlier = fopen(path, "r");
    if (!earlier) {
        CHECK(errno == ENOENT, "cannot read %s (%s): make it readable or move it away", path, strerror(errno));
        return 0;
    }
    char temporary[PATH_TEXT + 8];
    FILE *kept = start_file(path, temporary, sizeof temporary);
    char *line = NULL;
    size_t capacity = 0;
    int64_t lines = 0;
    bool past = false;
    for (ssize_t length; (length = getline(&line, &capacity, earlier)) > 0;) {
        if (line[length - 1] == '\n' && line_stays(line, resume_step, &past, evaluated)) {
            fwrite(line, 1, (size_t)length, kept);
            lines++;
        }
    }
    free(line);
    fclose(earlier);
    finish_file(kept, temporary, path);
    return lines;
}

/* Resuming in the same directory continues its log; with another --out a log of its own is begun. */
static bool continues_in_place(const TrainConfig *train) {
    struct stat from, to;
    return train->resume[0] && stat(train->resume, &from) == 0 && stat(train->out, &to) == 0 &&
           from.st_dev == to.st_dev && from.st_ino == to.st_ino;
}

static void write_header(Log *log, const Config *config, const LogHeader *header) {
    char now[32], quoted[512], *text = NULL;
    size_t length = 0;
    time_t seconds = time(NULL);
    struct tm utc;
    strftime(now, sizeof now, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&seconds, &utc));
    char *json = config_to_json(config);
    cJSON_Minify(json); /* the header is one line */

    FILE *line = open_memstream(&text, &length);
    CHECK(line, "out of memory while writing the log's header");
    fprintf(line, "{\"ts\":\"%s\",\"program\":\"moelab\"", now);
    fprintf(line, ",\"git_sha\":%s", json_quote(quoted, sizeof quoted, commit_sha(), strlen(commit_sha())));
    fprintf(line, ",\"git_dirty\":%s", commit_dirty() < 0 ? "null" : commit_dirty() ? "true" : "false");
    fprintf(line, ",\"config\":%s", json);
    fprintf(line, ",\"device\":%s", json_quote(quoted, sizeof quoted, header->device, strlen(header->device)));
    fprintf(line, ",\"precision\":\"%s\"", REAL_NAME);
    fprintf(line, ",\"versions\":{\"compiler\":%s",
            json_quote(quoted, sizeof quoted, __VERSION__, strlen(__VERSION__)));
    fprintf(line, ",\"openmp\":%d,\"cjson\":\"%s\"}", _OPENMP, cJSON_Version());
    fprintf(line, ",\"params_total\":%lld", (long long)header->params_total);
    fprintf(line, ",\"params_active\":%lld", (long long)header->params_active);
    fprintf(line, ",\"params_trainable\":%lld", (long long)header->params_trainable);
    fprintf(line, ",\"flops_per_token\":%.9g,\"domains\":[", header->flops_per_token);
    for (int i = 0; i < header->domain_count; i++) {
        const char *domain = header->domains[i];
        fprintf(line, "%s%s", i ? "," : "", json_quote(quoted, sizeof quoted, domain, strlen(domain)));
    }
    fprintf(line, "],\"moe_layers\":[");
    for (int i = 0; i < header->moe_layer_count; i++) {
        fprintf(line, "%s%d", i ? "," : "", header->moe_layers[i]);
    }
    fprintf(line, "],\"learned\":%s", header->learned ? "true" : "false");
    fprintf(line, ",\"leaky\":%s,\"sees_batch\":%s}", header->leaky ? "true" : "false",
            header->sees_batch ? "true" : "false");
    CHECK(fclose(line) == 0, "out of memory while writing the log's header");
    log_line(log, "%s", text);
    free(text);
    free(json);
}

void log_open(Log *log, const Config *config, const LogHeader *header, int64_t resume_step) {
    const TrainConfig *train = &config->train;
    int64_t earlier_lines = 0;
    make_directory(train->out);
    snprintf(log->path, sizeof log->path, "%s/log.jsonl", train->out);
    log->warned = false;
    log->lacks_evaluation = false;
    if (continues_in_place(train)) {
        bool evaluated;
        earlier_lines = cut_log(log->path, resume_step, &evaluated);
        log->lacks_evaluation = !evaluated;
    } else {
        clear_run(config);
    }
    write_config(config);
    log->fd = open(log->path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    CHECK(log->fd >= 0, "cannot write %s (%s): choose another --out", log->path, strerror(errno));
    if (earlier_lines == 0) {
        write_header(log, config, header);
    }
    if (train->resume[0]) {
        log_line(log, "{\"event\":\"resume\",\"step\":%lld}", (long long)resume_step);
    }
}

void log_close(Log *log) {
    if (log->fd >= 0 && close(log->fd) != 0) {
        fprintf(stderr, "moelab: closing %s failed (%s): its last lines may be missing\n", log->path, strerror(errno));
    }
    log->fd = -1;
}

void log_number(FILE *out, double value) {
    if (isfinite(value)) {
        fprintf(out, "%.9g", value);
    } else {
        fputs("null", out);
    }
}

void log_line(Log *log, const char *format, ...) {
    va_list arguments, again;
    if (log->fd < 0) {
        return;
    }
    va_start(arguments, format);
    va_copy(again, arguments);
    int length = vsnprintf(NULL, 0, format, arguments);
    va_end(arguments);
    char *line = length < 0 ? NULL : malloc((size_t)length + 1);
    CHECK(line, "out of memory while writing to %s", log->path);
    vsnprintf(line, (size_t)length + 1, format, again);
    va_end(again);
    assert(!memchr(line, '\n', (size_t)length));
    line[length] = '\n'; /* in place of the terminator: the line is written by its length */
    off_t before = lseek(log->fd, 0, SEEK_END);
    ssize_t written;
    do {
        written = write(log->fd, line, (size_t)length + 1);
    } while (written < 0 && errno == EINTR);
    if (written != length + 1) {
        const char *reason = written < 0 ? strerror(errno) : "no space left";
        if (written > 0 && ftruncate(log->fd, before) != 0) {
            reason = "no space left, and the last line is half written";
        }
        if (!log->warned) {
            fprintf(stderr, "moelab: cannot write to %s (%s): training goes on, lines are missing from the log\n",
                    log->path, reason);
        }
        log->warned = true;
    }
    free(line);
}

/* Bytes of the UTF-8 character at text, 0 when there is none (RFC 3629: no overlong forms, no surrogates). */
static int utf8_length(const unsigned char *text, size_t left) {
    static const struct {
        unsigned char below;
        int length;
    } firsts[] = {{0x80, 1}, {0xc2, 0}, {0xe0, 2}, {0xf0, 3}, {0xf5, 4}};
    int length = 0;
    for (size_t i = 0; i < sizeof firsts / sizeof *firsts; i++) {
        if (text[0] < firsts[i].below) {
            length = firsts[i].length;
            break;
        }
    }
    if ((size_t)length > left) {
        return 0;
    }
    for (int i = 1; i < length; i++) {
        if (text[i] >> 6 != 2) {
            return 0;
        }
    }
    bool overlong = (text[0] == 0xe0 && text[1] < 0xa0) || (text[0] == 0xf0 && text[1] < 0x90);
    bool surrogate = text[0] == 0xed && text[1] > 0x9f;
    bool beyond = text[0] == 0xf4 && text[1] > 0x8f;
    return overlong || surrogate || beyond ? 0 : length;
}

const char *json_quote(char *out, size_t size, const char *text, size_t length) {
    const unsigned char *bytes = (const unsigned char *)text;
    size_t used = 0;
    assert(size >= 3);
    out[used++] = '"';
    for (size_t i = 0; i < length;) {
        char piece[8];
        int taken = utf8_length(bytes + i, length - i);
        if (taken == 0 || bytes[i] == '\0') {         /* no reader of C strings survives a zero byte */
            snprintf(piece, sizeof piece, "\\ufffd"); /* the character that stands for "not a character" */
            taken = 1;
        } else if (bytes[i] == '"' || bytes[i] == '\\') {
            snprintf(piece, sizeof piece, "\\%c", bytes[i]);
        } else if (bytes[i] == '\n') {
            snprintf(piece, sizeof piece, "\\n");
        } else if (bytes[i] < 0x20 || bytes[i] == 0x7f) {
            snprintf(piece, sizeof piece, "\\u%04x", bytes[i]);
        } else {
            snprintf(piece, sizeof piece, "%.*s", taken, text + i);
        }
        if (used + strlen(piece) + 2 > size) {
            break; /* what does not fit is left out, whole characters at a time */
        }
        memcpy(out + used, piece, strlen(piece));
        used += strlen(piece);
        i += (size_t)taken;
    }
    out[used++] = '"';
    out[used] = '\0';
    return out;
}
