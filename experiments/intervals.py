"""Statistics of small samples: mean and interval, paired differences, Pareto front, time to a target.

    mean_interval([1.1, 1.2, 1.3])          mean and half the width of its 95 % interval (Student's t)
    paired_bootstrap(differences)           mean and the ends of its 95 % percentile interval
    pareto_front([(cost, loss), ...])       indices of the points that no other point beats in both
    steps_to([(step, loss), ...], target)   the step at which the loss first gets to the target, interpolated
"""
import math
import random
import statistics

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; 1.96 is the limit for many.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def mean_interval(values):
    """(mean, half width); the half width of a single value is None."""
    if len(values) < 2:
        return values[0], None
    freedom = len(values) - 1
    quantile = T95[freedom - 1] if freedom <= len(T95) else 1.96 + 2.5 / freedom
    return statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))


def paired_bootstrap(differences, seed=0, draws=10000):
    """(mean, low, high): the means of samples drawn with replacement, their 2.5 % and 97.5 % quantiles."""
    source = random.Random(seed)
    means = sorted(statistics.fmean(source.choices(differences, k=len(differences))) for _ in range(draws))
    return statistics.fmean(differences), means[int(0.025 * draws)], means[min(draws - 1, int(0.975 * draws))]


def pareto_front(points):
    """points: (cost, loss), both better when lower. Indices by rising cost; of equal points all are on the front."""
    front, best = [], math.inf
    for i in sorted((i for i, p in enumerate(points) if all(map(math.isfinite, p))), key=lambda i: points[i]):
        if points[i][1] < best or (front and points[i] == points[front[-1]]):
            front.append(i)
            best = points[i][1]
    return front


def steps_to(points, target):
    """None where the target is not reached."""
    before = None
    for step, loss in points:
        if loss <= target:
            if before is None:
                return step
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (step - before[0])
        before = (step, loss)
    return None
