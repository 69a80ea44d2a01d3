/* Fuzz target: a token shard (data/text_loader.h), as --data reads it.
 *
 * Whatever is in the file, it is refused with one line, or all its tokens can be read, whole or in parts, and each is
 * below the vocabulary size that it was asked for with.
 *
 * A fuzzer does not guess checksums: a shard that has 0 for its own gets the right one. Run by tests/fuzz.sh;
 * tests/test_fuzz_corpus.c replays its corpus. Read next: fuzz_choices.c.
 */
#include "../../data/text_loader.h"
#include "../../kernels/checksum.h"
#include "input.h"

/* The input, the caller's (free), its checksum filled in where it is 0. */
static uint8_t *with_checksum(const uint8_t *data, size_t size) {
    enum { HEADER_BYTES = 256 * 4, MARK = 3 * 4, CHECKSUM = 6 * 4 };
    uint8_t *shard = (uint8_t *)input_text(data, size);
    bool described = size >= HEADER_BYTES && memcmp(shard + MARK, "mlab", 4) == 0;
    if (described && memcmp(shard + CHECKSUM, "\0\0\0\0", 4) == 0) {
        uint32_t sum = crc32c(crc32c(0, shard + HEADER_BYTES, size - HEADER_BYTES), shard, HEADER_BYTES);
        memcpy(shard + CHECKSUM, &sum, 4);
    }
    return shard;
}

/* Reads the stream in pieces of `step` tokens; a piece with a token that is not below vocab is refused. */
static void read_tokens(const TextLoader *loader, uint64_t step, int vocab) {
    uint64_t length = text_loader_tokens(loader);
    char error[TEXT_LOADER_ERROR_BYTES] = "";
    for (uint64_t position = 0; position < length; position += step) {
        uint64_t count = length - position < step ? length - position : step;
        int *tokens = malloc(count * sizeof *tokens);
        assert(tokens);
        bool valid = text_loader_read(loader, position, count, vocab, tokens, error);
        for (uint64_t i = 0; valid && i < count; i++) {
            assert(tokens[i] >= 0 && tokens[i] < vocab);
        }
        if (!valid) {
            input_check_error(error);
        }
        free(tokens);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    uint8_t *shard = with_checksum(data, size);
    char error[TEXT_LOADER_ERROR_BYTES] = "";
    TextLoader *loader = text_loader_open(input_file(shard, size, ".bin"), NULL, NULL, error);
    free(shard);
    if (!loader) {
        input_check_error(error);
        return 0;
    }
    uint64_t length = text_loader_tokens(loader), bytes;
    uint32_t hash;
    int token;
    assert(length > 0 && length <= size && !text_loader_is_text(loader) && !text_loader_text(loader, &bytes));
    assert(text_loader_vocab(loader) >= 0 && (text_loader_tokenizer(loader, &hash) || hash == 0));
    read_tokens(loader, length, INT32_MAX);
    read_tokens(loader, 7, 256);
    assert(!text_loader_read(loader, length, 1, INT32_MAX, &token, error));
    assert(!text_loader_read(loader, UINT64_MAX, 2, INT32_MAX, &token, error));
    text_loader_close(loader);
    return 0;
}
