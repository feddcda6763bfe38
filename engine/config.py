"""EngineConfig: every knob of the engine, checked before any work starts."""

import dataclasses
import difflib
import math
import numbers
import os
import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

DTYPES = ("bfloat16", "float16", "float32")
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
MIN_STAGE_SMS = 8  # the smallest partition of a GPU that has green contexts worth the name


class OneDeviceWarning(UserWarning):
    """Two GPUs were asked for where there are some, and there are not."""


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
    max_num_seqs: int = 256  # requests at a time that hold KV blocks; on two devices: that decode
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
    # prefill on one GPU, decode on another; "auto": where there are two, else on one device. With
    # device="cpu" both are CPU "devices" with pools of their own.
    enable_two_gpu_pd: bool | str = False
    prefill_device_id: int = 0  # the GPU that computes prompts and draws first tokens
    decode_device_id: int = 1  # the GPU that draws all tokens behind them
    # KV blocks of the prefill device, which prompts leave once they are handed over: a share of
    # what weights and buffers leave there, or of num_kv_blocks where that is given, which sizes the
    # decode pool; in any case enough for one request of max_model_len, if the device holds that
    prefill_kv_fraction: float = 0.25
    # prompts in the prefill pool, computed or not, and hand-overs in flight: prefill pauses there
    max_decode_backlog: int = 256
    # output tokens that a prompt's decode blocks are promised for before it is computed: fewer let
    # more requests in, and more of them are preempted and computed again where outputs get long
    pd_growth_tokens: int = 256
    # how KV blocks are handed over: slab (whole, once a prompt is computed), push (by layers, while
    # it is) or auto (by the prompt's length)
    kv_handoff: str = "auto"
    # decode's attention and FFN at the same time on SMs of their own, for micro-batches in turn;
    # enable_decode_pipeline=True is "static" where decode_pipeline says nothing else. Serial where
    # that cannot be had.
    enable_decode_pipeline: bool = False
    # static (the split below, whatever the batch) | auto (where the engine finds, when it starts,
    # that it is faster, on the splits that it finds best) | disabled
    decode_pipeline: str = "disabled"
    decode_attention_sm: int = 48  # SMs asked for attention
    decode_ffn_sm: int = 84  # and for FFN
    decode_micro_batches: int = 2
    # steps of fewer are serial; not measured yet. Static takes max_num_seqs where that is less: a
    # full step is always pipelined
    decode_pipeline_min_requests: int = 16
    decode_pipeline_profiling: bool = False  # time the stages, at a cost
    disable_green: bool = False  # True: no green contexts are made
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
        self._check_two_gpus()
        self._check_device()
        self._check_sizes()
        self._check_decode_pipeline()
        check_choice("dtype", self.dtype, ("auto", *DTYPES))
        check_bool("enable_prefix_caching", self.enable_prefix_caching)
        check_bool("enforce_eager", self.enforce_eager)
        check_choice("load_format", self.load_format, ("auto", "dummy"))
        check_choice("kernels", self.kernels, ("auto", "triton", "reference"))
        check_int("seed", self.seed, INT64_MIN, INT64_MAX)

    def _check_two_gpus(self) -> None:
        two = self.enable_two_gpu_pd
        if not isinstance(two, bool) and two != "auto":
            raise ValueError(f"enable_two_gpu_pd must be True, False or 'auto', got {two!r}")
        check_int("prefill_device_id", self.prefill_device_id, 0)
        check_int("decode_device_id", self.decode_device_id, 0)
        share = self.prefill_kv_fraction
        check_number("prefill_kv_fraction", share, "a number in (0, 1]", 0.0, 1.0)
        if share == 0:
            raise ValueError(f"prefill_kv_fraction must be a number in (0, 1], got {share!r}")
        check_int("max_decode_backlog", self.max_decode_backlog, 1)
        check_int("pd_growth_tokens", self.pd_growth_tokens, 0)
        check_choice("kv_handoff", self.kv_handoff, ("auto", "push", "slab"))
        if not two:
            return
        if self.tensor_parallel_size != 1:
            raise ValueError(
                "enable_two_gpu_pd must be False where tensor_parallel_size is not 1, "
                f"got {two!r} with tensor_parallel_size={self.tensor_parallel_size!r}"
            )
        if self.prefill_device_id == self.decode_device_id:
            raise ValueError(
                "decode_device_id must differ from prefill_device_id where enable_two_gpu_pd is "
                f"{two!r}, got {self.decode_device_id} for both"
            )

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

    def _check_decode_pipeline(self) -> None:
        check_bool("enable_decode_pipeline", self.enable_decode_pipeline)
        check_choice("decode_pipeline", self.decode_pipeline, ("auto", "static", "disabled"))
        check_int("decode_attention_sm", self.decode_attention_sm, MIN_STAGE_SMS)
        check_int("decode_ffn_sm", self.decode_ffn_sm, MIN_STAGE_SMS)
        check_int("decode_micro_batches", self.decode_micro_batches, 2)
        check_int("decode_pipeline_min_requests", self.decode_pipeline_min_requests, 1)
        check_bool("decode_pipeline_profiling", self.decode_pipeline_profiling)
        check_bool("disable_green", self.disable_green)
        if self.has_decode_pipeline and self.max_num_seqs < self.decode_micro_batches:
            raise ValueError(
                "max_num_seqs must hold a request for each of the "
                f"{self.decode_micro_batches} micro-batches, got {self.max_num_seqs}"
            )

    @property
    def has_decode_pipeline(self) -> bool:
        """Whether decode is to be pipelined, or may be."""
        return self.enable_decode_pipeline or self.decode_pipeline != "disabled"

    @property
    def has_static_pipeline(self) -> bool:
        """Whether it is to be pipelined on the split that is asked for."""
        return self.has_decode_pipeline and self.decode_pipeline != "auto"

    @property
    def pipeline_min_requests(self) -> int:
        """Requests of the smallest step that is pipelined."""
        least = self.decode_pipeline_min_requests
        return min(least, self.max_num_seqs) if self.has_static_pipeline else least

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

    def resolve_two_devices(self) -> tuple[str, str] | None:
        """Return the prefill and the decode device, two that are there; None: all on one.

        Raises ValueError where enable_two_gpu_pd is True and there are no two; "auto" then takes
        one, with a OneDeviceWarning.
        """
        if not self.enable_two_gpu_pd:
            return None
        problem = self._why_not_two()
        if problem is None:
            ids = (self.prefill_device_id, self.decode_device_id)
            return ("cpu", "cpu") if self.device == "cpu" else (f"cuda:{ids[0]}", f"cuda:{ids[1]}")
        if self.enable_two_gpu_pd is True:
            raise ValueError(problem)
        warnings.warn(f"prefill and decode share one device: {problem}", OneDeviceWarning, 3)
        return None

    def _why_not_two(self) -> str | None:
        """What stands against two devices; ValueError for one that never will be there."""
        import torch

        if self.device == "cpu":
            return None if self.enable_two_gpu_pd is True else "device is 'cpu'"
        if ":" in self.device:
            return f"device must be auto, cuda or cpu for two GPUs, got {self.device!r}"
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if num_gpus < 2:
            return (
                f"enable_two_gpu_pd needs two GPUs (or device='cpu'), found {num_gpus}, "
                f"got {self.enable_two_gpu_pd!r}"
            )
        for name in ("prefill_device_id", "decode_device_id"):
            check_int(name, getattr(self, name), 0, num_gpus - 1)
        return None

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
