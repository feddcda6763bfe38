"""Host buffers: values arrive whole and in order, and a buffer is used again only when it may."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.host_buffers import SMALLEST, HostBuffers
from tests.strategies import DEVICE

device = torch.device(DEVICE)


def late() -> None:
    """Have the device be some 50 ms behind the host."""
    if DEVICE == "cuda":
        torch.cuda._sleep(10**8)


def wait() -> None:
    """Return when all copies are over."""
    if DEVICE == "cuda":
        torch.cuda.current_stream().synchronize()


@given(
    batches=st.lists(
        st.lists(st.integers(-(2**31), 2**31 - 1), max_size=300), min_size=1, max_size=6
    ),
    dtype=st.sampled_from([np.int32, np.int64]),
)
def test_what_is_sent_and_received_is_what_was_given(batches, dtype):
    buffers = HostBuffers(device)
    received = []
    for values in batches:
        tensor = buffers.send(values, dtype)
        assert tensor.device.type == DEVICE and tensor.dtype == getattr(torch, dtype.__name__)
        received.append(buffers.receive(tensor))
        tensor.fill_(7)  # as the next launch would
    wait()
    # in any order, and more than once
    for values, host in reversed(list(zip(batches, received, strict=True))):
        assert host.tolist() == host.tolist() == values


def test_shapes_are_kept():
    buffers = HostBuffers(device)
    assert buffers.send([[1, 2], [3, 4], [5, 6]], np.int64).tolist() == [[1, 2], [3, 4], [5, 6]]
    assert buffers.send([], np.int32).shape == (0,)


def test_a_buffer_is_kept_until_its_copy_is_over():
    buffers, sent = HostBuffers(device), []
    late()
    for i in range(5):
        sent.append(buffers.send([i] * 40, np.int64))
    num_buffers = len(buffers._sent[512])
    assert 1 <= num_buffers <= (5 if DEVICE == "cuda" else 1)
    assert [tensor.tolist() for tensor in sent] == [[i] * 40 for i in range(5)]
    for i in range(9):
        assert buffers.send([i] * 40, np.int64).tolist() == [i] * 40
    assert len(buffers._sent[512]) == num_buffers
    assert list(buffers._sent) == [512]


def test_a_buffer_is_received_into_again_once_it_was_read():
    buffers, tensor = HostBuffers(device), torch.arange(5, device=device)
    one, other = buffers.receive(tensor), buffers.receive(tensor + 1)
    wait()
    assert one.tolist() == [0, 1, 2, 3, 4]
    again = buffers.receive(tensor * 2)
    assert again._buffer is one._buffer and again._buffer is not other._buffer
    wait()
    assert (one.tolist(), other.tolist(), again.tolist()) == (
        [0, 1, 2, 3, 4], [1, 2, 3, 4, 5], [0, 2, 4, 6, 8],
    )  # fmt: skip
    assert buffers._received[SMALLEST] == [other._buffer, again._buffer]


def test_a_failure_to_fill_keeps_no_buffer():
    buffers = HostBuffers(device)
    with pytest.raises(ZeroDivisionError), buffers.sending(8):
        raise ZeroDivisionError
    assert not buffers._sent[SMALLEST]


def test_they_may_be_used_in_inference_mode_and_outside():
    buffers = HostBuffers(device)
    for is_on in (True, False, True):
        with torch.inference_mode(is_on):
            host = buffers.receive(buffers.send([1, 2], np.int64))
            wait()
            assert host.tolist() == [1, 2]
