"""The rule of `auto`: where to pipeline, given times; never much slower than serial."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.pipeline_choice import CONTEXTS, Choice, choose, contexts_up_to, mode_at, why
from engine.step_model import MARGIN

MODES = ("serial", "40:92", "48:84", "56:76")
times = st.floats(0.1, 100)
all_times = st.fixed_dictionaries(dict.fromkeys(MODES, times))
some_times = st.one_of(st.just({}), all_times)
readings = st.dictionaries(st.sampled_from(CONTEXTS), some_times, max_size=len(CONTEXTS))


@given(readings)
@example({128: dict.fromkeys(MODES, 1.0), 256: dict.fromkeys(MODES, 1.0)})
def test_a_choice_beats_serial_at_both_of_its_ends(read):
    contexts = sorted(read)
    for choice in choose(read):
        assert contexts.index(choice.high) == contexts.index(choice.low) + 1
        for context in (choice.low, choice.high):
            gain = read[context]["serial"] / read[context][choice.mode]
            assert gain >= choice.speedup >= 1 + MARGIN
        for mode in MODES[1:]:  # and no other split does so by more
            ends = (read[choice.low], read[choice.high])
            assert min(ms["serial"] / ms[mode] for ms in ends) <= choice.speedup


@given(readings)
def test_where_one_wins_at_two_contexts_in_a_row_it_is_chosen(read):
    contexts = sorted(read)
    for low, high in pairwise(contexts):
        ends = (read[low], read[high])
        wins = [
            mode
            for mode in MODES[1:]
            if all(ms and ms["serial"] / ms[mode] >= 1 + MARGIN for ms in ends)
        ]
        assert (low in {choice.low for choice in choose(read)}) == bool(wins)


@given(
    true=st.dictionaries(st.sampled_from(CONTEXTS), all_times, min_size=2, max_size=4),
    errors=st.lists(st.floats(-0.024, 0.024), min_size=16, max_size=16),
    num_requests=st.integers(1, 64),
    data=st.data(),
)
def test_readings_that_are_off_cost_two_percent_at_most(true, errors, num_requests, data):
    """Readings within 2.4 % of the truth: what is chosen is never 2 % slower than serial."""
    left = iter(errors)
    read = {c: {m: t * (1 + next(left)) for m, t in ms.items()} for c, ms in true.items()}
    context = data.draw(st.sampled_from(sorted(true)))
    mode = mode_at(choose(read), num_requests, num_requests * context)
    assert true[context][mode] <= 1.02 * true[context]["serial"]


@given(readings, st.integers(1, 512), st.integers(1, 10_000))
def test_outside_of_what_was_read_a_step_is_serial(read, num_requests, context):
    choices = choose(read)
    mode = mode_at(choices, num_requests, num_requests * context)
    if mode != "serial":
        assert any(c.low <= context <= c.high and c.mode == mode for c in choices)
    if not read or not min(read) <= context <= max(read):
        assert mode == "serial"


@given(st.integers(1, 20_000))
def test_contexts_end_with_the_longest(longest):
    found = contexts_up_to(longest)
    assert list(found) == sorted(set(found)) and found[-1] == longest
    assert set(found[:-1]) <= set(CONTEXTS)


SLOW = {"serial": 10.0, "48:84": 9.9}
FAST = {"serial": 11.0, "48:84": 10.0, "56:76": 9.9}


def test_reasons():
    read = {128: {}, 256: SLOW, 512: FAST, 1024: FAST}
    choices = choose(read)
    assert choices == (Choice(512, 1024, "56:76", pytest.approx(11 / 9.9)),)
    assert why(read, choices) == "56:76 at 512-1024 tokens (1.11x), else serial"
    del read[1024]
    assert choose(read) == ()
    wanted = "serial: no split won by 3% at two contexts in a row; the best was 56:76, 1.11x at 512"
    assert why(read, ()).startswith(wanted)
    assert why({128: {}}, ()) == "serial: nothing was timed"
