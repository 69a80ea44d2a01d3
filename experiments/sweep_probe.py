"""What short runs in a scratch folder say of every arm before the sweep begins: that ./train takes its options, the
configuration they amount to, FLOPs, parameters and memory, and, for a dry run, the time of a step.

    probes = Prober(program, environment, cache).probe(options)     ProbeError: the trainer's own words

A probe is a dictionary: config, device, params_total, params_active, flops_per_token, leaky, sees_batch, memory (bytes
by category), and with `steps`: ms (of a step) and peak_bytes.
"""
import json
import os
import shutil
import subprocess
import tempfile

import run_record
import sweep_recipe

TIMED_STEPS = 8


class ProbeError(Exception):
    """What the trainer said."""


def last_line(text):
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def trainer_words(output):
    """The trainer's own last line, without the place in its source."""
    said = [line for line in output.splitlines() if line.startswith("moelab: ")]
    text = said[-1][len("moelab: "):] if said else last_line(output)
    return text.rsplit(" [", 1)[0] if text.endswith("]") else text


class Prober:
    def __init__(self, program, environment, cache, befores):
        self.program = program  # words
        self.environment = environment
        self.cache = cache
        self.befores = befores  # name -> options of each run that others start from, in this size
        self.scratch = tempfile.mkdtemp(prefix="sweep")
        self.made = {}

    def close(self):
        shutil.rmtree(self.scratch, ignore_errors=True)

    def identity(self):
        """Changes when the program does."""
        path = shutil.which(self.program[-1]) or self.program[-1]
        status = os.stat(path)
        return [os.path.realpath(path), status.st_size, status.st_mtime_ns]

    def before(self, name):
        """A folder to start from: the run NAME with no steps done."""
        key = json.dumps([name, self.befores[name]])
        if key not in self.made:
            folder = os.path.join(self.scratch, f"before-{len(self.made)}")
            options = sweep_recipe.merge_options(self.befores[name], [("--steps", "0"), ("--eval-every", "0")])
            self.run(self.resolve(options), folder)
            self.made[key] = folder
        return self.made[key]

    def resolve(self, options):
        """The options with a folder for each {name}."""
        resolved = []
        for name, value in options:
            for before in sweep_recipe.befores_named([(name, value)]):
                value = value.replace("{" + before + "}", self.before(before))
            resolved.append((name, value))
        return resolved

    def run(self, options, folder):
        words = self.program + sweep_recipe.option_words(options) + ["--out", folder]
        done = subprocess.run(words, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, errors="replace")
        if done.returncode != 0:
            raise ProbeError(trainer_words(done.stdout))
        log = run_record.read_log(os.path.join(folder, "log.jsonl"))
        if not log.header:
            raise ProbeError(f"no log was written: {last_line(done.stdout)}")
        return log, done.stdout

    def run_fresh(self, options, folder):
        shutil.rmtree(folder, ignore_errors=True)
        return self.run(options, folder)

    def probe(self, options, timed=False):
        steps = str(TIMED_STEPS) if timed else "0"
        options = sweep_recipe.merge_options(options, [("--steps", steps), ("--eval-every", "0")])
        if timed:
            options = sweep_recipe.merge_options(options, [("--log-every", "1"), ("--eval-batches", "1"),
                                                           ("--save-every", "0")])
        wanted = {before: self.befores[before] for before in sweep_recipe.befores_named(options)}
        threads = self.environment.get("OMP_NUM_THREADS") if timed else None
        key = json.dumps([self.identity(), options, wanted, threads])
        if key not in self.cache:
            folder = os.path.join(self.scratch, "probe")
            log, _ = self.run_fresh(self.resolve(options), folder)
            found = {name: log.header.get(name) for name in
                     ("config", "device", "params_total", "params_active", "flops_per_token", "leaky", "sees_batch")}
            memory = log.event("memory") or {}
            found["memory"] = {name: size for name, size in memory.items() if name != "event"}
            if timed:
                found["ms"] = run_record.middle(log.steps)
                found["peak_bytes"] = (log.event("end") or {}).get("peak_bytes")
            self.cache[key] = found
        return self.cache[key]
