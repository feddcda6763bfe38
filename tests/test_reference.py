"""The references themselves, against formulas that share no line with them."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kernels import reference
from tests.strategies import Layout, PagedBatch, ints, layouts, randn, seeds

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # fp32 on both sides; only the order of sums differs
f32 = torch.float32


@given(T=st.integers(0, 9), N=st.integers(1, 300), seed=seeds)
def test_norms(T, N, seed):
    x, residual, weight = randn(seed, (T, N), (T, N), (N,), dtype=f32)
    torch.testing.assert_close(
        reference.rms_norm(x, weight, 1e-6), rms_norm(x, (N,), weight, 1e-6), **CLOSE
    )
    summed = x + residual
    actual = reference.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(residual, summed)
    torch.testing.assert_close(actual, rms_norm(summed, (N,), weight, 1e-6), **CLOSE)


@given(T=st.integers(0, 9), N=st.integers(1, 40), K=st.integers(1, 40), seed=seeds)
def test_linear_and_mlp(T, N, K, seed):
    x, weight, bias, residual = randn(seed, (T, K), (N, K), (N,), (T, N), dtype=f32)
    normed = rms_norm(x, (K,), None, 1e-6)
    wanted = torch.einsum("tk,nk->tn", normed, weight) + bias + residual
    out = residual.clone()
    actual = reference.linear(x, weight, bias, out, 1e-6, out=out)
    assert actual is out
    torch.testing.assert_close(actual, wanted, **CLOSE)

    gate, up, down = randn(seed + 1, (N, K), (N, K), (K, N), dtype=f32)
    act = silu(normed @ gate.T) * (normed @ up.T)
    merged = torch.cat([gate, up])
    torch.testing.assert_close(reference.gate_up(x, merged, 1e-6), act, **CLOSE)
    actual = reference.mlp(x, merged, down, 1e-6)
    torch.testing.assert_close(actual, x + act @ down.T, rtol=1e-4, atol=1e-4)


@given(
    T=st.integers(1, 9),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([16, 64, 96]),
    qk_norm=st.booleans(),
    seed=seeds,
)
def test_rope_store(T, num_kv_heads, group, head_dim, qk_norm, seed):
    """Rotation as transformers does it; token t goes to slot 2 * t, every third one nowhere."""
    H = num_kv_heads * group
    q, k, v, weights = randn(
        seed, (T, H, head_dim), (T, num_kv_heads, head_dim), (T, num_kv_heads, head_dim),
        (2, head_dim), dtype=f32,
    )  # fmt: skip
    qkv = torch.cat([q, k, v], dim=1).flatten(1)
    frequencies = 1e4 ** -(torch.arange(0, head_dim, 2, device=q.device) / head_dim)
    angles = torch.arange(64, device=q.device)[:, None] * frequencies
    positions = torch.arange(T, device=q.device) * 3
    slots = torch.where(positions % 9 == 0, -1, positions // 3 * 2)
    kv_cache = torch.zeros(2, 2, 16, num_kv_heads, head_dim, device=q.device)
    norms = (weights[0], weights[1], 1e-6) if qk_norm else ()
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
    actual = reference.rope_store(qkv, positions, cos_sin, slots, kv_cache, *norms)

    if qk_norm:
        q = rms_norm(q, (head_dim,), weights[0], 1e-6)
        k = rms_norm(k, (head_dim,), weights[1], 1e-6)
    both = torch.cat([angles, angles], dim=-1)[positions]
    q, k = apply_rotary_pos_emb(q, k, both.cos(), both.sin(), unsqueeze_dim=1)
    torch.testing.assert_close(actual, q, **CLOSE)
    wanted = torch.zeros_like(kv_cache)
    for t in range(T):
        if t % 3:
            wanted[2 * t // 16, 0, 2 * t % 16] = k[t]
            wanted[2 * t // 16, 1, 2 * t % 16] = v[t]
    torch.testing.assert_close(kv_cache, wanted, **CLOSE)


def sdpa(batch: PagedBatch, layout: Layout, b: int, q: Tensor) -> Tensor:
    """Attention of q: [M, H, D], the last M tokens of request b, by torch."""
    context_len, M = layout.context_lens[b], len(q)
    kv = torch.stack(
        [
            batch.kv_cache[batch.block_table[b, n // layout.block_size], :, n % layout.block_size]
            for n in range(context_len)
        ],
        dim=2,
    )  # [2, H_KV, S, D]
    k, v = kv.repeat_interleave(layout.group, dim=1)
    mask = torch.ones(M, context_len, dtype=torch.bool, device=q.device)
    mask = mask.tril(context_len - M)
    return scaled_dot_product_attention(
        q.transpose(0, 1), k, v, attn_mask=mask, scale=batch.scale
    ).transpose(0, 1)


@given(layout=layouts(prefill=True, max_requests=3, max_len=60), seed=seeds)
@example(Layout(context_lens=(16, 17), query_lens=(16, 1)), 0)
def test_prefill_attention(layout, seed):
    batch = layout.build(f32, seed)
    actual = reference.prefill_attention(
        batch.q, *batch.paging, batch.cu_seqlens, batch.context_lens, 60, batch.scale
    )
    starts = batch.cu_seqlens.tolist()
    for b in range(len(layout.context_lens)):
        rows = slice(starts[b], starts[b + 1])
        torch.testing.assert_close(actual[rows], sdpa(batch, layout, b, batch.q[rows]), **CLOSE)


@given(layout=layouts(max_requests=3, max_len=60), seed=seeds)
@example(Layout(context_lens=(0, 16, 17)), 0)
def test_decode_attention(layout, seed):
    batch = layout.build(f32, seed)
    actual = reference.decode_attention(batch.q, *batch.paging, batch.context_lens, batch.scale)
    for b, context_len in enumerate(layout.context_lens):
        if context_len:
            wanted = sdpa(batch, layout, b, batch.q[b : b + 1])
            torch.testing.assert_close(actual[b : b + 1], wanted, **CLOSE)
        else:
            assert not actual[b].any()


def test_copy_blocks():
    (src,) = randn(0, (4, 2, 3), dtype=f32)
    dst = torch.zeros(5, 2, 3, device=src.device)
    reference.copy_blocks(src, dst, ints([3, 0]), ints([1, 4]))
    assert torch.equal(dst[1], src[3]) and torch.equal(dst[4], src[0])
    assert not dst[[0, 2, 3]].any()


# Random123's known answers need all four words of the counter, the reference sets two: they check
# the formula here, and the formula checks the reference.
def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's integers, as in the paper."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


@pytest.mark.parametrize(
    "counter, key, answer",
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ],
)
def test_philox_formula_gives_the_known_answers(counter, key, answer):
    assert " ".join(f"{word:08x}" for word in philox(counter, key)) == answer


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    c0=st.integers(0, 2**32 - 1),
    c1=st.integers(0, 2**32 - 1),
)
@example(0, 0, 0)
@example(-1, 2**32 - 1, 2**32 - 1)
def test_philox(seed, c0, c1):
    words = reference._philox4x32(*(ints([n], torch.int64) for n in (seed, c0, c1)))
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    assert [int(word) for word in words] == philox([c0, c1, 0, 0], key)


def test_uniform():
    """The upper 26 bits of two words of the block (0, step)."""
    share = reference.uniform(ints([5, -7], torch.int64), ints([0, 3]))
    for b, (seed, step) in enumerate([(5, 0), (-7, 3)]):
        high, low, _, _ = philox([0, step, 0, 0], [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF])
        assert float(share[b]) == ((high >> 6) * 2**26 + (low >> 6) + 0.5) / 2**52


def test_uniform_is_within_its_bounds_and_has_its_moments():
    share = reference.uniform(torch.arange(1_000_000), torch.zeros(1_000_000))
    assert float(share.min()) > 0 and float(share.max()) < 1
    # 1e6 draws: five standard errors of the mean and of the variance
    assert abs(float(share.mean()) - 1 / 2) < 5 * 12**-0.5 / 1e3
    assert abs(float(share.var()) - 1 / 12) < 5 * 180**-0.5 / 1e3


def kept_by_hand(scaled: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """The rule of `sample`, token by token."""
    tokens = range(len(scaled))
    in_k = {v for v in tokens if not top_k or sum(x > scaled[v] for x in scaled) < top_k}
    weights = {v: math.exp(scaled[v] - max(scaled)) for v in in_k}
    total = sum(weights.values())
    above = {v: sum(weights[u] for u in in_k if scaled[u] > scaled[v]) / total for v in in_k}
    return {
        v for v in in_k if (top_p >= 1 or above[v] < top_p) and weights[v] >= min_p
    }  # the largest weight is 1


@given(
    values=st.lists(st.integers(-6, 6), min_size=1, max_size=12),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([1.0, 0.913, 0.502, 0.107, 1e-6]),
    min_p=st.sampled_from([0.0, 0.051, 0.307, 1.0]),
)
@example([0, 0, 0], 1, 1.0, 0.0)  # equals of the k-th are kept with it
@example([2, 1, 1, 0], 0, 0.6, 0.0)  # equals are kept or dropped together
def test_kept_tokens(values, top_k, top_p, min_p):
    scaled = [value / 2 for value in values]
    kept = reference._kept_tokens(
        ints([scaled], f32), ints([top_k]), ints([top_p], f32), ints([min_p], f32)
    )
    assert set(kept[0].nonzero()[:, 0].tolist()) == kept_by_hand(scaled, top_k, top_p, min_p)
