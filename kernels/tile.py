"""What the launchers share: the launch choice of a kernel and the checks of its arguments."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

INTERPRETED_SMS = 4  # programs of a persistent grid where there is no GPU: more than one, still few


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One launch choice: how much of each dim a program holds, and what it runs on."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int = 4
    num_stages: int = 3


@lru_cache(maxsize=64)
def device_sms(device: torch.device) -> int:
    """Streaming multiprocessors of the whole device."""
    if device.type != "cuda":
        return INTERPRETED_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def dot_precision(dtype: torch.dtype) -> str:
    """The precision of tl.dot: fp32 operands stay fp32, where Triton would round them to tf32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def require_shape(name: str, tensor: Tensor, *want: int) -> None:
    """ValueError unless `tensor` has just this shape."""
    if tensor.shape != want:
        raise ValueError(f"{name} must be {list(want)}, got {list(tensor.shape)}")


def require_unit_stride(name: str, tensor: Tensor) -> None:
    """ValueError unless the last dim is contiguous, as every kernel here reads it."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dim, got stride {tensor.stride()}")


def require_vector(name: str, tensor: Tensor, length: int) -> None:
    """ValueError unless the tensor is [length], one element behind the other."""
    require_shape(name, tensor, length)
    require_unit_stride(name, tensor)


def require_fp32(name: str, tensor: Tensor) -> None:
    """ValueError unless the tensor is fp32: what a kernel writes to it may not fit another."""
    if tensor.dtype != torch.float32:
        raise ValueError(f"{name} must be torch.float32, got {tensor.dtype}")


def require_paged(q: Tensor, kv_cache: Tensor, block_table: Tensor, num_requests: int) -> None:
    """ValueError unless these belong together. q: [_, H, D], kv_cache: one layer [num_blocks, 2,
    block_size, H_KV, D] with H a multiple of H_KV, block_table: [num_requests, max_blocks]."""
    num_blocks, _, block_size, num_kv_heads, _ = kv_cache.shape
    require_shape("kv_cache", kv_cache, num_blocks, 2, block_size, num_kv_heads, q.shape[2])
    require_shape("block_table", block_table, num_requests, block_table.shape[1])
    if q.shape[1] % num_kv_heads:
        raise ValueError(f"q must have a multiple of {num_kv_heads} heads, got {q.shape[1]}")
    for name, tensor in (("q", q), ("kv_cache", kv_cache), ("block_table", block_table)):
        require_unit_stride(name, tensor)


def output(out: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """`out` after a check of its shape, or a new tensor of like's dtype on its device."""
    if out is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    if out.shape != shape:
        raise ValueError(f"out must be {list(shape)}, got {list(out.shape)}")
    require_unit_stride("out", out)
    return out
