"""Leases: what a request holds on two pools, and what a copy keeps after it."""

import pytest

from engine.block_manager import BlockManager
from engine.lease import Leases

TOKENS = list(range(40))


def make(num_prefill: int = 8, num_decode: int = 8, block_size: int = 16) -> Leases:
    return Leases(BlockManager(num_prefill, block_size), BlockManager(num_decode, block_size))


def opened(
    request_id: int = 0, num_tokens: int = 33, num_promised: int = 3, **sizes: int
) -> Leases:
    leases = make(**sizes)
    leases.open(request_id, TOKENS[:num_tokens], num_promised, 8)
    return leases


def num_free(leases: Leases) -> tuple[int, int]:
    return leases.prefill.num_free_blocks, leases.decode.num_free_blocks


def test_promise_is_paid_by_the_first_blocks_then_by_growth_then_by_credits() -> None:
    leases = opened(num_promised=4)
    assert (num_free(leases), leases.credits) == ((5, 8), 4)
    leases.start_copy(0, TOKENS[:34], 33)
    assert (num_free(leases), leases.num_owed, leases.credits) == ((5, 5), 1, 4)
    assert leases.grow(0, 48) and leases.num_owed == 1  # the last token of the third block
    assert leases.grow(0, 49) and (leases.num_owed, leases.credits) == (0, 4)
    assert leases.num_outgrown == 1
    assert leases.grow(0, 65) and leases.credits == 3
    leases.check()


def test_growth_does_not_take_what_others_were_promised() -> None:
    leases = opened(num_promised=3, num_decode=5)
    leases.start_copy(0, TOKENS[:33], 33)
    assert leases.open(1, [7], 2, 2) is None  # one is for who has outgrown its promise
    leases.open(1, [7], 1, 1)
    assert leases.credits == 1 and leases.decode.num_free_blocks == 2
    assert not leases.grow(0, 65)
    leases.close(1)
    assert leases.grow(0, 65)


def test_one_that_holds_all_it_can_use_has_not_outgrown_its_promise() -> None:
    leases = make()
    leases.open(0, TOKENS[:33], 3, 3)
    leases.start_copy(0, TOKENS[:33], 33)
    assert leases.num_outgrown == 0


def test_who_has_outgrown_its_promise_counts_until_its_lease_ends() -> None:
    leases = opened(num_promised=3)
    assert leases.num_outgrown == 0
    leases.start_copy(0, TOKENS[:34], 33)
    assert leases.num_outgrown == 1
    leases.close(0)  # the copy goes on
    assert leases.num_outgrown == 0
    leases.open(0, TOKENS[:33], 4, 8)  # the same request again, promised more
    leases.start_copy(0, TOKENS[:34], 33)
    assert leases.num_outgrown == 0
    leases.check()


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 31, 32, 33])
def test_copy_covers_the_tokens_and_leaves_a_place_for_the_next(num_tokens: int) -> None:
    leases = opened(num_tokens=num_tokens, num_promised=num_tokens // 16 + 1)
    source, destination = leases.start_copy(0, TOKENS[: num_tokens + 1], num_tokens)
    assert len(source) == len(destination) == -(-num_tokens // 16)
    assert leases.num_owed == 0 and leases.decode.num_free_blocks == 8 - (num_tokens // 16 + 1)
    leases.check()


def test_source_is_freed_when_the_copy_ends() -> None:
    leases = opened()
    leases.start_copy(0, TOKENS[:34], 33)
    assert num_free(leases) == (5, 5)
    assert leases.end_copy(leases.lease_of(0))
    assert num_free(leases) == (8, 5)
    leases.close(0)
    leases.assert_idle()


def test_closed_while_copying_keeps_both_sides() -> None:
    leases = opened(num_promised=4)
    leases.start_copy(0, TOKENS[:34], 33)
    lease = leases.lease_of(0)
    leases.close(0)
    assert (num_free(leases), leases.num_owed, leases.num_closing) == ((5, 5), 0, 1)
    leases.check()
    leases.open(0, TOKENS[:20], 2, 2)  # the same request again
    assert not leases.end_copy(lease)
    assert num_free(leases) == (6, 8) and leases.num_closing == 0
    leases.close(0)
    leases.assert_idle()


def test_leading_blocks_that_decode_has_are_not_copied() -> None:
    leases = opened()
    leases.start_copy(0, TOKENS[:34], 33)
    leases.end_copy(leases.lease_of(0))
    leases.open(1, TOKENS[:33], 3, 8)
    leases.commit(0, TOKENS, 33)
    source, destination = leases.start_copy(1, TOKENS[:34], 33)
    assert source == leases.prefill.block_table(1)[2:]
    assert destination == leases.decode.block_table(1)[2:]
    assert leases.prefill.num_cached_blocks == 0  # nothing was committed there


def test_leftover_says_what_is_not_back() -> None:
    leases = opened(request_id=5, num_promised=4)
    assert leases.leftover() == "3 prefill blocks held by requests [5], 4 decode blocks promised"
    leases.start_copy(5, TOKENS[:34], 33)
    leases.close(5)
    wanted = "3 prefill blocks held by requests [5], 3 decode blocks held by requests [5], "
    wanted += "copies in flight of requests [5]"
    assert leases.leftover() == wanted
    with pytest.raises(AssertionError, match="3 prefill blocks held"):
        leases.assert_idle()


def test_refused_admission_changes_nothing() -> None:
    leases = make(num_prefill=2)
    assert leases.open(0, TOKENS[:33], 3, 3) is None
    leases.assert_idle()


def test_what_the_credits_do_not_cover_is_refused() -> None:
    leases = opened(num_promised=6)
    assert leases.open(1, [1], 3, 3) is None and leases.open(1, [1], 2, 2) == 0
    assert (leases.credits, leases.num_owed) == (0, 8)
    leases.check()


def test_shared_blocks_need_no_promise_and_stay() -> None:
    leases = opened(num_promised=4)  # of eight: three for the prompt, one to grow
    leases.start_copy(0, TOKENS[:34], 33)
    leases.end_copy(leases.lease_of(0))
    leases.commit(0, TOKENS, 33)
    assert leases.credits == 4
    for request_id in (1, 2):  # each begins with two blocks that are there, and needs two more
        leases.open(request_id, TOKENS[:33], 4, 8)
        assert leases.credits == 4 - 2 * request_id
        leases.check()
    assert leases.open(3, TOKENS[:33], 4, 8) is None
    leases.close(0)
    assert leases.credits == 2  # the shared two are not among what came back
    leases.open(3, [7] * 17, 2, 2)
    leases.start_copy(3, [7] * 17, 17)
    for request_id in (1, 2):
        source, destination = leases.start_copy(request_id, TOKENS[:34], 33)
        assert len(source) == len(destination) == 1 and leases.lease_of(request_id).num_owed == 1
        leases.check()
    for request_id in (1, 2, 3):
        leases.end_copy(leases.lease_of(request_id))
        leases.close(request_id)
    leases.assert_idle()


def test_who_never_decodes_needs_no_credits() -> None:
    leases = opened(num_promised=3, num_decode=3)
    leases.start_copy(0, TOKENS[:34], 33)
    assert (leases.credits, leases.num_outgrown) == (0, 1)
    assert leases.open(1, [1], 1, 1) is None and leases.open(2, [1], 0, 0) == 0
    leases.check()


def test_a_prefix_that_nobody_holds_is_paid_for_and_kept() -> None:
    leases = opened(num_promised=3, num_decode=4)
    leases.start_copy(0, TOKENS[:33], 33)
    leases.end_copy(leases.lease_of(0))
    leases.commit(0, TOKENS, 33)
    leases.close(0)
    leases.open(1, TOKENS[:33], 3, 3)
    assert (leases.decode.num_free_blocks, leases.num_owed, leases.credits) == (2, 1, 1)
    assert leases.open(2, [7] * 17, 2, 2) is None
    leases.close(1)
    leases.assert_idle()
    assert leases.decode.num_cached_blocks == 2


def test_wrong_calls_are_refused() -> None:
    leases = opened(num_promised=8)
    with pytest.raises(ValueError, match="request_id must be one without a lease, got 0"):
        leases.open(0, [1], 0, 0)
    with pytest.raises(ValueError, match="request 0 must have a copy in flight, has none"):
        leases.end_copy(leases.lease_of(0))
    with pytest.raises(KeyError):
        leases.close(1)


def test_pools_must_be_two_and_alike() -> None:
    manager = BlockManager(4, 16)
    with pytest.raises(ValueError, match="must be two block managers, got one for both"):
        Leases(manager, manager)
    with pytest.raises(ValueError, match=r"decode must have blocks of 16 tokens .* got 8"):
        Leases(manager, BlockManager(4, 8))
