"""Attention of others over the same tokens: contiguous copies of the cache, or its pages."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from experiments.kernel_case import Impl
from experiments.peers import optional
from kernels.tile import cdiv

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "torch sdpa": SDPBackend.FLASH_ATTENTION}
WORKSPACE_BYTES = 256 << 20  # FlashInfer asks for 128 MiB, and for more where heads are many


@dataclass(frozen=True)
class Paged:
    """Whose tokens lie in which blocks of a KV pool."""

    pool: Tensor  # [num_blocks, L, 2, block_size, H_KV, D]
    block_table: Tensor  # [B, max_blocks] int32
    context_lens: tuple[int, ...]
    num_heads: int

    @property
    def is_even(self) -> bool:
        return len(set(self.context_lens)) == 1

    def contiguous(self, layer: int) -> tuple[Tensor, Tensor]:
        """k and v of one layer, of contexts of one length, as [B, H_KV, S, D]."""
        num_blocks = cdiv(self.context_lens[0], self.pool.shape[3])
        rows = self.pool[:, layer][self.block_table[:, :num_blocks].long()]
        kv = rows.permute(2, 0, 4, 1, 3, 5).flatten(3, 4)  # [2, B, H_KV, S, D]
        k, v = kv[..., : self.context_lens[0], :].contiguous()
        return k, v

    def page_lists(self) -> tuple[Tensor, Tensor, Tensor]:
        """indptr [B + 1], indices and the tokens in each last page [B], all int32."""
        block_size, device = self.pool.shape[3], self.pool.device
        needed = [cdiv(n, block_size) for n in self.context_lens]
        last = [(n - 1) % block_size + 1 for n in self.context_lens]
        indices = torch.cat([self.block_table[b, :n] for b, n in enumerate(needed)])
        starts = [sum(needed[:b]) for b in range(len(needed) + 1)]
        ints = {"dtype": torch.int32, "device": device}
        return torch.tensor(starts, **ints), indices.int(), torch.tensor(last, **ints)


def decode_peers(paged: Paged, q: Tensor) -> list[Impl]:
    """q: [B, H, D], the same for every layer."""
    if q.device.type != "cuda":
        return []
    return _decode_sdpa(paged, q) + _flashinfer_decode(paged, q)


def prefill_peers(paged: Paged, q: list[Tensor]) -> list[Impl]:
    """q: [T, H, D] for each layer."""
    if q[0].device.type != "cuda":
        return []
    return _prefill_sdpa(paged, q) + _flashinfer_prefill(paged, q)


def _decode_sdpa(paged: Paged, q: Tensor) -> list[Impl]:
    """A KV head's group of query heads stands as its queries: no mask tells them apart, and k and v
    are read once, whatever a backend thinks of GQA."""
    if not paged.is_even:
        return []
    kv = [paged.contiguous(layer) for layer in range(paged.pool.shape[1])]
    grouped = q.unflatten(1, (kv[0][0].shape[1], -1))  # [B, H_KV, G, D]
    return [
        Impl(name=name, run=_on_backend(backend, lambda i: _sdpa(grouped, *kv[i])))
        for name, backend in BACKENDS.items()
    ]


def _prefill_sdpa(paged: Paged, q: list[Tensor]) -> list[Impl]:
    if not paged.is_even:
        return []
    kv = [paged.contiguous(layer) for layer in range(paged.pool.shape[1])]
    batch = len(paged.context_lens)
    heads_first = [x.unflatten(0, (batch, -1)).transpose(1, 2).contiguous() for x in q]

    def attend(i: int) -> Tensor:
        out = _sdpa(heads_first[i], *kv[i], is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)  # [B, S, H, D], a view

    return [Impl(name=name, run=_on_backend(backend, attend)) for name, backend in BACKENDS.items()]


def _sdpa(*args: Tensor, **options: Any) -> Tensor:
    return scaled_dot_product_attention(*args, **options)


def _on_backend(backend: SDPBackend, run: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    """run with no backend but this one; RuntimeError where it does not take the shape."""

    def on_backend(i: int) -> Tensor:
        with warnings.catch_warnings(), sdpa_kernel([backend]):
            warnings.simplefilter("ignore")  # why the other backends were not taken
            return run(i)

    return on_backend


def _flashinfer_decode(paged: Paged, q: Tensor) -> list[Impl]:
    """Both of its kernels: on CUDA cores and on tensor cores."""
    flashinfer = optional("flashinfer")
    if flashinfer is None:
        return []
    _, _, _, block_size, num_kv_heads, head_dim = paged.pool.shape
    sizes = (paged.num_heads, num_kv_heads, head_dim, block_size)

    def impl(name: str, use_tensor_cores: bool) -> Impl:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            _workspace(q), "NHD", use_tensor_cores=use_tensor_cores
        )
        out = torch.empty_like(q)
        dtypes = {"q_data_type": q.dtype, "kv_data_type": q.dtype}
        planned = []

        def run(i: int) -> Tensor:
            if not planned:  # at the first call, so that what it raises skips this peer alone
                wrapper.plan(*paged.page_lists(), *sizes, **dtypes)
                planned.append(True)
            return wrapper.run(q, paged.pool[:, i], out=out)

        return Impl(name=name, run=run)

    return [impl("flashinfer", False), impl("flashinfer, tensor cores", True)]


def _flashinfer_prefill(paged: Paged, q: list[Tensor]) -> list[Impl]:
    flashinfer = optional("flashinfer")
    if flashinfer is None:
        return []
    _, _, _, block_size, num_kv_heads, head_dim = paged.pool.shape
    starts = [sum(paged.context_lens[:b]) for b in range(len(paged.context_lens) + 1)]
    cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=q[0].device)
    sizes = (paged.num_heads, num_kv_heads, head_dim, block_size)

    def impl(backend: str) -> Impl:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            _workspace(q[0]), "NHD", backend=backend
        )
        out = torch.empty_like(q[0])
        options = {"causal": True, "q_data_type": out.dtype, "kv_data_type": out.dtype}
        planned = []

        def run(i: int) -> Tensor:
            if not planned:
                wrapper.plan(cu_seqlens, *paged.page_lists(), *sizes, **options)
                planned.append(True)
            return wrapper.run(q[i], paged.pool[:, i], out=out)

        return Impl(name=f"flashinfer {backend}", run=run)

    return [impl("fa2"), impl("fa3")]


def _workspace(x: Tensor) -> Tensor:
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=x.device)
