/* The functions behind the arrays and hash tables of <stb/stb_ds.h>, compiled once for all of data/.
 *
 * Where memory runs out the program ends with one line: the macros have no way to return a failure. Tables are made by
 * one thread at a time, since stb_ds draws the seed of each from a variable of its own.
 */
#include "../kernels/check.h"

#include <stddef.h>
#include <stdlib.h>

static void *reallocate(void *old, size_t bytes) {
    void *block = realloc(old, bytes);
    CHECK(block, "out of memory for a table of %zu bytes: give less text, or use a machine with more memory", bytes);
    return block;
}

#define STBDS_REALLOC(context, block, bytes) reallocate(block, bytes)
#define STBDS_FREE(context, block) free(block)
#define STB_DS_IMPLEMENTATION
#include <stb/stb_ds.h>
