"""Prefill attention on Hopper, by warps that specialise: what the tests of its API do not reach."""

import random
import sys

import pytest
import torch

import kernels
from kernels import Tile
from kernels.hopper import has_wgmma
from kernels.prefill_attention import choose_pipeline_tile, has_form, takes
from kernels.tile import cdiv
from tests.strategies import (
    DEVICE,
    Layout,
    PagedBatch,
    assert_attended,
    assert_same_bits,
    ints,
)
from tests.test_prefill_attention import attend, expect

on_hopper = pytest.mark.skipif(not has_wgmma(torch.device(DEVICE)), reason="needs a Hopper GPU")
HEADS = {"num_kv_heads": 2, "group": 4, "head_dim": 128}
BATCHES = {
    "one of each length": tuple((n, n) for n in (1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 257)),
    "prefixes": ((1000, 1), (2011, 500), (128, 16), (1463, 129), (37, 5), (384, 128)),
    "more requests than lanes": tuple((n % 300 + 1, n % 300 + 1) for n in range(0, 20000, 211)),
    "one long": ((3001, 3001),),
}


@pytest.fixture(autouse=True)
def nothing_goes_to_the_other_kernel(monkeypatch):
    """Which would pass these tests as well."""
    module = sys.modules["kernels.prefill_attention"]
    monkeypatch.setattr(module, "_prefill_attention_kernel", None)


def batch_of(name: str, dtype: torch.dtype, **changes: int) -> PagedBatch:
    contexts, queries = zip(*BATCHES[name], strict=True)
    heads = HEADS | changes
    return Layout(context_lens=contexts, query_lens=queries, **heads).build(dtype, 0)


@pytest.mark.parametrize(
    "change", [{"BLOCK_M": 64}, {"num_warps": 4}, {"BLOCK_N": 256}, {"num_stages": 1}]
)
def test_a_tile_of_another_form_is_for_the_other_kernel(change):
    tile = choose_pipeline_tile(16, 128)
    assert has_form(tile)
    assert not has_form(Tile(**vars(tile) | change))


@pytest.mark.parametrize("block_size", [8, 16, 32, 64])
def test_every_block_size_has_a_tile_of_the_form(block_size):
    """Whose ring is as long; the loading warp holds the ids of eight blocks at most."""
    tile = choose_pipeline_tile(block_size, 128)
    assert has_form(tile)
    assert tile.BLOCK_N * tile.num_stages == 256
    assert cdiv(tile.BLOCK_N, block_size) <= 8


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BATCHES)
def test_every_batch_is_taken_and_matches_the_reference(name, dtype):
    batch = batch_of(name, dtype)
    assert takes(batch.q, batch.kv_cache)
    out = torch.full_like(batch.q, float("nan"))
    assert_attended(attend(batch, out=out), expect(batch))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("block_size", [8, 32, 64])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_block_sizes_and_head_dims(head_dim, block_size):
    batch = batch_of("prefixes", torch.bfloat16, head_dim=head_dim, block_size=block_size)
    assert takes(batch.q, batch.kv_cache)
    assert_attended(attend(batch), expect(batch))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("tile", [(64, 2), (64, 4), (128, 2)])
def test_every_form_matches_the_reference(tile):
    BLOCK_N, num_stages = tile
    batch = batch_of("prefixes", torch.bfloat16)
    form = Tile(BLOCK_M=128, BLOCK_N=BLOCK_N, BLOCK_K=128, num_warps=8, num_stages=num_stages)
    assert_attended(attend(batch, tile=form), expect(batch))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("name", BATCHES)
def test_every_partition_gives_the_same_bits(name):
    batch = batch_of(name, torch.bfloat16)
    whole = attend(batch)
    for num_sms in (1, 7, 48):
        assert_same_bits(attend(batch, num_sms=num_sms), whole)


@pytest.mark.gpu
@on_hopper
def test_a_request_has_the_same_bits_whatever_is_beside_it():
    """Its tiles are dealt out in another order then, and padding rows lie between."""
    batch = batch_of("prefixes", torch.bfloat16)
    alone = attend(batch)
    order = random.Random(0).sample(range(len(batch.context_lens)), len(batch.context_lens))
    starts = batch.cu_seqlens.tolist()
    rows = [torch.arange(starts[b], starts[b + 1]) for b in order]
    lens = [n for row in rows for n in (len(row), 0)]
    table = batch.block_table[ints(order).long()].repeat_interleave(2, dim=0)
    contexts = batch.context_lens[ints(order).long()].repeat_interleave(2)
    contexts[1::2] = 0
    mixed = PagedBatch(
        q=batch.q[torch.cat(rows).to(DEVICE)],
        pool=batch.pool,
        kv_cache=batch.kv_cache,
        block_table=table,
        cu_seqlens=ints([sum(lens[:i]) for i in range(len(lens) + 1)]),
        context_lens=contexts,
    )
    assert_same_bits(attend(mixed), alone[torch.cat(rows).to(DEVICE)])


@pytest.mark.gpu
@on_hopper
def test_queries_that_lie_in_a_wider_matrix():
    """As the engine's do, beside keys and values."""
    batch = batch_of("prefixes", torch.bfloat16)
    num_tokens, num_heads, head_dim = batch.q.shape
    wide = torch.full((num_tokens, num_heads + 4, head_dim), float("nan"), device=DEVICE)
    wide = wide.bfloat16()
    wide[:, :num_heads] = batch.q
    out = kernels.prefill_attention(
        wide[:, :num_heads], *batch.paging, batch.cu_seqlens, batch.context_lens, 500, batch.scale
    )
    assert_same_bits(out, attend(batch))
