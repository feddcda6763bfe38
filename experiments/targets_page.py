"""The text of kernels.md: by GPU, every aim beside what was measured, and what was not."""

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.engine_csv import EngineReading
from experiments.readings import Reading
from experiments.sheet import HOME_GPU, Sheet
from experiments.target import EngineTarget, Target

HEAD = """# Kernels beside their targets

Made by `python -m experiments.targets` from engine.csv and kernels.csv, which
`python -m experiments.bench_kernels` writes. Medians of CUDA graph timing, buffers rotated past L2;
a bulk copy to the peer is launched from Python. "Beyond" was hoped for, not promised.
(green): both sides on a green context of so many SMs; (grid): the launch told of them alone.
FlashInfer's published times are of another H100, scaled by what the two read in a second; vLLM's
tokens/s are of one too, and were not measured from here. Ours of small shapes overlap the call
before, as they do in an engine (dependent launch); what peers do not start early cannot.
The aims were set for an H100: on another GPU ratios to ceilings and peers of the same run compare,
while absolute rates (TFLOP/s, tokens/s, FlashInfer's published times) are not expected to carry
over. Of several versions or commits the newest run's comes first.
"""
COLUMNS = ("kernel", "shape", "target", "measured", "holds")
STAMP = {"torch": "torch", "triton": "Triton", "driver": "driver", "commit": "commit"}
FEW = 6  # names of what was not measured, before they are counted


@dataclass(frozen=True, kw_only=True)
class Line:
    """One aim and what came of it."""

    kernel: str
    where: str
    bound: str
    measured: str = ""  # empty: it was not
    holds: bool = False
    commit: str = ""
    lacking: str = ""  # what there is no reading of, where it was not measured


def page(
    readings: Sequence[Reading],
    aims: Sequence[Target],
    engine_aims: Sequence[EngineTarget],
    engine_readings: Sequence[EngineReading],
) -> str:
    """Markdown, a section for each GPU of the kernels' readings, the one of the aims first."""
    text = HEAD
    for gpu in sorted({r.gpu for r in readings}, key=lambda gpu: (gpu != HOME_GPU, gpu)):
        sheet = Sheet.of([r for r in readings if r.gpu == gpu])
        lines = kernel_lines(sheet, aims) + engine_lines(gpu, engine_aims, engine_readings)
        text += f"\n## {gpu}\n\n{_stamp(sheet.readings)}\n\n{table(lines)}"
    return text


def _stamp(readings: Sequence[Reading]) -> str:
    """Software and commits that the readings are of, those of the newest run first."""
    newest_first = sorted(readings, key=lambda r: r.date, reverse=True)
    parts = []
    for column, name in STAMP.items():
        values = dict.fromkeys(getattr(r, column) for r in newest_first)
        parts.append(f"{name} {', '.join(values)}")
    return "; ".join(parts) + "."


def kernel_lines(sheet: Sheet, aims: Sequence[Target]) -> list[Line]:
    """A line for each aim; its commit is that of our reading."""
    lines = []
    for aim in aims:
        known = {"kernel": aim.kernel, "where": aim.where, "bound": aim.bound}
        reading, figure = aim.reading(sheet), aim.figure(sheet)
        if reading is None or figure is None:
            lines.append(Line(**known, lacking=aim.lacking(sheet)))
            continue
        found = {"measured": aim.text(figure), "holds": aim.holds(figure)}
        lines.append(Line(**known, **found, commit=reading.commit))
    return lines


def engine_lines(
    gpu: str, aims: Sequence[EngineTarget], readings: Sequence[EngineReading]
) -> list[Line]:
    """The same for the whole engine on one such GPU."""
    lines = []
    for aim in aims:
        known = {"kernel": "engine", "where": aim.where, "bound": aim.bound}
        figure = aim.figure(readings, gpu)
        if figure is None:
            lines.append(Line(**known, lacking="engine"))
            continue
        found = {"measured": f"{figure.tokens_s:,.0f} tokens/s", "commit": figure.commit}
        lines.append(Line(**known, **found, holds=figure.tokens_s >= aim.want))
    return lines


def table(lines: Sequence[Line]) -> str:
    """Markdown, a row for each line that was measured, then what was not. Rows say their commit
    where they are of several."""
    measured = [line for line in lines if line.measured]
    columns = COLUMNS + ("commit",) * (len({line.commit for line in measured}) > 1)
    text = f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"
    for line in measured:
        verdict = "yes" if line.holds else "**no**"
        cells = (line.kernel, line.where, line.bound, line.measured, verdict, line.commit)
        text += f"| {' | '.join(cells[: len(columns)])} |\n"
    return text + _not_measured(lines)


def _not_measured(lines: Sequence[Line]) -> str:
    """By kernel and by what it lacks; kernels without any reading by their names alone."""
    absent = {line.kernel: None for line in lines if line.lacking == line.kernel}
    for line in lines:
        if line.lacking != line.kernel:
            absent.pop(line.kernel, None)
    places: dict[str, dict[str, None]] = {}
    for line in lines:
        if line.lacking and line.kernel not in absent:
            places.setdefault(line.lacking, {})[line.where] = None
    items = [f"{what}: {_few(list(wheres))}" for what, wheres in places.items()]
    if absent:
        items.append(f"nothing of {', '.join(absent)}")
    return "\nNot measured:\n" * bool(items) + "".join(f"- {item}\n" for item in items)


def _few(names: Sequence[str]) -> str:
    more = len(names) - FEW
    return "; ".join(names[:FEW]) + (f"; and {more} more" if more > 0 else "")
