"""Paged attention over scattered blocks, rotated over the layers of one pool."""

import random
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import kernels
from experiments import attention_peers as peers
from experiments.kernel_case import BOUND, Case, Draw, Problem, row_error
from kernels import reference
from kernels.tile import cdiv

DECODE_SMS = (48, 56, 64, 72, 96)
REFERENCE_QUERIES = 1024  # of a request at a time: the reference holds all scores in fp32


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """What decode and prefill share: requests over a KV pool."""

    context_lens: tuple[int, ...]
    num_heads: int
    num_kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16
    spread: str = ""  # how the lengths came about, where they differ

    @property
    def kv_bytes(self) -> int:
        """k and v of every token of every context, each read once."""
        tokens = 2 * sum(self.context_lens) * self.num_kv_heads
        return tokens * self.head_dim * self.dtype.itemsize

    @property
    def heads_text(self) -> str:
        sizes = {"H": self.num_heads, "H_KV": self.num_kv_heads, "D": self.head_dim}
        return " ".join(f"{k}={v}" for k, v in (sizes | {"block": self.block_size}).items())

    @property
    def context_text(self) -> str:
        if self.spread:
            return self.spread
        counts = Counter(self.context_lens)
        if len(counts) == 1:
            return str(self.context_lens[0])
        return "+".join(f"{count}x{n}" for n, count in sorted(counts.items(), reverse=True))

    def pool(self, draw: Draw, num_layers: int) -> tuple[Tensor, Tensor]:
        """[num_blocks, L, 2, block_size, H_KV, D] and a block_table of blocks in no order."""
        needed = [cdiv(n, self.block_size) for n in self.context_lens]
        order = draw.permutation(sum(needed) + 7).int()
        block_table = order[-1].repeat(len(needed), max(needed))
        for b, n in enumerate(needed):
            start = sum(needed[:b])
            block_table[b, :n] = order[start : start + n]
        shape = (len(order), num_layers, 2, self.block_size, self.num_kv_heads, self.head_dim)
        return draw.randn(*shape), block_table

    def paged(self, pool: Tensor, block_table: Tensor) -> peers.Paged:
        """The same for the peers."""
        return peers.Paged(pool, block_table, self.context_lens, self.num_heads)


@dataclass(frozen=True, kw_only=True)
class DecodeAttention(AttentionCase):
    """One new token of every request."""

    kernel: ClassVar[str] = "decode_attention"

    @property
    def shape(self) -> str:
        return f"B={len(self.context_lens)} context={self.context_text} {self.heads_text}"

    @property
    def bytes(self) -> int:
        return self.kv_bytes

    @property
    def flops(self) -> int:
        return 4 * self.num_heads * self.head_dim * sum(self.context_lens)

    def build(self, device: torch.device, copies: int) -> Problem:
        draw = Draw(device, self.dtype)
        pool, block_table = self.pool(draw, copies)
        context_lens = torch.tensor(self.context_lens, dtype=torch.int32, device=device)
        q = draw.randn(len(context_lens), self.num_heads, self.head_dim)
        out, scale = torch.empty_like(q), self.head_dim**-0.5
        heads = (self.num_heads, self.num_kv_heads, self.head_dim)
        workspace = kernels.decode_workspace(*heads, device)

        def ours(i: int, num_sms: int | None) -> None:
            kernels.decode_attention(
                q,
                pool[:, i],
                block_table,
                context_lens,
                scale,
                workspace=workspace,
                out=out,
                num_sms=num_sms,
            )

        return Problem(
            ours=ours,
            expected=lambda: (
                reference.decode_attention(q, pool[:, 0], block_table, context_lens, scale),
            ),
            results=lambda: (out,),
            outputs=(out,),
            peers=peers.decode_peers(self.paged(pool, block_table), q),
            error=row_error,
            bound=BOUND[self.dtype],
        )


@dataclass(frozen=True, kw_only=True)
class PrefillAttention(AttentionCase):
    """All tokens of every prompt at once, none of them cached before."""

    kernel: ClassVar[str] = "prefill_attention"

    @property
    def shape(self) -> str:
        return f"B={len(self.context_lens)} tokens={self.context_text} {self.heads_text}"

    @property
    def bytes(self) -> int:
        q_bytes = sum(self.context_lens) * self.num_heads * self.head_dim * self.dtype.itemsize
        return 2 * q_bytes + self.kv_bytes  # q read, out written

    @property
    def flops(self) -> int:
        pairs = sum(n * (n + 1) // 2 for n in self.context_lens)  # (query, key it sees)
        return 4 * self.num_heads * self.head_dim * pairs

    def build(self, device: torch.device, copies: int) -> Problem:
        draw = Draw(device, self.dtype)
        pool, block_table = self.pool(draw, copies)
        context_lens = torch.tensor(self.context_lens, dtype=torch.int32, device=device)
        zero = context_lens.new_zeros(1)
        cu_seqlens = torch.cat([zero, context_lens.cumsum(0, dtype=torch.int32)])
        num_tokens, longest = sum(self.context_lens), max(self.context_lens)
        q = [draw.randn(num_tokens, self.num_heads, self.head_dim) for _ in range(copies)]
        out = [torch.empty_like(x) for x in q]
        scale = self.head_dim**-0.5

        def ours(i: int, num_sms: int | None) -> None:
            kernels.prefill_attention(
                q[i],
                pool[:, i],
                block_table,
                cu_seqlens,
                context_lens,
                longest,
                scale,
                out=out[i],
                num_sms=num_sms,
            )

        return Problem(
            ours=ours,
            expected=lambda: (self.expected(q[0], pool[:, 0], block_table, scale),),
            results=lambda: (out[0],),
            outputs=(out[0],),
            peers=peers.prefill_peers(self.paged(pool, block_table), q),
            error=row_error,
            bound=BOUND[self.dtype],
        )

    def expected(self, q: Tensor, kv_cache: Tensor, block_table: Tensor, scale: float) -> Tensor:
        """The reference, some queries at a time: those before them are its cached prefix."""
        out, first = torch.empty_like(q), 0
        for b, length in enumerate(self.context_lens):
            for start in range(0, length, REFERENCE_QUERIES):
                end = min(start + REFERENCE_QUERIES, length)
                rows = slice(first + start, first + end)
                ints = {"dtype": torch.int32, "device": q.device}
                reference.prefill_attention(
                    q[rows],
                    kv_cache,
                    block_table[b : b + 1],
                    torch.tensor([0, end - start], **ints),
                    torch.tensor([end], **ints),
                    end - start,
                    scale,
                    out=out[rows],
                )
            first += length
        return out


def attention_cases() -> list[Case]:
    """The shapes that are published for the peers, and batches of unequal lengths."""
    rng = random.Random(0)
    uniform = tuple(rng.randint(1, 8192) for _ in range(64))
    even = tuple(sum(uniform) // 64 + (i < sum(uniform) % 64) for i in range(64))
    cases: list[Case] = [
        DecodeAttention(context_lens=(4096,), num_heads=32),
        DecodeAttention(context_lens=(2048,) * 8, num_heads=32, quick=True),
        DecodeAttention(context_lens=(1024,) * 32, num_heads=32, sweep=DECODE_SMS),
        DecodeAttention(context_lens=(4096,) * 64, num_heads=16, sweep=DECODE_SMS, quick=True),
        DecodeAttention(context_lens=(1024,) * 256, num_heads=16, sweep=DECODE_SMS),
        DecodeAttention(context_lens=(32768, *(256,) * 63), num_heads=16, quick=True),
        DecodeAttention(context_lens=((32768 + 63 * 256) // 64,) * 64, num_heads=16, quick=True),
        DecodeAttention(context_lens=uniform, num_heads=16, spread="uniform(1,8192)"),
        DecodeAttention(context_lens=even, num_heads=16),
    ]
    prefill = ((16, 512, False), (1, 2048, False), (4, 2048, True), (1, 8192, True))
    return cases + [
        PrefillAttention(context_lens=(n,) * batch, num_heads=32, quick=quick)
        for batch, n, quick in prefill
    ]
