/* A point's line, piece by piece; see bench_grid_line.h. */
#include "bench_grid_line.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench_moves.h"
#include "bench_provenance.h"

double point_seconds(const Point *p) {
    return p->options->seconds >= 0 ? p->options->seconds : p->grid->seconds;
}

static void print_point(const Point *p) {
    const GridOptions *o = p->options;
    printf("{\"kind\":\"microbench\",");
    print_time();
    printf(",\"impl\":\"moelab\",\"grid\":\"%s\",\"scale\":\"%s\",\"point\":%d", p->grid->name, p->grid->scale,
           p->number);
    print_text("router", p->router);
    print_text("layout", p->layout);
    print_text("load", o->load);
    printf(
        ",\"capacity_factor\":%g,\"shared_weights\":%s,\"tokens\":%d,\"batch\":%d,\"seq\":%d,\"dim\":%d,"
        "\"expert_dim\":%d,\"experts\":%d,\"top_k\":%d,\"act\":\"%s\",\"dtype\":\"" REAL_NAME
        "\",\"seed\":%d,\"warm_up\":%d,\"iterations\":%d,\"seconds\":%g,\"repeats\":%d",
        p->capacity_factor, o->shared_weights ? "true" : "false", p->batch * p->seq, p->batch, p->seq, p->dim,
        p->expert_dim, p->experts, p->top_k, p->grid->act, o->seed, o->warm_up, o->iterations, point_seconds(p),
        o->repeats);
    print_provenance(p->device);
}

void print_dry(const Point *p) {
    print_point(p);
    printf(",\"dry_run\":true}\n");
}

void print_skipped(const Point *p, size_t bytes) {
    print_point(p);
    printf(",\"skipped\":\"needs %.2f GiB\"}\n", bytes / 1073741824.0);
    fflush(stdout);
}

static const char *const part_names[PARTS] = {"route",   "permute",  "dispatch", "experts",
                                              "combine", "exchange", "other"};

const Times *part_times(const Result *r, int part) {
    static const Stage stage_of[PARTS] = {STAGE_ROUTE,   STAGE_PERMUTE,  STAGE_DISPATCH, STAGE_EXPERTS,
                                          STAGE_COMBINE, STAGE_EXCHANGE, STAGE_OTHER};
    return &r->stages[stage_of[part]];
}

void free_result(Result *r) {
    for (int s = 0; s < STAGE_COUNT; s++) {
        times_free(&r->stages[s]);
    }
    times_free(&r->forward);
    times_free(&r->both);
    times_free(&r->moves);
}

static double ratio(double a, double b) {
    return b > 0 ? a / b : 0;
}

static void print_stages(const Result *r) {
    double sum = 0, flops = 0, bytes = 0, forward = times_median(&r->forward);
    for (int i = 0; i < PARTS; i++) {
        sum += times_median(part_times(r, i));
        flops += r->flops[i];
        bytes += r->bytes[i];
    }
    printf(",\"ms\":%.6g,\"flops\":%.9g,\"bytes\":%.9g,\"ai\":%.6g,\"stage_sum\":%.6g,\"stage_sum_over_forward\":%.4f",
           forward, flops, bytes, ratio(flops, bytes), sum, ratio(sum, forward));
    printf(",\"stages\":{");
    for (int i = 0; i < PARTS; i++) {
        double ms = times_median(part_times(r, i));
        printf("%s\"%s\":{\"ms\":%.6g,\"share\":%.6f,\"flops\":%.9g,\"bytes\":%.9g,\"ai\":%.6g}", i ? "," : "",
               part_names[i], ms, ratio(ms, sum), r->flops[i], r->bytes[i], ratio(r->flops[i], r->bytes[i]));
    }
    printf("},\"times_ms\":{\"unit\":\"ms\"");
    for (int i = 0; i <= COMBINE; i++) {
        times_print(part_names[i], part_times(r, i));
    }
    times_print("forward", &r->forward);
    times_print("forward_backward", &r->both);
    if (r->moves.count > 0) {
        times_print("moves", &r->moves);
    }
    printf("}");
}

/* The bandwidth of dispatch and combine in `ms`; 0: there is none to speak of. */
static void print_bandwidth(const Point *p, const Result *r, double ms) {
    double N = (double)p->batch * p->seq, b = sizeof(real_t);
    if (ms <= 0) {
        printf(",\"bw\":null");
        return;
    }
    printf(",\"bw\":{\"ms\":%.6g,\"legacy_gb_s\":%.5g,\"strict_gb_s\":%.5g,\"moved_gb_s\":%.5g,\"moved_bytes\":%.9g}",
           ms, moves_bw_legacy(N, p->dim, p->top_k, b, ms), moves_bw_strict(N, p->dim, p->top_k, b, ms),
           (r->bytes[DISPATCH] + r->bytes[COMBINE]) / ms / 1e6, r->bytes[DISPATCH] + r->bytes[COMBINE]);
}

void print_result(const Point *p, const Result *r, double move_ms) {
    const MoeBenchLoad *l = &r->load;
    double gemm_ms = times_median(part_times(r, EXPERTS)), tflops = ratio(r->flops[EXPERTS], gemm_ms) / 1e9;
    print_point(p);
    print_stages(r);
    print_bandwidth(p, r, move_ms);
    if (r->flops[EXPERTS] > 0) {
        printf(",\"gemm\":{\"ms\":%.6g,\"tflops\":%.5g", gemm_ms, tflops);
        if (device_peak_flops() > 0) {
            printf(",\"share\":%.5f}", tflops * 1e12 / device_peak_flops());
        } else {
            printf(",\"share\":null}");
        }
    } else {
        printf(",\"gemm\":null");
    }
    printf(",\"rows\":%.0f,\"rows_computed\":%.0f,\"waste\":%.5f,\"padding\":%.5f,\"drop\":%.5f,\"token_drop\":%.5f",
           l->accepted, l->computed, ratio(l->computed, l->accepted), 1 - ratio(l->accepted, l->computed),
           1 - ratio(l->accepted, l->entries), l->token_drop);
    printf(",\"load_cv\":%.5f,\"max_vio\":%.5f,\"memory_mib\":{", l->cv, l->max_vio);
    for (int c = 0; c < MEMORY_CATEGORIES; c++) {
        printf("\"%s\":%.3f,", memory_category_name(c), r->arena->category[c] / 1048576.0);
    }
    printf("\"all\":%.3f}}\n", r->arena->bytes / 1048576.0);
    fflush(stdout);
}
