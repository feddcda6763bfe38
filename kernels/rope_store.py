"""QK-norm, RoPE and the write of k and v to the KV cache, in one pass over qkv."""

import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import launch_options, let_next_start, wait_for_previous
from kernels.tile import (
    cdiv,
    next_power_of_2,
    output,
    require_shape,
    require_unit_stride,
    require_vector,
)

BLOCK_H = 16  # query heads of a program that has no others: enough programs for few tokens
MANY_TOKENS = 3072  # from here on a program has all of a token: its angles are loaded once
MAX_ELEMENTS = 12288  # of a token, beyond which no program has all: its registers would not do
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
    BLOCK_H_KV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KV_APART: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program takes BLOCK_H query heads of one token and its keys and values, unless these are
    apart: then the last program of the token takes them."""
    if KV_APART:
        let_next_start(PDL)
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    HALF: tl.constexpr = D // 2
    offs_half = tl.arange(0, BLOCK_D // 2)
    mask_half = (offs_half < HALF)[None, :]
    position = tl.load(positions_ptr + token).to(tl.int64)
    angle_ptrs = cos_sin_ptr + position * stride_cos_sin + offs_half[None, :]
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)

    head = part * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    q_ptrs = qkv_ptr + token * stride_qkv_t + head * D + offs_half[None, :]
    out_ptrs = out_ptr + token * stride_o_t + head * stride_o_h + offs_half[None, :]
    mask_q = (head < H) & mask_half

    kv_head = tl.arange(0, BLOCK_H_KV)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    k_ptrs = qkv_ptr + token * stride_qkv_t + (H + kv_head) * D + offs_half[None, :]
    v_ptrs = qkv_ptr + token * stride_qkv_t + (H + H_KV + kv_head) * D + offs_d
    stored_ptrs = kv_cache_ptr + (slot // BLOCK_SIZE) * stride_kv_block
    stored_ptrs += (slot % BLOCK_SIZE) * stride_kv_slot + kv_head * stride_kv_head
    mask_k = (kv_head < H_KV) & mask_half
    mask_v = (kv_head < H_KV) & (offs_d < D)
    k_stored_ptrs = stored_ptrs + offs_half[None, :]
    v_stored_ptrs = stored_ptrs + stride_kv_pair + offs_d
    is_stored = kv_head < tl.where(slot >= 0, H_KV, 0)

    if KV_APART:
        cos, sin = _load_halves(angle_ptrs, HALF, mask_half)  # weights: no kernel writes them
        wait_for_previous(PDL)
        if part < tl.num_programs(1) - 1:
            q_a, q_b = _load_halves(q_ptrs, HALF, mask_q)
            q_a, q_b = _normed(q_a, q_b, q_norm_ptr, eps, offs_half, D, QK_NORM)
            _store_rotated(out_ptrs, q_a, q_b, cos, sin, HALF, mask_q)
        else:
            k_a, k_b = _load_halves(k_ptrs, HALF, mask_k)
            v = tl.load(v_ptrs, mask=mask_v, other=0.0)
            k_a, k_b = _normed(k_a, k_b, k_norm_ptr, eps, offs_half, D, QK_NORM)
            _store_rotated(k_stored_ptrs, k_a, k_b, cos, sin, HALF, mask_k & is_stored)
            tl.store(v_stored_ptrs, v, mask=mask_v & is_stored)
    else:
        wait_for_previous(PDL)
        # q, k and v are loaded before anything is stored: a program waits for them once
        q_a, q_b = _load_halves(q_ptrs, HALF, mask_q)
        k_a, k_b = _load_halves(k_ptrs, HALF, mask_k)
        v = tl.load(v_ptrs, mask=mask_v, other=0.0)
        let_next_start(PDL)  # not before: there memory is short, and 8192 tokens take 6 % longer
        cos, sin = _load_halves(angle_ptrs, HALF, mask_half)
        q_a, q_b = _normed(q_a, q_b, q_norm_ptr, eps, offs_half, D, QK_NORM)
        k_a, k_b = _normed(k_a, k_b, k_norm_ptr, eps, offs_half, D, QK_NORM)
        _store_rotated(out_ptrs, q_a, q_b, cos, sin, HALF, mask_q)
        _store_rotated(k_stored_ptrs, k_a, k_b, cos, sin, HALF, mask_k & is_stored)
        tl.store(v_stored_ptrs, v, mask=mask_v & is_stored)


@triton.jit
def _load_halves(ptrs, HALF: tl.constexpr, mask):
    """Both halves of rows. ptrs, mask: of the first."""
    return tl.load(ptrs, mask=mask, other=0.0), tl.load(ptrs + HALF, mask=mask, other=0.0)


@triton.jit
def _normed(a, b, weight_ptr, eps, offs_half, D: tl.constexpr, QK_NORM: tl.constexpr):
    """Halves of heads in fp32, normed where there are weights."""
    a, b = a.to(tl.float32), b.to(tl.float32)
    if QK_NORM:
        mask = offs_half < D // 2
        weight_a = tl.load(weight_ptr + offs_half, mask=mask, other=0.0)[None, :]
        weight_b = tl.load(weight_ptr + D // 2 + offs_half, mask=mask, other=0.0)[None, :]
        rstd = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / D + eps)[:, None]
        a, b = a * rstd * weight_a.to(tl.float32), b * rstd * weight_b.to(tl.float32)
    return a, b


@triton.jit
def _store_rotated(ptrs, a, b, cos, sin, HALF: tl.constexpr, mask):
    tl.store(ptrs, (a * cos - b * sin).to(ptrs.dtype.element_ty), mask=mask)
    tl.store(ptrs + HALF, (b * cos + a * sin).to(ptrs.dtype.element_ty), mask=mask)


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
    slots = kv_cache.shape[0], 2, block_size
    require_shape("kv_cache", kv_cache, *slots, num_kv_heads, head_dim)
    require_vector("positions", positions, num_tokens)
    require_vector("slot_mapping", slot_mapping, num_tokens)
    require_shape("cos_sin", cos_sin, cos_sin.shape[0], head_dim)
    norms = {"q_norm_weight": q_norm_weight, "k_norm_weight": k_norm_weight}
    given = {name: weight for name, weight in norms.items() if weight is not None}
    if len(given) == 1:
        raise ValueError(f"{' and '.join(norms)} must be given both or neither, got {min(given)}")
    for name, weight in given.items():
        require_vector(name, weight, head_dim)
    for name, tensor in (("qkv", qkv), ("cos_sin", cos_sin), ("kv_cache", kv_cache)):
        require_unit_stride(name, tensor)
    out = output(out, (num_tokens, num_heads, head_dim), qkv)
    if num_tokens == 0:
        return out
    block_h, block_h_kv = next_power_of_2(num_heads), next_power_of_2(num_kv_heads)
    block_d = next_power_of_2(head_dim)
    fits = (block_h + 2 * block_h_kv) * block_d <= MAX_ELEMENTS
    kv_apart = num_tokens < MANY_TOKENS or not fits
    if kv_apart:
        block_h = min(block_h, BLOCK_H)
    grid = (num_tokens, cdiv(num_heads, block_h) + kv_apart)
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
        BLOCK_H_KV=block_h_kv,
        BLOCK_D=block_d,
        KV_APART=kv_apart,
        num_warps=NUM_WARPS,
        **launch_options(qkv.device),
    )
    return out
