"""A decode step serial and pipelined, on two plain streams and on partitions of the SMs.

    python -m experiments.bench_pipeline --model Qwen3-8B --cells 512x512 1024x512
        --splits 40:92 48:84 56:76 [--layers 36] [--num 2] [--qkv ffn] [--o attention] [--timed]
        [--energy]
    python -m experiments.bench_pipeline --model Qwen3-8B --map --max-seconds 240

A cell is batch x context, all requests of one length; weights and KV blocks are random. --map takes
all of the regime map, those first that have the most to win by arithmetic; a cell for which time or
memory does not suffice is left out, and said to be. Those in the CSV already, of this GPU and
commit, are not measured again: a map can be made in several runs. Each mode is one CUDA graph, all
captured before the first is timed, over replays behind half a second of the same, the first behind
two: `serial`, the whole batch in one piece; `in order`, the cut of the pipeline on one stream;
`plain`, two streams that share all SMs, their kernels' grids whole or, as `plain 40:92` (not with
--map), as large as the split; and each split. Tokens and logits of a mode are compared with those
of `in order`, to the bit. --layers of fewer than the model has makes room for more KV blocks. Such
times stand for a model's once what a step does around its layers (ends_ms: embedding, LM head,
sampling) is taken off, but for what the pipeline takes to fill and drain: of two micro-batches a
thirteenth of 6 layers, a 73rd of 36. --energy replays each mode for some seconds, and notes the
joules of a step: at the power limit its time goes by them. A row for each mode of each cell goes to
experiments/results/pipeline.csv.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from engine.build import ops_of
from engine.device_rates import rates_of, step_model
from engine.kv_cache import KVCache
from engine.pipeline_stats import SERIAL
from engine.stage_schedule import STAGES, Placement
from engine.stage_streams import GpuStreams, InOrder, StageStreams
from engine.step_model import StepModel
from experiments import energy
from experiments.harness import RESULTS, append_row, environment, read_rows, table
from experiments.pipeline_cell import BEHIND_A_PAUSE, BLOCK_SIZE, Cell
from experiments.pipeline_map import CellSize, fitting, most_telling_first, texts, whole_map
from experiments.shapes import SHAPES, write_config
from green.driver import GreenContextError
from models.config import ModelConfig
from models.decoder import Decoder
from models.weights import dummy_weights

SPLITS = ("40:92", "48:84", "56:76", "64:68", "72:60", "80:52")
TABLE = ("batch", "context", "mode", "ms_p50", "of_serial", "same_logits", "overlap", "watts")


@dataclass(frozen=True)
class Row:
    """One mode of one cell."""

    model: str
    num_layers: int
    batch: int
    context: int
    mode: str
    num_micro_batches: int
    qkv_stage: str
    o_stage: str
    attention_sms: int | str  # granted; empty where a stage has none of its own
    ffn_sms: int | str
    ms_p20: float
    ms_p50: float
    ms_p80: float
    ends_ms: float  # of each of these, the part that is not layers
    model_ms: float | str  # by the arithmetic of engine.step_model; empty where it says nothing
    same_tokens: int  # tokens of the batch that `in order` draws too
    same_logits: bool  # all bits of all logits
    attention_ms: float | str  # busy, by events in a graph of its own; empty without --timed
    ffn_ms: float | str
    layers_ms: float | str
    overlap: float | str
    sustained_ms: float | str  # of steps without a pause; empty without --energy
    sustained_mj: float | str  # millijoules of such a step
    capture_ms: float
    kv_bytes: int  # of all layers
    layer_bytes: int  # weights of all layers, once; each micro-batch reads them
    layer_flops: int  # of the products
    head_bytes: int


def measure(
    cell: Cell,
    modes: Sequence[StageStreams],
    args: argparse.Namespace,
    model: StepModel | None = None,
) -> Iterator[Row]:
    """A row for the serial step, then one for each mode; the first of these is `in order`."""
    counts = _counts(cell)
    ends_ms = cell.ends().p50
    wanted_ids, wanted = cell.step(modes[0]), cell.buffers.logits.clone()
    same: dict[StageStreams | None, tuple[int, bool]] = {}
    for mode in (None, *modes):  # all are captured before the first is timed
        cell.buffers.logits.zero_()
        ids = cell.step(mode)
        same_tokens = sum(a == b for a, b in zip(ids, wanted_ids, strict=True))
        same[mode] = same_tokens, _same_bits(cell.buffers.logits, wanted)
    cell.time(None, BEHIND_A_PAUSE)  # of no account
    for mode, (same_tokens, same_logits) in same.items():
        times = cell.time(mode)
        is_timed = args.timed and mode is not None and cell.pipeline.device.type == "cuda"
        empty = dict.fromkeys(("attention_ms", "ffn_ms", "layers_ms", "overlap"), "")
        granted = None if mode is None else mode.granted
        attention_sms, ffn_sms = ("", "") if granted is None else granted
        yield Row(
            model=args.model,
            num_layers=len(cell.pipeline.kv_cache.layers),
            batch=cell.batch,
            context=cell.context,
            mode=SERIAL if mode is None else mode.name,
            num_micro_batches=1 if mode is None else args.num,
            qkv_stage=args.qkv,
            o_stage=args.o,
            attention_sms=attention_sms,
            ffn_sms=ffn_sms,
            ms_p20=times.p20,
            ms_p50=times.p50,
            ms_p80=times.p80,
            ends_ms=ends_ms,
            model_ms=_model_ms(model, cell, mode),
            same_tokens=same_tokens,
            same_logits=same_logits,
            **(cell.stage_times(mode) if is_timed else empty),
            **energy.columns(cell.sustain(mode, times.p50) if args.energy else None),
            capture_ms=cell.capture_ms[mode],
            **counts,
        )


def _model_ms(model: StepModel | None, cell: Cell, mode: StageStreams | None) -> float | str:
    if model is not None and mode is None:
        return model.serial_ms(cell.batch, cell.context)
    if model is not None and mode.granted is not None:
        return model.pipelined_ms(cell.batch, cell.context, mode.granted)
    return ""


def _watts(row: Row) -> float | None:
    return row.sustained_mj / row.sustained_ms if row.sustained_mj else None


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _counts(cell: Cell) -> dict[str, int]:
    """What a step reads and computes, by arithmetic."""
    decoder = cell.pipeline.decoder
    weights, c = decoder.weights, decoder.config
    itemsize = weights.embedding.element_size()
    matrices = [m for w in weights.layers for m in (w.qkv, w.o, w.gate_up, w.down)]
    num_weights = sum(m.numel() for m in matrices)
    return {
        "kv_bytes": cell.batch * cell.context * c.kv_bytes_per_token(itemsize),
        "layer_bytes": num_weights * itemsize,
        "layer_flops": 2 * cell.batch * num_weights,
        "head_bytes": weights.lm_head.numel() * itemsize,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every cell, append each row to the CSV at once, print a table."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # read where CUDA starts
    args = _parse(argv)
    start = time.perf_counter()
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    stamp, lines = environment(device), []
    deadline = start + args.max_seconds
    with ExitStack() as stack, torch.inference_mode():
        if device.type == "cuda":
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream(device)))  # captures need one
        longest = max(context for _, context in args.cells)
        decoder = bench_decoder(args.model, args.layers, device, longest)
        placement = Placement(qkv=args.qkv, o=args.o)
        model = _model(decoder, args, placement, device)
        cells = most_telling_first(args.cells, args.splits, model) if args.map else args.cells
        cells, num_blocks = fitting(cells, decoder, device)
        kv_cache = random_cache(decoder, num_blocks)
        modes = [InOrder(), *_streams(stack, args, device)]
        if args.map:
            cells = [cell for cell in cells if cell not in _measured(args, stamp, modes[-1].name)]
        for i, (batch, context) in enumerate(cells):
            if time.perf_counter() > deadline:
                print(f"out of time, left out: {texts(cells[i:])}", file=sys.stderr)
                break
            serial_ms = None
            cell = Cell(decoder, kv_cache, batch, context, modes, args.num, placement)
            for row in measure(cell, modes, args, model):
                append_row(args.out, asdict(row) | stamp)
                serial_ms = row.ms_p50 if serial_ms is None else serial_ms
                ratios = {"of_serial": serial_ms / row.ms_p50, "watts": _watts(row)}
                lines.append(asdict(row) | ratios)
            del cell  # its buffers and graphs go before the next one's come
    print(table(lines, list(TABLE)))
    print(f"{time.perf_counter() - start:.0f} seconds, compilation included")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--model", choices=SHAPES, default="Qwen3-8B")
    p.add_argument("--layers", type=int, help="layers of it to run (default: all)")
    p.add_argument("--cells", nargs="+", type=pair("x"), default=[(512, 512), (1024, 512)])
    p.add_argument("--splits", nargs="*", type=pair(":"), default=[*map(pair(":"), SPLITS)])
    p.add_argument("--num", type=int, default=2, help="micro-batches (default: 2)")
    p.add_argument("--qkv", choices=STAGES, default="attention", help="stage of the projection")
    p.add_argument("--o", choices=STAGES, default="ffn", help="stage of the projection")
    p.add_argument("--map", action="store_true", help="all cells of the regime map, in order")
    p.add_argument("--max-seconds", type=float, default=float("inf"), help="begin no cell later")
    p.add_argument("--timed", action="store_true", help="also each stage's time, in other graphs")
    p.add_argument("--energy", action="store_true", help="also joules, over seconds of each mode")
    p.add_argument("--device", default="cuda")
    p.add_argument("--out", type=Path, default=RESULTS / "pipeline.csv")
    args = p.parse_args(argv)
    if args.energy and torch.device(args.device).type != "cuda":
        p.error(f"--energy needs a GPU, got --device {args.device}")
    args.layers = args.layers or SHAPES[args.model]["num_hidden_layers"]
    if args.map:
        args.cells = whole_map()
    return args


def pair(separator: str) -> Any:
    """What reads two numbers from the command line."""

    def numbers(text: str) -> tuple[int, int]:
        first, second = text.split(separator)
        return int(first), int(second)

    return numbers


def bench_decoder(model: str, num_layers: int, device: torch.device, longest: int) -> Decoder:
    """Random weights of some layers of a model. longest: tokens of a request."""
    with TemporaryDirectory() as folder:
        path = write_config(model, Path(folder), num_hidden_layers=num_layers)
        config = ModelConfig.from_folder(path)
    is_cuda = device.type == "cuda"
    dtype = torch.bfloat16 if is_cuda else torch.float32
    weights = dummy_weights(config, device=device, dtype=dtype)
    return Decoder(config, weights, longest, ops_of("triton" if is_cuda else "reference"))


def _model(
    decoder: Decoder, args: argparse.Namespace, placement: Placement, device: torch.device
) -> StepModel | None:
    """None where the device does not tell its rates."""
    try:
        itemsize = decoder.weights.embedding.element_size()
        return step_model(decoder.config, itemsize, rates_of(device), args.num, placement)
    except GreenContextError as error:
        print(f"no arithmetic: {error}", file=sys.stderr)
        return None


def _measured(args: argparse.Namespace, stamp: dict[str, str], last: str) -> set[CellSize]:
    """Cells that have a row of the last mode, of the same work on the same GPU and commit."""
    if not args.out.exists():
        return set()
    wanted = {
        "model": args.model,
        "num_layers": str(args.layers),
        "mode": last,
        "num_micro_batches": str(args.num),
        "qkv_stage": args.qkv,
        "o_stage": args.o,
        "gpu": stamp["gpu"],
        "commit": stamp["commit"],
    }
    rows = read_rows(args.out, [*Row.__dataclass_fields__, *stamp])
    return {
        (int(row["batch"]), int(row["context"]))
        for row in rows
        if all(row[name] == value for name, value in wanted.items())
    }


def random_cache(decoder: Decoder, num_blocks: int) -> KVCache:
    """KV blocks with random values."""
    embedding = decoder.weights.embedding
    options = {"device": embedding.device, "dtype": embedding.dtype}
    kv_cache = KVCache(decoder.config, num_blocks, BLOCK_SIZE, **options)
    kv_cache.blocks.normal_(generator=torch.Generator(embedding.device).manual_seed(0))
    return kv_cache


def _streams(
    stack: ExitStack, args: argparse.Namespace, device: torch.device
) -> Iterator[StageStreams]:
    """Plain streams, then those of every split that can be had; a reason for each that cannot."""
    if device.type != "cuda":
        return
    yield stack.enter_context(GpuStreams.plain(device))
    for split in args.splits:
        if not args.map:
            yield stack.enter_context(GpuStreams.plain(device, split))
        try:
            yield stack.enter_context(GpuStreams.partitioned(split, device))
        except (GreenContextError, ValueError) as error:
            print(f"{split[0]}:{split[1]} left out: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
