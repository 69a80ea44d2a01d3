"""Reads what the report is made from: files of result lines, folders of sweeps, runs of ./train.

    inputs = read(["runs/sweep", "experiments/results/r1.jsonl", "runs/demo"])

A path is one of
    a sweep's folder     it holds results.jsonl and perhaps `recipe`
    a run's directory    it holds log.jsonl, whose lines are described in model/log.h
    any other folder     every sweep and every run below it
    a file of lines      told apart by their "kind" ("run", "timing", "failed", "recipe", "microbench", "inference");
                         lines without one that name "ranks" and "tok_s" are of a scaling test; a log.jsonl is a run's
A line that is not JSON, and a kind that is not known, is named in `problems`, and the rest is read. Only a path that
cannot be read at all ends the program (InputError). Values that are null, NaN or missing are None for `number`.
"""
import collections
import json
import math
import os
import re
import statistics

POINTS = 60  # of a curve taken from a log
LOADS = ("load_cv", "max_vio", "entropy", "drop")
MEANS = ("load_cv", "max_vio", "load_kl", "entropy", "mean_entropy", "drop", "token_drop", "padding", "dead", "margin",
         "router_main_norm", "router_balance_norm")
NO_GRADIENT = {"dense", "hash", "position", "random", "random-step", "forced"}  # routers that have none to expect
# Options that say where a run is, how it is watched or which of several equal runs it is, not what is trained.
NOT_AN_ARM = {"out", "resume", "seed", "lr", "sample", "prompt", "temperature", "sample_top_k", "top_p", "export_hf",
              "export_gguf", "save_every", "log_every", "profile", "trace_syncs", "dump_routing", "graph", "patience"}


class InputError(Exception):
    """Its text is one line for the reader."""


class Inputs:
    def __init__(self):
        self.runs, self.timings, self.failed = [], [], []
        self.benches, self.inferences, self.scalings = [], [], []
        self.recipes = {}     # name of a sweep, or None -> Recipe
        self.problems = []    # one line each
        self.sources = []     # paths that were read
        self.line_count = 0

    def anything(self):
        return self.runs or self.timings or self.failed or self.benches or self.inferences or self.scalings


class Recipe:
    """The keyword lines of a sweep's recipe; a keyword may repeat. It stands in a file beside the results, or among
    them, as the "text" of a line of kind "recipe"."""

    def __init__(self, text):
        self.words = collections.defaultdict(list)
        for line in text.splitlines():
            keyword, *rest = re.sub(r"(^|\s)#.*", "", line).split(maxsplit=1) or [""]
            if keyword:
                self.words[keyword].append("".join(rest).strip())

    def get(self, keyword):
        return " ".join(self.words.get(keyword, [])) or None

    def arms(self):
        return [rest.split()[0] for rest in self.words.get("arm", []) if rest.split()]


def number(x):
    """x when it is a finite number, else None."""
    return x if isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) else None


def mapping(x):
    return x if isinstance(x, dict) else {}


def rows(x, width):
    """Points [[a, b, ...], ...] with at least `width` entries, the first two of which are numbers."""
    return [p for p in x if isinstance(p, list) and len(p) >= width and None not in (number(p[0]), number(p[1]))] \
        if isinstance(x, list) else []


def tidy(line):
    """Values of the wrong kind, of those that are looked up by name or used as keys, become absent."""
    for key in ("config", "versions", "val_domains", "stages_ms", "router_gradient"):
        if key in line:
            line[key] = mapping(line[key])
    for key in ("sweep", "size", "budget", "seed"):
        if isinstance(line.get(key), (dict, list)):
            line[key] = str(line[key])


def run_key(line):
    return [str(line.get(key)) for key in ("sweep", "size", "budget", "arm", "rate", "seed")]


def json_lines(path, problems):
    """[(line number, object)]"""
    found = []
    try:
        with open(path, encoding="utf-8", errors="replace") as text:
            for i, line in enumerate(text, 1):
                if not line.strip():
                    continue
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError):
                    entry = None
                if isinstance(entry, dict):
                    found.append((i, entry))
                else:
                    problems.append(f"{path}:{i}: not a JSON object, left out")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    return found


# ---- one run of ./train


def thinned(points):
    step = max(1, math.ceil(len(points) / POINTS))
    return points[::step] + (points[-1:] if points and (len(points) - 1) % step else [])


def run_of_log(path, entries):
    """A "run" line made from a log. Its name is given later, when it is known what tells it from other runs."""
    header = next((e for e in entries if "config" in e), {})
    config = mapping(header.get("config"))
    steps = [e for e in entries if "loss" in e and number(e.get("step")) is not None and "event" not in e]
    evaluations = [e for e in entries if "val_loss" in e and number(e.get("step")) is not None and "event" not in e]
    events = {e["event"]: e for e in entries if isinstance(e.get("event"), str)}
    end, last = events.get("end", {}), mapping(evaluations[-1] if evaluations else None)
    late = steps[len(steps) * 3 // 4:]
    whole = bool(last) and last["step"] == config.get("steps")  # one that was stopped has an "end" as well
    directory = os.path.dirname(os.path.abspath(path))
    run = {
        "kind": "run", "from_log": directory, "ts": header.get("ts"), "rate": number(config.get("lr")),
        "seed": config.get("seed"), "config": config, "command": f"./train --out {os.path.basename(directory)}",
        "commit": str(header.get("git_sha") or "unknown") + ("-dirty" if header.get("git_dirty") else ""),
        "device": header.get("device"), "versions": header.get("versions"), "driver": header.get("driver"),
        "params_total": header.get("params_total"), "params_active": header.get("params_active"),
        "flops_per_token": header.get("flops_per_token"), "leaky": header.get("leaky") is True,
        "sees_batch": header.get("sees_batch") is True, "learned": config.get("router") not in NO_GRADIENT,
        "steps": steps[-1]["step"] if steps else 0, "tokens": steps[-1].get("tokens") if steps else 0,
        "train_seconds": end.get("train_seconds"), "peak_bytes": end.get("peak_bytes"),
        "router_gradient": events.get("router_gradient"), "moe_layers": header.get("moe_layers"),
        "domains": header.get("domains"),
        "val": [[e["step"], e.get("tokens"), e["val_loss"]] for e in evaluations],
        "train": thinned([[e["step"], e.get("tokens"), e["loss"]] for e in steps]),
        "loads": thinned([[e["step"]] + [e.get(key) for key in LOADS] for e in steps])}
    for key in ("val_loss", "val_bpb", "val_floor", "val_domains", "domain_expert", "mi"):
        run[key] = last.get(key) if whole else None
    skipped, most = number(events.get("skip", {}).get("in_a_row")), number(config.get("max_skips"))
    if most and (skipped or 0) >= most:
        run["why"] = f"{skipped} steps in a row were not finite"
    for key in MEANS:
        values = [e[key] for e in late if number(e.get(key)) is not None]
        run[key] = statistics.fmean(values) if values else None
    times = [e["ms"] for e in steps[len(steps) // 4:] if number(e.get("ms")) is not None]
    run["ms"] = statistics.median(times) if times else None
    return run


def timing_of(run):
    """The speed that a log shows; whether something ran beside it, the log does not know."""
    kept = ("arm", "size", "sweep", "config", "command", "commit", "device", "driver", "versions", "flops_per_token",
            "params_active", "params_total", "leaky", "ms", "from_log")
    per_step = run["tokens"] / run["steps"]
    return dict({key: run[key] for key in kept}, kind="timing", tokens_per_step=per_step,
                tok_s=1000 * per_step / run["ms"])


def name_runs(runs):
    """Runs that differ in no option but seed and rate are one arm, named by the router where that tells arms apart."""
    def kind(run):
        return json.dumps({k: v for k, v in run["config"].items() if k not in NOT_AN_ARM}, sort_keys=True)

    kinds = {}
    for run in runs:
        kinds.setdefault(kind(run), run)
    routers = collections.Counter(run["config"].get("router") for run in kinds.values())
    used = set()
    for key, first in kinds.items():
        router = first["config"].get("router")
        folder = os.path.basename(first["from_log"])
        without_seed = re.sub(f"[-_.]?(s|seed)?[-_.]?{first['seed']}$", "", folder) or folder
        name = str(router) if router and routers[router] == 1 else without_seed
        while name in used:
            name += "'"
        used.add(name)
        for run in runs:
            if kind(run) == key:
                config = run["config"]
                run.update(arm=name, sweep=None, size=f"{config.get('layers', '?')} layers of {config.get('dim', '?')}")


# ---- files and folders


def read_file(inputs, path, logs, sweep=None):
    entries = json_lines(path, inputs.problems)
    inputs.sources.append(path)
    inputs.line_count += len(entries)
    if any("config" in e and "kind" not in e and "versions" in e for _, e in entries[:1]):
        logs.append(run_of_log(path, [e for _, e in entries]))
        return
    bins = {"run": inputs.runs, "timing": inputs.timings, "failed": inputs.failed, "microbench": inputs.benches,
            "inference": inputs.inferences}
    unknown = collections.Counter()
    for i, entry in entries:
        kind = None if entry.get("kind") is None else str(entry["kind"])
        if kind is None and number(entry.get("ranks")) and number(entry.get("tok_s")):
            inputs.scalings.append(entry)
        elif kind in ("run", "timing", "failed") and not isinstance(entry.get("arm"), str):
            inputs.problems.append(f'{path}:{i}: a "{kind}" line without "arm", left out')
        elif kind == "recipe":
            inputs.recipes.setdefault(entry.get("sweep", sweep), Recipe(str(entry.get("text") or "")))
        elif kind in bins:
            tidy(entry)
            if kind in ("run", "timing", "failed") and entry.get("sweep") is None:
                entry["sweep"] = sweep
            if kind in ("run", "failed"):   # of a run that was made twice the later line counts
                other = bins["failed" if kind == "run" else "run"]
                other[:] = [line for line in other if run_key(line) != run_key(entry)]
            bins[kind].append(entry)
        elif kind != "before":   # a run that others start from is no result
            unknown[str(kind)] += 1
    for kind, times in unknown.items():
        what = "without a kind" if kind == "None" else f'of kind "{kind}"'
        inputs.problems.append(f"{path}: {times} line{'s' if times > 1 else ''} {what}, not shown")


def read_folder(inputs, folder, logs):
    names = sorted(os.listdir(folder))
    if "results.jsonl" in names:
        sweep = os.path.basename(os.path.abspath(folder))
        before = [len(inputs.runs), len(inputs.timings), len(inputs.failed)]
        read_file(inputs, os.path.join(folder, "results.jsonl"), logs, sweep)
        if "recipe" in names:
            with open(os.path.join(folder, "recipe"), encoding="utf-8", errors="replace") as text:
                recipe = Recipe(text.read())
            added = [lines[n:] for lines, n in zip((inputs.runs, inputs.timings, inputs.failed), before)]
            for name in {line["sweep"] for lines in added for line in lines} or {sweep}:
                inputs.recipes[name] = recipe
    elif "log.jsonl" in names:
        read_file(inputs, os.path.join(folder, "log.jsonl"), logs)
    else:
        for name in names:
            below = os.path.join(folder, name)
            if os.path.isdir(below) and not os.path.islink(below):
                read_folder(inputs, below, logs)


def read(paths):
    inputs, logs = Inputs(), []
    for path in paths:
        if os.path.isdir(path):
            try:
                read_folder(inputs, path, logs)
            except OSError as error:
                raise InputError(f"{error.filename or path}: {error.strerror}") from None
        else:
            read_file(inputs, path, logs)
    name_runs(logs)
    inputs.runs += logs
    inputs.timings += [timing_of(run) for run in logs if run["ms"] and run["tokens"] and run["steps"]]
    return inputs
