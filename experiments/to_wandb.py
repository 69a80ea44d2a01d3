#!/usr/bin/env python3
"""Sends a run to Weights & Biases while it trains, or afterwards: follows RUN/log.jsonl until the run's end,
or until Ctrl-C.

    pip install wandb && wandb login
    experiments/to_wandb.py RUN [--project NAME]
    experiments/to_wandb.py --dry-run RUN     prints what it would send, as JSON; needs no wandb

The trainer knows nothing of this: lines are read from its log (model/log.h), and a number has the same name as in
to_tensorboard.py, beside this file. The header's options become the run's configuration.
"""
import argparse
import json
import os
import sys
import time

sys.dont_write_bytecode = True  # of the import: leave no folder behind
from to_tensorboard import numbers_over_steps, read_log


class DryRun:
    """In place of wandb and its run."""

    def init(self, **about):
        print(json.dumps(about))
        return self

    def log(self, values, step):
        print(json.dumps({"step": step, **values}))

    def finish(self):
        pass


def import_wandb():
    try:
        import wandb
    except ImportError:
        sys.exit("to_wandb: the package wandb is not installed: pip install wandb, or try --dry-run")
    return wandb


def follow(path, options):
    """Yields the log's lines over and over, as they are, until the last one is that which ends a run."""
    while True:
        try:
            lines = read_log(path)
        except OSError as error:
            sys.exit(f"to_wandb: {path}: {error.strerror}: name a run's directory, with its log.jsonl")
        yield lines
        if options.dry_run or lines and lines[-1].get("event") == "end":
            return
        time.sleep(options.every)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's directory")
    parser.add_argument("--project", default="moelab")
    parser.add_argument("--dry-run", action="store_true", help="print what is there, send nothing")
    parser.add_argument("--every", type=float, default=5, metavar="SECONDS", help="how often to look at the log (5)")
    options = parser.parse_args()
    wandb = DryRun() if options.dry_run else import_wandb()
    target, sent = None, 0
    try:
        for lines in follow(os.path.join(options.run, "log.jsonl"), options):
            if not lines:
                continue  # a run that is starting
            if target is None:
                name = os.path.basename(os.path.abspath(options.run))
                target = wandb.init(project=options.project, name=name, config=lines[0].get("config"))
            entries = list(numbers_over_steps(lines))
            for _, step, values in entries[sent:]:
                target.log(values, step=step)
            sent = max(sent, len(entries))  # what a resume cut from the log and trains again is not sent again
    except KeyboardInterrupt:
        pass
    if target is not None:
        target.finish()


if __name__ == "__main__":
    main()
