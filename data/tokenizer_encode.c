/* Text to ids, on all cores.
 *
 *     text -> added tokens, and the stretches between them; these in normal form, where the tokenizer asks for it
 *          -> pieces of each stretch (pretokenizer.h)
 *          -> ids of each piece (bpe.h), remembered, since most words come again and again
 *
 * The text is cut into chunks, and each is scanned from its beginning as if a piece began there. That is a guess:
 * pieces end where they end, not where a chunk does. But what follows a boundary depends on nothing before it, so a
 * scan that began wrong is right from the first boundary on that it shares with the right one, which mostly is one of
 * the first. stitch() follows the right scan from chunk to chunk: it goes on past the end of one until it stands on a
 * boundary that the next one's scan had, too, and takes the ids from there.
 *
 * Called by corpus.c, tokenize.c and, for prompts, sample.c. Read next: bpe.c. */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "normalize.h"
#include "tokenizer.h"
#include "tokenizer_parts.h"

enum {
    CHUNK = 1 << 20,
    KNOWN_BOUNDARIES = 1024, /* of a chunk, from its beginning on, that a scan may join it at */
    LONGEST_GUESS = 1 << 16, /* bytes of a piece that is merged before it is known to be one */
    CACHE_SLOTS = 1 << 15,
    CACHE_LONGEST = 64, /* bytes of a piece that is worth remembering */
    CACHE_IDS = 1 << 20,
};

typedef struct {
    int *ids;
    size_t count, capacity;
} Ids;

static bool ids_add(Ids *list, const int *ids, size_t count) {
    if (!list->ids || list->count + count > list->capacity) {
        size_t capacity = 2 * (list->count + count) + 256;
        int *grown = realloc(list->ids, capacity * sizeof *grown);
        if (!grown) {
            return false;
        }
        list->ids = grown;
        list->capacity = capacity;
    }
    if (count > 0) {
        memcpy(list->ids + list->count, ids, count * sizeof *ids);
    }
    list->count += count;
    return true;
}

/* ---- added tokens in the text ---- */

typedef struct {
    size_t at;
    int id;
} Occurrence;

typedef struct {
    Occurrence *list; /* ascending, none reaching into the next */
    size_t count, capacity;
} Occurrences;

static bool occurrences_add(Occurrences *found, size_t at, int id) {
    if (found->count == found->capacity) {
        found->capacity = 2 * found->capacity + 64;
        Occurrence *grown = realloc(found->list, found->capacity * sizeof *grown);
        if (!grown) {
            return false;
        }
        found->list = grown;
    }
    found->list[found->count++] = (Occurrence){at, id};
    return true;
}

/* The added token of that kind that stands at text[at], of several the longest; -1: none. */
static int added_at(const Tokenizer *t, bool normalized, const char *text, size_t end, size_t at) {
    for (int i = 0; t->added_first[(unsigned char)text[at]] && i < t->added_count; i++) {
        const Token *token = &t->tokens[t->added[i]];
        if (token->normalized == normalized && token->length <= end - at &&
            memcmp(token->bytes, text + at, token->length) == 0) {
            return t->added[i];
        }
    }
    return -1;
}

/* Appends all of that kind in text[begin, end), from left to right. */
static bool find_added(const Tokenizer *t, bool normalized, const char *text, size_t begin, size_t end,
                       Occurrences *found) {
    for (size_t at = begin; t->added_count > 0 && at < end;) {
        int id = added_at(t, normalized, text, end, at);
        if (id >= 0 && !occurrences_add(found, at, id)) {
            return false;
        }
        at += id >= 0 ? t->tokens[id].length : 1;
    }
    return true;
}

/* The first one at or after `at`; found->count: none. */
static size_t next_added(const Occurrences *found, size_t at) {
    size_t low = 0, high = found->count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (found->list[middle].at < at) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

/* ---- one piece ---- */

/* A piece seen before; each place of the cache holds the last one that came there. */
typedef struct {
    const char *bytes; /* in the text; NULL: none */
    size_t length;
    size_t first; /* of its ids in the pool */
    int count;
} Remembered;

/* What one thread works with. */
typedef struct {
    const Tokenizer *t;
    const char *text;
    size_t bytes;
    const Occurrences *added;
    Scan *scan;
    Piece piece;
    Remembered *cache; /* (CACHE_SLOTS) */
    Ids pool;
    int missing;   /* a byte without a token that was met; -1: none */
    bool guessing; /* the scan began where a chunk does, maybe inside a piece */
} Worker;

static bool worker_open(Worker *w, const Tokenizer *t, const char *text, size_t bytes, const Occurrences *added) {
    *w = (Worker){.t = t, .text = text, .bytes = bytes, .added = added, .missing = -1};
    w->scan = scan_open(t->pretokenizer);
    w->cache = calloc(CACHE_SLOTS, sizeof *w->cache);
    return w->scan && w->cache;
}

static void worker_close(Worker *w) {
    scan_close(w->scan);
    piece_free(&w->piece);
    free(w->cache);
    free(w->pool.ids);
}

/* Ids of a piece into w->piece. */
static bool merge_piece(Worker *w, const char *bytes, size_t length) {
    const Tokenizer *t = w->t;
    if (!piece_reserve(&w->piece, length)) {
        return false;
    }
    w->piece.count = 0;
    int whole = t->ignore_merges ? tokenizer_find(t, bytes, length) : -1;
    if (whole >= 0) {
        w->piece.ids[w->piece.count++] = whole;
        return true;
    }
    for (size_t i = 0; i < length; i++) {
        int id = t->byte_id[(unsigned char)bytes[i]];
        if (id < 0) {
            w->missing = (unsigned char)bytes[i];
            return false;
        }
        w->piece.ids[w->piece.count++] = id;
    }
    return piece_merge(&w->piece, &t->merges);
}

static bool encode_piece(Worker *w, const char *bytes, size_t length, Ids *out) {
    Remembered *place = &w->cache[bytes_hash(bytes, length < CACHE_LONGEST ? length : 0) & (CACHE_SLOTS - 1)];
    if (place->bytes && place->length == length && memcmp(place->bytes, bytes, length) == 0) {
        return ids_add(out, w->pool.ids + place->first, (size_t)place->count);
    }
    if (!merge_piece(w, bytes, length)) {
        return false;
    }
    if (length < CACHE_LONGEST) {
        if (w->pool.count > CACHE_IDS) { /* mostly of pieces that others have pushed out */
            memset(w->cache, 0, CACHE_SLOTS * sizeof *w->cache);
            w->pool.count = 0;
        }
        *place = (Remembered){bytes, length, w->pool.count, w->piece.count};
        if (!ids_add(&w->pool, w->piece.ids, (size_t)w->piece.count)) {
            return false;
        }
    }
    return ids_add(out, w->piece.ids, (size_t)w->piece.count);
}

/* ---- one chunk ---- */

/* Where a piece or an added token begins, and how many ids stand before it. */
typedef struct {
    size_t at, ids;
} Boundary;

typedef struct {
    size_t begin, end; /* bytes of the text that begin here */
    Ids ids;
    Boundary *boundaries; /* (KNOWN_BOUNDARIES) the first ones, ascending */
    int boundary_count;
    size_t stopped; /* the boundary where the scan ended: `end` or later, unless it gave up */
    size_t kept;    /* ids up to there */
} Chunk;

/* Told of each boundary that a scan reaches; true ends the scan there. */
typedef bool Stop(void *user, size_t at, const Ids *ids);

/* Adds ids to *out, from a boundary on, until `stop` says so or the text ends; *at is where. */
static bool scan_from(Worker *w, size_t *at, Ids *out, Stop *stop, void *user) {
    size_t next = next_added(w->added, *at), start, end;
    while (!stop(user, *at, out) && *at < w->bytes) {
        size_t base = *at, limit = next < w->added->count ? w->added->list[next].at : w->bytes;
        if (base == limit) {
            int id = w->added->list[next++].id;
            if (!ids_add(out, &id, 1)) {
                return false;
            }
            *at += w->t->tokens[id].length;
            continue;
        }
        /* a stretch without added tokens is a text of its own */
        bool stopped = false;
        scan_text(w->scan, w->text + base, limit - base, 0);
        while (!stopped && scan_next(w->scan, &start, &end)) {
            bool too_long = w->guessing && end - start > LONGEST_GUESS;
            if (too_long || !encode_piece(w, w->text + base + start, end - start, out)) {
                return false;
            }
            *at = base + end;
            stopped = *at < limit && scan_at_boundary(w->scan) && stop(user, *at, out);
        }
        if (stopped) {
            break;
        }
    }
    return true;
}

static bool stop_after_chunk(void *user, size_t at, const Ids *ids) {
    Chunk *chunk = user;
    if (chunk->boundary_count < KNOWN_BOUNDARIES) {
        chunk->boundaries[chunk->boundary_count++] = (Boundary){at, ids->count};
    }
    chunk->stopped = at;
    chunk->kept = ids->count;
    return at >= chunk->end;
}

/* A guess may give up, at the last boundary: half a character may have no token, and what is left of a piece of many
 * chunks would be merged by each. The right scan goes on from there. */
static bool scan_chunk(Worker *w, Chunk *chunk) {
    size_t at = chunk->begin;
    chunk->stopped = at;
    chunk->boundaries = malloc(KNOWN_BOUNDARIES * sizeof *chunk->boundaries);
    if (!chunk->boundaries) {
        return false;
    }
    w->guessing = at > 0;
    bool good = scan_from(w, &at, &chunk->ids, stop_after_chunk, chunk);
    chunk->ids.count = chunk->kept;
    if (!good && w->guessing) {
        w->missing = -1;
    }
    return good || w->guessing;
}

/* ---- all chunks ---- */

static const Boundary *find_boundary(const Chunk *chunk, size_t at) {
    int low = 0, high = chunk->boundary_count;
    while (low < high) {
        int middle = (low + high) / 2;
        if (chunk->boundaries[middle].at < at) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < chunk->boundary_count && chunk->boundaries[low].at == at ? &chunk->boundaries[low] : NULL;
}

static bool stop_where_known(void *user, size_t at, const Ids *ids) {
    const Chunk *chunk = user;
    return at >= chunk->end || find_boundary(chunk, at);
}

static bool stop_at_end(void *user, size_t at, const Ids *ids) {
    return at >= ((const Chunk *)user)->end;
}

/* Joins the chunks' ids; `at` follows the one right scan. */
static bool stitch(Worker *w, Chunk *chunks, size_t count, Ids *out) {
    size_t at = 0;
    for (size_t c = 0; c < count; c++) {
        Chunk *chunk = &chunks[c];
        if (at >= chunk->end) { /* a piece as long as a chunk */
            continue;
        }
        if (!scan_from(w, &at, out, stop_where_known, chunk)) {
            return false;
        }
        const Boundary *shared = find_boundary(chunk, at);
        if (shared) {
            if (!ids_add(out, chunk->ids.ids + shared->ids, chunk->ids.count - shared->ids)) {
                return false;
            }
            at = chunk->stopped;
        }
        if (at < chunk->end && !scan_from(w, &at, out, stop_at_end, chunk)) {
            return false; /* its scan had given up */
        }
    }
    return true;
}

static bool encode_chunks(const Tokenizer *t, const char *text, size_t bytes, const Occurrences *added,
                          size_t chunk_bytes, Ids *out, int *missing) {
    size_t count = pretokenizer_is_local(t->pretokenizer) ? (bytes + chunk_bytes - 1) / chunk_bytes : 1;
    Chunk *chunks = calloc(count + 1, sizeof *chunks);
    bool good = chunks;
    for (size_t c = 0; good && c < count; c++) {
        chunks[c].begin = c * chunk_bytes;
        chunks[c].end = c + 1 < count ? (c + 1) * chunk_bytes : bytes;
    }
#pragma omp parallel if (count > 1)
    {
        Worker w;
        bool opened = worker_open(&w, t, text, bytes, added), all_good = opened && good;
#pragma omp for schedule(dynamic)
        for (size_t c = 0; c < count; c++) {
            all_good = all_good && scan_chunk(&w, &chunks[c]);
        }
#pragma omp critical
        {
            good = good && all_good;
            *missing = w.missing >= 0 ? w.missing : *missing;
        }
        worker_close(&w);
    }
    if (good && count == 1) {
        *out = chunks[0].ids;
        chunks[0].ids = (Ids){0};
    } else if (good) {
        Worker w;
        good = worker_open(&w, t, text, bytes, added) && stitch(&w, chunks, count, out);
        *missing = w.missing;
        worker_close(&w);
    }
    for (size_t c = 0; chunks && c < count; c++) {
        free(chunks[c].ids.ids);
        free(chunks[c].boundaries);
    }
    free(chunks);
    return good;
}

/* ---- the whole ---- */

/* Finds the added tokens: those that are looked for in the raw text, then between them, in normal form where `normal`
 * is to be made (else NULL), the others. *found counts in the text that is encoded. */
static bool find_all_added(const Tokenizer *t, const char *text, size_t bytes, Buffer *normal, Occurrences *found) {
    Occurrences raw = {0};
    bool good = find_added(t, false, text, 0, bytes, &raw);
    size_t at = 0; /* in the raw text */
    for (size_t i = 0; good && i <= raw.count; i++) {
        size_t end = i < raw.count ? raw.list[i].at : bytes, begin = normal ? normal->bytes : at;
        good = !normal || normalize(normal, text, at, end);
        good = good && find_added(t, true, normal ? normal->text : text, begin, normal ? normal->bytes : end, found);
        if (good && i < raw.count) {
            size_t length = t->tokens[raw.list[i].id].length;
            good = occurrences_add(found, normal ? normal->bytes : end, raw.list[i].id) &&
                   (!normal || buffer_add(normal, text + end, length));
            at = end + length;
        }
    }
    free(raw.list);
    return good;
}

bool tokenizer_encode_chunked(const Tokenizer *t, const char *text, size_t bytes, size_t chunk_bytes, int **ids,
                              size_t *count, char *error, size_t error_size) {
    Buffer normal = {0};
    Occurrences added = {0};
    Ids out = {0};
    int missing = -1;
    bool good = true;
    if (t->is_bytes) {
        out.ids = malloc((bytes + 1) * sizeof *out.ids);
        good = out.ids;
        for (size_t i = 0; good && i < bytes; i++) {
            out.ids[i] = (unsigned char)text[i];
        }
        out.count = bytes;
    } else {
        bool as_it_is = !t->nfc || is_ascii(text, bytes);
        good = find_all_added(t, text, bytes, as_it_is ? NULL : &normal, &added) &&
               encode_chunks(t, as_it_is ? text : normal.text, as_it_is ? bytes : normal.bytes, &added, chunk_bytes,
                             &out, &missing);
    }
    good = good && (out.ids || ids_add(&out, NULL, 0)); /* no ids are a list, too */
    free(normal.text);
    free(added.list);
    if (!good) {
        free(out.ids);
        if (missing >= 0) {
            snprintf(error, error_size, "byte 0x%02X has no token in this vocabulary: take it out of the text",
                     missing);
        } else {
            snprintf(error, error_size, "out of memory for the tokens of %zu bytes", bytes);
        }
        return false;
    }
    *ids = out.ids;
    *count = out.count;
    return true;
}

bool tokenizer_encode(const Tokenizer *t, const char *text, size_t bytes, int **ids, size_t *count, char *error,
                      size_t error_size) {
    return tokenizer_encode_chunked(t, text, bytes, CHUNK, ids, count, error, error_size);
}
