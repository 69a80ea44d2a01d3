/* Fuzz target: a tokenizer.json (data/tokenizer.h), as anyone may hand it to --tokenizer.
 *
 * Whatever the bytes are, they are refused with one line, or they are a tokenizer whose tokens and merges can be
 * listed, and whatever it encodes, whole or in chunks, it decodes to the same bytes: a text of many scripts and broken
 * UTF-8, and the end of the input itself.
 *
 * Run by tests/fuzz.sh; tests/test_fuzz_corpus.c replays its corpus. Read next: ../test_fuzz_corpus.c.
 */
#include "../../data/tokenizer_parts.h"
#include "input.h"

/* In normal form C. */
static const char MIXED_TEXT[] =
    "It's 2024: we've 1,234,567 words...  \t\r\n\n  x = f(y);<|endoftext|> \xc3\xa9t\xc3\xa9 \xe6\x97\xa5\xe6\x9c\xac "
    "\xd9\xa3 \xf0\x9f\x99\x82\xc2\xa0\xe2\x80\xa8 \xff\xc3 \xed\xa0\x80 aaaaaaaaaaaaaaaa ";

/* Cutting a text for several threads makes no difference. */
static void check_chunks(const Tokenizer *tokenizer, const char *text, size_t bytes, const int *ids, size_t count) {
    int *chunked;
    size_t chunked_count;
    char error[512] = "";
    bool good = tokenizer_encode_chunked(tokenizer, text, bytes, 32, &chunked, &chunked_count, error, sizeof error);
    assert(good && chunked_count == count && memcmp(chunked, ids, count * sizeof *ids) == 0);
    free(chunked);
}

/* normal: the text is in normal form C, so that no normalizer changes it. */
static void check_text(const Tokenizer *tokenizer, const char *text, size_t bytes, bool normal) {
    int *ids;
    size_t count, decoded_bytes;
    char error[512] = "";
    if (!tokenizer_encode(tokenizer, text, bytes, &ids, &count, error, sizeof error)) {
        input_check_error(error); /* a byte without a token */
        return;
    }
    for (size_t i = 0; i < count; i++) {
        assert(ids[i] >= 0 && ids[i] < tokenizer_vocab(tokenizer));
    }
    char *decoded = tokenizer_decode(tokenizer, ids, count, &decoded_bytes);
    assert(decoded && decoded[decoded_bytes] == '\0');
    bool same = decoded_bytes == bytes && memcmp(decoded, text, bytes) == 0;
    assert(same || (tokenizer->nfc && !normal));
    free(decoded);
    check_chunks(tokenizer, text, bytes, ids, count);
    free(ids);
}

/* Most ids may have no token: the first ones, the last ones and some between are asked for. */
static void list_tokens(const Tokenizer *tokenizer) {
    int vocab = tokenizer_vocab(tokenizer), end = tokenizer_end_of_text(tokenizer);
    for (int64_t id = -1; id <= vocab; id += id < 1000 || id > vocab - 100 ? 1 : 99) {
        size_t bytes = 0, sum = 0;
        const char *token = tokenizer_token(tokenizer, (int)id, &bytes);
        const char *text = tokenizer_token_text(tokenizer, (int)id);
        for (size_t i = 0; token && i < bytes; i++) {
            sum += (unsigned char)token[i];
        }
        assert(!token == !text && (id >= 0 && id < vocab ? true : !token) && (!text || strlen(text) + sum > 0));
        assert(!tokenizer_is_special(tokenizer, (int)id) || tokenizer_is_added(tokenizer, (int)id));
    }
    for (int rank = 0; rank < tokenizer_merges(tokenizer); rank++) {
        assert(strchr(tokenizer_merge_text(tokenizer, rank), ' '));
    }
    assert(end == -1 || (end >= 0 && end < vocab && tokenizer_is_special(tokenizer, end)));
    assert(tokenizer_hash(tokenizer) != 0 && (!tokenizer_is_bytes(tokenizer) || vocab == 256));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char error[512] = "";
    char *json = input_text(data, size);
    Tokenizer *tokenizer = tokenizer_parse(json, size, "input", error, sizeof error);
    if (tokenizer) {
        list_tokens(tokenizer);
        size_t tail = size < 200 ? size : 200;
        check_text(tokenizer, MIXED_TEXT, sizeof MIXED_TEXT - 1, true);
        check_text(tokenizer, "", 0, true);
        check_text(tokenizer, json + size - tail, tail, false);
        tokenizer_close(tokenizer);
    } else {
        input_check_error(error);
    }
    free(json);
    return 0;
}
