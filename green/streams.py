"""A Partition made real: a green context and a stream for each stage, and the SMs it was granted.

Work that is launched on a stage's stream runs on that stage's SMs alone; memory, modules and events
belong to the device as ever. Under the capture of a CUDA graph stages fork and join by ordinary
stream events, and each captured kernel keeps the SMs of the stream that it was captured on,
whichever stream replays the graph; a kernel should have run once on every stream before.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from green.driver import Driver, GreenContextError, GreenContextUnsupported, load_driver
from green.partition import Partition


class GreenStreams:
    """The streams of one Partition. Several may live at once, for each splits the whole device.

    close() them, or use them in a `with`: first streams end, then contexts. Graphs captured on
    them must not be replayed afterwards. No green context is ever made current.

    Make all that are needed at start-up and choose among them: each takes milliseconds, and close()
    does not give everything back. Of two stages that had run a kernel, driver 580 kept 8 MiB of an
    H100's memory, each time.
    """

    def __init__(self, partition: Partition, device: torch.device | str) -> None:
        """Raises GreenContextUnsupported where the machine has no green contexts, and
        GreenContextError where this partition could not be had; nothing is left behind then."""
        self.partition = partition
        self.device = _cuda_device(device)
        self.granted: tuple[int, ...] = ()  # SMs of each stage, read back from the driver
        self.streams: tuple[torch.cuda.ExternalStream, ...] = ()
        self._undo: list[Callable[[], object]] = []  # the last first
        driver = load_driver()
        torch.cuda.synchronize(self.device)  # starts CUDA: green contexts hang on torch's own
        try:
            self._create(driver)
        except BaseException:
            with suppress(Exception):
                self.close()
            raise

    def _create(self, driver: Driver) -> None:
        ordinal = driver.call("cuDeviceGet", self.device.index)
        contexts, streams = [], []
        for description in _split(driver, ordinal, self.partition):
            flag = driver.enum("CUgreenCtxCreate_flags", "CU_GREEN_CTX_DEFAULT_STREAM")
            contexts.append(driver.call("cuGreenCtxCreate", description, ordinal, flag))
            self._undo.append(partial(driver.call, "cuGreenCtxDestroy", contexts[-1]))
        self.granted = tuple(_num_sms(driver, context) for context in contexts)
        for context in contexts:
            flag = driver.enum("CUstream_flags", "CU_STREAM_NON_BLOCKING")
            streams.append(driver.call("cuGreenCtxStreamCreate", context, flag, 0))
            self._undo.append(partial(driver.call, "cuStreamDestroy", streams[-1]))
        self.streams = tuple(
            torch.cuda.ExternalStream(int(stream), device=self.device) for stream in streams
        )
        # a graph that was replayed on another stream may still run on these SMs
        self._undo.append(lambda: torch.cuda.synchronize(self.device))

    @classmethod
    def of(cls, asked: Sequence[int], device: torch.device | str) -> "GreenStreams":
        """As the constructor, for SMs asked of this device; ValueError as in `Partition.of`."""
        device = _cuda_device(device)
        properties = torch.cuda.get_device_properties(device)
        capability = (properties.major, properties.minor)
        return cls(Partition.of(asked, properties.multi_processor_count, capability), device)

    def close(self) -> None:
        """Wait for the device, then destroy all; a second call does nothing. Every one is tried
        before the first error is raised."""
        self.streams, first_error = (), None
        while self._undo:
            try:
                self._undo.pop()()
            except Exception as error:
                first_error = first_error or error
        if first_error is not None:
            raise first_error

    def __enter__(self) -> "GreenStreams":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _cuda_device(device: torch.device | str) -> torch.device:
    """With its index; GreenContextUnsupported where it is no GPU of this machine."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise GreenContextUnsupported(f"device must be a GPU of this machine, got {device}")
    return torch.device(
        "cuda", torch.cuda.current_device() if device.index is None else device.index
    )


def _split(driver: Driver, ordinal: Any, partition: Partition) -> list[Any]:
    """A resource descriptor for each stage, of SMs that no other stage has."""
    whole = driver.call("cuDeviceGetDevResource", ordinal, _sm_type(driver))
    wanted, call = sum(partition.num_groups), "cuDevSmResourceSplitByCount"
    groups, num_made, rest = driver.call(call, wanted, whole, 0, partition.group_sms)
    if num_made < wanted:
        advice = (
            f"{num_made} of {wanted} groups of {partition.group_sms} SMs: ask for fewer, or all"
        )
        raise GreenContextError(call, 0, "too few groups", advice)
    left = iter(groups[:num_made])
    descriptions = []
    for count in partition.num_groups:
        parts = [next(left) for _ in range(count)] or [rest]
        descriptions.append(driver.call("cuDevResourceGenerateDesc", parts, len(parts)))
    return descriptions


def _num_sms(driver: Driver, context: Any) -> int:
    return driver.call("cuGreenCtxGetDevResource", context, _sm_type(driver)).sm.smCount


def _sm_type(driver: Driver) -> Any:
    return driver.enum("CUdevResourceType", "CU_DEV_RESOURCE_TYPE_SM")
