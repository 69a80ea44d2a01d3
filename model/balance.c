/* Closed forms over a handful of counts, on the host, in double. Called by figures.c and evaluate.c. */
#include "balance.h"

#include <math.h>

LoadSummary load_summary(const double *counts, int E) {
    LoadSummary summary = {0};
    double total = 0, largest = 0;
    for (int e = 0; e < E; e++) {
        total += counts[e];
        largest = counts[e] > largest ? counts[e] : largest;
        summary.dead += counts[e] == 0;
    }
    if (total == 0) {
        return summary;
    }
    double mean = total / E, variance = 0;
    for (int e = 0; e < E; e++) {
        double q = counts[e] / total;
        variance += (counts[e] - mean) * (counts[e] - mean) / E;
        summary.kl += q > 0 ? q * log(q * E) : 0;
        summary.near_dead += counts[e] < 0.1 * mean;
    }
    summary.cv = sqrt(variance) / mean;
    summary.max_vio = (largest - mean) / mean;
    return summary;
}

double mutual_information(const double *table, int rows, int cols) {
    double total = 0, information = 0;
    for (int i = 0; i < rows * cols; i++) {
        total += table[i];
    }
    for (int i = 0; i < rows; i++) {
        for (int j = 0; j < cols; j++) {
            double joint = table[i * cols + j], row = 0, col = 0;
            for (int k = 0; k < cols; k++) {
                row += table[i * cols + k];
            }
            for (int k = 0; k < rows; k++) {
                col += table[k * cols + j];
            }
            information += joint > 0 ? joint / total * log(joint * total / (row * col)) : 0;
        }
    }
    return information;
}
