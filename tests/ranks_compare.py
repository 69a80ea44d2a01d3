#!/usr/bin/env python3
"""Whether two runs are the same but for rounding: every step's figures, then weights and moments of the checkpoint.

    ranks_compare.py RUN OTHER                 figures within 1e-6 of each other, tensors within 5e-6 (relative L2)
    ranks_compare.py --losses TOLERANCE RUN OTHER      the losses alone
    ranks_compare.py --file A B                two safetensors files alone

Prints the worst of each and exits with 1 where one is too far apart. Standard library only. Used by test_ranks.sh.
"""
import array
import json
import math
import struct
import sys

FIGURES, TENSORS = 1e-6, 5e-6
KEYS = ["loss", "aux", "z", "grad_norm", "router_grad_norm", "router_main_norm", "router_balance_norm", "entropy",
        "margin", "load_cv", "val_loss", "val_bpb"]


def steps(run):
    lines = [json.loads(line) for line in open(run + "/log.jsonl")]
    return [line for line in lines if "step" in line and ("loss" in line or "val_loss" in line)]


def tensors(path):
    data = open(path, "rb").read()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + length])
    values = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, end = (8 + length + offset for offset in entry["data_offsets"])
            values[name] = array.array({"F32": "f", "F64": "d"}[entry["dtype"]], data[first:end])
    return values


def distance(a, b):
    if a is None or b is None:
        return 0 if a == b else math.inf
    return abs(a - b) / max(abs(a), abs(b), 1e-3)


def relative_l2(a, b):
    if len(a) != len(b):
        return math.inf
    norm = math.sqrt(sum(x * x for x in a))
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b))) / norm if norm > 0 else max(map(abs, b), default=0)


def compare_files(a, b):
    a, b = tensors(a), tensors(b)
    if a.keys() != b.keys():
        return {"names": math.inf}
    return {name: relative_l2(a[name], b[name]) for name in a}


def compare_steps(run, other, keys=KEYS):
    a, b = steps(run), steps(other)
    if not a or len(a) != len(b) or any(x["step"] != y["step"] for x, y in zip(a, b)):
        return {"steps": math.inf}
    worst = {}
    for x, y in zip(a, b):
        for key in keys:
            if key in x or key in y:
                worst[key] = max(worst.get(key, 0), distance(x.get(key), y.get(key)))
        if keys is KEYS and x.get("counts") != y.get("counts"):
            worst["counts"] = math.inf
    return worst


def verdict(worst, tolerance):
    name = max(worst, key=worst.get)
    print(f"{'ok  ' if worst[name] <= tolerance else 'FAIL'} {len(worst)} compared, worst {name} {worst[name]:.2e}")
    return worst[name] <= tolerance


def main(arguments):
    if arguments[0] == "--file":
        return verdict(compare_files(*arguments[1:]), TENSORS)
    if arguments[0] == "--losses":
        return verdict(compare_steps(*arguments[2:], keys=["loss", "val_loss"]), float(arguments[1]))
    good = verdict(compare_steps(*arguments), FIGURES)
    for name in "model", "optimizer":
        paths = [f"{run}/checkpoint/{name}.safetensors" for run in arguments]
        good &= verdict(compare_files(*paths), TENSORS)
    return good


sys.exit(0 if main(sys.argv[1:]) else 1)
