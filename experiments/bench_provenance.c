/* Where a line of results comes from; see bench_provenance.h. */
#include "bench_provenance.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

#include "../kernels/device.h"
#include "../model/commit.h"
#include "../model/log.h"

#ifndef _OPENMP
#define _OPENMP 0
#endif

void print_text(const char *name, const char *text) {
    char quoted[512];
    if (text) {
        printf(",\"%s\":%s", name, json_quote(quoted, sizeof quoted, text, strlen(text)));
    } else {
        printf(",\"%s\":null", name);
    }
}

/* The driver's version, a word such as 580.95.05; NULL where there is none to be found. */
static const char *driver_version(char *text, size_t size) {
    FILE *file = fopen("/proc/driver/nvidia/version", "r");
    const char *found = NULL;
    char line[256];
    if (file && fgets(line, sizeof line, file)) {
        for (char *word = strtok(line, " \t\n"); word && !found; word = strtok(NULL, " \t\n")) {
            if (word[strspn(word, "0123456789.")] == '\0' && strchr(word, '.')) {
                snprintf(text, size, "%s", word);
                found = text;
            }
        }
    }
    if (file) {
        fclose(file);
    }
    return found;
}

void print_time(void) {
    char now[32];
    time_t seconds = time(NULL);
    struct tm utc;
    strftime(now, sizeof now, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&seconds, &utc));
    printf("\"ts\":\"%s\"", now);
}

void print_provenance(const char *device) {
    char driver[64];
    print_text("device", device);
    print_text("driver", device && device_runs_ahead() ? driver_version(driver, sizeof driver) : NULL);
    printf(",\"versions\":{\"openmp\":%d", _OPENMP);
    print_text("compiler", __VERSION__);
    printf("}");
    print_text("commit", commit_name());
}
