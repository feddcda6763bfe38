"""The block manager against a pool that remembers which tokens each block was written for."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.block_manager import BlockManager

# two tokens only, so that prompts often begin alike
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=14)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


class BlockManagerMachine(RuleBasedStateMachine):
    """A cell of the pool holds the prefix it was computed from, as a real k and v would."""

    @initialize(num_blocks=st.integers(1, 12), block_size=st.sampled_from([1, 2, 4]))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.manager = BlockManager(num_blocks, block_size)
        self.pool: dict[tuple[int, int], tuple[int, ...]] = {}
        self.token_ids: dict[int, list[int]] = {}
        self.num_computed: dict[int, int] = {}
        self.next_id = 0

    def cell(self, request_id: int, position: int) -> tuple[int, int]:
        index, offset = divmod(position, self.manager.block_size)
        return self.manager.block_table(request_id)[index], offset

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.token_ids)))

    @rule(token_ids=prompts, keep_free=st.integers(0, 2))
    def admit(self, token_ids: list[int], keep_free: int) -> None:
        request_id, self.next_id = self.next_id, self.next_id + 1
        num_free = self.manager.num_free_blocks
        num_cached = self.manager.admit(request_id, token_ids, keep_free=keep_free)
        if num_cached is None:
            assert num_free - cdiv(len(token_ids), self.manager.block_size) < keep_free
            assert self.manager.num_free_blocks == num_free
            return
        assert self.manager.num_free_blocks >= keep_free
        assert num_cached < len(token_ids) and num_cached % self.manager.block_size == 0
        self.token_ids[request_id] = token_ids
        self.num_computed[request_id] = num_cached

    @precondition(lambda self: self.token_ids)
    @rule(data=st.data(), num_tokens=st.integers(1, 9), committed=st.booleans())
    def compute(self, data: st.DataObject, num_tokens: int, committed: bool) -> None:
        request_id = self.pick(data)
        token_ids, start = self.token_ids[request_id], self.num_computed[request_id]
        end = min(start + num_tokens, len(token_ids))
        others = {b for i in self.token_ids if i != request_id for b in self.manager.block_table(i)}
        for position in range(start, end):
            cell = self.cell(request_id, position)
            assert cell[0] not in others, "a shared block is written"
            self.pool[cell] = tuple(token_ids[: position + 1])
        self.num_computed[request_id] = end
        if committed:
            self.manager.commit(request_id, token_ids, end)

    @precondition(lambda self: self.token_ids)
    @rule(data=st.data(), new=prompts)
    def grow(self, data: st.DataObject, new: list[int]) -> None:
        request_id = self.pick(data)
        num_tokens = len(self.token_ids[request_id]) + len(new)
        table, num_free = self.manager.block_table(request_id), self.manager.num_free_blocks
        before = list(table)
        num_wanted = cdiv(num_tokens, self.manager.block_size) - len(before)
        grown = self.manager.grow(request_id, num_tokens)
        assert grown == (num_wanted <= num_free)
        assert table[: len(before)] == before and len(table) - len(before) == grown * num_wanted
        if grown:
            self.token_ids[request_id] = self.token_ids[request_id] + new

    @precondition(lambda self: self.token_ids)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        request_id = self.pick(data)
        self.manager.release(request_id)
        del self.token_ids[request_id], self.num_computed[request_id]
        with pytest.raises(KeyError):
            self.manager.release(request_id)

    @invariant()
    def every_block_has_owners_or_is_free(self) -> None:
        self.manager.check()
        held = {b for i in self.token_ids for b in self.manager.block_table(i)}
        assert len(held) + self.manager.num_free_blocks == self.manager.num_blocks

    @invariant()
    def computed_tokens_stay_as_written(self) -> None:
        for request_id, token_ids in self.token_ids.items():
            for position in range(self.num_computed[request_id]):
                wanted = tuple(token_ids[: position + 1])
                assert self.pool[self.cell(request_id, position)] == wanted

    def teardown(self) -> None:
        for request_id in list(getattr(self, "token_ids", ())):
            self.manager.release(request_id)
        if hasattr(self, "manager"):
            self.manager.assert_idle()


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@given(num_tokens=st.integers(1, 70), block_size=st.sampled_from([1, 4, 16]))
@example(num_tokens=32, block_size=16)  # length 0 modulo the block: its last block is computed
@example(num_tokens=33, block_size=16)
@example(num_tokens=31, block_size=16)
@example(num_tokens=1, block_size=1)
def test_second_request_finds_all_but_the_last_token(num_tokens: int, block_size: int) -> None:
    manager = BlockManager(200, block_size)
    token_ids = list(range(num_tokens))
    assert manager.admit(0, token_ids) == 0
    manager.commit(0, token_ids, num_tokens)
    wanted = (num_tokens - 1) // block_size * block_size
    assert manager.admit(1, token_ids) == wanted
    manager.release(0)
    manager.release(1)
    assert manager.admit(2, token_ids) == wanted  # also when nobody holds it any more


def test_same_block_after_another_beginning_is_another_block() -> None:
    manager = BlockManager(8, 2)
    manager.admit(0, [1, 1, 2, 2, 3])
    manager.commit(0, [1, 1, 2, 2, 3], 5)
    assert manager.admit(1, [9, 9, 2, 2, 3]) == 0


def test_tail_is_evicted_before_head_and_blank_before_cached() -> None:
    manager = BlockManager(5, 1)
    manager.admit(0, [1, 2, 3])
    manager.commit(0, [1, 2, 3], 3)
    manager.release(0)
    manager.admit(1, [7, 7])  # two blank blocks are left
    assert manager.num_cached_blocks == 3
    manager.grow(1, 3)
    assert manager.num_cached_blocks == 2
    assert manager.admit(2, [1, 2], keep_free=0) == 1  # the head is still there


def test_least_recently_used_chain_is_evicted_first() -> None:
    manager = BlockManager(5, 1)
    for request_id, token in enumerate([1, 2, 1]):  # 1 is used again after 2
        manager.admit(request_id, [token, 0])
        manager.commit(request_id, [token, 0], 1)
        manager.release(request_id)
    manager.admit(3, [9, 9, 9, 9])
    assert manager.num_free_blocks == 1
    manager.release(3)
    assert manager.admit(4, [1, 5]) == 1
    assert manager.admit(5, [2, 5]) == 0


def test_refused_admission_leaves_the_cache_alone() -> None:
    manager = BlockManager(3, 1)
    manager.admit(0, [1, 2])
    manager.commit(0, [1, 2], 2)
    manager.release(0)
    assert manager.admit(1, [1, 2, 3, 4]) is None
    assert manager.num_free_blocks == 3 and manager.is_idle
    assert manager.admit(2, [1, 2, 3]) == 2


def test_commit_looks_at_new_full_blocks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    manager, published = BlockManager(8, 2), []
    publish = manager._publish
    monkeypatch.setattr(manager, "_publish", lambda *args: (published.append(args), publish(*args)))
    token_ids = [1, 2, 3, 4, 5, 6, 7]
    manager.admit(0, token_ids)
    for num_computed in (1, 2, 3, 4, 4, 7, 7):
        manager.commit(0, token_ids, num_computed)
    assert [block for block, _ in published] == manager.block_table(0)[:3]
    manager.admit(1, token_ids)
    manager.commit(1, token_ids, 7)
    assert len(published) == 3


def test_tokens_that_another_manager_has_hashed_are_not_hashed_again(monkeypatch) -> None:
    one, other, token_ids = BlockManager(8, 2), BlockManager(8, 2), [1, 2, 3, 4, 5, 6]
    one.admit(0, token_ids)
    one.commit(0, token_ids, 6)
    assert len(one.digests(0)) == 3
    with monkeypatch.context() as patch:
        patch.setattr("engine.block_manager.blake2b", None)
        assert other.admit(0, [*token_ids, 7], digests=one.digests(0)) == 0
        other.commit(0, [*token_ids, 7], 6)
        assert other.admit(1, token_ids, digests=one.digests(0)) == 4
    assert other.admit(2, [*token_ids, 8]) == 6


def test_without_prefix_caching_nothing_is_found() -> None:
    manager = BlockManager(8, 1, enable_prefix_caching=False)
    manager.admit(0, [1, 2, 3])
    manager.commit(0, [1, 2, 3], 3)
    assert manager.admit(1, [1, 2, 3]) == 0 and manager.num_cached_blocks == 0


def test_wrong_calls_are_refused() -> None:
    manager = BlockManager(4, 2)
    manager.admit(0, [1, 2])
    with pytest.raises(ValueError, match="request_id must be one without blocks, got 0"):
        manager.admit(0, [1])
    with pytest.raises(ValueError, match="token_ids must hold at least one token, got 0"):
        manager.admit(1, [])
    with pytest.raises(ValueError, match="num_computed must be at most 2, got 4"):
        manager.commit(0, [1, 2], 4)
    with pytest.raises(KeyError):
        manager.grow(7, 1)
    with pytest.raises(AssertionError, match=r"held by requests \[0\]"):
        manager.assert_idle()
