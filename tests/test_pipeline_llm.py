"""LLM with pipelined decode: the same tokens, on one CPU "device" and on two; and without."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import PTXASError

from engine import LLM, build
from engine.build import _stage_streams
from engine.config import EngineConfig
from engine.core import Core
from engine.pd_core import PDCore
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


ERRORS = {
    "CUDA out of memory.": torch.OutOfMemoryError("CUDA out of memory.\nSee the documentation"),
    "PTXASError": PTXASError("no such GPU"),
    "every program must have run": ValueError("every program must have run, got 3 without"),
}


@pytest.mark.parametrize("told", ERRORS)
def test_whatever_stops_a_partition_decode_is_serial_and_says_why(monkeypatch, told):
    monkeypatch.setattr(build.GpuStreams, "partitioned", lambda *_: raise_(ERRORS[told]))
    config = EngineConfig(model="m", device="cuda", enable_decode_pipeline=True)
    with pytest.warns(UserWarning, match=f"decode is serial, not pipelined: .*{told}"):
        streams, why_none = _stage_streams(config, GPU)
    assert streams is None and told in why_none and "\n" not in why_none


def raise_(error: BaseException) -> None:
    raise error


class Partition(InOrder):
    """A stand-in that notes whether it was given back."""

    name, granted = "48:84", (48, 84)
    is_closed = False

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def partition(monkeypatch) -> Partition:
    made = Partition()
    monkeypatch.setattr(build, "_stage_streams", lambda config, device: (made, None))
    return made


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (DecodePipeline, "__init__"),
        (Core, "_warm_up"),
        (PDCore, "_build_prefill"),
        (PDCore, "_build_scheduler"),
        (PDCore, "_build_handoffs"),
        (PDCore, "_warm_up"),
    ],
)
def test_an_llm_that_cannot_be_built_gives_its_partition_back(
    bytes_folder, partition, monkeypatch, kind, name
):
    error = torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(kind, name, lambda *_, **__: raise_(error))
    options = {"device": "cpu", "num_kv_blocks": 64, "enable_two_gpu_pd": kind is PDCore}
    with pytest.raises(torch.OutOfMemoryError):
        LLM(bytes_folder, enable_decode_pipeline=True, **options)
    assert partition.is_closed


def test_a_partition_is_given_back_though_blocks_are_not(bytes_folder, partition, monkeypatch):
    llm = LLM(bytes_folder, device="cpu", num_kv_blocks=64, enable_decode_pipeline=True)
    monkeypatch.setattr(llm._core, "drain", lambda: raise_(AssertionError("blocks are held")))
    with pytest.raises(AssertionError, match="blocks are held"):
        llm.exit()
    assert partition.is_closed


def test_the_fullest_step_is_pipelined_however_few_requests_it_has(bytes_folder, partition):
    with small_llm(bytes_folder, decode_pipeline="static", max_num_seqs=3) as llm:
        llm.generate([[1, 2, 3]] * 3, greedy(4, ignore_eos=True))
        llm.generate([[1, 2, 3]] * 2, greedy(4, ignore_eos=True))
        steps = llm.decode_runner.get_pipeline_statistics()["num_steps_by_mode"]
    assert steps == {"48:84": 3, "serial": 3}


def test_serial_steps_are_of_the_same_sizes_with_a_pipeline(bytes_folder):
    buckets = []
    for choice in ("static", "auto", "disabled"):
        with small_llm(bytes_folder, decode_pipeline=choice, max_num_seqs=17) as llm:
            buckets.append(llm.decode_runner.buckets)
    assert buckets[0] == buckets[1] == buckets[2]


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
