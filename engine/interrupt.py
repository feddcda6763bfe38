"""Ctrl-C between steps: a KeyboardInterrupt in the middle of one would leave half of it done."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Whether Ctrl-C was pressed since `deferred` began."""

    pressed = False

    def raise_if_pressed(self) -> None:
        """KeyboardInterrupt if it was; call this where everything is in order."""
        if self.pressed:
            raise KeyboardInterrupt


@contextmanager
def deferred() -> Iterator[Interrupt]:
    """Within, the first Ctrl-C only sets `pressed`; a second one interrupts at once.

    Where signals cannot be had (another thread, a handler of the user's own) nothing changes.
    """
    interrupt = Interrupt()
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupt
        return

    def note(signum: int, frame: FrameType | None) -> None:
        interrupt.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupt.raise_if_pressed()
