"""Blocks through pinned host memory, where one GPU cannot write to the other: slow, and correct.

Two buffers take turns: while one is read by the target device, the other is filled by the source.
All waiting is done by the devices, none by the host.
"""

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from engine.device import DeviceStream
from engine.host_buffers import HostBuffers

STAGED_BYTES = 32 << 20  # of each of the two buffers, or one block where that is more


class Staging:
    """Two pinned buffers, made when they are first needed, and the target's stream."""

    def __init__(self, source: Tensor, target_device: torch.device, ops: ModuleType) -> None:
        """source: the pool [num_blocks, ...] whose blocks go through; ops: see `KVLink`."""
        self._device = source.device
        self._ops = ops
        self._is_cuda = source.device.type == "cuda"
        self._block_bytes = source[0].numel() * source.element_size()
        self._target = DeviceStream(target_device)
        self._host, self._target_host = HostBuffers(self._device), HostBuffers(target_device)
        self._buffers: list[Tensor] = []
        self._emptied: list[torch.cuda.Event | None] = [None, None]

    def copy_blocks(
        self,
        source: Tensor,
        target: Tensor,
        source_blocks: Sequence[int],
        target_blocks: Sequence[int],
    ) -> None:
        """target[target_blocks] = source[source_blocks], on the source's current stream, which
        waits for the target's. source, target: [num_blocks, ...], whole blocks or slices of them.
        """
        if not self._buffers:
            num_bytes = max(STAGED_BYTES, self._block_bytes)
            options = {"dtype": torch.uint8, "pin_memory": self._is_cuda}
            self._buffers = [torch.empty(num_bytes, **options) for _ in range(2)]
        slab_bytes = source[0].numel() * source.element_size()
        step = len(self._buffers[0]) // slab_bytes
        emptied: torch.cuda.Event | None = None
        try:
            for index, first in enumerate(range(0, len(source_blocks), step)):
                there, to = (b[first : first + step] for b in (source_blocks, target_blocks))
                part = self._buffers[index % 2][: len(there) * slab_bytes].view(source.dtype)
                part = part.view(len(there), *source.shape[1:])
                filled = self._fill(part, source, there, self._emptied[index % 2])
                emptied = self._empty(part, target, to, filled)
                self._emptied[index % 2] = emptied
        finally:  # where a part fails, those before it are still on their way
            if emptied is not None:
                torch.cuda.current_stream(self._device).wait_event(emptied)

    def _fill(
        self, part: Tensor, source: Tensor, blocks: Sequence[int], after: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:
        stream = torch.cuda.current_stream(self._device) if self._is_cuda else None
        if after is not None:
            stream.wait_event(after)
        ids = self._host.send(blocks, np.int64)
        part.copy_(source.index_select(0, ids), non_blocking=True)
        return None if stream is None else stream.record_event()

    def _empty(
        self, part: Tensor, target: Tensor, blocks: Sequence[int], after: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:
        with self._target.active():
            if after is not None:
                self._target.stream.wait_event(after)
            # Not index_copy_: where torch is told to be deterministic, that reads and rewrites all
            # of a target that is a slice, and what others write there meanwhile is undone.
            ids = self._target_host.send([range(len(blocks)), blocks], np.int64)
            arrived = part.to(target.device, non_blocking=True)
            self._ops.copy_blocks(arrived, target, ids[0], ids[1])
            return self._target.record()
