#!/usr/bin/env python3
"""Did the experts specialise? A table in Markdown of what build/specialise_toy and runs of ./train on domains left.

    specialise_table.py FILE.jsonl... [--baseline joint]      the tables; "-" reads standard input
    specialise_table.py line RUN KEY=VALUE...                 one result line of a finished run of ./train, whose
                                                              directory is RUN, for specialise.sh

Lines of "kind":"toy" (documented in specialise_toy.c), "run" (of experiments/sweep, or from `line` above) and "failed"
(a run that diverged: counted, without a loss) become tables of their own, one for each sweep and size; other kinds are
skipped. Of several lines of one run the last counts. A row is an arm:

    loss       mean over seeds ± half of its 95 % interval (Student's t), of the final evaluation
    against    the difference to the baseline seed by seed, with the same interval; "not resolved" when it holds 0
    floor      of the toy the loss of one expert for all tasks, of language the loss that no model can beat (each seed
               has a validation text of its own, and so a floor)
    above      loss - floor
    NMI        of expert and task or domain, 2 I / (H + H), mean over layers; 1: each has its own
    MI         I of language, in nats, mean over layers
    entropy    of the gate, in nats, mean over tokens and layers
    solved     of the toy: seeds whose loss is below a hundredth of the floor; which are not, where some are

Several learning rates of an arm: the one of the lowest mean loss. A line that is not JSON is named with its number.
Standard library only.
"""
import collections
import json
import math
import os
import statistics
import sys

sys.path.append(os.path.join(os.path.dirname(os.path.realpath(__file__)), "sweeping"))
import intervals  # noqa: E402
import run_record  # noqa: E402
from run_record import is_number  # noqa: E402


class Problem(Exception):
    """One line that says what to do."""


def read_lines(path):
    name = "standard input" if path == "-" else path
    try:
        with sys.stdin if path == "-" else open(path, encoding="utf-8") as file:
            texts = list(file)
    except (OSError, UnicodeDecodeError) as error:
        raise Problem(f"cannot read {name}: {error}") from None
    records = []
    for number, text in enumerate(texts, 1):
        try:
            record = json.loads(text) if text.strip() else {}
        except ValueError:
            raise Problem(f"{name}:{number}: not JSON: remove the line, or write the file again") from None
        if not isinstance(record, dict):
            raise Problem(f"{name}:{number}: not a JSON object: remove the line, or write the file again")
        records.append(record)
    return records


# ---- numbers

def interval(values):
    """Mean and half width of its 95 % interval, None for the width of a single value."""
    mean, _, high = intervals.mean_interval(values)
    return mean, None if high is None else high - mean


def plus_minus(values, digits=3):
    values = [value for value in values if is_number(value)]
    if not values:
        return "–"
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")


def against(values):
    mean, half = interval(values)
    if half is None:
        return f"{mean:+.3f} (one seed)"
    return f"{mean:+.3f} ± {half:.3f}" + ("" if abs(mean) > half else " (not resolved)")


def entropy(shares):
    return -sum(p * math.log(p) for p in shares if p > 0)


def layer_nmi(shares, tokens):
    """2 I / (H + H) of domain and expert: shares[d][e] of domain d's choices, of which tokens[d] were counted."""
    total = sum(tokens)
    joint = [[n / total * p / max(sum(row), 1e-12) for p in row] for n, row in zip(tokens, shares)]
    both = entropy([sum(row) for row in joint]) + entropy([sum(column) for column in zip(*joint)])
    return 2 * (both - entropy([p for row in joint for p in row])) / both if both > 0 else 0.0


def run_nmi(record):
    layers, domains = record.get("domain_expert"), record.get("val_domains")
    if not layers or not domains:
        return None
    tokens = [domain.get("tokens", 0) for domain in domains.values()]
    return statistics.fmean(layer_nmi(shares, tokens) for shares in layers) if sum(tokens) > 0 else None


# ---- tables

def figures(record):
    """(loss, floor, nmi, mi, entropy, solved) of a line, None where it has none."""
    if record["kind"] == "toy":
        return (record.get("loss"), record.get("floor"), record.get("nmi"), None, record.get("entropy"),
                record.get("solved"))
    mi = [value for value in record.get("mi") or [] if is_number(value)]
    loss = None if record["kind"] == "failed" else record.get("val_loss")
    return (loss, record.get("val_floor"), run_nmi(record), statistics.fmean(mi) if mi else None, record.get("entropy"),
            None)


def best_rate(runs):
    """The runs of the learning rate with the lowest mean loss among those with most seeds."""
    rates = collections.defaultdict(list)
    for run in runs:
        rates[run.get("rate")].append(run)
    most = max(len(r) for r in rates.values())
    complete = [r for r in rates.values() if len(r) == most]
    return min(complete, key=lambda r: statistics.fmean(figures(run)[0] for run in r))


def row(arm, runs, base, total):
    values = [figures(run) for run in runs]
    loss, floor, nmi, mi, gate, _ = zip(*values)
    above = [a - b for a, b in zip(loss, floor) if is_number(b)]
    paired = [figures(run)[0] - base[run.get("seed")] for run in runs if run.get("seed") in base]
    lacking = f" ({total - len(runs)} without a loss)" if total > len(runs) else ""
    failed = [str(run.get("seed")) for run in runs if not figures(run)[5]]
    successes = f"{len(runs) - len(failed)} of {len(runs)}" + (
        f" (not {', '.join(failed)})" if len(failed) < len(runs) and failed else "")
    cells = [arm, f"{len(runs)}{lacking}", plus_minus(loss), against(paired) if paired else "–", plus_minus(floor),
             plus_minus(above), plus_minus(nmi), plus_minus(mi), plus_minus(gate),
             successes if runs[0]["kind"] == "toy" else "–"]
    return "| " + " | ".join(cells) + " |"


def print_table(title, records, baseline):
    arms = collections.defaultdict(list)
    for record in records:
        arms[str(record.get("arm"))].append(record)
    chosen = {}
    for arm, runs in arms.items():
        finished = [run for run in runs if is_number(figures(run)[0])]
        if finished:
            chosen[arm] = best_rate(finished)
    base = {run.get("seed"): figures(run)[0] for run in chosen.get(baseline, [])}
    print(f"\n### {title}\n")
    print(f"| arm | seeds | loss | against {baseline} | floor | above | NMI | MI | entropy | solved |")
    print("|" + "---|" * 10)
    for arm, runs in chosen.items():
        paired = {} if arm == baseline else base
        seeds = sum(run.get("rate") == runs[0].get("rate") for run in arms[arm])
        print(row(arm, runs, paired, seeds))
    for arm in arms.keys() - chosen.keys():
        print(f"\n{arm}: no run has a loss.")
    for key, what in (("commit", "Commits"), ("device", "Devices")):
        print(f"\n{what}: {', '.join(sorted({str(record.get(key)) for record in records}))}.", end="")
    print()


def print_tables(arguments):
    baseline = "joint"
    if "--baseline" in arguments:
        at = arguments.index("--baseline")
        if at + 1 == len(arguments):
            raise Problem("--baseline needs the name of an arm")
        baseline = arguments[at + 1]
        del arguments[at:at + 2]
    groups = collections.defaultdict(dict)
    for path in arguments:
        for record in read_lines(path):
            if record.get("kind") in ("toy", "run", "failed"):
                size, run = record.get("size"), tuple(str(record.get(key)) for key in ("arm", "rate", "seed"))
                groups[str(record.get("sweep")) + (f", {size}" if size else "")][run] = record
    if not groups:
        raise Problem("no line of kind toy or run: give the output of build/specialise_toy, or a sweep's results.jsonl")
    for title, records in groups.items():
        print_table(title, list(records.values()), baseline)


# ---- a line from a run's log

def print_line(run, pairs):
    log = run_record.read_log(os.path.join(run, "log.jsonl"))
    if not log.header or not log.finished(log.header["config"].get("steps")):
        raise Problem(f"{run}/log.jsonl is not of a finished run: train it to its end")
    record = {"kind": "run", "ts": log.header["ts"]}
    for pair in pairs:
        key, _, value = pair.partition("=")
        convert = {"seed": int, "side_by_side": int, "steps_before": int, "rate": float}.get(key, str)
        record[key] = convert(value)
    record.update(run_record.summary(log))
    print(json.dumps(record))


def main(arguments):
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0 if arguments else 1
    try:
        if arguments[0] == "line" and len(arguments) > 1:
            print_line(arguments[1], arguments[2:])
        else:
            print_tables(list(arguments))
    except Problem as problem:
        print(f"specialise_table: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
