"""AutoPipeline: a DecodePipeline that times itself when it starts and pipelines where that wins."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from engine.calibration_file import CalibrationFile
from engine.micro_batches import cut, places
from engine.pipeline import DecodePipeline
from engine.pipeline_choice import Choice, Readings, choose, contexts_up_to, mode_at, why
from engine.pipeline_stats import SERIAL
from engine.stage_streams import StageStreams
from engine.step_model import Split, StepModel
from green.driver import GreenContextError

# batch, tokens that each request holds, mode, and what launches the step -> ms of it
TimeStep = Callable[[int, int, str, Callable[[], None]], float]
CALIBRATION_SECONDS = 25.0  # after which no batch is begun; one takes about two
ROUNDS = 3  # readings of each mode, in turn with the others': clocks drift
READING_MS = 25.0
NOT_TIMED = "serial: the calibration's time was up; the next start goes on"
NOT_WORTH_IT = "serial: by arithmetic no split can win, for every micro-batch reads all weights"


def replay_ms(batch: int, context: int, mode: str, run: Callable[[], None]) -> float:
    """Milliseconds of one launch, by events on the current stream; waits for them."""
    num, step_ms = 1, 0.0
    while num * step_ms < READING_MS:
        if step_ms:  # of a single one: enough of them for a reading
            num = round(READING_MS / step_ms) + 1
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(num):
            run()
        end.record()
        end.synchronize()
        step_ms = start.elapsed_time(end) / num
        if num > 1:
            break
    return step_ms


class AutoPipeline(DecodePipeline):
    """`choices` says by the rows of a serial step, and by what its requests hold, which split it
    runs on. Until `warm_up` has found them every step is serial."""

    def __init__(
        self,
        *arguments: Any,
        max_model_len: int,
        model: StepModel,
        splits: Sequence[Split],
        make_streams: Callable[[Split], StageStreams],
        file: CalibrationFile,
        time_step: TimeStep = replay_ms,
        clock: Callable[[], float] = time.perf_counter,
        **options: Any,
    ) -> None:
        """model: rules out what is not worth a reading; splits: those that the device has;
        make_streams: as GpuStreams.partitioned; the rest as in DecodePipeline."""
        super().__init__(*arguments, max_model_len=max_model_len, streams=(), **options)
        self.choices: dict[int, tuple[Choice, ...]] = {}
        self._model, self._splits, self._file = model, splits, file
        self._make_streams, self._time_step, self._clock = make_streams, time_step, clock
        self._max_model_len = max_model_len
        self._why_not: dict[str, str] = {}  # splits that could not be had

    def warm_up(self) -> None:
        """Find the choices, then capture the graphs that steps may come to."""
        self._calibrate()
        self._drop_losers()
        super().warm_up()
        partitions = ", ".join(self.streams)
        self.statistics.partitioning = partitions or "none"
        if len(self.streams) == 1:
            self.statistics.granted_sms = next(iter(self.streams.values())).granted
        if not partitions:
            self.statistics.why_none = "; ".join(
                self._why_not.values() or ["auto: serial is faster for every batch"]
            )

    def _mode_of(self, num_requests: int, num_kv_tokens: int) -> StageStreams | None:
        choices = self.choices.get(self._bucket_of(num_requests), ())
        mode = mode_at(choices, num_requests, num_kv_tokens)
        return None if num_requests < self._min_requests else self.streams.get(mode)

    def _modes_of(self, num_requests: int) -> Sequence[StageStreams | None]:
        if num_requests < self._min_requests:
            return [None]
        choices = self.choices.get(self._bucket_of(num_requests), ())
        return [None, *(self.streams[mode] for mode in dict.fromkeys(c.mode for c in choices))]

    def _calibrate(self) -> None:
        """Fill in the choices; the largest batches first, which have the most to win."""
        batches = [batch for batch in reversed(self.buckets) if batch >= self._min_requests]
        candidates = {
            batch: self._model.candidates(batch, self._contexts(batch), self._splits)
            for batch in batches
        }
        readings = self._file.read()
        kept, deadline = set(readings), self._clock() + CALIBRATION_SECONDS
        to_read = [batch for batch in batches if candidates[batch] and batch not in kept]
        if to_read:  # what was never written may be anything, NaN too
            self.kv_cache.blocks.zero_()
        for batch in to_read:
            if self._clock() < deadline:
                readings[batch] = self._read(batch, candidates[batch])
        if readings.keys() - kept and not self._why_not:
            self._file.write(readings)
        for batch in self.buckets:
            if batch < self._min_requests:
                reason = f"serial: fewer than {self._min_requests} requests"
            elif not candidates[batch]:
                reason = NOT_WORTH_IT
            else:
                reason = self._choose(batch, readings.get(batch))
            self.statistics.choices[batch] = reason

    def _contexts(self, batch: int) -> tuple[int, ...]:
        """Where times of a batch are read: up to what the cache holds of so many requests."""
        block_size = self.kv_cache.block_size
        held = self.kv_cache.num_blocks // batch * block_size
        return contexts_up_to(min(self._max_model_len, held)) if held else ()

    def _choose(self, batch: int, readings: Readings | None) -> str:
        """Take over what readings say of a batch, but for splits that cannot be had. Returns the
        reason."""
        if readings is None:
            return NOT_TIMED
        modes = {mode for ms in readings.values() for mode in ms} - {SERIAL}
        missing = {mode for mode in modes if self._streams_of(_split(mode)) is None}
        there = {
            context: {mode: t for mode, t in ms.items() if mode not in missing}
            for context, ms in readings.items()
        }
        self.choices[batch] = choose(there)
        return why(there, self.choices[batch])

    def _streams_of(self, split: Split) -> StageStreams | None:
        """Of a split, made when it is first asked for; None where it cannot be had."""
        name = ":".join(map(str, split))
        if name not in self.streams and name not in self._why_not:
            try:
                streams = self._make_streams(split)
            except GreenContextError as error:
                self._why_not[name] = str(error)
            else:
                if streams.name == name:
                    self.streams[name] = streams
                else:
                    self._why_not[name] = f"{name} was asked for, {streams.name} granted"
                    streams.close()
        return self.streams.get(name)

    def _read(self, batch: int, candidates: Sequence[Split]) -> dict[int, dict[str, float]]:
        """Times of a batch by context and mode; none at a context where no candidate could win."""
        readings: dict[int, dict[str, float]] = {}
        for context in self._contexts(batch):
            could = [s for s in candidates if self._model.could_win(batch, context, s)]
            modes = [streams for s in could if (streams := self._streams_of(s)) is not None]
            readings[context] = self._times(batch, context, modes) if modes else {}
        return readings

    def _times(self, batch: int, context: int, modes: Sequence[StageStreams]) -> dict[str, float]:
        """Milliseconds of the serial step and of each of these, medians of several rounds."""
        found: dict[str, list[float]] = {}
        with self._requests_of(batch, context):
            for streams in (None, *modes):
                self._launcher(batch, context, streams)()  # captures, where that is still to do
            for _ in range(ROUNDS):
                for streams in (None, *modes):
                    mode = SERIAL if streams is None else streams.name
                    run = self._launcher(batch, context, streams)
                    found.setdefault(mode, []).append(self._time_step(batch, context, mode, run))
        return {mode: statistics.median(ms) for mode, ms in found.items()}

    @contextmanager
    def _requests_of(self, batch: int, context: int) -> Iterator[None]:
        """Block tables as if there were requests, over scattered blocks. Nobody has a row yet."""
        assert not len(self.rows), "a calibration must come before the first request"
        num_blocks = -(-context // self.kv_cache.block_size)
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(self.kv_cache.num_blocks, generator=generator)
        blocks = order[: batch * num_blocks].view(batch, num_blocks)
        self.block_table[:batch, :num_blocks] = blocks.to(self.device, torch.int32)
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

    def _drop_losers(self) -> None:
        """Give back the partitions that no step runs on, and the graphs that none comes to."""
        every = range(1, self.buckets[-1] + 1)
        needed = {key for num_requests in every for key in self._keys_of(num_requests)}
        for key in self.graphs.captured.keys() - needed:
            del self.graphs.captured[key]
        used = {choice.mode for choices in self.choices.values() for choice in choices}
        for key in [key for key in self._timed if key[0] not in used]:
            del self._timed[key]
        for name in self.streams.keys() - used:
            self.streams.pop(name).close()


def _split(mode: str) -> Split:
    attention, ffn = map(int, mode.split(":"))
    return attention, ffn
