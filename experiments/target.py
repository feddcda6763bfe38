"""What an aim is: a figure of kernels.csv, or of engine.csv, and the bound it is to keep."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.engine_csv import EngineReading
from experiments.readings import Reading
from experiments.sheet import Sheet, best_peer

WHOLE_SHAPES = ("sample",)  # kernels whose cases differ by what comes behind the same words
PUBLISHED_STREAM_GB_S = 3163.0  # of the H100 on which the published times were taken


def ours(
    sheet: Sheet, kernel: str, shape: str, num_sms: int | None = None, partitioning: str = "none"
) -> Reading | None:
    """Our newest reading of the shape that begins with these words, or is they; of several shapes
    the shortest."""
    found = [
        r
        for r in sheet.readings
        if (r.kernel, r.impl, r.sms_asked, r.partitioning)
        == (kernel, "ours", num_sms, partitioning)
        and f"{r.shape} ".startswith(f"{shape} ")
        and (r.shape == shape or kernel not in WHOLE_SHAPES)
    ]
    # by number of SMs granted there may be several: those of a file are in its order
    return max(reversed(found), key=lambda r: (-len(r.shape), r.date), default=None)


def _of_its_run(other: Reading | None, r: Reading) -> Reading | None:
    """Another machine or commit says nothing of this one."""
    return other if other is not None and other.run == r.run else None


@dataclass(frozen=True, kw_only=True)
class Target:
    """One aim. A figure is at least `want`, or at most, where it counts what something costs."""

    kernel: str
    shape: str  # the first words of the reading's
    measure: str  # of MEASURES
    want: float
    is_beyond: bool = False  # hoped for, not promised
    num_sms: int | None = None
    partitioning: str = "none"
    beside: str = ""  # the shape, or the first letters of the peers, that it is held against
    published_us: float = 0.0  # of FlashInfer, on another H100

    @property
    def where(self) -> str:
        """The shape and the SMs, for a reader."""
        return self.shape + (f", {self.num_sms} SMs ({self.partitioning})" if self.num_sms else "")

    def reading(self, sheet: Sheet) -> Reading | None:
        """Ours, there."""
        return ours(sheet, self.kernel, self.shape, self.num_sms, self.partitioning)

    def figure(self, sheet: Sheet) -> float | None:
        """What was measured; None where a reading of it, or of its peers, is missing."""
        reading = self.reading(sheet)
        return None if reading is None else MEASURES[self.measure].figure(sheet, reading, self)

    def lacking(self, sheet: Sheet) -> str:
        """What is missing where there is no figure: ours, or what it is held against."""
        if self.reading(sheet) is None:
            return self.kernel
        other = "the whole GPU" if self.measure == "whole" else "the best peer"
        return f"{self.kernel} beside {self.beside or other}"

    def text(self, figure: float) -> str:
        return MEASURES[self.measure].text.format(figure, beside=self.beside or "the best peer")

    @property
    def bound(self) -> str:
        """What is wanted, for a reader."""
        way = "at most" if MEASURES[self.measure].is_cost else "at least"
        return f"{'beyond: ' * self.is_beyond}{way} {self.text(self.want)}"

    def holds(self, figure: float) -> bool:
        return figure <= self.want if MEASURES[self.measure].is_cost else figure >= self.want


@dataclass(frozen=True)
class Measure:
    """How a figure comes about, and how it reads."""

    text: str  # of its number
    figure: Callable[[Sheet, Reading, Target], float | None]
    is_cost: bool = False


def _share(sheet: Sheet, r: Reading, target: Target) -> float:
    return sheet.percent(r)


def _of_whole(sheet: Sheet, r: Reading, target: Target) -> float | None:
    whole = _of_its_run(ours(sheet, r.kernel, r.shape), r)
    return None if whole is None else 100 * whole.ms_p50 / r.ms_p50


def _beside_peer(sheet: Sheet, r: Reading, target: Target) -> float | None:
    best = best_peer(sheet, r, target.beside)
    return None if best is None else best.ms_p50 / r.ms_p50


def _beside_published(sheet: Sheet, r: Reading, target: Target) -> float:
    """As if the peer's time went with what a machine reads in a second."""
    scale = PUBLISHED_STREAM_GB_S / sheet.ceilings[r.run].gb_s["read stream"]
    return scale * target.published_us * 1e-3 / r.ms_p50


def _beside_shape(sheet: Sheet, r: Reading, target: Target) -> float | None:
    other = _of_its_run(ours(sheet, r.kernel, target.beside), r)
    return None if other is None else r.gb_s / other.gb_s


def _reads(sheet: Sheet, r: Reading, target: Target) -> float:
    return sheet.ceilings[r.run].gb_s["read stream"] / r.gb_s


MEASURES = {
    "share": Measure("{:.0f} % of the ceiling", _share),
    "whole": Measure("{:.0f} % of the whole GPU's speed", _of_whole),
    "peer": Measure("{:.2f}x {beside}", _beside_peer),
    "published": Measure("{:.2f}x FlashInfer's published time", _beside_published),
    "even": Measure("{:.2f}x of evenly spread", _beside_shape),
    "reads": Measure("{:.2f} reads of the logits", _reads, is_cost=True),
    "rate": Measure("{:.0f} TFLOP/s", lambda sheet, r, target: r.tflop_s),
}


@dataclass(frozen=True)
class EngineFigure:
    """What a run made of a workload."""

    tokens_s: float
    commit: str


@dataclass(frozen=True)
class EngineTarget:
    """Output tokens/s of the whole engine on one GPU; vllm: what vLLM 0.26.0 made of it."""

    model: str
    workload: str
    want: float
    vllm: float

    @property
    def where(self) -> str:
        """The model and the workload, for a reader."""
        return f"{self.model} {self.workload}"

    @property
    def bound(self) -> str:
        """What is wanted, for a reader."""
        return f"at least {self.want:,.0f} tokens/s (vLLM on an H100: {self.vllm:,.0f})"

    def figure(self, readings: Sequence[EngineReading], gpu: str) -> EngineFigure | None:
        """The median of the newest run on one such GPU with CUDA graphs; None where there is
        none."""
        wanted = (self.model, self.workload, "one", gpu)
        found = [
            r for r in readings if (r.model, r.workload, r.config, r.gpu) == wanted and not r.eager
        ]
        if not found:
            return None
        last = max(found, key=lambda r: r.date)
        median = statistics.median(r.output_tok_s for r in found if r.run == last.run)
        return EngineFigure(median, last.commit)
