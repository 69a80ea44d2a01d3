/* Token shards that data/shard.c writes: their bytes, that the loader reads them back, that it sees any bit that was
 * damaged since, and what is left when writing fails.
 *
 * Files are written under a temporary folder, which is the current folder while the tests run. Read next: data/shard.h;
 * tests/test_loader.c has shards made by hand. */
#define _GNU_SOURCE /* nftw */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../data/shard.h"
#include "../data/text_loader.h"

static int remove_entry(const char *path, const struct stat *status, int kind, struct FTW *walk) {
    return remove(path);
}

static char folder[64];

/* Each test starts in an empty folder. */
static int enter_folder(void **state) {
    strcpy(folder, "/tmp/moelab-shard-XXXXXX");
    return mkdtemp(folder) && chdir(folder) == 0 ? 0 : -1;
}

static int leave_folder(void **state) {
    return chdir("/") == 0 ? nftw(folder, remove_entry, 8, FTW_DEPTH | FTW_PHYS) : -1;
}

static char error[TEXT_LOADER_ERROR_BYTES];

static void assert_error_has(const char *part) {
    if (!strstr(error, part) || strchr(error, '\n')) {
        fail_msg("\"%s\" lacks \"%s\", or is not one line", error, part);
    }
}

static ShardWriter *create(const char *path, int vocab) {
    ShardWriter *writer = shard_create(path, vocab, 0xcafe1234, error, sizeof error);
    if (!writer) {
        fail_msg("%s", error);
    }
    return writer;
}

static bool append(ShardWriter *writer, const int *ids, size_t count, uint64_t text_bytes) {
    return shard_append(writer, ids, count, text_bytes, error, sizeof error);
}

static bool finish(ShardWriter *writer) {
    return shard_finish(writer, error, sizeof error);
}

static void write_shard(const char *path, int vocab, const int *ids, size_t count, uint64_t text_bytes) {
    ShardWriter *writer = create(path, vocab);
    if (!append(writer, ids, count, text_bytes) || !finish(writer)) {
        fail_msg("%s", error);
    }
}

/* The file's bytes, the caller's. */
static unsigned char *read_bytes(const char *path, size_t *count) {
    struct stat status;
    assert_int_equal(stat(path, &status), 0);
    *count = (size_t)status.st_size;
    unsigned char *bytes = malloc(*count);
    FILE *file = fopen(path, "rb");
    assert_non_null(bytes);
    assert_non_null(file);
    assert_int_equal(fread(bytes, 1, *count, file), *count);
    fclose(file);
    return bytes;
}

static TextLoader *open_good(const char *path) {
    TextLoader *loader = text_loader_open(path, NULL, NULL, error);
    if (!loader) {
        fail_msg("%s", error);
    }
    return loader;
}

/* CRC-32C as its definition has it, bit by bit: the remainder by 0x1EDC6F41, least significant bits first. */
static uint32_t add_to_crc(uint32_t crc, const unsigned char *bytes, size_t count) {
    for (size_t i = 0; i < 8 * count; i++) {
        uint32_t bit = (crc ^ (uint32_t)(bytes[i / 8] >> i % 8)) & 1;
        crc = crc >> 1 ^ (bit ? 0x82f63b78 : 0);
    }
    return crc;
}

/* ---- what is written ---- */

static void test_bytes_of_a_shard(void **state) {
    const struct {
        int vocab, width;
        uint32_t magic, version;
        int last; /* token */
    } cases[] = {{65536, 2, 20240520, 1, 65535}, {65537, 4, 20240801, 7, 65536}};
    for (int c = 0; c < 2; c++) {
        const int ids[3] = {0, 258, cases[c].last};
        write_shard("a.bin", cases[c].vocab, ids, 3, UINT64_C(0x500000007));
        unsigned char expected[1024 + 12] = {0};
        const uint32_t words[9] = {
            cases[c].magic, cases[c].version, 3, 0x62616c6d, (uint32_t)cases[c].vocab, 0xcafe1234, 0, 7, 5};
        size_t bytes = 1024 + 3 * (size_t)cases[c].width;
        for (int i = 0; i < 36; i++) {
            expected[i] = (unsigned char)(words[i / 4] >> 8 * (i % 4));
        }
        for (int i = 0; i < 3 * cases[c].width; i++) {
            expected[1024 + i] = (unsigned char)(ids[i / cases[c].width] >> 8 * (i % cases[c].width));
        }
        uint32_t crc = add_to_crc(~0u, expected + 1024, bytes - 1024);
        crc = ~add_to_crc(crc, expected, 1024);
        for (int i = 0; i < 4; i++) {
            expected[24 + i] = (unsigned char)(crc >> 8 * i);
        }
        size_t count;
        unsigned char *written = read_bytes("a.bin", &count);
        assert_int_equal(count, bytes);
        assert_memory_equal(written, expected, bytes);
        free(written);
        assert_int_equal(access("a.bin.tmp", F_OK), -1);
    }
}

/* More tokens than any buffer holds, in pieces of all sizes. */
static void test_what_is_written_is_read(void **state) {
    enum { COUNT = 400000 };
    int *ids = malloc(COUNT * sizeof *ids), *tokens = malloc(COUNT * sizeof *tokens);
    assert_non_null(ids);
    assert_non_null(tokens);
    const int vocabs[] = {1, 65536, 65537, INT_MAX};
    for (int v = 0; v < 4; v++) {
        for (int i = 0; i < COUNT; i++) {
            ids[i] = (int)((uint32_t)i * 2654435761u % (uint32_t)vocabs[v]);
        }
        ids[COUNT / 2] = vocabs[v] - 1;
        ShardWriter *writer = create("a.bin", vocabs[v]);
        for (size_t at = 0, piece = 0; at < COUNT; at += piece, piece = 3 * piece % 100003 + 1) {
            piece = piece < COUNT - at ? piece : COUNT - at;
            assert_true(append(writer, ids + at, piece, 4 * piece));
        }
        assert_true(finish(writer));
        TextLoader *loader = open_good("a.bin");
        uint32_t hash;
        assert_int_equal(text_loader_tokens(loader), COUNT);
        assert_int_equal(text_loader_vocab(loader), vocabs[v]);
        assert_true(text_loader_tokenizer(loader, &hash));
        assert_int_equal(hash, 0xcafe1234);
        assert_int_equal(text_loader_bytes(loader), 4 * COUNT);
        assert_true(text_loader_read(loader, 0, COUNT, vocabs[v], tokens, error));
        assert_memory_equal(tokens, ids, COUNT * sizeof *ids);
        text_loader_close(loader);
    }
    free(ids);
    free(tokens);
}

static void test_the_file_appears_when_it_is_whole(void **state) {
    const int old[2] = {1, 2}, fresh[3] = {3, 4, 5};
    write_shard("a.bin", 10, old, 2, 2);
    ShardWriter *writer = create("a.bin", 10);
    assert_true(append(writer, fresh, 3, 3));
    TextLoader *loader = open_good("a.bin");
    assert_int_equal(text_loader_tokens(loader), 2);
    text_loader_close(loader);
    assert_int_equal(access("a.bin.tmp", F_OK), 0);
    assert_true(finish(writer));
    loader = open_good("a.bin");
    assert_int_equal(text_loader_tokens(loader), 3);
    text_loader_close(loader);
    writer = create("a.bin", 10);
    assert_true(append(writer, old, 2, 2));
    shard_abandon(writer);
    assert_int_equal(access("a.bin.tmp", F_OK), -1);
    loader = open_good("a.bin");
    assert_int_equal(text_loader_tokens(loader), 3);
    text_loader_close(loader);
    shard_abandon(NULL);
}

static void test_shards_of_others_need_no_checksum(void **state) {
    const int ids[4] = {9, 8, 7, 6};
    int tokens[4];
    size_t count;
    write_shard("a.bin", 10, ids, 4, 4);
    unsigned char *bytes = read_bytes("a.bin", &count);
    memset(bytes + 12, 0, 6 * 4); /* as llm.c writes it */
    FILE *file = fopen("a.bin", "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, count, file), count);
    assert_int_equal(fclose(file), 0);
    free(bytes);
    TextLoader *loader = open_good("a.bin");
    assert_true(text_loader_read(loader, 0, 4, 10, tokens, error));
    assert_memory_equal(tokens, ids, sizeof ids);
    assert_int_equal(text_loader_vocab(loader), 0);
    text_loader_close(loader);
}

/* ---- damage ---- */

/* Writes the byte at an offset of an open file. */
static void put_byte(int fd, size_t offset, int byte) {
    unsigned char value = (unsigned char)byte;
    assert_int_equal(pwrite(fd, &value, 1, (off_t)offset), 1);
}

static void test_any_flipped_bit_is_seen(void **state) {
    const int ids[5] = {0, 1, 255, 256, 299};
    const int vocabs[] = {300, 70000};
    for (int v = 0; v < 2; v++) {
        size_t count;
        write_shard("a.bin", vocabs[v], ids, 5, 11);
        unsigned char *bytes = read_bytes("a.bin", &count);
        int fd = open("a.bin", O_WRONLY);
        assert_true(fd >= 0);
        for (size_t at = 0; at < count; at++) {
            for (int bit = 0; bit < 8; bit++) {
                put_byte(fd, at, bytes[at] ^ 1 << bit);
                if (text_loader_open("a.bin", NULL, NULL, error)) {
                    fail_msg("bit %d of byte %zu is flipped, and the shard is read", bit, at);
                }
                /* Words 0 to 4 are checked by what they say, some bits of the vocabulary by the checksum alone. */
                assert_error_has(at >= 20 ? "a.bin is damaged: its tokens do not match the checksum" : "a.bin");
            }
            put_byte(fd, at, bytes[at]);
        }
        close(fd);
        free(bytes);
        text_loader_close(open_good("a.bin"));
    }
}

static void test_any_cut_is_seen(void **state) {
    const int ids[3] = {1, 2, 3};
    size_t count;
    write_shard("a.bin", 70000, ids, 3, 3);
    unsigned char *bytes = read_bytes("a.bin", &count);
    for (size_t length = count; length-- > 0;) {
        assert_int_equal(truncate("a.bin", (off_t)length), 0);
        assert_null(text_loader_open("a.bin", NULL, NULL, error));
        assert_error_has("a.bin");
    }
    free(bytes);
}

static void test_the_damaged_one_of_many_is_named(void **state) {
    enum { FILES = 20 };
    int ids[1000];
    char path[32];
    assert_int_equal(mkdir("d", 0700), 0);
    for (int i = 0; i < 1000; i++) {
        ids[i] = i;
    }
    for (int f = 0; f < FILES; f++) {
        snprintf(path, sizeof path, "d/%02d.bin", f);
        write_shard(path, 1000, ids, (size_t)(1000 - 40 * f), 1);
    }
    text_loader_close(open_good("d"));
    for (int f = FILES - 1; f >= 0; f -= 3) { /* of several the first */
        snprintf(path, sizeof path, "d/%02d.bin", f);
        int fd = open(path, O_WRONLY);
        assert_true(fd >= 0);
        put_byte(fd, 1024, 1); /* the first token was 0 */
        close(fd);
        assert_null(text_loader_open("d", NULL, NULL, error));
        snprintf(path, sizeof path, "d/%02d.bin is damaged", f);
        assert_error_has(path);
    }
}

/* ---- what cannot be written ---- */

static void assert_not_appended(int vocab, const int *ids, size_t count, const char *line) {
    const int good[2] = {0, 1};
    ShardWriter *writer = create("bad.bin", vocab);
    assert_true(append(writer, good, 2, 2));
    assert_false(append(writer, ids, count, 1));
    assert_error_has(line);
    shard_abandon(writer);
    assert_int_equal(access("bad.bin", F_OK), -1);
    assert_int_equal(access("bad.bin.tmp", F_OK), -1);
}

static void test_tokens_that_cannot_be_written(void **state) {
    const int vocabs[] = {300, 70000};
    for (int v = 0; v < 2; v++) {
        int ids[3] = {5, 6, vocabs[v]};
        char line[96];
        snprintf(line, sizeof line, "bad.bin: token 4 is %d, which is not in the vocabulary of %d", ids[2], ids[2]);
        assert_not_appended(vocabs[v], ids, 3, line);
        ids[0] = -1;
        assert_not_appended(vocabs[v], ids, 3, "bad.bin: token 2 is -1, which is not");
        ids[0] = INT_MIN;
        assert_not_appended(vocabs[v], ids, 3, "bad.bin: token 2 is -2147483648, which is not");
    }
    /* Refused by their number, before one is looked at; two are there already. */
    const int one = 0;
    assert_not_appended(10, &one, INT32_MAX - 1, "bad.bin: a shard holds at most 2147483647 tokens");
    assert_not_appended(10, &one, SIZE_MAX, "bad.bin: a shard holds at most 2147483647 tokens");
}

static void assert_not_created(const char *path, const char *line) {
    assert_null(shard_create(path, 10, 1, error, sizeof error));
    assert_error_has(line);
}

static void test_places_that_cannot_be_written(void **state) {
    assert_not_created("a.txt", "a.txt: a shard's name must end in .bin");
    assert_not_created("bin", "bin: a shard's name must end in .bin");
    assert_not_created("", "must end in .bin");
    assert_not_created("missing/a.bin", "cannot create missing/a.bin.tmp: No such file or directory");
    assert_int_equal(mkdir("d.bin", 0700), 0);
    assert_not_created("d.bin", "d.bin is there and no regular file");
    ShardWriter *writer = create("empty.bin", 10);
    assert_true(append(writer, NULL, 0, 5));
    assert_false(finish(writer));
    assert_error_has("empty.bin: there are no tokens to write");
    assert_int_equal(access("empty.bin.tmp", F_OK), -1);

    const int id = 1;
    writer = create("a.bin", 10);
    assert_true(append(writer, &id, 1, 1));
    assert_int_equal(mkdir("a.bin", 0700), 0); /* came in between */
    assert_false(finish(writer));
    assert_error_has("cannot rename a.bin.tmp to a.bin");
    assert_int_equal(access("a.bin.tmp", F_OK), -1);
}

/* The largest file that may be written: a stand-in for a full disk. */
static void set_largest_file(rlim_t bytes) {
    struct rlimit limit;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &limit), 0);
    limit.rlim_cur = bytes < limit.rlim_max ? bytes : limit.rlim_max;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
}

static void test_a_full_disk(void **state) {
    enum { COUNT = 300000 };
    const int small[3] = {7, 8, 9};
    int *ids = calloc(COUNT, sizeof *ids), tokens[3];
    assert_non_null(ids);
    write_shard("a.bin", 10, small, 3, 3);
    signal(SIGXFSZ, SIG_IGN);
    const rlim_t limits[] = {0, 1023, 1024, 1025, 300000, 1024 + 2 * COUNT - 1};
    const size_t counts[] = {1, COUNT}; /* one fails when it is finished, the other in between */
    for (int c = 0; c < 2; c++) {
        for (int i = 0; i < 6; i++) {
            set_largest_file(limits[i]);
            ShardWriter *writer = shard_create("a.bin", 10, 1, error, sizeof error);
            bool good = writer && append(writer, ids, counts[c], 1);
            if (good) {
                good = finish(writer);
            } else {
                shard_abandon(writer);
            }
            set_largest_file(RLIM_INFINITY); /* which a test that fails below does not leave behind */
            assert_true(good == (1024 + 2 * counts[c] <= limits[i]));
            if (!good) {
                assert_error_has("cannot write a.bin.tmp: File too large");
            } else {
                write_shard("a.bin", 10, small, 3, 3);
            }
            assert_int_equal(access("a.bin.tmp", F_OK), -1);
            TextLoader *loader = open_good("a.bin"); /* what was there before */
            assert_true(text_loader_read(loader, 0, 3, 10, tokens, error));
            assert_memory_equal(tokens, small, sizeof small);
            text_loader_close(loader);
        }
    }
    signal(SIGXFSZ, SIG_DFL);
    free(ids);
}

#define IN_FOLDER(test) cmocka_unit_test_setup_teardown(test, enter_folder, leave_folder)

int main(void) {
    const struct CMUnitTest tests[] = {
        IN_FOLDER(test_bytes_of_a_shard),
        IN_FOLDER(test_what_is_written_is_read),
        IN_FOLDER(test_the_file_appears_when_it_is_whole),
        IN_FOLDER(test_shards_of_others_need_no_checksum),
        IN_FOLDER(test_any_flipped_bit_is_seen),
        IN_FOLDER(test_any_cut_is_seen),
        IN_FOLDER(test_the_damaged_one_of_many_is_named),
        IN_FOLDER(test_tokens_that_cannot_be_written),
        IN_FOLDER(test_places_that_cannot_be_written),
        IN_FOLDER(test_a_full_disk),
    };
    return cmocka_run_group_tests_name("shard", tests, NULL, NULL);
}
