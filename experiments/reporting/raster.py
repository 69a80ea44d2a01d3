"""SVG files to PNG, by whatever program this machine has for it: rsvg-convert, or chromium without a window."""
import os
import shutil
import subprocess
import tempfile

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SCALE = 2


def to_png(files):
    """files: [(path of .svg, width, height)]. Writes .png files beside them; returns a line on what was done."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if shutil.which("rsvg-convert"):
        done = sum(convert(path) for path, _, _ in files)
        program = "rsvg-convert"
    elif browser:
        with tempfile.TemporaryDirectory() as profile:
            done = sum(photograph(browser, profile, *file) for file in files)
        program = os.path.basename(browser)
    else:
        return "no PNG: neither rsvg-convert nor chromium is here (apt-get install librsvg2-bin)"
    missing = f"; {len(files) - done} could not be made" if done < len(files) else ""
    return f"{done} figures as PNG, by {program}{missing}"


def convert(path):
    out = os.path.splitext(path)[0] + ".png"
    return run(["rsvg-convert", "--zoom", str(SCALE), "-o", out, path]) and os.path.exists(out)


def photograph(browser, profile, path, width, height):
    out = os.path.splitext(path)[0] + ".png"
    return run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                f"--user-data-dir={profile}", f"--force-device-scale-factor={SCALE}",
                f"--window-size={int(width)},{int(height)}",
                f"--screenshot={out}", "file://" + os.path.abspath(path)]) and os.path.exists(out)


def run(command):
    try:
        return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60,
                              check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
