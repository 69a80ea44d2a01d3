"""What short runs in a scratch folder say of every arm before the sweep begins: that ./train takes its options, the
configuration they amount to, FLOPs, parameters and memory, and, for a dry run, the time of a step.

    probe = Prober(program, environment, cache, befores, scratch, lock).probe(options)
    ProbeError: the trainer's own words

A probe is a dictionary: config, device, params_total, params_active, flops_per_token, leaky, sees_batch, memory (bytes
by category), and with `steps`: ms (of a step) and peak_bytes.
"""
import json
import os
import shutil

import run_record
import sweep_jobs
import sweep_recipe

TIMED_STEPS = 12


class ProbeError(Exception):
    """What the trainer said."""


class Prober:
    def __init__(self, program, environment, cache, befores, scratch, lock):
        self.program = program  # words
        self.environment = environment
        self.cache = cache
        self.befores = befores  # name -> options of each run that others start from, in this size
        self.scratch, self.lock = scratch, lock
        self.made = {}

    def identity(self):
        """Changes when the program does."""
        path = shutil.which(self.program[-1]) or self.program[-1]
        status = os.stat(path)
        return [os.path.realpath(path), status.st_size, status.st_mtime_ns]

    def before(self, name):
        """A folder to start from: the run NAME with no steps done."""
        key = json.dumps([name, self.befores[name]])
        if key not in self.made:
            options = sweep_recipe.merge_options(self.befores[name], [("--steps", "0"), ("--eval-every", "0")])
            options = self.resolve(options)  # which makes what it starts from itself
            folder = os.path.join(self.scratch, f"before-{len(self.made)}")
            self.run(options, folder)
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
        """The log and the output of a run in the folder, which is emptied before."""
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        output = os.path.join(folder, "output.txt")
        with open(output, "wb") as file:
            process = sweep_jobs.start_trainer(self.program + sweep_recipe.option_words(options) + ["--out", folder],
                                               self.environment, file, self.lock)
        try:
            process.wait()
        finally:
            process.kill()  # where the wait was interrupted
            process.wait()
        log = run_record.read_log(os.path.join(folder, "log.jsonl"))
        if process.returncode != 0 or not log.header:
            raise ProbeError(sweep_jobs.last_words(output))
        with open(output, encoding="utf-8", errors="replace") as file:
            return log, file.read()

    def probe(self, options, timed=False):
        steps = str(TIMED_STEPS) if timed else "0"
        options = sweep_recipe.merge_options(options, [("--steps", steps), ("--eval-every", "0")])
        if timed:
            options = sweep_recipe.merge_options(options, [("--log-every", "1"), ("--eval-batches", "1"),
                                                           ("--save-every", "0"), ("--warmup", "1")])
        wanted = {before: self.befores[before] for before in sweep_recipe.befores_named(options)}
        threads = self.environment.get("OMP_NUM_THREADS") if timed else None
        key = json.dumps([self.identity(), options, wanted, threads])
        if key not in self.cache:
            folder = os.path.join(self.scratch, "probe")
            log, _ = self.run(self.resolve(options), folder)
            found = {name: log.header.get(name) for name in
                     ("config", "device", "params_total", "params_active", "flops_per_token", "leaky", "sees_batch")}
            memory = log.event("memory") or {}
            found["memory"] = {name: size for name, size in memory.items() if name != "event"}
            if timed:
                found["ms"] = run_record.middle(log.steps)
                found["peak_bytes"] = (log.event("end") or {}).get("peak_bytes")
            self.cache[key] = found
        return self.cache[key]
