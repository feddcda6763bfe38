"""The whole engine on dummy weights and token-id prompts, by configuration and workload.

    python -m experiments.bench_engine --model Qwen3-0.6B --configs one replicas pd [--quick]

Configurations: `one` device; `replicas`, two engines that each do all, one per GPU, requests dealt
out in turn; `pd`, prefill on GPU 0 and decode on GPU 1. Each engine has a process of its own, and
clocks start when all are up and have rehearsed the workload; time runs to the end of the last.

Workloads: experiments/workloads.py. Poisson arrivals come at each of --loads times the capacity, in
requests per second. The capacity of `replicas` and `pd` is the same, so that both get one trace at
one absolute rate: what `replicas` reached in this run with the burst of that shape (a closed
workload, measured first, the best of its readings). Without `replicas` it is what the configuration
itself reached. `one` skips Poisson arrivals beside `replicas`, which is the same thing twice.
Goodput counts requests with TTFT <= 500 ms and TPOT <= 20 ms.

--quick has fewer workloads, loads and repeats; none is made smaller. A row for each reading goes to
experiments/results/engine.csv.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from experiments.engine_csv import EngineReading, migrate
from experiments.harness import RESULTS, append_row, table
from experiments.replicas import Replicas
from experiments.serving import figures
from experiments.shapes import SHAPES, write_config
from experiments.workloads import BURSTS, CLOSED, POISSON, Workload

LOADS = (0.5, 0.7, 0.9)
QUICK_LOADS = (0.8,)
QUICK_WORKLOADS = (
    "long-prompts-256",
    "short-prompts",
    "decode-heavy-4",
    "decode-heavy-256",
    "burst-256-64",
    "poisson-1024-128",
)
# some last less than half a second: one reading says little
MIN_REPEATS = {"batch1": 3, "decode-heavy-4": 3, "decode-heavy-256": 3, "burst-256-64": 3}
CONFIGS = ("one", "replicas", "pd")  # in the order of a run: pd takes the rates of replicas
TABLE = [
    *("model", "workload", "config", "load", "output_tok_s", "goodput_req_s"),
    *("ttft_ms_p50", "ttft_ms_p99", "tpot_ms_p50", "tpot_ms_p99"),
]


def engine_options(config: str, device: str) -> list[dict[str, Any]]:
    """Options of each engine's LLM. device: cpu, or cuda for the GPUs 0 and 1."""
    if config == "pd":
        both = {"enable_two_gpu_pd": True, "prefill_device_id": 0, "decode_device_id": 1}
        return [{"device": device} | both]
    num_engines = {"one": 1, "replicas": 2}[config]
    return [{"device": "cpu" if device == "cpu" else f"cuda:{i}"} for i in range(num_engines)]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, append each row to the CSV at once, print a table."""
    args = _parse(argv)
    migrate(args.out)
    rows = []
    for reading in _measure_all(args):
        row = asdict(reading)
        append_row(args.out, row)
        rows.append({column: "" if row[column] is None else row[column] for column in TABLE})
        print(*list(rows[-1].values())[:5], flush=True)
    print(table(rows, TABLE))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument(
        "--model",
        nargs="+",
        default=["Qwen3-0.6B"],
        help=f"one of {', '.join(SHAPES)}, or a folder with a config.json",
    )
    p.add_argument("--configs", nargs="+", default=["one"], choices=CONFIGS)
    p.add_argument("--workloads", nargs="+", choices=[*CLOSED, *POISSON], metavar="WORKLOAD",
                   help=", ".join([*CLOSED, *POISSON]))  # fmt: skip
    p.add_argument("--loads", nargs="+", type=float, help=f"shares of the capacity: {LOADS}")
    p.add_argument("--quick", action="store_true")
    p.add_argument("--repeat", type=int, default=1, help="readings of each closed workload")
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    p.add_argument("--max-model-len", type=int, default=4608)
    p.add_argument("--num-kv-blocks", type=int)
    p.add_argument("--enforce-eager", action="store_true")
    p.add_argument("--out", type=Path, default=RESULTS / "engine.csv")
    args = p.parse_args(argv)
    for model in args.model:
        if model not in SHAPES and not (Path(model) / "config.json").exists():
            p.error(f"--model must be one of {', '.join(SHAPES)} or a folder, got {model!r}")
    num_gpus = 1 if args.configs == ["one"] else 2
    if args.device == "cuda" and torch.cuda.device_count() < num_gpus:
        p.error(f"--configs {args.configs} must have {num_gpus} GPUs, "
                f"got {torch.cuda.device_count()}")  # fmt: skip
    # bursts come with the arrivals that need them
    full = [name for name in [*CLOSED, *POISSON] if name not in BURSTS]
    args.workloads = args.workloads or (QUICK_WORKLOADS if args.quick else full)
    args.loads = args.loads or (QUICK_LOADS if args.quick else LOADS)
    if any(not load > 0 for load in args.loads) or args.repeat < 1:
        p.error(f"--loads and --repeat must be positive, got {args.loads} and {args.repeat}")
    return args


def _measure_all(args: argparse.Namespace) -> Iterator[EngineReading]:
    options: dict[str, Any] = {
        "load_format": "dummy",
        "max_model_len": args.max_model_len,
        "num_kv_blocks": args.num_kv_blocks,
        "enforce_eager": args.enforce_eager,
        "max_num_batched_tokens": 16384,
        "enable_prefix_caching": False,
    }
    stamp: dict[str, str] = {}  # one for all readings: it tells this run from others
    for model in args.model:
        capacities: dict[str, float] = {}
        for config in [c for c in CONFIGS if c in args.configs]:
            engines = engine_options(config, args.device)
            with tempfile.TemporaryDirectory() as temporary:
                in_shapes = model in SHAPES
                folder = write_config(model, Path(temporary)) if in_shapes else Path(model)
                with Replicas(folder, [options | own for own in engines]) as replicas:
                    stamp = stamp or replicas.environment
                    common = {"model": model if in_shapes else folder.name, "config": config}
                    common |= {"gpus": 1 if config == "one" else 2, "eager": args.enforce_eager}
                    for fields in _measure(replicas, config, capacities, args):
                        yield EngineReading(**common, **fields, **stamp)


def _measure(
    replicas: Replicas, config: str, capacities: dict[str, float], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Every workload on one configuration; its bursts leave their capacities for the next."""
    is_half = config == "one" and "replicas" in args.configs
    poisson = [] if is_half else [name for name in args.workloads if name in POISSON]
    bursts = [POISSON[name].burst_name for name in poisson]
    is_reference = config == "replicas" or "replicas" not in args.configs
    for name in dict.fromkeys([*(n for n in args.workloads if n in CLOSED), *bursts]):
        workload = CLOSED[name]()
        best = 0.0
        for reading in _read(replicas, workload, max(args.repeat, MIN_REPEATS.get(name, 1))):
            best = max(best, reading["requests"] / reading["seconds"])
            yield {"workload": name} | reading
        if is_reference:
            capacities[name] = best
    for name in poisson:
        for load in args.loads:
            rate = load * capacities[POISSON[name].burst_name]
            for reading in _read(replicas, POISSON[name].at_rate(rate), 1):
                yield {"workload": name, "load": load, "rate": round(rate, 3)} | reading


def _read(replicas: Replicas, workload: Workload, repeats: int) -> Iterator[dict[str, Any]]:
    # kernels that this workload is the first to need are compiled before the clock starts
    replicas.run(workload.rehearsal())
    for _ in range(repeats):
        served, seconds = replicas.run(workload)
        yield figures(workload, served, seconds)


if __name__ == "__main__":
    main()
