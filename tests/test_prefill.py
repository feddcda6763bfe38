"""PrefillWorker: padded launches against plain ones, with NaN wherever nothing should be read."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from types import ModuleType
from unittest.mock import Mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels
from engine import LLM, SamplingParams
from engine.base_scheduler import PrefillChunk
from engine.kv_cache import KVCache
from engine.prefill import (
    GRAPH_ROWS,
    TOKEN_BUCKETS,
    PrefillWorker,
    segments,
    token_buckets,
    warm_up_lengths,
)
from engine.request import Request
from experiments.shapes import SHAPES, write_config
from kernels import reference
from models.config import ModelConfig
from models.decoder import Decoder
from models.weights import dummy_weights, load_weights
from tests.checkpoints import save_random
from tests.strategies import DEVICE, assert_same_bits, permutation
from tests.test_llm import greedy, small_llm, token_ids

BLOCK_SIZE, NUM_BLOCKS, MAX_LEN = 8, 64, 128
BUCKETS = (16, 64, 96)
MAX_ROWS = GRAPH_ROWS + 4
SAMPLERS = [
    SamplingParams(temperature=0.0),
    SamplingParams(seed=1),
    SamplingParams(seed=2, temperature=0.7, top_k=5, top_p=0.9, min_p=0.01),
]


@pytest.fixture(autouse=True)
def _as_the_engine_runs() -> Iterator[None]:
    """Inference mode, and a stream of its own where there is a GPU: captures want one."""
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream() if on_gpu() else None):
        yield


@given(num_layers=st.integers(1, 90), groups=st.lists(st.integers(1, 9), min_size=1, max_size=6))
@example(num_layers=28, groups=[4, 3, 1])
@example(num_layers=1, groups=[4, 3, 1])
def test_segments_have_every_layer_in_turn_and_draw_last(num_layers, groups):
    parts = segments(num_layers, groups)
    assert [layer for part in parts for layer in part.layers] == list(range(num_layers))
    assert [part.draws for part in parts] == [False] * (len(parts) - 1) + [True]
    if len(groups) > 1:
        assert not parts[-1].layers and all(part.layers for part in parts[:-1])
        if num_layers >= sum(groups):
            for part, group in zip(parts[:-1], groups, strict=True):
                assert abs(len(part.layers) - num_layers * group / sum(groups)) < 1


@given(max_tokens=st.integers(1, 20_000), max_rows=st.integers(1, 600))
@example(max_tokens=1, max_rows=1)
@example(max_tokens=66, max_rows=2)
@example(max_tokens=65 * 64, max_rows=65)
def test_warm_up_launches_are_ones_that_may_come(max_tokens, max_rows):
    launches = warm_up_lengths(max_tokens, max_rows)
    assert all(min(lengths) > 0 for lengths in launches)
    assert max(map(sum, launches)) == max_tokens and max(map(len, launches)) <= max_rows
    assert ([65, 1] in launches) == (max_tokens >= 66 and max_rows >= 2)
    assert ([64] * 65 in launches) == (max_tokens >= 65 * 64 and max_rows >= 65)


def test_a_warm_up_stores_nothing(folder):
    """It runs before a cache is anybody's, and reads what nobody has written."""
    bench = Bench(load(folder, reference), BUCKETS)
    longest = len(bench.worker.buffers.hidden)
    assert longest not in BUCKETS and len(warm_up_lengths(longest, MAX_ROWS)[-1]) > 1
    bench.worker.warm_up()
    assert bench.kv_cache.blocks.isnan().all()
    bench.worker.buffers.hidden.fill_(float("nan"))
    chunks = chunks_of([(0, 9, 0), (0, 4, 0)])
    assert_near(
        bench.launch(chunks, tables_of(chunks, 0))[1],
        Bench(load(folder, reference), []).launch(chunks, tables_of(chunks, 0))[1],
    )


def on_gpu() -> bool:
    return DEVICE == "cuda"


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def folder(request, tmp_path_factory):
    changes = {"attention_bias": True} if request.param == "qwen3" else {}
    return save_random(tmp_path_factory.mktemp("model"), request.param, **changes)


def tensors_of(value: object) -> Iterator[Tensor]:
    """Those in a dataclass of them, workspaces included."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))


class Bench:
    """A PrefillWorker and its KV cache, everything in them poisoned before each launch."""

    def __init__(self, decoder: Decoder, buckets: Sequence[int], *, captured: bool = True) -> None:
        pool = None
        if captured and on_gpu() and decoder.ops is kernels:
            pool = torch.cuda.graph_pool_handle()
        dtype = decoder.weights.embedding.dtype
        sizes = {"device": torch.device(DEVICE), "dtype": dtype}
        self.kv_cache = KVCache(decoder.config, NUM_BLOCKS, BLOCK_SIZE, **sizes)
        self.kv_cache.blocks.fill_(float("nan"))
        self.worker = PrefillWorker(
            decoder,
            self.kv_cache,
            decoder.buffers(BUCKETS[-1] + 40, MAX_ROWS),
            max_model_len=MAX_LEN,
            buckets=buckets,
            graph_pool=pool,
            device=sizes["device"],
        )

    def launch(
        self,
        chunks: Sequence[PrefillChunk],
        tables: dict[int, list[int]],
        poison: float = float("nan"),
    ) -> tuple[list[int], Tensor]:
        """-> the drawn token ids and their logits [B, V]."""
        buffers, inputs = self.worker.buffers, self.worker._inputs
        for tensor in tensors_of(buffers):
            tensor.fill_(poison if tensor.is_floating_point() else -7)
        for static in inputs.values():  # -1 is no token, no row and no block
            static._bytes.fill_(255)
        self.worker._sampled.fill_(-7)
        launched, on_device = self.worker.launch(chunks, tables.__getitem__)
        found = launched.wait()
        assert on_device.tolist() == found
        assert [r for r, _ in launched.requests] == [c.request for c in chunks if c.is_last]
        return found, buffers.logits[: len(found)].clone()

    def owned(self, tables: dict[int, list[int]], stored: dict[int, int]) -> Tensor:
        """k and v of the stored tokens [n, L, 2, H_KV, D]; all other slots must still be NaN."""
        blocks = self.kv_cache.blocks.transpose(1, 3).flatten(0, 1)  # by slot
        slots = [
            tables[i][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
            for i, num_tokens in stored.items()
            for p in range(num_tokens)
        ]
        others = torch.ones(len(blocks), dtype=torch.bool, device=DEVICE)
        others[slots] = False
        assert blocks[others].isnan().all(), "something was stored that belongs to no request"
        return blocks[slots]


def load(folder, ops: ModuleType) -> Decoder:
    config = ModelConfig.from_folder(folder)
    weights = load_weights(config, folder, device=DEVICE, dtype=torch.float32)
    return Decoder(config, weights, MAX_LEN, ops)


def request_of(request_id: int, num_tokens: int, params: SamplingParams) -> Request:
    token_ids = [(37 * request_id + 11 * i * i + i) % 67 for i in range(num_tokens)]
    request = Request(request_id, token_ids, params, seed=request_id)
    request.num_in_flight = 1  # as the scheduler leaves it with its last chunk
    return request


def chunks_of(spans: Sequence[tuple[int, int, int]]) -> list[PrefillChunk]:
    """spans: (tokens computed before, tokens of this launch, tokens left for later) of each."""
    made = []
    for i, (start, num_tokens, num_left) in enumerate(spans):
        request = request_of(i, start + num_tokens + num_left, SAMPLERS[i % len(SAMPLERS)])
        made.append(PrefillChunk(request, start, num_tokens, num_left == 0, 0))
    return made


def tables_of(chunks: Sequence[PrefillChunk], seed: int) -> dict[int, list[int]]:
    """Scattered blocks for all tokens of each request."""
    free = permutation(seed, NUM_BLOCKS).tolist()
    return {
        c.request.request_id: [
            free.pop() for _ in range(-(-len(c.request.token_ids) // BLOCK_SIZE))
        ]
        for c in chunks
    }


def prefixes_of(chunks: Sequence[PrefillChunk]) -> list[PrefillChunk]:
    """What has to be computed before: nothing is drawn from it."""
    return [PrefillChunk(c.request, 0, c.start, False, 0) for c in chunks if c.start]


def sampled_again(chunks: Sequence[PrefillChunk], logits: Tensor) -> list[int]:
    """The tokens that the reference draws from these logits, row by row."""
    requests = [c.request for c in chunks if c.is_last]
    drawn = []
    for request, row in zip(requests, logits, strict=True):
        p = request.params
        values = {
            "temperature": torch.tensor([p.temperature]),
            "top_k": torch.tensor([p.top_k], dtype=torch.int32),
            "top_p": torch.tensor([p.top_p]),
            "min_p": torch.tensor([p.min_p]),
            "seeds": torch.tensor([request.seed]),
            "steps": torch.tensor([0], dtype=torch.int32),
        }
        drawn.append(reference.sample(row[None].cpu(), **values).item())
    return drawn


def assert_near(actual: Tensor, expected: Tensor) -> None:
    # values of the order of 1 to 10; fp32 sums in another order differ by some 1e-6 of it
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def compare(decoder: Decoder, spans: Sequence[tuple[int, int, int]], seed: int) -> None:
    """The same launches, padded and plain: logits, tokens drawn from them, k and v stored."""
    plain, padded = Bench(decoder, []), Bench(decoder, BUCKETS)
    chunks = chunks_of(spans)
    tables = tables_of(chunks, seed)
    stored = {c.request.request_id: c.start + c.num_tokens for c in chunks}
    launches = [prefix] if (prefix := prefixes_of(chunks)) else []
    for launch in [*launches, chunks]:
        assert plain.worker.bucket_of(launch) is None
        wanted, wanted_logits = plain.launch(launch, tables)
        found, logits = padded.launch(launch, tables)
        assert_near(logits, wanted_logits)
        assert found == sampled_again(launch, logits)
        assert wanted == sampled_again(launch, wanted_logits)
        again, same = padded.launch(launch, tables, poison=3e4)  # the first time it was NaN
        assert found == again
        assert_same_bits(same, logits)
    assert_near(padded.owned(tables, stored), plain.owned(tables, stored))


# (computed before, in this launch, left): no more than 96 tokens a launch
spans = st.lists(
    st.tuples(st.integers(0, 12), st.integers(1, 12), st.sampled_from([0, 0, 0, 5])),
    min_size=1,
    max_size=GRAPH_ROWS,
)
CASES = {
    "one token": [(0, 1, 0)],
    "one token behind a prefix": [(17, 1, 0)],
    "a whole bucket": [(0, 64, 0)],
    "one more than a bucket": [(0, 13, 0), (8, 4, 0)],
    "all rows": [(i % 3 * 8, 1 + i, 0) for i in range(GRAPH_ROWS)],
    "a bucket filled by all rows": [(0, 12, 0)] * GRAPH_ROWS,
    "nothing is drawn": [(0, 20, 3), (8, 9, 1)],
    "the last is cut": [(0, 5, 0), (3, 6, 0), (0, 7, 40)],
}
# few, for the interpreter takes seconds for each
INTERPRETED = ["one token behind a prefix", "a whole bucket", "one more than a bucket", "all rows"]
INTERPRETED += ["the last is cut"]


@given(spans=spans, seed=st.integers(0, 99))
@example(CASES["a bucket filled by all rows"], 0)
@example(CASES["nothing is drawn"], 1)
@settings(max_examples=20)
def test_padding_changes_nothing(folder, spans, seed):
    compare(load(folder, reference), spans, seed)


@pytest.mark.parametrize("case", CASES if on_gpu() else INTERPRETED)
def test_padding_changes_nothing_for_the_kernels(folder, case):
    compare(load(folder, kernels), CASES[case], 5)


def test_inputs_of_a_launch_are_gone_in_the_next(folder):
    """Fewer, shorter and other chunks after long ones, up and down the buckets."""
    bench = Bench(load(folder, reference), BUCKETS)
    fresh = Bench(load(folder, reference), BUCKETS)
    order = ["a bucket filled by all rows", "one token", "all rows", "nothing is drawn"]
    order += ["a whole bucket", "the last is cut", "one more than a bucket", "one token"]
    for seed, case in enumerate(order):
        chunks = chunks_of(CASES[case])
        tables = tables_of(chunks, seed)
        found = []
        for target in (bench, fresh):
            if prefix := prefixes_of(chunks):
                target.launch(prefix, tables)
            found.append(target.launch(chunks, tables))
        assert found[0][0] == found[1][0]
        assert_same_bits(found[0][1], found[1][1])
        fresh = Bench(fresh.worker.decoder, BUCKETS)


def test_the_smallest_bucket_that_holds_the_launch_is_taken(folder):
    worker = Bench(load(folder, reference), BUCKETS).worker
    sizes = {1: 16, 16: 16, 17: 64, 64: 64, 65: 96, 96: 96, 97: None}
    for num_tokens, size in sizes.items():
        assert worker.bucket_of(chunks_of([(0, num_tokens, 0)])) == size
        if num_tokens > 1:
            assert worker.bucket_of(chunks_of([(3, 1, 0), (0, num_tokens - 1, 2)])) == size
    assert worker.bucket_of(chunks_of([(0, 1, 0)] * GRAPH_ROWS)) == 16
    assert worker.bucket_of(chunks_of([(0, 1, 0)] * (GRAPH_ROWS + 1))) is None


@pytest.mark.parametrize("spans", [[(2, 3, 0)] * (GRAPH_ROWS + 2), [(0, 97, 0)], [(20, 100, 4)]])
def test_more_chunks_or_tokens_than_a_graph_holds_are_launched_as_they_are(
    folder, spans, monkeypatch
):
    decoder = load(folder, reference)
    bench, plain = Bench(decoder, BUCKETS), Bench(decoder, [])
    chunks = chunks_of(spans)
    tables = tables_of(chunks, 3)
    for target in (bench, plain):
        if prefix := prefixes_of(chunks):
            target.launch(prefix, tables)
    monkeypatch.setattr(bench.worker, "_upload", None)
    found, wanted = bench.launch(chunks, tables), plain.launch(chunks, tables)
    assert found[0] == wanted[0]
    assert_near(found[1], wanted[1])


def test_a_worker_of_fewer_rows_than_a_graph_has(folder):
    """max_num_seqs below GRAPH_ROWS: the buffers hold no more rows than that."""
    decoder = load(folder, reference)
    bench, plain = Bench(decoder, BUCKETS), Bench(decoder, [])
    small = decoder.buffers(BUCKETS[-1], 2)
    bench.worker = PrefillWorker(
        decoder,
        bench.kv_cache,
        small,
        max_model_len=MAX_LEN,
        buckets=BUCKETS,
        graph_pool=None,
        device=torch.device(DEVICE),
    )
    chunks = chunks_of([(0, 9, 0), (0, 4, 0)])
    tables = tables_of(chunks, 0)
    assert bench.worker.bucket_of(chunks) == 16
    assert bench.worker.bucket_of(chunks_of([(0, 1, 0)] * 3)) is None
    assert_near(bench.launch(chunks, tables)[1], plain.launch(chunks, tables)[1])


def test_warming_up_stores_nothing(folder):
    bench = Bench(load(folder, reference), BUCKETS)
    bench.kv_cache.blocks.zero_()  # its launches read block 0
    bench.worker.warm_up()
    assert not bench.kv_cache.blocks.any()


# which buckets


def config_of(model: str, folder) -> ModelConfig:
    return ModelConfig.from_folder(write_config(model, folder))


@pytest.mark.parametrize(
    ("model", "last"), [("Qwen3-0.6B", 2048), ("Qwen3-4B", 768), ("Qwen3-8B", 512)]
)
def test_buckets_end_where_the_gpu_takes_longer_than_the_host(model, last, tmp_path):
    wanted = [n for n in TOKEN_BUCKETS if n <= last]
    assert token_buckets(config_of(model, tmp_path), 8192) == wanted
    assert len(wanted) <= 10


@given(budget=st.integers(1, 5000), model=st.sampled_from(sorted(SHAPES)))
@example(budget=1, model="Qwen3-0.6B")
@example(budget=128, model="Qwen3-0.6B")
@example(budget=129, model="Qwen3-0.6B")
def test_buckets_hold_every_launch_of_a_small_token_budget(tmp_path_factory, budget, model):
    buckets = token_buckets(config_of(model, tmp_path_factory.mktemp("shape")), budget)
    unbounded = token_buckets(config_of(model, tmp_path_factory.mktemp("shape")), 10**6)
    assert buckets == sorted(set(buckets)) and buckets[0] >= 1
    assert buckets[-1] == min(budget, unbounded[-1])
    assert set(buckets) - {budget} <= set(TOKEN_BUCKETS)


def test_a_model_too_large_for_any_bucket_gets_none(folder):
    config = ModelConfig.from_folder(folder)
    huge = {f.name: getattr(config, f.name) for f in fields(config)} | {"hidden_size": 10**9}
    assert token_buckets(ModelConfig(**huge), 8192) == []


# in the engine


def padding_to(buckets: Sequence[int], llm: LLM) -> PrefillWorker:
    """Give the LLM a worker whose launches are padded, though no graphs can be captured here."""
    core = llm._core
    worker = core.prefill = PrefillWorker(
        core.prefill.decoder,
        core.kv_cache,
        core.prefill.buffers,
        max_model_len=core.max_model_len,
        buckets=sorted({min(n, llm.config.max_num_batched_tokens) for n in buckets}),
        graph_pool=None,
        device=core.device,
    )
    worker._upload = Mock(wraps=worker._upload)
    return worker


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 7},
        {"num_kv_blocks": 12, "block_size": 4, "enable_prefix_caching": False},
        {"max_num_seqs": 3, "max_num_batched_tokens": 20, "block_size": 4},
    ],
    ids=["roomy", "tiny budget", "preempted", "few rows"],
)
def test_an_engine_with_padded_prefill_gives_the_same_tokens(folder, options):
    prompts = [[(7 * i + 3 * j) % 60 for j in range(1 + 5 * i % 23)] for i in range(12)]
    prompts += [[*prompt, 1, 2] for prompt in prompts[-4:]]  # prefixes to be found
    params = [greedy(6 + i % 9, ignore_eos=True, logprobs=2) for i in range(len(prompts))]
    found = []
    for buckets in ([], [16, 64]):
        with small_llm(folder, **options) as llm:
            worker = padding_to(buckets, llm)
            found.append([llm.generate(prompts, params) for _ in range(2)])
            assert bool(worker._upload.call_count) == bool(buckets)
            num_preemptions = llm.stats()["num_preemptions"]
            assert (num_preemptions > 0) == (options.get("num_kv_blocks") == 12)
    for plain, padded in zip(*found, strict=True):
        assert token_ids(plain) == token_ids(padded)
        for one, other in zip(plain, padded, strict=True):
            assert one["metrics"]["num_cached_tokens"] == other["metrics"]["num_cached_tokens"]
            for a, b in zip(one["logprobs"], other["logprobs"], strict=True):
                assert a == pytest.approx(b, abs=1e-4)


# on the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_replay_gives_the_bits_of_the_same_step_launched_kernel_by_kernel(tmp_path, dtype):
    config = ModelConfig.from_folder(write_config("Qwen3-0.6B", tmp_path, num_hidden_layers=2))
    weights = dummy_weights(config, device=DEVICE, dtype=dtype)
    decoder = Decoder(config, weights, MAX_LEN, kernels)
    graphed, stepped = Bench(decoder, BUCKETS), Bench(decoder, BUCKETS, captured=False)
    graphed.worker.warm_up()
    assert sorted(graphed.worker.graphs.captured) == [(size, 0) for size in BUCKETS]
    assert graphed.worker.graphs.capture_ms > 0 and not stepped.worker.graphs.captured
    for seed, case in enumerate(CASES):
        chunks = chunks_of(CASES[case])
        tables = tables_of(chunks, seed)
        stored = {c.request.request_id: c.start + c.num_tokens for c in chunks}
        found = []
        for bench in (graphed, stepped):
            bench.kv_cache.blocks.fill_(float("nan"))
            if prefix := prefixes_of(chunks):
                bench.launch(prefix, tables)
            found.append((*bench.launch(chunks, tables), bench.owned(tables, stored)))
        assert found[0][0] == found[1][0]
        assert_same_bits(found[0][1], found[1][1])
        assert_same_bits(found[0][2].flatten(), found[1][2].flatten())
        assert not found[0][1].isnan().any()
