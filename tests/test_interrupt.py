"""Ctrl-C is put off to a place where everything is in order, and never lost."""

import signal
import threading

import pytest

from engine.interrupt import Interrupt, deferred


@pytest.fixture(autouse=True)
def _default_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_without_ctrl_c_nothing_happens():
    with deferred() as interrupt:
        interrupt.raise_if_pressed()
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_first_one_is_raised_at_the_end():
    done = []
    with pytest.raises(KeyboardInterrupt), deferred() as interrupt:
        press()
        assert interrupt.pressed
        done.append("work")
    assert done == ["work"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_or_where_it_suits():
    done = []
    with pytest.raises(KeyboardInterrupt), deferred() as interrupt:
        press()
        interrupt.raise_if_pressed()
        done.append("work")
    assert done == []


def test_the_second_one_interrupts_at_once():
    done = []
    with pytest.raises(KeyboardInterrupt), deferred():
        press()
        press()
        done.append("work")
    assert done == []


def test_an_inner_one_leaves_it_to_the_outer_one():
    done = []
    with pytest.raises(KeyboardInterrupt), deferred() as outer:
        with deferred() as inner:
            press()
        assert outer.pressed and not inner.pressed
        done.append("work between")
    assert done == ["work between"]


def test_an_error_comes_first_and_the_handler_goes_back():
    with pytest.raises(KeyError), deferred():
        press()
        raise KeyError
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_users_own_handler_stays():
    presses = []

    def own(signum, frame):
        presses.append(signum)

    signal.signal(signal.SIGINT, own)
    with deferred() as interrupt:
        press()
        assert signal.getsignal(signal.SIGINT) is own
    assert presses == [signal.SIGINT] and not interrupt.pressed


def test_another_thread_is_left_alone():
    seen = []

    def work():
        with deferred() as interrupt:
            seen.append((signal.getsignal(signal.SIGINT), interrupt.pressed))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(signal.default_int_handler, False)]


def test_each_one_begins_anew():
    with pytest.raises(KeyboardInterrupt), deferred():
        press()
    with deferred() as interrupt:
        assert not interrupt.pressed
    assert not Interrupt.pressed
