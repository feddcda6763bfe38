"""In which order a decode step's stages are launched, on which stream, and what waits for what.

A step begins and ends on the stream that it is launched on (main). Between, each layer of each
micro-batch goes through the attention stage on one stream and the FFN stage on another: while one
micro-batch is in the one, the next may be in the other. Plain data: `pipeline` runs it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from engine.happens_before import Launch, find_races

Stage = Literal["main", "attention", "ffn"]
Operation = Literal["begin", "qkv", "attend", "o", "mlp", "end"]
STAGES: tuple[Stage, ...] = ("attention", "ffn")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The stage of each projection. Attention proper, which RoPE and the KV store go with, and the
    MLP name their stages; the projections beside them read weights, as the MLP does."""

    qkv: Stage = "attention"
    o: Stage = "ffn"

    def __post_init__(self) -> None:
        for name in ("qkv", "o"):
            if (stage := getattr(self, name)) not in STAGES:
                raise ValueError(f"{name} must be one of {', '.join(STAGES)}, got {stage!r}")

    def stage_of(self, operation: Operation) -> Stage:
        """Where one of a layer's operations runs."""
        stages: dict[Operation, Stage] = {"qkv": self.qkv, "o": self.o, "attend": "attention"}
        return stages.get(operation, "ffn")


@dataclass(frozen=True, kw_only=True)
class StageLaunch(Launch):
    """Operations that follow each other on one stream, of one micro-batch, or of all on main."""

    stream: Stage
    operations: tuple[tuple[Operation, int], ...]  # each with its layer; -1 where it has none
    micro_batch: int | None = None


# What an operation reads and what it writes: "{}" stands for each micro-batch's own. What it writes
# to read it again itself is named as written: nobody else may use it meanwhile.
BUFFERS: dict[Operation, tuple[str, str]] = {
    "begin": ("token_ids", "inputs step_token_ids block_table hidden{}"),  # behind an upload
    "qkv": ("hidden{}", "rstd{} qkv_workspace qkv{}"),
    "attend": ("qkv{} inputs block_table kv{layer}{}", "q{} kv{layer}{} workspace attention{}"),
    "o": ("attention{} hidden{}", "o_workspace hidden{}"),
    "mlp": ("hidden{}", "rstd{} act{} mlp_workspace hidden{}"),
    "end": ("inputs hidden{}", "normed logits sample_workspace sampled token_ids"),
}


def make_schedule(
    num_layers: int, num_micro_batches: int, placement: Placement
) -> tuple[StageLaunch, ...]:
    """The launches of a step in an order in which no event is waited for before it is recorded.

    Every wait is needed: without any of them `find_races` finds a race. ValueError where there is
    no layer or no micro-batch.
    """
    for name, value in (("num_layers", num_layers), ("num_micro_batches", num_micro_batches)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    schedule = tuple(_launches(num_layers, num_micro_batches, placement))
    races = find_races(schedule * 2)  # a step may follow before the host has seen the end of one
    assert not races, f"the schedule must order what shares a buffer: {races[:3]}"
    return schedule


def _launches(
    num_layers: int, num_micro_batches: int, placement: Placement
) -> Iterator[StageLaunch]:
    every = range(num_micro_batches)
    fork = 0
    yield _launch("main", (("begin", -1),), every, records=fork)
    event = fork
    behind = dict.fromkeys(every, fork)  # the event behind each micro-batch's newest launch
    for number, (stage, operations) in enumerate(_stages(num_layers, placement)):
        for i in every:
            # in the first stage the stream itself orders the others behind the fork
            waits = (behind[i],) if number or i == 0 else ()
            event += 1
            yield _launch(stage, operations, (i,), waits=waits, records=event)
            behind[i] = event
    # the last one's stream has all the others' last launches before it
    yield _launch("main", (("end", -1),), every, waits=(behind[every[-1]],))


def _stages(
    num_layers: int, placement: Placement
) -> list[tuple[Stage, tuple[tuple[Operation, int], ...]]]:
    """What a micro-batch goes through: runs of operations that one stage does."""
    layer_operations: tuple[Operation, ...] = ("qkv", "attend", "o", "mlp")
    every = [(operation, i) for i in range(num_layers) for operation in layer_operations]
    return [
        (stage, tuple(operations))
        for stage, operations in groupby(every, lambda pair: placement.stage_of(pair[0]))
    ]


def _launch(
    stage: Stage,
    operations: tuple[tuple[Operation, int], ...],
    micro_batches: Sequence[int],
    *,
    waits: tuple[int, ...] = (),
    records: int | None = None,
) -> StageLaunch:
    reads, writes = (
        frozenset(
            name.format(f"[{i}]", layer=layer)
            for operation, layer in operations
            for name in BUFFERS[operation][kind].split()
            for i in micro_batches
        )
        for kind in (0, 1)
    )
    micro_batch = None if stage == "main" else micro_batches[0]
    name = "+".join(op if layer < 0 else f"{op}{layer}" for op, layer in operations)
    return StageLaunch(
        name=name if micro_batch is None else f"{name} of {micro_batch}",
        stream=stage,
        operations=operations,
        micro_batch=micro_batch,
        waits=waits,
        records=records,
        reads=reads,
        writes=writes,
    )
