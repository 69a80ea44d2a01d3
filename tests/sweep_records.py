"""Checks and compares lines that experiments/sweep wrote.

    tests/sweep_records.py schema FILE.jsonl         every line has what its kind promises, of the right type
    tests/sweep_records.py same A.jsonl B.jsonl      the same lines but for clocks, places and order
    tests/sweep_records.py get FILE.jsonl EXPRESSION   prints EXPRESSION, Python over `records` and kind `of("run")`

Silent and status 0 when all is right.
"""
import json
import math
import sys

NUMBER, TEXT, LIST, MAP, BOOL = (int, float), str, list, dict, bool
NULL = type(None)
PROVENANCE = {"ts": TEXT, "sweep": TEXT, "size": TEXT, "arm": TEXT, "budget": TEXT, "seed": int, "config": MAP,
              "command": TEXT, "commit": TEXT, "device": TEXT, "versions": MAP, "driver": (TEXT, NULL),
              "params_total": int, "params_active": int, "flops_per_token": NUMBER, "leaky": BOOL, "sees_batch": BOOL,
              "learned": BOOL}
MEANS = ("load_cv", "max_vio", "load_kl", "entropy", "mean_entropy", "drop", "token_drop", "padding", "dead", "margin",
         "router_main_norm", "router_balance_norm")
RUN = dict(PROVENANCE, rate=float, phase=TEXT, steps=int, tokens=int, train_seconds=NUMBER, val_loss=NUMBER,
           val_bpb=NUMBER, val_floor=NUMBER + (NULL,), val_domains=(MAP, NULL), domain_expert=(LIST, NULL),
           mi=(LIST, NULL), val=LIST, train=LIST, loads=LIST, router_gradient=MAP, ms=NUMBER, side_by_side=int,
           peak_bytes=int, **{name: NUMBER + (NULL,) for name in MEANS})
KINDS = {"run": RUN,
         "before": dict(RUN, rate=NULL),
         "failed": dict(PROVENANCE, rate=float, phase=TEXT, why=TEXT),
         "timing": dict(PROVENANCE, weights=TEXT, rate=float, ms=NUMBER, ms_p95=NUMBER, tok_s=NUMBER,
                        tokens_per_step=int, steps=int, warmup_steps=int, stages_ms=MAP,
                        peak_flops=NUMBER + (NULL,), peak_from=TEXT, others_busy=NUMBER + (NULL,)),
         "recipe": {"ts": TEXT, "sweep": TEXT, "question": TEXT, "expect": TEXT, "baseline": TEXT, "budget": TEXT,
                    "seeds": LIST, "rates": MAP, "rate_seeds": int, "sizes": LIST, "arms": LIST, "text": TEXT}}
CLOCKS = {"ts", "ms", "ms_p95", "tok_s", "stages_ms", "others_busy", "train_seconds", "peak_bytes", "command",
          "peak_flops", "peak_from"}
PATHS = {"out", "init_from", "resume"}


def read(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def schema(path):
    for number, record in enumerate(read(path), 1):
        where, wanted = f"{path}:{number}", KINDS[record["kind"]]
        assert set(record) - {"kind"} >= set(wanted), f"{where}: lacks {set(wanted) - set(record)}"
        for name, kind in wanted.items():
            value = record[name]
            assert isinstance(value, kind), f"{where}: {name} is {value!r}"
            assert isinstance(value, bool) == (kind is BOOL) or kind == (TEXT, NULL), f"{where}: {name} is {value!r}"
        if record["kind"] == "run":
            check_run(where, record)
        if record["kind"] == "timing":
            assert math.isclose(record["tok_s"], record["tokens_per_step"] / record["ms"] * 1e3), where
            assert 0 < record["ms"] <= record["ms_p95"], where
            assert record["tokens_per_step"] == record["config"]["batch"] * record["config"]["seq"], where
            # of a run of its own, in which each stage is waited for: of the same size, no more can be said
            share = sum(record["stages_ms"].values()) / record["ms"]
            assert "experts" in record["stages_ms"] and 0.01 < share < 50, f"{where}: stages {record['stages_ms']}"


def check_run(where, record):
    config = record["config"]
    assert record["steps"] == config["steps"] and record["seed"] == config["seed"], where
    assert math.isclose(record["rate"], config["lr"]), where
    assert record["tokens"] == record["steps"] * config["batch"] * config["seq"], where
    for name, width in (("val", 3), ("train", 3), ("loads", 5)):
        points = record[name]
        assert 0 < len(points) <= 60 and all(len(p) == width for p in points), f"{where}: {name}"
        steps = [p[0] for p in points]
        assert steps == sorted(set(steps)) and steps[-1] == record["steps"], f"{where}: {name} of steps {steps}"
    assert record["val"][-1][2] == record["val_loss"], where
    late = record["loads"][len(record["loads"]) * 3 // 4:]  # all logged steps, where they are fewer than 60
    for i, name in enumerate(("load_cv", "max_vio", "entropy", "drop"), 1) if len(record["loads"]) < 60 else ():
        values = [point[i] for point in late if point[i] is not None]
        assert values == [] or math.isclose(record[name], sum(values) / len(values), abs_tol=1e-9), f"{where}: {name}"


def comparable(record):
    kept = {name: value for name, value in record.items() if name not in CLOCKS}
    if "config" in kept:
        kept["config"] = {name: value for name, value in kept["config"].items() if name not in PATHS}
    return json.dumps(kept, sort_keys=True)


def same(first, second):
    a, b = (sorted(map(comparable, read(path))) for path in (first, second))
    for one, other in zip([line for line in a if line not in b], [line for line in b if line not in a]):
        one, other = json.loads(one), json.loads(other)
        print([(name, str(one[name])[:80], str(other.get(name))[:80]) for name in one if one[name] != other.get(name)])
    assert a == b, f"{len(a)} lines and {len(b)} lines differ"


if sys.argv[1] == "schema":
    schema(sys.argv[2])
elif sys.argv[1] == "same":
    same(sys.argv[2], sys.argv[3])
else:
    lines = read(sys.argv[2])
    print(eval(f"({sys.argv[3]})", {"records": lines, "of": lambda kind: [r for r in lines if r["kind"] == kind]}))
