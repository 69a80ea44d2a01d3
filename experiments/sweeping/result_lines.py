"""Files of results: one JSON object a line, of several kinds; this module reads, mends and appends them.

    records = result_lines.read("runs/sweep/results.jsonl")     every object, in the order of the file
    runs, failed, timings = result_lines.sort_out(records)      the last line of each key wins

Kinds ("kind"): "run" (a finished run: its quality), "failed" (a run that diverged: its loss counts as infinite),
"timing" (the speed of an arm alone on its device), "before" (a run that others start from), "recipe" (the question and
what was expected, as they stood before the first run). Readers skip kinds they do not know and take missing fields as
absent. What each kind holds: run_record.py, sweep_timing.py, sweep_folder.py.

A line that a reader could not use (no JSON, no arm, a loss that is text) is named with what to do, not left out: what
it was about would be missing without a word. A line is appended with one write and synced to disk. Where the machine
went down in the middle of it, `mend` cuts the half line off: the run it was about is still in its directory, and the
line is made again.
"""
import json
import os


class ResultError(Exception):
    """One line that names the file, the line and what to do."""


NUMBER = (int, float)
NEEDED = {"run": ("arm", "rate", "seed"), "failed": ("arm", "rate", "seed"), "timing": ("arm",)}
TYPES = {"arm": str, "rate": NUMBER, "seed": int, "config": dict, "router_gradient": dict, "arms": list, "seeds": list}
TYPES.update(dict.fromkeys(("val_loss", "ms", "tok_s", "tokens_per_step", "others_busy", "peak_flops", "load_cv",
                            "drop", "flops_per_token", "params_total", "params_active", "steps"), NUMBER))


def fault(record):
    """What is wrong with a line of a kind that is known; None when nothing is."""
    kind = record.get("kind")
    if kind not in ("run", "failed", "timing", "recipe"):
        return None
    for name in NEEDED.get(kind, ()):
        if record.get(name) is None:
            return f'a "{kind}" line without "{name}"'
    for name, types in TYPES.items():
        value = record.get(name)
        if value is not None and (not isinstance(value, types) or isinstance(value, bool)):
            return f'"{name}" is {json.dumps(value)[:40]}'
    return None


def read(path):
    """Every object of the file. ResultError names the first line that is none."""
    records = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                if not text.strip():
                    continue
                try:
                    record = json.loads(text)
                except ValueError:
                    raise ResultError(f"{path}:{number}: not JSON: mend or remove the line") from None
                if not isinstance(record, dict):
                    raise ResultError(f"{path}:{number}: not a JSON object: mend or remove the line")
                wrong = fault(record)
                if wrong:
                    raise ResultError(f"{path}:{number}: {wrong}: mend or remove the line")
                records.append(record)
    except OSError as error:
        raise ResultError(f"{path}: {error.strerror}: name a file that experiments/sweep wrote") from None
    except UnicodeDecodeError:
        raise ResultError(f"{path}: not UTF-8 text: name a file that experiments/sweep wrote") from None
    return records


def find(name):
    """The file of results that NAME means: itself, or results.jsonl in the folder NAME."""
    return os.path.join(name, "results.jsonl") if os.path.isdir(name) else name


def mend(path):
    """Cuts off a last line that was written by half; returns the number of bytes cut."""
    if not os.path.exists(path):
        return 0
    with open(path, "rb") as file:
        content = file.read()
    end = content.rfind(b"\n") + 1
    if end == len(content):
        return 0
    try:
        if isinstance(json.loads(content[end:]), dict):  # whole, but for its newline
            with open(path, "ab") as file:
                file.write(b"\n")
            return 0
    except ValueError:
        pass
    os.truncate(path, end)
    return len(content) - end


def append(path, record):
    text = json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        data = text.encode()
        while data:
            data = data[os.write(descriptor, data):]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def comparison(record):
    """What is compared with each other: runs of one sweep, at one size, under one budget."""
    return record.get("sweep"), record.get("size"), record.get("budget")


def run_key(record):
    return comparison(record) + (record.get("arm"), record.get("rate"), record.get("seed"))


def sort_out(records):
    """(runs, failed, timings): dictionaries by key, of several lines of a key the last. A run that failed once and
    finished later is no failure, and one that failed after it had finished is one."""
    runs, failed, timings = {}, {}, {}
    for record in records:
        kind = record.get("kind")
        if kind == "run":
            runs[run_key(record)] = record
            failed.pop(run_key(record), None)
        elif kind == "failed":
            failed[run_key(record)] = record
            runs.pop(run_key(record), None)
        elif kind == "timing":
            timings[comparison(record) + (record.get("arm"),)] = record
    return runs, failed, timings
