"""Safetensors -> merged tensors on one device. Knows nothing of how they are multiplied."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from models.config import ModelConfig

FLOATS = ("BF16", "F16", "F32", "F64")  # as safetensors writes them
MAX_PROBLEMS_SHOWN = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerWeights:
    """One decoder layer, on one device, in one dtype."""

    input_norm: Tensor  # [N]
    qkv: Tensor  # [(H + 2 * H_KV) * D, N]
    qkv_bias: Tensor | None  # [(H + 2 * H_KV) * D]
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    o: Tensor  # [N, H * D]
    o_bias: Tensor | None  # [N]
    post_norm: Tensor  # [N]
    gate_up: Tensor  # [2 * I, N], gate first
    down: Tensor  # [N, I]


@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderWeights:
    embedding: Tensor  # [V, N]
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor  # [N]
    lm_head: Tensor  # [V, N], the embedding itself where tied


def load_weights(
    config: ModelConfig,
    folder: str | Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    progress: bool = False,
) -> DecoderWeights:
    """Read each tensor once, into its slice of a merged one: peak memory is the model's own."""
    files = check_tensors(config, folder)
    weights = _empty(config, device, dtype)
    slices = checkpoint_slices(config, weights)
    hidden = None if progress else True  # None: hidden where stderr is no terminal
    with tqdm(total=len(slices), desc="loading weights", unit="tensor", disable=hidden) as bar:
        for path in files:
            with _opened(path) as file:
                for name in filter(slices.__contains__, file.keys()):
                    slices[name].copy_(file.get_tensor(name))
                    bar.update()
    return weights


def dummy_weights(
    config: ModelConfig, *, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> DecoderWeights:
    """Random weights that keep activations and logits near one, made on the device itself."""
    weights = _empty(config, device, dtype)
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, part in checkpoint_slices(config, weights).items():
        if name.endswith("norm.weight"):
            part.normal_(1.0, 0.1, generator=generator)
        else:
            std = 0.02 if name.endswith("bias") else part.shape[1] ** -0.5
            part.normal_(0.0, std, generator=generator)
    return weights


def fold_norms(weights: DecoderWeights) -> None:
    """Multiply each layer's norm weights into the matrices that read the normalised rows.

    In place; the norm weights are ones afterwards, so the model is the same and a second call
    changes nothing. The final norm stays: a tied LM head is the embedding too.
    """
    for layer in weights.layers:
        for norm, matrix in ((layer.input_norm, layer.qkv), (layer.post_norm, layer.gate_up)):
            matrix.mul_(norm)
            norm.fill_(1)


def check_tensors(config: ModelConfig, folder: str | Path) -> list[Path]:
    """The files to read, once every name and shape in their headers is as the config wants it."""
    files = safetensors_files(Path(folder))
    meta = _empty(config, "meta", config.torch_dtype)
    wanted = {name: list(part.shape) for name, part in checkpoint_slices(config, meta).items()}
    problems, seen = [], {}
    for path in files:
        for name, shape, dtype in _headers(path):
            if name in seen:
                problems.append(f"{name} is twice there, in {seen[name].name} and {path.name}")
            seen[name] = path
            if problem := _problem(name, shape, dtype, wanted, config):
                problems.append(f"{problem}, in {path.name}")
    missing = [f"{name} {wanted[name]} is missing" for name in wanted if name not in seen]
    _raise_all(Path(folder), missing + problems)
    return files


def checkpoint_slices(config: ModelConfig, weights: DecoderWeights) -> dict[str, Tensor]:
    """A tensor's name in the checkpoint -> the part of `weights` that it fills."""
    slices = {"model.embed_tokens.weight": weights.embedding}
    for i, layer in enumerate(weights.layers):
        for name, part in _layer_slices(config, layer).items():
            slices[f"model.layers.{i}.{name}"] = part
    slices["model.norm.weight"] = weights.final_norm
    if not config.tie_word_embeddings:
        slices["lm_head.weight"] = weights.lm_head
    return slices


def safetensors_files(folder: Path) -> list[Path]:
    """One file, or the many that an index names, or all that are there."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        if files := sorted(folder.glob("*.safetensors")):
            return files
        raise FileNotFoundError(
            f"{folder} holds no weights: looked for {single.name}, {index.name} and *.safetensors"
        )
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: {error!r}") from None
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks files that {index.name} names: {absent}")
    return [folder / name for name in names]


def _layer_slices(config: ModelConfig, layer: LayerWeights) -> dict[str, Tensor]:
    q_rows, kv_rows = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    slices = {
        "input_layernorm.weight": layer.input_norm,
        "self_attn.o_proj.weight": layer.o,
        "post_attention_layernorm.weight": layer.post_norm,
        "mlp.down_proj.weight": layer.down,
    }
    for kind, merged in (("weight", layer.qkv), ("bias", layer.qkv_bias)):
        if merged is not None:
            for name, part in zip("qkv", merged.split([q_rows, kv_rows, kv_rows]), strict=True):
                slices[f"self_attn.{name}_proj.{kind}"] = part
    for name, part in zip(("gate", "up"), layer.gate_up.chunk(2), strict=True):
        slices[f"mlp.{name}_proj.weight"] = part
    optional = {
        "self_attn.o_proj.bias": layer.o_bias,
        "self_attn.q_norm.weight": layer.q_norm,
        "self_attn.k_norm.weight": layer.k_norm,
    }
    return slices | {name: part for name, part in optional.items() if part is not None}


def _empty(config: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> DecoderWeights:
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"dtype must be bfloat16, float16 or float32, got {dtype}")

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype)

    embedding = empty(config.vocab_size, config.hidden_size)
    return DecoderWeights(
        embedding=embedding,
        layers=tuple(_empty_layer(config, empty) for _ in range(config.num_layers)),
        final_norm=empty(config.hidden_size),
        lm_head=embedding if config.tie_word_embeddings else torch.empty_like(embedding),
    )


def _empty_layer(config: ModelConfig, empty: Callable[..., Tensor]) -> LayerWeights:
    hidden, inner = config.hidden_size, config.intermediate_size
    return LayerWeights(
        input_norm=empty(hidden),
        qkv=empty(config.qkv_size, hidden),
        qkv_bias=empty(config.qkv_size) if config.qkv_bias else None,
        q_norm=empty(config.head_dim) if config.qk_norm else None,
        k_norm=empty(config.head_dim) if config.qk_norm else None,
        o=empty(hidden, config.num_heads * config.head_dim),
        o_bias=empty(hidden) if config.o_bias else None,
        post_norm=empty(hidden),
        gate_up=empty(2 * inner, hidden),
        down=empty(hidden, inner),
    )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from None
    with file:
        yield file


def _headers(path: Path) -> Iterator[tuple[str, list[int], str]]:
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118, it is no dict
            header = file.get_slice(name)
            yield name, header.get_shape(), header.get_dtype()


def _problem(
    name: str, shape: list[int], dtype: str, wanted: dict[str, list[int]], config: ModelConfig
) -> str | None:
    if name not in wanted:
        # old checkpoints keep the RoPE frequencies, and some a copy of the tied embedding
        tied_head = config.tie_word_embeddings and name == "lm_head.weight"
        if tied_head or name.endswith("rotary_emb.inv_freq"):
            return None
        return f"{name} {shape} is not part of a {config.architecture} of this config"
    if shape != wanted[name]:
        return f"{name} must be {wanted[name]}, got {shape}"
    if dtype not in FLOATS:
        return f"{name} must be one of {', '.join(FLOATS)}, got {dtype}"
    return None


def _raise_all(folder: Path, problems: list[str]) -> None:
    if problems:
        shown = problems[:MAX_PROBLEMS_SHOWN]
        more = len(problems) - len(shown)
        lines = [*shown, f"and {more} more"] if more else shown
        raise ValueError("\n  ".join([f"the weights in {folder} do not fit its config:", *lines]))
