/* Fetches what the last step left on the device and writes it as the log's step line. Called by train.c every
 * --log-every steps. */
#include "figures.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"
#include "cost.h"

static double square(double x) {
    return x * x;
}

/* Of all ranks; 0 without routers of adapters. */
static size_t perft_values(const Transformer *model) {
    return model->perft_load ? (size_t)model->context.ranks * model->slices * model->config->layers * LOAD_VALUES : 0;
}

/* What a readback holds, in this order: step_loss, the optimizer's state, its sums, load, demand, perft_load. */
void figures_request(Readback *readback, const Transformer *model, const Optimizer *optimizer, Stream *stream) {
    size_t places = (size_t)model->slices * model->moe_count;
    size_t sums = optimizer->count * sizeof(double);
    size_t load = model->context.ranks * places * LOAD_VALUES * sizeof(acc_t);
    size_t demand = places * model->config->experts * sizeof(int);
    size_t perft = perft_values(model) * sizeof(acc_t);
    if (readback->capacity == 0) {
        readback_reserve(readback, sizeof(acc_t) + sizeof(AdamState) + sums + load + demand + perft);
    }
    readback_add(readback, model->step_loss, sizeof(acc_t), stream);
    readback_add(readback, optimizer->state, sizeof(AdamState), stream);
    readback_add(readback, optimizer->sums, sums, stream);
    readback_add(readback, model->load, load, stream);
    readback_add(readback, model->demand, demand, stream);
    if (perft > 0) {
        readback_add(readback, model->perft_load, perft, stream);
    }
    readback_queued(readback, stream);
}

/* The next `bytes` of what came back. */
static void take(void *to, const char **from, size_t bytes) {
    memcpy(to, *from, bytes);
    *from += bytes;
}

/* Adds what each layer says of each slice of the step on each rank: ranks first, then slices, layers within. */
static void sum_load(StepFigures *f, const acc_t *load, int parts) {
    int layers = f->moe_count;
    size_t places = (size_t)parts * layers;
    for (size_t i = 0; i < places; i++) {
        const acc_t *values = load + i * LOAD_VALUES;
        f->aux += values[LOAD_BALANCE] / places;
        f->z += values[LOAD_Z] / places;
        f->entropy += values[LOAD_ENTROPY] / places;
        f->dropped += values[LOAD_DROPPED] / places;
        f->mean_entropy += values[LOAD_MEAN_ENTROPY] / places;
        f->margin += values[LOAD_MARGIN] / places;
        f->tokens_dropped += values[LOAD_TOKENS_DROPPED] / places;
        f->padding += values[LOAD_PADDING] / places;
        f->layer_entropy[i % layers] += values[LOAD_ENTROPY] / parts;
        f->layer_margin[i % layers] += values[LOAD_MARGIN] / parts;
        f->layer_main_norm[i % layers] += square(values[LOAD_MAIN_GRADIENT]); /* the parts are different tokens */
        f->layer_balance_norm[i % layers] += square(values[LOAD_BALANCE_GRADIENT]);
    }
}

/* The same of the adapters' routers, which stand beside those of the model: one to each. */
static void sum_perft_load(StepFigures *f, const acc_t *load, const Transformer *model) {
    int layers = model->config->layers;
    size_t values = perft_values(model), parts = values / LOAD_VALUES / layers, places = parts * f->moe_count;
    for (size_t i = 0; i < values / LOAD_VALUES; i++) {
        const acc_t *of = load + i * LOAD_VALUES;
        if (perft_is_routed(model->config, (int)(i % layers))) {
            f->perft_aux += of[LOAD_BALANCE] / places;
            f->perft_entropy += of[LOAD_ENTROPY] / places;
            f->perft_main_gradient += square(of[LOAD_MAIN_GRADIENT]);
            f->perft_balance_gradient += square(of[LOAD_BALANCE_GRADIENT]);
        }
    }
    f->perft_main_gradient = sqrt(f->perft_main_gradient);
    f->perft_balance_gradient = sqrt(f->perft_balance_gradient);
}

/* Adds the choices of each slice, which are those of all ranks. */
static void sum_demand(StepFigures *f, const int *demand, int slices) {
    size_t values = (size_t)f->moe_count * f->E;
    for (size_t i = 0; i < slices * values; i++) {
        f->counts[i % values] += demand[i];
    }
}

/* From the sums: norms, and how even the load is. */
static void summarise_layers(StepFigures *f) {
    int layers = f->moe_count;
    for (int l = 0; l < layers; l++) {
        f->main_gradient += f->layer_main_norm[l];
        f->balance_gradient += f->layer_balance_norm[l];
        f->layer_main_norm[l] = sqrt(f->layer_main_norm[l]);
        f->layer_balance_norm[l] = sqrt(f->layer_balance_norm[l]);
        LoadSummary s = load_summary(f->counts + (size_t)l * f->E, f->E);
        f->load.cv += s.cv / layers;
        f->load.kl += s.kl / layers;
        f->load.max_vio += s.max_vio / layers;
        f->load.dead += s.dead;
        f->load.near_dead += s.near_dead;
    }
    f->main_gradient = sqrt(f->main_gradient);
    f->balance_gradient = sqrt(f->balance_gradient);
}

StepFigures figures_read(Readback *readback, const Transformer *model, const Optimizer *optimizer) {
    int layers = model->moe_count, slices = model->slices, E = model->config->experts, ranks = model->context.ranks;
    StepFigures f = {.moe_count = layers,
                     .E = E,
                     .perft = perft_values(model) > 0,
                     .flops_per_token = transformer_flops_per_token(model),
                     .ranks = ranks};
    size_t places = (size_t)slices * layers;
    acc_t step_loss, *load = calloc(ranks * places * LOAD_VALUES + 1, sizeof(acc_t));
    int *demand = calloc(places * E + 1, sizeof(int));
    double *sums = calloc(optimizer->count + 1, sizeof(double));
    acc_t *perft = calloc(perft_values(model) + 1, sizeof(acc_t));
    f.counts = calloc((size_t)layers * E + 1, sizeof(double));
    f.layer_entropy = calloc(4 * layers + 1, sizeof(double)); /* the four (moe_count) arrays in one piece */
    CHECK(load && demand && sums && perft && f.counts && f.layer_entropy,
          "out of memory for the statistics of %d layers", layers);
    f.layer_main_norm = f.layer_entropy + layers;
    f.layer_balance_norm = f.layer_entropy + 2 * layers;
    f.layer_margin = f.layer_entropy + 3 * layers;
    readback_wait(readback);
    const char *from = readback->host;
    take(&step_loss, &from, sizeof step_loss);
    take(&f.adam, &from, sizeof f.adam);
    take(sums, &from, optimizer->count * sizeof(double));
    take(load, &from, ranks * places * LOAD_VALUES * sizeof(acc_t));
    take(demand, &from, places * E * sizeof(int));
    take(perft, &from, perft_values(model) * sizeof(acc_t));
    f.norms = optimizer_norms(optimizer, &model->tensors, sums);
    f.loss = step_loss;
    sum_load(&f, load, ranks * slices);
    sum_demand(&f, demand, slices);
    sum_perft_load(&f, perft, model);
    summarise_layers(&f);
    free(load);
    free(demand);
    free(sums);
    free(perft);
    return f;
}

void figures_free(StepFigures *f) {
    free(f->counts);
    free(f->layer_entropy);
    *f = (StepFigures){0};
}

static void print_value(FILE *out, const char *key, double value) {
    fprintf(out, ",\"%s\":", key);
    log_number(out, value);
}

static void print_counts(FILE *out, const StepFigures *f) {
    fputs(",\"counts\":[", out);
    for (int l = 0; l < f->moe_count; l++) {
        for (int e = 0; e < f->E; e++) {
            fprintf(out, "%s%.0f", e > 0 ? "," : (l > 0 ? ",[" : "["), f->counts[l * f->E + e]);
        }
        fputs("]", out);
    }
    fputs("]", out);
}

static void print_layers(FILE *out, const char *key, const double *values, int count) {
    fprintf(out, ",\"%s\":[", key);
    for (int l = 0; l < count; l++) {
        fputs(l > 0 ? "," : "", out);
        log_number(out, values[l]);
    }
    fputs("]", out);
}

void figures_log_gradients(const StepFigures *f, Log *log, int64_t step) {
    char *text = NULL;
    size_t length = 0;
    FILE *out = open_memstream(&text, &length);
    CHECK(out, "out of memory for a line of the log");
    fprintf(out, "{\"event\":\"router_gradient\",\"step\":%lld", (long long)step);
    print_layers(out, "main", f->layer_main_norm, f->moe_count);
    print_layers(out, "balance", f->layer_balance_norm, f->moe_count);
    fputs("}", out);
    fclose(out);
    log_line(log, "%s", text);
    free(text);
}

void figures_log(const StepFigures *f, Log *log, const Config *config, int64_t step, double seconds) {
    double tokens = (double)config->train.batch * config->model.seq;
    char *text = NULL;
    size_t length = 0;
    FILE *out = open_memstream(&text, &length);
    CHECK(out, "out of memory for a line of the log");
    fprintf(out, "{\"step\":%lld,\"tokens\":%.0f", (long long)step, step * tokens);
    print_value(out, "loss", f->loss);
    print_value(out, "aux", f->aux);
    print_value(out, "z", f->z);
    print_value(out, "lr", learning_rate(&config->train, step - 1));
    print_value(out, "grad_norm", f->norms.total);
    print_value(out, "router_grad_norm", f->norms.router);
    print_value(out, "router_main_norm", f->main_gradient);
    print_value(out, "router_balance_norm", f->balance_gradient);
    fprintf(out, ",\"ms\":%.4g,\"tok_s\":%.0f", 1e3 * seconds, tokens / seconds);
    print_value(out, "mfu",
                f->flops_per_token * tokens / seconds / (device_peak_flops() * f->ranks)); /* null: no known peak */
    print_value(out, "drop", f->dropped);
    print_value(out, "token_drop", f->tokens_dropped);
    print_value(out, "padding", f->padding);
    print_value(out, "load_cv", f->load.cv);
    print_value(out, "load_kl", f->load.kl);
    print_value(out, "max_vio", f->load.max_vio);
    print_value(out, "entropy", f->entropy);
    print_value(out, "mean_entropy", f->mean_entropy);
    print_value(out, "margin", f->margin);
    fprintf(out, ",\"dead\":%d,\"near_dead\":%d,\"leaky\":%s,\"skipped\":%lld", f->load.dead, f->load.near_dead,
            config_is_leaky(&config->model) ? "true" : "false", (long long)f->adam.skipped);
    if (f->perft) {
        print_value(out, "perft_aux", f->perft_aux);
        print_value(out, "perft_entropy", f->perft_entropy);
        print_value(out, "perft_main_norm", f->perft_main_gradient);
        print_value(out, "perft_balance_norm", f->perft_balance_gradient);
    }
    print_counts(out, f);
    print_layers(out, "layer_entropy", f->layer_entropy, f->moe_count);
    print_layers(out, "layer_main_norm", f->layer_main_norm, f->moe_count);
    print_layers(out, "layer_balance_norm", f->layer_balance_norm, f->moe_count);
    print_layers(out, "layer_margin", f->layer_margin, f->moe_count);
    fputs("}", out);
    fclose(out);
    log_line(log, "%s", text);
    free(text);
}
