/* A tokenizer's own functions; it is read by tokenizer_json.c and applied by tokenizer_encode.c.
 *
 * Called by corpus.c, tokenize.c and train.c. Read next: tokenizer_encode.c. */
#include "tokenizer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tokenizer_parts.h"

/* GPT-2's table: bytes that are printable characters of Latin-1 stand for themselves, the others, in their order, are
 * U+0100, U+0101, ... The blank is U+0120. */
const char *byte_character(unsigned char byte) {
    // clang-format off
    static const char CHARACTERS[256][3] = {
        "Ā", "ā", "Ă", "ă", "Ą", "ą", "Ć", "ć", "Ĉ", "ĉ", "Ċ", "ċ", "Č", "č", "Ď", "ď",
        "Đ", "đ", "Ē", "ē", "Ĕ", "ĕ", "Ė", "ė", "Ę", "ę", "Ě", "ě", "Ĝ", "ĝ", "Ğ", "ğ",
        "Ġ", "!", "\"", "#", "$", "%", "&", "'", "(", ")", "*", "+", ",", "-", ".", "/",
        "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", ":", ";", "<", "=", ">", "?",
        "@", "A", "B", "C", "D", "E", "F", "G", "H", "I", "J", "K", "L", "M", "N", "O",
        "P", "Q", "R", "S", "T", "U", "V", "W", "X", "Y", "Z", "[", "\\", "]", "^", "_",
        "`", "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o",
        "p", "q", "r", "s", "t", "u", "v", "w", "x", "y", "z", "{", "|", "}", "~", "ġ",
        "Ģ", "ģ", "Ĥ", "ĥ", "Ħ", "ħ", "Ĩ", "ĩ", "Ī", "ī", "Ĭ", "ĭ", "Į", "į", "İ", "ı",
        "Ĳ", "ĳ", "Ĵ", "ĵ", "Ķ", "ķ", "ĸ", "Ĺ", "ĺ", "Ļ", "ļ", "Ľ", "ľ", "Ŀ", "ŀ", "Ł",
        "ł", "¡", "¢", "£", "¤", "¥", "¦", "§", "¨", "©", "ª", "«", "¬", "Ń", "®", "¯",
        "°", "±", "²", "³", "´", "µ", "¶", "·", "¸", "¹", "º", "»", "¼", "½", "¾", "¿",
        "À", "Á", "Â", "Ã", "Ä", "Å", "Æ", "Ç", "È", "É", "Ê", "Ë", "Ì", "Í", "Î", "Ï",
        "Ð", "Ñ", "Ò", "Ó", "Ô", "Õ", "Ö", "×", "Ø", "Ù", "Ú", "Û", "Ü", "Ý", "Þ", "ß",
        "à", "á", "â", "ã", "ä", "å", "æ", "ç", "è", "é", "ê", "ë", "ì", "í", "î", "ï",
        "ð", "ñ", "ò", "ó", "ô", "õ", "ö", "÷", "ø", "ù", "ú", "û", "ü", "ý", "þ", "ÿ",
    };
    // clang-format on
    return CHARACTERS[byte];
}

Tokenizer *tokenizer_bytes(void) {
    static const char head[] =
        "{\"version\":\"1.0\",\"truncation\":null,\"padding\":null,\"added_tokens\":[],\"normalizer\":null,\n"
        "\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,"
        "\"use_regex\":false},\n\"post_processor\":null,\n"
        "\"decoder\":{\"type\":\"ByteLevel\",\"add_prefix_space\":true,\"trim_offsets\":true,\"use_regex\":true},\n"
        "\"model\":{\"type\":\"BPE\",\"dropout\":null,\"unk_token\":null,\"continuing_subword_prefix\":null,"
        "\"end_of_word_suffix\":null,\"fuse_unk\":false,\"byte_fallback\":false,\"ignore_merges\":false,\n\"vocab\":{";
    enum { LONGEST_ENTRY = 12 }; /* ,"\\":255 */
    char json[sizeof head + 256 * LONGEST_ENTRY + 32], error[256], *out = json;
    out += sprintf(out, "%s", head);
    for (int byte = 0; byte < 256; byte++) {
        const char *character = byte_character((unsigned char)byte);
        const char *escape = byte == '"' || byte == '\\' ? "\\" : "";
        out += sprintf(out, "%s\"%s%s\":%d", byte ? "," : "", escape, character, byte);
    }
    out += sprintf(out, "},\"merges\":[]}}\n");
    return tokenizer_parse(json, (size_t)(out - json), "bytes", error, sizeof error);
}

void tokenizer_close(Tokenizer *t) {
    if (!t) {
        return;
    }
    for (int id = 0; id < t->vocab; id++) {
        free(t->tokens[id].text);
        free(t->tokens[id].bytes);
    }
    for (int rank = 0; t->merge_texts && rank < t->merges.count; rank++) {
        free(t->merge_texts[rank]);
    }
    free(t->tokens);
    free(t->added);
    free(t->merge_texts);
    free(t->by_bytes);
    merges_free(&t->merges);
    pretokenizer_close(t->pretokenizer);
    free(t->json);
    free(t);
}

bool tokenizer_is_bytes(const Tokenizer *t) {
    return t->is_bytes;
}

int tokenizer_vocab(const Tokenizer *t) {
    return t->vocab;
}

uint32_t tokenizer_hash(const Tokenizer *t) {
    return t->hash;
}

int tokenizer_end_of_text(const Tokenizer *t) {
    return t->end_of_text;
}

static const Token *find_token(const Tokenizer *t, int id) {
    return id >= 0 && id < t->vocab && t->tokens[id].text ? &t->tokens[id] : NULL;
}

const char *tokenizer_token(const Tokenizer *t, int id, size_t *bytes) {
    const Token *token = find_token(t, id);
    *bytes = token ? token->length : 0;
    return token ? token->bytes : NULL;
}

const char *tokenizer_token_text(const Tokenizer *t, int id) {
    const Token *token = find_token(t, id);
    return token ? token->text : NULL;
}

bool tokenizer_is_added(const Tokenizer *t, int id) {
    const Token *token = find_token(t, id);
    return token && token->added;
}

bool tokenizer_is_special(const Tokenizer *t, int id) {
    const Token *token = find_token(t, id);
    return token && token->special;
}

uint64_t bytes_hash(const char *bytes, size_t length) {
    uint64_t hash = UINT64_C(0xcbf29ce484222325); /* FNV-1a */
    for (size_t i = 0; i < length; i++) {
        hash = (hash ^ (unsigned char)bytes[i]) * UINT64_C(0x100000001b3);
    }
    return hash ^ hash >> 32;
}

int tokenizer_find(const Tokenizer *t, const char *bytes, size_t length) {
    size_t slot = bytes_hash(bytes, length) & (t->by_bytes_slots - 1);
    for (; t->by_bytes[slot] >= 0; slot = (slot + 1) & (t->by_bytes_slots - 1)) {
        const Token *token = &t->tokens[t->by_bytes[slot]];
        if (token->length == length && memcmp(token->bytes, bytes, length) == 0) {
            return t->by_bytes[slot];
        }
    }
    return -1;
}

char *tokenizer_decode(const Tokenizer *t, const int *ids, size_t count, size_t *bytes) {
    size_t total = 0, length;
    for (size_t i = 0; i < count; i++) {
        tokenizer_token(t, ids[i], &length);
        total += length;
    }
    char *text = malloc(total + 1), *out = text;
    for (size_t i = 0; text && i < count; i++) {
        const char *piece = tokenizer_token(t, ids[i], &length);
        if (piece) {
            memcpy(out, piece, length);
            out += length;
        }
    }
    if (text) {
        *out = '\0';
    }
    if (bytes) {
        *bytes = total;
    }
    return text;
}

const char *tokenizer_json(const Tokenizer *t, size_t *bytes) {
    *bytes = t->json_bytes;
    return t->json;
}

int tokenizer_merges(const Tokenizer *t) {
    return t->merges.count;
}

const char *tokenizer_merge_text(const Tokenizer *t, int rank) {
    return t->merge_texts[rank];
}

const char *tokenizer_pattern_name(const Tokenizer *t) {
    int patterns = pretokenizer_patterns(t->pretokenizer);
    const char *pattern = patterns == 1 ? pretokenizer_pattern(t->pretokenizer, 0) : "";
    bool no_cut_matters = t->merges.count == 0 && !t->ignore_merges;
    return no_cut_matters || !strcmp(pattern, PATTERN_GPT2) ? "gpt-2"
           : !strcmp(pattern, PATTERN_QWEN2)                ? "qwen2"
                                                            : NULL;
}
