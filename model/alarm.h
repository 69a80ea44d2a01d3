/* What a reader of the log must not overlook: a router that the loss does not reach, a router that has collapsed,
 * experts that nobody visits. Each is said once when it begins, on the terminal and in the log, and not again before it
 * has ended. Collapse and idle experts must hold for ALARM_PATIENCE logged steps in a row: a young router sways.
 */
#ifndef MODEL_ALARM_H
#define MODEL_ALARM_H

#include "figures.h"
#include "log.h"

typedef enum { ALARM_SILENT, ALARM_UNBALANCED, ALARM_COLLAPSED, ALARM_DEAD, ALARM_KINDS } AlarmKind;

enum { ALARM_PATIENCE = 3 };

typedef struct {
    int *held; /* (moe_count, ALARM_KINDS) logged steps that it has held for; owned, NULL until the first check */
} Alarms;

/* Looks at the figures of step `step`:
 *
 *   silent     the main loss has no gradient at the router's logits: it learns nothing, or from the balance loss alone
 *   unbalanced the balance loss has none, though it has a coefficient and the loads are not equal
 *   collapsed  the entries are spread over no more experts than a token visits: exp(entropy of the counts) <= 1.1 K,
 *              where there are more than 1.5 K
 *   dead       experts without a single entry, where chance would give each at least 20
 *
 * line_start: what takes a terminal to the start of a line. Returns how many alarms stand. */
int alarms_check(Alarms *alarms, const StepFigures *figures, const Transformer *model, int64_t step, Log *log,
                 const char *line_start);
void alarms_free(Alarms *alarms);

#endif
