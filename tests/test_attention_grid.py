"""Attention over the shapes that peers are held to, at the launchers' own sizes.

Every two values of two columns meet in one case: an orthogonal array of 25, and not the 675 of all.
"""

from importlib import import_module
from itertools import combinations, product

import pytest
import torch

from tests import plain_torch
from tests.plain_torch import assert_no_worse_than_torch
from tests.strategies import Layout, PagedBatch, assert_attended, assert_same_bits
from tests.test_decode_attention import attend as decode
from tests.test_decode_attention import expect as expect_decoded
from tests.test_prefill_attention import attend as prefill
from tests.test_prefill_attention import expect as expect_prefilled

# by import_module: the package exports functions of these names
decode_attention = import_module("kernels.decode_attention")
prefill_attention = import_module("kernels.prefill_attention")

BATCHES, CONTEXTS, BLOCKS = (12, 17, 128), (54, 97, 512, 2048, 16384), (1, 8, 16)
GROUPS, DIMS = (1, 3, 4, 5, 8), (64, 128, 256)
COLUMNS = (BATCHES, CONTEXTS, BLOCKS, GROUPS, DIMS)
NUM_KV_HEADS = 2
MOST_ELEMENTS = 2**26  # of all keys: with values, their copies and fp32, some 1 GB
MIXED = ((1, 1328), (5, 18), (129, 463), (1, 37), (1, 2011))  # queries, context


def level(values: tuple[int, ...], i: int) -> int:
    """One of up to five values for each i modulo 5."""
    return values[i % 5 % len(values)]


DECODE_CASES = [
    (
        level(BATCHES, i + j),
        level(CONTEXTS, i),
        level(BLOCKS, i + 2 * j),
        level(GROUPS, j),
        level(DIMS, i + 3 * j),
    )
    for i, j in product(range(5), repeat=2)
]
PREFILL_CASES = [
    (BLOCKS[i], GROUPS[(i + 2 * j) % 5], DIMS[j]) for i, j in product(range(3), repeat=2)
]


def lens_of(batch_size: int, context_len: int, most: int) -> tuple[int, ...]:
    """The whole context for as many requests as there are tokens for, and less and less for the
    others."""
    num_whole = min(max(most // context_len, 1), batch_size)
    rest = range(batch_size - num_whole)
    return (context_len,) * num_whole + tuple(max(1, 50 - i) for i in rest)


def mixed_batch(block_size: int, group: int, head_dim: int, dtype: torch.dtype) -> PagedBatch:
    queries, contexts = zip(*MIXED, strict=True)
    heads = {"num_kv_heads": NUM_KV_HEADS, "group": group, "head_dim": head_dim}
    layout = Layout(context_lens=contexts, query_lens=queries, block_size=block_size, **heads)
    return layout.build(dtype, 0)


@pytest.mark.parametrize("columns", list(combinations(range(len(COLUMNS)), 2)))
def test_every_two_values_meet(columns):
    a, b = columns
    met = {(case[a], case[b]) for case in DECODE_CASES}
    assert met == set(product(COLUMNS[a], COLUMNS[b]))


def test_a_batch_of_the_grid_stays_small():
    for batch_size, context_len, _, _, head_dim in DECODE_CASES:
        most = MOST_ELEMENTS // (NUM_KV_HEADS * head_dim)
        lens = lens_of(batch_size, context_len, most)
        assert len(lens) == batch_size and lens[0] == context_len
        assert sum(lens) <= most + 50 * batch_size


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size, context_len, block_size, group, head_dim", DECODE_CASES)
def test_decode_attention_on_the_grid(batch_size, context_len, block_size, group, head_dim):
    most = MOST_ELEMENTS // (NUM_KV_HEADS * head_dim)
    batch = Layout(
        context_lens=lens_of(batch_size, context_len, most),
        num_kv_heads=NUM_KV_HEADS,
        group=group,
        head_dim=head_dim,
        block_size=block_size,
        num_layers=1,
    ).build(torch.bfloat16, 0)
    actual, expected = decode(batch), expect_decoded(batch)
    assert_attended(actual, expected)
    assert_no_worse_than_torch(actual, plain_torch.attention(batch), expected)
    assert_same_bits(decode(batch), actual)
    assert_same_bits(decode(batch, num_sms=48), actual)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size, group, head_dim", PREFILL_CASES)
def test_prefill_attention_of_mixed_lengths(block_size, group, head_dim):
    """By the plain kernel, as these are few queries for a request, and by Hopper's where it can."""
    batch = mixed_batch(block_size, group, head_dim, torch.bfloat16)
    expected, plain = expect_prefilled(batch), plain_torch.attention(batch)
    tiles = [None]
    if prefill_attention.takes(batch.q, batch.kv_cache):
        tiles.append(prefill_attention.choose_pipeline_tile(block_size, head_dim))
    for tile in tiles:
        actual = prefill(batch, tile=tile)
        assert_attended(actual, expected)
        assert_no_worse_than_torch(actual, plain, expected)
        assert_same_bits(prefill(batch, tile=tile), actual)


@pytest.mark.parametrize("block_size", BLOCKS)
def test_the_measure_by_plain_torch_holds_and_can_fail(block_size):
    layout = {"head_dim": 64, "group": 3, "block_size": block_size}
    prompts = Layout(context_lens=(37, 5, 90), query_lens=(5, 5, 1), **layout)
    tokens = Layout(context_lens=(37, 0, 90), **layout)
    for batch, expect in (
        (prompts.build(torch.bfloat16, 0), expect_prefilled),
        (tokens.build(torch.bfloat16, 1), expect_decoded),
    ):
        expected, plain = expect(batch), plain_torch.attention(batch)
        rounded = expected.bfloat16()
        assert_no_worse_than_torch(rounded, plain, expected)
        for wrong in (0.1, float("nan")):
            off = rounded.clone()
            off[0, 0, 0] += wrong
            with pytest.raises(AssertionError, match="off by"):
                assert_no_worse_than_torch(off, plain, expected)


def test_blocks_that_would_spill_are_not_for_the_pipeline(monkeypatch):
    monkeypatch.setattr(decode_attention.hopper, "has_wgmma", lambda device: True)
    taken = {
        (head_dim, block_size)
        for head_dim, block_size in product((64, 128, 256), (1, 8, 16, 32, 64))
        if decode_attention.takes(
            torch.empty(1, 2, head_dim, dtype=torch.float16),
            torch.empty(4, 2, block_size, 1, head_dim, dtype=torch.float16),
        )
    }
    narrow, wide = product([64], [8, 16, 32, 64]), product([128], [8, 16, 32])
    assert taken == {*narrow, *wide}
