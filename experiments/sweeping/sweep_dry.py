"""What a sweep would cost: its runs, tokens, FLOPs, time and memory, from a few timed steps of every arm."""
import sweep_plan
import sweep_probe
import sweep_recipe

MIB = 1 << 20


def amount(value):
    """1234567 -> 1.23M"""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds):
    seconds = round(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def evaluation_steps(config, steps):
    """What a run's evaluations cost, in steps: a forward of a batch is about a third of a step. They come before the
    first step, every eval_every steps, and at the end, or at the end alone."""
    every = config["eval_every"]
    times = 1 + -(-steps // every) if every else 1
    return times * config["eval_batches"] / 3


def runs_of(plan, size, arm):
    """How many runs there are of an arm: the seeds, and the rates that are tried beside the best."""
    rates, tried = len(plan.recipe.rates_of(size)), plan.recipe.rate_seeds
    kept = sum(seed not in plan.recipe.seeds[:tried] for seed in plan.seeds)
    return kept + rates * tried if rates > 1 else len(plan.seeds)


def print_plan(control):
    plan, recipe, slots = control.plan, control.recipe, len(control.slots)
    times = {}
    for size in plan.sizes:
        for arm in plan.arms + [arm for arm in [recipe.baseline] if arm not in plan.arms]:
            try:
                timed = control.prober(size, control.slots[0], "0").probe(plan.first_options(size, arm), timed=True)
            except sweep_probe.ProbeError as error:
                raise sweep_recipe.RecipeError(f"{recipe.where('arm', arm)}: arm {arm} of size {size}: "
                                               f"{error}") from None
            times[size, arm] = timed["ms"]
            plan.probes[size, arm]["peak_bytes"] = timed["peak_bytes"]
    control.folder.write_probes(control.probes)
    plan.scale_steps(times)

    print(f"question  {recipe.question}\nexpect    {recipe.expect}")
    print(f"budget    {recipe.budget}; baseline {recipe.baseline}; seeds {' '.join(map(str, plan.seeds))}\n")
    columns = "{:<16} {:<20} {:>5} {:>8} {:>9} {:>9} {:>9} {:>10} {:>9}"
    print(columns.format("size", "arm", "runs", "steps", "tokens", "FLOPs", "ms/step", "MiB", "time"))
    total_runs, total_flops, total_seconds = 0, 0.0, 0.0
    for size in plan.sizes:
        for arm in plan.arms:
            probe, steps, runs = plan.probes[size, arm], plan.steps[size, arm], runs_of(plan, size, arm)
            tokens = steps * plan.step_tokens(size, arm)
            flops = runs * tokens * probe["flops_per_token"]
            config = dict(probe["config"], eval_every=dict(plan.options(size, arm)).get("--eval-every", 100))
            config["eval_every"] = int(config["eval_every"])
            seconds = runs * (steps + evaluation_steps(config, steps)) * times[size, arm] / 1e3
            memory = max(sum(probe["memory"].values()), probe["peak_bytes"] or 0)
            print(columns.format(size, arm, runs, steps, amount(tokens), amount(flops), f"{times[size, arm]:.4g}",
                                 f"{memory / MIB:.0f}", duration(seconds / slots)))
            total_runs, total_flops, total_seconds = total_runs + runs, total_flops + flops, total_seconds + seconds
    for size in plan.sizes:
        for name in recipe.befores:
            print(f"{size:<16} {'before ' + name:<20} {len(plan.seeds):>5} "
                  f"{plan.own_steps(size, name, 'before'):>8}  (not in the sum)")
    whole = [arm for (_, arm), probe in plan.probes.items() if probe["config"]["eval_batches"] == 0]
    if whole:
        print(f"\nevaluations over the whole text (--eval-batches 0) are not in the time: {', '.join(whole)}")
    device = next(iter(plan.probes.values()))["device"]
    print(f"\n{total_runs} runs, {amount(total_flops)}FLOP, about {duration(total_seconds / slots)} with {slots} at a "
          f"time on {device};\ntokens are of one run, FLOPs and time of all; a step was timed with nothing beside it")
