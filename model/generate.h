/* Sampling with a cache of keys and values. */
#ifndef MODEL_GENERATE_H
#define MODEL_GENERATE_H

#include "config.h"
#include "transformer.h"

typedef struct {
    Config config;     /* its own copy: always dropless */
    Transformer model; /* one token at a time, weights of the source */
    Arena arena;
    int *tokens;   /* (B) device */
    acc_t *work;   /* (2V) host */
    acc_t *logits; /* (V) host */
} Generator;

/* What is drawn: temperature 0 takes the most probable token; otherwise softmax(logits / temperature), cut to the top_k
 * most probable (0: all) and then to the fewest of those whose probabilities reach top_p. */
typedef struct {
    double temperature, top_p;
    int top_k;
    uint64_t seed;
} SampleOptions;

/* One sequence at a time, sharing the source's weights. Generator must stay where it is. */
void generator_open(Generator *generator, const Config *config, Transformer *source);
void generator_close(Generator *generator);

/* Continues prompt (count tokens, at least 1; of more than T only the last T/2 are read) by `length` tokens into out
 * (length); the draw is a function of options.seed and the place. Past the context of T tokens the last T/2 are read
 * again. Calls `each` (may be NULL) with every new token; stops when it returns false. Returns how many were written.
 */
int generate(Generator *generator, int *out, int length, const int *prompt, int count, SampleOptions options,
             bool (*each)(int token, void *user), void *user);

/* One draw from logits (V); work (2V) is scratch; uniform in [0,1). */
int sample_token(const acc_t *logits, int V, SampleOptions options, double uniform, acc_t *work);

#endif
