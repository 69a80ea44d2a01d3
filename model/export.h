/* What a run leaves for other programs: --export-hf and --export-gguf. */
#ifndef MODEL_EXPORT_H
#define MODEL_EXPORT_H

#include <stdbool.h>

#include "config.h"
#include "transformer.h"
#include "vocabulary.h"

/* Before training starts: ends the program with one line when an export that is asked for could not be made afterwards.
 * */
void export_check(const Config *config, const Vocabulary *vocabulary);

/* Writes what is asked for and says so. False, with one line on stderr, when something could not be written. */
bool export_write(const Config *config, const Transformer *model, const Vocabulary *vocabulary);

#endif
