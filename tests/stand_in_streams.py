"""Streams that need no GPU: launches in any order that events allow, and launches watched."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.micro_batches import rows_of
from engine.pipeline import DecodePipeline
from engine.stage_schedule import Stage, StageLaunch
from engine.stage_streams import InOrder, Work

Choose = Callable[[Sequence["Item"]], "Item"]


@dataclass(eq=False)
class Item:
    launch: StageLaunch
    work: Work
    behind: list["Item"] = field(default_factory=list)
    is_done: bool = False


class AnyOrder(InOrder):
    """Launches run late, in an order that `choose` draws from what streams and events allow.

    What nothing orders before the end of a step may still be to come when the next one begins.
    """

    name = "any order"

    def __init__(self, choose: Choose) -> None:
        self._choose = choose
        self._waiting: list[Item] = []
        self._newest: dict[str, Item] = {}  # by stream
        self._events: dict[int, Item] = {}

    @classmethod
    def seeded(cls, seed: int) -> "AnyOrder":
        return cls(random.Random(seed).choice)

    @classmethod
    def preferring(cls, *streams: Stage) -> "AnyOrder":
        """Always the first of these streams that has something to do."""
        return cls(lambda items: min(items, key=lambda item: streams.index(item.launch.stream)))

    def run(self, launch: StageLaunch, work: Work) -> None:
        before = [self._events[event] for event in launch.waits]
        if launch.stream in self._newest:
            before.append(self._newest[launch.stream])
        item = Item(launch, work, before)
        self._waiting.append(item)
        self._newest[launch.stream] = item
        if launch.records is not None:
            self._events[launch.records] = item
        while launch.records is None and not item.is_done:  # the host reads what the step's end has
            self._run_one()

    def _run_one(self) -> None:
        ready = [item for item in self._waiting if all(other.is_done for other in item.behind)]
        item = self._choose(ready)
        self._waiting.remove(item)
        item.work()
        item.is_done, item.behind = True, []


Part = tuple[Tensor, slice | Tensor]  # a tensor, and what of it


class Watched(InOrder):
    """Holds each launch to the reads and writes that it declares: all else is poison to it."""

    name = "watched"
    num_watched = 0

    def __init__(self) -> None:
        self.pipeline: DecodePipeline | None = None

    def run(self, launch: StageLaunch, work: Work) -> None:
        if launch.stream == "main":
            work()
            return
        parts = dict(self._parts())
        kept = {name: tensor[at].clone() for name, (tensor, at) in parts.items()}
        for name, (tensor, at) in parts.items():
            if name not in launch.reads:
                tensor[at] = poison(tensor)
        undeclared = set(parts) - launch.writes
        before = {name: parts[name][0][parts[name][1]].clone() for name in undeclared}
        work()
        for name in undeclared:
            tensor, at = parts[name]
            assert torch.equal(as_bytes(tensor[at]), as_bytes(before[name])), (launch.name, name)
            tensor[at] = kept[name]
        self.num_watched += 1

    def _parts(self) -> Iterator[tuple[str, Part]]:
        """Every buffer that a schedule names between its main launches."""
        pipeline = self.pipeline
        inputs, num = pipeline.inputs.tensors, pipeline.num_micro_batches
        lens = inputs["context_lens"]
        size = next(s for s in pipeline.sizes if not lens[s * num :].any())
        yield "inputs", (pipeline.inputs._bytes, slice(None))
        yield "block_table", (pipeline._step_block_table, slice(None))
        for i, rows in enumerate(rows_of(size, num)):
            for name in ("hidden", "rstd", "qkv", "q", "attention", "act"):
                yield f"{name}[{i}]", (getattr(pipeline.buffers, name), rows)
            block_size = pipeline.kv_cache.block_size
            tables = pipeline._step_block_table[rows]
            blocks = [t[: -(-n // block_size)] for t, n in zip(tables, lens[rows], strict=True)]
            for layer, kv_cache in enumerate(pipeline.kv_cache.layers):
                yield f"kv{layer}[{i}]", (kv_cache, torch.cat(blocks).long())


def poison(tensor: Tensor) -> float | int:
    return float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max


def as_bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)
