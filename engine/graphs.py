"""Launches of fixed size: inputs that stay in place, sent in one copy, and CUDA graphs of steps."""

import gc
import math
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch

from engine.host_buffers import HostBuffers

ALIGNMENT = 16  # bytes; Triton compiles anew for a pointer that is aligned to less

GraphPool = tuple[int, int]  # what torch.cuda.graph_pool_handle gives
Key = TypeVar("Key", bound=Hashable)


class StaticInputs:
    """What changes from launch to launch, in one buffer on the device that one copy fills."""

    def __init__(
        self, fields: Mapping[str, tuple[type, tuple[int, ...]]], device: torch.device
    ) -> None:
        """fields: name -> (numpy dtype, shape). `tensors` has them by name, at fixed addresses."""
        self._buffers = HostBuffers(device)
        self._fields: dict[str, tuple[slice, type, tuple[int, ...]]] = {}
        end = 0
        for name, (dtype, shape) in fields.items():
            start, num_bytes = end, math.prod(shape) * np.dtype(dtype).itemsize
            self._fields[name] = (slice(start, start + num_bytes), dtype, shape)
            end = start + -(-num_bytes // ALIGNMENT) * ALIGNMENT
        self._bytes = torch.zeros(end, dtype=torch.uint8, device=device)
        self.tensors = {
            name: self._bytes[span].view(torch.from_numpy(np.empty(0, dtype)).dtype).view(shape)
            for name, (span, dtype, shape) in self._fields.items()
        }

    def upload(self, columns: Mapping[str, Any], padding: Mapping[str, int]) -> None:
        """Send new values for every field, without waiting for the device.

        columns: name -> values, which take the first places along each dim of their field; the
        others hold the field's padding, or 0.
        """
        with self._buffers.sending(len(self._bytes)) as host:
            places = host.numpy()
            for name, (span, dtype, shape) in self._fields.items():
                array = places[span].view(dtype).reshape(shape)
                values = np.asarray(columns.get(name, ()))
                if values.shape != shape:
                    array.fill(padding.get(name, 0))
                if values.size:
                    array[tuple(map(slice, values.shape))] = values
            self._bytes.copy_(host, non_blocking=True)


class StepGraphs:
    """A CUDA graph for each key of a step, its size as a rule, captured when it first runs."""

    def __init__(self, device: torch.device, pool: GraphPool | None) -> None:
        """pool: where captures allocate; None: nothing is captured, every step runs as it is.

        Steps that share a pool must run on one stream: they write to the same memory.
        """
        self.device = device
        self.captured: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self.capture_ms = 0.0  # host time of all captures
        self._pool = pool
        self._bytes: dict[Hashable, int] = {}  # of each that was captured, dropped ones too

    @property
    def is_capturing(self) -> bool:
        """Whether steps become graphs."""
        return self._pool is not None

    @property
    def captured_bytes(self) -> int:
        """Memory of the device that the graphs there are took when they were captured: by how much
        less of it was free, so what others take or give back meanwhile is counted too."""
        return sum(self._bytes.get(key, 0) for key in self.captured)

    def take_new_pool(self) -> None:
        """Capture to another pool from now on, where there is one at all. To be called where a
        capture broke off: torch goes on recording to its pool, and lets no other begin there."""
        if self.is_capturing:
            self._pool = torch.cuda.graph_pool_handle()

    def run(self, key: Key, step: Callable[[Key], None]) -> None:
        """step(key), or its replay. What it reads and writes must be in place from call to call,
        and it must not look at values on the host."""
        if key in self.captured:
            self.captured[key].replay()
            return
        step(key)
        if self._pool is not None:  # the step above compiled what a capture must not compile
            self.captured[key] = self._capture(key, step)

    def _capture(self, key: Key, step: Callable[[Key], None]) -> torch.cuda.CUDAGraph:
        start = time.perf_counter()
        torch.cuda.empty_cache()  # as a capture begins with it: what that frees is not the graph's
        free_bytes = torch.cuda.mem_get_info(self.device)[0]
        graph = torch.cuda.CUDAGraph()
        options = {
            "pool": self._pool,
            "stream": torch.cuda.current_stream(self.device),
            "capture_error_mode": "thread_local",  # another engine may work in another thread
        }
        with _no_garbage_collection(), torch.cuda.graph(graph, **options):
            step(key)
        self._bytes[key] = max(free_bytes - torch.cuda.mem_get_info(self.device)[0], 0)
        self.capture_ms += (time.perf_counter() - start) * 1e3
        return graph


_COLLECTOR = threading.Lock()  # whether the collector runs is one flag for all threads


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A graph of an engine long gone, destroyed in the middle of a capture, would spoil it. Engines
    that capture in several threads do it one after another."""
    with _COLLECTOR:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if was_enabled:
                gc.enable()
