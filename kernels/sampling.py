"""Logits to token ids on the device: temperature, top-k, top-p, min-p, a seed for every request.

The vocabulary is cut into pieces by its size alone. The first launch reads every piece for its
maximum and its mass; the last picks, by one uniform number per row, a piece and then a token of it:
an inverse CDF, without noise per token. The two launches between them are those of
`kernels.kept_logits`, and only for rows with limits.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import launch_options, wait_for_inputs
from kernels.kept_logits import (
    INF,
    _bracket_kernel,
    _gather_kernel,
    mass_of_pieces,
    per_octave,
    threshold_of,
    weights_of,
    without_nan,
)
from kernels.tile import cdiv, device_sms, next_power_of_2, require_shape, require_unit_stride

PIECE_V = 4096  # tokens of a piece: 38 programs for one row of Qwen3's vocabulary
PIECE_WARPS = 4
SAMPLE_STRIDE = 32  # one token of that many is in the sample of a row with limits
MAX_CANDIDATES = 1024  # set aside per piece; a row with more of them in one is searched whole
SCAN_TILE = 4096  # values that the search looks at in one step
ESTIMATE_STEPS = 16  # bisections of 126 octaves: down to 1/520 of an octave
GATHER_WARPS = 4
GATHER_PROGRAMS_PER_SM = 16  # few enough to cost little where no row has limits


@dataclass(frozen=True)
class SampleWorkspace:
    """Scratch of `sample`, for one stream at a time. P pieces, S tokens in a row's sample."""

    top: Tensor  # [B, P] fp32, each piece's largest logit
    mass: Tensor  # [B, P] fp32, each piece's mass, relative to its own largest
    sample: Tensor  # [B, S] fp32, logits
    bracket: Tensor  # [B, 5] fp32: low, high, largest logit, mass, whether the row has limits
    found_count: Tensor  # [B, 2, P] int32, logits from high on; those from low to high
    found_mass: Tensor  # [B, 2, P] fp32, mass from high on and from low on, relative to the largest
    candidates: Tensor  # [B, P, MAX_CANDIDATES] fp32, logits from low to high


def sample_workspace(max_rows: int, vocab_size: int, device: torch.device | str) -> SampleWorkspace:
    """Scratch for up to `max_rows` rows of logits on `device`."""
    num_pieces = cdiv(vocab_size, PIECE_V)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(max_rows, *shape, dtype=dtype, device=device)

    return SampleWorkspace(
        top=empty(num_pieces),
        mass=empty(num_pieces),
        sample=empty(num_pieces * (PIECE_V // SAMPLE_STRIDE)),
        bracket=empty(5),
        found_count=empty(2, num_pieces, dtype=torch.int32),
        found_mass=empty(2, num_pieces),
        candidates=empty(num_pieces, MAX_CANDIDATES),
    )


@triton.jit
def _piece_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    top_ptr,
    mass_ptr,
    sample_ptr,
    V,
    stride_l_b,
    PIECE_V: tl.constexpr,
    SAMPLE_STRIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program reads one piece of one row."""
    wait_for_inputs(PDL)
    piece, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = b * tl.num_programs(0) + piece
    row_ptr = logits_ptr + b * stride_l_b
    offs_v = piece * PIECE_V + tl.arange(0, PIECE_V)
    x = without_nan(tl.load(row_ptr + offs_v, mask=offs_v < V, other=-INF))  # [PIECE_V]
    temperature = tl.load(temperature_ptr + b)
    top_k, top_p = tl.load(top_k_ptr + b), tl.load(top_p_ptr + b)
    top = tl.max(x, axis=0)
    tl.store(top_ptr + slot, top)
    if temperature > 0.0:
        tl.store(mass_ptr + slot, tl.sum(weights_of(x, top, per_octave(temperature)), axis=0))
        if ((top_k > 0) & (top_k < V)) | (top_p < 1.0):
            NUM_SAMPLES: tl.constexpr = PIECE_V // SAMPLE_STRIDE
            offs_s = tl.arange(0, NUM_SAMPLES)
            # each from another place of its group, or a period in the vocabulary would mislead
            picked = piece * PIECE_V + offs_s * SAMPLE_STRIDE + offs_s * 11 % SAMPLE_STRIDE
            sample = tl.load(row_ptr + picked, mask=picked < V, other=-INF)
            tl.store(sample_ptr + slot * NUM_SAMPLES + offs_s, without_nan(sample))


@triton.jit
def _uniform(seed, step):
    """A number in (0, 1) with 52 random bits, fp64."""
    zero = tl.zeros([1], tl.uint32)
    high, low, _, _ = tl.philox(seed, zero, zero + step.to(tl.uint32), zero, zero)
    bits = ((high >> 6).to(tl.int64) << 26) | (low >> 6).to(tl.int64)
    return tl.sum((bits.to(tl.float64) + 0.5) * 2.220446049250313e-16, axis=0)  # 2 ** -52


@triton.jit
def _locate(weights, share, BLOCK: tl.constexpr):
    """(index, rest): the first at which the running sum passes this share of all, and how far into
    it that is, as a share. Never one of no weight, unless none has any."""
    offs = tl.arange(0, BLOCK)
    weights = weights.to(tl.float64)
    sums = tl.cumsum(weights, axis=0)
    wanted = share * tl.sum(weights, axis=0)
    first = tl.min(tl.where((sums > wanted) & (weights > 0.0), offs, BLOCK), axis=0)
    # rounding may leave none
    last = tl.max(tl.where(weights > 0.0, offs, 0), axis=0)
    index = tl.where(first < BLOCK, first, last)
    before = tl.sum(tl.where(offs < index, weights, 0.0), axis=0)
    inside = tl.sum(tl.where(offs == index, weights, 0.0), axis=0)
    # 24 bits of a piece's mass do; an fp64 division is a call that spills
    return index, (wanted - before).to(tl.float32) / inside.to(tl.float32)


@triton.jit
def _draw_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    steps_ptr,
    top_ptr,
    mass_ptr,
    bracket_ptr,
    found_count_ptr,
    found_mass_ptr,
    candidates_ptr,
    out_ptr,
    V,
    stride_l_b,
    NUM_PIECES: tl.constexpr,
    PIECE_V: tl.constexpr,
    MAX_CANDIDATES: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program picks one row's token: a piece by the pieces' masses, then a token of it."""
    wait_for_inputs(PDL)
    b = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + b * stride_l_b
    temperature = tl.load(temperature_ptr + b)
    scale = per_octave(temperature)
    top, mass = mass_of_pieces(top_ptr, mass_ptr, b, scale, NUM_PIECES, BLOCK_P)
    offs_p = tl.arange(0, BLOCK_P)
    threshold, share = -INF, tl.zeros([], tl.float64)
    if temperature > 0.0:
        share = _uniform(tl.load(seeds_ptr + b), tl.load(steps_ptr + b))
        if tl.load(bracket_ptr + b * 5 + 4) > 0.0:
            threshold, mass = threshold_of(
                row_ptr, found_count_ptr + b * 2 * NUM_PIECES, found_mass_ptr + b * 2 * NUM_PIECES,
                candidates_ptr + b * NUM_PIECES * MAX_CANDIDATES, bracket_ptr + b * 5,
                tl.load(top_k_ptr + b), tl.load(top_p_ptr + b), tl.load(min_p_ptr + b), temperature,
                V, NUM_PIECES, PIECE_V, MAX_CANDIDATES, SHIFT, BLOCK_P, BLOCK_C,
            )  # fmt: skip
    else:  # the first of the largest: all weight on them, and a share of zero
        tops = tl.load(top_ptr + b * NUM_PIECES + offs_p, mask=offs_p < NUM_PIECES, other=-INF)
        mass = ((tops == top) & (offs_p < NUM_PIECES)).to(tl.float32)
    piece, share = _locate(mass, share, BLOCK_P)
    offs_v = piece * PIECE_V + tl.arange(0, PIECE_V)
    x = without_nan(tl.load(row_ptr + offs_v, mask=offs_v < V, other=-INF))
    weights = tl.where(x >= threshold, weights_of(x, top, scale), 0.0)
    weights = tl.where(temperature > 0.0, weights, (x == top).to(tl.float32))
    token, _ = _locate(weights, share, PIECE_V)
    tl.store(out_ptr + b, (piece * PIECE_V + token).to(tl.int64))


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    steps: Tensor,
    *,
    workspace: SampleWorkspace | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One token id per row, by inverting the CDF of its kept tokens. logits: [B, V] -> [B] int64.

    temperature: [B] fp32, 0 takes the largest logit (the first of equals); top_k: [B] int32, 0 for
    all; top_p: [B] fp32 in (0, 1]; min_p: [B] fp32 in [0, 1]; seeds: [B] int64; steps: [B] int32,
    which draw of its seed a row makes, so that a row's token does not depend on the other rows.
    What is kept is said at `kernels.reference.sample`. The uniform number is Philox4x32-10 (Salmon
    et al., 2011). workspace: from `sample_workspace`, for at least B rows, used by one stream at a
    time. Raises ValueError where a shape or a stride does not fit.
    """
    num_rows, vocab_size = logits.shape
    require_unit_stride("logits", logits)
    params = (temperature, top_k, top_p, min_p, seeds, steps)
    names = ("temperature", "top_k", "top_p", "min_p", "seeds", "steps")
    for name, tensor in zip(names, params, strict=True):
        require_shape(name, tensor, num_rows)
    if out is None:
        out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    require_shape("out", out, num_rows)
    if num_rows == 0:
        return out
    w = sample_workspace(num_rows, vocab_size, logits.device) if workspace is None else workspace
    num_pieces = cdiv(vocab_size, PIECE_V)
    if w.top.shape[0] < num_rows or w.top.shape[1] != num_pieces:
        wanted = f"[>= {num_rows}, {num_pieces}]"
        raise ValueError(f"workspace must hold {wanted} pieces, got {list(w.top.shape)}")
    _launch(logits, params, w, out)
    return out


def _launch(logits: Tensor, params: tuple[Tensor, ...], w: SampleWorkspace, out: Tensor) -> None:
    """The four kernels. params: the tensors behind the logits."""
    num_rows, vocab_size = logits.shape
    num_pieces, num_samples = w.top.shape[1], w.sample.shape[1]
    block_p = next_power_of_2(num_pieces)
    # bits of an fp32 pattern, from its end, that the dtype of the logits leaves zero
    shift = {torch.bfloat16: 16, torch.float16: 13}.get(logits.dtype, 0)
    options = launch_options(logits.device)
    row = (vocab_size, logits.stride(0))
    _piece_kernel[(num_pieces, num_rows)](
        logits,
        *params[:3],
        w.top,
        w.mass,
        w.sample,
        *row,
        PIECE_V=PIECE_V,
        SAMPLE_STRIDE=SAMPLE_STRIDE,
        num_warps=PIECE_WARPS,
        **options,
    )
    _bracket_kernel[(num_rows,)](
        *params[:4],
        w.top,
        w.mass,
        w.sample,
        w.bracket,
        vocab_size,
        NUM_PIECES=num_pieces,
        NUM_SAMPLES=num_samples,
        SAMPLE_STRIDE=SAMPLE_STRIDE,
        NUM_STEPS=ESTIMATE_STEPS,
        SHIFT=shift,
        BLOCK_P=block_p,
        BLOCK_S=next_power_of_2(num_samples),
        num_warps=8,
        **options,
    )
    # which program takes which pieces is free to depend on the batch: a piece has its own results
    programs = cdiv(device_sms(logits.device) * GATHER_PROGRAMS_PER_SM, num_rows)
    _gather_kernel[(min(programs, num_pieces), num_rows)](
        logits,
        params[0],
        w.top,
        w.bracket,
        w.found_count,
        w.found_mass,
        w.candidates,
        *row,
        NUM_PIECES=num_pieces,
        PIECE_V=PIECE_V,
        MAX_CANDIDATES=MAX_CANDIDATES,
        BLOCK_V=min(PIECE_V, 1024),
        num_warps=GATHER_WARPS,
        **options,
    )
    _draw_kernel[(num_rows,)](
        logits,
        *params,
        w.top,
        w.mass,
        w.bracket,
        w.found_count,
        w.found_mass,
        w.candidates,
        out,
        *row,
        NUM_PIECES=num_pieces,
        PIECE_V=PIECE_V,
        MAX_CANDIDATES=MAX_CANDIDATES,
        SHIFT=shift,
        BLOCK_P=block_p,
        BLOCK_C=max(SCAN_TILE // block_p, 16),
        num_warps=8,
        **options,
    )
