/* What training reads: batches of token sequences, from the builtin corpus, a text file (as bytes, or through a
 * tokenizer) or token shards.
 *
 * A batch is a function of (corpus, split, step, first sequence): there is no position to save, so resuming is exact,
 * and any rank can read any share of any step.
 *
 *     Corpus *corpus = corpus_open(&options);
 *     corpus_batch(corpus, SPLIT_TRAIN, step, rank * share, share, &batch);
 *
 * What is to be predicted is the next token, everywhere; or, with mask_share > 0, the tokens that a mask token hides, a
 * share of each sequence drawn at random (Devlin et al. 2018, arXiv 1810.04805, without its other replacements).
 *
 * Read next: data/tokenizer.h, data/shard.h.
 */
#ifndef DATA_CORPUS_H
#define DATA_CORPUS_H

#include <stdbool.h>
#include <stdint.h>

#include "tokenizer.h"

typedef enum { SPLIT_TRAIN, SPLIT_VAL } Split;

typedef struct {
    const char *train; /* "builtin", FILE (bytes; named *.bin: a shard), DIR of *.bin, or a quoted GLOB of them; of DIR
                        * and GLOB, files with "val" in their name are never trained on */
    const char *val;   /* same; "": the last tenth of a FILE, or the files of DIR or GLOB with "val" in their name */
    const Tokenizer *tokenizer; /* of text, and of the shards as far as they say; must outlive the corpus. NULL: bytes,
                                 * and nothing is known of shards */
    int seq;                    /* T */
    int batch;                  /* B, sequences of one step over all ranks */
    int vocab;                  /* tokens must be below it */
    const char *domains; /* of the builtin text to train on: "all" (NULL is the same), "by-rank", or some of their
                                 * names with commas between; validation text is always of all */
    int ranks;           /* with by-rank: the ranks the domains are dealt out to, see corpus_first */
    bool shuffle;        /* false: sequence j of step s is the T+1 tokens from (s*B + j)*T of the stream */
    uint64_t seed;
    double mask_share; /* share of each sequence that is hidden and predicted, at most 1; 0: next-token prediction */
    int mask_token;    /* stands where a token is hidden; not below vocab, so that no token of the data is it */
} CorpusOptions;

typedef struct Corpus Corpus;

/* One batch, in arrays of the caller, each (count, T) or NULL where it is not wanted. */
typedef struct {
    int *tokens;
    int *targets;          /* the token after each token; with masks the token hidden there, -1 where none is */
    unsigned char *domain; /* domain of the token after each token, 0 .. corpus_domains - 1; with masks of the token
                            * itself, hidden or not */
    double *floor;         /* -ln of the target's true probability given all before it and the domains that the sequence
                            * is written from, in nats; NAN where unknown, and with masks, when a token is predicted
                            * from both sides */
    int *bytes;            /* of text that the target stands for; 0 for a special token, -1 where unknown or where there
                            * is no target. Only with targets */
} Batch;

/* Opens and checks the data. A text is encoded here, on all cores, its two parts apart: whatever the tokenizer, the
 * validation text is the same. Ends the program with one line when a path is missing or empty, a shard is malformed,
 * damaged or made with another tokenizer, there is less than one sequence of T+1 tokens (naming how many there are), or
 * the domains are none that this text has. Copies what it needs of the options. Caller closes. */
Corpus *corpus_open(const CorpusOptions *options);
void corpus_close(Corpus *corpus);

/* Fills `count` sequences, the first of which is sequence `first` of step `step`. Step 0 of SPLIT_VAL is always the
 * same text (for the builtin corpus: of one seed). SPLIT_VAL is never shuffled. Masks are a function of (seed, split,
 * step, sequence) too: training hides other places each time that a text comes round, validation step 0 always the same
 * ones. Ends the program on a token at or above vocab (file, position, value). Thread-safe. */
void corpus_batch(const Corpus *corpus, Split split, int64_t step, int first, int count, Batch *batch);

/* The first of the sequences of a step that a rank reads in a slice; they are B / slices / ranks. Slice after slice in
 * the order of the ranks, so that a slice is the same tokens however many ranks there are.
 *
 * But in training with domains dealt out by rank, rank after rank in the order of the slices: rank r of R reads part r
 * of R equal ones in whatever slices, and this part is written from its domains alone. These are r, r + R, r + 2R, ...
 * of the D there are; a rank for which none is left has domain r mod D. */
int corpus_first(const Corpus *corpus, Split split, int slice, int slices, int rank, int ranks);

/* How many tokens of each sequence are predicted: T, or with masks the nearest to mask_share * T, at least 1. */
int corpus_masked_tokens(const Corpus *corpus);

/* Number of latent domains (1 for text) and their names. */
int corpus_domains(const Corpus *corpus);
const char *corpus_domain_name(const Corpus *corpus, int domain);

/* Whether Batch.floor is known (the builtin corpus without masks). */
bool corpus_has_floor(const Corpus *corpus);

/* A short prompt that starts a document of the domain ("" when there is none); used to sample one text per domain. */
const char *corpus_prompt(const Corpus *corpus, int domain);

/* Mean bytes of text per token of the validation data (1 at byte level; NAN when unknown, as for foreign shards). */
double corpus_bytes_per_token(const Corpus *corpus);

/* Tokens of the split, or -1 when it has no end (builtin). */
int64_t corpus_tokens(const Corpus *corpus, Split split);

#endif
