"""What starting costs: serial, with decode_pipeline="auto", and with graphs of five splits.

    python -m experiments.pipeline_start --model Qwen3-8B [--layers 36] [--what serial splits]

Every start is an LLM over dummy weights in a process of its own, one after the other. `compile` is
a serial one, in which Triton compiles what it has not kept from earlier processes; `cold` is the
first with "auto", which also compiles what splits need; `second` and `third` go on from the times
that the ones before have kept, in a cache folder of this run alone. `splits` captures all batch
buckets, serial and on each of five splits, in one pool (issue 5: under 2 GB and 60 s). A row for
each goes to experiments/results/pipeline_start.csv.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from engine import LLM
from engine.auto_pipeline import TIME_WAS_UP, AutoPipeline
from engine.build import decode_buffers, graph_pool, make_cache, make_decoder
from engine.config import EngineConfig
from engine.device import DeviceStream
from engine.pipeline import DecodePipeline
from engine.pipeline_needs import ask_for_connections
from engine.pipeline_stats import SERIAL
from engine.stage_streams import GpuStreams, StageStreams
from experiments.harness import RESULTS, append_row, environment, table
from experiments.shapes import SHAPES, write_config
from green.driver import GreenContextError
from models.config import ModelConfig

STARTS = ("compile", "serial", "cold", "second", "third")
SERIAL_STARTS = STARTS[:2]
CAPTURED = "splits"
SPLITS = ((24, 108), (32, 100), (48, 84), (64, 68), (96, 36))
NUM_KV_BLOCKS = 64  # for captures, which run over padding alone
MAX_MODEL_LEN = 4096
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one process reports."""

    what: str
    seconds: float  # of all of it, compilation included
    num_graphs: int
    capture_s: float  # of the seconds, in which graphs were captured
    graph_mib: float  # of the GPU's memory, what captures took
    taken_mib: float | str = ""  # the same and what came with it, compiled kernels for one
    calibration_s: float | str = ""  # of the seconds; empty where nothing is calibrated
    num_untimed: int | str = ""  # batches that are left, in whole or in part, to the next start
    num_pipelined: int | str = ""  # batches that may be pipelined


def start(what: str, folder: Path, options: dict[str, Any]) -> list[Found]:
    """From nothing to an LLM that serves."""
    begin = time.perf_counter()
    with LLM(folder, **options) as llm:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds, stats = time.perf_counter() - begin, llm.stats()
        is_auto = options["decode_pipeline"] == "auto"
        return [
            Found(
                what=what,
                seconds=seconds,
                num_graphs=stats["num_graphs"],
                capture_s=stats["capture_ms"] / 1e3,
                graph_mib=stats["graph_bytes"] / MIB,
                **(_calibration(what, llm.decode_runner) if is_auto else {}),
            )
        ]


def _calibration(what: str, runner: DecodePipeline) -> dict[str, Any]:
    """What `auto` adds to a start; on standard error what it chose, and why."""
    stats = runner.get_pipeline_statistics()
    if stats["why_none"] is not None:
        print(f"{what}: serial: {stats['why_none']}", file=sys.stderr)
    if not isinstance(runner, AutoPipeline):
        return {}
    for batch, reason in stats["choices"].items():
        print(f"{what}: {batch} requests: {reason}", file=sys.stderr)
    return {
        "calibration_s": runner.calibration_s,
        "num_untimed": sum(TIME_WAS_UP in reason for reason in stats["choices"].values()),
        "num_pipelined": sum(map(bool, runner.choices.values())),
    }


def capture(what: str, folder: Path, options: dict[str, Any]) -> list[Found]:
    """Graphs of every bucket: serial, then on each split that can be had."""
    config = EngineConfig(model=str(folder), **options)
    ask_for_connections(config)
    device = torch.device(config.resolve_device())
    with DeviceStream(device).active(), ExitStack() as stack:
        model_config = ModelConfig.from_folder(folder)
        decoder = make_decoder(config, model_config, folder, device, MAX_MODEL_LEN)
        splits = _partitions(device)
        pipeline = DecodePipeline(
            decoder,
            make_cache(config, decoder, NUM_KV_BLOCKS),
            decode_buffers(config, decoder),
            max_model_len=MAX_MODEL_LEN,
            graph_pool=graph_pool(config, device),
            device=device,
            max_num_seqs=config.max_num_seqs,
            streams=splits,
            min_requests=1,
        )
        stack.callback(pipeline.close)
        return [
            _captured(pipeline, f"all {SERIAL}", [None]),
            _captured(pipeline, f"all of {len(splits)} splits", splits),
        ]


def _partitions(device: torch.device) -> list[StageStreams]:
    """Those that can be had, and a line for each that cannot."""
    found = []
    for split in SPLITS:
        try:
            found.append(GpuStreams.partitioned(split, device))
        except (GreenContextError, ValueError) as error:
            print(f"{split[0]}:{split[1]} left out: {error}", file=sys.stderr)
    return found


def _captured(pipeline: DecodePipeline, what: str, modes: Sequence[StageStreams | None]) -> Found:
    """Capture all buckets of each mode, and note what that added."""
    graphs, device = pipeline.graphs, pipeline.device
    num_graphs, num_bytes = len(graphs.captured), graphs.captured_bytes
    capture_ms = graphs.capture_ms
    free, begin = _free_bytes(device), time.perf_counter()
    for mode in modes:
        pipeline.modes = dict.fromkeys(pipeline.modes, mode)
        pipeline.warm_up()
    taken = free - _free_bytes(device)
    return Found(
        what=what,
        seconds=time.perf_counter() - begin,
        num_graphs=len(graphs.captured) - num_graphs,
        capture_s=(graphs.capture_ms - capture_ms) / 1e3,
        graph_mib=(graphs.captured_bytes - num_bytes) / MIB,
        taken_mib=taken / MIB,
    )


def _free_bytes(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


Work = Callable[[str, Path, dict[str, Any]], list[Any]]


def in_a_process(work: Work, what: str, folder: Path, options: dict[str, Any]) -> list[Any]:
    """Nothing where that fails, and why on standard error."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(work, what, folder, options).result()
        except (RuntimeError, ValueError) as error:
            print(f"{what} left out: {error}", file=sys.stderr)
            return []


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each, append its rows to the CSV at once, print a table."""
    args = _parse(argv)
    device = torch.device(args.device)
    stamp, rows = environment(device), []
    for folder, model in fresh_models(args):
        for what in args.what:
            if device.type != "cuda" and what not in SERIAL_STARTS:
                print(f"{what} left out: a CPU has no SMs to divide", file=sys.stderr)
                continue
            work = capture if what == CAPTURED else start
            for found in in_a_process(work, what, folder, engine_options(args, what)):
                rows.append(model | sizes_of(args) | asdict(found))
                append_row(args.out, rows[-1] | stamp)
    if rows:
        print(table(rows, list(rows[0])))


def fresh_models(args: argparse.Namespace) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folder of each model and the columns that say which it is, with nothing in the cache that
    an earlier run or another model has kept."""
    with TemporaryDirectory() as root:
        for model in args.model:
            layers = args.layers or SHAPES[model]["num_hidden_layers"]
            folder = write_config(model, Path(root) / model, num_hidden_layers=layers)
            os.environ["GREENLANE_CACHE"] = str(Path(root) / f"{model} cache")
            yield folder, {"model": model, "num_layers": layers}


def sizes_of(args: argparse.Namespace) -> dict[str, int | None]:
    """Options of the LLM, and columns."""
    return {"max_num_seqs": args.max_num_seqs, "num_kv_blocks": args.num_kv_blocks}


def engine_options(args: argparse.Namespace, what: str) -> dict[str, Any]:
    """Of the LLM that starts."""
    mode = "disabled" if what in SERIAL_STARTS else "auto"
    options = {"device": args.device, "load_format": "dummy", "max_model_len": MAX_MODEL_LEN}
    return options | sizes_of(args) | {"decode_pipeline": mode}


def add_start_arguments(p: argparse.ArgumentParser) -> None:
    """Those that `fresh_models` and `engine_options` take."""
    p.add_argument("--model", nargs="+", choices=SHAPES, default=["Qwen3-8B"])
    p.add_argument("--layers", type=int, help="layers of it to run (default: all)")
    p.add_argument("--device", default="cuda:0")
    p.add_argument("--max-num-seqs", type=int, default=1024, metavar="N")
    p.add_argument("--num-kv-blocks", type=int, metavar="N", help="default: what memory is left")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_start_arguments(p)
    what = (*STARTS, CAPTURED)
    p.add_argument("--what", nargs="+", choices=what, default=what, help="default: all, in order")
    p.add_argument("--out", type=Path, default=RESULTS / "pipeline_start.csv")
    return p.parse_args(argv)


if __name__ == "__main__":
    main()
