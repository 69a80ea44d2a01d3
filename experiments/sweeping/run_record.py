"""What a finished run of ./train has to say, as one line of results: from RUN/log.jsonl to a record.

    log = run_record.read_log("runs/x/log.jsonl")
    record = run_record.summary(log)         the fields of kind "run" that the log alone decides

Provenance: ts, config, commit, device, versions, driver, params_total, params_active, flops_per_token, leaky,
sees_batch, learned. Quality: val_loss, val_bpb, val_floor, val_domains, domain_expert, mi of the last evaluation; the
curves val, train and loads. Means over the last quarter of the logged steps: load_cv, max_vio, load_kl, entropy,
mean_entropy, drop, token_drop, padding, dead, margin, router_main_norm, router_balance_norm. Cost: steps, tokens,
train_seconds, peak_bytes, and ms, the median of the last three quarters of the logged steps.

What log lines mean: model/log.h.
"""
import dataclasses
import functools
import json
import math
import re
import statistics
import subprocess
from typing import Any, Dict, List, Optional

POINTS = 60
LATE_MEANS = ("load_cv", "max_vio", "load_kl", "entropy", "mean_entropy", "drop", "token_drop", "padding", "dead",
              "margin", "router_main_norm", "router_balance_norm")


@dataclasses.dataclass
class Log:
    header: Optional[Dict[str, Any]] = None
    steps: List[Dict[str, Any]] = dataclasses.field(default_factory=list)
    evaluations: List[Dict[str, Any]] = dataclasses.field(default_factory=list)
    events: List[Dict[str, Any]] = dataclasses.field(default_factory=list)

    def event(self, name):
        """The last event of that name."""
        return next((e for e in reversed(self.events) if e["event"] == name), None)

    def finished(self, steps):
        """Whether the run came to its end after `steps` steps, with an evaluation of them."""
        end = self.event("end")
        return bool(self.header and end and end.get("step") == steps and self.evaluations
                    and self.evaluations[-1].get("step") == steps)

    def diverged(self):
        """Why the run is worth nothing, None when it is not: too many steps in a row that were not finite."""
        skip = self.event("skip")
        most = (self.header or {}).get("config", {}).get("max_skips")
        if skip and most is not None and skip.get("in_a_row", 0) >= most:
            return f"{skip['in_a_row']} steps in a row up to {skip['step']} had a loss or gradient that is not finite"
        return None


def read_log(path):
    """The log, as far as it is whole; an empty one where there is none."""
    log = Log()
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read().split("\n")
    except OSError:
        return log
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # half a line, of a machine that went down
        if not isinstance(entry, dict):
            continue
        if "config" in entry:
            log.header = entry
        elif "event" in entry:
            log.events.append(entry)
        elif "val_loss" in entry:
            log.evaluations.append(entry)
        elif "loss" in entry:
            log.steps.append(entry)
    return log


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def thin(points, most=POINTS):
    """At most so many of the points, evenly spread, the last among them."""
    if len(points) <= most:
        return points
    return [points[round((i + 1) * len(points) / most) - 1] for i in range(most)]


def late_mean(steps, key):
    values = [s[key] for s in steps[len(steps) * 3 // 4:] if is_number(s.get(key))]
    return statistics.fmean(values) if values else None


def middle(steps, key="ms"):
    values = [s[key] for s in steps[len(steps) // 4:] if is_number(s.get(key))]
    return statistics.median(values) if values else None


@functools.lru_cache(maxsize=None)
def gpu_driver():
    """The version of NVIDIA's driver, None where there is none."""
    try:
        answer = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                                capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (answer.stdout.split() or [None])[0] if answer.returncode == 0 else None


def provenance(header):
    on_gpu = not re.search(r"\(\d+ threads?, ", header.get("device") or "")  # how ./train names a CPU
    return {
        "ts": header.get("ts"), "config": header["config"],
        "commit": str(header.get("git_sha")) + ("-dirty" if header.get("git_dirty") else ""),
        "device": header.get("device"), "precision": header.get("precision"), "versions": header.get("versions"),
        "driver": gpu_driver() if on_gpu else None,
        "params_total": header.get("params_total"), "params_active": header.get("params_active"),
        "flops_per_token": header.get("flops_per_token"),
        "leaky": header.get("leaky"), "sees_batch": header.get("sees_batch"), "learned": header.get("learned"),
    }


def summary(log):
    record = provenance(log.header)
    evaluation = log.evaluations[-1] if log.evaluations else {}
    last = log.steps[-1] if log.steps else {}
    end = {} if log.diverged() else log.event("end") or {}  # a run that diverged has at most that of an earlier stop
    gradient = log.event("router_gradient")
    record.update(
        steps=end.get("step", last.get("step")), tokens=last.get("tokens"), train_seconds=end.get("train_seconds"),
        val_loss=evaluation.get("val_loss"), val_bpb=evaluation.get("val_bpb"), val_floor=evaluation.get("val_floor"),
        val_domains=evaluation.get("val_domains"), domain_expert=evaluation.get("domain_expert"),
        mi=evaluation.get("mi"),
        val=thin([[e["step"], e["tokens"], e["val_loss"]] for e in log.evaluations]),
        train=thin([[s["step"], s["tokens"], s["loss"]] for s in log.steps]),
        loads=thin([[s["step"], s.get("load_cv"), s.get("max_vio"), s.get("entropy"), s.get("drop")]
                    for s in log.steps]))
    for key in LATE_MEANS:
        record[key] = late_mean(log.steps, key)
    record.update(
        router_gradient={"main": gradient.get("main"), "balance": gradient.get("balance")} if gradient else None,
        ms=middle(log.steps), peak_bytes=end.get("peak_bytes"))
    return record
