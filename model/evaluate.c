/* Sums over validation batches, their means, and the log's evaluation line. The text is read by train.c, which calls
 * this. */
#include "evaluate.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"
#include "../kernels/comm.h"
#include "balance.h"

static void *allocate(size_t count, size_t size) {
    void *memory = calloc(count > 0 ? count : 1, size);
    CHECK(memory, "out of memory for %zu values", count);
    return memory;
}

void choices_free(Choices *choices) {
    free(choices->expert);
    *choices = (Choices){0};
}

Evaluation evaluation_start(const Transformer *model, int domains, Choices *choices) {
    Evaluation e = {.domains = domains, .moe_count = model->moe_count, .E = model->config->experts};
    e.masked = model->config->objective == OBJECTIVE_MLM;
    e.choices = choices;
    e.first = true;
    e.churn = allocate(e.moe_count, sizeof(double));
    for (int i = 0; i < e.moe_count; i++) {
        e.churn[i] = NAN;
    }
    e.domain_loss = allocate(domains, sizeof(double));
    e.domain_floor = allocate(domains, sizeof(double));
    e.domain_tokens = allocate(domains, sizeof(int64_t));
    e.domain_expert = allocate((size_t)e.moe_count * domains * e.E, sizeof(double));
    e.information = allocate(e.moe_count, sizeof(double));
    return e;
}

/* Whether two lists of K experts hold the same ones, in whatever order; -1 stands for none. */
static bool same_experts(const int *a, const int *b, int K) {
    for (int i = 0; i < K; i++) {
        bool found = a[i] < 0;
        for (int j = 0; j < K && !found; j++) {
            found = a[i] == b[j];
        }
        bool found_back = b[i] < 0;
        for (int j = 0; j < K && !found_back; j++) {
            found_back = b[i] == a[j];
        }
        if (!found || !found_back) {
            return false;
        }
    }
    return true;
}

/* Compares the choices of this evaluation's first forward with those of the evaluation before, and keeps them. */
static void measure_churn(Evaluation *e, const Transformer *model, Stream *stream) {
    const Plan *plan = &model->moes[0]->plan;
    size_t entries = (size_t)plan->N * plan->K, bytes = entries * sizeof(int);
    bool is_first = !e->choices->expert;
    if (is_first) {
        e->choices->expert = allocate(e->moe_count * entries, sizeof(int));
    }
    int *chosen = allocate(entries, sizeof(int));
    for (int i = 0; i < e->moe_count; i++) {
        int *before = e->choices->expert + i * entries, changed = 0;
        host_from_device(chosen, model->moes[i]->plan.expert, bytes, stream);
        for (int n = 0; n < plan->N; n++) {
            changed += !same_experts(before + (size_t)n * plan->K, chosen + (size_t)n * plan->K, plan->K);
        }
        e->churn[i] = is_first ? NAN : (double)changed / plan->N;
        memcpy(before, chosen, bytes);
    }
    free(chosen);
}

/* How often, or with a soft plan with how much weight, each domain went to each expert. */
static void add_experts(Evaluation *e, const Plan *plan, double *domain_expert, const unsigned char *domain,
                        Stream *stream) {
    size_t entries = (size_t)plan->N * plan->K;
    int *chosen = allocate(entries, sizeof(int));
    acc_t *weight = allocate(entries, sizeof(acc_t));
    if (plan->slots > 0) {
        host_from_device(weight, plan->weight, entries * sizeof(acc_t), stream);
    } else {
        host_from_device(chosen, plan->expert, entries * sizeof(int), stream);
    }
    for (size_t i = 0; i < entries; i++) {
        double *row = domain_expert + (size_t)domain[i / plan->K] * e->E;
        if (plan->slots > 0) {
            row[i % plan->K / plan->slots] += weight[i];
        } else if (chosen[i] >= 0) {
            row[chosen[i]]++;
        }
    }
    free(chosen);
    free(weight);
}

void evaluation_add(Evaluation *e, const Transformer *model, const int *targets, const unsigned char *domain,
                    const double *floor, const int *bytes, Stream *stream) {
    int N = model->N;
    acc_t *losses = allocate(N, sizeof(acc_t));
    host_from_device(losses, model->losses, N * sizeof(acc_t), stream);
    for (int n = 0; n < N; n++) {
        if (targets[n] >= 0) {
            e->domain_loss[domain[n]] += losses[n];
            e->domain_floor[domain[n]] += floor[n];
            e->domain_tokens[domain[n]]++;
            bool known = e->text_bytes >= 0 && bytes[n] >= 0;
            e->text_bytes = known ? e->text_bytes + bytes[n] : -1;
            e->text_loss += bytes[n] > 0 ? losses[n] : 0;
        }
    }
    for (int i = 0; i < model->moe_count; i++) {
        add_experts(e, &model->moes[i]->plan, e->domain_expert + (size_t)i * e->domains * e->E, domain, stream);
    }
    if (e->first && model->moe_count > 0 && model->moes[0]->plan.slots == 0) {
        measure_churn(e, model, stream);
    }
    e->first = false;
    free(losses);
}

/* Adds up what the ranks, each on its share of the text, have found; all of them get the sums. */
static void sum_ranks(Evaluation *e) {
    int ranks = comm_ranks(GROUP_WORLD), D = e->domains;
    double *tokens = allocate(D + 3, sizeof(double));
    for (int d = 0; d < D; d++) {
        tokens[d] = (double)e->domain_tokens[d];
    }
    tokens[D] = (double)e->text_bytes;
    tokens[D + 1] = e->text_loss;
    tokens[D + 2] = e->text_bytes < 0;
    comm_sum_host(tokens, D + 3);
    comm_sum_host(e->domain_loss, D);
    comm_sum_host(e->domain_floor, D);
    comm_sum_host(e->domain_expert, (size_t)e->moe_count * D * e->E);
    comm_sum_host(e->churn, e->moe_count);
    for (int d = 0; d < D; d++) {
        e->domain_tokens[d] = (int64_t)tokens[d];
    }
    e->text_bytes = tokens[D + 2] > 0 ? -1 : (int64_t)tokens[D];
    e->text_loss = tokens[D + 1];
    for (int i = 0; i < e->moe_count; i++) {
        e->churn[i] /= ranks;
    }
    free(tokens);
}

void evaluation_finish(Evaluation *e, double bytes_per_token) {
    sum_ranks(e);
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
    double per_byte = e->text_bytes > 0 ? e->text_loss / (double)e->text_bytes : e->loss / bytes_per_token;
    e->bits_per_byte = e->masked ? NAN : per_byte / M_LN2;
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
    free(e->churn);
    *e = (Evaluation){0};
}

static void print_domain(FILE *out, const Evaluation *e, const char *name, int d) {
    fprintf(out, "%s\"%s\":{\"loss\":", d > 0 ? "," : "", name);
    log_number(out, e->domain_loss[d]);
    fputs(",\"floor\":", out);
    log_number(out, e->domain_floor[d]);
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
    log_number(out, e->loss);
    fputs(",\"val_bpb\":", out);
    log_number(out, e->bits_per_byte);
    fputs(",\"val_floor\":", out);
    log_number(out, e->floor);
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
    fputs("],\"churn\":[", out);
    for (int i = 0; i < e->moe_count; i++) {
        fputs(i > 0 ? "," : "", out);
        log_number(out, e->churn[i]);
    }
    fputs("]}", out);
    fclose(out);
    log_line(log, "%s", text);
    free(text);
}
