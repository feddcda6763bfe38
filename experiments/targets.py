"""What was aimed for beside what kernels.csv holds: experiments/results/kernels.md.

    python -m experiments.targets [--csv experiments/results/kernels.csv] [--out .../kernels.md]

Every figure is a ratio to a ceiling or a peer of the same run on the same GPU, or a rate.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.harness import RESULTS
from experiments.readings import Reading, best_peers, read_csv
from experiments.sheet import Sheet


def ours(sheet: Sheet, kernel: str, shape: str, num_sms: int | None) -> Reading | None:
    """Our newest reading of the shape that begins so."""
    for r in sheet.readings:
        what = (r.kernel, r.impl, r.sms_asked)
        if what == (kernel, "ours", num_sms) and r.shape.startswith(shape):
            return r
    return None


def peer(sheet: Sheet, reading: Reading) -> Reading | None:
    """The fastest of the same run."""
    same_run = [r for r in sheet.readings if r.run == reading.run]
    return best_peers(same_run).get((reading.kernel, reading.shape, reading.dtype))


@dataclass(frozen=True, kw_only=True)
class Target:
    """One aim. A figure is at least `want`, or at most, where it counts what something costs."""

    kernel: str
    shape: str  # how the reading's begins
    measure: str  # of MEASURES
    want: float
    num_sms: int | None = None
    beside: str = ""  # the shape that it is held against, where there is one

    def figure(self, sheet: Sheet) -> float | None:
        """What was measured; None where a reading of it, or of its peers, is missing."""
        reading = ours(sheet, self.kernel, self.shape, self.num_sms)
        return None if reading is None else MEASURES[self.measure].figure(sheet, reading, self)

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
    whole = ours(sheet, r.kernel, r.shape, None)
    return None if whole is None else 100 * whole.ms_p50 / r.ms_p50


def _beside_peer(sheet: Sheet, r: Reading, target: Target) -> float | None:
    best = peer(sheet, r)
    return None if best is None else best.ms_p50 / r.ms_p50


def _beside_shape(sheet: Sheet, r: Reading, target: Target) -> float | None:
    other = ours(sheet, r.kernel, target.beside, None)
    return None if other is None else r.gb_s / other.gb_s


def _reads(sheet: Sheet, r: Reading, target: Target) -> float:
    return sheet.ceilings[r.run].gb_s["read stream"] / r.gb_s


MEASURES = {
    "share": Measure("{:.0f} % of the ceiling", _share),
    "whole": Measure("{:.0f} % of the whole GPU's speed", _of_whole),
    "peer": Measure("{:.2f}x the best peer", _beside_peer),
    "even": Measure("{:.2f}x of evenly spread", _beside_shape),
    "reads": Measure("{:.2f} reads of the logits", _reads, is_cost=True),
    "rate": Measure("{:.0f} TFLOP/s", lambda sheet, r, target: r.tflop_s),
}

_DECODE = (("B=1 context=4096 ", 0), ("B=8 context=2048 ", 0), ("B=32 context=1024 ", 0),
           ("B=64 context=4096 ", 92), ("B=256 context=1024 ", 92))  # fmt: skip
_MODELS = ("Qwen3-0.6B", "Qwen3-8B")


def targets() -> list[Target]:
    """In the order of the table."""
    decode, mlp = {"kernel": "decode_attention"}, {"kernel": "mlp"}
    found = [Target(**decode, shape=s, measure="share", want=w) for s, w in _DECODE if w]
    found += [Target(**decode, shape=s, measure="peer", want=1.0) for s, _ in _DECODE]
    found += [
        Target(**decode, shape=shape, measure="whole", want=want, num_sms=num_sms)
        for shape, _ in _DECODE[3:]
        for num_sms, want in ((56, 85), (72, 95), (48, 95))
    ]
    skewed = (
        ("B=64 context=1x32768+63x256 ", "B=64 context=764 "),
        ("B=64 context=uniform(1,8192) ", "B=64 context=42x4228+22x4227 "),
    )
    found += [
        Target(**decode, shape=s, measure="even", want=0.9, beside=even) for s, even in skewed
    ]
    found += [
        Target(kernel="prefill_attention", shape=shape, measure="rate", want=want)
        for shape, want in (("B=1 tokens=8192 ", 450), ("B=4 tokens=2048 ", 380))
    ]
    small, large = (1, 4, 16, 32, 64), (128, 256, 512, 1024, 2048, 8192)
    found += [Target(**mlp, shape=f"Qwen3-8B M={M} ", measure="share", want=85) for M in small]
    found += [
        Target(**mlp, shape=f"{model} M={M} ", measure="peer", want=1.15 if M in small else 0.97)
        for model in _MODELS
        for M in (*small, *large)
    ]
    found += [
        Target(kernel=kernel, shape="T=8192 " + more, measure="share", want=85)
        for kernel, more in (("add_rms_norm", "N=4096"), ("rope_store", "H=32 "))
    ]
    found += [
        Target(kernel="sample", shape=f"B=256 V=151936 {how}", measure="reads", want=1.5)
        for how in ("greedy", "temperature=0.6", "temperature=0.6 top_k=50")
    ]
    found += [
        Target(kernel=kernel, shape=shape, measure="share", want=92)
        for kernel in ("copy_blocks", "copy_blocks to peer")
        for shape in ("blocks=256 L=28", "blocks=1024 one layer")
    ]
    return found


def table(sheet: Sheet, aims: Sequence[Target]) -> str:
    """Markdown, a line for each target that was measured, then what was not."""
    lines = ["| kernel | shape | target | measured | holds |", "|---|---|---|---|---|"]
    missing = []
    for aim in aims:
        measure, figure = MEASURES[aim.measure], aim.figure(sheet)
        where = aim.shape.strip() + (f", {aim.num_sms} SMs" if aim.num_sms else "")
        if figure is None:
            missing.append(f"{aim.kernel} {where}")
            continue
        bound = "at most " if measure.is_cost else "at least "
        want, got = measure.text.format(aim.want), measure.text.format(figure)
        verdict = "yes" if aim.holds(figure) else "**no**"
        lines.append(f"| {aim.kernel} | {where} | {bound}{want} | {got} | {verdict} |")
    if missing:
        lines += ["", "Not measured: " + "; ".join(dict.fromkeys(missing)) + "."]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--csv", type=Path, default=RESULTS / "kernels.csv")
    p.add_argument("--out", type=Path, default=RESULTS / "kernels.md")
    args = p.parse_args(argv)
    readings = read_csv(args.csv)
    last = max(readings, key=lambda r: r.date)
    head = (
        f"# Kernels beside their targets\n\n{last.gpu}, torch {last.torch}, Triton {last.triton}, "
        f"driver {last.driver}, commit {last.commit}. Made by `python -m experiments.targets` from "
        "kernels.csv, which\n`python -m experiments.bench_kernels` writes. Medians of CUDA graph "
        "timing, buffers rotated past L2.\n\n"
    )
    args.out.write_text(head + table(Sheet.of(readings, last.gpu), targets()))


if __name__ == "__main__":
    main()
