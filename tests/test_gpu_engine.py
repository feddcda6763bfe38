"""The engine on a GPU: bf16, CUDA graphs, and memory that comes back."""

import dataclasses
import gc
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import kernels
from engine import LLM, SamplingParams
from engine.decode import batch_buckets
from engine.prefill import TOKEN_BUCKETS
from experiments.shapes import write_config
from kernels import reference
from models.config import ModelConfig
from models.decoder import Decoder
from models.weights import dummy_weights
from tests.test_llm import assert_idle, fail, on_call, run_all
from tests.test_parity import Runner

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
CHANGES: dict[str, Any] = {"num_hidden_layers": 4}  # Qwen3-0.6B in all else
MAX_NUM_SEQS = 24
# A bf16 logit of 4 to 8 has a spacing of 2**-5, and the layers before it add as much again; with
# fp32 it is 2**-21, and sums in another order some 1e-5.
LOGIT_TOLERANCE = {"bfloat16": 0.15, "float32": 1e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_config("Qwen3-0.6B", tmp_path_factory.mktemp("qwen3"), **CHANGES)


def gpu_llm(folder, **options) -> LLM:
    sizes = {"max_num_seqs": MAX_NUM_SEQS, "max_num_batched_tokens": 2048, "num_kv_blocks": 512}
    return LLM(folder, device=DEVICE, load_format="dummy", max_model_len=1024, **sizes | options)


def prompts_of(num: int, seed: int = 0, longest: int = 200) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(10_000) for _ in range(rng.randint(1, longest))] for _ in range(num)]


def greedy(max_tokens: int = 24, **fields) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **fields)


def tokens(llm: LLM, prompts: Sequence[list[int]], params: Any = None) -> list[list[int]]:
    outputs = llm.generate(prompts, greedy() if params is None else params)
    assert_idle(llm)
    return [output["token_ids"] for output in outputs]


def assert_same_or_near_ties(outputs: list[dict], others: list[dict], tolerance: float) -> None:
    """The same tokens; where two part, both were as good as the best within the tolerance.

    outputs have logprobs. Behind the first difference the texts are different ones.
    """
    for n, (output, other) in enumerate(zip(outputs, others, strict=True)):
        pairs = zip(output["token_ids"], other["token_ids"], strict=True)
        for i, (one, another) in enumerate(pairs):
            if one != another:
                logprobs = output["logprobs"][i]
                is_near = logprobs.get(another, -1e9) >= max(logprobs.values()) - tolerance
                assert is_near, f"output {n} from token {i} on: {other['token_ids'][i : i + 5]}"
                break


def without_padded_prefill(llm: LLM) -> None:
    """Padding picks other tiles, which round otherwise: off where decode is held to the bit."""
    llm._core.prefill.buckets.clear()


@pytest.mark.parametrize("num", [1, 3, 17])
def test_decode_graphs_and_eager_give_identical_tokens(folder, num):
    prompts, found = prompts_of(num), []
    for enforce_eager in (False, True):
        with gpu_llm(folder, enforce_eager=enforce_eager) as llm:
            without_padded_prefill(llm)
            assert bool(llm._core.decode.graphs.captured) != enforce_eager
            found.append(tokens(llm, prompts))
            found.append(tokens(llm, prompts, SamplingParams(seed=1, max_tokens=8)))
    assert found[0] == found[2] and found[1] == found[3]
    assert len({token_id for ids in found[0] for token_id in ids}) > 3


def test_graphs_replay_right_after_many_batch_sizes(folder):
    """Requests of all lengths end one by one, so that every bucket is replayed, up and down."""
    prompts = prompts_of(2 * MAX_NUM_SEQS, seed=3, longest=40)
    params = [greedy(1 + 7 * i % 40) for i in range(len(prompts))]
    found = []
    for enforce_eager in (False, True):
        with gpu_llm(folder, enforce_eager=enforce_eager) as llm:
            without_padded_prefill(llm)
            found.append([tokens(llm, prompts, params) for _ in range(2)])
            found[-1].append([tokens(llm, [prompt], greedy(5)) for prompt in prompts[:3]])
            if not enforce_eager:
                captured = llm._core.decode.graphs.captured
                assert sorted(captured) == batch_buckets(MAX_NUM_SEQS)
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_prefill_graphs_and_eager_give_the_same_tokens(folder, dtype):
    """Every bucket, filled and by one token exceeded, alone and several prompts a launch."""
    lengths = [n + more for n in TOKEN_BUCKETS if n < 1000 for more in (0, 1)]
    prompts = [prompts_of(1, seed=n, longest=1)[0] * n for n in lengths]
    prompts = [[(t + i * i) % 10_000 for i, t in enumerate(prompt)] for prompt in prompts]
    groups = [[prompt] for prompt in prompts] + [prompts[i : i + 3] for i in range(len(prompts))]
    found = []
    for enforce_eager in (False, True):
        options = {"dtype": dtype, "enforce_eager": enforce_eager, "enable_prefix_caching": False}
        with gpu_llm(folder, **options) as llm:
            poison(llm)
            graphs, stats = llm._core.prefill.graphs, llm.stats()
            captured = [] if enforce_eager else [(size, 0) for size in TOKEN_BUCKETS]
            assert sorted(graphs.captured) == captured
            assert (stats["num_graphs"] > len(TOKEN_BUCKETS)) != enforce_eager
            assert (stats["capture_ms"] > 0) != enforce_eager
            found.append(
                [o for group in groups for o in llm.generate(group, greedy(4, logprobs=20))]
            )
    assert_same_or_near_ties(found[1], found[0], LOGIT_TOLERANCE[dtype])
    for one, other in zip(*found, strict=True):
        first, second = one["logprobs"][0], other["logprobs"][0]
        for token_id in first.keys() & second.keys():
            assert abs(first[token_id] - second[token_id]) <= LOGIT_TOLERANCE[dtype]
        assert first.keys() & second.keys(), "no likely token in common"
    assert len({token_id for output in found[0] for token_id in output["token_ids"]}) > 3


def poison(llm: LLM) -> None:
    """NaN in every KV block and in all that prefill reads or writes; nothing is owned yet."""
    buffers = llm._core.prefill.buffers
    names = ("hidden", "rstd", "normed", "qkv", "q", "attention", "act", "logits")
    with torch.inference_mode():
        for tensor in (llm._core.kv_cache.blocks, *(getattr(buffers, name) for name in names)):
            tensor.fill_(float("nan"))
    torch.cuda.synchronize()  # the engine works on a stream of its own


def test_prefill_graphs_under_load_give_the_tokens_of_eager(folder):
    """Chunked, cached and preempted prompts; launches of many chunks are eager in between."""
    shared = prompts_of(1, seed=21, longest=1)[0] * 100
    prompts = [shared + prompt for prompt in prompts_of(10, seed=22)] + prompts_of(20, seed=23)
    options = {"dtype": "float32", "num_kv_blocks": 40, "max_num_batched_tokens": 300}
    found = []
    for enforce_eager in (False, True):
        with gpu_llm(folder, enforce_eager=enforce_eager, **options) as llm:
            poison(llm)
            outputs = llm.generate(prompts, greedy(60, logprobs=20))
            stats = llm.stats()
            assert stats["num_preemptions"] > 0 and stats["num_cached_tokens"] > 0
            assert_idle(llm)
            found.append(outputs)
    assert_same_or_near_ties(found[1], found[0], LOGIT_TOLERANCE["float32"])


def test_a_prefill_graph_leaves_logits_and_tokens_of_launches_in_flight_alone(folder):
    """Requests that arrive step by step: a replay overwrites what the one before has drawn."""
    prompts = prompts_of(12, seed=24)
    params = [SamplingParams(seed=i, max_tokens=5, ignore_eos=True, logprobs=3) for i in range(12)]
    with gpu_llm(folder, dtype="float32", enable_prefix_caching=False) as llm:
        wanted = [llm.generate([p], q)[0] for p, q in zip(prompts, params, strict=True)]
        ids, last = [], {}
        for prompt, one in zip(prompts, params, strict=True):
            ids.append(llm.add_request(prompt, one))
            last |= {o["request_id"]: o for o in llm.step() if o["finished"]}
        last |= run_all(llm)
        assert_idle(llm)
    for request_id, output in zip(ids, wanted, strict=True):
        assert last[request_id]["token_ids"] == output["token_ids"]
        for one, other in zip(last[request_id]["logprobs"], output["logprobs"], strict=True):
            assert one == pytest.approx(other, abs=LOGIT_TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kernel_set", ["triton", "reference"])
def test_every_dtype_runs_and_repeats(folder, dtype, kernel_set):
    options = {"dtype": dtype, "kernels": kernel_set, "enforce_eager": kernel_set == "reference"}
    params = [greedy(6), SamplingParams(seed=4, top_k=50, top_p=0.9, min_p=0.01, max_tokens=6)] * 2
    prompts, found = prompts_of(4), []
    for _ in range(2):
        with gpu_llm(folder, **options) as llm:
            assert llm._core.dtype == getattr(torch, dtype)
            found.append([tokens(llm, prompts, params) for _ in range(2)])
    assert found[0] == found[1]
    assert [len(ids) for ids in found[0][0][::2]] == [6, 6]


def test_auto_takes_the_checkpoints_dtype_and_triton(folder):
    with gpu_llm(folder, dtype="auto", kernels="auto") as llm:
        assert llm._core.dtype == torch.bfloat16
        assert llm._core.decode.decoder.ops is kernels


def as_fp32(value: Any) -> Any:
    """The same weights, every tensor in fp32; what is tied stays tied."""
    if isinstance(value, torch.Tensor):
        return value.float()
    if isinstance(value, tuple):
        return tuple(map(as_fp32, value))
    if dataclasses.is_dataclass(value):
        fields = {f.name: as_fp32(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


@torch.inference_mode()
def test_logits_of_triton_are_as_near_to_fp32_as_those_of_the_references(folder):
    """Both round each op to bf16, at the same places; the order of their sums differs."""
    config = ModelConfig.from_folder(folder)
    weights = dummy_weights(config, device=DEVICE, dtype=torch.bfloat16)
    runners = {
        "exact": Runner(Decoder(config, as_fp32(weights), 512, reference), 16),
        "reference": Runner(Decoder(config, weights, 512, reference), 16),
        "triton": Runner(Decoder(config, weights, 512, kernels), 16),
    }
    texts = [[*prompt, 7, 8, 9] for prompt in ([5], *prompts_of(4, seed=5))]
    logits: dict[str, list[torch.Tensor]] = {}
    for name, runner in runners.items():
        prompts = [(i, text[:-3], 0) for i, text in enumerate(texts)]
        rows = runner.prefill(prompts[:3])
        first = runner.prefill([(i, text[: len(text) // 2], 0) for i, text, _ in prompts[3:]])
        rows += first + runner.prefill([(i, text, len(text) // 2) for i, text, _ in prompts[3:]])
        for step in (-3, -2, -1):
            new = [(i, text[step], len(text) + step) for i, text in enumerate(texts)]
            rows.append(runner.decode(new))
        logits[name] = torch.cat(rows).float()
    exact = logits["exact"]
    errors = {name: (logits[name] - exact).abs() for name in ("reference", "triton")}
    rms = {name: error.square().mean().sqrt().item() for name, error in errors.items()}
    assert 0 < rms["reference"] < 0.05 * exact.square().mean().sqrt().item()
    assert rms["triton"] <= 1.5 * rms["reference"]
    assert errors["triton"].max() <= 2 * errors["reference"].max()
    by_row = [errors[name].square().mean(-1).sqrt() for name in ("triton", "reference")]
    assert (by_row[0] <= 4 * by_row[1]).all(), "one row is off: a mask or a block table"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("max_num_batched_tokens", [7, 100])
def test_prompts_in_chunks_give_the_tokens_of_whole_ones(folder, dtype, max_num_batched_tokens):
    prompts = prompts_of(6, seed=8)
    with gpu_llm(folder, dtype=dtype) as llm:
        whole = llm.generate(prompts, greedy(logprobs=20))
    with gpu_llm(folder, dtype=dtype, max_num_batched_tokens=max_num_batched_tokens) as llm:
        chunked = llm.generate(prompts, greedy())
        assert llm.stats()["num_prefill_launches"] > 5
    assert_same_or_near_ties(whole, chunked, LOGIT_TOLERANCE[dtype])


def test_cached_prefixes_give_the_tokens_of_computed_ones(folder):
    shared = prompts_of(1, seed=9)[0] * 3
    prompts = [[*shared, i, i + 1] for i in range(5)]
    with gpu_llm(folder, enable_prefix_caching=False) as llm:
        computed = llm.generate(prompts, greedy(logprobs=20))
    with gpu_llm(folder) as llm:
        llm.generate(prompts, greedy())
        cached = llm.generate(prompts, greedy())
        assert all(output["metrics"]["num_cached_tokens"] > 0 for output in cached)
    assert_same_or_near_ties(computed, cached, LOGIT_TOLERANCE["bfloat16"])


def test_a_seed_draws_the_same_tokens_in_batches_of_any_size(folder):
    """In fp32: bf16 kernels may sum in another order for another batch, and near ties flip."""
    params = SamplingParams(seed=11, temperature=0.8, top_p=0.95, max_tokens=12, ignore_eos=True)
    others = prompts_of(20, seed=12)
    with gpu_llm(folder, dtype="float32") as llm:
        alone = tokens(llm, [[1, 2, 3]], params)[0]
        for num in (1, 4, 16, 20):
            mixed = [params] + [SamplingParams(max_tokens=3 + i % 9) for i in range(num)]
            assert tokens(llm, [[1, 2, 3], *others[:num]], mixed)[0] == alone


def test_two_runs_give_identical_tokens(folder):
    prompts, found = prompts_of(20, seed=13), []
    params = [SamplingParams(temperature=0.6, max_tokens=16, ignore_eos=True)] * 10 + [
        greedy()
    ] * 10
    for _ in range(2):
        with gpu_llm(folder) as llm:
            found.append(tokens(llm, prompts, params))
    assert found[0] == found[1]


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_a_tiny_pool_preempts_and_gives_the_tokens_of_a_big_one(folder, enforce_eager):
    prompts = prompts_of(10, seed=14, longest=60)
    with gpu_llm(folder, dtype="float32", enforce_eager=enforce_eager) as llm:
        wanted = llm.generate(prompts, greedy(60, logprobs=20))
    tiny = {"num_kv_blocks": 12, "max_num_batched_tokens": 50, "enforce_eager": enforce_eager}
    with gpu_llm(folder, dtype="float32", **tiny) as llm:
        found = llm.generate(prompts, greedy(60))
        assert llm.stats()["num_preemptions"] > 0
        assert_idle(llm)
    assert_same_or_near_ties(wanted, found, LOGIT_TOLERANCE["float32"])


def test_aborts_under_graphs_leave_the_others_alone(folder):
    prompts = prompts_of(12, seed=15)
    with gpu_llm(folder, enable_prefix_caching=False) as llm:
        ids = [llm.add_request(prompt, greedy(30)) for prompt in prompts]
        whole = run_all(llm)
        again = [llm.add_request(prompt, greedy(30)) for prompt in prompts]
        for _ in range(10):
            llm.step()
        for request_id in again[::3]:
            assert llm.abort(request_id)
        last = run_all(llm)
        assert_idle(llm)
        for i, (before, after) in enumerate(zip(ids, again, strict=True)):
            found = last[after]["token_ids"]
            assert last[after]["finish_reason"] == ("abort" if i % 3 == 0 else "length")
            # ten tokens in the same batches; then in smaller ones, where near ties may flip
            assert found[:8] == whole[before]["token_ids"][:8]


@pytest.mark.parametrize("worker", ["prefill", "decode"])
def test_a_failed_launch_loses_no_request(folder, worker, monkeypatch):
    prompts = prompts_of(4, seed=16)
    with gpu_llm(folder, dtype="float32") as llm:
        wanted = llm.generate(prompts, greedy(10, logprobs=20))
    with gpu_llm(folder, dtype="float32", max_num_batched_tokens=64) as llm:
        ids = [llm.add_request(prompt, greedy(10)) for prompt in prompts]
        target = getattr(llm._core, worker)
        with monkeypatch.context() as patch:
            error = fail(RuntimeError("launch failed"))
            patch.setattr(target, "launch", on_call(2, target.launch, error))
            with pytest.raises(RuntimeError, match="launch failed"):
                llm.generate([[1, 2, 3]], greedy(50))
        last = run_all(llm)
        assert_idle(llm)
    found = [last[i] for i in ids]
    assert_same_or_near_ties(wanted, found, LOGIT_TOLERANCE["float32"])


def test_two_engines_on_one_gpu(folder):
    prompts = prompts_of(3, seed=17)
    options = {"enable_prefix_caching": False}  # a shorter prefill may round otherwise
    with gpu_llm(folder, **options) as one, gpu_llm(folder, seed=1, **options) as other:
        wanted = [tokens(one, prompts), tokens(other, prompts)]
        ids = [[llm.add_request(prompt, greedy()) for prompt in prompts] for llm in (one, other)]
        last: list[dict[int, dict]] = [{}, {}]
        while not (one.is_finished() and other.is_finished()):
            for llm, found in zip((one, other), last, strict=True):
                found |= {o["request_id"]: o for o in llm.step() if o["finished"]}
    assert wanted[0] != wanted[1]
    for i in range(2):
        assert [last[i][request_id]["token_ids"] for request_id in ids[i]] == wanted[i]


def test_the_caller_may_have_a_stream_and_a_graph_of_his_own(folder):
    with gpu_llm(folder, enable_prefix_caching=False) as llm:
        wanted = tokens(llm, prompts_of(3))
        before = torch.cuda.current_stream()
        with torch.cuda.stream(torch.cuda.Stream()):
            assert tokens(llm, prompts_of(3)) == wanted
        assert torch.cuda.current_stream() == before


def test_an_llm_gives_its_memory_back(folder):
    allocated = []
    for _ in range(3):
        with gpu_llm(folder) as llm:
            tokens(llm, prompts_of(5))
            pool_bytes = llm._core.kv_cache.blocks.nbytes
            inside = torch.cuda.memory_allocated()
        del llm
        gc.collect()
        torch.cuda.empty_cache()
        allocated.append(torch.cuda.memory_allocated())
        assert inside - allocated[-1] >= pool_bytes
    # the first one leaves what cuBLAS and the like keep for ever
    assert allocated[2] <= allocated[0]


def test_exit_frees_memory_while_the_llm_is_still_referred_to(folder):
    llm = gpu_llm(folder)
    pool_bytes = llm._core.kv_cache.blocks.nbytes
    before = torch.cuda.memory_allocated()
    llm.exit()
    assert before - torch.cuda.memory_allocated() >= pool_bytes


def test_the_pool_takes_the_share_asked_for(folder):
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    share = 1 - free / total + 0.15
    with gpu_llm(folder, num_kv_blocks=None, gpu_memory_utilization=share) as llm:
        tokens(llm, prompts_of(8))
        free, total = torch.cuda.mem_get_info()
        assert share - 0.05 <= 1 - free / total <= share + 0.01


def test_no_room_for_a_pool_is_an_error(folder):
    with pytest.raises(ValueError, match="gpu_memory_utilization must leave room"):
        gpu_llm(folder, num_kv_blocks=None, gpu_memory_utilization=0.001)
    with gpu_llm(folder) as llm:
        assert len(tokens(llm, [[1]], greedy(2))[0]) == 2
