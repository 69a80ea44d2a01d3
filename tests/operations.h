/* The operations as one table: name, shapes, how to make inputs, forward, backward. gradcheck.h runs it.
 *
 * To add an operation: make, forward, backward in operations_dense.h or operations_moe.h and one row here.
 */
#ifndef TESTS_OPERATIONS_H
#define TESTS_OPERATIONS_H

#include "operations_dense.h"
#include "operations_moe.h"

#include "../kernels/check.h"

/* The table; NULL past its end. */
static inline const Operation *operation_at(size_t i) {
    static const Operation table[] = {
        {"embedding", "N C V", make_embedding, embedding_case_forward, embedding_case_backward,
         .shapes = {{7, 5, 4}, {1, 1, 1}, {9, 3, 20}}, .large = {{999, 65, 50}, {512, 64, 1}}},
        {"embedding_tied", "N C V", make_tied, tied_case_forward, tied_case_backward, .shapes = {{7, 5, 4}, {3, 17, 2}},
         .large = {{300, 64, 65}}},
        {"norm", "N C add", make_norm, norm_case_forward, norm_case_backward,
         .shapes = {{7, 5, 1}, {7, 5, 0}, {1, 3, 1}, {3, 35, 0}, {5, 16, 1}, {2, 1, 0}},
         .large = {{777, 129, 1}, {512, 128, 0}}},
        {"matmul", "N IN OUT accumulate", make_matmul, matmul_case_forward, matmul_case_backward,
         .shapes = {{7, 5, 3, 0}, {7, 5, 3, 1}, {1, 1, 1, 0}, {1, 19, 33, 1}, {13, 17, 9, 0}, {34, 3, 2, 1}},
         .large = {{257, 129, 193, 0}, {512, 64, 96, 1}, {1, 300, 500, 0}}},
        {"rope", "N T start NH NKV HS norm inplace", make_rope, rope_case_forward, rope_case_backward,
         .shapes = {{6, 3, 0, 2, 1, 4, 1, 0},
                    {6, 3, 0, 2, 1, 4, 1, 1},
                    {5, 5, 7, 3, 3, 6, 1, 0},
                    {4, 2, 1, 4, 2, 2, 0, 0},
                    {4, 2, 1, 4, 2, 2, 0, 1},
                    {1, 1, 0, 1, 1, 34, 1, 1}},
         .large = {{512, 128, 0, 4, 2, 32, 1, 0}, {512, 128, 3, 4, 4, 16, 0, 1}}},
        {"attention", "B T NH NKV HS", make_attention, attention_case_forward, attention_case_backward,
         .shapes =
             {{2, 5, 2, 1, 4}, {1, 1, 4, 2, 6}, {1, 9, 3, 1, 2}, {1, 17, 2, 2, 2}, {3, 2, 4, 4, 18}, {1, 66, 1, 1, 2}},
         .zero = {[1] = "q k"}, .large = {{3, 130, 4, 2, 32}, {2, 67, 3, 1, 16}}},
        {"gate", "N C E", make_gate, gate_case_forward, gate_case_backward,
         .shapes = {{7, 5, 3}, {1, 17, 8}, {9, 3, 1}, {2, 1, 33}}, .large = {{777, 129, 8}, {512, 64, 63}}},
        {"topk", "N E K renorm", make_topk, topk_case_forward, topk_case_backward,
         .shapes = {{7, 3, 1, 0},
                    {7, 3, 2, 0},
                    {7, 3, 2, 1},
                    {5, 4, 4, 0},
                    {5, 4, 4, 1},
                    {1, 9, 3, 1},
                    {6, 17, 8, 0},
                    {7, 3, 1, 1},
                    {3, 1, 1, 0}},
         .zero = {[7] = "logits", [8] = "logits"}, .large = {{999, 17, 4, 1}, {999, 8, 2, 0}}},
        {"balance", "N E K", make_balance, balance_case_forward, balance_case_backward,
         .shapes = {{7, 3, 1}, {7, 3, 2}, {5, 3, 3}, {1, 5, 2}, {9, 17, 4}}, .large = {{999, 17, 4}, {512, 8, 1}}},
        {"dispatch", "N C E K capacity layout drop skew accumulate", make_dispatch, dispatch_case_forward,
         dispatch_case_backward,
         .shapes = {{7, 5, 3, 2},
                    {7, 5, 3, 2, [8] = 1},
                    {7, 5, 3, 2, 0, LAYOUT_PADDED},
                    {7, 5, 3, 2, 3, LAYOUT_PADDED, DROP_SLOT, SKEW_ONE, 1},
                    {7, 5, 3, 2, 3, LAYOUT_COMPACT, DROP_WEIGHT, SKEW_EMPTY},
                    {1, 3, 4, 4}},
         .large = {{777, 65, 8, 2}, {777, 64, 8, 2, 100, LAYOUT_PADDED, DROP_TOKEN, SKEW_ONE, 1}}},
        {"combine", "N C E K capacity layout drop skew accumulate", make_combine, combine_case_forward,
         combine_case_backward,
         .shapes = {{7, 5, 3, 2},
                    {7, 5, 3, 2, [8] = 1},
                    {7, 5, 3, 2, 0, LAYOUT_PADDED},
                    {7, 5, 3, 2, 3, LAYOUT_PADDED, DROP_SLOT, SKEW_ONE, 1},
                    {7, 5, 3, 2, 3, LAYOUT_COMPACT, DROP_TOKEN, SKEW_EMPTY},
                    {1, 3, 4, 4}},
         .large = {{777, 65, 8, 2}, {777, 64, 8, 2, 100, LAYOUT_PADDED, DROP_TOKEN, SKEW_ONE, 1}}},
        {"experts", "rows C H E gelu skew weighted accumulate", make_experts, experts_case_forward,
         experts_case_backward,
         .shapes = {{7, 5, 3, 3, 0, SKEW_NONE, 1, 0},
                    {7, 5, 3, 3, 1, SKEW_NONE, 1, 0},
                    {7, 5, 3, 3, 0, SKEW_EMPTY, 1, 1},
                    {7, 5, 3, 3, 1, SKEW_ONE, 1, 0},
                    {9, 4, 19, 1, 0, SKEW_NONE, 0, 1},
                    {9, 17, 5, 1, 1, SKEW_NONE, 0, 0},
                    {1, 2, 1, 2, 0, SKEW_ONE, 1, 0}},
         .large = {{777, 65, 97, 8, 0, SKEW_NONE, 1, 0},
                   {777, 64, 96, 8, 1, SKEW_ONE, 1, 1},
                   {300, 32, 48, 1, 0, SKEW_NONE, 0, 1}}},
        {"cross_entropy", "N V", make_cross_entropy, cross_entropy_case_forward, cross_entropy_case_backward,
         .shapes = {{7, 5}, {1, 2}, {3, 65}, {5, 1}}, .zero = {[3] = "logits"}, .large = {{777, 257}}},
        {"moe_layer", "N C H E K renorm gelu capacity layout drop skew", make_moe, moe_case_forward, moe_case_backward,
         .shapes = {{7, 5, 3, 3, 2, 1},
                    {7, 5, 3, 3, 2, 0, 1},
                    {7, 5, 3, 3, 1, 0},
                    {7, 5, 3, 3, 1, 1},
                    {7, 5, 3, 3, 3, 1},
                    {7, 5, 3, 3, 3, 0, 1},
                    {1, 5, 3, 3, 2, 1},
                    {1, 1, 1, 4, 1, 0},
                    {7, 5, 3, 3, 2, 1, 0, 0, LAYOUT_PADDED},
                    {7, 5, 3, 3, 2, 0, 0, 0, LAYOUT_COMPACT, DROP_TOKEN, SKEW_EMPTY},
                    {7, 5, 3, 3, 1, 0, 1, 0, LAYOUT_PADDED, DROP_TOKEN, SKEW_ONE},
                    {7, 5, 3, 3, 2, 1, 0, 3, LAYOUT_COMPACT, DROP_TOKEN},
                    {7, 5, 3, 3, 2, 0, 1, 3, LAYOUT_PADDED, DROP_TOKEN},
                    {7, 5, 3, 3, 2, 1, 1, 2, LAYOUT_COMPACT, DROP_SLOT, SKEW_ONE},
                    {7, 5, 3, 3, 2, 0, 0, 3, LAYOUT_PADDED, DROP_SLOT},
                    {7, 5, 3, 3, 2, 0, 0, 2, LAYOUT_COMPACT, DROP_WEIGHT},
                    {7, 5, 3, 3, 2, 1, 1, 4, LAYOUT_PADDED, DROP_WEIGHT, SKEW_ONE},
                    {13, 18, 17, 5, 2, 1}},
         .large = {{513, 65, 49, 8, 2, 1},
                   {513, 64, 48, 8, 2, 0, 1, 0, LAYOUT_COMPACT, DROP_TOKEN, SKEW_ONE},
                   {513, 32, 48, 8, 2, 1, 0, 150, LAYOUT_PADDED, DROP_WEIGHT, SKEW_ONE}}},
    };
    return i < sizeof table / sizeof *table ? &table[i] : NULL;
}

static inline const Operation *operation_named(const char *name) {
    for (size_t i = 0; operation_at(i); i++) {
        if (strcmp(operation_at(i)->name, name) == 0) {
            return operation_at(i);
        }
    }
    die(__FILE__, __LINE__, "no operation '%s' in the table", name);
}

#endif
