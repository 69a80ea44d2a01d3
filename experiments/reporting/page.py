"""The page: question and verdict, warnings, provenance, then each comparison with its figures."""
import collections
import os

from . import plot
from .arms import FEWEST_SEEDS, verdict
from .figure import Figure
from .lines import mapping, number
from .markup import MISSING, Markup, count, el, listing, short


def section_of(comparison, figures):
    front = comparison.front()
    said = verdict(comparison)
    if len(front) > 1:
        said.append(f"On the front of loss and speed, from the lowest loss to the fastest: "
                    f"{listing([arm.name for arm in front], 12)}.")
    return el("section", el("h2", comparison.title), recipe_words(comparison.recipe),
              el("div", el("h3", "What the data say"), el("ul", [el("li", sentence) for sentence in said]),
                 cls="verdict"),
              warning_box(comparison_warnings(comparison)),
              [figure.html() for figure in figures], id=comparison.slug)


def recipe_words(recipe):
    if recipe is None:
        return None
    return [el("p", el("b", title + " "), recipe.get(keyword), cls="asked") for title, keyword in
            (("Question.", "question"), ("Expected, before the runs.", "expect")) if recipe.get(keyword)]


def warning_box(warnings, title="Read with care"):
    if not warnings:
        return None
    grave = any(alarm for alarm, _ in warnings)
    graver_first = sorted(warnings, key=lambda warning: not warning[0])
    return el("div", el("h3", title), el("ul", [el("li", sentence) for _, sentence in graver_first]),
              cls="alarm" if grave else "caution")


# ---- warnings


def comparison_warnings(comparison):
    """[(grave, sentence)]"""
    found, arms = [], comparison.arms
    lost = [f"{arm.name} (rate {short(arm.rate)}, seed {', '.join(map(str, arm.lost))})" for arm in arms if arm.lost]
    if lost:
        found.append((True, f"Diverged at the arm's own rate: {listing(lost)}. The mean of the other seeds would leave "
                            "the worst out, so the arm is not ranked."))
    unlearned = [arm.name for arm in arms if arm.unlearned]
    if unlearned:
        found.append((True, f"The router of {listing(unlearned)} gets no gradient from the loss: it stays what chance "
                            "made it. Such a run says nothing about the router it is named after and is not ranked."))
    leaky = [arm.name for arm in arms if arm.leaky]
    if leaky:
        found.append((True, f"{listing(leaky)}: the router reads later tokens, so the loss is not a language model's. "
                            "Shown apart, never ranked."))
    implausible = [arm.name for arm in arms if arm.implausible]
    if implausible:
        found.append((True, f"{listing(implausible)}: more FLOP/s than the device can do, so the timing is wrong. "
                            "No speed is shown."))
    batch = [arm.name for arm in arms if arm.sees_batch and not arm.leaky]
    if batch:
        found.append((False, f"{listing(batch)}: the loss depends on the other texts of the batch."))
    few = [f"{arm.name} ({len(arm.best)})" for arm in arms if 0 < len(arm.best) < FEWEST_SEEDS]
    if few:
        found.append((False, f"Fewer than {FEWEST_SEEDS} seeds, so no interval: {listing(few)}."))
    unfinished = [run_name(run) for run in comparison.lines() if number(run.get(comparison.loss)) is None]
    if unfinished:
        found.append((False, f"Without a finite final validation loss, left out: {listing(unfinished)}."))
    failed = [run_name(line) + (f": {line['why']}" if line.get("why") else "") for arm in arms for line in arm.failed]
    if failed:
        found.append((False, f"Failed, never dropped silently: {'; '.join(failed[:20])}."))
    without = [arm.name for arm in arms if not arm.best and not arm.failed and not arm.runs]
    if without:
        found.append((False, f"Timed, but without a run: {listing(without)}."))
    found += [(False, sentence) for sentence in unequal(comparison)]
    return found


def run_name(line):
    rate = number(line.get("rate"))
    return f"{line['arm']} (rate {short(rate)}, seed {line.get('seed')})"


def unequal(comparison):
    """What differs between runs that are compared."""
    best = [run for arm in comparison.arms for run in arm.best.values()]
    timings = [line for arm in comparison.arms for line in arm.timings]
    found = []
    if any(line.get("from_log") for line in timings):
        found.append("Speeds are those that the runs themselves logged: what else the machine was doing, the logs do "
                     "not know. experiments/sweep times each arm alone.")
    devices = sorted({str(line["device"]) for line in timings if line.get("device")})
    if len(devices) > 1:
        found.append(f"Speeds were taken on {len(devices)} different devices ({listing(devices)}): they cannot be "
                     "compared.")
    devices = sorted({str(run["device"]) for run in best if run.get("device")})
    if len(devices) > 1:
        found.append(f"Losses come from {len(devices)} different devices: {listing(devices)}.")
    commits = sorted({str(run["commit"]) for run in best + timings if run.get("commit")})
    if len(commits) > 1:
        found.append(f"The lines come from {len(commits)} commits: {listing(commits)}.")
    dirty = [commit for commit in commits if commit.endswith("-dirty")]
    if dirty:
        found.append(f"{listing(dirty)}: made from files that no commit holds, so nobody can make them again.")
    tokens = sorted({number(run.get("tokens")) for run in best} - {None})
    if len(tokens) > 1 and tokens[-1] > 1.001 * tokens[0] and comparison.budget not in ("flops", "seconds"):
        found.append(f"The arms were not trained on equally many tokens ({short(tokens[0])} to {short(tokens[-1])}).")
    seeds = {tuple(sorted(map(str, arm.best))) for arm in comparison.arms if arm.enough_seeds}
    if len(seeds) > 1:
        found.append("Not all arms have the same seeds: means of losses differ by that too; paired differences do not.")
    for option, words in (("batch", "batch sizes"), ("seq", "sequence lengths"), ("tokenizer", "tokenizers"),
                          ("eval_batches", "sizes of the validation text")):
        values = {str(mapping(run.get("config")).get(option)) for run in best if run.get("config")}
        if len(values) > 1:
            found.append(f"The arms have different {words}: {listing(sorted(values))}.")
    floors = [f for f in (number(run.get("val_floor")) for run in best) if f is not None]
    if floors and comparison.floor is None and comparison.loss == "val_loss":
        found.append("The floor of the loss differs between runs (they were evaluated on different texts), so it is "
                     "not drawn; what an arm is above it is taken run by run.")
    return found


# ---- provenance


def provenance(inputs):
    lines = inputs.runs + inputs.timings + inputs.failed + inputs.benches + inputs.inferences + \
        inputs.scalings

    def tally(key):
        found = collections.Counter(str(line[key]) for line in lines if line.get(key))
        return "; ".join(f"{value} ({n})" for value, n in found.most_common(8)) or MISSING

    commits = collections.Counter(str(line["commit"]) for line in lines if line.get("commit"))
    commit_words = [el("span", commit + (" \u2013 not committed" if commit.endswith("-dirty") else ""), f" ({n}) ",
                       cls="bad" if commit.endswith("-dirty") else None) for commit, n in commits.most_common(8)]
    versions = collections.Counter(f"{name} {value}" for line in lines for name, value in
                                   mapping(line.get("versions")).items())
    times = sorted(str(line["ts"]) for line in lines if line.get("ts"))
    failed = [run_name(line) for line in inputs.failed]
    rows = [["read from", listing([os.path.relpath(p) if not p.startswith("/") else p for p in inputs.sources], 6)],
            ["lines", ", ".join(counts(inputs))],
            ["failed runs", listing(failed, 12) or "none"],
            ["commits (lines)", commit_words or MISSING],
            ["devices (lines)", tally("device")],
            ["drivers (lines)", tally("driver")],
            ["versions", ", ".join(name for name, _ in versions.most_common(12)) or MISSING],
            ["made", f"{times[0]} to {times[-1]}" if times else MISSING]]
    return el("section", el("h2", "Provenance"), el("div", el("table", el("tbody", [
        el("tr", [el("td", cell) for cell in row]) for row in rows]), cls="words"), cls="wide-table"), id="provenance")


# ---- the whole


def css():
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "page.css"), encoding="utf-8") as text:
        look = text.read()
    return look.replace("/*LIGHT*/", plot.variables(plot.LIGHT)).replace("/*DARK*/", plot.variables(plot.DARK)) \
        + plot.CSS


def whole(title, inputs, sections, others):
    """sections: [(comparison, figures)]; others: figures of microbenchmarks, generation and scaling tests."""
    links = [(comparison.slug, comparison.title) for comparison, _ in sections]
    links += [("machine", "Machine")] * bool(others) + [("provenance", "Provenance")]
    problems = [(False, problem) for problem in inputs.problems]
    if len(problems) > 12:
        problems = problems[:11] + [(False, f"{len(problems) - 11} more of this kind.")]
    body = el("main", el("h1", title),
              el("p", summary(inputs, sections), cls="soft"),
              warning_box(problems, "Lines that could not be used"),
              el("nav", el("ul", [el("li", el("a", words, href="#" + name)) for name, words in links]),
                 aria_label="sections") if len(links) > 2 else None,
              [section_of(comparison, figures) for comparison, figures in sections],
              el("section", el("h2", "Machine"), [figure.html() for figure in others],
                 id="machine") if others else None,
              provenance(inputs))
    head = el("head", el("meta", charset="utf-8"),
              el("meta", name="viewport", content="width=device-width, initial-scale=1"),
              el("title", title), el("style", Markup(css())))
    return "<!DOCTYPE html>\n" + el("html", head, el("body", body), lang="en") + "\n"


def counts(inputs):
    return [count(len(what), *nouns) for what, *nouns in (
        (inputs.runs, "run"), (inputs.timings, "timing"), (inputs.failed, "failure"),
        (inputs.benches, "microbenchmark"),
        (inputs.inferences, "measurement of generation", "measurements of generation"),
        (inputs.scalings, "scaling test")) if what]


def summary(inputs, sections):
    if not sections:
        return ", ".join(counts(inputs)) + "."
    arms = sum(len(comparison.arms) for comparison, _ in sections)
    parts = [count(len(inputs.runs), "run")] + [count(arms, "arm")] * bool(arms)
    if len(sections) > 1:
        parts.append(count(len(sections), "comparison"))
    return ", ".join(parts) + ". Quality is the loss of whole runs, speed that of timings alone on a device."


def figures_of(sections, others):
    return [figure for _, figures in sections for figure in figures if isinstance(figure, Figure)] + \
        [figure for figure in others if isinstance(figure, Figure)]
