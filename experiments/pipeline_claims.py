"""The design's own claims for decode in two stages (5 to 9), measured and judged.

    python -m experiments.pipeline_claims [--measure] [--model Qwen3-0.6B] [--max-seconds 240]

--measure serves prompts of random tokens with random weights on one device, on two (pd), and on two
with decode in two stages of a few splits, and appends a row for each to
experiments/results/pipeline_claims.csv. What the newest row of each says goes to claims.csv, whose
other claims stay, and is printed; of the limits in claim 9, handoff.csv, pipeline.csv and
back_pressure.csv say something too. A claim of a figure holds from 95 % of it on.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from engine import LLM, SamplingParams
from experiments import auto_check, lifted_limits
from experiments.auto_check import Checked
from experiments.back_pressure import Pressure
from experiments.bench_handoff import HandoffReading
from experiments.bench_pipeline import Row as StepRow
from experiments.claims import REACHED, Finding, others, read_csv, table, write_csv
from experiments.harness import RESULTS, append_row, environment, read_as, read_rows
from experiments.shapes import SHAPES, write_config

ASKED = "16:16"  # as the design set them
SPLITS = (ASKED, "16:116", "48:84", "64:68")
NUM_PROMPTS = (4, 1, 2, 16, 64)  # the claimed ones first
PROMPT_TOKENS, OUTPUT_TOKENS = 32, 64
REPEATS = 5
NUMBERS = (5, 6, 7, 8, 9)
STEP = 0.03  # by which times scatter
COMMAND = "python -m experiments.pipeline_claims --measure"


@dataclass(frozen=True)
class Row:
    """One engine that served so many prompts at once."""

    model: str
    config: str  # one, pd, or pd and a split; eager: without CUDA graphs
    prompts: int
    prompt_tokens: int  # of each
    output_tokens: int
    seconds: float  # medians over repeats
    tpot_ms: float
    partitioning: str  # what the engine says of itself


def configs() -> dict[str, dict[str, Any]]:
    """The engines by name, those that most claims need first."""
    pd = {"enable_two_gpu_pd": True}
    found: dict[str, dict[str, Any]] = {"one": {}, "pd": pd}
    for split in SPLITS:
        attention, ffn = map(int, split.split(":"))
        sms = {"decode_attention_sm": attention, "decode_ffn_sm": ffn}
        pipeline = {"decode_pipeline": "static", "decode_pipeline_min_requests": 1}
        found[f"pd {split}"] = pd | pipeline | sms
    found[f"pd {ASKED} eager"] = found[f"pd {ASKED}"] | {"enforce_eager": True}
    return found


def measure(model: str, name: str, options: Mapping[str, Any]) -> Iterator[Row]:
    """One engine, a row for each number of prompts."""
    sizes = {"max_num_seqs": max(NUM_PROMPTS), "max_model_len": 1024, "num_kv_blocks": 4096}
    # the same prompts come again in larger batches, and are to be computed each time
    sizes |= {"load_format": "dummy", "enable_prefix_caching": False}
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    with TemporaryDirectory() as folder:
        path = write_config(model, Path(folder))
        with LLM(path, **sizes, **options) as llm:
            for num in NUM_PROMPTS:
                seconds, tpot_ms = [], []
                for repeat in range(REPEATS + 1):
                    start = time.perf_counter()
                    outputs = llm.generate(_prompts(num, repeat), params)
                    seconds.append(time.perf_counter() - start)
                    tpot_ms += [output["metrics"]["tpot_ms"] for output in outputs]
                runner = llm.decode_runner
                has_stages = hasattr(runner, "get_pipeline_statistics")
                stats = runner.get_pipeline_statistics() if has_stages else {}
                yield Row(
                    model,
                    name,
                    num,
                    PROMPT_TOKENS,
                    OUTPUT_TOKENS,
                    statistics.median(seconds[1:]),  # the first warms up
                    statistics.median(tpot_ms[num:]),
                    stats.get("partitioning", "none"),
                )


def _prompts(num: int, repeat: int) -> list[list[int]]:
    """No two of a batch, and none of another repeat, begin alike."""
    return [
        [(repeat * 7919 + i * 104_729 + j * 31) % 50_000 for j in range(PROMPT_TOKENS)]
        for i in range(num)
    ]


@dataclass(frozen=True)
class Judged:
    """One claim, the ratio that came of it, and what that says."""

    claim: int
    statement: str
    claimed: str
    config: str  # the one that is judged
    ratio: float
    verdict: str
    why: str


class Judge:
    """Verdicts from the rows by config and number of prompts. A split that the engine did not get
    does not count: its rows are those of serial decode."""

    def __init__(self, read: Mapping[tuple[str, int], Row]) -> None:
        self._read = read
        rows = {split: read.get((f"pd {split}", 4)) for split in SPLITS}
        self.splits = [s for s, row in rows.items() if row is not None and row.partitioning == s]
        self.is_whole = ("one", 4) in read and ("pd", 4) in read and bool(self.splits)
        self.best = max(self.splits, key=self.gain) if self.is_whole else ""

    def seconds(self, config: str) -> float:
        """Of 4 prompts, to the last token."""
        return self._read[config, 4].seconds

    def tpot(self, config: str, prompts: int = 4) -> float:
        """Milliseconds a token."""
        return self._read[config, prompts].tpot_ms

    def gain(self, split: str, prompts: int = 4) -> float:
        """Of decode in two stages over serial decode, both on two devices."""
        return self.tpot("pd", prompts) / self.tpot(f"pd {split}", prompts)

    def all(self) -> list[Judged]:
        """Of each claim for which there are rows."""
        if not self.is_whole:
            return []
        found = [self._decode(s) for s in dict.fromkeys([*self.splits[:1], self.best])]
        found += [self._both(), self._direction()]
        if ASKED in self.splits:
            found.append(self._fair_split())
            if (f"pd {ASKED} eager", 4) in self._read:
                found.append(self._graphs())
        return found

    def _decode(self, split: str) -> Judged:
        gain, ms = self.gain(split), self.tpot(f"pd {split}")
        why = (
            f"Decode on a device of its own took {self.tpot('pd'):.3f} ms a token, in two stages "
            f"on {split} {ms:.3f} ms: {gain:.2f}x of the 1.70x claimed."
        )
        statement = f"pipeline on PD, 4 prompts x 64, {split}"
        return Judged(5, statement, "1.70", f"pd {split}", gain, _holds(gain >= REACHED * 1.7), why)

    def _both(self) -> Judged:
        one, pd = self.seconds("one"), self.seconds(f"pd {self.best}")
        why = f"One device took {one * 1e3:.0f} ms, two, decode on {self.best}, {pd * 1e3:.0f} ms."
        statement = "PD and pipeline over one device, 4 prompts x 64"
        return Judged(
            6, statement, "2.00", f"pd {self.best}", one / pd, _holds(one / pd >= REACHED * 2), why
        )

    def _direction(self) -> Judged:
        configs = ("pd", f"pd {self.best}")
        every = [n for n in sorted(NUM_PROMPTS) if all((c, n) in self._read for c in configs)]
        gains = {n: self.gain(self.best, n) for n in every}
        grows = all(gains[b] >= gains[a] * (1 - STEP) for a, b in pairwise(every))
        loses = all(gain < 1 for n, gain in gains.items() if n < 4)
        last = gains[every[-1]]
        why = f"On {self.best}: " + ", ".join(f"{gain:.2f}x at {n}" for n, gain in gains.items())
        why += " prompts; it must not fall with their number, lose below 4 and win at the most."
        statement = "gains grow with batch, loss below 4 requests"
        return Judged(
            7,
            statement,
            "",
            f"pd {self.best}",
            last,
            _holds(grows and loses and last > 1 + STEP),
            why,
        )

    def _fair_split(self) -> Judged:
        fair = self.gain(ASKED) / self.gain(self.best)
        of = ", ".join(self.splits)
        why = f"{ASKED} reached {fair:.0%} of the speed of {self.best}, the best of {of}."
        statement = f"{ASKED} SMs is a fair split at 4 requests"
        return Judged(8, statement, "1.00", f"pd {ASKED}", fair, _holds(fair >= REACHED), why)

    def _graphs(self) -> Judged:
        lifted = self.tpot(f"pd {ASKED} eager") / self.tpot(f"pd {ASKED}")
        why = f"A pipelined step is one CUDA graph here, {lifted:.2f}x as fast as without."
        verdict = "lifted" if lifted > 1 else "stands"
        statement = "limit: no CUDA graphs with the pipeline"
        return Judged(9, statement, "", f"pd {ASKED}", lifted, verdict, why)


def _holds(does: bool) -> str:
    return "holds" if does else "refuted"


def findings(read: Mapping[tuple[str, int], Row], stamp: Mapping[str, str]) -> list[Finding]:
    """The verdicts as rows of claims.csv."""
    judge = Judge(read)
    return [
        Finding(
            claim=judged.claim,
            statement=judged.statement,
            claimed=judged.claimed,
            model=read["pd", 4].model,
            workload=f"{PROMPT_TOKENS}-token prompts",
            command=f"{COMMAND} --model {read['pd', 4].model}",
            hardware=f"2 x {stamp['gpu']}",
            commit=stamp["commit"],
            date=stamp["date"],
            one_s=f"{judge.seconds('one'):.4f}",
            replicas_s="",
            pd_s=f"{judge.seconds(judged.config):.4f}",
            over_one=f"{judged.ratio:.2f}",
            over_replicas="",
            verdict=judged.verdict,
            why=judged.why,
        )
        for judged in judge.all()
    ]


def newest(path: Path, model: str) -> tuple[dict[tuple[str, int], Row], dict[str, str]]:
    """The last row of each config and number of prompts of the newest commit and GPU that can be
    judged, and the last one's stamp: a run that was cut off says nothing. ValueError where there is
    none."""
    columns = [*Row.__dataclass_fields__, *environment("cpu")]
    rows = [row for row in read_rows(path, columns) if row["model"] == model]
    for run in dict.fromkeys((row["commit"], row["gpu"]) for row in reversed(rows)):
        same = [row for row in rows if (row["commit"], row["gpu"]) == run]
        read = {(row["config"], int(row["prompts"])): read_as(Row, row) for row in same}
        if Judge(read).is_whole:
            return read, same[-1]
    raise ValueError(
        f"{path} must hold rows of {model} for one, pd and a split in one run, got {len(rows)} rows"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, where that is asked for; then judge, and print the table."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # read where CUDA starts
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--measure", action="store_true")
    p.add_argument("--model", choices=SHAPES, default="Qwen3-0.6B")
    p.add_argument("--max-seconds", type=float, default=float("inf"), help="begin no engine later")
    p.add_argument("--csv", type=Path, default=RESULTS / "pipeline_claims.csv")
    p.add_argument("--handoff", type=Path, default=RESULTS / "handoff.csv")
    p.add_argument("--steps", type=Path, default=RESULTS / "pipeline.csv")
    p.add_argument("--checks", type=Path, default=RESULTS / "auto_check.csv")
    p.add_argument("--pressure", type=Path, default=RESULTS / "back_pressure.csv")
    p.add_argument("--claims", type=Path, default=RESULTS / "claims.csv")
    args = p.parse_args(argv)
    try:
        if args.measure:
            _measure_all(args)
        found = findings(*newest(args.csv, args.model))
        found += _limits(args)
        write_csv(args.claims, others(args.claims, NUMBERS, args.model) + found)
        print(table(read_csv(args.claims)))
    except ValueError as error:
        p.error(str(error))


def _limits(args: argparse.Namespace) -> list[Finding]:
    """What other results say of claim 9, those that are there."""

    def rows(path: Path, kind: type, in_front: Sequence[str] = ()) -> list[dict[str, str]]:
        columns = [*in_front, *kind.__dataclass_fields__, *environment("cpu")]
        return read_rows(path, columns) if path.exists() else []

    checks = rows(args.checks, Checked, auto_check.SHAPE)
    return [
        *lifted_limits.handoff_findings(rows(args.handoff, HandoffReading), args.model),
        *lifted_limits.split_findings(rows(args.steps, StepRow), args.model, checks),
        *lifted_limits.pressure_findings(rows(args.pressure, Pressure), args.model),
    ]


def _measure_all(args: argparse.Namespace) -> None:
    if torch.cuda.device_count() < 2:
        raise ValueError(f"--measure needs two GPUs, got {torch.cuda.device_count()}")
    deadline, stamp = time.perf_counter() + args.max_seconds, environment("cuda")
    for name, options in configs().items():
        if time.perf_counter() > deadline:
            print(f"out of time, left out: {name}", file=sys.stderr)
            continue
        for row in measure(args.model, name, options):
            append_row(args.csv, asdict(row) | stamp)


if __name__ == "__main__":
    main()
