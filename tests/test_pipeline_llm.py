"""LLM with pipelined decode: the same tokens, on one CPU "device" and on two; and without."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine import LLM
from engine.build import _stage_streams
from engine.config import EngineConfig
from engine.pipeline import DecodePipeline
from engine.stage_streams import InOrder
from tests import test_llm
from tests.checkpoints import save_byte_model, save_random, save_speaker
from tests.test_llm import PIECES, greedy, small_llm, token_ids

# what holds of serial decode holds of this: `speaker` and `rambler` below are pipelined
for shared in (
    test_llm.test_a_stop_string_that_never_comes_changes_nothing,
    test_llm.test_closing_a_stream_half_way_aborts_it,
    test_llm.test_each_prompt_has_its_own_params_and_order_is_kept,
    test_llm.test_fields_of_an_output,
    test_llm.test_step_returns_news_then_everything,
    test_llm.test_the_end_token_ends_a_text_unless_ignored,
    test_llm.test_the_same_seed_draws_the_same_tokens_whatever_the_batch,
    test_llm.test_two_streams_and_a_generate_take_turns,
    test_llm.test_very_short_outputs,
):
    globals()[shared.__name__] = shared


def pipelined(folder: Path, **options):
    """As `small_llm`, every step cut in two."""
    pipeline = {"enable_decode_pipeline": True, "decode_pipeline_min_requests": 1}
    return small_llm(folder, **pipeline | options)


@pytest.fixture(scope="module")
def speaker_folder(tmp_path_factory):
    return save_speaker(tmp_path_factory.mktemp("speaker"), PIECES)


@pytest.fixture(scope="module")
def bytes_folder(tmp_path_factory):
    return save_byte_model(tmp_path_factory.mktemp("bytes"), "qwen3")


@pytest.fixture
def speaker(speaker_folder) -> Iterator[LLM]:
    with pipelined(speaker_folder) as llm:
        yield llm


@pytest.fixture(params=[False, True], ids=["one device", "two"])
def rambler(bytes_folder, request) -> Iterator[LLM]:
    with pipelined(bytes_folder, enable_two_gpu_pd=request.param) as llm:
        yield llm


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("num", [2, 3])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_tokens_are_those_of_serial_decode(family, num, two, tmp_path):
    """More requests than run at a time, of all lengths, on one device some preempted."""
    save_random(tmp_path, family)
    prompts = [[3 + (i * j) % 60 for j in range(1 + 7 * i % 45)] for i in range(14)]
    params = [greedy(9 + 5 * i % 23, ignore_eos=True, logprobs=1) for i in range(14)]
    options = {"num_kv_blocks": 24, "block_size": 4, "enable_two_gpu_pd": two}
    with small_llm(tmp_path, **options) as llm:
        wanted = llm.generate(prompts, params)
    with pipelined(tmp_path, decode_micro_batches=num, **options) as llm:
        found = llm.generate(prompts, params)
        stats = llm.decode_runner.get_pipeline_statistics()
        assert stats["num_tokens"] == llm.stats()["num_decode_tokens"]
        assert two or llm.stats()["num_preemptions"] > 0
        assert set(stats["num_steps_by_mode"]) == {"in order"}
        assert len(stats["micro_batches"]) == num
    assert token_ids(found) == token_ids(wanted)
    for output, other in zip(found, wanted, strict=True):
        for one, another in zip(output["logprobs"], other["logprobs"], strict=True):
            assert one == pytest.approx(another, abs=1e-4)


def test_statistics_can_be_printed_and_small_steps_are_serial(bytes_folder, capsys):
    with pipelined(bytes_folder, decode_pipeline_min_requests=3) as llm:
        llm.generate([[1], [2], [3]], greedy(4, ignore_eos=True))
        llm.generate([1], greedy(4, ignore_eos=True))
        llm.decode_runner.print_pipeline_statistics()
    printed = capsys.readouterr().out
    assert "partitioning in order" in printed and "serial" in printed
    assert "SMs asked 48:84, granted -" in printed


def test_without_the_option_decode_is_serial(bytes_folder):
    with small_llm(bytes_folder, decode_pipeline="disabled") as llm:
        assert not isinstance(llm.decode_runner, DecodePipeline)
    with small_llm(bytes_folder, decode_pipeline="static") as llm:
        assert isinstance(llm.decode_runner, DecodePipeline)
        runner = llm.decode_runner
    with pytest.raises(RuntimeError):
        llm.decode_runner  # noqa: B018
    assert runner.graphs.captured == {}


GPU = torch.device("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_without_green_contexts_decode_is_serial_and_says_why():
    config = EngineConfig(model="m", device="cuda", enable_decode_pipeline=True)
    with pytest.warns(UserWarning, match="decode is serial, not pipelined: no green contexts"):
        streams, why_none = _stage_streams(config, GPU)
    assert streams is None and why_none.startswith("no green contexts: device must be a GPU")


def test_green_contexts_may_be_declined():
    config = EngineConfig(model="m", enable_decode_pipeline=True, disable_green=True)
    assert _stage_streams(config, GPU) == (None, "disable_green is set")


def test_references_on_a_gpu_run_in_order():
    config = EngineConfig(model="m", enable_decode_pipeline=True, kernels="reference")
    streams, why_none = _stage_streams(config, GPU)
    assert isinstance(streams, InOrder) and why_none is None
