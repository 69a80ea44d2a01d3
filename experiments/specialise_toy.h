/* A mixture of linear experts that can be worked out on paper: its data, its loss and gradient, what it learned, and
 * the floor under everything that a gate can do with experts that saw the same.
 *
 *     N samples, EACH of every task s = 0 .. TASKS-1
 *     x (IN)        = CENTRE * unit vector s + noise, uniform in [-1, 1] in each coordinate
 *     y (OUT)       = x W_s, W_s (IN, OUT) normal
 *     expert e      answers x V_e                              (V_e (IN, OUT))
 *     gate          p = softmax(x G) (EXPERTS), q = (1 - explore) p + explore / EXPERTS
 *     error l_e     = |y - x V_e|^2
 *     loss          = mean over samples of sum_e q_e l_e       (Jacobs, Jordan, Nowlan, Hinton 1991)
 *     balance       = EXPERTS * sum_e P_e^2, P_e the mean of p_e over samples; 1 when experts are used alike
 *     objective     = loss + balance_coef * balance
 *
 * One expert, drawn from q, answers alone (top-1): the loss is what it is expected to lose, and its gradient is what
 * such draws give on average. With explore = 1 who answers is left to chance.
 *
 * The clusters are separable: coordinate s is above CENTRE - 1 in cluster s and below 1 in the others, so a gate G = c
 * times the first TASKS unit vectors finds the task of every sample, and with V_e = W_e the loss is 0.
 *
 * Included by specialise_toy.c, which says what is asked of it, and by the test of its gradient. Nothing is allocated.
 */
#ifndef EXPERIMENTS_SPECIALISE_TOY_H
#define EXPERIMENTS_SPECIALISE_TOY_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "../kernels/random.h"

enum { TASKS = 4, EXPERTS = TASKS, IN = 8, OUT = 2, EACH = 64, N = TASKS * EACH };
static const double CENTRE = 3;

typedef struct {
    double x[N][IN], y[N][OUT];
    int cluster[N];
} ToyData;

/* Weights, or the gradient of each. */
typedef struct {
    double expert[EXPERTS][IN][OUT];
    double gate[IN][EXPERTS];
} ToyModel;

static inline void toy_data(ToyData *data, uint64_t seed) {
    uint64_t tasks = random_key(seed, RANDOM_TRAIN_DATA, 0), noise = random_key(seed, RANDOM_TRAIN_DATA, 1);
    for (int n = 0; n < N; n++) {
        int s = n % TASKS;
        data->cluster[n] = s;
        memset(data->y[n], 0, sizeof data->y[n]);
        for (int i = 0; i < IN; i++) {
            double x = (i == s ? CENTRE : 0) + 2 * random_uniform(noise, (uint64_t)(n * IN + i)) - 1;
            data->x[n][i] = x;
            for (int o = 0; o < OUT; o++) {
                data->y[n][o] += x * random_normal(tasks, (uint64_t)((s * IN + i) * OUT + o));
            }
        }
    }
}

/* Normal weights of these standard deviations. */
static inline void toy_init(ToyModel *model, uint64_t seed, double expert_std, double gate_std) {
    uint64_t experts = random_key(seed, RANDOM_INIT, 0), gate = random_key(seed, RANDOM_INIT, 1);
    double *v = &model->expert[0][0][0], *g = &model->gate[0][0];
    for (int i = 0; i < EXPERTS * IN * OUT; i++) {
        v[i] = expert_std * random_normal(experts, (uint64_t)i);
    }
    for (int i = 0; i < IN * EXPERTS; i++) {
        g[i] = gate_std * random_normal(gate, (uint64_t)i);
    }
}

/* p (EXPERTS) of one sample. */
static inline void toy_gate(double *p, const ToyModel *model, const double *x) {
    double most = -INFINITY, sum = 0;
    for (int e = 0; e < EXPERTS; e++) {
        p[e] = 0;
        for (int i = 0; i < IN; i++) {
            p[e] += x[i] * model->gate[i][e];
        }
        most = fmax(most, p[e]);
    }
    for (int e = 0; e < EXPERTS; e++) {
        p[e] = exp(p[e] - most);
        sum += p[e];
    }
    for (int e = 0; e < EXPERTS; e++) {
        p[e] /= sum;
    }
}

/* l_e; residual (OUT) = x V_e - y. */
static inline double toy_error(double *residual, const ToyModel *model, int e, const double *x, const double *y) {
    double error = 0;
    for (int o = 0; o < OUT; o++) {
        residual[o] = -y[o];
        for (int i = 0; i < IN; i++) {
            residual[o] += x[i] * model->expert[e][i][o];
        }
        error += residual[o] * residual[o];
    }
    return error;
}

/* The objective, and its gradient unless that is NULL. What logit e loses or saves is a cost c_e weighted by p_e:
 *
 *     c_e      = (1 - explore) l_e + 2 balance_coef EXPERTS P_e
 *     dlogit_e = p_e (c_e - sum_f p_f c_f) / N           dG   = sum_n x^T dlogit
 *     r        = x V_e - y                               dV_e = sum_n 2 q_e / N x^T r
 */
static inline double toy_objective(ToyModel *gradient, const ToyModel *model, const ToyData *data, double explore,
                                   double balance_coef) {
    double p[N][EXPERTS], used[EXPERTS] = {0}, objective = 0;
    for (int n = 0; n < N; n++) {
        toy_gate(p[n], model, data->x[n]);
        for (int e = 0; e < EXPERTS; e++) {
            used[e] += p[n][e] / N;
        }
    }
    if (gradient) {
        memset(gradient, 0, sizeof *gradient);
    }
    for (int n = 0; n < N; n++) {
        const double *x = data->x[n];
        double residual[EXPERTS][OUT], q[EXPERTS], cost[EXPERTS], expected = 0;
        for (int e = 0; e < EXPERTS; e++) {
            double error = toy_error(residual[e], model, e, x, data->y[n]);
            q[e] = (1 - explore) * p[n][e] + explore / EXPERTS;
            cost[e] = (1 - explore) * error + 2 * balance_coef * EXPERTS * used[e];
            expected += p[n][e] * cost[e];
            objective += q[e] * error / N;
        }
        for (int e = 0; gradient && e < EXPERTS; e++) {
            double dlogit = p[n][e] * (cost[e] - expected) / N;
            for (int i = 0; i < IN; i++) {
                gradient->gate[i][e] += x[i] * dlogit;
                for (int o = 0; o < OUT; o++) {
                    gradient->expert[e][i][o] += 2 * q[e] / N * x[i] * residual[e][o];
                }
            }
        }
    }
    for (int e = 0; e < EXPERTS; e++) {
        objective += balance_coef * EXPERTS * used[e] * used[e];
    }
    return objective;
}

typedef struct {
    double loss;    /* of the gate's likeliest expert, which answers alone */
    double oracle;  /* of the best expert for each sample: no gate can do better with these experts */
    double nmi;     /* 2 I(expert, cluster) / (H(expert) + H(cluster)), of the likeliest expert */
    double entropy; /* of p, mean over samples, in nats */
} ToyFigures;

static inline double toy_plogp(double p) {
    return p > 0 ? p * log(p) : 0;
}

static inline ToyFigures toy_measure(const ToyModel *model, const ToyData *data) {
    ToyFigures f = {0};
    double both[EXPERTS][TASKS] = {{0}}, information = 0, entropies = 0;
    for (int n = 0; n < N; n++) {
        double p[EXPERTS], residual[OUT], best = INFINITY, answer = 0;
        int chosen = 0;
        toy_gate(p, model, data->x[n]);
        for (int e = 0; e < EXPERTS; e++) {
            double error = toy_error(residual, model, e, data->x[n], data->y[n]);
            best = fmin(best, error);
            if (e == 0 || p[e] > p[chosen]) {
                chosen = e;
                answer = error;
            }
            f.entropy -= toy_plogp(p[e]) / N;
        }
        f.loss += answer / N;
        f.oracle += best / N;
        both[chosen][data->cluster[n]] += 1.0 / N;
    }
    for (int e = 0; e < EXPERTS; e++) {
        double share = 0;
        for (int s = 0; s < TASKS; s++) {
            information += toy_plogp(both[e][s]);
            share += both[e][s];
        }
        entropies -= toy_plogp(share);
    }
    entropies += log(TASKS);
    information += entropies;
    f.nmi = 2 * information / entropies;
    return f;
}

/* The smallest loss of a single linear expert on this data: least squares, V = (X^T X)^-1 X^T Y, by Cholesky. Experts
 * that are all alike are one expert, whatever a gate does, so this is the floor under them. */
static inline double toy_floor(const ToyData *data) {
    double a[IN][IN] = {{0}}, b[IN][OUT] = {{0}};
    ToyModel best = {0};
    for (int n = 0; n < N; n++) {
        for (int i = 0; i < IN; i++) {
            for (int j = 0; j < IN; j++) {
                a[i][j] += data->x[n][i] * data->x[n][j];
            }
            for (int o = 0; o < OUT; o++) {
                b[i][o] += data->x[n][i] * data->y[n][o];
            }
        }
    }
    for (int j = 0; j < IN; j++) { /* a = L L^T, L in its lower half */
        for (int i = j; i < IN; i++) {
            for (int k = 0; k < j; k++) {
                a[i][j] -= a[i][k] * a[j][k];
            }
            a[i][j] = i == j ? sqrt(a[j][j]) : a[i][j] / a[j][j];
        }
    }
    for (int o = 0; o < OUT; o++) {
        for (int i = 0; i < IN; i++) {
            for (int k = 0; k < i; k++) {
                b[i][o] -= a[i][k] * b[k][o];
            }
            b[i][o] /= a[i][i];
        }
        for (int i = IN - 1; i >= 0; i--) {
            for (int k = i + 1; k < IN; k++) {
                b[i][o] -= a[k][i] * b[k][o];
            }
            b[i][o] /= a[i][i];
        }
    }
    memcpy(best.expert[0], b, sizeof b);
    double loss = 0, residual[OUT];
    for (int n = 0; n < N; n++) {
        loss += toy_error(residual, &best, 0, data->x[n], data->y[n]) / N;
    }
    return loss;
}

#endif
