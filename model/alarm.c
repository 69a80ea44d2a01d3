/* The conditions, and saying them once. Called by train.c with the figures of every logged step. */
#include "alarm.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "../kernels/check.h"
#include "freeze.h"

static bool is_silent(const StepFigures *f, const Transformer *model, int i) {
    const MoeLayer *moe = model->moes[i];
    return moe->router->learned && !freeze_holds_routers(moe->pass.config) && f->layer_main_norm[i] == 0;
}

static bool is_unbalanced(const StepFigures *f, const Transformer *model, int i) {
    const MoeLayer *moe = model->moes[i];
    bool weighs = moe->router->has_balance_loss && moe->pass.aux_scale > 0 && !freeze_holds_routers(moe->pass.config);
    return weighs && f->layer_balance_norm[i] == 0 && load_summary(f->counts + (size_t)i * f->E, f->E).cv > 0;
}

static bool is_collapsed(const StepFigures *f, const Transformer *model, int i) {
    int K = model->config->top_k;
    double spread = f->E * exp(-load_summary(f->counts + (size_t)i * f->E, f->E).kl); /* exp of the entropy */
    return f->E > 1.5 * K && spread <= 1.1 * K;
}

static int dead_experts(const StepFigures *f, const Transformer *model, int i) {
    double total = 0;
    int dead = 0;
    for (int e = 0; e < f->E; e++) {
        total += f->counts[i * f->E + e];
        dead += f->counts[i * f->E + e] == 0;
    }
    return model->moes[i]->plan.slots == 0 && total >= 20.0 * f->E ? dead : 0;
}

int alarms_check(Alarms *alarms, const StepFigures *f, const Transformer *model, int64_t step, Log *log,
                 const char *line_start) {
    int standing = 0;
    if (!alarms->held) {
        alarms->held = calloc((size_t)f->moe_count * ALARM_KINDS + 1, sizeof(int));
        CHECK(alarms->held, "out of memory for the alarms of %d routers", f->moe_count);
    }
    for (int i = 0; i < f->moe_count; i++) {
        int dead = dead_experts(f, model, i);
        bool holds[ALARM_KINDS] = {is_silent(f, model, i), is_unbalanced(f, model, i), is_collapsed(f, model, i),
                                   dead > 0};
        for (int kind = 0; kind < ALARM_KINDS; kind++) {
            int *held = &alarms->held[i * ALARM_KINDS + kind], patience = kind < ALARM_COLLAPSED ? 1 : ALARM_PATIENCE;
            *held = holds[kind] ? *held + 1 : 0;
            standing += *held >= patience;
            if (*held != patience) {
                continue;
            }
            char reason[96];
            if (kind == ALARM_SILENT) {
                snprintf(reason, sizeof reason, "no gradient from the main loss: the router learns nothing");
            } else if (kind == ALARM_UNBALANCED) {
                snprintf(reason, sizeof reason, "no gradient from the balance loss: it balances nothing");
            } else if (kind == ALARM_COLLAPSED) {
                snprintf(reason, sizeof reason, "collapse: nearly all tokens go to the same experts");
            } else {
                snprintf(reason, sizeof reason, "%d of %d experts got no token", dead, f->E);
            }
            char where[48];
            transformer_router_name(model, i, where, sizeof where);
            printf("%salarm: step %lld: router of %s: %s\n", line_start, (long long)step, where, reason);
            log_line(log, "{\"event\":\"alarm\",\"step\":%lld,\"layer\":%d,\"router\":%d,\"reason\":\"%s\"}",
                     (long long)step, model->moe_layers[i], i, reason);
        }
    }
    return standing;
}

void alarms_free(Alarms *alarms) {
    free(alarms->held);
    *alarms = (Alarms){0};
}
