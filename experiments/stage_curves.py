"""The attention and the FFN stage of one layer on 8 to all SMs, alone and beside each other.

    python -m experiments.stage_curves --model Qwen3-8B --cells 256x512 512x512 [--sms 8 16 32 ..]
        [--max-seconds 120] [--energy]

A cell is the requests of a micro-batch x the tokens that each holds. Alone, a stage has a green
context of so many SMs; beside the other, each has its part of a split, and one is timed while the
other runs all along. A row for each goes to experiments/results/pipeline_stages.csv.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from engine.kv_cache import KVCache
from engine.stage_schedule import STAGES, Placement
from experiments import energy
from experiments.bench_pipeline import bench_decoder, pair, random_cache
from experiments.energy import Sustained
from experiments.harness import RESULTS, append_row, environment, table
from experiments.pipeline_cell import BLOCK_SIZE, block_tables
from experiments.pipeline_map import CellSize, fitting, texts
from experiments.shapes import SHAPES
from experiments.timing import Times
from green.driver import GreenContextError
from green.streams import GreenStreams
from models.decoder import AttentionBatch, Decoder, StageBuffers

SMS = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 132)
GRAPH_CALLS = 24  # of a stage, over the layers in turn: their weights and keys leave the L2
NUM_REPLAYS = 8
SLOWED = (2.5, 6.0, 15.0)  # how much slower beside each other: tried until the other lasts
TABLE = ("batch", "context", "stage", "sms", "beside_sms", "ms_p50", "sustained_mj")


@dataclass(frozen=True)
class Row:
    """One stage on one number of SMs."""

    model: str
    batch: int  # requests of the micro-batch
    context: int
    stage: str
    qkv_stage: str
    o_stage: str
    sms: int  # granted
    beside_sms: int | str  # the other stage's; empty: it does not run
    ms_p20: float
    ms_p50: float
    ms_p80: float
    sustained_ms: float | str  # at the power limit; empty without --energy, and beside the other
    sustained_mj: float | str  # millijoules of such a call, the whole GPU's
    bytes: int  # read: weights, and keys and values
    flops: int  # of the products


class Stage:
    """One stage of a micro-batch as a graph of calls on a stream of its own."""

    def __init__(
        self, run: Callable[[int], None], num_layers: int, stream: torch.cuda.Stream
    ) -> None:
        """run: launches the stage of a layer, on the current stream."""
        self.stream, self._graph = stream, torch.cuda.CUDAGraph()
        torch.cuda.synchronize()  # what it works on was filled on another stream
        with torch.cuda.stream(stream):
            for layer in range(num_layers):
                run(layer)  # compiles
        stream.synchronize()
        with torch.cuda.graph(self._graph, stream=stream):
            for i in range(GRAPH_CALLS):
                run(i % num_layers)

    def replay(self, times: int) -> list[torch.cuda.Event]:
        """Queue replays; events before, between and behind them."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
        with torch.cuda.stream(self.stream):
            events[0].record()
            for event in events[1:]:
                self._graph.replay()
                event.record()
        return events

    def alone(self) -> Times:
        """Milliseconds of one call."""
        self.replay(1)
        events = self.replay(NUM_REPLAYS)
        torch.cuda.synchronize()
        return _times(events)

    def sustained(self) -> Sustained:
        """Time and energy of one call of many, alone."""

        def replay() -> None:
            with torch.cuda.stream(self.stream):
                self._graph.replay()

        run_ms = self.alone().p50 * GRAPH_CALLS
        return energy.sustain(replay, run_ms, self.stream.device, calls=GRAPH_CALLS)

    def beside(self, other: "Stage") -> Times:
        """The same while the other runs all along. ValueError where it did not."""
        own_ms, other_ms = self.alone().p50, other.alone().p50
        for slowed in SLOWED:
            behind = other.replay(2 + round(slowed * NUM_REPLAYS * own_ms / other_ms))
            self.stream.wait_event(behind[1])
            events = self.replay(NUM_REPLAYS)
            torch.cuda.synchronize()
            if events[-1].elapsed_time(behind[-1]) >= 0:
                return _times(events)
        raise ValueError("the other stage must run longer, got one that ended before")


def _times(events: Sequence[torch.cuda.Event]) -> Times:
    return Times.of([a.elapsed_time(b) / GRAPH_CALLS for a, b in itertools.pairwise(events)])


class Layer:
    """What both stages of a micro-batch work on."""

    def __init__(
        self, decoder: Decoder, kv_cache: KVCache, cell: CellSize, placement: Placement
    ) -> None:
        self.decoder, self.kv_cache, self.placement = decoder, kv_cache, placement
        self.batch, self.context = cell
        device = decoder.weights.embedding.device
        options = {"device": device}
        tables = block_tables(kv_cache.num_blocks, *cell)
        self.attention_batch = AttentionBatch(
            positions=torch.full((self.batch,), self.context - 1, **options),
            slot_mapping=torch.full((self.batch,), -1, **options),  # nothing is stored
            block_table=torch.tensor(tables, dtype=torch.int32, **options),
            context_lens=torch.full((self.batch,), self.context, dtype=torch.int32, **options),
        )

    def buffers(self) -> StageBuffers:
        """Of one stage: beside each other they are those of two micro-batches."""
        buffers = self.decoder.buffers(self.batch, self.batch, block_size=BLOCK_SIZE)
        for name in ("hidden", "attention", "qkv"):
            getattr(buffers, name).normal_()
        return buffers

    def stage(self, name: str, stream: torch.cuda.Stream, num_sms: int | None) -> Stage:
        """Its operations by the placement, as the pipeline launches them."""
        decoder, buffers = self.decoder, self.buffers()
        of = self.placement.stage_of

        def run(layer: int) -> None:
            if of("qkv") == name:
                decoder.project_qkv(layer, buffers, num_sms=num_sms)
            if name == "attention":
                cached = self.kv_cache.layers[layer]
                decoder.attend(layer, buffers, self.attention_batch, cached, num_sms=num_sms)
            if of("o") == name:
                decoder.project_o(layer, buffers, num_sms=num_sms)
            if name == "ffn":
                decoder.mlp(layer, buffers, num_sms=num_sms)

        return Stage(run, len(self.kv_cache.layers), stream)

    def counts(self, name: str) -> dict[str, int]:
        """Bytes and FLOPs of one call."""
        w, c = self.decoder.weights.layers[0], self.decoder.config
        operations = {"qkv": (w.qkv,), "o": (w.o,), "mlp": (w.gate_up, w.down)}
        here = [op for op in operations if self.placement.stage_of(op) == name]
        num_weights = sum(m.numel() for op in here for m in operations[op])
        itemsize = w.qkv.element_size()
        kv_bytes = self.batch * self.context * c.kv_bytes_per_token(itemsize) // c.num_layers
        return {
            "bytes": num_weights * itemsize + kv_bytes * (name == "attention"),
            "flops": 2 * self.batch * num_weights,
        }


def measure(
    layer: Layer, sms: Sequence[int], device: torch.device, *, with_energy: bool = False
) -> Iterator[dict[str, object]]:
    """Stage, SMs, the other's and times: each stage alone on each number, then each split."""
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    for asked in sms:
        with GreenStreams.of((min(asked, num_sms),), device) as owner:
            for name in STAGES:
                stage = layer.stage(name, owner.streams[0], owner.granted[0])
                sustained = stage.sustained() if with_energy else None
                yield _found(name, owner.granted[0], "", stage.alone(), sustained)
                del stage
    for asked in sms:
        if asked + sms[0] > num_sms:
            continue
        with GreenStreams.of((asked, num_sms - asked), device) as owner:
            stages = [
                layer.stage(name, stream, granted)
                for name, stream, granted in zip(STAGES, owner.streams, owner.granted, strict=True)
            ]
            for i, name in enumerate(STAGES):
                try:
                    times = stages[i].beside(stages[1 - i])
                except ValueError as error:
                    print(f"{name} on {owner.granted[i]} left out: {error}", file=sys.stderr)
                    continue
                yield _found(name, owner.granted[i], owner.granted[1 - i], times)
            del stages  # graphs go before their partition


def _found(
    stage: str, sms: int, beside_sms: int | str, times: Times, sustained: Sustained | None = None
) -> dict[str, object]:
    ms = {"ms_p20": times.p20, "ms_p50": times.p50, "ms_p80": times.p80}
    return {"stage": stage, "sms": sms, "beside_sms": beside_sms} | ms | energy.columns(sustained)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every cell, append each row to the CSV at once, print a table."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # read where CUDA starts
    args = _parse(argv)
    deadline = time.perf_counter() + args.max_seconds
    if not torch.cuda.is_available():
        sys.exit("stage_curves: needs a GPU")
    device = torch.device("cuda", 0)
    stamp, rows = environment(device), []
    placement = Placement(qkv=args.qkv, o=args.o)
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream(device)):
        longest = max(context for _, context in args.cells)
        decoder = bench_decoder(args.model, args.layers, device, longest)
        cells, num_blocks = fitting(args.cells, decoder, device)
        kv_cache = random_cache(decoder, num_blocks)
        for i, cell in enumerate(cells):
            if time.perf_counter() > deadline:
                print(f"out of time, left out: {texts(cells[i:])}", file=sys.stderr)
                break
            layer = Layer(decoder, kv_cache, cell, placement)
            shape = {"model": args.model, "batch": cell[0], "context": cell[1]}
            stages = {"qkv_stage": args.qkv, "o_stage": args.o}
            try:
                for found in measure(layer, args.sms, device, with_energy=args.energy):
                    row = Row(**shape, **stages, **found, **layer.counts(found["stage"]))
                    append_row(args.out, asdict(row) | stamp)
                    rows.append(asdict(row))
            except (GreenContextError, ValueError) as error:
                print(f"{texts([cell])} is not whole: {error}", file=sys.stderr)
    print(table(rows, list(TABLE)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--model", choices=SHAPES, default="Qwen3-8B")
    p.add_argument("--layers", type=int, default=6, help="taken in turn (default: 6)")
    p.add_argument("--cells", nargs="+", type=pair("x"), default=[(256, 512), (512, 512)])
    p.add_argument("--sms", nargs="+", type=int, default=SMS)
    p.add_argument("--qkv", choices=STAGES, default="attention", help="stage of the projection")
    p.add_argument("--o", choices=STAGES, default="ffn", help="stage of the projection")
    p.add_argument("--max-seconds", type=float, default=float("inf"), help="begin no cell later")
    p.add_argument("--energy", action="store_true", help="also joules, over seconds, alone")
    p.add_argument("--out", type=Path, default=RESULTS / "pipeline_stages.csv")
    return p.parse_args(argv)


if __name__ == "__main__":
    main()
