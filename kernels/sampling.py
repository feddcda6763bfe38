"""Logits to token ids on the device: temperature, top-k, top-p, min-p, a seed for every request.

Two launches, one read of the logits. The vocabulary is cut into pieces by its size alone. The first
launch reads every piece for its maximum and its mass, and for rows with limits also writes an index
of it: the largest logit of every group of tokens. The second picks, by one uniform number per row,
a token: an inverse CDF, without noise per token. What limits keep, it finds through the index, by
`kernels.candidates` and `kernels.kept_logits`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.candidates import list_candidates
from kernels.dependent_launch import launch_options, wait_for_inputs
from kernels.inverse_cdf import draw_from_held, draw_from_list, draw_from_row, uniform
from kernels.kept_logits import masses_from, threshold_of
from kernels.logit_weights import (
    INF,
    OCTAVES,
    below_top,
    cell_to_float,
    float_to_cell,
    per_octave,
    weights_of,
    without_nan,
)
from kernels.tile import cdiv, next_power_of_2, require_unit_stride, require_vector

PIECE_V = 8192  # tokens of a piece: 19 programs for one row of Qwen3's vocabulary
PIECE_WARPS = 8
GROUP = 64  # tokens whose largest logit and mass are in the index
MAX_CANDIDATES = 16384  # listed; a row with more of them is searched whole
WORD = 32  # bits of a word that says which of neighbours are candidates
WORDS_AT_ONCE = 1024  # words whose bits are listed in one step
LISTED_AT_ONCE = 128  # groups that may hold a candidate, whose logits are read in one step
FEW_HELD, MANY_HELD = 1024, 2048  # candidates that registers hold: the fewer, the sooner drawn
LANES = 1024  # that share a longer list
SCAN_TILE = 1024  # logits that a scan of a list or of a whole row looks at in one step
MASS_TILE = 2048  # logits whose mass is added to that of their pieces in one step
DRAW_WARPS = 4  # more of them repeat what is of the row alone, and the SM issues it all
DRAW_REGISTERS = 255  # of a thread: two rows to an SM


@dataclass(frozen=True)
class SampleWorkspace:
    """Scratch of `sample`, for one stream at a time. P pieces."""

    top: Tensor  # [B, P] fp32, each piece's largest logit
    mass: Tensor  # [B, P] fp32, each piece's mass, relative to its own largest
    group_top: Tensor  # [B, P * PIECE_V / GROUP], room for fp32 but in the dtype of the logits
    group_mass: Tensor  # [B, P * PIECE_V / GROUP] fp32, relative to the piece's largest logit
    groups: Tensor  # [B, P * PIECE_V / GROUP] int32, those that hold candidates
    words: Tensor  # [B, P * PIECE_V / WORD] int32, which tokens of these groups are candidates
    tokens: Tensor  # [B, MAX_CANDIDATES] int32, the candidates
    values: Tensor  # [B, MAX_CANDIDATES] fp32, their logits


def sample_workspace(max_rows: int, vocab_size: int, device: torch.device | str) -> SampleWorkspace:
    """Scratch for up to `max_rows` rows of logits on `device`."""
    num_pieces = cdiv(vocab_size, PIECE_V)
    num_groups = num_pieces * (PIECE_V // GROUP)

    def empty(columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(max_rows, columns, dtype=dtype, device=device)

    return SampleWorkspace(
        top=empty(num_pieces),
        mass=empty(num_pieces),
        group_top=empty(num_groups),
        group_mass=empty(num_groups),
        groups=empty(num_groups, torch.int32),
        words=empty(num_pieces * (PIECE_V // WORD), torch.int32),
        tokens=empty(MAX_CANDIDATES, torch.int32),
        values=empty(MAX_CANDIDATES),
    )


@triton.jit
def _limits(temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, b, V):
    """(temperature, min_p, (by_k, top_k, by_p, top_p), is_limited, by_mass) of row b: whether there
    are limits, and whether the mass of all its logits is asked for."""
    temperature, min_p = tl.load(temperature_ptr + b), tl.load(min_p_ptr + b)
    top_k, top_p = tl.load(top_k_ptr + b), tl.load(top_p_ptr + b)
    by_k, by_p = (top_k > 0) & (top_k < V), top_p < 1.0
    is_limited = (temperature > 0.0) & (by_k | by_p | (min_p > 0.0))
    # top-k asks for that of the top-k alone, min-p for none
    by_mass = (temperature > 0.0) & (by_k == 0) & (by_p | (min_p <= 0.0))
    return temperature, min_p, (by_k, top_k, by_p, top_p), is_limited, by_mass


@triton.jit
def _piece_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, top_ptr, mass_ptr, group_top_ptr,
    group_mass_ptr, V, stride_l_b, PIECE_V: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program reads one piece of one row."""
    GROUPS: tl.constexpr = PIECE_V // GROUP
    wait_for_inputs(PDL)
    piece, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = b * tl.num_programs(0) + piece
    offs_v = piece * PIECE_V + tl.arange(0, PIECE_V)
    x = tl.load(logits_ptr + b * stride_l_b + offs_v, mask=offs_v < V, other=-INF)
    x = without_nan(x)  # [PIECE_V]
    temperature, _, _, is_limited, by_mass = _limits(
        temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, b, V
    )
    offs_g = slot * GROUPS + tl.arange(0, GROUPS)
    group_tops = tl.max(tl.reshape(x, [GROUPS, GROUP]), axis=1)
    top = tl.max(group_tops, axis=0)
    tl.store(top_ptr + slot, top)
    if is_limited:
        tl.store(group_top_ptr + offs_g, group_tops)
    if by_mass:
        weights = weights_of(x, top, per_octave(temperature))
        if is_limited:
            masses = tl.sum(tl.reshape(weights, [GROUPS, GROUP]), axis=1)
            tl.store(group_mass_ptr + offs_g, masses)
            tl.store(mass_ptr + slot, tl.sum(masses, axis=0))
        else:
            tl.store(mass_ptr + slot, tl.sum(weights, axis=0))


@triton.jit
def _mass_of_pieces(tops, top, mass_ptr, scale, NUM_PIECES: tl.constexpr, BLOCK_P: tl.constexpr):
    """[BLOCK_P] masses relative to the row's largest logit."""
    offs_p = tl.arange(0, BLOCK_P)
    mass = tl.load(mass_ptr + offs_p, mask=(offs_p < NUM_PIECES) & (tops > -INF), other=0.0)
    return mass * weights_of(tops, top, scale)


@triton.jit
def _draw_held(
    lists, count, limits, low, floor, top, total, scale, share, SHIFT: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """A row's token where registers hold all that its limits may keep."""
    token_ptr, value_ptr = lists[2], lists[3]
    lanes = tl.arange(0, HELD)
    held = tl.load(value_ptr + lanes, mask=lanes < count, other=-INF)
    threshold = threshold_of(held, limits, low, low, floor, top, total, scale, True, SHIFT, 0)
    return draw_from_held(held, token_ptr, share, threshold, top, scale, HELD)


@triton.jit
def _draw_limited(
    row_ptr, index, lists, limits, min_p, temperature, top, masses, share, V,
    NUM_PIECES: tl.constexpr, PIECE_V: tl.constexpr, GROUP: tl.constexpr,
    MAX_CANDIDATES: tl.constexpr, SHIFT: tl.constexpr, WORD: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_V: tl.constexpr,
    FEW_HELD: tl.constexpr, MANY_HELD: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """(token, whether it is one, threshold, masses): a row's token where all that limits keep is
    listed; where not, the threshold and the masses of the kept by pieces, to draw it by."""
    by_k, by_p = limits[0], limits[2]
    token_ptr, value_ptr = lists[2], lists[3]
    scale, total = per_octave(temperature), tl.sum(masses, axis=0)
    floor = tl.where(min_p > 0.0, top + tl.log(min_p) * temperature, -INF)
    bottom = below_top(OCTAVES, top, scale, SHIFT)
    # the share of top-p is one of all top-k, min-p or not
    least = tl.maximum(bottom, cell_to_float(float_to_cell(floor, SHIFT), SHIFT))
    least = tl.where(by_k & by_p, bottom, least)
    guess, count = list_candidates(
        row_ptr, index, lists, limits, top, total, scale, least, V, NUM_PIECES, PIECE_V, GROUP,
        MAX_CANDIDATES, SHIFT, WORD, BLOCK_P, BLOCK_L, BLOCK_W, LANES,
    )  # fmt: skip
    is_listed, token, threshold = count <= MAX_CANDIDATES, 0, floor
    if count <= FEW_HELD:
        token = _draw_held(
            lists, count, limits, guess, floor, top, total, scale, share, SHIFT, FEW_HELD
        )
    elif count <= MANY_HELD:
        token = _draw_held(
            lists, count, limits, guess, floor, top, total, scale, share, SHIFT, MANY_HELD
        )
    else:
        low = tl.where(is_listed | by_k, guess, least)
        source = (is_listed, value_ptr, count, row_ptr, V)
        threshold = threshold_of(
            source, limits, guess, low, floor, top, total, scale, False, SHIFT, BLOCK_V
        )
        if is_listed:
            BLOCK_I: tl.constexpr = MAX_CANDIDATES // LANES
            token = draw_from_list(
                value_ptr, token_ptr, count, share, threshold, top, scale, LANES, BLOCK_I
            )
        else:
            masses = masses_from(row_ptr, threshold, top, scale, V, PIECE_V, BLOCK_P, BLOCK_C)
    return token, is_listed, threshold, masses


@triton.jit
def _draw_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seeds_ptr, steps_ptr, top_ptr,
    mass_ptr, group_top_ptr, group_mass_ptr, group_ptr, word_ptr, token_ptr, value_ptr, out_ptr, V,
    stride_l_b, NUM_PIECES: tl.constexpr, PIECE_V: tl.constexpr, GROUP: tl.constexpr,
    MAX_CANDIDATES: tl.constexpr, SHIFT: tl.constexpr, WORD: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_V: tl.constexpr,
    FEW_HELD: tl.constexpr, MANY_HELD: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program draws one row's token."""
    NUM_GROUPS: tl.constexpr = NUM_PIECES * (PIECE_V // GROUP)
    wait_for_inputs(PDL)
    b = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + b * stride_l_b
    temperature, min_p, limits, is_limited, by_mass = _limits(
        temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, b, V
    )
    is_greedy, scale = temperature <= 0.0, per_octave(temperature)
    offs_p = tl.arange(0, BLOCK_P)
    top_ptr += b * NUM_PIECES
    tops = tl.load(top_ptr + offs_p, mask=offs_p < NUM_PIECES, other=-INF)
    top = tl.max(tops, axis=0)
    # greedy: the first of the largest, with a weight for them alone and a share of zero
    masses = ((tops == top) & (offs_p < NUM_PIECES)).to(tl.float32)
    share = tl.zeros([], tl.float64)
    if (is_greedy == 0) & (top > -INF):  # of a row of -inf alone the first token is left
        share = uniform(tl.load(seeds_ptr + b), tl.load(steps_ptr + b))
    if by_mass:
        masses = _mass_of_pieces(tops, top, mass_ptr + b * NUM_PIECES, scale, NUM_PIECES, BLOCK_P)
    token, is_found, threshold = 0, top > INF, -INF
    if is_limited & (top > -INF):
        index = (top_ptr, group_top_ptr + b * NUM_GROUPS, group_mass_ptr + b * NUM_GROUPS)
        candidates = b * MAX_CANDIDATES
        lists = (
            group_ptr + b * NUM_GROUPS, word_ptr + b * (NUM_PIECES * (PIECE_V // WORD)),
            token_ptr + candidates, value_ptr + candidates,
        )  # fmt: skip
        token, is_found, threshold, masses = _draw_limited(
            row_ptr, index, lists, limits, min_p, temperature, top, masses, share, V, NUM_PIECES,
            PIECE_V, GROUP, MAX_CANDIDATES, SHIFT, WORD, BLOCK_P, BLOCK_C, BLOCK_L, BLOCK_W,
            BLOCK_V, FEW_HELD, MANY_HELD, LANES,
        )  # fmt: skip
    if is_found == 0:
        token = draw_from_row(
            row_ptr, masses, share, threshold, top, scale, is_greedy, V, PIECE_V, GROUP, BLOCK_P
        )
    tl.store(out_ptr + b, token.to(tl.int64))


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
        require_vector(name, tensor, num_rows)
    if out is None:
        out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    require_vector("out", out, num_rows)
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
    """The two kernels. params: the tensors behind the logits."""
    num_rows, vocab_size = logits.shape
    num_pieces = w.top.shape[1]
    block_p = next_power_of_2(num_pieces)
    index = (w.top, w.mass, w.group_top.view(logits.dtype), w.group_mass)
    row = (vocab_size, logits.stride(0))
    sizes = {"PIECE_V": PIECE_V, "GROUP": GROUP}
    options = launch_options(logits.device)
    _piece_kernel[(num_pieces, num_rows)](
        logits, *params[:4], *index, *row, **sizes, num_warps=PIECE_WARPS, **options
    )
    _draw_kernel[(num_rows,)](
        logits,
        *params,
        *index,
        w.groups,
        w.words,
        w.tokens,
        w.values,
        out,
        *row,
        NUM_PIECES=num_pieces,
        **sizes,
        MAX_CANDIDATES=MAX_CANDIDATES,
        # bits of an fp32 pattern, from its end, that the dtype of the logits leaves zero
        SHIFT={torch.bfloat16: 16, torch.float16: 13}.get(logits.dtype, 0),
        BLOCK_P=block_p,
        BLOCK_C=min(max(MASS_TILE // block_p, 16), PIECE_V),
        WORD=WORD,
        BLOCK_L=LISTED_AT_ONCE,
        BLOCK_W=WORDS_AT_ONCE,
        BLOCK_V=SCAN_TILE,
        FEW_HELD=FEW_HELD,
        MANY_HELD=MANY_HELD,
        LANES=LANES,
        num_warps=DRAW_WARPS,
        maxnreg=DRAW_REGISTERS,
        **options,
    )
