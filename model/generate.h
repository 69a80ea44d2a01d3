/* Sampling with a cache of keys and values: one sequence, or B of them side by side.
 *
 *     Generator g;
 *     generator_open_batch(&g, &config, &model, 8, 100);                8 sequences, prompts of 100 tokens at once
 *     generate_batch(&g, out, 50, prompts, 100, options, NULL, NULL);   out (8,50)
 *     generator_close(&g);
 *
 * The B sequences walk in step: their prompts have the same number of tokens, so every token of a round stands at the
 * same position, and nothing has to be sorted by length or masked. With routers whose tokens do not see other sequences
 * (router.h, sees_batch) each gets the text it would get alone: the same bits on the CPU; on a GPU up to rounding, for
 * products of another size may sum in another order.
 *
 * A prompt is read token by token through the cache, or, with generator_open_batch, all of it in one forward, whose
 * keys and values become the cache. The host waits for the device once for each token of a batch: for the logits it
 * draws from.
 */
#ifndef MODEL_GENERATE_H
#define MODEL_GENERATE_H

#include "config.h"
#include "transformer.h"

enum { GENERATE_MOST = 256 }; /* sequences side by side */

typedef struct {
    Config config;        /* its own copy: always dropless */
    Transformer model;    /* a token of each sequence at a time, weights of the source */
    Config reader_config; /* its sequences are as long as a prompt */
    Transformer reader;   /* reads prompts at once; layers NULL: there is none */
    Arena arena;
    int B;           /* sequences */
    int *tokens;     /* (B, tokens of a prompt, at least 1) device */
    acc_t *work;     /* (B,2V) host */
    Readback logits; /* (B,V) of a round, on their way to the host */
    double drawing;  /* seconds that the host has drawn tokens so far */
} Generator;

/* What is drawn: temperature 0 takes the most probable token; otherwise softmax(logits / temperature), cut to the top_k
 * most probable (0: all) and then to the fewest of those whose probabilities reach top_p. */
typedef struct {
    double temperature, top_p;
    int top_k;
    uint64_t seed;
} SampleOptions;

/* One sequence at a time, its prompt token by token, sharing the source's weights. Generator must stay where it is. */
void generator_open(Generator *generator, const Config *config, Transformer *source);

/* `batch` sequences (1 .. GENERATE_MOST) side by side. Prompts of `prompt` tokens (0: none; at most T) are read at
 * once, where no token of a router sees later ones. */
void generator_open_batch(Generator *generator, const Config *config, Transformer *source, int batch, int prompt);
void generator_close(Generator *generator);

/* Whether prompts of so many tokens are read in one forward. */
bool generator_reads_at_once(const Generator *generator, int count);

/* Continues prompt (count tokens, at least 1; of more than T only the last T/2 are read) by `length` tokens into out
 * (length); the draw is a function of options.seed and the place. Past the context of T tokens the last T/2 are read
 * again. Calls `each` (may be NULL) with every new token; stops when it returns false. Returns how many were written.
 * For a generator of one sequence. */
int generate(Generator *generator, int *out, int length, const int *prompt, int count, SampleOptions options,
             bool (*each)(int token, void *user), void *user);

/* The same for all sequences: prompts (B,count), out (B,length). Sequence b draws as one alone does with the seed
 * options.seed + b. `each` gets the B tokens of a round. Returns how many rounds were written. */
int generate_batch(Generator *generator, int *out, int length, const int *prompts, int count, SampleOptions options,
                   bool (*each)(const int *tokens, void *user), void *user);

/* One draw from logits (V); work (2V) is scratch; uniform in [0,1). */
int sample_token(const acc_t *logits, int V, SampleOptions options, double uniform, acc_t *work);

/* One token per sequence at `position`, after those before it; leaves logits (B,V) in model->logits_acc. Of a model for
 * USE_GENERATE. */
void transformer_decode(Transformer *model, const int *tokens, int position, Stream *stream);

#endif
