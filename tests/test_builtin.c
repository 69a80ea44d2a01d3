/* The builtin corpus: its texts are what they claim, and their stated probabilities are the true ones.
 *
 * Two ways to see the latter: frequencies of bytes after every prefix that is common enough, and, for whole documents,
 * a second computation of the probability from the text alone. Read next: data/builtin.c. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <ctype.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../data/builtin.h"
#include "../kernels/random.h"

enum { STORY, ARITHMETIC, BRACKETS, RECALL, SORT, ECHO, DOMAINS, WEIGHTS = 14 };
static const int weights[DOMAINS] = {2, 2, 2, 3, 3, 2};

typedef struct {
    unsigned char bytes[BUILTIN_DOCUMENT_BYTES + 1]; /* ends in 0, to be read as a string */
    double nats[BUILTIN_DOCUMENT_BYTES];
    int length;
    int domain;
} Document;

static uint64_t train_key(void) {
    return random_key(1337, RANDOM_TRAIN_DATA, 0);
}

static uint64_t val_key(void) {
    return random_key(1337, RANDOM_VAL_DATA, 0);
}

static void make(Document *document, uint64_t key, uint64_t index) {
    document->length =
        builtin_document(key, index, builtin_all_domains(), document->bytes, document->nats, &document->domain);
    document->bytes[document->length] = 0;
}

static double total_nats(const Document *document) {
    double sum = 0.0;
    for (int i = 0; i < document->length; i++) {
        sum += document->nats[i];
    }
    return sum;
}

static void assert_close(double a, double b, double tolerance, const char *what) {
    if (!(fabs(a - b) <= tolerance)) {
        fail_msg("%s: %.15g and %.15g differ by more than %g", what, a, b, tolerance);
    }
}

static void test_documents_are_lines_of_printable_ascii(void **state) {
    static Document d;
    for (uint64_t i = 0; i < 20000; i++) {
        make(&d, train_key(), i);
        assert_in_range(d.length, 20, BUILTIN_DOCUMENT_BYTES);
        assert_in_range(d.domain, 0, builtin_domains() - 1);
        assert_int_equal(d.bytes[d.length - 1], '\n');
        for (int t = 0; t < d.length; t++) {
            assert_true(isprint(d.bytes[t]) || t == d.length - 1);
            assert_true(isfinite(d.nats[t]) && d.nats[t] >= 0.0);
        }
    }
}

static void test_document_depends_on_key_and_index_alone(void **state) {
    static Document a, b;
    int same = 0;
    for (uint64_t i = 0; i < 2000; i++) {
        make(&a, train_key(), i);
        make(&b, train_key(), i ^ 1);
        make(&b, train_key(), i);
        assert_int_equal(a.length, b.length);
        assert_int_equal(a.domain, b.domain);
        assert_memory_equal(a.bytes, b.bytes, (size_t)a.length);
        assert_memory_equal(a.nats, b.nats, (size_t)a.length * sizeof *a.nats);
        make(&b, val_key(), i);
        same += strcmp((char *)a.bytes, (char *)b.bytes) == 0;
        make(&b, train_key(), i + 1);
        same += strcmp((char *)a.bytes, (char *)b.bytes) == 0;
    }
    assert_int_equal(same, 0);
}

static void test_prompts_and_first_bytes_show_the_domain(void **state) {
    static Document d;
    int domain_of[256];
    memset(domain_of, -1, sizeof domain_of);
    for (uint64_t i = 0; i < 20000; i++) {
        make(&d, train_key(), i);
        assert_true(domain_of[d.bytes[0]] == -1 || domain_of[d.bytes[0]] == d.domain);
        domain_of[d.bytes[0]] = d.domain;
    }
    assert_int_equal(builtin_domains(), DOMAINS);
    for (int k = 0; k < DOMAINS; k++) {
        const char *prompt = builtin_prompt(k);
        assert_true(strlen(prompt) >= 3 && strlen(builtin_domain_name(k)) >= 3);
        assert_int_equal(domain_of[(unsigned char)prompt[0]], k);
    }
}

/* ---- each domain read back: whether the text is right, and its probability from the text alone ---- */

/* "a green dog", "27 green dogs": two words after the count; returns the nats of the choices. */
static double read_things(const char *count, const char *noun, char *singular) {
    size_t length = strlen(noun);
    strcpy(singular, noun);
    if (strcmp(count, "a") == 0) {
        assert_true(noun[length - 1] != 's');
        return log(2) + 2 * log(12);
    }
    int number = atoi(count);
    assert_in_range(number, 20, 99);
    assert_int_equal(noun[length - 1], 's');
    singular[length - 1] = 0;
    return log(2) + log(80) + 2 * log(12);
}

static double read_story(const Document *d) {
    char hero[16], verb[16], count[16], adjective[16], noun[16], subject[16], does[16], how[16], pronoun[16], verb2[16];
    char count2[16], adjective2[16], noun2[16], again[16], last[16], singular[16], unused[16];
    int hour, minute, room, end = 0;
    int fields = sscanf((const char *)d->bytes,
                        "%15s %15s %15s %15s %15s at %d:%2d. The %15s %15s %15[a-z]. %15s %15s %15s %15s %15[a-z]. "
                        "%15s %15s in room %4d.%n",
                        hero, verb, count, adjective, noun, &hour, &minute, subject, does, how, pronoun, verb2, count2,
                        adjective2, noun2, again, last, &room, &end);
    assert_int_equal(fields, 18);
    assert_int_equal(end, d->length - 1);
    assert_string_equal(hero, again);
    assert_string_equal(noun, subject);
    assert_true(hour >= 1 && hour <= 9 && minute >= 0 && minute <= 59);
    bool one = strcmp(count, "a") == 0;
    assert_true((does[strlen(does) - 1] == 's') == one);
    assert_non_null(strstr("Ada Bea Eva Ida Mia Nora Bob Dan Gus Hugo Leo Otto", hero));
    assert_string_equal(pronoun, strstr("Ada Bea Eva Ida Mia Nora", hero) ? "She" : "He");
    /* hero, two verbs, verb and adverb of the things, last verb; time; room */
    double nats = 6 * log(12) + log(9 * 60) + log(10000);
    nats += read_things(count, noun, singular);
    assert_true(!one || strcmp(singular, noun) == 0);
    return nats + read_things(count2, noun2, unused);
}

static double read_arithmetic(const Document *d) {
    const char *p = (const char *)d->bytes;
    int facts = 0;
    for (; *p && *p != '\n'; facts++) {
        int a, b, c, used = 0;
        char op, end;
        assert_int_equal(sscanf(p, "%d%c%d=%d%c%n", &a, &op, &b, &c, &end, &used), 5);
        assert_true(a >= 1 && a <= 6 && b >= 1 && b <= 6 && (op == '+' || op == '*'));
        assert_int_equal(c, op == '+' ? a + b : a * b);
        assert_true(end == ' ' || end == '\n');
        p += end == ' ' ? used : used - 1;
    }
    assert_in_range(facts, 10, 13);
    for (int t = 1; t < d->length; t++) {
        if (d->bytes[t - 1] == '=') {
            assert_true(d->nats[t] == 0.0);
        }
    }
    return facts * log(6 * 2 * 6) + log(4);
}

static double read_brackets(const Document *d) {
    static const char opening[] = "([{<", closing[] = ")]}>";
    char stack[4];
    int depth = 0, pairs = 0;
    double nats = 0.0;
    for (int t = 0; t < d->length;) {
        char c = (char)d->bytes[t];
        const char *kind = strchr(opening, c);
        bool may_open = depth < 4 && pairs < 12;
        bool may_not = depth > 0 || pairs >= 9;
        nats += may_open && may_not ? log(2) : 0.0;
        if (kind) {
            assert_true(may_open);
            assert_true(islower(d->bytes[t + 1]));
            stack[depth++] = closing[kind - opening];
            nats += log(4) + log(26);
            pairs++;
            t += 2;
        } else if (c == '\n') {
            assert_int_equal(t, d->length - 1);
            assert_int_equal(depth, 0);
            t++;
        } else {
            assert_true(depth > 0);
            assert_int_equal(c, stack[--depth]);
            t++;
        }
    }
    assert_in_range(pairs, 9, 12);
    return nats;
}

/* Sum of ln(26 - i): so many different letters in order. */
static double different_letters(int count) {
    double nats = 0.0;
    for (int i = 0; i < count; i++) {
        nats += log(26 - i);
    }
    return nats;
}

static double read_recall(const Document *d) {
    int value[256] = {0};
    int t = 3;
    assert_memory_equal(d->bytes, "map", 3);
    for (; d->bytes[t] == ' '; t += 3) {
        assert_true(islower(d->bytes[t + 1]) && isdigit(d->bytes[t + 2]));
        assert_int_equal(value[d->bytes[t + 1]], 0);
        value[d->bytes[t + 1]] = d->bytes[t + 2];
    }
    assert_int_equal(t, 3 + 3 * 8);
    assert_int_equal(d->bytes[t], '?');
    int queries = 0;
    for (t++; d->bytes[t] == ' '; t += 3, queries++) {
        assert_true(value[d->bytes[t + 1]] != 0);
        assert_int_equal(d->bytes[t + 2], value[d->bytes[t + 1]]);
        assert_true(d->nats[t + 2] == 0.0);
    }
    assert_int_equal(queries, 4);
    assert_int_equal(t, d->length - 1);
    return different_letters(8) + 8 * log(10) + 4 * log(8);
}

static int compare_bytes(const void *a, const void *b) {
    return *(const unsigned char *)a - *(const unsigned char *)b;
}

/* "sort" and "echo": three times " aaa=bbb", where b follows from a. */
static double read_lists(const Document *d, const char *tag, int items, bool sorted) {
    int t = 4;
    assert_memory_equal(d->bytes, tag, 4);
    for (int list = 0; list < 3; list++) {
        unsigned char expected[8];
        assert_int_equal(d->bytes[t++], ' ');
        memcpy(expected, d->bytes + t, (size_t)items);
        if (sorted) {
            qsort(expected, (size_t)items, 1, compare_bytes);
            for (int i = 1; i < items; i++) {
                assert_true(expected[i - 1] < expected[i]);
            }
        }
        for (int i = 0; i < items; i++) {
            assert_true(islower(d->bytes[t + i]));
            assert_true(d->nats[t + items + 1 + i] == 0.0);
        }
        assert_int_equal(d->bytes[t + items], '=');
        assert_memory_equal(d->bytes + t + items + 1, expected, (size_t)items);
        t += 2 * items + 1;
    }
    assert_int_equal(t, d->length - 1);
    return sorted ? 3 * different_letters(items) : 3 * items * log(26);
}

static double read_document(const Document *d) {
    switch (d->domain) {
        case STORY: return read_story(d);
        case ARITHMETIC: return read_arithmetic(d);
        case BRACKETS: return read_brackets(d);
        case RECALL: return read_recall(d);
        case SORT: return read_lists(d, "sort", 6, true);
        default: return read_lists(d, "echo", 5, false);
    }
}

static void test_documents_are_right_and_as_likely_as_stated(void **state) {
    static Document d;
    int seen[DOMAINS] = {0};
    for (uint64_t i = 0; i < 20000; i++) {
        make(&d, i % 2 ? train_key() : val_key(), i);
        double nats = read_document(&d) + log((double)WEIGHTS / weights[d.domain]);
        assert_close(total_nats(&d), nats, 1e-9, builtin_domain_name(d.domain));
        seen[d.domain]++;
    }
    for (int k = 0; k < DOMAINS; k++) {
        assert_true(seen[k] > 2000);
    }
}

/* ---- frequencies ---- */

enum { PREFIX = 14, SAMPLES = 300000, COMMON = 1500 };

typedef struct {
    unsigned char bytes[PREFIX];
    double nats[PREFIX];
} Start;

static int compare_starts(const void *a, const void *b) {
    return memcmp(((const Start *)a)->bytes, ((const Start *)b)->bytes, PREFIX);
}

/* All n starts agree in their first `depth` bytes: checks the distribution of the next. Returns how many prefixes were
 * checked. */
static int check_prefix(const Start *starts, int n, int depth) {
    if (depth == PREFIX || n < COMMON) {
        return 0;
    }
    int checked = 1;
    double sum = 0.0, least = 1.0;
    for (int i = 0; i < n;) {
        int count = 1;
        double nats = starts[i].nats[depth], p = exp(-nats);
        while (i + count < n && starts[i + count].bytes[depth] == starts[i].bytes[depth]) {
            assert_true(starts[i + count].nats[depth] == nats); /* the same prefix, the same probability */
            count++;
        }
        double deviation = sqrt(n * p * (1.0 - p));
        if (fabs(count - n * p) > 5.0 * deviation + 1e-6) {
            fail_msg("after \"%.*s\": '%c' came %d times of %d, its stated probability is %g", depth, starts[i].bytes,
                     starts[i].bytes[depth], count, n, p);
        }
        sum += p;
        least = fmin(least, p);
        checked += check_prefix(starts + i, count, depth + 1);
        i += count;
    }
    /* An option of probability p is missing from n samples with probability e^(-n p). */
    assert_true(sum < 1.0 + 1e-9);
    if (n * least > 30.0) {
        assert_close(sum, 1.0, 1e-9, "sum over the options");
    }
    return checked;
}

static void test_frequencies_are_the_stated_probabilities(void **state) {
    static Document d;
    Start *starts = malloc(SAMPLES * sizeof *starts);
    assert_non_null(starts);
    for (int i = 0; i < SAMPLES; i++) {
        make(&d, train_key(), (uint64_t)i);
        memcpy(starts[i].bytes, d.bytes, PREFIX);
        memcpy(starts[i].nats, d.nats, sizeof starts[i].nats);
    }
    qsort(starts, SAMPLES, sizeof *starts, compare_starts);
    assert_true(check_prefix(starts, SAMPLES, 0) > 150);
    free(starts);
}

/* Chi-square statistic of counts that should be equal. */
static double chi_square(const int *counts, int n) {
    double total = 0.0, sum = 0.0;
    for (int i = 0; i < n; i++) {
        total += counts[i];
    }
    for (int i = 0; i < n; i++) {
        sum += (counts[i] - total / n) * (counts[i] - total / n) / (total / n);
    }
    return sum;
}

/* Choices late in a document, which no common prefix reaches. */
static void test_late_choices_are_uniform(void **state) {
    static Document d;
    int facts[4] = {0}, queried[8] = {0}, label[26] = {0}, room[10] = {0}, times[2] = {0};
    for (uint64_t i = 0; i < 60000; i++) {
        make(&d, train_key(), i);
        if (d.domain == ARITHMETIC) {
            int signs = 0;
            for (int t = 0; t < d.length; t++) {
                signs += d.bytes[t] == '=';
                if (d.bytes[t] == '*' || d.bytes[t] == '+') {
                    times[d.bytes[t] == '*']++;
                }
            }
            facts[signs - 10]++;
        } else if (d.domain == RECALL) {
            unsigned char key = d.bytes[d.length - 3];
            queried[(strchr((char *)d.bytes + 4, key) - (char *)d.bytes - 4) / 3]++;
        } else if (d.domain == BRACKETS) {
            int last = d.length - 1;
            while (!islower(d.bytes[last])) {
                last--;
            }
            label[d.bytes[last] - 'a']++;
        } else if (d.domain == STORY) {
            room[d.bytes[d.length - 3] - '0']++;
        }
    }
    /* 99.99 % points for 3, 7, 25, 9 and 1 degrees of freedom */
    assert_true(chi_square(facts, 4) < 21.1);
    assert_true(chi_square(queried, 8) < 29.9);
    assert_true(chi_square(label, 26) < 60.2);
    assert_true(chi_square(room, 10) < 33.8);
    assert_true(chi_square(times, 2) < 15.2);
}

/* ---- a part of the mixture ---- */

static DomainSet set_of(const char *names) {
    DomainSet set;
    char error[256];
    if (!builtin_find_domains(names, &set, error, sizeof error)) {
        fail_msg("%s: %s", names, error);
    }
    return set;
}

/* Fewer domains to choose from make a document likelier by its first byte alone. */
static void test_a_document_of_few_domains_has_their_probability(void **state) {
    static Document all, few;
    DomainSet pair = set_of("sort,story");
    assert_int_equal(pair, 1U << STORY | 1U << SORT);
    int in_pair[DOMAINS] = {0}, n = 20000;
    for (int i = 0; i < n; i++) {
        make(&all, train_key(), (uint64_t)i);
        DomainSet own = set_of(builtin_domain_name(all.domain));
        for (int sets = 0; sets < 2; sets++) {
            DomainSet set = sets ? pair : own;
            few.length = builtin_document(train_key(), (uint64_t)i, set, few.bytes, few.nats, &few.domain);
            in_pair[few.domain] += sets;
            if (few.domain == all.domain) {
                double share = sets ? weights[few.domain] / 5.0 : 1.0;
                assert_int_equal(few.length, all.length);
                assert_memory_equal(few.bytes, all.bytes, (size_t)all.length);
                double choice = log((double)WEIGHTS / weights[all.domain]) + log(share);
                assert_close(few.nats[0], all.nats[0] - choice, 1e-12, "the first byte");
                assert_memory_equal(few.nats + 1, all.nats + 1, (size_t)(all.length - 1) * sizeof *all.nats);
            } else {
                assert_true(sets);
            }
        }
    }
    assert_int_equal(in_pair[STORY] + in_pair[SORT], n);
    assert_true(fabs(in_pair[STORY] - 0.4 * n) < 5 * sqrt(0.24 * n));
}

static void test_names_that_are_no_domains(void **state) {
    const char *bad[][2] = {
        {"sorted", "'sorted' is no domain, they are story, arithmetic, brackets, recall, sort, echo"},
        {"sor", "'sor' is no domain"},
        {"", "'' is no domain"},
        {"sort,", "'' is no domain"},
        {",sort", "'' is no domain"},
        {"sort, echo", "' echo' is no domain"},
        {"echo,sort,echo", "'echo' stands twice"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        DomainSet set;
        char error[256];
        assert_false(builtin_find_domains(bad[i][0], &set, error, sizeof error));
        assert_memory_equal(error, bad[i][1], strlen(bad[i][1]));
    }
    assert_int_equal(set_of("echo,sort,story,arithmetic,recall,brackets"), builtin_all_domains());
}

/* ---- size of the space ---- */

static void test_every_document_is_one_of_more_than_2_to_the_60(void **state) {
    static Document d;
    for (uint64_t i = 0; i < 50000; i++) {
        make(&d, val_key(), i);
        double bits = (total_nats(&d) - log((double)WEIGHTS / weights[d.domain])) / log(2);
        if (bits < 60.0) {
            fail_msg("only %.1f bits: %s", bits, d.bytes);
        }
    }
}

static int compare_hashes(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static void test_no_document_comes_twice_in_training_or_validation(void **state) {
    enum { EACH = 145000 }; /* of each split, so that each domain has some 20,000 or more */
    static Document d;
    uint64_t *hashes = malloc(2 * EACH * sizeof *hashes);
    int seen[DOMAINS] = {0};
    assert_non_null(hashes);
    for (int i = 0; i < 2 * EACH; i++) {
        make(&d, i < EACH ? train_key() : val_key(), (uint64_t)(i % EACH));
        seen[d.domain] += i < EACH;
        uint64_t hash = 0;
        for (int t = 0; t < d.length; t++) {
            hash = random_mix(hash ^ d.bytes[t]);
        }
        hashes[i] = hash;
    }
    qsort(hashes, 2 * EACH, sizeof *hashes, compare_hashes);
    int twice = 0;
    for (int i = 1; i < 2 * EACH; i++) {
        twice += hashes[i] == hashes[i - 1];
    }
    free(hashes);
    assert_int_equal(twice, 0);
    for (int k = 0; k < DOMAINS; k++) {
        assert_true(seen[k] >= 20000);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_documents_are_lines_of_printable_ascii),
        cmocka_unit_test(test_document_depends_on_key_and_index_alone),
        cmocka_unit_test(test_prompts_and_first_bytes_show_the_domain),
        cmocka_unit_test(test_documents_are_right_and_as_likely_as_stated),
        cmocka_unit_test(test_frequencies_are_the_stated_probabilities),
        cmocka_unit_test(test_late_choices_are_uniform),
        cmocka_unit_test(test_a_document_of_few_domains_has_their_probability),
        cmocka_unit_test(test_names_that_are_no_domains),
        cmocka_unit_test(test_every_document_is_one_of_more_than_2_to_the_60),
        cmocka_unit_test(test_no_document_comes_twice_in_training_or_validation),
    };
    return cmocka_run_group_tests_name("builtin", tests, NULL, NULL);
}
