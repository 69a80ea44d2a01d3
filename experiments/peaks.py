"""What a device can do at most: to refuse a throughput that no such device has, and to draw the roofs of a roofline.

    peaks.of_device("NVIDIA H100 80GB HBM3")        (989.4e12, "H100: 989.4 TFLOP/s dense bf16"): FLOP/s, and from where
    peaks.of_device("AMD EPYC (2 threads, AVX2)")   from the clock of this machine
    peaks.flops_of(device, lines)                   FLOP/s for lines of results, which may say "peak_flops" themselves
    peaks.bandwidth_of(device, lines)               bytes/s, likewise

GPUs: the makers' data sheets, dense products of tensor cores in bf16, and the memory's bandwidth. CPUs: threads x GHz x
float lanes x 2 (a fused multiply and add) x 2 (ports), an upper bound: two threads of one core share its ports. For a
CPU elsewhere, whose clock is not known, 5 GHz. The bandwidth of CPUs is not known.
"""
import math
import re

GPUS = (   # name, FLOP/s in bf16, bytes/s; the first that fits
    ("B200", 2250e12, 8.0e12), ("GH200", 989.4e12, 4.0e12), ("H200", 989.4e12, 4.8e12), ("H100 PCIe", 756e12, 2.0e12),
    ("H100 NVL", 835e12, 3.9e12), ("H100", 989.4e12, 3.35e12), ("A100", 312e12, 2.04e12), ("L40", 362e12, 0.86e12),
    ("L4", 121e12, 0.3e12), ("A10", 125e12, 0.6e12), ("V100", 125e12, 0.9e12), ("T4", 65e12, 0.32e12),
    ("RTX 4090", 165e12, 1.0e12), ("RTX 3090", 71e12, 0.94e12))
LANES = {"AVX-512": 16, "AVX512": 16, "AVX2": 8, "AVX": 8, "NEON": 4}
MOST_GHZ = 5


def gpu_of(device):
    """The row of a device's name; every word of a row's name begins a word of it."""
    return next((gpu for gpu in GPUS
                 if all(re.search(r"\b" + word, device or "", re.IGNORECASE) for word in gpu[0].split())), None)


def clock_ghz():
    """The highest clock that this machine tells of."""
    found = []
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            text = file.read()
        found += [float(mhz) / 1e3 for mhz in re.findall(r"cpu MHz\s*:\s*([\d.]+)", text)]
        found += [float(ghz) for ghz in re.findall(r"model name.*@ *([\d.]+) *GHz", text)]
        with open("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq", encoding="utf-8") as file:
            found.append(float(file.read()) / 1e6)
    except (OSError, ValueError):
        pass
    return max(found, default=None)


def of_cpu(device, ghz):
    """(FLOP/s, how it was found) of a name such as "AMD EPYC (2 threads, AVX2)"; None for other names."""
    match = re.search(r"\((\d+) threads?, ([^)]*)\)", device or "")
    if not match:
        return None
    lanes = next((n for name, n in LANES.items() if name.lower() in match.group(2).lower()), 4)
    return (int(match.group(1)) * ghz * 1e9 * lanes * 4,
            f"{match.group(1)} threads x {ghz:.2f} GHz x {lanes} lanes x 2 x 2 ports")


def of_device(device):
    """(FLOP/s, how it was found), (None, why not) for a device that is not known."""
    gpu = gpu_of(device)
    if gpu:
        return gpu[1], f"{gpu[0]}: {gpu[1] / 1e12:g} TFLOP/s dense bf16"
    ghz = clock_ghz()
    return of_cpu(device, ghz or MOST_GHZ) or (None, "no peak is known of this device: add it to peaks.py")


def own_value(lines, key):
    values = (line.get(key) for line in lines)
    numbers = (v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool))
    return next((v for v in numbers if math.isfinite(v) and v > 0), None)


def flops_of(device, lines=()):
    gpu, cpu = gpu_of(device), of_cpu(device, MOST_GHZ)
    return own_value(lines, "peak_flops") or (gpu[1] if gpu else cpu[0] if cpu else None)


def bandwidth_of(device, lines=()):
    gpu = gpu_of(device)
    return own_value(lines, "peak_bandwidth") or (gpu[2] if gpu else None)
