"""What memory alone does not free is given back, whichever part of that fails."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol


class Closeable(Protocol):
    """Holds what must be given back."""

    def close(self) -> None:
        """Give it back."""


def close_all(things: Iterable[Closeable]) -> None:
    """Close each of them, then raise the first error that there was."""
    errors = []
    for thing in things:
        try:
            thing.close()
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]


@contextmanager
def closed_on_error(*things: Closeable) -> Iterator[None]:
    """Within, an error closes these on its way out; it is what is raised, whatever closing does."""
    try:
        yield
    except BaseException:
        with suppress(Exception):
            close_all(things)
        raise
