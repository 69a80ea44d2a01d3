/* Lines for people. Called by train.c. */
#include "console.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "../kernels/comm.h"
#include "cost.h"
#include "freeze.h"

/* Not under mpirun, which gives ranks a terminal of its own, wherever that leads. */
static bool on_terminal(void) {
    return comm_ranks(GROUP_WORLD) == 1 && isatty(STDOUT_FILENO);
}

const char *console_line_start(void) {
    return on_terminal() ? "\r\033[K" : "";
}

/* Memory by category; what is in none of them (code, batches, a copy being saved, gaps) is "other". */
static void print_memory(const Arena *arena, const char *what, size_t bytes) {
    size_t other = bytes;
    printf("memory   %s %.1f MiB:", what, bytes / 1048576.0);
    for (int i = 0; i < MEMORY_CATEGORIES; i++) {
        if (arena->category[i] > 0) {
            printf(" %s %.1f,", memory_category_name(i), arena->category[i] / 1048576.0);
            other -= arena->category[i] < other ? arena->category[i] : other;
        }
    }
    printf(" other %.1f\n", other / 1048576.0);
}

/* How tokens reach experts, where that is not simply K of E. */
static void print_routing(const Config *config, const Transformer *model) {
    const ModelConfig *m = &config->model;
    const Router *router = router_find(m->router);
    const Plan *plan = &model->moes[0]->plan;
    if (plan->slots > 0) {
        printf("slots    %d per expert for each %s of %d tokens\n", plan->slots,
               plan->across ? "position, a group" : "sequence, a group", plan->group_tokens);
    }
    if (m->chain_steps > 1) {
        printf("chain    %d steps, a router each; inner residual %d, outer %d, norms %d\n", m->chain_steps,
               m->chain_inner, m->chain_outer, m->chain_norm);
    }
    if (plan->slots == 0 && plan->capacity > 0) {
        printf("capacity %d rows per expert, out of the %d tokens of each slice\n", plan->capacity, plan->N);
    }
    if (config_is_leaky(m)) {
        printf(
            "warning  this run lets routing see later tokens: its loss is no language-model loss (logged as leaky)\n");
    } else if (router->sees_batch) {
        printf("note     a token's experts depend on the other sequences of its batch, and so does its loss\n");
    }
    if (!strcmp(router->name, "threshold")) {
        printf("note     the first %d steps choose as expert-choice does, which sees later tokens; evaluation never\n",
               config->train.threshold_warmup);
    }
}

/* Who holds which experts and reads which sequences. */
static void print_ranks(const Config *config, const Transformer *model) {
    enum { SHOWN = 16 };
    int ranks = comm_ranks(GROUP_WORLD), ep = comm_ranks(GROUP_EXPERTS);
    int experts = config->model.experts / ep, B = model->B;
    printf("ranks    %d: %d %s of %d that hold%s the experts between them (--ep %d)\n", ranks, ranks / ep,
           ranks > ep ? "groups" : "group", ep, ranks > ep ? "" : "s", ep);
    for (int r = 0; r < ranks && r < SHOWN; r++) {
        printf("rank %-3d sequences %d to %d of every %d", r, r * B, (r + 1) * B - 1, ranks * B);
        if (model->moe_count > 0) {
            printf(", experts %d to %d", r % ep * experts, (r % ep + 1) * experts - 1);
        }
        printf("\n");
    }
    if (ranks > SHOWN) {
        printf("         .. and so on\n");
    }
}

/* What is trained, where that is not everything. */
static void print_trainable(const Config *config, const Transformer *model) {
    const ModelConfig *m = &config->model;
    size_t total = tensors_parameters(&model->tensors), trainable = freeze_trainable(&model->tensors);
    if (trainable == total) {
        return;
    }
    printf("trains   %zu of %zu parameters (%.2f %%), the rest is frozen", trainable, total, 100.0 * trainable / total);
    if (m->perft == PERFT_R) {
        printf("; %d adapters of rank %d beside each MoE layer, %d per token", m->perft_count, m->perft_rank,
               m->perft_top_k);
    } else if (m->perft == PERFT_E) {
        printf("; an adapter of rank %d in each expert", m->perft_rank);
    } else if (m->perft != PERFT_NONE) {
        int count = m->perft == PERFT_D ? m->perft_count : 1;
        printf("; %d adapter%s of rank %d beside each MoE layer", count, count > 1 ? "s" : "", m->perft_rank);
    }
    printf("%s\n", m->lora == LORA_ATTENTION ? "; adapters beside the attention's projections" : "");
    if (config_has_adapters(m) && !config->train.init_from[0]) {
        printf("note     nothing was trained before: name the model to tune with --init-from DIR\n");
    }
}

void console_start(const Config *config, const Transformer *model, const Arena *arena) {
    const ModelConfig *m = &config->model;
    const TrainConfig *t = &config->train;
    char device[128];
    device_describe(device, sizeof device);
    printf("model    %d layers, width %d, router %s", m->layers, m->dim, m->router);
    if (model->moe_count > 0) {
        printf(", %d experts of width %d, %d per token", m->experts, m->expert_dim, m->top_k);
    }
    printf("; %.2f M parameters, %.2f M active\n", tensors_parameters(&model->tensors) / 1e6,
           transformer_active_parameters(model) / 1e6);
    print_trainable(config, model);
    if (model->moe_count > 0) {
        print_routing(config, model);
    }
    printf("data     %s%s; %d steps of %d x %d tokens\n", t->data,
           m->objective == OBJECTIVE_MLM ? ", masked tokens" : "", t->steps, t->batch, m->seq);
    if (comm_ranks(GROUP_WORLD) > 1) {
        print_ranks(config, model);
    }
    printf("device   %s\n", device);
    print_memory(arena, "arena", arena->bytes);
    printf("run      %s%s\n", t->out, t->resume[0] ? " (resumed)" : "");
    fflush(stdout);
}

void console_progress(const Config *config, const Progress *at, const StepFigures *f, double seconds, double val_loss) {
    const TrainConfig *t = &config->train;
    double tokens = (double)t->batch * config->model.seq;
    int left = (int)((t->steps - at->step) * seconds + 0.5);
    if (on_terminal()) {
        char bar[25];
        int done = (int)(24 * at->step / t->steps);
        memset(bar, '.', sizeof bar - 1);
        memset(bar, '#', done);
        bar[24] = 0;
        char validation[32] = "";
        if (isfinite(val_loss)) {
            snprintf(validation, sizeof validation, "  val %.3f", val_loss);
        }
        printf("\r[%s] %lld/%d  loss %.3f%s  router grad %.1e  %.0f tok/s  %d:%02d left\033[K", bar,
               (long long)at->step, t->steps, f->loss, validation, f->main_gradient, tokens / seconds, left / 60,
               left % 60);
    } else {
        char dropped[64] = "";
        if (f->dropped > 0 || f->tokens_dropped > 0) {
            snprintf(dropped, sizeof dropped, "  dropped %.1f %% (tokens %.1f %%)", 100 * f->dropped,
                     100 * f->tokens_dropped);
        }
        char padding[32] = "";
        if (f->padding > 0) {
            snprintf(padding, sizeof padding, "  padding %.1f %%", 100 * f->padding);
        }
        printf(
            "step %5lld/%d  loss %.4f  aux %.3f  grad %.3f  router grad %.2e  load cv %.2f%s%s  %.1f ms  %.0f tok/s  "
            "%d:%02d left\n",
            (long long)at->step, t->steps, f->loss, f->aux, f->norms.total, f->norms.router, f->load.cv, dropped,
            padding, 1e3 * seconds, tokens / seconds, left / 60, left % 60);
    }
    fflush(stdout);
}

void console_first_gradients(const StepFigures *f) {
    if (f->moe_count == 0) {
        return;
    }
    printf("%srouters  gradient at the logits in step 1, main loss / balance losses:", console_line_start());
    for (int i = 0; i < f->moe_count; i++) {
        printf("%s %.1e / %.1e", i > 0 ? "," : "", f->layer_main_norm[i], f->layer_balance_norm[i]);
    }
    printf("\n");
}

void console_evaluation(const Evaluation *e, const char *const *names, int64_t step) {
    printf("%sstep %5lld  validation %.4f nats", console_line_start(), (long long)step, e->loss);
    if (isfinite(e->bits_per_byte)) {
        printf(", %.4f bits per byte", e->bits_per_byte);
    }
    if (isfinite(e->floor)) {
        printf(", floor %.4f (x%.2f):", e->floor, e->loss / e->floor);
        for (int d = 0; d < e->domains; d++) {
            if (e->domain_tokens[d] > 0) {
                printf(" %s x%.2f", names[d], e->domain_loss[d] / e->domain_floor[d]);
            }
        }
    }
    printf("\n");
    fflush(stdout);
}

static void print_profile(const Profile *profile) {
    double total = 0;
    for (int i = 0; i < STAGE_COUNT; i++) {
        total += profile->seconds[i];
    }
    printf("\nstage      seconds   share\n");
    for (int i = 0; i < STAGE_COUNT; i++) {
        if (profile->seconds[i] > 0) {
            printf("%-10s %7.2f  %5.1f %%\n", stage_name(i), profile->seconds[i], 100 * profile->seconds[i] / total);
        }
    }
}

/* What p2p stores in place of sending it. */
static void print_stored(const TrainConfig *t, const Transformer *model) {
    double bytes = 0;
    for (int i = 0; i < model->moe_count; i++) {
        bytes += exchange_stored(&model->moes[i]->exchange, false) + exchange_stored(&model->moes[i]->exchange, true);
    }
    if (bytes > 0) {
        printf("stored   %.1f MiB by rank 0 in the memory of other ranks, in a step with the last batch's choices\n",
               bytes * t->grad_accum / 1048576.0);
    }
}

void console_end(const Config *config, const Transformer *model, const Arena *arena, const Profile *profile,
                 const Progress *at) {
    const TrainConfig *t = &config->train;
    if (t->profile) {
        print_profile(profile);
    }
    if (at->tokens > 0) {
        printf("\ntrained  %lld steps, %.2f M tokens in %.1f s (%.0f tokens/s, %.0f GFLOP/s)\n", (long long)at->step,
               at->tokens / 1e6, at->seconds, at->tokens / at->seconds,
               at->tokens / at->seconds * transformer_flops_per_token(model) / 1e9);
    }
    if (comm_ranks(GROUP_WORLD) > 1) {
        CommCount sent = comm_count();
        printf("sent     %.1f MiB in %lld messages, by rank 0, to other ranks\n", sent.bytes / 1048576.0,
               (long long)sent.messages);
        print_stored(t, model);
    }
    print_memory(arena, "peak", device_peak_memory());
    printf("report   %s/report.html\n", t->out);
}

void console_stopped(const Config *config, const Progress *at, const char *program) {
    const char *out = config->train.out;
    const char *quote = strpbrk(out, " \t\"$&;()*?!|<>") ? "'" : "";
    printf("\nstopped by a signal at step %lld; saved. Go on with: %s --resume %s%s%s\n", (long long)at->step, program,
           quote, out, quote);
}
