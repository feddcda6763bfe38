"""Green contexts over a stand-in for the driver: what is made, how it ends, how it fails."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from green import driver as driver_module
from green import streams as streams_module
from green.driver import Driver, GreenContextError, GreenContextUnsupported, load_driver
from green.partition import Grain, Partition, grain, legal_splits
from green.streams import GreenStreams
from tests.fake_driver import Code, FakeDriver

HOPPER = (9, 0)
CREATING = [
    "cuDriverGetVersion",
    "cuDeviceGet",
    "cuDeviceGetDevResource",
    "cuDevSmResourceSplitByCount",
    "cuDevResourceGenerateDesc",
    "cuGreenCtxCreate",
    "cuGreenCtxGetDevResource",
    "cuGreenCtxStreamCreate",
]


@pytest.fixture(autouse=True)
def hopper(monkeypatch) -> None:
    """torch as on a machine with an H100, as far as green contexts ask."""
    properties = SimpleNamespace(multi_processor_count=132, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: (handle, device))


def with_fake(fake: FakeDriver, asked=(48, 84)) -> GreenStreams:
    """The same as `GreenStreams.of` on a machine with that driver, or of a Partition."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams_module, "load_driver", lambda: _checked(fake))
        if isinstance(asked, Partition):
            return GreenStreams(asked, "cuda")
        return GreenStreams.of(asked, "cuda")


def _checked(fake: FakeDriver) -> Driver:
    driver = Driver(fake)
    driver.call("cuDriverGetVersion")
    return driver


def test_a_partition_is_made_and_ends():
    fake = FakeDriver()
    with with_fake(fake) as green:
        assert green.granted == green.partition.granted == (48, 84)
        assert green.partition.asked == (48, 84)
        handles = [handle for handle, device in green.streams]
        assert handles == list(fake.streams) and len(fake.contexts) == 2
        assert green.streams[0][1] == torch.device("cuda", 0)
    assert not fake.contexts and not fake.streams and green.streams == ()
    assert fake.calls[-4:] == ["cuStreamDestroy"] * 2 + ["cuGreenCtxDestroy"] * 2
    green.close()
    assert fake.calls.count("cuGreenCtxDestroy") == 2


def test_the_device_is_waited_for_before_anything_ends(monkeypatch):
    fake = FakeDriver()
    green = with_fake(fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: fake.calls.append("wait"))
    green.close()
    assert fake.calls[-5:] == ["wait"] + ["cuStreamDestroy"] * 2 + ["cuGreenCtxDestroy"] * 2


DEVICES = [((9, 0), 132), ((8, 0), 108), ((8, 6), 28), ((7, 0), 20)]  # and SMs


@given(st.sampled_from(DEVICES), st.integers(1, 3), st.data())
def test_stages_have_sms_of_their_own(device, num_stages, data):
    capability, num_sms = device
    if num_stages == 3 and num_sms == 108:
        num_sms = 36  # their number grows with the cube
    asked = data.draw(st.sampled_from(legal_splits(num_sms, capability, num_stages)))
    fake = FakeDriver(num_sms=num_sms, grain=grain(capability))
    partition = Partition.of(asked, num_sms, capability)
    with with_fake(fake, partition) as green:
        sets = [set(sms) for sms in fake.contexts.values()]
        assert tuple(map(len, sets)) == green.granted == asked
        assert sum(map(len, sets)) == len(set().union(*sets))


def test_several_partitions_live_at_once():
    fake = FakeDriver()
    first, second = with_fake(fake, (48, 84)), with_fake(fake, (16, 16))
    assert len(fake.contexts) == len(fake.streams) == 4 and second.granted == (16, 16)
    first.close()
    assert [len(sms) for sms in fake.contexts.values()] == [16, 16]
    second.close()
    assert not fake.contexts


@pytest.mark.parametrize("asked", [(48, 84), (16, 32), (64,)])
@pytest.mark.parametrize("call", CREATING)
@pytest.mark.parametrize("let_through", [0, 1])
def test_what_was_made_before_an_error_is_destroyed(call, let_through, asked):
    fake = FakeDriver(fails_at=(call, let_through, Code.CUDA_ERROR_OUT_OF_MEMORY))
    try:
        green = with_fake(fake, asked)
    except GreenContextError as error:
        assert (error.call, error.code, error.name) == (call, 2, "CUDA_ERROR_OUT_OF_MEMORY")
        assert "free memory" in error.advice and call in str(error)
    else:
        assert fake.calls.count(call) <= let_through
        green.close()
    assert not fake.contexts and not fake.streams
    assert Code.CUDA_ERROR_INVALID_CONTEXT not in fake.codes


@pytest.mark.parametrize("call", ["cuStreamDestroy", "cuGreenCtxDestroy"])
def test_an_error_while_closing_leaves_the_others_destroyed(call):
    fake = FakeDriver(fails_at=(call, 0, Code.CUDA_ERROR_INVALID_CONTEXT))
    green = with_fake(fake)
    with pytest.raises(GreenContextError, match=f"{call} failed with CUDA_ERROR_INVALID_CONTEXT"):
        green.close()
    assert fake.calls.count("cuStreamDestroy") == fake.calls.count("cuGreenCtxDestroy") == 2
    green.close()


def test_the_wrong_order_is_an_error_of_the_stand_in():
    """Else the tests above would prove nothing."""
    fake = FakeDriver()
    green = with_fake(fake)
    with pytest.raises(GreenContextError, match="cuGreenCtxDestroy"):
        Driver(fake).call("cuGreenCtxDestroy", next(iter(fake.contexts)))
    with pytest.raises(GreenContextError, match="cuStreamDestroy"):
        green.close()


def test_a_driver_that_makes_too_few_groups():
    fake = FakeDriver(groups_made=3)
    with pytest.raises(GreenContextError, match="3 of 6 groups of 8 SMs: ask for fewer, or all"):
        with_fake(fake, (16, 32))
    assert not fake.contexts


def test_sms_that_the_driver_cannot_split_are_its_error():
    fake = FakeDriver()
    beyond = Partition(asked=(133,), granted=(133,), num_sms=133, grain=Grain(1, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams_module, "load_driver", lambda: Driver(fake))
        with pytest.raises(GreenContextError, match="legal_splits") as caught:
            GreenStreams(beyond, "cuda:0")
    assert caught.value.code == 915 and not isinstance(caught.value, GreenContextUnsupported)


def test_bad_counts_are_refused_before_the_driver_is_asked():
    fake = FakeDriver()
    with pytest.raises(ValueError, match="at most the device's 132 SMs"):
        with_fake(fake, (96, 96))
    assert not fake.calls


def test_not_supported_is_told_apart():
    for name, code in (("cuGreenCtxCreate", 1), ("cuDeviceGetDevResource", 0)):
        fake = FakeDriver(fails_at=(name, code, Code.CUDA_ERROR_NOT_SUPPORTED))
        with pytest.raises(
            GreenContextUnsupported, match=f"the driver says so of {name}"
        ) as caught:
            with_fake(fake)
        assert (caught.value.call, caught.value.code) == (name, 801)
        assert caught.value.reason and isinstance(caught.value, GreenContextError)
        assert not fake.contexts


def test_a_call_that_the_driver_lacks_is_not_supported():
    def lacking(*args: object) -> None:
        raise RuntimeError('Function "cuGreenCtxStreamCreate" not found')

    fake = FakeDriver()
    fake.cuGreenCtxStreamCreate = lacking
    with pytest.raises(GreenContextUnsupported, match=r"cuGreenCtxStreamCreate.* not found"):
        with_fake(fake)
    assert not fake.contexts
    with pytest.raises(GreenContextUnsupported, match="cuGreenCtxNew"):
        Driver(fake).call("cuGreenCtxNew")


@pytest.mark.parametrize("name", ["CUdevResourceType", "CUgreenCtxCreate_flags", "CUstream_flags"])
@pytest.mark.parametrize("is_whole", [False, True])
def test_constants_that_the_package_lacks_are_not_supported(monkeypatch, name, is_whole):
    fake = FakeDriver()
    if is_whole:
        monkeypatch.delattr(FakeDriver, name)
    else:
        monkeypatch.setattr(FakeDriver, name, SimpleNamespace())
    with pytest.raises(GreenContextUnsupported, match=f"no green contexts: {name}.* no attribute"):
        with_fake(fake)
    assert not fake.contexts and not fake.streams


def test_an_old_driver_is_not_supported(monkeypatch):
    monkeypatch.setattr(driver_module, "_import_api", lambda: FakeDriver(version=12040))
    with pytest.raises(GreenContextUnsupported, match=r"of CUDA 12\.5 or later, got 12\.4"):
        load_driver()
    monkeypatch.setattr(driver_module, "_import_api", lambda: FakeDriver(version=12050))
    assert load_driver().call("cuDeviceGet", 0) == 0


def test_a_machine_without_cuda_python_or_a_gpu_is_not_supported(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(GreenContextUnsupported, match="cuda-python must be installed, got:"):
        load_driver()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cpu", "cuda:0"):
        with pytest.raises(GreenContextUnsupported, match=f"a GPU of this machine, got {device}"):
            GreenStreams.of((48, 84), device)


def test_importing_green_starts_nothing():
    code = (
        "import sys, torch, green.partition, green.driver, green.streams;"
        "assert not torch.cuda.is_initialized();"
        "print('triton' in sys.modules)"
    )
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, "False"), result.stderr
