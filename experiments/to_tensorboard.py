#!/usr/bin/env python3
"""Shows runs in TensorBoard: from RUN/log.jsonl to RUN/events.out.tfevents.moelab.

    experiments/to_tensorboard.py runs             every run (a directory with a log.jsonl) in runs and below
    experiments/to_tensorboard.py --follow runs    the same again every few seconds, until Ctrl-C
    tensorboard --logdir runs

Curves are grouped by what stands before the slash: train/, val/, router/ (means over the routers), moe/ (rows), and
one curve per router in entropy/, max_vio/, margin/ and so on. Standard library only, so the two formats are written
by hand:

    TFRecord   u64 length, u32 masked CRC-32C of the length, data, u32 masked CRC-32C of the data
    Event      protobuf: 1 wall_time (double), 2 step (varint), 3 file_version (string), 5 summary, whose
               values 1 have a tag 1 (string) and a simple_value 2 (float)

What a log's lines become depends on nothing but them. The file of a log that has grown therefore begins with the bytes
it has already, and only the rest is appended, which a TensorBoard that is running reads on; after a resume that cut the
log the file is replaced. What a log's lines hold: model/log.h.
"""
import argparse
import datetime
import json
import os
import struct
import sys
import time

EVENTS = "events.out.tfevents.moelab"
LARGEST = 3.4e38  # of a float32

# Key of a line -> tag. Keys that are missing or null are left out.
STEP_TAGS = {
    "loss": "train/loss", "aux": "train/aux", "z": "train/z", "lr": "train/lr", "grad_norm": "train/grad_norm",
    "ms": "train/ms", "tok_s": "train/tok_s", "mfu": "train/mfu", "skipped": "train/skipped",
    "router_grad_norm": "router/grad_norm", "router_main_norm": "router/main_norm",
    "router_balance_norm": "router/balance_norm", "entropy": "router/entropy", "mean_entropy": "router/mean_entropy",
    "margin": "router/margin", "load_cv": "router/load_cv", "load_kl": "router/load_kl", "max_vio": "router/max_vio",
    "dead": "router/dead", "near_dead": "router/near_dead",
    "drop": "moe/drop", "token_drop": "moe/token_drop", "padding": "moe/padding"}
VAL_TAGS = {"val_loss": "val/loss", "val_bpb": "val/bpb", "val_floor": "val/floor"}
CHOICES_TAGS = {"accuracy": "choices/accuracy", "accuracy_mean": "choices/accuracy_mean"}
ROUTER_TAGS = {"layer_entropy": "entropy", "layer_main_norm": "main_norm", "layer_balance_norm": "balance_norm",
               "layer_margin": "margin", "mi": "mutual_information", "churn": "churn"}


# ---- the log

def read_log(path):
    """The lines of a log, each an object. One that is not whole is left out, such as the last while a run writes it."""
    lines = []
    with open(path, encoding="utf-8", errors="replace") as log:
        for text in log:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict):
                lines.append(line)
    return lines


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST  # no NaN either


def list_of(value):
    return value if isinstance(value, list) else []


def router_names(header):
    """Of each router: its layer, and the step where a layer's chain has several."""
    layers = list_of(header.get("moe_layers"))
    names = []
    for i, layer in enumerate(layers):
        step = f"_step_{layers[:i].count(layer) + 1}" if layers.count(layer) > 1 else ""
        names.append(f"layer_{layer}{step}")
    return names


def largest_violation(counts):
    """MaxVio: how far the fullest expert is above its fair share, as a part of it."""
    if not counts or not all(map(is_number, counts)) or sum(counts) <= 0:
        return None
    return max(counts) * len(counts) / sum(counts) - 1


def scalars(line, routers):
    """What a line says, as {tag: number}; empty for lines without numbers over steps."""
    found = {}
    if "loss" in line:
        found = {tag: line.get(key) for key, tag in STEP_TAGS.items()}
        for name, counts in zip(routers, list_of(line.get("counts"))):
            found["max_vio/" + name] = largest_violation(list_of(counts))
    elif "val_loss" in line:
        found = {tag: line.get(key) for key, tag in VAL_TAGS.items()}
        domains = line.get("val_domains")
        for domain, result in (domains if isinstance(domains, dict) else {}).items():
            found["val/domain/" + domain] = result.get("loss") if isinstance(result, dict) else None
    elif line.get("event") == "choices":
        found = {tag: line.get(key) for key, tag in CHOICES_TAGS.items()}
    for key, group in ROUTER_TAGS.items():
        found.update((f"{group}/{name}", value) for name, value in zip(routers, list_of(line.get(key))))
    return {tag: value for tag, value in found.items() if is_number(value)}


def numbers_over_steps(lines):
    """Yields (seconds, step, scalars) of a log's lines after the header. A log has one clock, the header's; from there
    the time that steps took is added up, since lines carry no time of their own."""
    header = lines[0]
    try:
        seconds = datetime.datetime.fromisoformat(str(header.get("ts")).replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError, OSError):
        seconds = 0.0
    routers, step, timed = router_names(header), 0, 0
    for line in lines[1:]:
        given = line.get("step", step)  # a line without a step belongs to the one before
        if not isinstance(given, int) or not 0 <= given < 2**63:
            continue
        step = given
        if "loss" in line and is_number(line.get("ms")):
            seconds += max(step - timed, 0) * line["ms"] / 1000
            timed = step
        values = scalars(line, routers)
        if values:
            yield seconds, step, values


# ---- the event file

def crc_table():
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82f63b78 if byte & 1 else 0)  # Castagnoli's polynomial, bits reversed
        table.append(byte)
    return table


CRC_TABLE = crc_table()


def masked_crc(data):
    crc = 0xffffffff
    for byte in data:
        crc = crc >> 8 ^ CRC_TABLE[(crc ^ byte) & 255]
    crc ^= 0xffffffff
    return ((crc >> 15 | crc << 17) + 0xa282ead8) & 0xffffffff


def record(data):
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc(length)) + data + struct.pack("<I", masked_crc(data))


def varint(number):
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def bytes_field(field, data):
    return varint(field << 3 | 2) + varint(len(data)) + data


def event(seconds, step, rest):
    return record(varint(1 << 3 | 1) + struct.pack("<d", seconds) + varint(2 << 3) + varint(step) + rest)


def encode(lines):
    """The bytes of the event file of a log."""
    events = []
    for seconds, step, values in numbers_over_steps(lines):
        if not events:
            events.append(event(seconds, 0, bytes_field(3, b"brain.Event:2")))
        summary = b"".join(
            bytes_field(1, bytes_field(1, tag.encode(errors="replace")) + varint(2 << 3 | 5) + struct.pack("<f", value))
            for tag, value in values.items())
        events.append(event(seconds, step, bytes_field(5, summary)))
    return b"".join(events)


def write(run, data):
    """Appends what is missing, or replaces a file that begins otherwise. Returns the number of bytes written."""
    path = os.path.join(run, EVENTS)
    written = b""
    if os.path.exists(path):
        with open(path, "rb") as file:
            written = file.read()
    if written and data.startswith(written):
        with open(path, "ab") as file:
            file.write(data[len(written):])
        return len(data) - len(written)
    if data == written:
        return 0
    temporary = os.path.join(run, "moelab.events.tmp")  # TensorBoard reads every name with "tfevents" in it
    with open(temporary, "wb") as file:
        file.write(data)
    os.replace(temporary, path)
    return len(data)


# ---- all runs

def find_runs(directories):
    def unreadable(error):
        raise error

    for directory in directories:
        for folder, below, files in os.walk(directory, onerror=unreadable):
            below.sort()
            if "log.jsonl" in files:
                yield folder


def convert(directories, seen):
    """One pass over all runs; seen: run -> state of its log when it was read last."""
    for run in find_runs(directories):
        log = os.path.join(run, "log.jsonl")
        status = os.stat(log)
        state = (status.st_ino, status.st_size, status.st_mtime_ns)
        if seen.get(run) == state:
            continue
        seen[run] = state
        lines = read_log(log)
        count = write(run, encode(lines)) if lines else 0
        print(f"{run}: {len(lines)} lines, {count} bytes written", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="+", help="a run, or a directory with runs below it")
    parser.add_argument("--follow", action="store_true", help="go on watching the logs")
    parser.add_argument("--every", type=float, default=5, metavar="SECONDS", help="how often --follow looks (5)")
    options = parser.parse_args()
    seen = {}
    try:
        convert(options.directory, seen)
        while options.follow:
            time.sleep(options.every)
            convert(options.directory, seen)
    except OSError as error:
        sys.exit(f"to_tensorboard: {error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        pass
    if not seen:
        sys.exit(f"to_tensorboard: no log.jsonl in {' '.join(options.directory)} or below: name a run or runs")


if __name__ == "__main__":
    main()
