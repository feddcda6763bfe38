"""The engine on two GPUs, or on two pools of one: bf16, graphs, copies that run beside launches."""

from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path

import pytest
import torch

from engine import LLM, SamplingParams, handoff
from engine.config import EngineConfig
from engine.handoff import has_peer_access
from engine.pd_core import MAX_CHUNKS, PUSH_GROUPS, PUSH_TOKENS
from engine.prefill import PrefillWorker, all_token_buckets
from engine.request import RequestState
from experiments.shapes import write_config
from tests import late_link, test_pd_llm
from tests.late_link import NAN
from tests.test_gpu_engine import (
    CHANGES,
    LOGIT_TOLERANCE,
    assert_same_or_near_ties,
    gpu_llm,
    greedy,
    prompts_of,
    tokens,
    without_padded_prefill,
)
from tests.test_llm import assert_idle, run_all

pytestmark = pytest.mark.gpu
prompts_of_lengths = partial(test_pd_llm.prompts_of, vocab_size=10_000)
ONE, TWO = ("cuda:0", "cuda:0"), ("cuda:0", "cuda:1")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
WAYS = ["kernel", "copy_engine", "staged"]
SPIN_CYCLES = 200_000_000  # some 100 ms
MAX_MODEL_LEN = 1024  # of gpu_llm
LENGTHS = [*test_pd_llm.LENGTHS[:-1], MAX_MODEL_LEN - 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_config("Qwen3-0.6B", tmp_path_factory.mktemp("qwen3"), **CHANGES)


@pytest.fixture(params=[ONE, pytest.param(TWO, marks=needs_two)], ids=["one GPU", "two GPUs"])
def devices(request, monkeypatch) -> tuple[str, str]:
    """Where prefill and decode run; one GPU for both is for tests alone."""
    monkeypatch.setattr(EngineConfig, "resolve_two_devices", lambda config: request.param)
    return request.param


def poison(llm: LLM) -> None:
    """Of an idle engine: what no one has written is no number."""
    for worker in (llm._core.prefill, llm._core.decode):
        torch.cuda.synchronize(worker.device)
        with torch.inference_mode():
            worker.kv_cache.blocks.fill_(NAN)
        torch.cuda.synchronize(worker.device)


@contextmanager
def pd_llm(folder: Path, **options):
    """NaN in every block that nobody owns, all the time, and at the end all blocks back."""
    with gpu_llm(folder, **{"enable_two_gpu_pd": True} | options) as llm:
        late_link.poison(llm._core)
        yield llm
        assert_idle(llm)


@contextmanager
def one_device_llm(folder: Path, **options):
    """What two devices are compared with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineConfig, "resolve_two_devices", lambda config: None)
        with gpu_llm(folder, **options) as llm:
            yield llm


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kv_handoff", ["slab", "push"])
@pytest.mark.parametrize("num", [1, 7])
def test_tokens_are_those_of_one_device(folder, devices, kv_handoff, way, num, monkeypatch):
    """To the bit: the prompts of one launch decode in one batch, and no launch is padded."""
    monkeypatch.setattr(handoff, "DIRECT_WAY", way)
    prompts, found = prompts_of(num), []
    options = {"enable_prefix_caching": False}
    make = [partial(one_device_llm, folder), partial(pd_llm, folder, kv_handoff=kv_handoff)]
    for llm_of in make:
        with llm_of(**options) as llm:
            without_padded_prefill(llm)
            found.append([tokens(llm, prompts) for _ in range(2)])
            found[-1].append(tokens(llm, prompts, SamplingParams(seed=1, max_tokens=8)))
    assert found[0] == found[1]
    assert len({token_id for ids in found[0][0] for token_id in ids}) > 3


@pytest.mark.parametrize("kv_handoff", ["slab", "push"])
def test_tokens_behind_prompts_of_every_length_are_those_of_one_device(folder, devices, kv_handoff):
    """To the bit, one prompt after the other: batches and launches are the same on both sides."""
    prompts, found = prompts_of_lengths(LENGTHS), []
    options = {"enable_prefix_caching": False}
    for llm_of in (partial(one_device_llm, folder), partial(pd_llm, folder, kv_handoff=kv_handoff)):
        with llm_of(**options) as llm:
            without_padded_prefill(llm)
            found.append(
                [tokens(llm, [p], greedy(min(16, MAX_MODEL_LEN - len(p))))[0] for p in prompts]
            )
    assert found[0] == found[1]
    assert len({token_id for ids in found[0] for token_id in ids}) > 3


@pytest.mark.parametrize("kv_handoff", ["slab", "push"])
def test_turns_of_a_conversation_hit_either_prefix_cache(folder, devices, kv_handoff):
    """What decode wrote is not on the prefill device, which computes it anew: in other launches
    than one device without a cache, so that near ties may part."""
    (text,) = prompts_of_lengths([300])
    num_cached, num_sent = [], []
    with pd_llm(folder, kv_handoff=kv_handoff) as llm:
        with one_device_llm(folder, enable_prefix_caching=False) as whole:
            block_bytes = llm._core.decode.kv_cache.blocks[0].nbytes
            for turn in prompts_of_lengths([20, 40, 60]):
                outputs = llm.generate([text], greedy(40))
                num_cached.append(outputs[0]["metrics"]["num_cached_tokens"])
                num_sent.append(llm.stats()["handoff"]["num_bytes"] / block_bytes)
                wanted = whole.generate([text], greedy(40, logprobs=20))
                assert_same_or_near_ties(wanted, outputs, LOGIT_TOLERANCE["bfloat16"])
                text = [*text, *outputs[0]["token_ids"], *turn]
    # blocks of 16: prompts of 300, 360 and 440 tokens, of which prefill has what earlier prompts
    # filled whole, and decode also 39 of the 40 tokens behind them
    assert num_cached == [0, 288, 352]
    assert num_sent == list(accumulate([19, 23 - 21, 28 - 24]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kv_handoff", ["slab", "push", "auto"])
def test_every_launch_is_a_graph_and_near_what_one_device_says(
    folder, devices, kv_handoff, dtype, monkeypatch
):
    """Many prompts of all lengths, chunked and cached; as many as a launch may have, and more."""
    prompts = prompts_of(MAX_CHUNKS + 10, seed=2, longest=30) + prompts_of(12, 3, longest=900)
    prompts += [[*prompt, 1, 2, 3] for prompt in prompts[-4:]]
    params = [greedy(1 + 5 * i % 23, logprobs=20) for i in range(len(prompts))]
    options = {"dtype": dtype, "max_num_batched_tokens": 1000}
    with one_device_llm(folder, **options) as llm:
        wanted = llm.generate(prompts, params)
    with pd_llm(folder, kv_handoff=kv_handoff, **options) as llm:
        captured = llm._core.prefill.graphs.captured
        num_segments = 1 if kv_handoff == "slab" else len(PUSH_GROUPS) + 1
        assert len(captured) == num_segments * len(all_token_buckets(1000))
        monkeypatch.setattr(PrefillWorker, "_compute", None)  # replays alone
        found = llm.generate(prompts, params)
    assert_same_or_near_ties(wanted, found, LOGIT_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_read_before_it_is_written(folder, devices, way, dtype, monkeypatch):
    """Over and over, as a race need not show itself: prompts that are pushed beside one that is
    not, into pools of NaN."""
    monkeypatch.setattr(handoff, "DIRECT_WAY", way)
    prompts = prompts_of(4, seed=10)
    assert min(map(len, prompts)) < PUSH_TOKENS["auto"] < max(map(len, prompts))
    options = {"dtype": dtype, "enable_prefix_caching": False}
    with one_device_llm(folder, **options) as llm:
        wanted = llm.generate(prompts, greedy(logprobs=20))
    with pd_llm(folder, **options) as llm:
        for _ in range(12):
            poison(llm)
            found = llm.generate(prompts, greedy())
            assert_same_or_near_ties(wanted, found, LOGIT_TOLERANCE[dtype])


def test_pressure_and_aborts_leave_the_others_right(folder, devices):
    """Blocks change hands all the time: a write behind its time would be seen."""
    prompts = prompts_of(40, seed=5)
    options = {"dtype": "float32", "enable_prefix_caching": False}
    with one_device_llm(folder, **options) as llm:
        wanted = llm.generate(prompts, greedy(40, logprobs=20))
    with pd_llm(folder, num_kv_blocks=70, **options) as llm:
        ids = [llm.add_request(prompt, greedy(40)) for prompt in prompts]
        last = {}
        for step in range(100_000):
            last |= {o["request_id"]: o for o in llm.step() if o["finished"]}
            if step % 5 == 0:
                llm.abort(ids[step // 5 * 3 % 39])  # every third of them, sooner or later
            if llm.is_finished():
                break
        num_aborted = sum(o["finish_reason"] == "abort" for o in last.values())
        assert 0 < num_aborted < 40
    whole = [i for i in range(40) if last[ids[i]]["finish_reason"] == "length"]
    found = [last[ids[i]] for i in whole]
    tolerance = LOGIT_TOLERANCE["float32"]
    assert_same_or_near_ties([wanted[i] for i in whole], found, tolerance)


def spinning(launch, in_flight):
    """The launch, behind some 100 ms of nothing on its stream; in_flight takes what it returns."""

    def replaced(*args):
        torch.cuda._sleep(SPIN_CYCLES)
        in_flight.append(launch(*args))
        return in_flight[-1]

    return replaced


def test_a_copy_waits_for_decode_steps_that_may_still_write(folder, devices, monkeypatch):
    """Aborted with slow steps in flight: their blocks are given to the next prompt at once."""
    first, second = [5] * 40, list(range(40))
    options = {"dtype": "float32", "enable_prefix_caching": False, "num_kv_blocks": 70}
    with one_device_llm(folder, **options) as llm:
        wanted = tokens(llm, [second], greedy(6))
    with pd_llm(folder, kv_handoff="slab", **options) as llm:
        core, jobs = llm._core, llm._jobs
        old = llm.add_request(first, greedy(500))
        while jobs[old].request.num_generated < 7:  # the next one goes into the third block
            llm.step()
        blocks = set(core.scheduler.decode_table(old))
        slow = []
        with monkeypatch.context() as patch:
            patch.setattr(core.decode, "launch", spinning(core.decode.launch, slow))
            while not slow:  # two may have been launched before
                llm.step()
            llm.abort(old)
            new = llm.add_request(second, greedy(6))
            while jobs[new].request.state is not RequestState.COPYING:
                llm.step()
            assert not slow[-1].is_done, "there was nothing to wait for"
            assert blocks & set(core.scheduler.decode_table(new)), "other blocks were granted"
        assert run_all(llm)[new]["token_ids"] == wanted[0]


def test_neither_device_waits_for_the_other(folder, devices, monkeypatch):
    """Decode goes on while a prefill launch takes for ever, and prefill while decode does."""
    prompts = prompts_of(6, seed=9)
    with pd_llm(folder, kv_handoff="slab") as llm:
        core = llm._core
        running = llm._jobs[llm.add_request(prompts[0], greedy(200))].request
        while running.num_generated < 3:
            llm.step()
        slow = []
        monkeypatch.setattr(core.prefill, "launch", spinning(core.prefill.launch, slow))
        for prompt in prompts[1:]:
            llm.add_request(prompt, greedy(3))
        while not slow:
            llm.step()
        before = running.num_generated
        assert before < 190, "nothing was left to decode meanwhile"
        while not slow[0][0].is_done:
            llm.step()
        assert running.num_generated > before + 3  # it may even have come to its end
        run_all(llm)


def test_the_link_is_measured_at_the_start(folder, devices):
    with pd_llm(folder) as llm:
        assert llm._core.link_gb_s > 1
        if devices == TWO and has_peer_access(*map(torch.device, TWO)):
            assert llm._core.link_gb_s > 20


@needs_two
def test_without_peer_access_blocks_go_through_the_host(folder, devices, monkeypatch):
    monkeypatch.setattr(handoff, "has_peer_access", lambda source, target: False)
    prompts = prompts_of(4, seed=10)
    with one_device_llm(folder, dtype="float32") as llm:
        wanted = llm.generate(prompts, greedy(logprobs=20))
    with pytest.warns(UserWarning, match=r"no peer access between cuda:0 and .* GB/s"):
        with pd_llm(folder, dtype="float32") as llm:
            found = llm.generate(prompts, greedy())
    assert_same_or_near_ties(wanted, found, LOGIT_TOLERANCE["float32"])
