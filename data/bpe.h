/* The merges of a byte-pair tokenizer, and their application to one piece of text.
 *
 *     while some neighbours (a, b) have a merge: the one of lowest rank, of several the leftmost, becomes its result
 *
 * Sennrich et al. 2016 (arXiv 1508.07909). Called by tokenizer.c. */
#ifndef DATA_BPE_H
#define DATA_BPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct {
    int left, right, result; /* ids; the rank is the place in the list */
} Merge;

typedef struct {
    Merge *merges; /* owned, in order of rank */
    int count;
    uint64_t *keys; /* (slots) hash table of pairs: left and right; EMPTY */
    int *ranks;     /* (slots) */
    size_t slots;   /* a power of two */
} Merges;

/* Takes the list over (malloc). Of two merges of one pair the later holds, as in Hugging Face's tokenizers. False when
 * there is no memory. */
bool merges_build(Merges *merges, Merge *list, int count);
void merges_free(Merges *merges);

/* Rank of the merge of a pair; INT_MAX: there is none. */
int merges_rank(const Merges *merges, int left, int right);

/* One thread's room for pieces; zero at first. */
typedef struct {
    int *ids; /* (count) the piece, merged in place */
    int count;
    size_t capacity;
    int *work; /* (2 capacity) */
} Piece;

/* Makes room for `bytes` symbols; false when there is no memory. */
bool piece_reserve(Piece *piece, size_t bytes);
void piece_free(Piece *piece);

/* Merges piece->ids[0, count) until no merge applies; false when there is no memory. */
bool piece_merge(Piece *piece, const Merges *merges);

#endif
