"""Everything is given back, whichever part of that fails, and what went wrong first is told."""

import pytest

from engine.closing import close_all, closed_on_error


class Thing:
    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.num_closed = error, 0

    def close(self) -> None:
        self.num_closed += 1
        if self.error is not None:
            raise self.error


def test_all_are_closed_before_the_first_error_is_raised():
    things = [Thing(), Thing(OSError("first")), Thing(OSError("second")), Thing()]
    with pytest.raises(OSError, match="first"):
        close_all(things)
    assert [thing.num_closed for thing in things] == [1, 1, 1, 1]
    close_all([])


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
def test_an_error_closes_them_and_stays_what_it_is(error):
    things = [Thing(OSError("in use")), Thing()]
    with pytest.raises(type(error)) as caught, closed_on_error(*things):
        raise error
    assert caught.value is error and [thing.num_closed for thing in things] == [1, 1]


def test_without_an_error_they_stay_open():
    thing = Thing()
    with closed_on_error(thing):
        pass
    assert thing.num_closed == 0
