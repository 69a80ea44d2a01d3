"""What the notebooks share to start the built programs and to read what they leave.

    run = train("balanced", "--router topk --steps 300")    # ./train, in build/notebooks/runs/balanced
    run.steps[-1]["loss"], run.column("load_cv"), run.evaluations[-1]["mi"], run.header["device"]
    program("build/bench_train --model none")                # any other program; returns what it printed
    results("gpu_compare")                                   # lines of experiments/results/gpu_compare.jsonl
    steps(600)                                               # 600, or NOTEBOOK_STEPS where that is less

A run is a folder with log.jsonl, one JSON object a line (model/log.h): the header, then lines of steps, evaluations and
events, told apart by their keys. The program's messages are kept in build/notebooks/runs/NAME.txt and shown when it
fails. Nothing here trains: that is ./train. Read next: 03_balance.ipynb, which uses all of it.
"""
import json
import os
import pathlib
import shlex
import shutil
import struct
import subprocess

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
RUNS = ROOT / "build" / "notebooks" / "runs"


def steps(wanted):
    """So many training steps, or NOTEBOOK_STEPS where that is less: continuous integration has little time."""
    return min(wanted, int(os.environ.get("NOTEBOOK_STEPS", wanted)))


class ProgramFailed(Exception):
    pass


def program(command, ranks=0, threads=None):
    """Runs COMMAND (its first word a path in the repository), under mpirun when ranks > 0. Returns its output."""
    words = shlex.split(command)
    if not (ROOT / words[0]).exists():
        raise ProgramFailed(f"{words[0]} is not built: run `make notebooks`, or `make {words[0]}`")
    environment = dict(os.environ, OMP_WAIT_POLICY="passive")
    if threads or ranks:
        environment["OMP_NUM_THREADS"] = str(threads or 1)
    if ranks:
        if not shutil.which("mpirun"):
            raise ProgramFailed("there is no mpirun here: sudo apt-get install openmpi-bin libopenmpi-dev, then make")
        words = ["mpirun", "-n", str(ranks), "--oversubscribe", "--bind-to", "none", "--quiet"] + words
        environment.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
                           OMPI_MCA_btl_vader_single_copy_mechanism="none")  # containers often forbid the other
    done = subprocess.run(words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, universal_newlines=True)
    if done.returncode != 0:
        raise ProgramFailed(f"{command}\nended with status {done.returncode}:\n{done.stdout[-2000:]}")
    return done.stdout


class Run:
    """A run's log: header, steps, evaluations, events."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.header, self.steps, self.evaluations, self.events = {}, [], [], []
        path = self.folder / "log.jsonl"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                entry = json.loads(line)
            except ValueError:
                raise ProgramFailed(f"{path.name}, line {number} is not JSON: {line[:60]}") from None
            if "config" in entry:
                self.header = entry
            elif "event" in entry:
                self.events.append(entry)
            elif "val_loss" in entry:
                self.evaluations.append(entry)
            elif "loss" in entry:
                self.steps.append(entry)

    def column(self, key):
        """One figure of all step lines, as an array; what the log says is null is NaN."""
        return np.array([np.nan if s.get(key) is None else s[key] for s in self.steps], dtype=float)

    def counts(self, router=0):
        """(logged steps, experts) tokens that each expert was chosen by."""
        return np.array([s["counts"][router] for s in self.steps])

    def event(self, name):
        return next((e for e in self.events if e["event"] == name), None)

    def source(self):
        """What the numbers come from, for captions."""
        sha = self.header["git_sha"] + ("-dirty" if self.header["git_dirty"] else "")
        return f"{self.header['device']}, commit {sha}"


def train(name, options, ranks=0, threads=None):
    """Runs ./train OPTIONS in a fresh folder and returns its log."""
    folder = RUNS / name
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    RUNS.mkdir(parents=True, exist_ok=True)
    output = program(f"./train {options} --out {shlex.quote(str(folder.relative_to(ROOT)))}", ranks, threads)
    (RUNS / f"{name}.txt").write_text(output, encoding="utf-8")
    run = Run(folder)
    run.output = output
    return run


def tensors(folder):
    """The weights in a run's checkpoint as NumPy arrays: 8 bytes of length, a JSON header, then the numbers."""
    data = (pathlib.Path(folder) / "checkpoint" / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8:8 + length]), data[8 + length:]
    arrays = {}
    for tensor, entry in header.items():
        if tensor != "__metadata__":
            begin, end = entry["data_offsets"]
            dtype = {"F32": "<f4", "F64": "<f8"}[entry["dtype"]]
            arrays[tensor] = np.frombuffer(body[begin:end], dtype).reshape(entry["shape"]).astype(np.float64)
    return arrays


def trace(path):
    """What --dump-routing wrote (model/trace.h): experts (steps, slices, routers, N, K); 65535 where there is none."""
    magic, version, n, k, _, routers, slices, _ = np.fromfile(path, "<i4", count=8)
    assert (magic, version) == (20261121, 1), f"{path} is no routing trace"
    return np.fromfile(path, "<u2", offset=1024).reshape(-1, slices, routers, n, k)


def results(name):
    """Committed measurements: the lines of experiments/results/NAME.jsonl."""
    path = ROOT / "experiments" / "results" / f"{name}.jsonl"
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            raise ProgramFailed(f"{path.name}, line {number} is not JSON: {line[:60]}") from None
    return lines
