/* What a token costs a model: the figures that speeds and sizes are compared by. */
#ifndef MODEL_COST_H
#define MODEL_COST_H

#include "transformer.h"

/* Parameters a token meets (expert tensors count K/E, or what a chain can reach at most), and training FLOPs per token:
 * 6 per active matrix parameter (4 of a frozen one, whose gradient is not made) and 6 T NH HS per layer for causal
 * attention (half of the T x T scores, all of them for masked prediction). */
size_t transformer_active_parameters(const Transformer *model);
double transformer_flops_per_token(const Transformer *model);

#endif
