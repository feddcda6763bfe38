"""The MLP of a layer: RMSNorm + gate/up + SiLU * up, then down + residual."""

from torch import Tensor

from kernels.linear import launch_matmul, linear
from kernels.tall_matmul import MatmulWorkspace
from kernels.tile import Tile, output, require_shape, require_unit_stride


def gate_up(
    x: Tensor,
    weight: Tensor,
    rms_eps: float | None = None,
    *,
    rstd: Tensor | None = None,
    out: Tensor | None = None,
    tile: Tile | None = None,
    num_sms: int | None = None,
    workspace: MatmulWorkspace | None = None,
) -> Tensor:
    """silu(gate) * up of the normalised x. x: [T, N], weight: [2 * I, N], gate first -> [T, I].

    rms_eps, rstd and workspace are as in `linear`: RMSNorm of x, its weight folded into `weight`.
    num_sms caps the grid to a partition. Raises ValueError where a shape or a stride does not fit.
    """
    num_tokens, N = x.shape
    if weight.shape[0] % 2 or weight.shape[1] != N:
        raise ValueError(f"weight must be [2 * I, {N}], got {list(weight.shape)}")
    require_unit_stride("x", x)
    require_unit_stride("weight", weight)
    out = output(out, (num_tokens, weight.shape[0] // 2), x)
    options = {"tile": tile, "num_sms": num_sms, "workspace": workspace}
    launch_matmul(x, weight, None, None, rms_eps, rstd, out, gated=True, **options)
    return out


def mlp(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    rms_eps: float | None = None,
    *,
    rstd: Tensor | None = None,
    act: Tensor | None = None,
    out: Tensor | None = None,
    num_sms: int | None = None,
    workspace: MatmulWorkspace | None = None,
) -> Tensor:
    """x + down(silu(gate(norm(x))) * up(norm(x))). x: [T, N], gate_up_weight: [2 * I, N],
    down_weight: [N, I] -> [T, N].

    rms_eps, rstd and workspace are as in `linear`; act: [T, I] takes the intermediate; out may be x
    itself. Raises ValueError where a shape or a stride does not fit.
    """
    require_shape("down_weight", down_weight, x.shape[1], gate_up_weight.shape[0] // 2)
    options = {"num_sms": num_sms, "workspace": workspace}
    act = gate_up(x, gate_up_weight, rms_eps, rstd=rstd, out=act, **options)
    return linear(act, down_weight, residual=x, out=out, **options)
