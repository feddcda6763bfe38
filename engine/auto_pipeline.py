"""AutoPipeline: a DecodePipeline that times itself when it starts and pipelines where that wins."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from engine.calibration_file import CalibrationFile, joined
from engine.pipeline import Key
from engine.pipeline_choice import (
    Choice,
    Readings,
    choose,
    contexts_up_to,
    mode_at,
    not_read,
    to_read,
    why,
    winners,
)
from engine.pipeline_stats import SERIAL
from engine.stage_streams import StageStreams
from engine.step_model import Split, StepModel
from engine.trial_steps import Reading, TimeIsUp, TrialSteps, name_of

CALIBRATION_SECONDS = 25.0  # after which no reading is begun, and nothing captured to be read
TIME_WAS_UP = "the calibration's time was up; the next start goes on"
NOT_TIMED = f"serial: {TIME_WAS_UP}"
NOT_HELD = "serial: the KV cache does not hold so many requests"
NOT_WORTH_IT = "serial: by arithmetic no split wins enough to be worth a reading"


class AutoPipeline(TrialSteps):
    """`choices` says by the rows of a serial step, and by what its requests hold, which split it
    runs on; `modes` has no say. Until `warm_up` has found them every step is serial."""

    def __init__(
        self,
        *arguments: Any,
        max_model_len: int,
        model: StepModel,
        splits: Sequence[Split],
        file: CalibrationFile,
        **options: Any,
    ) -> None:
        """model: rules out what is not worth a reading; splits: those that the device has; the rest
        as in TrialSteps."""
        super().__init__(*arguments, max_model_len=max_model_len, **options)
        self.choices: dict[int, tuple[Choice, ...]] = {}
        self.calibration_s = 0.0  # that `warm_up` took before it captured what was chosen
        self._model, self._splits, self._file = model, splits, file
        self._max_model_len = max_model_len
        # by batch: by context what could win, and what was timed
        self._could_win: dict[int, dict[int, list[str]]] = {}
        self._readings: dict[int, dict[int, dict[str, float]]] = {}

    def warm_up(self) -> None:
        """Find the choices, then capture the graphs that steps may come to."""
        start = self._clock()
        self._calibrate(start + CALIBRATION_SECONDS)
        self._choose_all()
        self._drop_losers()
        self.calibration_s = self._clock() - start
        while not self._splits_captured():
            self._choose_all()
        super().warm_up()
        partitions = ", ".join(self.streams)
        self.statistics.partitioning = partitions or "none"
        if len(self.streams) == 1:
            self.statistics.granted_sms = next(iter(self.streams.values())).granted
        if not partitions:
            self.statistics.why_none = self._why_none()

    @property
    def readings(self) -> Mapping[int, Readings]:
        """What the choices rest on, by batch."""
        return self._readings

    def read_again(self, batch: int, context: int, reading: Reading) -> dict[str, float]:
        """Milliseconds of the modes that were read there, splits that can still be had; choices
        stay as they are. Before the first request alone; what steps run on is kept until
        `close`."""
        modes = self._readings[batch][context].keys() - {SERIAL}
        there = [mode for mode in sorted(modes) if self._streams_of(mode) is not None]
        with self._requests_of(batch, context):
            self._capture(batch, context, [SERIAL, *there], math.inf)
            return self._read(batch, context, [SERIAL, *there], reading, math.inf)

    def _mode_of(self, num_requests: int, num_kv_tokens: int) -> StageStreams | None:
        choices = self.choices.get(self._bucket_of(num_requests), ())
        mode = mode_at(choices, num_requests, num_kv_tokens)
        return None if num_requests < self._min_requests else self.streams.get(mode)

    def _modes_of(self, num_requests: int) -> Sequence[StageStreams | None]:
        if num_requests < self._min_requests:
            return [None]
        choices = self.choices.get(self._bucket_of(num_requests), ())
        return [None, *(self.streams[mode] for mode in dict.fromkeys(c.mode for c in choices))]

    def _calibrate(self, deadline: float) -> None:
        """Time what is worth it and no start before has timed, until the clock's deadline; what was
        read until then is kept."""
        worth = {
            batch: self._model.worth_timing(batch, self._contexts(batch), self._splits)
            for batch in self.buckets
            if batch >= self._min_requests
        }
        self._could_win = {
            batch: {context: [name_of(split) for split in splits] for context, splits in of.items()}
            for batch, of in worth.items()
        }
        self._readings = self._file.read()
        num_read = 0
        try:
            with suppress(TimeIsUp):
                for batch, context, modes in self._to_read(worth):
                    self._add(batch, context, self._times(batch, context, modes, deadline))
                    num_read += 1
        finally:
            if num_read:
                self._file.write(self._readings)

    def _contexts(self, batch: int) -> tuple[int, ...]:
        """Where times of a batch are read: up to what the cache holds of so many requests."""
        block_size = self.kv_cache.block_size
        held = self.kv_cache.num_blocks // batch * block_size
        return contexts_up_to(min(self._max_model_len, held)) if held else ()

    def _to_read(
        self, worth: Mapping[int, Mapping[int, Sequence[Split]]]
    ) -> Iterator[tuple[int, int, list[str]]]:
        """Batch, context and splits that can be had, the most promising batches first."""
        gains = {
            batch: max((self._model.gain(batch, c, s) for c in of for s in of[c]), default=0.0)
            for batch, of in worth.items()
        }
        for batch in sorted(worth, key=lambda batch: (-gains[batch], -batch)):
            while (cell := self._next_cell(batch)) is not None:
                yield batch, *cell

    def _next_cell(self, batch: int) -> tuple[int, list[str]] | None:
        """What is to be read by what was read so far."""
        for context, missing in self._missing(batch).items():
            if modes := [mode for mode in missing if self._streams_of(mode) is not None]:
                return context, modes
        return None

    def _missing(self, batch: int) -> dict[int, list[str]]:
        readings = self._readings.get(batch, {})
        return not_read(readings, to_read(readings, self._could_win[batch]))

    def _add(self, batch: int, context: int, ms: Mapping[str, float]) -> None:
        """Note new times beside those that are known."""
        read = self._readings.setdefault(batch, {})
        read[context] = joined(read.get(context, {}), ms)

    def _choose_all(self) -> None:
        """Fill in the choices, and the reason of each."""
        for batch in self.buckets:
            if batch < self._min_requests:
                reason = f"serial: fewer than {self._min_requests} requests"
            elif not self._could_win[batch]:
                reason = NOT_HELD
            elif not any(self._could_win[batch].values()):
                reason = NOT_WORTH_IT
            else:
                reason = self._reason(batch)
            self.statistics.choices[batch] = reason

    def _reason(self, batch: int) -> str:
        """Choose for a batch from what was read of it, and say why."""
        missing = self._missing(batch)
        left = [c for c, modes in missing.items() if set(modes) - self._why_not.keys()]
        if left and batch not in self._readings:
            return NOT_TIMED
        could_win = self._could_win[batch].items()
        cannot_win = {c: {} for c, modes in could_win if not modes and c not in missing}
        reason = self._choose(batch, cannot_win | self._readings.get(batch, {}))
        if left:
            reason += f"; not all is timed from {min(left)} tokens on: {TIME_WAS_UP}"
        return reason

    def _choose(self, batch: int, readings: Readings) -> str:
        """Take over what readings say of a batch, but for splits that cannot be had. Returns the
        reason."""
        choices = choose(readings)
        missing = {c.mode for c in choices if self._streams_of(c.mode) is None}
        if missing:
            there = {
                context: {mode: t for mode, t in ms.items() if mode not in missing}
                for context, ms in readings.items()
            }
            return self._choose(batch, there)
        self.choices[batch] = choices
        return why(readings, choices)

    def _drop_losers(self) -> None:
        """Give back the partitions that no step runs on, and the graphs that none comes to."""
        used = {choice.mode for choices in self.choices.values() for choice in choices}
        for mode in self.streams.keys() - used:
            self._drop(mode)
        for key in self.graphs.captured.keys() - self._all_keys():
            del self.graphs.captured[key]

    def _all_keys(self) -> dict[Key | int, None]:
        every = range(self.buckets[-1], 0, -1)
        return dict.fromkeys(key for num_requests in every for key in self._keys_of(num_requests))

    def _splits_captured(self) -> bool:
        """Capture the graphs of the splits that steps run on, the largest first. False where one
        failed, which is left out from now on."""
        num_failed = len(self._why_not)
        for key in self._all_keys():
            if not isinstance(key, int) and key[0] in self.streams:
                with self._left_out_on_error(key[0]):
                    if key not in self.graphs.captured:
                        self.inputs.upload({}, self._padding)
                        self.graphs.run(key, self._pipelined_step)
        return len(self._why_not) == num_failed

    def _why_none(self) -> str:
        """What was timed and lost, and what could not be had."""
        times = [ms for read in self._readings.values() for ms in read.values()]
        timed = {mode for ms in times for mode in ms}
        won = {mode for ms in times for mode in winners(ms)}
        lost = sorted(timed - won - {SERIAL} - self._why_not.keys())
        is_late = any(TIME_WAS_UP in reason for reason in self.statistics.choices.values())
        reasons = [f"auto: {TIME_WAS_UP}"] * is_late
        if lost or not (self._why_not or is_late):
            than = f" than {', '.join(lost)}" if self._why_not or is_late else ""
            reasons.insert(0, f"auto: serial is faster{than} for every batch")
        return "; ".join(reasons + [f"no {mode}: {why}" for mode, why in self._why_not.items()])
