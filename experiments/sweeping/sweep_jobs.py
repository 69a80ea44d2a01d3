"""Runs side by side: where they run, how they are started, watched, resumed and stopped.

A slot is a place for one run at a time: a GPU (CUDA_VISIBLE_DEVICES), or a share of the cores (OMP_NUM_THREADS; idle
threads sleep, so that runs side by side do not take each other's cores). Runs get a process group of their own, so that
Ctrl-C reaches the sweep alone, which asks each run once to save and stop; and they end with the sweep, however it ends.

    jobs = Jobs(program, slots, folder)
    jobs.start(run, words)          in a free slot; goes on from a checkpoint where the run's directory has one
    for job in jobs.finished(): ...
"""
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import run_record

SET_PARENT_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG
try:
    PRCTL = ctypes.CDLL(None, use_errno=True).prctl if sys.platform.startswith("linux") else None
except (OSError, AttributeError):
    PRCTL = None


def cores():
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def all_gpus():
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [name for name in allowed.split(",") if name.strip()]
    try:
        answer = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True,
                                text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return answer.stdout.split() if answer.returncode == 0 else []


class Slot:
    def __init__(self, gpu, threads, beside):
        self.gpu, self.threads, self.beside = gpu, threads, beside  # beside: runs at the same time on its device
        self.job = None

    def environment(self):
        environment = dict(os.environ, OMP_NUM_THREADS=str(self.threads))
        if self.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpu
        if self.beside > 1 or self.gpu is not None:
            environment["OMP_WAIT_POLICY"] = "passive"
        return environment


def make_slots(gpus, per_gpu, jobs, threads):
    """gpus: names, empty for the CPU. jobs, threads: None for what fits."""
    if gpus:
        places = [gpu for _ in range(per_gpu) for gpu in gpus][:jobs]
        threads = threads or max(1, cores() // len(places))
        return [Slot(gpu, threads, places.count(gpu)) for gpu in places]
    jobs = jobs or 1
    return [Slot(None, threads or max(1, cores() // jobs), jobs) for _ in range(jobs)]


def end_with_parent(parent):
    """For the child, before it becomes the trainer: the kernel ends it when the sweep is gone."""
    if PRCTL is not None:
        PRCTL(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


def start_trainer(words, environment, output, lock):
    """The trainer in a process group of its own, which ends when this process does. output: an open file. lock: a
    descriptor that it keeps open."""
    parent = os.getpid()
    return subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                            pass_fds=(lock,), start_new_session=True, preexec_fn=lambda: end_with_parent(parent))


def last_words(path, begin=0):
    """The error line that the trainer left in its output from byte `begin` on, without the place in its source; else
    its last line."""
    try:
        with open(path, "rb") as file:
            file.seek(begin)
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        return "its output is gone"
    said = [line[len("moelab: "):] for line in lines if line.startswith("moelab: ")]
    if said:
        return said[-1].rsplit(" [", 1)[0] if said[-1].endswith("]") else said[-1]
    if not lines and shutil.disk_usage(os.path.dirname(path)).free == 0:
        return "it could not say why: the disk is full"
    return lines[-1] if lines else "it said nothing"


def has_checkpoint(folder):
    """Whether a run can go on from there: an interrupted save leaves the newest checkpoint under another name."""
    return any(os.path.exists(os.path.join(folder, name, "manifest.json"))
               for name in ("checkpoint", "checkpoint.tmp", "checkpoint.old"))


class Job:
    def __init__(self, run, process, slot, output, begin, resumed):
        self.run, self.process, self.slot, self.resumed = run, process, slot, resumed
        self.output, self.begin = output, begin  # a resumed run appends to what the run had said before: from there on
        self.began = time.monotonic()

    def said(self):
        return last_words(self.output, self.begin)

    def blames_checkpoint(self):
        """Whether a resumed run ended because of what it was to go on from; then it can only begin again. Where it
        ended otherwise (no memory, a full disk, a signal) its checkpoint is as good as before."""
        return (self.resumed and self.process.returncode == 1
                and re.search("--resume|resume with the program", self.said()) is not None)

    def log(self):
        return run_record.read_log(os.path.join(self.run.folder, "log.jsonl"))

    def share_done(self):
        """How much of the run is done, read from the end of its log."""
        try:
            with open(os.path.join(self.run.folder, "log.jsonl"), "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 20000))
                tail = file.read().decode(errors="replace")
        except OSError:
            return 0.0
        steps = [int("".join(c for c in piece[:12].split(",")[0] if c.isdigit()) or 0)
                 for piece in tail.split('{"step":')[1:]]
        return min(1.0, max(steps, default=0) / self.run.steps)


class Jobs:
    def __init__(self, program, slots, folder):
        self.program, self.slots, self.folder = program, slots, folder
        self.running = []

    def free_slot(self):
        """One on the GPU that has least to do; None when all are taken."""
        free = [slot for slot in self.slots if slot.job is None]
        busy = [job.slot.gpu for job in self.running]
        return min(free, key=lambda slot: busy.count(slot.gpu)) if free else None

    def start(self, run, words, resume):
        """resume: the run's directory holds a checkpoint of this very run; without it what is there is removed."""
        slot = self.free_slot()
        if not resume:
            shutil.rmtree(run.folder, ignore_errors=True)
        os.makedirs(run.folder, exist_ok=True)
        words = ["--resume", run.folder] if resume else words + ["--out", run.folder]
        output = os.path.join(run.folder, "output.txt")
        with open(output, "ab") as file:
            begin = file.tell()
            process = start_trainer(self.program + words, slot.environment(), file, self.folder.lock)
        slot.job = Job(run, process, slot, output, begin, resume)
        self.running.append(slot.job)
        return slot.job

    def finished(self):
        """Jobs that have ended since the last call; their slots are free again."""
        ended = [job for job in self.running if job.process.poll() is not None]
        for job in ended:
            self.running.remove(job)
            job.slot.job = None
        return ended

    def stop(self, patience=60):
        """Asks all runs to save and stop, ends those that do not within `patience` seconds."""
        for job in self.running:
            job.process.terminate()
        deadline = time.monotonic() + patience
        for job in self.running:
            try:
                job.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                job.process.kill()
                job.process.wait()
