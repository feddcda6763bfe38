"""The design's own claims for prefill and decode on two GPUs, held against what was measured.

    python -m experiments.claims [--from experiments/results/engine.csv]

Prints experiments/results/claims.csv; with --from, writes it first, but for the claims that
`experiments.pipeline_claims` judges: of those, the ratio "over one device" is the one that the
claim is about. Of each workload the newest run
counts in which one device, two mixed replicas and two-GPU PD all served it: medians of its
readings. A claim is a speed-up over one device, and its verdict follows from two ratios:

- refuted: PD over one device is below 95 % of the claim;
- holds only against a weak baseline: it is not, but two mixed replicas on the same two GPUs are
  faster than PD;
- holds: it is not, and they are not.
"""

import argparse
import csv
import statistics
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from experiments.engine_csv import EngineReading, read_engine_csv
from experiments.harness import RESULTS, read_rows

REACHED = 0.95  # of a claim that says "about"
CONFIGS = ("one", "replicas", "pd")


@dataclass(frozen=True)
class Claim:
    """What was expected of one kind of work, and the workload here that is that kind."""

    number: int
    statement: str
    speedup: float  # over one device
    workload: str


CLAIMS = (
    Claim(1, "long prompts (256 tokens), throughput", 1.8, "long-prompts-256"),
    Claim(2, "short prompts (32 tokens), throughput", 1.3, "short-prompts"),
    Claim(3, "decode-heavy, 4 prompts, throughput", 1.2, "decode-heavy-4"),
    Claim(3, "decode-heavy, 256 prompts, throughput", 1.2, "decode-heavy-256"),
    Claim(4, "one burst of 256-token prompts, time: 500 ms to 350 ms", 500 / 350, "burst-256-64"),
)


@dataclass(frozen=True)
class Finding:
    """One claim and what came of it; the fields are the columns of claims.csv."""

    claim: int
    statement: str
    claimed: str  # speed-up over one device
    model: str
    workload: str
    command: str
    hardware: str
    commit: str
    date: str
    one_s: str
    replicas_s: str
    pd_s: str
    over_one: str
    over_replicas: str
    verdict: str
    why: str


COLUMNS = [f.name for f in fields(Finding)]


def verdict(claimed: float, over_one: float, over_replicas: float) -> str:
    """The rule above. All three are speed-ups: PD as claimed, over one device, over replicas."""
    if over_one < REACHED * claimed:
        return "refuted"
    return "holds" if over_replicas >= 1 else "holds only against a weak baseline"


def newest_run(
    readings: Sequence[EngineReading],
    model: str,
    workload: str,
    load: float | None = None,
    *,
    configs: Sequence[str] = CONFIGS,
    gpu: str | None = None,
) -> dict[str, list[EngineReading]] | None:
    """Readings by configuration of the last run that has all of configs; None: there is none. gpu:
    of this one; None: of whichever it was."""
    runs: dict[object, dict[str, list[EngineReading]]] = {}
    for r in readings:
        is_there = gpu is None or r.gpu == gpu
        if is_there and (r.model, r.workload, r.load, r.eager) == (model, workload, load, False):
            runs.setdefault(r.run, {}).setdefault(r.config, []).append(r)
    whole = [run for run in runs.values() if all(config in run for config in configs)]
    return max(whole, key=lambda run: run["pd"][0].date, default=None)


def judge(claim: Claim, run: dict[str, list[EngineReading]]) -> Finding:
    """ValueError where the configurations did not serve the same tokens."""
    served = {(r.requests, r.prompt_tokens, r.output_tokens) for c in CONFIGS for r in run[c]}
    if len(served) != 1:
        raise ValueError(f"{claim.workload} must be the same work everywhere, got {sorted(served)}")
    seconds = {c: statistics.median(r.seconds for r in run[c]) for c in CONFIGS}
    over_one, over_replicas = (seconds[c] / seconds["pd"] for c in CONFIGS[:2])
    found, r = verdict(claim.speedup, over_one, over_replicas), run["pd"][0]
    command = "python -m experiments.bench_engine --configs one replicas pd"
    return Finding(
        claim=claim.number,
        statement=claim.statement,
        claimed=f"{claim.speedup:.2f}",
        model=r.model,
        workload=claim.workload,
        command=f"{command} --model {r.model} --workloads {claim.workload}",
        hardware=f"{r.gpus} x {r.gpu}",
        commit=r.commit,
        date=r.date,
        **{f"{c}_s": f"{seconds[c]:.4f}" for c in CONFIGS},
        over_one=f"{over_one:.2f}",
        over_replicas=f"{over_replicas:.2f}",
        verdict=found,
        why=(
            f"One device took {seconds['one'] * 1e3:.0f} ms, PD {seconds['pd'] * 1e3:.0f} ms: "
            f"{over_one:.2f}x, {over_one / claim.speedup:.0%} of the {claim.speedup:.2f}x claimed; "
            f"two replicas took {seconds['replicas'] * 1e3:.0f} ms, "
            f"{seconds['one'] / seconds['replicas']:.2f}x of one device, "
            f"so that PD is {over_replicas:.2f}x of them."
        ),
    )


def findings(readings: Sequence[EngineReading], model: str) -> list[Finding]:
    """Of each claim that was measured, in the order of CLAIMS."""
    runs = [(claim, newest_run(readings, model, claim.workload)) for claim in CLAIMS]
    return [judge(claim, run) for claim, run in runs if run is not None]


def write_csv(path: Path, found: Sequence[Finding]) -> None:
    """Replace claims.csv. ValueError where nothing was found: the old one stays."""
    if not found:
        raise ValueError(f"a run must have {', '.join(CONFIGS)} for a claim's workload, got none")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(finding) for finding in found)


def read_csv(path: Path) -> list[Finding]:
    """Every row of claims.csv. ValueError where it is none."""
    rows = read_rows(path, COLUMNS)
    return [Finding(**row | {"claim": int(row["claim"])}) for row in rows]


def others(path: Path, numbers: Container[int], model: str) -> list[Finding]:
    """What claims.csv, where there is one, has of other claims than these, or of other models."""
    kept = read_csv(path) if path.exists() else []
    return [f for f in kept if f.claim not in numbers or f.model != model]


def table(found: Sequence[Finding]) -> str:
    """Markdown, a line for each finding; below it the arithmetic and the commands."""
    lines = [
        "| # | claim | model | claimed | ratio; 1 to 4: over one | over replicas | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for f in found:
        ratios = (f.claimed, f.over_one, f.over_replicas)
        figures = " | ".join(f"{ratio}x" if ratio else "-" for ratio in ratios)
        lines.append(f"| {f.claim} | {f.statement} | {f.model} | {figures} | {f.verdict} |")
    for f in found:
        lines += ["", f"{f.claim}, {f.workload}: {f.why}"]
        lines.append(f"`{f.command}`, {f.hardware}, commit {f.commit}, {f.date}")
    measured = {f.workload for f in found}
    missing = [f"{c.number} ({c.workload})" for c in CLAIMS if c.workload not in measured]
    if missing:
        lines += ["", "Not measured: " + ", ".join(missing) + "."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--from", type=Path, dest="source", metavar="ENGINE_CSV")
    p.add_argument("--model", default="Qwen3-0.6B", help="the one that the claims were made for")
    p.add_argument("--csv", type=Path, default=RESULTS / "claims.csv")
    args = p.parse_args(argv)
    try:
        if args.source is not None:
            found = findings(read_engine_csv(args.source), args.model)
            kept = others(args.csv, {claim.number for claim in CLAIMS}, args.model)
            write_csv(args.csv, found and found + kept)
        print(table(read_csv(args.csv)))
    except ValueError as error:
        p.error(str(error))


if __name__ == "__main__":
    main()
