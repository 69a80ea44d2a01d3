"""The course of a sweep: check every arm, make the runs that are missing, then time every arm alone.

Called by sweep with what its command line said. The order of things: the folder's lock and recipe; a probe of every arm
(sweep_probe.py), so that a typing error is told before the first run; the timings, where the budget is seconds; the
runs (sweep_plan.py says which, sweep_jobs.py where); the timings.
"""
import concurrent.futures
import os
import queue
import shlex
import shutil
import tempfile
import time

import result_lines
import run_record
import sweep_dry
import sweep_folder
import sweep_jobs
import sweep_plan
import sweep_probe
import sweep_recipe
import sweep_timing

MOST_PROBES = 8  # at the same time


class Control:
    def __init__(self, recipe, options, program, gpus, sizes, arms, seeds):
        self.recipe, self.options, self.program, self.gpus = recipe, options, program, gpus
        self.temporary = None if options.out else tempfile.mkdtemp(prefix="sweep")
        self.folder = sweep_folder.Folder(options.out or self.temporary)
        self.slots = sweep_jobs.make_slots(gpus, options.per_gpu, options.jobs, options.threads)
        self.probers = {}
        self.records, self.losses, self.broken, self.restarted = [], {}, {}, set()
        self.pace = {}  # (size, arm) -> seconds of a step among the others
        self.plan = sweep_plan.Plan(recipe, self.folder, arms, sizes, seeds)

    def main(self):
        try:
            self.folder.open()
            shutil.rmtree(self.folder.inside("scratch"), ignore_errors=True)
            if self.options.dry_run:
                self.probe_arms()
                sweep_dry.print_plan(self)
                return 0
            self.records = self.folder.read_results()
            if self.records:
                self.folder.check_recipe(self.recipe, self.records)
            self.probe_arms()
            self.keep_question()
            return self.work()
        finally:
            if self.folder.ours:
                shutil.rmtree(self.folder.inside("scratch"), ignore_errors=True)
            if self.temporary:
                shutil.rmtree(self.temporary, ignore_errors=True)

    def work(self):
        timed = not self.options.no_timing
        if self.recipe.budget != "seconds":
            self.plan.scale_steps({})
            self.losses, _ = self.plan.finished(self.records)
        if self.recipe.budget == "seconds" or self.options.timing_only:
            self.time_arms(measure=timed)
        if not self.options.timing_only:
            self.plan.scale_steps(self.times())
            self.make_runs()
            if timed:
                self.time_arms()
        return self.conclude()

    # ---- before the first run

    def alone(self):
        """The place of a run that has the device to itself."""
        threads = sweep_jobs.cores()
        if self.options.threads and not self.gpus:
            threads = self.options.threads * len(self.slots)
        return sweep_jobs.Slot(self.gpus[0] if self.gpus else None, threads, 1)

    def prober(self, size, slot, name):
        """name: of the place, for its scratch folder."""
        key = size, name
        if key not in self.probers:
            befores = {before: self.plan.options(size, before, "before") for before in self.recipe.befores}
            self.probers[key] = sweep_probe.Prober(self.program, slot.environment(), self.probes, befores,
                                                   self.folder.inside("scratch", f"{size}-{name}"), self.folder.lock)
        return self.probers[key]

    def probe_arms(self):
        """Lets the trainer look at every arm; what it refuses ends the sweep with the arm's line in the recipe."""
        self.probes = self.folder.read_probes()
        known = len(self.probes)
        arms = self.plan.arms + [arm for arm in [self.recipe.baseline] if arm not in self.plan.arms]
        todo = [(size, arm) for size in self.plan.sizes for arm in arms]
        places = queue.SimpleQueue()
        for number, slot in enumerate(self.slots[:MOST_PROBES]):
            places.put((str(number), slot))

        def probe(task):
            name, slot = place = places.get()
            try:
                return self.prober(task[0], slot, name).probe(self.plan.first_options(*task))
            except sweep_probe.ProbeError as error:
                return error
            finally:
                places.put(place)

        with concurrent.futures.ThreadPoolExecutor(len(self.slots[:MOST_PROBES])) as pool:
            found = dict(zip(todo, pool.map(probe, todo)))
        for (size, arm), probe in found.items():
            if isinstance(probe, sweep_probe.ProbeError):
                raise sweep_recipe.RecipeError(f"{self.recipe.where('arm', arm)}: arm {arm} of size {size}: "
                                               f"{self.program[-1]} says: {probe}")
        self.plan.probes.update(found)
        self.plan.defaults = self.prober(self.plan.sizes[0], self.slots[0], "0").probe([])["config"]
        if len(self.probes) > known:
            self.folder.write_probes(self.probes)
        unequal = self.plan.unequal_tokens()
        if unequal:
            size, arm, mine, theirs = unequal
            raise sweep_recipe.RecipeError(
                f"{self.recipe.where('arm', arm)}: arm {arm} of size {size} draws {mine} tokens and the baseline "
                f"{theirs}: give both the same --steps x --batch x --seq, or choose 'budget flops' or 'budget seconds'")

    def keep_question(self):
        """The recipe among its results, so that they say what was asked and expected."""
        r = self.recipe
        record = {"kind": "recipe", "ts": sweep_folder.now(), "sweep": r.name, "question": r.question,
                  "expect": r.expect, "baseline": r.baseline, "budget": r.budget, "seeds": r.seeds,
                  "rate_seeds": r.rate_seeds, "rates": {size: r.rates_of(size) for size in r.sizes},
                  "sizes": list(r.sizes), "arms": list(r.arms), "text": r.text}
        other = next((old["sweep"] for old in self.records if old.get("sweep") not in (None, r.name)), None)
        if other:
            raise sweep_folder.FolderError(f"--out {self.folder.path}: holds the sweep {other}, this one is {r.name}: "
                                           "choose another folder")
        self.folder.replace("recipe", r.text)
        if not any(old.get("kind") == "recipe" and old.get("text") == r.text for old in self.records):
            self.keep(record)

    def keep(self, record):
        self.folder.append(record)
        self.records.append(record)

    # ---- timing

    def times(self, trained=False):
        """ms of a step by (size, arm), of timings that are of the arms as they are; trained: of trained weights."""
        _, _, timings = result_lines.sort_out(self.records)
        found = {}
        for size in self.plan.sizes:
            for arm in self.recipe.arms:
                record = timings.get((self.recipe.name, size, self.recipe.budget, arm))
                if trained and record and record.get("weights") != "trained":
                    continue
                if record and (size, arm) in self.plan.probes and sweep_timing.is_current(self.plan, record, size, arm):
                    found[size, arm] = record["ms"]
        return found

    def trained(self, prober, run):
        """(folder, steps) of the run, trained once more where its checkpoint is gone; None: there is no such run."""
        if run is None:
            return None
        folder = run.folder
        if not os.path.exists(os.path.join(folder, "checkpoint", "manifest.json")):
            folder = os.path.join(prober.scratch, "trained")
            prober.run(prober.resolve(sweep_recipe.merge_options(run.options, sweep_timing.QUIET)), folder)
        return folder, run.steps

    def time_arms(self, measure=True):
        known, slot = self.times(), self.alone()
        arms = self.plan.arms
        if self.recipe.budget == "seconds":
            arms = [self.recipe.baseline] + [arm for arm in arms if arm != self.recipe.baseline]
        for size in self.plan.sizes:
            for arm in arms:
                run = None if self.recipe.budget == "seconds" else self.plan.timed_run(size, arm, self.losses)
                if (size, arm) in (self.times(trained=True) if run else known):
                    continue
                if not measure:
                    raise sweep_folder.FolderError(f"budget seconds needs the time of a step of {arm}: leave "
                                                   "--no-timing out")
                prober = self.prober(size, slot, "alone")
                try:
                    record = sweep_timing.measure(self.plan, prober, size, arm, self.options.timing_steps,
                                                  self.trained(prober, run))
                except sweep_probe.ProbeError as error:
                    self.fail(("timing", size, arm), f"timing of {size} {arm}: {error}")
                    continue
                self.keep(record)
                self.tidy()
                beside = record["others_busy"]
                disturbed = f" (other processes kept {beside:.1f} cores busy)" if (beside or 0) > 0.5 else ""
                self.folder.say(f"timing {size} {arm}: {record['ms']:.4g} ms a step, {record['tok_s']:.0f} tokens/s"
                                f"{disturbed}")

    def fail(self, key, message):
        self.broken[key] = message
        self.folder.say(f"FAILED {message}")

    # ---- runs

    def make_runs(self):
        self.losses, stale = self.plan.finished(self.records)
        if stale:
            self.folder.say(f"{len(stale)} lines are of another configuration than ./train gives these options: their "
                            "runs are made again")
        self.tidy()
        self.jobs = sweep_jobs.Jobs(self.program, self.slots, self.folder)
        self.began = time.monotonic()
        self.learn_pace()
        wanted, later = self.plan.wanted(self.losses), self.plan.unknown(self.losses)
        if self.plan.pending(self.losses):
            finished = len(wanted) - len(self.plan.pending(self.losses))
            self.folder.say(f"{len(wanted) + len(later)} runs, {finished} of them finished, {len(self.slots)} at a "
                            "time")
        changed = True
        try:
            while True:
                for job in self.jobs.finished():
                    self.take(job)
                    changed = True
                if changed:
                    self.start_ready()
                    changed = False
                if not self.jobs.running:
                    break
                time.sleep(0.05)
        except BaseException:
            if self.jobs.running:
                self.folder.say(f"asking {len(self.jobs.running)} runs to save and stop")
            self.jobs.stop()
            raise

    def tidy(self):
        """Removes checkpoints of finished runs but for those that a timing will go on from."""
        timed = self.times(trained=True)
        for run in self.plan.wanted(self.losses) if not self.options.keep_runs else []:
            best = self.plan.best(run.size, run.arm, self.losses)
            awaited = run.seed == self.plan.first_seed() and best in (None, run.rate) and \
                (run.size, run.arm) not in timed and self.times_trained()
            if sweep_plan.key(run) in self.losses and not awaited:
                shutil.rmtree(os.path.join(run.folder, "checkpoint"), ignore_errors=True)

    def times_trained(self):
        return not self.options.no_timing and self.recipe.budget != "seconds"

    def start_ready(self):
        """Starts what can start until the slots are full. A run found finished in its directory needs none."""
        again = True
        while again:
            again = False
            active = {(job.run.kind,) + sweep_plan.key(job.run) for job in self.jobs.running}
            for run in self.plan.pending(self.losses):
                if not self.jobs.free_slot():
                    return
                todo = self.first_before(run)
                if todo is None or (todo.kind,) + sweep_plan.key(todo) in active:
                    continue
                if self.begin(todo):
                    active.add((todo.kind,) + sweep_plan.key(todo))
                else:
                    again = True  # it has a line by now, which may make other runs known
                    break

    def first_before(self, run):
        """The run itself, or one it starts from that is not made yet; None where something broke."""
        if (run.kind,) + sweep_plan.key(run) in self.broken:
            return None
        for before in self.plan.befores_of(run):
            log = run_record.read_log(os.path.join(before.folder, "log.jsonl"))
            whole = os.path.exists(os.path.join(before.folder, "checkpoint", "manifest.json"))
            if any(job.run == before for job in self.jobs.running):
                return before
            if not (whole and log.finished(before.steps) and self.plan.matches(before, log.header["config"])):
                return self.first_before(before)
            if not self.has_line(before):
                self.record(before, log, self.slots[0])  # the sweep was killed before it was written
        return run

    def has_line(self, before):
        return any(r.get("kind") == "before" and (r.get("size"), r.get("arm")) == (before.size, before.arm)
                   and self.plan.matches(before, r.get("config")) for r in self.records)

    def begin(self, run):
        """Starts the run, or takes its line from what its directory holds; False when it did the latter."""
        log = run_record.read_log(os.path.join(run.folder, "log.jsonl"))
        ours = log.header is not None and self.plan.matches(run, log.header["config"])
        for before in self.plan.befores_of(run):  # where one was trained anew, what began with the old one is stale
            start = run_record.read_log(os.path.join(before.folder, "log.jsonl")).header
            ours = ours and str(start and start.get("ts")) <= str(log.header.get("ts"))
        if ours and run.kind == "run" and (log.finished(run.steps) or log.diverged()):
            self.record(run, log, self.slots[0])
            return False
        resume = ours and sweep_jobs.has_checkpoint(run.folder)
        resume = resume and run not in self.restarted and not log.diverged()
        self.jobs.start(run, self.plan.words(run), resume)
        self.folder.note(f"{'resumed' if resume else 'started'} {run.name()}")
        return True

    def take(self, job):
        """What became of a run that ended."""
        run, log = job.run, job.log()
        if log.finished(run.steps) and job.process.returncode == 0 or log.diverged():
            if run.kind == "before" and log.diverged():
                self.fail((run.kind,) + sweep_plan.key(run), f"{run.name()}, which others start from: {log.diverged()}")
                return
            self.pace[run.size, run.arm] = (time.monotonic() - job.began) / run.steps
            self.record(run, log, job.slot)
        elif job.blames_checkpoint():
            self.restarted.add(run)
            self.folder.say(f"{run.name()} did not go on from its checkpoint ({job.said()}): from the start")
        else:
            code = job.process.returncode
            how = f"ended by signal {-code}" if code < 0 else f"exit status {code}"
            self.fail((run.kind,) + sweep_plan.key(run), f"{run.name()}, {how}: {job.said()} ({job.output})")

    def record(self, run, log, slot):
        """Appends the line of a run that came to its end, one way or the other."""
        why = log.diverged()
        record = {"kind": "before" if run.kind == "before" else "run", "sweep": self.recipe.name, "size": run.size,
                  "arm": run.arm, "rate": run.rate, "seed": run.seed, "budget": self.recipe.budget, "phase": run.phase,
                  "command": shlex.join(self.program + self.plan.words(run)), "side_by_side": slot.beside}
        record.update(run_record.summary(log))
        befores = self.plan.befores_of(run)
        if befores:
            record["before"] = {before.arm: before.steps for before in befores}
            record["before_tokens"] = self.plan.before_tokens(run.size, run.options)
        if why is None and not run_record.is_number(record["val_loss"]):
            why = "the validation loss is not finite"
        if why:
            record.update(kind="failed", why=why)
        self.keep(record)
        if run.kind == "before":
            self.folder.say(f"{run.name()}, which others start from, is trained")
            return
        self.losses, _ = self.plan.finished(self.records)
        self.tidy()
        outcome = f"diverged: {why}" if why else f"{record['val_loss']:.4f} nats, {record['train_seconds'] or 0:.0f} s"
        total = len(self.plan.wanted(self.losses)) + len(self.plan.unknown(self.losses))
        self.folder.say(f"{len(self.losses)}/{total}  {run.name()}: {outcome}{self.time_left()}")

    # ---- how long it will take

    def learn_pace(self):
        """From runs of earlier calls."""
        for record in self.records:
            if record.get("kind") == "run" and record.get("train_seconds") and record.get("steps"):
                self.pace[record["size"], record["arm"]] = record["train_seconds"] / record["steps"]

    def seconds_of(self, run):
        """What a run will take; guessed by FLOPs for arms that have not run yet."""
        def work(size, arm):
            return self.plan.probes[size, arm]["flops_per_token"] * self.plan.step_tokens(size, arm)
        known = {key: pace for key, pace in self.pace.items() if key in self.plan.probes}
        if (run.size, run.arm) in known:
            return known[run.size, run.arm] * run.steps
        if not known:
            return None
        return run.steps * work(run.size, run.arm) * sum(known.values()) / sum(work(*key) for key in known)

    def time_left(self):
        shares = {sweep_plan.key(job.run): job.share_done() for job in self.jobs.running}
        total = 0.0
        runs = self.plan.pending(self.losses)
        for run in runs:
            seconds = self.seconds_of(run)
            if seconds is None:
                return ""
            total += seconds * (1 - shares.get(sweep_plan.key(run), 0.0))
        for size, arm, seed in self.plan.unknown(self.losses):
            total += self.seconds_of(self.plan.run(size, arm, self.recipe.rates_of(size)[0], seed)) or 0.0
        if not total:
            return ""
        return f"; about {sweep_dry.duration(total / len(self.slots))} left"

    # ---- the end

    def conclude(self):
        for size in self.plan.sizes:
            for arm in self.plan.arms:
                if (size, arm) not in self.plan.steps or len(self.recipe.rates_of(size)) == 1:
                    continue
                tried = self.plan.rate_runs(size, arm)
                if all(sweep_plan.key(run) in self.losses for run in tried) and \
                        self.plan.best(size, arm, self.losses) is None:
                    self.folder.say(f"{size} {arm}: diverged at every rate")
        if self.broken:
            self.folder.say(f"{len(self.broken)} runs failed; the same command tries them again:")
            for message in self.broken.values():
                self.folder.say(f"  {message}")
        self.folder.say(f"results: {self.folder.results}; table: experiments/sweep rank {self.folder.path}")
        return 1 if self.broken else 0
