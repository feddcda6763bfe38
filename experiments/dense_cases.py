"""The matrix products of a layer, each with what the engine fuses into it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import kernels
from experiments import peers
from experiments.kernel_case import BOUND, Case, Draw, Problem, row_error
from experiments.shapes import SHAPES
from kernels import reference
from kernels.tile import cdiv
from models.decoder import TILE_ROWS

EPS = 1e-6
MLP_TOKENS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
MLP_SMS = (64, 96)  # as an FFN stage has them, beside attention on the others
LINEAR_TOKENS = (1, 64, 256, 2048)
HEAD_TOKENS = (1, 64, 256)
MODELS = ("Qwen3-0.6B", "Qwen3-8B")


@dataclass(frozen=True, kw_only=True)
class Mlp(Case):
    """RMSNorm + gate/up + SiLU * up, then down + residual."""

    kernel: ClassVar[str] = "mlp"
    sweeps_peers: ClassVar[bool] = True

    model: str  # whose sizes these are
    num_tokens: int
    hidden: int
    intermediate: int

    @property
    def shape(self) -> str:
        return f"{self.model} M={self.num_tokens} N={self.hidden} I={self.intermediate}"

    @property
    def bytes(self) -> int:
        """The weights; x read and out written. What lies between need not leave the chip."""
        weights = 3 * self.hidden * self.intermediate
        return (weights + 2 * self.num_tokens * self.hidden) * self.dtype.itemsize

    @property
    def flops(self) -> int:
        return 6 * self.num_tokens * self.hidden * self.intermediate

    def build(self, device: torch.device, copies: int) -> Problem:
        draw, N, width = Draw(device, self.dtype), self.hidden, self.intermediate
        x = [top_of_buffer(draw, self.num_tokens, N) for _ in range(copies)]
        gate_up = [draw.randn(2 * width, N, std=N**-0.5) for _ in range(copies)]
        # so that the MLP adds about as much as x: a small part of out could be wrong unseen
        down = [draw.randn(N, width, std=2 * width**-0.5) for _ in range(copies)]
        rstd = draw.empty(self.num_tokens, dtype=torch.float32)
        act, out = top_of_buffer(draw, self.num_tokens, width), draw.empty(self.num_tokens, N)
        scratch = {"rstd": rstd, "act": act, "workspace": kernels.matmul_workspace(device)}

        def ours(i: int, num_sms: int | None) -> None:
            kernels.mlp(x[i], gate_up[i], down[i], EPS, **scratch, out=out, num_sms=num_sms)

        chains = peers.mlp_chains(x, gate_up, down, EPS)
        return Problem(
            ours=ours,
            expected=lambda: (reference.mlp(x[0], gate_up[0], down[0], EPS),),
            results=lambda: (out,),
            outputs=(out, act, rstd),
            error=row_error,
            bound=BOUND[self.dtype],
            peers=chains,
            told_peers=lambda num_sms: [peers.told(chains[0], num_sms, device)],
        )


@dataclass(frozen=True, kw_only=True)
class Linear(Case):
    """x @ weight.T, with RMSNorm before it or the residual behind it as the engine has it."""

    kernel: ClassVar[str] = "linear"

    name: str  # of the model and the matrix
    num_tokens: int
    width: int
    depth: int
    has_norm: bool = False
    has_residual: bool = False

    @property
    def shape(self) -> str:
        extras = " +norm" * self.has_norm + " +residual" * self.has_residual
        return f"{self.name} M={self.num_tokens} N={self.width} K={self.depth}{extras}"

    @property
    def bytes(self) -> int:
        M, N, K = self.num_tokens, self.width, self.depth
        return (N * K + M * K + M * N * (1 + self.has_residual)) * self.dtype.itemsize

    @property
    def flops(self) -> int:
        return 2 * self.num_tokens * self.width * self.depth

    def build(self, device: torch.device, copies: int) -> Problem:
        draw, (M, N, K) = Draw(device, self.dtype), (self.num_tokens, self.width, self.depth)
        x = [top_of_buffer(draw, M, K) for _ in range(copies)]
        weight = [draw.randn(N, K, std=K**-0.5) for _ in range(copies)]
        eps = EPS if self.has_norm else None
        residual = draw.randn(M, N) if self.has_residual else None
        rstd, out = draw.empty(M, dtype=torch.float32), draw.empty(M, N)
        scratch = {"rstd": rstd, "workspace": kernels.matmul_workspace(device)}

        def ours(i: int, num_sms: int | None) -> None:
            operands = (x[i], weight[i], None, residual, eps)
            kernels.linear(*operands, **scratch, out=out, num_sms=num_sms)

        return Problem(
            ours=ours,
            expected=lambda: (reference.linear(x[0], weight[0], None, residual, eps),),
            results=lambda: (out,),
            outputs=(out, rstd),
            error=row_error,
            bound=BOUND[self.dtype],
            peers=peers.linear_chains(x, weight, eps, residual),
        )


def top_of_buffer(draw: Draw, num_tokens: int, width: int) -> Tensor:
    """[num_tokens, width] as an engine has it: the first rows of a buffer for more tokens."""
    return draw.randn(cdiv(num_tokens, TILE_ROWS) * TILE_ROWS, width)[:num_tokens]


def dense_cases() -> list[Case]:
    """The MLP, qkv, output projection and LM head of a small and a large model."""
    cases: list[Case] = []
    for model in MODELS:
        c, is_large = SHAPES[model], model == "Qwen3-8B"
        hidden, q_size = c["hidden_size"], c["num_attention_heads"] * c["head_dim"]
        qkv_size = q_size + 2 * c["num_key_value_heads"] * c["head_dim"]
        cases += [
            Mlp(
                model=model,
                num_tokens=M,
                hidden=hidden,
                intermediate=c["intermediate_size"],
                sweep=MLP_SMS if 128 <= M <= 1024 else (),
                quick=is_large and M in (1, 64, 512),
            )
            for M in MLP_TOKENS
        ]
        for M in LINEAR_TOKENS:
            qkv = {"name": f"{model} qkv", "num_tokens": M, "width": qkv_size, "depth": hidden}
            o = {"name": f"{model} o", "num_tokens": M, "width": hidden, "depth": q_size}
            cases.append(Linear(**qkv, has_norm=True, quick=is_large and M == 64))
            cases.append(Linear(**o, has_residual=True))
        head = {"name": f"{model} lm_head", "width": c["vocab_size"], "depth": hidden}
        cases += [Linear(num_tokens=M, **head) for M in HEAD_TOKENS]
    return cases
