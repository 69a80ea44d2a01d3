"""The most floating-point operations a second that a device can do: what no honest throughput exceeds.

    peak, how = peaks.of_device("NVIDIA H100 80GB HBM3")        989e12, "..."
    peak, how = peaks.of_device("AMD EPYC (2 threads, AVX2)")   from /proc/cpuinfo of this machine

GPUs: dense bf16 on tensor cores, from the makers' data sheets. CPUs: threads x GHz x float lanes x 2 (a fused multiply
and add) x 2 (ports), an upper bound: two threads of one core share its ports.
"""
import re

GPUS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12,
        "RTX 4090": 165e12, "RTX 3090": 71e12}
LANES = {"AVX-512": 16, "AVX512": 16, "AVX2": 8, "AVX": 8, "NEON": 4}


def clock_ghz():
    """The highest clock that the machine tells of."""
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


def of_device(device):
    """(FLOP/s, how it was found), (None, why not) for a device that is not known."""
    match = re.search(r"\((\d+) threads?, ([^)]*)\)", device or "")
    if match:
        threads, ghz = int(match.group(1)), clock_ghz()
        lanes = next((n for name, n in LANES.items() if name.lower() in match.group(2).lower()), 4)
        if ghz is None:
            return None, "the clock of this CPU is not known"
        return threads * ghz * 1e9 * lanes * 4, f"{threads} threads x {ghz:.2f} GHz x {lanes} lanes x 2 x 2 ports"
    for name, peak in GPUS.items():
        if all(word.lower() in (device or "").lower() for word in name.split()):
            return peak, f"{name}: {peak / 1e12:g} TFLOP/s dense bf16"
    return None, "no peak is known of this device: add it to peaks.py"
