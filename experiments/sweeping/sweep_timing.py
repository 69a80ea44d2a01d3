"""The speed of an arm, alone on its device: some steps with nothing beside them, and some more for its stages.

They go on from where the arm's first seed ended at the arm's own rate, since the load of the experts, which training
changes, changes the time of a step. Under the budget `seconds` the times are needed before anything is trained.

A line of kind "timing" has, beside the provenance of run_record.py: sweep, size, arm, budget; weights ("trained", or
"fresh" as they were drawn; older lines have none, and were fresh); steps measured and warmup_steps left out before
them; ms (median of a step) and ms_p95; tokens_per_step and tok_s, by the median;
stages_ms, what each stage of the MoE layer takes of a step when all are timed (null where the trainer does not say);
peak_flops and peak_from, the most this device could do (peaks.py); others_busy, the cores' worth of work that other
processes did meanwhile, null where the system does not tell. Evaluation is no part of a step's ms.
"""
import math
import os
import re
import resource
import shlex
import statistics
import time

import peaks
import run_record
import sweep_folder
import sweep_probe
import sweep_recipe

WARMUP = 10
PROFILED = 20


QUIET = [("--eval-every", "0"), ("--eval-batches", "1"), ("--log-every", "1"), ("--save-every", "0")]


def timing_options(plan, size, arm, steps, trained=None):
    """trained: (folder, steps) of a finished run to go on from; None: from fresh weights."""
    if trained:
        folder, done = trained
        return [("--resume", folder), ("--steps", str(done + steps))] + QUIET
    return sweep_recipe.merge_options(plan.first_options(size, arm),
                                      [("--steps", str(steps)), ("--warmup", "1")] + QUIET)


def is_current(plan, record, size, arm):
    """Whether a timing is of this arm as the program now has it."""
    expected = plan.probes[size, arm]["config"]
    free = {"lr", "seed", "steps", "out", "init_from", "resume", "warmup", "eval_every", "eval_batches", "log_every",
            "save_every", "profile"}
    return plan.agrees(record.get("config") or {}, expected, free)


def busy_seconds():
    """Seconds of work that the cores this process may use have done since the machine started; None: unknown."""
    try:
        mine = os.sched_getaffinity(0)
        total = 0
        with open("/proc/stat", encoding="ascii") as file:
            for line in file:
                match = re.match(r"cpu(\d+) (.*)", line)
                if match and int(match.group(1)) in mine:
                    times = [int(x) for x in match.group(2).split()]
                    total += sum(times[:3]) + sum(times[5:8])
        return total / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None


def child_seconds():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def percentile(values, share):
    """The smallest value that `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def read_stages(output, ms):
    """The table that --profile prints, as milliseconds of a step of `ms`."""
    stages = {}
    for line in output.split("stage      seconds", 1)[-1].splitlines()[1:] if "stage      seconds" in output else []:
        match = re.match(r"(\w+) +[\d.]+ +([\d.]+) %$", line.strip())
        if not match:
            break
        stages[match.group(1)] = round(float(match.group(2)) / 100 * ms, 6)
    return stages or None


def measure(plan, prober, size, arm, steps, trained=None):
    """The record of a timing. Nothing else of the sweep may run meanwhile. trained: as of timing_options."""
    options = timing_options(plan, size, arm, WARMUP + steps, trained)
    begin = trained[1] if trained else 0
    folder = os.path.join(prober.scratch, "timing")
    resolved = prober.resolve(options)
    busy, ours, began = busy_seconds(), child_seconds(), time.monotonic()
    log, _ = prober.run(resolved, folder)
    seconds = time.monotonic() - began
    others = None
    if busy is not None:
        others = max(0.0, (busy_seconds() - busy - (child_seconds() - ours)) / seconds)
    measured = [s["ms"] for s in log.steps if s["step"] > begin + WARMUP and run_record.is_number(s.get("ms"))]
    if not measured:
        raise sweep_probe.ProbeError("the log has no time of a step")
    profiled, output = prober.run(
        prober.resolve(timing_options(plan, size, arm, PROFILED, trained)) + [("--profile", None)], folder)
    ms = statistics.median(measured)
    tokens = log.header["config"]["batch"] * log.header["config"]["seq"]
    record = {"kind": "timing", "sweep": plan.recipe.name, "size": size, "arm": arm, "budget": plan.recipe.budget,
              "seed": log.header["config"]["seed"], "rate": log.header["config"]["lr"],
              "weights": "trained" if trained else "fresh"}
    record.update(run_record.provenance(log.header))
    peak, peak_from = peaks.of_device(record["device"])
    record.update(
        ts=sweep_folder.now(), command=shlex.join(prober.program + sweep_recipe.option_words(options)),
        steps=len(measured), warmup_steps=WARMUP, ms=ms, ms_p95=percentile(measured, 0.95), tokens_per_step=tokens,
        tok_s=tokens / ms * 1e3, stages_ms=read_stages(output, run_record.middle(profiled.steps) or ms),
        peak_bytes=(log.event("end") or {}).get("peak_bytes"), peak_flops=peak, peak_from=peak_from,
        others_busy=None if others is None else round(others, 2))
    return record
