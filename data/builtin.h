/* The builtin corpus: small documents from latent domains that want different skills, made from a seed, without end.
 *
 * Every choice of the generator has a known probability and every document has one derivation, so the exact probability
 * of each byte given all bytes before it is known: the mean of its negative logarithm is the floor that no model can
 * beat.
 */
#ifndef DATA_BUILTIN_H
#define DATA_BUILTIN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { BUILTIN_DOCUMENT_BYTES = 512 }; /* no document is longer */

typedef unsigned DomainSet; /* bit d: domain d is in it */

int builtin_domains(void);
const char *builtin_domain_name(int domain);
const char *builtin_prompt(int domain); /* the start of a document, which shows the domain */

DomainSet builtin_all_domains(void);

/* The set of the domains named in "story,sort". False with one line in error, which lists them, on a name that is none
 * or stands twice. */
bool builtin_find_domains(const char *names, DomainSet *set, char *error, size_t error_size);

/* Writes document `index` of the stream `key` (see random_key), of one of the domains in `set`, which is not empty: its
 * bytes, printable ASCII and a newline at the end; the negative log-probability in nats of each byte given the
 * document's bytes before it (the first byte's includes the choice of the domain among those in the set); and its
 * domain. The arrays hold BUILTIN_DOCUMENT_BYTES. Returns the length, at least 20. */
int builtin_document(uint64_t key, uint64_t index, DomainSet set, unsigned char *bytes, double *nats, int *domain);

#endif
