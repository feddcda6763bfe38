"""What plain PyTorch makes of it in the inputs' own dtype, every step rounded: how far off a kernel
may be, by the rule that FlashAttention is held to."""

import torch
from torch import Tensor
from torch.nn import functional

from kernels import reference
from tests.strategies import PagedBatch


def assert_no_worse_than_torch(actual: Tensor, plain: Tensor, expected: Tensor) -> None:
    """max|actual - expected| <= 2 max|plain - expected| + 2 max|(expected + 0.3 - 0.3) - expected|.

    expected is the reference in fp32, plain PyTorch's result in actual's dtype, in which the last
    term, a rounding of the largest values, is evaluated. The house rule, `assert_close`, stands
    beside it: this one bounds the worst element alone, by what others get.
    """
    assert expected.dtype == torch.float32 and actual.dtype == plain.dtype
    assert actual.shape == plain.shape == expected.shape
    rounded = expected.to(actual.dtype)
    nudge = _worst(rounded + 0.3 - 0.3, rounded)
    limit = 2 * _worst(plain, expected) + 2 * nudge
    error = _worst(actual, expected)
    assert error <= limit, f"off by {error:.3g}, where torch allows {limit:.3g}"  # NaN is bad


def _worst(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max()) if a.numel() else 0.0


def attention(batch: PagedBatch) -> Tensor:
    """Causal attention of each request by itself; zeros for a padding row. -> like batch.q."""
    out = torch.zeros_like(batch.q)
    starts = batch.cu_seqlens.tolist()
    for b, context_len in enumerate(batch.context_lens.tolist()):
        rows = slice(starts[b], starts[b + 1])
        if context_len and rows.start < rows.stop:
            kv = reference._gather_kv(batch.kv_cache, batch.block_table[b], context_len)
            out[rows] = _attend(batch.q[rows], *kv.to(batch.q.dtype), batch.scale)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q: [T, H, D], of the last T tokens of k, v: [S, H_KV, D] -> [T, H, D]."""
    num_queries, num_keys = len(q), len(k)
    grouped = q.unflatten(1, (k.shape[1], -1))  # [T, H_KV, GROUP, D]
    scores = torch.einsum("tkgd,skd->kgts", grouped * scale, k)
    last_seen = torch.arange(num_keys - num_queries, num_keys, device=q.device)
    hidden = torch.arange(num_keys, device=q.device) > last_seen[:, None]
    probs = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("kgts,skd->tkgd", probs, v).flatten(1, 2)


def normed(x: Tensor, eps: float | None) -> Tensor:
    """Rows at a root mean square of one, or x itself without eps."""
    return x if eps is None else functional.rms_norm(x, x.shape[-1:], eps=eps)


def linear(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """x: [T, K], weight: [N, K] -> [T, N]."""
    y = functional.linear(normed(x, eps), weight)
    return y if residual is None else y + residual


def gate_up(x: Tensor, weight: Tensor, eps: float | None = None) -> Tensor:
    """x: [T, N], weight: [2 * I, N] -> [T, I]."""
    gate, up = functional.linear(normed(x, eps), weight).chunk(2, dim=-1)
    return functional.silu(gate) * up


def mlp(x: Tensor, gate_up_weight: Tensor, down_weight: Tensor, eps: float) -> Tensor:
    """x: [T, N] -> [T, N]."""
    return linear(gate_up(x, gate_up_weight, eps), down_weight, x)
