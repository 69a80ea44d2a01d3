/* The list of parameters: see tensors.h.
 *
 * Initial values are drawn by name: the key of a tensor is random_key(seed, RANDOM_INIT, hash of its name), the counter
 * is the element's index. A tensor therefore starts from the same numbers whatever else the model holds, so that two
 * models which differ in one part (a router, a number of layers) are alike in all others.
 *
 * Called by transformer.c, which adds the tensors; used by optimizer.c, checkpoint.c and the gradient checks.
 * Read next: transformer.c.
 */
#include "tensors.h"

#include <assert.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/check.h"
#include "../kernels/random.h"

enum { ALIGNMENT = 16 }; /* elements: 64 bytes of float, one cache line and one AVX-512 register */

static size_t round_up(size_t n) {
    return (n + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

int tensors_find(const TensorList *list, const char *name) {
    for (int i = 0; i < list->count; i++) {
        if (strcmp(list->items[i].name, name) == 0) {
            return i;
        }
    }
    return -1;
}

int tensors_add(TensorList *list, TensorKind kind, int layer, double init_std, int d0, int d1, int d2,
                const char *name_format, ...) {
    assert(d0 > 0 && d1 >= 0 && d2 >= 0 && (d1 > 0 || d2 == 0));
    int parts = kind == TENSOR_EXPERT && list->expert_parts > 1 ? list->expert_parts : 1;
    assert(d0 % parts == 0);
    d0 /= parts;
    if (list->count == list->capacity) {
        int capacity = list->capacity ? 2 * list->capacity : 64;
        Tensor *items = realloc(list->items, (size_t)capacity * sizeof *items);
        CHECK(items, "out of memory for a list of %d tensors: make the model smaller", capacity);
        list->items = items;
        list->capacity = capacity;
    }
    Tensor tensor = {.kind = kind, .layer = layer, .init_std = init_std, .shape = {d0, d1, d2}, .parts = parts};
    tensor.ndim = d1 == 0 ? 1 : d2 == 0 ? 2 : 3;
    tensor.decay = tensor.ndim >= 2;
    tensor.count = 1;
    for (int i = 0; i < tensor.ndim; i++) {
        bool overflow = __builtin_mul_overflow(tensor.count, (size_t)tensor.shape[i], &tensor.count);
        CHECK(!overflow && tensor.count <= SIZE_MAX / 64,
              "a tensor of %d x %d x %d cannot be held: make the model smaller", d0, d1, d2);
    }
    tensor.first = parts > 1 ? list->part * tensor.count : 0;
    va_list arguments;
    va_start(arguments, name_format);
    int length = vsnprintf(tensor.name, sizeof tensor.name, name_format, arguments);
    va_end(arguments);
    assert(length > 0 && (size_t)length < sizeof tensor.name);
    int namesake = tensors_find(list, tensor.name);
    assert(namesake < 0);
    (void)length, (void)namesake; /* read by assert alone */

    tensor.offset = list->total;
    list->total += round_up(tensor.count);
    list->items[list->count] = tensor;
    return list->count++;
}

void tensors_free(TensorList *list) {
    free(list->items);
    *list = (TensorList){0};
}

size_t tensors_parameters(const TensorList *list) {
    size_t parameters = 0;
    for (int i = 0; i < list->count; i++) {
        parameters += list->items[i].kind == TENSOR_STATE ? 0 : list->items[i].count * list->items[i].parts;
    }
    return parameters;
}

/* FNV-1a, 64 bits. */
static uint64_t name_hash(const char *name) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (; *name; name++) {
        hash = (hash ^ (unsigned char)*name) * 0x100000001b3u;
    }
    return hash;
}

void tensors_init(const TensorList *list, acc_t *host, uint64_t seed) {
    memset(host, 0, list->total * sizeof *host); /* the gaps too: whole-buffer kernels and checkpoints see no garbage */
    for (int t = 0; t < list->count; t++) {
        const Tensor *tensor = &list->items[t];
        acc_t *value = host + tensor->offset;
        double std = tensor->init_std;
        uint64_t key = random_key(seed, RANDOM_INIT, name_hash(tensor->name));
        if (std == 0) {
            continue;
        }
#pragma omp parallel for
        for (size_t i = 0; i < tensor->count; i++) {
            value[i] = (acc_t)(std < 0 ? -std : std * random_normal(key, tensor->first + i));
        }
    }
}

void tensors_take_part(const TensorList *list, acc_t *host, const TensorList *whole, const acc_t *whole_host) {
    assert(list->count == whole->count);
    memset(host, 0, list->total * sizeof *host);
    for (int t = 0; t < list->count; t++) {
        const Tensor *part = &list->items[t];
        memcpy(host + part->offset, whole_host + whole->items[t].offset + part->first, part->count * sizeof *host);
    }
}
