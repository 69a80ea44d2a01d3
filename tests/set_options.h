/* Options of a configuration from one line of text, as a test's table of variants holds them:
 *
 *     set_options(&config, "--router top1 --tie 1");
 *
 * Each option needs a value, flags too. Nothing is derived or refused as contradictory: config_finish() does that, and
 * test_config.c and test_config_refusals.c test the command line itself.
 */
#ifndef TESTS_SET_OPTIONS_H
#define TESTS_SET_OPTIONS_H

#include <stdio.h>
#include <string.h>

#include "../kernels/check.h"
#include "../model/config.h"
#include "../model/options.h"

static inline void set_options(Config *config, const char *options) {
    char copy[512], error[256], *rest = NULL;
    snprintf(copy, sizeof copy, "%s", options);
    for (char *name = strtok_r(copy, " ", &rest); name; name = strtok_r(NULL, " ", &rest)) {
        const char *value = strtok_r(NULL, " ", &rest);
        CHECK(value && option_find(name + 2) >= 0, "a test's option %s is wrong", name);
        CHECK(option_set(config, &option_table[option_find(name + 2)], value, error, sizeof error), "%s", error);
    }
}

#endif
