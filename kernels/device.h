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

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "types.h"

/* Chooses the index-th device of this machine, before anything else is asked of it, for one of `sharers` processes on
 * it: each has a device of its own, or on the CPU its share of the cores (unless OMP_NUM_THREADS says how many). Ends
 * the program with one line when there is none that the program can use. */
void device_open(int index, int sharers);

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
    bool shared; /* whether other ranks may open it (peers.h); before the commit */
} Arena;

const char *memory_category_name(MemoryCategory category);

/* Zeroed device memory, NULL when there is not as much; for the arena. */
void *device_allocate(size_t bytes);
void device_release(void *memory, size_t bytes);
size_t device_memory_free(void);

/* Asks for `bytes` of device memory; *slot is NULL until arena_commit sets it. The slot must stay where it is. */
void arena_reserve(Arena *arena, void **slot, size_t bytes, MemoryCategory category);

/* Allocates everything reserved, zeroed, each piece 256-byte aligned with unused bytes after it (poisoned under
 * AddressSanitizer, so that an overrun of one array into the next is found). Ends the program when memory is short,
 * naming the bytes per category. */
void arena_commit(Arena *arena);

void arena_free(Arena *arena);

/* Copies between host and device, and within the device. From the host: `host` may be reused when the call returns, the
 * copy takes its turn in the stream. To the host: waits until the data is there. */
void device_from_host(void *device, const void *host, size_t bytes, Stream *stream);
void host_from_device(void *host, const void *device, size_t bytes, Stream *stream);
void device_copy(void *out, const void *in, size_t bytes, Stream *stream);
void device_zero(void *out, size_t bytes, Stream *stream);

/* Whether calls return before their work is done, so that asking for a result means to wait. */
bool device_runs_ahead(void);

/* Kinds of kernels: for any shape, card and number type; for the matrix units since Ampere; for those of Hopper. */
typedef enum { PATH_PLAIN, PATH_MMA, PATH_WGMMA } KernelPath;

/* For tests and measurements: the fastest kind that an operation which has several may take from here on. Where it does
 * not suit a shape or the card, the next slower one is taken. false: the build has none of that kind. */
bool device_use_path(KernelPath path);

/* A second stream, for what should run beside the first. Nothing of it waits for the other but where it is told to:
 * `later`, what is queued there from here on, for all that is queued in `earlier` by now; or for a mark in a stream. On
 * the CPU everything is done at once, and there are no marks (NULL). */
typedef struct StreamMark StreamMark;
Stream *device_second_stream(void);
void stream_follow(Stream *later, Stream *earlier);
StreamMark *stream_mark_open(void);
void stream_mark_close(StreamMark *mark);
void stream_mark(StreamMark *mark, Stream *stream);
void stream_wait(Stream *stream, StreamMark *mark);

/* Waits until everything queued is done. */
void device_wait(Stream *stream);

/* How often the host has waited for the device so far, or copied from it: what --trace-syncs counts. */
int64_t device_waits(void);

/* Copies to the host that nobody waits for: queued behind the work that makes the data, read when the device has long
 * gone on to other work.
 *
 *     readback_add(&r, model->step_loss, sizeof loss, s);  ..  readback_queued(&r, s);       more work is queued
 *     readback_wait(&r);                                       r.host holds the pieces one after the other
 */
typedef struct {
    char *host; /* owned; valid after readback_wait until the next readback_add */
    size_t bytes, capacity;
    void *event;
} Readback;

void readback_reserve(Readback *readback, size_t bytes);
void readback_free(Readback *readback);
void readback_add(Readback *readback, const void *device, size_t bytes, Stream *stream);
void readback_queued(Readback *readback, Stream *stream);
void readback_wait(Readback *readback);

/* Work that is the same in every step, recorded once and queued again as a whole (a CUDA graph). The arguments of the
 * recorded calls are fixed: what changes from step to step has to lie in device memory. Where nothing can be recorded
 * (on the CPU) the work is queued call by call each time, with the same bits.
 *
 *     if (!recording_replay(&r, s)) { recording_begin(&r, s);  ..the calls..  recording_end(&r, s); }
 */
typedef struct {
    int runs;    /* the first run is never recorded: libraries set themselves up and scratch memory grows */
    bool active; /* between begin and end, while recording */
    void *graph; /* what replay queues; NULL: nothing yet */
} Recording;

bool recording_replay(Recording *recording, Stream *stream);
void recording_begin(Recording *recording, Stream *stream);
void recording_end(Recording *recording, Stream *stream);
void recording_free(Recording *recording);

/* One line that names the processor: "AMD EPYC (2 threads, AVX2)". */
void device_describe(char *text, size_t size);
int device_threads(void);

/* Peak memory in bytes: resident memory of this process on the CPU, what was allocated on a GPU. */
size_t device_peak_memory(void);

/* Floating-point operations per second that the matrix units reach by their data sheet; 0 where that is not known. */
double device_peak_flops(void);

/* How many logits should be in memory at once: enough rows that the head's product runs at full speed. */
size_t device_logits_at_once(void);

/* Wall-clock seconds from an arbitrary origin. */
double seconds_now(void);

/* Stage times: profile_stage(p, STAGE_ROUTE, s) says that what is queued from here on is routing, until another stage
 * begins. NULL books nothing. On a GPU the stages are also NVTX ranges under their names, for Nsight.
 *
 *     profile_start(p, s);  ..other..  profile_stage(p, STAGE_HEAD, s);  ..the head..  profile_stop(p, s);
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
    Stage stage; /* the one that is running */
    void *laps;  /* on a GPU: laps whose time is not known yet */
} Profile;

const char *stage_name(Stage stage);
void profile_start(Profile *profile, Stream *stream);
void profile_stage(Profile *profile, Stage stage, Stream *stream);
void profile_stop(Profile *profile, Stream *stream);

/* Books the laps that are still under way; before `seconds` is read. */
void profile_finish(Profile *profile);
void profile_free(Profile *profile);

#endif
