"""QK-norm, RoPE and the write of k and v to the KV cache, in one pass over qkv."""

import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import launch_options, wait_for_inputs
from kernels.tile import cdiv, next_power_of_2, output, require_shape, require_unit_stride

BLOCK_H = 16  # heads of a program: enough programs where tokens are few
MANY_TOKENS = 1024  # from here on a program has all heads of a token: its angles are loaded once
MAX_HALVES = 4096  # elements of halves of heads that a program has room for
NUM_WARPS = 4


@triton.jit
def _rope_store_kernel(
    qkv_ptr,
    positions_ptr,
    cos_sin_ptr,
    slot_mapping_ptr,
    kv_cache_ptr,
    q_norm_ptr,
    k_norm_ptr,
    out_ptr,
    eps,
    stride_qkv_t,
    stride_cos_sin,
    stride_kv_block,
    stride_kv_pair,
    stride_kv_slot,
    stride_kv_head,
    stride_o_t,
    stride_o_h,
    H: tl.constexpr,
    H_KV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QK_NORM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program takes BLOCK_H heads of one token; heads run over q, then k, then v."""
    wait_for_inputs(PDL)
    HALF: tl.constexpr = D // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_d = tl.arange(0, BLOCK_HALF)
    mask = (head < H + 2 * H_KV)[:, None] & (offs_d < HALF)[None, :]
    is_q = (head < H)[:, None]
    is_v = (head >= H + H_KV)[:, None]
    qkv_ptrs = qkv_ptr + token * stride_qkv_t + head[:, None] * D + offs_d[None, :]
    raw_a = tl.load(qkv_ptrs, mask=mask, other=0.0)  # [BLOCK_H, HALF]
    raw_b = tl.load(qkv_ptrs + HALF, mask=mask, other=0.0)
    a, b = raw_a.to(tl.float32), raw_b.to(tl.float32)
    mask_d = offs_d < HALF
    if QK_NORM:
        rstd = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / D + eps)[:, None]
        q_norm_a = tl.load(q_norm_ptr + offs_d, mask=mask_d, other=0.0)[None, :]
        q_norm_b = tl.load(q_norm_ptr + HALF + offs_d, mask=mask_d, other=0.0)[None, :]
        k_norm_a = tl.load(k_norm_ptr + offs_d, mask=mask_d, other=0.0)[None, :]
        k_norm_b = tl.load(k_norm_ptr + HALF + offs_d, mask=mask_d, other=0.0)[None, :]
        a = a * rstd * tl.where(is_q, q_norm_a, k_norm_a).to(tl.float32)
        b = b * rstd * tl.where(is_q, q_norm_b, k_norm_b).to(tl.float32)

    angle_ptrs = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * stride_cos_sin + offs_d
    cos = tl.load(angle_ptrs, mask=mask_d, other=0.0)[None, :]
    sin = tl.load(angle_ptrs + HALF, mask=mask_d, other=0.0)[None, :]
    first = (a * cos - b * sin).to(raw_a.dtype)
    second = (b * cos + a * sin).to(raw_a.dtype)
    first = tl.where(is_v, raw_a, first)
    second = tl.where(is_v, raw_b, second)

    out_ptrs = out_ptr + token * stride_o_t + head[:, None] * stride_o_h + offs_d[None, :]
    tl.store(out_ptrs, first, mask=mask & is_q)
    tl.store(out_ptrs + HALF, second, mask=mask & is_q)
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
    kv_head = tl.where(is_v, head[:, None] - H - H_KV, head[:, None] - H)
    kv_ptrs = kv_cache_ptr + (slot // BLOCK_SIZE) * stride_kv_block
    kv_ptrs += (slot % BLOCK_SIZE) * stride_kv_slot + tl.where(is_v, 1, 0) * stride_kv_pair
    kv_ptrs += kv_head * stride_kv_head + offs_d[None, :]
    stored = mask & (tl.where(slot >= 0, head, -1) >= H)[:, None]
    tl.store(kv_ptrs, first.to(kv_cache_ptr.dtype.element_ty), mask=stored)
    tl.store(kv_ptrs + HALF, second.to(kv_cache_ptr.dtype.element_ty), mask=stored)


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

    qkv: [T, (H + 2 * H_KV) * D]; positions: [T] int; cos_sin: [max_position, D] fp32, cosines then
    sines; slot_mapping: [T] int64, negative for a token that is not stored; kv_cache: one layer
    [num_blocks, 2, block_size, H_KV, D]; q_norm_weight, k_norm_weight: [D], both or neither
    -> [T, H, D]. Raises ValueError where a shape or a stride does not fit.
    """
    _, _, block_size, num_kv_heads, head_dim = kv_cache.shape
    num_tokens, width = qkv.shape
    num_heads = width // head_dim - 2 * num_kv_heads
    if width % head_dim or num_heads < 1:
        wanted = f"(H + 2 * {num_kv_heads}) * {head_dim}"
        raise ValueError(f"qkv must be [T, {wanted}], got {list(qkv.shape)}")
    require_shape("positions", positions, num_tokens)
    require_shape("slot_mapping", slot_mapping, num_tokens)
    require_shape("cos_sin", cos_sin, cos_sin.shape[0], head_dim)
    if (q_norm_weight is None) != (k_norm_weight is None):
        raise ValueError("q_norm_weight and k_norm_weight must be given both or neither")
    for name, tensor in (("q_norm_weight", q_norm_weight), ("k_norm_weight", k_norm_weight)):
        if tensor is not None:
            require_shape(name, tensor, head_dim)
            require_unit_stride(name, tensor)
    require_unit_stride("positions", positions)
    require_unit_stride("slot_mapping", slot_mapping)
    require_unit_stride("qkv", qkv)
    require_unit_stride("kv_cache", kv_cache)
    out = output(out, (num_tokens, num_heads, head_dim), qkv)
    if num_tokens == 0:
        return out
    half, all_heads = next_power_of_2(head_dim // 2), num_heads + 2 * num_kv_heads
    block_h = BLOCK_H
    if num_tokens >= MANY_TOKENS:
        block_h = min(next_power_of_2(all_heads), MAX_HALVES // half)
    grid = (num_tokens, cdiv(all_heads, block_h))
    _rope_store_kernel[grid](
        qkv,
        positions,
        cos_sin,
        slot_mapping,
        kv_cache,
        q_norm_weight,
        k_norm_weight,
        out,
        eps,
        qkv.stride(0),
        cos_sin.stride(0),
        *kv_cache.stride()[:4],
        out.stride(0),
        out.stride(1),
        H=num_heads,
        H_KV=num_kv_heads,
        D=head_dim,
        BLOCK_SIZE=block_size,
        QK_NORM=q_norm_weight is not None,
        BLOCK_H=block_h,
        BLOCK_HALF=half,
        num_warps=NUM_WARPS,
        **launch_options(qkv.device),
    )
    return out
