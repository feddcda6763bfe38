"""Paged attention of one new token per request: split, combined, the same alone or in a batch."""

from importlib import import_module
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import kernels
from kernels import decode_deal, hopper, reference
from kernels.decode_attention import decode_workspace
from kernels.hopper import has_wgmma
from kernels.tile import Tile
from tests import plain_torch
from tests.plain_torch import assert_no_worse_than_torch
from tests.strategies import (
    DEVICE,
    Layout,
    PagedBatch,
    assert_attended,
    assert_same_bits,
    dtypes,
    ints,
    layouts,
    randn,
    seeds,
    sparse_pool,
)

# by import_module: the package exports a function of that name
decode_attention = import_module("kernels.decode_attention")

tiles = st.none() | st.builds(
    Tile,
    BLOCK_M=st.just(16),
    BLOCK_N=st.sampled_from([16, 32, 128]),
    BLOCK_K=st.just(0),
    num_stages=st.just(2),  # of fp32, three do not fit a GPU's shared memory
)
SHIPPED = {name: getattr(decode_attention, name) for name in ("SPLIT_LEN", "MAX_SPLITS")}
CUT = ("SPLIT_LEN", "MIN_SPLIT_LEN", "FEW_SPLITS", "MAX_SPLITS", "SPLIT_UNIT")  # what `cut` takes
SPLIT_LEN, SPLITS = 64, 8  # in place of the launcher's: as many cases on fewer tokens
long_lens = st.integers(1, 3 * SPLIT_LEN + 1)  # up to four splits
many_splits = (SPLITS - 1) * SPLIT_LEN
small = {"head_dim": 16, "group": 1, "num_layers": 1}


@pytest.fixture(autouse=True, scope="module")
def short_splits():
    with patch.multiple(decode_attention, SPLIT_LEN=SPLIT_LEN, MAX_SPLITS=SPLITS):
        yield


def attend(batch: PagedBatch, **options: object) -> Tensor:
    return kernels.decode_attention(
        batch.q, *batch.paging, batch.context_lens, batch.scale, **options
    )


def expect(batch: PagedBatch) -> Tensor:
    return reference.decode_attention(
        batch.q.float(), *batch.paging, batch.context_lens, batch.scale
    )


def alone(batch: PagedBatch, b: int) -> PagedBatch:
    return PagedBatch(
        q=batch.q[b : b + 1],
        pool=batch.pool,
        kv_cache=batch.kv_cache,
        block_table=batch.block_table[b : b + 1],
        cu_seqlens=ints([0, 1]),
        context_lens=batch.context_lens[b : b + 1],
    )


@given(
    layout=layouts(max_requests=6),
    tile=tiles,
    num_sms=st.sampled_from([None, 1, 5]),
    give_out=st.booleans(),
    dtype=dtypes,
    seed=seeds,
)
@example(Layout(context_lens=()), None, None, False, torch.float16, 0)
@example(Layout(context_lens=(0,)), None, None, False, torch.float16, 0)  # a padding row alone
@example(Layout(context_lens=(0, 15, 16, 17, 0)), None, None, True, torch.float16, 0)
@example(Layout(context_lens=(1, 63, 64, 65)), None, 1, False, torch.float32, 0)
@example(Layout(context_lens=(127, 128, 129)), None, None, False, torch.float16, 0)  # two splits
@example(Layout(context_lens=(30,), head_dim=96, group=7), None, 5, False, torch.float32, 0)
@example(Layout(context_lens=(70, 3), head_dim=256), None, None, False, torch.float32, 0)
@example(Layout(context_lens=(70, 3), block_size=1), None, None, False, torch.float16, 0)
def test_decode_attention_matches_reference(layout, tile, num_sms, give_out, dtype, seed):
    batch = layout.build(dtype, seed)
    if layout.head_dim > 128:  # where the tiles drawn do not all fit a GPU's shared memory
        tile = None
    out = torch.full_like(batch.q, float("nan")) if give_out else None
    actual = attend(batch, out=out, tile=tile, num_sms=num_sms)
    assert out is None or actual is out
    assert_attended(actual, expect(batch))


@given(context_lens=st.lists(long_lens, max_size=3), dtype=dtypes, seed=seeds)
@example([many_splits], torch.float16, 0)
@example([many_splits + SPLIT_LEN - 1, 1], torch.float32, 0)
@example([many_splits + SPLIT_LEN], torch.float32, 0)  # every split full
@example([many_splits + SPLIT_LEN + 1], torch.float32, 0)  # splits grow from here on
def test_split_contexts_match_reference(context_lens, dtype, seed):
    batch = Layout(context_lens=tuple(context_lens), **small).build(dtype, seed)
    assert_attended(attend(batch), expect(batch))


@given(
    batches=st.lists(st.lists(st.just(0) | long_lens, min_size=1, max_size=3), max_size=4),
    dtype=dtypes,
    seed=seeds,
)
@example([[200, 1], [1, 200], [0, 0, 130]], torch.float32, 0)
def test_workspace_is_reused_from_batch_to_batch(batches, dtype, seed):
    workspace = decode_workspace(1, 1, small["head_dim"], DEVICE)
    for n, context_lens in enumerate(batches):
        batch = Layout(context_lens=tuple(context_lens), **small).build(dtype, seed + n)
        actual = attend(batch, workspace=workspace)
        assert_attended(actual, expect(batch))
        assert_same_bits(actual, attend(batch))
        assert not workspace.arrived.any() and not workspace.taken.any()


@given(layout=layouts(max_requests=5), dtype=dtypes, seed=seeds)
@example(Layout(context_lens=(200, 3, 0, 129), **small), torch.float32, 0)
def test_a_request_gets_the_same_bits_alone_and_in_a_batch(layout, dtype, seed):
    batch = layout.build(dtype, seed)
    together = attend(batch)
    for b in range(len(batch.context_lens)):
        assert_same_bits(attend(alone(batch, b)), together[b : b + 1])


@given(layout=layouts(), num_sms=st.integers(1, 9), dtype=dtypes, seed=seeds)
@example(Layout(context_lens=(200, 3, 0, 129), **small), 2, torch.float32, 0)
def test_decode_attention_gives_the_same_bits_on_every_partition(layout, num_sms, dtype, seed):
    batch = layout.build(dtype, seed)
    pool = batch.pool.clone()
    assert_same_bits(attend(batch, num_sms=num_sms), attend(batch))
    assert_same_bits(batch.pool, pool)


class Scalars:
    """What the arithmetic of `decode_deal` takes of Gluon."""

    maximum, minimum = staticmethod(max), staticmethod(min)
    where = staticmethod(lambda condition, yes, no: yes if condition else no)


@given(in_all=st.integers(1, 5000), num_groups=st.integers(1, 70), min_tail=st.integers(1, 8))
@example(4096, 66, 4)
@example(1, 66, 4)
def test_shares_have_every_unit_once_and_small_batches_no_tail(in_all, num_groups, min_tail):
    with patch.object(decode_deal, "gl", Scalars):
        front, num_tail = decode_deal.tail_of.fn(in_all, num_groups, 8, 2, min_tail)
        assert (num_tail, front) in [(0, in_all), (2 * num_groups, in_all - in_all // 8)]
        assert (num_tail > 0) == (in_all // 8 >= min_tail * num_groups)
        shape, at = (in_all, front, num_groups, num_tail), 0
        for share in range(num_groups + num_tail):
            start, end = decode_deal.share_at.fn(share, *shape)
            assert start == at
            for unit in range(start, end):
                assert decode_deal.share_with.fn(unit, *shape) == share
            at = end
        assert at == in_all


@given(
    units=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    ends=st.lists(st.integers(0, 400), min_size=2, max_size=12),
    block_b=st.sampled_from([1, 4, 64]),
)
@example([9, 9], [1, 2, 3, 4, 11, 18], 4)  # several shares of one request
@example([1, 9, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2], [51, 52], 4)  # behind two blocks of requests
def test_a_later_share_is_found_from_where_the_last_ended(units, ends, block_b):
    """The request that its first unit is in, and the units before that."""

    def units_of(lens, first, num, *form):
        assert 0 <= first < num
        there = np.array(units[first : first + block_b])
        return np.pad(there, (0, block_b - len(there)))

    def requests_before(unit, block):
        is_before = block.cumsum() <= unit
        return is_before.sum(), block[is_before].sum()

    class Blocks(Scalars):
        sum = staticmethod(lambda block, axis: block.sum())
        load = staticmethod(units.__getitem__)

    parts = {"_units_of": units_of, "_requests_before": requests_before}

    def cut(length, *form):
        return (1, 2 * length) if length % 2 else (length, 2)

    form = (0, len(units), *[2] * 5, block_b)
    with patch.multiple(decode_deal, gl=Blocks, cut=cut, **parts):
        assert decode_deal.all_units.fn(*form) == sum(units)
        ends = sorted(min(end, sum(units)) for end in ends)
        b = base = 0
        for start, end in zip(ends[::2], ends[1::2], strict=False):
            b, base = decode_deal.request_with.fn(start, b, base, *form)
            assert base == sum(units[:b]) <= start
            assert start == sum(units) or start < base + units[b]
            while base < end:
                base += units[b]
                b += 1


@given(max_context=st.integers(1, 100_000), less=st.integers(0, 2000))
def test_no_context_has_more_splits_than_a_workspace_is_made_for(max_context, less):
    lens = max(max_context - less, 0)
    with patch.multiple(decode_attention, **SHIPPED), patch.object(decode_deal, "gl", Scalars):
        form = [getattr(decode_attention, name) for name in CUT]
        num_splits, split_len = decode_deal.cut.fn(lens, *form)
        assert num_splits <= decode_attention._most_splits(max_context)
    assert (num_splits - 1) * split_len <= max(lens - 1, 0) < num_splits * split_len


def test_a_workspace_for_shorter_contexts_is_an_error():
    batch = Layout(context_lens=(5 * SPLIT_LEN,), **small).build(torch.float16, 0)
    workspace = decode_workspace(1, 1, small["head_dim"], DEVICE, max_context=4 * SPLIT_LEN)
    with pytest.raises(ValueError, match=r"workspace must hold \[>= \d+, >= 5, 1, 16\] sums, got"):
        attend(batch, workspace=workspace)


@pytest.mark.gpu
@pytest.mark.parametrize("lens", [(3000, 0, 1, 5000, 900, 64, 700), (40,) * 300 + (4000, 1, 3000)])
def test_a_tail_changes_no_bit_and_leaves_its_counters_at_zero(lens):
    """Who comes for which share of it differs from launch to launch; few SMs have a long one."""
    if not has_wgmma(torch.device(DEVICE)):
        pytest.skip("needs a Hopper GPU")
    heads = {"num_kv_heads": 2, "group": 3, "head_dim": 64}
    batch = Layout(context_lens=lens, **heads).build(torch.bfloat16, 0)
    workspace = decode_workspace(6, 2, 64, DEVICE)
    with patch.multiple(decode_attention, MIN_TAIL=10**6):
        even = attend(batch, workspace=workspace)
    assert_attended(even, expect(batch))
    for num_sms, min_tail in [(1, 4), (2, 4), (7, 1), (None, 1)] * 3:
        workspace.partial.fill_(float("nan"))
        with patch.multiple(decode_attention, MIN_TAIL=min_tail):
            assert_same_bits(attend(batch, workspace=workspace, num_sms=num_sms), even)
        assert not workspace.arrived.any() and not workspace.taken.any()


def test_large_scores_neither_overflow_nor_vanish():
    batch = Layout(context_lens=(70, 200), **small).build(torch.float16, 0)
    batch.q.mul_(60)
    batch.kv_cache[:, 0].mul_(60)
    assert_attended(attend(batch), expect(batch))


def test_blocks_beyond_int32_offsets(tmp_path):
    pool = sparse_pool(tmp_path, 2**16 + 2, 2, 2, 32, 2, 128, dtype=torch.float16)
    q, kv = randn(0, (1, 4, 128), (2, 32, 2, 128), dtype=torch.float16)
    pool[-1, 1] = kv
    batch = PagedBatch(
        q=q,
        pool=pool,
        kv_cache=pool[:, 1],
        block_table=ints([[len(pool) - 1]]),
        cu_seqlens=ints([0, 1]),
        context_lens=ints([20]),
    )
    assert_attended(attend(batch), expect(batch))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "head_dim, num_kv_heads, group", [(128, 8, 4), (64, 3, 3), (96, 2, 5), (256, 4, 2)]
)
@pytest.mark.parametrize("batch_size, context_len", [(1, 16384), (12, 54), (17, 2048), (128, 97)])
def test_decode_attention_at_model_shapes(
    batch_size, context_len, head_dim, num_kv_heads, group, dtype
):
    batch = Layout(
        context_lens=tuple(max(1, context_len - 7 * b) for b in range(batch_size)),
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
    ).build(dtype, 0)
    actual, expected = attend(batch), expect(batch)
    assert_attended(actual, expected)
    assert_no_worse_than_torch(actual, plain_torch.attention(batch), expected)
    assert_same_bits(attend(batch), actual)
    with patch.multiple(decode_attention, **SHIPPED):
        assert_attended(attend(batch), expect(batch))
    last = batch_size - 1
    assert_same_bits(attend(alone(batch, last)), actual[last:])


@pytest.mark.parametrize("num_tokens", [8, 48, 128])
def test_a_step_that_splits_do_not_divide_into_is_refused(monkeypatch, num_tokens):
    """Nor do halves of blocks: the pipeline would pass on sums that are of two splits."""
    monkeypatch.setattr(hopper, "has_wgmma", lambda device: True)
    batch = Layout(context_lens=(100,), head_dim=64).build(torch.float16, 0)
    assert decode_attention.takes(batch.q, batch.kv_cache)
    tile = Tile(BLOCK_M=16, BLOCK_N=num_tokens, BLOCK_K=0, num_warps=1, num_stages=2)
    wanted = f"BLOCK_N that divides 64, in whole blocks of 16, got .*BLOCK_N={num_tokens}"
    with pytest.raises(ValueError, match=wanted):
        attend(batch, tile=tile)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [(16, 3), (16, 4), (32, 2), (32, 3), (64, 2)])
@pytest.mark.parametrize("head_dim, num_kv_heads, group", [(128, 8, 4), (64, 3, 3)])
def test_every_ring_of_the_pipeline_matches_the_reference(tile, head_dim, num_kv_heads, group):
    if not has_wgmma(torch.device(DEVICE)):
        pytest.skip("needs a Hopper GPU")
    heads = {"num_kv_heads": num_kv_heads, "group": group, "head_dim": head_dim}
    batch = Layout(context_lens=(1, 15, 0, 300, 1000, 64, 4097), **heads).build(torch.bfloat16, 0)
    assert decode_attention.takes(batch.q, batch.kv_cache)
    form = Tile(BLOCK_M=16, BLOCK_N=tile[0], BLOCK_K=0, num_warps=1, num_stages=tile[1])
    actual = attend(batch, tile=form)
    assert_attended(actual, expect(batch))
    assert_same_bits(attend(batch, tile=form, num_sms=3), actual)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [16, 128])
def test_decode_attention_replays_in_a_graph(head_dim):
    """A captured launch follows context_lens and block_table as they change."""
    layout = Layout(context_lens=(700, 3, 256), head_dim=head_dim, group=1, num_layers=1)
    batch = layout.build(torch.bfloat16, 0)
    workspace = decode_workspace(1, 1, head_dim, DEVICE)
    out = torch.empty_like(batch.q)
    attend(batch, workspace=workspace, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend(batch, workspace=workspace, out=out)
    for context_lens in ((1, 3, 250), (699, 0, 256), (300, 2, 100)):
        batch.context_lens.copy_(ints(context_lens))
        graph.replay()
        assert_attended(out, expect(batch))
