"""What decode_pipeline="auto" would choose in the cells of pipeline.csv, and what that would cost.

    python -m experiments.auto_rule [--csv experiments/results/pipeline.csv]

Every cell is taken as if the engine had been calibrated there: what it read of the serial graph and
of the best split of its newest run is what the rule is given. `lost` is by how much the chosen one
takes longer than the better of the two. Batches that arithmetic rules out at the contexts that
`auto` reads are serial, on GPUs whose rates are known here. Splits are those of the usual cut, in
two micro-batches.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from engine.device_rates import step_model
from engine.pipeline_choice import MARGIN, choose, contexts_up_to, mode_at
from engine.pipeline_stats import SERIAL
from engine.stage_schedule import Placement
from engine.step_model import Rates
from experiments.harness import RESULTS, table
from experiments.pipeline_figures import Cell, read_steps, regime_maps
from experiments.pipeline_map import MAP_CONTEXTS
from experiments.shapes import SHAPES
from green.partition import legal_splits
from models.config import ModelConfig

H100 = Rates(132, 3.02e9, 6.64e11, 6.34e7)  # as engine.device_rates has them of its clocks
RATES = {
    "NVIDIA H100 80GB HBM3": H100,
    "NVIDIA H200": replace(H100, bytes_per_ms=4.32e9),
}
CAPABILITY = (9, 0)
NUM_MICRO_BATCHES = 2


@dataclass(frozen=True)
class Verdict:
    """One cell: what the rule chooses beside the best that there is."""

    gpu: str
    model: str
    num_layers: int  # that were run
    batch: int
    context: int
    best_split: str
    speedup: float  # of it over the serial graph
    chosen: str
    lost: float  # share of time beyond the better of the two


def verdicts(rows: Iterable[Mapping[str, str]]) -> list[Verdict]:
    """Of every cell that has a split beside its serial graph; rows: of pipeline.csv."""
    maps = regime_maps([row for row in rows if is_usual(row)])
    return [
        _verdict(gpu, model, num_layers, *size, cell)
        for (gpu, model, num_layers), cells in maps.items()
        for size, cell in sorted(cells.items())
    ]


def is_usual(row: Mapping[str, str]) -> bool:
    """Serial, or on a split, cut as `auto` cuts."""
    usual = Placement()
    is_cut_so = (row["qkv_stage"], row["o_stage"]) == (usual.qkv, usual.o)
    is_split = row["attention_sms"] and row["num_micro_batches"] == str(NUM_MICRO_BATCHES)
    return is_cut_so and (row["mode"] == SERIAL or bool(is_split))


def _verdict(
    gpu: str, model: str, num_layers: int, batch: int, context: int, cell: Cell
) -> Verdict:
    ms = {SERIAL: 1.0, cell.mode: 1 / cell.speedup}
    is_ruled_out = gpu in RATES and not _could_win(RATES[gpu], model, batch, context)
    choices = () if is_ruled_out else choose({context: ms})
    chosen = mode_at(choices, batch, batch * context)
    lost = ms[chosen] / min(ms.values()) - 1
    size = (num_layers, batch, context)
    return Verdict(gpu, model, *size, cell.mode, cell.speedup, chosen, lost)


def _could_win(rates: Rates, model: str, batch: int, context: int) -> bool:
    """Whether `auto` would time the batch at this context whatever it reads at those beside it."""
    config = ModelConfig.from_dict(SHAPES[model])
    arithmetic = step_model(config, 2, rates, NUM_MICRO_BATCHES, Placement())
    splits = [s for s in legal_splits(rates.num_sms, CAPABILITY) if sum(s) == rates.num_sms]
    contexts = sorted({*contexts_up_to(max(MAP_CONTEXTS)), context})
    return bool(arithmetic.worth_timing(batch, contexts, splits)[context])


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each cell, then the worst of them."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--csv", type=Path, default=RESULTS / "pipeline.csv")
    found = verdicts(read_steps(p.parse_args(argv).csv))
    print(table([asdict(verdict) for verdict in found], list(Verdict.__dataclass_fields__)))
    num_pipelined = sum(verdict.chosen != SERIAL for verdict in found)
    worst = max((verdict.lost for verdict in found), default=0.0)
    print(
        f"{len(found)} cells, {num_pipelined} pipelined; {worst:.1%} lost at most, of which the "
        f"rule's margin is {MARGIN:.0%}"
    )


if __name__ == "__main__":
    main()
