/* The builtin corpus: six small languages, each of which wants another skill, mixed by document.
 *
 *     story       Leo saw 34 red cats at 5:22. The cats run often. He fed a big cow. Leo slept in room 3961.
 *                 spelling, agreement in number, a pronoun that fits the hero, the hero's name again
 *     arithmetic  3+4=7 5*6=30 2+2=4 ...                     a table of 72 facts
 *     brackets    (k[d]{m<p>})[q] ...                        closing what is open, at most DEPTH deep
 *     recall      map k3 b7 x1 q9 d0 z2 f5 h3? b7 x1 f5 k3   looking a key up; needs more training than the others
 *     sort        sort dkzbqa=abdkqz ...                     order
 *     echo        echo kdjfh=kdjfh ...                       copying what stands a few characters back
 *
 * The first byte of a document shows its domain: a capital, a digit, a bracket, m, s or e.
 *
 * A document is written from left to right. Each choice is uniform over options of which no one is the beginning of
 * another, so a text has one derivation only, and the probability of its next byte is the share of the options still
 * possible that go on with that byte. Its negative logarithm, in nats, stands beside the byte; a byte that follows from
 * the others costs 0. The random part is large on purpose (over 2^60 documents in each domain): no validation document
 * is met in training.
 *
 * Called by data/corpus.c, which cuts documents into sequences: read it next. */
#include "builtin.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "../kernels/random.h"

enum { LETTERS = 26, WORD_BYTES = 8 };

/* A document under way. */
typedef struct {
    unsigned char *bytes;
    double *nats;
    int length;
    double pending; /* nats of decisions made, which the next byte will show */
    uint64_t key;   /* of this document's numbers */
    uint64_t draws; /* how many of them were used */
} Writer;

static int draw(Writer *w, int n) {
    return (int)random_below(w->key, w->draws++, (uint64_t)n);
}

/* A uniform decision among n ways to go on that differ in the very next byte. */
static int decide(Writer *w, int n) {
    w->pending += log(n);
    return draw(w, n);
}

/* Every byte passes here: `nats` for itself, and whatever decisions it shows. */
static void put_byte(Writer *w, int byte, double nats) {
    assert(w->length < BUILTIN_DOCUMENT_BYTES);
    w->bytes[w->length] = (unsigned char)byte;
    w->nats[w->length] = nats + w->pending;
    w->length++;
    w->pending = 0.0;
}

/* Text that follows from what stands before it. */
static void put_text(Writer *w, const char *text) {
    for (; *text; text++) {
        put_byte(w, *text, 0.0);
    }
}

/* One of the n words of the list, then the byte `end`, which no word contains: "cart" and "car" part at "car ".
 * Returns which. */
static int put_word(Writer *w, const char words[][WORD_BYTES], int n, int end) {
    int chosen = draw(w, n);
    const char *word = words[chosen];
    int agree[WORD_BYTES] = {0}; /* how many words start with the first i + 1 bytes of this one, its final 0 included */
    for (int k = 0; k < n; k++) {
        for (int i = 0; i < WORD_BYTES && words[k][i] == word[i]; i++) {
            agree[i]++;
        }
    }
    int before = n;
    for (int i = 0; i < WORD_BYTES; i++) {
        double nats = agree[i] < before ? log((double)before / agree[i]) : 0.0;
        put_byte(w, word[i] ? word[i] : end, nats);
        if (!word[i]) {
            break;
        }
        before = agree[i];
    }
    return chosen;
}

/* One of n bytes that follow each other in ASCII, e.g. digits. */
static int put_range(Writer *w, int first, int n) {
    int chosen = first + decide(w, n);
    put_byte(w, chosen, 0.0);
    return chosen;
}

static void put_number(Writer *w, int number) {
    assert(number >= 0 && number < 100);
    if (number >= 10) {
        put_byte(w, '0' + number / 10, 0.0);
    }
    put_byte(w, '0' + number % 10, 0.0);
}

/* Draws `count` different letters, in random order, without writing them. */
static void draw_letters(Writer *w, char *letters, int count) {
    char pool[LETTERS];
    for (int i = 0; i < LETTERS; i++) {
        pool[i] = (char)('a' + i);
    }
    for (int i = 0; i < count; i++) {
        int k = i + draw(w, LETTERS - i);
        letters[i] = pool[k];
        pool[k] = pool[i];
    }
}

/* ---- story ---- */

enum { WORDS = 12, HEROINES = WORDS / 2 }; /* words in each list; the first HEROINES heroes are "she" */

static const char heroes[WORDS][WORD_BYTES] = {"Ada", "Bea", "Eva", "Ida",  "Mia", "Nora",
                                               "Bob", "Dan", "Gus", "Hugo", "Leo", "Otto"};
static const char past_verbs[WORDS][WORD_BYTES] = {"saw",    "met", "drew", "found", "lost", "hid",
                                                   "bought", "got", "knew", "fed",   "kept", "used"};
static const char adjectives[WORDS][WORD_BYTES] = {"red",  "blue", "green", "big", "tiny", "long",
                                                   "cold", "warm", "new",   "old", "wild", "quiet"};
static const char nouns[WORDS][WORD_BYTES] = {"cat",  "dog",  "cow",  "hen",  "bird", "goat",
                                              "king", "girl", "monk", "lamp", "tree", "robot"};
static const char present_verbs[WORDS][WORD_BYTES] = {"run",  "sing", "jump", "sleep", "eat",  "play",
                                                      "wait", "hide", "move", "look",  "fall", "grow"};
static const char adverbs[WORDS][WORD_BYTES] = {"fast", "there", "alone",  "often", "again", "here",
                                                "now",  "today", "slowly", "badly", "much",  "late"};
static const char last_verbs[WORDS][WORD_BYTES] = {"slept",  "cried", "smiled", "rested", "died", "woke",
                                                   "waited", "ran",   "hummed", "played", "fell", "won"};

/* "a big dog" or "27 big dogs", and the byte `end`. Returns which noun, and whether there are several. */
static int put_things(Writer *w, int end, bool *several) {
    *several = decide(w, 2);
    if (*several) {
        put_range(w, '2', 8);
        put_range(w, '0', 10);
    } else {
        put_text(w, "a");
    }
    put_text(w, " ");
    put_word(w, adjectives, WORDS, ' ');
    if (!*several) {
        return put_word(w, nouns, WORDS, end);
    }
    int noun = put_word(w, nouns, WORDS, 's');
    put_byte(w, end, 0.0);
    return noun;
}

static void write_story(Writer *w) {
    bool several;
    int hero = put_word(w, heroes, WORDS, ' ');
    put_word(w, past_verbs, WORDS, ' ');
    int noun = put_things(w, ' ', &several);
    put_text(w, "at ");
    put_range(w, '1', 9);
    put_text(w, ":");
    put_range(w, '0', 6);
    put_range(w, '0', 10);
    put_text(w, ". The ");
    put_text(w, nouns[noun]);
    put_text(w, several ? "s " : " ");
    put_word(w, present_verbs, WORDS, several ? ' ' : 's');
    put_text(w, several ? "" : " ");
    put_word(w, adverbs, WORDS, '.');
    put_text(w, hero < HEROINES ? " She " : " He ");
    put_word(w, past_verbs, WORDS, ' ');
    put_things(w, '.', &several);
    put_text(w, " ");
    put_text(w, heroes[hero]);
    put_text(w, " ");
    put_word(w, last_verbs, WORDS, ' ');
    put_text(w, "in room ");
    for (int i = 0; i < 4; i++) {
        put_range(w, '0', 10);
    }
    put_text(w, ".");
}

/* ---- arithmetic ---- */

enum { FACTS_LEAST = 10, FACTS_MOST = 13, OPERANDS = 6 };

static void write_arithmetic(Writer *w) {
    for (int fact = 0;; fact++) {
        int a = put_range(w, '1', OPERANDS) - '0';
        int times = decide(w, 2);
        put_byte(w, times ? '*' : '+', 0.0);
        int b = put_range(w, '1', OPERANDS) - '0';
        put_text(w, "=");
        put_number(w, times ? a * b : a + b);
        /* All numbers of facts are equally likely, and a space or the newline shows the decision to go on. */
        int done = fact + 1;
        if (done == FACTS_MOST) {
            return;
        }
        if (done >= FACTS_LEAST) {
            double ways = FACTS_MOST - done + 1;
            bool stop = draw(w, FACTS_MOST - done + 1) == 0;
            w->pending += stop ? log(ways) : log(ways / (ways - 1));
            if (stop) {
                return;
            }
        }
        put_text(w, " ");
    }
}

/* ---- brackets ---- */

enum { PAIRS_LEAST = 9, PAIRS_MOST = 12, DEPTH = 4, KINDS = 4 };

static void write_brackets(Writer *w) {
    static const char opening[] = "([{<", closing[] = ")]}>";
    int stack[DEPTH];
    int depth = 0;
    for (int pairs = 0;;) {
        bool may_open = pairs < PAIRS_MOST && depth < DEPTH;
        bool may_leave = depth > 0 || pairs >= PAIRS_LEAST; /* close, or end the document when nothing is open */
        bool open = may_open && (!may_leave || decide(w, 2));
        if (open) {
            stack[depth] = decide(w, KINDS);
            put_byte(w, opening[stack[depth]], 0.0);
            put_range(w, 'a', LETTERS);
            depth++;
            pairs++;
        } else if (depth > 0) {
            depth--;
            put_byte(w, closing[stack[depth]], 0.0);
        } else {
            return;
        }
    }
}

/* ---- recall ---- */

enum { KEYS = 8, QUERIES = 4 };

static void write_recall(Writer *w) {
    char keys[KEYS];
    int values[KEYS];
    draw_letters(w, keys, KEYS);
    put_text(w, "map");
    for (int i = 0; i < KEYS; i++) {
        put_text(w, " ");
        put_byte(w, keys[i], log(LETTERS - i));
        values[i] = put_range(w, '0', 10);
    }
    put_text(w, "?");
    for (int q = 0; q < QUERIES; q++) {
        put_text(w, " ");
        int i = decide(w, KEYS);
        put_byte(w, keys[i], 0.0);
        put_byte(w, values[i], 0.0);
    }
}

/* ---- sort ---- */

enum { LISTS = 3, ITEMS = 6 };

static void write_sort(Writer *w) {
    put_text(w, "sort");
    for (int list = 0; list < LISTS; list++) {
        char items[ITEMS];
        draw_letters(w, items, ITEMS);
        put_text(w, " ");
        for (int i = 0; i < ITEMS; i++) {
            put_byte(w, items[i], log(LETTERS - i));
        }
        put_text(w, "=");
        for (int i = 1; i < ITEMS; i++) { /* insertion sort */
            char item = items[i];
            int k = i;
            for (; k > 0 && items[k - 1] > item; k--) {
                items[k] = items[k - 1];
            }
            items[k] = item;
        }
        for (int i = 0; i < ITEMS; i++) {
            put_byte(w, items[i], 0.0);
        }
    }
}

/* ---- echo ---- */

enum { ECHOES = 3, ECHO_LETTERS = 5 };

static void write_echo(Writer *w) {
    put_text(w, "echo");
    for (int e = 0; e < ECHOES; e++) {
        char letters[ECHO_LETTERS + 1] = "";
        put_text(w, " ");
        for (int i = 0; i < ECHO_LETTERS; i++) {
            letters[i] = (char)put_range(w, 'a', LETTERS);
        }
        put_text(w, "=");
        put_text(w, letters);
    }
}

/* ---- the mixture ---- */

/* A domain's share of the documents is its weight over the sum of the weights: more where the skill takes longer to
 * learn. */
static const struct {
    const char *name;
    const char *prompt;
    int weight;
    void (*write)(Writer *w);
} domains[] = {
    {.name = "story", .prompt = "Leo saw a ", .weight = 2, .write = write_story},
    {.name = "arithmetic", .prompt = "3+4=7 5*", .weight = 2, .write = write_arithmetic},
    {.name = "brackets", .prompt = "(k[d]", .weight = 2, .write = write_brackets},
    {.name = "recall", .prompt = "map k3 b7 x1 q9 d0 z2 f5 h3? b", .weight = 3, .write = write_recall},
    {.name = "sort", .prompt = "sort dkzbqa=", .weight = 3, .write = write_sort},
    {.name = "echo", .prompt = "echo kdjfh=", .weight = 2, .write = write_echo},
};

enum { DOMAINS = sizeof domains / sizeof domains[0] };

int builtin_domains(void) {
    return DOMAINS;
}

const char *builtin_domain_name(int domain) {
    return domains[domain].name;
}

const char *builtin_prompt(int domain) {
    return domains[domain].prompt;
}

DomainSet builtin_all_domains(void) {
    return (1U << DOMAINS) - 1;
}

/* The domain whose name is the first `length` bytes of the text, -1 when there is none. */
static int find_domain(const char *name, size_t length) {
    for (int d = 0; d < DOMAINS; d++) {
        if (strlen(domains[d].name) == length && strncmp(domains[d].name, name, length) == 0) {
            return d;
        }
    }
    return -1;
}

bool builtin_find_domains(const char *names, DomainSet *set, char *error, size_t error_size) {
    *set = 0;
    for (const char *name = names;; name++) {
        size_t length = strcspn(name, ",");
        int d = find_domain(name, length);
        if (d < 0 || *set & 1U << d) {
            int used = snprintf(error, error_size, "'%.*s' %s", length < 40 ? (int)length : 40, name,
                                d < 0 ? "is no domain, they are" : "stands twice, the domains are");
            for (int i = 0; i < DOMAINS && used < (int)error_size; i++) {
                used += snprintf(error + used, error_size - (size_t)used, "%s %s", i ? "," : "", domains[i].name);
            }
            return false;
        }
        *set |= 1U << d;
        name += length;
        if (!*name) {
            return true;
        }
    }
}

/* Of domain d, 0 outside the set. */
static int weight_in(DomainSet set, int d) {
    return set >> d & 1 ? domains[d].weight : 0;
}

int builtin_document(uint64_t key, uint64_t index, DomainSet set, unsigned char *bytes, double *nats, int *domain) {
    assert(set && !(set & ~builtin_all_domains()));
    Writer w = {.bytes = bytes, .nats = nats, .key = random_bits(key, index)};
    int weights = 0;
    for (int d = 0; d < DOMAINS; d++) {
        weights += weight_in(set, d);
    }
    int ticket = draw(&w, weights);
    int d = 0;
    while (ticket >= weight_in(set, d)) {
        ticket -= weight_in(set, d++);
    }
    w.pending = log((double)weights / domains[d].weight);
    domains[d].write(&w);
    put_text(&w, "\n");
    *domain = d;
    return w.length;
}
