"""PDCore under strain: copies and results that come late, aborts in every state, what fails.

Blocks that nobody owns hold NaN, and so do those that a copy has yet to fill (`late_link`).
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import LLM
from engine.batch import Launched
from engine.request import Request, RequestState
from tests.checkpoints import save_random, save_speaker
from tests.late_link import LateLink, at_random, put_late_links
from tests.test_llm import (
    PIECES,
    assert_idle,
    fail,
    greedy,
    on_call,
    run_all,
    small_llm,
    token_ids,
)

WAYS = ["slab", "push"]
SIZES = {"block_size": 4, "num_kv_blocks": 40, "max_num_seqs": 4, "max_decode_backlog": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_random(tmp_path_factory.mktemp("ids"), "qwen3")


@pytest.fixture(params=WAYS)
def kv_handoff(request) -> str:
    return request.param


@contextmanager
def late_llm(folder: Path, may_end: Callable[[], bool] = lambda: False, **options) -> Iterator[LLM]:
    """Copies end as `may_end` says; `llm.links` are those of slabs and of pushes."""
    with small_llm(folder, enable_two_gpu_pd=True, **SIZES | options) as llm:
        llm.links = put_late_links(llm._core, may_end)
        yield llm


def prompts_of(num: int, seed: int = 0, longest: int = 30) -> list[list[int]]:
    rng = random.Random(seed)
    shared = [rng.randrange(3, 67) for _ in range(longest)]
    lengths = [rng.randint(1, longest) for _ in range(num)]
    return [shared[: n // 2] + [rng.randrange(3, 67) for _ in range(n - n // 2)] for n in lengths]


@pytest.fixture(scope="module")
def alone(folder) -> Callable[[list[int], int], list[int]]:
    """prompt, max_tokens -> the tokens it gets on one device when nothing else runs."""
    known: dict[tuple[int, ...], list[int]] = {}
    with small_llm(folder, enable_prefix_caching=False) as llm:

        def tokens(prompt: list[int], max_tokens: int) -> list[int]:
            key = tuple(prompt)
            if len(known.get(key, ())) < max_tokens:
                params = greedy(max(24, max_tokens), ignore_eos=True)
                known[key] = llm.generate([prompt], params)[0]["token_ids"]
            return known[key][:max_tokens]

        yield tokens


def late_results(patch: pytest.MonkeyPatch, seed: int) -> None:
    """Launches that are over at some look at them, as on a device."""
    rng = random.Random(seed)
    patch.setattr(Launched, "is_done", property(lambda launched: rng.random() < 0.4))


# late, and out of order


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    kv_handoff=st.sampled_from([*WAYS, "auto"]),
    enable_prefix_caching=st.booleans(),
    num_kv_blocks=st.integers(12, 30),
    max_num_batched_tokens=st.sampled_from([5, 20, 64]),
    pd_growth_tokens=st.sampled_from([0, 3, 256]),
    aborts=st.booleans(),
)
def test_tokens_do_not_depend_on_when_copies_and_results_come(
    folder, alone, seed, aborts, **options
):
    prompts = prompts_of(10, seed % 7)
    rng = random.Random(seed)
    max_tokens = [rng.randint(1, 14) for _ in prompts]
    with late_llm(folder, at_random(seed), **options) as llm, pytest.MonkeyPatch.context() as patch:
        late_results(patch, seed)
        ids, last = [], {}
        for prompt, n in zip(prompts, max_tokens, strict=True):
            ids.append(llm.add_request(prompt, greedy(n, ignore_eos=True)))
            for _ in range(rng.randint(0, 3)):
                last |= ended(llm.step())
            if aborts and rng.random() < 0.3:
                llm.abort(rng.choice(ids))
            check_bounds(llm)
        last |= finish(llm)
    for request_id, prompt, n in zip(ids, prompts, max_tokens, strict=True):
        found, wanted = last[request_id]["token_ids"], alone(prompt, n)
        assert found == wanted[: len(found)]
        assert aborts or len(found) == n


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("enable_prefix_caching", [False, True])
def test_tokens_are_the_same_where_pressure_preempts(
    folder, alone, kv_handoff, enable_prefix_caching, seed, monkeypatch
):
    """No output is promised blocks: requests outgrow the pool, and begin again."""
    options = {"kv_handoff": kv_handoff, "enable_prefix_caching": enable_prefix_caching}
    prompts = prompts_of(8, seed, longest=12)
    late_results(monkeypatch, seed)
    with late_llm(folder, at_random(seed), num_kv_blocks=12, pd_growth_tokens=0, **options) as llm:
        ids = [llm.add_request(prompt, greedy(24, ignore_eos=True)) for prompt in prompts]
        last = finish(llm)
        assert llm.stats()["num_preemptions"] > 0
    assert [last[i]["token_ids"] for i in ids] == [alone(prompt, 24) for prompt in prompts]


def test_growth_tokens_are_an_option(folder):
    for options, wanted in (({}, 256), ({"pd_growth_tokens": 0}, 0)):
        with late_llm(folder, **options) as llm:
            assert llm._core.scheduler.growth_tokens == wanted
    with pytest.raises(ValueError, match="pd_growth_tokens must be an integer >= 0, got -1"):
        LLM(folder, device="cpu", pd_growth_tokens=-1)


def ended(outputs: list[dict]) -> dict[int, dict]:
    """Those that are the last of their request."""
    return {output["request_id"]: output for output in outputs if output["finished"]}


def finish(llm: LLM) -> dict[int, dict]:
    """Last outputs by request_id, the bounds held on the way there."""
    last = {}
    for _ in range(5000):
        if llm.is_finished():
            return last
        last |= ended(llm.step())
        check_bounds(llm)
    raise AssertionError("the requests do not end")


def check_bounds(llm: LLM) -> None:
    """Back-pressure, credits and who owns what; here after every step of a running engine."""
    core, config = llm._core, llm.config
    core.leases.check()
    assert core.scheduler.decode_backlog <= config.max_decode_backlog
    states = [r.state for r in core.scheduler.running.values()]
    placed = states.count(RequestState.DECODING) + states.count(RequestState.COPYING)
    assert placed <= config.max_num_seqs
    assert len(core._prefills) <= 3 and len(core._decodes) <= 2
    for launched in core._prefills:
        assert len(launched.requests) <= config.max_decode_backlog
    handoff = llm.stats()["handoff"]
    for state in (RequestState.PREFILLED, RequestState.COPYING, RequestState.DECODING):
        assert handoff[f"num_{state.name.lower()}"] == states.count(state)
    assert handoff["backlog"] <= handoff["peak_backlog"] <= config.max_decode_backlog
    assert handoff["credits"] >= 0 and handoff["backlog"] <= config.max_decode_backlog


def test_a_prefill_launch_more_than_needed_is_prepared_right_behind_tokens(folder, monkeypatch):
    """Else tokens would wait for the host; and none would be, did each wait for tokens."""
    with small_llm(folder, enable_two_gpu_pd=True, **SIZES | {"max_num_batched_tokens": 8}) as llm:
        core = llm._core
        first = llm.add_request([5] * 8, greedy(60, ignore_eos=True))
        while request_of(llm, first).state is not RequestState.DECODING:
            llm.step()
        looks = iter(range(10**6))  # tokens of a step are there at each 9th look, of prefill never
        is_done = property(lambda launched: launched.phase == "decode" and next(looks) % 9 == 8)
        monkeypatch.setattr(Launched, "is_done", is_done)
        launch, num_before, new_tokens = core._launch_prefill, [], []

        def watched() -> bool:
            num_before.append(len(core._prefills))
            assert num_before[-1] < 2 or new_tokens, "two are in flight, and tokens may come soon"
            return launch()

        monkeypatch.setattr(core, "_launch_prefill", watched)
        for _ in range(4):
            llm.add_request([6] * 8, greedy(1))
        for _ in range(40):
            new_tokens = [t for output in llm.step() for t in output["new_token_ids"]]
        assert num_before[:3] == [0, 1, 2] and len(core._prefills) == 3
        monkeypatch.undo()
        run_all(llm)


def test_decode_goes_on_while_a_copy_takes_its_time(folder, kv_handoff):
    with late_llm(folder, kv_handoff=kv_handoff) as llm:
        first = llm.add_request([5, 6, 7], greedy(40, ignore_eos=True))
        for link in llm.links:
            link.may_end = lambda: True
        while request_of(llm, first).state is not RequestState.DECODING:
            llm.step()
        for link in llm.links:
            link.may_end = lambda: False
        second = llm.add_request([8] * 9, greedy(5, ignore_eos=True))
        last = {}
        while first not in last:
            last |= ended(llm.step())
        assert request_of(llm, second).state is RequestState.COPYING
        assert request_of(llm, second).num_generated == 1, "its first token goes out at once"
        llm.abort(second)
        assert run_all(llm)[second]["finish_reason"] == "abort"


def test_tokens_go_out_before_a_prefill_launch_but_do_not_keep_it_off(folder, monkeypatch):
    """With one in flight already: every second step prepares another, though tokens always come."""
    with late_llm(folder, lambda: True) as llm:
        request_id = llm.add_request([5, 6, 7], greedy(40, ignore_eos=True))
        while request_of(llm, request_id).num_generated < 3:
            llm.step()
        core, launched = llm._core, []
        monkeypatch.setattr(core, "_launch_prefill", lambda: launched.append(True) or False)
        in_flight = SimpleNamespace(is_done=False)
        core._prefills.append(in_flight)
        found = []
        for _ in range(6):
            del launched[:]
            found.append((len(llm.step()), len(launched)))
        core._prefills.remove(in_flight)
        assert found == [(1, 0), (1, 1)] * 3
        monkeypatch.undo()
        assert len(finish(llm)[request_id]["token_ids"]) == 40


def test_a_full_decode_side_pauses_prefill(folder, alone):
    """With one row, no copy of a second request is started, and no more than the bound wait."""
    prompts = prompts_of(9, seed=3, longest=8)
    with late_llm(folder, lambda: True, max_num_seqs=1, max_decode_backlog=3) as llm:
        params = greedy(12, ignore_eos=True)
        ids = [llm.add_request(prompt, params) for prompt in prompts]
        backlog = []
        for _ in range(8):
            llm.step()
            check_bounds(llm)
            backlog.append(llm.stats()["handoff"]["backlog"])
        assert max(backlog) == 3 and llm.stats()["num_waiting"] >= 4
        last = finish(llm)
        assert [last[i]["token_ids"] for i in ids] == [alone(p, 12) for p in prompts]


# ends from outside, in every state


def request_of(llm: LLM, request_id: int) -> Request:
    return llm._jobs[request_id].request


def to_state(llm: LLM, state: RequestState, **fields) -> int:
    """A request of 21 tokens that is in that state now; it takes two launches."""
    params = greedy(20, ignore_eos=True, **fields)
    request_id = llm.add_request(list(range(3, 24)), params)
    for link in llm.links:
        link.may_end = lambda: state is RequestState.DECODING
    for _ in range(20):
        if request_of(llm, request_id).state is state:
            return request_id
        llm.step()
    raise AssertionError(f"never {state}")


STATES = [s for s in RequestState if s is not RequestState.FINISHED]


@pytest.mark.parametrize("state", STATES)
def test_abort_in_any_state_gives_everything_back(folder, alone, state, kv_handoff):
    if state is RequestState.PREFILLED and kv_handoff == "push":
        return  # it is copied from the launch of its last chunk on
    with late_llm(folder, kv_handoff=kv_handoff, max_num_batched_tokens=16) as llm:
        request_id = to_state(llm, state)
        leases = llm._core.leases
        num_free = leases.prefill.num_free_blocks, leases.decode.num_free_blocks
        assert llm.abort(request_id)
        if state is RequestState.COPYING:  # the copy still reads and writes
            assert (leases.prefill.num_free_blocks, leases.decode.num_free_blocks) == num_free
        leases.check()
        others_are_right(llm, alone)
        assert run_all(llm)[request_id]["finish_reason"] == "abort"


def others_are_right(llm: LLM, alone: Callable) -> None:
    """What comes next on the same blocks, with copies that end late."""
    for link in llm.links:
        link.may_end = at_random(1)
    prompts = prompts_of(5, seed=8)
    outputs = llm.generate(prompts, greedy(9, ignore_eos=True))
    assert token_ids(outputs) == [alone(prompt, 9) for prompt in prompts]


@pytest.mark.parametrize("state", STATES[2:])
def test_exit_in_any_state_waits_for_copies(folder, state):
    with late_llm(folder, max_num_batched_tokens=16) as llm:
        core = llm._core
        to_state(llm, state)
        llm.exit()
        core.assert_idle()
        llm._core = core  # for the check at the end


def assert_is_free(llm: LLM) -> None:
    """Every block is, though nobody steps."""
    assert llm.is_finished() and not len(llm._core.handoffs)
    llm._core.assert_idle()


def test_a_stream_closed_while_its_blocks_are_copied_gives_them_back(tmp_path, kv_handoff):
    save_speaker(tmp_path, PIECES)
    with late_llm(tmp_path, kv_handoff=kv_handoff) as llm:
        pieces = llm.stream([0], greedy())
        next(pieces)
        (job,) = llm._jobs.values()
        while job.request.state is not RequestState.COPYING:
            llm.step()
        pieces.close()
        assert_is_free(llm)


def test_a_stream_closed_beside_others_waits_for_no_copy(folder, kv_handoff):
    with late_llm(folder, kv_handoff=kv_handoff) as llm:
        jobs = [llm._job([5 + i] * 9, greedy(30), object(), is_live=True) for i in range(2)]
        for job in jobs:
            llm._start(job)
        while any(job.request.state is not RequestState.COPYING for job in jobs):
            llm.step()
        llm._drop_all(jobs[:1])
        assert llm.stats()["handoff"]["num_in_flight"] == 2
        llm._drop_all(jobs[1:])
        assert_is_free(llm)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_generate_that_fails_while_blocks_are_copied_gives_them_back(
    folder, kv_handoff, error, monkeypatch
):
    with late_llm(folder, kv_handoff=kv_handoff) as llm:
        step = llm._core.step

        def failing(on_token):
            states = [job.request.state for job in llm._jobs.values()]
            if RequestState.COPYING in states:
                raise error("no step")
            return step(on_token)

        monkeypatch.setattr(llm._core, "step", failing)
        with pytest.raises(error, match="no step"):
            llm.generate([[5] * 9, [6] * 7], greedy(30, ignore_eos=True))
        assert_is_free(llm)


@pytest.mark.parametrize("part", WAYS)
def test_a_copy_that_fails_while_it_is_waited_for_holds_nothing(folder, alone, part, monkeypatch):
    with late_llm(folder, kv_handoff=part) as llm:
        request_id = to_state(llm, RequestState.COPYING)
        llm.abort(request_id)
        (transfer,) = llm._core.handoffs._transfers
        monkeypatch.setattr(transfer.copies[0], "wait", fail(RuntimeError("device failed")))
        with pytest.raises(RuntimeError, match="device failed"):
            llm._core.drain()
        llm._core.assert_idle()
        others_are_right(llm, alone)
        assert run_all(llm)[request_id]["finish_reason"] == "abort"


def test_a_callback_that_fails_ends_its_own_request(folder, alone, kv_handoff, monkeypatch):
    with late_llm(folder, at_random(2), kv_handoff=kv_handoff) as llm:
        prompts = prompts_of(3, seed=4)
        ids = [llm.add_request(prompt, greedy(9, ignore_eos=True)) for prompt in prompts]
        detokenizer, last, num_failures = llm._jobs[ids[1]].detokenizer, {}, 0
        broken = on_call(3, detokenizer.push, fail(UnicodeError("no such byte")))
        monkeypatch.setattr(detokenizer, "push", broken)
        while not llm.is_finished():
            try:
                last |= ended(llm.step())
            except UnicodeError:
                num_failures += 1
        assert num_failures == 1 and last[ids[1]]["finish_reason"] == "error"
        for i in (0, 2):
            assert last[ids[i]]["token_ids"] == alone(prompts[i], 9)


# what fails


PARTS = ["prefill", "decode", "slab", "push"]
ERRORS = [RuntimeError, KeyboardInterrupt]  # made anew for each test: one keeps what it has seen


def break_part(llm: LLM, part: str, number: int, error: type[BaseException], patch) -> None:
    """Have the so-manieth launch of a worker, or start of a copy, raise."""
    if part in WAYS:
        link: LateLink = llm.links[WAYS.index(part)]
        patch.setattr(link, "on_send", on_call(number, link.on_send, fail(error("no copy"))))
    else:
        worker = getattr(llm._core, part)
        patch.setattr(worker, "launch", on_call(number, worker.launch, fail(error("no launch"))))


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_failure_loses_no_other_request(folder, alone, part, number, error, monkeypatch):
    kv_handoff = part if part in WAYS else "slab"
    options = {"kv_handoff": kv_handoff, "max_num_batched_tokens": 16}
    with late_llm(folder, at_random(number), **options) as llm:
        prompts = prompts_of(4, seed=5)
        ids = [llm.add_request(prompt, greedy(12, ignore_eos=True)) for prompt in prompts]
        with monkeypatch.context() as patch:
            break_part(llm, part, number, error, patch)
            with pytest.raises(error, match=r"no copy|no launch"):
                llm.generate(prompts_of(3, seed=6), greedy(20, ignore_eos=True))
        llm._core.leases.check()
        last = finish(llm)
        assert [last[i]["token_ids"] for i in ids] == [alone(p, 12) for p in prompts]


def test_a_copy_that_fails_before_a_push_leaves_the_push_in_order(folder, alone, monkeypatch):
    """Of a prompt that had waited for a row; one that is just launched gets the other row."""
    prompts = prompts_of(4, seed=9)
    with late_llm(folder, lambda: True, kv_handoff="push", max_num_seqs=2) as llm:
        params = [greedy(n, ignore_eos=True) for n in (4, 4, 9, 9)]
        ids = [llm.add_request(p, q) for p, q in zip(prompts[:3], params, strict=False)]
        last = {}
        while len(last) < 2:
            last |= ended(llm.step())
        assert request_of(llm, ids[2]).state is RequestState.PREFILLED
        ids.append(llm.add_request(prompts[3], params[3]))
        with monkeypatch.context() as patch:
            patch.setattr(llm.links[0], "on_send", fail(RuntimeError("no copy")))
            with pytest.raises(RuntimeError, match="no copy"):
                llm.step()
        assert [request_of(llm, i).state for i in ids[2:]] == [RequestState.WAITING] * 2
        last |= finish(llm)
        for i, prompt, p in zip(ids, prompts, params, strict=True):
            assert last[i]["token_ids"] == alone(prompt, p.max_tokens)


@pytest.mark.parametrize("part", PARTS)
def test_what_fails_for_ever_does_not_hang_generate(folder, alone, part, monkeypatch):
    with late_llm(folder, at_random(0), kv_handoff=part if part in WAYS else "slab") as llm:
        error = RuntimeError("always")
        with monkeypatch.context() as patch:
            if part in WAYS:
                patch.setattr(llm.links[WAYS.index(part)], "on_send", fail(error))
            else:
                patch.setattr(getattr(llm._core, part), "launch", lambda *args: fail(error)())
            for _ in range(3):
                with pytest.raises(RuntimeError, match="always"):
                    llm.generate(prompts_of(2), greedy(5, ignore_eos=True))
        assert_idle(llm)
        others_are_right(llm, alone)


@pytest.mark.parametrize("part", PARTS)
def test_a_device_that_fails_later_is_an_error_at_once(folder, alone, part, monkeypatch):
    """Not the launch but the question whether it is over raises; its requests are done again."""
    options = {"kv_handoff": part if part in WAYS else "slab"}
    with late_llm(folder, at_random(3), **options) as llm:
        prompts = prompts_of(3, seed=7)
        ids = [llm.add_request(prompt, greedy(9, ignore_eos=True)) for prompt in prompts]
        error, num_failures, last = fail(RuntimeError("unspecified launch failure")), 0, {}
        if part in WAYS:
            link = llm.links[WAYS.index(part)]
            monkeypatch.setattr(link, "may_end", on_call(1, link.may_end, error))
        else:
            queue = getattr(llm._core, f"_{part}s")
            monkeypatch.setattr(Launched, "is_done", property(fails_in(queue, error)))
        while not llm.is_finished():
            try:
                last |= ended(llm.step())
            except RuntimeError:
                num_failures += 1
        assert num_failures == 1
        assert [last[i]["token_ids"] for i in ids] == [alone(p, 9) for p in prompts]


def fails_in(queue, error: Callable[[], None]) -> Callable[[Launched], bool]:
    """The first launch in that queue to be asked fails."""
    asked: list[Launched] = []

    def is_done(launched: Launched) -> bool:
        if launched in queue and not asked:
            asked.append(launched)
            error()
        return True

    return is_done
