/* The report: what report_write makes of a run's log, read back from the page as a browser would find it.
 *
 * A page is taken apart at the script element "log": what lies between its tags must be one JSON array with a value for
 * every whole line. Of the script around it only the names are tested: that it reads what the log holds, and that it
 * asks the network for nothing and parses no text as HTML. How the page looks is not tested here. Read next:
 * model/report.c.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <cjson/cJSON.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../model/report.h"

#define HEADER "{\"ts\":\"2025-01-01T00:00:00Z\",\"params_total\":10,\"config\":{\"out\":\"runs/x\"}}\n"
#define STEP "{\"step\":1,\"tokens\":64,\"loss\":5.54321098,\"counts\":[[3,5]]}\n"
#define EVALUATION "{\"step\":1,\"tokens\":64,\"val_loss\":5.5,\"val_floor\":null,\"val_domains\":{},\"mi\":[]}\n"

/* One line of each kind as a run with two routers writes it, with what may be null. */
#define FULL_STEP                                                                                         \
    "{\"step\":5,\"tokens\":1280,\"loss\":5.49083424,\"aux\":1.01142687,\"z\":4.39504504,\"lr\":0.0003,"  \
    "\"grad_norm\":1.44038607,\"router_grad_norm\":0.00452125668,\"router_main_norm\":0.000347434951,"    \
    "\"router_balance_norm\":8.7015622e-05,\"ms\":69.48,\"tok_s\":3684,\"mfu\":null,\"drop\":0.23046875," \
    "\"token_drop\":0.09375,\"padding\":0.0528846141,\"load_cv\":0.336287762,\"load_kl\":0.0538795886,"   \
    "\"max_vio\":0.65625,\"entropy\":2.06925511,\"mean_entropy\":2.07873607,\"margin\":null,\"dead\":1,"  \
    "\"near_dead\":2,\"leaky\":true,\"skipped\":0,\"counts\":[[0,8],[1,7]],\"layer_entropy\":[0.5,0.25]," \
    "\"layer_main_norm\":[0.000258518,0.00023212],\"layer_balance_norm\":[6.45788e-05,5.83206e-05],"      \
    "\"layer_margin\":[0.00679297,0.0072323]}\n"
#define FULL_EVALUATION                                                                                           \
    "{\"step\":5,\"tokens\":1280,\"val_loss\":5.5,\"val_bpb\":7.9,\"val_floor\":null,\"val_domains\":{\"story\":" \
    "{\"loss\":5.5,\"floor\":null,\"tokens\":405}},\"domain_expert\":[[[0.25,0.75]],[[0.5,0.5]]],"                \
    "\"mi\":[0.0694008,0],\"churn\":[null,0.88671875]}\n"
#define FIRST_GRADIENTS "{\"event\":\"router_gradient\",\"step\":1,\"main\":[5.06933e-06,0],\"balance\":[0,3e-05]}\n"

enum { PATH_TEXT = 256 };

typedef struct {
    char run[PATH_TEXT], log[PATH_TEXT], page[PATH_TEXT], temporary[PATH_TEXT];
    char error[512];
} Run;

static int make_run(void **state) {
    Run *run = calloc(1, sizeof *run);
    if (run == NULL) {
        return -1;
    }
    const char *parent = getenv("TMPDIR");
    snprintf(run->run, sizeof run->run, "%.150s/report_XXXXXX", parent != NULL ? parent : "/tmp");
    if (mkdtemp(run->run) == NULL) {
        free(run);
        return -1;
    }
    snprintf(run->log, sizeof run->log, "%.200s/log.jsonl", run->run);
    snprintf(run->page, sizeof run->page, "%.200s/report.html", run->run);
    snprintf(run->temporary, sizeof run->temporary, "%.200s/report.html.tmp", run->run);
    *state = run;
    return 0;
}

static int remove_run(void **state) {
    Run *run = *state;
    chmod(run->run, 0700);
    unlink(run->log);
    unlink(run->page);
    unlink(run->temporary);
    int result = rmdir(run->run); /* fails when report_write left anything else behind */
    free(run);
    return result;
}

static void write_file(const char *path, const char *text) {
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    assert_int_equal(fwrite(text, 1, strlen(text), file), strlen(text));
    assert_int_equal(fclose(file), 0);
}

static char *read_file(const char *path) {
    FILE *file = fopen(path, "r");
    assert_non_null(file);
    assert_int_equal(fseek(file, 0, SEEK_END), 0);
    long size = ftell(file);
    rewind(file);
    char *text = malloc((size_t)size + 1);
    assert_non_null(text);
    assert_int_equal(fread(text, 1, (size_t)size, file), size);
    text[size] = '\0';
    fclose(file);
    return text;
}

/* The text of the element "log" up to the first end tag, as an HTML parser cuts it. The caller's (free). */
static char *page_data(const char *page) {
    static const char START[] = "<script type=\"application/json\" id=\"log\">";
    const char *start = strstr(page, START);
    assert_non_null(start);
    start += strlen(START);
    const char *end = strstr(start, "</script");
    assert_non_null(end);
    return strndup(start, (size_t)(end - start));
}

/* Writes the log, makes the report, returns its lines as parsed; the caller's (cJSON_Delete). */
static cJSON *report_lines(Run *run, const char *log) {
    write_file(run->log, log);
    bool made = report_write(run->run, run->error, sizeof run->error);
    assert_string_equal(run->error, "");
    assert_true(made);
    assert_int_equal(access(run->temporary, F_OK), -1);
    char *page = read_file(run->page), *data = page_data(page);
    assert_ptr_equal(strstr(page, "<!DOCTYPE html>"), page);
    assert_string_equal(page + strlen(page) - strlen("</html>\n"), "</html>\n");
    cJSON *lines = cJSON_ParseWithOpts(data, NULL, true);
    free(data);
    free(page);
    assert_true(cJSON_IsArray(lines));
    return lines;
}

static void expect_failure(Run *run, const char *said) {
    assert_false(report_write(run->run, run->error, sizeof run->error));
    assert_non_null(strstr(run->error, said));
    assert_null(strchr(run->error, '\n'));
    assert_int_equal(access(run->temporary, F_OK), -1);
}

static void test_every_line_in_order(void **state) {
    cJSON *lines = report_lines(*state, HEADER STEP EVALUATION "\n" STEP "{\"event\":\"end\",\"step\":1}\n");
    assert_int_equal(cJSON_GetArraySize(lines), 5);
    assert_non_null(cJSON_GetObjectItem(cJSON_GetArrayItem(lines, 0), "config"));
    assert_float_equal(cJSON_GetObjectItem(cJSON_GetArrayItem(lines, 1), "loss")->valuedouble, 5.54321098, 0);
    assert_true(cJSON_IsNull(cJSON_GetObjectItem(cJSON_GetArrayItem(lines, 2), "val_floor")));
    assert_non_null(cJSON_GetObjectItem(cJSON_GetArrayItem(lines, 4), "event"));
    cJSON_Delete(lines);
}

/* No value changes on its way, not the smallest and not null. */
static void test_values_arrive_as_logged(void **state) {
    static const char *const logged[] = {HEADER, FIRST_GRADIENTS, FULL_STEP, FULL_EVALUATION};
    cJSON *lines = report_lines(*state, HEADER FIRST_GRADIENTS FULL_STEP FULL_EVALUATION);
    assert_int_equal(cJSON_GetArraySize(lines), 4);
    for (int i = 0; i < 4; i++) {
        cJSON *line = cJSON_Parse(logged[i]);
        assert_non_null(line);
        assert_true(cJSON_Compare(cJSON_GetArrayItem(lines, i), line, true));
        cJSON_Delete(line);
    }
    cJSON_Delete(lines);
}

/* The page without its data: style and script. The caller's (free). */
static char *page_code(const char *path) {
    char *page = read_file(path), *data = page_data(page), *start = strstr(page, data);
    assert_non_null(start);
    memset(start, ' ', strlen(data));
    free(data);
    return page;
}

/* Whether a name of the log stands in the code as a whole word. */
static bool names_word(const char *code, const char *word) {
    static const char LETTERS[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_";
    size_t length = strlen(word);
    for (const char *at = strstr(code, word); at != NULL; at = strstr(at + 1, word)) {
        bool starts = at == code || strchr(LETTERS, at[-1]) == NULL;
        if (starts && (at[length] == '\0' || strchr(LETTERS, at[length]) == NULL)) {
            return true;
        }
    }
    return false;
}

/* Every key of log.h that the report is to draw or to say. */
static void test_page_reads_what_the_log_holds(void **state) {
    static const char *const keys[] = {
        "loss",          "aux",         "z",          "lr",           "grad_norm",       "router_grad_norm",
        "tok_s",         "ms",          "mfu",        "drop",         "token_drop",      "padding",
        "load_cv",       "max_vio",     "dead",       "near_dead",    "counts",          "layer_entropy",
        "layer_margin",  "churn",       "val_loss",   "val_bpb",      "layer_main_norm", "layer_balance_norm",
        "val_floor",     "val_domains", "leaky",      "sees_batch",   "domain_expert",   "mi",
        "moe_layers",    "domains",     "objective",  "mask_share",   "router_gradient", "main",
        "balance",       "alarm",       "skip",       "resume",       "left_out",        "memory",
        "params_active", "sample",      "checkpoint", "params_total",
    };
    Run *run = *state;
    cJSON_Delete(report_lines(run, HEADER));
    char *code = page_code(run->page);
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        if (!names_word(code, keys[i])) {
            fail_msg("report.html does not read \"%s\"", keys[i]);
        }
    }
    free(code);
}

/* No address but the name of SVG, nothing that loads, nothing that makes HTML or code of text. */
static void test_page_stands_alone(void **state) {
    static const char NAMESPACE[] = "http://www.w3.org/2000/svg";
    static const char *const banned[] = {
        "http:",          "https:",    "src=",           "href=",
        "url(",           "@import",   "import(",        "fetch(",
        "XMLHttpRequest", "WebSocket", "innerHTML",      "outerHTML",
        "eval(",          "Function(", "document.write", "insertAdjacentHTML",
        "DOMParser",      "srcdoc",    "localStorage",   "/*LOG*/",
    };
    Run *run = *state;
    cJSON_Delete(report_lines(run, HEADER));
    char *code = page_code(run->page), *name = strstr(code, NAMESPACE);
    assert_non_null(name);
    memset(name, ' ', strlen(NAMESPACE));
    for (size_t i = 0; i < sizeof banned / sizeof *banned; i++) {
        if (strstr(code, banned[i]) != NULL) {
            fail_msg("report.html holds %s", banned[i]);
        }
    }
    free(code);
}

static void test_header_only(void **state) {
    cJSON *lines = report_lines(*state, HEADER);
    assert_int_equal(cJSON_GetArraySize(lines), 1);
    cJSON_Delete(lines);
}

static void test_cut_last_line_is_left_out(void **state) {
    cJSON *lines = report_lines(*state, HEADER STEP "{\"step\":2,\"tokens\":128,\"lo");
    assert_int_equal(cJSON_GetArraySize(lines), 2);
    cJSON_Delete(lines);
}

/* nan is what printf makes of a number JSON has no word for; a number alone is JSON, but no line of a log. */
static void test_unreadable_lines_are_counted(void **state) {
    cJSON *lines = report_lines(*state, HEADER "{\"step\":1,\"loss\":nan}\n" STEP "17\n{\"step\":2} {\"step\":3}\n");
    assert_int_equal(cJSON_GetArraySize(lines), 3);
    const cJSON *last = cJSON_GetArrayItem(lines, 2);
    assert_string_equal(cJSON_GetStringValue(cJSON_GetObjectItem(last, "event")), "left_out");
    assert_int_equal(cJSON_GetObjectItem(last, "lines")->valueint, 3);
    cJSON_Delete(lines);
}

static void test_hostile_text_stays_text(void **state) {
    static const char HOSTILE[] = "</script><script>alert(1)</script><!--<script> \xe2\x80\xa8 & /*LOG*/ \x7f\\";
    Run *run = *state;
    cJSON *event = cJSON_CreateObject();
    cJSON_AddStringToObject(event, "event", "sample");
    cJSON_AddStringToObject(event, "text", HOSTILE);
    char *json = cJSON_PrintUnformatted(event), log[1024];
    snprintf(log, sizeof log, "%s%s\n", HEADER, json);
    cJSON *lines = report_lines(run, log);
    assert_int_equal(cJSON_GetArraySize(lines), 2);
    assert_string_equal(cJSON_GetStringValue(cJSON_GetObjectItem(cJSON_GetArrayItem(lines, 1), "text")), HOSTILE);
    char *page = read_file(run->page), *data = page_data(page);
    assert_null(strchr(data, '<'));
    assert_null(strstr(page, "<script>alert"));
    free(data);
    free(page);
    cJSON_Delete(lines);
    cJSON_free(json);
    cJSON_Delete(event);
}

static void test_replaces_the_earlier_report(void **state) {
    Run *run = *state;
    write_file(run->page, "an earlier report");
    cJSON *lines = report_lines(run, HEADER STEP);
    assert_int_equal(cJSON_GetArraySize(lines), 2);
    cJSON_Delete(lines);
}

static void test_thousands_of_lines(void **state) {
    enum { STEPS = 5000 };
    char *log = NULL;
    size_t size = 0;
    FILE *stream = open_memstream(&log, &size);
    assert_non_null(stream);
    fputs(HEADER, stream);
    for (int step = 1; step <= STEPS; step++) {
        fprintf(stream, "{\"step\":%d,\"loss\":%.9g}\n", step, 1.0 / step);
    }
    fclose(stream);
    cJSON *lines = report_lines(*state, log);
    assert_int_equal(cJSON_GetArraySize(lines), STEPS + 1);
    cJSON *last = cJSON_GetArrayItem(lines, STEPS);
    assert_float_equal(cJSON_GetObjectItem(last, "loss")->valuedouble, 1.0 / STEPS, 0);
    cJSON_Delete(lines);
    free(log);
}

static void test_missing_log_is_named(void **state) {
    Run *run = *state;
    expect_failure(run, run->log);
    assert_int_equal(access(run->page, F_OK), -1);
}

static void test_empty_log_makes_no_report(void **state) {
    Run *run = *state;
    write_file(run->log, "{\"ts\":");
    write_file(run->page, "an earlier report");
    expect_failure(run, "holds no whole line");
    char *page = read_file(run->page);
    assert_string_equal(page, "an earlier report");
    free(page);
}

/* A user without the right to write gets a line that names the file; root may write anywhere, so for it the temporary
 * name is taken by a directory. */
static void test_unwritable_directory(void **state) {
    Run *run = *state;
    write_file(run->log, HEADER);
    bool root = geteuid() == 0;
    assert_int_equal(root ? mkdir(run->temporary, 0700) : chmod(run->run, 0500), 0);
    assert_false(report_write(run->run, run->error, sizeof run->error));
    assert_non_null(strstr(run->error, "cannot write"));
    assert_non_null(strstr(run->error, run->temporary));
    assert_int_equal(access(run->page, F_OK), -1);
    if (root) {
        assert_int_equal(rmdir(run->temporary), 0);
    }
}

/* The rename is the last thing that can fail: nothing half made may stay. */
static void test_failed_rename_leaves_nothing(void **state) {
    Run *run = *state;
    write_file(run->log, HEADER);
    assert_int_equal(mkdir(run->page, 0700), 0);
    expect_failure(run, run->page);
    assert_int_equal(rmdir(run->page), 0);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, make_run, remove_run)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(test_every_line_in_order),
        TEST(test_values_arrive_as_logged),
        TEST(test_page_reads_what_the_log_holds),
        TEST(test_page_stands_alone),
        TEST(test_header_only),
        TEST(test_cut_last_line_is_left_out),
        TEST(test_unreadable_lines_are_counted),
        TEST(test_hostile_text_stays_text),
        TEST(test_replaces_the_earlier_report),
        TEST(test_thousands_of_lines),
        TEST(test_missing_log_is_named),
        TEST(test_empty_log_makes_no_report),
        TEST(test_unwritable_directory),
        TEST(test_failed_rename_leaves_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
