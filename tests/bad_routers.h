/* The gallery of known-bad routers: each is a router of this project with one bug that published code has had.
 *
 * A Bug names the router it is made from and replaces what the bug is in; router_find() is wrapped by the linker, so
 * that "--router NAME" takes a bad router as any other, through all of the program. `caught` says by which checks of
 * test_bad_routers.c it must be found, and by its silence which checks are blind to it.
 *
 * Read next: test_bad_routers.c; model/router_topk.c, which most of these should have been.
 */
#ifndef TESTS_BAD_ROUTERS_H
#define TESTS_BAD_ROUTERS_H

#include <math.h>
#include <string.h>

#include "../kernels/gate.h"
#include "../kernels/noisy.h"
#include "../kernels/topk.h"
#include "../model/router.h"

enum {
    BY_GRADIENT = 1,      /* central differences of the objective at the routers' parameters */
    BY_ALARM = 2,         /* alarm.h: no gradient from the main loss, or none from the balance loss */
    BY_BALANCE_NORM = 4,  /* a balance loss that weighs something has no gradient: LOAD_BALANCE_GRADIENT is 0 */
    BY_BALANCE_VALUE = 8, /* the balance loss is not what its definition makes of choices and logits */
    BY_CHOICE = 16,       /* a token's experts are not its best by the definition */
    BY_CAUSALITY = 32,    /* outputs change with what the router declares not to see */
    CHECKS = 6
};

typedef struct {
    const char *title, *name; /* name: as --router takes it */
    const char *base;         /* the router it should be */
    const char *options;
    unsigned caught;
    void (*forward)(RouterPass *pass, Plan *plan, Stream *stream); /* NULL: the base's, also below */
    void (*balance)(RouterPass *pass, const Plan *plan, Stream *stream);
    void (*backward)(RouterPass *pass, real_t *dx, const acc_t *dweight, const Plan *plan, Stream *stream);
    bool called_causal; /* declares that it sees neither later tokens nor other texts */
    bool drops;         /* entries must be dropped for the bug to show */
    double bias;        /* added to all selection biases, which changes no right choice */
} Bug;

enum { GATE, NOISE, MOST_SCORES = 512 };

/* What all softmax routers end with, after dlogits of the main loss. */
static void finish_backward(RouterPass *p, real_t *dx, const int *demand, double aux_scale, Stream *stream) {
    gradient_measure(p->load, p->dlogits, (size_t)p->N * p->E, stream);
    balance_backward(p->dlogits, p->load, p->probs, p->lse, demand, p->N, p->E, p->K, aux_scale, p->z_scale, stream);
    gate_backward(dx, p->param[GATE].dw, p->dlogits, p->x, p->param[GATE].w, p->N, p->C, p->E, stream);
}

static double softplus(double x) {
    return log1p(exp(-fabs(x))) + fmax(x, 0);
}

/* ---- routers that the loss does not reach */

/* Renormalised over one expert the weight is p / p: the constant 1. */
static void renormalised_top1_forward(RouterPass *p, Plan *plan, Stream *stream) {
    gate_forward(p->logits, p->x, p->param[GATE].w, p->N, p->C, p->E, stream);
    topk_forward(p->probs, p->lse, plan->expert, plan->weight, p->logits, p->N, p->E, 1, 1, stream);
}

static void renormalised_top1_backward(RouterPass *p, real_t *dx, const acc_t *dweight, const Plan *plan,
                                       Stream *stream) {
    topk_backward(p->dlogits, dweight, p->probs, plan->expert, plan->weight, p->N, p->E, 1, 1, stream);
    finish_backward(p, dx, plan->demand, p->aux_scale, stream);
}

/* The chosen experts' outputs are added up as they are. */
static void unweighted_forward(RouterPass *p, Plan *plan, Stream *stream) {
    router_find("topk")->forward(p, plan, stream);
    for (int i = 0; i < plan->N * plan->K; i++) {
        plan->weight[i] = 1;
    }
}

static void unweighted_backward(RouterPass *p, real_t *dx, const acc_t *dweight, const Plan *plan, Stream *stream) {
    memset(p->dlogits, 0, (size_t)p->N * p->E * sizeof *p->dlogits);
    finish_backward(p, dx, plan->demand, p->aux_scale, stream);
}

/* ---- wrong gates */

/* dl_j = p_j (g_j - p_j g_j): the sum over the chosen is taken for each expert alone. */
static void per_expert_backward(RouterPass *p, real_t *dx, const acc_t *dweight, const Plan *plan, Stream *stream) {
    memset(p->dlogits, 0, (size_t)p->N * p->E * sizeof *p->dlogits);
    for (int i = 0; i < plan->N * plan->K; i++) {
        acc_t w = p->probs[i / plan->K * p->E + plan->expert[i]], g = dweight[i];
        p->dlogits[i / plan->K * p->E + plan->expert[i]] = w * (g - w * g);
    }
    finish_backward(p, dx, plan->demand, p->aux_scale, stream);
}

/* The softmax runs over all experts, but only the chosen get a gradient. */
static void chosen_only_backward(RouterPass *p, real_t *dx, const acc_t *dweight, const Plan *plan, Stream *stream) {
    topk_backward(p->dlogits, dweight, p->probs, plan->expert, plan->weight, p->N, p->E, p->K, 0, stream);
    for (int i = 0; i < p->N * p->E; i++) {
        bool chosen = false;
        for (int j = 0; j < p->K; j++) {
            chosen |= plan->expert[i / p->E * p->K + j] == i % p->E;
        }
        p->dlogits[i] = chosen ? p->dlogits[i] : 0;
    }
    finish_backward(p, dx, plan->demand, p->aux_scale, stream);
}

/* The softmax was renormalised over the chosen, but its gradient is the plain one's. */
static void plain_backward(RouterPass *p, real_t *dx, const acc_t *dweight, const Plan *plan, Stream *stream) {
    acc_t plain[MOST_SCORES];
    choice_weight(plain, plan->expert, p->probs, p->N, p->E, p->K, 0, stream);
    topk_backward(p->dlogits, dweight, p->probs, plan->expert, plain, p->N, p->E, p->K, 0, stream);
    finish_backward(p, dx, plan->demand, p->aux_scale, stream);
}

/* A second sort puts the experts in the order of their ids, and leaves the weights where they are. */
static void permuted_forward(RouterPass *p, Plan *plan, Stream *stream) {
    router_find("topk")->forward(p, plan, stream);
    for (int n = 0; n < plan->N; n++) {
        int *e = plan->expert + n * plan->K;
        for (int j = 1; j < plan->K; j++) {
            for (int i = j; i > 0 && e[i] < e[i - 1]; i--) {
                int swapped = e[i];
                e[i] = e[i - 1];
                e[i - 1] = swapped;
            }
        }
    }
}

/* ---- wrong balance losses */

/* E sum f^2: counts in place of probabilities. */
static void counted_balance(RouterPass *p, const Plan *plan, Stream *stream) {
    double sum = 0;
    router_find("topk")->balance(p, plan, stream);
    for (int e = 0; e < p->E; e++) {
        double f = plan->demand[e] / ((double)p->N * p->K);
        sum += p->E * f * f;
    }
    p->load[LOAD_BALANCE] = (acc_t)sum;
}

static void counted_backward(RouterPass *p, real_t *dx, const acc_t *dweight, const Plan *plan, Stream *stream) {
    topk_backward(p->dlogits, dweight, p->probs, plan->expert, plan->weight, p->N, p->E, p->K, p->renorm, stream);
    finish_backward(p, dx, plan->demand, 0, stream);
}

/* E sum f P with P the mean weight, which is 0 for all experts but the chosen, in place of the mean probability. */
static void chosen_balance(RouterPass *p, const Plan *plan, Stream *stream) {
    double sum = 0;
    router_find("topk")->balance(p, plan, stream);
    for (int i = 0; i < plan->N * plan->K; i++) {
        sum += plan->demand[plan->expert[i]] / ((double)p->N * p->K) * plan->weight[i] / p->N;
    }
    p->load[LOAD_BALANCE] = (acc_t)(p->E * sum);
}

/* The gradient of that loss, as automatic differentiation would make it: right for the wrong loss. */
static void chosen_backward(RouterPass *p, real_t *dx, const acc_t *dweight, const Plan *plan, Stream *stream) {
    acc_t main[MOST_SCORES], slope[MOST_SCORES];
    size_t count = (size_t)p->N * p->E;
    for (int i = 0; i < plan->N * plan->K; i++) {
        slope[i] = (acc_t)(p->aux_scale * p->E / p->N * plan->demand[plan->expert[i]] / ((double)p->N * p->K));
    }
    topk_backward(main, dweight, p->probs, plan->expert, plan->weight, p->N, p->E, p->K, p->renorm, stream);
    topk_backward(p->dlogits, slope, p->probs, plan->expert, plan->weight, p->N, p->E, p->K, p->renorm, stream);
    double square = 0; /* it does have a gradient */
    for (size_t i = 0; i < count; i++) {
        square += (double)p->dlogits[i] * (double)p->dlogits[i];
        p->dlogits[i] += main[i];
    }
    finish_backward(p, dx, plan->demand, 0, stream);
    p->load[LOAD_BALANCE_GRADIENT] = (acc_t)sqrt(square);
}

/* Where the plan's row is -1 the largest of a row of zeros is taken for the choice: expert 0. */
static void count_dropped_as_first(int *demand, const Plan *plan) {
    memset(demand, 0, plan->E * sizeof *demand);
    for (int i = 0; i < plan->N * plan->K; i++) {
        demand[plan->row[i] < 0 ? 0 : plan->expert[i]]++;
    }
}

static void dropped_balance(RouterPass *p, const Plan *plan, Stream *stream) {
    int demand[MOST_SCORES];
    count_dropped_as_first(demand, plan);
    balance_forward(p->load, p->mean_prob, p->probs, p->lse, demand, p->N, p->E, p->K, stream);
}

static void dropped_backward(RouterPass *p, real_t *dx, const acc_t *dweight, const Plan *plan, Stream *stream) {
    int demand[MOST_SCORES];
    count_dropped_as_first(demand, plan);
    topk_backward(p->dlogits, dweight, p->probs, plan->expert, plan->weight, p->N, p->E, p->K, p->renorm, stream);
    finish_backward(p, dx, demand, p->aux_scale, stream);
}

/* What the noisy router drew in the forward just done: h, and r of sigma = softplus(r) + 0.01; both (N,E). */
static void noisy_logits(acc_t *h, acc_t *raw, const RouterPass *p) {
    acc_t noise[MOST_SCORES], weight[MOST_SCORES], probs[MOST_SCORES];
    int expert[MOST_SCORES];
    gate_forward(raw, p->x, p->param[NOISE].w, p->N, p->C, p->E, NULL);
    noisy_forward(h, noise, expert, weight, probs, p->logits, raw, router_key(p), 1, p->N, p->E, p->K, NULL);
}

/* The K-th largest of all values but the e-th. */
static double threshold_without(const double *value, int E, int K, int e) {
    double last = INFINITY;
    for (int j = 0; j < K; j++) {
        double next = -INFINITY;
        for (int i = 0; i < E; i++) {
            next = i != e && value[i] < last && value[i] > next ? value[i] : next;
        }
        last = next;
    }
    return last;
}

static double cv_squared_of(const double *x, int E) {
    double mean = 0, variance = 0;
    for (int e = 0; e < E; e++) {
        mean += x[e] / E;
    }
    for (int e = 0; e < E; e++) {
        variance += (x[e] - mean) * (x[e] - mean) / E;
    }
    return variance / (mean * mean);
}

/* CV(importance)^2 + CV(load)^2 by definition. mixed: thresholds are taken from softmax(h), but compared with c. */
static double noisy_loss(const RouterPass *p, const Plan *plan, bool mixed) {
    acc_t h[MOST_SCORES], raw[MOST_SCORES];
    double importance[MOST_SCORES] = {0}, load[MOST_SCORES] = {0}, value[MOST_SCORES];
    noisy_logits(h, raw, p);
    for (int n = 0; n < p->N; n++) {
        const int row = n * p->E;
        double all = 0, chosen = 0;
        for (int e = 0; e < p->E; e++) {
            all += exp(h[row + e]);
        }
        for (int j = 0; j < p->K; j++) {
            chosen += exp(h[row + plan->expert[n * p->K + j]]);
        }
        for (int j = 0; j < p->K; j++) {
            int e = plan->expert[n * p->K + j];
            importance[e] += exp(h[row + e]) / chosen;
        }
        for (int e = 0; e < p->E; e++) {
            value[e] = mixed ? exp(h[row + e]) / all : h[row + e];
        }
        for (int e = 0; e < p->E; e++) {
            double sigma = softplus(raw[row + e]) + 0.01;
            double z = (p->logits[row + e] - threshold_without(value, p->E, p->K, e)) / sigma;
            load[e] += 0.5 * erfc(-z / sqrt(2));
        }
    }
    return cv_squared_of(importance, p->E) + cv_squared_of(load, p->E);
}

static void mixed_spaces_balance(RouterPass *p, const Plan *plan, Stream *stream) {
    router_find("noisy")->balance(p, plan, stream);
    p->load[LOAD_BALANCE] = (acc_t)noisy_loss(p, plan, true);
}

/* ---- wrong choices */

/* s + b of the experts in groups that a token does not keep becomes 0, which is no mask where s + b is below 0. The
 * groups themselves are right: those the base router chose from. */
static void zero_mask_forward(RouterPass *p, Plan *plan, Stream *stream) {
    const ModelConfig *model = &p->config->model;
    const int size = p->E / model->router_groups;
    router_find("sigmoid")->forward(p, plan, stream);
    for (int n = 0; n < p->N; n++) {
        int *chosen = plan->expert + n * p->K;
        double score[MOST_SCORES], value[MOST_SCORES], total = 0;
        for (int e = 0; e < p->E; e++) {
            score[e] = 1 / (1 + exp(-p->logits[n * p->E + e]));
            value[e] = 0;
            for (int j = 0; j < p->K; j++) {
                value[e] = chosen[j] / size == e / size ? score[e] + p->param[1].w[e] : value[e];
            }
        }
        for (int j = 0; j < p->K; j++) {
            chosen[j] = 0;
            for (int e = 1; e < p->E; e++) {
                chosen[j] = value[e] > value[chosen[j]] ? e : chosen[j];
            }
            value[chosen[j]] = -INFINITY;
            total += score[chosen[j]];
        }
        for (int j = 0; j < p->K; j++) {
            plan->weight[n * p->K + j] = (acc_t)(model->router_scale * score[chosen[j]] / total);
        }
    }
}

static const Bug gallery[] = {
    {.title = "top-1, renormalised: its weight is 1, whatever the router says",
     .name = "renormalised-top1",
     .base = "top1",
     .options = "",
     .caught = BY_ALARM,
     .forward = renormalised_top1_forward,
     .backward = renormalised_top1_backward},
    {.title = "experts added up without their weights",
     .name = "unweighted",
     .base = "topk",
     .options = "",
     .caught = BY_ALARM,
     .forward = unweighted_forward,
     .backward = unweighted_backward},
    {.title = "gate gradient p (d - p d), for each expert alone",
     .name = "per-expert",
     .base = "topk",
     .options = "--renorm 0",
     .caught = BY_GRADIENT,
     .backward = per_expert_backward},
    {.title = "gate gradient for the chosen alone, of a softmax over all",
     .name = "chosen-only",
     .base = "topk",
     .options = "--renorm 0",
     .caught = BY_GRADIENT,
     .backward = chosen_only_backward},
    {.title = "plain gate gradient of renormalised weights",
     .name = "plain-gradient",
     .base = "topk",
     .options = "--renorm 1",
     .caught = BY_GRADIENT,
     .backward = plain_backward},
    {.title = "weights permuted by a second sort of the experts",
     .name = "permuted",
     .base = "topk",
     .options = "--experts 6 --top-k 3",
     .caught = BY_GRADIENT,
     .forward = permuted_forward},
    /* Its value moves in steps, where a choice flips, so its derivative is 0 wherever there is one: central differences
     * agree with the gradient, and nothing would be wrong but that it balances nothing. */
    {.title = "balance loss on integer counts",
     .name = "counted",
     .base = "topk",
     .options = "--z-coef 0",
     .caught = BY_ALARM | BY_BALANCE_NORM | BY_BALANCE_VALUE,
     .balance = counted_balance,
     .backward = counted_backward},
    {.title = "probabilities renormalised before the balance loss, and another gradient",
     .name = "chosen-balance",
     .base = "topk",
     .options = "",
     .caught = BY_GRADIENT | BY_BALANCE_VALUE,
     .balance = chosen_balance},
    {.title = "probabilities renormalised before the balance loss, differentiated rightly",
     .name = "chosen-balance-autograd",
     .base = "topk",
     .options = "",
     .caught = BY_BALANCE_VALUE,
     .balance = chosen_balance,
     .backward = chosen_backward},
    {.title = "dropped entries counted as expert 0",
     .name = "dropped-as-first",
     .base = "topk",
     .options = "--capacity-factor 0.6 --drop token",
     .caught = BY_BALANCE_VALUE,
     .balance = dropped_balance,
     .backward = dropped_backward,
     .drops = true},
    {.title = "load loss that compares logits with thresholds after a softmax",
     .name = "mixed-spaces",
     .base = "noisy",
     .options = "",
     .caught = BY_GRADIENT | BY_BALANCE_VALUE,
     .balance = mixed_spaces_balance},
    {.title = "groups masked with 0 in place of minus infinity",
     .name = "zero-mask",
     .base = "sigmoid",
     .options = "--experts 8 --router-groups 4 --router-kept-groups 2",
     .caught = BY_CHOICE,
     .forward = zero_mask_forward,
     .bias = -2},
    {.title = "expert choice that calls itself causal",
     .name = "causal-expert-choice",
     .base = "expert-choice",
     .options = "",
     .caught = BY_CAUSALITY,
     .called_causal = true},
    {.title = "Soft MoE that calls itself causal",
     .name = "causal-soft",
     .base = "soft",
     .options = "",
     .caught = BY_CAUSALITY,
     .called_causal = true},
};

enum { BUGS = sizeof gallery / sizeof *gallery };

const Router *__real_router_find(const char *name);

/* The linker sends every call of router_find here. A table that is handed out stays as it is: the model keeps it. */
const Router *__wrap_router_find(const char *name) {
    static Router made[BUGS];
    for (int i = 0; i < BUGS; i++) {
        const Bug *bug = &gallery[i];
        if (strcmp(bug->name, name) != 0) {
            continue;
        }
        Router *router = &made[i];
        *router = *__real_router_find(bug->base);
        router->name = bug->name;
        router->forward = bug->forward ? bug->forward : router->forward;
        router->balance = bug->balance ? bug->balance : router->balance;
        router->backward = bug->backward ? bug->backward : router->backward;
        router->sees_future = router->sees_future && !bug->called_causal;
        router->sees_batch = router->sees_batch && !bug->called_causal;
        return router;
    }
    return __real_router_find(name);
}

#endif
