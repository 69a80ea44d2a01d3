/* The run directory and its log: the header, what a resume keeps, whose directory it is, and writes that fail. */
#include "forked.h"

#include <cjson/cJSON.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "../model/log.h"

enum { TEXT_SIZE = 32768 };

static char directory[] = "/tmp/moelab-log-XXXXXX";
static int runs_made = 0;

static const char *const domain_names[] = {"stories", "\"quoted\""};
static const int moe_layers[] = {1, 3};
static const LogHeader header = {
    .device = "a CPU",
    .params_total = 5000000000,
    .params_active = 1234,
    .params_trainable = 567,
    .flops_per_token = 1.5e9,
    .domain_count = 2,
    .domains = domain_names,
    .moe_layer_count = 2,
    .moe_layers = moe_layers,
    .learned = true,
    .leaky = true,
};

/* The configuration of a run in a directory of its own. */
static Config fresh_config(void) {
    Config config;
    config_defaults(&config);
    snprintf(config.train.out, sizeof config.train.out, "%s/runs/%d", directory, runs_made++);
    return config;
}

static void in_run(const Config *config, const char *name, char *path, size_t size) {
    snprintf(path, size, "%s/%s", config->train.out, name);
}

static void read_file(const Config *config, const char *name, char *text) {
    char path[512];
    in_run(config, name, path, sizeof path);
    FILE *file = fopen(path, "r");
    assert_non_null(file);
    text[fread(text, 1, TEXT_SIZE - 1, file)] = '\0';
    fclose(file);
}

static void write_file(const Config *config, const char *name, const char *text) {
    char path[512];
    in_run(config, name, path, sizeof path);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    assert_true(fputs(text, file) >= 0);
    assert_int_equal(fclose(file), 0);
}

static bool exists(const Config *config, const char *name) {
    char path[512];
    in_run(config, name, path, sizeof path);
    return access(path, F_OK) == 0;
}

static void open_log(void *config) {
    Log log;
    log_open(&log, config, &header, 0);
    log_close(&log);
}

static void assert_open_refused(Config *config, const char *words) {
    Forked result;
    run_forked(&result, open_log, config);
    assert_refused(&result, words);
}

/* Lines of text, each of which must be one JSON object with its newline. */
static int count_objects(const char *text) {
    int lines = 0;
    for (const char *end; *text; text = end + 1, lines++) {
        end = strchr(text, '\n');
        assert_non_null(end);
        cJSON *object = cJSON_ParseWithLength(text, (size_t)(end - text));
        assert_true(cJSON_IsObject(object));
        cJSON_Delete(object);
    }
    return lines;
}

/* --- the header --- */

static const char *string_of(const cJSON *object, const char *key) {
    const char *text = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(object, key));
    assert_non_null(text);
    return text;
}

static double number_of(const cJSON *object, const char *key) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, key);
    assert_true(cJSON_IsNumber(item));
    return item->valuedouble;
}

static void test_header(void **state) {
    Config config = fresh_config();
    char text[TEXT_SIZE], saved_text[TEXT_SIZE];
    snprintf(config.train.prompt, sizeof config.train.prompt, "two\nlines\t\"and a tab\"");
    open_log(&config);
    read_file(&config, "log.jsonl", text);
    assert_int_equal(count_objects(text), 1);
    cJSON *line = cJSON_Parse(text);
    const char *keys[] = {
        "ts",        "program",    "git_sha",      "git_dirty",     "config",           "device",
        "precision", "versions",   "params_total", "params_active", "params_trainable", "flops_per_token",
        "domains",   "moe_layers", "learned",      "leaky",         "sees_batch"};
    const cJSON *item = line->child;
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++, item = item->next) {
        assert_non_null(item);
        assert_string_equal(item->string, keys[i]);
    }
    assert_null(item);

    int year, month, day, hour, minute, second, length = 0;
    sscanf(string_of(line, "ts"), "%4d-%2d-%2dT%2d:%2d:%2dZ%n", &year, &month, &day, &hour, &minute, &second, &length);
    assert_int_equal(length, 20);
    assert_string_equal(string_of(line, "program"), "moelab");
    assert_string_equal(string_of(line, "device"), "a CPU");
    assert_true(strlen(string_of(line, "git_sha")) > 0);
    const cJSON *dirty = cJSON_GetObjectItem(line, "git_dirty");
    assert_true(cJSON_IsBool(dirty) || (cJSON_IsNull(dirty) && !strcmp(string_of(line, "git_sha"), "unknown")));
    assert_true(strlen(string_of(cJSON_GetObjectItem(line, "versions"), "compiler")) > 0);
    assert_true(number_of(cJSON_GetObjectItem(line, "versions"), "openmp") >= 0);
    assert_true(number_of(line, "params_total") == 5e9);
    assert_true(number_of(line, "params_active") == 1234);
    assert_true(number_of(line, "params_trainable") == 567);
    assert_true(number_of(line, "flops_per_token") == 1.5e9);
    assert_true(cJSON_IsTrue(cJSON_GetObjectItem(line, "learned")));
    assert_true(cJSON_IsTrue(cJSON_GetObjectItem(line, "leaky")));
    assert_true(cJSON_IsFalse(cJSON_GetObjectItem(line, "sees_batch")));
    assert_int_equal(cJSON_GetArraySize(cJSON_GetObjectItem(line, "domains")), 2);
    assert_string_equal(cJSON_GetArrayItem(cJSON_GetObjectItem(line, "domains"), 1)->valuestring, "\"quoted\"");
    assert_int_equal(cJSON_GetArrayItem(cJSON_GetObjectItem(line, "moe_layers"), 1)->valueint, 3);

    read_file(&config, "config.json", saved_text);
    cJSON *saved = cJSON_Parse(saved_text);
    assert_true(cJSON_Compare(saved, cJSON_GetObjectItem(line, "config"), true));
    assert_string_equal(string_of(saved, "prompt"), "two\nlines\t\"and a tab\"");
    cJSON_Delete(saved);
    cJSON_Delete(line);
}

/* What the router sees stands in the header, the one beside the other. */
static void test_header_of_a_router_that_sees_the_batch(void **state) {
    Config config = fresh_config();
    LogHeader other = header;
    char text[TEXT_SIZE];
    Log log;
    other.learned = other.leaky = false;
    other.sees_batch = true;
    log_open(&log, &config, &other, 0);
    log_close(&log);
    read_file(&config, "log.jsonl", text);
    assert_non_null(strstr(text, ",\"learned\":false,\"leaky\":false,\"sees_batch\":true}\n"));
}

static void test_line_appends(void **state) {
    Config config = fresh_config();
    char text[TEXT_SIZE];
    Log log;
    log_open(&log, &config, &header, 0);
    log_line(&log, "{\"step\":%d,\"loss\":%.9g}", 1, 2.5);
    char *many = malloc(20001);
    memset(many, '1', 20000);
    many[20000] = '\0';
    log_line(&log, "{\"text\":\"%s\"}", many);
    free(many);
    log_close(&log);
    assert_int_equal(log.fd, -1);
    read_file(&config, "log.jsonl", text);
    assert_int_equal(count_objects(text), 3);
    assert_non_null(strstr(text, "\n{\"step\":1,\"loss\":2.5}\n"));
}

/* --- resume --- */

/* A log with a header and the given lines, then resumed at `step`: what follows the header. */
static void resume_log(const char *lines, int64_t step, char *text) {
    Config config = fresh_config();
    char earlier[TEXT_SIZE];
    Log log;
    open_log(&config);
    read_file(&config, "log.jsonl", earlier);
    size_t head = strlen(earlier);
    snprintf(earlier + head, sizeof earlier - head, "%s", lines);
    write_file(&config, "log.jsonl", earlier);
    strcpy(config.train.resume, config.train.out);
    strcat(config.train.resume, "/");
    log_open(&log, &config, &header, step);
    log_close(&log);
    read_file(&config, "log.jsonl", text);
    count_objects(text);
    assert_memory_equal(text, earlier, head);
    memmove(text, text + head, strlen(text + head) + 1);
    assert_false(exists(&config, "log.jsonl.tmp"));
}

static void test_resume_cuts_later_lines(void **state) {
    char text[TEXT_SIZE];
    const char *lines =
        "{\"event\":\"memory\",\"bytes\":1}\n{\"step\":10,\"loss\":3}\n{\"step\":20,\"loss\":2}\n"
        "{\"step\":20,\"val_loss\":2}\n{\"step\":30,\"loss\":1}\n{\"event\":\"sample\",\"text\":\"a\"}\n"
        "{\"event\":\"checkpoint\",\"step\":30}\n";
    resume_log(lines, 20, text);
    assert_string_equal(text,
                        "{\"event\":\"memory\",\"bytes\":1}\n{\"step\":10,\"loss\":3}\n{\"step\":20,\"loss\":2}\n"
                        "{\"step\":20,\"val_loss\":2}\n{\"event\":\"resume\",\"step\":20}\n");
    resume_log(lines, 0, text);
    assert_string_equal(text, "{\"event\":\"memory\",\"bytes\":1}\n{\"event\":\"resume\",\"step\":0}\n");
    resume_log(lines, 30, text);
    assert_int_equal(strlen(text), strlen(lines) + strlen("{\"event\":\"resume\",\"step\":30}\n"));
    resume_log(
        "{\"event\":\"router_gradient\",\"step\":1,\"main\":[1],\"balance\":[0]}\n"
        "{\"event\":\"alarm\",\"step\":3,\"layer\":0,\"router\":0,\"reason\":\"collapse\"}\n",
        2, text);
    assert_string_equal(text,
                        "{\"event\":\"router_gradient\",\"step\":1,\"main\":[1],\"balance\":[0]}\n"
                        "{\"event\":\"resume\",\"step\":2}\n");
}

static void test_resume_drops_lines_that_are_not_whole(void **state) {
    char text[TEXT_SIZE];
    const char *expected = "{\"step\":10,\"loss\":3}\n{\"event\":\"resume\",\"step\":10}\n";
    resume_log("{\"step\":10,\"loss\":3}\n{\"step\":10,\"val_lo", 10, text);
    assert_string_equal(text, expected);
    resume_log("{\"step\":5,\"lo{\"step\":6}\n{\"step\":10,\"loss\":3}\n17\n\n{\"step\":10}", 10, text);
    assert_string_equal(text, expected);
}

static void test_resume_without_a_log_writes_a_header(void **state) {
    Config config = fresh_config();
    char text[TEXT_SIZE];
    open_log(&config);
    snprintf(config.train.resume, sizeof config.train.resume, "%s", config.train.out);
    write_file(&config, "log.jsonl", "{\"ts\":\"20");
    for (int removed = 0; removed < 2; removed++) {
        Log log;
        log_open(&log, &config, &header, 5);
        log_close(&log);
        read_file(&config, "log.jsonl", text);
        assert_int_equal(count_objects(text), 2);
        assert_int_equal(strncmp(text, "{\"ts\":", 6), 0);
        char path[512];
        in_run(&config, "log.jsonl", path, sizeof path);
        assert_int_equal(unlink(path), 0);
    }
}

static void test_resume_updates_the_configuration(void **state) {
    Config config = fresh_config(), saved;
    char text[TEXT_SIZE], error[256];
    open_log(&config);
    snprintf(config.train.resume, sizeof config.train.resume, "%s", config.train.out);
    config.train.steps = 4321;
    open_log(&config);
    read_file(&config, "config.json", text);
    config_defaults(&saved);
    assert_true(config_from_json(&saved, text, error, sizeof error));
    assert_int_equal(saved.train.steps, 4321);
}

static void test_resume_into_another_directory_starts_a_log(void **state) {
    Config earlier = fresh_config(), config = fresh_config();
    char text[TEXT_SIZE];
    open_log(&earlier);
    write_file(&earlier, "log.jsonl", "kept\n");
    snprintf(config.train.resume, sizeof config.train.resume, "%s", earlier.train.out);
    open_log(&config);
    read_file(&config, "log.jsonl", text);
    assert_int_equal(count_objects(text), 2);
    read_file(&earlier, "log.jsonl", text);
    assert_string_equal(text, "kept\n");
}

/* --- whose directory it is --- */

static void test_same_configuration_starts_over(void **state) {
    Config config = fresh_config();
    char text[TEXT_SIZE], path[512];
    open_log(&config);
    write_file(&config, "report.html", "old");
    write_file(&config, "log.jsonl", "old\n");
    in_run(&config, "checkpoint", path, sizeof path);
    assert_int_equal(mkdir(path, 0777), 0);
    config.train.log_every = 3; /* decides nothing about the training */
    open_log(&config);
    read_file(&config, "log.jsonl", text);
    assert_int_equal(count_objects(text), 1);
    assert_false(exists(&config, "report.html"));
    assert_true(exists(&config, "checkpoint"));
}

static void test_another_configuration_is_refused(void **state) {
    Config config = fresh_config();
    char before[TEXT_SIZE], after[TEXT_SIZE];
    open_log(&config);
    write_file(&config, "log.jsonl", "precious\n");
    read_file(&config, "config.json", before);
    config.model.dim = 64;
    config.train.lr = 0.5;
    assert_open_refused(&config, "holds a run with another --dim, --lr: choose another --out, or remove it");
    read_file(&config, "config.json", after);
    assert_string_equal(before, after);
    read_file(&config, "log.jsonl", after);
    assert_string_equal(after, "precious\n");
}

static void test_foreign_directories_are_refused(void **state) {
    Config config = fresh_config();
    char path[512], text[TEXT_SIZE];
    open_log(&config);
    write_file(&config, "config.json", "{\"dim\":");
    assert_open_refused(&config, "is not a run's configuration");
    in_run(&config, "config.json", path, sizeof path);
    assert_int_equal(unlink(path), 0);
    write_file(&config, "log.jsonl", "precious\n");
    assert_open_refused(&config, "holds a log or a checkpoint but no config.json");
    read_file(&config, "log.jsonl", text);
    assert_string_equal(text, "precious\n");
}

static void test_an_empty_directory_is_used(void **state) {
    Config config = fresh_config();
    open_log(&config);
    config = fresh_config();
    assert_int_equal(mkdir(config.train.out, 0777), 0);
    open_log(&config);
    assert_true(exists(&config, "log.jsonl"));
}

static void test_unusable_paths_are_refused(void **state) {
    Config base = fresh_config(), config;
    open_log(&base);
    write_file(&base, "file", "x");
    config = base;
    strcat(config.train.out, "/file");
    assert_open_refused(&config, "is a file: choose another directory");
    strcat(config.train.out, "/deeper/run");
    assert_open_refused(&config, "cannot make --out");
    /* Nobody can make a directory there, root included. */
    snprintf(config.train.out, sizeof config.train.out, "/proc/moelab/run");
    assert_open_refused(&config, "cannot make --out /proc/moelab/run");
}

/* --- a full disk, played by a limit on the size of files --- */

static void limit_files(rlim_t bytes) {
    struct rlimit limit;
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &limit);
    limit.rlim_cur = bytes;
    setrlimit(RLIMIT_FSIZE, &limit);
}

static void write_on_a_full_disk(void *config) {
    Log log;
    log_open(&log, config, &header, 0);
    limit_files((rlim_t)lseek(log.fd, 0, SEEK_END) + 12);
    log_line(&log, "{\"step\":1}");
    log_line(&log, "{\"step\":2,\"loss\":3}");
    log_line(&log, "{\"step\":3,\"loss\":3}");
    limit_files(1 << 20);
    log_line(&log, "{\"step\":4}");
    log_close(&log);
}

static void test_a_full_disk_leaves_whole_lines(void **state) {
    Config config = fresh_config();
    Forked result;
    char text[TEXT_SIZE];
    run_forked(&result, write_on_a_full_disk, &config);
    assert_int_equal(result.exit_code, 0);
    assert_non_null(strstr(result.err, "training goes on"));
    assert_ptr_equal(strchr(result.err, '\n'), strrchr(result.err, '\n'));
    read_file(&config, "log.jsonl", text);
    assert_int_equal(count_objects(text), 3);
    assert_string_equal(strchr(text, '\n'), "\n{\"step\":1}\n{\"step\":4}\n");
}

static void open_on_a_full_disk(void *config) {
    limit_files(100);
    open_log(config);
}

static void test_a_full_disk_leaves_no_half_configuration(void **state) {
    Config config = fresh_config();
    Forked result;
    run_forked(&result, open_on_a_full_disk, &config);
    /* The limit holds for the file that keeps stderr, too: the line may be cut. */
    assert_int_equal(result.exit_code, 1);
    assert_int_equal(strncmp(result.err, "moelab: cannot write ", 21), 0);
    assert_false(exists(&config, "config.json"));
    assert_false(exists(&config, "config.json.tmp"));
    assert_false(exists(&config, "log.jsonl"));
}

/* --- json_quote --- */

static void test_quote(void **state) {
    static const struct {
        const char *text;
        size_t length;
        const char *quoted;
    } cases[] = {
        {"", 0, "\"\""},
        {"plain", 5, "\"plain\""},
        {"a\"b\\c", 5, "\"a\\\"b\\\\c\""},
        {"\n\t\x01", 3, "\"\\n\\u0009\\u0001\""},
        {"a\0b", 3, "\"a\\ufffdb\""},
        {"\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80", 9, "\"\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\""},
        {"\xc3", 1, "\"\\ufffd\""},
        {"\xff\xe2\x82", 3, "\"\\ufffd\\ufffd\\ufffd\""},
        {"\xc0\x80", 2, "\"\\ufffd\\ufffd\""},
        {"\xed\xa0\x80", 3, "\"\\ufffd\\ufffd\\ufffd\""},
        {"\xf4\x90\x80\x80", 4, "\"\\ufffd\\ufffd\\ufffd\\ufffd\""},
        {"\xf0\x80\x80\x80x", 5, "\"\\ufffd\\ufffd\\ufffd\\ufffdx\""},
    };
    char out[64];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        assert_string_equal(json_quote(out, sizeof out, cases[i].text, cases[i].length), cases[i].quoted);
    }
}

static void test_quote_fits_any_size(void **state) {
    const char *text = "a\"\xc3\xa9\n\xff...";
    for (size_t size = 3; size < 32; size++) {
        char *out = malloc(size); /* an overrun by one is seen by the address sanitizer */
        json_quote(out, size, text, strlen(text));
        cJSON *value = cJSON_Parse(out);
        assert_true(cJSON_IsString(value));
        assert_true(strlen(out) < size);
        cJSON_Delete(value);
        free(out);
    }
}

static int set_up(void **state) {
    return mkdtemp(directory) ? 0 : -1;
}

static int tear_down(void **state) {
    char command[64];
    snprintf(command, sizeof command, "rm -rf %s", directory);
    return system(command);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_header),
        cmocka_unit_test(test_header_of_a_router_that_sees_the_batch),
        cmocka_unit_test(test_line_appends),
        cmocka_unit_test(test_resume_cuts_later_lines),
        cmocka_unit_test(test_resume_drops_lines_that_are_not_whole),
        cmocka_unit_test(test_resume_without_a_log_writes_a_header),
        cmocka_unit_test(test_resume_updates_the_configuration),
        cmocka_unit_test(test_resume_into_another_directory_starts_a_log),
        cmocka_unit_test(test_same_configuration_starts_over),
        cmocka_unit_test(test_another_configuration_is_refused),
        cmocka_unit_test(test_foreign_directories_are_refused),
        cmocka_unit_test(test_an_empty_directory_is_used),
        cmocka_unit_test(test_unusable_paths_are_refused),
        cmocka_unit_test(test_a_full_disk_leaves_whole_lines),
        cmocka_unit_test(test_a_full_disk_leaves_no_half_configuration),
        cmocka_unit_test(test_quote),
        cmocka_unit_test(test_quote_fits_any_size),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
