/* Copies plans from the device to a trace. Called by train.c. Read next: trace.h. */
#include "recorder.h"

#include <stdlib.h>

#include "../kernels/check.h"

void recorder_open(Trace *trace, const Config *config, const Transformer *model, int64_t step) {
    const char *path = config->train.dump_routing;
    if (path[0]) {
        const Plan *plan = &model->moes[0]->plan;
        TraceShape shape = {plan->N, plan->K, plan->E, model->moe_count, model->slices, step};
        if (config->train.resume[0]) {
            trace_continue(trace, path, shape, step);
        } else {
            trace_create(trace, path, shape);
        }
    }
}

void recorder_add(Trace *trace, const Transformer *model) {
    for (int i = 0; trace->file && i < model->moe_count; i++) {
        const Plan *plan = &model->moes[i]->plan;
        int *expert = calloc((size_t)plan->N * plan->K, sizeof(int));
        CHECK(expert, "out of memory for a routing record of %d tokens", plan->N);
        host_from_device(expert, plan->expert, (size_t)plan->N * plan->K * sizeof(int), NULL);
        trace_append(trace, expert);
        free(expert);
    }
}
