/* Memory and time on a GPU. One stream carries all the work of a program, in order, but for what moves between ranks
 * beside it on a second one; the host runs ahead of them and waits only where it reads results (counted by
 * device_waits).
 *
 * device_from_host does not wait either: data is copied into a ring of page-locked buffers, whose parts are used again
 * when the copies from them are long done. host_from_device goes through a buffer of that kind as well, for a copy to
 * other memory waits in CUDA, and every wait here must see a rank that is gone (wait_for).
 *
 * The static variables are the device's own state, of which a process has one. Called by everything; read next:
 * arena.c, cuda.cuh.
 */
#include "cuda.cuh"

#include <nvtx3/nvToolsExt.h>
#include <unistd.h>

extern "C" {
#include "comm_parts.h"
}

enum { RING_PARTS = 4, LAPS = 4096 };

static const size_t ring_part_bytes = (size_t)4 << 20;

static cudaStream_t the_stream = NULL, second_stream = NULL;
static cudaDeviceProp properties;
static int64_t waits = 0;
static size_t allocated = 0, most_allocated = 0;

static struct {
    char *memory;                   /* RING_PARTS parts, page-locked */
    cudaEvent_t copied[RING_PARTS]; /* the last copy from the part */
    int part;
    size_t used; /* bytes of the current part */
} ring;

static char *landing;      /* one part more: where data arrives on the host */
static cudaEvent_t queued; /* the last piece of work when the host, or another stream, began to wait */

void device_open(int index, int sharers) {
    if (the_stream) {
        return;
    }
    int count = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    CHECK(error != cudaErrorInsufficientDriver,
          "the NVIDIA driver is too old for this program (built with CUDA %d.%d): update it, or use ./train on the CPU",
          CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    CHECK(error == cudaSuccess && count > 0, "no GPU was found (%s): use ./train on the CPU",
          cudaGetErrorString(error));
    CHECK(sharers <= count,
          "%d ranks were started on this machine, and they see %d GPU%s: start no more ranks on it than it has GPUs",
          sharers, count, count == 1 ? "" : "s");
    CUDA_CHECK(cudaGetDeviceProperties(&properties, index));
    CHECK(properties.major >= 8, "%s has compute capability %d.%d, and this program needs 8.0 (Ampere) or later",
          properties.name, properties.major, properties.minor);
    CUDA_CHECK(cudaSetDevice(index));
    CUDA_CHECK(cudaStreamCreateWithFlags(&the_stream, cudaStreamNonBlocking));
    CUDA_CHECK(cudaStreamCreateWithFlags(&second_stream, cudaStreamNonBlocking));
    CUDA_CHECK(cudaHostAlloc((void **)&ring.memory, (RING_PARTS + 1) * ring_part_bytes, cudaHostAllocDefault));
    landing = ring.memory + RING_PARTS * ring_part_bytes;
    CUDA_CHECK(cudaEventCreateWithFlags(&queued, cudaEventDisableTiming));
    for (int i = 0; i < RING_PARTS; i++) {
        CUDA_CHECK(cudaEventCreateWithFlags(&ring.copied[i], cudaEventDisableTiming));
    }
}

cudaStream_t cuda_stream(Stream *stream) {
    if (!the_stream) {
        device_open(0, 1);
    }
    return stream ? (cudaStream_t)stream : the_stream;
}

int cuda_multiprocessors(void) {
    cuda_stream(NULL);
    return properties.multiProcessorCount;
}

size_t cuda_shared_memory(void) {
    cuda_stream(NULL);
    return properties.sharedMemPerMultiprocessor;
}

int cuda_capability(void) {
    cuda_stream(NULL);
    return 10 * properties.major + properties.minor;
}

/* ---- memory ---- */

size_t device_memory_free(void) {
    size_t free_bytes = 0, total = 0;
    cuda_stream(NULL);
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total));
    return free_bytes;
}

void *device_allocate(size_t bytes) {
    void *memory = NULL;
    cuda_stream(NULL);
    if (bytes >= device_memory_free() || cudaMalloc(&memory, bytes) != cudaSuccess) {
        cudaGetLastError(); /* the caller says what was short */
        return NULL;
    }
    CUDA_CHECK(cudaMemsetAsync(memory, 0, bytes, the_stream));
    allocated += bytes;
    most_allocated = allocated > most_allocated ? allocated : most_allocated;
    return memory;
}

void device_release(void *memory, size_t bytes) {
    CUDA_CHECK(cudaFree(memory));
    allocated -= memory ? bytes : 0;
}

void *cuda_workspace(size_t bytes) {
    static void *workspace = NULL;
    static size_t capacity = 0;
    if (bytes > capacity) {
        size_t grown = bytes > 2 * capacity ? bytes : 2 * capacity;
        grown = (grown + ((size_t)4 << 20)) >> 22 << 22;
        workspace = device_allocate(grown);
        if (!workspace) {
            grown = bytes;
            workspace = device_allocate(grown);
        }
        CHECK(workspace,
              "out of memory: an operation needs %zu MiB of scratch memory: lower --batch, raise --grad-accum",
              grown >> 20);
        capacity = grown;
    }
    return workspace;
}

/* ---- copies ---- */

bool device_runs_ahead(void) {
    return true;
}

/* The matrix units take bf16 alone here. */
static KernelPath fastest_path = sizeof(real_t) == 2 ? PATH_WGMMA : PATH_PLAIN;

bool device_use_path(KernelPath path) {
    if (sizeof(real_t) != 2 && path != PATH_PLAIN) {
        return false;
    }
    fastest_path = path;
    return true;
}

KernelPath cuda_fastest_path(void) {
    return fastest_path;
}

/* Where there are several ranks the event may never come, so the host asks until it loses patience. */
static void wait_for(cudaEvent_t event) {
    if (comm_ranks(GROUP_WORLD) > 1) {
        double begin = seconds_now();
        while (cudaEventQuery(event) == cudaErrorNotReady) {
            comm_check_waiting(begin);
        }
        cudaGetLastError(); /* not being ready is no error */
    }
    CUDA_CHECK(cudaEventSynchronize(event));
}

static void wait_for_queued(cudaStream_t stream) {
    CUDA_CHECK(cudaEventRecord(queued, stream));
    wait_for(queued);
}

Stream *device_second_stream(void) {
    cuda_stream(NULL);
    return (Stream *)second_stream;
}

void stream_follow(Stream *later, Stream *earlier) {
    if (cuda_stream(later) != cuda_stream(earlier)) {
        CUDA_CHECK(cudaEventRecord(queued, cuda_stream(earlier)));
        CUDA_CHECK(cudaStreamWaitEvent(cuda_stream(later), queued, 0));
    }
}

StreamMark *stream_mark_open(void) {
    cudaEvent_t event;
    cuda_stream(NULL);
    CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    return (StreamMark *)event;
}

void stream_mark_close(StreamMark *mark) {
    if (mark) {
        CUDA_CHECK(cudaEventDestroy((cudaEvent_t)mark));
    }
}

void stream_mark(StreamMark *mark, Stream *stream) {
    if (mark) {
        CUDA_CHECK(cudaEventRecord((cudaEvent_t)mark, cuda_stream(stream)));
    }
}

void stream_wait(Stream *stream, StreamMark *mark) {
    if (mark) {
        CUDA_CHECK(cudaStreamWaitEvent(cuda_stream(stream), (cudaEvent_t)mark, 0));
    }
}

void device_wait(Stream *stream) {
    waits++;
    wait_for_queued(cuda_stream(stream));
}

int64_t device_waits(void) {
    return waits;
}

/* Room for `bytes` in the current part of the ring, or at the start of the next one once that is free again. */
static char *ring_room(size_t bytes, cudaStream_t stream) {
    if (ring.used + bytes > ring_part_bytes) {
        CUDA_CHECK(cudaEventRecord(ring.copied[ring.part], stream));
        ring.part = (ring.part + 1) % RING_PARTS;
        ring.used = 0;
        if (cudaEventQuery(ring.copied[ring.part]) == cudaErrorNotReady) {
            wait_for(ring.copied[ring.part]); /* the host is far ahead: no lost time */
        }
        cudaGetLastError();
    }
    char *room = ring.memory + ring.part * ring_part_bytes + ring.used;
    ring.used += (bytes + 255) / 256 * 256;
    return room;
}

void device_from_host(void *device, const void *host, size_t bytes, Stream *stream) {
    cudaStream_t s = cuda_stream(stream);
    for (size_t first = 0; first < bytes; first += ring_part_bytes) {
        size_t count = bytes - first < ring_part_bytes ? bytes - first : ring_part_bytes;
        char *room = ring_room(count, s);
        memcpy(room, (const char *)host + first, count);
        CUDA_CHECK(cudaMemcpyAsync((char *)device + first, room, count, cudaMemcpyHostToDevice, s));
    }
}

void host_from_device(void *host, const void *device, size_t bytes, Stream *stream) {
    cudaStream_t s = cuda_stream(stream);
    waits++;
    for (size_t first = 0; first < bytes; first += ring_part_bytes) {
        size_t count = bytes - first < ring_part_bytes ? bytes - first : ring_part_bytes;
        CUDA_CHECK(cudaMemcpyAsync(landing, (const char *)device + first, count, cudaMemcpyDeviceToHost, s));
        wait_for_queued(s);
        memcpy((char *)host + first, landing, count);
    }
}

void device_copy(void *out, const void *in, size_t bytes, Stream *stream) {
    CUDA_CHECK(cudaMemcpyAsync(out, in, bytes, cudaMemcpyDeviceToDevice, cuda_stream(stream)));
}

void device_zero(void *out, size_t bytes, Stream *stream) {
    CUDA_CHECK(cudaMemsetAsync(out, 0, bytes, cuda_stream(stream)));
}

/* ---- what comes back later ---- */

void readback_reserve(Readback *readback, size_t bytes) {
    cuda_stream(NULL);
    CUDA_CHECK(cudaHostAlloc((void **)&readback->host, bytes + 1, cudaHostAllocDefault));
    cudaEvent_t event;
    CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    readback->event = event;
    readback->capacity = bytes;
    readback->bytes = 0;
}

void readback_free(Readback *readback) {
    if (readback->event) {
        CUDA_CHECK(cudaEventDestroy((cudaEvent_t)readback->event));
        CUDA_CHECK(cudaFreeHost(readback->host));
    }
    memset(readback, 0, sizeof *readback);
}

void readback_add(Readback *readback, const void *device, size_t bytes, Stream *stream) {
    CUDA_CHECK(
        cudaMemcpyAsync(readback->host + readback->bytes, device, bytes, cudaMemcpyDeviceToHost, cuda_stream(stream)));
    readback->bytes += bytes;
}

void readback_queued(Readback *readback, Stream *stream) {
    CUDA_CHECK(cudaEventRecord((cudaEvent_t)readback->event, cuda_stream(stream)));
}

void readback_wait(Readback *readback) {
    waits++;
    wait_for((cudaEvent_t)readback->event);
    readback->bytes = 0;
}

/* ---- recorded work ---- */

bool recording_replay(Recording *recording, Stream *stream) {
    if (!recording->graph) {
        return false;
    }
    CUDA_CHECK(cudaGraphLaunch((cudaGraphExec_t)recording->graph, cuda_stream(stream)));
    return true;
}

void recording_begin(Recording *recording, Stream *stream) {
    recording->active = recording->runs++ > 0;
    if (recording->active) {
        CUDA_CHECK(cudaStreamBeginCapture(cuda_stream(stream), cudaStreamCaptureModeThreadLocal));
    }
}

void recording_end(Recording *recording, Stream *stream) {
    if (!recording->active) {
        return;
    }
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    CUDA_CHECK(cudaStreamEndCapture(cuda_stream(stream), &graph));
    CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
    CUDA_CHECK(cudaGraphDestroy(graph));
    recording->active = false;
    recording->graph = executable;
    recording_replay(recording, stream);
}

void recording_free(Recording *recording) {
    if (recording->graph) {
        CUDA_CHECK(cudaGraphExecDestroy((cudaGraphExec_t)recording->graph));
    }
    memset(recording, 0, sizeof *recording);
}

/* ---- the machine ---- */

void device_describe(char *text, size_t size) {
    cuda_stream(NULL);
    snprintf(text, size, "%s (%d SMs, %.0f GiB, CUDA %d.%d, " REAL_NAME ")", properties.name,
             properties.multiProcessorCount, (double)properties.totalGlobalMem / (1 << 30), CUDART_VERSION / 1000,
             CUDART_VERSION % 1000 / 10);
}

int device_threads(void) {
    long processors = sysconf(_SC_NPROCESSORS_ONLN);
    return processors > 0 ? (int)processors : 1;
}

size_t device_peak_memory(void) {
    return most_allocated;
}

double device_peak_flops(void) {
    cuda_stream(NULL);
    if (sizeof(real_t) != 2) {
        return 0;
    }
    switch (10 * properties.major + properties.minor) {
        case 80: return 312e12; /* A100, dense bf16 */
        case 90: return 989e12; /* H100 and H200 in the SXM form */
        default: return 0;
    }
}

size_t device_logits_at_once(void) {
    return (size_t)1 << 28; /* 512 MiB of bf16: 5,000 rows of a vocabulary of 50,000 */
}

/* ---- time: an event where a stage begins, read when its profile is ---- */

typedef struct {
    cudaEvent_t event[LAPS];
    Stage stage[LAPS]; /* that begins at the event; STAGE_COUNT: none, the step is over */
    int created, count;
} Laps;

static void begin_stage(Profile *profile, Stage stage, Stream *stream) {
    Laps *laps = (Laps *)profile->laps;
    if (laps->count == laps->created) {
        CUDA_CHECK(cudaEventCreate(&laps->event[laps->created++]));
    }
    laps->stage[laps->count] = stage;
    CUDA_CHECK(cudaEventRecord(laps->event[laps->count++], cuda_stream(stream)));
    if (laps->count == LAPS) { /* the last event goes on as the first */
        profile_finish(profile);
        cudaEvent_t last = laps->event[LAPS - 1];
        laps->event[LAPS - 1] = laps->event[0];
        laps->event[0] = last;
        laps->stage[0] = stage;
        laps->count = 1;
    }
    profile->stage = stage;
    if (stage != STAGE_COUNT) {
        nvtxRangePushA(stage_name(stage));
    }
}

void profile_start(Profile *profile, Stream *stream) {
    if (!profile) {
        return;
    }
    if (!profile->laps) {
        profile->laps = calloc(1, sizeof(Laps));
        CHECK(profile->laps, "out of memory for --profile");
    }
    begin_stage(profile, STAGE_OTHER, stream);
}

void profile_stage(Profile *profile, Stage stage, Stream *stream) {
    if (profile) {
        nvtxRangePop();
        begin_stage(profile, stage, stream);
    }
}

void profile_stop(Profile *profile, Stream *stream) {
    profile_stage(profile, STAGE_COUNT, stream);
}

void profile_free(Profile *profile) {
    Laps *laps = (Laps *)profile->laps;
    for (int i = 0; laps && i < laps->created; i++) {
        CUDA_CHECK(cudaEventDestroy(laps->event[i]));
    }
    free(laps);
    profile->laps = NULL;
}

void profile_finish(Profile *profile) {
    Laps *laps = profile ? (Laps *)profile->laps : NULL;
    if (!laps || laps->count == 0) {
        return;
    }
    waits++;
    wait_for(laps->event[laps->count - 1]);
    for (int i = 0; i + 1 < laps->count; i++) {
        float ms = 0;
        CUDA_CHECK(cudaEventElapsedTime(&ms, laps->event[i], laps->event[i + 1]));
        if (laps->stage[i] != STAGE_COUNT) {
            profile->seconds[laps->stage[i]] += 1e-3 * ms;
        }
    }
    laps->count = 0;
}
