"""KV blocks between pools: every bit of the blocks named, and nothing else."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import kernels
from kernels import reference
from tests.strategies import (
    DEVICE,
    assert_same_bits,
    dtypes,
    ints,
    permutation,
    randn,
    run_twice,
    seeds,
    sparse_pool,
)

shapes = st.tuples(
    st.integers(1, 3),
    st.just(2),
    st.sampled_from([1, 8, 16]),
    st.integers(1, 3),
    st.integers(1, 130) | st.just(256),
)


@given(
    shape=shapes,
    src_blocks=st.integers(1, 9),
    dst_blocks=st.integers(1, 9),
    count=st.integers(0, 9),
    one_layer=st.booleans(),
    id_dtype=st.sampled_from([torch.int32, torch.int64]),
    dtype=dtypes,
    seed=seeds,
)
@example((1, 2, 8, 1, 16), 3, 3, 0, False, torch.int64, torch.float16, 0)  # nothing to copy
@example((2, 2, 16, 1, 64), 3, 3, 2, False, torch.int32, torch.float16, 0)  # one full tile
@example((2, 2, 16, 1, 65), 3, 3, 2, False, torch.int32, torch.float16, 0)  # a little over it
def test_copy_blocks_matches_reference(
    shape, src_blocks, dst_blocks, count, one_layer, id_dtype, dtype, seed
):
    src, dst = randn(seed, (src_blocks, *shape), (dst_blocks, *shape), dtype=dtype)
    src[seed % src_blocks] = float("nan")  # an unused block: its bits move like any other
    count = min(count, dst_blocks)
    src_ids = (permutation(seed, 9)[:count] % src_blocks).to(id_dtype)
    dst_ids = permutation(seed, dst_blocks)[:count].to(id_dtype)
    expected = dst.cpu().clone()  # there torch keeps the bits of a NaN, on a GPU it need not
    where = (slice(None), seed % shape[0]) if one_layer else slice(None)
    reference.copy_blocks(src.cpu()[where], expected[where], src_ids.cpu(), dst_ids.cpu())
    assert kernels.copy_blocks(src[where], dst[where], src_ids, dst_ids) is None
    assert_same_bits(dst.cpu(), expected)


@run_twice
@given(shape=shapes, count=st.integers(0, 9), dtype=dtypes, seed=seeds)
def test_copy_blocks_gives_the_same_bits_again(shape, count, dtype, seed):
    src, dst = randn(seed, (9, *shape), (9, *shape), dtype=dtype)
    src_ids, dst_ids = permutation(seed, 9)[:count], permutation(seed + 1, 9)[:count]
    again = dst.clone()
    kernels.copy_blocks(src, dst, src_ids, dst_ids)
    kernels.copy_blocks(src, again, src_ids, dst_ids)
    assert_same_bits(again, dst)


def test_blocks_beyond_int32_offsets(tmp_path):
    pool = sparse_pool(tmp_path, 2**16 + 2, 2, 2, 32, 2, 128, dtype=torch.float16)
    (block,) = randn(0, (1, 2, 2, 32, 2, 128), dtype=torch.float16)
    last = ints([len(pool) - 1], torch.int64)
    kernels.copy_blocks(block, pool, ints([0], torch.int64), last)
    assert_same_bits(pool[-1], block[0])
    back = torch.zeros_like(block)
    kernels.copy_blocks(pool, back, last, ints([0], torch.int64))
    assert_same_bits(back, block)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_blocks_reach_the_peer_gpu():
    (src,) = randn(0, (8, 2, 2, 16, 2, 64), dtype=torch.bfloat16)
    dst = torch.zeros_like(src, device="cuda:1")
    ids = permutation(0, 8)
    kernels.copy_blocks(src, dst, ids, ids.flip(0))
    torch.cuda.synchronize(DEVICE)
    assert_same_bits(dst[ids.flip(0).cpu()].cpu(), src[ids].cpu())
