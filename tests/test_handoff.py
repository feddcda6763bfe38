"""Handoff: blocks arrive where they were sent, nothing else changes, on every way there is."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import kernels
from engine import staging
from engine.handoff import KVLink, has_peer_access, runs
from engine.kv_cache import KVCache
from kernels import reference
from models.config import ModelConfig
from tests.checkpoints import save_random
from tests.strategies import DEVICE, assert_same_bits, permutation

BLOCK_SIZE = 4
WAYS = ["kernel", "staged"] + ["copy_engine"] * torch.cuda.is_available()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return ModelConfig.from_folder(save_random(tmp_path_factory.mktemp("model"), "qwen3"))


def cache(config, num_blocks: int, device: str = DEVICE, **options) -> KVCache:
    sizes = {"device": device, "dtype": torch.float16}
    made = KVCache(config, num_blocks, options.get("block_size", BLOCK_SIZE), **sizes)
    made.blocks.copy_(torch.randn(made.blocks.shape))
    if made.blocks.is_cuda:
        torch.cuda.synchronize(made.blocks.device)  # a link waits for no stream by itself
    return made


@given(
    way=st.sampled_from(WAYS),
    num_blocks=st.integers(0, 9),
    layers=st.sampled_from([None, range(2), range(1), range(1, 2)]),
    ops=st.sampled_from([kernels, reference]),
    room=st.sampled_from([1, 3000, staging.STAGED_BYTES]),
    is_run=st.booleans(),
    seed=st.integers(0, 99),
)
@example(way="staged", num_blocks=0, layers=None, ops=kernels, room=1, is_run=False, seed=0)
@example(  # block by block
    way="staged", num_blocks=9, layers=None, ops=reference, room=1, is_run=False, seed=0
)
def test_blocks_arrive_and_all_else_stays(config, way, num_blocks, layers, ops, room, is_run, seed):
    source, target = cache(config, 11), cache(config, 13)
    link = KVLink(source, target, ops, way)
    there = permutation(seed, 11)[:num_blocks].tolist()
    to = permutation(seed + 1, 13)[:num_blocks].tolist()
    if is_run:
        there, to = list(range(2, 2 + num_blocks)), list(range(3, 3 + num_blocks))
    sent, expected = source.blocks.clone(), target.blocks.clone()
    where = slice(None) if layers is None else slice(layers.start, layers.stop)
    expected[to, where] = sent[there, where]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "STAGED_BYTES", room)
        copy = link.open(there, to)
        copy.send(layers, so_far())
        copy.wait()
    assert copy.is_done
    assert copy.num_bytes == sent[there, where].numel() * 2
    assert_same_bits(target.blocks, expected)
    assert_same_bits(source.blocks, sent)


def so_far() -> list[torch.cuda.Event]:
    """What a copy has to wait for here: all that was launched."""
    return [torch.cuda.current_stream().record_event()] if DEVICE == "cuda" else []


@pytest.mark.parametrize("way", WAYS)
def test_layers_sent_one_after_the_other_arrive_all(config, way):
    source, target = cache(config, 6), cache(config, 6)
    link, blocks = KVLink(source, target, kernels, way), [3, 0, 5]
    copy = link.open(blocks, blocks[::-1])
    for layer in range(config.num_layers):
        copy.send(range(layer, layer + 1), so_far())
    copy.wait()
    assert copy.num_bytes == source.blocks[blocks].nbytes and copy.ms > 0
    assert_same_bits(target.blocks[blocks[::-1]], source.blocks[blocks])


def test_a_launch_that_fails_is_waited_for(config, monkeypatch):
    link = KVLink(cache(config, 3), cache(config, 3), reference, "kernel")
    copy = link.open([0, 1], [1, 2])
    with monkeypatch.context() as patch:
        patch.setattr(reference, "copy_blocks", None)
        with pytest.raises(TypeError):
            copy.send()
    copy.wait()
    assert copy.is_done and copy.num_bytes == 0


def test_a_way_that_is_not_there_is_refused(config):
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="way must be kernel or staged on a cpu, got 'copy_e"):
            KVLink(cache(config, 3), cache(config, 3), reference, "copy_engine")
        return
    with pytest.raises(ValueError, match="way must be staged from cuda:0 to cpu, got 'kernel'"):
        KVLink(cache(config, 3), cache(config, 3, "cpu"), kernels, "kernel")


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


@pytest.mark.parametrize("way", WAYS)
def test_the_link_is_measured(config, way):
    link = KVLink(cache(config, 6), cache(config, 4), kernels, way)
    assert link.measure(num_blocks=64) > 0
    assert_same_bits(link.target.blocks, link.source.blocks[:4])


def test_devices_of_two_kinds_have_no_direct_way():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert has_peer_access(cpu, cpu) and has_peer_access(gpu, gpu)
    assert not has_peer_access(cpu, gpu) and not has_peer_access(gpu, cpu)


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_waits_for_the_events_it_is_given(config, way):
    """Of the launch that fills its blocks, and of another stream that still writes where it goes;
    it is written over only once it is done."""
    source, target = cache(config, 64), cache(config, 64)
    link, blocks, stream = (
        KVLink(source, target, kernels, way),
        list(range(64)),
        torch.cuda.Stream(),
    )
    link.measure()
    busy = torch.randn(4096, 4096, device=DEVICE)
    for value in (1.0, 2.0, 3.0):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(40):
                busy @ busy
            target.blocks.fill_(7)
            written = stream.record_event()
        for _ in range(20):
            busy @ busy
        source.blocks.fill_(value)
        copy = link.start(blocks, blocks, [*so_far(), written])
        assert not copy.is_done
        copy.wait()
        assert (target.blocks == value).all()
        assert copy.ms > 0


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_starting_a_copy_does_not_wait(config, way):
    """Not even through host memory: the loop that starts it feeds two devices."""
    source, target = cache(config, 64), cache(config, 64)
    link, blocks = KVLink(source, target, kernels, way), list(range(64))
    link.measure()
    busy = torch.randn(8192, 8192, device=DEVICE)
    torch.cuda.synchronize()
    for _ in range(30):
        busy @ busy
    behind = so_far()
    copies = [link.start(blocks, blocks, behind) for _ in range(4)]
    assert not behind[0].query(), "the host was held up"
    for copy in copies:
        copy.wait()
    assert_same_bits(target.blocks, source.blocks)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("is_run", [True, False])
def test_blocks_arrive_on_the_other_gpu(config, way, is_run):
    source, target = cache(config, 40, "cuda:0"), cache(config, 50, "cuda:1")
    link = KVLink(source, target, kernels, way)
    there, to = permutation(0, 40).tolist(), permutation(1, 50)[:40].tolist()
    if is_run:
        there, to = list(range(40)), list(range(10, 50))
    for device in (0, 1):
        torch.cuda.synchronize(device)
    copy = link.start(there, to)
    copy.wait()
    assert_same_bits(target.blocks[to].cpu(), source.blocks[there].cpu())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_new_link_leaves_no_copy_to_memory_that_may_be_given_back(config):
    """Its first copy opens the way to the peer; the peer's memory goes back to the driver while
    the source is still busy with what came before."""
    # large ones, or what the first copy writes to would lie in a segment with theirs, and stay
    source, target = cache(config, 20_000, "cuda:0"), cache(config, 20_000, "cuda:1")
    assert target.blocks.nbytes > 1 << 20
    torch.cuda.empty_cache()
    for _ in range(3):
        with torch.cuda.device(0):
            torch.cuda._sleep(200_000_000)
        link = KVLink(source, target, kernels)
        torch.cuda.empty_cache()
        torch.cuda.synchronize("cuda:0")  # where a write to nowhere is reported
        link.start([0, 1], [2, 3]).wait()
        assert_same_bits(target.blocks[2:4].cpu(), source.blocks[:2].cpu())


@given(st.data())
def test_runs_take_every_block_once_and_rise_on_both_sides(data):
    num = data.draw(st.integers(1, 12))
    source, target = (data.draw(st.permutations(range(14)))[:num] for _ in range(2))
    if data.draw(st.booleans()):  # else runs would be few
        source, target = sorted(source), sorted(target)
    starts, lengths = runs(source, target)
    taken = [
        (a + i, b + i) for a, b, n in zip(*starts.tolist(), lengths.tolist(), strict=True)
        for i in range(n)
    ]  # fmt: skip
    assert taken == list(zip(source, target, strict=True))
    ends = [(a + n, b + n) for a, b, n in zip(*starts.tolist(), lengths.tolist(), strict=True)]
    begins = list(zip(*starts.tolist(), strict=True))
    assert not any(end == begin for end, begin in zip(ends, begins[1:], strict=False))
