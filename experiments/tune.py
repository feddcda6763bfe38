"""Find the best tile of each launch and write it to kernels/tiles.json.

    python -m experiments.tune --model Qwen3-8B --tokens 1 16 64 256 2048 --num-sms 0 64 96
        [--sustained 1]

Every candidate is checked against the reference and timed as `experiments.timing` does, beside the
launcher's own heuristic in the same run, with a workspace, so that tiles may be shared. An entry
serves a bucket of tokens, such as 129 to 256: a tile is written where it is faster by more than the
spread of two readings at two thirds of the bucket's tokens and at all of them. An entry that is not
worth it any more is dropped. --sustained reads every tile for so many seconds without a pause: at
the power limit, where most products of many tokens are, a tile is as fast as it is sparing.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from tqdm import tqdm
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

import kernels
from experiments.dense_cases import top_of_buffer
from experiments.energy import sustain
from experiments.harness import table
from experiments.kernel_case import BOUND, Draw, row_error
from experiments.shapes import SHAPES
from experiments.timing import Effort, Run, capture, copies_for, time_calls
from kernels import Tile, reference
from kernels.tall_matmul import has_form
from kernels.tall_plan import DEEP_STAGES, MAX_STAGES, TALL_BLOCK_M, ring_tile
from kernels.tile import next_power_of_2
from kernels.tiles import TILES_PATH, TileKey, matmul_shape, read_tiles, write_tiles

EPS = 1e-6
WORTH = 0.02  # of the heuristic's time: two readings of one tile differ by about that
QUICK = Effort(graph_ms=1.0, reading_ms=20.0)
GRAPH_MS = 10.0  # of the calls that a sustained reading replays
# what launching a tile raises that is of another kernel's form, or too large for the GPU
UNFIT = (CompilationError, OutOfResources, PTXASError, RuntimeError, ValueError)

# (tile, ms) of each that runs; the first is None, the launcher's heuristic
Readings = list[tuple[Tile | None, float]]


@dataclass(frozen=True, kw_only=True)
class Product:
    """One matrix product of a layer: what it is, and who launches it."""

    kernel: str  # linear | gate_up
    num_tokens: int
    width: int
    depth: int
    has_residual: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> str:
        return matmul_shape(self.num_tokens, self.width, self.depth, self.has_residual)

    @property
    def rows(self) -> int:
        """Rows of the weight: gate and up where there are both."""
        return self.width * (2 if self.kernel == "gate_up" else 1)

    @property
    def bytes(self) -> int:
        """Weights, x and out, each moved once."""
        elements = self.rows * self.depth + self.num_tokens * (self.depth + self.width)
        return elements * self.dtype.itemsize

    @property
    def flops(self) -> int:
        return 2 * self.num_tokens * self.rows * self.depth

    def ends(self) -> list["Product"]:
        """This product at two thirds of its bucket's tokens and at all of them."""
        most = next_power_of_2(self.num_tokens)
        few = max(most * 2 // 3, most // 2 + 1)
        return [replace(self, num_tokens=n) for n in dict.fromkeys((few, most))]

    def build(
        self, device: torch.device, num_sms: int | None
    ) -> tuple[Callable[[int, Tile | None], Tensor], Tensor, int]:
        """(run(copy, tile) -> out, what copy 0 is to give, copies to rotate over)."""
        copies = copies_for(self.rows * self.depth * self.dtype.itemsize)
        draw = Draw(device, self.dtype)
        x = [top_of_buffer(draw, self.num_tokens, self.depth) for _ in range(copies)]
        w = [draw.randn(self.rows, self.depth, std=self.depth**-0.5) for _ in range(copies)]
        residual = draw.randn(self.num_tokens, self.width) if self.has_residual else None
        out = draw.empty(self.num_tokens, self.width)
        rstd = draw.empty(self.num_tokens, dtype=torch.float32)
        workspace = kernels.matmul_workspace(device)
        extra: dict[str, Any] = {"rms_eps": EPS}
        if self.kernel == "linear":
            extra = {"residual": residual} if self.has_residual else {"rms_eps": EPS}
        launcher, twin = getattr(kernels, self.kernel), getattr(reference, self.kernel)

        options = extra | {"rstd": rstd, "workspace": workspace, "num_sms": num_sms}

        def run(copy: int, tile: Tile | None) -> Tensor:
            return launcher(x[copy], w[copy], **options, out=out, tile=tile)

        return run, twin(x[0], w[0], **extra), copies


def products(model: str, num_tokens: int) -> list[Product]:
    """The products of a layer and the LM head at so many tokens."""
    c = SHAPES[model]
    hidden, width = c["hidden_size"], c["intermediate_size"]
    q = c["num_attention_heads"] * c["head_dim"]
    kv = c["num_key_value_heads"] * c["head_dim"]
    plain = [
        Product(kernel="linear", num_tokens=num_tokens, width=q + 2 * kv, depth=hidden),
        Product(kernel="linear", num_tokens=num_tokens, width=hidden, depth=q, has_residual=True),
        Product(
            kernel="linear", num_tokens=num_tokens, width=hidden, depth=width, has_residual=True
        ),
        Product(kernel="linear", num_tokens=num_tokens, width=c["vocab_size"], depth=hidden),
    ]
    return [*plain, Product(kernel="gate_up", num_tokens=num_tokens, width=width, depth=hidden)]


def candidates(num_tokens: int) -> list[Tile]:
    """Tiles worth trying; those that do not fit a kernel or a GPU fail, and are passed over."""
    if num_tokens > TALL_BLOCK_M:
        return _rings([1, 2], [64, 128], [32, 64, 96, 128, 192, 256], [MAX_STAGES])
    if num_tokens == 1:
        return _grid([1], [2, 4, 8], [512, 1024, 2048], [2, 4, 8], [2, 4])
    rows = max(16, next_power_of_2(num_tokens))
    thin = _grid([rows], [16, 32, 64], [64, 128, 256], [2, 4], [3, 4, 5, 6])
    flat = _rings([1], [TALL_BLOCK_M], [32, 64, 96, 128], [MAX_STAGES, DEEP_STAGES])
    return list(dict.fromkeys(thin + flat))


def _grid(*sizes: list[int]) -> list[Tile]:
    """Every tile of these BLOCK_M, BLOCK_N, BLOCK_K, warps and stages."""
    return [
        Tile(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in itertools.product(*sizes)
    ]


def _rings(*sizes: list[int]) -> list[Tile]:
    """Every tile of `tall_matmul` of these consumers, rows, columns and most stages."""
    tiles = []
    for gated, c, rows, n, stages in itertools.product([False, True], *sizes):
        tile = ring_tile(c, rows, n, gated=gated, max_stages=stages)
        if has_form(tile, gated=gated):
            tiles.append(tile)
    return list(dict.fromkeys(tiles))


def sweep(
    product: Product,
    tiles: Iterable[Tile],
    device: torch.device,
    num_sms: int | None,
    seconds: float = 0.0,
) -> Readings:
    """Readings of the heuristic and of every tile that runs, of so many seconds each or, for 0, of
    some milliseconds. AssertionError: one is wrong."""
    run, expected, copies = product.build(device, num_sms)

    def ms_of(tile: Tile | None) -> float:
        run(0, tile).fill_(float("nan"))
        error = row_error(run(0, tile), expected)
        if not error <= BOUND[product.dtype]:
            raise AssertionError(f"{tile} must be within {BOUND[product.dtype]:.2g}, got {error}")
        return read_ms(lambda i: run(i, tile), copies, device, seconds)

    # tiles.json, which may hold what was found before, is not what a tile has to beat
    with patch.object(import_module("kernels.linear"), "tuned_tile", lambda *launch: None):
        readings: Readings = [(None, ms_of(None))]
    for tile in tiles:
        try:
            readings.append((tile, ms_of(tile)))
        except UNFIT:
            continue
    return readings


def read_ms(run: Run, copies: int, device: torch.device, seconds: float) -> float:
    """Milliseconds of a call; see `sweep`."""
    ms = time_calls(run, copies, device, QUICK).p50
    if not seconds:
        return ms
    stream = torch.cuda.Stream(device)
    calls = copies * math.ceil(GRAPH_MS / (ms * copies))
    with torch.cuda.device(device), torch.cuda.stream(stream):
        graph = capture(run, copies, calls, stream)
        return sustain(graph.replay, ms * calls, device, calls=calls, seconds=seconds).ms


def sweep_bucket(
    product: Product,
    tiles: Sequence[Tile],
    device: torch.device,
    num_sms: int | None,
    seconds: float = 0.0,
) -> list[Readings]:
    """A sweep at each end of the product's bucket of tokens, all of them last."""
    return [sweep(end, tiles, device, num_sms, seconds) for end in product.ends()]


def winner(sweeps: Sequence[Readings]) -> Tile | None:
    """The tile that gains most where it gains least, or None where the heuristic is as good in one
    of the sweeps."""
    times = [dict(readings) for readings in sweeps]

    def share(tile: Tile | None) -> float:
        return max(ms.get(tile, math.inf) / ms[None] for ms in times)

    best = min(times[-1], key=share)
    return best if share(best) < 1 - WORTH else None


def key_of(product: Product, num_sms: int | None, device: torch.device) -> TileKey:
    """Where tiles.json keeps the tile of this launch."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return TileKey(gpu, product.kernel, product.shape, num_sms or 0)


def tune(
    found: dict[TileKey, Tile],
    todo: Sequence[tuple[Product, int]],
    device: torch.device,
    tiles_of: Callable[[int], list[Tile]] = candidates,
    seconds: float = 0.0,
) -> list[dict[str, Any]]:
    """Measure each (product, num_sms) and change `found` by what came out; returns a row each, with
    the times at all of the bucket's tokens. seconds: see `sweep`."""
    rows = []
    for product, num_sms in tqdm(todo, desc="tiles", disable=None):
        key = key_of(product, num_sms, device)
        found.pop(key, None)
        tiles = tiles_of(product.num_tokens)
        sweeps = sweep_bucket(product, tiles, device, num_sms or None, seconds)
        tile = winner(sweeps)
        if tile is not None:
            found[key] = tile
        rows.append(
            {
                "kernel": key.kernel,
                "shape": key.shape,
                "sms": num_sms,
                "heuristic_us": sweeps[-1][0][1] * 1e3,
                "best_us": min(ms for _, ms in sweeps[-1]) * 1e3,
                "tile": short(tile),
            }
        )
    return rows


def short(tile: Tile | None) -> str:
    """A tile in few words."""
    if tile is None:
        return "heuristic"
    sizes = f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}"
    return f"{sizes} {tile.num_warps} warps {tile.num_stages} stages"


def main(argv: Sequence[str] | None = None) -> None:
    """Tune the products of each model; print what was found and write the file."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--model", nargs="+", default=["Qwen3-0.6B", "Qwen3-8B"], choices=SHAPES)
    p.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 256, 2048])
    p.add_argument("--num-sms", nargs="+", type=int, default=[0], help="0: the whole GPU")
    p.add_argument("--sustained", type=float, default=0.0, metavar="SECONDS")
    p.add_argument("--device", default="cuda:0")
    p.add_argument("--tiles", type=Path, default=TILES_PATH)
    args = p.parse_args(argv)
    if args.sustained and torch.device(args.device).type != "cuda":
        p.error(f"--sustained needs a GPU, got --device {args.device}")
    todo = [
        (product, num_sms)
        for model in args.model
        for tokens in args.tokens
        for product in products(model, tokens)
        for num_sms in args.num_sms
    ]
    found = read_tiles(args.tiles) if args.tiles.exists() else {}
    rows = tune(found, todo, torch.device(args.device), seconds=args.sustained)
    write_tiles(found, args.tiles)
    print(table(rows, list(rows[0])))


if __name__ == "__main__":
    main()
