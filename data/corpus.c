/* Training data as a function of (split, step, sequence). Two kinds stand behind it:
 *
 *     builtin   sequence g is made of documents of its own, numbers g*D, g*D + 1, ... of the split's stream, the last
 *               one cut; so the floor is exact from the first token of a sequence on. Which domains they are drawn from
 *               may depend on the place in the step, so that each rank trains on others
 *     text      a window of T+1 tokens of the stream; the next window starts T tokens later, so that each token is a
 *               target once. W = (tokens - 1) / T windows. The stream is a loader's, or what a tokenizer makes of
 *               its text
 *
 * where g = step * batch + place in the step. Shuffled, an epoch visits each of its windows once: their order is a
 * keyed permutation that is computed window by window (a Feistel network, Luby and Rackoff 1988, repeated until the
 * result is a window), and they are shifted together by a random phase, so that the cuts fall elsewhere each time.
 *
 * For masked prediction the T tokens are read into the targets too; then each place keeps one of the two: where it is
 * hidden the target, elsewhere the token.
 *
 * Called by train.c. Read next: data/builtin.c, data/text_loader.h. */
#include "../kernels/checksum.h"
#define TEXT_LOADER_CRC32C crc32c
#define TEXT_LOADER_IMPLEMENTATION
#include "text_loader.h"

#include "corpus.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "../kernels/check.h"
#include "../kernels/random.h"
#include "builtin.h"

enum { SHORTEST_DOCUMENT = 20, BUILTIN_VOCAB = 128, FEISTEL_ROUNDS = 6 };

/* A split of text: tokens [first, first + tokens) of a loader's stream, or those that its text there was encoded to. */
typedef struct {
    TextLoader *loader;
    uint64_t first;
    uint64_t tokens;
    int *ids;               /* (tokens) owned; NULL: the loader's own */
    double bytes_per_token; /* of text; NAN: unknown */
} Part;

struct Corpus {
    bool builtin;
    uint64_t keys[2];  /* of the builtin documents, by Split */
    DomainSet domains; /* of the builtin training text */
    int ranks;         /* they are dealt out to so many; 0: not dealt out */
    Part parts[2];     /* of text, by Split; they may share a loader */
    int *token_bytes;  /* (vocab) of text, by token; NULL: unknown */
    int seq;
    int batch;
    int vocab;
    bool shuffle;
    uint64_t seed;
    int masked; /* hidden tokens of a sequence; 0: next-token prediction */
    int mask_token;
    uint64_t mask_keys[2]; /* by Split */
};

static bool is_builtin(const char *name) {
    return strcmp(name, "builtin") == 0;
}

static bool is_file(const char *path) {
    struct stat status;
    return stat(path, &status) == 0 && S_ISREG(status.st_mode);
}

/* Turns the bytes of a part into tokens, where they are not the same. */
static void read_text_part(Part *part, const Tokenizer *tokenizer, int vocab, const char *name) {
    char error[TEXT_LOADER_ERROR_BYTES];
    part->bytes_per_token = 1;
    if (!tokenizer || tokenizer_is_bytes(tokenizer)) {
        return;
    }
    uint64_t bytes;
    const char *text = (const char *)text_loader_text(part->loader, &bytes);
    CHECK(text, "out of memory for the text of %s: make shards of it with data/tokenize", name);
    size_t count = 0;
    bool encoded =
        tokenizer_encode(tokenizer, text + part->first, (size_t)part->tokens, &part->ids, &count, error, sizeof error);
    CHECK(encoded, "%s: %s", name, error);
    for (size_t i = 0; i < count; i++) {
        CHECK(part->ids[i] < vocab, "--vocab %d is too small for token %d of the tokenizer: raise it", vocab,
              part->ids[i]);
    }
    part->bytes_per_token = (double)part->tokens / (double)count;
    part->first = 0;
    part->tokens = count;
}

/* What shards say about the tokenizer that made them must agree with the one given. Whether it is known to be theirs.
 * */
static bool read_shard_part(Part *part, const Tokenizer *tokenizer, int vocab, const char *name) {
    const TextLoader *loader = part->loader;
    CHECK(text_loader_vocab(loader) <= vocab,
          "--vocab %d is too small for the shards in %s, which have %d tokens: raise it", vocab, name,
          text_loader_vocab(loader));
    uint64_t bytes = text_loader_bytes(loader);
    part->bytes_per_token = bytes > 0 ? (double)bytes / (double)text_loader_tokens(loader) : NAN;
    uint32_t hash;
    if (!text_loader_tokenizer(loader, &hash)) {
        return tokenizer && !tokenizer_is_bytes(tokenizer);
    }
    CHECK(!tokenizer || hash == tokenizer_hash(tokenizer), "%s was made with another tokenizer than %s: %s", name,
          tokenizer_is_bytes(tokenizer) ? "bytes" : "the one given",
          "give the tokenizer.json it was made with as --tokenizer");
    return tokenizer;
}

static int *list_token_bytes(const Tokenizer *tokenizer, int vocab) {
    int *list = calloc((size_t)vocab, sizeof *list);
    CHECK(list, "out of memory for a vocabulary of %d", vocab);
    for (int id = 0; id < vocab; id++) {
        size_t bytes = 1; /* where tokens are bytes */
        bool text = !tokenizer || (tokenizer_token(tokenizer, id, &bytes) && !tokenizer_is_special(tokenizer, id));
        list[id] = text ? (int)bytes : 0;
    }
    return list;
}

static void open_text(Corpus *corpus, const char *train, const char *val, const Tokenizer *tokenizer) {
    char error[TEXT_LOADER_ERROR_BYTES];
    Part *parts = corpus->parts;
    CHECK(strcmp(train, val) != 0,
          "--val is the same as --data: leave --val out to hold a part of it out, or give other text for validation");
    parts[SPLIT_TRAIN].loader = text_loader_open(train, NULL, "val", error);
    CHECK(parts[SPLIT_TRAIN].loader, "--data: %s", error);
    bool text = text_loader_is_text(parts[SPLIT_TRAIN].loader);
    uint64_t tokens = text_loader_tokens(parts[SPLIT_TRAIN].loader);
    parts[SPLIT_TRAIN].tokens = tokens;
    if (*val) {
        parts[SPLIT_VAL].loader = text_loader_open(val, NULL, NULL, error);
        CHECK(parts[SPLIT_VAL].loader, "--val: %s", error);
        parts[SPLIT_VAL].tokens = text_loader_tokens(parts[SPLIT_VAL].loader);
    } else if (is_file(train)) {
        uint64_t tenth = tokens / 10;
        parts[SPLIT_TRAIN].tokens = tokens - tenth;
        parts[SPLIT_VAL] = (Part){.loader = parts[SPLIT_TRAIN].loader, .first = tokens - tenth, .tokens = tenth};
    } else {
        parts[SPLIT_VAL].loader = text_loader_open(train, "val", NULL, error);
        CHECK(parts[SPLIT_VAL].loader, "validation data: %s; give some with --val", error);
        parts[SPLIT_VAL].tokens = text_loader_tokens(parts[SPLIT_VAL].loader);
    }
    CHECK(text == text_loader_is_text(parts[SPLIT_VAL].loader),
          "one of --data %s and --val %s is text and the other is token shards: give both in one form", train, val);
    bool known = true;
    for (int split = SPLIT_TRAIN; split <= SPLIT_VAL; split++) {
        Part *part = &parts[split];
        const char *name = split == SPLIT_VAL && *val ? val : train;
        if (text) {
            read_text_part(part, tokenizer, corpus->vocab, name);
        } else {
            known = read_shard_part(part, tokenizer, corpus->vocab, name) && known;
        }
        CHECK(part->tokens > (uint64_t)corpus->seq,
              "%s has %llu tokens for %s, but a sequence takes %d (--seq %d and one more): lower --seq or give more "
              "data%s",
              name, (unsigned long long)part->tokens, split == SPLIT_VAL ? "validation" : "training", corpus->seq + 1,
              corpus->seq, split == SPLIT_VAL ? " with --val" : "");
    }
    if (known) {
        corpus->token_bytes = list_token_bytes(tokenizer, corpus->vocab);
    }
}

/* Takes over which domains the training text is written from. */
static void choose_domains(Corpus *corpus, const char *names, int ranks) {
    char error[256];
    corpus->domains = builtin_all_domains();
    if (!names || strcmp(names, "all") == 0) {
        return;
    }
    CHECK(corpus->builtin, "--domains %s is for the builtin corpus alone: drop it, or give --data builtin", names);
    if (strcmp(names, "by-rank") == 0) {
        CHECK(
            ranks > 1,
            "--domains by-rank deals the domains out to the ranks, and there is one: start several with mpirun -n, or "
            "give --domains all");
        assert(corpus->batch % ranks == 0);
        corpus->ranks = ranks;
        return;
    }
    bool found = builtin_find_domains(names, &corpus->domains, error, sizeof error);
    CHECK(found, "--domains %s: %s; give all, by-rank, or names with commas between", names, error);
}

Corpus *corpus_open(const CorpusOptions *options) {
    assert(options->seq >= 1 && options->batch >= 1 && options->vocab >= 1);
    assert(options->mask_share >= 0 && options->mask_share <= 1);
    assert(options->mask_share == 0 || options->mask_token >= options->vocab);
    const char *train = options->train, *val = options->val;
    Corpus *corpus = calloc(1, sizeof *corpus);
    CHECK(corpus, "out of memory");
    corpus->builtin = is_builtin(train);
    corpus->keys[SPLIT_TRAIN] = random_key(options->seed, RANDOM_TRAIN_DATA, 0);
    corpus->keys[SPLIT_VAL] = random_key(options->seed, RANDOM_VAL_DATA, 0);
    corpus->seq = options->seq;
    corpus->batch = options->batch;
    corpus->vocab = options->vocab;
    corpus->shuffle = options->shuffle;
    corpus->seed = options->seed;
    if (options->mask_share > 0) {
        long nearest = lround(options->mask_share * options->seq);
        corpus->masked = nearest > 1 ? (int)nearest : 1;
        corpus->mask_token = options->mask_token;
        for (int split = SPLIT_TRAIN; split <= SPLIT_VAL; split++) {
            corpus->mask_keys[split] = random_key(options->seed, RANDOM_MASK, (uint64_t)split);
        }
    }
    CHECK(*val == '\0' || is_builtin(val) == corpus->builtin,
          "--data %s and --val %s do not go together: the builtin corpus has its own validation text, leave --val out",
          train, val);
    if (corpus->builtin) {
        CHECK(!options->tokenizer || tokenizer_is_bytes(options->tokenizer),
              "--data builtin is made of bytes, and its floor is known for them alone: drop --tokenizer, or give other "
              "data");
        CHECK(options->vocab >= BUILTIN_VOCAB,
              "--vocab %d is too small for --data builtin, which is ASCII: give at least %d", options->vocab,
              BUILTIN_VOCAB);
    } else {
        open_text(corpus, train, val, options->tokenizer);
    }
    choose_domains(corpus, options->domains, options->ranks);
    return corpus;
}

void corpus_close(Corpus *corpus) {
    if (!corpus) {
        return;
    }
    if (corpus->parts[SPLIT_VAL].loader != corpus->parts[SPLIT_TRAIN].loader) {
        text_loader_close(corpus->parts[SPLIT_VAL].loader);
    }
    text_loader_close(corpus->parts[SPLIT_TRAIN].loader);
    free(corpus->parts[SPLIT_TRAIN].ids);
    free(corpus->parts[SPLIT_VAL].ids);
    free(corpus->token_bytes);
    free(corpus);
}

/* The i-th of [0, n) in an order that the key decides: a bijection of [0, 4^half), followed from i until it is back
 * inside [0, n), which is a bijection again. */
static uint64_t permute(uint64_t key, uint64_t i, uint64_t n) {
    int half = 1;
    while (half < 32 && (UINT64_C(1) << (2 * half)) < n) {
        half++;
    }
    uint64_t mask = (UINT64_C(1) << half) - 1;
    do {
        uint64_t left = i >> half, right = i & mask;
        for (uint64_t round = 1; round <= FEISTEL_ROUNDS; round++) {
            uint64_t next = left ^ (random_bits(key, round << 32 | right) & mask);
            left = right;
            right = next;
        }
        i = left << half | right;
    } while (i >= n);
    return i;
}

/* Where in its part sequence g starts. */
static uint64_t window_start(const Corpus *corpus, Split split, uint64_t g) {
    uint64_t seq = (uint64_t)corpus->seq;
    uint64_t windows = (corpus->parts[split].tokens - 1) / seq;
    if (split == SPLIT_VAL || !corpus->shuffle || windows == 1) {
        return g % windows * seq;
    }
    uint64_t fitting = windows - 1; /* a phase below T moves the last window past the end */
    uint64_t key = random_key(corpus->seed, RANDOM_SHUFFLE, g / fitting);
    uint64_t phase = random_below(key, 0, seq);
    return permute(key, g % fitting, fitting) * seq + phase;
}

/* How far the token that a place predicts lies ahead of the token there. */
static int target_shift(const Corpus *corpus) {
    return corpus->masked ? 0 : 1;
}

static void read_text(const Corpus *corpus, Split split, uint64_t g, int *tokens, int *targets) {
    const Part *part = &corpus->parts[split];
    uint64_t seq = (uint64_t)corpus->seq;
    uint64_t start = part->first + window_start(corpus, split, g);
    char error[TEXT_LOADER_ERROR_BYTES];
    for (int i = 0; i <= 1; i++) {
        int *out = i ? targets : tokens;
        uint64_t from = start + (uint64_t)(i * target_shift(corpus));
        if (out && part->ids) {
            memcpy(out, part->ids + from, seq * sizeof *out);
        } else if (out) {
            bool good = text_loader_read(part->loader, from, seq, corpus->vocab, out, error);
            CHECK(good, "%s: raise --vocab, or give data of this vocabulary", error);
        }
    }
}

/* What the documents of sequence g are drawn from. */
static DomainSet domains_of(const Corpus *corpus, Split split, uint64_t g) {
    if (split == SPLIT_VAL) {
        return builtin_all_domains();
    }
    if (!corpus->ranks) {
        return corpus->domains;
    }
    int D = builtin_domains(), place = (int)(g % (uint64_t)corpus->batch);
    int rank = place / (corpus->batch / corpus->ranks);
    DomainSet dealt = 0;
    for (int d = rank % D; d < D; d += corpus->ranks) {
        dealt |= 1U << d;
    }
    return dealt;
}

/* Any of the arrays, each of T, may be NULL. */
static void make_documents(const Corpus *corpus, Split split, uint64_t g, int *tokens, int *targets,
                           unsigned char *domains, double *floors) {
    unsigned char bytes[BUILTIN_DOCUMENT_BYTES];
    double nats[BUILTIN_DOCUMENT_BYTES];
    int seq = corpus->seq, shift = target_shift(corpus);
    DomainSet set = domains_of(corpus, split, g);
    /* D: as many documents as T+1 bytes may take; at least 64, so that a sequence of another T often starts alike. */
    int documents = seq / SHORTEST_DOCUMENT + 1;
    uint64_t index = g * (uint64_t)(documents > 64 ? documents : 64);
    for (int t = 0; t < seq + shift;) {
        int domain;
        int length = builtin_document(corpus->keys[split], index++, set, bytes, nats, &domain);
        assert(length >= SHORTEST_DOCUMENT);
        for (int i = 0; i < length && t < seq + shift; i++, t++) {
            if (tokens && t < seq) {
                tokens[t] = bytes[i];
            }
            int at = t - shift; /* the place that predicts this byte */
            if (at < 0) {
                continue; /* nothing before the first token predicts it */
            }
            if (targets) {
                targets[at] = bytes[i];
            }
            if (domains) {
                domains[at] = (unsigned char)domain;
            }
            if (floors) {
                floors[at] = corpus->masked ? NAN : nats[i];
            }
        }
    }
}

/* Hides `masked` places of sequence g, any choice of them as likely as any other: each place with the share that the
 * places left to hide have of those left to visit. */
static void mask_sequence(const Corpus *corpus, Split split, uint64_t g, int *tokens, int *targets) {
    int seq = corpus->seq, left = corpus->masked;
    for (int t = 0; t < seq; t++) {
        uint64_t index = g * (uint64_t)seq + (uint64_t)t;
        bool hidden = random_below(corpus->mask_keys[split], index, (uint64_t)(seq - t)) < (uint64_t)left;
        left -= hidden;
        if (tokens && hidden) {
            tokens[t] = corpus->mask_token;
        }
        if (targets && !hidden) {
            targets[t] = -1;
        }
    }
    assert(left == 0);
}

/* Bytes of text that each of the T targets stands for. */
static void measure_targets(const Corpus *corpus, const int *targets, int *bytes) {
    bool known = corpus->builtin || corpus->token_bytes;
    for (int t = 0; t < corpus->seq; t++) {
        bytes[t] = !known || targets[t] < 0 ? -1 : corpus->builtin ? 1 : corpus->token_bytes[targets[t]];
    }
}

void corpus_batch(const Corpus *corpus, Split split, int64_t step, int first, int count, Batch *batch) {
    assert(step >= 0 && first >= 0 && count >= 0 && (batch->targets || !batch->bytes));
    size_t seq = (size_t)corpus->seq;
    for (int i = 0; i < count; i++) {
        uint64_t g = (uint64_t)step * (uint64_t)corpus->batch + (uint64_t)first + (uint64_t)i;
        size_t row = (size_t)i * seq;
        int *tokens = batch->tokens ? batch->tokens + row : NULL;
        int *targets = batch->targets ? batch->targets + row : NULL;
        unsigned char *domain = batch->domain ? batch->domain + row : NULL;
        double *floors = batch->floor ? batch->floor + row : NULL;
        if (corpus->builtin) {
            make_documents(corpus, split, g, tokens, targets, domain, floors);
        } else {
            read_text(corpus, split, g, tokens, targets);
            for (size_t t = 0; t < seq; t++) {
                if (domain) {
                    domain[t] = 0;
                }
                if (floors) {
                    floors[t] = NAN;
                }
            }
        }
        if (corpus->masked) {
            mask_sequence(corpus, split, g, tokens, targets);
        }
        if (batch->bytes) {
            measure_targets(corpus, targets, batch->bytes + row);
        }
    }
}

int corpus_first(const Corpus *corpus, Split split, int slice, int slices, int rank, int ranks) {
    bool dealt = split == SPLIT_TRAIN && corpus->ranks > 0;
    assert(!dealt || ranks == corpus->ranks);
    return (dealt ? rank * slices + slice : slice * ranks + rank) * (corpus->batch / slices / ranks);
}

int corpus_masked_tokens(const Corpus *corpus) {
    return corpus->masked ? corpus->masked : corpus->seq;
}

int corpus_domains(const Corpus *corpus) {
    return corpus->builtin ? builtin_domains() : 1;
}

const char *corpus_domain_name(const Corpus *corpus, int domain) {
    return corpus->builtin ? builtin_domain_name(domain) : "text";
}

bool corpus_has_floor(const Corpus *corpus) {
    return corpus->builtin && !corpus->masked;
}

const char *corpus_prompt(const Corpus *corpus, int domain) {
    return corpus->builtin ? builtin_prompt(domain) : "";
}

double corpus_bytes_per_token(const Corpus *corpus) {
    return corpus->builtin ? 1.0 : corpus->parts[SPLIT_VAL].bytes_per_token;
}

int64_t corpus_tokens(const Corpus *corpus, Split split) {
    return corpus->builtin ? -1 : (int64_t)corpus->parts[split].tokens;
}
