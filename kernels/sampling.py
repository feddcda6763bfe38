"""Logits to token ids on the device: temperature, top-k, top-p, min-p, a seed for every request.

Three launches. The first finds each row's smallest kept logit by bisection over the bits of its
floats, so nothing is sorted; the second takes the largest of logit / temperature + Gumbel noise per
piece of the vocabulary; the third takes the largest piece.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import launch_options, wait_for_inputs
from kernels.tile import cdiv, next_power_of_2, require_shape, require_unit_stride

BLOCK_V = 1024  # tokens a program looks at in each of the four quarters of the vocabulary
SCAN_BLOCK_V = 2048  # tokens of one step of a pass over a row


@triton.jit
def _float_to_key(x):
    """A uint32 that orders as the fp32 values do."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000)


@triton.jit
def _key_to_float(key):
    bits = tl.where((key >> 31) != 0, key & 0x7FFFFFFF, ~key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _scan_row(row_ptr, V, pivot, floor, top, inv_temperature, BLOCK_V: tl.constexpr):
    """(count of logits >= pivot, their mass relative to top without those below floor)."""
    count = tl.zeros([BLOCK_V], tl.int32)
    mass = tl.zeros([BLOCK_V], tl.float32)
    for v in range(0, V, BLOCK_V):
        offs_v = v + tl.arange(0, BLOCK_V)
        x = tl.load(row_ptr + offs_v, mask=offs_v < V, other=float("-inf")).to(tl.float32)
        above = (x >= pivot) & (offs_v < V)
        count += above.to(tl.int32)
        mass += tl.where(above & (x >= floor), tl.exp((x - top) * inv_temperature), 0.0)
    return tl.sum(count, axis=0), tl.sum(mass, axis=0)


@triton.jit
def _largest_pivot(
    row_ptr, V, want, floor, top, inv_temperature, BY_MASS: tl.constexpr, NUM_BITS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The largest value with `want` logits, or that much mass, at or above it: bit by bit."""
    key = tl.zeros([], tl.uint32)
    for bit in range(NUM_BITS):
        trial = key | (tl.full([], 1, tl.uint32) << (31 - bit))
        count, mass = _scan_row(
            row_ptr, V, _key_to_float(trial), floor, top, inv_temperature, BLOCK_V
        )
        enough = mass >= want if BY_MASS else count >= want
        key = tl.where(enough, trial, key)
    # keys under that of -inf stand for NaNs
    return tl.where(key < 0x007FFFFF, float("-inf"), _key_to_float(key))


@triton.jit
def _threshold_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    threshold_ptr,
    V,
    stride_l_b,
    NUM_BITS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program finds the smallest logit that its row keeps. NUM_BITS: how many bits of a logit's
    fp32 pattern, from the top, its dtype can set."""
    wait_for_inputs(PDL)
    b = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + b)
    top_k, top_p = tl.load(top_k_ptr + b), tl.load(top_p_ptr + b)
    min_p = tl.load(min_p_ptr + b)
    threshold = float("-inf")
    limits_k = (top_k > 0) & (top_k < V)
    if (temperature > 0.0) & (limits_k | (top_p < 1.0) | (min_p > 0.0)):
        row_ptr = logits_ptr + b * stride_l_b
        highest = tl.full([BLOCK_V], float("-inf"), tl.float32)
        for v in range(0, V, BLOCK_V):
            offs_v = v + tl.arange(0, BLOCK_V)
            x = tl.load(row_ptr + offs_v, mask=offs_v < V, other=float("-inf"))
            highest = tl.maximum(highest, x.to(tl.float32))
        top = tl.max(highest, axis=0)
        inv = 1.0 / temperature
        if limits_k:
            threshold = _largest_pivot(row_ptr, V, top_k, top, top, inv, False, NUM_BITS, BLOCK_V)
        if top_p < 1.0:
            floor = threshold
            _, total = _scan_row(row_ptr, V, floor, floor, top, inv, BLOCK_V)
            pivot = _largest_pivot(
                row_ptr, V, top_p * total, floor, top, inv, True, NUM_BITS, BLOCK_V
            )
            threshold = tl.maximum(threshold, pivot)
        if min_p > 0.0:
            threshold = tl.maximum(threshold, top + tl.log(min_p) * temperature)
    tl.store(threshold_ptr + b, threshold)


@triton.jit
def _best_of_quarter(best, index, row_ptr, bits, offs_v, V, threshold, temperature):
    """Fold one quarter's scores into the best so far. bits: [BLOCK_V] uint32 of noise."""
    x = tl.load(row_ptr + offs_v, mask=offs_v < V, other=float("-inf")).to(tl.float32)
    if temperature > 0.0:
        uniform = ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2 ** -23
        noisy = x / temperature - tl.log(-tl.log(uniform))
        x = tl.where(x >= threshold, noisy, float("-inf"))
    # quarters come in rising order of token ids: of equals the first stays
    better = x > best
    return tl.where(better, x, best), tl.where(better, offs_v, index)


@triton.jit
def _gumbel_max_kernel(
    logits_ptr,
    temperature_ptr,
    threshold_ptr,
    seeds_ptr,
    steps_ptr,
    best_ptr,
    index_ptr,
    V,
    stride_l_b,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program takes BLOCK_V tokens of each quarter of one row's vocabulary."""
    wait_for_inputs(PDL)
    b = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    quarter = tl.cdiv(V, 4)
    offs_q = piece * BLOCK_V + tl.arange(0, BLOCK_V)
    row_ptr = logits_ptr + b * stride_l_b
    temperature, threshold = tl.load(temperature_ptr + b), tl.load(threshold_ptr + b)
    zero = tl.zeros([BLOCK_V], tl.uint32)
    bits_0, bits_1, bits_2, bits_3 = zero, zero, zero, zero
    if temperature > 0.0:
        step = zero + tl.load(steps_ptr + b).to(tl.uint32)
        bits_0, bits_1, bits_2, bits_3 = tl.philox(
            tl.load(seeds_ptr + b), offs_q.to(tl.uint32), step, zero, zero
        )
    best = tl.full([BLOCK_V], float("-inf"), tl.float32)
    last = tl.full([BLOCK_V], V, tl.int32)
    # past the end of a quarter the next one begins: V masks those tokens
    inside = offs_q < quarter
    best, index = _best_of_quarter(
        best, last, row_ptr, bits_0, tl.where(inside, offs_q, V), V, threshold, temperature
    )
    best, index = _best_of_quarter(
        best, index, row_ptr, bits_1, tl.where(inside, offs_q + quarter, V), V, threshold,
        temperature,
    )  # fmt: skip
    best, index = _best_of_quarter(
        best, index, row_ptr, bits_2, tl.where(inside, offs_q + 2 * quarter, V), V, threshold,
        temperature,
    )  # fmt: skip
    best, index = _best_of_quarter(
        best, index, row_ptr, bits_3, tl.where(inside, offs_q + 3 * quarter, V), V, threshold,
        temperature,
    )  # fmt: skip
    top = tl.max(best, axis=0)
    first = tl.min(tl.where(best == top, index, V), axis=0)
    tl.store(best_ptr + b * tl.num_programs(1) + piece, top)
    tl.store(index_ptr + b * tl.num_programs(1) + piece, first)


@triton.jit
def _best_piece_kernel(
    best_ptr,
    index_ptr,
    out_ptr,
    V,
    NUM_PIECES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program picks one row's token among the pieces' best."""
    wait_for_inputs(PDL)
    b = tl.program_id(0).to(tl.int64)
    offs_p = tl.arange(0, BLOCK_P)
    mask_p = offs_p < NUM_PIECES
    best = tl.load(best_ptr + b * NUM_PIECES + offs_p, mask=mask_p, other=float("-inf"))
    index = tl.load(index_ptr + b * NUM_PIECES + offs_p, mask=mask_p, other=V)
    token_id = tl.min(tl.where(best == tl.max(best, axis=0), index, V), axis=0)
    # a row of nothing but -inf or NaN still names a token: what follows looks it up
    tl.store(out_ptr + b, tl.where(token_id < V, token_id, 0).to(tl.int64))


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    steps: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """One token id per row, by the Gumbel-max trick over kept tokens. logits: [B, V] -> [B] int64.

    temperature: [B] fp32, 0 takes the largest logit (the first of equals); top_k: [B] int32, 0 for
    all; top_p: [B] fp32 in (0, 1]; min_p: [B] fp32 in [0, 1]; seeds: [B] int64; steps: [B] int32,
    which draw of its seed a row makes, so that a row's token does not depend on the other rows.
    What is kept is said at `kernels.reference.sample`. The noise is Philox4x32-10 (Salmon et al.,
    2011). Raises ValueError where a shape or a stride does not fit.
    """
    num_rows, vocab_size = logits.shape
    require_unit_stride("logits", logits)
    for name, tensor in (
        ("temperature", temperature),
        ("top_k", top_k),
        ("top_p", top_p),
        ("min_p", min_p),
        ("seeds", seeds),
        ("steps", steps),
    ):
        require_shape(name, tensor, num_rows)
    if out is None:
        out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    require_shape("out", out, num_rows)
    if num_rows == 0:
        return out
    num_pieces = cdiv(cdiv(vocab_size, 4), BLOCK_V)
    options = launch_options(logits.device)
    threshold = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    best = torch.empty(num_rows, num_pieces, dtype=torch.float32, device=logits.device)
    index = torch.empty(num_rows, num_pieces, dtype=torch.int32, device=logits.device)
    _threshold_kernel[(num_rows,)](
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        threshold,
        vocab_size,
        logits.stride(0),
        NUM_BITS={torch.bfloat16: 16, torch.float16: 19}.get(logits.dtype, 32),
        BLOCK_V=SCAN_BLOCK_V,
        num_warps=8,
        **options,
    )
    _gumbel_max_kernel[(num_rows, num_pieces)](
        logits,
        temperature,
        threshold,
        seeds,
        steps,
        best,
        index,
        vocab_size,
        logits.stride(0),
        BLOCK_V=BLOCK_V,
        num_warps=4,
        **options,
    )
    _best_piece_kernel[(num_rows,)](
        best,
        index,
        out,
        vocab_size,
        NUM_PIECES=num_pieces,
        BLOCK_P=next_power_of_2(num_pieces),
        num_warps=1,
        **options,
    )
    return out
