"""What one line of the benchmark is: a launcher on a shape, its peers, and the proof of both."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from experiments.places import WHOLE_GPU, Place
from experiments.timing import Run, copies_for

# Worst row's |out - reference| / |reference|. A value rounded to bf16 is off by 2**-9 at most, by
# half of that in the mean; a result behind three or four rounded intermediates stays under 2**-7.
BOUND = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-16}


class Mismatch(AssertionError):
    """A result that is not the reference's."""


@dataclass(frozen=True, kw_only=True)
class Impl:
    """One way to do it. run(i) works on copy i; what it returns, if anything, is its result."""

    name: str
    run: Run
    place: Place = WHOLE_GPU
    captured: bool = True  # False: a CUDA graph cannot hold it


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The buffers of a case on a device, and what runs over them."""

    ours: Callable[[int, int | None], object]  # (copy, num_sms): launches, writes to the outputs
    expected: Callable[[], tuple[Tensor, ...]]  # what copy 0 is to become, by the reference
    results: Callable[[], tuple[Tensor, ...]]  # what copy 0 has become
    outputs: tuple[Tensor, ...]  # of copy 0, written in full: NaN stands there before a check
    restore: Callable[[], object] = lambda: None  # gives copy 0 its inputs back, if one is changed
    error: Callable[[Tensor, Tensor], float]
    bound: float
    peers: list[Impl] = field(default_factory=list)
    # (num_sms): further peers on a green context, which can be told of its SMs
    told_peers: Callable[[int], list[Impl]] = lambda num_sms: []

    def impls(self, places: Sequence[Place], peer_places: Sequence[Place] = ()) -> list[Impl]:
        """Ours and the peers on the whole GPU, then ours and the peers at the places of each."""
        ours = [
            Impl(name="ours", run=lambda i, n=place.num_sms: self.ours(i, n), place=place)
            for place in (WHOLE_GPU, *places)
        ]
        on_places = [
            replace(peer, place=place)
            for place in peer_places
            for peer in [*self.peers, *self.told_peers(place.num_sms)]
        ]
        return ours + self.peers + on_places

    @cached_property
    def _expected(self) -> tuple[Tensor, ...]:
        return self.expected()

    def check(self, impl: Impl) -> None:
        """Run copy 0 and hold it against the reference. Mismatch where it is off."""
        self.restore()
        expected = self._expected
        for out in self.outputs:
            out.fill_(float("nan") if out.is_floating_point() else -1)
        _synchronize(self.outputs)  # those on a peer are filled on a stream of its own
        with impl.place.current():
            returned = impl.run(0)
        _synchronize(expected)
        if returned is None:
            returned = self.results()
        results = returned if isinstance(returned, tuple) else (returned,)
        for want, got in zip(expected, results, strict=True):
            error = self.error(got.reshape(want.shape).to(want.device), want)
            if not error <= self.bound:  # NaN is bad
                who = impl.name + impl.place.text
                raise Mismatch(
                    f"{who} must be within {self.bound:.2g} of the reference, got {error:.3g}"
                )


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """A launcher on one shape; the numbers of a row follow from the fields alone."""

    dtype: torch.dtype = torch.bfloat16
    quick: bool = False  # measured by --quick too
    sweep: tuple[int, ...] = ()  # SMs of the partitions that it is measured on besides

    kernel: ClassVar[str]  # name of the launcher in `kernels`
    sweeps_peers: ClassVar[bool] = False  # they too are measured on green contexts

    @property
    @abstractmethod
    def shape(self) -> str:
        """Readable, and enough to tell it from the kernel's other cases."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """What has to be read and written at least, each once."""

    @property
    def flops(self) -> int:
        """Of the matrix products; 0 where there are none."""
        return 0

    @property
    def copies(self) -> int:
        """Buffers to rotate over, so that L2 holds nothing of a call when its turn comes again."""
        return copies_for(self.bytes)

    @abstractmethod
    def build(self, device: torch.device, copies: int) -> Problem:
        """Buffers of that many copies on `device`; the kernels write, the reference checks."""

    def is_possible(self, device: torch.device) -> bool:
        """Whether the machine has what the case needs."""
        return True


class Draw:
    """Random tensors of one dtype on one device, the same for a seed."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def randn(self, *shape: int, std: float = 1.0) -> Tensor:
        """Normal numbers, without a copy of another dtype: pools are large."""
        x = torch.empty(shape, dtype=self.dtype, device=self.device)
        return x.normal_(0.0, std, generator=self.generator)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator, device=self.device)

    def full(self, n: int, value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((n,), value, dtype=dtype, device=self.device)


def row_error(got: Tensor, want: Tensor) -> float:
    """The worst row's relative Frobenius error; rows are those of the first dim.

    By row, since a request of a long context has small outputs: lost in the sum over all of them.
    """
    got32, want32 = got.float().flatten(1), want.float().flatten(1)
    size = want32.norm(dim=1).clamp_min(torch.finfo(want.dtype).smallest_normal)
    return float(((got32 - want32).norm(dim=1) / size).max())


def share_unequal(got: Tensor, want: Tensor) -> float:
    """The share of elements that differ."""
    return float((got != want).float().mean())


def _synchronize(tensors: tuple[Tensor, ...]) -> None:
    """Wait for the devices that hold these."""
    for device in {t.device for t in tensors if t.is_cuda}:
        torch.cuda.synchronize(device)
