"""Triton kernels for LLM inference; `kernels.reference` holds each one again in plain PyTorch."""

from kernels.decode_attention import DecodeWorkspace, decode_attention, decode_workspace
from kernels.kv_copy import copy_blocks
from kernels.linear import linear
from kernels.mlp import gate_up, mlp
from kernels.norm import add_rms_norm, rms_norm, row_rstd
from kernels.prefill_attention import prefill_attention
from kernels.rope_store import rope_store
from kernels.sampling import SampleWorkspace, sample, sample_workspace
from kernels.tall_matmul import MatmulWorkspace, matmul_workspace
from kernels.tile import Tile

__all__ = [
    "DecodeWorkspace",
    "MatmulWorkspace",
    "SampleWorkspace",
    "Tile",
    "add_rms_norm",
    "copy_blocks",
    "decode_attention",
    "decode_workspace",
    "gate_up",
    "linear",
    "matmul_workspace",
    "mlp",
    "prefill_attention",
    "rms_norm",
    "rope_store",
    "row_rstd",
    "sample",
    "sample_workspace",
]
