/* Fuzz target: a safetensors file from memory (model/safetensors.h), as anyone may hand it to --init-from.
 *
 * Whatever the bytes are, the file is refused with one line, or every tensor in it can be read: it lies inside the
 * bytes, apart from the others, its shape matches its size, and its name finds it.
 *
 * Run by tests/fuzz.sh; tests/test_fuzz_corpus.c replays its corpus. Read next: fuzz_shard.c.
 */
#include "../../model/safetensors.h"
#include "input.h"

static const size_t ELEMENT_BYTES[SAFETENSORS_DTYPES] = {8, 4, 2, 2};

static void check_tensor(const SafetensorsFile *file, int i, const uint8_t *data, size_t size) {
    const SafetensorsItem *item = &file->items[i];
    const uint8_t *bytes = item->data;
    assert(bytes >= data + 8 && bytes <= data + size && item->bytes <= (size_t)(data + size - bytes));
    for (size_t b = 0; b < item->bytes; b++) {
        volatile uint8_t read = bytes[b];
        (void)read;
    }
    double product = ELEMENT_BYTES[item->dtype]; /* where the integers would overflow it does not */
    assert(item->ndim >= 0 && item->ndim <= 4);
    for (int d = 0; d < item->ndim; d++) {
        product *= (double)item->shape[d];
    }
    assert(product == (double)item->bytes);
    for (int j = 0; j < i; j++) {
        const uint8_t *other = file->items[j].data;
        assert(other + file->items[j].bytes <= bytes || bytes + item->bytes <= other);
    }
    assert(i == 0 || strcmp(file->items[i - 1].name, item->name) < 0);
    assert(safetensors_find(file, item->name) == item);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    SafetensorsFile file;
    char error[512] = "";
    if (!safetensors_parse(&file, "input", data, size, error, sizeof error)) {
        input_check_error(error);
        assert(!file.items && !file.map);
        return 0;
    }
    for (int i = 0; i < file.count; i++) {
        check_tensor(&file, i, data, size);
    }
    /* a name that no file asked for: the input's own */
    char *text = input_text(data, size);
    const SafetensorsItem *found = safetensors_find(&file, text + 8);
    assert(!found || strcmp(found->name, text + 8) == 0);
    free(text);
    safetensors_close(&file);
    return 0;
}
