/* Samples at the end of a run: printed as they are drawn, and one log line each. */
#ifndef MODEL_SAMPLE_H
#define MODEL_SAMPLE_H

#include "config.h"
#include "log.h"
#include "transformer.h"
#include "vocabulary.h"

/* Continues --prompt, or each of the prompts (count; "" starts from nothing) of the domains of the same number, by
 * --sample tokens, or until the document ends or the run is asked to. Ends the program with one line when the
 * vocabulary has no tokens for a prompt. */
void sample_texts(Transformer *model, const Config *config, const Vocabulary *vocabulary, const char *const *domains,
                  const char *const *prompts, int count, Log *log);

#endif
