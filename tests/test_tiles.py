"""tiles.json: what was found best, and who reads it."""

import json
from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kernels
from kernels import Tile, tiles
from kernels.tiles import TileKey, matmul_shape, read_tiles, tuned_tile, write_tiles
from tests.strategies import randn

keys = st.builds(
    TileKey,
    gpu=st.sampled_from(["NVIDIA H100 80GB HBM3", "NVIDIA H200"]),
    kernel=st.sampled_from(["linear", "gate_up"]),
    shape=st.builds(matmul_shape, st.integers(1, 9000), st.just(64), st.just(96), st.booleans()),
    num_sms=st.sampled_from([0, 64]),
)
some_tiles = st.builds(Tile, BLOCK_M=st.just(16), BLOCK_N=st.just(32), BLOCK_K=st.integers(1, 64))


@given(found=st.dictionaries(keys, some_tiles))
def test_a_file_reads_as_it_was_written(found, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiles") / "tiles.json"
    write_tiles(found, path)
    assert read_tiles(path) == found
    lines = path.read_text().splitlines()
    assert len(lines) == (len(found) + 2 if found else 1)  # a line each, for a readable diff


def test_the_file_of_the_project_reads():
    for tile in read_tiles().values():
        assert tile.num_warps in (1, 2, 4, 8, 16)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[{", "must be JSON"),
        (json.dumps([{"gpu": "a", "kernel": "b", "shape": "c", "num_sms": 0}]), "'tile'"),
        (json.dumps([{"kernel": "b", "tile": {"BLOCK_M": 1}}]), "must hold tiles by key"),
        (json.dumps([{"tile": {"BLOCK_X": 1}}]), "BLOCK_X"),
    ],
)
def test_a_damaged_file_is_named(text, said, tmp_path):
    path = tmp_path / "tiles.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        read_tiles(path)
    assert str(path) in str(caught.value)


@given(st.integers(1, 1 << 20))
def test_tokens_fall_into_powers_of_two(num_tokens):
    bucket = int(matmul_shape(num_tokens, 8, 8, False).split()[0].removeprefix("M="))
    assert bucket / 2 < num_tokens <= bucket and bucket & (bucket - 1) == 0


@pytest.fixture
def h100(monkeypatch):
    """A table of one entry, on a machine that says it has the GPU for it."""
    key = TileKey("NVIDIA H100 80GB HBM3", "linear", matmul_shape(16, 8, 24, False), 64)
    tile = Tile(BLOCK_M=16, BLOCK_N=16, BLOCK_K=32)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: key.gpu)
    monkeypatch.setattr(tiles, "_tiles", lambda: {key: tile})
    tuned_tile.cache_clear()
    yield tile
    tuned_tile.cache_clear()


def test_a_tile_is_found_on_its_gpu_shape_and_partition_alone(h100):
    cuda = torch.device("cuda:0")
    assert tuned_tile("linear", matmul_shape(9, 8, 24, False), 64, cuda) == h100
    assert tuned_tile("linear", matmul_shape(8, 8, 24, False), 64, cuda) is None
    assert tuned_tile("linear", matmul_shape(9, 8, 24, True), 64, cuda) is None
    assert tuned_tile("linear", matmul_shape(9, 8, 24, False), None, cuda) is None
    assert tuned_tile("gate_up", matmul_shape(9, 8, 24, False), 64, cuda) is None
    assert tuned_tile("linear", matmul_shape(9, 8, 24, False), 64, torch.device("cpu")) is None


def test_a_launcher_takes_the_tile_that_was_found(monkeypatch):
    """Asked for by the launch's own arguments; None leaves it to the heuristic."""
    asked = []

    def found(kernel, shape, num_sms, device):
        asked.append((kernel, shape, num_sms))
        return Tile(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16) if kernel == "gate_up" else None

    # by import_module: the package exports a function of that name
    monkeypatch.setattr(import_module("kernels.linear"), "tuned_tile", found)
    x, gate_up, down = randn(0, (3, 32), (32, 32), (32, 16), dtype=torch.float16)
    kernels.mlp(x, gate_up, down, 1e-6, num_sms=2)
    assert asked == [
        ("gate_up", "M=4 N=16 K=32", 2),
        ("linear", "M=4 N=32 K=16 residual", 2),
    ]
