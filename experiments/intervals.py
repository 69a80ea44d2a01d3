"""Statistics of small samples: intervals of means and of paired differences, Pareto fronts, time to a target.

    mean, low, high = mean_interval([1.2, 1.3, 1.1])               Student's t, 95 %
    d = paired([1.2, 1.3, 1.1], [1.4, 1.4, 1.3])                   d.mean, d.t, d.bootstrap, d.resolved
    pareto([(loss, cost), ...])                                    indices of the points that no other one beats
    reach([(x, loss), ...], target)                                the x at which a falling curve meets the target
"""
import collections
import itertools
import math
import random
import statistics

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
T95 = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139)
DRAWS = 10000
SEED = 17

Paired = collections.namedtuple("Paired", "n mean t bootstrap resolved")


def mean_interval(values):
    """(mean, low, high); low and high are None for fewer than two values."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None, None
    freedom = len(values) - 1
    quantile = T95[freedom - 1] if freedom <= len(T95) else 1.96 + 2.6 / freedom
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def paired(values, baseline):
    """values[i] - baseline[i]; resolved: Student's interval and the bootstrap's percentiles both leave out 0."""
    differences = [a - b for a, b in zip(values, baseline)]
    mean, low, high = mean_interval(differences)
    if low is None:
        return Paired(1, mean, (None, None), (None, None), False)
    source, n = random.Random(SEED), len(differences)
    samples = itertools.product(differences, repeat=n) if n ** n <= DRAWS else \
        (source.choices(differences, k=n) for _ in range(DRAWS))   # all samples where they are few
    means = sorted(math.fsum(sample) / n for sample in samples)
    ends = means[int(0.025 * len(means))], means[int(0.975 * len(means))]
    return Paired(n, mean, (low, high), ends, all(not a <= 0 <= b for a, b in ((low, high), ends)))


def pareto(points):
    """Smaller is better in every coordinate; equal points stand or fall together."""
    def beats(a, b):
        return a != b and all(x <= y for x, y in zip(a, b))

    return [i for i, p in enumerate(points) if not any(beats(q, p) for q in points)]


def reach(curve, target):
    """None where the target is never reached."""
    before = None
    for x, loss in curve:
        if loss <= target:
            if before is None or before[1] == loss:
                return float(x)
            return before[0] + (x - before[0]) * (before[1] - target) / (before[1] - loss)
        before = (x, loss)
    return None
