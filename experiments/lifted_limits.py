"""Of the limits that the design named of itself (claim 9): those of which readings of handoff.csv
and the engine's defaults say something."""

from collections.abc import Iterable, Mapping

from engine.config import EngineConfig
from experiments.claims import Finding

EXPOSED = 0.02  # of a prompt's prefill: what a hand-over may keep decode waiting
COMMAND = "python -m experiments.bench_handoff --model"


def findings(rows: Iterable[Mapping[str, str]], model: str) -> list[Finding]:
    """As rows of claims.csv. rows: of handoff.csv; those of the model's newest run count."""
    mine = [row for row in rows if row["model"] == model and row["way"] == "copy_engine"]
    if not mine:
        return []
    stamp = max(mine, key=lambda row: row["date"])
    same = [row for row in mine if (row["date"], row["commit"]) == (stamp["date"], stamp["commit"])]
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
        found.append(_finding("limit: synchronous copies", ratio, is_lifted, why, model, stamp))
    fraction = EngineConfig.prefill_kv_fraction
    why = (
        f"Prefill's pool takes {fraction:.2f} of what its GPU has for KV blocks, by default: "
        f"{1 + fraction:.2f} times the memory of one pool, not 2."
    )
    ratio = 2 / (1 + fraction)
    return [*found, _finding("limit: KV memory doubled", ratio, fraction < 1, why, model, stamp)]


def _finding(
    statement: str, ratio: float, is_lifted: bool, why: str, model: str, stamp: Mapping[str, str]
) -> Finding:
    return Finding(
        claim=9,
        statement=statement,
        claimed="",
        model=model,
        workload="one prompt after another",
        command=f"{COMMAND} {model}",
        hardware=f"2 x {stamp['gpu']}",
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
