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
    """Milliseconds of one step."""

    step_ms: float  # all of it
    layers_ms: float  # from the first stage's start to the last one's end
    busy_ms: Mapping[Stage, float]  # of those, how long each stage's stream had something to do

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
class PipelineStats:
    """Counters since the engine began; `as_dict` is what users see."""

    partitioning: str = "none"  # the streams that stages run on, where there are any
    why_none: str | None = None  # why there are none
    asked_sms: tuple[int, ...] | None = None
    granted_sms: tuple[int, ...] | None = None  # of each stage
    num_steps: Counter[str] = field(default_factory=Counter)  # by mode: serial, or the streams'
    num_tokens: int = 0
    modes: dict[int, str] = field(default_factory=dict)  # newest mode by requests a step holds
    choices: dict[int, str] = field(default_factory=dict)  # of `auto`, and why, by the same
    micro_batches: list[dict[str, int]] = field(default_factory=list)  # of the newest such step
    num_timed_steps: int = 0
    _step_ms: float = 0.0
    _layers_ms: float = 0.0
    _busy_ms: Counter[str] = field(default_factory=Counter)

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

    def step_timed(self, times: StepTimes) -> None:
        """Add the device's time for a pipelined step."""
        self.num_timed_steps += 1
        self._step_ms += times.step_ms
        self._layers_ms += times.layers_ms
        self._busy_ms.update(times.busy_ms)

    def as_dict(self) -> dict[str, Any]:
        """Everything, times as means over the timed steps; None where nothing was timed."""
        n = self.num_timed_steps
        busy = {stage: self._busy_ms[stage] for stage in STAGES}
        idle = {stage: self._layers_ms - ms for stage, ms in busy.items()}
        return {
            "partitioning": self.partitioning,
            "why_none": self.why_none,
            "asked_sms": _by_stage(self.asked_sms),
            "granted_sms": _by_stage(self.granted_sms),
            "num_steps": sum(self.num_steps.values()),
            "num_steps_by_mode": dict(self.num_steps),
            "num_tokens": self.num_tokens,
            "modes": dict(sorted(self.modes.items())),
            "choices": dict(sorted(self.choices.items())),
            "micro_batches": [dict(some) for some in self.micro_batches],
            "num_timed_steps": n,
            "step_ms": self._step_ms / n if n else None,
            "layers_ms": self._layers_ms / n if n else None,
            "busy_ms": {stage: ms / n for stage, ms in busy.items()} if n else None,
            "bubble_ms": {stage: ms / n for stage, ms in idle.items()} if n else None,
            "occupancy": _shares(busy, self._layers_ms),
            # 1: no two stages ever ran at a time; 2: they always did
            "overlap": sum(busy.values()) / self._layers_ms if self._layers_ms else None,
        }

    def as_text(self) -> str:
        """The same in lines."""
        stats = self.as_dict()
        why = "" if self.why_none is None else f": {self.why_none}"
        lines = [
            f"partitioning {self.partitioning}{why}, SMs asked {_text(stats['asked_sms'])}, "
            f"granted {_text(stats['granted_sms'])}",
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
        return "\n".join(lines + _time_lines(stats))


def _time_lines(stats: Mapping[str, Any]) -> list[str]:
    if not stats["num_timed_steps"]:
        return ["no step was timed"]
    stages = [
        f"{stage} busy {stats['busy_ms'][stage]:.3f} ms ({stats['occupancy'][stage]:.0%}), "
        f"idle {stats['bubble_ms'][stage]:.3f} ms"
        for stage in STAGES
    ]
    return [
        f"step {stats['step_ms']:.3f} ms, its layers {stats['layers_ms']:.3f} ms, overlap "
        f"{stats['overlap']:.2f} over {stats['num_timed_steps']} timed steps",
        *stages,
    ]


def _runs(choices: Mapping[int, str]) -> Iterator[tuple[str, str]]:
    """Numbers of requests in a row that have the same choice, and that choice."""
    for choice, run in groupby(sorted(choices.items()), key=lambda item: item[1]):
        sizes = [size for size, _ in run]
        yield (f"{sizes[0]}-{sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}"), choice


def _by_stage(sms: tuple[int, ...] | None) -> dict[str, int] | None:
    return None if sms is None else dict(zip(STAGES, sms, strict=True))


def _shares(parts: Mapping[str, float], whole: float) -> dict[str, float] | None:
    return {name: part / whole for name, part in parts.items()} if whole else None


def _text(sms: Mapping[str, int] | None) -> str:
    return "-" if sms is None else ":".join(str(n) for n in sms.values())
