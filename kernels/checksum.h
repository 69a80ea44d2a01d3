/* CRC-32C (Castagnoli), as checkpoints, token shards and tokenizers carry it. */
#ifndef KERNELS_CHECKSUM_H
#define KERNELS_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>

/* Checksum of what was summed in `crc` (0 to start) followed by data; the same for any cut into pieces. */
uint32_t crc32c(uint32_t crc, const void *data, size_t bytes);

#endif
