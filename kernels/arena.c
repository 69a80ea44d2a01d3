/* What device.h promises on every device: the arena, and the names of categories and stages. The memory itself comes
 * from device.c or device.cu.
 *
 * The arena is one allocation, cut into the reserved pieces:
 *
 *     | piece 0 .. | gap | piece 1 ...... | gap | ...        each piece at a multiple of 256, each gap 64 bytes or more
 *
 * Read next: arena_commit, which decides where every array of a run lies.
 */
#include <assert.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "check.h"
#include "device.h"
#include "peers.h"

#if defined(__SANITIZE_ADDRESS__)
#define ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ADDRESS_SANITIZER 1
#endif
#endif

#ifdef ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#endif

/* 256: what a GPU's copy engine and 16-byte accesses ask for, and more than the 64 of the CPU's vectors */
enum { PIECE_ALIGNMENT = 256, PIECE_GAP = 64 };

static const char *const category_names[MEMORY_CATEGORIES] = {
    [MEMORY_WEIGHTS] = "weights",         [MEMORY_GRADIENTS] = "gradients", [MEMORY_OPTIMIZER] = "optimizer",
    [MEMORY_ACTIVATIONS] = "activations", [MEMORY_CACHE] = "cache",
};

static const char *const stage_names[STAGE_COUNT] = {
    [STAGE_OTHER] = "other",         [STAGE_EMBED] = "embed",       [STAGE_NORM] = "norm",
    [STAGE_ATTENTION] = "attention", [STAGE_ROUTE] = "route",       [STAGE_PERMUTE] = "permute",
    [STAGE_DISPATCH] = "dispatch",   [STAGE_EXCHANGE] = "exchange", [STAGE_EXPERTS] = "experts",
    [STAGE_COMBINE] = "combine",     [STAGE_HEAD] = "head",         [STAGE_OPTIMIZER] = "optimizer",
};

const char *memory_category_name(MemoryCategory category) {
    assert(category >= 0 && category < MEMORY_CATEGORIES);
    return category_names[category];
}

const char *stage_name(Stage stage) {
    assert(stage >= 0 && stage < STAGE_COUNT);
    return stage_names[stage];
}

double seconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* ---- arena ---- */

/* Bytes of the arena that a piece takes up, its gap included. */
static size_t piece_span(size_t bytes) {
    return (bytes + PIECE_ALIGNMENT - 1) / PIECE_ALIGNMENT * PIECE_ALIGNMENT + PIECE_GAP;
}

static double mebibytes(size_t bytes) {
    return (double)bytes / (1 << 20);
}

static void die_of_memory_shortage(const Arena *arena) {
    char parts[256];
    size_t used = 0;
    for (int i = 0; i < MEMORY_CATEGORIES; i++) {
        used += (size_t)snprintf(parts + used, sizeof parts - used, "%s%s %.0f", i ? ", " : "", category_names[i],
                                 mebibytes(arena->category[i]));
    }
    die(__FILE__, __LINE__,
        "out of memory: the run needs %.0f MiB (%s), and %.0f MiB are free: lower --batch or --seq, raise "
        "--grad-accum, "
        "take --recompute experts or shrink the model",
        mebibytes(arena->bytes), parts, mebibytes(device_memory_free()));
}

void arena_reserve(Arena *arena, void **slot, size_t bytes, MemoryCategory category) {
    assert(arena->base == NULL && "reserve before the commit");
    if (arena->request_count == arena->request_capacity) {
        int capacity = arena->request_capacity ? 2 * arena->request_capacity : 64;
        ArenaRequest *grown = realloc(arena->requests, (size_t)capacity * sizeof *grown);
        CHECK(grown, "out of memory while planning the run: free some memory and start again");
        arena->requests = grown;
        arena->request_capacity = capacity;
    }
    *slot = NULL;
    arena->requests[arena->request_count++] = (ArenaRequest){slot, bytes};
    arena->category[category] += bytes;
    /* A size that overflowed stays at the largest there is, which no machine has: the commit reports it. */
    size_t span = bytes > SIZE_MAX / 2 ? SIZE_MAX / 2 : piece_span(bytes);
    arena->bytes = arena->bytes > SIZE_MAX / 2 - span ? SIZE_MAX / 2 : arena->bytes + span;
}

/* What is allocated: something even where nothing was reserved. */
static size_t arena_bytes(const Arena *arena) {
    return arena->bytes ? arena->bytes : PIECE_ALIGNMENT;
}

void arena_commit(Arena *arena) {
    assert(arena->base == NULL && "one commit per arena");
    arena->base = arena->shared ? peers_allocate(arena_bytes(arena)) : device_allocate(arena_bytes(arena));
    if (!arena->base) {
        die_of_memory_shortage(arena);
    }
    char *piece = arena->base;
    for (int i = 0; i < arena->request_count; i++) {
        const ArenaRequest *request = &arena->requests[i];
        size_t span = piece_span(request->bytes);
        *request->slot = piece;
        ASAN_POISON_MEMORY_REGION(piece + request->bytes, span - request->bytes);
        piece += span;
    }
    free(arena->requests);
    arena->requests = NULL;
    arena->request_count = arena->request_capacity = 0;
}

void arena_free(Arena *arena) {
    if (arena->base) {
        ASAN_UNPOISON_MEMORY_REGION(arena->base, arena->bytes);
    }
    if (arena->shared) {
        peers_release(arena->base, arena_bytes(arena));
    } else {
        device_release(arena->base, arena_bytes(arena));
    }
    free(arena->requests);
    *arena = (Arena){0};
}
