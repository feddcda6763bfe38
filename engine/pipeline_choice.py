"""Which decode steps are pipelined, from times of both ways: the rule of decode_pipeline="auto".

Of one batch, times are read at several contexts. A step whose requests hold so many tokens on
average is pipelined where a split beat serial at the next context below and at the next one above,
by MARGIN at both; outside of what was read it is serial.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from engine.pipeline_stats import SERIAL
from engine.step_model import MARGIN

Readings = Mapping[int, Mapping[str, float]]  # tokens a request holds -> mode -> ms of the step
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Choice:
    """The mode of steps whose requests hold from low to high tokens on average."""

    low: int
    high: int
    mode: str
    speedup: float  # over serial, the lower of those read at both ends


def contexts_up_to(longest: int) -> tuple[int, ...]:
    """Where times are read, for requests of at most so many tokens, which is the last of them."""
    return (*(context for context in CONTEXTS if context < longest), longest)


def choose(readings: Readings) -> tuple[Choice, ...]:
    """Where to pipeline, by rising contexts. A context without times is one that cannot win."""
    return tuple(
        choice
        for (low, below), (high, above) in pairwise(sorted(readings.items()))
        if (choice := _best(low, below, high, above)) is not None
    )


def _best(
    low: int, below: Mapping[str, float], high: int, above: Mapping[str, float]
) -> Choice | None:
    speedups = {
        mode: min(ms[SERIAL] / ms[mode] for ms in (below, above))
        for mode in below
        if mode in above and mode != SERIAL
    }
    mode = max(speedups, key=speedups.__getitem__, default=None)
    if mode is None or speedups[mode] < 1 + MARGIN:
        return None
    return Choice(low, high, mode, speedups[mode])


def mode_at(choices: Sequence[Choice], num_requests: int, num_kv_tokens: int) -> str:
    """The mode of a step whose requests hold so many tokens together."""
    mean = num_kv_tokens / num_requests
    return next((choice.mode for choice in choices if choice.low <= mean <= choice.high), SERIAL)


def why(readings: Readings, choices: Sequence[Choice]) -> str:
    """The choices of one batch and their reason, in a line."""
    if choices:
        parts = [f"{c.mode} at {c.low}-{c.high} tokens ({c.speedup:.2f}x)" for c in choices]
        return f"{', '.join(parts)}, else serial"
    best = max(
        (
            (ms[SERIAL] / ms[mode], mode, context)
            for context, ms in readings.items()
            for mode in ms
            if mode != SERIAL
        ),
        default=None,
    )
    if best is None:
        return "serial: nothing was timed"
    speedup, mode, context = best
    return (
        f"serial: no split won by {MARGIN:.0%} at two contexts in a row; the best was {mode}, "
        f"{speedup:.2f}x at {context} tokens"
    )
