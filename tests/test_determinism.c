// build: both
/* Same bits whatever computes them: number of threads, repetition, and the company a row is in.
 *
 * Training that differs from run to run cannot be debugged, and rows that change with the batch make two expert
 * layouts, or one rank and four, different models. Upstream gradients are random: with all ones, sums of any order
 * agree by accident. Routing is also tried with every token on one expert, the longest sums there are.
 */
#include "operations.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>

#include <cmocka.h>

#include "../kernels/adamw.h"

enum { REPEATS = 10 };

/* Every operation of the table, forward and backward, at sizes that give every thread work. */
static void test_threads_and_repeats(void **state) {
    const Operation *op = *state;
    static const int threads[] = {1, 2, 4};
    int shapes = 0;
    for (int i = 0; i < 4 && op->large[i][0] > 0; i++, shapes++) {
        Case c;
        case_make(&c, op, op->large[i], (uint64_t)i + 1);
        size_t bytes = case_snapshot(&c, NULL);
        char *first = case_memory(&c, bytes, 1), *again = case_memory(&c, bytes, 1);
        for (int run = 0; run < REPEATS + 3; run++) {
            omp_set_num_threads(run < 3 ? threads[run] : 2);
            case_forward(op, &c);
            case_backward(op, &c);
            case_snapshot(&c, run == 0 ? first : again);
            if (run > 0 && memcmp(first, again, bytes) != 0) {
                fail_msg("%s, large shape %d: run %d differs from the first, with one thread", op->name, i, run);
            }
        }
        case_free(&c);
    }
    assert_true(shapes > 0);
}

static void test_adamw_threads(void **state) {
    enum { COUNT = 100003 };
    static const int threads[] = {1, 2, 4};
    AdamPiece pieces[2] = {{.count = 70001, .trained = 1, .decay = 0.1},
                           {.offset = 70001, .count = COUNT - 70001, .trained = 1, .decay = 0.1}};
    const AdamOptions options = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .clip = 1};
    const int chunks = adamw_number_chunks(pieces, 2);
    const double lr = 1e-2;
    real_t *first[3] = {0};
    double norm = 0;
    Case all = {.seed = 3};
    for (int run = 0; run < 3; run++) {
        Case c = {.seed = 3};
        real_t *piece[3] = {case_normal(&all, 1), NULL, NULL}, *grads = case_normal(&c, COUNT),
               *w = case_normal(&c, COUNT), loss = 1;
        AdamState adam = {0};
        double sums[2], partial[COUNT / ADAM_CHUNK + 2];
        assert_true(chunks <= (int)(sizeof partial / sizeof *partial));
        for (int i = 0; i < 3; i++) {
            piece[i] = case_reals(&all, COUNT);
        }
        memcpy(piece[0], w, COUNT * sizeof *w);
        omp_set_num_threads(threads[run]);
        for (int t = 0; t < 3; t++) {
            fill_normal(grads, COUNT, 0, 0.1, (uint64_t)t, 3);
            adamw_square_sums(sums, partial, grads, pieces, 2, chunks, NULL);
            adamw_begin(&adam, sums, 2, &loss, &lr, options, NULL);
            adamw_update(piece[0], w, piece[1], piece[2], grads, pieces, 2, chunks, &adam, options, NULL);
        }
        for (int i = 0; i < 3; i++) {
            if (run == 0) {
                first[i] = piece[i];
            }
            assert_bits(piece[i], first[i], COUNT);
        }
        norm = run == 0 ? adam.norm : norm;
        assert_true(adam.norm == norm && adam.norm > 1);
        case_free(&c);
    }
    case_free(&all);
}

/* ---- batch invariance: a row's result is its own affair */

/* A permutation of n. */
static void shuffle(int *order, int n, uint64_t seed) {
    for (int i = 0; i < n; i++) {
        order[i] = i;
    }
    for (int i = n - 1; i > 0; i--) {
        int j = (int)random_below(random_key(seed, RANDOM_TEST, 1), (uint64_t)i, (uint64_t)i + 1), swap = order[i];
        order[i] = order[j];
        order[j] = swap;
    }
}

static void permute_rows(real_t *out, const real_t *in, const int *order, int rows, int width) {
    for (int r = 0; r < rows; r++) {
        memcpy(out + (size_t)r * width, in + (size_t)order[r] * width, (size_t)width * sizeof *out);
    }
}

/* A product of rows with weights: forward, input gradient, or the router's map. */
typedef void (*RowProduct)(real_t *y, const real_t *x, const real_t *w, int N, int IN, int OUT);

static void product_forward(real_t *y, const real_t *x, const real_t *w, int N, int IN, int OUT) {
    matmul_forward(y, x, w, N, IN, OUT, NULL);
}

static void product_backward(real_t *y, const real_t *x, const real_t *w, int N, int IN, int OUT) {
    matmul_backward_input(y, x, w, N, OUT, IN, 0, NULL); /* w is (IN,OUT) here */
}

static void product_gate(real_t *y, const real_t *x, const real_t *w, int N, int IN, int OUT) {
    gate_forward(y, x, w, N, IN, OUT, NULL);
}

static void test_product_rows(void **state) {
    static const RowProduct products[] = {product_forward, product_backward, product_gate};
    static const int sizes[][3] = {{67, 129, 65}, {40, 300, 33}, {130, 17, 129}, {25, 1030, 8}, {300, 64, 64}};
    omp_set_num_threads(1); /* many small products; threads have their own test */
    for (size_t i = 0; i < 3 * (sizeof sizes / sizeof *sizes); i++) {
        RowProduct product = products[i % 3];
        int N = sizes[i / 3][0], IN = sizes[i / 3][1], OUT = sizes[i / 3][2];
        Case c = {.seed = i};
        real_t *x = case_normal(&c, (size_t)N * IN), *w = case_normal(&c, (size_t)OUT * IN),
               *y = case_reals(&c, (size_t)N * OUT);
        real_t *part = case_reals(&c, (size_t)N * OUT), *mixed = case_reals(&c, (size_t)N * IN);
        int *order = case_ints(&c, (size_t)N);
        product(y, x, w, N, IN, OUT);
        for (int chunk = 1; chunk <= N; chunk = chunk * 3 + 1) { /* alone, and in chunks that fit no tile */
            for (int n = 0; n < N; n += chunk) {
                int rows = N - n < chunk ? N - n : chunk;
                product(part + (size_t)n * OUT, x + (size_t)n * IN, w, rows, IN, OUT);
            }
            assert_bits(part, y, (size_t)N * OUT);
        }
        shuffle(order, N, i);
        permute_rows(mixed, x, order, N, IN);
        product(part, mixed, w, N, IN, OUT);
        for (int n = 0; n < N; n++) {
            assert_bits(part + (size_t)n * OUT, y + (size_t)order[n] * OUT, (size_t)OUT);
        }
        case_free(&c);
    }
}

/* One batch of rows through the experts, forward and backward to the rows. */
typedef struct {
    Case c;
    ExpertShape shape;
    int *offset;
    real_t *x, *dy, *weight;              /* in */
    real_t *y, *dx, *dweight, *dw1, *dw2; /* out */
} ExpertBatch;

static ExpertBatch expert_batch(ExpertShape shape, const int *offset) {
    ExpertBatch b = {.c = {.seed = 40}, .shape = shape};
    size_t rows = (size_t)shape.rows, A = (size_t)experts_a_width(shape), E = (size_t)shape.E;
    b.offset = case_ints(&b.c, E + 1);
    memcpy(b.offset, offset, (E + 1) * sizeof *offset);
    b.x = case_normal(&b.c, rows * shape.C);
    b.dy = case_normal(&b.c, rows * shape.C);
    b.weight = case_normal(&b.c, rows);
    b.y = case_reals(&b.c, rows * shape.C);
    b.dx = case_reals(&b.c, rows * shape.C);
    b.dweight = case_reals(&b.c, rows);
    b.dw1 = case_reals(&b.c, E * A * shape.C);
    b.dw2 = case_reals(&b.c, E * shape.C * shape.H);
    return b;
}

static void expert_batch_run(ExpertBatch *b, const real_t *w1, const real_t *w2) {
    size_t rows = (size_t)b->shape.rows, A = (size_t)experts_a_width(b->shape);
    Case scratch = {0};
    real_t *a = case_reals(&scratch, rows * A), *da = case_reals(&scratch, rows * A),
           *h = case_reals(&scratch, rows * b->shape.H);
    experts_forward(b->y, a, h, (RowSource){b->x, NULL, 0}, w1, w2, b->offset, b->shape, 0, NULL);
    experts_backward(b->dx, b->dweight, b->dw1, b->dw2, h, da, (RowSource){b->dy, NULL, 0}, (RowSource){b->x, NULL, 0},
                     a, b->weight, w1, w2, b->offset, b->shape, 0, 0, NULL);
    case_free(&scratch);
}

/* Takes row `from` of another batch as row `to`. */
static void expert_batch_take(ExpertBatch *b, int to, const ExpertBatch *other, int from) {
    int C = b->shape.C;
    memcpy(b->x + (size_t)to * C, other->x + (size_t)from * C, (size_t)C * sizeof *b->x);
    memcpy(b->dy + (size_t)to * C, other->dy + (size_t)from * C, (size_t)C * sizeof *b->dy);
    b->weight[to] = other->weight[from];
}

static void assert_same_row(const ExpertBatch *b, int to, const ExpertBatch *other, int from) {
    int C = b->shape.C;
    assert_bits(b->y + (size_t)to * C, other->y + (size_t)from * C, (size_t)C);
    assert_bits(b->dx + (size_t)to * C, other->dx + (size_t)from * C, (size_t)C);
    assert_bits(b->dweight + to, other->dweight + from, 1);
}

/* Expert 1 of three works on its rows; the same rows then come alone, in other order, and with other numbers of rows at
 * its neighbours. */
static void check_expert_rows(int gelu, int C, int H) {
    enum { E = 3, BEFORE = 37, ROWS = 61, AFTER = 5, ALL = BEFORE + ROWS + AFTER };
    ExpertShape shape = {.E = E, .C = C, .H = H, .rows = ALL, .act = gelu};
    size_t A = (size_t)experts_a_width(shape), one1 = A * C, one2 = (size_t)C * H;
    Case weights = {.seed = 50};
    real_t *w1 = case_normal(&weights, E * one1), *w2 = case_normal(&weights, E * one2);
    ExpertBatch all = expert_batch(shape, (int[]){0, BEFORE, BEFORE + ROWS, ALL});
    expert_batch_run(&all, w1, w2);

    for (int r = 0; r < ROWS; r++) { /* alone */
        shape.rows = 1;
        ExpertBatch one = expert_batch(shape, (int[]){0, 0, 1, 1});
        expert_batch_take(&one, 0, &all, BEFORE + r);
        expert_batch_run(&one, w1, w2);
        assert_same_row(&one, 0, &all, BEFORE + r);
        case_free(&one.c);
    }
    static const int neighbours[][2] = {{0, 0}, {1, 0}, {0, 200}, {13, 64}};
    for (int i = 0; i < 4; i++) { /* other counts beside it; the weights' gradients keep their bits too */
        int before = neighbours[i][0], after = neighbours[i][1];
        shape.rows = before + ROWS + after;
        ExpertBatch other = expert_batch(shape, (int[]){0, before, before + ROWS, before + ROWS + after});
        for (int r = 0; r < ROWS; r++) {
            expert_batch_take(&other, before + r, &all, BEFORE + r);
        }
        expert_batch_run(&other, w1, w2);
        for (int r = 0; r < ROWS; r++) {
            assert_same_row(&other, before + r, &all, BEFORE + r);
        }
        assert_bits(other.dw1 + one1, all.dw1 + one1, one1);
        assert_bits(other.dw2 + one2, all.dw2 + one2, one2);
        case_free(&other.c);
    }
    int order[ROWS];
    shuffle(order, ROWS, 51);
    shape.rows = ROWS;
    ExpertBatch mixed = expert_batch(shape, (int[]){0, 0, ROWS, ROWS}); /* permuted */
    for (int r = 0; r < ROWS; r++) {
        expert_batch_take(&mixed, r, &all, BEFORE + order[r]);
    }
    expert_batch_run(&mixed, w1, w2);
    for (int r = 0; r < ROWS; r++) {
        assert_same_row(&mixed, r, &all, BEFORE + order[r]);
    }
    for (int split = 1; split < ROWS; split += 11) { /* in two chunks */
        for (int half = 0; half < 2; half++) {
            int first = half ? split : 0, rows = half ? ROWS - split : split;
            shape.rows = rows;
            ExpertBatch chunk = expert_batch(shape, (int[]){0, 0, rows, rows});
            for (int r = 0; r < rows; r++) {
                expert_batch_take(&chunk, r, &all, BEFORE + first + r);
            }
            expert_batch_run(&chunk, w1, w2);
            for (int r = 0; r < rows; r++) {
                assert_same_row(&chunk, r, &all, BEFORE + first + r);
            }
            case_free(&chunk.c);
        }
    }
    case_free(&mixed.c);
    case_free(&all.c);
    case_free(&weights);
}

static void test_expert_rows(void **state) {
    omp_set_num_threads(1); /* many small batches; threads have their own test */
    for (int gelu = 0; gelu <= 1; gelu++) {
        check_expert_rows(gelu, 65, 49);
        check_expert_rows(gelu, 32, 96);
        check_expert_rows(gelu, 7, 300);
    }
}

/* A sequence gives the same bits alone and as one of a batch. */
static void check_attention_sequences(int causal) {
    enum { B = 3, T = 70, NH = 4, NKV = 2, HS = 16, QK = (NH + NKV) * HS, W = QK + NKV * HS, O = NH * HS };
    Case c = {.seed = 60};
    real_t *qk = case_normal(&c, B * T * QK), *qkv = case_normal(&c, B * T * W);
    real_t *dout = case_normal(&c, B * T * O), *out = case_reals(&c, B * T * O);
    real_t *dqkv = case_reals(&c, B * T * W), *lse = case_reals(&c, B * NH * T);
    real_t *one_out = case_reals(&c, T * O), *one_dqkv = case_reals(&c, T * W), *one_lse = case_reals(&c, NH * T);
    AttentionShape all = {B, T, NH, NKV, HS, causal}, one = {1, T, NH, NKV, HS, causal};
    omp_set_num_threads(2);
    attention_forward(out, lse, qk, qkv, all, NULL);
    attention_backward(dqkv, dout, out, lse, qk, qkv, all, NULL);
    for (int b = 0; b < B; b++) {
        const real_t *one_qk = qk + b * T * QK, *one_qkv = qkv + b * T * W;
        attention_forward(one_out, one_lse, one_qk, one_qkv, one, NULL);
        attention_backward(one_dqkv, dout + b * T * O, one_out, one_lse, one_qk, one_qkv, one, NULL);
        assert_bits(one_out, out + b * T * O, T * O);
        assert_bits(one_lse, lse + b * NH * T, NH * T);
        assert_bits(one_dqkv, dqkv + b * T * W, T * W);
    }
    case_free(&c);
}

static void test_attention_sequences(void **state) {
    check_attention_sequences(1);
    check_attention_sequences(0);
}

int main(void) {
    struct CMUnitTest tests[64] = {
        cmocka_unit_test(test_adamw_threads),
        cmocka_unit_test(test_product_rows),
        cmocka_unit_test(test_expert_rows),
        cmocka_unit_test(test_attention_sequences),
    };
    size_t count = 4;
    for (size_t i = 0; operation_at(i); i++) {
        const Operation *op = operation_at(i);
        tests[count++] = (struct CMUnitTest){op->name, test_threads_and_repeats, NULL, NULL, (void *)(uintptr_t)op};
    }
    CHECK(count < sizeof tests / sizeof *tests, "raise the size of tests[]");
    return _cmocka_run_group_tests("operations: determinism", tests, count, NULL, NULL);
}
