/* Sums over validation batches, their means, and the log's evaluation line. The text is read by train.c, which calls
 * this. */
#include "evaluate.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"
#include "balance.h"

static void *allocate(size_t count, size_t size) {
    void *memory = calloc(count > 0 ? count : 1, size);
    CHECK(memory, "out of memory for %zu values", count);
    return memory;
}

Evaluation evaluation_start(const Transformer *model, int domains) {
    Evaluation e = {.domains = domains, .moe_count = model->moe_count, .E = model->config->experts};
    e.domain_loss = allocate(domains, sizeof(double));
    e.domain_floor = allocate(domains, sizeof(double));
    e.domain_tokens = allocate(domains, sizeof(int64_t));
    e.domain_expert = allocate((size_t)e.moe_count * domains * e.E, sizeof(double));
    e.information = allocate(e.moe_count, sizeof(double));
    return e;
}

void evaluation_add(Evaluation *e, const Transformer *model, const unsigned char *domain, const double *floor,
                    Stream *stream) {
    int N = model->N, K = model->config->top_k;
    acc_t *losses = allocate(N, sizeof(acc_t));
    int *chosen = allocate((size_t)N * K, sizeof(int));
    host_from_device(losses, model->losses, N * sizeof(acc_t), stream);
    for (int n = 0; n < N; n++) {
        e->domain_loss[domain[n]] += losses[n];
        e->domain_floor[domain[n]] += floor[n];
        e->domain_tokens[domain[n]]++;
    }
    for (int i = 0; i < model->moe_count; i++) {
        const Plan *plan = &model->layers[model->moe_layers[i]].moe.plan;
        host_from_device(chosen, plan->expert, (size_t)N * K * sizeof(int), stream);
        for (int n = 0; n < N * K; n++) {
            e->domain_expert[((size_t)i * e->domains + domain[n / K]) * e->E + chosen[n]]++;
        }
    }
    free(losses);
    free(chosen);
}

void evaluation_finish(Evaluation *e, double bytes_per_token) {
    int64_t tokens = 0;
    for (int d = 0; d < e->domains; d++) {
        tokens += e->domain_tokens[d];
        e->loss += e->domain_loss[d];
        e->floor += e->domain_floor[d];
        double count = e->domain_tokens[d] > 0 ? (double)e->domain_tokens[d] : NAN;
        e->domain_loss[d] /= count;
        e->domain_floor[d] /= count;
    }
    e->loss /= tokens;
    e->floor /= tokens;
    e->bits_per_byte = e->loss / M_LN2 / bytes_per_token;
    for (int i = 0; i < e->moe_count; i++) {
        e->information[i] = mutual_information(e->domain_expert + (size_t)i * e->domains * e->E, e->domains, e->E);
    }
}

void evaluation_free(Evaluation *e) {
    free(e->domain_loss);
    free(e->domain_floor);
    free(e->domain_tokens);
    free(e->domain_expert);
    free(e->information);
    *e = (Evaluation){0};
}

/* A number, or null where there is none. */
static void print_number(FILE *out, double value) {
    if (isfinite(value)) {
        fprintf(out, "%.9g", value);
    } else {
        fputs("null", out);
    }
}

static void print_domain(FILE *out, const Evaluation *e, const char *name, int d) {
    fprintf(out, "%s\"%s\":{\"loss\":", d > 0 ? "," : "", name);
    print_number(out, e->domain_loss[d]);
    fputs(",\"floor\":", out);
    print_number(out, e->domain_floor[d]);
    fprintf(out, ",\"tokens\":%lld}", (long long)e->domain_tokens[d]);
}

/* [[share of each expert] per domain] of one layer. */
static void print_domain_expert(FILE *out, const Evaluation *e, int layer) {
    for (int d = 0; d < e->domains; d++) {
        const double *counts = e->domain_expert + ((size_t)layer * e->domains + d) * e->E;
        double total = 0;
        for (int i = 0; i < e->E; i++) {
            total += counts[i];
        }
        fputs(d > 0 ? ",[" : "[", out);
        for (int i = 0; i < e->E; i++) {
            fprintf(out, "%s%.4g", i > 0 ? "," : "", total > 0 ? counts[i] / total : 0);
        }
        fputs("]", out);
    }
}

void evaluation_log(const Evaluation *e, Log *log, const char *const *names, int64_t step, int64_t tokens) {
    char *text = NULL;
    size_t length = 0;
    FILE *out = open_memstream(&text, &length);
    CHECK(out, "out of memory for a line of the log");
    fprintf(out, "{\"step\":%lld,\"tokens\":%lld,\"val_loss\":", (long long)step, (long long)tokens);
    print_number(out, e->loss);
    fputs(",\"val_bpb\":", out);
    print_number(out, e->bits_per_byte);
    fputs(",\"val_floor\":", out);
    print_number(out, e->floor);
    fputs(",\"val_domains\":{", out);
    for (int d = 0; d < e->domains; d++) {
        print_domain(out, e, names[d], d);
    }
    fputs("},\"domain_expert\":[", out);
    for (int i = 0; i < e->moe_count; i++) {
        fputs(i > 0 ? ",[" : "[", out);
        print_domain_expert(out, e, i);
        fputs("]", out);
    }
    fputs("],\"mi\":[", out);
    for (int i = 0; i < e->moe_count; i++) {
        fprintf(out, "%s%.6g", i > 0 ? "," : "", e->information[i]);
    }
    fputs("]}", out);
    fclose(out);
    log_line(log, "%s", text);
    free(text);
}
