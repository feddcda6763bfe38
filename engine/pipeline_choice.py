"""Which decode steps are pipelined, from times of both ways: the rule of decode_pipeline="auto".

Of one batch, times are read at several contexts. A step whose requests hold some number of tokens
between two of these takes, in each mode that was read at both, what a straight line between them
says. The fastest mode is taken; serial, unless a split is faster by MARGIN. Where no split was
read, and beyond REACH, a step is serial.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

from engine.pipeline_stats import SERIAL

Readings = Mapping[int, Mapping[str, float]]  # tokens a request holds -> mode -> ms of the step
Line = tuple[float, float]  # a value at the lower and one at the upper of two contexts

MARGIN = 0.01  # that a split must be faster by: what two readings scatter by against each other
# how many times as long a context may be as the longest that was read, and be judged by it: pools
# differ a little from start to start, and few requests hold more of one than many
REACH = 1.125
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Choice:
    """The mode of steps whose requests hold from low to high tokens on average."""

    low: float
    high: float
    mode: str
    speedup: float  # over serial, the most in between


def contexts_up_to(longest: int) -> tuple[int, ...]:
    """Where times are read, for requests of at most so many tokens, which is the last of them."""
    return (*(context for context in CONTEXTS if context < longest), longest)


def to_read(readings: Readings, could_win: Mapping[int, Sequence[str]]) -> dict[int, list[str]]:
    """Modes to read by context: where they could win, and next to where they were read to win,
    since what lies between two contexts is judged by the times at both. could_win: by this pool's
    contexts, of which some have none. A start with another pool may have read at others, which lie
    between these for `choose` too."""
    longest = max(could_win, default=0)
    contexts = sorted({*could_win, *readings})
    found = {c: list(could_win.get(c, ())) for c in contexts if c <= longest}
    for one, other in pairwise(contexts):
        for context, beside in ((one, other), (other, one)):
            if context in found:
                won = winners(readings.get(beside, {}))
                found[context] += [mode for mode in won if mode not in found[context]]
    return found


def winners(ms: Mapping[str, float]) -> list[str]:
    """Modes that are faster than serial by MARGIN and more."""
    return [mode for mode in ms if ms[SERIAL] >= (1 + MARGIN) * ms[mode]]


def not_read(readings: Readings, wanted: Mapping[int, Sequence[str]]) -> dict[int, list[str]]:
    """Modes that are wanted of a context and have no time there, where there are any. For the
    longest one, times from which REACH leads there will do, as long as it has none itself and needs
    none: `choose` goes on from the longest context that has any."""
    longest = max(wanted, default=0)
    missing = {}
    for context, modes in wanted.items():
        own = readings.get(context, {})
        near = [c for c in readings if context == longest and c * REACH >= longest]
        known = {mode for c in near for mode in readings[c]}
        if own or not known.issuperset(modes):
            known = set(own)
        missing[context] = [mode for mode in modes if mode not in known]
    return {context: modes for context, modes in missing.items() if modes}


def choose(readings: Readings) -> tuple[Choice, ...]:
    """Where to pipeline, by rising contexts. A context without times is one that cannot win."""
    points: list[tuple[float, Mapping[str, float]]] = sorted(readings.items())
    if points:
        longest, ms = points[-1]
        points.append((longest * REACH, ms))
    found: list[Choice] = []
    for (low, below), (high, above) in pairwise(points):
        for choice in _between((low, high), below, above):
            last = found[-1] if found else None
            if last is not None and (last.high, last.mode) == (choice.low, choice.mode):
                speedup = max(last.speedup, choice.speedup)
                found[-1] = replace(last, high=choice.high, speedup=speedup)
            else:
                found.append(choice)
    return tuple(found)


def _between(
    contexts: Line, below: Mapping[str, float], above: Mapping[str, float]
) -> Iterator[Choice]:
    """Choices between two contexts, from the times at both; their ends lie where lines cross."""
    lines = {mode: (below[mode], above[mode]) for mode in below if mode in above}
    if SERIAL not in lines:
        return
    serial = lines[SERIAL]
    lines[SERIAL] = (serial[0] / (1 + MARGIN), serial[1] / (1 + MARGIN))  # what a split must reach
    crossings = {x for pair in combinations(lines.values(), 2) for x in _crossing(*pair)}
    for ends in pairwise(sorted({0.0, 1.0} | crossings)):
        middle = sum(ends) / 2
        mode = min(lines, key=lambda mode: _at(lines[mode], middle))
        if mode != SERIAL:
            speedup = max(_at(serial, x) / _at(lines[mode], x) for x in ends)
            yield Choice(*(_at(contexts, x) for x in ends), mode, speedup)


def _at(line: Line, share: float) -> float:
    """Its value at this share of the way; at 0 and 1 to the bit."""
    return line[0] * (1 - share) + line[1] * share


def _crossing(one: Line, other: Line) -> Iterator[float]:
    """The share of the way at which they cross, if they do in between."""
    first, last = one[0] - other[0], one[1] - other[1]
    if first * last < 0:
        yield first / (first - last)


def mode_at(choices: Sequence[Choice], num_requests: int, num_kv_tokens: int) -> str:
    """The mode of a step whose requests hold so many tokens together."""
    mean = num_kv_tokens / num_requests
    return next((choice.mode for choice in choices if choice.low <= mean <= choice.high), SERIAL)


def why(readings: Readings, choices: Sequence[Choice]) -> str:
    """The choices of one batch and their reason, in a line."""
    if choices:
        parts = [
            f"{c.mode} at {c.low:.0f}-{c.high:.0f} tokens (up to {c.speedup:.2f}x)" for c in choices
        ]
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
    if speedup >= 1 + MARGIN:
        return (
            f"serial: {mode} won at {context} tokens ({speedup:.2f}x), but is not read beside that"
        )
    return (
        f"serial: no split won by {MARGIN:.0%}; the best was {mode}, {speedup:.2f}x at {context} "
        "tokens"
    )
