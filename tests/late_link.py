"""Copies that end late and out of order in a running engine, and NaN in every block nobody owns.

On the CPU a copy is over when it is started. Here it moves nothing before it is allowed to end, and
its target is NaN until then; so is each block that is given back, and each that is granted, on a
GPU too. What is read too early, or freed too early, is therefore not a number, and no token comes
out of it.
"""

import random
from collections.abc import Callable, Sequence
from types import MethodType

import torch

from engine.block_manager import BlockManager
from engine.device import DeviceStream
from engine.handoff import KVLink
from engine.kv_cache import KVCache
from engine.pd_core import PDCore

NAN = float("nan")


class LateCopy:
    """What `KVLink.open` gives, as far as the engine uses it."""

    @torch.inference_mode()
    def __init__(self, link: "LateLink", source: Sequence[int], target: Sequence[int]) -> None:
        self.link, self.source, self.target = link, list(source), list(target)
        self.layers: list[slice] = []  # sent and not moved yet
        self.num_bytes, self.ms = 0, 1.0
        link.target.blocks[self.target] = NAN

    def send(self, layers: range | None = None, after: Sequence[object] = ()) -> None:
        if self.source:
            self.link.on_send()
            self.layers.append(slice(layers.start, layers.stop) if layers else slice(None))

    @property
    def is_done(self) -> bool:
        if self.layers and self.link.may_end():
            self.wait()
        return not self.layers

    @torch.inference_mode()
    def wait(self) -> None:
        for layers in self.layers:
            moved = self.link.source.blocks[self.source, layers]
            self.link.target.blocks[self.target, layers] = moved
        self.layers.clear()


class LateLink:
    """A KVLink whose copies end when `may_end` says so, asked at each look at one of them."""

    way = "late"

    def __init__(self, link: KVLink, may_end: Callable[[], bool]) -> None:
        self.source, self.target, self.may_end = link.source, link.target, may_end
        self.num_copies = 0
        self.on_send: Callable[[], None] = lambda: None

    def open(self, source: Sequence[int], target: Sequence[int]) -> LateCopy:
        assert len(source) == len(target)
        self.num_copies += bool(source)
        return LateCopy(self, source, target)


def put_late_links(core: PDCore, may_end: Callable[[], bool]) -> tuple[LateLink, LateLink]:
    """In place of the links of an engine that has done nothing yet; poisons its pools too."""
    queue = core.handoffs
    queue._slabs, queue._pushes = (LateLink(x, may_end) for x in (queue._slabs, queue._pushes))
    poison(core)
    return queue._slabs, queue._pushes


def at_random(seed: int, probability: float = 0.3) -> Callable[[], bool]:
    rng = random.Random(seed)
    return lambda: rng.random() < probability


def poison(core: PDCore) -> None:
    """NaN in what nobody owns, from now on; on a GPU in the order of each side's launches, for
    which copies wait."""
    for side, manager, kv_cache in (
        (core._prefill_side, core.leases.prefill, core.prefill.kv_cache),
        (core._decode_side, core.leases.decode, core.decode.kv_cache),
    ):
        with side.active():
            kv_cache.blocks.fill_(NAN)
        _poison_returned(core, side, manager, kv_cache)
    core._fence = core._decode_side.record()


def _poison_returned(
    core: PDCore, side: DeviceStream, manager: BlockManager, kv_cache: KVCache
) -> None:
    def fill(blocks: Sequence[int]) -> None:
        with side.active():
            for block in blocks:  # one by one: a list of indices would make the host wait
                kv_cache.blocks[block] = NAN
        if side is core._decode_side:  # a copy into one of them comes behind
            core._fence = side.record()

    def grant(self: BlockManager, num_blocks: int) -> list[int]:
        blocks = BlockManager._grant(self, num_blocks)
        fill(blocks)
        return blocks

    def free(self: BlockManager, blocks: Sequence[int]) -> None:
        BlockManager._free(self, blocks)
        # what a cached one holds can still be found
        fill([block for block in blocks if block not in self._cached])

    manager._grant, manager._free = MethodType(grant, manager), MethodType(free, manager)
