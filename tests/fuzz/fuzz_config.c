/* Fuzz target: a run's config.json (model/config.h), as --resume and --init-from read it.
 *
 * Whatever the text is, it is refused with one line and changes nothing, or it is a configuration that survives being
 * written and read again, bit for bit, also after what follows from the options has been filled in.
 *
 * Run by tests/fuzz.sh; tests/test_fuzz_corpus.c replays its corpus. Read next: fuzz_hf_config.c.
 */
#include "../../model/config.h"
#include "input.h"

static void check_round_trip(const Config *config) {
    Config again;
    char error[512] = "";
    config_defaults(&again);
    char *json = config_to_json(config);
    bool accepted = config_from_json(&again, json, error, sizeof error);
    if (!accepted) {
        fprintf(stderr, "%s\nis refused: %s\n", json, error);
    }
    assert(accepted);
    /* the parts without padding between their fields and the padding, which config_defaults zeroed */
    assert(memcmp(&config->model, &again.model, sizeof again.model) == 0);
    assert(memcmp(&config->train, &again.train, sizeof again.train) == 0);
    free(json);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    Config config, before;
    char error[512] = "";
    config_defaults(&config);
    memcpy(&before, &config, sizeof before);
    char *json = input_text(data, size);
    if (config_from_json(&config, json, error, sizeof error)) {
        check_round_trip(&config);
        config_derive(&config);
        check_round_trip(&config);
    } else {
        input_check_error(error);
        assert(memcmp(&before, &config, sizeof before) == 0);
    }
    free(json);
    return 0;
}
