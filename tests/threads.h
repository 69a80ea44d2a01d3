/* The number of threads, for tests that set it: OpenMP's own functions, or stand-ins where a build has no OpenMP.
 *
 * Most tests compute little and ask for one thread, because starting more would be all the work.
 */
#ifndef TESTS_THREADS_H
#define TESTS_THREADS_H

#ifdef _OPENMP
#include <omp.h>
#else
static inline void omp_set_num_threads(int threads) {
}

static inline int omp_get_max_threads(void) {
    return 1;
}
#endif

#endif
