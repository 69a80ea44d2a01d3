"""The folder of a sweep: who may work in it, the recipe it was made by, its results, its log.

    FOLDER/recipe            a copy of the recipe, with what --steps said
    FOLDER/results.jsonl     one line for each finished run and each timing: result_lines.py
    FOLDER/sweep.log         what was done when
    FOLDER/probes.json       what short runs said of the arms (configuration, FLOPs, time of a step): a cache
    FOLDER/lock              the process at work
    FOLDER/scratch/          of probes and timings; gone at the end
    FOLDER/runs/SIZE/ARM/RATE-SEED/     a run's directory as ./train writes it, and output.txt

The lock is held by the sweep and by every run it starts (they inherit the descriptor), so a second sweep waits until
the last run of a killed one is gone, and a sweep at work is never joined.
"""
import datetime
import fcntl
import json
import os
import sys
import time

import result_lines
import sweep_recipe

WAIT_FOR_ORPHANS = 30  # seconds


class FolderError(Exception):
    """One line that says what to do."""


def now():
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def is_alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class Folder:
    def __init__(self, path):
        self.path = path
        self.results = os.path.join(path, "results.jsonl")
        self.lock = None  # its descriptor
        self.ours = False  # whether this process holds it
        self.log_file = None

    def inside(self, *names):
        return os.path.join(self.path, *names)

    def open(self):
        """Makes the folder and takes its lock; FolderError says who has it or why it cannot be written."""
        try:
            os.makedirs(self.path, exist_ok=True)
            self.lock = os.open(self.inside("lock"), os.O_RDWR | os.O_CREAT, 0o666)
            self.log_file = os.open(self.inside("sweep.log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise FolderError(f"--out {self.path}: cannot write there ({error.strerror}): choose another "
                              "folder") from None
        self.take_lock()

    def take_lock(self):
        deadline = time.monotonic() + WAIT_FOR_ORPHANS
        while True:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                owner = os.pread(self.lock, 64, 0).decode(errors="replace").strip()
                if owner.isdigit() and is_alive(int(owner)):
                    raise FolderError(f"--out {self.path}: process {owner} is at work there: wait for it, or choose "
                                      "another folder") from None
                if time.monotonic() > deadline:
                    raise FolderError(f"--out {self.path}: runs of a killed sweep are still going: end them, or choose "
                                      "another folder") from None
                time.sleep(0.1)
        self.ours = True
        os.ftruncate(self.lock, 0)
        os.pwrite(self.lock, f"{os.getpid()}\n".encode(), 0)

    def say(self, text):
        """A line for the user, kept in sweep.log."""
        try:
            print(text, flush=True)
        except OSError:  # nobody reads, or a full disk: sweep.log has it
            pass
        self.note(text)

    def note(self, text):
        """A line for sweep.log alone. Where it cannot be written nothing ends: no run depends on it."""
        if self.log_file is not None:
            try:
                os.write(self.log_file, f"{now()}  {text}\n".encode())
            except OSError:
                pass

    # ---- recipe

    def check_recipe(self, recipe, records):
        """A recipe that changed what earlier results were made by is refused. Its text is in the results, too."""
        path = self.inside("recipe")
        texts = [record["text"] for record in records if record.get("kind") == "recipe" and record.get("text")]
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                texts.append(file.read())
        if not texts:
            return
        earlier = sweep_recipe.parse(texts[-1], path)
        changed = sweep_recipe.difference(earlier, recipe)
        if changed:
            raise FolderError(f"--out {self.path}: made by a recipe with another {changed} ({path}): add arms, sizes, "
                              "seeds or rates, or choose another folder")

    def replace(self, name, text):
        """Gives the file NAME new content, all of it or none."""
        temporary = self.inside(name + ".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.inside(name))

    # ---- results

    def read_results(self):
        cut = result_lines.mend(self.results)
        if cut:
            self.say(f"results.jsonl ended in half a line: {cut} bytes cut off, the line is made again")
        return result_lines.read(self.results) if os.path.exists(self.results) else []

    def append(self, record):
        result_lines.append(self.results, record)

    # ---- cache

    def read_probes(self):
        try:
            with open(self.inside("probes.json"), encoding="utf-8") as file:
                probes = json.load(file)
        except (OSError, ValueError):
            return {}
        return probes if isinstance(probes, dict) else {}

    def write_probes(self, probes):
        self.replace("probes.json", json.dumps(probes, indent=1) + "\n")


def fail(message):
    print(f"sweep: {message}", file=sys.stderr)
    sys.exit(1)
