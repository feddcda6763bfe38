"""EngineConfig: every knob of the engine, checked before any work starts."""

import dataclasses
import difflib
import math
import numbers
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

DTYPES = ("bfloat16", "float16", "float32")
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


def check_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Refuse anything but an integer in [low, high]; a bool is not an integer here."""
    is_int = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_int or value < low or (high is not None and value > high):
        allowed = f">= {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be an integer {allowed}, got {value!r}")


def check_number(name: str, value: Any, allowed: str, low: float, high: float) -> None:
    """Refuse anything but a finite number in [low, high]."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or value == math.inf:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def check_bool(name: str, value: Any) -> None:
    """Refuse anything but True and False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Refuse anything but one of the strings in choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine is built from. Every field is checked, none changes afterwards."""

    model: str  # a name that models.fetch knows, a folder or a hub name
    device: str = "auto"  # auto (cuda:0 if there is one, else cpu) | cpu | cuda | cuda:N
    dtype: str = "auto"  # auto (the checkpoint's on a GPU, float32 on a CPU) | one of DTYPES
    max_num_seqs: int = 256  # requests that hold KV blocks at a time
    max_num_batched_tokens: int = 8192  # prompt tokens prefilled per step
    max_model_len: int | None = None  # tokens, prompt + generated; None: what model and cache allow
    block_size: int = 16  # tokens per KV block
    num_kv_blocks: int | None = None  # None: what gpu_memory_utilization leaves room for
    gpu_memory_utilization: float = 0.9  # share of the GPU's memory for weights, buffers and cache
    enable_prefix_caching: bool = True
    enforce_eager: bool = False  # True: no CUDA graphs
    load_format: str = "auto"  # auto | dummy: random weights from config.json alone
    kernels: str = "auto"  # auto (triton on a GPU, reference on a CPU) | triton | reference
    tensor_parallel_size: int = 1  # GPUs that share each layer; only 1 for now
    seed: int = 0  # from which requests without a seed of their own get theirs

    @classmethod
    def from_options(cls, model: str | os.PathLike[str], **options: Any) -> "EngineConfig":
        """Build from keyword options; an unknown one is a TypeError naming the nearest real one."""
        known = [field.name for field in dataclasses.fields(cls) if field.name != "model"]
        for name in options:
            if name not in known:
                raise TypeError(_unknown_option(name, known))
        return cls(model=os.fspath(model), **options)

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(f"model must be a name or a folder, got {self.model!r}")
        self._check_device()
        self._check_sizes()
        check_choice("dtype", self.dtype, ("auto", *DTYPES))
        check_bool("enable_prefix_caching", self.enable_prefix_caching)
        check_bool("enforce_eager", self.enforce_eager)
        check_choice("load_format", self.load_format, ("auto", "dummy"))
        check_choice("kernels", self.kernels, ("auto", "triton", "reference"))
        check_int("seed", self.seed, INT64_MIN, INT64_MAX)

    def _check_device(self) -> None:
        if not isinstance(self.device, str) or not re.fullmatch(
            r"auto|cpu|cuda(:[0-9]+)?", self.device
        ):
            raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {self.device!r}")
        check_int("tensor_parallel_size", self.tensor_parallel_size, 1)
        if self.tensor_parallel_size != 1:
            raise ValueError(
                "tensor_parallel_size must be 1 (more is not supported yet), "
                f"got {self.tensor_parallel_size}"
            )

    def _check_sizes(self) -> None:
        check_int("max_num_seqs", self.max_num_seqs, 1)
        check_int("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        if self.max_model_len is not None:
            check_int("max_model_len", self.max_model_len, 2)  # a prompt token and one generated
        check_int("block_size", self.block_size, 1)
        if self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size must be a power of two, got {self.block_size}")
        if self.num_kv_blocks is not None:
            check_int("num_kv_blocks", self.num_kv_blocks, 1)
        share = self.gpu_memory_utilization
        check_number("gpu_memory_utilization", share, "a number in (0, 1]", 0.0, 1.0)
        if share == 0:
            raise ValueError(f"gpu_memory_utilization must be a number in (0, 1], got {share!r}")

    def resolve_device(self) -> str:
        """Return "cpu" or "cuda:N", a device that is there."""
        import torch

        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if self.device == "cpu" or (self.device == "auto" and not num_gpus):
            return "cpu"
        index = int(self.device.partition(":")[2] or 0)
        if index >= num_gpus:
            there = f"one of cpu, cuda:0 to cuda:{num_gpus - 1}" if num_gpus else "cpu"
            raise ValueError(
                f"device must be {there} (GPUs found: {num_gpus}), got {self.device!r}"
            )
        return f"cuda:{index}"

    def resolve_dtype(self, checkpoint_dtype: str | None, device: str) -> str:
        """Return the dtype to compute in; a checkpoint that names none counts as float32."""
        auto = "float32" if device == "cpu" else checkpoint_dtype or "float32"
        dtype = auto if self.dtype == "auto" else self.dtype
        check_choice("dtype", dtype, DTYPES)
        if dtype == "bfloat16" and device != "cpu" and not _has_bfloat16(device):
            raise ValueError(f"dtype must be float16 or float32 on {device}, got 'bfloat16'")
        return dtype

    def resolve_kernels(self, device: str) -> str:
        """Return "triton" or "reference"."""
        if self.kernels == "auto":
            return "reference" if device == "cpu" else "triton"
        if self.kernels == "triton" and device == "cpu":
            self._check_interpreter()
        return self.kernels

    def _check_interpreter(self) -> None:
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                "kernels must be reference (or auto) on a cpu, unless TRITON_INTERPRET=1 is set "
                "before Python starts, got 'triton'"
            )
        if self.dtype == "bfloat16":  # the interpreter's bfloat16 tl.dot is off by orders
            raise ValueError(
                "dtype must be float16 or float32 under TRITON_INTERPRET=1, got 'bfloat16'"
            )


def _unknown_option(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return f"unknown option {name!r}; the nearest one is {nearest!r}, all are: {', '.join(known)}"


def _has_bfloat16(device: str) -> bool:
    import torch

    return torch.cuda.get_device_capability(device) >= (8, 0)
