/* The builtin corpus: small documents from latent domains that want different skills, made from a seed, without end.
 *
 * Every choice of the generator has a known probability and every document has one derivation, so the exact probability
 * of each byte given all bytes before it is known: the mean of its negative logarithm is the floor that no model can
 * beat.
 */
#ifndef DATA_BUILTIN_H
#define DATA_BUILTIN_H

#include <stdint.h>

enum { BUILTIN_DOCUMENT_BYTES = 512 }; /* no document is longer */

int builtin_domains(void);
const char *builtin_domain_name(int domain);
const char *builtin_prompt(int domain); /* the start of a document, which shows the domain */

/* Writes document `index` of the stream `key` (see random_key): its bytes, printable ASCII and a newline at the end;
 * the negative log-probability in nats of each byte given the document's bytes before it (the first byte's includes the
 * choice of the domain); and its domain. The arrays hold BUILTIN_DOCUMENT_BYTES. Returns the length, at least 20. */
int builtin_document(uint64_t key, uint64_t index, unsigned char *bytes, double *nats, int *domain);

#endif
