"""LLM from outside: what it returns, in which order, and that failures lose nothing."""

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine import LLM, SamplingParams
from tests.checkpoints import (
    BYTE_VOCAB,
    NUM_BYTES,
    cut,
    save_byte_model,
    save_random,
    save_speaker,
    transformers_model,
)

SPEECH = "> Grüße, 世界! 👩\u200d🚀 flies; naïve 語 ends. Bye."
PIECES = [b"> ", *cut(SPEECH[2:])]  # the first is the prompt of most tests here
ANSWER = SPEECH[2:]
END_ID = len(PIECES)
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


def greedy(max_tokens: int = 200, **fields) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **fields)


@contextmanager
def small_llm(folder: Path, **options):
    """An LLM on the CPU that must have every block back at the end."""
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_kv_blocks": 64}
    with LLM(folder, device="cpu", **sizes | options) as llm:
        yield llm
        assert_idle(llm)


def assert_idle(llm: LLM) -> None:
    llm._core.drain()
    llm._core.assert_idle()
    stats = llm.stats()
    assert (stats["num_waiting"], stats["num_running"]) == (0, 0)
    assert stats["num_free_kv_blocks"] == stats["num_kv_blocks"]
    assert llm._core.decode.rows.num_free == len(llm._core.decode.buffers.logits)
    assert not llm._jobs and not llm._touched, "outputs that nobody will fetch are kept"


def run_all(llm: LLM) -> dict[int, dict]:
    """Step until every request of add_request has ended: last outputs by request_id."""
    last = {}
    for _ in range(10_000):
        if llm.is_finished():
            return last
        last |= {output["request_id"]: output for output in llm.step() if output["finished"]}
    raise AssertionError("the requests do not end")


def token_ids(outputs: list[dict]) -> list[list[int]]:
    return [output["token_ids"] for output in outputs]


@pytest.fixture(scope="module")
def speaker_folder(tmp_path_factory):
    return save_speaker(tmp_path_factory.mktemp("speaker"), PIECES)


@pytest.fixture(scope="module")
def bytes_folder(tmp_path_factory):
    return save_byte_model(tmp_path_factory.mktemp("bytes"), "qwen3")


@pytest.fixture(scope="module")
def ids_folder(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("ids"))


@pytest.fixture
def speaker(speaker_folder):
    with small_llm(speaker_folder) as llm:
        yield llm


@pytest.fixture
def rambler(bytes_folder):
    with small_llm(bytes_folder) as llm:
        yield llm


@pytest.fixture
def ctrl_c():
    """Python's own handler for SIGINT, whatever the test runner has put there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# what comes out


def test_generate_takes_text_token_ids_and_lists_of_both(rambler):
    text, ids = "hello", list(b"hello")
    one_text, one_ids = rambler.generate(text, GREEDY), rambler.generate(ids, GREEDY)
    several = rambler.generate([text, ids, tuple(ids), "other"], GREEDY)
    assert len(one_text) == len(one_ids) == 1 and len(several) == 4
    wanted = one_text[0]["token_ids"]
    assert len(wanted) == 8
    assert token_ids(one_ids) == [wanted]
    assert token_ids(several)[:3] == [wanted] * 3 != [several[3]["token_ids"]] * 3
    assert rambler.generate([]) == []


def test_each_prompt_has_its_own_params_and_order_is_kept(rambler):
    prompts = [f"prompt {i}" for i in range(20)]  # more than run at a time, of many lengths
    params = [greedy(1 + 7 * i % 20, ignore_eos=True) for i in range(20)]
    outputs = rambler.generate(prompts, params)
    assert [len(output["token_ids"]) for output in outputs] == [p.max_tokens for p in params]
    for prompt, p, output in zip(prompts, params, outputs, strict=True):
        assert rambler.generate(prompt, p)[0]["token_ids"] == output["token_ids"]


def test_fields_of_an_output(speaker):
    output = speaker.generate([[0]], greedy())[0]
    assert output["text"] == ANSWER
    assert output["token_ids"] == [*range(1, END_ID), END_ID]
    assert (output["finish_reason"], output["finished"], output["logprobs"]) == ("stop", True, None)
    metrics = output["metrics"]
    assert metrics["num_prompt_tokens"] == 1 and metrics["num_generated_tokens"] == END_ID
    assert metrics["num_cached_tokens"] == metrics["num_preemptions"] == 0
    assert 0 <= metrics["queue_ms"] <= metrics["ttft_ms"] <= metrics["latency_ms"]
    assert metrics["tpot_ms"] > 0


def test_params_have_defaults(rambler):
    outputs = rambler.generate(["ab", "c"])
    assert [output["metrics"]["num_prompt_tokens"] for output in outputs] == [2, 1]
    for output in outputs:
        assert 1 <= len(output["token_ids"]) <= SamplingParams().max_tokens


def test_a_folder_without_tokenizer_serves_token_ids_with_empty_text(ids_folder):
    with small_llm(ids_folder) as llm:
        outputs = llm.generate([[1, 2, 3], [4]], GREEDY)
        assert [len(output["token_ids"]) for output in outputs] == [8, 8]
        assert [output["text"] for output in outputs] == ["", ""]
        assert list(llm.stream([1, 2, 3], GREEDY)) == []


def test_stream_gives_the_text_of_generate_in_pieces(speaker, rambler):
    pieces = list(speaker.stream([0], greedy()))
    assert "".join(pieces) == ANSWER and len(pieces) > 5
    assert all(pieces) and not any("\ufffd" in piece for piece in pieces)
    params = greedy(60, ignore_eos=True)  # of random bytes, many are no characters
    assert "".join(rambler.stream("abc", params)) == rambler.generate("abc", params)[0]["text"]


def test_text_of_random_bytes_is_what_decoding_at_once_gives(rambler):
    for seed in range(5):
        output = rambler.generate("x", SamplingParams(seed=seed, max_tokens=50))[0]
        wanted = bytes(t for t in output["token_ids"] if t < NUM_BYTES).decode(errors="replace")
        assert output["text"] == wanted


def test_smollm2_streams_whole_characters():
    """Its emoji and many of its kanji are two or three tokens each."""
    prompts = ["😀😃😄😁😆😅😂", "日本語の文章です。日本語の文章です。日本語の"]
    num_pieces = num_tokens = 0
    with small_llm("smollm2") as llm:
        for prompt, output in zip(prompts, llm.generate(prompts, greedy(16)), strict=True):
            *pieces, last = llm.stream(prompt, greedy(16))
            assert "".join(pieces) + last == output["text"]
            assert not any("\ufffd" in piece for piece in pieces)  # the end may be half of one
            whole = llm.tokenizer.decode(output["token_ids"], skip_special_tokens=True)
            assert output["text"] == whole
            num_pieces += len(pieces)
            num_tokens += len(output["token_ids"])
    assert num_pieces < 0.7 * num_tokens, "no character was more than one token"


def test_two_streams_and_a_generate_take_turns(speaker):
    first, second = speaker.stream([0], greedy()), speaker.stream([3], greedy())
    told = [next(first), next(second)]
    assert speaker.generate([[0]], greedy())[0]["text"] == ANSWER
    told[0] += "".join(first)
    told[1] += "".join(second)
    assert told[0] == ANSWER
    assert ANSWER.endswith(told[1]) and len(told[1]) > 10


def test_step_returns_news_then_everything(speaker):
    ids = [speaker.add_request([0], greedy()), speaker.add_request([5], greedy(4))]
    assert not speaker.is_finished() and ids[0] != ids[1]
    news, last = {i: [] for i in ids}, {}
    while not speaker.is_finished():
        for output in speaker.step():
            assert output["request_id"] not in last, "news of a request that has ended"
            news[output["request_id"]].append(output)
            if output["finished"]:
                last[output["request_id"]] = output
    for request_id in ids:
        parts = news[request_id]
        assert [t for p in parts for t in p["new_token_ids"]] == last[request_id]["token_ids"]
        assert "".join(p["new_text"] for p in parts) == last[request_id]["text"]
        assert len(parts) >= 3
    assert last[ids[0]]["text"] == ANSWER
    assert last[ids[1]]["token_ids"] == [6, 7, 8, 9]
    assert (last[ids[0]]["finish_reason"], last[ids[1]]["finish_reason"]) == ("stop", "length")
    assert speaker.step() == []


def test_outputs_of_add_request_wait_while_others_step(speaker):
    request_id = speaker.add_request([0], greedy())
    assert speaker.generate([[0]], greedy())[0]["text"] == ANSWER
    assert not speaker.is_finished()
    output = run_all(speaker)[request_id]
    assert (output["text"], output["new_text"]) == (ANSWER, ANSWER)


# when it ends


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("stop", ["世", "; n", "flies", ["zzz", "ends", "Bye"], "."])
def test_stop_strings_may_span_tokens(stop, width, tmp_path):
    pieces = [b"> ", *cut(SPEECH[2:], (width, 2, 3))]
    save_speaker(tmp_path, pieces)
    found = min(ANSWER.find(s) for s in ([stop] if isinstance(stop, str) else stop) if s in ANSWER)
    with small_llm(tmp_path) as llm:
        params = greedy(stop=stop)
        output = llm.generate([[0]], params)[0]
        assert (output["text"], output["finish_reason"]) == (ANSWER[:found], "stop")
        assert len(output["token_ids"]) < len(pieces) - 1
        assert "".join(llm.stream([0], params)) == ANSWER[:found]
        request_id = llm.add_request([0], params)
        assert run_all(llm)[request_id]["text"] == ANSWER[:found]


def test_a_stop_string_that_never_comes_changes_nothing(speaker):
    params = greedy(stop=["Bye!", "世x", ANSWER + "?"])
    outputs = speaker.generate([[0], [5], [0]], [params, greedy(), params])
    assert [outputs[0]["text"], outputs[2]["text"]] == [ANSWER] * 2
    assert outputs[1]["finish_reason"] == "stop"
    assert "".join(speaker.stream([0], params)) == ANSWER


def test_stop_token_ids_end_a_text(speaker):
    outputs = speaker.generate(
        [[0]] * 3, [greedy(stop_token_ids=ids) for ids in ([7], [9, 4], [0, END_ID + 5])]
    )
    assert [output["token_ids"][-1] for output in outputs] == [7, 4, END_ID]
    assert [output["finish_reason"] for output in outputs] == ["stop"] * 3


def test_the_end_token_ends_a_text_unless_ignored(speaker):
    ended, ignored = speaker.generate([[0], [0]], [greedy(), greedy(60, ignore_eos=True)])
    assert (ended["token_ids"][-1], ended["finish_reason"]) == (END_ID, "stop")
    assert len(ignored["token_ids"]) == 60 and ignored["finish_reason"] == "length"
    # END itself is no text; then it begins anew
    assert ignored["text"].startswith(SPEECH[2:] + SPEECH[:2])


def test_the_end_token_as_the_last_one_allowed(speaker):
    output = speaker.generate([[0]], greedy(END_ID))[0]
    assert (len(output["token_ids"]), output["finish_reason"]) == (END_ID, "stop")


@pytest.mark.parametrize("max_tokens", [1, 2])
def test_very_short_outputs(speaker, max_tokens):
    for output in speaker.generate([[0]] * 9, greedy(max_tokens)):
        assert output["token_ids"] == [1, 2][:max_tokens]
        assert output["finish_reason"] == "length"
        assert (output["metrics"]["tpot_ms"] is None) == (max_tokens == 1)


def test_max_model_len_ends_a_text(speaker_folder):
    with small_llm(speaker_folder, max_model_len=12) as llm:
        short, long = llm.generate([[0], [0] * 11], greedy(99, ignore_eos=True))
        assert (len(short["token_ids"]), len(long["token_ids"])) == (11, 1)
        assert short["finish_reason"] == long["finish_reason"] == "length"


def test_a_text_ends_where_the_cache_does(speaker_folder):
    with small_llm(speaker_folder, num_kv_blocks=3, block_size=4) as llm:
        outputs = llm.generate([[0], [1] * 11, [2] * 5], greedy(99, ignore_eos=True))
        assert [len(output["token_ids"]) for output in outputs] == [11, 1, 7]


# what is drawn


def test_the_same_seed_draws_the_same_tokens_whatever_the_batch(rambler):
    seeded = partial(SamplingParams, max_tokens=12, ignore_eos=True, top_p=0.95)
    alone = [rambler.generate("hi", seeded(seed=seed))[0]["token_ids"] for seed in range(4)]
    assert len({tuple(ids) for ids in alone}) == 4
    others = [seeded(seed=9, temperature=2.0), greedy(20), seeded(), seeded(top_k=3)]
    params = [p for seed in range(4) for p in (seeded(seed=seed), others[seed])]
    prompts = ["hi", "another", "hi", "x", "hi", "long " * 20, "hi", "hi"]
    assert token_ids(rambler.generate(prompts, params))[::2] == alone
    stream_ids = [rambler.add_request("hi", seeded(seed=seed)) for seed in (2, 3)]
    last = run_all(rambler)
    assert [last[i]["token_ids"] for i in stream_ids] == alone[2:]


def test_without_a_seed_each_request_gets_one_and_the_engine_repeats(bytes_folder):
    params, found = SamplingParams(max_tokens=12, ignore_eos=True), []
    for seed in (0, 0, 1):
        with small_llm(bytes_folder, seed=seed) as llm:
            outputs = llm.generate(["hi"] * 3, params)
            found.append([tuple(output["token_ids"]) for output in outputs])
    assert found[0] == found[1] != found[2]
    assert len(set(found[0])) == 3


def test_a_seed_is_the_same_through_preemption(bytes_folder):
    params = [SamplingParams(seed=i, max_tokens=20, ignore_eos=True) for i in range(6)]
    with small_llm(bytes_folder) as llm:
        wanted = token_ids(llm.generate(["abcdef"] * 6, params))
    tiny = {"num_kv_blocks": 12, "block_size": 4, "enable_prefix_caching": False}
    with small_llm(bytes_folder, **tiny) as llm:
        assert token_ids(llm.generate(["abcdef"] * 6, params)) == wanted
        assert llm.stats()["num_preemptions"] > 0


def test_temperature_near_zero_is_greedy(rambler):
    wanted = token_ids(rambler.generate("abc", GREEDY))
    for temperature in (0, 1e-9, 1e-5):
        params = SamplingParams(temperature=temperature, max_tokens=8, ignore_eos=True, seed=3)
        assert token_ids(rambler.generate("abc", params)) == wanted
    one = SamplingParams(top_k=1, temperature=5.0, max_tokens=8, ignore_eos=True)
    assert token_ids(rambler.generate("abc", one)) == wanted


def test_logprobs_are_those_of_transformers(bytes_folder):
    prompts = ["some text", "b", "a longer text " * 4]
    params = [
        greedy(6, ignore_eos=True, logprobs=5),
        SamplingParams(max_tokens=6, ignore_eos=True, temperature=3.0, seed=5, logprobs=0),
        SamplingParams(max_tokens=6, ignore_eos=True, top_k=9, seed=5, logprobs=20),
    ]
    theirs = transformers_model(bytes_folder)
    with small_llm(bytes_folder, max_num_batched_tokens=9) as llm:
        outputs = llm.generate([*prompts, "none"], [*params, GREEDY])
    assert outputs[3]["logprobs"] is None
    for prompt, p, output in zip(prompts, params, outputs[:3], strict=True):
        text = torch.tensor([[*prompt.encode(), *output["token_ids"]]])
        with torch.inference_mode():
            wanted = theirs(text).logits[0, -7:-1].log_softmax(-1)
        assert len(output["logprobs"]) == 6
        for row, token_id, found in zip(
            wanted, output["token_ids"], output["logprobs"], strict=True
        ):
            likeliest = row.topk(p.logprobs).indices.tolist()
            assert found.keys() == {token_id, *likeliest}
            assert next(iter(found)) == token_id
            for i, logprob in found.items():
                assert logprob == pytest.approx(row[i].item(), abs=1e-4)


def test_logprobs_go_on_through_preemption(bytes_folder):
    params = greedy(20, ignore_eos=True, logprobs=2)
    found = []
    for num_kv_blocks in (64, 8):
        options = {"num_kv_blocks": num_kv_blocks, "block_size": 4}
        with small_llm(bytes_folder, **options) as llm:
            outputs = llm.generate(["abcd", "efgh"], params)
            found.append([list(map(list, output["logprobs"])) for output in outputs])
            assert (llm.stats()["num_preemptions"] > 0) == (num_kv_blocks == 8)
    assert found[0] == found[1]


# cache, queue, preemption


def test_shared_prefixes_are_computed_once(rambler):
    long = "x" * 50
    first = rambler.generate(long, GREEDY)[0]
    assert first["metrics"]["num_cached_tokens"] == 0
    again, longer, other = rambler.generate([long, long + "yz", "y" + long], GREEDY)
    assert again["metrics"]["num_cached_tokens"] == 48
    assert longer["metrics"]["num_cached_tokens"] == 48
    assert other["metrics"]["num_cached_tokens"] == 0
    assert again["token_ids"] == first["token_ids"]
    # generated tokens are found too, but for the last one, whose k and v were never needed
    follow = [*long.encode(), *first["token_ids"], *range(60, 80)]
    assert rambler.generate(follow, GREEDY)[0]["metrics"]["num_cached_tokens"] == 48
    # the last token of a prompt is computed always
    assert rambler.generate("x" * 48, GREEDY)[0]["metrics"]["num_cached_tokens"] == 32
    assert rambler.stats()["num_cached_tokens"] == 48 * 3 + 32


def test_prefix_caching_can_be_switched_off(bytes_folder):
    with small_llm(bytes_folder, enable_prefix_caching=False) as llm:
        for _ in range(2):
            output = llm.generate("x" * 50, GREEDY)[0]
            assert output["metrics"]["num_cached_tokens"] == 0


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize("max_num_batched_tokens", [3, 64])
def test_a_tiny_pool_gives_the_tokens_of_a_big_one(
    bytes_folder, max_num_batched_tokens, enable_prefix_caching
):
    prompts = ["the same beginning " + "abcdefgh"[:i] for i in range(8)]
    params = greedy(24, ignore_eos=True)
    with small_llm(bytes_folder) as llm:
        wanted = token_ids(llm.generate(prompts, params))
    options = {
        "num_kv_blocks": 14,
        "block_size": 4,
        "max_num_batched_tokens": max_num_batched_tokens,
        "enable_prefix_caching": enable_prefix_caching,
    }
    with small_llm(bytes_folder, **options) as llm:
        outputs = llm.generate(prompts, params)
        assert token_ids(outputs) == wanted
        num_preemptions = sum(output["metrics"]["num_preemptions"] for output in outputs)
        assert llm.stats()["num_preemptions"] == num_preemptions > 0


def test_requests_beyond_capacity_wait_their_turn(speaker_folder):
    with small_llm(speaker_folder, max_num_seqs=2) as llm:
        ids = [llm.add_request([0], greedy(10)) for _ in range(7)]
        ended = []
        while not llm.is_finished():
            ended += [output["request_id"] for output in llm.step() if output["finished"]]
            assert llm.stats()["num_running"] <= 2
        assert ended == ids


# ends that come from outside


def test_exit_twice_is_harmless_and_calls_after_it_say_so(bytes_folder):
    llm = LLM(bytes_folder, device="cpu", num_kv_blocks=8)
    llm.add_request("left behind", GREEDY)
    llm.step()
    core = llm._core
    llm.exit()
    llm.exit()
    core.block_manager.assert_idle()
    calls: list[Callable[[], object]] = [
        lambda: llm.generate("a", GREEDY),
        lambda: llm.stream("a", GREEDY),
        lambda: llm.add_request("a", GREEDY),
        lambda: llm.abort(0),
        llm.step,
        llm.is_finished,
        llm.stats,
        lambda: llm.__enter__().generate("a"),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"closed by exit\(\)"):
            call()


def test_with_closes_on_an_exception_too(bytes_folder):
    with pytest.raises(KeyError), LLM(bytes_folder, device="cpu", num_kv_blocks=8) as llm:
        llm.add_request("left behind", GREEDY)
        raise KeyError
    with pytest.raises(RuntimeError, match="closed"):
        llm.step()


def num_pools() -> int:
    """KV pools that something still refers to."""
    gc.collect()
    return sum(type(t) is torch.Tensor and t.dim() == 6 for t in gc.get_objects())


def test_exit_frees_the_weights_and_the_pool(bytes_folder):
    llm = LLM(bytes_folder, device="cpu", num_kv_blocks=8)
    llm.generate("a", GREEDY)
    assert num_pools() == 1
    llm.exit()
    assert num_pools() == 0


def test_a_stream_that_is_left_by_exit_says_so_and_can_be_closed(bytes_folder):
    llm = LLM(bytes_folder, device="cpu", num_kv_blocks=16)
    going_on, closed = (llm.stream("abc", greedy(50, ignore_eos=True)) for _ in range(2))
    next(going_on), next(closed)
    llm.exit()
    with pytest.raises(RuntimeError, match="closed by exit"):
        next(going_on)
    closed.close()


def test_abort_ends_a_request_wherever_it_is(rambler):
    rambler._core.scheduler.max_num_seqs = 2
    params = greedy(30, ignore_eos=True)
    ids = [rambler.add_request("x" * 100, params) for _ in range(4)]
    for _ in range(4):  # prefill takes 64 tokens a step
        rambler.step()
    assert rambler.abort(ids[3]) and rambler.abort(ids[0])  # waiting, decoding
    assert not rambler.abort(ids[0]) and not rambler.abort(12345)
    last = run_all(rambler)
    assert [last[i]["finish_reason"] for i in ids] == ["abort", "length", "length", "abort"]
    assert (last[ids[3]]["token_ids"], last[ids[3]]["text"]) == ([], "")
    assert last[ids[1]]["token_ids"][: len(last[ids[0]]["token_ids"])] == last[ids[0]]["token_ids"]
    assert last[ids[1]]["token_ids"] == last[ids[2]]["token_ids"]
    assert not rambler.abort(ids[1]), "it has ended"


def test_abort_before_the_first_step(speaker):
    request_id = speaker.add_request([0], greedy())
    assert speaker.abort(request_id)
    assert not speaker.is_finished(), "its last output is still to be fetched"
    assert run_all(speaker)[request_id]["finish_reason"] == "abort"


def test_closing_a_stream_half_way_aborts_it(speaker):
    pieces = speaker.stream([0], greedy())
    next(pieces)
    assert speaker.stats()["num_running"] == 1
    pieces.close()
    assert speaker.stats()["num_running"] == 0
    for _ in speaker.stream([0], greedy()):
        break
    gc.collect()
    assert_idle(speaker)


def test_a_stream_that_is_dropped_before_its_first_piece_leaves_nothing(speaker):
    pieces = speaker.stream([0], greedy())
    del pieces
    gc.collect()
    assert_idle(speaker)


def test_two_models_in_one_process(speaker_folder, bytes_folder):
    with small_llm(bytes_folder) as llm:
        wanted = llm.generate("abc", GREEDY)[0]["token_ids"]
    with small_llm(speaker_folder) as one, small_llm(bytes_folder) as other:
        pieces = one.stream([0], greedy())
        told = next(pieces)
        assert other.generate("abc", GREEDY)[0]["token_ids"] == wanted
        request_id = other.add_request("abc", GREEDY)
        for piece in pieces:
            told += piece
            other.step()
        assert told == ANSWER
        other.abort(request_id)
        run_all(other)
    with small_llm(bytes_folder) as other:
        with small_llm(speaker_folder):
            pass  # its exit is none of the other's business
        assert other.generate("abc", GREEDY)[0]["token_ids"] == wanted


# Ctrl-C and failures in the middle


def on_call(number: int, function: Callable, act: Callable[[], None]) -> Callable:
    """The function, with act() before its so-manieth call."""
    calls = 0

    def replaced(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return function(*args, **kwargs)

    return replaced


def fail(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


WORKERS = ["prefill", "decode"]


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_ctrl_c_in_generate_leaves_the_engine_usable(
    bytes_folder, worker, number, monkeypatch, ctrl_c
):
    prompts, params = ["abc" * 9, "de", "f" * 40], greedy(20, ignore_eos=True)
    with small_llm(bytes_folder, max_num_batched_tokens=16) as llm:
        wanted = token_ids(llm.generate(prompts, params))
        llm._core.block_manager.assert_idle()
    with small_llm(bytes_folder, max_num_batched_tokens=16) as llm:
        target = getattr(llm._core, worker)
        press = partial(signal.raise_signal, signal.SIGINT)
        with monkeypatch.context() as patch:
            patch.setattr(target, "launch", on_call(number, target.launch, press))
            with pytest.raises(KeyboardInterrupt):
                llm.generate(prompts, params)
        assert llm._core.block_manager.is_idle
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert token_ids(llm.generate(prompts, params)) == wanted


def test_ctrl_c_at_any_time(rambler, ctrl_c):
    """A signal from another thread, at whatever line it finds the engine."""
    params, rng = greedy(400, ignore_eos=True), torch.Generator().manual_seed(0)
    for _ in range(5):
        delay = 0.15 * torch.rand((), generator=rng).item()
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            rambler.generate(["abc", "de"], params)
            time.sleep(5)  # a fast machine may be through before the signal
        timer.join()
        rambler._core.assert_idle()
    assert len(rambler.generate("abc", GREEDY)[0]["token_ids"]) == 8


def test_ctrl_c_in_step_loses_no_output(speaker, monkeypatch, ctrl_c):
    request_id = speaker.add_request([0], greedy())
    decode = speaker._core.decode
    press = partial(signal.raise_signal, signal.SIGINT)
    monkeypatch.setattr(decode, "launch", on_call(3, decode.launch, press))
    told, num_interrupts = "", 0
    while not speaker.is_finished():
        try:
            for output in speaker.step():
                told += output["new_text"]
        except KeyboardInterrupt:
            num_interrupts += 1
    assert (told, num_interrupts) == (ANSWER, 1)
    assert not speaker.abort(request_id)


def test_ctrl_c_in_stream_ends_that_stream_alone(speaker, monkeypatch, ctrl_c):
    request_id = speaker.add_request([0], greedy())
    pieces = speaker.stream([0], greedy())
    next(pieces)
    decode = speaker._core.decode
    press = partial(signal.raise_signal, signal.SIGINT)
    monkeypatch.setattr(decode, "launch", on_call(2, decode.launch, press))
    with pytest.raises(KeyboardInterrupt):
        list(pieces)
    assert run_all(speaker)[request_id]["text"] == ANSWER


@pytest.mark.parametrize("error", [RuntimeError("launch failed"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_failed_launch_loses_no_other_request(bytes_folder, worker, number, error, monkeypatch):
    params = greedy(15, ignore_eos=True)
    prompts = ["abc" * 9, "de", "f" * 40]
    options = {"max_num_batched_tokens": 16}
    with small_llm(bytes_folder, **options) as llm:
        wanted = token_ids(llm.generate(prompts, params))
    with small_llm(bytes_folder, **options) as llm:
        ids = [llm.add_request(prompt, params) for prompt in prompts]
        target = getattr(llm._core, worker)
        with monkeypatch.context() as patch:
            patch.setattr(target, "launch", on_call(number, target.launch, fail(error)))
            with pytest.raises(type(error)):
                llm.generate(["g" * 30, "h"], greedy(20, ignore_eos=True))
        llm._core.block_manager.check()
        last = run_all(llm)
        assert [last[i]["token_ids"] for i in ids] == wanted
        assert [last[i]["finish_reason"] for i in ids] == ["length"] * 3


@pytest.mark.parametrize("worker", WORKERS)
def test_a_launch_that_fails_half_way_is_done_again(bytes_folder, worker, monkeypatch):
    """The worker has sampled, and written k and v, when the failure comes."""
    params = greedy(15, ignore_eos=True)
    with small_llm(bytes_folder) as llm:
        wanted = token_ids(llm.generate(["abc" * 9, "de"], params))
    with small_llm(bytes_folder) as llm:
        ids = [llm.add_request(prompt, params) for prompt in ("abc" * 9, "de")]
        target = getattr(llm._core, worker)
        launch, calls = target.launch, []

        def launch_then_fail(*args):
            results = launch(*args)
            calls.append(results)
            if len(calls) in (1, 4):
                raise RuntimeError("too late")
            return results

        monkeypatch.setattr(target, "launch", launch_then_fail)
        last, num_failures = {}, 0
        while not llm.is_finished():
            try:
                last |= {output["request_id"]: output for output in llm.step()}
            except RuntimeError:
                num_failures += 1
        assert num_failures >= 1
        assert [last[i]["token_ids"] for i in ids] == wanted


@pytest.mark.parametrize(("method", "number"), [("push", 1), ("push", 4), ("finish", 1)])
def test_a_failing_detokenizer_ends_its_own_request_only(bytes_folder, method, number, monkeypatch):
    params = greedy(15, ignore_eos=True)
    with small_llm(bytes_folder) as llm:
        wanted = token_ids(llm.generate(["abc", "de", "fg"], params))
    with small_llm(bytes_folder) as llm:
        ids = [llm.add_request(prompt, params) for prompt in ("abc", "de", "fg")]
        detokenizer = llm._jobs[ids[1]].detokenizer
        error = fail(UnicodeError("no such byte"))
        function = on_call(number, getattr(detokenizer, method), error)
        monkeypatch.setattr(detokenizer, method, function)
        last, num_failures = {}, 0
        for _ in range(100):
            try:
                last |= {o["request_id"]: o for o in llm.step() if o["finished"]}
            except UnicodeError:
                num_failures += 1
        assert num_failures == 1
        assert [last[i]["token_ids"] for i in (ids[0], ids[2])] == [wanted[0], wanted[2]]
        # the one that failed has a last output too, or its caller would wait for ever
        assert last.keys() == set(ids) and llm.is_finished()
        reason = last[ids[1]]["finish_reason"]
        assert reason == ("error" if method == "push" else "length")


@pytest.mark.parametrize("number", [1, 2])
def test_a_stream_whose_detokenizer_failed_ends(speaker, number, monkeypatch):
    failing, other = speaker.stream([0], greedy()), speaker.stream([0], greedy())
    next(failing)
    detokenizer = next(iter(speaker._jobs.values())).detokenizer
    next(other), next(failing)  # so that none of its news is left to be fetched
    error = fail(UnicodeError("no such byte"))
    monkeypatch.setattr(detokenizer, "push", on_call(number, detokenizer.push, error))
    with pytest.raises(UnicodeError):  # whoever steps sees the error
        list(other)
    core = speaker._core
    stuck = fail(AssertionError("the stream waits for a request that has ended"))
    monkeypatch.setattr(core, "step", on_call(100, core.step, stuck))
    list(failing)
    assert_idle(speaker)


# random schedules


PROMPTS = [[3 + i, *range(5, 5 + n)] for i, n in enumerate([0, 1, 6, 7, 8, 15, 22])]
PROMPTS += [PROMPTS[-1] + [9, 9], [*PROMPTS[-1][:12], 1]]
actions = st.one_of(
    st.tuples(st.just("add"), st.integers(0, len(PROMPTS) - 1), st.integers(1, 20)),
    st.tuples(st.just("step"), st.integers(1, 6), st.just(0)),
    st.tuples(st.just("abort"), st.integers(0, 30), st.just(0)),
    st.tuples(st.just("generate"), st.integers(0, len(PROMPTS) - 1), st.integers(1, 5)),
)


@pytest.fixture(scope="module")
def alone(ids_folder):
    """prompt number -> the tokens it gets when nothing else runs and everything fits."""
    with small_llm(ids_folder, enable_prefix_caching=False) as llm:
        params = greedy(20, ignore_eos=True)
        return [llm.generate([prompt], params)[0]["token_ids"] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def crowded(ids_folder):
    options = {"num_kv_blocks": 13, "block_size": 4, "max_num_seqs": 3}
    with small_llm(ids_folder, max_num_batched_tokens=5, **options) as llm:
        yield llm


@given(schedule=st.lists(actions, min_size=3, max_size=25))
@example(schedule=[("add", 6, 20)] * 5 + [("step", 6, 0)] * 3 + [("abort", 0, 0)])  # preempts
@example(schedule=[("add", 7, 9), ("step", 2, 0), ("generate", 8, 5), ("abort", 0, 0)])
@settings(max_examples=25)
def test_any_schedule_gives_each_request_the_tokens_it_gets_alone(crowded, alone, schedule):
    wanted: dict[int, list[int]] = {}
    found: dict[int, dict] = {}
    streamed: dict[int, list[int]] = {}

    def take(outputs):
        for output in outputs:
            streamed.setdefault(output["request_id"], []).extend(output["new_token_ids"])
            if output["finished"]:
                found[output["request_id"]] = output

    for action, number, count in schedule:
        if action == "add":
            params = greedy(count, ignore_eos=True)
            wanted[crowded.add_request(PROMPTS[number], params)] = alone[number][:count]
        elif action == "generate":
            output = crowded.generate([PROMPTS[number]], greedy(count, ignore_eos=True))[0]
            assert output["token_ids"] == alone[number][:count]
        elif action == "abort" and wanted:
            crowded.abort(list(wanted)[number % len(wanted)])
        elif action == "step":
            for _ in range(number):
                take(crowded.step())
        crowded._core.block_manager.check()
    while not crowded.is_finished():
        take(crowded.step())
    assert found.keys() == wanted.keys()
    for request_id, output in found.items():
        tokens = output["token_ids"]
        assert tokens == streamed[request_id] == wanted[request_id][: len(tokens)]
        whole = len(tokens) == len(wanted[request_id])
        assert output["finish_reason"] == ("length" if whole else "abort") or whole
    assert_idle(crowded)


def test_byte_vocabulary_is_what_these_tests_assume(rambler):
    assert rambler.model_config.vocab_size == BYTE_VOCAB
    assert rambler.tokenizer.encode("aé") == list("aé".encode())
