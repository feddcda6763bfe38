"""Copies of KV blocks, on one GPU and to another, beside one bulk copy of as many bytes."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import kernels
from experiments.ceilings import peer_device
from experiments.kernel_case import Case, Draw, Impl, Problem, row_error

BLOCK_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class CopyBlocks(Case):
    """KV blocks, scattered on both sides: whole slabs, or one layer's slices of them."""

    kernel: ClassVar[str] = "copy_blocks"

    num_blocks: int
    num_layers: int  # of a slab; 0 copies one layer's slices
    num_kv_heads: int = 8
    head_dim: int = 128

    @property
    def shape(self) -> str:
        what = f"L={self.num_layers}" if self.num_layers else "one layer"
        sizes = f"H_KV={self.num_kv_heads} D={self.head_dim} block={BLOCK_SIZE}"
        return f"blocks={self.num_blocks} {what} {sizes}"

    @property
    def moved_bytes(self) -> int:
        slots = self.num_blocks * max(self.num_layers, 1) * 2 * BLOCK_SIZE
        return slots * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        return 2 * self.moved_bytes  # read and written

    def target(self, device: torch.device) -> torch.device | None:
        return device

    def build(self, device: torch.device, copies: int) -> Problem:
        target = self.target(device)
        if target is None:
            raise ValueError(f"device must have a peer, got {device} alone")
        draw, n = Draw(device, self.dtype), self.num_blocks
        block = (2, BLOCK_SIZE, self.num_kv_heads, self.head_dim)
        if self.num_layers:  # a copy of the buffers is a set of blocks
            src = draw.randn(copies * n + 7, self.num_layers, *block)
            ids = list(draw.permutation(len(src))[: copies * n].split(n))
        else:  # a copy of the buffers is a layer
            src = draw.randn(n + 7, copies, *block)
            ids = [draw.permutation(len(src))[:n]] * copies
        dst = torch.empty_like(src, device=target)
        dst_ids = [draw.permutation(len(src))[:n] for _ in range(copies)]
        bulk = [self._pool(src, i)[ids[i]] for i in range(copies)]
        bulk_dst = [torch.empty_like(x, device=target) for x in bulk]
        bulk_dst[0].copy_(bulk[0])  # torch opens the way to a peer, and back: kernels cannot
        bulk[0].copy_(bulk_dst[0])

        def ours(i: int, num_sms: int | None) -> None:
            kernels.copy_blocks(self._pool(src, i), self._pool(dst, i), ids[i], dst_ids[i])

        return Problem(
            ours=ours,
            expected=lambda: (bulk[0],),
            results=lambda: (self._pool(dst, 0)[dst_ids[0].to(target)],),
            outputs=(dst,),
            error=row_error,
            bound=0.0,
            peers=[
                Impl(
                    name="bulk copy",
                    run=lambda i: bulk_dst[i].copy_(bulk[i]),
                    captured=target == device,
                )
            ],
        )

    def _pool(self, pool: Tensor, i: int) -> Tensor:
        return pool if self.num_layers else pool[:, i]


@dataclass(frozen=True, kw_only=True)
class CopyBlocksToPeer(CopyBlocks):
    """The same into the memory of a second GPU; its bytes cross the link once."""

    kernel: ClassVar[str] = "copy_blocks to peer"

    @property
    def bytes(self) -> int:
        return self.moved_bytes

    def target(self, device: torch.device) -> torch.device | None:
        return peer_device(device)

    def is_possible(self, device: torch.device) -> bool:
        return self.target(device) is not None


def copy_cases() -> list[Case]:
    """One prompt's blocks or several; 28 layers are Qwen3-0.6B's."""
    cases: list[Case] = []
    for copy in (CopyBlocks, CopyBlocksToPeer):
        cases += [copy(num_blocks=n, num_layers=28, quick=n == 64) for n in (64, 256)]
        cases += [copy(num_blocks=n, num_layers=0, quick=n == 1024) for n in (256, 1024)]
    return cases
