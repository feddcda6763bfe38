"""Of the limits that the design named of itself (claim 9): those of which readings of handoff.csv,
pipeline.csv, auto_check.csv and back_pressure.csv, and the engine's defaults, say something."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from engine.config import EngineConfig
from engine.pipeline_stats import SERIAL
from experiments.auto_check import Checked, lines
from experiments.auto_rule import is_usual
from experiments.back_pressure import BLOCK_SIZE, BOUNDED, UNBOUNDED, Pressure
from experiments.claims import Finding
from experiments.harness import read_as
from experiments.pipeline_figures import deepest, regime_maps

EXPOSED = 0.02  # of a prompt's prefill: what a hand-over may keep decode waiting
STATIC = "48:84"  # the split that the engine takes where it is told to take one
LOST = 0.02  # of a step: what the choice of a split may cost against the best one
SAME_CHECK = ("commit", "gpu", "num_layers")  # columns that rows of one check share

Rows = Iterable[Mapping[str, str]]


def handoff_findings(rows: Rows, model: str) -> list[Finding]:
    """As rows of claims.csv. rows: of handoff.csv; those of the model's newest run count."""
    mine = [row for row in rows if row["model"] == model and row["way"] == "copy_engine"]
    same = _newest_run(mine)
    if not same:
        return []
    run = {
        "model": model,
        "workload": "one prompt after another",
        "command": f"python -m experiments.bench_handoff --model {model}",
        "num_gpus": 2,
    }
    shares = {
        mode: [float(r["exposed_ms_p50"]) / float(r["prefill_ms_p50"]) for r in same_mode]
        for mode in ("push", "slab")
        if (same_mode := [row for row in same if row["mode"] == mode])
    }
    found = []
    if len(shares) == 2:
        most = {mode: max(values) for mode, values in shares.items()}
        lengths = sorted({int(row["tokens"]) for row in same})
        why = (
            f"Pushed while prefill runs, blocks keep decode waiting for at most {most['push']:.1%} "
            f"of a prompt's prefill ({lengths[0]} to {lengths[-1]} tokens); sent whole behind it, "
            f"for up to {most['slab']:.1%}."
        )
        ratio = (1 + most["slab"]) / (1 + most["push"])
        is_lifted = most["push"] <= EXPOSED
        found.append(_finding("limit: synchronous copies", ratio, is_lifted, why, same[-1], **run))
    fraction = EngineConfig.prefill_kv_fraction
    why = (
        f"Prefill's pool takes {fraction:.2f} of what its GPU has for KV blocks, by default: "
        f"{1 + fraction:.2f} times the memory of one pool, not 2."
    )
    ratio = 2 / (1 + fraction)
    run |= {"workload": "prefill_kv_fraction", "command": "by arithmetic, from engine/config.py"}
    return [
        *found,
        _finding("limit: KV memory doubled", ratio, fraction < 1, why, same[-1], **run),
    ]


def split_findings(rows: Rows, model: str, checks: Rows = ()) -> list[Finding]:
    """What one split costs in the cells of the map of the GPU that was measured last, beside what
    the choices of decode_pipeline="auto" did wherever they were read again; without such readings
    the limit stands. rows: of pipeline.csv, of maps of several depths the `deepest` that has the
    split; checks: of auto_check.csv."""
    mine = [row for row in rows if row["model"] == model and is_usual(row)]
    stamp = max(mine, key=lambda row: row["date"], default=None)
    if stamp is None:
        return []
    mine = [row for row in mine if row["gpu"] == stamp["gpu"]]
    cells_of: dict[int, set[tuple[str, str]]] = {}
    for row in mine:
        if row["mode"] == STATIC:
            cells_of.setdefault(int(row["num_layers"]), set()).add((row["batch"], row["context"]))
    if not cells_of:
        return []
    num_layers = deepest(cells_of)
    mine = [row for row in mine if int(row["num_layers"]) == num_layers]
    stamp = max(mine, key=lambda row: row["date"])
    place = (stamp["gpu"], model, num_layers)
    one_split = regime_maps([row for row in mine if row["mode"] in (SERIAL, STATIC)]).get(place, {})
    if not one_split:
        return []
    worst = min(one_split, key=lambda cell: one_split[cell].speedup)
    taken = 1 / one_split[worst].speedup
    why = (
        f"On {STATIC} whatever the batch, a step takes up to {taken:.2f}x of the serial graph's "
        f"time ({worst[0]} requests of {worst[1]} tokens, {len(one_split)} cells). "
    )
    is_lifted = False
    if lost := auto_losses(checks):
        (name, batch, context, _), most = max(lost.items(), key=lambda item: item[1])
        is_lifted = most <= LOST
        why += (
            f"What auto chose took at most {most:.1%} longer ({name}, {batch} x {context}) than "
            f"the best that it had read, by readings of a second, in {len(lost)} of its closest "
            f"calls; {LOST:.0%} was aimed for."
        )
    else:
        why += "What auto chose was not read again."
    run = {
        "model": model,
        "workload": "decode steps, regime map",
        "command": f"python -m experiments.bench_pipeline --map --model {model} "
        f"--layers {num_layers}",
        "num_gpus": 1,
    }
    return [_finding("limit: static split", taken, is_lifted, why, stamp, **run)]


def auto_losses(checks: Rows) -> dict[tuple[str, int, int, str], float]:
    """By model, batch, context and max_num_seqs: how much longer the chosen mode took than the
    best. Rows of auto_check.csv: of each model and max_num_seqs those of the commit, GPU and depth
    read last."""
    of: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for row in checks:
        of.setdefault((row["model"], row["max_num_seqs"]), []).append(row)
    losses = {}
    for (model, size), rows in of.items():
        last = max(reversed(rows), key=lambda row: row["date"])
        same = [row for row in rows if all(row[name] == last[name] for name in SAME_CHECK)]
        checked = [
            replace(read_as(Checked, row), is_chosen=row["is_chosen"] == "True") for row in same
        ]
        for line in lines(checked):
            losses[model, line["batch"], line["context"], size] = line["lost"]
    return losses


def pressure_findings(rows: Rows, model: str) -> list[Finding]:
    """Of the newest run over a burst; rows: of back_pressure.csv."""
    same = _newest_run([row for row in rows if row["model"] == model])
    found = {row["config"]: read_as(Pressure, row) for row in same}
    if not found.keys() >= {BOUNDED, UNBOUNDED}:
        return []
    bounded, free = found[BOUNDED], found[UNBOUNDED]
    why = (
        f"{bounded.num_requests} prompts at once, decode blocks for "
        f"{_num_held(bounded)} requests: at most {bounded.peak_backlog} prompts ahead of decode "
        f"(bound {bounded.max_decode_backlog}), {bounded.num_preemptions} requests preempted, "
        f"{bounded.computed:.2f}x of the prompts' tokens computed; without bound and promise "
        f"{free.peak_backlog}, {free.num_preemptions} and {free.computed:.2f}x."
    )
    is_lifted = (
        bounded.peak_backlog <= bounded.max_decode_backlog and bounded.computed <= free.computed
    )
    run = {
        "model": model,
        "workload": f"{bounded.num_requests} x ({bounded.prompt_len} + {bounded.output_len}), "
        f"{bounded.num_layers} layers",
        "command": _pressure_command(bounded, same[-1]),
        "num_gpus": 2,
    }
    ratio = free.computed / bounded.computed
    return [_finding("limit: no back-pressure", ratio, is_lifted, why, same[-1], **run)]


def _pressure_command(bounded: Pressure, stamp: Mapping[str, str]) -> str:
    sizes = {
        "model": bounded.model,
        "layers": bounded.num_layers,
        "device": "cpu" if stamp["gpu"].startswith("cpu") else "cuda",
        "requests": bounded.num_requests,
        "prompt": bounded.prompt_len,
        "output": bounded.output_len,
        "held": _num_held(bounded),
        "backlog": bounded.max_decode_backlog,
    }
    flags = [f"--{name} {value}" for name, value in sizes.items()]
    return " ".join(["python -m experiments.back_pressure", *flags])


def _num_held(pressure: Pressure) -> int:
    """Requests that decode's pool holds with all of their tokens."""
    num_each = -(-(pressure.prompt_len + pressure.output_len) // BLOCK_SIZE)
    return pressure.num_kv_blocks // num_each


def _newest_run(rows: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    stamp = max(rows, key=lambda row: row["date"], default=None)
    if stamp is None:
        return []
    return [row for row in rows if (row["date"], row["commit"]) == (stamp["date"], stamp["commit"])]


def _finding(
    statement: str,
    ratio: float,
    is_lifted: bool,
    why: str,
    stamp: Mapping[str, str],
    *,
    num_gpus: int,
    **run: Any,
) -> Finding:
    """ratio: of what the limit would cost to what there is instead; run: model, workload and
    command."""
    return Finding(
        claim=9,
        statement=statement,
        claimed="",
        **run,
        hardware=f"{num_gpus} x {stamp['gpu']}",
        commit=stamp["commit"],
        date=stamp["date"],
        one_s="",
        replicas_s="",
        pd_s="",
        over_one=f"{ratio:.2f}",
        over_replicas="",
        verdict="lifted" if is_lifted else "stands",
        why=why,
    )
