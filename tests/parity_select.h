/* Which operations and shapes a mode of parity.c runs, and how many cases passed. */
#ifndef TESTS_PARITY_SELECT_H
#define TESTS_PARITY_SELECT_H

#include "operations.h"

enum { NAMES = 64 };

typedef struct {
    bool small, large; /* the small shapes alone, the others alone */
    const char *names[NAMES];
    int name_count; /* 0: all operations */
} Selection;

typedef struct {
    int passed, failed;
} Count;

static inline void count_case(Count *count, bool passed) {
    count->passed += passed;
    count->failed += !passed;
}

/* The i-th selected operation, NULL past the last. */
static inline const Operation *selected_operation(const Selection *s, int i) {
    if (s->name_count == 0) {
        return operation_at((size_t)i);
    }
    return i < s->name_count ? operation_named(s->names[i]) : NULL;
}

static inline bool is_selected(const Selection *s, const char *name) {
    for (int i = 0; i < s->name_count; i++) {
        if (strcmp(s->names[i], name) == 0) {
            return true;
        }
    }
    return s->name_count == 0;
}

/* The i-th shape of the lists small, large, fast one after the other, NULL past the last. */
static inline const int *selected_shape(const Selection *s, const Operation *op, int i) {
    const int(*list[3])[EXTENTS] = {op->shapes, op->large, op->fast};
    const int most[3] = {sizeof op->shapes / sizeof *op->shapes, sizeof op->large / sizeof *op->large,
                         sizeof op->fast / sizeof *op->fast};
    for (int which = s->large ? 1 : 0; which < (s->small ? 1 : 3); which++) {
        int count = 0;
        while (count < most[which] && list[which][count][0] > 0) {
            count++;
        }
        if (i < count) {
            return list[which][i];
        }
        i -= count;
    }
    return NULL;
}

#endif
