/* The list of parameters: one list drives memory, initial values, decay, the optimizer, checkpoints and gradient
 * checks.
 *
 * All tensors lie one after the other in flat buffers (weights, gradients, optimizer moments), each at its offset.
 *
 * Where several ranks hold the experts between them (--ep), the list of each has its own experts alone: the tensor
 * (E,..) has the shape (E/ranks,..) and is the rank-th part of the whole.
 */
#ifndef MODEL_TENSORS_H
#define MODEL_TENSORS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../kernels/types.h"

/* A state belongs to a router, which moves it by itself: no gradient, no optimizer, but part of the checkpoint. */
typedef enum { TENSOR_DENSE, TENSOR_ROUTER, TENSOR_EXPERT, TENSOR_STATE } TensorKind;

typedef struct {
    char name[64]; /* "layers.0.moe.experts.w1" */
    int ndim;
    int shape[3];
    int parts;     /* ranks that hold the whole tensor between them; 1: this list does */
    size_t first;  /* element of the whole with which this part begins */
    size_t count;  /* elements */
    size_t offset; /* first element in the flat buffers; a multiple of 16 */
    TensorKind kind;
    int layer;             /* -1: outside the layers */
    double init_std;       /* normal(0, std); 0: zeros; < 0: the constant -init_std */
    bool decay;            /* weight decay: two or more dimensions */
    bool adapter;          /* fine-tuning adds it to a model (adapter.h): it may be absent where weights come from */
    bool frozen;           /* nothing trains it (freeze.h) */
    bool grad_overwritten; /* by the first backward of a step; else every backward adds, and the optimizer clears */
} Tensor;

typedef struct {
    Tensor *items; /* owned */
    int count, capacity;
    size_t total;           /* elements of a flat buffer, gaps included */
    int part, expert_parts; /* which part of the experts it has, and of how many; 0 of 0: all */
} TensorList;

/* Appends a tensor of shape (d0), (d0,d1) or (d0,d1,d2), of an expert tensor the list's part; unused extents are 0.
 * Returns its index. */
int tensors_add(TensorList *list, TensorKind kind, int layer, double init_std, int d0, int d1, int d2,
                const char *name_format, ...);

/* Index of the tensor of that name, -1 when there is none. */
int tensors_find(const TensorList *list, const char *name);

void tensors_free(TensorList *list);

/* Elements of all parameters, gaps and states left out, all parts counted. */
size_t tensors_parameters(const TensorList *list);

/* Initial values into a host buffer of list->total elements: a function of seed, tensor name and element index in the
 * whole. */
void tensors_init(const TensorList *list, acc_t *host, uint64_t seed);

/* What the list has of a whole model's values: host (list->total) from whole_host (whole->total), gaps zero. whole: the
 * same tensors, all parts. */
void tensors_take_part(const TensorList *list, acc_t *host, const TensorList *whole, const acc_t *whole_host);

#endif
