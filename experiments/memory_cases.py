"""Kernels that move bytes: norms, the KV store, sampling."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import kernels
from experiments import peers
from experiments.kernel_case import BOUND, Case, Draw, Problem, row_error, share_unequal
from kernels import reference
from kernels.tile import cdiv

EPS = 1e-6
MAX_POSITION = 40960
BLOCK_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class RmsNorm(Case):
    """Rows in, rows out."""

    kernel: ClassVar[str] = "rms_norm"

    num_tokens: int
    hidden: int

    @property
    def shape(self) -> str:
        return f"T={self.num_tokens} N={self.hidden}"

    @property
    def bytes(self) -> int:
        return (2 * self.num_tokens + 1) * self.hidden * self.dtype.itemsize  # weight read once

    def build(self, device: torch.device, copies: int) -> Problem:
        draw = Draw(device, self.dtype)
        x = [draw.randn(self.num_tokens, self.hidden) for _ in range(copies)]
        out, weight = [torch.empty_like(rows) for rows in x], draw.randn(self.hidden)

        def ours(i: int, num_sms: int | None) -> None:
            kernels.rms_norm(x[i], weight, EPS, out=out[i])

        return Problem(
            ours=ours,
            expected=lambda: (reference.rms_norm(x[0], weight, EPS),),
            results=lambda: (out[0],),
            outputs=(out[0],),
            error=row_error,
            bound=BOUND[self.dtype],
            peers=peers.rms_norm_peers(x, weight, EPS),
        )


@dataclass(frozen=True, kw_only=True)
class AddRmsNorm(RmsNorm):
    """The residual stream is read and written besides."""

    kernel: ClassVar[str] = "add_rms_norm"

    @property
    def bytes(self) -> int:
        return (4 * self.num_tokens + 1) * self.hidden * self.dtype.itemsize

    def build(self, device: torch.device, copies: int) -> Problem:
        draw = Draw(device, self.dtype)
        x, residual = (
            [draw.randn(self.num_tokens, self.hidden) for _ in range(copies)] for _ in range(2)
        )
        out, weight = [torch.empty_like(rows) for rows in x], draw.randn(self.hidden)
        start = residual[0].clone()

        def ours(i: int, num_sms: int | None) -> None:
            kernels.add_rms_norm(x[i], residual[i], weight, EPS, out=out[i])

        def expected() -> tuple[Tensor, Tensor]:
            summed = start.clone()  # ours adds in place, and so does the reference
            return reference.add_rms_norm(x[0], summed, weight, EPS), summed

        return Problem(
            ours=ours,
            expected=expected,
            results=lambda: (out[0], residual[0]),
            outputs=(out[0],),
            restore=lambda: residual[0].copy_(start),
            error=row_error,
            bound=BOUND[self.dtype],
            peers=peers.add_rms_norm_peers(x, residual, weight, EPS),
        )


@dataclass(frozen=True, kw_only=True)
class RopeStore(Case):
    """QK-norm, RoPE, and k and v to scattered slots."""

    kernel: ClassVar[str] = "rope_store"

    num_tokens: int
    num_heads: int
    num_kv_heads: int = 8
    head_dim: int = 128

    @property
    def shape(self) -> str:
        return f"T={self.num_tokens} H={self.num_heads} H_KV={self.num_kv_heads} D={self.head_dim}"

    @property
    def width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def bytes(self) -> int:
        return 2 * self.num_tokens * self.width * self.dtype.itemsize  # qkv read; q, k, v written

    def build(self, device: torch.device, copies: int) -> Problem:
        draw, T = Draw(device, self.dtype), self.num_tokens
        num_blocks = cdiv(T, BLOCK_SIZE) + 3
        qkv = [draw.randn(T, self.width) for _ in range(copies)]
        q = [draw.empty(T, self.num_heads, self.head_dim) for _ in range(copies)]
        cache = [
            draw.empty(num_blocks, 2, BLOCK_SIZE, self.num_kv_heads, self.head_dim)
            for _ in range(copies)
        ]
        tokens = torch.arange(T, device=device)
        blocks = draw.permutation(num_blocks)[tokens // BLOCK_SIZE]
        slots = blocks * BLOCK_SIZE + tokens % BLOCK_SIZE
        positions = tokens % MAX_POSITION
        angles = Draw(device, torch.float32).randn(max(T, 1), self.head_dim // 2)
        cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
        q_norm, k_norm = draw.randn(self.head_dim), draw.randn(self.head_dim)

        def stored(kv_cache: Tensor) -> Tensor:
            return kv_cache[blocks, :, tokens % BLOCK_SIZE]  # [T, 2, H_KV, D]

        def ours(i: int, num_sms: int | None) -> None:
            kernels.rope_store(
                qkv[i], positions, cos_sin, slots, cache[i], q_norm, k_norm, EPS, out=q[i]
            )

        def expected() -> tuple[Tensor, Tensor]:
            kv_cache = torch.empty_like(cache[0])
            out = reference.rope_store(
                qkv[0], positions, cos_sin, slots, kv_cache, q_norm, k_norm, EPS
            )
            return out, stored(kv_cache)

        return Problem(
            ours=ours,
            expected=expected,
            results=lambda: (q[0], stored(cache[0])),
            outputs=(q[0], cache[0]),
            error=row_error,
            bound=BOUND[self.dtype],
        )


@dataclass(frozen=True, kw_only=True)
class Sampling(Case):
    """Logits to token ids, all rows alike."""

    kernel: ClassVar[str] = "sample"

    num_rows: int
    vocab_size: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    std: float = 3.0  # of the logits: at 1, top-p 0.95 keeps half the vocabulary, at 3 few tokens

    @property
    def shape(self) -> str:
        how = f"temperature={self.temperature:g}" if self.temperature else "greedy"
        how += f" top_k={self.top_k}" * bool(self.top_k)
        how += f" top_p={self.top_p:g}" * (self.top_p < 1)
        how += f" std={self.std:g}" * (self.std != Sampling.std)
        return f"B={self.num_rows} V={self.vocab_size} {how}"

    @property
    def bytes(self) -> int:
        return self.num_rows * self.vocab_size * self.dtype.itemsize  # one read of the logits

    def build(self, device: torch.device, copies: int) -> Problem:
        draw, B = Draw(device, self.dtype), self.num_rows
        logits = [draw.randn(B, self.vocab_size, std=self.std) for _ in range(copies)]
        params = (
            draw.full(B, self.temperature, torch.float32),
            draw.full(B, self.top_k, torch.int32),
            draw.full(B, self.top_p, torch.float32),
            draw.full(B, 0.0, torch.float32),
            torch.arange(B, device=device),
            draw.full(B, 0, torch.int32),
        )
        out = draw.empty(B, dtype=torch.int64)
        workspace = kernels.sample_workspace(B, self.vocab_size, device)

        def ours(i: int, num_sms: int | None) -> None:
            kernels.sample(logits[i], *params, workspace=workspace, out=out)

        return Problem(
            ours=ours,
            expected=lambda: (reference.sample(logits[0], *params),),
            results=lambda: (out,),
            outputs=(out,),
            error=share_unequal,
            # fp32 sums decide where the uniform number meets a step of the CDF
            bound=0.01 if self.temperature else 0.0,
            peers=[] if self.temperature else peers.argmax_peer(logits),
        )


def memory_cases() -> list[Case]:
    """Decode batches, a prefill chunk, and a vocabulary."""
    cases: list[Case] = []
    for T in (1, 256, 8192):
        for norm in (RmsNorm, AddRmsNorm):
            cases += [
                norm(num_tokens=T, hidden=N, quick=(T, N) == (8192, 4096)) for N in (1024, 4096)
            ]
        cases += [
            RopeStore(num_tokens=T, num_heads=H, quick=(T, H) == (8192, 32)) for H in (16, 32)
        ]
    logits = {"num_rows": 256, "vocab_size": 151936}
    cases += [
        Sampling(**logits, quick=True),
        Sampling(**logits, temperature=0.6),
        Sampling(**logits, temperature=0.6, top_k=50),
        Sampling(**logits, temperature=0.6, top_p=0.95, quick=True),
        Sampling(**logits, temperature=0.6, top_p=0.95, std=1.0),
    ]
    return cases
