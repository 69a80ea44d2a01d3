#!/usr/bin/env python3
"""What tests/test_report_page.sh holds pages of experiments/report to; a check that fails ends with status 1.

    tests/report_checks.py text PAGE WORDS...               the page's text holds all of WORDS
    tests/report_checks.py front PAGE NAMES                 the sentence on the front, and the points drawn on it
    tests/report_checks.py figures PAGE RESULTS.jsonl       each kind of figure, drawn for a desk and for a phone
    tests/report_checks.py numbers PAGE RESULTS.jsonl [ARM=RATE]   tables against numbers computed here from the lines
    tests/report_checks.py logs PAGE LOG.jsonl...           the losses of runs of ./train
    tests/report_checks.py layer PAGE GRIDS.jsonl           figures A, B and C against lines of build/bench_layer
    tests/report_checks.py balance PAGE RESULTS.jsonl       figure D against runs and timings of one comparison
    tests/report_checks.py generation PAGE LINES.jsonl      the figure of generation against its lines
Each of these also holds that the page is well-formed, self-contained and has no link without its target.

    tests/report_checks.py drawings FOLDER COUNT            so many SVG files, each whole and without a variable colour
"""
import collections
import json
import math
import os
import re
import statistics
import sys
import xml.etree.ElementTree as tree

SVG = "{http://www.w3.org/2000/svg}"
T95 = {3: 4.302653, 5: 2.776445}
FIGURES = ["quality_against_speed", "against_the_baseline", "loss_over_training", "learning_rates", "stage_times",
           "moe_tax", "load", "domains_and_experts", "dropping", "figure_d_"]
MACHINE = ["scaling_1", "roofline_1", "bandwidth_1", "figure_b", "figure_c"]


def parse(path):
    with open(path, encoding="utf-8") as text:
        return tree.fromstring(text.read())


def words(element):
    return "".join(element.itertext())


def fail(*reasons):
    sys.exit(" ".join(map(str, reasons)))


def by_id(page, name):
    return next((e for e in page.iter() if e.get("id") == name), None)


def figure(page, name):
    found = [e for e in page.iter("figure") for own in [e.get("id") or ""]
             if own.endswith(name) or name.endswith("_") and own.startswith(name)]
    return found or fail("no figure", name)


def table(element):
    """[{column: text}] of the first table, minus signs and thin spaces as ASCII."""
    head, *rows = [[words(cell).replace("\u2212", "-").replace("\u202f", "") for cell in row]
                   for row in next(element.iter("table")).iter("tr")]
    return [dict(zip(head, row)) for row in rows]


# ---- the page


def whole(page, path):
    text = open(path, encoding="utf-8").read()
    if not text.startswith("<!DOCTYPE html>") or page.get("lang") != "en":
        fail("no doctype or language")
    outside = [url for url in re.findall(r"https?://[^\s\"'<>)]*", text) if url != "http://www.w3.org/2000/svg"]
    if outside or re.search(r"url\(|@import|<script|\bsrc=", text):
        fail("the page reaches outside itself:", outside[:3])
    names = [e.get("id") for e in page.iter() if e.get("id")]
    if len(names) != len(set(names)):
        fail("an id twice:", [n for n in names if names.count(n) > 1][:2])
    for link in page.iter("a"):
        if link.get("href")[1:] not in names:
            fail("a link to nowhere:", link.get("href"))
    for drawing in page.iter(SVG + "svg"):
        if drawing.get("role") == "img" and not drawing.get("aria-label"):
            fail("a drawing without a label")
        for e in drawing.iter():
            for key, value in e.attrib.items():
                if key in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height", "d") and \
                        re.search("nan|inf|None", value):
                    fail("a drawing with", value[:60])
    if len(list(page.iter("h1"))) != 1:
        fail("not one h1")
    for e in page.iter("figure"):
        if e.find("h3") is None or e.find("figcaption") is None:
            fail("a figure without title or caption:", e.get("id"))


def text(page, *parts):
    said = words(page)
    for part in parts:
        if part not in said:
            fail("the page does not say:", part)


def figures(page, results):
    for name in FIGURES + MACHINE:
        for found in figure(page, name):
            kinds = collections.Counter(e.get("class") for e in found.iter("div"))
            drawings = [e for e in found.iter(SVG + "svg") if e.get("role") == "img"]
            if not drawings or kinds["desk"] != kinds["phone"]:
                fail(name, "is drawn", len(drawings), "times:", kinds)
            if not table(found) or "Commands" not in words(found):
                fail(name, "has no table or no commands")
    arms = {line["arm"] for line in lines_of(results) if "arm" in line}
    quality = words(figure(page, "quality_against_speed")[0])
    for arm in arms:
        if arm not in quality:
            fail("quality against speed does not name", arm)
    # Who reads later tokens, or does not learn, is red, in a panel apart.
    panels = [e for e in figure(page, "quality_against_speed")[0].iter("div") if e.get("style")]
    red = [[words(t) for t in panel.iter(SVG + "text") if "bad" in (t.get("class") or "")] for panel in panels]
    if len(panels) != 2 or red[0] or set(red[1]) != {"expert-choice", "broken"}:
        fail("panels of quality against speed:", red)


def front(page, names):
    said = [words(e) for e in page.iter("li") if "On the front of loss and speed" in words(e)]
    if len(said) != 1 or not said[0].endswith(": " + names + "."):
        fail("the front is said to be", said)
    drawn = next(e for e in figure(page, "quality_against_speed")[0].iter(SVG + "svg") if e.get("role") == "img")
    labels = {words(t) for t in drawn.iter(SVG + "text") if t.get("class") == "label"}
    if labels != set(re.split(", | and ", names)):
        fail("the front is drawn through", labels)


# ---- numbers


def lines_of(path):
    for text in open(path, encoding="utf-8", errors="replace"):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            yield line


def close(text, value, digits, what):
    got = float(text.split()[0])
    if abs(got - value) > 0.51 * 10 ** -digits:
        fail(what, "is", got, "on the page,", value, "in the lines")


def best_rates(runs, failed):
    """{arm: (rate, {seed: run})}"""
    found = {}
    for arm in {run["arm"] for run in runs}:
        rates = collections.defaultdict(dict)
        for run in runs + [dict(line, val_loss=math.inf) for line in failed]:
            if run["arm"] == arm:
                rates[run["rate"]][run["seed"]] = run
        shared = set.intersection(*(set(seeds) for seeds in rates.values()))
        rate = min(rates, key=lambda r: statistics.fmean(rates[r][s]["val_loss"] for s in shared))
        found[arm] = rate, {seed: run for seed, run in rates[rate].items() if run["val_loss"] < math.inf}
    return found


def numbers(page, results, wanted_rate=None):
    lines = list(lines_of(results))
    sizes = list(dict.fromkeys(line["size"] for line in lines
                               if line.get("kind") in ("run", "timing") and "size" in line))
    sections = [e for e in page.iter("section") if e.find("h2") is not None and
                words(e.find("h2")) not in ("Machine", "Provenance")]
    if len(sizes) != len(sections):
        fail(len(sections), "comparisons for", len(sizes), "sizes")
    checked = 0
    for size, section in zip(sizes, sections):
        own = [line for line in lines if line.get("size") == size]
        if not any(line["kind"] == "run" for line in own):
            continue
        best = best_rates([line for line in own if line["kind"] == "run"],
                          [line for line in own if line["kind"] == "failed"])
        rows = {row["arm"]: row for row in table(figure(section, "quality_against_speed")[0])}
        if set(rows) != set(best):
            fail("arms differ:", set(rows) ^ set(best))
        for arm, (rate, runs) in best.items():
            losses, row = [run["val_loss"] for run in runs.values()], rows[arm]
            close(row["learning rate"], rate, 6, f"rate of {arm}")
            close(row["loss \u00b1 95 %"], statistics.fmean(losses), 4, f"loss of {arm}")
            if int(row["seeds"]) != len(losses):
                fail("seeds of", arm, row["seeds"])
            if len(losses) == 3:
                half = T95[3] * statistics.stdev(losses) / math.sqrt(3)
                close(row["loss \u00b1 95 %"].split("\u00b1")[1], half, 4, f"interval of {arm}")
            elif "\u00b1" in row["loss \u00b1 95 %"]:
                fail("an interval from", len(losses), "seeds:", arm)
            floors = [run.get("val_floor") for run in runs.values()]
            if None not in floors:
                close(row["above the floor"], statistics.fmean(losses) - statistics.fmean(floors), 4, f"{arm} above")
            checked += 1
        check_speeds(own, rows)
        check_differences(section, best)
    if wanted_rate:
        arm, rate = wanted_rate.split("=")
        if best[arm][0] != float(rate):
            fail("the check itself expects rate", best[arm][0])
    if not checked:
        fail("nothing was checked")


def check_speeds(own, rows):
    for arm in {line["arm"] for line in own if line["kind"] == "timing"} & set(rows):
        speeds = [1000 * line["tokens_per_step"] / line["ms"] for line in own
                  if line["kind"] == "timing" and line["arm"] == arm]
        flops = next(line["flops_per_token"] for line in own if line["arm"] == arm)
        if statistics.fmean(speeds) * flops > 640e9:   # two threads with AVX-512 at 5 GHz
            if rows[arm]["tokens/s"] != "\u2013":
                fail("an implausible speed of", arm, rows[arm]["tokens/s"])
        else:
            close(rows[arm]["tokens/s"], statistics.fmean(speeds), 0, f"speed of {arm}")


def check_differences(section, best):
    if "topk" not in best or len(best) < 2:
        return
    base = best["topk"][1]
    for row in table(figure(section, "against_the_baseline")[0]):
        runs = best[row["arm"]][1]
        values = [runs[seed]["val_loss"] - base[seed]["val_loss"] for seed in runs if seed in base]
        mean = statistics.fmean(values)
        close(row["difference"], mean, 4, f"difference of {row['arm']}")
        if int(row["seeds"]) != len(values):
            fail("pairs of", row["arm"])
        if len(values) < 3:
            if "no interval" not in row["said in words"] or row["Student's t"] != "\u2013":
                fail("something is claimed of", row)
            continue
        half = T95[3] * statistics.stdev(values) / math.sqrt(3)
        close(row["Student's t"].split()[1], half, 4, f"interval of {row['arm']}")
        spread = min(values) <= 0 <= max(values)    # three seeds of both signs: the bootstrap's interval holds 0
        unresolved = spread or abs(mean) <= half
        said = "not resolved" if unresolved else "lower loss" if mean < 0 else "higher loss"
        if row["said in words"] != said:
            fail(row["arm"], "is said to be", row["said in words"], "but is", said)


def logs(page, *paths):
    rows = {row["arm"]: row for row in table(figure(page, "quality_against_speed")[0])}
    for path in paths:
        arm = os.path.basename(os.path.dirname(path))
        entries = list(lines_of(path))
        close(rows[arm]["loss \u00b1 95 %"], [e["val_loss"] for e in entries if "val_loss" in e][-1], 4, arm)
        late = [e["load_cv"] for e in entries if "load_cv" in e][-3:]  # of 12 steps
        close(rows[arm]["load CV"], statistics.fmean(late), 2, f"load CV of {arm}")
        times = [e["ms"] for e in entries if "ms" in e and "loss" in e]
        close(rows[arm]["tokens/s"], 2 * 32 * 1000 / statistics.median(times[len(times) // 4:]), 0, f"speed of {arm}")
    found = figure(page, "domains_and_experts")[0]
    last = [e for e in lines_of(paths[0]) if "domain_expert" in e][-1]
    layer = max(range(len(last["mi"])), key=last["mi"].__getitem__)
    cells = {words(e) for e in found.iter(SVG + "title")}
    share = last["domain_expert"][layer][0][0]
    if not any(cell.endswith(f"expert 0: {100 * share:.1f}\u202f%") for cell in cells):
        fail("no cell with", share)


# ---- figures A to D, generation


def cell(row, column, value, digits, what):
    """The cell's first number; MISSING stands for no value."""
    if value is None:
        if row[column] != "\u2013":
            fail(what, column, "is", row[column], "but no line says it")
    else:
        close(row[column].split("%")[0], value, digits, f"{what}, {column},")


def keyed(found, columns):
    rows = {tuple(row[column] for column in columns): row for row in table(found)}
    return rows if len(rows) == len(table(found)) else fail("rows of", found.get("id"), "are not told apart")


def layer(page, path):
    lines = [line for line in lines_of(path) if line.get("kind") == "microbench"]

    def layout(line):
        return line["layout"] + (f" {line['capacity_factor']:g}" if line["capacity_factor"] else "")

    def place(line, *keys):
        return tuple(layout(line) if key == "layout" else str(line[key]) for key in keys)

    rows = keyed(figure(page, "figure_a")[0], ["grid", "width", "E", "K", "tokens", "router"])
    own = [line for line in lines if line["layout"] == "compact"]
    for line in own:
        row = rows[place(line, "grid", "dim", "experts", "top_k", "tokens", "router")]
        for stage, column in (("route", "route, ms (P50)"), ("permute", "plan, ms (P50)")):
            cell(row, column, line["stages"][stage]["ms"], 4, f"figure A, point {line['point']}")
        share = 100 * (line["stages"]["route"]["ms"] + line["stages"]["permute"]["ms"]) / line["ms"]
        cell(row, "both, of the forward", share, 1, f"figure A, point {line['point']}")
    lines_drawn = marks_of(figure(page, "figure_a")[0])
    if len(rows) != len(own) or lines_drawn != 2 * len(own):
        fail("figure A has", len(rows), "rows and", lines_drawn, "marks for", len(own), "points")

    rows = keyed(figure(page, "figure_b")[0], ["K", "E", "width", "tokens"])
    own = [line for line in lines if line["bw"]]
    for line in own:
        row = rows[place(line, "top_k", "experts", "dim", "tokens")]
        for kind in ("strict", "legacy", "moved"):
            cell(row, f"{kind}, GB/s", line["bw"][f"{kind}_gb_s"], 1, f"figure B, point {line['point']}")
        cell(row, "strict, of the peak", 100 * line["bw"]["strict_gb_s"] / 3350, 1, f"figure B, point {line['point']}")
    if len(rows) != len(own) or marks_of(figure(page, "figure_b")[0]) != len(own):
        fail("figure B has", len(rows), "rows for", len(own), "points")

    rows = keyed(figure(page, "figure_c")[0], ["grid", "tokens", "width", "E", "K", "router", "layout"])
    own = [line for line in lines if line["stages"]["experts"]["ms"] > 0]
    for line in own:
        row = rows[place(line, "grid", "tokens", "dim", "experts", "top_k", "router", "layout")]
        for stage, said in line["stages"].items():
            if said["ms"] > 0:
                cell(row, f"{stage}, ms", said["ms"], 4, f"figure C, point {line['point']}")
                share = row[f"{stage}, ms"].split("(")[1].split("%")[0]
                close(share, 100 * said["share"], 1, f"figure C, share of {stage}")
        cell(row, "forward, ms", line["ms"], 4, f"figure C, point {line['point']}")
    if len(rows) != len(own):
        fail("figure C has", len(rows), "rows for", len(own), "points")
    around = [100 * (1 - line["stages"]["experts"]["share"]) for line in own]
    said = f"take {min(around):.0f}\u202f% to {max(around):.0f}\u202f% of a layer's stages"
    if said not in words(figure(page, "figure_c")[0].find("h3")):
        fail("figure C's title does not say", said)


def marks_of(found):
    """Points with words on hover, in the drawings for a desk."""
    return sum(1 for desk in found.iter("div") if desk.get("class") == "desk" for e in desk.iter(SVG + "path")
               if e.find(SVG + "title") is not None)


def balance(page, path):
    lines = list(lines_of(path))
    best = best_rates([line for line in lines if line["kind"] == "run"],
                      [line for line in lines if line["kind"] == "failed"])
    rows = keyed(figure(page, "figure_d_")[0], ["arm"])
    if set(rows) != {(arm,) for arm in best}:
        fail("figure D has the arms", sorted(rows))
    for arm, (_, runs) in best.items():
        row = rows[(arm,)]
        for column, key, scale, digits in (("load CV", "load_cv", 1, 4), ("dropped", "drop", 100, 2),
                                           ("loss \u00b1 95 %", "val_loss", 1, 4)):
            cell(row, column, scale * statistics.fmean(run[key] for run in runs.values()), digits, arm)
        speeds = [line["tok_s"] for line in lines if line["kind"] == "timing" and line["arm"] == arm]
        cell(row, "tokens/s", statistics.fmean(speeds) if speeds else None, 0, arm)


def generation(page, path):
    rows = keyed(figure(page, "inference_1")[0], ["model", "batch"])
    lines = list(lines_of(path))
    for line in lines:
        row = rows[line["model"], str(line["batch"])]
        for column, value, digits in (
                ("new tokens/s", line.get("tok_s"), 1), ("token, ms (P50)", line["token_ms"]["p50"], 3),
                ("prompt tokens/s", line.get("prompt_tok_s"), 0),
                ("first token, ms (P50)", line.get("first_ms", {}).get("p50"), 3)):
            cell(row, column, value, digits, f"{line['model']}, batch {line['batch']}")
        for said in (line.get("tok_s"), line.get("prompt_tok_s")):
            if said and not any(f"{line['batch']} sequences: {said / 1e3:.3g}\u202fk" in words(e) or
                                f"{line['batch']} sequences: {said:.3g}" in words(e) for e in page.iter(SVG + "title")):
                fail("no point says", said)
    if len(rows) != len(lines):
        fail(len(rows), "rows for", len(lines), "lines")


def drawings(folder, count):
    names = sorted(os.listdir(folder))
    if len(names) != int(count) or any(not name.endswith(".svg") for name in names):
        fail(len(names), "files:", names)
    for name in names:
        root = parse(os.path.join(folder, name))
        text = open(os.path.join(folder, name), encoding="utf-8").read()
        if root.tag != SVG + "svg" or not root.get("viewBox") or "var(" in text or re.search(r"[\"( ]nan\b", text):
            fail(name, "is not a drawing that stands alone")


CHECKS = {"text": text, "figures": figures, "front": front, "numbers": numbers, "logs": logs, "layer": layer,
          "balance": balance, "generation": generation}

if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    command, path, *rest = sys.argv[1:]
    if command == "drawings":
        drawings(path, *rest)
    elif command in CHECKS:
        page = parse(path)
        whole(page, path)
        CHECKS[command](page, *rest)
    else:
        sys.exit(__doc__)
