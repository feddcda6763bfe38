"""Every launcher of `kernels` again in plain PyTorch: the formula, in fp32, nothing clever.

A whole model runs on this namespace in place of `kernels` wherever there is no GPU. Like the
launchers, the functions here write into `out` where it is given and allocate it where it is not.
"""

import math

import torch
from torch import Tensor

PHILOX_ROUNDS = 10


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """Normalise the last dim. x: [T, N], weight: [N] -> [T, N]."""
    return _store(_rms_norm32(x, weight, eps), x.dtype, out)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None
) -> Tensor:
    """residual += x in place, then normalise it. x, residual: [T, N] -> [T, N]."""
    summed = x.float() + residual.float()
    residual.copy_(summed)
    return _store(_rms_norm32(summed, weight, eps), x.dtype, out)


def row_rstd(x: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """1 / rms of each row: what RMSNorm multiplies it by. x: [T, N] -> [T] fp32."""
    return _store((x.float().square().mean(-1) + eps).rsqrt(), torch.float32, out)


def matmul_workspace(device: torch.device | str) -> None:
    """The scratch that products need here: none."""


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    rms_eps: float | None = None,
    *,
    rstd: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x @ weight.T + bias + residual. x: [T, K], weight: [N, K] -> [T, N].

    rms_eps asks for rows of x scaled to a root mean square of one first: RMSNorm, whose weight is
    folded into `weight`; bias: [N]; residual: [T, N], which may be `out` itself; rstd is scratch of
    the launcher and not needed here.
    """
    x32 = x.float() if rms_eps is None else x.float() * row_rstd(x, rms_eps)[:, None]
    y = torch.nn.functional.linear(x32, weight.float(), None if bias is None else bias.float())
    return _store(y if residual is None else y + residual.float(), x.dtype, out)


def gate_up(
    x: Tensor,
    weight: Tensor,
    rms_eps: float | None = None,
    *,
    rstd: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """silu(gate) * up of the normalised x. x: [T, N], weight: [2 * I, N], gate first -> [T, I].

    rms_eps is as in `linear`; rstd is scratch of the launcher and not needed here.
    """
    x32 = x.float() if rms_eps is None else x.float() * row_rstd(x, rms_eps)[:, None]
    gate, up = torch.nn.functional.linear(x32, weight.float()).chunk(2, dim=-1)
    return _store(torch.nn.functional.silu(gate) * up, x.dtype, out)


def mlp(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    rms_eps: float | None = None,
    *,
    rstd: Tensor | None = None,
    act: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x + down(silu(gate(norm(x))) * up(norm(x))). x: [T, N], gate_up_weight: [2 * I, N],
    down_weight: [N, I] -> [T, N].

    rms_eps is as in `linear`; act: [T, I] takes the intermediate; out may be x itself; rstd is not
    needed here.
    """
    act = gate_up(x, gate_up_weight, rms_eps, out=act)
    return linear(act, down_weight, residual=x, out=out)


def rope_store(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 0.0,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """QK-norm and RoPE on q and k; k and v written to their slots; q returned.

    qkv: [T, (H + 2 * H_KV) * D]; positions: [T] int; cos_sin: [max_position, D] fp32, the
    cosines of the D / 2 frequencies and then their sines; slot_mapping: [T] int64, block *
    block_size + offset, negative for a token that is not stored; kv_cache: one layer
    [num_blocks, 2, block_size, H_KV, D]; q_norm_weight, k_norm_weight: [D] or None -> [T, H, D].
    """
    _, _, block_size, num_kv_heads, head_dim = kv_cache.shape
    heads = qkv.view(len(qkv), qkv.shape[1] // head_dim, head_dim)
    q, k, v = heads.split([heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    q32 = q.float() if q_norm_weight is None else _rms_norm32(q, q_norm_weight, eps)
    k32 = k.float() if k_norm_weight is None else _rms_norm32(k, k_norm_weight, eps)
    angles = cos_sin[positions.long()]
    stored = slot_mapping >= 0
    slots = slot_mapping[stored].long()
    blocks, offsets = slots // block_size, slots % block_size
    kv_cache[blocks, 0, offsets] = _rotate(k32, angles)[stored].to(kv_cache.dtype)
    kv_cache[blocks, 1, offsets] = v[stored].to(kv_cache.dtype)
    return _store(_rotate(q32, angles), qkv.dtype, out)


def prefill_attention(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    max_query_len: int,
    scale: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of ragged queries over their paged context, cached prefix included.

    q: [T, H, D], the requests' new tokens one after the other; kv_cache: one layer [num_blocks, 2,
    block_size, H_KV, D], new tokens already stored; block_table: [B, max_blocks] int32; cu_seqlens:
    [B + 1] int32, where each request's queries start; context_lens: [B] int32, prefix and new
    tokens; max_query_len: at least the longest of the queries' lengths -> [T, H, D].
    """
    out = torch.empty_like(q) if out is None else out
    starts = cu_seqlens.tolist()
    for b, context_len in enumerate(context_lens.tolist()):
        rows = slice(starts[b], starts[b + 1])
        k, v = _gather_kv(kv_cache, block_table[b], context_len)
        first = context_len - (rows.stop - rows.start)
        query_positions = torch.arange(first, context_len, device=q.device)
        hidden = torch.arange(context_len, device=q.device)[None] > query_positions[:, None]
        out[rows] = _attend(q[rows], k, v, scale, hidden).to(q.dtype)
    return out


def decode_workspace(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device | str,
    *,
    max_context: int | None = None,
) -> None:
    """The scratch that `decode_attention` needs here: none."""


def decode_attention(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    workspace: None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of one new token per request over its paged context.

    q: [B, H, D]; kv_cache: one layer [num_blocks, 2, block_size, H_KV, D]; block_table:
    [B, max_blocks] int32; context_lens: [B] int32, this token included, 0 for a padding row, whose
    output is zeros -> [B, H, D].
    """
    out = torch.empty_like(q) if out is None else out
    for b, context_len in enumerate(context_lens.tolist()):
        k, v = _gather_kv(kv_cache, block_table[b], context_len)
        out[b] = _attend(q[b : b + 1], k, v, scale, None)[0].to(q.dtype) if context_len else 0
    return out


def copy_blocks(src: Tensor, dst: Tensor, src_ids: Tensor, dst_ids: Tensor) -> None:
    """dst[dst_ids] = src[src_ids]. src, dst: [num_blocks, ...], ids: [n] int, dst_ids distinct."""
    # one by one: where torch is told to be deterministic, dst[ids] = ... rewrites all of a slice,
    # blocks that others write meanwhile included
    for from_block, to_block in zip(src_ids.tolist(), dst_ids.tolist(), strict=True):
        dst[to_block].copy_(src[from_block])


def sample_workspace(max_rows: int, vocab_size: int, device: torch.device | str) -> None:
    """The scratch that `sample` needs here: none."""


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    steps: Tensor,
    *,
    workspace: None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One token id per row, by inverting the CDF of its kept tokens. logits: [B, V] -> [B] int64.

    temperature: [B] fp32, 0 takes the largest logit (the first of equals); top_k: [B] int32, 0 for
    all; top_p: [B] fp32 in (0, 1]; min_p: [B] fp32 in [0, 1]; seeds: [B] int64; steps: [B] int32,
    which draw of its seed a row makes, so that a row's token does not depend on the other rows.

    A token is kept where fewer than top_k are larger, where those larger hold less than top_p of
    the probability among the top_k, and where it has at least min_p times the largest probability;
    equal logits are kept or dropped together. Drawn is the first kept token at which the running
    sum of probabilities, in the order of token ids and in fp64, passes `uniform(seeds, steps)`. A
    NaN is taken for -inf, and inf for the largest finite number; a row of -inf alone gives token 0.
    """
    greedy = temperature <= 0
    clean = logits.double().nan_to_num(-math.inf, torch.finfo(torch.float32).max, -math.inf)
    scaled = clean / torch.where(greedy, 1.0, temperature)[:, None]
    plain = greedy | ((top_k <= 0) & (top_p >= 1) & (min_p <= 0))
    if not bool(plain.all()):
        kept = _kept_tokens(scaled, top_k, top_p, min_p) | plain[:, None]
        scaled = scaled.masked_fill(~kept, -math.inf)
    top = scaled.amax(-1, keepdim=True)
    weights = torch.exp(scaled - torch.where(top.isinf(), 0.0, top))
    sums = weights.cumsum(-1)
    beyond = (sums > uniform(seeds, steps)[:, None] * sums[:, -1:]) & (weights > 0)
    return _store(
        torch.where(greedy[:, None], scaled == top, beyond).int().argmax(-1), torch.int64, out
    )


def uniform(seeds: Tensor, steps: Tensor) -> Tensor:
    """The number in (0, 1) of row b for its draw steps[b]: 52 bits, an odd multiple of 2**-53.

    seeds: [B] int64, steps: [B] -> [B] fp64. The bits are the upper 26 of the first word and of the
    second of the Philox block with counter (0, step).
    """
    high, low, _, _ = _philox4x32(seeds, torch.zeros_like(seeds), steps.long())
    return ((((high >> 6) << 26) | (low >> 6)).double() + 0.5) * 2.0**-52


def _philox4x32(seed: Tensor, c0: Tensor, c1: Tensor) -> list[Tensor]:
    """The four outputs for counter (c0, c1, 0, 0), each in 0..2**32 - 1 as int64."""
    low32 = 0xFFFFFFFF
    c = [c0 & low32, c1 & low32, torch.zeros_like(c0), torch.zeros_like(c0)]
    k0, k1 = seed & low32, (seed >> 32) & low32
    for _ in range(PHILOX_ROUNDS):
        high_a, low_a = _mul32(0xD2511F53, c[0])
        high_b, low_b = _mul32(0xCD9E8D57, c[2])
        c = [high_b ^ c[1] ^ k0, low_b, high_a ^ c[3] ^ k1, low_a]
        k0, k1 = (k0 + 0x9E3779B9) & low32, (k1 + 0xBB67AE85) & low32
    return c


def _mul32(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, both unsigned 32-bit values held in int64."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def _kept_tokens(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Which tokens survive top-k, then top-p, then min-p. scaled: [B, V] -> [B, V] bool."""
    vocab_size = scaled.shape[1]
    values, order = scaled.sort(dim=-1, descending=True)
    last = torch.where((top_k <= 0) | (top_k > vocab_size), vocab_size, top_k).long() - 1
    kept = values >= values.gather(1, last[:, None])
    probs = torch.softmax(values.masked_fill(~kept, -math.inf), dim=-1)
    # equal logits have equal mass above them: that of the first of their run
    mass_above = probs.cumsum(-1) - probs
    run_start = torch.searchsorted(-values, -values)
    kept &= (mass_above.gather(1, run_start) < top_p[:, None]) | (top_p[:, None] >= 1)
    kept &= probs >= min_p[:, None] * probs[:, :1]
    return torch.zeros_like(kept).scatter_(1, order, kept)


def _store(value: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    return value.to(dtype) if out is None else out.copy_(value)


def _rms_norm32(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return x32 * (x32.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the two halves of each head against each other. x: [T, H, D], angles: [T, D]."""
    cos, sin = angles.float()[:, None].chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _gather_kv(kv_cache: Tensor, block_ids: Tensor, context_len: int) -> Tensor:
    """The context's keys and values in order. -> [2, context_len, H_KV, D] fp32."""
    block_size = kv_cache.shape[2]
    num_blocks = -(-context_len // block_size)
    kv = kv_cache[block_ids[:num_blocks].long()].float()
    return kv.transpose(0, 1).flatten(1, 2)[:, :context_len]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor | None) -> Tensor:
    """Softmax attention of q: [M, H, D] over k, v: [S, H_KV, D] fp32 -> [M, H, D] fp32."""
    num_queries, num_heads, head_dim = q.shape
    group = num_heads // k.shape[1]
    q32 = q.float().view(num_queries, k.shape[1], group, head_dim)
    scores = torch.einsum("mkgd,skd->kgms", q32, k) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    return torch.einsum("kgms,skd->mkgd", scores.softmax(-1), v).reshape(q.shape)
