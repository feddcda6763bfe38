"""Tiles of matrix products found by measurement: tiles.json, by GPU, kernel, shape, partition.

`python -m experiments.tune` writes it. What it does not hold is left to each launcher's heuristic;
nothing is tuned while serving.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch

from kernels.tile import Tile, next_power_of_2

TILES_PATH = Path(__file__).with_name("tiles.json")


@dataclass(frozen=True, order=True)
class TileKey:
    """Where a tile was found best."""

    gpu: str  # as torch names it
    kernel: str  # the launcher's name
    shape: str  # the bucket that the launcher makes of its arguments
    num_sms: int  # of the partition; 0: the whole GPU


def matmul_shape(num_tokens: int, width: int, depth: int, has_residual: bool) -> str:
    """Bucket of a product [num_tokens, depth] x [depth, width]: tokens up to a power of two."""
    residual = " residual" if has_residual else ""
    return f"M={next_power_of_2(num_tokens)} N={width} K={depth}{residual}"


def read_tiles(path: Path = TILES_PATH) -> dict[TileKey, Tile]:
    """The file's choices. ValueError naming the file and the entry where one is damaged."""
    try:
        entries = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    tiles = {}
    for entry in entries:
        try:
            tile = Tile(**entry["tile"])
            key = TileKey(**{name: entry[name] for name in TileKey.__dataclass_fields__})
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} must hold tiles by key, got {entry}: {error!r}") from None
        tiles[key] = tile
    return tiles


def write_tiles(tiles: Mapping[TileKey, Tile], path: Path = TILES_PATH) -> None:
    """One line per choice, sorted, so that a change reads as one."""
    lines = [json.dumps(asdict(key) | {"tile": asdict(tiles[key])}) for key in sorted(tiles)]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n")


@lru_cache(maxsize=4096)
def tuned_tile(kernel: str, shape: str, num_sms: int | None, device: torch.device) -> Tile | None:
    """The tile for this launch, or None where nothing was measured."""
    if device.type != "cuda":
        return None
    gpu = torch.cuda.get_device_name(device)
    return _tiles().get(TileKey(gpu, kernel, shape, num_sms or 0))


@lru_cache(maxsize=1)
def _tiles() -> dict[TileKey, Tile]:
    return read_tiles()
