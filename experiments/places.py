"""Where a launch runs: on the whole GPU, by a grid of so many SMs, on a green context of them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from green.driver import GreenContextError, GreenContextUnsupported
from green.streams import GreenStreams


@dataclass(frozen=True)
class Place:
    """What a launcher is told of it, and the stream that confines it, if one does."""

    partitioning: str = "none"  # as in a Reading
    sms_asked: int | None = None
    num_sms: int | None = None  # as granted
    stream: torch.cuda.Stream | None = None

    @property
    def text(self) -> str:
        """For a sentence: nothing, or " on 64 SMs (green)"."""
        return "" if self.num_sms is None else f" on {self.num_sms} SMs ({self.partitioning})"

    def current(self) -> AbstractContextManager[object]:
        """Launches inside go here."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)


WHOLE_GPU = Place()


class Places:
    """The partitions of one run: green contexts are made when first asked for, and end with it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._green: dict[int, GreenStreams | None] = {}
        self._is_unsupported = False

    def of(self, nums_sms: Sequence[int]) -> list[Place]:
        """For each number a grid, and a green context, or one printed line why there is none."""
        places = []
        for n in nums_sms:
            places.append(Place("grid", n, n))
            if n not in self._green:
                self._green[n] = self._open(n)
            green = self._green[n]
            if green is not None:
                places.append(Place("green", n, green.granted[0], green.streams[0]))
        return places

    def _open(self, num_sms: int) -> GreenStreams | None:
        if self._is_unsupported:
            return None
        try:
            return GreenStreams.of((num_sms,), self._device)
        except GreenContextUnsupported as error:
            self._is_unsupported = True
            print(f"skipped green contexts: {error.reason}")
        except (GreenContextError, ValueError) as error:
            print(f"skipped a green context of {num_sms} SMs: {error}")
        return None

    def close(self) -> None:
        for green in self._green.values():
            if green is not None:
                green.close()
        self._green.clear()

    def __enter__(self) -> "Places":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
