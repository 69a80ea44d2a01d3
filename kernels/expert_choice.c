/* One expert at a time, its column of probs read in place: the C-th largest is found digit by digit (radix select), so
 * that the cost is a few sweeps over the column whatever C is, ties and sorted input included.
 *
 *     histogram of the highest digit -> the digit of the C-th largest -> histogram of the next digit among those that
 *     share it -> ... -> its whole bit pattern, and how many of the tokens with just this pattern are taken
 *
 * Counts are integers and every expert has one thread: the same choice for any number of threads. Called by the routers
 * of model/ where experts pick.
 */
#include "expert_choice.h"

#include <math.h>
#include <string.h>

#ifdef REAL_DOUBLE
typedef uint64_t Rank;
#else
typedef uint32_t Rank;
#endif

enum { RANK_BITS = 8 * sizeof(Rank), DIGIT_BITS = 8, DIGITS = 1 << DIGIT_BITS };

/* Orders as p does, NaN below 0: the bit patterns of numbers that are not negative order as their values do. */
static Rank rank_of(acc_t p) {
    Rank bits;
    memcpy(&bits, &p, sizeof bits);
    return p > 0 ? bits + 1 : p == 0; /* -0 is 0 */
}

static acc_t value_of(Rank rank) {
    Rank bits = rank - 1;
    acc_t p;
    memcpy(&p, &bits, sizeof p);
    return rank > 0 ? p : NAN;
}

/* The C-th largest rank of a column (N, every E-th value); *ties: how many tokens of this rank are among the C. */
static Rank select_rank(int *ties, const acc_t *column, int N, int E, int C) {
    Rank found = 0;
    int wanted = C;
    for (int shift = RANK_BITS - DIGIT_BITS; shift >= 0; shift -= DIGIT_BITS) {
        int histogram[DIGITS] = {0};
        for (int n = 0; n < N; n++) {
            Rank rank = rank_of(column[(size_t)n * E]);
            if (rank >> shift >> DIGIT_BITS == found) { /* two shifts: one of all bits is undefined */
                histogram[(rank >> shift) % DIGITS]++;
            }
        }
        int digit = DIGITS - 1;
        while (histogram[digit] < wanted) {
            wanted -= histogram[digit];
            digit--;
        }
        found = found << DIGIT_BITS | (Rank)digit;
    }
    *ties = wanted;
    return found;
}

/* Half way between the last value taken and the first one left; where rounding would give the upper, the lower, so that
 * p > cut separates the two. */
static acc_t half_way(acc_t above, acc_t below) {
    acc_t middle = below + (above - below) / 2;
    return middle == above ? below : middle;
}

void expert_choice_forward(int *expert, acc_t *cut, const acc_t *probs, int N, int E, int C, Stream *stream) {
#pragma omp parallel for schedule(static) if (E > 1)
    for (int e = 0; e < E; e++) {
        const acc_t *column = probs + e;
        int ties;
        const Rank last = select_rank(&ties, column, N, E, C);
        Rank next = 0; /* the largest that is left */
        for (int n = 0; n < N; n++) {
            Rank rank = rank_of(column[(size_t)n * E]);
            int taken = rank > last || (rank == last && ties > 0);
            ties -= taken && rank == last;
            next = !taken && rank > next ? rank : next;
            expert[(size_t)n * E + e] = taken ? e : -1;
        }
        if (cut) {
            cut[e] = half_way(value_of(last), C < N ? value_of(next) : 0);
        }
    }
}

void threshold_forward(int *expert, const acc_t *tau, const acc_t *probs, const int64_t *step, int64_t first, int N,
                       int E, Stream *stream) {
    if (*step < first) {
        return;
    }
#pragma omp parallel for schedule(static) if (N > 1)
    for (int n = 0; n < N; n++) {
        for (int e = 0; e < E; e++) {
            expert[(size_t)n * E + e] = probs[(size_t)n * E + e] > tau[e] ? e : -1;
        }
    }
}

void threshold_update(acc_t *tau, const acc_t *cut, int slices, int E, double rate, const AdamState *adam,
                      Stream *stream) {
    if (adam->scale == 0) {
        return;
    }
    const double share = fmax(rate, 1.0 / (double)adam->updates);
    for (int e = 0; e < E; e++) {
        double sum = 0;
        for (int slice = 0; slice < slices; slice++) {
            sum += cut[(size_t)slice * E + e];
        }
        tau[e] = (acc_t)(tau[e] + share * (sum / slices - tau[e]));
    }
}
