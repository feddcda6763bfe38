"""Causal attention over ragged prompts, with and without a cached prefix."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import kernels
from kernels import reference
from kernels.tile import Tile
from tests import plain_torch
from tests.plain_torch import assert_no_worse_than_torch
from tests.strategies import (
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

tiles = st.none() | st.builds(
    Tile,
    BLOCK_M=st.sampled_from([16, 32]),
    BLOCK_N=st.sampled_from([16, 64]),
    BLOCK_K=st.just(0),  # the head dim, whole
)


def attend(batch: PagedBatch, slack: int = 0, **options: Tensor | Tile | int | None) -> Tensor:
    max_query_len = int(batch.cu_seqlens.diff().max()) + slack if len(batch.context_lens) else 0
    return kernels.prefill_attention(
        batch.q, *batch.paging, batch.cu_seqlens, batch.context_lens, max_query_len, batch.scale,
        **options,
    )  # fmt: skip


def expect(batch: PagedBatch) -> Tensor:
    """The reference in fp32, request by request: it has no batches of no tokens."""
    if not len(batch.q):
        return batch.q.float()
    return reference.prefill_attention(
        batch.q.float(), *batch.paging, batch.cu_seqlens, batch.context_lens, 0, batch.scale
    )


@given(
    layout=layouts(prefill=True, max_requests=3),
    tile=tiles,
    slack=st.sampled_from([0, 1, 70]),
    give_out=st.booleans(),
    dtype=dtypes,
    seed=seeds,
)
@example(Layout(context_lens=(), query_lens=()), None, 0, False, torch.float16, 0)
@example(Layout(context_lens=(15,), query_lens=(15,)), None, 0, False, torch.float16, 0)
@example(Layout(context_lens=(16,), query_lens=(16,)), None, 0, False, torch.float16, 0)
@example(Layout(context_lens=(17,), query_lens=(17,)), None, 0, False, torch.float16, 0)
@example(Layout(context_lens=(1,), query_lens=(1,)), None, 0, True, torch.float32, 0)
@example(Layout(context_lens=(64, 130), query_lens=(64, 2)), None, 0, False, torch.float16, 0)
@example(
    Layout(context_lens=(63, 65, 129), query_lens=(63, 65, 65)), None, 1, True, torch.float16, 1
)
@example(
    Layout(context_lens=(299, 18, 37), query_lens=(1, 5, 37)), None, 0, False, torch.float32, 2
)
@example(
    Layout(context_lens=(70, 20), query_lens=(70, 3), head_dim=256),
    None, 0, False, torch.float32, 0,
)  # fmt: skip
@example(
    Layout(context_lens=(70, 20), query_lens=(70, 3), block_size=1),
    None, 0, False, torch.float16, 0,
)  # fmt: skip
def test_prefill_attention_matches_reference(layout, tile, slack, give_out, dtype, seed):
    batch = layout.build(dtype, seed)
    if layout.head_dim > 128:  # where the tiles drawn do not all fit a GPU's shared memory
        tile = None
    out = torch.full_like(batch.q, float("nan")) if give_out else None
    actual = attend(batch, slack, out=out, tile=tile)
    assert out is None or actual is out
    assert_attended(actual, expect(batch))


@given(layout=layouts(prefill=True, max_requests=2, max_len=90), dtype=dtypes, seed=seeds)
def test_prefill_attention_only_reads_its_inputs_and_repeats(layout, dtype, seed):
    batch = layout.build(dtype, seed)
    pool, q = batch.pool.clone(), batch.q.clone()
    first = attend(batch)
    assert_same_bits(attend(batch), first)
    assert_same_bits(batch.pool, pool)
    assert_same_bits(batch.q, q)


@given(num_tokens=st.integers(2, 150), cut=st.integers(1, 149), dtype=dtypes, seed=seeds)
@example(num_tokens=32, cut=16, dtype=torch.float32, seed=0)
@example(num_tokens=33, cut=17, dtype=torch.float32, seed=0)
def test_a_prompt_in_two_chunks_equals_the_whole(num_tokens, cut, dtype, seed):
    cut = min(cut, num_tokens - 1)
    batch = Layout(context_lens=(num_tokens,), query_lens=(num_tokens,)).build(dtype, seed)
    whole = expect(batch)
    for start, end in ((0, cut), (cut, num_tokens)):
        chunk = kernels.prefill_attention(
            batch.q[start:end], *batch.paging, ints([0, end - start]), ints([end]), end - start,
            batch.scale,
        )  # fmt: skip
        assert_attended(chunk, whole[start:end])


@given(dtype=dtypes, seed=seeds)
def test_a_request_without_queries_is_passed_over(dtype, seed):
    """A padding row of a captured prefill: no queries, no context."""
    batch = Layout(context_lens=(20, 5), query_lens=(20, 5)).build(dtype, seed)
    padded = PagedBatch(
        q=batch.q,
        pool=batch.pool,
        kv_cache=batch.kv_cache,
        block_table=batch.block_table[[0, 0, 1, 1]],
        cu_seqlens=ints([0, 20, 20, 25, 25]),
        context_lens=ints([20, 0, 5, 0]),
    )
    assert_same_bits(attend(padded), attend(batch))


def test_large_scores_neither_overflow_nor_vanish():
    """Scores of +-2e4: one key takes all of the weight, and exp2 of the others is 0."""
    batch = Layout(context_lens=(70,), query_lens=(70,), head_dim=32).build(torch.float16, 0)
    batch.q.mul_(60)
    batch.kv_cache[:, 0].mul_(60)
    assert_attended(attend(batch), expect(batch))


def test_blocks_beyond_int32_offsets(tmp_path):
    pool = sparse_pool(tmp_path, 2**16 + 2, 2, 2, 32, 2, 128, dtype=torch.float16)
    """Queries enough that Hopper has them in its pipeline."""
    q, kv = randn(0, (64, 4, 128), (2, 2, 32, 2, 128), dtype=torch.float16)
    pool[-2:, 1] = kv
    batch = PagedBatch(
        q=q,
        pool=pool,
        kv_cache=pool[:, 1],
        block_table=ints([[len(pool) - 1, len(pool) - 2]]),
        cu_seqlens=ints([0, 64]),
        context_lens=ints([64]),
    )
    assert_attended(attend(batch), expect(batch))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "head_dim, num_kv_heads, group", [(128, 8, 4), (64, 3, 3), (96, 2, 5), (256, 4, 2)]
)
@pytest.mark.parametrize(
    "lens",
    [((2048,), (2048,)), ((512, 17, 2011), (512, 17, 1)), ((463, 18, 1328, 97), (129, 5, 1, 97))],
)
def test_prefill_attention_at_model_shapes(lens, head_dim, num_kv_heads, group, dtype):
    context_lens, query_lens = lens
    batch = Layout(
        context_lens=context_lens,
        query_lens=query_lens,
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
    ).build(dtype, 0)
    actual, expected = attend(batch), expect(batch)
    assert_attended(actual, expected)
    assert_no_worse_than_torch(actual, plain_torch.attention(batch), expected)
