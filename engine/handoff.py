"""KV blocks from one pool to another, on a stream of their own, ordered by events.

A copy starts behind all that the source device's current stream has been given, the launch that
fills the blocks among it, and behind the events it is given: those of the target's launches, say,
which may still write a block that has changed hands since. It runs beside what comes after. Neither
side's blocks may change hands before its event has passed: who owns them is not known here.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from engine.batch import to_device
from engine.kv_cache import KVCache

STAGED_BYTES = 64 << 20  # pinned host memory that a copy without peer access goes through

Way = Literal["direct", "staged"]


@dataclass(frozen=True)
class Copy:
    """Blocks on their way."""

    num_blocks: int
    num_bytes: int
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None  # start and end; None: it is over

    @property
    def is_done(self) -> bool:
        """Whether source and target may be used by others; asks the device, waits for nothing."""
        return self.events is None or self.events[1].query()

    def wait(self) -> None:
        """Return once it is done."""
        if self.events is not None:
            self.events[1].synchronize()

    @property
    def gb_s(self) -> float | None:
        """Measured on the device, of a copy that is done; None where no clock ran."""
        if self.events is None:
            return None
        return self.num_bytes / self.events[0].elapsed_time(self.events[1]) / 1e6


class KVLink:
    """The way from one KV cache to another, on the same device or on its peer."""

    def __init__(self, source: KVCache, target: KVCache, ops: ModuleType) -> None:
        """ops: `kernels` or `kernels.reference`. ValueError where the pools' blocks differ."""
        a, b = source.blocks, target.blocks
        if a.shape[1:] != b.shape[1:] or a.dtype != b.dtype:
            raise ValueError(
                f"target must hold blocks of {a.dtype} {list(a.shape[1:])}, "
                f"got {b.dtype} {list(b.shape[1:])}"
            )
        self.source, self.target = source, target
        self.way: Way = "direct" if has_peer_access(a.device, b.device) else "staged"
        self._ops = ops
        self._block_bytes = a[0].numel() * a.element_size()
        self._is_cuda = a.device.type == "cuda"
        self._stream = torch.cuda.Stream(a.device) if self._is_cuda else None
        self._staging: Tensor | None = None
        if self.way == "direct" and a.device != b.device:
            # torch opens the way for the kernels, at its own first copy
            torch.empty(1, device=a.device).copy_(torch.empty(1, device=b.device))

    def start(
        self,
        source_blocks: Sequence[int],
        target_blocks: Sequence[int],
        *,
        layer: int | None = None,
        after: Sequence[torch.cuda.Event] = (),
    ) -> Copy:
        """Send whole blocks in one launch, or one layer's slices of them, while later layers are
        still being computed. after: what the copy waits for besides the source's current stream.
        ValueError unless the blocks are equally many on both sides."""
        if len(target_blocks) != len(source_blocks):
            raise ValueError(
                f"target_blocks must be {len(source_blocks)}, as the source's, "
                f"got {len(target_blocks)}"
            )
        source, target = self.source.blocks, self.target.blocks
        if layer is not None:
            source, target = self.source.layers[layer], self.target.layers[layer]
        if not source_blocks:
            return Copy(0, 0, None)
        events = self._events()
        with self._behind_current_stream(after):
            if events is not None:
                events[0].record(self._stream)
            if self.way == "direct":
                # made on this stream: their memory is given out anew only behind the copy
                ids = to_device([list(source_blocks), list(target_blocks)], np.int64, source.device)
                self._ops.copy_blocks(source, target, ids[0], ids[1])
            else:
                self._copy_through_host(source, target, source_blocks, target_blocks)
            if events is not None:
                events[1].record(self._stream)
        num_bytes = len(source_blocks) * source[0].numel() * source.element_size()
        return Copy(len(source_blocks), num_bytes, events)

    def measure(self, num_blocks: int = 64) -> float | None:
        """GB/s of one copy of free blocks, each pool's first; None where nothing can be timed.

        Overwrites the target's: only for pools that hold nothing yet.
        """
        blocks = range(min(num_blocks, self.source.num_blocks, self.target.num_blocks))
        for _ in range(2):  # the first one compiles
            copy = self.start(blocks, blocks)
            copy.wait()
        return copy.gb_s

    def _events(self) -> tuple[torch.cuda.Event, torch.cuda.Event] | None:
        if not self._is_cuda:
            return None
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def _behind_current_stream(
        self, after: Sequence[torch.cuda.Event]
    ) -> AbstractContextManager[object]:
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        for event in after:
            self._stream.wait_event(event)
        return torch.cuda.stream(self._stream)

    def _copy_through_host(
        self,
        source: Tensor,
        target: Tensor,
        source_blocks: Sequence[int],
        target_blocks: Sequence[int],
    ) -> None:
        """A part at a time through pinned memory: slow, and the host waits for each."""
        slab_bytes = source[0].numel() * source.element_size()
        if self._staging is None:
            self._staging = torch.empty(
                max(STAGED_BYTES, self._block_bytes),
                dtype=torch.uint8,
                pin_memory=self._is_cuda,
            )
        step = len(self._staging) // slab_bytes
        for first in range(0, len(source_blocks), step):
            wanted = source_blocks[first : first + step]
            part = self._staging[: len(wanted) * slab_bytes].view(source.dtype)
            part = part.view(len(wanted), *source.shape[1:])
            there = to_device(list(wanted), np.int64, source.device)
            part.copy_(source.index_select(0, there), non_blocking=True)
            if self._stream is not None:
                self._stream.synchronize()
            to = to_device(list(target_blocks[first : first + step]), np.int64, target.device)
            target.index_copy_(0, to, part.to(target.device, non_blocking=True))
            if target.device.type == "cuda":  # the buffer is filled anew in the next round
                torch.cuda.current_stream(target.device).synchronize()


def has_peer_access(source: torch.device, target: torch.device) -> bool:
    """Whether a kernel on `source` can write to `target`'s memory."""
    if source.type != "cuda" or target.type != "cuda":
        return source.type == target.type
    return source == target or torch.cuda.can_device_access_peer(source, target)
