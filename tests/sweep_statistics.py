"""Tests of experiments/intervals.py: known answers, and how often intervals hold the truth on made-up data; of
experiments/peaks.py; and of what run_record.py makes of many steps.

    tests/sweep_statistics.py EXPERIMENTS        the folder; silent and status 0 when all is right
"""
import doctest
import math
import random
import sys

sys.path[:0] = [sys.argv[1] + "/sweeping", sys.argv[1]]
import intervals  # noqa: E402
import peaks  # noqa: E402
import run_record  # noqa: E402


def close(a, b, tolerance=1e-9):
    assert abs(a - b) <= tolerance * max(1, abs(b)), (a, b)


def test_examples():
    results = doctest.testmod(intervals)
    assert results.attempted >= 10 and not results.failed, results


def test_student():
    """Quantiles from printed tables, and the distribution of one degree of freedom, which has a closed form."""
    for freedom, quantile in ((1, 12.7062), (3, 3.1824), (7, 2.3646), (20, 2.0860), (120, 1.9799)):
        close(intervals.t_quantile(0.95, freedom), quantile, 1e-4)
    close(intervals.t_quantile(0.99, 4), 4.6041, 1e-4)
    for t in (0.1, 1.0, 5.0, 300.0):
        close(intervals.t_two_sided(t, 1), 1 - 2 / math.pi * math.atan(t), 1e-9)
        close(intervals.t_two_sided(t, 2), 1 - t / math.sqrt(2 + t * t), 1e-9)
    mean, low, high = intervals.mean_interval([2.0, 4.0, 6.0, 8.0])
    close(mean, 5)
    close(high - mean, 3.182446 * math.sqrt(20 / 3) / 2, 1e-6)
    close(mean - low, high - mean)


def coverage(interval, n, trials):
    """Share of samples of n normal values with mean 3 whose interval holds 3."""
    draw = random.Random(5)
    held = 0
    for _ in range(trials):
        low, high = interval([draw.gauss(3, 2) for _ in range(n)])
        held += low <= 3 <= high
    return held / trials


def test_coverage():
    """Student's intervals hold the truth as often as they say; the bootstrap's, for few values, as seldom as the
    header of intervals.py says: within four standard errors of a share of that many trials."""
    def student(values):
        return intervals.mean_interval(values)[1:]

    for interval, n, trials, share in ((student, 3, 2000, 0.95), (student, 5, 2000, 0.95),
                                       (intervals.bootstrap_interval, 3, 2000, 0.755),
                                       (intervals.bootstrap_interval, 5, 2000, 0.84)):
        error = 4 * math.sqrt(share * (1 - share) / trials)
        found = coverage(interval, n, trials)
        assert abs(found - share) < error, f"n {n}: {found} of {trials}, expected {share} +- {error:.3f}"


def test_bootstrap():
    """All samples of two values: means 0, 1/2, 1/2, 1. A large sample: what the normal approximation says."""
    assert intervals.bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)
    assert intervals.resampled_means([0.0, 1.0]) == [(0.0, 0.25), (0.5, 0.5), (1.0, 0.25)]
    close(math.fsum(weight for _, weight in intervals.resampled_means([3.0, 1.0, 4.0, 1.5, 9.0])), 1)
    draw = random.Random(2)
    values = [draw.gauss(0, 1) for _ in range(200)]
    for method in ("percentile", "bca"):
        low, high = intervals.bootstrap_interval(values, method=method, resamples=2000)
        mean, t_low, t_high = intervals.mean_interval(values)
        close(low, t_low, 0.02)
        close(high, t_high, 0.02)
        assert (low, high) == intervals.bootstrap_interval(values, method=method, resamples=2000), "not the same twice"
    skewed = [draw.expovariate(1) ** 2 for _ in range(100)]
    plain, corrected = (intervals.bootstrap_interval(skewed, method=m, resamples=2000) for m in ("percentile", "bca"))
    assert corrected[0] > plain[0] and corrected[1] > plain[1], "BCa moves towards the long tail"
    assert intervals.bootstrap_interval([1.0]) == (None, None)
    assert intervals.bootstrap_interval([1.0, math.nan, 2.0]) == (None, None)


def test_paired():
    """A shift that is the same for all seeds is resolved, however far apart the seeds are."""
    base = [1.0, 5.0, 9.0, 2.0]
    shifted = intervals.paired([b - 0.1 + e for b, e in zip(base, (0.001, -0.001, 0.002, -0.002))], base)
    assert shifted.resolved and shifted.n == 4 and shifted.p < 0.001
    close(shifted.mean, -0.1)
    close(intervals.paired([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]).p, 0.07417990, 1e-6)  # t = 2 sqrt(3), 2 degrees
    noise = intervals.paired([1.0, 2.0, 3.0], [1.1, 1.9, 3.05])
    assert not noise.resolved and noise.t[0] < 0 < noise.t[1]
    narrow = intervals.paired([0.1, 0.2, 0.9], [0.0, 0.0, 0.0])  # the bootstrap leaves out 0, Student's does not
    assert narrow.bootstrap[0] > 0 > narrow.t[0] and not narrow.resolved
    equal = intervals.paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert not equal.resolved and equal.p == 1
    assert intervals.paired([1.0], [2.0]) == (1, -1.0, (None, None), (None, None), None, False)
    try:
        intervals.paired([1.0, 2.0], [1.0])
    except ValueError:
        pass
    else:
        raise AssertionError("lists of different length are paired")


def test_pareto():
    nan, infinity = math.nan, math.inf
    assert intervals.pareto([]) == []
    assert intervals.pareto([(2, 2)]) == [0]
    assert intervals.pareto([(1, 4), (2, 2), (4, 1), (3, 3), (2, 4), (4, 4)]) == [0, 1, 2]
    assert intervals.pareto([(1, 1), (1, 1), (1, 2), (2, 1)]) == [0, 1], "equal points stay together, ties on a side go"
    assert intervals.pareto([(nan, 0), (1, 1), (None, 0), (0, infinity), (2, 0.5)]) == [1, 4]
    assert intervals.pareto([(1, 2, 3), (3, 2, 1), (3, 3, 3)]) == [0, 1]


def test_reach():
    curve = [(0, 4.0), (10, 3.0), (20, 3.5), (30, 2.0)]
    assert intervals.reach(curve, 3.5) == 5.0, "the first time counts"
    assert intervals.reach(curve, 2.75) == 25.0
    assert intervals.reach(curve, 4.0) == 0.0 and intervals.reach(curve, 9.0) == 0.0
    assert intervals.reach(curve, 1.9) is None and intervals.reach([], 1.0) is None
    assert intervals.reach([(0, None), (10, math.nan), (20, 2.0), (30, 1.0)], 1.5) == 25.0
    assert intervals.reach(list(reversed(curve)), 2.75) == 25.0, "points may come in any order"
    record = {"val": [[0, 0, 5.0], [100, 6400, 3.0]], "flops_per_token": 10.0}
    assert intervals.reach_costs(record, 4.0, ms=20) == {"steps": 50.0, "tokens": 3200.0, "seconds": 1.0,
                                                         "flops": 32000.0}
    assert intervals.reach_costs(record, 4.0)["seconds"] is None
    assert intervals.reach_costs({}, 4.0) == {"steps": None, "tokens": None, "seconds": None, "flops": None}


def test_holm():
    assert intervals.holm([]) == [] and intervals.holm([0.2]) == [0.2]
    assert [round(p, 9) for p in intervals.holm([0.5, 0.001, 0.4])] == [0.8, 0.003, 0.8]


def test_peaks():
    """By the makers' data sheets, of names as drivers give them."""
    for name, flops, bandwidth in (("NVIDIA H100 80GB HBM3 (132 SMs, 79 GiB)", 989.4e12, 3.35e12),
                                   ("NVIDIA H100 PCIe", 756e12, 2.0e12), ("NVIDIA H200", 989.4e12, 4.8e12),
                                   ("NVIDIA GH200 480GB", 989.4e12, 4.0e12), ("NVIDIA A100-SXM4-80GB", 312e12, 2.04e12),
                                   ("NVIDIA A10", 125e12, 0.6e12), ("NVIDIA L40S", 362e12, 0.86e12),
                                   ("NVIDIA L4", 121e12, 0.3e12), ("NVIDIA GeForce RTX 4090", 165e12, 1.0e12)):
        assert (peaks.flops_of(name), peaks.bandwidth_of(name)) == (flops, bandwidth), name
        assert peaks.of_device(name)[0] == flops
    assert peaks.of_device("Z80")[0] is None and peaks.flops_of(None) is None
    assert peaks.flops_of("A CPU (4 threads, AVX-512)") == 4 * 5e9 * 16 * 4
    assert peaks.flops_of("A CPU (4 threads, AVX2)") == 4 * 5e9 * 8 * 4
    assert peaks.of_cpu("A CPU (1 thread, AVX2)", 3.0)[0] == 3e9 * 8 * 4
    assert peaks.flops_of("NVIDIA H200", [{"peak_flops": math.nan}, {"peak_flops": 7.0}]) == 7, "a line's own is first"


def test_many_steps():
    """The first quarter of the steps is no part of a step's time, the last one alone is of late means."""
    steps = [{"ms": ms, "drop": drop} for ms, drop in ((900.0, 0.5), (1.0, 0.5), (2.0, None), (4.0, 0.25))]
    assert run_record.middle(steps) == 2.0 and run_record.late_mean(steps, "drop") == 0.25
    assert run_record.late_mean(steps * 2, "drop") == 0.25 and run_record.late_mean(steps, "cv") is None
    assert run_record.thin(list(range(600)))[-1] == 599 and len(run_record.thin(list(range(600)))) == 60


for name, test in list(globals().items()):
    if name.startswith("test_"):
        test()
