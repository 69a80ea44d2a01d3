"""The plan of a sweep: which runs there are, with which options, which of them may start now.

    plan = Plan(recipe, folder, probes, sizes, arms, seeds)
    for run in plan.pending(records): ...            runs without a line in the results, in the order to make them

An arm with several learning rates is first run with the recipe's first rate-seeds seeds at each of them. When all of
those have a line, the rate with the lowest mean validation loss is the arm's own, and the other seeds are run with it.
A run that diverged has the loss infinity. So what is run depends on the recipe and the results alone, not on when the
sweep was interrupted.
"""
import dataclasses
import math
from typing import List, Optional

import intervals
import result_lines
import sweep_recipe

# What a run may have otherwise than the probe of its arm: its own seed, rate and length, and what follows from them.
FREE = {"lr", "seed", "steps", "out", "resume", "init_from", "warmup", "eval_every"}
DEFAULT_BATCH, DEFAULT_SEQ = 16, 128  # ./train's


@dataclasses.dataclass(frozen=True)
class Run:
    kind: str  # "run", or "before": others start from it
    size: str
    arm: str
    rate: Optional[float]
    seed: int
    phase: str
    steps: int
    options: tuple  # of ./train, without --out; {name} stands for the folder of a run that this one starts from
    folder: str

    def name(self):
        rate = f" rate {self.rate:g}" if self.rate is not None else ""
        return f"{self.size} {self.arm}{rate} seed {self.seed}"


def key(run):
    return run.size, run.arm, run.rate, run.seed


def is_value(value, text):
    """Whether a value of a configuration is what an option's text says; None: the option has none."""
    if text is None or not isinstance(value, (int, float)):
        return text is None or str(value) == text
    try:
        return math.isclose(value, float(text))
    except ValueError:
        return False


class Plan:
    def __init__(self, recipe, folder, arms=None, sizes=None, seeds=None):
        self.recipe, self.folder = recipe, folder
        self.arms = arms or list(recipe.arms)
        self.sizes = sizes or list(recipe.sizes)
        self.seeds = seeds or list(recipe.seeds)
        self.probes = {}  # (size, arm) -> what sweep_probe found
        self.defaults = {}  # the configuration of ./train without options
        self.steps = {}  # (size, arm) -> steps of its runs

    # ---- options and steps

    def options(self, size, arm, keyword="arm"):
        table = self.recipe.arms if keyword == "arm" else self.recipe.befores
        options = sweep_recipe.merge_options(self.recipe.options, self.recipe.sizes[size], table[arm])
        if self.recipe.steps is not None:
            options = sweep_recipe.merge_options(options, [("--steps", str(self.recipe.steps))])
        return options

    def first_options(self, size, arm):
        """At the first rate with the first seed: for probes, and timings of fresh weights."""
        rate, seed = self.recipe.rates_of(size)[0], self.recipe.seeds[0]
        return sweep_recipe.merge_options(self.options(size, arm), [("--lr", sweep_recipe.rate_text(rate)),
                                                                    ("--seed", str(seed))])

    def own_steps(self, size, arm, keyword="arm"):
        return int(dict(self.options(size, arm, keyword))["--steps"])

    def step_tokens(self, size, arm):
        config = self.probes[size, arm]["config"]
        return config["batch"] * config["seq"]

    def scale_steps(self, timings):
        """Sets every arm's steps by the recipe's budget; timings: ms of a step by (size, arm), for `seconds`. An arm
        that has no time yet is left out."""
        budget, baseline = self.recipe.budget, self.recipe.baseline
        for size in self.sizes:
            base_steps = self.own_steps(size, baseline)
            for arm in self.arms:
                steps = self.own_steps(size, arm)
                if budget == "flops":
                    work = {a: self.probes[size, a]["flops_per_token"] * self.step_tokens(size, a)
                            for a in (arm, baseline)}
                    steps = max(1, round(base_steps * work[baseline] / work[arm]))
                elif budget == "seconds":
                    if (size, arm) not in timings or (size, baseline) not in timings:
                        continue
                    steps = max(1, round(base_steps * timings[size, baseline] / timings[size, arm]))
                self.steps[size, arm] = steps

    def before_tokens(self, size, options):
        """Tokens of the runs that one with these options starts from, and of those that they start from."""
        total = 0
        for name in sweep_recipe.befores_named(options):
            before = dict(self.options(size, name, "before"))
            drawn = int(before["--steps"]) * int(before.get("--batch", DEFAULT_BATCH)) * int(
                before.get("--seq", DEFAULT_SEQ))
            total += drawn + self.before_tokens(size, list(before.items()))
        return total

    def unequal_tokens(self):
        """Under the budget `tokens`: the first (size, arm, tokens, the baseline's) that differ. Arms that start from
        other runs are equal in their own tokens, or with those of the runs they start from."""
        base = self.recipe.baseline
        for size in self.sizes if self.recipe.budget == "tokens" else []:
            own = {arm: self.own_steps(size, arm) * self.step_tokens(size, arm) for arm in self.arms + [base]}
            whole = {arm: own[arm] + self.before_tokens(size, self.options(size, arm)) for arm in own}
            for arm in self.arms:
                if own[arm] != own[base] and whole[arm] != whole[base]:
                    return size, arm, own[arm], own[base]
        return None

    # ---- runs

    def first_seed(self):
        return next((seed for seed in self.recipe.seeds if seed in self.seeds), self.seeds[0])

    def timed_run(self, size, arm, losses):
        """The run whose weights the arm is timed with; None where it is not known or diverged."""
        rate = self.best(size, arm, losses)
        run = None if rate is None or (size, arm) not in self.steps else self.run(size, arm, rate, self.first_seed())
        return run if run and math.isfinite(losses.get(key(run), math.inf)) else None

    def run(self, size, arm, rate, seed):
        several = len(self.recipe.rates_of(size)) > 1
        phase = "rates" if several and seed in self.recipe.seeds[:self.recipe.rate_seeds] else "seeds"
        steps = self.steps[size, arm]
        options = sweep_recipe.merge_options(self.options(size, arm), [
            ("--steps", str(steps)), ("--lr", sweep_recipe.rate_text(rate)), ("--seed", str(seed))])
        folder = self.folder.inside("runs", size, arm, f"{rate:g}-{seed}")
        return Run("run", size, arm, rate, seed, phase, steps, tuple(options), folder)

    def before(self, size, name, seed):
        options = sweep_recipe.merge_options(self.options(size, name, "before"), [("--seed", str(seed))])
        folder = self.folder.inside("runs", size, f"before-{name}", str(seed))
        return Run("before", size, name, None, seed, "before", self.own_steps(size, name, "before"), tuple(options),
                   folder)

    def befores_of(self, run):
        """The runs that this one starts from."""
        return [self.before(run.size, name, run.seed) for name in sweep_recipe.befores_named(run.options)]

    def words(self, run):
        """The run's options as ./train reads them, but for --out."""
        folders = {before.arm: before.folder for before in self.befores_of(run)}
        words = sweep_recipe.option_words(run.options)
        for name, folder in folders.items():
            words = [word.replace("{" + name + "}", folder) for word in words]
        return words

    def matches(self, run, config):
        """Whether a configuration, of a record or of a run's directory, is that of the run."""
        if not isinstance(config, dict) or config.get("steps") != run.steps or config.get("seed") != run.seed:
            return False
        given = {name[2:].replace("-", "_"): value for name, value in run.options}
        if "lr" in given and not math.isclose(config.get("lr", 0), float(given["lr"])):
            return False
        if run.kind == "before":  # no probe says what all its options amount to: those that are given have to be there
            return all(is_value(config[name], text) for name, text in given.items()
                       if name in config and name != "init_from")
        return self.agrees(config, self.probes[run.size, run.arm]["config"], FREE)

    def agrees(self, config, expected, free):
        """Whether a configuration is the expected one but for the names in `free`. What a record does not have is an
        option that ./train did not have yet, which is as its default."""
        return all(config.get(name, self.defaults.get(name)) == value for name, value in expected.items()
                   if name not in free)

    def finished(self, records):
        """(losses, stale): the validation loss by key of every finished run, infinity for what diverged; and the
        records that are of another configuration."""
        runs, failed, _ = result_lines.sort_out(records)
        losses, stale = {}, []
        for record in list(runs.values()) + list(failed.values()):
            size, arm = record.get("size"), record.get("arm")
            if (record.get("sweep"), record.get("budget")) != (self.recipe.name, self.recipe.budget):
                continue
            if (size, arm) not in self.steps or record.get("rate") not in self.recipe.rates_of(size):
                continue
            run = self.run(size, arm, record["rate"], record["seed"])
            if self.matches(run, record.get("config")):
                losses[key(run)] = record["val_loss"] if record["kind"] == "run" else math.inf
            else:
                stale.append(record)
        return losses, stale

    def rate_runs(self, size, arm):
        return [self.run(size, arm, rate, seed) for seed in self.recipe.seeds[:self.recipe.rate_seeds]
                for rate in self.recipe.rates_of(size)]

    def best(self, size, arm, losses):
        """The arm's own rate; None while it is not known, or when every rate diverged."""
        rates = self.recipe.rates_of(size)
        if len(rates) == 1:
            return rates[0]
        tried = self.rate_runs(size, arm)
        if any(key(run) not in losses for run in tried):
            return None
        return intervals.best_rate({rate: [losses[key(run)] for run in tried if run.rate == rate] for rate in rates})

    def wanted(self, losses):
        """All runs that can be named so far, finished ones among them, in the order to make them."""
        rates, seeds = [], []
        for size in self.sizes:
            for arm in self.arms:
                if (size, arm) not in self.steps:
                    continue
                if len(self.recipe.rates_of(size)) > 1:
                    rates += self.rate_runs(size, arm)
                best = self.best(size, arm, losses)
                if best is not None:
                    seeds += [self.run(size, arm, best, seed) for seed in self.seeds]
        order = {seed: i for i, seed in enumerate(self.recipe.seeds)}
        rates.sort(key=lambda run: order[run.seed])
        seeds.sort(key=lambda run: order[run.seed])
        return list(dict.fromkeys(rates + seeds))

    def pending(self, losses):
        return [run for run in self.wanted(losses) if key(run) not in losses]

    def unknown(self, losses):
        """How many runs cannot be named before rates are chosen, as a list of (size, arm, seed)."""
        return [(size, arm, seed) for size in self.sizes for arm in self.arms for seed in self.seeds
                if self.best(size, arm, losses) is None and seed not in self.recipe.seeds[:self.recipe.rate_seeds]
                and any(key(run) not in losses for run in self.rate_runs(size, arm))]
