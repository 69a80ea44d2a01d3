/* What the compiler was told with @build/git. */
#include "commit.h"

#include <string.h>

#ifndef MOELAB_GIT_SHA
#define MOELAB_GIT_SHA "unknown"
#endif
#ifndef MOELAB_GIT_DIRTY
#define MOELAB_GIT_DIRTY "unknown"
#endif

const char *commit_sha(void) {
    return MOELAB_GIT_SHA;
}

int commit_dirty(void) {
    if (strcmp(MOELAB_GIT_SHA, "unknown") == 0) {
        return -1;
    }
    return strcmp(MOELAB_GIT_DIRTY, "0") != 0;
}

const char *commit_name(void) {
    return commit_dirty() == 1 ? MOELAB_GIT_SHA "-dirty" : MOELAB_GIT_SHA;
}
