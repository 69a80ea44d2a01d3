"""From lines to comparisons: which runs are an arm's, at which learning rate, and how arms differ.

    for comparison in comparisons(inputs):
        comparison.arms, comparison.baseline, comparison.difference(arm)

A comparison holds the runs of one sweep, size, objective, data set and budget: only those losses can be compared. An
arm stands at one learning rate, the one that `experiments/sweep rank` takes (intervals.own_rate). A run that failed or
ended without a finite loss counts as infinitely bad there, and an arm with such a run at its own rate is not ranked:
the mean of the others would leave the worst out. Arms are compared seed by seed (same data, same initial weights): a
difference is resolved when neither Student's interval nor the bootstrap's holds 0.
"""
import math
import re
import statistics

import intervals
import peaks

from . import plot
from .lines import NOT_AN_ARM, mapping, number
from .markup import count, listing

FEWEST_SEEDS = 3


class Arm:
    def __init__(self, name):
        self.name = name
        self.runs, self.timings, self.failed = [], [], []
        self.rate = None      # the best one
        self.best = {}        # seed -> run at that rate, all with a finite loss
        self.lost = []        # seeds that diverged at that rate
        self.style = None     # index of its colour, dash and mark; None: grey

    def first(self, key):
        """The first value there is: of the runs at the best rate, of any run, of the timings."""
        for line in list(self.best.values()) + self.runs + self.timings:
            if line.get(key) is not None:
                return line[key]
        return None

    def config(self, key):
        return mapping(self.first("config")).get(key)

    def mean(self, key):
        values = [number(run.get(key)) for run in self.best.values()]
        values = [v for v in values if v is not None]
        return statistics.fmean(values) if values else None

    @property
    def leaky(self):
        return any(line.get("leaky") is True for line in self.runs + self.timings)

    @property
    def sees_batch(self):
        return any(line.get("sees_batch") is True for line in self.runs)

    @property
    def dense(self):
        return self.config("router") == "dense"

    @property
    def unlearned(self):
        """Its router should learn, yet the loss sends it no gradient, in a layer or at all."""
        for run in self.best.values():
            gradient = mapping(run.get("router_gradient")).get("main")
            if run.get("learned") is True and (
                    number(run.get("router_main_norm")) == 0 or
                    isinstance(gradient, list) and any(number(g) == 0 for g in gradient)):
                return True
        return False

    def times(self):
        """Milliseconds of a step, one of each timing."""
        return [line["ms"] for line in self.timings if (number(line.get("ms")) or 0) > 0]

    def speeds(self):
        """Tokens per second, one of each timing."""
        found = []
        for line in self.timings:
            ms, per_step, own = number(line.get("ms")), number(line.get("tokens_per_step")), number(line.get("tok_s"))
            if own and own > 0:
                found.append(own)
            elif ms and per_step and ms > 0 and per_step > 0:
                found.append(1000 * per_step / ms)
        return found

    def speed(self):
        """(mean, half) of tokens per second; half is None for one timing. None: no speed that may be shown."""
        return mean_and_half(self.speeds()) if self.speeds() and not self.implausible else None

    def flop_rate(self):
        """FLOP/s that the timing claims, or None."""
        flops = number(self.first("flops_per_token"))
        return statistics.fmean(self.speeds()) * flops if flops and self.speeds() else None

    def timing_device(self):
        return next((line["device"] for line in self.timings if line.get("device")), None)

    @property
    def implausible(self):
        """Its timing claims more arithmetic than the device can do."""
        most = peaks.flops_of(self.timing_device(), self.timings)
        return most is not None and (self.flop_rate() or 0) > most

    @property
    def enough_seeds(self):
        return len(self.best) >= FEWEST_SEEDS

    @property
    def ranked(self):
        return bool(self.best) and not self.leaky and not self.unlearned and not self.lost


def mean_and_half(values):
    """The mean and half of its 95 % interval; None for the half of a single value."""
    mean, _, high = intervals.mean_interval(values)
    return mean, None if high is None else high - mean


def finite_loss(run, key):
    loss = number(run.get(key))
    return loss if loss is not None and loss >= 0 else None


def choose_rate(arm, key):
    """Sets arm.rate, arm.best and arm.lost; none of them where no run has a loss. Where every rate lost a seed it is
    shown at the one that lost fewest."""
    losses, runs = {}, {}
    for run in arm.runs:
        rate, loss = number(run.get("rate")), finite_loss(run, key)
        if loss is not None:
            runs.setdefault(rate, {})[run.get("seed")] = run
        elif run.get("val_loss") is None and not run.get("why"):
            continue  # not finished
        losses.setdefault(rate, {})[run.get("seed")] = math.inf if loss is None else loss
    for line in arm.failed:
        rate = number(line.get("rate"))
        if rate is not None:
            losses.setdefault(rate, {})[line.get("seed")] = math.inf
    arm.rate = intervals.own_rate(losses)
    if arm.rate is None:
        arm.rate = max((rate for rate in runs if len(runs[rate]) < len(losses[rate])), default=None,
                       key=lambda rate: len(runs[rate]) - len(losses[rate]))
    if runs.get(arm.rate):
        in_order = sorted(losses[arm.rate], key=lambda seed: str(seed).zfill(12))
        arm.best = {seed: runs[arm.rate][seed] for seed in in_order if math.isfinite(losses[arm.rate][seed])}
        arm.lost = [seed for seed in in_order if seed not in arm.best]


def current(timings):
    """Those of the configuration and device of the last one: an arm that was timed anew has the new speed alone."""
    def kind(line):
        config = mapping(line.get("config"))
        return line.get("device"), {k: v for k, v in config.items() if k not in NOT_AN_ARM and k != "init_from"}

    return [line for line in timings if kind(line) == kind(timings[-1])]


class Difference:
    """An arm's loss minus another's, over the seeds that both have (intervals.paired)."""

    def __init__(self, values, baseline):
        self.values, self.n = [a - b for a, b in zip(values, baseline)], len(values)
        self.mean = statistics.fmean(self.values)
        self.t = self.bootstrap = None   # (low, high); no interval of fewer than FEWEST_SEEDS
        self.resolved = False
        if self.n >= FEWEST_SEEDS:
            pairs = intervals.paired(values, baseline)
            self.t, self.bootstrap, self.resolved = pairs.t, pairs.bootstrap, pairs.resolved

    @property
    def ends(self):
        """Of the wider of the two intervals, end by end."""
        return min(self.t[0], self.bootstrap[0]), max(self.t[1], self.bootstrap[1])


class Comparison:
    def __init__(self, key, recipe):
        self.sweep, self.size, self.objective, self.data, self.budget = key
        self.recipe = recipe
        self.arms, self.by_name = [], {}
        self.baseline = None
        self.loss, self.unit, self.floor = "val_loss", "nats per token", None
        self.title, self.slug = "", ""
        self.differences = {}   # (arm, other) -> Difference: bootstraps take time

    def arm(self, name):
        if name not in self.by_name:
            self.by_name[name] = Arm(name)
            self.arms.append(self.by_name[name])
        return self.by_name[name]

    def losses(self, arm):
        return [run[self.loss] for run in arm.best.values()]

    def mean_loss(self, arm):
        return statistics.fmean(self.losses(arm)) if arm.best else math.inf

    def loss_interval(self, arm):
        """(mean, half); half is None for fewer than FEWEST_SEEDS runs."""
        values = self.losses(arm)
        return mean_and_half(values) if len(values) >= FEWEST_SEEDS else (statistics.fmean(values), None)

    def above_floor(self, arm):
        """Mean over the seeds of what each run's loss is above its own floor; None where a run has none."""
        floors = [number(run.get("val_floor")) for run in arm.best.values()]
        if self.loss != "val_loss" or not floors or None in floors:
            return None
        return statistics.fmean(loss - floor for loss, floor in zip(self.losses(arm), floors))

    def difference(self, arm):
        """Of the arm to the baseline; None for the baseline itself and where no seed is shared."""
        if self.baseline is None or arm is self.baseline:
            return None
        return self.between(arm, self.baseline)

    def between(self, arm, other):
        if (arm, other) not in self.differences:
            seeds = [seed for seed in arm.best if seed in other.best]
            losses = [[one.best[s][self.loss] for s in seeds] for one in (arm, other)]
            self.differences[arm, other] = Difference(*losses) if seeds else None
        return self.differences[arm, other]

    def ranked(self):
        """Arms that may be ranked, best first."""
        return sorted((arm for arm in self.arms if arm.ranked), key=self.mean_loss)

    def front(self):
        """Ranked arms of enough seeds with a speed that no other beats in both, from the lowest loss on."""
        arms = [arm for arm in self.arms if arm.ranked and arm.enough_seeds and arm.speed()]
        kept = intervals.pareto([(self.mean_loss(arm), 1 / arm.speed()[0]) for arm in arms])
        return sorted((arms[i] for i in kept), key=lambda arm: arm.speed()[0])

    def scale(self, run):
        """From nats to the unit of this comparison's losses."""
        nats, own = number(run.get("val_loss")), number(run.get(self.loss))
        return own / nats if self.loss != "val_loss" and nats and own else 1.0

    def lines(self):
        return [run for arm in self.arms for run in arm.runs]

    def finish(self, baseline):
        tokenizers = {mapping(run.get("config")).get("tokenizer") for run in self.lines()} - {None}
        if len(tokenizers) > 1 and all(number(run.get("val_bpb")) is not None for run in self.lines()
                                       if number(run.get("val_loss")) is not None):
            self.loss, self.unit = "val_bpb", "bits per byte"
        elif self.objective == "mlm":
            self.unit = "nats per masked token"
        for arm in self.arms:
            choose_rate(arm, self.loss)
            arm.timings = current(arm.timings)
        floors = [number(run.get("val_floor")) for arm in self.arms for run in arm.best.values()]
        if self.loss == "val_loss" and floors and None not in floors and max(floors) - min(floors) < 0.03 * min(floors):
            self.floor = statistics.fmean(floors)
        wanted = [baseline, self.recipe.get("baseline") if self.recipe else None, "topk"]
        wanted += [arm.name for arm in self.ranked()]
        self.baseline = next((self.by_name[name] for name in wanted if name in self.by_name), None)
        if self.recipe:
            order = {name: i for i, name in enumerate(self.recipe.arms())}
            self.arms.sort(key=lambda arm: order.get(arm.name, len(order)))
        self.give_styles()

    def give_styles(self):
        """Style 0 is the baseline's; the few others go to the dense control, the front, the best and the worst."""
        ranked = self.ranked()
        order = [self.baseline] if self.baseline else []
        dense = [arm for arm in ranked if arm.dense][:1]
        for arm in dense + self.front()[:5] + ranked[:3] + ranked[-1:] + ranked + [a for a in self.arms if a.best]:
            if arm not in order:
                order.append(arm)
        for i, arm in enumerate(order[:plot.STYLES]):
            arm.style = i


def comparisons(inputs, baseline=None):
    found = {}

    def comparison_of(line):
        config = mapping(line.get("config"))
        key = tuple(None if part is None else str(part) for part in
                    (line.get("sweep"), line.get("size"), config.get("objective"), config.get("data"),
                     line.get("budget")))
        if line.get("kind") != "run":   # timings and failures may say less than runs
            for other in found:
                if all(a is None or a == b for a, b in zip(key, other)):
                    return found[other]
            for other in found:
                if key[:2] == other[:2]:
                    return found[other]
        return found.setdefault(key, Comparison(key, inputs.recipes.get(line.get("sweep"))))

    for run in inputs.runs:
        arm, key = comparison_of(run).arm(run["arm"]), (number(run.get("rate")), run.get("seed"))
        same = [i for i, other in enumerate(arm.runs) if (number(other.get("rate")), other.get("seed")) == key]
        if same:
            inputs.problems.append(f"{arm.name}, rate {key[0]}, seed {key[1]}: more than one line; the last counts")
            arm.runs[same[0]] = run
        else:
            arm.runs.append(run)
    for line in inputs.failed:
        comparison_of(line).arm(line["arm"]).failed.append(line)
    for line in inputs.timings:
        comparison_of(line).arm(line["arm"]).timings.append(line)
    result = list(found.values())
    for number_, comparison in enumerate(result, 1):
        comparison.finish(baseline)
        comparison.title = title_of(comparison, result)
        comparison.slug = f"{number_}_" + (re.sub("[^a-z0-9]+", "_", comparison.title.lower()).strip("_") or "runs")
    return result


def title_of(comparison, all_of_them):
    parts = []
    for name in ("sweep", "size", "objective", "data", "budget"):
        value = getattr(comparison, name)
        if value and (name in ("sweep", "size") or len({getattr(c, name) for c in all_of_them}) > 1):
            parts.append({"budget": f"equal {value}", "data": value.rstrip("/").split("/")[-1]}.get(name, value))
    return ", ".join(parts) or "Runs"


# ---- what may be said


def expected_signs(comparison):
    """Sentences on the clauses `a < b` of the recipe's expectation, where both are arms."""
    said = []
    for clause in re.split("[;,.] ", comparison.recipe.get("expect") or "") if comparison.recipe else []:
        names = [part.split() for part in re.split("[<>]", clause)]
        signs = re.findall("[<>]", clause)
        for left, sign, right in zip(names, signs, names[1:]):
            if not left or not right or not {left[-1], right[0]} <= set(comparison.by_name):
                continue
            lower, higher = (left[-1], right[0]) if sign == "<" else (right[0], left[-1])
            said.append(judge(comparison, comparison.by_name[lower], comparison.by_name[higher]))
    return said


def judge(comparison, lower, higher):
    what = f"{lower.name} below {higher.name}"
    d = comparison.between(lower, higher)
    if d is None:
        return f"Expected {what}: no seed with both."
    numbers = f"difference {d.mean:+.3f} over {count(d.n, 'seed')}".replace("-", "\u2212")
    if d.t is None:
        return f"Expected {what}: {numbers}, too few for an interval."
    if not d.resolved:
        return f"Expected {what}: not resolved ({numbers})."
    return f"Expected {what}: {'seen' if d.mean < 0 else 'the opposite was seen'} ({numbers})."


def verdict(comparison):
    """Cautious sentences about the losses of one comparison."""
    base, ranked = comparison.baseline, comparison.ranked()
    if not ranked:
        return ["No run with a final evaluation that may be ranked: nothing can be said about quality."]
    said = []
    if base is not None and base.best and not base.ranked:
        said.append(f"The baseline {base.name} may not be ranked itself; see the warnings.")
    below, above, open_, few = [], [], [], []
    for arm in ranked:
        d = comparison.difference(arm)
        if d is not None:
            (few if d.t is None else open_ if not d.resolved else below if d.mean < 0 else above).append(arm.name)
    if base is not None and (below or above or open_):
        said.append(f"Against {base.name}, seed by seed: " + "; ".join(
            f"{words} {listing(names)}" for words, names in
            (("lower loss:", below), ("higher loss:", above), ("not resolved:", open_)) if names) + ".")
    if few:
        said.append(f"Fewer than {FEWEST_SEEDS} seeds, so nothing is claimed: {listing(few)}.")
    if len(ranked) == 1:
        said.append(f"Only {ranked[0].name} can be ranked: there is nothing to compare it with.")
    return said + expected_signs(comparison)
