#!/usr/bin/env python3
"""The ladder's lines as Markdown: levels down, shapes across, microseconds; a table for each number of ranks.

    experiments/alltoall/table.py [FILE] [--counts SHAPE]

FILE: JSON lines of the levels, by default experiments/results/alltoall_ladder.jsonl, to which run.sh appends. Of
several lines of one level, shape, number of ranks and device the last one counts; lines of other programs are skipped.
A last table has what one exchange of SHAPE (default: the first one) does on the most ranks. Standard library alone.
"""
import argparse
import json
import os
import sys

RESULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "results", "alltoall_ladder.jsonl")
SHAPES = ["b1", "b2", "b3", "b4", "b5", "t1", "t2", "t3"]  # others follow, in the order in which they come
FIELDS = {"level", "shape", "ranks", "us", "bytes", "exchanges", "host_waits", "launches", "device", "commit"}


def read(path):
    """{(device, ranks): {(level, shape): line}}"""
    groups = {}
    with open(path, encoding="utf-8") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:  # what mpirun says, or half a line
                continue
            if isinstance(line, dict) and FIELDS <= line.keys():
                group = groups.setdefault((line["device"], line["ranks"]), {})
                group[line["level"], line["shape"]] = line
    return groups


def shapes_of(group):
    names = list(dict.fromkeys(shape for _, shape in group))
    return sorted(names, key=lambda name: SHAPES.index(name) if name in SHAPES else len(SHAPES))


def levels_of(group):
    return sorted({level for level, _ in group})


def print_table(title, head, rows):
    print(f"\n{title}\n")
    print("| " + " | ".join(head) + " |")
    print("|---" + "|---:" * (len(head) - 1) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def title(device, ranks, lines, what):
    commits = ", ".join(dict.fromkeys(line["commit"] for line in lines))
    return f"{ranks} x {device}, commit {commits}: {what}"


def print_times(device, ranks, group):
    shapes = shapes_of(group)
    rows = [[level] + [f"{group[level, shape]['us']:.1f}" if (level, shape) in group else "-" for shape in shapes]
            for level in levels_of(group)]
    what = "microseconds from x to y, median of the slowest rank"
    print_table(title(device, ranks, group.values(), what), ["level"] + shapes, rows)


def print_counts(device, ranks, group, shape):
    lines = [group[level, shape] for level in levels_of(group) if (level, shape) in group]
    rows = [[line["level"], f"{line['bytes']:,.0f}"] +
            [str(line[key]) for key in ("exchanges", "host_waits", "launches")] for line in lines]
    head = ["level", "bytes", "exchanges", "waits of the host", "launches"]
    what = f"what one exchange of {shape} does; bytes to others, of the rank that sends most"
    print_table(title(device, ranks, lines, what), head, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", default=RESULTS)
    parser.add_argument("--counts", metavar="SHAPE")
    options = parser.parse_args()
    try:
        groups = read(options.file)
    except OSError as error:
        sys.exit(f"table.py: {options.file}: {error.strerror}")
    if not groups:
        sys.exit(f"table.py: {options.file}: no line of the ladder")
    for device in dict.fromkeys(device for device, _ in groups):
        counts = sorted(ranks for other, ranks in groups if other == device)
        for ranks in counts:
            print_times(device, ranks, groups[device, ranks])
        most = groups[device, counts[-1]]
        shape = options.counts or shapes_of(most)[0]
        if shape not in shapes_of(most):
            sys.exit(f"table.py: {options.file}: no line of shape {shape} on {counts[-1]} x {device}")
        print_counts(device, counts[-1], most, shape)


main()
