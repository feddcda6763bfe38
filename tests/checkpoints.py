"""Small checkpoints that tests make: random ones of each family, and one that says a given text."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

CLASSES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
}
NUM_BYTES = 256
END = "<end>"
BYTE_VOCAB = NUM_BYTES + 1  # every byte, then END
TEMPLATE = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"


def save_random(folder: Path, family: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """A random model whose activations and logits are of the order of one; no tokenizer."""
    config = CLASSES[family](**SIZES | changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float()
    for name, parameter in model.named_parameters():  # biases and norms too, or none would show
        if name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, 1.0, 0.2)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0.0, 0.3)
        else:
            torch.nn.init.normal_(parameter, 0.0, 1.5 * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    return folder


def transformers_model(folder: Path) -> torch.nn.Module:
    """The checkpoint as transformers runs it, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def save_byte_model(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A random model over bytes, and their tokenizer: it says rubbish, half characters too."""
    save_random(folder, family, vocab_size=BYTE_VOCAB, eos_token_id=NUM_BYTES, **changes)
    return save_tokenizer(folder, [bytes([b]) for b in range(NUM_BYTES)])


def save_tokenizer(folder: Path, pieces: Sequence[bytes]) -> Path:
    """Token i is pieces[i], as in byte-level BPE; the one behind the last is END."""
    letters = _byte_letters()
    vocab = {"".join(letters[b] for b in piece): i for i, piece in enumerate(pieces)}
    assert len(vocab) == len(pieces), "pieces must differ"
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return folder


def save_speaker(folder: Path, pieces: Sequence[bytes]) -> Path:
    """A model that says pieces[i + 1] after pieces[i], END after the last, and after END the first.

    Embeddings are one-hot and layers add nothing, so that logits depend on the last token alone.
    """
    vocab_size = len(pieces) + 1
    sizes = {"vocab_size": vocab_size, "hidden_size": vocab_size, "eos_token_id": len(pieces)}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
    config = LlamaConfig(**SIZES | sizes | heads | {"tie_word_embeddings": False})
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(vocab_size))
        model.lm_head.weight.copy_(10 * torch.eye(vocab_size).roll(1, 0))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)
    return save_tokenizer(folder, pieces)


def cut(text: str, widths: Sequence[int] = (1, 2, 3)) -> list[bytes]:
    """The text's UTF-8 in pieces of these widths in turn, through the middle of characters.

    Pieces differ: one that was there before is made longer.
    """
    data, pieces = text.encode(), []
    while data:
        width = widths[len(pieces) % len(widths)]
        while data[:width] in pieces:
            width += 1
        pieces.append(data[:width])
        data = data[width:]
    return pieces


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change fields of config.json; ... removes one."""
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))
    return folder


def _byte_letters() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level BPE."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return {b: chr(b if b in printable else next(others)) for b in range(NUM_BYTES)}
