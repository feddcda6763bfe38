"""The block-first pool of keys and values on one device, and how many blocks fit there."""

import torch
from torch import Tensor

from models.config import ModelConfig

CPU_CACHE_BYTES = 1 << 30  # where nobody asks for a size: 23k tokens of SmolLM2 in fp32
GRAPH_RESERVE_BYTES = 1 << 30  # what CUDA graphs, Triton and cuBLAS take after the pool is made


class KVCache:
    """One block is one contiguous slab of all layers, so that it can move in one piece."""

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (num_blocks, config.num_layers, 2, block_size, config.num_kv_heads, config.head_dim)
        self.blocks = torch.empty(shape, dtype=dtype, device=device)  # [num_blocks, L, 2, ...]
        self.layers: tuple[Tensor, ...] = self.blocks.unbind(1)  # L x [num_blocks, 2, ...]


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one KV block: keys and values of all layers."""
    return block_size * config.kv_bytes_per_token(dtype.itemsize)


def num_blocks_that_fit(
    config: ModelConfig,
    block_size: int,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    gpu_memory_utilization: float,
) -> int:
    """KV blocks that the device has room for now, weights and buffers being there already.

    Raises ValueError where not even one fits.
    """
    size = block_bytes(config, block_size, dtype)
    device = torch.device(device)
    room = CPU_CACHE_BYTES
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what an earlier engine left there is free, but looks taken
        free, total = torch.cuda.mem_get_info(device)
        room = int(total * gpu_memory_utilization) - (total - free) - GRAPH_RESERVE_BYTES
    if room < size:
        raise ValueError(
            f"gpu_memory_utilization must leave room for one KV block of {size} bytes, "
            f"got {gpu_memory_utilization}, which leaves {room} bytes"
        )
    return room // size
