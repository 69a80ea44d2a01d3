/* Work is cut into pieces of one expert and some of its rows. A thread takes a piece through the whole network, so that
 * a, h and their gradients are used while they are in its cache; weight gradients follow in a second sweep, each
 * (expert, rows of W) with one owner. The pieces divide the work; they do not change bits (tile.h). */
#include "experts.h"

#include <assert.h>

#include "device.h"
#include "dispatch.h"
#include "tile.h"

enum { LEAST_ROWS = 8 * TILE_ROWS, MOST_ROWS = 2 * TILE_BLOCK, WEIGHT_ROWS = TILE_BLOCK };

#define GELU_CUBIC 0.044715
#define GELU_SLOPE 0.7978845608028654 /* sqrt(2 / pi) */

/* tanh(x) = 2 sigmoid(2x) - 1 */
static inline real_t gelu_gate(real_t a) {
    real_t inner = (real_t)GELU_SLOPE * (a + (real_t)GELU_CUBIC * a * a * a);
    return sigmoid(2 * inner);
}

/* h (H) from one row of a. */
static void activate(real_t *restrict h, const real_t *restrict a, ExpertShape shape) {
    int H = shape.H;
    real_t scale = (real_t)experts_scale(shape);
    if (shape.act == ACT_GELU) {
        for (int i = 0; i < H; i++) {
            h[i] = a[i] * gelu_gate(a[i]);
        }
    } else if (shape.act == ACT_SILU) {
        for (int i = 0; i < H; i++) {
            h[i] = scale * (a[i] * sigmoid(a[i]));
        }
    } else if (shape.act == ACT_IDENTITY) {
        for (int i = 0; i < H; i++) {
            h[i] = scale * a[i];
        }
    } else {
        for (int i = 0; i < H; i++) {
            h[i] = a[i] * sigmoid(a[i]) * a[H + i];
        }
    }
}

/* One element: u is the gradient of h were the weight 1. Writes w h and da, returns the unweighted h. */
static inline real_t swiglu_backward(real_t *h, real_t *da_gate, real_t *da_up, real_t gate, real_t up, real_t u,
                                     real_t w) {
    real_t s = sigmoid(gate), silu = gate * s;
    *da_gate = w * u * up * s * (1 + gate * (1 - s));
    *da_up = w * u * silu;
    *h = w * silu * up;
    return silu * up;
}

static inline real_t gelu_backward(real_t *h, real_t *da, real_t a, real_t u, real_t w) {
    real_t s = gelu_gate(a);
    real_t slope = (real_t)(2 * GELU_SLOPE) * (1 + (real_t)(3 * GELU_CUBIC) * a * a);
    *da = w * u * (s + a * s * (1 - s) * slope);
    *h = w * a * s;
    return a * s;
}

static inline real_t silu_backward(real_t *h, real_t *da, real_t a, real_t u, real_t w, real_t scale) {
    real_t s = sigmoid(a);
    *da = w * u * scale * s * (1 + a * (1 - s));
    *h = w * scale * (a * s);
    return scale * (a * s);
}

static inline real_t identity_backward(real_t *h, real_t *da, real_t a, real_t u, real_t w, real_t scale) {
    *da = w * u * scale;
    *h = w * scale * a;
    return scale * a;
}

/* One row: from u = dy W2 (in da's first H elements) to w h, da, and <u, h>, the gradient of the weight. */
static acc_t activate_backward(real_t *restrict h, real_t *restrict da, const real_t *restrict a, real_t w,
                               ExpertShape shape) {
    acc_t lane[LANES] = {0};
    int H = shape.H;
    real_t scale = (real_t)experts_scale(shape);
    for (int i = 0; i < H; i += LANES) {
        int count = H - i < LANES ? H - i : LANES;
        if (shape.act == ACT_SILU) {
            for (int j = 0; j < count; j++) {
                real_t u = da[i + j];
                lane[j] += u * silu_backward(h + i + j, da + i + j, a[i + j], u, w, scale);
            }
        } else if (shape.act == ACT_IDENTITY) {
            for (int j = 0; j < count; j++) {
                real_t u = da[i + j];
                lane[j] += u * identity_backward(h + i + j, da + i + j, a[i + j], u, w, scale);
            }
        } else if (shape.act == ACT_GELU) {
            for (int j = 0; j < count; j++) {
                real_t u = da[i + j];
                lane[j] += u * gelu_backward(h + i + j, da + i + j, a[i + j], u, w);
            }
        } else {
            for (int j = 0; j < count; j++) {
                real_t u = da[i + j];
                lane[j] += u * swiglu_backward(h + i + j, da + i + j, da + H + i + j, a[i + j], a[H + i + j], u, w);
            }
        }
    }
    return lanes_sum(lane);
}

/* A run of rows of one expert. */
typedef struct {
    int expert, first, rows;
} Piece;

static int pieces_of(const int *offset, int e, int size) {
    return (offset[e + 1] - offset[e] + size - 1) / size;
}

static int count_pieces(const int *offset, int E, int size) {
    int pieces = 0;
    for (int e = 0; e < E; e++) {
        pieces += pieces_of(offset, e, size);
    }
    return pieces;
}

static Piece find_piece(const int *offset, int size, int index) {
    int e = 0;
    while (index >= pieces_of(offset, e, size)) {
        index -= pieces_of(offset, e, size);
        e++;
    }
    int first = offset[e] + index * size;
    int left = offset[e + 1] - first;
    return (Piece){e, first, left < size ? left : size};
}

/* Rows of a piece: enough pieces that all threads stay busy, not so few rows that packing the weights shows. */
static int piece_rows(int rows) {
    int size = rows / (4 * device_threads());
    size = size < LEAST_ROWS ? LEAST_ROWS : size;
    return size > MOST_ROWS ? MOST_ROWS : size;
}

void experts_forward(real_t *y, real_t *a, real_t *h, RowSource source, const real_t *w1, const real_t *w2,
                     const int *offset, ExpertShape shape, int add_y, Stream *stream) {
    assert(!source.entry && "the CPU's dispatch writes rows out");
    const real_t *x = source.x;
    size_t C = shape.C, D = experts_y_width(shape), H = shape.H, A = experts_a_width(shape);
    int size = piece_rows(offset[shape.E]);
    int pieces = count_pieces(offset, shape.E, size);
#pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < pieces; i++) {
        Piece p = find_piece(offset, size, i);
        const real_t *p_x = x + p.first * C;
        real_t *p_a = a + p.first * A, *p_h = h + p.first * H, *p_y = y + p.first * D;
        block_multiply(p_a, A, p_x, C, 1, w1 + p.expert * A * C, 1, C, p.rows, A, C, 0);
        for (int r = 0; r < p.rows; r++) {
            activate(p_h + r * H, p_a + r * A, shape);
        }
        block_multiply(p_y, D, p_h, H, 1, w2 + p.expert * D * H, 1, H, p.rows, D, H, add_y);
    }
}

void experts_forward_again(real_t *a, real_t *h, RowSource source, const real_t *w1, const int *offset,
                           ExpertShape shape, Stream *stream) {
    assert(!source.entry && "the CPU's dispatch writes rows out");
    size_t C = shape.C, A = experts_a_width(shape);
    int size = piece_rows(offset[shape.E]);
    int pieces = count_pieces(offset, shape.E, size);
#pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < pieces; i++) {
        Piece p = find_piece(offset, size, i);
        block_multiply(a + p.first * A, A, source.x + p.first * C, C, 1, w1 + p.expert * A * C, 1, C, p.rows, A, C, 0);
    }
}

/* dw (M,N) of one expert = or += left (rows,M)^T right (rows,N), the WEIGHT_ROWS rows of dw from `first` on. */
static void weight_gradient(acc_t *dw, const real_t *left, const real_t *right, int first, int M, int N, int rows,
                            int add) {
    int count = M - first < WEIGHT_ROWS ? M - first : WEIGHT_ROWS;
    block_multiply(dw + (size_t)first * N, N, left + first, 1, M, right, N, 1, count, N, rows, add);
}

void experts_backward_rows(real_t *dx, acc_t *drow_weight, real_t *h, real_t *da, RowSource dy_source, const real_t *a,
                           const acc_t *row_weight, const real_t *w1, const real_t *w2, const int *offset,
                           ExpertShape shape, int add_dx, Stream *stream) {
    assert(!dy_source.entry && "the CPU's dispatch writes rows out");
    const real_t *dy = dy_source.x;
    size_t C = shape.C, D = experts_y_width(shape), H = shape.H, A = experts_a_width(shape);
    int size = piece_rows(offset[shape.E]);
    int pieces = count_pieces(offset, shape.E, size);
#pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < pieces; i++) {
        Piece p = find_piece(offset, size, i);
        const real_t *p_a = a + p.first * A;
        real_t *p_h = h + p.first * H, *p_da = da + p.first * A, *p_dx = dx + p.first * C;
        block_multiply(p_da, A, dy + p.first * D, D, 1, w2 + p.expert * D * H, H, 1, p.rows, H, D, 0);
        for (int r = 0; r < p.rows; r++) {
            acc_t weight = row_weight ? row_weight[p.first + r] : 1;
            acc_t dweight = activate_backward(p_h + r * H, p_da + r * A, p_a + r * A, weight, shape);
            if (drow_weight) {
                drow_weight[p.first + r] = add_dx ? drow_weight[p.first + r] + dweight : dweight;
            }
        }
        block_multiply(p_dx, C, p_da, A, 1, w1 + p.expert * A * C, C, 1, p.rows, C, A, add_dx);
    }
}

bool experts_store_rows(ExpertShape shape) {
    return false;
}

void experts_forward_to(RowTarget to, real_t *y, real_t *a, real_t *h, RowSource x, const real_t *w1, const real_t *w2,
                        const int *offset, ExpertShape shape, Stream *stream) {
    experts_forward(y, a, h, x, w1, w2, offset, shape, 0, stream);
    rows_put(to, y, offset, shape.E, shape.rows, experts_y_width(shape), stream);
}

void experts_backward_rows_to(RowTarget to, real_t *dx, acc_t *drow_weight, real_t *h, real_t *da, RowSource dy,
                              const real_t *a, const acc_t *row_weight, const real_t *w1, const real_t *w2,
                              const int *offset, ExpertShape shape, Stream *stream) {
    experts_backward_rows(dx, drow_weight, h, da, dy, a, row_weight, w1, w2, offset, shape, 0, stream);
    rows_put(to, dx, offset, shape.E, shape.rows, shape.C, stream);
}

void experts_backward_weights(acc_t *dw1, acc_t *dw2, const real_t *h, const real_t *da, RowSource dy_source,
                              RowSource source, const int *offset, ExpertShape shape, int add_dw, Stream *stream) {
    assert(!source.entry && !dy_source.entry && "the CPU's dispatch writes rows out");
    const real_t *x = source.x, *dy = dy_source.x;
    size_t C = shape.C, D = experts_y_width(shape), H = shape.H, A = experts_a_width(shape);
    int blocks1 = (A + WEIGHT_ROWS - 1) / WEIGHT_ROWS;
    int blocks2 = (D + WEIGHT_ROWS - 1) / WEIGHT_ROWS;
    int blocks = blocks1 + blocks2;
#pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < shape.E * blocks; i++) {
        int e = i / blocks, block = i % blocks;
        size_t first = offset[e];
        int rows = offset[e + 1] - offset[e];
        if (block < blocks1) {
            weight_gradient(dw1 + e * A * C, da + first * A, x + first * C, block * WEIGHT_ROWS, A, C, rows, add_dw);
        } else {
            weight_gradient(dw2 + e * D * H, dy + first * D, h + first * H, (block - blocks1) * WEIGHT_ROWS, D, H, rows,
                            add_dw);
        }
    }
}
