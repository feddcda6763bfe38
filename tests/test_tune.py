"""Tuning: the fastest right tile is kept, and only where it is worth it."""

from contextlib import nullcontext
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from experiments import tune
from experiments.energy import Sustained
from experiments.timing import Times
from experiments.tune import Product, candidates, products, sweep, sweep_bucket, winner
from kernels import Tile, reference
from kernels.tall_plan import choose_plan
from kernels.tiles import TileKey, read_tiles
from tests.strategies import DEVICE

device = torch.device(DEVICE)
SMALL, LARGE = (Tile(BLOCK_M=16, BLOCK_N=n, BLOCK_K=32, num_stages=2) for n in (16, 32))
toy = Product(kernel="linear", num_tokens=3, width=40, depth=64, dtype=torch.float16)


@pytest.fixture
def clock(monkeypatch):
    """Timing as told: milliseconds by BLOCK_N, the heuristic's by None; or a list of them, one for
    each sweep. The calls are made all the same."""
    ms = {}

    def time_calls(run, copies, device, effort):
        held = [cell.cell_contents for cell in run.__closure__]
        tile = next((value for value in held if type(value) is Tile), None)
        run(0)
        told = ms[tile and tile.BLOCK_N]
        return Times(*[told.pop(0) if isinstance(told, list) else told] * 3)

    monkeypatch.setattr(tune, "time_calls", time_calls)
    monkeypatch.setattr(tune, "copies_for", lambda num_bytes: 2)
    return ms


@pytest.mark.parametrize("kernel", ["linear", "gate_up"])
def test_the_fastest_tile_is_found(clock, kernel):
    clock.update({16: 2.0, 32: 1.0, None: 3.0})
    product = Product(kernel=kernel, num_tokens=3, width=40, depth=64, dtype=torch.float16)
    readings = sweep(product, [SMALL, LARGE], device, None)
    assert readings == [(None, 3.0), (SMALL, 2.0), (LARGE, 1.0)]
    assert winner([readings]) == LARGE


class Nowhere(nullcontext):
    """A stream or a device, and still a type: torch asks whether something is one."""

    def __init__(self, *where) -> None:
        super().__init__()


def test_a_sustained_reading_is_of_whole_rounds_of_calls(clock, monkeypatch):
    """At the power limit the order of tiles may be another."""
    clock.update({16: 2.0, 32: 1.0, None: 3.0})
    captured, at_the_limit = [], {16: 1.5, 32: 2.5, None: 3.5}
    nothing = SimpleNamespace(replay=None)

    def capture(run, copies, calls, stream):
        assert calls % copies == 0
        captured.append(calls)
        return nothing

    def sustain(replay, run_ms, device, *, calls, seconds):
        assert seconds == 0.5 and calls == captured[-1]
        block_n = {2.0: 16, 1.0: 32, 3.0: None}[run_ms / calls]
        return Sustained(at_the_limit[block_n], None)

    for name in ("Stream", "stream", "device"):
        monkeypatch.setattr(torch.cuda, name, Nowhere)
    monkeypatch.setattr(tune, "capture", capture)
    monkeypatch.setattr(tune, "sustain", sustain)
    readings = sweep(toy, [SMALL, LARGE], device, None, seconds=0.5)
    assert readings == [(None, 3.5), (SMALL, 1.5), (LARGE, 2.5)]
    assert captured == [4, 6, 10] and winner([readings]) == SMALL


def test_the_command_line_asks_for_sustained_readings(tmp_path, monkeypatch):
    asked = []

    def sweep(product, tiles, device, num_sms, seconds):
        asked.append(seconds)
        return [(None, 1.0)]

    monkeypatch.setattr(tune, "sweep", sweep)
    monkeypatch.setattr(tune, "products", lambda model, tokens: [toy])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "one")
    argv = ["--model", "Qwen3-0.6B", "--tokens", "3", "--tiles", str(tmp_path / "tiles.json")]
    tune.main([*argv, "--device", "cuda:0", "--sustained", "0.5"])
    tune.main([*argv, "--device", "cpu"])
    assert asked == [0.5] * 2 + [0.0] * 2  # at both ends of the bucket


def test_sustained_readings_are_refused_without_a_gpu(capsys):
    with pytest.raises(SystemExit):
        tune.main(["--device", "cpu", "--sustained", "1"])
    assert "--sustained needs a GPU, got --device cpu" in capsys.readouterr().err


@pytest.mark.gpu
def test_sustained_readings_of_a_gpu():
    product = Product(kernel="gate_up", num_tokens=256, width=256, depth=512)
    readings = sweep(product, candidates(256)[:3], device, None, seconds=0.2)
    assert readings[0][0] is None and all(ms > 0 for _, ms in readings)


def test_less_than_the_spread_of_readings_is_not_worth_a_line(clock):
    clock.update({16: 0.99, 32: 1.2, None: 1.0})
    assert winner([sweep(toy, [SMALL, LARGE], device, 2)]) is None


def test_a_tile_has_to_win_at_both_ends_of_its_bucket(clock):
    clock.update({16: [0.5, 1.1], 32: [0.9, 0.8], None: [1.0, 1.0]})
    sweeps = sweep_bucket(toy, [SMALL, LARGE], device, None)
    assert winner(sweeps) == LARGE
    assert winner(sweeps[:1]) == SMALL
    assert winner([sweeps[0][:2], sweeps[1]]) is None  # LARGE did not run there


@pytest.mark.parametrize(
    "num_tokens, wanted",
    [(1, [1]), (2, [2]), (3, [3, 4]), (4, [3, 4]), (129, [170, 256]), (256, [170, 256])],
)
def test_ends_lie_in_the_bucket(num_tokens, wanted):
    product = Product(kernel="linear", num_tokens=num_tokens, width=40, depth=64)
    ends = product.ends()
    assert [end.num_tokens for end in ends] == wanted
    assert {end.shape for end in ends} == {product.shape}


def test_a_tile_has_to_beat_the_heuristic_and_not_what_was_found_before(clock, monkeypatch):
    """Which a launch would take, and be as fast as the tile."""
    clock.update({16: 1.0, None: 2.0})

    def found(*launch):
        raise AssertionError("must not look into tiles.json")

    monkeypatch.setattr(import_module("kernels.linear"), "tuned_tile", found)
    assert winner([sweep(toy, [SMALL], device, None)]) == SMALL


def test_the_heuristic_has_a_workspace_as_when_serving(clock, monkeypatch):
    clock.update({16: 1.0, None: 2.0})
    workspace, given = object(), []

    def linear(x, weight, *, out, **options):
        given.append((options["tile"], options["workspace"]))
        return reference.linear(x, weight, rms_eps=options["rms_eps"], out=out)

    monkeypatch.setattr(tune.kernels, "matmul_workspace", lambda device: workspace)
    monkeypatch.setattr(tune.kernels, "linear", linear)
    sweep(toy, [SMALL], device, None)
    assert set(given) == {(None, workspace), (SMALL, workspace)}


def test_found_tiles_are_written_and_outdated_ones_dropped(clock):
    clock.update({16: 0.5, 32: 1.2, None: 1.0})
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
    clock.update({16: 1.0, None: 1.0})
    build = Product.build

    def off(self, *args):
        run, expected, copies = build(self, *args)
        return run, expected + 1, copies

    monkeypatch.setattr(Product, "build", off)
    with pytest.raises(AssertionError, match="must be within"):
        sweep(toy, [SMALL], device, None)


def test_a_tile_that_does_not_fit_is_passed_over(clock, monkeypatch):
    clock.update({16: 1.0, None: 2.0})
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


@pytest.mark.parametrize("num_tokens", [2, 16, 17, 33, 64, 65, 300, 2048])
@pytest.mark.parametrize("num_sms", [52, 132])
def test_candidates_hold_what_hopper_would_choose(num_tokens, num_sms):
    tiles = set(candidates(num_tokens))
    for gated in (False, True):
        for width, depth in ((1024, 2048), (6144, 4096), (12288, 4096)):
            plan = choose_plan(num_tokens, width, depth, num_sms, gated=gated, may_share=True)
            assert plan.tile in tiles


def test_the_command_line_writes_the_file(clock, tmp_path, monkeypatch, capsys):
    clock.update({16: 0.5, None: 1.0})
    monkeypatch.setattr(tune, "products", lambda model, tokens: [toy])
    monkeypatch.setattr(tune, "candidates", lambda tokens: [SMALL])
    monkeypatch.setattr(tune.tune, "__defaults__", (lambda tokens: [SMALL], 0.0))
    path = tmp_path / "tiles.json"
    tune.main(["--model", "Qwen3-0.6B", "--tokens", "3", "--device", DEVICE, "--tiles", str(path)])
    assert list(read_tiles(path).values()) == [SMALL]
    assert "16x16x32" in capsys.readouterr().out


def test_counts_of_a_product():
    product = Product(kernel="gate_up", num_tokens=3, width=40, depth=64, dtype=torch.float16)
    assert product.bytes == 2 * (80 * 64 + 3 * 64 + 3 * 40)
    assert product.flops == 2 * 3 * 80 * 64
