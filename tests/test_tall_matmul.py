"""Many tokens on Hopper: which tile a product takes, and what its warps make of it."""

from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.errors import OutOfResources

import kernels
from kernels import MatmulWorkspace, Tile, matmul_workspace, reference, tall_deal, tall_matmul
from kernels.hopper import has_wgmma
from kernels.tall_matmul import has_form, launch_tall_matmul
from kernels.tall_plan import (
    CHUNK_SIZE,
    DEEP_STAGES,
    FLAT_GATED_TILES,
    FLAT_PLAIN_TILES,
    GATED_TILES,
    MAX_SIDE,
    PLAIN_TILES,
    READ_SIZE,
    TALL_BLOCK_M,
    TIMED_DEPTH,
    Plan,
    choose_plan,
    chunk_width,
    parts,
    starts_early,
    tiles_for,
)
from kernels.tile import cdiv
from tests import small_launches
from tests.strategies import DEVICE, assert_close, assert_same_bits, randn
from tests.test_linear import dot_scale, normed
from tests.test_mlp import gate_up_scale

EPS = 1e-6
device = torch.device(DEVICE)
CHOICES = [
    pytest.param(tile, gated, id=f"{'gated-' * gated}{tile.BLOCK_M}x{tile.BLOCK_N}")
    for gated, tiles in (
        (False, (*FLAT_PLAIN_TILES, *(tile for tile, _ in PLAIN_TILES))),
        (True, (*FLAT_GATED_TILES, *(tile for tile, _ in GATED_TILES))),
    )
    for tile in dict.fromkeys(tiles)
]
GOOD = Tile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=2)


def on_hopper(test):
    if not has_wgmma(device):
        test = pytest.mark.skip(reason="needs a Hopper GPU")(test)
    return pytest.mark.gpu(test)


@pytest.mark.parametrize("tile, gated", CHOICES)
def test_tiles_of_the_tables_have_a_form_and_a_ring_that_overlaps(tile, gated):
    assert has_form(tile, gated=gated)
    assert 4 <= tile.num_stages <= DEEP_STAGES


@given(
    T=st.integers(65, 20000),
    N=st.integers(1, 200000),
    K=st.sampled_from([1024, 2048, 4096, 12288]),
    num_sms=st.integers(1, 132),
    gated=st.booleans(),
)
@example(512, 3072, 1024, 132, True)  # three small tiles are through before a large one
@example(384, 12288, 4096, 132, True)  # and nine are not before three of two parts
def test_no_tile_of_the_table_keeps_the_fullest_sm_less_busy(T, N, K, num_sms, gated):
    read_time = N * (2 if gated else 1) * K / READ_SIZE
    costs = {}
    for tile, time in tiles_for(K, gated=gated):
        num_rounds = cdiv(cdiv(T, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N), num_sms)
        costs[tile] = max(num_rounds * time * K / TIMED_DEPTH, read_time)
    plan = choose_plan(T, N, K, num_sms, gated=gated, may_share=False)
    assert plan.side == 0 and costs[plan.tile] == min(costs.values())


@pytest.mark.parametrize(
    "width, num_sms, block_n",
    [
        (4096, 132, 32),  # 128 programs, where 64 would not keep memory busy
        (6144, 132, 64),  # 96, where 192 would take two rounds and read x twice as often
        (4096, 48, 32),
        (1024, 132, 32),
    ],
)
def test_few_tokens_have_tiles_that_keep_the_sms_evenly_busy(width, num_sms, block_n):
    plan = choose_plan(16, width, 4096, num_sms, gated=False, may_share=True)
    assert (plan.tile.BLOCK_M, plan.tile.BLOCK_N, plan.side) == (64, block_n, 0)


@pytest.mark.parametrize(
    "num_tokens, num_sms, block_n",
    [(192, 132, 96), (256, 132, 96), (384, 132, 96), (512, 132, 128), (256, 96, 128)],
)
def test_tiles_of_two_parts_are_for_rounds_that_they_fill(num_tokens, num_sms, block_n):
    plan = choose_plan(num_tokens, 12288, 4096, num_sms, gated=True, may_share=True)
    assert (plan.tile.BLOCK_N, plan.side) == (block_n, 0)


@given(width=st.sampled_from([32, 64, 96, 128, 192, 256]), rows=st.sampled_from([64, 128]))
def test_a_tile_is_stored_in_chunks_that_both_its_parts_hold(width, rows):
    first, rest = parts(width)
    chunk = chunk_width(rows, width)
    assert first + rest == width and first >= 32 and rest in (0, first // 2)
    assert first % chunk == rest % chunk == 0 and chunk * rows <= CHUNK_SIZE


@pytest.mark.parametrize(
    "shape, num_sms, side",
    [
        ((512, 12288, 4096), 84, 4),  # 384 tiles: 4.57 each, or 5 rounds
        ((512, 12288, 4096), 76, 4),
        ((512, 12288, 4096), 96, 0),  # 4 rounds, and nothing left over
        ((512, 12288, 4096), 132, 0),
        ((256, 12288, 4096), 84, 2),
        ((256, 12288, 4096), 132, 0),  # 1.45 each and what sharing costs, or 2 of two parts
        ((128, 12288, 4096), 84, 0),  # one row of tiles
        ((300, 12288, 4096), 68, 3),
        ((4096, 12288, 4096), 84, 0),
        ((64, 12288, 4096), 84, 0),
    ],
)
def test_tiles_are_shared_where_the_last_round_would_be_far_from_full(shape, num_sms, side):
    plan = choose_plan(*shape, num_sms, gated=True, may_share=True)
    assert plan.side == side
    if side:
        assert plan.num_programs(*shape[:2], num_sms) == num_sms // side * side


@pytest.mark.parametrize(
    "num_tokens, width, depth, gated, early",
    [  # of a layer on an H100, both ways of launching measured
        (64, 25600, 5120, True, True),  # flat, however long
        (96, 12288, 4096, True, False),
        (192, 4096, 12288, False, False),
        (256, 9728, 2560, True, False),
        (256, 6144, 4096, False, True),
        (128, 9728, 2560, True, True),
        (512, 3072, 1024, True, True),
    ],
)
def test_long_products_start_in_order(num_tokens, width, depth, gated, early):
    assert starts_early(num_tokens, width, depth, gated=gated) is early


@given(
    num_steps=st.integers(0, 300),
    rest=st.integers(1, TALL_BLOCK_M),
    width=st.integers(1, 100_000),
    depth=st.sampled_from([1024, 2048, 4096, 12288]),
    gated=st.booleans(),
)
@example(num_steps=33, rest=1, width=4096, depth=1024, gated=False)  # 9e9 at 2146 tokens
def test_what_is_compiled_changes_with_whole_tiles_alone(num_steps, rest, width, depth, gated):
    """So that an engine can warm up every kernel that it may come to."""
    some, whole = num_steps * TALL_BLOCK_M + rest, (num_steps + 1) * TALL_BLOCK_M
    options = {"gated": gated, "may_share": True}
    assert choose_plan(some, width, depth, 132, **options) == choose_plan(
        whole, width, depth, 132, **options
    )
    early = [starts_early(n, width, depth, gated=gated) for n in (some, whole)]
    assert early[0] == early[1]


class Grid:
    """What `tall_deal` takes of Gluon, for one program of a grid."""

    maximum, minimum, cdiv = max, min, staticmethod(cdiv)

    def __init__(self, program: int, num_programs: int) -> None:
        self.program, self.num = program, num_programs

    def program_id(self, axis: int) -> int:
        return self.program

    def num_programs(self, axis: int) -> int:
        return self.num


@pytest.mark.parametrize("name, T, N, K, num_sms", small_launches.SHARED)
def test_what_compute_sanitizer_sees_has_shared_tiles(name, T, N, K, num_sms):
    plan = choose_plan(T, N, K, num_sms, gated=name == "gate_up", may_share=True)
    assert plan.side > 1


@given(
    num_m=st.integers(1, 16),
    num_n=st.integers(1, 40),
    num_k=st.integers(1, 12),
    side=st.integers(1, MAX_SIDE),
    groups=st.integers(1, 40),
)
def test_shared_tiles_are_dealt_out_whole_and_each_piece_to_the_next_group(
    num_m, num_n, num_k, side, groups
):
    heights = cdiv(num_m, side)
    groups = min(groups, heights * num_n)  # a tile for each, as `choose_plan` asks
    M, N, BLOCK_M, BLOCK_N = num_m * 128, num_n * 64 - 3, 128, 64
    pieces: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for program in range(groups * side):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tall_deal, "gl", Grid(program, groups * side))
            num, start, end = tall_deal.dealt.fn(M, N, num_k, BLOCK_M, BLOCK_N, side)
            shape = (start, end, M, N, num_k, BLOCK_M, BLOCK_N, 8, side)
            items = [tall_deal.item.fn(i, *shape) for i in range(num)]
        assert num >= 1
        for i, (row, column, begin, stop) in enumerate(items):
            assert 0 <= begin < stop <= num_k
            assert stop == num_k or i == 0  # what is passed on is there early
            assert begin == 0 or i == num - 1  # what is taken over is asked for late
            pieces.setdefault((row, column), []).append((begin, stop, program))
    corners = [(m * BLOCK_M, n * BLOCK_N) for m in range(heights * side) for n in range(num_n)]
    assert sorted(pieces) == corners
    for found in pieces.values():
        found.sort()
        assert found[0][0] == 0 and found[-1][1] == num_k
        for (_, stop, giver), (begin, _, taker) in pairwise(found):
            assert begin == stop and taker == giver + side


@given(
    M=st.integers(1, 3000),
    num_n=st.integers(1, 40),
    group_m=st.integers(1, 9),
    num_programs=st.integers(1, 132),
)
@example(2560, 24, 8, 132)  # 20 rows of tiles in groups of 8: the last has 4
def test_whole_tiles_are_dealt_out_once_and_evenly(M, num_n, group_m, num_programs):
    N = num_n * 64 - 3
    corners = [(m * 128, n * 64) for m in range(cdiv(M, 128)) for n in range(num_n)]
    num_programs = min(num_programs, len(corners))
    found, loads = [], []
    for program in range(num_programs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tall_deal, "corner", tall_deal.corner.fn)
            patch.setattr(tall_deal, "gl", Grid(program, num_programs))
            num, start, end = tall_deal.dealt.fn(M, N, 7, 128, 64, 0)
            shape = (start, end, M, N, 7, 128, 64, group_m, 0)
            items = [tall_deal.item.fn(i, *shape) for i in range(num)]
        assert {(begin, stop) for _, _, begin, stop in items} == {(0, 7)}
        found += [(row, column) for row, column, *_ in items]
        loads.append(num)
    assert sorted(found) == corners
    assert max(loads) - min(loads) <= 1


def test_a_workspace_of_fewer_sms_is_an_error():
    x = torch.zeros(128, 64, dtype=torch.float16)
    workspace = MatmulWorkspace(torch.empty(3, 1), torch.zeros(3, 2, dtype=torch.int32))
    options = {"gated": False, "tile": None, "num_sms": 4, "workspace": workspace}
    with pytest.raises(ValueError, match="workspace must be for 4 SMs or more, got 3"):
        launch_tall_matmul(x, x, None, None, None, x, **options)


@pytest.mark.parametrize(
    "change",
    [
        {"num_warps": 2},
        {"num_warps": 16},
        {"num_warps": 4},  # one consumer: too many sums
        {"BLOCK_M": 64},
        {"BLOCK_M": 256, "BLOCK_N": 256},
        {"BLOCK_N": 512},
        {"BLOCK_N": 16},
        {"BLOCK_K": 128},
        {"num_stages": 1},  # each consumer would wait for a buffer that it holds itself
    ],
)
def test_a_tile_without_a_form_is_an_error(change):
    tile = Tile(**vars(GOOD) | change)
    x = torch.zeros(128, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match="tile must have 4 or 8 warps"):
        launch_tall_matmul(x, x, None, None, None, x, gated=False, tile=tile, num_sms=1)


def test_sums_of_gate_and_up_count_both():
    wide = Tile(**vars(GOOD) | {"BLOCK_N": 256})
    assert has_form(wide, gated=False) and not has_form(wide, gated=True)
    assert has_form(GOOD, gated=True)


@pytest.mark.skipif(has_wgmma(device), reason="has a Hopper GPU")
def test_without_hopper_nothing_is_taken():
    x = torch.zeros(128, 64, dtype=torch.float16, device=device)
    assert not tall_matmul.takes(x, x, None, x)


@given(
    rows=st.integers(1, 300),
    first=st.integers(0, 20),
    num_tokens=st.integers(1, 200),
    K=st.integers(1, 9),
    column=st.integers(0, 5),
    block_m=st.sampled_from([16, 64, 128]),
)
@example(256, 0, 96, 8, 0, 64)
def test_rows_behind_x_are_in_its_storage(rows, first, num_tokens, K, column, block_m):
    buffer = torch.empty(first + num_tokens + rows, column + K + 2)
    x = buffer[first : first + num_tokens, column : column + K]
    num = tall_matmul._rows_in_reach(x, block_m)
    whole = cdiv(num_tokens, block_m) * block_m
    assert num_tokens <= num <= whole
    assert num == min(whole, num_tokens + rows)
    x.as_strided((num, K), x.stride())  # torch raises where they are not
    alone = x.clone()
    assert tall_matmul._rows_in_reach(alone, block_m) == num_tokens
    assert tall_matmul._rows_in_reach(alone[:1].expand(num_tokens, K), block_m) == num_tokens


def launch(
    T: int, N: int, K: int, extras: str, tile: Tile | None, *, gated: bool, dtype: torch.dtype,
    num_sms: int | None = None, workspace: MatmulWorkspace | None = None, num_behind: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out amid NaN, what it is to be, the scale of its sums). extras: norm, bias, residual;
    num_behind: rows of NaN that follow x in its storage."""
    rows = 2 * N if gated else N
    x, weight, bias, residual = randn(0, (T, K), (rows, K), (N,), (T, N), dtype=dtype)
    x = torch.cat([x, torch.full_like(x[:1], float("nan")).expand(num_behind, K)])[:T]
    weight = weight * K**-0.5
    held = torch.full((T + 130, N + 264), float("nan"), dtype=dtype, device=device)
    out = held[:T, :N]
    rms_eps = EPS if "norm" in extras else None
    bias = bias if "bias" in extras else None
    if "residual" in extras:
        out.copy_(residual)
    else:
        residual = None
    if gated:
        expected = reference.gate_up(x.float(), weight, rms_eps)
        scale = gate_up_scale(x, weight)
    else:
        expected = reference.linear(x.float(), weight, bias, residual, rms_eps)
        scale = dot_scale(normed(x) if rms_eps else x, weight)
    launch_tall_matmul(
        x, weight, bias, out if residual is not None else None,
        kernels.row_rstd(x, EPS) if rms_eps else None, out,
        gated=gated, tile=tile, num_sms=num_sms, workspace=workspace,
    )  # fmt: skip
    assert held[T:].isnan().all() and held[:, N:].isnan().all()  # nothing past the end
    return out, expected, scale


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile, gated", CHOICES)
def test_every_tile_matches_the_reference(tile, gated, dtype):
    for extras in ("norm",) if gated else ("", "norm bias", "residual"):
        for T in (2, 17, 64, 65, 129, 300):
            # part of a tile and some; fewer steps than the ring has buffers, and many rounds of it
            for N, K in ((24, 72), (2 * tile.BLOCK_N + 24, 1288)):
                options = {"gated": gated, "dtype": dtype}
                actual, expected, scale = launch(T, N, K, extras, tile, **options)
                assert_close(actual, expected, scale=scale)
                for num_behind in (5, 70):
                    again, _, _ = launch(T, N, K, extras, tile, num_behind=num_behind, **options)
                    assert_same_bits(again, actual)


@on_hopper
@pytest.mark.parametrize("tile, gated", CHOICES)
def test_every_partition_gives_the_same_bits(tile, gated):
    extras = "norm" if gated else "norm residual"
    shape = 300, 40 * tile.BLOCK_N + 24, 1288
    outs = [
        launch(*shape, extras, tile, gated=gated, dtype=torch.bfloat16, num_sms=num_sms)[0]
        for num_sms in (7, 48, 132)
    ]
    for out in outs[1:]:
        assert_same_bits(out, outs[0])


@on_hopper
@pytest.mark.parametrize("tile, gated", CHOICES)
def test_a_tile_is_stored_before_the_next_one_takes_its_buffer(tile, gated):
    """Tiles of one step follow each other faster than the stores, which all SMs make at once."""
    T, N = tile.BLOCK_M, 132 * 8 * tile.BLOCK_N
    x, weight = randn(0, (T, 64), (2 * N if gated else N, 64), dtype=torch.bfloat16)
    out, rstd = x.new_empty(T, N), kernels.row_rstd(x, EPS) if gated else None
    if gated:
        expected, scale = reference.gate_up(x.float(), weight, EPS), gate_up_scale(x, weight)
    else:
        expected, scale = reference.linear(x.float(), weight), dot_scale(x, weight)
    for _ in range(5):
        out.fill_(float("nan"))
        launch_tall_matmul(
            x, weight, None, None, rstd, out, gated=gated, tile=tile, num_sms=None
        )  # fmt: skip
        assert_close(out, expected, scale=scale)


@on_hopper
@pytest.mark.parametrize(
    "extras, gated", [("norm", True), ("norm bias", False), ("bias residual", False)]
)
@pytest.mark.parametrize("T", [65, 200, 300, 512, 1024])
def test_shared_tiles_have_the_bits_of_whole_ones(T, extras, gated, monkeypatch):
    """On any number of SMs, in scratch that held something else; sums cross groups and K ends
    within a step."""
    largest = (GATED_TILES if gated else PLAIN_TILES)[0][0]
    side = min(cdiv(T, largest.BLOCK_M), MAX_SIDE)
    workspace = matmul_workspace(device)
    shape, dtype = (T, 21 * largest.BLOCK_N + 24, 1288), torch.bfloat16
    whole, expected, scale = launch(*shape, extras, largest, gated=gated, dtype=dtype)
    assert_close(whole, expected, scale=scale)
    for num_sms in (side, 3 * side + 1, 32, 50, 84):
        plan = Plan(largest, side)
        monkeypatch.setattr(tall_matmul, "choose_plan", lambda *s, plan=plan, **o: plan)
        for _ in range(3):
            workspace.sums.fill_(float("nan"))
            options = {"gated": gated, "dtype": dtype, "workspace": workspace}
            out, _, _ = launch(*shape, extras, None, num_sms=num_sms, **options)
            assert_same_bits(out, whole)
            assert not workspace.is_there.any()


@on_hopper
def test_a_ring_too_deep_is_out_of_resources():
    deep = Tile(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=5)
    with pytest.raises(OutOfResources):
        launch(128, 256, 64, "", deep, gated=False, dtype=torch.bfloat16)


@on_hopper
@pytest.mark.parametrize("num_sms", [None, 52])
@pytest.mark.parametrize("num_tokens", [100, 256, 512, 1000])
def test_dependent_launches_in_a_graph_give_the_same_bits(num_tokens, num_sms):
    """Each kernel starts while the one before it still writes what it reads, x in place."""
    options = {"num_sms": num_sms, "workspace": matmul_workspace(device)}
    shapes = ((num_tokens, 1024), (6144, 1024), (1024, 3072))
    start, gate_up, down = randn(0, *shapes, dtype=torch.bfloat16)
    gate_up, down = gate_up * 1024**-0.5, down * 3072**-0.5
    x, act = torch.empty_like(start), start.new_empty(num_tokens, 3072)
    rstd = torch.empty(num_tokens, dtype=torch.float32, device=device)

    def layers(after_each):
        for _ in range(6):
            kernels.mlp(x, gate_up, down, EPS, rstd=rstd, act=act, out=x, **options)
            after_each()

    x.copy_(start)
    layers(torch.cuda.synchronize)
    expected = x.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers(lambda: None)
    for _ in range(20):
        act.fill_(float("nan"))
        rstd.fill_(float("nan"))
        x.copy_(start)
        graph.replay()
        assert_same_bits(x, expected)
