/* --export-hf: the five files, which directories may be replaced, and what is left when something fails.
 *
 * The system calls that change the disk are interposed: the n-th of them fails, or ends the process, for every n until
 * an export completes. The earlier export must lie there whole, or the new one. Read next: model/hf_export.c.
 */
// link: -Wl,--wrap=write,--wrap=fsync,--wrap=rename,--wrap=mkdir,--wrap=unlink,--wrap=rmdir
#include "hf_folder.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "../model/safetensors.h"
#include "forked.h"

/* ---- the interposed calls */

typedef enum { PASS, FAIL, CRASH } Mode;

static struct {
    Mode mode;
    int countdown; /* it happens at the call that brings this to 0 */
} trap;

static bool trapped(void) {
    if (trap.mode == PASS || --trap.countdown != 0) {
        return false;
    }
    if (trap.mode == CRASH) {
        _exit(42);
    }
    errno = ENOSPC;
    return true;
}

ssize_t __real_write(int fd, const void *data, size_t bytes);
int __real_rename(const char *from, const char *to);
int __real_mkdir(const char *path, mode_t mode);
int __real_unlink(const char *path);
int __real_rmdir(const char *path);

ssize_t __wrap_write(int fd, const void *data, size_t bytes) {
    return trapped() ? -1 : __real_write(fd, data, bytes);
}

int __wrap_fsync(int fd) {
    return trapped() ? -1 : 0; /* the disk itself is not under test, and this is much faster */
}

int __wrap_rename(const char *from, const char *to) {
    return trapped() ? -1 : __real_rename(from, to);
}

int __wrap_mkdir(const char *path, mode_t mode) {
    return trapped() ? -1 : __real_mkdir(path, mode);
}

/* Clearing away may fail without harm, so only a crash in it is of interest. */
int __wrap_unlink(const char *path) {
    return trap.mode == CRASH && trapped() ? -1 : __real_unlink(path);
}

int __wrap_rmdir(const char *path) {
    return trap.mode == CRASH && trapped() ? -1 : __real_rmdir(path);
}

/* ---- looking at folders */

static bool present(const char *path) {
    return access(path, F_OK) == 0;
}

static const char *beside(const char *directory, const char *suffix) {
    char name[64];
    snprintf(name, sizeof name, "%s%s", directory, suffix);
    return in_root(name);
}

static int entries(const char *path) {
    DIR *directory = opendir(path);
    assert_non_null(directory);
    int count = 0;
    for (struct dirent *entry; (entry = readdir(directory));) {
        count += entry->d_name[0] != '.';
    }
    closedir(directory);
    return count;
}

/* Whether the folder is that model's export, whole: five files, and the weights one by one. */
static bool holds(const char *directory, const Model *m) {
    char path[300], error[512];
    SafetensorsFile file;
    snprintf(path, sizeof path, "%s/model.safetensors", directory);
    if (!present(directory) || entries(directory) != 5 || !safetensors_open(&file, path, error, sizeof error)) {
        return false;
    }
    const SafetensorsItem *item = safetensors_find(&file, "model.embed_tokens.weight");
    bool same = item && item->bytes == sizeof(float) * m->tensors.items[0].count;
    for (size_t i = 0; same && i < m->tensors.items[0].count; i++) {
        float value;
        memcpy(&value, (const char *)item->data + i * sizeof value, sizeof value);
        same = value == value_at(m, "embedding.w", i);
    }
    safetensors_close(&file);
    return same;
}

/* ---- the files */

static void expect_text(const char *directory, const char *name, const char *expected) {
    char path[300];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    char *text = file_text(path, NULL);
    assert_string_equal(text, expected);
    free(text);
}

static void test_five_files(void **unused) {
    static const int ends[] = {-1, 7};
    for (int i = 0; i < 2; i++) {
        char error[512];
        Model m = make_model("");
        Vocabulary vocabulary = stand_in(ends[i]);
        const char *directory = in_root("five");
        assert_true(hf_export(directory, &m.config.model, &m.tensors, m.weights, &vocabulary, error, sizeof error));
        assert_true(holds(directory, &m));
        char *config = hf_config_write(&m.config.model, HF_QWEN3_MOE, ends[i]);
        char *generation = hf_generation_config_write(ends[i]);
        expect_text(directory, "config.json", config);
        expect_text(directory, "generation_config.json", generation);
        expect_text(directory, "tokenizer.json", TOKENIZER_JSON);
        free(config);
        free(generation);

        char *text = file_text(in_root("five/tokenizer_config.json"), NULL);
        cJSON *json = cJSON_Parse(text);
        assert_string_equal(cJSON_GetStringValue(cJSON_GetObjectItem(json, "tokenizer_class")),
                            "PreTrainedTokenizerFast");
        assert_int_equal(cJSON_GetNumberValue(cJSON_GetObjectItem(json, "model_max_length")), 16);
        assert_true(cJSON_IsFalse(cJSON_GetObjectItem(json, "clean_up_tokenization_spaces")));
        const cJSON *end = cJSON_GetObjectItem(json, "eos_token");
        if (ends[i] < 0) {
            assert_null(end);
        } else {
            assert_string_equal(cJSON_GetStringValue(end), "<|end \"of\" text|>");
        }
        assert_int_equal(cJSON_GetArraySize(json), ends[i] < 0 ? 3 : 4);
        cJSON_Delete(json);
        free(text);
        free_model(&m);
    }
}

/* ---- directories */

static void test_replaces(void **unused) {
    Model first = make_model_of("", 1), second = make_model_of("", 2);
    const char *directory = in_root("twice");
    export_model(&first, directory);
    assert_true(holds(directory, &first));
    assert_false(holds(directory, &second));
    export_model(&second, in_root("twice///"));
    assert_true(holds(directory, &second));
    assert_false(present(beside("twice", ".tmp")));
    assert_false(present(beside("twice", ".old")));
    free_model(&first);
    free_model(&second);
}

static void refuse_export(const char *directory, const char *words) {
    char error[512] = "";
    Model m = make_model("");
    assert_false(try_export(&m, directory, error, sizeof error));
    if (!strstr(error, words) || strchr(error, '\n')) {
        fail_msg("'%s' does not say '%s'", error, words);
    }
    free_model(&m);
}

/* What is not an export is neither replaced nor touched, wherever it lies. */
static void test_keeps_other_files(void **unused) {
    static const char *const names[] = {"kept", "kept.tmp", "kept.old"};
    for (int i = 0; i < 3; i++) {
        char note[64], config[64];
        mkdir(in_root(names[i]), 0777);
        snprintf(note, sizeof note, "%s/notes.txt", names[i]);
        snprintf(config, sizeof config, "%s/config.json", names[i]);
        put_file(in_root(note), "mine");
        put_file(in_root(config), "mine, too");
        refuse_export(in_root("kept"), "holds 'notes.txt'");
        assert_true(present(in_root(note)) && present(in_root(config)));
        remove_tree(in_root(names[i]));
    }
    put_file(in_root("kept"), "a file");
    refuse_export(in_root("kept"), "not a directory that can be replaced");
    remove_tree(in_root("kept"));
    /* a link may lead to files of those names that are someone else's */
    mkdir(in_root("elsewhere"), 0777);
    put_file(in_root("elsewhere/config.json"), "mine");
    assert_int_equal(symlink(in_root("elsewhere"), in_root("kept")), 0);
    refuse_export(in_root("kept"), "not a directory that can be replaced");
    unlink(in_root("kept"));
    mkdir(in_root("kept"), 0777);
    mkdir(in_root("kept/config.json"), 0777); /* of the right name, but no file */
    refuse_export(in_root("kept"), "holds 'config.json'");
    remove_tree(in_root("kept"));
    assert_true(present(in_root("elsewhere/config.json")));
}

static void test_bad_names(void **unused) {
    char name[2000];
    refuse_export("/", "name a folder");
    refuse_export("", "name a folder");
    refuse_export("..", "name a folder");
    refuse_export("./", "name a folder");
    refuse_export(in_root("nowhere/there"), "cannot create");
    memset(name, 'x', sizeof name - 1);
    name[sizeof name - 1] = '\0';
    refuse_export(name, "too long");
}

/* What an interrupted export left in both places is cleared away. */
static void test_clears_leftovers(void **unused) {
    Model first = make_model_of("", 1), second = make_model_of("", 2);
    for (int standing = 0; standing < 2; standing++) {
        mkdir(in_root("left.tmp"), 0777);
        put_file(in_root("left.tmp/model.safetensors"), "half");
        mkdir(in_root("left.old"), 0777);
        put_file(in_root("left.old/config.json"), "the last of it");
        export_model(standing ? &first : &second, in_root("left/"));
        assert_true(holds(in_root("left"), standing ? &first : &second));
        assert_false(present(in_root("left.tmp")));
        assert_false(present(in_root("left.old")));
    }
    free_model(&first);
    free_model(&second);
}

static void check_directory(void *argument) {
    Model m = make_model("");
    hf_export_check(argument, &m.config.model);
    free_model(&m);
}

static void check_gelu(void *argument) {
    Model m = make_model("--act gelu");
    hf_export_check(argument, &m.config.model);
}

static void test_check(void **unused) {
    Forked result;
    run_forked(&result, check_directory, (void *)in_root("a/b/c/"));
    assert_int_equal(result.exit_code, 0);
    assert_string_equal(result.err, "");
    assert_true(present(in_root("a/b")));
    assert_int_equal(entries(in_root("a/b")), 0); /* asked, but nothing left behind */
    run_forked(&result, check_gelu, (void *)in_root("gelu"));
    assert_refused(&result, "--export-hf");
    assert_refused(&result, "--act gelu");
    assert_false(present(in_root("gelu")));
    put_file(in_root("plain"), "a file");
    run_forked(&result, check_directory, (void *)in_root("plain/c"));
    assert_refused(&result, "--export-hf");
    run_forked(&result, check_directory, (void *)in_root("plain"));
    assert_refused(&result, "not a directory that can be replaced");
    run_forked(&result, check_directory, "/proc/moelab");
    assert_refused(&result, "cannot create /proc/moelab.tmp");
    mkdir(in_root("full"), 0777);
    put_file(in_root("full/log.jsonl"), "");
    run_forked(&result, check_directory, (void *)in_root("full"));
    assert_refused(&result, "holds 'log.jsonl'");
}

/* ---- failures */

enum { MOST_CALLS = 200 };

/* Every write, sync, rename and mkdir fails once: no export, one line, the earlier one untouched, nothing left. */
static void test_each_call_fails(void **unused) {
    Model first = make_model_of("", 1), second = make_model_of("", 2);
    char directory[256];
    snprintf(directory, sizeof directory, "%s", in_root("fails"));
    for (int earlier = 0; earlier < 2; earlier++) {
        int failures = 0;
        for (bool exported = false; !exported; failures++) {
            char error[512] = "";
            assert_true(failures < MOST_CALLS);
            remove_tree(directory);
            if (earlier) {
                export_model(&first, directory);
            }
            trap.mode = FAIL;
            trap.countdown = failures + 1;
            exported = try_export(&second, directory, error, sizeof error);
            trap.mode = PASS;
            assert_false(present(beside("fails", ".tmp")));
            assert_false(present(beside("fails", ".old")));
            if (exported) {
                assert_true(holds(directory, &second));
            } else {
                assert_non_null(strstr(error, strerror(ENOSPC)));
                assert_null(strchr(error, '\n'));
                assert_int_equal(present(directory), earlier);
                assert_true(!earlier || holds(directory, &first));
            }
        }
        assert_true(failures >= 5 * 2 + 3); /* five files written and synced, a directory made, renamed and synced */
    }
    remove_tree(directory);
    free_model(&first);
    free_model(&second);
}

typedef struct {
    const Model *model;
    const char *directory;
} Work;

static void export_work(void *argument) {
    const Work *work = argument;
    trap.mode = CRASH;
    export_model(work->model, work->directory);
}

/* The process ends at every call: what is there is whole, and the next export clears away the rest. */
static void test_each_call_crashes(void **unused) {
    Model first = make_model_of("", 1), second = make_model_of("", 2), third = make_model_of("", 3);
    char directory[256], old[256];
    snprintf(directory, sizeof directory, "%s", in_root("crash"));
    snprintf(old, sizeof old, "%s", in_root("crash.old"));
    int crashes = 0, seen_old = 0;
    for (bool ended = false; !ended; crashes++) {
        Forked result;
        Work work = {&second, directory};
        assert_true(crashes < MOST_CALLS);
        export_model(&first, directory);
        trap.countdown = crashes + 1;
        run_forked(&result, export_work, &work);
        ended = result.exit_code == 0;
        assert_true(ended || result.exit_code == 42);
        bool aside = !present(directory);
        seen_old += aside;
        assert_true(holds(aside ? old : directory, &first) || holds(directory, &second));
        if (aside) { /* put back by an export that itself fails */
            char error[512];
            trap.mode = FAIL;
            trap.countdown = 3;
            assert_false(try_export(&third, directory, error, sizeof error));
            trap.mode = PASS;
            assert_true(holds(directory, &first));
        }
        export_model(&third, directory);
        assert_true(holds(directory, &third));
        assert_false(present(beside("crash", ".tmp")));
        assert_false(present(old));
    }
    assert_true(crashes >= 5 * 2 + 3 && seen_old >= 1);
    free_model(&first);
    free_model(&second);
    free_model(&third);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_five_files),        cmocka_unit_test(test_replaces),
        cmocka_unit_test(test_keeps_other_files), cmocka_unit_test(test_bad_names),
        cmocka_unit_test(test_clears_leftovers),  cmocka_unit_test(test_check),
        cmocka_unit_test(test_each_call_fails),   cmocka_unit_test(test_each_call_crashes),
    };
    return cmocka_run_group_tests(tests, make_root, remove_root);
}
