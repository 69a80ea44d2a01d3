/* Per-head RMSNorm and rotary embedding on the CPU, one head of one row at a time.
 *
 * Backward turns the gradient back (a rotation's transpose is the rotation by -angle), then goes through the norm as
 * norm.c does. The two weights are shared by all rows and heads, so their gradients are summed over CHUNKS fixed ranges
 * of rows, added in order at the end: the same bits for any number of threads. Called by model/attention_block.c before
 * attention.
 */
#include "rope.h"

#include <string.h>

#include "check.h"
#include "vector.h"

enum { CHUNKS = 64 };

void rope_table(acc_t *table, int positions, int HS, double base, Stream *stream) {
    int half = HS / 2;
#pragma omp parallel for schedule(static)
    for (int i = 0; i < half; i++) {
        double frequency = pow(base, -2.0 * i / HS);
        for (int position = 0; position < positions; position++) {
            acc_t *row = table + (size_t)position * HS;
            row[i] = (acc_t)cos(position * frequency);
            row[half + i] = (acc_t)sin(position * frequency);
        }
    }
}

/* One head: out = rotate(q * scale * w), w NULL: all ones. cosine (HS/2), the sines after it. */
static void head_forward(real_t *restrict out, const real_t *q, acc_t scale, const real_t *w, const acc_t *cosine,
                         int half) {
    const acc_t *sine = cosine + half;
    if (!w) {
        for (int i = 0; i < half; i++) {
            out[i] = q[i] * cosine[i] - q[half + i] * sine[i];
            out[half + i] = q[half + i] * cosine[i] + q[i] * sine[i];
        }
        return;
    }
    for (int i = 0; i < half; i++) {
        real_t a = q[i] * scale * w[i];
        real_t b = q[half + i] * scale * w[half + i];
        out[i] = a * cosine[i] - b * sine[i];
        out[half + i] = b * cosine[i] + a * sine[i];
    }
}

void rope_forward(real_t *qk, acc_t *rstd, const real_t *qkv, const real_t *q_weight, const real_t *k_weight,
                  const acc_t *table, RopeShape shape, Stream *stream) {
    int HS = shape.HS, rotated = shape.NH + shape.NKV;
    int width = (rotated + shape.NKV) * HS;
#pragma omp parallel for schedule(static) if (shape.N > 1)
    for (int n = 0; n < shape.N; n++) {
        const acc_t *cosine = table + (size_t)(shape.start + n % shape.T) * HS;
        for (int head = 0; head < rotated; head++) {
            const real_t *q = qkv + (size_t)n * width + (size_t)head * HS;
            const real_t *w = head < shape.NH ? q_weight : k_weight;
            acc_t r = 1;
            if (w) {
                r = (acc_t)(1 / sqrt((double)dot(q, q, HS) / HS + shape.eps));
                rstd[(size_t)n * rotated + head] = r;
            }
            head_forward(qk + ((size_t)n * rotated + head) * HS, q, r, w, cosine, HS / 2);
        }
    }
}

/* du = dout turned back by the angle. du may not be dout. */
static void turn_back(real_t *restrict du, const real_t *dout, const acc_t *cosine, int half) {
    const acc_t *sine = cosine + half;
    for (int i = 0; i < half; i++) {
        du[i] = dout[i] * cosine[i] + dout[half + i] * sine[i];
        du[half + i] = dout[half + i] * cosine[i] - dout[i] * sine[i];
    }
}

/* Through the norm of one head: dq from du, dw accumulates. du is scratch afterwards. */
static void head_norm_backward(real_t *restrict dq, acc_t *restrict dw, real_t *restrict du, const real_t *q,
                               const real_t *w, acc_t r, int HS) {
    for (int i = 0; i < HS; i++) {
        dw[i] += du[i] * (q[i] * r);
        du[i] *= w[i];
    }
    acc_t along = r * r * r * dot(du, q, HS) / HS; /* how much of the gradient lies along q */
    for (int i = 0; i < HS; i++) {
        dq[i] = r * du[i] - along * q[i];
    }
}

void rope_backward(real_t *dqkv, acc_t *dq_weight, acc_t *dk_weight, const acc_t *rstd, const real_t *qkv,
                   const real_t *q_weight, const real_t *k_weight, const acc_t *table, RopeShape shape,
                   Stream *stream) {
    int HS = shape.HS, rotated = shape.NH + shape.NKV;
    int width = (rotated + shape.NKV) * HS;
    CHECK(HS <= ROPE_MOST_HEAD, "a head size of %d is above %d: raise --heads or lower --dim", HS, ROPE_MOST_HEAD);
    acc_t dw[CHUNKS][2][ROPE_MOST_HEAD]; /* of each chunk of rows: for the queries' weight, for the keys' */
    int rows = (shape.N + CHUNKS - 1) / CHUNKS;
#pragma omp parallel for schedule(static) if (shape.N > 1)
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        memset(dw[chunk][0], 0, (size_t)HS * sizeof(acc_t));
        memset(dw[chunk][1], 0, (size_t)HS * sizeof(acc_t));
        int end = (chunk + 1) * rows < shape.N ? (chunk + 1) * rows : shape.N;
        for (int n = chunk * rows; n < end; n++) {
            const acc_t *cosine = table + (size_t)(shape.start + n % shape.T) * HS;
            size_t row = (size_t)n * width;
            for (int head = 0; head < rotated; head++) {
                size_t at = row + (size_t)head * HS;
                const real_t *w = head < shape.NH ? q_weight : k_weight;
                real_t du[ROPE_MOST_HEAD];
                turn_back(du, dqkv + at, cosine, HS / 2);
                if (w) {
                    acc_t r = rstd[(size_t)n * rotated + head];
                    head_norm_backward(dqkv + at, dw[chunk][head >= shape.NH], du, qkv + at, w, r, HS);
                } else {
                    memcpy(dqkv + at, du, (size_t)HS * sizeof *du);
                }
            }
        }
    }
    if (!q_weight) {
        return;
    }
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        for (int i = 0; i < HS; i++) {
            dq_weight[i] += dw[chunk][0][i];
            dk_weight[i] += dw[chunk][1][i];
        }
    }
}
