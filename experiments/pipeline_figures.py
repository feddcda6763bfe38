"""Figures of the decode pipeline: where it wins and loses, and its stages against SMs.

Times of a few layers stand for a whole model's, in a map of their own: what a step does around its
layers counts once, but what the pipeline takes to fill and drain as often as these layers go into
the model. Of two micro-batches over 6 layers that is a thirteenth of the step, over 36 a 73rd. The
deepest map of a model is drawn.

In rows up to f9a597c the serial step was read first behind a pause, from which a GPU at its power
limit takes two seconds to recover. Where its readings scatter, what is in doubt goes to it: its p20
counts.
"""

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from engine.pipeline_stats import SERIAL
from engine.stage_schedule import STAGES, Placement
from engine.stage_streams import InOrder
from experiments.bench_pipeline import Row as StepRow
from experiments.harness import read_rows
from experiments.pipeline_map import whole_map
from experiments.shapes import SHAPES, STAND_INS
from experiments.stage_curves import Row as StageRow

STAMP = ["date", "gpu", "torch", "triton", "driver", "commit"]
NOT_A_PIPELINE = (SERIAL, InOrder.name)
LOOKS = {"attention": "#30638e", "ffn": "#d1495b"}
LEAST, MOST = 0.6, 1.4  # of the colours
EVEN = 0.01  # by which readings scatter
SETTLED = 0.03  # between p20 and p80 of the serial step, if its clocks were steady
DARK = 0.72  # speed-up below which they are
MODES = (
    "of the fastest mode: SMs for attention:FFN, or two plain streams that share all SMs "
    "(plain 64:68: in grids of so many)"
)

CsvRow = Mapping[str, str]
Place = tuple[str, str, int]  # GPU, model, layers that were run


@dataclass(frozen=True)
class Cell:
    """The best that a pipeline did of one batch and context."""

    speedup: float  # over the serial graph
    mode: str


def read_steps(path: Path) -> list[dict[str, str]]:
    """Rows of pipeline.csv. ValueError where it is none, or holds no row."""
    return _some(read_rows(path, [*StepRow.__dataclass_fields__, *STAMP]), path)


def read_stages(path: Path) -> list[dict[str, str]]:
    """Rows of pipeline_stages.csv. ValueError where it is none, or holds no row."""
    return _some(read_rows(path, [*StageRow.__dataclass_fields__, *STAMP]), path)


def _some(rows: list[dict[str, str]], path: Path) -> list[dict[str, str]]:
    if not rows:
        raise ValueError(f"{path} must hold rows, got a header alone")
    return rows


def regime_maps(rows: Iterable[CsvRow]) -> dict[Place, dict[tuple[int, int], Cell]]:
    """By place, by batch and context: the best mode of the newest commit that measured the
    cell, of whatever cut. Of a mode the newest row counts, beside the serial row that it follows;
    one that follows none is left out."""
    serial_ms: dict[tuple[str, ...], float] = {}
    modes: dict[Place, dict[tuple[int, int], tuple[str, dict[str, float]]]] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        columns = ("gpu", "model", "num_layers", "batch", "context", "qkv_stage", "o_stage")
        columns += ("commit",)
        run = tuple(row[column] for column in columns)
        if row["mode"] == SERIAL:
            serial_ms[run] = _whole_ms(row, _serial_column(row))
        elif row["mode"] not in NOT_A_PIPELINE and run in serial_ms:
            cell = (int(row["batch"]), int(row["context"]))
            cells = modes.setdefault((row["gpu"], row["model"], int(row["num_layers"])), {})
            if cell not in cells or cells[cell][0] != row["commit"]:
                cells[cell] = (row["commit"], {})
            cells[cell][1][_name(row)] = serial_ms[run] / _whole_ms(row)
    return {
        place: {cell: _best(found) for cell, (_, found) in cells.items()}
        for place, cells in sorted(modes.items())
    }


def _best(speedups: Mapping[str, float]) -> Cell:
    mode = max(speedups, key=speedups.__getitem__)
    return Cell(speedups[mode], mode)


def _name(row: CsvRow) -> str:
    """The mode, and how the step is cut where that is not as usual."""
    names = [row["mode"]]
    if row["num_micro_batches"] not in ("", "2"):
        names.append(f"in {row['num_micro_batches']}")
    usual = Placement()
    for operation, stage in (("qkv", usual.qkv), ("o", usual.o)):
        if row[f"{operation}_stage"] not in ("", stage):
            names.append(f"{operation} in {row[f'{operation}_stage']}")
    return ", ".join(names)


def _serial_column(row: CsvRow) -> str:
    """That counts: no split wins by a serial step that swings."""
    if row["ms_p20"] and float(row["ms_p80"]) > (1 + SETTLED) * float(row["ms_p20"]):
        return "ms_p20"
    return "ms_p50"


def _whole_ms(row: CsvRow, column: str = "ms_p50") -> float:
    """Of a step of the whole model."""
    ends_ms, num_layers = float(row["ends_ms"]), int(row["num_layers"])
    share = all_layers(row["model"], num_layers) / num_layers
    return ends_ms + (float(row[column]) - ends_ms) * share


def all_layers(model: str, otherwise: int) -> int:
    """Layers of a model; of one that is not known here, otherwise."""
    return SHAPES.get(model, {}).get("num_hidden_layers", otherwise)


def _bias(model: str, num_layers: int) -> str:
    """What is to be known of times that few layers stand for. Two micro-batches take as long as
    2n + 1 stages over n layers at the least, where stages are of equal length."""
    num_all = all_layers(model, num_layers)
    if num_layers >= num_all:
        return ""
    too_low = 1 - (1 + 0.5 / num_all) / (1 + 0.5 / num_layers)
    return f" from {num_layers} layers (up to {too_low:.0%} too low)"


def deepest(maps: Mapping[int, Sized]) -> int:
    """Of maps of one model, by the layers that were run: the most of which there are half as many
    cells as of any."""
    most = max(map(len, maps.values()))
    return max(num_layers for num_layers, cells in maps.items() if 2 * len(cells) >= most)


def drawn_maps(rows: Iterable[CsvRow]) -> dict[Place, dict[tuple[int, int], Cell]]:
    """Of each GPU and model that stands for none, the deepest map, without cells between."""
    on_map = frozenset(whole_map())
    by_depth: dict[tuple[str, str], dict[int, dict[tuple[int, int], Cell]]] = {}
    for (gpu, model, num_layers), cells in regime_maps(rows).items():
        kept = {cell: best for cell, best in cells.items() if cell in on_map}
        if kept and model not in STAND_INS:
            by_depth.setdefault((gpu, model), {})[num_layers] = kept
    drawn = {}
    for (gpu, model), maps in by_depth.items():
        num_layers = deepest(maps)
        drawn[gpu, model, num_layers] = maps[num_layers]
    return drawn


def draw_maps(rows: Sequence[CsvRow]) -> Figure | None:
    """Green wins, red loses; the number is what the best mode reached, whichever it is. A row for
    each GPU, a column for each model, the same batches and contexts in all."""
    maps = drawn_maps(rows)
    if not maps:
        return None
    batches, contexts = (
        sorted({cell[i] for cells in maps.values() for cell in cells}) for i in (0, 1)
    )
    fig, places = _grid([place[:2] for place in maps], (6.2, 5.4))
    for ((gpu, model, num_layers), cells), ax in zip(maps.items(), places, strict=True):
        _draw_map(ax, cells, batches, contexts)
        won = sum(cell.speedup > 1 + EVEN for cell in cells.values())
        what = f"{model}{_bias(model, num_layers)}"
        ax.set_title(f"{what} on {gpu}\nfaster in {won} of {len(cells)} cells", loc="left", size=9)
    drawn = [row for row in rows if (row["gpu"], row["model"], int(row["num_layers"])) in maps]
    fig.suptitle(f"Decode in two stages: speed-up over the serial graph\n{MODES}\n{_title(drawn)}")
    return fig


def _grid(
    panels: Iterable[tuple[Any, ...]], inches: tuple[float, float], **shared: str
) -> tuple[Figure, list[Axes]]:
    """A figure with a place for each panel, of the GPU that it begins with in a row and of what
    else it is of in a column; what no panel is for stays empty. inches: of a place."""
    panels = list(panels)
    gpus, kinds = sorted({p[0] for p in panels}), sorted({p[1:] for p in panels})
    size = (inches[0] * len(kinds), inches[1] * len(gpus) + 0.6)
    fig = Figure(figsize=size, layout="constrained")
    axes = fig.subplots(len(gpus), len(kinds), squeeze=False, **shared)
    for ax in axes.flat:
        ax.set_axis_off()
    places = [axes[gpus.index(p[0]), kinds.index(p[1:])] for p in panels]
    for ax in places:
        ax.set_axis_on()
        ax.tick_params(labelbottom=True, labelleft=True)  # a shared axis has them at its end alone
    return fig, places


def _draw_map(
    ax: Axes,
    cells: Mapping[tuple[int, int], Cell],
    batches: Sequence[int],
    contexts: Sequence[int],
) -> None:
    nan = float("nan")
    values = [[cells.get((b, c), Cell(nan, "")).speedup for c in contexts] for b in batches]
    norm = TwoSlopeNorm(1.0, LEAST, MOST)
    ax.set_facecolor("#dddddd")  # not measured
    ax.imshow(values, cmap="RdYlGn", norm=norm, origin="lower", aspect="auto")
    for y, batch in enumerate(batches):
        for x, context in enumerate(contexts):
            if (cell := cells.get((batch, context))) is not None:
                verdict = " loses" if cell.speedup < 1 - EVEN else ""
                text = f"{cell.speedup:.2f}x{verdict}\n{cell.mode}"
                weight = "bold" if cell.speedup > 1 + EVEN else "normal"
                color = "white" if cell.speedup < DARK else "black"
                look = {"size": 7.5, "weight": weight, "color": color}
                ax.text(x, y, text, ha="center", va="center", **look)
            else:
                ax.text(x, y, "not measured", ha="center", va="center", size=7, color="#777777")
    ax.set_xticks(range(len(contexts)), [str(c) for c in contexts])
    ax.set_yticks(range(len(batches)), [str(b) for b in batches])
    ax.set(xlabel="context, tokens of each request", ylabel="batch, requests")


Line = list[tuple[int, float]]  # (SMs, ms)


def stage_lines(
    rows: Iterable[CsvRow],
) -> dict[tuple[str, str, int, int], dict[tuple[str, bool], Line]]:
    """By GPU, model, batch and context, by stage and whether the other runs beside it: of the
    newest commit that measured the cell, since a line drawn through two would be of neither."""
    newest: dict[tuple[str, str, int, int], tuple[str, dict[tuple[str, bool], dict]]] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        cell = (row["gpu"], row["model"], int(row["batch"]), int(row["context"]))
        if cell not in newest or newest[cell][0] != row["commit"]:
            newest[cell] = (row["commit"], {})
        line = newest[cell][1].setdefault((row["stage"], bool(row["beside_sms"])), {})
        line[int(row["sms"])] = float(row["ms_p50"])
    return {
        cell: {kind: sorted(points.items()) for kind, points in lines.items()}
        for cell, (_, lines) in sorted(newest.items())
    }


def draw_stages(rows: Sequence[CsvRow]) -> Figure | None:
    """Alone solid, beside the other stage on the rest of the SMs dashed. A row for each GPU, a
    column for each model, batch and context, all GPUs of it to one scale."""
    cells = stage_lines(rows)
    if not cells:
        return None
    fig, places = _grid(cells, (6, 4.9), sharex="col", sharey="col")
    for ((gpu, model, batch, context), lines), ax in zip(cells.items(), places, strict=True):
        _draw_lines(ax, lines)
        ax.set_title(f"{model}, {batch} requests x {context} tokens\n{gpu}", loc="left", size=9)
    fig.suptitle(f"Stages of a micro-batch against SMs\n{_title(rows)}")
    return fig


def _draw_lines(ax: Axes, lines: Mapping[tuple[str, bool], Line]) -> None:
    for stage in STAGES:
        for is_beside in (False, True):
            if points := lines.get((stage, is_beside)):
                label = f"{stage}, {'beside the other' if is_beside else 'alone'}"
                dash = "o--" if is_beside else "o-"
                ax.plot(*zip(*points, strict=True), dash, label=label, color=LOOKS[stage])
    ax.set(xlabel="SMs of the stage", ylabel="ms a layer", yscale="log")
    for set_formatter in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
        set_formatter(lambda ms, _: f"{ms:g}")
    ax.grid(which="both", alpha=0.25)
    ax.legend(fontsize=8)


def _title(rows: Sequence[CsvRow]) -> str:
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    days = sorted({row["date"][:10] for row in rows})
    return f"commit {commits}, {days[0]}" + (f" to {days[-1]}" if len(days) > 1 else "")
