"""What the decode pipeline has done: steps by mode, and time by stage; as a dict and as text."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from engine.stage_schedule import STAGES, Stage

SERIAL = "serial"


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds of one step. A serial one has no stages: 0 and nothing of them."""

    step_ms: float  # all of it
    layers_ms: float = 0.0  # from the first stage's start to the last one's end
    # of those, how long each stage's stream had something to do
    busy_ms: Mapping[Stage, float] = field(default_factory=dict)

    @classmethod
    def of(cls, spans: Sequence[tuple[Stage, float, float]]) -> "StepTimes":
        """spans: of each launch its stream, start and end in ms; those of one stream lie apart."""
        staged = [span for span in spans if span[0] in STAGES]
        if not staged:
            raise ValueError("spans must hold a stage's, got none")

        def elapsed(some: Sequence[tuple[Stage, float, float]]) -> float:
            return max(end for _, _, end in some) - min(start for _, start, _ in some)

        busy = {
            stage: sum(end - start for s, start, end in staged if s == stage) for stage in STAGES
        }
        return cls(elapsed(spans), elapsed(staged), busy)


@dataclass
class ModeTimes:
    """Sums over the timed steps of one mode."""

    num_steps: int = 0
    step_ms: float = 0.0
    layers_ms: float = 0.0
    busy_ms: Counter[str] = field(default_factory=Counter)

    def add(self, times: StepTimes) -> None:
        """Add the times of a step."""
        self.num_steps += 1
        self.step_ms += times.step_ms
        self.layers_ms += times.layers_ms
        self.busy_ms.update(times.busy_ms)

    def as_dict(self) -> dict[str, Any]:
        """As in `PipelineStats.as_dict`."""
        n = self.num_steps
        found: dict[str, Any] = {"num_timed_steps": n, "step_ms": self.step_ms / n if n else None}
        names = ("layers_ms", "busy_ms", "bubble_ms", "occupancy", "overlap")
        if not self.layers_ms:
            return found | dict.fromkeys(names)
        busy = {stage: self.busy_ms[stage] for stage in STAGES}
        values = (
            self.layers_ms / n,
            {stage: ms / n for stage, ms in busy.items()},
            {stage: (self.layers_ms - ms) / n for stage, ms in busy.items()},
            {stage: ms / self.step_ms for stage, ms in busy.items()},
            sum(busy.values()) / self.step_ms,
        )
        return found | dict(zip(names, values, strict=True))


@dataclass
class PipelineStats:
    """Counters since the engine began; `as_dict` is what users see."""

    partitioning: str = "none"  # the streams that stages run on, where there are any
    why_none: str | None = None  # why there are none
    asked_sms: tuple[int, ...] | None = None
    granted_sms: tuple[int, ...] | None = None  # of each stage; None with several partitions
    granted_by_mode: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of each partition
    max_connections: str | None = None  # CUDA's hardware queues, see `pipeline_needs`; None: a CPU
    num_steps: Counter[str] = field(default_factory=Counter)  # by mode: serial, or the streams'
    num_tokens: int = 0
    modes: dict[int, str] = field(default_factory=dict)  # newest mode by requests a step holds
    choices: dict[int, str] = field(default_factory=dict)  # of `auto`, and why, by the same
    micro_batches: list[dict[str, int]] = field(default_factory=list)  # of the newest such step
    _times: dict[str, ModeTimes] = field(default_factory=dict)  # by mode

    def step_launched(self, mode: str, bucket: int, num_requests: int) -> None:
        """Count a step; bucket: the most requests that its graph holds."""
        self.num_steps[mode] += 1
        self.num_tokens += num_requests
        self.modes[bucket] = mode

    def micro_batches_cut(
        self, micro_batches: Sequence[Sequence[int]], context_lens: Sequence[int]
    ) -> None:
        """Note how the step was cut, by indices of its requests."""
        self.micro_batches = [
            {"num_requests": len(some), "num_kv_tokens": sum(context_lens[i] for i in some)}
            for some in micro_batches
        ]

    def step_timed(self, mode: str, times: StepTimes) -> None:
        """Add the device's time for a step."""
        self._times.setdefault(mode, ModeTimes()).add(times)

    def as_dict(self) -> dict[str, Any]:
        """A plain dict, also where every step is serial; None where there is nothing to tell.

        Partitions: partitioning, why_none, asked_sms, granted_sms (of the one there is),
        granted_sms_by_mode, max_connections (CUDA_DEVICE_MAX_CONNECTIONS that CUDA started with).
        Steps: num_steps, num_steps_by_mode, num_tokens, modes and choices (of `auto`, with their
        reasons) by the requests that a step holds, micro_batches of the newest one.
        Times, with profiling, by events of the device, as means over num_timed_steps: step_ms;
        layers_ms, from the first stage's start to the last one's end; and by stage busy_ms, when
        its stream had something to do; bubble_ms = layers_ms - busy_ms; occupancy = busy_ms /
        step_ms. overlap = sum of busy_ms / step_ms: 2 where both stages were busy all the step, 1
        or less where they took turns. A step also has what lies outside of its layers, embedding,
        LM head and sampling. Serial steps have step_ms alone. times_by_mode has these for each
        mode; beside it they stand for timed_mode, the partition with the most timed steps, or
        serial where none was timed.
        """
        timed_mode = self._timed_mode
        return {
            "partitioning": self.partitioning,
            "why_none": self.why_none,
            "asked_sms": _by_stage(self.asked_sms),
            "granted_sms": _by_stage(self.granted_sms),
            "granted_sms_by_mode": {m: _by_stage(sms) for m, sms in self.granted_by_mode.items()},
            "max_connections": self.max_connections,
            "num_steps": sum(self.num_steps.values()),
            "num_steps_by_mode": dict(self.num_steps),
            "num_tokens": self.num_tokens,
            "modes": dict(sorted(self.modes.items())),
            "choices": dict(sorted(self.choices.items())),
            "micro_batches": [dict(some) for some in self.micro_batches],
            "times_by_mode": {mode: times.as_dict() for mode, times in self._times.items()},
            "timed_mode": timed_mode,
            **self._times.get(timed_mode, ModeTimes()).as_dict(),
        }

    @property
    def _timed_mode(self) -> str | None:
        pipelined = {m: times.num_steps for m, times in self._times.items() if m != SERIAL}
        serial = SERIAL if SERIAL in self._times else None
        return max(pipelined, key=pipelined.__getitem__, default=serial)

    def as_text(self) -> str:
        """The same in lines."""
        stats = self.as_dict()
        why = "" if self.why_none is None else f": {self.why_none}"
        lines = [
            f"partitioning {self.partitioning}{why}, SMs asked {_text(stats['asked_sms'])}, "
            f"granted {_granted(stats)}{_queues(stats)}",
            f"{self.num_tokens} tokens in {stats['num_steps']} steps ("
            + ", ".join(f"{count} {mode}" for mode, count in self.num_steps.items())
            + ")",
            "mode by requests up to: "
            + (", ".join(f"{size} {mode}" for size, mode in stats["modes"].items()) or "-"),
            *(f"auto, {requests} requests: {choice}" for requests, choice in _runs(self.choices)),
            "newest micro-batches: "
            + (
                ", ".join(
                    f"{some['num_requests']} requests with {some['num_kv_tokens']} tokens"
                    for some in self.micro_batches
                )
                or "-"
            ),
        ]
        return "\n".join(lines + _time_lines(stats["times_by_mode"]))


def _time_lines(by_mode: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    for mode, times in by_mode.items():
        steps = f"over {times['num_timed_steps']} timed steps"
        if times["layers_ms"] is None:
            lines.append(f"{mode}: step {times['step_ms']:.3f} ms {steps}")
            continue
        lines.append(
            f"{mode}: step {times['step_ms']:.3f} ms, its layers {times['layers_ms']:.3f} ms, "
            f"overlap {times['overlap']:.2f} {steps}"
        )
        lines += [
            f"{stage} busy {times['busy_ms'][stage]:.3f} ms ({times['occupancy'][stage]:.0%}), "
            f"idle {times['bubble_ms'][stage]:.3f} ms of its layers"
            for stage in STAGES
        ]
    return lines or ["no step was timed"]


def _runs(choices: Mapping[int, str]) -> Iterator[tuple[str, str]]:
    """Numbers of requests in a row that have the same choice, and that choice."""
    for choice, run in groupby(sorted(choices.items()), key=lambda item: item[1]):
        sizes = [size for size, _ in run]
        yield (f"{sizes[0]}-{sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}"), choice


def _by_stage(sms: tuple[int, ...] | None) -> dict[str, int] | None:
    return None if sms is None else dict(zip(STAGES, sms, strict=True))


def _granted(stats: Mapping[str, Any]) -> str:
    """Of each partition, where there are several."""
    several = stats["granted_sms_by_mode"].values() if stats["granted_sms"] is None else ()
    return ", ".join(map(_text, several)) or _text(stats["granted_sms"])


def _queues(stats: Mapping[str, Any]) -> str:
    num = stats["max_connections"]
    return "" if num is None else f", CUDA_DEVICE_MAX_CONNECTIONS {num}"


def _text(sms: Mapping[str, int] | None) -> str:
    return "-" if sms is None else ":".join(str(n) for n in sms.values())
