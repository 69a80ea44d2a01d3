/* Choices that nothing learned: controls and benchmarks. All are (N,K), K <= E, different within a token.
 *
 *     table      expert[n,j] = table[token_n, j]                                 (hash layers, arXiv 2106.04426)
 *     balanced   entry i of all goes to expert i mod E                           equal loads; also "by position"
 *     zipf       K distinct experts, drawn in turn with probability ~ (e+1)^-s of those left
 *                = the K largest of -s ln(e+1) + Gumbel noise
 *     one        expert 0 takes every token, the others share what is left of K  all-to-one
 */
#ifndef KERNELS_FIXED_CHOICE_H
#define KERNELS_FIXED_CHOICE_H

#include <stdint.h>

#include "types.h"

/* expert (N,K); tokens (N), each below V; table (V,K) holds whole numbers */
void table_choice(int *expert, const int *tokens, const acc_t *table, int N, int K, Stream *stream);

/* A table for table_choice in host memory, table (V,K). Tokens in order of falling frequency, equal ones as `key`
 * orders them, each take the K experts that have the least load so far in their column (ties as `key` orders the
 * experts of that token), all different. frequency (V) >= 0, NULL: all equal; then every column is exactly balanced
 * where E divides V, and differs by at most 1 where not. */
void balanced_table(acc_t *table, const double *frequency, uint64_t key, int V, int E, int K);

/* expert[n,j] = (position_n * K + j) mod E, position_n = start + n % T */
void position_choice(int *expert, int start, int N, int T, int E, int K, Stream *stream);

/* Of the next three the tokens are start .. start+N-1 of a batch, which several ranks may share: n' = start + n. */

/* expert[n,j] = (n'*K + j) mod E */
void balanced_choice(int *expert, int start, int N, int E, int K, Stream *stream);

/* Best (largest noisy score) first; numbers from *key at index n'*E + e. The key lies on the device, here and in
 * random_weights: a recorded step can be repeated with another. */
void zipf_choice(int *expert, double s, const uint64_t *key, int start, int N, int E, int K, Stream *stream);

/* expert[n,0] = 0, expert[n,j] = 1 + (n'*(K-1) + j-1) mod (E-1) */
void one_choice(int *expert, int start, int N, int E, int K, Stream *stream);

/* weight (N,K) = 1/K */
void equal_weight(acc_t *weight, int N, int K, Stream *stream);

/* probs (N,E) = weight of the token's entry for e, 0 without one: the choice as shares, for statistics */
void choice_probs(acc_t *probs, const int *expert, const acc_t *weight, int N, int E, int K, Stream *stream);

/* w (count) = std * normal numbers of *key: a random projection made where it is used */
void random_weights(acc_t *w, double std, const uint64_t *key, size_t count, Stream *stream);

#endif
