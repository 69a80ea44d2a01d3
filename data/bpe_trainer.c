/* Learns byte-pair merges without reading the text again after each one.
 *
 * A text of millions of pieces has few different ones, so each is kept once, with its count, as a chain of symbols.
 * Pairs of neighbours are counted once; a merge then visits the places of its pair alone, and corrects the counts of
 * the pairs around each:
 *
 *     x a b y    becomes    x ab y:    (x, a) and (b, y) lose, (x, ab) and (ab, y) gain the count of the piece
 *
 * Only pairs that hold the token just made gain, so a pair's count never rises after the merge that first made it: the
 * heap may hold counts that are out of date, and puts a pair back when its turn comes and its count has fallen.
 *
 * No two merges spell the same bytes. Take a stretch of a piece that no symbol reaches out of: it holds the symbols
 * that it would hold as a text of its own, the same at each place where it comes. When it first becomes one token, it
 * does so at all of them, and none is left for another merge to spell. So each merge makes a token, and there are 256 +
 * merges + 1 of them.
 *
 * Called by tokenize.c. Read next: pretokenizer.h (what a piece is), tokenizer.c (applies the merges).
 */
#define _GNU_SOURCE /* memmem */
#include "bpe_trainer.h"

#include <assert.h>
#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <stb/stb_ds.h>
#include <utf8proc.h>

#include "pretokenizer.h"
#include "tokenizer.h"

enum {
    BYTES = 256,
    LEAST_VOCAB = BYTES + 1,
    LEAST_COUNT = 2,        /* a pair that occurs once teaches nothing about other text */
    MOST_SYMBOLS = 1 << 29, /* a merge takes one away and makes two pairs: they can be counted with an int */
    PROGRESS_EVERY = 64,    /* merges */
};

static const uint32_t NO_SYMBOL = UINT32_MAX;
static const int SWALLOWED = -1; /* id of a symbol that became part of the one before it */

/* A different piece of the text. */
typedef struct {
    const char *bytes; /* in the text, where it comes first */
    size_t length;
    int64_t count;
    int same_hash; /* another piece; -1: none */
} Piece;

typedef struct {
    int id;
    int piece;
    uint32_t before, after; /* neighbours in the piece, by index; NO_SYMBOL at its ends */
} Symbol;

typedef struct {
    int a, b;
    int64_t count;    /* in the whole text */
    int64_t queued;   /* what the heap believes it to be, count or more */
    uint32_t *places; /* stb array, ascending: symbols that were an a before a b when the pair came up */
} Pair;

typedef struct {
    int a, b;
} Merge;

/* Element of a hash table: of a piece's hash, or of a pair's two ids. */
typedef struct {
    uint64_t key;
    int value;
} Slot;

typedef struct {
    Piece *pieces;    /* stb arrays and tables, but for symbols and texts */
    Slot *piece_slot; /* hash of its bytes -> first piece of that hash */
    Symbol *symbols;  /* of all pieces one after the other */
    Pair *pairs;
    Slot *pair_slot; /* a, b -> pair */
    int *heap;       /* pairs, each at most once, by queued */
    Merge *merges;
    char **texts; /* (256 + merges) each token as tokenizer.json writes it; owned */
} Trainer;

static void trainer_free(Trainer *trainer) {
    for (ptrdiff_t i = 0; i < arrlen(trainer->pairs); i++) {
        arrfree(trainer->pairs[i].places);
    }
    for (ptrdiff_t i = 0; trainer->texts && i < BYTES + arrlen(trainer->merges); i++) {
        free(trainer->texts[i]);
    }
    arrfree(trainer->pieces);
    hmfree(trainer->piece_slot);
    free(trainer->symbols);
    arrfree(trainer->pairs);
    hmfree(trainer->pair_slot);
    arrfree(trainer->heap);
    arrfree(trainer->merges);
    free(trainer->texts);
}

#define FAIL(...) (snprintf(error, error_size, __VA_ARGS__), false)

/* ---- the different pieces of the text and how often each comes ---- */

/* FNV-1a (Fowler, Noll, Vo). The top bit of each half stays 0: stb_ds puts keys together from signed numbers, in which
 * a bit there would overflow. */
static uint64_t hash_bytes(const char *bytes, size_t length) {
    uint64_t hash = UINT64_C(0xcbf29ce484222325);
    for (size_t i = 0; i < length; i++) {
        hash = (hash ^ (unsigned char)bytes[i]) * UINT64_C(0x100000001b3);
    }
    return hash & UINT64_C(0x7fffffff7fffffff);
}

static bool count_piece(Trainer *trainer, const char *bytes, size_t length) {
    uint64_t hash = hash_bytes(bytes, length);
    ptrdiff_t slot = hmgeti(trainer->piece_slot, hash);
    int first = slot < 0 ? -1 : trainer->piece_slot[slot].value;
    for (int i = first; i >= 0; i = trainer->pieces[i].same_hash) {
        Piece *piece = &trainer->pieces[i];
        if (piece->length == length && memcmp(piece->bytes, bytes, length) == 0) {
            piece->count++;
            return true;
        }
    }
    if (arrlen(trainer->pieces) == INT_MAX) {
        return false;
    }
    int added = (int)arrlen(trainer->pieces);
    arrput(trainer->pieces, ((Piece){.bytes = bytes, .length = length, .count = 1, .same_hash = first}));
    hmput(trainer->piece_slot, hash, added);
    return true;
}

/* Documents are the stretches between end-of-text contents; a piece lies inside one. */
static bool count_pieces(Trainer *trainer, Scan *scan, const char *text, size_t bytes, const char *end_of_text) {
    size_t mark = strlen(end_of_text);
    for (const char *document = text, *end = text + bytes; document < end;) {
        const char *found = memmem(document, (size_t)(end - document), end_of_text, mark);
        const char *stop = found ? found : end;
        size_t from, to;
        scan_text(scan, document, (size_t)(stop - document), 0);
        while (scan_next(scan, &from, &to)) {
            if (!count_piece(trainer, document + from, to - from)) {
                return false;
            }
        }
        document = found ? found + mark : end;
    }
    return true;
}

/* ---- symbols and pairs of neighbours ---- */

static uint64_t pair_key(int a, int b) {
    return (uint64_t)a << 32 | (uint64_t)b;
}

/* The pair of the symbol at `place` and the next one, which is there. */
static Pair *pair_at(Trainer *trainer, uint32_t place) {
    const Symbol *left = &trainer->symbols[place];
    int a = left->id, b = trainer->symbols[left->after].id;
    ptrdiff_t slot = hmgeti(trainer->pair_slot, pair_key(a, b));
    int index = slot < 0 ? (int)arrlen(trainer->pairs) : trainer->pair_slot[slot].value;
    if (slot < 0) {
        arrput(trainer->pairs, ((Pair){.a = a, .b = b}));
        hmput(trainer->pair_slot, pair_key(a, b), index);
    }
    return &trainer->pairs[index];
}

static void pair_gain(Trainer *trainer, uint32_t place) {
    Pair *pair = pair_at(trainer, place);
    pair->count += trainer->pieces[trainer->symbols[place].piece].count;
    arrput(pair->places, place);
}

static void pair_lose(Trainer *trainer, uint32_t place) {
    Pair *pair = pair_at(trainer, place);
    pair->count -= trainer->pieces[trainer->symbols[place].piece].count;
    assert(pair->count >= 0);
}

/* Every piece as the symbols of its bytes. */
static bool make_symbols(Trainer *trainer, char *error, size_t error_size) {
    size_t total = 0;
    for (ptrdiff_t i = 0; i < arrlen(trainer->pieces); i++) {
        total += trainer->pieces[i].length; /* no overflow: different pieces lie side by side in the text */
    }
    if (total > MOST_SYMBOLS) {
        return FAIL("the text has %zu bytes of different words, at most 2^29 can be learned from: give a part of it",
                    total);
    }
    trainer->symbols = malloc((total + 1) * sizeof *trainer->symbols);
    if (!trainer->symbols) {
        return FAIL("out of memory for %zu bytes of different words: give a part of the text", total);
    }
    uint32_t at = 0;
    for (int i = 0; i < (int)arrlen(trainer->pieces); i++) {
        const Piece *piece = &trainer->pieces[i];
        for (size_t j = 0; j < piece->length; j++, at++) {
            trainer->symbols[at] = (Symbol){.id = (unsigned char)piece->bytes[j],
                                            .piece = i,
                                            .before = j > 0 ? at - 1 : NO_SYMBOL,
                                            .after = j + 1 < piece->length ? at + 1 : NO_SYMBOL};
        }
    }
    for (at = 0; at < (uint32_t)total; at++) {
        if (trainer->symbols[at].after != NO_SYMBOL) {
            pair_gain(trainer, at);
        }
    }
    return true;
}

/* ---- the heap: the pair to merge next is on top ---- */

/* Most frequent first, then lower ids. */
static bool comes_before(const Pair *left, const Pair *right) {
    if (left->queued != right->queued) {
        return left->queued > right->queued;
    }
    return left->a != right->a ? left->a < right->a : left->b < right->b;
}

static void heap_push(Trainer *trainer, int pair) {
    trainer->pairs[pair].queued = trainer->pairs[pair].count;
    arrput(trainer->heap, pair);
    int *heap = trainer->heap;
    size_t i = arrlenu(heap) - 1;
    for (; i > 0 && comes_before(&trainer->pairs[pair], &trainer->pairs[heap[(i - 1) / 2]]); i = (i - 1) / 2) {
        heap[i] = heap[(i - 1) / 2];
    }
    heap[i] = pair;
}

static int heap_pop(Trainer *trainer) {
    const Pair *pairs = trainer->pairs;
    int *heap = trainer->heap, top = heap[0], last = arrpop(heap);
    size_t size = arrlenu(heap), i = 0;
    for (size_t child; (child = 2 * i + 1) < size; i = child) {
        child += child + 1 < size && comes_before(&pairs[heap[child + 1]], &pairs[heap[child]]);
        if (!comes_before(&pairs[heap[child]], &pairs[last])) {
            break;
        }
        heap[i] = heap[child];
    }
    if (size > 0) {
        heap[i] = last;
    }
    return top;
}

/* Queues the pairs from `first` on that are worth a merge. */
static void queue_pairs(Trainer *trainer, int first) {
    for (int i = first; i < (int)arrlen(trainer->pairs); i++) {
        if (trainer->pairs[i].count >= LEAST_COUNT) {
            heap_push(trainer, i);
        }
    }
}

/* The most frequent pair; -1: none comes twice. */
static int next_pair(Trainer *trainer) {
    while (arrlen(trainer->heap) > 0) {
        int top = heap_pop(trainer);
        const Pair *pair = &trainer->pairs[top];
        if (pair->count == pair->queued) {
            return top;
        }
        if (pair->count >= LEAST_COUNT) {
            heap_push(trainer, top);
        }
    }
    return -1;
}

/* ---- merging ---- */

/* Makes each place of the pair one symbol, from left to right: "a a a" becomes "aa a". */
static void merge_pair(Trainer *trainer, int index) {
    int a = trainer->pairs[index].a, b = trainer->pairs[index].b;
    int made = BYTES + (int)arrlen(trainer->merges), first_made = (int)arrlen(trainer->pairs);
    uint32_t *places = trainer->pairs[index].places; /* the array of pairs moves as it grows */
    trainer->pairs[index].places = NULL;
    for (ptrdiff_t i = 0; i < arrlen(places); i++) {
        uint32_t place = places[i];
        Symbol *left = &trainer->symbols[place];
        if (left->id != a || left->after == NO_SYMBOL || trainer->symbols[left->after].id != b) {
            continue; /* another merge has taken a symbol of it */
        }
        Symbol *right = &trainer->symbols[left->after];
        if (left->before != NO_SYMBOL) {
            pair_lose(trainer, left->before);
        }
        if (right->after != NO_SYMBOL) {
            pair_lose(trainer, left->after);
            trainer->symbols[right->after].before = place;
        }
        left->after = right->after;
        left->id = made;
        right->id = SWALLOWED;
        if (left->before != NO_SYMBOL) {
            pair_gain(trainer, left->before);
        }
        if (left->after != NO_SYMBOL) {
            pair_gain(trainer, place);
        }
    }
    trainer->pairs[index].count = 0;
    arrfree(places);
    arrput(trainer->merges, ((Merge){a, b}));
    queue_pairs(trainer, first_made);
}

static void merge_pairs(Trainer *trainer, const BpeOptions *options) {
    int wanted = options->vocab - LEAST_VOCAB;
    queue_pairs(trainer, 0);
    while ((int)arrlen(trainer->merges) < wanted) {
        int pair = next_pair(trainer);
        if (pair < 0) {
            break;
        }
        merge_pair(trainer, pair);
        if (options->progress && arrlen(trainer->merges) % PROGRESS_EVERY == 0) {
            options->progress(LEAST_VOCAB + (int)arrlen(trainer->merges), options->vocab, options->user);
        }
    }
    if (options->progress) {
        options->progress(LEAST_VOCAB + (int)arrlen(trainer->merges), options->vocab, options->user);
    }
}

/* ---- tokenizer.json ---- */

static bool spell_tokens(Trainer *trainer) {
    int tokens = BYTES + (int)arrlen(trainer->merges);
    trainer->texts = calloc((size_t)tokens, sizeof *trainer->texts);
    for (int id = 0; trainer->texts && id < tokens; id++) {
        const Merge *merge = id < BYTES ? NULL : &trainer->merges[id - BYTES];
        const char *left = merge ? trainer->texts[merge->a] : byte_character((unsigned char)id);
        const char *right = merge ? trainer->texts[merge->b] : "";
        size_t bytes = strlen(left) + strlen(right) + 1;
        char *text = malloc(bytes);
        if (!text) {
            return false;
        }
        snprintf(text, bytes, "%s%s", left, right);
        trainer->texts[id] = text;
    }
    return trainer->texts != NULL;
}

static void write_string(FILE *out, const char *text) {
    putc('"', out);
    for (const char *c = text; *c; c++) {
        if ((unsigned char)*c < ' ') {
            fprintf(out, "\\u%04x", *c);
        } else {
            fprintf(out, *c == '"' || *c == '\\' ? "\\%c" : "%c", *c);
        }
    }
    putc('"', out);
}

static void write_pretokenizer(FILE *out, const char *pattern) {
    bool gpt2 = strcmp(pattern, PATTERN_GPT2) == 0; /* ByteLevel's own */
    if (!gpt2) {
        fprintf(out,
                "{\n    \"type\": \"Sequence\",\n    \"pretokenizers\": [\n"
                "      {\"type\": \"Split\", \"pattern\": {\"Regex\": ");
        write_string(out, pattern);
        fprintf(out, "}, \"behavior\": \"Isolated\", \"invert\": false},\n      ");
    }
    fprintf(out, "{\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"trim_offsets\": true, \"use_regex\": %s}%s",
            gpt2 ? "true" : "false", gpt2 ? "" : "\n    ]\n  }");
}

/* Whether all of it was written. */
static bool write_json(FILE *out, const Trainer *trainer, const char *pattern, const char *end_of_text) {
    int merges = (int)arrlen(trainer->merges), last = BYTES + merges;
    fprintf(out, "{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n  \"added_tokens\": [\n");
    fprintf(out, "    {\"id\": %d, \"content\": ", last);
    write_string(out, end_of_text);
    fprintf(out,
            ", \"single_word\": false, \"lstrip\": false, \"rstrip\": false, \"normalized\": false, "
            "\"special\": true}\n  ],\n  \"normalizer\": null,\n  \"pre_tokenizer\": ");
    write_pretokenizer(out, pattern);
    fprintf(out,
            ",\n  \"post_processor\": null,\n  \"decoder\": {\"type\": \"ByteLevel\", \"add_prefix_space\": true, "
            "\"trim_offsets\": true, \"use_regex\": true},\n  \"model\": {\n    \"type\": \"BPE\",\n"
            "    \"dropout\": null,\n    \"unk_token\": null,\n    \"continuing_subword_prefix\": null,\n"
            "    \"end_of_word_suffix\": null,\n    \"fuse_unk\": false,\n    \"byte_fallback\": false,\n"
            "    \"ignore_merges\": false,\n    \"vocab\": {\n");
    for (int id = 0; id <= last; id++) {
        fprintf(out, "      ");
        write_string(out, id < last ? trainer->texts[id] : end_of_text);
        fprintf(out, ": %d%s\n", id, id < last ? "," : "");
    }
    fprintf(out, "    },\n    \"merges\": [\n");
    for (int i = 0; i < merges; i++) {
        fprintf(out, "      [");
        write_string(out, trainer->texts[trainer->merges[i].a]);
        fprintf(out, ", ");
        write_string(out, trainer->texts[trainer->merges[i].b]);
        fprintf(out, "]%s\n", i + 1 < merges ? "," : "");
    }
    fprintf(out, "    ]\n  }\n}\n");
    return !ferror(out);
}

static char *make_json(const Trainer *trainer, const char *pattern, const char *end_of_text, size_t *json_bytes) {
    char *json = NULL;
    size_t bytes = 0;
    FILE *out = open_memstream(&json, &bytes);
    if (!out) {
        return NULL;
    }
    bool written = write_json(out, trainer, pattern, end_of_text);
    written = fclose(out) == 0 && written;
    if (!written) {
        free(json);
        return NULL;
    }
    *json_bytes = bytes;
    return json;
}

/* ---- all of it ---- */

static bool is_utf8(const char *text) {
    return utf8proc_decompose((const utf8proc_uint8_t *)text, 0, NULL, 0, UTF8PROC_NULLTERM) >= 0;
}

/* One word for two tokens would leave the tokenizer.json without one of them. */
static bool check_end_of_text(const Trainer *trainer, const char *end_of_text, char *error, size_t error_size) {
    for (ptrdiff_t id = 0; id < BYTES + arrlen(trainer->merges); id++) {
        if (strcmp(trainer->texts[id], end_of_text) == 0) {
            return FAIL("the end-of-text token '%s' is token %td of the text, too: choose a longer one", end_of_text,
                        id);
        }
    }
    return true;
}

static bool train(Trainer *trainer, const Pretokenizer *pretokenizer, const char *text, size_t bytes,
                  const BpeOptions *options, const char *end_of_text, char *error, size_t error_size) {
    Scan *scan = scan_open(pretokenizer);
    if (!scan) {
        return FAIL("out of memory to read the text");
    }
    bool counted = count_pieces(trainer, scan, text, bytes, end_of_text);
    scan_close(scan);
    if (!counted) {
        return FAIL("the text has more than 2^31 different words: give a part of it");
    }
    if (!make_symbols(trainer, error, error_size)) {
        return false;
    }
    merge_pairs(trainer, options);
    if (!spell_tokens(trainer)) {
        return FAIL("out of memory for %td tokens", LEAST_VOCAB + arrlen(trainer->merges));
    }
    return check_end_of_text(trainer, end_of_text, error, error_size);
}

char *bpe_train(const char *text, size_t bytes, const BpeOptions *options, size_t *json_bytes, char *error,
                size_t error_size) {
    const char *pattern = options->pattern ? options->pattern : PATTERN_GPT2;
    const char *end_of_text = options->end_of_text ? options->end_of_text : "<|endoftext|>";
    if (options->vocab < LEAST_VOCAB) {
        (void)FAIL("a vocabulary of %d is too small: the 256 bytes and the end-of-text token take %d", options->vocab,
                   LEAST_VOCAB);
        return NULL;
    }
    if (!*end_of_text || !is_utf8(end_of_text)) {
        (void)FAIL("the end-of-text token is %s", *end_of_text ? "not UTF-8" : "empty: give it some characters");
        return NULL;
    }
    Pretokenizer *pretokenizer = pretokenizer_open(&pattern, 1, error, error_size);
    if (!pretokenizer) {
        return NULL;
    }
    Trainer trainer = {0};
    char *json = NULL;
    if (train(&trainer, pretokenizer, text, bytes, options, end_of_text, error, error_size)) {
        json = make_json(&trainer, pattern, end_of_text, json_bytes);
        if (!json) {
            (void)FAIL("out of memory for a tokenizer.json of %td tokens", LEAST_VOCAB + arrlen(trainer.merges));
        }
    }
    trainer_free(&trainer);
    pretokenizer_close(pretokenizer);
    return json;
}
