"""Paged attention of one new token per request, split over the context, all in one launch.

Flash-decoding (Dao et al., 2023) with its work dealt out as Stream-K does (Osama et al., 2023). A
context is cut into splits by its own length alone; all splits of the batch, one request after the
other, are dealt in runs of equal length to groups of programs, one for each kv head, that read the
same blocks side by side; of large batches on Hopper, a quarter to whoever is through first. Each
split is summed up by itself, and a request's splits are always joined by the same arithmetic, so
that its output does not depend, to the bit, on its neighbours or on how many programs there are.

On Hopper by `decode_pipeline`, elsewhere and for what that does not take by `decode_plain`.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import hopper
from kernels.decode_pipeline import _decode_pipeline_kernel
from kernels.decode_plain import _decode_attention_kernel
from kernels.dependent_launch import launch_options
from kernels.tile import (
    Tile,
    cdiv,
    device_sms,
    dot_precision,
    next_power_of_2,
    output,
    require_paged,
    require_vector,
)

SPLIT_LEN = 256  # tokens in a split: with fewer, joining them costs too much beside reading them
MIN_SPLIT_LEN = 64  # a context of few tokens is cut finer, for it leaves programs without work:
FEW_SPLITS = 4  # into so many, if each has the least
SPLIT_UNIT = 64  # tokens that a split is a multiple of, and splits are dealt out by
MAX_SPLITS = 64  # splits of one context
TAIL_PART = 4  # of a large batch, the part that the pipeline's groups come for: a quarter
TAIL_SHARES = 4  # pieces of it for each group
MIN_TAIL = 6  # units of it for each group: fewer are read sooner than their shares are looked up
JOIN_AHEAD = 8  # partial results that are loaded together when splits are joined
MIN_BLOCK_B = 128  # lanes over the requests: one compiled kernel serves all small batches
MAX_BLOCK_B = 256  # of the pipeline, which looks at more requests one part after the other

# of the plain kernel
PROGRAMS_PER_SM = 2  # of the whole GPU: with more, they get in each other's way in memory
PROGRAMS_PER_SM_OF_FEW = 3  # what fits shared memory: few SMs need more loads in flight each
# Of a thread: left to itself, ptxas may spill so that a program more would fit, and there is none.
# Of the plain kernel for 16-bit heads wider than 128: in fp32 it spills with this limit alone.
MAX_REGISTERS = 255

# Of the pipeline: programs of one warp each, whose rings fill shared memory. On an H100 as fast as
# fewer steps and more programs where the batch is large, and faster where it is small.
WARPS_PER_SM = 4
PIPELINE_TOKENS = 32
PIPELINE_STAGES = 3
MAX_KEYS = 32 * 128  # elements of a step's keys that fit registers beside all else


@dataclass(frozen=True)
class DecodeWorkspace:
    """Scratch of `decode_attention`, for one stream at a time; counters start and end at zero.

    Places hold the splits of one request: each program has one, and so has each share that work is
    dealt out in.
    """

    partial: Tensor  # [places, splits, H / H_KV, D] fp32, each split's weighted values
    max_sum: Tensor  # [places, splits, H / H_KV, 2] fp32, its maximum (base 2) and sum
    arrived: Tensor  # [places] int32, splits that are done
    taken: Tensor  # [H_KV] int32, shares of the tail that programs have come for


def decode_workspace(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device | str,
    *,
    max_context: int | None = None,
) -> DecodeWorkspace:
    """Scratch for batches of any size on `device`, whichever kernel takes them. max_context: tokens
    that a block table has room for, at most; None: any number."""
    device = torch.device(device)
    places = max(
        _num_places(
            _num_programs(device_sms(device), device, num_kv_heads, is_pipeline=is_pipeline),
            is_pipeline=is_pipeline,
        )
        for is_pipeline in (False, True)
    )
    num_splits = MAX_SPLITS if max_context is None else _most_splits(max_context)
    shape = (places, num_splits, num_heads // num_kv_heads)
    return DecodeWorkspace(
        partial=torch.empty(*shape, head_dim, dtype=torch.float32, device=device),
        max_sum=torch.empty(*shape, 2, dtype=torch.float32, device=device),
        arrived=torch.zeros(places, dtype=torch.int32, device=device),
        taken=torch.zeros(num_kv_heads, dtype=torch.int32, device=device),
    )


def _most_splits(max_context: int) -> int:
    """Of any context up to that."""
    return min(max(cdiv(max_context, SPLIT_LEN), FEW_SPLITS), MAX_SPLITS)


def _num_places(num_programs: int, *, is_pipeline: bool) -> int:
    """One for each program, and one for each of its shares."""
    return num_programs * (2 + TAIL_SHARES if is_pipeline else 2)


def _num_programs(
    num_sms: int, device: torch.device, num_kv_heads: int, *, is_pipeline: bool
) -> int:
    """For so many SMs of the device: as many groups as fit, one at least."""
    all_sms = device_sms(device)
    num_sms = min(num_sms, all_sms)
    per_sm = WARPS_PER_SM
    if not is_pipeline:
        is_few = num_sms * PROGRAMS_PER_SM_OF_FEW <= all_sms * PROGRAMS_PER_SM
        per_sm = PROGRAMS_PER_SM_OF_FEW if is_few else PROGRAMS_PER_SM
    return max(num_sms * per_sm // num_kv_heads, 1) * num_kv_heads


def choose_tile(head_dim: int, dtype: torch.dtype) -> Tile:
    """Tokens a program reads at a time; BLOCK_M is the padded GQA group, set by the launcher."""
    is_wide = head_dim > 128
    # of wide heads fewer, so that two programs' buffers fit an SM, and fp32 the registers
    num_tokens = SPLIT_UNIT // 2 if is_wide and dtype == torch.float32 else SPLIT_UNIT
    stages = 2 if is_wide or dtype == torch.float32 else 3
    return Tile(BLOCK_M=16, BLOCK_N=num_tokens, BLOCK_K=head_dim, num_stages=stages)


def choose_pipeline_tile(block_size: int, head_dim: int) -> Tile:
    """The same for `decode_pipeline`, whose steps are whole blocks."""
    num_tokens = max(PIPELINE_TOKENS, block_size)
    num_stages = max(PIPELINE_STAGES * PIPELINE_TOKENS // num_tokens, 2)
    return Tile(
        BLOCK_M=16, BLOCK_N=num_tokens, BLOCK_K=head_dim, num_warps=1, num_stages=num_stages
    )


def takes(q: Tensor, kv_cache: Tensor) -> bool:
    """Whether `decode_pipeline` can: Hopper, a 16-bit dtype, a pool that is a matrix to the copy
    engine, groups of up to 16 heads, and keys of a step, a block at least, that a warp can hold."""
    _, _, block_size, num_kv_heads, head_dim = kv_cache.shape
    is_known = q.dtype in hopper.GL_DTYPES and hopper.has_wgmma(q.device)
    group, num_keys = q.shape[1] // num_kv_heads, max(block_size, PIPELINE_TOKENS)
    is_small = group <= 16 and num_keys * head_dim <= MAX_KEYS
    return is_known and is_small and hopper.is_pool_matrix(kv_cache)


def decode_attention(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    workspace: DecodeWorkspace | None = None,
    out: Tensor | None = None,
    tile: Tile | None = None,
    num_sms: int | None = None,
) -> Tensor:
    """Attention of one new token per request over its paged context.

    q: [B, H, D]; kv_cache: one layer [num_blocks, 2, block_size, H_KV, D]; block_table:
    [B, max_blocks] int32; context_lens: [B] int32, this token included, 0 for a padding row, whose
    output is zeros -> [B, H, D]. workspace: from `decode_workspace`, used by one stream at a time.
    A tile of one warp is for the pipeline. num_sms sizes the grid for a partition. Raises
    ValueError where a shape or a stride does not fit.
    """
    num_requests, num_heads, head_dim = q.shape
    _, _, block_size, num_kv_heads, _ = kv_cache.shape
    require_paged(q, kv_cache, block_table, num_requests)
    require_vector("context_lens", context_lens, num_requests)
    out = output(out, q.shape, q)
    if num_requests == 0:
        return out
    is_pipeline = takes(q, kv_cache) and (tile is None or tile.num_warps == 1)
    sms = device_sms(q.device) if num_sms is None else num_sms
    num_programs = _num_programs(sms, q.device, num_kv_heads, is_pipeline=is_pipeline)
    max_context = block_table.shape[1] * block_size
    if workspace is None:
        heads = num_heads, num_kv_heads, head_dim
        workspace = decode_workspace(*heads, q.device, max_context=max_context)
    group = num_heads // num_kv_heads
    places, splits, *held = workspace.partial.shape
    num_places = _num_places(num_programs, is_pipeline=is_pipeline)
    num_splits = _most_splits(max_context)
    if places < num_places or splits < num_splits or held != [group, head_dim]:
        wanted = f"[>= {num_places}, >= {num_splits}, {group}, {head_dim}]"
        raise ValueError(f"workspace must hold {wanted} sums, got {[places, splits, *held]}")
    if len(workspace.taken) < num_kv_heads:
        counted = len(workspace.taken)
        raise ValueError(f"workspace must be for {num_kv_heads} kv heads or more, got {counted}")
    if tile is None and is_pipeline:
        tile = choose_pipeline_tile(block_size, head_dim)
    elif is_pipeline and (SPLIT_UNIT % tile.BLOCK_N or tile.BLOCK_N % block_size):
        wanted = f"BLOCK_N that divides {SPLIT_UNIT}, in whole blocks of {block_size}"
        raise ValueError(f"a tile of one warp must have a {wanted}, got {tile}")
    elif tile is None:
        tile = choose_tile(head_dim, kv_cache.dtype)
    launch = _launch_pipeline if is_pipeline else _launch_plain
    paging = kv_cache, block_table, context_lens
    launch(q, *paging, scale, workspace, out, tile=tile, num_programs=num_programs)
    return out


def _options(q: Tensor, kv_cache: Tensor) -> dict[str, Any]:
    """What both kernels are compiled and launched with: heads, how contexts are cut, PDL."""
    num_requests, num_heads, head_dim = q.shape
    num_kv_heads = kv_cache.shape[3]
    group = num_heads // num_kv_heads
    return {
        "H_KV": num_kv_heads,
        "GROUP": group,
        "D": head_dim,
        "SPLIT_LEN": SPLIT_LEN,
        "MIN_SPLIT_LEN": MIN_SPLIT_LEN,
        "FEW_SPLITS": FEW_SPLITS,
        "MAX_SPLITS": MAX_SPLITS,
        "BLOCK_B": max(next_power_of_2(num_requests), MIN_BLOCK_B),
        "BLOCK_J": next_power_of_2(group),
        **launch_options(q.device),
    }


def _launch_plain(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    workspace: DecodeWorkspace,
    out: Tensor,
    *,
    tile: Tile,
    num_programs: int,
) -> None:
    """Launch over arguments that the caller has checked."""
    _, _, block_size, num_kv_heads, head_dim = kv_cache.shape
    group = q.shape[1] // num_kv_heads
    is_wide = head_dim > 128 and kv_cache.element_size() == 2
    _decode_attention_kernel[(num_programs,)](
        q,
        kv_cache,
        block_table,
        context_lens,
        workspace.partial,
        workspace.max_sum,
        workspace.arrived,
        out,
        workspace.partial.shape[1],
        len(q),
        scale * math.log2(math.e),
        q.stride(0),
        q.stride(1),
        *kv_cache.stride()[:4],
        block_table.stride(0),
        out.stride(0),
        out.stride(1),
        BLOCK_SIZE=block_size,
        PRECISION=dot_precision(kv_cache.dtype),
        JOIN_AHEAD=JOIN_AHEAD,
        BLOCK_G=max(16, next_power_of_2(group)),
        BLOCK_N=tile.BLOCK_N,
        BLOCK_D=max(16, next_power_of_2(head_dim)),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=MAX_REGISTERS if is_wide else None,
        **_options(q, kv_cache),
    )


def _launch_pipeline(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    workspace: DecodeWorkspace,
    out: Tensor,
    *,
    tile: Tile,
    num_programs: int,
) -> None:
    """The same for what the pipeline `takes`."""
    group = q.shape[1] // kv_cache.shape[3]
    options = _options(q, kv_cache)
    pool = hopper.describe_pool(kv_cache)
    _decode_pipeline_kernel[(num_programs,)](
        q,
        pool.desc,
        block_table,
        context_lens,
        workspace.partial,
        workspace.max_sum,
        workspace.arrived,
        workspace.taken,
        out,
        workspace.partial.shape[1],
        len(q),
        scale * math.log2(math.e),
        q.stride(0),
        q.stride(1),
        block_table.stride(0),
        out.stride(0),
        out.stride(1),
        pool.rows_per_block,
        pool.rows_to_v,
        pool.num_rows,
        SPLIT_UNIT=SPLIT_UNIT,
        TAIL_PART=TAIL_PART,
        TAIL_SHARES=TAIL_SHARES,
        MIN_TAIL=MIN_TAIL,
        # one warp has them all in its registers
        JOIN_AHEAD=max(2 * JOIN_AHEAD // max(next_power_of_2(group), 2), 1),
        BLOCK_N=tile.BLOCK_N,
        STAGES=tile.num_stages,
        num_warps=1,
        maxnreg=MAX_REGISTERS,
        **options | {"BLOCK_B": min(options["BLOCK_B"], MAX_BLOCK_B)},
    )
