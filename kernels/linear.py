"""Matrix products against a [N, K] weight: from one decode token to a tall prefill.

One token goes to `gemv`, more to `tall_matmul` where the hardware has what it needs, and else to
`thin_matmul`. RMSNorm costs none of them a pass over x: its weight is folded into the matrix
beforehand, and the scale of a row factors out of its dot products, so that the sums over the raw x
are scaled at the end. Bias, residual, SiLU(gate) * up follow there.
"""

from torch import Tensor

from kernels import tall_matmul, thin_matmul
from kernels.gemv import launch_gemv
from kernels.norm import row_rstd
from kernels.tall_matmul import MatmulWorkspace, launch_tall_matmul
from kernels.tall_plan import TALL_BLOCK_M
from kernels.thin_matmul import HEAD_WIDTH, launch_thin_matmul
from kernels.tile import (
    Tile,
    next_power_of_2,
    output,
    require_fp32,
    require_shape,
    require_unit_stride,
    require_vector,
)
from kernels.tiles import matmul_shape, tuned_tile


def is_for_tall(num_tokens: int, width: int) -> bool:
    """Whether `tall_matmul`, where it takes the product at all, is the faster one, as found on an
    H100: a vocabulary is the better read by small programs, up to the rows of its smallest tile."""
    return width < HEAD_WIDTH or num_tokens > TALL_BLOCK_M


def launch_matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rms_eps: float | None,
    rstd: Tensor | None,
    out: Tensor,
    *,
    gated: bool,
    tile: Tile | None,
    num_sms: int | None,
    workspace: MatmulWorkspace | None,
) -> None:
    """Launch over arguments that the caller has checked. out: [T, N], or [T, N / 2] gated."""
    (num_tokens, K), N = x.shape, out.shape[1]
    if num_tokens == 0:
        return
    if tile is None and x.element_size() == 2:
        shape = matmul_shape(num_tokens, N, K, residual is not None)
        tile = tuned_tile("gate_up" if gated else "linear", shape, num_sms, x.device)
    if num_tokens == 1 and (tile is None or tile.BLOCK_M == 1):
        launch_gemv(x, weight, bias, residual, rms_eps, out, gated=gated, tile=tile)
        return
    if tile is None:
        is_tall = is_for_tall(num_tokens, N)
    else:
        is_tall = tall_matmul.has_form(tile, gated=gated)
    if rms_eps is None:
        rstd = None
    elif rstd is None:
        rstd = row_rstd(x, rms_eps)
    else:
        require_vector("rstd", rstd, max(len(rstd), num_tokens))
        require_fp32("rstd", rstd)
        rstd = row_rstd(x, rms_eps, out=rstd[:num_tokens])
    operands = (x, weight, bias, residual, rstd, out)
    if is_tall and tall_matmul.takes(x, weight, residual, out):
        options = {"tile": tile, "num_sms": num_sms, "workspace": workspace}
        launch_tall_matmul(*operands, gated=gated, **options)
        return
    if tile is None:
        tile = thin_matmul.choose_tile(num_tokens, N, x.dtype)
    elif next_power_of_2(tile.BLOCK_N) != tile.BLOCK_N:
        raise ValueError(f"tile must have a power of 2 of columns for these operands, got {tile}")
    launch_thin_matmul(*operands, gated=gated, tile=tile, num_sms=num_sms)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    rms_eps: float | None = None,
    *,
    rstd: Tensor | None = None,
    out: Tensor | None = None,
    tile: Tile | None = None,
    num_sms: int | None = None,
    workspace: MatmulWorkspace | None = None,
) -> Tensor:
    """x @ weight.T + bias + residual. x: [T, K], weight: [N, K] -> [T, N].

    x may be the top of a larger buffer: rows behind it, whatever they hold, are then read up to a
    whole tile, and not used, which is faster than to do without.
    rms_eps asks for rows of x scaled to a root mean square of one first: RMSNorm, whose weight is
    folded into `weight`; rstd: fp32, T or more, is scratch for it. bias: [N]; residual: [T, N],
    which may be `out` itself. num_sms caps the grid to a partition, but for a single token, whose
    many short programs even out by themselves. workspace: from `matmul_workspace`, used by one
    stream at a time; with it, SMs that whole tiles would leave idle share some. Raises ValueError
    where a shape or a stride does not fit.
    """
    num_tokens, K = x.shape
    N = weight.shape[0]
    require_shape("weight", weight, N, K)
    for name, tensor, shape in (
        ("bias", bias, (N,)),
        ("residual", residual, (num_tokens, N)),
    ):
        if tensor is not None:
            require_shape(name, tensor, *shape)
            require_unit_stride(name, tensor)
    require_unit_stride("x", x)
    require_unit_stride("weight", weight)
    out = output(out, (num_tokens, N), x)
    launch_matmul(
        x,
        weight,
        bias,
        residual,
        rms_eps,
        rstd,
        out,
        gated=False,
        tile=tile,
        num_sms=num_sms,
        workspace=workspace,
    )
    return out
