"""What a device can do at most, to refuse a throughput that no such device has, and to draw the roofs of a roofline.

GPUs: the makers' data sheets, dense tensor-core products in bf16 and the memory's bandwidth. CPUs: an upper limit
that no core of today exceeds, from the threads and the instruction set that the device's name tells, at 5 GHz with two
fused multiply-adds a cycle; their bandwidth is not known. A line's own "peak_flops" and "peak_bandwidth" come first.
"""
import re

from .lines import number

GPUS = (   # name, FLOP/s in bf16, bytes/s
    (r"\bB200\b", 2250e12, 8.0e12), (r"\bH200\b", 989.4e12, 4.8e12), (r"\bGH200\b", 989.4e12, 4.0e12),
    (r"\bH100\b.*\bPCIe\b", 756e12, 2.0e12), (r"\bH100\b.*\bNVL\b", 835e12, 3.9e12), (r"\bH100\b", 989.4e12, 3.35e12),
    (r"\bA100\b", 312e12, 2.04e12), (r"\bL40S?\b", 362e12, 0.86e12), (r"\bL4\b", 121e12, 0.3e12),
    (r"\bA10G?\b", 125e12, 0.6e12), (r"\bV100\b", 125e12, 0.9e12), (r"\bT4\b", 65e12, 0.32e12))
LANES = (("AVX-512", 16), ("AVX2", 8))
CYCLES = 5e9


def own_value(lines, keys):
    return next((number(line[key]) for line in lines for key in keys if number(line.get(key))), None)


def gpu_of(device):
    return next((gpu for gpu in GPUS if re.search(gpu[0], device or "")), None)


def flops_of(device, lines=()):
    """FLOP/s, or None where it is not known."""
    own, gpu = own_value(lines, ("peak_flops", "peak_flop_s")), gpu_of(device)
    if own or gpu:
        return own or gpu[1]
    threads = re.search(r"\((\d+) threads?\b", device or "")
    lanes = next((lanes for name, lanes in LANES if name in (device or "")), None)
    return int(threads[1]) * lanes * 2 * 2 * CYCLES if threads and lanes else None


def bandwidth_of(device, lines=()):
    """Bytes/s, or None."""
    own, gpu = own_value(lines, ("peak_bandwidth", "peak_bytes_s")), gpu_of(device)
    return own or (gpu[2] if gpu else None)
