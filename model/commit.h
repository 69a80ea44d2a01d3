/* The commit that a program was built from. The Makefile asks git and hands the answer (build/git) to commit.c, which
 * is compiled again when it changes. Called by log.c and by the programs of experiments/, whose results name it. */
#ifndef MODEL_COMMIT_H
#define MODEL_COMMIT_H

/* Twelve digits, "unknown" outside of git. */
const char *commit_sha(void);

/* Whether the sources differed from that commit: 1, 0, or -1 outside of git. */
int commit_dirty(void);

/* Both for a line of results: "0123456789ab", "0123456789ab-dirty", "unknown". */
const char *commit_name(void);

#endif
