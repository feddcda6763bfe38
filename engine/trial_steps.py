"""TrialSteps: a DecodePipeline that times steps of requests that do not exist, serial and on splits
of the device."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from engine.micro_batches import cut, places
from engine.pipeline import DecodePipeline
from engine.pipeline_choice import MARGIN
from engine.pipeline_stats import SERIAL
from engine.stage_streams import StageStreams, in_a_line
from engine.step_model import Split

T = TypeVar("T")


@dataclass(frozen=True)
class Reading:
    """Milliseconds of steps that come before those that count, and of these."""

    settle_ms: float
    ms: float


# At its power limit an H200 swings about it once a second, for seconds behind a pause: steps take
# up to 20 % longer at one time than at another. Means of a whole second do not see that.
SHORT, LONG = Reading(60.0, 60.0), Reading(500.0, 1000.0)
ROUNDS = 2  # short readings of each mode, in turn with the others'
# Splits that by short readings are so near the fastest and lose by no more than that are read long:
# short ones mostly flatter splits, by up to 3 %, but slight one in ten by more than 2.
NEAR, LOSS = 0.02, 0.02
# Long readings of a gain scatter by that in one process: where the fastest split's is so near the
# MARGIN by which it must win, all that was read long is so a second time.
SCATTER = 0.01

# batch, tokens that each request holds, mode, what launches the step, how -> ms of it
TimeStep = Callable[[int, int, str, Callable[[], None], Reading], float]


class TimeIsUp(Exception):
    """Timing took as long as it may."""


def replay_ms(
    batch: int, context: int, mode: str, run: Callable[[], None], reading: Reading
) -> float:
    """Milliseconds of one launch, by events on the current stream; waits for them."""
    step_ms = _mean_ms(run, 1)
    step_ms = _mean_ms(run, math.ceil(reading.settle_ms / step_ms))
    return _mean_ms(run, math.ceil(reading.ms / step_ms))


def _mean_ms(run: Callable[[], None], num: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(num):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / num


class TrialSteps(DecodePipeline):
    """Splits go by their names, as "48:84", are made when they are first asked for and left out
    once anything of them fails. Trials come before the first request and write over the pool."""

    def __init__(
        self,
        *arguments: Any,
        make_streams: Callable[[Split], StageStreams],
        time_step: TimeStep = replay_ms,
        clock: Callable[[], float] = time.perf_counter,
        **options: Any,
    ) -> None:
        """make_streams: as GpuStreams.partitioned; clock: seconds; the rest as in
        DecodePipeline."""
        super().__init__(*arguments, streams=(), **options)
        self._make_streams, self._time_step, self._clock = make_streams, time_step, clock
        self._why_not: dict[str, str] = {}  # splits that could not be had, or whose steps failed
        self._is_filled = False

    def _times(
        self, batch: int, context: int, modes: Iterable[str], deadline: float
    ) -> dict[str, float]:
        """Milliseconds of the serial step and of each of these splits; those that fail are left
        out. What is read short alone takes as much longer than that as any that is read long.
        TimeIsUp where the clock passes the deadline."""
        in_turn, found = [SERIAL, *modes], dict[str, float]()
        with self._requests_of(batch, context):
            self._capture(batch, context, in_turn, deadline)
            for _ in range(ROUNDS):
                ms = self._read(batch, context, in_turn, SHORT, deadline)
                found = {mode: min(t, found.get(mode, t)) for mode, t in ms.items()}
            return self._confirmed(batch, context, found, deadline)

    def _confirmed(
        self, batch: int, context: int, found: Mapping[str, float], deadline: float
    ) -> dict[str, float]:
        """Times of which those that may win by short readings, found, are read long. If all of
        these fail, those that may win without them are."""
        while near := _may_win(found):
            ms = self._read_long(batch, context, [SERIAL, *near], deadline)
            found = {mode: t for mode, t in found.items() if mode not in self._why_not}
            if len(ms) > 1:
                scale = max(t / found[mode] for mode, t in ms.items())
                return {mode: t * scale for mode, t in found.items()} | ms
        return dict(found)

    def _capture(self, batch: int, context: int, modes: Iterable[str], deadline: float) -> None:
        """Before the first of them is read: after a pause a GPU has power to spare."""
        self._each(batch, context, modes, deadline, lambda mode, run: run())

    def _read_long(
        self, batch: int, context: int, modes: Iterable[str], deadline: float
    ) -> dict[str, float]:
        """Means of two readings where the fastest split hardly wins, or hardly does not."""
        ms = self._read(batch, context, modes, LONG, deadline)
        best = min((t for mode, t in ms.items() if mode != SERIAL), default=math.inf)
        if abs(ms[SERIAL] / best - (1 + MARGIN)) > SCATTER:
            return ms
        again = self._read(batch, context, ms, LONG, deadline)
        return {mode: (ms[mode] + t) / 2 for mode, t in again.items()}

    def _read(
        self, batch: int, context: int, modes: Iterable[str], reading: Reading, deadline: float
    ) -> dict[str, float]:
        """Milliseconds of a step in each of these modes."""

        def read(mode: str, run: Callable[[], None]) -> float:
            return self._time_step(batch, context, mode, run, reading)

        return self._each(batch, context, modes, deadline, read)

    def _each(
        self,
        batch: int,
        context: int,
        modes: Iterable[str],
        deadline: float,
        work: Callable[[str, Callable[[], None]], T],
    ) -> dict[str, T]:
        """work(mode, what launches its step) of each of these; without those that fail."""
        found = {}
        for mode in modes:
            if self._clock() >= deadline:
                raise TimeIsUp
            if mode not in self._why_not:
                with self._left_out_on_error(mode):
                    run = self._launcher(batch, context, self.streams.get(mode))
                    found[mode] = work(mode, run)
        return found

    def _streams_of(self, mode: str) -> StageStreams | None:
        """Of a split; None where it cannot be had."""
        if mode not in self.streams and mode not in self._why_not:
            with self._left_out_on_error(mode):
                streams = self._make_streams(split_of(mode))
                if streams.name == mode:
                    self.streams[mode] = streams
                else:
                    self._why_not[mode] = f"{streams.name} was granted"
                    streams.close()
        return self.streams.get(mode)

    @contextmanager
    def _left_out_on_error(self, mode: str) -> Iterator[None]:
        """Within, an error costs this split alone. Of the serial step it is raised: nothing else is
        left."""
        try:
            yield
        except Exception as error:  # of the driver, torch, Triton or its compiler
            if mode == SERIAL:
                raise
            self._why_not[mode] = in_a_line(error)
            self.graphs.take_new_pool()
            with suppress(Exception):
                self._drop(mode)

    def _drop(self, mode: str) -> None:
        """Give back a split's graphs, then its partition, where there is one."""
        for kept in (self.graphs.captured, self._timed):
            for key in [key for key in kept if isinstance(key, tuple) and key[0] == mode]:
                del kept[key]
        if mode in self.streams:
            self.streams.pop(mode).close()

    def _fill_cache(self) -> None:
        """Values as a model's may be, once: trials store none. Zeros take less power than those,
        which flatters what needs more of it; and what was never written may be anything, NaN
        too."""
        if not self._is_filled:
            generator = torch.Generator(self.device).manual_seed(0)
            self.kv_cache.blocks.normal_(generator=generator)
            self._is_filled = True

    @contextmanager
    def _requests_of(self, batch: int, context: int) -> Iterator[None]:
        """Tokens and block tables as if there were requests, over scattered blocks that have
        values. Nobody has a row yet."""
        num_steps = self.statistics.num_steps.total()
        assert not (len(self.rows) or num_steps), (
            "trials must come before the first request, "
            f"got {len(self.rows)} of them and {num_steps} steps"
        )
        self._fill_cache()
        num_blocks = -(-context // self.kv_cache.block_size)
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(self.kv_cache.num_blocks, generator=generator)
        blocks = order[: batch * num_blocks].view(batch, num_blocks)
        self.block_table[:batch, :num_blocks] = blocks.to(self.device, torch.int32)
        vocab_size = self.decoder.config.vocab_size
        token_ids = torch.randint(vocab_size, (batch,), generator=generator)
        self.token_ids[:batch] = token_ids.to(self.device)
        try:
            yield
        finally:
            self.block_table.zero_()
            self.token_ids.zero_()

    def _launcher(
        self, batch: int, context: int, streams: StageStreams | None
    ) -> Callable[[], None]:
        """What runs such a step, its inputs uploaded. It stores no k and v: their slots are -1."""
        rows: Sequence[int] = range(batch)
        if streams is not None:
            size = self._size_of(batch)
            rows = places(cut([context] * batch, self.num_micro_batches), size)
        columns: Mapping[str, Sequence[int]] = {
            "rows": range(batch),
            "positions": [context - 1] * batch,
            "context_lens": [context] * batch,
        }
        self.inputs.upload(self._placed(columns, list(rows)), self._padding)
        if streams is None:
            return partial(self.graphs.run, self._bucket_of(batch), self._step)
        return partial(self.graphs.run, (streams.name, size, 0), self._pipelined_step)


def _may_win(ms: Mapping[str, float]) -> list[str]:
    """Splits that by short readings are fast enough for long ones."""
    limit = min((1 + LOSS) * ms[SERIAL], (1 + NEAR) * min(ms.values()))
    return [mode for mode, t in ms.items() if mode != SERIAL and t <= limit]


def name_of(split: Split) -> str:
    """The mode of its steps: "48:84"."""
    return ":".join(map(str, split))


def split_of(mode: str) -> Split:
    """What has this name. ValueError where that is none of a split."""
    attention, ffn = map(int, mode.split(":"))
    return attention, ffn
