"""The hand-over of KV blocks from the prefill to the decode GPU: its speed, and what of it shows.

    python -m experiments.bench_handoff [--model Qwen3-0.6B Qwen3-8B] [--tokens 128 1024 8192]

For each prompt length, each kv_handoff (`slab`, whole blocks behind prefill; `push`, a group of
layers at a time) and each way (`kernel`, `copy_engine`; `staged` without peer access):

- copy_ms: of the blocks of one prompt, scattered over both pools, by the clock of the source, all
  launched before the first runs; bulk_ms: of one peer copy of as many bytes in one piece (torch's
  copy_), measured alike in the same run. The aim is 90 % of its speed, from 1024 tokens on.
- prefill_ms: what the prefill GPU took for one prompt alone; exposed_ms: for how long its blocks
  kept it from its first decode step behind that, as `LLM.stats` counts it. The aim is 2 %.

ready_ms, the sum of these two, says which hand-over is better for a length. The engine is one of
kv_handoff="auto", whose prefill launches are cut into groups of layers for both. A row for each
goes to experiments/results/handoff.csv as soon as it is measured.
"""

import argparse
import gc
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from engine.config import EngineConfig
from engine.handoff import DIRECT_WAY
from engine.pd_core import PUSH_TOKENS, PDCore
from experiments.handoff_timing import HandoffTimer
from experiments.harness import RESULTS, append_row, environment, table
from experiments.shapes import add_model_argument, checkpoint
from models.config import ModelConfig

LENGTHS = (128, 512, 1024, 4096, 8192)
MODES = ("slab", "push")
SHARE_AIM = 0.90  # of the bulk copy's speed, at least, from
AIM_TOKENS = 1024  # tokens on
EXPOSED_AIM = 0.02  # of prefill's time, at most


@dataclass(frozen=True, kw_only=True)
class HandoffReading:
    """One reading; the fields are the columns of handoff.csv, less the stamp of the run."""

    model: str
    tokens: int  # of the prompt
    mode: str  # kv_handoff
    way: str
    bytes: int
    copy_ms_p20: float
    copy_ms_p50: float
    copy_ms_p80: float
    bulk_ms_p20: float
    bulk_ms_p50: float
    bulk_ms_p80: float
    num_prompts: int  # one by one
    prefill_ms_p50: float
    exposed_ms_p50: float
    exposed_ms_p90: float

    @property
    def share(self) -> float:
        """Of the bulk copy's speed."""
        return self.bulk_ms_p50 / self.copy_ms_p50

    @property
    def exposed(self) -> float:
        """As a share of prefill's time."""
        return self.exposed_ms_p50 / self.prefill_ms_p50

    @property
    def ready_ms(self) -> float:
        """From the start of prefill until the first decode step may begin."""
        return self.prefill_ms_p50 + self.exposed_ms_p50

    @property
    def missed(self) -> list[str]:
        """The aims that it misses."""
        is_slow = self.tokens >= AIM_TOKENS and self.share < SHARE_AIM
        return ["share"] * is_slow + ["exposed"] * (self.exposed > EXPOSED_AIM)

    def cells(self) -> dict[str, Any]:
        """Its line of the table."""
        return {
            "tokens": self.tokens,
            "handoff": f"{self.mode}, {self.way}",
            "MB": self.bytes / 1e6,
            "GB/s": self.bytes / self.copy_ms_p50 / 1e6,
            "bulk GB/s": self.bytes / self.bulk_ms_p50 / 1e6,
            "share": f"{self.share:.0%}",
            "prefill ms": self.prefill_ms_p50,
            "exposed ms": self.exposed_ms_p50,
            "of prefill": f"{self.exposed:.1%}",
            "ready ms": self.ready_ms,
            "aims": "missed: " + ", ".join(self.missed) if self.missed else "hold",
        }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each model, append the rows as they come, print a table of each."""
    args = _parse(argv)
    stamp = environment(args.device)
    for model in args.model:
        readings: list[HandoffReading] = []
        try:
            for reading in measure(model, args):
                readings.append(reading)
                append_row(args.out, asdict(reading) | stamp)
        finally:  # a way that fails takes nothing from what was read before
            report(readings, stamp["gpu"])
        free_memory(args.device)


def report(readings: Sequence[HandoffReading], gpu: str) -> None:
    """Print a table by length, and what is best."""
    if readings:
        print(f"{readings[0].model}, {gpu}")
        cells = [reading.cells() for reading in sorted(readings, key=lambda r: r.tokens)]
        print(table(cells, list(cells[0])))
        print(best_of(readings), flush=True)


def free_memory(device: str) -> None:
    """Give back what an engine has left that nobody refers to any more. Its pool would be cut up
    for the weights of the next one otherwise, and never be free again as a whole."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_argument(p)
    p.add_argument("--tokens", nargs="+", type=int, default=LENGTHS)
    p.add_argument("--prompts", type=int, default=8, help="of each length, one by one")
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    p.add_argument("--out", type=Path, default=RESULTS / "handoff.csv")
    args = p.parse_args(argv)
    if args.device == "cuda" and torch.cuda.device_count() < 2:
        p.error(f"--device cuda must have 2 GPUs, got {torch.cuda.device_count()}")
    if min(*args.tokens, args.prompts) < 1:
        p.error(f"--tokens and --prompts must be positive, got {args.tokens} and {args.prompts}")
    return args


def measure(model: str, args: argparse.Namespace) -> Iterator[HandoffReading]:
    """Readings, one way behind the other."""
    with tempfile.TemporaryDirectory() as temporary:
        core, kernels = _core(checkpoint(model, Path(temporary)), args.device, max(args.tokens))
    timer = HandoffTimer(core, kernels)
    bulks = {num_tokens: timer.bulk(num_tokens) for num_tokens in args.tokens}
    for way, num_tokens, mode in itertools.product(timer.ways, args.tokens, MODES):
        copies = timer.copies(num_tokens, mode, way)
        prompts = timer.prompts(num_tokens, mode, way, args.prompts)
        times = {f"copy_ms_{name}": ms for name, ms in asdict(copies).items()}
        times |= {f"bulk_ms_{name}": ms for name, ms in asdict(bulks[num_tokens]).items()}
        times |= asdict(prompts)
        yield HandoffReading(
            model=Path(model).name,
            tokens=num_tokens,
            mode=mode,
            way=way,
            bytes=timer.num_bytes(num_tokens),
            num_prompts=args.prompts,
            **{name: round(ms, 4) for name, ms in times.items()},
        )
    core.drain()


def _core(folder: Path, device: str, num_tokens: int) -> tuple[PDCore, str]:
    """An engine for prompts of num_tokens at most, one launch each; and the kernels it runs on."""
    config = EngineConfig.from_options(
        folder,
        device=device,
        load_format="dummy",
        enable_two_gpu_pd=True,
        enable_prefix_caching=False,
        max_num_seqs=8,  # few graphs: one request decodes at a time
        max_num_batched_tokens=num_tokens,
        max_model_len=num_tokens + 16,
    )
    devices = config.resolve_two_devices()
    core = PDCore(config, ModelConfig.from_folder(folder), folder, *map(torch.device, devices))
    return core, config.resolve_kernels(devices[0])


def best_of(readings: Sequence[HandoffReading]) -> str:
    """By length, which hand-over lets decode begin first; and what the engine takes."""
    best = []
    for tokens in dict.fromkeys(r.tokens for r in readings):
        r = min((r for r in readings if r.tokens == tokens), key=lambda r: r.ready_ms)
        best.append(f"{tokens}: {r.mode}, {r.way}")
    threshold = PUSH_TOKENS["auto"]
    taken = f"the engine's auto pushes from {threshold} tokens on, by {DIRECT_WAY}"
    return f"soonest ready: {'; '.join(best)} ({taken})"


if __name__ == "__main__":
    main()
