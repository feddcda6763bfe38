"""The choices of decode_pipeline="auto" held against longer readings of the same steps.

    python -m experiments.auto_check --model Qwen3-8B [--layers 36] [--starts 3] [--max-seconds 240]

The engine starts --starts times over dummy weights, each time in a process of its own that goes on
from the times which those before have kept. In the last one, before any request comes, the serial
step and every split that `auto` read there are read again, the closest calls first: each
--reading-ms, behind a second of the same steps. A calibration has less time for a reading, and
chooses the best of several.

A row for each mode goes to experiments/results/auto_check.csv once its cell is read: what the
calibration read, what was read now, and whether this is the mode that steps of such a batch run on.
`lost` is by how much the chosen one takes longer than the best (issue 5: 2 % at most).
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine import LLM
from engine.auto_pipeline import AutoPipeline
from engine.device import DeviceStream
from engine.pipeline import DecodePipeline
from engine.pipeline_choice import mode_at
from engine.pipeline_stats import SERIAL
from engine.trial_steps import Reading
from experiments.harness import RESULTS, append_row, environment, table
from experiments.pipeline_start import (
    add_start_arguments,
    engine_options,
    fresh_models,
    in_a_process,
    sizes_of,
    start,
)

WHAT = "check"
SHAPE = ("model", "num_layers", "reading_ms", "max_num_seqs", "num_kv_blocks")  # columns in front
SETTLE_MS = 1000.0  # of the same steps: the first mode comes straight behind captures, a pause


@dataclass(frozen=True, kw_only=True)
class Checked:
    """One mode of the steps of one batch at one context."""

    batch: int
    context: int  # tokens that each request holds
    mode: str
    auto_ms: float  # what the calibration read
    ms: float  # what a longer reading says
    is_chosen: bool


def check(
    what: str,
    folder: Path,
    options: dict[str, Any],
    *,
    reading_ms: float,
    max_seconds: float,
    write: Callable[[Checked], None],
) -> list[Checked]:
    """Start, and read again what the start has read, the closest calls first; none is begun after
    max_seconds. Each is written once it is read, so that a run that is cut off has what it read."""
    begin = time.perf_counter()
    with LLM(folder, **options) as llm:
        runner: DecodePipeline = llm.decode_runner
        if not isinstance(runner, AutoPipeline):
            why = runner.get_pipeline_statistics()["why_none"]
            print(f"{what}: nothing to check: serial: {why}", file=sys.stderr)
            return []
        found: list[Checked] = []
        with DeviceStream(runner.device).active():
            for batch, context in cells(runner):
                if time.perf_counter() - begin > max_seconds:
                    print(f"{what}: out of time at {batch} x {context}", file=sys.stderr)
                    break
                rows = checked(runner, batch, context, Reading(SETTLE_MS, reading_ms))
                for row in rows:
                    write(row)
                found += rows
        if not found:
            print(f"{what}: nothing to check: nothing was timed", file=sys.stderr)
        return found


def cells(runner: AutoPipeline) -> list[tuple[int, int]]:
    """Batch and context of all that was read and that the KV cache holds; first where serial and
    the best split are the closest."""
    num_tokens = runner.kv_cache.num_blocks * runner.kv_cache.block_size
    gaps = {
        (batch, context): abs(ms[SERIAL] / min(splits) - 1)
        for batch, readings in runner.readings.items()
        for context, ms in readings.items()
        if (splits := [t for mode, t in ms.items() if mode != SERIAL])
        and batch * context <= num_tokens
    }
    return sorted(gaps, key=lambda cell: (gaps[cell], cell))


def checked(runner: AutoPipeline, batch: int, context: int, reading: Reading) -> list[Checked]:
    """Its modes, serial first."""
    read = runner.readings[batch][context]
    found = runner.read_again(batch, context, reading)
    chosen = mode_at(runner.choices.get(batch, ()), batch, batch * context)
    return [
        Checked(
            batch=batch,
            context=context,
            mode=mode,
            auto_ms=read[mode],
            ms=ms,
            is_chosen=mode == chosen,
        )
        for mode, ms in found.items()
    ]


def write_row(out: Path, shape: Mapping[str, Any], stamp: Mapping[str, Any], row: Checked) -> None:
    """Append it to the CSV, the columns of all rows around its own."""
    append_row(out, {**shape, **asdict(row), **stamp})


def lines(rows: Sequence[Checked]) -> list[dict[str, Any]]:
    """One for each cell: the best split, the chosen mode, and what that loses."""
    found = []
    for batch, context in dict.fromkeys((row.batch, row.context) for row in rows):
        of = {row.mode: row for row in rows if (row.batch, row.context) == (batch, context)}
        chosen = next((mode for mode, row in of.items() if row.is_chosen), SERIAL)
        splits = [mode for mode in of if mode != SERIAL]
        if not splits:
            continue
        best = min(splits, key=lambda mode: of[mode].ms)
        found.append(
            {
                "batch": batch,
                "context": context,
                "serial_ms": of[SERIAL].ms,
                "best_split": best,
                "speedup": of[SERIAL].ms / of[best].ms,
                "auto_read": of[SERIAL].auto_ms / of[best].auto_ms,
                "chosen": chosen,
                "lost": of[chosen].ms / min(row.ms for row in of.values()) - 1,
            }
        )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, then print a table and the largest loss."""
    args = _parse(argv)
    stamp = environment(torch.device(args.device))
    options = engine_options(args, WHAT)
    for folder, model in fresh_models(args):
        for i in range(1, args.starts):
            in_a_process(start, f"start {i}", folder, options)
        shape = model | {"reading_ms": args.reading_ms} | sizes_of(args)
        work = partial(
            check,
            reading_ms=args.reading_ms,
            max_seconds=args.max_seconds,
            write=partial(write_row, args.out, shape, stamp),
        )
        if found := lines(in_a_process(work, WHAT, folder, options)):
            print(f"{model['model']}, {stamp['gpu']}\n{table(found, list(found[0]))}")
            worst = max(found, key=lambda line: line["lost"])
            print(f"lost at most: {worst['lost']:.1%}, {worst['batch']} x {worst['context']}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_start_arguments(p)
    p.add_argument("--starts", type=int, default=3, metavar="N")
    p.add_argument("--reading-ms", type=float, default=1000.0, metavar="MS")
    p.add_argument("--max-seconds", type=float, default=240.0, help="of the last start")
    p.add_argument("--out", type=Path, default=RESULTS / "auto_check.csv")
    args = p.parse_args(argv)
    if args.starts < 1 or not args.reading_ms > 0:
        p.error(f"--starts and --reading-ms must be positive, got {args.starts}, {args.reading_ms}")
    return args


if __name__ == "__main__":
    main()
