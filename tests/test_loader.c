/* Text files and token shards: what is accepted, what is refused with which line, and which tokens are read.
 *
 * Shards are made by hand here, byte by byte, and the loader is a copy of this file's own that knows no checksum;
 * tests/test_shard.c has the shards of data/shard.c and the program's loader. Files are written under a temporary
 * folder, which is the current folder while the tests run. Read next: data/text_loader.h. */
#define _GNU_SOURCE /* nftw */
#define TEXT_LOADER_IMPLEMENTATION
#include "../data/text_loader.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- files ---- */

static void write_file(const char *name, const void *bytes, size_t count) {
    FILE *file = fopen(name, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, count, file), count);
    assert_int_equal(fclose(file), 0);
}

static void put_u32(unsigned char *p, uint32_t value) {
    for (int i = 0; i < 4; i++) {
        p[i] = (unsigned char)(value >> 8 * i);
    }
}

/* A shard whose header says what it is told, with `count` tokens first, first + 1, ... and `extra` bytes more (or
 * fewer). */
static void write_shard_as(const char *name, uint32_t magic, uint32_t version, uint32_t says, int first, int count,
                           int extra) {
    size_t bytes = 1024 + 2 * (size_t)count;
    unsigned char *buffer = calloc(1, bytes + 64);
    assert_non_null(buffer);
    put_u32(buffer, magic);
    put_u32(buffer + 4, version);
    put_u32(buffer + 8, says);
    for (int i = 0; i < count; i++) {
        buffer[1024 + 2 * i] = (unsigned char)((first + i) & 255);
        buffer[1024 + 2 * i + 1] = (unsigned char)((first + i) >> 8);
    }
    write_file(name, buffer, (size_t)((long)bytes + extra));
    free(buffer);
}

static void write_shard(const char *name, int first, int count) {
    write_shard_as(name, 20240520, 1, (uint32_t)count, first, count, 0);
}

static int remove_entry(const char *path, const struct stat *status, int kind, struct FTW *walk) {
    return remove(path);
}

static char folder[64];

/* Each test starts in an empty folder. */
static int enter_folder(void **state) {
    strcpy(folder, "/tmp/moelab-loader-XXXXXX");
    return mkdtemp(folder) && chdir(folder) == 0 ? 0 : -1;
}

static int leave_folder(void **state) {
    return chdir("/") == 0 ? nftw(folder, remove_entry, 8, FTW_DEPTH | FTW_PHYS) : -1;
}

/* ---- the loader ---- */

static char error[TEXT_LOADER_ERROR_BYTES];

static void assert_error_has(const char *line, const char *part) {
    if (!strstr(line, part)) {
        fail_msg("\"%s\" lacks \"%s\"", line, part);
    }
}

static void assert_refused(const char *path, const char *part) {
    strcpy(error, "");
    assert_null(text_loader_open(path, NULL, NULL, error));
    assert_error_has(error, part);
    assert_null(strchr(error, '\n'));
}

static TextLoader *open_good(const char *path, const char *with, const char *without) {
    TextLoader *loader = text_loader_open(path, with, without, error);
    if (!loader) {
        fail_msg("%s", error);
    }
    return loader;
}

static void test_text_is_read_as_bytes(void **state) {
    int tokens[5];
    write_file("a.txt", "hi\n\xff\0", 5);
    TextLoader *loader = open_good("a.txt", NULL, "a"); /* names are only looked at in folders and globs */
    assert_true(text_loader_is_text(loader));
    assert_int_equal(text_loader_tokens(loader), 5);
    assert_true(text_loader_read(loader, 0, 5, 256, tokens, error));
    assert_memory_equal(tokens, ((int[]){'h', 'i', '\n', 255, 0}), sizeof tokens);
    assert_true(text_loader_read(loader, 5, 0, 256, tokens, error));
    assert_false(text_loader_read(loader, 5, 1, 256, tokens, error));
    assert_error_has(error, "1 tokens at 5 are beyond the end of the 5");
    assert_false(text_loader_read(loader, UINT64_MAX, 2, 256, tokens, error));
    assert_false(text_loader_read(loader, 2, UINT64_MAX, 256, tokens, error));
    text_loader_close(loader);
}

static void test_one_byte_is_enough_for_the_loader(void **state) {
    int token;
    write_file("a.txt", "x", 1);
    TextLoader *loader = open_good("a.txt", NULL, NULL);
    assert_int_equal(text_loader_tokens(loader), 1);
    assert_true(text_loader_read(loader, 0, 1, 256, &token, error));
    assert_int_equal(token, 'x');
    text_loader_close(loader);
}

static void test_windows_span_shards_in_the_order_of_names(void **state) {
    int tokens[60];
    assert_int_equal(mkdir("d", 0700), 0);
    write_shard("d/s_10.bin", 120, 30); /* strcmp puts 10 before 2, and Z before a */
    write_shard("d/s_2.bin", 150, 1);
    write_shard("d/Z.bin", 100, 20);
    write_shard("d/t.bin", 151, 9);
    write_shard("d/.hidden.bin", 0, 5);
    write_file("d/readme.txt", "no shard", 8);
    const char *paths[] = {"d", "d/*.bin", "d/[!.]*.bin"};
    for (int i = 0; i < 3; i++) {
        TextLoader *loader = open_good(paths[i], NULL, NULL);
        assert_false(text_loader_is_text(loader));
        assert_int_equal(text_loader_tokens(loader), 60);
        for (uint64_t from = 0; from < 60; from++) {
            for (uint64_t count = 0; count <= 60 - from; count++) {
                assert_true(text_loader_read(loader, from, count, 160, tokens, error));
                for (uint64_t k = 0; k < count; k++) {
                    assert_int_equal(tokens[k], 100 + from + k);
                }
            }
        }
        text_loader_close(loader);
    }
}

static void test_names_choose_files_of_folders_and_globs(void **state) {
    assert_int_equal(mkdir("val", 0700), 0); /* the folder's own name does not count */
    write_shard("val/x_train_1.bin", 0, 10);
    write_shard("val/x_train_2.bin", 0, 20);
    write_shard("val/x_val_0.bin", 0, 5);
    const char *paths[] = {"val", "val/*.bin"};
    for (int i = 0; i < 2; i++) {
        TextLoader *train = open_good(paths[i], NULL, "val");
        TextLoader *val = open_good(paths[i], "val", NULL);
        assert_int_equal(text_loader_tokens(train), 30);
        assert_int_equal(text_loader_tokens(val), 5);
        text_loader_close(train);
        text_loader_close(val);
        assert_null(text_loader_open(paths[i], "test", NULL, error));
        assert_error_has(error, "none of its 3 files has \"test\" in its name");
        assert_null(text_loader_open(paths[i], NULL, "x_", error));
        assert_error_has(error, "each of its 3 files has \"x_\" in its name");
    }
}

static void test_malformed_shards_are_refused(void **state) {
    write_shard_as("short.bin", 20240520, 1, 0, 0, 0, -1);
    assert_refused("short.bin", "short.bin has 1023 bytes, but a shard's header takes 1024");
    write_shard_as("magic.bin", 20240521, 1, 4, 0, 4, 0);
    assert_refused("magic.bin", "magic.bin starts with 20240521, but a token shard with 20240520");
    write_shard_as("version.bin", 20240520, 7, 4, 0, 4, 0);
    assert_refused("version.bin", "version.bin is a shard of version 7");
    write_shard_as("cut.bin", 20240520, 1, 4, 0, 4, -1);
    assert_refused("cut.bin", "has 1031 bytes, but its header's 4 tokens take 1032: it is truncated");
    write_shard_as("long.bin", 20240520, 1, 4, 0, 4, 2);
    assert_refused("long.bin", "has 1034 bytes, but its header's 4 tokens take 1032: it is too long");
    write_shard_as("none.bin", 20240520, 1, 0, 0, 0, 0);
    assert_refused("none.bin", "has no tokens (its header says 0)");
    write_shard_as("negative.bin", 20240520, 1, 0xffffffff, 0, 4, 0);
    assert_refused("negative.bin", "has no tokens (its header says -1)");
    /* 2 * 0x80000004 overflows 32 bits to the 8 bytes there are. */
    write_shard_as("overflow.bin", 20240520, 1, 0x80000004, 0, 4, 0);
    assert_refused("overflow.bin", "has no tokens (its header says -2147483644)");
    write_shard_as("most.bin", 20240520, 1, 0x7fffffff, 0, 4, 0);
    assert_refused("most.bin", "its header's 2147483647 tokens take 4294968318: it is truncated");
}

/* Every byte of a valid header but those of the reserved words matters. */
static void test_every_header_byte_is_checked(void **state) {
    unsigned char bytes[1032];
    write_shard("good.bin", 0, 4);
    FILE *file = fopen("good.bin", "rb");
    assert_non_null(file);
    assert_int_equal(fread(bytes, 1, sizeof bytes, file), sizeof bytes);
    fclose(file);
    for (int i = 0; i < 12; i++) {
        for (int bit = 0; bit < 8; bit++) {
            bytes[i] ^= (unsigned char)(1 << bit);
            write_file("bad.bin", bytes, sizeof bytes);
            assert_null(text_loader_open("bad.bin", NULL, NULL, error));
            bytes[i] ^= (unsigned char)(1 << bit);
        }
    }
}

static void test_paths_that_hold_no_data_are_refused(void **state) {
    assert_refused("missing.txt", "cannot open missing.txt: No such file");
    write_file("empty.txt", "", 0);
    assert_refused("empty.txt", "empty.txt is empty");
    write_file("empty.bin", "", 0);
    assert_refused("empty.bin", "empty.bin is empty");
    assert_int_equal(mkdir("d", 0700), 0);
    assert_refused("d", "d has no *.bin in it");
    assert_refused("d/*.bin", "d/*.bin matches no file");
    assert_int_equal(mkdir("d/e.bin", 0700), 0);
    assert_refused("d", "d/e.bin is not a regular file");
    assert_int_equal(mkfifo("pipe", 0600), 0);
    assert_refused("pipe", "pipe is not a regular file");
    assert_refused("", "cannot open : No such file");
    write_shard("x.bin", 0, 4);
    write_file("x.txt", "text", 4);
    assert_refused("x.*", "x.* mixes text (x.txt) and token shards (x.bin)");
}

static void test_tokens_outside_the_vocabulary_are_reported(void **state) {
    int tokens[20] = {0};
    assert_int_equal(mkdir("d", 0700), 0);
    write_shard("d/a.bin", 0, 10);
    write_shard("d/b.bin", 50250, 10);
    TextLoader *loader = open_good("d", NULL, NULL);
    assert_true(text_loader_read(loader, 0, 17, 50257, tokens, error));
    assert_int_equal(tokens[16], 50256);
    assert_false(text_loader_read(loader, 0, 20, 50257, tokens, error));
    assert_error_has(error, "d/b.bin: token 7 is 50257, which is not below the vocabulary size 50257");
    assert_true(text_loader_read(loader, 0, 20, 65536, tokens, error));
    text_loader_close(loader);
}

/* A sparse file: the disk holds a few blocks of it. Tokens are 0 but for those written. */
static bool write_sparse_shard(const char *name, uint32_t tokens, uint32_t at, int value) {
    unsigned char word[2] = {(unsigned char)(value & 255), (unsigned char)(value >> 8)};
    write_shard_as(name, 20240520, 1, tokens, 0, 0, 0);
    int file = open(name, O_RDWR);
    bool good = ftruncate(file, (off_t)(1024 + 2 * (int64_t)tokens)) == 0;
    good = good && pwrite(file, word, 2, (off_t)(1024 + 2 * (int64_t)at)) == 2;
    close(file);
    return good;
}

static void test_positions_beyond_4_gib(void **state) {
    const uint32_t each = 0x7ffffff0; /* nearly the most a header can say: 4 GiB a shard */
    int tokens[4];
    assert_int_equal(mkdir("d", 0700), 0);
    if (!write_sparse_shard("d/a.bin", each, each - 1, 777) || !write_sparse_shard("d/b.bin", each, 0x60000000, 888)) {
        skip(); /* a file system without sparse files */
    }
    TextLoader *loader = open_good("d", NULL, NULL);
    assert_int_equal(text_loader_tokens(loader), 2 * (uint64_t)each);
    assert_true(text_loader_read(loader, each - 2, 4, 1000, tokens, error));
    assert_memory_equal(tokens, ((int[]){0, 777, 0, 0}), sizeof tokens);
    assert_true(text_loader_read(loader, (uint64_t)each + 0x60000000 - 1, 4, 1000, tokens, error));
    assert_memory_equal(tokens, ((int[]){0, 888, 0, 0}), sizeof tokens);
    text_loader_close(loader);

    write_file("long.txt", "", 0);
    const int64_t gib5 = INT64_C(5) << 30;
    if (truncate("long.txt", (off_t)gib5 + 2) != 0) {
        skip();
    }
    int file = open("long.txt", O_RDWR);
    assert_int_equal(pwrite(file, "xyz", 3, (off_t)gib5 - 1), 3);
    close(file);
    loader = open_good("long.txt", NULL, NULL);
    assert_int_equal(text_loader_tokens(loader), gib5 + 2);
    assert_true(text_loader_read(loader, (uint64_t)gib5 - 2, 4, 256, tokens, error));
    assert_memory_equal(tokens, ((int[]){0, 'x', 'y', 'z'}), sizeof tokens);
    text_loader_close(loader);
}

/* ---- both widths, and what headers say ---- */

enum { HAND_MADE_BYTES = 2048, VOCAB_WORD = 4, TOKENIZER_WORD, CHECKSUM_WORD, BYTES_WORD };

/* A shard of `count` tokens first, first + 1, ... of so many bytes each, with a header as llm.c writes it. */
static size_t make_shard(unsigned char *buffer, int width, uint32_t first, int count) {
    memset(buffer, 0, HAND_MADE_BYTES);
    put_u32(buffer, width == 4 ? 20240801 : 20240520);
    put_u32(buffer + 4, width == 4 ? 7 : 1);
    put_u32(buffer + 8, (uint32_t)count);
    for (int i = 0; i < width * count; i++) {
        buffer[1024 + i] = (unsigned char)((first + (uint32_t)(i / width)) >> 8 * (i % width));
    }
    return 1024 + (size_t)(width * count);
}

static void write_wide_shard(const char *name, uint32_t first, int count) {
    unsigned char buffer[HAND_MADE_BYTES];
    size_t bytes = make_shard(buffer, 4, first, count);
    write_file(name, buffer, bytes);
}

/* Ten tokens whose header has words [4] to [8]; the checksum is wrong. */
static void write_described_shard(const char *name, int width, uint32_t vocab, uint32_t tokenizer, uint64_t text) {
    unsigned char buffer[HAND_MADE_BYTES];
    size_t bytes = make_shard(buffer, width, 0, 10);
    memcpy(buffer + 12, "mlab", 4);
    put_u32(buffer + 4 * VOCAB_WORD, vocab);
    put_u32(buffer + 4 * TOKENIZER_WORD, tokenizer);
    put_u32(buffer + 4 * CHECKSUM_WORD, 12345);
    put_u32(buffer + 4 * BYTES_WORD, (uint32_t)text);
    put_u32(buffer + 4 * (BYTES_WORD + 1), (uint32_t)(text >> 32));
    write_file(name, buffer, bytes);
}

static void test_shards_of_both_widths_are_one_stream(void **state) {
    int tokens[60];
    assert_int_equal(mkdir("d", 0700), 0);
    write_shard("d/a.bin", 65500, 20);
    write_wide_shard("d/b.bin", 65520, 25); /* across 2^16 */
    write_shard("d/c.bin", 7, 5);
    write_wide_shard("d/d.bin", 128255, 10);
    TextLoader *loader = open_good("d", NULL, NULL);
    assert_int_equal(text_loader_tokens(loader), 60);
    for (uint64_t from = 0; from < 60; from++) {
        for (uint64_t count = 0; count <= 60 - from; count++) {
            assert_true(text_loader_read(loader, from, count, 128265, tokens, error));
            for (uint64_t k = 0; k < count; k++) {
                int at = (int)(from + k);
                assert_int_equal(tokens[k], at < 45 ? 65500 + at : at < 50 ? 7 + at - 45 : 128255 + at - 50);
            }
        }
    }
    assert_false(text_loader_read(loader, 0, 60, 128264, tokens, error));
    assert_error_has(error, "d/d.bin: token 9 is 128264, which is not below the vocabulary size 128264");
    text_loader_close(loader);
}

static void test_tokens_above_every_int_are_out_of_range(void **state) {
    int tokens[2];
    const uint32_t above[] = {0x7fffffff, 0x80000000, 0xfffffffe};
    write_wide_shard("most.bin", 0x7ffffffd, 2);
    TextLoader *loader = open_good("most.bin", NULL, NULL);
    assert_true(text_loader_read(loader, 0, 2, INT_MAX, tokens, error));
    assert_int_equal(tokens[1], INT_MAX - 1);
    text_loader_close(loader);
    for (int i = 0; i < 3; i++) {
        char line[64];
        write_wide_shard("above.bin", above[i], 2);
        loader = open_good("above.bin", NULL, NULL);
        assert_false(text_loader_read(loader, 0, 2, INT_MAX, tokens, error));
        snprintf(line, sizeof line, "above.bin: token 0 is %lu, which is not below", (unsigned long)above[i]);
        assert_error_has(error, line);
        text_loader_close(loader);
    }
}

static void test_every_other_length_is_refused(void **state) {
    unsigned char buffer[HAND_MADE_BYTES];
    for (int width = 2; width <= 4; width += 2) {
        size_t bytes = make_shard(buffer, width, 5, 6);
        for (size_t length = 0; length <= bytes + 8; length++) {
            write_file("cut.bin", buffer, length);
            TextLoader *loader = text_loader_open("cut.bin", NULL, NULL, error);
            assert_true((loader != NULL) == (length == bytes));
            text_loader_close(loader);
        }
    }
}

/* Magic, version, number of tokens and mark: no bit of them may differ. What follows has no meaning without a mark. */
static void test_each_word_of_a_header(void **state) {
    unsigned char buffer[HAND_MADE_BYTES];
    int tokens[6];
    for (int width = 2; width <= 4; width += 2) {
        size_t bytes = make_shard(buffer, width, 5, 6);
        for (int word = 0; word < 256; word++) {
            for (int bit = 0; bit < 32; bit += word < 4 ? 1 : 31) {
                buffer[4 * word + bit / 8] ^= (unsigned char)(1 << bit % 8);
                write_file("word.bin", buffer, bytes);
                TextLoader *loader = text_loader_open("word.bin", NULL, NULL, error);
                assert_true((loader != NULL) == (word >= 4));
                if (loader) {
                    assert_true(text_loader_read(loader, 0, 6, 11, tokens, error));
                    assert_memory_equal(tokens, ((int[]){5, 6, 7, 8, 9, 10}), sizeof tokens);
                    assert_int_equal(text_loader_vocab(loader), 0);
                    assert_int_equal(text_loader_bytes(loader), 0);
                }
                text_loader_close(loader);
                buffer[4 * word + bit / 8] ^= (unsigned char)(1 << bit % 8);
            }
        }
    }
    make_shard(buffer, 4, 5, 6);
    put_u32(buffer + 4, 1); /* the other width's version */
    write_file("version.bin", buffer, 1048);
    assert_refused("version.bin",
                   "version.bin is a shard of version 1: write it again as version 7, with uint32 tokens");
    make_shard(buffer, 4, 5, 6);
    put_u32(buffer + 12, 0x62616c6c);
    write_file("mark.bin", buffer, 1048);
    assert_refused("mark.bin", "mark.bin has 0x62616c6c in word 3 of its header");
}

static void assert_says(const char *path, int vocab, bool known, uint32_t tokenizer, uint64_t text) {
    uint32_t hash = 1;
    TextLoader *loader = open_good(path, NULL, NULL);
    assert_int_equal(text_loader_vocab(loader), vocab);
    assert_int_equal(text_loader_tokenizer(loader, &hash), known);
    assert_int_equal(hash, tokenizer);
    assert_int_equal(text_loader_bytes(loader), text);
    text_loader_close(loader);
}

static void test_what_shards_say_together(void **state) {
    const uint64_t much = UINT64_C(0x1234567890);
    write_described_shard("a1.bin", 2, 50257, 0xdeadbeef, 40);
    write_described_shard("a2.bin", 4, 50304, 0xdeadbeef, much);
    write_shard("b1.bin", 0, 10);
    write_described_shard("b2.bin", 2, 300, 0xdeadbeef, 0);
    write_described_shard("c1.bin", 2, 65536, 0, 50);
    assert_says("a1.bin", 50257, true, 0xdeadbeef, 40);
    assert_says("a[12].bin", 50304, true, 0xdeadbeef, 40 + much);
    assert_says("b1.bin", 0, false, 0, 0);
    assert_says("b2.bin", 300, true, 0xdeadbeef, 0);
    assert_says("[ab]1.bin", 0, false, 0xdeadbeef, 0);
    assert_says("[ab]2.bin", 50304, true, 0xdeadbeef, 0);
    assert_says("[ac]1.bin", 65536, false, 0xdeadbeef, 90);
    assert_says("c1.bin", 65536, false, 0, 50);
    write_described_shard("d1.bin", 4, 50257, 0xdeadbeee, 40);
    assert_refused("[abcd]1.bin", "a1.bin and d1.bin were made with different tokenizers");
    write_described_shard("e1.bin", 2, 9, 1, UINT64_MAX);
    write_described_shard("e2.bin", 2, 9, 1, 1);
    assert_refused("e*.bin", "e2.bin: with it the shards state more bytes of text than 64 bits can count");
}

static void test_vocabularies_that_cannot_be(void **state) {
    const struct {
        int width;
        uint32_t vocab;
        const char *line; /* NULL: it can be */
    } cases[] = {
        {2, 0, "a.bin states a vocabulary of 0, but its tokens are uint16"},
        {2, 65537, "a.bin states a vocabulary of 65537, but its tokens are uint16"},
        {2, 0xffffffff, "a.bin states a vocabulary of -1, but"},
        {4, 0, "a.bin states a vocabulary of 0, but its tokens are uint32"},
        {4, 0x80000000, "a.bin states a vocabulary of -2147483648, but"},
        {2, 65536, NULL},
        {2, 1, NULL},
        {4, 0x7fffffff, NULL},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_described_shard("a.bin", cases[i].width, cases[i].vocab, 1, 1);
        if (cases[i].line) {
            assert_refused("a.bin", cases[i].line);
        } else {
            assert_says("a.bin", (int)cases[i].vocab, true, 1, 1);
        }
    }
}

static void test_text_in_one_piece(void **state) {
    uint64_t bytes = 0;
    write_file("a.txt", "one\n", 4);
    write_file("b.txt", "2", 1);
    write_file("c.txt", "three\0", 6);
    TextLoader *loader = open_good("a.txt", NULL, NULL);
    const unsigned char *text = text_loader_text(loader, &bytes);
    assert_int_equal(bytes, 4);
    assert_memory_equal(text, "one\n", 4);
    text_loader_close(loader);
    loader = open_good("*.txt", NULL, NULL);
    text = text_loader_text(loader, &bytes);
    assert_int_equal(bytes, 11);
    assert_memory_equal(text, "one\n2three\0", 11);
    assert_ptr_equal(text_loader_text(loader, &bytes), text);
    text_loader_close(loader);
    assert_says("*.txt", 0, false, 0, 11);
    write_shard("x.bin", 0, 4);
    loader = open_good("x.bin", NULL, NULL);
    assert_null(text_loader_text(loader, &bytes));
    assert_int_equal(bytes, 0);
    text_loader_close(loader);
}

#define IN_FOLDER(test) cmocka_unit_test_setup_teardown(test, enter_folder, leave_folder)

int main(void) {
    const struct CMUnitTest tests[] = {
        IN_FOLDER(test_text_is_read_as_bytes),
        IN_FOLDER(test_one_byte_is_enough_for_the_loader),
        IN_FOLDER(test_windows_span_shards_in_the_order_of_names),
        IN_FOLDER(test_names_choose_files_of_folders_and_globs),
        IN_FOLDER(test_malformed_shards_are_refused),
        IN_FOLDER(test_every_header_byte_is_checked),
        IN_FOLDER(test_paths_that_hold_no_data_are_refused),
        IN_FOLDER(test_tokens_outside_the_vocabulary_are_reported),
        IN_FOLDER(test_positions_beyond_4_gib),
        IN_FOLDER(test_shards_of_both_widths_are_one_stream),
        IN_FOLDER(test_tokens_above_every_int_are_out_of_range),
        IN_FOLDER(test_every_other_length_is_refused),
        IN_FOLDER(test_each_word_of_a_header),
        IN_FOLDER(test_what_shards_say_together),
        IN_FOLDER(test_vocabularies_that_cannot_be),
        IN_FOLDER(test_text_in_one_piece),
    };
    return cmocka_run_group_tests_name("loader", tests, NULL, NULL);
}
