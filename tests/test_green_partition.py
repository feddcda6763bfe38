"""Partitions: what is granted for what is asked, against the readings and by its rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from green.partition import GRAINS, Partition, grain, legal_splits

HOPPER = (9, 0)
capabilities = st.sampled_from([(6, 1), (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])


def granted(*asked: int, num_sms: int = 132) -> tuple[int, ...]:
    return Partition.of(asked, num_sms, HOPPER).granted


@pytest.mark.parametrize(
    ("asked", "first", "rest"),
    [(8, 8, 124), (41, 48, 84), (48, 48, 84), (113, 120, 12), (120, 120, 12)],
)
def test_two_stages_get_what_a_driver_was_seen_to_grant(asked, first, rest):
    """One H100 of 132 SMs, CUDA 13.0."""
    assert granted(asked, rest) == (first, rest)


@pytest.mark.parametrize(
    ("asked", "got"), [(8, 8), (9, 16), (48, 48), (120, 120), (121, 128), (128, 128), (129, 132)]
)
def test_one_stage_gets_what_a_driver_was_seen_to_grant(asked, got):
    assert granted(asked) == (got,)


@pytest.mark.parametrize(
    ("asked", "got", "rest"),
    [
        ((48, 84), (48, 84), 1),
        ((84, 48), (84, 48), 0),  # 84 is no multiple of 8: the first stage gets the rest
        ((16, 16), (16, 16), None),  # the others stay idle
        ((41, 84), (48, 84), 1),  # not 44 and 88: among equals the last stage gets the rest
        ((66, 66), (64, 68), 1),  # 72 and 60 would fall six short
        ((64, 64), (64, 68), 1),  # sixteen groups of eight are one more than there are
        ((40, 40, 40), (40, 40, 40), None),
        ((40, 40, 52), (40, 40, 52), 2),
    ],
)
def test_asked_and_granted(asked, got, rest):
    partition = Partition.of(asked, 132, HOPPER)
    assert (partition.granted, partition.rest) == (got, rest)
    assert partition.asked == asked and partition.idle_sms == 132 - sum(got)


def test_how_a_device_is_cut():
    def cut(*asked: int) -> tuple[int, tuple[int, ...]]:
        partition = Partition.of(asked, 132, HOPPER)
        return partition.group_sms, partition.num_groups

    assert cut(48, 84) == (48, (1, 0)), "one piece and the rest"
    assert cut(84, 48) == (48, (0, 1))
    assert cut(64) == (64, (1,))
    assert cut(16, 32) == (8, (2, 4)), "stages put together from equal groups"
    assert cut(16, 32, 84) == (8, (2, 4, 0))


def test_groups_are_no_smaller_than_a_partition_may_be():
    """An A100 has partitions of 4 SMs and more, in steps of 2: 3 groups of 2 would be of 4 each."""

    def cut(*asked: int) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
        partition = Partition.of(asked, 108, (8, 0))
        return partition.granted, partition.group_sms, partition.num_groups

    assert cut(16, 16) == ((16, 16), 4, (4, 4))
    assert cut(6, 10) == ((8, 12), 4, (2, 3))
    assert cut(18, 90) == ((18, 90), 18, (1, 0)), "one piece may have any step"
    assert cut(8, 12, 88) == ((8, 12, 88), 4, (2, 3, 0))
    assert cut(8, 10, 60) == ((8, 12, 60), 4, (2, 3, 15))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((), r"asked must be 8 or more SMs for each stage, got \(\)"),
        ((7, 84), r"asked must be 8 or more SMs for each stage, got \(7, 84\)"),
        ((-8, 84), "8 or more SMs"),
        ((48, 96), "at most the device's 132 SMs, got 48 \\+ 96 = 144"),
        ((133,), "at most the device's 132 SMs, got 133 = 133"),
    ],
)
def test_what_cannot_be_asked(asked, message):
    with pytest.raises(ValueError, match=message):
        Partition.of(asked, 132, HOPPER)


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_the_smallest_device_that_takes_so_many_stages(num_stages):
    asked = (8,) * num_stages
    assert Partition.of(asked, 8 * num_stages, HOPPER).granted == asked
    with pytest.raises(ValueError, match="num_stages must be 1 or more, got 0"):
        legal_splits(132, HOPPER, 0)


def test_architectures():
    assert [grain((major, 0)) for major in (6, 7, 8, 9)] == list(GRAINS.values())
    assert grain((10, 3)) == grain((12, 0)) == grain(HOPPER)
    with pytest.raises(ValueError, match=r"capability must be 6.0 or later, got 5.2"):
        grain((5, 2))


@given(st.integers(4, 200), capabilities, st.integers(1, 3))
def test_legal_splits_keep_to_the_device(num_sms, capability, num_stages):
    least, step = grain(capability).least, grain(capability).step
    if num_stages == 3 and step < 8:
        num_sms = min(num_sms, 30)  # their number grows with the cube
    splits = legal_splits(num_sms, capability, num_stages)
    assert list(splits) == sorted(set(splits))
    for split in splits:
        assert len(split) == num_stages and min(split) >= least and sum(split) <= num_sms
        ragged = [n for n in split if n % step]
        assert len(ragged) <= 1 and (not ragged or sum(split) == num_sms)
        assert split[::-1] in splits


@given(st.data(), st.sampled_from([78, 108, 114, 132, 144]), capabilities, st.integers(1, 2))
def test_what_is_granted(data, num_sms, capability, num_stages):
    least, step = grain(capability).least, grain(capability).step
    counts = st.lists(st.integers(least, num_sms), min_size=num_stages, max_size=num_stages)
    asked = data.draw(counts.filter(lambda counts: sum(counts) <= num_sms))
    partition = Partition.of(asked, num_sms, capability)
    splits = legal_splits(num_sms, capability, num_stages)
    assert partition.granted in splits
    assert Partition.of(partition.granted, num_sms, capability).granted == partition.granted

    def shortfall(split: tuple[int, ...]) -> int:
        return sum(max(want - got, 0) for want, got in zip(asked, split, strict=True))

    assert shortfall(partition.granted) == min(map(shortfall, splits))
    rounded = tuple(-(-n // step) * step for n in asked)
    if rounded in splits:
        assert partition.granted == rounded
    # the groups and the rest give just what was granted
    cut_out = sum(partition.num_groups) * partition.group_sms
    for i, (n, groups) in enumerate(zip(partition.granted, partition.num_groups, strict=True)):
        assert n == (num_sms - cut_out if i == partition.rest else groups * partition.group_sms)
