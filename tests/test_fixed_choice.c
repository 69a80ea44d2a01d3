// build: both
/* Choices that nothing learned: all different within a token, as even or as skewed as they claim to be, functions of
 * their key alone. Draws are held against exact probabilities, within the error that the number of draws allows.
 */
#include "gradcheck.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>

#include <cmocka.h>

#include "../kernels/fixed_choice.h"

enum { LIMIT = 5 }; /* standard deviations that a draw may be off: about 1 in 2 million */

static uint64_t test_key(uint64_t stream) {
    return random_key(8, RANDOM_TEST, stream);
}

static void assert_valid(const int *expert, int N, int E, int K) {
    for (int n = 0; n < N; n++) {
        for (int j = 0; j < K; j++) {
            assert_in_range(expert[n * K + j], 0, E - 1);
            for (int i = 0; i < j; i++) {
                assert_int_not_equal(expert[n * K + i], expert[n * K + j]);
            }
        }
    }
}

static void count_experts(int *count, const int *expert, int entries, int E) {
    memset(count, 0, (size_t)E * sizeof *count);
    for (int i = 0; i < entries; i++) {
        count[expert[i]]++;
    }
}

/* A few frequencies as text has them: falling as 1/rank, in an order that is not that of the ids. */
static void fill_zipf_frequency(double *frequency, int V) {
    for (int v = 0; v < V; v++) {
        frequency[v] = 1000.0 / (1 + (int)((int64_t)v * 7919 % V));
    }
}

/* Every maker at every edge: one token, one expert, K = E, N that E does not divide. */
static void test_experts_of_a_token_differ(void **state) {
    static const int shapes[][3] = {{1, 1, 1}, {1, 4, 4}, {9, 2, 1}, {50, 5, 3}, {33, 8, 8}, {64, 16, 2}, {20, 17, 6}};
    for (int i = 0; i < 7; i++) {
        int N = shapes[i][0], E = shapes[i][1], K = shapes[i][2];
        Case c = {.seed = 1};
        int *expert = case_ints(&c, (size_t)N * K), *tokens = case_ints(&c, (size_t)N);
        acc_t *table = case_poison(&c, (size_t)N * K);
        double *frequency = case_doubles(&c, (size_t)N);
        fill_zipf_frequency(frequency, N);
        for (int n = 0; n < N; n++) {
            tokens[n] = N - 1 - n;
        }
        for (int kind = 0; kind < 8; kind++) {
            memset(expert, 77, (size_t)N * K * sizeof *expert);
            switch (kind) {
                case 0: position_choice(expert, 3, N, N, E, K, NULL); break;
                case 1: balanced_choice(expert, 0, N, E, K, NULL); break;
                case 2: one_choice(expert, 0, N, E, K, NULL); break;
                case 3:
                case 4:
                case 5:
                    zipf_choice(expert, (double[]){0, 1.5, 100}[kind - 3], &(uint64_t){test_key(1)}, 0, N, E, K, NULL);
                    break;
                default:
                    balanced_table(table, kind == 6 ? NULL : frequency, test_key(2), N, E, K);
                    table_choice(expert, tokens, table, N, K, NULL);
            }
            assert_valid(expert, N, E, K);
        }
        case_free(&c);
    }
}

/* ---- by table */

static void test_table_choice(void **state) {
    const acc_t table[3 * 2] = {5, 0, 1, 4, 3, 2};
    const int tokens[4] = {2, 0, 2, 1}, expected[4 * 2] = {3, 2, 5, 0, 3, 2, 1, 4};
    int expert[4 * 2];
    table_choice(expert, tokens, table, 4, 2, NULL);
    assert_memory_equal(expert, expected, sizeof expected);
}

/* load[j*E + e]: frequency of the tokens whose column j names e */
static void table_load(double *load, const acc_t *table, const double *frequency, int V, int E, int K) {
    memset(load, 0, (size_t)K * E * sizeof *load);
    for (int i = 0; i < V * K; i++) {
        load[i % K * E + (int)table[i]] += frequency ? frequency[i / K] : 1;
    }
}

/* Equal frequencies: V/E tokens for each expert of each column where E divides V, else that rounded down or up. */
static void test_table_of_equal_tokens_is_exact(void **state) {
    static const int shapes[][3] = {{64, 8, 1}, {64, 8, 2},  {60, 5, 5}, {256, 16, 7},
                                    {48, 3, 2}, {101, 8, 3}, {5, 7, 2}};
    for (int i = 0; i < 7 * 2; i++) {
        int V = shapes[i / 2][0], E = shapes[i / 2][1], K = shapes[i / 2][2];
        Case c = {.seed = 1};
        acc_t *table = case_poison(&c, (size_t)V * K);
        double *frequency = case_doubles(&c, (size_t)V), *load = case_doubles(&c, (size_t)K * E);
        for (int v = 0; v < V; v++) {
            frequency[v] = 0.1; /* its sums are rounded */
        }
        balanced_table(table, i % 2 ? frequency : NULL, test_key((uint64_t)i), V, E, K);
        table_load(load, table, NULL, V, E, K);
        for (int j = 0; j < K * E; j++) {
            assert_true(load[j] == V / E || (V % E > 0 && load[j] == V / E + 1));
        }
        case_free(&c);
    }
}

/* In the first column a token goes to an expert whose load is at most the mean so far, so no load passes the mean by
 * more than one frequency; later columns pass over the experts that the token has, and the next lightest will do. The
 * heaviest token, half of all in every other case, shares its first expert with no other.
 */
static void test_table_of_unequal_tokens_is_even(void **state) {
    static const int shapes[][3] = {{1000, 8, 1}, {1000, 8, 2}, {1000, 8, 3}, {500, 16, 4}, {300, 7, 2}};
    for (int i = 0; i < 5 * 2; i++) {
        int V = shapes[i / 2][0], E = shapes[i / 2][1], K = shapes[i / 2][2], heavy = V / 3;
        Case c = {.seed = 1};
        acc_t *table = case_poison(&c, (size_t)V * K);
        double *frequency = case_doubles(&c, (size_t)V), *load = case_doubles(&c, (size_t)K * E);
        fill_zipf_frequency(frequency, V);
        double total = 0, largest = 0;
        for (int v = 0; v < V; v++) {
            total += v == heavy ? 0 : frequency[v];
        }
        frequency[heavy] = i % 2 ? total : frequency[heavy];
        total = 0;
        for (int v = 0; v < V; v++) {
            total += frequency[v];
            largest = fmax(largest, frequency[v]);
        }
        balanced_table(table, frequency, test_key((uint64_t)i), V, E, K);
        table_load(load, table, frequency, V, E, K);
        for (int j = 0; j < K * E; j++) {
            assert_true(load[j] <= total / E + largest);
        }
        for (int v = 0; v < V && i % 2; v++) {
            assert_true(v == heavy || table[v * K] != table[heavy * K]);
        }
        case_free(&c);
    }
}

/* The same key gives the same table; another one gives another, of which about 1/E agrees in each column. */
static void test_table_is_a_function_of_its_key(void **state) {
    enum { V = 800, E = 8, K = 2 };
    acc_t table[V * K], again[V * K], other[V * K];
    balanced_table(table, NULL, 1, V, E, K);
    balanced_table(again, NULL, 1, V, E, K);
    balanced_table(other, NULL, 2, V, E, K);
    assert_bits(again, table, V * K);
    int agree = 0, pairs[E * E] = {0}, used = 0;
    for (int i = 0; i < V * K; i++) {
        agree += table[i] == other[i];
    }
    for (int v = 0; v < V; v++) {
        used += pairs[(int)table[v * K] * E + (int)table[v * K + 1]]++ == 0;
    }
    double share = 1.0 / E, deviation = sqrt(V * K * share * (1 - share));
    assert_true(fabs(agree - V * K * share) <= LIMIT * deviation);
    assert_int_equal(used, E * (E - 1)); /* the second expert does not follow from the first */
    int dealt = 0;
    for (int v = 0; v < V; v += E) {
        int experts = 0;
        for (int i = v; i < v + E; i++) {
            experts |= 1 << (int)table[i * K];
        }
        dealt += experts == (1 << E) - 1;
    }
    assert_true(dealt < 10); /* ids next to each other are not dealt all experts in turn: 8!/8^8 = 0.2% of 100 are */
}

/* ---- by index */

static void test_choices_by_index(void **state) {
    enum { N = 24, T = 12, E = 5, K = 3 };
    int position[N * K], balanced[N * K], one[N * K], count[E];
    position_choice(position, 4, N, T, E, K, NULL);
    balanced_choice(balanced, 0, N, E, K, NULL);
    one_choice(one, 0, N, E, K, NULL);
    for (int i = 0; i < N * K; i++) {
        int n = i / K, j = i % K;
        assert_int_equal(position[i], ((4 + n % T) * K + j) % E);
        assert_int_equal(balanced[i], i % E);
        assert_int_equal(one[i], j == 0 ? 0 : 1 + (2 * n + j - 1) % 4);
    }
    assert_bits(position + T * K, position, T * K); /* the second sequence is the first again */
    count_experts(count, balanced, 10 * K, E);
    for (int e = 0; e < E; e++) {
        assert_int_equal(count[e], 10 * K / E);
    }
}

/* Generating a token at a time gives what the whole sequence gave. */
static void test_position_of_one_token(void **state) {
    enum { T = 9, E = 7, K = 3 };
    int all[T * K], single[K];
    position_choice(all, 0, T, T, E, K, NULL);
    for (int t = 0; t < T; t++) {
        position_choice(single, t, 1, 1, E, K, NULL);
        assert_bits(single, all + t * K, K);
    }
}

static void test_one_choice_counts(void **state) {
    static const int shapes[][3] = {{60, 7, 1}, {60, 7, 3}, {60, 4, 4}, {61, 7, 2}};
    for (int i = 0; i < 4; i++) {
        int N = shapes[i][0], E = shapes[i][1], K = shapes[i][2], expert[61 * 4], count[7];
        one_choice(expert, 0, N, E, K, NULL);
        count_experts(count, expert, N * K, E);
        assert_int_equal(count[0], N);
        for (int e = 1; e < E; e++) { /* the rest dealt out in turn */
            assert_in_range(count[e], N * (K - 1) / (E - 1), (N * (K - 1) + E - 2) / (E - 1));
        }
    }
}

/* ---- by dice */

/* With p_e ~ (e+1)^-s and counts c_e of N draws, CV^2 = E Q - 1 where Q = sum (c_e / N)^2, and at c = N p that is the
 * closed form E sum p^2 - 1. The mean of Q is sum p^2 + (1 - sum p^2) / N, which is taken off. Its variance, from
 * c_e / N = p_e + d_e with the multinomial covariance (p_e [e=f] - p_e p_f) / N:
 *
 *     first order, 2 sum p_e d_e      4 (sum p^3 - (sum p^2)^2) / N        zero where all p are equal
 *     second order, sum d_e^2         at most 2 sum p^2 / N^2              all there is where they are
 */
static void test_zipf_cv(void **state) {
    enum { N = 60000, E = 16 };
    static const double exponents[] = {0, 0.5, 1, 2};
    Case c = {.seed = 1};
    int *expert = case_ints(&c, N), count[E];
    for (int i = 0; i < 4; i++) {
        double p[E], sum = 0, p2 = 0, p3 = 0, q = 0;
        for (int e = 0; e < E; e++) {
            sum += p[e] = pow(e + 1, -exponents[i]);
        }
        zipf_choice(expert, exponents[i], &(uint64_t){test_key((uint64_t)i)}, 0, N, E, 1, NULL);
        count_experts(count, expert, N, E);
        for (int e = 0; e < E; e++) {
            p[e] /= sum;
            p2 += p[e] * p[e];
            p3 += p[e] * p[e] * p[e];
            double share = (double)count[e] / N;
            q += share * share;
            assert_true(fabs(count[e] - N * p[e]) <= LIMIT * sqrt(N * p[e] * (1 - p[e])));
        }
        double cv2 = E * (q - (1 - p2) / N) - 1, expected = E * p2 - 1;
        double deviation = E * sqrt(4 * (p3 - p2 * p2) / N + 2 * p2 / ((double)N * N));
        assert_true(fabs(cv2 - expected) <= LIMIT * deviation);
        assert_true(LIMIT * deviation < 0.05 * (1 + expected)); /* the allowance is small beside what is measured */
    }
    case_free(&c);
}

/* With equal chances the step from a token's expert to the next token's is as likely to be any of the E. */
static void test_zipf_tokens_are_independent(void **state) {
    enum { N = 20001, E = 8 };
    Case c = {.seed = 1};
    int *expert = case_ints(&c, N), count[E] = {0};
    zipf_choice(expert, 0, &(uint64_t){test_key(20)}, 0, N, E, 1, NULL);
    for (int n = 1; n < N; n++) {
        count[(expert[n] - expert[n - 1] + E) % E]++;
    }
    for (int e = 0; e < E; e++) {
        double mean = (N - 1.0) / E;
        assert_true(fabs(count[e] - mean) <= LIMIT * sqrt(mean * (1 - 1.0 / E)));
    }
    case_free(&c);
}

/* Successive draws without replacement: first a, then b of those left, with probability p_a p_b / (1 - p_a). */
static void test_zipf_pairs(void **state) {
    enum { N = 60000, E = 4, K = 2 };
    static const double exponents[] = {0, 1, 2};
    Case c = {.seed = 1};
    int *expert = case_ints(&c, N * K);
    for (int i = 0; i < 3; i++) {
        double p[E], sum = 0;
        int count[E * E] = {0};
        for (int e = 0; e < E; e++) {
            sum += p[e] = pow(e + 1, -exponents[i]);
        }
        zipf_choice(expert, exponents[i], &(uint64_t){test_key(10 + (uint64_t)i)}, 0, N, E, K, NULL);
        for (int n = 0; n < N; n++) {
            count[expert[n * K] * E + expert[n * K + 1]]++;
        }
        for (int j = 0; j < E * E; j++) {
            double a = p[j / E] / sum, b = p[j % E] / sum, pair = j / E == j % E ? 0 : a * b / (1 - a);
            assert_true(fabs(count[j] - N * pair) <= LIMIT * sqrt(N * pair * (1 - pair)));
        }
    }
    case_free(&c);
}

/* Fewer experts of the same draw are the first of more, steep slopes give the order of the experts, and a key decides
 * everything, for any number of threads. */
static void test_zipf_is_a_function_of_its_key(void **state) {
    enum { N = 500, E = 12 };
    int all[N * E], three[N * 3], again[N * 3];
    zipf_choice(all, 0.7, &(uint64_t){5}, 0, N, E, E, NULL);
    zipf_choice(three, 0.7, &(uint64_t){5}, 0, N, E, 3, NULL);
    for (int i = 0; i < N * 3; i++) {
        assert_int_equal(three[i], all[i / 3 * E + i % 3]);
    }
    for (int threads = 2; threads <= 4; threads++) {
        omp_set_num_threads(threads);
        zipf_choice(again, 0.7, &(uint64_t){5}, 0, N, E, 3, NULL);
        assert_bits(again, three, N * 3);
    }
    omp_set_num_threads(1);
    zipf_choice(again, 0.7, &(uint64_t){6}, 0, N, E, 3, NULL);
    assert_memory_not_equal(again, three, sizeof three);
    zipf_choice(three, 1000, &(uint64_t){5}, 0, N, E, 3, NULL);
    for (int i = 0; i < N * 3; i++) {
        assert_int_equal(three[i], i % 3);
    }
}

/* ---- weights, shares, projections */

static void test_equal_weight_and_shares(void **state) {
    enum { N = 21, E = 9 };
    for (int K = 1; K <= E; K++) {
        int expert[N * E];
        acc_t weight[N * E], probs[N * E];
        zipf_choice(expert, 1, &(uint64_t){7}, 0, N, E, K, NULL);
        equal_weight(weight, N, K, NULL);
        fill_value(probs, N * E, NAN);
        choice_probs(probs, expert, weight, N, E, K, NULL);
        for (int n = 0; n < N; n++) {
            double sum = 0;
            int there = 0;
            for (int e = 0; e < E; e++) {
                sum += probs[n * E + e];
                there += probs[n * E + e] == (acc_t)1 / K;
                assert_true(probs[n * E + e] == 0 || probs[n * E + e] == (acc_t)1 / K);
            }
            assert_near(sum, 1);
            assert_int_equal(there, K);
            for (int j = 0; j < K; j++) {
                assert_true(probs[n * E + expert[n * K + j]] == weight[n * K + j]);
            }
        }
    }
}

static void test_shares_of_missing_entries(void **state) {
    const int expert[2 * 3] = {2, -1, 0, -1, -1, -1};
    const acc_t weight[2 * 3] = {0.5, 0, 0.25, 0, 0, 0}, expected[2 * 3] = {0.25, 0, 0.5, 0, 0, 0};
    acc_t probs[2 * 3];
    fill_value(probs, 6, NAN);
    choice_probs(probs, expert, weight, 2, 3, 3, NULL);
    assert_bits(probs, expected, 6);
}

/* Mean of n normal numbers: standard error std / sqrt(n); their deviation: std / sqrt(2n). */
static void test_random_weights(void **state) {
    enum { COUNT = 40001 };
    const double std = 0.02;
    Case c = {.seed = 1};
    acc_t *w = case_poison(&c, COUNT), *again = case_poison(&c, COUNT), *other = case_poison(&c, COUNT);
    double sum = 0, square = 0, product = 0, next = 0;
    random_weights(w, std, &(uint64_t){1}, COUNT, NULL);
    for (int threads = 2; threads <= 4; threads++) {
        omp_set_num_threads(threads);
        random_weights(again, std, &(uint64_t){1}, COUNT, NULL);
        assert_bits(again, w, COUNT);
    }
    omp_set_num_threads(1);
    random_weights(again, std, &(uint64_t){1}, 100, NULL); /* a number does not depend on how many there are */
    assert_bits(again, w, COUNT);
    random_weights(other, std, &(uint64_t){2}, COUNT, NULL);
    for (int i = 0; i < COUNT; i++) {
        sum += w[i];
        square += (double)w[i] * w[i];
        product += (double)w[i] * other[i];
        next += (double)w[i] * w[(i + 1) % COUNT];
    }
    assert_true(fabs(sum / COUNT) <= LIMIT * std / sqrt(COUNT));
    assert_true(fabs(sqrt(square / COUNT) - std) <= LIMIT * std / sqrt(2.0 * COUNT));
    assert_true(fabs(product / COUNT) <= LIMIT * std * std / sqrt(COUNT)); /* two keys: independent */
    assert_true(fabs(next / COUNT) <= LIMIT * std * std / sqrt(COUNT));    /* and neighbours */
    case_free(&c);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_experts_of_a_token_differ),
        cmocka_unit_test(test_table_choice),
        cmocka_unit_test(test_table_of_equal_tokens_is_exact),
        cmocka_unit_test(test_table_of_unequal_tokens_is_even),
        cmocka_unit_test(test_table_is_a_function_of_its_key),
        cmocka_unit_test(test_choices_by_index),
        cmocka_unit_test(test_position_of_one_token),
        cmocka_unit_test(test_one_choice_counts),
        cmocka_unit_test(test_zipf_cv),
        cmocka_unit_test(test_zipf_tokens_are_independent),
        cmocka_unit_test(test_zipf_pairs),
        cmocka_unit_test(test_zipf_is_a_function_of_its_key),
        cmocka_unit_test(test_equal_weight_and_shares),
        cmocka_unit_test(test_shares_of_missing_entries),
        cmocka_unit_test(test_random_weights),
    };
    omp_set_num_threads(1); /* small calls; some tests set the number themselves */
    return cmocka_run_group_tests_name("fixed choices", tests, NULL, NULL);
}
