/* Reading and writing of routing traces: see trace.h for the file. Called by train.c and router_forced.c. */
#include "trace.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../kernels/check.h"

enum { HEADER = 256, MAGIC = 20261121, VERSION = 1, NONE = 65535 };

static size_t entries(const Trace *trace) {
    return (size_t)trace->shape.N * trace->shape.K;
}

static void make_record(Trace *trace) {
    trace->record = calloc(entries(trace) + 1, sizeof(uint16_t));
    CHECK(trace->record, "out of memory for a routing trace of %d tokens", trace->shape.N);
}

void trace_create(Trace *trace, const char *path, TraceShape shape) {
    *trace = (Trace){.shape = shape};
    CHECK(shape.first_step <= INT32_MAX, "--dump-routing counts at most 2^31 steps: drop it");
    int32_t header[HEADER] = {MAGIC,   VERSION,       shape.N,      shape.K,
                              shape.E, shape.routers, shape.slices, (int32_t)shape.first_step};
    trace->file = fopen(path, "wb");
    CHECK(trace->file, "cannot write --dump-routing %s (%s): choose another file", path, strerror(errno));
    CHECK(fwrite(header, sizeof header, 1, trace->file) == 1 && fflush(trace->file) == 0,
          "cannot write --dump-routing %s (%s): free some space or drop it", path, strerror(errno));
    make_record(trace);
}

void trace_append(Trace *trace, const int *expert) {
    if (trace->failed) {
        return;
    }
    for (size_t i = 0; i < entries(trace); i++) {
        trace->record[i] = expert[i] < 0 ? NONE : (uint16_t)expert[i];
    }
    if (fwrite(trace->record, sizeof(uint16_t), entries(trace), trace->file) != entries(trace)) {
        fprintf(stderr, "moelab: cannot write the routing trace (%s): training goes on without it\n", strerror(errno));
        trace->failed = true;
    }
}

/* The header of FILE, checked against the shape that this run has; the first step is the file's own. */
static TraceShape read_header(FILE *file, const char *path, TraceShape expected) {
    int32_t header[HEADER];
    CHECK(fread(header, sizeof header, 1, file) == 1 && header[0] == MAGIC && header[1] == VERSION,
          "%s is no routing trace: name a file that --dump-routing wrote", path);
    TraceShape shape = {header[2], header[3], header[4], header[5], header[6], header[7]};
    CHECK(shape.N == expected.N && shape.K == expected.K && shape.E == expected.E &&
              shape.routers == expected.routers && shape.slices == expected.slices,
          "%s records %d tokens x %d of %d experts, %d routers, %d slices; this run has %d x %d of %d, %d, %d: use the "
          "options of the recorded run",
          path, shape.N, shape.K, shape.E, shape.routers, shape.slices, expected.N, expected.K, expected.E,
          expected.routers, expected.slices);
    return shape;
}

/* Where the records of a step begin in the file. */
static long long step_offset(const TraceShape *shape, int64_t step) {
    long long record = (long long)shape->N * shape->K * (long long)sizeof(uint16_t);
    return (long long)(HEADER * sizeof(int32_t)) + (step - shape->first_step) * shape->slices * shape->routers * record;
}

void trace_continue(Trace *trace, const char *path, TraceShape shape, int64_t step) {
    FILE *file = fopen(path, "r+b");
    if (!file) {
        CHECK(errno == ENOENT, "cannot write --dump-routing %s (%s): choose another file", path, strerror(errno));
        shape.first_step = step;
        trace_create(trace, path, shape);
        return;
    }
    *trace = (Trace){.file = file, .shape = read_header(file, path, shape)};
    long long end = step_offset(&trace->shape, step);
    CHECK(step >= trace->shape.first_step && fseeko(file, 0, SEEK_END) == 0 && ftello(file) >= end,
          "--dump-routing %s does not hold the steps before %lld, with which this run goes on: name another file", path,
          (long long)step + 1);
    CHECK(ftruncate(fileno(file), end) == 0 && fseeko(file, end, SEEK_SET) == 0,
          "cannot write --dump-routing %s (%s): choose another file", path, strerror(errno));
    make_record(trace);
}

void trace_open(Trace *trace, const char *path, TraceShape expected) {
    *trace = (Trace){.file = fopen(path, "rb")};
    CHECK(
        trace->file,
        "cannot read the routing trace %s (%s): name a file that --dump-routing wrote, or use balanced, zipf:S or one",
        path, strerror(errno));
    trace->shape = read_header(trace->file, path, expected);
    make_record(trace);
}

/* Whether no token of expert (N,K) names an expert twice. */
static bool all_different(const int *expert, const TraceShape *shape) {
    for (int i = 0; i < shape->N * shape->K; i++) {
        for (int j = i - i % shape->K; j < i; j++) {
            if (expert[i] >= 0 && expert[i] == expert[j]) {
                return false;
            }
        }
    }
    return true;
}

void trace_read(Trace *trace, int *expert, int64_t step, int slice, int router) {
    const TraceShape *shape = &trace->shape;
    CHECK(step >= shape->first_step, "the routing trace begins with step %lld: a run cannot replay it from step %lld",
          (long long)shape->first_step + 1, (long long)step + 1);
    long long record = (long long)entries(trace) * (long long)sizeof(uint16_t);
    long long at = step_offset(shape, step) + ((long long)slice * shape->routers + router) * record;
    CHECK(fseeko(trace->file, at, SEEK_SET) == 0 &&
              fread(trace->record, sizeof(uint16_t), entries(trace), trace->file) == entries(trace),
          "the routing trace does not hold step %lld: record a longer run, or lower --steps", (long long)step + 1);
    for (size_t i = 0; i < entries(trace); i++) {
        expert[i] = trace->record[i] == NONE ? -1 : trace->record[i];
        CHECK(expert[i] < shape->E, "the routing trace names expert %d of %d: it is damaged, record it again",
              expert[i], shape->E);
    }
    CHECK(all_different(expert, shape),
          "the routing trace names an expert twice for a token: it is damaged, record it "
          "again");
}

void trace_close(Trace *trace) {
    if (trace->file && fclose(trace->file) != 0 && !trace->failed) {
        fprintf(stderr, "moelab: the end of the routing trace is not written (%s)\n", strerror(errno));
    }
    free(trace->record);
    *trace = (Trace){0};
}
