/* Load statistics of a MoE layer on the host, for the log. The losses themselves are kernels/balance_loss.h. */
#ifndef MODEL_BALANCE_H
#define MODEL_BALANCE_H

typedef struct {
    double cv;      /* standard deviation / mean of the counts */
    double kl;      /* sum q ln(q E), q = counts / total: nats from uniform, ln E when one expert takes all */
    double max_vio; /* (largest - mean) / mean */
    int dead;       /* experts that nobody chose */
    int near_dead;  /* .. that got less than a tenth of the mean, the dead included */
} LoadSummary;

/* counts (E), how many entries chose each expert */
LoadSummary load_summary(const double *counts, int E);

/* Mutual information in nats of a table (rows, cols) of counts: sum p_ij ln(p_ij / (p_i p_j)); 0 when the table is
 * empty. */
double mutual_information(const double *table, int rows, int cols);

#endif
