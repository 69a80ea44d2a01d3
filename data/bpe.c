/* Two ways to the same result: a short piece is searched from end to end for its best pair before each merge; in a long
 * one, where that would take quadratic time, a heap holds the pairs by (rank, place), and entries that a merge beside
 * them has made wrong are thrown away when they come up.
 *
 * Called by tokenizer.c. Read next: tokenizer_encode.c. */
#include "bpe.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

enum { SHORT_PIECE = 48, WORK = 2 };

static const uint64_t EMPTY = UINT64_MAX;

/* ---- the table of merges ---- */

static uint64_t pair_key(int left, int right) {
    return (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
}

/* Where the pair stands, or the free place for it. */
static size_t find_slot(const Merges *merges, uint64_t key) {
    uint64_t hash = key * UINT64_C(0x9e3779b97f4a7c15); /* 2^64 over the golden ratio (Knuth) */
    size_t slot = (size_t)(hash >> 20) & (merges->slots - 1);
    while (merges->keys[slot] != key && merges->keys[slot] != EMPTY) {
        slot = (slot + 1) & (merges->slots - 1);
    }
    return slot;
}

bool merges_build(Merges *merges, Merge *list, int count) {
    *merges = (Merges){.merges = list, .count = count, .slots = 16};
    while (merges->slots < 2 * (size_t)count) {
        merges->slots *= 2;
    }
    merges->keys = malloc(merges->slots * sizeof *merges->keys);
    merges->ranks = malloc(merges->slots * sizeof *merges->ranks);
    if (!merges->keys || !merges->ranks) {
        return false;
    }
    memset(merges->keys, 0xff, merges->slots * sizeof *merges->keys);
    for (int rank = 0; rank < count; rank++) {
        size_t slot = find_slot(merges, pair_key(list[rank].left, list[rank].right));
        merges->keys[slot] = pair_key(list[rank].left, list[rank].right);
        merges->ranks[slot] = rank;
    }
    return true;
}

void merges_free(Merges *merges) {
    free(merges->merges);
    free(merges->keys);
    free(merges->ranks);
    *merges = (Merges){0};
}

int merges_rank(const Merges *merges, int left, int right) {
    size_t slot = find_slot(merges, pair_key(left, right));
    return merges->keys[slot] == EMPTY ? INT_MAX : merges->ranks[slot];
}

/* ---- pieces ---- */

bool piece_reserve(Piece *piece, size_t bytes) {
    if (bytes <= piece->capacity) {
        return true;
    }
    size_t capacity = bytes < 256 ? 256 : bytes;
    if (capacity > INT_MAX / WORK) {
        return false;
    }
    piece_free(piece);
    piece->ids = malloc(capacity * sizeof(int));
    piece->work = malloc(WORK * capacity * sizeof(int));
    piece->capacity = piece->ids && piece->work ? capacity : 0;
    return piece->capacity > 0;
}

void piece_free(Piece *piece) {
    free(piece->ids);
    free(piece->work);
    *piece = (Piece){0};
}

/* rank[i]: of the pair (i, i + 1). */
static void merge_short(Piece *piece, const Merges *merges) {
    int *ids = piece->ids, *rank = piece->work, count = piece->count;
    for (int i = 0; i + 1 < count; i++) {
        rank[i] = merges_rank(merges, ids[i], ids[i + 1]);
    }
    while (count > 1) {
        int best = 0;
        for (int i = 1; i + 1 < count; i++) {
            best = rank[i] < rank[best] ? i : best;
        }
        if (rank[best] == INT_MAX) {
            break;
        }
        ids[best] = merges->merges[rank[best]].result;
        count--;
        memmove(ids + best + 1, ids + best + 2, sizeof(int) * (size_t)(count - best - 1));
        memmove(rank + best, rank + best + 1, sizeof(int) * (size_t)(count - best - 1));
        if (best > 0) {
            rank[best - 1] = merges_rank(merges, ids[best - 1], ids[best]);
        }
        if (best + 1 < count) {
            rank[best] = merges_rank(merges, ids[best], ids[best + 1]);
        }
    }
    piece->count = count;
}

/* A pair that starts at symbol `at`, and its rank when it was put in. */
typedef struct {
    int rank, at;
} Entry;

static bool entry_before(Entry a, Entry b) {
    return a.rank != b.rank ? a.rank < b.rank : a.at < b.at;
}

static void heap_push(Entry *heap, int *size, Entry entry) {
    int i = (*size)++;
    for (; i > 0 && entry_before(entry, heap[(i - 1) / 2]); i = (i - 1) / 2) {
        heap[i] = heap[(i - 1) / 2];
    }
    heap[i] = entry;
}

static Entry heap_pop(Entry *heap, int *size) {
    Entry top = heap[0], last = heap[--*size];
    int i = 0;
    for (int child = 1; child < *size; child = 2 * i + 1) {
        child += child + 1 < *size && entry_before(heap[child + 1], heap[child]);
        if (!entry_before(heap[child], last)) {
            break;
        }
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = last;
    return top;
}

/* Puts in the pair that starts at symbol `at` (-1: none), when it has a merge. */
static void push_pair(Entry *heap, int *size, const Piece *piece, const Merges *merges, const int *after, int at) {
    int rank = at >= 0 && after[at] >= 0 ? merges_rank(merges, piece->ids[at], piece->ids[after[at]]) : INT_MAX;
    if (rank != INT_MAX) {
        heap_push(heap, size, (Entry){rank, at});
    }
}

/* Symbols form a chain: before[i], after[i], -1 at its ends; one that was swallowed has id -1. */
static bool merge_long(Piece *piece, const Merges *merges) {
    int *ids = piece->ids, count = piece->count, size = 0;
    int *before = piece->work, *after = before + count;
    /* At first count - 1 pairs; each of at most count - 1 merges takes one out and puts in two. */
    Entry *heap = malloc(2 * (size_t)count * sizeof *heap);
    if (!heap) {
        return false;
    }
    for (int i = 0; i < count; i++) {
        before[i] = i - 1;
        after[i] = i + 1 < count ? i + 1 : -1;
    }
    for (int i = 0; i + 1 < count; i++) {
        push_pair(heap, &size, piece, merges, after, i);
    }
    while (size > 0) {
        Entry entry = heap_pop(heap, &size);
        int at = entry.at, next = ids[at] < 0 ? -1 : after[at];
        if (next < 0 || merges_rank(merges, ids[at], ids[next]) != entry.rank) {
            continue;
        }
        ids[at] = merges->merges[entry.rank].result;
        ids[next] = -1;
        after[at] = after[next];
        if (after[at] >= 0) {
            before[after[at]] = at;
        }
        push_pair(heap, &size, piece, merges, after, before[at]);
        push_pair(heap, &size, piece, merges, after, at);
    }
    int left = 0;
    for (int i = 0; i < count; i++) {
        if (ids[i] >= 0) {
            ids[left++] = ids[i];
        }
    }
    piece->count = left;
    free(heap);
    return true;
}

bool piece_merge(Piece *piece, const Merges *merges) {
    if (piece->count <= SHORT_PIECE) {
        merge_short(piece, merges);
        return true;
    }
    return merge_long(piece, merges);
}
