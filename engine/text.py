"""Prompts to token ids: the tokenizer of a checkpoint folder, and its chat template."""

from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from models.fetch import has_tokenizer


def load_tokenizer(folder: Path) -> Any | None:
    """The folder's tokenizer, or None where it has no tokenizer files.

    Raises ValueError where they are damaged.
    """
    if not has_tokenizer(folder):
        return None
    from transformers import AutoTokenizer  # seconds to import: not for token-id prompts

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise ValueError(f"{folder}: the tokenizer files cannot be read: {error}") from error
    # it would rewrite text that was shown already: " ," to ","
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def encode_prompt(prompt: Any, tokenizer: Any | None, vocab_size: int) -> array:
    """Token ids, int64, of a prompt that is text or token ids already.

    Raises ValueError for an empty prompt, a token id out of the vocabulary, text where there is no
    tokenizer or that is not Unicode, or anything else.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(
                "prompt must be token ids, for the checkpoint has no tokenizer files, "
                f"got {prompt!r:.80}"
            )
        _require_text("prompt", prompt)
        token_ids = _token_ids(tokenizer.encode(prompt), vocab_size)
    elif isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray | memoryview):
        token_ids = _token_ids(prompt, vocab_size)
    else:
        raise ValueError(f"prompt must be a string or token ids, got {type(prompt).__name__}")
    if not token_ids:
        raise ValueError(f"prompt must have at least one token, got {prompt!r}")
    return token_ids


def _token_ids(values: Sequence[Any], vocab_size: int) -> array:
    # mostly plain ints, which need no look at each: that takes the host 1 ms for 2000 tokens, in
    # which no step is launched
    if set(map(type, values)) == {int}:
        with suppress(OverflowError):
            token_ids = array("q", values)
            numbers = np.frombuffer(token_ids, np.int64)
            if numbers.min() >= 0 and numbers.max() < vocab_size:
                return token_ids
    return array("q", [_token_id(value, vocab_size) for value in values])


def _token_id(value: Any, vocab_size: int) -> int:
    is_int = hasattr(value, "__index__") and not isinstance(value, bool)
    if not is_int or not 0 <= value < vocab_size:
        raise ValueError(f"prompt must have token ids from 0 to {vocab_size - 1}, got {value!r}")
    return int(value)


def chat_token_ids(message: str, tokenizer: Any | None) -> list[int]:
    """Token ids of one user message in the checkpoint's chat template.

    Raises ValueError where the checkpoint has no tokenizer or no template, or the message is not
    text.
    """
    _require_text("message", message)
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError("chat needs a checkpoint with a tokenizer and a chat template")
    messages = [{"role": "user", "content": message}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


def _require_text(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, as Python makes of bytes of no text
        raise ValueError(f"{name} must be Unicode text, got {text!r:.80}: {error}") from None
