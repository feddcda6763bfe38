"""The config.json of the models that are measured with dummy weights, written where they run."""

import argparse
import json
from pathlib import Path
from typing import Any

QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "max_position_embeddings": 40960,
    "hidden_act": "silu",
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "torch_dtype": "bfloat16",
}
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": QWEN3
    | {
        "num_hidden_layers": 28,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "Qwen3-4B": QWEN3
    | {
        "num_hidden_layers": 36,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "Qwen3-8B": QWEN3
    | {
        "num_hidden_layers": 36,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    # no model: 8B with half the weights beside the same attention. With 2B requests of C / 2 tokens
    # it computes as much, and reads as many keys and as many bytes of weights, as 8B in int8 with B
    # requests of C tokens
    "Qwen3-8B-half": QWEN3
    | {
        "num_hidden_layers": 36,
        "hidden_size": 2048,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}
STAND_INS = ("Qwen3-8B-half",)  # of SHAPES, those that are nobody's model


def write_config(model: str, folder: Path, **changes: Any) -> Path:
    """Write the config.json of a model in SHAPES to `folder`, with some fields changed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[model] | changes, indent=2))
    return folder


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """--model: one or several that `checkpoint` knows; others are an error of the command line."""
    parser.add_argument(
        "--model",
        nargs="+",
        default=["Qwen3-0.6B"],
        type=_known,
        help=f"{', '.join(SHAPES)}, or a folder with a config.json",
    )


def _known(model: str) -> str:
    if model not in SHAPES and not (Path(model) / "config.json").exists():
        names = ", ".join(SHAPES)
        raise argparse.ArgumentTypeError(f"must be one of {names} or a folder, got {model!r}")
    return model


def checkpoint(model: str, folder: Path) -> Path:
    """A folder with the config.json of `model`: made in `folder` for one of SHAPES, else `model`
    itself. Its name is the model's."""
    return write_config(model, folder / model) if model in SHAPES else Path(model)
