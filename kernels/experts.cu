/* The experts as grouped products: two forward (up, down), five backward (hidden, input, and one weight gradient for
 * each of W1 and W2). Activations, the row's weight and its gradient are parts of the products that make or use them;
 * each step's result is an array of experts.h, so nothing but a row's gradient in parts needs scratch memory.
 *
 * Which kernels multiply is decided once per call, from the card, the widths and the addresses. Read next: grouped.cuh
 * (the products), grouped_plain.cuh (each of them at its simplest), grouped_mma.cuh, grouped_wgmma.cuh.
 */
#include "cuda.cuh"

extern "C" {
#include "dispatch.h"
#include "experts.h"
}

#include "grouped_plain.cuh"
#ifdef REAL_BF16
#include "grouped_mma.cuh"
#include "grouped_wgmma.cuh"
#endif

/* The path of a call, all of whose products take the same. `addresses` is the bitwise or of its arrays of real_t:
 * every row must begin at a multiple of 16 bytes for the tensor cores. */
static KernelPath choose_path(Grouped g, uintptr_t addresses) {
    bool widths = g.shape.C % 8 == 0 && g.shape.H % 8 == 0 && experts_y_width(g.shape) % 8 == 0;
    bool tensor_cores = sizeof(real_t) == 2 && widths && addresses % 16 == 0;
    if (cuda_fastest_path() == PATH_PLAIN || !tensor_cores) {
        return PATH_PLAIN;
    }
#ifdef REAL_BF16
    if (cuda_fastest_path() == PATH_WGMMA && wgmma_fits(g)) {
        return PATH_WGMMA;
    }
#endif
    return PATH_MMA;
}

/* The same for products with an activation in them, where those of adapters are plain. */
static KernelPath choose_active_path(Grouped g, uintptr_t addresses) {
    bool adapter = g.shape.act == ACT_SILU || g.shape.act == ACT_IDENTITY;
    return adapter ? PATH_PLAIN : choose_path(g, addresses);
}

#define BITS(pointer) reinterpret_cast<uintptr_t>(pointer)

/* BY(path, up(...)) is plain_up(...), mma_up(...) or wgmma_up(...). */
#ifdef REAL_BF16
#define BY(path, call)             \
    if (path == PATH_WGMMA) {      \
        wgmma_##call;              \
    } else if (path == PATH_MMA) { \
        mma_##call;                \
    } else {                       \
        plain_##call;              \
    }
#else
#define BY(path, call) \
    (void)path;        \
    plain_##call;
#endif

void experts_forward(real_t *y, real_t *a, real_t *h, RowSource x, const real_t *w1, const real_t *w2,
                     const int *offset, ExpertShape shape, int add_y, Stream *stream) {
    Grouped g = {shape, offset, cuda_stream(stream), 0};
    KernelPath path = choose_active_path(g, BITS(y) | BITS(a) | BITS(h) | BITS(x.x) | BITS(w1) | BITS(w2));
    BY(path, up(a, h, x, w1, g))
    BY(path, down(y, h, w2, add_y, g))
}

void experts_forward_again(real_t *a, real_t *h, RowSource x, const real_t *w1, const int *offset, ExpertShape shape,
                           Stream *stream) {
    Grouped g = {shape, offset, cuda_stream(stream), 0};
    KernelPath path = choose_active_path(g, BITS(a) | BITS(h) | BITS(x.x) | BITS(w1));
    BY(path, up(a, h, x, w1, g))
}

void experts_backward_rows(real_t *dx, acc_t *drow_weight, real_t *h, real_t *da, RowSource dy, const real_t *a,
                           const acc_t *row_weight, const real_t *w1, const real_t *w2, const int *offset,
                           ExpertShape shape, int add_dx, Stream *stream) {
    Grouped g = {shape, offset, cuda_stream(stream), add_dx};
    KernelPath path = choose_active_path(g, BITS(dx) | BITS(h) | BITS(da) | BITS(dy.x) | BITS(a) | BITS(w1) | BITS(w2));
    BY(path, hidden(h, da, drow_weight, dy, a, row_weight, w2, g))
    BY(path, input(dx, da, w1, add_dx, g))
}

bool experts_store_rows(ExpertShape shape) {
#ifdef REAL_BF16
    Grouped g = {shape, NULL, NULL, 0};
    return choose_active_path(g, 0) == PATH_WGMMA;
#else
    return false;
#endif
}

void experts_forward_to(RowTarget to, real_t *y, real_t *a, real_t *h, RowSource x, const real_t *w1, const real_t *w2,
                        const int *offset, ExpertShape shape, Stream *stream) {
#ifdef REAL_BF16
    Grouped g = {shape, offset, cuda_stream(stream), 0};
    uintptr_t addresses = BITS(to.rows.of[0]) | BITS(a) | BITS(h) | BITS(x.x) | BITS(w1) | BITS(w2);
    if (choose_active_path(g, addresses) == PATH_WGMMA) {
        wgmma_up(a, h, x, w1, g);
        wgmma_down_to(to, h, w2, g);
        return;
    }
#endif
    experts_forward(y, a, h, x, w1, w2, offset, shape, 0, stream);
    rows_put(to, y, offset, shape.E, shape.rows, experts_y_width(shape), stream);
}

void experts_backward_rows_to(RowTarget to, real_t *dx, acc_t *drow_weight, real_t *h, real_t *da, RowSource dy,
                              const real_t *a, const acc_t *row_weight, const real_t *w1, const real_t *w2,
                              const int *offset, ExpertShape shape, Stream *stream) {
#ifdef REAL_BF16
    Grouped g = {shape, offset, cuda_stream(stream), 0};
    uintptr_t addresses = BITS(to.rows.of[0]) | BITS(h) | BITS(da) | BITS(dy.x) | BITS(a) | BITS(w1) | BITS(w2);
    if (choose_active_path(g, addresses) == PATH_WGMMA) {
        wgmma_hidden(h, da, drow_weight, dy, a, row_weight, w2, g);
        wgmma_input_to(to, da, w1, g);
        return;
    }
#endif
    experts_backward_rows(dx, drow_weight, h, da, dy, a, row_weight, w1, w2, offset, shape, 0, stream);
    rows_put(to, dx, offset, shape.E, shape.rows, shape.C, stream);
}

void experts_backward_weights(acc_t *dw1, acc_t *dw2, const real_t *h, const real_t *da, RowSource dy, RowSource x,
                              const int *offset, ExpertShape shape, int add_dw, Stream *stream) {
    Grouped g = {shape, offset, cuda_stream(stream), 0};
    KernelPath path = choose_path(g, BITS(dw1) | BITS(dw2) | BITS(h) | BITS(da) | BITS(dy.x) | BITS(x.x));
    int A = experts_a_width(shape);
    RowSource da_rows = {da, NULL, 0}, h_rows = {h, NULL, 0};
    BY(path, weight(dw2, dy, h_rows, experts_y_width(shape), shape.H, add_dw, g))
    BY(path, weight(dw1, da_rows, x, A, shape.C, add_dw, g))
}
