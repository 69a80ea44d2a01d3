/* safetensors: what is written comes back bit for bit; a hand-made file is read; nothing malformed is accepted. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../kernels/checksum.h"
#include "../model/safetensors.h"

static char folder[] = "/tmp/test_safetensors_XXXXXX";
static char path[64];

static int make_folder(void **unused) {
    if (!mkdtemp(folder)) {
        return -1;
    }
    snprintf(path, sizeof path, "%s/file", folder);
    return 0;
}

static int remove_folder(void **unused) {
    unlink(path);
    return rmdir(folder);
}

static void put_bytes(const void *bytes, size_t size) {
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, size, file), size);
    assert_int_equal(fclose(file), 0);
}

/* A file of this length field, header text and that many data bytes 0, 1, 2, .. */
static void put_file(uint64_t length, const char *header, size_t header_bytes, size_t data_bytes) {
    size_t size = 8 + header_bytes + data_bytes;
    unsigned char *bytes = malloc(size);
    memcpy(bytes, &length, 8);
    memcpy(bytes + 8, header, header_bytes);
    for (size_t i = 0; i < data_bytes; i++) {
        bytes[8 + header_bytes + i] = (unsigned char)i;
    }
    put_bytes(bytes, size);
    free(bytes);
}

static void assert_one_line(const char *error) {
    assert_true(strlen(error) > 0);
    for (const char *c = error; *c; c++) {
        assert_true((unsigned char)*c >= ' ');
    }
}

static void assert_refused(const char *what) {
    SafetensorsFile file;
    char error[512] = "";
    if (safetensors_open(&file, path, error, sizeof error)) {
        fail_msg("accepted: %s", what);
    }
    assert_one_line(error);
    assert_null(file.map);
}

static void test_crc32c_known_values(void **unused) {
    /* RFC 3720, appendix B.4, and the check value of the catalogue of CRC algorithms */
    unsigned char bytes[32] = {0};
    assert_int_equal(crc32c(0, bytes, 32), 0x8a9136aau);
    memset(bytes, 0xff, 32);
    assert_int_equal(crc32c(0, bytes, 32), 0x62a8ab43u);
    for (int i = 0; i < 32; i++) {
        bytes[i] = (unsigned char)i;
    }
    assert_int_equal(crc32c(0, bytes, 32), 0x46dd794eu);
    assert_int_equal(crc32c(0, "123456789", 9), 0xe3069283u);
    assert_int_equal(crc32c(0, "", 0), 0);
}

static void test_crc32c_of_parts(void **unused) {
    unsigned char bytes[5000];
    uint32_t bitwise = 0;
    for (int i = 0; i < 5000; i++) {
        bytes[i] = (unsigned char)(i * 7 + i / 256);
        bitwise = crc32c(bitwise, &bytes[i], 1); /* one byte at a time uses no table */
    }
    assert_int_equal(crc32c(0, bytes, 5000), bitwise);
    for (size_t cut = 0; cut <= 5000; cut += 617) {
        assert_int_equal(crc32c(crc32c(0, bytes, cut), bytes + cut, 5000 - cut), bitwise);
    }
}

static void test_round_trip(void **unused) {
    /* signalling and quiet NaNs with payloads, infinities, -0 and a subnormal */
    const uint32_t bits32[6] = {0x7f800001u, 0xffc12345u, 0x7f800000u, 0xff800000u, 0x80000000u, 1};
    const uint64_t bits64[3] = {0x7ff0000000000001u, 0xfff8dead0000beefu, 0x8000000000000000u};
    const uint16_t bits16[4] = {0x7e01, 0xfc01, 0x8000, 1};
    size_t large_bytes = 3 * (1 << 20) + 4; /* spans several chunks */
    unsigned char *large = malloc(large_bytes);
    for (size_t i = 0; i < large_bytes; i++) {
        large[i] = (unsigned char)(i * 2654435761u >> 13);
    }
    const SafetensorsItem items[] = {
        {"z.last", SAFETENSORS_F32, 2, {2, 3}, bits32, 24},
        {"a \"quoted\" \\ name", SAFETENSORS_F64, 1, {3}, bits64, 24},
        {"half", SAFETENSORS_F16, 4, {1, 2, 1, 2}, bits16, 8},
        {"brain", SAFETENSORS_BF16, 1, {4}, bits16, 8},
        {"empty", SAFETENSORS_F32, 2, {0, 5}, bits32, 0},
        {"large", SAFETENSORS_F32, 1, {(int64_t)large_bytes / 4}, large, large_bytes},
        {"scalar", SAFETENSORS_F32, 0, {0}, bits32, 4},
    };
    enum { COUNT = sizeof items / sizeof *items };
    char error[512];
    uint32_t crc;
    assert_true(safetensors_write(path, items, COUNT, &crc, error, sizeof error));
    SafetensorsFile file;
    assert_true(safetensors_open(&file, path, error, sizeof error));
    assert_int_equal(crc32c(0, file.map, file.map_bytes), crc);
    assert_int_equal(file.count, COUNT);
    for (int i = 0; i < COUNT; i++) {
        const SafetensorsItem *found = safetensors_find(&file, items[i].name);
        assert_non_null(found);
        assert_int_equal(found->dtype, items[i].dtype);
        assert_int_equal(found->ndim, items[i].ndim);
        assert_memory_equal(found->shape, items[i].shape, (size_t)items[i].ndim * sizeof *items[i].shape);
        assert_int_equal(found->bytes, items[i].bytes);
        assert_memory_equal(found->data, items[i].data, items[i].bytes);
    }
    assert_null(safetensors_find(&file, "absent"));
    char long_name[300];
    memset(long_name, 'x', 299);
    long_name[299] = 0;
    assert_null(safetensors_find(&file, long_name));
    safetensors_close(&file);
    free(large);
}

static void test_written_bytes(void **unused) {
    const float values[2] = {1, -2};
    const SafetensorsItem items[] = {
        {"w", SAFETENSORS_F32, 2, {1, 2}, values, 8},
        {"b", SAFETENSORS_F32, 1, {1}, values, 4},
    };
    char error[512];
    assert_true(safetensors_write(path, items, 2, NULL, error, sizeof error));
    const char header[] =
        "{\"__metadata__\":{\"format\":\"pt\"},\"w\":{\"dtype\":\"F32\",\"shape\":[1,2],"
        "\"data_offsets\":[0,8]},\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[8,12]}}";
    unsigned char expected[256];
    memset(expected, ' ', sizeof expected);
    const size_t start = 192; /* the multiple of 64 after 8 + the header */
    assert_in_range(8 + strlen(header), start - 63, start);
    const uint64_t length = start - 8;
    memcpy(expected, &length, 8);
    memcpy(expected + 8, header, strlen(header));
    memcpy(expected + start, values, 8);
    memcpy(expected + start + 8, values, 4);
    unsigned char got[256];
    FILE *stream = fopen(path, "rb");
    assert_int_equal(fread(got, 1, sizeof got, stream), start + 12);
    fclose(stream);
    assert_memory_equal(got, expected, start + 12);
}

static void test_hand_made_file(void **unused) {
    /* tensors out of order, no metadata, spaces, unaligned data, an unrelated trailing space */
    const char header[] =
        "{ \"b\" : {\"shape\":[2],\"data_offsets\":[4,8],\"dtype\":\"BF16\"},"
        "\"a\\u0041\":{\"dtype\":\"F16\",\"shape\":[2,1],\"data_offsets\":[0,4]}}   ";
    put_file(strlen(header), header, strlen(header), 8);
    SafetensorsFile file;
    char error[512];
    assert_true(safetensors_open(&file, path, error, sizeof error));
    assert_int_equal(file.count, 2);
    const SafetensorsItem *b = safetensors_find(&file, "b"), *a = safetensors_find(&file, "aA");
    assert_true(a && b);
    assert_memory_equal(a->data, "\0\1\2\3", 4);
    assert_memory_equal(b->data, "\4\5\6\7", 4);
    assert_int_equal(b->dtype, SAFETENSORS_BF16);
    assert_int_equal(a->ndim, 2);
    safetensors_close(&file);
    put_file(2, "{}", 2, 0);
    assert_true(safetensors_open(&file, path, error, sizeof error));
    assert_int_equal(file.count, 0);
    safetensors_close(&file);
}

#define W(dtype, shape, offsets) "\"w\":{\"dtype\":" dtype ",\"shape\":" shape ",\"data_offsets\":" offsets "}"
#define V(offsets) "\"v\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":" offsets "}"
#define F32 "\"F32\""

static const struct {
    const char *what, *header;
    size_t data_bytes;
} MALFORMED[] = {
    {"empty header", "", 0},
    {"not JSON", "hello, world", 0},
    {"an array", "[]", 0},
    {"a string", "\"w\"", 0},
    {"leading space", " {}", 0},
    {"unfinished object", "{" W(F32, "[1]", "[0,4]"), 4},
    {"text after the object", "{" W(F32, "[1]", "[0,4]") "} x", 4},
    {"two objects", "{}{}", 0},
    {"unterminated name", "{\"w", 0},
    {"name that ends in a backslash", "{\"w\\\"", 0},
    {"trailing comma", "{" W(F32, "[1]", "[0,4]") ",}", 4},
    {"missing dtype", "{\"w\":{\"shape\":[1],\"data_offsets\":[0,4]}}", 4},
    {"missing shape", "{\"w\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4},
    {"missing offsets", "{\"w\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4},
    {"unknown member", "{\"w\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4],\"x\":1}}", 4},
    {"member twice", "{\"w\":{\"dtype\":\"F32\",\"shape\":[1],\"shape\":[1],\"data_offsets\":[0,4]}}", 4},
    {"tensor is a number", "{\"w\":1}", 0},
    {"tensor is an array", "{\"w\":[1,2,3]}", 0},
    {"unknown dtype", "{" W("\"F31\"", "[1]", "[0,4]") "}", 4},
    {"dtype in lower case", "{" W("\"f32\"", "[1]", "[0,4]") "}", 4},
    {"dtype is a number", "{" W("32", "[1]", "[0,4]") "}", 4},
    {"dtype is null", "{" W("null", "[1]", "[0,4]") "}", 4},
    {"shape is a number", "{" W(F32, "1", "[0,4]") "}", 4},
    {"shape of strings", "{" W(F32, "[\"1\"]", "[0,4]") "}", 4},
    {"negative extent", "{" W(F32, "[-1]", "[0,4]") "}", 4},
    {"two negative extents", "{" W(F32, "[-1,-1]", "[0,4]") "}", 4},
    {"fractional extent", "{" W(F32, "[1.5]", "[0,6]") "}", 6},
    {"huge extent", "{" W(F32, "[1e300]", "[0,4]") "}", 4},
    {"infinite extent", "{" W(F32, "[1e999]", "[0,4]") "}", 4},
    {"product overflows to the right size", "{" W(F32, "[4294967296,1073741824,4]", "[0,0]") "}",
     0}, /* 2^64 elements */
    {"five dimensions", "{" W(F32, "[1,1,1,1,1]", "[0,4]") "}", 4},
    {"shape too small", "{" W(F32, "[1]", "[0,8]") "}", 8},
    {"shape too large", "{" W(F32, "[3]", "[0,8]") "}", 8},
    {"offsets are an object", "{" W(F32, "[1]", "{\"a\":0,\"b\":4}") "}", 4},
    {"one offset", "{" W(F32, "[1]", "[4]") "}", 4},
    {"three offsets", "{" W(F32, "[1]", "[0,4,4]") "}", 4},
    {"negative offset", "{" W(F32, "[1]", "[-4,0]") "}", 4},
    {"fractional offset", "{" W(F32, "[1]", "[0.5,4.5]") "}", 5},
    {"offsets reversed", "{" W(F32, "[1]", "[4,0]") "}", 4},
    {"beyond the file", "{" W(F32, "[2]", "[0,8]") "}", 4},
    {"far beyond the file", "{" W(F32, "[1]", "[9007199254740988,9007199254740992]") "}", 4},
    {"data truncated by one byte", "{" W(F32, "[1]", "[0,4]") "}", 3},
    {"extra byte at the end", "{" W(F32, "[1]", "[0,4]") "}", 5},
    {"data without tensors", "{}", 4},
    {"hole in front", "{" W(F32, "[1]", "[4,8]") "}", 8},
    {"hole between", "{" W(F32, "[1]", "[0,4]") "," V("[8,12]") "}", 12},
    {"overlap", "{" W(F32, "[2]", "[0,8]") "," V("[4,8]") "}", 8},
    {"same place twice", "{" W(F32, "[1]", "[0,4]") "," V("[0,4]") "}", 4},
    {"duplicate name", "{" W(F32, "[1]", "[0,4]") "," W(F32, "[1]", "[4,8]") "}", 8},
    {"duplicate name, escaped",
     "{" W(F32, "[1]", "[0,4]") ",\"\\u0077\":{\"dtype\":\"F32\",\"shape\":[1],"
                                "\"data_offsets\":[4,8]}}",
     8},
    {"empty name", "{\"\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4},
    {"name with a newline", "{\"w\\nx\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4},
    {"name with a zero byte", "{\"w\\u0000x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4},
    {"metadata is a string", "{\"__metadata__\":\"pt\"}", 0},
    {"metadata holds a number", "{\"__metadata__\":{\"format\":1}}", 0},
    {"metadata twice", "{\"__metadata__\":{},\"__metadata__\":{}}", 0},
};

static void test_malformed_headers(void **unused) {
    for (size_t i = 0; i < sizeof MALFORMED / sizeof *MALFORMED; i++) {
        size_t length = strlen(MALFORMED[i].header);
        put_file(length, MALFORMED[i].header, length, MALFORMED[i].data_bytes);
        assert_refused(MALFORMED[i].what);
    }
}

static void test_the_table_is_malformed_for_its_own_reason(void **unused) {
    /* the forms the table varies are themselves accepted */
    const char *const sound[] = {"{" W(F32, "[2]", "[0,8]") "}", "{" W(F32, "[1]", "[0,4]") "," V("[4,8]") "}",
                                 "{\"__metadata__\":{\"format\":\"pt\"}," W(F32, "[1,1,1,2]", "[0,8]") "}"};
    for (int i = 0; i < 3; i++) {
        SafetensorsFile file;
        char error[512];
        put_file(strlen(sound[i]), sound[i], strlen(sound[i]), 8);
        assert_true(safetensors_open(&file, path, error, sizeof error));
        safetensors_close(&file);
    }
}

static void test_header_lengths(void **unused) {
    const char header[] = "{" W(F32, "[1]", "[0,4]") "}";
    const size_t n = strlen(header);
    const uint64_t lengths[] = {0,          1,         n - 1,      n + 1,          n + 5,          100000001,
                                UINT32_MAX, INT64_MAX, UINT64_MAX, UINT64_MAX - 7, UINT64_MAX - 8, (uint64_t)1 << 63};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        put_file(lengths[i], header, n, 4);
        assert_refused("wrong header length");
    }
}

static void test_header_above_the_limit(void **unused) {
    put_file(100000001, "{}", 2, 0);
    assert_int_equal(truncate(path, 8 + 100000001 + 16), 0); /* sparse: long enough, still above the format's bound */
    SafetensorsFile file;
    char error[512];
    assert_false(safetensors_open(&file, path, error, sizeof error));
    assert_non_null(strstr(error, "a header of 100000001 bytes does not fit"));
}

static void test_long_name(void **unused) {
    char header[512], name[200];
    for (int length = 126; length <= 199; length++) {
        memset(name, 'n', sizeof name);
        name[length] = 0;
        int n =
            snprintf(header, sizeof header, "{\"%s\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", name);
        put_file((uint64_t)n, header, (size_t)n, 4);
        SafetensorsFile file;
        char error[512];
        bool accepted = safetensors_open(&file, path, error, sizeof error);
        assert_int_equal(accepted, length < 128);
        if (accepted) {
            safetensors_close(&file);
        }
    }
}

static void test_deep_nesting(void **unused) {
    const size_t depth = 1000000;
    char *header = malloc(depth + 16);
    memcpy(header, "{\"w\":", 5);
    memset(header + 5, '[', depth);
    put_file(depth + 5, header, depth + 5, 0);
    assert_refused("a million brackets");
    for (size_t i = 5; i + 5 <= depth; i += 5) {
        memcpy(header + i, "{\"w\":", 5);
    }
    put_file(depth, header, depth, 0);
    assert_refused("nested objects");
    free(header);
}

static void test_zero_byte_in_header(void **unused) {
    const char header[] = "{" W(F32, "[1]", "[0,4]") "}\0\0\0";
    put_file(sizeof header - 1, header, sizeof header - 1, 4);
    assert_refused("zero bytes after the object");
}

static void test_not_a_file(void **unused) {
    SafetensorsFile file;
    char error[512];
    assert_false(safetensors_open(&file, folder, error, sizeof error));
    assert_one_line(error);
    unlink(path);
    assert_refused("no file");
}

/* The small file whose truncations and bit flips the next tests read. */
static size_t put_sample(unsigned char *bytes, size_t capacity) {
    const float values[6] = {1, 2, 3, 4, 5, 6};
    const SafetensorsItem items[] = {{"first", SAFETENSORS_F32, 2, {2, 2}, values, 16},
                                     {"second", SAFETENSORS_F32, 1, {2}, values + 4, 8}};
    char error[512];
    assert_true(safetensors_write(path, items, 2, NULL, error, sizeof error));
    FILE *stream = fopen(path, "rb");
    size_t size = fread(bytes, 1, capacity, stream);
    fclose(stream);
    return size;
}

static void test_every_truncation(void **unused) {
    unsigned char bytes[1024];
    size_t size = put_sample(bytes, sizeof bytes);
    for (size_t length = 0; length < size; length++) {
        put_bytes(bytes, length);
        assert_refused("truncated");
    }
}

static void test_every_header_bit(void **unused) {
    unsigned char bytes[1024];
    size_t size = put_sample(bytes, sizeof bytes);
    int refused = 0;
    for (size_t bit = 0; bit < 8 * (size - 24); bit++) {
        bytes[bit / 8] ^= (unsigned char)(1 << bit % 8);
        put_bytes(bytes, size);
        bytes[bit / 8] ^= (unsigned char)(1 << bit % 8);
        SafetensorsFile file;
        char error[512] = "";
        if (!safetensors_open(&file, path, error, sizeof error)) {
            assert_one_line(error);
            refused++;
            continue;
        }
        unsigned sum = 0; /* a changed name is a sound file: then every byte of every tensor must be readable */
        for (int i = 0; i < file.count; i++) {
            const unsigned char *data = file.items[i].data;
            assert_in_range(data - (const unsigned char *)file.map, 8, size);
            assert_in_range(data - (const unsigned char *)file.map + file.items[i].bytes, 8, size);
            for (size_t k = 0; k < file.items[i].bytes; k++) {
                sum += data[k];
            }
        }
        assert_true(sum > 0);
        safetensors_close(&file);
    }
    assert_true(refused > 1000);
}

static void test_refuses_to_write(void **unused) {
    const float values[2] = {1, 2};
    const SafetensorsItem bad[] = {
        {"", SAFETENSORS_F32, 1, {2}, values, 8},     {"__metadata__", SAFETENSORS_F32, 1, {2}, values, 8},
        {"a\nb", SAFETENSORS_F32, 1, {2}, values, 8}, {"w", SAFETENSORS_F32, 1, {3}, values, 8},
        {"w", SAFETENSORS_F32, 1, {-2}, values, 8},   {"w", SAFETENSORS_F32, 5, {2}, values, 8}};
    char error[512];
    unlink(path);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_false(safetensors_write(path, &bad[i], 1, NULL, error, sizeof error));
        assert_one_line(error);
        assert_int_not_equal(access(path, F_OK), 0);
    }
    const SafetensorsItem good = {"w", SAFETENSORS_F32, 1, {2}, values, 8};
    char nowhere[128];
    snprintf(nowhere, sizeof nowhere, "%s/none/file", folder);
    assert_false(safetensors_write(nowhere, &good, 1, NULL, error, sizeof error));
    assert_one_line(error);
}

/* The format's own library reads what is written, where it is installed. */
static void test_reference_reader(void **unused) {
    if (system("python3 -c 'import safetensors, numpy' 2>/dev/null") != 0) {
        print_message("python3 has no safetensors module\n");
        skip();
    }
    unsigned char bytes[1024];
    put_sample(bytes, sizeof bytes);
    char command[512];
    snprintf(command, sizeof command,
             "python3 -c \"from safetensors.numpy import load_file; t = load_file('%s'); "
             "assert t['first'].tolist() == [[1, 2], [3, 4]] and t['second'].tolist() == [5, 6]\"",
             path);
    assert_int_equal(system(command), 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_crc32c_known_values),
        cmocka_unit_test(test_crc32c_of_parts),
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_written_bytes),
        cmocka_unit_test(test_hand_made_file),
        cmocka_unit_test(test_malformed_headers),
        cmocka_unit_test(test_the_table_is_malformed_for_its_own_reason),
        cmocka_unit_test(test_header_lengths),
        cmocka_unit_test(test_header_above_the_limit),
        cmocka_unit_test(test_long_name),
        cmocka_unit_test(test_deep_nesting),
        cmocka_unit_test(test_zero_byte_in_header),
        cmocka_unit_test(test_not_a_file),
        cmocka_unit_test(test_every_truncation),
        cmocka_unit_test(test_every_header_bit),
        cmocka_unit_test(test_refuses_to_write),
        cmocka_unit_test(test_reference_reader),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
