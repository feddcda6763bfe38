"""The rule of `auto`: where to pipeline, given times; never much slower than the best of them."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.pipeline_choice import (
    CONTEXTS,
    MARGIN,
    REACH,
    Choice,
    choose,
    contexts_up_to,
    mode_at,
    not_read,
    to_read,
    why,
)

MODES = ("serial", "40:92", "48:84", "56:76")
times = st.floats(0.1, 100)
all_times = st.fixed_dictionaries(dict.fromkeys(MODES, times))
# times near each other, where the rule has to tell them apart
near_times = st.fixed_dictionaries(dict.fromkeys(MODES, st.floats(9.5, 10.5)))
some_times = st.one_of(st.just({}), all_times, near_times)
readings = st.dictionaries(st.sampled_from(CONTEXTS), some_times, max_size=len(CONTEXTS))
EVEN = dict.fromkeys(MODES, 1.0)


def chosen(read, context: float) -> str:
    return mode_at(choose(read), 1, context)


def between(read, context: float) -> dict[str, float]:
    """What straight lines between the two contexts around this one say."""
    low = max(c for c in read if c <= context)
    high = min(c for c in read if c >= context)
    share = (context - low) / (high - low or 1)
    return {m: read[low][m] * (1 - share) + read[high][m] * share for m in read[low]}


@given(
    read=st.dictionaries(
        st.sampled_from(CONTEXTS), st.one_of(all_times, near_times), min_size=1, max_size=4
    ),
    share=st.floats(0, 1),
)
@example({128: EVEN, 256: EVEN}, 0.5)
def test_nothing_loses_more_than_the_margin(read, share):
    """At the contexts that were read, and between them by lines; no split for less than it."""
    for context in (*read, min(read) + (max(read) - min(read)) * share):
        ms = between(read, context)
        mode = chosen(read, context)
        assert ms[mode] <= min(ms.values()) * (1 + MARGIN + 1e-9)
        assert ms[mode] <= ms["serial"] * (1 if mode == "serial" else (1 + 1e-9) / (1 + MARGIN))


@given(
    true=st.dictionaries(st.sampled_from(CONTEXTS), near_times, min_size=1, max_size=4),
    errors=st.lists(st.floats(-0.0049, 0.0049), min_size=16, max_size=16),
    num_requests=st.integers(1, 64),
    data=st.data(),
)
def test_readings_that_are_off_cost_two_percent_at_most(true, errors, num_requests, data):
    """Readings within 0.5 % of the truth, so that two scatter by 1 %: what is chosen is never 2 %
    slower than the best, whichever it is."""
    left = iter(errors)
    read = {c: {m: t * (1 + next(left)) for m, t in ms.items()} for c, ms in true.items()}
    context = data.draw(st.sampled_from(sorted(true)))
    mode = mode_at(choose(read), num_requests, num_requests * context)
    assert true[context][mode] <= 1.02 * min(true[context].values())


@given(readings, st.integers(1, 512), st.integers(1, 10_000))
def test_outside_of_what_was_read_a_step_is_serial(read, num_requests, context):
    choices = choose(read)
    mode = mode_at(choices, num_requests, num_requests * context)
    if mode != "serial":
        assert any(c.low <= context <= c.high and c.mode == mode for c in choices)
    if not read or not min(read) <= context <= max(read) * REACH:
        assert mode == "serial"


@given(readings)
def test_choices_rise_and_lie_between_what_was_read(read):
    choices = choose(read)
    ends = [end for choice in choices for end in (choice.low, choice.high)]
    assert ends == sorted(ends)
    for choice in choices:
        assert choice.low < choice.high and choice.speedup >= (1 + MARGIN) * (1 - 1e-9)
        inside = [c for c in read if choice.low <= c <= choice.high]
        assert all(choice.mode in read[c] for c in inside)


def test_a_split_that_wins_at_one_context_alone_is_taken_around_it():
    """Up to where lines say that it no longer does."""
    slow, fast = {"serial": 10.0, "48:84": 10.1}, {"serial": 10.0, "48:84": 8.9}
    read = {256: slow, 512: fast, 1024: slow}
    (choice,) = choose(read)
    assert choice.mode == "48:84" and choice.speedup == pytest.approx(10 / 8.9)
    share = (10.1 - 10 / 1.01) / 1.2  # of the way to 512, where it begins to win by the margin
    assert choice.low == pytest.approx(256 + 256 * share)
    assert choice.high == pytest.approx(1024 - 512 * share)
    assert chosen(read, 512) == "48:84" and chosen(read, 260) == chosen(read, 1000) == "serial"


def test_what_wins_between_two_contexts_needs_to_win_at_neither():
    read = {
        512: {"serial": 30.0, "40:92": 10.0, "48:84": 12.0, "56:76": 20.0},
        1024: {"serial": 30.0, "40:92": 20.0, "48:84": 12.0, "56:76": 10.0},
    }
    assert [choice.mode for choice in choose(read)] == ["40:92", "48:84", "56:76"]


def test_a_split_must_have_been_read_on_both_sides():
    read = {256: {"serial": 10.0}, 512: {"serial": 10.0, "48:84": 5.0}, 1024: {}}
    assert choose(read) == ()
    assert why({256: {"serial": 10.0}}, ()) == "serial: nothing was timed"


def test_next_to_where_a_split_won_it_is_read_too():
    """And so on, as long as it wins; what could win is read anyway."""
    could_win = {128: [], 256: ["48:84"], 512: [], 1024: [], 2048: ["56:76"]}
    alone = {256: ["48:84"], 2048: ["56:76"]}
    assert not_read({}, to_read({}, could_win)) == alone
    lost = {256: {"serial": 10.0, "48:84": 10.0 / (1 + MARGIN / 2)}}
    assert not_read(lost, to_read(lost, could_win)) == {2048: ["56:76"]}
    won = {"serial": 10.0, "48:84": 9.0}
    read = {256: won, 2048: {"serial": 10.0, "56:76": 11.0}}
    assert not_read(read, to_read(read, could_win)) == {128: ["48:84"], 512: ["48:84"]}
    read |= {128: {"serial": 10.0, "48:84": 11.0}, 512: won}
    assert not_read(read, to_read(read, could_win)) == {1024: ["48:84"]}
    read |= {1024: won, 2048: won}
    assert not_read(read, to_read(read, could_win)) == {2048: ["56:76"]}


def test_who_wins_near_the_longest_context_goes_on_winning_where_another_is_read_there():
    """As in a start with a slightly larger pool: what was read nearer no longer reaches there."""
    could_win = {512: ["48:84"], 1024: ["48:84"], 1100: ["48:84", "56:76"]}
    won = {"serial": 10.0, "48:84": 8.0}
    read = {512: won, 1024: won}
    assert not_read(read, to_read(read, could_win)) == {1100: ["48:84", "56:76"]}
    read[1100] = {"serial": 10.0, "56:76": 11.0}
    assert not_read(read, to_read(read, could_win)) == {1100: ["48:84"]}
    read[1100] |= won
    assert (
        not not_read(read, to_read(read, could_win)) and mode_at(choose(read), 1, 1100) == "48:84"
    )
    could_win[1100] = ["48:84"]
    assert not not_read({512: won, 1024: won}, could_win), "one that has none needs none"


def test_joined_choices_have_the_largest_gain_of_them():
    read = {c: {"serial": 10.0, "48:84": 10.0 / gain} for c, gain in ((1, 1.3), (2, 1.2), (3, 1.1))}
    (choice,) = choose(read)
    assert choice.speedup == pytest.approx(1.3)


def test_what_another_pool_has_read_lies_between_and_goes_on():
    """Contexts of a pool are up to what it holds, so that starts read at different ones."""
    won, lost = {"serial": 10.0, "48:84": 9.0}, {"serial": 10.0, "56:76": 11.0}
    could_win = {512: ["48:84"], 1024: ["48:84"]}
    read = {512: won, 768: lost, 1024: won}
    assert choose(read) == (Choice(1024, 1024 * REACH, "48:84", pytest.approx(10 / 9)),)
    assert not_read(read, to_read(read, could_win)) == {768: ["48:84"]}
    (choice,) = choose(read | {768: lost | won})
    assert (choice.low, choice.mode) == (512, "48:84")
    # the same of the longest: a little shorter there, and still what comes before it is read
    could_win = {512: [], 800: ["48:84"]}
    read = {790: won}
    assert not_read(read, to_read(read, could_win)) == {512: ["48:84"]}
    # what this pool cannot hold is not asked for
    assert set(to_read({1600: won}, could_win)) == {512, 800}


def test_the_longest_context_stands_for_those_that_are_little_longer():
    read = {512: {"serial": 10.0, "48:84": 9.0}}
    assert chosen(read, 512) == chosen(read, 576) == "48:84"
    assert chosen(read, 511) == chosen(read, 577) == "serial"


@given(st.integers(1, 20_000))
def test_contexts_end_with_the_longest(longest):
    found = contexts_up_to(longest)
    assert list(found) == sorted(set(found)) and found[-1] == longest
    assert set(found[:-1]) <= set(CONTEXTS)


@pytest.mark.parametrize(
    ("longest", "known", "missing"),
    [
        (800, (256, 512, 800), ()),
        (800, (256, 512, 790), ()),  # a pool that is a little larger
        (800, (256, 512, 1024, 1500), ()),  # and one that is much smaller
        (800, (256, 512), (800,)),
        (800, (256, 480), (512, 800)),
        (512, (256, 480), ()),
        (512, (), (256, 512)),
    ],
)
def test_what_readings_of_another_pool_cover(longest, known, missing):
    read = {context: {"serial": 1.0, "48:84": 1.0} for context in known}
    wanted = {context: ["48:84"] for context in (256, 512, longest)}
    assert not_read(read, wanted) == {context: ["48:84"] for context in missing}
    more = {context: [*modes, "56:76"] for context, modes in wanted.items()}
    left = not_read(read, more)
    assert left.keys() == more.keys() and all("56:76" in modes for modes in left.values())
    assert not_read(read, dict.fromkeys(wanted, ())) == {}


SLOW = {"serial": 10.0, "48:84": 9.95}
FAST = {"serial": 11.0, "48:84": 10.0, "56:76": 9.9}


def test_reasons():
    read = {128: {}, 256: SLOW, 512: FAST, 1024: FAST}
    choices = choose(read)
    (first, second) = choices
    assert (first.mode, first.high) == ("48:84", 512)
    assert second == Choice(512, 1024 * REACH, "56:76", pytest.approx(11 / 9.9))
    wanted = "48:84 at 269-512 tokens (up to 1.10x), 56:76 at 512-1152 tokens (up to 1.11x), else"
    assert why(read, choices) == f"{wanted} serial"
    lost = {128: {}, 256: SLOW, 512: {"serial": 10.0, "56:76": 11.0}}
    assert choose(lost) == ()
    wanted = "serial: no split won by 1%; the best was 48:84, 1.01x at 256 tokens"
    assert why(lost, ()) == wanted
    assert why({128: {}}, ()) == "serial: nothing was timed"
