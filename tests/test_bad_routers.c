// build: double
// link: -Wl,--wrap=router_find
/* The gallery of known-bad routers goes through the checks that the routers of this project pass: each must be caught
 * by the checks that its row names and by no other, and the router it should have been by none.
 *
 * The checks are small forms of what other tests do at length: central differences (test_model_grad.c), the alarm and
 * the norm of the balance losses' gradient, which every run logs, values and choices by definition
 * (test_balance_loss.c, test_noisy.c, test_sigmoid_topk.c), and the exchange of later tokens (test_causality.c).
 * Read next: bad_routers.h, the gallery.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <unistd.h>

#include "bad_routers.h"
#include "model_grad.h"
#include "threads.h"

#include "../model/alarm.h"

static const char *const check_names[CHECKS] = {"gradient",      "alarm",  "balance norm",
                                                "balance value", "choice", "causality"};

/* ---- the checks */

static bool gradient_is_wrong(Subject *s) {
    bool wrong = false;
    objective_gradient(s, true);
    for (int i = 0; i < s->model.tensors.count; i++) {
        const Tensor *tensor = &s->model.tensors.items[i];
        double norm;
        wrong |= tensor->kind == TENSOR_ROUTER && !(tensor_error(s, tensor, tensor->count, &norm) <= 1e-6);
    }
    assert_false(s->choices_changed);
    return wrong;
}

/* Whether the alarm of a training run rings at what the last gradient left, and says why. */
static bool alarm_rings(Subject *s) {
    char text[4096];
    FILE *file = tmpfile();
    assert_non_null(file);
    Arena arena = {0};
    Optimizer optimizer;
    Readback readback = {0};
    Alarms alarms = {0};
    Log log = {.fd = fileno(file)};
    optimizer_reserve(&optimizer, &s->model.tensors, &arena);
    arena_commit(&arena);
    objective_gradient(s, true);
    figures_request(&readback, &s->model, &optimizer, NULL);
    StepFigures figures = figures_read(&readback, &s->model, &optimizer);
    int standing = alarms_check(&alarms, &figures, &s->model, 1, &log, "# ");
    ssize_t length = pread(log.fd, text, sizeof text - 1, 0);
    assert_true(length >= 0);
    text[length] = '\0';
    assert_int_equal(standing > 0, strstr(text, "no gradient from the") != NULL);
    assert_true(standing == 0 || standing == s->model.moe_count);
    figures_free(&figures);
    readback_free(&readback);
    alarms_free(&alarms);
    arena_free(&arena);
    fclose(file);
    return standing > 0;
}

static bool balance_has_no_gradient(Subject *s) {
    bool none = false;
    objective_gradient(s, true);
    for (int i = 0; i < s->model.moe_count; i++) {
        const MoeLayer *moe = s->model.moes[i];
        bool weighs = moe->router->has_balance_loss && moe->pass.aux_scale > 0;
        none |= weighs && moe->pass.load[LOAD_BALANCE_GRADIENT] == 0;
    }
    return none;
}

/* E sum f P: f of all choices, dropped or not, P of the softmax over all experts. */
static double softmax_loss(const RouterPass *p, const Plan *plan) {
    double f[MOST_SCORES] = {0}, loss = 0;
    for (int i = 0; i < p->N * p->K; i++) {
        f[plan->expert[i]] += 1.0 / (p->N * p->K);
    }
    for (int n = 0; n < p->N; n++) {
        const acc_t *logit = p->logits + n * p->E;
        double all = 0;
        for (int e = 0; e < p->E; e++) {
            all += exp(logit[e]);
        }
        for (int e = 0; e < p->E; e++) {
            loss += p->E * f[e] * exp(logit[e]) / all / p->N;
        }
    }
    return loss;
}

static bool is_made_from(const Bug *bug, const char *base) {
    return strcmp(bug->base, base) == 0;
}

static bool balance_value_is_wrong(Subject *s, const Bug *bug) {
    bool wrong = false;
    objective_value(s);
    for (int i = 0; i < s->model.moe_count; i++) {
        const RouterPass *p = &s->model.moes[i]->pass;
        const Plan *plan = &s->model.moes[i]->plan;
        double value = p->load[LOAD_BALANCE], right = value;
        if (is_made_from(bug, "topk") || is_made_from(bug, "top1")) {
            right = softmax_loss(p, plan);
        } else if (is_made_from(bug, "noisy")) {
            right = noisy_loss(p, plan, false);
        }
        wrong |= !(fabs(value - right) <= 1e-12 * (1 + right));
    }
    return wrong;
}

/* What token n ranks its experts by; minus infinity where the groups that it keeps leave them out. */
static void rank_experts(double *value, const MoeLayer *moe, const Bug *bug, int n) {
    const RouterPass *p = &moe->pass;
    const ModelConfig *model = &p->config->model;
    int E = p->E, size = E / model->router_groups;
    acc_t h[MOST_SCORES], raw[MOST_SCORES];
    if (is_made_from(bug, "noisy")) {
        noisy_logits(h, raw, p);
    }
    for (int e = 0; e < E; e++) {
        double logit = p->logits[n * E + e];
        value[e] = is_made_from(bug, "noisy")     ? h[n * E + e]
                   : is_made_from(bug, "sigmoid") ? 1 / (1 + exp(-logit)) + p->param[1].w[e]
                                                  : logit;
    }
    if (!is_made_from(bug, "sigmoid")) {
        return;
    }
    assert_int_equal(size, 2); /* the two best of a group are all of it */
    bool left_out[MOST_SCORES];
    for (int e = 0; e < E; e++) {
        int better = 0; /* groups */
        for (int i = 0; i < E; i += size) {
            better += value[i] + value[i + 1] > value[e / size * size] + value[e / size * size + 1];
        }
        left_out[e] = better >= model->router_kept_groups;
    }
    for (int e = 0; e < E; e++) {
        value[e] = left_out[e] ? -INFINITY : value[e];
    }
}

static bool choice_is_wrong(Subject *s, const Bug *bug) {
    bool wrong = false;
    objective_value(s);
    for (int i = 0; i < s->model.moe_count; i++) {
        const MoeLayer *moe = s->model.moes[i];
        for (int n = 0; n < s->model.N && moe->router->plan == PLAN_TOKENS_CHOOSE; n++) {
            double value[MOST_SCORES], least = INFINITY;
            int no_worse = 0;
            rank_experts(value, moe, bug, n);
            for (int j = 0; j < moe->plan.K; j++) {
                least = fmin(least, value[moe->plan.expert[n * moe->plan.K + j]]);
            }
            for (int e = 0; e < moe->plan.E; e++) {
                no_worse += value[e] >= least;
            }
            wrong |= no_worse != moe->plan.K;
        }
    }
    return wrong;
}

/* Tokens of one text are exchanged from some position on. What stands before may change with it only where the router
 * declares so: in that text (later tokens), in earlier texts (others of the batch). */
static bool declaration_is_wrong(Subject *s) {
    const Router *router = s->model.moes[0]->router;
    const int T = s->model.T, C = s->config.model.dim, V = s->config.model.vocab;
    bool wrong = false;
    size_t bytes = (size_t)s->model.N * C * sizeof(real_t);
    real_t *before = malloc(bytes);
    assert_non_null(before);
    objective_value(s);
    memcpy(before, s->model.hidden, bytes);
    for (int first = 1; first < s->model.N; first++) {
        int kept[64], end = (first / T + 1) * T;
        memcpy(kept, s->tokens, s->model.N * sizeof(int));
        for (int n = first; n < end; n++) {
            s->tokens[n] = (s->tokens[n] + 1 + n % (V - 1)) % V;
        }
        transformer_forward(&s->model, s->tokens, 0, NULL);
        for (int n = 0; n < first; n++) {
            bool changed = memcmp(before + n * C, s->model.hidden + n * C, C * sizeof(real_t)) != 0;
            wrong |= changed && !(n / T == first / T ? router->sees_future : router->sees_batch);
        }
        memcpy(s->tokens, kept, s->model.N * sizeof(int));
    }
    free(before);
    return wrong;
}

/* ---- the gallery */

static void draw_suited(Subject *s, const Bug *bug) {
    for (uint64_t seed = 1; seed < 500; seed++) {
        subject_draw(s, seed);
        for (int i = 0; i < s->model.tensors.count; i++) {
            const Tensor *t = &s->model.tensors.items[i];
            for (size_t j = 0; j < t->count && name_ends(t->name, ".bias"); j++) {
                s->model.master[t->offset + j] += (acc_t)bug->bias;
            }
        }
        if (subject_suits(s, bug->drops)) {
            return;
        }
    }
    fail_msg("no weights of many make plans that stay as they are");
}

/* The checks that find something wrong with `router`, which is the bad one or what it should be. */
static unsigned checks_failed(const Bug *bug, const char *router) {
    char options[256];
    Subject s;
    snprintf(options, sizeof options, "%s --router %s", bug->options, router);
    subject_open(&s, options, 0);
    assert_true(s.slices == 1 && s.model.N <= 64 && s.model.N * s.config.model.experts <= MOST_SCORES);
    draw_suited(&s, bug);
    unsigned failed = 0;
    failed |= gradient_is_wrong(&s) ? BY_GRADIENT : 0;
    failed |= alarm_rings(&s) ? BY_ALARM : 0;
    failed |= balance_has_no_gradient(&s) ? BY_BALANCE_NORM : 0;
    failed |= balance_value_is_wrong(&s, bug) ? BY_BALANCE_VALUE : 0;
    failed |= choice_is_wrong(&s, bug) ? BY_CHOICE : 0;
    failed |= declaration_is_wrong(&s) ? BY_CAUSALITY : 0;
    subject_close(&s);
    return failed;
}

static const char *names_of(unsigned checks, char *text, size_t size) {
    size_t used = 0;
    snprintf(text, size, "none");
    for (int i = 0; i < CHECKS; i++) {
        if (checks >> i & 1) {
            used += (size_t)snprintf(text + used, size - used, "%s%s", used ? ", " : "", check_names[i]);
        }
    }
    return text;
}

static void test_bug(void **state) {
    const Bug *bug = *state;
    char found[128], expected[128];
    unsigned failed = checks_failed(bug, bug->name), failed_right = checks_failed(bug, bug->base);
    if (bug->caught == 0 || failed != bug->caught) {
        fail_msg("%s: caught by %s, expected %s", bug->name, names_of(failed, found, sizeof found),
                 names_of(bug->caught, expected, sizeof expected));
    }
    if (failed_right) {
        fail_msg("%s %s, which should pass: caught by %s", bug->base, bug->options,
                 names_of(failed_right, found, sizeof found));
    }
    print_message("# caught by %s\n", names_of(failed, found, sizeof found));
}

/* The bad routers are no routers of the program. */
static void test_gallery_stays_here(void **state) {
    for (int i = 0; i < BUGS; i++) {
        assert_non_null(router_find(gallery[i].name));
        assert_null(__real_router_find(gallery[i].name));
        assert_non_null(__real_router_find(gallery[i].base));
        for (int r = 0; router_at(r); r++) {
            assert_string_not_equal(router_at(r)->name, gallery[i].name);
        }
    }
}

int main(void) {
    struct CMUnitTest tests[BUGS + 1] = {cmocka_unit_test(test_gallery_stays_here)};
    for (int i = 0; i < BUGS; i++) {
        tests[i + 1] = (struct CMUnitTest){gallery[i].title, test_bug, NULL, NULL, (void *)(uintptr_t)&gallery[i]};
    }
    omp_set_num_threads(1); /* starting threads would be all the work */
    return _cmocka_run_group_tests("known-bad routers", tests, BUGS + 1, NULL, NULL);
}
