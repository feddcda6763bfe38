"""Figures of kernels.csv: roofline, speed against SMs, percent of the ceiling beside the peers.

    python -m experiments.plot [--csv experiments/results/kernels.csv] [--out experiments/results]

Each is written as PNG and SVG. Of each kernel, impl, shape and number of SMs the newest run counts,
held against the ceilings of that same run; of several GPUs the one measured last, or --gpu.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness import RESULTS
from experiments.readings import BANDWIDTH, CEILING, Ceilings, Reading, newest, read_csv

COLORS = ("#0b6e4f", "#d1495b", "#edae49", "#30638e", "#7b5ea7", "#8d99ae", "#c06e52", "#3d3d3d")
MARKERS = "osD^vP*X"
# no dates and no random ids: the same CSV gives the same file
STYLE = {"svg.hashsalt": "greenlane", "svg.fonttype": "none", "font.size": 9}
NO_DATE = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}
BAR_INCHES = 0.17


@dataclass(frozen=True)
class Sheet:
    """What is drawn: the newest readings of one GPU, and every run's ceilings."""

    gpu: str
    readings: list[Reading]  # of kernels
    streams: list[Reading]  # read streams, by number of SMs
    ceilings: dict[tuple[str, str, str], Ceilings]  # by run
    roof: Ceilings  # of the newest run
    num_sms: int  # of the whole GPU

    @classmethod
    def of(cls, readings: Sequence[Reading], gpu: str | None = None) -> "Sheet":
        """ValueError where there is no reading of a kernel, or none of its run's ceilings."""
        chosen = _of_one_gpu(readings, gpu)
        ceilings = {}
        for run in {r.run for r in chosen}:
            try:
                ceilings[run] = Ceilings.of(r for r in chosen if r.run == run)
            except ValueError as error:
                raise ValueError(f"{error} (run of {run[1]}, commit {run[2]})") from None
        latest = newest(chosen)
        of_kernels = [r for r in latest if r.kernel != CEILING]
        if not of_kernels:
            raise ValueError(f"the CSV must hold kernels of {chosen[0].gpu}, got ceilings alone")
        return cls(
            gpu=chosen[0].gpu,
            readings=of_kernels,
            streams=[r for r in latest if r.impl == "read stream"],
            ceilings=ceilings,
            roof=ceilings[max(chosen, key=lambda r: r.date).run],
            num_sms=max(r.sms_granted for r in latest),
        )

    @property
    def title(self) -> str:
        """Hardware, commit and day."""
        commits = ", ".join(dict.fromkeys(r.commit for r in self.readings))
        days = sorted({r.date.split(" ")[0] for r in self.readings})
        span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        return f"{self.gpu}, commit {commits}, {span}"

    def percent(self, reading: Reading) -> float:
        """Percent of the ceiling of the reading's own run."""
        return self.ceilings[reading.run].percent(reading)

    @property
    def ours(self) -> list[Reading]:
        return [r for r in self.readings if r.impl == "ours" and r.sms_asked is None]


def _of_one_gpu(readings: Sequence[Reading], gpu: str | None) -> list[Reading]:
    if not readings:
        raise ValueError("the CSV must hold readings, got none")
    if gpu is None:
        name = max(readings, key=lambda r: r.date).gpu
    else:
        names = sorted({r.gpu for r in readings})
        matching = [name for name in names if gpu.lower() in name.lower()]
        if len(matching) != 1:
            raise ValueError(f"--gpu must name one of {names}, got {gpu!r}")
        name = matching[0]
    return [r for r in readings if r.gpu == name]


@dataclass(frozen=True)
class Point:
    """One kernel on one shape, in the roofline."""

    kernel: str
    label: str
    flop_per_byte: float
    tflop_s: float


def roofline_points(sheet: Sheet) -> list[Point]:
    """Ours on the whole GPU, where there are matrix products, by rising intensity."""
    points = [
        Point(r.kernel, f"{r.kernel}  {r.shape}", r.flops / r.bytes, r.tflop_s)
        for r in sheet.ours
        if r.flops
    ]
    return sorted(points, key=lambda p: (p.flop_per_byte, p.label))


def sm_curves(sheet: Sheet) -> dict[str, list[tuple[int, float]]]:
    """(SMs, percent of the speed on the whole GPU) by kernel and shape, where there are several."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for r in [*sheet.streams, *sheet.readings]:
        whole = _on_whole_gpu(sheet, r)
        if r.sms_asked is None or whole is None:
            continue
        confined = r.sms_granted < sheet.num_sms
        name = "read stream" if r.kernel == CEILING else f"{r.kernel}  {r.shape}"
        name += f"  {r.impl}" * (r.impl != "ours" and r.kernel != CEILING)
        name += "" if confined or r.kernel == CEILING else "  (grid only)"
        sms = r.sms_granted if confined else min(r.sms_asked, sheet.num_sms)
        curves.setdefault(name, [(sheet.num_sms, 100.0)])
        if sms < sheet.num_sms:
            curves[name].append((sms, 100 * whole.ms_p50 / r.ms_p50))
    return {name: sorted(points) for name, points in curves.items() if len(points) > 1}


def _on_whole_gpu(sheet: Sheet, r: Reading) -> Reading | None:
    what = (r.kernel, r.impl, r.shape, r.dtype)
    for other in [*sheet.streams, *sheet.readings]:
        if other.sms_asked is None and what == (
            other.kernel,
            other.impl,
            other.shape,
            other.dtype,
        ):
            return other
    return None


def percent_bars(sheet: Sheet) -> dict[str, dict[str, dict[str, float]]]:
    """Percent of the ceiling on the whole GPU: kernel -> shape -> impl, ours first."""
    bars: dict[str, dict[str, dict[str, float]]] = {}
    for r in sorted(sheet.readings, key=lambda r: (*_kernel_order(r.kernel), r.impl != "ours")):
        if r.sms_asked is None:
            shapes = bars.setdefault(r.kernel, {})
            shapes.setdefault(r.shape, {})[r.impl] = sheet.percent(r)
    return bars


def _kernel_order(kernel: str) -> tuple[int, str]:
    names = [*BANDWIDTH]
    return names.index(kernel) if kernel in names else len(names), kernel


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
        # to both sides in turn: neighbours along the roof lie close
        offset = (5, -9) if n % 2 else (-5, 5)
        side = "left" if n % 2 else "right"
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
    if not curves:
        return None
    fig = Figure(figsize=(11, 6 + 0.1 * len(curves)), layout="constrained")
    ax = fig.subplots()
    whole = sheet.num_sms
    ax.plot([0, whole], [0, 100], ":", color="#999999", label="in proportion to SMs")
    for n, (name, points) in enumerate(curves.items()):
        look = {"color": COLORS[n % len(COLORS)], "marker": MARKERS[n // 2 % len(MARKERS)]}
        if name == "read stream":
            look = {"color": "black", "linestyle": "--"}
        ax.plot(*zip(*points, strict=True), label=name, **look)
    ax.set(xlabel="SMs (num_sms)", ylabel="speed, % of the whole GPU's", xlim=(0, whole * 1.02))
    ax.set(ylim=(0, None), title=f"Speed against SMs\n{sheet.title}")
    ax.grid(alpha=0.25)
    fig.legend(loc="outside lower center", fontsize=8)
    return fig


def draw_percent(sheet: Sheet) -> Figure | None:
    """A panel for each kernel, a group of bars for each shape."""
    bars = percent_bars(sheet)
    if not bars:
        return None
    lines = [sum(len(impls) + 1 for impls in shapes.values()) for shapes in bars.values()]
    height = BAR_INCHES * sum(lines) + 0.7 * len(bars) + 1.2
    fig = Figure(figsize=(12, height), layout="constrained")
    axes = fig.subplots(len(bars), 1, squeeze=False, height_ratios=[n + 2 for n in lines])[:, 0]
    impls = list(dict.fromkeys(i for s in bars.values() for shape in s.values() for i in shape))
    impls.sort(key=lambda name: name != "ours")
    colors = {name: COLORS[n % len(COLORS)] for n, name in enumerate(impls)}
    for ax, (kernel, shapes) in zip(axes, bars.items(), strict=True):
        _draw_bars(ax, shapes, colors)
        stream = BANDWIDTH.get(kernel, "read stream")
        ax.set_title(f"{kernel}: of {stream} or matmul, whichever takes longer", loc="left")
    axes[-1].set_xlabel("% of the ceiling measured in the same run")
    fig.suptitle(f"Kernels and their peers against the machine\n{sheet.title}")
    return fig


def _draw_bars(ax: Axes, shapes: dict[str, dict[str, float]], colors: dict[str, str]) -> None:
    y, ticks, seen = 0, [], set()
    for impls in shapes.values():
        ticks.append(y + (len(impls) - 1) / 2)
        for impl, percent in impls.items():
            label = None if impl in seen else impl
            ax.barh(y, percent, height=0.9, color=colors[impl], label=label)
            ax.text(percent + 0.5, y, f"{percent:.1f}", va="center", size=7)
            seen.add(impl)
            y += 1
        y += 1
    ax.set_yticks(ticks, list(shapes), size=8)
    ax.axvline(100, color="#777777", linewidth=1)
    top = max(percent for impls in shapes.values() for percent in impls.values())
    ax.set(ylim=(y - 1, -1), xlim=(0, max(108, top * 1.08)))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)


FIGURES: dict[str, Callable[[Sheet], Figure | None]] = {
    "kernels_roofline": draw_roofline,
    "kernels_sms": draw_sms,
    "kernels_percent": draw_percent,
}


def write_figures(sheet: Sheet, folder: Path) -> list[Path]:
    """Every figure that the readings suffice for, as PNG and SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context(STYLE):
        for name, draw in FIGURES.items():
            figure = draw(sheet)
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
    args = p.parse_args(argv)
    try:
        sheet = Sheet.of(read_csv(args.csv), args.gpu)
    except ValueError as error:
        sys.exit(f"plot: {error}")
    for path in write_figures(sheet, args.out):
        print(path)


if __name__ == "__main__":
    main()
