/* Fuzz target: a config.json of Hugging Face transformers (model/hf_config.h), as --init-from reads it.
 *
 * Whatever the text is, it is refused with one line and changes nothing, or it is a model. One that can be exported too
 * is the same model when its export is read, bit for bit.
 *
 * Run by tests/fuzz.sh; tests/test_fuzz_corpus.c replays its corpus. Read next: fuzz_tokenizer.c.
 */
#include "../../model/hf_config.h"
#include "input.h"

static void check_export(const Config *config, HfArchitecture architecture) {
    HfArchitecture written, again_read;
    char error[512] = "";
    Config again;
    if (!hf_architecture(&config->model, &written, error, sizeof error)) {
        input_check_error(error);
        return;
    }
    assert(written == architecture);
    char *json = hf_config_write(&config->model, written, 0);
    assert(hf_config_is(json));
    config_defaults(&again);
    bool accepted = hf_config_read(&again, &again_read, json, error, sizeof error);
    if (!accepted) {
        fprintf(stderr, "%s\nis refused: %s\n", json, error);
    }
    assert(accepted && again_read == written);
    config_derive(&again);
    assert(memcmp(&config->model, &again.model, sizeof again.model) == 0); /* config_defaults zeroed the padding, too */
    free(json);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    Config config, before;
    HfArchitecture architecture;
    char error[512] = "";
    config_defaults(&config);
    memcpy(&before, &config, sizeof before);
    char *json = input_text(data, size);
    bool is_one = hf_config_is(json);
    if (hf_config_read(&config, &architecture, json, error, sizeof error)) {
        assert(is_one);
        config_derive(&config);
        check_export(&config, architecture);
    } else {
        input_check_error(error);
        assert(memcmp(&before, &config, sizeof before) == 0);
    }
    free(json);
    return 0;
}
