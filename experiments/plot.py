"""Figures of kernels.csv: roofline, speed against SMs and on partitions, percent of the ceiling.

    python -m experiments.plot [--csv experiments/results/kernels.csv] [--out experiments/results]
    python -m experiments.plot --pipeline [--out experiments/results]

Each is written as PNG and SVG. Of each kernel, impl, shape and number of SMs the newest run counts,
held against the ceilings of that same run; of several GPUs the one measured last, or --gpu. Names
of files carry the GPU where it is not the H100: kernels_roofline_h200.png.
--pipeline: where decode in two stages wins and loses, and its stages against SMs, from pipeline.csv
and pipeline_stages.csv.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness import RESULTS
from experiments.pipeline_figures import draw_maps, draw_stages, read_stages, read_steps
from experiments.readings import BANDWIDTH, CEILING, Ceilings, read_csv
from experiments.sheet import (
    Curve,
    Sheet,
    partition_ratios,
    percent_bars,
    roofline_points,
    sm_curves,
)

COLORS = ("#0b6e4f", "#d1495b", "#edae49", "#30638e", "#7b5ea7", "#8d99ae", "#c06e52", "#3d3d3d")
MARKERS = "osD^vP*X"
# no dates and no random ids: the same CSV gives the same file
STYLE = {"svg.hashsalt": "greenlane", "svg.fonttype": "none", "font.size": 9}
NO_DATE = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}
# one after the other: neighbours along the roof lie close
LABEL_PLACES = (((6, -9), "left"), ((-6, 5), "right"), ((7, 3), "left"), ((-6, -9), "right"))


def draw_roofline(sheet: Sheet) -> Figure | None:
    """Points carry numbers; the key beside them says whose they are."""
    points = roofline_points(sheet)
    if not points:
        return None
    fig = Figure(figsize=(15, max(6.5, 0.17 * len(points) + 1)), layout="constrained")
    ax, key = fig.subplots(1, 2, width_ratios=[3, 2])
    low, high = 0.5 * points[0].flop_per_byte, 2 * points[-1].flop_per_byte
    high = max(high, 4e3 * sheet.roof.tflop_s / sheet.roof.gb_s["read stream"])
    for name, dash in (("read stream", "-"), ("copy", "--")):
        _draw_roof(ax, name, sheet.roof, low, high, dash)
    kernels = list(dict.fromkeys(p.kernel for p in points))
    for n, p in enumerate(points, 1):
        look = kernels.index(p.kernel)
        style = {"color": COLORS[look % len(COLORS)], "marker": MARKERS[look % len(MARKERS)]}
        first = next(q for q in points if q.kernel == p.kernel) is p
        label = p.kernel if first else None
        ax.plot(p.flop_per_byte, p.tflop_s, linestyle="none", label=label, **style)
        offset, side = LABEL_PLACES[n % len(LABEL_PLACES)]
        ax.annotate(
            str(n), (p.flop_per_byte, p.tflop_s), offset, textcoords="offset points", ha=side
        )
    ax.set(xscale="log", yscale="log", xlim=(low, high), xlabel="arithmetic intensity, FLOP/byte")
    ax.set(ylabel="TFLOP/s", title=f"Roofline of our kernels\n{sheet.title}")
    ax.grid(which="both", alpha=0.25)
    ax.legend(loc="upper left")
    key.axis("off")
    text = "\n".join(f"{n:3d}  {p.label}: {p.tflop_s:.3g}" for n, p in enumerate(points, 1))
    key.text(0, 1, f" no  kernel  shape: TFLOP/s\n{text}", va="top", family="monospace", size=8)
    return fig


def _draw_roof(ax: Axes, name: str, roof: Ceilings, low: float, high: float, dash: str) -> None:
    gb_s = roof.gb_s[name]
    ridge = roof.tflop_s / gb_s * 1e3
    xs = [low, ridge, high] if low < ridge < high else [low, high]
    ys = [min(roof.tflop_s, x * gb_s / 1e3) for x in xs]
    label = f"{name} {gb_s:.0f} GB/s, matmul {roof.tflop_s:.0f} TFLOP/s"
    ax.plot(xs, ys, dash, color="#777777", linewidth=1.2, label=label)


def draw_sms(sheet: Sheet) -> Figure | None:
    """A kernel that a partition does not slow stays at 100."""
    curves = sm_curves(sheet)
    streams, kernels = curves.pop(CEILING, []), list(curves)
    if not kernels:
        return None
    fig = Figure(figsize=(7.5 * len(kernels), 8), layout="constrained")
    for ax, kernel in zip(fig.subplots(1, len(kernels), squeeze=False)[0], kernels, strict=True):
        _draw_curves(ax, streams, curves[kernel], sheet.num_sms)
        ax.set_title(f"{kernel}: num_sms alone (dashed), green context (solid)", loc="left")
    fig.suptitle(f"Speed against SMs\n{sheet.title}")
    return fig


def _draw_curves(ax: Axes, streams: list[Curve], curves: list[Curve], num_sms: int) -> None:
    ax.plot([0, num_sms], [0, 100], ":", color="#999999", label="in proportion to SMs")
    shapes = list(dict.fromkeys(curve.shape for curve in curves))
    looks = {
        shape: {"color": COLORS[n % len(COLORS)], "marker": MARKERS[n % len(MARKERS)]}
        for n, shape in enumerate(shapes)
    }
    named: set[str] = set()
    for curve in [*streams, *curves]:
        look = looks.get(curve.shape, {"color": "black"})
        label = None if curve.shape in named else curve.shape  # its two lines share a look
        named.add(curve.shape)
        dash = "--" if curve.partitioning == "grid" else "-"
        ax.plot(*zip(*curve.points, strict=True), dash, label=label, **look)
    ax.set(xlabel="SMs", ylabel="speed, % of the whole GPU's", xlim=(0, num_sms * 1.02))
    ax.set(ylim=(0, None))
    ax.grid(alpha=0.25)
    ax.legend(loc="upper left", bbox_to_anchor=(0, -0.12), fontsize=8, borderaxespad=0)


def draw_partitions(sheet: Sheet) -> Figure | None:
    """Right of the line ours is ahead."""
    ratios = partition_ratios(sheet)
    if not ratios:
        return None
    fig = Figure(figsize=(12, 1.6 + 0.24 * len(ratios)), layout="constrained")
    ax = fig.subplots()
    labels, values = zip(*ratios, strict=True)
    ax.barh(range(len(values)), values, color=COLORS[0], alpha=0.8)
    for y, value in enumerate(values):
        ax.text(value, y, f" {value:.2f}", va="center", size=7.5)
    ax.set_yticks(range(len(labels)), labels, size=8)
    ax.axvline(1, color="#777777", linewidth=1)
    ax.set(ylim=(len(labels) - 0.5, -0.5), xlabel="times as fast as the best peer there")
    ax.set_title(f"Kernels and their peers on the same green context\n{sheet.title}")
    return fig


def draw_percent(sheet: Sheet) -> Figure | None:
    """A panel for each kernel, a line for each shape: ours as a bar, the peers as marks on it."""
    bars = percent_bars(sheet)
    if not bars:
        return None
    columns = _columns(bars)
    height = max(sum(_inches(bars[kernel]) for kernel in column) for column in columns)
    fig = Figure(figsize=(10 * len(columns), height + 1.2), layout="constrained")
    names = dict.fromkeys(i for s in bars.values() for impls in s.values() for i in impls)
    peers = [name for name in names if name != "ours"]
    looks = {"ours": {"color": COLORS[0]}} | {
        name: {"color": COLORS[1 + n % (len(COLORS) - 1)], "marker": MARKERS[n % len(MARKERS)]}
        for n, name in enumerate(peers)
    }
    for part, column in zip(
        fig.subfigures(1, len(columns), squeeze=False)[0], columns, strict=True
    ):
        ratios = [_inches(bars[kernel]) for kernel in column]
        axes = part.subplots(len(column), 1, squeeze=False, height_ratios=ratios)[:, 0]
        for ax, kernel in zip(axes, column, strict=True):
            _draw_bars(ax, bars[kernel], looks)
            stream = BANDWIDTH.get(kernel, "read stream")
            ax.set_title(f"{kernel}  (ceiling: {stream}, or matmul where it binds)", loc="left")
        axes[-1].set_xlabel("% of the ceiling measured in the same run")
    fig.suptitle(f"Kernels and their peers against the machine\n{sheet.title}")
    return fig


def _inches(shapes: dict[str, dict[str, float]]) -> float:
    return 0.7 + 0.2 * len(shapes)


def _columns(bars: dict[str, dict[str, dict[str, float]]]) -> list[list[str]]:
    """The kernels in their order, cut in two where the halves come out most alike."""
    kernels = list(bars)
    if sum(_inches(shapes) for shapes in bars.values()) < 8 or len(kernels) == 1:
        return [kernels]
    heights = [_inches(bars[kernel]) for kernel in kernels]
    cuts = range(1, len(kernels))
    cut = min(cuts, key=lambda n: abs(sum(heights[:n]) - sum(heights[n:])))
    return [kernels[:cut], kernels[cut:]]


def _draw_bars(
    ax: Axes, shapes: dict[str, dict[str, float]], looks: dict[str, dict[str, str]]
) -> None:
    for name, look in looks.items():
        values = {y: impls[name] for y, impls in enumerate(shapes.values()) if name in impls}
        if not values:
            continue
        if name == "ours":
            ax.barh(list(values), list(values.values()), height=0.75, label=name, alpha=0.8, **look)
        else:
            ax.plot(
                list(values.values()),
                list(values),
                linestyle="none",
                label=name,
                mec="white",
                **look,
            )
    top = max(percent for impls in shapes.values() for percent in impls.values())
    end = max(104.0, 1.04 * top)
    for y, impls in enumerate(shapes.values()):
        if "ours" in impls:  # at the right edge: beside its bar it would hide a peer
            ax.text(1.01 * end, y, f"{impls['ours']:.1f}", va="center", size=7.5)
    ax.set_yticks(range(len(shapes)), list(shapes), size=8)
    ax.axvline(100, color="#777777", linewidth=1)
    ax.set(ylim=(len(shapes) - 0.5, -0.5), xlim=(0, end))
    ax.legend(loc="upper left", bbox_to_anchor=(1.09, 1), fontsize=8, borderaxespad=0)


FIGURES: dict[str, Callable[[Sheet], Figure | None]] = {
    "kernels_roofline": draw_roofline,
    "kernels_sms": draw_sms,
    "kernels_partitions": draw_partitions,
    "kernels_percent": draw_percent,
}


PIPELINE_FIGURES = {
    "pipeline.csv": (read_steps, ("pipeline_map", draw_maps)),
    "pipeline_stages.csv": (read_stages, ("pipeline_stages", draw_stages)),
}


def write_figures(sheet: Sheet, folder: Path) -> list[Path]:
    """Every figure that the readings suffice for, as PNG and SVG."""
    with matplotlib.rc_context(STYLE):
        return _write({name + sheet.suffix: draw(sheet) for name, draw in FIGURES.items()}, folder)


def write_pipeline_figures(source: Path, folder: Path) -> list[Path]:
    """The same of the pipeline's CSVs in a folder. ValueError where neither is there."""
    found = {
        name: (read(source / name), draws)
        for name, (read, draws) in PIPELINE_FIGURES.items()
        if (source / name).exists()
    }
    if not found:
        raise ValueError(f"{source} must hold one of {', '.join(PIPELINE_FIGURES)}, got none")
    with matplotlib.rc_context(STYLE):
        figures = {name: draw(rows) for rows, (name, draw) in found.values()}
        return _write(figures, folder)


def _write(figures: dict[str, Figure | None], folder: Path) -> list[Path]:
    """Each in both forms, with the style that is set; None: a line says that it is skipped."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        if figure is None:
            print(f"skipped {name}: the CSV holds no readings for it")
            continue
        for kind, metadata in NO_DATE.items():
            paths.append(folder / f"{name}.{kind}")
            figure.savefig(paths[-1], dpi=120, metadata=metadata)
    return paths


def main(argv: Sequence[str] | None = None) -> None:
    """Draw, and print what was written; one line and status 1 where there is nothing to draw."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--csv", type=Path, default=RESULTS / "kernels.csv")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of the figures")
    p.add_argument("--gpu", help="part of a GPU's name, where the CSV holds several")
    p.add_argument("--pipeline", action="store_true", help="of pipeline*.csv beside --csv instead")
    args = p.parse_args(argv)
    try:
        if args.pipeline:
            paths = write_pipeline_figures(args.csv.parent, args.out)
        else:
            paths = write_figures(Sheet.of(read_csv(args.csv), args.gpu), args.out)
    except ValueError as error:
        sys.exit(f"plot: {error}")
    for path in paths:
        print(path)


if __name__ == "__main__":
    main()
