"""What fails for one request leaves the others, their text and their blocks alone."""

import time
from contextlib import suppress
from types import SimpleNamespace

import pytest

from engine import LLM, SamplingParams
from engine.batch import Launched
from engine.block_manager import BlockManager
from engine.detokenizer import Detokenizer
from engine.request import Request, RequestState
from engine.scheduler import Scheduler
from tests.checkpoints import save_random, save_speaker
from tests.test_detokenizer import ByteTokenizer
from tests.test_llm import PIECES, fail, greedy, run_all, small_llm

LONG, SHORT = greedy(60, ignore_eos=True), greedy(3, ignore_eos=True)
MANY = 300  # steps, more than any request here takes


@pytest.fixture(scope="module")
def speaker_folder(tmp_path_factory):
    return save_speaker(tmp_path_factory.mktemp("speaker"), PIECES)


@pytest.fixture(scope="module")
def ids_folder(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("ids"))


@pytest.fixture(params=[False, True], ids=["one device", "two devices"])
def two(request) -> bool:
    return request.param


@pytest.fixture
def speaker(speaker_folder, two):
    with small_llm(speaker_folder, enable_two_gpu_pd=two) as llm:
        yield llm


def failing(call, at: int = 1):
    """`call`, but for one time when it raises."""
    count = 0

    def wrapped(*args, **kwargs):
        nonlocal count
        count += 1
        if count == at:
            raise UnicodeError("no text")
        return call(*args, **kwargs)

    return wrapped


def run(llm: LLM, error: type[Exception]) -> dict[int, dict]:
    """Step to the end, errors notwithstanding; the last output of each request."""
    last = {}
    for _ in range(MANY):
        with suppress(error):
            last |= {out["request_id"]: out for out in llm.step() if out["finished"]}
        if llm.is_finished():
            return last
    raise AssertionError("requests that never end")


def test_an_abort_whose_text_fails_is_an_end_all_the_same(speaker):
    request_id = speaker.add_request([0], LONG)
    for _ in range(5):
        speaker.step()
    detokenizer = speaker._jobs[request_id].detokenizer
    detokenizer.finish = failing(detokenizer.finish)
    with pytest.raises(UnicodeError):
        speaker.abort(request_id)
    assert run(speaker, UnicodeError)[request_id]["finish_reason"] == "abort"


def test_a_tokenizer_that_fails_leaves_nothing_of_the_call(speaker, monkeypatch):
    tokenizer, step, is_broken = speaker.tokenizer, speaker._core.step, False

    class Broken:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def decode(self, ids, **options):
            if is_broken:
                raise IndexError("no such piece")
            return tokenizer.decode(ids, **options)

    def breaking(on_token):
        nonlocal is_broken
        is_broken = True
        return step(on_token)

    monkeypatch.setattr(speaker, "tokenizer", Broken())
    monkeypatch.setattr(speaker._core, "step", breaking)
    with pytest.raises(IndexError):
        speaker.generate([[0]] * 5, [SHORT] + [LONG] * 4)
    stats = speaker.stats()
    assert (stats["num_running"], stats["num_waiting"], speaker._jobs) == (0, 0, {})


def test_exit_makes_no_text(speaker_folder, two):
    with LLM(speaker_folder, device="cpu", num_kv_blocks=64, enable_two_gpu_pd=two) as llm:
        request_id = llm.add_request([0], LONG)
        llm.step()
        detokenizer = llm._jobs[request_id].detokenizer
        detokenizer.finish = failing(detokenizer.finish)
        llm.exit()
        assert llm._core is None


def test_a_call_that_fails_while_it_is_queued_leaves_nothing(speaker, monkeypatch):
    add = failing(speaker._core.scheduler.add, at=2)
    monkeypatch.setattr(speaker._core.scheduler, "add", add)
    with pytest.raises(UnicodeError):
        speaker.generate([[0]] * 3, LONG)
    assert speaker._jobs == {} and speaker.is_finished()


def test_an_end_beside_a_failure_has_all_of_its_text(speaker):
    whole = speaker.generate([[0]], SHORT)[0]["text"]
    held = greedy(3, ignore_eos=True, stop=[whole[-1] + "@@"])  # its end is held back
    first, second = speaker.add_request([0], held), speaker.add_request([0], SHORT)
    detokenizer = speaker._jobs[second].detokenizer
    detokenizer.push = failing(detokenizer.push, at=3)
    last = run(speaker, UnicodeError)
    assert last[first]["text"] == whole and last[first]["finish_reason"] == "length"
    assert last[second]["finish_reason"] == "error"


def test_a_launch_that_always_fails_stops_nobody_else(ids_folder, two):
    with small_llm(ids_folder, enable_two_gpu_pd=two) as llm:
        good = llm.add_request([1, 2, 3], LONG)
        for _ in range(5):
            llm.step()
        bad = llm.add_request([4, 5, 6], LONG)
        core = llm._core
        launch = core.prefill.launch

        def picky(chunks, *more):
            if any(chunk.request.request_id == bad for chunk in chunks):
                raise RuntimeError("not this one")
            return launch(chunks, *more)

        core.prefill.launch = picky
        for _ in range(MANY):
            with pytest.raises(RuntimeError, match="not this one"):
                llm.step()
        assert llm._jobs[good].request.state is RequestState.FINISHED
        core.prefill.launch = launch
        last = run(llm, RuntimeError)
        for request_id in (good, bad):
            assert len(last[request_id]["token_ids"]) == LONG.max_tokens


def leaky_pool(llm: LLM) -> BlockManager:
    """One block of the first pool is held by nobody that is known."""
    pool = llm._core.pools[0]
    assert pool.admit(77, [1, 2, 3]) == 0
    return pool


def test_a_leaked_block_is_named_once_and_costs_nobody_a_token(ids_folder, two, caplog):
    with small_llm(ids_folder, enable_two_gpu_pd=two) as llm:
        wanted = llm.generate([[4, 5, 6]], SHORT)[0]["token_ids"]
        pool = leaky_pool(llm)
        for _ in range(3):
            assert llm.generate([[4, 5, 6]], SHORT)[0]["token_ids"] == wanted
        request_id = llm.add_request([4, 5, 6], SHORT)
        assert run(llm, AssertionError)[request_id]["token_ids"] == wanted
        held = "KV blocks are held though no request is left: 1 "
        assert [held in record.getMessage() for record in caplog.records] == [True]
        assert pool.grow(77, 20)
        llm.generate([[4, 5, 6]], SHORT)
        assert len(caplog.records) == 2, "one more has leaked"
        with pytest.raises(AssertionError):
            llm._core.assert_idle()
        pool.release(77)


def test_exit_goes_through_whatever_has_leaked(ids_folder, two):
    llm = LLM(ids_folder, device="cpu", num_kv_blocks=64, enable_two_gpu_pd=two)
    leaky_pool(llm)
    llm.exit()
    llm.exit()
    assert llm._core is None


def test_exit_that_fails_is_an_exit_all_the_same(ids_folder, two, monkeypatch):
    llm = LLM(ids_folder, device="cpu", num_kv_blocks=64, enable_two_gpu_pd=two)
    llm.add_request([1, 2, 3], LONG)
    llm.step()
    monkeypatch.setattr(llm._core, "_drop_in_flight", failing(None))
    with pytest.raises(UnicodeError):
        llm.exit()
    assert llm._core is None
    llm.exit()


def test_what_fails_while_it_is_waited_for_is_waited_for_once(ids_folder, two):
    with small_llm(ids_folder, enable_two_gpu_pd=two) as llm:
        broken = SimpleNamespace(wait=fail(RuntimeError("device failed")))
        if two:
            llm._core._decodes.append(broken)
        else:
            llm._core._launched.append([broken])
        with pytest.raises(RuntimeError, match="device failed"):
            llm._core.drain()
        llm.generate([[4, 5, 6]], SHORT)


def steps_until_admitted(requests: list[Request], num_blocks: int) -> list[int]:
    """In which step each request's prompt is launched, on a device that answers at once."""
    manager = BlockManager(num_blocks, 16)
    limits = {"max_num_seqs": 256, "max_num_batched_tokens": 8192}
    scheduler = Scheduler(manager, max_model_len=num_blocks * 16, **limits)
    for request in requests:
        scheduler.add(request)
    found: dict[int, int] = {}
    step = 0
    while not scheduler.is_idle:
        step += 1
        chunks = scheduler.schedule_prefill()
        scheduler.launched(chunks)
        for chunk in chunks:
            found.setdefault(chunk.request.request_id, step)
        drawn = [(chunk.request, chunk.epoch) for chunk in chunks if chunk.is_last]
        drawn += [(request, request.epoch) for request in scheduler.schedule_decode()]
        for request, epoch in drawn:
            is_taken = scheduler.record_token(request, 7, epoch)
            if is_taken and len(request.token_ids) >= request.max_total_tokens:
                scheduler.finish(request, "length")
    return [found[request.request_id] for request in requests]


def request_of(i: int, token_ids: list[int], max_tokens: int) -> Request:
    return Request(i, token_ids, SamplingParams(max_tokens=max_tokens))


def test_a_head_that_was_refused_is_looked_at_again_once_fewer_run():
    """One ends and frees a block, another grows by one: as many are free, but one less is kept."""
    sizes = [(16, 60), (15, 100), (14, 2), (160, 10)]
    requests = [
        request_of(i, [1000 * i + j for j in range(num_tokens)], max_tokens)
        for i, (num_tokens, max_tokens) in enumerate(sizes)
    ]
    assert steps_until_admitted(requests, 15) == [1, 1, 1, 2]


def test_a_head_that_was_refused_is_looked_at_again_once_its_prefix_can_be_shared():
    document = list(range(90 * 16))
    requests = [request_of(i, [*document, *[5000 + i] * 8], 100) for i in range(4)]
    assert steps_until_admitted(requests, 110) == [1, 2, 2, 2]


def test_a_text_prompt_ends_with_a_whole_character_whatever_it_is():
    half = "\u00fc".encode()
    tokenizer = ByteTokenizer([b"a", "\ufffd".encode(), b"x", half[:1], half[1:]])
    of_text = Detokenizer(tokenizer, (), [0, 1], is_text=True)
    assert of_text.finish() == "" and of_text.push(2) == "x"
    of_tokens = Detokenizer(tokenizer, (), [0, 3])
    assert of_tokens.finish() == ""  # nothing was generated
    assert of_tokens.push(4) == "\u00fc"


def test_a_top_p_that_fp32_has_not_keeps_the_likeliest(ids_folder):
    with small_llm(ids_folder) as llm:
        (wanted,) = llm.generate([[1, 2]], greedy(4, ignore_eos=True))
        for seed in range(3):
            params = SamplingParams(top_p=1e-46, seed=seed, max_tokens=4, ignore_eos=True)
            assert llm.generate([[1, 2]], params)[0]["token_ids"] == wanted["token_ids"]


@pytest.mark.parametrize("at", [1, 2, 7])
def test_tokens_that_never_come_are_drawn_again(ids_folder, two, monkeypatch, at):
    """The launch is over and out of the queue when waiting for its tokens fails."""
    prompts, params = [[1, 2, 3], [4, 5]], greedy(12, ignore_eos=True)
    with small_llm(ids_folder, enable_two_gpu_pd=two) as llm:
        wanted = [out["token_ids"] for out in llm.generate(prompts, params)]
        ids = [llm.add_request(prompt, params) for prompt in prompts]
        with monkeypatch.context() as patch:
            patch.setattr(Launched, "wait", failing(Launched.wait, at))
            last = run(llm, UnicodeError)
        assert [last[i]["token_ids"] for i in ids] == wanted


def test_a_stream_that_is_closed_in_the_middle_of_a_step_leaves_the_others(speaker, monkeypatch):
    """As garbage collection closes one that was dropped: its request ends behind the step."""
    llm, params = speaker, greedy(9, ignore_eos=True)
    wanted = llm.generate([0], params)[0]["token_ids"]
    dropped = llm.stream([0], LONG)
    next(dropped)
    (job,) = llm._jobs.values()
    on_token, was_there = llm._on_token, []

    def closing(request, token_id):
        dropped.close()
        was_there.append(job.request.request_id in llm._jobs)
        return on_token(request, token_id)

    monkeypatch.setattr(llm, "_on_token", closing)
    assert llm.generate([0], params)[0]["token_ids"] == wanted
    assert was_there[0] and not was_there[-1]
    assert not llm._jobs and llm.is_finished()


@pytest.mark.parametrize("where", ["finish", "_end_texts", "_drop"])
def test_a_stream_that_is_closed_in_the_middle_of_anything_is_dropped_behind_it(
    speaker, monkeypatch, where
):
    """Of an abort, of the end of a step, of another call's end: blocks are half given back."""
    llm = speaker
    aborted = llm.add_request([0], LONG)
    dropped, other = llm.stream([0], LONG), llm.stream([0], LONG)
    next(dropped)
    (dropped_id,) = set(llm._jobs) - {aborted}
    next(other)
    home = llm._core if where == "finish" else llm
    wrapped, was_there = getattr(home, where), []

    def closing(*args):
        dropped.close()
        was_there.append(dropped_id in llm._jobs)
        return wrapped(*args)

    monkeypatch.setattr(home, where, closing)
    {"finish": lambda: llm.abort(aborted), "_end_texts": llm.step, "_drop": other.close}[where]()
    assert was_there[0] and dropped_id not in llm._jobs
    other.close()
    llm.abort(aborted)
    run_all(llm)
    assert not llm._jobs


def test_a_request_that_cannot_be_dropped_does_not_keep_the_core_open(ids_folder, monkeypatch):
    llm = LLM(ids_folder, device="cpu", num_kv_blocks=64)
    llm.add_request([1, 2, 3], LONG)
    closed, close = [], llm._core.close
    monkeypatch.setattr(llm._core, "close", lambda: closed.append(close()))
    monkeypatch.setattr(llm, "_drop", failing(llm._drop))
    with pytest.raises(UnicodeError):
        llm.exit()
    assert closed == [None]
    llm.exit()


def test_a_stream_arrives_when_it_is_first_read(ids_folder):
    with small_llm(ids_folder) as llm:
        stream = llm.stream([1, 2, 3], SHORT)
        time.sleep(0.3)
        list(stream)
        assert llm.stats()["ttft_ms"]["p50"] < 300
