/* Memory and time on the CPU: device memory is host memory, so copies are memcpy, every stream is done at once, and
 * nothing is recorded. The arena is arena.c.
 */
#include "device.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "check.h"

void device_open(int index, int sharers) {
#ifdef _OPENMP
    if (sharers > 1 && !getenv("OMP_NUM_THREADS")) {
        int share = omp_get_num_procs() / sharers;
        omp_set_num_threads(share > 0 ? share : 1);
    }
#endif
}

/* ---- memory ---- */

size_t device_memory_free(void) {
    long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    return pages > 0 && page > 0 ? (size_t)pages * (size_t)page : SIZE_MAX;
}

/* Linux promises more memory than there is and ends the program at the first touch, so its promise is no answer. */
void *device_allocate(size_t bytes) {
    const size_t huge_page = (size_t)2 << 20;
    void *memory = NULL;
    if (bytes >= device_memory_free() || posix_memalign(&memory, bytes >= huge_page ? huge_page : 256, bytes) != 0) {
        return NULL;
    }
#ifdef MADV_HUGEPAGE
    if (bytes >= huge_page) {
        madvise(memory, bytes, MADV_HUGEPAGE); /* fewer TLB misses; without it the run is only slower */
    }
#endif
    memset(memory, 0, bytes);
    return memory;
}

void device_release(void *memory, size_t bytes) {
    free(memory);
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

bool device_runs_ahead(void) {
    return false;
}

bool device_use_path(KernelPath path) {
    return path == PATH_PLAIN;
}

Stream *device_second_stream(void) {
    return NULL;
}

void stream_follow(Stream *later, Stream *earlier) {
}

StreamMark *stream_mark_open(void) {
    return NULL;
}

void stream_mark_close(StreamMark *mark) {
}

void stream_mark(StreamMark *mark, Stream *stream) {
}

void stream_wait(Stream *stream, StreamMark *mark) {
}

void device_wait(Stream *stream) {
}

int64_t device_waits(void) {
    return 0;
}

/* ---- what comes back later ---- */

void readback_reserve(Readback *readback, size_t bytes) {
    readback->host = malloc(bytes + 1);
    CHECK(readback->host, "out of memory for %zu bytes of figures", bytes);
    readback->capacity = bytes;
    readback->bytes = 0;
}

void readback_free(Readback *readback) {
    free(readback->host);
    *readback = (Readback){0};
}

void readback_add(Readback *readback, const void *device, size_t bytes, Stream *stream) {
    memcpy(readback->host + readback->bytes, device, bytes);
    readback->bytes += bytes;
}

void readback_queued(Readback *readback, Stream *stream) {
}

void readback_wait(Readback *readback) {
    readback->bytes = 0;
}

/* ---- recorded work ---- */

bool recording_replay(Recording *recording, Stream *stream) {
    return false;
}

void recording_begin(Recording *recording, Stream *stream) {
}

void recording_end(Recording *recording, Stream *stream) {
}

void recording_free(Recording *recording) {
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

double device_peak_flops(void) {
    return 0;
}

size_t device_logits_at_once(void) {
    return (size_t)1 << 22; /* 16 MiB, about what the last cache level holds */
}

/* ---- time ---- */

void profile_start(Profile *profile, Stream *stream) {
    if (profile) {
        profile->stage = STAGE_OTHER;
        profile->last = seconds_now();
    }
}

void profile_stage(Profile *profile, Stage stage, Stream *stream) {
    if (profile) {
        double now = seconds_now();
        profile->seconds[profile->stage] += now - profile->last;
        profile->last = now;
        profile->stage = stage;
    }
}

void profile_stop(Profile *profile, Stream *stream) {
    profile_stage(profile, STAGE_OTHER, stream);
}

void profile_finish(Profile *profile) {
}

void profile_free(Profile *profile) {
}
