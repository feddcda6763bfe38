"""Matrix products of many tokens on Hopper: the launch of `tall_pipeline` by `tall_plan`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import hopper
from kernels.dependent_launch import launch_options
from kernels.tall_pipeline import _tall_matmul_kernel
from kernels.tall_plan import (
    BLOCK_K,
    OUT_BUFFERS,
    Plan,
    choose_plan,
    chunk_width,
    parts,
    ring_width,
    starts_early,
)
from kernels.tile import Tile, cdiv, device_sms, next_power_of_2

GROUP_ROWS = 1024  # rows of x that tiles at work together share in L2
MIN_LOADED = 16  # rows of x that one copy moves, of few tokens
LARGEST_SUMS = 128 * 256  # of a tile
MAX_CONSUMERS = 2


@dataclass(frozen=True)
class MatmulWorkspace:
    """Scratch of `linear`, `gate_up` and `mlp`, for one stream at a time."""

    sums: Tensor  # fp32, what each program may pass on of a tile
    is_there: Tensor  # int32, whether each consumer has; zeros between launches


def matmul_workspace(device: torch.device | str) -> MatmulWorkspace | None:
    """Scratch for products on `device`, 128 KiB for each SM; None where no tiles are shared."""
    device = torch.device(device)
    if not hopper.has_wgmma(device):
        return None
    num_sms = device_sms(device)
    return MatmulWorkspace(
        sums=torch.empty(num_sms, LARGEST_SUMS, dtype=torch.float32, device=device),
        is_there=torch.zeros(num_sms, MAX_CONSUMERS, dtype=torch.int32, device=device),
    )


def takes(x: Tensor, weight: Tensor, residual: Tensor | None, out: Tensor) -> bool:
    """Whether `launch_tall_matmul` can: Hopper, one 16-bit dtype, rows that TMA can address."""
    if x.dtype not in hopper.GL_DTYPES or not hopper.has_wgmma(x.device):
        return False
    matrices = [x, weight, out] if residual is None else [x, weight, out, residual]
    return all(m.dtype == x.dtype and hopper.is_aligned(m) for m in matrices)


def launch_tall_matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rstd: Tensor | None,
    out: Tensor,
    *,
    gated: bool,
    tile: Tile | None,
    num_sms: int | None,
    workspace: MatmulWorkspace | None = None,
) -> None:
    """Launch over arguments that the caller has checked and that this module `takes`.

    x: [T, K] fp16 or bf16, rstd: [T] fp32 -> out: [T, N], or [T, N / 2] gated. A tile's warps are
    those that multiply, its stages the depth of the ring. With a workspace, and none given, tiles
    may be shared. ValueError where the kernel has no form for the tile or the workspace is of fewer
    SMs; Triton raises OutOfResources where the ring does not fit.
    """
    if tile is not None and not has_form(tile, gated=gated):
        raise ValueError(
            "tile must have 4 or 8 warps, 64 or 128 rows for every 4 of them, 32 to 256 columns,"
            f" BLOCK_K {BLOCK_K}, 2 stages or more, and fit the registers, got {tile}"
        )
    (num_tokens, K), N = x.shape, out.shape[1]
    sms = device_sms(x.device) if num_sms is None else num_sms
    if workspace is not None and len(workspace.sums) < sms:
        raise ValueError(f"workspace must be for {sms} SMs or more, got {len(workspace.sums)}")
    if tile is None:
        # all three together do not fit the registers beside sums that are passed on
        may_share = workspace is not None and any(one is None for one in (bias, residual, rstd))
        plan = choose_plan(num_tokens, N, K, sms, gated=gated, may_share=may_share)
        tile = plan.tile
    else:
        plan = Plan(tile)
    consumers = tile.num_warps // 4
    rows = tile.BLOCK_M // consumers
    first, rest = parts(tile.BLOCK_N)
    # a lone consumer takes what the loading warps leave of 256 threads with 128 registers each
    options = {"maxnreg": 128} if consumers == 1 else {}
    loaded = rows if consumers > 1 else min(rows, max(next_power_of_2(num_tokens), MIN_LOADED))
    _tall_matmul_kernel[(plan.num_programs(num_tokens, N, sms),)](
        hopper.describe(x, loaded, BLOCK_K, shape=(_rows_in_reach(x, consumers * loaded), K)),
        hopper.describe(weight, first, BLOCK_K),
        hopper.describe(weight, rest, BLOCK_K) if rest else None,
        hopper.describe(out, rows, chunk_width(rows, tile.BLOCK_N)),
        bias,
        residual,
        rstd,
        workspace.sums if plan.side else None,
        workspace.is_there if plan.side else None,
        num_tokens,
        N,
        K,
        residual.stride(0) if residual is not None else 0,
        GATED=gated,
        CONSUMERS=consumers,
        ROWS=rows,
        STAGES=tile.num_stages,
        OUT_BUFFERS=OUT_BUFFERS,
        GROUP_M=GROUP_ROWS // tile.BLOCK_M,
        SIDE=plan.side,
        num_warps=4,  # of the first consumer; the kernel adds the others
        **options,
        **launch_options(x.device, early=starts_early(num_tokens, N, K, gated=gated)),
    )


def _rows_in_reach(x: Tensor, block_m: int) -> int:
    """Rows of x and those behind it in its storage, up to whole tiles of so many: an engine's x is
    the top of a larger buffer. Nothing is made of what is there, but TMA takes longer to fill in
    zeros for rows that are not: on an H100 a fifth of the product's time."""
    num_tokens, K = x.shape
    stored = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    there = (stored - K) // x.stride(0) + 1 if x.stride(0) else num_tokens
    return max(num_tokens, min(cdiv(num_tokens, block_m) * block_m, there))


def has_form(tile: Tile, *, gated: bool) -> bool:
    """Whether the kernel can be compiled for a tile, and gets through with it."""
    if tile.num_warps not in (4, 8) or tile.BLOCK_K != BLOCK_K:
        return False
    consumers = tile.num_warps // 4
    rows = tile.BLOCK_M // consumers
    return (
        tile.BLOCK_M in (64 * consumers, 128 * consumers)
        and tile.BLOCK_N in (32, 64, 96, 128, 192, 256)
        and rows * ring_width(tile.BLOCK_N, gated) <= consumers * 64 * 128  # what registers hold
        and tile.num_stages >= 2  # a buffer is given back only once the next one is there
    )
