/* Command lines as text: parsed here, or in a child process where they must be refused.
 *
 *     parse(&config, "--lr 1 --top-k 2");
 *     assert_command_refused("--top-k 9", "--top-k 9 is above --experts 8");
 *
 * Used by test_config.c, test_config_derived.c and test_config_refusals.c.
 */
#ifndef TESTS_COMMAND_LINE_H
#define TESTS_COMMAND_LINE_H

#include "forked.h"

#include "../model/config.h"

enum { ARGUMENTS = 32 };

/* Splits a command line at its blanks, in place. */
static inline int split(char *line, char **argv) {
    int argc = 0;
    argv[argc++] = "train";
    for (char *word = strtok(line, " "); word; word = strtok(NULL, " ")) {
        assert_true(argc < ARGUMENTS);
        argv[argc++] = word;
    }
    return argc;
}

static inline void parse(Config *config, const char *command) {
    char line[512], *argv[ARGUMENTS];
    snprintf(line, sizeof line, "%s", command);
    int argc = split(line, argv);
    config_parse(config, argc, argv);
}

static inline void parse_and_finish(void *command) {
    Config config;
    parse(&config, command);
    config_finish(&config);
}

static inline void assert_command_refused(const char *command, const char *words) {
    char copy[512];
    Forked result;
    snprintf(copy, sizeof copy, "%s", command);
    run_forked(&result, parse_and_finish, copy);
    assert_refused(&result, words);
}

#endif
