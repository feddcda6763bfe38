"""LLM on two CPU "devices": the same tokens as on one, whatever is cached, aborted or fails."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine import LLM
from engine.pd_core import PDCore
from tests import test_llm
from tests.checkpoints import save_byte_model, save_random, save_speaker
from tests.test_llm import GREEDY, PIECES, fail, greedy, small_llm, token_ids

HANDOFFS = ["slab", "push", "auto"]
LENGTHS = [1, 15, 16, 17, 255, 256, 257, 511, 512, 513, 639]  # of at most 640 tokens

ctrl_c = test_llm.ctrl_c
# what holds on one device holds on two: `speaker` and `rambler` below are LLMs on two
for shared in (
    test_llm.test_a_stop_string_that_never_comes_changes_nothing,
    test_llm.test_abort_before_the_first_step,
    test_llm.test_closing_a_stream_half_way_aborts_it,
    test_llm.test_ctrl_c_at_any_time,
    test_llm.test_ctrl_c_in_step_loses_no_output,
    test_llm.test_ctrl_c_in_stream_ends_that_stream_alone,
    test_llm.test_each_prompt_has_its_own_params_and_order_is_kept,
    test_llm.test_fields_of_an_output,
    test_llm.test_outputs_of_add_request_wait_while_others_step,
    test_llm.test_step_returns_news_then_everything,
    test_llm.test_stop_token_ids_end_a_text,
    test_llm.test_stream_gives_the_text_of_generate_in_pieces,
    test_llm.test_the_end_token_as_the_last_one_allowed,
    test_llm.test_the_end_token_ends_a_text_unless_ignored,
    test_llm.test_the_same_seed_draws_the_same_tokens_whatever_the_batch,
    test_llm.test_two_streams_and_a_generate_take_turns,
    test_llm.test_very_short_outputs,
):
    globals()[shared.__name__] = shared


def two_devices(folder: Path, **options):
    """As `small_llm`, on two CPU "devices"."""
    return small_llm(folder, **{"enable_two_gpu_pd": True} | options)


@pytest.fixture(scope="module")
def speaker_folder(tmp_path_factory):
    return save_speaker(tmp_path_factory.mktemp("speaker"), PIECES)


@pytest.fixture(scope="module")
def bytes_folder(tmp_path_factory):
    return save_byte_model(tmp_path_factory.mktemp("bytes"), "qwen3")


@pytest.fixture(params=HANDOFFS[:2])
def kv_handoff(request) -> str:
    return request.param


@pytest.fixture
def speaker(speaker_folder, kv_handoff) -> Iterator[LLM]:
    with two_devices(speaker_folder, kv_handoff=kv_handoff) as llm:
        yield llm


@pytest.fixture
def rambler(bytes_folder, kv_handoff) -> Iterator[LLM]:
    with two_devices(bytes_folder, kv_handoff=kv_handoff) as llm:
        yield llm


@contextmanager
def no_call(target: object, name: str):
    """Fails where that method is called within."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, fail(AssertionError(f"{name} was called")))
        yield


# the same tokens


def prompts_of(lengths: list[int], seed: int = 0, vocab_size: int = 67) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab_size) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_tokens_are_those_of_one_device(family, tmp_path):
    save_random(tmp_path, family, max_position_embeddings=640)
    prompts = prompts_of(LENGTHS)
    params = [greedy(1 + i % 7, ignore_eos=True, logprobs=1) for i in range(len(prompts))]
    found = []
    for options in [{"enable_two_gpu_pd": False}, *({"kv_handoff": how} for how in HANDOFFS)]:
        sizes = {"num_kv_blocks": 150, "max_num_batched_tokens": 300}
        with two_devices(tmp_path, **sizes | options) as llm:
            assert isinstance(llm._core, PDCore) == ("kv_handoff" in options)
            found.append(llm.generate(prompts, params))
    for outputs in found[1:]:
        assert token_ids(outputs) == token_ids(found[0])
        for output, wanted in zip(outputs, found[0], strict=True):
            for one, other in zip(output["logprobs"], wanted["logprobs"], strict=True):
                assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("kv_handoff", HANDOFFS[:2], indirect=True)
def test_smollm2_says_what_it_says_on_one_device(kv_handoff):
    prompts = ["The", "The capital of France is", "One two three four five six seven " * 6]
    found = []
    for two in (False, True):
        with two_devices("smollm2", enable_two_gpu_pd=two, kv_handoff=kv_handoff) as llm:
            found.append(token_ids(llm.generate(prompts, greedy(8))))
    assert found[0] == found[1]


def test_smollm2_says_it_at_every_length():
    """The longer ones are left to models that compute faster."""
    prompts, found = prompts_of(LENGTHS[:7], vocab_size=40_000), []
    for two in (False, True):
        options = {"enable_two_gpu_pd": two, "num_kv_blocks": 100}
        options |= {"max_model_len": LENGTHS[6] + 1, "max_num_batched_tokens": 512}
        with two_devices("smollm2", **options) as llm:
            found.append(token_ids(llm.generate(prompts, greedy(3))))
    assert found[0] == found[1]


def test_turns_of_a_conversation_hit_either_prefix_cache(bytes_folder, kv_handoff):
    """Prefill's pool knows prompts alone, decode's also what was generated."""
    sizes = {"block_size": 4, "num_kv_blocks": 120}
    with small_llm(bytes_folder, enable_prefix_caching=False, **sizes) as one_device:
        with two_devices(bytes_folder, kv_handoff=kv_handoff, **sizes) as llm:
            text, num_cached, num_sent = list(b"a first question"), [], []
            blocks_sent = count_blocks(llm)
            for turn in (b" and another", b"; why?", b"!"):
                output = llm.generate([text], GREEDY)[0]
                wanted = one_device.generate([text], GREEDY)[0]
                assert output["token_ids"] == wanted["token_ids"]
                num_cached.append(output["metrics"]["num_cached_tokens"])
                num_sent.append(sum(blocks_sent))
                blocks_sent.clear()
                text = [*text, *output["token_ids"], *turn]
    assert num_cached[0] == 0 and num_cached[1] == 16 and num_cached[2] > 32
    # 16, 36 and 50 tokens, of which decode has k and v of 0, 23 and 43
    assert num_sent == [4, 9 - 5, 13 - 10]


def count_blocks(llm: LLM) -> list[int]:
    """How many blocks each copy of this LLM is about, from now on."""
    sent: list[int] = []
    for link in (llm._core.handoffs._slabs, llm._core.handoffs._pushes):
        link.open = _counted(link.open, sent)
    return sent


def _counted(open_copy, sent):
    def opened(source, target):
        sent.append(len(source))
        return open_copy(source, target)

    return opened


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize("max_num_batched_tokens", [3, 64])
def test_tiny_pools_give_the_tokens_of_a_big_one(
    bytes_folder, max_num_batched_tokens, enable_prefix_caching, kv_handoff
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
        "kv_handoff": kv_handoff,
    }
    with two_devices(bytes_folder, **options) as llm:
        outputs = llm.generate(prompts, params)
        assert token_ids(outputs) == wanted


@pytest.mark.parametrize("stop", ["世", "; n", ["zzz", "ends", "Bye"]])
def test_stop_strings_end_a_text(speaker, stop):
    output = speaker.generate([[0]], greedy(stop=stop))[0]
    strings = [stop] if isinstance(stop, str) else stop
    wanted = test_llm.ANSWER[: min(test_llm.ANSWER.find(s) for s in strings if s != "zzz")]
    assert (output["text"], output["finish_reason"]) == (wanted, "stop")
    assert "".join(speaker.stream([0], greedy(stop=stop))) == wanted


def test_exit_frees_both_pools(bytes_folder, kv_handoff):
    num_others = test_llm.num_pools()  # that a failure of another test has kept
    llm = LLM(
        bytes_folder, device="cpu", num_kv_blocks=8, enable_two_gpu_pd=True, kv_handoff=kv_handoff
    )
    llm.generate("a", GREEDY)
    assert test_llm.num_pools() == num_others + 2
    llm.exit()
    assert test_llm.num_pools() == num_others


FIRST_IS_LAST = [  # tokens of the prompt, which auto pushes from 128 on
    ("slab", 200, False),
    ("push", 9, True),
    ("push", 200, True),
    ("auto", 127, False),
    ("auto", 200, True),
]


@pytest.mark.parametrize(("kv_handoff", "num_tokens", "is_pushed"), FIRST_IS_LAST)
def test_a_first_token_that_ends_its_request_launches_no_decode(
    bytes_folder, kv_handoff, num_tokens, is_pushed
):
    """Unless its layers were pushed as they were computed, nothing is sent either."""
    prompt = list(b"x" * num_tokens)
    sizes = {"num_kv_blocks": 200, "enable_prefix_caching": False}
    with two_devices(bytes_folder, kv_handoff=kv_handoff, **sizes) as llm:
        (first,) = llm.generate([prompt], greedy(1, ignore_eos=True))[0]["token_ids"]
        core, blocks_sent = llm._core, count_blocks(llm)
        with no_call(core.decode, "launch"), no_call(core.handoffs, "start"):
            ended = greedy(20, ignore_eos=True, stop_token_ids=[first])
            (output,) = llm.generate([prompt], ended)
        assert (output["token_ids"], output["finish_reason"]) == ([first], "stop")
        assert sum(blocks_sent) == (-(-num_tokens // 16) if is_pushed else 0)
        core.assert_idle()  # the decode blocks that were written to included
        assert len(core.handoffs) == 0


def test_one_token_never_touches_the_decode_device(rambler):
    core = rambler._core
    with no_call(core.decode, "launch"), no_call(core.handoffs, "start"):
        with no_call(core.handoffs, "push"):
            outputs = rambler.generate(["a", "b" * 40, "c" * 16], greedy(1))
    assert [len(output["token_ids"]) for output in outputs] == [1, 1, 1]
    assert core.leases.decode.num_cached_blocks == 0
