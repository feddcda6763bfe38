"""HostBuffers: pinned memory between the host and one stream of a device, used again and again.

Pinning takes the host milliseconds, and torch's own allocator gives a buffer out again only when
all copies that came before it are over, those of other streams included: a decode step would wait
for memory until a long prefill has ended.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

SMALLEST = 256  # bytes; sizes are this and its doubles


class HostBuffers:
    """Buffers of what is copied on one stream, the device's current one when they are used."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        # by size: those sent, the longest ago first, with events behind their copies
        self._sent: dict[int, deque[tuple[Tensor, torch.cuda.Event | None]]] = {}
        self._received: dict[int, list[Tensor]] = {}  # by size: those that were read

    @contextmanager
    def sending(self, num_bytes: int) -> Iterator[Tensor]:
        """A buffer of so many bytes, to be filled and copied from within. It may hold anything."""
        size = _size_of(num_bytes)
        sent = self._sent.setdefault(size, deque())
        if sent and (sent[0][1] is None or sent[0][1].query()):
            buffer, event = sent.popleft()
        else:
            buffer, event = self._new(size), torch.cuda.Event() if self._is_cuda else None
        yield buffer[:num_bytes]
        if event is not None:
            event.record(torch.cuda.current_stream(self._device))
        sent.append((buffer, event))

    def send(self, values: Any, dtype: type) -> Tensor:
        """A tensor of host values, copied without waiting for the device."""
        given = torch.from_numpy(np.ascontiguousarray(values, dtype=dtype))
        tensor = torch.empty_like(given, device=self._device)
        with self.sending(given.nbytes) as buffer:
            host = buffer.view(given.dtype).view(given.shape).copy_(given)
            tensor.copy_(host, non_blocking=True)
        return tensor

    def receive(self, tensor: Tensor) -> "Received":
        """A copy on its way to the host, of a contiguous tensor that may be overwritten behind."""
        size = _size_of(tensor.nbytes)
        free = self._received.setdefault(size, [])
        buffer = free.pop() if free else self._new(size)
        host = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        host.copy_(tensor, non_blocking=True)
        return Received(host, buffer, free)

    def _new(self, size: int) -> Tensor:
        with torch.inference_mode(False):  # it is written in that mode and outside
            return torch.empty(size, dtype=torch.uint8, pin_memory=self._is_cuda)


class Received:
    """Values that are on the host once an event recorded behind `receive` has passed."""

    def __init__(self, host: Tensor, buffer: Tensor, free: list[Tensor]) -> None:
        """buffer: what host lies in; free: where it goes when it was read."""
        self.dtype = host.dtype
        self._host, self._buffer, self._free = host, buffer, free
        self._values: list[Any] | None = None

    def tolist(self) -> list[Any]:
        """The values; the event must have passed."""
        if self._values is None:
            self._values = self._host.tolist()
            self._free.append(self._buffer)
        return self._values


def _size_of(num_bytes: int) -> int:
    return max(SMALLEST, 1 << max(num_bytes - 1, 0).bit_length())
