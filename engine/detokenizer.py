"""Token ids to text, as they come: no half characters, and nothing of a stop string."""

from collections.abc import Sequence
from typing import Protocol

INCOMPLETE = "\ufffd"  # what a decoder writes for bytes that are not, or not yet, a character
MAX_INCOMPLETE = 3  # a character has at most four bytes
WINDOW = 8  # tokens decoded anew for each push, about


class Tokenizer(Protocol):
    """What is needed of a tokenizer; those of transformers have it."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        """Return the text of token_ids."""
        ...


class Detokenizer:
    """Turns the tokens of one request into text that can be shown at once.

    Only a short window of tokens is decoded at a time. It begins at a whole character and before
    the text that is new, since many tokenizers drop a space in front of what they decode.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        stop: Sequence[str] = (),
        prompt_token_ids: Sequence[int] = (),
        *,
        is_text: bool = False,
    ):
        """is_text: the prompt was one, and ends with a whole character."""
        self.stopped: str | None = None  # the stop string that was found
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._window: list[int] = []
        self._num_context = 0  # tokens of the window before the newest whole character
        text = self._begin(prompt_token_ids)
        # characters of the window's text passed on: a prompt of tokens may end in half a one
        self._num_read = len(text if is_text else text.rstrip(INCOMPLETE))
        self._is_new = False  # whether there was a token yet
        self._pieces: list[str] = []
        self._held = ""  # may be the beginning of a stop string

    @property
    def text(self) -> str:
        """All text shown so far."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """Take a new token; return the new text that is safe to show."""
        if self._tokenizer is None or self.stopped is not None:
            return ""
        self._window.append(token_id)
        self._is_new = True
        return self._show(self._read(), is_end=False)

    def finish(self, *token_ids: int) -> str:
        """Take the last tokens; return their text and what was held back. Bytes that never became
        a character show as U+FFFD.

        They cost one decode, so that all of a text does for which nobody waits before its end; a
        few more where it ends in the middle of a character.
        """
        self._is_new |= bool(token_ids)
        if self._tokenizer is None or self.stopped is not None or not self._is_new:
            return ""
        self._window.extend(token_ids)
        new = self._decode_end()[self._num_read :]
        self._num_read += len(new)
        return self._show(new, is_end=True)

    def _begin(self, prompt_token_ids: Sequence[int]) -> str:
        """The window of a prompt and its text. It begins with a whole character, where there is
        one: decoders that fall back to bytes make nothing of a run of them that begins in one."""
        for size in range(WINDOW, WINDOW + MAX_INCOMPLETE + 1):
            self._window = list(prompt_token_ids[-size:])
            text = self._decode()
            if not text.startswith(INCOMPLETE):
                break
        return text

    def _decode(self, num_left_out: int = 0) -> str:
        if self._tokenizer is None:
            return ""
        token_ids = self._window[: len(self._window) - num_left_out]
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def _decode_end(self) -> str:
        """The window's text, to which nothing will be added. Such decoders make nothing of a run
        that ends in a character either: without its last bytes it may be text."""
        text = self._decode()
        if text.endswith(INCOMPLETE):
            for num_left_out in range(1, min(MAX_INCOMPLETE, len(self._window)) + 1):
                whole = self._decode(num_left_out)
                if not whole.endswith(INCOMPLETE):
                    return text if text.startswith(whole) else whole + INCOMPLETE
        return text

    def _read(self) -> str:
        """Decode the window; return its new text up to an incomplete character."""
        text = self._decode()
        num_safe = len(text.rstrip(INCOMPLETE))
        is_garbage = len(self._window) > 3 * WINDOW
        if is_garbage:  # bytes that no later ones can mend: pass on all but a possible beginning
            num_safe = max(num_safe, len(text) - MAX_INCOMPLETE)
        new = text[self._num_read : num_safe]
        self._num_read += len(new)
        if new and num_safe == len(text):
            self._whole_character()
        elif is_garbage:
            self._move_window(len(self._window) - WINDOW, len(text) - num_safe)
        return new

    def _whole_character(self) -> None:
        """Note that the window's text is complete, a place where a later window may begin."""
        if len(self._window) > WINDOW:
            self._move_window(self._num_context, 0)
        self._num_context = len(self._window)

    def _move_window(self, num_dropped: int, num_unread: int) -> None:
        del self._window[:num_dropped]
        self._num_context = 0
        self._num_read = max(0, len(self._decode()) - num_unread)

    def _show(self, new: str, is_end: bool) -> str:
        """Return what of the held and the new text cannot belong to a stop string."""
        text = self._held + new
        found = self._find_stop(text)
        if found is not None:
            start, self.stopped = found
            num_held = len(text) - start
        else:
            num_held = 0 if is_end else max((_overlap(text, s) for s in self._stop), default=0)
        shown = text[: len(text) - num_held]
        self._held = text[len(shown) :]
        if shown:
            self._pieces.append(shown)
        return shown

    def _find_stop(self, text: str) -> tuple[int, str] | None:
        """Find the stop string that ends first, so that it matters not how text was cut."""
        found = [(text.find(s) + len(s), text.find(s), s) for s in self._stop if s in text]
        return min(found)[1:] if found else None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of stop with which text ends."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0 and not stop.startswith(text[start:]):
        start = text.find(stop[0], start + 1)
    return len(text) - start if start >= 0 else 0
