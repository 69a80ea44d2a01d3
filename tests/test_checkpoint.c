/* Checkpoints: round trip, damaged files, files of another model, and what an interrupted save left. */
#include "checkpoint_fixture.h"

#include <sys/stat.h>

#include "../kernels/checksum.h"
#include "../model/safetensors.h"

static char *file_get(const char *name, size_t *size) {
    FILE *file = fopen(in_run(name), "rb");
    assert_non_null(file);
    char *bytes = malloc(1 << 20);
    *size = fread(bytes, 1, 1 << 20, file);
    fclose(file);
    return bytes;
}

static void file_put(const char *name, const char *bytes, size_t size) {
    FILE *file = fopen(in_run(name), "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, size, file), size);
    assert_int_equal(fclose(file), 0);
}

static const char *const FILES[] = {"checkpoint/manifest.json", "checkpoint/state.json", "checkpoint/model.safetensors",
                                    "checkpoint/optimizer.safetensors"};

static void test_round_trip(void **unused) {
    clear_run();
    assert_false(checkpoint_exists(run));
    assert_saves(0);
    assert_true(checkpoint_exists(run));
    assert_int_equal(load(), STATE + 0);
    assert_string_equal(said, "");
    assert_saves(1);
    assert_int_equal(load(), STATE + 1);
    size_t size;
    char *text = file_get("checkpoint/state.json", &size);
    text[size] = 0;
    assert_non_null(strstr(text, CONFIG));
    free(text);
}

static void test_missing(void **unused) {
    clear_run();
    assert_refused_saying(load(), "no checkpoint in");
    assert_int_equal(mkdir(in_run("checkpoint"), 0777), 0);
    assert_refused_saying(load(), "manifest.json");
    assert_false(checkpoint_exists(run));
    CheckpointState state = make_state(&model, 0);
    char error[512] = "";
    assert_false(checkpoint_save(in_run("nowhere"), &state, CONFIG, error, sizeof error));
    assert_non_null(strstr(error, "nowhere"));
    free_state(&state);
}

/* One flipped bit in every byte of manifest, state and safetensors headers, and in every third of the values. */
static void test_flipped_bits(void **unused) {
    clear_run();
    assert_saves(0);
    int flipped = 0;
    for (int f = 0; f < 4; f++) {
        size_t size;
        char *bytes = file_get(FILES[f], &size);
        uint64_t header = size;
        if (f >= 2) {
            memcpy(&header, bytes, 8);
        }
        for (size_t i = 0; i < size; i += i < header + 8 ? 1 : 3) {
            bytes[i] ^= (char)(1 << i % 8);
            file_put(FILES[f], bytes, size);
            bytes[i] ^= (char)(1 << i % 8);
            assert_refused_saying(load(), f == 0 ? "restore it" : "altered");
            flipped++;
        }
        file_put(FILES[f], bytes, size);
        free(bytes);
    }
    assert_true(flipped >= 300);
    assert_int_equal(load(), STATE + 0);
}

static void test_wrong_lengths(void **unused) {
    clear_run();
    assert_saves(0);
    for (int f = 0; f < 4; f++) {
        size_t size;
        char *bytes = file_get(FILES[f], &size);
        for (size_t length = 0; length < size; length += length + 30 < size ? 1 + size / 40 : 1) {
            file_put(FILES[f], bytes, length);
            assert_refused_saying(load(), "truncated");
            assert_non_null(strstr(said, FILES[f]));
            assert_true(f == 0 || !checkpoint_exists(run));
        }
        bytes[size] = '\n';
        file_put(FILES[f], bytes, size + 1);
        assert_refused_saying(load(), "altered");
        unlink(in_run(FILES[f]));
        assert_refused_saying(load(), f == 0 ? "manifest.json" : "is missing");
        assert_false(checkpoint_exists(run));
        file_put(FILES[f], bytes, size);
        free(bytes);
    }
    assert_int_equal(load(), STATE + 0);
}

static void test_truncation_says_how_many_bytes(void **unused) {
    clear_run();
    assert_saves(0);
    struct stat status;
    char text[64];
    assert_int_equal(stat(in_run(FILES[2]), &status), 0);
    assert_int_equal(truncate(in_run(FILES[2]), 100), 0);
    snprintf(text, sizeof text, "100 bytes, %lld were saved", (long long)status.st_size);
    assert_refused_saying(load(), text);
}

static int load_as(int change) {
    static const char *const NAMES[] = {"embedding", "layers.0.moe.router", "layers.0.moe.experts.w1"};
    TensorList list = {0};
    for (int t = 0; t < 3; t++) {
        const int *shape = model.items[t].shape;
        if (change == 1 && t == 1) {
            continue;
        }
        tensors_add(&list, TENSOR_DENSE, 0, 0, change == 2 && t == 0 ? 6 : shape[0],
                    change == 3 && t == 2 ? 2 : shape[1], change == 3 && t == 2 ? 6 : shape[2], "%s",
                    change == 4 && t == 1 ? "layers.1.moe.router" : NAMES[t]);
    }
    if (change == 5) {
        tensors_add(&list, TENSOR_DENSE, 0, 0, 2, 2, 0, "head");
    }
    int result = run_child(load_body, &list);
    tensors_free(&list);
    return result;
}

static void test_another_model(void **unused) {
    clear_run();
    assert_saves(0);
    assert_int_equal(load_as(0), STATE + 0);
    assert_refused_saying(load_as(1), "it has a tensor 'layers.0.moe.router' (3) that is not in this one");
    assert_refused_saying(load_as(2), "its tensor 'embedding' is (5, 7), here it is (6, 7)");
    assert_refused_saying(load_as(3), "its tensor 'layers.0.moe.experts.w1' is (2, 3, 4), here it is (2, 2, 6)");
    assert_refused_saying(load_as(4), "it has no tensor 'layers.1.moe.router' (3)");
    assert_refused_saying(load_as(5), "it has no tensor 'head' (2, 2)");
}

/* A manifest that agrees with the files as they are. */
static void put_manifest(void) {
    long long bytes[3];
    unsigned crc[3];
    for (int i = 0; i < 3; i++) {
        size_t size;
        char *contents = file_get(FILES[i == 2 ? 1 : 2 + i], &size);
        bytes[i] = (long long)size;
        crc[i] = crc32c(0, contents, size);
        free(contents);
    }
    char text[512];
    int length = sprintf(text,
                         "{\"version\":1,\n\"model.safetensors\":{\"bytes\":%lld,\"crc32c\":%u},\n"
                         "\"optimizer.safetensors\":{\"bytes\":%lld,\"crc32c\":%u},\n"
                         "\"state.json\":{\"bytes\":%lld,\"crc32c\":%u}}\n",
                         bytes[0], crc[0], bytes[1], crc[1], bytes[2], crc[2]);
    file_put(FILES[0], text, (size_t)length);
}

/* Files that are not ours but whose checksums are right. */
static void test_contents_are_checked_too(void **unused) {
    static const char *const STATES[] = {
        "",
        "[]",
        "null",
        "{\"step\":1",
        "{\"step\":1,\"adam_step\":1,\"skipped\":0,\"tokens\":1}",
        "{\"step\":-1,\"adam_step\":1,\"skipped\":0,\"tokens\":1,\"train_seconds\":1}",
        "{\"step\":\"1\",\"adam_step\":1,\"skipped\":0,\"tokens\":1,\"train_seconds\":1}",
        "{\"step\":1e30,\"adam_step\":1,\"skipped\":0,\"tokens\":1,\"train_seconds\":1}",
    };
    clear_run();
    assert_saves(0);
    put_manifest();
    assert_int_equal(load(), STATE + 0);
    for (size_t i = 0; i < sizeof STATES / sizeof *STATES; i++) {
        file_put(FILES[1], STATES[i], strlen(STATES[i]));
        put_manifest();
        assert_refused_saying(load(), "state.json has no usable");
    }
    file_put(FILES[2], "\2\0\0\0\0\0\0\0{}x", 11);
    put_manifest();
    assert_refused_saying(load(), "belong to no tensor");
    const uint16_t values[35] = {0};
    const SafetensorsItem half = {"embedding", SAFETENSORS_F16, 2, {5, 7}, values, 70};
    char error[512];
    assert_true(safetensors_write(in_run(FILES[2]), &half, 1, NULL, error, sizeof error));
    put_manifest();
    assert_refused_saying(load(), sizeof(acc_t) == 8 ? "is not of type F64" : "is not of type F32");
}

static void test_falls_back(void **unused) {
    static const char *const NAMES[] = {"checkpoint.tmp", "checkpoint.old"};
    for (int i = 0; i < 2; i++) {
        clear_run();
        assert_saves(0);
        assert_int_equal(rename(in_run("checkpoint"), in_run(NAMES[i])), 0);
        assert_true(checkpoint_exists(run));
        assert_int_equal(load(), STATE + 0);
        assert_non_null(strstr(said, NAMES[i]));
        assert_saves(1);
        assert_int_equal(load(), STATE + 1);
        assert_string_equal(said, "");
    }
}

static void test_falls_back_from_damage(void **unused) {
    clear_run();
    assert_saves(0);
    assert_int_equal(rename(in_run("checkpoint"), in_run("aside")), 0);
    assert_saves(1);
    assert_int_equal(rename(in_run("aside"), in_run("checkpoint.old")), 0);
    assert_int_equal(truncate(in_run(FILES[3]), 50), 0);
    assert_int_equal(load(), STATE + 0);
    assert_non_null(strstr(said, "truncated"));
    assert_non_null(strstr(said, "checkpoint.old"));
    assert_saves(2);
    assert_int_equal(load(), STATE + 2);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_missing),
        cmocka_unit_test(test_flipped_bits),
        cmocka_unit_test(test_wrong_lengths),
        cmocka_unit_test(test_truncation_says_how_many_bytes),
        cmocka_unit_test(test_another_model),
        cmocka_unit_test(test_contents_are_checked_too),
        cmocka_unit_test(test_falls_back),
        cmocka_unit_test(test_falls_back_from_damage),
    };
    return cmocka_run_group_tests(tests, make_run, remove_run);
}
