"""The table of a sweep, in Markdown: arms by validation loss, and what stands against believing it.

    experiments/sweep rank FOLDER_OR_JSONL... [--strict] [--baseline ARM] [--sweep NAME] [--size NAME]

Of each arm the runs at its best learning rate (the lowest mean loss over the seeds that all of its rates have): mean
and 95 % interval (Student's t) over seeds; the difference to the baseline, seed by seed, with its bootstrap and
Student's interval; "not resolved" where one of the two holds 0 (intervals.py says how far to trust each). Speed comes
from timings, made alone on the device. A second table has the mean at every rate.

Not ranked, each with its sentence under the table, and exit status 1 with --strict: an arm whose learned router got no
gradient from the main loss in its first step, in any layer; fewer than three seeds; another text or another number of
tokens than the baseline, unless the budget is FLOPs or seconds; an arm that diverged. A run that reads later tokens is
in a table of its own. A speed above what the device can do is not printed. Commits that had changes of their own are
marked, commits and devices that are mixed within a comparison are named.
"""
import argparse
import collections
import math
import re
import statistics
import sys

import intervals
import result_lines

LEAST_SEEDS = 3
DATA = ("data", "val", "tokenizer", "shuffle", "objective", "mask_share", "seq", "vocab")  # what text, cut how
VALIDATION = ("eval_batches", "batch", "eval_drop")  # how much of it the last evaluation reads


class Arm:
    """The runs of an arm in one comparison."""

    def __init__(self, name):
        self.name = name
        self.losses = collections.defaultdict(dict)  # rate -> seed -> loss, infinity for what diverged
        self.records = collections.defaultdict(dict)  # rate -> seed -> record
        self.why = {}  # (rate, seed) -> why it diverged
        self.timing = None
        self.rate = None

    def add(self, record):
        rate, seed = record["rate"], record["seed"]
        finite = record["kind"] == "run" and record.get("val_loss") is not None
        self.losses[rate][seed] = record["val_loss"] if finite else math.inf
        self.records[rate][seed] = record
        if not finite:
            self.why[rate, seed] = record.get("why", "no validation loss")

    def choose_rate(self):
        self.rate = intervals.own_rate(self.losses)

    def runs(self):
        """Finished runs at its rate, by seed."""
        return [self.records[self.rate][s] for s in sorted(self.losses[self.rate])
                if math.isfinite(self.losses[self.rate][s])]

    def seeds(self):
        return {r["seed"]: r["val_loss"] for r in self.runs()}

    def first(self):
        return next(iter(next(iter(self.records.values())).values()))


class Comparison:
    """Arms of one sweep, size and budget."""

    def __init__(self, key):
        self.sweep, self.size, self.budget = key
        self.arms, self.recipe, self.baseline = {}, None, None
        self.foot, self.refusals = [], 0
        self.named = {}  # sentence with a place for names -> names

    def note(self, sentence):
        self.foot.append(sentence)

    def note_of(self, name, sentence):
        """One sentence for all arms of which it is true; {} is where their names go."""
        self.named.setdefault(sentence, []).append(name)

    def sentences(self):
        return self.foot + [text.format(", ".join(names)) for text, names in self.named.items()]

    def refuse(self, sentence):
        self.foot.append(sentence)
        self.refusals += 1


def gather(records):
    """Comparisons in the order of the records."""
    runs, failed, timings = result_lines.sort_out(records)
    recipes = {r.get("sweep"): r for r in records if r.get("kind") == "recipe"}
    comparisons = {}
    for record in list(runs.values()) + list(failed.values()):
        key = result_lines.comparison(record)
        comparison = comparisons.setdefault(key, Comparison(key))
        comparison.arms.setdefault(record["arm"], Arm(record["arm"])).add(record)
        comparison.recipe = recipes.get(key[0])
    for record in timings.values():
        comparison = comparisons.get(result_lines.comparison(record))
        if comparison and record.get("arm") in comparison.arms:
            comparison.arms[record["arm"]].timing = record
    return list(comparisons.values())


# ---- what stands against an arm

def tokens_drawn(run):
    """Tokens that a run trained on, those of the runs it started from included."""
    if not isinstance(run.get("tokens"), int):
        return None
    before = run.get("before_tokens")
    if before is None:  # the same batches, where a line does not say
        config, steps = run.get("config") or {}, run.get("before")
        before = sum(steps.values()) * config.get("batch", 0) * config.get("seq", 0) if isinstance(steps, dict) else 0
    return run["tokens"] + before


def differing(mine, theirs, names):
    return [f"--{name.replace('_', '-')}" for name in names if mine.get(name) != theirs.get(name)]


def objections(comparison, arm, base):
    """Sentences, each of which keeps the arm out of the ranking."""
    found = []
    if arm.rate is None:
        where = ", ".join(f"at {rate:g} with seed {seed}" for rate, seed in sorted(arm.why))
        found.append(f"{arm.name} diverged at every rate that was tried, so that none has a finite mean: {where}.")
        return found
    runs, rate = arm.runs(), arm.rate
    lost = [seed for seed, loss in arm.losses[rate].items() if not math.isfinite(loss)]
    if lost:
        found.append(f"{arm.name} diverged at its rate {rate:g} with seed {', '.join(map(str, sorted(lost)))} "
                     f"({arm.why[rate, lost[0]]}): its mean would leave the worst out.")
    if len(runs) < LEAST_SEEDS:
        found.append(f"{arm.name} has {len(runs)} seed{'s' * (len(runs) != 1)} at rate {rate:g}: below "
                     f"{LEAST_SEEDS} there is no interval to rank by.")
    for run in runs:
        main = (run.get("router_gradient") or {}).get("main")
        if run.get("learned") and main and any(x == 0 for x in main):
            layers = [str(i) for i, x in enumerate(main) if x == 0]
            found.append(f"{arm.name}, seed {run['seed']}: the router of layer {', '.join(layers)} got no gradient "
                         "from the main loss in the first step; a router that does not learn is no learned router.")
            break
    if base is not arm and base.rate is not None and base.runs() and runs:
        mine, theirs = runs[0].get("config") or {}, base.runs()[0].get("config") or {}
        options = differing(mine, theirs, DATA)
        if options:
            found.append(f"{arm.name} has another {', '.join(options)} than {base.name}: losses on different text are "
                         "not compared.")
        elif differing(mine, theirs, VALIDATION):
            found.append(f"{arm.name} is validated with another {', '.join(differing(mine, theirs, VALIDATION))} than "
                         f"{base.name}: losses on different text are not compared.")
        tokens = {run.get("tokens") for run in runs}, {run.get("tokens") for run in base.runs()}
        whole = set(map(tokens_drawn, runs)), set(map(tokens_drawn, base.runs()))
        unequal = all(a != b or len(a) > 1 for a, b in (tokens, whole))
        if comparison.budget in (None, "tokens") and unequal:
            found.append(f"{arm.name} drew {say_set(tokens[0])} tokens and {base.name} {say_set(tokens[1])}: equal "
                         "tokens are what the budget promises.")
    return found


def say_set(values):
    return " or ".join(str(v) for v in sorted(values, key=str))


def speed(comparison, arm):
    """(ms, tok/s) of its timing; None, None where there is none, or none to be believed."""
    timing = arm.timing
    if not timing or not timing.get("ms"):
        return None, None
    rate = timing.get("tok_s") or (timing.get("tokens_per_step") or 0) / timing["ms"] * 1e3
    flops, peak = rate * (timing.get("flops_per_token") or 0), timing.get("peak_flops")
    if peak and flops > peak:
        comparison.refuse(f"The speed of {arm.name} is not printed: {flops / 1e12:.4g} TFLOP/s is above the "
                          f"{peak / 1e12:.4g} of the device ({timing.get('peak_from')}).")
        return None, None
    if timing.get("weights") != "trained":
        comparison.note_of(arm.name, "Timed with fresh weights, whose load of experts is not that of trained ones: {}.")
    on_cpu = re.search(r"\d+ threads?, ", str(timing.get("device")))
    if on_cpu and (timing.get("others_busy") or 0) > 0.5:
        comparison.note_of(f"{arm.name} ({timing['others_busy']:.1f})",
                           "Speed was measured while other processes kept cores busy (how many): {}.")
    return timing["ms"], rate or None


def check_provenance(comparison, arms):
    """Names commits, devices and starts that are mixed, and commits that had changes of their own."""
    records = [run for arm in arms if arm.rate is not None for run in arm.runs()]
    timings = [arm.timing for arm in arms if arm.timing]
    for lines, name, what, unit in ((records, "commit", "commits", "runs"), (records, "device", "devices", "runs"),
                                    (timings, "device", "devices of speeds", "timings")):
        found = collections.Counter(str(line.get(name)) for line in lines)
        if len(found) > 1:
            comparison.note(f"Mixed {what}: " + ", ".join(f"{v} ({n} {unit})" for v, n in found.most_common()) + ".")
    dirty = sorted({r["commit"] for r in records if str(r.get("commit")).endswith("-dirty")})
    if dirty:
        comparison.note(f"Made by a program that no commit describes: {', '.join(dirty)}.")
    for arm in arms:
        starts = arm.runs()[0].get("before") if arm.rate is not None and arm.runs() else None
        for start, steps in starts.items() if isinstance(starts, dict) else ():
            comparison.note_of(arm.name, f"Started from the weights of {start}, whose {steps} steps are in no column: "
                               "{}.")


def check_validation(comparison, arms):
    """Says how much text the losses are of, and whose loss depends on what else is in a batch."""
    counts = set()
    for arm in arms:
        for run in arm.runs()[:1] if arm.rate is not None else []:
            config = run.get("config") or {}
            if all(config.get(name) for name in ("eval_batches", "batch", "seq")):
                counts.add(config["eval_batches"] * config["batch"] * config["seq"])
            if run.get("sees_batch"):
                comparison.note_of(arm.name, "Looking at other sequences of a batch, so that the loss holds for such "
                                   "batches: {}.")
    if counts:
        comparison.note(f"Validation losses are means over {say_set(counts)} tokens.")


def check_rates(comparison, arm):
    rates = sorted(arm.losses)
    if len(rates) > 1 and arm.rate in (rates[0], rates[-1]):
        which = "lowest" if arm.rate == rates[0] else "highest"
        comparison.note_of(arm.name, f"Best at the {which} rate that was tried, so a better one may lie beyond: "
                           "{}.")


def check_seeds(comparison, arms):
    expected = (comparison.recipe or {}).get("seeds") or sorted({s for a in arms for s in a.losses.get(a.rate, {})})
    for arm in arms:
        missing = [seed for seed in expected if arm.rate is not None and seed not in arm.losses[arm.rate]]
        if missing:
            comparison.note(f"{arm.name} has no run of seed {', '.join(map(str, missing))} at its rate.")
    missing = [name for name in (comparison.recipe or {}).get("arms", []) if name not in comparison.arms]
    if missing:
        comparison.note(f"No run yet of {', '.join(missing)}.")


# ---- tables

def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def number(value, digits=3):
    return "–" if value is None else f"{value:.{digits}f}"


def significant(value):
    return "–" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def mean_of(runs, name):
    values = [run[name] for run in runs if run.get(name) is not None]
    return statistics.fmean(values) if values else None


def plus_minus(values, digits=3):
    mean, low, _ = intervals.mean_interval(values)
    return f"{mean:.{digits}f}" + (f" ± {mean - low:.{digits}f}" if low is not None else "")


def span(interval):
    return "–" if interval[0] is None else f"{interval[0]:+.3f} to {interval[1]:+.3f}"


def difference(comparison, arm, base):
    """The paired difference to the baseline, None where there is none to give. base: None where it has no rank."""
    if base is None or arm is base:
        return None
    mine, theirs = arm.seeds(), base.seeds()
    shared = sorted(set(mine) & set(theirs))
    if len(shared) < LEAST_SEEDS:
        return None
    return intervals.paired([mine[s] for s in shared], [theirs[s] for s in shared])


def verdict(paired):
    if paired is None:
        return "–"
    if not paired.resolved:
        return "not resolved"
    return "better" if paired.mean < 0 else "worse"


HEADER = ["arm", "rate", "seeds", "validation loss", "difference", "bootstrap", "Student's t", "verdict", "M total",
          "M active", "MFLOP/token", "steps", "ms/step", "tok/s", "load CV", "drop"]


def row(comparison, arm, base):
    runs = arm.runs()
    paired = difference(comparison, arm, base)
    ms, tok_s = speed(comparison, arm)
    mark = "†" if any(str(r.get("commit")).endswith("-dirty") for r in runs) else ""
    first = runs[0]
    return [arm.name + mark, f"{arm.rate:g}", str(len(runs)), plus_minus([r["val_loss"] for r in runs]),
            "–" if paired is None else f"{paired.mean:+.3f}", "–" if paired is None else span(paired.bootstrap),
            "–" if paired is None else span(paired.t), "baseline" if arm is base else verdict(paired),
            number((first.get("params_total") or 0) / 1e6, 2), number((first.get("params_active") or 0) / 1e6, 2),
            number((first.get("flops_per_token") or 0) / 1e6, 2), say_set({r.get("steps") for r in runs}),
            significant(ms), "–" if tok_s is None else f"{tok_s:.0f}", number(mean_of(runs, "load_cv"), 2),
            number(mean_of(runs, "drop"), 3)]


def choose_baseline(comparison, wanted):
    asked = (comparison.recipe or {}).get("baseline")
    for name in [wanted] if wanted else [asked, "topk"]:
        if name in comparison.arms:
            break
    else:
        if wanted:
            raise result_lines.ResultError(f"--baseline {wanted} has no run in {comparison.sweep}, {comparison.size}: "
                                           "choose " + ", ".join(comparison.arms))
        name = next(iter(comparison.arms))
    if asked and name != asked and not wanted:
        comparison.note(f"The recipe's baseline {asked} has no run: differences are to {name}.")
    return comparison.arms[name]


def rank_order(arm):
    return statistics.fmean(arm.seeds().values())


def rate_table(arms):
    rates = sorted({rate for arm in arms for rate in arm.losses})
    rows = []
    for arm in arms:
        cells = [arm.name]
        for rate in rates:
            losses = list(arm.losses.get(rate, {}).values())
            text = "–" if not losses else "diverged" if math.inf in losses else f"{statistics.fmean(losses):.3f}"
            count = f" ({len(losses)})" if losses else ""
            cells.append(f"**{text}**{count}" if rate == arm.rate else text + count)
        rows.append(cells)
    return table(["arm"] + [f"{rate:g}" for rate in rates], rows)


def write(comparison, wanted_baseline):
    """The Markdown of a comparison, as lines."""
    arms = list(comparison.arms.values())
    for arm in arms:
        arm.choose_rate()
    base = comparison.baseline = choose_baseline(comparison, wanted_baseline)
    ranked, leaking, kept_out = [], [], []
    for arm in arms:
        against = objections(comparison, arm, base)
        if arm.rate is not None and arm.runs() and any(run.get("leaky") for run in arm.runs()):
            comparison.refuse(f"{arm.name} reads later tokens: its loss is none of a language model, and it is in "
                              "a table of its own.")
            leaking.append(arm)
        elif against:
            kept_out.append(arm)
        else:
            ranked.append(arm)
            check_rates(comparison, arm)
        for sentence in against:
            comparison.refuse("Not ranked: " + sentence)
    lines = [f"### {comparison.sweep}, {comparison.size}: equal {comparison.budget}", ""]
    if comparison.recipe:
        lines += [f"Question: {comparison.recipe.get('question')}", ""]
        lines += [f"Expected: {comparison.recipe.get('expect')}", ""]
    lines += rank_tables(comparison, ranked, leaking, base)
    check_seeds(comparison, arms)
    check_validation(comparison, arms)
    check_provenance(comparison, arms)
    if kept_out:
        lines.append("Without a rank: " + ", ".join(
            f"{arm.name} ({plus_minus([r['val_loss'] for r in arm.runs()])})" if arm.rate is not None and arm.runs()
            else arm.name for arm in kept_out) + ".\n")
    if comparison.sentences():
        lines += [f"- {sentence}" for sentence in comparison.sentences()] + [""]
    if len({rate for arm in arms for rate in arm.losses}) > 1:
        lines += ["Mean validation loss at every rate (seeds), the arm's own in bold:", ""] + rate_table(arms) + [""]
    return lines


def rank_tables(comparison, ranked, leaking, base):
    lines = []
    if base not in ranked and ranked:
        comparison.note(f"The baseline {base.name} has no rank, so there are no differences.")
    reference = base if base in ranked else None
    if ranked:
        lines += table(HEADER, [row(comparison, arm, reference) for arm in sorted(ranked, key=rank_order)]) + [""]
    if reference:
        losses = list(base.seeds().values())
        lines.append(f"Losses are nats per token, ± 95 % over seeds. From seed to seed {base.name} spreads by "
                     f"{statistics.stdev(losses):.3f} (standard deviation), {max(losses) - min(losses):.3f} from the "
                     "lowest to the highest.\n")
    correct_for_many(comparison, [arm for arm in ranked if arm is not base], reference)
    if leaking:
        lines += ["Runs that read later tokens, with no language-model loss:", ""]
        lines += table(HEADER, [row(comparison, arm, None) for arm in sorted(leaking, key=rank_order)]) + [""]
    return lines


def correct_for_many(comparison, arms, base):
    """Names differences that are resolved one by one, but not when all are asked for at once."""
    tests = {arm.name: difference(comparison, arm, base) for arm in arms}
    tests = {name: test for name, test in tests.items() if test}
    corrected = dict(zip(tests, intervals.holm([test.p for test in tests.values()])))
    weak = [name for name, test in tests.items() if test.resolved and corrected[name] > 0.05]
    if weak:
        comparison.note(f"Of {len(tests)} comparisons at once, these do not hold at 5 % (Holm): {', '.join(weak)}.")


def main(arguments):
    parser = argparse.ArgumentParser(prog="sweep rank", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", metavar="FOLDER_OR_JSONL")
    parser.add_argument("--strict", action="store_true", help="exit status 1 where anything is not ranked")
    parser.add_argument("--baseline", metavar="ARM", help="in place of the recipe's")
    parser.add_argument("--sweep", metavar="NAME", help="only this sweep")
    parser.add_argument("--size", metavar="NAME", help="only this size")
    options = parser.parse_args(arguments)
    try:
        records = [record for name in options.results for record in result_lines.read(result_lines.find(name))]
        comparisons = [c for c in gather(records) if options.sweep in (None, c.sweep)
                       and options.size in (None, c.size)]
        if not comparisons:
            raise result_lines.ResultError("no finished run there: run experiments/sweep first")
        lines = [line for c in comparisons for line in write(c, options.baseline)]
    except result_lines.ResultError as error:
        print(f"rank: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines).rstrip())
    return 1 if options.strict and any(c.refusals for c in comparisons) else 0
