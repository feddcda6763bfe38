"""QK-norm, RoPE and the write of k and v, in one pass."""

import sys

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import kernels
from kernels import reference
from kernels.tile import cdiv
from tests.strategies import (
    DEVICE,
    Layout,
    assert_close,
    assert_same_bits,
    block_sizes,
    dtypes,
    head_dims,
    heads,
    ints,
    permutation,
    randn,
    row_rms,
    run_twice,
    seeds,
    sparse_pool,
)

EPS = 1e-6
MAX_POSITION = 512


def rope_inputs(T: int, layout: Layout, dtype: torch.dtype, seed: int) -> tuple:
    """qkv, positions and cos_sin of T tokens."""
    width = (layout.group + 2) * layout.num_kv_heads * layout.head_dim
    (qkv,) = randn(seed, (T, width), dtype=dtype)
    (angles,) = randn(seed, (MAX_POSITION, layout.head_dim // 2), dtype=torch.float32)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return qkv, permutation(seed, MAX_POSITION)[:T], cos_sin


def scattered_slots(stored: list[bool], num_slots: int, seed: int) -> torch.Tensor:
    """A slot of its own for every stored token, a negative number for the others."""
    slots = permutation(seed + 1, num_slots)[: len(stored)]
    return torch.where(ints(stored, torch.bool), slots, -1 - seed % 3)


@given(
    stored=st.lists(st.sampled_from([True, True, True, False]), max_size=12),
    layout=st.builds(
        lambda heads, **shape: Layout(num_kv_heads=heads[0], group=heads[1], **shape),
        heads,
        context_lens=st.just(()),
        head_dim=head_dims,
        block_size=block_sizes,
        num_layers=st.integers(1, 3),
    ),
    qk_norm=st.booleans(),
    give_out=st.booleans(),
    dtype=dtypes,
    seed=seeds,
)
@example([], Layout(context_lens=()), True, False, torch.float16, 0)
@example([False], Layout(context_lens=()), True, False, torch.float16, 0)  # a padding row alone
@example([True], Layout(context_lens=(), head_dim=96), True, True, torch.float32, 1)  # D masked
@example(
    [True] * 4, Layout(context_lens=(), num_kv_heads=3, group=3), False, False, torch.float16, 2
)
@example([True] * 9, Layout(context_lens=(), block_size=1), True, False, torch.float16, 3)
@example([True, False], Layout(context_lens=(), head_dim=256), True, False, torch.float32, 4)
def test_rope_store_matches_reference(stored, layout, qk_norm, give_out, dtype, seed):
    qkv, positions, cos_sin = rope_inputs(len(stored), layout, dtype, seed)
    q_weight, k_weight = randn(seed + 1, (layout.head_dim,), (layout.head_dim,), dtype=dtype)
    norms = (q_weight, k_weight, EPS) if qk_norm else ()
    num_blocks = max(5, cdiv(len(stored), layout.block_size))
    (pool,) = randn(
        seed,
        (
            num_blocks,
            layout.num_layers,
            2,
            layout.block_size,
            layout.num_kv_heads,
            layout.head_dim,
        ),
        dtype=dtype,
    )
    slots = scattered_slots(stored, num_blocks * layout.block_size, seed)
    layer = seed % layout.num_layers

    expected_pool, before = pool.float(), pool.clone()
    expected = torch.zeros(
        len(stored), layout.num_kv_heads * layout.group, layout.head_dim, device=DEVICE
    )
    if stored:
        reference.rope_store(
            qkv.float(), positions, cos_sin, slots, expected_pool[:, layer], *norms, out=expected
        )
    out = torch.full_like(expected, float("nan"), dtype=dtype) if give_out else None
    actual = kernels.rope_store(qkv, positions, cos_sin, slots, pool[:, layer], *norms, out=out)
    assert out is None or actual is out
    assert_close(actual, expected, scale=row_rms(expected))
    assert_close(pool, expected_pool, scale=row_rms(expected_pool))

    written = torch.zeros(pool.shape[:4], dtype=torch.bool, device=DEVICE)
    blocks, offsets = slots[slots >= 0] // layout.block_size, slots[slots >= 0] % layout.block_size
    written[blocks, layer, :, offsets] = True
    assert_same_bits(pool[~written], before[~written])
    v = qkv.view(len(stored), layout.num_kv_heads * (layout.group + 2), layout.head_dim)
    v = v[slots >= 0, -layout.num_kv_heads :]
    assert_same_bits(pool[blocks, layer, 1, offsets], v)


@run_twice
@given(T=st.integers(0, 9), heads=heads, head_dim=head_dims, dtype=dtypes, seed=seeds)
def test_rope_store_gives_the_same_bits_again(T, heads, head_dim, dtype, seed):
    num_kv_heads, group = heads
    layout = Layout(context_lens=(), num_kv_heads=num_kv_heads, group=group, head_dim=head_dim)
    qkv, positions, cos_sin = rope_inputs(T, layout, dtype, seed)
    norms = randn(seed + 1, (head_dim,), (head_dim,), dtype=dtype)
    slots = scattered_slots([True] * T, 32, seed)

    def launched() -> tuple[torch.Tensor, torch.Tensor]:
        kv_cache = torch.zeros(2, 2, 16, num_kv_heads, head_dim, dtype=dtype, device=DEVICE)
        return kernels.rope_store(qkv, positions, cos_sin, slots, kv_cache, *norms, EPS), kv_cache

    for again, first in zip(launched(), launched(), strict=True):
        assert_same_bits(again, first)


class Watched:
    """A kernel whose launches are noted."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel
        self.launches: list[tuple[tuple[int, ...], bool]] = []  # grid, keys and values apart

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launches.append((grid, options["KV_APART"]))
            return self.kernel[grid](*arguments, **options)

        return launch


@pytest.mark.parametrize(
    ("layout", "num_parts", "fits"),  # parts: programs of a token where tokens are few
    [
        (Layout(context_lens=(), num_kv_heads=3, group=3), 2, True),
        (Layout(context_lens=(), num_kv_heads=8, group=8, head_dim=128), 5, True),
        (Layout(context_lens=(), num_kv_heads=2, group=80, head_dim=128), 11, False),
        (Layout(context_lens=(), num_kv_heads=1, group=1, head_dim=96), 2, True),
    ],
)
def test_where_tokens_are_many_a_program_has_all_of_a_token_if_it_fits(
    monkeypatch, layout, num_parts, fits
):
    """The same bits as where they are few."""
    module = sys.modules["kernels.rope_store"]
    watched = Watched(module._rope_store_kernel)
    monkeypatch.setattr(module, "_rope_store_kernel", watched)
    qkv, positions, cos_sin = rope_inputs(5, layout, torch.float16, 0)
    weights = randn(1, (layout.head_dim,), (layout.head_dim,), dtype=torch.float16)
    slots = scattered_slots([True, True, False, True, True], 32, 0)
    shape = (2, 2, 16, layout.num_kv_heads, layout.head_dim)

    def launched() -> tuple[torch.Tensor, torch.Tensor]:
        kv_cache = torch.zeros(shape, dtype=torch.float16, device=DEVICE)
        out = kernels.rope_store(qkv, positions, cos_sin, slots, kv_cache, *weights, EPS)
        return out, kv_cache

    few = launched()
    monkeypatch.setattr(module, "MANY_TOKENS", 5)
    for ours, wanted in zip(launched(), few, strict=True):
        assert_same_bits(ours, wanted)
    apart = ((5, num_parts), True)
    assert watched.launches == [apart, ((5, 1), False) if fits else apart]


@pytest.mark.parametrize("position_dtype", [torch.int32, torch.int64])
def test_positions_may_be_int32_or_int64(position_dtype):
    layout = Layout(context_lens=())
    qkv, positions, cos_sin = rope_inputs(3, layout, torch.float32, 0)
    kv_cache = torch.zeros(2, 2, 16, 1, 64, device=DEVICE)
    slots = ints([3, 17, 31], torch.int64)
    expected = reference.rope_store(qkv, positions, cos_sin, slots, kv_cache.clone())
    actual = kernels.rope_store(qkv, positions.to(position_dtype), cos_sin, slots, kv_cache)
    assert_close(actual, expected, scale=row_rms(expected))


def test_slots_beyond_int32_offsets(tmp_path):
    """2 ** 31 elements lie below the last block."""
    pool = sparse_pool(tmp_path, 2**16 + 2, 2, 2, 32, 2, 128, dtype=torch.float16)
    layout = Layout(context_lens=(), num_kv_heads=2, group=2, head_dim=128, block_size=32)
    qkv, positions, cos_sin = rope_inputs(1, layout, torch.float16, 0)
    near, far = torch.zeros(1, 2, 32, 2, 128, dtype=torch.float16, device=DEVICE), pool[:, 1]
    reference.rope_store(qkv, positions, cos_sin, ints([5], torch.int64), near)
    kernels.rope_store(qkv, positions, cos_sin, ints([(2**16 + 1) * 32 + 5], torch.int64), far)
    assert_close(far[-1], near[0].float(), scale=row_rms(near[0]))
