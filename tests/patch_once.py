"""Triton's interpreter without what makes up two thirds of its time; its results stay the same."""

from collections.abc import Callable

import triton.language as tl
from triton.runtime import interpreter


def speed_up_interpreter() -> None:
    """For the rest of the process. Nothing is done to a Triton that does not look as known here."""
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = PatchOnce(interpreter._patch_lang)


class PatchOnce:
    """`interpreter._patch_lang`, once a launch instead of in every call within it.

    It swaps what triton.language has for what the interpreter runs, and looks through all of it
    whenever one jitted function calls another: two thirds of a launch's time, and the first time
    did it. Only the scope of the launch itself, which comes first, is ever restored.
    """

    def __init__(self, patch_lang: Callable) -> None:
        self.patch_lang = patch_lang
        self.seen: dict[Callable, set[str]] = {}  # what each function may name
        self.done: set[str] = set()  # in this launch
        self.scope = None

    def __call__(self, fn: Callable) -> "PatchOnce":
        if fn not in self.seen:
            names = fn.__globals__.values()
            self.seen[fn] = {m.__name__ for m in names if m is tl or m is tl.core}
        if not self.seen[fn] <= self.done:
            scope = self.patch_lang(fn)
            self.scope = self.scope or scope
            self.done |= self.seen[fn]
        return self

    def restore(self) -> None:
        self.done.clear()
        if self.scope:
            self.scope.restore()
        self.scope = None
