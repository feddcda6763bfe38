"""Handoff: blocks arrive where they were sent, nothing else changes, on every way there is."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import kernels
from engine import handoff
from engine.handoff import KVLink, has_peer_access
from engine.kv_cache import KVCache
from kernels import reference
from models.config import ModelConfig
from tests.checkpoints import save_random
from tests.strategies import DEVICE, assert_same_bits, permutation

BLOCK_SIZE = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return ModelConfig.from_folder(save_random(tmp_path_factory.mktemp("model"), "qwen3"))


def cache(config, num_blocks: int, device: str = DEVICE, **options) -> KVCache:
    sizes = {"device": device, "dtype": torch.float16}
    made = KVCache(config, num_blocks, options.get("block_size", BLOCK_SIZE), **sizes)
    made.blocks.copy_(torch.randn(made.blocks.shape))
    return made


@given(
    way=st.sampled_from(["direct", "staged"]),
    num_blocks=st.integers(0, 9),
    layer=st.none() | st.just(1),
    ops=st.sampled_from([kernels, reference]),
    room=st.sampled_from([1, 3000, handoff.STAGED_BYTES]),
    seed=st.integers(0, 99),
)
@example(way="staged", num_blocks=0, layer=None, ops=kernels, room=1, seed=0)
@example(way="staged", num_blocks=9, layer=None, ops=reference, room=1, seed=0)  # a block at a time
def test_blocks_arrive_and_all_else_stays(config, way, num_blocks, layer, ops, room, seed):
    source, target = cache(config, 11), cache(config, 13)
    link = KVLink(source, target, ops)
    assert link.way == "direct"
    link.way = way
    there = permutation(seed, 11)[:num_blocks].tolist()
    to = permutation(seed + 1, 13)[:num_blocks].tolist()
    sent, expected = source.blocks.clone(), target.blocks.clone()
    where = slice(None) if layer is None else layer
    expected[to, where] = sent[there, where]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handoff, "STAGED_BYTES", room)
        copy = link.start(there, to, layer=layer)
        copy.wait()
    assert copy.is_done
    assert copy.num_blocks == num_blocks
    assert copy.num_bytes == sent[there, where].numel() * 2
    assert_same_bits(target.blocks, expected)
    assert_same_bits(source.blocks, sent)


def test_pools_of_other_blocks_are_refused(config):
    source = cache(config, 3)
    with pytest.raises(ValueError, match=r"target must hold blocks of torch.float16 \[.*\], got"):
        KVLink(source, cache(config, 3, block_size=8), kernels)
    other = cache(config, 3)
    other.blocks = other.blocks.float()
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        KVLink(source, other, kernels)


def test_as_many_blocks_must_arrive_as_are_sent(config):
    link = KVLink(cache(config, 3), cache(config, 3), kernels)
    with pytest.raises(ValueError, match="target_blocks must be 2, as the source's, got 1"):
        link.start([0, 1], [2])


def test_the_link_is_measured_where_there_is_a_clock(config):
    link = KVLink(cache(config, 6), cache(config, 4), kernels)
    gb_s = link.measure(num_blocks=64)
    assert (gb_s is None) == (DEVICE == "cpu")
    assert gb_s is None or gb_s > 0
    assert_same_bits(link.target.blocks, link.source.blocks[:4])


def test_devices_of_two_kinds_have_no_direct_way():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert has_peer_access(cpu, cpu) and has_peer_access(gpu, gpu)
    assert not has_peer_access(cpu, gpu) and not has_peer_access(gpu, cpu)


@pytest.mark.gpu
def test_a_copy_waits_for_what_fills_its_blocks(config):
    """Sent while the writes before it are still queued, and written over only behind its event."""
    source, target = cache(config, 64), cache(config, 64)
    link = KVLink(source, target, kernels)
    link.measure()
    blocks = list(range(64))
    busy = torch.randn(4096, 4096, device=DEVICE)
    for value in (1.0, 2.0, 3.0):
        torch.cuda.synchronize()
        for _ in range(20):
            busy @ busy
        source.blocks.fill_(value)
        copy = link.start(blocks, blocks)
        assert not copy.is_done
        copy.wait()
        assert (target.blocks == value).all()
        assert copy.gb_s > 0


@pytest.mark.gpu
def test_a_copy_waits_for_the_events_it_is_given(config):
    """Of another stream, which still writes the target's blocks."""
    source, target = cache(config, 8), cache(config, 8)
    link, blocks, busy = KVLink(source, target, kernels), list(range(8)), torch.randn(4096, 4096)
    link.measure()
    busy, stream, written = busy.to(DEVICE), torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(20):
            busy @ busy
        target.blocks.fill_(7)
        written.record()
    copy = link.start(blocks, blocks, after=[written])
    assert not copy.is_done
    copy.wait()
    assert_same_bits(target.blocks, source.blocks)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("way", ["direct", "staged"])
def test_blocks_arrive_on_the_other_gpu(config, way):
    source, target = cache(config, 40, "cuda:0"), cache(config, 50, "cuda:1")
    link = KVLink(source, target, kernels)
    link.way = way
    there, to = permutation(0, 40).tolist(), permutation(1, 50)[:40].tolist()
    copy = link.start(there, to)
    copy.wait()
    assert_same_bits(target.blocks[to].cpu(), source.blocks[there].cpu())
