"""PDScheduler over two simulated devices and copies that end late and out of order."""

import os

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from engine.block_manager import BlockManager
from engine.request import Request, RequestState
from tests.fake_engine import EOS, EngineMachine, expected_tokens
from tests.fake_pd import PDEngine

MAX_SCHEDULES = int(os.environ.get("PD_SCHEDULES", "1000"))


class PDMachine(EngineMachine):
    """Tiny pools, so that pressure is the rule; tokens of the fake model must not notice."""

    @initialize(
        num_prefill_blocks=st.integers(4, 14),
        num_decode_blocks=st.integers(4, 14),
        block_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 4),
        max_num_batched_tokens=st.sampled_from([1, 3, 7, 20, 40]),
        max_model_len=st.sampled_from([2, 17, 40]),
        max_decode_backlog=st.sampled_from([1, 2, 4, 6]),
        growth_tokens=st.integers(0, 6),
        push_tokens=st.sampled_from([None, 0, 5]),
        max_chunks=st.sampled_from([None, 1, 3]),
    )
    def start(self, **options: int | None) -> None:
        self.engine = PDEngine(**options)

    @rule(
        action=st.sampled_from(["prefill", "copies", "decode", "first tokens", "tokens"]),
        pushes=st.booleans(), fails=st.sampled_from([False, False, False, True]),
    )  # fmt: skip
    def one_side(self, action: str, pushes: bool, fails: bool) -> None:
        """The two devices and the copies keep no pace with each other."""
        engine = self.engine
        if action == "prefill":
            engine.prefill_turn(pushes=pushes, fails=fails)
        elif action == "copies":
            engine.start_copies()
        elif action == "decode":
            engine.decode_turn(fails=fails)
        else:
            is_first = action == "first tokens"
            engine.collect(engine.prefill_results if is_first else engine.decode_results)

    @rule(pushes=st.booleans(), ends=st.lists(st.integers(0, 5), min_size=1, max_size=12))
    def turns(self, pushes: bool, ends: list[int]) -> None:
        """In each turn one of the copies in flight ends, or none does."""
        for index in ends:
            self.engine.step(pushes=pushes, copies_end=False)
            self.engine.check()
            self.end_copy(index, fails=False)

    @rule(index=st.integers(0, 3), fails=st.booleans())
    def end_copy(self, index: int, fails: bool) -> None:
        if index < len(self.engine.copies):
            event(f"copy ends out of order: {index > 0}")
            event(f"stale copy: {self.engine.copies[index].is_stale}")
            self.engine.end_copy(index, fails=fails)

    @rule(
        lengths=st.lists(st.integers(1, 9), min_size=2, max_size=5),
        max_tokens=st.integers(2, 20),
    )  # fmt: skip
    def add_some(self, lengths: list[int], max_tokens: int) -> None:
        limit = min(self.engine.scheduler.capacity, self.engine.scheduler.max_model_len)
        for i, length in enumerate(lengths):
            self.engine.add([1 + i] * min(length, limit - 1), max_tokens)

    @precondition(lambda self: self.engine.scheduler.running)
    @rule(choice=st.integers(0, 9), fails=st.booleans())
    def end_running(self, choice: int, fails: bool) -> None:
        """A stop string or a callback's error ends one that is prefilled, copying or decoding."""
        running = list(self.engine.scheduler.running.values())
        request = running[choice % len(running)]
        event(f"{'preempted' if fails else 'ended'} while {request.state.name}")
        if fails:
            self.engine.scheduler.preempt(request)
        else:
            self.abort_one(request)


TestPDMachine = PDMachine.TestCase
TestPDMachine.settings = settings(max_examples=MAX_SCHEDULES, stateful_step_count=40, deadline=None)


EDGES = [1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49]  # of blocks of 16 tokens


def steady_prompt(length: int, max_tokens: int, seed: int = 1) -> list[int]:
    """A prompt whose output does not end before max_tokens."""
    for salt in range(1, 60):
        prompt = [1 + (seed * 7 + salt * i) % 50 for i in range(length - 1)] + [salt]
        if EOS not in expected_tokens(prompt, length + max_tokens):
            return prompt
    raise AssertionError("no such prompt")


def engine_of(num_prefill_blocks: int = 40, num_decode_blocks: int = 40, **limits: int) -> PDEngine:
    return PDEngine(num_prefill_blocks, num_decode_blocks, 16, **limits)


def add(engine: PDEngine, length: int, max_tokens: int = 20, seed: int = 1) -> Request:
    return engine.add(steady_prompt(length, max_tokens, seed), max_tokens)


def prefill(engine: PDEngine) -> None:
    """Compute what is admitted, first tokens known."""
    engine.prefill_turn()
    engine.collect(engine.prefill_results)


def start_copy(engine: PDEngine, length: int = 20, **options: int) -> Request:
    request = add(engine, length, **options)
    prefill(engine)
    engine.start_copies()
    assert request.state is RequestState.COPYING
    return request


def start_decode(engine: PDEngine, length: int = 20, **options: int) -> Request:
    request = start_copy(engine, length, **options)
    engine.end_copy(-1)
    assert request.state is RequestState.DECODING
    return request


def num_held(manager: BlockManager) -> int:
    return manager.num_blocks - manager.num_free_blocks


@pytest.mark.parametrize("length", EDGES)
def test_prompts_at_block_edges(length: int) -> None:
    engine = engine_of()
    request = add(engine, length)
    prefill(engine)
    num_blocks = -(-length // 16)
    assert (num_held(engine.prefill), num_held(engine.decode)) == (num_blocks, 0)
    (handoff,) = engine.start_copies()
    assert handoff.num_tokens == length and len(handoff.src_blocks) == num_blocks
    assert list(handoff.src_blocks) == engine.scheduler.prefill_table(0)
    assert list(handoff.dst_blocks) == engine.scheduler.decode_table(0)[:num_blocks]
    assert num_held(engine.decode) == length // 16 + 1  # the first token to feed has a place
    engine.end_copy(0)
    assert num_held(engine.prefill) == 0
    assert engine.prefill.num_cached_blocks == length // 16  # kept findable
    assert engine.decode.num_cached_blocks == length // 16
    engine.run_to_end()
    assert request.num_generated == 20


@settings(max_examples=30)
@given(
    lengths=st.lists(st.sampled_from(EDGES), min_size=1, max_size=6),
    max_tokens=st.integers(1, 40),
    budget=st.integers(1, 70),
    num_decode_blocks=st.integers(7, 14),
    growth_tokens=st.integers(0, 40),
)
@example(lengths=[16] * 6, max_tokens=17, budget=16, num_decode_blocks=7, growth_tokens=0)
@example(lengths=[1, 49, 1, 49], max_tokens=40, budget=1, num_decode_blocks=7, growth_tokens=40)
def test_tokens_do_not_depend_on_the_schedule(
    lengths: list[int], max_tokens: int, budget: int, num_decode_blocks: int, growth_tokens: int
) -> None:
    limits = {"max_num_batched_tokens": budget, "growth_tokens": growth_tokens}
    engine = engine_of(8, num_decode_blocks, **limits)
    for i, length in enumerate(lengths):
        engine.add([1 + (i + j * j) % 3 for j in range(length)], max_tokens)
    engine.run_to_end()


@pytest.mark.parametrize("length", EDGES)
@pytest.mark.parametrize("push_tokens", [None, 0])
def test_one_token_never_touches_the_decode_pool(length: int, push_tokens: int | None) -> None:
    engine = engine_of(push_tokens=push_tokens)
    add(engine, length, max_tokens=1)
    engine.prefill_turn()
    assert engine.scheduler.leases.num_owed == 0 and not engine.start_copies()
    engine.run_to_end()
    assert engine.num_handoffs == 0


def test_first_token_that_ends_it_never_touches_the_decode_pool() -> None:
    engine = engine_of()
    prompts = ([token] * length for token in range(1, 30) for length in range(1, 30))
    prompt = next(p for p in prompts if expected_tokens(p, 99) == [EOS])
    request = engine.add(prompt, 20)
    engine.prefill_turn()
    assert engine.scheduler.leases.num_owed > 0 and not engine.start_copies()
    engine.run_to_end()
    assert (request.finish_reason, engine.num_handoffs) == ("stop", 0)


def test_pushed_before_its_token_it_decodes_once_both_are_there() -> None:
    engine = engine_of(push_tokens=0)
    copied_first, known_first = add(engine, 20), add(engine, 20, seed=2)
    engine.prefill_turn(pushes=True)
    assert [handoff.request for handoff in engine.copies] == [copied_first, known_first]
    engine.end_copy(0)
    assert engine.decode_turn() == [] and copied_first.state is RequestState.COPYING
    engine.collect(engine.prefill_results)
    assert engine.decode_turn() == [copied_first]
    engine.end_copy(0)
    assert engine.decode_turn() == [copied_first, known_first]
    engine.run_to_end()


def test_decode_waits_for_the_copy_and_prefill_blocks_stay_until_then() -> None:
    engine = engine_of()
    request = start_copy(engine, 33)
    for _ in range(3):
        assert engine.decode_turn() == [] and num_held(engine.prefill) == 3
    engine.end_copy(0)
    assert engine.decode_turn() == [request] and num_held(engine.prefill) == 0
    engine.run_to_end()


def test_each_pool_finds_only_what_it_holds() -> None:
    engine = engine_of()
    prompt = steady_prompt(40, 30)
    engine.add(prompt, 30)
    engine.run_to_end()
    assert engine.scheduler.schedule_handoffs() == []
    turn = prompt + engine.requests[0].generated_token_ids
    follow_up = engine.add([*turn, 7], 5)  # 71 tokens: 2 blocks in prefill's, 4 in decode's pool
    prefill(engine)
    assert follow_up.num_cached_tokens == 32
    (handoff,) = engine.start_copies()
    assert list(handoff.src_blocks) == engine.scheduler.prefill_table(1)[4:]
    engine.run_to_end()


def test_prompt_that_decode_has_cached_is_handed_over_without_a_copy() -> None:
    engine = engine_of()
    prompt = steady_prompt(32, 20)
    for _ in range(2):
        engine.add(prompt, 20)
        prefill(engine)
        (handoff,) = engine.start_copies()
        engine.end_copy(0)
        engine.run_to_end()
    assert (handoff.src_blocks, handoff.dst_blocks) == ([], [])


def test_prefix_being_copied_is_not_found() -> None:
    engine = engine_of()
    prompt = steady_prompt(32, 20)
    first, second = engine.add(prompt, 20), engine.add(prompt, 20)
    prefill(engine)
    handoffs = engine.start_copies()
    assert [len(handoff.dst_blocks) for handoff in handoffs] == [2, 2]
    engine.end_copy(1)
    assert engine.decode_turn() == [second] and first.state is RequestState.COPYING
    engine.run_to_end()


@pytest.mark.parametrize(
    ("length", "max_tokens", "growth_tokens", "num_promised"),
    [(16, 1, 9, 0), (16, 2, 0, 2), (15, 2, 0, 1), (16, 99, 16, 2), (16, 99, 17, 3),
     (16, 17, 99, 2), (16, 18, 99, 3), (1, 2, 0, 1), (31, 99, 2, 3)],
)  # fmt: skip
def test_promise(length: int, max_tokens: int, growth_tokens: int, num_promised: int) -> None:
    engine = engine_of(growth_tokens=growth_tokens)
    request = engine.add([1] * length, max_tokens)
    assert engine.scheduler.num_needed(request) == num_promised
    engine.prefill_turn()
    leases = engine.scheduler.leases
    assert (leases.num_owed, leases.credits) == (num_promised, 40 - num_promised)


def test_prompt_waits_for_credits_and_is_not_overtaken() -> None:
    engine = engine_of(num_decode_blocks=6, growth_tokens=16)
    first, big, small = add(engine, 16, 40), add(engine, 70, 8), add(engine, 1, 8)
    prefill(engine)
    waiting = list(engine.scheduler.waiting.values())
    assert first.state is RequestState.PREFILLED and waiting == [big, small]
    engine.run_to_end()
    assert [r.num_preemptions for r in engine.requests] == [0, 0, 0]


def test_prompts_of_one_document_share_it_in_the_decode_pool() -> None:
    # nine decode blocks for each, were they not alike
    engine = engine_of(num_decode_blocks=16, growth_tokens=0, max_num_batched_tokens=200)
    document = steady_prompt(128, 40)
    prompts = [[*document, salt] for salt in (7, 8, 9)]
    first, *others = (engine.add(prompt, 12) for prompt in prompts)
    prefill(engine)
    assert first.state is RequestState.PREFILLED and engine.scheduler.num_waiting == 2
    engine.start_copies()
    prefill(engine)
    assert engine.scheduler.num_waiting == 2  # what is being copied is not there yet
    engine.end_copy(0)
    prefill(engine)
    assert [other.num_cached_tokens for other in others] == [128, 128]
    assert [len(handoff.dst_blocks) for handoff in engine.start_copies()] == [1, 1]
    assert num_held(engine.decode) == 11
    engine.run_to_end()


def test_newcomer_leaves_a_block_for_each_that_outgrew_its_promise() -> None:
    engine = engine_of(num_decode_blocks=3, growth_tokens=0)
    start_decode(engine, 15, max_tokens=33)  # one block of three, and it wants them all
    newcomer = add(engine, 16, 20, seed=2)
    prefill(engine)
    assert newcomer.state is RequestState.WAITING  # two blocks are free, and it needs two
    engine.run_to_end()


def test_full_backlog_pauses_prefill() -> None:
    engine = engine_of(max_decode_backlog=2)
    first, *_ = [add(engine, 5, seed=seed) for seed in range(4)]
    prefill(engine)
    assert engine.scheduler.decode_backlog == 2 == engine.scheduler.num_waiting
    engine.start_copies()
    engine.scheduler.finish(first, "abort")
    prefill(engine)  # the copy of an ended request counts still
    assert engine.scheduler.decode_backlog == 2 == engine.scheduler.num_waiting
    engine.end_copy(1)
    prefill(engine)
    assert engine.scheduler.num_waiting == 1
    engine.run_to_end()


def test_computed_prompts_wait_for_a_row() -> None:
    engine = engine_of(max_num_seqs=1)
    first, second = add(engine, 5), add(engine, 5, seed=2)
    prefill(engine)
    assert [handoff.request for handoff in engine.start_copies()] == [first]
    engine.end_copy(0)
    assert engine.start_copies() == [] and second.state is RequestState.PREFILLED
    engine.run_to_end()


def to_state(engine: PDEngine, state: RequestState) -> Request:
    """A request of 20 tokens brought into that state; one in front of it decodes."""
    start_decode(engine, 17, seed=3)
    if state in (RequestState.COPYING, RequestState.DECODING):
        return (start_copy if state is RequestState.COPYING else start_decode)(engine)
    request = add(engine, 20)
    if state is not RequestState.WAITING:
        engine.prefill_turn()
    assert request.state in (state, RequestState.PREFILLED)
    return request


@pytest.mark.parametrize("state", [s for s in RequestState if s is not RequestState.FINISHED])
@pytest.mark.parametrize("ending", ["abort", "stop", "error"])
def test_all_comes_back_whatever_the_state(state: RequestState, ending: str) -> None:
    budget = 17 if state is RequestState.PREFILLING else 99
    engine = engine_of(max_num_batched_tokens=budget)
    request = to_state(engine, state)
    assert request.state is state
    engine.scheduler.finish(request, ending)
    engine.check()
    held = num_held(engine.prefill), num_held(engine.decode)
    assert held == ((2, 4) if state is RequestState.COPYING else (0, 2))
    while engine.copies:
        engine.end_copy(0)
    assert (num_held(engine.prefill), num_held(engine.decode)) == (0, 2)
    assert engine.scheduler.leases.credits == 40 - 2 - engine.scheduler.leases.num_owed
    request.finish_reason = "abort"
    engine.run_to_end()


def test_request_comes_again_while_its_old_copy_is_in_flight() -> None:
    engine = engine_of()
    request = start_copy(engine)
    engine.scheduler.preempt(request)
    assert request.state is RequestState.WAITING and engine.copies[0].is_stale
    prefill(engine)
    engine.start_copies()
    old, new = engine.copies
    assert not set(old.dst_blocks) & set(new.dst_blocks)
    engine.end_copy(1)
    assert engine.decode_turn() == [request]
    engine.end_copy(0)
    assert num_held(engine.prefill) == 0 and engine.decode_turn() == [request]
    engine.run_to_end()


def test_failed_copy_has_its_request_computed_anew() -> None:
    engine = engine_of()
    request = start_copy(engine)
    handoff = engine.copies[0]
    engine.end_copy(0, fails=True)
    assert request.state is RequestState.WAITING and engine.decode.num_cached_blocks == 0
    engine.scheduler.leases.assert_idle()
    with pytest.raises(ValueError, match="request 0 must have a copy in flight, has none"):
        engine.scheduler.handoff_done(handoff)
    engine.run_to_end()


def test_pressure_preempts_the_latest_to_be_computed_on_the_prefill_device() -> None:
    engine = engine_of(num_decode_blocks=5, growth_tokens=0)
    first = start_decode(engine, 15, max_tokens=50)
    second = start_decode(engine, 15, max_tokens=50, seed=2)
    while not second.num_preemptions:
        engine.decode_turn()
        engine.collect(engine.decode_results)
        engine.check()
    assert second.state is RequestState.WAITING and second.num_generated > 1
    num_known = len(second.token_ids)
    while second.state is RequestState.WAITING:
        chunks = engine.scheduler.schedule_prefill()
        engine.decode_turn()
        engine.collect(engine.decode_results)
    assert [(c.request, c.start + c.num_tokens) for c in chunks] == [(second, num_known)]
    engine.scheduler.preempt(second)
    engine.run_to_end()
    assert first.num_preemptions == 0


def test_pressure_does_not_preempt_who_has_no_decode_blocks() -> None:
    engine = engine_of(num_decode_blocks=5, growth_tokens=0)
    start_decode(engine, 15, max_tokens=50)
    second = start_decode(engine, 15, max_tokens=50, seed=2)
    only_prefill = add(engine, 20, max_tokens=1, seed=3)
    engine.prefill_turn()
    while not second.num_preemptions:
        engine.decode_turn()
        engine.collect(engine.decode_results)
    assert only_prefill.num_preemptions == 0
    engine.run_to_end()


def test_pressure_waits_for_a_copy_rather_than_take_its_blocks() -> None:
    engine = engine_of(num_decode_blocks=5, growth_tokens=0)
    first = start_decode(engine, 31, max_tokens=49)
    second = start_copy(engine, 31, seed=2)
    while engine.decode_turn():
        engine.collect(engine.decode_results)
    assert first.num_computed_tokens == 48 and engine.copies  # of three blocks; no fourth
    assert second.state is RequestState.COPYING and not first.num_preemptions
    engine.end_copy(0)
    assert engine.decode_turn() == [first] and second.num_preemptions == 1
    engine.run_to_end()


def test_oldest_waits_for_the_copy_of_an_ended_request() -> None:
    engine = engine_of(num_decode_blocks=5, growth_tokens=0)
    first = start_decode(engine, 31, max_tokens=49)
    engine.scheduler.finish(start_copy(engine, 31, seed=2), "abort")
    while engine.decode_turn():
        engine.collect(engine.decode_results)
    assert first.state is RequestState.DECODING
    engine.end_copy(0)
    assert engine.decode_turn() == [first]
    engine.run_to_end()
    assert first.num_preemptions == 0


def test_failed_launches_queue_in_the_order_of_arrival() -> None:
    engine = engine_of()
    start_decode(engine)
    start_copy(engine, seed=2)
    add(engine, 20, seed=3)
    engine.prefill_turn(fails=True)
    engine.decode_turn(fails=True)
    engine.scheduler.preempt(engine.requests[1])
    assert list(engine.scheduler.waiting) == [0, 1, 2]
    engine.run_to_end()


@pytest.mark.parametrize(("num_prefill_blocks", "num_decode_blocks"), [(2, 9), (9, 2)])
def test_prompt_must_fit_the_smaller_pool(num_prefill_blocks: int, num_decode_blocks: int) -> None:
    engine = engine_of(num_prefill_blocks, num_decode_blocks)
    with pytest.raises(ValueError, match=r"prompt must be 1 to 31 .*\(32\), got 32"):
        engine.add([1] * 32, 1)
    engine.add([1] * 31, 9)
    engine.run_to_end()


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_num_seqs", 0), ("max_decode_backlog", 0), ("growth_tokens", -1), ("max_model_len", 1)],
)
def test_bad_limits_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be an integer >= \d, got {value}"):
        engine_of(**{name: value})
