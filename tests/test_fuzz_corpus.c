/* Replays the corpus of every fuzz target: inputs that once crashed it, and sound ones, which reach deep.
 *
 * A target (fuzz/fuzz_NAME.c) is a function of some bytes that ends the program when something is wrong. libFuzzer
 * calls it with millions of inputs (fuzz.sh); here it meets the files of fuzz/corpus/NAME, each in a process of its
 * own, so that one failure does not hide the next. No libFuzzer is needed.
 */
// link: -Wl,--wrap=mmap,--wrap=munmap
#include <dirent.h>

#include "forked.h"

#define LLVMFuzzerTestOneInput fuzz_safetensors
#include "fuzz/fuzz_safetensors.c"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_shard
#include "fuzz/fuzz_shard.c"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_choices
#include "fuzz/fuzz_choices.c"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_config
#include "fuzz/fuzz_config.c"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_hf_config
#include "fuzz/fuzz_hf_config.c"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_tokenizer
#include "fuzz/fuzz_tokenizer.c"
#undef LLVMFuzzerTestOneInput

typedef struct {
    const char *name;
    int (*run)(const uint8_t *data, size_t size);
    char path[512]; /* of the file being replayed */
} Target;

static void replay_file(void *argument) {
    const Target *target = argument;
    FILE *file = fopen(target->path, "rb");
    assert(file);
    enum { LONGEST = 1 << 20 };
    char *buffer = malloc(LONGEST);
    size_t size = fread(buffer, 1, LONGEST, file);
    fclose(file);
    uint8_t *data = malloc(size); /* exactly as long, for AddressSanitizer */
    assert(buffer && data && size < LONGEST);
    memcpy(data, buffer, size);
    target->run(data, size);
    free(data);
    free(buffer);
}

static void replay_corpus(void **state) {
    Target *target = *state;
    char folder[256];
    snprintf(folder, sizeof folder, "tests/fuzz/corpus/%s", target->name);
    DIR *directory = opendir(folder);
    if (!directory) {
        fail_msg("cannot open %s: tests run in the root of the repository", folder);
    }
    int files = 0, failed = 0;
    for (struct dirent *entry; (entry = readdir(directory));) {
        if (entry->d_name[0] == '.') {
            continue;
        }
        Forked result;
        snprintf(target->path, sizeof target->path, "%s/%s", folder, entry->d_name);
        run_forked(&result, replay_file, target);
        files++;
        if (result.exit_code != 0) {
            failed++;
            print_error("%s: exit code %d\n%s\n", target->path, result.exit_code, result.err);
        }
    }
    closedir(directory);
    assert_int_equal(failed, 0);
    assert_in_range(files, 3, 1000);
}

static char temporary[] = "/tmp/test_fuzz_corpus_XXXXXX";

static int make_folder(void **unused) {
    return mkdtemp(temporary) && setenv("TMPDIR", temporary, 1) == 0 ? 0 : -1;
}

/* With what crashed targets left in it. */
static int remove_folder(void **unused) {
    char path[512];
    DIR *directory = opendir(temporary);
    for (struct dirent *entry; directory && (entry = readdir(directory));) {
        snprintf(path, sizeof path, "%s/%s", temporary, entry->d_name);
        unlink(path);
    }
    closedir(directory);
    return rmdir(temporary);
}

static Target targets[] = {
    {"safetensors", fuzz_safetensors, ""}, {"shard", fuzz_shard, ""},         {"choices", fuzz_choices, ""},
    {"config", fuzz_config, ""},           {"hf_config", fuzz_hf_config, ""}, {"tokenizer", fuzz_tokenizer, ""},
};

enum { TARGETS = sizeof targets / sizeof *targets };

int main(void) {
    struct CMUnitTest tests[TARGETS];
    for (int i = 0; i < TARGETS; i++) {
        tests[i] = (struct CMUnitTest){targets[i].name, replay_corpus, NULL, NULL, &targets[i]};
    }
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
