"""Statistics of experiments: intervals of means and of paired differences, Pareto fronts, time to a target.

    mean, low, high = mean_interval([1.2, 1.3, 1.1])               Student's t, 95 %
    d = paired([1.2, 1.3, 1.1], [1.4, 1.4, 1.3])                   d.mean, d.t, d.bootstrap, d.p, d.resolved
    own_rate({rate: {seed: loss}})                                 the learning rate that an arm is compared at
    pareto([(loss, cost), ...])                                    indices of the points that no other one beats
    reach([(x, loss), ...], target)                                the x at which a falling curve meets the target

Which interval to believe: with n values the percentile bootstrap draws from C(2n-1, n) samples (10 of them at n = 3)
and is too narrow for so few; an interval of 95 % covers a normal mean 75 % of the time at n = 3, 84 % at n = 5 and
91 % at n = 10 (BCa: 73 % and 84 %). Student's t is exact for normal values. Both are printed, and a difference counts
as resolved only when both intervals leave out 0. Every bootstrap draws from a generator of its own with a fixed seed,
so a table is the same each time.

Papers: Efron 1987 (bias-corrected and accelerated intervals); Holm 1979 (several comparisons at once). Used by rank.py,
the report and the notebooks. Standard library only; tests/sweep_statistics.py holds it to known answers.
"""
import collections
import functools
import itertools
import math
import random
import statistics

RESAMPLES = 10000
SEED = 17

Paired = collections.namedtuple("Paired", "n mean t bootstrap p resolved")


# ---- Student's t

def incomplete_beta(a, b, x):
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (Lentz's method).

    >>> round(incomplete_beta(2, 3, 0.4), 10)
    0.5248
    """
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly, the mirrored one is fast
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    tiny = 1e-300
    fraction, c, d = 1.0, 1.0, 0.0
    for i in range(500):
        m = i // 2
        if i == 0:
            term = 1.0
        elif i % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / (1 + term * d or tiny)
        c = 1 + term / c or tiny
        fraction *= c * d
        if abs(1 - c * d) < 1e-14:
            break
    return front * (fraction - 1)


def t_two_sided(t, freedom):
    """The probability of a |value| above |t| under Student's t.

    >>> round(t_two_sided(2.776445, 4), 6)
    0.05
    """
    if math.isinf(t):
        return 0.0
    return incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))


@functools.lru_cache(maxsize=None)
def t_quantile(share, freedom):
    """The t whose interval -t .. t holds `share` of Student's distribution.

    >>> [round(t_quantile(0.95, n), 3) for n in (1, 2, 4, 9, 30)]
    [12.706, 4.303, 2.776, 2.262, 2.042]
    """
    low, high = 0.0, 1.0
    while t_two_sided(high, freedom) > 1 - share:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if t_two_sided(middle, freedom) > 1 - share:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def mean_interval(values, share=0.95):
    """(mean, low, high) by Student's t; low and high are None for fewer than two values.

    >>> [round(x, 3) for x in mean_interval([1, 2, 3])]
    [2.0, -0.484, 4.484]
    >>> mean_interval([5])
    (5.0, None, None)
    """
    values = list(values)
    mean = math.fsum(values) / len(values)
    if len(values) < 2 or not math.isfinite(mean):
        return mean, None, None
    half = t_quantile(share, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


# ---- bootstrap

@functools.lru_cache(maxsize=None)
def all_samples(n):
    """Every way to draw n of n with replacement, order aside: (indices, probability)."""
    samples = []
    for sample in itertools.combinations_with_replacement(range(n), n):
        ways = math.factorial(n)
        for count in collections.Counter(sample).values():
            ways //= math.factorial(count)
        samples.append((sample, ways / n ** n))
    return samples


def resampled_means(values, resamples=RESAMPLES, seed=SEED):
    """Sorted (mean, weight): all samples with their multiplicity where they are few, else `resamples` drawn ones."""
    n = len(values)
    if math.comb(2 * n - 1, n) <= resamples:
        return sorted((math.fsum(values[i] for i in sample) / n, weight) for sample, weight in all_samples(n))
    draw = random.Random(seed)
    return sorted((math.fsum(draw.choices(values, k=n)) / n, 1 / resamples) for _ in range(resamples))


def weighted_quantile(means, share):
    total = 0.0
    for value, weight in means:
        total += weight
        if total >= share - 1e-12:
            return value
    return means[-1][0]


def bootstrap_interval(values, share=0.95, method="percentile", resamples=RESAMPLES, seed=SEED):
    """(low, high) of the mean: "percentile", or "bca", which corrects bias and skewness; None, None below two values.

    >>> bootstrap_interval([1.0, 1.0, 1.0])
    (1.0, 1.0)
    """
    values = list(values)
    n = len(values)
    if n < 2 or not all(map(math.isfinite, values)):
        return None, None
    means = resampled_means(values, resamples, seed)
    tails = [(1 - share) / 2, (1 + share) / 2]
    if method == "bca":
        normal, mean = statistics.NormalDist(), math.fsum(values) / n
        below = math.fsum(w for m, w in means if m < mean) + math.fsum(w for m, w in means if m == mean) / 2
        left_out = [(mean * n - v) / (n - 1) for v in values]
        centre = math.fsum(left_out) / n
        squares = math.fsum((centre - x) ** 2 for x in left_out)
        if 0 < below < 1 and squares > 0:
            bias = normal.inv_cdf(below)
            skew = math.fsum((centre - x) ** 3 for x in left_out) / (6 * squares ** 1.5)
            shifted = [bias + normal.inv_cdf(tail) for tail in tails]
            tails = [normal.cdf(bias + z / (1 - skew * z)) for z in shifted]
    elif method != "percentile":
        raise ValueError(f"method '{method}': choose percentile or bca")
    return weighted_quantile(means, tails[0]), weighted_quantile(means, tails[1])


# ---- paired differences

def paired(values, baseline, share=0.95, method="percentile"):
    """values[i] - baseline[i], where entry i of both has the same seed.

    n; mean; t and bootstrap, two intervals (low, high); p, two-sided, of Student's test; resolved: whether both
    intervals leave out 0. Intervals are None, p is None and resolved is False below two pairs.

    >>> d = paired([1.0, 1.1, 1.2], [2.0, 2.0, 2.3])
    >>> round(d.mean, 6), d.resolved
    (-1.0, True)
    """
    differences = [a - b for a, b in zip(values, baseline)]
    n = len(differences)
    if n != len(list(values)) or n != len(list(baseline)):
        raise ValueError("paired values must be of the same seeds")
    mean, low, high = mean_interval(differences, share)
    boot = bootstrap_interval(differences, share, method)
    if low is None:
        return Paired(n, mean, (None, None), (None, None), None, False)
    error = statistics.stdev(differences) / math.sqrt(n)
    p = t_two_sided(mean / error, n - 1) if error > 0 else (0.0 if mean else 1.0)
    resolved = all(not a <= 0 <= b for a, b in ((low, high), boot))
    return Paired(n, mean, (low, high), boot, p, resolved)


def holm(p_values):
    """p-values corrected for being several at once: a family's chance of any false alarm stays below the level.

    >>> [round(p, 6) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


# ---- learning rates

def best_rate(losses):
    """The rate with the lowest mean, the lower one of two equal: losses are {rate: [loss, ...]}, of the same seeds for
    all rates, infinity for what diverged; None when every mean is infinite.

    >>> best_rate({0.1: [1.0, 1.2], 0.2: [0.5, math.inf]})
    0.1
    """
    means = {rate: statistics.fmean(values) for rate, values in losses.items() if values}
    return min((rate for rate, mean in means.items() if math.isfinite(mean)),
               key=lambda rate: (means[rate], rate or 0), default=None)


def own_rate(losses):
    """The rate that an arm is compared at, of {rate: {seed: loss}}: the best by the seeds that all rates have, which
    are those that rates were tried with; where there are none, the best of those with most seeds. A seed that diverged
    later at this rate does not change it: the arm has no rank then, rather than a rate that happened to survive.

    >>> own_rate({0.1: {1: 1.0}, 0.2: {1: 0.5, 2: math.inf}, 0.3: {1: 0.7, 2: 0.6}})
    0.2
    """
    shared = set.intersection(*map(set, losses.values())) if losses else ()
    if shared:
        return best_rate({rate: [seeds[seed] for seed in shared] for rate, seeds in losses.items()})
    most = max(map(len, losses.values()), default=0)
    return best_rate({rate: list(seeds.values()) for rate, seeds in losses.items() if len(seeds) == most})


# ---- Pareto front

def pareto(points):
    """Indices, in the order of `points`, of those that no other point beats: smaller is better in every coordinate,
    and a point is beaten by one that is at least as good everywhere and better somewhere. Equal points stand or fall
    together. A point with a coordinate that is None, NaN or infinite is on no front and beats nothing.

    >>> pareto([(1, 3), (2, 2), (3, 1), (3, 3), (2, 2)])
    [0, 1, 2, 4]
    """
    points = [tuple(p) for p in points]
    whole = [i for i, p in enumerate(points) if all(x is not None and math.isfinite(x) for x in p)]

    def beats(a, b):
        return a != b and all(x <= y for x, y in zip(a, b))

    return [i for i in whole if not any(beats(points[j], points[i]) for j in whole)]


# ---- time to target

def reach(curve, target):
    """The x at which a curve of (x, loss) first comes down to `target`, linear between its points; None: never.

    x may be steps, tokens, seconds or FLOPs. Points whose loss is None or not finite are left out.

    >>> reach([(0, 5.0), (100, 4.0), (200, 3.0)], 3.5)
    150.0
    """
    before = None
    for x, loss in sorted((p for p in curve if p[1] is not None and math.isfinite(p[1])), key=lambda p: p[0]):
        if loss <= target:
            if before is None or before[1] == loss:
                return float(x)
            return before[0] + (x - before[0]) * (before[1] - target) / (before[1] - loss)
        before = (x, loss)
    return None


def reach_costs(record, target, ms=None, curve="val"):
    """What a run (a line of kind "run") needed to reach a loss: {"steps", "tokens", "seconds", "flops"}, None where
    it never did. ms: of a step of its arm alone on the device (a line of kind "timing"); without it there are no
    seconds. curve: "val", or "train".
    """
    points = record.get(curve) or []
    steps = reach([(p[0], p[2]) for p in points], target)
    tokens = reach([(p[1], p[2]) for p in points], target)
    flops = record.get("flops_per_token")
    return {"steps": steps, "tokens": tokens,
            "seconds": steps * ms / 1e3 if steps is not None and ms else None,
            "flops": tokens * flops if tokens is not None and flops else None}
