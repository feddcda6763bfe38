"""The whole model against transformers: the tokens of a real one, the logits of odd tiny ones."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import kernels
from engine import LLM, SamplingParams
from engine.base_scheduler import PrefillChunk
from engine.batch import PrefillBatch, prefill_columns
from engine.host_buffers import HostBuffers
from engine.kv_cache import KVCache
from engine.request import Request
from kernels import reference
from models.config import ModelConfig
from models.decoder import AttentionBatch, Decoder
from models.fetch import resolve
from models.weights import load_weights
from tests.checkpoints import save_random, transformers_model
from tests.decode_steps import decoder_of
from tests.strategies import DEVICE

NUM_NEW = 48
SHARED = "Once upon a time, in a small village by the sea, there lived an old man who " * 3
PROMPTS = [
    "The",
    "The capital of France is",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "今日は天気がいいですね。",
    "😀🚀 emoji, naïve café — and 1234567890 digits",
    "One two three four five six seven eight nine ten eleven " * 6,
    SHARED + "mended nets.",
]
SHARING = [SHARED + "fished", SHARED + "sang", SHARED, SHARED + "sang"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_NEW)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Two threads on a busy core wait for each other at every product."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def wanted() -> dict[str, list[int]]:
    """What transformers answers, one prompt at a time."""
    folder = resolve("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = {}
    for prompt in dict.fromkeys([*PROMPTS, *SHARING]):
        token_ids = torch.tensor([tokenizer.encode(prompt)])
        output = model.generate(token_ids, do_sample=False, max_new_tokens=NUM_NEW)
        answers[prompt] = output[0, token_ids.shape[1] :].tolist()
    return answers


def smollm2(**options) -> LLM:
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 512, "num_kv_blocks": 256}
    return LLM("smollm2", device="cpu", **sizes | options)


def tokens(llm: LLM, prompts: Sequence[str]) -> dict[str, list[int]]:
    outputs = llm.generate(prompts, GREEDY)
    return {p: o["token_ids"] for p, o in zip(prompts, outputs, strict=True)}


def only(wanted: dict[str, list[int]], prompts: Sequence[str]) -> dict[str, list[int]]:
    return {prompt: wanted[prompt] for prompt in prompts}


def test_smollm2_as_one_batch_and_one_by_one(wanted):
    with smollm2(enable_prefix_caching=False) as llm:
        assert tokens(llm, PROMPTS) == only(wanted, PROMPTS)
        for prompt in PROMPTS:
            assert tokens(llm, [prompt]) == only(wanted, [prompt])


def test_smollm2_with_prompts_in_chunks_of_seven(wanted):
    with smollm2(max_num_batched_tokens=7, enable_prefix_caching=False) as llm:
        assert tokens(llm, PROMPTS) == only(wanted, PROMPTS)
        assert llm.stats()["num_prefill_launches"] > 20


def test_smollm2_with_prefix_caching(wanted):
    with smollm2() as llm:
        first = llm.generate(SHARING[:1], GREEDY)
        assert first[0]["metrics"]["num_cached_tokens"] == 0
        for _ in range(2):
            outputs = llm.generate(SHARING, GREEDY)
            for prompt, output in zip(SHARING, outputs, strict=True):
                num_cached = output["metrics"]["num_cached_tokens"]
                assert num_cached >= 16 and num_cached % 16 == 0
                assert output["token_ids"] == wanted[prompt]


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 1000.0,
}
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 5000.0}


def gqa(num_heads: int, num_kv_heads: int, head_dim: int, **more) -> dict:
    heads = {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads}
    return heads | {"head_dim": head_dim} | more


CASES = {
    "qwen3": ("qwen3", {}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3 bias": ("qwen3", {"attention_bias": True}),
    "qwen3 heads wider than hidden": ("qwen3", gqa(6, 2, 32)),
    "qwen3 8:1": ("qwen3", gqa(8, 1, 16)),
    "qwen2": ("qwen2", {}),
    "qwen2 14:2 tied": ("qwen2", gqa(14, 2, 8, hidden_size=112, tie_word_embeddings=True)),
    "llama": ("llama", {}),
    "llama bias": ("llama", {"attention_bias": True}),
    "llama 9:3 tied": ("llama", gqa(9, 3, 10, hidden_size=90, tie_word_embeddings=True)),
    "llama llama3": ("llama", gqa(4, 2, 16, rope_parameters=LLAMA3)),
    "llama linear": ("llama", {"rope_parameters": LINEAR}),
    "llama 1:1": ("llama", gqa(1, 1, 24)),
    "llama no groups": ("llama", gqa(3, 3, 8)),
    "odd sizes": ("llama", gqa(3, 1, 20, hidden_size=90, intermediate_size=77, vocab_size=131)),
    "odd hidden": ("qwen3", gqa(5, 5, 6, hidden_size=35, intermediate_size=1, vocab_size=3)),
    "rms_norm_eps": ("qwen2", {"rms_norm_eps": 0.1}),
    "one layer": ("qwen3", {"num_hidden_layers": 1}),
}
INTERPRETED = ["qwen3 bias", "qwen2 14:2 tied", "llama 9:3 tied", "odd sizes"]
INTERPRETED += ["odd hidden", "llama 1:1"]  # few, for the interpreter takes seconds for each


@dataclass
class Runner:
    """A decoder and a KV cache with scattered blocks, driven by hand: logits of every token."""

    decoder: Decoder
    block_size: int
    tables: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self):
        config = self.decoder.config
        dtype = self.decoder.weights.embedding.dtype
        self.cache = KVCache(config, 96, self.block_size, device=DEVICE, dtype=dtype)
        self.free = torch.randperm(96, generator=torch.Generator().manual_seed(1)).tolist()

    def prefill(self, chunks: Sequence[tuple[int, list[int], int]]) -> list[Tensor]:
        """chunks: request_id, its tokens so far, how many of them are computed already."""
        scheduled = []
        for request_id, token_ids, start in chunks:
            self._grow(request_id, len(token_ids))
            request = Request(request_id, token_ids, SamplingParams())
            scheduled.append(PrefillChunk(request, start, len(token_ids) - start, False, 0))
        columns = prefill_columns(scheduled, self.tables.__getitem__, self.block_size)
        batch = PrefillBatch.of(columns, HostBuffers(torch.device(DEVICE)))
        logits = self._logits(batch.token_ids, batch.attention, decode=False)
        return list(logits.split([chunk.num_tokens for chunk in scheduled]))

    def decode(self, rows: Sequence[tuple[int, int, int]]) -> Tensor:
        """rows: request_id, its newest token, that token's position. -> [B, V]"""
        for request_id, _, position in rows:
            self._grow(request_id, position + 1)
        width = max(len(self.tables[r]) for r, _, _ in rows)
        padded = [self.tables[r] + [0] * (width - len(self.tables[r])) for r, _, _ in rows]
        positions = torch.tensor([p for _, _, p in rows], device=DEVICE)
        table = torch.tensor(padded, dtype=torch.int32, device=DEVICE)
        blocks = table.gather(1, positions[:, None] // self.block_size)[:, 0].long()
        batch = AttentionBatch(
            positions=positions,
            slot_mapping=blocks * self.block_size + positions % self.block_size,
            block_table=table,
            context_lens=(positions + 1).int(),
        )
        return self._logits(torch.tensor([t for _, t, _ in rows], device=DEVICE), batch, True)

    def _logits(self, token_ids: Tensor, batch: AttentionBatch, decode: bool) -> Tensor:
        block_size = self.block_size if decode else None
        buffers = self.decoder.buffers(len(token_ids), len(token_ids), block_size=block_size)
        self.decoder.embed(token_ids, buffers)
        self.decoder.layers(buffers, batch, self.cache.layers)
        return self.decoder.lm_head(buffers.hidden, buffers).cpu()

    def _grow(self, request_id: int, num_tokens: int) -> None:
        table = self.tables.setdefault(request_id, [])
        while len(table) * self.block_size < num_tokens:
            table.append(self.free.pop())


def runner(folder: Path, ops: ModuleType, block_size: int) -> Runner:
    config = ModelConfig.from_folder(folder)
    weights = load_weights(config, folder, device=DEVICE, dtype=torch.float32)
    return Runner(Decoder(config, weights, 512, ops), block_size)


def assert_logits(actual: Tensor, expected: Tensor) -> None:
    # logits are of the order of 1 to 10 here; fp32 sums in another order differ by some 1e-6 of it
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "ops"),
    [
        *(pytest.param(case, reference, id=f"{case}-reference") for case in CASES),
        *(pytest.param(case, kernels, id=f"{case}-triton") for case in INTERPRETED),
    ],
)
@torch.inference_mode()
def test_logits_of_every_family(case, ops, tmp_path):
    """Whole prompts, prompts in two chunks, then steps of one token each, all in ragged batches."""
    family, changes = CASES[case]
    folder = save_random(tmp_path, family, **changes)
    ours, theirs = runner(folder, ops, block_size=8), transformers_model(folder)
    generator = torch.Generator().manual_seed(7)
    vocab_size = theirs.config.vocab_size
    # prompt lengths of 1, and of one less, none and one more than a multiple of the block
    texts = [
        torch.randint(vocab_size, (num_tokens + 3,), generator=generator).tolist()
        for num_tokens in (1, 7, 8, 9, 40)
    ]
    expected = [theirs(torch.tensor([text])).logits[0] for text in texts]
    prompts = [(i, text[:-3], 0) for i, text in enumerate(texts)]
    whole = ours.prefill(prompts[:3])
    first = ours.prefill([(i, text[: len(text) // 2], 0) for i, text, _ in prompts[3:]])
    rest = ours.prefill([(i, text, len(text) // 2) for i, text, _ in prompts[3:]])
    logits = [*whole, *(torch.cat(parts) for parts in zip(first, rest, strict=True))]
    for actual, wanted in zip(logits, expected, strict=True):
        assert_logits(actual, wanted[:-3])
    for step in (-3, -2, -1):
        rows = [(i, text[step], len(text) + step) for i, text in enumerate(texts)]
        assert_logits(ours.decode(rows), torch.stack([wanted[step] for wanted in expected]))


SAMPLERS = [
    SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True),
    SamplingParams(seed=1, max_tokens=4, ignore_eos=True),
    SamplingParams(seed=2, temperature=0.7, top_k=5, max_tokens=4, ignore_eos=True),
    SamplingParams(seed=3, top_p=0.8, max_tokens=4, ignore_eos=True),
    SamplingParams(seed=4, temperature=1.5, min_p=0.05, max_tokens=4, ignore_eos=True),
    SamplingParams(seed=5, top_k=9, top_p=0.9, min_p=0.02, max_tokens=4, ignore_eos=True),
]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("qwen3", "float32"), ("qwen2", "float16"), ("llama", "float16")],
)
def test_triton_kernels_and_references_choose_the_same_tokens(family, dtype, tmp_path):
    folder = save_random(tmp_path, family, tie_word_embeddings=family == "llama")
    prompts = [[5 + i] * (1 + 4 * i) + [9, 1, 3] for i in range(len(SAMPLERS))]
    found = []
    for name in ("reference", "triton"):
        options = {"device": DEVICE, "dtype": dtype, "kernels": name, "num_kv_blocks": 40}
        with LLM(folder, max_num_seqs=4, max_num_batched_tokens=16, **options) as llm:
            outputs = llm.generate(prompts, SAMPLERS)
            found.append([output["token_ids"] for output in outputs])
    assert found[0] == found[1]
    assert len({token_id for token_ids in found[0] for token_id in token_ids}) > 8


def test_decode_scratch_is_for_tables_of_blocks_longer_than_any_request(tmp_path):
    decoder = decoder_of(save_random(tmp_path, "llama"), kernels)
    workspace = decoder.buffers(2, 2, block_size=4096).workspace
    assert workspace.partial.shape[1] == 16  # splits of 256 tokens
