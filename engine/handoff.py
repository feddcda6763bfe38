"""KV blocks from one pool to another, on a stream of their own, ordered by events.

A copy waits for the events that it is given and for nothing else: one behind the launch that fills
its blocks, unless that is known to be over, and one behind the target's launches that may still
write a block which has changed hands since. Neither side's blocks may change hands before it is
done: who owns them is not known here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from engine.device import DeviceStream, Span
from engine.host_buffers import HostBuffers
from engine.kv_cache import KVCache
from engine.staging import Staging

# kernel: Triton programs on the source's SMs store to the peer; copy_engine: the DMA engines, which
# leaves the SMs to prefill; staged: through pinned host memory
Way = Literal["kernel", "copy_engine", "staged"]
# Where there is peer access. Between two H100s it has 0.97 to 0.99 of the speed of one bulk copy of
# as many bytes, from 512 tokens of Qwen3-0.6B on; the kernel has 0.89 to 0.93.
DIRECT_WAY: Way = "copy_engine"

# Blocks of a run, on average, from which on runs go one by one: the host takes 4 us for each, and
# 1 to 2 us for each block of a batch. Between two H100s runs of 4 are as fast either way.
MIN_RUN = 4

MIN_DRIVER, MIN_BINDINGS = 12080, 13  # what batched copies need: CUDA 12.8, cuda-python 13

Events = Sequence[torch.cuda.Event]


class Copy:
    """Blocks on their way: all at once, or layer by layer as these are computed."""

    def __init__(self, link: "KVLink", source_blocks: Sequence[int], target_blocks: Sequence[int]):
        self.num_bytes = 0  # of what was sent so far
        self._link = link
        self._blocks = (list(source_blocks), list(target_blocks))
        self._ids: Tensor | None = None  # [2, n] int64 on the source's device
        self._spans: list[Span] = []

    def send(self, layers: range | None = None, after: Events = ()) -> None:
        """Send these layers' slices of the blocks, or all layers, once the events have passed."""
        if not self._blocks[0]:
            return
        link, source, target = self._link, self._link.source.blocks, self._link.target.blocks
        if layers is not None:
            where = slice(layers.start, layers.stop)
            source, target = source[:, where], target[:, where]
        with link.on_stream(after):
            self._spans.append(Span(source.device))
            try:
                self._launch(source, target)
            finally:  # what a launch that fails has sent all the same is waited for
                self._spans[-1].stop()
        self.num_bytes += len(self._blocks[0]) * source[0].numel() * source.element_size()

    def _launch(self, source: Tensor, target: Tensor) -> None:
        link = self._link
        if link.way == "staged":
            link.staging.copy_blocks(source, target, *self._blocks)
        elif link.way == "copy_engine":
            copy_by_engine(source, target, *self._blocks, link.stream)
        else:
            if self._ids is None:
                # made on this stream: their memory is given out anew only behind the copy
                self._ids = link.host.send(self._blocks, np.int64)
            link.ops.copy_blocks(source, target, self._ids[0], self._ids[1])

    @property
    def is_done(self) -> bool:
        """Whether source and target may be used by others, once no more is sent; asks the device,
        waits for nothing."""
        return not self._spans or self._spans[-1].is_done  # they end in their order

    def wait(self) -> None:
        """Return once it is done."""
        if self._spans:
            self._spans[-1].wait()

    @property
    def ms(self) -> float:
        """What the link took for it, of a copy that is done."""
        return sum(span.ms for span in self._spans)


class KVLink:
    """The way from one KV cache to another, on the same device or on its peer."""

    def __init__(
        self, source: KVCache, target: KVCache, ops: ModuleType, way: Way | None = None
    ) -> None:
        """ops: `kernels` or `kernels.reference`; way: None for the best there is. ValueError where
        the pools' blocks differ, or the way is not there."""
        a, b = source.blocks, target.blocks
        if a.shape[1:] != b.shape[1:] or a.dtype != b.dtype:
            raise ValueError(
                f"target must hold blocks of {a.dtype} {list(a.shape[1:])}, "
                f"got {b.dtype} {list(b.shape[1:])}"
            )
        is_direct = has_peer_access(a.device, b.device)
        if way is None:
            way = "staged"
            if is_direct:
                way = DIRECT_WAY if has_batched_copies(a.device) else "kernel"
        if way != "staged" and not is_direct:
            raise ValueError(f"way must be staged from {a.device} to {b.device}, got {way!r}")
        if way == "copy_engine" and a.device.type != "cuda":
            raise ValueError(f"way must be kernel or staged on a {a.device.type}, got {way!r}")
        self.source, self.target, self.ops = source, target, ops
        self.way: Way = way
        self.stream = DeviceStream(a.device).stream
        self.host = HostBuffers(a.device)
        self.staging = Staging(a, b.device, ops)
        if is_direct and a.device != b.device:
            _open_the_way(a.device, b.device)

    def open(self, source_blocks: Sequence[int], target_blocks: Sequence[int]) -> Copy:
        """A copy of which nothing is sent yet. ValueError unless the blocks are equally many on
        both sides."""
        if len(target_blocks) != len(source_blocks):
            raise ValueError(
                f"target_blocks must be {len(source_blocks)}, as the source's, "
                f"got {len(target_blocks)}"
            )
        return Copy(self, source_blocks, target_blocks)

    def start(
        self, source_blocks: Sequence[int], target_blocks: Sequence[int], after: Events = ()
    ) -> Copy:
        """Send whole blocks in one launch, once the events have passed; errors: see `open`."""
        copy = self.open(source_blocks, target_blocks)
        copy.send(after=after)
        return copy

    def measure(self, num_blocks: int = 64) -> float:
        """GB/s of one copy of free blocks, each pool's first, by the clock of the source device.

        Overwrites the target's: only for pools that hold nothing yet.
        """
        blocks = range(min(num_blocks, self.source.num_blocks, self.target.num_blocks))
        for _ in range(2):  # the first one compiles
            copy = self.start(blocks, blocks)
            copy.wait()
        return copy.num_bytes / copy.ms / 1e6

    @contextmanager
    def on_stream(self, after: Events) -> Iterator[None]:
        """Within, launches go to the link's stream, behind these events."""
        if self.stream is None:
            yield
            return
        for event in after:
            self.stream.wait_event(event)
        with torch.cuda.stream(self.stream):
            yield


def _open_the_way(source: torch.device, target: torch.device) -> None:
    """Let kernels and copy engines of `source` write to the memory of `target`: torch does that at
    its own first copy in this direction."""
    torch.empty(1, device=target).copy_(torch.empty(1, device=source))
    # Its target is free from here on, and the next `empty_cache` gives it back to the driver, which
    # waits for its own device and not for a copy that the other one is still to make: that would
    # then write to where nothing is.
    torch.cuda.current_stream(source).synchronize()


def copy_by_engine(
    source: Tensor,
    target: Tensor,
    source_blocks: Sequence[int],
    target_blocks: Sequence[int],
    stream: torch.cuda.Stream,
) -> None:
    """target[target_blocks] = source[source_blocks], [num_blocks, ...] each and contiguous behind
    dim 0, by the copy engines. RuntimeError where CUDA refuses it.

    A run of blocks that rise by one on both sides is one copy with a pitch; where runs are short,
    all blocks go in one batched call.
    """
    from cuda.bindings import runtime

    num_bytes = source[0].numel() * source.element_size()
    pitches = [pool.stride(0) * pool.element_size() for pool in (source, target)]
    starts, lengths = runs(source_blocks, target_blocks)
    is_batch = len(source_blocks) < MIN_RUN * len(lengths)
    if is_batch:
        starts = np.asarray([source_blocks, target_blocks], dtype=np.int64)
    from_ptrs, to_ptrs = (
        (pool.data_ptr() + blocks * pitch).tolist()
        for pool, blocks, pitch in zip((source, target), starts, pitches, strict=True)
    )
    if is_batch:
        attributes = runtime.cudaMemcpyAttributes()
        attributes.srcAccessOrder = runtime.cudaMemcpySrcAccessOrder.cudaMemcpySrcAccessOrderStream
        attributes.flags = runtime.cudaMemcpyFlags.cudaMemcpyFlagPreferOverlapWithCompute
        num = len(to_ptrs)
        sizes = [num_bytes] * num
        batch = (to_ptrs, from_ptrs, sizes, num, [attributes], [0], 1, stream.cuda_stream)
        _check(runtime.cudaMemcpyBatchAsync(*batch), num)
        return
    kind = runtime.cudaMemcpyKind.cudaMemcpyDefault
    for to_ptr, from_ptr, num in zip(to_ptrs, from_ptrs, lengths.tolist(), strict=True):
        copy = (to_ptr, pitches[1], from_ptr, pitches[0], num_bytes, num, kind, stream.cuda_stream)
        _check(runtime.cudaMemcpy2DAsync(*copy), num)


def _check(result: tuple[Any], num_blocks: int) -> None:
    (error,) = result
    if error != 0:
        raise RuntimeError(f"a copy of {num_blocks} blocks failed: {error.name}")


def runs(
    source_blocks: Sequence[int], target_blocks: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """(first blocks of source and target [2, n], lengths [n]) of the longest runs that rise by one
    on both sides."""
    blocks = np.asarray([source_blocks, target_blocks], dtype=np.int64)
    num = blocks.shape[1]
    begins = np.ones(num, dtype=bool)
    begins[1:] = (np.diff(blocks) != 1).any(axis=0)
    first = np.flatnonzero(begins)
    return blocks[:, first], np.diff(first, append=num)


def has_peer_access(source: torch.device, target: torch.device) -> bool:
    """Whether a kernel on `source` can write to `target`'s memory."""
    if source.type != "cuda" or target.type != "cuda":
        return source.type == target.type
    return source == target or torch.cuda.can_device_access_peer(source, target)


def has_batched_copies(device: torch.device) -> bool:
    """Whether the copy engines take many copies in one call, as `copy_by_engine` makes it: a driver
    of CUDA 12.8 or later, and bindings of 13, whose call has other arguments than those before."""
    if device.type != "cuda":
        return False
    try:
        from cuda.bindings import __version__, runtime
    except ImportError:
        return False
    error, driver = runtime.cudaDriverGetVersion()
    is_known = error == runtime.cudaError_t.cudaSuccess and driver >= MIN_DRIVER
    return is_known and int(__version__.partition(".")[0]) >= MIN_BINDINGS
