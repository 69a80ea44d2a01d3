/* Memory and time of the device the kernels run on. On the CPU "device memory" is host memory, 64-byte aligned.
 *
 * One arena holds everything a run needs: each user reserves its arrays first, one commit allocates them all, and
 * nothing is allocated afterwards.
 *
 *     Arena arena = {0};
 *     arena_reserve(&arena, (void **)&x, N * C * sizeof(real_t), MEMORY_ACTIVATIONS);   // x is set by the commit
 *     arena_commit(&arena);                                                             // zeroed memory
 *     arena_free(&arena);
 */
#ifndef KERNELS_DEVICE_H
#define KERNELS_DEVICE_H

#include <stddef.h>

#include "types.h"

typedef enum {
    MEMORY_WEIGHTS,
    MEMORY_GRADIENTS,
    MEMORY_OPTIMIZER,
    MEMORY_ACTIVATIONS,
    MEMORY_CACHE, /* keys and values of generation */
    MEMORY_CATEGORIES
} MemoryCategory;

typedef struct {
    void **slot;
    size_t bytes;
} ArenaRequest;

typedef struct {
    char *base;                         /* device memory, owned */
    size_t bytes;                       /* of the whole arena, padding included */
    size_t category[MEMORY_CATEGORIES]; /* bytes reserved per category */
    ArenaRequest *requests;             /* host, owned, until the commit */
    int request_count, request_capacity;
} Arena;

const char *memory_category_name(MemoryCategory category);

/* Asks for `bytes` of device memory; *slot is NULL until arena_commit sets it. The slot must stay where it is. */
void arena_reserve(Arena *arena, void **slot, size_t bytes, MemoryCategory category);

/* Allocates everything reserved, zeroed, each piece 64-byte aligned with unused bytes after it (poisoned under
 * AddressSanitizer, so that an overrun of one array into the next is found). Ends the program when memory is short,
 * naming the bytes per category. */
void arena_commit(Arena *arena);

void arena_free(Arena *arena);

/* Copies between host and device, and within the device. Device to host waits until the data is there. */
void device_from_host(void *device, const void *host, size_t bytes, Stream *stream);
void host_from_device(void *host, const void *device, size_t bytes, Stream *stream);
void device_copy(void *out, const void *in, size_t bytes, Stream *stream);
void device_zero(void *out, size_t bytes, Stream *stream);

/* One line that names the processor: "AMD EPYC (2 threads, AVX2)". */
void device_describe(char *text, size_t size);
int device_threads(void);

/* Peak resident memory of this process in bytes. */
size_t device_peak_memory(void);

/* Wall-clock seconds from an arbitrary origin. */
double seconds_now(void);

/* Stage times: profile_lap(p, STAGE_ROUTE, s) books the time since the previous lap to STAGE_ROUTE. NULL books nothing.
 */
typedef enum {
    STAGE_OTHER,
    STAGE_EMBED,
    STAGE_NORM,
    STAGE_ATTENTION,
    STAGE_ROUTE,
    STAGE_PERMUTE,
    STAGE_DISPATCH,
    STAGE_EXCHANGE,
    STAGE_EXPERTS,
    STAGE_COMBINE,
    STAGE_HEAD,
    STAGE_OPTIMIZER,
    STAGE_COUNT
} Stage;

typedef struct {
    double seconds[STAGE_COUNT];
    double last;
} Profile;

const char *stage_name(Stage stage);
void profile_start(Profile *profile, Stream *stream);
void profile_lap(Profile *profile, Stage stage, Stream *stream);

#endif
