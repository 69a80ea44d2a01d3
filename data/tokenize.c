/* Makes a tokenizer from text, token shards from text, and text from token shards.
 *
 *     data/tokenize train --vocab 4096 --out tokenizer.json book.txt
 *     data/tokenize encode --tokenizer tokenizer.json --out shards book.txt
 *     ./train --data shards --tokenizer tokenizer.json
 *
 * Nothing half written stays: files get their names when they are complete, and after an error or Ctrl-C the shards of
 * the same call are removed. Read next: bpe_trainer.h, text_to_shards.h.
 */
#define _GNU_SOURCE /* mempcpy */
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <utf8proc.h>

#include "../kernels/check.h"
#include "bpe_trainer.h"
#include "pretokenizer.h"
#include "text_loader.h"
#include "text_to_shards.h"
#include "tokenizer.h"

enum { ERROR_BYTES = TEXT_LOADER_ERROR_BYTES, PATH_BYTES = 4096, MOST_VOCAB = 1 << 20, DECODED_AT_ONCE = 1 << 16 };

static const char HELP[] =
    "usage: data/tokenize COMMAND [--option value | --option=value]... ARGUMENT...\n"
    "\n"
    "  train --vocab N --out FILE TEXT...        learn a byte-pair tokenizer from texts, write a tokenizer.json\n"
    "    --vocab N           tokens in all, 257 at least: bytes, merges, <|endoftext|>; few words give fewer\n"
    "    --out FILE          the tokenizer.json; Hugging Face's tokenizers read it, too\n"
    "    --pattern P         what a word is: gpt2, qwen2 or a regular expression, whose matches are words [gpt2]\n"
    "\n"
    "  encode --tokenizer T --out DIR TEXT...    texts to DIR/NAME_train_000000.bin..., DIR/NAME_val_000000.bin...\n"
    "    --tokenizer T       a tokenizer.json, or byte\n"
    "    --out DIR           where the shards go; made if it is not there\n"
    "    --name NAME         how they are called [the first TEXT's name without its ending]\n"
    "    --val-share X       share of every TEXT, its end, that is for validation: 0 to 1 [0.1]\n"
    "    --shard-tokens N    most tokens of a shard [100000000]\n"
    "    --block-bytes N     text encoded at once, longer where no end-of-text token is; ids do not depend on it\n"
    "                        [16777216]\n"
    "\n"
    "  decode --tokenizer T SHARD...             the shards' text to the standard output\n"
    "\n"
    "  show --tokenizer T STRING                 ids and bytes of a string's tokens, one per line\n"
    "\n"
    "A TEXT is a file of UTF-8 (other bytes are kept as they are); <|endoftext|> in it ends a document.\n";

/* ---- the command line ---- */

typedef struct {
    const char *name;  /* "--vocab" */
    const char *value; /* what was given, else the default; NULL: must be given */
    bool given;
} Option;

/* Fills the options (the last one's name is NULL) and moves the arguments to the front of `words`; how many. */
static int parse(int count, char **words, const char *command, Option *options) {
    int arguments = 0;
    bool plain = false; /* after "--" */
    for (int i = 0; i < count; i++) {
        if (plain || strncmp(words[i], "--", 2) != 0) {
            words[arguments++] = words[i];
            continue;
        }
        if (strcmp(words[i], "--") == 0) {
            plain = true;
            continue;
        }
        size_t length = strcspn(words[i], "=");
        Option *option = options;
        while (option->name && (strlen(option->name) != length || strncmp(option->name, words[i], length) != 0)) {
            option++;
        }
        CHECK(option->name, "unknown option %s of %s: data/tokenize --help lists them", words[i], command);
        CHECK(!option->given, "%s is given twice: give it once", option->name);
        option->given = true;
        if (words[i][length] == '=') {
            option->value = words[i] + length + 1;
        } else {
            CHECK(i + 1 < count, "%s needs a value", option->name);
            option->value = words[++i];
        }
    }
    for (Option *option = options; option->name; option++) {
        CHECK(option->value, "%s needs %s: data/tokenize --help tells what it is", command, option->name);
    }
    return arguments;
}

static uint64_t whole_number(const Option *option, uint64_t least, uint64_t most) {
    char *end;
    errno = 0;
    unsigned long long value = strtoull(option->value, &end, 10);
    CHECK(isdigit((unsigned char)option->value[0]) && *end == '\0', "%s takes a whole number, not '%s'", option->name,
          option->value);
    CHECK(errno == 0 && value >= least && value <= most, "%s %s is out of range: choose from %llu to %llu",
          option->name, option->value, (unsigned long long)least, (unsigned long long)most);
    return value;
}

static double share(const Option *option) {
    char *end;
    double value = strtod(option->value, &end);
    CHECK(end != option->value && *end == '\0' && value >= 0 && value <= 1, "%s takes a number from 0 to 1, not '%s'",
          option->name, option->value);
    return value;
}

/* ---- what all commands open ---- */

static Tokenizer *open_tokenizer(const char *name) {
    char error[ERROR_BYTES] = "out of memory";
    Tokenizer *tokenizer = strcmp(name, "byte") == 0 ? tokenizer_bytes() : tokenizer_open(name, error, sizeof error);
    CHECK(tokenizer, "--tokenizer: %s", error);
    return tokenizer;
}

typedef struct {
    int count;
    TextLoader **loaders;
    Text *texts;
    uint64_t bytes; /* of all */
} Texts;

static Texts open_texts(int count, char **names, const char *command) {
    CHECK(count > 0, "%s needs a text: name one or more files", command);
    Texts all = {.count = count,
                 .loaders = calloc((size_t)count, sizeof(TextLoader *)),
                 .texts = calloc((size_t)count, sizeof(Text))};
    CHECK(all.loaders && all.texts, "out of memory for %d files", count);
    for (int i = 0; i < count; i++) {
        char error[ERROR_BYTES];
        uint64_t bytes = 0;
        all.loaders[i] = text_loader_open(names[i], NULL, NULL, error);
        CHECK(all.loaders[i], "%s", error);
        CHECK(text_loader_is_text(all.loaders[i]), "%s is token shards: give text (data/tokenize decode makes it)",
              names[i]);
        const char *text = (const char *)text_loader_text(all.loaders[i], &bytes);
        CHECK(text, "out of memory for the text in %s: give its files one by one", names[i]);
        all.texts[i] = (Text){text, (size_t)bytes};
        all.bytes += bytes;
    }
    return all;
}

static void close_texts(Texts *texts) {
    for (int i = 0; i < texts->count; i++) {
        text_loader_close(texts->loaders[i]);
    }
    free(texts->loaders);
    free(texts->texts);
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* ---- train ---- */

static void show_training(int tokens, int vocab, void *user) {
    if (isatty(STDOUT_FILENO)) {
        printf("\r%d of %d tokens", tokens, vocab);
        fflush(stdout);
    }
}

/* One text of several, the caller's: documents of different files do not touch. */
static char *join_texts(const Texts *texts, size_t *bytes) {
    static const char mark[] = "<|endoftext|>";
    *bytes = (size_t)texts->bytes + (size_t)texts->count * (sizeof mark - 1);
    char *joined = malloc(*bytes), *end = joined;
    CHECK(joined, "out of memory for %zu bytes of text: give a part of it", *bytes);
    for (int i = 0; i < texts->count; i++) {
        end = mempcpy(end, texts->texts[i].bytes, texts->texts[i].size);
        end = mempcpy(end, mark, sizeof mark - 1);
    }
    return joined;
}

/* Says before the work, not after it, that its result has no place to go. */
static void check_place(const char *path, const char *temporary) {
    struct stat status;
    CHECK(stat(path, &status) != 0 || S_ISREG(status.st_mode), "--out %s is there and no regular file: choose another",
          path);
    int fd = open(temporary, O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
    CHECK(fd >= 0, "cannot write --out %s: %s; choose another place", path, strerror(errno));
    close(fd);
    unlink(temporary);
}

static void write_whole(const char *path, const char *temporary, const char *bytes, size_t count) {
    FILE *file = fopen(temporary, "wbe");
    bool written = file && fwrite(bytes, 1, count, file) == count && fflush(file) == 0 && fsync(fileno(file)) == 0;
    written = file && fclose(file) == 0 && written && rename(temporary, path) == 0;
    int reason = errno;
    if (!written) {
        unlink(temporary);
    }
    CHECK(written, "cannot write --out %s: %s; free some space or choose another place", path, strerror(reason));
}

static void command_train(int count, char **words) {
    Option options[] = {{"--vocab", NULL, false}, {"--out", NULL, false}, {"--pattern", "gpt2", false}, {0}};
    count = parse(count, words, "train", options);
    int vocab = (int)whole_number(&options[0], 257, MOST_VOCAB);
    const char *out = options[1].value, *pattern = options[2].value;
    char temporary[PATH_BYTES], error[ERROR_BYTES];
    CHECK(out && *out && strlen(out) + sizeof ".tmp" <= sizeof temporary, "--out '%s' is no file's name", out);
    snprintf(temporary, sizeof temporary, "%s.tmp", out);
    Texts texts = open_texts(count, words, "train");
    check_place(out, temporary);

    BpeOptions choice = {.vocab = vocab, .pattern = pattern, .progress = show_training};
    if (strcmp(pattern, "gpt2") == 0) {
        choice.pattern = PATTERN_GPT2;
    } else if (strcmp(pattern, "qwen2") == 0) {
        choice.pattern = PATTERN_QWEN2;
    }
    double start = seconds();
    size_t bytes = texts.texts[0].size, json_bytes;
    char *joined = count > 1 ? join_texts(&texts, &bytes) : NULL;
    char *json = bpe_train(joined ? joined : texts.texts[0].bytes, bytes, &choice, &json_bytes, error, sizeof error);
    free(joined);
    CHECK(json, "%s", error);
    Tokenizer *tokenizer = tokenizer_parse(json, json_bytes, out, error, sizeof error);
    CHECK(tokenizer, "%s", error);
    write_whole(out, temporary, json, json_bytes);

    int tokens = tokenizer_vocab(tokenizer);
    printf("%s%s: %d tokens of %.2f MB of text in %.2f s\n", isatty(STDOUT_FILENO) ? "\r" : "", out, tokens,
           1e-6 * (double)texts.bytes, seconds() - start);
    if (tokens < vocab) {
        printf("fewer than --vocab %d: no other pair of tokens comes twice in the text\n", vocab);
    }
    printf("next: data/tokenize encode --tokenizer %s --out DIR %s\n", out, words[0]);
    tokenizer_close(tokenizer);
    free(json);
    close_texts(&texts);
}

/* ---- encode ---- */

static volatile sig_atomic_t stop_signal = 0; /* the one variable a signal's handler may set */

static void ask_to_stop(int number) {
    stop_signal = number;
}

/* The first of them is seen between two blocks, the second ends the program at once: then a .tmp may stay. */
static void catch_signals(void) {
    struct sigaction action = {.sa_handler = ask_to_stop, .sa_flags = (int)SA_RESETHAND};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

typedef struct {
    uint64_t bytes, tokens; /* done */
    uint64_t all_bytes;
    double start;
} Progress;

/* One line, written over itself where that can be seen. */
static void show_encoding(const Progress *progress, bool last) {
    bool terminal = isatty(STDOUT_FILENO);
    if (terminal || last) {
        double bytes = (double)progress->bytes;
        printf("%s%.2f of %.2f MB of text, %llu tokens, %.3f bytes per token, %.1f MB/s%s", terminal ? "\r" : "",
               1e-6 * bytes, 1e-6 * (double)progress->all_bytes, (unsigned long long)progress->tokens,
               bytes / (double)(progress->tokens ? progress->tokens : 1),
               1e-6 * bytes / (seconds() - progress->start + 1e-9), last ? "\n" : "");
        fflush(stdout);
    }
}

static bool note_encoding(uint64_t bytes, uint64_t tokens, void *user) {
    Progress *progress = user;
    progress->bytes = bytes;
    progress->tokens = tokens;
    show_encoding(progress, false);
    return !stop_signal;
}

/* The file's name without folders and ending; the caller's. */
static char *name_of(const char *path) {
    const char *slash = strrchr(path, '/');
    char *name = strdup(slash ? slash + 1 : path);
    CHECK(name, "out of memory");
    char *dot = strrchr(name, '.');
    if (dot && dot != name) {
        *dot = '\0';
    }
    return name;
}

static void check_name(const char *name) {
    CHECK(*name && *name != '.' && !strchr(name, '/'), "--name '%s' cannot start a shard's name: choose another", name);
    CHECK(!strstr(name, "val"), "--name %s: shards with \"val\" in their names are for validation; choose another name",
          name);
}

/* Whether the folder was made. */
static bool prepare_folder(const char *folder, const char *name) {
    bool made = mkdir(folder, 0777) == 0;
    struct stat status;
    CHECK(made || errno == EEXIST, "cannot make --out %s: %s; choose another place", folder, strerror(errno));
    CHECK(stat(folder, &status) == 0 && S_ISDIR(status.st_mode), "--out %s is no folder: choose another", folder);
    CHECK(access(folder, W_OK | X_OK) == 0, "cannot write into --out %s: %s; choose another place", folder,
          strerror(errno));
    char *old = shard_of_name(folder, name);
    CHECK(!old, "--out %s has %s in it already: remove the shards of that name, or choose another --name or --out",
          folder, old);
    return made;
}

static void command_encode(int count, char **words) {
    Option options[] = {{"--tokenizer", NULL, false},
                        {"--out", NULL, false},
                        {"--name", "", false},
                        {"--val-share", "0.1", false},
                        {"--shard-tokens", "100000000", false},
                        {"--block-bytes", "16777216", false},
                        {0}};
    count = parse(count, words, "encode", options);
    const char *folder = options[1].value;
    Progress progress = {0};
    ShardOptions choice = {.folder = folder,
                           .val_share = share(&options[3]),
                           .shard_tokens = whole_number(&options[4], 1, INT32_MAX),
                           .block_bytes = (size_t)whole_number(&options[5], 1, SIZE_MAX / 2),
                           .progress = note_encoding,
                           .user = &progress};
    Texts texts = open_texts(count, words, "encode");
    char *name = options[2].given ? strdup(options[2].value) : name_of(words[0]);
    CHECK(name, "out of memory");
    check_name(name);
    Tokenizer *tokenizer = open_tokenizer(options[0].value);
    choice.name = name;
    choice.tokenizer = tokenizer;
    bool made = prepare_folder(folder, name);

    catch_signals();
    progress.all_bytes = texts.bytes;
    progress.start = seconds();
    ShardCounts counts;
    char error[ERROR_BYTES];
    if (!text_to_shards(texts.texts, texts.count, &choice, &counts, error, sizeof error)) {
        if (made) {
            rmdir(folder);
        }
        if (stop_signal) {
            raise(stop_signal); /* its action is the default again */
        }
        CHECK(false, "%s", error);
    }
    show_encoding(&progress, true);
    printf("%s: shards: %d of training text with %llu tokens, %d of validation text with %llu tokens\n", folder,
           counts.train_shards, (unsigned long long)counts.train_tokens, counts.val_shards,
           (unsigned long long)counts.val_tokens);
    printf("next: ./train --data %s --tokenizer %s%s\n", folder, options[0].value,
           counts.val_shards ? "" : " --val OTHER_SHARDS");
    tokenizer_close(tokenizer);
    free(name);
    close_texts(&texts);
}

/* ---- decode and show ---- */

static TextLoader *open_shards(const char *name, const Tokenizer *tokenizer) {
    char error[ERROR_BYTES];
    TextLoader *loader = text_loader_open(name, NULL, NULL, error);
    CHECK(loader, "%s", error);
    CHECK(!text_loader_is_text(loader), "%s is text, not token shards: give *.bin files", name);
    uint32_t hash = 0;
    text_loader_tokenizer(loader, &hash);
    CHECK(hash == 0 || hash == tokenizer_hash(tokenizer),
          "%s was made with another tokenizer: give the one it was made with as --tokenizer", name);
    return loader;
}

static void decode_shards(const TextLoader *loader, const Tokenizer *tokenizer) {
    char error[ERROR_BYTES];
    uint64_t tokens = text_loader_tokens(loader);
    int *ids = malloc(DECODED_AT_ONCE * sizeof *ids);
    CHECK(ids, "out of memory for %d tokens", DECODED_AT_ONCE);
    for (uint64_t at = 0; at < tokens; at += DECODED_AT_ONCE) {
        size_t count = tokens - at < DECODED_AT_ONCE ? (size_t)(tokens - at) : DECODED_AT_ONCE, bytes;
        CHECK(text_loader_read(loader, at, count, tokenizer_vocab(tokenizer), ids, error),
              "%s: give the tokenizer that the shard was made with", error);
        char *text = tokenizer_decode(tokenizer, ids, count, &bytes);
        CHECK(text, "out of memory for the text of %zu tokens", count);
        CHECK(fwrite(text, 1, bytes, stdout) == bytes, "cannot write the text: %s", strerror(errno));
        free(text);
    }
    free(ids);
}

static void command_decode(int count, char **words) {
    Option options[] = {{"--tokenizer", NULL, false}, {0}};
    count = parse(count, words, "decode", options);
    CHECK(count > 0, "decode needs a shard: name one or more");
    Tokenizer *tokenizer = open_tokenizer(options[0].value);
    for (int pass = 0; pass < 2; pass++) { /* all are opened before the first is written */
        for (int i = 0; i < count; i++) {
            TextLoader *loader = open_shards(words[i], tokenizer);
            if (pass == 1) {
                decode_shards(loader, tokenizer);
            }
            text_loader_close(loader);
        }
    }
    tokenizer_close(tokenizer);
}

/* Characters as they are, but for those that cannot be seen and bytes that are none. */
static void print_quoted(const char *bytes, size_t count) {
    putchar('"');
    for (size_t i = 0; i < count;) {
        utf8proc_int32_t character;
        utf8proc_ssize_t taken =
            utf8proc_iterate((const utf8proc_uint8_t *)bytes + i, (utf8proc_ssize_t)(count - i), &character);
        bool seen = taken > 0 && character >= ' ' && !(character >= 127 && character < 160);
        if (!seen) {
            taken = 1;
            printf(bytes[i] == '\n' ? "\\n" : bytes[i] == '\t' ? "\\t" : "\\x%02x", (unsigned char)bytes[i]);
        } else {
            printf(character == '"' || character == '\\' ? "\\%.*s" : "%.*s", (int)taken, bytes + i);
        }
        i += (size_t)taken;
    }
    printf("\"\n");
}

static void command_show(int count, char **words) {
    Option options[] = {{"--tokenizer", NULL, false}, {0}};
    count = parse(count, words, "show", options);
    CHECK(count == 1, "show takes one string, not %d: put it between quotes", count);
    Tokenizer *tokenizer = open_tokenizer(options[0].value);
    char error[ERROR_BYTES];
    size_t tokens, bytes = 0;
    int *ids;
    CHECK(tokenizer_encode(tokenizer, words[0], strlen(words[0]), &ids, &tokens, error, sizeof error), "%s", error);
    for (size_t i = 0; i < tokens; i++) {
        const char *piece = tokenizer_token(tokenizer, ids[i], &bytes);
        printf("%7d  ", ids[i]);
        print_quoted(piece, bytes);
    }
    free(ids);
    tokenizer_close(tokenizer);
}

/* Where standard input, output or error is closed, the next file opened would take its number and its text. */
static void hold_standard_streams(void) {
    int fd = open("/dev/null", O_RDWR);
    while (fd >= 0 && fd <= STDERR_FILENO) {
        fd = open("/dev/null", O_RDWR);
    }
    if (fd >= 0) {
        close(fd);
    }
}

int main(int count, char **words) {
    static const struct {
        const char *name;
        void (*run)(int count, char **words);
    } commands[] = {
        {"train", command_train}, {"encode", command_encode}, {"decode", command_decode}, {"show", command_show}};

    hold_standard_streams();
    signal(SIGXFSZ, SIG_IGN); /* a file that may not grow is then a failed write, as on a full disk */
    for (int i = 1; i < count && strcmp(words[i], "--") != 0; i++) {
        if (strcmp(words[i], "--help") == 0 || strcmp(words[i], "-h") == 0) {
            fputs(HELP, stdout);
            return EXIT_OK;
        }
    }
    CHECK(count > 1, "data/tokenize needs a command: train, encode, decode or show; --help tells what they do");
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        if (strcmp(words[1], commands[i].name) == 0) {
            commands[i].run(count - 2, words + 2);
            CHECK(fflush(stdout) == 0 && !ferror(stdout), "cannot write to the standard output: %s", strerror(errno));
            return EXIT_OK;
        }
    }
    CHECK(false, "unknown command %s: choose train, encode, decode or show; --help tells what they do", words[1]);
}
