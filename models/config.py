"""What a checkpoint's config.json says of its decoder. Knows nothing of weights or kernels."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = ("bfloat16", "float16", "float32")
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True, kw_only=True)
class Family:
    """What an architecture fixes, and what transformers assumes where config.json is silent."""

    model_type: str
    qkv_bias: bool | None = None  # None: as attention_bias says
    o_bias: bool | None = None  # None: as attention_bias says
    qk_norm: bool = False
    num_kv_heads: int | None = 32  # None: as many as heads
    head_dim: int | None = None  # None: hidden_size / heads
    max_position_embeddings: int = 32768
    eos_token_id: int | None = None


FAMILIES = {
    "LlamaForCausalLM": Family(
        model_type="llama",
        num_kv_heads=None,
        max_position_embeddings=2048,
        eos_token_id=2,
    ),
    "Qwen2ForCausalLM": Family(model_type="qwen2", qkv_bias=True, o_bias=False),
    "Qwen3ForCausalLM": Family(model_type="qwen3", qk_norm=True, head_dim=128),
}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the RoPE frequencies are stretched; the last three belong to llama3 alone."""

    rope_type: str  # "linear" | "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES[1:]:
            wanted = " or ".join(ROPE_TYPES[1:])
            raise ValueError(f"rope_type must be {wanted}, got {self.rope_type!r}")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                "low_freq_factor must be less than high_freq_factor, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    architecture: str  # "Qwen3ForCausalLM" and the like
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    dtype: str  # the checkpoint's own, one of DTYPES
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.architecture not in FAMILIES:
            raise ValueError(
                f"architecture must be one of {', '.join(FAMILIES)}, got {self.architecture!r}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                "num_attention_heads must be a multiple of num_key_value_heads, got "
                f"{self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, for RoPE turns pairs, got {self.head_dim}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read config.json; end-of-text ids are joined with those of generation_config.json."""
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"no such checkpoint folder: {folder}")
        path = folder / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is no checkpoint folder: it has no config.json")
        fields = _read_json(path)
        generation = folder / "generation_config.json"
        extra = _read_json(generation) if generation.is_file() else {}
        try:
            if ids := _token_ids(extra):
                fields["eos_token_id"] = [*_token_ids(fields), *ids]
            return cls.from_dict(fields)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ModelConfig":
        """From the fields of a config.json, as transformers 4 or 5 writes them."""
        architecture, family = _family(fields)
        _refuse_unsupported(fields)
        num_heads = _size(fields, "num_attention_heads")
        hidden_size = _size(fields, "hidden_size")
        rope_theta, rope_scaling = _rope(fields, family)
        attention_bias = _flag(fields, "attention_bias")
        dtype = fields.get("dtype") or fields.get("torch_dtype") or "float32"
        return cls(
            architecture=architecture,
            vocab_size=_size(fields, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_size(fields, "intermediate_size"),
            num_layers=_size(fields, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=_num_kv_heads(fields, family, num_heads),
            head_dim=_head_dim(fields, family, hidden_size, num_heads),
            rms_norm_eps=_number(fields, "rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_position_embeddings=_max_position(fields, family),
            qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
            o_bias=attention_bias if family.o_bias is None else family.o_bias,
            qk_norm=family.qk_norm,
            tie_word_embeddings=_flag(fields, "tie_word_embeddings"),
            dtype=str(dtype).removeprefix("torch."),
            eos_token_ids=_token_ids({"eos_token_id": family.eos_token_id, **fields}),
        )

    @property
    def group_size(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def qkv_size(self) -> int:
        """Rows of the merged q, k, v projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes that one token's keys and values take, all layers together."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize


def rope_table(config: ModelConfig, max_len: int, device: torch.device | str) -> Tensor:
    """Cosines of the D / 2 frequencies, then their sines, per position -> [max_len, D] fp32."""
    # on the CPU and in the order of operations of transformers: its angles, to the last bit
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    inv_freq = 1.0 / (config.rope_theta ** (pairs / config.head_dim))  # [D / 2]
    inv_freq = _scale(inv_freq, config.rope_scaling)
    angles = torch.arange(max_len, dtype=torch.float32, device="cpu")[:, None] * inv_freq
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(device)


def _scale(inv_freq: Tensor, scaling: RopeScaling | None) -> Tensor:
    if scaling is None:
        return inv_freq
    if scaling.rope_type == "linear":
        return inv_freq / scaling.factor
    old_len = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / inv_freq
    smooth = (old_len / wavelength - low) / (high - low)
    between = (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq
    slow = torch.where(wavelength > old_len / low, inv_freq / scaling.factor, between)
    return torch.where(wavelength < old_len / high, inv_freq, slow)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(fields).__name__}")
    return fields


def _family(fields: Mapping[str, Any]) -> tuple[str, Family]:
    named = fields.get("architectures") or [
        name for name, family in FAMILIES.items() if family.model_type == fields.get("model_type")
    ]
    if named and named[0] in FAMILIES:
        return named[0], FAMILIES[named[0]]
    found = named[0] if named else f"none, and model_type {fields.get('model_type')!r}"
    raise ValueError(f"architectures must be one of {', '.join(FAMILIES)}, got {found}")


def _refuse_unsupported(fields: Mapping[str, Any]) -> None:
    if fields.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act must be 'silu', got {fields['hidden_act']!r}")
    if fields.get("quantization_config"):
        raise ValueError(
            "quantization_config must be absent, for weights are read as bf16, fp16 or fp32, got "
            f"{fields['quantization_config']}"
        )
    if _flag(fields, "mlp_bias"):
        raise ValueError("mlp_bias must be false, got true")
    if _flag(fields, "use_sliding_window"):
        raise ValueError("use_sliding_window must be false, got true")
    if others := set(fields.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"layer_types must all be 'full_attention', got {sorted(others)} too")


def _num_kv_heads(fields: Mapping[str, Any], family: Family, num_heads: int) -> int:
    if "num_key_value_heads" in fields and fields["num_key_value_heads"] is None:
        return num_heads
    return _size(fields, "num_key_value_heads", family.num_kv_heads or num_heads)


def _head_dim(fields: Mapping[str, Any], family: Family, hidden_size: int, num_heads: int) -> int:
    if fields.get("head_dim") is None and family.head_dim is None and hidden_size % num_heads:
        raise ValueError(
            "hidden_size must be a multiple of num_attention_heads where head_dim is not given, "
            f"got {hidden_size} and {num_heads}"
        )
    return _size(fields, "head_dim", family.head_dim or hidden_size // num_heads)


def _max_position(fields: Mapping[str, Any], family: Family) -> int:
    return _size(fields, "max_position_embeddings", family.max_position_embeddings)


def _rope(fields: Mapping[str, Any], family: Family) -> tuple[float, RopeScaling | None]:
    """The base, and the scaling where there is one. transformers 4 keeps the base outside."""
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(rope, Mapping) or any(isinstance(v, Mapping) for v in rope.values()):
        raise ValueError(f"rope_parameters must be one flat object for all layers, got {rope}")
    if rope.get("partial_rotary_factor", fields.get("partial_rotary_factor")) not in (None, 1):
        raise ValueError("partial_rotary_factor must be 1 or absent: heads are turned whole")
    theta = _number({"rope_theta": fields.get("rope_theta"), **rope}, "rope_theta", 10_000.0)
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_type must be one of {', '.join(ROPE_TYPES)}, got {rope_type!r}")
    if rope_type == "default":
        return theta, None
    factor = _number(rope, "factor")
    if rope_type == "linear":
        return theta, RopeScaling(rope_type=rope_type, factor=factor)
    return theta, RopeScaling(
        rope_type=rope_type,
        factor=factor,
        low_freq_factor=_number(rope, "low_freq_factor"),
        high_freq_factor=_number(rope, "high_freq_factor"),
        original_max_position_embeddings=_size(
            rope, "original_max_position_embeddings", _max_position(fields, family)
        ),
    )


def _token_ids(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a text, each once: one id, a list of them, or null."""
    ids = fields.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(i) is int for i in ids):
        raise ValueError(f"eos_token_id must be a token id, a list of them or null, got {ids}")
    return tuple(dict.fromkeys(ids))


def _size(fields: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = default if fields.get(key) is None else fields[key]
    if value is None:
        raise ValueError(f"{key} is missing: it must be a positive integer")
    if type(value) is not int or value < 1:
        raise ValueError(f"{key} must be a positive integer, got {value!r}")
    return value


def _number(fields: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = default if fields.get(key) is None else fields[key]
    if value is None:
        raise ValueError(f"{key} is missing: it must be a positive number")
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{key} must be a positive number, got {value!r}")
    return float(value)


def _flag(fields: Mapping[str, Any], key: str) -> bool:
    value = fields.get(key)
    if value is not None and type(value) is not bool:
        raise ValueError(f"{key} must be true or false, got {value!r}")
    return bool(value)
