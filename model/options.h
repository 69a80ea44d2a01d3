/* What an option is: one row of a table that says where it lives in Config, what it may hold and what it starts as.
 *
 *     option_set(&config, &option_table[option_find("lr")], "1e-3", error, sizeof error);
 *
 * Everything that deals with options goes through the table (config.c: defaults, command line, --help, JSON,
 * comparison), and no row needs code of its own. To add one: a field in config.h, a row in options.c.
 *
 * Values travel as text: option_set reads one and option_print writes one, for the command line and for JSON alike, so
 * both accept and refuse the same things.
 */
#ifndef MODEL_OPTIONS_H
#define MODEL_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>

#include "config.h"

/* The field: int, int64_t, double, char[], an enum kept in an int, an int that the option alone (without a value)
 * makes 1. */
typedef enum { TYPE_INT, TYPE_INT64, TYPE_REAL, TYPE_TEXT, TYPE_CHOICE, TYPE_SWITCH } OptionType;

typedef struct {
    const char *group; /* heading in --help */
    const char *name;  /* without the dashes */
    bool trains;       /* decides what is trained: config_difference looks at it */
    OptionType type;
    size_t offset;       /* of the field in Config */
    const char *initial; /* the default, written as on the command line */
    double min, max;     /* range of numbers; longest text; TYPE_CHOICE: min is the field's value for the first name */
    const char *values;  /* what --help shows for the value; TYPE_CHOICE: the names, in the order of the enum */
    const char *help;
} Option;

enum { OPTION_TEXT = CONFIG_TEXT }; /* holds the text of any value */

/* Whether the option is a number that may also be "auto" (its `values` begin with it): the field is then OPTION_AUTO
 * until config_finish puts in what follows from the rest. */
bool option_may_be_auto(const Option *option);

extern const Option option_table[];
extern const int option_count;

/* Row of the option, -1 when there is none. */
int option_find(const char *name);

/* Writes the value that text spells into the option's field. False with one line in error, the field untouched. */
bool option_set(Config *config, const Option *option, const char *text, char *error, size_t size);

/* The field's value as option_set would read it: reals with the fewest digits that give back the same bits. */
void option_print(const Config *config, const Option *option, char *text, size_t size);

bool option_equal(const Config *a, const Config *b, const Option *option);

/* Whether it is part of ModelConfig. */
bool option_in_model(const Option *option);

/* Edit distance (insert, delete, replace, swap neighbours) of two names; a name that was merely cut short is at 0. */
int name_distance(const char *typed, const char *name);

#endif
