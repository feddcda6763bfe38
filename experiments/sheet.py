"""What the figures of kernels.csv show, as numbers. Knows nothing of how it is drawn."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.readings import BANDWIDTH, CEILING, Ceilings, Reading, best_peers, newest

HOME_GPU = "NVIDIA H100 80GB HBM3"  # the aims were set for it, and it is drawn without its name


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
        # one that was cut off behind its ceilings, or among them, has no figure to be held to them
        for run in {r.run for r in chosen if r.kernel != CEILING}:
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
            roof=ceilings[max(of_kernels, key=lambda r: r.date).run],
            num_sms=max(r.sms_granted for r in latest),
        )

    @property
    def title(self) -> str:
        """Hardware, commit and day."""
        commits = ", ".join(dict.fromkeys(r.commit for r in self.readings))
        days = sorted({r.date.split(" ")[0] for r in self.readings})
        span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        return f"{self.gpu}, commit {commits}, {span}"

    @property
    def suffix(self) -> str:
        """What a file's name has of the GPU, so that no other's figures are overwritten."""
        if self.gpu == HOME_GPU:
            return ""
        words = re.findall("[a-z0-9]+", self.gpu.lower().removeprefix("nvidia "))
        return "_" + "_".join(words)

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


@dataclass(frozen=True)
class Curve:
    """One kernel on one shape, over SMs."""

    shape: str  # or which stream
    partitioning: str  # as in a Reading
    points: list[tuple[int, float]]  # (SMs, percent of the speed on the whole GPU)


def sm_curves(sheet: Sheet) -> dict[str, list[Curve]]:
    """Of ours and of the read stream, by kernel, where there are several numbers of SMs."""
    points: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for r in [*sheet.streams, *sheet.readings]:
        whole = _on_whole_gpu(sheet, r)
        if r.partitioning == "none" or r.impl not in ("ours", "read stream") or whole is None:
            continue
        sms = r.sms_asked if r.partitioning == "grid" else r.sms_granted
        if sms < sheet.num_sms:
            name = r.impl if r.kernel == CEILING else r.shape
            found = points.setdefault((r.kernel, name, r.partitioning), [(sheet.num_sms, 100.0)])
            found.append((sms, 100 * whole.ms_p50 / r.ms_p50))
    curves: dict[str, list[Curve]] = {}
    for (kernel, shape, partitioning), found in points.items():
        curves.setdefault(kernel, []).append(Curve(shape, partitioning, sorted(found)))
    return curves


def _on_whole_gpu(sheet: Sheet, r: Reading) -> Reading | None:
    same = (
        other
        for other in [*sheet.streams, *sheet.readings]
        if (other.run, other.kernel, other.impl, other.shape, other.dtype, other.partitioning)
        == (r.run, r.kernel, r.impl, r.shape, r.dtype, "none")
    )
    return next(same, None)


def best_peer(sheet: Sheet, reading: Reading, name: str = "") -> Reading | None:
    """The fastest peer of the same run at the same place, among those whose name begins so."""
    rows = [r for r in sheet.readings if r.run == reading.run and r.impl.startswith(name)]
    return best_peers(rows).get(reading.where)


def partition_ratios(sheet: Sheet) -> list[tuple[str, float]]:
    """(what and where, times as fast as the best peer) on the same green context."""
    found = []
    for r in sheet.readings:
        peer = best_peer(sheet, r) if r.impl == "ours" and r.partitioning == "green" else None
        if peer is not None:
            label = f"{r.kernel}  {r.shape}  on {r.sms_granted} SMs, beside {peer.impl}"
            found.append((label, peer.ms_p50 / r.ms_p50))
    return found


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
