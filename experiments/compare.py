"""Two-GPU PD beside two mixed replicas and one device: engine.csv as one Markdown table.

    python -m experiments.compare [--from experiments/results/engine.csv] [--model Qwen3-8B]

Of each workload, load and GPU the newest run counts that has both two-GPU PD and the replicas;
medians of its readings. Below the table, for arrivals, the aim: PD's TPOT p99 is at most 0.8x of
that of the replicas, where both serve the same rate.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from experiments.claims import newest_run
from experiments.engine_csv import EngineReading, read_engine_csv
from experiments.harness import RESULTS

TPOT_AIM = 0.80  # PD's p99 over that of the replicas, at most,
EQUAL = 0.98  # where PD's output tokens per second are so much of theirs, at least
HEADER = (
    "| model | workload | load | one, tok/s | replicas, tok/s | PD, tok/s | PD over replicas "
    "| TTFT p50 ms, replicas | PD | TPOT p99 ms, replicas | PD | GPUs, commit |"
)

Run = dict[str, list[EngineReading]]  # readings by configuration


def runs_of(readings: Sequence[EngineReading], models: Sequence[str] | None = None) -> list[Run]:
    """The newest run of each workload, load and GPU, in the order in which these first came."""
    cells = dict.fromkeys((r.model, r.workload, r.load, r.gpu) for r in readings)
    runs = [
        newest_run(readings, *cell[:3], configs=("replicas", "pd"), gpu=cell[3])
        for cell in cells
        if models is None or cell[0] in models
    ]
    return [run for run in runs if run is not None]


def median(run: Run, config: str, column: str) -> float | None:
    """Of one column; None where it was not measured."""
    values = [getattr(reading, column) for reading in run.get(config, ())]
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def ratio(run: Run, column: str) -> float | None:
    """PD over replicas; None where either was not measured, or is nothing."""
    pd, replicas = (median(run, config, column) for config in ("pd", "replicas"))
    return pd / replicas if pd is not None and replicas else None


def table(runs: Sequence[Run]) -> str:
    """Markdown, a line for each run, and one for each aim."""
    lines = [HEADER, "|---" * HEADER.count(" |") + "|"]
    lines += [_line(run) for run in runs]
    aims = [_aim(run) for run in runs if run["pd"][0].load is not None]
    return "\n".join([*lines, *[""] * bool(aims), *aims])


def _line(run: Run) -> str:
    pd, over = run["pd"][0], ratio(run, "output_tok_s")
    speeds = [_number(median(run, c, "output_tok_s"), 0) for c in ("one", "replicas", "pd")]
    times = [
        _number(median(run, config, column), digits)
        for column, digits in (("ttft_ms_p50", 0), ("tpot_ms_p99", 2))
        for config in ("replicas", "pd")
    ]
    where = f"{pd.gpus} x {pd.gpu}, {pd.commit}"
    head = [pd.model, pd.workload, _number(pd.load, 2)]
    cells = [*head, *speeds, f"{_number(over, 2)}x", *times, where]
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _aim(run: Run) -> str:
    pd, tpot, speed = run["pd"][0], ratio(run, "tpot_ms_p99"), ratio(run, "output_tok_s")
    what = f"{pd.model}, {pd.workload} at {pd.load:.2f} of the replicas' capacity, {pd.gpu}"
    if tpot is None or speed is None:
        return f"{what}: no TPOT."
    found = "missed" if tpot > TPOT_AIM else "holds" if speed >= EQUAL else "no equal throughput"
    return (
        f"{what}: TPOT p99 {tpot:.2f}x of theirs, aim {TPOT_AIM:.2f}x, at {speed:.2f}x of their "
        f"throughput: {found}."
    )


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--from", type=Path, dest="source", default=RESULTS / "engine.csv")
    p.add_argument("--model", nargs="+", help="all where none is named")
    args = p.parse_args(argv)
    try:
        runs = runs_of(read_engine_csv(args.source), args.model)
    except ValueError as error:
        p.error(str(error))
    if not runs:
        p.error(f"--from must have a run of replicas and pd, got none in {args.source}")
    print(table(runs))


if __name__ == "__main__":
    main()
