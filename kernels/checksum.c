/* CRC-32C: see checksum.h. Eight bytes at a time, by the processor's own instruction where it has one (SSE 4.2, ARM's
 * CRC extension), else by tables.
 *
 * Called by model/safetensors.c, model/checkpoint.c and data/. */
#include "checksum.h"

#include <string.h>

static uint32_t shift_byte(uint32_t crc) {
    for (int bit = 0; bit < 8; bit++) {
        crc = (crc >> 1) ^ (0x82f63b78u & -(crc & 1)); /* Castagnoli's polynomial, bits reversed */
    }
    return crc;
}

#if defined(__SSE4_2__) && defined(__x86_64__)
#define SUM_WORD(crc, word) ((uint32_t)__builtin_ia32_crc32di(crc, word))
#elif defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#define SUM_WORD(crc, word) __crc32cd(crc, word)
#endif

#ifdef SUM_WORD

static uint32_t sum_words(uint32_t crc, const unsigned char *p, size_t words) {
    for (; words > 0; words--, p += 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        crc = SUM_WORD(crc, word);
    }
    return crc;
}

#else

/* Slicing by eight (Kounavis and Berry 2005): table[k][b] is the effect of byte b followed by k zero bytes, so that
 * eight bytes are eight independent look-ups. The tables are made anew for each call, which costs about as much as
 * summing 8 KB with them and spares a global; short data goes bit by bit. */
static uint32_t sum_words(uint32_t crc, const unsigned char *p, size_t words) {
    if (words < 128) {
        for (size_t i = 0; i < 8 * words; i++) {
            crc = shift_byte(crc ^ p[i]);
        }
        return crc;
    }
    uint32_t table[8][256];
    for (uint32_t b = 0; b < 256; b++) {
        table[0][b] = shift_byte(b);
    }
    for (int k = 1; k < 8; k++) {
        for (int b = 0; b < 256; b++) {
            table[k][b] = (table[k - 1][b] >> 8) ^ table[0][table[k - 1][b] & 255];
        }
    }
    for (; words > 0; words--, p += 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        word ^= crc;
        crc = table[7][word & 255] ^ table[6][word >> 8 & 255] ^ table[5][word >> 16 & 255] ^
              table[4][word >> 24 & 255] ^ table[3][word >> 32 & 255] ^ table[2][word >> 40 & 255] ^
              table[1][word >> 48 & 255] ^ table[0][word >> 56];
    }
    return crc;
}

#endif

uint32_t crc32c(uint32_t crc, const void *data, size_t bytes) {
    const unsigned char *p = data;
    size_t words = bytes / 8;
    crc = sum_words(~crc, p, words);
    for (p += 8 * words, bytes %= 8; bytes > 0; bytes--, p++) {
        crc = shift_byte(crc ^ *p);
    }
    return ~crc;
}
