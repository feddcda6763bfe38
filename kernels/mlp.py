"""The MLP of a layer in two launches: RMSNorm + gate/up + SiLU * up, then down + residual."""

from torch import Tensor

from kernels.linear import launch_matmul, linear, normalise_if_tall
from kernels.tile import Tile, output, require_shape, require_unit_stride


def gate_up(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    *,
    normed: Tensor | None = None,
    out: Tensor | None = None,
    tile: Tile | None = None,
    num_sms: int | None = None,
) -> Tensor:
    """silu(gate) * up of the normalised x. x: [T, N], weight: [2 * I, N], gate first -> [T, I].

    normed: [T, N] is scratch for the normalised x where the norm is not fused; num_sms caps the
    grid to a partition. Raises ValueError where a shape or a stride does not fit.
    """
    num_tokens, N = x.shape
    require_shape("norm_weight", norm_weight, N)
    if weight.shape[0] % 2 or weight.shape[1] != N:
        raise ValueError(f"weight must be [2 * I, {N}], got {list(weight.shape)}")
    require_unit_stride("x", x)
    require_unit_stride("weight", weight)
    out = output(out, (num_tokens, weight.shape[0] // 2), x)
    x, fused_weight = normalise_if_tall(x, norm_weight, eps, normed)
    launch_matmul(
        x, weight, None, None, fused_weight, eps, out, gated=True, tile=tile, num_sms=num_sms
    )
    return out


def mlp(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    *,
    normed: Tensor | None = None,
    act: Tensor | None = None,
    out: Tensor | None = None,
    num_sms: int | None = None,
) -> Tensor:
    """x + down(silu(gate(norm(x))) * up(norm(x))). x: [T, N], gate_up_weight: [2 * I, N],
    down_weight: [N, I] -> [T, N].

    act: [T, I] and normed: [T, N] are scratch; out may be x itself. Raises ValueError where a shape
    or a stride does not fit.
    """
    act = gate_up(x, norm_weight, eps, gate_up_weight, normed=normed, out=act, num_sms=num_sms)
    return linear(act, down_weight, residual=x, out=out, num_sms=num_sms)
