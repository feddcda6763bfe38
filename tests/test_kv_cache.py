"""The pool: one block is one contiguous slab, and as many fit as the device has room for."""

import json

import pytest
import torch

from engine import LLM
from engine.kv_cache import (
    CPU_CACHE_BYTES,
    GRAPH_RESERVE_BYTES,
    KVCache,
    block_bytes,
    num_blocks_that_fit,
)
from models.config import ModelConfig
from tests.checkpoints import save_random
from tests.strategies import DEVICE

GB = 1 << 30
FIELDS = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 4096,
}
CONFIG = ModelConfig.from_dict(FIELDS)


def make(num_blocks=5, block_size=4, dtype=torch.float32) -> KVCache:
    return KVCache(CONFIG, num_blocks, block_size, device=DEVICE, dtype=dtype)


def test_a_block_is_one_slab_of_all_layers():
    cache = make()
    assert cache.blocks.shape == (5, 3, 2, 4, 2, 10)
    assert cache.blocks.is_contiguous()
    for block in cache.blocks:
        assert block.is_contiguous()
        assert block.nbytes == block_bytes(CONFIG, 4, torch.float32)
    assert (cache.num_blocks, cache.block_size) == (5, 4)


def test_layers_are_views_of_the_blocks():
    cache = make()
    assert len(cache.layers) == 3
    for i, layer in enumerate(cache.layers):
        assert layer.shape == (5, 2, 4, 2, 10)
        layer.fill_(i)
    assert (cache.blocks == torch.arange(3, device=DEVICE).view(1, 3, 1, 1, 1, 1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bytes_of_a_block(dtype):
    assert block_bytes(CONFIG, 16, dtype) == 3 * 2 * 16 * 2 * 10 * dtype.itemsize
    assert make(7, 2, dtype).blocks.nbytes == 7 * block_bytes(CONFIG, 2, dtype)


def fit(device, share=0.9, block_size=16, dtype=torch.float16) -> int:
    return num_blocks_that_fit(
        CONFIG, block_size, device=device, dtype=dtype, gpu_memory_utilization=share
    )


def test_a_cpu_gets_a_fixed_size():
    assert fit("cpu") == CPU_CACHE_BYTES // block_bytes(CONFIG, 16, torch.float16)
    assert fit("cpu", share=0.1) == fit("cpu")


def test_a_gpu_gives_its_share_less_what_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GB, 80 * GB))
    wanted = int(80 * GB * 0.9) - 10 * GB - GRAPH_RESERVE_BYTES
    assert fit("cuda:0") == wanted // block_bytes(CONFIG, 16, torch.float16)
    assert fit("cuda:0", share=1.0) > fit("cuda:0")


def test_no_room_names_the_option(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 * GB, 80 * GB))
    with pytest.raises(ValueError, match=r"gpu_memory_utilization must leave room .*got 0\.5"):
        fit("cuda:0", share=0.5)


def test_two_pools_live_side_by_side():
    one, other = make(), make()
    one.blocks.fill_(1)
    other.blocks.fill_(2)
    assert (one.blocks == 1).all() and (other.blocks == 2).all()


def test_num_kv_blocks_and_block_size_reach_the_pool(tmp_path):
    folder = save_random(tmp_path)
    with LLM(folder, device=DEVICE, num_kv_blocks=9, block_size=8, max_num_seqs=2) as llm:
        assert llm._core.kv_cache.blocks.shape[:4] == (9, 2, 2, 8)
        assert llm.stats()["num_kv_blocks"] == llm.stats()["num_free_kv_blocks"] == 9


def test_max_model_len_is_what_cache_and_model_allow(tmp_path):
    folder = save_random(tmp_path)
    longest = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    options = {"device": DEVICE, "max_num_seqs": 2, "max_num_batched_tokens": 64}
    for blocks, wanted in ((9, 9 * 16), (1000, longest)):
        with LLM(folder, num_kv_blocks=blocks, **options) as llm:
            assert llm._core.max_model_len == wanted
    with LLM(folder, num_kv_blocks=9, max_model_len=20, **options) as llm:
        assert llm._core.max_model_len == 20
