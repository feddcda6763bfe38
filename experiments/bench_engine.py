"""The whole engine on dummy weights and token-id prompts, by configuration and workload.

    python -m experiments.bench_engine --model Qwen3-0.6B --configs one replicas pd [--quick]

Configurations: `one` device; `replicas`, two engines that each do all, one per GPU, requests dealt
out in turn; `pd`, prefill on GPU 0 and decode on GPU 1; `pd_pipeline`, the same with decode in two
stages, on as many SMs each as `LLM` gives them unasked. Each engine has a process of its own, and
clocks start when all are up and have rehearsed the workload; time runs to the end of the last.
Where both are asked for, `one` is the first of the replicas, while the other one is idle.

Every engine decodes up to --max-num-seqs requests at a time, whatever it serves: by default as many
as the largest workload has, so that none waits for anything but memory. Readings of configurations
that are up together take turns.

Workloads: experiments/workloads.py, in the order of WORKLOADS, the most telling ones first. Short
ones are read again until READ_SECONDS are measured. Poisson arrivals come at each of --loads times
the capacity, in requests per second. The capacity of `replicas` and `pd` is the same, so that both
get one trace at one absolute rate: what `replicas` reached in this run with the burst of that shape
(a closed workload, measured first, the best of its readings). Without `replicas` it is what the
configuration itself reached. `one` skips Poisson arrivals beside `replicas`, which is the same
thing twice. Goodput counts requests with TTFT <= 500 ms and TPOT <= 20 ms.

--quick has fewer workloads and loads; none is made smaller. --max-seconds bounds the run: a set of
engines has a share of what is left, start-up included, and begins no workload behind it. It is half
as much again as an equal one, since what is not needed goes to the sets behind.
A row for each reading goes to experiments/results/engine.csv as soon as its workload is read, a
line with the median one to the terminal, first the seconds since the start. What fails is reported,
and the next configuration measured all the same; the exit code is then 1.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from experiments.engine_csv import EngineReading, migrate
from experiments.engine_sets import CONFIGS, EngineSet, Reading, engine_sets
from experiments.harness import RESULTS, append_row, cell
from experiments.shapes import add_model_argument, checkpoint
from experiments.workloads import CLOSED, POISSON

LOADS = (0.5, 0.7, 0.9)
QUICK_LOADS = (0.8,)
QUICK_WORKLOADS = (
    "long-prompts-256",
    "short-prompts",
    "poisson-1024-128",
    "decode-heavy-256",
    "decode-heavy-4",
    "burst-256-64",
)
WORKLOADS = (
    *QUICK_WORKLOADS,
    "long-prompts-4096",
    "offline",
    "poisson-4096-256",
    "fixed",
    "batch1",
)
SHARE = 1.5  # of an equal share of the time that is left, for each set of engines
LINE = {
    **{"workload": 18, "config": 12, "load": 5, "output_tok_s": 13, "goodput_req_s": 14},
    **{"ttft_ms_p50": 12, "ttft_ms_p99": 12, "tpot_ms_p50": 12, "tpot_ms_p99": 12},
}

Capacities = dict[tuple[str, str, str], float]  # (model, config, workload) -> requests per second


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, append the rows as they come, print a line for each workload."""
    args = _parse(argv)
    start = time.perf_counter()
    migrate(args.out)
    has_failed, capacities, stamp = False, {}, {}
    print("seconds" + "".join(name.rjust(width) for name, width in LINE.items()))
    with tempfile.TemporaryDirectory() as folder:
        sets = [
            engines
            for model in args.model
            for engines in engine_sets(
                checkpoint(model, Path(folder)),
                args.configs,
                _options(args),
                device=args.device,
            )
        ]
        for index, engines in enumerate(sets):
            now = time.perf_counter()
            left = start + args.max_seconds - now
            end = now + left * min(1.0, SHARE / (len(sets) - index))
            try:
                with engines.replicas as replicas:
                    _say(start, f"  {engines.model} {' and '.join(engines.configs)}: up")
                    stamp = stamp or replicas.environment  # one for all: it tells this run
                    for readings in _measure(engines, capacities, args, end):
                        rows = [EngineReading(**reading, **stamp) for reading in readings]
                        for row in rows:
                            append_row(args.out, asdict(row))
                        _say(start, _line(rows))
            except (RuntimeError, AssertionError) as error:
                has_failed = True
                print(f"{engines.model} {engines.configs}: {error}", file=sys.stderr, flush=True)
    if has_failed:
        sys.exit(1)


def _say(start: float, text: str) -> None:
    print(f"{time.perf_counter() - start:7.1f}{text}", flush=True)


def _line(rows: Sequence[EngineReading]) -> str:
    median = sorted(rows, key=lambda row: row.seconds)[len(rows) // 2]
    return "".join(cell(getattr(median, name)).rjust(width) for name, width in LINE.items())


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_argument(p)
    p.add_argument("--configs", nargs="+", default=["one"], choices=CONFIGS)
    p.add_argument("--workloads", nargs="+", choices=[*CLOSED, *POISSON], metavar="WORKLOAD",
                   help=", ".join([*CLOSED, *POISSON]))  # fmt: skip
    p.add_argument("--loads", nargs="+", type=float, help=f"shares of the capacity: {LOADS}")
    p.add_argument("--quick", action="store_true")
    p.add_argument("--max-seconds", type=float, default=math.inf)
    p.add_argument("--repeat", type=int, default=1, help="readings of a closed workload, at least")
    p.add_argument("--max-num-seqs", type=int, default=1024)
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    p.add_argument("--max-model-len", type=int, default=4608)
    p.add_argument("--num-kv-blocks", type=int)
    p.add_argument("--enforce-eager", action="store_true")
    p.add_argument("--out", type=Path, default=RESULTS / "engine.csv")
    args = p.parse_args(argv)
    num_gpus = 1 if args.configs == ["one"] else 2
    if args.device == "cuda" and torch.cuda.device_count() < num_gpus:
        p.error(f"--configs {args.configs} must have {num_gpus} GPUs, "
                f"got {torch.cuda.device_count()}")  # fmt: skip
    args.workloads = args.workloads or (QUICK_WORKLOADS if args.quick else WORKLOADS)
    args.loads = args.loads or (QUICK_LOADS if args.quick else LOADS)
    if any(not load > 0 for load in args.loads) or args.repeat < 1:
        p.error(f"--loads and --repeat must be positive, got {args.loads} and {args.repeat}")
    return args


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "load_format": "dummy",
        "max_num_seqs": args.max_num_seqs,
        "max_model_len": args.max_model_len,
        "num_kv_blocks": args.num_kv_blocks,
        "enforce_eager": args.enforce_eager,
        "max_num_batched_tokens": 16384,
        "enable_prefix_caching": False,
    }


def _measure(
    engines: EngineSet, capacities: Capacities, args: argparse.Namespace, end: float
) -> Iterator[list[Reading]]:
    """Readings of each workload on each configuration; those of bursts leave their capacities
    behind. end: time.perf_counter() from which on no workload is begun."""
    for name in args.workloads:
        if time.perf_counter() >= end:
            print(f"no time left for {name} and what follows", file=sys.stderr, flush=True)
            return
        if name in CLOSED:
            engines.rehearse(CLOSED[name]())
            yield from engines.read_closed(engines.configs, name, args.repeat).values()
        else:
            yield from _arrivals(engines, name, capacities, args)


def _arrivals(
    engines: EngineSet, name: str, capacities: Capacities, args: argparse.Namespace
) -> Iterator[list[Reading]]:
    config, poisson = engines.configs[-1], POISSON[name]
    reference = "replicas" if "replicas" in args.configs else config
    key = (engines.model, reference, name)
    engines.rehearse(poisson.burst())
    if config == reference:
        readings = engines.read_closed([config], poisson.burst_name, args.repeat)[config]
        capacities[key] = max(r["requests"] / r["seconds"] for r in readings)
        yield readings
    for load in args.loads if key in capacities else ():
        rate = load * capacities[key]
        reading = engines.read(config, name, poisson.at_rate(rate))
        yield [reading | {"load": load, "rate": round(rate, 3)}]


if __name__ == "__main__":
    main()
