"""Recipes of experiments/sweep: the text file that says what is compared, written before the first run.

One keyword a line; what follows a # at the start of a line or after a blank is a comment. Options of ./train keep the
trainer's own spelling; quotes work as in a shell.

    question    TEXT          what the sweep is to decide
    expect      TEXT          the sign and size that are expected (both may go on in another line of their keyword)
    baseline    ARM           what every other arm is compared with
    seeds       N ...         all arms run with all of them
    rates       X ...         learning rates; each arm is compared at its own best
    rates       SIZE X ...    the same for one size alone, in place of the line without a size
    rate-seeds  N             seeds (the first N) that the rates are tried with; 1 where the line is absent
    budget      tokens        equal for all arms: tokens (the default), or
                flops           training FLOPs: steps are scaled to the baseline's steps x FLOPs, or
                seconds         time on this device: steps are scaled by each arm's measured time of a step
    options     --OPTION ...  of all arms; may repeat
    size        NAME [--OPTION ...]    one or more
    arm         NAME [--OPTION ...]    two or more
    before      NAME --OPTION ...      a run that arms start from, with --init-from {NAME}; trained once for each size
                                       and seed, at the --lr and --steps of its own line
    steps       N             replaces every --steps, to try a recipe at small cost

Options are put together in the order options, size, arm; a later one replaces an earlier one of the same name. --lr,
--seed, --out and --resume are the sweep's own.

    recipe = sweep_recipe.read("experiments/recipes/demo.sweep")     RecipeError: FILE:LINE: what to do
"""
import dataclasses
import math
import os
import re
import shlex
from typing import Dict, List, Optional, Tuple

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*$")
BUDGETS = ("tokens", "flops", "seconds")
OURS = {"--seed": "seeds", "--lr": "rates", "--out": "the sweep's --out", "--resume": "nothing: the sweep resumes runs"}
TEXTS = ("question", "expect")
ONCE = ("baseline", "seeds", "rate-seeds", "budget", "steps")
KEYWORDS = TEXTS + ONCE + ("rates", "options", "size", "arm", "before")

Options = List[Tuple[str, Optional[str]]]


class RecipeError(Exception):
    """One line: FILE:LINE: what is wrong and what to do."""


@dataclasses.dataclass
class Recipe:
    name: str
    text: str
    question: str = ""
    expect: str = ""
    baseline: str = ""
    budget: str = "tokens"
    seeds: List[int] = dataclasses.field(default_factory=list)
    rate_seeds: int = 1
    steps: Optional[int] = None
    options: Options = dataclasses.field(default_factory=list)
    rates: Dict[str, List[float]] = dataclasses.field(default_factory=dict)  # by size; "" is for the others
    sizes: Dict[str, Options] = dataclasses.field(default_factory=dict)
    arms: Dict[str, Options] = dataclasses.field(default_factory=dict)
    befores: Dict[str, Options] = dataclasses.field(default_factory=dict)
    lines: Dict[Tuple[str, str], int] = dataclasses.field(default_factory=dict)  # (keyword, name) -> line number
    path: str = ""

    def rates_of(self, size):
        return self.rates.get(size) or self.rates[""]

    def where(self, keyword, name=""):
        return f"{self.path}:{self.lines.get((keyword, name), 1)}"


def split_options(words):
    """["--a", "1", "--b", "--c=x"] -> [("--a", "1"), ("--b", None), ("--c", "x")]; ValueError says what is odd."""
    options = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            options.append((name, value if equals else None))
        elif options and options[-1][1] is None:
            options[-1] = (options[-1][0], word)
        else:
            raise ValueError(f"'{word}' is not an option: options begin with --")
    return options


def merge_options(*lists):
    """Later ones replace earlier ones of the same name, in their place."""
    merged = {}
    for options in lists:
        merged.update(options)
    return list(merged.items())


def option_words(options):
    return [word for name, value in options for word in ([name] if value is None else [name, value])]


def rate_text(rate):
    return f"{rate:g}"


def numbers(words, convert, what):
    values = []
    for word in words:
        try:
            value = convert(word)
        except ValueError:
            raise ValueError(f"'{word}' is no {what}") from None
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"'{word}' is no {what}")
        if value in values:
            raise ValueError(f"'{word}' stands twice")
        values.append(value)
    if not values:
        raise ValueError(f"give at least one {what}")
    return values


def one_number(rest, least):
    values = numbers(rest.split(), int, "whole number")
    if len(values) > 1 or values[0] < least:
        raise ValueError(f"give one whole number from {least} on")
    return values[0]


def read_options(recipe, keyword, words):
    options = split_options(words)
    seen = set()
    for name, _ in options:
        if name in seen:
            raise ValueError(f"{name} stands twice")
        seen.add(name)
        if name in OURS and not (name == "--lr" and keyword == "before"):
            raise ValueError(f"{name} is the sweep's own: use {OURS[name]}")
    return options


def read_line(recipe, keyword, rest, number):
    """Takes one line into the recipe; ValueError says what is wrong with it."""
    if keyword in ONCE and (keyword, "") in recipe.lines:
        raise ValueError(f"{keyword} stands twice, first in line {recipe.lines[(keyword, '')]}")
    if not rest:
        raise ValueError(f"{keyword} says nothing")
    key = (keyword, "")
    if keyword in TEXTS:
        setattr(recipe, keyword, f"{getattr(recipe, keyword)} {rest}".strip())
    elif keyword == "baseline":
        recipe.baseline = rest
    elif keyword == "budget":
        if rest not in BUDGETS:
            raise ValueError(f"budget '{rest}': choose " + ", ".join(BUDGETS))
        recipe.budget = rest
    elif keyword == "seeds":
        recipe.seeds = numbers(rest.split(), int, "seed")
    elif keyword == "rate-seeds":
        recipe.rate_seeds = one_number(rest, 1)
    elif keyword == "steps":
        recipe.steps = one_number(rest, 1)
    elif keyword == "rates":
        words = rest.split()
        try:
            float(words[0])
            size = ""
        except ValueError:
            size = words.pop(0)
        key = (keyword, size)
        if size in recipe.rates:
            raise ValueError("rates" + (f" of {size}" if size else "") + " stand twice")
        recipe.rates[size] = numbers(words, lambda word: float(f"{float(word):g}"), "learning rate")
    else:
        words = shlex.split(rest)
        if keyword == "options":
            recipe.options = merge_options(recipe.options, read_options(recipe, keyword, words))
        else:
            name, table = words[0], {"size": recipe.sizes, "arm": recipe.arms, "before": recipe.befores}[keyword]
            key = (keyword, name)
            if not NAME.match(name):
                raise ValueError(f"{keyword} '{name}': a name is letters, digits and . _ + -, for it names a folder")
            if name in table:
                raise ValueError(f"{keyword} {name} stands twice, first in line {recipe.lines[key]}")
            table[name] = read_options(recipe, keyword, words[1:])
    recipe.lines.setdefault(key, number)


def check(recipe):
    """What only the whole text shows."""
    def refuse(keyword, name, message):
        raise RecipeError(f"{recipe.where(keyword, name)}: {message}")

    if not recipe.arms:
        refuse("", "", "no arms: add lines such as 'arm topk --router topk'")
    for keyword, what in (("question", "what the sweep is to decide"), ("expect", "the sign you expect"),
                          ("baseline", "the arm that others are compared with"), ("seeds", "such as 1 2 3"),
                          ("rates", "learning rates, such as 2e-3 4e-3 8e-3")):
        if (keyword, "") not in recipe.lines and not (keyword == "rates" and recipe.rates):
            refuse("", "", f"no {keyword}: add a line '{keyword} ...', {what}")
    if not recipe.sizes:
        recipe.sizes["default"] = []
    if recipe.baseline not in recipe.arms:
        refuse("baseline", "", f"baseline {recipe.baseline} is not an arm: choose " + ", ".join(recipe.arms))
    if recipe.rate_seeds > len(recipe.seeds):
        refuse("rate-seeds", "", f"rate-seeds {recipe.rate_seeds}, but there are {len(recipe.seeds)} seeds")
    for size in recipe.rates:
        if size and size not in recipe.sizes:
            refuse("rates", size, f"rates of '{size}', which is not a size: choose " + ", ".join(recipe.sizes))
    for size in recipe.sizes:
        if size not in recipe.rates and "" not in recipe.rates:
            refuse("size", size, f"size {size} has no rates: add 'rates {size} ...' or 'rates ...' for all")
    known = []
    for keyword, table in (("before", recipe.befores), ("arm", recipe.arms)):
        for name, options in table.items():
            for before in befores_named(options):
                if before not in (known if keyword == "before" else recipe.befores):
                    refuse(keyword, name, f"{keyword} {name} starts from {{{before}}}: add a line 'before {before} ...'"
                           + (" above it" if keyword == "before" else ""))
            if keyword == "before":
                known.append(name)
            for size, size_options in recipe.sizes.items():
                merged = dict(merge_options(recipe.options, size_options, options))
                if "--steps" not in merged and recipe.steps is None:
                    refuse(keyword, name, f"{keyword} {name} has no --steps: add --steps N to the options")
                # Probes replace these two, so the trainer does not see them before the first run.
                if "--steps" in merged and not re.match(r"[1-9][0-9]*$", merged["--steps"] or ""):
                    refuse(keyword, name, f"{keyword} {name}: --steps {merged['--steps'] or ''} is no number from 1 on")
                if not re.match(r"[0-9]+$", merged.get("--eval-every", "0") or ""):
                    refuse(keyword, name, f"{keyword} {name}: --eval-every {merged['--eval-every'] or ''} is no number "
                           "from 0 on")


def befores_named(options):
    """Names in {braces}."""
    return [name for _, value in options if value for name in re.findall(r"\{([^{}]*)\}", value)]


def parse(text, path):
    name = os.path.basename(path)
    recipe = Recipe(name=name[:-len(".sweep")] if name.endswith(".sweep") else name, text=text, path=path)
    for number, line in enumerate(text.splitlines(), 1):
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if not line:
            continue
        keyword, _, rest = line.partition(" ") if " " in line else line.partition("\t")
        try:
            if keyword not in KEYWORDS:
                raise ValueError(f"unknown keyword '{keyword}': choose " + ", ".join(KEYWORDS))
            read_line(recipe, keyword, rest.strip(), number)
        except ValueError as error:
            raise RecipeError(f"{path}:{number}: {error}") from None
    check(recipe)
    return recipe


def read(path, steps=None):
    """The recipe in the file; steps: as if its line `steps` said so."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}: name a recipe, such as experiments/recipes/demo.sweep") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not UTF-8 text: name a recipe, such as experiments/recipes/demo.sweep") from None
    if steps is not None:
        text, found = re.subn(r"(?m)^[ \t]*steps[ \t].*", f"steps {steps}", text)
        if not found:
            text += ("" if text.endswith("\n") else "\n") + f"steps {steps}\n"
    return parse(text, path)


def difference(old, new):
    """What a recipe changed beside adding arms, sizes, seeds and rates; None when nothing."""
    for field, what in (("question", "question"), ("expect", "expect"), ("baseline", "baseline"), ("budget", "budget"),
                        ("rate_seeds", "rate-seeds"), ("steps", "steps"), ("options", "options")):
        if getattr(old, field) != getattr(new, field):
            return what
    if new.seeds[:len(old.seeds)] != old.seeds:
        return "seeds"
    for keyword in ("sizes", "arms", "befores"):
        mine, theirs = getattr(new, keyword), getattr(old, keyword)
        for name, options in theirs.items():
            if mine.get(name) != options:
                return f"{keyword[:-1]} {name}"
    for size in old.sizes:
        if not set(old.rates_of(size)) <= set(new.rates_of(size)):
            return f"rates of {size}" if size in new.rates or size in old.rates else "rates"
    return None
