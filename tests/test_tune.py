"""Tuning: the fastest right tile is kept, and only where it is worth it."""

import pytest
import torch

from experiments import tune
from experiments.timing import Times
from experiments.tune import Product, candidates, products, sweep, winner
from kernels import Tile
from kernels.tiles import TileKey, read_tiles
from tests.strategies import DEVICE

device = torch.device(DEVICE)
HEURISTIC = Tile(BLOCK_M=16, BLOCK_N=64, BLOCK_K=32)
SMALL, LARGE = (Tile(BLOCK_M=16, BLOCK_N=n, BLOCK_K=32, num_stages=2) for n in (16, 32))
toy = Product(kernel="linear", num_tokens=3, width=40, depth=64, dtype=torch.float16)


@pytest.fixture
def clock(monkeypatch):
    """Timing as told: milliseconds by BLOCK_N; the calls are made all the same."""
    ms = {}

    def time_calls(run, copies, device, effort):
        tile = next(
            cell.cell_contents for cell in run.__closure__ if type(cell.cell_contents) is Tile
        )
        run(0)
        return Times(*[ms[tile.BLOCK_N]] * 3)

    monkeypatch.setattr(tune, "time_calls", time_calls)
    monkeypatch.setattr(tune, "copies_for", lambda num_bytes: 2)
    monkeypatch.setattr(Product, "heuristic", lambda product, num_sms: HEURISTIC)
    return ms


@pytest.mark.parametrize("kernel", ["linear", "gate_up"])
def test_the_fastest_tile_is_found(clock, kernel):
    clock.update({16: 2.0, 32: 1.0, 64: 3.0})
    product = Product(kernel=kernel, num_tokens=3, width=40, depth=64, dtype=torch.float16)
    readings = sweep(product, [SMALL, LARGE], device, None)
    assert readings == [(HEURISTIC, 3.0), (SMALL, 2.0), (LARGE, 1.0)]
    assert winner(readings) == LARGE


def test_less_than_the_spread_of_readings_is_not_worth_a_line(clock):
    clock.update({16: 0.99, 32: 1.2, 64: 1.0})
    assert winner(sweep(toy, [SMALL, LARGE], device, 2)) is None


def test_found_tiles_are_written_and_outdated_ones_dropped(clock):
    clock.update({16: 0.5, 32: 1.2, 64: 1.0})
    worse = Product(kernel="linear", num_tokens=3, width=48, depth=64, dtype=torch.float16)
    gpu = torch.cuda.get_device_name(device) if DEVICE == "cuda" else "cpu"
    key, outdated = (TileKey(gpu, "linear", p.shape, 4) for p in (toy, worse))
    found = {outdated: SMALL, TileKey("another", "linear", toy.shape, 4): LARGE}
    todo = [(toy, 4), (worse, 4)]
    rows = tune.tune(found, todo, device, lambda n: [SMALL if n else LARGE])
    assert found[key] == found[outdated] == SMALL and len(found) == 3
    clock[16] = 2.0
    tune.tune(found, todo, device, lambda n: [SMALL])
    assert list(found) == [TileKey("another", "linear", toy.shape, 4)]
    assert [row["tile"] for row in rows] == ["16x16x32 4 warps 2 stages"] * 2


def test_a_wrong_result_is_never_timed(clock, monkeypatch):
    clock.update({16: 1.0, 32: 1.0, 64: 1.0})
    build = Product.build

    def off(self, *args):
        run, expected, copies = build(self, *args)
        return run, expected + 1, copies

    monkeypatch.setattr(Product, "build", off)
    with pytest.raises(AssertionError, match="must be within"):
        sweep(toy, [SMALL], device, None)


def test_a_tile_that_does_not_fit_is_passed_over(clock, monkeypatch):
    clock.update({16: 1.0, 64: 2.0})
    build = Product.build

    def refusing(self, *args):
        run, expected, copies = build(self, *args)

        def refuse(copy, tile):
            if tile == LARGE:
                raise tune.OutOfResources(300_000, 232_448, "shared memory")
            return run(copy, tile)

        return refuse, expected, copies

    monkeypatch.setattr(Product, "build", refusing)
    assert [tile for tile, _ in sweep(toy, [LARGE, SMALL], device, None)][1:] == [SMALL]


def test_products_of_a_layer():
    shapes = {(p.kernel, p.shape) for p in products("Qwen3-8B", 5)}
    assert shapes == {
        ("linear", "M=8 N=6144 K=4096"),
        ("linear", "M=8 N=4096 K=4096 residual"),
        ("linear", "M=8 N=4096 K=12288 residual"),
        ("linear", "M=8 N=151936 K=4096"),
        ("gate_up", "M=8 N=12288 K=4096"),
    }


@pytest.mark.parametrize("num_tokens", [1, 5, 64, 65, 2048])
def test_candidates_suit_the_kernel(num_tokens):
    tiles = candidates(num_tokens)
    assert len(tiles) == len(set(tiles)) > 10
    assert all((tile.BLOCK_M == 1) == (num_tokens == 1) for tile in tiles)


def test_the_command_line_writes_the_file(clock, tmp_path, monkeypatch, capsys):
    clock.update({16: 0.5, 64: 1.0})
    monkeypatch.setattr(tune, "products", lambda model, tokens: [toy])
    monkeypatch.setattr(tune, "candidates", lambda tokens: [SMALL])
    monkeypatch.setattr(tune.tune, "__defaults__", (lambda tokens: [SMALL],))
    path = tmp_path / "tiles.json"
    tune.main(["--model", "Qwen3-0.6B", "--tokens", "3", "--device", DEVICE, "--tiles", str(path)])
    assert list(read_tiles(path).values()) == [SMALL]
    assert "16x16x32" in capsys.readouterr().out


def test_counts_of_a_product():
    product = Product(kernel="gate_up", num_tokens=3, width=40, depth=64, dtype=torch.float16)
    assert product.bytes == 2 * (80 * 64 + 3 * 64 + 3 * 40)
    assert product.flops == 2 * 3 * 80 * 64
