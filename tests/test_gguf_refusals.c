/* --export-gguf when it cannot be done: models and vocabularies that llama.cpp would compute otherwise are refused, and
 * a write that fails leaves nothing behind. And gguf_reader.py, which test_gguf.c relies on, notices what is wrong with
 * a file. Needs python3. Read next: model/gguf.c.
 */
#include "gguf_fixture.h"

#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>

/* ---- refusals and failures */

static void assert_one_line(const char *error, const char *words) {
    if (!strstr(error, words) || strchr(error, '\n')) {
        fail_msg("'%s' should be one line that says '%s'", error, words);
    }
}

static int entries_of_folder(void) {
    DIR *entries = opendir(folder);
    assert_non_null(entries);
    int count = -2; /* . and .. */
    while (readdir(entries)) {
        count++;
    }
    closedir(entries);
    return count;
}

static void test_models_refused(void **unused) {
    static const char *const CASES[][2] = {
        {"--router topk --renorm 1", NULL},
        {"--tie 1 --top-k 3", NULL},
        {"--renorm 0", "llama.cpp renormalises"},
        {"--router top1", "than --router top1 --renorm 0"},
        {"--moe-every 2", "qwen3moe has no dense layers as of --moe-every 2"},
        {"--qk-norm 0", "with --qk-norm 0 llama.cpp rotates neighbouring values"},
        {"--qk-norm 0 --renorm 0", "--renorm"},
        {"--router sigmoid", "--router"},
        {"--shared-experts 1", "--shared-experts"},
        {"--act gelu", "--act"},
        {"--capacity-factor 1.25", "--capacity-factor"},
        {"--objective mlm", "--objective"},
    };
    unlink(path);
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        char options[512], error[512] = "";
        snprintf(options, sizeof options, SMALL "%s", CASES[i][0]);
        Vocabulary vocabulary = letters();
        Config config;
        config_defaults(&config);
        set_options(&config, options);
        config_finish(&config);
        bool expressed = gguf_expresses(&config.model, &vocabulary, error, sizeof error);
        if (expressed != !CASES[i][1]) {
            fail_msg("%s: %s", CASES[i][0], expressed ? "accepted" : error);
        }
        if (!expressed) {
            assert_one_line(error, CASES[i][1]);
            Model m = make_model(options);
            error[0] = '\0';
            assert_false(gguf_export(path, &m.config.model, &m.tensors, m.weights, &vocabulary, error, sizeof error));
            assert_one_line(error, CASES[i][1]);
            free_model(&m);
        }
    }
    assert_int_equal(entries_of_folder(), 0);
}

static void assert_not_written(const Model *m, const Vocabulary *vocabulary, const char *where, const char *words) {
    char error[512] = "";
    assert_false(gguf_export(where, &m->config.model, &m->tensors, m->weights, vocabulary, error, sizeof error));
    assert_one_line(error, words);
}

static void test_vocabularies_refused(void **unused) {
    Model m = make_model(SMALL "--vocab 5");
    Vocabulary vocabulary = letters();
    export_model(&m, &vocabulary);
    unlink(path);
    vocabulary.pattern = NULL;
    assert_not_written(&m, &vocabulary, path, "cuts text into words");
    vocabulary = letters();
    vocabulary.size = 6;
    assert_not_written(&m, &vocabulary, path, "the tokenizer has 6 tokens, but --vocab is 5");
    assert_int_equal(entries_of_folder(), 0);
    free_model(&m);
}

static void test_places_refused(void **unused) {
    Model m = make_model(SMALL);
    Vocabulary vocabulary = letters();
    char place[128];
    snprintf(place, sizeof place, "%s/none/x.gguf", folder);
    assert_not_written(&m, &vocabulary, place, "none/x.gguf (No such file or directory)");
    snprintf(place, sizeof place, "%s/taken", folder);
    assert_int_equal(mkdir(place, 0700), 0);
    assert_not_written(&m, &vocabulary, place, "taken (Is a directory)");
    assert_int_equal(entries_of_folder(), 1); /* no taken.tmp */
    rmdir(place);
    free_model(&m);
}

static uint32_t file_crc(off_t *size) {
    FILE *file = fopen(path, "rb");
    assert_non_null(file);
    static char bytes[1 << 18];
    size_t length = fread(bytes, 1, sizeof bytes, file);
    assert_true(feof(file));
    fclose(file);
    *size = (off_t)length;
    return crc32_of(bytes, length);
}

/* A disk that is full after so many bytes: the export fails, and an earlier file stays as it was. */
static void test_full_disk(void **unused) {
    Model m = make_model(SMALL);
    Vocabulary vocabulary = letters();
    export_model(&m, &vocabulary);
    off_t size, size_after;
    uint32_t before = file_crc(&size);
    m.weights[0] += 1;
    struct rlimit whole, limit;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &whole), 0);
    signal(SIGXFSZ, SIG_IGN); /* write() then fails with EFBIG */
    off_t full_at[] = {0, 100, 5000, size / 2, size - 40, size - 1};
    for (size_t i = 0; i < sizeof full_at / sizeof *full_at; i++) {
        limit = whole;
        limit.rlim_cur = (rlim_t)full_at[i];
        char error[512] = "";
        setrlimit(RLIMIT_FSIZE, &limit);
        bool written = gguf_export(path, &m.config.model, &m.tensors, m.weights, &vocabulary, error, sizeof error);
        setrlimit(RLIMIT_FSIZE, &whole);
        assert_false(written);
        assert_one_line(error, strerror(EFBIG));
        assert_int_equal(file_crc(&size_after), before);
        assert_int_equal(entries_of_folder(), 1);
    }
    signal(SIGXFSZ, SIG_DFL);
    export_model(&m, &vocabulary);
    assert_true(file_crc(&size_after) != before);
    assert_true(size_after == size);
    free_model(&m);
}

/* ---- the reader itself: it would notice */

/* Where the bytes of `text` are in the file. */
static long find_in_file(const char *text) {
    FILE *file = fopen(path, "rb");
    assert_non_null(file);
    static char bytes[1 << 18];
    size_t length = fread(bytes, 1, sizeof bytes, file), n = strlen(text);
    fclose(file);
    for (size_t i = 0; i + n <= length; i++) {
        if (memcmp(bytes + i, text, n) == 0) {
            return (long)i;
        }
    }
    fail_msg("'%s' is not in the file", text);
    return -1;
}

static void overwrite(long position, const void *bytes, size_t count) {
    FILE *file = fopen(path, "r+b");
    assert_non_null(file);
    assert_int_equal(fseek(file, position, SEEK_SET), 0);
    assert_int_equal(fwrite(bytes, 1, count, file), count);
    assert_int_equal(fclose(file), 0);
}

static void test_reader_refuses(void **unused) {
    static char output[MOST_OUTPUT];
    enum { NAME_TO_EXTENT = 4, NAME_TO_OFFSET = 4 + 8 + 4 }; /* of a vector: after name, dimensions, extent, type */
    const struct {
        const char *near;
        long from_end;
        const char *bytes;
        size_t count;
        const char *says;
    } CASES[] = {
        {"GGUF", -4, "GGUV", 4, "does not begin with GGUF"},
        {"GGUF", 0, "\2", 1, "has version 2"},
        {"qwen3moe.block_count", 4, "\3", 1, "tensor blk.2.attn_norm.weight is missing"},
        {"qwen3moe.expert_count", 4, "\4", 1, "blk.0.ffn_gate_inp.weight is [22, 3], expected [22, 4]"},
        {"qwen3moe.rope.dimension_count", 4, "\4", 1, "rotation must take all of a head"},
        {"qwen3moe.attention.head_count", -1, "x", 1, "key qwen3moe.attention.head_count is missing"},
        {"general.alignment", 4, "\60", 1, "alignment 48"},
        {"tokenizer.ggml.tokens", 4 + 4 + 8 + 8, "b", 1, "a token is empty or there twice"},
        {"output_norm.weight", NAME_TO_EXTENT, "\27", 1, "output_norm.weight is [23], expected [22]"},
        {"output_norm.weight", NAME_TO_EXTENT + 1, "\1", 1, "tensor output.weight lies at"},
        {"output_norm.weight", NAME_TO_OFFSET, "\1", 1, "no multiple of 32"},
        {"blk.0.attn_norm.weight", -22, "blk.1", 5, "tensor 'blk.1.attn_norm.weight' is there twice"},
    };
    Model m = make_model(SMALL);
    Vocabulary vocabulary = letters();
    for (size_t i = 0; i < sizeof CASES / sizeof *CASES; i++) {
        export_model(&m, &vocabulary);
        overwrite(find_in_file(CASES[i].near) + (long)strlen(CASES[i].near) + CASES[i].from_end, CASES[i].bytes,
                  CASES[i].count);
        int status = run_reader(output);
        if (status != 1 || !strstr(output, CASES[i].says)) {
            fail_msg("case %zu ends with %d, not saying '%s': %s", i, status, CASES[i].says, output);
        }
    }
    export_model(&m, &vocabulary);
    off_t size;
    file_crc(&size);
    assert_int_equal(truncate(path, size - 64), 0);
    assert_int_equal(run_reader(output), 1);
    assert_non_null(strstr(output, "ends inside a value"));
    free_model(&m);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_models_refused), cmocka_unit_test(test_vocabularies_refused),
        cmocka_unit_test(test_places_refused), cmocka_unit_test(test_full_disk),
        cmocka_unit_test(test_reader_refuses),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
