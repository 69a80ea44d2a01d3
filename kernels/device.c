/* Memory and time on the CPU: device memory is host memory, so copies are memcpy and every stream is done at once.
 *
 * The arena is one allocation, cut into the reserved pieces:
 *
 *     | piece 0 .. | gap | piece 1 ...... | gap | ...        each piece at a multiple of 64, each gap 64 bytes or more
 *
 * Read next: arena_commit, which decides where every array of a run lies.
 */
#include "device.h"

#include <assert.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "check.h"

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

enum { PIECE_ALIGNMENT = 64, PIECE_GAP = 64 };

static const size_t huge_page = (size_t)2 << 20;

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
    CHECK(false,
          "out of memory: the run needs %.0f MiB (%s): lower --batch or --seq, raise --grad-accum or shrink the model",
          mebibytes(arena->bytes), parts);
}

/* Linux promises more memory than there is and ends the program at the first touch, so its promise is no answer. */
static bool exceeds_machine(size_t bytes) {
    long pages = sysconf(_SC_PHYS_PAGES);
    long page = sysconf(_SC_PAGESIZE);
    return pages > 0 && page > 0 && bytes / (size_t)page >= (size_t)pages;
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

void arena_commit(Arena *arena) {
    assert(arena->base == NULL && "one commit per arena");
    size_t bytes = arena->bytes ? arena->bytes : PIECE_ALIGNMENT;
    void *base = NULL;
    size_t alignment = bytes >= huge_page ? huge_page : PIECE_ALIGNMENT;
    if (exceeds_machine(bytes) || posix_memalign(&base, alignment, bytes) != 0) {
        die_of_memory_shortage(arena);
    }
#ifdef MADV_HUGEPAGE
    if (bytes >= huge_page) {
        madvise(base, bytes, MADV_HUGEPAGE); /* fewer TLB misses; without it the run is only slower */
    }
#endif
    memset(base, 0, bytes);
    arena->base = base;
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
    free(arena->base);
    free(arena->requests);
    *arena = (Arena){0};
}

/* ---- copies ---- */

void device_from_host(void *device, const void *host, size_t bytes, Stream *stream) {
    memcpy(device, host, bytes);
}

void host_from_device(void *host, const void *device, size_t bytes, Stream *stream) {
    memcpy(host, device, bytes);
}

void device_copy(void *out, const void *in, size_t bytes, Stream *stream) {
    memcpy(out, in, bytes);
}

void device_zero(void *out, size_t bytes, Stream *stream) {
    enum { CHUNK = 1 << 20 };
#pragma omp parallel for if (bytes > CHUNK)
    for (size_t first = 0; first < bytes; first += CHUNK) {
        memset((char *)out + first, 0, bytes - first < CHUNK ? bytes - first : CHUNK);
    }
}

/* ---- the machine ---- */

/* The instruction set this program was built for, which is what its kernels use. */
static const char *instruction_set(void) {
#if defined(__AVX512F__)
    return "AVX-512";
#elif defined(__AVX2__)
    return "AVX2";
#elif defined(__ARM_NEON)
    return "NEON";
#elif defined(__SSE2__)
    return "SSE2";
#else
    return "no vector instructions";
#endif
}

/* "AMD EPYC" from the line "model name : AMD EPYC" of /proc/cpuinfo; arm64 kernels print no such line. */
static void processor_name(char *name, size_t size) {
#if defined(__aarch64__)
    snprintf(name, size, "arm64 processor");
#else
    snprintf(name, size, "unknown processor");
#endif
    FILE *file = fopen("/proc/cpuinfo", "r");
    if (!file) {
        return;
    }
    char line[256];
    while (fgets(line, sizeof line, file)) {
        char *value = strchr(line, ':');
        if (strncmp(line, "model name", 10) == 0 && value) {
            value += 1 + strspn(value + 1, " \t");
            value[strcspn(value, "\n")] = '\0';
            snprintf(name, size, "%s", value);
            break;
        }
    }
    fclose(file);
}

void device_describe(char *text, size_t size) {
    char name[192];
    int threads = device_threads();
    processor_name(name, sizeof name);
    snprintf(text, size, "%s (%d thread%s, %s)", name, threads, threads == 1 ? "" : "s", instruction_set());
}

int device_threads(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

size_t device_peak_memory(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
    return (size_t)usage.ru_maxrss; /* bytes there, KiB elsewhere */
#else
    return (size_t)usage.ru_maxrss * 1024;
#endif
}

/* ---- time ---- */

double seconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

const char *stage_name(Stage stage) {
    assert(stage >= 0 && stage < STAGE_COUNT);
    return stage_names[stage];
}

void profile_start(Profile *profile, Stream *stream) {
    if (profile) {
        profile->last = seconds_now();
    }
}

void profile_lap(Profile *profile, Stage stage, Stream *stream) {
    if (profile) {
        double now = seconds_now();
        profile->seconds[stage] += now - profile->last;
        profile->last = now;
    }
}
